//! What the model may do: read, and where allowed write and run, in one directory.
//!
//! Every path that the model gives is confined to the directory: relative, without `..`, and not
//! out of it through a symbolic link. This guards against a model that errs, not against another
//! program that swaps directories for links at the same moment. A command is not confined at all,
//! which is why running is allowed separately.
//!
//! Whatever goes wrong goes back to the model as a text that begins with `error:`, so that it can
//! do better. No tool ends the agent.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs, io,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use regex::RegexBuilder;
use serde::Deserialize;

use super::command::{self, Ended};
use crate::proto;

/// Larger files are neither read nor written.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Larger files are not searched.
const SEARCH_FILE_BYTES_MAX: u64 = 2 << 20;
const SEARCH_MATCHES_MAX: usize = 200;
const SEARCH_LINE_CHARS_MAX: usize = 300;
const SEARCH_TIME_MAX: Duration = Duration::from_secs(20);
/// What a tool may say about its output, a status or where to go on, beside the output itself.
const NOTES_BYTES_MAX: usize = 256;
const PATTERN_BYTES_MAX: usize = 1 << 20;
const LIST_DEPTH_MAX: u32 = 8;
const LIST_ENTRIES_MAX: usize = 2_000;
/// A file with a zero byte in its first bytes is taken to be no text, as git does.
const TEXT_PROBE_BYTES: usize = 8_000;
/// Listed, never walked into: nothing in it was written by a person.
const SKIPPED_DIR: &str = ".git";

const LIST_DIR: &str = r#"{"type":"object","properties":{"path":{"type":"string","description":"A directory, relative to the working directory; \".\" is the working directory itself."},"depth":{"type":"integer","minimum":1,"maximum":8,"description":"How many levels to list. Absent: 1."}},"required":["path"],"additionalProperties":false}"#;
const READ_FILE: &str = r#"{"type":"object","properties":{"path":{"type":"string","description":"A file, relative to the working directory."},"first_line":{"type":"integer","minimum":1,"description":"The first line to read, counted from 1. Absent: 1."},"lines":{"type":"integer","minimum":1,"description":"How many lines to read. Absent: to the end."}},"required":["path"],"additionalProperties":false}"#;
const SEARCH: &str = r#"{"type":"object","properties":{"pattern":{"type":"string","description":"A regular expression (Rust syntax) that is matched against each line."},"path":{"type":"string","description":"A file or directory to search, relative to the working directory. Absent: everything."}},"required":["pattern"],"additionalProperties":false}"#;
const WRITE_FILE: &str = r#"{"type":"object","properties":{"path":{"type":"string","description":"A file, relative to the working directory. Missing directories are made."},"content":{"type":"string","description":"The whole content of the file."}},"required":["path","content"],"additionalProperties":false}"#;
const RUN_COMMAND: &str = r#"{"type":"object","properties":{"command":{"type":"string","description":"A command line for sh, started in the working directory without standard input."}},"required":["command"],"additionalProperties":false}"#;

/// What the tools may do, and how much.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Whether `write_file` is offered.
    pub(super) may_write: bool,
    /// Whether `run_command` is offered.
    pub(super) may_run: bool,
    /// The longest output of one call.
    pub(super) output_bytes_max: usize,
    /// How long one command runs.
    pub(super) command_time_max: Duration,
}

/// What a call came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// The output for the model.
    pub(super) text: String,
    /// Whether the text is an error.
    pub(super) failed: bool,
}

/// The tools of one rollout.
#[derive(Debug, Clone)]
pub(super) struct Toolbox {
    /// Canonical, so that a path can be compared with it.
    dir: Arc<Path>,
    limits: Limits,
}

impl Toolbox {
    /// Tools for `dir`, which must be a directory.
    pub(super) fn open(dir: &Path, limits: Limits) -> io::Result<Self> {
        let dir = fs::canonicalize(dir)?;
        fs::read_dir(&dir)?;
        Ok(Self {
            dir: dir.into(),
            limits,
        })
    }

    /// From now on an output has at most this many bytes, or as many as before where that is less.
    pub(super) fn shorten_outputs(&mut self, bytes_max: usize) {
        self.limits.output_bytes_max = self.limits.output_bytes_max.min(bytes_max);
    }

