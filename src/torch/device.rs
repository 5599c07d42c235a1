//! The compute device and the state of libtorch on this machine.
//!
//! The programs link only libtorch's CPU libraries, so that one binary runs with and without CUDA.
//! The CUDA library registers itself with the CPU library when it is loaded, which must happen
//! before the first query about devices: libtorch looks at its registry once and caches the result.
//! Every query about CUDA therefore goes through [`choose`] or [`doctor`], which load it first.

use std::ffi::{CStr, OsStr, c_char};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device, Kind, TchError, Tensor};

use super::shim;
use ovchat_models::libtorch::{BUILT_AGAINST, DETERMINISTIC, mismatch, variables, version_in};
use ovchat_models::{DeviceSpec, Dtype, Finding, Gigabytes, ModelError, Placement, Room, Severity};

/// The maximum number of CPU threads. The matrices of one prompt keep no more busy, and a run is
/// bitwise reproducible only with the same number.
const THREADS_MAX: usize = 64;

/// The assumed memory of a device whose size cannot be determined.
const UNKNOWN_MEMORY: u64 = 8 << 30;

/// The file name of libtorch's CUDA library.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// The NVIDIA driver's library.
const DRIVER_LIBRARY: &str = "libcuda.so.1";

/// The device file that every NVIDIA driver on Linux creates.
const DRIVER_FILE: &str = "/dev/nvidiactl";

/// CUDA_ERROR_NO_DEVICE: the driver works and reports no device.
const NO_DEVICE: i32 = 100;

/// The advice on a GPU that cannot be used.
const WITHOUT: &str = "set `device: cpu` on the models to compute on the CPU";

/// Resolves the `device` and `dtype` of a model in the pipeline file. Also fixes the number of
/// threads, so call it before computing anything.
///
/// `auto` is the first CUDA device if there is one, otherwise the CPU; bfloat16 on CUDA, float32 on
/// the CPU. Fails if the named CUDA device does not exist, if `auto` finds an NVIDIA GPU that
/// cannot be used, or if the libtorch version differs from the one that the program was built
/// against.
pub fn choose(device: DeviceSpec, dtype: Dtype) -> Result<(Device, Kind), ModelError> {
    fitting_version()?;
    threads();
    let refuse = |problem| ModelError::Device {
        device: device.into(),
        problem,
    };
    let chosen = match device {
        DeviceSpec::Auto => {
            let (device, _) = auto().clone().map_err(refuse)?;
            device
        }
        DeviceSpec::Cpu => Device::Cpu,
        DeviceSpec::Cuda(index) => {
            let count = cuda_devices().map_err(refuse)?;
            if index >= count {
                let problem = format!("found {count} CUDA devices, numbered from 0");
                return Err(refuse(problem));
            }
            Device::Cuda(index)
        }
    };
    let kind = match (dtype, chosen) {
        (Dtype::Float32, _) | (Dtype::Auto, Device::Cpu) => Kind::Float,
        (Dtype::Bfloat16 | Dtype::Auto, _) => Kind::BFloat16,
    };
    Ok((chosen, kind))
}

/// Describes the choice of [`choose`] and its reason.
pub fn placement(device: DeviceSpec, dtype: Dtype) -> Result<Placement, ModelError> {
    let (chosen, kind) = choose(device, dtype)?;
    let reason = match device {
        DeviceSpec::Auto => auto().as_ref().map(|(_, reason)| reason.clone()),
        device => Ok(format!(
            "the pipeline sets `device: {}`",
            String::from(device)
        )),
    };
    Ok(Placement {
        device: named(chosen),
        precision: match kind {
            Kind::BFloat16 => "bfloat16",
            _ => "float32",
        },
        reason: reason.unwrap_or_else(Clone::clone),
    })
}

/// The display name of a device: `the CPU`, `cuda:0 (NVIDIA H200)`.
fn named(device: Device) -> String {
    match device {
        Device::Cuda(index) => match device_name(index) {
            Some(name) => format!("cuda:{index} ({name})"),
            None => format!("cuda:{index}"),
        },
        _ => "the CPU".to_owned(),
    }
}

/// The state of the NVIDIA driver.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Driver {
    /// No driver is installed.
    Missing,
    /// A driver is installed but cannot be used, for this reason.
    Broken(String),
    /// A working driver that reports this many devices to the process.
    Shows(usize),
}

