//! The `measure` stage: the scores of models on a benchmark, and the gain of each over a base model.

mod interval;
#[cfg(test)]
mod parity;
mod scores;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::interval::uncertainty;
use self::scores::{Item, SCORE, Scoring, as_written};
pub use self::scores::{Rules, ScoreRule};
use super::image_marks::image_marks;
use super::{
    ComputeStage, Failure, Input, Positive, Stage, StageError, StageKind, TableName, WholeTables,
};
use ovchat_data::store::Key;
use ovchat_data::tables::{Kept, Measured, Prompt, PromptVideo, Reward, Row, rows};

/// Measures models on a benchmark: the score of each, and the gain over a base model with its 95 %
/// confidence interval. Items about the same image, by its pixels, are one cluster of the interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// The name of the benchmark, as reports show it.
    pub benchmark: String,
    /// The name of the family of models, such as `7b`. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// The tables of rewards, by the names of the models whose answers they score: `{ base: …, chat:
    /// … }`.
    pub rewards: BTreeMap<String, TableName>,
    /// The model that the others are compared with. Default: `base`.
    #[serde(default = "Measure::usual_base")]
    pub base: String,
    /// The score: `mean`, `wins` or `ratio`.
    ///
    /// `mean` is the mean reward times `factor`; `wins` the percentage of rewards above 0, where 0 is
    /// half a win; `ratio` the mean `second_score` as a percentage of the mean `first_score`.
    pub score: ScoreRule,
    /// The factor of `score: mean`. Default: 1.
    #[serde(default = "Measure::one")]
    pub factor: Positive,
    /// The rules for items without a readable verdict: `lmms_eval` or `strict`. Default: `lmms_eval`.
    ///
    /// `lmms_eval` counts what the judge's `unreadable` says and rounds as lmms-eval does; `strict`
    /// leaves such items out and does not round. Both count failures in the column `failures`.
    #[serde(default)]
    pub rules: Rules,
    /// A kept column of the prompts; each of its values gets scores of its own. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// The judge, as reports show it. Default: the model that its endpoint serves, or the name of its
    /// weights, or else its name in this pipeline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    /// The table of prompts. Default: found through `rewards`.
    #[serde(default)]
    pub prompts: Option<TableName>,
}

impl Measure {
    fn usual_base() -> String {
        "base".to_owned()
    }

    fn one() -> Positive {
        Positive::try_from(1.0).expect("1 is above 0")
    }
}

impl Stage for Measure {
    fn inputs(&self) -> Vec<Input<'_>> {
        let rewards = self.rewards.values().map(|table| Input {
            field: "rewards",
            table: Some(table),
            needs: Verdict::schema(),
            kind: Reward::KIND,
        });
        let prompts = Input {
            field: "prompts",
            table: self.prompts.as_ref(),
            needs: Prompt::schema(),
            kind: Prompt::KIND,
        };
        rewards.chain([prompts]).collect()
    }

    fn find(&mut self, field: &str, table: TableName) {
        if field == "prompts" {
            self.prompts = Some(table);
        }
    }

    fn kind(&self) -> Option<&'static str> {
        Some(Measured::KIND)
    }

    fn output(&self, _: &[(TableName, SchemaRef)]) -> Result<SchemaRef, StageError> {
        if !self.rewards.contains_key(&self.base) && self.rewards.len() > 1 {
            let names: Vec<String> = self
                .rewards
                .keys()
                .map(|name| format!("`{name}`"))
                .collect();
            let message = format!("there is no model `{}` to compare with", self.base);
            let help = format!("set `base` to one of {}", names.join(", "));
            return Err(StageError::at("base", message, help));
        }
        Ok(Measured::schema())
    }

    fn work(&self) -> StageKind<'_> {
        StageKind::Compute(Box::new(self))
    }
}

rows! {
    /// The columns of a reward that a score depends on.
    pub struct Verdict: "verdict" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The name of the judge.
        pub judge: String,
        /// The reward.
        pub reward: f32,
        /// The name of the verdict.
        pub label: Option<String>,
        /// The score of the other answer.
        pub first_score: Option<f32>,
        /// The score of the answer.
        pub second_score: Option<f32>,
        /// The reason why the reward is a substitute.
        pub failure: Option<String>,
    }
}

