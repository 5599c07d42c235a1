//! The charts of the page: each is a query that anyone can read and repeat.

use serde_json::{Value, json};

use super::apart::{self, Query};
use super::asked::{Asked, Problem};
use super::runs::{Runs, Snapshot};
use super::sql;
use ovchat_data::store::TableVersion;
use ovchat_data::tables::{Candidate, Comparison, DpoStep, Pair, Reward, Row, SftStep};
use ovchat_query::identifier;

/// The most points of a curve, and about the number of those of a scatter plot.
const POINTS: u64 = 300;
const DOTS: f64 = 2000.0;

/// The most rows of a chart.
const ROWS_MAX: usize = 5000;

/// The beginning of the IDs of views.
const REPORT: &str = "report:";

/// A chart.
struct Chart {
    id: String,
    title: String,
    help: &'static str,
    sql: String,
    kind: &'static str,
    x: &'static str,
    y: Vec<&'static str>,
    series: Option<&'static str>,
}

impl Chart {
    fn as_json(&self) -> Value {
        json!({
            "id": self.id, "title": self.title, "help": self.help, "sql": self.sql, "kind": self.kind,
            "x": self.x, "y": self.y, "series": self.series, "unit": null,
        })
    }
}

/// Returns the charts that a run has.
pub fn list(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let snapshot = runs.of(asked)?.now()?;
    let charts = charts(&snapshot);
    let charts = charts.iter().map(Chart::as_json);
    Ok(json!({ "charts": charts.collect::<Vec<_>>() }))
}

/// Returns the rows of a chart.
pub fn rows(runs: &Runs, asked: &Asked) -> Result<Value, Problem> {
    let snapshot = runs.of(asked)?.now()?;
    let id = asked.needed("id")?;
    let charts = charts(&snapshot);
    let chart = charts.iter().find(|chart| chart.id == id);
    let chart = chart.ok_or_else(|| Problem::Missing(format!("there is no chart `{id}`")))?;
    let found = if id.starts_with(REPORT) {
        // The pipeline's own query.
        let query = Query::Rows {
            sql: chart.sql.clone(),
            limit: ROWS_MAX,
        };
        apart::run(runs, &runs.of(asked)?.folder, asked, query)?
    } else {
        sql::table(runs, asked, &chart.sql, ROWS_MAX)?
    };
    let columns = found["columns"].as_array().into_iter().flatten();
    let columns: Vec<&Value> = columns.map(|column| &column["name"]).collect();
    Ok(json!({ "columns": columns, "rows": found["rows"] }))
}

fn charts(snapshot: &Snapshot) -> Vec<Chart> {
    let mut charts = Vec::new();
    for view in snapshot.views() {
        charts.push(Chart {
            id: format!("{REPORT}{}", view.name),
            title: format!("report: {}", view.name),
            help: "A view of the pipeline's `report`.",
            sql: view.query,
            kind: "table",
            x: "",
            y: Vec::new(),
            series: None,
        });
    }
    let last = |kind: &'static str| -> Vec<&TableVersion> {
        let names = snapshot.names(kind);
        let versions = names.iter().filter_map(|name| {
            let of_name = snapshot.of_kind(kind).filter(|made| made.table == *name);
            of_name.max_by_key(|made| made.round)
        });
        versions.filter(|made| made.round.is_some()).collect()
    };
    for rewards in last(Reward::KIND) {
        charts.extend(of_rewards(snapshot, rewards));
    }
    for pairs in last(Pair::KIND) {
        charts.extend(of_pairs(pairs));
    }
    charts.extend(of_judges(snapshot, &last(Reward::KIND)));
    for made in last(Comparison::KIND) {
        let table = identifier(&made.table);
        charts.push(Chart {
            id: format!("agreement:{}", made.table),
            title: format!("judge and labels: {}", made.table),
            help: "The share of pairs on which the judge agrees with the label, and of those whose verdict flips when \
                   the answers are shown in the other order.",
            sql: format!(
                "select round, avg(case when agrees then 1.0 else 0.0 end) as agrees, \
                 avg(case when flips then 1.0 when not flips then 0.0 end) as flips from {table} group by round order by round"
            ),
            kind: "lines",
            x: "round",
            y: vec!["agrees", "flips"],
            series: None,
        });
    }
    for made in last(DpoStep::KIND) {
        charts.extend(of_steps(
            snapshot,
            made,
            &[
                ("loss", "The DPO loss of each step, before its update."),
                (
                    "accuracy",
                    "The share of pairs whose chosen answer has the higher implicit reward.",
                ),
                (
                    "margin",
                    "The mean difference of the implicit rewards of chosen and rejected.",
                ),
                ("grad_norm", "The gradient norm before clipping."),
            ],
        ));
    }
    for made in last(SftStep::KIND) {
        charts.extend(of_steps(
            snapshot,
            made,
            &[("loss", "The mean cross-entropy of each step.")],
        ));
    }
    charts.extend(of_work());
    charts
}

