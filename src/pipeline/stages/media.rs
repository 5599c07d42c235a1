//! Detection of media in the keys and values of records, and of media placeholders in texts.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

/// The kind of media that a key names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// An image: `photo`, `image_2`, `image_base64`.
    Image,
    /// The location of an image: `image_path`, `image_url`.
    PlaceOfImage,
    /// A video or its location: `video_path`, `video_url`.
    Video,
    /// Audio, or frames of a video.
    Other,
    /// A file of some kind, unless the value is a number: `clip`, `document`, `attachments`.
    File,
}

/// Words for media; a word comes before its prefixes.
const MEDIA: [(&str, Says); 33] = [
    ("waveform", Says::Other),
    ("speech", Says::Other),
    ("videos", Says::Video),
    ("video", Says::Video),
    ("audios", Says::Other),
    ("audio", Says::Other),
    ("sounds", Says::Other),
    ("sound", Says::Other),
    ("frames", Says::Other),
    ("images", Says::Image),
    ("image", Says::Image),
    ("imgs", Says::Image),
    ("img", Says::Image),
    ("pictures", Says::Image),
    ("picture", Says::Image),
    ("photos", Says::Image),
    ("photo", Says::Image),
    ("screenshots", Says::Image),
    ("screenshot", Says::Image),
    ("pixelvalues", Says::Image),
    ("media", Says::File),
    ("attachments", Says::File),
    ("attachment", Says::File),
    ("documents", Says::File),
    ("document", Says::File),
    ("clips", Says::File),
    ("clip", Says::File),
    ("pdfs", Says::File),
    ("pdf", Says::File),
    ("wavs", Says::File),
    ("wav", Says::File),
    ("mp3", Says::File),
    ("mp4", Says::File),
];

/// Qualifiers before such a word that select one of several media.
const BEFORE: [&str; 26] = [
    "input",
    "main",
    "first",
    "second",
    "third",
    "fourth",
    "left",
    "right",
    "top",
    "bottom",
    "other",
    "another",
    "next",
    "previous",
    "extra",
    "additional",
    "reference",
    "ref",
    "target",
    "query",
    "support",
    "before",
    "after",
    "start",
    "end",
    "new",
];

/// Suffixes for the location of a medium. A key with a suffix of this list or of [`CONTENTS`] still
/// names the medium (`video_path`); other keys describe it (`video_id`, `image_width`).
const PLACES: [&str; 13] = [
    "frames",
    "array",
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
    "src",
];

/// Suffixes for the content of a medium.
const CONTENTS: [&str; 4] = ["bytes", "base64", "b64", "data"];

/// The file name extensions of images, of videos, and of other media.
const IMAGE_ENDINGS: [&str; 24] = [
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif",
    "avif", "svg", "jp2", "jxl", "ppm", "pgm", "pnm", "tga", "ico", "dds", "exr", "dcm",
];
const VIDEO_ENDINGS: [&str; 15] = [
    "mp4", "mov", "avi", "mkv", "webm", "m4v", "mpg", "mpeg", "wmv", "flv", "ogv", "3gp", "m2ts",
    "mts", "vob",
];
const OTHER_ENDINGS: [&str; 29] = [
    "wav", "mp3", "flac", "ogg", "oga", "opus", "aac", "m4a", "wma", "aiff", "aif", "amr", "mid",
    "midi", "caf", "pdf", "djvu", "doc", "docx", "ppt", "pptx", "xls", "xlsx", "odt", "epub",
    "npy", "ply", "glb", "nii",
];

/// The magic bytes of media files.
const PREFIXES: [&[u8]; 10] = [
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
    b"%PDF-",
    b"fLaC",
    b"OggS",
    b"\x1aE\xdf\xa3",
];

/// The maximum length of a text that may be a path, in bytes.
const PATH_CHARS: usize = 1024;

/// The minimum length of a text that may be a file in base64, in bytes; hashes and ids are shorter.
const BASE64_CHARS: usize = 64;

