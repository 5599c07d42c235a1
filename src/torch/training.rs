//! The state that all trainers share: parameters, optimizer, learning rate, and saving for a
//! resume.

use std::fs::{self, File};
use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::blockwise_quant::QuantizedTensor;
use super::error::guarded;
use super::optimizer::{
    AdamW, LearningRate, Moment, Moments, Parameter, clip_gradients, grad_norm, zero_gradients,
};
use super::weights::{Weights, save_safetensors};
use ovchat_models::{ModelError, Optimization};

/// The file in the folder of [`ovchat_models::Trainer::save_state`].
pub const STATE_FILE: &str = "state.safetensors";

/// Completes "out of memory while …" with an action on one row or several of a kind.
pub fn doing(what: &str, kind: &str, rows: &[&str]) -> String {
    match rows {
        [one] => format!("{what} {kind} {one}"),
        several => format!("{what} {} {kind}s from {}", several.len(), several[0]),
    }
}

/// The trained parameters of a network and their optimizer.
#[derive(Debug)]
pub struct TrainingState {
    pub parameters: Vec<Parameter>,
    /// The peak learning rate of each parameter.
    rates: Vec<f64>,
    optimizer: AdamW,
    /// The peak learning rate of the training; parts with their own rate follow the same schedule.
    peak: f64,
    schedule: LearningRate,
    max_grad_norm: f64,
    /// The number of updates so far.
    step: usize,
}

/// The outcome of an update.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// The Euclidean norm of the gradient before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
}

impl TrainingState {
    /// Fails if the optimizer state does not fit into the device's memory.
    pub fn new(parameters: Vec<Parameter>, settings: &Optimization) -> Result<Self, ModelError> {
        let optimizer = guarded("allocating the optimizer state", 1, 0, || {
            // Gradients that backward passes allocate would lie between their temporary tensors, whose
            // memory the allocator of the CPU could then not give back.
            for parameter in &parameters {
                (&parameter.tensor * 0.0)
                    .sum(parameter.tensor.kind())
                    .backward();
            }
            let (betas, epsilon) = (settings.adam_betas, settings.adam_epsilon);
            let (decay, optimizer) = (settings.weight_decay, settings.optimizer);
            AdamW::new(&parameters, betas, epsilon, decay, optimizer)
        })?;
        let peak = settings.learning_rate;
        Ok(Self {
            rates: vec![peak; parameters.len()],
            parameters,
            optimizer,
            peak,
            schedule: LearningRate::new(settings.schedule, settings.warmup_steps, settings.steps),
            max_grad_norm: settings.max_grad_norm,
            step: 0,
        })
    }

    /// Sets peak learning rates for some parameters, by name.
    pub fn set_rates(&mut self, of: impl Fn(&str) -> Option<f64>) {
        for (rate, parameter) in self.rates.iter_mut().zip(&self.parameters) {
            *rate = of(&parameter.name).unwrap_or(self.peak);
        }
    }

    /// The number of updates so far.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// Clears the gradients of the last step.
    pub fn begin_step(&mut self) {
        zero_gradients(&mut self.parameters);
    }

    /// Updates those parameters for which `has_gradient` says that the loss depends on them: an
    /// unused parameter has a gradient of zero here, and PyTorch would not update it. `rows` names
    /// the rows of the step, for errors. Fails, and changes nothing, if a gradient is not finite.
    pub fn update(
        &mut self,
        rows: impl Fn() -> Vec<String>,
        has_gradient: impl Fn(&Parameter) -> bool,
    ) -> Result<Update, ModelError> {
        let norm = guarded("computing the gradient norm", 1, 0, || {
            self.optimizer.reserve(&self.parameters);
            grad_norm(&self.parameters)
        })?;
        if !norm.is_finite() {
            return Err(not_finite("the gradient", rows()));
        }
        let share = self.schedule.of_step(self.step);
        let rates: Vec<Option<f64>> = self
            .parameters
            .iter()
            .zip(&self.rates)
            .map(|(parameter, rate)| has_gradient(parameter).then_some(rate * share))
            .collect();
        guarded("updating the weights", 1, 0, || {
            if self.max_grad_norm > 0.0 {
                clip_gradients(&self.parameters, norm, self.max_grad_norm);
            }
            self.optimizer.step(&self.parameters, &rates);
        })
        // Some weights may be updated: the step cannot be done again.
        .map_err(|error| ModelError::Torch {
            what: "updating the weights".to_owned(),
            problem: error.to_string(),
        })?;
        self.step += 1;
        Ok(Update {
            grad_norm: norm,
            learning_rate: self.peak * share,
        })
    }

