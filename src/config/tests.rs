use std::io::Write as _;

use super::*;

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
    let model = "[[model]]\nname = \"a\"\nbackend = \"sim\"\n";
    let error = file(&format!("{model}{model}speed = 1\n")).error();
    assert!(
        error.starts_with("FILE:7: model[1].speed: unknown field `speed`, "),
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
    assert_eq!(
        file("\n[[model]]\nname = \"a\"\nbackend = \"local\"\nrules = \"r\"\n").error(),
        "FILE:2: model[0]: rules is only for backend = \"sim\""
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
        backend = "local"
        path = "models/qwen"
        context_length = 4096
        cache_bytes_max = 1048576
        device = "cpu"
        [[model]]
        name = "sim"
        default = true
        backend = "sim"
        rules = "/rules.json"
        tokens_per_second = 0
        "#,
    );
    let directory = given.file.path().parent().unwrap();
    let qwen = Model {
        name: "qwen".into(),
        default: false,
        family: None,
        context_length: Some(4096),
        engine: Engine::Local {
            path: Some(directory.join("models/qwen")),
            cache_bytes_max: Some(1 << 20),
            device: DeviceChoice::Cpu,
        },
    };
    let sim = Model {
        name: "sim".into(),
        default: true,
        family: None,
        context_length: None,
        engine: Engine::Sim {
            path: None,
            rules: Some("/rules.json".into()),
            tokens_per_second: 0.0,
            first_token_ms: 50,
        },
    };
    let config = given.load();
    assert_eq!(config.models, [qwen, sim.clone()]);
    assert_eq!(config.default_model(), Some(&sim));

    let two = |first: &str, second: &str| {
        let model = |name: &str, more: &str| {
            format!("[[model]]\nname = \"{name}\"\nbackend = \"sim\"\n{more}\n")
        };
        file(&(model("a", first) + &model(second, ""))).error()
    };
    assert_eq!(two("", "b"), "none of the models has default = true");
    assert_eq!(two("default = true", "a"), "two models have the name a");
    assert_eq!(
        two("cache_bytes_max = 1", "b"),
        "FILE:1: model[0]: cache_bytes_max is only for backend = \"local\""
    );
    assert_eq!(
        two("device = \"cpu\"", "b"),
        "FILE:1: model[0]: device is only for backend = \"local\""
    );
    let only = file("[[model]]\nname = \"a\"\nbackend = \"sim\"\n");
    assert!(only.load().models[0].default);
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
            "[[model]]\nname = \"a\"\nbackend = \"sim\"\ndefault = true\n"
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
