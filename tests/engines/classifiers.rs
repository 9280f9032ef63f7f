//! Classifiers over real sockets: what they are sent, what is made of their answers, and the whole server with one.

use std::sync::{Arc, Mutex};

use hotloop::{
    event::Scope,
    safety::{
        Classifier, ClassifierOptions, Passage, Question, proto as pb,
        proto::classifier_service_server::{ClassifierService, ClassifierServiceServer},
    },
};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::{
    cerebras::fake::{Fake, Play},
    client::{Client, say},
    program::{Serve, reconfigure},
};

fn options(toml: &str) -> ClassifierOptions {
    let options: ClassifierOptions = toml::from_str(&format!("name = \"guard\"\n{toml}")).unwrap();
    options.check().unwrap();
    options
}

fn question() -> Question {
    let passage = |scope, text: &str| Passage {
        scope,
        text: text.into(),
    };
    Question {
        tenant: "acme".into(),
        model: "sim".into(),
        context: vec![
            passage(Scope::ModelOutput, "I look."),
            passage(Scope::UserInput, "Please."),
        ],
        passage: passage(Scope::ToolOutput, "rm -rf /"),
    }
}

/// What it finds, or why not.
async fn judged(classifier: &Classifier) -> String {
    match classifier.judge(question()).await {
        Ok(labels) => {
            let label = |it: &hotloop::safety::Label| {
                let score = it.score.map_or(String::new(), |score| format!(" {score}"));
                let bytes = it.bytes.as_ref();
                let bytes = bytes.map_or(String::new(), |it| format!(" {}..{}", it.start, it.end));
                format!("{}{score}{bytes}", it.category)
            };
            labels.iter().map(label).collect::<Vec<_>>().join(", ")
        }
        Err(why) => why.to_string(),
    }
}

fn answers(body: &'static str) -> Play {
    Play::Status(200, vec![("content-type", "application/json")], body)
}

#[tokio::test]
async fn a_moderation_endpoint_is_sent_the_text_and_what_stands_before_it() {
    let flagged = r#"{"id": "modr-1", "model": "m", "results": [{"flagged": true,
        "categories": {"violence": true, "self-harm/intent": true, "hate": false, "illicit": null},
        "category_scores": {"violence": 0.75, "self-harm/intent": 0.25, "hate": 0.5, "illicit": null}}]}"#;
    let fake = Fake::new([answers(flagged)]).await;
    let toml = format!(
        "kind = \"moderation\"\nurl = \"{}/v1/\"\nmodel = \"m\"",
        fake.url
    );
    let classifier = Classifier::connect(options(&toml), Some("sk-secret")).unwrap();
    assert_eq!(judged(&classifier).await, "self-harm/intent, violence");
    // It was asked that before.
    assert_eq!(judged(&classifier).await, "self-harm/intent, violence");
    let asked = fake.asked();
    assert_eq!(asked.len(), 1);
    assert_eq!(
        (&*asked[0].method, &*asked[0].path),
        ("POST", "/v1/moderations")
    );
    assert_eq!(asked[0].header("authorization"), "Bearer sk-secret");
    assert_eq!(
        asked[0].body,
        json!({"model": "m", "input": "I look.\n\nPlease.\n\nrm -rf /"})
    );
    assert!(!format!("{classifier:?}").contains("sk-secret"));

    // A limit of our own is held against the scores, and only some categories may count.
    for (more, expected) in [
        ("score_min = 0.5", "hate 0.5, violence 0.75"),
        (
            "score_min = 0.5\ncategories = [\"violence\"]",
            "violence 0.75",
        ),
        ("score_min = 0.9", ""),
    ] {
        let fake = Fake::new([answers(flagged)]).await;
        let toml = format!("kind = \"moderation\"\nurl = \"{}\"\n{more}", fake.url);
        let classifier = Classifier::connect(options(&toml), None).unwrap();
        assert_eq!(judged(&classifier).await, expected);
        assert_eq!(fake.asked()[0].path, "/moderations");
    }
}

#[tokio::test]
async fn a_guard_is_shown_the_conversation_in_turns() {
    let said =
        r#"{"choices": [{"message": {"role": "assistant", "content": "\n\nunsafe\nS1,S14"}}]}"#;
    let fake = Fake::new([answers(said)]).await;
    let dir = tempfile::tempdir().unwrap();
    let policy = dir.path().join("policy.md");
    std::fs::write(&policy, "No deletions.").unwrap();
    let toml = format!(
        "kind = \"guard\"\nurl = \"{}/v1\"\nmodel = \"llama-guard\"\ninstructions = {policy:?}",
        fake.url
    );
    let classifier = Classifier::connect(options(&toml), None).unwrap();
    assert_eq!(judged(&classifier).await, "s1, s14");
    let asked = fake.asked();
    assert_eq!(asked[0].path, "/v1/chat/completions");
    assert_eq!(
        asked[0].body,
        json!({
            "model": "llama-guard",
            "messages": [
                {"role": "system", "content": "No deletions."},
                {"role": "user", "content": "(earlier messages are not shown)"},
                {"role": "assistant", "content": "I look."},
                {"role": "user", "content": "Please.\n\nrm -rf /"},
            ],
            "temperature": 0.0,
            "max_tokens": 2048,
            "stream": false,
        })
    );
}

