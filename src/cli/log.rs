//! `pipeline run --log json`: what a run does, a JSON object a line, for schedulers and log collectors.
//!
//! Every line has `time` (UTC, RFC 3339) and `event`: `begin`, `start` and `progress` and `finished` of a
//! table, `reused`, `note`, and last `done`, `stopped`, `failed` or `refused`, with the exit code.

use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::run::{Report, Start, Unit};
use crate::stages::TableName;

/// Between two lines about the progress of one table.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Writes a run's events to stderr.
pub struct JsonLog {
    current: Option<Current>,
}

struct Current {
    table: String,
    round: Option<u32>,
    unit: &'static str,
    total: Option<u64>,
    before: u64,
    begun: Instant,
    last_line: Instant,
}

impl JsonLog {
    pub fn new() -> Self {
        Self { current: None }
    }
}

/// Writes one event. A log that nobody reads any more is no reason to stop a run.
pub fn write(event: &str, mut fields: Value) {
    let mut line = json!({ "time": now(), "event": event });
    if let (Some(line), Some(fields)) = (line.as_object_mut(), fields.as_object_mut()) {
        line.append(fields);
    }
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// The time, as in `2026-11-26T03:57:33Z`.
fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = seconds.map_or(0, |since| since.as_secs().cast_signed());
    let date = arrow::temporal_conversions::timestamp_s_to_datetime(seconds);
    date.map_or_else(String::new, |date| {
        date.format("%Y-%m-%dT%H:%M:%SZ").to_string()
    })
}

impl Report for JsonLog {
    fn start(&mut self, start: Start<'_>) {
        let now = Instant::now();
        let unit = match start.unit {
            Unit::Rows => "rows",
            Unit::Steps => "steps",
        };
        let (table, round) = (start.table.to_string(), start.round);
        write(
            "start",
            json!({ "table": table, "round": round, "unit": unit, "total": start.total, "done": start.done }),
        );
        self.current = Some(Current {
            table,
            round,
            unit,
            total: start.total,
            before: start.done,
            begun: now,
            last_line: now,
        });
    }

    fn progress(&mut self, done: u64) {
        let Some(current) = &mut self.current else {
            return;
        };
        if current.last_line.elapsed() < LINE_EVERY {
            return;
        }
        current.last_line = Instant::now();
        let rate =
            done.saturating_sub(current.before) as f64 / current.begun.elapsed().as_secs_f64();
        let left = current
            .total
            .map(|total| total.saturating_sub(done) as f64 / rate);
        write(
            "progress",
            json!({
                "table": current.table, "round": current.round, "unit": current.unit,
                "total": current.total, "done": done, "per_second": rate,
                "seconds_left": left.filter(|left| left.is_finite()),
            }),
        );
    }

    fn finished(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        rows: u64,
        faults: u64,
        dropped: u64,
    ) {
        let seconds = self
            .current
            .take()
            .map(|current| current.begun.elapsed().as_secs_f64());
        write(
            "finished",
            json!({
                "table": table.as_str(), "round": round, "rows": rows, "faults": faults,
                "dropped": dropped, "seconds": seconds,
            }),
        );
    }

    fn reused(&mut self, table: &TableName, round: Option<u32>, rows: u64) {
        write(
            "reused",
            json!({ "table": table.as_str(), "round": round, "rows": rows }),
        );
    }

    fn note(&mut self, text: &str) {
        write("note", json!({ "text": text }));
    }
}
