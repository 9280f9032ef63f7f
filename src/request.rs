//! Commands, once decoded, and the validation of what is new in them.
//!
//! A [`Create`] has each field in its own range. [`Create::validate`] holds it against the past,
//! seen through the few calls that are still open, and against what the model can do; only it
//! makes a [`Valid`].

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    backend::Capabilities,
    event::{Code, Error},
    item::{Body, CallId, Item, ItemId, ResponseId, Role, Tool, ToolKind},
};

/// A decoded create: each field is in range by itself.
#[derive(Debug, Clone, Default)]
pub struct Create {
    /// The response to continue.
    pub previous: Option<ResponseId>,
    /// What is new.
    pub input: Vec<NewItem>,
    /// The settings that it sets.
    pub settings: Settings,
    /// The settings that it takes back to their defaults.
    pub reset: Vec<String>,
    /// Kept with the response.
    pub metadata: BTreeMap<String, String>,
    /// Whether `done` repeats the output.
    pub include_output: bool,
    /// Whether it stays open for appends after calls.
    pub hold: bool,
    /// Whether it prepares state only.
    pub prepare_only: bool,
    /// Whether whole items are sent only, without deltas.
    pub no_deltas: bool,
    /// Whether sampling goes on when the client vanishes.
    pub continue_on_disconnect: bool,
    /// W3C Trace Context of the caller; empty where it sent none.
    pub traceparent: String,
}

/// An item of the input.
#[derive(Debug, Clone)]
pub enum NewItem {
    /// The item itself.
    Item(Item),
    /// One that the server holds.
    Reference(ItemId),
}

impl NewItem {
    /// The item's id.
    #[must_use]
    pub fn id(&self) -> &ItemId {
        match self {
            Self::Item(item) => &item.id,
            Self::Reference(id) => id,
        }
    }
}

/// Declares the settings with the names that `reset` knows them by.
macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// What a conversation is sampled with. `None`: not set here, so inherited, and at the
        /// start of a conversation the default that the proto names.
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        pub struct Settings { $($(#[$doc])* pub $name: Option<$type>,)* }

        impl Settings {
            /// The names of all settings, as `reset` takes them.
            pub const NAMES: &[&str] = &[$(stringify!($name)),*];

            /// These settings, with what they leave open taken from the parent's, except for
            /// those that are reset.
            #[must_use]
            pub fn inherit(self, parent: &Self, reset: &[String]) -> Self {
                Self {
                    $($name: self.$name.or_else(|| {
                        let inherits = !reset.iter().any(|name| name == stringify!($name));
                        inherits.then(|| parent.$name.clone()).flatten()
                    }),)*
                }
            }

            /// What these settings change over the parent's: those that they set, and the names
            /// of those that they reset. [`Settings::inherit`] with both gives them again.
            #[must_use]
            pub fn changes(&self, parent: &Self) -> (Self, Vec<String>) {
                let mut reset = Vec::new();
                $(if self.$name.is_none() && parent.$name.is_some() {
                    reset.push(stringify!($name).to_owned());
                })*
                let set = Self {
                    $($name: self.$name.clone().filter(|own| parent.$name.as_ref() != Some(own)),)*
                };
                (set, reset)
            }
        }
    };
}

settings! {
    /// The model's name.
    model: Arc<str>,
    /// Text before the conversation.
    instructions: Arc<str>,
    /// The tools.
    tools: Arc<[Tool]>,
    /// Whether and which tools are called.
    tool_choice: ToolChoice,
    /// Whether one sample may hold several calls.
    parallel_tool_calls: bool,
    /// The format of the text.
    text: TextFormat,
    /// How much to think.
    reasoning_effort: Effort,
    /// The most tokens that a response samples.
    max_output_tokens: u32,
    /// 0 to 2.
    temperature: f32,
    /// Over 0, at most 1.
    top_p: f32,
    /// 0 takes all tokens.
    top_k: u32,
    /// Seed of the sampler.
    seed: u64,
    /// Texts that end the sample.
    stop: Arc<[Arc<str>]>,
    /// -2 to 2.
    presence_penalty: f32,
    /// -2 to 2.
    frequency_penalty: f32,
    /// What is added to the logits of these tokens, by token id.
    logit_bias: Arc<[(u32, f32)]>,
    /// How many of the likeliest tokens to tell.
    top_logprobs: u32,
    /// Whether the response may outlive the stream in a store.
    store: bool,
    /// What happens when the prompt is too long.
    truncation: Truncation,
    /// Conversations that share a prefix.
    prompt_cache_key: Arc<str>,
    /// An opaque id of the end user.
    safety_identifier: Arc<str>,
    /// `auto` or `default`.
    service_tier: Arc<str>,
}

/// Whether and which tools are called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToolChoice {
    /// The model decides.
    Auto,
    /// None is handed out.
    None,
    /// At least one.
    Required,
    /// This function.
    Function(Arc<str>),
    /// This custom tool.
    Custom(Arc<str>),
    /// Only these.
    Allowed {
        /// Whether one of them must be called.
        required: bool,
        /// Their names.
        names: Vec<Arc<str>>,
    },
}

