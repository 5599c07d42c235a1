//! Kills of the page's server while six annotators label and undo: every acknowledged label exists
//! once, and a label that was taken back does not.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ovchat_data::store::{LabelFiles, LabelLine, LabelVerdict};
use serde_json::{Value, json};

use super::{doom, line_plan, shim};
use crate::people::{Page, scene};
use crate::scene::{Numbers, Scene};

/// The seed of the moments and of the annotators' choices.
const SEED: u64 = 20_261_129;

const LABELERS: usize = 6;

/// The number of kills, every other one at an operation on the label files.
const KILLS: usize = 24;

/// The longest duration of the test, and the longest wait for a response.
const LIMIT: Duration = Duration::from_mins(2);
const ANSWER: Duration = Duration::from_secs(20);

/// The state that annotators share: the page's address and its counters.
#[derive(Default)]
struct Place {
    /// Address and key; `None` while no server runs.
    server: Mutex<Option<(String, String)>>,
    acknowledged: AtomicUsize,
    is_over: AtomicBool,
}

/// Stops the annotators, also if the test fails.
struct Closing<'p>(&'p Place);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::SeqCst);
        *self.0.server.lock().unwrap() = None;
    }
}

/// The outcome of a request.
enum Went {
    /// No server was running.
    Unsent,
    /// The request was sent, but no complete response arrived.
    Unanswered,
    Answered(u16, Value),
}

impl Place {
    fn ask(&self, what: &str, body: &str) -> Went {
        let server = self.server.lock().unwrap().clone();
        let Some((address, key)) = server else {
            return Went::Unsent;
        };
        let Ok(mut stream) = TcpStream::connect(&address) else {
            return Went::Unsent;
        };
        stream.set_read_timeout(Some(ANSWER)).unwrap();
        let length = body.len();
        let request = format!(
            "{what} HTTP/1.1\r\nHost: {address}\r\nX-Key: {key}\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        let mut text = String::new();
        let begun = Instant::now();
        let came = stream
            .write_all(request.as_bytes())
            .and_then(|()| stream.read_to_string(&mut text));
        assert!(begun.elapsed() < ANSWER, "{what} hangs: {came:?}");
        let answer = came.ok().and_then(|_| text.split_once("\r\n\r\n"));
        let read = answer.and_then(|(head, json)| {
            let status = head.split(' ').nth(1)?.parse().ok()?;
            Some(Went::Answered(status, serde_json::from_str(json).ok()?))
        });
        read.unwrap_or(Went::Unanswered)
    }
}

/// A label from the annotator's point of view.
#[derive(Debug)]
struct Own {
    question: u64,
    /// The milliseconds that the label took; they identify it.
    name: u64,
    said: LabelVerdict,
    /// True if the label was acknowledged and not taken back since. It is unknown if the other
    /// labels were written or taken back.
    is_sure: bool,
}

struct Labeler<'p> {
    place: &'p Place,
    by: String,
    numbers: Numbers,
    /// The labels that may exist, in the order in which they were sent.
    own: Vec<Own>,
    sent: u64,
    taken_back: usize,
    unanswered: usize,
}

impl<'p> Labeler<'p> {
    fn new(place: &'p Place, number: usize) -> Self {
        Self {
            place,
            by: format!("labeler-{number}"),
            numbers: Numbers(SEED + number as u64),
            own: Vec::new(),
            sent: 0,
            taken_back: 0,
            unanswered: 0,
        }
    }

    fn work(mut self) -> Self {
        let begun = Instant::now();
        while !self.place.is_over.load(Ordering::SeqCst) && begun.elapsed() < LIMIT {
            let has_some = self.own.iter().any(|own| own.is_sure);
            if has_some && self.numbers.below(6) == 0 {
                self.take_back();
            } else {
                self.say();
            }
            thread::sleep(Duration::from_millis(2));
        }
        self
    }

