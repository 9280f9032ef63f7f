//! Connections: accepted by a loop of our own, and driven by hyper until they end or are cut.
//!
//! tonic's own server leaves open what a public port must not: the number of connections, how
//! long one may stay silent before its preface, what happens when file descriptors run out, and
//! an end for a server whose streams do not end by themselves.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{error::Elapsed, sleep, sleep_until, timeout},
};
use tokio_util::task::TaskTracker;
use tonic::{service::Routes, transport::server::TcpConnectInfo};

use super::{Drain, call::Calls};
use crate::config;

/// What every HTTP/2 client sends first.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const PENDING_RESETS_MAX: usize = 100;
const LOCAL_RESETS_MAX: usize = 1024;
const HEADERS_BYTES_MAX: u32 = 16 << 10;
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
const FRAME_BYTES_MAX: u32 = 64 << 10;

/// How long the loop rests after it could not accept: from, doubling, at most.
const REST_MIN: Duration = Duration::from_millis(5);
const REST_MAX: Duration = Duration::from_secs(1);

/// Serves these routes on this listener until the server has drained.
///
/// Once draining, the listener is closed, each connection is told to open no more calls, and
/// the function returns when all of them have ended, or at the deadline of the drain, or as soon as the
/// drain is stopped; what is open then is dropped.
///
/// # Errors
///
/// The listener is broken. Running out of file descriptors or memory is no error: the loop rests
/// and tries again.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    options: &config::Server,
    drain: Drain,
) -> io::Result<()> {
    let server = Arc::new(Server {
        local: listener.local_addr()?,
        http: http2(options),
        calls: Calls::new(routes, options, drain.clone()),
        preface_time: Duration::from_secs(options.preface_secs_max),
        drain: drain.clone(),
    });
    let connections = TaskTracker::new();
    let seats = Arc::new(Semaphore::new(options.connections_max));

    // Whichever ends first, the listener is closed with the loop that owns it: a balancer sees at
    // once that it has to go elsewhere.
    let accepted = tokio::select! {
        biased;
        _ = drain.draining() => Ok(()),
        broken = accept(listener, seats, &connections, &server) => broken.map(|never| match never {}),
    };
    // For the broken listener: streams are told, and finish.
    drain.begin();
    tracing::info!(connections = connections.len(), "draining");
    connections.close();
    let deadline = drain.draining().await;
    tokio::select! {
        biased;
        () = connections.wait() => {}
        () = drain.stopped() => tracing::warn!(connections = connections.len(), "stopping at once"),
        () = sleep_until(deadline) => {
            tracing::warn!(connections = connections.len(), "the time to drain is over");
        }
    }
    drain.stop();
    connections.wait().await;
    accepted
}

/// Accepts connections for as long as it is polled. At the limit of connections it does not
/// accept: who comes then waits in the kernel's queue, and costs nothing here.
async fn accept(
    listener: TcpListener,
    seats: Arc<Semaphore>,
    connections: &TaskTracker,
    server: &Arc<Server>,
) -> io::Result<Infallible> {
    let mut rest = REST_MIN;
    loop {
        let seat = Arc::clone(&seats).acquire_owned().await;
        let seat = seat.map_err(io::Error::other)?;
        match listener.accept().await {
            Ok((socket, peer)) => {
                rest = REST_MIN;
                let server = Arc::clone(server);
                connections.spawn(async move {
                    if let Err(error) = server.connection(socket, peer).await {
                        tracing::debug!(%peer, %error, "connection lost");
                    }
                    drop(seat);
                });
            }
            Err(error) => match blame(&error) {
                Blame::Peer => {}
                Blame::Machine => {
                    // Without the rest this would spin: the connection stays in the queue, and
                    // the listener stays ready.
                    tracing::warn!(%error, ?rest, "cannot accept connections");
                    sleep(rest).await;
                    rest = (rest * 2).min(REST_MAX);
                }
                Blame::Listener => return Err(error),
            },
        }
    }
}

/// Whose fault it is that a connection could not be accepted.
#[derive(Debug, PartialEq, Eq)]
enum Blame {
    /// The connection was gone before it was accepted.
    Peer,
    /// File descriptors or memory are used up, or something else that may pass.
    Machine,
    /// The socket does not listen.
    Listener,
}

fn blame(error: &io::Error) -> Blame {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, InvalidInput};
    let kind = error.kind();
    if [ConnectionAborted, ConnectionReset, ConnectionRefused].contains(&kind) {
        Blame::Peer
    } else if kind == InvalidInput {
        Blame::Listener
    } else {
        Blame::Machine
    }
}

/// What all connections share.
struct Server {
    local: SocketAddr,
    http: http2::Builder<TokioExecutor>,
    calls: Calls,
    preface_time: Duration,
    drain: Drain,
}