    /// The optimizer state of each parameter.
    pub fn moments(&self) -> &[Moments] {
        self.optimizer.moments()
    }

    /// Writes one safetensors file: for each parameter `weight.…`, `exp_avg.…` and `exp_avg_sq.…`
    /// in float32, or the latter two in eight bits; its number of updates in `parameter_steps`; and
    /// the number of updates of the training in `step`.
    pub fn save_state(&self, to: &Path) -> Result<(), ModelError> {
        let io = |error: std::io::Error| state_error(to, error.to_string());
        fs::create_dir(to).map_err(io)?;
        let mut tensors = Vec::with_capacity(3 * self.parameters.len() + 2);
        let mut steps = Vec::with_capacity(self.parameters.len());
        for (Parameter { name, tensor }, moments) in
            self.parameters.iter().zip(self.optimizer.moments())
        {
            tensors.push((format!("weight.{name}"), tensor.detach()));
            let both = [
                ("exp_avg", &moments.exp_avg),
                ("exp_avg_sq", &moments.exp_avg_sq),
            ];
            for (kind, moment) in both {
                for (end, tensor) in moment.tensors() {
                    tensors.push((format!("{kind}.{name}{end}"), tensor.shallow_clone()));
                }
            }
            steps.push(moments.steps);
        }
        tensors.push(("parameter_steps".to_owned(), Tensor::from_slice(&steps)));
        let step = Tensor::from_slice(&[self.step as i64]);
        tensors.push(("step".to_owned(), step));
        save_safetensors(&to.join(STATE_FILE), &tensors, &[])?;
        File::open(to)
            .and_then(|folder| folder.sync_all())
            .map_err(io)
    }

    pub fn load_state(&mut self, from: &Path) -> Result<(), ModelError> {
        let path = from.join(STATE_FILE);
        let state = Weights::open_file(&path)?;
        let integers = |name: &str, count: usize| {
            let tensor = state.take(name, &[count as i64], Kind::Int64, Device::Cpu)?;
            let values = Vec::<i64>::try_from(tensor);
            values.map_err(|error| state_error(&path, error.to_string()))
        };
        let step = integers("step", 1)?[0];
        let steps = integers("parameter_steps", self.parameters.len())?;
        // The saved tensors have the same shapes and dtypes as the current ones.
        let read =
            |name: &str, like: &Tensor| state.take(name, &like.size(), like.kind(), like.device());
        let mut moments = Vec::with_capacity(self.parameters.len());
        let fresh = self.optimizer.moments();
        for ((Parameter { name, tensor }, fresh), steps) in
            self.parameters.iter().zip(fresh).zip(steps)
        {
            let weight = read(&format!("weight.{name}"), tensor)?;
            tch::no_grad(|| tensor.shallow_clone().copy_(&weight));
            let moment = |kind: &str, fresh: &Moment| {
                Ok::<_, ModelError>(match fresh {
                    Moment::Whole(like) => Moment::Whole(read(&format!("{kind}.{name}"), like)?),
                    Moment::InBytes(QuantizedTensor { codes, scales }) => {
                        Moment::InBytes(QuantizedTensor {
                            codes: read(&format!("{kind}.{name}.codes"), codes)?,
                            scales: read(&format!("{kind}.{name}.scales"), scales)?,
                        })
                    }
                })
            };
            moments.push(Moments {
                exp_avg: moment("exp_avg", &fresh.exp_avg)?,
                exp_avg_sq: moment("exp_avg_sq", &fresh.exp_avg_sq)?,
                steps,
            });
        }
        self.optimizer.set_moments(moments);
        self.step = step as usize;
        Ok(())
    }
}

/// The error for a value that is not finite; `rows` are those of the step.
pub fn not_finite(what: impl Into<String>, rows: Vec<String>) -> ModelError {
    ModelError::NotFinite {
        what: what.into(),
        rows,
    }
}

/// The error for a row that cannot be trained on.
pub fn row_error(row: &str, problem: impl Into<String>) -> ModelError {
    ModelError::Row {
        row: row.to_owned(),
        problem: problem.into(),
    }
}

fn state_error(path: &Path, problem: String) -> ModelError {
    ModelError::Weights {
        path: path.to_owned(),
        problem,
    }
}
