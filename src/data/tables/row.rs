//! Conversion between Rust rows and Arrow columns.
//!
//! [`rows!`] declares a row type once: the struct, its Arrow schema with the doc comments as
//! metadata, and both conversions are generated from the same list of fields.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Float32Array, Float64Array, Int32Array,
    Int64Array, ListArray, MapBuilder, MapFieldNames, RecordBatch, StringArray, StringBuilder,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::compute::{can_cast_types, cast};
use arrow::datatypes::{
    DataType, Field, FieldRef, Float32Type, Float64Type, Int32Type, Int64Type, Schema, SchemaRef,
};

/// Metadata key of a field's documentation.
const DOC: &str = "doc";
/// Metadata key of measured columns, such as seconds, which differ from run to run.
const MEASURED: &str = "measured";

/// A row type: one kind of table.
pub trait Row: Sized + Send + Sync + 'static {
    /// Name of the kind, in the singular: `candidate`.
    const KIND: &'static str;

    /// Returns the columns, each with its documentation as metadata.
    fn schema() -> SchemaRef;

    /// Converts rows to one record batch with exactly [`Row::schema`].
    fn to_batch(rows: &[Self]) -> RecordBatch;

    /// Reads the rows of a batch. Columns are found by name and cast where Arrow can cast
    /// (DataFusion returns view types); columns that the kind does not have are ignored.
    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Misfit>;
}

/// A mismatch between a table and a kind, in one column.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// A required column is missing.
    #[error("missing column `{column}` ({wanted})")]
    Missing { column: String, wanted: String },
    /// The column has a type that cannot be cast to the expected one.
    #[error("column `{column}` has type {given}, expected {wanted}")]
    Type {
        column: String,
        wanted: String,
        given: String,
    },
    /// A null in a column that is not nullable.
    #[error("column `{column}` is not nullable, but row {row} is null")]
    Null { column: String, row: usize },
    /// A text that is not one of the column's allowed values.
    #[error("column `{column}` contains `{value}`, expected one of {wanted}")]
    Value {
        column: String,
        value: String,
        wanted: String,
    },
}

impl Misfit {
    /// Returns the name of the mismatched column.
    pub fn column(&self) -> &str {
        match self {
            Self::Missing { column, .. }
            | Self::Type { column, .. }
            | Self::Null { column, .. }
            | Self::Value { column, .. } => column,
        }
    }
}

/// Checks that a table with the schema `given` can be read as `needed`. Returns all misfits, not
/// just the first.
pub fn fits(needed: &Schema, given: &Schema) -> Vec<Misfit> {
    let mut misfits = Vec::new();
    for want in needed.fields() {
        let column = want.name().clone();
        let wanted = want.data_type().to_string();
        match given.field_with_name(want.name()) {
            Err(_) if want.is_nullable() => {}
            Err(_) => misfits.push(Misfit::Missing { column, wanted }),
            Ok(have) if !can_cast_types(have.data_type(), want.data_type()) => {
                misfits.push(Misfit::Type {
                    column,
                    wanted,
                    given: have.data_type().to_string(),
                });
            }
            Ok(_) => {}
        }
    }
    misfits
}

/// True for a measured column, whose values differ from run to run (seconds, bytes of memory).
pub fn is_measured(field: &Field) -> bool {
    field.metadata().contains_key(MEASURED)
}

