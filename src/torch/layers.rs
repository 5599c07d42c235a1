//! The basic layers of all networks, and the sources that they load weights from.
//!
//! A layer is created by `new(&Path, sizes…)`, with the weight names of the Python implementation
//! (`q_proj`, `layer_norm1`), and run by `forward(&self, …)`, in the dtype of its input: trained
//! weights are stored in float32 and cast where they are used. Layers hold weights and nothing
//! else; caches and gradients belong to the caller. Sources: `nn.Linear`, `nn.LayerNorm` of
//! PyTorch; `Qwen2RMSNorm`, `Qwen2RotaryEmbedding`, `apply_rotary_pos_emb` of transformers'
//! `models/qwen2/modeling_qwen2.py` (the same in `models/llama/modeling_llama.py`); `ACT2FN` of
//! transformers' `activations.py`.

use std::cell::Cell;
use std::ops::Div;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::casts::{cast, cast_weight};
use super::shim::PackedWeight;
use ovchat_models::ModelError;

/// A source of weights: a checkpoint, a checkpoint with an adapter merged into it, or a test.
pub trait WeightSource {
    /// Returns the tensor `name`, on the device and in the dtype that the network computes in.
    /// Fails if it is missing or has another shape.
    fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError>;

    /// True if large weights of linear layers are packed: the network only infers, on a CPU in float32.
    fn packs(&self) -> bool {
        false
    }

    /// Returns the unmerged adapter of the linear layer `name`, if one is being trained.
    fn adapter(
        &self,
        _name: &str,
        _inputs: i64,
        _outputs: i64,
    ) -> Result<Option<Lora>, ModelError> {
        Ok(None)
    }
}

/// A low-rank update of a linear layer, `scale B A` (Hu et al. 2021, *LoRA*, arXiv 2106.09685,
/// equation 3), that is not merged into its weight.
#[derive(Debug)]
pub struct Lora {
    pub a: Tensor, // [rank, in], float32
    pub b: Tensor, // [out, rank], float32
    pub scale: f64,
    /// The dropout of its inputs, and the number that distinguishes its mask from those of other
    /// layers.
    pub dropout: Option<(Rc<Dropout>, i64)>,
}

impl Lora {
    /// Maps `[.., in]` to `[.., out]`, in the dtype of `xs`.
    fn forward(&self, xs: &Tensor) -> Tensor {
        let kind = xs.kind();
        let dropped = self
            .dropout
            .as_ref()
            .map(|(dropout, own)| dropout.forward(xs, *own));
        let xs = dropped.as_ref().unwrap_or(xs);
        let inner = xs.linear(&cast_weight(&self.a, kind), None::<&Tensor>); // [.., rank]
        inner.linear(&cast_weight(&self.b, kind), None::<&Tensor>) * self.scale
    }
}

/// Dropout (Srivastava et al. 2014) whose mask depends only on the pass, the layer and the
/// position, so that a recomputed layer and a resumed training drop the same values.
#[derive(Debug)]
pub struct Dropout {
    /// The probability of dropping a value; the others are scaled up.
    pub share: f64,
    /// The number of the pass; `None` disables dropout.
    pub pass: Cell<Option<i64>>,
}

impl Dropout {
    fn forward(&self, xs: &Tensor, layer: i64) -> Tensor {
        const MASK: i64 = 0xffff_ffff;
        let Some(pass) = self.pass.get().filter(|_| self.share > 0.0) else {
            return xs.shallow_clone();
        };
        // Wellons' `lowbias32` in 64 bits, applied to the positions with a start that depends on
        // the pass.
        let mix = |xs: &Tensor, shift: i64, factor: i64| {
            (xs.bitwise_xor_tensor(&xs.bitwise_right_shift_tensor_scalar(shift)) * factor)
                .bitwise_and(MASK)
        };
        let places = Tensor::arange(xs.numel() as i64, (Kind::Int64, xs.device()));
        let start = pass.wrapping_mul(0x9e37_79b9).wrapping_add(layer) & MASK;
        let mixed = (mix(&places, 16, 0x7feb_352d) + start).bitwise_and(MASK);
        let mixed = mix(&mix(&mixed, 15, 0x846c_a68b), 16, 0x7feb_352d);
        let kept = mixed.ge((self.share * 4_294_967_296.0) as i64).view_as(xs);
        xs * kept.to_kind(xs.kind()) / (1.0 - self.share)
    }
}

