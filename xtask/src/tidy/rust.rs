//! A Rust file as the checks need it: its words with their lines, its functions, its test code, its bare text.
//!
//! Functions come from syn's tree. Bodies of macros (`proptest!`) have none; there they are found among the words.

use std::ops::RangeInclusive;

use proc_macro2::{Delimiter, LineColumn, Spacing, TokenStream, TokenTree};
use syn::{
    Attribute, Block, Ident, ImplItemFn, ItemConst, ItemEnum, ItemFn, ItemImpl, ItemMod, ItemStatic, ItemStruct,
    ItemTrait, ItemType, ItemUnion, Macro, Signature, TraitItemFn, Visibility,
    spanned::Spanned,
    visit::{self, Visit},
};

use super::Finding;

/// Every line there can be.
const EVERYWHERE: RangeInclusive<usize> = 1..=usize::MAX;

/// A parsed file.
#[derive(Debug)]
pub(super) struct Rust {
    pub(super) words: Vec<Word>,
    pub(super) functions: Vec<Function>,
    /// Types, and everything that is public in some degree.
    pub(super) items: Vec<Item>,
    /// Modules in files of their own.
    pub(super) modules: Vec<Module>,
    /// Lines of items that exist only in tests.
    tests: Vec<RangeInclusive<usize>>,
    /// The lines with all string literals blanked, comments kept.
    pub(super) bare: Vec<String>,
}

/// One token; a path separator and a bracket are words too.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Word {
    pub(super) text: String,
    pub(super) line: usize,
}

/// A type, function, constant or static, of a module or of an `impl` without a trait.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Item {
    pub(super) name: String,
    pub(super) line: usize,
    /// `pub`, `pub(crate)` or `pub(super)`.
    pub(super) is_public: bool,
    /// A struct, enum, union, trait or alias.
    pub(super) is_type: bool,
}

/// `mod NAME;`
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Module {
    pub(super) name: String,
    /// `#[path = "…"]`.
    pub(super) path: Option<String>,
    pub(super) test: bool,
}

/// One function with a body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Function {
    pub(super) name: String,
    /// From `fn` or what stands before it (`pub`, `unsafe`) to the closing brace.
    pub(super) lines: RangeInclusive<usize>,
    pub(super) doc: String,
    /// Has `#[test]`.
    pub(super) claim: bool,
    /// Its name was chosen by the trait it belongs to.
    pub(super) named_elsewhere: bool,
}

impl Function {
    pub(super) fn length(&self) -> usize {
        self.lines.end() + 1 - self.lines.start()
    }
}

impl Rust {
    pub(super) fn parse(path: &str, text: &str) -> Result<Self, Finding> {
        let fault =
            |error: syn::Error| Finding::new(path, error.span().start().line, format!("does not parse: {error}"));
        let syntax = syn::parse_file(text).map_err(fault)?;
        let tokens: TokenStream = text.parse().map_err(|error: proc_macro2::LexError| fault(error.into()))?;
        let mut flat = Flat::default();
        flat.add(tokens);
        let mut gathered = Gathered::default();
        gathered.visit_file(&syntax);
        if path.starts_with("tests/") || path.contains("/tests/") {
            gathered.tests.push(EVERYWHERE);
        }
        let bare = blank(text, &flat.strings);
        let Gathered { functions, items, modules, tests, .. } = gathered;
        Ok(Self { words: flat.words, functions, items, modules, tests, bare })
    }

    /// All of it exists only in tests, because the module that declares it does.
    pub(super) fn make_test(&mut self) {
        self.tests.push(EVERYWHERE);
    }

    /// Whether that is so.
    pub(super) fn is_all_test(&self) -> bool {
        self.tests.contains(&EVERYWHERE)
    }

    /// Whether this line exists only in tests.
    pub(super) fn is_test(&self, line: usize) -> bool {
        self.tests.iter().any(|lines| lines.contains(&line))
    }

