//! Cancellation of running queries.
//!
//! DataFusion lets only the sources of a plan yield to other tasks. A join of few rows with themselves
//! reads these once, then computes for hours. So all operators of a plan yield here, and the conditions
//! of joins, which are computed many times before a row comes out, fail once a query is cancelled.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::RecordBatch;
use arrow::datatypes::{FieldRef, Schema};
use datafusion::common::tree_node::{Transformed, TreeNode as _};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::ColumnarValue;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::joins::utils::JoinFilter;
use datafusion::physical_plan::joins::{
    HashJoinExec, NestedLoopJoinExec, NestedLoopJoinExecBuilder,
};

/// Makes a plan end soon after `is_gone` becomes true, or its stream is dropped.
pub fn cancellable(
    plan: Arc<dyn ExecutionPlan>,
    is_gone: &Arc<AtomicBool>,
) -> Result<Arc<dyn ExecutionPlan>> {
    let changed = plan.transform_up(|operator| {
        if operator.children().is_empty() {
            return Ok(Transformed::no(operator));
        }
        let operator = with_checked_filter(operator, is_gone)?;
        Ok(Transformed::yes(
            Arc::new(CooperativeExec::new(operator)) as _
        ))
    });
    Ok(changed?.data)
}

/// Returns the operator with the condition of its join checked, if it has one.
fn with_checked_filter(
    operator: Arc<dyn ExecutionPlan>,
    is_gone: &Arc<AtomicBool>,
) -> Result<Arc<dyn ExecutionPlan>> {
    let checked = |filter: &JoinFilter| {
        let expression = Checked {
            inner: Arc::clone(filter.expression()),
            is_gone: Arc::clone(is_gone),
        };
        let columns = filter.column_indices().to_vec();
        JoinFilter::new(Arc::new(expression), columns, filter.schema().clone())
    };
    if let Some(join) = operator.downcast_ref::<NestedLoopJoinExec>()
        && let Some(filter) = join.filter()
    {
        let builder = NestedLoopJoinExecBuilder::from(join);
        return Ok(Arc::new(
            builder.with_filter(Some(checked(filter))).build()?,
        ));
    }
    if let Some(join) = operator.downcast_ref::<HashJoinExec>()
        && let Some(filter) = join.filter()
    {
        let builder = join.builder();
        return Ok(Arc::new(
            builder.with_filter(Some(checked(filter))).build()?,
        ));
    }
    Ok(operator)
}

/// An expression that fails once its query is cancelled.
#[derive(Debug)]
struct Checked {
    inner: Arc<dyn PhysicalExpr>,
    is_gone: Arc<AtomicBool>,
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl PartialEq for Checked {
    fn eq(&self, other: &Self) -> bool {
        self.inner.eq(&other.inner)
    }
}

impl Eq for Checked {}

impl Hash for Checked {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.inner.hash(state);
    }
}

impl PhysicalExpr for Checked {
    fn evaluate(&self, batch: &RecordBatch) -> Result<ColumnarValue> {
        if self.is_gone.load(Ordering::Relaxed) {
            return Err(DataFusionError::Execution(
                "the query was cancelled".to_owned(),
            ));
        }
        self.inner.evaluate(batch)
    }

    fn return_field(&self, schema: &Schema) -> Result<FieldRef> {
        self.inner.return_field(schema)
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.inner]
    }

    fn with_new_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn PhysicalExpr>>,
    ) -> Result<Arc<dyn PhysicalExpr>> {
        Ok(Arc::new(Self {
            inner: children.remove(0),
            is_gone: Arc::clone(&self.is_gone),
        }))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt_sql(f)
    }
}
