//! Parsing of source records: the document's `{id, image, prompt, …}`, LLaVA conversations, and
//! LLaVA-Human-Preference records.

use serde_json::{Map, Number, Value};

use super::fields::{Fields, known_placeholders, refuse_placeholders, without};
use super::media::{ReadMedia, holds_anything, placeholder};
use super::unread::{content, refuse_media};
use ovchat_data::tables::{Role, Turn};
use ovchat_models::{IMAGE_PLACEHOLDER as PLACEHOLDER, VIDEO_PLACEHOLDER as VIDEO};

/// Returns the fields of a record with `embedded` images, or the reason why it is rejected.
pub fn read_fields(record: &Result<Value, String>, embedded: usize) -> Result<Fields, String> {
    let value = record.as_ref().map_err(Clone::clone)?;
    if let Some(object) = value.as_object() {
        let read = ReadMedia {
            images: &paths(object).unwrap_or_default(),
            videos: &video_paths(object).unwrap_or_default(),
            embedded,
        };
        refuse_media(object, read)?;
        if embedded == 0 {
            refuse_two_lists(object, "image", "images")?;
        }
        refuse_two_lists(object, "video", "videos")?;
        refuse_bounds(object, read.videos)?;
    }
    let mut fields = fields(value, embedded)?;
    fields.arrange()?;
    refuse_placeholders(&mut fields)?;
    Ok(fields)
}

/// Rejects a record with a video of which only a part is meant.
fn refuse_bounds(object: &Map<String, Value>, videos: &[String]) -> Result<(), String> {
    const BOUNDS: [&str; 12] = [
        "start",
        "end",
        "start_time",
        "end_time",
        "video_start",
        "video_end",
        "clip_start",
        "clip_end",
        "start_sec",
        "end_sec",
        "start_frame",
        "end_frame",
    ];
    let mut bounds = BOUNDS.iter().filter(|key| there(object, key).is_some());
    match bounds.next() {
        Some(key) if !videos.is_empty() => Err(format!(
            "the record limits its video by `{key}`, which is not read; cut the file, as with `ffmpeg -ss START \
             -to END -i FILE NEW.mp4`, and remove the key"
        )),
        _ => Ok(()),
    }
}

/// Returns the paths of images, and those of videos, that a record names, even if the record is
/// rejected.
pub fn named_paths(record: &Result<Value, String>) -> [Vec<String>; 2] {
    let fields = record
        .as_ref()
        .map_err(Clone::clone)
        .and_then(|record| fields(record, 0));
    fields.map_or_else(
        |_| [Vec::new(), Vec::new()],
        |fields| [fields.paths, fields.video_paths],
    )
}

/// Parses a record of any of the forms.
fn fields(record: &Value, embedded: usize) -> Result<Fields, String> {
    let Some(object) = record.as_object() else {
        return Err("expected a JSON object".to_owned());
    };
    let text = |name: &str| -> Result<Option<String>, String> {
        match object.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Number(number)) if name == "id" => number_as_id(number).map(Some),
            Some(_) => Err(format!("`{name}` must be a string")),
        }
    };
    let [chosen, rejected] = preference(object)?.map_or([None, None], |outputs| outputs.map(Some));
    let paths = paths(object)?;
    let video_paths = video_paths(object)?;
    let images = if embedded > 0 { embedded } else { paths.len() };
    let mut parts = [0; 2];
    let mut turns = Vec::new();
    let trimmed = |text: String| text.trim().to_owned();
    let mut system = text("system")?.map(trimmed);
    let mut last_answer = None;
    let written = text("prompt")?.or(text("question")?);
    let question = if let Some(conversation) = there(object, "conversations") {
        let said = Conversation {
            system: &mut system,
            turns: &mut turns,
            answer: &mut last_answer,
            parts: &mut parts,
        };
        conversation_turns(conversation, said)?
    } else {
        if let Some(history) = there(object, "turns") {
            turns = history_turns(history)?;
        }
        written.map(trimmed)
    };
    let question = question.ok_or_else(|| {
        let names: Vec<&str> = object.keys().map(String::as_str).collect();
        format!(
            "missing field `prompt`; the record has the fields {}; name the column of the question as \
             `columns: {{ question: … }}`",
            names.join(", ")
        )
    })?;
    refuse_empty(object, &question, [images, video_paths.len()])?;
    let answers = turns.iter().filter(|turn| turn.role == Role::Assistant);
    let elsewhere = answers.map(|turn| &turn.text);
    let mut elsewhere = elsewhere.chain(&system).chain(&last_answer);
    let elsewhere = elsewhere.find_map(|text| match placeholder(text)? {
        PLACEHOLDER => Some(PLACEHOLDER),
        VIDEO if !video_paths.is_empty() => Some(VIDEO),
        _ => None,
    });
    Ok(Fields {
        id: text("id")?,
        paths,
        video_paths,
        system,
        turns,
        question,
        captions: there(object, "captions").map(texts).transpose()?,
        // The document's own files use an empty answer for a missing one.
        answer: text("answer")?
            .or(last_answer)
            .filter(|answer| !answer.is_empty()),
        chosen: chosen.or(text("chosen")?),
        rejected: rejected.or(text("rejected")?),
        images,
        parts,
        elsewhere,
        has_places: false,
    })
}

