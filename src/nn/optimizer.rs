//! AdamW, its learning rate and gradient clipping, as `torch.optim.AdamW`,
//! `get_cosine_schedule_with_warmup` and `get_constant_schedule_with_warmup` of transformers and
//! `clip_grad_norm_` of PyTorch compute them.
//!
//! Ours because libtorch's optimizers, seen from Rust, can't save their state. An update allocates
//! nothing: it computes in the memory of the gradients, so it can't run out of memory halfway
//! through the parameters.

use tch::{Kind, Tensor};

use crate::models::Schedule;

/// A weight that is trained, by its canonical name.
#[derive(Debug)]
pub struct Parameter {
    pub name: String,
    /// A leaf that requires a gradient.
    pub tensor: Tensor,
}

/// Loshchilov and Hutter 2019, *Decoupled Weight Decay Regularization*, arXiv 1711.05101,
/// algorithm 2, in PyTorch's arrangement.
#[derive(Debug)]
pub struct AdamW {
    betas: [f64; 2],
    epsilon: f64,
    weight_decay: f64,
    /// Of each parameter, in the order of the parameters.
    moments: Vec<Moments>,
}

/// What AdamW remembers of one parameter.
#[derive(Debug)]
pub struct Moments {
    /// Decaying mean of the gradient.
    pub exp_avg: Tensor,
    /// Decaying mean of the gradient's square.
    pub exp_avg_sq: Tensor,
    /// Updates that this parameter has seen; one without a gradient is not updated.
    pub steps: i64,
}

impl AdamW {
    /// A fresh optimizer of `parameters`, on their device and in their precision.
    pub fn new(parameters: &[Parameter], betas: [f64; 2], epsilon: f64, weight_decay: f64) -> Self {
        let moments = parameters.iter().map(|parameter| Moments {
            exp_avg: parameter.tensor.zeros_like(),
            exp_avg_sq: parameter.tensor.zeros_like(),
            steps: 0,
        });
        Self {
            betas,
            epsilon,
            weight_decay,
            moments: moments.collect(),
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

    /// Updates those `parameters` that `has_gradient` says the loss depends on. Their gradients are
    /// used up: they hold something else afterwards.
    pub fn step(
        &mut self,
        parameters: &[Parameter],
        has_gradient: impl Fn(&Parameter) -> bool,
        learning_rate: f64,
    ) {
        let _no_grad = tch::no_grad_guard();
        let [beta1, beta2] = self.betas;
        for (parameter, moments) in parameters.iter().zip(&mut self.moments) {
            let mut gradient = parameter.tensor.grad();
            if !gradient.defined() || !has_gradient(parameter) {
                continue;
            }
            let mut weight = parameter.tensor.shallow_clone();
            moments.steps += 1;
            let correction1 = 1.0 - beta1.powi(moments.steps as i32);
            let correction2 = 1.0 - beta2.powi(moments.steps as i32);

            let _ = weight.g_mul_scalar_(1.0 - learning_rate * self.weight_decay);
            let _ = moments.exp_avg.lerp_(&gradient, 1.0 - beta1);
            // exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) gradient^2
            let _ = gradient.square_();
            let _ = gradient.g_mul_scalar_(1.0 - beta2);
            let _ = moments.exp_avg_sq.g_mul_scalar_(beta2);
            let _ = moments.exp_avg_sq.g_add_(&gradient);
            // weight -= (lr / correction1) exp_avg / (sqrt(exp_avg_sq / correction2) + epsilon)
            gradient.copy_(&moments.exp_avg_sq);
            let _ = gradient.sqrt_();
            let _ = gradient.g_div_scalar_(correction2.sqrt());
            let _ = gradient.g_add_scalar_(self.epsilon);
            let _ = moments
                .exp_avg
                .div_out(&gradient.shallow_clone(), &gradient);
            let _ = gradient.g_mul_scalar_(-learning_rate / correction1);
            let _ = weight.g_add_(&gradient);
        }
    }
}

/// A learning rate that rises linearly from 0 and then falls to 0 along half a cosine, or stays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    schedule: Schedule,
    peak: f64,
    warmup_steps: usize,
    steps: usize,
}

impl LearningRate {
    /// `warmup_ratio` of `steps`, rounded up, is warmup, as in the Hugging Face trainer.
    pub fn new(schedule: Schedule, peak: f64, warmup_ratio: f64, steps: usize) -> Self {
        Self {
            schedule,
            peak,
            warmup_steps: (steps as f64 * warmup_ratio).ceil() as usize,
            steps,
        }
    }

