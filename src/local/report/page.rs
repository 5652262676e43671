//! The page around the figures: style, sections, escaping.

use std::fmt::Write;

/// Text as HTML shows it.
pub fn escape(text: &str) -> String {
    let printable: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    printable.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A page that grows from top to bottom.
pub struct Page {
    body: String,
}

impl Page {
    pub fn new(title: &str, subtitle: &str) -> Self {
        let body = format!("<header><h1>{}</h1><p class=\"soft\">{}</p></header>\n", escape(title), escape(subtitle));
        Self { body }
    }

    /// Markup as it is.
    pub fn raw(&mut self, markup: &str) {
        self.body.push_str(markup);
    }

    pub fn section(&mut self, title: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(title));
    }

    pub fn heading(&mut self, title: &str) {
        let _ = writeln!(self.body, "<h3>{}</h3>", escape(title));
    }

    pub fn text(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p class=\"soft\">{}</p>", escape(text));
    }

    /// What is missing, and therefore not shown.
    pub fn missing(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p class=\"none\">{}</p>", escape(text));
    }

    /// Figures side by side: what, how much, and a remark.
    pub fn figures(&mut self, figures: &[(String, String, String)]) {
        self.body.push_str("<div class=\"figures\">");
        for (name, value, remark) in figures {
            let _ = write!(
                self.body,
                "<div><span>{}</span><b>{}</b><small>{}</small></div>",
                escape(name),
                escape(value),
                escape(remark)
            );
        }
        self.body.push_str("</div>\n");
    }

    /// What lines and marks mean: (class, text).
    pub fn legend(&mut self, keys: &[(&str, &str)]) {
        self.body.push_str("<p class=\"legend\">");
        for (class, text) in keys {
            let _ = write!(
                self.body,
                "<span><svg width=\"22\" height=\"12\" aria-hidden=\"true\"><path class=\"{class}\" d=\"M1 6H21\"/></svg>{}</span>",
                escape(text)
            );
        }
        self.body.push_str("</p>\n");
    }

    /// Cells are markup: escape what comes from files. Columns of numbers have names that end in `#`.
    pub fn table(&mut self, columns: &[&str], rows: &[Vec<String>]) {
        let number = |i: usize| columns.get(i).is_some_and(|c: &&str| c.ends_with('#'));
        let class = |i: usize| if number(i) { " class=\"number\"" } else { "" };
        self.body.push_str("<div class=\"wide\"><table><thead><tr>");
        for (i, column) in columns.iter().enumerate() {
            let _ = write!(self.body, "<th{}>{}</th>", class(i), escape(column.trim_end_matches('#')));
        }
        self.body.push_str("</tr></thead><tbody>\n");
        for row in rows {
            self.body.push_str("<tr>");
            for (i, cell) in row.iter().enumerate() {
                let _ = write!(self.body, "<td{}>{cell}</td>", class(i));
            }
            self.body.push_str("</tr>\n");
        }
        self.body.push_str("</tbody></table></div>\n");
    }

    /// A picture in the page itself. As an image it cannot do anything, whatever the file holds.
    pub fn picture(&mut self, svg: &str, description: &str) {
        let mut data = String::new();
        for byte in svg.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b' ' | b'.' | b'-' | b'/' | b':' | b'=' | b',' | b';' => {
                    data.push(char::from(byte));
                }
                _ => {
                    let _ = write!(data, "%{byte:02X}");
                }
            }
        }
        let _ = writeln!(
            self.body,
            "<div class=\"wide\"><img class=\"plan\" src=\"data:image/svg+xml,{data}\" alt=\"{}\"></div>",
            escape(description)
        );
    }

    pub fn finish(self, title: &str) -> String {
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{}</main>\n</body>\n</html>\n",
            escape(title),
            self.body
        )
    }
}

const STYLE: &str = include_str!("style.css");
