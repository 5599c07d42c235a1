//! Judges that are asked in writing: what they are asked, and how their replies are read.

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

use super::{ChatPrompt, ChatRole, ChatTurn};
use ovchat_io::files;

/// The largest score that is one. Rewards are sums of such numbers in single precision.
const SCORE_MAX: f64 = 1e30;

/// How a judge is asked about answers in writing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JudgePromptSettings {
    /// `pairwise`: about every two answers to a prompt, each order once; the reward of an answer is the
    /// sum of the differences between its score and the other's, and a prompt needs two answers or more.
    /// `pointwise`: about each answer by itself; the reward is its score.
    pub mode: Mode,
    /// A file with the text that asks, a minijinja template of `question`, `captions`, `turns` (each
    /// with `role` and `text`) and `answer` or, in pairs, `first` and `second`. Left out: words of our
    /// own, which ask for numbers from 1 to 10 and nothing else.
    pub template: Option<PathBuf>,
    /// A regular expression that finds the verdict in a reply by its groups: `score`; `first` and
    /// `second` (two scores); or `better_first`, `better_second` and `tie`, of which one must match.
    /// Left out: the reply must begin with one number, or two.
    pub verdict: Option<Verdict>,
    /// The longest reply, in tokens.
    pub max_new_tokens: ReplyTokens,
    /// How often it is asked again, drawing at random, when a reply can't be read. A prompt with a reply
    /// that can't be read in the end is set aside.
    pub retries: Retries,
}

/// Whether answers are judged one by one or two by two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    #[default]
    Pairwise,
    Pointwise,
}

/// Tokens of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ReplyTokens(pub NonZeroU32);

impl Default for ReplyTokens {
    fn default() -> Self {
        Self(const { NonZeroU32::new(16).unwrap() })
    }
}

/// A count of retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Retries(pub u32);

impl Default for Retries {
    fn default() -> Self {
        Self(2)
    }
}

/// A regular expression with the groups of a verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Verdict(String);

/// The groups that a verdict may have, those of each kind together.
const GROUPS: [&[&str]; 3] = [
    &["score"],
    &["first", "second"],
    &["better_first", "better_second", "tie"],
];

