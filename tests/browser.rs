//! The page of `pipeline view` in a real browser: keys, sorting, filters, live updates, narrow and dark,
//! hostile texts, and no serious finding of axe-core.

mod chromium;
mod devtools;

use std::io::Write as _;
use std::path::Path;
use std::sync::LazyLock;

use serde_json::json;

use self::chromium::{Chromium, Page};
use crate::run::SCRIPTED;
use crate::scene::Scene;
use crate::view::{Server, encoded, finished, pictures};

/// axe-core, as `make test` downloads it.
static AXE: LazyLock<Option<String>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(folder.join(".axe/axe_playwright_python/axe.min.js")).ok()
});

/// Returns a browser, or says past the capture of the test harness that there is none.
fn browser(test: &str) -> Option<Chromium> {
    if Chromium::find().is_none() {
        skipped(test, "Chromium is not installed (apt-get install chromium)");
        return None;
    }
    Some(Chromium::start())
}

fn skipped(test: &str, why: &str) {
    writeln!(std::io::stderr(), "SKIPPED {test}: {why}").unwrap();
}

/// Opens a view of the page, and waits until it shows something.
fn view(browser: &Chromium, server: &Server, fragment: &str, ready: &str) -> Page {
    let page = browser.page(&format!("{}{fragment}", server.address));
    page.until(ready);
    page
}

