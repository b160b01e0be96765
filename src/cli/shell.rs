//! `keyward completion`, `keyward man`: for the shell and for the reader.

use std::path::PathBuf;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Arguments, Failure, Output};

/// The completion script of `shell`.
pub(super) fn completion(shell: Shell, output: &mut Output) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "keyward", &mut script);
    Ok(output.raw(&script)?)
}

/// The manual page of `keyward` itself; with a directory, one page for each verb into it.
pub(super) fn man(directory: Option<PathBuf>, output: &mut Output) -> Result<(), Failure> {
    let command = Arguments::command();
    if let Some(directory) = directory {
        std::fs::create_dir_all(&directory)?;
        return Ok(clap_mangen::generate_to(command, directory)?);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(output.raw(&page)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_gets_its_page() {
        let directory = tempfile::tempdir().expect("a directory");
        man(Some(directory.path().to_path_buf()), &mut Output::of_process(super::super::Format::Table)).expect("written");
        for page in ["keyward.1", "keyward-quarantine-apply.1", "keyward-agent-run.1"] {
            assert!(directory.path().join(page).exists(), "{page}");
        }
    }
}
