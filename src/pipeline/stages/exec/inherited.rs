//! The environment variables that a command inherits.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;

/// The environment variables that a command inherits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inherited {
    /// Variables that are inherited even if they look like secrets.
    names: Vec<String>,
    /// True if no other variables are inherited, except the basic ones.
    is_only: bool,
}

/// Basic variables that programs need to start, to find their files and to choose the locale.
const BASIC: [&str; 12] = [
    "HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "TMPDIR", "TZ", "USER",
    "LC_ALL",
];

impl Inherited {
    /// True for the default: all variables except secrets.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// True if a variable is inherited; `is_named` is true if the pipeline uses its value.
    pub fn takes(&self, name: &str, is_named: bool) -> bool {
        let is_listed = self.names.iter().any(|listed| listed == name);
        let is_basic = BASIC.contains(&name) || name.starts_with("LC_");
        is_listed || is_basic || !(self.is_only || is_named || is_secret(name))
    }

    /// True if only the basic and the listed variables are inherited.
    pub fn is_only(&self) -> bool {
        self.is_only
    }
}

/// True if a variable is named like a secret.
fn is_secret(name: &str) -> bool {
    let name = name.to_uppercase();
    let ends = ["_TOKEN", "_KEY", "_SECRET", "_PAT"];
    let within = ["PASSWORD", "PASSWD", "APIKEY", "CREDENTIAL"];
    ends.iter().any(|end| name.ends_with(end))
        || within.iter().any(|word| name.contains(word))
        || name.starts_with("AWS_")
}

/// The keyword that restricts a command to the basic and the listed variables.
const ONLY: &str = "only";

impl<'de> Deserialize<'de> for Inherited {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InheritedVisitor;

        impl<'de> Visitor<'de> for InheritedVisitor {
            type Value = Inherited;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a list of names such as `[HF_TOKEN]`, `only`, or `{ only: [HF_TOKEN] }`",
                )
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Inherited, E> {
                if text != ONLY {
                    return Err(E::invalid_value(serde::de::Unexpected::Str(text), &self));
                }
                Ok(Inherited {
                    names: Vec::new(),
                    is_only: true,
                })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Inherited, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = list.next_element::<String>()? {
                    names.push(checked(name)?);
                }
                Ok(Inherited {
                    names,
                    is_only: false,
                })
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Inherited, A::Error> {
                let Some(key) = map.next_key::<String>()? else {
                    return Err(A::Error::missing_field(ONLY));
                };
                if key != ONLY {
                    return Err(A::Error::unknown_field(&key, &[ONLY]));
                }
                let mut names = Vec::new();
                for name in map.next_value::<Vec<String>>()? {
                    names.push(checked(name)?);
                }
                if let Some(key) = map.next_key::<String>()? {
                    return Err(A::Error::unknown_field(&key, &[ONLY]));
                }
                Ok(Inherited {
                    names,
                    is_only: true,
                })
            }
        }

        deserializer.deserialize_any(InheritedVisitor)
    }
}

fn checked<E: serde::de::Error>(name: String) -> Result<String, E> {
    if name.is_empty() || name.contains(['=', '\0', ' ', '$']) {
        return Err(E::custom(format!(
            "`{name}` is not a valid name of an environment variable; expected one such as `HF_TOKEN`"
        )));
    }
    Ok(name)
}

impl Serialize for Inherited {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let written = match (self.is_only, &self.names[..]) {
            (true, []) => json!(ONLY),
            (true, names) => json!({ ONLY: names }),
            (false, names) => json!(names),
        };
        written.serialize(serializer)
    }
}

impl JsonSchema for Inherited {
    fn schema_name() -> Cow<'static, str> {
        "Inherited".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names =
            json!({ "type": "array", "items": { "type": "string", "pattern": "^[^= $]+$" } });
        json_schema!({
            "anyOf": [
                names,
                { "const": ONLY },
                {
                    "type": "object",
                    "properties": { ONLY: names },
                    "required": [ONLY],
                    "additionalProperties": false
                }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_inherited_by_name_only() {
        let read = |text: &str| serde_json::from_str::<Inherited>(text);
        let usual = Inherited::default();
        let listed = read(r#"["HF_TOKEN"]"#).unwrap();
        let only = read(r#""only""#).unwrap();
        let only_listed = read(r#"{"only": ["HF_TOKEN"]}"#).unwrap();
        for (name, is_named, expected) in [
            ("PATH", false, [true, true, true, true]),
            // A pipeline may use `${env:HOME}`.
            ("HOME", true, [true, true, true, true]),
            ("LC_CTYPE", false, [true, true, true, true]),
            ("HF_TOKEN", false, [false, true, false, true]),
            ("HF_TOKEN", true, [false, true, false, true]),
            ("openai_api_key", false, [false, false, false, false]),
            ("MY_SECRET", false, [false, false, false, false]),
            ("PGPASSWORD", false, [false, false, false, false]),
            ("AWS_REGION", false, [false, false, false, false]),
            ("JUDGE", true, [false, false, false, false]),
            ("CUDA_VISIBLE_DEVICES", false, [true, true, false, false]),
            ("HTTPS_PROXY", false, [true, true, false, false]),
            ("KEYBOARD", false, [true, true, false, false]),
        ] {
            let kinds = [&usual, &listed, &only, &only_listed];
            assert_eq!(
                kinds.map(|kind| kind.takes(name, is_named)),
                expected,
                "{name}"
            );
        }
        for kind in [&listed, &only, &only_listed] {
            let text = serde_json::to_string(kind).unwrap();
            assert_eq!(&read(&text).unwrap(), kind);
        }
        for wrong in [r#""all""#, r#"["A=B"]"#, r#"{"all": []}"#, "{}", "7"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
