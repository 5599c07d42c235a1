//! The label queue: which annotator has which question, and the labels given so far.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::super::failed::Failed;
use super::request::Saying;
use ovchat_data::store::{LabelLine, LabelTask, LabelVerdict, LabelWriter, NUMBER_MAX, digest};
use ovchat_data::tables::Prompt;
use ovchat_models::{ChatRole, Visual};
use ovchat_pipeline::stages::Shown;

/// The time after which a question that an annotator left open goes to others.
const LEFT_OPEN: Duration = Duration::from_mins(15);

/// Two responses to a prompt, in display order.
#[derive(Debug, Clone)]
pub struct Question {
    pub prompt_id: String,
    left: i32,
    right: i32,
}

/// The questions of a labeling task, with the prompts and responses that they show.
#[derive(Default)]
pub struct Questions {
    /// The questions, most informative first.
    pub list: Vec<Question>,
    /// The prompts of the questions, by their ids.
    pub prompts: HashMap<String, Prompt>,
    /// The texts of candidates, with their digests.
    pub texts: HashMap<(String, i32), (String, String)>,
}

/// The questions that can be asked, and the labels given.
pub struct LabelQueue {
    writer: LabelWriter,
    task: LabelTask,
    questions: Vec<Question>,
    prompts: HashMap<String, Prompt>,
    /// The texts of candidates, with their digests.
    texts: HashMap<(String, i32), (String, String)>,
    labels: BTreeMap<u64, LabelLine>,
    /// The question of each label of this task.
    of_label: HashMap<u64, usize>,
    /// The share of the questions that two annotators get.
    twice: f64,
    /// The open question of each annotator, and since when it is open.
    open: HashMap<String, (usize, Instant)>,
}

impl LabelQueue {
    /// Creates the queue of a labeling task; `writer` holds the labels given so far. Two annotators get
    /// the share `twice` of the questions.
    pub fn new(writer: LabelWriter, task: LabelTask, questions: Questions, twice: f64) -> Self {
        let mut queue = Self {
            labels: BTreeMap::new(),
            of_label: HashMap::new(),
            open: HashMap::new(),
            twice,
            writer,
            task,
            questions: questions.list,
            prompts: questions.prompts,
            texts: questions.texts,
        };
        queue.recall();
        queue
    }

    /// Reads the labels given so far.
    fn recall(&mut self) {
        let mut numbers: HashMap<[String; 3], usize> = HashMap::new();
        for (number, question) in self.questions.iter().enumerate() {
            let name = |left, right| {
                [
                    question.prompt_id.clone(),
                    self.digest(question, left),
                    self.digest(question, right),
                ]
            };
            numbers.insert(name(question.left, question.right), number);
            numbers.insert(name(question.right, question.left), number);
        }
        for label in std::mem::take(&mut self.writer.labels) {
            let name = [
                label.prompt_id.clone(),
                label.left_digest.clone(),
                label.right_digest.clone(),
            ];
            if let Some(&number) = numbers.get(&name) {
                self.of_label.insert(label.id, number);
            }
            self.labels.insert(label.id, label);
        }
    }

    /// Returns a note about label lines that were moved to another file, if any.
    pub fn note(&self) -> Option<&str> {
        self.writer.note.as_deref()
    }

    fn digest(&self, question: &Question, candidate: i32) -> String {
        let text = self.texts.get(&(question.prompt_id.clone(), candidate));
        text.map(|(_, digest)| digest.clone()).unwrap_or_default()
    }

    /// Returns the questions that have all labels that they need, besides skips.
    fn done(&self) -> HashSet<usize> {
        let mut counts: HashMap<usize, u32> = HashMap::new();
        for number in self.said_by(|_| true) {
            *counts.entry(number).or_default() += 1;
        }
        let done = counts.into_iter().filter(|(number, count)| {
            let needed = if self.is_for_two(*number) { 2 } else { 1 };
            *count >= needed
        });
        done.map(|(number, _)| number).collect()
    }

