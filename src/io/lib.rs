//! What every other crate reads and writes through: files that a user names ([`files`]), secrets that leave in
//! no text ([`mask`]), and strangers' text on a terminal ([`visible`](mod@visible)).

pub mod files;
pub mod mask;
pub mod visible;
