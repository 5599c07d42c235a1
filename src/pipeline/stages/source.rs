//! Loading of a source's records and images, shared by the loading stages.
//!
//! A source is a JSON list, JSON Lines, or Parquet with a column of images; a record is either the
//! document's `{id, image, prompt, …}` or a LLaVA conversation. A file that cannot be read at all
//! fails the stage; a record that cannot be used is rejected.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use rayon::prelude::*;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::allowed_folders::AllowedFolders;
use super::fields::Fields;
use super::formats;
use super::names::{FieldName, NamedColumns, Names};
use super::opener::{CheckedImages, Flaw, IMAGE_MAX, Opened, OpenedVideos, Opener, video_file};
use super::records::{named_paths, read_fields};
use super::shown::Shown;
use super::source_check::{self, SourceProblem};
use super::unread::Unread;
use super::video::{Ffmpeg, VideoSettings};
use super::work::{Failure, LoadStage, Loaded, Record, StageKind};
use super::{Input, Stage, StageError, TableName, join};
use ovchat_data::store::{Key, Media};
use ovchat_data::tables::{Image, Kept, Prompt, PromptVideo, RejectClass, Row, Video};
use ovchat_models::{DatasetPart, Repository, Unchosen, data_files};

/// The settings of a loading stage: a file of the user, and how it is read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSettings {
    /// The source: a file with a JSON list, JSON Lines, or Parquet (`.parquet`); a dataset of the
    /// Hugging Face Hub, `hf://datasets/org/name` (optionally `@revision`), which is read from the
    /// Hugging Face cache, and which `pipeline run` downloads if the cache lacks it; or a folder in the
    /// layout of such a dataset.
    pub from: PathBuf,
    /// The configuration of the dataset, which the hub also calls a subset. Default: the only one, or
    /// `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// The split of the dataset. Default: the only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// The columns of the source that are read as fields of other names: `{ question: Question }`.
    /// Default: none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: BTreeMap<FieldName, String>,
    /// Columns of the source that are kept in the column `kept` of the table: for SQL as
    /// `kept['category']`, for templates of judge prompts as `row.category`. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<String>,
    /// The folder that relative paths of images and videos start from. Default: the folder of `from`.
    #[serde(default)]
    pub images: Option<PathBuf>,
    /// The folder that relative paths of videos start from. A video may be named without the ending of
    /// its file. Default: `images`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub videos: Option<PathBuf>,
    /// Reads images and videos from any path that a record names. By default, a record is rejected if
    /// its file, with symbolic links resolved, lies outside `images` and the folder of `from`.
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
    /// The separator of several images and videos before a text, in records without placeholders:
    /// `newline`, or `space` as in lmms-eval. Default: `newline`.
    #[serde(default, skip_serializing_if = "Separator::is_default")]
    pub separator: Separator,
    /// The choice of a video's frames. Videos are decoded by the program `ffmpeg`.
    #[serde(default, skip_serializing_if = "VideoSettings::is_default")]
    pub video: VideoSettings,
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

    fn names(&self) -> Names {
        Names {
            columns: self.columns.clone(),
            keep: self.keep.clone(),
        }
    }

    /// Returns the part of a dataset that is loaded.
    fn part(&self) -> DatasetPart<'_> {
        DatasetPart {
            config: self.config.as_deref(),
            split: self.split.as_deref(),
        }
    }

    /// Returns the files of the source. A file needs no `config` and no `split`.
    fn files(&self) -> Result<Vec<PathBuf>, Unchosen> {
        let is_part = self.config.is_some() || self.split.is_some();
        if is_part && self.from.is_file() {
            let words =
                "`config` and `split` are those of a dataset, but `from` is a file; remove them";
            return Err(Unchosen::Wrong(words.to_owned()));
        }
        data_files(&self.from, self.part())
    }
}

/// A stage that loads rows of type `R` from a source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent, bound = "")]
pub struct Load<R> {
    settings: SourceSettings,
    /// The files of the source.
    #[serde(skip)]
    files: OnceLock<Vec<PathBuf>>,
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
    /// Returns the source as the pipeline file names it, with its path resolved.
    pub fn from(&self) -> &Path {
        &self.settings.from
    }

    /// Returns the columns that are kept.
    pub fn kept_columns(&self) -> &[String] {
        &self.settings.keep
    }

    /// Returns the reason why a dataset has no files to load.
    pub fn unchosen(&self) -> Option<Unchosen> {
        self.settings.files().err()
    }

