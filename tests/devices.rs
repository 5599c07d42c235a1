//! Devices of models, the libtorch version, and the downloads of `make setup`.

use std::fs;
use std::path::Path;
use std::process::Command;

use ovchat_models::{DeviceSpec, ModelSpec};
use ovchat_pipeline::config::load;

use crate::scene::{CommandOutput, ROOT, Scene, said};

/// A policy of the small world that answers four prompts.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.prompts(4).write(
        "p.yaml",
        format!(
            "
pipeline: devices
models:
  policy: {{ llava_onevision: {{ weights: {ROOT}/data-samples/policy, device: cpu }} }}
stages:
  prompts: {{ load_prompts: {{ from: prompts.json }} }}
  candidates: {{ sample: {{ prompts: prompts, model: policy, count: 1, max_new_tokens: 2 }} }}
"
        ),
    );
    scene
}

/// Runs `pipeline` with all GPUs hidden.
fn without_gpu(scene: &Scene, arguments: &[&str]) -> CommandOutput {
    let mut command = scene.command(arguments);
    command.env("CUDA_VISIBLE_DEVICES", "");
    said(command.output().unwrap())
}

#[test]
fn the_first_line_of_a_run_names_the_device_and_why() {
    let scene = scene();
    let run = without_gpu(&scene, &["run", "p.yaml"]);
    let first = run.err.lines().next().unwrap();
    let expected = "policy: computing on the CPU in float32 (the pipeline sets `device: cpu`)";
    assert_eq!(first, expected, "{}", run.err);

    // The device of a model does not affect its tables, but the precision does.
    let auto = ["--set", "models.policy.llava_onevision.device=auto"];
    let again = without_gpu(&scene, &[&["run", "p.yaml"], &auto[..]].concat());
    let first = again.err.lines().next().unwrap();
    let expected = "policy: computing on the CPU in float32 (";
    assert!(first.starts_with(expected), "{}", again.err);
    assert!(first.contains("NVIDIA driver"), "{first}");
    assert!(
        again.err.contains("nothing to do: all 2 tables"),
        "{}",
        again.err
    );

    let log = without_gpu(&scene, &["run", "p.yaml", "--log", "json"]);
    let note = log
        .err
        .lines()
        .find(|line| line.contains("computing on the CPU"));
    assert!(note.is_some(), "{}", log.err);
}

/// A driver that reports a GPU which libtorch cannot use: a library that claims a device, without
/// an implementation.
#[test]
fn workers_whose_models_do_not_fit_into_memory_are_refused() {
    let scene = scene();
    let refused = without_gpu(&scene, &["plan", "p.yaml", "--workers", "9000"]);
    assert_eq!(refused.code, Some(2), "{}", refused.err);
    for words in [
        "not enough memory for `candidates`: 9000 workers",
        "use fewer with --workers",
    ] {
        assert!(refused.err.contains(words), "{}", refused.err);
    }
    let two = without_gpu(&scene, &["plan", "p.yaml", "--workers", "2"]);
    assert_eq!(two.code, Some(0), "{}", two.err);
    assert!(two.out.contains("workers"), "{}", two.out);
}

#[test]
fn deterministic_kernels_change_nothing_on_a_cpu() {
    let made = |variable: &str| {
        let scene = scene();
        let mut command = scene.command(&["run", "p.yaml"]);
        let ran = said(command.env(variable, "1").output().unwrap());
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        scene.tables("runs/devices")
    };
    assert_eq!(made("OVCHAT_DETERMINISTIC"), made("NOTHING"));
    let told = |variable: &str| {
        let scene = scene();
        let mut command = scene.command(&["doctor"]);
        said(command.env(variable, "1").output().unwrap()).out
    };
    let words = "OVCHAT_DETERMINISTIC is set: kernels repeat to the bit";
    assert!(told("OVCHAT_DETERMINISTIC").contains(words));
    assert!(!told("NOTHING").contains(words));
}

#[test]
fn a_gpu_that_cannot_be_used_is_an_error_that_the_cpu_avoids() {
    let scene = scene();
    let driver = "extern \"C\" int cuInit(unsigned) { return 0; }
        extern \"C\" int cuDeviceGetCount(int *count) { *count = 1; return 0; }
        extern \"C\" int cuDriverGetVersion(int *version) { *version = 12040; return 0; }\n";
    scene.write("driver/driver.cc", driver);
    let folder = scene.path("driver");
    let mut compiler = Command::new("c++");
    compiler
        .args(["-shared", "-fPIC", "-o", "libcuda.so.1", "driver.cc"])
        .current_dir(&folder);
    assert!(compiler.status().unwrap().success());
    let with_gpu = |arguments: &[&str]| {
        let mut command = scene.command(arguments);
        command
            .env("LD_LIBRARY_PATH", &folder)
            .env_remove("CUDA_VISIBLE_DEVICES");
        said(command.output().unwrap())
    };
    let auto = "models.policy.llava_onevision.device=auto";
    let refused = with_gpu(&["run", "p.yaml", "--set", auto, "--log", "json"]);
    assert_eq!(refused.code, Some(1), "{}", refused.err);
    for words in [
        "model `policy`: device `auto`: the NVIDIA driver reports 1 device, but libtorch cannot use it",
        "set `device: cpu`",
    ] {
        assert!(refused.err.contains(words), "{}", refused.err);
    }
    assert!(!scene.path("runs/devices/prompts").exists());
    let doctor = with_gpu(&["doctor"]);
    assert_eq!(doctor.code, Some(1), "{}", doctor.out);
    assert!(
        doctor
            .out
            .contains("NVIDIA driver: 1 device, up to CUDA 12.4"),
        "{}",
        doctor.out
    );
    assert!(
        doctor.out.contains("BAD   `device: auto` is not available"),
        "{}",
        doctor.out
    );
    let run = with_gpu(&["run", "p.yaml"]);
    assert_eq!(run.code, Some(0), "{}", run.err);
}

