//! The HTTP server of the pages that this program serves: localhost only, with limits on each
//! connection.
//!
//! A connection carries one request. It has [`HEAD_TIME`] to send its header, [`BODY_TIME`] to send
//! its body, and a total time that the site chooses; the body is only read for accepted requests. As
//! many connections are served at once as the process may have open files; further ones get a 503.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::header::{CONTENT_TYPE, HeaderName};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::Response;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::failed::Failed;

/// The time limit for the header of a request.
const HEAD_TIME: Duration = Duration::from_secs(5);

/// The time limit for the body of a request.
const BODY_TIME: Duration = Duration::from_secs(5);

/// The largest body, in bytes.
const BODY_MAX: usize = 64 << 10;

/// The largest header, and the most that is read ahead, in bytes.
const HEAD_MAX: usize = 32 << 10;

/// The maximum number of header fields.
const FIELDS_MAX: usize = 64;

/// The number of file descriptors kept back: for the run, and for connections that get a 503.
const FILES_KEPT: u64 = 64;

/// The maximum number of connections that are served at once, regardless of the file limit.
const CONNECTIONS_MAX: u64 = 16_384;

/// The interval between checks for a stop request.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The pause after a connection could not be accepted for lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(20);

/// The response beyond [`CONNECTIONS_MAX`].
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\n\
    Content-Type: application/json\r\nContent-Length: 51\r\n\r\n\
    {\"error\":\"too many connections; try again in 5 s\"}\n";

/// The clients that may read a page: those on this machine that know its key.
pub struct Access {
    /// A random text, part of the address of the page.
    pub key: String,
    /// The names under which the page is served.
    hosts: Vec<String>,
}

impl Access {
    /// Creates the access to a page on a port, with a new key.
    pub fn new(port: u16) -> Result<Self, Failed> {
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut bytes))
            .map_err(|error| Failed::Words(format!("cannot read random bytes: {error}")))?;
        Ok(Self {
            key: format!("{:032x}", u128::from_le_bytes(bytes)),
            hosts: ["127.0.0.1", "localhost"]
                .into_iter()
                // Clients leave the usual port out.
                .flat_map(|host| match port {
                    80 => vec![format!("{host}:{port}"), host.to_owned()],
                    _ => vec![format!("{host}:{port}")],
                })
                .collect(),
        })
    }

    /// Returns the reason to refuse a request with these headers and this key.
    pub fn refusal(&self, headers: &HeaderMap, key: Option<&str>) -> Option<&'static str> {
        let mut hosts = headers.get_all("host").iter();
        let host = hosts.next().filter(|_| hosts.next().is_none());
        let host = host.and_then(|host| host.to_str().ok()).unwrap_or_default();
        if !self.hosts.iter().any(|own| own.eq_ignore_ascii_case(host)) {
            return Some("this page is only served on localhost");
        }
        let origin = headers.get("origin").map(HeaderValue::as_bytes);
        let origins = self.hosts.iter().map(|host| format!("http://{host}"));
        if origin.is_some_and(|origin| !origins.into_iter().any(|own| own.as_bytes() == origin)) {
            return Some("requests from other sites are rejected");
        }
        if key != Some(self.key.as_str()) {
            return Some("the key is missing or wrong; open the address that `pipeline` printed");
        }
        None
    }
}

