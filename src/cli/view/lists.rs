//! Lists of pairs: filtered and sorted as positions, of which a page of rows is read.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::apart::{self, Query};
use super::asked::{Asked, Problem};
use super::positions::{ListKey, Positions};
use super::runs::{Run, Runs, Snapshot, literal};
use ovchat_data::store::{TableVersion, rows_at};
use ovchat_data::tables::{Pair, Prompt, PromptVideo, Reward, Row, Turn};
use ovchat_query::{self as query, QueryTable, identifier};

/// The most rows of a page.
const PAGE_MAX: usize = 200;

/// The largest table of rewards whose replies are shown in the list of pairs. Those of a larger one
/// are shown with the prompt, which reads fewer of them.
const REPLIES_MAX: u64 = 500_000;

/// Returns a page of pairs.
pub fn pairs(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let run = runs.of(asked)?;
    let snapshot = run.now()?;
    let name = match asked.text("table") {
        Some(name) => name.to_owned(),
        None => snapshot
            .names(Pair::KIND)
            .into_iter()
            .next()
            .ok_or_else(no_pairs)?,
    };
    let round = asked.number::<u32>("round")?;
    let versions = versions(&snapshot, &name, round)?;
    let table = table_of(&snapshot, &name, &versions);
    let condition = condition(asked);
    let order = order(asked)?;
    let list = list(
        runs,
        run,
        asked,
        &versions,
        &table,
        (condition.as_deref(), order.as_deref()),
    )?;
    let offset = asked.number("offset")?.unwrap_or(0);
    let limit = asked.number("limit")?.unwrap_or(50).min(PAGE_MAX);
    let page = list.page(offset, limit);
    let files = table
        .files
        .iter()
        .flat_map(|(round, files)| files.iter().map(|file| (*round, file)));
    let (rounds, files): (Vec<Option<u32>>, Vec<PathBuf>) = files
        .map(|(round, file)| (round, file.path.clone()))
        .unzip();
    let rows: Vec<Pair> = rows_at(&files, &page)?;
    let rounds: Vec<Option<u32>> = page
        .iter()
        .map(|(file, _)| rounds.get(*file as usize).copied().flatten())
        .collect();
    let mut shown: Vec<Value> = rows
        .iter()
        .zip(&rounds)
        .map(|(pair, round)| of_pair(pair, *round))
        .collect();
    for made in &versions {
        let at: Vec<usize> = (0..rows.len())
            .filter(|&at| rounds[at] == made.round)
            .collect();
        add_answers((runs, run), &snapshot, asked, made, &rows, &at, &mut shown)?;
        add_replies(runs, &snapshot, asked, made, &rows, &at, &mut shown)?;
    }
    let mut sql = format!("select * from {}", identifier(&name));
    let has_rounds = versions.iter().any(|made| made.round.is_some());
    let of_round = round.filter(|_| has_rounds);
    let of_round = of_round.map(|round| format!("round = {round}"));
    let conditions: Vec<String> = of_round.into_iter().chain(condition).collect();
    if !conditions.is_empty() {
        sql.push_str(&format!(" where {}", conditions.join(" and ")));
    }
    if let Some(order) = order {
        sql.push_str(&format!(" order by {order}"));
    }
    Ok(json!({
        "total": list.len(), "offset": offset, "rows": shown, "seconds": asked.seconds(), "sql": sql,
    }))
}

fn no_pairs() -> Problem {
    Problem::Missing(
        "this run has no pairs yet: they are there when its first round has made them".to_owned(),
    )
}

/// Returns the versions of a table of pairs, of one round or of all.
fn versions<'s>(
    snapshot: &'s Snapshot,
    table: &str,
    round: Option<u32>,
) -> Result<Vec<&'s TableVersion>, Problem> {
    let made = snapshot
        .of_kind(Pair::KIND)
        .filter(|made| made.table == table);
    let mut made: Vec<&TableVersion> = made
        .filter(|made| round.is_none() || made.round.is_none() || made.round == round)
        .collect();
    made.sort_by_key(|made| made.round);
    if made.is_empty() {
        return Err(no_pairs());
    }
    Ok(made)
}

fn table_of(snapshot: &Snapshot, name: &str, versions: &[&TableVersion]) -> QueryTable {
    let files = versions.iter();
    QueryTable {
        name: name.to_owned(),
        schema: Pair::schema(),
        files: files
            .map(|made| (made.round, snapshot.run.checked(made.files())))
            .collect(),
        with_round: true,
    }
}

