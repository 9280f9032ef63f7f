//! What is written to standard error: log lines, and where a panic happened.

use std::{backtrace::Backtrace, io::IsTerminal as _, panic::PanicHookInfo};

use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{Log, LogFormat};

/// A library that tells of its tables while it loads, and might of what it encodes.
const QUIET: &str = "tk_encode=warn";

/// Starts logging, for the whole process.
///
/// # Errors
///
/// The filter cannot be read, or logging was started before.
pub fn install(log: &Log) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(format!("{QUIET},{}", log.filter))?;
    let lines = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match log.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init(),
    }
    .map_err(|_| TelemetryError::Twice)?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// Logs where a panic happened. Its message only where it is a literal of the code: a formatted
/// one may show the text that it stumbled over, and what users write is in no log.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let message = panic
        .payload()
        .downcast_ref::<&'static str>()
        .copied()
        .unwrap_or("its message is not shown, it may hold what a user wrote");
    let location = panic.location().map(tracing::field::display);
    let backtrace = Backtrace::capture();
    tracing::error!(location, %backtrace, "panicked: {message}");
}

/// Why logging does not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter cannot be read.
    #[error("log.filter: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Something else logs already.
    #[error("logging was started before")]
    Twice,
}
