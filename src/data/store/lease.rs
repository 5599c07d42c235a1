//! Exclusive access to a run on a file system that several machines share.
//!
//! Such file systems (NFS, Lustre, FUSE) do not always pass the kernel's locks on. There a file with the
//! holder's name is the lock: it is created only if it is absent, and renewed every ten seconds. A lease
//! is free if its process is dead, or if nobody has renewed it for a minute. A holder that was slower than
//! that looks before each commit, and stops.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::StoreError;

/// The name of the file in the run folder.
const NAME: &str = ".lease";

/// The times of a lease.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// The time between two renewals.
    renewed_every: Duration,
    /// The time without a renewal after which another machine may take it.
    free_after: Duration,
}

const TIMES: Times = Times {
    renewed_every: Duration::from_secs(10),
    free_after: Duration::from_secs(60),
};

/// The holder of a lease, as the file names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub host: String,
    /// The number of the machine's boot with that of the namespace of processes, the process, and its
    /// start in ticks since the boot: together they tell if the process still runs.
    boot: String,
    pub pid: u32,
    start: u64,
    /// The UTC time of the start, for people.
    pub since: String,
    /// The number of renewals.
    renewals: u64,
}

impl Holder {
    /// True for the same process, however often it has renewed the lease.
    fn is(&self, other: &Self) -> bool {
        let renewals = self.renewals;
        *self
            == Self {
                renewals,
                ..other.clone()
            }
    }

    /// True if it ran on this machine, which has not booted since.
    fn is_here(&self) -> bool {
        self.host == host() && self.boot == boot()
    }

    /// True if it ran on this machine and has ended. One of another container, or before the machine's
    /// last boot, is not known to have ended: another machine may have the same name.
    fn is_dead(&self) -> bool {
        self.is_here() && start_of(self.pid) != Some(self.start)
    }
}

/// A lease, held as long as this value lives.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
    holder: Holder,
    stop: Option<Sender<()>>,
    renewing: Option<JoinHandle<()>>,
}

