//! `schemas/` is up to date with the code. `UPDATE=1 cargo test --release` rewrites it.

use std::fs;
use std::path::Path;

use ovchat_data::tables::KINDS;
use ovchat_pipeline::config::{pipeline_schema, table_schema};

use crate::scene::ROOT;

#[test]
fn the_committed_schemas_are_those_of_the_code() {
    let folder = Path::new(ROOT).join("schemas");
    let mut schemas = vec![("pipeline.schema.json".to_owned(), pipeline_schema())];
    for kind in KINDS {
        schemas.push((
            format!("tables/{kind}.json"),
            table_schema(kind).expect("a kind has a schema"),
        ));
    }
    for (name, schema) in schemas {
        let path = folder.join(&name);
        let text = format!("{schema:#}\n");
        if std::env::var_os("UPDATE").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == text,
            "schemas/{name} is not what the code says; run: UPDATE=1 cargo test schemas"
        );
    }
}
