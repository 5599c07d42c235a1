//! How many tokens prompts take, counted as the networks will, for `pipeline plan`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::Failed;
use ovchat_data::store::{Images, RunFolder};
use ovchat_data::tables::{Misfit, Pair, Prompt, Row as _};
use ovchat_models::preprocess::{LlavaOnevisionProcessor, LlavaRlhfProcessor};
use ovchat_models::{
    self as models, EncodedImage, JudgeInput, JudgePrompt, Mode, ModelSpec, RowFault, SftExample,
    TrainOn,
};
use ovchat_pipeline::config::{At, Diagnostic, KeyPath, Plan, PlannedStage};
use ovchat_pipeline::run::{Action, Forecast};
use ovchat_pipeline::stages::{StageSpec, TableName, turns};

/// Rows that are counted; a plan should take a second, and the first so many tell enough.
const COUNTED_MAX: usize = 20_000;

/// Pictures that are kept in memory.
const IMAGES_KEPT: usize = 256;

/// The tokens of the rows that a stage reads with a network, pictures included.
pub struct TokenCounts {
    stage: String,
    /// What a row is: `prompt` or `pair`.
    row: &'static str,
    rows: usize,
    /// Whether there are more rows than were counted.
    is_sample: bool,
    /// Whether the run would read these very rows.
    is_current: bool,
    sum: usize,
    shortest: usize,
    longest: usize,
    /// The id of the longest.
    longest_id: String,
    /// The most that are learned of one, and the largest share of one that is.
    learned: usize,
    learned_share: f64,
    /// Rows that leave no room for an answer of `room` tokens.
    too_long: usize,
    context: usize,
    room: usize,
}

/// What a stage reads, and how it is counted.
struct Reading<'a> {
    table: &'a TableName,
    counter: Counter,
    /// Tokens that are wanted behind it.
    room: usize,
}

enum Counter {
    /// Prompts that are answered.
    Prompts(LlavaOnevisionProcessor),
    /// What is written about prompts and answers of no tokens.
    Questions(LlavaOnevisionProcessor, Box<JudgePrompt>),
    /// Answers that are learned.
    Lessons(LlavaOnevisionProcessor, TrainOn),
    /// The same, by the base of a reward model.
    BaseLessons(LlavaRlhfProcessor, TrainOn),
    /// Both answers of a pair, as they are judged: what they begin with alike counts once.
    Pairs(LlavaRlhfProcessor),
}

/// The tokens of a row.
struct Count {
    /// All that are read.
    tokens: usize,
    /// How many of them are learned.
    learned: usize,
    /// Those that the context has to hold.
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

/// A row, whatever its table.
struct Counted {
    id: String,
    prompt: models::ChatPrompt,
    answers: Vec<String>,
}

impl Counter {
    fn context(&self) -> usize {
        match self {
            Self::Prompts(prep) | Self::Questions(prep, _) | Self::Lessons(prep, _) => {
                prep.context()
            }
            Self::BaseLessons(prep, _) | Self::Pairs(prep) => prep.context(),
        }
    }

    /// The tokens of a row.
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
                };
                let text = judge_prompt.text(&row.prompt, shown);
                let asked = models::ChatPrompt {
                    question: text.map_err(RowFault)?,
                    turns: Vec::new(),
                    system: None,
                    ..row.prompt.clone()
                };
                Count::of(prep.count(&asked)?)
            }
            Self::Lessons(prep, learned) => {
                let (text, places) = prep.spoken(&example(*learned))?;
                Count {
                    learned: all(places),
                    ..Count::of(text.ids.len())
                }
            }
            Self::BaseLessons(prep, learned) => {
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
            let with_answer = |mut row: Prompt| {
                let answers = row.answer.take().into_iter().collect();
                (row, answers)
            };
            prompts.map(with_answer).collect()
        };
        let counted = |(row, answers): (Prompt, Vec<String>)| {
            let prompt = models::ChatPrompt {
                images: images.images(&row.image_ids)?,
                id: row.prompt_id.clone(),
                system: row.system,
                turns: turns(&row.turns),
                question: row.question,
                captions: row.captions,
                answer: None,
                seed: 0,
            };
            Ok(Counted {
                id: row.id.unwrap_or(row.prompt_id),
                prompt,
                answers,
            })
        };
        rows.into_iter().map(counted).collect()
    }
}

/// The prompt of a pair, and its answers.
fn asked_and_answered(pair: Pair) -> (Prompt, Vec<String>) {
    let prompt = Prompt {
        row_key: pair.row_key,
        prompt_id: pair.prompt_id,
        id: pair.id,
        image: pair.image,
        image_ids: pair.image_ids,
        system: pair.system,
        turns: pair.turns,
        question: pair.prompt,
        captions: pair.captions,
        answer: None,
    };
    (prompt, vec![pair.chosen, pair.rejected])
}

/// The pictures of a run; those read last are kept, for rows about one picture lie together.
struct ImageStore {
    images: Images,
    read: HashMap<String, EncodedImage>,
}

