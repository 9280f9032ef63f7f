//! An engine that a test plays, in each of the dialects.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream};
use hotloop::backend::gpu::{DialectChoice, proto::engine, proto::sglang};
use tokio::{
    net::TcpListener,
    runtime::{self, Runtime},
};
use tonic::{Request, Response, Status, transport::Server};
use vllm_proto as vllm;

pub(crate) const DIALECTS: [DialectChoice; 3] = [
    DialectChoice::Vllm,
    DialectChoice::Engine,
    DialectChoice::Sglang,
];

/// What an engine is asked to sample, whatever the dialect.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Asked {
    pub(crate) id: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    /// `None`: all tokens.
    pub(crate) top_k: Option<u32>,
    pub(crate) seed: Option<u64>,
    /// Presence and frequency.
    pub(crate) penalties: (f32, f32),
    pub(crate) bias: Vec<(u32, f32)>,
    pub(crate) max_tokens: u32,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) logprobs: Option<u32>,
    /// The kind of the constraint, and its text.
    pub(crate) constraint: Option<(&'static str, String)>,
    /// Names of the tenant and the conversation, where the dialect has them.
    pub(crate) names: Option<(String, String)>,
}

/// What an engine does about a sample, one after the other.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// Tokens in one message.
    Tokens(Vec<u32>),
    /// A token with its log probability, and the likeliest ones.
    Likely(u32, f32, Vec<(u32, f32)>),
    Pause(Duration),
    /// The end, in the words of the two dialects that have them.
    End(&'static str),
    Fail(Status),
    /// Silence for ever.
    Hang,
}

type Script = dyn Fn(&Asked) -> Vec<Act> + Send + Sync;

/// What an engine says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) context_length: u32,
    pub(crate) vocab_size: u32,
    pub(crate) end_token: u32,
}

struct State {
    facts: Facts,
    script: Box<Script>,
    asked: Mutex<Vec<Asked>>,
    aborted: Mutex<Vec<String>>,
    healthy: AtomicBool,
    load: AtomicU32,
    probes: AtomicU32,
    authorization: Mutex<Option<String>>,
}

/// A running engine. It is gone, connections and all, when this is dropped.
pub(crate) struct Fake {
    state: Arc<State>,
    address: SocketAddr,
    /// A runtime of its own: with it go all connections.
    runtime: Option<Runtime>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Tokens of the prompt that every fake says it had.
pub(crate) const CACHED: u32 = 7;

impl Fake {
    pub(crate) async fn start(
        dialect: DialectChoice,
        facts: Facts,
        script: impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static,
    ) -> Self {
        Self::start_at(dialect, facts, script, ([127, 0, 0, 1], 0).into()).await
    }

    /// At this address, where another one may have been before.
    pub(crate) async fn start_at(
        dialect: DialectChoice,
        facts: Facts,
        script: impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static,
        address: SocketAddr,
    ) -> Self {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let bound = runtime.spawn(TcpListener::bind(address));
        let listener = bound.await.unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            facts,
            script: Box::new(script),
            asked: Mutex::default(),
            aborted: Mutex::default(),
            healthy: AtomicBool::new(true),
            load: AtomicU32::new(0),
            probes: AtomicU32::new(0),
            authorization: Mutex::default(),
        });
        let player = Player(state.clone());
        let router = match dialect {
            DialectChoice::Vllm => {
                use vllm::{control_server::ControlServer, inference_server::InferenceServer};
                Server::builder()
                    .add_service(InferenceServer::new(player.clone()))
                    .add_service(ControlServer::new(player))
            }
            DialectChoice::Engine => Server::builder()
                .add_service(engine::vllm_engine_server::VllmEngineServer::new(player)),
            DialectChoice::Sglang => Server::builder().add_service(
                sglang::sglang_scheduler_server::SglangSchedulerServer::new(player),
            ),
            DialectChoice::Auto => panic!("a fake speaks one dialect"),
        };
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        runtime.spawn(async move {
            router.serve_with_incoming(incoming).await.unwrap();
        });
        Self {
            state,
            address,
            runtime: Some(runtime),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().unwrap().clone()
    }

    pub(crate) fn aborted(&self) -> Vec<String> {
        self.state.aborted.lock().unwrap().clone()
    }

