//! Images of the page: the originals, and thumbnails, which are made once.

use std::path::PathBuf;

use axum::http::HeaderValue;
use axum::response::Response;

use super::asked::Problem;
use super::runs::{Run, Runs};
use super::sql::is_image;
use crate::web;
use ovchat_data::store::write_atomically;
use ovchat_models::preprocess::{Bicubic, decode};
use ovchat_models::{RowFault, media_type};

/// The longest side of a thumbnail, in pixels.
const SIDE: usize = 320;

/// The most bytes of an original that serves as its own thumbnail.
const ORIGINAL_MAX: usize = 64 << 10;

/// The quality of the JPEG files.
const QUALITY: u8 = 85;

/// The largest image of which a thumbnail is made, in pixels.
const PIXELS_MAX: u64 = 100_000_000;

/// Returns the original of an image.
pub fn original(run: &Run, id: &str) -> Result<Response, Problem> {
    let bytes = run.image(id)?;
    let media = media_type(&bytes).unwrap_or("application/octet-stream");
    Ok(kept(web::response(200, media, bytes.to_vec())))
}

/// Returns an image with at most [`SIDE`] pixels a side: the original if it is small, or a JPEG.
pub fn small(runs: &Runs, run: &Run, id: &str) -> Result<Response, Problem> {
    let (media, bytes) = thumbnail(runs, run, id)?;
    Ok(kept(web::response(200, media, bytes)))
}

/// Returns the media type and the bytes of a thumbnail.
pub fn thumbnail(runs: &Runs, run: &Run, id: &str) -> Result<(&'static str, Vec<u8>), Problem> {
    if !is_image(id) {
        return Err(Problem::Missing(format!("`{id}` is no image")));
    }
    let place: PathBuf = runs.spill.join(id);
    if let Ok(made) = std::fs::read(&place) {
        return Ok((media_type(&made).unwrap_or("image/jpeg"), made));
    }
    let bytes = run.image(id)?;
    let failed = |problem: String| Problem::Failed(format!("image {id}: {problem}"));
    // One at a time: decoded images may be large.
    let one = runs.decoding.lock().expect("no panic while locked");
    let image = decode(&bytes, PIXELS_MAX).map_err(|RowFault(problem)| failed(problem))?;
    let longest = image.width.max(image.height);
    let made = if longest <= SIDE && bytes.len() <= ORIGINAL_MAX {
        bytes.to_vec()
    } else {
        let scaled = |side: usize| (side * SIDE.min(longest)).div_ceil(longest).max(1);
        let (width, height) = (scaled(image.width), scaled(image.height));
        let image = Bicubic::Pillow.resize(&image, width, height);
        image.to_jpeg(QUALITY).map_err(failed)?
    };
    drop(one);
    // Without it, the thumbnail is made again.
    drop(write_atomically(&place, &made));
    Ok((media_type(&made).unwrap_or("image/jpeg"), made))
}

/// Lets browsers keep a response: images are named by their contents.
fn kept(mut response: Response) -> Response {
    let value = HeaderValue::from_static("private, max-age=86400, immutable");
    response.headers_mut().insert("cache-control", value);
    response
}
