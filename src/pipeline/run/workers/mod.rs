//! Workers: processes that compute parts of tables, on the GPUs of this machine and of other ranks.
//!
//! The run is the only one that writes the manifest. It gives the parts of a table to its workers
//! ([`dispatch`]) over pipes ([`pool`], [`messages`]), and commits what they have written ([`collect`]).
//! A worker ([`worker`]) has the plan of the run and reads the run folder. In a cluster, rank 0 is the
//! run; the other ranks ([`follow`]) have workers of their own, and draw parts from a board ([`ovchat_models::Board`]).

pub mod messages;

pub mod pool;

pub mod places;

pub mod dispatch;

mod collect;
mod follow;
mod worker;

pub use follow::follow;
pub use worker::work;
