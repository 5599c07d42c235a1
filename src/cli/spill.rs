//! The temporary folder into which queries spill. It is removed on exit, also on Ctrl-C and
//! SIGTERM; folders of killed programs are removed by the next program that starts.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tempfile::TempDir;

use super::failed::Failed;

/// The prefix of the names of these folders.
const PREFIX: &str = "ovchat-sql-";

/// The minimum age of a stale folder: a younger one may belong to a program that has not locked it
/// yet.
const YOUNG: Duration = Duration::from_secs(10);

/// The folder of this program while a query runs.
static CURRENT: Mutex<Option<PathBuf>> = Mutex::new(None);

/// A folder that is locked while it is in use.
pub struct Spill {
    folder: TempDir,
    _lock: File,
}

impl Spill {
    pub fn open() -> Result<Self, Failed> {
        let place = std::env::temp_dir();
        remove_stale(&place);
        let open = || -> io::Result<Self> {
            let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&place)?;
            let lock = File::open(folder.path())?;
            lock.lock()?;
            *CURRENT.lock().expect("no panic while locked") = Some(folder.path().to_owned());
            Ok(Self {
                folder,
                _lock: lock,
            })
        };
        let place = place.display();
        open().map_err(|error| {
            Failed::Words(format!(
                "cannot create a temporary folder in {place}: {error}; set TMPDIR to use another place"
            ))
        })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        *CURRENT.lock().expect("no panic while locked") = None;
    }
}

/// Exits on SIGINT and SIGTERM, whatever the program is doing, and removes its folder.
pub fn end_at_signals() -> Result<(), Failed> {
    let signals = Signals::new([SIGINT, SIGTERM]);
    let mut signals =
        signals.map_err(|error| Failed::Words(format!("cannot listen for signals: {error}")))?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            if let Ok(folder) = CURRENT.lock()
                && let Some(folder) = &*folder
            {
                remove(folder);
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Removes a folder into which a thread may still be writing.
fn remove(folder: &Path) {
    for _ in 0..10 {
        if fs::remove_dir_all(folder).is_ok() || !folder.exists() {
            return;
        }
    }
}

/// Removes the folders that no program has locked. Folders of other users cannot be removed, and
/// stay.
fn remove_stale(place: &Path) {
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX));
    for folder in folders {
        let metadata = folder.metadata();
        let is_young = |time: std::time::SystemTime| time.elapsed().is_ok_and(|age| age < YOUNG);
        if metadata.is_ok_and(|of| of.is_dir() && !of.modified().is_ok_and(is_young))
            && File::open(folder.path()).is_ok_and(|lock| lock.try_lock().is_ok())
        {
            let _ = fs::remove_dir_all(folder.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn only_old_folders_that_nobody_holds_are_removed() {
        let place = tempfile::tempdir().unwrap();
        let make = |name: &str, is_old: bool| {
            let folder = place.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("spilled"), "rows").unwrap();
            let handle = File::open(&folder).unwrap();
            if is_old {
                handle.set_modified(SystemTime::now() - YOUNG * 2).unwrap();
            }
            handle
        };
        make("ovchat-sql-dead", true);
        make("ovchat-sql-young", false);
        make("other", true);
        let held = make("ovchat-sql-held", true);
        held.lock().unwrap();
        remove_stale(place.path());
        let left = |name: &str| place.path().join(name).exists();
        assert!(!left("ovchat-sql-dead"));
        assert!(left("ovchat-sql-young") && left("other") && left("ovchat-sql-held"));
    }
}