    /// The tools as the model sees them: only those that may be used.
    pub(super) fn definitions(&self) -> Vec<proto::Tool> {
        let mut tools = vec![
            definition("list_dir", "List a directory.", LIST_DIR),
            definition(
                "read_file",
                "Read a text file, or some of its lines.",
                READ_FILE,
            ),
            definition(
                "search",
                "Find the lines of text files that match a regular expression.",
                SEARCH,
            ),
        ];
        if self.limits.may_write {
            tools.push(definition(
                "write_file",
                "Create a text file, or replace one.",
                WRITE_FILE,
            ));
        }
        if self.limits.may_run {
            tools.push(definition(
                "run_command",
                "Run a shell command and get its output and exit status.",
                RUN_COMMAND,
            ));
        }
        tools
    }

    /// Runs one call.
    ///
    /// # Cancellation
    ///
    /// A dropped call kills its command. A call that reads or writes files ends by itself soon.
    pub(super) async fn call(&self, name: &str, arguments: &str) -> Answer {
        let result = match name {
            "list_dir" => self.on_files(arguments, Self::list_dir).await,
            "read_file" => self.on_files(arguments, Self::read_file).await,
            "search" => self.on_files(arguments, Self::search).await,
            "write_file" if self.limits.may_write => {
                self.on_files(arguments, Self::write_file).await
            }
            "run_command" if self.limits.may_run => self.run_command(arguments).await,
            _ => Err(ToolError::NoSuchTool),
        };
        let bytes_max = self.limits.output_bytes_max + NOTES_BYTES_MAX;
        match result {
            Ok(text) => Answer {
                text: truncated(text, bytes_max),
                failed: false,
            },
            Err(error) => Answer {
                text: truncated(format!("error: {error}"), bytes_max),
                failed: true,
            },
        }
    }

    /// Runs a tool that blocks on files, away from the tasks that must not wait.
    async fn on_files<A>(
        &self,
        arguments: &str,
        tool: fn(&Self, A) -> Result<String, ToolError>,
    ) -> Result<String, ToolError>
    where
        A: serde::de::DeserializeOwned + Send + 'static,
    {
        let arguments = parse(arguments)?;
        let toolbox = self.clone();
        tokio::task::spawn_blocking(move || tool(&toolbox, arguments))
            .await
            .map_err(|_| ToolError::Broken)?
    }

    fn list_dir(&self, arguments: ListDir) -> Result<String, ToolError> {
        let path = self.confine(&arguments.path)?;
        if !fs::metadata(&path)?.is_dir() {
            return Err(ToolError::NotADirectory);
        }
        let depth = arguments.depth.unwrap_or(1).clamp(1, LIST_DEPTH_MAX);
        let mut listing = Listing::default();
        listing.add(&path, 0, depth)?;
        if listing.entries == 0 {
            return Ok("(empty)\n".to_owned());
        }
        if listing.full {
            let _ = writeln!(
                listing.text,
                "[only the first {LIST_ENTRIES_MAX} entries are listed]"
            );
        }
        Ok(listing.text)
    }

    fn read_file(&self, arguments: ReadFile) -> Result<String, ToolError> {
        let path = self.confine(&arguments.path)?;
        let text = read_text(&path, FILE_BYTES_MAX)?;
        let first = arguments.first_line.unwrap_or(1).max(1);
        let wanted = arguments.lines.unwrap_or(usize::MAX);
        let lines = text.lines().count();
        if first > lines && first > 1 {
            return Err(ToolError::PastTheEnd { lines });
        }
        let mut shown = 0;
        let mut part = String::new();
        for line in text.split_inclusive('\n').skip(first - 1).take(wanted) {
            // The first line always counts as shown, cut where it alone is too long.
            if shown > 0 && part.len() + line.len() > self.limits.output_bytes_max {
                break;
            }
            part.push_str(line);
            shown += 1;
        }
        let last = first + shown - usize::from(shown > 0);
        let mut part = truncated(part, self.limits.output_bytes_max);
        if first == 1 && last >= lines {
            return Ok(part);
        }
        if !part.ends_with('\n') {
            part.push('\n');
        }
        let _ = write!(part, "[lines {first} to {last} of {lines}");
        if last < lines {
            let _ = write!(part, "; go on with first_line {}", last + 1);
        }
        part.push(']');
        Ok(part)
    }

