//! Recovery of a corrupt manifest: from the previous manifest with its log, or from the record of
//! each complete table in `.cache/records`, verified against the table's files.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::folder::RunFolder;
use super::manifest::PREVIOUS;
use super::place::{placed, relocated_below_cache};
use super::record::{RECORDS, Record, record_name};
use super::{ArchivedTable, Manifest, StoreError, TableVersion, create_folder, hash_file, sealed};

impl Manifest {
    /// True if there are files that [`Self::restored`] can use.
    pub(super) fn is_restorable(folder: &Path) -> bool {
        folder.join(PREVIOUS).exists() || folder.join(RECORDS).exists()
    }

    /// Returns the corrupt files of the manifest itself, detected by their checksums.
    pub fn flaws(folder: &Path) -> Vec<Flaw> {
        let mut flaws = Vec::new();
        for name in ["manifest.json", PREVIOUS] {
            let problem = match fs::read(folder.join(name)) {
                Ok(text) => sealed::flaw(&text).map(str::to_owned),
                Err(error) if error.kind() == ErrorKind::NotFound && name == PREVIOUS => None,
                Err(error) => Some(error.to_string()),
            };
            flaws.extend(problem.map(|problem| Flaw::new(name, problem)));
        }
        for generation in Self::generations(folder) {
            let name = format!("manifest.{generation}.log");
            let lines = fs::read(folder.join(&name)).unwrap_or_default();
            for (number, line) in lines.split_inclusive(|byte| *byte == b'\n').enumerate() {
                let problem = match line.strip_suffix(b"\n") {
                    None => "is truncated",
                    Some(line) if sealed::unseal_line(line).is_none() => "is corrupt",
                    Some(_) => continue,
                };
                flaws.push(Flaw::new(&name, format!("line {} {problem}", number + 1)));
            }
        }
        flaws
    }

    /// Restores the manifest of a run whose `manifest.json` cannot be read because of `problem`.
    pub(super) fn restored(folder: &Path, problem: &str) -> Result<Self, StoreError> {
        let path = folder.join("manifest.json");
        if let Ok(mut manifest) = Self::read_sealed(folder, PREVIOUS) {
            manifest.replay_logs()?;
            if manifest.damage.is_none() {
                manifest.damage = Some(format!(
                    "{}: {problem}; restored from {PREVIOUS} and its log",
                    path.display()
                ));
            }
            return Ok(manifest);
        }
        let Some(mut manifest) = proved(folder)? else {
            return Err(StoreError::Manifest {
                path,
                problem: format!(
                    "{problem}, and it cannot be restored from {PREVIOUS} or from table records; move the \
                     folder away, or choose another one with --run"
                ),
            });
        };
        manifest.damage = Some(format!(
            "{}: {problem}; restored from the records of {} tables with intact files",
            path.display(),
            manifest.made.len()
        ));
        Ok(manifest)
    }
}

/// Returns a manifest of the tables whose files match their records; `None` if there are no
/// records.
fn proved(folder: &Path) -> Result<Option<Manifest>, StoreError> {
    let entries = fs::read_dir(folder.join(RECORDS)).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let mut manifest: Option<Manifest> = None;
    for path in paths {
        let text = fs::read(&path).map_err(StoreError::io("read", &path))?;
        if sealed::flaw(&text).is_some() {
            continue;
        }
        let Ok(record) = serde_json::from_slice::<Record>(&text) else {
            continue;
        };
        let Record {
            format,
            pipeline,
            fork,
            made,
        } = record;
        let manifest = manifest.get_or_insert_with(|| {
            let mut manifest = Manifest::new(folder, &pipeline);
            manifest.format = format;
            manifest.fork = fork;
            let logs = Manifest::generations(folder);
            manifest.generation = logs.last().copied().unwrap_or(0) + 1;
            manifest
        });
        let archived = relocated_below_cache(made.clone());
        if manifest.find(&made.table, made.round).is_none() && is_whole(folder, &made) {
            manifest.made.push(made);
        } else if is_whole(folder, &archived) {
            manifest.archived.push(ArchivedTable { made: archived });
        }
    }
    if let Some(manifest) = &mut manifest {
        // Image files are not recorded; the loading stages restore them.
        manifest.made.retain(|made| !made.is_loaded());
    }
    Ok(manifest)
}

/// True if all files of a version exist and match their checksums.
fn is_whole(folder: &Path, made: &TableVersion) -> bool {
    let files: Vec<(String, &str)> = made.hashes().collect();
    let is_known = made
        .checkpoint
        .as_ref()
        .is_none_or(|one| one.sha256.len() == one.files.len());
    is_known
        && files
            .par_iter()
            .all(|(file, sha256)| hash_file(&folder.join(file)).is_ok_and(|found| found == *sha256))
}

/// A file of a run that does not match the manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flaw {
    /// Path relative to the run folder.
    pub file: String,
    /// Description of the problem: `missing`, `size mismatch`.
    pub problem: String,
}

