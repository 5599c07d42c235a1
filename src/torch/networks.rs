//! The list of vision-language networks, and opening them from checkpoints.

use tch::{Device, Kind};

use super::checkpoint::{Checkpoint, HEAD, Parts, Purpose, Reader};
use super::error::refuse;
use super::layers::WeightSource;
use super::llava::Llava;
use super::llava_onevision::LlavaOnevision;
use super::lora::{Adapter, Merged, Names};
use super::optimizer::Parameter;
use super::vlm::VisionLanguageModel;
use ovchat_models::checkpoint::AdapterConfig;
use ovchat_models::{Architecture, ModelError, Part, VisionLanguageSpec, architectures};

/// Builds the network of an architecture from the weights of `source`, to compute in dtype `kind`.
/// With `tied`, the embedding is also the head.
pub fn build(
    architecture: &dyn Architecture,
    source: &dyn WeightSource,
    tied: bool,
    kind: Kind,
) -> Result<Box<dyn VisionLanguageModel>, ModelError> {
    let own = architecture.as_any();
    if let Some(own) = own.downcast_ref::<architectures::llava_onevision::LlavaOnevision>() {
        return Ok(Box::new(LlavaOnevision::new(
            source,
            &own.config,
            tied,
            kind,
        )?));
    }
    if let Some(own) = own.downcast_ref::<architectures::llava::Llava>() {
        return Ok(Box::new(Llava::new(source, &own.config, tied, kind)?));
    }
    Err(ModelError::Torch {
        what: format!("opening `{}`", architecture.name()),
        problem: "this architecture has no network".to_owned(),
    })
}

/// Loads a network from `checkpoint`; returns the parameters that are trained, too.
pub fn open(
    architecture: &dyn Architecture,
    checkpoint: &Checkpoint,
    device: Device,
    kind: Kind,
    purpose: Purpose,
) -> Result<(Box<dyn VisionLanguageModel>, Vec<Parameter>), ModelError> {
    let reader = Reader::new(checkpoint, device, kind, purpose);
    let tied = is_tied(checkpoint, architecture);
    let network = build(architecture, &reader, tied, kind)?;
    Ok((network, reader.into_parameters()))
}

/// Loads the network of a spec for inference, with its adapter, if any, merged.
pub fn open_merged(
    spec: &VisionLanguageSpec,
    architecture: &dyn Architecture,
    checkpoint: &Checkpoint,
    device: Device,
    kind: Kind,
) -> Result<Box<dyn VisionLanguageModel>, ModelError> {
    let base = Reader::new(checkpoint, device, kind, Purpose::Inference);
    let tied = is_tied(checkpoint, architecture);
    let Some(folder) = &spec.adapter else {
        return build(architecture, &base, tied, kind);
    };
    let adapter = Adapter::open(&AdapterConfig::open(folder)?, Names::Transformers)?;
    let merged = Merged {
        base,
        adapter: &adapter,
    };
    let network = build(architecture, &merged, tied, kind)?;
    adapter.all_used()?;
    Ok(network)
}

/// True if the checkpoint's embedding is also its head.
pub fn is_tied(checkpoint: &Checkpoint, architecture: &dyn Architecture) -> bool {
    architecture.text_config().tie_word_embeddings || !checkpoint.has(HEAD)
}

/// Refuses to train parts that an architecture does not have. All parts together are those that it
/// has.
pub fn has_parts(
    spec: &VisionLanguageSpec,
    architecture: &dyn Architecture,
    parts: Parts,
) -> Result<(), ModelError> {
    let all = Parts::which(|_| true);
    let missing = |part: &&Part| parts.has(**part) && !architecture.parts().contains(part);
    match Part::ALL.iter().find(missing) {
        Some(part) if parts != all => {
            let part = serde_json::to_value(part).expect("plain data");
            let problem = format!(
                "`{}` has no part {part} to train; remove it from `train`",
                architecture.name()
            );
            Err(refuse(&spec.weights, problem))
        }
        _ => Ok(()),
    }
}
