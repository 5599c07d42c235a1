//! The page of `pipeline view`: who may read it, that nothing can be written through it, and its data.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ovchat_data::tables::{Candidate, Pair, Reward};
use serde_json::{Value, json};

use crate::run::{SCRIPTED, rows};
use crate::scene::Scene;

/// The process of the page.
pub struct Server {
    child: Child,
    /// The address with the key, which ends with `/`.
    pub address: String,
}

impl Server {
    pub fn open(scene: &Scene, arguments: &[&str]) -> Self {
        let mut command = scene.command(&["view"]);
        command.args(arguments);
        Self::start(command)
    }

    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines.find_map(|line| line.ok().filter(|line| line.starts_with("http://")));
        std::thread::spawn(move || lines.count());
        let address = address.expect("the page has an address");
        Self { child, address }
    }

    /// Returns status and body of a GET request below the key.
    pub fn get(&self, path: &str) -> (u16, Vec<u8>) {
        self.request("GET", &format!("{}{path}", self.base()), &[])
    }

    /// Returns the JSON of a GET request, which must succeed.
    #[track_caller]
    pub fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        let text = String::from_utf8_lossy(&body);
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Returns the error of a GET request.
    #[track_caller]
    fn error(&self, path: &str) -> (u16, String) {
        let (status, body) = self.get(path);
        let value: Value = serde_json::from_slice(&body).unwrap();
        (
            status,
            value["error"].as_str().unwrap_or_default().to_owned(),
        )
    }

    fn authority(&self) -> &str {
        let rest = self.address.trim_start_matches("http://");
        rest.split('/').next().unwrap()
    }

    /// The path of the page: `/<key>/`.
    fn base(&self) -> &str {
        &self.address[self.address.find(self.authority()).unwrap() + self.authority().len()..]
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(self.authority()).unwrap();
        let mut text = format!("{method} {path} HTTP/1.1\r\n");
        let host = [("Host", self.authority())];
        let own = host
            .iter()
            .filter(|_| !headers.iter().any(|(name, _)| *name == "Host"));
        for (name, value) in own.chain(headers) {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{text}\r\n").as_bytes()).unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).unwrap();
        let end = response
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap();
        let head = String::from_utf8_lossy(&response[..end]).to_lowercase();
        let body = response[end + 4..].to_vec();
        let body = if head.contains("transfer-encoding: chunked") {
            unchunked(&body)
        } else {
            body
        };
        (head[9..12].parse().unwrap(), body)
    }

    /// The peak memory of the process, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().unwrap();
        kilobytes << 10
    }

    /// The number of processes that run queries.
    fn queries(&self) -> usize {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let stats = all.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
        let parents = stats.filter_map(|stat| {
            let (_, rest) = stat.rsplit_once(") ")?;
            rest.split(' ').nth(1)?.parse::<u32>().ok()
        });
        parents.filter(|parent| *parent == self.child.id()).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        self.child.wait().unwrap();
    }
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(end) = body.windows(2).position(|two| two == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap(), 16).unwrap();
        whole.extend_from_slice(&body[end + 2..end + 2 + size]);
        body = &body[end + 4 + size..];
        if size == 0 {
            break;
        }
    }
    whole
}

/// Writes `count` prompts, each two about one picture, and their pictures.
pub fn pictures(scene: &Scene, count: usize) {
    let mut records = Vec::new();
    for number in 0..count {
        let picture = number / 2;
        let image = image::RgbImage::from_fn(96, 64, |x, y| {
            image::Rgb([(x * 2) as u8, (y * 3) as u8, (picture * 37 % 256) as u8])
        });
        let name = format!("p{picture}.png");
        image.save(scene.path(&name)).unwrap();
        let question = ["Which color is the circle?", "How many stars are there?"][number % 2];
        records.push(json!({
            "id": format!("q{number}"), "image": name, "prompt": format!("{question} ({number})"), "answer": "red",
        }));
    }
    scene.write("prompts.json", json!(records).to_string());
}

