//! From the tree of a file to the pipeline as written.
//!
//! Every field, model and stage is deserialized on its own, and a setting that is wrong is taken
//! out before the next attempt, so that all mistakes come at once. What only the whole file can
//! show is left to [`super::check`] and [`super::lineage`].

use serde::de::DeserializeOwned;
use serde_path_to_error::{Segment, Track};
use serde_yaml::Value;
use serde_yaml::with::singleton_map_recursive;

use super::diagnostic::{At, Diagnostic, TOLD_MAX};
use super::node::Node;
use super::pipeline::{Entry, FIELDS, PipelineName, PipelineSpec, one_percent};
use super::reference::{Environment, Replacer, Secrets, UNKNOWN_VARIABLE, Variable};
use super::serde_messages::{Subject, WITHOUT_DASHES, listed, reword, short};
use super::source::{KeyPath, Step};
use super::suggest::suggest;
use crate::stages::TableName;

/// A pipeline as it was read.
pub struct Read {
    /// With defaults in place of what is wrong; it may be used only if there are no complaints, or to
    /// look for more.
    pub written: PipelineSpec,
    pub secrets: Secrets,
    pub diagnostics: Vec<Diagnostic>,
    /// Whether a top-level field was not read because its name is misspelt: what it holds is not missing.
    pub is_partial: bool,
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
        stages: reader.entries(&tree, "stages", "verb"),
        evaluate: reader.entries(&tree, "evaluate", "verb"),
        report: reader.named(&tree, "report", "`name: { query: … }`"),
        expect: reader.named(&tree, "expect", "`name: { table: …, query: … }`"),
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
    }
}

/// Reads pieces of the tree and collects what is wrong with them.
#[derive(Default)]
struct Reader {
    secrets: Secrets,
    /// The settings that are a variable and nothing else, with its name.
    uses: Vec<(KeyPath, String)>,
    diagnostics: Vec<Diagnostic>,
    /// Top-level fields whose absence has been explained.
    excused: Vec<String>,
}

impl Reader {
    /// Complains of top-level fields that don't exist; the guesses are excused from being missing.
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

    /// Complains of top-level fields that are left out and must not be.
    fn required_fields(&mut self, tree: &Node) {
        for (field, help) in [
            ("pipeline", "name it at the top: `pipeline: my-pipeline`"),
            (
                "stages",
                "add tables and the verbs that make them; `pipeline init` writes an example",
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
                None => format!("`{field}` is missing"),
                Some(_) => format!("`{field}` holds nothing"),
            };
            let diagnostic = Diagnostic::new("config::missing_field", at, message);
            self.diagnostics.push(diagnostic.help(help));
        }
    }

