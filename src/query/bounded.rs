//! A limit on the size of results of SQL functions (`repeat`, `replace`, `range`, …).
//!
//! DataFusion counts the memory of operators, not that of a function's result: `repeat(id, 9000000)` over a batch
//! of rows asks for more than there is, and the process ends. Here such a call is an error before the memory is
//! asked for. The functions do the same as DataFusion's otherwise.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Int64Type};
use datafusion::common::{DataFusionError, Result};
use datafusion::execution::FunctionRegistry as _;
use datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use datafusion::logical_expr::{
    ColumnarValue, Documentation, Expr, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF,
    ScalarUDFImpl, Signature,
};
use datafusion::prelude::SessionContext;

/// The most bytes, or items, that one call makes for a batch of rows.
const SIZE_MAX: u64 = 256 << 20;

/// The most pairs of characters that one call of `levenshtein` compares for a batch of rows.
const PAIRS_MAX: u64 = 1 << 32;

/// The size of a call's result for a row, from its arguments.
type SizeOfRow = fn(&[Argument], usize) -> u64;

/// The functions with a limit.
const BOUNDED: [(&str, SizeOfRow, u64); 10] = [
    (
        "repeat",
        |of, row| of[0].length(row).saturating_mul(of[1].count(row)),
        SIZE_MAX,
    ),
    ("lpad", padded, SIZE_MAX),
    ("rpad", padded, SIZE_MAX),
    ("replace", replaced, SIZE_MAX),
    (
        "array_repeat",
        |of, row| of[0].length(row).max(1).saturating_mul(of[1].count(row)),
        SIZE_MAX,
    ),
    ("array_resize", |of, row| of[1].count(row), SIZE_MAX),
    ("range", between, SIZE_MAX),
    ("generate_series", between, SIZE_MAX),
    (
        "levenshtein",
        |of, row| of[0].length(row).saturating_mul(of[1].length(row)),
        PAIRS_MAX,
    ),
    ("array_to_string", joined, SIZE_MAX),
];

/// The length that a text is padded to; a character has up to four bytes.
fn padded(of: &[Argument], row: usize) -> u64 {
    of[1].count(row).saturating_mul(4)
}

/// The length of a text in which each occurrence of another one is replaced by a longer one.
fn replaced(of: &[Argument], row: usize) -> u64 {
    let [text, from, to] = [0, 1, 2].map(|at| of.get(at).map_or(0, |it| it.length(row)));
    text.saturating_add((text / from.max(1)).saturating_mul(to))
}

/// The items from one number to another; with one argument, from 0.
fn between(of: &[Argument], row: usize) -> u64 {
    let number = |at: usize| of.get(at).and_then(|it| it.number(row));
    let (start, stop) = match of.len() {
        1 => (0, number(0).unwrap_or(0)),
        _ => (number(0).unwrap_or(0), number(1).unwrap_or(0)),
    };
    let step = number(2).unwrap_or(1).unsigned_abs().max(1);
    start.abs_diff(stop) / step
}

/// The text of a list, with a delimiter between its items.
fn joined(of: &[Argument], row: usize) -> u64 {
    let items = of[0].length(row);
    items.saturating_mul(of.get(1).map_or(0, |it| it.length(row)))
}

/// An argument of a call.
enum Argument {
    Numbers(ArrayRef),
    Texts(ArrayRef),
    Lists(ArrayRef),
    Other,
}

impl Argument {
    fn of(value: &ColumnarValue, rows: usize) -> Result<Self> {
        // One value for all rows stays one.
        let array = match value {
            ColumnarValue::Array(array) => Arc::clone(array),
            ColumnarValue::Scalar(scalar) => scalar.to_array_of_size(rows.min(1))?,
        };
        let of = array.data_type();
        Ok(if of.is_integer() {
            Self::Numbers(cast(&array, &DataType::Int64)?)
        } else if of.is_string() {
            Self::Texts(array)
        } else if matches!(of, DataType::List(_) | DataType::LargeList(_)) {
            Self::Lists(array)
        } else {
            Self::Other
        })
    }

    /// The integer in a row, if it is one.
    fn number(&self, row: usize) -> Option<i64> {
        let Self::Numbers(numbers) = self else {
            return None;
        };
        let row = row.min(numbers.len().checked_sub(1)?);
        let numbers = numbers.as_primitive::<Int64Type>();
        numbers.is_valid(row).then(|| numbers.value(row))
    }

    /// The same as a count: none below 0.
    fn count(&self, row: usize) -> u64 {
        self.number(row)
            .and_then(|it| it.try_into().ok())
            .unwrap_or(0)
    }

