//! The end of a server, in two steps that everything with a life of its own watches.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Tells connections and streams that the server stops. Cheap to clone; every clone is the same.
///
/// ```text
/// serving ── begin ──▶ draining ── stop, or the deadline ──▶ stopped
///    └───────────────────── stop ──────────────────────────────▲
/// ```
///
/// While draining, what runs may finish, and nothing new is let in. Once stopped, connections are
/// dropped with whatever they carry.
#[derive(Debug, Clone)]
pub struct Drain(Arc<Phases>);

#[derive(Debug)]
struct Phases {
    time: Duration,
    /// When the connections are cut; set before `draining` is cancelled.
    deadline: OnceLock<Instant>,
    draining: CancellationToken,
    stopped: CancellationToken,
}

impl Drain {
    /// A server that serves, and that will give its streams this long to end.
    #[must_use]
    pub fn new(time: Duration) -> Self {
        Self(Arc::new(Phases {
            time,
            deadline: OnceLock::new(),
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
        }))
    }

    /// Begins to drain. A second call changes nothing.
    pub fn begin(&self) {
        self.0.begin();
        self.0.draining.cancel();
    }

    /// Stops at once.
    pub fn stop(&self) {
        self.begin();
        self.0.stopped.cancel();
    }

    /// Whether the server drains or has stopped: nothing new may begin.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.0.draining.is_cancelled()
    }

    /// When connections will be cut. `None` while the server serves.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.0.deadline.get().copied()
    }

    /// Waits until the server drains; the answer is when connections will be cut.
    ///
    /// # Cancellation
    ///
    /// Dropping it loses nothing. Waiting anew takes a lock that all streams share: a loop makes
    /// the future once and pins it.
    pub fn draining(&self) -> impl Future<Output = Instant> + Send + 'static {
        let phases = Arc::clone(&self.0);
        let draining = self.0.draining.clone().cancelled_owned();
        async move {
            draining.await;
            phases.begin()
        }
    }

    /// Waits until the server has stopped. For a loop, as with [`Drain::draining`].
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        self.0.stopped.clone().cancelled_owned()
    }
}

impl Phases {
    /// The deadline, counted from the first call.
    fn begin(&self) -> Instant {
        *self.deadline.get_or_init(|| Instant::now() + self.time)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn draining_tells_the_deadline_and_stopping_comes_after_it() {
        let drain = Drain::new(Duration::from_secs(30));
        let (mut draining, mut stopped) = (Box::pin(drain.draining()), Box::pin(drain.stopped()));
        assert_eq!((&mut draining).now_or_never(), None);
        assert_eq!((drain.is_draining(), drain.deadline()), (false, None));

        let deadline = Instant::now() + Duration::from_secs(30);
        drain.begin();
        tokio::time::advance(Duration::from_secs(7)).await;
        drain.begin();
        assert_eq!(draining.now_or_never(), Some(deadline));
        assert_eq!(
            (drain.is_draining(), drain.deadline()),
            (true, Some(deadline))
        );
        assert_eq!((&mut stopped).now_or_never(), None);

        drain.clone().stop();
        assert_eq!(stopped.now_or_never(), Some(()));
    }

    #[tokio::test]
    async fn stopping_a_serving_server_drains_it_too() {
        let drain = Drain::new(Duration::ZERO);
        drain.stop();
        assert!(drain.is_draining());
        assert!(drain.draining().now_or_never().is_some());
    }
}
