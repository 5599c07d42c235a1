//! A page of examples: questions with their images, and the answers of models side by side.

use std::fmt::Write as _;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::columns::{escaped, no_column, texts};
use crate::failed::Failed;
use ovchat_data::store::{Images, RunFolder};
use ovchat_models::media_type;
use ovchat_pipeline::stages::TableName;

/// The columns that are not shown as texts.
const MEDIA: [&str; 2] = ["image_ids", "videos"];

/// The columns that stand above the others.
const ABOVE: [&str; 2] = ["question", "reference"];

/// The largest number of images of an example, and of rows.
const IMAGES_MAX: usize = 8;
const ROWS_MAX: usize = 200;

/// The largest size of an image file that is put into the page, in bytes.
const IMAGE_MAX: usize = 8 << 20;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#24292f;background:#fff}\
article{border:1px solid #d0d7de;border-radius:8px;padding:1em;margin:1.2em 0}\
img{max-height:16em;max-width:100%;border-radius:4px;margin-right:.5em}\
.answers{display:flex;gap:1em;flex-wrap:wrap}.answers section{flex:1 1 18em;background:#f6f8fa;border-radius:6px;padding:.6em .9em}\
h1{font-size:1.4em}h2{font-size:1em;margin:.2em 0 .6em}h3{font-size:.85em;margin:0;color:#57606a}\
p{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0}dl{display:flex;gap:1.5em;flex-wrap:wrap;margin:.6em 0 0}dt{font-size:.85em;color:#57606a}dd{margin:0}\
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}article{border-color:#30363d}.answers section{background:#161b22}}";

/// Returns the page of a view's rows. Texts stand side by side, numbers below them.
pub fn page(run: &RunFolder, name: &TableName, rows: &[RecordBatch]) -> Result<String, Failed> {
    let questions = texts(rows, "question")?.ok_or_else(|| no_column("question"))?;
    let mut images = Images::open(run.root(), &run.manifest().images)?;
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\
         <title>{0}</title><style>{STYLE}</style><h1>{0}</h1>\n",
        escaped(name.as_str())
    );
    let mut number = 0;
    for batch in rows {
        for row in 0..batch.num_rows().min(ROWS_MAX - number) {
            example(&mut page, &mut images, batch, row)?;
            number += 1;
        }
    }
    if questions.len() > ROWS_MAX {
        let left = questions.len() - ROWS_MAX;
        let _ = write!(
            page,
            "<p>{left} more rows are not shown; add `limit` to the query.</p>"
        );
    }
    Ok(page)
}

fn example(
    page: &mut String,
    images: &mut Images,
    batch: &RecordBatch,
    row: usize,
) -> Result<(), Failed> {
    page.push_str("<article>");
    let ids = image_ids(batch, row);
    for id in ids.iter().take(IMAGES_MAX) {
        let bytes = images.bytes(id)?;
        match media_type(&bytes).filter(|_| bytes.len() <= IMAGE_MAX) {
            Some(media) => {
                let data = BASE64_STANDARD.encode(&bytes);
                let _ = write!(page, "<img alt=\"\" src=\"data:{media};base64,{data}\">");
            }
            None => page.push_str("<em>an image that browsers do not show</em> "),
        }
    }
    if ids.len() > IMAGES_MAX {
        let _ = write!(page, "<em>and {} more</em>", ids.len() - IMAGES_MAX);
    }
    let schema = batch.schema();
    let columns: Vec<(&Field, String)> = schema
        .fields()
        .iter()
        .zip(batch.columns())
        .filter(|(field, column)| !MEDIA.contains(&field.name().as_str()) && !column.is_null(row))
        .filter_map(|(field, column)| {
            let text = cast(&column.slice(row, 1), &DataType::Utf8).ok()?;
            Some((&**field, text.as_string::<i32>().value(0).to_owned()))
        })
        .collect();
    for (name, (_, text)) in ABOVE.iter().filter_map(|name| {
        Some((
            name,
            columns.iter().find(|(field, _)| field.name() == name)?,
        ))
    }) {
        match *name {
            "question" => drop(write!(page, "<h2>{}</h2>", escaped(text))),
            _ => drop(write!(page, "<h3>{name}</h3><p>{}</p>", escaped(text))),
        }
    }
    let rest = || {
        columns
            .iter()
            .filter(|(field, _)| !ABOVE.contains(&field.name().as_str()))
    };
    page.push_str("<div class=\"answers\">");
    for (field, text) in rest().filter(|(field, _)| field.data_type().is_string()) {
        let name = escaped(field.name());
        let _ = write!(
            page,
            "<section><h3>{name}</h3><p>{}</p></section>",
            escaped(text)
        );
    }
    page.push_str("</div><dl>");
    for (field, text) in rest().filter(|(field, _)| !field.data_type().is_string()) {
        let name = escaped(field.name());
        let _ = write!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", escaped(text));
    }
    page.push_str("</dl></article>\n");
    Ok(())
}

/// Returns the ids of the images of a row: of `image_ids`, and of the frames of `videos`.
fn image_ids(batch: &RecordBatch, row: usize) -> Vec<String> {
    let texts = |list: &dyn Array| {
        let texts = cast(list, &DataType::Utf8).ok()?;
        let texts = texts.as_string::<i32>().iter().flatten();
        Some(texts.map(str::to_owned).collect::<Vec<String>>())
    };
    let images = batch.column_by_name("image_ids").and_then(|column| {
        let list = column
            .as_list_opt::<i32>()
            .filter(|list| list.is_valid(row))?;
        texts(&list.value(row))
    });
    let frames = batch.column_by_name("videos").and_then(|column| {
        let videos = column
            .as_list_opt::<i32>()
            .filter(|list| list.is_valid(row))?;
        let videos = videos.value(row);
        let frames = videos.as_struct_opt()?.column_by_name("frame_ids")?;
        let frames = frames.as_list_opt::<i32>()?;
        let of_videos = frames.iter().flatten().filter_map(|one| texts(&one));
        Some(of_videos.flatten().collect())
    });
    images.into_iter().chain(frames).flatten().collect()
}

#[cfg(test)]
mod tests {
    use ovchat_data::tables::{Prompt, PromptVideo, Row as _};

    use super::*;

    #[test]
    fn each_row_shows_the_frames_of_its_own_videos() {
        let prompt = |number: usize| Prompt {
            row_key: number.to_string(),
            prompt_id: number.to_string(),
            id: None,
            image: None,
            image_ids: vec![format!("image {number}")],
            videos: Some(vec![PromptVideo {
                video_id: format!("video {number}"),
                frame_ids: vec![format!("frame {number}a"), format!("frame {number}b")],
            }]),
            system: None,
            turns: Vec::new(),
            question: "Why?".to_owned(),
            captions: None,
            answer: None,
            kept: None,
        };
        let batch = Prompt::to_batch(&[prompt(0), prompt(1), prompt(2)]);
        assert_eq!(image_ids(&batch, 1), ["image 1", "frame 1a", "frame 1b"]);
    }
}
