//! `pipeline pairs`: try a pairing strategy on existing rewards.

use std::path::PathBuf;

use clap::Args;
use serde::Deserialize as _;
use serde::de::IntoDeserializer;
use serde_json::{Map, Value, json};

use super::failed::Failed;
use super::file::{read_run, run_folder};
use super::out::{Out, line};
use super::rows::{Format, RowFormat};
use super::sql::show;
use ovchat_data::store::{RunFolder, TableVersion};
use ovchat_data::tables::{Candidate, Pair, Reward, Row, schema_of};
use ovchat_pipeline::stages::{Pairs, SelectPairs};
use ovchat_query::QueryTable;

/// Try a pairing strategy on the rewards of a run, in seconds and without changing the run. Prints
/// the number of pairs, their margins, how much longer the chosen responses are, and how many of
/// the pairs the run already has.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  pipeline pairs runs/small-world --strategy best_second\n  \
    pipeline pairs runs/small-world --strategy all_pairs --set margin_min=0.5 --set pairs_max=3"
)]
pub struct ShowPairs {
    /// The run: its folder, or its name below runs/.
    run: PathBuf,
    /// The strategy: best_worst, best_second, best_random or all_pairs.
    #[arg(long)]
    strategy: String,
    /// A setting of `select_pairs`: --set length_ratio_max=1.5 (can be repeated).
    #[arg(long = "set", value_name = "SETTING=VALUE")]
    sets: Vec<String>,
    /// The round [default: the last one with rewards].
    #[arg(long)]
    round: Option<u32>,
    /// The table of rewards.
    #[arg(long, default_value = "rewards")]
    rewards: String,
    /// The table of candidates that were scored.
    #[arg(long, default_value = "candidates")]
    candidates: String,
    /// The table of pairs to compare with.
    #[arg(long, default_value = "pairs")]
    pairs: String,
    #[command(flatten)]
    rows: RowFormat,
}

/// The queries for the statistics of all pairs, and for the reasons why prompts yield none;
/// `{picked}` stands for the selection.
const SUMMARY: &str = "
    select count(*) as pairs, count(distinct p.prompt_id) as prompts,
           round(avg(p.margin), 4) as margin_mean, round(min(p.margin), 4) as margin_min,
           round(max(p.margin), 4) as margin_max,
           round(avg(c.tokens), 1) as chosen_tokens, round(avg(r.tokens), 1) as rejected_tokens,
           round(avg(case when c.tokens > r.tokens then 1.0 else 0.0 end), 3) as chosen_longer,
           sum(case when o.prompt_id is not null then 1 else 0 end) as as_now
    from ({picked}) p
    join (select prompt_id, candidate, array_length(token_ids) as tokens from {candidates}) c
        on c.prompt_id = p.prompt_id and c.candidate = p.chosen_candidate
    join (select prompt_id, candidate, array_length(token_ids) as tokens from {candidates}) r
        on r.prompt_id = p.prompt_id and r.candidate = p.rejected_candidate
    left join {pairs} o on o.prompt_id = p.prompt_id
        and o.chosen_candidate = p.chosen_candidate and o.rejected_candidate = p.rejected_candidate
    where p.reason is null";
const REASONS: &str = "
    select p.reason as without_pairs, count(*) as prompts from ({picked}) p where p.reason is not null
    group by p.reason order by prompts desc";