    /// Returns the part of a dataset that is loaded.
    pub fn part(&self) -> DatasetPart<'_> {
        self.settings.part()
    }

    /// Returns the files of the source; none if a dataset has no files to load.
    fn files(&self) -> &[PathBuf] {
        self.files
            .get_or_init(|| self.settings.files().unwrap_or_default())
    }

    /// Returns the number of frames of a video, if one of the first records names one.
    pub fn video_frames(&self) -> Option<usize> {
        let first = self.files().first()?;
        let has_video = source_check::first_records(first, &self.settings.names())
            .iter()
            .any(has_video);
        has_video.then(|| self.settings.video.frames.get())
    }

    /// Returns the problem found in the first records or at the end of the file, if any.
    pub fn source_problem(&self) -> Option<SourceProblem> {
        Loader::<R>::new(&self.settings, self.files()).source_problem()
    }
}

impl<R: Loadable> Stage for Load<R> {
    fn inputs(&self) -> Vec<Input<'_>> {
        Vec::new()
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        let settings = &self.settings;
        let mut files: Vec<(&str, &Path)> = match self.files() {
            [] => vec![("from", settings.from.as_path())],
            files => files.iter().map(|path| ("from", path.as_path())).collect(),
        };
        files.extend(settings.images.as_deref().map(|path| ("images", path)));
        files.extend(settings.videos.as_deref().map(|path| ("videos", path)));
        files.extend(settings.captions.as_deref().map(|path| ("captions", path)));
        files
    }

    fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        let settings = &mut self.settings;
        if Repository::of(&settings.from).is_none() {
            join(folder, "from", &mut settings.from);
        }
        self.files = OnceLock::new();
        for (field, path) in [
            ("images", &mut settings.images),
            ("videos", &mut settings.videos),
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
        StageKind::Load(Box::new(Loader::<R>::new(&self.settings, self.files())))
    }
}

/// Returns the key of a prompt without its occurrence number.
pub fn prompt_base(shown: Shown<'_>) -> String {
    shown.add_to(Key::new("prompt")).finish()
}

/// Records whose images or videos lie outside the allowed folders.
#[derive(Default)]
struct Outside {
    count: u64,
    /// The place of the first such record, and its file.
    first: Option<(String, String)>,
}

impl Outside {
    fn add(&mut self, place: &str, file: String) {
        self.count += 1;
        self.first.get_or_insert_with(|| (place.to_owned(), file));
    }

    /// Returns a note with their number, the first one and the fix; `None` if there are none.
    fn in_words(&self) -> Option<String> {
        let (place, file) = self.first.as_ref()?;
        let count = match self.count {
            1 => "1 record names a file".to_owned(),
            count => format!("{count} records name files"),
        };
        Some(format!(
            "{count} outside the allowed folders, first {file} ({place}); set `images_anywhere: true` to read \
             from any folder"
        ))
    }
}

/// The loader of rows of one kind from a source.
struct Loader<'a, R> {
    source: &'a SourceSettings,
    /// The files of the source.
    files: &'a [PathBuf],
    captions: Option<HashMap<String, Vec<String>>>,
    /// The number of occurrences of each prompt so far.
    seen: HashMap<String, u32>,
    unread: Unread,
    named: NamedColumns,
    outside: Outside,
    checked: CheckedImages,
    /// The programs that decode videos; found when the first video is loaded.
    ffmpeg: OnceLock<Result<Ffmpeg, String>>,
    videos: OpenedVideos,
    kind: PhantomData<R>,
}

impl<'a, R: Loadable> Loader<'a, R> {
    fn new(source: &'a SourceSettings, files: &'a [PathBuf]) -> Self {
        Self {
            source,
            files,
            captions: None,
            seen: HashMap::new(),
            unread: Unread::default(),
            named: NamedColumns::default(),
            outside: Outside::default(),
            checked: CheckedImages::default(),
            ffmpeg: OnceLock::new(),
            videos: OpenedVideos::default(),
            kind: PhantomData,
        }
    }

    /// Returns the problem found in the first records or at the end of the source, if any. Images
    /// and videos are checked for existence only.
    fn source_problem(mut self) -> Option<SourceProblem> {
        let from = self.files.first()?;
        let (folder, videos) = (self.folder().to_owned(), self.videos().to_owned());
        let names = self.source.names();
        source_check::source_problem(from, &names, self.source.limit, |record| {
            let fields = read_fields(&record.fields, record.embedded.len())?;
            let images = record.embedded.is_empty().then_some(&fields.paths);
            let named = [
                ("image", images, &folder),
                ("video", Some(&fields.video_paths), &videos),
            ];
            for (kind, names, folder) in named {
                let mut names = names.into_iter().flatten();
                let is_missing = |name: &&String| match kind {
                    "video" => !video_file(folder, name).exists(),
                    _ => !folder.join(name).exists(),
                };
                if folder.is_dir()
                    && let Some(name) = names.find(is_missing)
                {
                    return Err(format!("{kind} not found: {name}"));
                }
            }
            self.row(fields, record.kept.clone(), &[], None).map(|_| ())
        })
    }

