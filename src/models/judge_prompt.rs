//! Judge prompts: rendering the prompt of a judge that replies in text, and reading verdicts from
//! its replies.

mod literal;
mod verdict;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use minijinja::{Environment, ErrorKind, context};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::verdict::VerdictReader;
pub use self::verdict::{Mode, Reading, RegexText, Substitute, Unreadable, Verdict};
use super::{ChatPrompt, ChatRole, ChatTurn, ImagePlace, RowContext, RowFault, Visual};
use ovchat_io::files;

/// Settings of a judge prompt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JudgePromptSettings {
    /// Mode of judging: `pairwise`, `pointwise` or `against`. Default: `pairwise`.
    ///
    /// `pairwise` shows every two answers to a prompt, once in each order; the reward of an answer
    /// is the sum of the differences between its score and the other answer's. A prompt needs at
    /// least two answers. `pointwise` shows one answer at a time; its score is the reward. `against`
    /// shows one fixed answer first and the judged answer second, in this order only; the reward is
    /// by how much the second is better.
    pub mode: Mode,
    /// The fixed answer of `mode: against`: `answer`, the reference answer of the prompt, or
    /// `row.NAME`, a column that `keep` of the loading stage names. A `score` stage with the setting
    /// `against` takes it from a table instead. Default: `answer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other: Option<OtherAnswer>,
    /// File with a minijinja template of the judge prompt. Default: the built-in prompt, which asks
    /// for numbers from 1 to 10 and nothing else.
    ///
    /// The template can use `question`, `captions`, `turns` (each with `role` and `text`),
    /// `reference` (the reference answer, or none), `id` (that of the record, or none) and `row.NAME`
    /// (a column that `keep` names), and must use `answer` (pointwise) or `first` and `second`
    /// (otherwise).
    pub template: Option<PathBuf>,
    /// File with a minijinja template of the system message, with the same variables. Default: no
    /// system message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<PathBuf>,
    /// The images that the judge sees: `in_place`, `before`, `after` or `none`. Default: `in_place`,
    /// where a question or turn shows them; the others stand before the judge prompt.
    #[serde(skip_serializing_if = "ShownImages::is_default")]
    pub images: ShownImages,
    /// Place of the verdict in a reply. Default: the reply must begin with one number (pointwise) or
    /// two numbers (otherwise).
    ///
    /// A regular expression has the named groups `score` (pointwise), `first` and `second` (two
    /// scores), or `better_first`, `better_second` and `tie`, one of which must match. A list of
    /// rules is tried in order: `{ pattern: …, value: 1, label: better }`.
    pub verdict: Option<Verdict>,
    /// Regular expression that finds the part of a reply which `verdict` searches: its first group,
    /// or its match. The whole reply is searched if it finds nothing, or different texts. Default:
    /// the whole reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict_within: Option<RegexText>,
    /// Verdict that counts if no reply has a readable one, or the endpoint refuses the request:
    /// `{ value: 0, label: unclear }`; or `left_out`, a reward that is no number (NaN), which the stage
    /// `measure` leaves out. The column `failure` of the reward says why. Default: the prompt is
    /// rejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<Unreadable>,
    /// Verdict that counts for an answer without text; the judge is not asked. Default: it is judged as
    /// any other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub empty_answer: Option<Substitute>,
    /// Format of replies that an endpoint is asked for: `json_object`. Other models are asked in words
    /// only. Default: text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ResponseFormat>,
    /// Maximum length of a reply, in tokens. Default: 16.
    pub max_new_tokens: ReplyTokens,
    /// Sampling temperature of the first attempt. Default: 0, greedy.
    #[serde(skip_serializing_if = "ReplyTemperature::is_default")]
    pub temperature: ReplyTemperature,
    /// Number of retries, with sampling at random, if a reply has no readable verdict. Default: 2.
    /// If the last retry fails as well, the prompt is rejected, unless `unreadable` says otherwise.
    pub retries: Retries,
}

/// A format of replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// A JSON object.
    JsonObject,
}

