//! The WWW-Authenticate header: schemes with parameters (RFC 9110, section 11).

use std::collections::HashMap;

use http::HeaderMap;

/// One challenge; scheme and parameter names in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub scheme: String,
    pub parameters: HashMap<String, String>,
}

/// All challenges of all WWW-Authenticate headers. What does not parse is passed over.
pub(crate) fn parse(headers: &HeaderMap) -> Vec<Challenge> {
    let values = headers.get_all("www-authenticate").into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(parse_value).collect()
}

fn parse_value(mut text: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    loop {
        text = text.trim_start_matches([' ', ',', '\t']);
        let end = text.find([' ', '=', ',']).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        if word.is_empty() {
            return challenges;
        }
        let rest = rest.trim_start_matches(' ');
        match (rest.strip_prefix('='), challenges.last_mut()) {
            (Some(value), Some(challenge)) => {
                let (value, rest) = parse_parameter(value.trim_start_matches(' '));
                challenge.parameters.insert(word.to_ascii_lowercase(), value);
                text = rest;
            }
            (Some(value), None) => text = parse_parameter(value).1,
            (None, _) => {
                challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: HashMap::new() });
                text = rest;
            }
        }
    }
}

/// A token or quoted string, and what is behind it.
fn parse_parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_parsed() {
        let parsed = parse_value(r#"Bearer realm="https://a/t?x=1,2",service="s \"q\"", scope="repository:a/b:pull,push" , Basic realm=x"#);
        assert_eq!(parsed[0].scheme, "bearer");
        assert_eq!(parsed[0].parameters["realm"], "https://a/t?x=1,2");
        assert_eq!(parsed[0].parameters["service"], "s \"q\"");
        assert_eq!(parsed[0].parameters["scope"], "repository:a/b:pull,push");
        assert_eq!((parsed[1].scheme.as_str(), parsed[1].parameters["realm"].as_str()), ("basic", "x"));
    }

    #[test]
    fn rubbish_ends() {
        for text in ["", ",,,", "=", "a=b", "Bearer realm=\"", "Bearer =", "\"", "é=1", "Basic a=\"\\"] {
            let _ = parse_value(text);
        }
    }
}
