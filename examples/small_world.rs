//! Writes the small world: everything in `data-samples/` but its README.
//!
//! `cargo run --example small_world -- data-samples` (or `make world`) writes it again, byte for
//! byte the same. Pictures of colored shapes come with questions whose true answers are known,
//! because the picture was drawn from the answer; beside them lie two small checkpoints with random
//! weights in the layouts of the real models, and their tokenizers.
//!
//! Every random number comes from a stream that is named after what it is for ([`Random::named`]),
//! so asking for more pictures leaves the first ones as they were. All arithmetic is `+ - * /` and
//! square roots, which IEEE 754 fixes to the last bit: the bytes do not depend on a math library.

/// The parts, in the order in which a picture meets them; their files lie in `small_world/`.
mod small_world {
    pub mod files;
    pub mod random;
    pub mod scene;
    pub mod shape;

    pub mod render;

    pub mod questions;

    pub mod records;

    pub mod tokenizers;

    pub mod tensors;
    pub mod torch_file;

    pub mod policy;

    pub mod judge;
}

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use small_world::files::Outcome;
use small_world::records::{Counts, Split};
use small_world::{judge, policy, records, tokenizers};

/// Writes pictures, questions, tokenizers and two random checkpoints.
#[derive(Parser)]
struct Arguments {
    /// The folder to write to; files of the same names are replaced.
    to: PathBuf,
    /// Pictures to train on.
    #[arg(long, default_value_t = 48)]
    train: usize,
    /// Pictures that are held out: none shows a scene that a training picture shows.
    #[arg(long, default_value_t = 16)]
    held_out: usize,
    /// Questions about each picture, 1 to 5, each on another topic; fewer where a topic does not fit.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    questions: u8,
    /// Human-style preferences about each training picture.
    #[arg(long, default_value_t = 2)]
    preferences: usize,
    /// Another seed makes another world.
    #[arg(long, default_value_t = 17)]
    seed: u64,
}

fn main() -> ExitCode {
    match write_world(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("small_world: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_world(arguments: &Arguments) -> Outcome<()> {
    let counts = Counts {
        pictures: [arguments.train, arguments.held_out],
        questions: usize::from(arguments.questions),
        preferences: arguments.preferences,
    };
    let world = records::draw_world(arguments.seed, counts)?;
    world.write(&arguments.to)?;

    let corpus = tokenizers::corpus(arguments.seed);
    policy::write(&arguments.to.join("policy"), arguments.seed, &corpus)?;
    judge::write(&arguments.to.join("reward"), arguments.seed, &corpus)?;

    println!(
        "{} pictures to train on, {} held out, written with their questions, a policy and a \
         reward model to {}",
        world.pictures(Split::Train).count(),
        world.pictures(Split::HeldOut).count(),
        arguments.to.display()
    );
    Ok(())
}
