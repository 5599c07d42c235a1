//! Pairs, made column by column: what of a candidate goes into a pair is taken as it lies, never a row at a
//! time.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::compute::{cast, interleave};
use arrow::datatypes::{Int32Type, SchemaRef};

use super::Failure;
use super::selection::Match;
use crate::tables::row::Column;
use crate::tables::{Misfit, Pair, Prompt, Row, rows};

rows! {
    /// What of a candidate goes into a pair.
    pub struct Answer: "answer" => {
        /// What decides it.
        pub row_key: String,
        /// The prompt.
        pub prompt_id: String,
        /// Its number among the answers to the prompt.
        pub candidate: i32,
        /// What it says.
        pub text: String,
        /// Its tokens.
        pub token_ids: Vec<i32>,
        /// Its log-probability.
        pub logp: f64,
        /// The model that gave it.
        pub model: String,
    }
}

/// A row: its batch, and its place there.
type Place = (usize, usize);

/// The candidates of a part, as they were read.
pub struct Answers {
    /// The columns of [`Answer`], of each batch.
    batches: Vec<Vec<ArrayRef>>,
    /// The batch of each row, by the rows before it.
    starts: Vec<usize>,
}

/// Columns of [`Answer`], by their places.
const ROW_KEY: usize = 0;
const PROMPT_ID: usize = 1;
const CANDIDATE: usize = 2;
const TEXT: usize = 3;
const TOKEN_IDS: usize = 4;
const LOGP: usize = 5;
const MODEL: usize = 6;

impl Answers {
    pub fn new(rows: &[RecordBatch]) -> Result<Self, Failure> {
        let schema = Answer::schema();
        let mut batches = Vec::with_capacity(rows.len());
        let mut starts = Vec::with_capacity(rows.len());
        let mut start = 0;
        for batch in rows {
            starts.push(start);
            start += batch.num_rows();
            batches.push(columns(batch, &schema)?);
        }
        Ok(Self { batches, starts })
    }

    fn place(&self, row: usize) -> Place {
        let batch = self.starts.partition_point(|&start| start <= row) - 1;
        (batch, row - self.starts[batch])
    }

    fn texts(&self, batch: usize, column: usize) -> &StringArray {
        self.batches[batch][column].as_string()
    }

    fn text_of(&self, row: usize, column: usize) -> &str {
        let (batch, row) = self.place(row);
        self.texts(batch, column).value(row)
    }

    pub fn prompt_id(&self, row: usize) -> &str {
        self.text_of(row, PROMPT_ID)
    }

    pub fn row_key(&self, row: usize) -> &str {
        self.text_of(row, ROW_KEY)
    }

    pub fn text(&self, row: usize) -> &str {
        self.text_of(row, TEXT)
    }

    /// The row of the answer with a number among those of a prompt, which are the rows of `group`.
    pub fn numbered(&self, group: Range<usize>, number: i32) -> Result<usize, Failure> {
        let first = group.start;
        let found = group.into_iter().find(|&row| {
            let (batch, row) = self.place(row);
            let numbers = self.batches[batch][CANDIDATE].as_primitive::<Int32Type>();
            numbers.value(row) == number
        });
        found.ok_or_else(|| {
            Failure::Other(format!(
                "the candidates of prompt {} do not lie together; add `order by prompt_id, candidate` to \
                 the query that makes them",
                self.prompt_id(first)
            ))
        })
    }

    /// A column of some rows.
    fn taken(&self, column: usize, rows: &[Place]) -> Result<ArrayRef, Failure> {
        let arrays: Vec<&dyn Array> = self.batches.iter().map(|batch| &*batch[column]).collect();
        interleave(&arrays, rows).map_err(|error| Failure::Other(error.to_string()))
    }
}

