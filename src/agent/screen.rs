//! What a person sees: the model's words as they come, a line for each tool call, where the time
//! of each round went, and a summary.

use std::{
    borrow::Cow,
    io::{self, Write},
    time::Duration,
};

use super::{Outcome, Summary};
use crate::proto::{Model, PromptReport, RerenderReason, Timing};

/// Cells of the longest bar of a waterfall.
const BAR_CELLS: u64 = 40;
/// Characters of a call's arguments that are shown.
const ARGUMENTS_CHARS_MAX: usize = 60;

/// Models with fewer parameters are said to be small.
const SMALL_PARAMETERS: u64 = 100_000_000;

/// Writes a rollout for a person to read, as plain lines to any writer.
#[derive(Debug)]
pub struct Screen<W> {
    out: W,
    color: bool,
    at: Place,
}

/// Where the cursor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// At the start of a line.
    LineStart,
    /// Within a line of the answer.
    Answer,
    /// Within a line of reasoning.
    Reasoning,
}

#[derive(Debug, Clone, Copy)]
enum Style {
    Plain,
    Dim,
    Bold,
    Call,
    Failure,
    Bar,
}

/// A tool call that was answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) name: &'a str,
    pub(super) arguments: &'a str,
    pub(super) took: Duration,
    pub(super) output_bytes: usize,
    pub(super) failed: bool,
}

/// What the server told about a round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round<'a> {
    /// Which sample of the rollout it was, from 1.
    pub(super) step: u32,
    pub(super) timing: &'a Timing,
    pub(super) prompt: &'a PromptReport,
    /// Tokens that the round sampled.
    pub(super) sampled: u32,
}

impl<W: Write> Screen<W> {
    /// A screen on `out`; `color` says whether it understands colours.
    pub fn new(out: W, color: bool) -> Self {
        Self {
            out,
            color,
            at: Place::LineStart,
        }
    }

    /// More of the answer.
    pub(super) fn answer(&mut self, text: &str) -> io::Result<()> {
        self.stream(Place::Answer, Style::Plain, text)
    }

    /// More of what the model thinks.
    pub(super) fn reasoning(&mut self, text: &str) -> io::Result<()> {
        self.stream(Place::Reasoning, Style::Dim, text)
    }

    /// Which model answers, and what to expect of it.
    pub(super) fn model(&mut self, model: &Model) -> io::Result<()> {
        let mut text = format!("{}: ", plain(&model.name));
        if model.backend == "sim" {
            text.push_str("a simulated model, which plays a script and understands nothing");
        } else {
            if model.parameters > 0 {
                text.push_str(&format!("{} parameters, ", magnitude(model.parameters)));
            }
            text.push_str(&format!("{} tokens of context", model.context_length));
            if (1..SMALL_PARAMETERS).contains(&model.parameters) {
                text.push_str(". So small a model errs often: look at what its tools said");
            }
        }
        self.break_line()?;
        self.put(Style::Dim, &text)?;
        self.end_line()
    }

    /// Something about the rollout itself.
    pub(super) fn note(&mut self, text: &str) -> io::Result<()> {
        self.break_line()?;
        self.put(Style::Dim, "! ")?;
        self.put(Style::Dim, &plain(text))?;
        self.end_line()
    }

    /// A tool call has its output.
    pub(super) fn call(&mut self, call: Call<'_>) -> io::Result<()> {
        self.break_line()?;
        self.put(Style::Call, &format!("> {}", plain(call.name)))?;
        self.put(Style::Plain, &format!(" {}", shortened(call.arguments)))?;
        self.put(
            Style::Dim,
            &format!("  {}, {}", duration(call.took), bytes(call.output_bytes)),
        )?;
        if call.failed {
            self.put(Style::Failure, "  error")?;
        }
        self.end_line()
    }