    fn say(&mut self) {
        let next = format!("GET /api/next?by={}", self.by);
        let Went::Answered(200, next) = self.place.ask(&next, "") else {
            return;
        };
        let question = next["question"]["number"].as_u64();
        let question = question.expect("there are questions for all");
        // Without a response, the label goes to the next server again.
        loop {
            let said =
                [LabelVerdict::Left, LabelVerdict::Right, LabelVerdict::Tie][self.numbers.below(3)];
            self.sent += 1;
            let name = self.sent;
            let body =
                json!({ "by": self.by, "question": question, "said": said, "milliseconds": name });
            let server = self.place.server.lock().unwrap().clone();
            let own = |is_sure| Own {
                question,
                name,
                said,
                is_sure,
            };
            match self.place.ask("POST /api/say", &body.to_string()) {
                Went::Answered(200, _) => {
                    self.place.acknowledged.fetch_add(1, Ordering::SeqCst);
                    self.forget(question);
                    self.own.push(own(true));
                    return;
                }
                // Another annotator was faster, or an earlier attempt was written.
                Went::Answered(409, _) | Went::Unsent => return,
                Went::Answered(status, why) => panic!("{status}: {why}"),
                Went::Unanswered => {
                    self.unanswered += 1;
                    self.own.push(own(false));
                    while *self.place.server.lock().unwrap() == server {
                        thread::sleep(Duration::from_millis(1));
                    }
                    while self.place.server.lock().unwrap().is_none() {
                        if self.place.is_over.load(Ordering::SeqCst) {
                            return;
                        }
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            }
        }
    }

    fn take_back(&mut self) {
        let body = json!({ "by": self.by }).to_string();
        match self.place.ask("POST /api/undo", &body) {
            Went::Answered(200, next) => {
                self.taken_back += 1;
                let question = next["question"]["number"].as_u64();
                let last = self
                    .own
                    .iter()
                    .rposition(|own| Some(own.question) == question);
                let last = last.expect("what is taken back was said by the same one");
                let later = self.own.split_off(last + 1);
                let lost: Vec<_> = later.iter().filter(|own| own.is_sure).collect();
                assert!(
                    lost.is_empty(),
                    "{} said last, and they are gone: {lost:?}",
                    self.by
                );
                let question = self.own.pop().expect("the last").question;
                self.forget(question);
            }
            Went::Unsent => {}
            Went::Answered(status, why) => panic!("{status}: {why}"),
            Went::Unanswered => {
                self.unanswered += 1;
                for own in self.own.iter_mut().rev() {
                    let was_sure = std::mem::replace(&mut own.is_sure, false);
                    if was_sure {
                        break;
                    }
                }
            }
        }
    }

    /// Forgets the uncertain labels of a question, which a later acknowledgment rules out.
    fn forget(&mut self, question: u64) {
        let is_it = |own: &&Own| own.question == question && own.is_sure;
        let lost = self.own.iter().find(is_it);
        assert!(lost.is_none(), "{} is asked again about {lost:?}", self.by);
        self.own.retain(|own| own.question != question);
    }
}

/// Kills servers one after another. Returns the number of servers that moved a torn line aside.
fn kill_servers(scene: &Scene, place: &Place) -> usize {
    let _closing = Closing(place);
    let shim = shim(scene);
    let mut numbers = Numbers(SEED);
    let mut torn = 0;
    for kill in 0..KILLS {
        let mut command = scene.command(&["label", "scripted"]);
        let is_planned = kill % 2 == 0;
        // The first server finds no label file.
        let least = if kill == 0 { 20 } else { 1 };
        let plan = line_plan("/human_labels", kill / 2, least + numbers.below(40));
        if is_planned {
            doom(&mut command, scene, &shim, &plan);
        }
        let wanted = place.acknowledged.load(Ordering::SeqCst) + 1 + numbers.below(25);
        let rest = Duration::from_micros(numbers.below(3_000) as u64);
        let begun = Instant::now();
        let ended = match Page::begin(command) {
            Err(ended) => ended,
            Ok(mut page) => {
                torn += usize::from(page.before.contains(".jsonl.torn"));
                let address = page.address.trim_start_matches("http://").to_owned();
                *place.server.lock().unwrap() = Some((address, page.key.clone()));
                while page.child.try_wait().unwrap().is_none() {
                    if !is_planned && place.acknowledged.load(Ordering::SeqCst) >= wanted {
                        thread::sleep(rest);
                        page.child.kill().unwrap();
                    }
                    assert!(begun.elapsed() < ANSWER, "kill {kill}: nobody labels");
                    thread::sleep(Duration::from_micros(200));
                }
                *place.server.lock().unwrap() = None;
                page.child.wait().unwrap()
            }
        };
        assert_eq!(ended.signal(), Some(9), "kill {kill} ({plan}): {ended}");
    }
    torn
}

#[test]
fn what_was_acknowledged_is_there_once_however_often_the_server_is_killed() {
    let scene = scene(20);
    scene.prompts(100);
    assert_eq!(scene.pipeline(&["run", "p.yaml"]).code, Some(3));
    let place = Place::default();
    let (labelers, torn) = thread::scope(|scope| {
        let begin = |number| {
            let labeler = Labeler::new(&place, number);
            scope.spawn(move || labeler.work())
        };
        let labelers: Vec<_> = (0..LABELERS).map(begin).collect();
        let torn = kill_servers(&scene, &place);
        let labelers = labelers.into_iter().map(|labeler| labeler.join().unwrap());
        (labelers.collect::<Vec<_>>(), torn)
    });
    // One more server repairs the line that the last kill truncated.
    drop(Page::open(&scene));
    let files = LabelFiles::new(&scene.path("runs/scripted"), "pairs", Some(1));
    let (labels, corrupt) = files.read().unwrap();
    assert_eq!(corrupt, 0);
    let lines = std::fs::read_to_string(files.path()).unwrap();
    let lines: Vec<LabelLine> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let mut possible = 0;
    for Labeler { by, own, .. } in &labelers {
        for own in own {
            let is_it = |label: &&LabelLine| label.by == *by && label.milliseconds == own.name;
            let said: Vec<LabelVerdict> = labels
                .iter()
                .filter(is_it)
                .map(|label| label.said)
                .collect();
            let all = [own.said];
            let expected: &[LabelVerdict] = if own.is_sure || !said.is_empty() {
                &all
            } else {
                &[]
            };
            assert_eq!(said, expected, "{by}: {own:?}");
            let written = lines.iter().filter(is_it);
            let written = written
                .filter(|label| label.said != LabelVerdict::Undone)
                .count();
            assert!(written <= 1, "{by}: {own:?} is there {written} times");
            possible += said.len();
        }
    }
    assert_eq!(
        possible,
        labels.len(),
        "a label that was taken back is there"
    );
    let of = |label: &LabelLine| (label.prompt_id.clone(), label.left, label.right);
    let mut questions: Vec<_> = labels.iter().map(of).collect();
    questions.sort();
    questions.dedup();
    assert_eq!(questions.len(), labels.len(), "a question has two labels");
    scene.succeeds(&["run", "p.yaml"]);

    let acknowledged = place.acknowledged.load(Ordering::SeqCst);
    let sure = labelers.iter().flat_map(|labeler| &labeler.own);
    let sure = sure.filter(|own| own.is_sure).count();
    let taken_back: usize = labelers.iter().map(|labeler| labeler.taken_back).sum();
    let unanswered: usize = labelers.iter().map(|labeler| labeler.unanswered).sum();
    println!(
        "{KILLS} kills of the page under {LABELERS} labelers: {acknowledged} labels acknowledged, {taken_back} taken back, \
         {unanswered} requests unanswered, {torn} torn lines set aside, seed {SEED}; {sure} of {} labels were surely there",
        labels.len()
    );
    assert!(acknowledged > 5 * KILLS && taken_back > KILLS / 2);
    assert!(
        sure > acknowledged / 2,
        "{sure} of {acknowledged} are looked at"
    );
    assert!(torn > 0, "no line was torn");
}
