//! `pipeline run --log json`: the events of a run as JSON Lines on stderr, for schedulers and log
//! collectors.
//!
//! Nothing else is written to stderr then: command line errors and panics are events, too. Every
//! line has `time` (UTC, RFC 3339) and `event`: `begin`; `start`, `progress` and `finished` of a
//! table; `reused`; `note`; and last `done`, `stopped`, `waiting`, `failed` or `refused`, with the
//! exit code. `progress` and `finished` have `per_second` and `rows_per_second`; for a training
//! also the `loss` and `accuracy` of its last step, for rewards their mean so far, `mean_reward`.

use std::ffi::OsString;
use std::io::{Stderr, Write};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::failed::Failed;
use ovchat_io::visible::visible;
use ovchat_pipeline::config::{Diagnostic, LoadError};
use ovchat_pipeline::run::{Figures, Report, Start, Unit};
use ovchat_pipeline::stages::TableName;

/// The interval between progress lines of a table.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A report that writes a run's events.
pub struct JsonLog<W: Write> {
    out: W,
    /// The interval between progress lines of a table.
    every: Duration,
    current: Option<Current>,
}

struct Current {
    table: String,
    round: Option<u32>,
    unit: Unit,
    total: Option<u64>,
    before: u64,
    done: u64,
    figures: Figures,
    begun: Instant,
    last_line: Instant,
}

impl JsonLog<Stderr> {
    pub fn new() -> Self {
        Self::to(std::io::stderr(), LINE_EVERY)
    }
}

/// Writes one event to stderr.
pub fn write(event: &str, fields: Value) {
    write_to(&mut std::io::stderr(), event, fields);
}

/// Writes one event. A closed stderr is no reason to stop a run.
fn write_to(out: &mut impl Write, event: &str, mut fields: Value) {
    let mut line = json!({ "time": now(), "event": event });
    if let (Some(line), Some(fields)) = (line.as_object_mut(), fields.as_object_mut()) {
        line.append(fields);
    }
    // One write, so that lines are not interleaved.
    let line = format!("{}\n", visible(&line.to_string()));
    drop(out.write_all(line.as_bytes()));
}

/// Writes the last event of a failed run, and returns the remaining failure: its exit code.
pub fn end(failed: &Failed) -> Failed {
    let code = failed.code();
    match failed {
        // The event has already been written, with more detail.
        Failed::Code(_) => {}
        Failed::Refused(LoadError::Refused(diagnostics)) => {
            let list: Vec<_> = diagnostics.0.iter().map(Diagnostic::to_json).collect();
            write("refused", json!({ "code": code, "complaints": list }));
        }
        Failed::Refused(_) | Failed::Usage(_) => {
            write(
                "refused",
                json!({ "code": code, "message": failed.to_string() }),
            );
        }
        _ => write(
            "failed",
            json!({ "code": code, "message": failed.to_string() }),
        ),
    }
    Failed::Code(code)
}

/// Writes a command line error as an event.
pub fn wrong_arguments(error: &clap::Error) {
    let message = error.to_string();
    let message = message.trim().trim_start_matches("error: ");
    write(
        "refused",
        json!({ "code": error.exit_code(), "message": message }),
    );
}

/// Returns true if the arguments, valid or not, contain `--log json`.
pub fn is_asked_for(arguments: impl IntoIterator<Item = OsString>) -> bool {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let pair = |pair: &[OsString]| pair[0] == "--log" && pair[1] == "json";
    arguments.iter().any(|argument| argument == "--log=json") || arguments.windows(2).any(pair)
}

/// Installs a panic hook that writes panics as events. The exit code stays 101.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let message = format!("internal error, please report it: {panic}");
        write("failed", json!({ "code": 101, "message": message }));
    }));
}

/// Returns the current time, like `2026-11-26T03:57:33Z`.
fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = seconds.map_or(0, |since| since.as_secs().cast_signed());
    let date = arrow::temporal_conversions::timestamp_s_to_datetime(seconds);
    date.map_or_else(String::new, |date| {
        date.format("%Y-%m-%dT%H:%M:%SZ").to_string()
    })
}

impl<W: Write> JsonLog<W> {
    fn to(out: W, every: Duration) -> Self {
        Self {
            out,
            every,
            current: None,
        }
    }
}

