//! Compiles the operators of our own (`shim/shim.cpp`), and embeds the path of libtorch in this crate's
//! tests as a RUNPATH.
//!
//! A RUNPATH (unlike an RPATH) is searched after LD_LIBRARY_PATH, so the same binary can still be
//! pointed at another libtorch 2.11, such as that of an installed PyTorch with CUDA.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_TORCH").is_none() {
        return;
    }
    if let Some(libtorch) = std::env::var_os("LIBTORCH") {
        let libtorch = Path::new(&libtorch);
        compile_shim(&libtorch.join("include"));
        println!(
            "cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{}",
            libtorch.join("lib").display()
        );
    }
}

/// Compiles the shim against the headers of libtorch.
fn compile_shim(include: &Path) {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        .include(include)
        .include(include.join("torch/csrc/api/include"))
        // The headers of libtorch have warnings of their own.
        .warnings(false)
        .files(["shim/shim.cpp", "shim/kernels.cpp", "shim/store.cpp"]);
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        // libtorch's headers divide work by OpenMP, whose library it contains.
        build.flag("-fopenmp");
        println!("cargo:rustc-link-lib=gomp");
    }
    build.compile("ovchat_shim");
}
