//! Classifiers of `hotloop.safety.v1`: a service that people write themselves.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, ClientTlsConfig, Endpoint},
};

use super::{ClassifierOptions, Classify, FINDINGS_MAX, Label, Question, Unjudged};
use crate::event;
use proto::classifier_service_client::ClassifierServiceClient;

/// The messages and the service, for those too who write one.
pub mod proto {
    #![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]

    tonic::include_proto!("hotloop.safety.v1");
}

/// How long a connection may take.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// How often a silent connection is asked whether it still lives, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A service of `hotloop.safety.v1.ClassifierService`.
#[derive(Debug)]
pub struct Service {
    /// Connected when it is first asked.
    channel: Channel,
    authorization: Option<MetadataValue<Ascii>>,
    deadline: Duration,
}

impl Service {
    /// The service that these settings name. To be called in a runtime.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL or the key.
    pub fn new(options: &ClassifierOptions, key: Option<&str>) -> Result<Self, String> {
        let wrong = |error: tonic::transport::Error| format!("url: {error}");
        let mut endpoint = Endpoint::from_shared(options.url.clone())
            .map_err(wrong)?
            .connect_timeout(CONNECT_TIME_MAX)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        if options.url.starts_with("https:") {
            let tls = ClientTlsConfig::new().with_native_roots();
            endpoint = endpoint.tls_config(tls).map_err(wrong)?;
        }
        let authorization = key.map(|key| {
            let value = format!("Bearer {key}").parse();
            let mut value: MetadataValue<Ascii> =
                value.map_err(|_| format!("{}: the key cannot be sent", options.key_variable))?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        });
        Ok(Self {
            channel: endpoint.connect_lazy(),
            authorization: authorization.transpose()?,
            deadline: Duration::from_millis(options.deadline_ms),
        })
    }
}

impl Classify for Service {
    fn classify(&self, question: Arc<Question>) -> BoxFuture<'_, Result<Vec<Label>, Unjudged>> {
        Box::pin(async move {
            let mut request = Request::new(message(&question));
            request.set_timeout(self.deadline);
            if let Some(value) = &self.authorization {
                let metadata = request.metadata_mut();
                metadata.insert("authorization", value.clone());
            }
            let mut client = ClassifierServiceClient::new(self.channel.clone());
            let answer = client.classify(request).await.map_err(unjudged)?;
            let findings = answer.into_inner().findings.into_iter().take(FINDINGS_MAX);
            Ok(findings
                .map(|it| label(it, &question.passage.text))
                .collect())
        })
    }
}

fn message(question: &Question) -> proto::ClassifyRequest {
    let passage = |it: &super::Passage| proto::Passage {
        scope: match it.scope {
            event::Scope::UserInput => proto::Scope::UserInput,
            event::Scope::ToolOutput => proto::Scope::ToolOutput,
            event::Scope::ModelOutput => proto::Scope::ModelOutput,
            event::Scope::Reasoning => proto::Scope::Reasoning,
        }
        .into(),
        text: it.text.to_string(),
    };
    proto::ClassifyRequest {
        passage: Some(passage(&question.passage)),
        context: question.context.iter().map(passage).collect(),
        tenant: question.tenant.as_str().to_owned(),
        model: question.model.to_string(),
    }
}

fn label(finding: proto::Finding, text: &str) -> Label {
    let place = |at: u32| usize::try_from(at).ok();
    // What lies outside of the text, or in the middle of a character, is no place in it.
    let bytes = finding.bytes.and_then(|it| {
        let range = place(it.start)?..place(it.end)?;
        text.get(range.clone()).map(|_| range)
    });
    Label {
        category: finding.category.into(),
        score: finding.score,
        bytes,
    }
}

fn unjudged(status: Status) -> Unjudged {
    let why = format!("it answers {:?}", status.code());
    match status.code() {
        Code::InvalidArgument
        | Code::Unimplemented
        | Code::Unauthenticated
        | Code::PermissionDenied
        | Code::NotFound
        | Code::FailedPrecondition
        | Code::OutOfRange => Unjudged::Refused(why),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Unjudged::Failed(why),
    }
}
