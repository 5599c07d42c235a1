//! The pickle in a torch file, read without executing anything.
//!
//! A pickle is a program for a small stack machine that in Python may call any function. This
//! machine supports dictionaries, sequences, strings, integers, booleans, and the few names that
//! `torch.save` uses to write a tensor; any other name is an error. Opcodes are as in CPython's
//! `Lib/pickletools.py`, the form of a tensor as in torch's `_utils.py` (`_rebuild_tensor_v2`) and
//! `serialization.py` (`persistent_id`).
//!
//! Values are indices into arenas that grow by at most the size of the pickle: shared and cyclic
//! structures cost nothing, and no file can make the reader allocate or recurse beyond the file's
//! length.

use std::collections::HashMap;

use super::tensor::Element;

/// Maximum number of dimensions of a torch tensor.
const DIMENSIONS_MAX: usize = 64;

/// A tensor as described by the pickle; its storage may be too small, which is not checked here.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PickledTensor {
    /// The name of the storage: the file `data/<storage>` of the archive.
    pub(super) storage: String,
    pub(super) element: Element,
    /// Offset of the first element, in elements.
    pub(super) offset: i64,
    pub(super) shape: Vec<i64>,
    /// Strides, in elements.
    pub(super) strides: Vec<i64>,
}

/// Reads a pickle that contains a dictionary from names to tensors.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<(String, PickledTensor)>, String> {
    let mut machine = Machine {
        bytes,
        ..Machine::default()
    };
    let value = machine.run()?;
    machine.named_tensors(value)
}

#[derive(Debug, Clone, Copy)]
enum Value {
    None,
    /// A boolean; its value is never needed.
    Bool,
    Int(i64),
    /// Index into `texts`.
    Text(usize),
    /// A list or tuple: index into `sequences`.
    Sequence(usize),
    /// Index into `dicts`.
    Dict(usize),
    Global(Global),
    /// Index into `storages`.
    Storage(usize),
    /// Index into `tensors`.
    Tensor(usize),
}

/// The names that may occur.
#[derive(Debug, Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    StorageOf(Element),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "DoubleStorage") => Self::StorageOf(Element::F64),
            ("torch", "FloatStorage") => Self::StorageOf(Element::F32),
            ("torch", "HalfStorage") => Self::StorageOf(Element::F16),
            ("torch", "BFloat16Storage") => Self::StorageOf(Element::Bf16),
            ("torch", "LongStorage") => Self::StorageOf(Element::I64),
            ("torch", "IntStorage") => Self::StorageOf(Element::I32),
            ("torch", "ShortStorage") => Self::StorageOf(Element::I16),
            ("torch", "CharStorage") => Self::StorageOf(Element::I8),
            ("torch", "ByteStorage") => Self::StorageOf(Element::U8),
            ("torch", "BoolStorage") => Self::StorageOf(Element::Bool),
            _ => return None,
        })
    }
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    /// Index of the next byte.
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack at which a `MARK` was set.
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    texts: Vec<&'a str>,
    sequences: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    /// Name and element type.
    storages: Vec<(&'a str, Element)>,
    tensors: Vec<PickledTensor>,
}