    fn folder(&self) -> &Path {
        let images = self.source.images.as_deref();
        images.unwrap_or_else(|| self.beside())
    }

    /// Returns the folder that relative paths of videos start from.
    fn videos(&self) -> &Path {
        let videos = self.source.videos.as_deref();
        videos.unwrap_or_else(|| self.folder())
    }

    /// Returns the folder of the source.
    fn beside(&self) -> &Path {
        let from = self
            .files
            .first()
            .map_or(&*self.source.from, PathBuf::as_path);
        from.parent().unwrap_or(Path::new("."))
    }

    /// Returns the folders that images may be read from; `None` for any folder.
    fn allowed(&self) -> Option<AllowedFolders> {
        let folders = [self.folder(), self.videos(), self.beside()];
        (!self.source.images_anywhere).then(|| AllowedFolders::new(&folders))
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

    fn row(
        &mut self,
        mut fields: Fields,
        kept: Vec<(String, String)>,
        images: &[Image],
        videos: Option<Vec<PromptVideo>>,
    ) -> Result<R, String> {
        if self.source.separator == Separator::Space {
            fields.separate_by_spaces();
        }
        let image_ids: Vec<String> = images.iter().map(|image| image.image_id.clone()).collect();
        let base = prompt_base(Shown {
            image_ids: &image_ids,
            videos: videos.as_deref().unwrap_or_default(),
            system: fields.system.as_deref(),
            turns: &fields.turns,
            question: &fields.question,
        });
        let prompt_id = match self.seen.get(&base) {
            None | Some(0) => base.clone(),
            Some(number) => Key::new("again")
                .with(&base)
                .with(number.to_le_bytes())
                .finish(),
        };
        let image = fields.paths.first().or(fields.video_paths.first()).cloned();
        let mut key = Key::new("prompt row")
            .with(&prompt_id)
            .with(fields.id.as_deref().unwrap_or_default())
            .with(image.as_deref().unwrap_or_default());
        key = key.with(fields.answer.as_deref().unwrap_or_default());
        for caption in fields.captions.iter().flatten() {
            key = key.with(caption);
        }
        for (name, value) in &kept {
            key = key.with("kept").with(name).with(value);
        }
        let prompt = Prompt {
            row_key: key.finish(),
            prompt_id,
            id: fields.id,
            image,
            image_ids,
            videos,
            system: fields.system,
            turns: fields.turns,
            question: fields.question,
            captions: fields.captions,
            answer: fields.answer,
            kept: (!kept.is_empty()).then_some(Kept(kept)),
        };
        let row = R::from_record(prompt, fields.chosen, fields.rejected)?;
        self.count(&base);
        Ok(row)
    }
}

impl<R: Loadable> LoadStage for Loader<'_, R> {
    fn records(&self) -> Result<Box<dyn Iterator<Item = Result<Record, Failure>> + Send>, Failure> {
        let names = self.source.names();
        let records: Box<dyn Iterator<Item = _> + Send> = match self.files {
            [file] => formats::records(file, &names)?,
            files => {
                let files = files.to_vec();
                Box::new(
                    files
                        .into_iter()
                        .flat_map(move |file| in_file(&file, &names)),
                )
            }
        };
        Ok(match self.source.limit {
            Some(limit) => Box::new(records.take(limit.get() as usize)),
            None => records,
        })
    }

    fn media(&self, record: &Record) -> Vec<(PathBuf, u64)> {
        let [mut images, videos] = named_paths(&record.fields);
        if !record.embedded.is_empty() {
            let outside = record.embedded.iter().filter(|file| file.bytes.is_none());
            images = outside.filter_map(|file| file.path.clone()).collect();
        }
        let images = images
            .iter()
            .map(|name| (self.folder().join(name), IMAGE_MAX));
        let videos = videos
            .iter()
            .map(|name| (video_file(self.videos(), name), u64::MAX));
        images.chain(videos).collect()
    }

    fn validate(&mut self, records: &[Record]) {
        for record in records {
            if let Ok(fields) = &record.fields {
                self.unread.count(fields);
                self.named.count(fields, &record.kept);
            }
        }
    }

