//! The dialect `vllm`: `vllm.Inference` and `vllm.Control`, the first-party gRPC server of vLLM.
//!
//! The definitions are those of the project's own crate. A zero stands for a default there, and some
//! defaults are not what they seem: no `max_new_tokens` means 20, no temperature means greedy.

use prost::Message as _;
use tonic::Status;
use vllm_proto as pb;

use super::{
    Facts, Probe, Started,
    link::Link,
    sample::{Piece, Refusal, logprob},
    wire::Outgoing,
};
use crate::{
    backend::{BackendError, Chunk, Prompt, SampleEnd},
    ledger::IdForm,
};

pub(super) const GENERATE: &str = "/vllm.Inference/GenerateStream";

/// What the engine and its model are.
pub(super) async fn facts(link: &Link) -> Result<Facts, Status> {
    let mut control = pb::control_client::ControlClient::new(link.channel());
    let request = link.request(pb::GetServerInfoRequest {});
    let server = control.get_server_info(request).await?.into_inner();
    let request = link.request(pb::GetModelInfoRequest {});
    let model = control.get_model_info(request).await?.into_inner();
    Ok(Facts {
        model: model.served_model_name,
        version: server.engine_version,
        context_length: Some(server.max_model_len).filter(|tokens| *tokens > 0),
        vocab_size: None,
        end_tokens: Vec::new(),
        block_tokens: Some(server.kv_block_size).filter(|tokens| *tokens > 0),
        takes_tokens: model.supports_token_ids_input,
    })
}

/// How the engine is. It does not tell its load.
pub(super) async fn probe(link: &Link) -> Result<Probe, Status> {
    let mut control = pb::control_client::ControlClient::new(link.channel());
    let asleep = control.is_sleeping(link.request(pb::IsSleepingRequest {}));
    let healthy = match asleep.await {
        Ok(answer) => !answer.into_inner().sleeping,
        // An engine that cannot sleep is awake.
        Err(status) if status.code() == tonic::Code::Unimplemented => true,
        Err(status) => return Err(status),
    };
    Ok(Probe {
        healthy,
        load: None,
    })
}

/// Stops a sample.
pub(super) async fn abort(link: &Link, id: String) -> Result<(), Status> {
    let mut control = pb::control_client::ControlClient::new(link.channel());
    let request_ids = vec![id];
    let request = link.request(pb::AbortRequest { request_ids });
    control.abort(request).await.map(|_| ())
}

/// The request for a sample.
pub(super) fn request(prompt: &Prompt, started: &Started<'_>) -> Outgoing {
    let sampling = &prompt.sampling;
    let request = pb::GenerateRequest {
        request_id: started.id.to_owned(),
        model: started.model.to_owned(),
        temperature: Some(sampling.temperature),
        sampling: Some(pb::RandomSampling {
            top_k: Some(sampling.top_k),
            top_p: Some(sampling.top_p),
            // The sign says nothing: it is 64 bits either way.
            seed: sampling.seed.map(u64::cast_signed),
            ..pb::RandomSampling::default()
        }),
        decoding: Some(pb::DecodingParameters {
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().copied().collect(),
            structured_output: started.constraint.map(|constraint| {
                use pb::decoding_parameters::StructuredOutput;
                match constraint {
                    super::Constraint::Json(schema) => StructuredOutput::Json(schema.to_string()),
                    super::Constraint::Lark(text) => StructuredOutput::Grammar(text.clone()),
                }
            }),
            ..pb::DecodingParameters::default()
        }),
        stopping: Some(pb::StoppingCriteria {
            max_new_tokens: sampling.max_tokens,
            stop_token_ids: sampling.end_tokens.to_vec(),
            ..pb::StoppingCriteria::default()
        }),
        response: Some(pb::ResponseOptions {
            output_text: Some(false),
            output_token_ids: true,
            output_logprobs: sampling.top_logprobs.is_some(),
            output_candidates: sampling.top_logprobs.map(|top| pb::CandidateTokens {
                select: Some(pb::candidate_tokens::Select::TopN(top)),
            }),
            skip_special_tokens: Some(false),
            ..pb::ResponseOptions::default()
        }),
        kv: Some(pb::KvCacheParameters {
            cache_salt: started.salt.to_owned(),
            ..pb::KvCacheParameters::default()
        }),
        session_id: Some(started.session.to_owned()),
        ..pb::GenerateRequest::default()
    };
    Outgoing {
        request: request.encode_to_vec(),
        ids: prompt.tokens.encoded(IdForm::Varint),
        message_field: 4,
        ids_field: 1,
    }
}

impl Piece for pb::GenerateResponse {
    fn into_chunk(self, _: u32) -> Result<Chunk, BackendError> {
        // The first answer tells of the prompt alone.
        let Some(output) = self.outputs else {
            return Ok(Chunk::default());
        };
        let mut candidates = output.candidate_tokens.into_iter();
        let logprobs = output.logprobs.iter().zip(&output.token_ids);
        let logprobs = logprobs.map(|(value, id)| {
            let top = candidates.next().unwrap_or_default().tokens;
            let top = top.into_iter().map(|token| (token.id, token.logprob));
            logprob(*id, *value, top.collect())
        });
        let logprobs = logprobs.collect();
        let mut chunk = Chunk {
            logprobs,
            tokens: output.token_ids,
            ..Chunk::default()
        };
        if let Some(finish) = output.finish_info {
            use pb::finish_info::FinishReason;
            chunk.cached_tokens = finish.num_cached_tokens;
            chunk.finish = match finish.finish_reason() {
                FinishReason::NotFinished => None,
                FinishReason::Length => Some(SampleEnd::Length),
                FinishReason::Stop => Some(SampleEnd::Stop),
                FinishReason::Aborted => return Err(Refusal::Aborted.into()),
            };
        }
        Ok(chunk)
    }
}