#[test]
fn the_pipelines_of_the_small_world_need_no_gpu() {
    let mut models = 0;
    let folder = fs::read_dir(format!("{ROOT}/pipelines")).unwrap();
    let mut paths: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
    paths.push(format!("{ROOT}/pipelines/benchmarks/small-world.yaml").into());
    for path in paths {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        // The 7B model needs a GPU, and the other benchmarks are of such models.
        if name == "llava-onevision-7b.yaml" || path.is_dir() {
            continue;
        }
        let plan = load(&path, &[], true).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (model, spec) in plan.models {
            let device = match spec.opened() {
                ModelSpec::LlavaOnevision(spec) => spec.device,
                ModelSpec::LlavaRlhf(spec) => spec.device,
                _ => continue,
            };
            assert_eq!(device, DeviceSpec::Cpu, "{model} in {name}");
            models += 1;
        }
    }
    assert!(models >= 13, "only {models} models");
}

#[test]
fn another_version_of_libtorch_is_refused_before_it_is_loaded() {
    let scene = scene();
    scene
        .write("torch/lib/libtorch_cpu.so", "")
        .write("torch/version.py", "__version__ = '2.12.1+cpu'\n");
    let lib = scene.path("torch/lib");
    for arguments in [&["doctor"][..], &["run", "p.yaml"]] {
        let mut command = scene.command(arguments);
        let said = said(command.env("LD_LIBRARY_PATH", &lib).output().unwrap());
        assert_eq!(said.code, Some(1), "{}", said.err);
        assert!(said.err.contains("cannot use 2.12.1+cpu"), "{}", said.err);
        assert!(
            said.err.contains("built against libtorch 2.11"),
            "{}",
            said.err
        );
    }
    assert!(!scene.path("runs").exists());
}

/// Returns the environment that doctor reports.
fn environment(program: &Path, more: &[(&str, &str)]) -> String {
    let mut command = Command::new(program);
    command
        .arg("doctor")
        .env_remove("OVCHAT_LIBTORCH_SETTINGS")
        .env_remove("TORCH_CUDNN_SDPA_DEPRIORITIZED")
        .env_remove("PYTORCH_ALLOC_CONF")
        .env_remove("PYTORCH_CUDA_ALLOC_CONF")
        .env_remove("GOMP_SPINCOUNT")
        .env_remove("OMP_WAIT_POLICY")
        .envs(more.iter().copied());
    let said = said(command.output().unwrap());
    let line = said
        .out
        .lines()
        .find(|line| line.contains("libtorch environment"));
    line.unwrap_or_default().to_owned()
}

#[test]
fn libtorch_finds_its_environment_unless_the_user_set_another() {
    let pipeline = Path::new(env!("CARGO_BIN_EXE_pipeline"));
    // The engine can be started directly, too.
    for program in [pipeline, &pipeline.with_file_name("pipeline-engine")] {
        let all = "TORCH_CUDNN_SDPA_DEPRIORITIZED=1 PYTORCH_ALLOC_CONF=expandable_segments:True \
                   GOMP_SPINCOUNT=5000";
        let found = environment(program, &[]);
        assert!(found.ends_with(all), "{found}");
        let own = [("PYTORCH_ALLOC_CONF", "backend:native")];
        let found = environment(program, &own);
        assert!(
            found.ends_with("PYTORCH_ALLOC_CONF=backend:native GOMP_SPINCOUNT=5000"),
            "{found}"
        );
        let older = [("PYTORCH_CUDA_ALLOC_CONF", "backend:native")];
        let found = environment(program, &older);
        assert!(
            found.ends_with("TORCH_CUDNN_SDPA_DEPRIORITIZED=1 GOMP_SPINCOUNT=5000"),
            "{found}"
        );
    }
}

/// Returns the commands of `make setup` in an empty folder, with this path for the NVIDIA driver's
/// file.
fn setup(nvidia: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("make");
    command
        .args(["-n", "-f", &format!("{ROOT}/Makefile"), "setup"])
        .arg(format!("NVIDIA_FILE={nvidia}"))
        .current_dir(folder.path())
        .env_remove("LIBTORCH")
        .env_remove("MAKEFLAGS");
    let said = said(command.output().unwrap());
    assert_eq!(said.code, Some(0), "{}", said.err);
    said.out
}

#[test]
fn setup_fetches_the_libraries_of_nvidia_where_there_is_a_driver() {
    let without = setup("/nowhere/nvidiactl");
    assert!(without.contains("torch==2.11.0"), "{without}");
    assert!(without.contains("0.5 GB to download"), "{without}");
    assert!(!without.contains("nvidia-cudnn"), "{without}");
    let with = setup("/dev/null");
    assert!(with.contains("torch==2.11.0"), "{with}");
    assert!(with.contains("nvidia-cudnn-cu13==9.19.0.56"), "{with}");
    assert!(with.contains("2.0 GB to download"), "{with}");
}