impl TryFrom<String> for Verdict {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let regex =
            Regex::new(&text).map_err(|error| format!("not a regular expression: {error}"))?;
        let named: Vec<&str> = regex.capture_names().flatten().collect();
        let kind = GROUPS
            .iter()
            .find(|group| !named.is_empty() && named.iter().all(|name| group.contains(name)));
        let is_whole = kind.is_some_and(|kind| kind.len() != 2 || named.len() == 2);
        if !is_whole {
            return Err(
                "the groups of a verdict are `(?<score>…)`; `(?<first>…)` and `(?<second>…)`; or \
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

/// Asks for a number. The words are ours.
const POINTWISE: &str = "\
How good is an answer to a question about the picture? What is true of the picture counts first, then \
what helps whoever asked; length and style count nothing.
Question: {{ question }}
{% for caption in captions %}About the picture: {{ caption }}
{% endfor %}Answer: {{ answer }}
Reply with one number from 1 to 10 and nothing else.";

/// Asks for two numbers. The words are ours.
const PAIRWISE: &str = "\
How good are two answers to a question about the picture? What is true of the picture counts first, \
then what helps whoever asked; length, style and order count nothing.
Question: {{ question }}
{% for caption in captions %}About the picture: {{ caption }}
{% endfor %}First answer: {{ first }}
Second answer: {{ second }}
Reply with two numbers from 1 to 10, for the first and for the second answer, and nothing else.";

/// What begins a reply to these.
const NUMBER: &str = r"^\s*(?<score>-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?[\s.]*(?:$|\n)";
const NUMBERS: &str =
    r"^\s*(?<first>-?\d+(?:\.\d+)?)[\s,;]+(?<second>-?\d+(?:\.\d+)?)[\s.]*(?:$|\n)";

/// What is asked about: an answer by itself, or two in the order in which they are shown.
#[derive(Debug, Clone, Copy)]
pub enum JudgeInput<'a> {
    One(&'a str),
    Two(&'a str, &'a str),
}

/// An [`JudgePromptSettings`] that was read: its text and its verdict.
#[derive(Debug)]
pub struct JudgePrompt {
    pub mode: Mode,
    environment: Arc<Environment<'static>>,
    verdict: Regex,
}

/// The steps that filling a template may take: what comes from a file may never end.
const STEPS_MAX: u64 = 1_000_000;

/// The bytes of a text that a template makes.
const TEXT_MAX: usize = 16 << 20;

/// The time between two looks at whether somebody asked to stop while a template is filled.
const LOOK: Duration = Duration::from_millis(100);

/// The name of the template.
const TEMPLATE: &str = "template";

impl JudgePrompt {
    /// Fails, in words, when the template can't be read, is none, or misses what is asked about; when
    /// the verdict has groups that the mode has no use for.
    pub fn open(asking: &JudgePromptSettings) -> Result<Self, String> {
        let mode = asking.mode;
        let (usual, usual_verdict, shown): (_, _, &[&str]) = match mode {
            Mode::Pointwise => (POINTWISE, NUMBER, &["answer"]),
            Mode::Pairwise => (PAIRWISE, NUMBERS, &["first", "second"]),
        };
        let text = match &asking.template {
            Some(path) => files::read_to_string(path)
                .map_err(|error| format!("{}: can't be read: {error}", path.display()))?,
            None => usual.to_owned(),
        };
        let named = |problem: String| match &asking.template {
            Some(path) => format!("{}: {problem}", path.display()),
            None => problem,
        };
        let mut environment = Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        environment.set_fuel(Some(STEPS_MAX));
        // It writes as many spaces as it is told to.
        environment.remove_filter("indent");
        environment
            .add_template_owned(TEMPLATE, text)
            .map_err(|error| named(format!("not a template: {error}")))?;
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
                "there is no `{name}` here; a template has {}",
                known.join(", ")
            )));
        }
        if let Some(name) = shown.iter().find(|name| !used.contains(**name)) {
            return Err(named(format!("it never shows `{{{{ {name} }}}}`")));
        }
        let verdict = asking.verdict.as_ref();
        let verdict = verdict.map_or(usual_verdict, |verdict| verdict.0.as_str());
        let verdict = Regex::new(verdict).map_err(|error| format!("`verdict`: {error}"))?;
        let is_of_one = verdict
            .capture_names()
            .flatten()
            .any(|name| name == "score");
        if is_of_one != (mode == Mode::Pointwise) {
            let wanted = match mode {
                Mode::Pointwise => "`score`",
                Mode::Pairwise => "two scores or of what is better",
            };
            return Err(format!("in this mode `verdict` needs groups of {wanted}"));
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

    /// The problem of a template that can't be filled, whatever with: one that names something that does not
    /// exist, or fails with each of several stand-ins.
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
                        "filling it takes more than {STEPS_MAX} steps; take out what it repeats"
                    ));
                }
                ErrorKind::TemplateNotFound | ErrorKind::BadInclude => {
                    return Some(format!(
                        "{error}; a template is one file, and includes no other"
                    ));
                }
                ErrorKind::UnknownFilter
                | ErrorKind::UnknownTest
                | ErrorKind::UnknownFunction
                | ErrorKind::UnknownMethod => return Some(error.to_string()),
                ErrorKind::WriteFailure => {
                    return Some(format!(
                        "it renders more than {} MB of text; shorten its loops",
                        TEXT_MAX >> 20
                    ));
                }
                _ => first = first.or(Some(error)),
            }
        }
        first.filter(|_| !has_worked).map(|error| {
            format!(
                "it can't be filled: {error}; `question` and the answers are texts, `captions` a list of texts \
                 or none, `turns` a list of `role` and `text`"
            )
        })
    }

    /// The text that asks about answers to a prompt.
    pub fn text(&self, prompt: &ChatPrompt, shown: JudgeInput<'_>) -> Result<String, String> {
        let text = self.fill(prompt, shown);
        text.map_err(|error| format!("the template can't be filled: {error}"))
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
        // On a thread of its own: a step is short or, with a filter over a long list, is not, and the
        // first Ctrl-C must end the wait for it.
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
                        RecvTimeoutError::Disconnected => "it panicked",
                    };
                    return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
                }
            }
        }
    }

    /// The scores in a reply: of the answer, or of the first and the second. All verdicts in it must be
    /// the same; `None` if there is none, or if they are not.
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