/// The type of a row's field: conversion of its values to a column and back.
pub trait Column: Sized {
    /// True if a value may be null.
    const NULLABLE: bool = false;
    fn data_type() -> DataType;
    fn to_array(values: &[&Self]) -> ArrayRef;
    /// Reads the values of an array of type [`Column::data_type`]; nulls are allowed only if
    /// [`Column::NULLABLE`].
    fn from_array(column: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit>;
}

/// Returns the Arrow field of a column, with its documentation.
pub fn field<C: Column>(name: &str, doc: &str, measured: bool) -> Field {
    let mut metadata = HashMap::from([(DOC.to_owned(), paragraph(doc))]);
    if measured {
        metadata.insert(MEASURED.to_owned(), "true".to_owned());
    }
    Field::new(name, C::data_type(), C::NULLABLE).with_metadata(metadata)
}

/// Joins a doc comment, whose lines begin with a space each, into one paragraph.
pub fn paragraph(doc: &str) -> String {
    let lines: Vec<&str> = doc.lines().map(str::trim).collect();
    lines.join(" ").trim().to_owned()
}

/// Reads one column of a batch as values of a row's field.
pub fn read<C: Column>(batch: &RecordBatch, name: &str) -> Result<Vec<C>, Misfit> {
    let Some(array) = batch.column_by_name(name) else {
        if C::NULLABLE {
            let absent = arrow::array::new_null_array(&C::data_type(), batch.num_rows());
            return C::from_array(name, &absent);
        }
        let wanted = C::data_type().to_string();
        return Err(Misfit::Missing {
            column: name.to_owned(),
            wanted,
        });
    };
    let array = cast(array, &C::data_type()).map_err(|_| Misfit::Type {
        column: name.to_owned(),
        wanted: C::data_type().to_string(),
        given: array.data_type().to_string(),
    })?;
    if !C::NULLABLE
        && let Some(row) = (0..array.len()).find(|&row| array.is_null(row))
    {
        return Err(Misfit::Null {
            column: name.to_owned(),
            row,
        });
    }
    C::from_array(name, &array)
}

macro_rules! primitive_column {
    ($rust:ty, $arrow:ty, $array:ty, $data_type:expr) => {
        impl Column for $rust {
            fn data_type() -> DataType {
                $data_type
            }
            fn to_array(values: &[&Self]) -> ArrayRef {
                Arc::new(<$array>::from_iter_values(
                    values.iter().map(|value| **value),
                ))
            }
            fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
                Ok(array.as_primitive::<$arrow>().values().to_vec())
            }
        }
        impl Column for Option<$rust> {
            const NULLABLE: bool = true;
            fn data_type() -> DataType {
                $data_type
            }
            fn to_array(values: &[&Self]) -> ArrayRef {
                Arc::new(values.iter().map(|value| **value).collect::<$array>())
            }
            fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
                Ok(array.as_primitive::<$arrow>().iter().collect())
            }
        }
    };
}
primitive_column!(i32, Int32Type, Int32Array, DataType::Int32);
primitive_column!(i64, Int64Type, Int64Array, DataType::Int64);
primitive_column!(f32, Float32Type, Float32Array, DataType::Float32);
primitive_column!(f64, Float64Type, Float64Array, DataType::Float64);

impl Column for bool {
    fn data_type() -> DataType {
        DataType::Boolean
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        let values: Vec<bool> = values.iter().map(|value| **value).collect();
        Arc::new(BooleanArray::from(values))
    }
    fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        Ok(array.as_boolean().values().iter().collect())
    }
}

impl Column for Option<bool> {
    const NULLABLE: bool = true;
    fn data_type() -> DataType {
        DataType::Boolean
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        let values: BooleanArray = values.iter().map(|value| **value).collect();
        Arc::new(values)
    }
    fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        Ok(array.as_boolean().iter().collect())
    }
}

impl Column for String {
    fn data_type() -> DataType {
        DataType::Utf8
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        Arc::new(StringArray::from_iter_values(values))
    }
    fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        Ok(array
            .as_string::<i32>()
            .iter()
            .map(|text| text.unwrap_or_default().to_owned())
            .collect())
    }
}

impl Column for Option<String> {
    const NULLABLE: bool = true;
    fn data_type() -> DataType {
        DataType::Utf8
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        Arc::new(
            values
                .iter()
                .map(|text| text.as_deref())
                .collect::<StringArray>(),
        )
    }
    fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        Ok(array
            .as_string::<i32>()
            .iter()
            .map(|text| text.map(str::to_owned))
            .collect())
    }
}

impl Column for Option<Vec<u8>> {
    const NULLABLE: bool = true;
    fn data_type() -> DataType {
        DataType::Binary
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        Arc::new(
            values
                .iter()
                .map(|bytes| bytes.as_deref())
                .collect::<BinaryArray>(),
        )
    }
    fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        Ok(array
            .as_binary::<i32>()
            .iter()
            .map(|bytes| bytes.map(<[u8]>::to_vec))
            .collect())
    }
}

fn list_item<C: Column>() -> FieldRef {
    Arc::new(Field::new("item", C::data_type(), true))
}

fn list_array<C: Column>(lists: &[Option<&[C]>]) -> ArrayRef {
    let lengths = lists.iter().map(|list| list.map_or(0, <[C]>::len));
    let items: Vec<&C> = lists
        .iter()
        .flat_map(|list| list.unwrap_or_default())
        .collect();
    let nulls: NullBuffer = lists.iter().map(Option::is_some).collect();
    let nulls = (nulls.null_count() > 0).then_some(nulls);
    Arc::new(ListArray::new(
        list_item::<C>(),
        OffsetBuffer::from_lengths(lengths),
        C::to_array(&items),
        nulls,
    ))
}

