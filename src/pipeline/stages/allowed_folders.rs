//! The folders that a source's images may be read from: its image folder and the folder of its
//! file. The paths in records are untrusted input: their author may not be the user who runs the
//! pipeline.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// Folders that may be read from, by their canonical paths.
pub struct AllowedFolders(Vec<PathBuf>);

/// The file that a path resolves to, inside or outside the allowed folders.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    Inside(PathBuf),
    Outside(PathBuf),
}

impl AllowedFolders {
    /// Allows these folders, and for those in a Hugging Face cache the blobs that their symbolic
    /// links point to. A folder that does not exist is skipped.
    pub fn new(folders: &[&Path]) -> Self {
        let mut inside = Vec::new();
        for folder in folders {
            let is_here = folder.as_os_str().is_empty();
            let folder = if is_here { Path::new(".") } else { folder };
            if let Ok(folder) = folder.canonicalize() {
                inside.extend(blobs(&folder).and_then(|blobs| blobs.canonicalize().ok()));
                inside.push(folder);
            }
        }
        Self(inside)
    }

    /// Returns the file that a path resolves to, with all symbolic links followed.
    pub fn place(&self, path: &Path) -> io::Result<Place> {
        let file = path.canonicalize()?;
        let is_inside = self.0.iter().any(|folder| file.starts_with(folder));
        Ok(if is_inside {
            Place::Inside(file)
        } else {
            Place::Outside(file)
        })
    }
}

/// Returns the blob folder of the Hugging Face cache that a folder belongs to:
/// `datasets--org--name/snapshots/<revision>/…` links to `datasets--org--name/blobs`.
fn blobs(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder
        .ancestors()
        .find(|folder| folder.file_name() == Some(OsStr::new("snapshots")))?;
    let repository = snapshots.parent()?;
    let name = repository.file_name()?.to_str()?;
    let is_cache = ["datasets--", "models--", "spaces--"]
        .iter()
        .any(|kind| name.starts_with(kind));
    is_cache.then(|| repository.join("blobs"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_path_is_inside_when_the_file_that_it_leads_to_is() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let real = |name: &str| at(name).canonicalize().unwrap();
        fs::create_dir_all(at("images/deep")).unwrap();
        fs::create_dir_all(at("images-of-others")).unwrap();
        fs::write(at("images/deep/a.png"), "a").unwrap();
        fs::write(at("images-of-others/b.png"), "b").unwrap();
        symlink(at("images-of-others"), at("images/others")).unwrap();
        symlink("a.png", at("images/deep/link.png")).unwrap();
        symlink(at("images"), at("linked")).unwrap();
        let allowed = AllowedFolders::new(&[&at("linked"), &at("missing")]);
        let place = |name: &str| allowed.place(&at("linked").join(name)).unwrap();
        let inside = Place::Inside(real("images/deep/a.png"));
        let outside = Place::Outside(real("images-of-others/b.png"));
        let absolute = at("images-of-others/b.png");
        let absolute = absolute.to_str().unwrap();
        let root = format!("/proc/self/root{absolute}");
        for name in ["deep/a.png", "deep/link.png", "deep/../deep/./a.png"] {
            assert_eq!(place(name), inside, "{name}");
        }
        for name in [
            "others/b.png",
            "../images-of-others/b.png",
            "deep/../../images-of-others/b.png",
            absolute,
            &root,
        ] {
            assert_eq!(place(name), outside, "{name}");
        }
        assert!(allowed.place(&at("linked/file:///a.png")).is_err());
    }

    #[test]
    fn the_blobs_of_a_hub_cache_are_inside_and_those_of_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for repository in ["datasets--o--mine", "datasets--o--other", "plain"] {
            fs::create_dir_all(at(repository).join("blobs")).unwrap();
            fs::create_dir_all(at(repository).join("snapshots/1/images")).unwrap();
            fs::write(at(repository).join("blobs/f00"), "a").unwrap();
            let link = at(repository).join("snapshots/1/images/a.png");
            symlink("../../../blobs/f00", link).unwrap();
        }
        let foreign = at("datasets--o--other/blobs/f00");
        symlink(foreign, at("datasets--o--mine/snapshots/1/images/b.png")).unwrap();
        let place = |repository: &str, name: &str| {
            let images = at(repository).join("snapshots/1/images");
            AllowedFolders::new(&[&images])
                .place(&images.join(name))
                .unwrap()
        };
        let blob = |repository: &str| at(repository).join("blobs/f00").canonicalize().unwrap();
        let mine = Place::Inside(blob("datasets--o--mine"));
        assert_eq!(place("datasets--o--mine", "a.png"), mine);
        let other = Place::Outside(blob("datasets--o--other"));
        assert_eq!(place("datasets--o--mine", "b.png"), other);
        assert_eq!(place("plain", "a.png"), Place::Outside(blob("plain")));
    }
}
