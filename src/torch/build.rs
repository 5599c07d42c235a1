//! Bakes the place of libtorch into this crate's tests as a run path.
//!
//! A run path (not an rpath) is searched after LD_LIBRARY_PATH, so a user can still point the same
//! binary at another libtorch 2.11, such as the one of an installed PyTorch with CUDA.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("CARGO_FEATURE_TORCH").is_none() {
        return;
    }
    if let Some(libtorch) = std::env::var_os("LIBTORCH") {
        let lib = std::path::Path::new(&libtorch).join("lib");
        println!(
            "cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{}",
            lib.display()
        );
    }
}
