//! A wire to a server that can be cut, or fall silent.

use std::net::SocketAddr;

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tonic::transport::Endpoint;

use crate::{client::Client, program::Program};

/// How a wire is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Carries,
    Silent,
    Cut,
}

/// Carries one connection.
pub(crate) struct Wire {
    state: watch::Sender<State>,
    address: SocketAddr,
}

impl Wire {
    /// A wire, and a client at its end.
    pub(crate) async fn to(program: &Program) -> (Self, Client) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (state, mut watched) = watch::channel(State::Carries);
        let wire = Self {
            state,
            address: listener.local_addr().unwrap(),
        };
        let server = program.address;
        tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(server).await.unwrap();
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                _ = watched.wait_for(|state| *state != State::Carries) => {}
            }
            // Both sockets stay open, and nobody reads them any more.
            let _ = watched.wait_for(|state| *state == State::Cut).await;
        });
        let endpoint = Endpoint::from_shared(format!("http://{}", wire.address)).unwrap();
        let client = Client::through(endpoint).await;
        (wire, client)
    }

    /// Closes the connection on both sides at once.
    pub(crate) fn cut(&self) {
        self.state.send_replace(State::Cut);
    }

    /// Nothing gets through any more, and nobody is told.
    pub(crate) fn fall_silent(&self) {
        self.state.send_replace(State::Silent);
    }
}
