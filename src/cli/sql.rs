//! `pipeline sql`: query the tables of a run with SQL, also while it is running.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use clap::Args;

use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::{Out, say};
use super::rows::{RowFormat, RowWriter};
use super::spill;
use super::spill::Spill;
use ovchat_data::store::{LABELS, RunFolder, TableFile, TableVersion, schema_of_file};
use ovchat_data::tables::{Call, Image, Label, Reject, Row, Telemetry, Video, schema_of};
use ovchat_pipeline::config::tables_there;
use ovchat_pipeline::run::LAST_WHOLE;
use ovchat_query::{self as query, Param, Part, QueryTable, View};

/// Query the tables of a run with SQL; tables of all rounds have a column `round`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline sql runs/small-world \"select round, avg(reward) from rewards group by round order by round\"\n  \
    pipeline sql runs/small-world \"select * from rejects\" --format json\n  \
    pipeline sql runs/small-world \"select * from rewards\" --format parquet > rewards.parquet\n  \
    pipeline sql runs/small-world < question.sql\n  \
    pipeline sql runs/small-world \"show tables\"\n\nWithout a query, an interactive prompt reads queries, each ended by `;`."
)]
pub struct Sql {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The query [default: read from stdin].
    #[arg(allow_hyphen_values = true)]
    query: Option<String>,
    /// Read staged versions (unfinished, or refused by an expectation) in place of the tables that
    /// they will replace.
    #[arg(long)]
    staged: bool,
    #[command(flatten)]
    rows: RowFormat,
}

impl Sql {
    pub fn run(&self) -> Result<(), Failed> {
        let folder = run_folder(&self.run);
        let run = read_run(&folder)?;
        self.rows.refuse_terminal(std::io::stdout().is_terminal())?;
        spill::end_at_signals()?;
        if let Some(query) = &self.query {
            return self.answer(&run, query);
        }
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            let mut query = String::new();
            let read = stdin.lock().read_to_string(&mut query);
            read.map_err(|error| Failed::Words(format!("cannot read the query: {error}")))?;
            return self.answer(&run, &query);
        }
        if self.rows.is_binary() {
            return Err(Failed::Usage(
                "--format writes the rows of one query to a file; pass the query as an argument or on stdin".to_owned(),
            ));
        }
        self.converse(&folder)
    }

    /// Reads and answers queries until the end of input.
    fn converse(&self, folder: &std::path::Path) -> Result<(), Failed> {
        say!("end a query with `;`, exit with Ctrl-D; try: show tables;");
        let mut query = String::new();
        loop {
            eprint!("{}", if query.is_empty() { "sql> " } else { "...> " });
            let read = std::io::stdin().lock().read_line(&mut query);
            if read.map_err(|error| Failed::Words(format!("cannot read the query: {error}")))? == 0
            {
                say!("");
                return Ok(());
            }
            if query.trim_end().ends_with(';') {
                // Reopened each time, so that tables built in the meantime are visible.
                let run = read_run(folder)?;
                if let Err(failed) = self.answer(&run, query.trim_end().trim_end_matches(';')) {
                    say!("error: {failed}");
                }
                query.clear();
            }
        }
    }

    fn answer(&self, run: &RunFolder, query: &str) -> Result<(), Failed> {
        let spill = Spill::open()?;
        let views = report_views(&run.manifest().source);
        let tables = tables(run, self.staged)?;
        let printed = print(query, &[], &tables, &views, &spill, self.rows, Out);
        let names = tables.iter().map(|table| &table.name);
        let names = names.chain(views.iter().map(|view| &view.name));
        let names: Vec<&str> = names.map(String::as_str).collect();
        printed.map(drop).map_err(|failed| match failed {
            Failed::Query(error) => match tables_there(&error, &names) {
                Some((Some(suggest), all)) => {
                    Failed::Words(format!("{error}; did you mean `{suggest}`? {all}"))
                }
                Some((None, all)) => Failed::Words(format!("{error}; {all}")),
                None => Failed::Query(error),
            },
            failed => failed,
        })
    }
}

/// Prints the result of a query over some tables.
pub fn show<W: Write + Send>(
    query: &str,
    params: &[(&str, Param)],
    tables: &[QueryTable],
    format: RowFormat,
    out: W,
) -> Result<W, Failed> {
    print(query, params, tables, &[], &Spill::open()?, format, out)
}