/// The format of the text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TextFormat {
    /// Plain text.
    Plain,
    /// Any JSON object.
    JsonObject,
    /// JSON that keeps to a schema.
    JsonSchema {
        /// Its name.
        name: Arc<str>,
        /// The schema, as JSON text.
        schema: Arc<str>,
        /// Whether sampling is constrained by it.
        strict: bool,
    },
}

/// How much to think.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effort {
    /// Not at all.
    None,
    /// The least that the model knows.
    Minimal,
    /// Little.
    Low,
    /// Some.
    Medium,
    /// Much.
    High,
}

impl Effort {
    /// The word that templates know it by.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// What happens when the prompt is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Truncation {
    /// It is refused.
    Disabled,
    /// The oldest exchanges leave the prompt.
    Auto,
}

impl Settings {
    /// The tools, none where none are set.
    #[must_use]
    pub fn tools(&self) -> &[Tool] {
        self.tools.as_deref().unwrap_or_default()
    }

    /// Bytes of text in what stands before a conversation: instructions and tools.
    #[must_use]
    pub fn head_bytes(&self) -> usize {
        let tools = self.tools().iter().map(|tool| {
            let description = tool.description.as_ref().map_or(0, |text| text.len());
            match &tool.kind {
                ToolKind::Function { parameters, .. } => description + parameters.len(),
                ToolKind::Custom => description,
            }
        });
        self.instructions.as_ref().map_or(0, |text| text.len()) + tools.sum::<usize>()
    }

    /// Whether this tool may be called.
    #[must_use]
    pub fn may_call(&self, tool: &Tool) -> bool {
        match &self.tool_choice {
            None | Some(ToolChoice::Auto | ToolChoice::Required) => true,
            Some(ToolChoice::None) => false,
            Some(ToolChoice::Function(name) | ToolChoice::Custom(name)) => tool.name == *name,
            Some(ToolChoice::Allowed { names, .. }) => names.contains(&tool.name),
        }
    }

    /// Whether an answer must call a tool.
    #[must_use]
    pub fn requires_call(&self) -> bool {
        match &self.tool_choice {
            Some(
                ToolChoice::Required
                | ToolChoice::Function(_)
                | ToolChoice::Custom(_)
                | ToolChoice::Allowed { required: true, .. },
            ) => true,
            None
            | Some(
                ToolChoice::Auto
                | ToolChoice::None
                | ToolChoice::Allowed {
                    required: false, ..
                },
            ) => false,
        }
    }

    /// The tools that may be called.
    pub fn callable(&self) -> impl Iterator<Item = &Tool> {
        self.tools().iter().filter(|tool| self.may_call(tool))
    }