/// Returns the kind of media that a key names: `video`, `Video_URL`, `image_2`, `input_audio` name
/// media, `video_id` does not.
pub fn says(key: &str) -> Option<Says> {
    let word = word(key);
    let before = BEFORE.iter().find_map(|before| word.strip_prefix(before));
    let word = before.unwrap_or(&word);
    let (rest, medium) = MEDIA
        .iter()
        .find_map(|(name, medium)| Some((word.strip_prefix(name)?, *medium)))?;
    let without_number = rest.trim_matches(|c: char| c.is_ascii_digit());
    if PLACES.contains(&rest) && medium == Says::Image {
        return Some(Says::PlaceOfImage);
    }
    let carries = without_number.is_empty() || is_carrier(rest) || is_carrier(without_number);
    carries.then_some(medium)
}

/// Returns the kind of media that the last word of a key names, if the value is a path or URL or
/// contains a file: a path under `cat_photo` or `questionAudio` is media, "chart" under
/// `type_of_image` is not.
pub fn says_at_its_end(key: &str, value: &Value) -> Option<Says> {
    let mut words: Vec<String> = vec![String::new()];
    let mut was_small = false;
    for c in key.chars() {
        if !c.is_alphanumeric() || (was_small && c.is_uppercase()) {
            words.push(String::new());
        }
        was_small = c.is_lowercase();
        let word = words.last_mut().expect("there is one");
        word.extend(c.to_lowercase().filter(|c| c.is_alphabetic()));
    }
    words.retain(|word| !word.is_empty());
    let last = words.last().filter(|_| words.len() > 1)?;
    let (_, medium) = MEDIA.iter().find(|(name, _)| name == last)?;
    (*medium != Says::File && names_a_place(value)).then_some(*medium)
}

/// True for single words with a slash, and for values in which [`found`] finds media.
fn names_a_place(value: &Value) -> bool {
    match value {
        Value::String(text) => {
            let text = text.trim();
            let is_place = text.contains(['/', '\\']) && !text.contains(char::is_whitespace);
            is_place || found_in_text(text, false).is_some()
        }
        Value::Array(items) => items.iter().any(names_a_place),
        Value::Object(fields) => {
            fields.values().any(names_a_place) || !found(value, false).is_empty()
        }
        _ => false,
    }
}

/// Returns a key in lower case without punctuation.
fn word(key: &str) -> String {
    let letters = key.chars().filter(|c| c.is_alphanumeric());
    letters.flat_map(char::to_lowercase).collect()
}

fn is_carrier(word: &str) -> bool {
    PLACES.contains(&word) || CONTENTS.contains(&word)
}

/// False for null, false, blank strings, and lists and objects that contain nothing else.
pub fn holds_anything(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(_) => true,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => items.iter().any(holds_anything),
        Value::Object(fields) => fields.values().any(holds_anything),
    }
}

/// Keys whose value is the record's own id.
pub const NAMES: [&str; 5] = ["id", "question_id", "sample_id", "uid", "uuid"];

/// True for keys whose value is an id and not a file to read, even if it looks like
/// `000000033471.jpg`.
pub fn is_id(key: &str) -> bool {
    let small = key.to_ascii_lowercase();
    NAMES.contains(&&*small) || small.ends_with("_id") || key.ends_with("Id")
}

/// A medium found in a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found<'a> {
    /// A path or URL of a medium.
    Named(&'a str),
    /// A medium embedded in the value.
    Held,
}

impl Found<'_> {
    /// True for a name with the extension of an image file.
    pub fn is_image_file(self) -> bool {
        self.ends_in(&IMAGE_ENDINGS)
    }

    /// True for a name with the extension of a video file.
    pub fn is_video_file(self) -> bool {
        self.ends_in(&VIDEO_ENDINGS)
    }

    fn ends_in(self, endings: &[&str]) -> bool {
        match self {
            Self::Named(name) => ending(name).is_some_and(|end| endings.contains(&&*end)),
            Self::Held => false,
        }
    }
}

