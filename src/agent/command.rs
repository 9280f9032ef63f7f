//! One shell command: run in a directory, with a time limit, as a process group that dies whole.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{io::AsyncReadExt as _, net::unix::pipe, process::Command, time::timeout};

/// The variable with the server's key. Commands of the model do not get to see it.
pub(super) const API_KEY_VARIABLE: &str = "HOTLOOP_API_KEY";

/// How long the rest of the output is read for after the process group is dead.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(1);

/// What a command did.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ran {
    /// How it ended.
    pub(super) ended: Ended,
    /// Standard output and standard error, as they were written, in one text.
    pub(super) output: String,
    /// Whether a process that left the group still holds the output open.
    pub(super) escaped: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// By itself or by somebody's signal.
    Exited(ExitStatus),
    /// Killed: it ran for longer than it may.
    TimedOut,
}

/// Runs `sh -c command` in `dir` and waits for it, at most `time_max`. Of its output the first and
/// the last half of `bytes_max` are kept.
///
/// # Cancellation
///
/// Dropping the future kills the whole process group.
pub(super) async fn run(
    command: &str,
    dir: &Path,
    time_max: Duration,
    bytes_max: usize,
) -> io::Result<Ran> {
    // One pipe for both outputs, so that their lines stay in the order in which they were written.
    let (reader, writer) = io::pipe()?;
    let mut child = Command::new("sh")
        .arg("-c")
        .arg(command)
        .current_dir(dir)
        .env_remove(API_KEY_VARIABLE)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let group = Group(child.id());
    let mut pipe = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
    let mut output = Output::new(bytes_max);
    let mut open = true;
    let waited = {
        let mut wait = std::pin::pin!(timeout(time_max, child.wait()));
        let mut read = std::pin::pin!(output.fill(&mut pipe));
        // A command may close its output long before it ends, or end long before its children
        // close theirs: neither waits for the other.
        loop {
            tokio::select! {
                waited = &mut wait => break waited,
                ended = &mut read, if open => {
                    ended?;
                    open = false;
                }
            }
        }
    };
    drop(group);
    let ended = match waited {
        Ok(status) => Ended::Exited(status?),
        Err(_) => {
            child.kill().await?;
            Ended::TimedOut
        }
    };
    let escaped = open
        && match timeout(DRAIN_TIME_MAX, output.fill(&mut pipe)).await {
            Ok(read) => {
                read?;
                false
            }
            Err(_) => true,
        };
    Ok(Ran {
        ended,
        output: output.into_text(),
        escaped,
    })
}

/// A process group. Killed when dropped, so that no way out of `run` leaves one behind.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let Some(leader) = self.0 else { return };
        // The shell's own `kill`, since the standard library has none for groups and this crate
        // has no unsafe code. It fails where the group is already empty, which is as good.
        let _ = std::process::Command::new("sh")
            .args(["-c", "kill -s KILL -- \"-$1\"", "sh", &leader.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

/// The first and the last bytes of an output, and how many are missing in between. Both matter:
/// the first error of a build stands at the top, its verdict at the end.
struct Output {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    half_bytes_max: usize,
    dropped_bytes: u64,
}

impl Output {
    fn new(bytes_max: usize) -> Self {
        Self {
            head: Vec::new(),
            tail: VecDeque::new(),
            half_bytes_max: bytes_max / 2,
            dropped_bytes: 0,
        }
    }

    /// Reads to the end. Dropping the future loses nothing that was read.
    async fn fill(&mut self, pipe: &mut pipe::Receiver) -> io::Result<()> {
        let mut buffer = [0_u8; 8192];
        loop {
            match pipe.read(&mut buffer).await? {
                0 => return Ok(()),
                length => self.push(&buffer[..length]),
            }
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        let room = self.half_bytes_max - self.head.len();
        let (first, rest) = bytes.split_at(room.min(bytes.len()));
        self.head.extend_from_slice(first);
        self.tail.extend(rest);
        let excess = self.tail.len().saturating_sub(self.half_bytes_max);
        self.tail.drain(..excess);
        self.dropped_bytes += excess as u64;
    }

    fn into_text(mut self) -> String {
        if self.dropped_bytes == 0 {
            self.head.extend(self.tail);
            return String::from_utf8_lossy(&self.head).into_owned();
        }
        let tail: Vec<u8> = self.tail.into();
        format!(
            "{}\n[… {} bytes left out …]\n{}",
            String::from_utf8_lossy(&self.head),
            self.dropped_bytes,
            String::from_utf8_lossy(&tail),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    async fn run_here(command: &str, time_max: Duration, bytes_max: usize) -> Ran {
        let dir = tempfile::tempdir().unwrap();
        run(command, dir.path(), time_max, bytes_max).await.unwrap()
    }

    fn exit_code(ran: &Ran) -> Option<i32> {
        match ran.ended {
            Ended::Exited(status) => status.code(),
            Ended::TimedOut => None,
        }
    }

    #[tokio::test]
    async fn both_outputs_keep_their_order_and_the_status_is_told() {
        let ran = run_here("echo one; echo two >&2; echo three; exit 3", LONG, 1000).await;
        assert_eq!(exit_code(&ran), Some(3));
        assert_eq!(ran.output, "one\ntwo\nthree\n");
        assert!(!ran.escaped);
    }

    #[tokio::test]
    async fn standard_input_is_empty() {
        let ran = run_here("cat; echo read", LONG, 1000).await;
        assert_eq!(ran.output, "read\n");
    }

    #[tokio::test]
    async fn a_command_over_its_time_dies_with_its_children() {
        // The child holds the output open: that it is closed afterwards shows that it died too.
        let ran = run_here(
            "sleep 600 & echo started; wait",
            Duration::from_millis(300),
            1000,
        )
        .await;
        assert_eq!(
            ran,
            Ran {
                ended: Ended::TimedOut,
                output: "started\n".to_owned(),
                escaped: false,
            }
        );
    }

    #[tokio::test]
    async fn what_a_command_leaves_in_the_background_dies_when_it_ends() {
        let ran = run_here("sleep 600 & echo over", LONG, 1000).await;
        assert_eq!(exit_code(&ran), Some(0));
        assert_eq!(ran.output, "over\n");
        assert!(!ran.escaped);
    }

    #[tokio::test]
    async fn a_command_that_closes_its_output_is_still_waited_for() {
        let ran = run_here("exec >&- 2>&-; exit 4", LONG, 1000).await;
        assert_eq!(exit_code(&ran), Some(4));
    }

    #[test]
    fn a_long_output_keeps_its_head_and_its_tail() {
        let mut output = Output::new(8);
        for piece in [&b"abc"[..], b"defgh", b"ijklmnopqrst", b"uvwxyz"] {
            output.push(piece);
        }
        assert_eq!(output.into_text(), "abcd\n[… 18 bytes left out …]\nwxyz");
    }

    #[test]
    fn an_output_that_just_fits_is_whole() {
        let mut output = Output::new(8);
        output.push(b"abcdefgh");
        assert_eq!(output.into_text(), "abcdefgh");
    }
}
