//! Conversations through the repository's own templates: what a model sampled comes back byte for byte.

use std::sync::atomic::{AtomicUsize, Ordering};

use jiff::civil::date;

use super::*;

const HERMES: &str = include_str!("../../tests/templates/chatml_tools.jinja");
const SIM: &str = include_str!("../../models/sim/chat_template.jinja");
const STRIPPING: &str = include_str!("../../tests/templates/chatml_strip_reasoning.jinja");
const LLAMA: &str = include_str!("../../tests/templates/llama3.jinja");
const MISTRAL: &str = include_str!("../../tests/templates/mistral.jinja");
const HARMONY: &str = include_str!("../../tests/templates/harmony.jinja");
const PHI: &str = include_str!("../../tests/templates/phi_like.jinja");

/// Arguments as models write them and no serialiser would.
const ODD_ARGUMENTS: [&str; 10] = [
    r#"{"city":"Oslo"}"#,
    r#"{ "b" : 1 ,  "a":[1,2 , 3] }"#,
    "{\n  \"city\": \"Oslo\"\n}",
    r#"{"n": 1.0, "m": 1, "big": 123456789012345678901234567890123456789012345, "e": 1E5, "z": -0}"#,
    r#"{"text": "\u00e9\/\ud83d\ude00 é"}"#,
    r#"{"a": 1, "a": 2}"#,
    r#"{"a": {"b": { "c":null}}}"#,
    r#"{"half": "\ud800"}"#,
    "{}",
    r#"{"broken": "#,
];

fn specials() -> SpecialTokens {
    SpecialTokens {
        bos: Some("<s>".into()),
        eos: Some("</s>".into()),
        ..SpecialTokens::default()
    }
}

fn template(source: &str) -> Template {
    Template::new(source, specials()).unwrap()
}

fn render(source: &str, messages: &[Message]) -> Result<String, TemplateError> {
    render_with(&template(source), messages, None, true)
}

fn render_with(
    template: &Template,
    messages: &[Message],
    tools: Option<&ToolsValue>,
    add_generation_prompt: bool,
) -> Result<String, TemplateError> {
    let now = date(2025, 3, 9).at(8, 5, 0, 0);
    template.render(&RenderInput {
        messages: Arc::new(messages.to_vec()),
        tools,
        add_generation_prompt,
        now,
        kwargs: &[],
    })
}

/// What `source` prints for a single user message "x".
fn print(source: &str) -> String {
    render(source, &[Message::text("user", "x")]).unwrap()
}

/// What `source` prints when `args` are the arguments of a call.
fn print_arguments(source: &str, args: &str) -> String {
    let source =
        format!("{{%- set args = messages[0].tool_calls[0].function.arguments %}}{source}");
    render(&source, &[called(args)]).unwrap()
}

fn called(arguments: &str) -> Message {
    Message::assistant::<&str>(
        None,
        None,
        &[Call {
            id: "abcdefghi",
            name: "f",
            arguments: arguments.into(),
        }],
    )
}

fn weather() -> ToolsValue {
    let parameters =
        r#"{"type":"object","properties":{"city":{"type":"string"}},"required":["city"],"x":1E2}"#;
    ToolsValue::new(&[ToolDef {
        name: "weather",
        description: Some("Tells it."),
        parameters,
    }])
    .unwrap()
}