/// The columns of a batch, as a kind has them. None may be absent.
fn columns(batch: &RecordBatch, schema: &SchemaRef) -> Result<Vec<ArrayRef>, Misfit> {
    let mut columns = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        let (column, wanted) = (field.name().clone(), field.data_type().to_string());
        let Some(array) = batch.column_by_name(&column) else {
            return Err(Misfit::Missing { column, wanted });
        };
        let given = array.data_type().to_string();
        let array = cast(array, field.data_type()).map_err(|_| Misfit::Type {
            column: column.clone(),
            wanted,
            given,
        })?;
        if let Some(row) =
            (0..array.len()).find(|&row| array.null_count() > 0 && array.is_null(row))
        {
            return Err(Misfit::Null { column, row });
        }
        columns.push(array);
    }
    Ok(columns)
}

/// A pair to be made.
pub struct Draft {
    /// Its name.
    pub row_key: String,
    pub prompt: Arc<Prompt>,
    pub matched: Match,
    /// The rows of the two answers.
    pub chosen: usize,
    pub rejected: usize,
}

/// The pairs as rows of their table.
pub fn pairs(answers: &Answers, drafts: &[Draft]) -> Result<RecordBatch, Failure> {
    fn column<'d, C: Column + 'd>(
        drafts: &'d [Draft],
        of: impl Fn(&'d Draft) -> &'d C,
    ) -> ArrayRef {
        C::to_array(&drafts.iter().map(of).collect::<Vec<_>>())
    }
    fn made<C: Column>(drafts: &[Draft], of: impl Fn(&Draft) -> C) -> ArrayRef {
        let values: Vec<C> = drafts.iter().map(of).collect();
        C::to_array(&values.iter().collect::<Vec<_>>())
    }
    let places = |row: fn(&Draft) -> usize| -> Vec<Place> {
        drafts
            .iter()
            .map(|draft| answers.place(row(draft)))
            .collect()
    };
    let (chosen, rejected) = (places(|draft| draft.chosen), places(|draft| draft.rejected));
    let schema = Pair::schema();
    let mut columns = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        columns.push(match field.name().as_str() {
            "row_key" => column(drafts, |draft| &draft.row_key),
            "id" => column(drafts, |draft| &draft.prompt.id),
            "image" => column(drafts, |draft| &draft.prompt.image),
            "prompt" => column(drafts, |draft| &draft.prompt.question),
            "prompt_id" => column(drafts, |draft| &draft.prompt.prompt_id),
            "image_ids" => column(drafts, |draft| &draft.prompt.image_ids),
            "system" => column(drafts, |draft| &draft.prompt.system),
            "turns" => column(drafts, |draft| &draft.prompt.turns),
            "captions" => column(drafts, |draft| &draft.prompt.captions),
            "chosen" => answers.taken(TEXT, &chosen)?,
            "rejected" => answers.taken(TEXT, &rejected)?,
            "chosen_token_ids" => answers.taken(TOKEN_IDS, &chosen)?,
            "rejected_token_ids" => answers.taken(TOKEN_IDS, &rejected)?,
            "chosen_logp" => answers.taken(LOGP, &chosen)?,
            "rejected_logp" => answers.taken(LOGP, &rejected)?,
            "model" => answers.taken(MODEL, &chosen)?,
            "chosen_candidate" => made(drafts, |draft| Some(draft.matched.chosen)),
            "rejected_candidate" => made(drafts, |draft| Some(draft.matched.rejected)),
            "chosen_reward" => made(drafts, |draft| {
                draft.matched.scores.map(|scores| scores.chosen)
            }),
            "rejected_reward" => made(drafts, |draft| {
                draft.matched.scores.map(|scores| scores.rejected)
            }),
            "margin" => made(drafts, |draft| {
                draft.matched.scores.map(|scores| scores.margin)
            }),
            other => unreachable!("a pair has no column `{other}`"),
        });
    }
    RecordBatch::try_new(schema, columns).map_err(|error| Failure::Other(error.to_string()))
}
