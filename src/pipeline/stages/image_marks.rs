//! The hashes of images, computed for images of earlier versions, which have none.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use rayon::prelude::*;

use super::work::{Failure, WholeTables};
use ovchat_data::tables::{ImageFile, rows};
use ovchat_io::files;
use ovchat_models::preprocess::{PIXELS_MAX, decode};

rows! {
    /// The hashes of an image.
    pub struct ImageMarks: "marks" => {
        /// The image's id.
        pub image_id: String,
        /// The width, in pixels.
        pub width: i32,
        /// The height, in pixels.
        pub height: i32,
        /// The hash of its pixels.
        pub pixels: Option<String>,
        /// The perceptual hash.
        pub look: Option<i64>,
    }
}

rows! {
    /// The file of an image.
    pub struct StoredImage: "stored image" => {
        /// The image's id.
        pub image_id: String,
        /// The file.
        pub image: ImageFile,
    }
}

/// The hashes and the shape of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Marks {
    /// The hash of its pixels.
    pub pixels: String,
    pub look: u64,
    /// The width by the height.
    pub aspect: f64,
}

/// The number of images that are decoded at once.
const AT_ONCE: usize = 64;

/// Returns the hashes of some images by their ids.
pub fn image_marks(
    tables: &WholeTables<'_>,
    wanted: &HashSet<String>,
) -> Result<HashMap<String, Marks>, Failure> {
    let mut marks = HashMap::with_capacity(wanted.len());
    let mut unhashed = HashSet::new();
    tables.each_image(|image: ImageMarks| {
        if wanted.contains(&image.image_id) {
            match (image.pixels, image.look) {
                (Some(pixels), Some(look)) => {
                    let own = Marks {
                        pixels,
                        look: look.cast_unsigned(),
                        aspect: f64::from(image.width) / f64::from(image.height),
                    };
                    marks.insert(image.image_id, own);
                }
                _ => drop(unhashed.insert(image.image_id)),
            }
        }
        Ok(())
    })?;
    unhashed.retain(|id| !marks.contains_key(id));
    if unhashed.is_empty() {
        return Ok(marks);
    }
    let mut waiting = Vec::new();
    let mut hash = |waiting: &mut Vec<StoredImage>| -> Result<(), Failure> {
        let hashed: Vec<(String, Marks)> = waiting
            .par_iter()
            .map(hashed)
            .collect::<Result<_, Failure>>()?;
        marks.extend(hashed);
        waiting.clear();
        Ok(())
    };
    tables.each_image(|image: StoredImage| {
        if unhashed.remove(&image.image_id) {
            waiting.push(image);
        }
        match waiting.len() {
            AT_ONCE => hash(&mut waiting),
            _ => Ok(()),
        }
    })?;
    hash(&mut waiting)?;
    Ok(marks)
}

fn hashed(stored: &StoredImage) -> Result<(String, Marks), Failure> {
    let StoredImage { image_id, image } = stored;
    let failed = |problem: String| Failure::Other(format!("image {image_id}: {problem}"));
    let read;
    let bytes = match (&image.bytes, &image.path) {
        (Some(bytes), _) => bytes,
        (None, Some(path)) => {
            let found = files::read(Path::new(path));
            read = found.map_err(|error| failed(format!("cannot read {path}: {error}")))?;
            &read
        }
        (None, None) => return Err(failed("neither bytes nor a path are stored".to_owned())),
    };
    let decoded = decode(bytes, PIXELS_MAX).map_err(|fault| failed(fault.0))?;
    let marks = Marks {
        pixels: decoded.pixel_hash(),
        look: decoded.look(),
        aspect: decoded.width as f64 / decoded.height as f64,
    };
    Ok((image_id.clone(), marks))
}