impl Lease {
    /// Takes the lease of the run in `folder`. If another machine holds it, waits until it is renewed,
    /// which is an error that names the holder, or until it is free, and tells so with `say`. With
    /// `take_over`, takes it at once.
    pub fn take(
        folder: &Path,
        take_over: bool,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, StoreError> {
        Self::of(folder, take_over, TIMES, say)
    }

    fn of(
        folder: &Path,
        take_over: bool,
        times: Times,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, StoreError> {
        let path = folder.join(NAME);
        let held = |holder: &Holder| StoreError::Held {
            path: folder.to_owned(),
            holder: holder.words(),
        };
        let own = Holder {
            host: host(),
            boot: boot(),
            pid: std::process::id(),
            start: start_of(std::process::id()).unwrap_or(0),
            since: now(),
            renewals: 0,
        };
        let begun = Instant::now();
        let mut first: Option<Option<Holder>> = None;
        let mut is_told = take_over;
        loop {
            if let Some(file) = Self::create(&path, &own)? {
                return Ok(Self::begin(path, file, own, times));
            }
            // A file without a holder: its process was killed between two system calls.
            let found = read(&path)?;
            let seen = first.get_or_insert_with(|| found.clone());
            if let (Some(found), false) = (&found, is_told)
                && !found.is_here()
            {
                is_told = true;
                say(&format!(
                    "{} holds the lease of {}; if it does not renew it within {} seconds, this process \
                     takes it",
                    found.words(),
                    folder.display(),
                    times.free_after.as_secs()
                ));
            }
            if let (Some(found), false) = (&found, *seen == found) {
                return Err(held(found));
            }
            let is_free = begun.elapsed() >= times.free_after
                || take_over
                || found.as_ref().is_some_and(Holder::is_dead);
            if is_free {
                Self::remove(&path, found.as_ref(), own.pid)?;
                continue;
            }
            // A process of this machine that runs will renew it.
            if let Some(found) = found.filter(Holder::is_here) {
                return Err(held(&found));
            }
            thread::sleep(times.renewed_every / 20);
        }
    }

    /// Creates the file; `None` if there is one.
    fn create(path: &Path, own: &Holder) -> Result<Option<File>, StoreError> {
        let created = OpenOptions::new().write(true).create_new(true).open(path);
        let mut file = match created {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
            Err(error) => return Err(StoreError::io("write", path)(error)),
        };
        let written = file.write_all(&own.text()).and_then(|()| file.sync_all());
        written.map_err(StoreError::io("write", path))?;
        Ok(Some(file))
    }

    /// Removes the lease of a holder that has lost it. Of several processes that try, one moves the file;
    /// if it was another lease by then, it is put back.
    fn remove(path: &Path, lost: Option<&Holder>, pid: u32) -> Result<(), StoreError> {
        let aside = path.with_file_name(format!("{NAME}.{}.{pid}", host()));
        match fs::rename(path, &aside) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(StoreError::io("move", path)(error)),
        }
        let moved = read(&aside)?;
        if moved.as_ref() != lost {
            // Fails if a third process has created one meanwhile; the holder will notice.
            let _ = fs::hard_link(&aside, path);
        }
        let _ = fs::remove_file(&aside);
        Ok(())
    }

    fn begin(path: PathBuf, file: File, holder: Holder, times: Times) -> Self {
        let (stop, stopped) = channel();
        let mut own = holder.clone();
        let renewing = thread::spawn(move || {
            while stopped.recv_timeout(times.renewed_every) == Err(RecvTimeoutError::Timeout) {
                own.renewals += 1;
                // Another holder has another file, which this cannot overwrite. A lease that cannot be
                // renewed is lost in time, and noticed before the next commit. Numbers only grow, so the
                // text does not get shorter.
                let renewed = file.write_all_at(&own.text(), 0);
                drop(renewed.and_then(|()| file.sync_all()));
            }
        });
        Self {
            path,
            holder,
            stop: Some(stop),
            renewing: Some(renewing),
        }
    }

    /// Fails if another process has taken the lease.
    pub fn check(&self) -> Result<(), StoreError> {
        let found = read(&self.path)?;
        match found {
            Some(found) if found.is(&self.holder) => Ok(()),
            found => Err(StoreError::Lost {
                path: self.path.clone(),
                holder: found.map_or_else(|| "another process".to_owned(), |one| one.words()),
            }),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(renewing) = self.renewing.take() {
            let _ = renewing.join();
        }
        if self.check().is_ok() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Holder {
    fn text(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).expect("plain data");
        text.push(b'\n');
        text
    }

    fn words(&self) -> String {
        format!(
            "process {} on {} (since {})",
            self.pid, self.host, self.since
        )
    }
}

/// Returns the holder of the lease of the run in `folder` that seems to be alive.
pub fn lease_holder(folder: &Path) -> Option<String> {
    let path = folder.join(NAME);
    let holder = read(&path).ok()??;
    let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed();
    let is_renewed = age.map_or(true, |age| age < TIMES.free_after);
    (is_renewed && !holder.is_dead()).then(|| holder.words())
}

/// Reads the holder; `None` without a file, or if it is incomplete.
fn read(path: &Path) -> Result<Option<Holder>, StoreError> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io("read", path)(error)),
    }
}

/// The file systems that machines share, by the numbers of `statfs`, from linux/magic.h and the sources of
/// those that are not part of Linux.
const SHARED: [i64; 10] = [
    0x6969,      // NFS
    0x0bd0_0bd0, // Lustre
    0x6573_5546, // FUSE: sshfs, s3fs, GCS, JuiceFS
    0xff53_4d42, // CIFS
    0xfe53_4d42, // SMB 2
    0x4750_4653, // GPFS
    0x00c3_6400, // Ceph
    0x1983_0326, // BeeGFS
    0x0102_1997, // 9P
    0x5346_414f, // AFS
];

/// True if `folder` is on a file system that machines share, or the environment variable OVCHAT_LEASE says
/// so.
pub fn is_shared(folder: &Path) -> bool {
    if std::env::var_os("OVCHAT_LEASE").is_some() {
        return true;
    }
    rustix::fs::statfs(folder).is_ok_and(|found| SHARED.contains(&(found.f_type as i64)))
}

/// The name of this machine.
pub(super) fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() {
        "this machine".to_owned()
    } else {
        name.trim().to_owned()
    }
}