    /// Whether the two render the same prompt from the same items.
    #[must_use]
    pub fn renders_like(&self, other: &Self) -> bool {
        self.instructions == other.instructions
            && self.reasoning_effort == other.reasoning_effort
            && match (&self.tools, &other.tools) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
                (None, None) => true,
                (Some(tools), None) | (None, Some(tools)) => tools.is_empty(),
            }
    }

    /// Refuses what this model cannot honour: nothing is dropped without a word.
    ///
    /// # Errors
    ///
    /// `invalid_request`, naming the field.
    pub fn check(&self, abilities: &Abilities) -> Result<(), Error> {
        let refuse = |field: &str, why: &str| {
            Err(Error::invalid(
                format!("create.{field}"),
                format!("{why}, which this model cannot do"),
            ))
        };
        if !abilities.backend.constrained_sampling {
            const CONSTRAINED: &str = "it constrains sampling";
            if let Some(index) = self
                .tools()
                .iter()
                .position(|tool| matches!(tool.kind, ToolKind::Function { strict: true, .. }))
            {
                return refuse(&format!("tools[{index}].function.strict"), CONSTRAINED);
            }
            if self.requires_call() {
                return refuse("tool_choice", CONSTRAINED);
            }
            match &self.text {
                None | Some(TextFormat::Plain) => {}
                Some(TextFormat::JsonObject | TextFormat::JsonSchema { .. }) => {
                    return refuse("text", CONSTRAINED);
                }
            }
        }
        if self.top_logprobs.is_some() && !abilities.backend.logprobs {
            return refuse("top_logprobs", "it asks for log probabilities");
        }
        if !abilities.backend.sampling {
            let set = [
                ("temperature", self.temperature.is_some()),
                ("top_p", self.top_p.is_some()),
                ("top_k", self.top_k.is_some()),
                ("seed", self.seed.is_some()),
                ("presence_penalty", self.presence_penalty.is_some()),
                ("frequency_penalty", self.frequency_penalty.is_some()),
                ("logit_bias", self.logit_bias.is_some()),
            ];
            if let Some((field, _)) = set.into_iter().find(|(_, set)| *set) {
                return refuse(field, "it changes sampling");
            }
        }
        if self.reasoning_effort.is_some() && !abilities.reasoning_effort {
            return refuse("reasoning_effort", "it sets how much the model thinks");
        }
        if !self.tools().is_empty() && !abilities.tools {
            return refuse("tools", "it offers tools");
        }
        if let Some(bias) = &self.logit_bias
            && let Some((id, _)) = bias.iter().find(|(id, _)| *id >= abilities.vocab_size)
        {
            return Err(Error::invalid(
                "create.logit_bias",
                format!(
                    "token {id} is not below the vocabulary's {}",
                    abilities.vocab_size
                ),
            ));
        }
        if let Some(limit) = self.max_output_tokens
            && limit > abilities.output_tokens_max
        {
            return Err(Error::invalid(
                "create.max_output_tokens",
                format!(
                    "{limit} is over this server's limit of {}",
                    abilities.output_tokens_max
                ),
            ));
        }
        let chosen: &[Arc<str>] = match &self.tool_choice {
            None | Some(ToolChoice::Auto | ToolChoice::None | ToolChoice::Required) => &[],
            Some(ToolChoice::Function(name) | ToolChoice::Custom(name)) => {
                std::slice::from_ref(name)
            }
            Some(ToolChoice::Allowed { names, .. }) => names,
        };
        if let Some(unknown) = chosen
            .iter()
            .find(|name| !self.tools().iter().any(|tool| tool.name == **name))
        {
            return Err(Error::invalid(
                "create.tool_choice",
                format!("no tool has the name `{unknown}`"),
            ));
        }
        if self.requires_call() && self.tools().is_empty() {
            return Err(Error::invalid(
                "create.tool_choice",
                "a call is required, and there is no tool",
            ));
        }
        Ok(())
    }
}

/// What can be asked of a model.
#[derive(Debug, Clone, Copy)]
pub struct Abilities {
    /// What its backend can do.
    pub backend: Capabilities,
    /// Whether its template knows how much to think.
    pub reasoning_effort: bool,
    /// Whether its template knows tools.
    pub tools: bool,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// The server's limit of tokens a response.
    pub output_tokens_max: u32,
}

