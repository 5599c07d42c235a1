//! Depth of a query's syntax tree, estimated from its tokens before the parser builds it, because a
//! tree that is too deep overflows the stack and aborts the program.

use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

use super::interface::QueryError;

/// The maximum depth of a tree.
const DEPTH_MAX: usize = 6_500;

/// The depth added by each joined table: planning takes memory quadratic in their number.
const TABLE: usize = 20;

/// The maximum nesting of `not (`; the parser tries each level twice, so its time is exponential.
const NOT_MAX: usize = 16;

/// Rejects a query that chains more terms than its thread's stack can hold. Nested parentheses are
/// limited by the parser.
pub fn refuse_deep(sql: &str) -> Result<(), QueryError> {
    let tokens = tokens(sql);
    refuse_unread_numbers(&tokens)?;
    let (depth, nots) = depth(&tokens);
    if nots > NOT_MAX {
        return Err(QueryError::Other(format!(
            "`not (` is nested {nots} levels deep, the maximum is {NOT_MAX}: remove pairs of `not`"
        )));
    }
    if depth <= DEPTH_MAX {
        return Ok(());
    }
    Err(QueryError::Other(format!(
        "the query chains {depth} operators and keywords (a table counts {TABLE}), the maximum is \
         {DEPTH_MAX}: write `in (…)` for many `or`, `values` for many `union`, or put the values into \
         a table"
    )))
}

/// The number of significant digits of a number literal.
const DIGITS_MAX: usize = 17;

/// The number of digits of the longest decimal.
const DECIMAL_MAX: usize = 38;

/// Returns the tokens of a query; none for a text with tokens that the parser will reject.
fn tokens(sql: &str) -> Vec<Token> {
    let tokens = Tokenizer::new(&GenericDialect {}, sql).tokenize();
    tokens.unwrap_or_default()
}

/// Rejects number literals that would be parsed as something else (`1_000` is parsed as 1 with the
/// alias `_000`), and those with more digits than are kept.
fn refuse_unread_numbers(tokens: &[Token]) -> Result<(), QueryError> {
    for (index, token) in tokens.iter().enumerate() {
        let Token::Number(number, _) = token else {
            continue;
        };
        if let Some(Token::Word(word)) = tokens.get(index + 1) {
            return Err(QueryError::Other(format!(
                "`{number}{word}` is not a number: use digits only, or put a space before an alias"
            )));
        }
        let mantissa = number.split(['e', 'E']).next().unwrap_or_default();
        let digits = mantissa.chars().filter(char::is_ascii_digit);
        let digits = digits.skip_while(|digit| *digit == '0').count();
        if digits <= DIGITS_MAX || number.parse::<u64>().is_ok() {
            continue;
        }
        let lost = format!("`{number}` exceeds the precision of {DIGITS_MAX} digits");
        let fraction = mantissa
            .split_once('.')
            .map_or(0, |(_, fraction)| fraction.len());
        let is_plain = mantissa.len() == number.len();
        return Err(QueryError::Other(
            if is_plain && digits.max(fraction) <= DECIMAL_MAX {
                format!("{lost}: write cast('{number}' as decimal({DECIMAL_MAX}, {fraction}))")
            } else {
                format!("{lost}: use fewer digits")
            },
        ));
    }
    Ok(())
}

/// The state within one pair of parentheses, so far.
#[derive(Default)]
struct Level {
    /// Operators and keywords since the last comma; items separated by commas do not add depth.
    chain: usize,
    /// Set operations and tables.
    sets: usize,
    /// True if commas separate tables, each of which makes the tree deeper.
    of_tables: bool,
    /// Nesting levels of `not (` around it.
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

/// Returns the depth of the tree for these tokens, and the nesting levels of `not (`.
fn depth(tokens: &[Token]) -> (usize, usize) {
    let (mut deepest, mut nots) = (0, 0);
    let mut is_behind_not = false;
    let mut open = Vec::new();
    let mut level = Level::default();
    for token in tokens {
        let is_not = matches!(token, Token::Word(word) if word.keyword == Keyword::NOT);
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
            assert!(refuse_unread_numbers(&tokens(sql)).is_err(), "{sql}");
        }
        let advice = refuse_deep("select 123456789012345678901234.56")
            .unwrap_err()
            .to_string();
        assert!(
            advice.ends_with("cast('123456789012345678901234.56' as decimal(38, 2))"),
            "{advice}"
        );
        for sql in [
            "select 1 as _000, 1.5e10, .5, 18446744073709551615",
            "select 0.1234567890123456, a1, \"1_000\", '1_000' from t",
        ] {
            assert!(refuse_unread_numbers(&tokens(sql)).is_ok(), "{sql}");
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
            assert_eq!(depth(&tokens(&sql)), (expected, 0), "{sql}");
        }
        let nots = format!("select {}true{}", "not ( ".repeat(40), ")".repeat(40));
        assert_eq!(depth(&tokens(&nots)).1, 40);
        assert!(refuse_deep(&nots).is_err());
        assert!(refuse_deep("select not (a or not (b and not (c))) from t").is_ok());
        let list = vec!["-1"; 30_000].join(", ");
        assert!(depth(&tokens(&format!("select a in ({list}) from t"))).0 < 10);
    }
}