/// Returns the charts of a table of rewards.
fn of_rewards(snapshot: &Snapshot, made: &TableVersion) -> Vec<Chart> {
    let table = identifier(&made.table);
    let mut charts = vec![
        Chart {
            id: format!("reward:{}", made.table),
            title: format!("mean reward: {}", made.table),
            help: "The mean reward of the answers of each round.",
            sql: format!(
                "select round, avg(reward) as reward from {table} group by round order by round"
            ),
            kind: "lines",
            x: "round",
            y: vec!["reward"],
            series: None,
        },
        Chart {
            id: format!("rewards:{}", made.table),
            title: format!("distribution of rewards: {}", made.table),
            help: "The number of answers by reward, in 24 bins.",
            sql: format!(
                "with ends as (select min(reward) as low, greatest(max(reward) - min(reward), 1e-6) / 24 as width from {table}) \
                 select round, low + width * least(floor((reward - low) / width), 23) as reward, count(*) as answers \
                 from {table}, ends group by 1, 2 order by 1, 2"
            ),
            kind: "histogram",
            x: "reward",
            y: vec!["answers"],
            series: Some("round"),
        },
    ];
    if let Some(answers) = snapshot.nearest(made, Candidate::KIND) {
        let of_table = snapshot
            .manifest()
            .made
            .iter()
            .filter(|other| other.table == made.table);
        let rows: f64 = of_table.map(|other| other.rows() as f64).sum();
        let share = (DOTS / rows.max(1.0)).min(1.0);
        // IDs are hashes, so those below a threshold are a random sample.
        let threshold = format!("{:08x}", (share * f64::from(u32::MAX)) as u32);
        charts.push(Chart {
            id: format!("length:{}", made.table),
            title: format!("length and reward: {}", made.table),
            help: "The reward of an answer over its length in tokens, for a random sample of the prompts.",
            sql: format!(
                "select r.round, cardinality(a.token_ids) as tokens, r.reward from {table} r join {} a \
                 on a.round = r.round and a.prompt_id = r.prompt_id and a.candidate = r.candidate \
                 where r.prompt_id <= '{threshold}' and a.prompt_id <= '{threshold}' limit 5000",
                identifier(&answers.table)
            ),
            kind: "scatter",
            x: "tokens",
            y: vec!["reward"],
            series: Some("round"),
        });
    }
    charts
}

/// Returns the charts of a table of pairs.
fn of_pairs(made: &TableVersion) -> Vec<Chart> {
    let table = identifier(&made.table);
    let by_round = |columns: &str| {
        format!("select round, {columns} from {table} group by round order by round")
    };
    let chart = |id: &str, title: &str, help, columns: &str, y| Chart {
        id: format!("{id}:{}", made.table),
        title: format!("{title}: {}", made.table),
        help,
        sql: by_round(columns),
        kind: "lines",
        x: "round",
        y,
        series: None,
    };
    vec![
        chart(
            "pairs",
            "rewards of pairs",
            "The mean rewards of the chosen and the rejected answers, and their difference.",
            "avg(chosen_reward) as chosen, avg(rejected_reward) as rejected, avg(margin) as margin",
            vec!["chosen", "rejected", "margin"],
        ),
        chart(
            "lengths",
            "lengths of pairs",
            "The mean lengths of the chosen and the rejected answers, in tokens.",
            "avg(cast(cardinality(chosen_token_ids) as double)) as chosen, \
             avg(cast(cardinality(rejected_token_ids) as double)) as rejected",
            vec!["chosen", "rejected"],
        ),
        chart(
            "number",
            "number of pairs",
            "The number of pairs.",
            "count(*) as pairs",
            vec!["pairs"],
        ),
    ]
}

