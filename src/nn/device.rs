//! The device that networks compute on, and what libtorch is able to do here.
//!
//! Our programs link libtorch's CPU half only, so that one binary runs with and without CUDA. The
//! CUDA half registers itself with the CPU half when it is loaded, which must happen before libtorch
//! is first asked about devices: it asks its register once and remembers the answer. So every
//! question about CUDA goes through [`choose`] or [`doctor`], which load it first.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Cuda, Device, Kind, TchError};

use crate::models::{DeviceSpec, Dtype, Finding, Gigabytes, ModelError, Room, Severity};

/// The most threads that a computation on the CPU is spread over. The matrices of one prompt keep
/// no more busy, and a run is repeated to the bit only with the same number.
const THREADS_MAX: usize = 64;

/// What a device is taken to have that does not say.
const UNKNOWN_MEMORY: u64 = 8 << 30;

/// The name of libtorch's CUDA half.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// The device and the precision that a model's entry in the pipeline file means here. Fixes the
/// number of threads, too, so nothing is computed before it is.
///
/// `auto` is the first CUDA device if there is one, else the CPU; bfloat16 on CUDA, float32 on the
/// CPU. Fails when a CUDA device is named that does not exist, and says what is missing.
pub fn choose(device: DeviceSpec, dtype: Dtype) -> Result<(Device, Kind), ModelError> {
    threads();
    let device = match device {
        DeviceSpec::Auto if cuda_devices().is_ok() => Device::Cuda(0),
        DeviceSpec::Auto | DeviceSpec::Cpu => Device::Cpu,
        DeviceSpec::Cuda(index) => {
            let refuse = |problem| ModelError::Device {
                device: device.into(),
                problem,
            };
            let count = cuda_devices().map_err(refuse)?;
            if index >= count {
                let problem = format!("there are {count} CUDA devices, counted from 0");
                return Err(refuse(problem));
            }
            Device::Cuda(index)
        }
    };
    let kind = match (dtype, device) {
        (Dtype::Float32, _) | (Dtype::Auto, Device::Cpu) => Kind::Float,
        (Dtype::Bfloat16 | Dtype::Auto, _) => Kind::BFloat16,
    };
    Ok((device, kind))
}

/// The number of threads that libtorch computes with on the CPU, fixed by the first call for the
/// life of the process: `OMP_NUM_THREADS` if it is set, else the processors that this process may
/// use, at most 64. Sums are split among threads, so results repeat to the bit only with the same
/// number; whoever records a run records it.
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
        tch::set_num_threads(threads as i32);
        // Trying out kernels and keeping the fastest would make the choice depend on the moment.
        Cuda::cudnn_set_benchmark(false);
        threads
    })
}

/// The memory of a device that a model may take, in bytes, where nobody says how much: nine tenths
/// of a GPU's; on the CPU half of the machine's or, if that is less, of what this process is limited
/// to. The same in every run.
pub fn memory(device: Device) -> u64 {
    match device {
        Device::Cuda(index) => cuda_memory(index).map_or(UNKNOWN_MEMORY, |total| total / 10 * 9),
        _ => machine_memory() / 2,
    }
}

/// Where a model computes on this device, and what it may take there: `asked` for, or else what
/// [`memory`] says.
pub fn room(asked: Option<Gigabytes>, device: Device) -> Room {
    Room {
        on_gpu: device != Device::Cpu,
        bytes: asked.map_or_else(|| memory(device), Gigabytes::bytes),
    }
}

/// Waits until the device has done what it was told, so that time is told right.
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

/// The files that may hold the memory limits of a process's control group and of those above it, of
/// both versions.
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

/// The memory of a CUDA device, in bytes, by the runtime that libtorch's CUDA half brought along.
#[expect(
    unsafe_code,
    reason = "libtorch's interface to Rust does not tell how large a device is; CUDA's does"
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

