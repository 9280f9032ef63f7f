//! Rules over a document, byte by byte.
//!
//! What is found, in words: for each rule, from left to right, the first place where a match begins, and
//! of the matches that begin there the longest; the search goes on behind it. A match that gets longer
//! than the rule's `match_bytes_max` is cut there, and a search that has found none by then is given up,
//! with those that had run into it. Then a match is asked what else the rule asks, and what does not
//! pass is no finding.
//!
//! For each place where a match may begin, a *search* steps the rule's automaton from there; two that
//! come to stand in the same state find the same from then on, so the later one is dropped. So there are
//! seldom more than a few, each is some words, and they are all that is carried, beside the text from the
//! first of them on.

use std::{ops::Range, sync::Arc};

use super::{
    monitor::{Finding, Monitor},
    rule::{At, Rule},
};

/// With as many searches at once no more are begun. Only rules of which many matches may wait for the
/// end of one that began before them come near it.
const SEARCHES_MAX: usize = 256;

/// Rules that look at the same documents.
#[derive(Debug)]
pub struct Scanner {
    rules: Vec<Arc<Rule>>,
    /// The searches that begin with each byte, by what stands before it.
    starters: Vec<Vec<(u16, At)>>,
    /// Finds keywords. `None` where no rule has any.
    keywords: Option<aho_corasick::AhoCorasick>,
    /// The rule of each keyword.
    keyword_rules: Vec<u16>,
}

/// What is carried while a document is read.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Bytes read.
    at: usize,
    searches: Vec<Search>,
    /// The text from the first search on, and some before it.
    tail: Vec<u8>,
    /// The byte before the next one.
    before: Option<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Search {
    rule: u16,
    start: usize,
    /// The longest match so far.
    end: Option<usize>,
    /// `None`: it can get no longer, but waits for one that began before it.
    at: Option<At>,
}

impl State {
    /// Bytes read so far.
    #[must_use]
    pub fn read(&self) -> usize {
        self.at
    }

    /// Where the first match may have begun of which the end is not known yet, of those rules that
    /// `counts` is true for; the end of what was read where there is none.
    pub fn open_from(&self, counts: impl Fn(usize) -> bool) -> usize {
        let searches = self.searches.iter();
        let mut starts = searches.filter(|it| counts(usize::from(it.rule)));
        starts.next().map_or(self.at, |first| first.start)
    }
}

impl Scanner {
    /// For these rules.
    #[must_use]
    pub fn new(rules: Vec<Arc<Rule>>) -> Self {
        let numbered = || (0_u16..).zip(&rules);
        let starters = BEFORE.into_iter().flat_map(|before| {
            (0..=u8::MAX).map(move |byte| {
                let begun = numbered().filter_map(|(index, rule)| {
                    let at = rule.matcher.begin(before)?;
                    Some((index, rule.matcher.step(at, Some(byte)).at?))
                });
                // No match begins within a character.
                begun.filter(|_| !continues(byte)).collect()
            })
        });
        let starters = starters.collect();
        let words = numbered().flat_map(|(index, rule)| {
            let words = rule.filter.keywords.iter();
            words.map(move |word| (word.as_str(), index))
        });
        let (words, keyword_rules): (Vec<&str>, Vec<u16>) = words.unzip();
        let keywords = aho_corasick::AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .build(words)
            .ok()
            .filter(|_| !keyword_rules.is_empty());
        Self {
            rules,
            starters,
            keywords,
            keyword_rules,
        }
    }

    /// The rules, in the order in which findings number them.
    #[must_use]
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    /// The rules that may find something in a whole document: a match holds a keyword of its rule.
    fn possible(&self, text: &[u8]) -> Vec<bool> {
        let without = |rule: &Arc<Rule>| rule.filter.keywords.is_empty();
        let mut possible: Vec<bool> = self.rules.iter().map(without).collect();
        let Some(keywords) = &self.keywords else {
            return possible;
        };
        let mut missing = possible.iter().filter(|it| !**it).count();
        for found in keywords.find_overlapping_iter(text) {
            let rule = usize::from(self.keyword_rules[found.pattern().as_usize()]);
            if !std::mem::replace(&mut possible[rule], true) {
                missing -= 1;
                if missing == 0 {
                    break;
                }
            }
        }
        possible
    }

    /// Reads one byte; `None` is the end of the document.
    fn step(&self, state: &mut State, byte: Option<u8>, over: &mut Vec<(u16, Range<usize>)>) {
        let at = state.at;
        let mut closed = false;
        for search in &mut state.searches {
            let rule = &self.rules[usize::from(search.rule)];
            if let Some(place) = search.at {
                let step = rule.matcher.step(place, byte);
                if step.ends && at > search.start {
                    search.end = Some(at);
                }
                search.at = step.at.filter(|_| at - search.start < rule.match_bytes_max);
                closed |= search.at.is_none();
            }
        }
        if closed {
            self.close(&mut state.searches, over);
        }
        if state.searches.len() > 1 {
            merge(&mut state.searches);
        }
    }

