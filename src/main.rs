//! The program: `hotloop serve`, `hotloop agent`, `hotloop check-config`.

use std::{process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use hotloop::{
    agent,
    config::{Config, Flags},
    server, telemetry,
};
use tokio::runtime::Runtime;

/// Agent loops over one gRPC stream, where each step costs only what is new in it.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGINT or SIGTERM.
    ///
    /// A flag wins over an environment variable (HOTLOOP_SERVER__LISTEN for server.listen), that
    /// over the file, that over the default. API keys come from HOTLOOP_API_KEYS: pairs of
    /// tenant:key, separated by commas.
    Serve(Flags),
    /// Say what settings would be in force, as TOML, or what is wrong with them.
    CheckConfig(Flags),
    /// Run an agent against a server.
    Agent(agent::Args),
}

/// What the shell is told, beside 0 for a clean end.
const CONFIGURATION_IS_WRONG: u8 = 2;
const FAILED: u8 = 1;

/// How long what still runs may take to notice the end, such as a sample on the blocking pool.
const LEFTOVERS_TIME_MAX: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    #[cfg(feature = "local")]
    #[allow(unsafe_code, reason = "nothing else runs yet")]
    // SAFETY: there is no other thread yet.
    unsafe {
        hotloop::backend::local::set_thread_count();
    }
    let ended = match Cli::parse().command {
        Command::Serve(flags) => serve(&flags),
        Command::CheckConfig(flags) => check_config(&flags),
        Command::Agent(args) => run_agent(args),
    };
    match ended {
        Ok(code) => code,
        Err(Failure { code, text }) => {
            eprintln!("hotloop: {text}");
            ExitCode::from(code)
        }
    }
}

/// Why the program ends with another code than 0.
struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    fn configuration(error: impl ToString) -> Self {
        Self {
            code: CONFIGURATION_IS_WRONG,
            text: error.to_string(),
        }
    }

    fn other(error: impl ToString) -> Self {
        Self {
            code: FAILED,
            text: error.to_string(),
        }
    }
}

fn serve(flags: &Flags) -> Result<ExitCode, Failure> {
    let config = load(flags)?;
    telemetry::install(&config.log).map_err(Failure::configuration)?;
    let flags = flags.clone();
    let again = move || Config::load(&flags, environment());
    on_runtime(server::run(config, again))?.map_err(Failure::other)?;
    Ok(ExitCode::SUCCESS)
}

fn check_config(flags: &Flags) -> Result<ExitCode, Failure> {
    let config = load(flags)?;
    let text = toml::to_string(&config).map_err(Failure::other)?;
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

fn run_agent(args: agent::Args) -> Result<ExitCode, Failure> {
    let ended = on_runtime(agent::run(args))?;
    if let Err(error) = &ended {
        eprintln!("hotloop: {error}");
    }
    Ok(ExitCode::from(agent::exit_code(&ended)))
}

fn load(flags: &Flags) -> Result<Config, Failure> {
    Config::load(flags, environment()).map_err(Failure::configuration)
}

/// The environment, whatever is in it.
fn environment() -> impl Iterator<Item = (String, String)> {
    let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    std::env::vars_os().map(move |(name, value)| (lossy(name), lossy(value)))
}

/// Runs this to its end; what it left behind is not waited for any longer than a moment.
fn on_runtime<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = Runtime::new().map_err(Failure::other)?;
    let ended = runtime.block_on(work);
    runtime.shutdown_timeout(LEFTOVERS_TIME_MAX);
    Ok(ended)
}
