//! `load_prompts`: pictures and questions from a file of the user.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::source::{Loader, RecordSource};
use super::source_check::SourceProblem;
use super::{Input, Stage, StageError, StageKind, TableName, join};
use ovchat_data::tables::{Prompt, Row};

/// Reads pictures and questions: a JSON list or JSON lines of `{id, image, prompt}`, LLaVA
/// conversations (`from` and `value`, or `role` and `content`), or Parquet with a column of images: bytes,
/// or bytes and path as Hugging Face `datasets` writes them. A record with media that are not read, such
/// as video or a second image under another key, is a reject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadPrompts {
    /// The file: `.json`, `.jsonl` or `.parquet`.
    pub from: PathBuf,
    /// The folder that the pictures' paths start at; the folder of `from` if left out.
    #[serde(default)]
    pub images: Option<PathBuf>,
    /// Read pictures wherever a record's path leads. Otherwise one that leads out of `images` and of the
    /// folder of `from`, by a link too, makes its record a reject.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub images_anywhere: bool,
    /// A JSON object from a picture's path to a list of captions, for judges that can use them.
    #[serde(default)]
    pub captions: Option<PathBuf>,
    /// Only the first so many records.
    #[serde(default)]
    pub limit: Option<NonZeroU32>,
    /// Pictures with more pixels than this many million are set aside without being decoded.
    #[serde(default = "LoadPrompts::megapixels_max")]
    pub megapixels_max: NonZeroU32,
}

impl LoadPrompts {
    fn loader(&self) -> Loader<'_, Prompt> {
        Loader::new(RecordSource {
            from: &self.from,
            images: self.images.as_deref(),
            images_anywhere: self.images_anywhere,
            captions: self.captions.as_deref(),
            limit: self.limit,
            megapixels_max: self.megapixels_max,
        })
    }

    /// What the beginning and the end of the file say against loading it.
    pub fn objection(&self) -> Option<SourceProblem> {
        self.loader().objection()
    }

    fn megapixels_max() -> NonZeroU32 {
        const { NonZeroU32::new(100).unwrap() }
    }
}

impl Stage for LoadPrompts {
    fn inputs(&self) -> Vec<Input<'_>> {
        Vec::new()
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        let mut files = vec![("from", self.from.as_path())];
        files.extend(self.images.as_deref().map(|path| ("images", path)));
        files.extend(self.captions.as_deref().map(|path| ("captions", path)));
        files
    }

    fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        join(folder, "from", &mut self.from);
        for (field, path) in [
            ("images", &mut self.images),
            ("captions", &mut self.captions),
        ] {
            if let Some(path) = path {
                join(folder, field, path);
            }
        }
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Prompt::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Prompt::schema())
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Load(Box::new(self.loader()))
    }
}
