//! AdamW, learning-rate schedules and gradient clipping, equivalent to `torch.optim.AdamW`,
//! transformers' `get_…_schedule_with_warmup` and PyTorch's `clip_grad_norm_`.
//!
//! libtorch's optimizers cannot save their state through tch, hence this implementation. With
//! float32 moments an update is one operator for all weights, which allocates nothing, so it cannot
//! run out of memory halfway through the parameters. With 8-bit moments it processes a parameter in
//! pieces, in memory reserved before the first.

use tch::{Device, Kind, Tensor};

use super::blockwise_quant::{BLOCK, Codebook, QuantizedTensor};
use super::shim::{self, AdamwTensors};
use ovchat_models::{Optimizer, Schedule};

/// A trained weight with its canonical name.
#[derive(Debug)]
pub struct Parameter {
    pub name: String,
    /// A leaf tensor that requires gradients, in float32.
    pub tensor: Tensor,
}

/// Loshchilov and Hutter 2019, *Decoupled Weight Decay Regularization*, arXiv 1711.05101, algorithm
/// 2, in PyTorch's arrangement.
#[derive(Debug)]
pub struct AdamW {
    betas: [f64; 2],
    epsilon: f64,
    weight_decay: f64,
    /// The moments of each parameter, in the order of the parameters.
    moments: Vec<Moments>,
    /// The quantization tables of the first and the second moment, if they are stored in eight
    /// bits.
    tables: Option<[Codebook; 2]>,
}

/// The optimizer state of one parameter.
#[derive(Debug)]
pub struct Moments {
    /// Decaying mean of the gradient.
    pub exp_avg: Moment,
    /// Decaying mean of the squared gradient; in eight bits, its square root.
    pub exp_avg_sq: Moment,
    /// The number of updates of this parameter; one without a gradient is not updated.
    pub steps: i64,
}

/// A moment of a parameter, one number per weight.
#[derive(Debug)]
pub enum Moment {
    /// In float32, in the shape of the weights.
    Whole(Tensor),
    InBytes(QuantizedTensor),
}

impl Moment {
    /// The tensors that it is stored in, with the suffixes of their names.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Whole(tensor) => vec![("", tensor)],
            Self::InBytes(QuantizedTensor { codes, scales }) => {
                vec![(".codes", codes), (".scales", scales)]
            }
        }
    }
}

/// Blocks of a parameter that an 8-bit update processes at once: 256 MB in float32 on a GPU, where each
/// piece costs some 40 launches, and 16 MB on a CPU.
fn blocks_at_once(device: Device) -> i64 {
    let weights: i64 = match device {
        Device::Cpu => 1 << 22,
        _ => 1 << 26,
    };
    weights / BLOCK
}

impl AdamW {
    /// A new optimizer of `parameters`, on their device.
    pub fn new(
        parameters: &[Parameter],
        betas: [f64; 2],
        epsilon: f64,
        weight_decay: f64,
        optimizer: Optimizer,
    ) -> Self {
        let device = parameters.first().map(|first| first.tensor.device());
        let tables = device
            .filter(|_| optimizer == Optimizer::Adamw8bit)
            .map(|device| [true, false].map(|signed| Codebook::new(signed, device)));
        let zeros = |parameter: &Parameter| match &tables {
            None => [0, 1].map(|_| Moment::Whole(parameter.tensor.zeros_like())),
            Some(tables) => {
                let count = parameter.tensor.numel() as i64;
                tables
                    .each_ref()
                    .map(|table| Moment::InBytes(QuantizedTensor::zeros(count, table)))
            }
        };
        let moments = parameters.iter().map(|parameter| {
            let [exp_avg, exp_avg_sq] = zeros(parameter);
            Moments {
                exp_avg,
                exp_avg_sq,
                steps: 0,
            }
        });
        Self {
            betas,
            epsilon,
            weight_decay,
            moments: moments.collect(),
            tables,
        }
    }

    /// The state, in the order of the parameters.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Replaces the state.
    pub fn set_moments(&mut self, moments: Vec<Moments>) {
        assert_eq!(moments.len(), self.moments.len());
        self.moments = moments;
    }

    /// Reserves the memory that [`AdamW::step`] needs in addition to the gradients.
    pub fn reserve(&self, parameters: &[Parameter]) {
        if let (Some(_), Some(first)) = (&self.tables, parameters.first()) {
            let device = first.tensor.device();
            let weights = parameters
                .iter()
                .map(|parameter| parameter.tensor.numel() as i64);
            let blocks = (weights.max().unwrap_or(0) + BLOCK - 1) / BLOCK;
            let size = [8, blocks.min(blocks_at_once(device)), BLOCK];
            let _ = Tensor::empty(size, (Kind::Float, device));
        }
    }

