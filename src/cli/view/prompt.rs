//! A prompt's life: its answers in every round with their rewards, which of them became a pair and why
//! the others did not, the steps that trained on it, and its answers in the evaluation.

use serde_json::{Value, json};

use super::asked::{Asked, Problem};
use super::lists::{kept, turns, videos};
use super::runs::{Run, Runs, Snapshot, literal};
use ovchat_data::store::TableVersion;
use ovchat_data::tables::{
    Answer, Candidate, DpoStep, Pair, Prompt, Reference, Reject, Reward, Row,
};
use ovchat_pipeline::stages::steps_with;

/// The run that is read, and the request.
struct Reading<'r> {
    runs: &'r Runs,
    run: &'r Run,
    snapshot: &'r Snapshot,
    asked: &'r Asked,
    id: &'r str,
}

/// Returns a prompt's life.
pub fn life(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let run = runs.of(asked)?;
    let snapshot = run.now()?;
    let id = asked.needed("id")?;
    let reading = Reading {
        runs,
        run,
        snapshot: &snapshot,
        asked,
        id,
    };
    let mut rounds = Vec::new();
    let mut evaluations = Vec::new();
    let trained: Vec<&str> = snapshot
        .of_kind(Pair::KIND)
        .filter_map(|pairs| snapshot.nearest(pairs, Candidate::KIND))
        .map(|made| made.table.as_str())
        .collect();
    for made in snapshot.of_kind(Candidate::KIND) {
        let answers: Vec<Candidate> = reading.about(made)?;
        if answers.is_empty() {
            continue;
        }
        let is_training = match trained[..] {
            // Before the pairs of a first round are there, nothing else tells it from evaluation.
            [] => answers.len() > 1,
            _ => trained.contains(&made.table.as_str()),
        };
        if is_training {
            rounds.push(reading.round(made, &answers)?);
        } else {
            evaluations.extend(reading.evaluated(made, &answers)?);
        }
    }
    for made in snapshot.of_kind(Answer::KIND) {
        evaluations.extend(reading.written(made)?);
    }
    let by_round = |value: &Value| value["round"].as_u64();
    rounds.sort_by_key(by_round);
    evaluations.sort_by_key(by_round);
    let prompt = match reading.prompt()? {
        Some(prompt) => prompt,
        None => reading.of_pairs(&mut rounds)?,
    };
    Ok(json!({ "prompt": prompt, "rounds": rounds, "evaluations": evaluations }))
}

