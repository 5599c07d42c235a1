//! A state dict as `torch.save` writes it: a zip archive with a pickle and one file per tensor.
//!
//! The pickle (protocol 2) is a list of calls of `torch._utils._rebuild_tensor_v2`, the only thing
//! that a state dict needs; see torch `serialization.py` and Python's `pickletools.py` for the
//! opcodes.

use std::io::{Cursor, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::files::{self, Outcome};

/// A float32 tensor.
pub struct Tensor<'a> {
    pub name: &'a str,
    pub shape: &'a [u8],
    pub values: &'a [f32],
}

/// Writes `tensors` to `path`. Sizes must fit into a byte: this is for a reward head.
pub fn save(path: &Path, tensors: &[Tensor<'_>]) -> Outcome<()> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default());
    let mut add = |name: &str, bytes: &[u8]| -> Outcome<()> {
        archive.start_file(format!("archive/{name}"), options)?;
        Ok(archive.write_all(bytes)?)
    };
    add("data.pkl", &pickle(tensors))?;
    add("byteorder", b"little")?;
    for (number, tensor) in tensors.iter().enumerate() {
        let bytes: Vec<u8> = tensor
            .values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        add(&format!("data/{number}"), &bytes)?;
    }
    add("version", b"3\n")?;
    files::write(path, archive.finish()?.get_ref())
}

fn pickle(tensors: &[Tensor<'_>]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec(); // protocol 2, an empty dict, a mark
    for (number, tensor) in tensors.iter().enumerate() {
        text(&mut out, tensor.name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n(");
        // The storage: ('storage', torch.FloatStorage, its file, its device, its length).
        out.push(b'(');
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &number.to_string());
        text(&mut out, "cpu");
        integer(&mut out, tensor.shape.iter().product());
        out.extend(b"tQ"); // a tuple, found by its persistent id
        integer(&mut out, 0); // where in the storage it begins
        tuple(&mut out, tensor.shape);
        tuple(&mut out, &strides(tensor.shape));
        out.extend(b"\x89ccollections\nOrderedDict\n)R"); // no gradient, no hooks
        out.extend(b"tR"); // the arguments' tuple; the call
    }
    out.extend(b"u."); // put all into the dict; the end
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn integer(out: &mut Vec<u8>, value: u8) {
    out.extend([b'K', value]);
}

fn tuple(out: &mut Vec<u8>, values: &[u8]) {
    out.push(b'(');
    for &value in values {
        integer(out, value);
    }
    out.push(b't');
}

/// The strides of a tensor whose last axis varies fastest.
fn strides(shape: &[u8]) -> Vec<u8> {
    (1..=shape.len())
        .map(|axis| shape[axis..].iter().product())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_those_of_a_contiguous_tensor() {
        assert_eq!(strides(&[2, 3, 4]), [12, 4, 1]);
        assert_eq!(strides(&[5]), [1]);
    }
}
