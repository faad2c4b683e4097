//! Label selectors: `a=b,c!=d,e in (f,g),!h,i>1`, and `LabelSelector` objects.
//!
//! Source: k8s.io/apimachinery v0.37 `pkg/labels/selector.go` (grammar and texts), `pkg/apis/meta/v1/helpers.go`.

use serde_json::Value;

use crate::formats;
use crate::formats::go_quote;

/// How a label's value is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// One of the values.
    In,
    /// None of the values, or no such label.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
    /// A number above the value.
    GreaterThan,
    /// A number below the value.
    LessThan,
}

/// One requirement on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// Label key.
    pub key: String,
    /// Comparison.
    pub operator: Operator,
    /// Values.
    pub values: Vec<String>,
}

/// Requirements that must all hold; none match everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    /// The requirements.
    pub requirements: Vec<Requirement>,
    nothing: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    Symbol(&'static str),
    End,
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Word(word) => word,
            Self::Symbol(symbol) => symbol,
            Self::End => "",
        }
    }
}

fn tokens(text: &str) -> Vec<Token> {
    const SYMBOLS: &[&str] = &["==", "!=", "=", "!", ">", "<", "(", ")", ","];
    let mut rest = text;
    let mut tokens = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', '\r', '\n']);
        if rest.is_empty() {
            tokens.push(Token::End);
            return tokens;
        }
        if let Some(symbol) = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol)) {
            tokens.push(Token::Symbol(symbol));
            rest = &rest[symbol.len()..];
            continue;
        }
        let end = rest.find([' ', '\t', '\r', '\n', '=', '!', '>', '<', '(', ')', ',']).unwrap_or(rest.len());
        tokens.push(Token::Word(rest[..end].to_owned()));
        rest = &rest[end..];
    }
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    fn selector(&mut self) -> Result<Vec<Requirement>, String> {
        let mut requirements = Vec::new();
        loop {
            match self.peek() {
                Token::End => return Ok(requirements),
                Token::Word(_) | Token::Symbol("!") => {}
                other => return Err(format!("found '{}', expected: !, identifier, or 'end of string'", other.text())),
            }
            requirements.push(self.requirement().map_err(|error| format!("unable to parse requirement: {error}"))?);
            match self.next() {
                Token::End => return Ok(requirements),
                Token::Symbol(",") => match self.peek() {
                    Token::Word(_) | Token::Symbol("!") => {}
                    other => return Err(format!("found '{}', expected: identifier after ','", other.text())),
                },
                other => return Err(format!("found '{}', expected: ',' or 'end of string'", other.text())),
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let mut token = self.next();
        let absent = token == Token::Symbol("!");
        if absent {
            token = self.next();
        }
        let Token::Word(key) = token else { return Err(format!("found '{}', expected: identifier", token.text())) };
        let errors = formats::label_key(&key);
        if !errors.is_empty() {
            return Err(format!("<nil>: Invalid value: {}: {}", go_quote(&key), errors.join("; ")));
        }
        let ends = matches!(self.peek(), Token::End | Token::Symbol(","));
        if absent || ends {
            let operator = if absent { Operator::DoesNotExist } else { Operator::Exists };
            return Ok(Requirement { key, operator, values: Vec::new() });
        }
        let (operator, list) = self.operator()?;
        let mut values = if list { self.values()? } else { vec![self.exact()?] };
        values.sort_unstable();
        values.dedup();
        check_values(&key, operator, &values)?;
        Ok(Requirement { key, operator, values })
    }

    /// The operator, and whether a list of values follows.
    fn operator(&mut self) -> Result<(Operator, bool), String> {
        let token = self.next();
        match (&token, token.text()) {
            (Token::Word(_), "in") => Ok((Operator::In, true)),
            (Token::Word(_), "notin") => Ok((Operator::NotIn, true)),
            (Token::Symbol(_), "=" | "==") => Ok((Operator::In, false)),
            (Token::Symbol(_), "!=") => Ok((Operator::NotIn, false)),
            (Token::Symbol(_), ">") => Ok((Operator::GreaterThan, false)),
            (Token::Symbol(_), "<") => Ok((Operator::LessThan, false)),
            (_, text) => Err(format!("found '{text}', expected: in, notin, =, ==, !=, gt, lt")),
        }
    }

    fn exact(&mut self) -> Result<String, String> {
        if matches!(self.peek(), Token::End | Token::Symbol(",")) {
            return Ok(String::new());
        }
        match self.next() {
            Token::Word(word) => Ok(word),
            other => Err(format!("found '{}', expected: identifier", other.text())),
        }
    }

    fn values(&mut self) -> Result<Vec<String>, String> {
        let open = self.next();
        if open != Token::Symbol("(") {
            return Err(format!("found '{}' expected: '('", open.text()));
        }
        match self.peek() {
            Token::Word(_) | Token::Symbol("," | ")") => {}
            other => return Err(format!("found '{}', expected: ',', ')' or identifier", other.text())),
        }
        let mut values = Vec::new();
        let mut word = String::new();
        loop {
            match self.next() {
                Token::Word(found) if word.is_empty() => word = found,
                Token::Symbol(",") => values.push(std::mem::take(&mut word)),
                Token::Symbol(")") => {
                    values.push(word);
                    return Ok(values);
                }
                other => return Err(format!("found '{}', expected: ',' or ')'", other.text())),
            }
        }
    }
}

fn check_values(key: &str, operator: Operator, values: &[String]) -> Result<(), String> {
    let mut errors = Vec::new();
    if matches!(operator, Operator::GreaterThan | Operator::LessThan) {
        for (index, value) in values.iter().enumerate().filter(|(_, value)| value.parse::<i64>().is_err()) {
            let quoted = go_quote(value);
            errors.push(format!("values[{index}]: Invalid value: {quoted}: for 'Gt', 'Lt' operators, the value must be an integer"));
        }
    }
    for (index, value) in values.iter().enumerate() {
        let found = formats::label_value(value);
        if !found.is_empty() {
            errors.push(format!("values[{index}][{key}]: Invalid value: {}: {}", go_quote(value), found.join("; ")));
        }
    }
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.remove(0)),
        _ => Err(format!("[{}]", errors.join(", "))),
    }
}

