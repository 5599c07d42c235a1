//! Pipelines: what a file says ([`config`]), what each stage type does ([`stages`]), and the runner that makes
//! the tables, round after round ([`run`]).

pub mod config;
pub mod run;
pub mod stages;
