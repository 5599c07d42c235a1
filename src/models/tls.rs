//! TLS root certificates.

use rustls_native_certs::load_native_certs;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// The environment variable for a file of certificates that replaces all others.
const FILE: &str = "SSL_CERT_FILE";

/// Returns a TLS configuration with the root certificates of this machine, or of `SSL_CERT_FILE`
/// and `SSL_CERT_DIR`. If the machine has none, as in slim containers, the certificates built into
/// the program are used, and a note says so.
pub fn trusted() -> Result<(TlsConfig, Option<String>), String> {
    let found = load_native_certs();
    let reasons: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
    let reasons = reasons.join("; ");
    let mut note = None;
    let roots = if found.certs.is_empty() {
        if let Some(file) = std::env::var_os(FILE).filter(|file| !file.is_empty()) {
            return Err(format!(
                "cannot read certificates from `{}` (set by {FILE}): {reasons}",
                file.to_string_lossy()
            ));
        }
        note = Some(format!(
            "this machine has no root certificates; using those built into the program; \
             install ca-certificates, or set {FILE} to a certificate file"
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
