//! Rejection of SQL clauses that DataFusion parses and then ignores, and of operators that it
//! computes incorrectly. The result of such a query would not be what it asks for.
//!
//! The list comes from reading datafusion-sql 55.2 (`query.rs`, `select.rs`, `cte.rs`,
//! `relation/mod.rs`, `expr/function.rs`, `planner.rs`) along with the syntax tree of sqlparser
//! 0.62. The structs are destructured field by field, so that a field added by a later version
//! breaks the build; a field that is skipped (`_`) is planned, rejected by the planner, or not
//! parsed in the generic dialect. Hints in comments are ignored, as comments are.

mod functions;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::ops::ControlFlow;

use datafusion::execution::session_state::SessionState;
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::{
    ArrayElemTypeDef, BinaryOperator, Cte, DataType, ExactNumberInfo, Expr, Function, FunctionArg,
    GroupByExpr, Join, NamedWindowExpr, PipeOperator, Query, Select, SelectItem, SetExpr,
    SetOperator, SetQuantifier, TableAlias, TableFactor, Visit as _, Visitor, WindowSpec,
    visit_expressions,
};

/// An ignored clause, as an error message with a fix.
type Found = Option<String>;

/// Returns the first clause of a statement that would be ignored.
pub fn find(statement: &Statement, state: &SessionState) -> Found {
    let statement = match statement {
        Statement::Statement(statement) => statement,
        Statement::Explain(explain) => return find(&explain.statement, state),
        // These are rejected as a whole: queries are read-only.
        Statement::CreateExternalTable(_) | Statement::CopyTo(_) | Statement::Reset(_) => {
            return None;
        }
    };
    let mut search = Search {
        state,
        planned_windows: HashSet::new(),
    };
    match statement.visit(&mut search) {
        ControlFlow::Break(found) => Some(found),
        ControlFlow::Continue(()) => None,
    }
}

/// Returns the error message for an ignored clause.
fn ignored(clause: &str, instead: &str) -> Found {
    Some(format!(
        "`{clause}` is not supported (DataFusion parses and ignores it): {instead}"
    ))
}

/// Returns the error message for an operator that is computed incorrectly.
fn wrong(operator: &str, computed: &str, instead: &str) -> Found {
    Some(format!(
        "`{operator}` is not supported (DataFusion computes it as {computed}): {instead}"
    ))
}

/// The fix for a clause that has no effect here.
const LEAVE_OUT: &str = "leave it out";

/// Returns the error for the first clause that is present; each has its fix.
fn first<const N: usize>(clauses: [(bool, &str, &str); N]) -> Found {
    let found = clauses.into_iter().find(|(is_there, ..)| *is_there);
    found.and_then(|(_, clause, instead)| ignored(clause, instead))
}

struct Search<'s> {
    state: &'s SessionState,
    /// The calls `f(…) over w` whose window the planner resolves: those of a select list, by their
    /// address in the tree.
    planned_windows: HashSet<*const Function>,
}

fn step(found: Found) -> ControlFlow<String> {
    found.map_or(ControlFlow::Continue(()), ControlFlow::Break)
}

impl Visitor for Search<'_> {
    type Break = String;

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<String> {
        step(of_query(query))
    }

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<String> {
        for item in &select.projection {
            let (SelectItem::UnnamedExpr(item) | SelectItem::ExprWithAlias { expr: item, .. }) =
                item
            else {
                continue;
            };
            let _: ControlFlow<()> = visit_expressions(item, |expression| {
                if let Expr::Function(function) = expression {
                    self.planned_windows.insert(std::ptr::from_ref(function));
                }
                ControlFlow::Continue(())
            });
        }
        step(of_select(select))
    }

    fn pre_visit_table_factor(&mut self, table: &TableFactor) -> ControlFlow<String> {
        step(of_table(table))
    }

    fn pre_visit_expr(&mut self, expression: &Expr) -> ControlFlow<String> {
        step(match expression {
            Expr::Function(function) => self.of_function(function),
            Expr::BinaryOp {
                op: BinaryOperator::BitwiseXor,
                ..
            } => wrong("^", "a bitwise xor", "for a power, write power(2, 3)"),
            Expr::BinaryOp { left, op, right }
                if is_comparison(op)
                    && [left, right]
                        .iter()
                        .any(|side| matches!(***side, Expr::Tuple(_))) =>
            {
                wrong(
                    "(…, …) < (…, …)",
                    "a comparison in which null sorts first",
                    "compare the values one by one: a < 1 or (a = 1 and b < 2)",
                )
            }
            Expr::SimilarTo { .. } => wrong(
                "similar to",
                "a regular expression that may match anywhere",
                "write `like '…%'`, or a regular expression: ~ '^(…)$'",
            ),
            Expr::Cast { data_type, .. } => of_type(data_type),
            Expr::TypedString(text) => of_type(&text.data_type),
            Expr::Trim {
                trim_characters: Some(characters),
                ..
            } => first([(
                characters.len() > 1,
                "trim(…, …, …)",
                "pass all characters to remove as one string: trim(both 'xy' from …)",
            )]),
            _ => None,
        })
    }
}