impl ImageStore {
    fn images(&mut self, image_ids: &[String]) -> Result<Vec<EncodedImage>, Failed> {
        let mut images = Vec::with_capacity(image_ids.len());
        for id in image_ids {
            if !self.read.contains_key(id) {
                if self.read.len() >= IMAGES_KEPT {
                    self.read.clear();
                }
                let bytes = self.images.bytes(id)?;
                let id = id.clone();
                self.read.insert(id.clone(), EncodedImage { id, bytes });
            }
            images.push(self.read[id].clone());
        }
        Ok(images)
    }
}

/// What a stage reads with a network; `None` where that is not known, or a folder can't be read, which
/// is what the check complains about.
fn reading<'a>(plan: &'a Plan, stage: &'a PlannedStage) -> Option<Reading<'a>> {
    let policy = |spec: &ModelSpec| match spec.clone().opened() {
        ModelSpec::LlavaOnevision(spec) => LlavaOnevisionProcessor::open(&spec.weights).ok(),
        _ => None,
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
            let asking = plan.models[&score.judge].asking()?;
            let backing_model = &plan.models[plan.backing_model(&score.judge)];
            Reading {
                table: score.prompts.as_ref()?,
                counter: {
                    let judge_prompt = JudgePrompt::open(asking).ok()?;
                    Counter::Questions(policy(backing_model)?, Box::new(judge_prompt))
                },
                // A reply that is cut off may still be read.
                room: 1,
            }
        }
        StageSpec::TrainSft(train) => {
            let spec = &plan.models[&train.model];
            let examples = policy(spec).map(|prep| Counter::Lessons(prep, train.answers));
            let base = || Some(Counter::BaseLessons(judge(spec)?, train.answers));
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

/// How many rows are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// As many as tell what a stage takes.
    Enough,
    /// Up to the first that fits, of the stages that a run would make: whether there is one.
    UntilOneFits,
}

/// Counts the rows of every stage that reads them with a network, where its table is there already.
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
                // What can't be counted is set aside when it is sampled.
                if let Ok(count) = counter.count(&row) {
                    tokens.add(&count, &row.id);
                }
            }
        }
        if tokens.rows > 0 {
            all.push(tokens);
        }
    }
    Ok(all)
}

impl TokenCounts {
    /// Whether they are of what this stage reads.
    pub fn is_of(&self, stage: &str) -> bool {
        self.stage == stage
    }

    pub fn longest(&self) -> usize {
        self.longest
    }

    /// The most tokens that are learned of rows of so many tokens that go side by side.
    pub fn learned_of(&self, tokens: usize) -> usize {
        let share = (self.learned_share * tokens as f64) as usize;
        share.max(self.learned)
    }

    /// The row that takes most, in words.
    pub fn worst(&self) -> String {
        let Self {
            row,
            longest,
            longest_id,
            ..
        } = self;
        format!("the longest {row} is `{longest_id}` with {longest} tokens")
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

/// A line for each stage.
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
            text.push_str("\ntokens of a row, its pictures included\n");
        }
        let of = if tokens.is_sample { "the first " } else { "" };
        let mean = tokens.sum / rows;
        let mut line = format!(
            "  {stage:<20} {of}{rows} {row}s: {shortest} to {longest}, {mean} on average; the longest is \
             `{longest_id}`"
        );
        match (too_long, room) {
            (0, _) => {}
            (_, 0) => write!(
                line,
                "; {too_long} do not fit the context of {context} and stop the training"
            )
            .expect(ANY_TEXT),
            _ => write!(
                line,
                "; {too_long} leave no room for {room} more in the context of {context} and will be set aside"
            )
            .expect(ANY_TEXT),
        }
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// Complaints about stages none of whose rows fits.
pub fn refusals(plan: &Plan, all: &[TokenCounts]) -> Vec<(TableName, Diagnostic)> {
    let known = all
        .iter()
        .filter(|tokens| tokens.is_current && !tokens.is_sample);
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
            let message = format!("`{}` has no {row} that fits into the context", stage.name);
            let label = match room {
                0 => format!("the shortest of {rows} takes {shortest} tokens of {context}"),
                room => format!(
                    "the shortest of {rows} takes {shortest} tokens, and with {room} more that is over {context}"
                ),
            };
            let help = match stage.spec {
                StageSpec::Sample(_) => {
                    "lower `max_new_tokens`, or use smaller pictures or shorter prompts"
                }
                _ => "use smaller pictures or shorter texts",
            };
            let diagnostic = Diagnostic::new("plan::context", At::key(KeyPath::default()), message);
            let diagnostic = diagnostic.label(label).help(help).placed(stage.place.clone());
            Some((stage.name.clone(), diagnostic))
        })
        .collect()
}

const ANY_TEXT: &str = "a string takes any text";

/// The same for programs.
pub fn to_json(all: &[TokenCounts]) -> Value {
    let one = |tokens: &TokenCounts| {
        json!({
            "table": tokens.stage, "row": tokens.row, "rows": tokens.rows, "all": !tokens.is_sample,
            "shortest": tokens.shortest, "longest": tokens.longest, "longest_id": tokens.longest_id,
            "sum": tokens.sum, "too_long": tokens.too_long, "context": tokens.context,
        })
    };
    all.iter().map(one).collect()
}
