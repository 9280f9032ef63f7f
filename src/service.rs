//! The gRPC services: handlers without logic. A handler takes a place, decodes what comes, and
//! hands the call to the stream or to what is held.

use std::{
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    archive::Archive,
    auth::Principal,
    backend::router::{BreakerState, ReplicaStatus},
    billing::{Account, Biller},
    budget::Budgets,
    drain::Drain,
    item::{Item, ResponseId},
    ledger::Source,
    model::{Model, Models},
    proto::{
        self as pb, models_service_server::ModelsService,
        responses_service_server::ResponsesService,
    },
    render::Heads,
    safety::Policies,
    session::{Committed, Held},
    status::{bad_field, refusal, retry_later, unreadable},
    store::Missed,
    stream::{self, Ends, Incoming, Limits, Outbox, Outgoing, Shared, StreamEnd},
    wire::{self, RequestLimits},
};

/// Most items of one page, and how many there are where the client does not say.
const PAGE_MAX: usize = 1000;
const PAGE_DEFAULT: usize = 100;
/// Most tokens of one `GetPrompt`, well under the message size that clients take by default.
const PROMPT_TOKENS_MAX: usize = 100_000;
/// When a client may ask for a stream again that there was no room for.
const BUSY_RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// How long streams may take to end once their connections are gone, and then the store to be
/// written.
const STREAMS_END_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(2);
const FLUSH_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// What the services are made of.
pub struct Parts {
    /// The models.
    pub models: Arc<Models>,
    /// Rendered heads.
    pub heads: Arc<Heads>,
    /// What is held.
    pub archive: Arc<Archive>,
    /// What keeps usage.
    pub biller: Arc<dyn Biller>,
    /// What may be used.
    pub budgets: Arc<Budgets>,
    /// What items are checked under.
    pub policies: Arc<Policies>,
    /// Limits of a stream.
    pub limits: Limits,
    /// Limits of a request.
    pub request_limits: RequestLimits,
    /// Most responses that a stream holds.
    pub responses_held_max: usize,
    /// Most streams in all.
    pub streams_max: usize,
    /// Tells when the server drains; what it gives is when connections are cut.
    pub drain: Drain,
}

/// Both services.
#[derive(Clone)]
pub struct Services {
    parts: Arc<Parts>,
    places: Arc<Semaphore>,
    streams: TaskTracker,
}

impl Services {
    /// Services over these parts.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            places: Arc::new(Semaphore::new(parts.streams_max)),
            parts: Arc::new(parts),
            streams: TaskTracker::new(),
        }
    }

    /// Starts a stream: its reader runs until it has ended, and its events are what is returned.
    fn start(
        &self,
        principal: &Principal,
        inbound: impl Stream<Item = Result<Incoming, StreamEnd>> + Send + 'static,
    ) -> Result<Events, Status> {
        let parts = &self.parts;
        if parts.drain.is_draining() {
            let why = "the server stops";
            return Err(retry_later(Code::Unavailable, "DRAINING", why, BUSY_RETRY));
        }
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            let why = "the server has no room for another stream";
            retry_later(
                Code::ResourceExhausted,
                "STREAM_LIMIT_REACHED",
                why,
                BUSY_RETRY,
            )
        })?;
        let (out, outgoing) = stream::outgoing(&parts.limits);
        let shared = Arc::new(Shared {
            models: parts.models.clone(),
            heads: parts.heads.clone(),
            held: Held::new(
                parts.archive.sessions().clone(),
                principal.tenant.clone(),
                parts.responses_held_max,
            ),
            archive: parts.archive.clone(),
            wallet: parts
                .budgets
                .wallet(principal.tenant.as_str(), &principal.key_id),
            account: Account::new(
                parts.biller.clone(),
                principal.tenant.clone(),
                principal.key_id.clone(),
            ),
            policies: parts.policies.clone(),
            limits: parts.limits,
            slots: Arc::new(Semaphore::new(parts.limits.sampling_max)),
            out: out.clone(),
            ends: Ends::default(),
        });
        // Each in its place: futures that are moved into one another leave room for themselves behind.
        let inbound = Box::pin(until_broken(inbound, out.clone()));
        let draining = Box::pin(parts.drain.draining());
        let span =
            tracing::info_span!("stream", tenant = %principal.tenant, key = %principal.key_id);
        let run = Box::pin(stream::run(inbound, shared, draining));
        self.streams.spawn(tracing::Instrument::instrument(
            async move {
                // A panic must not look like a stream that ended well.
                if std::panic::AssertUnwindSafe(run)
                    .catch_unwind()
                    .await
                    .is_err()
                {
                    out.fail(StreamEnd::Internal);
                }
            },
            span,
        ));
        Ok(Events {
            outgoing,
            _place: place,
        })
    }

    async fn find(&self, principal: &Principal, id: &str) -> Result<Arc<Committed>, Status> {
        let id = ResponseId::from(id);
        let found = self.parts.archive.load(&principal.tenant, &id).await;
        let found = found.map_err(|error| {
            tracing::error!(%error, "the store cannot be read");
            store_unavailable()
        })?;
        found.ok_or_else(not_found)
    }

    /// Waits until streams that have lost their clients have ended, and until the store has what they
    /// left; for no longer than a moment each.
    pub async fn finish(&self) {
        self.streams.close();
        let ended = tokio::time::timeout(STREAMS_END_TIME_MAX, self.streams.wait()).await;
        if ended.is_err() {
            tracing::warn!(streams = self.streams.len(), "streams did not end in time");
        }
        let flush = self.parts.archive.flush();
        if tokio::time::timeout(FLUSH_TIME_MAX, flush).await.is_err() {
            tracing::error!("the store was not written in time: responses are lost");
        }
        let flush = self.parts.biller.flush();
        if tokio::time::timeout(FLUSH_TIME_MAX, flush).await.is_err() {
            tracing::error!("usage records were not written in time");
        }
    }
}

