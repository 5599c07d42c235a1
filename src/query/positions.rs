//! The positions of the rows of a table that meet a condition, in some order: what a page of a long
//! list needs, without their contents.

use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, SchemaRef, UInt32Type, UInt64Type};
use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::datasource::TableProvider;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::parquet::ParquetVirtualColumn;
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder, ParquetSource};
use datafusion::datasource::source::DataSourceExec;
use datafusion::datasource::table_schema::{TableSchema, TableSchemaBuilder};
use datafusion::error::Result;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::{Expr, TableType};
use datafusion::object_store::path::Path;
use datafusion::parquet::arrow::RowNumber;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::scalar::ScalarValue;
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::{Expr as SqlExpr, SetExpr, Statement as Sql};

use super::apart::piece_by_piece;
use super::interface::{Part, QueryError, QueryTable, Room};
use super::words::{Allowed, error};
use super::{checked_files, context, give_rows, nullable, parse, prepare};

/// The columns with the position of a row: the file, and the row in it.
const FILE: &str = "file of the row";
const ROW: &str = "row in the file";

/// Passes the positions of the rows of a table that meet a condition to `sink`, in order: the number of
/// the file among all files of the table, and the number of the row in it. `condition` and `order` are
/// SQL expressions over the columns of the table and `round`.
pub fn positions<E: From<QueryError>>(
    table: &QueryTable,
    condition: Option<&str>,
    order: Option<&str>,
    room: Room<'_>,
    mut sink: impl FnMut(&[(u32, u64)]) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut sql = format!("select \"{FILE}\", \"{ROW}\" from \"{}\"", table.name);
    if let Some(condition) = condition {
        // The newline ends a trailing comment.
        sql.push_str(&format!(" where ({condition}\n)"));
    }
    if let Some(order) = order {
        sql.push_str(&format!(" order by {order}, \"{FILE}\", \"{ROW}\""));
    }
    let table = table.clone();
    let (memory, spill) = (room.memory, room.spill.map(std::path::Path::to_owned));
    piece_by_piece(
        async move |listener| {
            let spill = spill.as_deref();
            let context = context(Room { memory, spill }).map_err(error)?;
            let error = checked_files(&context, &table.files);
            let positioned = Positioned::new(&table).map_err(&error)?;
            context
                .register_table(table.name.as_str(), Arc::new(positioned))
                .map_err(&error)?;
            refuse_more_than_a_condition(&parse(&context.state(), &sql)?)?;
            let frame = prepare(&context, &sql, &[], Allowed::Queries).await?;
            give_rows(frame, listener, &error).await
        },
        |part| match part {
            Part::Rows(rows) => sink(&of_rows(&rows)),
            Part::Header(_) | Part::Nothing => sink(&[]),
        },
    )
}

/// Refuses a condition that closes its parenthesis and goes on as another part of the query.
fn refuse_more_than_a_condition(statement: &Statement) -> std::result::Result<(), QueryError> {
    if let Statement::Statement(statement) = statement
        && let Sql::Query(query) = &**statement
        && query.with.is_none()
        && query.limit_clause.is_none()
        && let SetExpr::Select(select) = &*query.body
        && matches!(select.selection, None | Some(SqlExpr::Nested(_)))
    {
        return Ok(());
    }
    Err(QueryError::Other(
        "write one condition, such as `margin > 3`: other parts of a query are not possible here"
            .to_owned(),
    ))
}

fn of_rows(rows: &RecordBatch) -> Vec<(u32, u64)> {
    // DataFusion may encode a column that is the same for all rows of a file.
    let [files, numbers] = [(0, DataType::UInt32), (1, DataType::UInt64)]
        .map(|(at, plain)| cast(rows.column(at), &plain).expect("positions are numbers"));
    let files = files.as_primitive::<UInt32Type>().values();
    let numbers = numbers.as_primitive::<UInt64Type>().values();
    files.iter().copied().zip(numbers.iter().copied()).collect()
}

/// The Parquet files of a table, with the position of each row, and the round of its file.
#[derive(Debug)]
struct Positioned {
    schema: TableSchema,
    files: Vec<PartitionedFile>,
}

