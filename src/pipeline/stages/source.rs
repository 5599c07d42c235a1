//! Loading of a source's records and images, shared by the loading stages.
//!
//! A source is a JSON list, JSON Lines, or Parquet with a column of images; a record is either the
//! document's `{id, image, prompt, …}` or a LLaVA conversation. A file that cannot be read at all
//! fails the stage; a record that cannot be used is rejected.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::allowed_folders::{AllowedFolders, Place};
use super::formats;
use super::records::{Fields, named_paths, read_fields};
use super::source_check::{self, SourceProblem};
use super::unread::{Unread, own_name};
use super::work::{Failure, LoadStage, Loaded, Record, StageKind, shown};
use super::{Input, Stage, StageError, TableName, join};
use ovchat_data::store::{Key, digest};
use ovchat_data::tables::{Image, ImageFile, Prompt, RejectClass, Row, Turn};
use ovchat_io::files;
use ovchat_models::RowFault;
use ovchat_models::preprocess::{Probe, decode, probe};

/// The maximum size of an image file, in bytes.
pub const IMAGE_MAX: u64 = 1 << 30;

/// The settings of a loading stage: a file of the user, and how it is read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSettings {
    /// The source file: a JSON list, JSON Lines, or Parquet (`.parquet`).
    pub from: PathBuf,
    /// The folder that relative image paths start from. Default: the folder of `from`.
    #[serde(default)]
    pub images: Option<PathBuf>,
    /// Reads images from any path that a record names. By default, a record is rejected if its
    /// image, with symbolic links resolved, lies outside `images` and the folder of `from`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub images_anywhere: bool,
    /// A JSON file that maps image paths to lists of captions, `{"a.png": ["…"]}`, for judges that
    /// use captions. Default: none.
    #[serde(default)]
    pub captions: Option<PathBuf>,
    /// The number of records to load, from the start of the file. Default: all.
    #[serde(default)]
    pub limit: Option<NonZeroU32>,
    /// The maximum size of an image, in megapixels. A record with a larger image is rejected
    /// without decoding it.
    #[serde(default = "SourceSettings::megapixels_max")]
    pub megapixels_max: NonZeroU32,
    /// The separator of several images before a text, in records without `<image>` placeholders:
    /// `newline`, or `space` as in lmms-eval. Default: `newline`.
    #[serde(default, skip_serializing_if = "Separator::is_default")]
    pub separator: Separator,
}

/// The white space between images before a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Separator {
    #[default]
    Newline,
    Space,
}

impl Separator {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl SourceSettings {
    fn megapixels_max() -> NonZeroU32 {
        const { NonZeroU32::new(100).unwrap() }
    }
}

/// A stage that loads rows of type `R` from a source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent, bound = "")]
pub struct Load<R> {
    settings: SourceSettings,
    #[serde(skip)]
    rows: PhantomData<R>,
}

/// A table kind that can be loaded from a source.
pub trait Loadable: Row {
    /// The name of the stage's settings in the JSON Schema.
    const SCHEMA: &'static str;
    /// The description of the stage in the JSON Schema.
    const DESCRIPTION: &'static str;

    /// Builds the row of a record; `prompt` holds the fields common to all kinds.
    fn from_record(
        prompt: Prompt,
        chosen: Option<String>,
        rejected: Option<String>,
    ) -> Result<Self, String>;

    /// Returns the key of the row's prompt without its occurrence number, to count occurrences on
    /// resume.
    fn base(&self) -> String;
}

impl<R: Loadable> JsonSchema for Load<R> {
    fn schema_name() -> Cow<'static, str> {
        R::SCHEMA.into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = SourceSettings::json_schema(generator);
        schema.insert("description".to_owned(), R::DESCRIPTION.into());
        schema
    }
}

impl<R: Loadable> Load<R> {
    /// Returns the source file.
    pub fn from(&self) -> &Path {
        &self.settings.from
    }

    /// Returns the problem found in the first records or at the end of the file, if any.
    pub fn source_problem(&self) -> Option<SourceProblem> {
        Loader::<R>::new(&self.settings).source_problem()
    }
}

