//! The options of a run.

use std::path::PathBuf;

use super::forecast::Forecast;
use super::workers::places::Workers;
use crate::stages::TableName;

/// The options of a run.
pub struct Options<'a> {
    /// The run's folder.
    pub folder: PathBuf,
    /// Stop once this table has been built for the first time.
    pub until: Option<TableName>,
    /// The forecast of this run, used to name the tables that it replaces.
    pub forecasts: Vec<Forecast>,
    /// The command line that repeats this run; recorded when the run ends, so that a later run can
    /// print it.
    pub command: String,
    /// The `--set` arguments of this run, recorded in the same way.
    pub sets: Vec<String>,
    /// The file with the measured rates of this machine, see [`ovchat_data::store::Rates`].
    pub rates: Option<PathBuf>,
    /// True to take the run from another machine that holds it.
    pub take_over: bool,
    /// The workers that compute tables; `None` to compute all in this process.
    pub workers: Option<Workers<'a>>,
}
