//! One rule: an automaton that is stepped byte by byte, and what is asked of a match besides.

use std::sync::Arc;

use aho_corasick::{Anchored as LiteralAnchored, automaton::Automaton as _, nfa::contiguous};
use regex_automata::{
    Anchored,
    dfa::{Automaton as _, dense},
    util::{primitives::StateID, start},
};

use crate::event::Scope;

/// A rule, ready to be stepped.
#[derive(Debug)]
pub struct Rule {
    /// Names it: `group.name`.
    pub id: Arc<str>,
    /// The scopes that it looks at.
    pub scopes: Vec<Scope>,
    /// Names everything that it is made of.
    pub fingerprint: [u8; 32],
    pub(super) matcher: Matcher,
    pub(super) filter: Filter,
    /// A match that gets longer is cut here.
    pub(super) match_bytes_max: usize,
}

/// What finds a match from where it begins.
#[derive(Debug)]
pub(super) enum Matcher {
    Regex(Box<dense::DFA<Vec<u32>>>),
    Literals {
        automaton: Box<contiguous::NFA>,
        /// Only between characters that are not of words.
        whole_words: bool,
    },
}

/// Where the search for the end of a match stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    Regex(StateID),
    Literal {
        state: aho_corasick::automaton::StateID,
        read: usize,
    },
}

/// What a byte does to a search.
pub(super) struct Step {
    /// A match ends before the byte.
    pub(super) ends: bool,
    /// Where the search stands behind it; `None` where no longer match can come.
    pub(super) at: Option<At>,
}

impl Matcher {
    /// A search from here, with this byte before it. `None` where there can be no match.
    pub(super) fn begin(&self, before: Option<u8>) -> Option<At> {
        match self {
            Self::Regex(dfa) => {
                let config = start::Config::new().anchored(Anchored::Yes);
                let state = dfa.start_state(&config.look_behind(before)).ok()?;
                (!dfa.is_dead_state(state)).then_some(At::Regex(state))
            }
            Self::Literals {
                automaton,
                whole_words,
            } => {
                if *whole_words && before.is_some_and(is_word) {
                    return None;
                }
                let state = automaton.start_state(LiteralAnchored::Yes).ok()?;
                Some(At::Literal { state, read: 0 })
            }
        }
    }

    /// `None` for the byte is the end of the document.
    pub(super) fn step(&self, at: At, byte: Option<u8>) -> Step {
        match (self, at) {
            (Self::Regex(dfa), At::Regex(state)) => {
                let next = match byte {
                    Some(byte) => dfa.next_state(state, byte),
                    None => dfa.next_eoi_state(state),
                };
                // A dense automaton tells of a match one byte late.
                let ends = dfa.is_match_state(next);
                let goes_on = match ends {
                    true => goes_on(dfa, next),
                    false => !dfa.is_dead_state(next) && !dfa.is_quit_state(next),
                };
                Step {
                    ends,
                    at: goes_on.then_some(At::Regex(next)),
                }
            }
            (
                Self::Literals {
                    automaton,
                    whole_words,
                },
                At::Literal { state, read },
            ) => {
                let whole = || {
                    let mut ids = (0..automaton.match_len(state))
                        .map(|index| automaton.match_pattern(state, index));
                    // Those that end here and began later are not those of this search.
                    ids.any(|id| automaton.pattern_len(id) == read)
                };
                let bounded = !whole_words || !byte.is_some_and(is_word);
                let ends = bounded && automaton.is_match(state) && whole();
                let next = byte.map(|byte| {
                    let state = automaton.next_state(LiteralAnchored::Yes, state, byte);
                    let read = read + 1;
                    At::Literal { state, read }
                });
                let alive = |at: &At| match at {
                    At::Literal { state, .. } => !automaton.is_dead(*state),
                    At::Regex(_) => false,
                };
                Step {
                    ends,
                    at: next.filter(alive),
                }
            }
            // A search never leaves its rule.
            (Self::Regex(_), At::Literal { .. }) | (Self::Literals { .. }, At::Regex(_)) => Step {
                ends: false,
                at: None,
            },
        }
    }
}