impl<'a> Machine<'a> {
    /// Runs until `STOP` and returns the value on top of the stack.
    fn run(&mut self) -> Result<Value, String> {
        loop {
            let opcode = self.byte()?;
            match opcode {
                b'.' => return self.pop(),
                // PROTO and FRAME: their arguments are not needed.
                0x80 => drop(self.byte()?),
                0x95 => drop(self.take(8)?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'N' => self.stack.push(Value::None),
                0x88 | 0x89 => self.stack.push(Value::Bool),
                b'K' | b'M' | b'J' | 0x8a => self.int(opcode)?,
                b'X' | 0x8c | 0x8d => self.text(opcode)?,
                b'q' | b'r' | 0x94 | b'h' | b'j' => self.memo(opcode)?,
                b')' | b']' => self.sequence(0)?,
                0x85..=0x87 => self.sequence(usize::from(opcode - 0x84))?,
                b't' | b'l' => {
                    let items = self.above_mark()?;
                    self.push_sequence(items);
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.above_mark()?;
                    self.append(items)?;
                }
                b'}' => self.push_dict(),
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.above_mark()?;
                    self.set(&items)?;
                }
                b'c' | 0x93 => self.global(opcode)?,
                b'Q' => self.persistent_id()?,
                b'R' => self.call()?,
                b'b' => self.build()?,
                other => {
                    return Err(format!(
                        "unsupported pickle opcode {other:#04x}, which a dictionary of \
                         tensors does not need; load the file in Python and save it as safetensors"
                    ));
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..count).ok_or("truncated pickle")?;
        self.at += count;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    /// Reads an unsigned little-endian number of up to eight bytes.
    fn unsigned(&mut self, width: usize) -> Result<u64, String> {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(self.take(width)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn length(&mut self, width: usize) -> Result<usize, String> {
        usize::try_from(self.unsigned(width)?).map_err(|_| "invalid length".to_owned())
    }

    fn str(&mut self, length: usize) -> Result<&'a str, String> {
        std::str::from_utf8(self.take(length)?)
            .map_err(|_| "a string is not valid UTF-8".to_owned())
    }

    /// Reads a line, without its end.
    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|byte| *byte == b'\n');
        let line = self.str(length.ok_or("truncated pickle")?)?;
        self.at += 1;
        Ok(line)
    }

    fn pop(&mut self) -> Result<Value, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() > floor {
            self.stack.pop().ok_or_else(damaged)
        } else {
            Err(damaged())
        }
    }

    fn above_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().ok_or_else(damaged)?;
        Ok(self.stack.split_off(mark))
    }

    fn int(&mut self, opcode: u8) -> Result<(), String> {
        let number = match opcode {
            b'K' => self.unsigned(1)? as i64,
            b'M' => self.unsigned(2)? as i64,
            b'J' => i64::from(self.unsigned(4)? as u32 as i32),
            _ => {
                let width = usize::from(self.byte()?);
                if width > 8 {
                    return Err("an integer has more than 64 bits".to_owned());
                }
                // Two's complement of `width` bytes: shifting left and right sign-extends it.
                let unused = 64 - 8 * width as u32;
                let bits = self.unsigned(width)?.checked_shl(unused).unwrap_or(0);
                (bits as i64).checked_shr(unused).unwrap_or(0)
            }
        };
        self.stack.push(Value::Int(number));
        Ok(())
    }

    fn text(&mut self, opcode: u8) -> Result<(), String> {
        let width = match opcode {
            0x8c => 1,
            b'X' => 4,
            _ => 8,
        };
        let length = self.length(width)?;
        let text = self.str(length)?;
        self.stack.push(Value::Text(self.texts.len()));
        self.texts.push(text);
        Ok(())
    }

    fn memo(&mut self, opcode: u8) -> Result<(), String> {
        let index = match opcode {
            b'q' | b'h' => self.unsigned(1)?,
            b'r' | b'j' => self.unsigned(4)?,
            _ => self.memo.len() as u64,
        };
        if matches!(opcode, b'h' | b'j') {
            let value = *self.memo.get(&index).ok_or_else(damaged)?;
            self.stack.push(value);
        } else {
            let top = *self.stack.last().ok_or_else(damaged)?;
            self.memo.insert(index, top);
        }
        Ok(())
    }