    /// The bytes of a text, or the items of a list; 8 for a number.
    fn length(&self, row: usize) -> u64 {
        let last = |array: &ArrayRef| row.min(array.len().saturating_sub(1));
        match self {
            Self::Texts(texts) if !texts.is_empty() => match texts.data_type() {
                DataType::Utf8 => texts.as_string::<i32>().value_length(last(texts)) as u64,
                DataType::LargeUtf8 => texts.as_string::<i64>().value_length(last(texts)) as u64,
                _ => u64::from(texts.as_string_view().views()[last(texts)] as u32),
            },
            Self::Lists(lists) if !lists.is_empty() => match lists.data_type() {
                DataType::List(_) => lists.as_list::<i32>().value_length(last(lists)) as u64,
                _ => lists.as_list::<i64>().value_length(last(lists)) as u64,
            },
            Self::Texts(_) | Self::Lists(_) => 0,
            Self::Numbers(_) | Self::Other => 8,
        }
    }
}

/// A function of DataFusion with a limit on the size of its result.
#[derive(Debug)]
struct Bounded {
    inner: Arc<ScalarUDF>,
    size: SizeOfRow,
    size_max: u64,
}

impl PartialEq for Bounded {
    fn eq(&self, other: &Self) -> bool {
        self.inner == other.inner
    }
}

impl Eq for Bounded {}

impl Hash for Bounded {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.inner.hash(state);
    }
}

impl ScalarUDFImpl for Bounded {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn aliases(&self) -> &[String] {
        self.inner.aliases()
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(arg_types)
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        self.inner.return_field_from_args(args)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arguments = args.args.iter();
        let arguments: Vec<Argument> = arguments
            .map(|value| Argument::of(value, args.number_rows))
            .collect::<Result<_>>()?;
        let is_one = args
            .args
            .iter()
            .all(|value| matches!(value, ColumnarValue::Scalar(_)));
        let rows = if is_one { 1 } else { args.number_rows };
        let mut size = 0_u64;
        for row in 0..rows {
            size = size.saturating_add((self.size)(&arguments, row));
        }
        if size > self.size_max {
            return Err(DataFusionError::Execution(format!(
                "`{}` is asked for {size} bytes or steps at once, and at most {} are made: make its arguments \
                 smaller",
                self.name(),
                self.size_max
            )));
        }
        self.inner.invoke_with_args(args)
    }

    fn simplify(&self, args: Vec<Expr>, info: &SimplifyContext) -> Result<ExprSimplifyResult> {
        self.inner.simplify(args, info)
    }

    fn short_circuits(&self) -> bool {
        self.inner.short_circuits()
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        self.inner.coerce_types(arg_types)
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.inner.documentation()
    }
}

/// Puts the functions with a limit in the place of those without.
pub fn register(context: &SessionContext) {
    for (name, size, size_max) in BOUNDED {
        if let Ok(inner) = context.udf(name) {
            context.register_udf(ScalarUDF::new_from_impl(Bounded {
                inner,
                size,
                size_max,
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{Param, QueryError, run};
    use arrow::util::display::array_value_to_string;

    fn first(sql: &str) -> Result<String, String> {
        let mut found = Vec::new();
        let params: [(&str, Param); 0] = [];
        run(
            sql,
            &params,
            &[],
            &[],
            None,
            |batch| -> Result<(), QueryError> {
                for row in 0..batch.num_rows() {
                    found.push(array_value_to_string(batch.column(0), row).unwrap());
                }
                Ok(())
            },
        )
        .map_err(|error| error.to_string())?;
        Ok(found.join(" "))
    }

    #[test]
    fn functions_do_as_before_below_their_limit() {
        for (sql, wanted) in [
            (
                "select repeat(a, b) from (values ('x', 2), ('yz', 3), (null, 1)) t(a, b)",
                "xx yzyzyz ",
            ),
            ("select lpad('7', 3, '0')", "007"),
            (
                "select rpad(a, 4, '.') from (values ('ab'), ('c')) t(a)",
                "ab.. c...",
            ),
            ("select replace('banana', 'a', 'oo')", "boonoonoo"),
            ("select cardinality(range(0, 10, 3))", "4"),
            ("select cardinality(generate_series(5))", "6"),
            ("select array_repeat('x', 2)", "[x, x]"),
            ("select levenshtein('kitten', 'sitting')", "3"),
            ("select array_to_string([1, 2, 3], '-')", "1-2-3"),
        ] {
            assert_eq!(first(sql).as_deref(), Ok(wanted), "{sql}");
        }
    }

    #[test]
    fn results_beyond_the_limit_are_refused_before_their_memory_is_asked_for() {
        for sql in [
            "select length(repeat(a, 9000000)) from (select repeat('x', 100) a from generate_series(1, 200))",
            "select length(\"repeat\"('x', 2000000001))",
            "select length(repeat('x', 1000000000 * 2))",
            "select length(lpad('x', 2000000000::bigint, 'y'))",
            "select length(replace(repeat('a', 9000000), 'a', repeat('b', 1000)))",
            "select cardinality(range(-2000000000, 2000000000))",
            "select cardinality(array_repeat(1, (2000000000)))",
            "select levenshtein(repeat('a', 9000000), repeat('b', 9000000))",
        ] {
            let refused = first(sql).unwrap_err();
            assert!(
                refused.contains("at most") || refused.contains("the maximum is"),
                "{sql}: {refused}"
            );
        }
    }
}
