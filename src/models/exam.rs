//! Settings of an exam: known preferences that a judge must pass before it scores.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An exam: known preferences, and the agreement that a judge must reach before it scores. The
/// judge's result on each label is a row of the table `<judge>_exam`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exam {
    /// File of labels, in the JSON format that `load_feedback` reads.
    pub from: PathBuf,
    /// Folder that image paths in the labels are relative to. Default: the folder of `from`.
    #[serde(default)]
    pub images: Option<PathBuf>,
    /// Minimum share of the labels that the judge must agree with, from 0 to 1.
    pub accuracy_min: Share,
    /// Maximum absolute Pearson correlation, from 0 to 1, between the judge's margins and the
    /// length difference of the two answers in characters (chosen minus rejected). Default: not
    /// checked.
    #[serde(default)]
    pub length_correlation_max: Option<Share>,
    /// Maximum share of the labels, from 0 to 1, on which a pairwise judge's verdict changes when
    /// the two answers are shown in the other order. Default: not checked.
    #[serde(default)]
    pub flip_rate_max: Option<Share>,
    /// A label with a known reward, to check that the judge is set up correctly. Default: none.
    #[serde(default)]
    pub golden: Option<Golden>,
}

/// A label with a known reward, taken from a setup where the judge is known to work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// The `id` of the label.
    pub id: String,
    /// Expected reward of the label's preferred answer.
    pub chosen_reward: f64,
    /// Maximum absolute difference from `chosen_reward`. Default: 0.01.
    #[serde(default = "Golden::tolerance")]
    pub tolerance: f32,
}

impl Golden {
    fn tolerance() -> f32 {
        0.01
    }
}

/// A share, from 0 to 1.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, PartialOrd, Serialize, Deserialize, JsonSchema,
)]
#[serde(try_from = "f64", into = "f64")]
pub struct Share(#[schemars(range(min = 0, max = 1))] f64);

impl Share {
    pub fn get(self) -> f64 {
        self.0
    }

    /// True if the share is 0.
    pub fn is_zero(&self) -> bool {
        self.0 == 0.0
    }
}

impl TryFrom<f64> for Share {
    type Error = String;

    fn try_from(share: f64) -> Result<Self, String> {
        if (0.0..=1.0).contains(&share) {
            Ok(Self(share))
        } else {
            Err(format!("{share} is out of range, expected 0 to 1"))
        }
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> f64 {
        share.0
    }
}
