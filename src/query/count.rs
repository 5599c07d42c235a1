//! Static bounds on the number of rows that a query returns.

use std::ops::ControlFlow;

use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{Expr, FetchType, JoinType, LogicalPlan, Operator};

/// The bounds on a query's number of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowCount {
    rows: Rows,
    /// The reason why a scalar subquery may return several rows.
    of_subquery: Option<Several>,
}

/// The reason why a query that must return one row does not, or may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Several {
    /// The continuation of "the query must return one row, and …".
    pub words: String,
    /// True if it returns several rows whenever its tables have several.
    pub is_certain: bool,
}

impl RowCount {
    pub fn of(plan: &LogicalPlan) -> Self {
        Self {
            rows: Rows::of(plan),
            of_subquery: of_subqueries(plan),
        }
    }

    /// True if the query returns at least one row for any content of its tables.
    pub fn is_never_empty(&self) -> bool {
        self.rows.least > 0
    }

    /// Returns the reason why there may be several rows; `None` if there is at most one, or if this
    /// is unknown.
    pub fn several(&self) -> Option<Several> {
        self.rows.several().or_else(|| self.of_subquery.clone())
    }
}

/// The lower and upper bound on the rows of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rows {
    least: usize,
    most: Most,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Most {
    Number(usize),
    /// One for each row of a table.
    EachOf(String),
    /// Several, with the reason as text.
    Several(String),
    /// Unknown: it depends on more than the plan shows, such as the number of matching rows of two
    /// tables.
    Unknown,
}

impl Rows {
    fn exactly(number: usize) -> Self {
        Self {
            least: number,
            most: Most::Number(number),
        }
    }

    fn up_to(most: Most) -> Self {
        Self { least: 0, most }
    }

    fn of(plan: &LogicalPlan) -> Self {
        match plan {
            LogicalPlan::Projection(it) => Self::of(&it.input),
            LogicalPlan::SubqueryAlias(it) => Self::of(&it.input),
            LogicalPlan::Window(it) => Self::of(&it.input),
            LogicalPlan::Sort(it) => Self::of(&it.input).limited(it.fetch),
            LogicalPlan::Limit(it) => {
                let fetch = match it.get_fetch_type() {
                    Ok(FetchType::Literal(fetch)) => fetch,
                    _ => None,
                };
                let rows = Self::of(&it.input).limited(fetch);
                Self {
                    least: if it.skip.is_some() { 0 } else { rows.least },
                    most: rows.most,
                }
            }
            LogicalPlan::Filter(it) => Self::of(&it.input).filtered(),
            LogicalPlan::TableScan(it) => {
                let table = it.table_name.table().to_owned();
                Self::up_to(Most::EachOf(table)).limited(it.fetch)
            }
            LogicalPlan::Aggregate(it) if it.group_expr.is_empty() => Self::exactly(1),
            LogicalPlan::Aggregate(it) if is_one_group(&it.group_expr, &it.input) => {
                Self::up_to(Most::Number(1))
            }
            LogicalPlan::Aggregate(it) => Self::of(&it.input).grouped("one per group"),
            LogicalPlan::Distinct(it) => Self::of(it.input()).grouped("one per distinct row"),
            LogicalPlan::Unnest(it) => Self::of(&it.input).grouped("one per item of a list"),
            LogicalPlan::Values(it) => Self::exactly(it.values.len()),
            LogicalPlan::EmptyRelation(it) => Self::exactly(it.produce_one_row.into()),
            LogicalPlan::Union(it) => {
                let sides = it.inputs.iter().map(|side| Self::of(side));
                sides.reduce(Self::and).unwrap_or(Self::exactly(0))
            }
            LogicalPlan::Join(it) => {
                let [left, right] = [&it.left, &it.right].map(|side| Self::of(side));
                let is_cross = it.on.is_empty() && it.filter.is_none();
                left.joined(right, it.join_type, is_cross)
            }
            _ => Self::up_to(Most::Unknown),
        }
    }

