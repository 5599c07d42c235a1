//! Column-wise construction of pairs from the columns of candidates and prompts, without converting
//! rows.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::Range;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, new_null_array};
use arrow::compute::{cast, interleave};
use arrow::datatypes::Int32Type;

use super::{Failure, TableName};
use ovchat_data::tables::row::Column;
use ovchat_data::tables::{Finish, Misfit, Pair, Prompt, Row, rows};

rows! {
    /// The columns of a candidate that a pair depends on or contains.
    pub struct PairingCandidate: "answer" => {
        /// The candidate's key.
        pub row_key: String,
        /// The prompt's id.
        pub prompt_id: String,
        /// The candidate's number within its prompt.
        pub candidate: i32,
        /// The answer's text.
        pub text: String,
        /// The answer's token ids.
        pub token_ids: Vec<i32>,
        /// The answer's log-probability.
        pub logp: f64,
        /// The fingerprint of the model that generated it.
        pub model: String,
        /// The reason why generation ended.
        pub finish: Finish,
    }
}

/// The position of a row: its batch, and the row within the batch.
pub type Place = (usize, usize);

/// Rows of a table kind in columnar form, in batches.
struct Rows<R> {
    batches: Vec<Vec<ArrayRef>>,
    kind: PhantomData<R>,
}

impl<R: Row> Rows<R> {
    fn new(rows: &[RecordBatch]) -> Result<Self, Misfit> {
        let batches = rows.iter().map(columns::<R>).collect::<Result<_, _>>()?;
        let kind = PhantomData;
        Ok(Self { batches, kind })
    }

    fn number(column: &str) -> usize {
        let schema = R::schema();
        schema.index_of(column).expect("a column of the kind")
    }

    /// Returns a string column, batch by batch.
    fn texts(&self, column: &str) -> Vec<&StringArray> {
        let number = Self::number(column);
        let batches = self.batches.iter();
        batches.map(|batch| batch[number].as_string()).collect()
    }

    /// Returns a column of the given rows.
    fn taken(&self, column: &str, rows: &[Place]) -> Result<ArrayRef, Failure> {
        let number = Self::number(column);
        let arrays: Vec<&dyn Array> = self.batches.iter().map(|batch| &*batch[number]).collect();
        interleave(&arrays, rows).map_err(|error| Failure::Other(error.to_string()))
    }
}

/// Returns the columns of a batch in the schema of a table kind, with the checks of
/// [`Row::from_batch`].
fn columns<R: Row>(batch: &RecordBatch) -> Result<Vec<ArrayRef>, Misfit> {
    let schema = R::schema();
    let mut columns = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        let (column, wanted) = (field.name().clone(), field.data_type().to_string());
        let Some(array) = batch.column_by_name(&column) else {
            if field.is_nullable() {
                columns.push(new_null_array(field.data_type(), batch.num_rows()));
                continue;
            }
            return Err(Misfit::Missing { column, wanted });
        };
        let given = array.data_type().to_string();
        let array = cast(array, field.data_type()).map_err(|_| Misfit::Type {
            column: column.clone(),
            wanted,
            given,
        })?;
        if !field.is_nullable()
            && let Some(nulls) = array.nulls()
            && let Some(row) = (0..array.len()).find(|&row| nulls.is_null(row))
        {
            return Err(Misfit::Null { column, row });
        }
        columns.push(array);
    }
    Ok(columns)
}

/// The candidates of a part.
pub struct Answers<'r> {
    /// The batches, with the columns of [`PairingCandidate`].
    pub read: &'r [RecordBatch],
    /// The rows of each prompt.
    pub groups: Vec<Range<usize>>,
    rows: Rows<PairingCandidate>,
    /// The number of rows before each batch.
    starts: Vec<usize>,
}

/// The column indices of [`PairingCandidate`]; a test checks them.
const ROW_KEY: usize = 0;
const PROMPT_ID: usize = 1;
const CANDIDATE: usize = 2;
const TEXT: usize = 3;

/// The column index of `row_key` in [`Prompt`].
const PROMPT_KEY: usize = 0;

impl<'r> Answers<'r> {
    /// Groups the rows by prompt; `lengths` are the numbers of rows of the prompts.
    pub fn new(read: &'r [RecordBatch], lengths: &[usize]) -> Result<Self, Misfit> {
        let mut starts = Vec::with_capacity(read.len());
        let mut start = 0;
        for batch in read {
            starts.push(start);
            start += batch.num_rows();
        }
        let mut end = 0;
        let group = |&length: &usize| {
            end += length;
            end - length..end
        };
        Ok(Self {
            read,
            groups: lengths.iter().map(group).collect(),
            rows: Rows::new(read)?,
            starts,
        })
    }

    fn place(&self, row: usize) -> Place {
        let batch = self.starts.partition_point(|&start| start <= row) - 1;
        (batch, row - self.starts[batch])
    }

    fn text_of(&self, row: usize, column: usize) -> &str {
        let (batch, row) = self.place(row);
        let texts: &StringArray = self.rows.batches[batch][column].as_string();
        texts.value(row)
    }

    pub fn prompt_id(&self, row: usize) -> &str {
        self.text_of(row, PROMPT_ID)
    }

    /// Returns the prompt id of each group.
    pub fn prompt_ids(&self) -> impl Iterator<Item = &str> {
        self.groups.iter().map(|group| self.prompt_id(group.start))
    }