impl ShowPairs {
    pub fn run(&self) -> Result<(), Failed> {
        if self.rows.is_binary() {
            return Err(Failed::Usage(
                "two results do not fit in one file; use --format table, markdown, csv, json or jsonl"
                    .to_owned(),
            ));
        }
        let run = read_run(&run_folder(&self.run))?;
        let stage = self.stage()?;
        let rewards = Self::find(&run, &self.rewards, Reward::KIND, self.round)?;
        let candidates = Self::find(&run, &self.candidates, Candidate::KIND, rewards.round)?;
        let mut tables = vec![table(&run, rewards)?, table(&run, candidates)?];
        // A run without pairs has none in common.
        let now = Self::find(&run, &self.pairs, Pair::KIND, rewards.round);
        tables.push(match now {
            Ok(made) => table(&run, made)?,
            Err(_) => QueryTable {
                name: self.pairs.clone(),
                schema: Pair::schema(),
                files: vec![(None, Vec::new())],
                with_round: false,
            },
        });
        let picked = stage
            .sql()
            .replace("{rewards}", &self.rewards)
            .replace("{candidates}", &self.candidates);
        let sql = |query: &str| {
            query
                .replace("{picked}", &picked)
                .replace("{candidates}", &self.candidates)
                .replace("{pairs}", &self.pairs)
        };
        let params = stage.params(0);
        if self.rows.format == Format::Json {
            let json = |query| -> Result<Value, Failed> {
                let text = show(&sql(query), &params, &tables, self.rows, Vec::new())?;
                Ok(serde_json::from_slice(&text).expect("the output is JSON"))
            };
            let (pairs, reasons) = (json(SUMMARY)?, json(REASONS)?);
            return line(json!({ "pairs": pairs[0], "without_pairs": reasons }));
        }
        for query in [SUMMARY, REASONS] {
            show(&sql(query), &params, &tables, self.rows, Out)?;
        }
        Ok(())
    }

    /// Returns the settings as a stage would have them.
    fn stage(&self) -> Result<SelectPairs, Failed> {
        let mut settings = Map::new();
        settings.insert("rewards".to_owned(), json!(self.rewards));
        settings.insert("candidates".to_owned(), json!(self.candidates));
        settings.insert("strategy".to_owned(), json!(self.strategy));
        for set in &self.sets {
            let (name, value) = set.split_once('=').ok_or_else(|| {
                Failed::Usage(format!(
                    "expected `SETTING=VALUE` (such as margin_min=0.5), got `{set}`"
                ))
            })?;
            let text = || Value::String(value.to_owned());
            let value = serde_json::from_str(value).unwrap_or_else(|_| text());
            settings.insert(name.to_owned(), value);
        }
        let stage = SelectPairs::deserialize(Value::Object(settings).into_deserializer());
        stage.map_err(|error| Failed::Usage(error.to_string()))
    }

    /// Returns the complete table with that name and kind, in the given round or the last one.
    fn find<'a>(
        run: &'a RunFolder,
        name: &str,
        kind: &str,
        round: Option<u32>,
    ) -> Result<&'a TableVersion, Failed> {
        // Tables of queries have no kind, but may have the columns.
        let of_kind = |made: &&TableVersion| {
            made.complete && made.kind.as_deref().is_none_or(|other| other == kind)
        };
        let made = run.manifest().made.iter().filter(of_kind);
        let named = made.clone().filter(|made| made.table == name);
        let named = named.filter(|made| round.is_none() || made.round == round);
        named.max_by_key(|made| made.round).ok_or_else(|| {
            let mut others: Vec<&str> = made.map(|made| made.table.as_str()).collect();
            others.dedup();
            Failed::Usage(format!(
                "{} has no complete table `{name}` of kind {kind}; found: {}",
                run.root().display(),
                if others.is_empty() {
                    "none".to_owned()
                } else {
                    others.join(", ")
                }
            ))
        })
    }
}

fn table(run: &RunFolder, made: &TableVersion) -> Result<QueryTable, Failed> {
    let schema = match made.kind.as_deref().and_then(schema_of) {
        Some(schema) => Some(schema),
        None => run.schema(&made.table, made.round)?,
    };
    let empty = || Failed::Words(format!("table `{}` has no rows", made.table));
    Ok(QueryTable {
        name: made.table.clone(),
        schema: schema.ok_or_else(empty)?,
        files: vec![(None, run.table_files(&made.table, made.round))],
        with_round: false,
    })
}