    fn limited(self, fetch: Option<usize>) -> Self {
        let Some(fetch) = fetch else {
            return self;
        };
        let most = match self.most {
            Most::Number(number) => number.min(fetch),
            Most::Unknown if fetch > 1 => return Self::up_to(Most::Unknown),
            _ => fetch,
        };
        Self {
            least: self.least.min(fetch),
            most: Most::Number(most),
        }
    }

    fn filtered(self) -> Self {
        Self::up_to(match self.most {
            Most::EachOf(table) => Most::Several(format!(
                "one per row of `{table}` that matches the condition"
            )),
            most => most,
        })
    }

    /// Applies an operation that merges rows or multiplies them.
    fn grouped(self, reason: &str) -> Self {
        match self.most {
            Most::Number(0 | 1) if !reason.ends_with("list") => self,
            _ => Self::up_to(Most::Several(reason.to_owned())),
        }
    }

    /// Adds the rows of both sides of a `union`.
    fn and(self, other: Self) -> Self {
        let most = match (self.most, other.most) {
            (Most::Number(one), Most::Number(two)) => Most::Number(one + two),
            (Most::Unknown, _) | (_, Most::Unknown) => Most::Unknown,
            _ => Most::Several("the rows of both sides of `union`".to_owned()),
        };
        Self {
            least: self.least + other.least,
            most,
        }
    }

    fn joined(self, other: Self, kind: JoinType, is_cross: bool) -> Self {
        let most = match (self.most, other.most, kind) {
            (most, _, JoinType::LeftSemi | JoinType::LeftAnti | JoinType::LeftMark) => most,
            (Most::Number(one), Most::Number(two), kind) if kind != JoinType::Full => {
                Most::Number(one.max(1) * two.max(1))
            }
            _ => Most::Unknown,
        };
        let least = if is_cross {
            self.least * other.least
        } else {
            0
        };
        Self { least, most }
    }

    fn several(&self) -> Option<Several> {
        let said = |is_certain: bool, words: String| Some(Several { words, is_certain });
        match (self.least, &self.most) {
            (_, Most::Number(0 | 1)) => None,
            (least, Most::Number(most)) if least == *most => said(true, format!("returns {most}")),
            (_, Most::EachOf(table)) => said(true, format!("returns one per row of `{table}`")),
            (2.., _) => said(true, "returns several".to_owned()),
            (_, Most::Number(most)) => said(false, format!("may return {most}")),
            (_, Most::Several(reason)) => said(false, format!("may return several: {reason}")),
            (_, Most::Unknown) => None,
        }
    }
}

/// True if a condition on the grouped rows leaves a single group: each grouping column equals an
/// expression that does not depend on the row.
fn is_one_group(group: &[Expr], input: &LogicalPlan) -> bool {
    let LogicalPlan::Filter(filter) = input else {
        return false;
    };
    let conditions = split_conjunction(&filter.predicate);
    group.iter().all(|column| {
        matches!(column, Expr::Column(_))
            && conditions.iter().any(|condition| {
                let Expr::BinaryExpr(equal) = condition else {
                    return false;
                };
                let (left, right) = (&*equal.left, &*equal.right);
                equal.op == Operator::Eq
                    && ((left == column && right.column_refs().is_empty())
                        || (right == column && left.column_refs().is_empty()))
            })
    })
}

/// Returns the first scalar subquery that may return several rows.
fn of_subqueries(plan: &LogicalPlan) -> Option<Several> {
    let mut found = None;
    let mut look = |expression: &Expr| {
        if let Expr::ScalarSubquery(subquery) = expression
            && let Some(several) = Rows::of(&subquery.subquery).several()
        {
            found = Some(Several {
                words: format!("a subquery {}", several.words),
                is_certain: several.is_certain,
            });
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    };
    let walked = plan.apply_with_subqueries(|node| {
        node.apply_expressions(|expression| {
            expression.apply(|expression| {
                Ok(match look(expression) {
                    ControlFlow::Break(()) => TreeNodeRecursion::Stop,
                    ControlFlow::Continue(()) => TreeNodeRecursion::Continue,
                })
            })
        })
    });
    walked.expect("the visitor never fails");
    found
}
