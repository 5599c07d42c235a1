//! The load stages: records of a user's file become rows, images become rows of `images`.

use std::path::Path;
use std::time::Instant;

use arrow::array::AsArray;

use super::report::{Start, Unit};
use super::runner::{Runner, count, took, write_beside};
use crate::config::{KeepImages, PlannedStage};
use crate::stages::{Failure, LoadStage, Record, TableName, rejects};
use ovchat_data::store::{Event, Images, Key, PartRecord, TableReader, TableVersion};
use ovchat_data::tables::{Image, ImageFile, RejectClass};
use ovchat_io::files;

/// The number of records that are read, checked and committed together.
const PART_RECORDS: usize = 256;

impl Runner<'_> {
    pub(super) fn load(
        &mut self,
        stage: &PlannedStage,
        work: &mut dyn LoadStage,
    ) -> Result<(), Failure> {
        let table = &stage.name;
        let made = self
            .folder
            .manifest()
            .under_way(table.as_str(), None)
            .expect("a table that was begun");
        let parts_done = made.parts.clone();
        let done_before: u64 = parts_done.iter().map(|part| part.rows_in).sum();
        self.report.start(Start {
            table,
            round: None,
            unit: Unit::Rows,
            total: None,
            done: done_before,
        });
        let place = self.folder.place(table.as_str(), None);
        let mask = self.plan.secrets.mask();
        let footer = self.footer(None);
        let mut images = Images::open(self.folder.root(), &self.folder.manifest().images)?;
        let interrupt = self.interrupt;
        // A read that was cut short by an interrupt is not the file's fault.
        let stopped = |failure| match interrupt.raised() {
            true => Failure::Interrupted,
            false => failure,
        };
        let mut records = work.records().map_err(stopped)?;
        let mut done = 0;
        for part in 0.. {
            let next: Vec<Record> = records
                .by_ref()
                .take(PART_RECORDS)
                .collect::<Result<_, _>>()
                .map_err(stopped)?;
            if next.is_empty() {
                break;
            }
            self.stop_if_asked()?;
            let rows_in = next.len() as u64;
            let begun = Instant::now();
            done += rows_in;
            work.validate(&next);
            if let Some(before) = parts_done.iter().find(|before| before.part == part) {
                for file in &before.files {
                    for rows in TableReader::new(vec![self.folder.root().join(&file.file)]) {
                        work.resume(&rows?)?;
                    }
                }
                continue;
            }
            let loaded = work.load(next).map_err(stopped)?;
            self.stop_if_asked()?;
            self.add_images(&mut images, loaded.images)?;
            let rejects = rejects(table, None, loaded.rejects, &mask);
            let name = format!("part-{part:05}");
            let mut writer = self.writer(table, None, &name, &stage.schema);
            writer.write(&loaded.rows)?;
            let record = PartRecord {
                part,
                rows_in,
                files: writer.finish()?,
                rejects: write_beside(&place, "rejects", part, &footer, &rejects)?,
                telemetry: Vec::new(),
                faults: count(&rejects, RejectClass::Fault),
                dropped: count(&rejects, RejectClass::Dropped),
                took: Some(took(begun, rows_in)),
            };
            self.folder.commit(Event::Part {
                table: table.to_string(),
                round: None,
                part: record,
                state: None,
            })?;
            self.report.progress(done);
        }
        for note in work.notes() {
            let text = format!("{table}: {note}");
            // A table whose files are repaired is loaded twice.
            if self.said.insert(text.clone()) {
                self.report.note(&text);
            }
        }
        let content = self.content(table)?;
        self.finish(table, None, Some(content), None)
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