    pub(crate) fn is_healthy(&self, healthy: bool) {
        self.state.healthy.store(healthy, Ordering::Relaxed);
    }

    /// How often it was asked how it is.
    pub(crate) fn probes(&self) -> u32 {
        self.state.probes.load(Ordering::Relaxed)
    }

    /// What the last request for a sample carried.
    pub(crate) fn authorization(&self) -> Option<String> {
        self.state.authorization.lock().unwrap().clone()
    }

    pub(crate) fn has_load(&self, load: u32) {
        self.state.load.store(load, Ordering::Relaxed);
    }
}

#[derive(Clone)]
struct Player(Arc<State>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Player {
    /// Plays the script for this prompt, each act as one message of the dialect.
    fn play<T: Send + 'static>(
        &self,
        asked: Asked,
        message: impl Fn(Act, u32) -> Vec<T> + Send + 'static,
    ) -> Result<Response<Answers<T>>, Status> {
        let acts = (self.0.script)(&asked);
        self.0.asked.lock().unwrap().push(asked);
        if let [Act::Fail(status)] = acts.as_slice() {
            return Err(status.clone());
        }
        let mut tokens = 0;
        let messages = stream::iter(acts).then(move |act| {
            let before = tokens;
            tokens += match &act {
                Act::Tokens(ids) => ids.len() as u32,
                Act::Likely(..) => 1,
                Act::Pause(_) | Act::End(_) | Act::Fail(_) | Act::Hang => 0,
            };
            let messages: Vec<Result<T, Status>> = match &act {
                Act::Fail(status) => vec![Err(status.clone())],
                _ => message(act.clone(), before).into_iter().map(Ok).collect(),
            };
            async move {
                match act {
                    Act::Pause(time) => tokio::time::sleep(time).await,
                    Act::Hang => std::future::pending().await,
                    Act::Tokens(_) | Act::Likely(..) | Act::End(_) | Act::Fail(_) => {}
                }
                stream::iter(messages)
            }
        });
        Ok(Response::new(messages.flatten().boxed()))
    }

    fn abort(&self, ids: Vec<String>) {
        self.0.aborted.lock().unwrap().extend(ids);
    }

    fn healthy(&self) -> bool {
        self.0.probes.fetch_add(1, Ordering::Relaxed);
        self.0.healthy.load(Ordering::Relaxed)
    }
}

// The first-party gRPC server of vLLM.

#[tonic::async_trait]
impl vllm::inference_server::Inference for Player {
    async fn generate(
        &self,
        _: Request<vllm::GenerateRequest>,
    ) -> Result<Response<vllm::GenerateResponse>, Status> {
        Err(Status::unimplemented("nobody asks for it"))
    }

    type GenerateStreamStream = Answers<vllm::GenerateResponse>;