rows! {
    /// The columns of a prompt that a score depends on.
    pub struct MeasuredPrompt: "measured prompt" => {
        /// The prompt's id.
        pub prompt_id: String,
        /// The ids of its images.
        pub image_ids: Vec<String>,
        /// Its videos.
        pub videos: Option<Vec<PromptVideo>>,
        /// The kept columns.
        pub kept: Option<Kept>,
    }
}

/// The verdicts on a model's answers, and the judges that gave them.
struct ModelItems {
    items: HashMap<String, Item>,
    /// The public name of the judge.
    judge: Option<String>,
    /// The names of the judges in this pipeline.
    judges: BTreeSet<String>,
}

/// The prompts of a benchmark, with the cluster of each.
struct Benchmark {
    prompts: Vec<MeasuredPrompt>,
    clusters: Vec<usize>,
}

impl ComputeStage for &Measure {
    fn compute(&self, tables: &WholeTables<'_>) -> Result<RecordBatch, Failure> {
        let table = self.prompts.as_ref().expect("the plan found the prompts");
        let prompts: Vec<MeasuredPrompt> = tables.rows(table)?;
        let benchmark = Benchmark {
            clusters: clusters(tables, &prompts)?,
            prompts,
        };
        let mut models = BTreeMap::new();
        for (name, table) in &self.rewards {
            models.insert(name.as_str(), self.items(tables, name, table, &benchmark)?);
        }
        let mut groups: Vec<(Option<String>, Vec<usize>)> =
            vec![(None, (0..benchmark.prompts.len()).collect())];
        if let Some(by) = &self.by {
            let mut found: BTreeMap<String, Vec<usize>> = BTreeMap::new();
            for (number, prompt) in benchmark.prompts.iter().enumerate() {
                let kept = prompt.kept.iter().flat_map(|kept| &kept.0);
                let value = kept.into_iter().find(|(name, _)| name == by);
                // A prompt without a value is in no category.
                if let Some((_, value)) = value {
                    found.entry(value.clone()).or_default().push(number);
                }
            }
            if found.is_empty() && !benchmark.prompts.is_empty() {
                return Err(Failure::Other(format!(
                    "no prompt of table `{table}` has a kept column `{by}`; add it to `keep` of the loading stage"
                )));
            }
            groups.extend(
                found
                    .into_iter()
                    .map(|(value, numbers)| (Some(value), numbers)),
            );
        }
        let mut rows = Vec::new();
        let mut names: Vec<&str> = models.keys().copied().collect();
        names.sort_by_key(|name| *name != self.base);
        for (group, numbers) in &groups {
            for name in &names {
                rows.extend(self.measured(&benchmark, &models, name, group.as_deref(), numbers));
            }
        }
        Ok(Measured::to_batch(&rows))
    }
}

impl Measure {
    fn scoring(&self) -> Scoring {
        Scoring {
            rule: self.score,
            factor: self.factor.get(),
            rules: self.rules,
        }
    }

    /// Returns the verdicts on a model's answers. Several answers to a prompt count as their mean.
    fn items(
        &self,
        tables: &WholeTables<'_>,
        name: &str,
        table: &TableName,
        benchmark: &Benchmark,
    ) -> Result<ModelItems, Failure> {
        let mut found: HashMap<String, Vec<Item>> = HashMap::new();
        let mut judges = BTreeSet::new();
        tables.each(table, |verdict: Verdict| {
            let scores = verdict.first_score.zip(verdict.second_score);
            let item = Item {
                value: as_written(verdict.reward),
                scores: scores.map(|(first, second)| [first, second].map(as_written)),
                label: verdict.label,
                is_failure: verdict.failure.is_some(),
            };
            judges.insert(verdict.judge);
            found.entry(verdict.prompt_id).or_default().push(item);
            Ok(())
        })?;
        let known: HashSet<&str> = benchmark
            .prompts
            .iter()
            .map(|prompt| &*prompt.prompt_id)
            .collect();
        let foreign = found
            .keys()
            .filter(|id| !known.contains(id.as_str()))
            .count();
        if foreign > 0 {
            return Err(Failure::Other(format!(
                "{foreign} of {} answers of `{name}` (table `{table}`) are to other prompts than those of this \
                 benchmark; score answers to the same prompts",
                found.len()
            )));
        }
        if self.score == ScoreRule::Ratio
            && let Some((id, _)) = found.iter().find(|(_, items)| {
                items
                    .iter()
                    .any(|item| item.scores.is_none() && !item.is_failure)
            })
        {
            return Err(Failure::Other(format!(
                "`score: ratio` needs two scores, but table `{table}` has none for prompt {id}; use a judge \
                 whose `verdict` has `first` and `second`"
            )));
        }
        let items = found.into_iter().map(|(id, items)| (id, together(items)));
        Ok(ModelItems {
            items: items.collect(),
            judge: tables.judges.get(table).cloned(),
            judges,
        })
    }