/// A call without an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenCall {
    /// Names the call.
    pub call_id: CallId,
    /// The tool.
    pub name: Arc<str>,
    /// Whether the tool is a custom one.
    pub custom: bool,
}

/// What validation sees of the past.
pub struct Past<'a> {
    /// The calls without an output.
    pub open_calls: &'a [OpenCall],
    /// Whether there is a past at all.
    pub exists: bool,
    /// Finds an item that the server holds for this tenant.
    pub find_item: &'a dyn Fn(&ItemId) -> Option<Arc<Item>>,
}

/// An item of a conversation, with the name of the tool that it answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidItem {
    /// The item.
    pub item: Arc<Item>,
    /// For outputs: the tool whose call it answers.
    pub answers: Option<Arc<str>>,
}

/// Input that was held against the past. Made by [`Create::validate`] and [`validate_append`] alone.
#[derive(Debug)]
pub struct ValidInput(Vec<ValidItem>);

impl ValidInput {
    /// The items, in the order of the conversation.
    #[must_use]
    pub fn into_items(self) -> Vec<ValidItem> {
        self.0
    }
}

/// A create that can run.
#[derive(Debug)]
pub struct Valid {
    /// What is new; outputs of the parent's calls come first.
    pub input: ValidInput,
    /// Calls that are open once the input is in.
    pub open_calls: Vec<OpenCall>,
    /// The settings in force.
    pub settings: Arc<Settings>,
}

impl Create {
    /// Holds the create against the past and the model. `settings` are those in force, the
    /// parent's included. Costs what is new.
    ///
    /// # Errors
    ///
    /// `invalid_request`, `no_such_call` or `missing_tool_output`, naming the field.
    pub fn validate(
        input: Vec<NewItem>,
        settings: Arc<Settings>,
        prepare_only: bool,
        past: &Past<'_>,
        abilities: &Abilities,
    ) -> Result<Valid, Error> {
        settings.check(abilities)?;
        if input.is_empty() && !past.exists && !prepare_only {
            return Err(Error::invalid(
                "create.input",
                "a new conversation needs at least one item",
            ));
        }
        let mut open_calls = past.open_calls.to_vec();
        let input = admit(input, &mut open_calls, past, Command::Create)?;
        if !prepare_only && !open_calls.is_empty() {
            return Err(missing_outputs(&open_calls));
        }
        Ok(Valid {
            input,
            open_calls,
            settings,
        })
    }
}

fn missing_outputs(open: &[OpenCall]) -> Error {
    let ids: Vec<&str> = open.iter().map(|call| call.call_id.as_str()).collect();
    Error::new(
        Code::MissingToolOutput,
        format!("no output has come for call {}", ids.join(", ")),
    )
    .at("create.input")
}

/// Validates appended input against the calls that are open, which it closes.
///
/// # Errors
///
/// `invalid_request` or `no_such_call`, naming the field; then no call was closed.
pub fn validate_append(
    input: Vec<NewItem>,
    open_calls: &mut Vec<OpenCall>,
    find_item: &dyn Fn(&ItemId) -> Option<Arc<Item>>,
) -> Result<ValidInput, Error> {
    let mut open = open_calls.clone();
    let past = Past {
        open_calls: &[],
        exists: true,
        find_item,
    };
    let input = admit(input, &mut open, &past, Command::Append)?;
    *open_calls = open;
    Ok(input)
}