impl Driver {
    /// Derives the state from the presence of the driver's device file and the outcome of loading
    /// its library: a load error, the number of devices, or a CUDA error code.
    fn of(has_file: bool, library: Result<Result<usize, i32>, String>) -> Self {
        match library {
            Ok(Ok(devices)) => Self::Shows(devices),
            Ok(Err(NO_DEVICE)) => Self::Shows(0),
            // CUDA container images include the library even if the host has no driver.
            Err(_) | Ok(Err(_)) if !has_file => Self::Missing,
            Ok(Err(code)) => Self::Broken(format!(
                "the NVIDIA driver failed with CUDA error {code}; check `nvidia-smi`"
            )),
            Err(error) => Self::Broken(format!(
                "the NVIDIA driver is loaded ({DRIVER_FILE}), but its library cannot be loaded: {error}; \
                 install the driver's user-space libraries, or pass them to the container"
            )),
        }
    }
}

/// The device of `auto` and the reason, from the driver's state and the CUDA library's own answer:
/// the number of devices (at least one), or the reason why there are none. An NVIDIA GPU that
/// cannot be used is an error.
fn device_of_auto(
    driver: &Driver,
    cuda: impl FnOnce() -> Result<usize, String>,
) -> Result<(Device, String), String> {
    match driver {
        Driver::Missing => Ok((Device::Cpu, "there is no NVIDIA driver".to_owned())),
        Driver::Shows(0) => {
            let hidden = std::env::var("CUDA_VISIBLE_DEVICES")
                .map(|value| format!(" (CUDA_VISIBLE_DEVICES is `{value}`)"))
                .unwrap_or_default();
            let reason = format!("the NVIDIA driver reports no device{hidden}");
            Ok((Device::Cpu, reason))
        }
        Driver::Shows(devices) => match cuda() {
            Ok(1) => Ok((Device::Cuda(0), "it is the only CUDA device".to_owned())),
            Ok(count) => {
                let reason = format!(
                    "it is the first of {count} CUDA devices; sampling and scoring use all"
                );
                Ok((Device::Cuda(0), reason))
            }
            Err(problem) => {
                let devices = counted(*devices);
                Err(format!(
                    "the NVIDIA driver reports {devices}, but libtorch cannot use it: {problem}; or {WITHOUT}"
                ))
            }
        },
        Driver::Broken(problem) => Err(format!("{problem}; or {WITHOUT}")),
    }
}

/// The device of `auto`, determined once.
fn auto() -> &'static Result<(Device, String), String> {
    static AUTO: OnceLock<Result<(Device, String), String>> = OnceLock::new();
    AUTO.get_or_init(|| device_of_auto(driver(), cuda_devices))
}

/// The state of the driver, determined once.
fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        let library = load(OsStr::new(DRIVER_LIBRARY));
        let library = library
            .map(|()| count_of_driver())
            .map_err(|error| error.to_string());
        Driver::of(Path::new(DRIVER_FILE).exists(), library)
    })
}

fn counted(devices: usize) -> String {
    match devices {
        1 => "1 device".to_owned(),
        many => format!("{many} devices"),
    }
}

/// Fails if the libtorch version differs from the one that the program was built against.
fn fitting_version() -> Result<(), ModelError> {
    let found = libtorch_version();
    match found
        .zip(BUILT_AGAINST)
        .and_then(|(found, built)| mismatch(&found, built))
    {
        None => Ok(()),
        Some(problem) => Err(ModelError::Torch {
            what: "libtorch".to_owned(),
            problem,
        }),
    }
}

/// The number of CPU threads of libtorch, fixed by the first call for the life of the process:
/// `OMP_NUM_THREADS` if it is set, otherwise the processors available to this process, at most 64.
/// Sums are split among threads, so results are bitwise reproducible only with the same number;
/// callers that record a run record it.
pub fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        let asked = std::env::var("OMP_NUM_THREADS").ok();
        let threads = asked
            .and_then(|text| text.trim().parse().ok())
            .filter(|count| *count > 0)
            .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
            .unwrap_or(1)
            .min(THREADS_MAX);
        warm_up();
        tch::set_num_threads(threads as i32);
        // Benchmarking kernels and keeping the fastest would make the choice nondeterministic.
        Cuda::cudnn_set_benchmark(false);
        if std::env::var_os(DETERMINISTIC).is_some() {
            shim::set_deterministic();
        }
        threads
    })
}