    /// Lines where this sequence of words begins, those inside `lines` only.
    pub(super) fn places<'a>(
        &'a self,
        lines: RangeInclusive<usize>,
        sequence: &'a [&str],
    ) -> impl Iterator<Item = usize> + 'a {
        let matches = move |window: &&[Word]| window.iter().zip(sequence).all(|(word, wanted)| word.text == *wanted);
        let starts = self.words.windows(sequence.len()).filter(matches).map(|window| window[0].line);
        starts.filter(move |line| lines.contains(line))
    }
}

/// Words and string literals of a token stream.
#[derive(Default)]
struct Flat {
    words: Vec<Word>,
    strings: Vec<(LineColumn, LineColumn)>,
}

impl Flat {
    fn add(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => {
                    let (open, close) = brackets(group.delimiter());
                    self.push(open, group.span_open().start().line);
                    self.add(group.stream());
                    self.push(close, group.span_close().start().line);
                }
                TokenTree::Ident(ident) => self.push(&ident.to_string(), ident.span().start().line),
                TokenTree::Punct(punct) => {
                    let line = punct.span().start().line;
                    match self.words.last_mut() {
                        Some(last) if punct.as_char() == ':' && last.text == "joint:" => last.text = "::".into(),
                        _ if punct.as_char() == ':' && punct.spacing() == Spacing::Joint => self.push("joint:", line),
                        _ => self.push(&punct.as_char().to_string(), line),
                    }
                }
                TokenTree::Literal(literal) => self.add_literal(&literal),
            }
        }
    }

    fn add_literal(&mut self, literal: &proc_macro2::Literal) {
        let text = literal.to_string();
        let span = literal.span();
        let is_doc = matches!(&self.words[..], [.., doc, equals] if doc.text == "doc" && equals.text == "=");
        if text.ends_with(['"', '#']) && !is_doc {
            self.strings.push((span.start(), span.end()));
        }
        self.push(&text, span.start().line);
    }

    fn push(&mut self, text: &str, line: usize) {
        if !text.is_empty() {
            self.words.push(Word { text: text.into(), line });
        }
    }
}

fn brackets(delimiter: Delimiter) -> (&'static str, &'static str) {
    match delimiter {
        Delimiter::Parenthesis => ("(", ")"),
        Delimiter::Brace => ("{", "}"),
        Delimiter::Bracket => ("[", "]"),
        Delimiter::None => ("", ""),
    }
}

/// The lines of `text` with spaces in these stretches.
fn blank(text: &str, stretches: &[(LineColumn, LineColumn)]) -> Vec<String> {
    let mut lines: Vec<Vec<char>> = text.lines().map(|line| line.chars().collect()).collect();
    for (start, end) in stretches {
        for number in start.line..=end.line {
            let Some(line) = lines.get_mut(number - 1) else { continue };
            let from = if number == start.line { start.column } else { 0 };
            let to = if number == end.line { end.column } else { line.len() };
            let to = to.min(line.len());
            line.get_mut(from.min(to)..to).into_iter().flatten().for_each(|letter| *letter = ' ');
        }
    }
    lines.into_iter().map(String::from_iter).collect()
}

/// What a walk over the syntax tree gathers.
#[derive(Default)]
struct Gathered {
    functions: Vec<Function>,
    items: Vec<Item>,
    modules: Vec<Module>,
    tests: Vec<RangeInclusive<usize>>,
    in_trait_impl: bool,
}

impl Gathered {
    fn note(&mut self, name: &Ident, visibility: &Visibility, attributes: &[Attribute], is_type: bool) {
        let is_public = !matches!(visibility, Visibility::Inherited);
        let line = name.span().start().line;
        if attributes.iter().any(is_cfg_test) {
            self.tests.push(line..=line);
        }
        self.items.push(Item { name: name.to_string(), line, is_public, is_type });
    }

