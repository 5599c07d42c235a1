//! `pipeline schema`: JSON Schemas of the pipeline file and of the tables.

use clap::Args;

use super::failed::Failed;
use super::out::line;
use ovchat_data::tables::KINDS;
use ovchat_pipeline::config::{pipeline_schema, table_schema};

/// Print the JSON Schema of pipeline files, or of a kind of table.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline schema > pipeline.schema.json\n  pipeline schema candidate"
)]
pub struct ShowSchema {
    /// The kind of table [default: the pipeline file itself].
    kind: Option<String>,
}

impl ShowSchema {
    pub fn run(&self) -> Result<(), Failed> {
        let schema = match &self.kind {
            None => pipeline_schema(),
            Some(kind) => table_schema(kind).ok_or_else(|| {
                Failed::Usage(format!(
                    "unknown kind `{kind}`; available kinds: {}",
                    KINDS.join(", ")
                ))
            })?,
        };
        line(format_args!("{schema:#}"))
    }
}