/// The images that a judge sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ShownImages {
    /// In the places where a question or turn shows them; the others before the judge prompt.
    #[default]
    InPlace,
    /// All before the judge prompt.
    Before,
    /// All after the judge prompt.
    After,
    /// None.
    None,
}

impl ShownImages {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The fixed answer that others are compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum OtherAnswer {
    /// The reference answer of the prompt.
    Reference,
    /// A kept column, by its name.
    Kept(String),
}

impl TryFrom<String> for OtherAnswer {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("row.") {
            Some(name) if !name.is_empty() => Ok(Self::Kept(name.to_owned())),
            _ if text == "answer" => Ok(Self::Reference),
            _ => Err(format!("expected `answer` or `row.NAME`, got `{text}`")),
        }
    }
}

impl From<OtherAnswer> for String {
    fn from(other: OtherAnswer) -> Self {
        match other {
            OtherAnswer::Reference => "answer".to_owned(),
            OtherAnswer::Kept(name) => format!("row.{name}"),
        }
    }
}

impl JsonSchema for OtherAnswer {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "OtherAnswer".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": r"^(answer|row\..+)$"})
    }
}

/// A sampling temperature, 0 or more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct ReplyTemperature(f64);

impl ReplyTemperature {
    pub fn get(self) -> f64 {
        self.0
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl TryFrom<f64> for ReplyTemperature {
    type Error = String;

    fn try_from(temperature: f64) -> Result<Self, String> {
        if temperature >= 0.0 && temperature.is_finite() {
            return Ok(Self(temperature));
        }
        Err(format!("{temperature} is out of range, expected 0 or more"))
    }
}

impl From<ReplyTemperature> for f64 {
    fn from(temperature: ReplyTemperature) -> Self {
        temperature.0
    }
}

impl JsonSchema for ReplyTemperature {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ReplyTemperature".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "number", "minimum": 0})
    }
}

/// A reply length in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ReplyTokens(pub NonZeroU32);

impl Default for ReplyTokens {
    fn default() -> Self {
        Self(const { NonZeroU32::new(16).unwrap() })
    }
}

/// A number of retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Retries(pub u32);

impl Default for Retries {
    fn default() -> Self {
        Self(2)
    }
}

/// The built-in pointwise prompt, which asks for one number.
const POINTWISE: &str = "\
How good is an answer to a question about the picture? What is true of the picture counts first, then \
what helps whoever asked; length and style count nothing.
Question: {{ question }}
{% for caption in captions %}About the picture: {{ caption }}
{% endfor %}Answer: {{ answer }}
Reply with one number from 1 to 10 and nothing else.";

/// The built-in pairwise prompt, which asks for two numbers.
const PAIRWISE: &str = "\
How good are two answers to a question about the picture? What is true of the picture counts first, \
then what helps whoever asked; length, style and order count nothing.
Question: {{ question }}
{% for caption in captions %}About the picture: {{ caption }}
{% endfor %}First answer: {{ first }}
Second answer: {{ second }}
Reply with two numbers from 1 to 10, for the first and for the second answer, and nothing else.";

/// Default verdicts of the built-in prompts: the number or numbers at the start of a reply.
const NUMBER: &str = r"^\s*(?<score>-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?[\s.]*(?:$|\n)";
const NUMBERS: &str =
    r"^\s*(?<first>-?\d+(?:\.\d+)?)[\s,;]+(?<second>-?\d+(?:\.\d+)?)[\s.]*(?:$|\n)";

/// The judged answers: one answer, or two in the order in which they are shown.
#[derive(Debug, Clone, Copy)]
pub enum JudgeInput<'a> {
    One(&'a str),
    Two(&'a str, &'a str),
}

/// A loaded judge prompt: the templates and the reader of verdicts.
#[derive(Debug)]
pub struct JudgePrompt {
    pub mode: Mode,
    other: OtherAnswer,
    images: ShownImages,
    environment: Arc<Environment<'static>>,
    has_system: bool,
    verdict: VerdictReader,
    /// The kept columns that the templates name.
    row_names: Vec<String>,
}

/// Maximum number of minijinja steps for rendering a template, since a template from a file might
/// loop forever.
const STEPS_MAX: u64 = 1_000_000;

/// Maximum size of a rendered template, in bytes.
const TEXT_MAX: usize = 16 << 20;

/// Interval at which rendering checks for an interruption.
const LOOK: Duration = Duration::from_millis(100);

/// The names of the templates in the minijinja environment.
const TEMPLATE: &str = "template";
const SYSTEM: &str = "system";

/// The variables that every template can use.
const VARIABLES: [&str; 6] = ["question", "captions", "turns", "reference", "id", "row"];

impl JudgePrompt {
    /// Loads a judge prompt. Fails, with a message, if a template cannot be read or parsed or the
    /// judge prompt does not use the judged answers, or if the verdict does not fit the mode.
    pub fn open(prompt_settings: &JudgePromptSettings) -> Result<Self, String> {
        let mode = prompt_settings.mode;
        let (usual, usual_verdict, shown): (_, _, &[&str]) = match mode {
            Mode::Pointwise => (POINTWISE, NUMBER, &["answer"]),
            Mode::Pairwise | Mode::Against => (PAIRWISE, NUMBERS, &["first", "second"]),
        };
        let mut environment = Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        environment.set_fuel(Some(STEPS_MAX));
        // `indent` writes any number of spaces in a single step.
        environment.remove_filter("indent");
        let template = prompt_settings.template.as_deref();
        let mut row_names = add_template(&mut environment, TEMPLATE, template, usual, shown, true)?;
        let system = prompt_settings.system.as_deref();
        if system.is_some() {
            row_names.extend(add_template(
                &mut environment,
                SYSTEM,
                system,
                "",
                shown,
                false,
            )?);
        }
        let other = prompt_settings.other.clone();
        if other.is_some() && mode != Mode::Against {
            return Err("`other` needs `mode: against`".to_owned());
        }
        let other = other.unwrap_or(OtherAnswer::Reference);
        if let (OtherAnswer::Kept(name), Mode::Against) = (&other, mode) {
            row_names.push(name.clone());
        }
        row_names.sort();
        row_names.dedup();
        let usual_verdict = Verdict::Groups(usual_verdict.to_owned());
        let verdict = prompt_settings.verdict.as_ref().unwrap_or(&usual_verdict);
        let judge_prompt = Self {
            mode,
            other,
            images: prompt_settings.images,
            environment: Arc::new(environment),
            has_system: system.is_some(),
            verdict: VerdictReader::new(mode, verdict, prompt_settings.verdict_within.as_ref())?,
            row_names,
        };
        for (name, path) in [(TEMPLATE, template), (SYSTEM, system)] {
            if (name == TEMPLATE || path.is_some())
                && let Some(problem) = judge_prompt.try_out(name)
            {
                return Err(named(path, &problem));
            }
        }
        Ok(judge_prompt)
    }

