//! Calls: what models behind endpoints were asked.

use super::row::rows;

rows! {
    /// A call of a model behind an endpoint that was replied to, as its journal has it.
    pub struct Call: "call" => {
        /// The judge, by its name in the pipeline.
        pub judge: String,
        /// SHA-256 of what was asked: model, text, pictures, how the reply is drawn.
        pub hash: String,
        /// What it was about: the prompt, and the answers beside each other.
        pub about: String,
        /// The name by which the endpoint knows the model.
        pub model: String,
        /// How often it was asked before without a readable reply.
        pub attempt: i32,
        /// What it replied.
        pub reply: String,
        /// Tokens that were read, by what the endpoint says.
        pub prompt_tokens: i64,
        /// Tokens that were written.
        pub reply_tokens: i64,
        /// How long the call took.
        pub milliseconds: i64,
        /// When it was replied to, in seconds since 1970.
        pub at: i64,
    }
}
