//! Monitors: what is refused, replaced and told, in input and output, and when history is looked at.

use hotloop::{
    backend::BackendError,
    proto::{Create, Item},
    safety::{Choice, Policies, PolicyOptions, Rules, Scopes},
};

use regex::Regex;

use crate::transcript::{House, Talk, after, held, new, output, still, user, with_tools};

const RULES: &str = r#"
    version = 1
    [[rule]]
    id = "key"
    regex = '\bsk_[a-z0-9]{8}\b'
    [[rule]]
    id = "word"
    literals = ["badword", "bad phrase"]
    [[rule]]
    id = "long"
    regex = '<<[a-z]*>>'
"#;

/// What a model writes to call `step`.
pub fn called(arguments: &str) -> String {
    format!("<tool_call>\n{{\"name\": \"step\", \"arguments\": {arguments}}}\n</tool_call>")
}

/// Reads these lines, with `N` for counts of tokens and `VERSION` for that of a policy.
pub async fn reads(talk: &mut Talk, expected: &str) {
    let counts = Regex::new(r"\b(sampled|tokens|applied|queued) [1-9]\d*").unwrap();
    let versions = Regex::new("policy [0-9a-f]{16}").unwrap();
    let expected: Vec<&str> = expected.trim().lines().map(str::trim).collect();
    let mut read = Vec::new();
    for _ in &expected {
        let line = talk.line().await;
        let line = counts.replace_all(line.trim_end(), "$1 N");
        read.push(versions.replace_all(&line, "policy VERSION").into_owned());
    }
    let (read, expected) = (read.join("\n"), expected.join("\n"));
    assert!(
        read == expected,
        "\n--- read ---\n{read}\n--- expected ---\n{expected}\n"
    );
}

pub const OFF: Scopes = Scopes {
    user_input: Choice::Off,
    tool_output: Choice::Off,
    model_output: Choice::Off,
    reasoning: Choice::Off,
};

pub fn input(choice: Choice) -> Scopes {
    Scopes {
        user_input: choice,
        tool_output: choice,
        ..OFF
    }
}

fn sampled(choice: Choice) -> Scopes {
    Scopes {
        model_output: choice,
        reasoning: choice,
        ..OFF
    }
}

fn policy(scopes: Scopes) -> PolicyOptions {
    PolicyOptions {
        scopes,
        hold_bytes_max: 64,
        ..PolicyOptions::default()
    }
}

fn set(house: &House, policies: impl Into<Vec<PolicyOptions>>) {
    let rules = Rules::parse(RULES).unwrap();
    let policies = Policies::new(rules, Vec::new(), policies.into()).unwrap();
    house.policies.replace(policies);
}

fn open(policies: impl Into<Vec<PolicyOptions>>) -> (House, Talk) {
    let house = House::new();
    set(&house, policies);
    let talk = house.talk("acme");
    (house, talk)
}

