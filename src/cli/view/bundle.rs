//! `pipeline view --bundle`: the page with some pairs as files, which a browser opens without a server.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::asked::{Asked, Problem};
use super::images::thumbnail;
use super::runs::Runs;
use super::site::{FILES, data};
use crate::failed::Failed;
use crate::out::say;
use ovchat_data::store::{create_folder, write_atomically, write_folder};

/// Writes the page with the `count` pairs that have the largest margins, of the last round of
/// the run, into a new folder.
pub fn write(runs: &Runs, to: &Path, count: usize) -> Result<(), Failed> {
    if to.exists() {
        let words = format!("{} already exists; choose another folder", to.display());
        return Err(Failed::Words(words));
    }
    let (bundle, images, pairs) = contents(runs, count).map_err(|problem| {
        Failed::Words(format!("cannot write the bundle: {}", problem.words().1))
    })?;
    let text = serde_json::to_string(&bundle).expect("plain data serializes");
    // A script in a page ends at the first `</script`, and older browsers end lines at U+2028.
    let text = text
        .replace('<', "\\u003c")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029");
    write_folder(to, |hidden| {
        create_folder(hidden)?;
        for (name, _, text) in FILES {
            let name = if name.is_empty() { "index.html" } else { name };
            write_atomically(&hidden.join(name), text.as_bytes())?;
        }
        let script = format!("window.OVCHAT_BUNDLE = {text};\n");
        write_atomically(&hidden.join("bundle.js"), script.as_bytes())?;
        if let Some(svg) = bundle["svg"].as_str() {
            write_atomically(&hidden.join("graph.svg"), svg.as_bytes())?;
        }
        for kind in ["thumb", "image"] {
            create_folder(&hidden.join(kind).join("0"))?;
        }
        for image in &images {
            let (_, small) = thumbnail(runs, &runs.list[0], image).map_err(of_image(image))?;
            write_atomically(&hidden.join("thumb/0").join(image), &small)?;
            let original = runs.list[0].image(image).map_err(of_image(image))?;
            write_atomically(&hidden.join("image/0").join(image), &original)?;
        }
        Ok::<(), Failed>(())
    })?;
    say!(
        "wrote {pairs} pairs and {} images to {}; open index.html in a browser",
        images.len(),
        to.display()
    );
    Ok(())
}

/// Words a failure of an image.
fn of_image(id: &str) -> impl Fn(Problem) -> ovchat_data::store::StoreError {
    let id = id.to_owned();
    move |problem| ovchat_data::store::StoreError::Image {
        id: id.clone(),
        problem: problem.words().1.to_owned(),
    }
}

/// Returns the data of the bundle, its images, and the number of its pairs.
fn contents(runs: &Runs, count: usize) -> Result<(Value, BTreeSet<String>, usize), Problem> {
    let mut get = Map::new();
    let mut keep = |address: &str, value: &Value| {
        get.insert(format!("api/{address}"), value.clone());
    };
    let ask = |name: &str, params: &[(&str, &str)]| {
        let params = [("run", "0")].iter().chain(params);
        let params = params.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let asked = Asked::new(params.collect(), runs.query_time, Arc::default());
        data(runs, &asked, name)
    };
    let mut overview = ask("runs", &[])?;
    overview["runs"][0]["running"] = Value::Null;
    // Where it was on this machine concerns nobody else.
    overview["runs"][0]["folder"] = overview["runs"][0]["name"].clone();
    keep("runs", &overview);
    let last = overview["runs"][0]["tables"]
        .as_array()
        .into_iter()
        .flatten();
    let first = overview["runs"][0]["pair_tables"][0].clone();
    let last = last
        .filter(|table| table["kind"] == "pair" && table["name"] == first)
        .filter_map(|table| table["round"].as_u64())
        .max();
    let round = last.map(|round| round.to_string()).unwrap_or_default();
    let (rows, total) = pairs(&ask, &round, count)?;
    let mut images = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for row in &rows {
        collect_images(row, &mut images);
        ids.extend(row["prompt_id"].as_str().map(str::to_owned));
    }
    for id in ids {
        let life = ask("prompt", &[("id", &id)])?;
        collect_images(&life["prompt"], &mut images);
        keep(&format!("prompt?run=0&id={id}"), &life);
    }
    keep("pairs?run=0", &json!({ "rows": rows }));
    let mut charts = ask("charts", &[])?;
    // A view may read tables that an unfinished run does not have yet.
    charts["charts"]
        .as_array_mut()
        .expect("a list")
        .retain(|chart| {
            let id = chart["id"].as_str().unwrap_or_default();
            match ask("chart", &[("id", id)]) {
                Ok(rows) => keep(&format!("chart?run=0&id={id}"), &rows),
                Err(_) => return false,
            }
            true
        });
    keep("charts?run=0", &charts);
    keep("health?run=0", &ask("health", &[])?);
    let mut graph = ask("graph", &[])?;
    graph["svg_light"] = json!("graph.svg");
    keep("graph?run=0", &graph);
    let asked = Asked::new(Vec::new(), runs.query_time, Arc::default());
    let svg = super::graph::svg(runs, &asked)?;
    let count = rows.len();
    let note = format!("{count} of {total} pairs, those with the largest margins");
    let bundle = json!({ "get": get, "note": note, "made": null, "svg": svg });
    Ok((bundle, images, count))
}

/// Returns the pairs of a round with the largest margins, and the number of all.
fn pairs(
    ask: &dyn Fn(&str, &[(&str, &str)]) -> Result<Value, Problem>,
    round: &str,
    count: usize,
) -> Result<(Vec<Value>, Value), Problem> {
    let mut rows: Vec<Value> = Vec::new();
    let mut total = Value::Null;
    while rows.len() < count {
        let offset = rows.len().to_string();
        let limit = (count - rows.len()).min(200).to_string();
        let page = ask(
            "pairs",
            &[
                ("round", round),
                ("sort", "margin"),
                ("desc", "1"),
                ("offset", &offset),
                ("limit", &limit),
            ],
        )?;
        total = page["total"].clone();
        let found = page["rows"].as_array().cloned().unwrap_or_default();
        if found.is_empty() {
            break;
        }
        rows.extend(found);
    }
    Ok((rows, total))
}

/// Adds the images and frames of a pair or a prompt.
fn collect_images(value: &Value, images: &mut BTreeSet<String>) {
    let ids = value["images"].as_array().into_iter().flatten();
    let frames = value["videos"].as_array().into_iter().flatten();
    let frames = frames.flat_map(|frames| frames.as_array().into_iter().flatten());
    images.extend(
        ids.chain(frames)
            .filter_map(|id| Some(id.as_str()?.to_owned())),
    );
}