    fn fault(&self) -> Option<Failure> {
        let from = self.files.first()?;
        // A Parquet file has a schema, which was checked before.
        if formats::is_not_json(from) {
            return None;
        }
        Some(Failure::Input {
            path: self.source.from.clone(),
            place: String::new(),
            problem: self.named.missing(&self.source.names())?,
        })
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

    fn at_once(&self, records: &[Record]) -> usize {
        if records.iter().any(has_video) {
            (FRAMES_AT_ONCE / self.source.video.bytes_max()).max(rayon::current_num_threads())
        } else {
            records.len()
        }
    }

    fn load(&mut self, records: Vec<Record>, known: &mut Media) -> Result<Loaded, Failure> {
        let folder = self.folder().to_owned();
        let allowed = self.allowed();
        let checked = std::mem::take(&mut self.checked);
        let videos = self.videos().to_owned();
        let opener = Opener {
            folder: &folder,
            video_folder: &videos,
            allowed: allowed.as_ref(),
            pixels_max: u64::from(self.source.megapixels_max.get()) * 1_000_000,
            video: &self.source.video,
            checked: &checked,
            ffmpeg: &self.ffmpeg,
            known: Mutex::new(known),
            videos: Mutex::new(std::mem::take(&mut self.videos)),
        };
        let kept: Vec<_> = records.iter().map(|record| record.kept.clone()).collect();
        let mut read: Vec<(String, Opened)> = if records.iter().any(has_video) {
            opener.open_on_threads(&records)
        } else {
            records
                .par_iter()
                .map(|record| opener.open(record))
                .collect()
        };
        self.videos = opener
            .videos
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        self.videos.forget_frames();
        self.checked = checked;
        let captions = self.captions()?;
        for (_, opened) in &mut read {
            if let Ok((fields, _)) = opened
                && fields.captions.is_none()
                && let Some(path) = fields.paths.first().or(fields.video_paths.first())
            {
                fields.captions = captions.get(path).cloned();
            }
        }
        let mut rows = Vec::new();
        let mut images = Vec::new();
        let mut videos: Vec<Video> = Vec::new();
        let mut rejects = Vec::new();
        for ((place, opened), kept) in read.into_iter().zip(kept) {
            let made = opened.and_then(|(fields, media)| {
                let shown = media.videos.iter().map(|video| video.shown.clone());
                let shown = (!media.videos.is_empty()).then(|| shown.collect());
                let row = self.row(fields, kept, &media.images, shown)?;
                Ok((row, media))
            });
            match made {
                Ok((row, media)) => {
                    rows.push(row);
                    images.extend(media.images);
                    for new in media.videos.iter().filter_map(|video| video.new.as_ref()) {
                        if !videos.iter().any(|other| other.row_key == new.row.row_key) {
                            videos.push(new.row.clone());
                            images.extend(new.frames.iter().cloned());
                        }
                    }
                }
                Err(flaw) => {
                    let reason = match flaw {
                        Flaw::Failure(failure) => return Err(failure),
                        Flaw::Other(reason) => reason,
                        Flaw::Outside { file, reason } => {
                            self.outside.add(&place, file);
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
            videos,
            rejects,
        })
    }
}

/// Returns the records of one of several files, whose places name the file.
fn in_file(file: &Path, names: &Names) -> Box<dyn Iterator<Item = Result<Record, Failure>> + Send> {
    let name = file
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    match formats::records(file, names) {
        Ok(records) => Box::new(records.map(move |record| {
            let mut record = record?;
            record.place = format!("{name}, {}", record.place);
            Ok(record)
        })),
        Err(failure) => Box::new(std::iter::once(Err(failure))),
    }
}

fn has_video(record: &Record) -> bool {
    let [_, videos] = named_paths(&record.fields);
    !videos.is_empty()
}

/// The bytes of decoded frames that are in memory at once.
const FRAMES_AT_ONCE: usize = 256 << 20;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::no_media;
    use super::*;
    use ovchat_data::tables::Pair;

    fn source() -> SourceSettings {
        serde_json::from_value(json!({"from": "p.json"})).unwrap()
    }

    #[test]
    fn a_record_that_is_set_aside_is_named_by_its_place_and_its_own_id() {
        let source = source();
        let set_aside = |fields: serde_json::Value| {
            let mut loader = Loader::<Pair>::new(&source, &[]);
            let record = Record {
                place: "line 3".to_owned(),
                fields: Ok(fields),
                embedded: Vec::new(),
                kept: Vec::new(),
            };
            let mut rejects = loader.load(vec![record], &mut no_media()).unwrap().rejects;
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
            kept: Vec::new(),
        };
        let source = source();
        let mut whole = Loader::<Prompt>::new(&source, &[]);
        let rows = Prompt::from_batch(
            &whole
                .load(vec![record(), record(), record()], &mut no_media())
                .unwrap()
                .rows,
        )
        .unwrap();
        assert_ne!(rows[0].prompt_id, rows[1].prompt_id);
        assert_ne!(rows[1].prompt_id, rows[2].prompt_id);
        let mut resumed = Loader::<Prompt>::new(&source, &[]);
        resumed.resume(&Prompt::to_batch(&rows[..2])).unwrap();
        let rest = Prompt::from_batch(&resumed.load(vec![record()], &mut no_media()).unwrap().rows)
            .unwrap();
        assert_eq!(rest[0], rows[2]);
    }
}
