//! The types within the columns of a result.

use arrow::datatypes::{DataType, SchemaRef};

/// Looks at the types of all columns and at those within them, each with its path: `pair.x`.
pub fn each_type<E>(
    schema: &SchemaRef,
    look: &mut dyn FnMut(&str, &DataType) -> Result<(), E>,
) -> Result<(), E> {
    let mut columns = schema.fields().iter();
    columns.try_for_each(|column| look_within(column.name(), column.data_type(), look))
}

/// Looks at a type and at those within it, each with its path.
pub fn look_within<E>(
    path: &str,
    of: &DataType,
    look: &mut dyn FnMut(&str, &DataType) -> Result<(), E>,
) -> Result<(), E> {
    look(path, of)?;
    match of {
        DataType::Struct(fields) => fields.iter().try_for_each(|field| {
            look_within(&format!("{path}.{}", field.name()), field.data_type(), look)
        }),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _)
        | DataType::Map(item, _) => look_within(path, item.data_type(), look),
        DataType::Dictionary(_, values) => look_within(path, values, look),
        _ => Ok(()),
    }
}

/// The error message about a struct with two fields of the same name: readers of files keep one of them, or
/// rename one.
pub fn equal_fields(path: &str, of: &DataType) -> Option<String> {
    let DataType::Struct(fields) = of else {
        return None;
    };
    fields.iter().find_map(|field| {
        let name = field.name();
        let count = fields.iter().filter(|other| other.name() == name).count();
        (count > 1).then(|| {
            format!(
                "{count} fields of `{path}` are called `{name}`; give each a name of its own: \
                 named_struct('{name}_1', …, '{name}_2', …)"
            )
        })
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_table_of_structs_with_equal_fields_is_not_planned() {
        let sql = "select [named_struct('a', 1, 'a', 2)] as s";
        let words = crate::plan(sql, &[], &[]).unwrap_err().0;
        assert!(
            words.starts_with("2 fields of `s` are called `a`"),
            "{words}"
        );
    }
}