/// The number of weights below which a network computes on one thread: waking another takes longer than
/// its products do, and beside other programs two threads that wait for each other are much slower.
const ONE_THREAD_BELOW: u64 = 10_000_000;

/// The number of threads that [`keep_threads`] set; 0 for none.
static KEPT_THREADS: AtomicU32 = AtomicU32::new(0);

/// Returns the number of threads that a network with so many weights computes with. A number in
/// OMP_NUM_THREADS applies to all networks.
pub fn threads_of(weights: u64) -> u32 {
    let is_small = weights < ONE_THREAD_BELOW && std::env::var_os("OMP_NUM_THREADS").is_none();
    let threads = if is_small { 1 } else { threads() };
    threads as u32
}

/// Prepares the process for a network with so many weights, which is opened now: sets the number of
/// threads, and gives the memory of networks that were closed back to the GPU.
pub fn prepare(weights: u64) {
    shim::empty_cache();
    let threads = match KEPT_THREADS.load(Ordering::Relaxed) {
        0 => threads_of(weights),
        kept => kept,
    };
    tch::set_num_threads(threads as i32);
}

/// Lets the networks that are open, and all that are opened, compute with this number of threads, as
/// the rows of a table that another process began; `None` for the number that follows from their sizes.
pub fn keep_threads(kept: Option<u32>) {
    // The process's own number is set first, since its first call sets it.
    threads();
    KEPT_THREADS.store(kept.unwrap_or(0), Ordering::Relaxed);
    if let Some(kept) = kept {
        tch::set_num_threads(kept as i32);
    }
}

/// Calls MKL's vector functions once, on one thread. They choose their code in the first call: when
/// two threads make it at once, as for the angles of the first prompt, its results differ in the last
/// digits in one process of a hundred.
fn warm_up() {
    tch::set_num_threads(1);
    let ones = Tensor::ones([64], (Kind::Float, Device::Cpu));
    for function in [Tensor::cos, Tensor::sin, Tensor::exp, Tensor::log] {
        let _ = function(&ones);
    }
}

/// The default memory limit of a model on a device, in bytes: nine tenths of a GPU's memory; on the
/// CPU, half of the machine's memory or, if that is less, of the process's limit. The same in every
/// run.
pub fn memory(device: Device) -> u64 {
    match device {
        Device::Cuda(index) => cuda_memory(index).map_or(UNKNOWN_MEMORY, |total| total / 10 * 9),
        _ => machine_memory() / 2,
    }
}

/// The device of a model and the memory that it may use there: `asked`, or by default [`memory`].
pub fn room(asked: Option<Gigabytes>, device: Device) -> Room {
    Room {
        on_gpu: device != Device::Cpu,
        bytes: asked.map_or_else(|| memory(device), Gigabytes::bytes),
        device: match device {
            Device::Cuda(index) => cuda_memory(index).unwrap_or(UNKNOWN_MEMORY),
            _ => machine_memory(),
        },
    }
}

/// The GPUs that `device: auto` may use, as `CUDA_VISIBLE_DEVICES` names them: by number, UUID, or MIG
/// instance. None if `auto` is the CPU.
pub fn gpus() -> Result<Vec<String>, ModelError> {
    let (device, _) = choose(DeviceSpec::Auto, Dtype::Auto)?;
    if device == Device::Cpu {
        return Ok(Vec::new());
    }
    let count = cuda_devices().map_err(|problem| ModelError::Device {
        device: DeviceSpec::Auto.into(),
        problem,
    })?;
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    Ok(named_gpus(count, visible.as_deref()))
}

fn named_gpus(count: usize, visible: Option<&str>) -> Vec<String> {
    match visible.filter(|visible| !visible.trim().is_empty()) {
        // CUDA ignores what follows the first invalid name.
        Some(visible) => visible
            .split(',')
            .take(count)
            .map(|name| name.trim().to_owned())
            .collect(),
        None => (0..count).map(|number| number.to_string()).collect(),
    }
}

