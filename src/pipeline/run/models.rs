//! The models of a stage in a round: opened on first use, closed when the stage is done.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

use super::sql_judge::SqlJudge;
use crate::stages::{Failure, ModelName, ModelState, Models};
use ovchat_io::mask::Mask;
use ovchat_models::preprocess::Processor;
use ovchat_models::scripted::{ScriptedPolicy, ScriptedTrainer};
use ovchat_models::{
    CaptionPermutations, ChatPrompt, Critic, DpoSettings, DpoTrainer, Emit, Generation, HttpWriter,
    Judge, JudgePromptSettings, Mode, ModelError, ModelLoader, ModelSpec, ModelTelemetry, Opened,
    Optimization, Policy, PolicyWriter, RewardSettings, RewardTrainer, RowFault, Sampling,
    SftSettings, SftTrainer, Writer,
};

/// A model, ready to be opened for a stage.
pub struct Ready {
    /// The spec to open, with this run's checkpoints in place of the pipeline's weights.
    pub spec: ModelSpec,
    /// The name of the model that produces its replies, if it scores in text; else its own.
    pub backing_model: ModelName,
    /// The judge prompt settings, if the model scores in text.
    pub prompt_settings: Option<JudgePromptSettings>,
    /// The fingerprint of everything that affects its output.
    pub fingerprint: String,
}

/// The policy that is open; the next stage may reuse it, so that a model that answers and then
/// judges its own answers is loaded only once.
#[derive(Clone, Default)]
pub struct Kept(Rc<RefCell<Option<(ModelSpec, SharedPolicy)>>>);

/// A policy that several users share, one after the other.
#[derive(Clone)]
struct SharedPolicy(Rc<RefCell<Box<dyn Policy>>>);

impl Policy for SharedPolicy {
    fn sample(
        &mut self,
        prompts: &[ChatPrompt],
        how: &Sampling,
        emit: Emit<'_, Vec<Generation>>,
    ) -> Result<ModelTelemetry, ModelError> {
        self.0.borrow_mut().sample(prompts, how, emit)
    }

    fn plan(&self) -> Option<String> {
        self.0.borrow().plan()
    }
}

/// The models of one stage in one round.
pub struct RunModels<'a> {
    loader: Option<&'a dyn ModelLoader>,
    /// The folder of the call logs of models behind endpoints.
    calls: PathBuf,
    /// The secrets that are masked in call logs.
    mask: Mask,
    models: HashMap<(ModelName, ModelState), Ready>,
    kept: Kept,
    policy: Option<(ModelName, Box<dyn Policy>)>,
    judge: Option<(ModelName, Box<dyn Judge>)>,
    prep: Option<(ModelName, Processor)>,
}

impl<'a> RunModels<'a> {
    pub fn new(
        loader: Option<&'a dyn ModelLoader>,
        models: HashMap<(ModelName, ModelState), Ready>,
        calls: PathBuf,
        mask: Mask,
        kept: Kept,
    ) -> Self {
        Self {
            loader,
            calls,
            mask,
            kept,
            models,
            policy: None,
            judge: None,
            prep: None,
        }
    }

    fn spec(&self, model: &ModelName) -> &ModelSpec {
        self.spec_in(model, ModelState::Now)
    }

    fn spec_in(&self, model: &ModelName, state: ModelState) -> &ModelSpec {
        &self.models[&(model.clone(), state)].spec
    }

    /// Opens a trainer: the scripted one, or the loader's.
    fn trainer<L: ?Sized>(
        &self,
        model: &ModelName,
        state: ModelState,
        optimization: &Optimization,
        scripted: impl FnOnce(ScriptedTrainer) -> Box<L>,
        open: impl FnOnce(&dyn ModelLoader, &ModelSpec) -> Opened<L>,
    ) -> Result<Box<L>, Failure> {
        self.close();
        let trainer: Result<Box<L>, ModelError> = match self.spec_in(model, state) {
            ModelSpec::Scripted(spec) => ScriptedTrainer::open(spec, optimization).map(scripted),
            spec => open(self.loader(model)?, spec),
        };
        trainer.map_err(Failure::of(model))
    }

    /// Opens the writer that produces a judge's replies.
    fn writer(
        &self,
        model: &ModelName,
        prompt_settings: &JudgePromptSettings,
    ) -> Result<Box<dyn Writer>, Failure> {
        if let Some(http) = self.spec(model).endpoint() {
            let mut http = http.clone();
            http.ask.clone_from(prompt_settings);
            // Judges of one endpoint share its call log, and so its spending limit.
            let writer = &self.models[&(model.clone(), ModelState::Now)].backing_model;
            let journal = self.calls.join(format!("{writer}.jsonl"));
            let writer = HttpWriter::open(&http, &journal, self.mask.clone());
            return Ok(Box::new(writer.map_err(Failure::of(model))?));
        }
        let policy = self.open_policy(model)?;
        Ok(Box::new(PolicyWriter::new(policy, prompt_settings)))
    }

    fn open_judge(&self, model: &ModelName) -> Result<Box<dyn Judge>, Failure> {
        let ready = &self.models[&(model.clone(), ModelState::Now)];
        if let Some(prompt_settings) = &ready.prompt_settings {
            let writer = self.writer(model, prompt_settings)?;
            let critic = Critic::open(writer, prompt_settings);
            let failed = |problem| Failure::Other(format!("model `{model}`: {problem}"));
            return Ok(Box::new(critic.map_err(failed)?));
        }
        let spec = &ready.spec;
        if let Some(judge) = spec.judge_by_rule() {
            return Ok(judge);
        }
        if let ModelSpec::Sql(spec) = spec {
            return Ok(Box::new(SqlJudge::new(spec)));
        }
        self.close();
        let judge = self.loader(model)?.judge(spec);
        let judge = judge.map_err(Failure::of(model))?;
        Ok(match spec {
            ModelSpec::LlavaRlhf(spec) if spec.caption_orders.get() > 1 => {
                Box::new(CaptionPermutations::new(judge, spec.caption_orders))
            }
            _ => judge,
        })
    }

