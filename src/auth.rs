//! Who calls: API keys, and the layer that asks for them before a call's body is touched.
//!
//! Keys are kept as digests only. A call that is let in carries its [`Principal`] in its
//! extensions; everything that belongs to somebody is looked up by the tenant in there.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::{Either, Ready, ready};
use http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::{item::Tenant, status::refusal};

/// The environment variable that holds the keys.
pub const KEYS_VARIABLE: &str = "HOTLOOP_API_KEYS";

/// Calls under this prefix need no key: a load balancer that asks for our health has none.
const OPEN_PREFIX: &str = "/grpc.health.v1.Health/";

/// A shorter key could be found by trying.
const KEY_CHARACTERS_MIN: usize = 16;
const KEY_CHARACTERS_MAX: usize = 256;
const TENANT_CHARACTERS_MAX: usize = 64;

/// Who makes a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// Whose data the call may see.
    pub tenant: Tenant,
    /// Names the key without telling it: eight hexadecimal digits, fit for logs. `local` where no
    /// key was asked for.
    pub key_id: Arc<str>,
}

impl Principal {
    /// Everybody, where no key is asked for.
    fn local() -> Self {
        Self {
            tenant: "local".into(),
            key_id: "local".into(),
        }
    }
}

/// When a key is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Wherever keys are configured, and on every address that is not loopback.
    Auto,
    /// Always.
    Required,
    /// Never: everybody who reaches the port is the tenant `local`.
    Off,
}

/// The accepted keys, as digests. Its `Debug` shows tenants and key ids.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Keys(Vec<Entry>);

#[derive(Clone, PartialEq, Eq)]
struct Entry {
    digest: [u8; 32],
    principal: Principal,
}

impl Keys {
    /// Reads `tenant:key` pairs, separated by commas. A tenant may have several keys, so that one
    /// can be replaced without a gap.
    ///
    /// # Errors
    ///
    /// What is wrong with which pair, counted from 1. A key itself is never repeated.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let mut entries: Vec<Entry> = Vec::new();
        for (position, pair) in (1..).zip(text.split(',').map(str::trim)) {
            let (tenant, key) = pair.split_once(':').ok_or(KeysError::Pair { position })?;
            if !is_tenant(tenant) {
                return Err(KeysError::Tenant { position });
            }
            if !is_key(key) {
                return Err(KeysError::Key { position });
            }
            let digest = digest(key);
            if entries.iter().any(|entry| entry.digest == digest) {
                return Err(KeysError::Twice { position });
            }
            entries.push(Entry {
                digest,
                principal: Principal {
                    tenant: tenant.into(),
                    key_id: key_id(&digest),
                },
            });
        }
        Ok(Self(entries))
    }

    /// Whether there is no key at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whose key this is. Takes the same time for every key of a length, known or not: every digest
    /// is compared to its end, and none of the comparisons branches.
    fn find(&self, key: &str) -> Option<&Principal> {
        let digest = digest(key);
        let mut found = u32::MAX;
        for (index, entry) in (0..).zip(&self.0) {
            found.conditional_assign(&index, entry.digest.ct_eq(&digest));
        }
        let entry = self.0.get(usize::try_from(found).ok()?)?;
        Some(&entry.principal)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let principals = self.0.iter().map(|entry| &entry.principal);
        f.debug_list().entries(principals).finish()
    }
}

fn is_tenant(text: &str) -> bool {
    (1..=TENANT_CHARACTERS_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

fn is_key(text: &str) -> bool {
    (KEY_CHARACTERS_MIN..=KEY_CHARACTERS_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn key_id(digest: &[u8; 32]) -> Arc<str> {
    let [first, second, third, fourth, ..] = digest;
    format!("{first:02x}{second:02x}{third:02x}{fourth:02x}").into()
}

/// What is wrong with the configured keys. Positions count pairs from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// A pair has no colon.
    #[error("pair {position} is not of the form tenant:key")]
    Pair {
        /// Which pair.
        position: usize,
    },
    /// A tenant has a name that is not allowed.
    #[error(
        "the tenant of pair {position} is not 1 to {TENANT_CHARACTERS_MAX} characters of letters, digits, _ . -"
    )]
    Tenant {
        /// Which pair.
        position: usize,
    },
    /// A key is too short, too long, or cannot be sent in a header.
    #[error(
        "the key of pair {position} is not {KEY_CHARACTERS_MIN} to {KEY_CHARACTERS_MAX} visible ASCII characters"
    )]
    Key {
        /// Which pair.
        position: usize,
    },
    /// A key would stand for two tenants.
    #[error("the key of pair {position} was given before")]
    Twice {
        /// Which pair.
        position: usize,
    },
}

/// Decides who gets in. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Rule>);

