//! The ignored keys of a record: media keys reject the record, other keys are counted and listed
//! once.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Map, Value};

use super::media::{
    Found, NAMES, ReadMedia, Says, found, holds_anything, is_id, says, says_at_its_end,
};
use ovchat_models::{IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER};

/// The keys of a record that are read.
pub const READ: [&str; 19] = [
    "id",
    "image",
    "images",
    "video",
    "videos",
    "prompt",
    "question",
    "system",
    "turns",
    "conversations",
    "captions",
    "answer",
    "chosen",
    "rejected",
    "preference",
    "output_1",
    "output_2",
    "response",
    "human_ranking",
];

/// The keys that are read in the entries of these lists, or in these objects.
const READ_WITHIN: [(&str, &[&str]); 4] = [
    ("conversations", &["from", "value", "role", "content"]),
    ("turns", &["role", "text"]),
    ("output_1", &["from", "value"]),
    ("output_2", &["from", "value"]),
];

/// The key of a chat that is not read; it is only searched for media.
const CHAT: &str = "messages";

/// The maximum number of keys that are counted by name, since a file may have other keys in every
/// record.
const NAMES_MAX: usize = 256;

/// The maximum number of keys that the note lists.
const SHOWN_MAX: usize = 8;

/// The maximum number of characters of a key that are shown.
const NAME_CHARS: usize = 40;

/// True for the keys of a record whose values are needed. For other keys it is enough to know
/// whether the value is empty and whether it is media.
pub fn is_needed(key: &str) -> bool {
    READ.contains(&key) || key == CHAT || NAMES.contains(&key)
}

/// Returns the key and value of the record's own id, if it has one.
pub fn own_name(record: &Value) -> Option<String> {
    NAMES.iter().find_map(|key| {
        let name = match record.get(key)? {
            Value::String(text) if !text.trim().is_empty() => shown(text),
            Value::Number(number) => number.to_string(),
            _ => return None,
        };
        Some(format!("{key} {name}"))
    })
}

/// Returns the objects in a field of a record, each with a description of its place: the entries of
/// a list, or the object itself.
fn within<'a>(
    record: &'a Map<String, Value>,
    field: &'static str,
) -> impl Iterator<Item = (String, &'a Map<String, Value>)> {
    let (list, single) = match record.get(field) {
        Some(Value::Array(list)) => (&list[..], None),
        Some(Value::Object(object)) => (&[][..], Some((format!("`{field}`"), object))),
        _ => (&[][..], None),
    };
    let entries = list.iter().enumerate().filter_map(move |(number, entry)| {
        Some((format!("entry {number} of `{field}`"), entry.as_object()?))
    });
    single.into_iter().chain(entries)
}

/// Rejects a record that names media other than those in `read`.
pub fn refuse_media(record: &Map<String, Value>, read: ReadMedia<'_>) -> Result<(), String> {
    for (key, value) in record {
        if !READ.contains(&key.as_str()) && key != CHAT {
            refuse_value("the record", key, value, read)?;
        }
    }
    for (field, keys) in READ_WITHIN.into_iter().chain([(CHAT, READ_WITHIN[0].1)]) {
        for (place, object) in within(record, field) {
            for (key, value) in object {
                if !keys.contains(&key.as_str()) {
                    refuse_value(&place, key, value, read)?;
                }
            }
            if let Some(Value::Array(parts)) = object.get("content") {
                content(&place, parts)?;
            }
        }
    }
    Ok(())
}

/// True for keys of an image's origin or original name: `url`, `flickr_url`, `image_name`,
/// `filename`, `source`. Data sets have these in addition to the image under another key.
fn is_origin(key: &str) -> bool {
    let small = key.to_ascii_lowercase();
    ["url", "name", "source"]
        .iter()
        .any(|end| small.ends_with(end))
}