impl<R: Loadable> Stage for Load<R> {
    fn inputs(&self) -> Vec<Input<'_>> {
        Vec::new()
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        let settings = &self.settings;
        let mut files = vec![("from", settings.from.as_path())];
        files.extend(settings.images.as_deref().map(|path| ("images", path)));
        files.extend(settings.captions.as_deref().map(|path| ("captions", path)));
        files
    }

    fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        let settings = &mut self.settings;
        join(folder, "from", &mut settings.from);
        for (field, path) in [
            ("images", &mut settings.images),
            ("captions", &mut settings.captions),
        ] {
            if let Some(path) = path {
                join(folder, field, path);
            }
        }
    }

    fn kind(&self) -> Option<&'static str> {
        Some(R::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(R::schema())
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Load(Box::new(Loader::<R>::new(&self.settings)))
    }
}

/// A record with its images, or the reason why it is rejected.
type Opened = Result<(Fields, Vec<Image>), Flaw>;

/// The reason why a record is rejected.
enum Flaw {
    /// Its image, as named by the record, lies outside the allowed folders.
    Outside {
        image: String,
        reason: String,
    },
    Other(String),
}

impl From<String> for Flaw {
    fn from(reason: String) -> Self {
        Self::Other(reason)
    }
}

/// Returns the key of a prompt without its occurrence number.
pub fn prompt_base(
    image_ids: &[String],
    system: Option<&str>,
    turns: &[Turn],
    question: &str,
) -> String {
    shown(Key::new("prompt"), image_ids, system, turns, question).finish()
}

/// Records whose images lie outside the allowed folders.
#[derive(Default)]
struct Outside {
    count: u64,
    /// The place of the first such record, and its image.
    first: Option<(String, String)>,
}

impl Outside {
    fn add(&mut self, place: &str, image: String) {
        self.count += 1;
        self.first.get_or_insert_with(|| (place.to_owned(), image));
    }

    /// Returns a note with their number, the first one and the fix; `None` if there are none.
    fn in_words(&self) -> Option<String> {
        let (place, image) = self.first.as_ref()?;
        let count = match self.count {
            1 => "1 record names an image".to_owned(),
            count => format!("{count} records name images"),
        };
        Some(format!(
            "{count} outside the allowed folders, first {image} ({place}); set `images_anywhere: true` to read \
             from any folder"
        ))
    }
}

/// The loader of rows of one kind from a source.
struct Loader<'a, R> {
    source: &'a SourceSettings,
    captions: Option<HashMap<String, Vec<String>>>,
    /// The number of occurrences of each prompt so far.
    seen: HashMap<String, u32>,
    unread: Unread,
    outside: Outside,
    checked: CheckedImages,
    kind: PhantomData<R>,
}

impl<'a, R: Loadable> Loader<'a, R> {
    fn new(source: &'a SourceSettings) -> Self {
        Self {
            source,
            captions: None,
            seen: HashMap::new(),
            unread: Unread::default(),
            outside: Outside::default(),
            checked: CheckedImages::default(),
            kind: PhantomData,
        }
    }

    /// Returns the problem found in the first records or at the end of the source, if any. Images
    /// are checked for existence only.
    fn source_problem(mut self) -> Option<SourceProblem> {
        let from = &self.source.from;
        let folder = self.folder().to_owned();
        source_check::source_problem(from, self.source.limit, |record| {
            let fields = read_fields(&record.fields, record.embedded.len())?;
            if record.embedded.is_empty()
                && folder.is_dir()
                && let Some(name) = fields.paths.iter().find(|name| !folder.join(name).exists())
            {
                return Err(format!("image not found: {name}"));
            }
            self.row(fields, &[]).map(|_| ())
        })
    }

    fn folder(&self) -> &Path {
        let images = self.source.images.as_deref();
        images
            .or(self.source.from.parent())
            .unwrap_or(Path::new("."))
    }

    /// Returns the folders that images may be read from; `None` for any folder.
    fn allowed(&self) -> Option<AllowedFolders> {
        let beside = self.source.from.parent().unwrap_or(Path::new("."));
        (!self.source.images_anywhere).then(|| AllowedFolders::new(&[self.folder(), beside]))
    }

