//! Tests of row counts, of rejected statements, and of error messages.

use std::sync::Arc;

use arrow::array::{Float64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::{Param, RowCount, identifier, over, plan, plan_counted};

fn schema() -> SchemaRef {
    let field = |name: &str, of: DataType| Field::new(name, of, true);
    Arc::new(Schema::new(vec![
        field("reward", DataType::Float64),
        field("round", DataType::Int32),
        field("text", DataType::Utf8),
    ]))
}

fn tables() -> Vec<(String, SchemaRef)> {
    vec![("t".to_owned(), schema()), ("u".to_owned(), schema())]
}

fn count(sql: &str) -> RowCount {
    let params = [("round", Param::Integer(1))];
    let planned = plan_counted(sql, &tables(), &params);
    planned.unwrap_or_else(|error| panic!("{sql}: {error}")).1
}

#[test]
fn one_row_at_most_is_seen() {
    for sql in [
        "select true",
        "select max(reward) from t",
        "select max(reward) from t where round = $round having count(*) > 1",
        "select reward from t limit 1",
        "select reward from t order by reward desc limit 1",
        "select max(reward) from t where round = $round group by round",
        "select distinct max(reward) from t",
        "select (select max(reward) from t) > (select reward from u limit 1)",
        "select a.m - b.m from (select max(reward) m from t) a, (select min(reward) m from u) b",
        "with a as (select max(reward) m from t) select m > 1 from a where m is not null",
        "values (1)",
        // Unknown when planning; the run reports it if there are several.
        "select t.reward from t join u on t.round = u.round",
    ] {
        assert_eq!(count(sql).several(), None, "{sql}");
    }
}

#[test]
fn several_rows_are_seen_with_the_reason() {
    for (sql, is_certain, words) in [
        ("select reward from t", true, "returns one per row of `t`"),
        (
            "select reward from t where reward > 1",
            false,
            "may return several: one per row of `t` that matches the condition",
        ),
        ("select reward from t limit 2", false, "may return 2"),
        ("values (1), (2)", true, "returns 2"),
        (
            "select max(reward) from t union all select 1.0",
            true,
            "returns 2",
        ),
        (
            "select reward from t union all select 1.0",
            false,
            "may return several: the rows of both sides of `union`",
        ),
        (
            "select max(reward) from t group by text",
            false,
            "may return several: one per group",
        ),
        (
            "select max(reward) from t where round > $round group by round",
            false,
            "may return several: one per group",
        ),
        (
            "select distinct reward from t",
            false,
            "may return several: one per distinct row",
        ),
        (
            "select unnest(make_array(1, 2))",
            false,
            "may return several: one per item of a list",
        ),
        (
            "select (select reward from t) > 1",
            true,
            "a subquery returns one per row of `t`",
        ),
        (
            "select max(reward) from t where reward > (select reward from u limit 3)",
            false,
            "a subquery may return 3",
        ),
    ] {
        let several = count(sql).several().unwrap_or_else(|| panic!("{sql}"));
        assert_eq!(
            (several.is_certain, &*several.words),
            (is_certain, words),
            "{sql}"
        );
    }
}

/// Returns the message for a query that is rejected in a pipeline.
fn refused(sql: &str) -> String {
    match plan(sql, &tables(), &[]) {
        Ok(_) => panic!("{sql} is planned"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_no_query_is_refused_by_its_name() {
    for (sql, name) in [
        ("show tables", "show tables"),
        ("describe t", "describe"),
        ("explain select 1", "explain"),
        ("explain analyze select 1", "explain"),
        ("create table a as select 1", "create table"),
        ("create view a as select 1", "create view"),
        ("insert into t values (1, 1, 'a')", "insert into"),
        ("drop table t", "drop table"),
        ("copy t to 'a.parquet'", "copy"),
        ("set a = 1", "set"),
    ] {
        let message = refused(sql);
        let expected =
            format!("`{name}` is not supported: write a query that begins with `select` or `with`");
        assert!(message.starts_with(&expected), "{sql}: {message}");
    }
}

#[test]
fn who_asks_by_hand_may_look_around_and_change_nothing() {
    let rows = RecordBatch::try_from_iter([(
        "reward",
        Arc::new(Float64Array::from(vec![1.0])) as arrow::array::ArrayRef,
    )]);
    let rows = rows.unwrap();
    let ask = |sql: &str| over(sql, &[], [("t", vec![rows.clone()])]);
    for sql in ["show tables", "describe t", "explain select * from t"] {
        assert!(ask(sql).is_ok(), "{sql}");
    }
    let message = ask("create table a as select 1").unwrap_err().to_string();
    assert_eq!(
        message,
        "`create table` is not supported: write a query that begins with `select` or `with`; \
         to write its rows to a file, use `--format parquet`"
    );
    let message = ask("explain select * from t tablesample (1 rows)")
        .unwrap_err()
        .to_string();
    assert!(message.starts_with("`tablesample`"), "{message}");
}

#[test]
fn errors_are_told_without_the_words_of_developers() {
    assert_eq!(
        refused("select * from prompt"),
        "there is no table `prompt`"
    );
    assert_eq!(
        refused("select * from t where round = $round"),
        "there is no `$round` here: only `rounds.stop_when` has a parameter, `$round`"
    );
    let params = [("round", Param::Integer(1))];
    let message = plan("select $a", &tables(), &params)
        .unwrap_err()
        .to_string();
    assert_eq!(message, "there is no `$a` here, only `$round`");
    assert_eq!(
        refused("select sum(text) from t"),
        "there is no function sum(Utf8); the signatures are sum(Decimal), sum(UInt64), sum(Int64), sum(Float64), …"
    );
    assert!(
        refused("select * from t cross join unnest(make_array(t.reward))")
            .contains("put `unnest` in")
    );
    // These are only detected by the analyzer, after planning.
    for sql in [
        "select sum(text) from t",
        "select reward + interval '1 day' from t",
        "select abs(text, 1) from t",
        "select text + make_array(1) from t",
        "select * from t where text",
        "select * from t where reward in (select reward, round from u)",
        "select (select reward from u where u.round = t.round) from t",
    ] {
        let message = refused(sql);
        for word in [
            "Optimizer",
            "bug",
            "caused by",
            "datafusion.public",
            "type_coercion",
        ] {
            assert!(!message.contains(word), "{sql}: {message}");
        }
    }
}

#[test]
fn names_are_quoted_where_sql_needs_it() {
    assert_eq!(identifier("pairs_2"), "pairs_2");
    assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
    for name in [
        "Pairs",
        "a-b",
        "order",
        "select",
        "a\"b",
        "a, b",
        "a where true",
        "1a",
    ] {
        let read = super::tables(&format!("select * from {} where 1 = 1", identifier(name)));
        assert_eq!(read.unwrap(), [name]);
    }
}