/// Returns the media in a value: a string, a list, or an object with `path`, `url`, `bytes` or
/// similar keys. A string is media by its extension or its first bytes, and any string is if
/// `whatever_it_reads`, i.e. if the key names media.
pub fn found(value: &Value, whatever_it_reads: bool) -> Vec<Found<'_>> {
    match value {
        Value::String(text) => found_in_text(text, whatever_it_reads).into_iter().collect(),
        Value::Array(items) => {
            let found = |item| found(item, whatever_it_reads);
            items.iter().flat_map(found).collect()
        }
        Value::Object(fields) => {
            let mut all = Vec::new();
            for (key, value) in fields {
                let word = word(key);
                if matches!(word.as_str(), "bytes" | "base64" | "b64") {
                    all.extend(holds_anything(value).then_some(Found::Held));
                } else if is_carrier(&word) {
                    all.extend(found(value, whatever_it_reads));
                } else if says(key).or(says_at_its_end(key, value)).is_some() {
                    let is_medium = matches!(value, Value::String(_) | Value::Array(_));
                    all.extend(found(value, whatever_it_reads || is_medium));
                } else if word != "text" && !is_id(key) {
                    all.extend(found(value, false));
                }
            }
            all
        }
        _ => Vec::new(),
    }
}

fn found_in_text(text: &str, whatever_it_reads: bool) -> Option<Found<'_>> {
    let text = text.trim();
    if is_data_url(text) || is_base64(text) {
        Some(Found::Held)
    } else if is_path(text) || (whatever_it_reads && !text.is_empty()) {
        Some(Found::Named(text))
    } else {
        None
    }
}

fn is_data_url(text: &str) -> bool {
    const KINDS: [&str; 4] = [
        "data:image/",
        "data:video/",
        "data:audio/",
        "data:application/pdf",
    ];
    let begins = |kind: &&str| {
        let start = text.get(..kind.len());
        start.is_some_and(|start| start.eq_ignore_ascii_case(kind))
    };
    KINDS.iter().any(|kind| begins(&kind))
}

fn is_base64(text: &str) -> bool {
    if text.len() < BASE64_CHARS {
        return false;
    }
    let start = text.get(..16).map(|start| BASE64_STANDARD.decode(start));
    matches!(start, Some(Ok(bytes)) if
        PREFIXES.iter().any(|prefix| bytes.starts_with(prefix))
        || bytes[4..].starts_with(b"ftyp"))
}

/// True for a path or URL with the extension of a media file. A text of several words counts only
/// if the first word contains a slash, so that "see a.png" does not.
fn is_path(text: &str) -> bool {
    let is_one_word = !text.contains(char::is_whitespace)
        || text
            .split_once(['/', '\\'])
            .is_some_and(|(first, _)| !first.contains(char::is_whitespace));
    text.len() <= PATH_CHARS && !text.contains('\n') && is_one_word && ending(text).is_some()
}

/// Returns the extension of a media file, in lower case.
fn ending(path: &str) -> Option<String> {
    let (stem, end) = file_name(path).rsplit_once('.')?;
    let end = end.to_ascii_lowercase();
    let mut endings = [&IMAGE_ENDINGS[..], &VIDEO_ENDINGS, &OTHER_ENDINGS].into_iter();
    let is_media = endings.any(|endings| endings.contains(&&*end));
    (is_media && !stem.is_empty()).then_some(end)
}

/// Returns the file name of a path or URL.
pub fn file_name(path: &str) -> &str {
    let path = match path.contains("://") {
        true => path.split(['?', '#']).next().unwrap_or(path),
        false => path,
    };
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

/// The images and videos of a record that are read.
#[derive(Debug, Clone, Copy)]
pub struct ReadMedia<'a> {
    /// The paths of images.
    pub images: &'a [String],
    /// The paths of videos.
    pub videos: &'a [String],
    /// The number of embedded images.
    pub embedded: usize,
}