    fn search(&self, arguments: Search) -> Result<String, ToolError> {
        let pattern = RegexBuilder::new(&arguments.pattern)
            .size_limit(PATTERN_BYTES_MAX)
            .build()
            .map_err(|error| ToolError::Pattern(Box::new(error)))?;
        let path = self.confine(arguments.path.as_deref().unwrap_or("."))?;
        let mut hunt = Hunt {
            dir: &self.dir,
            pattern,
            until: Instant::now() + SEARCH_TIME_MAX,
            text: String::new(),
            matches: 0,
            ended: None,
        };
        if fs::metadata(&path)?.is_dir() {
            hunt.directory(&path);
        } else {
            hunt.file(&path);
        }
        if hunt.matches == 0 {
            hunt.text.push_str("no matches\n");
        }
        if let Some(why) = hunt.ended {
            let _ = writeln!(hunt.text, "[{why}]");
        }
        Ok(hunt.text)
    }

    fn write_file(&self, arguments: WriteFile) -> Result<String, ToolError> {
        let path = self.confine(&arguments.path)?;
        if arguments.content.len() as u64 > FILE_BYTES_MAX {
            return Err(ToolError::TooLarge {
                bytes_max: FILE_BYTES_MAX,
            });
        }
        let verb = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => "replaced",
            Ok(_) => return Err(ToolError::NotAFile),
            Err(error) if error.kind() == io::ErrorKind::NotFound => "created",
            Err(error) => return Err(error.into()),
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &arguments.content)?;
        Ok(format!(
            "{verb} {} ({} bytes)\n",
            arguments.path,
            arguments.content.len()
        ))
    }

    async fn run_command(&self, arguments: &str) -> Result<String, ToolError> {
        let arguments: RunCommand = parse(arguments)?;
        if arguments.command.trim().is_empty() {
            return Err(ToolError::EmptyCommand);
        }
        let ran = command::run(
            &arguments.command,
            &self.dir,
            self.limits.command_time_max,
            self.limits.output_bytes_max,
        )
        .await?;
        let mut text = ran.output;
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        if ran.escaped {
            text.push_str("[a process that left the command's group is still running]\n");
        }
        match ran.ended {
            Ended::TimedOut => Err(ToolError::TimedOut {
                after: self.limits.command_time_max,
                output: text,
            }),
            // The status comes first, so that truncation never takes it.
            Ended::Exited(status) => Ok(match status.code() {
                Some(code) => format!("exit status {code}\n{text}"),
                None => format!("ended by a signal\n{text}"),
            }),
        }
    }

    /// The path of a file or directory inside of the directory, where it exists or would be made.
    fn confine(&self, path: &str) -> Result<PathBuf, ToolError> {
        let mut existing = self.dir.to_path_buf();
        for component in Path::new(path).components() {
            match component {
                Component::Normal(name) => existing.push(name),
                Component::CurDir => {}
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    return Err(ToolError::Outside);
                }
            }
        }
        // Links are resolved in what exists. What does not exist yet cannot be a link. A link
        // that leads nowhere does exist, and fails to resolve.
        let mut missing: Vec<OsString> = Vec::new();
        while let Err(error) = fs::symlink_metadata(&existing) {
            match (error.kind(), existing.file_name()) {
                (io::ErrorKind::NotFound, Some(name)) => missing.push(name.to_owned()),
                _ => return Err(error.into()),
            }
            existing.pop();
        }
        let mut real = fs::canonicalize(&existing)?;
        if !real.starts_with(&self.dir) {
            return Err(ToolError::Outside);
        }
        real.extend(missing.iter().rev());
        Ok(real)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListDir {
    path: String,
    depth: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadFile {
    path: String,
    first_line: Option<usize>,
    lines: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Search {
    pattern: String,
    path: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WriteFile {
    path: String,
    content: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RunCommand {
    command: String,
}

/// Why a call has no result. The text is for the model.
#[derive(Debug, thiserror::Error)]
enum ToolError {
    #[error("there is no tool of this name")]
    NoSuchTool,
    #[error("the arguments do not fit: {0}")]
    Arguments(#[from] serde_json::Error),
    #[error("the pattern is no regular expression: {0}")]
    Pattern(Box<regex::Error>),
    #[error("the path leaves the working directory; give a path relative to it, without `..`")]
    Outside,
    #[error("this is not a directory")]
    NotADirectory,
    #[error("this is not a file")]
    NotAFile,
    #[error("this is not a text file")]
    NotText,
    #[error("the file is larger than {bytes_max} bytes")]
    TooLarge { bytes_max: u64 },
    #[error("the file has only {lines} lines")]
    PastTheEnd { lines: usize },
    #[error("the command is empty")]
    EmptyCommand,
    #[error("the command was killed after {after:?}\n{output}")]
    TimedOut { after: Duration, output: String },
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the tool broke down")]
    Broken,
}

fn definition(name: &str, description: &str, parameters: &str) -> proto::Tool {
    proto::Tool {
        tool: Some(proto::tool::Tool::Function(proto::FunctionTool {
            name: name.to_owned(),
            description: description.to_owned(),
            parameters: parameters.to_owned(),
            strict: false,
        })),
    }
}

/// Models write nothing, not `{}`, where they mean no arguments.
fn parse<A: serde::de::DeserializeOwned>(arguments: &str) -> Result<A, ToolError> {
    let text = if arguments.trim().is_empty() {
        "{}"
    } else {
        arguments
    };
    Ok(serde_json::from_str(text)?)
}

/// The text of a file that is UTF-8 and no larger than `bytes_max`.
fn read_text(path: &Path, bytes_max: u64) -> Result<String, ToolError> {
    let metadata = fs::metadata(path)?;
    // A named pipe would be waited for without end.
    if !metadata.is_file() {
        return Err(ToolError::NotAFile);
    }
    if metadata.len() > bytes_max {
        return Err(ToolError::TooLarge { bytes_max });
    }
    let bytes = fs::read(path)?;
    if bytes[..bytes.len().min(TEXT_PROBE_BYTES)].contains(&0) {
        return Err(ToolError::NotText);
    }
    String::from_utf8(bytes).map_err(|_| ToolError::NotText)
}

/// `text`, cut at a character where it is longer than `bytes_max`, with a note of how much is missing.
fn truncated(mut text: String, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text;
    }
    let end = text.floor_char_boundary(bytes_max);
    let missing = text.len() - end;
    text.truncate(end);
    let _ = write!(text, "\n[… {missing} bytes left out …]");
    text
}

/// The entries of a directory by name, so that the same call gives the same text.
fn sorted(dir: &Path) -> io::Result<Vec<fs::DirEntry>> {
    let mut entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

/// A listing in the making: one line an entry, indented by its level.
#[derive(Default)]
struct Listing {
    text: String,
    entries: usize,
    full: bool,
}

impl Listing {
    fn add(&mut self, dir: &Path, level: usize, depth: u32) -> io::Result<()> {
        for entry in sorted(dir)? {
            if self.entries == LIST_ENTRIES_MAX {
                self.full = true;
                return Ok(());
            }
            self.entries += 1;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // Of the entry itself: a link is listed, not followed.
            let metadata = entry.metadata()?;
            let indent = "  ".repeat(level);
            let _ = if metadata.is_dir() {
                writeln!(self.text, "{indent}{name}/")
            } else if metadata.is_symlink() {
                writeln!(self.text, "{indent}{name} (link)")
            } else {
                writeln!(self.text, "{indent}{name} ({} bytes)", metadata.len())
            };
            if metadata.is_dir() && depth > 1 && name != SKIPPED_DIR {
                // What cannot be read is listed as if it were empty.
                let _ = self.add(&entry.path(), level + 1, depth - 1);
            }
        }
        Ok(())
    }
}

/// A search in progress.
struct Hunt<'a> {
    dir: &'a Path,
    pattern: regex::Regex,
    until: Instant,
    text: String,
    matches: usize,
    ended: Option<&'static str>,
}

impl Hunt<'_> {
    /// Searches what can be read; what cannot is passed over.
    fn directory(&mut self, dir: &Path) {
        let Ok(entries) = sorted(dir) else { return };
        for entry in entries {
            if self.ended.is_some() {
                return;
            }
            // Of the entry itself: links are not followed, so the walk ends and stays inside.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && entry.file_name() != SKIPPED_DIR => {
                    self.directory(&entry.path());
                }
                Ok(kind) if kind.is_file() => self.file(&entry.path()),
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn file(&mut self, path: &Path) {
        if Instant::now() > self.until {
            self.ended = Some("the search took too long; give a path");
            return;
        }
        let Ok(text) = read_text(path, SEARCH_FILE_BYTES_MAX) else {
            return;
        };
        let shown = path.strip_prefix(self.dir).unwrap_or(path);
        for (index, line) in text.lines().enumerate() {
            if !self.pattern.is_match(line) {
                continue;
            }
            if self.matches == SEARCH_MATCHES_MAX {
                self.ended = Some("there are more matches; give a narrower pattern or a path");
                return;
            }
            self.matches += 1;
            let _ = write!(self.text, "{}:{}: ", shown.display(), index + 1);
            self.text.extend(line.chars().take(SEARCH_LINE_CHARS_MAX));
            self.text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    const LIMITS: Limits = Limits {
        may_write: true,
        may_run: true,
        output_bytes_max: 4_096,
        command_time_max: Duration::from_secs(20),
    };

    fn toolbox(limits: Limits) -> (TempDir, Toolbox) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("src/deep")).unwrap();
        fs::write(dir.path().join("readme.md"), "one\ntwo\nthree\n").unwrap();
        fs::write(dir.path().join("src/main.rs"), "fn main() {}\n").unwrap();
        fs::write(dir.path().join("src/deep/data.bin"), b"fn\0\x01").unwrap();
        let toolbox = Toolbox::open(dir.path(), limits).unwrap();
        (dir, toolbox)
    }

    async fn ok(toolbox: &Toolbox, name: &str, arguments: &str) -> String {
        let answer = toolbox.call(name, arguments).await;
        assert!(!answer.failed, "{}", answer.text);
        answer.text
    }

    async fn error(toolbox: &Toolbox, name: &str, arguments: &str) -> String {
        let answer = toolbox.call(name, arguments).await;
        assert!(answer.failed, "{}", answer.text);
        answer.text
    }

    const OUTSIDE: &str =
        "error: the path leaves the working directory; give a path relative to it, without `..`";

    #[tokio::test]
    async fn no_path_leaves_the_directory() {
        let (dir, toolbox) = toolbox(LIMITS);
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret\n").unwrap();
        symlink(outside.path(), dir.path().join("door")).unwrap();
        symlink(outside.path().join("secret"), dir.path().join("window")).unwrap();
        symlink(outside.path().join("unborn"), dir.path().join("dangling")).unwrap();

        for path in [
            "..",
            "../secret",
            "src/../../secret",
            "src/../readme.md",
            "/etc/passwd",
            "door",
            "door/secret",
            "window",
        ] {
            let arguments = serde_json::json!({ "path": path }).to_string();
            assert_eq!(
                error(&toolbox, "read_file", &arguments).await,
                OUTSIDE,
                "{path}"
            );
            assert_eq!(
                error(&toolbox, "list_dir", &arguments).await,
                OUTSIDE,
                "{path}"
            );
            let arguments = serde_json::json!({ "path": path, "content": "x" }).to_string();
            assert_eq!(
                error(&toolbox, "write_file", &arguments).await,
                OUTSIDE,
                "{path}"
            );
            let arguments = serde_json::json!({ "path": path, "pattern": "." }).to_string();
            assert_eq!(
                error(&toolbox, "search", &arguments).await,
                OUTSIDE,
                "{path}"
            );
        }
        for path in ["door/new", "door/new/deeper", "dangling", "dangling/x"] {
            let arguments = serde_json::json!({ "path": path, "content": "x" }).to_string();
            error(&toolbox, "write_file", &arguments).await;
        }
        let left: Vec<_> = sorted(outside.path())
            .unwrap()
            .iter()
            .map(fs::DirEntry::file_name)
            .collect();
        assert_eq!(left, ["secret"]);
        assert_eq!(
            fs::read(outside.path().join("secret")).unwrap(),
            b"secret\n"
        );
        // A walk meets the links, and does not follow them.
        assert_eq!(
            ok(&toolbox, "search", r#"{"pattern":"secret"}"#).await,
            "no matches\n"
        );
    }

    #[tokio::test]
    async fn links_that_stay_inside_are_followed() {
        let (dir, toolbox) = toolbox(LIMITS);
        symlink(dir.path().join("src"), dir.path().join("alias")).unwrap();
        assert_eq!(
            ok(&toolbox, "read_file", r#"{"path":"alias/main.rs"}"#).await,
            "fn main() {}\n"
        );
    }

    #[tokio::test]
    async fn a_directory_is_listed_in_order() {
        let (_dir, toolbox) = toolbox(LIMITS);
        assert_eq!(
            ok(&toolbox, "list_dir", r#"{"path":"."}"#).await,
            "readme.md (14 bytes)\nsrc/\n"
        );
        assert_eq!(
            ok(&toolbox, "list_dir", r#"{"path":"./","depth":3}"#).await,
            "readme.md (14 bytes)\nsrc/\n  deep/\n    data.bin (4 bytes)\n  main.rs (13 bytes)\n"
        );
        assert_eq!(
            error(&toolbox, "list_dir", r#"{"path":"readme.md"}"#).await,
            "error: this is not a directory"
        );
    }

    #[tokio::test]
    async fn a_file_is_read_whole_or_by_lines() {
        let (_dir, toolbox) = toolbox(LIMITS);
        for (arguments, expected) in [
            (r#"{"path":"readme.md"}"#, "one\ntwo\nthree\n"),
            (
                r#"{"path":"readme.md","first_line":2}"#,
                "two\nthree\n[lines 2 to 3 of 3]",
            ),
            (
                r#"{"path":"readme.md","first_line":2,"lines":1}"#,
                "two\n[lines 2 to 2 of 3; go on with first_line 3]",
            ),
        ] {
            assert_eq!(ok(&toolbox, "read_file", arguments).await, expected);
        }
        for (arguments, expected) in [
            (
                r#"{"path":"readme.md","first_line":9}"#,
                "error: the file has only 3 lines",
            ),
            (r#"{"path":"src"}"#, "error: this is not a file"),
            (
                r#"{"path":"src/deep/data.bin"}"#,
                "error: this is not a text file",
            ),
            (
                r#"{"path":"none"}"#,
                "error: No such file or directory (os error 2)",
            ),
        ] {
            assert_eq!(error(&toolbox, "read_file", arguments).await, expected);
        }
    }

    #[tokio::test]
    async fn a_long_file_is_cut_between_lines_and_says_where_to_go_on() {
        let (dir, toolbox) = toolbox(Limits {
            output_bytes_max: 10,
            ..LIMITS
        });
        fs::write(dir.path().join("long"), "12345\n12345\n12345\n").unwrap();
        assert_eq!(
            ok(&toolbox, "read_file", r#"{"path":"long"}"#).await,
            "12345\n[lines 1 to 1 of 3; go on with first_line 2]"
        );
        fs::write(dir.path().join("wide"), "123456789012345\nx\n").unwrap();
        assert_eq!(
            ok(&toolbox, "read_file", r#"{"path":"wide"}"#).await,
            "1234567890\n[… 6 bytes left out …]\n[lines 1 to 1 of 2; go on with first_line 2]"
        );
    }

    #[tokio::test]
    async fn a_file_is_created_and_replaced() {
        let (dir, toolbox) = toolbox(LIMITS);
        assert_eq!(
            ok(
                &toolbox,
                "write_file",
                r#"{"path":"a/b/c.txt","content":"é"}"#
            )
            .await,
            "created a/b/c.txt (2 bytes)\n"
        );
        assert_eq!(
            ok(
                &toolbox,
                "write_file",
                r#"{"path":"a/b/c.txt","content":""}"#
            )
            .await,
            "replaced a/b/c.txt (0 bytes)\n"
        );
        assert_eq!(fs::read(dir.path().join("a/b/c.txt")).unwrap(), b"");
        assert_eq!(
            error(&toolbox, "write_file", r#"{"path":"src","content":""}"#).await,
            "error: this is not a file"
        );
    }

    #[tokio::test]
    async fn a_search_gives_places() {
        let (_dir, toolbox) = toolbox(LIMITS);
        // `data.bin` matches too, and is no text.
        assert_eq!(
            ok(&toolbox, "search", r#"{"pattern":"^fn|t.o"}"#).await,
            "readme.md:2: two\nsrc/main.rs:1: fn main() {}\n"
        );
        assert_eq!(
            ok(&toolbox, "search", r#"{"pattern":"o","path":"readme.md"}"#).await,
            "readme.md:1: one\nreadme.md:2: two\n"
        );
        assert!(
            error(&toolbox, "search", r#"{"pattern":"("}"#)
                .await
                .starts_with("error: the pattern is no regular expression: ")
        );
    }

    #[tokio::test]
    async fn a_command_tells_its_status_and_output() {
        let (_dir, toolbox) = toolbox(LIMITS);
        assert_eq!(
            ok(&toolbox, "run_command", r#"{"command":"ls; exit 2"}"#).await,
            "exit status 2\nreadme.md\nsrc\n"
        );
        assert_eq!(
            error(&toolbox, "run_command", r#"{"command":"  "}"#).await,
            "error: the command is empty"
        );
    }

    #[tokio::test]
    async fn a_command_over_its_time_is_an_error_with_its_output() {
        let (_dir, toolbox) = toolbox(Limits {
            command_time_max: Duration::from_millis(200),
            ..LIMITS
        });
        assert_eq!(
            error(
                &toolbox,
                "run_command",
                r#"{"command":"echo so far; sleep 600"}"#
            )
            .await,
            "error: the command was killed after 200ms\nso far\n"
        );
    }

    #[tokio::test]
    async fn what_is_not_allowed_is_not_offered_and_not_done() {
        let (dir, toolbox) = toolbox(Limits {
            may_write: false,
            may_run: false,
            ..LIMITS
        });
        let names: Vec<_> = toolbox
            .definitions()
            .into_iter()
            .map(|tool| match tool.tool {
                Some(proto::tool::Tool::Function(function)) => function.name,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(names, ["list_dir", "read_file", "search"]);
        let before = sorted(dir.path()).unwrap().len();
        for (name, arguments) in [
            ("write_file", r#"{"path":"new","content":""}"#),
            ("run_command", r#"{"command":"touch new"}"#),
            ("fly", "{}"),
        ] {
            assert_eq!(
                error(&toolbox, name, arguments).await,
                "error: there is no tool of this name"
            );
        }
        assert_eq!(sorted(dir.path()).unwrap().len(), before);
    }

    #[tokio::test]
    async fn bad_arguments_are_told_to_the_model() {
        let (_dir, toolbox) = toolbox(LIMITS);
        for arguments in ["", "{", "[]", r#"{"path":1}"#, r#"{"path":".","deep":1}"#] {
            let text = error(&toolbox, "list_dir", arguments).await;
            assert!(
                text.starts_with("error: the arguments do not fit: "),
                "{text}"
            );
        }
    }

    #[test]
    fn schemas_are_json_with_the_fields_that_are_read() {
        for (schema, fields) in [
            (LIST_DIR, &["path", "depth"][..]),
            (READ_FILE, &["path", "first_line", "lines"]),
            (SEARCH, &["pattern", "path"]),
            (WRITE_FILE, &["path", "content"]),
            (RUN_COMMAND, &["command"]),
        ] {
            let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
            let properties: Vec<_> = schema["properties"].as_object().unwrap().keys().collect();
            assert_eq!(properties, fields);
        }
    }

    #[test]
    fn truncation_keeps_whole_characters() {
        assert_eq!(truncated("aé".to_owned(), 3), "aé");
        assert_eq!(truncated("aéb".to_owned(), 2), "a\n[… 3 bytes left out …]");
    }
}