#[tokio::test(start_paused = true)]
async fn input_is_refused_by_its_field_and_nothing_is_kept() {
    let (mut house, mut talk) = open([policy(input(Choice::Refuse))]);
    talk.create("a", new([user("Hi"), user("my key is sk_12345678.")]));
    reads(&mut talk, "a error content_policy_violation at create.input[1].message.content, never: the rule `key` of policy VERSION refuses it").await;
    talk.create("b", held(with_tools(new([user("Go")]))));
    house.sample().await.says(&called("{}"));
    reads(
        &mut talk,
        "
        b r1 created sim
        b r1 added 0: fc1 c1 step() …
        b r1 arguments 0: {}
        b r1 item 0: fc1 c1 step({})
        b r1 done awaiting tool_calls open [c1] items [fc1] sampled N in 1
        ",
    )
    .await;
    talk.append("c", "r1", vec![output("c1", "the bad phrase")]);
    reads(&mut talk, "c r1 error content_policy_violation at append.input[0].function_call_output.output, never: the rule `word` of policy VERSION refuses it").await;
    talk.append("d", "r1", vec![output("c1", "the good phrase")]);
    let sample = house.sample().await;
    assert!(sample.text().contains("good phrase") && !sample.text().contains("bad phrase"));
    sample.says("fine");
    assert!(talk.ends("b").await.contains("done completed stop"));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn input_is_replaced_before_the_model_sees_it() {
    let (mut house, mut talk) = open([policy(input(Choice::Redact))]);
    talk.create(
        "a",
        held(with_tools(new([user("éa sk_12345678, sk_1234567")]))),
    );
    let sample = house.sample().await;
    assert!(
        sample.text().contains("éa [redacted:key], sk_1234567<"),
        "{}",
        sample.text()
    );
    sample.says(&called("{\"k\": \"sk_12345678\"}"));
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 redacted key in msg1 4..15
        a r1 added 0: fc1 c1 step() …
        a r1 arguments 0: {\"k\": \"sk_12345678\"}
        a r1 item 0: fc1 c1 step({\"k\": \"sk_12345678\"})
        a r1 done awaiting tool_calls open [c1] items [fc1] sampled N in 1
        ",
    )
    .await;
    talk.append("b", "r1", vec![output("c1", "badword sk_abcdefgh")]);
    reads(
        &mut talk,
        "
        b r1 appended [fco1] applied N
        b r1 redacted word in fco1 0..7
        b r1 redacted key in fco1 8..19
        ",
    )
    .await;
    let sample = house.sample().await;
    assert!(
        sample.text().contains("[redacted:word] [redacted:key]"),
        "{}",
        sample.text()
    );
    sample.says("ok");
    talk.ends("a").await;
    let kept = house.find("acme", &talk.id("r1")).unwrap();
    let kept = format!("{:?}", kept.input);
    assert!(kept.contains("[redacted:key]") && !kept.contains("sk_12345678"));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_observed_changes_nothing_and_waits_for_nothing() {
    let scopes = Scopes {
        model_output: Choice::Observe,
        ..input(Choice::Observe)
    };
    let (mut house, mut talk) = open([policy(scopes)]);
    talk.create("a", new([user("a badword")]));
    let sample = house.sample().await;
    assert!(sample.text().contains("a badword"));
    reads(
        &mut talk,
        "a r1 created sim\na r1 observed word in msg1 2..9",
    )
    .await;
    sample.writes("one bad");
    reads(
        &mut talk,
        "a r1 added 0: msg2 Assistant \"\" …\na r1 text 0: \"one bad\"",
    )
    .await;
    sample.says("word and sk_12345678");
    reads(
        &mut talk,
        "
        a r1 text 0: \"word and sk_12345678\"
        a r1 item 0: msg2 Assistant \"one badword and sk_12345678\"
        a r1 observed word in msg2 4..11 tokens N
        a r1 observed key in msg2 16..27 tokens N
        a r1 done completed stop items [msg2] sampled N in 1
        ",
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn output_is_replaced_across_deltas_and_only_what_may_match_waits() {
    let (mut house, mut talk) = open([policy(sampled(Choice::Redact))]);
    talk.create("a", new([user("Hi")]));
    let sample = house.sample().await;
    sample.writes("A key: sk_");
    reads(
        &mut talk,
        "a r1 created sim\na r1 added 0: msg1 Assistant \"\" …\na r1 text 0: \"A key: \"",
    )
    .await;
    sample.writes("1234").writes("5678");
    talk.silent().await;
    sample.writes(", a bad");
    reads(&mut talk, "a r1 text 0: \"[redacted:key], a \"").await;
    sample.writes(" day, sk_123.");
    reads(&mut talk, "a r1 text 0: \"bad day, sk_123.\"").await;
    sample.says(" badword");
    reads(
        &mut talk,
        "
        a r1 text 0: \" [redacted:word]\"
        a r1 item 0: msg1 Assistant \"A key: [redacted:key], a bad day, sk_123. [redacted:word]\"
        a r1 redacted key in msg1 7..18 tokens N
        a r1 redacted word in msg1 39..46 tokens N
        a r1 done completed stop items [msg1] sampled N in 1
        ",
    )
    .await;
    // The next prompt has what the client saw, not what was sampled.
    talk.create("b", after("r1", [user("Go on")]));
    let sample = house.sample().await;
    assert!(sample.text().contains("A key: [redacted:key], a bad day"));
    assert!(!sample.text().contains("sk_12345678"));
    sample.says("ok");
    talk.ends("b").await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn output_ends_before_what_is_found() {
    for choice in [Choice::End, Choice::Refuse] {
        let (mut house, mut talk) = open([policy(sampled(choice))]);
        talk.create("a", new([user("Hi")]));
        let sample = house.sample().await;
        sample.writes("It is a bad").writes(" phrase, you");
        sample.is_dropped().await;
        reads(
            &mut talk,
            "
            a r1 created sim
            a r1 added 0: msg1 Assistant \"\" …
            a r1 text 0: \"It is a \"
            a r1 item 0: msg1 Assistant \"It is a \" INCOMPLETE
            a r1 ended word in msg1 8..18 tokens N
            a r1 done incomplete (content_filter) content_filter items [msg1] sampled N in 1
            ",
        )
        .await;
        // It can be continued, and its tokens are those that were shown.
        talk.create("b", after("r1", [user("Go on")]));
        let sample = house.sample().await;
        assert!(sample.text().contains("It is a ") && !sample.text().contains("bad"));
        sample.says("ok");
        let end = talk.ends("b").await;
        assert!(end.contains("done completed"), "{end}");
        talk.bye().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_held_back_at_the_end_is_looked_at_too() {
    let (mut house, mut talk) = open([policy(sampled(Choice::End))]);
    talk.create("a", new([user("Hi")]));
    house.sample().await.says("a badword");
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 added 0: msg1 Assistant \"\" …
        a r1 text 0: \"a \"
        a r1 item 0: msg1 Assistant \"a \" INCOMPLETE
        a r1 ended word in msg1 2..9 tokens N
        a r1 done incomplete (content_filter) content_filter items [msg1] sampled N in 1
        ",
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn no_more_is_held_back_than_the_bound() {
    let (mut house, mut talk) = open([policy(sampled(Choice::Redact))]);
    talk.create("a", new([user("Hi")]));
    let sample = house.sample().await;
    let long = "a".repeat(62);
    sample.writes(&format!("<<{long}"));
    reads(
        &mut talk,
        "a r1 created sim\na r1 added 0: msg1 Assistant \"\" …",
    )
    .await;
    talk.silent().await;
    sample.writes("bc");
    reads(&mut talk, "a r1 text 0: \"<<\"").await;
    sample.says(">> end");
    reads(
        &mut talk,
        "
        a r1 text 0: \"aa[redacted:long] end\"
        a r1 item 0: msg1 Assistant \"<<aa[redacted:long] end\"
        a r1 redacted late long in msg1 0..68 tokens N
        a r1 done completed stop items [msg1] sampled N in 1
        ",
    )
    .await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn thoughts_and_calls_are_output() {
    let (mut house, mut talk) = open([policy(sampled(Choice::Redact))]);
    talk.create("a", held(with_tools(new([user("Go")]))));
    let thought = "<think>\nuse sk_12345678 now\n</think>\n\n";
    let sample = house.sample().await;
    sample.says(&format!("{thought}{}", called("{\"k\": \"sk_12345678\"}")));
    reads(
        &mut talk,
        "
        a r1 created sim
        a r1 added 0: rs1 thinks \"\" …
        a r1 thought 0: \"use [redacted:key] now\"
        a r1 item 0: rs1 thinks \"use [redacted:key] now\"
        a r1 redacted key in rs1 4..15 tokens N
        a r1 added 1: fc1 c1 step() …
        a r1 arguments 1: {\"k\": \"[redacted:key]\"}
        a r1 item 1: fc1 c1 step({\"k\": \"[redacted:key]\"})
        a r1 redacted key in fc1 7..18 tokens N
        a r1 done awaiting tool_calls open [c1] items [rs1 fc1] sampled N in 1
        ",
    )
    .await;
    talk.done("b", "r1");
    talk.ends("a").await;

    set(&house, [policy(sampled(Choice::End))]);
    talk.create("c", with_tools(new([user("Go")])));
    house
        .sample()
        .await
        .says(&called("{\"k\": \"sk_12345678\"}"));
    reads(
        &mut talk,
        "
        c r2 created sim
        c r2 added 0: fc2 c2 step() …
        c r2 arguments 0: {\"k\": \"
        c r2 item 0: fc2 c2 step() INCOMPLETE
        c r2 ended key in fc2 7..18 tokens N
        c r2 done incomplete (content_filter) content_filter items [] sampled N in 1
        ",
    )
    .await;
    talk.bye().await;
}

/// A conversation of two responses, `r1` and `r2`, that holds a key.
async fn told(house: &mut House, talk: &mut Talk) {
    talk.create("a", new([user("my key: sk_12345678")]));
    house.sample().await.says("a bad phrase");
    talk.ends("a").await;
    talk.create("b", after("r1", [user("more")]));
    house.sample().await.says("ok");
    talk.ends("b").await;
}

#[tokio::test(start_paused = true)]
async fn history_is_looked_at_once_under_each_policy() {
    let (mut house, mut talk) = open([policy(input(Choice::Observe))]);
    told(&mut house, &mut talk).await;
    // The same policy: only what is new, also in forks.
    for from in ["r2", "r1"] {
        talk.create("c", after(from, [user("new badword")]));
        house.sample().await.says("ok");
        let lines = [talk.line().await, talk.line().await, talk.line().await];
        assert!(
            lines[1].contains(" observed word in ") && !lines[2].contains("observed"),
            "{lines:?}"
        );
        talk.ends("c").await;
    }
    // Another one: all of it, once.
    set(&house, [policy(input(Choice::Redact))]);
    talk.create("d", after("r2", [user("and")]));
    let sample = house.sample().await;
    assert!(
        sample.text().contains("my key: [redacted:key]"),
        "{}",
        sample.text()
    );
    assert!(sample.text().contains("a bad phrase"));
    sample.says("ok");
    reads(
        &mut talk,
        "d r5 created sim after r2\nd r5 redacted key in msg1 8..19",
    )
    .await;
    assert!(talk.ends("d").await.contains("done completed"));
    talk.create("e", after("r5", [user("and")]));
    let sample = house.sample().await;
    assert!(sample.text().contains("my key: [redacted:key]"));
    sample.says("ok");
    reads(
        &mut talk,
        "e r6 created sim after r5\ne r6 added 0: msg9 Assistant \"\" …",
    )
    .await;
    talk.ends("e").await;
    // What must not be continued is not, and is as it was.
    set(&house, [policy(sampled(Choice::Refuse))]);
    talk.create("f", after("r6", [user("and")]));
    reads(&mut talk, "f error content_policy_violation at create.previous_response_id, never: the rule `word` of policy VERSION refuses it").await;
    set(&house, []);
    talk.create("g", after("r2", [user("and")]));
    let sample = house.sample().await;
    assert!(sample.text().contains("my key: sk_12345678"));
    sample.says("ok");
    talk.ends("g").await;
    talk.bye().await;
    house.idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_reconnect_looks_at_nothing_again() {
    let (mut house, mut talk) = open([policy(input(Choice::Observe))]);
    told(&mut house, &mut talk).await;
    let id = talk.id("r2");
    talk.bye().await;
    still().await;
    let mut again = house.talk("acme");
    let known = again.knows(&id);
    again.create("c", after(&known, [user("and")]));
    house.sample().await.says("ok");
    reads(
        &mut again,
        "c r2 created sim after r1\nc r2 added 0: msg1 Assistant \"\" …",
    )
    .await;
    again.ends("c").await;
    again.bye().await;
}

#[tokio::test(start_paused = true)]
async fn policies_are_of_tenants_and_the_strongest_action_holds() {
    let refuse = PolicyOptions {
        tenants: vec!["acme".to_owned()],
        rules: vec!["k*".to_owned()],
        ..policy(input(Choice::Refuse))
    };
    let observe = policy(input(Choice::Observe));
    let (mut house, mut talk) = open([refuse, observe]);
    let create = || -> Create { new(Vec::<Item>::from([user("badword sk_12345678")])) };
    talk.create("a", create());
    let refused = talk.line().await;
    assert!(
        refused.starts_with("a error content_policy_violation at create.input[0]"),
        "{refused}"
    );
    talk.bye().await;
    let mut other = house.talk("other");
    other.create("a", create());
    house.sample().await.says("ok");
    reads(
        &mut other,
        "a r1 created sim\na r1 observed word in msg1 0..7\na r1 observed key in msg1 8..19",
    )
    .await;
    other.ends("a").await;
    other.bye().await;
}

/// The same for one model alone.
fn of_model(model: &str, scopes: Scopes) -> PolicyOptions {
    PolicyOptions {
        models: vec![model.into()],
        ..policy(scopes)
    }
}

/// `sim` is down, and `other` takes over, of which these policies are.
async fn down(policies: impl Into<Vec<PolicyOptions>>) -> (House, Talk) {
    let (mut house, mut talk) = open(policies);
    house.falls_back();
    talk.create("a", held(new([user("my key is sk_12345678.")])));
    let first = house.sample().await;
    // The first one may see it.
    assert!(first.text().contains("my key is sk_12345678."));
    first.fails(BackendError::Unavailable {
        reason: "down".to_owned(),
        retry_after: None,
    });
    (house, talk)
}

#[tokio::test(start_paused = true)]
async fn who_takes_over_sees_what_its_own_policy_lets_through() {
    let (mut house, mut talk) = down([of_model("other", input(Choice::Redact))]).await;
    let second = house.sample().await;
    assert!(second.text().contains("my key is [redacted:key]."));
    assert!(!second.text().contains("sk_12345678"));
    second.says("Thanks for sk_abcdefgh");
    assert!(talk.ends("a").await.contains("done completed stop"));
    // The conversation stays with it, and what was redacted stays so, back at the first model too.
    talk.create("b", after("r1", [user("And?")]));
    let third = house.sample().await;
    assert!(third.text().contains("my key is [redacted:key]."));
    third.says("Fine.");
    assert!(talk.ends("b").await.contains("done completed stop"));
    talk.create(
        "c",
        Create {
            model: Some("sim".into()),
            ..after("r2", [user("So?")])
        },
    );
    let fourth = house.sample().await;
    assert!(fourth.text().contains("my key is [redacted:key]."));
    fourth.says("Yes.");
    assert!(talk.ends("c").await.contains("done completed stop"));
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn who_must_not_see_the_conversation_does_not_take_over() {
    let (mut house, mut talk) = down([of_model("other", input(Choice::Refuse))]).await;
    let end = talk.ends("a").await;
    assert!(end.contains("done failed"), "{end}");
    house.idle().await;
    talk.bye().await;
}

#[tokio::test(start_paused = true)]
async fn output_of_who_takes_over_is_checked_under_its_own_policy() {
    let other = of_model("other", sampled(Choice::End));
    let (mut house, mut talk) = down([of_model("sim", sampled(Choice::Observe)), other]).await;
    house.sample().await.says("It is sk_abcdefgh, and so on");
    let end = talk.ends("a").await;
    assert!(
        end.contains("done incomplete (content_filter) content_filter"),
        "{end}"
    );
    let committed = house.find("acme", &talk.id("r1")).unwrap();
    let kept = format!("{:?}", committed.batches);
    assert!(
        kept.contains("It is ") && !kept.contains("sk_abcdefgh"),
        "{kept}"
    );
    talk.bye().await;
}