/// The events of a stream on the wire. Holds the stream's place while it lives.
pub struct Events {
    outgoing: Outgoing,
    _place: OwnedSemaphorePermit,
}

impl Stream for Events {
    type Item = Result<pb::ConnectResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.outgoing.poll_next_unpin(cx).map(|next| {
            next.map(|event| match event {
                Ok((sequence, envelope)) => Ok(wire::response(sequence, envelope)),
                Err(end) => Err(end.into()),
            })
        })
    }
}

fn not_found() -> Status {
    let why = "no such response is held";
    refusal(Code::NotFound, "RESPONSE_NOT_FOUND", why)
}

fn store_unavailable() -> Status {
    let why = "the response store is not available";
    retry_later(Code::Unavailable, "STORE_UNAVAILABLE", why, BUSY_RETRY)
}

fn principal<T>(request: &Request<T>) -> Result<Principal, Status> {
    // The gate puts it there; a call without one went around the gate.
    let found = request.extensions().get::<Principal>().cloned();
    found.ok_or_else(|| {
        refusal(
            Code::Unauthenticated,
            "NO_PRINCIPAL",
            "the call has no principal",
        )
    })
}

/// Commands until the client closes its side, or why no more can be read.
fn commands(
    inbound: Streaming<pb::ConnectRequest>,
    limits: RequestLimits,
) -> impl Stream<Item = Result<Incoming, StreamEnd>> + Send {
    inbound.map(move |message| match message {
        Ok(message) => Ok(wire::incoming(message, &limits)),
        Err(status) => {
            tracing::debug!(code = ?status.code(), "the client's side broke");
            let has_details = !status.details().is_empty();
            Err(unreadable(status.code(), has_details).unwrap_or(StreamEnd::ClientGone))
        }
    })
}

/// What comes until it breaks, which ends the whole stream at once. Without an end of its own from there
/// on: the end of the commands would say that the client has closed its side in good order.
fn until_broken(
    inbound: impl Stream<Item = Result<Incoming, StreamEnd>> + Send,
    out: Outbox,
) -> impl Stream<Item = Incoming> + Send {
    inbound.then(move |incoming| {
        let out = out.clone();
        async move {
            match incoming {
                Ok(incoming) => incoming,
                Err(end) => {
                    out.fail(end);
                    std::future::pending().await
                }
            }
        }
    })
}

#[tonic::async_trait]
impl ResponsesService for Services {
    type ConnectStream = Events;
    type CreateStream = Events;

    async fn connect(
        &self,
        request: Request<Streaming<pb::ConnectRequest>>,
    ) -> Result<Response<Events>, Status> {
        let principal = principal(&request)?;
        let inbound = commands(request.into_inner(), self.parts.request_limits);
        Ok(Response::new(self.start(&principal, inbound)?))
    }