    async fn generate_stream(
        &self,
        request: Request<vllm::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        use vllm::{decoding_parameters::StructuredOutput, generate_request::Prompt};

        let it = request.into_inner();
        let Some(Prompt::TokenIds(prompt)) = it.prompt else {
            return Err(Status::invalid_argument("the prompt is not tokens"));
        };
        let (sampling, decoding) = (it.sampling.unwrap(), it.decoding.unwrap());
        let (stopping, response) = (it.stopping.unwrap(), it.response.unwrap());
        assert!(response.output_token_ids && response.output_text == Some(false));
        let mut bias: Vec<_> = decoding.logit_bias.into_iter().collect();
        bias.sort_by_key(|(id, _)| *id);
        let asked = Asked {
            id: it.request_id,
            ids: prompt.ids,
            temperature: it.temperature.unwrap(),
            top_p: sampling.top_p.unwrap(),
            top_k: sampling.top_k.filter(|top| *top > 0),
            seed: sampling.seed.map(i64::cast_unsigned),
            penalties: (decoding.presence_penalty, decoding.frequency_penalty),
            bias,
            max_tokens: stopping.max_new_tokens,
            end_tokens: stopping.stop_token_ids,
            logprobs: response.output_candidates.map(|wanted| {
                assert!(response.output_logprobs);
                match wanted.select {
                    Some(vllm::candidate_tokens::Select::TopN(top)) => top,
                    other => panic!("{other:?}"),
                }
            }),
            constraint: decoding.structured_output.map(|output| match output {
                StructuredOutput::Json(schema) => ("json", schema),
                StructuredOutput::Grammar(text) => ("grammar", text),
                other => panic!("{other:?}"),
            }),
            names: Some((it.kv.unwrap().cache_salt, it.session_id.unwrap())),
        };
        let count = asked.ids.len() as u32;
        self.play(asked, move |act, before| {
            let mut output = vllm::SequenceOutput::default();
            match act {
                Act::Tokens(ids) => output.token_ids = ids,
                Act::Likely(id, logprob, top) => {
                    output.token_ids = vec![id];
                    output.logprobs = vec![logprob];
                    let token = |(id, logprob)| vllm::candidate_token_info::TokenInfo {
                        id,
                        logprob,
                        rank: 0,
                    };
                    output.candidate_tokens = vec![vllm::CandidateTokenInfo {
                        tokens: top.into_iter().map(token).collect(),
                    }];
                }
                Act::End(reason) => {
                    use vllm::finish_info::FinishReason;
                    let reason = match reason {
                        "stop" => FinishReason::Stop,
                        "length" => FinishReason::Length,
                        _ => FinishReason::Aborted,
                    };
                    output.finish_info = Some(vllm::FinishInfo {
                        finish_reason: reason.into(),
                        num_cached_tokens: Some(CACHED),
                        ..Default::default()
                    });
                }
                Act::Pause(_) | Act::Fail(_) | Act::Hang => return Vec::new(),
            }
            output.num_tokens = output.token_ids.len() as u32;
            let answer = |prompt_info, outputs| vllm::GenerateResponse {
                prompt_info,
                outputs,
            };
            let info = (before == 0).then(|| {
                let info = vllm::PromptInfo {
                    num_prompt_tokens: count,
                    ..Default::default()
                };
                answer(Some(info), None)
            });
            info.into_iter()
                .chain([answer(None, Some(output))])
                .collect()
        })
    }
}

/// The calls of `vllm.Control` that nobody makes.
macro_rules! unasked {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl vllm::control_server::Control for Player {
            async fn get_server_info(
                &self,
                _: Request<vllm::GetServerInfoRequest>,
            ) -> Result<Response<vllm::ServerInfo>, Status> {
                Ok(Response::new(vllm::ServerInfo {
                    engine_version: "fake".into(),
                    max_model_len: self.0.facts.context_length,
                    kv_block_size: 16,
                    ..Default::default()
                }))
            }

            async fn get_model_info(
                &self,
                _: Request<vllm::GetModelInfoRequest>,
            ) -> Result<Response<vllm::ModelInfo>, Status> {
                Ok(Response::new(vllm::ModelInfo {
                    served_model_name: "served".into(),
                    supports_token_ids_input: true,
                    ..Default::default()
                }))
            }

            async fn is_sleeping(
                &self,
                _: Request<vllm::IsSleepingRequest>,
            ) -> Result<Response<vllm::IsSleepingResponse>, Status> {
                let sleeping = !self.healthy();
                Ok(Response::new(vllm::IsSleepingResponse { sleeping }))
            }

            async fn abort(
                &self,
                request: Request<vllm::AbortRequest>,
            ) -> Result<Response<vllm::AbortResponse>, Status> {
                Player::abort(self, request.into_inner().request_ids);
                Ok(Response::new(vllm::AbortResponse {}))
            }

            $(async fn $name(
                &self,
                _: Request<vllm::$request>,
            ) -> Result<Response<vllm::$response>, Status> {
                Err(Status::unimplemented("nobody asks for it"))
            })*
        }
    };
}

unasked! {
    shutdown(ShutdownRequest) -> ShutdownResponse;
    load_lora(LoadLoraRequest) -> LoadLoraResponse;
    unload_lora(UnloadLoraRequest) -> UnloadLoraResponse;
    list_loras(ListLorasRequest) -> ListLorasResponse;
    get_kv_event_sources(GetKvEventSourcesRequest) -> GetKvEventSourcesResponse;
    pause_generation(PauseGenerationRequest) -> PauseGenerationResponse;
    resume_generation(ResumeGenerationRequest) -> ResumeGenerationResponse;
    is_paused(IsPausedRequest) -> IsPausedResponse;
    sleep(SleepRequest) -> SleepResponse;
    wake_up(WakeUpRequest) -> WakeUpResponse;
    init_weight_transfer_engine(InitWeightTransferEngineRequest) -> InitWeightTransferEngineResponse;
    start_weight_update(StartWeightUpdateRequest) -> StartWeightUpdateResponse;
    start_draft_weight_update(StartDraftWeightUpdateRequest) -> StartDraftWeightUpdateResponse;
    update_weights(UpdateWeightsRequest) -> UpdateWeightsResponse;
    finish_weight_update(FinishWeightUpdateRequest) -> FinishWeightUpdateResponse;
    update_weight_version(UpdateWeightVersionRequest) -> UpdateWeightVersionResponse;
    get_weight_version(GetWeightVersionRequest) -> GetWeightVersionResponse;
}