    /// Opens a policy, or returns the open one. Closes any other open policy first.
    fn open_policy(&self, model: &ModelName) -> Result<Box<dyn Policy>, Failure> {
        let spec = self.spec(model);
        if let ModelSpec::Scripted(spec) = spec {
            return Ok(Box::new(ScriptedPolicy::new(spec)));
        }
        let mut kept = self.kept.0.borrow_mut();
        if let Some((open, policy)) = &*kept
            && open == spec
        {
            return Ok(Box::new(policy.clone()));
        }
        *kept = None;
        let opened = self
            .loader(model)?
            .policy(spec)
            .map_err(Failure::of(model))?;
        let policy = SharedPolicy(Rc::new(RefCell::new(opened)));
        *kept = Some((spec.clone(), policy.clone()));
        Ok(Box::new(policy))
    }

    /// Closes the policy that an earlier stage left open: only one model fits at a time.
    fn close(&self) {
        self.kept.0.take();
    }

    fn loader(&self, model: &ModelName) -> Result<&'a dyn ModelLoader, Failure> {
        self.loader.ok_or_else(|| {
            Failure::Other(format!(
                "model `{model}` is a network, but this program was built without networks; \
                 build it with the feature `torch`"
            ))
        })
    }
}

impl Models for RunModels<'_> {
    fn policy(&mut self, model: &ModelName) -> Result<&mut dyn Policy, Failure> {
        if self.policy.as_ref().is_none_or(|(open, _)| open != model) {
            self.policy = None;
            self.policy = Some((model.clone(), self.open_policy(model)?));
        }
        Ok(&mut *self.policy.as_mut().expect("just opened").1)
    }

    fn judge(&mut self, model: &ModelName) -> Result<&mut dyn Judge, Failure> {
        if self.judge.as_ref().is_none_or(|(open, _)| open != model) {
            self.judge = None;
            self.judge = Some((model.clone(), self.open_judge(model)?));
        }
        Ok(&mut *self.judge.as_mut().expect("just opened").1)
    }

    fn dpo_trainer(
        &mut self,
        model: &ModelName,
        settings: &DpoSettings,
    ) -> Result<Box<dyn DpoTrainer>, Failure> {
        self.trainer(
            model,
            ModelState::Now,
            &settings.optimization,
            |trainer| Box::new(trainer) as Box<dyn DpoTrainer>,
            |loader, spec| loader.dpo_trainer(spec, settings),
        )
    }

    fn reference(
        &mut self,
        model: &ModelName,
        state: ModelState,
        settings: &DpoSettings,
    ) -> Result<Box<dyn DpoTrainer>, Failure> {
        self.trainer(
            model,
            state,
            &settings.optimization,
            |trainer| Box::new(trainer) as Box<dyn DpoTrainer>,
            |loader, spec| loader.dpo_trainer(spec, settings),
        )
    }

    fn sft_trainer(
        &mut self,
        model: &ModelName,
        settings: &SftSettings,
    ) -> Result<Box<dyn SftTrainer>, Failure> {
        self.trainer(
            model,
            ModelState::Now,
            &settings.optimization,
            |trainer| Box::new(trainer) as Box<dyn SftTrainer>,
            |loader, spec| loader.sft_trainer(spec, settings),
        )
    }

    fn reward_trainer(
        &mut self,
        model: &ModelName,
        settings: &RewardSettings,
    ) -> Result<Box<dyn RewardTrainer>, Failure> {
        self.trainer(
            model,
            ModelState::Now,
            &settings.optimization,
            |trainer| Box::new(trainer) as Box<dyn RewardTrainer>,
            |loader, spec| loader.reward_trainer(spec, settings),
        )
    }

    fn compares(&self, model: &ModelName) -> bool {
        let prompt_settings = &self.models[&(model.clone(), ModelState::Now)].prompt_settings;
        prompt_settings
            .as_ref()
            .is_some_and(|prompt_settings| prompt_settings.mode == Mode::Pairwise)
    }

    fn fingerprint(&self, model: &ModelName, state: ModelState) -> &str {
        &self.models[&(model.clone(), state)].fingerprint
    }

    fn fits(
        &mut self,
        model: &ModelName,
        prompt: &ChatPrompt,
        answer_tokens: usize,
    ) -> Result<Result<(), RowFault>, Failure> {
        let Some(spec) = self.spec(model).vision_language() else {
            return Ok(Ok(()));
        };
        if self.prep.as_ref().is_none_or(|(open, _)| open != model) {
            let prep =
                Processor::open(&spec.weights).map_err(|error| Failure::of(model)(error.into()))?;
            self.prep = Some((model.clone(), prep));
        }
        let prep = &self.prep.as_ref().expect("just opened").1;
        let context = prep.context();
        Ok(prep.count(prompt).and_then(|tokens| {
            if tokens + answer_tokens <= context {
                return Ok(());
            }
            Err(RowFault(format!(
                "the prompt has {tokens} tokens, which with max_new_tokens {answer_tokens} exceeds the model's \
                 context of {context}; use a smaller image, fewer frames of a video, or a shorter text"
            )))
        }))
    }
}
