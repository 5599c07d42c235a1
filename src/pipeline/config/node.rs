//! Parsing of a pipeline file into a tree of plain values.
//!
//! serde_yaml's own tree stops at the first duplicate key, and maps of structs silently drop the
//! earlier of two entries. This tree keeps the file order, takes the first of two duplicates, and
//! lists the flaws, so that one mistake does not hide the next.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;

use serde::Deserialize as _;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};
use serde_yaml::{Mapping, Number, Value};

use super::key_text::KeyText;
use super::source::{KeyPath, Step};

/// A value as written.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    /// The entries in file order, each key once.
    Map(Vec<(String, Node)>),
    /// An invalid value that already has a diagnostic, and needs no other.
    Wrong,
}

/// A construct that YAML allows and a pipeline file does not.
#[derive(Debug, Clone, PartialEq)]
pub enum Flaw {
    /// A duplicate key; the path is that of the later one.
    Duplicate(KeyPath),
    /// A YAML tag such as `!sample`.
    Tag(KeyPath),
    /// A list or a map in place of a key, in the map at the path.
    Key(KeyPath),
}

/// The deepest nesting of brackets, quoted ones included, that is scanned at once.
const BRACKETS_MAX: usize = 1_000;

/// Returns the beginning of a text in which more than [`BRACKETS_MAX`] brackets are open, with all
/// of them closed at its end, or `None`.
fn too_deep(text: &str) -> Option<String> {
    let mut open = Vec::new();
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'[' => open.push(']'),
            b'{' => open.push('}'),
            b']' | b'}' => {
                open.pop();
            }
            _ => continue,
        }
        if open.len() > BRACKETS_MAX {
            let mut beginning = text[..=at].to_owned();
            beginning.extend(open.iter().rev());
            return Some(beginning);
        }
    }
    None
}

impl Node {
    /// Parses a text. The error is a YAML syntax error; other flaws are returned in the list.
    pub fn parse(text: &str) -> Result<(Self, Vec<Flaw>), serde_yaml::Error> {
        // The scanner takes time quadratic in the depth, and fails far above this depth anyway.
        if let Some(deep) = too_deep(text)
            && let Err(error) = Value::deserialize(serde_yaml::Deserializer::from_str(&deep))
            && error.to_string().contains("recursion limit")
        {
            return Err(error);
        }
        let flaws = RefCell::new(Vec::new());
        let grow = Grow {
            path: KeyPath::root(),
            flaws: &flaws,
        };
        let node = grow.deserialize(serde_yaml::Deserializer::from_str(text))?;
        Ok((node, flaws.into_inner()))
    }

    /// Returns the entry of a map, or `None`.
    pub fn get(&self, key: &str) -> Option<&Self> {
        let Self::Map(entries) = self else {
            return None;
        };
        entries.iter().find(|(k, _)| k == key).map(|(_, node)| node)
    }

    /// Returns the node at a path, or `None`.
    pub fn at(&mut self, steps: &[Step]) -> Option<&mut Self> {
        let Some((step, rest)) = steps.split_first() else {
            return Some(self);
        };
        let below = match (self, step) {
            (Self::Map(entries), Step::Key { key, .. }) => entries
                .iter_mut()
                .find(|(k, _)| k == key)
                .map(|(_, node)| node),
            (Self::List(elements), Step::Index(index)) => elements.get_mut(*index),
            _ => None,
        };
        below?.at(rest)
    }

    /// Removes the node at a path; returns false if there is none.
    pub fn remove(&mut self, steps: &[Step]) -> bool {
        let Some((last, above)) = steps.split_last() else {
            return false;
        };
        match (self.at(above), last) {
            (Some(Self::Map(entries)), Step::Key { key, .. }) => {
                let before = entries.len();
                entries.retain(|(k, _)| k != key);
                entries.len() < before
            }
            (Some(Self::List(elements)), Step::Index(index)) if *index < elements.len() => {
                elements.remove(*index);
                true
            }
            _ => false,
        }
    }

    /// Removes every [`Node::Wrong`] in the tree, and returns the keys under which they were found.
    pub fn remove_wrong(&mut self) -> Vec<String> {
        let mut keys = Vec::new();
        match self {
            Self::Map(entries) => {
                for (key, node) in entries.iter_mut() {
                    keys.extend(node.remove_wrong());
                    if *node == Self::Wrong {
                        keys.push(key.clone());
                    }
                }
                entries.retain(|(_, node)| *node != Self::Wrong);
            }
            Self::List(elements) => {
                let before = elements.len();
                for element in elements.iter_mut() {
                    keys.extend(element.remove_wrong());
                }
                elements.retain(|element| *element != Self::Wrong);
                // The elements of a list have no key; an empty key stands for them.
                keys.extend((elements.len() < before).then(String::new));
            }
            _ => {}
        }
        keys
    }

