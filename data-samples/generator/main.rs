//! Writes the small world: everything in `data-samples/` except its README and the models, and the
//! training data of these models.
//!
//! `make world` generates all of it from scratch. Images of colored shapes come with questions
//! whose true answers are known, because each image is drawn from its answers. The models start
//! with random weights in the layouts of the real ones; `pipelines/small-world.yaml` trains them.
//!
//! Every random number comes from a stream that is named after its purpose ([`Random::named`]), so
//! a larger number of images leaves the first ones unchanged. All arithmetic is `+ - * /` and
//! square roots, which IEEE 754 fixes to the last bit: the bytes do not depend on a math library.
//! Those of clips, which the program ffmpeg encodes, depend on its version.

/// The modules, in the order in which an image or a clip passes through them; their files lie in
/// `small_world/`.
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

    pub mod clip_parts;
    pub mod clips;

    pub mod clip_questions;
    pub mod video;

    pub mod clip_records;

    pub mod tokenizers;

    pub mod tensors;

    pub mod policy;

    pub mod judge;
}

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use small_world::clip_records::ClipWorld;
use small_world::files::Outcome;
use small_world::records::{Counts, Split, World};
use small_world::{clip_records, judge, lessons, policy, records, tokenizers};

/// Writes the small world, or the training data of its models.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    world: WorldArguments,
}

#[derive(Subcommand)]
enum What {
    /// Writes the images of both splits, their questions and preferences.
    World {
        /// The folder to write to; files of the same names are replaced.
        to: PathBuf,
    },
    /// Writes the training data: other images, conversations and preferences about them, and two
    /// models with random weights.
    Lessons {
        /// The folder to write to; files of the same names are replaced.
        to: PathBuf,
        /// Number of images of a single shape, for the first training stage.
        #[arg(long, default_value_t = 8_000)]
        first_steps: usize,
        /// Number of other images.
        #[arg(long, default_value_t = 10_000)]
        pictures: usize,
    },
    /// Writes the clips of both splits and their questions. Needs the program ffmpeg.
    Clips {
        /// The folder to write to; files of the same names are replaced.
        to: PathBuf,
    },
    /// Writes the training data about clips: other clips, and conversations about them. Needs the
    /// program ffmpeg.
    ClipLessons {
        /// The folder to write to; files of the same names are replaced.
        to: PathBuf,
        /// Number of clips.
        #[arg(long, default_value_t = 3_000)]
        clips: usize,
    },
}

#[derive(Args)]
struct WorldArguments {
    /// Number of training images or clips [default: 400 images, 220 clips].
    #[arg(long, global = true)]
    train: Option<usize>,
    /// Number of held-out images or clips; nothing else shows one of their scenes [default: 100
    /// images, 110 clips].
    #[arg(long, global = true)]
    held_out: Option<usize>,
    /// Questions per image, 1 to 5, each on another topic; fewer if a topic does not fit.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5), global = true)]
    questions: u8,
    /// Preferences per image.
    #[arg(long, default_value_t = 3, global = true)]
    preferences: usize,
    /// The seed of all random numbers.
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
    match &arguments.what {
        What::World { to } => {
            let world = arguments.world.draw()?;
            world.write(to)?;
            println!(
                "{} training images and {} held-out images written with their questions to {}",
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
            let held_out = arguments.world.draw()?.held_out();
            lessons::write(to, seed, counts, &held_out)?;
            let corpus = tokenizers::corpus(seed);
            policy::write(&to.join("start/policy"), seed, &corpus)?;
            judge::write(&to.join("start/reward"), seed, &corpus)?;
            println!(
                "{} images written with their training data and two untrained models to {}",
                first_steps + pictures,
                to.display()
            );
        }
        What::Clips { to } => {
            let world = arguments.world.draw_clips()?;
            world.write(to)?;
            println!(
                "{} training clips and {} held-out clips written with their questions to {}",
                world.clips(Split::Train).count(),
                world.clips(Split::HeldOut).count(),
                to.display()
            );
        }
        What::ClipLessons { to, clips } => {
            let taken = arguments.world.draw_clips()?.contents();
            clip_records::write_lessons(to, arguments.world.seed, *clips, &taken)?;
            println!(
                "{clips} clips written with their training data to {}",
                to.display()
            );
        }
    }
    Ok(())
}

impl WorldArguments {
    fn draw(&self) -> Outcome<World> {
        let counts = Counts {
            pictures: [self.train.unwrap_or(400), self.held_out.unwrap_or(100)],
            questions: usize::from(self.questions),
            preferences: self.preferences,
        };
        records::draw_world(self.seed, counts)
    }

    fn draw_clips(&self) -> Outcome<ClipWorld> {
        let counts = [self.train.unwrap_or(220), self.held_out.unwrap_or(110)];
        clip_records::draw_clips(self.seed, counts)
    }
}