    /// Returns the rows of a model for the prompts with these numbers.
    fn measured(
        &self,
        benchmark: &Benchmark,
        models: &BTreeMap<&str, ModelItems>,
        name: &str,
        group: Option<&str>,
        numbers: &[usize],
    ) -> Vec<Measured> {
        let scoring = self.scoring();
        let model = &models[name];
        let item = |model: &'_ ModelItems, number: &usize| {
            model
                .items
                .get(&benchmark.prompts[*number].prompt_id)
                .cloned()
        };
        let items: Vec<Item> = numbers
            .iter()
            .filter_map(|number| item(model, number))
            .collect();
        let readable = items.iter().filter(|item| item.is_readable()).count();
        let counted = scoring.counted(items.iter());
        let judges: Vec<&str> = model.judges.iter().map(String::as_str).collect();
        let judge = self
            .judge
            .clone()
            .or_else(|| model.judge.clone())
            .or((!judges.is_empty()).then(|| judges.join("+")));
        let row = |(metric, score): (String, Option<f64>)| {
            let key = Key::new("result").with(&self.benchmark);
            let key = key
                .with(self.family.as_deref().unwrap_or_default())
                .with(name);
            let mut key = key.with(&metric).with(group.unwrap_or_default());
            if group == Some("") {
                key = key.with("no text");
            }
            Measured {
                row_key: key.finish(),
                benchmark: self.benchmark.clone(),
                family: self.family.clone(),
                model: name.to_owned(),
                metric,
                category: group.map(str::to_owned),
                score,
                n: Some(counted.len() as i64),
                items: Some(numbers.len() as i64),
                failures: Some((numbers.len() - readable) as i64),
                judge: judge.clone(),
                rules: Some(self.rules.name().to_owned()),
                base: None,
                delta: None,
                delta_se: None,
                delta_low: None,
                delta_high: None,
                pairs: None,
                clusters: None,
                is_published: false,
            }
        };
        let mut rows: Vec<Measured> = scoring.metrics(&counted).into_iter().map(row).collect();
        if let Some(base) = models.get(self.base.as_str()).filter(|_| name != self.base)
            && let Some(own) = rows.iter_mut().find(|row| row.metric == SCORE)
        {
            let both = numbers.iter().filter_map(|number| {
                let (one, other) = (item(model, number)?, item(base, number)?);
                let is_pair = one.is_readable() && other.is_readable();
                is_pair.then_some((one, other, benchmark.clusters[*number]))
            });
            let both: Vec<(Item, Item, usize)> = both.collect();
            self.compare(own, &both);
        }
        rows
    }

    /// Adds the gain over the base model to a row.
    fn compare(&self, row: &mut Measured, both: &[(Item, Item, usize)]) {
        let one: Vec<&Item> = both.iter().map(|(one, _, _)| one).collect();
        let other: Vec<&Item> = both.iter().map(|(_, other, _)| other).collect();
        row.base = Some(self.base.clone());
        row.pairs = Some(both.len() as i64);
        let mut numbers: HashMap<usize, usize> = HashMap::new();
        let clusters: Vec<usize> = both
            .iter()
            .map(|(_, _, cluster)| {
                let next = numbers.len();
                *numbers.entry(*cluster).or_insert(next)
            })
            .collect();
        row.clusters = Some(numbers.len() as i64);
        let Some((delta, values)) = self.scoring().gain(&one, &other) else {
            return;
        };
        let found = uncertainty(&values, &clusters, numbers.len());
        row.delta = Some(delta);
        row.delta_se = found.se;
        row.delta_low = found.half_width.map(|half| delta - half);
        row.delta_high = found.half_width.map(|half| delta + half);
    }
}

