//! The events of an answer into chunks.
//!
//! ```text
//!   Running ── finish_reason, an end token, the last ──▶ Ending ── usage, [DONE], the end ──▶ Over
//!              token that was asked for                     └───── one more token ──────────▶ Cut
//! ```
//!
//! Why the answer ended is told last, with what it cost, which may come behind it.

use std::sync::Arc;

use super::{
    calls::{Assembler, TooMuch},
    failure::word_of,
    sse::SseEvent,
    wire::{Choice, Delta, Event, Usage},
};
use crate::backend::{BackendError, Chunk, SampleEnd, Told};

/// An answer while it comes.
#[derive(Debug)]
pub(super) struct Answer {
    form: Form,
    stage: Stage,
    usage: Option<Usage>,
}

#[derive(Debug)]
enum Form {
    Messages(Assembler),
    Tokens {
        /// How many more may come.
        left: u32,
        end_tokens: Arc<[u32]>,
        some: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// It is known why it ends; its usage may still come.
    Ending(SampleEnd),
    Over(SampleEnd),
    /// The service goes on, and is to stop.
    Cut(SampleEnd),
}

impl Answer {
    /// One that is read by the service.
    pub(super) fn of_messages(assembler: Assembler) -> Self {
        Self::new(Form::Messages(assembler))
    }

    /// One of tokens: at most so many, and none behind one of these.
    pub(super) fn of_tokens(max_tokens: u32, end_tokens: Arc<[u32]>) -> Self {
        Self::new(Form::Tokens {
            left: max_tokens,
            end_tokens,
            some: false,
        })
    }

    fn new(form: Form) -> Self {
        Self {
            form,
            stage: Stage::Running,
            usage: None,
        }
    }

    /// Whether nothing more is needed.
    pub(super) fn is_over(&self) -> bool {
        match self.stage {
            Stage::Over(_) | Stage::Cut(_) => true,
            Stage::Running | Stage::Ending(_) => false,
        }
    }

    /// Whether the model has said all.
    pub(super) fn is_ending(&self) -> bool {
        match self.stage {
            Stage::Ending(_) | Stage::Over(_) | Stage::Cut(_) => true,
            Stage::Running => false,
        }
    }

    /// Whether the service would go on.
    pub(super) fn is_cut(&self) -> bool {
        match self.stage {
            Stage::Cut(_) => true,
            Stage::Running | Stage::Ending(_) | Stage::Over(_) => false,
        }
    }

    /// Takes an event; what it says goes into the chunk.
    pub(super) fn event(
        &mut self,
        event: &SseEvent,
        chunk: &mut Chunk,
    ) -> Result<(), BackendError> {
        let data = event.data.trim_ascii();
        if data == "[DONE]" {
            return self.close();
        }
        if data.is_empty() {
            return Ok(());
        }
        let parsed: Event = serde_json::from_str(data).map_err(|_| {
            failed("the answer has an event that is not the JSON of a completion's chunk")
        })?;
        if event.name == "error"
            || parsed.object.as_deref() == Some("error")
            || parsed.error.as_ref().is_some_and(|error| !error.is_null())
        {
            return Err(error_event(&parsed));
        }
        if let Some(time) = &parsed.time_info {
            tracing::debug!(
                queue_secs = time.queue_time,
                prompt_secs = time.prompt_time,
                completion_secs = time.completion_time,
                total_secs = time.total_time,
                "the service's own times"
            );
        }
        let counted = parsed.usage.is_some();
        if counted {
            self.usage = parsed.usage;
        }
        for choice in parsed.choices.unwrap_or_default() {
            if choice.index.unwrap_or(0) != 0 {
                return Err(failed("the answer has a choice that was not asked for"));
            }
            self.choice(choice, chunk)?;
        }
        // Usage before the end may be that of an answer half way.
        if counted && let Stage::Ending(end) = self.stage {
            self.stage = Stage::Over(end);
        }
        Ok(())
    }

