//! A headless Chromium for tests: pages, real keys and clicks, screenshots, requests, script errors.
//!
//! It is driven over `--remote-debugging-pipe`: it reads commands from descriptor 3 and writes answers to 4.
//! It reaches nothing but this machine: what a page loads from elsewhere fails, and is among its requests.

use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::devtools::{ANSWER, Link, Seen, Weight, exception};

/// The longest wait for what a page does by itself.
const PATIENCE: Duration = Duration::from_secs(15);

const FLAGS: [&str; 15] = [
    "--headless",
    "--remote-debugging-pipe",
    // The sandbox needs rights that root and most containers lack; the pages are our own.
    "--no-sandbox",
    "--disable-gpu",
    // Containers have a small /dev/shm, or none; TMPDIR is used instead.
    "--disable-dev-shm-usage",
    // Frames stay in the process of their page, so that their requests are seen.
    "--disable-site-isolation-trials",
    // Nothing leaves this machine, neither from pages nor from the browser itself.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    "--no-proxy-server",
    "--disable-background-networking",
    // A page behind another one works on at full speed.
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    // Pages look the same on every machine.
    "--lang=en-US",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
];

/// A running browser. When dropped, it is killed with all its processes, and its files are deleted.
pub struct Chromium {
    process: Child,
    link: Arc<Link>,
    home: TempDir,
}

/// A tab, closed when dropped. If something is not as a test expects, methods panic with the page's address
/// and errors.
pub struct Page {
    link: Arc<Link>,
    session: String,
    target: String,
}

impl Chromium {
    /// Returns the program: `OVCHAT_CHROMIUM`, or the first known name in `PATH`.
    pub fn find() -> Option<PathBuf> {
        if let Some(named) = env::var_os("OVCHAT_CHROMIUM") {
            return Some(named.into());
        }
        let folders: Vec<_> = env::split_paths(&env::var_os("PATH")?).collect();
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let mut paths = names
            .iter()
            .flat_map(|name| folders.iter().map(move |at| at.join(name)));
        paths.find(|path| path.is_file())
    }

    #[track_caller]
    pub fn start() -> Self {
        let program = Self::find().expect("no Chromium in PATH: install it or set OVCHAT_CHROMIUM");
        let home = TempDir::with_prefix("chromium-").expect("a temporary folder");
        let log = home.path().join("log");
        let profile = format!("--user-data-dir={}/profile", home.path().display());
        let moved = r#"exec "$@" 3<&0 4>&1 </dev/null >"$HOME/log" 2>&1"#;
        let mut process = Command::new("/bin/sh")
            .args(["-c", moved, "sh"])
            .arg(&program)
            .args(FLAGS)
            .arg(profile)
            .env("HOME", home.path())
            .env("TMPDIR", home.path())
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("XDG_CACHE_HOME")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("/bin/sh starts");
        let commands = process.stdin.take().expect("it is piped");
        let messages = process.stdout.take().expect("it is piped");
        let link = Link::new(commands, messages, log);
        let browser = Self {
            process,
            link,
            home,
        };
        if let Err(problem) = browser.link.send("", "Browser.getVersion", json!({})) {
            panic!("{} does not start: {problem}", program.display());
        }
        browser
    }

