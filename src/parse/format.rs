//! What models would write: the other direction, for engines that play a model and for tests.

use serde_json::Value;

use super::marker::Marker;
use super::{Answer, Family, FormattedPiece};

pub(super) fn format(
    family: Family,
    answer: &Answer,
    is_added: &dyn Fn(&str) -> bool,
) -> Vec<FormattedPiece> {
    let mut writer = Writer {
        pieces: Vec::new(),
        is_added,
    };
    let reasoning = answer
        .reasoning
        .as_deref()
        .filter(|reasoning| !reasoning.is_empty());
    match family {
        Family::Hermes => {
            writer.think(reasoning);
            writer.text(&answer.text);
            writer.hermes_calls(answer);
        }
        Family::Llama3 => {
            writer.think(reasoning);
            if answer.calls.is_empty() {
                writer.text(&answer.text);
            }
            for (index, (name, arguments)) in answer.calls.iter().enumerate() {
                writer.text(if index == 0 { "" } else { "; " });
                writer.object(name, "parameters", arguments);
            }
        }
        Family::Mistral => {
            if let Some(reasoning) = reasoning {
                writer.marker(Marker::BracketThink);
                writer.text(reasoning);
                writer.marker(Marker::BracketThinkEnd);
            }
            writer.text(&answer.text);
            writer.mistral_calls(answer);
        }
        Family::Harmony => writer.harmony(reasoning, answer),
        Family::Plain => {
            writer.think(reasoning);
            writer.text(&answer.text);
        }
    }
    writer.pieces
}

struct Writer<'a> {
    pieces: Vec<FormattedPiece>,
    is_added: &'a dyn Fn(&str) -> bool,
}

impl Writer<'_> {
    fn marker(&mut self, marker: Marker) {
        if (self.is_added)(marker.text()) {
            self.pieces
                .push(FormattedPiece::Special(marker.text().to_owned()));
        } else {
            self.text(marker.text());
        }
    }

    fn text(&mut self, text: &str) {
        if let Some(FormattedPiece::Text(last)) = self.pieces.last_mut() {
            last.push_str(text);
        } else if !text.is_empty() {
            self.pieces.push(FormattedPiece::Text(text.to_owned()));
        }
    }

    fn think(&mut self, reasoning: Option<&str>) {
        if let Some(reasoning) = reasoning {
            self.marker(Marker::Think);
            self.text("\n");
            self.text(reasoning);
            self.text("\n");
            self.marker(Marker::ThinkEnd);
            self.text("\n\n");
        }
    }

    /// A call as one JSON object.
    fn object(&mut self, name: &str, key: &str, arguments: &str) {
        let name = Value::from(name);
        self.text(&format!(r#"{{"name": {name}, "{key}": {arguments}}}"#));
    }

    fn hermes_calls(&mut self, answer: &Answer) {
        for (index, (name, arguments)) in answer.calls.iter().enumerate() {
            if index > 0 || !answer.text.is_empty() {
                self.text("\n");
            }
            self.marker(Marker::ToolCall);
            self.text("\n");
            self.object(name, "arguments", arguments);
            self.text("\n");
            self.marker(Marker::ToolCallEnd);
        }
    }

    /// In the form with `[ARGS]` where the tokenizer knows that, else as an array.
    fn mistral_calls(&mut self, answer: &Answer) {
        if (self.is_added)(Marker::Args.text()) {
            for (name, arguments) in &answer.calls {
                self.marker(Marker::ToolCalls);
                self.text(name);
                self.marker(Marker::Args);
                self.text(arguments);
            }
        } else if !answer.calls.is_empty() {
            self.marker(Marker::ToolCalls);
            for (index, (name, arguments)) in answer.calls.iter().enumerate() {
                self.text(if index == 0 { "[" } else { ", " });
                self.object(name, "arguments", arguments);
            }
            self.text("]");
        }
    }

    fn harmony(&mut self, reasoning: Option<&str>, answer: &Answer) {
        if let Some(reasoning) = reasoning {
            self.message("analysis", reasoning);
            self.next_message();
        }
        if answer.calls.is_empty() {
            self.message("final", &answer.text);
            return;
        }
        if !answer.text.is_empty() {
            self.message("commentary", &answer.text);
            self.next_message();
        }
        for (index, (name, arguments)) in answer.calls.iter().enumerate() {
            if index > 0 {
                self.marker(Marker::Call);
                self.start();
            }
            self.marker(Marker::Channel);
            self.text(&format!("commentary to=functions.{name} "));
            self.marker(Marker::Constrain);
            self.text("json");
            self.marker(Marker::Message);
            self.text(arguments);
        }
    }

    fn message(&mut self, channel: &str, content: &str) {
        self.marker(Marker::Channel);
        self.text(channel);
        self.marker(Marker::Message);
        self.text(content);
    }

    fn next_message(&mut self) {
        self.marker(Marker::End);
        self.start();
    }

    fn start(&mut self) {
        self.marker(Marker::Start);
        self.text("assistant");
    }
}
