//! The data files of a dataset on the hub: those of a configuration and a split.
//!
//! The rules are those of the hub: the front matter of the dataset's `README.md` lists configurations
//! with patterns of files (`configs`); without such a list, the names of files and folders tell.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use serde::Deserialize;

use ovchat_io::files;

/// The file that describes a dataset.
pub const README: &str = "README.md";

/// The endings of data files that can be read.
const ENDINGS: [&str; 4] = ["parquet", "json", "jsonl", "ndjson"];

/// The names of splits that are recognized without a README.
const SPLITS: [&str; 6] = ["train", "test", "validation", "val", "dev", "eval"];

/// The part of a dataset that is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DatasetPart<'a> {
    /// The configuration, which the hub also calls a subset.
    pub config: Option<&'a str>,
    pub split: Option<&'a str>,
}

/// The reason why no files were chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unchosen {
    /// No file is there; the dataset may have it all the same.
    Absent(String),
    /// The dataset has no such configuration or split.
    Wrong(String),
}

impl Unchosen {
    pub fn words(self) -> String {
        match self {
            Self::Absent(words) | Self::Wrong(words) => words,
        }
    }
}

/// The list of configurations in a README.
#[derive(Debug, Default, Deserialize)]
struct FrontMatter {
    #[serde(default)]
    configs: Vec<Config>,
}