/// A finished run of the scripted pipeline with pictures.
pub fn finished(count: usize) -> Scene {
    let scene = Scene::new();
    pictures(&scene, count);
    scene.write("p.yaml", SCRIPTED).succeeds(&["run", "p.yaml"]);
    scene
}

/// The files of a folder with their contents and times.
fn state(folder: &Path) -> BTreeMap<PathBuf, (Vec<u8>, std::time::SystemTime)> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(state(&path));
        } else {
            let changed = path.metadata().unwrap().modified().unwrap();
            files.insert(path.clone(), (fs::read(&path).unwrap(), changed));
        }
    }
    files
}

/// Percent-encodes a parameter.
pub fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

#[test]
fn only_this_machine_with_the_key_may_read_and_nobody_may_write() {
    let scene = finished(8);
    let before = state(&scene.path("runs"));
    let server = Server::open(&scene, &["scripted"]);
    let base = server.base().to_owned();
    let status = |method: &str, path: &str, headers: &[(&str, &str)]| {
        server.request(method, path, headers).0
    };
    let runs = format!("{base}api/runs");
    assert_eq!(status("GET", &runs, &[]), 200);
    let port = server.authority().rsplit(':').next().unwrap();
    let host = format!("localhost:{port}");
    assert_eq!(status("GET", &runs, &[("Host", &host)]), 200);
    for host in [
        "evil.example",
        &format!("evil.example:{port}"),
        "127.0.0.1",
        "127.0.0.1:1",
    ] {
        assert_eq!(status("GET", &runs, &[("Host", host)]), 403, "{host}");
    }
    assert_eq!(
        status("GET", &runs, &[("Origin", "http://evil.example")]),
        403
    );
    assert_eq!(status("GET", &runs, &[("Origin", "null")]), 403);
    for path in [
        "/",
        "/api/runs",
        "/app.js",
        &base.replace('a', "b").replace('0', "1"),
        "//api/runs",
    ] {
        assert_eq!(status("GET", path, &[]), 403, "{path}");
    }
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"] {
        assert_eq!(status(method, &runs, &[]), 405, "{method}");
    }
    for statement in [
        "insert into pairs select * from pairs",
        "copy pairs to 'runs/scripted/x.parquet'",
        "create external table x stored as parquet location '/tmp'",
        "drop table pairs",
        "set datafusion.execution.batch_size = 1",
    ] {
        let (status, why) = server.error(&format!("api/sql?q={}", encoded(statement)));
        assert_eq!(status, 400, "{statement}: {why}");
        let (status, _) = server.error(&format!("api/sql.parquet?q={}", encoded(statement)));
        assert_eq!(status, 400, "{statement}");
    }
    let (status, why) = server.error(&format!(
        "api/pairs?where={}",
        encoded("1 = 1) union (select * from pairs")
    ));
    assert_eq!(status, 400, "{why}");
    let hostile = [
        "image/0/../../../etc/passwd",
        "thumb/0/%2e%2e%2fmanifest.json",
        "thumb/9/aa",
        "api/nothing",
        "image/0/",
    ];
    for path in hostile {
        assert_eq!(server.get(path).0, 404, "{path}");
    }
    for path in [
        "",
        "api/pairs?round=2&sort=margin",
        "api/graph",
        "api/charts",
        "api/health",
        "graph.svg",
    ] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }
    drop(server);
    assert_eq!(state(&scene.path("runs")), before, "nothing was written");
}