impl Server {
    /// Drives one connection to its end.
    ///
    /// # Errors
    ///
    /// The peer did not speak HTTP/2, broke its rules, or is gone.
    async fn connection(&self, socket: TcpStream, peer: SocketAddr) -> Result<(), Lost> {
        // Without it, small messages wait for acknowledgements: 40 ms instead of 20 µs.
        socket.set_nodelay(true)?;
        let (mut reader, writer) = socket.into_split();
        let mut draining = pin!(self.drain.draining());
        tokio::select! {
            biased;
            // It has no call yet that could be finished.
            _ = &mut draining => return Ok(()),
            heard = hear_preface(&mut reader, self.preface_time) => heard?,
        }

        // hyper reads the preface once more.
        let io = TokioIo::new(tokio::io::join(PREFACE.chain(reader), writer));
        let local = self.local;
        let open = Arc::new(());
        let service = service_fn(|mut request: http::Request<Incoming>| {
            request.extensions_mut().insert(TcpConnectInfo {
                local_addr: Some(local),
                remote_addr: Some(peer),
            });
            let (calls, open) = (self.calls.clone(), open.clone());
            async move {
                let answer = calls.answer(request, peer).await;
                Ok::<_, Infallible>(answer.map(|body| body.counted(open)))
            }
        });
        let mut stopped = pin!(self.drain.stopped());
        let mut connection = pin!(self.http.serve_connection(io, service));
        tokio::select! {
            biased;
            _ = &mut draining => connection.as_mut().graceful_shutdown(),
            ended = in_its_turn(connection.as_mut(), &open) => return Ok(ended?),
        }
        tokio::select! {
            biased;
            () = &mut stopped => Ok(()),
            ended = in_its_turn(connection, &open) => Ok(ended?),
        }
    }
}

/// Drives a connection whenever it is woken; where several calls are open on it, not before what else
/// is ready has had its turn: so the events of all streams that are there by then leave in one write.
async fn in_its_turn<C: Future + Unpin>(mut connection: C, open: &Arc<()>) -> C::Output {
    let mut waited = false;
    poll_fn(|cx| {
        let several = Arc::strong_count(open) > 2;
        waited = several && !waited;
        if waited {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut connection).poll(cx)
    })
    .await
}

/// Why a connection ended before its time.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("it said nothing in time")]
    Silent(#[from] Elapsed),
    #[error("it does not speak HTTP/2")]
    Stranger,
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

/// Reads the preface. hyper and h2 would wait for it for ever.
async fn hear_preface(reader: &mut (impl AsyncRead + Unpin), time: Duration) -> Result<(), Lost> {
    let mut heard = [0; PREFACE.len()];
    timeout(time, reader.read_exact(&mut heard)).await??;
    if heard == PREFACE {
        Ok(())
    } else {
        Err(Lost::Stranger)
    }
}

/// How HTTP/2 is spoken.
fn http2(options: &config::Server) -> http2::Builder<TokioExecutor> {
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        // Bounds what one connection can take. Clients queue silently above it, so it is a net
        // and not the way to say that the server is full.
        .max_concurrent_streams(options.streams_per_connection_max)
        // Calls that were cancelled before we looked at them (rapid reset). A client that gives up
        // on a handful of calls at once is honest; h2 allows 20.
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        // Calls that a client's breach of the rules made us reset (MadeYouReset): each costs
        // work and counts against no other limit.
        .max_local_error_reset_streams(LOCAL_RESETS_MAX)
        // Metadata of a call. The names and the key of a client take a few hundred bytes.
        .max_header_list_size(HEADERS_BYTES_MAX)
        // Pings find peers that vanished without a word, which would hold their seat for ever.
        .keep_alive_interval(Duration::from_secs(options.keepalive_secs))
        .keep_alive_timeout(Duration::from_secs(options.keepalive_timeout_secs))
        // What waits for a client that does not read, per call; hyper's default is 400 KB.
        .max_send_buf_size(options.send_buffer_bytes_max)
        // A large create arrives in few round trips, and one call that is read late does not use up
        // the window of its connection. Never the adaptive window: it starts at 64 KB.
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX);
    http
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[test]
    fn who_is_to_blame_for_a_connection_that_was_not_accepted() {
        // By their numbers on Linux: ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EINVAL.
        for (code, expected) in [
            (103, Blame::Peer),
            (24, Blame::Machine),
            (23, Blame::Machine),
            (105, Blame::Machine),
            (12, Blame::Machine),
            (22, Blame::Listener),
        ] {
            let error = io::Error::from_raw_os_error(code);
            assert_eq!(blame(&error), expected, "{error}");
        }
    }

    /// Hears a preface that comes in two pieces, each this many seconds after the one before.
    async fn hear_in_pieces(first_secs: u64, second_secs: u64) -> Result<(), Lost> {
        let (mut writer, mut reader) = tokio::io::duplex(64);
        let (first, second) = PREFACE.split_at(10);
        tokio::spawn(async move {
            for (piece, secs) in [(first, first_secs), (second, second_secs)] {
                sleep(Duration::from_secs(secs)).await;
                writer.write_all(piece).await.unwrap();
            }
            // The connection stays open.
            std::future::pending::<()>().await;
        });
        hear_preface(&mut reader, Duration::from_secs(5)).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_preface_may_come_in_pieces_but_not_late() {
        hear_in_pieces(2, 2).await.unwrap();
        let late = hear_in_pieces(2, 4).await.unwrap_err();
        assert!(matches!(late, Lost::Silent(_)), "{late}");
    }
}
