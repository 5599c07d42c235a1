//! Judges that reply in text: sending judge prompts and turning replies into scores.

use std::collections::HashMap;
use std::ops::ControlFlow;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::judge_prompt::{
    JudgeInput, JudgePrompt, JudgePromptSettings, Mode, Reading, Substitute, Unreadable,
};
use super::{
    AnswerGroup, ChatPrompt, Emit, Judge, JudgeScore, Listener, ModelError, ModelTelemetry, Policy,
    RowFault, Sampling,
};
use ovchat_io::files;

/// A request to a [`Writer`].
#[derive(Debug, Clone)]
pub struct Request {
    /// The images, and the judge prompt as the question.
    pub prompt: ChatPrompt,
    /// Earlier attempts whose replies were not readable.
    pub attempt: u32,
}

/// A model that replies in text to text and images.
pub trait Writer {
    /// Emits a reply to each request, in any order; stops early if the listener asks it to.
    fn reply(
        &mut self,
        requests: &[Request],
        emit: Emit<'_, String>,
        listener: &mut Listener<'_>,
    ) -> Result<ModelTelemetry, ModelError>;

    /// Describes batch sizes and settings, if there is something to tell.
    fn plan(&self) -> Option<String>;
}

/// A [`Writer`] on top of a policy: at the temperature of the settings on the first attempt, sampling
/// at random on retries.
pub struct PolicyWriter {
    policy: Box<dyn Policy>,
    max_new_tokens: usize,
    temperature: f64,
}

impl PolicyWriter {
    pub fn new(policy: Box<dyn Policy>, prompt_settings: &JudgePromptSettings) -> Self {
        Self {
            policy,
            max_new_tokens: prompt_settings.max_new_tokens.0.get() as usize,
            temperature: prompt_settings.temperature.get(),
        }
    }
}

impl Writer for PolicyWriter {
    fn reply(
        &mut self,
        requests: &[Request],
        emit: Emit<'_, String>,
        _: &mut Listener<'_>,
    ) -> Result<ModelTelemetry, ModelError> {
        let is_first = requests.iter().all(|request| request.attempt == 0);
        let how = Sampling {
            count: 1,
            temperature: if is_first { self.temperature } else { 1.0 },
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens: self.max_new_tokens,
            stop_strings: Vec::new(),
            stop_token_ids: Vec::new(),
        };
        let prompts: Vec<ChatPrompt> = requests.iter().map(|one| one.prompt.clone()).collect();
        self.policy.sample(&prompts, &how, &mut |index, answers| {
            emit(index, answers.map(|mut answers| answers.remove(0).text))
        })
    }

    fn plan(&self) -> Option<String> {
        self.policy.plan()
    }
}

/// A judge that reads its scores from the replies of a [`Writer`].
pub struct Critic {
    writer: Box<dyn Writer>,
    judge_prompt: JudgePrompt,
    retries: u32,
    unreadable: Option<Unreadable>,
    empty_answer: Option<Substitute>,
}

/// The comparisons of a group of answers.
struct Case {
    /// Distinct answers: the index of each in the group, and its multiplicity.
    distinct: Vec<(usize, usize)>,
    /// For each answer of the group, its index in `distinct`.
    places: Vec<usize>,
    /// The judge prompts: indices of distinct answers, and the reply with its scores.
    asks: Vec<Ask>,
    /// Number of judge prompts without a readable reply.
    open: usize,
    is_done: bool,
}

struct Ask {
    shown: [usize; 2],
    found: Option<Found>,
}

/// The verdict on a judge prompt.
struct Found {
    reading: Reading,
    /// The reply, if there is one.
    reply: Option<String>,
    /// The reason why the reading is a substitute.
    failure: Option<String>,
}

/// The requests of an attempt.
#[derive(Default)]
struct OpenRequests {
    requests: Vec<Request>,
    /// The case of each request, and the number of its judge prompt.
    asked: Vec<(usize, usize)>,
}

/// The replies to the requests of an attempt, as they arrive.
struct Replies<'c> {
    judge_prompt: &'c JudgePrompt,
    cases: &'c mut [Case],
    /// The case of each request, and the number of its judge prompt.
    asked: &'c [(usize, usize)],
    is_last: bool,
    unreadable: Option<&'c Unreadable>,
    /// The cases whose replies are complete. Their rewards are computed once the writer is no
    /// longer borrowed.
    ready: Vec<usize>,
    /// True once the receiver of the scores asked to stop.
    is_stopped: bool,
}

