//! Tests of the output of each row format.

use arrow::array::builder::{Int32Builder, ListBuilder};
use arrow::array::{
    ArrayRef, AsArray, BinaryArray, Date64Array, Float64Array, Int32Array,
    IntervalMonthDayNanoArray, ListArray, StringViewArray, StructArray, Time32SecondArray,
    TimestampSecondArray,
};
use arrow::datatypes::{Field, IntervalMonthDayNanoType};

use super::*;
use ovchat_query::{self as query, Part, QueryTable};

/// One row per difficulty: all set, all null, all empty or not finite, and text that needs quotes.
fn troubled() -> RecordBatch {
    let floats = Float64Array::from(vec![Some(0.5), None, Some(f64::NAN), Some(f64::INFINITY)]);
    let small = Field::new("x", DataType::Float64, true);
    let pair = StructArray::from(vec![
        (Arc::new(small), Arc::new(floats.clone()) as ArrayRef),
        (
            Arc::new(Field::new("bytes", DataType::Binary, true)),
            Arc::new(BinaryArray::from_opt_vec(vec![
                Some(b"hi"),
                None,
                Some(b""),
                Some(b"\xff"),
            ])),
        ),
    ]);
    let mut ids = ListBuilder::new(Int32Builder::new());
    ids.append_value([Some(1), None]);
    ids.append_null();
    ids.append_value([]);
    ids.append_value([Some(2)]);
    let ids: ListArray = ids.finish();
    let columns: Vec<(&str, ArrayRef)> = vec![
        (
            "n",
            Arc::new(Int32Array::from(vec![Some(7), None, Some(0), Some(-1)])),
        ),
        (
            "text",
            Arc::new(StringViewArray::from(vec![
                Some("a"),
                None,
                Some(""),
                Some("b, \"c\"\n| NA"),
            ])),
        ),
        ("x", Arc::new(floats)),
        ("ids", Arc::new(ids)),
        ("pair", Arc::new(pair)),
        (
            "bytes",
            Arc::new(BinaryArray::from_opt_vec(vec![
                Some(b"hi"),
                None,
                Some(b""),
                Some(b"\xff"),
            ])),
        ),
    ];
    RecordBatch::try_from_iter_with_nullable(
        columns
            .into_iter()
            .map(|(name, column)| (name, column, true)),
    )
    .unwrap()
}

fn written(batch: &RecordBatch, format: Format, nan: Nan) -> Result<Vec<u8>, String> {
    let header = Header {
        schema: batch.schema(),
        tables: vec![None; batch.num_columns()],
    };
    let write = || -> Result<Vec<u8>, Failed> {
        let mut writer = RowWriter::begin(RowFormat { format, nan }, &header, Vec::new())?;
        writer.write(&batch.slice(0, 1))?;
        writer.write(&batch.slice(1, batch.num_rows() - 1))?;
        writer.finish()
    };
    write().map_err(|failed| failed.to_string())
}

fn text(batch: &RecordBatch, format: Format, nan: Nan) -> String {
    String::from_utf8(written(batch, format, nan).unwrap()).unwrap()
}

