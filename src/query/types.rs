//! Traversal of the nested types of a result's columns.

use arrow::datatypes::{DataType, SchemaRef};

/// Visits the types of all columns and their nested types, each with its path: `pair.x`.
pub fn each_type<E>(
    schema: &SchemaRef,
    look: &mut dyn FnMut(&str, &DataType) -> Result<(), E>,
) -> Result<(), E> {
    let mut columns = schema.fields().iter();
    columns.try_for_each(|column| look_within(column.name(), column.data_type(), look))
}

/// Visits a type and its nested types, each with its path.
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

/// Returns the error message for a struct with two fields of the same name, since file readers keep
/// only one of them, or rename one.
pub fn equal_fields(path: &str, of: &DataType) -> Option<String> {
    let DataType::Struct(fields) = of else {
        return None;
    };
    fields.iter().find_map(|field| {
        let name = field.name();
        let count = fields.iter().filter(|other| other.name() == name).count();
        (count > 1).then(|| {
            format!(
                "{count} fields of `{path}` are called `{name}`; give each a unique name: \
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
        let words = crate::plan(sql, &[], &[]).unwrap_err().to_string();
        assert!(
            words.starts_with("2 fields of `s` are called `a`"),
            "{words}"
        );
    }
}
