//! Parity of the token counts and feature grids of thousands of image sizes.

use std::path::Path;

use super::{Report, compare, json};
use ovchat_models::preprocess::{Packing, Processor};

#[test]
fn packing_is_that_of_the_reference() {
    compare("packing", "packing", block);
}

fn block(folder: &Path, report: &mut Report) {
    let prep = Processor::open(&folder.join("../onevision/packing")).unwrap();
    // Height, width, tiles down and across, rows and columns after unpadding, tokens.
    let rows: Vec<[usize; 7]> = json(&folder.join("rows.json"));
    let [mut grids, mut counts] = [0, 0];
    for row in &rows {
        let packings = prep.architecture().packings(&[[row[0], row[1]]]);
        let Packing::Anyres(packing) = &packings[0] else {
            panic!("LLaVA-OneVision cuts images into tiles")
        };
        let grid = packing.grid.as_ref().expect("a single image has a grid");
        let found = [grid.tiles, [grid.rows.len(), grid.columns.len()]].concat();
        grids += usize::from(found != row[2..6]);
        counts += usize::from(packing.tokens() != row[6]);
    }
    report.equal("best resolution and unpadding", grids, rows.len());
    report.equal("tokens", counts, rows.len());
}