    fn captions(&mut self) -> Result<&HashMap<String, Vec<String>>, Failure> {
        if self.captions.is_none() {
            let captions = match &self.source.captions {
                Some(path) => formats::captions(path)?,
                None => HashMap::new(),
            };
            self.captions = Some(captions);
        }
        Ok(self.captions.as_ref().expect("just read"))
    }

    fn count(&mut self, base: &str) -> u32 {
        let seen = self.seen.entry(base.to_owned()).or_insert(0);
        *seen += 1;
        *seen - 1
    }

    fn row(&mut self, mut fields: Fields, images: &[Image]) -> Result<R, String> {
        if self.source.separator == Separator::Space {
            fields.separate_by_spaces();
        }
        let image_ids: Vec<String> = images.iter().map(|image| image.image_id.clone()).collect();
        let base = prompt_base(
            &image_ids,
            fields.system.as_deref(),
            &fields.turns,
            &fields.question,
        );
        let prompt_id = match self.seen.get(&base) {
            None | Some(0) => base.clone(),
            Some(number) => Key::new("again")
                .with(&base)
                .with(number.to_le_bytes())
                .finish(),
        };
        let mut key = Key::new("prompt row")
            .with(&prompt_id)
            .with(fields.id.as_deref().unwrap_or_default())
            .with(fields.paths.first().map(String::as_str).unwrap_or_default());
        key = key.with(fields.answer.as_deref().unwrap_or_default());
        for caption in fields.captions.iter().flatten() {
            key = key.with(caption);
        }
        let prompt = Prompt {
            row_key: key.finish(),
            prompt_id,
            id: fields.id,
            image: fields.paths.into_iter().next(),
            image_ids,
            system: fields.system,
            turns: fields.turns,
            question: fields.question,
            captions: fields.captions,
            answer: fields.answer,
        };
        let row = R::from_record(prompt, fields.chosen, fields.rejected)?;
        self.count(&base);
        Ok(row)
    }
}

impl<R: Loadable> LoadStage for Loader<'_, R> {
    fn records(&self) -> Result<Box<dyn Iterator<Item = Result<Record, Failure>> + Send>, Failure> {
        let records = formats::records(&self.source.from)?;
        Ok(match self.source.limit {
            Some(limit) => Box::new(records.take(limit.get() as usize)),
            None => records,
        })
    }

    fn images(&self, record: &Record) -> Vec<PathBuf> {
        let names: Vec<String> = if record.embedded.is_empty() {
            named_paths(&record.fields)
        } else {
            let outside = record.embedded.iter().filter(|file| file.bytes.is_none());
            outside.filter_map(|file| file.path.clone()).collect()
        };
        names.iter().map(|name| self.folder().join(name)).collect()
    }

    fn validate(&mut self, records: &[Record]) {
        for record in records {
            if let Ok(fields) = &record.fields {
                self.unread.count(fields);
            }
        }
    }

    fn notes(&self) -> Vec<String> {
        let notes = [self.outside.in_words(), self.unread.in_words()];
        notes.into_iter().flatten().collect()
    }

    fn resume(&mut self, rows: &RecordBatch) -> Result<(), Failure> {
        for row in R::from_batch(rows)? {
            self.count(&row.base());
        }
        Ok(())
    }

    fn load(&mut self, records: Vec<Record>) -> Result<Loaded, Failure> {
        let folder = self.folder().to_owned();
        let allowed = self.allowed();
        let checked = std::mem::take(&mut self.checked);
        let pixels_max = u64::from(self.source.megapixels_max.get()) * 1_000_000;
        let open = |name: &str| open_image(&folder, name, allowed.as_ref(), &checked, pixels_max);
        let mut read: Vec<(String, Opened)> = records
            .into_par_iter()
            .map(|record| {
                if files::stopped() {
                    // This outcome is discarded.
                    return (record.place, Err(Flaw::Other(String::new())));
                }
                let name = record.fields.as_ref().ok().and_then(own_name);
                let place = match name {
                    Some(name) => format!("{}, {name}", record.place),
                    None => record.place,
                };
                let fields = read_fields(&record.fields, record.embedded.len());
                let opened = fields.map_err(Flaw::Other).and_then(|fields| {
                    let images = if record.embedded.is_empty() {
                        let paths = fields.paths.iter();
                        paths.map(|path| open(path)).collect::<Result<_, _>>()?
                    } else {
                        // `datasets` writes a path without bytes for images that it did not embed.
                        let check = |file: ImageFile| match (&file.bytes, &file.path) {
                            (None, Some(path)) => open(path),
                            _ => Ok(checked.check(file, pixels_max)?),
                        };
                        let files = record.embedded.into_iter();
                        files.map(check).collect::<Result<_, _>>()?
                    };
                    Ok((fields, images))
                });
                (place, opened)
            })
            .collect();
        self.checked = checked;
        let captions = self.captions()?;
        for (_, opened) in &mut read {
            if let Ok((fields, _)) = opened
                && fields.captions.is_none()
                && let Some(path) = fields.paths.first()
            {
                fields.captions = captions.get(path).cloned();
            }
        }
        let mut rows = Vec::new();
        let mut images = Vec::new();
        let mut rejects = Vec::new();
        for (place, opened) in read {
            let made = opened.and_then(|(fields, opened_images)| {
                let row = self.row(fields, &opened_images)?;
                Ok((row, opened_images))
            });
            match made {
                Ok((row, opened_images)) => {
                    rows.push(row);
                    images.extend(opened_images);
                }
                Err(flaw) => {
                    let reason = match flaw {
                        Flaw::Other(reason) => reason,
                        Flaw::Outside { image, reason } => {
                            self.outside.add(&place, image);
                            reason
                        }
                    };
                    rejects.push((place, RejectClass::Fault, reason));
                }
            }
        }
        Ok(Loaded {
            rows: R::to_batch(&rows),
            images,
            rejects,
        })
    }
}

