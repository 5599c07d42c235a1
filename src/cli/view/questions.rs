//! Questions that analysts ask, as queries over the tables that a run has.

use serde_json::{Value, json};

use super::asked::{Asked, Problem};
use super::runs::{Runs, Snapshot};
use ovchat_data::store::TableVersion;
use ovchat_data::tables::{Candidate, Pair, Prompt, Reward, Row};
use ovchat_query::identifier;

/// The tables that the queries read.
struct Roles {
    pairs: String,
    answers: String,
    rewards: String,
    prompts: String,
}

/// The tables of an evaluation.
struct Heldout {
    answers: String,
    grades: String,
    prompts: String,
}

/// Returns the questions with their queries.
pub fn questions(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let snapshot = runs.of(asked)?.now()?;
    let mut all = Vec::new();
    if let Some(roles) = roles(&snapshot) {
        all.extend(of_training(&roles));
        all.extend(of_rewards(&roles));
    }
    if let Some(heldout) = heldout(&snapshot) {
        all.extend(of_heldout(&heldout));
    }
    all.extend(of_work());
    let all = all
        .iter()
        .map(|(title, sql)| json!({ "title": title, "sql": sql }));
    Ok(json!({ "questions": all.collect::<Vec<_>>() }))
}

fn roles(snapshot: &Snapshot) -> Option<Roles> {
    let pairs = snapshot
        .of_kind(Pair::KIND)
        .filter(|made| made.round.is_some())
        .last()?;
    let rewards = snapshot.nearest(pairs, Reward::KIND)?;
    let answers = snapshot.nearest(rewards, Candidate::KIND)?;
    let prompts = snapshot.nearest(answers, Prompt::KIND)?;
    let name = |made: &TableVersion| identifier(&made.table);
    Some(Roles {
        pairs: name(pairs),
        answers: name(answers),
        rewards: name(rewards),
        prompts: name(prompts),
    })
}

fn heldout(snapshot: &Snapshot) -> Option<Heldout> {
    let trained = snapshot.of_kind(Pair::KIND).last();
    let trained = trained.and_then(|pairs| snapshot.nearest(pairs, Candidate::KIND));
    let mut grades = snapshot
        .of_kind(Reward::KIND)
        .filter(|made| made.round.is_some());
    let name = |made: &TableVersion| identifier(&made.table);
    grades.find_map(|grades| {
        let answers = snapshot.nearest(grades, Candidate::KIND)?;
        let prompts = snapshot.nearest(answers, Prompt::KIND)?;
        (trained.is_none_or(|trained| trained.table != answers.table)).then(|| Heldout {
            answers: name(answers),
            grades: name(grades),
            prompts: name(prompts),
        })
    })
}

fn of_training(of: &Roles) -> Vec<(&'static str, String)> {
    let Roles {
        pairs,
        answers,
        rewards,
        prompts,
    } = of;
    vec![
        (
            "Which pairs differ only in length?",
            format!(
                "select round, prompt_id, image_ids, prompt, chosen, rejected, margin from {pairs}\n\
                 where starts_with(chosen, trim(rejected, ' .')) or starts_with(rejected, trim(chosen, ' .'))\n\
                 order by margin desc"
            ),
        ),
        (
            "Which pairs are surely wrong?",
            format!(
                "with known as (select prompt_id, answer from {prompts} where answer is not null)\n\
                 select p.round, p.prompt_id, p.image_ids, p.prompt, q.answer, p.chosen, p.rejected, p.margin\n\
                 from known q join {pairs} p on p.prompt_id = q.prompt_id\n\
                 where lower(trim(p.rejected)) = lower(trim(q.answer)) and lower(trim(p.chosen)) <> lower(trim(q.answer))\n\
                 order by p.margin desc limit 500"
            ),
        ),
        (
            "Which images are hardest?",
            format!(
                "select unnest(q.image_ids) as image_id, avg(r.reward) as reward, count(*) as answers\n\
                 from {rewards} r join {prompts} q on q.prompt_id = r.prompt_id\n\
                 group by 1 order by reward limit 50"
            ),
        ),
        (
            "Which prompts have no pair, and why?",
            format!(
                "select x.round, x.stage, x.reason, q.prompt_id, q.image_ids, q.question\n\
                 from rejects x join {prompts} q on q.prompt_id = x.id order by x.round, x.reason"
            ),
        ),
        (
            "Which answers were cut off?",
            format!(
                "select round, prompt_id, candidate, cardinality(token_ids) as tokens, text from {answers}\n\
                 where finish = 'length' order by round, tokens desc"
            ),
        ),
        (
            "Which answers repeat themselves?",
            format!(
                "-- of 2,000 prompts, the first by their hashes\n\
                 with some as (select prompt_id from {answers} group by prompt_id order by prompt_id limit 2000),\n\
                 grams as (\n  select round, prompt_id, candidate, text, token_ids, \
                 unnest(range(1, cast(cardinality(token_ids) as bigint) - 2)) as i\n  \
                 from {answers} where prompt_id in (select prompt_id from some)\n)\n\
                 select round, prompt_id, candidate, text,\n       \
                 1 - cast(count(distinct array_to_string(array_slice(token_ids, i, i + 3), ' ')) as double) / count(*) as repeated_4\n\
                 from grams group by round, prompt_id, candidate, text order by repeated_4 desc limit 50"
            ),
        ),
    ]
}

