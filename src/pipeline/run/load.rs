//! The load stages: records of a user's file become rows, images and frames of videos become rows of
//! `images`.

use std::path::Path;
use std::time::Instant;

use arrow::array::{AsArray, RecordBatch};

use super::report::{Start, Unit};
use super::runner::{Runner, count, note_once, took, write_beside};
use crate::config::{KeepImages, PlannedStage};
use crate::stages::{Failure, LoadStage, Record, TableName, rejects};
use ovchat_data::store::{
    Event, Images, Key, Media, PartRecord, TableReader, TableVersion, Videos,
};
use ovchat_data::tables::{Image, ImageFile, RejectClass, Video};
use ovchat_io::files;

/// The number of records that are read, checked and committed together.
const PART_RECORDS: usize = 256;

/// The start of a part: some records that are loaded together.
struct PartStart {
    number: u32,
    records: u64,
    begun: Instant,
}

impl Runner<'_> {
    /// Builds the missing parts of a loaded table.
    pub(super) fn load(
        &mut self,
        stage: &PlannedStage,
        work: &mut dyn LoadStage,
    ) -> Result<(), Failure> {
        let table = &stage.name;
        let parts_done = self.under_way(table, None).parts.clone();
        self.report.start(Start {
            table,
            round: None,
            unit: Unit::Rows,
            total: None,
            done: parts_done.iter().map(|part| part.rows_in).sum(),
        });
        let mut known = Media::open(self.folder.root(), self.folder.manifest())?;
        let interrupt = self.interrupt;
        // A read that was cut short by an interrupt is not the file's fault.
        let stopped = |failure| match interrupt.raised() {
            true => Failure::Interrupted,
            false => failure,
        };
        let mut records = work.records().map_err(stopped)?;
        let mut done = 0;
        for number in 0.. {
            let next = records.by_ref().take(PART_RECORDS);
            let next: Vec<Record> = next.collect::<Result<_, _>>().map_err(stopped)?;
            if next.is_empty() {
                break;
            }
            self.stop_if_asked()?;
            let start = PartStart {
                number,
                records: next.len() as u64,
                begun: Instant::now(),
            };
            done += start.records;
            work.validate(&next);
            if let Some(before) = parts_done.iter().find(|before| before.part == number) {
                self.resume_part(before, work)?;
                continue;
            }
            let at_once = work.at_once(&next).max(1);
            let mut rows = Vec::new();
            let mut rejected = Vec::new();
            let mut next = next.into_iter().peekable();
            while next.peek().is_some() {
                let some = next.by_ref().take(at_once).collect();
                let loaded = work.load(some, &mut known).map_err(stopped)?;
                self.stop_if_asked()?;
                self.add_images(&mut known.images, loaded.images)?;
                self.add_videos(&mut known.videos, &loaded.videos)?;
                rows.push(loaded.rows);
                rejected.extend(loaded.rejects);
            }
            let part = self.write_loaded(stage, &start, &rows, rejected)?;
            self.commit_part(table, None, part)?;
            self.report.progress(done);
        }
        for note in work.notes() {
            // A table whose files are repaired is loaded twice.
            note_once(&mut self.said, self.report, &format!("{table}: {note}"));
        }
        if let Some(fault) = work.fault() {
            return Err(fault);
        }
        let content = self.content(table)?;
        self.finish(table, None, Some(content), None)
    }

    /// Restores the loader's state from the rows of a part that an earlier run loaded.
    fn resume_part(&self, part: &PartRecord, work: &mut dyn LoadStage) -> Result<(), Failure> {
        for file in &part.files {
            for rows in TableReader::new(vec![self.folder.root().join(&file.file)]) {
                work.resume(&rows?)?;
            }
        }
        Ok(())
    }

    /// Writes the rows and the rejects of a part.
    fn write_loaded(
        &self,
        stage: &PlannedStage,
        start: &PartStart,
        rows: &[RecordBatch],
        rejected: Vec<(String, RejectClass, String)>,
    ) -> Result<PartRecord, Failure> {
        let (table, part) = (&stage.name, start.number);
        let place = self.folder.place(table.as_str(), None);
        let footer = self.footer(None);
        let rejects = rejects(table, None, rejected, &self.plan.secrets.mask());
        let mut writer = self.writer(table, None, &format!("part-{part:05}"), &stage.schema);
        for rows in rows {
            writer.write(rows)?;
        }
        Ok(PartRecord {
            part,
            rows_in: start.records,
            files: writer.finish()?,
            rejects: write_beside(&place, "rejects", &format!("{part:05}"), &footer, &rejects)?,
            telemetry: Vec::new(),
            faults: count(&rejects, RejectClass::Fault),
            dropped: count(&rejects, RejectClass::Dropped),
            took: Some(took(start.begun, start.records)),
        })
    }

    /// Returns the hash of a loaded table's row keys.
    fn content(&self, table: &TableName) -> Result<String, Failure> {
        let mut key = Key::new("content");
        let made = self.folder.manifest().under_way(table.as_str(), None);
        let files = made.into_iter().flat_map(TableVersion::files);
        let files = files.map(|file| self.folder.root().join(&file.file));
        for batch in TableReader::new(files.collect()) {
            let batch = batch?;
            let keys = batch
                .column_by_name("row_key")
                .expect("loaded tables have row keys");
            for row_key in keys.as_string::<i32>().iter().flatten() {
                key = key.with(row_key);
            }
        }
        Ok(key.finish())
    }

    /// Adds the images that the run does not have yet.
    fn add_images(&mut self, images: &mut Images, found: Vec<Image>) -> Result<(), Failure> {
        let mut fresh: Vec<Image> = Vec::new();
        for mut image in found {
            if images.contains(&image.image_id)
                || fresh.iter().any(|other| other.image_id == image.image_id)
            {
                continue;
            }
            if self.plan.keep_images == KeepImages::Reference && is_on_disk(&image) {
                image.image.bytes = None;
            }
            fresh.push(image);
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let number = self.folder.manifest().images.len();
        for file in Images::write(self.folder.root(), number, &fresh)? {
            images.added(self.folder.root(), &file)?;
            self.folder.commit(Event::Images(file))?;
        }
        Ok(())
    }

    /// Adds videos, whose frames the run has.
    fn add_videos(&mut self, videos: &mut Videos, found: &[Video]) -> Result<(), Failure> {
        if found.is_empty() {
            return Ok(());
        }
        let number = self.folder.manifest().videos.len();
        for file in Videos::write(self.folder.root(), number, found)? {
            videos.added(self.folder.root(), &file)?;
            self.folder.commit(Event::Videos(file))?;
        }
        Ok(())
    }
}

/// Returns true if the file at an image's path holds the image, so that the path can replace its
/// bytes. The path of an image embedded in a file can be anything.
fn is_on_disk(image: &Image) -> bool {
    let ImageFile {
        bytes: Some(bytes),
        path: Some(path),
    } = &image.image
    else {
        return false;
    };
    let is_as_long = Path::new(path)
        .metadata()
        .is_ok_and(|file| file.len() == bytes.len() as u64);
    is_as_long && files::read(Path::new(path)).is_ok_and(|there| there == *bytes)
}