#[test]
fn csv_tells_null_from_nothing_and_loses_no_value() {
    let expected = r#"n,text,x,ids,pair,bytes
7,a,0.5,"[1,null]","{""x"":0.5,""bytes"":""aGk=""}",aGk=
,,,,"{""x"":null,""bytes"":null}",
0,"",NaN,[],"{""x"":""NaN"",""bytes"":""""}",""
-1,"b, ""c""
| NA",inf,[2],"{""x"":""inf"",""bytes"":""/w==""}",/w==
"#;
    assert_eq!(text(&troubled(), Format::Csv, Nan::Text), expected);
}

#[test]
fn json_has_nan_as_text_when_it_is_asked_to() {
    let expected = concat!(
        r#"{"n":7,"text":"a","x":0.5,"ids":[1,null],"pair":{"x":0.5,"bytes":"aGk="},"bytes":"aGk="}"#,
        "\n",
        r#"{"n":null,"text":null,"x":null,"ids":null,"pair":{"x":null,"bytes":null},"bytes":null}"#,
        "\n",
        r#"{"n":0,"text":"","x":"NaN","ids":[],"pair":{"x":"NaN","bytes":""},"bytes":""}"#,
        "\n",
        r#"{"n":-1,"text":"b, \"c\"\n| NA","x":"inf","ids":[2],"pair":{"x":"inf","bytes":"/w=="},"bytes":"/w=="}"#,
        "\n",
    );
    assert_eq!(text(&troubled(), Format::Jsonl, Nan::Text), expected);
    let list = text(&troubled(), Format::Json, Nan::Text);
    assert_eq!(
        list,
        format!("[{}]\n", expected.trim_end().replace("\n{", ",{"))
    );
}

#[test]
fn json_names_the_column_and_the_row_of_a_number_that_it_can_not_hold() {
    let ways = "which JSON cannot represent: write it as text with `--nan text`, use ";
    for format in [Format::Json, Format::Jsonl] {
        let problem = written(&troubled(), format, Nan::Error).unwrap_err();
        assert!(
            problem.starts_with(&format!(
                "column `x` (row 3) has NaN or an infinity, {ways}"
            )),
            "{problem}"
        );
    }
    let problem = written(&troubled(), Format::Csv, Nan::Error).unwrap_err();
    assert_eq!(
        problem,
        "column `pair` (row 3) has NaN or an infinity in a list or struct, which CSV stores as JSON, \
         and JSON cannot represent it: write it as text with `--nan text`, use `--format parquet` or `arrow`, or \
         exclude such rows in the query"
    );
    // Values below a null are not checked.
    let finite = troubled().slice(0, 2);
    assert!(written(&finite, Format::Json, Nan::Error).is_ok());
}

/// Reads the rows of a Parquet file.
fn read_back(path: &std::path::Path) -> RecordBatch {
    let rows = ovchat_data::store::TableReader::new(vec![path.to_owned()]);
    let rows: Vec<RecordBatch> = rows.map(Result::unwrap).collect();
    arrow::compute::concat_batches(&rows[0].schema(), &rows).unwrap()
}

/// Returns two rows with a column both as `x` and in the struct `s`.
fn twice(column: ArrayRef) -> RecordBatch {
    let field = Field::new("x", column.data_type().clone(), true);
    let within = StructArray::from(vec![(Arc::new(field), column.clone())]);
    let within: ArrayRef = Arc::new(within);
    RecordBatch::try_from_iter_with_nullable([("x", column, true), ("s", within, true)]).unwrap()
}

#[test]
fn times_that_parquet_does_not_have_are_times_when_they_are_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let zone = Some("+01:00".into());
    let columns: [(ArrayRef, DataType); 4] = [
        (
            Arc::new(TimestampSecondArray::from(vec![1_700_000_000, -1])),
            DataType::Timestamp(TimeUnit::Millisecond, None),
        ),
        (
            Arc::new(TimestampSecondArray::from(vec![0, 1]).with_timezone("+01:00")),
            DataType::Timestamp(TimeUnit::Millisecond, zone),
        ),
        (
            Arc::new(Date64Array::from(vec![86_400_000, -86_400_000])),
            DataType::Date32,
        ),
        (
            Arc::new(Time32SecondArray::from(vec![0, 86_399])),
            DataType::Time32(TimeUnit::Millisecond),
        ),
    ];
    for (column, expected) in columns {
        let batch = twice(column.clone());
        std::fs::write(&path, written(&batch, Format::Parquet, Nan::Error).unwrap()).unwrap();
        let rows = read_back(&path);
        for read in [rows.column(0), rows.column(1).as_struct().column(0)] {
            assert_eq!(*read.data_type(), expected);
            assert_eq!(
                cast(read, column.data_type()).unwrap().as_ref(),
                column.as_ref()
            );
        }
    }
    let noon: ArrayRef = Arc::new(Date64Array::from(vec![0, 43_200_000]));
    assert_eq!(
        written(&twice(noon), Format::Parquet, Nan::Error).unwrap_err(),
        "column `x` has dates with a time of day, which Parquet cannot store: use cast(x as timestamp) in \
         the query, or use `--format arrow`"
    );
    let far: ArrayRef = Arc::new(TimestampSecondArray::from(vec![0, i64::MAX]));
    assert!(written(&twice(far), Format::Parquet, Nan::Error).is_err());
}

#[test]
fn an_interval_is_refused_in_parquet_with_its_column() {
    let month = IntervalMonthDayNanoType::make_value(1, 0, 0);
    let column: ArrayRef = Arc::new(IntervalMonthDayNanoArray::from(vec![month, month]));
    let batch = twice(column);
    let refusal = |path: &str| {
        format!(
            "`{path}` is an interval, which Parquet cannot store: use cast({path} as varchar) in the query, or \
             use `--format arrow`"
        )
    };
    let problem = |batch: &RecordBatch| written(batch, Format::Parquet, Nan::Error).unwrap_err();
    assert_eq!(problem(&batch), refusal("x"));
    assert_eq!(problem(&batch.project(&[1]).unwrap()), refusal("s.x"));
    assert!(written(&batch, Format::Arrow, Nan::Error).is_ok());
}

#[test]
fn equal_names_within_a_struct_are_refused_with_its_path() {
    let ones: ArrayRef = Arc::new(Int32Array::from(vec![1, 1]));
    let field = || Arc::new(Field::new("x", DataType::Int32, true));
    let pair = StructArray::from(vec![(field(), ones.clone()), (field(), ones)]);
    let batch = twice(Arc::new(pair)).project(&[1]).unwrap();
    for format in [
        Format::Json,
        Format::Jsonl,
        Format::Csv,
        Format::Parquet,
        Format::Arrow,
    ] {
        assert_eq!(
            written(&batch, format, Nan::Error).unwrap_err(),
            "2 fields of `s.x` are called `x`; give each a unique name: \
             named_struct('x_1', …, 'x_2', …)"
        );
    }
    assert!(written(&batch, Format::Table, Nan::Error).is_ok());
}

#[test]
fn nothing_is_written_before_the_first_row_is_there() {
    let batch = troubled();
    let header = Header {
        schema: batch.schema(),
        tables: vec![None; batch.num_columns()],
    };
    for (format, first) in [(Format::Csv, "n,text"), (Format::Markdown, "| n |")] {
        let format = RowFormat {
            format,
            nan: Nan::Text,
        };
        let mut out = Vec::new();
        drop(RowWriter::begin(format, &header, &mut out).unwrap());
        assert_eq!(out, b"");
        let writer = RowWriter::begin(format, &header, &mut out).unwrap();
        writer.finish().unwrap();
        assert!(out.starts_with(first.as_bytes()), "{out:?}");
    }
}

#[test]
fn parquet_and_arrow_give_back_what_they_got() {
    let batch = troubled();
    let expected = fitted(&batch, &with_plain_types(&batch.schema(), DataType::clone)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    std::fs::write(&path, written(&batch, Format::Parquet, Nan::Error).unwrap()).unwrap();
    let rows = read_back(&path);
    assert_eq!(format!("{rows:?}"), format!("{expected:?}"));

    let bytes = io::Cursor::new(written(&batch, Format::Arrow, Nan::Error).unwrap());
    let rows = arrow_ipc::reader::FileReader::try_new(bytes, None).unwrap();
    let rows: Vec<RecordBatch> = rows.map(Result::unwrap).collect();
    let rows = arrow::compute::concat_batches(&expected.schema(), &rows).unwrap();
    assert_eq!(format!("{rows:?}"), format!("{expected:?}"));
}

#[test]
fn markdown_keeps_a_value_in_its_cell() {
    let batch = troubled().project(&[0, 1]).unwrap();
    let expected = "| n | text |\n| ---: | --- |\n| 7 | a |\n|  |  |\n| 0 |  |\n\
                    | -1 | b, \"c\"<br>\\| NA |\n";
    assert_eq!(text(&batch, Format::Markdown, Nan::Error), expected);
}

#[test]
fn equal_names_are_refused_with_the_aliases_to_write() {
    let round = Arc::new(Schema::new(vec![Field::new(
        "round",
        DataType::Int32,
        true,
    )]));
    let table = |name: &str| QueryTable {
        name: name.to_owned(),
        schema: round.clone(),
        files: vec![(None, Vec::new())],
        with_round: false,
    };
    let tables = [table("rewards"), table("pairs")];
    let sql = "select a.round, b.round from rewards a join pairs b on a.round = b.round";
    for (format, is_fine) in [
        (Format::Table, true),
        (Format::Markdown, true),
        (Format::Csv, false),
        (Format::Json, false),
        (Format::Parquet, false),
    ] {
        let format = RowFormat {
            format,
            nan: Nan::Error,
        };
        let begun = query::stream(sql, &[], &tables, &[], None, |part| -> Result<(), Failed> {
            if let Part::Header(header) = part {
                RowWriter::begin(format, &header, Vec::new())?;
            }
            Ok(())
        });
        let words = begun.err().map(|failed| failed.to_string());
        let refusal = "2 columns are named `round`; give each an alias: \
                       select a.round as a_round, b.round as b_round";
        assert_eq!(words.as_deref(), (!is_fine).then_some(refusal));
    }
}

#[test]
fn binary_formats_are_refused_on_a_terminal() {
    let refused = |format, is_terminal| {
        let format = RowFormat {
            format,
            nan: Nan::Error,
        };
        let refused = format.refuse_terminal(is_terminal);
        refused.err().map(|failed| failed.to_string())
    };
    assert_eq!(
        refused(Format::Parquet, true).unwrap(),
        "--format parquet is binary, but stdout is a terminal; write it to a file: \
         pipeline sql RUN \"…\" --format parquet > rows.parquet"
    );
    assert!(refused(Format::Arrow, true).is_some());
    assert_eq!(refused(Format::Arrow, false), None);
    assert_eq!(refused(Format::Csv, true), None);
}