    /// Updates those `parameters` that have a learning rate in `rates`. Overwrites the gradients of
    /// those with 8-bit moments.
    pub fn step(&mut self, parameters: &[Parameter], rates: &[Option<f64>]) {
        let _no_grad = tch::no_grad_guard();
        // Weights with one rate are updated by one operator.
        let mut fused: Vec<(f64, Vec<usize>)> = Vec::new();
        for (number, (parameter, &rate)) in parameters.iter().zip(rates).enumerate() {
            let gradient = parameter.tensor.grad();
            let (Some(rate), true) = (rate, gradient.defined()) else {
                continue;
            };
            let moments = &mut self.moments[number];
            match (&mut moments.exp_avg, &mut moments.exp_avg_sq, &self.tables) {
                (Moment::Whole(_), Moment::Whole(_), _) => {
                    match fused
                        .iter_mut()
                        .find(|(other, _)| other.to_bits() == rate.to_bits())
                    {
                        Some((_, numbers)) => numbers.push(number),
                        None => fused.push((rate, vec![number])),
                    }
                }
                (Moment::InBytes(exp_avg), Moment::InBytes(root), Some(tables)) => {
                    moments.steps += 1;
                    let [beta1, beta2] = self.betas;
                    let update = Update {
                        betas: self.betas,
                        corrections: [beta1, beta2]
                            .map(|beta| 1.0 - beta.powi(moments.steps as i32)),
                        epsilon: self.epsilon,
                        rate,
                        decay: 1.0 - rate * self.weight_decay,
                    };
                    let weight = parameter.tensor.shallow_clone();
                    update.apply_in_bytes(&weight, &gradient, [exp_avg, root], tables);
                }
                _ => unreachable!("both moments have the same format"),
            }
        }
        for (rate, numbers) in fused {
            self.step_at_once(parameters, &numbers, rate);
        }
    }

    /// Updates the parameters with these numbers, whose moments are in float32.
    fn step_at_once(&mut self, parameters: &[Parameter], numbers: &[usize], rate: f64) {
        let steps = numbers
            .iter()
            .map(|&number| (self.moments[number].steps + 1) as f32);
        let steps = Tensor::from_slice(&steps.collect::<Vec<f32>>());
        let steps = steps.to_device(parameters[numbers[0]].tensor.device());
        let mut tensors = AdamwTensors::default();
        for (row, &number) in (0..).zip(numbers) {
            let Moments {
                exp_avg: Moment::Whole(exp_avg),
                exp_avg_sq: Moment::Whole(exp_avg_sq),
                ..
            } = &self.moments[number]
            else {
                unreachable!("moments in float32")
            };
            let weight = &parameters[number].tensor;
            tensors.weights.push(weight.shallow_clone());
            tensors.gradients.push(weight.grad());
            tensors.exp_avgs.push(exp_avg.shallow_clone());
            tensors.exp_avg_sqs.push(exp_avg_sq.shallow_clone());
            tensors.steps.push(steps.get(row));
        }
        shim::fused_adamw(&tensors, rate, self.betas, self.weight_decay, self.epsilon);
        for &number in numbers {
            self.moments[number].steps += 1;
        }
    }
}

/// One update of one parameter.
struct Update {
    betas: [f64; 2],
    /// The bias corrections.
    corrections: [f64; 2],
    epsilon: f64,
    rate: f64,
    /// The factor of the weight decay.
    decay: f64,
}

impl Update {
    /// Updates the weight in place, using the memory of `gradient`.
    fn apply(&self, weight: &Tensor, gradient: &Tensor, exp_avg: &Tensor, exp_avg_sq: &Tensor) {
        let [beta1, beta2] = self.betas;
        let [mut weight, mut gradient, mut exp_avg, mut exp_avg_sq] =
            [weight, gradient, exp_avg, exp_avg_sq].map(Tensor::shallow_clone);
        let _ = weight.g_mul_scalar_(self.decay);
        let _ = exp_avg.lerp_(&gradient, 1.0 - beta1);
        // exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) gradient^2
        let _ = gradient.square_();
        let _ = gradient.g_mul_scalar_(1.0 - beta2);
        let _ = exp_avg_sq.g_mul_scalar_(beta2);
        let _ = exp_avg_sq.g_add_(&gradient);
        // weight -= (rate / correction1) exp_avg / (sqrt(exp_avg_sq / correction2) + epsilon)
        gradient.copy_(&exp_avg_sq);
        let _ = gradient.sqrt_();
        let _ = gradient.g_div_scalar_(self.corrections[1].sqrt());
        let _ = gradient.g_add_scalar_(self.epsilon);
        let _ = exp_avg.div_out(&gradient.shallow_clone(), &gradient);
        let _ = gradient.g_mul_scalar_(-self.rate / self.corrections[0]);
        let _ = weight.g_add_(&gradient);
    }

