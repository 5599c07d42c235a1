//! The integration tests, in one binary: each additional one would link DataFusion again.

/// Bad input: errors, rejects and corrupt files.
mod bad_input;
/// The judge of the small world's benchmarks.
#[cfg(feature = "torch")]
#[path = "../examples/benchmark_judge.rs"]
#[expect(dead_code, reason = "tests start its server instead of its program")]
mod benchmark_judge;
/// The benchmarks, with a scripted judge.
mod benchmarks;
/// The page of `pipeline view` in a real browser.
mod browser;
/// Kills and power losses at every commit.
mod chaos;
/// Invalid pipelines and their exact diagnostics.
mod check;
/// Devices, the libtorch version and `make setup`.
#[cfg(feature = "torch")]
mod devices;
/// Exams of judges.
mod exam;
/// User programs as `exec` stages.
mod exec;
/// Forks, diffs and archived versions.
mod fork;
/// Replay of the fuzz corpus.
mod fuzz_corpus;
/// The health of rounds, and the guard.
mod health;
/// Commands that flood their output, leave processes behind, or look for secrets.
mod hostile_commands;
/// Endpoints that reply with impossible values, or not at all.
mod hostile_endpoints;
/// Untrusted files: paths and contents.
mod hostile_files;
/// Untrusted text: oversized input and terminal escape sequences.
mod hostile_text;
/// Weights from the Hugging Face hub.
#[cfg(feature = "torch")]
mod hub;
/// Flipped bits and truncated files.
mod integrity;
/// Images where they stand in the text.
#[cfg(feature = "torch")]
mod interleaved;
/// Killed, stopped and concurrent runs.
mod interrupt;
/// Judges that reply in text.
mod judges;
/// The labeling page under attack.
mod label;
/// The modules of a crate form no cycle.
mod layers;
/// LLaVA-1.5 as policy and critic.
#[cfg(feature = "torch")]
mod llava;
/// Models that a pipeline trains from scratch.
#[cfg(feature = "torch")]
mod made;
/// The whole loop with networks.
#[cfg(feature = "torch")]
mod networks;
/// Pairing strategies.
mod pairing;
/// Human labels.
mod people;
/// Plans and their accuracy.
mod plan;
/// The cookbook: an analyst's queries and their results.
mod query;
/// The tables of a run as other programs read them.
mod readers;
/// Records that are read and records that are rejected.
mod records;
/// Reference log-probabilities of DPO.
mod reference;
/// Errors before or early in a run.
mod refusals;
/// Whole pipelines with scripted models.
mod run;
/// The test harness.
mod scene;
/// `schemas/` is up to date.
mod schemas;
/// House rules: file headings, the map of the guide, formatting.
mod tidy;
/// Training stages, comparisons and the report with scripted models.
mod training;
/// Readers during a change of a finished run.
mod versions;
/// Video files: frames, rejects, and faults of the decoder.
mod videos;
/// The page of `pipeline view`: who may read it, and its data.
mod view;
/// Workers that compute parts of tables, and what happens when they die.
mod workers;
