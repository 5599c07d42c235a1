//! Networks on libtorch: loading, sampling, scoring and training. Each network has a file of its
//! own and keeps the names of the Python implementation that it follows.
//!
//! In reading order: the device and libtorch's errors; weights on disk; building blocks; the
//! networks; sampling, scoring and training. The rest of the program depends only on the traits of
//! [`ovchat_models`] and gets their implementations from [`NetLoader`].

#![cfg(feature = "torch")]

pub mod budget;
pub mod device;
pub mod error;

pub mod checkpoint;
pub mod weights;

pub mod shim;
pub mod store;

pub mod attention;
pub mod casts;
pub mod layer_stack;
pub mod layers;
pub mod lora;

pub mod decoder;
pub mod vit;

pub mod vlm;

pub mod llava;
pub mod llava_onevision;

pub mod networks;

pub mod generate;
pub mod images;
pub mod sampling;

pub mod reward;

pub mod blockwise_quant;
pub mod optimizer;
pub mod training;

pub mod dpo;
pub mod dpo_trainer;
pub mod reward_trainer;
pub mod sft_trainer;

#[cfg(test)]
#[path = "tests/recorded/mod.rs"]
mod recorded;

use std::path::Path;

use self::checkpoint::Checkpoint;
use self::dpo_trainer::PolicyDpo;
use self::generate::NetworkPolicy;
use self::reward::RewardJudge;
use self::reward_trainer::LlavaRewardTrainer;
use self::sft_trainer::{PolicySft, RewardBaseSft, Sft};
use self::store::TcpStore;
use ovchat_models::checkpoint::{Conversion, LlavaRlhfConfig, elements, judge_elements};
use ovchat_models::{
    Board, Compute, DpoSettings, DpoTrainer, Dtype, Finding, Judge, Layout, ModelError,
    ModelLoader, ModelSpec, Opened, Placement, Policy, RankPlace, RewardSettings, RewardTrainer,
    Room, SftSettings, SftTrainer, architectures,
};

/// Opens networks as policies, judges and trainers. Models that need no network (see
/// [`ModelSpec::needs_torch`]) are opened elsewhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct NetLoader;

impl ModelLoader for NetLoader {
    fn policy(&self, spec: &ModelSpec) -> Opened<dyn Policy> {
        match spec.vision_language() {
            Some(spec) => Ok(Box::new(NetworkPolicy::open(spec)?)),
            None => Err(unfit(spec, "answer")),
        }
    }

    fn judge(&self, spec: &ModelSpec) -> Opened<dyn Judge> {
        match spec {
            ModelSpec::LlavaRlhf(spec) => Ok(Box::new(RewardJudge::open(spec)?)),
            other => Err(unfit(other, "score")),
        }
    }

    fn dpo_trainer(&self, spec: &ModelSpec, settings: &DpoSettings) -> Opened<dyn DpoTrainer> {
        match spec.vision_language() {
            Some(spec) => Ok(Box::new(PolicyDpo::open(spec, settings)?)),
            None => Err(unfit(spec, "be trained on pairs")),
        }
    }

    fn sft_trainer(&self, spec: &ModelSpec, settings: &SftSettings) -> Opened<dyn SftTrainer> {
        match (spec.vision_language(), spec) {
            (Some(spec), _) => Ok(Box::new(Sft::<PolicySft>::open(spec, settings)?)),
            (None, ModelSpec::LlavaRlhf(spec)) => {
                Ok(Box::new(Sft::<RewardBaseSft>::open(spec, settings)?))
            }
            (None, other) => Err(unfit(other, "be fine-tuned")),
        }
    }

    fn reward_trainer(
        &self,
        spec: &ModelSpec,
        settings: &RewardSettings,
    ) -> Opened<dyn RewardTrainer> {
        match spec {
            ModelSpec::LlavaRlhf(spec) => Ok(Box::new(LlavaRewardTrainer::open(spec, settings)?)),
            other => Err(unfit(other, "be trained as a reward model")),
        }
    }

    fn precision(&self, spec: &ModelSpec) -> Result<Dtype, ModelError> {
        let Some(compute) = spec.compute() else {
            return Ok(Dtype::Float32);
        };
        let (_, kind) = device::choose(compute.device, compute.dtype)?;
        Ok(match kind {
            tch::Kind::BFloat16 => Dtype::Bfloat16,
            _ => Dtype::Float32,
        })
    }

    fn placement(&self, spec: &ModelSpec) -> Result<Option<Placement>, ModelError> {
        let compute = spec.compute();
        let placement = |compute: Compute| device::placement(compute.device, compute.dtype);
        compute.map(placement).transpose()
    }

    fn room(&self, spec: &ModelSpec) -> Result<Option<Room>, ModelError> {
        let Some(compute) = spec.compute() else {
            return Ok(None);
        };
        let (device, _) = device::choose(compute.device, compute.dtype)?;
        Ok(Some(device::room(compute.memory_gb, device)))
    }

    fn rewrite(
        &self,
        weights: &Path,
        adapter: Option<&Path>,
        layout: Option<Layout>,
        to: &Path,
    ) -> Result<(), ModelError> {
        let conversion = match layout {
            Some(layout) => Conversion::of(weights, layout)?,
            None => None,
        };
        let checkpoint = Checkpoint::open(weights)?;
        let parameters = match adapter {
            Some(adapter) => lora::merged(&checkpoint, adapter)?,
            None => Vec::new(),
        };
        checkpoint.save_as(to, &parameters, conversion.as_ref())
    }

    fn build(&self) -> Vec<(&'static str, String)> {
        vec![("ovchat.libtorch", device::version())]
    }

    fn threads(&self, spec: &ModelSpec) -> Result<Option<u32>, ModelError> {
        let weights = match spec {
            ModelSpec::LlavaRlhf(spec) => judge_elements(&LlavaRlhfConfig::open(spec)?),
            other => match other.vision_language() {
                Some(spec) => elements(&*architectures::open(&spec.weights)?),
                None => return Ok(None),
            },
        };
        Ok(Some(device::threads_of(weights)))
    }

    fn keep_threads(&self, threads: Option<u32>) {
        device::keep_threads(threads);
    }

    fn gpus(&self) -> Result<Vec<String>, ModelError> {
        device::gpus()
    }

    fn release(&self) {
        shim::empty_cache();
    }

    fn board(&self, place: &RankPlace) -> Result<Box<dyn Board>, ModelError> {
        Ok(Box::new(TcpStore::open(place)?))
    }

    fn peak_device_memory(&self) -> Option<u64> {
        shim::peak_memory()
    }

    fn doctor(&self) -> Vec<Finding> {
        device::doctor()
    }
}

/// The error for a model type that does not support a role. Planning rejects such a use before
/// anything is opened; this covers callers without a plan.
fn unfit(spec: &ModelSpec, role: &str) -> ModelError {
    ModelError::Torch {
        what: format!("opening `{}`", spec.network()),
        problem: format!("this model type cannot {role}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovchat_models::Scripted;

    #[test]
    fn a_model_in_a_role_that_it_cannot_play_is_refused_by_name() {
        let spec = ModelSpec::Scripted(Scripted::default());
        let error = NetLoader.policy(&spec).err().unwrap().to_string();
        assert_eq!(error, "opening `scripted`: this model type cannot answer");
    }
}