/// The two dialects whose answers are chunks and an end. Each act is a chunk; the end repeats the last one, and
/// stands alone where there was none.
macro_rules! chunked {
    ($module:ident, $service:path, { $($more:tt)* }) => {
        #[allow(clippy::needless_update, reason = "one of the two has more fields")]
        #[tonic::async_trait]
        impl $service for Player {
            type GenerateStream = Answers<$module::GenerateResponse>;

            async fn generate(
                &self,
                request: Request<$module::GenerateRequest>,
            ) -> Result<Response<Self::GenerateStream>, Status> {
                use $module::generate_response::Response as Answer;

                let key = request.metadata().get("authorization");
                let key = key.map(|value| value.to_str().unwrap().to_owned());
                *self.0.authorization.lock().unwrap() = key;
                let asked = Wanted::asked(request.into_inner())?;
                let count = asked.ids.len() as u32;
                let last = Mutex::new(Vec::new());
                self.play(asked, move |act, _| {
                    let mut told = $module::OutputLogProbs::default();
                    let ids = match act {
                        Act::Tokens(ids) => ids,
                        Act::Likely(id, logprob, top) => {
                            told.token_ids = vec![id];
                            told.token_logprobs = vec![logprob];
                            let (token_ids, values) = top.into_iter().unzip();
                            told.top_logprobs = vec![$module::TopLogProbs { values, token_ids }];
                            vec![id]
                        }
                        Act::End(reason) => {
                            let complete = $module::GenerateComplete {
                                output_ids: std::mem::take(&mut *last.lock().unwrap()),
                                finish_reason: reason.into(),
                                prompt_tokens: count,
                                cached_tokens: CACHED,
                                ..Default::default()
                            };
                            return vec![$module::GenerateResponse {
                                response: Some(Answer::Complete(complete)),
                                ..Default::default()
                            }];
                        }
                        Act::Pause(_) | Act::Fail(_) | Act::Hang => return Vec::new(),
                    };
                    *last.lock().unwrap() = ids.clone();
                    let chunk = $module::GenerateStreamChunk {
                        completion_tokens: ids.len() as u32,
                        token_ids: ids,
                        prompt_tokens: count,
                        cached_tokens: CACHED,
                        output_logprobs: (!told.token_ids.is_empty()).then_some(told),
                        ..Default::default()
                    };
                    vec![$module::GenerateResponse {
                        response: Some(Answer::Chunk(chunk)),
                        ..Default::default()
                    }]
                })
            }

            async fn health_check(
                &self,
                _: Request<$module::HealthCheckRequest>,
            ) -> Result<Response<$module::HealthCheckResponse>, Status> {
                Ok(Response::new($module::HealthCheckResponse {
                    healthy: self.healthy(),
                    message: String::new(),
                }))
            }

            async fn abort(
                &self,
                request: Request<$module::AbortRequest>,
            ) -> Result<Response<$module::AbortResponse>, Status> {
                Player::abort(self, Aborted::ids(request.into_inner()));
                Ok(Response::new($module::AbortResponse::default()))
            }

            async fn get_model_info(
                &self,
                _: Request<$module::GetModelInfoRequest>,
            ) -> Result<Response<$module::GetModelInfoResponse>, Status> {
                let facts = &self.0.facts;
                Ok(Response::new($module::GetModelInfoResponse {
                    is_generation: true,
                    served_model_name: "served".into(),
                    max_context_length: facts.context_length.try_into().unwrap(),
                    vocab_size: facts.vocab_size.try_into().unwrap(),
                    eos_token_ids: vec![facts.end_token.try_into().unwrap()],
                    ..Default::default()
                }))
            }

            async fn get_loads(
                &self,
                _: Request<$module::GetLoadsRequest>,
            ) -> Result<Response<$module::GetLoadsResponse>, Status> {
                let running = self.0.load.load(Ordering::Relaxed);
                Ok(Response::new($module::GetLoadsResponse {
                    loads: vec![$module::SchedulerLoad {
                        num_running_reqs: running.cast_signed(),
                        ..Default::default()
                    }],
                }))
            }

            $($more)*
        }
    };
}

