//! What a record of a source says: the document's `{id, image, prompt, …}`, a LLaVA conversation, or a
//! preference of LLaVA-Human-Preference.

use serde_json::{Map, Value};

use crate::tables::{Role, Turn};

/// What a record says, before its pictures are opened.
pub struct Fields {
    pub id: Option<String>,
    pub paths: Vec<String>,
    pub system: Option<String>,
    pub turns: Vec<Turn>,
    pub question: String,
    pub captions: Option<Vec<String>>,
    pub answer: Option<String>,
    pub chosen: Option<String>,
    pub rejected: Option<String>,
}

/// The fields of a record that was read, or why there are none.
pub fn read_fields(record: &Result<Value, String>) -> Result<Fields, String> {
    record.as_ref().map_err(Clone::clone).and_then(fields)
}

/// Reads a record of either form.
fn fields(record: &Value) -> Result<Fields, String> {
    let Some(object) = record.as_object() else {
        return Err("it is not a JSON object".to_owned());
    };
    let text = |name: &str| -> Result<Option<String>, String> {
        match object.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Number(number)) if name == "id" => Ok(Some(number.to_string())),
            Some(_) => Err(format!("`{name}` is not a text")),
        }
    };
    let [chosen, rejected] = preference(object)?.map_or([None, None], |outputs| outputs.map(Some));
    let mut turns = Vec::new();
    let mut system = text("system")?;
    let mut last_answer = None;
    let mut question = text("prompt")?.or(text("question")?);
    if let Some(conversation) = object.get("conversations") {
        question = conversation_turns(conversation, &mut system, &mut turns, &mut last_answer)?;
    } else if let Some(history) = object.get("turns") {
        turns = history_turns(history)?;
    }
    let question = question
        .map(|text| without_placeholders(&text))
        .filter(|text| !text.is_empty());
    let names: Vec<&str> = object.keys().map(String::as_str).collect();
    let question = question
        .ok_or_else(|| format!("it has no `prompt`; its fields are {}", names.join(", ")))?;
    Ok(Fields {
        id: text("id")?,
        paths: paths(object.get("image").or(object.get("images")))?,
        system,
        turns,
        question,
        captions: object
            .get("captions")
            .filter(|captions| !captions.is_null())
            .map(texts)
            .transpose()?,
        // An empty answer is how the document's writers say that there is none.
        answer: text("answer")?
            .or(last_answer)
            .filter(|answer| !answer.is_empty()),
        chosen: chosen.or(text("chosen")?),
        rejected: rejected.or(text("rejected")?),
    })
}

/// The preferred and the other output of a record of LLaVA-Human-Preference
/// (`{conversations, output_1: {value}, output_2: {value}, preference: 1 or 2}`), if it is one. The
/// last thing that the model says in `conversations` is a stand-in for the two.
fn preference(record: &Map<String, Value>) -> Result<Option<[String; 2]>, String> {
    let Some(preference) = record.get("preference").filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let output = |name: &str| {
        let value = record.get(name).and_then(|output| output.get("value"));
        let text = value.and_then(Value::as_str).map(str::to_owned);
        text.ok_or_else(|| format!("it has a `preference`, but no text `{name}.value`"))
    };
    let outputs = [output("output_1")?, output("output_2")?];
    match preference.as_i64() {
        Some(1) => Ok(Some(outputs)),
        Some(2) => {
            let [first, second] = outputs;
            Ok(Some([second, first]))
        }
        _ => Err(format!("`preference` is {preference}, neither 1 nor 2")),
    }
}

fn paths(images: Option<&Value>) -> Result<Vec<String>, String> {
    match images {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(path)) => Ok(vec![path.clone()]),
        Some(list @ Value::Array(_)) => {
            texts(list).map_err(|_| "`image` is not a path or a list of paths".to_owned())
        }
        Some(_) => Err("`image` is not a path or a list of paths".to_owned()),
    }
}

fn texts(list: &Value) -> Result<Vec<String>, String> {
    let items = list.as_array().ok_or("`captions` is not a list of texts")?;
    let text = |item: &Value| {
        item.as_str()
            .map(str::to_owned)
            .ok_or("`captions` is not a list of texts")
    };
    Ok(items.iter().map(text).collect::<Result<_, _>>()?)
}

/// Removes `<image>` wherever it stands, as the document's training script does: the pictures come
/// first in any case.
fn without_placeholders(text: &str) -> String {
    text.replace("<image>", "").trim().to_owned()
}

