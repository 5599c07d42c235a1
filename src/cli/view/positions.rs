//! The rows of a list, as positions in the files of its table.

/// The identity of a list: the files of its table, the condition and the order.
pub type ListKey = (Vec<String>, Option<String>, Option<String>);

/// The rows of a list, in order.
pub enum Positions {
    /// All rows of the files, in the order of the table; the numbers of rows.
    All(Vec<u64>),
    Some(Vec<(u32, u64)>),
}

impl Positions {
    pub fn len(&self) -> u64 {
        match self {
            Self::All(files) => files.iter().fold(0, |sum, rows| sum.saturating_add(*rows)),
            Self::Some(rows) => rows.len() as u64,
        }
    }

    /// Returns the positions of a page.
    pub fn page(&self, offset: u64, limit: usize) -> Vec<(u32, u64)> {
        match self {
            Self::Some(rows) => {
                let from = (offset as usize).min(rows.len());
                rows[from..].iter().take(limit).copied().collect()
            }
            Self::All(files) => {
                let mut page = Vec::new();
                let mut skipped = offset;
                for (file, rows) in files.iter().enumerate() {
                    let first = skipped.min(*rows);
                    skipped -= first;
                    let left = (limit - page.len()) as u64;
                    let of_file = first..first + left.min(rows - first);
                    page.extend(of_file.map(|row| (file as u32, row)));
                    if page.len() == limit {
                        break;
                    }
                }
                page
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_the_whole_table_goes_across_files() {
        let all = Positions::All(vec![3, 0, 2]);
        assert_eq!(all.len(), 5);
        assert_eq!(all.page(0, 2), [(0, 0), (0, 1)]);
        assert_eq!(all.page(2, 2), [(0, 2), (2, 0)]);
        assert_eq!(all.page(4, 9), [(2, 1)]);
        assert_eq!(all.page(5, 9), []);
        assert_eq!(all.page(u64::MAX, 9), []);
        assert_eq!(Positions::All(vec![u64::MAX, 2]).len(), u64::MAX);
        let some = Positions::Some(vec![(1, 7), (0, 3)]);
        assert_eq!(some.page(1, 9), [(0, 3)]);
        assert_eq!(some.page(9, 9), []);
    }
}