/// What libtorch and its devices are like here, in plain words.
pub fn doctor() -> Vec<Finding> {
    let finding = |severity, text| Finding { severity, text };
    let mut findings = Vec::new();
    findings.push(match libtorch_folder() {
        Some(folder) => {
            let version = libtorch_version(&folder).unwrap_or_else(|| "2.11".to_owned());
            let text = format!("libtorch {version} in {}", folder.display());
            finding(Severity::Good, text)
        }
        None => finding(Severity::Note, "libtorch is linked statically".to_owned()),
    });
    let text = format!(
        "{} threads on the CPU (OMP_NUM_THREADS sets another number)",
        threads()
    );
    findings.push(finding(Severity::Good, text));
    match cuda_library() {
        Ok(path) => {
            let text = format!("CUDA half of libtorch: {}", path.display());
            findings.push(finding(Severity::Good, text));
        }
        Err(problem) => findings.push(finding(Severity::Note, problem.clone())),
    }
    match cuda_devices() {
        Ok(count) => {
            let text = format!("{count} CUDA devices; `auto` computes on the first, in bfloat16");
            findings.push(finding(Severity::Good, text));
        }
        Err(problem) => {
            // Without the library, the finding above has said why.
            if cuda_library().is_ok() {
                findings.push(finding(Severity::Note, problem));
            }
            let text = "`auto` computes on the CPU, in float32; bfloat16 halves the memory of \
                        weights there, and is slow on processors without AMX or AVX512-BF16";
            findings.push(finding(Severity::Note, text.to_owned()));
        }
    }
    findings
}

/// The error that a failed call into libtorch is for the dataflow: out of memory, or its own words
/// (without the C++ stack). `what` completes "out of memory while …"; `batch` and `length` are the
/// rows and tokens that were computed at once.
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

/// How many CUDA devices there are: at least one, or the reason why there is none.
fn cuda_devices() -> Result<usize, String> {
    cuda_library().as_ref().map_err(Clone::clone)?;
    match Cuda::device_count() {
        count @ 1.. => Ok(count as usize),
        _ if !can_load("libcuda.so.1") => {
            Err("no CUDA device: the NVIDIA driver is missing (libcuda.so.1 not found)".to_owned())
        }
        _ => Err(
            "no CUDA device: the NVIDIA driver is there but shows none that this libtorch can \
             use; see `nvidia-smi`, CUDA_VISIBLE_DEVICES and whether the driver is recent enough"
                .to_owned(),
        ),
    }
}

/// Loads the CUDA half of libtorch, once, and returns its path, or says why it can't be loaded.
fn cuda_library() -> &'static Result<PathBuf, String> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = cuda_library_path().ok_or(
            "no CUDA: libtorch has no CUDA half (libtorch_cuda.so) here; to use a GPU, put the \
             `torch/lib` folder of a PyTorch 2.11 with CUDA into LD_LIBRARY_PATH",
        )?;
        load(path.as_os_str()).map_err(|error| {
            format!(
                "no CUDA: {} can't be loaded ({error}); install the nvidia packages that this \
                 PyTorch names, or put the `torch/lib` folder of a complete PyTorch 2.11 with \
                 CUDA into LD_LIBRARY_PATH",
                path.display()
            )
        })?;
        Ok(path)
    })
}

/// The CUDA half beside the CPU half that this process runs with, else the first in
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

/// The version of the libtorch that this process runs with, as far as its folder says.
pub fn version() -> String {
    let folder = libtorch_folder();
    folder
        .and_then(|folder| libtorch_version(&folder))
        .unwrap_or_else(|| "unknown".to_owned())
}

/// The version that a PyTorch (`torch/version.py`) or a libtorch (`build-version`) says it has.
fn libtorch_version(folder: &Path) -> Option<String> {
    let root = folder.parent()?;
    if let Ok(version) = std::fs::read_to_string(root.join("build-version")) {
        return Some(version.trim().to_owned());
    }
    let python = std::fs::read_to_string(root.join("version.py")).ok()?;
    let line = python
        .lines()
        .find(|line| line.starts_with("__version__"))?;
    line.split('\'').nth(1).map(str::to_owned)
}

fn can_load(library: &str) -> bool {
    load(OsStr::new(library)).is_ok()
}

/// Loads a shared library for good, its symbols visible to all others.
#[expect(
    unsafe_code,
    reason = "loading a library runs its initializers; libtorch's CUDA half and the NVIDIA driver \
              are made to be loaded this way, as PyTorch does"
)]
fn load(library: &OsStr) -> Result<(), libloading::Error> {
    // SAFETY: the initializers of these two libraries register kernels and open the driver; they
    // touch nothing of ours, and the library is never unloaded.
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(loaded);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(words.contains(&format!("{} threads", threads())), "{words}");
        assert!(words.contains("`auto` computes on the"), "{words}");
        assert_eq!(tch::get_num_threads() as usize, threads());
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
