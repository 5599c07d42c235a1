//! Writes the small world: everything in `data-samples/` but its README and the two models, and what
//! those are trained on.
//!
//! `make world` makes all of it from nothing. Pictures of colored shapes come with questions whose
//! true answers are known, because the picture was drawn from the answer. The models begin with
//! random weights in the layouts of the real ones; `pipelines/small-world.yaml` trains them.
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
    pub mod spoken;

    pub mod lessons;
    pub mod records;

    pub mod tokenizers;

    pub mod tensors;

    pub mod policy;

    pub mod judge;
}

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use small_world::files::Outcome;
use small_world::records::{Counts, Split, World};
use small_world::{judge, lessons, policy, records, tokenizers};

/// Writes the small world, or what its models learn from.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    world: WorldArguments,
}

#[derive(Subcommand)]
enum What {
    /// The pictures of both splits, their questions and preferences.
    World {
        /// The folder to write to; files of the same names are replaced.
        to: PathBuf,
    },
    /// Other pictures, conversations and preferences about them, and two models with random weights.
    Lessons {
        /// The folder to write to; files of the same names are replaced.
        to: PathBuf,
        /// Pictures of a single shape, to begin with.
        #[arg(long, default_value_t = 8_000)]
        first_steps: usize,
        /// The other pictures.
        #[arg(long, default_value_t = 10_000)]
        pictures: usize,
    },
}

#[derive(Args)]
struct WorldArguments {
    /// Pictures to train on.
    #[arg(long, default_value_t = 400, global = true)]
    train: usize,
    /// Pictures that are held out: none shows a scene that a training picture or a lesson shows.
    #[arg(long, default_value_t = 100, global = true)]
    held_out: usize,
    /// Questions about each picture, 1 to 5, each on another topic; fewer where a topic does not fit.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5), global = true)]
    questions: u8,
    /// Human-style preferences about each picture.
    #[arg(long, default_value_t = 3, global = true)]
    preferences: usize,
    /// Another seed makes another world.
    #[arg(long, default_value_t = 17, global = true)]
    seed: u64,
}

fn main() -> ExitCode {
    match write(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("small_world: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(arguments: &Arguments) -> Outcome<()> {
    let world = arguments.world.draw()?;
    match &arguments.what {
        What::World { to } => {
            world.write(to)?;
            println!(
                "{} pictures to train on, {} held out, written with their questions to {}",
                world.pictures(Split::Train).count(),
                world.pictures(Split::HeldOut).count(),
                to.display()
            );
        }
        What::Lessons {
            to,
            first_steps,
            pictures,
        } => {
            let seed = arguments.world.seed;
            let counts = [*first_steps, *pictures];
            lessons::write(to, seed, counts, &world.held_out())?;
            let corpus = tokenizers::corpus(seed);
            policy::write(&to.join("start/policy"), seed, &corpus)?;
            judge::write(&to.join("start/reward"), seed, &corpus)?;
            println!(
                "{} pictures written with their lessons and two untrained models to {}",
                first_steps + pictures,
                to.display()
            );
        }
    }
    Ok(())
}

impl WorldArguments {
    fn draw(&self) -> Outcome<World> {
        let counts = Counts {
            pictures: [self.train, self.held_out],
            questions: usize::from(self.questions),
            preferences: self.preferences,
        };
        records::draw_world(self.seed, counts)
    }
}
