//! The one integration-test binary: each more would link DataFusion again.

/// What is refused or set aside while running.
mod bad_input;
/// Kills and power losses at every commit.
mod chaos;
/// Pipelines that must be refused, with the exact complaint.
mod check;
/// Devices, libtorch's version and `make setup`.
#[cfg(feature = "torch")]
mod devices;
/// What a judge must show before it scores.
mod exam;
/// Commands of the user as stages.
mod exec;
/// Forks, differences, and what is set aside.
mod fork;
/// The corpus of the fuzz targets, replayed.
mod fuzz_corpus;
/// Commands that say too much, leave others behind, or look for secrets.
mod hostile_commands;
/// Endpoints that say what can't be, or nothing.
mod hostile_endpoints;
/// Files of strangers: where they lead, and what they hold.
mod hostile_files;
/// Texts of strangers: beyond all measure, or meant for terminals.
mod hostile_text;
/// Weights from the Hugging Face hub.
#[cfg(feature = "torch")]
mod hub;
/// Flipped bits and cut files.
mod integrity;
/// Killed, stopped and doubled runs.
mod interrupt;
/// Judges that are asked in writing.
mod judges;
/// The page for people under attack.
mod label;
/// Models that a pipeline makes.
#[cfg(feature = "torch")]
mod made;
/// The whole loop with networks.
#[cfg(feature = "torch")]
mod networks;
/// Ways to pair answers.
mod pairing;
/// People as judges.
mod people;
/// What a run would do, and that it does so.
mod plan;
/// The cookbook: an analyst's questions and their answers.
mod query;
/// A run's tables as other programs read them.
mod readers;
/// What is read of records, and which are set aside.
mod records;
/// What a model in training is compared with.
mod reference;
/// What a run refuses before it begins, or fails at soon.
mod refusals;
/// Whole pipelines with scripted models.
mod run;
/// The harness.
mod scene;
/// `schemas/` is what the code would write.
mod schemas;
/// House rules: floors, headings, the map, formatting.
mod tidy;
/// Trainings, comparisons and the report with scripted models.
mod training;
/// What readers see while a finished run is changed.
mod versions;
