//! Named random weights, and the bfloat16 safetensors file that holds them.

use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::files::{self, Outcome};
use super::random::Random;

/// Returns the nearest bfloat16, ties to even; `value` must be finite.
fn bfloat16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let rounded = bits + 0x7fff + (bits >> 16 & 1);
    ((rounded >> 16) as u16).to_le_bytes()
}

/// Named random tensors. Each has its own random stream, so a change of one leaves the others
/// unchanged.
pub struct Tensors {
    seed: u64,
    model: &'static str,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensors {
    /// Returns an empty set of tensors of the model `model`.
    pub fn new(seed: u64, model: &'static str) -> Self {
        Self {
            seed,
            model,
            entries: Vec::new(),
        }
    }

    /// Adds a tensor of normal numbers with mean 0 and standard deviation `deviation`.
    pub fn normal(&mut self, name: &str, shape: &[usize], deviation: f64) {
        let values = self.normal_values(name, shape.iter().product(), deviation);
        self.push(name, shape, &values);
    }

    /// Adds a tensor whose numbers are all `value`.
    pub fn constant(&mut self, name: &str, shape: &[usize], value: f32) {
        self.push(name, shape, &vec![value; shape.iter().product()]);
    }

    /// Adds `name.weight` and `name.bias` of a linear layer: LeCun's initialization (a standard
    /// deviation of one over the root of the inputs), and biases that are small but not 0.
    pub fn linear(&mut self, name: &str, inputs: usize, outputs: usize) {
        let deviation = 1.0 / (inputs as f64).sqrt();
        self.normal(&format!("{name}.weight"), &[outputs, inputs], deviation);
        self.normal(&format!("{name}.bias"), &[outputs], 0.02);
    }

    /// Adds `name.weight` of ones and `name.bias` of zeros.
    pub fn layer_norm(&mut self, name: &str, size: usize) {
        self.constant(&format!("{name}.weight"), &[size], 1.0);
        self.constant(&format!("{name}.bias"), &[size], 0.0);
    }

    /// Returns the numbers of the tensor `name`.
    pub fn normal_values(&self, name: &str, count: usize, deviation: f64) -> Vec<f32> {
        let mut random = Random::named(self.seed, &format!("{}/{name}", self.model));
        (0..count)
            .map(|_| (random.normal() * deviation) as f32)
            .collect()
    }

    fn push(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.entries.push(Entry {
            name: name.to_owned(),
            shape: shape.to_vec(),
            bytes: values.iter().flat_map(|&value| bfloat16(value)).collect(),
        });
    }

    /// Writes the safetensors file `path`.
    pub fn save(&self, path: &Path) -> Outcome<()> {
        let mut views = Vec::new();
        for entry in &self.entries {
            let shape = entry.shape.clone();
            let view = TensorView::new(Dtype::BF16, shape, &entry.bytes)?;
            views.push((entry.name.as_str(), view));
        }
        // transformers rejects files that do not declare their format.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        files::write(path, &safetensors::serialize(views, Some(metadata))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bfloat16_rounds_to_the_nearest_and_ties_to_even() {
        let back =
            |value: f32| f32::from_bits(u32::from(u16::from_le_bytes(bfloat16(value))) << 16);
        assert_eq!(back(1.0), 1.0);
        assert_eq!(back(-0.5), -0.5);
        let step = 2.0_f32.powi(-7);
        assert_eq!(back(1.0 + step * 0.5), 1.0);
        assert_eq!(back(1.0 + step * 0.51), 1.0 + step);
        assert_eq!(back(1.0 + step * 1.5), 1.0 + step * 2.0);
    }
}
