//! Pipelines: the YAML configuration ([`config`]), the stage types ([`stages`]), and the runner
//! that builds the tables round by round ([`run`]).

pub mod config;
pub mod run;
pub mod stages;