    async fn create(
        &self,
        request: Request<pb::CreateRequest>,
    ) -> Result<Response<Events>, Status> {
        let principal = principal(&request)?;
        let incoming = wire::incoming_create(request.into_inner(), &self.parts.request_limits);
        let inbound = futures::stream::once(std::future::ready(Ok(incoming)));
        Ok(Response::new(self.start(&principal, inbound)?))
    }

    async fn get_response(
        &self,
        request: Request<pb::GetResponseRequest>,
    ) -> Result<Response<pb::GetResponseResponse>, Status> {
        let principal = principal(&request)?;
        let found = self
            .find(&principal, &request.get_ref().response_id)
            .await?;
        let (status, incomplete_reason) = wire::status(&found.status);
        let response = pb::Response {
            id: found.id.to_string(),
            previous_response_id: found
                .parent
                .as_ref()
                .map(|it| it.id.to_string())
                .unwrap_or_default(),
            model: found.model.to_string(),
            status: status.into(),
            incomplete_reason: incomplete_reason.into(),
            created_at_ms: found.created_at_ms,
            output: found
                .output
                .iter()
                .map(|item| wire::item_message(item))
                .collect(),
            usage: Some(wire::usage(found.usage)),
            prompt: Some(wire::prompt_report(&found.prompt)),
            metadata: found.metadata.clone().into_iter().collect(),
            call_ids: found
                .open_calls
                .iter()
                .map(|call| call.call_id.to_string())
                .collect(),
        };
        Ok(Response::new(pb::GetResponseResponse {
            response: Some(response),
        }))
    }

    async fn delete_response(
        &self,
        request: Request<pb::DeleteResponseRequest>,
    ) -> Result<Response<pb::DeleteResponseResponse>, Status> {
        let principal = principal(&request)?;
        let id = ResponseId::from(request.into_inner().response_id);
        match self.parts.archive.delete(&principal.tenant, &id).await {
            Ok(true) => Ok(Response::new(pb::DeleteResponseResponse {})),
            Ok(false) => Err(not_found()),
            Err(Missed) => Err(store_unavailable()),
        }
    }

    async fn list_input_items(
        &self,
        request: Request<pb::ListInputItemsRequest>,
    ) -> Result<Response<pb::ListInputItemsResponse>, Status> {
        let principal = principal(&request)?;
        let found = self
            .find(&principal, &request.get_ref().response_id)
            .await?;
        let request = request.into_inner();
        let first: usize = if request.page_token.is_empty() {
            0
        } else {
            request.page_token.parse().map_err(|_| {
                bad_field(
                    Code::InvalidArgument,
                    "page_token",
                    "it is not of this server",
                )
            })?
        };
        let size = match request.page_size as usize {
            0 => PAGE_DEFAULT,
            size => size.min(PAGE_MAX),
        };
        let nodes: Vec<&Committed> = found.chain().collect();
        let items: Vec<&Arc<Item>> = nodes.iter().rev().flat_map(|node| &node.input).collect();
        let page = items.iter().skip(first).take(size);
        let next = first.saturating_add(size);
        Ok(Response::new(pb::ListInputItemsResponse {
            items: page.map(|item| wire::item_message(item)).collect(),
            next_page_token: if next < items.len() {
                next.to_string()
            } else {
                String::new()
            },
        }))
    }

    async fn get_prompt(
        &self,
        request: Request<pb::GetPromptRequest>,
    ) -> Result<Response<pb::GetPromptResponse>, Status> {
        let principal = principal(&request)?;
        let found = self
            .find(&principal, &request.get_ref().response_id)
            .await?;
        let request = request.into_inner();
        // Linear in the history, and no part of any loop.
        let models = self.parts.models.clone();
        let shown = tokio::task::spawn_blocking(move || prompt(&models, &found, &request)).await;
        let shown =
            shown.map_err(|_| refusal(Code::Internal, "INTERNAL", "the prompt cannot be shown"))?;
        Ok(Response::new(shown?))
    }
}

#[tonic::async_trait]
impl ModelsService for Services {
    async fn list_models(
        &self,
        request: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        principal(&request)?;
        let models = &self.parts.models;
        Ok(Response::new(pb::ListModelsResponse {
            models: models
                .all()
                .iter()
                .map(|model| model_message(models, model))
                .collect(),
        }))
    }

