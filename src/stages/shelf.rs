//! The rows of other tables that a stage looks up.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::{Failure, TableName, turns};
use crate::models::{self, Picture};
use crate::query::{self, Param, QueryTable};
use crate::store::{Images, Lookup};
use crate::tables::{self, Row};

/// The rows of other tables that a stage looks up.
pub struct Shelf {
    pub images: Images,
    files: HashMap<TableName, Vec<PathBuf>>,
    prompts: HashMap<TableName, PromptShelf>,
    /// A folder for what a query can't hold in memory.
    spill: PathBuf,
    /// The folder of the run.
    pub root: PathBuf,
}

impl Shelf {
    /// `files` are those of the stage's input tables, in this round.
    pub fn new(
        images: Images,
        files: HashMap<TableName, Vec<PathBuf>>,
        spill: PathBuf,
        root: PathBuf,
    ) -> Self {
        Self {
            root,
            images,
            files,
            prompts: HashMap::new(),
            spill,
        }
    }

    /// Runs a query over input tables of the stage, each named with its schema.
    pub fn query(
        &self,
        sql: &str,
        params: &[(&str, Param)],
        tables: &[(&TableName, SchemaRef)],
        sink: impl FnMut(RecordBatch) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let table = |(name, schema): &(&TableName, SchemaRef)| QueryTable {
            name: name.to_string(),
            schema: schema.clone(),
            files: vec![(None, self.files.get(*name).cloned().unwrap_or_default())],
            with_round: false,
        };
        let tables: Vec<QueryTable> = tables.iter().map(table).collect();
        query::run(sql, params, &tables, &[], Some(&self.spill), sink)?;
        Ok(())
    }

    /// The row of a prompt.
    pub fn prompt_row(
        &mut self,
        table: &TableName,
        prompt_id: &str,
    ) -> Result<Arc<tables::Prompt>, Failure> {
        if !self.prompts.contains_key(table) {
            let files = self.files.get(table).cloned().unwrap_or_default();
            let shelf = PromptShelf {
                lookup: Lookup::open(files, "prompt_id")?,
                start: 0,
                rows: Vec::new(),
            };
            self.prompts.insert(table.clone(), shelf);
        }
        let shelf = self.prompts.get_mut(table).expect("just opened");
        let missing = || Failure::Other(format!("table `{table}` has no prompt {prompt_id}"));
        shelf.row(prompt_id)?.ok_or_else(missing)
    }

    /// A prompt as models take it, with the bytes of its pictures.
    pub fn prompt(&mut self, row: &tables::Prompt, seed: u64) -> Result<models::Prompt, Failure> {
        Ok(models::Prompt {
            id: row.prompt_id.clone(),
            pictures: self.pictures(&row.image_ids)?,
            system: row.system.clone(),
            turns: turns(&row.turns),
            question: row.question.clone(),
            captions: row.captions.clone(),
            answer: row.answer.clone(),
            seed,
        })
    }

    /// Pictures by content.
    pub fn pictures(&mut self, image_ids: &[String]) -> Result<Vec<Picture>, Failure> {
        let picture = |id: &String| {
            Ok(Picture {
                id: id.clone(),
                bytes: self.images.bytes(id)?,
            })
        };
        image_ids.iter().map(picture).collect()
    }
}

/// Most prompts that are read at once.
const PROMPTS_AT_ONCE: usize = 1024;

/// The prompts of a table. Stages ask for them in the order in which they lie, more or less: as long as
/// they do, more and more are read at once.
struct PromptShelf {
    lookup: Lookup,
    /// The position of the first of `rows`.
    start: usize,
    rows: Vec<Arc<tables::Prompt>>,
}

impl PromptShelf {
    fn row(&mut self, prompt_id: &str) -> Result<Option<Arc<tables::Prompt>>, Failure> {
        let Some(position) = self.lookup.position(prompt_id) else {
            return Ok(None);
        };
        let end = self.start + self.rows.len();
        if !(self.start..end).contains(&position) {
            let more = if position == end {
                2 * self.rows.len()
            } else {
                1
            };
            let count = more
                .clamp(1, PROMPTS_AT_ONCE)
                .min(self.lookup.len() - position);
            let rows = tables::Prompt::from_batch(&self.lookup.range(position, count)?)?;
            self.rows = rows.into_iter().map(Arc::new).collect();
            self.start = position;
        }
        Ok(Some(Arc::clone(&self.rows[position - self.start])))
    }
}
