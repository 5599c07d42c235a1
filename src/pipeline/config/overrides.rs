//! Overrides from the command line: `--set stages.pairs.select_extremes.margin_min=0.1`.

use std::ops::Range;
use std::sync::Arc;

use super::diagnostic::{At, Diagnostic};
use super::node::Node;
use super::source::{KeyPath, Side, SourceText, Span, Step};
use super::suggest::{listed, suggest};

/// One parsed `--set`.
#[derive(Debug, Clone)]
pub struct Override {
    /// The path of the setting.
    pub path: KeyPath,
    /// The whole text, under the name `--set`.
    source: Arc<SourceText>,
    /// The span of each step of the path in the text.
    steps: Vec<Range<usize>>,
    /// The span of the value in the text.
    value: Range<usize>,
}

impl Override {
    /// Parses `path=value`. The value is YAML.
    pub fn parse(text: &str) -> Result<(Self, Node), Box<Diagnostic>> {
        let source = Arc::new(SourceText::new("--set".to_owned(), text));
        let complain = |message: String, span: Range<usize>| {
            let source = Arc::clone(&source);
            let diagnostic = Diagnostic::new("config::set", At::key(KeyPath::root()), message)
                .help(
                    "write `--set SETTING=VALUE`, such as `--set stages.candidates.sample.count=3`",
                )
                .placed(Span { source, span });
            Box::new(diagnostic)
        };
        let Some((left, right)) = source.text.split_once('=') else {
            return Err(complain(
                format!("expected `SETTING=VALUE`, got `{text}`"),
                0..text.len(),
            ));
        };
        let mut path = KeyPath::root();
        let mut steps = Vec::new();
        let mut start = 0;
        for word in left.split('.') {
            let (key, indices) = word.split_once('[').map_or((word, None), |(key, rest)| {
                (key, Some(rest.strip_suffix(']').unwrap_or(rest)))
            });
            let span = start..start + word.len();
            start = span.end + 1;
            if key.is_empty() {
                return Err(complain(
                    format!("`{left}` is not a valid setting path"),
                    span,
                ));
            }
            path = path.key(key);
            steps.push(span.clone());
            for index in indices.into_iter().flat_map(|text| text.split("][")) {
                let Ok(index) = index.parse() else {
                    return Err(complain(
                        format!("`{index}` is not a valid list index"),
                        span,
                    ));
                };
                path = path.index(index);
                steps.push(span.clone());
            }
        }
        let value = left.len() + 1..source.text.len();
        let (node, flaws) = Node::parse(right).map_err(|error| {
            complain(
                format!("the value is not valid YAML: {error}"),
                value.clone(),
            )
        })?;
        if !flaws.is_empty() {
            return Err(complain(
                "the value contains duplicate keys or YAML tags".to_owned(),
                value,
            ));
        }
        let parsed = Self {
            path,
            source,
            steps,
            value,
        };
        Ok((parsed, node))
    }

    /// Sets the value in the tree. All steps of the path but the last must already exist.
    pub fn apply(&self, value: Node, tree: &mut Node) -> Result<(), Box<Diagnostic>> {
        let steps = self.path.steps();
        let last = steps.len() - 1;
        let mut here = tree;
        for (depth, step) in steps[..last].iter().enumerate() {
            if here.at(std::slice::from_ref(step)).is_none() {
                return Err(Box::new(self.leads_nowhere(depth, here)));
            }
            here = here
                .at(std::slice::from_ref(step))
                .expect("it was there just now");
        }
        let problem = match (here, &steps[last]) {
            (Node::Map(entries), Step::Key { key, .. }) => {
                match entries.iter_mut().find(|(known, _)| known == key) {
                    Some((_, node)) => *node = value,
                    None => entries.push((key.clone(), value)),
                }
                return Ok(());
            }
            (Node::List(elements), Step::Index(index)) => match elements.get_mut(*index) {
                Some(element) => {
                    *element = value;
                    return Ok(());
                }
                None => format!(
                    "index out of range: the list has {} elements, counted from 0",
                    elements.len()
                ),
            },
            (other, _) => format!("cannot set a value inside {}", other.noun()),
        };
        Err(Box::new(self.complain(last, problem)))
    }

    /// The diagnostic for a step at `depth` that `here` has no entry for.
    fn leads_nowhere(&self, depth: usize, here: &Node) -> Diagnostic {
        let known: Vec<&str> = match here {
            Node::Map(entries) => entries.iter().map(|(key, _)| key.as_str()).collect(),
            _ => Vec::new(),
        };
        let steps = self.path.steps()[..=depth].iter();
        let path = steps.fold(KeyPath::root(), |path, step| path.then(step.clone()));
        let help = (!known.is_empty())
            .then(|| format!("available settings: {}", listed(known.iter().copied())));
        self.complain(depth, format!("there is no setting `{path}`"))
            .suggest(suggest(path.name(), known))
            .maybe_help(help)
    }

    /// Returns the span to underline for a diagnostic about the setting or something in it.
    pub fn place(&self, at: &At) -> Span {
        let is_key = at.side == Side::Key && at.path == self.path;
        let step = self.steps.last().filter(|_| is_key);
        Span {
            source: Arc::clone(&self.source),
            span: step.unwrap_or(&self.value).clone(),
        }
    }

    fn complain(&self, depth: usize, message: String) -> Diagnostic {
        let span = self.steps.get(depth).unwrap_or(&self.value).clone();
        let source = Arc::clone(&self.source);
        let at = At::key(self.path.clone());
        Diagnostic::new("config::set", at, message).placed(Span { source, span })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Result<&str, &str>) {
        let (mut tree, _) = Node::parse("a: { b: 1, c: [x, y] }").unwrap();
        let outcome =
            Override::parse(text).and_then(|(change, value)| change.apply(value, &mut tree));
        match (outcome, expected) {
            (Ok(()), Ok(yaml)) => assert_eq!(tree, Node::parse(yaml).unwrap().0),
            (Err(diagnostic), Err(message)) => assert_eq!(diagnostic.message, message),
            (outcome, _) => panic!("{outcome:?}"),
        }
    }

    #[test]
    fn a_setting_is_replaced_or_added() {
        check("a.b=2", Ok("a: { b: 2, c: [x, y] }"));
        check("a.b=x=y", Ok("a: { b: x=y, c: [x, y] }"));
        check("a.d=[1, 2]", Ok("a: { b: 1, c: [x, y], d: [1, 2] }"));
        check("a.c[1]=z", Ok("a: { b: 1, c: [x, z] }"));
        check("e=true", Ok("a: { b: 1, c: [x, y] }\ne: true"));
    }

    #[test]
    fn a_path_that_leads_nowhere_is_refused() {
        check("a", Err("expected `SETTING=VALUE`, got `a`"));
        check("a..b=1", Err("`a..b` is not a valid setting path"));
        check("x.b=1", Err("there is no setting `x`"));
        check("a.b.c=1", Err("cannot set a value inside a number"));
        check(
            "a.c[2]=1",
            Err("index out of range: the list has 2 elements, counted from 0"),
        );
        check("a.c[z]=1", Err("`z` is not a valid list index"));
    }
}
