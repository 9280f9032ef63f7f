//! Classifiers: what they are asked and when, what waits for their answers, and what becomes of it.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use hotloop::{
    backend::BackendError,
    event::Scope,
    safety::{
        Choice, Classifier, ClassifierKind, ClassifierOptions, Classify, GateAt, GuardFormat,
        Label, OnFailure, Passage, Policies, PolicyOptions, Question, Rules, Scopes, Unjudged,
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::safety::{OFF, called, input, reads};
use crate::transcript::{House, Plan, Talk, after, held, new, output, still, user, with_tools};

/// A classifier that the test plays.
#[derive(Debug)]
struct Scripted(mpsc::UnboundedSender<Asked>);

/// What it was asked.
struct Asked {
    question: Arc<Question>,
    answer: oneshot::Sender<Result<Vec<Label>, Unjudged>>,
}

impl Classify for Scripted {
    fn classify(&self, question: Arc<Question>) -> BoxFuture<'_, Result<Vec<Label>, Unjudged>> {
        let (answer, answered) = oneshot::channel();
        let _ = self.0.send(Asked { question, answer });
        answered.map(|it| it.unwrap()).boxed()
    }
}

impl Asked {
    fn passes(self) {
        let _ = self.answer.send(Ok(Vec::new()));
    }

    fn flags(self, category: &str) {
        let label = Label {
            category: category.into(),
            score: Some(0.75),
            bytes: None,
        };
        let _ = self.answer.send(Ok(vec![label]));
    }

    fn fails(self) {
        let _ = self
            .answer
            .send(Err(Unjudged::Failed("it is down".to_owned())));
    }

    /// The text in question.
    fn text(&self) -> &str {
        &self.question.passage.text
    }

    /// What stands before it.
    fn context(&self) -> Vec<&str> {
        self.question.context.iter().map(|it| &*it.text).collect()
    }
}

/// The classifier's end that the test holds.
struct Guard(mpsc::UnboundedReceiver<Asked>);

impl Guard {
    async fn asked(&mut self) -> Asked {
        let next = timeout(Duration::from_millis(100), self.0.recv()).await;
        next.expect("the classifier is asked for nothing").unwrap()
    }

    /// Passes whatever comes from now on.
    fn passes_all(mut self) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            while let Some(asked) = self.0.recv().await {
                asked.passes();
            }
        })
    }

    async fn idle(&mut self) {
        still().await;
        assert!(self.0.try_recv().is_err(), "it is asked once more");
    }
}

fn options(name: &str) -> ClassifierOptions {
    ClassifierOptions {
        name: name.to_owned(),
        kind: ClassifierKind::Grpc,
        url: "http://127.0.0.1:1".to_owned(),
        model: String::new(),
        format: GuardFormat::default(),
        instructions: None,
        key_variable: String::new(),
        window_bytes: 64,
        text_bytes_max: 256,
        output_bytes: 64,
        score_min: 0.5,
        categories: Vec::new(),
        deadline_ms: 10_000,
        attempts_max: 1,
        on_failure: OnFailure::Open,
        failures_max: 3,
        open_ms_min: 1_000,
        open_ms_max: 1_000,
        concurrent_max: 8,
        answers_max: 100,
    }
}

fn sampled(choice: Choice) -> Scopes {
    Scopes {
        model_output: choice,
        ..OFF
    }
}

fn policy(scopes: Scopes) -> PolicyOptions {
    PolicyOptions {
        classifiers: vec!["guard".to_owned()],
        scopes,
        hold_bytes_max: 128,
        ..PolicyOptions::default()
    }
}

fn set(house: &House, options: ClassifierOptions, policy: PolicyOptions) -> Guard {
    let (asked, questions) = mpsc::unbounded_channel();
    let classifier = Arc::new(Classifier::new(options, Box::new(Scripted(asked))));
    let policies = Policies::new(Rules::built_in().unwrap(), vec![classifier], vec![policy]);
    house.policies.replace(policies.unwrap());
    Guard(questions)
}

fn open(policy: PolicyOptions) -> (House, Talk, Guard) {
    let house = House::new();
    let guard = set(&house, options("guard"), policy);
    let talk = house.talk("acme");
    (house, talk, guard)
}

