//! Embeds the path of libtorch in this crate's tests as a RUNPATH.
//!
//! A RUNPATH (unlike an RPATH) is searched after LD_LIBRARY_PATH, so the same binary can still be
//! pointed at another libtorch 2.11, such as that of an installed PyTorch with CUDA.

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