/// Rejects a record whose question has no text beside its images and videos, of which there are
/// `counts`.
fn refuse_empty(
    object: &Map<String, Value>,
    question: &str,
    [images, videos]: [usize; 2],
) -> Result<(), String> {
    let mut known = known_placeholders(images, videos);
    if known == [VIDEO] {
        // It stands for a video, too.
        known.push(PLACEHOLDER);
    }
    if !without(question, &known).is_empty() {
        return Ok(());
    }
    let place = if there(object, "conversations").is_some() {
        "the last user turn of `conversations`"
    } else if there(object, "prompt").is_some() {
        "`prompt`"
    } else {
        "`question`"
    };
    let is = if question.is_empty() {
        "is empty"
    } else if images > 0 {
        "has no text beside its images"
    } else {
        "has no text beside its videos"
    };
    Err(format!("{place} {is}; write the question there"))
}

/// Returns the text of a numeric id. An integer beyond 64 bits has already lost its last digits.
fn number_as_id(number: &Number) -> Result<String, String> {
    const EXACT_BELOW: f64 = 9_007_199_254_740_992.0; // 2^53
    match number.as_f64() {
        Some(value) if number.is_f64() && value.abs() >= EXACT_BELOW => Err(
            "`id` is a number with more digits than can be read exactly; quote it to make it a string"
                .to_owned(),
        ),
        _ => Ok(number.to_string()),
    }
}

/// Returns a field of a record unless it is null.
fn there<'a>(record: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    record.get(name).filter(|value| !value.is_null())
}

/// Returns the preferred and the other output of a LLaVA-Human-Preference record
/// (`{conversations, output_1: {value}, output_2: {value}, preference: 1 or 2}`), if it is one. The
/// last assistant turn of its `conversations` is a dummy for the two.
fn preference(record: &Map<String, Value>) -> Result<Option<[String; 2]>, String> {
    if let Some(ranking) = there(record, "human_ranking") {
        return ranked(record, ranking).map(Some);
    }
    let Some(preference) = there(record, "preference") else {
        return Ok(None);
    };
    let output = |name: &str| {
        let value = record.get(name).and_then(|output| output.get("value"));
        let text = value.and_then(Value::as_str).map(str::to_owned);
        text.ok_or_else(|| format!("the record has a `preference` but no string `{name}.value`"))
    };
    let outputs = [output("output_1")?, output("output_2")?];
    // pandas writes integers in a column with nulls as 1.0.
    let number = preference.as_f64();
    match number.and_then(|number| [1.0, 2.0].iter().position(|one| *one == number)) {
        Some(0) => Ok(Some(outputs)),
        Some(_) => {
            let [first, second] = outputs;
            Ok(Some([second, first]))
        }
        None => Err(format!("`preference` must be 1 or 2, got {preference}")),
    }
}

/// Returns the preferred and the other response of a record of VL-RewardBench (`{query, response: [a,
/// b], human_ranking: [0, 1]}`); the rank of the preferred one is 0.
fn ranked(record: &Map<String, Value>, ranking: &Value) -> Result<[String; 2], String> {
    let responses = record.get("response").and_then(Value::as_array);
    let texts: Option<Vec<&str>> =
        responses.and_then(|list| list.iter().map(Value::as_str).collect());
    let Some([one, other]) = texts.as_deref() else {
        return Err(
            "the record has a `human_ranking` but no list of two strings in `response`".to_owned(),
        );
    };
    let ranks = ranking
        .as_array()
        .map(|ranks| ranks.iter().map(Value::as_f64).collect::<Vec<_>>());
    match ranks.as_deref() {
        Some([Some(0.0), Some(1.0)]) => Ok([(*one).to_owned(), (*other).to_owned()]),
        Some([Some(1.0), Some(0.0)]) => Ok([(*other).to_owned(), (*one).to_owned()]),
        _ => Err(format!(
            "`human_ranking` must be [0, 1] or [1, 0], got {ranking}"
        )),
    }
}