impl Replies<'_> {
    /// Takes the reply to a request. Emits the fault of a case that can get no scores.
    fn take(
        &mut self,
        request: usize,
        reply: Result<String, RowFault>,
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> ControlFlow<()> {
        let (index, number) = self.asked[request];
        if self.cases[index].is_done {
            return ControlFlow::Continue(());
        }
        let (fault, reply) = match reply {
            Err(fault) => (fault, None),
            Ok(text) => match self.judge_prompt.read(&text) {
                Some(reading) => {
                    let found = Found {
                        reading,
                        reply: Some(text),
                        failure: None,
                    };
                    self.found(index, number, found);
                    return ControlFlow::Continue(());
                }
                None if self.is_last => (unreadable(&text), Some(text)),
                None => return ControlFlow::Continue(()),
            },
        };
        if let Some(substitute) = self.unreadable {
            let found = Found {
                reading: substitute.into(),
                reply,
                failure: Some(fault.0),
            };
            self.found(index, number, found);
            return ControlFlow::Continue(());
        }
        let case = &mut self.cases[index];
        case.is_done = true;
        let flow = emit(index, Err(fault));
        self.is_stopped |= flow.is_break();
        flow
    }

    /// Takes the verdict on a judge prompt.
    fn found(&mut self, index: usize, number: usize, found: Found) {
        let case = &mut self.cases[index];
        case.asks[number].found = Some(found);
        case.open -= 1;
        if case.open == 0 {
            case.is_done = true;
            self.ready.push(index);
        }
    }
}

impl Critic {
    /// Opens a judge. Fails, with a message, if the judge prompt cannot be loaded.
    pub fn open(
        writer: Box<dyn Writer>,
        prompt_settings: &JudgePromptSettings,
    ) -> Result<Self, String> {
        Ok(Self {
            writer,
            judge_prompt: JudgePrompt::open(prompt_settings)?,
            retries: prompt_settings.retries.0,
            unreadable: prompt_settings.unreadable.clone(),
            empty_answer: prompt_settings.empty_answer.clone(),
        })
    }

    fn case(&self, group: &AnswerGroup<'_>) -> Case {
        let mut distinct: Vec<(usize, usize)> = Vec::new();
        let mut known: HashMap<&str, usize> = HashMap::new();
        let mut places = Vec::with_capacity(group.answers.len());
        for (place, answer) in group.answers.iter().enumerate() {
            let number = *known.entry(answer).or_insert(distinct.len());
            if number == distinct.len() {
                distinct.push((place, 0));
            }
            distinct[number].1 += 1;
            places.push(number);
        }
        let count = distinct.len();
        let ask = |shown: [usize; 2]| {
            let is_empty = |number: usize| group.answers[distinct[number].0].trim().is_empty();
            let empty = self.empty_answer.as_ref().filter(|_| is_empty(shown[1]));
            let found = empty.map(|substitute| Found {
                reading: substitute.into(),
                reply: None,
                failure: None,
            });
            Ask { shown, found }
        };
        let asks: Vec<Ask> = match self.judge_prompt.mode {
            Mode::Pointwise | Mode::Against => (0..count).map(|one| ask([one, one])).collect(),
            Mode::Pairwise => (0..count)
                .flat_map(|first| (0..count).map(move |second| [first, second]))
                .filter(|[first, second]| first != second)
                .map(ask)
                .collect(),
        };
        Case {
            open: asks.iter().filter(|ask| ask.found.is_none()).count(),
            distinct,
            places,
            asks,
            is_done: false,
        }
    }

    fn request(
        &self,
        group: &AnswerGroup<'_>,
        case: &Case,
        ask: &Ask,
        attempt: u32,
    ) -> Result<Request, RowFault> {
        let places = ask.shown.map(|number| case.distinct[number].0);
        let [first, second] = places.map(|place| group.answers[place]);
        let judge_prompt = &self.judge_prompt;
        let shown = match judge_prompt.mode {
            Mode::Pointwise => JudgeInput::One(first),
            Mode::Pairwise => JudgeInput::Two(first, second),
            Mode::Against => {
                let other = judge_prompt.other_answer(group.prompt, group.context)?;
                JudgeInput::Two(other, second)
            }
        };
        let asked = judge_prompt.ask(group.prompt, group.context, shown)?;
        // The seed depends only on the text and the attempt.
        let digest = Sha256::digest(format!("{attempt} {}", asked.question));
        let seed = digest[..8].try_into().map(u64::from_le_bytes);
        let (id, [first, second]) = (&group.prompt.id, places);
        Ok(Request {
            prompt: ChatPrompt {
                id: format!("{id}, answers {first} and {second}"),
                seed: seed.expect("eight bytes of a longer digest"),
                ..asked
            },
            attempt,
        })
    }