/// Admits items one by one, keeping the list of open calls.
fn admit(
    input: Vec<NewItem>,
    open: &mut Vec<OpenCall>,
    past: &Past<'_>,
    command: Command,
) -> Result<ValidInput, Error> {
    let inherited: Vec<CallId> = open.iter().map(|call| call.call_id.clone()).collect();
    let mut admitted: Vec<ValidItem> = Vec::with_capacity(input.len());
    // Outputs of the parent's calls belong right behind those calls, before anything else that is
    // new, and in the order of the calls: by nothing else do some templates tell them apart.
    let rank = |new: &ValidItem| {
        let answered = new.item.answers();
        inherited
            .iter()
            .position(|call_id| Some(call_id) == answered)
    };
    let mut outputs_first = 0;
    for (index, new) in input.into_iter().enumerate() {
        let at = |field: &str| format!("{}.input[{index}]{field}", command.as_str());
        let item = match new {
            NewItem::Item(item) => Arc::new(item),
            NewItem::Reference(id) => (past.find_item)(&id).ok_or_else(|| {
                Error::invalid(at(".item_reference.id"), format!("no item `{id}` is held"))
            })?,
        };
        if command == Command::Append && !can_be_appended(&item.body) {
            return Err(Error::invalid(
                at(""),
                "only outputs of calls, and messages that are not of the assistant, can be appended",
            ));
        }
        let mut answers = None;
        let mut to_front = false;
        if let Some(call_id) = item.answers() {
            let custom = matches!(item.body, Body::CustomToolCallOutput { .. });
            let position = open
                .iter()
                .position(|call| call.call_id == *call_id && call.custom == custom)
                .ok_or_else(|| {
                    let kind = if custom {
                        "custom_tool_call"
                    } else {
                        "function_call"
                    };
                    Error::new(
                        Code::NoSuchCall,
                        format!("no open {kind} has the call_id `{call_id}`"),
                    )
                    .at(at(&format!(".{kind}_output.call_id")))
                })?;
            to_front = inherited.contains(call_id);
            answers = Some(open.remove(position).name);
        } else if let Some((call_id, name)) = item.call() {
            if open.iter().any(|call| call.call_id == *call_id) {
                return Err(Error::invalid(
                    at(".function_call.call_id"),
                    format!("the call `{call_id}` is open already"),
                ));
            }
            open.push(OpenCall {
                call_id: call_id.clone(),
                name: name.clone(),
                custom: matches!(item.body, Body::CustomToolCall { .. }),
            });
        } else if matches!(item.body, Body::Compaction { .. }) {
            open.clear();
        }
        let new = ValidItem { item, answers };
        if to_front {
            let at = admitted[..outputs_first].partition_point(|other| rank(other) < rank(&new));
            admitted.insert(at, new);
            outputs_first += 1;
        } else {
            admitted.push(new);
        }
    }
    Ok(ValidInput(admitted))
}

/// Which command brings input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Create,
    Append,
}

impl Command {
    fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Append => "append",
        }
    }
}

