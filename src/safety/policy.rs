//! Policies: which rules and classifiers look at which scopes of which models and tenants, and what is done about
//! what they find.

use std::{collections::HashMap, fmt, sync::Arc};

use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Classifier, Rule, Rules, Scanner};
use crate::{
    event::{Action, Scope},
    item::Tenant,
};

/// Entries of a configuration.
const POLICIES_MAX: usize = 64;

/// One entry of the configuration. All entries that are for a model and a tenant hold together; where
/// a rule is in several of them, the strongest action does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyOptions {
    /// The models that it is for, by name. Empty: all.
    pub models: Vec<String>,
    /// The tenants that it is for. Empty: all.
    pub tenants: Vec<String>,
    /// The rules: an id, or the beginning of some with `*` behind it. Empty: all, or none where classifiers are named.
    pub rules: Vec<String>,
    /// The classifiers, by name.
    pub classifiers: Vec<String>,
    /// What waits for what classifiers say of input.
    pub gate: GateAt,
    /// What is done in each scope.
    pub scopes: Scopes,
    /// The most bytes of output that are held back because they may become a match, or because a classifier has not
    /// judged them yet: then sampling waits.
    pub hold_bytes_max: usize,
}

/// What waits for what classifiers say of input. The order is that of strictness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateAt {
    /// The first event: the model prefills and samples meanwhile.
    #[default]
    Output,
    /// The sample: nothing of it is begun before, but the engine may prefill.
    Sampling,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            tenants: Vec::new(),
            rules: Vec::new(),
            classifiers: Vec::new(),
            gate: GateAt::default(),
            scopes: Scopes::default(),
            hold_bytes_max: 4096,
        }
    }
}

/// What is done in each scope about what is found there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "named as the scopes are")]
pub struct Scopes {
    pub user_input: Choice,
    pub tool_output: Choice,
    pub model_output: Choice,
    pub reasoning: Choice,
}

impl Default for Scopes {
    fn default() -> Self {
        Self {
            user_input: Choice::Observe,
            tool_output: Choice::Observe,
            model_output: Choice::Off,
            reasoning: Choice::Off,
        }
    }
}

/// An action, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// The scope is not looked at.
    Off,
    /// See [`Action::Observe`].
    Observe,
    /// See [`Action::Redact`].
    Redact,
    /// See [`Action::Refuse`].
    Refuse,
    /// See [`Action::End`].
    End,
}

impl Choice {
    fn action(self) -> Option<Action> {
        match self {
            Self::Off => None,
            Self::Observe => Some(Action::Observe),
            Self::Redact => Some(Action::Redact),
            Self::Refuse => Some(Action::Refuse),
            Self::End => Some(Action::End),
        }
    }
}

const SCOPES: [Scope; 4] = [
    Scope::UserInput,
    Scope::ToolOutput,
    Scope::ModelOutput,
    Scope::Reasoning,
];

impl Scopes {
    fn action(self, scope: Scope) -> Option<Action> {
        match scope {
            Scope::UserInput => self.user_input.action(),
            Scope::ToolOutput => self.tool_output.action(),
            Scope::ModelOutput => self.model_output.action(),
            Scope::Reasoning => self.reasoning.action(),
        }
    }
}

impl PolicyOptions {
    /// Holds its numbers against their ranges.
    ///
    /// # Errors
    ///
    /// Which of them is out of its range.
    pub fn check(&self) -> Result<(), String> {
        if !(64..=1 << 20).contains(&self.hold_bytes_max) {
            return Err("hold_bytes_max is not from 64 to 1048576".to_owned());
        }
        let scopes = SCOPES.map(|scope| self.scopes.action(scope));
        if !self.classifiers.is_empty() && scopes.contains(&Some(Action::Redact)) {
            let why = "a classifier judges a text as a whole, so it cannot redact: give it a policy of its own";
            return Err(format!("scopes: {why}"));
        }
        Ok(())
    }

    fn is_for(&self, model: &str, tenant: &Tenant) -> bool {
        let names =
            |list: &[String], name: &str| list.is_empty() || list.iter().any(|it| it == name);
        names(&self.models, model) && names(&self.tenants, tenant.as_str())
    }

    fn takes(&self, rule: &Rule) -> bool {
        match self.rules.is_empty() {
            true => self.classifiers.is_empty(),
            false => self.rules.iter().any(|pattern| fits(pattern, &rule.id)),
        }
    }
}

fn fits(pattern: &str, id: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => id.starts_with(start),
        None => pattern == id,
    }
}

/// Names everything that a verdict depends on: the rules and what is done about them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Version(Arc<str>);

impl Version {
    /// 16 hexadecimal digits.
    #[must_use]
    pub fn as_str(&self) -> &Arc<str> {
        &self.0
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What holds for a model and a tenant.
#[derive(Debug)]
pub struct Policy {
    version: Version,
    guards: [Option<Guard>; SCOPES.len()],
    asked: [Vec<Asked>; SCOPES.len()],
    gate: GateAt,
    hold_bytes_max: usize,
}

/// A classifier that is asked about a scope.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) classifier: Arc<Classifier>,
    /// What is done about what it finds.
    pub(super) action: Action,
}

/// What looks at a scope.
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) scanner: Scanner,
    /// What is done about each rule.
    pub(super) actions: Vec<Action>,
}