fn is_comparison(operator: &BinaryOperator) -> bool {
    use BinaryOperator::{Eq, Gt, GtEq, Lt, LtEq, NotEq};
    matches!(operator, Eq | NotEq | Lt | LtEq | Gt | GtEq)
}

fn of_query(query: &Query) -> Found {
    let Query {
        with,
        body,
        order_by: _,
        limit_clause: _,
        fetch: _,
        locks,
        for_clause,
        settings,
        format_clause,
        pipe_operators,
    } = query;
    let ctes = with.iter().flat_map(|with| {
        let ctes = with.cte_tables.iter();
        ctes.filter_map(|cte| of_cte(cte, with.recursive))
    });
    let for_clause = for_clause.as_ref().map(ToString::to_string);
    first([
        (
            !locks.is_empty(),
            "for update",
            "tables are read-only, so leave it out",
        ),
        (
            for_clause.is_some(),
            &for_clause.unwrap_or_default().to_lowercase(),
            "the format is an option of the command, such as `--format json`",
        ),
        (settings.is_some(), "settings", LEAVE_OUT),
        (
            format_clause.is_some(),
            "format",
            "the format is an option of the command, such as `--format csv`",
        ),
    ])
    .or_else(|| of_set(body))
    .or_else(|| pipe_operators.iter().find_map(of_pipe))
    .or_else(|| ctes.into_iter().next())
}

/// Checks for set operations that keep duplicate rows. DataFusion plans them as joins, which do not
/// count duplicates.
fn of_set(body: &SetExpr) -> Found {
    let SetExpr::SetOperation {
        left,
        op,
        set_quantifier,
        right,
    } = body
    else {
        return None;
    };
    let instead = "leave out `all`, or number duplicate rows with row_number() over (partition by …) on both sides";
    match (op, set_quantifier) {
        (SetOperator::Except | SetOperator::Minus, SetQuantifier::All) => {
            let computed = "all rows that are not on the other side, regardless of their counts";
            wrong("except all", computed, instead)
        }
        (SetOperator::Intersect, SetQuantifier::All) => {
            let computed = "all rows that are also on the other side, regardless of their counts";
            wrong("intersect all", computed, instead)
        }
        _ => of_set(left).or_else(|| of_set(right)),
    }
}

fn of_cte(cte: &Cte, is_recursive: bool) -> Found {
    let Cte {
        alias,
        query,
        from,
        materialized: _,
        closing_paren_token: _,
    } = cte;
    let name = &alias.name;
    let is_union = matches!(
        *query.body,
        SetExpr::SetOperation {
            op: SetOperator::Union,
            ..
        }
    );
    // In a recursive query, only the two sides of its `union` are planned.
    let is_cut = is_recursive && is_union;
    let outside = format!("put it into the query that reads `{name}`");
    let behind = format!("put `from` after `select`, not after the query `{name}`");
    first([
        (is_cut && query.limit_clause.is_some(), "limit", &outside),
        (is_cut && query.fetch.is_some(), "fetch", &outside),
        (is_cut && query.order_by.is_some(), "order by", &outside),
        (is_cut && !query.pipe_operators.is_empty(), "|>", &outside),
        (
            is_cut && query.with.is_some(),
            "with",
            "put it next to the recursive query",
        ),
        (from.is_some(), "with … from", &behind),
    ])
    .or_else(|| of_alias(Some(alias)))
}

fn of_pipe(operator: &PipeOperator) -> Found {
    match operator {
        PipeOperator::Aggregate {
            full_table_exprs,
            group_by_expr,
        } => {
            let mut all = full_table_exprs.iter().chain(group_by_expr);
            let is_ordered =
                all.any(|one| one.order_by.asc.is_some() || one.order_by.nulls_first.is_some());
            first([(
                is_ordered,
                "|> aggregate … asc",
                "add `|> order by …` after it",
            )])
        }
        PipeOperator::Join(join) => of_join(join),
        _ => None,
    }
}