    /// The same for 8-bit moments, piece by piece: each is dequantized, updated and quantized
    /// again.
    fn apply_in_bytes(
        &self,
        weight: &Tensor,
        gradient: &Tensor,
        [exp_avg, root]: [&mut QuantizedTensor; 2],
        [signed, unsigned]: &[Codebook; 2],
    ) {
        let (weight, gradient) = (weight.view([-1]), gradient.reshape([-1]));
        let count = weight.size()[0];
        let blocks = exp_avg.scales.size()[0];
        let at_once = blocks_at_once(weight.device());
        for first in (0..blocks).step_by(at_once as usize) {
            let piece = at_once.min(blocks - first);
            let start = first * BLOCK;
            let length = (piece * BLOCK).min(count - start);
            // The last block is padded with zeros.
            let fill = |xs: &Tensor| {
                let padding = piece * BLOCK - length;
                let xs = xs.narrow(0, start, length).constant_pad_nd([0, padding]);
                xs.view([piece, BLOCK])
            };
            let (whole, gradient) = (fill(&weight), fill(&gradient).copy());
            let mean = exp_avg.read(signed, first, piece);
            let square = root.read(unsigned, first, piece).square();
            self.apply(&whole, &gradient, &mean, &square);
            exp_avg.write(signed, first, &mean);
            root.write(unsigned, first, &square.sqrt());
            let updated = whole.view([-1]).narrow(0, 0, length);
            weight.narrow(0, start, length).copy_(&updated);
        }
    }
}

/// A learning rate with linear warmup, followed by its schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LearningRate {
    schedule: Schedule,
    warmup_steps: usize,
    steps: usize,
}

impl LearningRate {
    /// For a training of `steps` updates, of which `warmup_steps` are warmup.
    pub fn new(schedule: Schedule, warmup_steps: usize, steps: usize) -> Self {
        Self {
            schedule,
            warmup_steps,
            steps,
        }
    }

    /// The fraction of the peak rate in update `step`, counted from 0. With any warmup, the first
    /// update has the rate 0.
    pub fn of_step(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let falling = self.steps.saturating_sub(self.warmup_steps).max(1);
        let progress = (step - self.warmup_steps) as f64 / falling as f64;
        match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => (1.0 - progress).max(0.0),
            Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
        }
    }
}

/// The Euclidean norm of all gradients together, in float32 as in PyTorch.
pub fn grad_norm(parameters: &[Parameter]) -> f64 {
    let _no_grad = tch::no_grad_guard();
    let gradients = gradients(parameters);
    if gradients.is_empty() {
        return 0.0;
    }
    shim::norm(&gradients)
        .to_kind(Kind::Double)
        .double_value(&[])
}

/// The gradients of the parameters that have one.
fn gradients(parameters: &[Parameter]) -> Vec<Tensor> {
    let gradients = parameters.iter().map(|parameter| parameter.tensor.grad());
    gradients.filter(Tensor::defined).collect()
}

/// Scales all gradients, whose norm is `norm`, to a norm of at most `norm_max`.
pub fn clip_gradients(parameters: &[Parameter], norm: f64, norm_max: f64) {
    let _no_grad = tch::no_grad_guard();
    let scale = norm_max / (norm + 1e-6);
    if scale >= 1.0 {
        return;
    }
    shim::scale(&gradients(parameters), scale);
}

