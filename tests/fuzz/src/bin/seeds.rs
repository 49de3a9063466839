//! `seeds FOLDER`: writes the seeds of every target to `FOLDER/TARGET/`.

use std::{env, fs, path::PathBuf};

use anyhow::{Context, Result};
use vtrace_fuzz::TARGETS;

fn main() -> Result<()> {
    let root = PathBuf::from(env::args_os().nth(1).context("which folder?")?);
    for target in TARGETS {
        let folder = root.join(target.name);
        fs::create_dir_all(&folder)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
