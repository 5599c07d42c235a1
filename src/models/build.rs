//! Build script that records the folder and version of the libtorch that the programs are built
//! against.

use std::fs;
use std::path::Path;

/// Files of a libtorch that contain its version, each with the text before and after it.
const VERSION_FILES: [(&str, &str, &str); 3] = [
    ("build-version", "", "\n"),
    ("version.py", "__version__ = '", "'"),
    (
        "include/torch/headeronly/version.h",
        "#define TORCH_VERSION \\\n  \"",
        "\"",
    ),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Some(libtorch) = std::env::var_os("LIBTORCH") {
        let libtorch = Path::new(&libtorch);
        let lib = libtorch.join("lib");
        // `pipeline` also searches this folder before it starts the engine.
        println!("cargo:rustc-env=OVCHAT_LIBTORCH={}", lib.display());
        if let Some(version) = version(libtorch) {
            println!("cargo:rustc-env=OVCHAT_LIBTORCH_VERSION={version}");
        }
    }
}

/// Returns the version of the libtorch in a folder.
fn version(libtorch: &Path) -> Option<String> {
    VERSION_FILES.iter().find_map(|(name, before, behind)| {
        let path = libtorch.join(name);
        let text = fs::read_to_string(&path).ok()?;
        println!("cargo:rerun-if-changed={}", path.display());
        let (_, rest) = text.split_once(before)?;
        let version = rest.split(behind).next()?.trim();
        (!version.is_empty()).then(|| version.to_owned())
    })
}