impl Current {
    /// Returns the rows or steps per second, and the last loss, accuracy and mean reward.
    fn measures(&self) -> Value {
        let seconds = self.begun.elapsed().as_secs_f64();
        let done = self.done.saturating_sub(self.before);
        let per_second = |count: u64| (count > 0).then(|| count as f64 / seconds);
        let rows = match self.unit {
            Unit::Rows => Some(done),
            Unit::Steps => self.figures.rows,
        };
        json!({
            "per_second": per_second(done),
            "rows_per_second": rows.and_then(per_second),
            "loss": self.figures.loss,
            "accuracy": self.figures.accuracy,
            "mean_reward": self.figures.mean_reward,
        })
    }
}

impl<W: Write> Report for JsonLog<W> {
    fn start(&mut self, start: Start<'_>) {
        let now = Instant::now();
        let (table, round) = (start.table.to_string(), start.round);
        write_to(
            &mut self.out,
            "start",
            json!({
                "table": table, "round": round, "unit": word(start.unit), "total": start.total,
                "done": start.done,
            }),
        );
        self.current = Some(Current {
            table,
            round,
            unit: start.unit,
            total: start.total,
            before: start.done,
            done: start.done,
            figures: Figures::default(),
            begun: now,
            last_line: now,
        });
    }

    fn figures(&mut self, figures: &Figures) {
        if let Some(current) = &mut self.current {
            current.figures = *figures;
        }
    }

    fn progress(&mut self, done: u64) {
        let Some(current) = &mut self.current else {
            return;
        };
        current.done = done;
        if current.last_line.elapsed() < self.every {
            return;
        }
        current.last_line = Instant::now();
        let rate =
            done.saturating_sub(current.before) as f64 / current.begun.elapsed().as_secs_f64();
        let left = current
            .total
            .map(|total| total.saturating_sub(done) as f64 / rate);
        let mut fields = json!({
            "table": current.table, "round": current.round, "unit": word(current.unit),
            "total": current.total, "done": done,
            "seconds_left": left.filter(|left| left.is_finite()),
        });
        append(&mut fields, current.measures());
        write_to(&mut self.out, "progress", fields);
    }

    fn finished(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        rows: u64,
        faults: u64,
        dropped: u64,
    ) {
        let current = self.current.take();
        let seconds = current
            .as_ref()
            .map(|current| current.begun.elapsed().as_secs_f64());
        let mut fields = json!({
            "table": table.as_str(), "round": round, "rows": rows, "faults": faults,
            "dropped": dropped, "seconds": seconds,
        });
        if let Some(current) = current {
            append(&mut fields, current.measures());
        }
        write_to(&mut self.out, "finished", fields);
    }

    fn reused(&mut self, table: &TableName, round: Option<u32>, rows: u64) {
        let fields = json!({ "table": table.as_str(), "round": round, "rows": rows });
        write_to(&mut self.out, "reused", fields);
    }

    fn note(&mut self, text: &str) {
        write_to(&mut self.out, "note", json!({ "text": text }));
    }
}

fn word(unit: Unit) -> &'static str {
    match unit {
        Unit::Rows => "rows",
        Unit::Steps => "steps",
    }
}

fn append(fields: &mut Value, mut more: Value) {
    if let (Some(fields), Some(more)) = (fields.as_object_mut(), more.as_object_mut()) {
        fields.append(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_has_the_last_figures_and_the_rate_in_rows() {
        let table = TableName::try_from("steps".to_owned()).unwrap();
        let mut log = JsonLog::to(Vec::new(), Duration::ZERO);
        log.start(Start {
            table: &table,
            round: Some(2),
            unit: Unit::Steps,
            total: Some(9),
            done: 1,
        });
        log.figures(&Figures {
            loss: Some(0.5),
            accuracy: Some(0.75),
            mean_reward: None,
            rows: Some(8),
        });
        log.progress(2);
        log.finished(&table, Some(2), 9, 0, 0);
        let text = String::from_utf8(log.out).unwrap();
        let events: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        for (event, name) in events[1..].iter().zip(["progress", "finished"]) {
            assert_eq!(event["event"], name);
            assert_eq!(event["loss"], 0.5);
            assert_eq!(event["accuracy"], 0.75);
            assert_eq!(event["mean_reward"], Value::Null);
            let rate = |name: &str| event[name].as_f64().unwrap();
            let rows_a_step = rate("rows_per_second") / rate("per_second");
            assert!((rows_a_step - 8.0).abs() < 1e-9, "{event}");
        }
    }

    #[test]
    fn the_log_is_asked_for_in_two_spellings() {
        let asked = |line: &str| is_asked_for(line.split(' ').map(OsString::from));
        assert!(asked("pipeline run --log json --no-such-flag"));
        assert!(asked("pipeline run p.yaml --log=json"));
        assert!(!asked("pipeline run p.yaml --log text"));
        assert!(!asked("pipeline check p.yaml --format json"));
    }
}
