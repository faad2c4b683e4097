//! Parsing that notes unknown and duplicate fields, in the order of the document.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::schema::{Container, Field, Item, Shape, TypeId, schema};

/// Deepest nesting taken, as Go's decoder has it for JSON bodies.
const DEPTH_MAX: usize = 128;

/// Unknown and duplicate fields that are told of at most (sigs.k8s.io/json, `saveStrictError`): each names its whole path.
const ERRORS_MAX: usize = 100;
/// Brackets that a YAML text may leave open at one time, and indentations that one line may begin (a `-----` line is long, too).
const YAML_OPEN_MAX: usize = 2000;
/// How much larger than its text a YAML document may become by its aliases, and what is free in any case, in values and bytes.
const YAML_GROWTH_MAX: usize = 10;
const YAML_SIZE_FREE: usize = 100_000;

/// A parsed document.
#[derive(Debug)]
pub struct Parsed {
    /// The value; of duplicate fields the last one.
    pub value: Value,
    /// `unknown field "PATH"` and `duplicate field "PATH"`.
    pub errors: Vec<String>,
}

/// Parses JSON that shall be of type `id`. The error is the text of Go's decoder.
pub fn parse_json(body: &[u8], id: TypeId) -> Result<Parsed, String> {
    let mut notes = Notes::default();
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = Seed { place: Place::Type(id), notes: &mut notes }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| go_error(body, &error))?;
    Ok(Parsed { value, errors: notes.errors })
}

/// Parses YAML (its first document) that shall be of type `id`.
pub fn parse_yaml(body: &[u8], id: TypeId) -> Result<Parsed, String> {
    if nests_too_deep(body) {
        return Err("error converting YAML to JSON: yaml: exceeded max depth".to_owned());
    }
    let budget = body.len().saturating_mul(YAML_GROWTH_MAX).saturating_add(YAML_SIZE_FREE);
    let mut notes = Notes { budget, ..Notes::default() };
    let Some(document) = serde_yaml_ng::Deserializer::from_slice(body).next() else {
        return Err("unexpected end of JSON input".to_owned());
    };
    let value = Seed { place: Place::Type(id), notes: &mut notes }
        .deserialize(document)
        .map_err(|error| format!("error converting YAML to JSON: yaml: {error}"))?;
    Ok(Parsed { value, errors: notes.errors })
}

/// Whether a YAML text opens more than it closes, or indents, far beyond what is taken: the scanner's time grows with the square of that.
/// Brackets in texts count, too; no text leaves so many open.
fn nests_too_deep(body: &[u8]) -> bool {
    let (mut open, mut indents) = (0usize, 0usize);
    body.iter().any(|byte| {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        indents = match byte {
            b'-' | b'?' | b':' => indents + 1,
            b' ' => indents,
            _ => 0,
        };
        open > YAML_OPEN_MAX || indents > YAML_OPEN_MAX
    })
}

/// The unknown fields of a value of type `id`, as [`Parsed::errors`] has them.
pub fn unknown_fields(id: TypeId, value: &Value) -> Vec<String> {
    let mut notes = Notes::default();
    // A Value deserializes without errors, and never has duplicates.
    let _ = Seed { place: Place::Type(id), notes: &mut notes }.deserialize(value);
    notes.errors
}

fn go_error(body: &[u8], error: &serde_json::Error) -> String {
    if error.is_eof() {
        return "unexpected end of JSON input".to_owned();
    }
    if error.is_data() {
        return error.to_string();
    }
    let line_start = body.split_inclusive(|byte| *byte == b'\n').take(error.line().saturating_sub(1)).map(<[u8]>::len).sum::<usize>();
    let at = (line_start + error.column().saturating_sub(1)).min(body.len().saturating_sub(1));
    let letter = String::from_utf8_lossy(&body[at..]).chars().next().unwrap_or(' ');
    let context = match error.to_string() {
        text if text.starts_with("key must be") || text.starts_with("trailing comma") => "looking for beginning of object key string",
        text if text.starts_with("expected `,` or `}`") => "after object key:value pair",
        text if text.starts_with("expected `,` or `]`") => "after array element",
        text if text.starts_with("expected `:`") => "after object key",
        text if text.starts_with("trailing characters") => "after top-level value",
        text if text.starts_with("control character") => "in string literal",
        text if text.starts_with("invalid escape") => "in string escape code",
        _ => "looking for beginning of value",
    };
    let shown = match letter {
        '\n' => "'\\n'".to_owned(),
        '\t' => "'\\t'".to_owned(),
        '\'' => "'\\''".to_owned(),
        other => format!("'{other}'"),
    };
    format!("invalid character {shown} {context}")
}