/// Writes the positions of the pairs that meet a condition to a file: four bytes for the file, eight for
/// the row.
pub fn write(
    runs: &Runs,
    asked: &Asked,
    (name, round, files): (&str, Option<u32>, &[String]),
    (condition, order): (Option<&str>, Option<&str>),
    to: &Path,
) -> Result<Value, Problem> {
    let snapshot = runs.of(asked)?.now()?;
    let versions = versions(&snapshot, name, round)?;
    if files_of(&versions) != files {
        return Err(Problem::Failed(
            "the run has changed meanwhile; try again".to_owned(),
        ));
    }
    let table = table_of(&snapshot, name, &versions);
    let failed =
        |error: std::io::Error| Problem::Failed(format!("cannot write positions: {error}"));
    let mut out = BufWriter::new(File::create(to).map_err(failed)?);
    let room = runs.room(asked)?;
    query::positions(&table, condition, order, room.room(), |found| {
        for (file, row) in found {
            out.write_all(&file.to_le_bytes()).map_err(failed)?;
            out.write_all(&row.to_le_bytes()).map_err(failed)?;
        }
        asked.go_on()
    })?;
    out.flush().map_err(failed)?;
    Ok(Value::Null)
}

/// Returns the positions for a condition that a client wrote, as another process finds them.
fn written(
    runs: &Runs,
    run: &Run,
    asked: &Asked,
    (table, round, files): (&str, Option<u32>, &[String]),
    (condition, order): (Option<&str>, Option<&str>),
) -> Result<Vec<(u32, u64)>, Problem> {
    let (_, to) = apart::file(runs)?;
    let query = Query::Positions {
        table: table.to_owned(),
        round,
        files: files.to_vec(),
        condition: condition.map(str::to_owned),
        order: order.map(str::to_owned),
        to: to.clone(),
    };
    let done = apart::run(runs, &run.folder, asked, query);
    let bytes = std::fs::read(&to).unwrap_or_default();
    drop(std::fs::remove_file(&to));
    done?;
    let position = |bytes: &[u8]| {
        let (file, row) = bytes.split_at(4);
        let file = u32::from_le_bytes(file.try_into().expect("four bytes"));
        (
            file,
            u64::from_le_bytes(row.try_into().expect("eight bytes")),
        )
    };
    Ok(bytes.chunks_exact(12).map(position).collect())
}

fn files_of(versions: &[&TableVersion]) -> Vec<String> {
    let files = versions.iter().flat_map(|made| made.files());
    files.map(|file| file.file.clone()).collect()
}

/// Returns the condition of a list, from `where` and `text`.
fn condition(asked: &Asked) -> Option<String> {
    let written = asked
        .text("where")
        .map(|condition| format!("({condition}\n)"));
    // Each word may be in another column.
    let words = asked.text("text").unwrap_or_default().split_whitespace();
    let text = words.map(|word| {
        let word = literal(&word.to_lowercase());
        let found = ["prompt", "chosen", "rejected"]
            .map(|column| format!("strpos(lower({column}), {word}) > 0"));
        format!("({})", found.join(" or "))
    });
    let all: Vec<String> = written.into_iter().chain(text).collect();
    (!all.is_empty()).then(|| all.join(" and "))
}

/// Returns the order of a list; `None` for that of the table.
fn order(asked: &Asked) -> Result<Option<String>, Problem> {
    let by = match asked.text("sort").unwrap_or("order") {
        "order" => return Ok(None),
        "margin" => "margin",
        "chosen_reward" => "chosen_reward",
        "rejected_reward" => "rejected_reward",
        "chosen_tokens" => "cardinality(chosen_token_ids)",
        "rejected_tokens" => "cardinality(rejected_token_ids)",
        "length_difference" => {
            "cast(cardinality(chosen_token_ids) as bigint) - cast(cardinality(rejected_token_ids) as bigint)"
        }
        // The start of a text decides, and takes less memory.
        "question" => "left(prompt, 48)",
        other => {
            return Err(Problem::Refused(format!(
                "pairs cannot be sorted by `{other}`"
            )));
        }
    };
    let direction = if asked.text("desc") == Some("1") {
        "desc"
    } else {
        "asc"
    };
    Ok(Some(format!("{by} {direction} nulls last")))
}

/// Returns a list, from the cache or computed.
fn list(
    runs: &Runs,
    run: &Run,
    asked: &Asked,
    versions: &[&TableVersion],
    table: &QueryTable,
    (condition, order): (Option<&str>, Option<&str>),
) -> Result<Arc<Positions>, Problem> {
    if condition.is_none() && order.is_none() {
        let files = versions.iter().flat_map(|made| made.files());
        return Ok(Arc::new(Positions::All(
            files.map(|file| file.rows).collect(),
        )));
    }
    let key: ListKey = (
        files_of(versions),
        condition.map(str::to_owned),
        order.map(str::to_owned),
    );
    let known = run.lists.lock().expect("no panic while locked");
    let found = known.iter().find(|(other, _)| *other == key);
    if let Some((_, list)) = found {
        return Ok(Arc::clone(list));
    }
    drop(known);
    let rows = if asked.text("where").is_some() {
        let round = asked.number("round")?;
        let of = (table.name.as_str(), round, &key.0[..]);
        written(runs, run, asked, of, (condition, order))?
    } else {
        let room = runs.room(asked)?;
        let mut rows = Vec::new();
        query::positions(table, condition, order, room.room(), |found| {
            rows.extend_from_slice(found);
            asked.go_on()
        })?;
        rows
    };
    let list = Arc::new(Positions::Some(rows));
    run.keep_list(key, &list);
    Ok(list)
}

