//! Answers that are none: what a status means, and when to come again.
//!
//! | status | means |
//! |---|---|
//! | 401, 402, 403 | the key is refused: unavailable, and for the log an error |
//! | 408, 429, 5xx | unavailable, with the time to wait where the service tells it |
//! | others | this prompt is refused |
//!
//! What a service writes about an error may quote the prompt, so only words of its own are told on.

use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Response, StatusCode, header::HeaderMap};
use serde_json::Value;

use crate::backend::BackendError;

/// The most bytes of an error that are read, and how long that may take.
const ERROR_BYTES_MAX: usize = 64 << 10;
const ERROR_WAIT: Duration = Duration::from_secs(5);

/// The longest time to wait that a service is believed.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);

/// How long a service is taken for unhealthy that does not say it: one that is asked too much, and
/// one that refuses the key.
const BUSY_PAUSE: Duration = Duration::from_secs(1);
const KEY_PAUSE: Duration = Duration::from_secs(60);

/// The most of its words that are told on, in bytes.
const WORD_BYTES_MAX: usize = 64;

/// A refusal, and for how long others would meet the same.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) error: BackendError,
    pub(super) pause: Option<Duration>,
}

/// Reads what the service has against the request.
pub(super) async fn refusal(response: Response) -> Refusal {
    let status = response.status();
    let retry_after = retry_after(response.headers(), Timestamp::now());
    let words = match tokio::time::timeout(ERROR_WAIT, error_body(response)).await {
        Ok(body) => words(&body),
        Err(_) => String::new(),
    };
    let reason = format!("status {}{words}", status.as_u16());
    judged(status, reason, retry_after)
}

fn judged(status: StatusCode, reason: String, retry_after: Option<Duration>) -> Refusal {
    match status.as_u16() {
        401..=403 => {
            tracing::error!(reason, "the key is refused");
            Refusal {
                error: BackendError::Unavailable {
                    reason: "the service refuses the key".into(),
                    retry_after,
                },
                pause: Some(retry_after.unwrap_or(KEY_PAUSE)),
            }
        }
        429 => Refusal {
            error: BackendError::Unavailable {
                reason,
                retry_after,
            },
            pause: Some(retry_after.unwrap_or(BUSY_PAUSE)),
        },
        408 | 500.. => Refusal {
            error: BackendError::Unavailable {
                reason,
                retry_after,
            },
            pause: None,
        },
        _ => Refusal {
            error: BackendError::Refused { reason },
            pause: None,
        },
    }
}

async fn error_body(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(bytes)) = response.chunk().await {
        let room = ERROR_BYTES_MAX - body.len();
        body.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if body.len() == ERROR_BYTES_MAX {
            break;
        }
    }
    body
}

/// The words of the service that name the error, each behind a comma.
fn words(body: &[u8]) -> String {
    let Ok(body) = serde_json::from_slice::<Value>(body) else {
        return String::new();
    };
    let error = body
        .get("error")
        .filter(|it| it.is_object())
        .unwrap_or(&body);
    if let Some(message) = error.get("message") {
        tracing::debug!(%message, "what the service says of the refusal");
    }
    ["type", "code", "param"]
        .into_iter()
        .filter_map(|key| error.get(key)?.as_str())
        .filter(|text| !text.is_empty())
        .map(|text| format!(", {}", word_of(text)))
        .collect()
}

/// What may be told of a text that should be a word: names of errors and fields are, and a text
/// that is something else is not.
pub(super) fn word_of(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-[]".contains(&byte);
    if !text.is_empty() && text.len() <= WORD_BYTES_MAX && text.bytes().all(plain) {
        text.to_owned()
    } else {
        "unnamed".to_owned()
    }
}

/// When to come again: what the service says, else when its limits are reset.
pub(super) fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let millis = || seconds(text("retry-after-ms")?).map(|ms| ms / 1e3);
    let told = || seconds(text("retry-after")?);
    let date = || {
        let date = jiff::fmt::rfc2822::parse(text("retry-after")?).ok()?;
        Some(date.timestamp().duration_since(now).as_secs_f64().max(0.0))
    };
    let secs = millis()
        .or_else(told)
        .or_else(date)
        .or_else(|| reset(headers))?;
    Some(Duration::from_secs_f64(
        secs.min(RETRY_AFTER_MAX.as_secs_f64()),
    ))
}

