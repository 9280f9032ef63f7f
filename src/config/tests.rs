use std::io::Write as _;

use super::*;
use crate::backend::gpu::DialectChoice;

const EXAMPLE: &str = include_str!("../../hotloop.example.toml");

/// A command line with this file.
struct Given {
    file: tempfile::NamedTempFile,
    flags: Flags,
    environment: Vec<(String, String)>,
}

fn file(text: &str) -> Given {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let flags = Flags {
        config: Some(file.path().into()),
        ..Flags::default()
    };
    Given {
        file,
        flags,
        environment: Vec::new(),
    }
}

impl Given {
    fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    fn set(mut self, setting: &str) -> Self {
        self.flags.set.push(setting.into());
        self
    }

    fn load(&self) -> Config {
        Config::load(&self.flags, self.environment.clone()).unwrap()
    }

    /// The error, with `FILE` for the path of the file.
    fn error(&self) -> String {
        let error = Config::load(&self.flags, self.environment.clone()).unwrap_err();
        let path = self.file.path().display().to_string();
        error.to_string().replace(&path, "FILE")
    }
}

#[test]
fn nothing_said_is_the_default() {
    let config = Config::load(&Flags::default(), []).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(file("").load(), Config::default());
    let default = match cfg!(feature = "local") {
        true => "tiny-agent",
        false => "sim-agent",
    };
    assert_eq!(config.default_model().unwrap().name, default);
}

#[test]
#[cfg(feature = "local")]
fn the_example_says_every_key_and_its_default() {
    assert_eq!(file(EXAMPLE).load(), Config::default());
    let example: toml::Table = EXAMPLE.parse().unwrap();
    let all = toml::Table::try_from(Config::default()).unwrap();
    // The keys of a table, or of each table of an array.
    let keys = |value: &toml::Value| -> Vec<Vec<String>> {
        let tables: Vec<_> = match value.as_array() {
            Some(tables) => tables.iter().collect(),
            None => vec![value],
        };
        let keys = tables.iter().map(|it| it.as_table().unwrap().keys());
        keys.map(|keys| keys.cloned().collect()).collect()
    };
    for (section, value) in &all {
        assert_eq!(keys(value), keys(&example[section]), "in [{section}]");
    }
}

#[test]
fn a_flag_wins_over_a_variable_over_the_file_over_the_default() {
    let given = file("[stream]\nlanes_max = 1\nsampling_max = 1\nwaiting_max = 1\n")
        .variable("HOTLOOP_STREAM__SAMPLING_MAX", "2")
        .variable("HOTLOOP_STREAM__WAITING_MAX", "2")
        .set("stream.waiting_max = 1_000");
    let stream = given.load().stream;
    let expected = Stream {
        lanes_max: 1,
        sampling_max: 2,
        waiting_max: 1000,
        ..Stream::default()
    };
    assert_eq!(stream, expected);

    let mut given = file("[server]\nlisten = \"127.0.0.1:1\"\n");
    given = given.variable("HOTLOOP_SERVER__LISTEN", "127.0.0.1:2");
    assert_eq!(given.load().server.listen.port(), 2);
    given.flags.listen = Some("[::1]:3".into());
    assert_eq!(given.load().server.listen.port(), 3);
}

#[test]
fn variables_set_text_and_choices_too() {
    let given = file("")
        .variable("HOTLOOP_LOG__FILTER", "warn,hotloop=debug")
        .variable("HOTLOOP_LOG__FORMAT", "json")
        .variable("HOTLOOP_AUTH__MODE", "off")
        .variable("HOTLOOP_CONFIG", "is for the command line")
        .variable("UNRELATED__KEY", "x");
    let config = given.load();
    assert_eq!(config.log.filter, "warn,hotloop=debug");
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.auth.mode, auth::Mode::Off);
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let error = file("[server]\nlisten = \"127.0.0.1:1\"\n\n[stream]\nlane_max = 5\n").error();
    assert!(
        error.starts_with(
            "FILE:5: stream.lane_max: unknown field `lane_max`, expected one of `age_secs_max`, "
        ),
        "{error}"
    );
    let error = file("\n[sever]\nlisten = \"127.0.0.1:1\"\n").error();
    assert!(
        error.starts_with("FILE:2: sever: unknown field `sever`, expected one of `server`, "),
        "{error}"
    );
    let model = "[[model]]\nname = \"a\"\n[model.sim]\n";
    let error = file(&format!("{model}{model}speed = 1\n")).error();
    assert!(
        error.starts_with("FILE:7: model[1].sim.speed: unknown field `speed`, "),
        "{error}"
    );
}

