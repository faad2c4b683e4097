//! A JSON document whose strings are those of the text it was read from.
//!
//! What encoders and tables look at. It means what a [`Value`] means (members ascend by key, the last of two with one key counts), but reading a
//! stored object into one copies no text, and there is one allocation for each object and list in it instead of several for each member.

use std::borrow::Cow;
use std::fmt;
use std::ops::Index;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use serde_json::{Number, Value};

/// Any JSON value.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Tree<'a> {
    /// `null`, and what is absent.
    #[default]
    Null,
    /// `true`, `false`.
    Bool(bool),
    /// A number.
    Number(Number),
    /// A string.
    String(Cow<'a, str>),
    /// An array.
    List(Vec<Tree<'a>>),
    /// An object.
    Object(Members<'a>),
}

/// An object's members, ascending by key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Members<'a>(Vec<(Cow<'a, str>, Tree<'a>)>);

/// What an index finds where nothing is.
static NULL: Tree<'static> = Tree::Null;

impl<'a> Members<'a> {
    fn find(&self, key: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(found, _)| found.as_ref().cmp(key))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Tree<'a>> {
        self.find(key).ok().map(|at| &self.0[at].1)
    }

    /// Sets the value of a key.
    pub fn set(&mut self, key: Cow<'a, str>, value: Tree<'a>) {
        // Texts are mostly sorted already.
        if self.0.last().is_none_or(|(last, _)| last.as_ref() < key.as_ref()) {
            return self.0.push((key, value));
        }
        match self.find(&key) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => self.0.insert(at, (key, value)),
        }
    }

    /// Takes a key away.
    pub fn remove(&mut self, key: &str) {
        if let Ok(at) = self.find(key) {
            self.0.remove(at);
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keys and values, ascending by key.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&str, &Tree<'a>)> {
        self.0.iter().map(|(key, value)| (key.as_ref(), value))
    }
}

impl<'a> Tree<'a> {
    /// Reads a JSON text.
    ///
    /// # Errors
    /// What is no JSON.
    pub fn read(text: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// A member's value; `None` for none, and for what is no object.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.as_object()?.get(key)
    }

    /// What a path leads to: keys and indices, each behind a slash. Keys have no slash and no tilde in them.
    pub fn pointer(&self, path: &str) -> Option<&Self> {
        path.split('/').skip(1).try_fold(self, |value, step| match value {
            Tree::Object(members) => members.get(step),
            Tree::List(items) => items.get(step.parse::<usize>().ok()?),
            _ => None,
        })
    }

    /// The string, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Tree::String(text) = self { Some(text) } else { None }
    }

    /// The boolean, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Tree::Bool(set) = self { Some(*set) } else { None }
    }

    /// The integer, if it is one that fits.
    pub fn as_i64(&self) -> Option<i64> {
        if let Tree::Number(number) = self { number.as_i64() } else { None }
    }

    /// The number, if it is one.
    pub fn as_f64(&self) -> Option<f64> {
        if let Tree::Number(number) = self { number.as_f64() } else { None }
    }

    /// The items, if it is a list.
    pub fn as_list(&self) -> Option<&[Self]> {
        if let Tree::List(items) = self { Some(items) } else { None }
    }

    /// The members, if it is an object.
    pub fn as_object(&self) -> Option<&Members<'a>> {
        if let Tree::Object(members) = self { Some(members) } else { None }
    }

    /// The members, to be changed.
    pub fn as_object_mut(&mut self) -> Option<&mut Members<'a>> {
        if let Tree::Object(members) = self { Some(members) } else { None }
    }

    /// The value of a key, to be changed.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Self> {
        let members = self.as_object_mut()?;
        members.find(key).ok().map(|at| &mut members.0[at].1)
    }

    /// Whether it is `null`.
    pub fn is_null(&self) -> bool {
        *self == Tree::Null
    }

    /// A copy that borrows nothing.
    pub fn to_value(&self) -> Value {
        match self {
            Tree::Null => Value::Null,
            Tree::Bool(set) => Value::Bool(*set),
            Tree::Number(number) => Value::Number(number.clone()),
            Tree::String(text) => Value::String(text.clone().into_owned()),
            Tree::List(items) => Value::Array(items.iter().map(Self::to_value).collect()),
            Tree::Object(members) => Value::Object(members.iter().map(|(key, value)| (key.to_owned(), value.to_value())).collect()),
        }
    }
}

