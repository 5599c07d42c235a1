//! Reference log-probabilities of DPO: those of sampling, audited, or recomputed.

use std::cell::Cell;
use std::path::Path;

use ovchat_data::tables::{DpoStep, Pair, Reference};
use ovchat_models::scripted::{ScriptedJudge, ScriptedPolicy, ScriptedTrainer};
use ovchat_models::{
    DpoSettings, DpoTrainer, Dtype, Finding, Judge, Layout, ModelError, ModelLoader, ModelSpec,
    Opened, Placement, Policy, RewardSettings, RewardTrainer, Room, Scripted, SftSettings,
    SftTrainer,
};
use ovchat_pipeline::run::{Interrupt, Options, run};

use crate::run::{SCRIPTED, rows};
use crate::scene::{Quiet, ROOT, Scene};

/// A loader of test doubles in place of networks, with a given dtype; it counts the policies that
/// it loads.
struct Doubles(Dtype, Cell<usize>);

impl ModelLoader for Doubles {
    fn policy(&self, _: &ModelSpec) -> Opened<dyn Policy> {
        self.1.set(self.1.get() + 1);
        Ok(Box::new(ScriptedPolicy::new(&Scripted::default())))
    }
    fn judge(&self, _: &ModelSpec) -> Opened<dyn Judge> {
        Ok(Box::new(ScriptedJudge))
    }
    fn dpo_trainer(&self, _: &ModelSpec, settings: &DpoSettings) -> Opened<dyn DpoTrainer> {
        let spec = Scripted::default();
        Ok(Box::new(ScriptedTrainer::open(
            &spec,
            &settings.optimization,
        )?))
    }
    fn sft_trainer(&self, _: &ModelSpec, settings: &SftSettings) -> Opened<dyn SftTrainer> {
        let spec = Scripted::default();
        Ok(Box::new(ScriptedTrainer::open(
            &spec,
            &settings.optimization,
        )?))
    }
    fn reward_trainer(
        &self,
        _: &ModelSpec,
        settings: &RewardSettings,
    ) -> Opened<dyn RewardTrainer> {
        let spec = Scripted::default();
        Ok(Box::new(ScriptedTrainer::open(
            &spec,
            &settings.optimization,
        )?))
    }
    fn precision(&self, _: &ModelSpec) -> Result<Dtype, ModelError> {
        Ok(self.0)
    }
    fn placement(&self, _: &ModelSpec) -> Result<Option<Placement>, ModelError> {
        Ok(None)
    }
    /// bfloat16 is a GPU's.
    fn room(&self, _: &ModelSpec) -> Result<Option<Room>, ModelError> {
        Ok(Some(Room {
            on_gpu: self.0 == Dtype::Bfloat16,
            bytes: 1 << 30,
            device: 2 << 30,
        }))
    }
    fn rewrite(
        &self,
        _: &Path,
        _: Option<&Path>,
        _: Option<Layout>,
        _: &Path,
    ) -> Result<(), ModelError> {
        unreachable!("nothing is exported")
    }
    fn build(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
    fn doctor(&self) -> Vec<Finding> {
        Vec::new()
    }
}

/// Runs the pipeline with these training settings, one round of it with test doubles of dtype
/// `precision`.
fn trained_with(settings: &str, precision: Dtype) -> (Scene, Result<(), String>) {
    trained(SCRIPTED, settings, precision)
}

fn trained(pipeline: &str, settings: &str, precision: Dtype) -> (Scene, Result<(), String>) {
    let pipeline = pipeline
        .replace(
            "policy: { scripted: {} }",
            &format!("policy: {{ llava_onevision: {{ weights: {ROOT}/data-samples/policy }} }}"),
        )
        .replace("save_every: 2", settings);
    let scene = Scene::new();
    let file = scene.prompts(12).write("p.yaml", &pipeline).path("p.yaml");
    let plan = ovchat_pipeline::config::load(&file, &["rounds=1".to_owned()], false).unwrap();
    let options = Options {
        folder: scene.path("runs/scripted"),
        until: Some("steps".to_owned().try_into().unwrap()),
        rates: None,
        workers: None,
        take_over: false,
        forecasts: Vec::new(),
        command: "pipeline run p.yaml".to_owned(),
        sets: Vec::new(),
    };
    let doubles = Doubles(precision, Cell::new(0));
    let interrupt = Interrupt::default();
    let ran = run(&plan, &options, Some(&doubles), &mut Quiet, &interrupt);
    (scene, ran.map(|_| ()).map_err(|error| error.to_string()))
}

/// A part on a GPU has as many prompts as fill its batches; a table that is begun keeps its size.
#[test]
fn parts_are_larger_on_a_gpu() {
    for (precision, expected) in [(Dtype::Float32, 64), (Dtype::Bfloat16, 1024 / 5)] {
        let pipeline = SCRIPTED.replacen(", part: 7", "", 1);
        let (scene, ran) = trained(&pipeline, "save_every: 2", precision);
        ran.unwrap();
        let manifest = std::fs::read(scene.path("runs/scripted/manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let tables = manifest["made"].as_array().unwrap();
        let candidates = tables.iter().find(|made| made["table"] == "candidates");
        assert_eq!(
            candidates.unwrap()["part_groups"],
            expected,
            "{precision:?}"
        );
    }
}

#[test]
fn log_probabilities_of_sampling_are_the_reference_and_are_audited() {
    for precision in [Dtype::Float32, Dtype::Bfloat16] {
        for (share, computed) in [("0", 0), ("1", 12)] {
            let settings = format!("reference_audit: {{ share: {share} }}");
            let (scene, ran) = trained_with(&settings, precision);
            ran.unwrap();
            let references: Vec<Reference> = rows(&scene, "steps_reference", Some(1));
            assert_eq!(references.len(), computed);
            let drifts = references.iter().map(|row| row.drift.unwrap());
            assert!(drifts.fold(0.0, f64::max) < 1e-5);
        }
    }
}

#[test]
fn log_probabilities_that_are_not_those_of_the_reference_stop_the_training() {
    let scene = Scene::new();
    let pipeline = SCRIPTED.replace(
        "  steps:\n    train_dpo: { pairs: pairs, model: policy, save_every: 2 }",
        "  other:\n    sql:\n      tables: [pairs]\n      query: >\n        select * exclude (chosen_logp), \
         chosen_logp - 20.0 as chosen_logp from pairs\n  steps:\n    train_dpo: { pairs: other, model: \
         policy, reference_audit: { share: 1 } }",
    );
    let failed = scene
        .prompts(12)
        .write("p.yaml", &pipeline)
        .pipeline(&["run", "p.yaml"]);
    assert_eq!(failed.code, Some(1), "{}", failed.err);
    for words in ["reference_audit.drift_max", "per token"] {
        assert!(failed.err.contains(words), "{}", failed.err);
    }
}

#[test]
fn without_a_reference_none_is_computed() {
    for (settings, made) in [
        ("loss: simpo", false),
        ("reference: none", false),
        ("reference: initial, reference_audit: { share: 1 }", true),
        (
            "loss: { sigmoid: 1, sft: 0.2 }, reference_audit: { share: 1 }",
            true,
        ),
    ] {
        let (scene, ran) = trained_with(settings, Dtype::Float32);
        ran.unwrap();
        let folder = scene.path("runs/scripted/steps_reference");
        assert_eq!(folder.is_dir(), made, "{settings}");
    }
}

/// In the second round the model is no longer the initial one, so sampling does not give the
/// log-probabilities of the reference.
#[test]
fn the_initial_model_stays_the_reference_in_later_rounds() {
    let scene = Scene::new();
    let pipeline = SCRIPTED.replace(
        "save_every: 2",
        "reference: initial, reference_audit: { share: 0 }",
    );
    scene
        .prompts(12)
        .write("p.yaml", &pipeline)
        .succeeds(&["run", "p.yaml"]);
    let computed = |round| rows::<Reference>(&scene, "steps_reference", Some(round));
    assert_eq!(computed(1).len(), 0);
    let pairs: Vec<Pair> = rows(&scene, "pairs", Some(2));
    assert_eq!(computed(2).len(), pairs.len());
    assert!(computed(2).iter().all(|row| row.drift.is_none()));
}

#[test]
fn pairs_of_similar_length_are_grouped_when_asked_for() {
    let scene = Scene::new();
    let pipeline = SCRIPTED.replace("save_every: 2", "group_by_length: true, batch_pairs: 4");
    scene
        .prompts(40)
        .write("p.yaml", &pipeline)
        .succeeds(&["run", "p.yaml", "--set", "rounds=1"]);
    let tokens: Vec<i64> = rows::<DpoStep>(&scene, "steps", Some(1))
        .iter()
        .map(|step| step.tokens)
        .collect();
    // The longest come first; the last step may have fewer pairs.
    assert!(
        tokens.len() > 5 && tokens.is_sorted_by(|a, b| a >= b),
        "{tokens:?}"
    );
}

#[test]
fn a_policy_that_judges_its_own_answers_is_opened_once() {
    let verdict = "^(?<better_first>[a-l])|^(?<better_second>[m-z])|^(?<tie>$)";
    let own = format!("judge: {{ self: {{ model: policy, ask: {{ verdict: \"{verdict}\" }} }} }}");
    let policy =
        format!("policy: {{ llava_onevision: {{ weights: {ROOT}/data-samples/policy }} }}");
    let pipeline = SCRIPTED
        .replace("policy: { scripted: {} }", &policy)
        .replace("judge: { scripted: {} }", &own);
    let (pipeline, _) = pipeline.split_once("evaluate:").unwrap();
    let scene = Scene::new();
    let file = scene.prompts(6).write("p.yaml", pipeline).path("p.yaml");
    let plan = ovchat_pipeline::config::load(&file, &["rounds=1".to_owned()], false).unwrap();
    let options = Options {
        folder: scene.path("runs/scripted"),
        until: Some("rewards".to_owned().try_into().unwrap()),
        rates: None,
        workers: None,
        take_over: false,
        forecasts: Vec::new(),
        command: "pipeline run p.yaml".to_owned(),
        sets: Vec::new(),
    };
    let doubles = Doubles(Dtype::Float32, Cell::new(0));
    let interrupt = Interrupt::default();
    run(&plan, &options, Some(&doubles), &mut Quiet, &interrupt).unwrap();
    assert_eq!(doubles.1.get(), 1);
}
