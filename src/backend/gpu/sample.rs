//! One sample of an engine, from the request to its last chunk.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{runtime::Handle, time::timeout};
use tonic::{Code, Status, Streaming};

use super::{Dialect, Inner, Started, wire::KeptIds};
use crate::{
    backend::{BackendError, Chunk, Chunks, Prompt, SampleEnd, conversation_name, tenant_name},
    item::TokenLogprob,
};

/// The most bytes of an engine's explanation that are told.
const REASON_BYTES_MAX: usize = 300;

/// How long the engine may take to hear that a sample is to stop.
const ABORT_TIME_MAX: Duration = Duration::from_secs(5);

/// A message of an engine about its sample.
pub(super) trait Piece: prost::Message + Default + Send + 'static {
    /// The chunk that it is, behind so many tokens.
    fn into_chunk(self, before: u32) -> Result<Chunk, BackendError>;
}

/// Why a sample of an engine is none.
pub(super) enum Refusal {
    /// The engine gave it up.
    Aborted,
    /// It ended for a reason that is not known.
    Unknown(String),
    /// It sent nothing for too long.
    Silent(Duration),
    /// It ended without saying why.
    CutOff,
}

impl From<Refusal> for BackendError {
    fn from(refusal: Refusal) -> Self {
        let reason = match refusal {
            Refusal::Aborted => "the engine aborted the sample".to_owned(),
            Refusal::Unknown(reason) => format!("the engine ended the sample with `{reason}`"),
            Refusal::Silent(limit) => {
                format!("the engine sent nothing for {} seconds", limit.as_secs())
            }
            Refusal::CutOff => "the engine ended the sample without saying why".to_owned(),
        };
        Self::Failed { reason }
    }
}

/// Samples. Dropping the stream stops the engine's work for it.
pub(super) fn sample(inner: Arc<Inner>, prompt: Prompt) -> Chunks {
    let start = async move {
        let facts = inner.facts()?;
        let constraint = inner.constraint(&prompt)?;
        let id = inner.next_id(&prompt);
        let (salt, session) = (tenant_name(&prompt), conversation_name(&prompt));
        let started = Started {
            id: &id,
            model: &facts.model,
            salt: &salt,
            session: &session,
            constraint: constraint.as_ref(),
        };
        let dialect = facts.dialect;
        let outgoing = dialect.request(&prompt, &started)?;
        let running = Running {
            inner: inner.clone(),
            dialect,
            id: Some(id),
            tokens: 0,
            top: prompt.sampling.top_logprobs.unwrap_or(0) as usize,
        };
        Ok::<_, BackendError>(match dialect {
            Dialect::Vllm => chunks::<vllm_proto::GenerateResponse>(running, outgoing).await?,
            Dialect::Engine => {
                chunks::<super::proto::engine::GenerateResponse>(running, outgoing).await?
            }
            Dialect::Sglang => {
                chunks::<super::proto::sglang::GenerateResponse>(running, outgoing).await?
            }
        })
    };
    stream::once(start).try_flatten().boxed()
}

/// A sample that the engine works on. Where it goes before its end, the engine is told.
struct Running {
    inner: Arc<Inner>,
    dialect: Dialect,
    /// `None` once the engine has ended it.
    id: Option<String>,
    /// How many tokens have come.
    tokens: u32,
    /// How many of the likeliest tokens are told: engines may add the sampled one.
    top: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        let (Some(id), Ok(runtime)) = (self.id.take(), Handle::try_current()) else {
            return;
        };
        let (inner, dialect) = (self.inner.clone(), self.dialect);
        // Ending the call is not enough for every engine.
        runtime.spawn(async move {
            let aborted = timeout(ABORT_TIME_MAX, dialect.abort(&inner.link, id)).await;
            if !matches!(aborted, Ok(Ok(()))) {
                tracing::debug!("the engine could not be told to stop a sample");
            }
        });
    }
}

/// Sends the request; the stream begins with the first message.
async fn chunks<D: Piece>(
    mut running: Running,
    outgoing: super::wire::Outgoing,
) -> Result<Chunks, BackendError> {
    let inner = running.inner.clone();
    let path = http::uri::PathAndQuery::from_static(running.dialect.generate());
    let mut grpc = tonic::client::Grpc::new(inner.link.channel());
    let request = inner.link.request(outgoing);
    let first_max = Duration::from_secs(inner.options.first_token_secs_max);
    let call = async {
        grpc.ready().await.map_err(|error| unreachable(&error))?;
        let answer = grpc.server_streaming(request, path, KeptIds::<D>::default());
        let mut messages = answer
            .await
            .map_err(|status| refused(&status))?
            .into_inner();
        let first = next(&mut messages).await?;
        Ok::<_, BackendError>((messages, first))
    };
    let (messages, first) = match timeout(first_max, call).await {
        Ok(Ok(begun)) => begun,
        Ok(Err(error)) => {
            if matches!(error, BackendError::Refused { .. }) {
                running.id = None;
            }
            return Err(error);
        }
        Err(_) => return Err(Refusal::Silent(first_max).into()),
    };
    let gap_max = Duration::from_secs(inner.options.token_secs_max);
    let state = Some((running, messages, Some(first)));
    let chunks = stream::unfold(state, move |state| async move {
        let (mut running, mut messages, first) = state?;
        let message: Result<D, BackendError> = match first {
            Some(first) => Ok(first),
            None => match timeout(gap_max, next(&mut messages)).await {
                // From here on nothing may be tried again from the start.
                Ok(message) => message.map_err(BackendError::in_the_middle),
                Err(_) => Err(Refusal::Silent(gap_max).into()),
            },
        };
        let chunk = message.and_then(|message| message.into_chunk(running.tokens));
        Some(match chunk {
            Ok(mut chunk) => {
                for logprob in &mut chunk.logprobs {
                    logprob.top.truncate(running.top);
                }
                let new = u32::try_from(chunk.tokens.len()).unwrap_or(u32::MAX);
                running.tokens = running.tokens.saturating_add(new);
                let over = chunk.finish.is_some();
                if over {
                    running.id = None;
                }
                (Ok(chunk), (!over).then_some((running, messages, None)))
            }
            Err(error) => (Err(error), None),
        })
    });
    Ok(chunks.boxed())
}

