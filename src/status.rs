//! What ends a whole call: gRPC statuses with `google.rpc` details. Everything that concerns one
//! command only is an event instead, see `event::Error`.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::stream::StreamEnd;

/// The domain of our ErrorInfo.
const DOMAIN: &str = "hotloop";

/// A status with the `google.rpc.ErrorInfo` that programs go by.
///
/// `reason` is in UPPER_SNAKE_CASE and stable; `message` is for people and holds nothing that a user wrote.
pub(crate) fn refusal(code: Code, reason: &'static str, message: &str) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// The same with the time after which it is worth trying again.
pub(crate) fn retry_later(
    code: Code,
    reason: &'static str,
    message: &str,
    after: Duration,
) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    details.set_retry_info(Some(after));
    Status::with_error_details(code, message, details)
}

/// A unary request was wrong at this field.
pub(crate) fn bad_field(code: Code, field: &str, message: &str) -> Status {
    let mut details = ErrorDetails::with_error_info("INVALID_FIELD", DOMAIN, HashMap::new());
    details.add_bad_request_violation(field, message);
    Status::with_error_details(code, format!("{field}: {message}"), details)
}

/// What the client did where tonic could not read a message of it. tonic says so in a status without
/// details, and as OUT_OF_RANGE or as a fault of ours. `None`: the status says something else.
pub(crate) fn unreadable(code: Code, has_details: bool) -> Option<StreamEnd> {
    if has_details {
        None
    } else if code == Code::OutOfRange {
        Some(StreamEnd::MessageTooLarge)
    } else if code == Code::Internal {
        Some(StreamEnd::Malformed)
    } else {
        None
    }
}

impl From<StreamEnd> for Status {
    fn from(end: StreamEnd) -> Self {
        match end {
            StreamEnd::SlowClient => refusal(
                Code::ResourceExhausted,
                "CLIENT_DOES_NOT_READ",
                "events could not be sent for too long; open another stream and continue by response id",
            ),
            StreamEnd::MessageTooLarge => refusal(
                Code::ResourceExhausted,
                "MESSAGE_TOO_LARGE",
                "a message has more bytes than the server takes",
            ),
            StreamEnd::Malformed => refusal(
                Code::InvalidArgument,
                "MALFORMED_MESSAGE",
                "what was sent is no message of this call",
            ),
            StreamEnd::ClientGone => {
                refusal(Code::Cancelled, "CLIENT_GONE", "the client's side broke")
            }
            StreamEnd::Internal => {
                refusal(Code::Internal, "INTERNAL", "a task of the server failed")
            }
        }
    }
}