/// Rejects the value of an ignored key if it is media. Another name of an image or video that is read
/// is accepted: the same path under a key such as `photo`; the same file name under a key of its
/// location, such as `image_url` or `source`; and under the latter any name, if the image is
/// embedded in the file. A key of the images' origin may hold as many names as there are images.
fn refuse_value(place: &str, key: &str, value: &Value, read: ReadMedia<'_>) -> Result<(), String> {
    let says = says(key).or(says_at_its_end(key, value));
    let is_number = matches!(value, Value::Bool(_) | Value::Number(_));
    if !holds_anything(value) || (says.is_none() && is_id(key)) {
        return Ok(());
    }
    let media = found(value, says.is_some());
    let is_known = |medium: &Found<'_>| match medium {
        Found::Named(name) if says == Some(Says::Image) => read.has_path(name),
        Found::Named(name) => read.has_file_name(name),
        Found::Held => false,
    };
    let is_label = |medium: &Found<'_>| match says {
        Some(Says::Image | Says::Video) => false,
        Some(Says::PlaceOfImage) => matches!(medium, Found::Named(_)),
        _ => medium.is_image_file(),
    };
    let labels = match says {
        None if is_origin(key) => read.embedded + read.images.len(),
        _ => read.embedded,
    };
    let is_read =
        media.iter().all(is_known) || (media.len() <= labels && media.iter().all(is_label));
    let is_image = matches!(says, Some(Says::Image | Says::PlaceOfImage));
    if says == Some(Says::Other) {
        return Err(unsupported(place, key));
    }
    if says == Some(Says::Video) {
        let is_other_name = !media.is_empty() && media.iter().all(is_known);
        return if is_other_name {
            Ok(())
        } else {
            Err(other_video(place, key))
        };
    }
    if is_number && !(is_image && read.has_no_image()) {
        return Ok(());
    }
    if is_image && (read.has_no_image() || media.is_empty() || !is_read) {
        return Err(other_image(place, key));
    }
    if is_read {
        Ok(())
    } else if media.contains(&Found::Held) {
        Err(held(place, key))
    } else if media.iter().all(|medium| medium.is_image_file()) {
        Err(other_image(place, key))
    } else if media.iter().all(|medium| medium.is_video_file()) {
        Err(other_video(place, key))
    } else {
        Err(unsupported(place, key))
    }
}

fn held(place: &str, key: &str) -> String {
    format!(
        "{place} embeds a file in `{}`, which is ignored; name an image in `image`, or a video in `video` of \
         the record, or remove the key if the text does not need it",
        shown(key)
    )
}

fn unsupported(place: &str, key: &str) -> String {
    format!(
        "{place} has the media key `{}`, but only images and videos are supported; remove the record, or the \
         key if the text does not need it",
        shown(key)
    )
}

fn other_video(place: &str, key: &str) -> String {
    format!(
        "{place} names a video in `{}`, which is ignored; name its file in `video` or `videos` of the record, \
         or remove the key if the text does not need it",
        shown(key)
    )
}

fn other_image(place: &str, key: &str) -> String {
    format!(
        "{place} names an image in `{}`, which is ignored; name its file in `image` or `images` of the \
         record, or remove the key if the text does not need it",
        shown(key)
    )
}

/// Returns the text of a message that consists of parts, each on lines of its own, and the numbers of
/// its image parts and its video parts. A placeholder stands for each of these.
pub fn content(place: &str, parts: &[Value]) -> Result<(String, [usize; 2]), String> {
    let mut texts = Vec::new();
    let [mut images, mut videos] = [0; 2];
    for part in parts {
        let named = part.get("type").and_then(Value::as_str);
        let named = named.ok_or_else(|| format!("{place} has a part without a `type`"))?;
        let fields = part.as_object().into_iter().flatten();
        let mut others = fields.filter(|(key, value)| {
            !matches!(key.as_str(), "type" | "text" | "index") && holds_anything(value)
        });
        match named {
            "text" => {
                if let Some((key, _)) = others.find(|(key, _)| says(key).is_some()) {
                    return Err(unsupported(&format!("a text part of {place}"), key));
                }
                let text = part.get("text").and_then(Value::as_str);
                let text = text.ok_or_else(|| format!("{place} has a text part without `text`"))?;
                texts.push(text);
            }
            "image" => {
                if let Some((key, _)) = others.next() {
                    return Err(other_image(&format!("an image part of {place}"), key));
                }
                images += 1;
                texts.push(IMAGE_PLACEHOLDER);
            }
            "video" => {
                if let Some((key, _)) = others.next() {
                    let place = format!("a video part of {place}");
                    return Err(match says(key) {
                        Some(_) => other_video(&place, key),
                        None => format!(
                            "{place} has the key `{}`, which is not read; remove it",
                            shown(key)
                        ),
                    });
                }
                videos += 1;
                texts.push(VIDEO_PLACEHOLDER);
            }
            "image_url" | "input_image" => {
                return Err(other_image(&format!("a part of {place}"), named));
            }
            _ => {
                return Err(format!(
                    "{place} has a part of the type `{}`, but only text, images and videos are supported; \
                     remove the record, or the part if the text does not need it",
                    shown(named)
                ));
            }
        }
    }
    Ok((texts.join("\n"), [images, videos]))
}

