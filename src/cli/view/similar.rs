//! Prompts like a prompt: about the same image, about near-duplicates of it, and questions that share
//! most words.

use std::collections::{BTreeMap, HashMap, HashSet};

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type};
use serde_json::{Value, json};

use super::asked::{Asked, Problem};
use super::lists::videos;
use super::runs::{Runs, Snapshot, literal};
use ovchat_data::store::TableVersion;
use ovchat_data::tables::{Pair, Prompt, Row};
use ovchat_query::{Part, identifier};

/// The most bits in which perceptual hashes of near-duplicates differ: the default of the stage type
/// `overlap`.
const DISTANCE_MAX: u32 = 6;

/// The least share of words that similar questions have in common, and the number shown of each list and
/// table.
const SHARED_MIN: f64 = 0.5;
const SHOWN: usize = 12;

/// Returns the prompts that are like a prompt.
pub fn similar(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let run = runs.of(asked)?;
    let snapshot = run.now()?;
    let id = asked.needed("id")?;
    let own = find(runs, asked, &snapshot, id)?
        .ok_or_else(|| Problem::Missing(format!("{} has no prompt {id}", run.name)))?;
    let near = near_duplicates(runs, asked, &snapshot, &own.image_ids)?;
    let same = with_images(
        runs,
        asked,
        &snapshot,
        own.image_ids.iter().map(String::as_str),
        id,
    )?;
    let alike = with_images(runs, asked, &snapshot, near.keys().map(String::as_str), id)?;
    let questions = questions(runs, asked, &snapshot, &own)?;
    let mut ids: Vec<&str> = Vec::new();
    for (_, prompt) in same.iter().chain(&alike) {
        ids.push(&prompt.prompt_id);
    }
    ids.extend(
        questions
            .iter()
            .map(|(_, prompt, _)| prompt.prompt_id.as_str()),
    );
    let pairs = pairs_of(runs, asked, &snapshot, &ids)?;
    let shown = |table: &str, prompt: &Prompt| {
        json!({
            "prompt_id": prompt.prompt_id, "table": table, "question": prompt.question, "images": prompt.image_ids,
            "videos": videos(prompt.videos.as_ref()), "pairs": pairs.get(&prompt.prompt_id),
        })
    };
    let with = |mut value: Value, name: &str, more: Value| {
        value[name] = more;
        value
    };
    let alike = alike.iter().map(|(table, prompt)| {
        let distance = prompt
            .image_ids
            .iter()
            .filter_map(|image| near.get(image))
            .min();
        with(shown(table, prompt), "distance", json!(distance))
    });
    let questions = questions
        .iter()
        .map(|(table, prompt, shared)| with(shown(table, prompt), "shared", json!(shared)));
    Ok(json!({
        "same_image": same.iter().map(|(table, prompt)| shown(table, prompt)).collect::<Vec<_>>(),
        "near_duplicates": alike.collect::<Vec<_>>(),
        "questions": questions.collect::<Vec<_>>(),
    }))
}

/// Returns a prompt, from a table of prompts or of pairs.
fn find(
    runs: &Runs,
    asked: &Asked,
    snapshot: &Snapshot,
    id: &str,
) -> Result<Option<Prompt>, Problem> {
    for made in snapshot.of_kind(Prompt::KIND) {
        if let Some(prompt) = snapshot.about(runs, asked, made, id)?.pop() {
            return Ok(Some(prompt));
        }
    }
    for made in snapshot.of_kind(Pair::KIND) {
        if let Some(pair) = snapshot.about::<Pair>(runs, asked, made, id)?.pop() {
            return Ok(Some(pair.into()));
        }
    }
    Ok(None)
}

/// Returns the images whose perceptual hashes differ in few bits from those of `own`, with the number
/// of bits.
fn near_duplicates(
    runs: &Runs,
    asked: &Asked,
    snapshot: &Snapshot,
    own: &[String],
) -> Result<BTreeMap<String, u32>, Problem> {
    let mut looks: Vec<(String, u64)> = Vec::new();
    let sql = "select image_id, look from images where look is not null";
    runs.query(snapshot, asked, sql, |part| {
        if let Part::Rows(rows) = part {
            let ids = cast(rows.column(0), &DataType::Utf8).expect("a text is a text");
            let ids = ids.as_string::<i32>();
            let values = rows.column(1).as_primitive::<Int64Type>();
            let rows = (0..rows.num_rows()).filter(|&row| values.is_valid(row));
            looks.extend(
                rows.map(|row| (ids.value(row).to_owned(), values.value(row).cast_unsigned())),
            );
        }
        Ok(())
    })?;
    let own_looks: Vec<u64> = looks
        .iter()
        .filter(|(id, _)| own.contains(id))
        .map(|(_, look)| *look)
        .collect();
    let mut near = BTreeMap::new();
    for (id, look) in looks {
        let distances = own_looks.iter().map(|own| (own ^ look).count_ones());
        if let Some(distance) = distances.min().filter(|distance| *distance <= DISTANCE_MAX)
            && !own.contains(&id)
        {
            near.insert(id, distance);
        }
    }
    Ok(near)
}

