//! `load_feedback`: pairs that people judged, straight to `pairs`.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::source::{Loader, RecordSource};
use super::source_check::SourceProblem;
use super::{Input, Stage, StageError, StageKind, TableName, join};
use ovchat_data::tables::{Pair, Row};

/// Reads pairs that people judged: a JSON list, JSON lines or Parquet of
/// `{id, image, prompt, chosen, rejected}`, or of the records of LLaVA-Human-Preference:
/// `{id, image, conversations, output_1, output_2, preference}`. An empty answer is a reject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadFeedback {
    /// The file: `.json`, `.jsonl` or `.parquet`.
    pub from: PathBuf,
    /// The folder that the pictures' paths start at; the folder of `from` if left out.
    #[serde(default)]
    pub images: Option<PathBuf>,
    /// Read pictures wherever a record's path leads. Otherwise one that leads out of `images` and of the
    /// folder of `from`, by a link too, makes its record a reject.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub images_anywhere: bool,
    /// JSON of captions by picture path, `{"a.png": ["…"]}`, for judges that use captions.
    #[serde(default)]
    pub captions: Option<PathBuf>,
    /// Only the first so many records.
    #[serde(default)]
    pub limit: Option<NonZeroU32>,
    /// Pictures with more pixels than this many million are set aside without being decoded.
    #[serde(default = "LoadFeedback::megapixels_max")]
    pub megapixels_max: NonZeroU32,
}

impl LoadFeedback {
    fn loader(&self) -> Loader<'_, Pair> {
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

impl Stage for LoadFeedback {
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
        Some(Pair::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        Ok(Pair::schema())
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Load(Box::new(self.loader()))
    }
}
