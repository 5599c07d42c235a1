//! Answers as the samples that lmms-eval logs with `--log_samples`.

use std::collections::{BTreeSet, HashMap};
use std::io::Write as _;
use std::path::Path;

use serde_json::json;

use super::target;
use crate::failed::Failed;
use crate::out::say;
use ovchat_data::store::{RunFolder, TableVersion};
use ovchat_data::tables::{Answer, Candidate, Prompt, Row, rows};

rows! {
    /// The columns of an answer that a sample has.
    pub struct SampledText: "sampled text" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The number of the answer.
        pub candidate: i32,
        /// The text.
        pub text: String,
    }
}

rows! {
    /// The id of a prompt.
    pub struct Asked: "asked" => {
        /// The prompt's id.
        pub prompt_id: String,
    }
}

/// Writes the answers of a table. A sample names its prompt by its number in the table of prompts, as
/// lmms-eval does by its number in the dataset, and by `id`.
pub fn write(
    run: &RunFolder,
    table: Option<&str>,
    prompts: Option<&str>,
    round: Option<u32>,
    to: &Path,
) -> Result<(), Failed> {
    let made = found(
        run,
        "--table",
        &[Candidate::KIND, Answer::KIND],
        table,
        round,
    )?;
    let mut answers: HashMap<String, Vec<(i32, String)>> = HashMap::new();
    for batch in run.reader(&made.table, made.round) {
        for row in read::<SampledText>(&batch?)? {
            let of_prompt = answers.entry(row.prompt_id).or_default();
            of_prompt.push((row.candidate, row.text));
        }
    }
    let of = match prompts {
        Some(_) => found(run, "--prompts", &[Prompt::KIND], prompts, round)?,
        None => prompts_of(run, &answers, round)?,
    };
    let mut lines = Vec::new();
    let [mut number, mut count] = [0_usize; 2];
    for batch in run.reader(&of.table, of.round) {
        for prompt in read::<Prompt>(&batch?)? {
            if let Some(mut texts) = answers.remove(&prompt.prompt_id) {
                texts.sort();
                let texts: Vec<String> = texts.into_iter().map(|(_, text)| text).collect();
                let mut sample = json!({
                    "doc_id": number,
                    "id": prompt.id,
                    "input": prompt.question,
                    "target": prompt.answer.unwrap_or_default(),
                    "filtered_resps": texts[0],
                });
                if texts.len() > 1 {
                    sample["resps"] = json!(texts);
                }
                writeln!(lines, "{sample}").expect("writing to a vector does not fail");
                count += 1;
            }
            number += 1;
        }
    }
    if !answers.is_empty() {
        return Err(Failed::Words(format!(
            "{} of the prompts that `{}` answers are not in `{}`; nothing was written; name their table with \
             --prompts",
            answers.len(),
            made.table,
            of.table
        )));
    }
    target::write(run, to, &lines)?;
    say!(
        "wrote {count} samples of `{}` to {}",
        made.table,
        to.display()
    );
    Ok(())
}

/// Returns the only table of prompts that has all answered prompts.
fn prompts_of<'r>(
    run: &'r RunFolder,
    answers: &HashMap<String, Vec<(i32, String)>>,
    round: Option<u32>,
) -> Result<&'r TableVersion, Failed> {
    let is_it = |made: &&TableVersion| made.complete && made.kind.as_deref() == Some(Prompt::KIND);
    let tables: BTreeSet<&str> = run
        .manifest()
        .made
        .iter()
        .filter(is_it)
        .map(|made| made.table.as_str())
        .collect();
    let mut whole = Vec::new();
    for table in &tables {
        let made = found(run, "--prompts", &[Prompt::KIND], Some(table), round)?;
        let mut asked = 0;
        for batch in run.reader(&made.table, made.round) {
            let rows = read::<Asked>(&batch?)?;
            asked += rows
                .iter()
                .filter(|row| answers.contains_key(&row.prompt_id))
                .count();
        }
        if asked == answers.len() {
            whole.push(made);
        }
    }
    match whole[..] {
        [made] => Ok(made),
        _ => found(run, "--prompts", &[Prompt::KIND], None, round),
    }
}

fn read<R: Row>(batch: &arrow::array::RecordBatch) -> Result<Vec<R>, Failed> {
    R::from_batch(batch).map_err(|misfit| Failed::Words(misfit.to_string()))
}

/// Returns the table of one of some kinds, of a round (default: the last one), which `option` names.
fn found<'r>(
    run: &'r RunFolder,
    option: &str,
    kinds: &[&str],
    name: Option<&str>,
    round: Option<u32>,
) -> Result<&'r TableVersion, Failed> {
    let is_it = |made: &&TableVersion| {
        let is_kind = made
            .kind
            .as_deref()
            .is_some_and(|kind| kinds.contains(&kind));
        made.complete && name.map_or(is_kind, |name| made.table == name)
    };
    if let Some(name) = name
        && let Some(made) = run.manifest().made.iter().find(|made| made.table == name)
        && let Some(kind) = &made.kind
        && !kinds.contains(&kind.as_str())
    {
        return Err(Failed::Usage(format!(
            "`{name}` is a table of {kind}s, not of {}s",
            kinds[0]
        )));
    }
    let fitting: Vec<&TableVersion> = run.manifest().made.iter().filter(is_it).collect();
    let mut names: Vec<&str> = fitting.iter().map(|made| made.table.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    match names[..] {
        [] => Err(Failed::Words(format!(
            "{} has no complete table of {}s{}; see `pipeline status`",
            run.root().display(),
            kinds[0],
            name.map_or_else(String::new, |name| format!(" `{name}`"))
        ))),
        [_] => {
            let of_round = |made: &&&TableVersion| {
                made.round.is_none() || round.is_none() || made.round == round
            };
            let found = fitting
                .iter()
                .filter(of_round)
                .max_by_key(|made| made.round);
            found
                .copied()
                .ok_or_else(|| Failed::Words(format!("`{}` was not built in that round", names[0])))
        }
        _ => Err(Failed::Usage(format!(
            "the run has several tables of {}s; choose one: {option} {}",
            kinds[0],
            names.join(&format!(" or {option} "))
        ))),
    }
}