/// Returns the questions about rewards and about pairs of several rounds.
fn of_rewards(of: &Roles) -> Vec<(&'static str, String)> {
    let Roles {
        pairs,
        answers,
        rewards,
        prompts,
    } = of;
    vec![
        (
            "Does the judge reward length?",
            format!(
                "select r.round, corr(r.reward, cardinality(a.token_ids)) as correlation, count(*) as answers\n\
                 from {rewards} r join {answers} a\n  on a.round = r.round and a.prompt_id = r.prompt_id and a.candidate = r.candidate\n\
                 group by r.round order by r.round"
            ),
        ),
        (
            "On which prompts do the answers differ most?",
            format!(
                "select r.round, r.prompt_id, q.image_ids, q.question, stddev(r.reward) as spread, max(r.reward) - min(r.reward) as margin\n\
                 from {rewards} r join {prompts} q on q.prompt_id = r.prompt_id\n\
                 group by r.round, r.prompt_id, q.image_ids, q.question order by spread desc limit 50"
            ),
        ),
        (
            "Which prompts gave the same pair again?",
            format!(
                "select prompt_id, prompt, chosen, rejected, count(*) as rounds, min(margin) as least, max(margin) as most\n\
                 from {pairs} group by prompt_id, prompt, chosen, rejected having count(*) > 1 order by rounds desc, most desc"
            ),
        ),
    ]
}

fn of_heldout(of: &Heldout) -> Vec<(&'static str, String)> {
    let Heldout {
        answers,
        grades,
        prompts,
    } = of;
    // Of several answers to a prompt, the first one and the mean reward.
    let both = format!(
        "with ends as (select min(round) as first, max(round) as last from {answers}),\n\
         judged as (\n  select a.round, a.prompt_id, max(case when a.candidate = 0 then a.text end) as text, avg(g.reward) as reward\n  \
         from {answers} a join {grades} g on g.round = a.round and g.prompt_id = a.prompt_id and g.candidate = a.candidate\n  \
         group by a.round, a.prompt_id\n),\n\
         changed as (\n  select b.prompt_id, b.text as before, l.text as after, l.reward - b.reward as gain\n  \
         from judged b cross join ends e\n  join judged l on l.prompt_id = b.prompt_id and l.round = e.last\n  where b.round = e.first\n)\n"
    );
    let listed = |order: &str, is_wanted: &str| {
        format!(
            "{both}select c.prompt_id, q.image_ids, q.question, q.answer, c.before, c.after, c.gain\n\
             from changed c join {prompts} q on q.prompt_id = c.prompt_id where c.gain {is_wanted} 0\n\
             order by c.gain {order} limit 50"
        )
    };
    let unchanged = format!(
        "{both}select c.prompt_id, q.image_ids, q.question, q.answer, c.after as answer_then_and_now\n\
         from changed c join {prompts} q on q.prompt_id = c.prompt_id where c.before = c.after order by q.question"
    );
    let wrong = format!(
        "select a.round, a.prompt_id, q.image_ids, q.question, q.answer, a.text, g.reward from {answers} a\n\
         join {grades} g on g.round = a.round and g.prompt_id = a.prompt_id and g.candidate = a.candidate\n\
         join {prompts} q on q.prompt_id = a.prompt_id\n\
         where a.round = (select max(round) from {answers}) and lower(trim(a.text)) <> lower(trim(q.answer))\n  \
         and g.reward > (select avg(reward) from {grades} where round = (select max(round) from {grades}))\n\
         order by g.reward desc"
    );
    let by_topic = format!(
        "{both}, topics as (\n  select split_part(q.question, ' ', 1) || ' ' || split_part(q.question, ' ', 2) as topic, c.gain\n  \
         from changed c join {prompts} q on q.prompt_id = c.prompt_id\n), \
         won as (\n  select topic, sum(case when gain <> 0 then 1 else 0 end) as n, sum(case when gain = 0 then 1 else 0 end) as ties,\n         avg(case when gain > 0 then 1.0 when gain < 0 then 0.0 end) as rate from topics group by topic\n)\n\
         -- the 95 % interval of Wilson\n\
         select topic, n, ties, rate,\n       (rate + 1.9208 / n - 1.96 * sqrt(rate * (1 - rate) / n + 0.9604 / (n * n))) / (1 + 3.8416 / n) as low,\n       \
         (rate + 1.9208 / n + 1.96 * sqrt(rate * (1 - rate) / n + 0.9604 / (n * n))) / (1 + 3.8416 / n) as high\n\
         from won where n > 0 order by n desc"
    );
    vec![
        ("Which held-out answers improved most?", listed("desc", ">")),
        ("Which held-out answers got worse?", listed("asc", "<")),
        ("Which held-out answers did not change?", unchanged),
        ("Which held-out answers are wrong, but rewarded?", wrong),
        (
            "What is the win rate by topic, last round against first?",
            by_topic,
        ),
    ]
}

fn of_work() -> Vec<(&'static str, String)> {
    vec![(
        "Where does the time go?",
        "select stage, round, sum(seconds) as seconds, sum(seconds_waiting) as waiting_for_images,\n       \
         sum(answer_tokens) / sum(seconds) as answer_tokens_a_second\nfrom telemetry group by stage, round order by seconds desc"
            .to_owned(),
    )]
}