#[derive(Debug, Deserialize)]
struct Config {
    config_name: String,
    #[serde(default)]
    data_files: Option<DataFiles>,
    #[serde(default)]
    data_dir: Option<String>,
    #[serde(default)]
    default: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum DataFiles {
    Patterns(Patterns),
    Splits(Vec<SplitFiles>),
}

#[derive(Debug, Deserialize)]
struct SplitFiles {
    split: String,
    path: Patterns,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Patterns {
    One(String),
    Several(Vec<String>),
}

impl Patterns {
    /// Returns the files that match a pattern, in the order of their names.
    fn of(&self, names: &[String], folder: Option<&str>) -> Result<Vec<String>, Unchosen> {
        let patterns = match self {
            Self::One(pattern) => std::slice::from_ref(pattern),
            Self::Several(patterns) => patterns,
        };
        let options = MatchOptions {
            require_literal_separator: true,
            ..MatchOptions::new()
        };
        let patterns = patterns.iter().map(|pattern| {
            let whole = match folder {
                Some(folder) => format!("{}/{pattern}", folder.trim_end_matches('/')),
                None => pattern.clone(),
            };
            Pattern::new(whole.trim_start_matches("./")).map_err(|error| {
                let words = format!("its {README} has the invalid pattern `{pattern}`: {error}");
                Unchosen::Wrong(words)
            })
        });
        let patterns: Vec<Pattern> = patterns.collect::<Result<_, _>>()?;
        let is_match = |name: &&String| patterns.iter().any(|one| one.matches_with(name, options));
        Ok(names.iter().filter(is_match).cloned().collect())
    }
}

/// Chooses the data files of a part among the files of a dataset; `readme` is the text of its README.
pub fn choose(
    names: &[String],
    readme: Option<&str>,
    part: DatasetPart<'_>,
) -> Result<Vec<String>, Unchosen> {
    let mut data: Vec<String> = names.iter().filter(|name| is_data(name)).cloned().collect();
    data.sort();
    let configs = readme.map(configs_of).unwrap_or_default();
    let chosen = if configs.is_empty() {
        by_name(&data, part)?
    } else {
        by_readme(&data, &configs, part)?
    };
    if let Some(missing) = missing_shard(&chosen) {
        return Err(Unchosen::Absent(format!("{missing} is missing")));
    }
    Ok(chosen)
}

fn is_data(name: &str) -> bool {
    let ending = Path::new(name)
        .extension()
        .and_then(|ending| ending.to_str());
    let is_hidden = name.split('/').any(|part| part.starts_with('.'));
    ending.is_some_and(|ending| ENDINGS.contains(&ending)) && !is_hidden
}

/// Returns the configurations of a README; none if it has no front matter, or an unreadable one.
fn configs_of(readme: &str) -> Vec<Config> {
    let front = readme
        .strip_prefix("---")
        .and_then(|rest| rest.split_once("\n---"));
    let read = front.and_then(|(front, _)| serde_yaml::from_str::<FrontMatter>(front).ok());
    read.unwrap_or_default().configs
}

fn by_readme(
    data: &[String],
    configs: &[Config],
    part: DatasetPart<'_>,
) -> Result<Vec<String>, Unchosen> {
    let names = || listed(configs.iter().map(|config| config.config_name.as_str()));
    let config = match part.config {
        Some(name) => configs.iter().find(|config| config.config_name == name),
        None if configs.len() == 1 => configs.first(),
        None => configs
            .iter()
            .find(|config| config.default || config.config_name == "default"),
    };
    let Some(config) = config else {
        return Err(Unchosen::Wrong(match part.config {
            Some(name) => format!(
                "no configuration `{name}`; set `config` to one of {}",
                names()
            ),
            None => format!("several configurations; set `config` to one of {}", names()),
        }));
    };
    let folder = config.data_dir.as_deref();
    let (splits, patterns): (Vec<&str>, Option<Patterns>) = match &config.data_files {
        // All files of the folder, by their names.
        None => {
            let within: Vec<String> = data
                .iter()
                .filter(|name| folder.is_none_or(|folder| Path::new(name).starts_with(folder)))
                .cloned()
                .collect();
            return by_name(
                &within,
                DatasetPart {
                    config: None,
                    ..part
                },
            );
        }
        Some(DataFiles::Patterns(patterns)) => (vec!["train"], Some(patterns.clone())),
        Some(DataFiles::Splits(files)) => {
            let splits = files.iter().map(|one| one.split.as_str()).collect();
            let wanted = match part.split {
                Some(split) => files.iter().find(|one| one.split == split),
                None => files.first().filter(|_| files.len() == 1),
            };
            (splits, wanted.map(|one| one.path.clone()))
        }
    };
    let is_there = part.split.is_none_or(|split| splits.contains(&split));
    let Some(patterns) = patterns.filter(|_| is_there) else {
        let splits = listed(splits.into_iter());
        return Err(Unchosen::Wrong(match part.split {
            Some(split) => format!("no split `{split}`; set `split` to one of {splits}"),
            None => format!("several splits; set `split` to one of {splits}"),
        }));
    };
    let chosen = patterns.of(data, folder)?;
    if chosen.is_empty() {
        return Err(Unchosen::Absent(format!(
            "no Parquet or JSON file of the configuration `{}` is there",
            config.config_name
        )));
    }
    Ok(chosen)
}

/// Chooses files by their names: the configuration is a folder, the split a folder or a word of the
/// file's name.
fn by_name(data: &[String], part: DatasetPart<'_>) -> Result<Vec<String>, Unchosen> {
    let in_config = |name: &&String| {
        part.config.is_none_or(|config| {
            let mut folders = name.split('/').rev().skip(1);
            folders.any(|folder| folder == config)
        })
    };
    let within: Vec<String> = data.iter().filter(in_config).cloned().collect();
    if within.is_empty() {
        let folders = data.iter().filter_map(|name| name.rsplit_once('/'));
        let folders: BTreeSet<&str> = folders.map(|(folder, _)| folder).collect();
        let there = match folders.is_empty() {
            true => String::new(),
            false => format!("; its folders are {}", listed(folders.into_iter())),
        };
        return Err(Unchosen::Absent(match part.config {
            Some(config) => format!("no data file of the configuration `{config}`{there}"),
            None => "no Parquet or JSON file".to_owned(),
        }));
    }
    let Some(split) = part.split else {
        let found: BTreeSet<&str> = SPLITS
            .into_iter()
            .filter(|split| within.iter().any(|name| has_word(name, split)))
            .collect();
        if found.len() > 1 {
            let splits = listed(found.into_iter());
            return Err(Unchosen::Wrong(format!(
                "several splits; set `split` to one of {splits}"
            )));
        }
        return Ok(within);
    };
    let chosen: Vec<String> = within
        .iter()
        .filter(|name| has_word(name, split))
        .cloned()
        .collect();
    if chosen.is_empty() {
        let files = listed(within.iter().take(5).map(String::as_str));
        return Err(Unchosen::Absent(format!(
            "no data file of the split `{split}`; there are {files}"
        )));
    }
    Ok(chosen)
}

/// True if a split is a folder of a path, or a word of its file's name: `data/test-0.parquet`.
fn has_word(name: &str, split: &str) -> bool {
    let (folders, file) = name.rsplit_once('/').unwrap_or(("", name));
    let stem = file.split('.').next().unwrap_or(file);
    let words = stem.split(['-', '_', ' ']);
    folders
        .split('/')
        .chain(words)
        .chain([stem])
        .any(|word| word == split)
}

/// Returns the first missing file of a series such as `test-00000-of-00002.parquet`.
fn missing_shard(chosen: &[String]) -> Option<String> {
    let there: BTreeSet<&str> = chosen.iter().map(String::as_str).collect();
    let mut series = BTreeSet::new();
    chosen.iter().find_map(|name| {
        let (before, count_on) = name.split_once("-of-")?;
        let (start, number) = before.rsplit_once('-')?;
        let digits = count_on
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(count_on.len());
        let (count, rest) = count_on.split_at(digits);
        let width = number.len();
        let count: u32 = count.parse().ok().filter(|count| *count < 100_000)?;
        if !series.insert((start, count, rest)) {
            return None;
        }
        let shards =
            (0..count).map(|shard| format!("{start}-{shard:0width$}-of-{count:0width$}{rest}"));
        shards
            .into_iter()
            .find(|shard| !there.contains(shard.as_str()))
    })
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

/// The file in the folder of a revision that lists the data files of the dataset, one name a line. It
/// tells a part that was not downloaded from one that the dataset does not have.
pub const LISTING: &str = ".ovchat-files";

/// True for a name that leads to a file below a folder.
pub fn stays_inside(name: &str) -> bool {
    name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Returns the data files of a part in the folder of a dataset.
pub fn files_in(folder: &Path, part: DatasetPart<'_>) -> Result<Vec<PathBuf>, Unchosen> {
    let mut names = Vec::new();
    collect(folder, "", 0, &mut names);
    if let Ok(listing) = files::read_to_string(&folder.join(LISTING)) {
        names.extend(
            listing
                .lines()
                .filter(|name| stays_inside(name))
                .map(str::to_owned),
        );
        names.sort();
        names.dedup();
    }
    let readme = files::read_to_string(&folder.join(README)).ok();
    let chosen = choose(&names, readme.as_deref(), part)?;
    if let Some(missing) = chosen.iter().find(|name| !folder.join(name).is_file()) {
        return Err(Unchosen::Absent(format!("{missing} is missing")));
    }
    Ok(chosen.iter().map(|name| folder.join(name)).collect())
}

/// The maximum depth of folders in a dataset.
const DEPTH_MAX: u32 = 8;

fn collect(folder: &Path, prefix: &str, depth: u32, names: &mut Vec<String>) {
    let entries = fs::read_dir(folder.join(prefix))
        .into_iter()
        .flatten()
        .flatten();
    for entry in entries {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let name = match prefix {
            "" => name,
            prefix => format!("{prefix}/{name}"),
        };
        let path = entry.path();
        if path.is_file() {
            names.push(name);
        } else if path.is_dir() && depth < DEPTH_MAX {
            collect(folder, &name, depth + 1, names);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part<'a>(config: &'a str, split: &'a str) -> DatasetPart<'a> {
        let given = |text: &'a str| Some(text).filter(|text| !text.is_empty());
        DatasetPart {
            config: given(config),
            split: given(split),
        }
    }

    fn chosen(
        names: &[&str],
        readme: Option<&str>,
        part: DatasetPart<'_>,
    ) -> Result<String, String> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let chosen = choose(&names, readme, part).map_err(Unchosen::words)?;
        Ok(chosen.join(" "))
    }

    const README_OF_TWO: &str = "---\nlicense: mit\nconfigs:\n- config_name: 2024-06\n  data_files:\n  \
        - split: test\n    path: 2024-06/test-*\n- config_name: 2024-07\n  data_files:\n  - split: test\n    \
        path: 2024-07/test-*\n---\n# Data\n";

    #[test]
    fn the_readme_says_which_files_a_configuration_has() {
        let names = [
            "README.md",
            "2024-06/test-00000-of-00002.parquet",
            "2024-06/test-00001-of-00002.parquet",
            "2024-07/test-00000-of-00001.parquet",
        ];
        let readme = Some(README_OF_TWO);
        let june = "2024-06/test-00000-of-00002.parquet 2024-06/test-00001-of-00002.parquet";
        assert_eq!(
            chosen(&names, readme, part("2024-06", "test")).unwrap(),
            june
        );
        assert_eq!(chosen(&names, readme, part("2024-06", "")).unwrap(), june);
        let wrong = chosen(&names, readme, part("2024-6", "test")).unwrap_err();
        assert_eq!(
            wrong,
            "no configuration `2024-6`; set `config` to one of `2024-06`, `2024-07`"
        );
        let wrong = chosen(&names, readme, part("", "test")).unwrap_err();
        assert!(wrong.starts_with("several configurations"), "{wrong}");
        let wrong = chosen(&names, readme, part("2024-06", "train")).unwrap_err();
        assert_eq!(wrong, "no split `train`; set `split` to one of `test`");
        let partly = chosen(&names[..2], readme, part("2024-06", "test")).unwrap_err();
        assert_eq!(partly, "2024-06/test-00001-of-00002.parquet is missing");
    }

    #[test]
    fn a_part_that_was_not_downloaded_is_missing_and_not_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        file("test.jsonl", "{}");
        let all = || files_in(folder.path(), DatasetPart::default()).map_err(Unchosen::words);
        assert_eq!(all().unwrap().len(), 1);
        file(LISTING, "test.jsonl\ntest-more.jsonl\n../../etc/test.jsonl");
        assert_eq!(all().unwrap_err(), "test-more.jsonl is missing");
        file("test-more.jsonl", "{}");
        assert_eq!(all().unwrap().len(), 2);
        file(LISTING, "test.jsonl\ntrain.jsonl");
        assert!(all().unwrap_err().starts_with("several splits"));
        let test = DatasetPart {
            split: Some("test"),
            ..DatasetPart::default()
        };
        assert_eq!(files_in(folder.path(), test).unwrap().len(), 2);
        let readme = "---\nconfigs:\n- config_name: a\n  data_files: data/a***.jsonl\n---\n";
        file(README, readme);
        let wrong = all().unwrap_err();
        assert!(
            wrong.contains("invalid pattern `data/a***.jsonl`"),
            "{wrong}"
        );
    }

    #[test]
    fn without_a_readme_names_tell() {
        let names = [
            "data/train-00000-of-00001-abc.parquet",
            "data/test-00000-of-00001.parquet",
        ];
        let one = |config, split| chosen(&names, None, part(config, split));
        assert_eq!(one("", "test").unwrap(), names[1]);
        assert_eq!(one("", "train").unwrap(), names[0]);
        assert!(one("", "").unwrap_err().starts_with("several splits"));
        assert!(
            one("", "dev")
                .unwrap_err()
                .contains("no data file of the split `dev`")
        );
        let folders = ["release/test500/0000.parquet", "other/test500/0000.parquet"];
        let found = chosen(&folders, None, part("release", "test500")).unwrap();
        assert_eq!(found, folders[0]);
        let missing = chosen(&folders, None, part("relase", "test500")).unwrap_err();
        assert!(
            missing.contains("its folders are `other/test500`, `release/test500`"),
            "{missing}"
        );
        assert_eq!(
            chosen(&["all.jsonl"], None, part("", "")).unwrap(),
            "all.jsonl"
        );
        assert!(chosen(&["a.zip"], None, part("", "")).is_err());
        // A README whose front matter cannot be read counts as none.
        let found = chosen(&folders[..1], Some("---\n: :\n---\n"), part("", "test500"));
        assert_eq!(found.unwrap(), folders[0]);
    }
}
