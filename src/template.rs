//! A model's chat template, rendered byte for byte as Hugging Face `transformers` renders it.
//!
//! A conversation reaches the model as the text its `chat_template.jinja` makes of it. That text decides which tokens
//! the engine has seen before, so "almost as `transformers`" is not enough: this file sets minijinja up to agree with
//! Jinja2 as `transformers` configures it (trimmed blocks, loop controls, its own `tojson`, `raise_exception`,
//! `strftime_now`, `{% generation %}`), and is the only one in the crate that knows minijinja.
//!
//! In one thing it deliberately departs from a plain call of `apply_chat_template`: the arguments of a tool call keep
//! the bytes the model sampled. They behave as a mapping wherever a template looks into them, but every print of them
//! gives the model's own text, since each byte that is re-serialised differently throws away the engine's cache from
//! there on.
//!
//! | templates that write calls as | examples | arguments they are given | what they print |
//! |---|---|---|---|
//! | JSON, through `tojson`, at any depth | Hermes, Qwen, Llama 3, Mistral, gpt-oss, Phi-4 | a mapping | the sampled text |
//! | JSON, but only joining strings | DeepSeek V3, R1 | a string | the sampled text |
//! | either, after `is string` | Kimi K2, Qwen 3 | a mapping | the sampled text |
//! | one by one, in tags | Qwen3-Coder, GLM 4.5 | a mapping | strings bare, inner JSON as sampled |
//! | one by one, as Python | LFM 2.5 | a mapping | each as Python writes it |
//!
//! Which row a template is in is found out when it is loaded, by rendering one call in each form (`CallForm`).

mod json;
mod loops;
mod probe;
mod python;
mod trace;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::{Arc, LazyLock, OnceLock};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Object};
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use regex::Regex;
use sha2::{Digest, Sha256};

pub use probe::Appends;
pub use trace::Place;
use trace::Trace;

/// The names under which an environment keeps the template as it is, and rewritten so that a rendering can go on; they
/// show in no message.
const NAME: &str = "chat_template";
const REWRITTEN: &str = "chat_template, rewritten";

/// A compiled chat template; immutable, and shared by all lanes of a model.
pub struct Template {
    environment: Environment<'static>,
    source: Box<str>,
    specials: SpecialTokens,
    variables: HashSet<String>,
    form: CallForm,
    /// Whether there is a rewritten one.
    resumes: bool,
}

/// The texts of the special tokens that templates print by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of sequence, `bos_token`.
    pub bos: Option<String>,
    /// End of sequence, `eos_token`.
    pub eos: Option<String>,
    /// Padding, `pad_token`.
    pub pad: Option<String>,
    /// Unknown, `unk_token`.
    pub unk: Option<String>,
}

/// The messages of a conversation, oldest first.
pub trait Messages: fmt::Debug + Send + Sync {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The message at this position, counted from 0.
    fn get(&self, at: usize) -> Option<Message>;
}

impl Messages for Vec<Message> {
    fn len(&self) -> usize {
        self.len()
    }

    fn get(&self, at: usize) -> Option<Message> {
        self.as_slice().get(at).cloned()
    }
}

/// All that one render depends on besides the template itself.
#[derive(Clone, Debug)]
pub struct RenderInput<'a> {
    /// The conversation.
    pub messages: Arc<dyn Messages>,
    /// The tools on offer. Without any, pass `None`, not an empty list: templates see `none`, as in `transformers`.
    pub tools: Option<&'a ToolsValue>,
    /// Whether the text ends by opening the assistant's next turn.
    pub add_generation_prompt: bool,
    /// What `strftime_now` tells. Freeze it for each conversation: a date that moves changes the start of the prompt.
    pub now: jiff::civil::DateTime,
    /// Further variables, such as `enable_thinking`. A name that this struct or a special token already sets loses to
    /// this struct and wins over the special token, as in `transformers`.
    pub kwargs: &'a [(&'a str, KwargValue)],
}

/// What [`Template::render_on`] gives.
#[derive(Debug)]
pub struct Rendered {
    /// The text, in two: a rendering that goes on from `next` leaves out all up to the second part.
    pub parts: [String; 2],
    /// Whether the text begins at the given place; else it is all of it.
    pub resumed: bool,
    /// The place of the second part. `None` where no rendering may go on from this one.
    pub next: Option<Place>,
}

impl Rendered {
    /// All of a text that no rendering may go on from.
    fn whole(text: String) -> Self {
        Self {
            parts: [String::new(), text],
            resumed: false,
            next: None,
        }
    }
}