/// Waits until the device has finished its queued work, so that timings are correct.
pub fn wait(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// The memory of this machine or, if that is less, the limit of its container or of this process.
fn machine_memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let limits = [
        memory_total(&read("/proc/meminfo")),
        address_space_limit(&read("/proc/self/limits")),
    ];
    let cgroups = cgroup_files(&read("/proc/self/cgroup"))
        .into_iter()
        .map(|file| read(&file).trim().parse().ok());
    let limits = limits.into_iter().chain(cgroups).flatten();
    limits.min().unwrap_or(UNKNOWN_MEMORY)
}

/// `MemTotal` of /proc/meminfo.
fn memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// The soft limit of /proc/self/limits (`ulimit -v`).
fn address_space_limit(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max address space"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The files that may hold the memory limits of a process's control group and its parents, for
/// cgroup v1 and v2.
fn cgroup_files(cgroup: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        let mut group = group.trim_end_matches('/');
        loop {
            files.push(format!("{root}{group}/{name}"));
            match group.rsplit_once('/') {
                Some((above, _)) => group = above,
                None => break,
            }
        }
    }
    files
}

/// The memory of a CUDA device in bytes, from the CUDA runtime that ships with libtorch.
#[expect(
    unsafe_code,
    reason = "tch does not expose the memory size of a device; the CUDA runtime does"
)]
fn cuda_memory(index: usize) -> Option<u64> {
    type SetDevice = unsafe extern "C" fn(i32) -> i32;
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
    let runtime = Library::this();
    let (mut free, mut total) = (0_usize, 0_usize);
    // SAFETY: the signatures are those of the CUDA runtime since its first version
    // (docs.nvidia.com/cuda/cuda-runtime-api, group__CUDART__MEMORY); 0 is cudaSuccess.
    let succeeded = unsafe {
        let set_device = runtime.get::<SetDevice>(b"cudaSetDevice\0").ok()?;
        let mem_get_info = runtime.get::<MemGetInfo>(b"cudaMemGetInfo\0").ok()?;
        set_device(index as i32) == 0 && mem_get_info(&raw mut free, &raw mut total) == 0
    };
    succeeded.then_some(total as u64)
}

/// Reports on libtorch and the devices of this machine.
pub fn doctor() -> Vec<Finding> {
    let finding = |severity, text| Finding { severity, text };
    let folder = libtorch_folder();
    let mut findings = vec![version_finding(
        folder.as_deref(),
        libtorch_version().as_deref(),
        BUILT_AGAINST,
    )];
    let settings: Vec<String> = variables()
        .filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)))
        .collect();
    if !settings.is_empty() {
        let text = format!("libtorch environment: {}", settings.join(" "));
        findings.push(finding(Severity::Good, text));
    }
    let text = format!(
        "{} CPU threads (set OMP_NUM_THREADS to change this)",
        threads()
    );
    findings.push(finding(Severity::Good, text));
    findings.push(match driver() {
        Driver::Missing => finding(Severity::Note, "no NVIDIA driver".to_owned()),
        Driver::Broken(problem) => finding(Severity::Bad, problem.clone()),
        Driver::Shows(devices) => {
            let cuda = driver_version()
                .map_or_else(String::new, |version| format!(", up to CUDA {version}"));
            let text = format!("NVIDIA driver: {}{cuda}", counted(*devices));
            let severity = if *devices == 0 {
                Severity::Note
            } else {
                Severity::Good
            };
            finding(severity, text)
        }
    });
    let half = cuda_library();
    findings.push(match (half, driver()) {
        (Ok(path), _) => {
            let text = format!("CUDA library of libtorch: {}", path.display());
            finding(Severity::Good, text)
        }
        (Err(problem), Driver::Shows(1..)) => finding(Severity::Bad, problem.clone()),
        // No device could use it.
        (Err(problem), _) => finding(Severity::Note, problem.clone()),
    });
    findings.push(match auto() {
        Ok((Device::Cpu, reason)) => {
            let text = format!(
                "`device: auto` uses the CPU in float32, since {reason}; bfloat16 halves the memory \
                 of the weights, but is slow on processors without AMX or AVX512-BF16"
            );
            finding(Severity::Note, text)
        }
        Ok((device, reason)) => {
            let device = named(*device);
            let text = format!("`device: auto` uses {device} in bfloat16, since {reason}");
            finding(Severity::Good, text)
        }
        Err(problem) => finding(Severity::Bad, format!("`device: auto` is not available: {problem}")),
    });
    if shim::is_deterministic() {
        let text = format!(
            "{DETERMINISTIC} is set: kernels repeat to the bit where libtorch has such kernels"
        );
        findings.push(finding(Severity::Good, text));
    }
    // Only a GPU has a choice.
    if matches!(auto(), Ok((device, _)) if *device != Device::Cpu) {
        let backends = shim::attention_backends().join(", ");
        let first = if std::env::var_os(CUDNN_LAST).is_some() {
            "; cuDNN last"
        } else {
            ""
        };
        let text = format!("attention backends: {backends}{first}");
        findings.push(finding(Severity::Good, text));
    }
    findings
}