#[test]
fn sampled_calls_come_back_byte_for_byte() {
    for arguments in ODD_ARGUMENTS {
        let families = [
            (
                SIM,
                format!(
                    "<tool_call>\n{{\"name\": \"f\", \"arguments\": {arguments}}}\n</tool_call><|im_end|>"
                ),
            ),
            (
                HERMES,
                format!(
                    "<tool_call>\n{{\"name\": \"f\", \"arguments\": {arguments}}}\n</tool_call><|im_end|>"
                ),
            ),
            (
                STRIPPING,
                format!(
                    "<tool_call>\n{{\"name\": \"f\", \"arguments\": {arguments}}}\n</tool_call><|im_end|>"
                ),
            ),
            (
                LLAMA,
                format!(r#"{{"name": "f", "parameters": {arguments}}}<|eot_id|>"#),
            ),
            (
                MISTRAL,
                format!(
                    r#"[TOOL_CALLS][{{"name": "f", "arguments": {arguments}, "id": "abcdefghi"}}]</s>"#
                ),
            ),
            (
                HARMONY,
                format!(
                    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{arguments}<|call|>"
                ),
            ),
            (
                PHI,
                format!(
                    r#"<|tool_call|>[{{"name": "f", "arguments": {arguments}}}]<|/tool_call|><|end|>"#
                ),
            ),
        ];
        for (source, sampled) in families {
            let template = template(source);
            let mut messages = vec![Message::text("user", "What now?")];
            let prompt = render_with(&template, &messages, None, true).unwrap();
            messages.push(called(arguments));
            messages.push(Message::tool_output("abcdefghi", "f", "done"));
            let next = render_with(&template, &messages, None, true).unwrap();
            assert_eq!(
                next.get(..prompt.len()),
                Some(&*prompt),
                "the prompt stands"
            );
            assert_eq!(
                next[prompt.len()..].get(..sampled.len()),
                Some(&*sampled),
                "and then what was sampled"
            );
        }
    }
}

#[test]
fn reasoning_and_text_come_back_where_a_template_keeps_them() {
    let turn = [
        Message::text("user", "Hi"),
        Message::assistant(
            Some("They greet."),
            Some("Hello"),
            &[Call {
                id: "abcdefghi",
                name: "f",
                arguments: "{}".into(),
            }],
        ),
        Message::tool_output("abcdefghi", "f", "done"),
    ];
    let hermes = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nThey greet.\n</think>\n\nHello\n\
        <tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call><|im_end|>\n\
        <|im_start|>user\n<tool_response>\ndone\n</tool_response><|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(
        [SIM, HERMES, STRIPPING].map(|source| render(source, &turn).unwrap()),
        [hermes; 3]
    );

    let harmony = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>They greet.<|end|>\
        <|start|>assistant<|channel|>commentary<|message|>Hello<|end|><|start|>assistant<|channel|>commentary \
        to=functions.f <|constrain|>json<|message|>{}<|call|><|start|>functions.f to=assistant<|channel|>commentary\
        <|message|>\"done\"<|end|><|start|>assistant";
    assert!(render(HARMONY, &turn).unwrap().ends_with(harmony));
}

#[test]
fn arguments_are_a_mapping_to_templates_that_look_inside() {
    let args =
        r#"{"city": "Oslo",  "items": [1,  {"deep" :2}], "n": 1E5, "ok": true, "none": null}"#;
    let each = "{% for key, value in args.items() %}{{ key }}={{ value }};{% endfor %}";
    assert_eq!(
        print_arguments(each, args),
        "city=Oslo;items=[1, {'deep': 2}];n=1E5;ok=True;none=None;"
    );
    assert_eq!(
        print_arguments(&each.replace("args.items()", "args|items"), args),
        print_arguments(each, args)
    );
    let looks = "{{ args is mapping }} {{ args is string }} {{ args|length }} {{ args.city }} {{ args['items'][1].deep }} \
        {{ 'n' in args }} {{ args.get('x', 7) }} {{ args.absent is defined }} {{ args.keys()|join(',') }} {{ args.n is string }}";
    assert_eq!(
        print_arguments(looks, args),
        "True False 5 Oslo 2 True 7 False city,items,n,ok,none False"
    );
    assert_eq!(
        print_arguments("{{ args }}|{{ args|string }}|{{ 'a' ~ args }}", "{ }"),
        "{ }|{ }|a{ }"
    );
    let truth = "{{ 'full' if args else 'empty' }}";
    assert_eq!(
        ["{ }", r#"{"a": 1}"#, "[1", ""].map(|args| print_arguments(truth, args)),
        ["empty", "full", "full", "empty"]
    );
}

#[test]
fn arguments_print_verbatim_at_any_depth_unless_another_layout_is_asked_for() {
    let args = r#"{"b":{"y":1,"x":1E5},"a":"é"}"#;
    let message = Message::assistant(
        None,
        Some("é"),
        &[Call {
            id: "i",
            name: "f",
            arguments: args.into(),
        }],
    );
    let whole = render("{{ messages | tojson }}", &[message]).unwrap();
    assert_eq!(
        whole,
        format!(
            r#"[{{"role": "assistant", "content": "é", "tool_calls": [{{"id": "i", "type": "function", "function": {{"name": "f", "arguments": {args}}}}}]}}]"#
        )
    );
    assert_eq!(
        print_arguments("{{ args.b | tojson }}", args),
        r#"{"y":1,"x":1E5}"#
    );
    assert_eq!(
        print_arguments("{{ args | tojson(sort_keys=true) }}", args),
        r#"{"a": "é", "b": {"x": 1E5, "y": 1}}"#
    );
    assert_eq!(
        print_arguments("{{ args | tojson(indent=2) }}", args),
        "{\n  \"b\": {\n    \"y\": 1,\n    \"x\": 1E5\n  },\n  \"a\": \"é\"\n}"
    );
    assert_eq!(
        print_arguments("{{ args | tojson(indent=2) }}", "{oops"),
        "{oops"
    );
}

#[test]
fn a_template_gets_calls_in_the_form_it_prints() {
    let deepseek = "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}\
        {{ '```json\n' + m.tool_calls[0].function.arguments + '\n```' }}\
        {% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}";
    let text_only = "{% for m in messages if m.tool_calls %}{{ '' + m.tool_calls[0].function.arguments }}{% endfor %}";
    let tagged = "{% for m in messages if m.tool_calls %}{% for k, v in m.tool_calls[0].function.arguments.items() %}\
        <{{ k }}>{{ v }}</{{ k }}>{% endfor %}{% endfor %}";
    let both = "{% for m in messages if m.tool_calls %}{% set a = m.tool_calls[0].function.arguments %}\
        {% if a is string %}{{ a }}{% else %}{% for k, v in a | items %}{{ k ~ ':' ~ v }}{% endfor %}{% endif %}\
        {% endfor %}";
    let wants_none =
        "{% for m in messages if m.content is none %}{{ m.tool_calls | tojson }}{% endfor %}";
    let form = |arguments, silence| CallForm { arguments, silence };
    let sources = [
        deepseek,
        text_only,
        tagged,
        both,
        wants_none,
        HERMES,
        MISTRAL,
        HARMONY,
        "no messages at all",
    ];
    assert_eq!(
        sources.map(|source| template(source).form),
        [
            form(Arguments::Text, Silence::None),
            form(Arguments::Text, Silence::Empty),
            form(Arguments::Mapping, Silence::Empty),
            form(Arguments::Mapping, Silence::Empty),
            form(Arguments::Mapping, Silence::None),
            form(Arguments::Mapping, Silence::Empty),
            form(Arguments::Mapping, Silence::Empty),
            form(Arguments::Mapping, Silence::Empty),
            form(Arguments::Mapping, Silence::Empty),
        ]
    );
    assert_eq!(
        render(deepseek, &[called("{\"a\":1}")]).unwrap(),
        "```json\n{\"a\":1}\n```"
    );
}

#[test]
fn schemas_print_as_python_prints_them() {
    let tools = ToolsValue::new(&[ToolDef {
        name: "f",
        description: None,
        parameters: r#"{"b":1E2,"a":[-0,1e16,1e-7,123456789012345678901234567890123456789012345,0.10,1e999],"b":2,"s":"\u00e9\/\u007f\n"}"#,
    }])
    .unwrap();
    let source = "{{ tools | tojson }}\n{{ tools[0] | tojson(separators=(',', ':'), ensure_ascii=true) }}\n\
        {{ tools[0].function.parameters.a | join(' ') }}\n";
    let template = template(source);
    let expected = r#"[{"type": "function", "function": {"name": "f", "parameters": {"b": 2, "a": [0, 1e+16, 1e-07, 123456789012345678901234567890123456789012345, 0.1, Infinity], "s": "é/"#
        .to_owned()
        + "\u{7f}\\n\"}}}]\n"
        + r#"{"type":"function","function":{"name":"f","parameters":{"b":2,"a":[0,1e+16,1e-07,123456789012345678901234567890123456789012345,0.1,Infinity],"s":"\u00e9/\u007f\n"}}}"#
        + "\n0 1e+16 1e-07 123456789012345678901234567890123456789012345 0.1 Infinity";
    // The second render copies what the first has written.
    assert_eq!(
        [(); 2].map(|()| render_with(&template, &[], Some(&tools), false).unwrap()),
        [expected.clone(), expected]
    );
}

#[test]
fn a_schema_that_is_no_json_names_its_tool() {
    let deep = "[".repeat(200) + &"]".repeat(200);
    for parameters in ["{", "", "{} {}", &deep, r#""\ud800""#] {
        let good = ToolDef {
            name: "f",
            description: None,
            parameters: "{}",
        };
        let error = ToolsValue::new(&[good, ToolDef { parameters, ..good }]).unwrap_err();
        assert_eq!(error, TemplateError::Parameters { index: 1 });
    }
}

#[test]
fn deeply_nested_arguments_are_printed_but_not_descended_into() {
    let deep = "{\"a\":".repeat(50_000) + "1" + &"}".repeat(50_000);
    assert_eq!(print_arguments("{{ args | tojson }}", &deep), deep);
    // Each of these would recurse through all levels.
    assert!(print_arguments("{{ args.a }}", &deep).starts_with("{'a': {'a': {'a': "));
    assert!(
        print_arguments("{{ args | tojson(indent=0) }}", &deep).starts_with("{\n\"a\": {\n\"a\": ")
    );
    assert_eq!(print_arguments("{{ args.a == args.a.a }}", &deep), "False");
}

#[test]
fn errors_carry_their_line() {
    let error = |source: &str| render(source, &[Message::text("user", "secret")]).unwrap_err();
    let Err(syntax) = Template::new("one\r\ntwo\r\n{% if x %}", specials()) else {
        panic!("it is no template")
    };
    assert!(
        matches!(&syntax, TemplateError::Syntax { line: 3, detail } if !detail.is_empty()),
        "{syntax}"
    );
    assert_eq!(
        error("one\ntwo {{ messages[0].content.nope() }}"),
        TemplateError::Failed {
            line: 2,
            detail: "unknown method: string has no method named nope".into()
        }
    );
    assert_eq!(
        error("\n\n{{ absent.attribute }}"),
        TemplateError::Failed {
            line: 3,
            detail: "undefined value".into()
        }
    );
    assert_eq!(
        error("\n{{ absent | tojson }}"),
        TemplateError::Failed {
            line: 2,
            detail: "could not serialize to value".into()
        }
    );
}

#[test]
fn what_the_template_raises_is_a_refusal_however_deep() {
    let source = "{% macro check(role) %}{% if role != 'system' %}{{ raise_exception('no ' + role) }}{% endif %}{% endmacro %}\
        {% set text %}{{ check(messages[0].role) }}{% endset %}{{ text }}";
    let refusal = render(source, &[Message::text("user", "x")]).unwrap_err();
    assert_eq!(refusal, TemplateError::Refused("no user".into()));
    assert_eq!(
        refusal.to_string(),
        "the chat template refuses this conversation: no user"
    );
}

#[test]
fn python_and_minijinja_agree_where_they_would_part() {
    assert_eq!(
        print(
            "{{ none is iterable }} {{ 'a' is iterable }} {{ absent is iterable }} {{ 1 is iterable }}"
        ),
        "False True True False"
    );
    assert_eq!(
        print("{{ 'a' is sequence }} {{ {} is sequence }} {{ none is sequence }}"),
        "True True False"
    );
    assert_eq!(
        print(
            r#"{{ "\x1c a\x1f \xa0"|trim }}|{{ "\x1c a\x1f".strip() }}|{{ "\x1c a\x1f".lstrip() }}"#
        ),
        "a|a|a\x1f"
    );
    assert_eq!(
        print(
            r#"{{ "a\x1cb  c".split() }} {{ "a\r\nb\x0bc\n".splitlines() }} {{ "\x1c ".isspace() }}"#
        ),
        "['a', 'b', 'c'] ['a', 'b', 'c'] True"
    );
    assert_eq!(
        print("{{ 'a/b/c'.rsplit('/', 1) }} {{ 'a/b'.partition('/') }} {{ 'ab'.rpartition('/') }}"),
        "['a/b', 'c'] ['a', '/', 'b'] ['', '', 'ab']"
    );
    assert_eq!(
        print("{{ 'ab'.removeprefix('a') }}{{ 'ab'.removesuffix('x') }}{{ 'xx'.strip('x') }}"),
        "bab"
    );
    assert_eq!(
        print("{{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a', none] }} {{ {'a': 1} }}"),
        "True None 1.0 [1, 'a', None] {'a': 1}"
    );
    assert_eq!(
        print("{{ messages[0] }} {{ messages }}"),
        "{'role': 'user', 'content': 'x'} [{'role': 'user', 'content': 'x'}]"
    );
    assert_eq!(
        print(
            "{{ tools is none }} {{ documents is none }} {{ pad_token is defined }} {{ bos_token }}"
        ),
        "True True False <s>"
    );
}

#[test]
fn line_ends_and_generation_blocks_are_read_as_jinja2_reads_them() {
    assert_eq!(
        print("a\r\nb\rc{% if true %}\r\nd\r\n  {%- endif %}\r\n"),
        "a\nb\ncd"
    );
    let source = "{%- set x = 1 %}\n  {% generation %}\nA{% set x = 2 %}{{ x }}\n  {%- endgeneration -%}\n B{{ x }}{%generation-%} C{%+ endgeneration+%}\n";
    assert_eq!(print(source), "A2B1C");
}

#[test]
fn the_clock_stands_still() {
    assert_eq!(
        print("{{ strftime_now('%d %b %Y, %A %-d %B %H:%M %Q') }}"),
        "09 Mar 2025, Sunday 9 March 08:05 %Q"
    );
}

#[test]
fn special_tokens_and_templates_are_found_in_the_configuration() {
    let config = serde_json::json!({
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    });
    assert_eq!(SpecialTokens::from_config(&config), specials());
    assert_eq!(source_in_config(&config), Some("D"));
    assert_eq!(
        source_in_config(&serde_json::json!({"chat_template": "S"})),
        Some("S")
    );
    assert_eq!(source_in_config(&serde_json::json!({})), None);
}

#[test]
fn switches_a_template_does_not_read_are_not_mentioned() {
    let mentioned = |source: &str| {
        ["tools", "enable_thinking", "reasoning_effort", "message"]
            .map(|name| template(source).mentions(name))
    };
    assert_eq!(mentioned(STRIPPING), [true, true, false, false]);
    assert_eq!(mentioned(HARMONY), [true, false, true, false]);
    assert_eq!(mentioned(SIM), [true, false, false, false]);
}

#[test]
fn switches_reach_the_template() {
    let kwargs = [
        ("enable_thinking", KwargValue::Flag(false)),
        ("bos_token", KwargValue::Text("B".into())),
        ("n", KwargValue::Number(3)),
    ];
    let now = date(2025, 3, 9).at(0, 0, 0, 0);
    let messages = [Message::text("user", "Hi")];
    let input = RenderInput {
        messages: Arc::new(messages.to_vec()),
        tools: None,
        add_generation_prompt: true,
        now,
        kwargs: &kwargs,
    };
    assert!(
        template(STRIPPING)
            .render(&input)
            .unwrap()
            .ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    );
    assert_eq!(
        template("{{ bos_token }}{{ n + 1 }}")
            .render(&input)
            .unwrap(),
        "B4"
    );
}

#[test]
fn the_probe_tells_which_appends_are_stable() {
    let both = Appends {
        tool_outputs: true,
        user_messages: true,
    };
    let steps_only = Appends {
        tool_outputs: true,
        user_messages: false,
    };
    let probed = [SIM, HERMES, LLAMA, PHI, STRIPPING, HARMONY, MISTRAL]
        .map(|source| template(source).probe());
    // Mistral writes the tools before the last user message, and the system text into it only while it is the last of
    // all: that of a step's prompt is gone from the next.
    let never = Appends {
        tool_outputs: false,
        user_messages: false,
    };
    assert_eq!(
        probed,
        [both, both, both, both, steps_only, steps_only, never]
    );
    let counts = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | default([]) | tojson }}{% endfor %}";
    let refuses = "{{ raise_exception('no') }}";
    assert_eq!(
        [counts, refuses].map(|source| template(source).probe()),
        [never, never]
    );
}

