//! The markers of all families, and how they are found in ordinary text.

/// A piece of text with which a family separates reasoning, text and calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Marker {
    /// `<think>`
    Think,
    /// `</think>`
    ThinkEnd,
    /// `<tool_call>`
    ToolCall,
    /// `</tool_call>`
    ToolCallEnd,
    /// `<|python_tag|>`
    PythonTag,
    /// `[THINK]`
    BracketThink,
    /// `[/THINK]`
    BracketThinkEnd,
    /// `[TOOL_CALLS]`
    ToolCalls,
    /// `[CALL_ID]`
    CallId,
    /// `[ARGS]`
    Args,
    /// `<|start|>`
    Start,
    /// `<|channel|>`
    Channel,
    /// `<|constrain|>`
    Constrain,
    /// `<|message|>`
    Message,
    /// `<|end|>`
    End,
    /// `<|call|>`
    Call,
    /// `<|return|>`
    Return,
}

impl Marker {
    const ALL: [Self; 17] = [
        Self::Think,
        Self::ThinkEnd,
        Self::ToolCall,
        Self::ToolCallEnd,
        Self::PythonTag,
        Self::BracketThink,
        Self::BracketThinkEnd,
        Self::ToolCalls,
        Self::CallId,
        Self::Args,
        Self::Start,
        Self::Channel,
        Self::Constrain,
        Self::Message,
        Self::End,
        Self::Call,
        Self::Return,
    ];

    /// The marker as a model writes it: ASCII, and its first byte stands nowhere else in it, so that a beginning
    /// which turns out not to be a marker cannot hide the beginning of another.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Think => "<think>",
            Self::ThinkEnd => "</think>",
            Self::ToolCall => "<tool_call>",
            Self::ToolCallEnd => "</tool_call>",
            Self::PythonTag => "<|python_tag|>",
            Self::BracketThink => "[THINK]",
            Self::BracketThinkEnd => "[/THINK]",
            Self::ToolCalls => "[TOOL_CALLS]",
            Self::CallId => "[CALL_ID]",
            Self::Args => "[ARGS]",
            Self::Start => "<|start|>",
            Self::Channel => "<|channel|>",
            Self::Constrain => "<|constrain|>",
            Self::Message => "<|message|>",
            Self::End => "<|end|>",
            Self::Call => "<|call|>",
            Self::Return => "<|return|>",
        }
    }
}

/// A set of markers. Which of them are added tokens of a tokenizer is asked once a model, see [`Markers::added`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Markers(u32);

impl Markers {
    /// The markers, of every family, that are added tokens of the tokenizer that `is_added` asks.
    pub fn added(is_added: &dyn Fn(&str) -> bool) -> Self {
        Marker::ALL
            .into_iter()
            .filter(|marker| is_added(marker.text()))
            .collect()
    }

    pub(super) const fn of(markers: &[Marker]) -> Self {
        let mut set = 0;
        let mut index = 0;
        while index < markers.len() {
            set |= 1 << markers[index] as u32;
            index += 1;
        }
        Self(set)
    }

    pub(super) fn contains(self, marker: Marker) -> bool {
        self.0 & 1 << marker as u32 != 0
    }

    pub(super) fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    pub(super) fn and(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    pub(super) fn iter(self) -> impl Iterator<Item = Marker> {
        Marker::ALL
            .into_iter()
            .filter(move |&marker| self.contains(marker))
    }

    /// The marker of this set that `text` is.
    pub(super) fn find(self, text: &str) -> Option<Marker> {
        self.iter().find(|marker| marker.text() == text)
    }
}

impl FromIterator<Marker> for Markers {
    fn from_iter<I: IntoIterator<Item = Marker>>(markers: I) -> Self {
        Self(
            markers
                .into_iter()
                .fold(0, |set, marker| set | 1 << marker as u32),
        )
    }
}

/// Finds markers in text that comes in pieces; holds back what may be the beginning of one.
#[derive(Debug, Default)]
pub(super) struct Lexer {
    /// A proper prefix of an active marker, or empty.
    held: String,
}

/// What the beginning of some text is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lexeme<'a> {
    /// Text without a marker, all that is certain.
    Text(&'a str),
    /// Text that was held back and is no marker; none of the given text was used.
    Released(String),
    Marker(Marker),
    /// The rest of the text is held back.
    Held,
}

impl Lexer {
    /// Reads the beginning of `text`, and says how many bytes of it were used. `active` must stay the same while
    /// anything is held back, and its markers must share their first byte.
    pub(super) fn next<'a>(&mut self, active: Markers, text: &'a str) -> (Lexeme<'a>, usize) {
        let mut used = 0;
        if self.held.is_empty() {
            let first = active
                .iter()
                .next()
                .and_then(|marker| marker.text().bytes().next());
            match first.and_then(|first| memchr::memchr(first, text.as_bytes())) {
                None => return (Lexeme::Text(text), text.len()),
                Some(0) => {
                    self.held.push_str(&text[..1]);
                    used = 1;
                }
                Some(at) => return (Lexeme::Text(&text[..at]), at),
            }
        }
        for &byte in &text.as_bytes()[used..] {
            let longer = active.iter().find(|marker| {
                let marker = marker.text().as_bytes();
                marker.starts_with(self.held.as_bytes())
                    && marker.get(self.held.len()) == Some(&byte)
            });
            let Some(marker) = longer else {
                return (Lexeme::Released(self.release()), used);
            };
            self.held.push(char::from(byte));
            used += 1;
            if self.held.len() == marker.text().len() {
                self.held.clear();
                return (Lexeme::Marker(marker), used);
            }
        }
        (Lexeme::Held, used)
    }

    /// Gives back what is held, which nothing can complete any more.
    pub(super) fn release(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::Family;

    #[test]
    fn a_marker_s_first_byte_stands_nowhere_else_in_it_and_is_its_family_s() {
        for family in Family::ALL {
            let firsts: Vec<u8> = family
                .markers()
                .iter()
                .map(|marker| marker.text().as_bytes()[0])
                .collect();
            assert!(
                firsts.windows(2).all(|pair| pair[0] == pair[1]),
                "{family:?}"
            );
        }
        for marker in Marker::ALL {
            let text = marker.text();
            assert!(text.is_ascii() && !text[1..].contains(&text[..1]), "{text}");
            assert!(
                Marker::ALL
                    .iter()
                    .all(|other| *other == marker || !other.text().starts_with(text)),
                "{text}"
            );
        }
    }

    #[test]
    fn every_marker_is_in_the_set_of_all() {
        let all = Markers::added(&|_| true);
        assert_eq!(all.iter().count(), Marker::ALL.len());
        assert!(
            Marker::ALL
                .iter()
                .all(|marker| all.find(marker.text()) == Some(*marker))
        );
        assert_eq!(Markers::added(&|_| false), Markers::default());
    }

    #[test]
    fn a_false_beginning_is_released_before_the_next() {
        let active = Markers::of(&[Marker::ToolCall, Marker::ToolCallEnd]);
        let mut lexer = Lexer::default();
        assert_eq!(lexer.next(active, "a<tool"), (Lexeme::Text("a"), 1));
        assert_eq!(lexer.next(active, "<tool"), (Lexeme::Held, 5));
        assert_eq!(
            lexer.next(active, "</tool_call>"),
            (Lexeme::Released("<tool".to_owned()), 0)
        );
        assert_eq!(
            lexer.next(active, "</tool_call>b"),
            (Lexeme::Marker(Marker::ToolCallEnd), 12)
        );
    }
}
