//! The dialect `sglang`: `sglang.grpc.scheduler.SglangScheduler`, what SGLang offers with `--grpc-mode`.
//!
//! Chunks hold what is new; the message behind the last one says why the sample ended. Errors are statuses.

use prost::Message as _;
use tonic::Status;

use super::{
    Constraint, Facts, Probe, Started,
    link::Link,
    proto::sglang as pb,
    sample::{self, whole},
    wire::Outgoing,
};
use crate::{
    backend::{BackendError, Prompt},
    ledger::IdForm,
};

pub(super) const GENERATE: &str = "/sglang.grpc.scheduler.SglangScheduler/Generate";

/// All tokens, where vLLM says 0.
const ALL_TOKENS: i32 = -1;

type Client = pb::sglang_scheduler_client::SglangSchedulerClient<tonic::transport::Channel>;

/// What the engine and its model are.
pub(super) async fn facts(link: &Link) -> Result<Facts, Status> {
    let request = link.request(pb::GetModelInfoRequest {});
    let model = Client::new(link.channel()).get_model_info(request).await?;
    let model = model.into_inner();
    let positive = |number: i32| whole(&[number]).pop().filter(|number| *number > 0);
    Ok(Facts {
        model: model.served_model_name,
        version: String::new(),
        context_length: positive(model.max_context_length),
        vocab_size: positive(model.vocab_size),
        end_tokens: whole(&model.eos_token_ids),
        block_tokens: None,
        takes_tokens: model.is_generation,
    })
}

/// How the engine is.
pub(super) async fn probe(link: &Link) -> Result<Probe, Status> {
    let mut client = Client::new(link.channel());
    let request = link.request(pb::HealthCheckRequest {});
    let healthy = client.health_check(request).await?.into_inner().healthy;
    let request = link.request(pb::GetLoadsRequest::default());
    let loads = client.get_loads(request).await.ok();
    let load = loads.map(|answer| {
        let loads = answer.into_inner().loads.into_iter();
        let samples = loads.flat_map(|load| [load.num_running_reqs, load.num_waiting_reqs]);
        whole(&samples.collect::<Vec<_>>()).iter().sum()
    });
    Ok(Probe { healthy, load })
}

/// Stops a sample.
pub(super) async fn abort(link: &Link, id: String) -> Result<(), Status> {
    let request = link.request(pb::AbortRequest {
        request_id: id,
        reason: "the client does not want it any more".to_owned(),
    });
    Client::new(link.channel()).abort(request).await.map(|_| ())
}

/// The request for a sample. The interface has no seed: one that is asked for is refused.
pub(super) fn request(prompt: &Prompt, started: &Started<'_>) -> Result<Outgoing, BackendError> {
    use pb::sampling_params::Constraint as Wire;

    let sampling = &prompt.sampling;
    let refuse = |reason: &str| {
        Err(BackendError::Refused {
            reason: reason.to_owned(),
        })
    };
    if sampling.seed.is_some() {
        return refuse("SGLang's gRPC interface takes no seed");
    }
    let constraint = match started.constraint {
        None => None,
        Some(Constraint::Json(schema)) => Some(Wire::JsonSchema(schema.to_string())),
        Some(Constraint::Lark(_)) => {
            return refuse("SGLang's gRPC interface takes no Lark grammar");
        }
    };
    let bias = sampling.logit_bias.iter();
    let request = pb::GenerateRequest {
        request_id: started.id.to_owned(),
        sampling_params: Some(pb::SamplingParams {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: match sampling.top_k {
                0 => ALL_TOKENS,
                some => i32::try_from(some).unwrap_or(ALL_TOKENS),
            },
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            repetition_penalty: 1.0,
            max_new_tokens: Some(sampling.max_tokens),
            stop_token_ids: sampling.end_tokens.to_vec(),
            // The tokens are ours to read: nothing is to be taken off their end.
            no_stop_trim: true,
            n: 1,
            constraint,
            logit_bias: bias.map(|(id, value)| (id.to_string(), *value)).collect(),
            ..pb::SamplingParams::default()
        }),
        return_logprob: sampling.top_logprobs.is_some(),
        // Of the prompt none.
        logprob_start_len: -1,
        top_logprobs_num: sampling.top_logprobs.map_or(0, u32::cast_signed),
        stream: true,
        ..pb::GenerateRequest::default()
    };
    Ok(Outgoing {
        request: request.encode_to_vec(),
        ids: prompt.tokens.encoded(IdForm::Varint),
        message_field: 2,
        ids_field: 2,
    })
}

sample::chunks_and_an_end!(pb);