impl Reading<'_> {
    fn about<R: Row>(&self, made: &TableVersion) -> Result<Vec<R>, Problem> {
        self.snapshot.about(self.runs, self.asked, made, self.id)
    }

    /// Returns the prompt itself.
    fn prompt(&self) -> Result<Option<Value>, Problem> {
        for made in self.snapshot.of_kind(Prompt::KIND) {
            let found: Option<Prompt> = if made.round.is_none() && made.complete {
                let (run, ids) = (self.run, [self.id]);
                let found = run.prompts(self.runs, self.snapshot, self.asked, made, &ids)?;
                found.into_iter().next().flatten()
            } else {
                self.about(made)?.pop()
            };
            if let Some(prompt) = found {
                return Ok(Some(json!({
                    "prompt_id": prompt.prompt_id, "id": prompt.id, "table": made.table, "question": prompt.question,
                    "system": prompt.system, "turns": turns(&prompt.turns), "images": prompt.image_ids,
                    "videos": videos(prompt.videos.as_ref()), "answer": prompt.answer, "captions": prompt.captions,
                    "kept": kept(prompt.kept.as_ref()),
                })));
            }
        }
        Ok(None)
    }

    /// Returns the prompt of pairs that people wrote, and adds the rounds that trained on them.
    fn of_pairs(&self, rounds: &mut Vec<Value>) -> Result<Value, Problem> {
        for made in self.snapshot.of_kind(Pair::KIND) {
            let pairs: Vec<Pair> = self.about(made)?;
            let Some(pair) = pairs.first() else {
                continue;
            };
            let mut trainings = self.trainings_of(made);
            trainings.sort_by_key(|steps| steps.round);
            for steps in trainings {
                let training = self.step_of(steps, made, pair)?;
                rounds.push(self.round_of_pair(made, steps.round, pair, &training)?);
            }
            if rounds.is_empty() {
                let training = Err("training has not begun".to_owned());
                rounds.push(self.round_of_pair(made, made.round, pair, &training)?);
            }
            return Ok(json!({
                "prompt_id": pair.prompt_id, "id": pair.id, "table": made.table, "question": pair.prompt,
                "system": pair.system, "turns": turns(&pair.turns), "images": pair.image_ids,
                "videos": videos(pair.videos.as_ref()), "answer": null, "captions": pair.captions,
                "kept": kept(pair.kept.as_ref()),
            }));
        }
        Err(Problem::Missing(format!(
            "{} has no prompt {}",
            self.run.name, self.id
        )))
    }

    /// Returns a round that trained on a pair that people wrote.
    fn round_of_pair(
        &self,
        made: &TableVersion,
        round: Option<u32>,
        pair: &Pair,
        training: &Result<Value, String>,
    ) -> Result<Value, Problem> {
        let mut reference: Vec<Reference> = Vec::new();
        let of_round = |of: &&&TableVersion| of.round.is_none() || of.round == round;
        for of in self.derived(Reference::KIND, made).iter().filter(of_round) {
            reference.extend(self.about(of)?);
        }
        let reference = reference.iter().find(|row| row.pair == pair.row_key);
        let answer = |candidate: usize, text: &str, role: &str, reward: Option<f32>| {
            let logp = reference.map(|row| [row.chosen_logp, row.rejected_logp][candidate]);
            let from = match logp {
                Some(_) => "the reference pass",
                None => "the answer was not sampled",
            };
            let rewards = reward.map(|reward| json!({ "table": made.table, "reward": reward }));
            json!({
                "candidate": candidate, "text": text, "tokens": null, "finish": null,
                "rewards": rewards.into_iter().collect::<Vec<_>>(),
                "logp_before": logp, "logp_before_from": from, "logp_after": null,
                "logp_after_from": NOT_READ, "role": role, "why": "as in the source",
            })
        };
        Ok(json!({
            "round": round, "table": made.table,
            "answers": [
                answer(0, &pair.chosen, "chosen", pair.chosen_reward),
                answer(1, &pair.rejected, "rejected", pair.rejected_reward),
            ],
            "pairs": [of_pair(made, pair)], "rejects": [],
            "training": training.as_ref().ok(), "training_why": training.as_ref().err(),
        }))
    }

    /// Returns the answers of a round with what became of them.
    fn round(&self, made: &TableVersion, answers: &[Candidate]) -> Result<Value, Problem> {
        let rewards = self.rewards_of(made)?;
        let mut pairs: Vec<(&TableVersion, Vec<Pair>)> = Vec::new();
        for of in self.derived(Pair::KIND, made) {
            pairs.push((of, self.about(of)?));
        }
        let rejects = self.rejects(made, &pairs)?;
        let next = self.next_round(made)?;
        let shown = answers.iter().map(|answer| {
            let own = pairs.iter().find_map(|(of, pairs)| {
                let own = pairs.iter().find(|pair| role(pair, answer.candidate).is_some());
                Some((*of, own?))
            });
            let first = pairs.iter().find_map(|(of, pairs)| Some((*of, pairs.first()?)));
            let pair = own.or(first);
            let role = own.and_then(|(_, pair)| role(pair, answer.candidate));
            let of_answer: Vec<&(&TableVersion, Reward)> = rewards
                .iter()
                .filter(|(_, reward)| reward.candidate == answer.candidate)
                .collect();
            let same = next.iter().find(|other| other.token_ids == answer.token_ids);
            json!({
                "candidate": answer.candidate, "text": answer.text, "tokens": answer.token_ids.len(),
                "finish": answer.finish.as_str(), "rewards": of_answer.iter().map(|(of, reward)| of_reward(of, reward)).collect::<Vec<_>>(),
                "logp_before": answer.logp, "logp_before_from": "sampling", "logp_after": same.map(|same| same.logp),
                "logp_after_from": if same.is_some() { "the same answer was sampled in the next round" } else { NOT_READ },
                "role": role, "why": self.why(pair, answer, &rewards, &rejects),
            })
        });
        let shown: Vec<Value> = shown.collect();
        let training = self.training(made, &pairs)?;
        let of_pairs = pairs.iter();
        let of_pairs = of_pairs.flat_map(|(of, pairs)| pairs.iter().map(|pair| of_pair(of, pair)));
        let rejected = rejects.iter().map(|reject| {
            json!({ "stage": reject.stage, "class": reject.class.as_str(), "reason": reject.reason })
        });
        Ok(json!({
            "round": made.round, "table": made.table, "answers": shown, "pairs": of_pairs.collect::<Vec<_>>(),
            "rejects": rejected.collect::<Vec<_>>(),
            "training": training.as_ref().ok(), "training_why": training.as_ref().err(),
        }))
    }

    /// Returns why an answer became part of a pair, or did not.
    fn why(
        &self,
        pair: Option<(&TableVersion, &Pair)>,
        answer: &Candidate,
        rewards: &[(&TableVersion, Reward)],
        rejects: &[Reject],
    ) -> String {
        let Some((of, pair)) = pair else {
            return match rejects.first() {
                Some(reject) => format!("no pair: {}", reject.reason),
                None => "no pair yet".to_owned(),
            };
        };
        let source = self.snapshot.nearest(of, Reward::KIND);
        let of_pair = |reward: &&(&TableVersion, Reward)| {
            source.is_some_and(|source| std::ptr::eq(source, reward.0))
        };
        let mut of_answer = rewards.iter().filter(of_pair);
        let own = of_answer.find(|(_, reward)| reward.candidate == answer.candidate);
        let Some((_, own)) = own else {
            return "it has no reward".to_owned();
        };
        let all = rewards
            .iter()
            .filter(of_pair)
            .map(|(_, reward)| reward.reward);
        let (low, high) = all.fold((f32::MAX, f32::MIN), |(low, high), reward| {
            (low.min(reward), high.max(reward))
        });
        let stage = of.because["settings"].as_object();
        let stage = stage.and_then(|settings| settings.keys().next());
        let stage = stage.map_or("the stage", String::as_str);
        match role(pair, answer.candidate) {
            Some("chosen") if own.reward >= high => "the highest reward".to_owned(),
            Some("rejected") if own.reward <= low => "the lowest reward".to_owned(),
            Some(_) => format!("`{stage}` took it"),
            None if stage != "select_extremes" => format!("`{stage}` did not take it"),
            None if own.reward >= high => format!("as high as the chosen one; {LOWER}"),
            None if own.reward <= low => format!("as low as the rejected one; {LOWER}"),
            None => "its reward is between those of the pair".to_owned(),
        }
    }

    /// Returns the step that trained on the first pair of the prompt, or why there is none.
    fn training(
        &self,
        answers: &TableVersion,
        pairs: &[(&TableVersion, Vec<Pair>)],
    ) -> Result<Result<Value, String>, Problem> {
        let first = pairs
            .iter()
            .find_map(|(of, pairs)| Some((*of, pairs.first()?)));
        let Some((of, pair)) = first else {
            return Ok(Err(
                "no pair, so nothing was trained on this prompt".to_owned()
            ));
        };
        let mut trainings = self.trainings_of(of).into_iter();
        match trainings.find(|steps| steps.round == answers.round) {
            Some(steps) => self.step_of(steps, of, pair),
            None => Ok(Err("training has not begun".to_owned())),
        }
    }

    /// Returns the trainings on a table of pairs.
    fn trainings_of<'s>(&'s self, pairs: &TableVersion) -> Vec<&'s TableVersion> {
        let steps = self.snapshot.of_kind(DpoStep::KIND);
        let reads = |steps: &&TableVersion| {
            let mut inputs = self.snapshot.inputs(steps);
            inputs.any(|input| std::ptr::eq(input, pairs))
        };
        steps.filter(reads).collect()
    }

    /// Returns the first step of a training that had a pair, or why it is not known.
    fn step_of(
        &self,
        steps: &TableVersion,
        pairs: &TableVersion,
        pair: &Pair,
    ) -> Result<Result<Value, String>, Problem> {
        let settings = &steps.because["settings"]["train_dpo"];
        if settings["group_by_length"] == true {
            let why = "pairs are grouped by length, so the step is not known from the order";
            return Ok(Err(why.to_owned()));
        }
        let number = |name: &str| settings[name].as_u64().unwrap_or(1).max(1) as u32;
        let seed = steps.because["seed"].as_u64().unwrap_or(0);
        let Some(row) = self.row_of(pairs, pair)? else {
            return Ok(Err("the pair is not in its table any more".to_owned()));
        };
        let place = (seed, steps.table.as_str(), steps.round);
        let by = (number("epochs"), number("batch_pairs"));
        let found = steps_with(place, row, pairs.rows() as usize, by);
        let Some((step, epoch)) = found.first() else {
            return Ok(Err("no step has the pair".to_owned()));
        };
        let condition = format!("step = {step}");
        let rows: Vec<DpoStep> = self
            .snapshot
            .rows(self.runs, self.asked, steps, &condition, 1)?;
        let of_step = rows.first();
        let total = (pairs.rows().div_ceil(by.1.into())).saturating_mul(by.0.into());
        Ok(Ok(json!({
            "table": steps.table, "step": step, "steps": total, "epoch": epoch,
            "loss": of_step.map(|row| row.loss), "accuracy": of_step.map(|row| row.accuracy),
        })))
    }

    /// Returns the number of the row of a pair in its table.
    fn row_of(&self, made: &TableVersion, pair: &Pair) -> Result<Option<u32>, Problem> {
        let table = self.snapshot.table(made, Pair::schema());
        let condition = format!("row_key = {}", literal(&pair.row_key));
        let room = self.runs.room(self.asked)?;
        let mut found = None;
        ovchat_query::positions(&table, Some(&condition), None, room.room(), |rows| {
            found = found.or(rows.first().copied());
            self.asked.go_on()
        })?;
        let before = |file: u32| {
            made.files()
                .take(file as usize)
                .map(|file| file.rows)
                .sum::<u64>()
        };
        Ok(found.map(|(file, row)| (before(file) + row) as u32))
    }

    /// Returns the versions of a kind that were built from a version.
    fn derived<'s>(&'s self, kind: &'static str, from: &'s TableVersion) -> Vec<&'s TableVersion> {
        let all = self.snapshot.of_kind(kind);
        let is_from = |made: &&TableVersion| {
            let nearest = self
                .snapshot
                .nearest(made, from.kind.as_deref().unwrap_or_default());
            nearest.is_some_and(|nearest| std::ptr::eq(nearest, from))
        };
        all.filter(is_from).collect()
    }

    /// Returns the rewards of the answers in a table, of all judges.
    fn rewards_of<'s>(
        &'s self,
        answers: &'s TableVersion,
    ) -> Result<Vec<(&'s TableVersion, Reward)>, Problem> {
        let mut rewards = Vec::new();
        for made in self.derived(Reward::KIND, answers) {
            let rows: Vec<Reward> = self.about(made)?;
            rewards.extend(rows.into_iter().map(|reward| (made, reward)));
        }
        Ok(rewards)
    }

    /// Returns the rejects of the prompt in the stages from a table of answers to its pairs.
    fn rejects(
        &self,
        answers: &TableVersion,
        pairs: &[(&TableVersion, Vec<Pair>)],
    ) -> Result<Vec<Reject>, Problem> {
        let rewards = self.derived(Reward::KIND, answers);
        let pairs = pairs.iter().map(|(made, _)| *made);
        let mut rejects = Vec::new();
        for made in pairs.chain(rewards).chain([answers]) {
            let files = made.rejects().cloned().collect::<Vec<_>>();
            let of_rejects = TableVersion {
                parts: vec![ovchat_data::store::PartRecord {
                    part: 0,
                    rows_in: 0,
                    files,
                    rejects: Vec::new(),
                    telemetry: Vec::new(),
                    faults: 0,
                    dropped: 0,
                    took: None,
                }],
                ..made.clone()
            };
            if of_rejects.files().next().is_some() {
                let condition = format!("id = {}", literal(self.id));
                let rows =
                    self.snapshot
                        .rows(self.runs, self.asked, &of_rejects, &condition, 100)?;
                rejects.extend::<Vec<Reject>>(rows);
            }
        }
        Ok(rejects)
    }

    /// Returns the answers to the prompt in the next round.
    fn next_round(&self, answers: &TableVersion) -> Result<Vec<Candidate>, Problem> {
        let mut all = self.snapshot.of_kind(Candidate::KIND);
        let next = answers.round.map(|round| round + 1);
        let next = all.find(|made| made.table == answers.table && made.round == next);
        next.map_or_else(|| Ok(Vec::new()), |next| self.about(next))
    }

    /// Returns the answers of an evaluation.
    fn evaluated(&self, made: &TableVersion, answers: &[Candidate]) -> Result<Vec<Value>, Problem> {
        let rewards = self.rewards_of(made)?;
        let shown = answers.iter().map(|answer| {
            let of_answer = rewards.iter().filter(|(_, reward)| reward.candidate == answer.candidate);
            json!({
                "table": made.table, "round": made.round, "candidate": answer.candidate, "text": answer.text,
                "tokens": answer.token_ids.len(), "rewards": of_answer.map(|(of, reward)| of_reward(of, reward)).collect::<Vec<_>>(),
            })
        });
        Ok(shown.collect())
    }

    /// Returns answers that another program wrote.
    fn written(&self, made: &TableVersion) -> Result<Vec<Value>, Problem> {
        let answers: Vec<Answer> = self.about(made)?;
        let rewards = if answers.is_empty() {
            Vec::new()
        } else {
            self.rewards_of(made)?
        };
        let shown = answers.iter().map(|answer| {
            let of_answer = rewards.iter().filter(|(_, reward)| reward.candidate == answer.candidate);
            json!({
                "table": made.table, "round": made.round, "candidate": answer.candidate, "text": answer.text,
                "tokens": null, "rewards": of_answer.map(|(of, reward)| of_reward(of, reward)).collect::<Vec<_>>(),
            })
        });
        Ok(shown.collect())
    }
}

/// The reason why an answer has no log-probability after training.
const NOT_READ: &str = "no later stage read this answer";

/// The rule of `select_extremes` for equal rewards.
const LOWER: &str = "of equal rewards, the lower candidate number is taken";

fn of_pair(made: &TableVersion, pair: &Pair) -> Value {
    json!({
        "table": made.table, "key": pair.row_key, "chosen_candidate": pair.chosen_candidate,
        "rejected_candidate": pair.rejected_candidate, "margin": pair.margin,
    })
}

/// Returns the part of an answer in a pair.
fn role(pair: &Pair, candidate: i32) -> Option<&'static str> {
    if pair.chosen_candidate == Some(candidate) {
        Some("chosen")
    } else if pair.rejected_candidate == Some(candidate) {
        Some("rejected")
    } else {
        None
    }
}

fn of_reward(made: &TableVersion, reward: &Reward) -> Value {
    json!({
        "table": made.table, "judge": reward.judge, "reward": reward.reward, "reply": reward.reply,
        "label": reward.label, "failure": reward.failure,
    })
}
