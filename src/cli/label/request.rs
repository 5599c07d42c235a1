//! The requests of the labeling page.

use serde::Deserialize;

use ovchat_data::store::LabelVerdict;

/// A valid request.
pub enum Request<'a> {
    /// The page itself.
    Page,
    /// The next question for an annotator.
    Next(String),
    /// A label for a question.
    Say(Saying),
    /// Undo of a label, or of an annotator's last one.
    Undo { by: String, label: Option<u64> },
    /// The image with an id.
    Image(&'a str),
}

/// A label for a question, as the page sends it.
#[derive(Deserialize)]
pub struct Saying {
    pub by: String,
    pub question: usize,
    pub said: LabelVerdict,
    pub milliseconds: u64,
}

#[derive(Deserialize)]
struct Undoing {
    by: String,
    label: Option<u64>,
}

/// Parses a request. Fails with a status and a message if it is not one of the page's.
pub fn read<'a>(
    method: &str,
    path: &'a str,
    query: &str,
    body: &[u8],
) -> Result<Request<'a>, (u16, String)> {
    let malformed = |error: serde_json::Error| (400, error.to_string());
    match (method, path) {
        ("GET", "/") => Ok(Request::Page),
        ("GET", "/api/next") => {
            let by = parameter(query, "by").unwrap_or("anonymous");
            Ok(Request::Next(decoded(by)))
        }
        ("POST", "/api/say") => match serde_json::from_slice(body).map_err(malformed)? {
            Saying {
                said: LabelVerdict::Undone,
                ..
            } => Err((400, "`undone` is not a valid label".to_owned())),
            saying => Ok(Request::Say(saying)),
        },
        ("POST", "/api/undo") => {
            let Undoing { by, label } = serde_json::from_slice(body).map_err(malformed)?;
            Ok(Request::Undo { by, label })
        }
        ("GET", path) => match path.strip_prefix("/picture/") {
            Some(id) => Ok(Request::Image(id)),
            None => Err((404, "not found".to_owned())),
        },
        _ => Err((405, "method not allowed".to_owned())),
    }
}

/// Returns a parameter of a query string, still encoded.
pub fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let mut parts = query.split('&').filter_map(|part| part.split_once('='));
    parts.find_map(|(other, value)| (other == name).then_some(value))
}

/// Decodes a percent-encoded parameter: `%20` is a space.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        // `from_str_radix` would also accept a sign.
        let hex = behind
            .get(..2)
            .filter(|two| two.iter().all(u8::is_ascii_hexdigit));
        let hex = hex.and_then(|two| std::str::from_utf8(two).ok());
        let code = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (byte, code) {
            (b'%', Some(code)) => {
                bytes.push(code);
                rest = &behind[2..];
            }
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_out_of_addresses_as_they_went_in() {
        assert_eq!(decoded("Ann%20B%C3%BCrki%25"), "Ann Bürki%");
        assert_eq!(decoded("50%"), "50%");
        assert_eq!(decoded("%+5"), "%+5");
    }

    #[test]
    fn what_is_no_request_of_the_page_is_refused_with_a_status() {
        let status = |method, path, body: &[u8]| match read(method, path, "", body) {
            Ok(_) => 200,
            Err((status, _)) => status,
        };
        let saying = |said| {
            format!(r#"{{"by": "ann", "question": 0, "said": "{said}", "milliseconds": 9}}"#)
        };
        assert_eq!(status("POST", "/api/say", saying("left").as_bytes()), 200);
        assert_eq!(status("POST", "/api/say", saying("undone").as_bytes()), 400);
        assert_eq!(status("POST", "/api/undo", b"{}"), 400);
        assert_eq!(status("GET", "/api/other", b""), 404);
        assert_eq!(status("PUT", "/", b""), 405);
    }
}
