//! Progress output: a bar on a terminal, plain lines elsewhere.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use ovchat_io::visible::visible;
use ovchat_pipeline::run::{Report, Start, Unit, titled};
use ovchat_pipeline::stages::TableName;

/// The interval between lines about a table, without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// A report that shows a run's progress on stderr.
pub struct Progress {
    is_terminal: bool,
    current: Option<Current>,
}

struct Current {
    title: String,
    unit: &'static str,
    total: Option<u64>,
    /// The number done by an earlier run: it counts for the bar, not for the rate.
    before: u64,
    begun: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub fn new(is_terminal: bool) -> Self {
        Self {
            is_terminal,
            current: None,
        }
    }

    /// Removes the bar.
    pub fn clear(&mut self) {
        if let Some(bar) = self.current.take().and_then(|current| current.bar) {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        let text = visible(text);
        match self
            .current
            .as_ref()
            .and_then(|current| current.bar.as_ref())
        {
            Some(bar) => bar.println(text),
            // A closed stderr is no reason to stop a run.
            None => drop(writeln!(std::io::stderr(), "{text}")),
        }
    }
}

impl Report for Progress {
    fn start(&mut self, start: Start<'_>) {
        self.clear();
        let title = titled(start.table, start.round);
        let unit = match start.unit {
            Unit::Rows => "rows",
            Unit::Steps => "steps",
        };
        let bar = self
            .is_terminal
            .then(|| bar(&title, unit, start.total, start.done));
        let now = Instant::now();
        self.current = Some(Current {
            title,
            unit,
            total: start.total,
            before: start.done,
            begun: now,
            last_line: now,
            bar,
        });
    }

    fn progress(&mut self, done: u64) {
        let Some(current) = &mut self.current else {
            return;
        };
        if let Some(bar) = &current.bar {
            bar.set_position(done);
            return;
        }
        if current.last_line.elapsed() < LINE_EVERY {
            return;
        }
        current.last_line = Instant::now();
        let seconds = current.begun.elapsed().as_secs_f64();
        let rate = done.saturating_sub(current.before) as f64 / seconds;
        let (title, unit) = (&current.title, current.unit);
        let text = match current.total {
            Some(total) => {
                let left = total.saturating_sub(done) as f64 / rate;
                let left = if left.is_finite() {
                    duration(left)
                } else {
                    "an unknown time".to_owned()
                };
                format!("{title}: {done} of {total} {unit}, {rate:.2} {unit}/s, {left} left")
            }
            None => format!("{title}: {done} {unit}, {rate:.2} {unit}/s"),
        };
        self.line(&text);
    }

    fn finished(
        &mut self,
        table: &TableName,
        round: Option<u32>,
        rows: u64,
        faults: u64,
        dropped: u64,
    ) {
        let took = self
            .current
            .as_ref()
            .map_or(Duration::ZERO, |current| current.begun.elapsed());
        let mut words = vec![format!(
            "{}: {rows} {} in {}",
            titled(table, round),
            rows_word(rows),
            duration(took.as_secs_f64())
        )];
        if faults > 0 {
            words.push(format!("{faults} faulty {} rejected", rows_word(faults)));
        }
        if dropped > 0 {
            words.push(format!("{dropped} dropped"));
        }
        self.line(&words.join(", "));
        self.clear();
    }

    fn reused(&mut self, table: &TableName, round: Option<u32>, rows: u64) {
        self.line(&format!(
            "{}: {rows} {}, up to date",
            titled(table, round),
            rows_word(rows)
        ));
    }

    fn note(&mut self, text: &str) {
        self.line(text);
    }
}

fn rows_word(count: u64) -> &'static str {
    if count == 1 { "row" } else { "rows" }
}

fn bar(title: &str, unit: &str, total: Option<u64>, done: u64) -> ProgressBar {
    let template = match total {
        Some(_) => {
            format!("{{prefix:24}} {{wide_bar}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{eta}} left")
        }
        None => format!("{{prefix:24}} {{spinner}} {{pos}} {unit}  {{per_sec}}"),
    };
    let style = ProgressStyle::with_template(&template).expect("the template is valid");
    let bar = match total {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::new_spinner(),
    };
    let bar = bar
        .with_style(style)
        .with_prefix(title.to_owned())
        .with_position(done);
    bar.reset_eta();
    bar
}

/// Formats a duration: `8.4 s`, `3 min 20 s`, `2 h 5 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..=59 => format!("{seconds:.1} s"),
        60..=3599 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}