fn open_image(
    folder: &Path,
    name: &str,
    allowed: Option<&AllowedFolders>,
    checked: &CheckedImages,
    pixels_max: u64,
) -> Result<Image, Flaw> {
    let path = folder.join(name);
    let fault = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => format!("image not found: {}", path.display()),
        _ => format!("cannot read image {}: {error}", path.display()),
    };
    let file = match allowed.map(|allowed| allowed.place(&path)) {
        None => path.clone(),
        Some(place) => match place.map_err(fault)? {
            Place::Inside(file) => file,
            Place::Outside(file) => {
                let reason = format!(
                    "image {} resolves to {}, outside the folders that this stage may read (`images` and the \
                     folder of `from`); move it there, or set `images_anywhere: true`",
                    path.display(),
                    file.display()
                );
                let image = name.to_owned();
                return Err(Flaw::Outside { image, reason });
            }
        },
    };
    let bytes = files::read_at_most(&file, IMAGE_MAX).map_err(fault)?;
    let path = Some(path.to_string_lossy().into_owned());
    let bytes = Some(bytes);
    Ok(checked.check(ImageFile { bytes, path }, pixels_max)?)
}

/// The images that were decoded, so that one of several questions is decoded once.
#[derive(Default)]
struct CheckedImages(Mutex<HashMap<String, Checked>>);

/// The header of a decoded image, or its fault.
type Checked = Arc<OnceLock<Result<Probe, RowFault>>>;

/// The maximum number of images that are remembered.
const CHECKED_MAX: usize = 1 << 16;