#[test]
fn a_wrong_type_is_named_with_its_line() {
    assert_eq!(
        file("[cache]\nheads_bytes_max = \"big\"\n").error(),
        "FILE:2: cache.heads_bytes_max: invalid type: string \"big\", expected u64"
    );
    assert_eq!(
        file("server.listen = \"localhost\"\n").error(),
        "FILE:1: server.listen: invalid socket address syntax"
    );
    assert_eq!(
        file("[auth]\nmode = \"maybe\"\n").error(),
        "FILE:2: auth.mode: unknown variant `maybe`, expected one of `auto`, `required`, `off`"
    );
    let error = file("[[model]]\nname = \"a\"\n[[model.gpu]]\nurl = 5\n").error();
    assert_eq!(
        error,
        "FILE:4: model[0].gpu[0].url: invalid type: integer `5`, expected a string"
    );
    let error = file("[server]\nlisten = \n").error();
    assert!(error.starts_with("FILE:2: "), "{error}");
}

#[test]
fn a_secret_in_the_file_is_refused_and_not_repeated() {
    let error = file("[auth]\napi_keys = \"acme:0123456789abcdef\"\n").error();
    assert_eq!(
        error,
        "FILE:2: auth.api_keys: unknown field `api_keys`, expected `mode`"
    );
}

#[test]
fn variables_and_flags_are_named_in_their_errors() {
    for (given, expected) in [
        (
            file("").variable("HOTLOOP_SERVER__LISTNE", "x"),
            "HOTLOOP_SERVER__LISTNE: there is no setting server.listne",
        ),
        (
            file("").variable("HOTLOOP_SERVER__LISTEN", "here"),
            "HOTLOOP_SERVER__LISTEN: invalid socket address syntax",
        ),
        (
            file("").set("stream.lanes_max=many"),
            "--set stream.lanes_max: expected a whole number",
        ),
        (
            file("").set("stream.lanes_max=-1"),
            "--set stream.lanes_max: invalid value: integer `-1`, expected usize",
        ),
        (
            file("").set("lanes_max=1"),
            "--set lanes_max: there is no setting lanes_max",
        ),
        (
            file("").set("stream.lanes_max"),
            "--set stream.lanes_max: expected KEY=VALUE",
        ),
        (
            file("").variable("HOTLOOP_API_KEYS", "acme:short"),
            "HOTLOOP_API_KEYS: the key of pair 1 is not 16 to 256 visible ASCII characters",
        ),
    ] {
        assert_eq!(given.error(), expected);
    }
}

#[test]
fn values_that_cannot_be_are_refused() {
    for (text, expected) in [
        (
            "[server]\npreface_secs_max = 0",
            "server.preface_secs_max is 0, but must be from 1 to 60",
        ),
        (
            "[cache]\nparked_share_per_tenant_percent = 101",
            "cache.parked_share_per_tenant_percent is 101, but must be from 1 to 100",
        ),
        (
            "[request]\nitem_bytes_max = 40000000",
            "request.item_bytes_max is over server.message_bytes_max",
        ),
        (
            "[stream]\nage_secs_max = 30",
            "stream.go_away_secs is not under stream.age_secs_max",
        ),
        (
            "[server]\nlisten = \"0.0.0.0:50051\"",
            "0.0.0.0:50051 is not a loopback address and there are no API keys: set \
             HOTLOOP_API_KEYS=tenant:key, or auth.mode = \"off\" where something else guards the port",
        ),
    ] {
        assert_eq!(file(text).error(), expected);
    }
    let error = file("[log]\nfilter = \"hotloop=loud\"").error();
    assert!(error.starts_with("log.filter: "), "{error}");
}