/// The value of a template's own switch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KwargValue {
    /// For switches such as `enable_thinking`.
    Flag(bool),
    /// For budgets and counts.
    Number(i64),
    /// For choices such as `reasoning_effort`.
    Text(String),
}

/// A message as templates see it. Kept with the conversation; a clone shares everything.
#[derive(Clone, Debug)]
pub struct Message(Forms);

/// A tool call of the assistant, in the model's own words.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    /// The call's id. Some templates insist on a shape (Mistral: nine letters or digits).
    pub id: &'a str,
    /// The function's name.
    pub name: &'a str,
    /// The arguments' JSON text exactly as it was sampled. Text that is no JSON object is kept all the same: templates
    /// see a mapping without entries that prints as this text.
    pub arguments: Arc<str>,
}

/// A function the model may call.
#[derive(Clone, Copy, Debug)]
pub struct ToolDef<'a> {
    /// The function's name.
    pub name: &'a str,
    /// What it does; left out of what the template sees when there is none.
    pub description: Option<&'a str>,
    /// The JSON schema of its arguments, as JSON text. The order of its keys is kept.
    pub parameters: &'a str,
}

/// The tools on offer as templates see them. Built once for each set of tools; a clone shares everything, also the JSON
/// text of each tool once a template has printed it.
#[derive(Clone, Debug)]
pub struct ToolsValue(Value);

/// Why a template could not be loaded, or a conversation not rendered. Only [`Refused`](Self::Refused) may quote the
/// conversation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The source is no valid template. The operator's fault.
    #[error("the chat template has a syntax error in line {line}: {detail}")]
    Syntax {
        /// Where, counted from 1.
        line: usize,
        /// What the parser says.
        detail: String,
    },
    /// The template called `raise_exception`: it does not take this conversation (roles out of order, say). The
    /// caller's fault; the text is the template's own and may quote the conversation.
    #[error("the chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template failed at run time: it takes a message or a value of another shape.
    #[error("the chat template failed in line {line}: {detail}")]
    Failed {
        /// Where, counted from 1; 0 if unknown.
        line: usize,
        /// What kind of failure.
        detail: String,
    },
    /// The parameters of a tool are no JSON. The caller's fault.
    #[error("the parameters of tool {index} are not valid json")]
    Parameters {
        /// Which tool, counted from 0.
        index: usize,
    },
}

impl Template {
    /// Compiles `source`, and finds out in which form it takes tool calls.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`], with the line.
    pub fn new(source: &str, specials: SpecialTokens) -> Result<Self, TemplateError> {
        let mut environment = environment();
        let text = as_minijinja_reads_it(source);
        let compiled = environment.add_template_owned(NAME, text.clone());
        compiled.map_err(|error| TemplateError::Syntax {
            line: error.line().unwrap_or(0),
            detail: error.detail().unwrap_or("unexpected input").to_owned(),
        })?;
        let variables = match environment.get_template(NAME) {
            Ok(template) => template.undeclared_variables(false),
            Err(error) => return Err(failure(&error)),
        };
        if let Some(rewritten) = loops::rewrite(&text) {
            // What does not compile is not used.
            let _ = environment.add_template_owned(REWRITTEN, rewritten);
        }
        let mut template = Self {
            resumes: environment.get_template(REWRITTEN).is_ok(),
            environment,
            source: source.into(),
            specials,
            variables,
            form: CALL_FORMS[0],
        };
        template.form = probe::call_form(&template);
        template.resumes = template.resumes && probe::resumes(&template);
        Ok(template)
    }

