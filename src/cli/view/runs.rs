//! The runs that the page shows: their manifests as they are now, and caches of what was read.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use super::asked::{Asked, Problem};
use super::positions::{ListKey, Positions};
use super::turns::{Turn, Turns};
use crate::graph::Graph;
use crate::spill::Spill;
use crate::sql::{report_views, tables};
use ovchat_data::store::{Images, Lookup, Manifest, RunFolder, TableVersion, lock_holder, rows_at};
use ovchat_data::tables::{Pair, Prompt, Row};
use ovchat_query::{self as query, Part, QueryTable, Room, View};

/// The memory limit of a query. One runs at a time: together with indexes and images, the server stays
/// below 600 MB.
const QUERY_MEMORY: usize = 224 << 20;

/// The most prompts of which an index is built at once.
const INDEXED_AT_ONCE: u64 = 100_000;

/// The number of lists of positions that are kept.
const LISTS_KEPT: usize = 6;

/// All runs of the page.
pub struct Runs {
    pub list: Vec<Run>,
    /// The folder of temporary files.
    pub spill: PathBuf,
    /// Set when the server ends: requests end, too.
    pub ends: Arc<AtomicBool>,
    /// The time limit of a request.
    pub query_time: Duration,
    /// Held while an image is decoded.
    pub decoding: Mutex<()>,
    memory: usize,
    inside: Turns,
    apart: Turns,
}

/// A run.
pub struct Run {
    pub folder: PathBuf,
    pub name: String,
    snapshot: Mutex<Option<Arc<Snapshot>>>,
    images: Mutex<Option<(usize, Images)>>,
    /// Indexes of static tables by the IDs of their prompts.
    prompts: Arc<Mutex<HashMap<String, Option<Lookup>>>>,
    pub(super) lists: Mutex<Vec<(ListKey, Arc<Positions>)>>,
    /// The graph with the stamp at which it was made, and the problem with the pipeline file.
    pub(super) graph: Mutex<Option<(String, Graph, Option<String>)>>,
}

/// A run at one moment.
pub struct Snapshot {
    pub run: RunFolder,
    /// Changes with the manifest.
    pub stamp: String,
}

impl Runs {
    pub fn new(folders: Vec<PathBuf>, spill: &Spill, query_time: Duration) -> Self {
        let run = |folder: PathBuf| Run {
            name: named(&folder),
            folder,
            snapshot: Mutex::default(),
            images: Mutex::default(),
            prompts: Arc::default(),
            lists: Mutex::default(),
            graph: Mutex::default(),
        };
        Self {
            list: folders.into_iter().map(run).collect(),
            spill: spill.path().to_owned(),
            ends: Arc::default(),
            query_time,
            decoding: Mutex::default(),
            memory: QUERY_MEMORY,
            inside: Turns::default(),
            apart: Turns::default(),
        }
    }

    /// Returns the run that a request is about.
    pub fn of(&self, asked: &Asked) -> Result<&Run, Problem> {
        let number = asked.number::<usize>("run")?.unwrap_or(0);
        let missing = || Problem::Missing(format!("there is no run {number} on this page"));
        self.list.get(number).ok_or_else(missing)
    }

    fn of_query(&self) -> Room<'_> {
        Room {
            memory: self.memory,
            spill: Some(&self.spill),
        }
    }

    /// Sets the memory limit of a query.
    #[must_use]
    pub fn with_memory(self, memory: usize) -> Self {
        Self { memory, ..self }
    }

    /// Returns the memory of a query, once no other runs in this process.
    pub fn room(&self, asked: &Asked) -> Result<Turn<'_>, Problem> {
        self.inside.turn(asked, self.of_query())
    }

    /// Waits until no other query of a client runs in another process.
    pub fn apart(&self, asked: &Asked) -> Result<Turn<'_>, Problem> {
        self.apart.turn(asked, self.of_query())
    }

    /// Runs a query over all tables of a run and the views of its report.
    pub fn query(
        &self,
        snapshot: &Snapshot,
        asked: &Asked,
        sql: &str,
        mut sink: impl FnMut(Part) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let room = self.room(asked)?;
        let tables = tables(&snapshot.run, false)?;
        let views = snapshot.views();
        query::stream_within(sql, &[], &tables, &views, room.room(), |part| {
            asked.go_on()?;
            sink(part)
        })
    }
}

