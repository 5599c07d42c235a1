//! Judge prompts: rendering the prompt of a judge that replies in text, and reading verdicts from
//! its replies.

use std::collections::HashSet;
use std::io;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use minijinja::{Environment, ErrorKind, context};
use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ChatPrompt, ChatRole, ChatTurn, ImagePlace, RowFault, Visual};
use ovchat_io::files;

/// Maximum magnitude of a score. Rewards are sums of scores in single precision.
const SCORE_MAX: f64 = 1e30;

/// Settings of a judge prompt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JudgePromptSettings {
    /// Mode of judging: `pairwise` or `pointwise`. Default: `pairwise`.
    ///
    /// `pairwise` shows every two answers to a prompt, once in each order; the reward of an answer
    /// is the sum of the differences between its score and the other answer's. A prompt needs at
    /// least two answers. `pointwise` shows one answer at a time; its score is the reward.
    pub mode: Mode,
    /// File with a minijinja template of the judge prompt. Default: the built-in prompt, which asks
    /// for numbers from 1 to 10 and nothing else.
    ///
    /// The template can use `question`, `captions` and `turns` (each with `role` and `text`), and
    /// must use `answer` (pointwise) or `first` and `second` (pairwise). An image that stands in a
    /// question or turn stands there in the judge prompt as well; the others stand before it.
    pub template: Option<PathBuf>,
    /// Regular expression that finds the verdict in a reply. Default: the reply must begin with one
    /// number (pointwise) or two numbers (pairwise).
    ///
    /// Its named groups are `score` (pointwise), `first` and `second` (two scores), or
    /// `better_first`, `better_second` and `tie`, one of which must match.
    pub verdict: Option<Verdict>,
    /// Maximum length of a reply, in tokens. Default: 16.
    pub max_new_tokens: ReplyTokens,
    /// Number of retries, with sampling at random, if a reply has no readable verdict. Default: 2.
    /// If the last retry fails as well, the prompt is rejected.
    pub retries: Retries,
}

/// The number of answers that a judge sees at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    #[default]
    Pairwise,
    Pointwise,
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

/// A regular expression with the named groups of a verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Verdict(String);

/// The named groups of each kind of verdict.
const GROUPS: [&[&str]; 3] = [
    &["score"],
    &["first", "second"],
    &["better_first", "better_second", "tie"],
];

impl TryFrom<String> for Verdict {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let regex =
            Regex::new(&text).map_err(|error| format!("invalid regular expression: {error}"))?;
        let named: Vec<&str> = regex.capture_names().flatten().collect();
        let kind = GROUPS
            .iter()
            .find(|group| !named.is_empty() && named.iter().all(|name| group.contains(name)));
        let is_whole = kind.is_some_and(|kind| kind.len() != 2 || named.len() == 2);
        if !is_whole {
            return Err(
                "expected the named groups `(?<score>…)`; `(?<first>…)` and `(?<second>…)`; or \
                 `(?<better_first>…)`, `(?<better_second>…)` and `(?<tie>…)`"
                    .to_owned(),
            );
        }
        Ok(Self(text))
    }
}

impl From<Verdict> for String {
    fn from(verdict: Verdict) -> Self {
        verdict.0
    }
}