    /// Emits the scores of the cases that need no reply: those of empty answers, and in pairwise mode
    /// those of answers that are all equal. A single answer has nothing to be compared with there: its
    /// sum of differences would be a meaningless 0.
    fn emit_equal(&self, cases: &mut [Case], emit: Emit<'_, Vec<JudgeScore>>) -> ControlFlow<()> {
        for (index, case) in cases.iter_mut().enumerate() {
            if case.open == 0 {
                case.is_done = true;
                let is_alone = case.places.len() == 1 && self.judge_prompt.mode == Mode::Pairwise;
                let scored = if is_alone {
                    Err(alone())
                } else {
                    Ok(self.scores(case))
                };
                emit(index, scored)?;
            }
        }
        ControlFlow::Continue(())
    }

    /// Returns a request for each judge prompt without a readable reply, or `None` to stop early.
    /// Emits the faults of prompts that cannot be rendered.
    fn open_requests(
        &self,
        groups: &[AnswerGroup<'_>],
        cases: &mut [Case],
        attempt: u32,
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Option<OpenRequests> {
        let mut open = OpenRequests::default();
        for (index, (group, case)) in groups.iter().zip(cases).enumerate() {
            if case.is_done {
                continue;
            }
            for (number, ask) in case.asks.iter().enumerate() {
                if ask.found.is_some() {
                    continue;
                }
                match self.request(group, case, ask, attempt) {
                    Ok(request) => {
                        open.requests.push(request);
                        open.asked.push((index, number));
                    }
                    // An interrupted rendering is not a fault of the prompt.
                    Err(_) if files::stopped() => return None,
                    Err(fault) => {
                        case.is_done = true;
                        if emit(index, Err(fault)).is_break() {
                            return None;
                        }
                        break;
                    }
                }
            }
        }
        Some(open)
    }

    /// Computes the rewards of a group with all replies.
    fn scores(&self, case: &Case) -> Vec<JudgeScore> {
        if self.judge_prompt.mode == Mode::Pairwise {
            return Self::compared(case);
        }
        let score = |&number: &usize| {
            let found = case.asks[number]
                .found
                .as_ref()
                .expect("every reply is there");
            let Reading {
                value,
                scores,
                label,
            } = &found.reading;
            JudgeScore {
                reward: *value as f32,
                reply: found.reply.clone(),
                flips: None,
                label: label.clone(),
                scores: scores.map(|scores| scores.map(|score| score as f32)),
                failure: found.failure.clone(),
            }
        };
        case.places.iter().map(score).collect()
    }

    /// Computes the rewards of answers that were compared with each other.
    fn compared(case: &Case) -> Vec<JudgeScore> {
        let count = case.distinct.len();
        let mut rewards = vec![0.0; count];
        let mut replies: Vec<Vec<serde_json::Value>> = vec![Vec::new(); count];
        let mut failures: Vec<Option<String>> = vec![None; count];
        let mut differences: HashMap<[usize; 2], f64> = HashMap::new();
        for ask in &case.asks {
            let found = ask.found.as_ref().expect("every reply is there");
            let [first, second] = ask.shown;
            let difference = -found.reading.value;
            rewards[first] += difference * case.distinct[second].1 as f64;
            rewards[second] -= difference * case.distinct[first].1 as f64;
            let against = case.distinct[second].0;
            replies[first].push(json!({ "against": against, "reply": found.reply }));
            differences.insert(ask.shown, difference);
            for number in [first, second] {
                failures[number] = failures[number].take().or_else(|| found.failure.clone());
            }
        }
        let flips: Vec<Option<f32>> = (0..count)
            .map(|one| {
                let others = (0..count).filter(|other| *other != one);
                let both = others.filter_map(|other| {
                    let there = differences.get(&[one, other])?;
                    let back = differences.get(&[other, one])?;
                    Some(there * back > 0.0)
                });
                let both: Vec<bool> = both.collect();
                let flipped = both.iter().filter(|flips| **flips).count();
                (!both.is_empty()).then(|| flipped as f32 / both.len() as f32)
            })
            .collect();
        let score = |&number: &usize| {
            let replies = &replies[number];
            JudgeScore {
                reply: (!replies.is_empty()).then(|| json!(replies).to_string()),
                flips: flips[number],
                failure: failures[number].clone(),
                ..JudgeScore::of(rewards[number] as f32)
            }
        };
        case.places.iter().map(score).collect()
    }
}

impl Judge for Critic {
    fn score(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
    ) -> Result<ModelTelemetry, ModelError> {
        let mut listener = Listener {
            say: &mut |_| {},
            stopping: &|| false,
        };
        self.score_for(groups, emit, &mut listener)
    }

    fn score_for(
        &mut self,
        groups: &[AnswerGroup<'_>],
        emit: Emit<'_, Vec<JudgeScore>>,
        listener: &mut Listener<'_>,
    ) -> Result<ModelTelemetry, ModelError> {
        let mut cases: Vec<Case> = groups.iter().map(|group| self.case(group)).collect();
        let mut telemetry = ModelTelemetry::default();
        if self.emit_equal(&mut cases, emit).is_break() {
            return Ok(telemetry);
        }
        for attempt in 0..=self.retries {
            let Some(open) = self.open_requests(groups, &mut cases, attempt, emit) else {
                return Ok(telemetry);
            };
            if open.requests.is_empty() {
                break;
            }
            if attempt > 0 {
                telemetry.retries += open.requests.len() as u64;
            }
            let mut replies = Replies {
                judge_prompt: &self.judge_prompt,
                cases: &mut cases,
                asked: &open.asked,
                is_last: attempt == self.retries,
                unreadable: self.unreadable.as_ref(),
                ready: Vec::new(),
                is_stopped: false,
            };
            let mut hear = |request: usize, reply| replies.take(request, reply, emit);
            let took = self.writer.reply(&open.requests, &mut hear, listener)?;
            telemetry.add(&took);
            let Replies {
                ready, is_stopped, ..
            } = replies;
            for index in ready {
                if is_stopped || emit(index, Ok(self.scores(&cases[index]))).is_break() {
                    return Ok(telemetry);
                }
            }
            // The listener needs no further replies.
            if is_stopped || (listener.stopping)() {
                return Ok(telemetry);
            }
        }
        Ok(telemetry)
    }

    fn plan(&self) -> Option<String> {
        self.writer.plan()
    }
}

/// The fault of a prompt with a single answer in pairwise mode.
fn alone() -> RowFault {
    RowFault(
        "a pairwise judge (`mode: pairwise`) compares at least two answers to a prompt, but this prompt has \
         one; sample at least two answers, or use a judge with `mode: pointwise`"
            .to_owned(),
    )
}

/// Maximum length of a reply in errors, in characters.
const SHOWN_MAX: usize = 200;

fn unreadable(reply: &str) -> RowFault {
    let mut shown: String = reply.chars().take(SHOWN_MAX).collect();
    if shown.len() < reply.len() {
        shown.push('…');
    }
    RowFault(format!("no verdict found in the judge's reply: {shown:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge_prompt::Retries;

    /// A writer that replies by rule and counts its calls.
    struct Rule {
        rule: fn(&str, u32) -> String,
        asked: std::rc::Rc<std::cell::Cell<usize>>,
    }

    impl Writer for Rule {
        fn reply(
            &mut self,
            requests: &[Request],
            emit: Emit<'_, String>,
            _: &mut Listener<'_>,
        ) -> Result<ModelTelemetry, ModelError> {
            for (index, request) in requests.iter().enumerate() {
                self.asked.set(self.asked.get() + 1);
                let reply = (self.rule)(&request.prompt.question, request.attempt);
                if emit(index, Ok(reply)).is_break() {
                    break;
                }
            }
            Ok(ModelTelemetry::default())
        }
        fn plan(&self) -> Option<String> {
            None
        }
    }

    type Scored = (
        Vec<Result<Vec<JudgeScore>, RowFault>>,
        ModelTelemetry,
        usize,
    );

    fn scored(mode: Mode, rule: fn(&str, u32) -> String, answers: &[&[&str]]) -> Scored {
        let prompt_settings = JudgePromptSettings {
            mode,
            retries: Retries(1),
            ..JudgePromptSettings::default()
        };
        let asked = std::rc::Rc::new(std::cell::Cell::new(0));
        let writer = Rule {
            rule,
            asked: std::rc::Rc::clone(&asked),
        };
        let mut critic = Critic::open(Box::new(writer), &prompt_settings).unwrap();
        let prompt = ChatPrompt {
            places: Vec::new(),
            id: "p".to_owned(),
            images: Vec::new(),
            system: None,
            turns: Vec::new(),
            question: "?".to_owned(),
            captions: None,
            answer: None,
            seed: 0,
        };
        let groups: Vec<AnswerGroup<'_>> = answers
            .iter()
            .map(|answers| AnswerGroup::new(&prompt, answers.to_vec()))
            .collect();
        let mut all = vec![None; groups.len()];
        let telemetry = critic.score(&groups, &mut |index, scores| {
            assert!(all[index].is_none(), "each group is emitted once");
            all[index] = Some(scores);
            ControlFlow::Continue(())
        });
        let all = all.into_iter().map(Option::unwrap).collect();
        (all, telemetry.unwrap(), asked.get())
    }

    /// Returns the length of each answer in the judge prompt.
    fn lengths(question: &str) -> Vec<usize> {
        let lines = question.lines();
        let shown = lines.filter_map(|line| line.split_once("nswer: "));
        shown.map(|(_, answer)| answer.len()).collect()
    }

    #[test]
    fn in_pairs_the_reward_is_the_sum_of_differences_over_both_orders() {
        let rule = |question: &str, _: u32| {
            let shown = lengths(question);
            // The second of two answers gets one more point.
            format!("{} {}", shown[0], shown[1] + 1)
        };
        let (scores, telemetry, asked) =
            scored(Mode::Pairwise, rule, &[&["a", "bbb", "a", "cccc"]]);
        let scores = scores[0].as_ref().unwrap();
        assert_eq!(asked, 6, "three distinct answers, both orders");
        assert_eq!(telemetry.retries, 0);
        // By hand: a (1) against bbb (3) is -3 when shown first and -1 when second; against cccc
        // -4, -2.
        let rewards: Vec<f32> = scores.iter().map(|score| score.reward).collect();
        assert_eq!(rewards, [-10.0, 4.0 * 2.0 - 2.0, -10.0, 6.0 * 2.0 + 2.0]);
        assert_eq!(scores[0].flips, Some(0.0));
        let reply = scores[1].reply.as_deref().unwrap();
        assert_eq!(
            reply,
            r#"[{"against":0,"reply":"3 2"},{"against":3,"reply":"3 5"}]"#
        );
    }

    #[test]
    fn a_judge_of_places_flips() {
        let (scores, _, _) = scored(Mode::Pairwise, |_, _| "9 1".to_owned(), &[&["a", "b"]]);
        let both = scores[0].as_ref().unwrap();
        assert!(
            both.iter()
                .all(|score| score.reward == 0.0 && score.flips == Some(1.0))
        );
    }

    #[test]
    fn one_answer_alone_is_a_fault_where_answers_are_compared() {
        let rule = |_: &str, _: u32| "9 1".to_owned();
        let (scores, _, asked) = scored(Mode::Pairwise, rule, &[&["a"], &["b", "b"]]);
        let fault = scores[0].as_ref().unwrap_err();
        assert!(fault.0.contains("this prompt has one"), "{fault}");
        let equal = scores[1].as_ref().unwrap();
        assert!(equal.iter().all(|score| score.reward == 0.0));
        assert_eq!(asked, 0);
        let rule = |_: &str, _: u32| "7".to_owned();
        let (scores, _, _) = scored(Mode::Pointwise, rule, &[&["a"]]);
        assert_eq!(scores[0].as_ref().unwrap()[0].reward, 7.0);
    }

    #[test]
    fn replies_that_cannot_be_read_are_asked_for_again_and_then_reported() {
        let rule = |question: &str, attempt: u32| match (lengths(question)[0], attempt) {
            (1, _) => "7".to_owned(),
            (2, 0) => "I'd say 8".to_owned(),
            (2, _) => "8".to_owned(),
            _ => "It is good.".to_owned(),
        };
        let answers: &[&[&str]] = &[&["a"], &["bb", "a"], &["ccc"]];
        let (scores, telemetry, asked) = scored(Mode::Pointwise, rule, answers);
        let rewards = |index: usize| -> Vec<f32> {
            let scores = scores[index].as_ref().unwrap();
            scores.iter().map(|score| score.reward).collect()
        };
        assert_eq!((rewards(0), rewards(1)), (vec![7.0], vec![8.0, 7.0]));
        assert_eq!(scores[1].as_ref().unwrap()[0].reply.as_deref(), Some("8"));
        let fault = scores[2].as_ref().unwrap_err();
        assert_eq!(
            fault.0,
            "no verdict found in the judge's reply: \"It is good.\""
        );
        assert_eq!((telemetry.retries, asked), (2, 6));
    }
}
