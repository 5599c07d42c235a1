//! The place of this process in a cluster, from the environment variables of the launcher.

use std::process::Command;

use ovchat_models::RankPlace;

/// The default port of the board, to which the number of a Slurm job is added.
const PORT: u32 = 29_400;

/// Reads an environment variable.
type Variable<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Returns the place of this process; `None` if it is alone. An error is in words.
pub fn place() -> Result<Option<RankPlace>, String> {
    place_of(&|name| std::env::var(name).ok(), &first_host)
}

fn place_of(
    variable: Variable<'_>,
    first_host: &dyn Fn(&str) -> Result<String, String>,
) -> Result<Option<RankPlace>, String> {
    let number = |name: &str| -> Result<Option<u32>, String> {
        let Some(text) = variable(name) else {
            return Ok(None);
        };
        let number = text.trim().parse();
        number
            .map(Some)
            .map_err(|_| format!("the environment variable {name} is `{text}`, not a number"))
    };
    // torchrun and Kubeflow, or set in the manifest of an indexed Job.
    let of_torchrun = match number("RANK")? {
        Some(rank) => Some(rank),
        None => number("JOB_COMPLETION_INDEX")?,
    };
    let (rank, world, nodes) = match (of_torchrun, number("WORLD_SIZE")?) {
        (Some(rank), Some(world)) => (rank, world, None),
        // Only `srun` sets this one; a batch script without it is alone.
        _ => match (number("SLURM_PROCID")?, number("SLURM_STEP_NUM_TASKS")?) {
            (Some(rank), Some(world)) => (rank, world, variable("SLURM_STEP_NODELIST")),
            _ => return Ok(None),
        },
    };
    if world <= 1 {
        return Ok(None);
    }
    if rank >= world {
        return Err(format!(
            "this is rank {rank}, but there are only {world} ranks"
        ));
    }
    let host = match (variable("MASTER_ADDR"), nodes) {
        (Some(host), _) => host,
        (None, Some(nodes)) => first_host(&nodes)?,
        (None, None) => {
            return Err(format!(
                "this is rank {rank} of {world}, but MASTER_ADDR is not set; set it to the address of rank 0"
            ));
        }
    };
    let job = number("SLURM_JOB_ID")?.unwrap_or(0);
    let port = number("MASTER_PORT")?.unwrap_or(PORT + job % 1000);
    let port = u16::try_from(port).map_err(|_| format!("MASTER_PORT {port} is not a port"))?;
    // The agent of torchrun serves a store that outlives its processes.
    let has_agent = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
    let restarts = ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"];
    let restart = restarts.iter().find_map(|name| variable(name));
    Ok(Some(RankPlace {
        rank,
        world,
        host,
        port,
        is_server: rank == 0 && !has_agent,
        prefix: format!("ovchat/{}", restart.as_deref().unwrap_or("0")),
    }))
}

/// Returns the first host of a Slurm node list: `n[1-3]` is `n1`.
fn first_host(nodes: &str) -> Result<String, String> {
    let problem = |problem: String| {
        format!(
            "cannot tell the first node of `{nodes}`: scontrol: {problem}; set MASTER_ADDR to it"
        )
    };
    let output = Command::new("scontrol")
        .args(["show", "hostnames", nodes])
        .output()
        .map_err(|error| problem(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.lines().next() {
        Some(host) if output.status.success() => Ok(host.trim().to_owned()),
        _ => Err(problem(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(set: &[(&str, &str)]) -> Result<Option<RankPlace>, String> {
        let variable = |name: &str| {
            let found = set.iter().find(|(own, _)| *own == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        place_of(&variable, &|nodes| Ok(format!("first of {nodes}")))
    }

    #[test]
    fn each_launcher_tells_the_place() {
        let torchrun = [
            ("RANK", "2"),
            ("WORLD_SIZE", "3"),
            ("MASTER_ADDR", "10.0.0.1"),
            ("MASTER_PORT", "29511"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "4"),
        ];
        let place = placed(&torchrun).unwrap().unwrap();
        assert_eq!((place.rank, place.world, place.port), (2, 3, 29_511));
        assert_eq!(
            (place.host.as_str(), place.prefix.as_str()),
            ("10.0.0.1", "ovchat/4")
        );
        let mut first = torchrun;
        first[0].1 = "0";
        assert!(!placed(&first).unwrap().unwrap().is_server);
        let slurm = [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "8"),
            ("SLURM_STEP_NODELIST", "n[1-8]"),
            ("SLURM_JOB_ID", "12345"),
        ];
        let place = placed(&slurm).unwrap().unwrap();
        assert_eq!((place.rank, place.world, place.port), (0, 8, 29_745));
        assert!(place.is_server && place.host == "first of n[1-8]");
        let kubernetes = [
            ("JOB_COMPLETION_INDEX", "1"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "ovchat-0.ovchat"),
        ];
        let place = placed(&kubernetes).unwrap().unwrap();
        assert_eq!((place.rank, place.port), (1, 29_400));
    }

    #[test]
    fn alone_is_alone_and_what_does_not_fit_is_named() {
        // A batch script of Slurm without srun, and one rank.
        assert_eq!(
            placed(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]),
            Ok(None)
        );
        assert_eq!(placed(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok(None));
        assert_eq!(placed(&[]), Ok(None));
        let error = |set: &[(&str, &str)]| placed(set).unwrap_err();
        let words = error(&[("RANK", "1"), ("WORLD_SIZE", "2")]);
        assert!(words.contains("MASTER_ADDR is not set"), "{words}");
        let words = error(&[("RANK", "x"), ("WORLD_SIZE", "2")]);
        assert_eq!(words, "the environment variable RANK is `x`, not a number");
        let words = error(&[("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")]);
        assert_eq!(words, "this is rank 2, but there are only 2 ranks");
    }
}
