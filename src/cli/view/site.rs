//! The addresses of the page. All are below the key and are read with GET; nothing can be written.

use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::CONTENT_DISPOSITION;
use axum::http::{HeaderValue, Method};
use axum::response::Response;
use serde_json::{Value, json};
use url::form_urlencoded;

use super::asked::{Asked, Problem};
use super::runs::{Run, Runs, overview};
use super::{charts, graph, health, images, lists, prompt, questions, similar, sql};
use crate::rows::Format;
use crate::web::{self, Access};

/// The Content-Security-Policy of the page: it may load itself.
const POLICY: &str = "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'self'; \
    script-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// That of the drawing of the graph: nothing but its own style.
const DRAWING_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; sandbox";

/// The files of the page.
pub const FILES: [(&str, &str, &str); 12] = [
    (
        "",
        "text/html; charset=utf-8",
        include_str!("page/index.html"),
    ),
    (
        "app.css",
        "text/css; charset=utf-8",
        include_str!("page/app.css"),
    ),
    ("text.js", SCRIPT, include_str!("page/text.js")),
    ("parts.js", SCRIPT, include_str!("page/parts.js")),
    ("data.js", SCRIPT, include_str!("page/data.js")),
    ("charts.js", SCRIPT, include_str!("page/charts.js")),
    ("pairs.js", SCRIPT, include_str!("page/pairs.js")),
    ("prompt.js", SCRIPT, include_str!("page/prompt.js")),
    ("rounds.js", SCRIPT, include_str!("page/rounds.js")),
    ("graph.js", SCRIPT, include_str!("page/graph.js")),
    ("sql.js", SCRIPT, include_str!("page/sql.js")),
    ("app.js", SCRIPT, include_str!("page/app.js")),
];

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Returns the routes of the page.
pub fn site(runs: Arc<Runs>, access: Access) -> Router {
    let access = Arc::new(access);
    Router::new().fallback(move |request: Request| {
        let (runs, access) = (Arc::clone(&runs), Arc::clone(&access));
        async move {
            let is_drawing = request.uri().path().ends_with(".svg");
            let policy = if is_drawing { DRAWING_POLICY } else { POLICY };
            web::confined(respond(runs, &access, request).await, policy)
        }
    })
}

async fn respond(runs: Arc<Runs>, access: &Access, request: Request) -> Response {
    let path = request.uri().path().trim_start_matches('/');
    let (key, path) = match path.split_once('/') {
        Some((key, path)) => (key, path.to_owned()),
        None => (path, String::new()),
    };
    if let Some(why) = access.refusal(request.headers(), Some(key)) {
        return web::wrong(403, why);
    }
    if request.method() != Method::GET {
        return web::wrong(405, "this page is read-only: only GET is allowed");
    }
    if let Some((_, media, text)) = FILES.iter().find(|(name, ..)| *name == path) {
        return web::response(200, media, *text);
    }
    let query = request.uri().query().unwrap_or_default();
    let params = form_urlencoded::parse(query.as_bytes())
        .into_owned()
        .collect();
    // Set when the client leaves, because hyper drops this future then.
    let gone = Gone::default();
    let asked = Asked::new(params, runs.query_time, Arc::clone(&gone.0)).until(&runs.ends);
    let work = tokio::task::spawn_blocking(move || answer(&runs, &asked, &path));
    let response = match work.await {
        Ok(Ok(response)) => response,
        Ok(Err(problem)) => {
            let (status, words) = problem.words();
            web::wrong(status, words)
        }
        Err(_) => web::wrong(
            500,
            "the server failed at this request; its terminal shows the error",
        ),
    };
    drop(gone);
    response
}

/// Tells the work for a client that the client has left.
#[derive(Default)]
struct Gone(Arc<AtomicBool>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Answers a request, in a thread that may wait.
fn answer(runs: &Runs, asked: &Asked, path: &str) -> Result<Response, Problem> {
    if let Some(name) = path.strip_prefix("api/") {
        return match name {
            "sql.csv" => download(
                runs,
                asked,
                Format::Csv,
                "text/csv; charset=utf-8",
                "rows.csv",
            ),
            "sql.parquet" => download(
                runs,
                asked,
                Format::Parquet,
                "application/vnd.apache.parquet",
                "rows.parquet",
            ),
            name => Ok(web::json(&data(runs, asked, name)?)),
        };
    }
    if path == "graph.svg" {
        return Ok(web::response(
            200,
            "image/svg+xml",
            graph::svg(runs, asked)?,
        ));
    }
    if path == "bundle.js" {
        return Ok(web::response(200, SCRIPT, "// Set in a bundle.\n"));
    }
    let mut parts = path.split('/');
    if let (Some(kind @ ("image" | "thumb")), Some(run), Some(id), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    {
        let run = run.parse::<usize>().ok().and_then(|run| runs.list.get(run));
        let run =
            run.ok_or_else(|| Problem::Missing("there is no such run on this page".to_owned()))?;
        return match kind {
            "image" => images::original(run, id),
            _ => images::small(runs, run, id),
        };
    }
    Err(Problem::Missing(format!("there is no `{path}` here")))
}

/// Returns the data of a view of the page. Files that the run replaced while they were read are read
/// again, once.
pub fn data(runs: &Runs, asked: &Asked, name: &str) -> Result<Value, Problem> {
    let stamps = || -> Vec<String> { runs.list.iter().map(Run::stamp).collect() };
    let before = stamps();
    match data_now(runs, asked, name) {
        Err(Problem::Failed(_) | Problem::Refused(_)) if stamps() != before => {
            data_now(runs, asked, name)
        }
        found => found,
    }
}

fn data_now(runs: &Runs, asked: &Asked, name: &str) -> Result<Value, Problem> {
    match name {
        "runs" => Ok(overview(runs)),
        "stamps" => {
            let stamps = runs.list.iter().map(Run::stamp);
            Ok(json!({ "stamps": stamps.collect::<Vec<_>>() }))
        }
        "pairs" => lists::pairs(runs, asked),
        "prompt" => prompt::life(runs, asked),
        "similar" => similar::similar(runs, asked),
        "charts" => charts::list(runs, asked),
        "chart" => charts::rows(runs, asked),
        "health" => health::health(runs, asked),
        "graph" => graph::graph(runs, asked),
        "questions" => questions::questions(runs, asked),
        "sql" => sql::rows(runs, asked),
        _ => Err(Problem::Missing(format!("there is no `api/{name}`"))),
    }
}

/// Returns the rows of a query as a file.
fn download(
    runs: &Runs,
    asked: &Asked,
    format: Format,
    media: &'static str,
    name: &str,
) -> Result<Response, Problem> {
    let file = sql::download(runs, asked, format)?;
    let mut response = web::response(200, media, Body::from_stream(pieces(file)));
    let value = format!("attachment; filename=\"{name}\"");
    let value = HeaderValue::from_str(&value).expect("a plain name");
    response.headers_mut().insert(CONTENT_DISPOSITION, value);
    Ok(response)
}

/// Returns the pieces of a file.
fn pieces(file: File) -> impl futures::Stream<Item = std::io::Result<Bytes>> {
    futures::stream::unfold(Some(file), |file| async {
        let mut file = file?;
        let mut piece = vec![0; 1 << 18];
        match file.read(&mut piece) {
            Ok(0) => None,
            Ok(count) => {
                piece.truncate(count);
                Some((Ok(piece.into()), Some(file)))
            }
            Err(error) => Some((Err(error), None)),
        }
    })
}
