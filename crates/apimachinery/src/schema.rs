//! Schema facts of the built-in types: fields, merge keys, list types, protobuf numbers, and how Go writes zero values.
//!
//! The facts are a table in `data/schema.tsv`, parsed once on first use into slices that borrow the included text (about 1,500 fields,
//! well below a megabyte of memory). Source: the OpenAPI v3 documents and protobuf definitions of kube-apiserver v1.37.2.

use std::collections::HashMap;
use std::sync::OnceLock;

static TABLE: &str = include_str!("../data/schema.tsv");

/// Index of a [`Type`] in the [`Schema`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TypeId(u16);

/// What a type is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A JSON object with known fields.
    Object,
    /// `resource.Quantity`: a JSON string (or number on input), protobuf `{1: string}`.
    Quantity,
    /// `meta.v1.Time`: RFC 3339 with seconds, protobuf `{1: seconds, 2: nanos}`.
    Time,
    /// `meta.v1.MicroTime`: RFC 3339 with microseconds, protobuf as [`Shape::Time`].
    MicroTime,
    /// `intstr.IntOrString`: JSON number or string, protobuf `{1: type, 2: int, 3: string}`.
    IntOrString,
    /// `runtime.RawExtension`: any JSON object, protobuf `{1: bytes}` of JSON or of an enveloped protobuf object.
    RawExtension,
    /// `meta.v1.FieldsV1`: any JSON object, protobuf `{1: JSON bytes}`.
    FieldsV1,
    /// A JSON object without known fields (`meta.v1.Patch` and the empty union members).
    Free,
}

/// A field's value, or that of a list's or map's item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// JSON string.
    String,
    /// JSON boolean.
    Bool,
    /// 32-bit signed integer.
    Int32,
    /// 64-bit signed integer.
    Int64,
    /// Double-precision number.
    Double,
    /// Base64 in JSON, bytes in protobuf.
    Bytes,
    /// A list of strings inside a map (protobuf wraps it in a message with field 1, `ExtraValue`).
    Strings,
    /// Another type.
    Type(TypeId),
}

/// Whether a field holds one item, a list, or a map from strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// One item.
    Single,
    /// JSON array.
    List,
    /// JSON object used as a map.
    Map,
}

/// `x-kubernetes-list-type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListType {
    /// Replaced as a whole.
    Atomic,
    /// Items are unique scalars.
    Set,
    /// Items are objects keyed by [`Field::list_keys`].
    Map,
}

/// One field of an object type.
#[derive(Debug)]
pub struct Field {
    /// JSON name.
    pub name: &'static str,
    /// Single, list or map.
    pub container: Container,
    /// The item's type.
    pub item: Item,
    /// The OpenAPI spelling of the item (`integer/int32`, `string/byte`), or a short type name.
    pub spelling: &'static str,
    /// Protobuf field number; 0 when protobuf does not have it (apiVersion, kind).
    pub number: u32,
    /// Number of the inline message that holds this field on the protobuf wire; 0 when none does.
    pub inline: u32,
    /// Go holds a pointer, so that zero and absent differ.
    pub pointer: bool,
    /// JSON leaves the field out when it is empty (`omitempty`; without effect on structs held by value).
    pub omit_empty: bool,
    /// JSON leaves the field out when it is the zero value (`omitzero`).
    pub omit_zero: bool,
    /// OpenAPI says required.
    pub required: bool,
    /// `x-kubernetes-patch-merge-key`.
    pub merge_key: Option<&'static str>,
    /// `x-kubernetes-patch-strategy` has `merge`.
    pub patch_merge: bool,
    /// `x-kubernetes-patch-strategy` has `retainKeys`.
    pub patch_retain_keys: bool,
    /// List type, if declared.
    pub list_type: Option<ListType>,
    /// Comma-joined list map keys; empty when none.
    pub list_keys: &'static str,
    /// `x-kubernetes-map-type: atomic`.
    pub map_atomic: bool,
    /// Comma-joined enum values; empty when none.
    pub enum_values: &'static str,
    /// JSON text of the OpenAPI default; empty when none.
    pub default: &'static str,
}

/// An entry of a type's protobuf layout, in ascending order of numbers.
#[derive(Debug)]
pub enum Wire {
    /// Index into [`Type::fields`].
    Field(u16),
    /// A message that protobuf has and JSON has not: its number and its fields.
    Inline(u32, Box<[u16]>),
}

/// One type.
#[derive(Debug)]
pub struct Type {
    /// Short name: `core.v1.Pod`, `meta.v1.ObjectMeta`.
    pub name: &'static str,
    /// Shape on the wire.
    pub shape: Shape,
    /// OpenAPI spelling for shapes that are no objects (`string/date-time`, `string/int-or-string`).
    pub spelling: &'static str,
    /// `x-kubernetes-map-type: atomic`.
    pub map_atomic: bool,
    /// `group/version/kind`, comma-joined; `all` for kinds that every group has; empty for none.
    pub gvks: &'static str,
    /// JSON text of `x-kubernetes-unions`; empty when none.
    pub unions: &'static str,
    /// Fields by JSON name, ascending.
    pub fields: Box<[Field]>,
    /// Protobuf layout.
    pub wire: Box<[Wire]>,
}

