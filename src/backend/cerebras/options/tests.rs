use super::*;

fn parsed(toml: &str) -> CerebrasOptions {
    toml::from_str(&format!("model = \"m\"\n{toml}")).unwrap()
}

fn refused(toml: &str) -> String {
    parsed(toml).check().unwrap_err().to_string()
}

#[test]
fn what_stands_in_a_file_is_read_and_written_again() {
    let options = parsed(
        "prompt = \"tokens\"\nbody = \"msgpack\"\ndialect = \"vllm\"\ntop_k = \"send\"\n\
         [headers]\nx-team = \"a\"\n[extra]\nmin_p = 0.1\nchat_template_kwargs = { thinking = true }",
    );
    options.check().unwrap();
    let text = toml::to_string(&options).unwrap();
    assert_eq!(toml::from_str::<CerebrasOptions>(&text).unwrap(), options);
    parsed("dialect = \"openai\"\nextra = { reasoning_format = \"raw\" }")
        .check()
        .unwrap();
    assert!(toml::from_str::<CerebrasOptions>("modle = \"m\"").is_err());
    assert!(CerebrasOptions::default().check().is_err());
}

#[test]
fn each_setting_out_of_its_range_is_named() {
    for (toml, message) in [
        ("url = \"ftp://a\"", "url: is no http or https URL"),
        (
            "url = \"https://a:b@c\"",
            "url: holds a user or password: secrets are for the environment",
        ),
        ("url = \"https://a?b=c\"", "url: has a query or a fragment"),
        ("connect_ms = 0", "connect_ms: 0 is not 1 to 120000"),
        ("idle_ms = 3600001", "idle_ms: 3600001 is not 1 to 3600000"),
        (
            "body = \"msgpack\"",
            "body: \"msgpack\" is for prompt = \"tokens\": messages are kept as JSON",
        ),
        (
            "prompt = \"tokens\"\ndialect = \"openai\"",
            "prompt: \"tokens\" takes a dialect whose answers have tokens: \"cerebras\" or \"vllm\"",
        ),
        (
            "extra = { messages = [] }",
            "extra: messages is set elsewhere",
        ),
        (
            "extra = { reasoning_format = \"raw\" }",
            "extra: reasoning_format is set elsewhere",
        ),
        (
            "headers = { Authorization = \"x\" }",
            "headers: authorization cannot be set",
        ),
        (
            "headers = { \"a b\" = \"x\" }",
            "headers: an entry is no HTTP header, or too long",
        ),
        (
            "key_variable = \"a-b\"",
            "key_variable: is no name of an environment variable of at most 128 bytes",
        ),
        (
            "service_tier = \"flex or not\"",
            "service_tier: is no word of at most 32 letters",
        ),
    ] {
        assert_eq!(refused(toml), message, "{toml}");
    }
}

#[test]
fn a_url_may_end_in_the_version() {
    for url in [
        "https://a.example/openai",
        "https://a.example/openai/",
        "https://a.example/openai/v1/",
    ] {
        let options = parsed(&format!("url = \"{url}\""));
        assert_eq!(options.base().unwrap(), "https://a.example/openai");
    }
}

const DOCUMENT: &str = include_str!("../../../../docs/cerebras.md");

#[test]
fn the_models_of_the_document_are_ones() {
    let blocks = DOCUMENT.split("```toml\n").skip(1);
    let mut models = 0;
    for block in blocks {
        let (toml, _) = block.split_once("```").unwrap();
        let file: toml::Table = toml::from_str(toml).unwrap();
        for model in file["model"].as_array().unwrap() {
            for service in model["cerebras"].as_array().unwrap() {
                let options: CerebrasOptions = service.clone().try_into().unwrap();
                options.check().unwrap();
                models += 1;
            }
        }
    }
    assert_eq!(models, 2);
}

#[test]
fn the_document_names_each_setting_with_its_default() {
    let options = CerebrasOptions {
        queue_threshold_ms: Some(1),
        service_tier: Some(String::new()),
        ..CerebrasOptions::default()
    };
    for (key, value) in toml::Table::try_from(&options).unwrap() {
        let value = match (&*key, &value) {
            ("model", _) => String::new(),
            ("queue_threshold_ms" | "service_tier" | "headers" | "extra", _) => "none".into(),
            (_, toml::Value::String(text)) => format!("`{text}`"),
            (_, toml::Value::Boolean(value)) => format!("`{value}`"),
            (_, value) => value.to_string(),
        };
        let row = match value.as_str() {
            "" => format!("\n| `{key}` | |"),
            value => format!("\n| `{key}` | {value} |"),
        };
        assert!(DOCUMENT.contains(&row), "{row}");
    }
}
