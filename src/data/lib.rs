//! Tables: the row types and their Arrow columns ([`tables`]), and the folder of a run in which they lie as
//! Parquet files under a manifest ([`store`]).

pub mod store;
pub mod tables;