    /// A round has ended: when each of its stages ran, and how its prompt came to be.
    pub(super) fn round(&mut self, round: Round<'_>) -> io::Result<()> {
        self.break_line()?;
        // A sample that another one followed at once has no `done` of its own.
        let whole_us = u64::from(round.timing.done_us.max(round.timing.last_token_us));
        self.put(
            Style::Bold,
            &format!(
                "step {}  {} from received to {}",
                round.step,
                duration(Duration::from_micros(whole_us)),
                if round.timing.done_us == 0 {
                    "the last token"
                } else {
                    "done"
                }
            ),
        )?;
        self.end_line()?;
        let mut before_us = 0;
        for (name, at_us) in stages(round.timing) {
            // A stage that was not reached is zero.
            if at_us == 0 {
                continue;
            }
            let took = Duration::from_micros(at_us.saturating_sub(before_us));
            self.put(Style::Dim, &format!("  {name:<11} {:>9}  ", duration(took)))?;
            self.put(Style::Bar, &bar(before_us, at_us, whole_us))?;
            self.end_line()?;
            before_us = at_us;
        }
        let prompt = round.prompt;
        self.put(
            Style::Dim,
            &format!(
                "  tokens      {} reused + {} encoded, {} sampled{}",
                grouped(prompt.reused_tokens.into()),
                grouped(prompt.encoded_tokens.into()),
                grouped(round.sampled.into()),
                rerendered(prompt.rerender_reason()),
            ),
        )?;
        self.end_line()?;
        self.out.flush()
    }

    /// The end of the rollout.
    pub(super) fn summary(&mut self, summary: &Summary) -> io::Result<()> {
        self.break_line()?;
        let style = match summary.outcome {
            Outcome::Completed => Style::Bold,
            Outcome::CutShort | Outcome::Filtered | Outcome::StepsMax | Outcome::Interrupted => {
                Style::Failure
            }
        };
        self.put(style, ending(summary.outcome))?;
        self.put(
            Style::Bold,
            &format!(
                ": {}, {}, {}",
                counted(summary.steps, "step"),
                counted(summary.tool_calls, "tool call"),
                duration(summary.times.wall)
            ),
        )?;
        self.end_line()?;
        let tokens = summary.tokens;
        let times = summary.times;
        let rest = times
            .wall
            .saturating_sub(times.model + times.tools + times.hotloop);
        let share = |part: Duration| {
            let whole = times.wall.as_secs_f64();
            if whole == 0.0 {
                return "0.0 %".to_owned();
            }
            format!("{:.1} %", 100.0 * part.as_secs_f64() / whole)
        };
        let lines = [
            format!(
                "  tokens   {} input ({} cached by the engine), {} output ({} reasoning)",
                grouped(tokens.input),
                grouped(tokens.cached),
                grouped(tokens.output),
                grouped(tokens.reasoning),
            ),
            format!(
                "  prompts  {} tokens reused, {} encoded",
                grouped(tokens.reused),
                grouped(tokens.encoded),
            ),
            format!(
                "  time     model {}, tools {}, hotloop {}, wire and client {}",
                share(times.model),
                share(times.tools),
                share(times.hotloop),
                share(rest),
            ),
        ];
        for line in lines {
            self.put(Style::Dim, &line)?;
            self.end_line()?;
        }
        self.out.flush()
    }

    fn stream(&mut self, place: Place, style: Style, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        if self.at != place {
            self.break_line()?;
        }
        let text = plain(text);
        self.put(style, &text)?;
        self.at = if text.ends_with('\n') {
            Place::LineStart
        } else {
            place
        };
        self.out.flush()
    }

    fn break_line(&mut self) -> io::Result<()> {
        match self.at {
            Place::LineStart => Ok(()),
            Place::Answer | Place::Reasoning => self.end_line(),
        }
    }

    fn end_line(&mut self) -> io::Result<()> {
        self.at = Place::LineStart;
        self.out.write_all(b"\n")
    }

    fn put(&mut self, style: Style, text: &str) -> io::Result<()> {
        let code = match style {
            Style::Plain => "",
            Style::Dim => "2",
            Style::Bold => "1",
            Style::Call => "36",
            Style::Failure => "31",
            Style::Bar => "32",
        };
        if self.color && !code.is_empty() {
            write!(self.out, "\x1b[{code}m{text}\x1b[0m")
        } else {
            self.out.write_all(text.as_bytes())
        }
    }
}

