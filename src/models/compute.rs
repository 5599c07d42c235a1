//! Settings of a computation: device, dtype and memory limit.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The device and the dtype that a network computes with, and its memory limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compute {
    pub device: DeviceSpec,
    pub dtype: Dtype,
    pub memory_gb: Option<Gigabytes>,
}

/// A compute device: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceSpec {
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

impl TryFrom<String> for DeviceSpec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = |digits: &str| digits.parse().ok().map(Self::Cuda);
        match text.as_str() {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            other => other.strip_prefix("cuda:").and_then(number),
        }
        .ok_or_else(|| {
            format!("unknown device `{text}`, expected `auto`, `cpu`, `cuda` or `cuda:N`")
        })
    }
}

impl From<DeviceSpec> for String {
    fn from(device: DeviceSpec) -> Self {
        match device {
            DeviceSpec::Auto => "auto".to_owned(),
            DeviceSpec::Cpu => "cpu".to_owned(),
            DeviceSpec::Cuda(index) => format!("cuda:{index}"),
        }
    }
}

impl JsonSchema for DeviceSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Device".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]+)?)$"})
    }
}

/// An amount of memory in GB of 10⁹ bytes, above 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Gigabytes(f64);

impl Gigabytes {
    pub fn bytes(self) -> u64 {
        (self.0 * 1e9) as u64
    }
}

impl TryFrom<f64> for Gigabytes {
    type Error = String;

    fn try_from(value: f64) -> Result<Self, String> {
        if value > 0.0 && value.is_finite() {
            return Ok(Self(value));
        }
        Err(format!(
            "{value} is out of range, expected a number above 0"
        ))
    }
}

impl From<Gigabytes> for f64 {
    fn from(value: Gigabytes) -> Self {
        value.0
    }
}

impl JsonSchema for Gigabytes {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Gigabytes".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "number", "exclusiveMinimum": 0})
    }
}

/// The dtype of the computation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Auto,
    Float32,
    Bfloat16,
}