/// LLaVA's `conversations`: the last thing that the human says is the question, what the model says
/// to it is the known answer, and all before it is history.
fn conversation_turns(
    conversation: &Value,
    system: &mut Option<String>,
    turns: &mut Vec<Turn>,
    answer: &mut Option<String>,
) -> Result<Option<String>, String> {
    let entries = conversation
        .as_array()
        .ok_or("`conversations` is not a list")?;
    for (number, entry) in entries.iter().enumerate() {
        let word = |name: &str| {
            let text = entry.get(name).and_then(Value::as_str);
            text.ok_or_else(|| format!("entry {number} of `conversations` has no text `{name}`"))
        };
        let value = without_placeholders(word("value")?);
        match word("from")? {
            "system" => *system = Some(value),
            "human" | "user" => turns.push(Turn {
                role: Role::User,
                text: value,
            }),
            "gpt" | "assistant" => turns.push(Turn {
                role: Role::Assistant,
                text: value,
            }),
            other => {
                return Err(format!(
                    "entry {number} of `conversations` is from `{other}`, not `human` or `gpt`"
                ));
            }
        }
    }
    if turns
        .last()
        .is_some_and(|turn| turn.role == Role::Assistant)
    {
        *answer = turns.pop().map(|turn| turn.text);
    }
    match turns.pop() {
        Some(Turn {
            role: Role::User,
            text,
        }) => Ok(Some(text)),
        _ => Err("`conversations` does not end in a question".to_owned()),
    }
}

/// Our own `turns`: a list of `{role, text}` before the question.
fn history_turns(history: &Value) -> Result<Vec<Turn>, String> {
    let entries = history.as_array().ok_or("`turns` is not a list")?;
    let turn = |entry: &Value| {
        let text = entry
            .get("text")
            .and_then(Value::as_str)
            .ok_or("a turn has no `text`")?;
        let role = match entry.get("role").and_then(Value::as_str) {
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => return Err("the `role` of a turn is neither `user` nor `assistant`"),
        };
        Ok(Turn {
            role,
            text: without_placeholders(text),
        })
    };
    Ok(entries.iter().map(turn).collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_conversation_becomes_history_question_and_answer() {
        let record = json!({"id": 7, "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "Gray."}]});
        let fields = fields(&record).unwrap();
        assert_eq!(fields.id.as_deref(), Some("7"));
        assert_eq!(fields.question, "Which color?");
        assert_eq!(fields.answer.as_deref(), Some("Gray."));
        assert_eq!(fields.turns.len(), 2);
        assert_eq!(fields.turns[0].text, "What is it?");
    }

    #[test]
    fn the_preferred_output_of_a_conversation_is_chosen() {
        let record = |preference: Value| {
            json!({"id": "1", "image": "a.jpg", "hallucination": true, "preference": preference,
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
                    {"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "(either)"}],
                "output_1": {"from": "llava", "value": "Gray."},
                "output_2": {"from": "llava", "value": "Pink."}})
        };
        let first = fields(&record(json!(1))).unwrap();
        assert_eq!(
            (first.question.as_str(), first.turns.len()),
            ("Which color?", 2)
        );
        assert_eq!(first.chosen.as_deref(), Some("Gray."));
        assert_eq!(first.rejected.as_deref(), Some("Pink."));
        let second = fields(&record(json!(2))).unwrap();
        assert_eq!(second.chosen.as_deref(), Some("Pink."));
        let problem = fields(&record(json!(3))).err().unwrap();
        assert_eq!(problem, "`preference` is 3, neither 1 nor 2");
        let mut record = record(json!(1));
        record.as_object_mut().unwrap().remove("output_2");
        let problem = fields(&record).err().unwrap();
        assert_eq!(
            problem,
            "it has a `preference`, but no text `output_2.value`"
        );
    }

    #[test]
    fn what_is_wrong_with_a_record_is_said_with_its_fields() {
        let reason = |record| fields(&record).err().unwrap();
        assert_eq!(
            reason(json!({"id": "a", "promt": "x"})),
            "it has no `prompt`; its fields are id, promt"
        );
        assert_eq!(
            reason(json!({"prompt": "x", "image": 3})),
            "`image` is not a path or a list of paths"
        );
        assert_eq!(reason(json!([1])), "it is not a JSON object");
    }
}