impl Run {
    /// Returns the run as it is now.
    pub fn now(&self) -> Result<Arc<Snapshot>, Problem> {
        let stamp = stamp(&self.folder);
        let mut known = self.snapshot.lock().expect("no panic while locked");
        if let Some(snapshot) = &*known
            && snapshot.stamp == stamp
        {
            return Ok(Arc::clone(snapshot));
        }
        let run = RunFolder::read(&self.folder)?;
        let snapshot = Arc::new(Snapshot { run, stamp });
        *known = Some(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    /// Returns a text that changes when the run does.
    pub fn stamp(&self) -> String {
        let running = lock_holder(&self.folder).is_some();
        format!("{}{}", stamp(&self.folder), if running { "r" } else { "" })
    }

    /// Returns the bytes of an image.
    pub fn image(&self, id: &str) -> Result<Arc<[u8]>, Problem> {
        let mut images = self.images(&*self.now()?)?;
        let (_, images) = images.as_mut().expect("it was opened");
        if !images.contains(id) {
            return Err(Problem::Missing(format!("{} has no image {id}", self.name)));
        }
        Ok(images.bytes(id)?)
    }

    /// True if the run has an image.
    pub fn has_image(&self, id: &str) -> bool {
        let images = self.now().and_then(|now| {
            Ok(self
                .images(&now)?
                .as_ref()
                .is_some_and(|(_, images)| images.contains(id)))
        });
        images.unwrap_or(false)
    }

    /// Returns the index of images, with those that were added since.
    fn images(
        &self,
        snapshot: &Snapshot,
    ) -> Result<MutexGuard<'_, Option<(usize, Images)>>, Problem> {
        let mut images = self.images.lock().expect("no panic while locked");
        let files = &snapshot.run.manifest().images;
        match &mut *images {
            Some((known, images)) => {
                for file in files.iter().skip(*known) {
                    images.added(&self.folder, file)?;
                }
                *known = files.len().max(*known);
            }
            empty => *empty = Some((files.len(), Images::open(&self.folder, files)?)),
        }
        Ok(images)
    }

    /// Returns prompts of a static table by their IDs, from an index that is kept. That of a large table
    /// is built beside the first requests, which search for theirs.
    pub fn prompts(
        &self,
        runs: &Runs,
        snapshot: &Snapshot,
        asked: &Asked,
        made: &TableVersion,
        ids: &[&str],
    ) -> Result<Vec<Option<Prompt>>, Problem> {
        let Some(places) = self.places_of_prompts(snapshot, made, ids)? else {
            let wanted: Vec<String> = ids.iter().map(|id| literal(id)).collect();
            let condition = format!("prompt_id in ({})", wanted.join(", "));
            let found: Vec<Prompt> = snapshot.rows(runs, asked, made, &condition, ids.len())?;
            let of = |id: &&str| {
                found
                    .iter()
                    .find(|prompt| prompt.prompt_id == **id)
                    .cloned()
            };
            return Ok(ids.iter().map(of).collect());
        };
        let mut wanted: Vec<u64> = places.iter().flatten().copied().collect();
        wanted.sort_unstable();
        wanted.dedup();
        let files: Vec<PathBuf> = made
            .files()
            .map(|file| self.folder.join(&file.file))
            .collect();
        let sizes: Vec<u64> = made.files().map(|file| file.rows).collect();
        let positions: Vec<(u32, u64)> = wanted.iter().map(|row| position(&sizes, *row)).collect();
        let rows: Vec<Prompt> = rows_at(&files, &positions)?;
        let found: HashMap<u64, Prompt> = wanted.into_iter().zip(rows).collect();
        // A prompt may have several pairs on a page.
        let rows = places.into_iter().map(|place| found.get(&place?).cloned());
        Ok(rows.collect())
    }

    /// Returns the numbers of the rows of prompts; `None` while the index is being built.
    fn places_of_prompts(
        &self,
        snapshot: &Snapshot,
        made: &TableVersion,
        ids: &[&str],
    ) -> Result<Option<Vec<Option<u64>>>, Problem> {
        let files: Vec<PathBuf> = made
            .files()
            .map(|file| self.folder.join(&file.file))
            .collect();
        let mut indexes = self.prompts.lock().expect("no panic while locked");
        // Versions that were replaced are not asked for again.
        indexes.retain(|key, _| snapshot.manifest().made.iter().any(|made| made.key == *key));
        if !indexes.contains_key(&made.key) {
            if made.rows() > INDEXED_AT_ONCE {
                indexes.insert(made.key.clone(), None);
                let (key, all) = (made.key.clone(), Arc::clone(&self.prompts));
                std::thread::spawn(move || {
                    let index = Lookup::open(files, "prompt_id").ok();
                    let mut indexes = all.lock().expect("no panic while locked");
                    match index {
                        Some(index) => indexes.insert(key, Some(index)),
                        // The next request tries again.
                        None => indexes.remove(&key),
                    };
                });
                return Ok(None);
            }
            indexes.insert(made.key.clone(), Some(Lookup::open(files, "prompt_id")?));
        }
        let index = indexes.get(&made.key).and_then(Option::as_ref);
        Ok(index.map(|index| {
            let place = |id: &&str| index.position(id).map(|place| place as u64);
            ids.iter().map(place).collect()
        }))
    }

    /// Keeps a list of positions, in place of the oldest one.
    pub fn keep_list(&self, key: ListKey, list: &Arc<Positions>) {
        let mut lists = self.lists.lock().expect("no panic while locked");
        lists.retain(|(other, _)| *other != key);
        if lists.len() >= LISTS_KEPT {
            lists.remove(0);
        }
        lists.push((key, Arc::clone(list)));
    }
}

impl Snapshot {
    pub fn manifest(&self) -> &Manifest {
        self.run.manifest()
    }

