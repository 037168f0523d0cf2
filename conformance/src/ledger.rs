//! The ledger: the statements of VIRTIO 1.4 that cases judge, each in a sentence of our own.
//!
//! Ids number the statements of the normative blocks of virtio-v1.4-cs01 in the order of its text; sections are the
//! labels that the spec's conformance chapter refers to.

/// A normative statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Its id, `N0001` to `N1595`.
    pub id: &'static str,
    /// Whom it binds: `driver` or `device`.
    pub side: &'static str,
    /// MUST, SHOULD NOT and so on.
    pub keyword: &'static str,
    /// The label of its section.
    pub section: &'static str,
    /// What it says, in our words.
    pub about: &'static str,
}

/// All that are judged, by id.
pub fn statements() -> impl Iterator<Item = Statement> {
    include_str!("../ledger/statements.tsv").lines().skip(1).filter_map(|line| {
        let mut fields = line.split('\t');
        let mut next = || fields.next();
        Some(Statement { id: next()?, side: next()?, keyword: next()?, section: next()?, about: next()? })
    })
}
