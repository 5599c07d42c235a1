//! The models as they are in a round: opened when a stage asks, dropped when it is done.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::config::Plan;
use crate::models::scripted::{ScriptedJudge, ScriptedLearner, ScriptedPolicy};
use crate::models::{
    Judge, Learner, ModelLoader, ModelSpec, Policy, Prompt, RowFault, TrainSettings,
};
use crate::prep::PolicyPrep;
use crate::stages::{Failure, ModelName, Models};

/// The models of one stage in one round.
pub struct RunModels<'a> {
    plan: &'a Plan,
    loader: Option<&'a dyn ModelLoader>,
    fingerprints: HashMap<ModelName, String>,
    /// Checkpoints of this run that take the place of the pipeline's weights.
    weights: HashMap<ModelName, PathBuf>,
    policy: Option<(ModelName, Box<dyn Policy>)>,
    judge: Option<(ModelName, Box<dyn Judge>)>,
    prep: Option<(ModelName, PolicyPrep)>,
}

impl<'a> RunModels<'a> {
    pub fn new(
        plan: &'a Plan,
        loader: Option<&'a dyn ModelLoader>,
        fingerprints: HashMap<ModelName, String>,
        weights: HashMap<ModelName, PathBuf>,
    ) -> Self {
        Self {
            plan,
            loader,
            fingerprints,
            weights,
            policy: None,
            judge: None,
            prep: None,
        }
    }

    fn spec(&self, model: &ModelName) -> &'a ModelSpec {
        &self.plan.models[model]
    }

    fn loader(&self, model: &ModelName) -> Result<&'a dyn ModelLoader, Failure> {
        self.loader.ok_or_else(|| {
            Failure::Other(format!(
                "model `{model}` is a network, and this program was built without networks; \
                 build it with the feature `torch`"
            ))
        })
    }
}

impl Models for RunModels<'_> {
    fn policy(&mut self, model: &ModelName) -> Result<&mut dyn Policy, Failure> {
        if self.policy.as_ref().is_none_or(|(open, _)| open != model) {
            self.policy = None;
            let policy: Box<dyn Policy> = match self.spec(model) {
                ModelSpec::Scripted(spec) => Box::new(ScriptedPolicy::new(spec)),
                spec => {
                    let weights = self.weights.get(model).map(PathBuf::as_path);
                    self.loader(model)?
                        .policy(spec, weights)
                        .map_err(Failure::of(model))?
                }
            };
            self.policy = Some((model.clone(), policy));
        }
        Ok(&mut *self.policy.as_mut().expect("just opened").1)
    }

    fn judge(&mut self, model: &ModelName) -> Result<&mut dyn Judge, Failure> {
        if self.judge.as_ref().is_none_or(|(open, _)| open != model) {
            self.judge = None;
            let judge: Box<dyn Judge> = match self.spec(model) {
                ModelSpec::Scripted(_) => Box::new(ScriptedJudge),
                spec => self
                    .loader(model)?
                    .judge(spec)
                    .map_err(Failure::of(model))?,
            };
            self.judge = Some((model.clone(), judge));
        }
        Ok(&mut *self.judge.as_mut().expect("just opened").1)
    }

    fn learner(
        &mut self,
        model: &ModelName,
        settings: &TrainSettings,
    ) -> Result<Box<dyn Learner>, Failure> {
        let weights = self.weights.get(model).map(PathBuf::as_path);
        match self.spec(model) {
            ModelSpec::Scripted(_) => {
                let learner =
                    ScriptedLearner::open(weights, settings).map_err(Failure::of(model))?;
                Ok(Box::new(learner))
            }
            spec => self
                .loader(model)?
                .learner(spec, weights, settings)
                .map_err(Failure::of(model)),
        }
    }

    fn fingerprint(&self, model: &ModelName) -> &str {
        &self.fingerprints[model]
    }

    fn fits(
        &mut self,
        model: &ModelName,
        prompt: &Prompt,
        answer_tokens: usize,
    ) -> Result<Result<(), RowFault>, Failure> {
        let ModelSpec::LlavaOnevision(spec) = self.spec(model) else {
            return Ok(Ok(()));
        };
        if self.prep.as_ref().is_none_or(|(open, _)| open != model) {
            let folder = self.weights.get(model).unwrap_or(&spec.weights);
            let prep =
                PolicyPrep::open(folder).map_err(|error| Failure::of(model)(error.into()))?;
            self.prep = Some((model.clone(), prep));
        }
        let prep = &self.prep.as_ref().expect("just opened").1;
        let context = prep.context();
        Ok(prep.count(prompt).and_then(|tokens| {
            if tokens + answer_tokens <= context {
                return Ok(());
            }
            Err(RowFault(format!(
                "the prompt has {tokens} tokens; with max_new_tokens {answer_tokens} it does not fit into \
                 the model's context of {context}; use a smaller picture or a shorter text"
            )))
        }))
    }
}
