//! Row type of the call log: requests to models behind endpoints.

use super::row::rows;

rows! {
    /// A completed call of a model behind an endpoint, as recorded in the call log.
    pub struct Call: "call" => {
        /// Name of the judge in the pipeline.
        pub judge: String,
        /// SHA-256 of the request: model, text, images and sampling settings.
        pub hash: String,
        /// Subject of the call: the prompt ID, and the candidates if two are compared.
        pub about: String,
        /// Model name at the endpoint.
        pub model: String,
        /// Number of earlier attempts without a parseable reply.
        pub attempt: i32,
        /// Reply text.
        pub reply: String,
        /// Prompt tokens, as reported by the endpoint.
        pub prompt_tokens: i64,
        /// Reply tokens, as reported by the endpoint.
        pub reply_tokens: i64,
        /// Duration of the call, in milliseconds.
        pub milliseconds: i64,
        /// Time of the reply, in seconds since the Unix epoch.
        pub at: i64,
    }
}
