//! The modules of a crate form no cycle.
//!
//! A module is a file. It depends on each file that a path in its code names: `crate::…`,
//! `super::…`, `self::…`, or `child::…` where it declares `mod child`. A path leads to the deepest
//! file that it names, so a name that `mod.rs` re-exports leads to `mod.rs`. A re-export (`pub
//! use`) is no dependency of `mod.rs`: it tells others where a name is found, and none of the
//! code in `mod.rs` needs it. Tests do not count, and calls of methods are not seen.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::tidy::{CRATES, assert_none, files, is_rust};

/// The texts of a crate's modules by path, `crate::config::node`; those of tests are left out.
fn modules(name: &str) -> BTreeMap<String, String> {
    let folder = format!("src/{name}/");
    let mut modules = BTreeMap::new();
    for (file, text) in files(&folder) {
        let file = file[folder.len()..].to_owned();
        if is_rust(&file) && file != "build.rs" {
            let file = file.trim_end_matches(".rs").trim_end_matches("/mod");
            let path = match file {
                "lib" => "crate".to_owned(),
                _ => format!("crate::{}", file.replace('/', "::")),
            };
            modules.insert(path, text);
        }
    }
    let of_tests: Vec<String> = modules.iter().flat_map(test_modules).collect();
    modules.retain(|path, _| {
        let is_in = |tests: &String| *path == *tests || path.starts_with(&format!("{tests}::"));
        !of_tests.iter().any(is_in)
    });
    modules
}

/// Returns the modules in files of their own that a module declares for tests.
fn test_modules((path, text): (&String, &String)) -> Vec<String> {
    let after = text.split("#[cfg(test)]\nmod ").skip(1);
    let names = after.filter_map(|rest| rest.lines().next()?.strip_suffix(';'));
    names.map(|name| format!("{path}::{name}")).collect()
}

/// Returns the lines of a module's code, without comments and tests. In an inline module, `super`
/// is the file itself.
fn code(text: &str) -> Vec<String> {
    let opens_module =
        |line: &str| line.trim_start_matches("pub ").starts_with("mod ") && line.ends_with('{');
    let all: Vec<&str> = text.lines().collect();
    let is_end = |at: usize| all[at] == "#[cfg(test)]" && opens_module(all[at + 1]);
    let mut is_inline = false;
    let mut code = Vec::new();
    for at in (0..all.len()).take_while(|&at| !is_end(at)) {
        is_inline = opens_module(all[at]) || (is_inline && all[at] != "}");
        let line = all[at].split("//").next().unwrap_or_default();
        code.push(if is_inline {
            line.replacen("super::", "self::", 1)
        } else {
            line.to_owned()
        });
    }
    code
}

/// Returns the paths in a module's code, except those of re-exports.
fn paths(text: &str) -> Vec<String> {
    let mut paths = Vec::new();
    let mut lines = code(text).into_iter();
    while let Some(line) = lines.next() {
        let Some((is_public, opening)) = import(&line) else {
            let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            let words = line
                .split(|c: char| !is_part(c))
                .map(|word| word.trim_matches(':'));
            paths.extend(words.filter(|word| word.contains("::")).map(str::to_owned));
            continue;
        };
        let mut tree = opening.to_owned();
        while !tree.ends_with(';') {
            tree += lines.next().expect("an import ends").trim();
        }
        if !is_public {
            expand(tree.trim_end_matches(';'), &mut paths);
        }
    }
    paths
}

/// Returns the tree of a line that begins an import, and true if it is a re-export.
fn import(line: &str) -> Option<(bool, &str)> {
    let (visibility, tree) = line.trim_start().split_once("use ")?;
    let is_visibility =
        visibility.is_empty() || visibility == "pub " || visibility.starts_with("pub(");
    let first = tree.split_whitespace().next()?;
    // A line of a text may begin with "use ", too.
    let is_tree = first.contains("::");
    (is_visibility && is_tree).then_some((!visibility.is_empty(), tree))
}

