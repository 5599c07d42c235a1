//! Speed of image preprocessing (decoding, resizing, tiling, normalizing) without a network.
//!
//! usage: pictures MODEL FOLDER: the checkpoint with the settings, and the images. Prints a line of
//! JSON. Uses `RAYON_NUM_THREADS` threads.

use std::path::Path;
use std::time::Instant;

use ovchat_models::Visual;
use ovchat_models::preprocess::Processor;
use rayon::prelude::*;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model, folder] = &arguments[..] else {
        panic!("usage: pictures MODEL FOLDER")
    };
    let prep = Processor::open(Path::new(model)).expect("a checkpoint");
    let files: Vec<_> = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("a file").path())
        .collect();
    let begun = Instant::now();
    let tiles: usize = files
        .par_iter()
        .map(|path| {
            let bytes = std::fs::read(path).expect("an image");
            let image = Visual::new(path.display().to_string(), bytes.into());
            let tiles = prep.tiles(&image, 1).expect("an image");
            tiles.packing.tiles()
        })
        .sum();
    let (images, seconds) = (files.len(), begun.elapsed().as_secs_f64());
    println!("{{\"pictures\": {images}, \"tiles\": {tiles}, \"seconds\": {seconds}}}");
}