/// The variable that lets libtorch choose cuDNN's attention last: it plans for every new length.
const CUDNN_LAST: &str = "TORCH_CUDNN_SDPA_DEPRIORITIZED";

/// Compares the loaded libtorch with the version that the program was built against. An unknown
/// version is reported as unknown.
fn version_finding(folder: Option<&Path>, found: Option<&str>, built: Option<&str>) -> Finding {
    let place = folder.map_or_else(
        || "linked statically".to_owned(),
        |folder| format!("in {}", folder.display()),
    );
    let built_against = built.map_or_else(
        || "the version that this program was built against is unknown, too".to_owned(),
        |built| format!("this program was built against {built}"),
    );
    let (severity, text) = match (found, built) {
        (None, _) => {
            let text = format!("libtorch of unknown version, {place}; {built_against}");
            (Severity::Note, text)
        }
        (Some(found), built) => match built.and_then(|built| mismatch(found, built)) {
            Some(problem) => (
                Severity::Bad,
                format!("libtorch {found} {place}: {problem}"),
            ),
            None => (Severity::Good, format!("libtorch {found} {place}")),
        },
    };
    Finding { severity, text }
}

/// Converts an error of libtorch: out of memory, or its own message (without the C++ stack trace).
/// `what` completes "out of memory while …"; `batch` and `length` are the rows and tokens that were
/// computed at once.
pub(super) fn torch_error(
    what: String,
    batch: usize,
    length: usize,
    error: &TchError,
) -> ModelError {
    let text = error.to_string();
    let out_of_memory = [
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "bad_alloc",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ];
    if out_of_memory.iter().any(|words| text.contains(words)) {
        return ModelError::OutOfMemory {
            what,
            batch,
            length,
        };
    }
    let problem = text
        .trim_start_matches("Internal torch error: ")
        .lines()
        .take_while(|line| !line.starts_with("Exception raised from"))
        .collect::<Vec<_>>()
        .join(" ");
    ModelError::Torch { what, problem }
}

/// The number of CUDA devices, at least one, or the reason why there are none.
fn cuda_devices() -> Result<usize, String> {
    cuda_library().as_ref().map_err(Clone::clone)?;
    match (Cuda::device_count(), driver()) {
        (count @ 1.., _) => Ok(count as usize),
        (_, Driver::Missing) => Err("there is no NVIDIA driver".to_owned()),
        (_, Driver::Broken(problem)) => Err(problem.clone()),
        (_, Driver::Shows(0)) => Err(
            "the NVIDIA driver reports no device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
                .to_owned(),
        ),
        (_, Driver::Shows(_)) => {
            let newest = driver_version().map_or_else(String::new, |version| {
                format!(" (this one supports CUDA up to {version})")
            });
            Err(format!(
                "libtorch found no CUDA device that it can use; update the NVIDIA driver{newest}"
            ))
        }
    }
}

/// Loads libtorch's CUDA library once and returns its path, or the reason why it cannot be loaded.
fn cuda_library() -> &'static Result<PathBuf, String> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = cuda_library_path().ok_or(
            "libtorch has no CUDA library (libtorch_cuda.so) here; add the `torch/lib` folder of a \
             PyTorch 2.11 with CUDA to LD_LIBRARY_PATH",
        )?;
        load(path.as_os_str()).map_err(|error| {
            format!(
                "{} cannot be loaded ({error}); run `make setup` in the project, which downloads NVIDIA's \
                 libraries if there is an NVIDIA driver, or add the `torch/lib` folder of a PyTorch 2.11 \
                 with CUDA to LD_LIBRARY_PATH",
                path.display()
            )
        })?;
        Ok(path)
    })
}

