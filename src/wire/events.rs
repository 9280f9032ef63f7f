//! Events and items, onto the wire.

use std::{ops::Range, sync::Arc};

use crate::{
    event::{
        Action, Charged, DeltaKind, Done, Envelope, Error, Event, Finish, IncompleteReason,
        PromptReport, RerenderReason, Retry, Scope, Status, Timing, Usage, Verdict,
    },
    item::{Body, Item, ItemId, ItemStatus, NamedLogprob, Part, Role},
    proto as pb,
};

/// An event on the wire.
#[must_use]
pub fn response(sequence_number: u64, envelope: Envelope) -> pb::ConnectResponse {
    use pb::connect_response::Event as Wire;
    let event = match envelope.event {
        Event::Created {
            model,
            previous,
            created_at_ms,
        } => Wire::Created(pb::Created {
            model: model.to_string(),
            previous_response_id: previous.map(|id| id.to_string()).unwrap_or_default(),
            created_at_ms,
        }),
        Event::Appended {
            item_ids,
            queued,
            tokens,
        } => Wire::Appended(pb::Appended {
            item_ids: item_ids.iter().map(ItemId::to_string).collect(),
            disposition: if queued {
                pb::Disposition::Queued
            } else {
                pb::Disposition::Applied
            }
            .into(),
            tokens,
        }),
        Event::OutputItemAdded { output_index, item } => {
            Wire::OutputItemAdded(Box::new(pb::OutputItemAdded {
                output_index,
                item: Some(item_message(&item)),
            }))
        }
        Event::Delta {
            output_index,
            kind,
            delta,
            logprobs,
        } => match kind {
            DeltaKind::Text => Wire::OutputTextDelta(pb::OutputTextDelta {
                output_index,
                delta,
                logprobs: logprobs.iter().map(logprob).collect(),
            }),
            DeltaKind::Reasoning => Wire::ReasoningTextDelta(pb::ReasoningTextDelta {
                output_index,
                delta,
            }),
            DeltaKind::Arguments => {
                Wire::FunctionCallArgumentsDelta(pb::FunctionCallArgumentsDelta {
                    output_index,
                    delta,
                })
            }
        },
        Event::OutputItemDone { output_index, item } => {
            Wire::OutputItemDone(Box::new(pb::OutputItemDone {
                output_index,
                item: Some(item_message(&item)),
            }))
        }
        Event::Verdict(verdict) => Wire::SafetyVerdict(Box::new(verdict_message(&verdict))),
        Event::Done(done) => Wire::Done(Box::new(done_message(*done))),
        Event::Error(error) => Wire::Error(Box::new(error_message(&error))),
        Event::GoAway {
            time_left,
            reason,
            resumable,
        } => Wire::GoAway(pb::GoAway {
            time_left_ms: millis(time_left),
            reason: reason.as_str().to_owned(),
            resumable,
        }),
    };
    pb::ConnectResponse {
        lane: envelope.lane.to_string(),
        response_id: envelope
            .response_id
            .map(|id| id.to_string())
            .unwrap_or_default(),
        request_id: envelope.request_id.to_string(),
        sequence_number,
        event: Some(event),
    }
}