fn of_select(select: &Select) -> Found {
    let Select {
        select_token: _,
        optimizer_hints: _,
        distinct: _,
        select_modifiers: _,
        top: _,
        top_before_distinct: _,
        projection: _,
        exclude: _,
        into,
        from,
        lateral_views: _,
        prewhere,
        selection: _,
        connect_by,
        group_by,
        cluster_by: _,
        distribute_by,
        sort_by: _,
        having: _,
        named_window,
        qualify: _,
        window_before_qualify: _,
        value_table_mode: _,
        flavor: _,
    } = select;
    let (GroupByExpr::All(modifiers) | GroupByExpr::Expressions(_, modifiers)) = group_by;
    let modifier = modifiers
        .first()
        .map(ToString::to_string)
        .unwrap_or_default();
    let mut windows = named_window.iter().map(|window| &window.1);
    let mut joins = from.iter().flat_map(|table| &table.joins);
    first([
        (
            into.is_some(),
            "into",
            "queries are read-only; to write the rows to a file, use `--format parquet`",
        ),
        (
            prewhere.is_some(),
            "prewhere",
            "put the condition into `where`",
        ),
        (
            !connect_by.is_empty(),
            "connect by",
            "write it as `with recursive … as (… union all …)`",
        ),
        (
            !modifiers.is_empty(),
            &format!("group by … {modifier}").to_lowercase(),
            "use the function syntax: group by rollup(…), cube(…) or grouping sets (…)",
        ),
        (!distribute_by.is_empty(), "distribute by", LEAVE_OUT),
    ])
    .or_else(|| {
        windows.find_map(|window| match window {
            NamedWindowExpr::WindowSpec(window) => of_window(window),
            NamedWindowExpr::NamedWindow(_) => None,
        })
    })
    .or_else(|| joins.find_map(of_join))
}

fn of_join(join: &Join) -> Found {
    let Join {
        relation: _,
        global,
        join_operator: _,
    } = join;
    first([(*global, "global join", "leave out `global`")])
}

/// The fix that samples a tenth of the rows.
const SAMPLE: &str = "`where md5(prompt_id) < '1a'` takes about a tenth of the rows, the same ones \
                      every time";
const NUMBER_ROWS: &str = "number the rows with row_number() over ()";

fn of_table(table: &TableFactor) -> Found {
    match table {
        TableFactor::Table {
            name: _,
            alias,
            args,
            with_hints,
            version: _,
            with_ordinality,
            partitions,
            json_path: _,
            sample,
            index_hints: _,
        } => {
            let has_settings = args.as_ref().is_some_and(|args| args.settings.is_some());
            first([
                (sample.is_some(), "tablesample", SAMPLE),
                (*with_ordinality, "with ordinality", NUMBER_ROWS),
                (!with_hints.is_empty(), "with (…) after a table", LEAVE_OUT),
                (
                    !partitions.is_empty(),
                    "partition (…)",
                    "filter the rows with `where`",
                ),
                (has_settings, "settings", LEAVE_OUT),
            ])
            .or_else(|| of_alias(alias.as_ref()))
        }
        TableFactor::Derived {
            lateral: _,
            subquery: _,
            alias,
            sample,
        } => {
            first([(sample.is_some(), "tablesample", SAMPLE)]).or_else(|| of_alias(alias.as_ref()))
        }
        TableFactor::Function {
            lateral: _,
            name: _,
            args,
            with_ordinality,
            alias,
        } => {
            let is_named = |arg: &FunctionArg| !matches!(arg, FunctionArg::Unnamed(_));
            first([
                (*with_ordinality, "with ordinality", NUMBER_ROWS),
                (
                    args.iter().any(is_named),
                    "name => value",
                    "pass the arguments by position, without names",
                ),
            ])
            .or_else(|| of_alias(alias.as_ref()))
        }
        TableFactor::UNNEST { alias, .. } => of_alias(alias.as_ref()),
        TableFactor::NestedJoin {
            table_with_joins,
            alias,
        } => {
            let mut joins = table_with_joins.joins.iter();
            joins.find_map(of_join).or_else(|| of_alias(alias.as_ref()))
        }
        // The planner rejects all others.
        _ => None,
    }
}

fn of_alias(alias: Option<&TableAlias>) -> Found {
    let TableAlias {
        explicit: _,
        name: _,
        columns,
        at: _,
    } = alias?;
    first([(
        columns.iter().any(|column| column.data_type.is_some()),
        "a type in a list of column names",
        "cast the column in the `select` list",
    )])
}

fn of_window(window: &WindowSpec) -> Found {
    let WindowSpec {
        window_name,
        partition_by: _,
        order_by: _,
        window_frame: _,
    } = window;
    let name = window_name.as_ref()?;
    let instead = format!("write out the definition of `{name}`");
    ignored(&format!("({name} …) as a window"), &instead)
}

/// Checks for types whose length or precision would be ignored.
fn of_type(data_type: &DataType) -> Found {
    match data_type {
        DataType::Varchar(Some(_)) | DataType::Char(Some(_)) | DataType::String(Some(_)) => {
            let instead = "strings have no maximum length here; truncate them with left(…, 10)";
            ignored(&data_type.to_string().to_lowercase(), instead)
        }
        DataType::Float(info) if !matches!(info, ExactNumberInfo::None) => {
            let instead = "cast to real (32 bits) or double (64 bits)";
            ignored(&data_type.to_string().to_lowercase(), instead)
        }
        DataType::Array(
            ArrayElemTypeDef::AngleBracket(element)
            | ArrayElemTypeDef::SquareBracket(element, _)
            | ArrayElemTypeDef::Parenthesis(element),
        ) => of_type(element),
        DataType::Struct(fields, _) => fields.iter().find_map(|field| of_type(&field.field_type)),
        _ => None,
    }
}