/// The path of the CUDA library: next to the loaded CPU library, otherwise the first in
/// LD_LIBRARY_PATH.
fn cuda_library_path() -> Option<PathBuf> {
    let search_path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    libtorch_folder()
        .into_iter()
        .chain(std::env::split_paths(&search_path))
        .map(|folder| folder.join(CUDA_LIBRARY))
        .find(|path| path.is_file())
}

/// The folder of the libtorch that this process has loaded.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])))
        .find(|path| path.file_name() == Some(OsStr::new("libtorch_cpu.so")))
        .and_then(Path::parent)
        .map(Path::to_owned)
}

/// The version of the loaded libtorch, or `unknown`.
pub fn version() -> String {
    libtorch_version().unwrap_or_else(|| "unknown".to_owned())
}

/// The version according to the files of libtorch, otherwise according to the library itself.
fn libtorch_version() -> Option<String> {
    let named = libtorch_folder().and_then(|folder| version_in(&folder));
    named.or_else(own_version)
}

/// The version that the library itself reports, since 2.9.
#[expect(
    unsafe_code,
    reason = "tch does not expose libtorch's version; its C interface does"
)]
fn own_version() -> Option<String> {
    type AbiVersion = unsafe extern "C" fn() -> u64;
    let libtorch = Library::this();
    // SAFETY: the signature is that of torch/csrc/inductor/aoti_torch/c/shim.h.
    let packed = unsafe {
        let version = libtorch.get::<AbiVersion>(b"aoti_torch_abi_version\0");
        version.ok()?()
    };
    let [major, minor, patch, ..] = packed.to_be_bytes();
    Some(format!("{major}.{minor}.{patch}"))
}

/// The number of devices that the driver reports, or its error code. The driver must be loaded.
#[expect(
    unsafe_code,
    reason = "libtorch queries the driver only once its CUDA library is loaded, and does not say why there is none"
)]
fn count_of_driver() -> Result<usize, i32> {
    type Init = unsafe extern "C" fn(u32) -> i32;
    type Count = unsafe extern "C" fn(*mut i32) -> i32;
    let driver = Library::this();
    let mut count = 0;
    // SAFETY: the signatures are those of the driver since CUDA 2
    // (docs.nvidia.com/cuda/cuda-driver-api, group__CUDA__INITIALIZE, group__CUDA__DEVICE); 0 is
    // CUDA_SUCCESS.
    let code = unsafe {
        let init = driver.get::<Init>(b"cuInit\0");
        let get_count = driver.get::<Count>(b"cuDeviceGetCount\0");
        match (init, get_count) {
            (Ok(init), Ok(get_count)) => match init(0) {
                0 => get_count(&raw mut count),
                code => code,
            },
            // Another library with the driver's file name reports no device.
            _ => NO_DEVICE,
        }
    };
    if code == 0 {
        Ok(usize::try_from(count).unwrap_or(0))
    } else {
        Err(code)
    }
}