    /// Takes the searches that have ended, first ones first.
    fn close(&self, searches: &mut Vec<Search>, over: &mut Vec<(u16, Range<usize>)>) {
        let mut index = 0;
        while let Some(search) = searches.get(index).copied() {
            let mut earlier = searches[..index].iter();
            let waits = earlier.any(|other| other.rule == search.rule);
            match (search.at, search.end) {
                (None, None) => {
                    searches.remove(index);
                }
                (None, Some(end)) if !waits => {
                    over.push((search.rule, search.start..end));
                    // It goes on behind the match.
                    searches.retain(|it| it.rule != search.rule || it.start >= end);
                }
                (Some(_), _) | (None, Some(_)) => index += 1,
            }
        }
    }

    /// Begins the searches that may begin with this byte.
    fn begin(&self, state: &mut State, byte: u8, possible: Option<&[bool]>) {
        let place = before_class(state.before) * 256 + usize::from(byte);
        for &(index, at) in &self.starters[place] {
            if possible.is_some_and(|it| !it[usize::from(index)]) {
                continue;
            }
            let same = |other: &Search| other.rule == index && other.at == Some(at);
            let room = state.searches.len() < SEARCHES_MAX;
            if room && !state.searches.iter().any(same) {
                state.searches.push(Search {
                    rule: index,
                    start: state.at,
                    end: None,
                    at: Some(at),
                });
            }
        }
    }

    /// What is asked of matches besides, and where they lie between characters.
    fn sift(
        &self,
        (tail, from): (&[u8], usize),
        over: &mut Vec<(u16, Range<usize>)>,
        found: &mut Vec<Finding>,
    ) {
        for (rule, range) in over.drain(..) {
            let rule = usize::from(rule);
            let matched = &tail[range.start - from..range.end - from];
            if self.rules[rule].filter.passes(matched) {
                let rest = tail[range.end - from..].iter();
                let rest = rest.take_while(|byte| continues(**byte)).count();
                found.push(Finding {
                    rule,
                    bytes: range.start..range.end + rest,
                });
            }
        }
    }
}

/// What may stand before a search, as far as an automaton can tell it apart.
const BEFORE: [Option<u8>; 5] = [None, Some(b'\n'), Some(b'\r'), Some(b'a'), Some(b' ')];

/// Which of them this is.
fn before_class(before: Option<u8>) -> usize {
    match before {
        None => 0,
        Some(b'\n') => 1,
        Some(b'\r') => 2,
        Some(byte) if byte.is_ascii_alphanumeric() || byte == b'_' => 3,
        Some(_) => 4,
    }
}

/// Whether a byte goes on with a character.
fn continues(byte: u8) -> bool {
    byte & 0xC0 == 0x80
}

/// Of two searches in the same state the later one is dropped, unless it has found something that the
/// earlier one may not cover; and one that began within a match of an earlier one.
fn merge(searches: &mut Vec<Search>) {
    let mut index = 1;
    while index < searches.len() {
        let search = searches[index];
        let covered = searches[..index].iter().any(|earlier| {
            let same = search.end.is_none() && earlier.at == search.at;
            let within = earlier.end.is_some_and(|end| search.start < end);
            earlier.rule == search.rule && (same || within)
        });
        if covered {
            searches.remove(index);
        } else {
            index += 1;
        }
    }
}

impl Monitor for Scanner {
    type State = State;

    fn read(&self, state: &mut State, text: &str, last: bool, found: &mut Vec<Finding>) {
        let bytes = text.as_bytes();
        let whole = last && state.at == 0;
        let possible = whole.then(|| self.possible(bytes));
        if possible.as_ref().is_some_and(|it| !it.contains(&true)) {
            state.at = bytes.len();
            return;
        }
        state.tail.extend_from_slice(bytes);
        let from = state.at + bytes.len() - state.tail.len();
        let first = state.at;
        let mut over = Vec::new();
        while let Some(&byte) = bytes.get(state.at - first) {
            if !state.searches.is_empty() {
                self.step(state, Some(byte), &mut over);
            }
            self.begin(state, byte, possible.as_deref());
            state.before = Some(byte);
            state.at += 1;
        }
        if last {
            self.step(state, None, &mut over);
            for search in &mut state.searches {
                search.at = None;
            }
            self.close(&mut state.searches, &mut over);
        }
        self.sift((&state.tail, from), &mut over, found);
        let keep = state.open_from(|_| true).max(from) - from;
        state.tail.drain(..keep);
    }
}

#[cfg(test)]
mod tests;
