//! Row type of images, stored once per run and identified by content.

use super::row::{rows, struct_column};

/// An image file, in the Hugging Face convention: `datasets` shows the column as images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Original bytes of the file; null with `keep_images: reference`.
    pub bytes: Option<Vec<u8>>,
    /// Path of the file when it was loaded.
    pub path: Option<String>,
}
// `datasets` recognizes an image column only if it is nullable.
struct_column!(ImageFile nullable { bytes: Option<Vec<u8>>, path: Option<String> });

/// Returns the Arrow schema metadata with which `datasets` shows the column as images.
fn hugging_face() -> [(String, String); 1] {
    let features = r#"{"info": {"features": {"image_id": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}, "width": {"dtype": "int32", "_type": "Value"}, "height": {"dtype": "int32", "_type": "Value"}, "format": {"dtype": "string", "_type": "Value"}, "pixels": {"dtype": "string", "_type": "Value"}, "look": {"dtype": "int64", "_type": "Value"}}}}"#;
    [("huggingface".to_owned(), features.to_owned())]
}

rows! {
    /// One row per distinct image of a run. All other tables refer to images by `image_id`.
    pub struct Image: "image", metadata hugging_face() => {
        /// SHA-256 of the file, in hex.
        pub image_id: String,
        /// Original bytes and path of the image file.
        pub image: ImageFile,
        /// Width, in pixels.
        pub width: i32,
        /// Height, in pixels.
        pub height: i32,
        /// File format, detected from the content: `png`, `jpeg`, `webp`, `gif`, `bmp`, `tiff` or
        /// `pnm`.
        pub format: String,
        /// SHA-256 of the decoded pixels, in hex: equal for copies of an image in other lossless
        /// formats; null in tables of earlier versions.
        pub pixels: Option<String>,
        /// Perceptual hash: 64 bits of a cosine transform, of which few differ between copies in
        /// other sizes and qualities; null in tables of earlier versions.
        pub look: Option<i64>,
    }
}