    /// Returns the kept columns of a prompt that the templates name.
    pub fn row_names(&self) -> &[String] {
        &self.row_names
    }

    /// Returns the answer that is shown first in `mode: against`.
    pub fn other_answer<'a>(
        &self,
        prompt: &'a ChatPrompt,
        context: RowContext<'a>,
    ) -> Result<&'a str, RowFault> {
        if let Some(other) = context.other {
            return Ok(other);
        }
        let (answer, name) = match &self.other {
            OtherAnswer::Reference => (prompt.answer.as_deref(), "reference answer"),
            OtherAnswer::Kept(name) => (context.kept_value(name), name.as_str()),
        };
        answer.ok_or_else(|| {
            RowFault(format!(
                "the judge compares with another answer (`mode: against`), but this prompt has no {name}; \
                 load it (`columns`, `keep`), or set `other`"
            ))
        })
    }

    /// Returns the problem of a template that cannot be rendered for any prompt: one that uses an
    /// unknown name, or that fails for each of several sample prompts.
    fn try_out(&self, template: &'static str) -> Option<String> {
        let mut first = None;
        let mut has_worked = false;
        for (prompt, text) in stand_ins() {
            let shown = match self.mode {
                Mode::Pointwise => JudgeInput::One(text),
                Mode::Pairwise | Mode::Against => JudgeInput::Two(text, text),
            };
            let kept = self
                .row_names
                .iter()
                .map(|name| (name.clone(), text.to_owned()));
            let kept: Vec<(String, String)> = kept.collect();
            let context = RowContext {
                id: Some(text),
                kept: &kept,
                other: None,
            };
            let Err(error) = self.fill(template, &prompt, context, shown) else {
                has_worked = true;
                continue;
            };
            match error.kind() {
                ErrorKind::OutOfFuel => {
                    return Some(format!(
                        "rendering takes more than {STEPS_MAX} steps; shorten the template's loops"
                    ));
                }
                ErrorKind::TemplateNotFound | ErrorKind::BadInclude => {
                    return Some(format!(
                        "{error}; a template must be a single file without includes"
                    ));
                }
                ErrorKind::UnknownFilter
                | ErrorKind::UnknownTest
                | ErrorKind::UnknownFunction
                | ErrorKind::UnknownMethod => return Some(error.to_string()),
                ErrorKind::WriteFailure => {
                    return Some(format!(
                        "the rendered text is longer than {} MB; shorten the template's loops",
                        TEXT_MAX >> 20
                    ));
                }
                _ => first = first.or(Some(error)),
            }
        }
        first.filter(|_| !has_worked).map(|error| {
            format!(
                "cannot render the template: {error}; `question` and the answers are strings, `captions` is a list of strings \
                 or none, `turns` is a list of objects with `role` and `text`, `reference` and `id` are strings or none, \
                 `row` has the columns that `keep` names"
            )
        })
    }

    /// Renders the judge prompt for answers to a prompt. Its images stand where the text shows those
    /// of the prompt: where `question` or a turn has them. Images that the text does not show stand
    /// before it, one line each; and all of them, if the template changes texts by their characters.
    pub fn ask(
        &self,
        prompt: &ChatPrompt,
        context: RowContext<'_>,
        shown: JudgeInput<'_>,
    ) -> Result<ChatPrompt, RowFault> {
        prompt.check_places()?;
        let failed = |error: minijinja::Error| {
            let fix = match error.kind() {
                ErrorKind::UndefinedError if !self.row_names.is_empty() => {
                    "; name the columns that it uses as `row.NAME` in `keep` of the loading stage"
                }
                _ => "",
            };
            RowFault(format!("cannot render the template: {error}{fix}"))
        };
        let fill =
            |name, prompt: &ChatPrompt| self.fill(name, prompt, context, shown).map_err(failed);
        let plain = fill(TEMPLATE, prompt)?;
        let source = self.environment.get_template(TEMPLATE);
        let source = source.as_ref().map_or("", |template| template.source());
        let mut asked = (prompt.images.clone(), Vec::new(), plain);
        match self.images {
            ShownImages::InPlace => {
                if let Some(marks) = Marks::new(prompt, context, shown, source) {
                    let marked = fill(TEMPLATE, &prompt.marked(|image| marks.mark(image)))?;
                    let (text, found) = marks.found(&marked);
                    // A template that counts, cuts or escapes characters writes another text
                    // without marks.
                    if text == asked.2 && !found.is_empty() {
                        asked = interleaved(text, &found, &prompt.images);
                    }
                }
            }
            ShownImages::Before => {}
            ShownImages::After => {
                let at = asked.2.len();
                asked.1 = vec![ImagePlace { turn: 0, at }; prompt.images.len()];
            }
            ShownImages::None => asked.0.clear(),
        }
        let (images, places, question) = asked;
        let system = self.has_system.then(|| fill(SYSTEM, prompt)).transpose()?;
        Ok(ChatPrompt {
            id: prompt.id.clone(),
            images,
            places,
            system,
            turns: Vec::new(),
            question,
            captions: None,
            answer: None,
            seed: prompt.seed,
        })
    }

    fn fill(
        &self,
        name: &'static str,
        prompt: &ChatPrompt,
        row: RowContext<'_>,
        shown: JudgeInput<'_>,
    ) -> Result<String, minijinja::Error> {
        let role = |role| match role {
            ChatRole::User => "user",
            ChatRole::Assistant => "assistant",
        };
        let turns: Vec<_> = prompt
            .turns
            .iter()
            .map(|turn| context! { role => role(turn.role), text => turn.text })
            .collect();
        let (answer, first, second) = match shown {
            JudgeInput::One(answer) => (Some(answer), None, None),
            JudgeInput::Two(first, second) => (None, Some(first), Some(second)),
        };
        let captions = prompt.captions.as_deref().unwrap_or_default();
        let question = &prompt.question;
        let (reference, id) = (&prompt.answer, row.id);
        let kept = row
            .kept
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let mut row: BTreeMap<&str, &str> = kept.collect();
        // A kept column is absent where its value is null.
        if !row.is_empty() {
            for name in &self.row_names {
                row.entry(name).or_default();
            }
        }
        let values =
            context! { question, captions, turns, answer, first, second, reference, id, row };
        let environment = Arc::clone(&self.environment);
        // Rendering gets a thread of its own: a single step can take long (a filter over a long
        // list), and the first Ctrl-C must end the wait for it.
        let (done, rendered) = mpsc::channel();
        thread::spawn(move || {
            let mut text = Bounded(Vec::new());
            let template = environment.get_template(name);
            let written = template.and_then(|it| it.render_captured_to(values, &mut text));
            let text = written.map(|_| String::from_utf8_lossy(&text.0).into_owned());
            let _ = done.send(text);
        });
        loop {
            match rendered.recv_timeout(LOOK) {
                Ok(text) => return text,
                Err(RecvTimeoutError::Timeout) if !files::stopped() => {}
                Err(ended) => {
                    let problem = match ended {
                        RecvTimeoutError::Timeout => "interrupted",
                        RecvTimeoutError::Disconnected => "the template engine panicked",
                    };
                    return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
                }
            }
        }
    }

    /// Reads the verdict in a reply. `None` if there is no verdict, or if several verdicts differ.
    pub fn read(&self, reply: &str) -> Option<Reading> {
        self.verdict.read(reply)
    }
}

