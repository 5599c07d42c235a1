//! Token counts of prompts, as the networks will see them, for `pipeline plan`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::failed::Failed;
use ovchat_data::store::{Images, RunFolder};
use ovchat_data::tables::{Misfit, Pair, Prompt, Row as _};
use ovchat_models::preprocess::{LlavaRlhfProcessor, Processor};
use ovchat_models::{
    self as models, JudgeInput, JudgePrompt, Mode, ModelSpec, RowFault, SftExample, TrainOn, Visual,
};
use ovchat_pipeline::config::{At, Diagnostic, KeyPath, Plan, PlannedStage};
use ovchat_pipeline::run::{Action, Forecast};
use ovchat_pipeline::stages::{ImageUse, Shown, StageSpec, TableName};

/// The number of rows that are counted: planning should take about a second, and this sample is
/// large enough.
const COUNTED_MAX: usize = 20_000;

/// The number of images that are kept in memory.
const IMAGES_KEPT: usize = 256;

/// The tokens of the rows that a stage reads with a network, including images.
pub struct TokenCounts {
    stage: String,
    /// The kind of row: `prompt` or `pair`.
    row: &'static str,
    rows: usize,
    /// True if there are more rows than were counted.
    is_sample: bool,
    /// True if the run would read exactly these rows.
    is_current: bool,
    sum: usize,
    shortest: usize,
    longest: usize,
    /// The id of the longest row.
    longest_id: String,
    /// The largest number of trained tokens in a row, and the largest share of a row that is
    /// trained.
    learned: usize,
    learned_share: f64,
    /// The number of rows that leave no room for `room` new tokens.
    too_long: usize,
    /// The number of rows that cannot be read.
    faulty: usize,
    /// The id of the first of them, and the reason.
    fault: Option<String>,
    context: usize,
    room: usize,
}

/// The table that a stage reads, and the method of counting it.
struct Reading<'a> {
    table: &'a TableName,
    counter: Counter,
    /// The number of new tokens wanted after the row.
    room: usize,
}

enum Counter {
    /// Prompts to sample from.
    Prompts(Processor),
    /// Judge prompts about prompts, with empty responses.
    Questions(Processor, Box<JudgePrompt>),
    /// SFT examples of a policy.
    Examples(Processor, TrainOn),
    /// SFT examples of the base of a reward model.
    BaseExamples(LlavaRlhfProcessor, TrainOn),
    /// Both responses of a pair, as they are judged: their common prefix counts once.
    Pairs(LlavaRlhfProcessor),
}

/// The tokens of a row.
struct Count {
    /// All tokens that are read.
    tokens: usize,
    /// The number of trained tokens.
    learned: usize,
    /// The number of tokens that the context has to hold.
    longest: usize,
}

impl Count {
    fn of(tokens: usize) -> Self {
        Self {
            tokens,
            learned: 0,
            longest: tokens,
        }
    }
}

/// A row of any of these tables.
struct Counted {
    id: String,
    prompt: models::ChatPrompt,
    answers: Vec<String>,
    kept: Vec<(String, String)>,
}

impl Counted {
    fn context(&self) -> models::RowContext<'_> {
        models::RowContext {
            id: Some(&self.id),
            kept: &self.kept,
            other: None,
        }
    }
}

impl Counter {
    fn context(&self) -> usize {
        match self {
            Self::Prompts(prep) | Self::Questions(prep, _) | Self::Examples(prep, _) => {
                prep.context()
            }
            Self::BaseExamples(prep, _) | Self::Pairs(prep) => prep.context(),
        }
    }