impl Type {
    /// The field with this JSON name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.binary_search_by(|field| field.name.cmp(name)).ok().map(|index| &self.fields[index])
    }

    /// The full OpenAPI name, as `io.k8s.api.core.v1.Pod`.
    pub fn openapi_name(&self) -> String {
        openapi_name(self.name)
    }
}

/// The full OpenAPI name of a type's short name.
pub fn openapi_name(short: &str) -> String {
    let prefix = match short.split('.').next().unwrap_or("") {
        "meta" => "io.k8s.apimachinery.pkg.apis.",
        "resource" if short == "resource.Quantity" => "io.k8s.apimachinery.pkg.api.",
        "intstr" => "io.k8s.apimachinery.pkg.util.",
        "runtime" | "version" => "io.k8s.apimachinery.pkg.",
        _ => "io.k8s.api.",
    };
    format!("{prefix}{short}")
}

/// All types.
#[derive(Debug)]
pub struct Schema {
    types: Vec<Type>,
    names: HashMap<&'static str, TypeId>,
    kinds: HashMap<(&'static str, &'static str, &'static str), TypeId>,
}

impl Schema {
    /// The type behind an id of this schema.
    pub fn get(&self, id: TypeId) -> &Type {
        &self.types[usize::from(id.0)]
    }

    /// The type with this short name.
    pub fn by_name(&self, name: &str) -> Option<TypeId> {
        self.names.get(name).copied()
    }

    /// The type of a kind. `DeleteOptions` and `WatchEvent` belong to every group and version.
    pub fn by_kind(&self, group: &str, version: &str, kind: &str) -> Option<TypeId> {
        // The map's keys are 'static; a lookup by shorter borrows goes through a shortened view of the same map.
        let kinds: &HashMap<(&str, &str, &str), TypeId> = &self.kinds;
        kinds.get(&(group, version, kind)).or_else(|| kinds.get(&("*", "*", kind))).copied()
    }

    /// All types with their ids, by short name.
    pub fn iter(&self) -> impl Iterator<Item = (TypeId, &Type)> {
        self.types.iter().enumerate().map(|(index, found)| (TypeId(index as u16), found))
    }
}

/// The schema, parsed on first use.
pub fn schema() -> &'static Schema {
    static SCHEMA: OnceLock<Schema> = OnceLock::new();
    SCHEMA.get_or_init(|| parse(TABLE))
}

/// Types that clients ask for and OpenAPI does not list (`meta.v1`, types.go, v1.37).
static EXTRA: &str = "t\tmeta.v1.PartialObjectMetadata\t\t\tmeta.k8s.io/v1/PartialObjectMetadata\t
f\tapiVersion\tstring\t0\t0\tE
f\tkind\tstring\t0\t0\tE
f\tmetadata\tmeta.v1.ObjectMeta\t1\t0\tE
t\tmeta.v1.PartialObjectMetadataList\t\t\tmeta.k8s.io/v1/PartialObjectMetadataList\t
f\tapiVersion\tstring\t0\t0\tE
f\titems\t[]meta.v1.PartialObjectMetadata\t2\t0\tR
f\tkind\tstring\t0\t0\tE
f\tmetadata\tmeta.v1.ListMeta\t1\t0\tE
";

fn parse(table: &'static str) -> Schema {
    let lines = || table.lines().chain(EXTRA.lines());
    let names: HashMap<&'static str, TypeId> = lines()
        .filter_map(|line| line.strip_prefix("t\t"))
        .enumerate()
        .map(|(index, line)| (line.split('\t').next().unwrap_or(""), TypeId(index as u16)))
        .collect();
    let mut types: Vec<Type> = Vec::with_capacity(names.len());
    let mut fields: Vec<Field> = Vec::new();
    let mut pending: Option<Type> = None;
    for line in lines() {
        if let Some(row) = line.strip_prefix("t\t") {
            types.extend(finish(pending.take(), &mut fields));
            pending = Some(parse_type(row));
        } else if let Some(row) = line.strip_prefix("f\t") {
            fields.push(parse_field(row, &names));
        }
    }
    types.extend(finish(pending, &mut fields));
    let mut kinds = HashMap::new();
    for (index, found) in types.iter().enumerate() {
        let id = TypeId(index as u16);
        if found.gvks == "all" {
            kinds.insert(("*", "*", found.name.rsplit('.').next().unwrap_or("")), id);
            continue;
        }
        for gvk in found.gvks.split(',').filter(|gvk| !gvk.is_empty()) {
            let mut parts = gvk.split('/');
            let (group, version, kind) = (parts.next(), parts.next(), parts.next());
            kinds.insert((group.unwrap_or(""), version.unwrap_or(""), kind.unwrap_or("")), id);
        }
    }
    Schema { types, names, kinds }
}

