//! The HTTP server of the labeling page: localhost only, with limits on each connection.
//!
//! A connection carries one request. It has [`HEAD_TIME`] to send its header, [`BODY_TIME`] to send
//! its body, and [`WHOLE_TIME`] in total; the body is only read for accepted requests. As many
//! connections are served at once as the process may have open files; further ones get a 503.

use std::convert::Infallible;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::LocalSet;
use tokio::time::timeout;

/// The time limit for the header of a request.
const HEAD_TIME: Duration = Duration::from_secs(5);

/// The time limit for the body of a request.
const BODY_TIME: Duration = Duration::from_secs(5);

/// The time limit for a connection, including its response.
const WHOLE_TIME: Duration = Duration::from_secs(30);

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

/// A request without its body.
pub struct Asked<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub query: &'a str,
    pub headers: &'a HeaderMap,
}

impl Asked<'_> {
    /// Returns the value of a header field.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A response: status, media type, content.
pub struct HttpResponse {
    pub status: u16,
    pub media: &'static str,
    pub content: Vec<u8>,
}

/// A site that answers requests.
pub trait Site {
    /// Returns the response to a rejected client; called before the body is read.
    fn refusal(&self, asked: &Asked<'_>) -> Option<HttpResponse>;

    /// Returns the response to a request.
    fn answer(&self, asked: &Asked<'_>, body: &[u8]) -> HttpResponse;

    /// Returns the response to a malformed request.
    fn wrong(&self, status: u16, why: &str) -> HttpResponse;
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

    /// Serves until `stopping` returns true; it is polled continuously.
    pub fn serve(self, site: impl Site + 'static, stopping: &dyn Fn() -> bool) {
        let site = Rc::new(site);
        // The reference count is the number of open connections.
        let open = Rc::new(());
        let tasks = LocalSet::new();
        tasks.block_on(&self.runtime, async {
            while !stopping() {
                match timeout(LOOK_EVERY, self.listener.accept()).await {
                    Err(_) => {}
                    // Errors of a single connection, or for lack of file descriptors, are
                    // temporary.
                    Ok(Err(_)) => tokio::time::sleep(PAUSE).await,
                    Ok(Ok((stream, _))) if Rc::strong_count(&open) > self.most => busy(stream),
                    Ok(Ok((stream, _))) => {
                        let (site, open) = (Rc::clone(&site), Rc::clone(&open));
                        tasks.spawn_local(async move {
                            // A client that has left or is too slow gets no response.
                            drop(timeout(WHOLE_TIME, connection(stream, site)).await);
                            drop(open);
                        });
                    }
                }
            }
        });
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

async fn connection(stream: TcpStream, site: Rc<impl Site + 'static>) {
    let service = service_fn(|request| {
        let site = Rc::clone(&site);
        async move { Ok::<_, Infallible>(response(request, &*site).await) }
    });
    let served = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    // Anything but HTTP was answered with a 400.
    drop(served);
}

async fn response(request: Request<Incoming>, site: &impl Site) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let asked = Asked {
        method: parts.method.as_str(),
        path: parts.uri.path(),
        query: parts.uri.query().unwrap_or_default(),
        headers: &parts.headers,
    };
    let answer = match site.refusal(&asked) {
        Some(refusal) => refusal,
        None => match read(&parts.method, body).await {
            Ok(body) => site.answer(&asked, &body),
            Err((status, why)) => site.wrong(status, &why),
        },
    };
    let policy = "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; \
                  script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    let mut response = Response::new(Full::new(Bytes::from(answer.content)));
    *response.status_mut() = StatusCode::from_u16(answer.status).expect("a valid status");
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(answer.media));
    for (name, value) in [
        ("content-security-policy", policy),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
        ("cross-origin-resource-policy", "same-origin"),
        ("x-content-type-options", "nosniff"),
    ] {
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    response
}

/// Reads the body of a request; on failure returns a status and a message.
async fn read(method: &Method, body: Incoming) -> Result<Bytes, (u16, String)> {
    let too_large = || (413, format!("the request body exceeds {BODY_MAX} bytes"));
    if method != Method::POST {
        return Ok(Bytes::new());
    }
    if body.size_hint().lower() > BODY_MAX as u64 {
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
