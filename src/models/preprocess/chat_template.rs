//! Comparison of a checkpoint's chat template with the text that this program writes.
//!
//! A checkpoint is untrusted input. A template is rendered with few filters and no functions, in a
//! bounded number of steps, and only if it is short and has so few operators that join strings that
//! they could double a string about a dozen times at most; other templates are not compared.

use std::io;
use std::path::{Path, PathBuf};

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context, filters, tests as of};

use crate::architectures::{ChatText, chat_text};
use ovchat_io::files;

/// Maximum size of a template, in bytes; published ones have one or two thousand.
const SOURCE_MAX: usize = 16 << 10;
/// Maximum number of rendering steps; published templates take some hundred.
const STEPS_MAX: u64 = 5_000;
/// Maximum number of operators in a template that may join strings.
const JOINS_MAX: usize = 12;
/// Maximum size of the rendered text, in bytes.
const TEXT_MAX: usize = 16 << 10;
/// Maximum nesting depth of blocks.
const DEPTH_MAX: usize = 10;

/// Blocks that store text for later use.
const KEEPERS: [&str; 4] = ["endset", "endmacro", "endcall", "endfilter"];

/// The question in both texts.
const QUESTION: &str = "What is this?";

/// A chat template whose text differs from that of this program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherText {
    /// The file of the template.
    pub path: PathBuf,
    /// The text around the first difference: the template's, and this program's.
    pub theirs: String,
    pub ours: String,
    /// True if the two differ in white space only.
    pub is_space: bool,
}

/// Compares the texts of one question about one image. `None` if they are the same, if `folder` has
/// no template, or if it cannot be rendered here.
pub fn other_text(folder: &Path) -> Option<OtherText> {
    let (path, source) = template_in(folder)?;
    let ChatText { rendered, system } = chat_text(folder).ok()?;
    let theirs = filled(&source, system)?;
    let ours = rendered(QUESTION);
    let is_same = |(one, other): &(char, char)| one == other;
    let same = theirs.chars().zip(ours.chars()).take_while(is_same).count();
    if same == theirs.chars().count() && same == ours.chars().count() {
        return None;
    }
    let about = |text: &str| {
        let start = same.saturating_sub(16);
        text.chars().skip(start).take(32).collect::<String>()
    };
    let words = |text: &str| text.split_whitespace().collect::<String>();
    Some(OtherText {
        theirs: about(&theirs),
        ours: about(&ours),
        is_space: words(&theirs) == words(&ours),
        path,
    })
}

/// Returns the template that transformers' processor would use, or else that of its tokenizer.
fn template_in(folder: &Path) -> Option<(PathBuf, String)> {
    let jinja = folder.join("chat_template.jinja");
    if let Ok(source) = files::read_to_string(&jinja) {
        return Some((jinja, source));
    }
    ["chat_template.json", "tokenizer_config.json"]
        .iter()
        .find_map(|name| {
            let path = folder.join(name);
            let json: serde_json::Value = serde_json::from_slice(&files::read(&path).ok()?).ok()?;
            let source = match &json["chat_template"] {
                serde_json::Value::Array(templates) => templates
                    .iter()
                    .find(|template| template["name"] == "default")?["template"]
                    .as_str()?
                    .to_owned(),
                template => template.as_str()?.to_owned(),
            };
            Some((path, source))
        })
}

/// Renders a template for the question, if that is safe and succeeds.
fn filled(source: &str, system: Option<&str>) -> Option<String> {
    // transformers marks the model's text with a block that other programs do not support.
    let source = without_generation(source);
    let joins = source.matches(['+', '~', '*']).count();
    let keeps = KEEPERS.iter().any(|word| source.contains(word));
    if source.len() > SOURCE_MAX || joins > JOINS_MAX || keeps {
        return None;
    }
    let mut environment = environment();
    environment.add_template("chat", &source).ok()?;
    let template = environment.get_template("chat").ok()?;
    let parts = vec![
        context! { type => "image" },
        context! { type => "text", text => QUESTION },
    ];
    let fill = |system: Option<Value>, question: Value| {
        let system = system.map(|content| context! { role => "system", content => content });
        let question = context! { role => "user", content => question };
        let messages: Vec<Value> = system.into_iter().chain([question]).collect();
        let values = context! {
            messages, add_generation_prompt => true, bos_token => "", eos_token => "<|im_end|>",
        };
        let mut text = Bounded(Vec::new());
        template.render_captured_to(values, &mut text).ok()?;
        String::from_utf8(text.0).ok()
    };
    // Templates of processors take messages in parts, those of tokenizers take strings.
    let system_parts =
        system.map(|text| Value::from(vec![context! { type => "text", text => text }]));
    let of_parts = fill(system_parts, Value::from(parts));
    let is_of_parts = |text: &String| text.contains(QUESTION) && !text.contains('{');
    of_parts.filter(is_of_parts).or_else(|| {
        let question = format!("<image>\n{QUESTION}");
        fill(system.map(Value::from), Value::from(question))
    })
}