/// Returns the prompts about some images, without the prompt `but`.
fn with_images<'i>(
    runs: &Runs,
    asked: &Asked,
    snapshot: &Snapshot,
    images: impl Iterator<Item = &'i str>,
    but: &str,
) -> Result<Vec<(String, Prompt)>, Problem> {
    let conditions: Vec<String> = images
        .take(200)
        .map(|image| format!("array_has(image_ids, {})", literal(image)))
        .collect();
    let mut found = Vec::new();
    if conditions.is_empty() {
        return Ok(found);
    }
    let condition = format!(
        "({}) and prompt_id <> {}",
        conditions.join(" or "),
        literal(but)
    );
    for made in snapshot.of_kind(Prompt::KIND) {
        let rows: Vec<Prompt> =
            snapshot.rows(runs, asked, made, &condition, SHOWN - found.len())?;
        found.extend(rows.into_iter().map(|prompt| (made.table.clone(), prompt)));
        if found.len() >= SHOWN {
            break;
        }
    }
    Ok(found)
}

/// Returns the prompts whose questions share most words with a question: the number of common words
/// divided by that of all words of both.
fn questions(
    runs: &Runs,
    asked: &Asked,
    snapshot: &Snapshot,
    own: &Prompt,
) -> Result<Vec<(String, Prompt, f64)>, Problem> {
    let words = |text: &str| -> HashSet<String> {
        let words = text.split(|c: char| !c.is_alphanumeric());
        words
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect()
    };
    let of_own = words(&own.question);
    let mut found = Vec::new();
    for made in snapshot.of_kind(Prompt::KIND) {
        let mut best: Vec<(f64, String)> = Vec::new();
        let sql = format!(
            "select prompt_id, question from {}",
            identifier(&made.table)
        );
        runs.query(snapshot, asked, &sql, |part| {
            let Part::Rows(rows) = part else {
                return Ok(());
            };
            let [ids, questions] =
                [0, 1].map(|at| cast(rows.column(at), &DataType::Utf8).expect("a text is a text"));
            let (ids, questions) = (ids.as_string::<i32>(), questions.as_string::<i32>());
            for row in 0..rows.num_rows() {
                let others = words(questions.value(row));
                let common = of_own.intersection(&others).count();
                let share = common as f64 / (of_own.len() + others.len() - common).max(1) as f64;
                if share >= SHARED_MIN && ids.value(row) != own.prompt_id {
                    best.push((share, ids.value(row).to_owned()));
                }
            }
            if best.len() > 10 * SHOWN {
                keep_best(&mut best);
            }
            Ok(())
        })?;
        keep_best(&mut best);
        found.extend(read(runs, asked, snapshot, made, &best)?);
    }
    found.sort_by(|one, other| other.2.total_cmp(&one.2));
    Ok(found)
}

fn keep_best(best: &mut Vec<(f64, String)>) {
    best.sort_by(|one, other| other.0.total_cmp(&one.0));
    best.truncate(SHOWN);
}

/// Reads prompts by their IDs.
fn read(
    runs: &Runs,
    asked: &Asked,
    snapshot: &Snapshot,
    made: &TableVersion,
    best: &[(f64, String)],
) -> Result<Vec<(String, Prompt, f64)>, Problem> {
    if best.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<String> = best.iter().map(|(_, id)| literal(id)).collect();
    let condition = format!("prompt_id in ({})", ids.join(", "));
    let rows: Vec<Prompt> = snapshot.rows(runs, asked, made, &condition, SHOWN)?;
    let found = rows.into_iter().filter_map(|prompt| {
        let (share, _) = best.iter().find(|(_, id)| *id == prompt.prompt_id)?;
        Some((made.table.clone(), prompt, *share))
    });
    Ok(found.collect())
}

/// Returns the pairs of some prompts, by prompt.
fn pairs_of(
    runs: &Runs,
    asked: &Asked,
    snapshot: &Snapshot,
    ids: &[&str],
) -> Result<HashMap<String, Vec<Value>>, Problem> {
    let mut found: HashMap<String, Vec<Value>> = HashMap::new();
    if ids.is_empty() {
        return Ok(found);
    }
    let ids: Vec<String> = ids.iter().map(|id| literal(id)).collect();
    let condition = format!("prompt_id in ({})", ids.join(", "));
    for made in snapshot.of_kind(Pair::KIND) {
        let pairs: Vec<Pair> = snapshot.rows(runs, asked, made, &condition, 1000)?;
        for pair in pairs {
            let of_prompt = found.entry(pair.prompt_id).or_default();
            of_prompt.push(json!({
                "table": made.table, "round": made.round, "key": pair.row_key, "margin": pair.margin,
            }));
        }
    }
    Ok(found)
}
