//! Lookups of rows and images in a stage's input tables.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;

use super::shown::Shown;
use super::{Failure, TableName};
use ovchat_data::store::{Images, Lookup};
use ovchat_data::tables::{self, Row};
use ovchat_models::{self as models, ChatPrompt, Visual};

/// Lookups of rows and images in a stage's input tables.
pub struct InputTables {
    pub images: Images,
    files: HashMap<TableName, Vec<PathBuf>>,
    prompts: HashMap<TableName, PromptCache>,
    lookups: HashMap<TableName, Lookup>,
    /// The run folder.
    pub root: PathBuf,
}

impl InputTables {
    /// Creates the lookups; `files` are those of the stage's input tables in this round.
    pub fn new(images: Images, files: HashMap<TableName, Vec<PathBuf>>, root: PathBuf) -> Self {
        Self {
            root,
            images,
            files,
            prompts: HashMap::new(),
            lookups: HashMap::new(),
        }
    }

    /// Returns the rows of a table that belong to some prompts, in the order of the table, with the
    /// columns of `columns`, which must be the same in every call for a table.
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

    /// Returns the row of a prompt.
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

    /// Returns a prompt in the form that models take, with the bytes of its images.
    pub fn prompt(&mut self, row: &tables::Prompt, seed: u64) -> Result<ChatPrompt, Failure> {
        let prompt = self.chat_prompt(Shown::from(row), &row.prompt_id)?;
        Ok(models::ChatPrompt {
            captions: row.captions.clone(),
            answer: row.answer.clone(),
            seed,
            ..prompt
        })
    }

    /// Returns what a model is shown of a prompt, with the bytes of images and frames.
    pub fn chat_prompt(&mut self, shown: Shown<'_>, id: &str) -> Result<ChatPrompt, Failure> {
        shown.chat_prompt(id, |id, _| {
            Ok(Visual::new(id.to_owned(), self.images.bytes(id)?))
        })
    }
}

/// The maximum number of prompts read at once.
const PROMPTS_AT_ONCE: usize = 1024;

/// The number of reads that are kept. Together they hold more prompts than the largest parts, those
/// of stages that take next to no time per prompt.
const READINGS: usize = 8;

/// A cache of a table's prompts with read-ahead. Stages access prompts roughly in table order, some
/// of them twice per part; sequential access doubles the number of prompts read at once.
struct PromptCache {
    lookup: Lookup,
    /// The cached reads, the latest last, each with the position of its first prompt.
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

#[cfg(test)]
mod tests {
    use super::super::test_pipeline::{TestPipeline, candidate, prompt, table};
    use super::*;
    use ovchat_data::tables::{Candidate, Prompt};

    #[test]
    fn prompts_are_found_in_any_order_and_with_their_images() {
        let mut pipeline = TestPipeline::new();
        let image = pipeline.image(b"P6 1 1 255 abc");
        let prompts: Vec<Prompt> = (0..50)
            .map(|number| Prompt {
                image_ids: vec![image.clone()],
                ..prompt(&format!("p{number:02}"), &format!("Question {number}?"))
            })
            .collect();
        pipeline.table("prompts", &prompts);
        pipeline.with_context(|ctx| {
            let mut find = |number: usize| {
                let id = format!("p{number:02}");
                ctx.input_tables.prompt_row(&table("prompts"), &id).unwrap()
            };
            for number in (0..50).chain([3, 49, 0, 17]) {
                assert_eq!(*find(number), prompts[number]);
            }
            let shown = ctx.input_tables.prompt(&prompts[7], 5).unwrap();
            assert_eq!((&*shown.question, shown.seed), ("Question 7?", 5));
            assert_eq!(&*shown.images[0].bytes, b"P6 1 1 255 abc");
        });
    }

    #[test]
    fn rows_of_some_prompts_have_the_wanted_columns() {
        let mut pipeline = TestPipeline::new();
        let candidates = [candidate("a", 0, "So."), candidate("b", 0, "No.")];
        pipeline.table("candidates", &candidates);
        pipeline.with_context(|ctx| {
            let ids = ["b", "none"].into_iter();
            let name = table("candidates");
            let rows = ctx.input_tables.rows_of(&name, &Candidate::schema(), ids);
            let rows = rows.unwrap();
            assert_eq!(rows.len(), 1);
            assert_eq!(Candidate::from_batch(&rows[0]).unwrap(), candidates[1..]);
        });
    }

    #[test]
    fn a_missing_prompt_or_image_is_named() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[prompt("a", "Why?")]);
        pipeline.with_context(|ctx| {
            let missing = ctx.input_tables.prompt_row(&table("prompts"), "b");
            let expected = "table `prompts` has no prompt b";
            assert_eq!(missing.unwrap_err().to_string(), expected);
            let asked = Prompt {
                image_ids: vec!["f00".to_owned()],
                ..prompt("a", "Why?")
            };
            let missing = ctx.input_tables.prompt(&asked, 0).unwrap_err();
            assert!(missing.to_string().contains("f00"), "{missing}");
        });
    }
}
