//! The `sql` stage: a table built by a query.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::datatypes::{Schema, SchemaRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Input, Query, Stage, StageError, StageKind, TableName, join};
use ovchat_data::store::unstorable;
use ovchat_io::files;
use ovchat_query::{self as query, QueryError};

/// Builds a table with an SQL query over tables of the pipeline; within a round, over the rows of
/// that round. Exactly one of `query` and `file` is required.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sql {
    /// The query, in DataFusion's SQL.
    #[serde(default)]
    pub query: Option<String>,
    /// A file that contains the query.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// The tables that the query reads. No others are visible to it.
    pub tables: Vec<TableName>,
    /// The text of `file`, once it has been read.
    #[serde(skip)]
    text: Option<Result<String, String>>,
}

impl Sql {
    /// Returns the query from `query` or `file`.
    fn sql(&self) -> Result<&str, StageError> {
        let fault = |field, message: String, help: &str| StageError {
            field,
            message,
            help: (!help.is_empty()).then(|| help.to_owned()),
            query: None,
        };
        match (&self.query, &self.file, &self.text) {
            (Some(_), Some(_), _) => Err(fault(
                Some("file"),
                "both `query` and `file` are given".to_owned(),
                "remove one of them",
            )),
            (Some(query), None, _) => Ok(query),
            (None, Some(_), Some(Ok(text))) => Ok(text),
            (None, Some(file), Some(Err(problem))) => Err(fault(
                Some("file"),
                format!("cannot read {}: {problem}", file.display()),
                "",
            )),
            (None, Some(_), None) => unreachable!("files are read when paths are resolved"),
            (None, None, _) => Err(fault(
                None,
                "neither `query` nor `file` is given".to_owned(),
                "write the query under `query`",
            )),
        }
    }
}

impl Stage for Sql {
    fn inputs(&self) -> Vec<Input<'_>> {
        let input = |table| Input {
            field: "tables",
            table: Some(table),
            needs: Arc::new(Schema::empty()),
            kind: "table",
        };
        self.tables.iter().map(input).collect()
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        self.file
            .as_deref()
            .map(|path| ("file", path))
            .into_iter()
            .collect()
    }

    fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        if let Some(file) = &mut self.file {
            join(folder, "file", file);
            self.text = Some(files::read_to_string(file).map_err(|error| error.to_string()));
        }
    }

    fn kind(&self) -> Option<&'static str> {
        None
    }

    fn output(&self, given: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        let sql = self.sql()?;
        let field = if self.query.is_some() {
            "query"
        } else {
            "file"
        };
        let read = given
            .iter()
            .filter(|(table, _)| self.tables.contains(table));
        let tables: Vec<(String, SchemaRef)> = read
            .map(|(table, schema)| (table.to_string(), schema.clone()))
            .collect();
        let schema = query::plan(sql, &tables, &[]).map_err(|error| {
            let is_unlisted = |table: &TableName| match &error {
                QueryError::NoTable(name) => table.as_str() == name && !self.tables.contains(table),
                _ => false,
            };
            let other = given.iter().find(|(table, _)| is_unlisted(table));
            let help = other.map(|(table, _)| format!("add `{table}` to `tables`"));
            StageError {
                field: Some(field),
                message: error.to_string(),
                help,
                query: Some(error),
            }
        })?;
        if let Some(column) = unstorable(&schema) {
            let (column, kind) = (column.name(), column.data_type());
            let message =
                format!("column `{column}` has the type {kind}, which cannot be stored in Parquet");
            let help = format!("cast it, e.g. cast({column} as varchar) as {column}");
            return Err(StageError::at(field, message, help));
        }
        let mut names = HashSet::new();
        for column in schema.fields() {
            if !names.insert(column.name()) || column.name() == "round" {
                let why = match column.name().as_str() {
                    "round" => "the column name `round` is reserved".to_owned(),
                    name => format!("duplicate column name `{name}`"),
                };
                let help = format!("rename it: {} as …", column.name());
                return Err(StageError::at(field, why, help));
            }
        }
        Ok(schema)
    }

    fn work(&self) -> StageKind<'_> {
        let sql = self.sql().expect("the plan checked it").to_owned();
        StageKind::Query(Query { sql })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, prompt, stage, table};
    use super::*;
    use ovchat_data::tables::{Prompt, Row};

    fn sql(query: &str) -> Sql {
        stage(json!({"query": query, "tables": ["prompts"]}))
    }

    #[test]
    fn the_query_builds_the_table() {
        let mut pipeline = TestPipeline::new();
        pipeline.table("prompts", &[prompt("a", "Why?"), prompt("b", "How?")]);
        let stage = sql("select * from prompts where question = 'How?'");
        let rows = pipeline.query(&stage, &["prompts"]).unwrap();
        assert_eq!(Prompt::from_batch(&rows).unwrap(), [prompt("b", "How?")]);
        let given = [(table("prompts"), Prompt::schema())];
        let names = |schema: &Schema| -> Vec<String> {
            schema
                .fields()
                .iter()
                .map(|field| field.name().clone())
                .collect()
        };
        let planned = stage.output(&given).unwrap();
        assert_eq!(names(&planned), names(&rows.schema()));
    }

    #[test]
    fn a_query_that_cannot_build_a_table_is_refused() {
        let given = [
            (table("prompts"), Prompt::schema()),
            (table("pairs"), Prompt::schema()),
        ];
        for (query, message, help) in [
            (
                "select prompt_id, prompt_id from prompts",
                "prompt_id",
                None,
            ),
            (
                "select 1 as round from prompts",
                "the column name `round` is reserved",
                Some("rename it: round as …"),
            ),
            (
                "select * from pairs",
                "pairs",
                Some("add `pairs` to `tables`"),
            ),
            ("selct 1", "selct", None),
        ] {
            let error = sql(query).output(&given).unwrap_err();
            assert!(error.message.contains(message), "{query}: {error}");
            if help.is_some() {
                assert_eq!(error.help.as_deref(), help);
            }
        }
        let neither: Sql = stage(json!({"tables": []}));
        let error = neither.output(&given).unwrap_err();
        assert_eq!(error.message, "neither `query` nor `file` is given");
    }

    #[test]
    fn a_file_is_read_when_its_path_is_resolved() {
        let mut pipeline = TestPipeline::new();
        pipeline.file("q.sql", "select 1 as one from prompts");
        let root = pipeline.root().to_owned();
        let given = [(table("prompts"), Prompt::schema())];
        let mut found: Sql = stage(json!({"file": "q.sql", "tables": ["prompts"]}));
        found.resolve(&|_| root.clone());
        assert_eq!(found.output(&given).unwrap().field(0).name(), "one");
        let mut missing: Sql = stage(json!({"file": "none.sql", "tables": ["prompts"]}));
        missing.resolve(&|_| root.clone());
        let error = missing.output(&given).unwrap_err();
        assert!(error.message.contains("cannot read"), "{error}");
        assert!(error.message.contains("none.sql"), "{error}");
    }
}
