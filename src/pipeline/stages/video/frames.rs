//! The choice of a video's frames.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The rule by which frames are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FrameRule {
    /// `frames` frames at equal distances, the first and the last frame included, as LLaVA-NeXT and
    /// lmms-eval show videos. A video with fewer frames repeats some.
    #[default]
    Uniform,
    /// One frame a second, as LLaVA-NeXT trains; a video with more than `frames` of these has
    /// `frames` uniform frames.
    LlavaNext,
    /// `frames` frames at equal distances from the first one, without the last, as transformers
    /// samples them. A video with fewer frames is rejected.
    Transformers,
}

impl FrameRule {
    /// Returns the positions of the chosen frames of a video with `total` frames, ascending.
    ///
    /// # Errors
    ///
    /// Fails if the rule does not apply to the video.
    pub fn indices(
        self,
        total: usize,
        frames: usize,
        fps: Option<f64>,
    ) -> Result<Vec<usize>, String> {
        match self {
            Self::Uniform => Ok(uniform(total, frames)),
            Self::LlavaNext => {
                let fps = fps.ok_or(
                    "the file does not say its frame rate, which `rule: llava_next` needs; use \
                     `rule: uniform`",
                )?;
                // `round` of Python, as in `process_video_with_decord` of llava/utils.py.
                let step = (fps.round_ties_even() as usize).max(1);
                let chosen: Vec<usize> = (0..total).step_by(step).collect();
                if chosen.len() > frames {
                    return Ok(uniform(total, frames));
                }
                Ok(chosen)
            }
            Self::Transformers if frames > total => Err(format!(
                "the video has {total} frames, but `rule: transformers` needs {frames}; lower `frames`, or \
                 use `rule: uniform`"
            )),
            Self::Transformers => Ok((0..frames).map(|frame| frame * total / frames).collect()),
        }
    }
}

/// Returns `numpy.linspace(0, total - 1, frames, dtype=int)`. The product is rounded before it is
/// truncated, as in numpy; `i * (total - 1) / (frames - 1)` in integers differs for some lengths.
fn uniform(total: usize, frames: usize) -> Vec<usize> {
    let last = total.saturating_sub(1);
    if frames == 1 {
        return vec![0];
    }
    let step = last as f64 / (frames - 1) as f64;
    let mut indices: Vec<usize> = (0..frames)
        .map(|frame| (frame as f64 * step) as usize)
        .collect();
    if let Some(end) = indices.last_mut() {
        *end = last;
    }
    indices
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    /// The values of ../shared/spec/video.md, section 2.2, computed with numpy and transformers.
    #[test]
    fn frames_are_those_of_the_references() {
        let uniform = |total, frames| FrameRule::Uniform.indices(total, frames, None).unwrap();
        assert_eq!(uniform(100, 8), [0, 14, 28, 42, 56, 70, 84, 99]);
        assert_eq!(uniform(5, 8), [0, 0, 1, 1, 2, 2, 3, 4]);
        assert_eq!(uniform(1, 3), [0, 0, 0]);
        assert_eq!(uniform(9, 1), [0]);
        assert_eq!(uniform(154, 64)[21], 50);
        let long = uniform(300, 32);
        assert_eq!(long[..8], [0, 9, 19, 28, 38, 48, 57, 67]);
        assert_eq!(long[29..], [279, 289, 299]);
        let transformers = |total, frames| FrameRule::Transformers.indices(total, frames, None);
        assert_eq!(
            transformers(100, 8).unwrap(),
            [0, 12, 25, 37, 50, 62, 75, 87]
        );
        assert!(transformers(7, 8).unwrap_err().contains("has 7 frames"));
        let trained = |total, fps| FrameRule::LlavaNext.indices(total, 32, fps);
        assert_eq!(trained(90, Some(29.97)).unwrap(), [0, 30, 60]);
        assert_eq!(trained(5, Some(0.4)).unwrap(), [0, 1, 2, 3, 4]);
        assert_eq!(trained(10, Some(2.5)).unwrap(), [0, 2, 4, 6, 8]);
        assert_eq!(trained(3000, Some(30.0)).unwrap(), uniform(3000, 32));
        assert!(trained(10, None).is_err());
    }

    /// `hashlib.sha256(b"".join(numpy.linspace(0, t - 1, n, dtype=int).astype("<u4").tobytes() for n in
    /// (4, 8, 16, 32, 64) for t in range(1, 6001)))`, numpy 2.4.
    #[test]
    fn thirty_thousand_choices_equal_numpy() {
        let mut hash = Sha256::new();
        for frames in [4, 8, 16, 32, 64] {
            for total in 1..=6000 {
                for index in uniform(total, frames) {
                    hash.update((index as u32).to_le_bytes());
                }
            }
        }
        assert_eq!(hex::encode(hash.finalize()), NUMPY);
    }

    const NUMPY: &str = "33eaf537abd4858d34cb0fbf502f9760805abeb56de655b2a813578dccbc1be8";
}
