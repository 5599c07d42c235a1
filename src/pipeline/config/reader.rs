//! Deserialization of a YAML tree into a [`PipelineSpec`].
//!
//! Every field, model and stage is deserialized separately, and an invalid setting is removed
//! before the next attempt, so that all mistakes are reported at once. Mistakes that only the whole
//! file can show are left to [`super::check`] and [`super::lineage`].

use serde::de::DeserializeOwned;
use serde_path_to_error::{Segment, Track};
use serde_yaml::Value;
use serde_yaml::with::singleton_map_recursive;

use super::diagnostic::{At, Diagnostic, TOLD_MAX};
use super::guard::{Condition, Guard};
use super::node::Node;
use super::pipeline::{Entry, FIELDS, GuardEntry, PipelineName, PipelineSpec, one_percent};
use super::reference::{Environment, Replacer, UNKNOWN_VARIABLE, Variable};
use super::secrets::Secrets;
use super::serde_messages::{Subject, WITHOUT_DASHES, Words, reword, short};
use super::source::{KeyPath, Step};
use super::suggest::{listed, suggest};
use crate::stages::TableName;

/// The result of reading a pipeline.
pub struct Read {
    /// The pipeline, with default values in place of invalid settings; to be used only if there are
    /// no diagnostics, or to find more of them.
    pub written: PipelineSpec,
    pub secrets: Secrets,
    pub diagnostics: Vec<Diagnostic>,
    /// True if a top-level field was skipped because its name is misspelled: the names in it are
    /// not unknown.
    pub is_partial: bool,
    /// The settings that begin with a variable of the pipeline, with its name.
    pub begins_with: Vec<(KeyPath, String)>,
}

/// Reads the tree of a file.
pub fn read(tree: Node, environment: Environment<'_>) -> Read {
    let mut tree = tree;
    let root = KeyPath::root();
    let mut reader = Reader::default();
    reader.unknown_fields(&tree);

    let mut replacer = Replacer {
        vars: None,
        environment,
        secrets: Secrets::default(),
        uses: Vec::new(),
        begins_with: Vec::new(),
        diagnostics: Vec::new(),
    };
    let vars = reader.variables(&mut tree, &mut replacer);
    replacer.vars = Some(vars);
    if let Node::Map(entries) = &mut tree {
        for (key, node) in entries.iter_mut().filter(|(key, _)| key != "vars") {
            replacer.replace(node, &root.key(key));
        }
    }
    reader.secrets = replacer.secrets;
    reader.uses = replacer.uses;
    reader.diagnostics.append(&mut replacer.diagnostics);

    reader.required_fields(&tree);
    let unnamed = || PipelineName("unnamed".to_owned());
    let written = PipelineSpec {
        extends: reader.field(&tree, "extends").unwrap_or_default(),
        pipeline: reader.field(&tree, "pipeline").unwrap_or_else(unnamed),
        seed: reader.field(&tree, "seed").unwrap_or_default(),
        rounds: reader.field(&tree, "rounds").unwrap_or_default(),
        vars: replacer.vars.unwrap_or_default(),
        models: reader.entries(&tree, "models", "network"),
        stages: reader.entries(&tree, "stages", "stage type"),
        evaluate: reader.entries(&tree, "evaluate", "stage type"),
        report: reader.named(&tree, "report", "`name: { query: … }`"),
        expect: reader.named(&tree, "expect", "`name: { table: …, query: … }`"),
        guard: reader.guard(&tree),
        reject_share_max: reader
            .field(&tree, "reject_share_max")
            .unwrap_or_else(one_percent),
        keep_images: reader.field(&tree, "keep_images").unwrap_or_default(),
        uses: reader.uses.clone(),
    };
    if reader.excused.iter().any(|field| field == "vars") {
        let diagnostics = &mut reader.diagnostics;
        diagnostics.retain(|diagnostic| diagnostic.code != UNKNOWN_VARIABLE);
    }
    Read {
        written,
        secrets: reader.secrets,
        diagnostics: reader.diagnostics,
        is_partial: !reader.excused.is_empty(),
        begins_with: replacer.begins_with,
    }
}

/// Reads parts of the tree and collects diagnostics.
#[derive(Default)]
struct Reader {
    secrets: Secrets,
    /// The settings whose whole value is one variable, with the name of the variable.
    uses: Vec<(KeyPath, String)>,
    diagnostics: Vec<Diagnostic>,
    /// Missing top-level fields that are explained by another diagnostic.
    excused: Vec<String>,
}

