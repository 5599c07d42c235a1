//! The forecast of a run, as `pipeline plan` prints it.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::progress::duration;
use ovchat_models::checkpoint::size_in_words as size;
use ovchat_pipeline::config::Plan;
use ovchat_pipeline::run::{Action, Estimate, Forecast, Reason};

/// Formats the forecast as text, one line per table and round.
pub fn render(plan: &Plan, folder: &Path, forecasts: &[Forecast]) -> String {
    let mut text = String::new();
    let there = forecasts.iter().filter(|one| is_there(&one.action)).count();
    let (all, folder) = (forecasts.len(), folder.display());
    writeln!(text, "\n{folder}: {there} of {all} tables up to date").expect(ANY_TEXT);
    if there == all {
        return text;
    }
    let line = |text: &mut String, cells: [&str; 7]| {
        let [table, round, plan, rows, time, disk, why] = cells;
        let line =
            format!("  {table:<22} {round:>5}  {plan:<7} {rows:>9} {time:>12} {disk:>9}  {why}");
        writeln!(text, "{}", line.trim_end()).expect(ANY_TEXT);
    };
    line(
        &mut text,
        ["table", "round", "plan", "rows", "time", "disk", "why"],
    );
    let mut total = Estimate {
        rows: None,
        seconds: Some(0.0),
        bytes: Some(0),
    };
    let mut unknown = 0;
    for forecast in forecasts {
        let Forecast {
            table,
            round,
            action,
            estimate,
        } = forecast;
        let round = round.map_or_else(|| "-".to_owned(), |round| round.to_string());
        let rows = estimate
            .rows
            .map_or_else(|| "?".to_owned(), |rows| rows.to_string());
        let [mut time, mut disk] = [String::new(), String::new()];
        if !is_there(action) {
            time = estimate.seconds.map_or_else(|| "?".to_owned(), duration);
            disk = estimate.bytes.map_or_else(|| "?".to_owned(), size);
            unknown += u32::from(estimate.seconds.is_none());
            total.seconds = Some(total.seconds.unwrap_or(0.0) + estimate.seconds.unwrap_or(0.0));
            total.bytes = Some(total.bytes.unwrap_or(0) + estimate.bytes.unwrap_or(0));
        }
        let why = why(plan, forecast);
        let cells = [
            table.as_str(),
            &round,
            word(action),
            &rows,
            &time,
            &disk,
            &why,
        ];
        line(&mut text, cells);
    }
    let to_make = all - there;
    let seconds = duration(total.seconds.unwrap_or(0.0));
    let disk = size(total.bytes.unwrap_or(0));
    let tables = if to_make == 1 { "table" } else { "tables" };
    write!(text, "  to build: {to_make} {tables}").expect(ANY_TEXT);
    match to_make as u32 - unknown {
        0 => writeln!(
            text,
            "; no estimate of the time yet: no such rows have been computed on this machine"
        ),
        _ if unknown == 0 => writeln!(
            text,
            ", about {seconds} and {disk}, estimated from earlier runs on this machine"
        ),
        _ => writeln!(
            text,
            ", about {seconds} and {disk}, estimated from earlier runs on this machine, plus {unknown} \
             without an estimate"
        ),
    }
    .expect(ANY_TEXT);
    text
}

const ANY_TEXT: &str = "writing to a string does not fail";

fn is_there(action: &Action) -> bool {
    matches!(action, Action::Reuse | Action::Return)
}

fn word(action: &Action) -> &'static str {
    match action {
        Action::Reuse => "reuse",
        Action::Return => "return",
        Action::Resume { .. } => "go on",
        Action::Make { .. } => "make",
    }
}

/// Formats the reasons as a message, each setting with its line.
pub fn why(plan: &Plan, forecast: &Forecast) -> String {
    match &forecast.action {
        Action::Reuse => String::new(),
        Action::Return => "an archived version matches".to_owned(),
        Action::Resume { rows } => format!("{rows} rows exist"),
        Action::Make { reasons, by_row } => {
            let mut words: Vec<String> = reasons
                .iter()
                .map(|reason| reason.in_words(plan, &forecast.table))
                .collect();
            if *by_row && !words.is_empty() {
                words.push("rows with unchanged inputs are reused".to_owned());
            }
            words.join("; ")
        }
    }
}

/// Returns the forecast as JSON.
pub fn to_json(plan: &Plan, forecasts: &[Forecast]) -> Value {
    let one = |forecast: &Forecast| {
        let reasons: Vec<Value> = match &forecast.action {
            Action::Make { reasons, .. } => reasons
                .iter()
                .map(|reason| {
                    let text = plan.secrets.hide(&reason.to_string());
                    let mut json = json!({ "text": text });
                    if let Some(place) = reason.place(plan, &forecast.table) {
                        json["place"] = json!(place.to_string());
                    }
                    if let Reason::Setting { name, before, now }
                    | Reason::Top { name, before, now } = reason
                    {
                        json["setting"] = json!(name);
                        json["before"] = before.clone();
                        json["now"] = now.clone();
                    }
                    json
                })
                .collect(),
            _ => Vec::new(),
        };
        json!({
            "table": forecast.table.as_str(),
            "round": forecast.round,
            "plan": word(&forecast.action).replace(' ', "_"),
            "reasons": reasons,
            "rows": forecast.estimate.rows,
            "seconds": forecast.estimate.seconds,
            "bytes": forecast.estimate.bytes,
        })
    };
    forecasts.iter().map(one).collect()
}