    fn add(&mut self, signature: &Signature, block: &Block, attributes: &[Attribute]) {
        let lines = signature.span().start().line..=block.brace_token.span.close().end().line;
        let claim = attributes.iter().any(|attribute| attribute.path().is_ident("test"));
        if claim || attributes.iter().any(is_cfg_test) {
            self.tests.push(lines.clone());
        }
        let doc = attributes.iter().filter_map(|attribute| text_of(attribute, "doc")).collect::<Vec<_>>().join("\n");
        let name = signature.ident.to_string();
        self.functions.push(Function { name, lines, doc, claim, named_elsewhere: self.in_trait_impl });
    }
}

impl<'ast> Visit<'ast> for Gathered {
    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        let test = module.attrs.iter().any(is_cfg_test);
        match &module.content {
            Some((braces, _)) if test => {
                self.tests.push(braces.span.open().start().line..=braces.span.close().end().line);
            }
            Some(_) => {}
            None => {
                let path = module.attrs.iter().find_map(|attribute| text_of(attribute, "path"));
                self.modules.push(Module { name: module.ident.to_string(), path, test });
            }
        }
        visit::visit_item_mod(self, module);
    }

    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        if item.attrs.iter().any(is_cfg_test) {
            self.tests.push(item.impl_token.span.start().line..=item.brace_token.span.close().end().line);
        }
        let outer = std::mem::replace(&mut self.in_trait_impl, item.trait_.is_some());
        visit::visit_item_impl(self, item);
        self.in_trait_impl = outer;
    }

    fn visit_item_struct(&mut self, item: &'ast ItemStruct) {
        self.note(&item.ident, &item.vis, &item.attrs, true);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast ItemEnum) {
        self.note(&item.ident, &item.vis, &item.attrs, true);
        visit::visit_item_enum(self, item);
    }

    fn visit_item_union(&mut self, item: &'ast ItemUnion) {
        self.note(&item.ident, &item.vis, &item.attrs, true);
        visit::visit_item_union(self, item);
    }

    fn visit_item_trait(&mut self, item: &'ast ItemTrait) {
        self.note(&item.ident, &item.vis, &item.attrs, true);
        visit::visit_item_trait(self, item);
    }

    fn visit_item_type(&mut self, item: &'ast ItemType) {
        self.note(&item.ident, &item.vis, &item.attrs, true);
        visit::visit_item_type(self, item);
    }

    fn visit_item_const(&mut self, item: &'ast ItemConst) {
        if item.ident != "_" {
            self.note(&item.ident, &item.vis, &item.attrs, false);
        }
        visit::visit_item_const(self, item);
    }

    fn visit_item_static(&mut self, item: &'ast ItemStatic) {
        self.note(&item.ident, &item.vis, &item.attrs, false);
        visit::visit_item_static(self, item);
    }

    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        self.note(&item.sig.ident, &item.vis, &item.attrs, false);
        let outer = std::mem::replace(&mut self.in_trait_impl, false);
        self.add(&item.sig, &item.block, &item.attrs);
        visit::visit_item_fn(self, item);
        self.in_trait_impl = outer;
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        if !self.in_trait_impl {
            self.note(&item.sig.ident, &item.vis, &item.attrs, false);
        }
        self.add(&item.sig, &item.block, &item.attrs);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast TraitItemFn) {
        if let Some(block) = &item.default {
            self.add(&item.sig, block, &item.attrs);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_macro(&mut self, item: &'ast Macro) {
        let mut flat = Flat::default();
        flat.add(item.tokens.clone());
        self.functions.extend(functions_among(&flat.words));
    }
}

fn is_cfg_test(attribute: &Attribute) -> bool {
    let syn::Meta::List(list) = &attribute.meta else { return false };
    let mut flat = Flat::default();
    flat.add(list.tokens.clone());
    let has = |name: &str| flat.words.iter().any(|word| word.text == name);
    list.path.is_ident("cfg") && has("test") && !has("not")
}

/// The text of `#[NAME = "text"]`, a doc comment's too.
fn text_of(attribute: &Attribute, name: &str) -> Option<String> {
    let syn::Meta::NameValue(pair) = &attribute.meta else { return None };
    match &pair.value {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) if pair.path.is_ident(name) => Some(text.value()),
        _ => None,
    }
}