fn parse_type(row: &'static str) -> Type {
    let mut cells = row.split('\t');
    let mut cell = || cells.next().unwrap_or("");
    let name = cell();
    let spelling = cell();
    let map_atomic = cell() == "atomic";
    let gvks = cell();
    let unions = cell();
    let shape = match (name, spelling) {
        ("resource.Quantity", _) => Shape::Quantity,
        ("meta.v1.Time", _) => Shape::Time,
        ("meta.v1.MicroTime", _) => Shape::MicroTime,
        ("intstr.IntOrString", _) => Shape::IntOrString,
        ("runtime.RawExtension", _) => Shape::RawExtension,
        ("meta.v1.FieldsV1", _) => Shape::FieldsV1,
        (_, "") => Shape::Object,
        _ => Shape::Free,
    };
    Type { name, shape, spelling, map_atomic, gvks, unions, fields: Box::default(), wire: Box::default() }
}

fn parse_field(row: &'static str, names: &HashMap<&'static str, TypeId>) -> Field {
    let mut cells = row.split('\t');
    let mut cell = || cells.next().unwrap_or("");
    let name = cell();
    let field_type = cell();
    let number = cell().parse().unwrap_or(0);
    let inline = cell().parse().unwrap_or(0);
    let flags = cell();
    let merge_key = Some(cell()).filter(|key| !key.is_empty());
    let strategy = cell();
    let list_type = match cell() {
        "atomic" => Some(ListType::Atomic),
        "set" => Some(ListType::Set),
        "map" => Some(ListType::Map),
        _ => None,
    };
    let (container, spelling) = if let Some(item) = field_type.strip_prefix("map:") {
        (Container::Map, item)
    } else if let Some(item) = field_type.strip_prefix("[]") {
        (Container::List, item)
    } else {
        (Container::Single, field_type)
    };
    let item = match spelling {
        "string" => Item::String,
        "boolean" => Item::Bool,
        "integer/int32" => Item::Int32,
        "integer/int64" => Item::Int64,
        "number/double" => Item::Double,
        "string/byte" => Item::Bytes,
        "[]string" => Item::Strings,
        other => Item::Type(names.get(other).copied().unwrap_or_else(|| panic!("data/schema.tsv names no type {other}"))),
    };
    Field {
        name,
        container,
        item,
        spelling,
        number,
        inline,
        pointer: flags.contains('P'),
        omit_empty: flags.contains('E'),
        omit_zero: flags.contains('Z'),
        required: flags.contains('R'),
        merge_key,
        patch_merge: strategy.split(',').any(|word| word == "merge"),
        patch_retain_keys: strategy.split(',').any(|word| word == "retainKeys"),
        list_type,
        list_keys: cell(),
        map_atomic: cell() == "atomic",
        enum_values: cell(),
        default: cell(),
    }
}

fn finish(pending: Option<Type>, fields: &mut Vec<Field>) -> Option<Type> {
    let mut found = pending?;
    let mut fields = std::mem::take(fields);
    fields.sort_by_key(|field| field.name);
    let mut direct: Vec<(u32, u16)> = Vec::new();
    let mut inlines: Vec<(u32, Vec<(u32, u16)>)> = Vec::new();
    for (index, field) in fields.iter().enumerate().filter(|(_, field)| field.number != 0) {
        let entry = (field.number, index as u16);
        if field.inline == 0 {
            direct.push(entry);
        } else if let Some((_, list)) = inlines.iter_mut().find(|(number, _)| *number == field.inline) {
            list.push(entry);
        } else {
            inlines.push((field.inline, vec![entry]));
        }
    }
    let mut wire: Vec<(u32, Wire)> = direct.into_iter().map(|(number, index)| (number, Wire::Field(index))).collect();
    for (number, mut list) in inlines {
        list.sort_unstable();
        wire.push((number, Wire::Inline(number, list.into_iter().map(|(_, index)| index).collect())));
    }
    wire.sort_by_key(|(number, _)| *number);
    found.fields = fields.into_boxed_slice();
    found.wire = wire.into_iter().map(|(_, entry)| entry).collect();
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_pods() {
        let schema = schema();
        let pod = schema.get(schema.by_kind("", "v1", "Pod").expect("Pod is a kind"));
        assert_eq!(pod.openapi_name(), "io.k8s.api.core.v1.Pod");
        let spec = schema.get(schema.by_name("core.v1.PodSpec").expect("PodSpec is a type"));
        let containers = spec.field("containers").expect("a PodSpec has containers");
        assert_eq!((containers.number, containers.merge_key, containers.patch_merge), (2, Some("name"), true));
        let ports = schema.get(schema.by_name("core.v1.Container").expect("type")).field("ports").expect("field");
        assert_eq!((ports.list_keys, ports.list_type), ("containerPort,protocol", Some(ListType::Map)));
        assert!(schema.by_kind("apps", "v1", "DeleteOptions").is_some());
    }

    #[test]
    fn inline_messages_are_laid_out() {
        let schema = schema();
        let volume = schema.get(schema.by_name("core.v1.Volume").expect("type"));
        assert_eq!(volume.wire.len(), 2);
        assert!(matches!(&volume.wire[1], Wire::Inline(2, fields) if fields.len() > 25));
    }
}