#[tokio::test(start_paused = true)]
async fn the_model_samples_at_once_and_the_first_event_waits() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", new([user("Hi"), user("there")]));
    let (first, second) = (guard.asked().await, guard.asked().await);
    assert_eq!((first.text(), second.text()), ("Hi", "there"));
    assert_eq!((first.context(), second.context()), (vec![], vec!["Hi"]));
    assert_eq!(&*first.question.model, "sim");
    assert_eq!(first.question.tenant.as_str(), "acme");
    let sample = house.sample().await;
    sample.writes("Hello").says(", you");
    talk.silent().await;
    second.passes();
    talk.silent().await;
    first.passes();
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 added 0: msg1 Assistant \"\" …
        a r1 text 0: \"Hello, you\"
        a r1 item 0: msg1 Assistant \"Hello, you\"
        a r1 done completed stop items [msg1] sampled N in 1
        ",
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_pass_is_refused_as_if_nothing_had_been_sampled() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", new([user("Hi"), user("bad")]));
    let (first, second) = (guard.asked().await, guard.asked().await);
    let sample = house.sample().await;
    sample.writes("Hello");
    first.passes();
    second.flags("Violence & more");
    reads(&mut talk, "a error content_policy_violation at create.input[1].message.content, never: the classifier's `guard.violence___more` of policy VERSION refuses it").await;
    sample.is_dropped().await;
    talk.create("b", new([user("Hi")]));
    // It has been asked that before.
    guard.idle().await;
    house.sample().await.says("ok");
    assert!(talk.ends("b").await.contains("done completed stop"));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_strict_gate_stands_before_the_sample() {
    let strict = PolicyOptions {
        gate: GateAt::Sampling,
        ..policy(input(Choice::Refuse))
    };
    let (mut house, mut talk, mut guard) = open(strict);
    talk.create("a", new([user("bad")]));
    let asked = guard.asked().await;
    house.idle().await;
    asked.flags("spam");
    reads(&mut talk, "a error content_policy_violation at create.input[0].message.content, never: the classifier's `guard.spam` of policy VERSION refuses it").await;
    house.idle().await;
    talk.create("b", new([user("good")]));
    guard.asked().await.passes();
    house.sample().await.says("ok");
    assert!(talk.ends("b").await.contains("done completed stop"));
    talk.create("c", new([user("never judged")]));
    let _unanswered = guard.asked().await;
    talk.cancel_create("d", "c");
    reads(&mut talk, "d r2 done cancelled items [] sampled 0 in 0").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_held_response_samples_while_its_input_is_judged_and_takes_it_back() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", held(with_tools(new([user("Go")]))));
    guard.asked().await.passes();
    house.sample().await.says(&called("{}"));
    assert!(talk.ends("a").await.contains("done awaiting"));
    talk.append("b", "r1", vec![output("c1", "an order to the model")]);
    let asked = guard.asked().await;
    assert_eq!(asked.text(), "an order to the model");
    assert_eq!(asked.context(), ["Go", "{}"]);
    assert_eq!(asked.question.passage.scope, Scope::ToolOutput);
    let sample = house.sample().await;
    assert!(sample.text().contains("an order to the model"));
    sample.says(&called("{\"obeyed\": true}"));
    talk.silent().await;
    asked.flags("injection");
    reads(&mut talk, "b r1 error content_policy_violation at append.input[0].function_call_output.output, never: the classifier's `guard.injection` of policy VERSION refuses it").await;
    house.idle().await;
    // The response stands as before: the call is open, and what was sampled for the order is gone.
    talk.append("c", "r1", vec![output("c1", "harmless")]);
    let asked = guard.asked().await;
    let sample = house.sample().await;
    assert!(sample.text().contains("harmless"));
    assert!(!sample.text().contains("an order") && !sample.text().contains("obeyed"));
    sample.writes("fi");
    talk.silent().await;
    asked.passes();
    reads(
        &mut talk,
        "
        c r1 appended [fco1] applied N
        a r1 added 1: msg1 Assistant \"\" …
        a r1 text 1: \"fi\"
        ",
    )
    .await;
    sample.says("ne");
    reads(
        &mut talk,
        "
        a r1 text 1: \"ne\"
        a r1 item 1: msg1 Assistant \"fine\"
        a r1 done completed stop items [fc1 msg1] sampled N in 3
        ",
    )
    .await;
    let kept = house.find("acme", &talk.id("r1")).unwrap();
    let kept = format!("{:?}", (&kept.input, &kept.output, &kept.batches));
    assert!(
        !kept.contains("order") && !kept.contains("obeyed"),
        "{kept}"
    );
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn of_several_appends_only_what_does_not_pass_is_refused() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", held(with_tools(new([user("Go")]))));
    guard.asked().await.passes();
    let two = format!("{}\n{}", called("{}"), called("{}"));
    house.sample().await.says(&two);
    assert!(talk.ends("a").await.contains("open [c1 c2]"));
    talk.append("b", "r1", vec![output("c1", "bad")]);
    let first = guard.asked().await;
    house.idle().await;
    talk.append("c", "r1", vec![output("c2", "good")]);
    let second = guard.asked().await;
    let sample = house.sample().await;
    sample.writes("What is sampled meanwhile");
    second.passes();
    talk.silent().await;
    first.flags("spam");
    reads(
        &mut talk,
        "
        b r1 error content_policy_violation at append.input[0].function_call_output.output, never: the classifier's `guard.spam` of policy VERSION refuses it
        c r1 appended [fco1] applied N
        ",
    )
    .await;
    sample.is_dropped().await;
    talk.append("d", "r1", vec![output("c1", "better")]);
    let third = guard.asked().await;
    let sample = house.sample().await;
    third.passes();
    sample.says("fine");
    reads(&mut talk, "d r1 appended [fco2] applied N").await;
    assert!(talk.ends("a").await.contains("done completed stop"));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_breaks_meanwhile_is_asked_again_when_the_input_has_passed() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", held(with_tools(new([user("Go")]))));
    guard.asked().await.passes();
    house.sample().await.says(&called("{}"));
    talk.ends("a").await;
    talk.append("b", "r1", vec![output("c1", "done")]);
    let asked = guard.asked().await;
    let down = BackendError::Unavailable {
        reason: "down".to_owned(),
        retry_after: None,
    };
    house.sample().await.fails(down);
    house.idle().await;
    talk.silent().await;
    asked.passes();
    reads(&mut talk, "b r1 appended [fco1] applied N").await;
    house.sample().await.says("fine");
    let end = talk.ends("a").await;
    assert!(
        end.contains("done completed stop") && end.ends_with("in 2"),
        "{end}"
    );
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn with_a_strict_gate_a_held_response_waits_too() {
    let strict = PolicyOptions {
        gate: GateAt::Sampling,
        ..policy(input(Choice::Refuse))
    };
    let (mut house, mut talk, mut guard) = open(strict);
    talk.create("a", held(with_tools(new([user("Go")]))));
    guard.asked().await.passes();
    house.sample().await.says(&called("{}"));
    talk.ends("a").await;
    talk.append("b", "r1", vec![output("c1", "done")]);
    let asked = guard.asked().await;
    house.idle().await;
    asked.passes();
    reads(&mut talk, "b r1 appended [fco1] applied N").await;
    house.sample().await.says("fine");
    assert!(talk.ends("a").await.contains("done completed stop"));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_cancels_or_leaves_while_an_append_is_judged_has_what_was_before_it() {
    for leaves in [false, true] {
        let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
        talk.create("a", held(with_tools(new([user("Go")]))));
        guard.asked().await.passes();
        house.sample().await.says(&called("{}"));
        talk.ends("a").await;
        talk.append("b", "r1", vec![output("c1", "not judged")]);
        let asked = guard.asked().await;
        let sample = house.sample().await;
        sample.writes("sampled meanwhile");
        still().await;
        let id = talk.id("r1");
        if leaves {
            talk.vanishes().await;
            let kept = house.find("acme", &id).unwrap();
            assert_eq!(kept.open_calls.len(), 1);
            let kept = format!("{:?}", (&kept.input, &kept.output));
            assert!(!kept.contains("not judged") && !kept.contains("meanwhile"));
        } else {
            talk.cancel("c", "r1");
            reads(&mut talk, "c r1 done cancelled tool_calls open [c1] items [fc1] sampled N in 2\nb r1 error response_not_open at append.response_id, never: the response `r1` neither runs nor is held").await;
            assert!(house.find("acme", &id).is_none());
            talk.bye().await;
        }
        sample.is_dropped().await;
        assert!(asked.answer.is_closed(), "it is still asked");
    }
}

#[tokio::test(start_paused = true)]
async fn commands_keep_their_order_while_input_is_judged() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", held(new([user("Go")])));
    guard.asked().await.passes();
    let sample = house.sample().await;
    sample.writes("one");
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 added 0: msg1 Assistant \"\" …
        a r1 text 0: \"one\"
        ",
    )
    .await;
    talk.append("b", "r1", vec![user("more")]);
    talk.append("c", "r1", vec![user("still more")]);
    talk.done("d", "r1");
    let (more, still_more) = (guard.asked().await, guard.asked().await);
    still_more.passes();
    // The sample ends, and the response waits for what may still come.
    sample.says(" two");
    reads(
        &mut talk,
        "
        a r1 text 0: \" two\"
        a r1 item 0: msg1 Assistant \"one two\"
        ",
    )
    .await;
    talk.silent().await;
    more.passes();
    reads(
        &mut talk,
        "
        b r1 appended [msg2] queued N
        c r1 appended [msg3] queued N
        a r1 done completed stop items [msg1] sampled N in 1
        ",
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn output_is_told_piece_by_piece_and_ends_before_what_does_not_pass() {
    for choice in [Choice::End, Choice::Refuse] {
        let (mut house, mut talk, mut guard) = open(policy(sampled(choice)));
        talk.create("a", new([user("Hi")]));
        let sample = house.sample().await;
        let first = "The first piece is as long as what is judged at once, or longer.";
        sample.writes(first);
        reads(&mut talk, "a r1 created sim").await;
        let asked = guard.asked().await;
        assert_eq!((asked.text(), asked.context()), (first, vec!["Hi"]));
        sample.writes(" A second");
        talk.silent().await;
        asked.passes();
        reads(
            &mut talk,
            &format!("a r1 added 0: msg1 Assistant \"\" …\na r1 text 0: \"{first}\""),
        )
        .await;
        // Not enough to be judged.
        talk.silent().await;
        sample.says(" one is bad.");
        let asked = guard.asked().await;
        assert_eq!(asked.text(), " A second one is bad.");
        assert_eq!(asked.context(), [first]);
        talk.silent().await;
        asked.flags("spam");
        reads(
            &mut talk,
            &format!(
                "
                a r1 item 0: msg1 Assistant \"{first}\" INCOMPLETE
                a r1 ended guard.spam in msg1 64..85 tokens N 0.75
                a r1 done incomplete (content_filter) content_filter items [msg1] sampled N in 1
                "
            ),
        )
        .await;
        talk.create("b", after("r1", [user("Go on")]));
        let sample = house.sample().await;
        assert!(sample.text().contains(first) && !sample.text().contains("A second"));
        sample.says("ok");
        guard.asked().await.passes();
        assert!(talk.ends("b").await.contains("done completed stop"));
        talk.bye().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_does_not_pass_was_never_made() {
    let (mut house, mut talk, mut guard) = open(policy(sampled(Choice::End)));
    talk.create("a", held(with_tools(new([user("Go")]))));
    let sample = house.sample().await;
    sample.says(&format!("Well.\n{}", called("{\"path\": \"/\"}")));
    // They came at once, and are one piece.
    let (text, call) = (guard.asked().await, guard.asked().await);
    assert_eq!((text.text(), call.text()), ("Well.", "{\"path\": \"/\"}"));
    text.passes();
    call.flags("destruction");
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 ended guard.destruction in fc1 0..13 tokens N 0.75
        a r1 done incomplete (content_filter) content_filter items [] sampled N in 1
        ",
    )
    .await;
    let kept = house.find("acme", &talk.id("r1")).unwrap();
    assert_eq!((kept.output.len(), kept.open_calls.len()), (0, 0));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn sampling_waits_where_as_much_is_held_back_as_may_be() {
    let (mut house, mut talk, mut guard) = open(policy(sampled(Choice::End)));
    talk.create("a", new([user("Hi")]));
    let sample = house.sample().await;
    for letter in ["a", "b", "c", "d"] {
        sample.writes(&format!("{letter} ").repeat(32));
    }
    let (first, second) = (guard.asked().await, guard.asked().await);
    guard.idle().await;
    assert_eq!(sample.taken(), 2);
    first.passes();
    let third = guard.asked().await;
    guard.idle().await;
    assert_eq!(sample.taken(), 3);
    second.passes();
    third.passes();
    guard.asked().await.passes();
    sample.says("end");
    guard.asked().await.passes();
    assert!(talk.ends("a").await.contains("done completed stop"));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_observed_is_told_when_it_is_known_and_nothing_waits() {
    let scopes = Scopes {
        model_output: Choice::Observe,
        ..input(Choice::Observe)
    };
    let (mut house, mut talk, mut guard) = open(policy(scopes));
    talk.create("a", held(with_tools(new([user("Hi")]))));
    let input = guard.asked().await;
    house.sample().await.says(&called("{}"));
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 added 0: fc1 c1 step() …
        a r1 arguments 0: {}
        a r1 item 0: fc1 c1 step({})
        a r1 done awaiting tool_calls open [c1] items [fc1] sampled N in 1
        ",
    )
    .await;
    input.flags("spam");
    guard.asked().await.flags("rm");
    talk.append("b", "r1", vec![output("c1", "done")]);
    guard.asked().await.passes();
    reads(&mut talk, "b r1 appended [fco1] applied N").await;
    house.sample().await.says("fine");
    let asked = guard.asked().await;
    assert_eq!(asked.text(), "fine");
    reads(
        &mut talk,
        "
        a r1 added 1: msg1 Assistant \"\" …
        a r1 text 1: \"fine\"
        a r1 item 1: msg1 Assistant \"fine\"
        a r1 observed guard.spam in msg2 0..2 0.75
        a r1 observed guard.rm in fc1 0..2 tokens N 0.75
        a r1 done completed stop items [fc1 msg1] sampled N in 2
        ",
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_classifier_that_fails_lets_pass_or_not_as_it_is_configured() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", new([user("Hi")]));
    guard.asked().await.fails();
    house.sample().await.says("ok");
    reads(
        &mut talk,
        "a r1 created sim\na r1 observed guard.unavailable in msg1 0..2",
    )
    .await;
    talk.ends("a").await;
    talk.bye().await;

    let closed = ClassifierOptions {
        on_failure: OnFailure::Closed,
        attempts_max: 2,
        ..options("guard")
    };
    let mut guard = set(&house, closed.clone(), policy(input(Choice::Refuse)));
    let mut talk = house.talk("acme");
    talk.create("a", new([user("Hi")]));
    let _sample = house.sample().await;
    guard.asked().await.fails();
    // It is asked again.
    guard.asked().await.fails();
    reads(&mut talk, "a error backend_unavailable at create.input[0].message.content, safe: the classifier `guard` could not judge it: it is down").await;
    // Silence is failure, too, and the third in a row: it is left alone for a while.
    talk.create("b", new([user("Hi")]));
    let _sample = house.sample().await;
    let _silent = guard.asked().await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    reads(&mut talk, "b error backend_unavailable at create.input[0].message.content, safe: the classifier `guard` could not judge it: it said nothing within 10000 ms").await;
    talk.create("c", new([user("Hi")]));
    reads(&mut talk, "c error backend_unavailable at create.input[0].message.content, safe: the classifier `guard` could not judge it: it failed too often, and is left alone for a while").await;
    guard.idle().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    talk.create("d", new([user("Hi")]));
    guard.asked().await.passes();
    // That of `c` was begun too, before it was known that nobody judges its input.
    let _sample = house.sample().await;
    house.sample().await.says("ok");
    assert!(talk.ends("d").await.contains("done completed stop"));
    talk.bye().await;

    // Output that cannot be judged does not leave either.
    let mut guard = set(
        &house,
        ClassifierOptions {
            attempts_max: 1,
            ..closed
        },
        policy(sampled(Choice::End)),
    );
    let mut talk = house.talk("acme");
    talk.create("a", new([user("Hi")]));
    house.sample().await.says("ok");
    guard.asked().await.fails();
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 ended guard.unavailable in msg1 0..2 tokens N
        a r1 done incomplete (content_filter) content_filter items [] sampled N in 1
        ",
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn the_past_is_asked_about_once_under_each_policy() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", new([user("one")]));
    guard.asked().await.passes();
    house.sample().await.says("ok");
    talk.ends("a").await;
    // A continuation and a fork: only what is new.
    for text in ["two", "three"] {
        talk.create("b", after("r1", [user(text)]));
        let asked = guard.asked().await;
        assert_eq!((asked.text(), asked.context()), (text, vec!["one", "ok"]));
        asked.passes();
        house.sample().await.says("ok");
        talk.ends("b").await;
    }
    guard.idle().await;
    // Another policy: all of it, and it may refuse.
    let scopes = Scopes {
        model_output: Choice::Refuse,
        ..input(Choice::Refuse)
    };
    let mut guard = set(&house, options("guard"), policy(scopes));
    talk.create("c", after("r2", [user("four")]));
    let _sample = house.sample().await;
    let mut texts = Vec::new();
    for _ in 0..5 {
        let asked = guard.asked().await;
        texts.push(asked.text().to_owned());
        match asked.text() {
            "two" => asked.flags("spam"),
            _ => asked.passes(),
        }
    }
    texts.sort();
    assert_eq!(texts, ["four", "ok", "ok", "one", "two"]);
    reads(&mut talk, "c error content_policy_violation at create.previous_response_id, never: the classifier's `guard.spam` of policy VERSION refuses it").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn a_long_item_is_judged_in_pieces_with_what_stands_before_each() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    let long = format!("{}{}", "é".repeat(150), "b".repeat(100));
    talk.create("a", new([user(&long)]));
    let (first, second) = (guard.asked().await, guard.asked().await);
    assert_eq!(first.text(), "é".repeat(128));
    assert_eq!(
        second.text(),
        format!("{}{}", "é".repeat(22), "b".repeat(100))
    );
    assert_eq!(second.context(), ["é".repeat(32)]);
    assert_eq!(
        second.question.context[0],
        Passage {
            scope: Scope::UserInput,
            text: "é".repeat(32).into()
        }
    );
    first.passes();
    second.passes();
    house.sample().await.says("ok");
    talk.ends("a").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_or_cancels_while_it_is_judged_keeps_nothing_unjudged() {
    let (mut house, mut talk, mut guard) = open(policy(input(Choice::Refuse)));
    talk.create("a", new([user("Hi")]));
    let asked = guard.asked().await;
    let sample = house.sample().await;
    sample.writes("Hello");
    still().await;
    talk.cancel_create("b", "a");
    reads(&mut talk, "b r1 done cancelled items [] sampled N in 1").await;
    sample.is_dropped().await;
    assert!(asked.answer.is_closed(), "it is still asked");
    talk.bye().await;

    let mut guard = set(&house, options("guard"), policy(sampled(Choice::End)));
    let mut talk = house.talk("acme");
    talk.create("a", new([user("Hi")]));
    let sample = house.sample().await;
    let first = "The first piece is as long as what is judged at once, or longer.";
    sample.writes(first);
    guard.asked().await.passes();
    reads(
        &mut talk,
        &format!("a r1 created sim\na r1 added 0: msg1 Assistant \"\" …\na r1 text 0: \"{first}\""),
    )
    .await;
    sample.writes(" And this was not judged.");
    still().await;
    let id = talk.id("r1");
    talk.vanishes().await;
    let kept = house.find("acme", &id).unwrap();
    let kept = format!("{:?}", kept.output);
    assert!(
        kept.contains(first) && !kept.contains("not judged"),
        "{kept}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_engine_prefills_what_came_while_other_input_is_missing() {
    let mut house = House::built(Plan {
        prefill: true,
        ..Plan::default()
    });
    let guard = set(&house, options("guard"), policy(input(Choice::Refuse)));
    let passing = guard.passes_all();
    let mut talk = house.talk("acme");
    talk.create("a", held(with_tools(new([user("Go")]))));
    let two = format!("{}\n{}", called("{}"), called("{}"));
    house.sample().await.says(&two);
    talk.ends("a").await;
    talk.append("b", "r1", vec![output("c1", "first")]);
    reads(&mut talk, "b r1 appended [fco1] applied N").await;
    assert!(house.prefill().await.text().contains("first"));
    talk.append("c", "r1", vec![output("c2", "second")]);
    house.sample().await.says("ok");
    assert!(talk.ends("a").await.contains("done completed"));
    talk.bye().await;
    passing.abort();
}