/// Returns a problem with the file of the template that has it.
fn named(path: Option<&Path>, problem: &str) -> String {
    match path {
        Some(path) => format!("{}: {problem}", path.display()),
        None => problem.to_owned(),
    }
}

/// Adds the template in a file, or the `usual` one, and returns the names of the kept columns that it
/// uses. Fails, with a message, if it uses other variables, or not the answers that it has to show.
fn add_template(
    environment: &mut Environment<'static>,
    name: &'static str,
    path: Option<&Path>,
    usual: &str,
    shown: &[&str],
    shows_answers: bool,
) -> Result<Vec<String>, String> {
    let text = match path {
        Some(path) => files::read_to_string(path)
            .map_err(|error| format!("{}: cannot be read: {error}", path.display()))?,
        None => usual.to_owned(),
    };
    let fails = |problem: String| named(path, &problem);
    environment
        .add_template_owned(name, text)
        .map_err(|error| fails(format!("invalid template: {error}")))?;
    let globals: HashSet<&str> = environment.globals().map(|(name, _)| name).collect();
    let template = environment.get_template(name);
    let template = template.map_err(|error| fails(error.to_string()))?;
    let used = template.undeclared_variables(false);
    let known: Vec<&str> = VARIABLES.iter().chain(shown).copied().collect();
    let mut unknown: Vec<&String> = used
        .iter()
        .filter(|name| !known.contains(&name.as_str()) && !globals.contains(name.as_str()))
        .collect();
    unknown.sort();
    if let Some(name) = unknown.first() {
        return Err(fails(format!(
            "unknown variable `{name}`, expected one of {}",
            known.join(", ")
        )));
    }
    if shows_answers && let Some(name) = shown.iter().find(|name| !used.contains(**name)) {
        return Err(fails(format!("the template never uses `{{{{ {name} }}}}`")));
    }
    let nested = template.undeclared_variables(true);
    let row_names = nested.iter().filter_map(|name| name.strip_prefix("row."));
    Ok(row_names.map(str::to_owned).collect())
}

