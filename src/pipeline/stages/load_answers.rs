//! The `load_answers` stage: answers that other programs wrote, as candidates for judges.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::de::{self, MapAccess};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::formats;
use super::names::Names;
use super::{
    BatchStage, Failure, Input, Known, Outcome, Record, Stage, StageContext, StageError, StageKind,
    TableName, join,
};
use ovchat_data::store::{Key, schema_of_file};
use ovchat_data::tables::{Answer, Prompt, Row, rows};
use ovchat_io::files;

/// Loads answers to prompts that another program wrote, so that judges score them like sampled ones. A
/// file is a JSON list or JSON Lines of `{id, text}`, a JSON object of texts by their ids, Parquet, or
/// the samples that lmms-eval logs (`--log_samples`). A prompt without an answer is rejected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadAnswers {
    /// The file.
    pub from: PathBuf,
    /// The table of prompts.
    pub prompts: TableName,
    /// The name of the model that wrote the answers. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The column that names a prompt by its `id`; `doc.question_id` is a field of an object. Default:
    /// `id`; lmms-eval's samples name prompts by their numbers, from 0 (`doc_id`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The column of the answer. Default: `text`, or `filtered_resps` of lmms-eval's samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Stage for LoadAnswers {
    fn inputs(&self) -> Vec<Input<'_>> {
        vec![Input {
            field: "prompts",
            table: Some(&self.prompts),
            needs: AnsweredPrompt::schema(),
            kind: Prompt::KIND,
        }]
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        vec![("from", &self.from)]
    }

    fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        join(folder, "from", &mut self.from);
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Answer::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Answer::schema())
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Rows(Box::new(Loading(self)))
    }
}

rows! {
    /// The columns of a prompt that answers are matched by.
    pub struct AnsweredPrompt: "answered prompt" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The id in the source.
        pub id: Option<String>,
        /// The question.
        pub question: String,
    }
}

/// An answer of the file, before it is matched.
#[derive(Debug, PartialEq)]
struct Written {
    place: String,
    prompt: Named,
    text: String,
}

/// The entries of a JSON object of texts, repeated keys included.
struct Entries(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Visitor)
    }
}

/// The prompt that an answer names.
#[derive(Debug, PartialEq)]
enum Named {
    Id(String),
    /// Its number, and its question if the file has it.
    Number(usize, Option<String>),
}

/// The work of the stage. All prompts are one part, because answers may name them by number.
struct Loading<'a>(&'a LoadAnswers);

impl BatchStage for Loading<'_> {
    fn input(&self) -> &TableName {
        &self.0.prompts
    }

    fn part_groups(&self) -> u32 {
        u32::MAX
    }

    fn schema(&self) -> SchemaRef {
        Answer::schema()
    }

    fn reads(&self) -> SchemaRef {
        AnsweredPrompt::schema()
    }

    fn make(
        &self,
        ctx: &mut StageContext<'_>,
        rows: &[RecordBatch],
        _: &[usize],
        _: &Key,
        _: Known<'_>,
    ) -> Result<(Vec<Outcome<RecordBatch>>, u64), Failure> {
        let mut prompts = Vec::new();
        for batch in rows {
            prompts.extend(AnsweredPrompt::from_batch(batch)?);
        }
        let Matched { answers, others } = self.0.matched(self.0.written()?, &prompts)?;
        let several = answers.iter().filter(|texts| texts.len() > 1).count();
        if several > 0 {
            (ctx.say)(&format!(
                "{}: {several} prompts of table `{}` have several answers, which are candidates of one prompt",
                self.0.from.display(),
                self.0.prompts
            ));
        }
        if let Some(first) = others.first() {
            (ctx.say)(&format!(
                "{}: {} of its answers name no prompt of table `{}`, first {first}",
                self.0.from.display(),
                others.len(),
                self.0.prompts
            ));
        }
        let count = answers.iter().map(Vec::len).sum::<usize>() as u64;
        let outcome = |(prompt, texts): (&AnsweredPrompt, Vec<String>)| {
            if texts.is_empty() {
                let name = prompt.id.as_deref().unwrap_or(&prompt.prompt_id);
                let reason = format!("no answer to {name} in {}", self.0.from.display());
                return Outcome::fault(&prompt.prompt_id, reason);
            }
            let answer = |(number, text): (usize, String)| Answer {
                row_key: Key::new("loaded answer")
                    .with(&prompt.prompt_id)
                    .with((number as u64).to_le_bytes())
                    .with(&text)
                    .finish(),
                prompt_id: prompt.prompt_id.clone(),
                candidate: number as i32,
                text,
                model: self.0.model.clone(),
            };
            let rows: Vec<Answer> = texts.into_iter().enumerate().map(answer).collect();
            Outcome::Rows(Answer::to_batch(&rows))
        };
        let outcomes = prompts.iter().zip(answers).map(outcome).collect();
        Ok((outcomes, count))
    }
}