impl<'a> From<&'a Value> for Tree<'a> {
    fn from(value: &'a Value) -> Self {
        match value {
            Value::Null => Tree::Null,
            Value::Bool(set) => Tree::Bool(*set),
            Value::Number(number) => Tree::Number(number.clone()),
            Value::String(text) => Tree::String(Cow::Borrowed(text)),
            Value::Array(items) => Tree::List(items.iter().map(Self::from).collect()),
            Value::Object(map) => {
                let mut members = Members(Vec::with_capacity(map.len()));
                map.iter().for_each(|(key, value)| members.set(Cow::Borrowed(key), Self::from(value)));
                Tree::Object(members)
            }
        }
    }
}

impl<'a> Index<&str> for Tree<'a> {
    type Output = Tree<'a>;

    /// `Null` where nothing is.
    fn index(&self, key: &str) -> &Tree<'a> {
        self.get(key).unwrap_or(&NULL)
    }
}

impl PartialEq<&str> for Tree<'_> {
    fn eq(&self, text: &&str) -> bool {
        self.as_str() == Some(*text)
    }
}

/// JSON text.
impl fmt::Display for Tree<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl Serialize for Members<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.len()))?;
        for (key, value) in self.iter() {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl Serialize for Tree<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Tree::Null => serializer.serialize_unit(),
            Tree::Bool(set) => serializer.serialize_bool(*set),
            Tree::Number(number) => number.serialize(serializer),
            Tree::String(text) => serializer.serialize_str(text),
            Tree::List(items) => items.serialize(serializer),
            Tree::Object(members) => members.serialize(serializer),
        }
    }
}

/// A string that borrows where it can (serde's own `Cow` never does).
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Tree<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree<'de>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Tree<'de>, E> {
        Ok(Tree::Null)
    }

    fn visit_bool<E>(self, set: bool) -> Result<Tree<'de>, E> {
        Ok(Tree::Bool(set))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Tree<'de>, E> {
        Ok(Tree::Number(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Tree<'de>, E> {
        Ok(Tree::Number(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Tree<'de>, E> {
        Ok(Number::from_f64(number).map_or(Tree::Null, Tree::Number))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Tree<'de>, E> {
        Ok(Tree::String(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Tree<'de>, E> {
        Ok(Tree::String(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Tree<'de>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Tree::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Tree<'de>, A::Error> {
        let mut members = Members::default();
        while let Some((Text(key), value)) = access.next_entry()? {
            members.set(key, value);
        }
        Ok(Tree::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_means_what_a_value_means() {
        for text in [
            r#"{"b":1,"a":[true,null,-2,1.5,18446744073709551615,1e30],"c":{"x":"\u00e9\n","é":""},"b":"again"}"#,
            r#"{"metadata":{},"a":{"z":1,"y":{"w":[],"v":{}}},"":0}"#,
            "null",
            "[]",
            r#""text""#,
        ] {
            let tree = Tree::read(text.as_bytes()).expect("JSON");
            let value: Value = serde_json::from_str(text).expect("JSON");
            assert_eq!(tree.to_value(), value);
            assert_eq!(Tree::from(&value), tree);
            assert_eq!(tree.to_string(), value.to_string());
        }
        assert!(Tree::read(b"{\"a\":}").is_err());
    }

    #[test]
    fn paths_lead_through_objects_and_lists() {
        let mut tree = Tree::read(br#"{"status":{"podIPs":[{"ip":"10.0.0.1"}]},"n":3}"#).expect("JSON");
        assert_eq!(tree.pointer("/status/podIPs/0/ip").and_then(Tree::as_str), Some("10.0.0.1"));
        assert_eq!((tree.pointer("/status/podIPs/1"), tree.pointer("/n/x")), (None, None));
        assert_eq!(tree["n"].as_i64(), Some(3));
        assert!(tree["absent"]["too"].is_null() && !(tree["n"] == "3"));
        if let Some(members) = tree.as_object_mut() {
            members.set("a".into(), Tree::Bool(true));
            members.remove("status");
        }
        assert_eq!(tree.to_string(), r#"{"a":true,"n":3}"#);
    }
}
