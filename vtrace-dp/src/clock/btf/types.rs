//! Walks BTF as the kernel shows it, one file over another for a module (split BTF).
//!
//! In:    bytes of /sys/kernel/btf/vmlinux, and of /sys/kernel/btf/kvm over it.
//! Out:   structs by name, their members at byte offsets, parameters of a tracepoint.
//! Runs:  once, when the clock starts. A look-up is a walk over all types: a millisecond, and no index to hold.
//! Full:  does not apply.
//! Trust: the kernel's files, but every index is checked: a cut file is an error, never a panic.
//!
//! Format: Documentation/bpf/btf.rst, include/uapi/linux/btf.h. Of the published parsers those under a licence like ours
//! read no split BTF or hide the members.

/// A file is not BTF, or is cut.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("BTF: {what} at {at} is out of place")]
pub struct Malformed {
    /// What was being read.
    pub what: &'static str,
    /// Where in its section.
    pub at: usize,
}

const MAGIC: u16 = 0xeb9f;
const TYPE_BYTES: usize = 12;
/// Typedefs, qualifiers and anonymous members followed in one go.
const DEPTH_MAX: usize = 32;
/// Members looked at for one name. The structures looked into have some hundred; one that holds itself twice has no end.
const MEMBERS_MAX: usize = 1 << 16;

/// How far the search for a member has come.
struct Looks {
    deep: usize,
    members: usize,
}

/// `BTF_KIND_*`.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// One file of BTF and, for a module's, the one it stands on.
#[derive(Debug)]
pub(super) struct Btf<'a> {
    base: Option<&'a Btf<'a>>,
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type of this file starts in `types`.
    starts: Vec<u32>,
    /// The number of the first of them.
    first_id: u32,
    /// Offset of the first string of this file.
    first_string: u32,
}

/// One type: its three words and what follows them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Type<'a> {
    name: u32,
    info: u32,
    /// Size or the type it refers to.
    word: u32,
    rest: &'a [u8],
}

impl Type<'_> {
    fn kind(&self) -> u32 {
        (self.info >> 24) & 0x7f
    }

    /// Members, parameters or values. The format had 16 bits for it and zeroes above.
    fn count(&self) -> usize {
        usize::try_from(self.info & 0x00ff_ffff).expect("24 bits")
    }
}