    /// The prompt's text.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] when the template raises an exception of its own, [`TemplateError::Failed`] when it
    /// stumbles.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        self.render_as(self.form, input)
    }

    /// The prompt's text, as far as it may differ from that of an earlier rendering of the same conversation.
    ///
    /// `place` comes from that rendering. Of its input all but the messages must have been the same, and those messages must be
    /// the first ones of these. What is left out costs nothing, where the template lets be seen that it stays as it is:
    /// one that looks at how many messages there are, say, is rendered from the start.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_on(
        &self,
        input: &RenderInput<'_>,
        place: Option<&Place>,
    ) -> Result<Rendered, TemplateError> {
        if !self.resumes {
            return self.render(input).map(Rendered::whole);
        }
        let trace = Trace::new(Arc::clone(&input.messages), self.form, place.cloned());
        let mut context = self.context(input, trace.conversation());
        context.insert(loops::TRACE, Value::from_dyn_object(Arc::clone(&trace)));
        let rendered = self
            .environment
            .get_template(REWRITTEN)
            .and_then(|template| {
                template
                    .render_captured_to(Value::from(context), trace.sheet())
                    .map(drop)
            });
        let text = trace.finish();
        rendered.map_err(|error| failure(&error))?;
        Ok(text)
    }

    /// Whether a rendering can leave out what stays as it is.
    pub fn resumes(&self) -> bool {
        self.resumes
    }

    /// Whether the template reads `variable` from outside, for instance `enable_thinking`, `reasoning_effort` or
    /// `tools`. A switch that it does not read can have no effect.
    pub fn mentions(&self, variable: &str) -> bool {
        self.variables.contains(variable)
    }

    /// Names the template: two with the same fingerprint render everything alike.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for (name, text) in self
            .specials
            .named()
            .into_iter()
            .chain([("source", Some(&*self.source))])
        {
            hash.update(name);
            // The length keeps a text from running into the next name; an absent token is told from an empty one.
            hash.update(
                text.map_or(u64::MAX, |text| text.len() as u64)
                    .to_le_bytes(),
            );
            hash.update(text.unwrap_or_default());
        }
        hash.finalize().into()
    }

    /// The source's length in bytes.
    pub fn size_bytes(&self) -> usize {
        self.source.len()
    }

    /// The source, as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Which appends leave the text before them as it was, judged on about a hundred synthetic cases with all
    /// switches at their defaults. For warnings and for speculation: a `true` is no proof.
    pub fn probe(&self) -> Appends {
        probe::appends(self)
    }

    fn render_as(&self, form: CallForm, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| failure(&error))?;
        let messages = (0..input.messages.len()).filter_map(|at| input.messages.get(at));
        let messages: Value = messages.map(|message| message.value(form)).collect();
        template
            .render(Value::from(self.context(input, messages)))
            .map_err(|error| failure(&error))
    }

    fn context<'v>(&'v self, input: &RenderInput<'v>, messages: Value) -> BTreeMap<&'v str, Value> {
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, text) in self.specials.named() {
            if let Some(text) = text {
                variables.insert(name, Value::from(text));
            }
        }
        for (name, value) in input.kwargs {
            variables.insert(name, value.to_value());
        }
        variables.insert("messages", messages);
        variables.insert(
            "tools",
            input
                .tools
                .map_or_else(|| Value::from(()), |tools| tools.0.clone()),
        );
        variables.insert("documents", Value::from(()));
        variables.insert(
            "add_generation_prompt",
            Value::from(input.add_generation_prompt),
        );
        variables.insert("strftime_now", python::strftime_now(input.now));
        variables
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template")
            .field("bytes", &self.size_bytes())
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}

impl SpecialTokens {
    /// Reads them from a parsed `tokenizer_config.json`, where each is a string or an object with `content`.
    pub fn from_config(config: &serde_json::Value) -> Self {
        let text = |name: &str| {
            let token = config.get(name)?;
            let token = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some(token.to_owned())
        };
        Self {
            bos: text("bos_token"),
            eos: text("eos_token"),
            pad: text("pad_token"),
            unk: text("unk_token"),
        }
    }

    /// Under the names that templates use.
    fn named(&self) -> [(&'static str, Option<&str>); 4] {
        [
            ("bos_token", self.bos.as_deref()),
            ("eos_token", self.eos.as_deref()),
            ("pad_token", self.pad.as_deref()),
            ("unk_token", self.unk.as_deref()),
        ]
    }
}

/// The template inside a parsed `tokenizer_config.json`, for models without a `chat_template.jinja`.
///
/// Where `chat_template` is a list of named templates this is the one named `default`. (`transformers` takes one named
/// `tool_use` when tools are passed; one model with two templates could not keep a prefix when tools come or go, and
/// models made for tools have a default that takes them.)
pub fn source_in_config(config: &serde_json::Value) -> Option<&str> {
    let template = config.get("chat_template")?;
    if let Some(source) = template.as_str() {
        return Some(source);
    }
    let default = template
        .as_array()?
        .iter()
        .find(|named| named.get("name").and_then(|name| name.as_str()) == Some("default"))?;
    default.get("template")?.as_str()
}

impl Message {
    /// A system, developer or user message. Shares the text.
    pub fn text(role: &str, content: impl Into<Arc<str>>) -> Self {
        Self(Forms::One(Record::value(vec![
            ("role", role.into()),
            ("content", content.into().into()),
        ])))
    }