#[test]
fn the_fingerprint_covers_source_and_special_tokens() {
    let base = template(SIM).fingerprint();
    assert_eq!(base, template(SIM).fingerprint());
    let empty_pad = SpecialTokens {
        pad: Some(String::new()),
        ..specials()
    };
    let others = [
        template(HERMES).fingerprint(),
        Template::new(SIM, empty_pad).unwrap().fingerprint(),
    ];
    assert!(!others.contains(&base));
    assert_eq!(
        (template(SIM).source(), template(SIM).size_bytes()),
        (SIM, SIM.len())
    );
}

#[test]
fn a_tool_is_what_transformers_makes_of_a_function() {
    let tools = weather();
    let text = render_with(
        &template("{{ tools[0] | tojson }}"),
        &[],
        Some(&tools),
        false,
    )
    .unwrap();
    assert_eq!(
        text,
        r#"{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "x": 100.0}}}"#
    );
}

#[test]
fn templates_and_messages_cross_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<(Template, Message, ToolsValue)>();
}

/// A conversation that counts how often it is asked for a message.
#[derive(Debug)]
struct Counted {
    messages: Vec<Message>,
    asked: Arc<AtomicUsize>,
}

impl Messages for Counted {
    fn len(&self) -> usize {
        self.messages.len()
    }

