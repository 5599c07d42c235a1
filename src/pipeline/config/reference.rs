//! References: `"${k}"` to a variable of the pipeline, `"${env:NAME}"` to an environment variable.
//!
//! References are replaced after parsing, so a value cannot break the YAML and a comment needs no
//! escaping. A value from the environment may be secret: [`Secrets`] tracks where it is used.

use serde_yaml::Number;

use super::diagnostic::{At, Diagnostic};
use super::node::Node;
use super::secrets::{EnvUse, Secrets};
use super::source::KeyPath;
use super::suggest::{listed, suggest};

/// The diagnostic code of undefined variables.
pub const UNKNOWN_VARIABLE: &str = "config::unknown_variable";

/// A function that reads an environment variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Result<String, std::env::VarError>;

/// Replaces references, and collects the diagnostics.
pub struct Replacer<'a> {
    /// The variables of the pipeline; `None` inside `vars:`, where they cannot be used.
    pub vars: Option<Vec<Variable>>,
    pub environment: Environment<'a>,
    pub secrets: Secrets,
    /// The settings whose whole value is one variable of the pipeline, with the name of the
    /// variable.
    pub uses: Vec<(KeyPath, String)>,
    /// The settings that begin with a variable of the pipeline, with its name.
    pub begins_with: Vec<(KeyPath, String)>,
    pub diagnostics: Vec<Diagnostic>,
}

/// A variable of the pipeline.
pub struct Variable {
    pub name: String,
    pub value: Node,
    /// True if anything references the variable.
    pub is_used: bool,
    /// The written form of its value if that contains values from the environment.
    secret: Option<EnvUse>,
}

impl Variable {
    /// Creates a variable from its value at `path`, in which references have been replaced.
    pub fn new(name: &str, value: Node, path: &KeyPath, secrets: &Secrets) -> Self {
        Self {
            name: name.to_owned(),
            value,
            is_used: false,
            secret: secrets.uses_in(path).next().cloned(),
        }
    }
}

