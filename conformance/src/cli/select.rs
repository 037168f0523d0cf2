//! `--hypervisor`, `--transport`, `--device`, `--ring`.

use super::CliError;

/// What was asked for of one kind of thing.
pub(super) struct Selection<'a>(&'a [String]);

impl<'a> Selection<'a> {
    /// `asked`, each of which has to be one of `valid`; nothing asked for is everything.
    pub(super) fn new(kind: &str, asked: &'a [String], valid: &[&str]) -> Result<Self, CliError> {
        match asked.iter().find(|name| !valid.contains(&name.as_str())) {
            None => Ok(Self(asked)),
            Some(unknown) => Err(CliError::Mistake(format!(
                "there is no {kind} '{unknown}'{}: choose from {}",
                similar(unknown, valid).map_or_else(String::new, |name| format!(" (did you mean '{name}'?)")),
                valid.join(", ")
            ))),
        }
    }

    /// Whether `name` was asked for.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|asked| asked == name)
    }
}

/// Whether `name` is what `pattern` says, in which `*` stands for any text.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut left) = name.strip_prefix(first) else { return false };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return left.ends_with(part);
        }
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    true
}

/// What somebody may have meant who wrote `unknown`.
fn similar<'a>(unknown: &str, valid: &[&'a str]) -> Option<&'a str> {
    /// A letter of three that is wrong, or in its neighbour's place.
    const ENOUGH: f64 = 0.6;
    let compared = valid.iter().map(|name| (strsim::normalized_damerau_levenshtein(unknown, name), *name));
    let most = compared.max_by(|(one, _), (other, _)| one.total_cmp(other));
    most.filter(|(likeness, _)| *likeness >= ENOUGH).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_asked_for_is_everything() {
        assert!(Selection::new("device", &[], &["blk"]).unwrap().has("blk"));
    }

    #[test]
    fn only_what_was_asked_for_is_selected() {
        let asked = ["blk".to_owned()];
        let selection = Selection::new("device", &asked, &["blk", "rng"]).unwrap();
        assert!(selection.has("blk") && !selection.has("rng"));
    }

    #[test]
    fn an_unknown_name_is_a_mistake_that_names_the_valid_ones() {
        let asked = ["blk".to_owned(), "disk".to_owned()];
        let error = Selection::new("device", &asked, &["blk", "rng"]).map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "there is no device 'disk': choose from blk, rng");
        let asked = ["bkl".to_owned()];
        let error = Selection::new("device", &asked, &["blk", "rng"]).map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "there is no device 'bkl' (did you mean 'blk'?): choose from blk, rng");
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name) in
            [("a/b", "a/b"), ("a/*", "a/b"), ("*", ""), ("*b", "a/b"), ("a*c*e", "abcde"), ("*/*", "/")]
        {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("a/b", "a/bc"), ("a/*", "b/a/"), ("*b", "abc"), ("a*c*e", "abcd"), ("ab*ba", "aba")] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
