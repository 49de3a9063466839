//! `vtrace-bench run CASE --json OUT`: measured ratios against the stock way, in one run.

fn main() {}