/// A path in a [`WeightSource`], such as `language_model.layers.3`.
#[derive(Clone)]
pub struct Path<'a> {
    source: &'a dyn WeightSource,
    name: String,
}

impl<'a> Path<'a> {
    pub fn root(source: &'a dyn WeightSource) -> Self {
        let name = String::new();
        Self { source, name }
    }

    /// Takes the weight `leaf` below this path.
    pub fn take(&self, leaf: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        self.source.take(&(self / leaf).name, shape)
    }

    /// True if large weights of linear layers are packed.
    pub fn packs(&self) -> bool {
        self.source.packs()
    }

    /// The unmerged adapter of the linear layer at this path.
    fn adapter(&self, inputs: i64, outputs: i64) -> Result<Option<Lora>, ModelError> {
        self.source.adapter(&self.name, inputs, outputs)
    }
}

impl<'a, Part: std::fmt::Display> Div<Part> for &Path<'a> {
    type Output = Path<'a>;

    /// `&path / "mlp" / 3` is the path `path.mlp.3`.
    fn div(self, part: Part) -> Path<'a> {
        let name = match self.name.as_str() {
            "" => part.to_string(),
            name => format!("{name}.{part}"),
        };
        Path {
            source: self.source,
            name,
        }
    }
}

impl<'a, Part: std::fmt::Display> Div<Part> for Path<'a> {
    type Output = Path<'a>;

    fn div(self, part: Part) -> Path<'a> {
        &self / part
    }
}

/// The presence of a bias in a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    Yes,
    No,
}

/// A weight of a linear layer, `[out, in]`.
#[derive(Debug)]
pub enum Weight {
    Plain(Tensor),
    /// In the order in which products of few rows read it.
    Packed(PackedWeight),
}

/// The number of elements from which packing a weight pays: products of 15 to 64 rows then take 0.3 to
/// 0.8 of the time (two cores with AVX-512), and those of one row are hardly slower.
const PACKED_MIN: usize = 600_000;

impl Weight {
    /// Packs a large weight, if `packs`.
    pub fn new(weight: Tensor, packs: bool) -> Self {
        let packed = (packs && weight.numel() >= PACKED_MIN).then(|| PackedWeight::new(&weight));
        packed.flatten().map_or(Self::Plain(weight), Self::Packed)
    }

    /// Maps `[.., in]` to `[.., out]`, in the dtype of `xs`.
    pub fn forward(&self, xs: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self {
            Self::Plain(weight) => {
                let bias = bias.map(|bias| cast_weight(bias, xs.kind()));
                xs.linear(&cast_weight(weight, xs.kind()), bias)
            }
            Self::Packed(weight) => weight.linear(xs, bias),
        }
    }
}

/// `x W^T + b`, plus the output of an adapter.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>, // [out]
    adapter: Option<Lora>,
}

impl Linear {
    pub fn new(path: &Path, inputs: i64, outputs: i64, bias: Bias) -> Result<Self, ModelError> {
        let weight = path.take("weight", &[outputs, inputs])?;
        let bias = match bias {
            Bias::Yes => Some(path.take("bias", &[outputs])?),
            Bias::No => None,
        };
        Ok(Self {
            weight: Weight::new(weight, path.packs()),
            bias,
            adapter: path.adapter(inputs, outputs)?,
        })
    }

    /// Maps `[.., in]` to `[.., out]`.
    pub fn forward(&self, xs: &Tensor) -> Tensor {
        let ys = self.weight.forward(xs, self.bias.as_ref());
        match &self.adapter {
            Some(adapter) => ys + adapter.forward(xs),
            None => ys,
        }
    }
}

/// Layer norm over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub fn new(path: &Path, size: i64, eps: f64) -> Result<Self, ModelError> {
        let weight = path.take("weight", &[size])?;
        let bias = path.take("bias", &[size])?;
        Ok(Self { weight, bias, eps })
    }

    pub fn forward(&self, xs: &Tensor) -> Tensor {
        let size = self.weight.size();
        let [weight, bias] = [&self.weight, &self.bias].map(|own| cast_weight(own, xs.kind()));
        xs.layer_norm(size, Some(&weight), Some(&bias), self.eps, false)
    }
}