impl Flaw {
    fn new(file: &str, problem: String) -> Self {
        let file = file.to_owned();
        Self { file, problem }
    }
}

impl RunFolder {
    /// Writes the record of a complete version.
    pub(super) fn write_record(&self, table: &str, round: Option<u32>) -> Result<(), StoreError> {
        match self.manifest.under_way(table, round) {
            Some(made) => self.write_record_of(made),
            None => Ok(()),
        }
    }

    fn write_record_of(&self, made: &TableVersion) -> Result<(), StoreError> {
        let record = Record {
            format: self.manifest.format,
            pipeline: self.manifest.pipeline.clone(),
            fork: self.manifest.fork.clone(),
            made: placed(made.clone()),
        };
        let folder = self.root.join(RECORDS);
        create_folder(&folder)?;
        let text = serde_json::to_vec_pretty(&record).expect("a record is plain data");
        super::write_atomically(&folder.join(record_name(made)), &sealed::seal(&text))
    }

    /// Returns the files of `versions`, and of images and videos if `with_media`, that are missing or
    /// corrupt. Each file is read once.
    pub fn flaws<'m>(
        &self,
        versions: impl IntoIterator<Item = &'m TableVersion>,
        with_media: bool,
    ) -> Vec<Flaw> {
        let mut files: BTreeMap<String, Option<&str>> = BTreeMap::new();
        let mut sizes: BTreeMap<String, u64> = BTreeMap::new();
        for made in versions {
            files.extend(made.hashes().map(|(file, sha256)| (file, Some(sha256))));
            let folders = made.checkpoint.iter().map(|one| (&one.folder, &one.files));
            let states = made.states.iter().map(|one| (&one.folder, &one.files));
            for (folder, listed) in folders.chain(states) {
                for (name, bytes) in listed {
                    let file = format!("{folder}/{name}");
                    files.entry(file.clone()).or_insert(None);
                    sizes.insert(file, *bytes);
                }
            }
        }
        if with_media {
            let media = self.manifest.media();
            files.extend(media.map(|file| (file.file.clone(), Some(file.sha256.as_str()))));
        }
        let files: Vec<(String, Option<&str>)> = files.into_iter().collect();
        let checked = files.par_iter().filter_map(|(file, sha256)| {
            let path = self.root.join(file);
            let problem = match (fs::metadata(&path), sha256) {
                (Err(error), _) if error.kind() == ErrorKind::NotFound => "missing".to_owned(),
                (Err(error), _) => error.to_string(),
                (Ok(found), None) if sizes.get(file).is_some_and(|size| *size != found.len()) => {
                    "size mismatch".to_owned()
                }
                (Ok(_), None) => return None,
                (Ok(_), Some(sha256)) => match hash_file(&path) {
                    Ok(found) if found == *sha256 => return None,
                    Ok(_) => "checksum mismatch: the file changed after it was written".to_owned(),
                    Err(error) => error.to_string(),
                },
            };
            let file = file.clone();
            Some(Flaw { file, problem })
        });
        let mut flaws: Vec<Flaw> = checked.collect();
        flaws.sort();
        flaws
    }

    /// Returns the corrupt records of complete versions. Earlier versions of this program wrote no
    /// records, so a missing one is not a flaw.
    pub fn record_flaws(&self) -> Vec<Flaw> {
        let made = self.manifest.made.iter();
        let complete = made.filter(|made| made.complete);
        let flaw = |made: &TableVersion| {
            let file = format!("{RECORDS}/{}", record_name(made));
            let problem = match fs::read(self.root.join(&file)) {
                Ok(text) => sealed::flaw(&text)?.to_owned(),
                Err(error) if error.kind() == ErrorKind::NotFound => return None,
                Err(error) => error.to_string(),
            };
            Some(Flaw { file, problem })
        };
        complete.filter_map(flaw).collect()
    }

    /// Rewrites the records of all complete versions if one is corrupt. Returns the corrupt ones.
    pub fn mend_records(&self) -> Result<Vec<Flaw>, StoreError> {
        let flaws = self.record_flaws();
        if !flaws.is_empty() {
            for made in self.manifest.made.iter().filter(|made| made.complete) {
                self.write_record_of(made)?;
            }
        }
        Ok(flaws)
    }

    /// Sets corrupt files aside, and removes the affected entries from the manifest. Returns the
    /// flaws.
    pub fn set_flaws_aside(&mut self) -> Result<Vec<Flaw>, StoreError> {
        let versions: Vec<TableVersion> = self.manifest.versions().cloned().collect();
        let flaws = self.flaws(&versions, true);
        for flaw in &flaws {
            let path = self.root.join(&flaw.file);
            if path.exists() {
                self.put_aside(&path)?;
            }
        }
        if !flaws.is_empty() {
            self.strike_out_lost();
            self.manifest.rewrite()?;
        }
        Ok(flaws)
    }
}
