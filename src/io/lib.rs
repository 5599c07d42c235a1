//! File access, secret masking and terminal-safe text for all other crates: reading files that
//! users name ([`files`]), removing secrets from text ([`mask`]), and escaping untrusted text for
//! terminals ([`visible`](mod@visible)).

pub mod files;
pub mod mask;
pub mod visible;