    /// The rate of update `step`, counted from 0. With any warmup the first update has the rate 0.
    pub fn of_step(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        if self.schedule == Schedule::Constant {
            return self.peak;
        }
        let falling = self.steps.saturating_sub(self.warmup_steps).max(1);
        let progress = (step - self.warmup_steps) as f64 / falling as f64;
        self.peak * (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
    }
}

/// The Euclidean norm of all gradients together, in float32 as PyTorch takes it.
pub fn grad_norm(parameters: &[Parameter]) -> f64 {
    let _no_grad = tch::no_grad_guard();
    let norms: Vec<Tensor> = parameters
        .iter()
        .map(|parameter| parameter.tensor.grad())
        .filter(Tensor::defined)
        .map(|gradient| gradient.norm())
        .collect();
    if norms.is_empty() {
        return 0.0;
    }
    Tensor::stack(&norms, 0)
        .norm()
        .to_kind(Kind::Double)
        .double_value(&[])
}

/// Scales all gradients, whose norm is `norm`, so that their norm is at most `norm_max`.
pub fn clip_gradients(parameters: &[Parameter], norm: f64, norm_max: f64) {
    let _no_grad = tch::no_grad_guard();
    let scale = norm_max / (norm + 1e-6);
    if scale >= 1.0 {
        return;
    }
    for parameter in parameters {
        let mut gradient = parameter.tensor.grad();
        if gradient.defined() {
            let _ = gradient.g_mul_scalar_(scale);
        }
    }
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

    /// `torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)` after the
    /// same three gradients, PyTorch 2.11.
    #[test]
    fn three_updates_equal_those_of_pytorch() {
        let mut parameters = [parameter(&[1.0, -2.0, 0.5])];
        let mut adam = AdamW::new(&parameters, [0.9, 0.99], 1e-8, 0.1);
        for gradient in [[0.1, -0.2, 3.0], [0.3, 0.0, -1.0], [-0.5, 0.7, 0.25]] {
            set_gradient(&mut parameters[0], &gradient);
            adam.step(&parameters, |_| true, 0.01);
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
        parameters[1].name = "other".to_owned();
        for parameter in &mut parameters {
            set_gradient(parameter, &[0.5]);
        }
        let mut adam = AdamW::new(&parameters, [0.9, 0.999], 1e-8, 0.1);
        adam.step(&parameters, |parameter| parameter.name == "w", 0.1);
        assert!(parameters[0].tensor.double_value(&[0]) < 0.95);
        assert!((parameters[1].tensor.double_value(&[0]) - 1.0).abs() < f64::EPSILON);
        assert_eq!(adam.moments()[1].steps, 0);
    }

    #[test]
    fn the_rate_rises_from_zero_and_falls_to_zero() {
        let schedule = LearningRate::new(Schedule::Cosine, 2.0, 0.15, 10);
        let rates: Vec<f64> = (0..=10).map(|step| schedule.of_step(step)).collect();
        assert!((rates[0] - 0.0).abs() < 1e-12);
        assert!((rates[1] - 1.0).abs() < 1e-12);
        assert!((rates[2] - 2.0).abs() < 1e-12);
        assert!((rates[6] - 1.0).abs() < 1e-12);
        assert!(rates[10].abs() < 1e-12);
        let at_once = LearningRate::new(Schedule::Cosine, 2.0, 0.0, 1);
        assert!((at_once.of_step(0) - 2.0).abs() < 1e-12);
        let constant = LearningRate::new(Schedule::Constant, 2.0, 0.15, 10);
        assert!((constant.of_step(1) - 1.0).abs() < 1e-12);
        assert!((constant.of_step(9) - 2.0).abs() < 1e-12);
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