/// A piece of a text: literal text or a reference.
enum Piece<'a> {
    Text(&'a str),
    Reference(&'a str),
}

impl Replacer<'_> {
    /// Replaces every reference in the node at `path`.
    pub fn replace(&mut self, node: &mut Node, path: &KeyPath) {
        match node {
            Node::List(elements) => {
                for (index, element) in elements.iter_mut().enumerate() {
                    self.replace(element, &path.index(index));
                }
            }
            Node::Map(entries) => {
                for (key, entry) in entries {
                    self.replace(entry, &path.key(key));
                }
            }
            Node::Text(text) if text.contains("${") => {
                *node = self.replace_text(text, path).unwrap_or(Node::Wrong);
            }
            _ => {}
        }
    }

    /// Returns the value of a text; `None` after reporting a diagnostic.
    fn replace_text(&mut self, text: &str, path: &KeyPath) -> Option<Node> {
        let pieces = match pieces(text) {
            Ok(pieces) => pieces,
            Err(message) => {
                let diagnostic =
                    Diagnostic::new("config::reference", At::value(path.clone()), message);
                self.diagnostics
                    .push(diagnostic.help("write `$${` for a literal `${`"));
                return None;
            }
        };
        let mut used = EnvUse {
            path: path.clone(),
            written: String::new(),
            meant: String::new(),
            names: Vec::new(),
        };
        if let Some(Piece::Reference(name)) = pieces.first()
            && !name.starts_with("env:")
        {
            self.begins_with.push((path.clone(), (*name).to_owned()));
        }
        if let [Piece::Reference(name)] = pieces[..] {
            let node = self.value(name, path, &mut used)?;
            self.remember(used);
            if !name.starts_with("env:") {
                self.uses.push((path.clone(), name.to_owned()));
            }
            return Some(node);
        }
        for piece in pieces {
            match piece {
                Piece::Text(text) => {
                    used.written.push_str(text);
                    used.meant.push_str(text);
                }
                Piece::Reference(name) => {
                    self.value(name, path, &mut used)?;
                }
            }
        }
        let whole = Node::Text(used.meant.clone());
        self.remember(used);
        Some(whole)
    }

    /// Returns the value of a reference, and appends its text, as written and as resolved, to
    /// `used`.
    fn value(&mut self, name: &str, path: &KeyPath, used: &mut EnvUse) -> Option<Node> {
        if let Some(variable) = name.strip_prefix("env:") {
            return self.environment_value(variable, path, used);
        }
        let at = At::value(path.clone());
        let Some(vars) = &mut self.vars else {
            self.diagnostics.push(
                Diagnostic::new(
                    "config::reference",
                    at,
                    "a variable cannot reference another variable",
                )
                .help("write the value itself, or reference the environment: `${env:NAME}`"),
            );
            return None;
        };
        if let Some(variable) = vars.iter_mut().find(|variable| variable.name == name) {
            variable.is_used = true;
            if variable.value == Node::Wrong {
                return None;
            }
            let text = variable.value.text().unwrap_or_default();
            match &variable.secret {
                Some(secret) => {
                    used.written.push_str(&secret.written);
                    used.names.extend_from_slice(&secret.names);
                }
                None => used.written.push_str(&text),
            }
            used.meant.push_str(&text);
            return Some(variable.value.clone());
        }
        let known: Vec<&str> = vars.iter().map(|variable| variable.name.as_str()).collect();
        let help = if known.is_empty() {
            format!("define it at the top of the file: `vars: {{ {name}: … }}`")
        } else {
            format!("available variables: {}", listed(known.iter().copied()))
        };
        let diagnostic = Diagnostic::new(
            UNKNOWN_VARIABLE,
            at,
            format!("there is no variable `{name}`"),
        );
        let suggested = suggest(name, known).map(str::to_owned);
        self.diagnostics
            .push(diagnostic.suggest(suggested.as_deref()).help(help));
        None
    }

    fn environment_value(&mut self, name: &str, path: &KeyPath, used: &mut EnvUse) -> Option<Node> {
        let problem = match (self.environment)(name) {
            Ok(value) => {
                used.written.push_str("${env:");
                used.written.push_str(name);
                used.written.push('}');
                used.meant.push_str(&value);
                used.names.push(name.to_owned());
                let node = scalar(&value);
                self.secrets.add_value(name, &value);
                return Some(node);
            }
            Err(std::env::VarError::NotPresent) => "is not set",
            Err(std::env::VarError::NotUnicode(_)) => "is not valid UTF-8",
        };
        self.diagnostics.push(
            Diagnostic::new(
                "config::environment",
                At::value(path.clone()),
                format!("environment variable `{name}` {problem}"),
            )
            .help(format!("set it for the command: `{name}=… pipeline …`")),
        );
        None
    }

    fn remember(&mut self, used: EnvUse) {
        if !used.names.is_empty() {
            self.secrets.add_use(used);
        }
    }
}

/// Parses a value of the environment as YAML would: a number, a boolean, or else a string.
fn scalar(text: &str) -> Node {
    match serde_yaml::from_str::<serde_yaml::Value>(text) {
        Ok(serde_yaml::Value::Bool(value)) => Node::Bool(value),
        Ok(serde_yaml::Value::Number(value)) if is_plain_number(&value) => Node::Number(value),
        _ => Node::Text(text.to_owned()),
    }
}

fn is_plain_number(value: &Number) -> bool {
    value.as_f64().is_some_and(f64::is_finite)
}

