//! The keys of a record that are not read: one that names media refuses its record, the others are
//! counted and named once.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Map, Value};

/// The keys that are read of a record.
const READ: [&str; 15] = [
    "id",
    "image",
    "images",
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
];

/// The keys that are read of an entry of these lists, or of these objects.
const READ_WITHIN: [(&str, &[&str]); 4] = [
    ("conversations", &["from", "value", "role", "content"]),
    ("turns", &["role", "text"]),
    ("output_1", &["from", "value"]),
    ("output_2", &["from", "value"]),
];

/// A chat that stands beside what is read; looked through for media only.
const CHAT: &str = "messages";

/// Keys that are counted by name; a file may make one up for every record.
const NAMES_MAX: usize = 256;

/// Keys that are named in the end.
const SHOWN_MAX: usize = 8;

/// Characters of a key that are shown.
const NAME_CHARS: usize = 40;

/// True for the keys of a record whose values are needed; of the others it is enough to know whether
/// they are there, and whether they hold anything.
pub fn is_needed(key: &str) -> bool {
    READ.contains(&key) || key == CHAT
}

/// Media that a key may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Medium {
    Image,
    /// Video or audio.
    Other,
}

/// The words for media, the longer one first where one begins like another.
const MEDIA: [(&str, Medium); 16] = [
    ("videos", Medium::Other),
    ("video", Medium::Other),
    ("audios", Medium::Other),
    ("audio", Medium::Other),
    ("sounds", Medium::Other),
    ("sound", Medium::Other),
    ("images", Medium::Image),
    ("image", Medium::Image),
    ("imgs", Medium::Image),
    ("img", Medium::Image),
    ("pictures", Medium::Image),
    ("picture", Medium::Image),
    ("photos", Medium::Image),
    ("photo", Medium::Image),
    ("frames", Medium::Other),
    ("pixelvalues", Medium::Image),
];

/// What may follow such a word in a key that still names the medium: `video_path` does, `video_id` and
/// `image_width` say something about it.
const CARRIERS: [&str; 15] = [
    "",
    "path",
    "paths",
    "url",
    "urls",
    "uri",
    "uris",
    "file",
    "files",
    "filename",
    "filenames",
    "bytes",
    "base64",
    "b64",
    "data",
];

/// The medium that a key names: `video`, `Video_URL`, `image_2`, `input_audio`; `None` for `video_id`.
fn medium(key: &str) -> Option<Medium> {
    let word: String = key
        .chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect();
    let word = word.strip_prefix("input").unwrap_or(&word);
    let (rest, medium) = MEDIA
        .iter()
        .find_map(|(name, medium)| Some((word.strip_prefix(name)?, *medium)))?;
    let without_number = rest.trim_matches(|c: char| c.is_ascii_digit());
    let carries = CARRIERS.contains(&rest) || CARRIERS.contains(&without_number);
    carries.then_some(medium)
}

/// False for null, false, empty texts, and lists and objects of nothing else.
fn holds_anything(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(_) => true,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => items.iter().any(holds_anything),
        Value::Object(fields) => fields.values().any(holds_anything),
    }
}

/// The objects within a field of a record, each with its place in words: entries of a list, or the
/// object itself.
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

/// Refuses a record that names media which are not read. `has_images`: it has images that are, and
/// another name for one of them, as in `image` and `image_url`, is no loss.
pub fn refuse_media(record: &Map<String, Value>, has_images: bool) -> Result<(), String> {
    for (key, value) in record {
        if READ.contains(&key.as_str()) || !holds_anything(value) {
            continue;
        }
        match medium(key) {
            Some(Medium::Image) if !has_images => return Err(other_image("it", key)),
            Some(Medium::Other) => return Err(no_image("it", key)),
            _ => {}
        }
    }
    let fields = READ_WITHIN.iter().map(|(field, _)| *field).chain([CHAT]);
    for (place, object) in fields.flat_map(|field| within(record, field)) {
        for (key, _) in object.iter().filter(|(_, value)| holds_anything(value)) {
            match medium(key) {
                Some(Medium::Image) => return Err(other_image(&place, key)),
                Some(Medium::Other) => return Err(no_image(&place, key)),
                None => {}
            }
        }
        if let Some(Value::Array(parts)) = object.get("content") {
            content(&place, parts)?;
        }
    }
    Ok(())
}

fn no_image(place: &str, key: &str) -> String {
    format!(
        "{place} has a key `{}`, and of media only images are read; remove the record, or the key where \
         the text does not need it",
        shown(key)
    )
}

fn other_image(place: &str, key: &str) -> String {
    format!(
        "{place} names an image in `{}`, which is not read; name its file in `image` or `images` of the \
         record",
        shown(key)
    )
}

