//! Settings of libtorch before it is loaded: its version and its environment variables.

use std::fs;
use std::path::Path;

/// The version of libtorch that this program was built against, if the libtorch of the build had
/// one.
pub const BUILT_AGAINST: Option<&str> = option_env!("OVCHAT_LIBTORCH_VERSION");

/// The folder of the libraries that this program was built against.
pub const BUILT_WITH: Option<&str> = option_env!("OVCHAT_LIBTORCH");

/// The environment variable in which `pipeline` lists those of [`environment`] that it has set, so
/// that user programs do not inherit them.
pub const SET_HERE: &str = "OVCHAT_LIBTORCH_SETTINGS";

/// An environment variable that libtorch reads, with the value to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    pub name: &'static str,
    pub value: &'static str,
    /// An older name of the same variable.
    older: Option<&'static str>,
    /// The variables of which one has to be set; none if it is always needed.
    asked_by: &'static [&'static str],
}

/// The environment variable that asks for results that repeat to the bit on one kind of GPU.
pub const DETERMINISTIC: &str = "OVCHAT_DETERMINISTIC";

/// The environment variables that libtorch needs when it starts.
const SETTINGS: [Setting; 5] = [
    // On Hopper and later, attention defaults to cuDNN, which builds a plan for every new length
    // (0.02 to 0.5 s). Here nearly every prompt has a different length.
    Setting {
        name: "TORCH_CUDNN_SDPA_DEPRIORITIZED",
        value: "1",
        older: None,
        asked_by: &[],
    },
    // Lengths differ from batch to batch, so blocks of fixed size would fragment the memory.
    Setting {
        name: "PYTORCH_ALLOC_CONF",
        value: "expandable_segments:True",
        older: Some("PYTORCH_CUDA_ALLOC_CONF"),
        asked_by: &[],
    },
    // A thread that waits for others spins some 10 microseconds and then sleeps. By default it spins
    // for milliseconds: two runs at once on two cores took 18 times as long as one.
    Setting {
        name: "GOMP_SPINCOUNT",
        value: "5000",
        older: Some("OMP_WAIT_POLICY"),
        asked_by: &[],
    },
    // By default, cuBLAS may use other workspaces in another run, and add in another order
    // (docs.nvidia.com/cuda/cublas, "Results Reproducibility").
    Setting {
        name: "CUBLAS_WORKSPACE_CONFIG",
        value: ":4096:8",
        older: None,
        asked_by: &[DETERMINISTIC],
    },
    // A rank that loses the others says so; libtorch would add a warning with its stack.
    Setting {
        name: "TORCH_CPP_LOG_LEVEL",
        value: "ERROR",
        older: None,
        asked_by: &["MASTER_ADDR", "SLURM_STEP_NUM_TASKS"],
    },
];

/// Returns the settings that the user has not overridden.
pub fn environment(is_set: &dyn Fn(&str) -> bool) -> Vec<Setting> {
    let is_free = |setting: &&Setting| {
        let askers = setting.asked_by;
        let is_asked_for = askers.is_empty() || askers.iter().any(|name| is_set(name));
        is_asked_for && !is_set(setting.name) && !setting.older.is_some_and(is_set)
    };
    SETTINGS.iter().filter(is_free).copied().collect()
}

/// Returns all variables that [`environment`] may set.
pub fn variables() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|setting| setting.name)
}

/// Returns the version of the libtorch in the library folder `lib`, read from `version.py` of a
/// PyTorch or `build-version` of a plain libtorch.
pub fn version_in(lib: &Path) -> Option<String> {
    let root = lib.parent()?;
    if let Ok(version) = fs::read_to_string(root.join("build-version")) {
        return Some(version.trim().to_owned());
    }
    let python = fs::read_to_string(root.join("version.py")).ok()?;
    let line = python
        .lines()
        .find(|line| line.starts_with("__version__"))?;
    line.split('\'').nth(1).map(str::to_owned)
}

/// Returns the error of running on libtorch `found`, if it is not compatible. Releases of one minor
/// version (2.11.0 and 2.11.1) keep their binary interface, others do not.
pub fn mismatch(found: &str, built: &str) -> Option<String> {
    let minor = |version: &str| {
        let mut numbers = version.split(['.', '+']).map(str::to_owned);
        (numbers.next(), numbers.next())
    };
    if minor(found) == minor(built) {
        return None;
    }
    let (Some(major), Some(second)) = minor(built) else {
        return None;
    };
    Some(format!(
        "this program was built against libtorch {built} and cannot use {found}; add the lib folder of a \
         libtorch {major}.{second} to LD_LIBRARY_PATH (`make setup` downloads one to .libtorch/torch/lib)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_another_minor_version_do_not_fit() {
        for found in ["2.11.0", "2.11.1", "2.11.0+cu130", "2.11"] {
            assert_eq!(mismatch(found, "2.11.0+cpu"), None, "{found}");
        }
        for found in ["2.12.1", "2.1.0", "3.11.0", "2.110.0"] {
            let problem = mismatch(found, "2.11.0+cu130").unwrap();
            let expected =
                format!("built against libtorch 2.11.0+cu130 and cannot use {found}; add");
            assert!(problem.contains(&expected), "{problem}");
            assert!(problem.contains("a libtorch 2.11 to"), "{problem}");
        }
    }

    #[test]
    fn a_version_is_read_from_files_and_never_invented() {
        let folder = tempfile::tempdir().unwrap();
        let lib = folder.path().join("lib");
        assert_eq!(version_in(&lib), None);
        let python = "from typing import Optional\n__version__ = '2.12.1+cpu'\ndebug = False\n";
        fs::write(folder.path().join("version.py"), python).unwrap();
        assert_eq!(version_in(&lib).as_deref(), Some("2.12.1+cpu"));
        fs::write(folder.path().join("build-version"), "2.11.0+cpu\n").unwrap();
        assert_eq!(version_in(&lib).as_deref(), Some("2.11.0+cpu"));
    }

    #[test]
    fn what_the_user_set_is_left_alone() {
        let askers = [DETERMINISTIC, "MASTER_ADDR"];
        let names = |set: &[&str]| -> Vec<&str> {
            let settings = environment(&|name| askers.contains(&name) || set.contains(&name));
            settings.iter().map(|setting| setting.name).collect()
        };
        let all: Vec<&str> = variables().collect();
        assert_eq!(names(&[]), all);
        let without = |set: &str, gone: &str| {
            let left = all.iter().copied().filter(|name| *name != gone);
            assert_eq!(names(&[set]), left.collect::<Vec<_>>(), "{set}");
        };
        for name in &all {
            without(name, name);
        }
        without("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF");
        without("OMP_WAIT_POLICY", "GOMP_SPINCOUNT");
        let unasked = environment(&|_| false);
        let always = [
            "TORCH_CUDNN_SDPA_DEPRIORITIZED",
            "PYTORCH_ALLOC_CONF",
            "GOMP_SPINCOUNT",
        ];
        assert!(unasked.iter().map(|setting| setting.name).eq(always));
    }
}
