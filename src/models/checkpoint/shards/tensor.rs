//! The element type of a tensor, and its location in its file.

/// The element type of a tensor, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

/// The location of a tensor in its file. The readers of both formats guarantee that every byte of
/// it is inside the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorLocation {
    pub element: Element,
    pub shape: Vec<i64>,
    /// Strides in elements, one for each dimension.
    pub strides: Vec<i64>,
    /// The byte offset in the file of element 0.
    pub start: u64,
    /// Elements from element 0 to the last one inclusive, counting gaps between them.
    pub span: u64,
}

impl Element {
    /// All types, with their names in safetensors files.
    pub const NAMES: [(&'static str, Self); 10] = [
        ("F64", Self::F64),
        ("F32", Self::F32),
        ("F16", Self::F16),
        ("BF16", Self::Bf16),
        ("I64", Self::I64),
        ("I32", Self::I32),
        ("I16", Self::I16),
        ("I8", Self::I8),
        ("U8", Self::U8),
        ("BOOL", Self::Bool),
    ];

    pub(super) fn named(dtype: &str) -> Option<Self> {
        let (_, element) = Self::NAMES.iter().find(|(name, _)| *name == dtype)?;
        Some(*element)
    }

    /// Returns the bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

impl TensorLocation {
    /// Returns the strides of a tensor of this shape in row-major order; `None` if the shape is
    /// negative or has more elements than can be counted.
    pub(super) fn row_major(shape: &[i64]) -> Option<Vec<i64>> {
        let mut strides = vec![0; shape.len()];
        let mut elements = 1_i64;
        for (stride, &size) in strides.iter_mut().zip(shape).rev() {
            *stride = elements;
            elements = elements.checked_mul(size).filter(|_| size >= 0)?;
        }
        Some(strides)
    }

    /// Returns the number of elements from the first to the last of a tensor inclusive; `None` if a
    /// number is negative or the sum overflows.
    pub(super) fn span(shape: &[i64], strides: &[i64]) -> Option<u64> {
        if shape.len() != strides.len() || shape.iter().chain(strides).any(|&n| n < 0) {
            return None;
        }
        if shape.contains(&0) {
            return Some(0);
        }
        let mut last = 0_i64;
        for (size, stride) in shape.iter().zip(strides) {
            last = last.checked_add((size - 1).checked_mul(*stride)?)?;
        }
        Some(last as u64 + 1)
    }
}