#[test]
fn pairs_are_sorted_filtered_and_paged_like_their_tables() {
    let scene = finished(40);
    let server = Server::open(&scene, &["scripted"]);
    let mut pairs: Vec<Pair> = rows(&scene, "pairs", Some(2));
    let shown = |query: &str| -> Vec<String> {
        let page = server.json(&format!("api/pairs?{query}"));
        let rows = page["rows"].as_array().unwrap();
        rows.iter()
            .map(|row| row["key"].as_str().unwrap().to_owned())
            .collect()
    };
    let keys =
        |pairs: &[Pair]| -> Vec<String> { pairs.iter().map(|pair| pair.row_key.clone()).collect() };
    assert_eq!(shown("round=2&limit=200"), keys(&pairs));
    assert_eq!(shown("round=2&limit=5&offset=3"), keys(&pairs[3..8]));
    let wide: Vec<Pair> = pairs
        .iter()
        .filter(|pair| pair.margin > Some(0.5))
        .cloned()
        .collect();
    let condition = encoded("margin > 0.5 -- a comment");
    assert_eq!(
        shown(&format!("round=2&limit=200&where={condition}")),
        keys(&wide)
    );
    let wanted = encoded("STARS (13)");
    let found: Vec<Pair> = pairs
        .iter()
        .filter(|pair| pair.prompt.contains("stars are there? (13)"))
        .cloned()
        .collect();
    assert_eq!(shown(&format!("round=2&text={wanted}")), keys(&found));
    pairs.sort_by(|one, other| other.margin.partial_cmp(&one.margin).unwrap());
    assert_eq!(shown("round=2&sort=margin&desc=1&limit=200"), keys(&pairs));
    let page = server.json("api/pairs?round=2&sort=margin&desc=1&limit=1");
    assert_eq!(page["total"], pairs.len());
    let first = &page["rows"][0];
    let tokens = |ids: &Option<Vec<i32>>| ids.as_ref().unwrap().len();
    assert_eq!(first["chosen"], pairs[0].chosen);
    assert_eq!(first["chosen_tokens"], tokens(&pairs[0].chosen_token_ids));
    assert_eq!(first["answer"], "red");
    assert_eq!(first["round"], 2);
    // The query of a list gives the same rows elsewhere.
    let sql = page["sql"].as_str().unwrap();
    let rows = server.json(&format!("api/sql?q={}&limit=1", encoded(sql)));
    assert_eq!(rows["rows"][0][0], first["key"]);
    let (status, why) = server.error(&format!("api/pairs?where={}", encoded("margni > 1")));
    assert_eq!(status, 400);
    assert!(why.contains("margni") && why.contains("margin"), "{why}");
    let all = server.json("api/pairs?limit=1");
    let both: Vec<Pair> = crate::run::rows(&scene, "pairs", Some(1));
    assert_eq!(all["total"], both.len() + pairs.len(), "of all rounds");
}

