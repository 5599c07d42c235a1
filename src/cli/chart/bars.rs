//! Charts of bars: a panel for each benchmark, with a bar for each model and the gain over the base
//! model on top; and the same results as a Markdown table.

use std::fmt::Write as _;

use arrow::array::RecordBatch;

use super::columns::{escaped, no_column, numbers, texts};
use crate::failed::Failed;
use ovchat_io::visible::visible_in_place;

/// The score of a model on a benchmark.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    benchmark: String,
    family: Option<String>,
    model: String,
    score: Option<f64>,
    delta: Option<f64>,
    /// The confidence interval of `delta`.
    interval: Option<[f64; 2]>,
    n: Option<f64>,
    items: Option<f64>,
    failures: Option<f64>,
    pairs: Option<f64>,
    judge: Option<String>,
    is_published: bool,
    /// True if the panel has results of other judges.
    is_mixed: bool,
}

impl Scored {
    /// The name of the model with its family, and with the judge if the panel has several.
    fn name(&self) -> String {
        let name = match &self.family {
            Some(family) => format!("{family} {}", self.model),
            None => self.model.clone(),
        };
        match &self.judge {
            Some(judge) if self.is_mixed => format!("{name} (by {judge})"),
            _ => name,
        }
    }

    /// The number of items that the score is a mean of, and of how many if it is not all.
    fn counted(&self) -> Option<String> {
        let n = self.n?;
        Some(match self.items.filter(|items| *items != n) {
            Some(items) => format!("{n} of {items}"),
            None => n.to_string(),
        })
    }
}

/// Returns the results in the rows of a view. Fails if two are of the same benchmark, model and judge.
pub fn results(view: &str, rows: &[RecordBatch]) -> Result<Vec<Scored>, Failed> {
    let needed = |name: &str| texts(rows, name)?.ok_or_else(|| no_column(name));
    let (benchmarks, models) = (needed("benchmark")?, needed("model")?);
    let scores = numbers(rows, "score")?.ok_or_else(|| no_column("score"))?;
    let count = scores.len();
    let optional = |name: &str| Ok::<_, Failed>(numbers(rows, name)?.unwrap_or(vec![None; count]));
    let [deltas, lows, highs] = [
        optional("delta")?,
        optional("delta_low")?,
        optional("delta_high")?,
    ];
    let [ns, items, failures, pairs, published] = [
        optional("n")?,
        optional("items")?,
        optional("failures")?,
        optional("pairs")?,
        optional("is_published")?,
    ];
    let texts = |name: &str| Ok::<_, Failed>(texts(rows, name)?.unwrap_or(vec![None; count]));
    let (families, judges) = (texts("family")?, texts("judge")?);
    let categories = texts("category")?;
    let result = |row: usize| Scored {
        benchmark: {
            let name = benchmarks[row].clone().unwrap_or_default();
            match &categories[row] {
                Some(category) => format!("{name}: {category}"),
                None => name,
            }
        },
        family: families[row].clone().filter(|family| !family.is_empty()),
        model: models[row].clone().unwrap_or_default(),
        score: scores[row],
        delta: deltas[row],
        interval: lows[row].zip(highs[row]).map(|(low, high)| [low, high]),
        n: ns[row],
        items: items[row],
        failures: failures[row],
        pairs: pairs[row],
        judge: judges[row].clone(),
        is_published: published[row].unwrap_or_default() > 0.0,
        is_mixed: false,
    };
    let mut results: Vec<Scored> = (0..count).map(result).collect();
    let mixed = |one: &Scored| {
        let others = results.iter().filter(|other| !other.is_published);
        let mut others = others.filter(|other| other.benchmark == one.benchmark);
        !one.is_published && others.any(|other| other.judge != one.judge)
    };
    let mixed: Vec<bool> = results.iter().map(mixed).collect();
    for (result, is_mixed) in results.iter_mut().zip(mixed) {
        result.is_mixed = is_mixed;
    }
    for (number, one) in results.iter().enumerate() {
        let is_same = |other: &&Scored| {
            (&other.benchmark, other.name(), other.is_published)
                == (&one.benchmark, one.name(), one.is_published)
        };
        if results[..number].iter().any(|other| is_same(&other)) {
            return Err(Failed::Words(format!(
                "view `{view}` has two results of {} for {}: select one, such as those with `metric = \
                 'score'`, or give them different families",
                one.benchmark,
                one.name()
            )));
        }
    }
    Ok(results)
}

