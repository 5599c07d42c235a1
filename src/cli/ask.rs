//! `pipeline ask`: the answers of a run's model to a question, after some of its rounds.

use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::engine;
use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::{Output, line};
use ovchat_data::store::RunFolder;
use ovchat_io::files;
use ovchat_io::visible::visible_in_place;
use ovchat_models::{
    ChatPrompt, Generation, ModelError, ModelLoader, ModelSpec, Role, RowFault, Sampling, Visual,
};
use ovchat_pipeline::config::{Plan, load};

/// Ask a run's model a question about images, before and after its training.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline ask small-world --image cat.jpg \"What is in the image?\"\n  \
    pipeline ask small-world --image cat.jpg \"What is in the image?\" --rounds 0,1,3"
)]
pub struct Ask {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The question.
    question: String,
    /// An image file; can be repeated.
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The rounds whose model answers; 0 is the model before training [default: 0 and the last one].
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    rounds: Vec<u32>,
    /// The model, if the run has several that answer.
    #[arg(long)]
    model: Option<String>,
    /// The maximum length of an answer, in tokens.
    #[arg(long, default_value = "512")]
    max_new_tokens: NonZeroU32,
    #[command(flatten)]
    output: Output,
}

impl Ask {
    pub fn run(&self, loader: Option<&dyn ModelLoader>) -> Result<(), Failed> {
        let Some(loader) = loader else {
            return Err(engine::become_it());
        };
        let run = read_run(&run_folder(&self.run))?;
        let plan = plan_of(&run)?;
        let (name, spec) = self.model(&plan)?;
        let specs = self.specs(&run, name, spec)?;
        let prompt = self.prompt()?;
        let mut answers = Vec::new();
        for (round, spec) in specs {
            let answer = self.answer(loader, &spec, &prompt)?;
            if self.output.is_json() {
                answers.push(json!({ "round": round, "answer": answer.text, "tokens": answer.token_ids.len() }));
                continue;
            }
            line(format_args!(
                "round {round}\n{}\n",
                visible_in_place(&answer.text)
            ))?;
        }
        if self.output.is_json() {
            line(format_args!("{:#}", json!(answers)))?;
        }
        Ok(())
    }

    /// Returns the model that answers.
    fn model<'p>(&self, plan: &'p Plan) -> Result<(&'p str, &'p ModelSpec), Failed> {
        let able = plan
            .models
            .iter()
            .filter(|(_, spec)| spec.vision_language().is_some() && spec.can(Role::Answers));
        let able: Vec<(&str, &ModelSpec)> =
            able.map(|(name, spec)| (name.as_str(), spec)).collect();
        let names = || {
            able.iter()
                .map(|(name, _)| *name)
                .collect::<Vec<_>>()
                .join(", ")
        };
        match (&self.model, &able[..]) {
            (Some(name), _) => {
                let found = able.iter().find(|(own, _)| own == name).copied();
                found.ok_or_else(|| {
                    Failed::Usage(format!(
                        "--model: `{name}` does not answer prompts; available models: {}",
                        names()
                    ))
                })
            }
            (None, [one]) => Ok(*one),
            (None, []) => Err(Failed::Words(
                "the run has no model with weights that answers prompts".to_owned(),
            )),
            (None, _) => Err(Failed::Usage(format!(
                "the run has several models; choose one with --model: {}",
                names()
            ))),
        }
    }

    /// Returns the model as it is after each of the rounds.
    fn specs(
        &self,
        run: &RunFolder,
        name: &str,
        spec: &ModelSpec,
    ) -> Result<Vec<(u32, ModelSpec)>, Failed> {
        let mut trained: Vec<(u32, &str)> = Vec::new();
        for made in run.manifest().made.iter().filter(|made| made.complete) {
            if let (Some(round), Some(checkpoint)) = (made.round, &made.checkpoint)
                && checkpoint.model == name
            {
                trained.push((round, &checkpoint.folder));
            }
        }
        trained.sort_by_key(|(round, _)| *round);
        let last = trained.last().map_or(0, |(round, _)| *round);
        let mut rounds = self.rounds.clone();
        if rounds.is_empty() {
            rounds = vec![0, last];
            rounds.dedup();
        }
        let spec_of = |round: u32| {
            if round > 0 && !trained.iter().any(|(own, _)| *own == round) {
                return Err(Failed::Usage(format!(
                    "--rounds: `{name}` was not trained in round {round}; its last round is {last}"
                )));
            }
            // Each training may have written another part of the model.
            let until = trained.iter().take_while(|(own, _)| *own <= round);
            let of_round = until.fold(spec.clone(), |spec, (_, folder)| {
                spec.with_checkpoint(&run.root().join(folder))
            });
            Ok((round, of_round))
        };
        rounds.into_iter().map(spec_of).collect()
    }

    fn prompt(&self) -> Result<ChatPrompt, Failed> {
        let image = |path: &PathBuf| {
            let bytes = files::read(path).map_err(|error| {
                Failed::Words(format!("cannot read image {}: {error}", path.display()))
            })?;
            // An error names the image by this id.
            Ok(Visual::new(path.display().to_string(), bytes.into()))
        };
        Ok(ChatPrompt {
            id: "the question".to_owned(),
            images: self
                .image
                .iter()
                .map(image)
                .collect::<Result<_, Failed>>()?,
            places: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: self.question.clone(),
            captions: None,
            answer: None,
            seed: 0,
        })
    }

    /// Returns the greedy answer of a model.
    fn answer(
        &self,
        loader: &dyn ModelLoader,
        spec: &ModelSpec,
        prompt: &ChatPrompt,
    ) -> Result<Generation, Failed> {
        let failed = |error: ModelError| Failed::Words(error.to_string());
        let how = Sampling {
            count: 1,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens: self.max_new_tokens.get() as usize,
            stop_strings: Vec::new(),
            stop_token_ids: Vec::new(),
        };
        let mut policy = loader.policy(spec).map_err(failed)?;
        let mut answered: Option<Result<Vec<Generation>, RowFault>> = None;
        let prompts = std::slice::from_ref(prompt);
        let sampled = policy.sample(prompts, &how, &mut |_, answers| {
            answered = Some(answers);
            ControlFlow::Continue(())
        });
        sampled.map_err(failed)?;
        match answered {
            Some(Ok(mut answers)) if !answers.is_empty() => Ok(answers.remove(0)),
            Some(Err(RowFault(reason))) => Err(Failed::Words(reason)),
            _ => Err(Failed::Words("interrupted".to_owned())),
        }
    }
}

/// Returns the plan of the pipeline file that a run was made with.
fn plan_of(run: &RunFolder) -> Result<Plan, Failed> {
    let source = &run.manifest().source;
    let Some(file) = source["file"].as_str() else {
        return Err(Failed::Words(format!(
            "{} does not say which pipeline file it was made with; run the pipeline once more",
            run.root().display()
        )));
    };
    let sets = source["last"]["sets"].as_array().into_iter().flatten();
    let sets: Vec<String> = sets
        .filter_map(|set| set.as_str().map(str::to_owned))
        .collect();
    Ok(load(Path::new(file), &sets, true)?)
}