    /// Creates a sequence of the `count` values on top of the stack.
    fn sequence(&mut self, count: usize) -> Result<(), String> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push_sequence(items);
        Ok(())
    }

    fn push_sequence(&mut self, items: Vec<Value>) {
        self.stack.push(Value::Sequence(self.sequences.len()));
        self.sequences.push(items);
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn append(&mut self, items: Vec<Value>) -> Result<(), String> {
        match self.stack.last() {
            Some(Value::Sequence(list)) => self.sequences[*list].extend(items),
            _ => return Err(damaged()),
        }
        Ok(())
    }

    /// Sets keys and values, which alternate in `items`, in the dictionary on top of the stack.
    fn set(&mut self, items: &[Value]) -> Result<(), String> {
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err(damaged());
        };
        match self.stack.last() {
            Some(Value::Dict(dict)) => {
                self.dicts[*dict].extend(pairs.iter().map(|[key, value]| (*key, *value)));
            }
            _ => return Err(damaged()),
        }
        Ok(())
    }

    fn global(&mut self, opcode: u8) -> Result<(), String> {
        let (module, name) = if opcode == b'c' {
            (self.line()?, self.line()?)
        } else {
            let name = self.pop()?;
            let module = self.pop()?;
            (self.text_of(module)?, self.text_of(name)?)
        };
        let global = Global::named(module, name).ok_or_else(|| {
            format!(
                "contains `{module}.{name}`, which is not a tensor; nothing in the file was \
                 executed; if you trust the file, load it in Python and save it as safetensors"
            )
        })?;
        self.stack.push(Value::Global(global));
        Ok(())
    }

    /// Reads `('storage', torch.FloatStorage, '0', 'cpu', 6)`: element type, name, device,
    /// elements.
    fn persistent_id(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let [
            tag,
            Value::Global(Global::StorageOf(element)),
            key,
            _,
            Value::Int(_),
        ] = self.sequence_of(id)?[..]
        else {
            return Err(damaged());
        };
        if self.text_of(tag)? != "storage" {
            return Err(damaged());
        }
        let name = self.text_of(key)?;
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push((name, element));
        Ok(())
    }

    fn call(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let Value::Global(function) = self.pop()? else {
            return Err(damaged());
        };
        let arguments = self.sequence_of(arguments)?;
        match (function, arguments) {
            (Global::OrderedDict, []) => self.push_dict(),
            (Global::RebuildParameter, &[tensor @ Value::Tensor(_), ..]) => self.stack.push(tensor),
            (
                Global::RebuildTensor,
                &[
                    Value::Storage(storage),
                    Value::Int(offset),
                    shape,
                    strides,
                    Value::Bool,
                    ..,
                ],
            ) => {
                let (name, element) = self.storages[storage];
                let tensor = PickledTensor {
                    storage: name.to_owned(),
                    element,
                    offset,
                    shape: self.ints_of(shape)?,
                    strides: self.ints_of(strides)?,
                };
                self.stack.push(Value::Tensor(self.tensors.len()));
                self.tensors.push(tensor);
            }
            _ => return Err(damaged()),
        }
        Ok(())
    }

    /// Sets attributes of an object. The only one in a dictionary of tensors is the `_metadata` of
    /// a module, which contains no weights.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict(_)) => Ok(()),
            _ => Err(damaged()),
        }
    }

    fn text_of(&self, value: Value) -> Result<&'a str, String> {
        match value {
            Value::Text(text) => Ok(self.texts[text]),
            _ => Err(damaged()),
        }
    }

    fn sequence_of(&self, value: Value) -> Result<&[Value], String> {
        match value {
            Value::Sequence(sequence) => Ok(&self.sequences[sequence]),
            _ => Err(damaged()),
        }
    }

    /// Returns the sizes or strides of a tensor's dimensions.
    fn ints_of(&self, value: Value) -> Result<Vec<i64>, String> {
        let items = self.sequence_of(value)?;
        if items.len() > DIMENSIONS_MAX {
            return Err(format!("a tensor has {} dimensions", items.len()));
        }
        let int = |item: &Value| match item {
            Value::Int(number) => Ok(*number),
            _ => Err(damaged()),
        };
        items.iter().map(int).collect()
    }

    fn named_tensors(&self, value: Value) -> Result<Vec<(String, PickledTensor)>, String> {
        let Value::Dict(dict) = value else {
            return Err("does not contain a dictionary of tensors".to_owned());
        };
        let mut named = Vec::new();
        for (key, value) in &self.dicts[dict] {
            let name = self.text_of(*key)?.to_owned();
            let Value::Tensor(tensor) = value else {
                return Err(format!("`{name}` is not a tensor"));
            };
            named.push((name, self.tensors[*tensor].clone()));
        }
        Ok(named)
    }
}