/// The stages of a round in the order in which they end, each with its end.
fn stages(timing: &Timing) -> [(&'static str, u64); 8] {
    [
        ("started", timing.started_us.into()),
        ("validated", timing.validated_us.into()),
        ("checked", timing.checked_us.into()),
        ("rendered", timing.rendered_us.into()),
        ("dispatched", timing.dispatched_us.into()),
        ("first token", timing.first_token_us.into()),
        ("last token", timing.last_token_us.into()),
        ("done", timing.done_us.into()),
    ]
}

/// A bar from one time to another on a scale that ends at `whole_us`. A stage too short for a cell
/// has a thin mark at its place.
fn bar(from_us: u64, to_us: u64, whole_us: u64) -> String {
    let cell = |at_us: u64| (at_us.min(whole_us) * BAR_CELLS / whole_us.max(1)) as usize;
    let (from, to) = (cell(from_us), cell(to_us));
    let mut bar = " ".repeat(from.min(BAR_CELLS as usize - 1));
    if to > from {
        bar.push_str(&"█".repeat(to - from));
    } else {
        bar.push('▏');
    }
    bar
}

/// What a person should know about a prompt that could not simply grow.
fn rerendered(reason: RerenderReason) -> &'static str {
    match reason {
        RerenderReason::Unspecified => "",
        RerenderReason::Template => " (rendered again: the template rewrote the past)",
        RerenderReason::Settings => " (rendered again: settings changed)",
        RerenderReason::Model => " (rendered again: another model)",
        RerenderReason::Truncation => " (rendered again: items left the prompt)",
    }
}

fn ending(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Completed => "done",
        Outcome::CutShort => "cut short by a limit of tokens",
        Outcome::Filtered => "ended by a monitor",
        Outcome::StepsMax => "stopped at the limit of steps",
        Outcome::Interrupted => "interrupted",
    }
}

/// `text` without control characters: a model must not move the cursor or set the title.
fn plain(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    if text.chars().all(harmless) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(text.chars().filter(|&c| harmless(c)).collect())
    }
}

/// The start of a call's arguments, on one line.
fn shortened(arguments: &str) -> String {
    let mut chars = arguments
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c });
    let mut text: String = chars.by_ref().take(ARGUMENTS_CHARS_MAX).collect();
    if chars.next().is_some() {
        text.push('…');
    }
    text
}

/// A large number in words.
fn magnitude(number: u64) -> String {
    let [thousand, million, billion] = [1e3, 1e6, 1e9];
    let number = number as f64;
    match number {
        _ if number >= billion => format!("{:.1} billion", number / billion),
        _ if number >= million => format!("{:.1} million", number / million),
        _ if number >= thousand => format!("{:.0} thousand", number / thousand),
        _ => number.to_string(),
    }
}

fn duration(duration: Duration) -> String {
    let us = duration.as_micros();
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        1_000_000.. => format!("{:.2} s", us as f64 / 1e6),
    }
}

fn bytes(bytes: usize) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} KB", bytes as f64 / 1e3),
        1_000_000.. => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

fn counted(count: u32, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(count.into()))
}

