//! JSON Schemas of pipeline files, for editors, and of tables, for documentation.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::pipeline::PipelineSpec;
use ovchat_data::tables::{is_measured, schema_of};

/// Returns the JSON Schema of a pipeline file. Its descriptions are the doc comments of the
/// settings, which editors show on hover.
pub fn pipeline_schema() -> Value {
    let settings = SchemaSettings::draft07();
    let schema = settings
        .into_generator()
        .into_root_schema_for::<PipelineSpec>();
    let mut schema = schema.to_value();
    if let Value::Object(root) = &mut schema {
        root.insert("title".to_owned(), json!("ovchat pipeline"));
        for field in ["properties", "definitions"] {
            for nested in root
                .get_mut(field)
                .and_then(Value::as_object_mut)
                .into_iter()
                .flat_map(Map::values_mut)
            {
                allow_references(nested);
            }
        }
    }
    schema
}

/// Returns the columns of a kind of table, as in `schemas/tables/<kind>.json`; `None` if the kind
/// is unknown.
pub fn table_schema(kind: &str) -> Option<Value> {
    let schema = schema_of(kind)?;
    let column = |field: &arrow::datatypes::FieldRef| {
        let mut column = json!({
            "name": field.name(),
            "type": field.data_type().to_string(),
            "nullable": field.is_nullable(),
        });
        if is_measured(field) {
            column["measured"] = json!(true);
        }
        column["description"] = json!(field.metadata().get("doc"));
        column
    };
    let columns: Vec<Value> = schema.fields().iter().map(column).collect();
    Some(json!({ "kind": kind, "columns": columns }))
}

/// Allows a reference (`"${name}"`) wherever a number, a boolean or one of a few words is expected.
fn allow_references(schema: &mut Value) {
    let Value::Object(object) = schema else {
        return;
    };
    if is_narrow_scalar(object) {
        let mut narrow = std::mem::take(object);
        for about in ["description", "default"] {
            if let Some(value) = narrow.remove(about) {
                object.insert(about.to_owned(), value);
            }
        }
        let reference = json!({ "type": "string", "pattern": r"^\$\{.+\}$" });
        object.insert("anyOf".to_owned(), json!([narrow, reference]));
        return;
    }
    for (key, nested) in object.iter_mut() {
        match (key.as_str(), nested) {
            // Names of tables, models and variables cannot be references.
            ("propertyNames" | "required" | "default" | "enum" | "const", _) => {}
            ("properties" | "patternProperties" | "definitions", Value::Object(named)) => {
                named.values_mut().for_each(allow_references);
            }
            // The variants of a stage type or network are maps.
            (_, Value::Array(elements)) => elements.iter_mut().for_each(allow_references),
            (_, nested) => allow_references(nested),
        }
    }
}

/// True if a schema expects a scalar and would reject the text of a reference.
fn is_narrow_scalar(object: &Map<String, Value>) -> bool {
    let scalar = |word: &Value| matches!(word.as_str(), Some("number" | "integer" | "boolean"));
    let is_words = |variants: &Value| {
        let mut variants = variants.as_array().into_iter().flatten();
        variants.all(|variant| variant.get("const").is_some() || variant.get("enum").is_some())
    };
    match object.get("type") {
        Some(Value::Array(types)) => types.iter().any(scalar),
        Some(word) if scalar(word) => true,
        Some(word) if word == "string" => {
            object.contains_key("enum") || object.contains_key("pattern")
        }
        Some(_) => false,
        None => ["oneOf", "anyOf"]
            .iter()
            .any(|key| object.get(*key).is_some_and(is_words)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_described_and_scalars_may_be_references() {
        let schema = pipeline_schema();
        let sample = &schema["definitions"]["Sample"];
        assert_eq!(
            sample["properties"]["count"]["description"],
            "Answers per prompt."
        );
        assert_eq!(
            sample["properties"]["count"]["anyOf"][1]["pattern"],
            r"^\$\{.+\}$"
        );
        assert_eq!(sample["additionalProperties"], false);
        assert_eq!(schema["required"], json!(["pipeline", "stages"]));
    }

    #[test]
    fn tables_are_described_column_by_column() {
        let table = table_schema("step").unwrap();
        let columns = table["columns"].as_array().unwrap();
        let seconds = columns
            .iter()
            .find(|column| column["name"] == "seconds")
            .unwrap();
        assert_eq!(seconds["measured"], true);
        assert!(
            columns
                .iter()
                .all(|column| column["description"].is_string())
        );
        assert_eq!(table_schema("nothing"), None);
    }
}