/// Functions in the body of a macro: `fn NAME ( … ) … { … }`.
fn functions_among(words: &[Word]) -> Vec<Function> {
    let mut functions = Vec::new();
    for (at, pair) in words.windows(2).enumerate() {
        let is_name = pair[1].text.starts_with(|letter: char| letter.is_alphabetic() || letter == '_');
        if pair[0].text != "fn" || !is_name {
            continue;
        }
        if let Some(end) = body_end(&words[at + 2..]) {
            let claim = matches!(&words[..at], [.., word, _] if word.text == "test");
            let (name, lines) = (pair[1].text.clone(), pair[0].line..=end);
            functions.push(Function { name, lines, doc: String::new(), claim, named_elsewhere: false });
        }
    }
    functions
}

/// The line where the first braces outside all other brackets close; none if a semicolon comes before.
fn body_end(words: &[Word]) -> Option<usize> {
    let mut depth = 0_usize;
    let mut in_body = false;
    for word in words {
        match word.text.as_str() {
            ";" if depth == 0 => return None,
            open @ ("(" | "[" | "{") => {
                in_body |= open == "{" && depth == 0;
                depth += 1;
            }
            ")" | "]" | "}" => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if in_body && depth == 0 {
            return Some(word.line);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Rust {
        Rust::parse("vtrace-dp/src/x.rs", text).unwrap()
    }

    #[test]
    fn function_ends_at_its_brace_and_starts_after_its_attributes() {
        let rust = parse("/// Says.\n#[inline]\npub unsafe fn say() {\n    // one\n}\n");
        let function = &rust.functions[0];
        assert_eq!((function.name.as_str(), function.lines.clone(), function.length()), ("say", 3..=5, 3));
        assert_eq!(function.doc.trim(), "Says.");
    }

    #[test]
    fn function_inside_a_macro_is_seen_with_its_claim() {
        let rust =
            parse("proptest! {\n    #[test]\n    fn any_bytes_do(a in 0..{ 1 }, b: u8) {\n        body();\n    }\n}\n");
        assert_eq!(rust.functions[0].lines, 3..=5);
        assert!(rust.functions[0].claim);
    }

    #[test]
    fn tests_are_told_from_the_product() {
        let rust =
            parse("fn one() {}\n#[cfg(test)]\nmod tests {\n    fn two() {}\n}\n#[cfg(not(test))]\nmod real {\n}\n");
        assert_eq!([1, 4, 8].map(|line| rust.is_test(line)), [false, true, false]);
        assert!(Rust::parse("tests/tests/vm.rs", "fn one() {}").unwrap().is_test(1));
    }

    #[test]
    fn method_of_a_trait_is_not_named_here() {
        let rust = parse("impl Display for X { fn fmt(&self) {} }\nimpl X { fn own(&self) {} }\n");
        let named_elsewhere: Vec<bool> = rust.functions.iter().map(|function| function.named_elsewhere).collect();
        assert_eq!(named_elsewhere, [true, false]);
    }

    #[test]
    fn strings_are_blanked_and_comments_stay() {
        let rust = parse("//! Über\nconst A: &str = \"hidden\"; // seen\nconst B: &str = r#\"hid\nden\"#;\n");
        assert_eq!(rust.bare[0], "//! Über");
        assert!(
            rust.bare[1].contains("seen") && !rust.bare.concat().contains("hid") && !rust.bare.concat().contains("den")
        );
    }

    #[test]
    fn words_are_found_in_sequence_within_lines() {
        let rust = parse("fn a() { Instant::now(); }\nfn b() {\n    Instant::now();\n}\n");
        assert_eq!(rust.places(2..=4, &["Instant", "::", "now"]).collect::<Vec<_>>(), [3]);
    }
}