/// Waits until a test of the page passes.
#[track_caller]
fn until(page: &Page, test: &dyn Fn(&Page) -> bool) {
    let begun = std::time::Instant::now();
    while !test(page) {
        assert!(begun.elapsed().as_secs() < 15, "{:?}", texts(page, "#main"));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// True if the page shows a pair.
const PAIRS: &str = "document.querySelector('article.pair') !== null";

#[track_caller]
fn assert_clean(page: &Page, server: &Server) {
    assert_eq!(page.errors(), [] as [&str; 0]);
    let foreign = page
        .requests()
        .into_iter()
        .filter(|url| !url.starts_with(&server.address));
    assert_eq!(
        foreign.collect::<Vec<_>>(),
        [] as [&str; 0],
        "all comes from the server"
    );
}

/// Returns the texts of elements.
fn texts(page: &Page, selector: &str) -> Vec<String> {
    let script =
        format!("[...document.querySelectorAll('{selector}')].map(one => one.textContent)");
    let found = page.eval(&script);
    let texts = found.as_array().unwrap().iter();
    texts
        .map(|text| text.as_str().unwrap().to_owned())
        .collect()
}

fn margins(page: &Page) -> Vec<f64> {
    let texts = texts(page, "article.pair [data-fact=margin]");
    let number = |text: &String| {
        text.chars()
            .filter(|c| c.is_ascii_digit() || *c == '.')
            .collect::<String>()
    };
    texts
        .iter()
        .map(|text| number(text).parse().unwrap())
        .collect()
}

#[test]
fn keys_walk_through_pairs_and_open_what_is_behind_them() {
    let Some(browser) = browser("keys_walk_through_pairs") else {
        return;
    };
    let scene = finished(40);
    let server = Server::open(&scene, &["scripted"]);
    let page = view(&browser, &server, "#/pairs?run=0&round=2&sort=order", PAIRS);
    let current = "document.querySelector('article.pair[aria-current=true]')?.dataset.index";
    page.press("j");
    page.until(&format!("{current} !== undefined"));
    let first: i64 = page.eval(current).as_str().unwrap().parse().unwrap();
    page.press("j");
    page.press("j");
    page.press("k");
    page.until(&format!("{current} === '{}'", first + 1));
    page.press("i");
    page.until("document.querySelector('#image-dialog').open");
    page.until("document.querySelector('#image-full').naturalWidth === 96");
    page.press("Escape");
    page.until("!document.querySelector('#image-dialog').open");
    page.press("Enter");
    page.until("document.querySelectorAll('.answer[data-role=chosen]').length >= 1");
    page.until("document.querySelector('[data-training]') !== null");
    let shown = page.eval("document.querySelector('[data-training]').textContent");
    assert!(shown.as_str().unwrap().contains("step"), "{shown}");
    page.until("document.querySelector('#similar [data-similar=same_image]') !== null");
    page.press("1");
    page.until(PAIRS);
    page.press("/");
    page.type_text("jkr31");
    let focused = page.eval("document.activeElement.value");
    assert_eq!(focused, json!("jkr31"), "keys are letters in a field");
    page.press("Escape");
    for (key, name) in [("3", "rounds"), ("4", "graph"), ("5", "sql")] {
        page.eval("document.activeElement.blur()");
        page.press(key);
        page.until(&format!(
            "document.querySelector('[data-view={name}]') !== null"
        ));
    }
    page.eval("document.activeElement.blur()");
    page.press("?");
    page.until("document.querySelector('#keys-dialog').open");
    assert_clean(&page, &server);
}

#[test]
fn pairs_are_sorted_and_filtered_and_the_address_repeats_the_view() {
    let Some(browser) = browser("pairs_are_sorted_and_filtered") else {
        return;
    };
    let scene = finished(40);
    let server = Server::open(&scene, &["scripted"]);
    let page = view(&browser, &server, "", PAIRS);
    page.select("#sort", "margin");
    page.until("document.querySelector('#pair-list').getAttribute('aria-busy') !== 'true'");
    page.until("location.hash.includes('sort=margin')");
    let is_sorted = |page: &Page, descending: bool| {
        let margins = margins(page);
        margins.len() > 5 && margins.is_sorted_by(|a, b| if descending { a >= b } else { a <= b })
    };
    let descending = page.eval("document.querySelector('#direction').dataset.desc") == json!("1");
    until(&page, &|page| is_sorted(page, descending));
    page.click("#direction");
    until(&page, &|page| is_sorted(page, !descending));
    page.click("#where");
    page.type_text("margin > 0.9");
    page.press("Enter");
    until(&page, &|page| {
        let margins = margins(page);
        !margins.is_empty() && margins.iter().all(|margin| *margin >= 0.9)
    });
    let kept = texts(&page, "#pair-count");
    page.reload();
    page.until(PAIRS);
    page.until(&format!(
        "document.querySelector('#pair-count').textContent === {}",
        json!(kept[0])
    ));
    page.click("#where");
    page.type_text(" and margni");
    page.press("Enter");
    page.until("document.querySelector('[data-error]')?.textContent.includes('margni')");
    page.eval("location.hash = '#/pairs?run=0&text=stars'");
    page.until(PAIRS);
    until(&page, &|page| {
        let questions = texts(page, "article.pair");
        !questions.is_empty() && questions.iter().all(|text| text.contains("stars"))
    });
    // The refused condition was asked for by the test.
    assert!(
        page.errors().iter().all(|error| error.contains("400")),
        "{:?}",
        page.errors()
    );
}

#[test]
fn a_run_is_followed_while_it_goes_on() {
    let Some(browser) = browser("a_run_is_followed") else {
        return;
    };
    let scene = Scene::new();
    pictures(&scene, 12);
    scene
        .write("p.yaml", SCRIPTED)
        .succeeds(&["run", "p.yaml", "--until", "rewards"]);
    let server = Server::open(&scene, &["scripted"]);
    let page = view(
        &browser,
        &server,
        "#/pairs?run=0",
        "document.querySelector('[data-view=pairs]') !== null",
    );
    page.until("document.querySelector('article.pair') === null");
    let rounds = view(
        &browser,
        &server,
        "#/rounds?runs=0",
        "document.querySelector('#charts') !== null",
    );
    scene.succeeds(&["run", "p.yaml"]);
    // While the run goes on, the page asks less often if its requests take long.
    let patience = std::time::Duration::from_secs(70);
    page.until_within(PAIRS, patience);
    rounds.until_within("document.querySelector('#health-table') !== null", patience);
    rounds.until_within(
        "document.querySelectorAll('#charts svg.chart').length > 4",
        patience,
    );
    assert_clean(&rounds, &server);
}

#[test]
fn all_views_are_fit_for_narrow_and_dark_screens_and_screen_readers() {
    let Some(browser) = browser("all_views_are_fit") else {
        return;
    };
    let scene = finished(12);
    let server = Server::open(&scene, &["scripted"]);
    let prompt = server.json("api/pairs?limit=1")["rows"][0]["prompt_id"].clone();
    let sql = encoded("select image_id, width from images");
    let views = [
        ("#/pairs?run=0&round=2".to_owned(), PAIRS),
        (
            format!("#/prompt?run=0&id={}", prompt.as_str().unwrap()),
            "document.querySelector('#similar [data-similar]') !== null",
        ),
        (
            "#/rounds?runs=0".to_owned(),
            "document.querySelectorAll('#charts svg.chart').length > 4",
        ),
        (
            "#/graph?run=0".to_owned(),
            "document.querySelector('#graph-table') !== null",
        ),
        (
            format!("#/sql?run=0&q={sql}"),
            "document.querySelector('#result-table') !== null",
        ),
    ];
    if AXE.is_none() {
        skipped(
            "all_views_are_fit",
            "axe-core is not there (`make test` downloads it)",
        );
    }
    for (fragment, ready) in views {
        let page = view(&browser, &server, &fragment, ready);
        for (width, is_dark) in [(1280, false), (1280, true), (360, false), (360, true)] {
            page.size(width, 800);
            page.dark(is_dark);
            let overflow = page.eval(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth",
            );
            assert_eq!(overflow, json!(0), "{fragment} at {width} px");
            let light = page.eval("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) > 380");
            assert_eq!(light, json!(!is_dark), "{fragment}");
            if let Some(axe) = &*AXE {
                assert_eq!(
                    page.axe(axe),
                    [] as [&str; 0],
                    "{fragment} at {width} px, dark: {is_dark}"
                );
            }
        }
        assert_clean(&page, &server);
        let weight = page.weight();
        assert!(
            weight.other <= 300_000,
            "{fragment}: {} bytes without images",
            weight.other
        );
    }
}

#[test]
fn texts_of_models_are_shown_as_texts() {
    let Some(browser) = browser("texts_of_models_are_shown_as_texts") else {
        return;
    };
    let scene = Scene::new();
    let hostile = "</script><img src=x onerror=alert(1)><script>alert(2)</script> \u{202e}drawkcab\u{2066} \u{200b}\u{0}end";
    let record = json!([{
        "id": "<b>1</b>", "prompt": format!("{hostile} ?"), "chosen": hostile, "rejected": "<svg onload=alert(3)>",
    }]);
    let pipeline = "pipeline: hostile\nmodels: { policy: { scripted: {} } }\nstages:\n  \
        pairs: { load_feedback: { from: f.json } }\n  steps: { train_dpo: { pairs: pairs, model: policy } }\n";
    scene
        .write("f.json", record.to_string())
        .write("p.yaml", pipeline)
        .succeeds(&["run", "p.yaml"]);
    let server = Server::open(&scene, &["hostile"]);
    let page = view(&browser, &server, "#/pairs?run=0", PAIRS);
    let shown = texts(&page, "article.pair");
    assert!(
        shown[0].contains("<img src=x onerror=alert(1)>"),
        "{shown:?}"
    );
    assert!(
        shown[0].contains("U+202E") && !shown[0].contains('\u{202e}'),
        "{shown:?}"
    );
    let id = server.json("api/pairs")["rows"][0]["prompt_id"].clone();
    let prompt = view(
        &browser,
        &server,
        &format!("#/prompt?run=0&id={}", id.as_str().unwrap()),
        "document.querySelector('.answer') !== null",
    );
    let query = encoded(
        "select prompt, chosen, rejected, '<img src=x onerror=alert(4)>' as \"<i>x</i>\" from pairs",
    );
    let sql = view(
        &browser,
        &server,
        &format!("#/sql?run=0&q={query}"),
        "document.querySelector('#result-table') !== null",
    );
    for page in [&page, &prompt, &sql] {
        let elements = page.eval("document.querySelectorAll('#main img[src=x], #main script, #main svg[onload], #main i, #main article b').length");
        assert_eq!(elements, json!(0));
        assert_clean(page, &server);
    }
    // The same as files.
    scene.succeeds(&["view", "hostile", "--bundle", "out"]);
    let bundle = browser.page(&format!(
        "file://{}",
        scene.path("out/index.html").display()
    ));
    bundle.until(PAIRS);
    assert!(texts(&bundle, "article.pair")[0].contains("<img src=x onerror=alert(1)>"));
    assert_eq!(bundle.errors(), [] as [&str; 0]);
}

#[test]
fn two_runs_are_shown_beside_each_other() {
    let Some(browser) = browser("two_runs_are_shown") else {
        return;
    };
    let scene = finished(12);
    scene
        .write(
            "q.yaml",
            SCRIPTED
                .replace("scripted\n", "other\n")
                .replace("seed: 3", "seed: 4"),
        )
        .succeeds(&["run", "q.yaml"]);
    let server = Server::open(&scene, &["scripted", "other"]);
    let page = view(
        &browser,
        &server,
        "#/rounds?runs=0,1",
        "document.querySelectorAll('#charts svg.chart').length > 4",
    );
    page.until("document.querySelectorAll('figure[data-kind=lines] .legend').length > 0");
    let legend = texts(&page, "figure[data-kind=lines] .legend");
    assert!(
        legend[0].contains("scripted") && legend[0].contains("other"),
        "{legend:?}"
    );
    let images = server.json("api/pairs?run=1")["rows"][0]["images"][0].clone();
    assert_eq!(
        server
            .get(&format!("thumb/1/{}", images.as_str().unwrap()))
            .0,
        200
    );
    assert_clean(&page, &server);
}

/// Not a test, but the measurement of `benches/view/run.sh`.
#[test]
#[ignore = "a measurement of a large run; see benches/view/run.sh"]
fn a_large_run_is_shown_soon() {
    let run = std::env::var("OVCHAT_VIEW_RUN").expect("OVCHAT_VIEW_RUN names the run");
    let scene = Scene::new();
    let server = Server::open(&scene, &[&run, "--port", "0"]);
    let browser = Chromium::start();
    let took = |name: &str, work: &mut dyn FnMut()| {
        let begun = std::time::Instant::now();
        work();
        println!("{name}: {:.2} s", begun.elapsed().as_secs_f64());
    };
    // The browser itself has started.
    browser.page("about:blank");
    let mut first = None;
    took("first pairs", &mut || {
        first = Some(view(&browser, &server, "#/pairs?run=0&sort=order", PAIRS));
    });
    let page = first.unwrap();
    let paint = page.eval("Math.round(performance.getEntriesByType('paint').find(one => one.name === 'first-contentful-paint').startTime)");
    println!("first contentful paint: {paint} ms after navigation");
    let weight = page.weight();
    println!(
        "bytes without images: {}, with thumbnails: {}",
        weight.other,
        weight.other + weight.images
    );
    let shown = "document.querySelector('#pair-list').getAttribute('aria-busy') !== 'true' && document.querySelector('article.pair') !== null";
    for sort in ["margin", "length_difference", "question"] {
        took(&format!("sort by {sort}"), &mut || {
            let before = page.eval("document.querySelector('article.pair').dataset.key");
            page.select("#sort", sort);
            page.until(&format!(
                "{shown} && document.querySelector('article.pair').dataset.key !== {before}"
            ));
        });
    }
    page.eval("location.hash = '#/pairs?run=0&sort=margin&desc=1'");
    page.until(
        "location.hash.includes('margin') && document.querySelector('article.pair') !== null",
    );
    let mut pages: Vec<f64> = Vec::new();
    for number in 1..=20 {
        let begun = std::time::Instant::now();
        server.json(&format!(
            "api/pairs?sort=margin&desc=1&offset={}&limit=50",
            number * 40_000
        ));
        pages.push(begun.elapsed().as_secs_f64());
    }
    pages.sort_by(f64::total_cmp);
    println!(
        "a page of 50 pairs anywhere in the order: median {:.3} s, most {:.3} s",
        pages[10], pages[19]
    );
    took("filter by a condition", &mut || {
        server.json(&format!(
            "api/pairs?sort=margin&where={}",
            encoded("margin > 0.9 and chosen like '%star%'")
        ));
    });
    took("filter by words", &mut || {
        server.json(&format!("api/pairs?text={}", encoded("red star 77")));
    });
    let id = server.json("api/pairs?sort=margin&desc=1&limit=1")["rows"][0]["prompt_id"].clone();
    let id = id.as_str().unwrap();
    took("a prompt's life", &mut || {
        server.json(&format!("api/prompt?id={id}"));
    });
    took("prompts like it", &mut || {
        server.json(&format!("api/similar?id={id}"));
    });
    took("all charts", &mut || {
        for chart in server.json("api/charts")["charts"].as_array().unwrap() {
            server.json(&format!(
                "api/chart?id={}",
                encoded(chart["id"].as_str().unwrap())
            ));
        }
    });
    println!(
        "peak memory of the server: {} MB",
        server.peak_memory() >> 20
    );
}

/// Not a test: the pictures of `examples/VIEW.md`.
#[test]
#[ignore = "draws the pictures of examples/VIEW.md; see `make screenshots`"]
fn screenshots() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scene = Scene::new();
    let run = root.join("runs/small-world");
    let server = Server::open(&scene, &[run.to_str().unwrap()]);
    let browser = Chromium::start();
    let to = root.join("examples/view");
    std::fs::create_dir_all(&to).unwrap();
    let sql = "select image_ids, prompt, chosen, rejected, margin from pairs where round = 3 order by margin desc limit 6";
    let id =
        server.json("api/pairs?round=2&sort=margin&desc=1&limit=1")["rows"][0]["prompt_id"].clone();
    let loaded = "[...document.images].every(one => one.complete || one.getBoundingClientRect().top > innerHeight) \
        && document.querySelector('[data-waiting]') === null";
    for (name, fragment, height) in [
        (
            "pairs",
            "#/pairs?run=0&round=3&sort=margin&desc=1".to_owned(),
            760,
        ),
        (
            "prompt",
            format!("#/prompt?run=0&id={}", id.as_str().unwrap()),
            900,
        ),
        ("rounds", "#/rounds?runs=0".to_owned(), 1400),
        ("graph", "#/graph?run=0".to_owned(), 620),
        ("sql", format!("#/sql?run=0&q={}", encoded(sql)), 700),
    ] {
        let page = view(
            &browser,
            &server,
            &fragment,
            "document.querySelector('[data-view]') !== null",
        );
        page.size(1280, height);
        page.until(loaded);
        std::thread::sleep(std::time::Duration::from_millis(1500));
        page.until(loaded);
        page.screenshot(to.join(format!("{name}.png")));
    }
}
