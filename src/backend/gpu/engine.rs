//! The dialect `engine`: `vllm.grpc.engine.VllmEngine`, what `vllm serve --grpc` offers.
//!
//! Chunks hold what is new; the message behind the last one says why the sample ended and repeats that chunk.

use prost::Message as _;
use tonic::Status;

use super::{
    Constraint, Facts, Probe, Started,
    link::Link,
    proto::engine as pb,
    sample::{self, whole},
    wire::Outgoing,
};
use crate::{backend::Prompt, ledger::IdForm};

pub(super) const GENERATE: &str = "/vllm.grpc.engine.VllmEngine/Generate";

type Client = pb::vllm_engine_client::VllmEngineClient<tonic::transport::Channel>;

/// What the engine and its model are.
pub(super) async fn facts(link: &Link) -> Result<Facts, Status> {
    let mut client = Client::new(link.channel());
    let request = link.request(pb::GetModelInfoRequest {});
    let model = client.get_model_info(request).await?.into_inner();
    let request = link.request(pb::GetServerInfoRequest {});
    let server = client.get_server_info(request).await?.into_inner();
    Ok(Facts {
        model: model.served_model_name,
        version: server.server_type,
        context_length: Some(model.max_context_length).filter(|tokens| *tokens > 0),
        vocab_size: Some(model.vocab_size).filter(|tokens| *tokens > 0),
        end_tokens: whole(&model.eos_token_ids),
        block_tokens: whole(&[server.block_size])
            .pop()
            .filter(|tokens| *tokens > 0),
        takes_tokens: model.is_generation,
    })
}

/// How the engine is.
pub(super) async fn probe(link: &Link) -> Result<Probe, Status> {
    let mut client = Client::new(link.channel());
    let request = link.request(pb::HealthCheckRequest {});
    let healthy = client.health_check(request).await?.into_inner().healthy;
    let loads = client
        .get_loads(link.request(pb::GetLoadsRequest::default()))
        .await;
    let load = loads.ok().map(|answer| {
        let loads = answer.into_inner().loads.into_iter();
        let samples = loads.flat_map(|load| [load.num_running_reqs, load.num_waiting_reqs]);
        whole(&samples.collect::<Vec<_>>()).iter().sum()
    });
    Ok(Probe { healthy, load })
}

/// Stops a sample.
pub(super) async fn abort(link: &Link, id: String) -> Result<(), Status> {
    let request_ids = vec![id];
    let request = link.request(pb::AbortRequest { request_ids });
    Client::new(link.channel()).abort(request).await.map(|_| ())
}

/// The request for a sample.
pub(super) fn request(prompt: &Prompt, started: &Started<'_>) -> Outgoing {
    use pb::sampling_params::Constraint as Wire;

    let sampling = &prompt.sampling;
    let bias = sampling.logit_bias.iter();
    let request = pb::GenerateRequest {
        request_id: started.id.to_owned(),
        sampling_params: Some(pb::SamplingParams {
            temperature: Some(sampling.temperature),
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            repetition_penalty: 1.0,
            max_tokens: Some(sampling.max_tokens),
            stop_token_ids: sampling.end_tokens.to_vec(),
            n: 1,
            constraint: started.constraint.map(|constraint| match constraint {
                Constraint::Json(schema) => Wire::JsonSchema(schema.to_string()),
                Constraint::Lark(text) => Wire::Grammar(text.clone()),
            }),
            logprobs: sampling.top_logprobs.map(u32::cast_signed),
            seed: sampling.seed.map(sample::signed_seed),
            logit_bias: bias.map(|(id, value)| (id.cast_signed(), *value)).collect(),
            ..pb::SamplingParams::default()
        }),
        stream: true,
        ..pb::GenerateRequest::default()
    };
    Outgoing {
        request: request.encode_to_vec(),
        ids: prompt.tokens.encoded(IdForm::Varint),
        message_field: 2,
        ids_field: 2,
    }
}

sample::chunks_and_an_end!(pb);
