//! The queries of a file that make no table: `stop_when`, `expect`, `report`. Each is planned over the columns
//! of the tables; one that reads a table with a complaint of its own waits until that is mended.

use std::collections::HashSet;

use arrow::datatypes::SchemaRef;

use super::complaint::{At, Complaint};
use super::guess::guess;
use super::lineage::Lineage;
use super::pipeline::{Chart, Written};
use super::source::KeyPath;
use super::sql;
use super::words::listed;
use crate::query::{self, Param, RowCount, is_flag, with_round};
use crate::tables::{Image, Reject, Row, Telemetry};

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
    pub(super) fn stop_when(&mut self, written: &Written) {
        let Some(query) = written.rounds.stop_when() else {
            return;
        };
        let (tables, unclear) = self.tables(true);
        if reads(query, &unclear) {
            return;
        }
        let at = At::value(KeyPath::root().key("rounds").key("stop_when"));
        let complaint = |message| Complaint::new("config::stop_when", at.clone(), message);
        let params = [("round", Param::Integer(1))];
        let found = match query::plan_counted(query, &tables, &params) {
            Err(error) => Some(sql::unplanned(
                "config::stop_when",
                at.clone(),
                &error.0,
                query,
                query,
            )),
            Ok((schema, _)) if !is_flag(&schema) => {
                let columns = schema.fields().iter();
                let columns: Vec<String> = columns
                    .map(|field| format!("`{}` ({})", field.name(), field.data_type()))
                    .collect();
                let message = format!(
                    "the query must have one column, true or false, and has {}",
                    columns.join(", ")
                );
                let help = "such as: select max(reward) > 0.9 from rewards where round = $round";
                Some(complaint(message).help(help))
            }
            Ok((_, RowCount::Unknown)) => None,
            Ok((_, RowCount::EachOf(table))) => {
                let message =
                    format!("the query must give one row, and gives one for each row of `{table}`");
                Some(complaint(message).help(ONE_ROW))
            }
            Ok((_, RowCount::SomeOf(table))) => {
                let message = format!(
                    "the query must give one row, and may give several: one for each row of `{table}` \
                     that meets its condition"
                );
                let warning = Complaint::warning("config::stop_when", at.clone(), message);
                Some(warning.help(ONE_ROW))
            }
        };
        self.complaints.extend(found);
    }

    /// Plans what is expected of tables over the columns that they have.
    pub(super) fn expect(&mut self, written: &Written) {
        let (tables, unclear) = self.tables(false);
        for entry in &written.expect {
            let Some(expectation) = &entry.spec else {
                continue;
            };
            let name = expectation.table.as_str();
            let names = self.drafts.iter().map(|draft| draft.name.as_str());
            if !names.clone().any(|other| other == name) {
                let at = At::value(entry.settings.key("table"));
                let complaint = Complaint::new(
                    "config::unknown_table",
                    at,
                    format!("there is no table `{name}`"),
                )
                .guess(guess(name, names.clone()));
                let help = format!("the tables are {}", listed(names));
                self.complaints.push(complaint.help(help));
                continue;
            }
            if let Some(complaint) = expectation.check(&entry.settings) {
                self.complaints.push(complaint);
                continue;
            }
            let planned = expectation.sql();
            if !reads(&planned, &unclear)
                && let Err(error) = query::plan(&planned, &tables, &[])
            {
                let at = At::value(entry.settings.key(expectation.field()));
                let written = expectation.query.as_ref().or(expectation.value.as_ref());
                let written = written.map_or("", String::as_str);
                let complaint =
                    sql::unplanned("config::expectation", at, &error.0, written, &planned);
                self.complaints.push(complaint);
            }
        }
    }

    /// Plans the queries of the report over the columns that arrive.
    pub(super) fn report(&mut self, written: &Written) {
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
                let complaint = Complaint::new("config::duplicate", at, message);
                self.complaints
                    .push(complaint.help("views and tables are named side by side"));
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
                    self.complaints.push(sql::unplanned(
                        "config::report",
                        at,
                        &error.0,
                        query,
                        query,
                    ));
                    unclear.insert(name);
                    continue;
                }
            };
            for column in spec.chart.iter().flat_map(Chart::columns) {
                if schema.field_with_name(column).is_err() {
                    let columns: Vec<&str> = schema
                        .fields()
                        .iter()
                        .map(|field| field.name().as_str())
                        .collect();
                    let at = At::value(view.settings.key("chart"));
                    let message = format!("`{name}` has no column `{column}`");
                    let complaint = Complaint::new("config::chart", at, message)
                        .guess(guess(column, columns.iter().copied()));
                    let help = format!("its columns are {}", listed(columns));
                    self.complaints.push(complaint.help(help));
                }
            }
            tables.push((name, schema));
        }
    }
}

/// True if a query reads one of these tables. One that can't be parsed reads none.
fn reads(query: &str, tables: &HashSet<String>) -> bool {
    query::tables(query).is_ok_and(|read| read.iter().any(|table| tables.contains(table)))
}
