//! Checks of the queries that build no table: those of `rounds`, `guard`, `expect` and `report`.
//!
//! Each query is planned against the columns of the tables. A query that reads a table with a
//! diagnostic of its own is skipped until that is fixed.

use std::collections::HashSet;

use arrow::datatypes::{DataType, Schema, SchemaRef};

use super::diagnostic::{At, Diagnostic};
use super::guard::Condition;
use super::lineage::Lineage;
use super::pipeline::{Chart, PipelineSpec};
use super::source::KeyPath;
use super::sql;
use super::suggest::{listed, suggest};
use ovchat_data::tables::{Health, Image, Reject, Row, Telemetry, Video};
use ovchat_query::{self as query, Param, QueryError, Several, is_flag, with_round};

/// A query that runs after a round, and the value that it must return.
struct AfterRound {
    code: &'static str,
    at: At,
    /// The query in messages.
    name: &'static str,
    /// The kind of its column, the value, and an example.
    kind: &'static str,
    noun: &'static str,
    example: &'static str,
    is_right: fn(&Schema) -> bool,
}

impl AfterRound {
    fn flag(code: &'static str, at: At, name: &'static str) -> Self {
        Self {
            code,
            at,
            name,
            kind: "boolean",
            noun: "condition",
            example: "select max(reward) > 0.9 from rewards where round = $round",
            is_right: is_flag,
        }
    }

    fn number(code: &'static str, at: At, name: &'static str) -> Self {
        Self {
            code,
            at,
            name,
            kind: "numeric",
            noun: "number",
            example: "select value from health where metric = 'heldout_reward' and round = $round limit 1",
            is_right: |schema| schema.fields().len() == 1 && no_number(schema).is_none(),
        }
    }
}

impl Lineage {
    /// Checks all queries that build no table.
    pub(super) fn check_queries(&mut self, written: &PipelineSpec) {
        self.report(written);
        self.expect(written);
        self.health_is_free(written);
        self.after_rounds(written);
    }

    /// Returns the tables with known columns (with `round` added if `in_rounds`), and the names of
    /// the others, which already have a diagnostic.
    fn tables(&self, in_rounds: bool) -> (Vec<(String, SchemaRef)>, HashSet<String>) {
        let mut tables = Vec::new();
        let mut unclear = HashSet::new();
        for draft in &self.drafts {
            let name = draft.name.to_string();
            match draft.schema.as_ref().filter(|_| !draft.is_doubtful) {
                Some(schema) => {
                    let has_round = in_rounds && draft.round_first.is_some();
                    tables.push((name, with_round(schema, has_round)));
                }
                None => {
                    unclear.insert(name);
                }
            }
        }
        (tables, unclear)
    }

    /// Checks the queries of `rounds` and `guard`, which run after a round.
    fn after_rounds(&mut self, written: &PipelineSpec) {
        let rounds = KeyPath::root().key("rounds");
        if let Some(query) = written.rounds.stop_when() {
            let at = At::value(rounds.key("stop_when"));
            self.after_round(
                query,
                &AfterRound::flag("config::stop_when", at, "`stop_when`"),
            );
        }
        if let Some(query) = written.rounds.by() {
            let at = At::value(rounds.key("by"));
            self.after_round(query, &AfterRound::number("config::rounds_by", at, "`by`"));
        }
        for entry in &written.guard {
            if let Condition::Query(query) = &entry.guard.condition {
                let at = At::key(entry.path.clone());
                let wanted = AfterRound::flag("config::guard", at, "the query");
                self.after_round(query, &wanted);
            }
        }
    }

    /// Checks that no stage has the name of the table that the guard needs.
    fn health_is_free(&mut self, written: &PipelineSpec) {
        let mut drafts = self.drafts.iter();
        let Some(draft) = drafts.find(|draft| draft.name.as_str() == Health::KIND) else {
            return;
        };
        let at = At::key(draft.path.clone());
        let help = "rename the stage";
        let is_needed = !written.guard.is_empty() || written.rounds.by().is_some();
        let diagnostic = if is_needed {
            let message = "a stage named `health` takes the place of the table that `guard` and `rounds.by` need";
            Diagnostic::new("config::health", at, message.to_owned())
        } else {
            let message =
                "a stage named `health` turns off the health of rounds, whose table has this name";
            Diagnostic::warning("config::health", at, message.to_owned())
        };
        self.diagnostics.push(diagnostic.help(help));
    }

