//! Counts lines of code: what a port of a hypervisor costs.

/// Lines of `source` (Rust) that hold code: neither blank, nor only a comment, nor inside `#[cfg(test)] mod …`.
///
/// Strings, raw strings, character literals and nested block comments are recognized, so that a `//` or a brace inside
/// them counts for what it is.
pub(crate) fn of_code(source: &str) -> usize {
    let code = without_comments(source);
    let lines: Vec<&str> = code.lines().map(str::trim).collect();
    let mut count = 0;
    let mut at = 0;
    while at < lines.len() {
        if let Some(end) = test_module_end(&lines, at) {
            at = end;
            continue;
        }
        count += usize::from(!lines[at].is_empty());
        at += 1;
    }
    count
}

/// If a test module starts at line `start`, the line after its end.
fn test_module_end(lines: &[&str], start: usize) -> Option<usize> {
    let after_attribute = lines[start].strip_prefix("#[cfg(test)]")?;
    let mut rest = std::iter::once((start, after_attribute))
        .chain((start + 1..lines.len()).map(|at| (at, lines[at])))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with("#["));
    let (first, header) = rest.next()?;
    let is_module = header.split_whitespace().any(|word| word == "mod");
    if !is_module {
        return None;
    }
    let mut depth = 0usize;
    for (at, line) in std::iter::once((first, header)).chain(rest) {
        for byte in line.bytes() {
            match byte {
                b'{' => depth += 1,
                b'}' if depth == 1 => return Some(at + 1),
                b'}' => depth = depth.saturating_sub(1),
                // `mod tests;`: the module is another file.
                b';' if depth == 0 => return Some(at + 1),
                _ => {}
            }
        }
    }
    Some(lines.len())
}

/// `source` with every comment removed and the contents of every literal replaced by `"`, line by line.
fn without_comments(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if rest.starts_with("/*") {
            rest = keep_line_breaks(rest, block_comment(rest), "", &mut out);
        } else if let Some(len) = literal(rest, out.chars().next_back()) {
            rest = keep_line_breaks(rest, len, "\"", &mut out);
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

/// Drops `len` bytes of `rest` but for their line breaks; each of their lines that is not blank becomes `filler`.
fn keep_line_breaks<'a>(rest: &'a str, len: usize, filler: &str, out: &mut String) -> &'a str {
    let (dropped, rest) = rest.split_at(len);
    for (at, line) in dropped.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
        }
        if !line.trim().is_empty() {
            out.push_str(filler);
        }
    }
    rest
}

/// The length of the block comment that `text` starts with; they nest.
fn block_comment(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut depth = 0;
    let mut at = 0;
    while at < bytes.len() {
        match &bytes[at..] {
            [b'/', b'*', ..] => {
                depth += 1;
                at += 2;
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The length of the string or character literal that `text` starts with, if it starts with one.
fn literal(text: &str, before: Option<char>) -> Option<usize> {
    let inside_a_word = before.is_some_and(|before| before.is_alphanumeric() || before == '_');
    if let Some(raw) = text.strip_prefix('r').or_else(|| text.strip_prefix("br"))
        && !inside_a_word
    {
        let hashes = raw.bytes().take_while(|&byte| byte == b'#').count();
        if let Some(body) = raw[hashes..].strip_prefix('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let len = body.find(&close).map_or(body.len(), |at| at + close.len());
            return Some(text.len() - body.len() + len);
        }
    }
    match text.as_bytes() {
        [b'"', ..] => Some(quoted(text, b'"')),
        // A lifetime has no closing quote after one character.
        [b'\'', b'\\', ..] => Some(quoted(text, b'\'')),
        [b'\'', ..] => {
            let character = text[1..].chars().next()?;
            text[1 + character.len_utf8()..].starts_with('\'').then_some(character.len_utf8() + 2)
        }
        _ => None,
    }
}

/// The length of a literal between two `quote`s, with escapes.
fn quoted(text: &str, quote: u8) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_and_comments_of_every_kind_do_not_count() {
        let source = "//! module\n\n/// item\nfn f() {} // trailing\n    // only\n/* one */\n/* two\n * three /* nested\n */ still\n*/ fn g() {}\n";
        assert_eq!(of_code(source), 2);
    }

    #[test]
    fn comment_marks_inside_strings_are_code() {
        assert_eq!(of_code("let url = \"http://x\";\nlet a = '\"'; let b = \"/*\";\nlet c = 1;\n"), 3);
        assert_eq!(of_code("let r = r#\"a \" // \"#; /* gone\n*/\nlet l: &'static str = \"\\\"/*\";\n"), 2);
    }

    #[test]
    fn each_line_of_a_string_counts() {
        assert_eq!(of_code("let s = \"one\n  two\n\n  three\";\n"), 3);
    }

    #[test]
    fn test_modules_do_not_count_but_other_test_items_do() {
        let source = "fn f() {}\n#[cfg(test)]\nmod tests {\n    fn t() { \"}\"; '}'; /* } */ }\n}\nfn g() {}\n";
        assert_eq!(of_code(source), 2);
        assert_eq!(of_code("#[cfg(test)]\n#[allow(dead_code)]\nmod tests;\nfn g() {}\n"), 1);
        assert_eq!(of_code("#[cfg(test)]\nfn helper() {}\nfn g() {}\n"), 3);
    }

    #[test]
    fn what_does_not_end_is_counted_to_the_end() {
        assert_eq!(of_code("fn f() {\n/* open\nx"), 1);
        assert_eq!(of_code("#[cfg(test)]\nmod tests {\nx"), 0);
        assert_eq!(of_code("\"open\nx"), 2);
        assert_eq!(of_code("'\\"), 1);
    }

    #[test]
    fn lifetimes_do_not_open_a_literal() {
        assert_eq!(of_code("fn f<'a>(x: &'a str) {}\n// gone\nfn g() {}\n"), 2);
    }
}