#[derive(Debug)]
enum Rule {
    /// Everybody is this one.
    Open(Principal),
    /// Only who shows a key.
    Keys(Keys),
}

impl Gate {
    /// The gate for a server that listens on this address.
    ///
    /// # Errors
    ///
    /// Where keys are asked for and there are none, nobody could get in.
    pub fn new(mode: Mode, listen: SocketAddr, keys: Keys) -> Result<Self, GateError> {
        let asks = match mode {
            Mode::Auto => !keys.is_empty() || !listen.ip().is_loopback(),
            Mode::Required => true,
            Mode::Off => false,
        };
        let rule = if !asks {
            Rule::Open(Principal::local())
        } else if !keys.is_empty() {
            Rule::Keys(keys)
        } else {
            return Err(match mode {
                Mode::Auto | Mode::Off => GateError::Exposed { listen },
                Mode::Required => GateError::Required,
            });
        };
        Ok(Self(Arc::new(rule)))
    }

    /// Whether a key is asked for.
    #[must_use]
    pub fn asks_for_keys(&self) -> bool {
        match *self.0 {
            Rule::Open(_) => false,
            Rule::Keys(_) => true,
        }
    }

    /// Who makes the call that has these headers.
    ///
    /// # Errors
    ///
    /// UNAUTHENTICATED, with the reason `API_KEY_MISSING` or `API_KEY_INVALID`.
    pub fn admit(&self, headers: &HeaderMap) -> Result<Principal, Status> {
        let keys = match &*self.0 {
            Rule::Open(principal) => return Ok(principal.clone()),
            Rule::Keys(keys) => keys,
        };
        let mut values = headers.get_all(AUTHORIZATION).iter();
        // With two values, a proxy before us may have judged by the other one.
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(refusal(
                Code::Unauthenticated,
                "API_KEY_MISSING",
                "send one API key in the header authorization: Bearer <key>",
            ));
        };
        value
            .to_str()
            .ok()
            .and_then(bearer_token)
            .and_then(|token| keys.find(token))
            .cloned()
            .ok_or_else(|| {
                refusal(
                    Code::Unauthenticated,
                    "API_KEY_INVALID",
                    "the header authorization holds no known API key",
                )
            })
    }
}

/// The token of `Bearer <token>`; the scheme is case-insensitive.
fn bearer_token(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim_matches(' '))
}

/// Why a server with these settings must not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// Others than this machine could reach the port, and nothing would hold them back.
    #[error(
        "{listen} is not a loopback address and there are no API keys: set {KEYS_VARIABLE}=tenant:key, or auth.mode = \"off\" where something else guards the port"
    )]
    Exposed {
        /// Where the server would listen.
        listen: SocketAddr,
    },
    /// Keys are required and there are none.
    #[error("auth.mode is \"required\" and there are no API keys: set {KEYS_VARIABLE}=tenant:key")]
    Required,
}

/// Puts a [`Principal`] into the extensions of every call, or refuses it.
#[derive(Debug, Clone)]
pub struct AuthLayer(Gate);

impl AuthLayer {
    /// The layer for this gate.
    #[must_use]
    pub fn new(gate: Gate) -> Self {
        Self(gate)
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth {
            gate: self.0.clone(),
            inner,
        }
    }
}