impl CheckedImages {
    /// Decodes an image once, so that a corrupt one is rejected here instead of failing during
    /// sampling.
    fn check(&self, file: ImageFile, pixels_max: u64) -> Result<Image, String> {
        let name = file.path.clone().unwrap_or_else(|| "(embedded)".to_owned());
        let bytes = file
            .bytes
            .as_deref()
            .ok_or_else(|| format!("image {name} has no bytes"))?;
        let image_id = digest(bytes);
        let checked = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if all.len() >= CHECKED_MAX {
                all.clear();
            }
            Arc::clone(all.entry(image_id.clone()).or_default())
        };
        let header = checked.get_or_init(|| {
            let header = probe(bytes)?;
            decode(bytes, pixels_max)?;
            Ok(header)
        });
        let header = header
            .as_ref()
            .map_err(|fault| format!("image {name}: {fault}"))?;
        Ok(Image {
            image_id,
            width: header.width as i32,
            height: header.height as i32,
            format: header.format.to_string(),
            image: file,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use ovchat_data::tables::Pair;

    fn source() -> SourceSettings {
        serde_json::from_value(json!({"from": "p.json"})).unwrap()
    }

    /// A limit of 0 pixels refuses an image that is decoded.
    #[test]
    fn an_image_of_several_questions_is_decoded_once() {
        let checked = CheckedImages::default();
        let file = |name: &str, bytes: &[u8]| ImageFile {
            bytes: Some(bytes.to_vec()),
            path: Some(name.to_owned()),
        };
        let dot = b"P6\n1 1\n255\nabc";
        let first = checked.check(file("a.ppm", dot), 100).unwrap();
        let again = checked.check(file("b.ppm", dot), 0).unwrap();
        assert_eq!((first.image_id, first.width), (again.image_id, again.width));
        assert_eq!(again.image.path.as_deref(), Some("b.ppm"));
        let other = checked.check(file("c.ppm", b"P6\n1 1\n255\nabd"), 0);
        assert!(other.unwrap_err().starts_with("image c.ppm: "));
        for name in ["d.ppm", "e.ppm"] {
            let fault = checked.check(file(name, b"P6\n1 1\n255\na"), 100);
            let begin = format!("image {name}: ");
            assert!(fault.unwrap_err().starts_with(&begin));
        }
    }

    #[test]
    fn a_record_that_is_set_aside_is_named_by_its_place_and_its_own_id() {
        let source = source();
        let set_aside = |fields: serde_json::Value| {
            let mut loader = Loader::<Pair>::new(&source);
            let record = Record {
                place: "line 3".to_owned(),
                fields: Ok(fields),
                embedded: Vec::new(),
            };
            let mut rejects = loader.load(vec![record]).unwrap().rejects;
            let (id, _, reason) = rejects.remove(0);
            (id, reason)
        };
        let pair = |chosen: &str, rejected: &str| json!({"id": "q17", "prompt": "Why?", "chosen": chosen, "rejected": rejected});
        let reason =
            |name: &str| format!("`{name}` is empty; write the answer, or remove the record");
        let place = "line 3, id q17".to_owned();
        assert_eq!(
            set_aside(pair("", "No.")),
            (place.clone(), reason("chosen"))
        );
        assert_eq!(set_aside(pair("Yes.", " \n")), (place, reason("rejected")));
        let (place, _) = set_aside(json!({"question_id": 7, "prompt": "Why?"}));
        assert_eq!(place, "line 3, question_id 7");
        let preferred = json!({"output_1": {"value": ""}, "output_2": {"value": "No."},
            "prompt": "Why?", "preference": 2});
        assert_eq!(
            set_aside(preferred),
            ("line 3".to_owned(), reason("rejected"))
        );
    }

    #[test]
    fn a_prompt_that_comes_twice_has_two_ids_and_a_resumed_loader_counts_on() {
        let record = || Record {
            place: String::new(),
            fields: Ok(json!({"prompt": "Why?"})),
            embedded: Vec::new(),
        };
        let source = source();
        let mut whole = Loader::<Prompt>::new(&source);
        let rows =
            Prompt::from_batch(&whole.load(vec![record(), record(), record()]).unwrap().rows)
                .unwrap();
        assert_ne!(rows[0].prompt_id, rows[1].prompt_id);
        assert_ne!(rows[1].prompt_id, rows[2].prompt_id);
        let mut resumed = Loader::<Prompt>::new(&source);
        resumed.resume(&Prompt::to_batch(&rows[..2])).unwrap();
        let rest = Prompt::from_batch(&resumed.load(vec![record()]).unwrap().rows).unwrap();
        assert_eq!(rest[0], rows[2]);
    }
}
