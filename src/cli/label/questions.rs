//! The questions of a labeling task, and the query that selects them.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::super::failed::Failed;
use super::super::sql::run_table;
use super::queue::{Questions, sided};
use ovchat_data::store::{LabelTask, RunFolder, digest};
use ovchat_data::tables::{Prompt, Row, rows};
use ovchat_query as query;

/// The maximum number of questions loaded at once; annotators label some hundreds an hour.
const QUESTIONS_MAX: usize = 100_000;

rows! {
    /// Two responses to a prompt, most informative pairs first.
    pub struct AnswerPair: "asked" => {
        /// The prompt.
        pub prompt_id: String,
        /// The number of a response to the prompt.
        pub one: i32,
        /// The number of another response to the prompt.
        pub other: i32,
    }
}

rows! {
    /// The text of a candidate.
    pub struct CandidateText: "answer" => {
        /// The prompt.
        pub prompt_id: String,
        /// The number of the response among those to the prompt.
        pub candidate: i32,
        /// The response.
        pub text: String,
    }
}

/// Finds the questions of a labeling task, and the texts that they show.
pub fn find(run: &RunFolder, task: &LabelTask) -> Result<Questions, Failed> {
    let mut tables = vec![run_table(run, &task.candidates, task.candidates_round)?];
    for rewards in &task.rewards {
        tables.push(run_table(run, rewards, task.round)?);
    }
    let mut found = Questions::default();
    query::run::<Failed>(&sql(task), &[], &tables, &[], None, |batch| {
        let rows = AnswerPair::from_batch(&batch);
        for row in rows.map_err(|misfit| Failed::Words(misfit.to_string()))? {
            found.list.push(sided(row.prompt_id, row.one, row.other));
        }
        Ok(())
    })?;
    let columns = format!("select prompt_id, candidate, text from {}", task.candidates);
    query::run::<Failed>(&columns, &[], &tables, &[], None, |batch| {
        let rows = CandidateText::from_batch(&batch);
        for row in rows.map_err(|misfit| Failed::Words(misfit.to_string()))? {
            let digest = digest(row.text.as_bytes());
            let name = (row.prompt_id, row.candidate);
            found.texts.insert(name, (row.text, digest));
        }
        Ok(())
    })?;
    let named = found.list.iter().map(|question| &question.prompt_id);
    let named: HashSet<&String> = named.collect();
    for batch in run.reader(&task.prompts, task.prompts_round) {
        let rows = Prompt::from_batch(&batch?);
        for row in rows.map_err(|misfit| Failed::Words(misfit.to_string()))? {
            if named.contains(&row.prompt_id) {
                found.prompts.insert(row.prompt_id.clone(), row);
            }
        }
    }
    Ok(found)
}

/// Returns the query for pairs of different responses to a prompt. First come, for each prompt, the
/// two that the judges disagree on most: the difference of their rewards in standard deviations
/// over the prompt's responses. With a single judge, the closest two come first.
fn sql(task: &LabelTask) -> String {
    let mut with = Vec::new();
    let mut joins = String::new();
    let mut apart = Vec::new();
    for (number, rewards) in task.rewards.iter().enumerate() {
        with.push(format!(
            "z{number} as (
                select prompt_id, candidate, case when stddev_pop(reward) over w = 0 then 0 else
                       (reward - avg(reward) over w) / stddev_pop(reward) over w end as z
                from {rewards} window w as (partition by prompt_id)
             )"
        ));
        write!(
            joins,
            " left join z{number} a{number} on a{number}.prompt_id = p.prompt_id and a{number}.candidate = p.one
              left join z{number} b{number} on b{number}.prompt_id = p.prompt_id and b{number}.candidate = p.other"
        )
        .expect("writing to a string does not fail");
        apart.push(format!("coalesce(a{number}.z - b{number}.z, 0)"));
    }
    let disagreement = match &apart[..] {
        [] => "0".to_owned(),
        [alone] => format!("-abs({alone})"),
        several => format!("greatest({0}) - least({0})", several.join(", ")),
    };
    with.insert(
        0,
        format!(
            "answers as (select prompt_id, min(candidate) as candidate from {} group by prompt_id, md5(text)),
             p as (
                select a.prompt_id, a.candidate as one, b.candidate as other
                from answers a join answers b on a.prompt_id = b.prompt_id and a.candidate < b.candidate
             )",
            task.candidates
        ),
    );
    format!(
        "with {}, weighed as (
            select p.prompt_id, p.one, p.other, {disagreement} as disagreement,
                   md5(concat(p.prompt_id, ' ', p.one, ' ', p.other)) as drawn
            from p {joins}
         ), numbered as (
            select *, row_number() over (partition by prompt_id order by disagreement desc, drawn) as nth from weighed
         )
         select prompt_id, one, other from numbered order by nth, disagreement desc, drawn limit {QUESTIONS_MAX}",
        with.join(", ")
    )
}
