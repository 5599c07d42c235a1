//! The calls of endpoints that a run would make, for `pipeline plan`: their number, and their tokens as
//! far as they are known before a judge is asked.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::failed::Failed;
use ovchat_data::store::RunFolder;
use ovchat_data::tables::{Prompt, Row};
use ovchat_models::Visual;
use ovchat_models::{JudgeInput, JudgePrompt, Mode, RowContext};
use ovchat_pipeline::config::{Plan, PlannedStage};
use ovchat_pipeline::run::Forecast;
use ovchat_pipeline::stages::{ModelName, Shown, StageSpec, TableName};

/// The number of characters that a token of text has, about.
const CHARACTERS: f64 = 4.0;

/// The largest number of prompts whose texts are counted.
const COUNTED_MAX: usize = 1000;

/// The calls that the tables of one stage need.
pub struct JudgeCalls {
    stage: TableName,
    /// The endpoint, as a model of the pipeline.
    endpoint: ModelName,
    /// The number of calls, at most; `None` if the number of answers is not known yet.
    calls: Option<u64>,
    /// The mean tokens of text of a judge prompt without the judged answers, and of images of it;
    /// `None` if the prompts are not loaded yet.
    asked: Option<(f64, f64)>,
    /// The largest number of tokens of a reply.
    reply_max: u32,
}

/// Returns the calls of all stages whose judge is behind an endpoint, and that a run would build.
pub fn of_plan(
    plan: &Plan,
    folder: &Path,
    forecasts: &[Forecast],
) -> Result<Vec<JudgeCalls>, Failed> {
    let run = RunFolder::read(folder).ok();
    let mut all = Vec::new();
    for stage in plan.all() {
        let (judge, prompts, is_pairs) = match &stage.spec {
            StageSpec::Score(score) => (&score.judge, score.prompts.as_ref(), false),
            StageSpec::Compare(compare) => (&compare.judge, None, true),
            _ => continue,
        };
        let endpoint = plan.backing_model(judge);
        let Some(ask) = plan.models[judge].prompt_settings() else {
            continue;
        };
        if plan.models[endpoint].endpoint().is_none() {
            continue;
        }
        let of_stage = forecasts
            .iter()
            .filter(|one| one.table == stage.name && one.is_work());
        let rows: Vec<Option<u64>> = of_stage.map(|one| one.estimate.rows).collect();
        if rows.is_empty() {
            continue;
        }
        let each = match (ask.mode, is_pairs) {
            (Mode::Pairwise | Mode::Against | Mode::Pointwise, true) => 2,
            (Mode::Pairwise, false) => answers_of(plan, stage).saturating_sub(1),
            (Mode::Against | Mode::Pointwise, false) => 1,
        };
        let rows: Option<u64> = rows.into_iter().sum();
        let asked = match (&run, prompts, JudgePrompt::open(ask)) {
            (Some(run), Some(prompts), Ok(judge_prompt)) => {
                asked(run, prompts, plan.round_of(prompts, Some(1)), &judge_prompt)?
            }
            _ => None,
        };
        all.push(JudgeCalls {
            stage: stage.name.clone(),
            endpoint: endpoint.clone(),
            calls: rows.map(|rows| rows * each),
            asked,
            reply_max: ask.max_new_tokens.0.get(),
        });
    }
    Ok(all)
}

/// Returns the number of answers to a prompt that a stage scores.
fn answers_of(plan: &Plan, stage: &PlannedStage) -> u64 {
    let candidates = stage
        .inputs
        .iter()
        .find(|(field, _)| *field == "candidates");
    let sampled = candidates.and_then(|(_, table)| plan.stage(table));
    match sampled.map(|stage| &stage.spec) {
        Some(StageSpec::Sample(sample)) => u64::from(sample.count.get()),
        _ => 2,
    }
}