impl Reader {
    /// Reports unknown top-level fields; the fields suggested for them are not reported as missing.
    fn unknown_fields(&mut self, tree: &Node) {
        let Node::Map(entries) = tree else {
            return;
        };
        let unknown = entries
            .iter()
            .filter(|(key, _)| !FIELDS.contains(&key.as_str()));
        for (key, _) in unknown {
            let raw = format!("unknown field `{key}`, expected one of {}", listed(FIELDS));
            let words = reword(&raw, key, None);
            let at = At::key(KeyPath::root().key(key));
            let diagnostic = Diagnostic::new(words.code, at, words.message);
            let diagnostic = diagnostic.suggest(words.suggest.as_deref());
            self.diagnostics.push(diagnostic);
            self.excused.extend(words.suggest);
        }
    }

    /// Reports missing top-level fields.
    fn required_fields(&mut self, tree: &Node) {
        for (field, help) in [
            (
                "pipeline",
                "name the pipeline at the top of the file: `pipeline: my-pipeline`",
            ),
            (
                "stages",
                "add at least one stage, or run `pipeline init` for an example",
            ),
        ] {
            let is_there = match tree.get(field) {
                None => false,
                Some(Node::Null) => field != "stages",
                Some(Node::Map(entries)) => !entries.is_empty(),
                Some(_) => true,
            };
            if is_there || self.excused.iter().any(|excused| excused == field) {
                continue;
            }
            let at = At::key(KeyPath::root().key(field));
            let message = match tree.get(field) {
                None => format!("missing field `{field}`"),
                Some(_) => format!("`{field}` is empty"),
            };
            let diagnostic = Diagnostic::new("config::missing_field", at, message);
            self.diagnostics.push(diagnostic.help(help));
        }
    }

    /// Reads the variables under `vars`, with references to the environment replaced.
    fn variables(&mut self, tree: &mut Node, replacer: &mut Replacer<'_>) -> Vec<Variable> {
        let path = KeyPath::root().key("vars");
        let Some(node) = tree.at(path.steps()) else {
            return Vec::new();
        };
        let Some(entries) = self.map(node, &path, "a map of names and values") else {
            return Vec::new();
        };
        let mut variables = Vec::new();
        for (name, value) in entries {
            let path = path.key(&name);
            let mut value = value;
            replacer.replace(&mut value, &path);
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if name.is_empty() || !name.chars().all(word) {
                let message =
                    format!("invalid variable name `{name}`: use letters, digits and `_`");
                let at = At::key(path.clone());
                self.diagnostics
                    .push(Diagnostic::new("config::name", at, message));
            }
            if matches!(value, Node::Null | Node::List(_) | Node::Map(_)) {
                let message = format!(
                    "variable `{name}` must be a string, a number or a boolean, not {}",
                    value.noun()
                );
                let at = At::value(path.clone());
                self.diagnostics
                    .push(Diagnostic::new("config::wrong_type", at, message));
            }
            variables.push(Variable::new(&name, value, &path, &replacer.secrets));
        }
        variables
    }

    /// Reads a top-level field; `None` if it is omitted or invalid.
    fn field<T: DeserializeOwned>(&mut self, tree: &Node, name: &str) -> Option<T> {
        let node = tree.get(name)?.clone();
        self.value(node, &KeyPath::root().key(name), 0)
    }

    /// Reads the models or stages under `field`, each of which has one `noun` (network, stage
    /// type).
    fn entries<Name, Spec>(
        &mut self,
        tree: &Node,
        field: &str,
        noun: &str,
    ) -> Vec<Entry<Name, Spec>>
    where
        Name: TryFrom<String, Error = String>,
        Spec: DeserializeOwned,
    {
        let path = KeyPath::root().key(field);
        let Some(node) = tree.get(field) else {
            return Vec::new();
        };
        let expected = format!("a map `name: {{ <{noun}>: {{ … }} }}`");
        let Some(map) = self.map(node, &path, &expected) else {
            return Vec::new();
        };
        let mut entries = Vec::new();
        for (key, node) in map {
            let path = path.key(&key);
            let (settings, spec) = self.one_word(node, &path, noun);
            match Name::try_from(key) {
                Ok(name) => entries.push(Entry {
                    name,
                    path,
                    settings,
                    spec,
                }),
                Err(message) => {
                    let diagnostic = Diagnostic::new("config::name", At::key(path), message);
                    self.diagnostics.push(diagnostic);
                }
            }
        }
        entries
    }