/// Sets all gradients to zero.
pub fn zero_gradients(parameters: &mut [Parameter]) {
    for parameter in parameters {
        parameter.tensor.zero_grad();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(values: &[f32]) -> Parameter {
        Parameter {
            name: "w".to_owned(),
            tensor: Tensor::from_slice(values).set_requires_grad(true),
        }
    }

    fn set_gradient(parameter: &mut Parameter, gradient: &[f32]) {
        parameter.tensor.zero_grad();
        let gradient = Tensor::from_slice(gradient);
        (&parameter.tensor * gradient).sum(Kind::Float).backward();
    }

    /// The result of
    /// `torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)` after the
    /// same three gradients, PyTorch 2.11.
    #[test]
    fn three_updates_equal_those_of_pytorch() {
        let mut parameters = [parameter(&[1.0, -2.0, 0.5])];
        let mut adam = AdamW::new(&parameters, [0.9, 0.99], 1e-8, 0.1, Optimizer::Adamw);
        for gradient in [[0.1, -0.2, 3.0], [0.3, 0.0, -1.0], [-0.5, 0.7, 0.25]] {
            set_gradient(&mut parameters[0], &gradient);
            adam.step(&parameters, &[Some(0.01)]);
        }
        let expected = [0.979_475_2, -1.982_020_3, 0.480_913_5];
        let found = Vec::<f32>::try_from(parameters[0].tensor.detach()).unwrap();
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn a_parameter_that_the_loss_does_not_touch_stays_as_it_is() {
        let mut parameters = [parameter(&[1.0]), parameter(&[1.0])];
        for parameter in &mut parameters {
            set_gradient(parameter, &[0.5]);
        }
        let mut adam = AdamW::new(&parameters, [0.9, 0.999], 1e-8, 0.1, Optimizer::Adamw);
        adam.step(&parameters, &[Some(0.1), None]);
        assert!(parameters[0].tensor.double_value(&[0]) < 0.95);
        assert!((parameters[1].tensor.double_value(&[0]) - 1.0).abs() < f64::EPSILON);
        assert_eq!(adam.moments()[1].steps, 0);
    }

    /// A parameter of several blocks, the last one partial, with gradients over four orders of
    /// magnitude, and the same with float32 moments: after ten updates they agree.
    #[test]
    fn moments_in_eight_bits_lead_the_same_way() {
        let count = 700;
        let start = vec![0.5f32; count];
        let way = |optimizer| {
            let mut parameters = [parameter(&start)];
            let mut adam = AdamW::new(&parameters, [0.9, 0.999], 1e-8, 0.01, optimizer);
            for step in 0..10 {
                let gradient: Vec<f32> = (0..count)
                    .map(|index| {
                        let wave = ((index * 7 + step * 3) as f32).sin() + 0.5;
                        wave * 10f32.powi((index % 5) as i32 - 4)
                    })
                    .collect();
                set_gradient(&mut parameters[0], &gradient);
                adam.reserve(&parameters);
                adam.step(&parameters, &[Some(0.01)]);
            }
            let weights = parameters[0].tensor.detach() - 0.5;
            (weights, adam)
        };
        let (whole, _) = way(Optimizer::Adamw);
        let (in_bytes, adam) = way(Optimizer::Adamw8bit);
        let scale = whole.abs().mean(Kind::Float).double_value(&[]);
        let error = (in_bytes - whole).abs().mean(Kind::Float).double_value(&[]);
        assert!(scale > 0.01 && error < 0.03 * scale, "{error} {scale}");
        let stored: usize = [&adam.moments()[0].exp_avg, &adam.moments()[0].exp_avg_sq]
            .iter()
            .flat_map(|moment| moment.tensors())
            .map(|(_, tensor)| tensor.numel() * tensor.kind().elt_size_in_bytes())
            .sum();
        assert_eq!(stored, 2 * (3 * 256 + 3 * 4));
    }

    #[test]
    fn the_rate_rises_from_zero_and_falls_to_zero() {
        let rates = |schedule, warmup, steps| {
            let rate = LearningRate::new(schedule, warmup, steps);
            (0..=steps)
                .map(|step| rate.of_step(step))
                .collect::<Vec<f64>>()
        };
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12);
        let cosine = rates(Schedule::Cosine, 2, 10);
        let linear = rates(Schedule::Linear, 2, 10);
        for rates in [&cosine, &linear] {
            for (step, expected) in [(0, 0.0), (1, 0.5), (2, 1.0), (6, 0.5), (10, 0.0)] {
                near(rates[step], expected);
            }
        }
        near(linear[4], 0.75);
        near(cosine[4], 0.5 + 0.125f64.sqrt());
        near(rates(Schedule::Cosine, 0, 1)[0], 1.0);
        let constant = rates(Schedule::Constant, 2, 10);
        near(constant[1], 0.5);
        near(constant[9], 1.0);
    }

    #[test]
    fn clipping_scales_all_gradients_by_one_number() {
        let mut parameters = [parameter(&[1.0, 1.0]), parameter(&[1.0])];
        set_gradient(&mut parameters[0], &[3.0, 0.0]);
        set_gradient(&mut parameters[1], &[4.0]);
        let norm = grad_norm(&parameters);
        assert!((norm - 5.0).abs() < 1e-6);
        clip_gradients(&parameters, norm, 10.0);
        assert!((grad_norm(&parameters) - 5.0).abs() < 1e-6);
        clip_gradients(&parameters, norm, 1.0);
        assert!((grad_norm(&parameters) - 1.0).abs() < 1e-6);
    }
}