    /// A turn of the assistant: what it thought, said and called, in this order. Shares the texts.
    ///
    /// Without text the content is the empty string. Templates that take only `none` there beside calls are given that
    /// (found out at load). The reasoning is found under `reasoning_content`, and by templates that ask for `thinking`
    /// or `reasoning` under those names.
    pub fn assistant<T: Into<Arc<str>>>(
        reasoning: Option<T>,
        content: Option<T>,
        calls: &[Call<'_>],
    ) -> Self {
        let content = content.map(T::into).filter(|text| !text.is_empty());
        let turn = Turn {
            reasoning: reasoning.map(|text| text.into().into()),
            content: content.map(Value::from),
            calls: calls.iter().map(Called::from).collect(),
            first: OnceLock::new(),
        };
        match calls {
            [] => Self(Forms::One(turn.value(CALL_FORMS[0]))),
            _ => Self(Forms::ByCallForm(Arc::new(turn))),
        }
    }

    /// What a tool gave back for the call `call_id` of function `name`. Shares the text.
    pub fn tool_output(call_id: &str, name: &str, content: impl Into<Arc<str>>) -> Self {
        Self(Forms::One(Record::value(vec![
            ("role", "tool".into()),
            ("content", content.into().into()),
            ("tool_call_id", call_id.into()),
            ("name", name.into()),
        ])))
    }

    fn value(&self, form: CallForm) -> Value {
        match &self.0 {
            Forms::One(value) => value.clone(),
            Forms::ByCallForm(turn) => {
                let (first, value) = turn.first.get_or_init(|| (form, turn.value(form)));
                match *first == form {
                    true => value.clone(),
                    false => turn.value(form),
                }
            }
        }
    }
}

impl Turn {
    fn value(&self, form: CallForm) -> Value {
        let silence = match (self.calls.is_empty(), form.silence) {
            (true, _) | (false, Silence::Empty) => Value::from(""),
            (false, Silence::None) => Value::from(()),
        };
        let content = self.content.clone().unwrap_or(silence);
        let mut fields = vec![("role", Value::from("assistant")), ("content", content)];
        let reasoning = self.reasoning.clone();
        fields.extend(reasoning.map(|reasoning| ("reasoning_content", reasoning)));
        if !self.calls.is_empty() {
            let calls = self.calls.iter().map(|call| call.value(form.arguments));
            fields.push(("tool_calls", calls.collect()));
        }
        Record::value(fields)
    }
}

impl From<&Call<'_>> for Called {
    fn from(call: &Call<'_>) -> Self {
        Self {
            id: call.id.into(),
            name: call.name.into(),
            arguments: call.arguments.clone(),
        }
    }
}

impl Called {
    fn value(&self, arguments: Arguments) -> Value {
        let arguments = match arguments {
            Arguments::Mapping => json::verbatim(self.arguments.clone()),
            Arguments::Text => self.arguments.clone().into(),
        };
        let function = Record::value(vec![("name", self.name.clone()), ("arguments", arguments)]);
        Record::value(vec![
            ("id", self.id.clone()),
            ("type", "function".into()),
            ("function", function),
        ])
    }
}

impl ToolsValue {
    /// Takes the tools in the order given; each becomes `{"type": "function", "function": {…}}`.
    ///
    /// # Errors
    /// [`TemplateError::Parameters`] when a schema is no JSON.
    pub fn new(tools: &[ToolDef<'_>]) -> Result<Self, TemplateError> {
        let tool = |(index, tool): (usize, &ToolDef<'_>)| {
            let parameters =
                json::parse(tool.parameters).ok_or(TemplateError::Parameters { index })?;
            let name = ("name", Value::from(tool.name));
            let description = tool
                .description
                .map(|text| ("description", Value::from(text)));
            let fields = [Some(name), description, Some(("parameters", parameters))];
            let function = json::printed_once(Value::from_pairs(fields.into_iter().flatten()));
            Ok(json::printed_once(Value::from_pairs([
                ("type", Value::from("function")),
                ("function", function),
            ])))
        };
        let tools: Vec<Value> = tools
            .iter()
            .enumerate()
            .map(tool)
            .collect::<Result<_, _>>()?;
        Ok(Self(Value::from(tools)))
    }
}

impl KwargValue {
    fn to_value(&self) -> Value {
        match self {
            Self::Flag(flag) => Value::from(*flag),
            Self::Number(number) => Value::from(*number),
            Self::Text(text) => Value::from(text.as_str()),
        }
    }
}

/// A message for each form of template. Only calls differ.
#[derive(Clone, Debug)]
enum Forms {
    One(Value),
    ByCallForm(Arc<Turn>),
}

/// A turn of the assistant.
#[derive(Debug)]
struct Turn {
    reasoning: Option<Value>,
    content: Option<Value>,
    calls: Box<[Called]>,
    /// In the form that was asked for first: a template asks for no other.
    first: OnceLock<(CallForm, Value)>,
}

#[derive(Debug)]
struct Called {
    id: Value,
    name: Value,
    arguments: Arc<str>,
}

/// How a template wants turns with calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CallForm {
    arguments: Arguments,
    silence: Silence,
}

/// As what it wants the arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arguments {
    Mapping,
    Text,
}

