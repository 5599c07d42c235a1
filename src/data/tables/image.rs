//! Pictures, kept once per run and named by content.

use super::row::{rows, struct_column};

/// The file of a picture, in the Hugging Face convention (`datasets` shows it as an image).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// The file's bytes as they were; absent with `keep_images: reference`.
    pub bytes: Option<Vec<u8>>,
    /// Where the file lay when it was loaded.
    pub path: Option<String>,
}
// `datasets` takes a column for a picture only when it may be null.
struct_column!(ImageFile nullable { bytes: Option<Vec<u8>>, path: Option<String> });

/// What `datasets` needs to find in the Arrow schema to show the column as pictures.
fn hugging_face() -> [(String, String); 1] {
    let features = r#"{"info": {"features": {"image_id": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}, "width": {"dtype": "int32", "_type": "Value"}, "height": {"dtype": "int32", "_type": "Value"}, "format": {"dtype": "string", "_type": "Value"}}}}"#;
    [("huggingface".to_owned(), features.to_owned())]
}

rows! {
    /// One row per distinct picture of a run. All other tables refer to pictures by `image_id`.
    pub struct Image: "image", metadata hugging_face() => {
        /// SHA-256 of the file's bytes, in hex.
        pub image_id: String,
        /// The file: its bytes as they were, and where it lay.
        pub image: ImageFile,
        /// Pixels from left to right.
        pub width: i32,
        /// Pixels from top to bottom.
        pub height: i32,
        /// `png`, `jpeg`, `webp`, `gif`, `bmp`, `tiff` or `pnm`, by content, not by name.
        pub format: String,
    }
}
