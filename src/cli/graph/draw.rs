//! Drawing of a graph: a box for each table, from left to right in the order of the data, as SVG; and
//! the same as a Mermaid flowchart.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::{Graph, GraphTable, State};
use crate::chart::escaped;
use crate::progress::duration;
use ovchat_io::visible::visible;

/// The size of a box and the gaps between boxes, in pixels.
const BOX: (usize, usize) = (220, 74);
const GAP: (usize, usize) = (50, 18);
const MARGIN: usize = 14;

/// The colors, for light and for dark pages.
const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#1d2330}.name{font-weight:600;font-size:13px}.small{fill:#566074;font-size:11px}\
rect{fill:#fff;stroke:#aab2c0}.done{stroke:#2f7d4f}.running{stroke:#1f5fbf;stroke-width:2}.begun{stroke:#8a6d00}\
.stale{stroke:#b3521b;stroke-dasharray:5 3}.none{stroke-dasharray:2 3}path{fill:none;stroke:#8a94a6}\
@media(prefers-color-scheme:dark){text{fill:#e6e9f0}.small{fill:#a9b2c3}rect{fill:#1b2130;stroke:#566074}\
.done{stroke:#5bbf86}.running{stroke:#6aa5ff}.begun{stroke:#d9b44a}.stale{stroke:#ef9a6b}path{stroke:#6d7789}}";

/// All rounds of a table.
struct Node<'g> {
    name: &'g str,
    stage_type: &'g str,
    inputs: Vec<&'g str>,
    rounds: Vec<&'g GraphTable>,
}

impl Node<'_> {
    /// Returns the lines below the name.
    fn lines(&self) -> [String; 3] {
        let rounds: Vec<u32> = self.rounds.iter().filter_map(|one| one.round).collect();
        let of_rounds = match (rounds.iter().min(), rounds.iter().max()) {
            (Some(first), Some(last)) if first < last => format!("rounds {first}–{last}"),
            (Some(round), _) => format!("round {round}"),
            _ => "once".to_owned(),
        };
        let rows: u64 = self.rounds.iter().filter_map(|one| one.rows).sum();
        let seconds: f64 = self.rounds.iter().filter_map(|one| one.seconds).sum();
        let time = if seconds > 0.0 {
            format!(" · {}", duration(seconds))
        } else {
            String::new()
        };
        [
            self.stage_type.to_owned(),
            format!("{of_rounds} · {rows} rows{time}"),
            self.status(),
        ]
    }

    fn status(&self) -> String {
        let count =
            |test: &dyn Fn(&GraphTable) -> bool| self.rounds.iter().filter(|one| test(one)).count();
        let built = count(&|one| one.action.starts_with("would"));
        let all = self.rounds.len();
        if built > 0 && built == count(&|one| one.state == State::NotBegun) {
            return format!("{built} of {all} to build");
        }
        if built > 0 {
            return format!("{built} of {all} would be built again");
        }
        match self.state() {
            State::Done => "up to date",
            State::Running => "being built",
            State::Begun => "begun",
            State::Stale => "its inputs changed",
            State::NotBegun => "not begun",
        }
        .to_owned()
    }

    /// Returns the state that matters most among the rounds.
    fn state(&self) -> State {
        let has = |state| self.rounds.iter().any(|one| one.state == state);
        let states = [State::Running, State::Stale, State::Begun, State::NotBegun];
        let found = states.into_iter().find(|state| has(*state));
        found.unwrap_or(State::Done)
    }

    fn class(&self) -> &'static str {
        match self.state() {
            State::Done => "done",
            State::Running => "running",
            State::Begun => "begun",
            State::Stale => "stale",
            State::NotBegun => "none",
        }
    }
}

impl Graph {
    fn nodes(&self) -> Vec<Node<'_>> {
        let mut nodes: Vec<Node<'_>> = Vec::new();
        for table in &self.tables {
            let at = nodes.iter().position(|node| node.name == table.table);
            let at = at.unwrap_or_else(|| {
                nodes.push(Node {
                    name: &table.table,
                    stage_type: &table.stage_type,
                    inputs: Vec::new(),
                    rounds: Vec::new(),
                });
                nodes.len() - 1
            });
            let node = &mut nodes[at];
            node.rounds.push(table);
            for input in &table.inputs {
                if !node.inputs.contains(&input.as_str()) {
                    node.inputs.push(input);
                }
            }
        }
        nodes
    }

    /// Returns the graph as an SVG.
    pub fn svg(&self) -> String {
        let nodes = self.nodes();
        let places = places(&nodes);
        let corner = |(column, row): (usize, usize)| {
            (
                MARGIN + column * (BOX.0 + GAP.0),
                MARGIN + row * (BOX.1 + GAP.1),
            )
        };
        let columns = places.values().map(|place| place.0 + 1).max().unwrap_or(1);
        let rows = places.values().map(|place| place.1 + 1).max().unwrap_or(1);
        let (width, height) = corner((columns, rows));
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             role=\"img\" aria-label=\"the tables of the pipeline\"><style>{STYLE}</style>\n"
        );
        for node in &nodes {
            let (x, y) = corner(places[node.name]);
            for input in &node.inputs {
                let Some(from) = places.get(input) else {
                    continue;
                };
                let (from_x, from_y) = corner(*from);
                let (x1, y1, y2) = (from_x + BOX.0, from_y + BOX.1 / 2, y + BOX.1 / 2);
                let half = (GAP.0 / 2).max(x.saturating_sub(x1) / 2);
                writeln!(
                    svg,
                    "<path d=\"M{x1} {y1}C{} {y1} {} {y2} {x} {y2}\"/>",
                    x1 + half,
                    x.saturating_sub(half)
                )
                .expect("a string grows");
            }
        }
        for node in &nodes {
            let (x, y) = corner(places[node.name]);
            let text = |text: &str| escaped(&shortened(text));
            let [stage_type, rows, status] = node.lines();
            writeln!(
                svg,
                "<g><rect class=\"{}\" x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" rx=\"6\"/>\
                 <text class=\"name\" x=\"{tx}\" y=\"{}\">{}</text><text class=\"small\" x=\"{tx}\" y=\"{}\">{}</text>\
                 <text class=\"small\" x=\"{tx}\" y=\"{}\">{}</text><text class=\"small\" x=\"{tx}\" y=\"{}\">{}</text></g>",
                node.class(),
                BOX.0,
                BOX.1,
                y + 18,
                text(node.name),
                y + 34,
                text(&stage_type),
                y + 49,
                text(&rows),
                y + 64,
                text(&status),
                tx = x + 9,
            )
            .expect("a string grows");
        }
        svg.push_str("</svg>");
        svg
    }

    /// Returns the graph as a Mermaid flowchart.
    pub fn mermaid(&self) -> String {
        let nodes = self.nodes();
        let number: HashMap<&str, usize> = nodes
            .iter()
            .enumerate()
            .map(|(at, node)| (node.name, at))
            .collect();
        let mut text = "flowchart LR".to_owned();
        for (at, node) in nodes.iter().enumerate() {
            let [stage_type, rows, status] = node.lines();
            let label =
                [node.name, &stage_type, &rows, &status].map(|line| escaped(&visible(line)));
            write!(text, "\n  t{at}[\"{}\"]", label.join("<br>")).expect("a string grows");
        }
        for (at, node) in nodes.iter().enumerate() {
            for input in node.inputs.iter().filter_map(|input| number.get(input)) {
                write!(text, "\n  t{input} --> t{at}").expect("a string grows");
            }
        }
        text
    }
}

