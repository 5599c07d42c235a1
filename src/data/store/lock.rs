//! Locks for exclusive access: one process per run, and one per labeling task. The kernel releases
//! a lock when its holder exits, however it exits. On file systems that machines share, a run has a
//! [lease](super::lease) instead.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::StoreError;
use super::lease::{Lease, host, is_shared, lease_holder, now};

/// Checks for the holder's name, one second in total.
const LOOKS: u32 = 50;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// A lock, held as long as this value lives.
#[derive(Debug)]
pub struct Lock(Kind);

#[derive(Debug)]
enum Kind {
    /// A lock of the kernel, on a local file system.
    File {
        _file: File,
    },
    Lease(Arc<Lease>),
}

impl Lock {
    /// Takes the lock of the run in `folder`. The error names the current holder.
    pub fn take(folder: &Path) -> Result<Self, StoreError> {
        Self::take_or_wait(folder, false, &mut |_| {})
    }

    /// Like [`Self::take`]. On a file system that machines share, waits for a holder that may be dead,
    /// which it tells with `say`; with `take_over`, takes the lease at once.
    pub fn take_or_wait(
        folder: &Path,
        take_over: bool,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, StoreError> {
        if is_shared(folder) {
            let lease = Lease::take(folder, take_over, say)?;
            return Ok(Self(Kind::Lease(Arc::new(lease))));
        }
        Self::of(&folder.join(".lock"), |holder| StoreError::Locked {
            path: folder.to_owned(),
            holder,
        })
    }

    /// Takes the lock of the run in `folder`; `None` if it is not free now.
    pub fn take_now(folder: &Path) -> Option<Self> {
        if is_shared(folder) && lease_holder(folder).is_some() {
            return None;
        }
        Self::take(folder).ok()
    }

    /// Returns the lease, which has to be checked before each commit.
    pub fn lease(&self) -> Option<Arc<Lease>> {
        match &self.0 {
            Kind::File { .. } => None,
            Kind::Lease(lease) => Some(Arc::clone(lease)),
        }
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
        Ok(Self(Kind::File { _file: file }))
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
    if is_shared(folder) {
        return lease_holder(folder);
    }
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
