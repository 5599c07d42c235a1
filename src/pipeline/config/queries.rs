//! The queries of a file that make no table: `stop_when`, `expect`, `report`. Each is planned over the columns
//! of the tables; one that reads a table with a complaint of its own waits until that is mended.

use std::collections::HashSet;

use arrow::datatypes::{DataType, Schema, SchemaRef};

use super::diagnostic::{At, Diagnostic};
use super::lineage::Lineage;
use super::pipeline::{Chart, PipelineSpec};
use super::serde_messages::listed;
use super::source::KeyPath;
use super::sql;
use super::suggest::suggest;
use ovchat_data::tables::{Image, Reject, Row, Telemetry};
use ovchat_query::{self as query, Param, QueryError, Several, is_flag, with_round};

/// The way out of a `stop_when` of several rows.
const ONE_ROW: &str = "aggregate the rows into one, such as: select max(reward) > 0.9 from rewards where round = $round";

impl Lineage {
    /// The tables with known columns, with `round` where wanted, and the names of the others, about which
    /// another complaint is enough.
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

    /// Plans the query that ends the rounds.
    pub(super) fn stop_when(&mut self, written: &PipelineSpec) {
        const CODE: &str = "config::stop_when";
        let Some(query) = written.rounds.stop_when() else {
            return;
        };
        let (tables, unclear) = self.tables(true);
        if reads(query, &unclear) {
            return;
        }
        let at = At::value(KeyPath::root().key("rounds").key("stop_when"));
        let params = [("round", Param::Integer(1))];
        let found = match query::plan_counted(query, &tables, &params) {
            Err(error) => Some(unplanned(CODE, at, &error, query, query, &tables)),
            Ok((schema, _)) if !is_flag(&schema) => {
                let columns = schema.fields().iter();
                let columns: Vec<String> = columns
                    .map(|field| format!("`{}` ({})", field.name(), kind_of(field.data_type())))
                    .collect();
                let message = format!(
                    "the query must have one column, true or false, and has {}",
                    columns.join(", ")
                );
                let help = "such as: select max(reward) > 0.9 from rewards where round = $round";
                Some(Diagnostic::new(CODE, at, message).help(help))
            }
            Ok((_, count)) => count.several().map(|several| {
                not_one(CODE, at, "the query must give one row", &several).help(ONE_ROW)
            }),
        };
        self.diagnostics.extend(found);
    }

    /// A table that a query reads and that is not there yet when the table `name` has been made, in the first
    /// round of this one.
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

    /// Plans what is expected of tables over the columns that they have.
    pub(super) fn expect(&mut self, written: &PipelineSpec) {
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
                let help = format!("the tables are {}", listed(names));
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
                let message = format!("`{later}` is made after `{name}`");
                let help = format!(
                    "an expectation is checked when its own table has been made; write `table: {later}`"
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
                    let message = format!("the value must be a number, and is {kind}");
                    let help =
                        "write a number, such as: avg(reward), or cast it: cast(… as double)";
                    Some(Diagnostic::new(EXPECT, at, message).help(help))
                }
                (None, Err(error)) => {
                    let written = expectation.query.as_ref().or(expectation.value.as_ref());
                    let written = written.map_or("", String::as_str);
                    Some(unplanned(EXPECT, at, &error, written, &planned, &tables))
                }
                (None, Ok((_, count))) if expectation.query.is_some() && count.is_never_empty() => {
                    let message = "the query always returns a row, so the expectation never holds";
                    let help = "give a `value` with `at_least` or `at_most` in its place, or ask for the rows that \
                                should not be there";
                    Some(Diagnostic::new(EXPECT, at, message).help(help))
                }
                (None, Ok((_, count))) => {
                    let several = count.several().filter(|_| expectation.value.is_some());
                    several.map(|several| {
                        let help = "aggregate the rows into one value, such as: avg(reward)";
                        not_one(EXPECT, at, "the value must be one number", &several).help(help)
                    })
                }
            };
            self.diagnostics.extend(found);
        }
    }

    /// Plans the queries of the report over the columns that arrive.
    pub(super) fn report(&mut self, written: &PipelineSpec) {
        let mut tables: Vec<(String, SchemaRef)> = vec![
            ("images".to_owned(), Image::schema()),
            ("rejects".to_owned(), Reject::schema()),
            ("telemetry".to_owned(), Telemetry::schema()),
        ];
        let (known, mut unclear) = self.tables(true);
        tables.extend(known);
        for view in &written.report {
            let Some(spec) = &view.spec else {
                return;
            };
            let name = view.name.to_string();
            if tables.iter().any(|(table, _)| *table == name) {
                let message = format!("there is a table `{name}` already");
                let at = At::key(view.path.clone());
                let diagnostic = Diagnostic::new("config::duplicate", at, message);
                self.diagnostics
                    .push(diagnostic.help("views and tables are named side by side"));
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
            for column in spec.chart.iter().flat_map(Chart::columns) {
                let at = At::value(view.settings.key("chart"));
                if let Ok(field) = schema.field_with_name(column) {
                    if !is_number(field.data_type()) {
                        let kind = kind_of(field.data_type());
                        let message =
                            format!("a chart draws numbers, and the column `{column}` is {kind}");
                        let help = format!(
                            "leave it out, or cast it in the query: cast({column} as double) as {column}"
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
                    let message = format!("`{name}` has no column `{column}`");
                    let diagnostic = Diagnostic::new("config::chart", at, message)
                        .suggest(suggest(column, columns.iter().copied()));
                    let help = format!("its columns are {}", listed(columns));
                    self.diagnostics.push(diagnostic.help(help));
                }
            }
            tables.push((name, schema));
        }
    }
}

/// The code of complaints about expectations.
const EXPECT: &str = "config::expectation";

/// The complaint about a query of a pipeline that can't be planned, over tables by their names.
fn unplanned(
    code: &'static str,
    at: At,
    error: &QueryError,
    written: &str,
    planned: &str,
    tables: &[(String, SchemaRef)],
) -> Diagnostic {
    let tables = tables.iter().map(|(name, _)| name.as_str());
    sql::unplanned(code, at, &error.0, written, planned, tables)
}

/// The complaint about a query that gives several rows where `must` says that it may not: an error if
/// they are certain.
fn not_one(code: &'static str, at: At, must: &str, several: &Several) -> Diagnostic {
    let message = format!("{must}, and {}", several.words);
    if several.is_certain {
        Diagnostic::new(code, at, message)
    } else {
        Diagnostic::warning(code, at, message)
    }
}

/// What the first column of a result is, if it is no number.
pub fn no_number(schema: &Schema) -> Option<String> {
    let kind = schema.fields().first()?.data_type();
    (!is_number(kind)).then(|| kind_of(kind))
}

/// Whether values of a type are numbers, or become some by a cast that can't fail.
fn is_number(kind: &DataType) -> bool {
    kind.is_numeric() || matches!(kind, DataType::Boolean | DataType::Null)
}

/// A type in words.
fn kind_of(kind: &DataType) -> String {
    match kind {
        kind if kind.is_numeric() => "a number".to_owned(),
        kind if kind.is_string() => "a text".to_owned(),
        kind if kind.is_list() => "a list".to_owned(),
        DataType::Boolean => "true or false".to_owned(),
        DataType::Struct(_) => "several values".to_owned(),
        kind => format!("of the type {kind}"),
    }
}

/// True if a query reads one of these tables. One that can't be parsed reads none.
fn reads(query: &str, tables: &HashSet<String>) -> bool {
    query::tables(query).is_ok_and(|read| read.iter().any(|table| tables.contains(table)))
}