    async fn get_model(
        &self,
        request: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::GetModelResponse>, Status> {
        principal(&request)?;
        let models = &self.parts.models;
        let model = models
            .named(&request.get_ref().name)
            .ok_or_else(|| refusal(Code::NotFound, "MODEL_NOT_FOUND", "no model has that name"))?;
        Ok(Response::new(pb::GetModelResponse {
            model: Some(model_message(models, &model)),
        }))
    }
}

fn model_message(models: &Models, model: &Model) -> pb::Model {
    let abilities = model.abilities();
    let appends = model.artifacts.appends;
    pb::Model {
        name: model.name.to_string(),
        is_default: models.is_default(model),
        backend: abilities.backend.kind.to_owned(),
        context_length: model.context_length,
        family: model.artifacts.family.as_str().to_owned(),
        keeps_cache: abilities.backend.keeps_cache,
        constrained_sampling: abilities.backend.constrained_sampling,
        logprobs: abilities.backend.logprobs,
        reasoning_effort: abilities.reasoning_effort,
        appends_tool_outputs: appends.tool_outputs,
        appends_user_messages: appends.user_messages,
        healthy: model.backend.healthy(),
        parameters: model.parameters,
        renders_elsewhere: abilities.backend.reads_messages,
        aliases: models.aliases_of(&model.name),
        fallback: model.fallback.as_deref().unwrap_or_default().to_owned(),
        replicas: model
            .replicas
            .iter()
            .flat_map(|router| router.replicas())
            .map(replica_message)
            .collect(),
    }
}

fn replica_message(replica: ReplicaStatus) -> pb::Replica {
    pb::Replica {
        backend: replica.kind.to_owned(),
        healthy: replica.healthy,
        breaker: match replica.breaker {
            BreakerState::Closed => pb::BreakerState::Closed,
            BreakerState::Open => pb::BreakerState::Open,
            BreakerState::HalfOpen => pb::BreakerState::HalfOpen,
        }
        .into(),
        in_flight: replica.in_flight,
        failures: replica.failures,
    }
}

/// What the model saw: tokens, their text, and where they came from.
fn prompt(
    models: &Models,
    response: &Committed,
    request: &pb::GetPromptRequest,
) -> Result<pb::GetPromptResponse, Status> {
    let Some(view) = &response.view else {
        let why = "no model has the tokenizer any more that the prompt was made with";
        return Err(refusal(Code::FailedPrecondition, "MODEL_CHANGED", why));
    };
    let tokenizer = &view.artifacts.tokenizer;
    let tokens = response.rope.tokens_from(0);
    let total = if request.include_sampled {
        tokens.len()
    } else {
        response.prompt_tokens.min(tokens.len())
    };
    let first = request.first_token as usize;
    if first > total {
        let why = format!("{first} is past the {total} tokens of the prompt");
        return Err(bad_field(Code::OutOfRange, "first_token", &why));
    }
    let count = match request.max_tokens as usize {
        0 => PROMPT_TOKENS_MAX,
        count => count.min(PROMPT_TOKENS_MAX),
    };
    let end = total.min(first + count);
    let bytes: Vec<u8> = tokens[first..end]
        .iter()
        .flat_map(|id| tokenizer.bytes_of(*id))
        .copied()
        .collect();
    let spans = crate::prompt::spans(response, view)
        .into_iter()
        .filter(|span| span.tokens.start < end && span.tokens.end > first)
        .map(|span| {
            let tokens = span.tokens.start.max(first)..span.tokens.end.min(end);
            span_message(&span.source, &tokens)
        })
        .collect();
    Ok(pb::GetPromptResponse {
        token_ids: tokens[first..end].to_vec(),
        text: String::from_utf8_lossy(&bytes).into_owned(),
        spans,
        total_tokens: u32::try_from(total).unwrap_or(u32::MAX),
        fingerprint: wire::hex(&crate::ledger::fingerprint(&tokens[..total])),
        rendered_elsewhere: models
            .named(&response.model)
            .is_some_and(|model| model.backend.capabilities().reads_messages),
    })
}

fn span_message(source: &Source, tokens: &Range<usize>) -> pb::PromptSpan {
    let (kind, item_id) = match source {
        Source::Template => (pb::SpanSource::Template, String::new()),
        Source::Instructions => (pb::SpanSource::Instructions, String::new()),
        Source::Input(id) => (pb::SpanSource::InputItem, id.to_string()),
        Source::Sampled(id) => (pb::SpanSource::Sampled, id.to_string()),
    };
    pb::PromptSpan {
        first_token: u32::try_from(tokens.start).unwrap_or(u32::MAX),
        end_token: u32::try_from(tokens.end).unwrap_or(u32::MAX),
        source: kind.into(),
        item_id,
    }
}