#[test]
fn every_number_has_a_range_that_holds_its_default() {
    let table = toml::Table::try_from(Config::default()).unwrap();
    let mut numbers: Vec<String> = Vec::new();
    for (section, keys) in &table {
        // It knows its own ranges.
        if section == "routing" {
            continue;
        }
        for (key, value) in keys.as_table().into_iter().flatten() {
            if value.is_integer() {
                numbers.push(format!("{section}.{key}"));
            }
        }
    }
    let mut ranges: Vec<_> = Config::default()
        .ranges()
        .into_iter()
        .map(|it| it.0)
        .collect();
    ranges.sort_unstable();
    numbers.sort_unstable();
    assert_eq!(numbers, ranges);
    Config::default().check().unwrap();
}

#[test]
fn models_are_read_and_exactly_one_is_the_default() {
    let given = file(
        r#"
        [[model]]
        name = "qwen"
        path = "models/qwen"
        context_length = 4096
        fallback = "sim"
        [model.local]
        cache_bytes_max = 1048576
        device = "cpu"
        [[model.gpu]]
        url = "http://a:50051"
        [[model.gpu]]
        url = "http://b:50051"
        dialect = "engine"
        connections = 2
        [[model]]
        name = "sim"
        default = true
        [model.sim]
        rules = "/rules.json"
        tokens_per_second = 0
        [[model]]
        name = "mine"
        path = "/models/mine"
        [[alias]]
        name = "fast"
        to = [{ model = "qwen", weight = 9 }, { model = "mine" }]
        "#,
    );
    let directory = given.file.path().parent().unwrap();
    let qwen = Model {
        context_length: Some(4096),
        path: Some(directory.join("models/qwen")),
        fallback: Some("sim".into()),
        local: Some(Local {
            cache_bytes_max: Some(1 << 20),
            device: DeviceChoice::Cpu,
        }),
        gpu: vec![
            GpuOptions::new("http://a:50051"),
            GpuOptions {
                dialect: DialectChoice::Engine,
                connections: 2,
                ..GpuOptions::new("http://b:50051")
            },
        ],
        ..Model::new("qwen")
    };
    let sim = Model {
        default: true,
        sim: Some(Sim {
            rules: Some("/rules.json".into()),
            tokens_per_second: 0.0,
            first_token_ms: 50,
        }),
        ..Model::new("sim")
    };
    // Where nothing is said, it runs in this process.
    let mine = Model {
        path: Some("/models/mine".into()),
        local: Some(Local::default()),
        ..Model::new("mine")
    };
    let config = given.load();
    assert_eq!(config.models, [qwen, sim.clone(), mine]);
    assert_eq!(config.default_model(), Some(&sim));
    assert_eq!(config.models[0].kinds(), "local, 2 x gpu");
    let target = |model: &str, weight| Target {
        model: model.into(),
        weight,
    };
    let fast = Alias {
        name: "fast".into(),
        to: vec![target("qwen", 9), target("mine", 1)],
    };
    assert_eq!(config.aliases, [fast]);
    let only = file("[[model]]\nname = \"a\"\n[model.sim]\n");
    assert!(only.load().models[0].default);
}