fn list_values<C: Column>(column: &str, array: &ArrayRef) -> Result<Vec<Option<Vec<C>>>, Misfit> {
    let lists = array.as_list::<i32>();
    (0..lists.len())
        .map(|row| {
            if lists.is_null(row) {
                return Ok(None);
            }
            let items = lists.value(row);
            if !C::NULLABLE && items.null_count() > 0 {
                return Err(Misfit::Null {
                    column: column.to_owned(),
                    row,
                });
            }
            C::from_array(column, &items).map(Some)
        })
        .collect()
}

impl<C: Column> Column for Vec<C> {
    fn data_type() -> DataType {
        DataType::List(list_item::<C>())
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        list_array::<C>(
            &values
                .iter()
                .map(|list| Some(list.as_slice()))
                .collect::<Vec<_>>(),
        )
    }
    fn from_array(column: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        Ok(list_values(column, array)?
            .into_iter()
            .map(Option::unwrap_or_default)
            .collect())
    }
}

impl<C: Column> Column for Option<Vec<C>> {
    const NULLABLE: bool = true;
    fn data_type() -> DataType {
        DataType::List(list_item::<C>())
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        list_array::<C>(
            &values
                .iter()
                .map(|list| list.as_deref())
                .collect::<Vec<_>>(),
        )
    }
    fn from_array(column: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        list_values(column, array)
    }
}

/// Texts by their names, stored as a map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kept(pub Vec<(String, String)>);

impl Column for Option<Kept> {
    const NULLABLE: bool = true;
    fn data_type() -> DataType {
        let text = |name: &str, nullable| Field::new(name, DataType::Utf8, nullable);
        let entry = DataType::Struct(vec![text("key", false), text("value", true)].into());
        DataType::Map(Arc::new(Field::new("entries", entry, false)), false)
    }
    fn to_array(values: &[&Self]) -> ArrayRef {
        let names = MapFieldNames {
            entry: "entries".to_owned(),
            key: "key".to_owned(),
            value: "value".to_owned(),
        };
        let texts = StringBuilder::new;
        let mut map = MapBuilder::new(Some(names), texts(), texts());
        for kept in values {
            for (name, value) in kept.iter().flat_map(|kept| &kept.0) {
                map.keys().append_value(name);
                map.values().append_value(value);
            }
            map.append(kept.is_some()).expect("as many names as values");
        }
        Arc::new(map.finish())
    }
    fn from_array(_: &str, array: &ArrayRef) -> Result<Vec<Self>, Misfit> {
        let maps = array.as_map();
        let kept = |row: usize| {
            let entries = maps.is_valid(row).then(|| maps.value(row))?;
            let [names, values] = [0, 1].map(|column| entries.column(column).as_string::<i32>());
            let texts = names.iter().zip(values);
            let texts = texts.filter_map(|(name, value)| Some((name?, value?)));
            let owned = texts.map(|(name, value)| (name.to_owned(), value.to_owned()));
            Some(Kept(owned.collect()))
        };
        Ok((0..maps.len()).map(kept).collect())
    }
}