impl<'a> Btf<'a> {
    /// # Errors
    /// [`Malformed`] when the header or a type does not fit its file.
    pub(super) fn parse(bytes: &'a [u8], base: Option<&'a Btf<'a>>) -> Result<Self, Malformed> {
        let magic = bytes.first_chunk::<2>().map(|two| u16::from_le_bytes(*two));
        if magic != Some(MAGIC) {
            return Err(Malformed { what: "magic", at: 0 });
        }
        let section = |offset_at: usize, what: &'static str| {
            let start = word(bytes, 4)?.checked_add(word(bytes, offset_at)?)?;
            let end = start.checked_add(word(bytes, offset_at + 4)?)?;
            bytes.get(start..end).ok_or(what).ok()
        };
        let types = section(8, "types").ok_or(Malformed { what: "type section", at: 8 })?;
        let strings = section(16, "strings").ok_or(Malformed { what: "string section", at: 16 })?;
        let first_id = base.map_or(Some(1), |base| base.first_id.checked_add(u32::try_from(base.starts.len()).ok()?));
        let first_string = base.map_or(Some(0), |base| u32::try_from(base.strings.len()).ok());
        let (Some(first_id), Some(first_string)) = (first_id, first_string) else {
            return Err(Malformed { what: "base", at: 0 });
        };
        Ok(Self { base, types, strings, starts: starts(types)?, first_id, first_string })
    }

    /// Every struct of this name in this file that has members here (a module may bring copies of its own).
    pub(super) fn structs<'s>(&'s self, name: &'s str) -> impl Iterator<Item = Type<'a>> + 's {
        self.named(name).filter(|found| found.kind() == kind::STRUCT && found.count() > 0)
    }

    /// Byte offset of `path` ("a.b.c") in `outer`; `Ok(None)` when there is no such member.
    ///
    /// # Errors
    /// [`Malformed`] for a member that does not start at a byte or a type that cannot be followed.
    pub(super) fn offset(&self, outer: Type<'a>, path: &str) -> Result<Option<u32>, Malformed> {
        let mut bits = 0_u32;
        let mut inside = Some(outer);
        for name in path.split('.') {
            let Some(holder) = inside else { return Ok(None) };
            let Some((at, member)) = self.member(holder, name, &mut Looks { deep: 0, members: 0 })? else {
                return Ok(None);
            };
            bits = bits.checked_add(at).ok_or(Malformed { what: "member offset", at: 0 })?;
            inside = self.plain(member);
        }
        if !bits.is_multiple_of(8) {
            return Err(Malformed { what: "member that starts inside a byte", at: 0 });
        }
        Ok(Some(bits / 8))
    }

    /// Which argument of tracepoint `name` is a pointer to `structure`, counted as a raw tracepoint program sees them.
    pub(super) fn tracepoint_argument(&self, name: &str, structure: &str) -> Option<u32> {
        let typedef = format!("btf_trace_{name}");
        let hook = self.named(&typedef).find(|found| found.kind() == kind::TYPEDEF)?;
        let function = self.pointee(hook.word)?;
        if function.kind() != kind::FUNC_PROTO {
            return None;
        }
        // The first parameter is the tracepoint's own `void *__data`.
        let mut arguments = (1..function.count()).map(|index| word32(function.rest, index * 8 + 4));
        let is_wanted = |pointer: u32| self.pointee(pointer).is_some_and(|to| self.says(to.name, structure));
        arguments.position(|pointer| pointer.is_some_and(is_wanted)).and_then(|index| u32::try_from(index).ok())
    }

    /// Bit offset and type of a member, looked for in anonymous members too.
    fn member(&self, holder: Type<'a>, name: &str, looks: &mut Looks) -> Result<Option<(u32, u32)>, Malformed> {
        if looks.deep > DEPTH_MAX || !matches!(holder.kind(), kind::STRUCT | kind::UNION) {
            return Ok(None);
        }
        let has_bit_fields = holder.info >> 31 == 1;
        for index in 0..holder.count() {
            let at = |shift| word32(holder.rest, index * TYPE_BYTES + shift);
            let (Some(member_name), Some(member), Some(offset)) = (at(0), at(4), at(8)) else {
                return Err(Malformed { what: "member", at: index });
            };
            let bits = if has_bit_fields { offset & 0x00ff_ffff } else { offset };
            looks.members += 1;
            if looks.members > MEMBERS_MAX {
                return Err(Malformed { what: "structure without end", at: index });
            }
            if self.says(member_name, name) {
                return Ok(Some((bits, member)));
            }
            if member_name != 0 {
                continue;
            }
            let Some(inside) = self.plain(member) else { continue };
            looks.deep += 1;
            let found = self.member(inside, name, looks)?;
            looks.deep -= 1;
            if let Some((inner, found)) = found {
                let bits = bits.checked_add(inner).ok_or(Malformed { what: "member offset", at: index })?;
                return Ok(Some((bits, found)));
            }
        }
        Ok(None)
    }

    /// What a pointer points to, once its typedefs and qualifiers are stripped.
    fn pointee(&self, id: u32) -> Option<Type<'a>> {
        let pointer = self.plain(id)?;
        if pointer.kind() == kind::PTR { self.plain(pointer.word) } else { None }
    }

    /// The type without its typedefs, qualifiers and tags.
    fn plain(&self, mut id: u32) -> Option<Type<'a>> {
        for _ in 0..DEPTH_MAX {
            let found = self.of(id)?;
            match found.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => id = found.word,
                _ => return Some(found),
            }
        }
        None
    }

    fn named<'s>(&'s self, name: &'s str) -> impl Iterator<Item = Type<'a>> + 's {
        let ids = (self.first_id..).take(self.starts.len());
        ids.filter_map(|id| self.of(id)).filter(move |found| self.says(found.name, name))
    }

    fn of(&self, id: u32) -> Option<Type<'a>> {
        if id < self.first_id {
            return self.base?.of(id);
        }
        let start = *self.starts.get(usize::try_from(id - self.first_id).ok()?)?;
        let bytes = self.types.get(usize::try_from(start).ok()?..)?;
        let at = |shift| word32(bytes, shift);
        Some(Type { name: at(0)?, info: at(4)?, word: at(8)?, rest: bytes.get(TYPE_BYTES..)? })
    }

    /// Whether the string at `offset` is `name`.
    fn says(&self, offset: u32, name: &str) -> bool {
        if offset < self.first_string {
            return self.base.is_some_and(|base| base.says(offset, name));
        }
        let from = usize::try_from(offset - self.first_string).ok().and_then(|offset| self.strings.get(offset..));
        from.and_then(|from| from.strip_prefix(name.as_bytes())).is_some_and(|rest| rest.first() == Some(&0))
    }
}

/// Where each type starts.
fn starts(types: &[u8]) -> Result<Vec<u32>, Malformed> {
    let mut starts = Vec::with_capacity(types.len() / 20);
    let mut at = 0;
    while at < types.len() {
        let malformed = Malformed { what: "type", at };
        let Some(info) = word32(types, at + 4) else { return Err(malformed) };
        let head = Type { name: 0, info, word: 0, rest: &[] };
        let per_item = match head.kind() {
            kind::INT | kind::VAR | kind::DECL_TAG => Some((1, 4)),
            kind::ARRAY => Some((1, 12)),
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => Some((head.count(), 12)),
            kind::ENUM | kind::FUNC_PROTO => Some((head.count(), 8)),
            // Pointers, forwards, typedefs, qualifiers, functions, floats and tags are their three words.
            2..=18 => Some((0, 0)),
            _ => None,
        };
        let (Some((items, bytes)), Ok(start)) = (per_item, u32::try_from(at)) else { return Err(malformed) };
        starts.push(start);
        at += TYPE_BYTES + items * bytes;
    }
    if at == types.len() { Ok(starts) } else { Err(Malformed { what: "last type", at }) }
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk::<4>().map(|four| u32::from_le_bytes(*four))
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(word32(bytes, at)?).ok()
}