    /// Reads the named entries under `field`; `example` shows the syntax of one.
    fn named<Spec: DeserializeOwned>(
        &mut self,
        tree: &Node,
        field: &str,
        example: &str,
    ) -> Vec<Entry<TableName, Spec>> {
        let path = KeyPath::root().key(field);
        let Some(node) = tree.get(field) else {
            return Vec::new();
        };
        let Some(map) = self.map(node, &path, &format!("a map {example}")) else {
            return Vec::new();
        };
        let mut entries = Vec::new();
        for (key, node) in map {
            let path = path.key(&key);
            let spec = self.value(node, &path, 0);
            match TableName::try_from(key) {
                Ok(name) => entries.push(Entry {
                    name,
                    settings: path.clone(),
                    path,
                    spec,
                }),
                Err(message) => {
                    let diagnostic = Diagnostic::new("config::name", At::key(path), message);
                    self.diagnostics.push(diagnostic);
                }
            }
        }
        entries
    }

    /// Reads the conditions under `guard`.
    fn guard(&mut self, tree: &Node) -> Vec<GuardEntry> {
        let path = KeyPath::root().key("guard");
        let Some(node) = tree.get("guard") else {
            return Vec::new();
        };
        let Some(map) = self.map(node, &path, "a map `<condition>: warn`") else {
            return Vec::new();
        };
        let mut entries = Vec::new();
        for (text, node) in map {
            let path = path.key(&text);
            let action = self.value(node, &path, 0);
            match (Condition::read(&text), action) {
                (Ok(condition), Some(action)) => entries.push(GuardEntry {
                    path,
                    guard: Guard {
                        text,
                        condition,
                        action,
                        is_written: true,
                    },
                }),
                (Ok(_), None) => {}
                (Err(unreadable), _) => {
                    let at = At::key(path);
                    let diagnostic = Diagnostic::new("config::guard", at, unreadable.message);
                    let diagnostic = diagnostic.suggest(unreadable.suggest);
                    self.diagnostics.push(diagnostic.help(unreadable.help));
                }
            }
        }
        entries
    }

    /// Reads a map of one word (a stage type or a network) and its settings.
    fn one_word<Spec: DeserializeOwned>(
        &mut self,
        node: Node,
        path: &KeyPath,
        noun: &str,
    ) -> (KeyPath, Option<Spec>) {
        let words = words_of::<Spec>();
        let choice = format!(
            "available {noun}s: {}",
            listed(words.iter().map(String::as_str))
        );
        let name = path.name().to_owned();
        let mut entries = match node {
            Node::Map(entries) => entries,
            Node::Wrong => return (path.clone(), None),
            other => {
                let message = format!(
                    "`{name}` must be a {noun} with its settings, got {}",
                    shown(&other)
                );
                let diagnostic =
                    Diagnostic::new("config::wrong_type", At::value(path.clone()), message).help(
                        match &other {
                            Node::List(_) => format!("{WITHOUT_DASHES}; {choice}"),
                            _ => format!("write `{name}: {{ <{noun}>: {{ … }} }}`; {choice}"),
                        },
                    );
                self.diagnostics.push(diagnostic);
                return (path.clone(), None);
            }
        };
        if entries.len() > 1 {
            let (first, second) = (&entries[0].0, &entries[1].0);
            let at = At::key(path.key(second));
            let message =
                format!("`{name}` must have exactly one {noun}, got `{first}` and `{second}`");
            let help = if words.contains(second) {
                format!("give each {noun} a name of its own")
            } else {
                format!("if `{second}` is a setting of `{first}`, indent it below `{first}`")
            };
            self.diagnostics
                .push(Diagnostic::new("config::one_word", at, message).help(help));
            return (path.key(first), None);
        }
        let Some((word, settings)) = entries.pop() else {
            let diagnostic = Diagnostic::new(
                "config::one_word",
                At::key(path.clone()),
                format!("`{name}` has no {noun}"),
            );
            self.diagnostics.push(diagnostic.help(choice));
            return (path.clone(), None);
        };
        let inner = path.key(&word);
        if !words.contains(&word) {
            let code = if noun == "stage type" {
                "config::unknown_verb"
            } else {
                "config::unknown_network"
            };
            let diagnostic = Diagnostic::new(
                code,
                At::key(inner.clone()),
                format!("unknown {noun} `{}`", short(&word)),
            )
            .suggest(suggest(&word, words.iter().map(String::as_str)));
            self.diagnostics.push(diagnostic.help(choice));
            return (inner, None);
        }
        // `scripted:` without a value means no settings.
        let settings = match settings {
            Node::Null => Node::Map(Vec::new()),
            settings => settings,
        };
        let spec = self.value(Node::Map(vec![(word, settings)]), path, 1);
        (inner, spec)
    }