    /// Checks a query that returns one value after a round.
    fn after_round(&mut self, query: &str, wanted: &AfterRound) {
        let (mut tables, unclear) = self.tables(true);
        if reads(query, &unclear) {
            return;
        }
        self.add_health(&mut tables);
        let (code, at) = (wanted.code, wanted.at.clone());
        let params = [("round", Param::Integer(1))];
        let found = match query::plan_counted(query, &tables, &params) {
            Err(error) => Some(unplanned(code, at, &error, query, query, &tables)),
            Ok((schema, _)) if !(wanted.is_right)(&schema) => {
                let columns = schema.fields().iter();
                let columns: Vec<String> = columns
                    .map(|field| format!("`{}` ({})", field.name(), kind_of(field.data_type())))
                    .collect();
                let message = format!(
                    "{} must return a single {} column, but returns {}",
                    wanted.name,
                    wanted.kind,
                    columns.join(", ")
                );
                let help = format!("return one {}, such as: {}", wanted.noun, wanted.example);
                Some(Diagnostic::new(code, at, message).help(help))
            }
            Ok((_, count)) => count.several().map(|several| {
                let must = format!("{} must return one row", wanted.name);
                let help = format!("aggregate to a single row, such as: {}", wanted.example);
                not_one(code, at, &must, &several).help(help)
            }),
        };
        self.diagnostics.extend(found);
    }

    /// Adds the table `health`, unless a table of the pipeline has that name.
    fn add_health(&self, tables: &mut Vec<(String, SchemaRef)>) {
        if !self
            .drafts
            .iter()
            .any(|draft| draft.name.as_str() == Health::KIND)
        {
            tables.push((Health::KIND.to_owned(), with_round(&Health::schema(), true)));
        }
    }

    /// Returns a table that `query` reads but that does not exist yet once the table `name` is
    /// built, in the first round of `name`.
    fn made_later(&self, name: &str, query: &str) -> Option<String> {
        let rank = |position: usize| {
            let place = self.order.iter().position(|other| *other == position);
            (self.drafts[position].is_evaluation, place)
        };
        let position = |name: &str| {
            self.drafts
                .iter()
                .position(|draft| draft.name.as_str() == name)
        };
        let own = position(name)?;
        let is_there = |other: usize| {
            let rounds = (self.drafts[other].round_first, self.drafts[own].round_first);
            match rounds {
                _ if other == own => true,
                (None, Some(_)) => true,
                (Some(_), None) => false,
                (None, None) => rank(other) < rank(own),
                (Some(first), Some(of_own)) => first <= of_own && rank(other) < rank(own),
            }
        };
        let tables = query::tables(query).ok()?.into_iter();
        let mut later =
            tables.filter(|table| position(table).is_some_and(|other| !is_there(other)));
        later.next()
    }

    /// Checks the expectations against the columns of their tables.
    fn expect(&mut self, written: &PipelineSpec) {
        let (tables, unclear) = self.tables(false);
        for entry in &written.expect {
            let Some(expectation) = &entry.spec else {
                continue;
            };
            let name = expectation.table.as_str();
            let names = self.drafts.iter().map(|draft| draft.name.as_str());
            if !names.clone().any(|other| other == name) {
                let at = At::value(entry.settings.key("table"));
                let diagnostic = Diagnostic::new(
                    "config::unknown_table",
                    at,
                    format!("there is no table `{name}`"),
                )
                .suggest(suggest(name, names.clone()));
                let help = format!("available tables: {}", listed(names));
                self.diagnostics.push(diagnostic.help(help));
                continue;
            }
            if let Some(diagnostic) = expectation.check(&entry.settings) {
                self.diagnostics.push(diagnostic);
                continue;
            }
            let planned = expectation.sql();
            if reads(&planned, &unclear) {
                continue;
            }
            let at = At::value(entry.settings.key(expectation.field()));
            if let Some(later) = self.made_later(name, &planned) {
                let message =
                    format!("the expectation reads `{later}`, which is built after `{name}`");
                let help = format!(
                    "set `table: {later}`: an expectation is checked as soon as its own table is built"
                );
                self.diagnostics
                    .push(Diagnostic::new(EXPECT, at, message).help(help));
                continue;
            }
            let of_kind = expectation.value.as_ref().and_then(|_| {
                let schema = query::plan(&expectation.sql_as_it_is(), &tables, &[]).ok()?;
                no_number(&schema)
            });
            let found = match (of_kind, query::plan_counted(&planned, &tables, &[])) {
                (Some(kind), _) => {
                    let message = format!("`value` must be a number, but is {kind}");
                    let help = "write a numeric expression such as avg(reward), or cast it: cast(… as double)";
                    Some(Diagnostic::new(EXPECT, at, message).help(help))
                }
                (None, Err(error)) => {
                    let written = expectation.query.as_ref().or(expectation.value.as_ref());
                    let written = written.map_or("", String::as_str);
                    Some(unplanned(EXPECT, at, &error, written, &planned, &tables))
                }
                (None, Ok((_, count))) if expectation.query.is_some() && count.is_never_empty() => {
                    let message = "`query` always returns a row, so the expectation can never pass";
                    let help = "use a `value` with `at_least` or `at_most` instead, or select only the rows that \
                                should not exist";
                    Some(Diagnostic::new(EXPECT, at, message).help(help))
                }
                (None, Ok((_, count))) => {
                    let several = count.several().filter(|_| expectation.value.is_some());
                    several.map(|several| {
                        let help = "aggregate to a single value, such as: avg(reward)";
                        not_one(EXPECT, at, "`value` must be a single number", &several).help(help)
                    })
                }
            };
            self.diagnostics.extend(found);
        }
    }

