//! A judge for the small world's benchmarks: an OpenAI-compatible endpoint without a model, which knows
//! the truth, because the judge prompts of `data-samples/benchmarks` state it.
//!
//! It replies in the form that a prompt asks for, from the share of words that an answer has in common
//! with the truth. One reply in fifty has no verdict, as with real judges.
//!
//!   cargo run --release --example benchmark_judge -- 127.0.0.1:8077

use std::collections::HashSet;
use std::io::Read as _;
use std::process::ExitCode;

use serde_json::{Value, json};
use tiny_http::{Response, Server};

fn main() -> ExitCode {
    let address = std::env::args().nth(1);
    let address = address.unwrap_or_else(|| "127.0.0.1:8077".to_owned());
    let server = match Server::http(&address) {
        Ok(server) => server,
        Err(error) => {
            eprintln!("benchmark_judge: {address}: {error}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!(
        "benchmark_judge: listening on http://{}/v1",
        server.server_addr()
    );
    serve(&server);
    ExitCode::SUCCESS
}

/// Answers requests until the server is stopped.
pub fn serve(server: &Server) {
    for mut request in server.incoming_requests() {
        let mut body = String::new();
        let read = request.as_reader().take(64 << 20).read_to_string(&mut body);
        let asked = read
            .ok()
            .and_then(|_| serde_json::from_str::<Value>(&body).ok());
        let reply = asked.and_then(|asked| Some(reply(&question(&asked)?)));
        let answer = match reply {
            Some(reply) => Response::from_string(
                json!({
                    "choices": [{ "message": { "role": "assistant", "content": reply } }],
                    "usage": { "prompt_tokens": body.len() / 4, "completion_tokens": reply.len() / 4 },
                })
                .to_string(),
            ),
            None => Response::from_string("not a judge prompt of the small world").with_status_code(400),
        };
        // A client that has gone needs no answer.
        drop(request.respond(answer));
    }
}

/// Returns the text of the last message.
fn question(request: &Value) -> Option<String> {
    let message = request["messages"].as_array()?.last()?;
    let parts = message["content"].as_array()?;
    Some(
        parts
            .iter()
            .filter_map(|part| part["text"].as_str())
            .collect(),
    )
}

/// Returns the rest of the line that begins with `name`.
fn line<'t>(text: &'t str, name: &str) -> &'t str {
    let mut lines = text.lines();
    lines
        .find_map(|line| line.strip_prefix(name))
        .unwrap_or_default()
        .trim()
}

/// Returns how true an answer is: 1 for the truth, otherwise up to a half, by the share of its words.
fn truth_of(answer: &str, truth: &str) -> f64 {
    if answer == truth {
        return 1.0;
    }
    let words = |text: &str| -> HashSet<String> {
        text.split_whitespace().map(str::to_lowercase).collect()
    };
    let (answer, truth) = (words(answer), words(truth));
    0.5 * answer.intersection(&truth).count() as f64 / truth.len().max(answer.len()).max(1) as f64
}

/// Returns the reply to a judge prompt.
fn reply(text: &str) -> String {
    let hash = text.bytes().fold(17_u32, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(byte.into())
    });
    if hash % 50 == 0 {
        return "I cannot tell.".to_owned();
    }
    let truth = line(text, "Truth:");
    let of = |name: &str| truth_of(line(text, name), truth);
    let points = |share: f64, most: f64| (share * most).round();
    if text.contains("[[A>>B]]") {
        let grade = match of("Answer B:") - of("Answer A:") {
            gain if gain > 0.6 => "B>>A",
            gain if gain > 0.0 => "B>A",
            gain if gain < -0.6 => "A>>B",
            gain if gain < 0.0 => "A>B",
            _ => "A=B",
        };
        format!("My final verdict is: [[{grade}]]")
    } else if text.contains("two numbers") {
        let [one, other] = ["Answer A:", "Answer B:"].map(|name| 1.0 + points(of(name), 9.0));
        format!("{one} {other}\nby the words that they share with the truth")
    } else if text.contains("JSON object") {
        json!({ "Explanation": "by its words", "Rating": points(of("Answer:"), 10.0) as i64 })
            .to_string()
    } else {
        format!("{{'score': {}}}", points(of("Answer:"), 5.0))
    }
}