/// Returns the charts of judges that scored the same answers.
fn of_judges(snapshot: &Snapshot, rewards: &[&TableVersion]) -> Vec<Chart> {
    let mut charts = Vec::new();
    for (at, one) in rewards.iter().enumerate() {
        for other in &rewards[at + 1..] {
            let answers = [one, other].map(|made| snapshot.nearest(made, Candidate::KIND));
            let [Some(first), Some(second)] = answers else {
                continue;
            };
            if !std::ptr::eq(first, second) {
                continue;
            }
            charts.push(Chart {
                id: format!("judges:{}:{}", one.table, other.table),
                title: format!("agreement of {} and {}", one.table, other.table),
                help: "The correlation of the rewards of two judges for the same answers.",
                sql: format!(
                    "select a.round, corr(a.reward, b.reward) as correlation from {} a join {} b \
                     on b.round = a.round and b.prompt_id = a.prompt_id and b.candidate = a.candidate \
                     group by a.round order by a.round",
                    identifier(&one.table),
                    identifier(&other.table)
                ),
                kind: "lines",
                x: "round",
                y: vec!["correlation"],
                series: None,
            });
        }
    }
    charts
}

/// Returns a curve for each column of a table of training steps.
fn of_steps(
    snapshot: &Snapshot,
    made: &TableVersion,
    columns: &[(&'static str, &'static str)],
) -> Vec<Chart> {
    let versions = snapshot
        .manifest()
        .made
        .iter()
        .filter(|other| other.table == made.table);
    let most = versions.map(TableVersion::rows).max().unwrap_or(1);
    let width = most.div_ceil(POINTS).max(1);
    let chart = |(column, help): &(&'static str, &'static str)| Chart {
        id: format!("{column}:{}", made.table),
        title: format!("{}: {}", column.replace('_', " "), made.table),
        help,
        sql: format!(
            "select round, min(step) as step, avg({column}) as {column} from {} \
             group by round, (step - 1) / {width} order by 1, 2",
            identifier(&made.table)
        ),
        kind: "lines",
        x: "step",
        y: vec![column],
        series: Some("round"),
    };
    columns.iter().map(chart).collect()
}

/// Returns the charts of time, tokens and rejects.
fn of_work() -> Vec<Chart> {
    vec![
        Chart {
            id: "time".to_owned(),
            title: "time by phase".to_owned(),
            help: "The seconds that the networks of each stage took, by phase, in all rounds. The time for images runs beside the rest.",
            sql: "select stage, sum(seconds_tower) as tower, sum(seconds_prefill) as prefill, \
                  sum(seconds_decode) as answers, sum(seconds_waiting) as waiting from telemetry group by stage order by stage"
                .to_owned(),
            kind: "bars",
            x: "stage",
            y: vec!["tower", "prefill", "answers", "waiting"],
            series: None,
        },
        Chart {
            id: "tokens".to_owned(),
            title: "tokens".to_owned(),
            help: "The tokens that the networks of each stage processed, in all rounds.",
            sql: "select stage, sum(prompt_tokens) as prompt, sum(shared_tokens) as cached, sum(answer_tokens) as answer \
                  from telemetry group by stage order by stage"
                .to_owned(),
            kind: "bars",
            x: "stage",
            y: vec!["prompt", "cached", "answer"],
            series: None,
        },
        Chart {
            id: "rejects".to_owned(),
            title: "rejects by reason".to_owned(),
            help: "The rows that stages left out, with the reason.",
            sql: "select stage, round, class, reason, count(*) as rows from rejects group by stage, round, class, reason \
                  order by rows desc limit 50"
                .to_owned(),
            kind: "table",
            x: "",
            y: Vec::new(),
            series: None,
        },
    ]
}
