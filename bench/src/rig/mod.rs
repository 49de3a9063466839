//! What several cases measure with.
//!
//! | module | what |
//! |---|---|
//! | [`lanes`] | guests made of memory files, and their drivers |
//! | [`plain`] | the plain ways |
//! | [`backend`] | device and drain, and a frontend that speaks vhost-user to them |
//! | [`source`] | a tracefs ring buffer full of events |
//! | [`stock`] | pages moved as trace-cmd moves them |

pub(crate) mod backend;
pub(crate) mod lanes;
pub(crate) mod plain;
pub(crate) mod source;
pub(crate) mod stock;
