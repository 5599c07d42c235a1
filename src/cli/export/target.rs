//! The file that an export is written to.

use std::fs;
use std::path::Path;

use crate::failed::Failed;
use ovchat_data::store::{RunFolder, StoreError, write_atomically};

/// Writes an export: a file as a whole, or into a pipe or device such as /dev/stdout. Fails for a folder,
/// and for a file of the run.
pub fn write(run: &RunFolder, to: &Path, bytes: &[u8]) -> Result<(), Failed> {
    let real = |path: &Path| path.canonicalize().ok();
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty());
    let place = real(folder.unwrap_or(Path::new(".")));
    if let (Some(place), Some(root)) = (place, real(run.root()))
        && place.starts_with(root)
    {
        return Err(Failed::Usage(format!(
            "{} is in the run folder; name a file elsewhere",
            to.display()
        )));
    }
    let failed = |error: std::io::Error| StoreError::io("write", to)(error);
    match fs::metadata(to) {
        Ok(found) if found.is_dir() => Err(Failed::Usage(format!(
            "{} is a folder; name a file in it",
            to.display()
        ))),
        Ok(found) if !found.is_file() => {
            let mut pipe = fs::OpenOptions::new()
                .write(true)
                .open(to)
                .map_err(failed)?;
            Ok(std::io::Write::write_all(&mut pipe, bytes).map_err(failed)?)
        }
        // The target of a link is replaced, not the link.
        Ok(_) => Ok(write_atomically(
            &real(to).unwrap_or_else(|| to.to_owned()),
            bytes,
        )?),
        Err(_) => Ok(write_atomically(to, bytes)?),
    }
}