fn damaged() -> String {
    "the pickle is corrupt or was not written by `torch.save`".to_owned()
}

/// Returns the pickle (protocol 2) of a dictionary of float32 tensors of these names and shapes,
/// the n-th over the storage `n`: calls of `torch._utils._rebuild_tensor_v2`, as `torch.save`
/// writes them.
pub fn write_pickle(tensors: &[(&str, Vec<i64>)]) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    }
    fn integer(out: &mut Vec<u8>, value: i64) {
        // LONG1: a length, then that many little-endian bytes.
        out.extend([0x8a, 8]);
        out.extend(value.to_le_bytes());
    }
    fn tuple(out: &mut Vec<u8>, values: &[i64]) {
        out.push(b'(');
        for &value in values {
            integer(out, value);
        }
        out.push(b't');
    }
    let mut out = b"\x80\x02}(".to_vec(); // protocol 2, an empty dict, a mark
    for (number, (name, shape)) in tensors.iter().enumerate() {
        let strides: Vec<i64> = (1..=shape.len())
            .map(|axis| shape[axis..].iter().product())
            .collect();
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n(");
        // The storage: ('storage', torch.FloatStorage, its file, its device, its length).
        out.push(b'(');
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &number.to_string());
        text(&mut out, "cpu");
        integer(&mut out, shape.iter().product());
        out.extend(b"tQ"); // a tuple, found by its persistent id
        integer(&mut out, 0); // where in the storage it begins
        tuple(&mut out, shape);
        tuple(&mut out, &strides);
        out.extend(b"\x89ccollections\nOrderedDict\n)R"); // no gradient, no hooks
        out.extend(b"tR"); // the arguments' tuple; the call
    }
    out.extend(b"u."); // put all into the dict; the end
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(program: &[u8]) -> String {
        read(program).unwrap_err()
    }

    #[test]
    fn a_foreign_global_is_named_and_nothing_after_it_is_read() {
        // `os.system("true")`, the usual start of a pickle exploit, in both spellings.
        assert!(
            error(b"\x80\x02cos\nsystem\n").contains("contains `os.system`, which is not a tensor")
        );
        assert!(error(b"\x80\x04\x8c\x02os\x8c\x06system\x93").contains("`os.system`"));
        assert!(error(b"\x80\x02ctorch.storage\nUntypedStorage\n").contains("UntypedStorage"));
    }

    #[test]
    fn values_that_are_not_named_tensors_are_refused() {
        assert!(error(b"\x80\x02K\x01.").contains("does not contain a dictionary of tensors"));
        assert!(error(b"\x80\x02}X\x01\x00\x00\x00aK\x01s.").contains("`a` is not a tensor"));
        assert!(error(b"\x80\x02}K\x01K\x01s.").contains("corrupt"));
        assert_eq!(read(b"\x80\x02}.").unwrap(), []);
    }

    #[test]
    fn every_damaged_program_is_an_error_and_never_a_panic() {
        // Each opcode but STOP, on stacks with few of the values it needs, with arguments of ones.
        for opcode in (0..=255_u8).filter(|opcode| *opcode != b'.') {
            for before in [&b""[..], b"(", b"}", b"(K\x01", b")K\x01"] {
                let mut program = before.to_vec();
                program.push(opcode);
                program.extend([0xff; 9]);
                assert!(read(&program).is_err(), "{program:?}");
            }
        }
    }

    #[test]
    fn numbers_of_every_width_keep_their_sign() {
        let check = |program: &[u8], expected: i64| {
            let mut machine = Machine {
                bytes: program,
                ..Machine::default()
            };
            let value = machine.run().unwrap();
            assert!(
                matches!(value, Value::Int(number) if number == expected),
                "{value:?}"
            );
        };
        check(b"K\xff.", 255);
        check(b"M\xff\xff.", 65535);
        check(b"J\xfe\xff\xff\xff.", -2);
        check(b"\x8a\x00.", 0);
        check(b"\x8a\x02\xfe\xff.", -2);
        check(b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f.", i64::MAX);
        assert!(error(b"\x8a\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01.").contains("64 bits"));
    }
}