/// Returns the mean of the verdicts on several answers to one prompt.
fn together(mut items: Vec<Item>) -> Item {
    if items.len() == 1 {
        return items.remove(0);
    }
    let count = items.len() as f64;
    let mean = |value: &dyn Fn(&Item) -> f64| items.iter().map(value).sum::<f64>() / count;
    let score = |answer: usize| mean(&|item| item.scores.map_or(f64::NAN, |scores| scores[answer]));
    Item {
        value: mean(&|item| item.value),
        scores: items
            .iter()
            .all(|item| item.scores.is_some())
            .then(|| [score(0), score(1)]),
        label: None,
        is_failure: items.iter().any(|item| item.is_failure),
    }
}

/// Returns the cluster of each prompt: those that share an image, by its pixels, or a video, also by way
/// of others.
fn clusters(tables: &WholeTables<'_>, prompts: &[MeasuredPrompt]) -> Result<Vec<usize>, Failure> {
    let wanted = prompts.iter().flat_map(|prompt| &prompt.image_ids).cloned();
    let marks = image_marks(tables, &wanted.collect())?;
    // The prompts form trees, one for each cluster; `above` leads to the root.
    let mut above: Vec<usize> = (0..prompts.len()).collect();
    fn root(above: &mut [usize], mut at: usize) -> usize {
        while above[at] != at {
            above[at] = above[above[at]];
            at = above[at];
        }
        at
    }
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (number, prompt) in prompts.iter().enumerate() {
        let images = prompt.image_ids.iter();
        let pixels = images.map(|id| {
            marks
                .get(id)
                .map_or_else(|| id.clone(), |marks| marks.pixels.clone())
        });
        let videos = prompt.videos.iter().flatten();
        for shown in pixels.chain(videos.map(|video| video.video_id.clone())) {
            let first = *seen.entry(shown).or_insert(number);
            let [one, other] = [first, number].map(|at| root(&mut above, at));
            above[other.max(one)] = other.min(one);
        }
    }
    Ok((0..prompts.len())
        .map(|number| root(&mut above, number))
        .collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::test_pipeline::{TestPipeline, prompt, reward, stage};
    use super::*;

    fn verdict(prompt_id: &str, first: f32, second: f32) -> Reward {
        Reward {
            first_score: Some(first),
            second_score: Some(second),
            label: Some(if second > first { "better" } else { "worse" }.to_owned()),
            ..reward(prompt_id, 0, second - first)
        }
    }

    fn pipeline() -> TestPipeline {
        let mut pipeline = TestPipeline::new();
        let one = pipeline.image(b"P6 1 1 255 abc");
        let same = pipeline.image(b"P6\n1 1\n255\nabc");
        let other = pipeline.image(b"P6 1 1 255 abd");
        let about = |id: &str, image: &str, category: &str| Prompt {
            image_ids: vec![image.to_owned()],
            kept: Some(Kept(vec![("category".to_owned(), category.to_owned())])),
            ..prompt(id, "Why?")
        };
        let prompts = [
            about("a", &one, "conv"),
            about("b", &same, "detail"),
            about("c", &other, "conv"),
            about("d", &other, "conv"),
        ];
        pipeline.table("prompts", &prompts);
        let base = [
            verdict("a", 8.0, 6.0),
            verdict("b", 8.0, 8.0),
            verdict("c", 8.0, 7.0),
        ];
        pipeline.table("base", &base);
        let failed = Reward {
            failure: Some("no verdict found".to_owned()),
            ..verdict("c", -1.0, -1.0)
        };
        let chat = [verdict("a", 8.0, 9.0), verdict("b", 8.0, 9.0), failed];
        pipeline.table("chat", &chat);
        pipeline
    }

    fn measured(settings: serde_json::Value) -> Result<Vec<Measured>, Failure> {
        let mut all = json!({"benchmark": "B", "prompts": "prompts", "rewards": {"base": "base", "chat": "chat"}});
        let more = settings.as_object().unwrap().clone();
        all.as_object_mut().unwrap().extend(more);
        let rows = pipeline().compute(&stage::<Measure>(all))?;
        Ok(Measured::from_batch(&rows).unwrap())
    }

    fn of<'r>(
        rows: &'r [Measured],
        model: &str,
        metric: &str,
        group: Option<&str>,
    ) -> &'r Measured {
        let is_it = |row: &&Measured| {
            row.model == model && row.metric == metric && row.category.as_deref() == group
        };
        rows.iter().find(is_it).unwrap()
    }

    #[test]
    fn items_about_the_same_pixels_are_one_cluster_and_failures_leave_the_pairs() {
        let rows = measured(json!({"score": "ratio", "rules": "strict"})).unwrap();
        let base = of(&rows, "base", "score", None);
        assert_eq!(
            (base.n, base.failures, base.delta),
            (Some(3), Some(1), None)
        );
        assert!((base.score.unwrap() - 87.5).abs() < 1e-9);
        let chat = of(&rows, "chat", "score", None);
        assert_eq!((chat.n, chat.failures), (Some(2), Some(2)));
        assert_eq!((chat.pairs, chat.clusters), (Some(2), Some(1)));
        assert!((chat.delta.unwrap() - (112.5 - 87.5)).abs() < 1e-9);
        assert_eq!((chat.delta_se, chat.delta_low), (None, None));
        assert_eq!(chat.judge.as_deref(), Some("judge"));
    }

    #[test]
    fn groups_and_labels_have_rows_of_their_own() {
        let rows = measured(json!({"score": "wins", "by": "category", "judge": "gpt"})).unwrap();
        assert_eq!(of(&rows, "chat", "score", None).score, Some(83.33));
        assert_eq!(
            of(&rows, "chat", "score", Some("detail")).score,
            Some(100.0)
        );
        assert_eq!(of(&rows, "base", "label worse", None).score, Some(100.0));
        assert_eq!(of(&rows, "base", "win_rate", Some("conv")).score, Some(0.0));
        assert_eq!(rows[0].judge.as_deref(), Some("gpt"));
        assert_eq!(rows[0].model, "base");
    }

    #[test]
    fn items_that_share_an_image_by_way_of_others_are_one_cluster() {
        let mut pipeline = pipeline();
        let [one, two, three] =
            [1, 2, 3].map(|n| pipeline.image(format!("P6 1 1 255 xy{n}").as_bytes()));
        let about = |id: &str, images: &[&String]| Prompt {
            image_ids: images.iter().map(|&image| image.clone()).collect(),
            ..prompt(id, "Why?")
        };
        let prompts = [
            about("a", &[&one]),
            about("b", &[&three]),
            about("c", &[&two, &one]),
            about("d", &[]),
            about("e", &[&three, &two]),
            about("f", &[]),
        ];
        pipeline.table("prompts", &prompts);
        let verdicts: Vec<Reward> = ["a", "b", "c", "d", "e", "f"]
            .map(|id| verdict(id, 1.0, 2.0))
            .into();
        pipeline.table("base", &verdicts);
        pipeline.table("chat", &verdicts);
        let settings = json!({"benchmark": "B", "prompts": "prompts", "score": "ratio",
            "rewards": {"base": "base", "chat": "chat"}});
        let rows = pipeline.compute(&stage::<Measure>(settings)).unwrap();
        let rows = Measured::from_batch(&rows).unwrap();
        let chat = of(&rows, "chat", "score", None);
        assert_eq!((chat.pairs, chat.clusters), (Some(6), Some(3)));
    }

    #[test]
    fn tables_that_do_not_fit_the_benchmark_are_refused() {
        let told = measured(json!({"score": "mean", "by": "level"}))
            .unwrap_err()
            .to_string();
        assert!(told.contains("has a kept column `level`"), "{told}");
        let mut pipeline = pipeline();
        pipeline.table("chat", &[reward("a", 0, 1.0), reward("x", 0, 1.0)]);
        let settings = |score: &str| {
            stage::<Measure>(
                json!({"benchmark": "B", "prompts": "prompts", "score": score,
                "rewards": {"base": "base", "chat": "chat"}}),
            )
        };
        let told = pipeline.compute(&settings("mean")).unwrap_err().to_string();
        assert!(told.starts_with("1 of 2 answers of `chat`"), "{told}");
        pipeline.table("chat", &[reward("a", 0, 1.0)]);
        let told = pipeline
            .compute(&settings("ratio"))
            .unwrap_err()
            .to_string();
        assert!(told.contains("needs two scores"), "{told}");
        let lost = stage::<Measure>(json!({"benchmark": "B", "base": "bse", "score": "mean",
            "rewards": {"base": "base", "chat": "chat"}}));
        let error = lost.output(&[]).unwrap_err();
        assert_eq!(error.message, "there is no model `bse` to compare with");
    }
}
