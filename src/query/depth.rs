//! How deep the tree of a query is, told by its tokens: before the parser builds it, for a tree that is
//! too deep ends the program.

use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

use super::QueryError;

/// How deep a tree may be.
const DEPTH_MAX: usize = 6_500;

/// What a table adds that stands beside others: planning takes memory by the square of their number.
const TABLE: usize = 20;

/// How often `not (` may stand within itself: the parser tries each twice.
const NOT_MAX: usize = 16;

/// Refuses a query that chains more terms than its thread has stack for. Parentheses within parentheses
/// are counted by the parser.
pub fn refuse_deep(sql: &str) -> Result<(), QueryError> {
    refuse_unread_numbers(sql)?;
    let (depth, nots) = depth(sql);
    if nots > NOT_MAX {
        return Err(QueryError(format!(
            "`not (` stands within itself {nots} times, and at most {NOT_MAX} can be read: two of them are none"
        )));
    }
    if depth <= DEPTH_MAX {
        return Ok(());
    }
    Err(QueryError(format!(
        "the query chains {depth} operators and keywords (a table counts {TABLE}), and at most {DEPTH_MAX} \
         can be computed: write `in (…)` for many `or`, `values` for many `union`, or put the values into \
         a table"
    )))
}

/// The digits that a number keeps.
const DIGITS_MAX: usize = 17;

/// Refuses numbers that would be read as others: `1_000` as 1, called `_000`; and those of more digits than are
/// kept.
fn refuse_unread_numbers(sql: &str) -> Result<(), QueryError> {
    let tokens = Tokenizer::new(&GenericDialect {}, sql).tokenize();
    let tokens = tokens.unwrap_or_default();
    for (index, token) in tokens.iter().enumerate() {
        let Token::Number(number, _) = token else {
            continue;
        };
        if let Some(Token::Word(word)) = tokens.get(index + 1) {
            return Err(QueryError(format!(
                "`{number}{word}` is no number: write digits only, and a space before a name"
            )));
        }
        let mantissa = number.split(['e', 'E']).next().unwrap_or_default();
        let digits = mantissa.chars().filter(char::is_ascii_digit);
        let digits = digits.skip_while(|digit| *digit == '0').count();
        let is_exact = number.parse::<u64>().is_ok();
        if digits > DIGITS_MAX && !is_exact {
            return Err(QueryError(format!(
                "`{number}` has more digits than are kept: write cast('{number}' as decimal(38, 10))"
            )));
        }
    }
    Ok(())
}

/// What stands between a parenthesis and its end, so far.
#[derive(Default)]
struct Level {
    /// Operators and keywords since the last comma, which separates what is no deeper for it.
    chain: usize,
    /// Set operations and tables.
    sets: usize,
    /// Whether a comma separates tables, of which each makes the tree deeper.
    of_tables: bool,
    /// How many `not (` it stands in.
    nots: usize,
}

impl Level {
    fn keyword(&mut self, keyword: Keyword) {
        match keyword {
            Keyword::NoKeyword | Keyword::ALL | Keyword::AS => {}
            Keyword::FROM | Keyword::WITH => self.of_tables = true,
            Keyword::SELECT | Keyword::VALUES => self.of_tables = false,
            Keyword::UNION | Keyword::INTERSECT | Keyword::EXCEPT => self.sets += 1,
            Keyword::JOIN => self.sets += TABLE,
            Keyword::WHERE | Keyword::GROUP | Keyword::ORDER | Keyword::HAVING => {
                self.of_tables = false;
                self.chain += 1;
            }
            _ => self.chain += 1,
        }
    }

    fn comma(&mut self) {
        if self.of_tables {
            self.sets += TABLE;
        } else {
            self.chain = 0;
        }
    }
}

/// How deep a tree is, and how often `not (` stands within itself; zero for a text with tokens that the parser
/// will refuse.
fn depth(sql: &str) -> (usize, usize) {
    let tokens = Tokenizer::new(&GenericDialect {}, sql).tokenize();
    let (mut deepest, mut nots) = (0, 0);
    let mut is_behind_not = false;
    let mut open = Vec::new();
    let mut level = Level::default();
    for token in tokens.unwrap_or_default() {
        let is_not = matches!(&token, Token::Word(word) if word.keyword == Keyword::NOT);
        match token {
            Token::Whitespace(_) => continue,
            Token::Comma => level.comma(),
            Token::SemiColon => level = Level::default(),
            Token::LParen | Token::LBracket | Token::LBrace => {
                let within = Level {
                    nots: level.nots + usize::from(is_behind_not),
                    ..Level::default()
                };
                nots = nots.max(within.nots);
                open.push(std::mem::replace(&mut level, within));
            }
            Token::RParen | Token::RBracket | Token::RBrace => {
                level = open.pop().unwrap_or_default();
            }
            Token::Word(word) => level.keyword(word.keyword),
            Token::Number(..) | Token::SingleQuotedString(_) => {}
            _ => level.chain += 1,
        }
        is_behind_not = is_not;
        deepest = deepest.max(level.chain + level.sets);
    }
    (deepest, nots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_would_be_read_as_others_are_refused() {
        for sql in [
            "select 1_000",
            "select 1000x",
            "select 12345678901234567890.12345",
            "select 123456789012345678901234567890",
        ] {
            assert!(refuse_unread_numbers(sql).is_err(), "{sql}");
        }
        for sql in [
            "select 1 as _000, 1.5e10, .5, 18446744073709551615",
            "select 0.1234567890123456, a1, \"1_000\", '1_000' from t",
        ] {
            assert!(refuse_unread_numbers(sql).is_ok(), "{sql}");
        }
    }

    #[test]
    fn what_makes_a_tree_deeper_is_counted() {
        let list = |term: &str, between: &str| vec![term; 100].join(between);
        let sum = list("1", " + ");
        for (sql, expected) in [
            (format!("select {sum}"), 99),
            (format!("select {sum}, {sum}"), 99),
            (format!("select frob({sum}, 0) + {sum}"), 100),
            (list("select 1 as a", " union all "), 99),
            (list("select 1, 2", " union "), 99),
            (format!("select 1 from {}", list("t", ", ")), 99 * TABLE),
            (
                format!("select 1 from t {}", list("cross join t", " ")),
                100 * TABLE + 100,
            ),
            (
                format!("with {} select 1, 2", list("t as (select 1, 2)", ", ")),
                99 * TABLE,
            ),
            (format!("values {}", list("(-1, 2)", ", ")), 1),
            ("select 'a + b".to_owned(), 0),
            (")))".to_owned(), 0),
        ] {
            assert_eq!(depth(&sql), (expected, 0), "{sql}");
        }
        let nots = format!("select {}true{}", "not ( ".repeat(40), ")".repeat(40));
        assert_eq!(depth(&nots).1, 40);
        assert!(refuse_deep(&nots).is_err());
        assert!(refuse_deep("select not (a or not (b and not (c))) from t").is_ok());
        let list = vec!["-1"; 30_000].join(", ");
        assert!(depth(&format!("select a in ({list}) from t")).0 < 10);
    }
}