    /// Counts the tokens of a row.
    fn count(&self, row: &Counted) -> Result<Count, RowFault> {
        let example = |learned| SftExample {
            id: &row.id,
            prompt: &row.prompt,
            answer: row.answers.first().map_or("", String::as_str),
            learned,
        };
        let all =
            |places: Vec<std::ops::Range<usize>>| places.iter().map(ExactSizeIterator::len).sum();
        Ok(match self {
            Self::Prompts(prep) => Count::of(prep.count(&row.prompt)?),
            Self::Questions(prep, judge_prompt) => {
                let shown = match judge_prompt.mode {
                    Mode::Pointwise => JudgeInput::One(""),
                    Mode::Pairwise => JudgeInput::Two("", ""),
                    Mode::Against => {
                        let other = judge_prompt.other_answer(&row.prompt, row.context())?;
                        JudgeInput::Two(other, "")
                    }
                };
                Count::of(prep.count(&judge_prompt.ask(&row.prompt, row.context(), shown)?)?)
            }
            Self::Examples(prep, learned) => {
                let (text, places) = prep.spoken(&example(*learned))?;
                Count {
                    learned: all(places),
                    ..Count::of(text.ids.len())
                }
            }
            Self::BaseExamples(prep, learned) => {
                let (text, places) = prep.spoken(&example(*learned))?;
                Count {
                    learned: all(places),
                    ..Count::of(text.ids.len())
                }
            }
            Self::Pairs(prep) => {
                let [chosen, rejected] = [0, 1].map(|answer| {
                    let answer: &String = &row.answers[answer];
                    prep.sequence(&row.prompt, answer)
                });
                let [chosen, rejected] = [chosen?.ids, rejected?.ids];
                let alike = chosen.iter().zip(&rejected);
                let alike = alike.take_while(|(one, other)| one == other).count();
                Count {
                    longest: chosen.len().max(rejected.len()),
                    ..Count::of(chosen.len() + rejected.len() - alike)
                }
            }
        })
    }

    fn rows(
        &self,
        batch: &arrow::array::RecordBatch,
        images: &mut ImageStore,
    ) -> Result<Vec<Counted>, Failed> {
        let misfit = |misfit: Misfit| Failed::Words(misfit.to_string());
        let rows: Vec<(Prompt, Vec<String>)> = if matches!(self, Self::Pairs(_)) {
            let pairs = Pair::from_batch(batch).map_err(misfit)?.into_iter();
            pairs.map(asked_and_answered).collect()
        } else {
            let prompts = Prompt::from_batch(batch).map_err(misfit)?.into_iter();
            let with_answer = |row: Prompt| {
                let answers = row.answer.clone().into_iter().collect();
                (row, answers)
            };
            prompts.map(with_answer).collect()
        };
        let counted = |(row, answers): (Prompt, Vec<String>)| {
            let shown = Shown::from(&row);
            let prompt = shown.chat_prompt(&row.prompt_id, |id, used| images.image(id, used))?;
            Ok(Counted {
                prompt: models::ChatPrompt {
                    captions: row.captions,
                    answer: row.answer,
                    ..prompt
                },
                id: row.id.unwrap_or(row.prompt_id),
                answers,
                kept: row.kept.map(|kept| kept.0).unwrap_or_default(),
            })
        };
        rows.into_iter().map(counted).collect()
    }
}

/// Returns the prompt of a pair, and its responses.
fn asked_and_answered(mut pair: Pair) -> (Prompt, Vec<String>) {
    let answers = [&mut pair.chosen, &mut pair.rejected].map(std::mem::take);
    (pair.into(), answers.into())
}

/// The images of a run; the last ones read are cached, because rows with the same image are
/// adjacent.
struct ImageStore {
    images: Images,
    read: HashMap<String, Visual>,
}

impl ImageStore {
    /// Returns an image; frames without their bytes, because only their number counts.
    fn image(&mut self, id: &str, used: ImageUse) -> Result<Visual, Failed> {
        if used == ImageUse::Frame {
            return Ok(Visual::new(id.to_owned(), [].into()));
        }
        if let Some(image) = self.read.get(id) {
            return Ok(image.clone());
        }
        if self.read.len() >= IMAGES_KEPT {
            self.read.clear();
        }
        let image = Visual::new(id.to_owned(), self.images.bytes(id)?);
        self.read.insert(id.to_owned(), image.clone());
        Ok(image)
    }
}

/// Returns the rows that a stage reads with a network. `None` if they are unknown, or if a folder
/// cannot be read, which `check` reports.
fn reading<'a>(plan: &'a Plan, stage: &'a PlannedStage) -> Option<Reading<'a>> {
    let policy = |spec: &ModelSpec| {
        let opened = spec.clone().opened();
        Processor::open(&opened.vision_language()?.weights).ok()
    };
    let judge = |spec: &ModelSpec| match spec {
        ModelSpec::LlavaRlhf(spec) => LlavaRlhfProcessor::open(spec).ok(),
        _ => None,
    };
    Some(match &stage.spec {
        StageSpec::Sample(sample) => Reading {
            table: &sample.prompts,
            counter: Counter::Prompts(policy(&plan.models[&sample.model])?),
            room: sample.max_new_tokens.get() as usize,
        },
        StageSpec::Score(score) => {
            let prompt_settings = plan.models[&score.judge].prompt_settings()?;
            let backing_model = &plan.models[plan.backing_model(&score.judge)];
            Reading {
                table: score.prompts.as_ref()?,
                counter: {
                    let judge_prompt = JudgePrompt::open(prompt_settings).ok()?;
                    Counter::Questions(policy(backing_model)?, Box::new(judge_prompt))
                },
                // A truncated reply may still be parsed.
                room: 1,
            }
        }
        StageSpec::TrainSft(train) => {
            let spec = &plan.models[&train.model];
            let examples = policy(spec).map(|prep| Counter::Examples(prep, train.answers));
            let base = || Some(Counter::BaseExamples(judge(spec)?, train.answers));
            Reading {
                table: &train.prompts,
                counter: examples.or_else(base)?,
                room: 0,
            }
        }
        StageSpec::TrainReward(train) => Reading {
            table: &train.pairs,
            counter: Counter::Pairs(judge(&plan.models[&train.model])?),
            room: 0,
        },
        _ => return None,
    })
}