    /// The variables under `vars`, with references to the environment replaced.
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
                let message = format!("`{name}` is not a name for a variable: use a-z, 0-9 and _");
                let at = At::key(path.clone());
                self.diagnostics
                    .push(Diagnostic::new("config::name", at, message));
            }
            if matches!(value, Node::Null | Node::List(_) | Node::Map(_)) {
                let message = format!(
                    "`{name}` is {}: a variable is one text, number, `true` or `false`",
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

    /// A top-level field; `None` when it is left out or wrong.
    fn field<T: DeserializeOwned>(&mut self, tree: &Node, name: &str) -> Option<T> {
        let node = tree.get(name)?.clone();
        self.value(node, &KeyPath::root().key(name), 0)
    }

    /// The models or stages under `field`, which each have one `noun` (verb, network).
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
        let expected = format!("a map: `name: {{ {noun}: {{ … }} }}`");
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

    /// What stands under `field`, each under a name; an `example` shows how.
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
        let Some(map) = self.map(node, &path, &format!("a map: {example}")) else {
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

    /// A map of one word (a verb, a network) and its settings.
    fn one_word<Spec: DeserializeOwned>(
        &mut self,
        node: Node,
        path: &KeyPath,
        noun: &str,
    ) -> (KeyPath, Option<Spec>) {
        let words = words_of::<Spec>();
        let choice = format!(
            "the {noun}s are {}",
            listed(words.iter().map(String::as_str))
        );
        let name = path.name().to_owned();
        let mut entries = match node {
            Node::Map(entries) => entries,
            Node::Wrong => return (path.clone(), None),
            other => {
                let message = format!(
                    "`{name}` must name a {noun} with its settings, and holds {}",
                    shown(&other)
                );
                let diagnostic =
                    Diagnostic::new("config::wrong_type", At::value(path.clone()), message).help(
                        match &other {
                            Node::List(_) => format!("{WITHOUT_DASHES}; {choice}"),
                            _ => format!("write `{name}: {{ {noun}: {{ … }} }}`; {choice}"),
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
                format!("`{name}` must have one {noun}, but has `{first}` and `{second}`");
            let help = if words.contains(second) {
                format!("each {noun} needs a name of its own")
            } else {
                format!("if `{second}` is a setting of `{first}`, indent it more than `{first}`")
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
            let code = if noun == "verb" {
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
        // `scripted:` with nothing behind it means no settings.
        let settings = match settings {
            Node::Null => Node::Map(Vec::new()),
            settings => settings,
        };
        let spec = self.value(Node::Map(vec![(word, settings)]), path, 1);
        (inner, spec)
    }

    /// The entries of a map; complains of anything else.
    fn map(&mut self, node: &Node, path: &KeyPath, expected: &str) -> Option<Vec<(String, Node)>> {
        match node {
            Node::Map(entries) => Some(entries.clone()),
            Node::Null => Some(Vec::new()),
            Node::Wrong => None,
            other => {
                let message = format!("`{}` is {}, not {expected}", path.name(), other.noun());
                let at = At::key(path.clone());
                let help = matches!(other, Node::List(_)).then(|| WITHOUT_DASHES.to_owned());
                let diagnostic = Diagnostic::new("config::wrong_type", at, message);
                self.diagnostics.push(diagnostic.maybe_help(help));
                None
            }
        }
    }

    /// Deserializes the node at `path`. What is wrong is complained about and taken out, until
    /// the rest is right or can't be read at all. The first `fixed` steps below `path` stay.
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
        // Settings whose absence has been explained.
        let mut excused = node.remove_wrong();
        let mut is_right = excused.is_empty();
        let told_before = self.diagnostics.len();
        // One more than is told, so that it is known that there are more.
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
            let secret = self.secrets.uses_in(&here).next().cloned();
            let shown = match (&secret, node.at(&steps)) {
                (Some(secret), _) => Some(secret.written.clone()),
                (None, Some(node)) => node.text(),
                (None, None) => None,
            };
            let mut words = reword(&raw, here.name(), shown.as_deref());
            if words.takes_quotes_off()
                && let Some((_, variable)) = self.uses.iter().find(|(path, _)| *path == here)
            {
                let value = shown.unwrap_or_default();
                words.help = Some(format!(
                    "take the quotes off in `vars`: `{variable}: {value}`"
                ));
            }
            if let Some(Node::List(elements)) = node.at(&steps)
                && let [element] = &elements[..]
                && let Some(text) = element.text()
                && words.message.ends_with("must be a text, not a list")
            {
                words.help = Some(format!("write it without brackets or dash: `{text}`"));
            }
            let mut offender = steps;
            let mut diagnostic =
                Diagnostic::new(words.code, At::value(here.clone()), words.message);
            match words.subject {
                Subject::Here(side) => {
                    diagnostic.at.side = side;
                    excused.push(here.name().to_owned());
                }
                Subject::Extra(key) => {
                    // serde_path_to_error counts an unknown key as a part of the path.
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
                        diagnostic.message = format!("`{}` has no `{field}`", here.name());
                        diagnostic.label = format!("add `{field}: …`");
                        self.diagnostics.push(diagnostic);
                    }
                    return None;
                }
            }
            if let Some(secret) = secret {
                diagnostic.message = diagnostic.message.replace(&secret.meant, &secret.written);
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

    /// Whether a number or flag from the environment stands where a text is wanted; it then
    /// becomes the text that it was.
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

/// Reads a node as a `T`; the error is where in the node, and what serde says.
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

/// The words that may stand for a `Spec`, in the order of its variants.
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

/// A node in a message.
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
                "seed: `x` is not a whole number, 0 or more",
                "stages.c.sample.promts: unknown field `promts`, expected one of `prompts`, `model`, `count`, `temperature`, …",
                "stages.c.sample.count: `0` is not a whole number, 1 or more",
                "stages.c.sample.top_p: `hot` is not a number",
                "stages.c.sample.temperature: -1 is not a temperature (0 to 100; 0 is greedy)",
                "stages.d.score: `score` has no `candidates`",
            ],
        );
    }

    #[test]
    fn the_words_of_a_spec_are_its_variants() {
        assert_eq!(
            words_of::<StageSpec>()[..3],
            ["load_prompts", "load_feedback", "sample"]
        );
        assert_eq!(
            words_of::<ModelSpec>(),
            [
                "llava_onevision",
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