/// The text of a message that is written in parts, and how many of them stand for an image.
pub fn content(place: &str, parts: &[Value]) -> Result<(String, usize), String> {
    let mut texts = Vec::new();
    let mut images = 0;
    for part in parts {
        let named = part.get("type").and_then(Value::as_str);
        let named = named.ok_or_else(|| format!("{place} has a part without a `type`"))?;
        let fields = part.as_object().into_iter().flatten();
        let mut others = fields.filter(|(key, value)| {
            !matches!(key.as_str(), "type" | "text" | "index") && holds_anything(value)
        });
        match named {
            "text" => {
                if let Some((key, _)) = others.find(|(key, _)| medium(key).is_some()) {
                    return Err(no_image(&format!("a text part of {place}"), key));
                }
                let text = part.get("text").and_then(Value::as_str);
                let text = text.ok_or_else(|| format!("{place} has a text part without a text"))?;
                texts.push(text);
            }
            "image" => {
                if let Some((key, _)) = others.next() {
                    return Err(other_image(&format!("an image part of {place}"), key));
                }
                images += 1;
            }
            "image_url" | "input_image" => {
                return Err(other_image(&format!("a part of {place}"), named));
            }
            _ => {
                return Err(format!(
                    "{place} has a part of the type `{}`, and only text and images are read; remove the \
                     record, or the part where the text does not need it",
                    shown(named)
                ));
            }
        }
    }
    Ok((texts.join("\n"), images))
}

/// A key as a message shows it: it may be long, or hold control characters.
fn shown(key: &str) -> String {
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

/// The keys that are not read, with the number of records that have each.
#[derive(Debug, Default)]
pub struct Unread {
    records: u64,
    keys: HashMap<String, u64>,
    /// True when there were more keys than are counted.
    has_more: bool,
}

impl Unread {
    /// Counts the keys of a record.
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

    /// The keys and how many records had them, in words; `None` when all was read.
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
            "{names}{others} {are} not read; {counts} of {records} records have {them}"
        ))
    }
}

/// The keys of a record that are neither read nor refused, each once; those within it behind the field
/// in which they stand, as in `conversations.weight`.
fn unread_of(record: &Map<String, Value>) -> BTreeSet<String> {
    let is_there = |key: &str| record.get(key).is_some_and(|value| !value.is_null());
    // A conversation has the question and what was said before it.
    let instead: &[&str] = if is_there("conversations") {
        &["prompt", "question", "turns"]
    } else if is_there("prompt") {
        &["question"]
    } else {
        &[]
    };
    let keys = record.iter().filter(|(key, value)| {
        if READ.contains(&key.as_str()) && !instead.contains(&key.as_str()) {
            return false;
        }
        match medium(key) {
            None => !value.is_null(),
            // Another name of an image that is read, or else the record is refused.
            Some(Medium::Image) => holds_anything(value),
            // Nothing, or the record is refused.
            Some(Medium::Other) => false,
        }
    });
    let mut found: BTreeSet<String> = keys.map(|(key, _)| shown(key)).collect();
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
        refuse_media(record.as_object().unwrap(), false).err()
    }

    #[test]
    fn keys_name_media_or_say_something_about_them() {
        for key in [
            "video",
            "videos",
            "audio",
            "audios",
            "sound",
            "video_path",
            "videoUrl",
            "input_audio",
            "frames",
            "video2",
        ] {
            assert_eq!(medium(key), Some(Medium::Other), "{key}");
        }
        for key in [
            "image_url",
            "image_urls",
            "imageUrl",
            "img",
            "image_path",
            "image_filename",
            "image_1",
            "image_b64",
            "image_base64",
            "pixel_values",
        ] {
            assert_eq!(medium(key), Some(Medium::Image), "{key}");
        }
        for key in [
            "video_id",
            "image_id",
            "image_width",
            "imagery",
            "soundness",
            "category",
            "url",
            "framework",
            "",
        ] {
            assert_eq!(medium(key), None, "{key}");
        }
    }

    #[test]
    fn a_record_with_media_that_are_not_read_is_refused_with_the_key() {
        for key in ["video", "videos", "audio", "audios", "sound", "image_url"] {
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
            "entry 0 of `conversations` has a key `video`, and of media only images are read; remove the \
             record, or the key where the text does not need it"
        );
        assert!(entry(json!({"from": "human", "value": "Why?", "image": "a.png"})).is_some());
        let part = |part: Value| entry(json!({"role": "user", "content": [part]}));
        assert_eq!(
            part(json!({"type": "video", "video": "a.mp4"})).unwrap(),
            "entry 0 of `conversations` has a part of the type `video`, and only text and images are \
             read; remove the record, or the part where the text does not need it"
        );
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
        assert_eq!(refuse_media(record.as_object().unwrap(), true), Ok(()));
        let mut unread = Unread::default();
        unread.count(&record);
        assert_eq!(
            unread.in_words().unwrap(),
            "`image_url` is not read; 1 of 1 records have it"
        );
    }

    #[test]
    fn keys_that_are_not_read_are_counted_and_named_once() {
        let mut unread = Unread::default();
        unread.count(&json!({"id": 1, "prompt": "Why?", "video": null, "category": null}));
        assert_eq!(unread.in_words(), None);
        let entries = json!([{"from": "human", "value": "Why?", "weight": 1}, {"from": "gpt", "value": "So.", "weight": 0}]);
        unread.count(&json!({"conversations": entries, "prompt": "Other?", "gpt_answer": "", "category": "a"}));
        unread.count(&json!({"prompt": "Why?", "question": "How?", "gpt_answer": "b"}));
        assert_eq!(
            unread.in_words().unwrap(),
            "`gpt_answer`, `category`, `conversations.weight`, `prompt`, `question` are not read; \
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
            words.contains("and more than 248 other keys are not read"),
            "{words}"
        );
    }
}