    /// Returns the entries of a map; reports anything else.
    fn map(&mut self, node: &Node, path: &KeyPath, expected: &str) -> Option<Vec<(String, Node)>> {
        match node {
            Node::Map(entries) => Some(entries.clone()),
            Node::Null => Some(Vec::new()),
            Node::Wrong => None,
            other => {
                let message = format!("`{}` must be {expected}, not {}", path.name(), other.noun());
                let at = At::key(path.clone());
                let help = matches!(other, Node::List(_)).then(|| WITHOUT_DASHES.to_owned());
                let diagnostic = Diagnostic::new("config::wrong_type", at, message);
                self.diagnostics.push(diagnostic.maybe_help(help));
                None
            }
        }
    }

    /// Deserializes the node at `path`. Invalid settings are reported and removed until the rest is
    /// valid or cannot be read at all. The first `fixed` steps below `path` are never removed.
    fn value<T: DeserializeOwned>(
        &mut self,
        node: Node,
        path: &KeyPath,
        fixed: usize,
    ) -> Option<T> {
        let mut node = node;
        if node == Node::Wrong {
            return None;
        }
        // Missing settings that are explained by another diagnostic.
        let mut excused = node.remove_wrong();
        let mut is_right = excused.is_empty();
        let told_before = self.diagnostics.len();
        // One more than is shown, to know that there are more.
        while self.diagnostics.len() - told_before <= TOLD_MAX {
            let (steps, raw) = match deserialize::<T>(&node) {
                Ok(value) => return is_right.then_some(value),
                Err(error) => error,
            };
            let here = steps
                .iter()
                .fold(path.clone(), |path, step| path.then(step.clone()));
            if self.takes_text(&mut node, &steps, &here, &raw) {
                continue;
            }
            is_right = false;
            let words = self.words(&mut node, &steps, &here, &raw);
            let mut offender = steps;
            let mut diagnostic =
                Diagnostic::new(words.code, At::value(here.clone()), words.message);
            match words.subject {
                Subject::Here(side) => {
                    diagnostic.at.side = side;
                    excused.push(here.name().to_owned());
                }
                Subject::Extra(key) => {
                    // serde_path_to_error counts an unknown key as part of the path.
                    if here.name() != key {
                        offender.push(Step::Key { key, nth: 0 });
                    }
                    let steps = offender.iter();
                    diagnostic.at =
                        At::key(steps.fold(path.clone(), |path, step| path.then(step.clone())));
                    excused.extend(words.suggest.clone());
                }
                Subject::Missing(field) => {
                    if !excused.contains(&field) {
                        diagnostic.at = At::key(here.clone());
                        diagnostic.message =
                            format!("missing field `{field}` in `{}`", here.name());
                        diagnostic.label = format!("add `{field}: …`");
                        self.diagnostics.push(diagnostic);
                    }
                    return None;
                }
            }
            let diagnostic = diagnostic
                .suggest(words.suggest.as_deref())
                .maybe_help(words.help);
            self.diagnostics.push(diagnostic);
            if offender.len() <= fixed || !node.remove(&offender) {
                return None;
            }
        }
        None
    }

    /// Rewords serde's message `raw` about the setting at `path`, with advice that fits its value.
    /// Shows the reference in place of a value from the environment.
    fn words(&self, node: &mut Node, steps: &[Step], path: &KeyPath, raw: &str) -> Words {
        let value = node.at(steps);
        let secret = self.secrets.uses_in(path).next();
        let shown = match (secret, &value) {
            (Some(secret), _) => Some(secret.written.clone()),
            (None, Some(node)) => node.text(),
            (None, None) => None,
        };
        let mut words = reword(raw, path.name(), shown.as_deref());
        if words.takes_quotes_off()
            && let Some((_, variable)) = self.uses.iter().find(|(used, _)| used == path)
        {
            let value = shown.unwrap_or_default();
            words.help = Some(format!(
                "remove the quotes in `vars`: `{variable}: {value}`"
            ));
        }
        if let Some(Node::List(elements)) = value
            && let [element] = &elements[..]
            && let Some(text) = element.text()
            && words.message.ends_with("must be a string, not a list")
        {
            words.help = Some(format!("remove the brackets or the dash: `{text}`"));
        }
        if let Some(secret) = secret {
            words.message = words.message.replace(&secret.meant, &secret.written);
        }
        words
    }

