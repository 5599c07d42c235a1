//! SIGINT and SIGTERM: the first signal stops the run cleanly, the second ends it at once; the exit
//! codes are 130 and 143.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use ovchat_io::files;

/// A flag that is set when the run is interrupted; checked between rows.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Starts listening for SIGINT and SIGTERM.
    pub fn listen() -> std::io::Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // The order matters: a signal that arrives after a first one ends the process.
            flag::register_conditional_shutdown(
                signal,
                exit_code(signal),
                interrupt.asked.clone(),
            )?;
            flag::register(signal, interrupt.asked.clone())?;
            flag::register_usize(signal, interrupt.signal.clone(), signal as usize)?;
        }
        files::stop_when(interrupt.asked.clone());
        Ok(interrupt)
    }

    /// Raises it, as a signal does.
    pub fn raise(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    pub fn raised(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// The exit code of an interrupted program: 130 for SIGINT, 143 for SIGTERM.
    pub fn code(&self) -> i32 {
        match self.signal.load(Ordering::Relaxed) {
            0 => exit_code(SIGINT),
            signal => exit_code(signal as i32),
        }
    }
}

fn exit_code(signal: i32) -> i32 {
    128 + signal
}