/// The number of rows to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// As many as are needed for an estimate.
    Enough,
    /// Up to the first row that fits, for the stages that a run would build: tests whether there is
    /// one.
    UntilOneFits,
}

/// Counts the rows of every stage that reads them with a network, if its input table exists
/// already.
pub fn count(
    plan: &Plan,
    folder: &Path,
    forecasts: &[Forecast],
    extent: Extent,
) -> Result<Vec<TokenCounts>, Failed> {
    let Ok(run) = RunFolder::read(folder) else {
        return Ok(Vec::new());
    };
    let mut images = ImageStore {
        images: Images::open(run.root(), &run.manifest().images)?,
        read: HashMap::new(),
    };
    let mut all = Vec::new();
    let is_made = |stage: &PlannedStage| {
        let mut made = forecasts.iter().filter(|made| made.table == stage.name);
        made.any(Forecast::is_work)
    };
    for stage in plan.all() {
        if extent == Extent::UntilOneFits && !is_made(stage) {
            continue;
        }
        let Some(Reading {
            table,
            counter,
            room,
        }) = reading(plan, stage)
        else {
            continue;
        };
        let round = plan.round_of(table, Some(1));
        let made = run.manifest().find(table.as_str(), round);
        if made.is_none_or(|made| !made.complete) {
            continue;
        }
        let mut tokens = TokenCounts {
            stage: stage.name.to_string(),
            row: if matches!(counter, Counter::Pairs(_)) {
                "pair"
            } else {
                "prompt"
            },
            rows: 0,
            is_sample: false,
            is_current: forecasts.iter().any(|made| {
                made.table == *table && made.round == round && made.action == Action::Reuse
            }),
            sum: 0,
            shortest: usize::MAX,
            longest: 0,
            longest_id: String::new(),
            learned: 0,
            learned_share: 0.0,
            too_long: 0,
            faulty: 0,
            fault: None,
            context: counter.context(),
            room,
        };
        'rows: for batch in run.reader(table.as_str(), round) {
            for row in counter.rows(&batch?, &mut images)? {
                let one_fits = tokens.rows > tokens.too_long;
                if tokens.rows == COUNTED_MAX || (extent == Extent::UntilOneFits && one_fits) {
                    tokens.is_sample = true;
                    break 'rows;
                }
                match counter.count(&row) {
                    Ok(count) => tokens.add(&count, &row.id),
                    Err(fault) => tokens.add_fault(&row.id, &fault),
                }
            }
        }
        if tokens.rows + tokens.faulty > 0 {
            all.push(tokens);
        }
    }
    Ok(all)
}

impl TokenCounts {
    /// Returns true if these are the counts of this stage's input.
    pub fn is_of(&self, stage: &str) -> bool {
        self.stage == stage && self.rows > 0
    }

    /// Returns the number of rows, if all were counted.
    pub fn rows(&self) -> Option<usize> {
        (!self.is_sample).then_some(self.rows)
    }

    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Returns the largest number of trained tokens in a packed batch of `tokens` tokens.
    pub fn learned_of(&self, tokens: usize) -> usize {
        let share = (self.learned_share * tokens as f64) as usize;
        share.max(self.learned)
    }

    /// Describes the longest row.
    pub fn worst(&self) -> String {
        let Self {
            row,
            longest,
            longest_id,
            ..
        } = self;
        format!("the longest {row} is `{longest_id}` with {longest} tokens")
    }

    fn add_fault(&mut self, id: &str, fault: &RowFault) {
        self.faulty += 1;
        self.fault.get_or_insert_with(|| format!("`{id}`: {fault}"));
    }