/// When the limits that are used up are reset; where none is, the first that will be.
fn reset(headers: &HeaderMap) -> Option<f64> {
    let mut used_up: Option<f64> = None;
    let mut first: Option<f64> = None;
    for (name, value) in headers {
        let Some(limit) = name.as_str().strip_prefix("x-ratelimit-reset-") else {
            continue;
        };
        let Some(secs) = value.to_str().ok().and_then(span) else {
            continue;
        };
        let remaining = headers.get(format!("x-ratelimit-remaining-{limit}"));
        let remaining = remaining.and_then(|it| seconds(it.to_str().ok()?));
        if remaining.is_some_and(|remaining| remaining <= 0.0) {
            used_up = Some(used_up.map_or(secs, |all| all.max(secs)));
        }
        first = Some(first.map_or(secs, |all| all.min(secs)));
    }
    used_up.or(first)
}

fn seconds(text: &str) -> Option<f64> {
    let number: f64 = text.parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some(number)
}

/// Seconds, or what Go writes, such as `2m59.56s` and `120ms`.
fn span(text: &str) -> Option<f64> {
    if let Some(secs) = seconds(text) {
        return Some(secs);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let unit = rest.find(|it: char| it.is_ascii_alphabetic())?;
        let number = seconds(&rest[..unit])?;
        rest = &rest[unit..];
        let end = rest.find(|it: char| !it.is_ascii_alphabetic());
        let (unit, behind) = rest.split_at(end.unwrap_or(rest.len()));
        total += number
            * match unit {
                "d" => 86_400.0,
                "h" => 3_600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                _ => return None,
            };
        rest = behind;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        let parsed = all.iter().map(|(name, value)| {
            let name = reqwest::header::HeaderName::from_static(name);
            (name, value.parse().unwrap())
        });
        parsed.collect()
    }

    #[test]
    fn the_time_to_wait_is_read_in_each_form() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        for (given, millis) in [
            (headers(&[("retry-after-ms", "250")]), Some(250)),
            (
                headers(&[("retry-after", "3"), ("retry-after-ms", "1500.5")]),
                Some(1500),
            ),
            (headers(&[("retry-after", "2.5")]), Some(2_500)),
            (
                headers(&[("retry-after", "Thu, 01 Jan 2026 00:00:20 GMT")]),
                Some(20_000),
            ),
            (
                headers(&[("retry-after", "Wed, 31 Dec 2025 00:00:20 GMT")]),
                Some(0),
            ),
            (headers(&[("retry-after", "999999999")]), Some(3_600_000)),
            (headers(&[("retry-after", "-1")]), None),
            (
                headers(&[
                    ("x-ratelimit-reset-requests-day", "30000"),
                    ("x-ratelimit-remaining-requests-day", "7"),
                    ("x-ratelimit-reset-tokens-minute", "11.5"),
                    ("x-ratelimit-remaining-tokens-minute", "0"),
                ]),
                Some(11_500),
            ),
            (
                headers(&[
                    ("x-ratelimit-reset-requests", "2m0.5s"),
                    ("x-ratelimit-reset-tokens", "120ms"),
                ]),
                Some(120),
            ),
            (headers(&[("x-ratelimit-reset-tokens", "soon")]), None),
            (headers(&[]), None),
        ] {
            let waited = retry_after(&given, now).map(|it| it.as_millis());
            assert_eq!(waited, millis, "{given:?}");
        }
    }

    #[test]
    fn each_status_is_judged() {
        let judge = |status: u16| {
            let judged = judged(StatusCode::from_u16(status).unwrap(), "why".into(), None);
            let kind = match judged.error {
                BackendError::Unavailable { .. } => "unavailable",
                BackendError::Refused { .. } => "refused",
                BackendError::Failed { .. } => "failed",
            };
            (kind, judged.pause.map(|pause| pause.as_secs()))
        };
        for status in [301, 400, 404, 413, 415, 422] {
            assert_eq!(judge(status), ("refused", None), "{status}");
        }
        for status in [401, 402, 403] {
            assert_eq!(judge(status), ("unavailable", Some(60)), "{status}");
        }
        assert_eq!(judge(429), ("unavailable", Some(1)));
        for status in [408, 500, 502, 503, 504] {
            assert_eq!(judge(status), ("unavailable", None), "{status}");
        }
    }

    #[test]
    fn only_words_are_told_on() {
        let body = br#"{"error": {"message": "SECRET", "type": "invalid_request_error",
            "code": "say SECRET", "param": "messages[3].content"}}"#;
        assert_eq!(
            words(body),
            ", invalid_request_error, unnamed, messages[3].content"
        );
        assert_eq!(
            words(br#"{"message": "SECRET", "code": "wrong_api_key", "param": null}"#),
            ", wrong_api_key"
        );
        assert_eq!(words(b"<html>SECRET"), "");
    }
}