/// Returns a response with a body.
pub fn response(status: u16, media: &'static str, content: impl Into<Body>) -> Response {
    let mut response = Response::new(content.into());
    *response.status_mut() = StatusCode::from_u16(status).expect("a valid status");
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// Returns a response with a JSON value.
pub fn json(value: &Value) -> Response {
    response(200, "application/json", value.to_string())
}

/// Returns an error as a response.
pub fn wrong(status: u16, why: &str) -> Response {
    let content = json!({ "error": why }).to_string();
    response(status, "application/json", content)
}

/// Adds the headers with which browsers confine a page: `policy` is its Content-Security-Policy.
pub fn confined(mut response: Response, policy: &'static str) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        ("content-security-policy", policy),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
        ("x-content-type-options", "nosniff"),
    ] {
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    // Images are named by their contents, and may be kept.
    headers
        .entry("cache-control")
        .or_insert(HeaderValue::from_static("no-store"));
    response
}

/// A listening server.
pub struct Server {
    runtime: Runtime,
    listener: TcpListener,
    address: SocketAddr,
    most: usize,
}

impl Server {
    /// Listens on a port of localhost; 0 picks a free port.
    pub fn listen(port: u16) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = runtime.block_on(TcpListener::bind(address))?;
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            most: connections(),
            runtime,
        })
    }

    /// Returns the address on which the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves a site until `stopping` returns true; it is polled continuously. A connection ends after
    /// the time `whole`, including its response.
    pub fn serve(self, site: &Router, whole: Duration, stopping: &dyn Fn() -> bool) {
        // The reference count is the number of open connections.
        let open = Arc::new(());
        self.runtime.block_on(async {
            while !stopping() {
                match timeout(LOOK_EVERY, self.listener.accept()).await {
                    Err(_) => {}
                    // Errors of a single connection, or for lack of file descriptors, are
                    // temporary.
                    Ok(Err(_)) => tokio::time::sleep(PAUSE).await,
                    Ok(Ok((stream, _))) if Arc::strong_count(&open) > self.most => busy(stream),
                    Ok(Ok((stream, _))) => {
                        let (site, open) = (site.clone(), Arc::clone(&open));
                        tokio::spawn(async move {
                            // A client that has left or is too slow gets no response.
                            drop(timeout(whole, connection(stream, site)).await);
                            drop(open);
                        });
                    }
                }
            }
        });
        // Work for clients is not waited for.
        self.runtime.shutdown_background();
    }
}

/// Returns the maximum number of open connections, after raising the process's file limit as far as
/// allowed.
fn connections() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = CONNECTIONS_MAX + FILES_KEPT;
    let most = limit.maximum.unwrap_or(wanted).min(wanted);
    let mut current = limit.current.unwrap_or(wanted);
    if current < most {
        let raised = Rlimit {
            current: Some(most),
            maximum: limit.maximum,
        };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            current = most;
        }
    }
    let left = current.saturating_sub(FILES_KEPT);
    left.clamp(1, CONNECTIONS_MAX) as usize
}

/// Responds that there are too many connections, without waiting.
fn busy(stream: TcpStream) {
    let Ok(mut stream) = stream.into_std() else {
        return;
    };
    // A new connection always has room for these few bytes.
    drop(stream.write(BUSY));
    // Unread request data would reset the connection.
    drop(stream.shutdown(Shutdown::Write));
    drop(stream.read(&mut [0; HEAD_MAX]));
}

async fn connection(stream: TcpStream, site: Router) {
    let served = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(site));
    // Errors of the connection concern the client.
    drop(served.await);
}

/// Reads the body of a request; on failure returns a status and a message.
pub async fn read(method: &Method, body: Body) -> Result<Bytes, (u16, String)> {
    let too_large = || (413, format!("the request body exceeds {BODY_MAX} bytes"));
    if method != Method::POST {
        return Ok(Bytes::new());
    }
    if HttpBody::size_hint(&body).lower() > BODY_MAX as u64 {
        return Err(too_large());
    }
    match timeout(BODY_TIME, Limited::new(body, BODY_MAX).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err((400, error.to_string())),
        Err(_) => {
            let why = format!(
                "the request was not received within {} s",
                BODY_TIME.as_secs()
            );
            Err((408, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::BUSY;

    #[test]
    fn the_answer_of_a_busy_server_has_the_length_that_it_says() {
        let text = std::str::from_utf8(BUSY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{}",
            body.len()
        );
    }
}
