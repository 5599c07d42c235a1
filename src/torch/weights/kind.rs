//! The libtorch kind of each element type.

use tch::Kind;

use ovchat_models::checkpoint::Element;

/// The libtorch kind of an element type.
pub fn kind(element: Element) -> Kind {
    match element {
        Element::F64 => Kind::Double,
        Element::F32 => Kind::Float,
        Element::F16 => Kind::Half,
        Element::Bf16 => Kind::BFloat16,
        Element::I64 => Kind::Int64,
        Element::I32 => Kind::Int,
        Element::I16 => Kind::Int16,
        Element::I8 => Kind::Int8,
        Element::U8 => Kind::Uint8,
        Element::Bool => Kind::Bool,
    }
}