/// Splits a text at its references; `$${` stands for a literal `${`.
fn pieces(text: &str) -> Result<Vec<Piece<'_>>, String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(dollar) = rest.find("${") {
        if rest[..dollar].ends_with('$') {
            // In `$${`, the first `$` escapes the other two characters, which stay.
            pieces.push(Piece::Text(&rest[..dollar - 1]));
            pieces.push(Piece::Text(&rest[dollar..dollar + 2]));
            rest = &rest[dollar + 2..];
            continue;
        }
        if dollar > 0 {
            pieces.push(Piece::Text(&rest[..dollar]));
        }
        let inside = &rest[dollar + 2..];
        let Some(end) = inside.find('}') else {
            return Err("unclosed reference: `${` without `}`".to_owned());
        };
        let name = inside[..end].trim();
        let bare = name.strip_prefix("env:").unwrap_or(name);
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if bare.is_empty() || !bare.chars().all(word) {
            return Err(format!(
                "invalid reference `${{{name}}}`: expected `${{name}}` or `${{env:NAME}}`"
            ));
        }
        pieces.push(Piece::Reference(name));
        rest = &inside[end + 1..];
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "hunter2";

    fn environment(name: &str) -> Result<String, std::env::VarError> {
        match name {
            "KEY" => Ok(KEY.to_owned()),
            "COUNT" => Ok("7".to_owned()),
            _ => Err(std::env::VarError::NotPresent),
        }
    }

    fn replacer() -> Replacer<'static> {
        let secrets = Secrets::default();
        let variable = |name, value| Variable::new(name, value, &KeyPath::root(), &secrets);
        Replacer {
            vars: Some(vec![
                variable("k", Node::Number(5.into())),
                variable("name", Node::Text("ov".to_owned())),
            ]),
            environment: &environment,
            secrets: Secrets::default(),
            uses: Vec::new(),
            begins_with: Vec::new(),
            diagnostics: Vec::new(),
        }
    }

    #[track_caller]
    fn check(written: &str, expected: Result<Node, &str>) {
        let mut replacer = replacer();
        let mut node = Node::Text(written.to_owned());
        replacer.replace(&mut node, &KeyPath::root().key("x"));
        match expected {
            Ok(expected) => assert_eq!(node, expected, "{:?}", replacer.diagnostics),
            Err(message) => assert_eq!(replacer.diagnostics[0].message, message),
        }
    }

    fn text(text: &str) -> Node {
        Node::Text(text.to_owned())
    }

    #[test]
    fn a_lone_reference_takes_the_typed_value_and_others_are_spliced() {
        check("${k}", Ok(Node::Number(5.into())));
        check("${env:COUNT}", Ok(Node::Number(7.into())));
        check("${env:KEY}", Ok(text("hunter2")));
        check("a-${k}/${name}", Ok(text("a-5/ov")));
        check("$${k} costs $5", Ok(text("${k} costs $5")));
        check("x$${${k}}", Ok(text("x${5}")));
    }

    #[test]
    fn references_to_nothing_are_refused() {
        check("${kk}", Err("there is no variable `kk`"));
        check("${env:NO}", Err("environment variable `NO` is not set"));
        check("a ${k", Err("unclosed reference: `${` without `}`"));
        check(
            "${}",
            Err("invalid reference `${}`: expected `${name}` or `${env:NAME}`"),
        );
    }

    #[test]
    fn only_what_is_a_path_and_nothing_else_is_shown() {
        let root = KeyPath::root();
        let (from, url) = (root.key("from"), root.key("url"));
        let of = |written: &[(&KeyPath, &str)]| {
            let mut replacer = replacer();
            replacer.environment = &|name| Ok(format!("/{}", name.to_lowercase()));
            for (path, written) in written {
                replacer.replace(&mut text(written), path);
            }
            let mut secrets = replacer.secrets;
            secrets.show_paths(std::slice::from_ref(&from));
            secrets
        };
        let photos = of(&[(&from, "${env:PHOTOS}/a")]);
        assert_eq!(photos.hide("no /photos/a"), "no /photos/a");
        let both = of(&[(&from, "${env:PHOTOS}/a"), (&url, "${env:PHOTOS}")]);
        assert_eq!(both.hide("no /photos/a"), "no ${env:PHOTOS}/a");
        let token = of(&[(&from, "${env:HF_TOKEN}/a")]);
        assert_eq!(token.hide("no /hf_token/a"), "no ${env:HF_TOKEN}/a");
        let unused = of(&[(&root.key("vars").key("v"), "${env:PHOTOS}")]);
        assert_eq!(unused.hide("/photos"), "${env:PHOTOS}");
    }

    #[test]
    fn a_value_of_the_environment_is_hidden_wherever_it_shows() {
        let mut replacer = replacer();
        let path = KeyPath::root().key("x");
        replacer.replace(&mut text("a/${env:KEY}/${env:COUNT}"), &path);
        let secrets = replacer.secrets;
        assert_eq!(
            secrets.hide("a/hunter2/7: no 17 (7)"),
            "a/${env:KEY}/${env:COUNT}: no 17 (${env:COUNT})"
        );
        let used = secrets.uses_in(&path).next().unwrap();
        assert_eq!(used.written, "a/${env:KEY}/${env:COUNT}");
        assert_eq!(used.names, ["KEY", "COUNT"]);
        assert!(!format!("{secrets:?}").contains(KEY));
        assert_eq!(secrets.references()[1].sha256[..8], *"f52fbd32");
    }
}