    /// Opens a tab and loads an address.
    #[track_caller]
    pub fn page(&self, url: &str) -> Page {
        let ask = |method, params, name| match self.link.send("", method, params) {
            Ok(answer) => answer[name].as_str().unwrap_or_default().to_owned(),
            Err(problem) => panic!("cannot open {url}: {problem}"),
        };
        let blank = json!({ "url": "about:blank", "newWindow": true });
        let target = ask("Target.createTarget", blank, "targetId");
        let attach = json!({ "targetId": target, "flatten": true });
        let session = ask("Target.attachToTarget", attach, "sessionId");
        let seen = Seen::of(&target);
        self.link.state().pages.insert(session.clone(), seen);
        let page = Page {
            link: Arc::clone(&self.link),
            session,
            target,
        };
        for domain in ["Page", "Runtime", "Log", "Network", "Inspector"] {
            page.command(&format!("{domain}.enable"), json!({}));
        }
        let enabled = json!({ "enabled": true });
        page.command("Page.setLifecycleEventsEnabled", enabled.clone());
        // Every page has the focus, not only the last one.
        page.command("Emulation.setFocusEmulationEnabled", enabled);
        page.navigate(url);
        page
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = kill_process_group(Pid::from_child(&self.process), Signal::KILL);
        drop(self.process.wait());
        // Its other processes may write for a moment longer.
        for _ in 0..100 {
            if fs::remove_dir_all(self.home.path()).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Page {
    /// Evaluates JavaScript, awaits its promise, and returns its value as JSON.
    #[track_caller]
    pub fn eval(&self, js: &str) -> Value {
        match self.evaluate(js) {
            Ok(value) => value,
            Err(problem) => self.fail(&format!("{problem}\n  in: {}", start_of(js))),
        }
    }

    /// Waits until a JavaScript expression, or its promise, is truthy.
    #[track_caller]
    pub fn until(&self, js: &str) {
        self.until_within(js, PATIENCE);
    }

    #[track_caller]
    pub fn until_within(&self, js: &str, limit: Duration) {
        let truth = format!("(async () => {{ if (!(await ({js}))) throw 'it is false'; }})()");
        if let Err(problem) = self.persist(&truth, limit) {
            let text = self.evaluate("document.body.innerText").unwrap_or_default();
            let text = start_of(text.as_str().unwrap_or_default());
            self.fail(&format!(
                "not within {limit:?}: {js}\n  {problem}\n  text: {text}"
            ));
        }
    }

    /// Presses a key by its DOM name, such as `a`, `?`, `Enter`, `ArrowDown` or `Shift+Tab`.
    #[track_caller]
    pub fn press(&self, key: &str) {
        let (held, name) = key.rsplit_once('+').unwrap_or(("", key));
        let Some((code, number)) = key_code(name) else {
            self.fail(&format!("no such key: {key}"));
        };
        let alt = u8::from(held.contains("Alt"));
        let control = u8::from(held.contains("Control"));
        let shifted = matches!(name.as_bytes(), [b'A'..=b'Z' | b'?']);
        let shift = u8::from(held.contains("Shift") || shifted);
        let text = match name.as_bytes() {
            b"Enter" => "\r",
            [_] if alt + control == 0 => name,
            _ => "",
        };
        let mut event = json!({
            "type": "keyDown", "key": name, "code": code, "text": text,
            "windowsVirtualKeyCode": number, "modifiers": alt + 2 * control + 8 * shift,
        });
        self.command("Input.dispatchKeyEvent", event.clone());
        event["type"] = "keyUp".into();
        event["text"] = "".into();
        self.command("Input.dispatchKeyEvent", event);
    }

    /// Enters a text into the focused field at once, as an input method does.
    #[track_caller]
    pub fn type_text(&self, text: &str) {
        self.command("Input.insertText", json!({ "text": text }));
    }

    /// Clicks at the center of an element, once it exists and nothing covers it.
    #[track_caller]
    pub fn click(&self, selector: &str) {
        let mut event = self.element(
            selector,
            "element.scrollIntoView({ block: 'center', inline: 'center', behavior: 'instant' });
            const box = element.getBoundingClientRect();
            const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            const top = document.elementFromPoint(x, y);
            if (!element.contains(top)) throw 'covered by ' + (top?.cloneNode().outerHTML ?? 'nothing');
            return { type: 'mouseMoved', x, y };",
        );
        self.command("Input.dispatchMouseEvent", event.clone());
        event["button"] = "left".into();
        event["clickCount"] = 1.into();
        for kind in ["mousePressed", "mouseReleased"] {
            event["type"] = kind.into();
            self.command("Input.dispatchMouseEvent", event.clone());
        }
    }

    /// Selects the option with a value in a `<select>`, once it exists.
    #[track_caller]
    pub fn select(&self, selector: &str, value: &str) {
        let set = "
            const options = [...element.options].map(option => option.value);
            if (!options.includes(value)) throw `its options are ${options}`;
            element.value = value;
            for (const name of ['input', 'change'])
                element.dispatchEvent(new Event(name, { bubbles: true }));";
        self.element(selector, &format!("const value = {}; {set}", json!(value)));
    }

    /// Sets the size of the viewport, in CSS pixels.
    #[track_caller]
    pub fn size(&self, width: u32, height: u32) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.command("Emulation.setDeviceMetricsOverride", size);
    }

    /// Prefers dark colors, or light ones.
    #[track_caller]
    pub fn dark(&self, dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.command("Emulation.setEmulatedMedia", media);
    }

    /// Writes the viewport as a PNG file.
    #[track_caller]
    pub fn screenshot(&self, path: impl AsRef<Path>) {
        self.capture(path.as_ref(), json!({}));
    }

    /// Loads an address, and waits for the page's `load` event.
    #[track_caller]
    pub fn navigate(&self, url: &str) {
        let answer = self.command("Page.navigate", json!({ "url": url }));
        if let Some(problem) = answer["errorText"].as_str() {
            self.fail(&format!("cannot load {url}: {problem}"));
        }
        // A new fragment alone loads no document.
        if let Some(document) = answer["loaderId"].as_str() {
            self.loads(|seen| seen.loaded.contains(document));
        }
    }

    /// Loads the page again, as `navigate` does.
    #[track_caller]
    pub fn reload(&self) {
        let before = self.seen(|seen| seen.loaded.len());
        self.command("Page.reload", json!({}));
        self.loads(|seen| seen.loaded.len() > before);
    }

    /// Returns the addresses that the page has requested since it was opened, but no `data:` URLs.
    pub fn requests(&self) -> Vec<String> {
        self.seen(|seen| seen.requests.clone())
    }

    /// Returns console errors, uncaught exceptions, violations of a policy, failed requests, and dialogs.
    pub fn errors(&self) -> Vec<String> {
        self.seen(|seen| seen.errors.clone())
    }

    pub fn weight(&self) -> Weight {
        self.seen(|seen| seen.weight)
    }

    /// Returns a line for each serious or critical violation that axe-core, given as its source, finds.
    #[track_caller]
    pub fn axe(&self, source: &str) -> Vec<String> {
        self.eval(&format!("{source}\n;undefined"));
        let found = self.eval(
            "axe.run({ resultTypes: ['violations'] }).then(({ violations }) => violations
                .filter(({ impact }) => impact === 'serious' || impact === 'critical')
                .map(({ id, impact, nodes }) =>
                    `${id} (${impact}): ${nodes.map(node => node.target.flat().join(' ')).join(', ')}`))",
        );
        serde_json::from_value(found).expect("a list of lines")
    }

    #[track_caller]
    fn command(&self, method: &str, params: Value) -> Value {
        match self.link.send(&self.session, method, params) {
            Ok(answer) => answer,
            Err(problem) => self.fail(&format!("{method}: {problem}")),
        }
    }

    fn evaluate(&self, js: &str) -> Result<Value, String> {
        let params = json!({ "expression": js, "awaitPromise": true, "returnByValue": true });
        let mut answer = self.link.send(&self.session, "Runtime.evaluate", params)?;
        match answer.get("exceptionDetails") {
            Some(details) => Err(exception(details)),
            None => Ok(answer["result"]["value"].take()),
        }
    }

    /// Evaluates JavaScript until it throws nothing, and returns what it throws when the time is over.
    fn persist(&self, js: &str, limit: Duration) -> Result<Value, String> {
        let end = Instant::now() + limit;
        loop {
            match self.evaluate(js) {
                Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(20)),
                result => return result,
            }
        }
    }