async fn next<D: Piece>(messages: &mut Streaming<D>) -> Result<D, BackendError> {
    match messages.message().await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(Refusal::CutOff.into()),
        Err(status) => Err(refused(&status)),
    }
}

fn unreachable(error: &tonic::transport::Error) -> BackendError {
    tracing::debug!(%error, "the engine cannot be reached");
    BackendError::Unavailable {
        reason: "the engine cannot be reached".to_owned(),
        retry_after: None,
    }
}

/// What a status says about a sample of which nothing has come yet.
pub(super) fn refused(status: &Status) -> BackendError {
    let text = status.message();
    let text = &text[..text.floor_char_boundary(REASON_BYTES_MAX)];
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange => BackendError::Refused {
            reason: text.to_owned(),
        },
        Code::Unavailable | Code::ResourceExhausted => BackendError::Unavailable {
            reason: format!("the engine answers {:?}", status.code()),
            retry_after: None,
        },
        code @ (Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss
        | Code::Unauthenticated) => BackendError::Failed {
            reason: format!("the engine answers {code:?}: {text}"),
        },
    }
}

/// Reads the answers of the two dialects that send chunks and then a message that says why the sample
/// ended, which repeats the last chunk, or stands alone where there was none. Their messages have the same
/// fields, in types of their own.
macro_rules! chunks_and_an_end {
    ($pb:ident) => {
        impl $crate::backend::gpu::sample::Piece for $pb::GenerateResponse {
            fn into_chunk(
                self,
                before: u32,
            ) -> Result<$crate::backend::Chunk, $crate::backend::BackendError> {
                use $crate::backend::{Chunk, gpu::sample};
                use $pb::generate_response::Response;

                let new = |tokens, told: Option<$pb::OutputLogProbs>, cached| {
                    let told = told.unwrap_or_default();
                    let top = told.top_logprobs.into_iter();
                    let top = top.map(|top| (top.token_ids, top.values));
                    Chunk {
                        tokens,
                        logprobs: sample::logprobs(&told.token_ids, &told.token_logprobs, top),
                        cached_tokens: (before == 0).then_some(cached),
                        ..Chunk::default()
                    }
                };
                Ok(match self.response {
                    None => Chunk::default(),
                    Some(Response::Chunk(it)) => {
                        new(it.token_ids, it.output_logprobs, it.cached_tokens)
                    }
                    Some(Response::Complete(it)) => Chunk {
                        finish: Some(sample::end(&it.finish_reason)?),
                        ..match before {
                            0 => new(it.output_ids, it.output_logprobs, it.cached_tokens),
                            _ => Chunk::default(),
                        }
                    },
                })
            }
        }
    };
}
pub(super) use chunks_and_an_end;

/// Why a sample ended, in the words that engines have for it.
pub(super) fn end(reason: &str) -> Result<SampleEnd, BackendError> {
    match reason {
        "stop" => Ok(SampleEnd::Stop),
        "length" => Ok(SampleEnd::Length),
        "abort" => Err(Refusal::Aborted.into()),
        other => {
            let word = &other[..other.floor_char_boundary(REASON_BYTES_MAX)];
            Err(Refusal::Unknown(word.to_owned()).into())
        }
    }
}

/// One log probability a token, where they were told.
pub(super) fn logprobs(
    ids: &[u32],
    values: &[f32],
    mut top: impl Iterator<Item = (Vec<u32>, Vec<f32>)>,
) -> Vec<TokenLogprob> {
    let told = ids.iter().zip(values);
    told.map(|(id, value)| {
        let (ids, values) = top.next().unwrap_or_default();
        logprob(*id, *value, ids.into_iter().zip(values).collect())
    })
    .collect()
}

/// The log probability of a token.
pub(super) fn logprob(token: u32, logprob: f32, mut top: Vec<(u32, f32)>) -> TokenLogprob {
    top.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    TokenLogprob {
        token,
        logprob,
        top,
    }
}

/// The seed where an engine takes 31 bits.
pub(super) fn signed_seed(seed: u64) -> i32 {
    i32::try_from(seed & 0x7fff_ffff).unwrap_or_default()
}

/// Those of the numbers that are none below zero.
pub(super) fn whole(numbers: &[i32]) -> Vec<u32> {
    let numbers = numbers.iter();
    numbers.filter_map(|id| u32::try_from(*id).ok()).collect()
}
