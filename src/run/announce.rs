//! The note that names the tables that a run replaces, printed before anything changes.

use super::{Fate, Options, Reason, Runner};
use crate::config::PlannedStage;

/// Tables and the rounds in which they are replaced; none for a table without rounds.
type Replaced = Vec<(String, Vec<u32>)>;

impl Runner<'_> {
    /// Says which complete tables the run replaces, why, and how to get them back.
    pub(super) fn announce(&mut self, options: &Options, slots: &[(&PlannedStage, Option<u32>)]) {
        let manifest = self.folder.manifest();
        let mut replaced = Replaced::new();
        let mut reasons: Vec<String> = Vec::new();
        let mut is_past = false;
        for one in &options.forecasts {
            // The rest of the first round that has the table is not made either.
            if is_past {
                break;
            }
            is_past = options.until.as_ref() == Some(&one.table);
            let current = manifest.find(one.table.as_str(), one.round);
            let goes_on = matches!(one.fate, Fate::Reuse | Fate::Resume { .. });
            if goes_on || current.is_none_or(|made| !made.complete) {
                continue;
            }
            add(&mut replaced, one.table.as_str(), one.round);
            if let Fate::Make { reasons: all, .. } = &one.fate {
                let own = all
                    .iter()
                    .filter(|reason| !matches!(reason, Reason::Input(_) | Reason::Model(_)));
                for reason in own.map(|reason| reason.in_words(self.plan, &one.table)) {
                    if !reasons.contains(&reason) {
                        reasons.push(reason);
                    }
                }
            }
        }
        let mut removed = Replaced::new();
        if options.until.is_none() {
            for made in self.unplanned(slots) {
                add(&mut removed, &made.table, made.round);
            }
        }
        if replaced.is_empty() && removed.is_empty() {
            return;
        }
        let folder = self.folder.root().display();
        let mut lines = Vec::new();
        if !replaced.is_empty() {
            let why = match reasons[..] {
                [] => String::new(),
                _ => format!("; reason: {}", reasons.join("; ")),
            };
            lines.push(format!(
                "replacing tables of {folder}: {}{why}; each stays until its new version is complete, and \
                 then in .cache",
                listed(&replaced)
            ));
        }
        if !removed.is_empty() {
            lines.push(format!(
                "removing tables of {folder} that the pipeline no longer has: {}; they stay until all others \
                 are complete, and then in .cache",
                listed(&removed)
            ));
        }
        let before = self.before["command"].as_str().map(str::to_owned);
        let before = before.unwrap_or_else(|| {
            let file = self.before["file"].as_str().unwrap_or("PIPELINE.yaml");
            format!("pipeline run {file}")
        });
        let undo = if before == options.command {
            "to bring them back, undo the change and run"
        } else {
            "to bring them back, run"
        };
        lines.push(format!("{undo}: {before}"));
        let text = lines.join("\n");
        self.report.note(&text);
    }
}

fn add(tables: &mut Replaced, table: &str, round: Option<u32>) {
    let known = tables.iter_mut().find(|(name, _)| name == table);
    match known {
        Some((_, rounds)) => rounds.extend(round),
        None => tables.push((table.to_owned(), round.into_iter().collect())),
    }
}

/// Tables with their rounds: `prompts, pairs (rounds 1 to 3), steps (round 3)`.
fn listed(tables: &Replaced) -> String {
    let texts = tables.iter().map(|(table, rounds)| {
        let mut rounds = rounds.clone();
        rounds.sort_unstable();
        match rounds[..] {
            [] => table.clone(),
            [round] => format!("{table} (round {round})"),
            [first, .., last] if last - first + 1 == rounds.len() as u32 => {
                format!("{table} (rounds {first} to {last})")
            }
            _ => {
                let rounds: Vec<String> = rounds.iter().map(ToString::to_string).collect();
                format!("{table} (rounds {})", rounds.join(", "))
            }
        }
    });
    texts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_listed_with_their_rounds() {
        let mut tables = Replaced::new();
        for (table, round) in [
            ("prompts", None),
            ("pairs", Some(2)),
            ("pairs", Some(1)),
            ("steps", Some(3)),
        ] {
            add(&mut tables, table, round);
        }
        add(&mut tables, "grades", Some(0));
        add(&mut tables, "grades", Some(2));
        assert_eq!(
            listed(&tables),
            "prompts, pairs (rounds 1 to 2), steps (round 3), grades (rounds 0, 2)"
        );
    }
}