/// Fails if results of one benchmark are of different judges, unless that is allowed. Published results
/// are marked instead.
pub fn refuse_mixed_judges(view: &str, results: &[Scored], is_allowed: bool) -> Result<(), Failed> {
    let mut own = results.iter().filter(|result| !result.is_published);
    let mixed = own.find_map(|result| {
        let others = results.iter().filter(|other| !other.is_published);
        let mut others = others.filter(|other| other.benchmark == result.benchmark);
        let other = others.find(|other| other.judge != result.judge)?;
        Some((result, other))
    });
    match mixed {
        Some((one, other)) if !is_allowed => {
            let judge = |result: &Scored| {
                result
                    .judge
                    .clone()
                    .unwrap_or_else(|| "no judge".to_owned())
            };
            Err(Failed::Words(format!(
                "view `{view}`: the results of {} are of different judges, {} ({}) and {} ({}), and cannot be \
                 compared; judge all answers with one, or set `chart: {{ bars: {{ mixed_judges: true }} }}`",
                one.benchmark,
                judge(one),
                one.name(),
                judge(other),
                other.name()
            )))
        }
        _ => Ok(()),
    }
}

/// Returns the distinct values in the order of their first occurrence.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}

/// Formats a score: two digits below 10, where scales such as 0 to 5 are, else one.
fn number(value: f64) -> String {
    if value.abs() < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.1}")
    }
}

/// Formats a gain with its sign, with the digits of its score.
fn gain(delta: f64, score: f64) -> String {
    let digits = if score.abs() < 10.0 { 2 } else { 1 };
    let text = format!("{delta:+.digits$}");
    text.replace('-', "−")
}

/// Returns the results as a Markdown table: a row for each model, a column for each benchmark; and
/// below it the numbers of items, failures and judges.
pub fn table(results: &[Scored]) -> String {
    let cell = |text: &str| {
        let text = visible_in_place(text).replace('|', "\\|");
        text.replace('<', "&lt;").replace(['\n', '\r'], " ")
    };
    let benchmarks = distinct(results.iter().map(|result| result.benchmark.as_str()));
    let models = distinct(
        results
            .iter()
            .map(|result| (result.name(), result.is_published)),
    );
    let mut text = String::from("| Model |");
    let mut rule = String::from("|---|");
    for benchmark in &benchmarks {
        let _ = write!(text, " {} |", cell(benchmark));
        rule.push_str("---|");
    }
    let _ = writeln!(text, "\n{rule}");
    for (model, is_published) in &models {
        let mark = if *is_published { " (published)" } else { "" };
        let _ = write!(text, "| {}{mark} |", cell(model));
        for benchmark in &benchmarks {
            let of = results.iter().find(|result| {
                result.benchmark == *benchmark
                    && result.name() == *model
                    && result.is_published == *is_published
            });
            let shown = of.and_then(|result| {
                let score = result.score?;
                let mut shown = number(score);
                if let Some(delta) = result.delta {
                    let _ = write!(shown, " ({}", gain(delta, score));
                    if let Some([low, high]) = result.interval {
                        let _ = write!(shown, ", {} to {}", gain(low, score), gain(high, score));
                    }
                    shown.push(')');
                }
                Some(shown)
            });
            let _ = write!(text, " {} |", shown.unwrap_or_else(|| "–".to_owned()));
        }
        text.push('\n');
    }
    text.push_str(
        "\nIn brackets: the gain over the base model, and its 95 % confidence interval. A gain is the mean \
         over the items on which both models have a verdict (Compared); a score counts an item without one \
         as the rules of the benchmark say.\n\n\
         | Benchmark | Model | Items | Without a verdict | Compared | Judge |\n|---|---|---|---|---|---|\n",
    );
    let count =
        |count: Option<f64>| count.map_or_else(|| "–".to_owned(), |count| count.to_string());
    for result in results {
        let mark = if result.is_published {
            " (published)"
        } else {
            ""
        };
        let judge = result.judge.as_deref().unwrap_or("–");
        let _ = writeln!(
            text,
            "| {} | {}{mark} | {} | {} | {} | {} |",
            cell(&result.benchmark),
            cell(&result.name()),
            result.counted().unwrap_or_else(|| "–".to_owned()),
            count(result.failures),
            count(result.pairs),
            cell(judge)
        );
    }
    text
}