    /// Returns the questions of the labels of some annotators, besides skips.
    fn said_by(&self, is_wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = usize> {
        let said = self
            .labels
            .values()
            .filter(move |label| label.said != LabelVerdict::Skip && is_wanted(&label.by));
        said.filter_map(|label| self.of_label.get(&label.id).copied())
    }

    /// True if two annotators get a question. Depends only on the question.
    fn is_for_two(&self, number: usize) -> bool {
        let question = &self.questions[number];
        let name = format!(
            "twice {} {} {}",
            question.prompt_id, question.left, question.right
        );
        let drawn = u32::from_str_radix(&digest(name.as_bytes())[..8], 16).expect("hex digits");
        f64::from(drawn) < self.twice * 2_f64.powi(32)
    }

    /// Returns the number of labels so far.
    pub fn said(&self) -> u64 {
        let said = self
            .labels
            .values()
            .filter(|label| label.said != LabelVerdict::Skip);
        said.count() as u64
    }

    pub fn wanted(&self) -> u64 {
        self.task.wanted
    }

    /// Returns the number of questions.
    pub fn questions(&self) -> usize {
        self.questions.len()
    }

    /// Returns the next question for an annotator: the one that they have open, or the first that
    /// nobody else has.
    pub fn next(&mut self, by: &str) -> Value {
        let done = self.done();
        let own = self.open.get(by).map(|(number, _)| *number);
        let own = own.filter(|number| !done.contains(number));
        let labeled: HashSet<usize> = self.said_by(|other| other == by).collect();
        let number = own.or_else(|| {
            let skipped = self
                .labels
                .values()
                .filter(|label| label.said == LabelVerdict::Skip && label.by == by);
            let skipped: HashSet<usize> = skipped
                .filter_map(|label| self.of_label.get(&label.id).copied())
                .collect();
            let others = self
                .open
                .iter()
                .filter(|(other, (_, since))| other.as_str() != by && since.elapsed() < LEFT_OPEN);
            let others: HashSet<usize> = others.map(|(_, (number, _))| *number).collect();
            (0..self.questions.len()).find(|number| {
                let is_open = !done.contains(number) && !others.contains(number);
                is_open && !skipped.contains(number) && !labeled.contains(number)
            })
        });
        match number {
            Some(number) => self.open.insert(by.to_owned(), (number, Instant::now())),
            None => self.open.remove(by),
        };
        let left = self.questions.len() - done.len();
        json!({
            "question": number.map(|number| self.shown(number)),
            "progress": { "said": self.said(), "wanted": self.task.wanted, "left": left },
            "can_undo": self.last_of(by).is_some(),
        })
    }

    fn shown(&self, number: usize) -> Value {
        let question = &self.questions[number];
        let prompt = &self.prompts[&question.prompt_id];
        let text = |candidate| &self.texts[&(question.prompt_id.clone(), candidate)].0;
        let visual = |id: &str, _| Ok::<_, Infallible>(Visual::new(id.to_owned(), [].into()));
        let Ok(shown) = Shown::from(prompt).chat_prompt(&prompt.prompt_id, visual);
        let in_front: Vec<Value> = match shown.check_places() {
            Ok(()) if !shown.places.is_empty() => Vec::new(),
            _ => shown.images.iter().map(visual_part).collect(),
        };
        let mut visuals = shown.images.iter().skip(in_front.len());
        let mut turns = Vec::new();
        for (number, turn) in shown.turns.iter().enumerate() {
            let (role, parts) = match turn.role {
                ChatRole::User => {
                    let places = shown.places_in(number);
                    ("user (earlier)", parts(&turn.text, places, &mut visuals))
                }
                ChatRole::Assistant => ("assistant", vec![json!(turn.text)]),
            };
            turns.push(json!({ "role": role, "parts": parts }));
        }
        let places = shown.places_in(shown.turns.len());
        let question_parts = parts(&shown.question, places, &mut visuals);
        json!({
            "number": number,
            "pictures": in_front,
            "turns": turns,
            "parts": question_parts,
            "left": text(question.left),
            "right": text(question.right),
        })
    }

    /// Records a label and returns its id. Fails if another annotator was faster.
    pub fn say(&mut self, saying: &Saying) -> Result<u64, Failed> {
        let Some(question) = self.questions.get(saying.question).cloned() else {
            return Err(Failed::Words("no such question".to_owned()));
        };
        self.open.remove(&saying.by);
        if self
            .said_by(|by| by == saying.by)
            .any(|number| number == saying.question)
        {
            return Err(Failed::Words(
                "you have already labeled this question".to_owned(),
            ));
        }
        if self.done().contains(&saying.question) {
            return Err(Failed::Words(
                "another annotator has already labeled this question".to_owned(),
            ));
        }
        let label = LabelLine {
            id: self.writer.next_id,
            left: question.left,
            right: question.right,
            left_digest: self.digest(&question, question.left),
            right_digest: self.digest(&question, question.right),
            prompt_id: question.prompt_id,
            said: saying.said,
            by: saying.by.clone(),
            at: now(),
            milliseconds: saying.milliseconds.min(NUMBER_MAX),
        };
        self.writer.add(&label)?;
        self.writer.next_id += 1;
        self.of_label.insert(label.id, saying.question);
        let id = label.id;
        self.labels.insert(id, label);
        Ok(id)
    }

    fn last_of(&self, by: &str) -> Option<u64> {
        let mut own = self.labels.values().rev();
        let last = own.find(|label| label.by == by && self.of_label.contains_key(&label.id));
        last.map(|label| label.id)
    }

    /// Undoes an annotator's label and asks the question again: the label with this id if it is
    /// theirs, or else their last one. Several annotators may share a name; their pages track which
    /// labels are their own.
    pub fn undo(&mut self, by: &str, id: Option<u64>) -> Result<(), Failed> {
        let is_own = |id: &u64| {
            let label = self.labels.get(id);
            label.is_some_and(|label| label.by == by) && self.of_label.contains_key(id)
        };
        let id = match id {
            Some(id) => Some(id).filter(is_own),
            None => self.last_of(by),
        };
        let Some(id) = id else {
            return Ok(());
        };
        let mut label = self.labels[&id].clone();
        label.said = LabelVerdict::Undone;
        label.at = now();
        self.writer.add(&label)?;
        self.labels.remove(&id);
        if let Some(number) = self.of_label.remove(&id) {
            self.open.insert(by.to_owned(), (number, Instant::now()));
        }
        Ok(())
    }

    /// Returns true if a question shows the image or frame.
    pub fn shows(&self, image: &str) -> bool {
        let mut prompts = self.prompts.values();
        prompts.any(|prompt| {
            let videos = prompt.videos.iter().flatten();
            let frames = videos.flat_map(|video| &video.frame_ids);
            prompt.image_ids.iter().chain(frames).any(|id| id == image)
        })
    }
}

/// Returns an image or a video in the form of the page.
fn visual_part(visual: &Visual) -> Value {
    if visual.is_video() {
        let frames: Vec<&str> = visual.frames.iter().map(|frame| &*frame.id).collect();
        json!({ "video": frames })
    } else {
        json!({ "image": visual.id })
    }
}

/// Returns the parts of a text: texts, and the images and videos at its `places`.
fn parts<'a>(
    text: &str,
    places: impl Iterator<Item = usize>,
    visuals: &mut impl Iterator<Item = &'a Visual>,
) -> Vec<Value> {
    let mut parts = Vec::new();
    let mut from = 0;
    for (at, visual) in places.zip(visuals) {
        if at > from {
            parts.push(json!(&text[from..at]));
        }
        parts.push(visual_part(visual));
        from = at;
    }
    if from < text.len() {
        parts.push(json!(&text[from..]));
    }
    parts
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// Returns a question with its sides in an order that is random, but depends only on the question.
pub fn sided(prompt_id: String, one: i32, other: i32) -> Question {
    let drawn = digest(format!("{prompt_id} {one} {other}").as_bytes());
    let is_turned = drawn.as_bytes()[0] % 2 == 1;
    let (left, right) = if is_turned {
        (other, one)
    } else {
        (one, other)
    };
    Question {
        prompt_id,
        left,
        right,
    }
}