#[test]
fn models_that_cannot_be_are_refused() {
    let model =
        |name: &str, more: &str| format!("[[model]]\nname = \"{name}\"\n{more}\n[model.sim]\n");
    let two = |first: &str, second: &str| file(&(model("a", first) + &model(second, ""))).error();
    let gpu = |more: &str| {
        let text = "[[model]]\nname = \"a\"\npath = \"m\"\n[[model.gpu]]\nurl = \"http://a\"\n";
        file(&format!("{text}{more}\n")).error()
    };
    let alias = |to: &str| {
        let text = model("a", "");
        file(&format!("{text}[[alias]]\nname = \"b\"\nto = [{to}]\n")).error()
    };
    for (error, expected) in [
        (two("", "b"), "none of the models has default = true"),
        (two("default = true", "a"), "two models have the name a"),
        (
            two("default = true", "a b"),
            "the name of a model is not 1 to 128 characters of letters, digits, _ . : / -",
        ),
        (
            two("context_length = 5", "b"),
            "model `a`: context_length is under 256 tokens",
        ),
        (
            two("fallback = \"c\"", "b"),
            "model `a`: fallback: no model has the name c",
        ),
        (
            two("fallback = \"a\"", "b"),
            "model `a`: fallback: it comes back to a",
        ),
        (
            gpu("connections = 0"),
            "model `a`: gpu[0].connections is 0, but must be from 1 to 64",
        ),
        (
            gpu("dialect = \"sglang\"\nconstrained = \"lark\""),
            "model `a`: gpu[0].constrained = \"lark\" is not for dialect = \"sglang\"",
        ),
        (
            file("[[model]]\nname = \"a\"\n[[model.gpu]]\nurl = \"http://a\"").error(),
            "model `a`: path is missing: the directory of the tokenizer and template",
        ),
        (alias(""), "alias `b`: it stands for nothing"),
        (
            alias("{ model = \"c\" }"),
            "alias `b`: to[0]: no model has the name c",
        ),
        (
            alias("{ model = \"a\", weight = 0 }"),
            "alias `b`: to[0].weight is not from 1 to 1000000",
        ),
    ] {
        assert_eq!(error, expected);
    }
}

/// Every configuration that a page shows is one.
#[test]
fn the_pages_show_configurations_that_work() {
    let pages = [
        ("README.md", include_str!("../../README.md"), 1),
        ("gpu.md", include_str!("../../docs/gpu.md"), 1),
        ("cerebras.md", include_str!("../../docs/cerebras.md"), 2),
        ("routing.md", include_str!("../../docs/routing.md"), 1),
        ("local.md", include_str!("../../docs/local.md"), 2),
        ("budgets.md", include_str!("../../docs/budgets.md"), 1),
        ("billing.md", include_str!("../../docs/billing.md"), 4),
        ("safety.md", include_str!("../../docs/safety.md"), 2),
    ];
    for (page, text, count) in pages {
        let blocks = text.split("```toml\n").skip(1);
        let blocks = blocks.map(|it| it.split_once("```").unwrap().0);
        // A file of rules is another kind of file.
        let blocks: Vec<&str> = blocks.filter(|it| !it.starts_with("version = ")).collect();
        assert_eq!(blocks.len(), count, "{page}");
        for block in blocks {
            let given = file(block)
                .variable("CEREBRAS_API_KEY", "csk-1234")
                .variable("OPENAI_API_KEY", "sk-1234")
                .variable("PGPASSWORD", "correct horse");
            let loaded = Config::load(&given.flags, given.environment.clone());
            assert!(loaded.is_ok(), "{page}: {}\n{block}", loaded.unwrap_err());
        }
    }
}

#[test]
fn classifiers_that_cannot_be_are_named() {
    let classifier = |more: &str| {
        file(&format!(
            "[[safety.classifier]]\nname = \"a\"\nkind = \"moderation\"\nurl = \"http://a\"\n{more}"
        ))
    };
    let config = classifier("instructions = \"x\"\nkind_ = 1").error();
    assert!(config.contains("kind_"), "{config}");
    for (more, expected) in [
        ("deadline_ms = 1", "deadline_ms is not from 10 to 60000"),
        (
            "open_ms_max = 10",
            "open_ms_max is not from 1000 to 3600000",
        ),
        ("score_min = 1.5", "score_min is not from 0 to 1"),
        ("instructions = \"x\"", "instructions are for guard alone"),
        (
            "key_variable = \"ABSENT\"",
            "key_variable: the environment has no ABSENT",
        ),
    ] {
        let expected = format!("safety.classifier[0].{expected}");
        assert_eq!(classifier(more).error(), expected);
    }
    let again = "[[safety.classifier]]\nname = \"a\"\nkind = \"guard\"\nurl = \"http://b\"\n";
    let expected = "safety.classifier[1].model is missing, which a guard needs";
    assert_eq!(classifier(again).error(), expected);
    let again = format!("{again}model = \"m\"");
    let expected = "safety.classifier[1].name is that of one before it";
    assert_eq!(classifier(&again).error(), expected);
    let redacts = "[[safety.policy]]\nclassifiers = [\"a\"]\nscopes = { user_input = \"redact\" }";
    let expected = "safety.policy[0].scopes: a classifier judges a text as a whole, so it cannot redact: give it a policy of its own";
    assert_eq!(classifier(redacts).error(), expected);
}