/// Returns the paths under `image`, or those under `images` if there are none.
fn paths(record: &Map<String, Value>) -> Result<Vec<String>, String> {
    either(record, "image", "images")
}

/// Returns the paths under `video`, or those under `videos` if there are none.
fn video_paths(record: &Map<String, Value>) -> Result<Vec<String>, String> {
    either(record, "video", "videos")
}

fn either(record: &Map<String, Value>, one: &str, several: &str) -> Result<Vec<String>, String> {
    let first = listed(record, one)?;
    if first.is_empty() {
        listed(record, several)
    } else {
        Ok(first)
    }
}

/// Rejects a record with different files under two keys, because one of them would be ignored.
fn refuse_two_lists(record: &Map<String, Value>, one: &str, several: &str) -> Result<(), String> {
    let (first, all) = (listed(record, one)?, listed(record, several)?);
    if first.is_empty() || all.is_empty() || first == all {
        return Ok(());
    }
    Err(format!(
        "`{one}` and `{several}` name different files; keep one of the two"
    ))
}

fn listed(record: &Map<String, Value>, name: &str) -> Result<Vec<String>, String> {
    let items = match there(record, name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    let paths = items.iter().map(|item| path_of(item, name));
    paths.filter_map(Result::transpose).collect()
}

/// The maximum length of a path, in bytes, as on Linux.
const PATH_MAX: usize = 4096;

/// Returns the path that an item of `image` or `video` is or has. Data sets write empty strings and
/// objects in place of no file.
fn path_of(item: &Value, name: &str) -> Result<Option<String>, String> {
    let path = match item {
        Value::String(path) => path,
        // The forms in which `datasets` writes a file.
        Value::Object(file) if file.get("bytes").is_some_and(holds_anything) => {
            return Err(format!(
                "`{name}` holds the bytes of a file; write them to a file, and its path here"
            ));
        }
        Value::Object(file) if file.get("path").is_some_and(Value::is_string) => {
            file["path"].as_str().unwrap_or_default()
        }
        value @ Value::Object(_) if !holds_anything(value) => return Ok(None),
        _ => return Err(format!("`{name}` must be a path or a list of paths")),
    };
    if path.len() > PATH_MAX || path.starts_with("data:") {
        return Err(format!(
            "`{name}` holds data in place of a path; write the data to a file, and its path here"
        ));
    }
    Ok(Some(path.to_owned()).filter(|path| !path.trim().is_empty()))
}

fn texts(list: &Value) -> Result<Vec<String>, String> {
    if let Some(text) = list.as_str() {
        return Ok(vec![text.to_owned()]);
    }
    let items = list
        .as_array()
        .ok_or("`captions` must be a list of strings")?;
    let text = |item: &Value| {
        item.as_str()
            .map(str::to_owned)
            .ok_or("`captions` must be a list of strings")
    };
    Ok(items.iter().map(text).collect::<Result<_, _>>()?)
}

/// The destinations of a parsed conversation's parts.
struct Conversation<'a> {
    system: &'a mut Option<String>,
    turns: &'a mut Vec<Turn>,
    answer: &'a mut Option<String>,
    /// The numbers of image parts and of video parts.
    parts: &'a mut [usize; 2],
}