/// Root-mean-square norm over the last dimension.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub fn new(path: &Path, size: i64, eps: f64) -> Result<Self, ModelError> {
        let weight = path.take("weight", &[size])?;
        Ok(Self { weight, eps })
    }

    /// Computes the norm in float32 and the product with the weight in the dtype of `xs`.
    /// Libtorch's fused kernel multiplies before it rounds, which differs in bfloat16.
    pub fn forward(&self, xs: &Tensor) -> Tensor {
        let wide = cast(xs, Kind::Float);
        let variance = wide
            .square()
            .mean_dim([-1i64].as_slice(), true, Kind::Float);
        let normed = wide * (variance + self.eps).rsqrt();
        cast_weight(&self.weight, xs.kind()) * cast(&normed, xs.kind())
    }
}

/// Activation functions by their names in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `gelu`: exact, with the error function.
    Gelu,
    /// `gelu_pytorch_tanh`: the tanh approximation.
    GeluTanh,
    /// `quick_gelu`: `x sigmoid(1.702 x)`.
    QuickGelu,
    /// `silu`: `x sigmoid(x)`.
    Silu,
}

impl Activation {
    pub fn forward(self, xs: &Tensor) -> Tensor {
        match self {
            Self::Gelu => xs.gelu("none"),
            Self::GeluTanh => xs.gelu("tanh"),
            Self::QuickGelu => xs * (xs * 1.702).sigmoid(),
            Self::Silu => xs.silu(),
        }
    }
}

/// Rotary position embedding in the "rotate half" form.
#[derive(Debug)]
pub struct Rotary {
    inverse_frequencies: Tensor, // [head_dim / 2], float32
}

/// The cosines and sines of some positions.
#[derive(Debug)]
pub struct RotaryCosSin {
    cos: Tensor, // [tokens, head_dim]
    sin: Tensor, // [tokens, head_dim]
}

impl Rotary {
    /// Frequency `j` is `theta^(-2j / head_dim)`.
    pub fn new(head_dim: i64, theta: f64, device: Device) -> Self {
        let exponents = Tensor::arange_start_step(0, head_dim, 2, (Kind::Float, Device::Cpu));
        let frequencies = Tensor::pow_scalar(theta, &(exponents / head_dim as f64));
        let inverse_frequencies = frequencies.reciprocal().to_device(device);
        Self {
            inverse_frequencies,
        }
    }

    /// The cosines and sines of `positions` (`[tokens]`, any integer kind), computed in float32 and
    /// stored in `kind`.
    pub fn angles(&self, positions: &Tensor, kind: Kind) -> RotaryCosSin {
        let positions = positions.to_kind(Kind::Float).unsqueeze(-1);
        let half = positions * &self.inverse_frequencies; // [tokens, head_dim / 2]
        let whole = Tensor::cat(&[&half, &half], -1);
        RotaryCosSin {
            cos: whole.cos().to_kind(kind),
            sin: whole.sin().to_kind(kind),
        }
    }
}

impl RotaryCosSin {
    /// Rotates `xs` (`[heads, tokens, head_dim]`) by the angles of its tokens.
    pub fn rotate(&self, xs: &Tensor) -> Tensor {
        let halves = xs.chunk(2, -1);
        let turned = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
        xs * &self.cos + turned * &self.sin
    }

    /// Selects some tokens (`[some]`, int64).
    pub fn of(&self, tokens: &Tensor) -> Self {
        self.map(|own| own.index_select(0, tokens))
    }

    /// Applies `change` to the cosines and the sines (`[tokens, head_dim]`).
    pub fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            cos: change(&self.cos),
            sin: change(&self.sin),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Pseudorandom numbers in [-1, 1) that depend only on the seed: libtorch's own generator is
    /// shared by all tests that run concurrently.
    pub fn noise(shape: &[i64], seed: i64) -> Tensor {
        let count = shape.iter().product::<i64>();
        let places = Tensor::arange(count, (Kind::Double, Device::Cpu));
        let waves = (places * 12.9898 + seed * 78).sin() * 43_758.545_3;
        ((&waves - waves.floor()) * 2.0 - 1.0)
            .to_kind(Kind::Float)
            .reshape(shape)
    }

    /// A source that fabricates every requested weight and records the requests.
    pub struct FakeSource {
        pub kind: Kind,
        seed: i64,
        pub names: RefCell<Vec<(String, Vec<i64>)>>,
    }

    impl FakeSource {
        pub fn new(kind: Kind, seed: i64) -> Self {
            let names = RefCell::default();
            Self { kind, seed, names }
        }
    }