/// The answers to each prompt, and the names of prompts that are not there.
struct Matched {
    answers: Vec<Vec<String>>,
    others: Vec<String>,
}

impl LoadAnswers {
    fn fails(&self, place: &str, problem: impl Into<String>) -> Failure {
        Failure::Input {
            path: self.from.clone(),
            place: format!(", {place}"),
            problem: problem.into(),
        }
    }

    /// Reads the answers of the file.
    fn written(&self) -> Result<Vec<Written>, Failure> {
        if let Some(written) = self.of_object() {
            return Ok(written);
        }
        let is_parquet = formats::is_not_json(&self.from);
        if is_parquet {
            self.check_types()?;
        }
        let of_parquet = || {
            let [id, text] = [
                self.id.as_deref().unwrap_or("id"),
                self.text.as_deref().unwrap_or("text"),
            ];
            [id, text].map(str::to_owned).to_vec()
        };
        // Of the columns of a Parquet file, only these are read whole.
        let names = Names {
            keep: is_parquet.then(of_parquet).unwrap_or_default(),
            ..Names::default()
        };
        let mut written = Vec::new();
        for record in formats::records(&self.from, &names)? {
            let Record {
                place,
                fields,
                kept,
                ..
            } = record?;
            let kept = || {
                Value::Object(
                    kept.into_iter()
                        .map(|(name, text)| (name, text.into()))
                        .collect(),
                )
            };
            let answer = match fields {
                Ok(_) if is_parquet => self.answer(&kept()),
                Ok(fields) => self.answer(&fields),
                Err(problem) => Err(problem),
            };
            let (prompt, text) = answer.map_err(|problem| self.fails(&place, problem))?;
            written.push(Written {
                place,
                prompt,
                text,
            });
        }
        Ok(written)
    }

    /// Fails if the columns of a Parquet file are not an id and a text.
    fn check_types(&self) -> Result<(), Failure> {
        let schema = schema_of_file(&self.from)?;
        for (name, usual) in [(&self.id, "id"), (&self.text, "text")] {
            let name = name.as_deref().unwrap_or(usual);
            let Some((_, field)) = schema.column_with_name(name) else {
                continue;
            };
            let data_type = field.data_type();
            let is_id = usual == "id" && data_type.is_integer();
            if !data_type.is_string() && !is_id {
                let problem = format!("column `{name}` is {data_type}, not text");
                return Err(self.fails("schema", problem));
            }
        }
        Ok(())
    }

    /// Reads a file that is one JSON object of texts; `None` for any other.
    fn of_object(&self) -> Option<Vec<Written>> {
        if formats::is_not_json(&self.from) || self.id.is_some() || self.text.is_some() {
            return None;
        }
        let text = files::read_to_string(&self.from).ok()?;
        let Entries(texts) = serde_json::from_str(&text).ok()?;
        // A single line of `{id, text}` is a record.
        if ["id", "text", "doc_id"]
            .iter()
            .any(|name| texts.iter().any(|(key, _)| key == name))
        {
            return None;
        }
        let written = |(id, text): (String, String)| Written {
            place: format!("key {id}"),
            prompt: Named::Id(id),
            text,
        };
        Some(texts.into_iter().map(written).collect())
    }

    /// Returns the prompt and the text of an answer.
    fn answer(&self, record: &Value) -> Result<(Named, String), String> {
        let number = record.get("doc_id").filter(|_| self.id.is_none());
        let prompt = match number {
            Some(number) => {
                let number = number
                    .as_u64()
                    .ok_or_else(|| format!("`doc_id` is {number}, not a number"))?;
                let question = record.get("input").and_then(Value::as_str);
                Named::Number(number as usize, question.map(str::to_owned))
            }
            None => Named::Id(field(record, self.id.as_deref().unwrap_or("id"))?),
        };
        let responses = record.get("filtered_resps").or(record.get("resps"));
        let text = match (responses, &self.text) {
            (Some(responses), None) => first_text(responses)?,
            (_, text) => field(record, text.as_deref().unwrap_or("text"))?,
        };
        Ok((prompt, text))
    }