/// Returns the current UTC time in ISO 8601.
pub(super) fn now() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs());
    let time = arrow::temporal_conversions::timestamp_s_to_datetime(seconds.cast_signed());
    time.map_or_else(|| seconds.to_string(), |time| format!("{time} UTC"))
}

/// The number of this boot of the machine, and of the namespace of processes; empty outside Linux.
fn boot() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", boot.trim(), namespace.display())
}

/// The start of a process in ticks since the boot: field 22 of /proc/PID/stat. `None` if it does not run.
fn start_of(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may contain anything.
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Times = Times {
        renewed_every: Duration::from_millis(40),
        free_after: Duration::from_millis(400),
    };

    fn take(folder: &Path, take_over: bool) -> Result<Lease, StoreError> {
        Lease::of(folder, take_over, QUICK, &mut |_| {})
    }

    fn write(folder: &Path, change: impl FnOnce(&mut Holder)) {
        let mut holder = Holder {
            host: "elsewhere".to_owned(),
            boot: "b".to_owned(),
            pid: 1,
            start: 2,
            since: "today".to_owned(),
            renewals: 0,
        };
        change(&mut holder);
        File::create(folder.join(NAME))
            .and_then(|mut file| file.write_all(&holder.text()))
            .unwrap();
    }

    #[test]
    fn a_lease_of_a_running_process_is_refused_and_released_when_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let lease = take(folder.path(), false).unwrap();
        let refused = take(folder.path(), false).unwrap_err();
        let expected = format!("process {}", std::process::id());
        assert!(refused.to_string().contains(&expected), "{refused}");
        assert!(lease_holder(folder.path()).unwrap().contains(&expected));
        thread::sleep(QUICK.renewed_every * 3);
        lease.check().unwrap();
        assert!(read(&lease.path).unwrap().unwrap().renewals > 0);
        drop(lease);
        assert!(!folder.path().join(NAME).exists());
    }

    #[test]
    fn a_dead_process_of_this_machine_does_not_block() {
        let folder = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        // The process has another start now, or does not run.
        for pid in [std::process::id(), u32::MAX] {
            write(folder.path(), |holder| {
                (holder.host, holder.boot, holder.pid) = (host(), boot(), pid);
            });
            drop(take(folder.path(), false).unwrap());
        }
        assert!(begun.elapsed() < QUICK.free_after);
        // Another boot, or another container, may be another machine with the same name.
        write(folder.path(), |holder| holder.host = host());
        drop(take(folder.path(), false).unwrap());
        assert!(begun.elapsed() >= QUICK.free_after);
    }

    #[test]
    fn one_of_another_machine_is_taken_when_nobody_renews_it() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), |_| {});
        let begun = Instant::now();
        drop(take(folder.path(), false).unwrap());
        assert!(begun.elapsed() >= QUICK.free_after);
        write(folder.path(), |_| {});
        let begun = Instant::now();
        drop(take(folder.path(), true).unwrap());
        assert!(begun.elapsed() < QUICK.free_after);
        // A killed process left an empty file.
        File::create(folder.path().join(NAME)).unwrap();
        drop(take(folder.path(), false).unwrap());
    }

    #[test]
    fn one_that_is_renewed_elsewhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), |_| {});
        let path = folder.path().to_owned();
        let renewing = thread::spawn(move || {
            thread::sleep(QUICK.renewed_every);
            write(&path, |holder| holder.renewals = 1);
        });
        let refused = take(folder.path(), false).unwrap_err();
        renewing.join().unwrap();
        assert!(refused.to_string().contains("on elsewhere"), "{refused}");
    }

    #[test]
    fn the_old_holder_stops_and_leaves_the_new_one_alone() {
        let folder = tempfile::tempdir().unwrap();
        let old = take(folder.path(), false).unwrap();
        fs::remove_file(&old.path).unwrap();
        write(folder.path(), |holder| holder.pid = 77);
        let lost = old.check().unwrap_err().to_string();
        assert!(lost.contains("process 77 on elsewhere"), "{lost}");
        thread::sleep(QUICK.renewed_every * 2);
        drop(old);
        assert_eq!(read(&folder.path().join(NAME)).unwrap().unwrap().pid, 77);
    }
}