struct Notes {
    errors: Vec<String>,
    path: Vec<Step>,
    /// Values and bytes of text that may still be made.
    budget: usize,
}

impl Default for Notes {
    fn default() -> Self {
        Self { errors: Vec::new(), path: Vec::new(), budget: usize::MAX }
    }
}

enum Step {
    Key(String),
    Index(usize),
}

impl Notes {
    /// Pays for a value or a text.
    fn pay<E: serde::de::Error>(&mut self, size: usize) -> Result<(), E> {
        self.budget = self.budget.checked_sub(size).ok_or_else(|| E::custom("document contains excessive aliasing"))?;
        Ok(())
    }

    fn note(&mut self, what: &str, key: &str) {
        if self.errors.len() >= ERRORS_MAX {
            return;
        }
        let mut path = String::new();
        for step in &self.path {
            match step {
                Step::Key(key) => {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(key);
                }
                Step::Index(index) => path.push_str(&format!("[{index}]")),
            }
        }
        let dot = if path.is_empty() { "" } else { "." };
        self.errors.push(format!("{what} field \"{path}{dot}{key}\""));
    }
}

/// What is known of the value being read.
#[derive(Clone, Copy)]
enum Place {
    Type(TypeId),
    ListOf(Item),
    MapOf(Item),
    Free,
}

impl Place {
    fn of_item(item: Item) -> Self {
        match item {
            Item::Type(id) => Self::Type(id),
            Item::Strings => Self::ListOf(Item::String),
            _ => Self::Free,
        }
    }

    fn of_field(field: &Field) -> Self {
        match field.container {
            Container::Single => Self::of_item(field.item),
            Container::List => Self::ListOf(field.item),
            Container::Map => Self::MapOf(field.item),
        }
    }
}

struct Seed<'n> {
    place: Place,
    notes: &'n mut Notes,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        if self.notes.path.len() > DEPTH_MAX {
            return Err(D::Error::custom("exceeded max depth"));
        }
        self.notes.pay(1)?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.notes.pay(value.len())?;
        Ok(value.into())
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<Value, E> {
        self.notes.pay(value.len())?;
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let place = match self.place {
            Place::ListOf(item) => Place::of_item(item),
            _ => Place::Free,
        };
        let mut list = Vec::new();
        loop {
            self.notes.path.push(Step::Index(list.len()));
            let item = items.next_element_seed(Seed { place, notes: self.notes });
            self.notes.path.pop();
            match item? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(Key(key)) = entries.next_key()? {
            self.notes.pay(key.len())?;
            let place = match self.place {
                Place::Type(id) => {
                    let found = schema().get(id);
                    match found.field(&key) {
                        Some(field) => Place::of_field(field),
                        None => {
                            if found.shape == Shape::Object {
                                self.notes.note("unknown", &key);
                            }
                            Place::Free
                        }
                    }
                }
                Place::MapOf(item) => Place::of_item(item),
                Place::ListOf(_) | Place::Free => Place::Free,
            };
            if map.contains_key(&key) {
                self.notes.note("duplicate", &key);
            }
            self.notes.path.push(Step::Key(key));
            let value = entries.next_value_seed(Seed { place, notes: self.notes });
            let step = self.notes.path.pop();
            if let (Some(Step::Key(key)), value) = (step, value?) {
                map.insert(key, value);
            }
        }
        Ok(Value::Object(map))
    }
}

/// A key: YAML's may be numbers or booleans, and become texts.
struct Key(String);

impl<'de> serde::Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;
            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a key")
            }
            fn visit_str<E>(self, value: &str) -> Result<Key, E> {
                Ok(Key(value.to_owned()))
            }
            fn visit_bool<E>(self, value: bool) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Key, E> {
                Ok(Key(value.to_string()))
            }
        }
        deserializer.deserialize_any(KeyVisitor)
    }
}

/// Whether bytes are a JSON object; the error is the text of Go's decoder.
pub fn check_json_object(body: &[u8]) -> Result<(), String> {
    match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(_) | Value::Null) => Ok(()),
        Ok(_) => Err("json: cannot unmarshal value into Go value of type map[string]interface {}".to_owned()),
        Err(error) => Err(go_error(body, &error)),
    }
}