/// Characters that stand for images while a template is rendered, one each. No text of the prompt,
/// the answers or the template contains them.
struct Marks {
    first: u32,
    count: u32,
}

/// The first of Unicode's 65,534 supplementary characters for private use.
const PRIVATE: u32 = 0xf_0000;

impl Marks {
    /// Returns marks for the images that stand in texts; `None` if there are none, or no characters
    /// are left.
    fn new(
        prompt: &ChatPrompt,
        context: RowContext<'_>,
        shown: JudgeInput<'_>,
        template: &str,
    ) -> Option<Self> {
        let count = u32::try_from(prompt.places.len()).ok()?;
        let answers = match shown {
            JudgeInput::One(answer) => [answer, answer],
            JudgeInput::Two(first, second) => [first, second],
        };
        let turns = prompt.turns.iter().map(|turn| &turn.text);
        let texts = turns.chain(prompt.captions.iter().flatten());
        let texts = texts
            .chain(&prompt.answer)
            .chain(context.kept.iter().map(|(_, value)| value));
        let texts = texts.chain([&prompt.question]).map(String::as_str);
        let used = texts.chain(answers).chain(context.id).chain([template]);
        let used = used.flat_map(str::chars);
        let used = used.map(u32::from).filter(|&own| own >= PRIVATE).max();
        let first = used.map_or(PRIVATE, |used| used + 1);
        let is_free = count > 0 && first + count <= PRIVATE + 0xfffe;
        is_free.then_some(Self { first, count })
    }