    /// Returns a scalar as text; `None` for null, lists and maps.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Bool(value) => Some(value.to_string()),
            Self::Number(value) => Some(value.to_string()),
            Self::Text(text) => Some(text.clone()),
            Self::Null | Self::List(_) | Self::Map(_) | Self::Wrong => None,
        }
    }

    /// The type of the node for messages: `a list`.
    pub fn noun(&self) -> &'static str {
        match self {
            Self::Null | Self::Wrong => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

impl From<&Node> for Value {
    fn from(node: &Node) -> Self {
        match node {
            Node::Null | Node::Wrong => Self::Null,
            Node::Bool(value) => Self::Bool(*value),
            Node::Number(value) => Self::Number(value.clone()),
            Node::Text(text) => Self::String(text.clone()),
            Node::List(elements) => Self::Sequence(elements.iter().map(Self::from).collect()),
            Node::Map(entries) => {
                let entry = |(key, node): &(String, Node)| (key.as_str().into(), Self::from(node));
                Self::Mapping(entries.iter().map(entry).collect::<Mapping>())
            }
        }
    }
}

/// The deserialization seed of the node at `path`.
struct Grow<'a> {
    path: KeyPath,
    flaws: &'a RefCell<Vec<Flaw>>,
}

impl<'de> DeserializeSeed<'de> for Grow<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Grow<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Number(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Number(value.into()))
    }

    fn visit_i128<E: Error>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Number((value as f64).into()))
    }

    fn visit_u128<E: Error>(self, value: u128) -> Result<Node, E> {
        Ok(Node::Number((value as f64).into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Number(value.into()))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Node, E> {
        Ok(Node::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut elements = Vec::new();
        loop {
            let seed = Grow {
                path: self.path.index(elements.len()),
                flaws: self.flaws,
            };
            match list.next_element_seed(seed)? {
                Some(element) => elements.push(element),
                None => return Ok(Node::List(elements)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        let mut times: HashMap<String, usize> = HashMap::new();
        while let Some(key) = map.next_key_seed(KeyText::default())? {
            let Some(key) = key else {
                self.flaws.borrow_mut().push(Flaw::Key(self.path.clone()));
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let nth = times.entry(key.clone()).or_default();
            *nth += 1;
            if *nth > 1 {
                let flaw = Flaw::Duplicate(self.path.nth_key(&key, *nth - 1));
                self.flaws.borrow_mut().push(flaw);
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let seed = Grow {
                path: self.path.key(&key),
                flaws: self.flaws,
            };
            let node = map.next_value_seed(seed)?;
            entries.push((key, node));
        }
        Ok(Node::Map(entries))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<Node, A::Error> {
        let (_, content) = tagged.variant::<IgnoredAny>()?;
        content.newtype_variant::<IgnoredAny>()?;
        self.flaws.borrow_mut().push(Flaw::Tag(self.path));
        Ok(Node::Wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deep_nesting_is_refused_at_once_and_brackets_in_a_string_are_not() {
        for deep in ["[".repeat(200_000), "{a: ".repeat(100_000)] {
            let error = Node::parse(&format!("a: {deep}")).unwrap_err().to_string();
            assert!(error.contains("recursion limit"), "{error}");
        }
        let quoted = format!("a: \"{}\"", "[".repeat(5_000));
        assert!(Node::parse(&quoted).is_ok());
    }

    #[test]
    fn maps_keep_their_order_and_tell_duplicates_of_any_depth() {
        let (node, flaws) = Node::parse("z: 1\na: { b: 1, b: 2, c: 3, b: 4 }\nz: 5\n").unwrap();
        let Node::Map(entries) = &node else {
            panic!("{node:?}");
        };
        let keys: Vec<_> = entries.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["z", "a"]);
        assert_eq!(node.get("z"), Some(&Node::Number(1.into())));
        let a = KeyPath::root().key("a");
        assert_eq!(
            flaws,
            [
                Flaw::Duplicate(a.nth_key("b", 1)),
                Flaw::Duplicate(a.nth_key("b", 2)),
                Flaw::Duplicate(KeyPath::root().nth_key("z", 1)),
            ]
        );
    }

    #[test]
    fn tags_and_strange_keys_are_flaws_and_hide_nothing() {
        let (node, flaws) = Node::parse("a: !x { y: 1 }\n? [k]\n: 1\n2: ~\n").unwrap();
        assert_eq!(
            node,
            Node::Map(vec![
                ("a".to_owned(), Node::Wrong),
                ("2".to_owned(), Node::Null)
            ])
        );
        let root = KeyPath::root();
        assert_eq!(flaws, [Flaw::Tag(root.key("a")), Flaw::Key(root)]);
    }

    #[test]
    fn an_element_of_a_list_can_be_taken_out() {
        let (mut node, _) = Node::parse("a: [1, 2]").unwrap();
        let second = KeyPath::root().key("a").index(1);
        assert!(node.remove(second.steps()));
        assert!(!node.remove(second.steps()));
        assert_eq!(
            node.get("a"),
            Some(&Node::List(vec![Node::Number(1.into())]))
        );
    }
}