/// Whether a match may still end behind this state.
fn goes_on(dfa: &dense::DFA<Vec<u32>>, state: StateID) -> bool {
    let alive = |byte| !dfa.is_dead_state(dfa.next_state(state, byte));
    (0..=u8::MAX).any(alive) || dfa.is_match_state(dfa.next_eoi_state(state))
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// What is asked of a match besides.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// One of them must stand in it, in any case of its letters. Lower case. Empty: none is asked for.
    pub(super) keywords: Vec<String>,
    /// Finds the group `secret`, whose entropy is looked at; else it is that of the whole match.
    pub(super) secret: Option<regex::bytes::Regex>,
    /// The least bits a byte.
    pub(super) entropy_min: f64,
    /// A sum that must be right.
    pub(super) checksum: Option<Checksum>,
    /// What matches one of them is let through.
    pub(super) allow: Option<regex::bytes::RegexSet>,
    /// The same for what contains one of them, in any case of its letters. Lower case.
    pub(super) allow_literals: Vec<String>,
}

/// A sum over a match that is right in real ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checksum {
    /// That of payment cards.
    Luhn,
    /// That of bank accounts, ISO 13616.
    Iban,
}

impl Filter {
    /// Whether this match is a finding.
    pub(super) fn passes(&self, matched: &[u8]) -> bool {
        let lower = matched.to_ascii_lowercase();
        let contains = |words: &[String]| {
            let mut words = words.iter();
            words.any(|word| memchr::memmem::find(&lower, word.as_bytes()).is_some())
        };
        if !self.keywords.is_empty() && !contains(&self.keywords) {
            return false;
        }
        if self.entropy_min > 0.0 {
            let found = self.secret.as_ref().and_then(|it| it.captures(matched));
            let secret = found.as_ref().and_then(|it| it.name("secret"));
            let secret = secret.map_or(matched, |it| it.as_bytes());
            if entropy(secret) < self.entropy_min {
                return false;
            }
        }
        let sums = match self.checksum {
            None => true,
            Some(Checksum::Luhn) => luhn(matched),
            Some(Checksum::Iban) => iban(matched),
        };
        let allowed = self.allow.as_ref().is_some_and(|it| it.is_match(matched));
        sums && !allowed && !contains(&self.allow_literals)
    }
}

/// Shannon's, in bits a byte.
fn entropy(bytes: &[u8]) -> f64 {
    let mut counts = [0_u32; 256];
    for byte in bytes {
        counts[usize::from(*byte)] += 1;
    }
    let len = bytes.len() as f64;
    let shares = counts.iter().filter(|count| **count > 0);
    let shares = shares.map(|count| f64::from(*count) / len);
    shares.map(|share| -share * share.log2()).sum()
}

fn luhn(bytes: &[u8]) -> bool {
    let digits = bytes.iter().rev().filter(|byte| byte.is_ascii_digit());
    let values = digits.enumerate().map(|(index, digit)| {
        let value = u32::from(digit - b'0') << (index % 2);
        if value > 9 { value - 9 } else { value }
    });
    values.sum::<u32>() % 10 == 0
}

fn iban(bytes: &[u8]) -> bool {
    let letters = bytes.iter().filter(|byte| byte.is_ascii_alphanumeric());
    let letters: Vec<u8> = letters.map(u8::to_ascii_uppercase).collect();
    if letters.len() < 5 {
        return false;
    }
    let turned = letters[4..].iter().chain(&letters[..4]);
    let rest = turned.fold(0_u32, |rest, letter| match letter {
        b'0'..=b'9' => (rest * 10 + u32::from(letter - b'0')) % 97,
        _ => (rest * 100 + u32::from(letter - b'A') + 10) % 97,
    });
    rest == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_entropy_are_those_of_the_books() {
        assert!(luhn(b"4111 1111 1111 1111"));
        assert!(!luhn(b"4111 1111 1111 1112"));
        assert!(iban(b"DE89 3704 0044 0532 0130 00"));
        assert!(iban(b"GB82WEST12345698765432"));
        assert!(!iban(b"GB82WEST12345698765433"));
        assert!((entropy(b"abcdabcd") - 2.0).abs() < 1e-9);
        assert!(entropy(b"aaaa").abs() < 1e-9);
    }
}