#[test]
fn a_model_on_the_command_line_is_the_default() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny-1b");
    std::fs::create_dir(&path).unwrap();
    let names = |mut given: Given| {
        given.flags.model = Some(path.clone());
        let models = given.load().models;
        models
            .into_iter()
            .map(|model| (model.name, model.default))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(file("")), [("tiny-1b".into(), true)]);
    assert_eq!(
        names(file(
            "[[model]]\nname = \"a\"\ndefault = true\n[model.sim]\n"
        )),
        [("a".into(), false), ("tiny-1b".into(), true)]
    );

    let mut absent = file("");
    absent.flags.model = Some("/nonexistent/model".into());
    assert!(
        absent
            .error()
            .starts_with("--model: cannot find /nonexistent/model: ")
    );
}

#[test]
fn keys_come_from_the_environment_and_are_not_shown() {
    let given = file("[server]\nlisten = \"0.0.0.0:1\"\n")
        .variable("HOTLOOP_API_KEYS", "acme:0123456789abcdef")
        .set("stream.lanes_max=1");
    let config = given.load();
    assert!(config.gate().unwrap().asks_for_keys());
    assert!(!format!("{config:?}").contains("0123456789abcdef"));
    assert!(
        !toml::to_string(&config)
            .unwrap()
            .contains("0123456789abcdef")
    );
}

#[test]
fn sinks_of_usage_are_read_and_held_against_their_ranges() {
    let sink = |more: &str| {
        file(&format!(
            "[billing]\npath = \"journal\"\n[[billing.export]]\nname = \"usage\"\nkind = \"jsonl\"\npath = \"usage.jsonl\"\n{more}"
        ))
    };
    let given = sink("");
    let config = given.load();
    let directory = given.file.path().parent().unwrap();
    assert_eq!(config.billing.path, Some(directory.join("journal")));
    assert_eq!(config.billing.export[0].path, directory.join("usage.jsonl"));
    assert_eq!(config.billing.export[0].attempts_max, 8);

    let again = "[[billing.export]]\nname = \"usage\"\nkind = \"jsonl\"\npath = \"other\"\n";
    let expected = [
        (
            "attempts_max = 0\n",
            "attempts_max is 0, but must be from 1 to 1000",
        ),
        (
            "rest_ms_max = 1\n",
            "rest_ms_max is 1, but must be from 100 to 3600000",
        ),
    ];
    for (more, reason) in expected {
        assert_eq!(sink(more).error(), format!("billing.export[0].{reason}"));
    }
    let kafka = |more: &str| {
        file(&format!(
            "[billing]\npath = \"journal\"\n[[billing.export]]\nname = \"usage\"\nkind = \"kafka\"\n{more}"
        ))
        .variable("KAFKA_PASSWORD", "open sesame")
    };
    let whole = "brokers = [\"a:9092\", \"b:9093\"]\ntopic = \"usage\"\n";
    let user = "user = \"hotloop\"\nkey_variable = \"KAFKA_PASSWORD\"\nsasl = \"plain\"\n";
    let export = &kafka(&format!("{whole}{user}")).load().billing.export[0];
    assert_eq!((export.sasl, export.batch_secs_max), (Sasl::Plain, 30));
    let expected = [
        ("", "brokers are not 1 to 64 addresses"),
        ("brokers = [\"a\"]\n", "brokers: `a` is no host:port"),
        ("brokers = [\":1\"]\n", "brokers: `:1` is no host:port"),
        ("brokers = [\"a:0\"]\n", "brokers: `a:0` is no host:port"),
        (
            "brokers = [\"a:1\"]\ntopic = \"a b\"\n",
            "topic is not 1 to 249 characters of letters, digits, . _ -",
        ),
        (
            &format!("{whole}user = \"hotloop\"\n"),
            "key_variable is missing: it names the password of user",
        ),
        (
            &format!("{whole}key_variable = \"KAFKA_PASSWORD\"\n"),
            "user is missing: key_variable is for its password",
        ),
        (
            &format!("{whole}user = \"hotloop\"\nkey_variable = \"ABSENT\"\n"),
            "key_variable: the environment has no ABSENT",
        ),
        (
            &format!("{whole}batch_secs_max = 0\n"),
            "batch_secs_max is 0, but must be from 1 to 600",
        ),
    ];
    for (more, reason) in expected {
        assert_eq!(kafka(more).error(), format!("billing.export[0].{reason}"));
    }
    let expected = "billing.export[1].name is that of one before it";
    assert_eq!(sink(again).error(), expected);
    let expected = "billing.export[0].name: there is nothing to export without billing.path";
    assert_eq!(sink("").set("billing.path=").error(), expected);
}