#[tokio::test]
async fn what_fails_is_asked_again_and_what_is_wrong_is_not() {
    let safe = r#"{"results": [{"flagged": false}]}"#;
    let cases: [(Vec<Play>, &str, usize); 6] = [
        (
            vec![Play::Status(503, vec![], "busy"), answers(safe)],
            "",
            2,
        ),
        (
            vec![Play::Status(429, vec![], "{}"), Play::Close, answers(safe)],
            "",
            3,
        ),
        (
            vec![Play::Status(401, vec![], "no")],
            "it answers 401 Unauthorized",
            1,
        ),
        (
            vec![answers("<html>")],
            "its answer is not that of the API that it is to speak",
            1,
        ),
        (
            vec![answers(r#"{"results": []}"#)],
            "its answer has no results",
            1,
        ),
        (vec![Play::Silence], "it said nothing within 400 ms", 1),
    ];
    for (plays, expected, times) in cases {
        let fake = Fake::new(plays).await;
        let toml = format!(
            "kind = \"moderation\"\nurl = \"{}\"\nattempts_max = 3\ndeadline_ms = 400",
            fake.url
        );
        let classifier = Classifier::connect(options(&toml), None).unwrap();
        assert_eq!(judged(&classifier).await, expected);
        assert_eq!(fake.asked().len(), times, "{expected}");
    }
}

/// A service that flags what holds `bad`, and keeps what it was asked.
#[derive(Clone, Default)]
struct Judge {
    asked: Arc<Mutex<Vec<(pb::ClassifyRequest, bool)>>>,
}

#[tonic::async_trait]
impl ClassifierService for Judge {
    async fn classify(
        &self,
        request: Request<pb::ClassifyRequest>,
    ) -> Result<Response<pb::ClassifyResponse>, Status> {
        let metadata = request.metadata();
        let authorized = metadata
            .get("authorization")
            .is_some_and(|it| it == "Bearer k");
        assert!(metadata.contains_key("grpc-timeout"));
        let request = request.into_inner();
        let text = request.passage.clone().unwrap_or_default().text;
        self.asked.lock().unwrap().push((request, authorized));
        let at = text.find("bad").or_else(|| text.find("rm"));
        let finding = at.map(|at| pb::Finding {
            category: "Bad".to_owned(),
            score: Some(0.75),
            bytes: Some(pb::Range {
                start: u32::try_from(at).unwrap(),
                end: u32::try_from(at).unwrap() + 2,
            }),
        });
        Ok(Response::new(pb::ClassifyResponse {
            findings: finding.into_iter().collect(),
        }))
    }
}

impl Judge {
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = tonic::transport::Server::builder()
            .add_service(ClassifierServiceServer::new(self.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(serving);
        url
    }
}

#[tokio::test]
async fn a_service_of_ones_own_says_what_and_where() {
    let judge = Judge::default();
    let toml = format!("kind = \"grpc\"\nurl = \"{}\"", judge.start().await);
    let classifier = Classifier::connect(options(&toml), Some("k")).unwrap();
    assert_eq!(judged(&classifier).await, "bad 0.75 0..2");
    let passage = |scope: pb::Scope, text: &str| pb::Passage {
        scope: scope.into(),
        text: text.to_owned(),
    };
    let expected = pb::ClassifyRequest {
        passage: Some(passage(pb::Scope::ToolOutput, "rm -rf /")),
        context: vec![
            passage(pb::Scope::ModelOutput, "I look."),
            passage(pb::Scope::UserInput, "Please."),
        ],
        tenant: "acme".to_owned(),
        model: "sim".to_owned(),
    };
    assert_eq!(*judge.asked.lock().unwrap(), [(expected, true)]);
    // Nobody listens there.
    let away = "kind = \"grpc\"\nurl = \"http://127.0.0.1:1\"\nattempts_max = 1";
    let classifier = Classifier::connect(options(away), None).unwrap();
    assert_eq!(judged(&classifier).await, "it answers Unavailable");
}

#[tokio::test]
async fn the_server_asks_it_and_a_reload_takes_another_policy() {
    let judge = Judge::default();
    let url = judge.start().await;
    let config = |scopes: &str| {
        format!(
            "[[model]]\nname = \"sim\"\n[model.sim]\ntokens_per_second = 0\nfirst_token_ms = 0\n\
             [[safety.classifier]]\nname = \"judge\"\nkind = \"grpc\"\nurl = \"{url}\"\n\
             [[safety.policy]]\nclassifiers = [\"judge\"]\nscopes = {{ {scopes} }}\n"
        )
    };
    let program = Serve::with_config(&config("user_input = \"refuse\", tool_output = \"off\""))
        .start()
        .await;
    let mut talk = Client::of(&program).await.stream().await;
    let asked = talk.create(say("something bad")).await;
    let error = talk.refusal(&asked).await;
    assert_eq!(error.code, "content_policy_violation");
    assert_eq!(error.param, "create.input[0].message.content");
    assert!(error.message.contains("`judge.bad`"), "{}", error.message);
    talk.answer(say("something good")).await;

    // What is sampled for a refused create is on a record all the same.
    program.says(&["usage end=\"failed\""]).await;

    let observe = config("user_input = \"observe\", tool_output = \"off\"");
    reconfigure(&program, &observe).await;
    program.says(&["the models were read anew"]).await;
    talk.answer(say("something bad again")).await;
    program.says(&["found", "judge.bad", "Observe"]).await;
    // What cannot be changes nothing.
    let unknown = observe.replace("[\"judge\"]", "[\"nobody\"]");
    reconfigure(&program, &unknown).await;
    program
        .says(&["policy[0].classifiers: no classifier has the name `nobody`"])
        .await;
    talk.answer(say("something good")).await;
    talk.close().await;
}