    pub fn views(&self) -> Vec<View> {
        report_views(&self.manifest().source)
    }

    /// Returns the versions of a kind, in the order in which they were built.
    pub fn of_kind(&self, kind: &'static str) -> impl Iterator<Item = &TableVersion> {
        let made = self.manifest().made.iter();
        made.filter(move |made| made.kind.as_deref() == Some(kind))
    }

    /// Returns the names of the tables of a kind.
    pub fn names(&self, kind: &'static str) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for made in self.of_kind(kind) {
            if !names.contains(&made.table) {
                names.push(made.table.clone());
            }
        }
        names
    }

    /// Returns the versions that a version was built from.
    pub fn inputs<'s>(&'s self, made: &'s TableVersion) -> impl Iterator<Item = &'s TableVersion> {
        let keys = made.because["inputs"].as_object();
        let keys: Vec<&str> = keys
            .into_iter()
            .flat_map(|inputs| inputs.values().filter_map(Value::as_str))
            .collect();
        self.manifest().made.iter().filter(move |other| {
            let known = other.content.as_deref().unwrap_or(&other.key);
            keys.contains(&known)
        })
    }

    /// Returns the nearest version of a kind that a version was built from, directly or through others.
    pub fn nearest<'s>(&'s self, made: &'s TableVersion, kind: &str) -> Option<&'s TableVersion> {
        let mut next: Vec<&TableVersion> = self.inputs(made).collect();
        let mut seen = 0;
        while seen < next.len() {
            let made = next[seen];
            if made.kind.as_deref() == Some(kind) {
                return Some(made);
            }
            for input in self.inputs(made) {
                if !next.iter().any(|other| std::ptr::eq(*other, input)) {
                    next.push(input);
                }
            }
            seen += 1;
        }
        None
    }

    /// Returns one version as a table for queries.
    pub fn table(&self, made: &TableVersion, schema: arrow::datatypes::SchemaRef) -> QueryTable {
        QueryTable {
            name: made.table.clone(),
            schema,
            files: vec![(made.round, self.run.checked(made.files()))],
            with_round: made.round.is_some(),
        }
    }

