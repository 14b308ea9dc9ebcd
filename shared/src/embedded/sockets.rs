//! The WebSockets of this host: tickets, connections and subscriptions in memory, and a bounded
//! outbox for each connection.
//!
//! Nothing of it outlives the process, and nothing needs to: the process's end ends its connections,
//! and a client that connects anew subscribes again and is told the latest state.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use uuid::Uuid;

use crate::auth::{LOCAL, tickets};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ports::{Connection, Connections, Push, Pushed, Subscribed, Ticket};
use crate::push::{MAX_SUBSCRIPTIONS, Subscriber};

/// What may wait for one client, in bytes. One that reads more slowly is let go, and finds the latest
/// state when it comes again.
const MAX_WAITING_BYTES: usize = 256 * 1024;
/// Connections of one host; with the line above that is 256 MB where nobody reads.
const MAX_CONNECTIONS: usize = 1000;
/// Those of one caller, so that none keeps all others out. On a host without keys all are one caller's, and
/// on this machine.
const MAX_CONNECTIONS_OF_CALLER: usize = MAX_CONNECTIONS / 2;
/// What a caller that has too many is told to wait.
const FULL_RETRY_SECONDS: u32 = 30;
/// Tickets that are not used yet.
const MAX_TICKETS: usize = 10_000;

/// The connections of this host.
#[derive(Clone, Default)]
pub struct Hub {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    tickets: HashMap<String, Ticket>,
    open: HashMap<String, Open>,
    subscriptions: HashMap<Uuid, BTreeSet<String>>,
    /// The host stops: nobody is let in any more.
    closed: bool,
}

struct Open {
    connection: Connection,
    jobs: BTreeSet<Uuid>,
    sender: UnboundedSender<String>,
    waiting: Arc<AtomicUsize>,
    /// Until the connection's own task takes it.
    outbox: Option<Outbox>,
}

/// What waits to be sent over one connection.
pub struct Outbox {
    receiver: UnboundedReceiver<String>,
    waiting: Arc<AtomicUsize>,
}

impl Outbox {
    /// The next frame; `None` where the hub has let the connection go.
    pub async fn next(&mut self) -> Option<String> {
        let frame = self.receiver.recv().await?;
        self.waiting.fetch_sub(frame.len(), Ordering::Relaxed);
        Some(frame)
    }
}

impl Hub {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The outbox of a connection that was opened, once.
    #[must_use]
    pub fn outbox(&self, id: &str) -> Option<Outbox> {
        self.state().open.get_mut(id)?.outbox.take()
    }

    /// Lets all connections go, and nobody in.
    pub fn shut(&self) {
        let mut state = self.state();
        *state = State { closed: true, ..State::default() };
    }

    /// How many are connected.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state().open.len()
    }

    /// Whether nobody is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl State {
    /// Whether this caller may open one more.
    fn has_room(&self, caller: &str) -> Result<(), Error> {
        if self.closed || self.open.len() >= MAX_CONNECTIONS {
            return Err(Error::unavailable("A connection", "too many are connected, or the host stops"));
        }
        let own = self.open.values().filter(|open| open.connection.identity.caller == caller).count();
        if caller != LOCAL && own >= MAX_CONNECTIONS_OF_CALLER {
            let words = format!("You have {MAX_CONNECTIONS_OF_CALLER} connections. Close one, or follow more by each.");
            return Err(Error::too_many_requests(words, FULL_RETRY_SECONDS));
        }
        Ok(())
    }

    fn close(&mut self, id: &str) {
        let Some(open) = self.open.remove(id) else { return };
        for job in open.jobs {
            if let Some(connections) = self.subscriptions.get_mut(&job) {
                connections.remove(id);
                if connections.is_empty() {
                    self.subscriptions.remove(&job);
                }
            }
        }
    }
}

impl Connections for Hub {
    async fn put_ticket(&self, ticket: &Ticket) -> Result<(), Error> {
        let mut state = self.state();
        if state.tickets.len() >= MAX_TICKETS {
            // Those that have expired make room.
            let now = ticket.expires_at - tickets::TTL;
            state.tickets.retain(|_, kept| now < kept.expires_at);
            if state.tickets.len() >= MAX_TICKETS {
                return Err(Error::unavailable("A ticket", "too many tickets are not used"));
            }
        }
        state.tickets.insert(ticket.sha256.clone(), ticket.clone());
        Ok(())
    }

    async fn take_ticket(&self, sha256: &str, now: Timestamp) -> Result<Option<Ticket>, Error> {
        let mut state = self.state();
        if let Some(ticket) = state.tickets.get(sha256) {
            // Or it would be used up for nothing.
            state.has_room(&ticket.identity.caller)?;
        }
        Ok(state.tickets.remove(sha256).filter(|ticket| now < ticket.expires_at))
    }

    async fn open(&self, connection: &Connection) -> Result<(), Error> {
        let mut state = self.state();
        state.has_room(&connection.identity.caller)?;
        let (sender, receiver) = unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let outbox = Some(Outbox { receiver, waiting: Arc::clone(&waiting) });
        let open = Open { connection: connection.clone(), jobs: BTreeSet::new(), sender, waiting, outbox };
        state.open.insert(connection.id.clone(), open);
        Ok(())
    }

    async fn find(&self, id: &str) -> Result<Option<Connection>, Error> {
        Ok(self.state().open.get(id).map(|open| open.connection.clone()))
    }

    async fn subscribe(&self, connection: &Connection, job: Uuid) -> Result<Subscribed, Error> {
        let mut state = self.state();
        let Some(open) = state.open.get_mut(&connection.id) else { return Ok(Subscribed::Gone) };
        if !open.jobs.contains(&job) && open.jobs.len() >= MAX_SUBSCRIPTIONS {
            return Ok(Subscribed::TooMany);
        }
        open.jobs.insert(job);
        state.subscriptions.entry(job).or_default().insert(connection.id.clone());
        Ok(Subscribed::Done)
    }

    async fn subscribers(&self, job: Uuid) -> Result<Vec<Subscriber>, Error> {
        let state = self.state();
        let connections = state.subscriptions.get(&job).into_iter().flatten();
        let open = connections.filter_map(|id| state.open.get(id)).map(|open| &open.connection);
        let subscriber =
            |open: &Connection| Subscriber { caller: open.identity.caller.clone(), connection: open.id.clone() };
        Ok(open.map(subscriber).collect())
    }

    async fn close(&self, id: &str) -> Result<(), Error> {
        self.state().close(id);
        Ok(())
    }
}

impl Push for Hub {
    async fn push(&self, connection: &str, frame: String) -> Result<Pushed, Error> {
        let mut state = self.state();
        let Some(open) = state.open.get(connection) else { return Ok(Pushed::Gone) };
        let waiting = open.waiting.fetch_add(frame.len(), Ordering::Relaxed) + frame.len();
        if waiting > MAX_WAITING_BYTES || open.sender.send(frame).is_err() {
            tracing::warn!(
                error.code = "slow_client",
                socket.connection = connection,
                "client that does not read let go"
            );
            state.close(connection);
            return Ok(Pushed::Gone);
        }
        Ok(Pushed::Sent)
    }
}
