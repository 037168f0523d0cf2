//! Text inside HTML and XML.

use std::fmt::{self, Display, Formatter, Write as _};

/// Shows its content so that it may stand in HTML or XML, as text or between double or single quotes.
///
/// Characters that XML 1.0 cannot hold at all (most control characters) become U+FFFD.
pub(crate) struct Escaped<T>(pub(crate) T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(Escaper(formatter), "{}", self.0)
    }
}

struct Escaper<'a, 'f>(&'a mut Formatter<'f>);

impl fmt::Write for Escaper<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|character| self.write_char(character))
    }

    fn write_char(&mut self, character: char) -> fmt::Result {
        match character {
            '&' => self.0.write_str("&amp;"),
            '<' => self.0.write_str("&lt;"),
            '>' => self.0.write_str("&gt;"),
            '"' => self.0.write_str("&quot;"),
            '\'' => self.0.write_str("&#39;"),
            // Written as references: an XML parser would turn them into spaces inside an attribute.
            '\t' | '\n' | '\r' => write!(self.0, "&#{};", u32::from(character)),
            '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => self.0.write_char('\u{fffd}'),
            other => self.0.write_char(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_becomes_text() {
        assert_eq!(
            Escaped("<b a=\"1\" c='2'>&amp;</b>").to_string(),
            "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;amp;&lt;/b&gt;"
        );
    }

    #[test]
    fn other_text_stays() {
        assert_eq!(Escaped("naïve – 漢字 🦀 0x10").to_string(), "naïve – 漢字 🦀 0x10");
    }

    #[test]
    fn what_xml_cannot_hold_is_replaced_and_line_breaks_survive() {
        assert_eq!(Escaped("a\u{0}b\u{1b}[1mc\u{9f}\u{ffff}").to_string(), "a\u{fffd}b\u{fffd}[1mc\u{fffd}\u{fffd}");
        assert_eq!(Escaped("a\r\n\tb").to_string(), "a&#13;&#10;&#9;b");
    }

    #[test]
    fn values_that_are_no_strings_are_escaped_too() {
        assert_eq!(Escaped(format_args!("{}{}", '<', 1)).to_string(), "&lt;1");
    }
}