/// Returns a key or id for display, truncated and with control characters escaped.
pub fn shown(key: &str) -> String {
    let mut text: String = key
        .chars()
        .take(NAME_CHARS)
        .flat_map(char::escape_debug)
        .collect();
    if key.chars().nth(NAME_CHARS).is_some() {
        text.push('…');
    }
    text
}

/// The ignored keys, with the number of records that have each.
#[derive(Debug, Default)]
pub struct Unread {
    records: u64,
    keys: HashMap<String, u64>,
    /// True if there are more keys than are counted.
    has_more: bool,
}

impl Unread {
    /// Counts the ignored keys of a record.
    pub fn count(&mut self, record: &Value) {
        self.records += 1;
        let Some(record) = record.as_object() else {
            return;
        };
        for key in unread_of(record) {
            if let Some(count) = self.keys.get_mut(&key) {
                *count += 1;
            } else if self.keys.len() < NAMES_MAX {
                self.keys.insert(key, 1);
            } else {
                self.has_more = true;
            }
        }
    }

    /// Returns a note with the ignored keys and their counts; `None` if every key was read.
    pub fn in_words(&self) -> Option<String> {
        let mut keys: Vec<(&str, u64)> = self
            .keys
            .iter()
            .map(|(key, count)| (key.as_str(), *count))
            .collect();
        keys.sort_by_key(|&(key, count)| (std::cmp::Reverse(count), key));
        let left = keys.len().saturating_sub(SHOWN_MAX);
        keys.truncate(SHOWN_MAX);
        let (&(_, first), records) = (keys.first()?, self.records);
        let names: Vec<String> = keys.iter().map(|(key, _)| format!("`{key}`")).collect();
        let names = names.join(", ");
        let others = match left {
            0 => String::new(),
            left if self.has_more => format!(" and more than {left} other keys"),
            1 => " and 1 other key".to_owned(),
            left => format!(" and {left} other keys"),
        };
        let counts = if keys.iter().all(|&(_, count)| count == first) {
            first.to_string()
        } else {
            let counts: Vec<String> = keys.iter().map(|(_, count)| count.to_string()).collect();
            counts.join(", ")
        };
        let (are, them) = if keys.len() == 1 {
            ("is", "it")
        } else {
            ("are", "them")
        };
        Some(format!(
            "{names}{others} {are} ignored; {counts} of {records} records have {them}"
        ))
    }
}

/// True if a record has an `answer` and its conversation ends with a different one.
fn has_second_answer(record: &Map<String, Value>) -> bool {
    let Some(answer) = record.get("answer").and_then(Value::as_str) else {
        return false;
    };
    let last = record.get("conversations").and_then(Value::as_array);
    let Some(last) = last.and_then(|entries| entries.last()) else {
        return false;
    };
    let text = |name: &str| last.get(name).and_then(Value::as_str);
    let is_answer = matches!(text("from").or(text("role")), Some("gpt" | "assistant"));
    let said = text("value").or(text("content"));
    is_answer && !answer.is_empty() && said.is_some_and(|said| said.trim() != answer.trim())
}

