#![doc = include_str!("README.md")]

// In the order in which a row meets them.
pub mod cli;
pub mod config;
pub mod files;
pub mod mask;
pub mod models;
pub mod prep;
pub mod query;
pub mod run;
pub mod stages;
pub mod store;
pub mod tables;
pub mod visible;
