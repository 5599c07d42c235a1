//! Row types of all tables, one module per kind.
//!
//! A table is a named sequence of rows of one kind. Stages exchange rows as Arrow record batches;
//! on disk they are Parquet (see [`crate::store`]). The doc comment of a field is the documentation
//! of its column: it is part of the Arrow field's metadata in every Parquet file, and of
//! `schemas/tables/<kind>.json`.

#[doc(hidden)]
pub mod row;

mod answer;
mod call;
mod candidate;
mod comparison;
mod health;
mod image;
mod judged;
mod label;
mod measured;
mod overlap;
mod pair;
mod prompt;
mod reference;
mod reject;
mod reward;
mod step;
mod telemetry;
mod video;

pub use answer::Answer;
pub use call::Call;
pub use candidate::{Candidate, Finish};
pub use comparison::Comparison;
pub use health::Health;
pub use image::{Image, ImageFile};
pub use judged::Judged;
pub use label::Label;
pub use measured::Measured;
pub use overlap::Overlap;
pub use pair::Pair;
pub use prompt::{Prompt, PromptVideo, Role, Turn};
pub use reference::Reference;
pub use reject::{Reject, RejectClass};
pub use reward::Reward;
pub use row::rows;
pub use row::{Kept, Misfit, Row, fits, is_measured};
pub use step::{DpoStep, RewardStep, SftStep};
pub use telemetry::Telemetry;
pub use video::Video;

use arrow::datatypes::SchemaRef;

/// All kinds, in pipeline order.
pub const KINDS: [&str; 19] = [
    Image::KIND,
    Video::KIND,
    Prompt::KIND,
    Candidate::KIND,
    Answer::KIND,
    Reward::KIND,
    Pair::KIND,
    Reference::KIND,
    DpoStep::KIND,
    SftStep::KIND,
    RewardStep::KIND,
    Comparison::KIND,
    Measured::KIND,
    Overlap::KIND,
    Health::KIND,
    Reject::KIND,
    Telemetry::KIND,
    Call::KIND,
    Label::KIND,
];

/// Returns the schema of a kind, or `None` for an unknown kind.
pub fn schema_of(kind: &str) -> Option<SchemaRef> {
    Some(match kind {
        Image::KIND => Image::schema(),
        Video::KIND => Video::schema(),
        Prompt::KIND => Prompt::schema(),
        Candidate::KIND => Candidate::schema(),
        Answer::KIND => Answer::schema(),
        Reward::KIND => Reward::schema(),
        Pair::KIND => Pair::schema(),
        Reference::KIND => Reference::schema(),
        DpoStep::KIND => DpoStep::schema(),
        SftStep::KIND => SftStep::schema(),
        RewardStep::KIND => RewardStep::schema(),
        Comparison::KIND => Comparison::schema(),
        Measured::KIND => Measured::schema(),
        Overlap::KIND => Overlap::schema(),
        Health::KIND => Health::schema(),
        Reject::KIND => Reject::schema(),
        Telemetry::KIND => Telemetry::schema(),
        Call::KIND => Call::schema(),
        Label::KIND => Label::schema(),
        _ => return None,
    })
}