#[test]
fn a_database_for_usage_is_named_without_its_password() {
    let sink = |url: &str| {
        file(&format!(
            "[billing]\npath = \"journal\"\n[[billing.export]]\nname = \"all\"\nkind = \"postgres\"\nurl = \"{url}\"\n"
        ))
    };
    for url in [
        "postgres://usage@db.example:5433/billing?sslmode=require",
        "postgresql://usage@%2Frun%2Fpostgresql/billing",
        "postgres://usage@a.example,b.example/billing?target_session_attrs=read-write",
    ] {
        let config = sink(url).load();
        assert_eq!(config.billing.export[0].kind, ExportKind::Postgres);
        assert_eq!(config.billing.export[0].url, url);
    }
    let password = "url holds a password, which comes from the environment alone: key_variable names the variable";
    let expected = [
        ("", "url is no postgres:// address"),
        ("host=db user=usage", "url is no postgres:// address"),
        ("postgres://db.example/billing", "url names no user"),
        ("postgres://usage@/billing", "url names no host"),
        ("postgres://usage@db.example", "url names no database"),
        ("postgres://usage:secret@db.example/billing", password),
        (
            "postgres://usage@db.example/billing?password=secret",
            password,
        ),
        (
            "postgres://usage@db.example/billing?sslmode=verify-full",
            "url cannot be read: invalid connection string: invalid value for option `sslmode`",
        ),
    ];
    for (url, reason) in expected {
        assert_eq!(sink(url).error(), format!("billing.export[0].{reason}"));
    }
    let missing = "billing.export[0].key_variable: the environment has no PGPASSWORD";
    let keyed = "postgres://usage@db.example/billing\"\nkey_variable = \"PGPASSWORD";
    assert_eq!(sink(keyed).error(), missing);
}

#[test]
fn a_window_that_the_journal_does_not_cover_is_refused() {
    let text = |billing: &str, per: &str| {
        format!(
            "[billing]\n{billing}retention_secs = 3600\n[[model]]\nname = \"a\"\n[model.sim]\n\
             [[budget]]\nname = \"b\"\nper = \"{per}\"\nwindow_secs = 3601\ncalls_max = 1\n"
        )
    };
    let journal = "path = \"usage.journal\"\n";
    assert_eq!(
        file(&text(journal, "key")).error(),
        "budget[0]: window_secs 3601 is over billing.retention_secs 3600: a restart would not know what was used"
    );
    // Without a journal nothing is restored, and streams end with the process.
    assert_eq!(file(&text("", "key")).load().budgets.len(), 1);
    assert_eq!(file(&text(journal, "stream")).load().budgets.len(), 1);
}