/// A request for a sample, read.
trait Wanted {
    fn asked(self) -> Result<Asked, Status>;
}

/// A request to stop samples.
trait Aborted {
    fn ids(self) -> Vec<String>;
}

impl Aborted for engine::AbortRequest {
    fn ids(self) -> Vec<String> {
        self.request_ids
    }
}

impl Aborted for sglang::AbortRequest {
    fn ids(self) -> Vec<String> {
        assert!(!self.reason.is_empty());
        vec![self.request_id]
    }
}

fn sorted(bias: impl Iterator<Item = (u32, f32)>) -> Vec<(u32, f32)> {
    let mut bias: Vec<_> = bias.collect();
    bias.sort_by_key(|(id, _)| *id);
    bias
}

impl Wanted for engine::GenerateRequest {
    fn asked(self) -> Result<Asked, Status> {
        use engine::{generate_request::Input, sampling_params::Constraint};

        let Some(Input::Tokenized(prompt)) = self.input else {
            return Err(Status::invalid_argument("the prompt is not tokens"));
        };
        let it = self.sampling_params.unwrap();
        // What is zero where it stands for something else would be another request.
        assert!(self.stream && it.n == 1 && it.repetition_penalty == 1.0 && !it.ignore_eos);
        let bias = it.logit_bias.into_iter();
        Ok(Asked {
            id: self.request_id,
            ids: prompt.input_ids,
            temperature: it.temperature.unwrap(),
            top_p: it.top_p,
            top_k: Some(it.top_k).filter(|top| *top > 0),
            seed: it.seed.map(|seed| seed.try_into().unwrap()),
            penalties: (it.presence_penalty, it.frequency_penalty),
            bias: sorted(bias.map(|(id, value)| (id.try_into().unwrap(), value))),
            max_tokens: it.max_tokens.unwrap(),
            end_tokens: it.stop_token_ids,
            logprobs: it.logprobs.map(|top| top.try_into().unwrap()),
            constraint: it.constraint.map(|constraint| match constraint {
                Constraint::JsonSchema(schema) => ("json", schema),
                Constraint::Grammar(text) => ("grammar", text),
                other => panic!("{other:?}"),
            }),
            names: None,
        })
    }
}

impl Wanted for sglang::GenerateRequest {
    fn asked(self) -> Result<Asked, Status> {
        use sglang::sampling_params::Constraint;

        let it = self.sampling_params.unwrap();
        assert!(self.stream && it.n == 1 && it.repetition_penalty == 1.0 && !it.ignore_eos);
        assert!(it.no_stop_trim && it.top_k != 0);
        let bias = it.logit_bias.into_iter();
        let top = self.top_logprobs_num.try_into().unwrap();
        Ok(Asked {
            id: self.request_id,
            ids: self.tokenized.unwrap().input_ids,
            temperature: it.temperature,
            top_p: it.top_p,
            top_k: it.top_k.try_into().ok(),
            seed: None,
            penalties: (it.presence_penalty, it.frequency_penalty),
            bias: sorted(bias.map(|(id, value)| (id.parse().unwrap(), value))),
            max_tokens: it.max_new_tokens.unwrap(),
            end_tokens: it.stop_token_ids,
            logprobs: self.return_logprob.then_some(top),
            constraint: it.constraint.map(|constraint| match constraint {
                Constraint::JsonSchema(schema) => ("json", schema),
                other => panic!("{other:?}"),
            }),
            names: None,
        })
    }
}

chunked!(engine, engine::vllm_engine_server::VllmEngine, {
    async fn get_server_info(
        &self,
        _: Request<engine::GetServerInfoRequest>,
    ) -> Result<Response<engine::GetServerInfoResponse>, Status> {
        Ok(Response::new(engine::GetServerInfoResponse {
            block_size: 16,
            ..Default::default()
        }))
    }
});

chunked!(sglang, sglang::sglang_scheduler_server::SglangScheduler, {});