    /// Turns a number or boolean from the environment back into its text if a string is expected.
    /// Returns true if it did.
    fn takes_text(&self, node: &mut Node, steps: &[Step], path: &KeyPath, raw: &str) -> bool {
        let wants_text = raw.starts_with("invalid type: ") && raw.ends_with("string");
        let Some(used) = self.secrets.uses_in(path).find(|used| used.path == *path) else {
            return false;
        };
        match node.at(steps) {
            Some(value @ (Node::Number(_) | Node::Bool(_))) if wants_text => {
                *value = Node::Text(used.meant.clone());
                true
            }
            _ => false,
        }
    }
}

/// Deserializes a node as a `T`; the error is a place in the node and serde's message.
fn deserialize<T: DeserializeOwned>(node: &Node) -> Result<T, (Vec<Step>, String)> {
    let mut track = Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(Value::from(node), &mut track);
    singleton_map_recursive::deserialize(deserializer).map_err(|error: serde_yaml::Error| {
        let path = track.path();
        let steps = path.iter().filter_map(|segment| match segment {
            Segment::Map { key } => Some(Step::Key {
                key: key.clone(),
                nth: 0,
            }),
            Segment::Seq { index } => Some(Step::Index(*index)),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        (steps.collect(), error.to_string())
    })
}

/// The names of the variants of a `Spec`, in order.
fn words_of<Spec: DeserializeOwned>() -> Vec<String> {
    let nothing = Node::Text(String::new());
    let Err((_, message)) = deserialize::<Spec>(&nothing) else {
        return Vec::new();
    };
    let (_, list) = message.split_once("expected").unwrap_or_default();
    list.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// A node for a message.
fn shown(node: &Node) -> String {
    match node.text() {
        Some(text) => format!("`{}`", short(&text)),
        None => node.noun().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::pipeline::KeepImages;
    use crate::stages::StageSpec;
    use ovchat_models::ModelSpec;

    fn no_environment(_: &str) -> Result<String, std::env::VarError> {
        Err(std::env::VarError::NotPresent)
    }

    #[track_caller]
    fn check(text: &str, expected: &[&str]) -> PipelineSpec {
        let (tree, flaws) = Node::parse(text).unwrap();
        assert_eq!(flaws, []);
        let Read {
            written,
            diagnostics,
            ..
        } = read(tree, &no_environment);
        let messages: Vec<_> = diagnostics
            .iter()
            .map(|diagnostic| format!("{}: {}", diagnostic.at.path, diagnostic.message))
            .collect();
        assert_eq!(messages, expected);
        written
    }

    #[test]
    fn defaults_stand_for_what_is_left_out_and_order_is_kept() {
        let written = check(
            "pipeline: p\nstages:\n  z: { load_prompts: { from: a.json } }\n  b: { sample: { prompts: z, model: m } }\n",
            &[],
        );
        assert_eq!((written.seed, written.rounds.max().get()), (0, 1));
        assert!((written.reject_share_max.get() - 0.01).abs() < 1e-12);
        assert_eq!(written.keep_images, KeepImages::Bytes);
        let names: Vec<_> = written
            .stages
            .iter()
            .map(|entry| entry.name.as_str())
            .collect();
        assert_eq!(names, ["z", "b"]);
        assert_eq!(written.stages[1].settings.to_string(), "stages.b.sample");
    }

    #[test]
    fn every_mistake_of_a_stage_is_told_and_none_is_told_twice() {
        check(
            "pipeline: p\nseed: x\nstages:\n  c: { sample: { promts: z, model: m, count: 0, top_p: hot, temperature: -1 } }\n  d: { score: {} }\n",
            &[
                "seed: expected a non-negative integer, got `x`",
                "stages.c.sample.promts: unknown field `promts`, expected one of `prompts`, `model`, `count`, `temperature`, …",
                "stages.c.sample.count: expected a positive integer, got `0`",
                "stages.c.sample.top_p: expected a number, got `hot`",
                "stages.c.sample.temperature: -1 is not a temperature (0 to 100; 0 is greedy)",
                "stages.d.score: missing field `candidates` in `score`",
            ],
        );
    }

    #[test]
    fn the_words_of_a_spec_are_its_variants() {
        assert_eq!(
            words_of::<StageSpec>()[..3],
            ["load_prompts", "load_feedback", "load_answers"]
        );
        assert_eq!(
            words_of::<ModelSpec>(),
            [
                "llava_onevision",
                "llava",
                "llava_rlhf",
                "critic",
                "self",
                "http",
                "sql",
                "scripted"
            ]
        );
    }

    #[test]
    fn the_reader_knows_the_fields_of_the_schema() {
        let schema = schemars::schema_for!(PipelineSpec);
        let properties = schema.get("properties").unwrap().as_object().unwrap();
        let names: Vec<_> = properties.keys().map(String::as_str).collect();
        assert_eq!(names, FIELDS);
    }
}
