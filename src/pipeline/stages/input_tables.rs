//! The rows of other tables that a stage looks up.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::{Failure, TableName, turns};
use ovchat_data::store::{Images, Lookup};
use ovchat_data::tables::{self, Row};
use ovchat_models::{self as models, EncodedImage};

/// The rows of other tables that a stage looks up.
pub struct InputTables {
    pub images: Images,
    files: HashMap<TableName, Vec<PathBuf>>,
    prompts: HashMap<TableName, PromptCache>,
    lookups: HashMap<TableName, Lookup>,
    /// The folder of the run.
    pub root: PathBuf,
}

impl InputTables {
    /// `files` are those of the stage's input tables, in this round.
    pub fn new(images: Images, files: HashMap<TableName, Vec<PathBuf>>, root: PathBuf) -> Self {
        Self {
            root,
            images,
            files,
            prompts: HashMap::new(),
            lookups: HashMap::new(),
        }
    }

    /// The rows of a table that are about some prompts, in the order of the table; with the columns of
    /// `columns`, the same each time.
    pub fn rows_of<'n>(
        &mut self,
        table: &TableName,
        columns: &SchemaRef,
        prompt_ids: impl Iterator<Item = &'n str>,
    ) -> Result<Vec<RecordBatch>, Failure> {
        if !self.lookups.contains_key(table) {
            let lookup = self.lookup(table)?.only(columns.clone());
            self.lookups.insert(table.clone(), lookup);
        }
        let lookup = self.lookups.get_mut(table).expect("just opened");
        Ok(lookup.all(prompt_ids)?)
    }

    fn lookup(&self, table: &TableName) -> Result<Lookup, Failure> {
        let files = self.files.get(table).cloned().unwrap_or_default();
        Ok(Lookup::open(files, "prompt_id")?)
    }

    /// The row of a prompt.
    pub fn prompt_row(
        &mut self,
        table: &TableName,
        prompt_id: &str,
    ) -> Result<Arc<tables::Prompt>, Failure> {
        if !self.prompts.contains_key(table) {
            let inputs = PromptCache {
                lookup: self.lookup(table)?,
                read: VecDeque::new(),
            };
            self.prompts.insert(table.clone(), inputs);
        }
        let inputs = self.prompts.get_mut(table).expect("just opened");
        let missing = || Failure::Other(format!("table `{table}` has no prompt {prompt_id}"));
        inputs.row(prompt_id)?.ok_or_else(missing)
    }

    /// A prompt as models take it, with the bytes of its pictures.
    pub fn prompt(
        &mut self,
        row: &tables::Prompt,
        seed: u64,
    ) -> Result<models::ChatPrompt, Failure> {
        Ok(models::ChatPrompt {
            id: row.prompt_id.clone(),
            images: self.images(&row.image_ids)?,
            system: row.system.clone(),
            turns: turns(&row.turns),
            question: row.question.clone(),
            captions: row.captions.clone(),
            answer: row.answer.clone(),
            seed,
        })
    }

    /// Pictures by content.
    pub fn images(&mut self, image_ids: &[String]) -> Result<Vec<EncodedImage>, Failure> {
        let image = |id: &String| {
            Ok(EncodedImage {
                id: id.clone(),
                bytes: self.images.bytes(id)?,
            })
        };
        image_ids.iter().map(image).collect()
    }
}

/// Most prompts that are read at once.
const PROMPTS_AT_ONCE: usize = 1024;

/// Readings that are kept: together more prompts than parts have in which a prompt takes no time.
const READINGS: usize = 8;

/// The prompts of a table. Stages ask for them in the order in which they lie, more or less, some of
/// them twice for each part: as long as the next is asked for, more and more are read at once.
struct PromptCache {
    lookup: Lookup,
    /// Some of them, each with the position of the first; the latest reading last.
    read: VecDeque<(usize, Vec<Arc<tables::Prompt>>)>,
}

impl PromptCache {
    fn row(&mut self, prompt_id: &str) -> Result<Option<Arc<tables::Prompt>>, Failure> {
        let Some(position) = self.lookup.position(prompt_id) else {
            return Ok(None);
        };
        for (start, rows) in self.read.iter().rev() {
            if let Some(row) = position.checked_sub(*start).and_then(|row| rows.get(row)) {
                return Ok(Some(Arc::clone(row)));
            }
        }
        let last = self.read.back();
        let more = last.filter(|(start, rows)| start + rows.len() == position);
        let count = more
            .map_or(1, |(_, rows)| 2 * rows.len())
            .min(PROMPTS_AT_ONCE)
            .min(self.lookup.len() - position);
        let rows = tables::Prompt::from_batch(&self.lookup.range(position, count)?)?;
        let rows: Vec<_> = rows.into_iter().map(Arc::new).collect();
        let first = Arc::clone(&rows[0]);
        self.read.push_back((position, rows));
        if self.read.len() > READINGS {
            self.read.pop_front();
        }
        Ok(Some(first))
    }
}
