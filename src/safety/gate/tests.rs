use proptest::prelude::*;

use super::*;
use crate::{
    item::Tenant,
    safety::{Choice, Policies, PolicyOptions, Rules, Scopes},
};

fn policy(text: &str, choice: Choice, hold_bytes_max: usize) -> Arc<Policy> {
    let rules = Rules::parse(&format!("version = 1\n{text}")).unwrap();
    let scopes = Scopes {
        model_output: choice,
        ..Scopes::default()
    };
    let options = PolicyOptions {
        scopes,
        hold_bytes_max,
        ..PolicyOptions::default()
    };
    let policies = Policies::new(rules, Vec::new(), vec![options]).unwrap();
    policies.get("model", &Tenant::from("tenant")).unwrap()
}

const RULES: &str =
    "[[rule]]\nid = \"a\"\nregex = 'AB*C|B+D'\n[[rule]]\nid = \"b\"\nregex = 'C[AB]{2}'\n";

/// What passes of a text in these pieces, what is found, and the most bytes that waited.
fn pass(policy: &Arc<Policy>, pieces: &[&str]) -> (Passed, usize) {
    let mut gate = Gate::new(policy, Scope::ModelOutput).unwrap();
    let (mut all, mut held) = (Passed::default(), 0);
    for (index, piece) in pieces.iter().enumerate() {
        let passed = gate.push(piece, index + 1 == pieces.len());
        all.text.push_str(&passed.text);
        all.found.extend(passed.found);
        held = held.max(gate.text.len() - gate.gone.min(gate.text.len()));
        if let Some(at) = passed.ends_at {
            all.ends_at = Some(at);
            break;
        }
        assert_eq!(all.text, gate.passed());
    }
    (all, held)
}

#[test]
fn matches_that_overlap_are_one_place_under_the_first_name() {
    let policy = policy(RULES, Choice::Redact, 4096);
    let (passed, _) = pass(&policy, &["x ABBCAA y CAB"]);
    assert_eq!(passed.text, "x [redacted:a] y [redacted:b]");
    let found: Vec<_> = passed
        .found
        .iter()
        .map(|it| (&*it.rule, it.bytes.clone()))
        .collect();
    assert_eq!(found, [("a", 2..6), ("b", 5..8), ("b", 11..14)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn what_passes_does_not_depend_on_the_pieces_and_no_match_does(
        text in "[ABCDé ]{0,80}",
        places in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        choice in prop::sample::select(vec![Choice::Redact, Choice::End, Choice::Observe]),
        hold in prop::sample::select(vec![64, 4096]),
    ) {
        let policy = policy(RULES, choice, hold);
        let mut places: Vec<usize> = places
            .iter()
            .map(|it| text.floor_char_boundary(it.index(text.len() + 1)))
            .chain([0, text.len()])
            .collect();
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|it| &text[it[0]..it[1]]).collect();
        let (whole, _) = pass(&policy, &[&text]);
        let (passed, held) = pass(&policy, &pieces);
        prop_assert_eq!(&passed, &whole);
        prop_assert!(held <= hold);
        prop_assert_eq!(whole.ends_at.is_some(), choice == Choice::End && !whole.found.is_empty());
        let late = whole.found.iter().any(|it| it.late);
        match choice {
            Choice::Observe => prop_assert_eq!(whole.text, text),
            Choice::Redact | Choice::End if !late => {
                let (left, _) = pass(&policy, &[&whole.text]);
                let joined = |it: &&Found| !whole.text[it.bytes.clone()].contains(['[', ']']);
                // Only what was apart may match together, and that is not how a text is read.
                let in_one = left.found.iter().filter(joined).count();
                prop_assert_eq!(in_one, 0, "{} of {}", whole.text, text);
                if let Some(at) = whole.ends_at {
                    prop_assert!(text.starts_with(&whole.text) && at == whole.text.len());
                }
            }
            Choice::Redact | Choice::End | Choice::Off | Choice::Refuse => {}
        }
    }
}