impl JsonSchema for Verdict {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Verdict".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "format": "regex"})
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

/// A loaded judge prompt: the template and the verdict expression.
#[derive(Debug)]
pub struct JudgePrompt {
    pub mode: Mode,
    environment: Arc<Environment<'static>>,
    verdict: Regex,
}

/// Maximum number of minijinja steps for rendering a template, since a template from a file might
/// loop forever.
const STEPS_MAX: u64 = 1_000_000;

/// Maximum size of a rendered template, in bytes.
const TEXT_MAX: usize = 16 << 20;

/// Interval at which rendering checks for an interruption.
const LOOK: Duration = Duration::from_millis(100);

/// The name of the template in the minijinja environment.
const TEMPLATE: &str = "template";

impl JudgePrompt {
    /// Loads a judge prompt. Fails, with a message, if the template cannot be read or parsed or
    /// does not use the judged answers, or if the groups of the verdict do not fit the mode.
    pub fn open(prompt_settings: &JudgePromptSettings) -> Result<Self, String> {
        let mode = prompt_settings.mode;
        let (usual, usual_verdict, shown): (_, _, &[&str]) = match mode {
            Mode::Pointwise => (POINTWISE, NUMBER, &["answer"]),
            Mode::Pairwise => (PAIRWISE, NUMBERS, &["first", "second"]),
        };
        let text = match &prompt_settings.template {
            Some(path) => files::read_to_string(path)
                .map_err(|error| format!("{}: cannot be read: {error}", path.display()))?,
            None => usual.to_owned(),
        };
        let named = |problem: String| match &prompt_settings.template {
            Some(path) => format!("{}: {problem}", path.display()),
            None => problem,
        };
        let mut environment = Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        environment.set_fuel(Some(STEPS_MAX));
        // `indent` writes any number of spaces in a single step.
        environment.remove_filter("indent");
        environment
            .add_template_owned(TEMPLATE, text)
            .map_err(|error| named(format!("invalid template: {error}")))?;
        let globals: HashSet<&str> = environment.globals().map(|(name, _)| name).collect();
        let template = environment.get_template(TEMPLATE);
        let used = template
            .map_err(|error| named(error.to_string()))?
            .undeclared_variables(false);
        let known = ["question", "captions", "turns"].iter().chain(shown);
        let known: Vec<&str> = known.copied().collect();
        let mut unknown: Vec<&String> = used
            .iter()
            .filter(|name| !known.contains(&name.as_str()) && !globals.contains(name.as_str()))
            .collect();
        unknown.sort();
        if let Some(name) = unknown.first() {
            return Err(named(format!(
                "unknown variable `{name}`, expected one of {}",
                known.join(", ")
            )));
        }
        if let Some(name) = shown.iter().find(|name| !used.contains(**name)) {
            return Err(named(format!("the template never uses `{{{{ {name} }}}}`")));
        }
        let verdict = prompt_settings.verdict.as_ref();
        let verdict = verdict.map_or(usual_verdict, |verdict| verdict.0.as_str());
        let verdict = Regex::new(verdict).map_err(|error| format!("`verdict`: {error}"))?;
        let is_of_one = verdict
            .capture_names()
            .flatten()
            .any(|name| name == "score");
        if is_of_one != (mode == Mode::Pointwise) {
            let wanted = match mode {
                Mode::Pointwise => "`score`",
                Mode::Pairwise => {
                    "`first` and `second`, or `better_first`, `better_second` and `tie`"
                }
            };
            return Err(format!(
                "`verdict` must have the named group or groups {wanted} in this mode"
            ));
        }
        let judge_prompt = Self {
            mode,
            environment: Arc::new(environment),
            verdict,
        };
        match judge_prompt.try_out() {
            Some(problem) => Err(named(problem)),
            None => Ok(judge_prompt),
        }
    }

    /// Returns the problem of a template that cannot be rendered for any prompt: one that uses an
    /// unknown name, or that fails for each of several sample prompts.
    fn try_out(&self) -> Option<String> {
        let mut first = None;
        let mut has_worked = false;
        for (prompt, text) in stand_ins() {
            let shown = match self.mode {
                Mode::Pointwise => JudgeInput::One(text),
                Mode::Pairwise => JudgeInput::Two(text, text),
            };
            let Err(error) = self.fill(&prompt, shown) else {
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
                 or none, `turns` is a list of objects with `role` and `text`"
            )
        })
    }