fn without_generation(source: &str) -> String {
    let mut rest = source;
    let mut kept = String::new();
    while let Some(start) = rest.find("{%") {
        let (before, block) = rest.split_at(start);
        kept.push_str(before);
        let end = block.find("%}").map_or(block.len(), |end| end + 2);
        let (block, behind) = block.split_at(end);
        let word = block.trim_matches(|c: char| c.is_whitespace() || "{%}-".contains(c));
        if !matches!(word, "generation" | "endgeneration") {
            kept.push_str(block);
        }
        rest = behind;
    }
    kept + rest
}

/// Returns an environment with the features that published templates use, and none that can make a
/// text grow.
fn environment() -> Environment<'static> {
    let mut environment = Environment::empty();
    // As set by transformers.
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(STEPS_MAX));
    environment.set_recursion_limit(DEPTH_MAX);
    environment.add_filter("trim", filters::trim);
    environment.add_filter("length", filters::length);
    environment.add_filter("first", filters::first);
    environment.add_filter("last", filters::last);
    environment.add_filter("list", filters::list);
    environment.add_filter("default", filters::default);
    environment.add_filter("selectattr", filters::selectattr);
    environment.add_filter("rejectattr", filters::rejectattr);
    environment.add_test("defined", of::is_defined);
    environment.add_test("undefined", of::is_undefined);
    environment.add_test("none", of::is_none);
    environment.add_test("string", of::is_string);
    environment.add_test("mapping", of::is_mapping);
    environment.add_test("iterable", of::is_iterable);
    environment.add_test("sequence", of::is_sequence);
    environment.add_test("equalto", of::is_eq);
    environment.add_test("eq", of::is_eq);
    environment.add_test("==", of::is_eq);
    environment.add_test("in", of::is_in);
    environment.add_function("raise_exception", |why: String| {
        Err::<Value, _>(minijinja::Error::new(ErrorKind::InvalidOperation, why))
    });
    environment
}

/// The rendered text, limited in size.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::preprocess::Processor;
    use crate::test_util::{
        llava_folder, onevision_config, onevision_folder, prompt, shown, write,
    };

    /// The template of Qwen2's tokenizer.
    const QWEN: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
        {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    /// The template of the llava-hf checkpoints of LLaVA-OneVision.
    const LLAVA_HF: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}\
        {# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
        {{ '<image>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}\
        {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}\
        {% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
        {% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn the_compared_text_is_what_is_tokenized() {
        for folder in [onevision_folder(), llava_folder()] {
            let path = folder.path();
            let processor = Processor::open(path).unwrap();
            let chat = processor.chat();
            let found = chat.prompt(&prompt(Vec::new(), QUESTION), &[1]).unwrap();
            let text = shown(path, &found.ids, chat.image_token());
            let rendered = (chat_text(path).unwrap().rendered)(QUESTION);
            let text = text.replace("<s>▁", "").replace('▁', " ");
            assert_eq!(text.replace("[1]", "<image>"), rendered);
        }
    }

    #[test]
    fn templates_are_taken_from_where_transformers_takes_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        write(path, "config.json", &onevision_config());
        assert_eq!(other_text(path), None);
        write(
            path,
            "tokenizer_config.json",
            &json!({ "chat_template": QWEN }),
        );
        assert_eq!(other_text(path), None);
        let named = json!([{ "name": "default", "template": "{{ messages[1].content }}" }]);
        write(
            path,
            "tokenizer_config.json",
            &json!({ "chat_template": named }),
        );
        let found = other_text(path).unwrap();
        assert_eq!(found.theirs, "<image>\nWhat is this?");
        assert_eq!(found.ours, "<|im_start|>system\nYou are a hel");
        assert!(!found.is_space && found.path.ends_with("tokenizer_config.json"));
        write(
            path,
            "chat_template.json",
            &json!({ "chat_template": LLAVA_HF }),
        );
        let found = other_text(path).unwrap();
        assert!(found.is_space, "{found:?}");
        assert_eq!(found.theirs, "im_start|>system \nYou are a help");
        fs::copy(
            concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../data-samples/policy/chat_template.jinja"
            ),
            path.join("chat_template.jinja"),
        )
        .unwrap();
        assert_eq!(other_text(path), None);
    }

    #[test]
    fn what_cannot_be_filled_or_would_grow_is_not_compared() {
        for source in [
            "{{ messages | tojson }}",
            "{{ raise_exception('never') }}",
            "{% for a in messages %",
            "{{ 'x' * 1000000000 }}{{ 'x' * 1000000000 }}",
            "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
            "{% set ns = namespace(s='x') %}{% for a in messages %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "{% set x %}{% for a in messages %}xxxx{% endfor %}{% endset %}{{ x }}",
            "{% macro f(s) %}{{ f(s ~ s) }}{% endmacro %}{{ f('x') }}",
            &format!("{}{{{{ s }}}}", "{% set s = s ~ s %}".repeat(40)),
            &"x".repeat(SOURCE_MAX + 1),
        ] {
            assert_eq!(filled(source, None), None, "{source:.60}");
        }
        let steps = "{% for a in messages %}".repeat(9) + "x" + &"{% endfor %}".repeat(9);
        assert!(filled(&steps, None).is_none_or(|text| text.len() <= TEXT_MAX));
    }
}
