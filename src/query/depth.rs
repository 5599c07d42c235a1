//! How deep the tree of a query is, told by its tokens: before the parser builds it, for a tree that is
//! too deep ends the program.

use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

use super::QueryError;

/// Operators and keywords that may stand side by side.
const CHAINED_MAX: usize = 10_000;

/// Refuses a query that chains more terms than its thread has stack for. Commas separate; parentheses
/// within parentheses are counted by the parser.
pub fn refuse_deep(sql: &str) -> Result<(), QueryError> {
    let longest = longest_chain(sql);
    if longest <= CHAINED_MAX {
        return Ok(());
    }
    Err(QueryError(format!(
        "the query chains {longest} operators and keywords without a comma between them, and at most \
         {CHAINED_MAX} can be computed: write `in (…)` for many `or`, `values` for many `union`, or put \
         the values into a table"
    )))
}

/// Zero for a text with tokens that the parser will refuse.
fn longest_chain(sql: &str) -> usize {
    let tokens = Tokenizer::new(&GenericDialect {}, sql).tokenize();
    let mut longest = 0;
    // Of each parenthesis that is open: how many stand since the last comma.
    let mut chains = vec![0];
    for token in tokens.unwrap_or_default() {
        match token {
            Token::Comma | Token::SemiColon => *chains.last_mut().expect("the outermost") = 0,
            Token::LParen | Token::LBracket | Token::LBrace => chains.push(0),
            Token::RParen | Token::RBracket | Token::RBrace if chains.len() > 1 => {
                chains.pop();
            }
            Token::Word(word) if is_flat(word.keyword) => {}
            Token::Whitespace(_) | Token::Number(..) | Token::SingleQuotedString(_) => {}
            _ => {
                let chain = chains.last_mut().expect("the outermost");
                *chain += 1;
                longest = longest.max(*chain);
            }
        }
    }
    longest
}

/// Whether a word makes no tree deeper: a name, or one that stands beside another that does.
fn is_flat(keyword: Keyword) -> bool {
    matches!(
        keyword,
        Keyword::NoKeyword | Keyword::SELECT | Keyword::ALL | Keyword::FROM | Keyword::AS
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_between_commas_is_counted() {
        let sum = vec!["1"; 100].join(" + ");
        assert_eq!(longest_chain(&format!("select {sum}")), 99);
        assert_eq!(longest_chain(&format!("select {sum}, {sum}")), 99);
        let list = vec!["-1"; 30_000].join(", ");
        assert!(longest_chain(&format!("select a in ({list}) from t")) < 10);
        let calls = vec!["frob(a, 0)"; 200].join(" + ");
        assert_eq!(longest_chain(&format!("select {calls}")), 199);
        let unions = vec!["select 1 as a"; 100].join(" union all ");
        assert_eq!(longest_chain(&unions), 99);
        assert_eq!(longest_chain("select 'a + b"), 0);
        assert_eq!(longest_chain(")))"), 3);
    }
}
