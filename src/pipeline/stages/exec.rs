//! The `exec` stage: an external command that builds a table.

mod inherited;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use schemars::JsonSchema;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use self::inherited::Inherited;
use super::{Command, Input, Stage, StageError, StageKind, TableName, join};

/// Builds a table with an external command. The command reads the rows of `table` as an Arrow IPC
/// stream from stdin and writes the rows of this table as one to stdout; its stderr is shown in the
/// log. It runs in the folder of the pipeline file and is stopped when the run ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program and its arguments, e.g. `[python3, flag.py]`.
    pub command: Vec<String>,
    /// The table that the command reads; within a round, the rows of that round.
    pub table: TableName,
    /// The columns that the command writes, with their types.
    pub columns: Columns,
    /// Files and folders that the result depends on, such as the command's script. The table is
    /// rebuilt when one of them changes.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// The environment variables that the command inherits. Default: all, except those whose values
    /// the pipeline uses (`${env:…}`, `key_env`) and those named like secrets (`*_TOKEN`, `*_KEY`,
    /// `*_SECRET`, `*PASSWORD*`, `AWS_*`). `[NAME]` adds variables to the default; `only` restricts
    /// it to basic ones such as PATH, HOME and the locale; `{ only: [NAME] }` passes those and the
    /// listed ones.
    #[serde(default, skip_serializing_if = "Inherited::is_usual")]
    pub env: Inherited,
    /// The working folder of the command.
    #[serde(skip)]
    folder: PathBuf,
}

impl Exec {
    /// Returns the program of the command.
    pub fn program(&self) -> Option<&str> {
        self.command.first().map(String::as_str)
    }

    /// Returns the working folder of the command.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Names and types of columns, in the order of the pipeline file.
#[derive(Debug, Clone, PartialEq, JsonSchema)]
pub struct Columns(
    #[schemars(with = "std::collections::BTreeMap<String, Column>")] Vec<(String, Column)>,
);

/// The type of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Column {
    Text,
    Bool,
    Int32,
    Int64,
    Float32,
    Float64,
    TextList,
    Int32List,
    Float32List,
}

impl Column {
    fn data_type(self) -> DataType {
        let list = |item| DataType::List(Arc::new(Field::new("item", item, true)));
        match self {
            Self::Text => DataType::Utf8,
            Self::Bool => DataType::Boolean,
            Self::Int32 => DataType::Int32,
            Self::Int64 => DataType::Int64,
            Self::Float32 => DataType::Float32,
            Self::Float64 => DataType::Float64,
            Self::TextList => list(DataType::Utf8),
            Self::Int32List => list(DataType::Int32),
            Self::Float32List => list(DataType::Float32),
        }
    }
}

impl<'de> Deserialize<'de> for Columns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ColumnsVisitor;

        impl<'de> Visitor<'de> for ColumnsVisitor {
            type Value = Columns;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "column names with their types, such as `{ prompt_id: text, flagged: bool }`",
                )
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Columns, A::Error> {
                let mut columns = Vec::new();
                while let Some((name, column)) = map.next_entry::<String, Column>()? {
                    if name == "round" {
                        return Err(A::Error::custom("the column name `round` is reserved"));
                    }
                    columns.push((name, column));
                }
                Ok(Columns(columns))
            }
        }

        deserializer.deserialize_map(ColumnsVisitor)
    }
}

impl Serialize for Columns {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, column) in &self.0 {
            map.serialize_entry(name, column)?;
        }
        map.end()
    }
}

impl Stage for Exec {
    fn inputs(&self) -> Vec<Input<'_>> {
        vec![Input {
            field: "table",
            table: Some(&self.table),
            needs: Arc::new(Schema::empty()),
            kind: "table",
        }]
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        let files = self.files.iter();
        files.map(|path| ("files", path.as_path())).collect()
    }

    fn resolve(&mut self, folder: &dyn Fn(&str) -> PathBuf) {
        self.folder = folder("command");
        for path in &mut self.files {
            join(folder, "files", path);
        }
    }

    fn kind(&self) -> Option<&'static str> {
        None
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        if self.command.is_empty() {
            let help = "set a program and its arguments: [python3, flag.py]";
            return Err(StageError::at("command", "the command is empty", help));
        }
        if self.columns.0.is_empty() {
            let help =
                "list the columns that the command writes: { prompt_id: text, flagged: bool }";
            return Err(StageError::at("columns", "no columns are listed", help));
        }
        let columns = self.columns.0.iter();
        let field = |(name, column): &(String, Column)| Field::new(name, column.data_type(), true);
        Ok(Arc::new(Schema::new(
            columns.map(field).collect::<Vec<_>>(),
        )))
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Command(Command {
            words: &self.command,
            input: &self.table,
            folder: &self.folder,
            env: &self.env,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_keep_their_order_and_have_types() {
        let text = r#"{"command": ["a"], "table": "t", "columns": {"z": "text", "a": "int32_list", "m": "float64"}}"#;
        let exec: Exec = serde_json::from_str(text).unwrap();
        let schema = exec.output(&[]).unwrap();
        let names: Vec<&str> = schema
            .fields()
            .iter()
            .map(|field| field.name().as_str())
            .collect();
        assert_eq!(names, ["z", "a", "m"]);
        assert!(matches!(schema.field(1).data_type(), DataType::List(_)));
        let own = text.replace(r#""z""#, r#""round""#);
        let error = serde_json::from_str::<Exec>(&own).unwrap_err().to_string();
        assert!(error.contains("is reserved"), "{error}");
    }
}
