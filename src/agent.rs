//! `hotloop agent`: a client that runs the agent loop with real local tools.
//!
//! The model asks for tools, the agent runs them in one directory and sends their outputs back,
//! until the model answers without a call. It is a tool to work with and the reference for how a
//! client should treat the stream: tools start the moment their call is whole, outputs leave the
//! moment they exist, and every way in which a stream can break has an answer.
//!
//! - `rollout`: the loop, one state machine for both styles.
//! - `link`: one stream to a server.
//! - `tools` and `command`: what the model may do, confined to one directory.
//! - `screen`: what a person sees.

mod command;
mod link;
mod rollout;
mod screen;
mod tools;

use std::{
    fmt,
    future::Future,
    io::{self, IsTerminal as _, Write},
    path::PathBuf,
    time::Duration,
};

pub use screen::Screen;

/// Where the agent looks for a server when none is named.
pub(crate) const DEFAULT_SERVER: &str = "http://127.0.0.1:50051";

/// The least and, where nobody says otherwise, the most of one tool's output that the model gets.
const OUTPUT_BYTES_MIN: u32 = 256;
const OUTPUT_BYTES_MAX: u32 = 65_536;

/// What `hotloop agent` is told on the command line.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The agent may always list, read and search the files under --dir. Writing files and running
commands have to be allowed with --allow. A command that runs is an ordinary process of yours: it
starts in --dir but is not confined to it.

Environment: HOTLOOP_API_KEY is sent to the server as a bearer token; NO_COLOR turns colours off.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.")]
pub struct Args {
    /// What the agent should do, in words.
    pub task: String,

    /// The server [default: http://127.0.0.1:50051].
    #[arg(long, value_name = "URL", env = "HOTLOOP_AGENT_SERVER")]
    pub server: Option<String>,

    /// The only directory that the file tools touch.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,

    /// What the agent may do beside reading.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    pub allow: Vec<Permission>,

    /// The model, by a name of the server [default: the server's default model].
    #[arg(long)]
    pub model: Option<String>,

    /// The system message, in place of the agent's own.
    #[arg(long, value_name = "TEXT")]
    pub instructions: Option<String>,

    /// How the loop runs: one long response, or a chain of them.
    #[arg(long, value_enum, default_value_t = Style::Held)]
    pub style: Style,

    /// How many samples the rollout takes at most.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub steps_max: u32,

    /// How long one command may run, in seconds.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub command_secs_max: u64,

    /// How much of one tool's output the model gets, in bytes [default: 65536, or half the number
    /// of tokens that the model's context holds, where that is less].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(i64::from(OUTPUT_BYTES_MIN)..=1_048_576))]
    pub output_bytes_max: Option<u32>,

    /// Print without colours, also on a terminal.
    #[arg(long)]
    pub no_color: bool,

    /// The key for the server. Read from HOTLOOP_API_KEY alone: an argument would be seen by
    /// every user of the machine.
    #[arg(skip = ApiKey::from_env())]
    pub api_key: Option<ApiKey>,
}

/// What the agent may do beside reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Permission {
    /// Create and replace files under the directory.
    Write,
    /// Run shell commands that start in the directory.
    Run,
}

/// How the loop runs. Both are described at `ResponsesService` in the proto.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Style {
    /// One held response; outputs are appended to it.
    Held,
    /// One response a step; each continues the one before it.
    Chained,
}

/// A secret that no `Debug` output shows.
#[derive(Clone)]
pub struct ApiKey(String);

impl ApiKey {
    /// A key, as the server knows it.
    #[must_use]
    pub fn new(key: String) -> Self {
        Self(key)
    }

    fn from_env() -> Option<Self> {
        std::env::var(command::API_KEY_VARIABLE)
            .ok()
            .filter(|key| !key.is_empty())
            .map(Self)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

/// How a rollout ended, and what it took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Samples.
    pub steps: u32,
    /// Tool calls that were answered.
    pub tool_calls: u32,
    /// Tokens of all responses together.
    pub tokens: Tokens,
    /// Where the time went.
    pub times: Times,
}

/// How a rollout ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The model answered without calling a tool.
    Completed,
    /// The last answer is cut short: a limit of tokens was reached.
    CutShort,
    /// A monitor of the server ended the answer.
    Filtered,
    /// `steps_max` samples were taken and the model still called tools.
    StepsMax,
    /// It was interrupted, and the running response was cancelled.
    Interrupted,
}

/// Tokens of a rollout. Prompt tokens count once a sample, as the server counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Tokens of all prompts.
    pub input: u64,
    /// Those of them that the engine took from its cache.
    pub cached: u64,
    /// Sampled tokens.
    pub output: u64,
    /// Those of them that were reasoning.
    pub reasoning: u64,
    /// Prompt tokens that hotloop already had.
    pub reused: u64,
    /// Prompt tokens that hotloop had to make.
    pub encoded: u64,
}

