//! Stale tables: tables built from versions that are no longer current.

use std::collections::HashSet;

use serde_json::Value;

use super::keys::{checkpoint_keys, known_key};
use ovchat_data::store::{Manifest, TableVersion};

/// Returns the current tables that were built from a table or a checkpoint whose version has since
/// been replaced, and the tables built from those. `pipeline run` rebuilds them; `--until` leaves
/// them.
pub fn stale(manifest: &Manifest) -> Vec<&TableVersion> {
    let complete = || manifest.made.iter().filter(|made| made.complete);
    let mut known: HashSet<String> = complete().map(|made| known_key(made).to_owned()).collect();
    let superseded = manifest.archived.iter().map(|archived| &archived.made);
    // A model that is not a checkpoint of this run is not replaced.
    let mut gone: HashSet<String> = superseded.flat_map(checkpoint_keys).collect();
    for made in complete() {
        for key in checkpoint_keys(made) {
            gone.remove(&key);
        }
    }
    let mut stale: Vec<&TableVersion> = Vec::new();
    loop {
        let is_stale = |made: &&TableVersion| {
            let texts = |field: &str| values(&made.because[field]);
            texts("inputs").any(|key| !known.contains(key))
                || texts("models").any(|key| gone.contains(key))
        };
        let found: Vec<&TableVersion> = complete()
            .filter(|made| !stale.contains(made))
            .filter(is_stale)
            .collect();
        if found.is_empty() {
            break;
        }
        for made in &found {
            known.remove(known_key(made));
            gone.extend(checkpoint_keys(made));
        }
        stale.extend(found);
    }
    let in_order = complete().filter(|made| stale.contains(made));
    in_order.collect()
}

/// Returns the strings among the values of an object.
fn values(object: &Value) -> impl Iterator<Item = &str> {
    let values = object.as_object().into_iter().flat_map(|map| map.values());
    values.filter_map(Value::as_str)
}