    fn mark(&self, image: usize) -> String {
        let mark = char::from_u32(self.first + image as u32);
        mark.expect("a character for private use").to_string()
    }

    /// Returns a rendered text without marks, and the images that it shows with the bytes that they
    /// stand before. An image stands where the text shows it first.
    fn found(&self, rendered: &str) -> (String, Vec<(usize, usize)>) {
        let mut text = String::with_capacity(rendered.len());
        let mut shown: Vec<(usize, usize)> = Vec::new();
        for character in rendered.chars() {
            let image = u32::from(character).wrapping_sub(self.first);
            if image >= self.count {
                text.push(character);
            } else if shown.iter().all(|(other, _)| *other != image as usize) {
                shown.push((image as usize, text.len()));
            }
        }
        (text, shown)
    }
}

/// Returns the images in the order in which a text shows them, their places, and the text. Images
/// that are not `shown` stand before it, one line each.
fn interleaved(
    text: String,
    shown: &[(usize, usize)],
    images: &[Visual],
) -> (Vec<Visual>, Vec<ImagePlace>, String) {
    let is_hidden = |image: &usize| shown.iter().all(|(other, _)| other != image);
    let hidden: Vec<usize> = (0..images.len()).filter(is_hidden).collect();
    let front = hidden.len();
    let places = (0..front).chain(shown.iter().map(|(_, at)| front + at));
    let places = places.map(|at| ImagePlace { turn: 0, at }).collect();
    let order = hidden.iter().chain(shown.iter().map(|(image, _)| image));
    let order = order.map(|&image| images[image].clone()).collect();
    (order, places, "\n".repeat(front) + &text)
}

