//! Blockwise 8-bit quantization of optimizer state.
//!
//! Dettmers et al. 2021, *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861: each
//! block of 256 numbers is divided by its largest absolute value, and each number is stored as the
//! index of the nearest entry in a fixed table whose steps are finer near 0 (`create_dynamic_map`
//! of bitsandbytes' `functional.py`, seven exponent bits). The second moment is stored as its
//! square root: the table covers the range of gradients, not of their squares, and a small value
//! must not be stored as 0 and then divided by.

use tch::{Device, Kind, Tensor};

/// The number of values that share a scale.
pub const BLOCK: i64 = 256;

/// Exponents of the table: its smallest step is about `10^-EXPONENTS`.
const EXPONENTS: i32 = 7;

/// The values that the 256 codes stand for.
#[derive(Debug)]
pub struct Codebook {
    values: Tensor, // [256], ascending, at most 1
    bounds: Tensor, // [255], midpoints between neighbors
}

impl Codebook {
    /// The signed table, or the unsigned one, which is twice as fine.
    pub fn new(signed: bool, device: Device) -> Self {
        let mut values = vec![0.0, 1.0];
        for exponent in 0..EXPONENTS {
            let scale = 10f64.powi(exponent + 1 - EXPONENTS);
            let count = 1 << (exponent + i32::from(!signed));
            for index in 0..count {
                // The midpoint of one of `count` equal parts of [0.1, 1].
                let middle = 0.1 + 0.9 * (f64::from(index) + 0.5) / f64::from(count);
                values.push(scale * middle);
                if signed {
                    values.push(-scale * middle);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        let bounds: Vec<f32> = values
            .windows(2)
            .map(|pair| f64::midpoint(pair[0], pair[1]) as f32)
            .collect();
        let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
        Self {
            values: Tensor::from_slice(&values).to_device(device),
            bounds: Tensor::from_slice(&bounds).to_device(device),
        }
    }
}

/// A tensor quantized to eight bits per value.
#[derive(Debug)]
pub struct QuantizedTensor {
    /// Indices into the table, `[numbers, padded to whole blocks]`, uint8.
    pub codes: Tensor,
    /// The largest absolute value of each block, `[blocks]`, float32.
    pub scales: Tensor,
}

impl QuantizedTensor {
    /// Returns `count` zeros.
    pub fn zeros(count: i64, table: &Codebook) -> Self {
        let blocks = (count + BLOCK - 1) / BLOCK;
        let device = table.values.device();
        let zero = table.values.abs().argmin(0, false).int64_value(&[]);
        Self {
            codes: Tensor::full([blocks * BLOCK], zero, (Kind::Uint8, device)),
            scales: Tensor::zeros([blocks], (Kind::Float, device)),
        }
    }

    /// Dequantizes `blocks` blocks from block `first` on, `[blocks, BLOCK]`, float32.
    pub fn read(&self, table: &Codebook, first: i64, blocks: i64) -> Tensor {
        let codes = self.codes.narrow(0, first * BLOCK, blocks * BLOCK);
        let values = table.values.index_select(0, &codes.to_kind(Kind::Int));
        let scales = self.scales.narrow(0, first, blocks).unsqueeze(1);
        values.view([blocks, BLOCK]) * scales
    }

    /// Replaces the blocks from `first` on with `values`, `[blocks, BLOCK]`.
    pub fn write(&mut self, table: &Codebook, first: i64, values: &Tensor) {
        let blocks = values.size()[0];
        let scales = values.abs().amax([1i64].as_slice(), false);
        // A block of zeros has no scale; its values stay 0.
        let divisors = scales.clamp_min(f64::from(f32::MIN_POSITIVE)).unsqueeze(1);
        let codes = (values / divisors).bucketize(&table.bounds, true, false);
        self.codes
            .narrow(0, first * BLOCK, blocks * BLOCK)
            .copy_(&codes.view([-1]));
        self.scales.narrow(0, first, blocks).copy_(&scales);
    }
}

#[cfg(test)]
mod tests {
    use super::super::layers::tests::noise;
    use super::*;

    fn through(values: &Tensor, signed: bool) -> Tensor {
        let table = Codebook::new(signed, Device::Cpu);
        let mut bytes = QuantizedTensor::zeros(values.numel() as i64, &table);
        bytes.write(&table, 0, values);
        bytes.read(&table, 0, values.size()[0])
    }

    #[test]
    fn a_byte_stands_for_each_number_of_the_table() {
        for signed in [false, true] {
            let table = Codebook::new(signed, Device::Cpu);
            assert_eq!(table.values.size(), [256]);
            let largest = table.values.double_value(&[255]);
            assert!((largest - 1.0).abs() < 1e-12);
            let block = table.values.view([1, BLOCK]);
            assert_eq!(through(&block, signed), block);
        }
    }

    #[test]
    fn numbers_come_back_within_a_few_percent_over_six_orders_of_magnitude() {
        for scale in [1.0, 1e-3, 1e-6] {
            let mut values = noise(&[4, BLOCK], 1).abs() * 0.9 + 0.1;
            values *= scale;
            let _ = values.get(2).g_mul_scalar_(1e20);
            // The largest value of a block is exact and sets its scale.
            values
                .narrow(1, 0, 1)
                .copy_(&values.amax([1i64].as_slice(), true));
            let error = ((through(&values, false) - &values) / &values).abs().max();
            // Half of a 128th of the decade, relative to its lower end.
            assert!(error.double_value(&[]) < 0.036, "{error:?}");
            let error = ((through(&-&values, true) + &values) / &values).abs().max();
            assert!(error.double_value(&[]) < 0.071, "{error:?}");
        }
        let zeros = Tensor::zeros([2, BLOCK], (Kind::Float, Device::Cpu));
        assert_eq!(through(&zeros, true), zeros);
    }
}
