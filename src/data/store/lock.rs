//! Locks for exclusive access: one process per run, and one per labeling task. The kernel releases
//! a lock when its holder exits, however it exits.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::StoreError;

/// Checks for the holder's name, one second in total.
const LOOKS: u32 = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// A lock, held as long as this value lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the run in `folder`. The error names the current holder.
    pub fn take(folder: &Path) -> Result<Self, StoreError> {
        Self::of(&folder.join(".lock"), |holder| StoreError::Locked {
            path: folder.to_owned(),
            holder,
        })
    }

    /// Takes the lock of a labeling task. The error names the current holder.
    pub fn of_task(path: &Path, task: &str) -> Result<Self, StoreError> {
        Self::of(path, |holder| StoreError::Asked {
            task: task.to_owned(),
            holder,
        })
    }

    fn of(path: &Path, held: impl FnOnce(String) -> StoreError) -> Result<Self, StoreError> {
        let folder = path.parent().expect("a file in a folder");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(StoreError::io("write in", folder))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(named(&mut file))),
            Err(TryLockError::Error(source)) => return Err(StoreError::io("lock", path)(source)),
        }
        // The text is for error messages; the kernel holds the lock itself.
        let words = format!(
            "process {} on {} (since {})\n",
            std::process::id(),
            host(),
            now()
        );
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(words.as_bytes()));
        written.map_err(StoreError::io("write", path))?;
        Ok(Self { _file: file })
    }
}

/// Returns the holder named in a lock file. A process writes its name after it has taken the lock,
/// so this waits up to a second for it.
fn named(file: &mut File) -> String {
    for _ in 0..LOOKS {
        let mut holder = String::new();
        let read = file
            .rewind()
            .and_then(|()| file.read_to_string(&mut holder));
        if read.is_ok() && holder.ends_with('\n') {
            return holder.trim().to_owned();
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    "another process".to_owned()
}

/// Returns the holder of the lock of the run in `folder`, if it is locked. Writes nothing.
pub fn lock_holder(folder: &Path) -> Option<String> {
    let mut file = File::open(folder.join(".lock")).ok()?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            Some(holder.trim().to_owned())
        }
        _ => None,
    }
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() {
        "this machine".to_owned()
    } else {
        name.trim().to_owned()
    }
}

/// Returns the current UTC time in ISO 8601.
fn now() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs());
    let time = arrow::temporal_conversions::timestamp_s_to_datetime(seconds.cast_signed());
    time.map_or_else(|| seconds.to_string(), |time| format!("{time} UTC"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).unwrap();
        let refused = Lock::take(folder.path()).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())),
            "{refused}"
        );
        drop(first);
        Lock::take(folder.path()).unwrap();
    }
}
