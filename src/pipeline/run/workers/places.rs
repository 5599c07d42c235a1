//! The workers of a run: how many, on which devices, and started how.

use std::num::NonZeroU32;
use std::thread;

use super::pool::WorkerCommand;
use crate::config::{Plan, PlannedStage};
use crate::stages::Failure;
use ovchat_models::{Board, DeviceSpec, ModelLoader};

/// The workers of a run.
#[derive(Clone)]
pub struct Workers<'a> {
    /// The number that the user asked for.
    pub asked: Option<NonZeroU32>,
    /// The way to start one.
    pub command: WorkerCommand,
    /// The other ranks of the cluster.
    pub ranks: Option<Ranks<'a>>,
}

/// The ranks of a cluster.
#[derive(Clone, Copy)]
pub struct Ranks<'a> {
    pub board: &'a dyn Board,
    /// The number of this rank, and of all.
    pub rank: u32,
    pub world: u32,
}

/// Returns the number of workers that compute a stage; `None` if the process of the run does it. Fails
/// if more were asked for than there are GPUs.
pub fn number_of(
    plan: &Plan,
    stage: &PlannedStage,
    loader: Option<&dyn ModelLoader>,
    asked: Option<NonZeroU32>,
    is_in_cluster: bool,
) -> Result<Option<u32>, Failure> {
    let devices = match devices_of(plan, stage, loader)? {
        Devices::None => return Ok(None),
        devices => devices,
    };
    let count = match (&devices, asked) {
        (Devices::Gpus(gpus), Some(asked)) if asked.get() as usize > gpus.len() => {
            return Err(Failure::Other(format!(
                "--workers {asked} is more than the {} GPUs of this machine; each worker of `{}` needs one",
                gpus.len(),
                stage.name
            )));
        }
        (_, Some(asked)) => asked.get(),
        (Devices::Gpus(gpus), None) => gpus.len() as u32,
        (Devices::Cpu | Devices::None, None) => 1,
    };
    Ok((count > 1 || is_in_cluster).then_some(count))
}

/// The devices that the workers of a stage compute on.
pub enum Devices {
    /// The stage is not computed by workers: it uses no model, one that is not on this machine, or one
    /// that the pipeline puts on a certain GPU.
    None,
    Cpu,
    /// GPUs, as `CUDA_VISIBLE_DEVICES` names them.
    Gpus(Vec<String>),
}

pub fn devices_of(
    plan: &Plan,
    stage: &PlannedStage,
    loader: Option<&dyn ModelLoader>,
) -> Result<Devices, Failure> {
    let mut devices = Devices::None;
    for used in stage.spec.as_stage().uses() {
        let spec = plan.models[plan.backing_model(used.model)].clone().opened();
        if spec.is_scripted() {
            devices = Devices::Cpu;
            continue;
        }
        let (Some(loader), Some(compute)) = (loader, spec.compute()) else {
            return Ok(Devices::None);
        };
        devices = match compute.device {
            DeviceSpec::Cpu => Devices::Cpu,
            DeviceSpec::Cuda(_) => return Ok(Devices::None),
            DeviceSpec::Auto => {
                let gpus = loader.gpus().map_err(Failure::of(used.model))?;
                if gpus.is_empty() {
                    Devices::Cpu
                } else {
                    Devices::Gpus(gpus)
                }
            }
        };
    }
    Ok(devices)
}

/// Returns the environment variables of each worker: its GPU, and its share of the processors.
pub fn environments(
    count: u32,
    devices: &Devices,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Vec<Vec<(String, String)>> {
    let share = processors() / count.max(1) as usize;
    (0..count as usize)
        .map(|worker| {
            let mut own = Vec::new();
            if variable("RAYON_NUM_THREADS").is_none() {
                own.push(("RAYON_NUM_THREADS".to_owned(), share.max(1).to_string()));
            }
            if let Devices::Gpus(gpus) = devices {
                own.push(("CUDA_VISIBLE_DEVICES".to_owned(), gpus[worker].clone()));
            }
            own
        })
        .collect()
}

/// The number of processors available to this process.
pub fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_worker_has_a_gpu_and_a_share_of_the_processors() {
        let gpus = Devices::Gpus(["5", "MIG-41b8"].map(str::to_owned).to_vec());
        let share = (processors() / 2).max(1).to_string();
        let variables = |gpu: &str| {
            [
                ("RAYON_NUM_THREADS", share.as_str()),
                ("CUDA_VISIBLE_DEVICES", gpu),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
        };
        let found = environments(2, &gpus, &|_| None);
        assert_eq!(found, [variables("5"), variables("MIG-41b8")]);
        // A number of the user stays, and a CPU needs no other variable.
        let found = environments(3, &Devices::Cpu, &|_| Some("4".to_owned()));
        assert_eq!(found, [const { Vec::new() }; 3]);
    }
}