impl Policy {
    fn new(all: &All, options: &[&PolicyOptions]) -> Self {
        let rules = &all.rules;
        let mut hash = Sha256::new();
        hash.update(b"hotloop safety 1");
        let guards = SCOPES.map(|scope| {
            let wanted = rules.all().iter().filter_map(|rule| {
                let takes = options.iter().filter(|it| it.takes(rule));
                let action = takes.filter_map(|it| it.scopes.action(scope)).max()?;
                rule.scopes.contains(&scope).then(|| (rule.clone(), action))
            });
            let (rules, actions): (Vec<Arc<Rule>>, Vec<Action>) = wanted.unzip();
            for (rule, action) in rules.iter().zip(&actions) {
                hash.update([scope as u8, *action as u8]);
                hash.update(rule.fingerprint);
            }
            (!rules.is_empty()).then(|| Guard {
                scanner: Scanner::new(rules),
                actions,
            })
        });
        let asked = SCOPES.map(|scope| {
            let asked = all.classifiers.iter().filter_map(|classifier| {
                let name = &classifier.options().name;
                let names = options.iter().filter(|it| it.classifiers.contains(name));
                let action = names.filter_map(|it| it.scopes.action(scope)).max()?;
                hash.update([scope as u8, action as u8]);
                hash.update(classifier.fingerprint());
                let classifier = classifier.clone();
                Some(Asked { classifier, action })
            });
            asked.collect()
        });
        let holds = options.iter().map(|it| it.hold_bytes_max).max();
        let hold_bytes_max = holds.unwrap_or(0);
        let gate = options.iter().map(|it| it.gate).max().unwrap_or_default();
        hash.update(hold_bytes_max.to_le_bytes());
        let digest: [u8; 32] = hash.finalize().into();
        let name: String = digest[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self {
            version: Version(name.into()),
            guards,
            asked,
            gate,
            hold_bytes_max,
        }
    }

    /// What waits for what classifiers say of input.
    #[must_use]
    pub fn gate(&self) -> GateAt {
        self.gate
    }

    /// The classifiers that are asked about this scope.
    pub(super) fn asked(&self, scope: Scope) -> &[Asked] {
        &self.asked[scope as usize]
    }

    /// Whether a classifier is asked about anything.
    #[must_use]
    pub fn has_classifiers(&self) -> bool {
        self.asked.iter().any(|asked| !asked.is_empty())
    }

    /// Whether a classifier is asked about this scope.
    #[must_use]
    pub fn asks(&self, scope: Scope) -> bool {
        !self.asked(scope).is_empty()
    }

    /// Whether what a classifier says of this scope may keep it back.
    #[must_use]
    pub fn withholds(&self, scope: Scope) -> bool {
        self.asked(scope)
            .iter()
            .any(|it| it.action >= Action::Refuse)
    }

    /// How much output is judged at once. `None`: no classifier is asked about any.
    #[must_use]
    pub fn output_bytes(&self) -> Option<usize> {
        let asked = self.asked(Scope::ModelOutput).iter();
        let asked = asked.chain(self.asked(Scope::Reasoning));
        let pieces = asked.map(|it| it.classifier.options().output_bytes);
        // More than may be held back is never judged at once.
        Some(pieces.min()?.min(self.hold_bytes_max))
    }

    /// How much of what stands before a text its classifiers are shown, at most.
    #[must_use]
    pub fn window_bytes(&self) -> usize {
        let windows = self.asked.iter().flatten();
        let windows = windows.map(|it| it.classifier.options().window_bytes);
        windows.max().unwrap_or(0)
    }

    /// Names it.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.version
    }

    pub(super) fn guard(&self, scope: Scope) -> Option<&Guard> {
        self.guards[scope as usize].as_ref()
    }

    /// The most bytes of output that are held back.
    #[must_use]
    pub fn hold_bytes_max(&self) -> usize {
        self.hold_bytes_max
    }
}

/// Why policies cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// There are too many.
    #[error("there are more than {POLICIES_MAX} policies")]
    TooMany,
    /// A number is out of its range.
    #[error("policy[{index}].{reason}")]
    Range {
        /// Which policy.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// A policy names a rule that does not exist.
    #[error("policy[{index}].rules: no rule fits `{pattern}`")]
    NoRule {
        /// Which policy.
        index: usize,
        /// The name.
        pattern: String,
    },
    /// A policy names a classifier that does not exist.
    #[error("policy[{index}].classifiers: no classifier has the name `{name}`")]
    NoClassifier {
        /// Which policy.
        index: usize,
        /// The name.
        name: String,
    },
}

/// All policies. They may be replaced while conversations go on.
#[derive(Debug, Default)]
pub struct Policies(RwLock<Arc<All>>);