/// A number with a comma between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Times, Tokens};
    use super::*;

    fn drawn(
        color: bool,
        draw: impl FnOnce(&mut Screen<&mut Vec<u8>>) -> io::Result<()>,
    ) -> String {
        let mut out = Vec::new();
        draw(&mut Screen::new(&mut out, color)).unwrap();
        String::from_utf8(out).unwrap()
    }

    const CALL: Call<'_> = Call {
        name: "read_file",
        arguments: r#"{"path":"a.rs"}"#,
        took: Duration::from_micros(1_234),
        output_bytes: 4_100,
        failed: false,
    };

    #[test]
    fn streams_share_the_screen_line_by_line() {
        let text = drawn(false, |screen| {
            screen.reasoning("Hm")?;
            screen.reasoning("m.")?;
            screen.answer("I read ")?;
            screen.call(CALL)?;
            screen.call(Call {
                failed: true,
                took: Duration::from_secs(2),
                output_bytes: 12,
                ..CALL
            })?;
            screen.answer("the file.\n")?;
            screen.note("another stream")
        });
        assert_eq!(
            text,
            "Hmm.\n\
             I read \n\
             > read_file {\"path\":\"a.rs\"}  1.2 ms, 4.1 KB\n\
             > read_file {\"path\":\"a.rs\"}  2.00 s, 12 B  error\n\
             the file.\n\
             ! another stream\n"
        );
    }

    #[test]
    fn colors_are_only_where_they_are_understood() {
        let draw = |screen: &mut Screen<&mut Vec<u8>>| {
            screen.reasoning("hm")?;
            screen.answer("yes")
        };
        assert_eq!(drawn(true, draw), "\x1b[2mhm\x1b[0m\nyes");
        assert_eq!(drawn(false, draw), "hm\nyes");
    }

    #[test]
    fn no_text_of_the_model_controls_the_terminal() {
        let text = drawn(false, |screen| {
            screen.answer("a\x1b]0;title\x07b\r\u{9b}c\td\n")?;
            screen.call(Call {
                name: "x\x1b[2J",
                arguments: "{\n\"k\":\x1b}",
                ..CALL
            })
        });
        assert_eq!(text, "a]0;titlebc\td\n> x[2J { \"k\": }  1.2 ms, 4.1 KB\n");
    }

    #[test]
    fn long_arguments_are_shortened() {
        assert_eq!(shortened(&"é".repeat(60)), "é".repeat(60));
        assert_eq!(shortened(&"é".repeat(61)), format!("{}…", "é".repeat(60)));
    }

    #[test]
    fn a_round_is_a_waterfall() {
        let text = drawn(false, |screen| {
            screen.round(Round {
                step: 3,
                timing: &Timing {
                    started_us: 2,
                    validated_us: 14,
                    checked_us: 18,
                    rendered_us: 138,
                    dispatched_us: 169,
                    first_token_us: 10_000,
                    last_token_us: 39_000,
                    done_us: 40_000,
                },
                prompt: &PromptReport {
                    reused_tokens: 12_345,
                    encoded_tokens: 36,
                    ..PromptReport::default()
                },
                sampled: 48,
            })
        });
        assert_eq!(
            text,
            "\
step 3  40.0 ms from received to done
  started          2 µs  ▏
  validated       12 µs  ▏
  checked          4 µs  ▏
  rendered       120 µs  ▏
  dispatched      31 µs  ▏
  first token    9.8 ms  ██████████
  last token    29.0 ms            █████████████████████████████
  done           1.0 ms                                         █
  tokens      12,345 reused + 36 encoded, 48 sampled
"
        );
    }

    #[test]
    fn a_stage_that_was_not_reached_has_no_line() {
        let text = drawn(false, |screen| {
            screen.round(Round {
                step: 1,
                timing: &Timing {
                    validated_us: 500,
                    done_us: 1_000,
                    ..Timing::default()
                },
                prompt: &PromptReport {
                    rerender_reason: RerenderReason::Template.into(),
                    ..PromptReport::default()
                },
                sampled: 0,
            })
        });
        assert_eq!(
            text,
            format!(
                "step 1  1.0 ms from received to done\n\
                 \x20 validated      500 µs  {bar}\n\
                 \x20 done           500 µs  {gap}{bar}\n\
                 \x20 tokens      0 reused + 0 encoded, 0 sampled (rendered again: the template rewrote the past)\n",
                bar = "█".repeat(20),
                gap = " ".repeat(20),
            )
        );
    }

    #[test]
    fn a_bar_stays_on_its_scale() {
        assert_eq!(bar(0, 0, 0), "▏");
        assert_eq!(bar(100, 100, 100), format!("{}▏", " ".repeat(39)));
        assert_eq!(
            bar(50, 900, 100),
            format!("{}{}", " ".repeat(20), "█".repeat(20))
        );
    }

    #[test]
    fn the_summary_says_where_the_time_went() {
        let summary = Summary {
            outcome: Outcome::Completed,
            steps: 3,
            tool_calls: 1,
            tokens: Tokens {
                input: 4_120,
                cached: 3_900,
                output: 212,
                reasoning: 40,
                reused: 3_870,
                encoded: 250,
            },
            times: Times {
                wall: Duration::from_secs(2),
                model: Duration::from_millis(1_800),
                tools: Duration::from_millis(150),
                hotloop: Duration::from_millis(4),
            },
        };
        assert_eq!(
            drawn(false, |screen| screen.summary(&summary)),
            "\
done: 3 steps, 1 tool call, 2.00 s
  tokens   4,120 input (3,900 cached by the engine), 212 output (40 reasoning)
  prompts  3,870 tokens reused, 250 encoded
  time     model 90.0 %, tools 7.5 %, hotloop 0.2 %, wire and client 2.3 %
"
        );
    }

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }
}