/// Returns the mean tokens of text, and images, of the judge prompts about a table of prompts; `None`
/// if the table is not there.
fn asked(
    run: &RunFolder,
    prompts: &TableName,
    round: Option<u32>,
    judge_prompt: &JudgePrompt,
) -> Result<Option<(f64, f64)>, Failed> {
    let made = run.manifest().find(prompts.as_str(), round);
    if made.is_none_or(|made| !made.complete) {
        return Ok(None);
    }
    let [mut count, mut characters, mut images] = [0_usize; 3];
    for batch in run.reader(prompts.as_str(), round) {
        let rows =
            Prompt::from_batch(&batch?).map_err(|misfit| Failed::Words(misfit.to_string()))?;
        for row in rows {
            if count == COUNTED_MAX {
                break;
            }
            let shown = Shown::from(&row);
            // Only the number of images counts.
            let prompt = shown.chat_prompt(&row.prompt_id, |id, _| {
                Ok::<_, Failed>(Visual::new(id.to_owned(), [].into()))
            })?;
            let prompt = ovchat_models::ChatPrompt {
                captions: row.captions.clone(),
                answer: row.answer.clone(),
                ..prompt
            };
            let context = RowContext {
                id: row.id.as_deref(),
                kept: row.kept.as_ref().map_or(&[], |kept| &kept.0),
                other: None,
            };
            let input = match judge_prompt.mode {
                Mode::Pointwise => JudgeInput::One(""),
                Mode::Pairwise => JudgeInput::Two("", ""),
                Mode::Against => JudgeInput::Two(
                    judge_prompt.other_answer(&prompt, context).unwrap_or(""),
                    "",
                ),
            };
            // A prompt that cannot be rendered becomes a reject.
            let Ok(asked) = judge_prompt.ask(&prompt, context, input) else {
                continue;
            };
            count += 1;
            let system = asked.system.as_deref().unwrap_or_default();
            characters += asked.question.chars().count() + system.chars().count();
            images += asked
                .images
                .iter()
                .map(|image| image.shown().len())
                .sum::<usize>();
        }
    }
    let mean = |sum: usize| sum as f64 / count as f64;
    Ok((count > 0).then(|| (mean(characters) / CHARACTERS, mean(images))))
}

/// Formats the calls as text.
pub fn render(plan: &Plan, all: &[JudgeCalls]) -> String {
    let mut text = String::new();
    if all.is_empty() {
        return text;
    }
    text.push_str(
        "\ncalls of judges, at most (a request that was answered before is not made again; tokens of text are \
         estimated, without the judged answers)\n",
    );
    let mut totals: BTreeMap<&ModelName, Total> = BTreeMap::new();
    for one in all {
        let calls = one
            .calls
            .map_or_else(|| "?".to_owned(), |calls| calls.to_string());
        let asked = match one.asked {
            None => "prompts are not loaded yet".to_owned(),
            Some((tokens, images)) if images > 0.0 => {
                format!("about {tokens:.0} tokens of text and {images:.1} images each")
            }
            Some((tokens, _)) => format!("about {tokens:.0} tokens of text each"),
        };
        let _ = writeln!(
            text,
            "  {:<24} {calls:>7} calls of {}: {asked}; replies of at most {} tokens",
            one.stage.as_str(),
            one.endpoint,
            one.reply_max
        );
        totals.entry(&one.endpoint).or_default().add(one);
    }
    for (endpoint, total) in totals {
        let _ = writeln!(
            text,
            "  {endpoint}, in all: {}",
            total.in_words(plan, endpoint)
        );
    }
    text
}

/// The calls of an endpoint.
#[derive(Default)]
struct Total {
    calls: u64,
    prompt_tokens: f64,
    reply_tokens: f64,
    is_partial: bool,
}

impl Total {
    fn add(&mut self, one: &JudgeCalls) {
        let Some(calls) = one.calls else {
            self.is_partial = true;
            return;
        };
        self.calls += calls;
        self.is_partial |= one.asked.is_none();
        self.prompt_tokens += one.asked.map_or(0.0, |(tokens, _)| tokens) * calls as f64;
        self.reply_tokens += f64::from(one.reply_max) * calls as f64;
    }

    fn in_words(&self, plan: &Plan, endpoint: &ModelName) -> String {
        let at_least = if self.is_partial { "at least " } else { "" };
        let mut words = format!(
            "{at_least}{} calls, {at_least}{:.0} tokens of text, replies of at most {:.0} tokens",
            self.calls, self.prompt_tokens, self.reply_tokens
        );
        if let Some(spend) = plan.models[endpoint].endpoint().and_then(|http| http.spend) {
            let cost = self.prompt_tokens / 1e6 * spend.per_million_prompt_tokens.get()
                + self.reply_tokens / 1e6 * spend.per_million_reply_tokens.get();
            let _ = write!(
                words,
                "; {cost:.2} at its prices, without images, and at most {} by `spend.limit`",
                spend.limit.get()
            );
        }
        words
    }
}

/// Returns the calls as JSON.
pub fn to_json(all: &[JudgeCalls]) -> Value {
    let one = |one: &JudgeCalls| {
        json!({
            "table": one.stage.as_str(),
            "model": one.endpoint.as_str(),
            "calls": one.calls,
            "prompt_tokens": one.asked.map(|(tokens, _)| tokens),
            "images": one.asked.map(|(_, images)| images),
            "reply_tokens_max": one.reply_max,
        })
    };
    all.iter().map(one).collect()
}