    /// Describes the rows that cannot be read, if there are any.
    fn faults(&self) -> Option<String> {
        let (count, first) = (self.faulty, self.fault.as_ref()?);
        Some(match count {
            1 => format!(
                "1 {} cannot be read and will be rejected: {first}",
                self.row
            ),
            _ => format!(
                "{count} {}s cannot be read and will be rejected; the first is {first}",
                self.row
            ),
        })
    }

    fn add(&mut self, count: &Count, id: &str) {
        let &Count {
            tokens,
            learned,
            longest,
        } = count;
        self.rows += 1;
        self.sum += tokens;
        self.shortest = self.shortest.min(tokens);
        if tokens > self.longest {
            self.longest = tokens;
            id.clone_into(&mut self.longest_id);
        }
        self.learned = self.learned.max(learned);
        self.learned_share = self
            .learned_share
            .max(learned as f64 / tokens.max(1) as f64);
        self.too_long += usize::from(longest + self.room > self.context);
    }
}

/// Formats one line per stage.
pub fn render(all: &[TokenCounts]) -> String {
    let mut text = String::new();
    for tokens in all {
        let TokenCounts {
            stage,
            row,
            rows,
            shortest,
            longest,
            longest_id,
            too_long,
            context,
            room,
            ..
        } = tokens;
        if text.is_empty() {
            text.push_str("\ntokens per row, including images\n");
        }
        if *rows == 0 {
            let faults = tokens.faults().unwrap_or_default();
            writeln!(text, "  {stage:<20} {faults}").expect(ANY_TEXT);
            continue;
        }
        let of = if tokens.is_sample { "the first " } else { "" };
        let mean = tokens.sum / rows;
        let mut line = format!(
            "  {stage:<20} {of}{rows} {row}s: {shortest} to {longest}, mean {mean}; the longest is \
             `{longest_id}`"
        );
        match (too_long, room) {
            (0, _) => {}
            (_, 0) => write!(
                line,
                "; {too_long} exceed the context of {context} and stop the training"
            )
            .expect(ANY_TEXT),
            _ => write!(
                line,
                "; {too_long} leave no room for {room} new tokens in the context of {context} and will be rejected"
            )
            .expect(ANY_TEXT),
        }
        if let Some(faults) = tokens.faults() {
            write!(line, "; {faults}").expect(ANY_TEXT);
        }
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// Returns diagnostics for stages none of whose rows fits.
pub fn refusals(plan: &Plan, all: &[TokenCounts]) -> Vec<(TableName, Diagnostic)> {
    let known = all
        .iter()
        .filter(|tokens| tokens.is_current && !tokens.is_sample && tokens.rows > 0);
    let hopeless = known.filter(|tokens| tokens.too_long == tokens.rows);
    hopeless
        .filter_map(|tokens| {
            let stage = plan.all().find(|stage| tokens.is_of(stage.name.as_str()))?;
            let TokenCounts {
                row,
                rows,
                shortest,
                context,
                room,
                ..
            } = tokens;
            let message = format!("no {row} of `{}` fits into the context", stage.name);
            let label = match room {
                0 => format!("the shortest of {rows} has {shortest} tokens, and the context is {context}"),
                room => format!(
                    "the shortest of {rows} has {shortest} tokens, which with {room} new tokens exceeds the context of {context}"
                ),
            };
            let help = match stage.spec {
                StageSpec::Sample(_) => {
                    "lower `max_new_tokens`, or use smaller images, fewer frames of videos, or shorter prompts"
                }
                _ => "use smaller images, fewer frames of videos, or shorter texts",
            };
            let diagnostic = Diagnostic::new("plan::context", At::key(KeyPath::default()), message);
            let diagnostic = diagnostic.label(label).help(help).placed(stage.place());
            Some((stage.name.clone(), diagnostic))
        })
        .collect()
}

const ANY_TEXT: &str = "writing to a string does not fail";

/// Returns the counts as JSON.
pub fn to_json(all: &[TokenCounts]) -> Value {
    let one = |tokens: &TokenCounts| {
        json!({
            "table": tokens.stage, "row": tokens.row, "rows": tokens.rows, "all": !tokens.is_sample,
            "shortest": if tokens.rows > 0 { tokens.shortest } else { 0 }, "longest": tokens.longest, "longest_id": tokens.longest_id,
            "sum": tokens.sum, "faulty": tokens.faulty, "fault": tokens.fault, "too_long": tokens.too_long, "context": tokens.context,
        })
    };
    all.iter().map(one).collect()
}