impl Positioned {
    fn new(table: &QueryTable) -> Result<Self> {
        let columns = table.schema.fields().iter();
        let columns: Vec<_> = columns
            .filter(|field| field.name() != "round")
            .cloned()
            .collect();
        let columns = nullable(&Arc::new(arrow::datatypes::Schema::new(columns)));
        let row = Arc::new(Field::new(ROW, DataType::Int64, false).with_extension_type(RowNumber));
        let row = ParquetVirtualColumn::try_from(&row)?;
        let schema = TableSchemaBuilder::new(columns)
            .with_table_partition_cols(vec![
                Arc::new(Field::new(FILE, DataType::UInt32, false)),
                Arc::new(Field::new("round", DataType::Int32, true)),
            ])
            .with_virtual_columns(vec![row.field().clone()])
            .build();
        let mut files = Vec::new();
        for (round, of_round) in &table.files {
            for file in of_round {
                let path = std::path::absolute(&file.path)?;
                let size = path.metadata()?.len();
                let path = Path::from_absolute_path(path)?;
                let values = vec![
                    ScalarValue::UInt32(Some(files.len() as u32)),
                    ScalarValue::Int32(round.map(u32::cast_signed)),
                ];
                let file = PartitionedFile::new(path.as_ref(), size);
                files.push(file.with_partition_values(values));
            }
        }
        Ok(Self { schema, files })
    }
}

#[async_trait]
impl TableProvider for Positioned {
    fn schema(&self) -> SchemaRef {
        self.schema.table_schema().clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        _filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let options = state.config_options().execution.parquet.clone();
        let options = datafusion::common::config::TableParquetOptions {
            global: options,
            ..Default::default()
        };
        let source = ParquetSource::new(self.schema.clone()).with_table_parquet_options(options);
        let url = ObjectStoreUrl::local_filesystem();
        let scan = FileScanConfigBuilder::new(url, Arc::new(source))
            .with_file_group(FileGroup::new(self.files.clone()))
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .build();
        Ok(DataSourceExec::from_data_source(scan))
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float32Array, ListArray, StringArray};
    use arrow::datatypes::Schema;

    use super::*;
    use ovchat_data::store::{ParquetStream, TableFile};

    /// Two rounds of three rows each: margins 0.5, null, 1.5 and 10.5, null, 11.5.
    fn table(folder: &std::path::Path) -> QueryTable {
        let list = Field::new_list("ids", Field::new_list_field(DataType::Int32, true), true);
        let fields = vec![
            Field::new("name", DataType::Utf8, false),
            Field::new("margin", DataType::Float32, true),
            list,
        ];
        let schema = Arc::new(Schema::new(fields));
        let file = |round: u32| {
            let lists = [vec![Some(1)], vec![Some(1), Some(2)], vec![]];
            let lists = lists.into_iter().map(Some);
            let lists = ListArray::from_iter_primitive::<arrow::datatypes::Int32Type, _, _>(lists);
            let more = 10.0 * (round - 1) as f32;
            let margins = Float32Array::from(vec![Some(0.5 + more), None, Some(1.5 + more)]);
            let names = StringArray::from(vec!["a", "b", "it's"]);
            let rows = RecordBatch::try_new(
                schema.clone(),
                vec![Arc::new(names), Arc::new(margins), Arc::new(lists)],
            );
            let path = folder.join(format!("{round}.parquet"));
            let out = std::fs::File::create(&path).unwrap();
            let mut writer = ParquetStream::begin(out, &schema).unwrap();
            writer.write(&rows.unwrap()).unwrap();
            writer.finish().unwrap();
            (Some(round), vec![TableFile::from(path)])
        };
        QueryTable {
            name: "pairs".to_owned(),
            schema: schema.clone(),
            files: vec![file(1), file(2)],
            with_round: true,
        }
    }

    #[test]
    fn rows_are_found_by_any_condition_and_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let table = table(folder.path());
        let found = |condition: Option<&str>, order: Option<&str>| {
            let mut found = Vec::new();
            let sink = |rows: &[(u32, u64)]| {
                found.extend_from_slice(rows);
                Ok::<(), QueryError>(())
            };
            positions(&table, condition, order, Some(folder.path()).into(), sink).map(|()| found)
        };
        let by_margin = found(None, Some("margin desc nulls last")).unwrap();
        assert_eq!(by_margin, [(1, 2), (1, 0), (0, 2), (0, 0), (0, 1), (1, 1)]);
        let filtered = |condition| found(Some(condition), Some("margin")).unwrap();
        assert_eq!(filtered("round = 2 and margin > 11"), [(1, 2)]);
        assert_eq!(filtered("cardinality(ids) = 2"), [(0, 1), (1, 1)]);
        assert_eq!(filtered("name like 'it''s' -- the last"), [(0, 2), (1, 2)]);
        assert_eq!(
            filtered("margin > (select avg(margin) from pairs) and round = 1"),
            []
        );
        let wrong = found(Some("marginn > 1"), None).unwrap_err();
        assert_eq!(wrong.unknown_name(), Some("marginn"));
        for more in [
            "true) union (select 1, 2",
            "true) limit (1",
            "true) or (false",
        ] {
            let refused = found(Some(more), None).unwrap_err().to_string();
            assert!(refused.starts_with("write one condition"), "{refused}");
        }
    }
}