    /// Checks the queries of `report` against the columns of the tables and the earlier views.
    fn report(&mut self, written: &PipelineSpec) {
        let mut tables: Vec<(String, SchemaRef)> = vec![
            ("images".to_owned(), Image::schema()),
            ("videos".to_owned(), Video::schema()),
            ("rejects".to_owned(), Reject::schema()),
            ("telemetry".to_owned(), Telemetry::schema()),
        ];
        let (known, mut unclear) = self.tables(true);
        tables.extend(known);
        self.add_health(&mut tables);
        for view in &written.report {
            let Some(spec) = &view.spec else {
                return;
            };
            let name = view.name.to_string();
            if tables.iter().any(|(table, _)| *table == name) {
                let message = format!("view `{name}` has the same name as a table");
                let at = At::key(view.path.clone());
                let diagnostic = Diagnostic::new("config::duplicate", at, message);
                self.diagnostics
                    .push(diagnostic.help("rename the view: views and tables share one namespace"));
                continue;
            }
            if reads(&spec.query, &unclear) {
                unclear.insert(name);
                continue;
            }
            let schema = match query::plan(&spec.query, &tables, &[]) {
                Ok(schema) => schema,
                Err(error) => {
                    let at = At::value(view.settings.key("query"));
                    let query = &spec.query;
                    let diagnostic = unplanned("config::report", at, &error, query, query, &tables);
                    self.diagnostics.push(diagnostic);
                    unclear.insert(name);
                    continue;
                }
            };
            for (column, is_numeric) in spec.chart.iter().flat_map(Chart::columns) {
                let at = At::value(view.settings.key("chart"));
                if let Ok(field) = schema.field_with_name(column) {
                    if is_numeric && !is_number(field.data_type()) {
                        let kind = kind_of(field.data_type());
                        let message =
                            format!("cannot chart column `{column}`: it is {kind}, not a number");
                        let help = format!(
                            "remove it from `chart`, or cast it in the query: cast({column} as double) as {column}"
                        );
                        let diagnostic = Diagnostic::new("config::chart", at, message);
                        self.diagnostics.push(diagnostic.help(help));
                    }
                } else {
                    let columns: Vec<&str> = schema
                        .fields()
                        .iter()
                        .map(|field| field.name().as_str())
                        .collect();
                    let message = format!("view `{name}` has no column `{column}`");
                    let diagnostic = Diagnostic::new("config::chart", at, message)
                        .suggest(suggest(column, columns.iter().copied()));
                    let help = format!("available columns: {}", listed(columns));
                    self.diagnostics.push(diagnostic.help(help));
                }
            }
            tables.push((name, schema));
        }
    }
}

/// The diagnostic code of expectations.
const EXPECT: &str = "config::expectation";

/// The diagnostic for a pipeline query that cannot be planned over `tables`.
fn unplanned(
    code: &'static str,
    at: At,
    error: &QueryError,
    written: &str,
    planned: &str,
    tables: &[(String, SchemaRef)],
) -> Diagnostic {
    let tables = tables.iter().map(|(name, _)| name.as_str());
    sql::unplanned(code, at, error, written, planned, tables)
}

/// The diagnostic for a query that returns several rows where `must` allows one: an error if it
/// certainly does, a warning if it may.
fn not_one(code: &'static str, at: At, must: &str, several: &Several) -> Diagnostic {
    let message = format!("{must}, but {}", several.words);
    if several.is_certain {
        Diagnostic::new(code, at, message)
    } else {
        Diagnostic::warning(code, at, message)
    }
}

/// Returns the type of the first column of a result, in words, unless it is a number.
pub fn no_number(schema: &Schema) -> Option<String> {
    let kind = schema.fields().first()?.data_type();
    (!is_number(kind)).then(|| kind_of(kind))
}

/// True if values of a type are numbers, or become numbers by a cast that cannot fail.
fn is_number(kind: &DataType) -> bool {
    kind.is_numeric() || matches!(kind, DataType::Boolean | DataType::Null)
}

/// A data type in words.
fn kind_of(kind: &DataType) -> String {
    match kind {
        kind if kind.is_numeric() => "a number".to_owned(),
        kind if kind.is_string() => "a string".to_owned(),
        kind if kind.is_list() => "a list".to_owned(),
        DataType::Boolean => "a boolean".to_owned(),
        DataType::Struct(_) => "a struct".to_owned(),
        kind => format!("of type {kind}"),
    }
}

/// True if a query reads one of these tables. A query that cannot be parsed reads none.
fn reads(query: &str, tables: &HashSet<String>) -> bool {
    query::tables(query).is_ok_and(|read| read.iter().any(|table| tables.contains(table)))
}
