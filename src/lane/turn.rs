//! Whose turn it is on a lane, and what stops a response.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::{CancellationToken, DropGuard};

use crate::item::RequestId;

/// A response's time on its lane, at first still to end. The next one waits for its end.
#[derive(Debug, Clone, Default)]
pub struct Turn(Arc<Ending>);

#[derive(Debug, Default)]
struct Ending {
    over: CancellationToken,
    /// The turn to wait for instead, where this one was given up before it came.
    instead: OnceLock<Turn>,
}

impl Turn {
    /// The turn of nobody: already over.
    #[must_use]
    pub fn over() -> Self {
        let turn = Self::default();
        turn.0.over.cancel();
        turn
    }

    /// Whether the next one need not wait.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.latest().0.over.is_cancelled()
    }

    /// Ends it when this is dropped.
    pub(super) fn end_with(&self) -> DropGuard {
        self.0.over.clone().drop_guard()
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) {
        let mut turn = self.latest();
        turn.0.over.cancelled().await;
        while let Some(before) = turn.0.instead.get() {
            turn = before.clone();
            turn.0.over.cancelled().await;
        }
    }

    /// Gives the turn up before it came: whoever waits for it waits for the one before it. Nothing
    /// of it is kept, so creates that are cancelled while they wait do not pile up.
    pub(super) fn give_up(&self, before: &Self) {
        let _ = self.0.instead.set(before.latest());
        self.0.over.cancel();
    }

    /// The turn that stands for this one now.
    pub(super) fn latest(&self) -> Self {
        let mut turn = self.clone();
        while let Some(before) = turn.0.instead.get() {
            turn = before.clone();
        }
        turn
    }
}

/// What stops a response: a request, with who asked, or what ends with it on its stream.
#[derive(Debug)]
pub struct Cancel {
    token: CancellationToken,
    request_id: OnceLock<RequestId>,
}

impl Cancel {
    /// Stops also when `token` does, of which this is a child: so that a response looks at one place.
    #[must_use]
    pub fn with(token: &CancellationToken) -> Self {
        Self {
            token: token.child_token(),
            request_id: OnceLock::new(),
        }
    }

    /// Asks for the stop. The first one to ask is answered.
    pub fn request(&self, request_id: RequestId) {
        let _ = self.request_id.set(request_id);
        self.token.cancel();
    }

    /// Waits for the stop.
    pub(super) async fn fired(&self) {
        self.token.cancelled().await;
    }

    /// What the request is called that asked for it, where one did.
    pub(super) fn asked_by(&self) -> Option<&RequestId> {
        self.request_id.get()
    }
}