/// Returns the column and the row of each box: a table is right of all that it is made from.
fn places<'g>(nodes: &[Node<'g>]) -> HashMap<&'g str, (usize, usize)> {
    let mut places: HashMap<&str, (usize, usize)> = HashMap::new();
    // Tables come after their inputs.
    for node in nodes {
        let inputs = node.inputs.iter().filter_map(|input| places.get(input));
        let column = inputs
            .clone()
            .map(|(column, _)| column + 1)
            .max()
            .unwrap_or(0);
        // Beside its nearest input, or below.
        let nearest = inputs.max_by_key(|(column, _)| *column);
        let is_taken = |row: &usize| places.values().any(|place| *place == (column, *row));
        let mut rows = nearest.map_or(0, |(_, row)| *row)..;
        let row = rows.find(|row| !is_taken(row)).expect("endless rows");
        places.insert(node.name, (column, row));
    }
    places
}

/// Returns a text that fits into a box.
fn shortened(text: &str) -> String {
    const MOST: usize = 36;
    let text = visible(text);
    if text.chars().count() <= MOST {
        return text.into_owned();
    }
    let start: String = text.chars().take(MOST - 1).collect();
    format!("{start}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, round: Option<u32>, inputs: &[&str], state: State) -> GraphTable {
        GraphTable {
            table: name.to_owned(),
            round,
            stage_type: "sql".to_owned(),
            inputs: inputs.iter().map(ToString::to_string).collect(),
            rows: Some(7),
            seconds: None,
            state,
            action: String::new(),
            reasons: Vec::new(),
        }
    }

    #[test]
    fn each_table_is_one_box_behind_its_inputs() {
        let graph = Graph {
            tables: vec![
                table("prompts", None, &[], State::Done),
                table("heldout", None, &[], State::Done),
                table("a<b", Some(1), &["prompts"], State::Done),
                table("a<b", Some(2), &["prompts"], State::Stale),
                table("pairs", Some(1), &["a<b", "prompts"], State::NotBegun),
            ],
        };
        let places = places(&graph.nodes());
        assert_eq!(places["prompts"], (0, 0));
        assert_eq!(places["heldout"], (0, 1));
        assert_eq!((places["a<b"], places["pairs"]), ((1, 0), (2, 0)));
        let svg = graph.svg();
        assert_eq!(svg.matches("<rect").count(), 4);
        assert_eq!(svg.matches("<path").count(), 3);
        assert!(
            svg.contains("a&lt;b") && svg.contains("rounds 1–2 · 14 rows"),
            "{svg}"
        );
        assert!(
            svg.contains("its inputs changed") && svg.contains("not begun"),
            "{svg}"
        );
        let mermaid = graph.mermaid();
        assert!(
            mermaid.contains("t0 --> t2") && mermaid.contains("t2 --> t3"),
            "{mermaid}"
        );
    }
}