/// Where the time of a rollout went. What is left of `wall` is the wire and the agent itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// From the first connection to the end.
    pub wall: Duration,
    /// Between a prompt's dispatch to the engine and its last token.
    pub model: Duration,
    /// While nothing but tools ran.
    pub tools: Duration,
    /// In the server, before the dispatch and after the last token.
    pub hotloop: Duration,
}

/// Why a rollout could not go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The task is blank.
    #[error("the task is empty")]
    EmptyTask,
    /// `--dir` is no directory that can be read.
    #[error("--dir is not a directory that can be read: {0}")]
    Dir(#[source] io::Error),
    /// `--server` is no address.
    #[error("--server is not an http:// address: {0}")]
    Server(&'static str),
    /// HOTLOOP_API_KEY holds what no header can carry.
    #[error("HOTLOOP_API_KEY holds characters that a header cannot carry")]
    ApiKey,
    /// Nobody listens at the address that is tried when none is given.
    #[error(
        "no server answers at {DEFAULT_SERVER}\n  start one with: hotloop serve\n  or name another: hotloop agent --server http://HOST:PORT …"
    )]
    NoServer,
    /// Nobody listens at the address that was given.
    #[error("no server answers at {server}: {cause}")]
    Unreachable {
        /// The address.
        server: String,
        /// What the connection said.
        cause: String,
    },
    /// The server ended the stream with a status that another try does not change.
    #[error("the server closed the stream ({code}): {message}")]
    Closed {
        /// The gRPC code in words.
        code: String,
        /// What the server said.
        message: String,
    },
    /// The stream was lost again and again without a step in between.
    #[error("the stream was lost {losses} times in a row: {last}")]
    Lost {
        /// How often.
        losses: u32,
        /// How it was lost the last time.
        last: String,
    },
    /// A command was refused, or a response failed, and the server says that trying again will
    /// not help, or it did not.
    #[error("{code}: {message}")]
    Refused {
        /// The code of the protocol.
        code: String,
        /// What the server said.
        message: String,
    },
    /// The server sent what the protocol does not allow.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// A tool panicked: a fault of the agent.
    #[error("a tool broke down")]
    Tool,
    /// The output could not be written.
    #[error("cannot write the output: {0}")]
    Screen(#[from] io::Error),
}

/// The exit status for the outcome of [`run`]: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
#[must_use]
pub fn exit_code(ended: &Result<Summary, AgentError>) -> u8 {
    match ended {
        Ok(summary) => match summary.outcome {
            Outcome::Completed => 0,
            Outcome::CutShort | Outcome::Filtered | Outcome::StepsMax => 1,
            Outcome::Interrupted => 130,
        },
        Err(
            AgentError::EmptyTask | AgentError::Dir(_) | AgentError::Server(_) | AgentError::ApiKey,
        ) => 2,
        Err(
            AgentError::NoServer
            | AgentError::Unreachable { .. }
            | AgentError::Closed { .. }
            | AgentError::Lost { .. }
            | AgentError::Refused { .. }
            | AgentError::Protocol(_)
            | AgentError::Tool
            | AgentError::Screen(_),
        ) => 1,
    }
}

/// Runs the agent on standard output until it is done or Ctrl-C is pressed.
///
/// # Errors
///
/// Whatever keeps the rollout from going on; see [`AgentError`]. An interruption is no error.
pub async fn run(args: Args) -> Result<Summary, AgentError> {
    let out = io::stdout();
    let no_color_asked = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let color = out.is_terminal() && !args.no_color && !no_color_asked;
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            // Without a handler Ctrl-C ends the process by itself.
            std::future::pending::<()>().await;
        }
    };
    run_on(args, Screen::new(out, color), interrupt).await
}

/// Runs the agent on any screen, until it is done or `interrupt` resolves.
///
/// # Cancellation
///
/// When `interrupt` resolves, the running response is cancelled and its `done` awaited for a few
/// seconds, so that the summary tells what it cost. Commands that still run are killed.
///
/// # Errors
///
/// As [`run`].
pub async fn run_on<W: Write>(
    args: Args,
    screen: Screen<W>,
    interrupt: impl Future<Output = ()>,
) -> Result<Summary, AgentError> {
    if args.task.trim().is_empty() {
        return Err(AgentError::EmptyTask);
    }
    let toolbox = tools::Toolbox::open(
        &args.dir,
        tools::Limits {
            may_write: args.allow.contains(&Permission::Write),
            may_run: args.allow.contains(&Permission::Run),
            output_bytes_max: args.output_bytes_max.unwrap_or(OUTPUT_BYTES_MAX) as usize,
            command_time_max: Duration::from_secs(args.command_secs_max),
        },
    )
    .map_err(AgentError::Dir)?;
    let door = link::Door::new(args.server.as_deref(), args.api_key.as_ref())?;
    let plan = rollout::Plan {
        task: args.task,
        model: args.model,
        instructions: args.instructions,
        style: args.style,
        steps_max: args.steps_max,
        output_bytes_told: args.output_bytes_max.is_some(),
    };
    let mut interrupt = std::pin::pin!(interrupt);
    rollout::Rollout::new(plan, door, toolbox, screen)
        .run(interrupt.as_mut())
        .await
}
