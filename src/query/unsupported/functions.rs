//! Rejection of clauses in function calls that the kind of the function ignores.

use datafusion::sql::sqlparser::ast::{
    DuplicateTreatment, Function, FunctionArgumentClause, FunctionArgumentList, FunctionArguments,
    WindowType,
};

use super::{Found, Search, first, ignored, of_window};

/// The kind of a function, which determines the clauses that have an effect.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Planned {
    Scalar,
    Aggregate,
    /// A window function, or an aggregate with a window function of the same name.
    Window,
    /// An unknown function.
    Unknown,
}

impl Planned {
    /// True if the function `name` accepts `distinct` and ignores it.
    fn ignores_distinct(self, name: &str) -> bool {
        match self {
            Self::Scalar | Self::Window => true,
            Self::Aggregate => NO_DISTINCT.iter().any(|one| name.starts_with(one)),
            Self::Unknown => false,
        }
    }
}

/// The clauses in the argument list of a call, of those that may be ignored.
#[derive(Default)]
struct ArgumentClauses {
    is_distinct: bool,
    has_order: bool,
    has_nulls: bool,
}

impl ArgumentClauses {
    fn of(args: &FunctionArguments) -> Self {
        let mut found = Self::default();
        if let FunctionArguments::List(FunctionArgumentList {
            duplicate_treatment,
            args: _,
            clauses,
        }) = args
        {
            found.is_distinct = *duplicate_treatment == Some(DuplicateTreatment::Distinct);
            for clause in clauses {
                // The planner rejects the others.
                found.has_order |= matches!(clause, FunctionArgumentClause::OrderBy(_));
                found.has_nulls |=
                    matches!(clause, FunctionArgumentClause::IgnoreOrRespectNulls(_));
            }
        }
        found
    }
}

/// Aggregates that accept `distinct` and ignore it.
const NO_DISTINCT: [&str; 5] = [
    "corr",
    "covar",
    "regr_",
    "approx_percentile_cont",
    "nth_value",
];
/// Window functions for which `ignore nulls` has an effect.
const WITH_NULLS: [&str; 5] = ["lag", "lead", "first_value", "last_value", "nth_value"];

impl Search<'_> {
    pub(super) fn of_function(&self, function: &Function) -> Found {
        let Function {
            name,
            uses_odbc_syntax: _,
            parameters,
            args,
            filter,
            null_treatment,
            over,
            within_group,
        } = function;
        let name = name.to_string().to_lowercase();
        let named = self.of_named_window(function, &name);
        if named.is_some() {
            return named;
        }
        let clauses = ArgumentClauses::of(args);
        let has_nulls = clauses.has_nulls || null_treatment.is_some();
        let planned = self.planned(&name, over.is_some());
        let is_scalar = planned == Planned::Scalar;
        let instead = if is_scalar {
            "the function computes one value for each row, so leave it out; \
             `case when … end` computes it for some rows"
        } else {
            "select the rows in a subquery in `from`"
        };
        let call = |rest: &str| format!("{name}{rest}");
        first([
            (
                *parameters != FunctionArguments::None,
                &call("(…)(…)"),
                "pass all arguments in one pair of parentheses",
            ),
            (
                is_scalar && clauses.has_order,
                &call("(… order by …)"),
                instead,
            ),
            (
                is_scalar && filter.is_some(),
                &call("(…) filter (…)"),
                instead,
            ),
            (is_scalar && over.is_some(), &call("(…) over (…)"), instead),
            (
                is_scalar && !within_group.is_empty(),
                &call("(…) within group (…)"),
                instead,
            ),
            (
                clauses.is_distinct && planned.ignores_distinct(&name),
                &call("(distinct …)"),
                instead,
            ),
            (
                has_nulls && self.ignores_nulls(planned, &name),
                &call("(…) ignore nulls"),
                instead,
            ),
        ])
    }

    /// Checks for a window by name that the planner does not resolve.
    fn of_named_window(&self, function: &Function, name: &str) -> Found {
        match &function.over {
            Some(WindowType::NamedWindow(window))
                if !self.planned_windows.contains(&std::ptr::from_ref(function)) =>
            {
                let instead = format!(
                    "`{window}` is only known in the `select` list; use an alias of the column there, or \
                     write out the window"
                );
                ignored(&format!("{name}(…) over {window}"), &instead)
            }
            Some(WindowType::WindowSpec(window)) => of_window(window),
            _ => None,
        }
    }

    /// True if the function accepts `ignore nulls` and ignores it.
    fn ignores_nulls(&self, planned: Planned, name: &str) -> bool {
        match planned {
            Planned::Scalar => true,
            Planned::Window => !WITH_NULLS.contains(&name),
            Planned::Aggregate => {
                let aggregate = &self.state.aggregate_functions()[name];
                !aggregate.supports_null_handling_clause()
            }
            Planned::Unknown => false,
        }
    }

    /// Returns the planner's choice among functions of one name.
    fn planned(&self, name: &str, is_over: bool) -> Planned {
        let has_scalar = self.state.scalar_functions().contains_key(name)
            || self.state.higher_order_functions().contains_key(name)
            || ["unnest", "unnest_outer"].contains(&name);
        let has_aggregate = self.state.aggregate_functions().contains_key(name);
        let has_window = self.state.window_functions().contains_key(name);
        let rather_window = ["first_value", "last_value", "nth_value"].contains(&name);
        match (has_scalar, has_aggregate, has_window) {
            (true, ..) => Planned::Scalar,
            (_, true, has_window) if !(is_over && has_window && rather_window) => {
                Planned::Aggregate
            }
            (_, _, true) if is_over => Planned::Window,
            _ => Planned::Unknown,
        }
    }
}