#[test]
fn a_prompts_life_tells_what_became_of_each_answer() {
    let scene = finished(12);
    let server = Server::open(&scene, &["scripted"]);
    let pairs: Vec<Pair> = rows(&scene, "pairs", Some(1));
    let pair = &pairs[0];
    let life = server.json(&format!("api/prompt?id={}", pair.prompt_id));
    assert_eq!(life["prompt"]["question"], pair.prompt);
    let rounds = life["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2);
    let answers: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    let rewards: Vec<Reward> = rows(&scene, "rewards", Some(1));
    let own: Vec<(&Candidate, &Reward)> = answers
        .iter()
        .zip(&rewards)
        .filter(|(answer, _)| answer.prompt_id == pair.prompt_id)
        .collect();
    for (shown, (answer, reward)) in rounds[0]["answers"].as_array().unwrap().iter().zip(&own) {
        assert_eq!(shown["text"], answer.text);
        let logp = shown["logp_before"].as_f64().unwrap();
        assert!((logp - answer.logp).abs() < 1e-9);
        assert_eq!(
            shown["rewards"][0]["reward"]
                .as_f64()
                .map(|value| value as f32),
            Some(reward.reward)
        );
        let role = match answer.candidate {
            number if Some(number) == pair.chosen_candidate => json!("chosen"),
            number if Some(number) == pair.rejected_candidate => json!("rejected"),
            _ => Value::Null,
        };
        assert_eq!(shown["role"], role);
        let why = shown["why"].as_str().unwrap();
        match role.as_str() {
            Some("chosen") => assert_eq!(why, "the highest reward"),
            Some(_) => assert_eq!(why, "the lowest reward"),
            None => assert!(
                why.starts_with("its reward is between") || why.starts_with("as "),
                "{why}"
            ),
        }
    }
    assert!(
        rounds[0]["training"]["step"].as_u64() >= Some(1),
        "{}",
        rounds[0]
    );
    // The step's mean reward margin is that of its pairs: the last step of one pair has only it.
    let evaluations = life["evaluations"].as_array().unwrap();
    let of: Vec<u64> = evaluations
        .iter()
        .map(|one| one["round"].as_u64().unwrap())
        .collect();
    assert_eq!(of, [0, 1, 2]);
    let similar = server.json(&format!("api/similar?id={}", pair.prompt_id));
    let same = similar["same_image"].as_array().unwrap();
    assert_eq!(same.len(), 1, "two prompts about each picture");
    assert_eq!(same[0]["images"], json!(pair.image_ids));
    let near = similar["near_duplicates"].as_array().unwrap();
    assert!(
        near.iter()
            .all(|one| one["distance"].as_u64() <= Some(6) && one["images"] != same[0]["images"])
    );
    let alike = similar["questions"].as_array().unwrap();
    assert!(
        !alike.is_empty() && alike.iter().all(|one| one["shared"].as_f64() >= Some(0.5)),
        "{alike:?}"
    );
    // A prompt without a pair says why.
    let mut dropped = crate::run::rows_of_rejects(&scene)
        .into_iter()
        .filter(|row| row.stage == "pairs");
    if let Some(dropped) = dropped.next() {
        let life = server.json(&format!("api/prompt?id={}", dropped.id));
        let round = &life["rounds"][dropped.round.unwrap() as usize - 1];
        assert_eq!(round["rejects"][0]["reason"], dropped.reason);
        assert!(round["training"].is_null() && round["training_why"].is_string());
    }
    assert_eq!(server.get("api/prompt?id=nothing").0, 404);
}

#[test]
fn the_life_of_a_pair_that_people_wrote_has_the_steps_of_each_round() {
    let scene = Scene::new();
    let pipeline = "pipeline: people\nrounds: 2\nmodels: { policy: { scripted: {} } }\nstages:\n  \
        pairs: { load_feedback: { from: f.json } }\n  steps: { train_dpo: { pairs: pairs, model: policy, batch_pairs: 2 } }\n";
    let record = |number: u32| json!({"id": number.to_string(), "prompt": format!("Why {number}?"), "chosen": "So.", "rejected": "No."});
    let records: Vec<Value> = (0..5).map(record).collect();
    scene
        .write("f.json", json!(records).to_string())
        .write("p.yaml", pipeline);
    scene.succeeds(&["run", "p.yaml"]);
    let server = Server::open(&scene, &["people"]);
    let mut steps = Vec::new();
    for row in server.json("api/pairs?round=2")["rows"].as_array().unwrap() {
        let life = server.json(&format!(
            "api/prompt?id={}",
            row["prompt_id"].as_str().unwrap()
        ));
        let rounds = life["rounds"].as_array().unwrap();
        assert_eq!(
            [&rounds[0]["round"], &rounds[1]["round"]],
            [&json!(1), &json!(2)]
        );
        assert_eq!(rounds[0]["training"]["steps"], 3);
        assert!(
            rounds[0]["answers"][0]["logp_before"].is_f64(),
            "from the reference pass"
        );
        steps.push(rounds[0]["training"]["step"].as_u64().unwrap());
    }
    steps.sort_unstable();
    assert_eq!(steps, [1, 1, 2, 2, 3]);
}

#[test]
fn queries_of_the_page_have_limits_and_end_with_their_client() {
    let scene = finished(40);
    let server = Server::open(&scene, &["scripted", "--query-seconds", "2"]);
    let endless = "select count(*) from rewards a, rewards b, rewards c, rewards d where a.reward + b.reward + c.reward > d.reward";
    let address = format!("api/sql?q={}", encoded(endless));
    let begun = Instant::now();
    let (status, why) = server.error(&address);
    assert_eq!(status, 400);
    assert!(
        why.starts_with("the query was stopped after 2 s: "),
        "{why}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(6),
        "{:?}",
        begun.elapsed()
    );
    let ended = |server: &Server| {
        let begun = Instant::now();
        while server.queries() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(5), "a query goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    ended(&server);
    // A closed tab.
    let mut stream = TcpStream::connect(server.authority()).unwrap();
    let head = format!(
        "GET {}{address} HTTP/1.1\r\nHost: {}\r\n\r\n",
        server.base(),
        server.authority()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let begun = Instant::now();
    while server.queries() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(1), "the query begins");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(stream);
    let closed = Instant::now();
    ended(&server);
    assert!(
        closed.elapsed() < Duration::from_millis(1500),
        "{:?}",
        closed.elapsed()
    );
    // What no operator of DataFusion can be stopped in, and what is not in its limit on memory.
    for (sql, ends) in [
        (
            "select max(cardinality(l)) from (select array_agg(a.text || a.prompt_id) over (order by a.round, a.prompt_id, a.candidate, b.candidate) as l \
          from candidates a, candidates b)",
            "memory limit",
        ),
        (
            "select array_agg(a.prompt_id || b.prompt_id || c.prompt_id) from rewards a, rewards b, rewards c",
            "",
        ),
    ] {
        let begun = Instant::now();
        let (status, why) = server.error(&format!("api/sql?q={}", encoded(sql)));
        assert_eq!(status, 400);
        assert!(
            why.contains("memory limit") || (ends.is_empty() && why.contains("was stopped")),
            "{why}"
        );
        assert!(
            begun.elapsed() < Duration::from_secs(6),
            "{:?}",
            begun.elapsed()
        );
        ended(&server);
    }
    assert!(server.peak_memory() < 300 << 20);
    // A condition of a list is such a query, too.
    let condition = encoded(
        "margin > (select count(*) from pairs a, pairs b, pairs c, pairs d, pairs e where a.margin + b.margin > c.margin + d.margin + e.margin)",
    );
    let (status, why) = server.error(&format!("api/pairs?where={condition}"));
    assert!(
        status == 400 && (why.contains("was stopped") || why.contains("memory limit")),
        "{why}"
    );
}

#[test]
fn a_server_that_ends_takes_its_queries_and_files_along() {
    let scene = finished(40);
    let temporary = scene.path("tmp");
    fs::create_dir(&temporary).unwrap();
    let mut command = scene.command(&["view", "scripted"]);
    command.env("TMPDIR", &temporary);
    let mut server = Server::start(command);
    let spilling = "select a.text from candidates a, candidates b, candidates c order by md5(a.text || b.text || c.text) offset 9000000";
    let mut stream = TcpStream::connect(server.authority()).unwrap();
    let head = format!(
        "GET {}api/sql?q={} HTTP/1.1\r\nHost: {}\r\n\r\n",
        server.base(),
        encoded(spilling),
        server.authority()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let begun = Instant::now();
    while server.queries() == 0 || begun.elapsed() < Duration::from_millis(700) {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "the query begins"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let id = server.child.id().to_string();
    Command::new("kill").args(["-INT", &id]).status().unwrap();
    let asked = Instant::now();
    while server.child.try_wait().unwrap().is_none() {
        assert!(asked.elapsed() < Duration::from_secs(5), "the server ends");
        std::thread::sleep(Duration::from_millis(10));
    }
    let left: Vec<_> = fs::read_dir(&temporary).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn rows_have_images_and_can_be_downloaded() {
    let scene = finished(6);
    let server = Server::open(&scene, &["scripted"]);
    let found = server.json(&format!(
        "api/sql?q={}",
        encoded("select a.image_id, a.image, a.width, b.width from images a join images b on b.image_id = a.image_id order by 1")
    ));
    assert_eq!(found["rows"].as_array().unwrap().len(), 3);
    let row = &found["rows"][0];
    assert_eq!(row[1], json!({ "$image": row[0] }));
    assert_eq!(
        (&row[2], &row[3]),
        (&json!(96), &json!(96)),
        "names may repeat"
    );
    let id = row[0].as_str().unwrap();
    let (status, small) = server.get(&format!("thumb/0/{id}"));
    assert_eq!(status, 200);
    assert_eq!(image::load_from_memory(&small).unwrap().width(), 96);
    let (_, whole) = server.get(&format!("image/0/{id}"));
    assert_eq!(
        image::load_from_memory(&whole)
            .unwrap()
            .to_rgb8()
            .dimensions(),
        (96, 64)
    );
    let query =
        encoded("select prompt_id, candidate, reward from rewards where round = 2 order by 1, 2");
    let (_, csv) = server.get(&format!("api/sql.csv?q={query}"));
    let lines = String::from_utf8(csv).unwrap();
    assert_eq!(lines.lines().count(), 31);
    let (_, parquet) = server.get(&format!("api/sql.parquet?q={query}"));
    scene.write("rows.parquet", &parquet);
    assert_eq!(
        ovchat_data::store::schema_of_file(&scene.path("rows.parquet"))
            .unwrap()
            .fields()
            .len(),
        3
    );
    for question in server.json("api/questions")["questions"]
        .as_array()
        .unwrap()
    {
        let sql = question["sql"].as_str().unwrap();
        server.json(&format!("api/sql?q={}", encoded(sql)));
    }
    for chart in server.json("api/charts")["charts"].as_array().unwrap() {
        let id = chart["id"].as_str().unwrap();
        let rows = server.json(&format!("api/chart?id={}", encoded(id)));
        let columns = rows["columns"].as_array().unwrap();
        let named = [&chart["x"]]
            .into_iter()
            .chain(chart["y"].as_array().unwrap());
        let named = named.filter(|name| name.as_str() != Some(""));
        assert!(
            named.into_iter().all(|name| columns.contains(name)),
            "{chart}: {columns:?}"
        );
    }
}

/// A run whose held-out answers change from round to round, with its page.
fn with_changing_answers() -> (Scene, Server) {
    let scene = Scene::new();
    pictures(&scene, 40);
    let pipeline = SCRIPTED.replace("count: 1, temperature: 0", "count: 1, temperature: 1.0");
    scene.write("p.yaml", pipeline).succeeds(&["run", "p.yaml"]);
    let server = Server::open(&scene, &["scripted"]);
    (scene, server)
}

/// The rows of a ready-made query, as objects.
fn answer(server: &Server, title: &str) -> Vec<Value> {
    let questions = server.json("api/questions");
    let mut all = questions["questions"].as_array().unwrap().iter();
    let question = all
        .find(|question| question["title"] == title)
        .expect(title);
    let sql = encoded(question["sql"].as_str().unwrap());
    let found = server.json(&format!("api/sql?limit=1000&q={sql}"));
    let columns = found["columns"].as_array().unwrap().iter();
    let names: Vec<String> = columns
        .map(|column| column["name"].as_str().unwrap().to_owned())
        .collect();
    let row = |row: &Value| {
        let cells = row.as_array().unwrap().iter().cloned();
        Value::Object(names.iter().cloned().zip(cells).collect())
    };
    found["rows"].as_array().unwrap().iter().map(row).collect()
}

/// The prompt, text and reward of each held-out answer of a round.
fn judged(scene: &Scene, round: u32) -> Vec<(String, String, f32)> {
    let answers: Vec<Candidate> = rows(scene, "answers", Some(round));
    let grades: Vec<Reward> = rows(scene, "grades", Some(round));
    let both = answers.into_iter().zip(grades);
    both.map(|(answer, grade)| (answer.prompt_id, answer.text, grade.reward))
        .collect()
}

#[test]
fn ready_made_queries_of_the_evaluation_answer_their_questions() {
    let (scene, server) = with_changing_answers();
    let answer = |title| answer(&server, title);
    let (first, last) = (judged(&scene, 0), judged(&scene, 2));
    let gains = first
        .iter()
        .zip(&last)
        .map(|(before, after)| (after.2 - before.2, &after.0));
    let mut gains: Vec<(f32, &String)> = gains.collect();
    gains.sort_by(|one, other| other.0.total_cmp(&one.0));
    let improved = answer("Which held-out answers improved most?");
    assert_eq!(improved[0]["prompt_id"].as_str(), Some(gains[0].1.as_str()));
    assert!((improved[0]["gain"].as_f64().unwrap() - f64::from(gains[0].0)).abs() < 1e-6);
    let worse = answer("Which held-out answers got worse?");
    assert_eq!(worse[0]["prompt_id"].as_str(), Some(gains[39].1.as_str()));
    let unchanged = first
        .iter()
        .zip(&last)
        .filter(|(before, after)| before.1 == after.1);
    assert_eq!(
        answer("Which held-out answers did not change?").len(),
        unchanged.count()
    );

    let topics = answer("What is the win rate by topic, last round against first?");
    let counted: i64 = topics.iter().map(|row| row["n"].as_i64().unwrap()).sum();
    assert_eq!(
        counted as usize,
        gains.iter().filter(|(gain, _)| *gain != 0.0).count()
    );
    for row in &topics {
        // The score interval of Wilson (1927) for n trials at the rate p.
        let [n, p] = ["n", "rate"].map(|name| row[name].as_f64().unwrap());
        let z: f64 = 1.96;
        let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let reach = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        assert!(
            (row["low"].as_f64().unwrap() - (middle - reach)).abs() < 1e-3,
            "{row}"
        );
        assert!(
            (row["high"].as_f64().unwrap() - (middle + reach)).abs() < 1e-3,
            "{row}"
        );
    }
    let mean = last
        .iter()
        .map(|(.., reward)| f64::from(*reward))
        .sum::<f64>()
        / 40.0;
    let is_wrong = |(_, text, reward): &&(String, String, f32)| {
        text.to_lowercase() != "red" && f64::from(*reward) > mean
    };
    let wrong = answer("Which held-out answers are wrong, but rewarded?");
    assert_eq!(wrong.len(), last.iter().filter(is_wrong).count());
}

#[test]
fn ready_made_queries_of_the_training_answer_their_questions() {
    let (scene, server) = with_changing_answers();
    let answer = |title| answer(&server, title);
    let mut by_image: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let prompts: Vec<ovchat_data::tables::Prompt> = rows(&scene, "prompts", None);
    for round in [1, 2] {
        for reward in rows::<Reward>(&scene, "rewards", Some(round)) {
            let prompt = prompts
                .iter()
                .find(|prompt| prompt.prompt_id == reward.prompt_id)
                .unwrap();
            by_image
                .entry(prompt.image_ids[0].clone())
                .or_default()
                .push(reward.reward.into());
        }
    }
    let mean = |rewards: &[f64]| rewards.iter().sum::<f64>() / rewards.len() as f64;
    let hardest = by_image
        .iter()
        .min_by(|one, other| mean(one.1).total_cmp(&mean(other.1)))
        .unwrap();
    let found = answer("Which images are hardest?");
    assert_eq!(found[0]["image_id"].as_str(), Some(hardest.0.as_str()));
    assert_eq!(
        found[0]["answers"], 20,
        "two prompts, five answers, two rounds"
    );

    let rejects = crate::run::rows_of_rejects(&scene).len();
    assert_eq!(
        answer("Which prompts have no pair, and why?").len(),
        rejects
    );
    let mut cut: Vec<Candidate> = rows(&scene, "candidates", Some(1));
    cut.extend(rows::<Candidate>(&scene, "candidates", Some(2)));
    cut.retain(|answer| answer.finish.as_str() == "length");
    assert_eq!(answer("Which answers were cut off?").len(), cut.len());
}

#[test]
fn the_graph_says_what_would_be_built_and_why() {
    let scene = finished(6);
    let svg = scene.succeeds(&["graph", "p.yaml"]).out;
    assert!(
        svg.starts_with("<svg") && svg.contains(">candidates<"),
        "{svg}"
    );
    let mermaid = scene
        .succeeds(&["graph", "p.yaml", "--format", "mermaid"])
        .out;
    assert!(mermaid.starts_with("flowchart LR"), "{mermaid}");
    let server = Server::open(&scene, &["scripted"]);
    let of = |server: &Server, name: &str| {
        let graph = server.json("api/graph");
        let tables = graph["tables"].as_array().unwrap().clone();
        let found = tables
            .into_iter()
            .find(|table| table["table"] == name && table["round"] != 0);
        (found.unwrap(), graph["problem"].clone())
    };
    let (rewards, problem) = of(&server, "rewards");
    assert_eq!(rewards["action"], "up to date", "{problem}");
    assert_eq!(rewards["inputs"], json!(["candidates", "prompts"]));
    scene.write(
        "p.yaml",
        SCRIPTED.replace("policy, part: 7", "policy, count: 4"),
    );
    drop(server);
    let server = Server::open(&scene, &["scripted"]);
    let (candidates, _) = of(&server, "candidates");
    assert_eq!(candidates["action"], "would be built");
    let why = candidates["reasons"][0].as_str().unwrap();
    assert!(why.contains("`count` 5 → 4"), "{why}");
    fs::remove_file(scene.path("p.yaml")).unwrap();
    let server = Server::open(&scene, &["scripted"]);
    let (rewards, problem) = of(&server, "rewards");
    assert_eq!(
        (rewards["action"].as_str(), rewards["state"].as_str()),
        (Some(""), Some("done"))
    );
    assert!(problem.as_str().unwrap().contains("p.yaml"), "{problem}");
}

#[test]
fn a_bundle_has_the_pairs_with_the_largest_margins_and_their_images() {
    let scene = finished(12);
    let said = scene.succeeds(&["view", "scripted", "--bundle", "out", "--pairs", "4"]);
    assert!(said.err.contains("wrote 4 pairs and "), "{}", said.err);
    let script = fs::read_to_string(scene.path("out/bundle.js")).unwrap();
    let script = script.strip_prefix("window.OVCHAT_BUNDLE = ").unwrap();
    let bundle: Value = serde_json::from_str(script.trim_end().trim_end_matches(';')).unwrap();
    let rows = bundle["get"]["api/pairs?run=0"]["rows"].as_array().unwrap();
    let mut pairs: Vec<Pair> = rows_of(&scene);
    pairs.sort_by(|one, other| other.margin.partial_cmp(&one.margin).unwrap());
    let keys: Vec<&str> = rows
        .iter()
        .map(|row| row["key"].as_str().unwrap())
        .collect();
    let expected: Vec<&str> = pairs[..4]
        .iter()
        .map(|pair| pair.row_key.as_str())
        .collect();
    assert_eq!(keys, expected);
    for row in rows {
        let image = row["images"][0].as_str().unwrap();
        assert!(scene.path(&format!("out/thumb/0/{image}")).exists());
        let id = row["prompt_id"].as_str().unwrap();
        assert!(bundle["get"][format!("api/prompt?run=0&id={id}")]["prompt"].is_object());
    }
    let again = scene.pipeline(&["view", "scripted", "--bundle", "out"]);
    assert_eq!(again.code, Some(1));
    assert!(again.err.contains("already exists"), "{}", again.err);
}

fn rows_of(scene: &Scene) -> Vec<Pair> {
    rows(scene, "pairs", Some(2))
}
