//! The `load_feedback` stage: preference pairs labeled by people, loaded directly as `pairs`.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::source::{Loader, RecordSource};
use super::source_check::SourceProblem;
use super::{Input, Stage, StageError, StageKind, TableName, join};
use ovchat_data::tables::{Pair, Row};

/// Loads preference pairs labeled by people. The source is a JSON list, JSON Lines or Parquet of
/// `{id, image, prompt, chosen, rejected}`, or of LLaVA-Human-Preference records:
/// `{id, image, conversations, output_1, output_2, preference}`. A record with an empty answer is
/// rejected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadFeedback {
    /// The source file: `.json`, `.jsonl` or `.parquet`.
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

    /// Returns the problem found in the first records or at the end of the file, if any.
    pub fn source_problem(&self) -> Option<SourceProblem> {
        self.loader().source_problem()
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