    impl WeightSource for FakeSource {
        fn take(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
            let mut names = self.names.borrow_mut();
            names.push((name.to_owned(), shape.to_vec()));
            Ok((noise(shape, 1000 * self.seed + names.len() as i64) * 0.5).to_kind(self.kind))
        }
    }

    #[test]
    fn rms_norm_rounds_before_it_multiplies_by_the_weight() {
        let norm = RmsNorm {
            weight: Tensor::from_slice(&[1.5f32, -0.75, 3.0]).to_kind(Kind::BFloat16),
            eps: 1e-6,
        };
        let xs = Tensor::from_slice(&[1.0f32, 2.0, 3.0]).to_kind(Kind::BFloat16);
        let scale = (14.0f32 / 3.0 + 1e-6).sqrt().recip();
        let expected = (&norm.weight)
            * Tensor::from_slice(&[scale, 2.0 * scale, 3.0 * scale]).to_kind(Kind::BFloat16);
        assert_eq!(norm.forward(&xs), expected);
    }

    #[test]
    fn packed_weights_give_what_plain_ones_give() {
        let (weight, bias) = (noise(&[1500, 401], 1), noise(&[1500], 2));
        assert!(matches!(
            Weight::new(noise(&[3, 4], 1), true),
            Weight::Plain(_)
        ));
        let [plain, packed] = [false, true].map(|packs| Weight::new(weight.copy(), packs));
        // Where libtorch has no packed products, both are plain.
        for rows in [1, 7, 64] {
            let xs = noise(&[rows, 401], 3);
            for bias in [None, Some(&bias)] {
                let [plain, packed] = [&plain, &packed].map(|weight| weight.forward(&xs, bias));
                let apart = (plain - packed).abs().max().double_value(&[]);
                assert!(apart < 3e-5, "{rows} {apart}");
            }
        }
    }

    #[test]
    fn rotation_keeps_lengths_and_depends_on_distance_only() {
        let rotary = Rotary::new(8, 1e4, Device::Cpu);
        let angles = |start: i64| {
            let positions = Tensor::arange_start(start, start + 2, (Kind::Int64, Device::Cpu));
            rotary.angles(&positions, Kind::Float)
        };
        let xs = noise(&[1, 2, 8], 3);
        let product = |start: i64| {
            let turned = angles(start).rotate(&xs);
            (turned.get(0).get(0) * turned.get(0).get(1)).sum(Kind::Float)
        };
        assert!((product(0) - product(900)).abs().double_value(&[]) < 1e-3);
        let lengths = |xs: &Tensor| xs.square().sum_dim_intlist([-1i64].as_slice(), false, None);
        assert!(lengths(&angles(7).rotate(&xs)).allclose(&lengths(&xs), 1e-5, 1e-6, false));
    }

    #[test]
    fn the_same_pass_drops_the_same_and_another_pass_or_layer_something_else() {
        let dropout = Dropout {
            share: 0.2,
            pass: Cell::new(None),
        };
        let xs = Tensor::ones([100, 100], (Kind::Float, Device::Cpu));
        assert_eq!(dropout.forward(&xs, 1), xs);
        let dropped = |pass, layer| {
            dropout.pass.set(Some(pass));
            dropout.forward(&xs, layer)
        };
        let first = dropped(7, 1);
        assert_eq!(dropped(7, 1), first);
        assert!((first.mean(None).double_value(&[]) - 1.0).abs() < 0.02);
        let zeros = |xs: &Tensor| xs.eq(0.0).to_kind(Kind::Float);
        assert!((zeros(&first).mean(None).double_value(&[]) - 0.2).abs() < 0.02);
        for other in [dropped(8, 1), dropped(7, 2)] {
            // Independent: both drop the same position in 4 % of the cases.
            let both = (zeros(&first) * zeros(&other)).mean(None).double_value(&[]);
            assert!((both - 0.04).abs() < 0.01, "{both}");
        }
    }

    #[test]
    fn a_place_is_named_with_dots() {
        let made = FakeSource::new(Kind::Float, 0);
        let path = &Path::root(&made) / "layers" / 3;
        Linear::new(&(&path / "q_proj"), 2, 4, Bias::Yes).unwrap();
        let names = made.names.into_inner();
        assert_eq!(names[0], ("layers.3.q_proj.weight".to_owned(), vec![4, 2]));
        assert_eq!(names[1], ("layers.3.q_proj.bias".to_owned(), vec![4]));
    }
}
