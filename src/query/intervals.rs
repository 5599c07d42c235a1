//! Rejection of interval comparisons: DataFusion compares months, days and the rest separately, so
//! that 25 hours are less than a day.

use arrow::datatypes::DataType;
use datafusion::common::DFSchema;
use datafusion::common::tree_node::{TreeNode as _, TreeNodeRecursion};
use datafusion::logical_expr::{Expr, ExprSchemable as _, LogicalPlan, Operator};

use super::interface::QueryError;
use super::words::error;

/// Rejects a plan that compares, sorts by, or groups by intervals, or takes their minimum or
/// maximum.
pub fn refuse_compared(plan: &LogicalPlan) -> Result<(), QueryError> {
    let mut is_compared = false;
    let walked = plan.apply_with_subqueries(|node| {
        let mut schema = DFSchema::empty();
        for input in node.inputs() {
            schema.merge(input.schema());
        }
        let is_interval = |expression: &Expr| {
            let found = expression.get_type(&schema);
            matches!(found, Ok(DataType::Interval(_)))
        };
        if let LogicalPlan::Sort(sort) = node {
            is_compared |= sort.expr.iter().any(|by| is_interval(&by.expr));
        }
        node.apply_expressions(|expression| {
            expression.apply(|part| {
                is_compared |= match part {
                    Expr::BinaryExpr(binary) if compares(binary.op) => {
                        is_interval(&binary.left) && is_interval(&binary.right)
                    }
                    Expr::Between(between) => is_interval(&between.expr),
                    Expr::AggregateFunction(aggregate) => {
                        let name = aggregate.func.name();
                        let compares =
                            matches!(name, "min" | "max" | "median") || aggregate.params.distinct;
                        compares && aggregate.params.args.iter().any(is_interval)
                    }
                    _ => false,
                };
                Ok(TreeNodeRecursion::Continue)
            })
        })
    });
    walked.map_err(error)?;
    if is_compared {
        return Err(QueryError::Other(
            "comparing intervals is not supported (DataFusion compares their months, days and hours separately): \
             compare numbers, such as date_part('epoch', …)"
                .to_owned(),
        ));
    }
    Ok(())
}

fn compares(operator: Operator) -> bool {
    use Operator::{Eq, Gt, GtEq, IsDistinctFrom, IsNotDistinctFrom, Lt, LtEq, NotEq};
    matches!(
        operator,
        Eq | NotEq | Lt | LtEq | Gt | GtEq | IsDistinctFrom | IsNotDistinctFrom
    )
}

#[cfg(test)]
mod tests {
    use crate::plan;

    #[test]
    fn intervals_are_computed_with_and_not_compared() {
        for (sql, is_refused) in [
            ("select interval '25 hours' > interval '1 day' as a", true),
            ("select interval '1 day' = interval '24 hours' as a", true),
            (
                "select a from (select interval '1 day' as a) order by a",
                true,
            ),
            (
                "select max(a) as b from (select interval '1 day' as a)",
                true,
            ),
            (
                "select (select 1 where interval '1 day' < interval '2 days') as a",
                true,
            ),
            ("select now() - interval '1 day' < now() as a", false),
            ("select interval '1 day' + interval '2 days' as a", false),
            (
                "select date_part('epoch', interval '1 day') > 1 as a",
                false,
            ),
        ] {
            assert_eq!(plan(sql, &[], &[]).is_err(), is_refused, "{sql}");
        }
    }
}
