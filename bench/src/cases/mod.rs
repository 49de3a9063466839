//! One file a case; a case is named after a stage of a page's way.

pub(crate) mod drain;