    /// Renders the judge prompt for answers to a prompt. Its images stand where the text shows those
    /// of the prompt: where `question` or a turn has them. Images that the text does not show stand
    /// before it, one line each; and all of them, if the template changes texts by their characters.
    pub fn ask(&self, prompt: &ChatPrompt, shown: JudgeInput<'_>) -> Result<ChatPrompt, RowFault> {
        prompt.check_places()?;
        let failed =
            |error: minijinja::Error| RowFault(format!("cannot render the template: {error}"));
        let plain = self.fill(prompt, shown).map_err(failed)?;
        let source = self.environment.get_template(TEMPLATE);
        let source = source.as_ref().map_or("", |template| template.source());
        let mut asked = (prompt.images.clone(), Vec::new(), plain);
        if let Some(marks) = Marks::new(prompt, shown, source) {
            let marked = self.fill(&prompt.marked(|image| marks.mark(image)), shown);
            let (text, shown) = marks.found(&marked.map_err(failed)?);
            // A template that counts, cuts or escapes characters writes another text without marks.
            if text == asked.2 && !shown.is_empty() {
                asked = interleaved(text, &shown, &prompt.images);
            }
        }
        let (images, places, question) = asked;
        Ok(ChatPrompt {
            id: prompt.id.clone(),
            images,
            places,
            system: None,
            turns: Vec::new(),
            question,
            captions: None,
            answer: None,
            seed: prompt.seed,
        })
    }

    fn fill(&self, prompt: &ChatPrompt, shown: JudgeInput<'_>) -> Result<String, minijinja::Error> {
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
        let values = context! { question, captions, turns, answer, first, second };
        let environment = Arc::clone(&self.environment);
        // Rendering gets a thread of its own: a single step can take long (a filter over a long
        // list), and the first Ctrl-C must end the wait for it.
        let (done, rendered) = mpsc::channel();
        thread::spawn(move || {
            let mut text = Bounded(Vec::new());
            let template = environment.get_template(TEMPLATE);
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

    /// Reads the scores in a reply: of the answer, or of the first and the second answer. `None` if
    /// there is no verdict, or if several verdicts differ.
    pub fn read(&self, reply: &str) -> Option<[f64; 2]> {
        let mut found: Option<[f64; 2]> = None;
        for captures in self.verdict.captures_iter(reply) {
            let number = |name: &str| captures.name(name)?.as_str().parse::<f64>().ok();
            let has = |name: &str| captures.name(name).is_some();
            let verdict = if has("better_first") {
                [1.0, 0.0]
            } else if has("better_second") {
                [0.0, 1.0]
            } else if has("tie") {
                [0.5, 0.5]
            } else if self.mode == Mode::Pointwise {
                [number("score")?, 0.0]
            } else {
                [number("first")?, number("second")?]
            };
            let is_score = verdict.iter().all(|score| score.abs() <= SCORE_MAX);
            let is_other = |found: [f64; 2]| found.map(f64::to_bits) != verdict.map(f64::to_bits);
            if !is_score || found.is_some_and(is_other) {
                return None;
            }
            found = Some(verdict);
        }
        found
    }
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
    fn new(prompt: &ChatPrompt, shown: JudgeInput<'_>, template: &str) -> Option<Self> {
        let count = u32::try_from(prompt.places.len()).ok()?;
        let answers = match shown {
            JudgeInput::One(answer) => [answer, answer],
            JudgeInput::Two(first, second) => [first, second],
        };
        let turns = prompt.turns.iter().map(|turn| &turn.text);
        let texts = turns.chain(prompt.captions.iter().flatten());
        let texts = texts.chain([&prompt.question]).map(String::as_str);
        let used = texts.chain(answers).chain([template]).flat_map(str::chars);
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
            answer: None,
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
        let asked = pairs.ask(&prompt(), JudgeInput::Two("A cat.", "A dog."));
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
            assert_eq!(pairs.read(reply), scores, "{reply}");
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
            assert_eq!(points.read(reply).map(|[score, _]| score), score, "{reply}");
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
        let shown = asked.ask(&prompt(), JudgeInput::Two("a", "b")).unwrap();
        assert_eq!(shown.question, "a or b?");
        assert_eq!(
            asked.read("So the Second response is better."),
            Some([0.0, 1.0])
        );
        assert_eq!(asked.read("Both are equally good."), Some([0.5, 0.5]));
        let torn = "The first response is better. No, the second response is better.";
        assert_eq!(asked.read(torn), None);
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
        let asked = judge.ask(&prompt.with_places(), JudgeInput::One(answer));
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