fn millis(duration: std::time::Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn micros(duration: std::time::Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

fn done_message(done: Done) -> pb::Done {
    let error = match &done.status {
        Status::Failed(error) => Some(error_message(error)),
        Status::AwaitingInput | Status::Completed | Status::Incomplete(_) | Status::Cancelled => {
            None
        }
    };
    let (status, incomplete_reason) = status(&done.status);
    pb::Done {
        model: done.model.as_deref().unwrap_or_default().to_owned(),
        status: status.into(),
        incomplete_reason: incomplete_reason.into(),
        finish_reason: done
            .finish
            .map_or(pb::FinishReason::Unspecified, |finish| match finish {
                Finish::Stop => pb::FinishReason::Stop,
                Finish::ToolCalls => pb::FinishReason::ToolCalls,
                Finish::Length => pb::FinishReason::Length,
                Finish::ContentFilter => pb::FinishReason::ContentFilter,
            })
            .into(),
        call_ids: done.call_ids.iter().map(ToString::to_string).collect(),
        output_item_ids: done
            .output_item_ids
            .iter()
            .map(ToString::to_string)
            .collect(),
        usage: Some(usage(done.usage)),
        prompt: Some(prompt_report(&done.prompt)),
        timing: Some(timing(&done.timing)),
        error,
        output: done.output.iter().map(|item| item_message(item)).collect(),
        earlier_samples: done
            .earlier
            .iter()
            .map(|sample| pb::SampleReport {
                prompt: Some(prompt_report(&sample.prompt)),
                timing: Some(timing(&sample.timing)),
                output_tokens: sample.output_tokens,
            })
            .collect(),
        receipt: done.receipt.map(|receipt| pb::Receipt {
            record_id: receipt.record_id.to_string(),
            response: Some(receipt_totals(receipt.response)),
            stream: Some(receipt_totals(receipt.stream)),
        }),
    }
}

fn receipt_totals(charged: Charged) -> pb::ReceiptTotals {
    pb::ReceiptTotals {
        responses: charged.responses,
        input_tokens: charged.input_tokens,
        new_tokens: charged.new_tokens,
        cached_tokens: charged.cached_tokens,
        output_tokens: charged.output_tokens,
    }
}

/// A status on the wire, with the reason of an incomplete one.
#[must_use]
pub fn status(status: &Status) -> (pb::ResponseStatus, pb::IncompleteReason) {
    let none = pb::IncompleteReason::Unspecified;
    match status {
        Status::AwaitingInput => (pb::ResponseStatus::AwaitingInput, none),
        Status::Completed => (pb::ResponseStatus::Completed, none),
        Status::Incomplete(reason) => {
            let reason = match reason {
                IncompleteReason::MaxOutputTokens => pb::IncompleteReason::MaxOutputTokens,
                IncompleteReason::ContentFilter => pb::IncompleteReason::ContentFilter,
                IncompleteReason::Interrupted => pb::IncompleteReason::Interrupted,
                IncompleteReason::Budget => pb::IncompleteReason::Budget,
            };
            (pb::ResponseStatus::Incomplete, reason)
        }
        Status::Failed(_) => (pb::ResponseStatus::Failed, none),
        Status::Cancelled => (pb::ResponseStatus::Cancelled, none),
    }
}

/// Usage on the wire.
#[must_use]
pub fn usage(usage: Usage) -> pb::Usage {
    pb::Usage {
        input_tokens: usage.input_tokens,
        cached_tokens: usage.cached_tokens,
        output_tokens: usage.output_tokens,
        reasoning_tokens: usage.reasoning_tokens,
        total_tokens: usage.input_tokens.saturating_add(usage.output_tokens),
        samples: usage.samples,
    }
}

/// A prompt's report on the wire.
#[must_use]
pub fn prompt_report(report: &PromptReport) -> pb::PromptReport {
    pb::PromptReport {
        tokens: report.tokens,
        reused_tokens: report.reused_tokens,
        encoded_tokens: report.encoded_tokens,
        dropped_tokens: report.dropped_tokens,
        sampled_tokens: report.sampled_tokens,
        extends_previous: report.extends_previous,
        rerender_reason: report
            .rerender
            .map_or(pb::RerenderReason::Unspecified, |reason| match reason {
                RerenderReason::Template => pb::RerenderReason::Template,
                RerenderReason::Settings => pb::RerenderReason::Settings,
                RerenderReason::Model => pb::RerenderReason::Model,
                RerenderReason::Truncation => pb::RerenderReason::Truncation,
            })
            .into(),
        truncated_items: report.truncated_items,
        fingerprint: hex(&report.fingerprint),
        head_tokens_cached: report.head_tokens_cached,
    }
}

/// Bytes in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn timing(timing: &Timing) -> pb::Timing {
    pb::Timing {
        started_us: micros(timing.started),
        validated_us: micros(timing.validated),
        checked_us: micros(timing.checked),
        rendered_us: micros(timing.rendered),
        dispatched_us: micros(timing.dispatched),
        first_token_us: micros(timing.first_token),
        last_token_us: micros(timing.last_token),
        done_us: micros(timing.done),
    }
}

fn error_message(error: &Error) -> pb::Error {
    pb::Error {
        code: error.code.as_str().to_owned(),
        message: error.message.clone(),
        param: error.param.clone(),
        retry: match error.code.retry() {
            Retry::Safe => pb::Retry::Safe,
            Retry::ResendFull => pb::Retry::ResendFull,
            Retry::Never => pb::Retry::Never,
        }
        .into(),
        retry_after_ms: error.retry_after.map_or(0, millis),
    }
}

fn verdict_message(verdict: &Verdict) -> pb::SafetyVerdict {
    let position = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
    let range = |range: &Range<usize>| pb::SafetyRange {
        start: position(range.start),
        end: position(range.end),
    };
    pb::SafetyVerdict {
        item_id: verdict.item_id.to_string(),
        rule: verdict.rule.to_string(),
        policy_version: verdict.policy.to_string(),
        scope: match verdict.scope {
            Scope::UserInput => pb::SafetyScope::UserInput,
            Scope::ToolOutput => pb::SafetyScope::ToolOutput,
            Scope::ModelOutput => pb::SafetyScope::ModelOutput,
            Scope::Reasoning => pb::SafetyScope::Reasoning,
        }
        .into(),
        action: match verdict.action {
            Action::Observe => pb::SafetyAction::Observe,
            Action::Redact => pb::SafetyAction::Redact,
            Action::Refuse => pb::SafetyAction::Refuse,
            Action::End => pb::SafetyAction::End,
        }
        .into(),
        bytes: Some(range(&verdict.bytes)),
        tokens: verdict.tokens.as_ref().map(range),
        late: verdict.late,
        score: verdict.score,
    }
}

fn logprob(logprob: &NamedLogprob) -> pb::TokenLogprob {
    pb::TokenLogprob {
        token_id: logprob.token,
        token: logprob.text.clone(),
        logprob: logprob.logprob,
        top: logprob
            .top
            .iter()
            .map(|(id, text, value)| pb::TopLogprob {
                token_id: *id,
                token: text.clone(),
                logprob: *value,
            })
            .collect(),
    }
}

/// An item on the wire.
#[must_use]
pub fn item_message(item: &Item) -> pb::Item {
    use pb::item::Item as Wire;
    let text = |text: &Arc<str>| text.to_string();
    let body = match &item.body {
        Body::Message { role, parts } => Wire::Message(pb::Message {
            role: match role {
                Role::System => pb::Role::System,
                Role::Developer => pb::Role::Developer,
                Role::User => pb::Role::User,
                Role::Assistant => pb::Role::Assistant,
            }
            .into(),
            content: parts.iter().map(content_part).collect(),
        }),
        Body::FunctionCall {
            call_id,
            name,
            arguments,
        } => Wire::FunctionCall(pb::FunctionCall {
            call_id: call_id.to_string(),
            name: text(name),
            arguments: text(arguments),
        }),
        Body::FunctionCallOutput { call_id, output } => {
            Wire::FunctionCallOutput(pb::FunctionCallOutput {
                call_id: call_id.to_string(),
                output: text(output),
            })
        }
        Body::Reasoning { content } => Wire::Reasoning(pb::Reasoning {
            content: text(content),
        }),
        Body::CustomToolCall {
            call_id,
            name,
            input,
            ..
        } => Wire::CustomToolCall(pb::CustomToolCall {
            call_id: call_id.to_string(),
            name: text(name),
            input: text(input),
        }),
        Body::CustomToolCallOutput { call_id, output } => {
            Wire::CustomToolCallOutput(pb::CustomToolCallOutput {
                call_id: call_id.to_string(),
                output: text(output),
            })
        }
        Body::Compaction { summary } => Wire::Compaction(pb::Compaction {
            summary: text(summary),
        }),
    };
    pb::Item {
        id: item.id.to_string(),
        status: match item.status {
            ItemStatus::InProgress => pb::ItemStatus::InProgress,
            ItemStatus::Completed => pb::ItemStatus::Completed,
            ItemStatus::Incomplete => pb::ItemStatus::Incomplete,
        }
        .into(),
        item: Some(body),
    }
}

fn content_part(part: &Part) -> pb::ContentPart {
    use pb::content_part::Part as Wire;
    let part = match part {
        Part::InputText(text) => Wire::InputText(text.to_string()),
        Part::OutputText { text, logprobs } => Wire::OutputText(pb::OutputText {
            text: text.to_string(),
            logprobs: logprobs.iter().map(logprob).collect(),
        }),
        Part::Refusal(text) => Wire::Refusal(text.to_string()),
    };
    pb::ContentPart { part: Some(part) }
}