/// The rendered text, limited to [`TEXT_MAX`] bytes.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_MAX {
            return Err(io::Error::other(format!(
                "the rendered text is longer than {} MB",
                TEXT_MAX >> 20
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns sample prompts with and without each optional part, whose texts can be split and parsed
/// as numbers, each with a sample answer.
fn stand_ins() -> impl Iterator<Item = (ChatPrompt, &'static str)> {
    let texts = ["some", "7", "a | b | c, d; e: f / g - h\n\ni\tj\n1. k"];
    texts.into_iter().flat_map(|text| {
        let turn = |role| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let bare = ChatPrompt {
            places: Vec::new(),
            id: text.to_owned(),
            images: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: text.to_owned(),
            captions: None,
            answer: Some(text.to_owned()),
            seed: 0,
        };
        let full = ChatPrompt {
            turns: [ChatRole::User, ChatRole::Assistant]
                .repeat(4)
                .into_iter()
                .map(turn)
                .collect(),
            captions: Some(vec![text.to_owned(); 8]),
            ..bare.clone()
        };
        [(full, text), (bare, text)]
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn prompt() -> ChatPrompt {
        ChatPrompt {
            places: Vec::new(),
            id: "p".to_owned(),
            images: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: "What is it?".to_owned(),
            captions: Some(vec!["A dog.".to_owned()]),
            answer: None,
            seed: 0,
        }
    }

    fn prompt_settings(
        mode: Mode,
        template: Option<&str>,
        verdict: Option<&str>,
    ) -> (JudgePromptSettings, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let template = template.map(|text| {
            let path = folder.path().join("ask.txt");
            fs::write(&path, text).unwrap();
            path
        });
        let verdict = verdict.map(|text| Verdict::try_from(text.to_owned()).unwrap());
        let prompt_settings = JudgePromptSettings {
            mode,
            template,
            verdict,
            ..JudgePromptSettings::default()
        };
        (prompt_settings, folder)
    }

    #[test]
    fn our_own_words_show_what_is_judged_and_read_numbers_strictly() {
        let (pairs, _) = prompt_settings(Mode::Pairwise, None, None);
        let pairs = JudgePrompt::open(&pairs).unwrap();
        let asked = pairs.ask(
            &prompt(),
            RowContext::default(),
            JudgeInput::Two("A cat.", "A dog."),
        );
        let text = asked.unwrap().question;
        assert!(text.contains("Question: What is it?\nAbout the picture: A dog.\nFirst answer: A cat.\nSecond answer: A dog.\n"), "{text}");
        for (reply, scores) in [
            ("3 9", Some([3.0, 9.0])),
            (" 3.5, 9.\n", Some([3.5, 9.0])),
            ("3 9\nThe second one is right.", Some([3.0, 9.0])),
            ("3", None),
            ("3 9 7", None),
            ("The first: 3, the second: 9", None),
            ("", None),
        ] {
            let read = pairs.read(reply).and_then(|found| found.scores);
            assert_eq!(read, scores, "{reply}");
        }
        let (points, _) = prompt_settings(Mode::Pointwise, None, None);
        let points = JudgePrompt::open(&points).unwrap();
        for (reply, score) in [
            ("7", Some(7.0)),
            ("7/10.", Some(7.0)),
            ("7 or 8", None),
            ("good", None),
            // In single precision this would be infinite.
            ("1000000000000000000000000000000000000000", None),
        ] {
            assert_eq!(
                points.read(reply).map(|found| found.value),
                score,
                "{reply}"
            );
        }
    }

    #[test]
    fn verdicts_in_words_must_not_contradict_themselves() {
        let words = "(?i)(?<better_first>first response is better)|(?<better_second>second response is better)|(?<tie>equally good)";
        let (prompt_settings, _folder) = prompt_settings(
            Mode::Pairwise,
            Some("{{ first }} or {{ second }}?"),
            Some(words),
        );
        let asked = JudgePrompt::open(&prompt_settings).unwrap();
        let shown = asked
            .ask(&prompt(), RowContext::default(), JudgeInput::Two("a", "b"))
            .unwrap();
        assert_eq!(shown.question, "a or b?");
        let read = |reply: &str| asked.read(reply).and_then(|found| found.scores);
        assert_eq!(read("So the Second response is better."), Some([0.0, 1.0]));
        assert_eq!(read("Both are equally good."), Some([0.5, 0.5]));
        let torn = "The first response is better. No, the second response is better.";
        assert_eq!(read(torn), None);
    }

    /// Returns what a judge is shown of a prompt with three images, the first of which stands in an
    /// earlier turn: the text with the ids of images in their places.
    fn shown_to_judge(template: &str, answer: &str) -> String {
        let (settings, _folder) = prompt_settings(Mode::Pointwise, Some(template), None);
        let judge = JudgePrompt::open(&settings).unwrap();
        let image = |id: &str| Visual::new(id.to_owned(), Vec::new().into());
        let mut prompt = prompt();
        prompt.images = ["A", "B", "C"].map(image).to_vec();
        prompt.turns = vec![ChatTurn {
            role: ChatRole::User,
            text: "<image>\nHello".to_owned(),
        }];
        prompt.question = "Is <image> or <image> é?".to_owned();
        let asked = judge.ask(
            &prompt.with_places(),
            RowContext::default(),
            JudgeInput::One(answer),
        );
        let asked = asked.unwrap();
        let mut text = asked.question;
        if asked.places.is_empty() {
            text.insert_str(0, "in front: ");
        }
        for (image, place) in asked.images.iter().zip(&asked.places).rev() {
            text.insert_str(place.at, &format!("[{}]", image.id));
        }
        text
    }

    #[test]
    fn images_stand_where_the_judge_prompt_shows_their_texts() {
        let all = "{% for turn in turns %}{{ turn.text }} {% endfor %}{{ question }} {{ answer }}";
        assert_eq!(
            shown_to_judge(all, "A <image>"),
            "[A]\nHello Is [B] or [C] é? A <image>"
        );
        let question = "{{ question }} {{ answer }} {{ question }}";
        assert_eq!(
            shown_to_judge(question, "x"),
            "[A]\nIs [B] or [C] é? x Is  or  é?"
        );
        let backwards = "{{ answer }}{{ question }}{{ turns[0].text }}";
        assert_eq!(shown_to_judge(backwards, ""), "Is [B] or [C] é?[A]\nHello");
        assert_eq!(shown_to_judge("{{ answer }}", "x"), "in front: x");
        let upper = "{{ question|upper }} {{ answer }}";
        assert_eq!(shown_to_judge(upper, "x"), "[A]\nIS [B] OR [C] É? x");
        for (template, text) in [
            ("{{ answer }} {{ question[:4] }}", "in front: x Is  "),
            (
                "{{ [question] }} {{ answer }}",
                "in front: [\"Is  or  é?\"] x",
            ),
            ("{{ question|length }} {{ answer }}", "in front: 10 x"),
        ] {
            assert_eq!(shown_to_judge(template, "x"), text, "{template}");
        }
        // Marks are characters that neither texts nor template have.
        assert_eq!(
            shown_to_judge(all, "\u{f0000}\u{f0001}"),
            "[A]\nHello Is [B] or [C] é? \u{f0000}\u{f0001}"
        );
        assert_eq!(
            shown_to_judge("\u{f0000}{{ question }}{{ answer }}", "x"),
            "[A]\n\u{f0000}Is [B] or [C] é?x"
        );
    }

    #[test]
    fn templates_and_verdicts_that_can_never_work_are_refused() {
        for (mode, template, verdict, diagnostic) in [
            (
                Mode::Pairwise,
                Some("{{ first }} or {{ secnd }}?"),
                None,
                "unknown variable `secnd`",
            ),
            (
                Mode::Pairwise,
                Some("{{ first }}?"),
                None,
                "the template never uses `{{ second }}`",
            ),
            (Mode::Pointwise, Some("{{ answer"), None, "invalid template"),
            (
                Mode::Pointwise,
                Some("{{ answer.text }}"),
                None,
                "cannot render the template: undefined value",
            ),
            (
                Mode::Pointwise,
                Some("{{ answer + 1 }}"),
                None,
                "cannot render the template: invalid operation",
            ),
            (
                Mode::Pointwise,
                None,
                Some("(?<tie>x)"),
                "`verdict` must have the named group or groups `score`",
            ),
        ] {
            let (prompt_settings, _folder) = prompt_settings(mode, template, verdict);
            let problem = JudgePrompt::open(&prompt_settings).unwrap_err();
            assert!(problem.contains(diagnostic), "{problem}");
        }
        // A template that renders only for some prompts is accepted here.
        for template in [
            "{{ answer|int }}",
            "{{ turns[3].text }} {{ answer }}",
            "{{ captions[4] }} {{ answer }}",
            "{{ (question|split('|')|list)[2] }} {{ answer }}",
        ] {
            let (prompt_settings, _folder) = prompt_settings(Mode::Pointwise, Some(template), None);
            assert!(JudgePrompt::open(&prompt_settings).is_ok(), "{template}");
        }
        assert!(Verdict::try_from("(?<first>1)".to_owned()).is_err());
        assert!(Verdict::try_from("7".to_owned()).is_err());
        assert!(Verdict::try_from("(".to_owned()).is_err());
    }
}