impl ReadMedia<'_> {
    /// True if no image is read.
    pub fn has_no_image(self) -> bool {
        self.images.is_empty() && self.embedded == 0
    }

    fn paths(&self) -> impl Iterator<Item = &String> {
        self.images.iter().chain(self.videos)
    }

    /// True if an image or video with this path is read.
    pub fn has_path(self, path: &str) -> bool {
        let plain = |path: &str| path.strip_prefix("./").unwrap_or(path).to_owned();
        self.paths().any(|read| plain(read) == plain(path))
    }

    /// True if an image or video with the file name of this path or URL is read.
    pub fn has_file_name(self, path: &str) -> bool {
        let mut read = self.paths();
        read.any(|read| file_name(read) == file_name(path))
    }
}

/// Returns the media placeholder of a text, in the places where LLaVA writes it: at the start, at
/// the end, or on a line of its own. Elsewhere it is part of the text, as in "What does the tag
/// <video> do?".
pub fn placeholder(text: &str) -> Option<&'static str> {
    let text = text.trim();
    ["<image>", "<video>", "<audio>"].into_iter().find(|word| {
        text.starts_with(word)
            || text.ends_with(word)
            || text.lines().any(|line| line.trim() == *word)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_name_media_or_say_something_about_them() {
        for (said, keys) in [
            (Says::Other, "audio audios sound input_audio frames"),
            (Says::Video, "video videos video_path videoUrl video2"),
            (
                Says::PlaceOfImage,
                "image_url image_urls imageUrl image_path image_filename main_image_path",
            ),
            (
                Says::Image,
                "img image_1 image_b64 image_base64 pixel_values image_2_url main_image screenshot photo",
            ),
            (
                Says::File,
                "media attachments attachment clip wav pdf document document_path",
            ),
        ] {
            for key in keys.split(' ') {
                assert_eq!(says(key), Some(said), "{key}");
            }
        }
        for key in "video_id image_id image_width imagery soundness category url framework \
                    document_type clip_score has_image social_media"
            .split(' ')
            .chain([""])
        {
            assert_eq!(says(key), None, "{key}");
        }
    }

    #[test]
    fn values_are_media_by_their_ending_or_their_beginning() {
        let png = BASE64_STANDARD.encode([&b"\x89PNG\r\n\x1a\n"[..], &[0; 60]].concat());
        for value in [
            json!("a.png"),
            json!("https://example.com/My%20cat.JPG?size=3#top"),
            json!(["x", "clips/My cat.mp4"]),
            json!("C:\\scans\\a.pdf"),
            json!("data:image/png;base64,iVBOR"),
            json!({"path": "a.wav", "bytes": null}),
            json!({"path": null, "bytes": "aGk="}),
            json!({"image_url": {"url": "https://example.com/a.png"}}),
            json!(png),
        ] {
            assert_eq!(found(&value, false).len(), 1, "{value}");
        }
        for value in [
            json!("It reads a.png"),
            json!("It is on https://example.com/a.png"),
            json!("Either\n/a.png"),
            json!(".png"),
            json!("png"),
            json!("a.txt"),
            json!("iVBORw0KGgoAAAANSUhEUgAA"),
            json!({"text": "a.png"}),
            json!(7),
        ] {
            assert_eq!(found(&value, false), [], "{value}");
        }
    }

    #[test]
    fn a_placeholder_stands_at_an_end_or_alone_on_its_line() {
        for text in [
            "<video>\nWhat happens?",
            "<video> What happens?",
            "What happens? <audio>",
            "Look.\n <video> \nWhat happens?",
        ] {
            assert!(placeholder(text).is_some(), "{text}");
        }
        assert_eq!(placeholder("What does the <video> tag do in HTML?"), None);
    }
}