#[derive(Debug, Default)]
struct All {
    rules: Rules,
    classifiers: Vec<Arc<Classifier>>,
    options: Vec<PolicyOptions>,
    /// What was made of them, by which of them hold together.
    made: Mutex<HashMap<Vec<bool>, Arc<Policy>>>,
}

impl Policies {
    /// Those of these entries over these rules and classifiers.
    ///
    /// # Errors
    ///
    /// What is wrong with an entry.
    pub fn new(
        rules: Rules,
        classifiers: Vec<Arc<Classifier>>,
        options: Vec<PolicyOptions>,
    ) -> Result<Self, PolicyError> {
        if options.len() > POLICIES_MAX {
            return Err(PolicyError::TooMany);
        }
        for (index, policy) in options.iter().enumerate() {
            policy
                .check()
                .map_err(|reason| PolicyError::Range { index, reason })?;
            let known = |pattern: &&String| rules.all().iter().any(|rule| fits(pattern, &rule.id));
            if let Some(pattern) = policy.rules.iter().find(|it| !known(it)) {
                let pattern = pattern.clone();
                return Err(PolicyError::NoRule { index, pattern });
            }
            let known = |name: &&String| classifiers.iter().any(|it| it.options().name == **name);
            if let Some(name) = policy.classifiers.iter().find(|it| !known(it)) {
                let name = name.clone();
                return Err(PolicyError::NoClassifier { index, name });
            }
        }
        Ok(Self(RwLock::new(Arc::new(All {
            rules,
            classifiers,
            options,
            made: Mutex::default(),
        }))))
    }

    /// From now on those of `other` hold. What was begun goes on under those that it began with.
    pub fn replace(&self, other: Self) {
        *self.0.write() = other.0.into_inner();
    }

    /// What holds for this model and tenant. `None`: nothing is checked.
    #[must_use]
    pub fn get(&self, model: &str, tenant: &Tenant) -> Option<Arc<Policy>> {
        let all = self.0.read().clone();
        let options = all.options.iter();
        let holds: Vec<bool> = options.map(|it| it.is_for(model, tenant)).collect();
        if !holds.contains(&true) {
            return None;
        }
        let mut made = all.made.lock();
        if let Some(policy) = made.get(&holds) {
            return Some(policy.clone());
        }
        let chosen = all.options.iter().zip(&holds).filter(|(_, holds)| **holds);
        let chosen: Vec<&PolicyOptions> = chosen.map(|(options, _)| options).collect();
        let policy = Arc::new(Policy::new(&all, &chosen));
        made.insert(holds, policy.clone());
        Some(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str =
        "version = 1\n[[rule]]\nid = \"a.x\"\nregex = 'x'\n[[rule]]\nid = \"b.y\"\nregex = 'y'\n";

    fn policies(options: Vec<PolicyOptions>) -> Result<Policies, PolicyError> {
        Policies::new(Rules::parse(RULES).unwrap(), Vec::new(), options)
    }

    #[test]
    fn the_version_changes_with_what_a_verdict_depends_on_and_with_nothing_else() {
        let version = |options: Vec<PolicyOptions>, tenant: &str| {
            let policy = policies(options).unwrap().get("m", &Tenant::from(tenant));
            policy.map(|policy| policy.version().clone())
        };
        let base = PolicyOptions::default();
        let all = version(vec![base.clone()], "t");
        assert_eq!(all.as_ref().unwrap().as_str().len(), 16);
        let same = PolicyOptions {
            models: vec!["m".to_owned()],
            rules: vec!["a.*".to_owned(), "b.y".to_owned()],
            ..base.clone()
        };
        assert_eq!(version(vec![same], "t"), all);
        let fewer = PolicyOptions {
            rules: vec!["a.*".to_owned()],
            ..base.clone()
        };
        assert_ne!(version(vec![fewer.clone()], "t"), all);
        assert_eq!(version(vec![fewer.clone(), base.clone()], "t"), all);
        let stronger = PolicyOptions {
            scopes: Scopes {
                user_input: Choice::Redact,
                ..Scopes::default()
            },
            ..fewer
        };
        assert_ne!(version(vec![stronger, base.clone()], "t"), all);
        let others = PolicyOptions {
            tenants: vec!["u".to_owned()],
            ..base
        };
        assert_eq!(version(vec![others.clone()], "t"), None);
        assert_eq!(version(vec![others], "u"), all);
        assert_eq!(version(Vec::new(), "t"), None);
    }

    #[test]
    fn policies_that_cannot_be_are_named() {
        let error = |options: PolicyOptions| policies(vec![options]).unwrap_err().to_string();
        assert_eq!(
            error(PolicyOptions {
                rules: vec!["c.*".to_owned()],
                ..PolicyOptions::default()
            }),
            "policy[0].rules: no rule fits `c.*`"
        );
        assert_eq!(
            error(PolicyOptions {
                hold_bytes_max: 1,
                ..PolicyOptions::default()
            }),
            "policy[0].hold_bytes_max is not from 64 to 1048576"
        );
    }
}