fn can_be_appended(body: &Body) -> bool {
    match body {
        Body::Message { role, .. } => *role != Role::Assistant,
        Body::FunctionCallOutput { .. } | Body::CustomToolCallOutput { .. } => true,
        Body::FunctionCall { .. }
        | Body::Reasoning { .. }
        | Body::CustomToolCall { .. }
        | Body::Compaction { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::item::Part;

    fn abilities() -> Abilities {
        Abilities {
            backend: Capabilities {
                kind: "sim",
                keeps_cache: false,
                prefill: false,
                constrained_sampling: false,
                logprobs: false,
                reads_items: false,
                reads_messages: false,
                sampling: true,
            },
            reasoning_effort: false,
            tools: true,
            vocab_size: 100,
            output_tokens_max: 1000,
        }
    }

    fn user(text: &str) -> NewItem {
        NewItem::Item(Item::new(Body::Message {
            role: Role::User,
            parts: vec![Part::InputText(text.into())],
        }))
    }

    fn output(call_id: &str) -> NewItem {
        NewItem::Item(Item::new(Body::FunctionCallOutput {
            call_id: call_id.into(),
            output: "42".into(),
        }))
    }

    fn open(call_id: &str) -> OpenCall {
        OpenCall {
            call_id: call_id.into(),
            name: "step".into(),
            custom: false,
        }
    }

    fn validate(
        input: Vec<NewItem>,
        settings: Settings,
        open_calls: &[OpenCall],
    ) -> Result<Valid, Error> {
        let past = Past {
            open_calls,
            exists: !open_calls.is_empty(),
            find_item: &|_| None,
        };
        Create::validate(input, Arc::new(settings), false, &past, &abilities())
    }

    #[test]
    fn outputs_of_open_calls_come_first_in_their_order_and_close_them() {
        let valid = validate(
            vec![user("and hurry"), output("call_b"), output("call_a")],
            Settings::default(),
            &[open("call_a"), open("call_b")],
        )
        .unwrap();
        let kinds: Vec<Option<&str>> = valid
            .input
            .0
            .iter()
            .map(|new| new.item.answers().map(CallId::as_str))
            .collect();
        assert_eq!(kinds, [Some("call_a"), Some("call_b"), None]);
        assert_eq!(valid.open_calls, []);
    }

    #[test]
    fn calls_without_output_and_outputs_without_call_are_named() {
        let missing = validate(
            vec![output("call_a")],
            Settings::default(),
            &[open("call_a"), open("call_b")],
        );
        let missing = missing.unwrap_err();
        assert_eq!(missing.code, Code::MissingToolOutput);
        assert!(missing.message.contains("call_b") && !missing.message.contains("call_a"));

        let stray =
            validate(vec![user("hi"), output("call_x")], Settings::default(), &[]).unwrap_err();
        assert_eq!(stray.code, Code::NoSuchCall);
        assert_eq!(stray.param, "create.input[1].function_call_output.call_id");
        assert!(stray.message.contains("call_x"));
    }

    #[test]
    fn what_the_model_cannot_do_is_refused_by_field() {
        let field =
            |settings: Settings| validate(vec![user("hi")], settings, &[]).unwrap_err().param;
        assert_eq!(
            field(Settings {
                top_logprobs: Some(2),
                ..Settings::default()
            }),
            "create.top_logprobs"
        );
        assert_eq!(
            field(Settings {
                text: Some(TextFormat::JsonObject),
                ..Settings::default()
            }),
            "create.text"
        );
        assert_eq!(
            field(Settings {
                tool_choice: Some(ToolChoice::Required),
                ..Settings::default()
            }),
            "create.tool_choice"
        );
        assert_eq!(
            field(Settings {
                logit_bias: Some(Arc::new([(100, 1.0)])),
                ..Settings::default()
            }),
            "create.logit_bias"
        );
        assert_eq!(
            field(Settings {
                reasoning_effort: Some(Effort::High),
                ..Settings::default()
            }),
            "create.reasoning_effort"
        );
        assert_eq!(
            field(Settings {
                max_output_tokens: Some(1001),
                ..Settings::default()
            }),
            "create.max_output_tokens"
        );
    }

    #[test]
    fn a_refused_append_closes_no_call() {
        let mut calls = vec![open("call_a")];
        let refused = validate_append(
            vec![output("call_a"), output("call_a")],
            &mut calls,
            &|_| None,
        );
        assert_eq!(refused.unwrap_err().code, Code::NoSuchCall);
        assert_eq!(calls, [open("call_a")]);
        assert_eq!(
            validate_append(vec![output("call_a")], &mut calls, &|_| None)
                .unwrap()
                .0
                .len(),
            1
        );
        assert_eq!(calls, []);
    }

    #[test]
    fn settings_are_inherited_replaced_and_reset() {
        let parent = Settings {
            temperature: Some(0.5),
            top_k: Some(3),
            instructions: Some("be brief".into()),
            ..Settings::default()
        };
        let child = Settings {
            top_k: Some(7),
            ..Settings::default()
        };
        let reset = vec!["temperature".to_owned()];
        assert_eq!(
            child.inherit(&parent, &reset),
            Settings {
                top_k: Some(7),
                instructions: Some("be brief".into()),
                ..Settings::default()
            }
        );
        assert!(Settings::NAMES.contains(&"service_tier"));
    }
}