/// The newest CUDA version that the driver supports, such as `13.0`.
#[expect(unsafe_code, reason = "only the driver's C interface exposes it")]
fn driver_version() -> Option<String> {
    type Version = unsafe extern "C" fn(*mut i32) -> i32;
    let driver = Library::this();
    let mut version = 0;
    // SAFETY: the signature is that of the driver since CUDA 2 (group__CUDA__VERSION); 0 is
    // CUDA_SUCCESS.
    let code = unsafe {
        let get = driver.get::<Version>(b"cuDriverGetVersion\0").ok()?;
        get(&raw mut version)
    };
    (code == 0).then(|| format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// The name of a CUDA device, from the driver, whose devices must have been counted before.
#[expect(unsafe_code, reason = "tch does not expose it")]
fn device_name(index: usize) -> Option<String> {
    type Get = unsafe extern "C" fn(*mut i32, i32) -> i32;
    type Name = unsafe extern "C" fn(*mut c_char, i32, i32) -> i32;
    driver();
    let driver = Library::this();
    let mut name: [c_char; 256] = [0; 256];
    let mut device = 0;
    let index = i32::try_from(index).ok()?;
    // SAFETY: the signatures are those of the driver since CUDA 2 (group__CUDA__DEVICE); the name
    // is truncated to the given length and NUL-terminated.
    let name = unsafe {
        let get = driver.get::<Get>(b"cuDeviceGet\0").ok()?;
        let get_name = driver.get::<Name>(b"cuDeviceGetName\0").ok()?;
        if get(&raw mut device, index) != 0 || get_name(name.as_mut_ptr(), 256, device) != 0 {
            return None;
        }
        CStr::from_ptr(name.as_ptr())
    };
    Some(name.to_string_lossy().into_owned())
}

/// Loads a shared library permanently, with its symbols visible to all others.
#[expect(
    unsafe_code,
    reason = "loading a library runs its initializers; libtorch's CUDA library and the NVIDIA driver \
              are made to be loaded this way, as PyTorch does"
)]
fn load(library: &OsStr) -> Result<(), libloading::Error> {
    // SAFETY: the initializers of these two libraries register kernels and open the driver; they do
    // not touch this program's memory, and the library is never unloaded.
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(loaded);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_named_as_the_user_has_named_them() {
        assert_eq!(named_gpus(2, None), ["0", "1"]);
        assert_eq!(named_gpus(2, Some("")), ["0", "1"]);
        assert_eq!(named_gpus(2, Some("5, 3")), ["5", "3"]);
        assert_eq!(named_gpus(1, Some("GPU-8f6a,x")), ["GPU-8f6a"]);
        let mig = "MIG-41b8b2a3-1111-2222-3333-444455556666";
        assert_eq!(named_gpus(1, Some(mig)), [mig]);
    }

    #[test]
    fn the_cpu_computes_in_float32_unless_told_otherwise() {
        let choose = |dtype| choose(DeviceSpec::Cpu, dtype).unwrap();
        assert_eq!(choose(Dtype::Auto), (Device::Cpu, Kind::Float));
        assert_eq!(choose(Dtype::Float32), (Device::Cpu, Kind::Float));
        assert_eq!(choose(Dtype::Bfloat16), (Device::Cpu, Kind::BFloat16));
    }

    #[test]
    fn a_cuda_device_that_does_not_exist_is_refused_by_name() {
        let error = choose(DeviceSpec::Cuda(4096), Dtype::Auto).unwrap_err();
        assert!(matches!(&error, ModelError::Device { device, .. } if device == "cuda:4096"));
        let text = error.to_string();
        assert!(text.contains("CUDA"), "{text}");
    }

    #[test]
    fn doctor_names_libtorch_the_threads_and_the_device_of_auto() {
        let words: Vec<String> = doctor().into_iter().map(|finding| finding.text).collect();
        let words = words.join("\n");
        assert!(words.contains("libtorch 2.11"), "{words}");
        assert!(
            words.contains(&format!("{} CPU threads", threads())),
            "{words}"
        );
        assert!(words.contains("`device: auto` "), "{words}");
        assert_eq!(tch::get_num_threads() as usize, threads());
        let own = own_version().unwrap();
        assert!(version().starts_with(&own), "{own} beside {}", version());
    }

    #[test]
    fn a_libtorch_of_another_version_is_bad_and_an_unknown_version_is_not_invented() {
        let folder = Path::new("/opt/torch/lib");
        let of = |found, built| version_finding(Some(folder), found, built);
        let good = of(Some("2.11.1+cpu"), Some("2.11.0+cu130"));
        assert_eq!(good.severity, Severity::Good);
        assert_eq!(good.text, "libtorch 2.11.1+cpu in /opt/torch/lib");
        let other = of(Some("2.12.1"), Some("2.11.0"));
        assert_eq!(other.severity, Severity::Bad);
        assert!(
            other.text.contains("built against libtorch 2.11.0"),
            "{other:?}"
        );
        let unknown = of(None, Some("2.11.0"));
        assert_eq!(unknown.severity, Severity::Note);
        assert!(
            unknown.text.starts_with("libtorch of unknown version"),
            "{unknown:?}"
        );
        assert!(fitting_version().is_ok());
    }

    #[test]
    fn the_driver_is_missing_only_where_nothing_of_it_is_there() {
        let gone = || Err("libcuda.so.1: no such file".to_owned());
        assert_eq!(Driver::of(false, gone()), Driver::Missing);
        // A container with CUDA's libraries on a host without a driver.
        assert_eq!(Driver::of(false, Ok(Err(803))), Driver::Missing);
        assert!(
            matches!(Driver::of(true, gone()), Driver::Broken(problem) if problem.contains("no such file"))
        );
        assert!(
            matches!(Driver::of(true, Ok(Err(803))), Driver::Broken(problem) if problem.contains("803"))
        );
        assert_eq!(Driver::of(true, Ok(Err(NO_DEVICE))), Driver::Shows(0));
        assert_eq!(Driver::of(false, Ok(Ok(2))), Driver::Shows(2));
    }

    #[test]
    fn auto_takes_the_gpu_says_why_not_or_fails() {
        let unasked = || -> Result<usize, String> { panic!("there is nothing to load for") };
        let (device, reason) = device_of_auto(&Driver::Missing, unasked).unwrap();
        assert_eq!(
            (device, reason.as_str()),
            (Device::Cpu, "there is no NVIDIA driver")
        );
        let (device, reason) = device_of_auto(&Driver::Shows(0), unasked).unwrap();
        assert_eq!(device, Device::Cpu);
        assert!(reason.contains("reports no device"), "{reason}");
        let (device, reason) = device_of_auto(&Driver::Shows(2), || Ok(2)).unwrap();
        assert_eq!(device, Device::Cuda(0));
        assert_eq!(
            reason,
            "it is the first of 2 CUDA devices; sampling and scoring use all"
        );
        // A GPU that is present but unusable is never skipped silently.
        let broken = || Err("libcudnn.so.9 is missing; install it".to_owned());
        let problem = device_of_auto(&Driver::Shows(1), broken).unwrap_err();
        let expected = "the NVIDIA driver reports 1 device, but libtorch cannot use it: libcudnn.so.9 is missing; \
                        install it; or set `device: cpu` on the models to compute on the CPU";
        assert_eq!(problem, expected);
        let old = Driver::Broken("the driver is too old".to_owned());
        let problem = device_of_auto(&old, unasked).unwrap_err();
        assert!(
            problem.contains("the driver is too old") && problem.contains("device: cpu"),
            "{problem}"
        );
    }

    #[test]
    fn a_placement_names_device_precision_and_reason() {
        let placement = placement(DeviceSpec::Cpu, Dtype::Auto).unwrap();
        assert_eq!(placement.device, "the CPU");
        assert_eq!(placement.precision, "float32");
        assert_eq!(placement.reason, "the pipeline sets `device: cpu`");
    }

    #[test]
    fn memory_is_that_of_the_machine_the_container_or_the_limit() {
        assert_eq!(
            memory_total("MemFree: 1 kB\nMemTotal:       24684096 kB\n"),
            Some(24_684_096 << 10)
        );
        let limits = "Max cpu time     unlimited   unlimited  seconds\nMax address space         8589934592           unlimited            bytes\n";
        assert_eq!(address_space_limit(limits), Some(8 << 30));
        assert_eq!(
            address_space_limit("Max address space  unlimited unlimited bytes"),
            None
        );
        let files = cgroup_files("4:memory:/a/b\n1:cpu:/c\n0::/\n");
        let expected = [
            "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory.max",
        ];
        assert_eq!(files, expected);
        let memory = memory(Device::Cpu);
        assert!((1 << 26..1 << 50).contains(&memory), "{memory}");
    }

    #[test]
    fn running_out_of_memory_is_told_apart_from_other_errors() {
        let huge = tch::Tensor::f_zeros([1 << 45], (Kind::Double, Device::Cpu)).unwrap_err();
        let error = torch_error("sampling".to_owned(), 2, 30, &huge);
        let text = error.to_string();
        assert_eq!(text, "out of memory while sampling (2 rows, 30 tokens)");
        let wrong = tch::Tensor::from(1_i64).f_view([2, 2]).unwrap_err();
        let error = torch_error("sampling".to_owned(), 2, 30, &wrong);
        assert!(matches!(&error, ModelError::Torch { .. }), "{error}");
        assert!(!error.to_string().contains(".cpp"), "{error}");
    }
}