/// As what it wants the content of a turn with calls and no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    Empty,
    None,
}

/// All forms, the one to be preferred first: it is the commonest, and what clients of `transformers` pass.
const CALL_FORMS: [CallForm; 4] = [
    CallForm {
        arguments: Arguments::Mapping,
        silence: Silence::Empty,
    },
    CallForm {
        arguments: Arguments::Mapping,
        silence: Silence::None,
    },
    CallForm {
        arguments: Arguments::Text,
        silence: Silence::Empty,
    },
    CallForm {
        arguments: Arguments::Text,
        silence: Silence::None,
    },
];

/// A mapping with a handful of fixed keys: found faster than in a hash map, and without an allocation for a key.
struct Record(Box<[(&'static str, Value)]>);

impl Record {
    fn value(fields: Vec<(&'static str, Value)>) -> Value {
        Value::from_object(Self(fields.into()))
    }
}

impl Object for Record {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        // gpt-oss asks for `thinking`, some others for `reasoning`; the aliases are found but not listed.
        let key = match key {
            "thinking" | "reasoning" => "reasoning_content",
            key => key,
        };
        self.0
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(name, _)| Value::from(*name)).collect())
    }
}

/// How a record prints inside another value.
impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = self
            .0
            .iter()
            .map(|(name, value)| (Value::from(*name), value));
        f.debug_map().entries(fields).finish()
    }
}

/// What `raise_exception` raises, to be told from a failure of the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

#[expect(
    clippy::expect_used,
    reason = "the builder only fails on delimiters of one's own"
)]
fn syntax() -> SyntaxConfig {
    SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("the default delimiters")
}

/// minijinja as `transformers` configures Jinja2: what differs between the two is in [`python`] and [`json`].
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    // Debug information would carry the conversation into errors.
    environment.set_debug(false);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.add_filter("tojson", json::tojson);
    environment.add_function(
        "raise_exception",
        |message: &Value| -> Result<Value, minijinja::Error> {
            let refusal = Refusal(message.to_string());
            Err(minijinja::Error::from(ErrorKind::InvalidOperation).with_source(refusal))
        },
    );
    python::extend(&mut environment);
    environment
}

/// Undoes two differences of the two parsers before the source reaches minijinja, line for line.
///
/// Jinja2 reads every kind of line end as `\n`. The `generation` blocks, which `transformers` adds to mark spans for
/// training, print their body unchanged in a scope of their own, as `with` does.
fn as_minijinja_reads_it(source: &str) -> String {
    #[expect(
        clippy::expect_used,
        reason = "the pattern is a constant, and a test loads a template"
    )]
    static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\{%([-+]?)(\s*)(end)?generation(\s*)([-+]?)%\}").expect("a valid pattern")
    });
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    GENERATION
        .replace_all(&source, "{%$1$2${3}with$4 $5%}")
        .into_owned()
}

/// A refusal stays one however deep in macros it was raised; of any other failure only what cannot quote the
/// conversation is kept.
fn failure(error: &minijinja::Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return TemplateError::Refused(message.clone());
        }
        cause = error.source();
    }
    let kind = error.kind();
    let names_only = matches!(
        kind,
        ErrorKind::UnknownFilter
            | ErrorKind::UnknownTest
            | ErrorKind::UnknownFunction
            | ErrorKind::UnknownMethod
    );
    let detail = match error.detail() {
        Some(detail) if names_only => format!("{kind}: {detail}"),
        Some(_) | None => kind.to_string(),
    };
    TemplateError::Failed {
        line: error.line().unwrap_or(0),
        detail,
    }
}