/// The text that a template makes, up to [`TEXT_MAX`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_MAX {
            return Err(io::Error::other(format!(
                "the text is longer than {} MB",
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

/// Prompts with and without all that a prompt may have, whose texts can be split and read as numbers, each
/// with a text for its answers.
fn stand_ins() -> impl Iterator<Item = (ChatPrompt, &'static str)> {
    let texts = ["some", "7", "a | b | c, d; e: f / g - h\n\ni\tj\n1. k"];
    texts.into_iter().flat_map(|text| {
        let turn = |role| ChatTurn {
            role,
            text: text.to_owned(),
        };
        let bare = ChatPrompt {
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

    fn asking(
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
        let asking = JudgePromptSettings {
            mode,
            template,
            verdict,
            ..JudgePromptSettings::default()
        };
        (asking, folder)
    }

    #[test]
    fn our_own_words_show_what_is_judged_and_read_numbers_strictly() {
        let (pairs, _) = asking(Mode::Pairwise, None, None);
        let pairs = JudgePrompt::open(&pairs).unwrap();
        let text = pairs
            .text(&prompt(), JudgeInput::Two("A cat.", "A dog."))
            .unwrap();
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
        let (points, _) = asking(Mode::Pointwise, None, None);
        let points = JudgePrompt::open(&points).unwrap();
        for (reply, score) in [
            ("7", Some(7.0)),
            ("7/10.", Some(7.0)),
            ("7 or 8", None),
            ("good", None),
            // Single precision would make it infinite.
            ("1000000000000000000000000000000000000000", None),
        ] {
            assert_eq!(points.read(reply).map(|[score, _]| score), score, "{reply}");
        }
    }

    #[test]
    fn verdicts_in_words_must_not_contradict_themselves() {
        let words = "(?i)(?<better_first>first response is better)|(?<better_second>second response is better)|(?<tie>equally good)";
        let (asking, _folder) = asking(
            Mode::Pairwise,
            Some("{{ first }} or {{ second }}?"),
            Some(words),
        );
        let asked = JudgePrompt::open(&asking).unwrap();
        assert_eq!(
            asked.text(&prompt(), JudgeInput::Two("a", "b")).unwrap(),
            "a or b?"
        );
        assert_eq!(
            asked.read("So the Second response is better."),
            Some([0.0, 1.0])
        );
        assert_eq!(asked.read("Both are equally good."), Some([0.5, 0.5]));
        let torn = "The first response is better. No, the second response is better.";
        assert_eq!(asked.read(torn), None);
    }

    #[test]
    fn templates_and_verdicts_that_can_never_work_are_refused() {
        for (mode, template, verdict, diagnostic) in [
            (
                Mode::Pairwise,
                Some("{{ first }} or {{ secnd }}?"),
                None,
                "there is no `secnd` here",
            ),
            (
                Mode::Pairwise,
                Some("{{ first }}?"),
                None,
                "it never shows `{{ second }}`",
            ),
            (Mode::Pointwise, Some("{{ answer"), None, "not a template"),
            (
                Mode::Pointwise,
                Some("{{ answer.text }}"),
                None,
                "it can't be filled: undefined value",
            ),
            (
                Mode::Pointwise,
                Some("{{ answer + 1 }}"),
                None,
                "it can't be filled: invalid operation",
            ),
            (
                Mode::Pointwise,
                None,
                Some("(?<tie>x)"),
                "`verdict` needs groups of `score`",
            ),
        ] {
            let (asking, _folder) = asking(mode, template, verdict);
            let problem = JudgePrompt::open(&asking).unwrap_err();
            assert!(problem.contains(diagnostic), "{problem}");
        }
        // What fits some prompts only is filled when they come.
        for template in [
            "{{ answer|int }}",
            "{{ turns[3].text }} {{ answer }}",
            "{{ captions[4] }} {{ answer }}",
            "{{ (question|split('|')|list)[2] }} {{ answer }}",
        ] {
            let (asking, _folder) = asking(Mode::Pointwise, Some(template), None);
            assert!(JudgePrompt::open(&asking).is_ok(), "{template}");
        }
        assert!(Verdict::try_from("(?<first>1)".to_owned()).is_err());
        assert!(Verdict::try_from("7".to_owned()).is_err());
        assert!(Verdict::try_from("(".to_owned()).is_err());
    }
}