fn print<W: Write + Send>(
    query: &str,
    params: &[(&str, Param)],
    tables: &[QueryTable],
    views: &[View],
    spill: &Spill,
    format: RowFormat,
    out: W,
) -> Result<W, Failed> {
    let mut out = Some(out);
    let mut writer: Option<RowWriter<W>> = None;
    query::stream(query, params, tables, views, Some(spill.path()), |part| {
        match (part, &mut writer) {
            (Part::Header(header), _) => {
                let out = out.take().expect("one header");
                writer = Some(RowWriter::begin(format, &header, out)?);
            }
            (Part::Rows(rows), Some(writer)) => writer.write(&rows)?,
            (Part::Rows(_), None) => unreachable!("the header comes first"),
            (Part::Nothing, _) => {}
        }
        Ok::<(), Failed>(())
    })?;
    writer.expect("the header comes first").finish()
}

/// Runs a query over everything in a run: its tables, and the views of its report.
pub fn ask(
    run: &RunFolder,
    query: &str,
    sink: impl FnMut(RecordBatch) -> Result<(), Failed>,
) -> Result<SchemaRef, Failed> {
    let spill = Spill::open()?;
    let views = report_views(&run.manifest().source);
    let tables = tables(run, false)?;
    query::run(query, &[], &tables, &views, Some(spill.path()), sink)
}

/// Returns the views of the pipeline of the last complete run, or else of the last run.
pub(super) fn report_views(source: &serde_json::Value) -> Vec<View> {
    let of_last = source[LAST_WHOLE]["views"].as_array();
    let views = of_last.or_else(|| source["views"].as_array());
    let view = |view: &serde_json::Value| {
        let text = |name: &str| Some(view.get(name)?.as_str()?.to_owned());
        Some(View {
            name: text("name")?,
            query: text("query")?,
        })
    };
    views.into_iter().flatten().filter_map(view).collect()
}

/// Returns a table of a run in one round, for built-in queries.
pub fn run_table(run: &RunFolder, table: &str, round: Option<u32>) -> Result<QueryTable, Failed> {
    let schema = run.schema(table, round)?;
    let schema = schema
        .ok_or_else(|| Failed::Words(format!("{} has no table `{table}`", run.root().display())))?;
    Ok(QueryTable {
        name: table.to_owned(),
        schema,
        files: vec![(None, run.table_files(table, round))],
        with_round: false,
    })
}

/// Returns every table in the manifest, with its rounds so far; with `with_staged`, staged versions
/// replace the current ones.
pub(super) fn tables(run: &RunFolder, with_staged: bool) -> Result<Vec<QueryTable>, Failed> {
    let manifest = run.manifest();
    let staged: &[TableVersion] = if with_staged { &manifest.staged } else { &[] };
    let is_replaced = |made: &TableVersion| {
        staged.iter().any(|new| {
            new.table == made.table
                && (new.round == made.round || new.round.is_some() != made.round.is_some())
        })
    };
    let current = manifest.made.iter().filter(|made| !is_replaced(made));
    let versions: Vec<&TableVersion> = current.chain(staged).collect();
    let mut tables: Vec<QueryTable> = Vec::new();
    for made in &versions {
        let files = run.checked(made.files());
        if let Some(table) = tables.iter_mut().find(|table| table.name == made.table) {
            table.files.push((made.round, files));
            continue;
        }
        let schema = match made.kind.as_deref().and_then(schema_of) {
            Some(schema) => schema,
            None => match files.first() {
                Some(file) => schema_of_file(&file.path)?,
                None => continue,
            },
        };
        let with_round = made.round.is_some();
        tables.push(QueryTable {
            name: made.table.clone(),
            schema,
            files: vec![(made.round, files)],
            with_round,
        });
    }
    let images = run.checked(&manifest.images);
    let videos = run.checked(&manifest.videos);
    let rejects = run.checked(versions.iter().flat_map(|made| made.rejects()));
    let telemetry = run.checked(versions.iter().flat_map(|made| made.telemetry()));
    let calls = lines_in(&run.calls());
    let labels = lines_in(&run.root().join(LABELS));
    for (name, schema, files) in [
        ("calls", Call::schema(), calls),
        (LABELS, Label::schema(), labels),
        ("images", Image::schema(), images),
        ("videos", Video::schema(), videos),
        ("rejects", Reject::schema(), rejects),
        ("telemetry", Telemetry::schema(), telemetry),
    ] {
        let files = vec![(None, files)];
        tables.push(QueryTable {
            name: name.to_owned(),
            schema,
            files,
            with_round: false,
        });
    }
    Ok(tables)
}

/// Returns the JSON Lines files in a folder.
fn lines_in(folder: &std::path::Path) -> Vec<TableFile> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    files.retain(|path| path.extension() == Some("jsonl".as_ref()));
    files.sort();
    files.into_iter().map(TableFile::from).collect()
}
