//! Row types and storage of tables: the rows and their Arrow columns ([`tables`]), and the run
//! folder that stores them as Parquet files under a manifest ([`store`]).

pub mod store;
pub mod tables;