/// Returns the keys of a record that are neither read nor rejected, each once; nested keys are
/// prefixed with their field, as in `conversations.weight`.
fn unread_of(record: &Map<String, Value>) -> BTreeSet<String> {
    let is_there = |key: &str| record.get(key).is_some_and(|value| !value.is_null());
    // A conversation contains the question and its history.
    let mut instead: Vec<&str> = if is_there("conversations") {
        vec!["prompt", "question", "turns"]
    } else if is_there("prompt") {
        vec!["question"]
    } else {
        Vec::new()
    };
    if is_there("preference") {
        instead.extend(["chosen", "rejected"]);
    }
    let keys = record.iter().filter(|(key, value)| {
        if READ.contains(&key.as_str()) && !instead.contains(&key.as_str()) {
            return false;
        }
        match says(key) {
            None | Some(Says::File) => !value.is_null(),
            // Another name of an image or video that is read; otherwise the record is rejected.
            Some(Says::Image | Says::PlaceOfImage | Says::Video) => holds_anything(value),
            // Empty; otherwise the record is rejected.
            Some(Says::Other) => false,
        }
    });
    let mut found: BTreeSet<String> = keys.map(|(key, _)| shown(key)).collect();
    if has_second_answer(record) {
        found.insert("conversations: the final answer".to_owned());
    }
    for (field, read) in READ_WITHIN {
        for (_, object) in within(record, field) {
            let keys = object
                .iter()
                .filter(|(key, value)| !read.contains(&key.as_str()) && !value.is_null());
            found.extend(keys.map(|(key, _)| format!("{field}.{}", shown(key))));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(record: &Value) -> Option<String> {
        refused_beside(record, &[], 0)
    }

    fn refused_beside(record: &Value, paths: &[&str], embedded: usize) -> Option<String> {
        let paths: Vec<String> = paths.iter().map(|&path| path.to_owned()).collect();
        let read = ReadMedia {
            images: &paths,
            videos: &[],
            embedded,
        };
        refuse_media(record.as_object().unwrap(), read).err()
    }

    #[test]
    fn a_record_with_media_that_are_not_read_is_refused_with_the_key() {
        for key in [
            "video_path",
            "video2",
            "audio",
            "audios",
            "sound",
            "image_url",
        ] {
            let reason = refused(&json!({"prompt": "Why?", key: "a.mp4"})).unwrap();
            assert!(reason.contains(&format!("`{key}`")), "{reason}");
            for nothing in [
                json!(null),
                json!(""),
                json!([]),
                json!([null]),
                json!(false),
                json!({"bytes": null, "path": null}),
            ] {
                assert_eq!(refused(&json!({"prompt": "Why?", key: nothing})), None);
            }
        }
        let entry = |entry: Value| refused(&json!({"conversations": [entry]}));
        assert_eq!(
            entry(json!({"from": "human", "value": "Why?", "video": "a.mp4"})).unwrap(),
            "entry 0 of `conversations` names a video in `video`, which is ignored; name its file in `video` or \
             `videos` of the record, or remove the key if the text does not need it"
        );
        assert!(entry(json!({"from": "human", "value": "Why?", "image": "a.png"})).is_some());
        let part = |part: Value| entry(json!({"role": "user", "content": [part]}));
        assert_eq!(
            part(json!({"type": "audio", "audio": "a.wav"})).unwrap(),
            "entry 0 of `conversations` has a part of the type `audio`, but only text, images and videos are \
             supported; remove the record, or the part if the text does not need it"
        );
        let named = part(json!({"type": "video", "video": "a.mp4"})).unwrap();
        assert!(named.starts_with("a video part of entry 0"), "{named}");
        assert_eq!(part(json!({"type": "video"})), None);
        let url = json!({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}});
        assert!(part(url).unwrap().contains("`image_url`"));
        assert!(part(json!({"type": "image", "image": "a.png"})).is_some());
        assert!(part(json!({"text": "Why?"})).is_some());
        assert_eq!(
            part(json!({"type": "image", "index": 0, "text": null})),
            None
        );
        assert_eq!(part(json!({"type": "text", "text": "Why?"})), None);
        let messages = json!([{"role": "user", "content": [{"type": "audio"}]}]);
        assert!(refused(&json!({"prompt": "Why?", "messages": messages})).is_some());
    }

    #[test]
    fn a_second_name_of_an_image_that_is_read_is_only_counted() {
        let record =
            json!({"prompt": "Why?", "image": "a.png", "image_url": "https://example.com/a.png"});
        assert_eq!(refused_beside(&record, &["a.png"], 0), None);
        let mut unread = Unread::default();
        unread.count(&record);
        assert_eq!(
            unread.in_words().unwrap(),
            "`image_url` is ignored; 1 of 1 records have it"
        );
    }

    #[test]
    fn an_image_beside_those_that_are_read_is_refused() {
        let read = ["coco/000000033471.jpg"];
        let with = |key: &str, value: Value| {
            let record = json!({"image": read[0], key: value});
            refused_beside(&record, &read, 0)
        };
        for (key, value) in [
            ("image_2", json!("b.png")),
            ("image_2", json!("vg/000000033471.jpg")),
            ("photo", json!("b")),
            ("image_url", json!("https://example.com/b.png")),
            ("image_path", json!([read[0], "b.png"])),
            ("mask", json!("b.png")),
            ("raw", json!({"bytes": "aGk=", "path": null})),
            ("image_base64", json!("aGk=")),
            ("source", json!("talk.mp4")),
            ("attachments", json!([{"path": "a.pdf"}])),
        ] {
            let reason = with(key, value).unwrap_or_else(|| panic!("{key}"));
            assert!(reason.contains(&format!("`{key}`")), "{reason}");
        }
        for (key, value) in [
            ("image_2", json!(read[0])),
            ("image_1", json!("./coco/000000033471.jpg")),
            ("photo", json!([read[0]])),
            ("image_path", json!("/data/000000033471.jpg")),
            ("image_url", json!("http://example.com/000000033471.jpg")),
            ("file_name", json!("000000033471.jpg")),
            ("source", json!("coco")),
            ("question_id", json!("b.jpg")),
            ("clip", json!(0.31)),
            ("image_width", json!(640)),
        ] {
            assert_eq!(with(key, value), None, "{key}");
        }
        assert_eq!(
            with("image_2", json!("b.png")).unwrap(),
            "the record names an image in `image_2`, which is ignored; name its file in `image` or \
             `images` of the record, or remove the key if the text does not need it"
        );
    }

    /// A file with embedded images may have any other name for them.
    #[test]
    fn a_name_of_an_image_that_the_file_holds_is_no_loss() {
        let beside = |key: &str, value: Value| refused_beside(&json!({key: value}), &[], 1);
        assert_eq!(beside("file_name", json!("b.png")), None);
        assert_eq!(beside("image_path", json!("b.png")), None);
        assert!(beside("image_path", json!(["b.png", "c.png"])).is_some());
        assert!(beside("image_2", json!("b.png")).is_some());
        assert!(beside("raw", json!({"bytes": "aGk="})).is_some());
        assert!(beside("source", json!("talk.mp4")).is_some());
    }

    #[test]
    fn a_text_that_is_a_path_of_media_is_refused_under_any_key_but_an_id() {
        for key in [
            "file_name",
            "main_image",
            "screenshot",
            "picture",
            "page",
            "document",
        ] {
            assert!(
                refused(&json!({"prompt": "Why?", key: "a.png"})).is_some(),
                "{key}"
            );
        }
        for key in ["id", "question_id", "imageId"] {
            assert_eq!(
                refused(&json!({"prompt": "Why?", key: "a.png"})),
                None,
                "{key}"
            );
        }
        assert_eq!(
            refused(&json!({"prompt": "a.png", "note": "see a.png"})),
            None
        );
    }

    #[test]
    fn keys_that_are_not_read_are_counted_and_named_once() {
        let mut unread = Unread::default();
        unread.count(&json!({"id": 1, "prompt": "Why?", "audio": null, "category": null}));
        assert_eq!(unread.in_words(), None);
        let entries = json!([{"from": "human", "value": "Why?", "weight": 1}, {"from": "gpt", "value": "So.", "weight": 0}]);
        unread.count(&json!({"conversations": entries, "prompt": "Other?", "gpt_answer": "", "category": "a"}));
        unread.count(&json!({"prompt": "Why?", "question": "How?", "gpt_answer": "b"}));
        assert_eq!(
            unread.in_words().unwrap(),
            "`gpt_answer`, `category`, `conversations.weight`, `prompt`, `question` are ignored; \
             2, 1, 1, 1, 1 of 3 records have them"
        );
        let mut hostile = Unread::default();
        for number in 0..100_000 {
            let mut record = Map::new();
            record.insert(format!("\u{1b}[2J{number}{}", "x".repeat(500)), json!(1));
            hostile.count(&Value::Object(record));
        }
        assert_eq!(hostile.keys.len(), NAMES_MAX);
        let words = hostile.in_words().unwrap();
        assert!(words.len() < 1000 && !words.contains('\u{1b}'), "{words}");
        assert!(
            words.contains("and more than 248 other keys are ignored"),
            "{words}"
        );
    }
}