impl Requirement {
    fn matches(&self, label: Option<&str>) -> bool {
        match (self.operator, label) {
            (Operator::In, Some(label)) => self.values.iter().any(|value| value == label),
            (Operator::NotIn, Some(label)) => self.values.iter().all(|value| value != label),
            (Operator::Exists, label) => label.is_some(),
            (Operator::DoesNotExist, label) => label.is_none(),
            (Operator::NotIn, None) => true,
            (Operator::In | Operator::GreaterThan | Operator::LessThan, None) => false,
            (Operator::GreaterThan | Operator::LessThan, Some(label)) => {
                let bound = self.values.first().and_then(|value| value.parse::<i64>().ok());
                match (label.parse::<i64>(), bound) {
                    (Ok(label), Some(bound)) => {
                        if self.operator == Operator::GreaterThan {
                            label > bound
                        } else {
                            label < bound
                        }
                    }
                    _ => false,
                }
            }
        }
    }
}

impl LabelSelector {
    /// Parses a query's `labelSelector`. The error is the message of a 400.
    pub fn parse(text: &str) -> Result<Self, String> {
        let requirements = Parser { tokens: tokens(text), at: 0 }.selector()?;
        Ok(Self { requirements, nothing: false })
    }

    /// From a `meta.v1.LabelSelector`. An absent one matches nothing, an empty one everything.
    pub fn from_object(selector: Option<&Value>) -> Result<Self, String> {
        let Some(selector) = selector.filter(|selector| !selector.is_null()) else {
            return Ok(Self { requirements: Vec::new(), nothing: true });
        };
        let mut requirements = Vec::new();
        for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
            let values = vec![value.as_str().unwrap_or("").to_owned()];
            requirements.push(Requirement { key: key.clone(), operator: Operator::In, values });
        }
        for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
            let operator = match expression.get("operator").and_then(Value::as_str).unwrap_or("") {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => return Err(format!("\"{other}\" is not a valid label selector operator")),
            };
            let values = expression.get("values").and_then(Value::as_array).into_iter().flatten();
            requirements.push(Requirement {
                key: expression.get("key").and_then(Value::as_str).unwrap_or("").to_owned(),
                operator,
                values: values.filter_map(Value::as_str).map(str::to_owned).collect(),
            });
        }
        Ok(Self { requirements, nothing: false })
    }

    /// Whether everything matches.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty() && !self.nothing
    }

    /// Whether labels (an object of strings, or nothing) match.
    pub fn matches(&self, labels: Option<&Value>) -> bool {
        let label = |key: &str| labels.and_then(|labels| labels.get(key)).and_then(Value::as_str);
        !self.nothing && self.requirements.iter().all(|requirement| requirement.matches(label(&requirement.key)))
    }

    /// Whether the labels of an object match.
    pub fn matches_object(&self, object: &Value) -> bool {
        self.matches(object.pointer("/metadata/labels"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn matches() {
        let labels = json!({"a": "b", "n": "5"});
        for (text, want) in [
            ("", true),
            ("a", true),
            ("!a", false),
            ("a=b", true),
            ("a == b", true),
            ("a!=b", false),
            ("x!=y", true),
            ("a in (b,c)", true),
            ("a in (c)", false),
            ("a notin (b)", false),
            ("x notin (b)", true),
            ("n>4", true),
            ("n<5", false),
            ("a>1", false),
            ("a=b,n=5,!z", true),
            ("z in ()", false),
            ("a=", false),
            ("in in (in)", false),
        ] {
            assert_eq!(LabelSelector::parse(text).expect(text).matches(Some(&labels)), want, "{text}");
        }
        assert!(!LabelSelector::from_object(None).expect("valid").matches(Some(&labels)));
        assert!(LabelSelector::from_object(Some(&json!({}))).expect("valid").matches(Some(&labels)));
    }

    /// Recorded from kube-apiserver v1.37.2.
    #[test]
    fn errors_read_as_upstream() {
        for (text, want) in [
            ("a b", "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"),
            ("a in x", "unable to parse requirement: found 'x' expected: '('"),
            ("!a,,b", "found ',', expected: identifier after ','"),
            (
                "a>1x",
                "unable to parse requirement: values[0]: Invalid value: \"1x\": for 'Gt', 'Lt' operators, the value must be an integer",
            ),
            ("a in (", "unable to parse requirement: found '', expected: ',', ')' or identifier"),
            ("a===b", "unable to parse requirement: found '=', expected: identifier"),
            (",", "found ',', expected: !, identifier, or 'end of string'"),
        ] {
            assert_eq!(LabelSelector::parse(text).expect_err(text), want);
        }
        assert!(
            LabelSelector::parse("a=@")
                .expect_err("@")
                .starts_with("unable to parse requirement: values[0][a]: Invalid value: \"@\": a valid label")
        );
    }
}
