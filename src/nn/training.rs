//! What all trainings share: parameters, optimizer, learning rate, and the state to go on from.

use std::fs::{self, File};
use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::edge::guarded;
use super::optimizer::{
    AdamW, LearningRate, Moments, Parameter, clip_gradients, grad_norm, zero_gradients,
};
use super::weights::{Weights, save_safetensors};
use crate::models::{ModelError, Optimization};

/// The file in the folder of [`crate::models::Learner::save_state`].
pub const STATE_FILE: &str = "state.safetensors";

/// What completes "out of memory while …": what is done, with one row or several of a kind.
pub fn doing(what: &str, kind: &str, rows: &[&str]) -> String {
    match rows {
        [one] => format!("{what} {kind} {one}"),
        several => format!("{what} {} {kind}s from {}", several.len(), several[0]),
    }
}

/// The trained weights of a network and what trains them.
#[derive(Debug)]
pub struct Training {
    pub parameters: Vec<Parameter>,
    optimizer: AdamW,
    learning_rate: LearningRate,
    max_grad_norm: f64,
    /// Updates that were made.
    step: usize,
}

/// What an update did.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// The Euclidean norm of the gradient before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
}

impl Training {
    /// Fails when the optimizer's state does not fit into the device's memory.
    pub fn new(parameters: Vec<Parameter>, settings: &Optimization) -> Result<Self, ModelError> {
        let optimizer = guarded("making the optimizer's state", 1, 0, || {
            let (betas, epsilon) = (settings.adam_betas, settings.adam_epsilon);
            AdamW::new(&parameters, betas, epsilon, settings.weight_decay)
        })?;
        let (peak, warmup_ratio) = (settings.learning_rate, settings.warmup_ratio);
        Ok(Self {
            parameters,
            optimizer,
            learning_rate: LearningRate::new(settings.schedule, peak, warmup_ratio, settings.steps),
            max_grad_norm: settings.max_grad_norm,
            step: 0,
        })
    }

    /// Forgets the gradients of the last step.
    pub fn begin_step(&mut self) {
        zero_gradients(&mut self.parameters);
    }

    /// Updates those parameters that `has_gradient` says the loss depends on: one that nothing
    /// touched has a gradient of zero here, and PyTorch would leave it alone. `rows` names the rows
    /// of the step, for errors. Fails, and changes nothing, when a gradient is not finite.
    pub fn update(
        &mut self,
        rows: impl Fn() -> Vec<String>,
        has_gradient: impl Fn(&Parameter) -> bool,
    ) -> Result<Update, ModelError> {
        let norm = guarded("taking the gradient's norm", 1, 0, || {
            grad_norm(&self.parameters)
        })?;
        if !norm.is_finite() {
            return Err(not_finite("the gradient", rows()));
        }
        if self.max_grad_norm > 0.0 {
            clip_gradients(&self.parameters, norm, self.max_grad_norm);
        }
        let learning_rate = self.learning_rate.of_step(self.step);
        self.optimizer
            .step(&self.parameters, has_gradient, learning_rate);
        self.step += 1;
        Ok(Update {
            grad_norm: norm,
            learning_rate,
        })
    }

    /// What the optimizer remembers of each parameter.
    #[cfg(test)]
    pub fn moments(&self) -> &[Moments] {
        self.optimizer.moments()
    }

    /// One safetensors file: of each parameter `weight.…`, `exp_avg.…` and `exp_avg_sq.…` in
    /// float32, its updates in `parameter_steps`, and the updates of the training in `step`.
    pub fn save_state(&self, to: &Path) -> Result<(), ModelError> {
        let io = |error: std::io::Error| state_error(to, error.to_string());
        fs::create_dir(to).map_err(io)?;
        let mut tensors = Vec::with_capacity(3 * self.parameters.len() + 2);
        let mut steps = Vec::with_capacity(self.parameters.len());
        for (Parameter { name, tensor }, moments) in
            self.parameters.iter().zip(self.optimizer.moments())
        {
            tensors.push((format!("weight.{name}"), tensor.detach()));
            tensors.push((format!("exp_avg.{name}"), moments.exp_avg.shallow_clone()));
            let squares = moments.exp_avg_sq.shallow_clone();
            tensors.push((format!("exp_avg_sq.{name}"), squares));
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
        let mut moments = Vec::with_capacity(self.parameters.len());
        for (Parameter { name, tensor }, steps) in self.parameters.iter().zip(steps) {
            let (shape, device) = (tensor.size(), tensor.device());
            let read =
                |part: &str| state.take(&format!("{part}.{name}"), &shape, Kind::Float, device);
            let weight = read("weight")?;
            tch::no_grad(|| tensor.shallow_clone().copy_(&weight));
            moments.push(Moments {
                exp_avg: read("exp_avg")?,
                exp_avg_sq: read("exp_avg_sq")?,
                steps,
            });
        }
        self.optimizer.set_moments(moments);
        self.step = step as usize;
        Ok(())
    }
}

/// A number that is not one; `rows` are those of the step.
pub fn not_finite(what: impl Into<String>, rows: Vec<String>) -> ModelError {
    ModelError::NotFinite {
        what: what.into(),
        rows,
    }
}

/// A row that can't be trained on.
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
