//! What tests need of Python's packages, installed once under target/.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What was found. `None`: it cannot be had here, and a note on standard error says so; with `CI` or this
/// variable in the environment that is a failure.
pub(crate) fn or_note<'a, T>(
    found: &'a Result<T, String>,
    what: &str,
    variable: &str,
) -> Option<&'a T> {
    match found {
        Ok(found) => Some(found),
        Err(reason) => {
            let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
            assert!(
                !set("CI") && !set(variable),
                "{what} cannot be tested: {reason}"
            );
            // Not by a macro: what those print is kept back where a test passes.
            let note = format!("note: {what} is NOT tested: {reason}\n");
            std::io::stderr().write_all(note.as_bytes()).unwrap();
            None
        }
    }
}

/// A virtual environment of this name with the packages of this file. Its interpreter is `bin/python`.
pub(crate) fn installed(name: &str, requirements: &Path) -> Result<PathBuf, String> {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let wanted = fs::read_to_string(requirements).unwrap();
    // Written last, so that an installation that was broken off is begun anew.
    let installed = home.join("installed.txt");
    if fs::read_to_string(&installed).ok().as_ref() != Some(&wanted) {
        let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
        finish(
            Command::new(python)
                .args(["-m", "venv", "--clear"])
                .arg(&home),
        )?;
        let pip = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-r",
        ];
        finish(
            Command::new(home.join("bin/python"))
                .args(pip)
                .arg(requirements),
        )?;
        fs::write(&installed, wanted).unwrap();
    }
    Ok(home)
}

/// Runs a command to its end, and gives what it printed.
pub(crate) fn finish(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}\n{said}", output.status))
}