/// The service of [`AuthLayer`].
#[derive(Debug, Clone)]
pub struct Auth<S> {
    gate: Gate,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Auth<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if !request.uri().path().starts_with(OPEN_PREFIX) {
            match self.gate.admit(request.headers()) {
                Ok(principal) => {
                    let span = tracing::Span::current();
                    span.record("tenant", principal.tenant.as_str());
                    span.record("key", &*principal.key_id);
                    request.extensions_mut().insert(principal);
                }
                Err(status) => return Either::Right(ready(Ok(status.into_http()))),
            }
        }
        Either::Left(self.inner.call(request))
    }
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;

    use tonic_types::StatusExt as _;

    use super::*;

    const TEXT: &str = "acme:0123456789abcdef,globex:fedcba9876543210, acme:another-key-of-acme";

    fn local() -> SocketAddr {
        "127.0.0.1:50051".parse().unwrap()
    }

    fn public() -> SocketAddr {
        "0.0.0.0:50051".parse().unwrap()
    }

    fn gate() -> Gate {
        Gate::new(Mode::Required, local(), Keys::parse(TEXT).unwrap()).unwrap()
    }

    fn headers(values: &[&'static str]) -> HeaderMap {
        values
            .iter()
            .map(|value| (AUTHORIZATION, value.parse().unwrap()))
            .collect()
    }

    fn tenant(values: &[&'static str]) -> Result<String, String> {
        match gate().admit(&headers(values)) {
            Ok(principal) => Ok(principal.tenant.to_string()),
            Err(status) => {
                assert_eq!(status.code(), Code::Unauthenticated);
                let info = status.get_details_error_info().unwrap();
                assert_eq!(info.domain, "hotloop");
                Err(info.reason)
            }
        }
    }

    #[test]
    fn a_key_says_who_calls() {
        assert_eq!(tenant(&["Bearer 0123456789abcdef"]), Ok("acme".into()));
        assert_eq!(tenant(&["bearer another-key-of-acme"]), Ok("acme".into()));
        assert_eq!(tenant(&["BEARER  fedcba9876543210 "]), Ok("globex".into()));
    }

    #[test]
    fn everything_else_is_refused() {
        let invalid = Err("API_KEY_INVALID".into());
        assert_eq!(tenant(&["Bearer 0123456789abcdeF"]), invalid);
        assert_eq!(tenant(&["Bearer 0123456789abcde"]), invalid);
        assert_eq!(tenant(&["Bearer "]), invalid);
        assert_eq!(tenant(&["0123456789abcdef"]), invalid);
        assert_eq!(tenant(&["Basic 0123456789abcdef"]), invalid);
        assert_eq!(tenant(&["Bearer \u{e9}"]), invalid);
        let missing = Err("API_KEY_MISSING".into());
        assert_eq!(tenant(&[]), missing);
        assert_eq!(
            tenant(&["Bearer 0123456789abcdef", "Bearer fedcba9876543210"]),
            missing
        );
    }

    #[test]
    fn debug_and_errors_tell_no_key() {
        let keys = Keys::parse(TEXT).unwrap();
        let shown = format!("{keys:?} {:?}", gate());
        for secret in ["0123456789abcdef", "fedcba", "another"] {
            assert!(!shown.contains(secret), "{shown}");
        }
        // The id is the start of the digest, as `printf %s KEY | sha256sum` shows it.
        assert_eq!(&*keys.0[0].principal.key_id, "9f9f5111");
        assert_eq!(
            Keys::parse("acme:0123456789abcdef,globex:secret"),
            Err(KeysError::Key { position: 2 })
        );
        assert_eq!(Keys::parse(""), Err(KeysError::Pair { position: 1 }));
        assert_eq!(
            Keys::parse("a b:0123456789abcdef"),
            Err(KeysError::Tenant { position: 1 })
        );
        assert_eq!(
            Keys::parse("acme:0123456789abcdef,globex:0123456789abcdef"),
            Err(KeysError::Twice { position: 2 })
        );
    }

    #[test]
    fn the_mode_the_address_and_the_keys_decide() {
        let asks = |mode, listen, keys| {
            Gate::new(mode, listen, keys).map(|gate: Gate| gate.asks_for_keys())
        };
        let keys = || Keys::parse(TEXT).unwrap();
        let none = Keys::default;
        assert_eq!(asks(Mode::Auto, local(), none()), Ok(false));
        assert_eq!(asks(Mode::Auto, local(), keys()), Ok(true));
        assert_eq!(asks(Mode::Auto, public(), keys()), Ok(true));
        assert_eq!(
            asks(Mode::Auto, public(), none()),
            Err(GateError::Exposed { listen: public() })
        );
        assert_eq!(asks(Mode::Required, local(), keys()), Ok(true));
        assert_eq!(
            asks(Mode::Required, local(), none()),
            Err(GateError::Required)
        );
        assert_eq!(asks(Mode::Off, public(), keys()), Ok(false));
    }

    #[tokio::test]
    async fn health_is_open_and_carries_nobody() {
        let service = AuthLayer::new(gate()).layer(tower::service_fn(
            async |request: Request<()>| -> Result<Response<String>, Status> {
                let principal = request.extensions().get::<Principal>();
                Ok(Response::new(
                    principal.map_or("nobody".into(), |it| it.tenant.to_string()),
                ))
            },
        ));
        let ask = |path: &str, values: &[&'static str]| {
            let mut request = Request::builder().uri(path).body(()).unwrap();
            *request.headers_mut() = headers(values);
            service.clone().oneshot(request)
        };
        let good = &["Bearer 0123456789abcdef"];

        let health = ask("/grpc.health.v1.Health/Check", &[]).await.unwrap();
        assert_eq!(health.body(), "nobody");
        let own = ask("/hotloop.v1.ModelsService/ListModels", good)
            .await
            .unwrap();
        assert_eq!(own.body(), "acme");

        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let refused = ask(reflection, &[]).await.unwrap();
        assert_eq!(refused.headers()["grpc-status"], "16");
        assert_eq!(refused.body(), "");
        let near = ask("/grpc.health.v1.Healthy/Check", &[]).await.unwrap();
        assert_eq!(near.headers()["grpc-status"], "16");
    }
}