    /// Runs the body of a function of `element`, once there is the element and nothing is thrown.
    #[track_caller]
    fn element(&self, selector: &str, body: &str) -> Value {
        let selector = json!(selector);
        let found = format!("const element = document.querySelector({selector});");
        let js = format!("(() => {{ {found} if (!element) throw 'there is none'; {body} }})()");
        match self.persist(&js, PATIENCE) {
            Ok(value) => value,
            Err(problem) => self.fail(&format!("{selector}: {problem}")),
        }
    }

    #[track_caller]
    fn capture(&self, path: &Path, options: Value) {
        let answer = self.command("Page.captureScreenshot", options);
        let data = answer["data"].as_str().unwrap_or_default();
        let bytes = BASE64_STANDARD.decode(data).expect("a file in base64");
        fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    #[track_caller]
    fn loads(&self, done: impl Fn(&Seen) -> bool) {
        if !self.link.wait(|state| done(&state.pages[&self.session])) {
            self.fail(&format!("it does not load within {ANSWER:?}"));
        }
    }

    /// Reads what was seen, with all that the page has reported until now.
    fn seen<T>(&self, read: impl FnOnce(&Seen) -> T) -> T {
        // Its answer comes behind earlier events; a page that does not answer has no more of them.
        drop(self.evaluate("0"));
        read(&self.link.state().pages[&self.session])
    }

    #[track_caller]
    fn fail(&self, problem: &str) -> ! {
        let (url, errors) = {
            let state = self.link.state();
            let seen = &state.pages[&self.session];
            (seen.url.clone(), seen.errors.join("\n    "))
        };
        panic!("{problem}\n  page: {url}\n  errors: {errors}");
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // An error means that the browser has ended, and the page with it.
        let closed = json!({ "targetId": self.target });
        drop(self.link.send("", "Target.closeTarget", closed));
        self.link.state().pages.remove(&self.session);
    }
}

/// Returns the start of a text, for a message.
fn start_of(text: &str) -> String {
    text.chars().take(1000).collect()
}

/// Returns the code and the number of a key.
fn key_code(name: &str) -> Option<(String, u32)> {
    const FROM_33: &str = "PageUp PageDown End Home ArrowLeft ArrowUp ArrowRight ArrowDown";
    let number = match name {
        "Backspace" => 8,
        "Tab" => 9,
        "Enter" => 13,
        "Escape" => 27,
        " " => return Some(("Space".to_owned(), 32)),
        "/" | "?" => return Some(("Slash".to_owned(), 191)),
        _ => match name.to_ascii_uppercase().parse() {
            Ok(letter @ 'A'..='Z') => return Some((format!("Key{letter}"), letter.into())),
            Ok(digit @ '0'..='9') => return Some((format!("Digit{digit}"), digit.into())),
            _ => 33 + FROM_33.split(' ').position(|key| key == name)? as u32,
        },
    };
    Some((name.to_owned(), number))
}