/// Parses LLaVA's `conversations`, of `{from, value}` or of `{role, content}`. The last user turn
/// is the question, the assistant turn after it is the known answer, and the turns before it are
/// the history.
fn conversation_turns(
    conversation: &Value,
    said: Conversation<'_>,
) -> Result<Option<String>, String> {
    let Conversation {
        system,
        turns,
        answer,
        parts: media_parts,
    } = said;
    let entries = conversation
        .as_array()
        .ok_or("`conversations` must be a list")?;
    for (number, entry) in entries.iter().enumerate() {
        let has = |name: &str| entry.get(name).is_some_and(|value| !value.is_null());
        if (has("from") || has("value")) && (has("role") || has("content")) {
            return Err(format!(
                "entry {number} of `conversations` mixes `from`/`value` with `role`/`content`; use one of the \
                 two forms"
            ));
        }
        let (from, value) = if has("role") && !has("from") {
            ("role", "content")
        } else {
            ("from", "value")
        };
        let word = |name: &str| {
            let text = entry.get(name).and_then(Value::as_str);
            text.ok_or_else(|| format!("entry {number} of `conversations` has no string `{name}`"))
        };
        let text = if let (Some(Value::Array(parts)), "content") = (entry.get(value), value) {
            let place = format!("entry {number} of `conversations`");
            let (text, [images, videos]) = content(&place, parts)?;
            media_parts[0] += images;
            media_parts[1] += videos;
            text.trim().to_owned()
        } else {
            word(value)?.trim().to_owned()
        };
        match word(from)? {
            "system" => match system {
                Some(before) if *before != text => {
                    return Err(format!(
                        "entry {number} of `conversations` is a second system prompt; merge the two"
                    ));
                }
                _ => *system = Some(text),
            },
            "human" | "user" => turns.push(Turn {
                role: Role::User,
                text,
            }),
            "gpt" | "assistant" => turns.push(Turn {
                role: Role::Assistant,
                text,
            }),
            other => {
                return Err(format!(
                    "entry {number} of `conversations` has the unknown role `{other}`; expected `human` or `gpt`"
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
        _ => Err(
            "`conversations` must end with a user turn, optionally followed by its answer"
                .to_owned(),
        ),
    }
}

/// Parses `turns`, this project's own form: a list of `{role, text}` before the question.
fn history_turns(history: &Value) -> Result<Vec<Turn>, String> {
    let entries = history.as_array().ok_or("`turns` must be a list")?;
    let turn = |entry: &Value| {
        let text = entry
            .get("text")
            .and_then(Value::as_str)
            .ok_or("a turn has no `text`")?;
        let role = match entry.get("role").and_then(Value::as_str) {
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => return Err("the `role` of a turn must be `user` or `assistant`"),
        };
        Ok(Turn {
            role,
            text: text.trim().to_owned(),
        })
    };
    Ok(entries.iter().map(turn).collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(record: &Value) -> Result<Fields, String> {
        read_fields(&Ok(record.clone()), 0)
    }

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
        assert_eq!(problem, "`preference` must be 1 or 2, got 3");
        let mut record = record(json!(1));
        record.as_object_mut().unwrap().remove("output_2");
        let problem = fields(&record).err().unwrap();
        assert_eq!(
            problem,
            "the record has a `preference` but no string `output_2.value`"
        );
    }

    #[test]
    fn roles_and_contents_read_like_speakers_and_values() {
        let image = json!({"type": "image", "index": 0, "text": null});
        let record = json!({"images": ["a.png"], "conversations": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            {"role": "user", "content": "Which color?"}, {"role": "assistant", "content": "Gray."}]});
        let read = fields(&record).unwrap();
        assert_eq!(read.system.as_deref(), Some("Be brief."));
        assert_eq!(read.turns[0].text, "What is it?");
        assert_eq!(read.turns[1].text, "A cat.");
        assert_eq!(
            (read.question.as_str(), read.answer.as_deref()),
            ("Which color?", Some("Gray."))
        );
        let between = json!({"images": ["a.png", "b.png"], "conversations": [{"role": "user", "content": [
            {"type": "text", "text": "Is"}, image, {"type": "text", "text": "or"}, image]}]});
        let read = fields(&between).unwrap();
        assert_eq!(read.question, "Is\n<image>\nor\n<image>");
        let mut mixed = between.clone();
        mixed["conversations"][0]["content"][0]["text"] = json!("What does <image> mean?");
        assert_eq!(
            fields(&mixed).unwrap_err(),
            "the record has image parts and the text `<image>`; use one of the two"
        );
        let nested = json!({"image": "a", "turns": [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hi"}],
            "prompt": "<im<image>age> now?"});
        assert!(
            fields(&nested)
                .unwrap_err()
                .contains("stands within another one")
        );
        let without = json!({"conversations": record["conversations"]});
        assert_eq!(
            fields(&without).unwrap_err(),
            "found 0 images but 1 image part; write one for each image, or none"
        );
    }

    #[test]
    fn images_and_their_places_are_as_many() {
        let two = json!(["a.png", "b.png"]);
        let flat = |text: &str| fields(&json!({"images": two, "prompt": text}));
        assert_eq!(flat("Which is older?").unwrap().question, "Which is older?");
        assert_eq!(
            flat("<image> or <image>?").unwrap().question,
            "<image> or <image>?"
        );
        assert_eq!(
            flat("<image>\nWhich?").unwrap_err(),
            "found 2 images but 1 `<image>` placeholder; write one for each image, or none"
        );
        assert_eq!(
            flat("<image><image><image> Which?").unwrap_err(),
            "found 2 images but 3 `<image>` placeholders; write one for each image, or none"
        );
        let told = |first: &str, answer: &str, last: &str| {
            fields(&json!({"image": two, "conversations": [
                {"from": "human", "value": first}, {"from": "gpt", "value": answer},
                {"from": "human", "value": last}, {"from": "gpt", "value": "It is."}]}))
        };
        let read = told("<image>\nThis?", "A cat.", "And <image>").unwrap();
        assert_eq!(
            (read.turns[0].text.as_str(), &*read.question),
            ("<image>\nThis?", "<image>\nAnd")
        );
        assert_eq!(
            told("This?", "<image>: a cat.", "And <image>").unwrap_err(),
            "`<image>` stands in the system prompt or in an answer; move it into a user turn"
        );
        assert!(told("<image>\nThis?", "A cat.", "And?").is_err());
        let answer = told("<image>\nThis?", "The tag <image>.", "And <image>").unwrap();
        assert_eq!(answer.turns[1].text, "The tag <image>.");
        let turns = json!([{"role": "user", "text": "<image>This?"}, {"role": "assistant", "text": "Yes."}]);
        let with = |prompt: &str| fields(&json!({"image": two, "turns": turns, "prompt": prompt}));
        assert!(with("And <image>?").is_ok());
        assert!(with("And?").is_err());
        let embedded = |count| read_fields(&Ok(json!({"prompt": "<image><image> Which?"})), count);
        assert_eq!(embedded(2).unwrap().question, "<image><image> Which?");
        assert!(embedded(1).is_err() && embedded(3).is_err());
    }

    /// As in earlier versions, so that the ids of these prompts stay.
    #[test]
    fn images_before_the_first_text_one_line_each_leave_no_placeholder() {
        for (images, text) in [
            (json!("a"), "<image>\nWhich?"),
            (json!("a"), "<image> Which?"),
            (json!("a"), "Which?<image>"),
            (json!("a"), "Which?\n <image>\n"),
            (json!(["a", "b"]), "<image>\n<image>\nWhich?"),
            (json!(["a", "b"]), "<image>\r\n<image>\r\nWhich?"),
            (json!(["a", "b"]), "Which?"),
        ] {
            let read = fields(&json!({"images": images, "prompt": text})).unwrap();
            assert_eq!(read.question, "Which?", "{text}");
        }
        let turns = json!([{"role": "user", "text": "This <image>"}, {"role": "assistant", "text": "Yes."}]);
        let read = fields(&json!({"images": "a", "turns": turns, "prompt": "And?"})).unwrap();
        assert_eq!((&*read.turns[0].text, &*read.question), ("This", "And?"));
    }

    #[test]
    fn images_elsewhere_keep_their_places() {
        let two = |text: &str| {
            let read = fields(&json!({"images": ["a", "b"], "prompt": text}));
            read.unwrap().question
        };
        for text in [
            "<image><image>\nWhich?",
            "<image> <image>\nWhich?",
            "Image-1: <image>\nImage-2: <image>\nWhich?",
            "Which?\n<image>\n<image>",
            "<image>\n<image>\n\nWhich?",
        ] {
            assert_eq!(two(text), text);
        }
        assert_eq!(two(" <image>a<image> "), "<image>a<image>");
        // A single image of a turn that is not the first one.
        let turns =
            json!([{"role": "user", "text": "Hello"}, {"role": "assistant", "text": "Hi."}]);
        let read = |text: &str, image: Value| {
            fields(&json!({"image": image, "turns": turns, "prompt": text})).unwrap()
        };
        let later = read("And <image> now?", json!("a"));
        assert_eq!(
            (&*later.turns[0].text, &*later.question),
            ("Hello", "<image>\nAnd  now?")
        );
        // One that begins its turn stays, as in LLaVA-NeXT.
        let begins = read("<image> And now?", json!("a"));
        assert_eq!(begins.question, "<image> And now?");
        let mut placed = fields(&json!({"images": ["a", "b"], "prompt": "<image>\n<image>\nNow?"}));
        placed.as_mut().unwrap().separate_by_spaces();
        assert_eq!(placed.unwrap().question, "Now?");
        let mut several = read("Now?", json!(["a", "b", "c"]));
        several.separate_by_spaces();
        assert_eq!(several.turns[0].text, "<image> <image> <image>\nHello");
        let mut one = read("Now?", json!("a"));
        one.separate_by_spaces();
        assert_eq!(one.turns[0].text, "Hello");
    }

    /// The cases that the networks are compared with transformers by.
    #[test]
    fn recorded_prompts_have_the_form_of_tables() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/parity/recorded/interleaved/onevision/cases.json"
        );
        let recorded: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let cases = recorded["cases"].as_array().unwrap();
        assert!(cases.len() > 10);
        let turns = |turns: &Value| -> Vec<Value> {
            let turns = turns.as_array().unwrap().iter();
            turns
                .map(|turn| json!({"role": turn[0], "text": turn[1]}))
                .collect()
        };
        for case in cases {
            let written = &case["written"];
            let read = fields(&json!({
                "images": case["images"],
                "turns": turns(&written["turns"]),
                "prompt": written["question"],
            }));
            let read = read.unwrap();
            assert_eq!(json!(read.question), case["question"], "{case}");
            let texts: Vec<&String> = read.turns.iter().map(|turn| &turn.text).collect();
            let expected = turns(&case["turns"]);
            let expected: Vec<&Value> = expected.iter().map(|turn| &turn["text"]).collect();
            assert_eq!(json!(texts), json!(expected), "{case}");
        }
    }

    #[test]
    fn without_images_the_text_is_left_as_it_is() {
        let text = "What does the tag <image> do?";
        let flat = fields(&json!({"prompt": text, "image": null, "images": []})).unwrap();
        assert_eq!(flat.question, text);
        let told = json!({"conversations": [
            {"from": "human", "value": text}, {"from": "gpt", "value": "<image> embeds."},
            {"from": "human", "value": " Since when? "}]});
        let told = fields(&told).unwrap();
        assert_eq!(told.turns[0].text, text);
        assert_eq!(told.turns[1].text, "<image> embeds.");
        assert_eq!(told.question, "Since when?");
    }

    #[test]
    fn a_placeholder_for_what_is_not_there_refuses_the_record() {
        for word in ["<image>", "<video>", "<audio>"] {
            let flat = |text: String| fields(&json!({"prompt": text}));
            for text in [
                format!("{word}\nWhat happens?"),
                format!("What happens? {word}"),
                format!("Look.\n{word}\nWhat happens?"),
            ] {
                let reason = flat(text).unwrap_err();
                let begin = format!("the text contains the placeholder `{word}`, but");
                assert!(reason.starts_with(&begin), "{reason}");
            }
            assert!(flat(format!("What does the {word} tag do in HTML?")).is_ok());
            let told = json!({"conversations": [
                {"from": "human", "value": format!("{word}\nWhat happens?")},
                {"from": "gpt", "value": "A cat sleeps."}, {"from": "human", "value": "Why?"}]});
            assert!(fields(&told).is_err(), "{told}");
        }
        let beside = json!({"image": "a.png", "prompt": "<image>\n<video>\nWhat happens?"});
        assert!(fields(&beside).unwrap_err().contains("`<video>`"));
    }

    #[test]
    fn videos_have_places_as_images_do() {
        let read = |record: Value| fields(&record).map(|fields| fields.question);
        let one = |text: &str| read(json!({"video": "a.mp4", "prompt": text}));
        for text in ["<video>\nWhy?", "<image>\nWhy?", "Why? <video>", "Why?"] {
            assert_eq!(one(text).unwrap(), "Why?", "{text}");
        }
        assert_eq!(
            one("<video><video> Why?").unwrap_err(),
            "found 1 video but 2 `<video>` placeholders; write one for each video, or none"
        );
        assert_eq!(
            one("<image>").unwrap_err(),
            "`prompt` has no text beside its videos; write the question there"
        );
        let both = |text: &str| {
            let file = json!({"path": "a.mp4", "bytes": null});
            read(json!({"image": "a.png", "videos": [file, ""], "prompt": text}))
        };
        assert_eq!(
            both("<video> before <image>?").unwrap(),
            "<video> before <image>?"
        );
        assert_eq!(both("<image>\n<video>\nWhy?").unwrap(), "Why?");
        assert_eq!(
            both("<video> Why?").unwrap_err(),
            "found 1 image but 0 `<image>` placeholders; write one for each image, or none"
        );
        let mut apart = fields(&json!({"image": "a", "video": "b", "prompt": "Why?"})).unwrap();
        apart.separate_by_spaces();
        assert_eq!(apart.question, "<image> <video>\nWhy?");
        let part = json!({"type": "video"});
        let told = |text: &str| {
            let content = json!([part, {"type": "text", "text": text}]);
            read(json!({"video": "a", "conversations": [{"role": "user", "content": content}]}))
        };
        assert_eq!(told("Why?").unwrap(), "Why?");
        assert_eq!(
            told("What is <video>?").unwrap_err(),
            "the record has video parts and the text `<video>`; use one of the two"
        );
    }

    #[test]
    fn what_is_no_path_of_a_video_refuses_the_record() {
        for (video, words) in [
            (
                json!({"bytes": "AAAA", "path": null}),
                "holds the bytes of a file",
            ),
            (
                json!("data:video/mp4;base64,AAAA"),
                "holds data in place of a path",
            ),
            (json!("a".repeat(5000)), "holds data in place of a path"),
            (json!(["a.mp4", null]), "must be a path or a list of paths"),
        ] {
            let reason = fields(&json!({"video": video, "prompt": "Why?"})).unwrap_err();
            assert!(
                reason.starts_with("`video` ") && reason.contains(words),
                "{reason}"
            );
        }
        let part = json!({"video": "a.mp4", "video_start": 3.5, "prompt": "Why?"});
        assert!(
            fields(&part)
                .unwrap_err()
                .contains("limits its video by `video_start`")
        );
        assert!(fields(&json!({"video_start": 3.5, "prompt": "Why?"})).is_ok());
        let two = json!({"video": "a.mp4", "videos": ["b.mp4"], "prompt": "Why?"});
        assert_eq!(
            fields(&two).unwrap_err(),
            "`video` and `videos` name different files; keep one of the two"
        );
    }

    #[test]
    fn an_empty_question_is_said_to_be_empty() {
        let reason = |record| fields(&record).unwrap_err();
        assert_eq!(
            reason(json!({"prompt": " "})),
            "`prompt` is empty; write the question there"
        );
        assert_eq!(
            reason(json!({"question": "<image>", "image": "a.png"})),
            "`question` has no text beside its images; write the question there"
        );
        let told = json!({"conversations": [{"from": "human", "value": ""}]});
        assert_eq!(
            reason(told),
            "the last user turn of `conversations` is empty; write the question there"
        );
    }

    #[test]
    fn no_list_of_images_is_passed_over() {
        let read = |image: Value, images: Value| {
            let record = json!({"image": image, "images": images, "prompt": "Why?"});
            fields(&record).map(|fields| fields.paths)
        };
        assert_eq!(read(json!(null), json!(["a", "b"])).unwrap(), ["a", "b"]);
        assert_eq!(read(json!("a"), json!(["a"])).unwrap(), ["a"]);
        assert_eq!(read(json!("a"), json!(null)).unwrap(), ["a"]);
        assert_eq!(
            read(json!("a"), json!(["a", "b"])).unwrap_err(),
            "`image` and `images` name different files; keep one of the two"
        );
    }

    /// The key of a finished table includes the images that its records name, as in earlier
    /// versions.
    #[test]
    fn a_record_that_is_refused_now_still_names_its_images() {
        for more in [
            json!({"audio": "a.wav"}),
            json!({"prompt": "<image><image> Why?"}),
            json!({"images": ["b"]}),
        ] {
            let mut record = json!({"prompt": "Why?", "image": "a"});
            record
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            assert!(fields(&record).is_err());
            assert_eq!(named_paths(&Ok(record)), [vec!["a"], vec![]]);
        }
    }

    #[test]
    fn what_is_wrong_with_a_record_is_said_with_its_fields() {
        let reason = |record| fields(&record).err().unwrap();
        assert_eq!(
            reason(json!({"id": "a", "promt": "x"})),
            "missing field `prompt`; the record has the fields id, promt; name the column of the \
             question as `columns: { question: … }`"
        );
        assert_eq!(
            reason(json!({"prompt": "x", "image": 3})),
            "`image` must be a path or a list of paths"
        );
        assert_eq!(reason(json!([1])), "expected a JSON object");
    }
}