    fn choice(&mut self, mut choice: Choice, chunk: &mut Chunk) -> Result<(), BackendError> {
        let mut delta = choice.delta.take().unwrap_or_default();
        match &mut self.form {
            Form::Messages(assembler) => {
                let mut parsed = Vec::new();
                said(assembler, delta, &mut parsed).map_err(|TooMuch(what)| {
                    failed(format!("the answer is beyond a limit: {what}"))
                })?;
                if !parsed.is_empty() {
                    let told = chunk.told.get_or_insert_default();
                    told.parsed.extend(parsed);
                }
            }
            Form::Tokens {
                left,
                end_tokens,
                some,
            } => {
                let ids = [choice.tokens, choice.token_ids, delta.tokens.take()];
                let ids = ids.into_iter().flatten().find(|ids| !ids.is_empty());
                let text = choice.text.is_some_and(|text| !text.is_empty());
                if ids.is_none() && text && !*some {
                    return Err(failed("the service tells text and no tokens"));
                }
                for id in ids.unwrap_or_default() {
                    if let Stage::Ending(end) = self.stage {
                        self.stage = Stage::Cut(end);
                        return Ok(());
                    }
                    *some = true;
                    *left -= 1;
                    chunk.tokens.push(id);
                    if end_tokens.contains(&id) {
                        self.stage = Stage::Ending(SampleEnd::Stop);
                    } else if *left == 0 {
                        self.stage = Stage::Ending(SampleEnd::Length);
                    }
                }
            }
        }
        if let Some(reason) = choice.finish_reason
            && !reason.is_empty()
            && self.stage == Stage::Running
        {
            self.stage = Stage::Ending(end_for(&reason)?);
        }
        Ok(())
    }

    /// No event comes any more.
    pub(super) fn close(&mut self) -> Result<(), BackendError> {
        match self.stage {
            Stage::Ending(end) => {
                self.stage = Stage::Over(end);
                Ok(())
            }
            Stage::Over(_) | Stage::Cut(_) => Ok(()),
            Stage::Running => Err(failed("the answer ended without a reason")),
        }
    }

    /// Puts the end into the last chunk.
    pub(super) fn finish(&mut self, chunk: &mut Chunk) {
        let (Stage::Over(end) | Stage::Cut(end)) = self.stage else {
            return;
        };
        chunk.finish = Some(end);
        chunk.cached_tokens = self.usage.as_ref().and_then(Usage::cached);
        match &mut self.form {
            Form::Messages(assembler) => {
                let told = chunk.told.get_or_insert_with(Box::<Told>::default);
                assembler.finish(end == SampleEnd::Stop, &mut told.parsed);
                told.usage = self.usage.as_ref().map(Usage::counted);
            }
            // Tokens are counted by whoever takes them.
            Form::Tokens { .. } => {}
        }
    }
}

fn said(
    assembler: &mut Assembler,
    delta: Delta,
    out: &mut Vec<crate::parse::Parsed>,
) -> Result<(), TooMuch> {
    // Some services tell it under both names.
    let reasoning = delta.reasoning.filter(|text| !text.is_empty());
    if let Some(reasoning) = reasoning.or(delta.reasoning_content) {
        assembler.reasoning(&reasoning);
    }
    let content = delta.content.filter(|text| !text.is_empty());
    if let Some(text) = content.or(delta.refusal) {
        assembler.text(&text);
    }
    for call in delta.tool_calls.unwrap_or_default() {
        assembler.call(call)?;
    }
    assembler.drain(out)
}

fn end_for(reason: &str) -> Result<SampleEnd, BackendError> {
    match reason {
        "stop" | "tool_calls" | "function_call" | "eos" => Ok(SampleEnd::Stop),
        "length" => Ok(SampleEnd::Length),
        "content_filter" => Ok(SampleEnd::ContentFilter),
        other => Err(failed(format!(
            "the answer ended for the reason {}",
            word_of(other)
        ))),
    }
}

fn error_event(event: &Event) -> BackendError {
    let field = |name: &str| {
        let error = event.error.as_ref();
        let word = error.and_then(|error| error.get(name)?.as_str());
        word.map(word_of)
    };
    let code = field("code").or_else(|| field("type"));
    let status = event.status_code;
    if let Some(message) = event.error.as_ref().and_then(|error| error.get("message")) {
        tracing::debug!(%message, "what the service says of its error");
    }
    failed(match (status, code) {
        (Some(status), Some(code)) => format!("the service broke off: status {status}, {code}"),
        (Some(status), None) => format!("the service broke off: status {status}"),
        (None, Some(code)) => format!("the service broke off: {code}"),
        (None, None) => "the service broke off".into(),
    })
}

pub(super) fn failed(reason: impl Into<String>) -> BackendError {
    BackendError::Failed {
        reason: reason.into(),
    }
}
