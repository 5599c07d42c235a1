//! The certificates by which a server is believed to be the one that it says.

use rustls_native_certs::load_native_certs;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// The variable that names a file of certificates, which are then the only ones.
const FILE: &str = "SSL_CERT_FILE";

/// The certificates of this machine, or of `SSL_CERT_FILE` and `SSL_CERT_DIR`. Where the machine has none, as
/// in slim containers, those that come with the program, and words that say so.
pub fn trusted() -> Result<(TlsConfig, Option<String>), String> {
    let found = load_native_certs();
    let reasons: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
    let reasons = reasons.join("; ");
    let mut note = None;
    let roots = if found.certs.is_empty() {
        if let Some(file) = std::env::var_os(FILE).filter(|file| !file.is_empty()) {
            return Err(format!(
                "no certificate can be read from `{}`, which {FILE} names: {reasons}",
                file.to_string_lossy()
            ));
        }
        note = Some(format!(
            "this machine has no certificates of its own, and those that come with the program are trusted; \
             install ca-certificates, or name a file of yours with {FILE}"
        ));
        RootCerts::WebPki
    } else {
        let certificates = found.certs.iter();
        let owned = certificates.map(|one| Certificate::from_der(one).to_owned());
        owned.collect::<Vec<_>>().into()
    };
    let config = TlsConfig::builder().root_certs(roots).build();
    Ok((config, note))
}