/// The sizes of a panel, in pixels.
const BAR: f64 = 50.0;
const GAP: f64 = 22.0;
const PLOT: f64 = 190.0;
const LEFT: f64 = 14.0;
const TOP: f64 = 74.0;
const BOTTOM: f64 = 82.0;

/// The largest width of a row of panels, in pixels.
const WIDTH_MAX: f64 = 1180.0;

/// The colors of the first model of a family, of the second, and of all others.
const COLORS: [&str; 3] = ["#a9bdd6", "#266cd2", "#8a6fb8"];

/// Draws the results as an SVG.
pub fn draw(results: &[Scored]) -> String {
    let benchmarks = distinct(results.iter().map(|result| result.benchmark.as_str()));
    let mut panels = Vec::new();
    for benchmark in &benchmarks {
        let own: Vec<&Scored> = results
            .iter()
            .filter(|result| result.benchmark == *benchmark)
            .collect();
        panels.push(panel(benchmark, &own));
    }
    let height = TOP + PLOT + BOTTOM;
    let (mut x, mut y, mut width) = (0.0, 0.0, 0.0_f64);
    let mut body = String::new();
    for (panel_width, panel) in &panels {
        if x > 0.0 && x + panel_width > WIDTH_MAX {
            x = 0.0;
            y += height;
        }
        let _ = write!(
            body,
            "<g transform=\"translate({x:.0} {y:.0})\">{panel}</g>\n"
        );
        x += panel_width;
        width = width.max(x);
    }
    let note = note(results);
    let total = y + height + 16.0 * note.len() as f64 + 8.0;
    for (line, text) in note.iter().enumerate() {
        let _ = write!(
            body,
            "<text x=\"{LEFT}\" y=\"{:.0}\" class=\"small\">{}</text>\n",
            y + height + 12.0 + 16.0 * line as f64,
            escaped(text)
        );
    }
    let width = width.max(620.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{total:.0}\" viewBox=\"0 0 {width:.0} {total:.0}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#3c4048\">\n\
         <style>.small {{ font-size: 11px; fill: #6a7078 }} .title {{ font-size: 15px }} .gain {{ font-weight: bold }}</style>\n\
         <defs><pattern id=\"hatch\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">\
         <rect width=\"3.5\" height=\"6\" fill=\"#ffffff\" fill-opacity=\"0.8\"/></pattern></defs>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

/// Returns the explanation below the panels.
fn note(results: &[Scored]) -> Vec<String> {
    let mut note = Vec::new();
    if results.iter().any(|result| result.interval.is_some()) {
        note.push(
            "Above a bar: the score, and the gain over the base model with its 95 % confidence interval \
             (error bar; none below ten images)."
                .to_owned(),
        );
    }
    let is_partial = |result: &Scored| result.failures > Some(0.0) && result.delta.is_some();
    if results.iter().any(is_partial) {
        note.push(
            "A gain is the mean over the items on which both models have a verdict; a score counts failed \
             items as the rules of the benchmark say."
                .to_owned(),
        );
    }
    let judges = distinct(
        results
            .iter()
            .filter(|result| !result.is_published)
            .filter_map(|result| result.judge.as_deref()),
    );
    if !judges.is_empty() {
        note.push(format!("Judges: {}.", judges.join(", ")));
    }
    if results.iter().any(|result| result.is_published) {
        note.push("Hatched: published results, of other judges.".to_owned());
    }
    note
}

/// Returns the width of a panel, and its elements.
fn panel(benchmark: &str, results: &[&Scored]) -> (f64, String) {
    let families = distinct(
        results
            .iter()
            .map(|result| (&result.family, result.is_published)),
    );
    let top = |result: &&&Scored| {
        let half = result
            .interval
            .map_or(0.0, |[low, high]| (high - low) / 2.0);
        result.score.unwrap_or(0.0) + half
    };
    let most = results
        .iter()
        .map(|result| top(&result))
        .fold(0.0, f64::max);
    let scale = if most > 0.0 { PLOT / most } else { 0.0 };
    let floor = TOP + PLOT;
    let mut bars = String::new();
    let mut x = LEFT + GAP / 2.0;
    for (family, is_published) in &families {
        let start = x;
        let own = results
            .iter()
            .filter(|result| result.family == **family && result.is_published == *is_published);
        for (number, result) in own.enumerate() {
            // A model without a family beside families, such as a published one of others.
            let is_other = family.is_none() && families.iter().any(|(family, _)| family.is_some());
            let color = match number {
                _ if is_other => COLORS[2],
                number => COLORS[number.min(COLORS.len() - 1)],
            };
            bar(&mut bars, result, color, [x, floor, scale]);
            x += BAR + 4.0;
        }
        if let Some(family) = family {
            let mark = if *is_published { "*" } else { "" };
            let _ = write!(
                bars,
                "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{}{mark}</text>",
                (start + x - 4.0) / 2.0,
                floor + 66.0,
                escaped(family)
            );
        }
        x += GAP;
    }
    let width = (x - GAP / 2.0 + LEFT).max(60.0 + 8.0 * benchmark.chars().count() as f64);
    let frame = format!(
        "<text x=\"{LEFT}\" y=\"24\" class=\"title\">{}</text>\
         <line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{floor:.0}\" y2=\"{floor:.0}\" stroke=\"#c8ccd2\"/>",
        escaped(benchmark),
        width - LEFT
    );
    (width, frame + &bars)
}

/// Adds a bar at a place: its left edge, the floor, and pixels a point.
fn bar(bars: &mut String, result: &Scored, color: &str, [x, floor, scale]: [f64; 3]) {
    let middle = x + BAR / 2.0;
    let score = result.score.unwrap_or(0.0);
    let height = (score * scale).max(0.0);
    let y = floor - height;
    let judge = result.judge.as_deref().unwrap_or("unknown");
    let title = format!("{}: {} (judge: {judge})", result.name(), number(score));
    let _ = write!(
        bars,
        "<g><title>{}</title><rect x=\"{x:.0}\" y=\"{y:.1}\" width=\"{BAR}\" height=\"{height:.1}\" fill=\"{color}\"/>",
        escaped(&title)
    );
    if result.is_published {
        let _ = write!(
            bars,
            "<rect x=\"{x:.0}\" y=\"{y:.1}\" width=\"{BAR}\" height=\"{height:.1}\" fill=\"url(#hatch)\" stroke=\"{color}\"/>"
        );
    }
    let mut above = y;
    if let (Some([low, high]), Some(delta)) = (result.interval, result.delta) {
        let [from, to] = [low, high].map(|end| floor - (score + end - delta) * scale);
        above = above.min(to);
        let left = middle - 5.0;
        let path =
            format!("M{middle:.1} {from:.1}V{to:.1}M{left:.1} {from:.1}h10M{left:.1} {to:.1}h10");
        // A light rim sets the error bar off from a dark bar.
        for (color, width) in [("#ffffff", 3), ("#3c4048", 1)] {
            let _ = write!(
                bars,
                "<path d=\"{path}\" stroke=\"{color}\" stroke-width=\"{width}\" fill=\"none\"/>"
            );
        }
    }
    let shown = result.score.map_or_else(|| "–".to_owned(), number);
    let _ = write!(
        bars,
        "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{shown}</text>",
        above - 5.0
    );
    if let Some(delta) = result.delta {
        let _ = write!(
            bars,
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" class=\"gain\">{}</text>",
            above - 19.0,
            gain(delta, score)
        );
    }
    let items = result.counted();
    let items = items.map(|counted| format!("n {}", counted.replace(" of ", "/")));
    let failures = result.failures.filter(|failures| *failures > 0.0);
    let failures = failures.map(|failures| format!("{failures} failed"));
    let below = [items, failures].into_iter().flatten();
    for (number, text) in below.enumerate() {
        let y = floor + 32.0 + 14.0 * number as f64;
        let _ = write!(
            bars,
            "<text x=\"{middle:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" class=\"small\">{text}</text>"
        );
    }
    let _ = write!(
        bars,
        "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></g>",
        floor + 16.0,
        escaped(&result.model)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(model: &str, score: f64, delta: Option<f64>) -> Scored {
        Scored {
            benchmark: "Wild|Vision".to_owned(),
            family: Some("7b".to_owned()),
            model: model.to_owned(),
            score: Some(score),
            delta,
            interval: delta.map(|delta| [delta - 2.0, delta + 2.0]),
            n: Some(500.0),
            items: Some(500.0),
            failures: Some(3.0),
            pairs: delta.map(|_| 497.0),
            judge: Some("gpt".to_owned()),
            is_published: false,
            is_mixed: false,
        }
    }

    fn published() -> Scored {
        Scored {
            family: None,
            is_published: true,
            judge: None,
            interval: None,
            ..scored("GPT-4V <b>", 79.8, None)
        }
    }

    #[test]
    fn bars_have_their_gains_and_error_bars_and_published_ones_are_hatched() {
        let results = [
            scored("base", 54.0, None),
            scored("chat", 67.3, Some(13.3)),
            published(),
        ];
        let svg = draw(&results);
        for part in [
            ">54.0<",
            ">67.3<",
            ">+13.3<",
            ">n 500<",
            ">3 failed<",
            "Wild|Vision",
            "url(#hatch)",
            ">7b<",
        ] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert_eq!(svg.matches("stroke=\"#3c4048\" stroke-width").count(), 1);
        assert!(
            svg.contains("GPT-4V &lt;b&gt;") && !svg.contains("<b>"),
            "{svg}"
        );
        let text = table(&results);
        assert!(
            text.contains("| 7b chat | 67.3 (+13.3, +11.3 to +15.3) |"),
            "{text}"
        );
        assert!(text.contains("| Model | Wild\\|Vision |"), "{text}");
        assert!(
            text.contains("| GPT-4V &lt;b> (published) | 79.8 |"),
            "{text}"
        );
        assert!(
            text.contains("| Wild\\|Vision | 7b chat | 500 | 3 | 497 | gpt |"),
            "{text}"
        );
    }

    #[test]
    fn results_of_different_judges_are_refused_unless_allowed() {
        let other = Scored {
            judge: Some("critic".to_owned()),
            ..scored("chat", 60.0, None)
        };
        let results = [scored("base", 54.0, None), other, published()];
        let Err(Failed::Words(told)) = refuse_mixed_judges("results", &results, false) else {
            panic!("two judges")
        };
        assert!(
            told.contains("gpt (7b base) and critic (7b chat)"),
            "{told}"
        );
        assert!(refuse_mixed_judges("results", &results, true).is_ok());
        let same = [scored("base", 54.0, None), published()];
        assert!(refuse_mixed_judges("results", &same, false).is_ok());
    }

    #[test]
    fn small_scores_have_two_digits_and_missing_ones_a_dash() {
        let low = Scored {
            score: Some(3.87),
            delta: Some(-0.12),
            interval: None,
            ..scored("chat", 0.0, None)
        };
        let none = Scored {
            score: None,
            ..scored("base", 0.0, None)
        };
        let text = table(&[none, low]);
        assert!(
            text.contains("| 7b base | – |") && text.contains("| 3.87 (−0.12) |"),
            "{text}"
        );
    }
}