/// Returns a pair as the page shows it.
fn of_pair(pair: &Pair, round: Option<u32>) -> Value {
    let tokens = |ids: &Option<Vec<i32>>| ids.as_ref().map(Vec::len);
    json!({
        "key": pair.row_key, "round": round, "prompt_id": pair.prompt_id, "id": pair.id,
        "question": pair.prompt, "system": pair.system, "turns": turns(&pair.turns),
        "images": pair.image_ids, "videos": videos(pair.videos.as_ref()),
        "chosen": pair.chosen, "rejected": pair.rejected,
        "chosen_candidate": pair.chosen_candidate, "rejected_candidate": pair.rejected_candidate,
        "chosen_reward": pair.chosen_reward, "rejected_reward": pair.rejected_reward, "margin": pair.margin,
        "chosen_tokens": tokens(&pair.chosen_token_ids), "rejected_tokens": tokens(&pair.rejected_token_ids),
        "chosen_logp": pair.chosen_logp, "rejected_logp": pair.rejected_logp,
        "answer": null, "kept": kept(pair.kept.as_ref()), "captions": pair.captions,
        "chosen_reply": null, "rejected_reply": null, "chosen_label": null, "rejected_label": null,
    })
}

pub fn turns(turns: &[Turn]) -> Value {
    let turn = |turn: &Turn| json!({ "role": turn.role.as_str(), "text": turn.text });
    turns.iter().map(turn).collect()
}

pub fn videos(videos: Option<&Vec<PromptVideo>>) -> Value {
    let videos = videos.into_iter().flatten();
    videos.map(|video| json!(video.frame_ids)).collect()
}

pub fn kept(kept: Option<&ovchat_data::tables::Kept>) -> Value {
    let Some(kept) = kept else {
        return Value::Null;
    };
    let pairs = kept
        .0
        .iter()
        .map(|(name, value)| (name.clone(), json!(value)));
    Value::Object(pairs.collect())
}

/// Adds the known answers of some pairs of a version.
fn add_answers(
    (runs, run): (&Runs, &Run),
    snapshot: &Snapshot,
    asked: &Asked,
    made: &TableVersion,
    rows: &[Pair],
    at: &[usize],
    shown: &mut [Value],
) -> Result<(), Problem> {
    let prompts = snapshot.nearest(made, Prompt::KIND);
    let Some(prompts) = prompts.filter(|prompts| prompts.round.is_none()) else {
        return Ok(());
    };
    let ids: Vec<&str> = at.iter().map(|&at| rows[at].prompt_id.as_str()).collect();
    let found = run.prompts(runs, snapshot, asked, prompts, &ids)?;
    for (at, prompt) in at.iter().zip(found) {
        shown[*at]["answer"] = json!(prompt.and_then(|prompt| prompt.answer));
    }
    Ok(())
}

/// Adds the replies and labels of the judge to some pairs of a version.
fn add_replies(
    runs: &Runs,
    snapshot: &Snapshot,
    asked: &Asked,
    made: &TableVersion,
    rows: &[Pair],
    at: &[usize],
    shown: &mut [Value],
) -> Result<(), Problem> {
    let rewards = snapshot.nearest(made, Reward::KIND);
    let Some(rewards) = rewards.filter(|rewards| rewards.rows() <= REPLIES_MAX && !at.is_empty())
    else {
        return Ok(());
    };
    let ids = at.iter().map(|&at| literal(&rows[at].prompt_id));
    let condition = format!(
        "(reply is not null or label is not null) and prompt_id in ({})",
        ids.collect::<Vec<_>>().join(", ")
    );
    let found: Vec<Reward> = snapshot.rows(runs, asked, rewards, &condition, 10_000)?;
    for &at in at {
        let pair = &rows[at];
        for (side, candidate) in [
            ("chosen", pair.chosen_candidate),
            ("rejected", pair.rejected_candidate),
        ] {
            let reward = found.iter().find(|reward| {
                reward.prompt_id == pair.prompt_id && Some(reward.candidate) == candidate
            });
            if let Some(reward) = reward {
                shown[at][format!("{side}_reply")] = json!(reward.reply);
                shown[at][format!("{side}_label")] = json!(reward.label);
            }
        }
    }
    Ok(())
}