/// Adds the paths of an import: `a::{b, c::{d, e}}` imports `a::b`, `a::c::d` and `a::c::e`.
fn expand(tree: &str, paths: &mut Vec<String>) {
    let Some((prefix, rest)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        paths.push(path.to_owned());
        return;
    };
    let inner = rest.trim_end().trim_end_matches(',');
    let inner = inner.strip_suffix('}').unwrap_or(inner);
    let (mut depth, mut start) = (0, 0);
    for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                let part = inner[start..at].trim();
                if !part.is_empty() {
                    expand(&format!("{prefix}{part}"), paths);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// Returns the module that a path in the module `from` leads to; `None` if that is outside the
/// crate.
fn target<'m, T>(modules: &'m BTreeMap<String, T>, from: &str, path: &str) -> Option<&'m str> {
    let mut place = from.to_owned();
    let mut segments = path.split("::").peekable();
    match *segments.peek()? {
        "crate" => "crate".clone_into(&mut place),
        "self" | "super" => {}
        child if modules.contains_key(&format!("{from}::{child}")) => {}
        _ => return None,
    }
    segments.next_if(|first| matches!(*first, "crate" | "self"));
    while segments.next_if(|next| *next == "super").is_some() {
        place.truncate(place.rfind("::")?);
    }
    for segment in segments {
        let below = format!("{place}::{segment}");
        if !modules.contains_key(&below) {
            break;
        }
        place = below;
    }
    let (place, _) = modules.get_key_value(&place)?;
    Some(place)
}

/// Returns the shortest cycle that a module is in, from the module on.
fn cycle<'m>(
    edges: &BTreeMap<&'m str, BTreeSet<&'m str>>,
    module: &'m str,
) -> Option<Vec<&'m str>> {
    let mut ways = VecDeque::from([vec![module]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for &next in &edges[way[way.len() - 1]] {
            if next == module {
                return Some(way);
            }
            if seen.insert(next) {
                ways.push_back([&way[..], &[next]].concat());
            }
        }
    }
    None
}

/// Returns the cycles among modules, each in words.
fn cycles(modules: &BTreeMap<String, String>) -> Vec<String> {
    let mut edges = BTreeMap::new();
    for (from, text) in modules {
        let found = paths(text);
        let found = found.iter().filter_map(|path| target(modules, from, path));
        let others: BTreeSet<&str> = found.filter(|to| to != from).collect();
        edges.insert(from.as_str(), others);
    }
    let mut told = BTreeSet::new();
    let mut cycles = Vec::new();
    for &module in edges.keys() {
        if !told.contains(module)
            && let Some(way) = cycle(&edges, module)
        {
            cycles.push(format!("{} -> {module}", way.join(" -> ")));
            told.extend(way);
        }
    }
    cycles
}

#[test]
fn the_modules_of_a_crate_form_no_cycle() {
    let mut wrong = Vec::new();
    for name in CRATES {
        let found = cycles(&modules(name));
        wrong.extend(found.iter().map(|cycle| format!("{name}: {cycle}")));
    }
    assert_none("these modules use each other", &wrong);
}

#[test]
fn imports_and_paths_are_edges_and_reexports_comments_and_tests_are_not() {
    let text = "\
//! See [`super::comment`].
mod child;
pub use child::Name;
pub(super) use crate::{
    reexport,
};
use super::{
    a::{B, c as d},
    e,
};
use child::f;
mod inline {
    use super::g;
    use crate::h::i;
}
fn j() {
    // super::comment
    let k: crate::l::M = super::super::n::o(child::p, q::r);
    let text = \"\\
        use two words; \\
        use three\";
}
#[cfg(test)]
mod tests {
    use crate::test;
}
";
    let expected = [
        "super::a::B",
        "super::a::c",
        "super::e",
        "child::f",
        "self::g",
        "crate::h::i",
        "crate::l::M",
        "super::super::n::o",
        "child::p",
        "q::r",
    ];
    assert_eq!(paths(text), expected);
}

#[test]
fn a_cycle_is_found_and_told() {
    let texts = [
        ("crate", "mod a;\nmod d;\nuse a::A;"),
        ("crate::a", "pub use b::B;\nfn f() { self::b::f() }"),
        ("crate::a::b", "use crate::d::D;"),
        ("crate::d", "use super::a::A;\nuse std::fs;"),
    ];
    let texts = texts.map(|(path, text)| (path.to_owned(), text.to_owned()));
    let mut modules = BTreeMap::from(texts);
    let cycle = "crate::a -> crate::a::b -> crate::d -> crate::a";
    assert_eq!(cycles(&modules), [cycle]);
    // A name that is re-exported leads to the file that re-exports it.
    modules.insert("crate::d".to_owned(), "use super::a::b::B;".to_owned());
    assert_eq!(cycles(&modules), ["crate::a::b -> crate::d -> crate::a::b"]);
    modules.insert("crate::d".to_owned(), String::new());
    assert!(cycles(&modules).is_empty());
}