    pub fn row_key(&self, row: usize) -> &str {
        self.text_of(row, ROW_KEY)
    }

    pub fn text(&self, row: usize) -> &str {
        self.text_of(row, TEXT)
    }

    /// Returns the candidate's number within its prompt.
    pub fn candidate(&self, row: usize) -> i32 {
        let (batch, row) = self.place(row);
        let numbers = self.rows.batches[batch][CANDIDATE].as_primitive::<Int32Type>();
        numbers.value(row)
    }

    /// Returns the row of the candidate with a number, among the rows of a prompt's `group`.
    pub fn numbered(&self, group: &Range<usize>, number: i32) -> Result<usize, Failure> {
        let found = group.clone().find(|&row| self.candidate(row) == number);
        found.ok_or_else(|| {
            Failure::Other(format!(
                "candidate {number} of prompt {} has a reward but is not in the table of candidates; pair \
                 the same candidates that were scored",
                self.prompt_id(group.start)
            ))
        })
    }
}

/// The prompts of a part.
pub struct Prompts {
    rows: Rows<Prompt>,
    by_id: HashMap<String, Place>,
}

impl Prompts {
    pub fn new(read: &[RecordBatch]) -> Result<Self, Misfit> {
        let rows = Rows::<Prompt>::new(read)?;
        let mut by_id = HashMap::new();
        for (batch, ids) in rows.texts("prompt_id").into_iter().enumerate() {
            for row in 0..ids.len() {
                let id = ids.value(row).to_owned();
                by_id.entry(id).or_insert((batch, row));
            }
        }
        Ok(Self { rows, by_id })
    }

    /// Returns the position and the key of a prompt; `table` is named in the error.
    pub fn find(&self, table: &TableName, prompt_id: &str) -> Result<(Place, &str), Failure> {
        let missing = || Failure::Other(format!("table `{table}` has no prompt {prompt_id}"));
        let &(batch, row) = self.by_id.get(prompt_id).ok_or_else(missing)?;
        let keys: &StringArray = self.rows.batches[batch][PROMPT_KEY].as_string();
        Ok(((batch, row), keys.value(row)))
    }
}

/// Two answers that form a pair.
#[derive(Clone, Copy)]
pub struct CandidatePair {
    pub chosen: i32,
    pub rejected: i32,
    pub scores: Option<Scores>,
}

/// The rewards of the two answers of a pair, and their margin.
#[derive(Clone, Copy)]
pub struct Scores {
    pub chosen: f32,
    pub rejected: f32,
    pub margin: f32,
}

impl CandidatePair {
    /// Returns a pair that was not chosen by rewards.
    pub fn unscored(chosen: i32, rejected: i32) -> Self {
        Self {
            chosen,
            rejected,
            scores: None,
        }
    }
}

/// A pair to build.
pub struct PairDraft {
    /// The pair's key.
    pub row_key: String,
    /// The position of its prompt.
    pub prompt: Place,
    pub matched: CandidatePair,
    /// The rows of the two answers.
    pub chosen: usize,
    pub rejected: usize,
}

/// Builds the rows of the drafted pairs.
pub fn pairs(
    answers: &Answers<'_>,
    prompts: &Prompts,
    drafts: &[PairDraft],
) -> Result<RecordBatch, Failure> {
    fn made<C: Column>(drafts: &[PairDraft], of: impl Fn(&PairDraft) -> C) -> ArrayRef {
        let values: Vec<C> = drafts.iter().map(of).collect();
        C::to_array(&values.iter().collect::<Vec<_>>())
    }
    let places =
        |of: &dyn Fn(&PairDraft) -> Place| -> Vec<Place> { drafts.iter().map(of).collect() };
    let asked = places(&|draft| draft.prompt);
    let chosen = places(&|draft| answers.place(draft.chosen));
    let rejected = places(&|draft| answers.place(draft.rejected));
    let prompts = &prompts.rows;
    let answers = &answers.rows;
    let schema = Pair::schema();
    let mut columns = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        columns.push(match field.name().as_str() {
            "row_key" => String::to_array(
                &drafts
                    .iter()
                    .map(|draft| &draft.row_key)
                    .collect::<Vec<_>>(),
            ),
            "prompt" => prompts.taken("question", &asked)?,
            name @ ("id" | "image" | "prompt_id" | "image_ids" | "videos" | "system" | "turns"
            | "captions" | "kept") => prompts.taken(name, &asked)?,
            "chosen" => answers.taken("text", &chosen)?,
            "rejected" => answers.taken("text", &rejected)?,
            "chosen_token_ids" => answers.taken("token_ids", &chosen)?,
            "rejected_token_ids" => answers.taken("token_ids", &rejected)?,
            "chosen_logp" => answers.taken("logp", &chosen)?,
            "rejected_logp" => answers.taken("logp", &rejected)?,
            "model" => answers.taken("model", &chosen)?,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_where_they_are_said_to_be() {
        let places = [
            (ROW_KEY, "row_key"),
            (PROMPT_ID, "prompt_id"),
            (CANDIDATE, "candidate"),
            (TEXT, "text"),
        ];
        for (place, column) in places {
            assert_eq!(Rows::<PairingCandidate>::number(column), place);
        }
        assert_eq!(Rows::<Prompt>::number("row_key"), PROMPT_KEY);
    }
}