    /// Returns the rows of a version about a prompt.
    pub fn about<R: Row>(
        &self,
        runs: &Runs,
        asked: &Asked,
        made: &TableVersion,
        prompt_id: &str,
    ) -> Result<Vec<R>, Problem> {
        self.rows(
            runs,
            asked,
            made,
            &format!("prompt_id = {}", literal(prompt_id)),
            1000,
        )
    }

    /// Returns at most `most` rows of a version that meet a condition.
    pub fn rows<R: Row>(
        &self,
        runs: &Runs,
        asked: &Asked,
        made: &TableVersion,
        condition: &str,
        most: usize,
    ) -> Result<Vec<R>, Problem> {
        let table = self.table(made, R::schema());
        let room = runs.room(asked)?;
        let mut found = Vec::new();
        let searched = query::positions(&table, Some(condition), None, room.room(), |rows| {
            asked.go_on()?;
            found.extend_from_slice(rows);
            if found.len() >= most {
                return Err(Problem::Enough);
            }
            Ok(())
        });
        match searched {
            Ok(()) | Err(Problem::Enough) => {}
            Err(problem) => return Err(problem),
        }
        found.truncate(most);
        let files = table.files.iter().flat_map(|(_, files)| files);
        let files: Vec<&Path> = files.map(|file| file.path.as_path()).collect();
        Ok(rows_at(&files, &found)?)
    }
}

/// Returns the position of a row of a table whose files have these numbers of rows.
fn position(files: &[u64], row: u64) -> (u32, u64) {
    let mut row = row;
    for (file, rows) in files.iter().enumerate() {
        if row < *rows {
            return (file as u32, row);
        }
        row -= rows;
    }
    // Refused when it is read.
    (files.len() as u32, row)
}

/// Returns a text as an SQL literal.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Returns the name of a run: that of its folder.
fn named(folder: &Path) -> String {
    let whole = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let name = whole.file_name().unwrap_or(whole.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Returns a text that changes with the files of a manifest.
fn stamp(folder: &Path) -> String {
    let mut newest = (0, 0);
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("manifest") && name != ovchat_data::store::LABELS {
            continue;
        }
        if let Ok(data) = entry.metadata() {
            let changed = data.modified().ok();
            let since = changed.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
            newest.0 = newest.0.max(since.map_or(0, |since| since.as_nanos()));
            newest.1 += data.len();
        }
    }
    format!("{:x}-{:x}", newest.0, newest.1)
}

/// Returns all runs with their tables.
pub fn overview(runs: &Runs) -> Value {
    let all = runs.list.iter().map(|run| match run.now() {
        Ok(snapshot) => of_run(run, &snapshot),
        Err(problem) => json!({
            "name": run.name, "folder": run.folder, "running": null, "problem": problem.words().1, "stamp": run.stamp(),
            "rounds": [], "policy": null, "pair_tables": [], "tables": [],
        }),
    });
    json!({ "runs": all.collect::<Vec<_>>() })
}

fn of_run(run: &Run, snapshot: &Snapshot) -> Value {
    let manifest = snapshot.manifest();
    let mut rounds: Vec<u32> = manifest.made.iter().filter_map(|made| made.round).collect();
    rounds.sort_unstable();
    rounds.dedup();
    let staged = manifest.staged.iter().map(|made| (made, true));
    let made = manifest.made.iter().map(|made| (made, false)).chain(staged);
    let tables = made.map(|(made, is_staged)| {
        json!({
            "name": made.table, "kind": made.kind, "round": made.round, "rows": made.rows(),
            "complete": made.complete, "staged": is_staged,
        })
    });
    let policy = manifest
        .made
        .iter()
        .find_map(|made| made.checkpoint.as_ref());
    json!({
        "name": run.name, "folder": run.folder, "running": lock_holder(&run.folder), "problem": manifest.damage,
        "stamp": run.stamp(), "rounds": rounds, "policy": policy.map(|checkpoint| &checkpoint.model),
        "pair_tables": snapshot.names(Pair::KIND), "tables": tables.collect::<Vec<_>>(),
    })
}