    fn get(&self, at: usize) -> Option<Message> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.messages.as_slice().get(at).cloned()
    }
}

/// Renders a conversation as it grows message by message, each time on from the last one, and compares that with a
/// rendering from the start. Returns how often messages were asked for, by length.
fn grows(source: &str, messages: &[Message]) -> Vec<usize> {
    let template = template(source);
    let mut growing = probe::Growing::default();
    let mut counts = Vec::new();
    for len in 1..=messages.len() {
        let asked = Arc::new(AtomicUsize::new(0));
        let conversation = Counted {
            messages: messages[..len].to_vec(),
            asked: asked.clone(),
        };
        let input = RenderInput {
            messages: Arc::new(conversation),
            tools: None,
            add_generation_prompt: true,
            now: date(2025, 3, 9).at(8, 5, 0, 0),
            kwargs: &[],
        };
        let text = growing.render(&template, &input);
        counts.push(asked.load(Ordering::Relaxed));
        assert_eq!(
            text,
            template.render(&input),
            "{source}\nwith {len} messages"
        );
    }
    counts
}

/// A conversation with a system message, calls and outputs, and no user message but the first.
fn agentic(steps: usize) -> Vec<Message> {
    let mut messages = vec![
        Message::text("system", "Be brief."),
        Message::text("user", "Do it."),
    ];
    for step in 0..steps {
        messages.push(called(&format!(r#"{{"step": {step}}}"#)));
        messages.push(Message::tool_output(
            "abcdefghi",
            "f",
            format!("output {step}"),
        ));
    }
    messages
}

#[test]
fn rendering_goes_on_where_the_past_stays_as_it_is() {
    let flat = [
        SIM,
        LLAMA,
        PHI,
        "{% for message in messages %}{{ message.content }}{{ loop.index }}{{ loop.first }}{{ loop.last }}{% endfor %}",
        "{% for message in messages[1:] -%}\n {{ loop.previtem.role }}{{ loop.nextitem.role }} \n{% endfor %}!",
        // What a round passes on to the next.
        "{% set ns = namespace(n=0, last='') %}{% for message in messages %}{{ ns.n }}{{ ns.last }}\
            {% set ns.n = ns.n + 1 %}{% if message.role == 'tool' %}{% set ns.last = message.content %}{% endif %}{% endfor %}",
        "{% set ns = namespace(seen=none) %}{% for message in messages %}{{ ns.seen.role }}{% set ns.seen = message %}{% endfor %}",
        "{%- macro show(message) %}[{{ message.role }}{{ bos_token }}]{% endmacro -%}\n\
            {%- for message in messages %}{{ show(message) }}{%- endfor -%}\n",
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}\
            {% else %}{% set rest = messages %}{% endif %}\
            {% for message in rest %}{% if loop.index0 > 0 and rest[loop.index0 - 1].role == 'tool' %}+{% endif %}\
            {{ message.role }}{% if loop.last or rest[loop.index0 + 1].role != 'tool' %}.{% endif %}{% endfor %}",
        // Loops of their own inside.
        "{% for message in messages %}{% for call in message.tool_calls %}{{ loop.index }}{{ loop.last }}\
            {% if loop.first %}{% break %}{% endif %}{% endfor %}{{ loop.index0 }}{% endfor %}{{ messages | length }}",
        "{% for message in messages %}{% if message.role == 'user' %}{% continue %}{% endif %}{{ message.role }}{% endfor %}",
    ];
    for source in flat {
        let counts = grows(source, &agentic(40));
        let (early, late) = (&counts[20..22], &counts[80..82]);
        assert_eq!(early, late, "{source}");
    }
    // It looks for a system message in all of them, and goes on all the same.
    assert!(template(HERMES).resumes());
    grows(HERMES, &agentic(20));
}

#[test]
fn rendering_starts_anew_where_the_past_may_change() {
    let sources = [
        STRIPPING,
        MISTRAL,
        HARMONY,
        "{% for message in messages %}{{ loop.length }}{{ message.role }}{% endfor %}",
        "{% for message in messages %}{{ loop.revindex }}{% endfor %}",
        "{% for message in messages %}{{ messages | length }}{% endfor %}",
        "{% for message in messages %}{{ messages[-1].role }}{% endfor %}",
        "{% for message in messages %}{% if messages[9] %}*{% endif %}{{ message.role }}{% endfor %}",
        "{% for message in messages %}{{ messages[loop.index:] | length }}{% endfor %}",
        "{% for message in messages %}{% if message in messages[3:] %}x{% endif %}{% endfor %}",
        "{% for message in messages %}{{ loop.changed(message.role) }}{{ loop.cycle(1, 2) }}{% endfor %}",
        "{% for message in messages %}{% if loop.index0 == 3 %}{% break %}{% endif %}{{ message.role }}{% endfor %}",
        "{% for message in messages %}{{ message.role }}{% else %}none{% endfor %}",
        "{% for message in messages if message.role == 'tool' %}{{ loop.index }}{% endfor %}",
        "{% set count = messages | length %}{% for message in messages %}{{ count }}{% endfor %}",
        "{% set ns = namespace(n=messages | length) %}{% for message in messages %}{{ ns.n }}{% endfor %}",
        "{{ messages | length }}{% for message in messages %}{{ message.role }}{% endfor %}",
        "{% set tools_seen = messages | selectattr('role', 'equalto', 'tool') | list %}\
            {% for message in messages %}{{ message in tools_seen }}{% endfor %}",
        "{% if messages | length > 4 %}{% set rest = messages | reject('none') %}{% else %}{% set rest = messages %}{% endif %}\
            {% for message in rest %}{{ loop.index }}{{ loop.last }}{% endfor %}",
        "{% set ns = namespace(it=none) %}{% for message in messages %}{{ ns.it | list | length }}\
            {% set ns.it = messages | reverse %}{% endfor %}",
        "{% set rest = messages | list %}{% for message in rest %}{{ loop.last }}{% endfor %}",
        // Namespaces that hold what cannot be carried over.
        "{% set ns = namespace(all=none) %}{% for message in messages %}{{ ns.all | length }}{% set ns.all = messages %}{% endfor %}",
        "{% set ns = namespace(all=none) %}{% for message in messages %}{{ ns.all is none }}\
            {% if loop.index0 == 6 %}{% set ns.all = messages %}{% endif %}{% endfor %}",
        "{% set ns = namespace(in=none) %}{% for message in messages %}{{ ns.in.n }}\
            {% set ns.in = namespace(n=loop.index) %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% macro count() %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endmacro %}\
            {% for message in messages %}{{ count() }}{% endfor %}",
        "{% if messages[0].role == 'system' %}{% set ns = namespace(n=0) %}{% endif %}\
            {% for message in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
        "{% set c = cycler('a', 'b') %}{% for message in messages %}{{ c.next() }}{% endfor %}",
        "{% set _hot = 1 %}{% for message in messages %}{{ _hot }}{% endfor %}",
    ];
    for source in sources {
        grows(source, &agentic(10));
    }
    // Two loops, of which one is gone on with.
    grows(
        "{% for message in messages %}{{ loop.index }}{% endfor %}{% for m in messages %}{{ loop.last }}{% endfor %}",
        &agentic(10),
    );
}