    /// Fails if answers name prompts by numbers that cannot be trusted: a prompt that was not loaded
    /// shifts all later ones, which is seen by the questions, or if all prompts have answers.
    fn check_numbers(&self, written: &[Written], prompts: usize) -> Result<(), Failure> {
        let numbers = written.iter().filter_map(|answer| match answer.prompt {
            Named::Number(number, None) => Some(number),
            _ => None,
        });
        let numbers: HashSet<usize> = numbers.collect();
        if numbers.is_empty() || numbers.len() >= prompts {
            return Ok(());
        }
        Err(Failure::Other(format!(
            "{}: {} samples without `input` name prompts of table `{}` by number, and the table has {prompts}: a \
             prompt that was not loaded would shift them; set `id` to a field such as `doc.question_id`",
            self.from.display(),
            numbers.len(),
            self.prompts,
        )))
    }

    /// Matches the answers with the prompts.
    fn matched(
        &self,
        written: Vec<Written>,
        prompts: &[AnsweredPrompt],
    ) -> Result<Matched, Failure> {
        let mut numbers: HashMap<&str, Vec<usize>> = HashMap::new();
        for (number, prompt) in prompts.iter().enumerate() {
            if let Some(id) = &prompt.id {
                numbers.entry(id).or_default().push(number);
            }
        }
        let by_id = written
            .iter()
            .any(|answer| matches!(answer.prompt, Named::Id(_)));
        if by_id && numbers.is_empty() && !prompts.is_empty() {
            return Err(Failure::Other(format!(
                "the answers in {} name prompts by id, but the prompts of table `{}` have none; name their \
                 column in `columns: {{ id: … }}` of the stage that loads them",
                self.from.display(),
                self.prompts
            )));
        }
        self.check_numbers(&written, prompts.len())?;
        let mut matched = Matched {
            answers: vec![Vec::new(); prompts.len()],
            others: Vec::new(),
        };
        for Written {
            place,
            prompt,
            text,
        } in written
        {
            match prompt {
                Named::Id(id) => match numbers.get(id.as_str()).map(Vec::as_slice) {
                    Some([number]) => matched.answers[*number].push(text),
                    Some(several) => {
                        let problem = format!("{} prompts have the id {id}", several.len());
                        return Err(self.fails(&place, problem));
                    }
                    None => matched.others.push(id),
                },
                Named::Number(number, question) => {
                    let Some(asked) = prompts.get(number) else {
                        return Err(self.fails(
                            &place,
                            format!(
                                "`doc_id` is {number}, but table `{}` has {} prompts: some were not loaded, so \
                                 numbers do not name them; set `id` to a field such as `doc.question_id`",
                                self.prompts,
                                prompts.len()
                            ),
                        ));
                    };
                    let is_other = |question: &String| question.trim() != asked.question.trim();
                    if question.is_some_and(|question| is_other(&question)) {
                        return Err(self.fails(
                            &place,
                            format!(
                                "the answer is to another question than prompt {number} of table `{}`; set `id` \
                                 to a field such as `doc.question_id`",
                                self.prompts
                            ),
                        ));
                    }
                    matched.answers[number].push(text);
                }
            }
        }
        Ok(matched)
    }
}

/// Returns the text of a field, or of a field within objects: `doc.question_id`.
fn field(record: &Value, path: &str) -> Result<String, String> {
    let within = || {
        path.split('.')
            .try_fold(record, |value, name| value.get(name))
    };
    match record.get(path).or_else(within) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(_) => Err(format!("`{path}` is not a text")),
        None => Err(format!("missing field `{path}`")),
    }
}