/// Declares an enum column: a Rust enum, stored as one of its names.
macro_rules! word_column {
    ($name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $name {
            /// Returns the name of this value in a table.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
        impl $crate::tables::row::Column for $name {
            fn data_type() -> arrow::datatypes::DataType {
                arrow::datatypes::DataType::Utf8
            }
            fn to_array(values: &[&Self]) -> arrow::array::ArrayRef {
                let words = values.iter().map(|value| value.as_str());
                std::sync::Arc::new(arrow::array::StringArray::from_iter_values(words))
            }
            fn from_array(
                column: &str,
                array: &arrow::array::ArrayRef,
            ) -> Result<Vec<Self>, $crate::tables::Misfit> {
                let words = arrow::array::AsArray::as_string::<i32>(array);
                words.iter().map(|word| match word.unwrap_or_default() {
                    $($word => Ok(Self::$variant),)+
                    other => Err($crate::tables::Misfit::Value {
                        column: column.to_owned(),
                        value: other.to_owned(),
                        wanted: [$(concat!("`", $word, "`")),+].join(", "),
                    }),
                }).collect()
            }
        }
    };
}

/// Declares a struct column: a Rust struct, stored as an Arrow struct.
///
/// Rows always have a value; `nullable` only declares the column nullable in the schema, for
/// readers that expect it.
macro_rules! struct_column {
    ($name:ident $($nullable:ident)? { $($field:ident: $kind:ty),+ $(,)? }) => {
        impl $crate::tables::row::Column for $name {
            const NULLABLE: bool = !matches!(concat!($(stringify!($nullable))?).as_bytes(), []);
            fn data_type() -> arrow::datatypes::DataType {
                use $crate::tables::row::Column;
                arrow::datatypes::DataType::Struct(arrow::datatypes::Fields::from(vec![$(
                    arrow::datatypes::Field::new(
                        stringify!($field), <$kind as Column>::data_type(), <$kind as Column>::NULLABLE,
                    )
                ),+]))
            }
            fn to_array(values: &[&Self]) -> arrow::array::ArrayRef {
                use $crate::tables::row::Column;
                let arrow::datatypes::DataType::Struct(fields) = Self::data_type() else {
                    unreachable!("a struct column has a struct type")
                };
                let columns = vec![$(
                    <$kind as Column>::to_array(&values.iter().map(|value| &value.$field).collect::<Vec<_>>())
                ),+];
                if values.is_empty() {
                    return std::sync::Arc::new(arrow::array::StructArray::new_null(fields, 0));
                }
                std::sync::Arc::new(arrow::array::StructArray::new(fields, columns, None))
            }
            fn from_array(
                column: &str,
                array: &arrow::array::ArrayRef,
            ) -> Result<Vec<Self>, $crate::tables::Misfit> {
                use $crate::tables::row::Column;
                let entries = arrow::array::AsArray::as_struct(array);
                let mut place = 0;
                $(
                    let mut $field = <$kind as Column>::from_array(column, entries.column(place))?.into_iter();
                    place += 1;
                )+
                let _ = place;
                let mut values = Vec::with_capacity(arrow::array::Array::len(entries));
                for _ in 0..arrow::array::Array::len(entries) {
                    values.push(Self { $($field: $field.next().expect("columns of one length")),+ });
                }
                Ok(values)
            }
        }
    };
}

/// Declares a row type. `[measured]` before a field marks a column whose values differ from run to
/// run.
#[macro_export]
macro_rules! rows {
    (
        $(#[doc = $about:literal])+
        pub struct $name:ident: $kind:literal $(, metadata $metadata:expr)? => {
            $( $(#[doc = $doc:literal])+ $([$measured:ident])? pub $field:ident: $type:ty, )+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name { $( $(#[doc = $doc])+ pub $field: $type, )+ }

        impl $crate::tables::Row for $name {
            const KIND: &'static str = $kind;

            fn schema() -> arrow::datatypes::SchemaRef {
                use std::sync::{Arc, LazyLock};
                static SCHEMA: LazyLock<arrow::datatypes::SchemaRef> = LazyLock::new(|| {
                    let fields = vec![$(
                        $crate::tables::row::field::<$type>(
                            stringify!($field),
                            concat!($($doc, "\n"),+),
                            [$(stringify!($measured),)? ""].contains(&"measured"),
                        )
                    ),+];
                    let mut metadata = std::collections::HashMap::from([
                        ("kind".to_owned(), $kind.to_owned()),
                        ("doc".to_owned(), $crate::tables::row::paragraph(concat!($($about, "
"),+))),
                    ]);
                    $( metadata.extend($metadata); )?
                    metadata.shrink_to_fit();
                    Arc::new(arrow::datatypes::Schema::new_with_metadata(fields, metadata))
                });
                SCHEMA.clone()
            }

            fn to_batch(rows: &[Self]) -> arrow::array::RecordBatch {
                use $crate::tables::row::Column;
                let columns = vec![$(
                    <$type as Column>::to_array(&rows.iter().map(|row| &row.$field).collect::<Vec<_>>())
                ),+];
                arrow::array::RecordBatch::try_new(Self::schema(), columns)
                    .expect("rows of one kind make columns of one length")
            }

            fn from_batch(
                batch: &arrow::array::RecordBatch,
            ) -> Result<Vec<Self>, $crate::tables::Misfit> {
                $( let mut $field = $crate::tables::row::read::<$type>(batch, stringify!($field))?.into_iter(); )+
                let mut rows = Vec::with_capacity(batch.num_rows());
                for _ in 0..batch.num_rows() {
                    rows.push(Self { $($field: $field.next().expect("columns of one length")),+ });
                }
                Ok(rows)
            }
        }
    };
}

pub use crate::rows;
pub(super) use {struct_column, word_column};
