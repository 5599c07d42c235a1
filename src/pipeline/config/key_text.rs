//! The keys of a YAML map, read as text.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};

/// The deserialization seed of a key: reads it as text; `None` for a list or a map.
#[derive(Default)]
pub struct KeyText<'a> {
    /// A key to fail at, so that the error carries its position.
    pub refused: Option<&'a str>,
}

impl KeyText<'_> {
    fn key<E: Error>(&self, key: String) -> Result<Option<String>, E> {
        if self.refused == Some(key.as_str()) {
            return Err(E::custom("this key is refused"));
        }
        Ok(Some(key))
    }
}

impl<'de> DeserializeSeed<'de> for KeyText<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for KeyText<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        self.key("null".to_owned())
    }

    fn visit_bool<E: Error>(self, key: bool) -> Result<Self::Value, E> {
        self.key(key.to_string())
    }

    fn visit_i64<E: Error>(self, key: i64) -> Result<Self::Value, E> {
        self.key(key.to_string())
    }

    fn visit_u64<E: Error>(self, key: u64) -> Result<Self::Value, E> {
        self.key(key.to_string())
    }

    fn visit_i128<E: Error>(self, key: i128) -> Result<Self::Value, E> {
        self.key(key.to_string())
    }

    fn visit_u128<E: Error>(self, key: u128) -> Result<Self::Value, E> {
        self.key(key.to_string())
    }

    fn visit_f64<E: Error>(self, key: f64) -> Result<Self::Value, E> {
        self.key(key.to_string())
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        self.key(key.to_owned())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<Self::Value, A::Error> {
        let (_, content) = tagged.variant::<IgnoredAny>()?;
        content.newtype_variant::<IgnoredAny>()?;
        Ok(None)
    }
}