/// Returns the first text of a sample's responses: a text, or a list of texts or of such lists.
fn first_text(responses: &Value) -> Result<String, String> {
    let mut value = responses;
    while let Value::Array(list) = value {
        value = list.first().ok_or("the sample has no response")?;
    }
    let text = value
        .as_str()
        .ok_or("the response of the sample is not a text")?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, prompt, stage};
    use super::*;

    type Loaded = Result<(Vec<Answer>, Vec<(String, String)>), Failure>;

    fn loaded(name: &str, text: &str, settings: Value) -> Loaded {
        let mut pipeline = TestPipeline::new();
        let asked = |id: &str| Prompt {
            id: Some(format!("q{id}")),
            ..prompt(id, &format!("Question {id}?"))
        };
        pipeline.table("prompts", &[asked("a"), asked("b")]);
        let from = pipeline.file(name, text);
        let mut all = json!({"prompts": "prompts", "from": from, "model": "gpt"});
        all.as_object_mut()
            .unwrap()
            .extend(settings.as_object().unwrap().clone());
        pipeline.map::<Answer>(&stage::<LoadAnswers>(all))
    }

    fn texts(loaded: Loaded) -> Vec<(String, i32, String)> {
        let (answers, rejects) = loaded.unwrap();
        assert_eq!(rejects, []);
        let text = |answer: Answer| (answer.prompt_id, answer.candidate, answer.text);
        answers.into_iter().map(text).collect()
    }

    fn one(id: &str, text: &str) -> (String, i32, String) {
        (id.to_owned(), 0, text.to_owned())
    }

    #[test]
    fn answers_of_every_form_are_matched_with_their_prompts() {
        let expected = [one("a", "So."), one("b", "No.")];
        let none = || json!({});
        let list = r#"[{"id": "qb", "text": "No."}, {"id": "qa", "text": "So."}]"#;
        assert_eq!(texts(loaded("a.json", list, none())), expected);
        let object = r#"{"qb": "No.", "qa": "So."}"#;
        assert_eq!(texts(loaded("a.json", object, none())), expected);
        let named = "{\"doc\": {\"n\": \"qa\"}, \"out\": \"So.\"}\n{\"doc\": {\"n\": \"qb\"}, \"out\": \"No.\"}\n";
        let columns = json!({"id": "doc.n", "text": "out"});
        assert_eq!(texts(loaded("a.jsonl", named, columns)), expected);
        let samples = "{\"doc_id\": 1, \"filtered_resps\": [\"No.\"], \"input\": \"Question b?\"}\n\
            {\"doc_id\": 0, \"resps\": [[\"So.\"]], \"input\": \"Question a?\"}\n";
        assert_eq!(texts(loaded("samples.jsonl", samples, none())), expected);
        let quoted = "{\"doc_id\": 0, \"filtered_resps\": \"[\\\"So.\\\"]\"}\n{\"doc_id\": 1, \"resps\": [\"No.\"]}\n";
        let found = texts(loaded("samples.jsonl", quoted, none()));
        assert_eq!(found[0].2, "[\"So.\"]");
        let several = r#"[{"id": "qa", "text": "So."}, {"id": "qb", "text": ""}, {"id": "qa", "text": "Or."}]"#;
        let found = texts(loaded("a.json", several, none()));
        assert_eq!(found[1], ("a".to_owned(), 1, "Or.".to_owned()));
        assert_eq!(found[2].2, "");
    }

    #[test]
    fn a_prompt_without_an_answer_is_rejected_and_a_wrong_answer_is_refused() {
        let (answers, rejects) = loaded(
            "a.json",
            r#"[{"id": "qa", "text": "So."}, {"id": "z", "text": "x"}]"#,
            json!({}),
        )
        .unwrap();
        assert_eq!(answers.len(), 1);
        let [(id, reason)] = &rejects[..] else {
            panic!("{rejects:?}")
        };
        assert!(
            id == "b" && reason.starts_with("no answer to qb in "),
            "{reason}"
        );
        for (text, problem) in [
            (
                "{\"doc_id\": 2, \"resps\": \"x\", \"input\": \"Why?\"}\n",
                "line 1: `doc_id` is 2, but table `prompts` has 2 prompts",
            ),
            (
                "{\"doc_id\": 0, \"resps\": \"x\", \"input\": \"Else?\"}\n",
                "the answer is to another question than prompt 0",
            ),
            (
                "{\"doc_id\": 0, \"resps\": \"x\"}\n",
                "1 samples without `input` name prompts of table `prompts` by number, and the table has 2",
            ),
            ("{\"id\": \"qa\"}\n", "line 1: missing field `text`"),
            ("{\"text\": \"x\"}\n", "line 1: missing field `id`"),
            ("{\"id\": 1\n", "line 1: invalid JSON"),
        ] {
            let told = loaded("a.jsonl", text, json!({})).unwrap_err().to_string();
            assert!(told.contains(problem), "{told}");
        }
    }
}
