//! The contract of [`Connections`]: tickets, connections, and what they are subscribed to.

use chrono::TimeDelta;
use futures_util::future::join_all;
use shared::api::admin::{KeyLimits, Scope};
use shared::auth::Identity;
use shared::ports::{Connection, Connections, Subscribed, Ticket};
use shared::push::MAX_SUBSCRIPTIONS;
use uuid::Uuid;

use super::start;

fn identity(caller: &str) -> Identity {
    let limits = KeyLimits { requests_per_minute: Some(7), ..KeyLimits::default() };
    Identity {
        caller: caller.to_owned(),
        scopes: vec![Scope::Jobs],
        key_id: Some("0123456789ab".to_owned()),
        limits,
        expires_at: None,
    }
}

/// The contract of [`Connections`] about tickets.
pub async fn tickets_suite(connections: &impl Connections) {
    let now = start();
    let ticket = |name: &str| Ticket {
        sha256: name.repeat(64),
        identity: identity("alice"),
        expires_at: now + TimeDelta::seconds(60),
    };
    for name in ["a", "b", "c"] {
        connections.put_ticket(&ticket(name)).await.unwrap();
    }
    // Of many that use one at once, one gets it, as it was.
    let taken = join_all((0..8).map(async |_| connections.take_ticket(&ticket("a").sha256, now).await)).await;
    let taken: Vec<_> = taken.into_iter().filter_map(Result::unwrap).collect();
    assert_eq!(taken, [ticket("a")]);
    // An expired one is none, and none later either.
    let end = ticket("b").expires_at;
    assert_eq!(connections.take_ticket(&ticket("b").sha256, end).await.unwrap(), None);
    assert_eq!(connections.take_ticket(&ticket("b").sha256, now).await.unwrap(), None);
    assert_eq!(connections.take_ticket(&ticket("d").sha256, now).await.unwrap(), None);
    let just = end - TimeDelta::milliseconds(1);
    assert_eq!(connections.take_ticket(&ticket("c").sha256, just).await.unwrap(), Some(ticket("c")));
}

/// The contract of [`Connections`] about connections and what they are subscribed to.
pub async fn connections_suite(connections: &impl Connections) {
    let end = start() + TimeDelta::hours(2);
    let connection =
        |id: &str, caller: &str| Connection { id: id.to_owned(), identity: identity(caller), expires_at: end };
    let (first, second) = (connection("one=", "alice"), connection("two=", "bob"));
    let (job, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let told = async |job| {
        let mut told = connections.subscribers(job).await.unwrap();
        told.sort_by(|a, b| a.connection.cmp(&b.connection));
        told.into_iter().map(|subscriber| (subscriber.connection, subscriber.caller)).collect::<Vec<_>>()
    };
    // Nobody subscribes who is not there.
    assert_eq!(connections.subscribe(&first, job).await.unwrap(), Subscribed::Gone);
    assert_eq!(told(job).await, []);
    connections.open(&first).await.unwrap();
    connections.open(&second).await.unwrap();
    assert_eq!(connections.find("one=").await.unwrap(), Some(first.clone()));
    assert_eq!(connections.find("three=").await.unwrap(), None);
    // Once or twice is the same.
    for (connection, job) in [(&first, job), (&first, job), (&first, other), (&second, job)] {
        assert_eq!(connections.subscribe(connection, job).await.unwrap(), Subscribed::Done);
    }
    let pair = |id: &str, caller: &str| (id.to_owned(), caller.to_owned());
    assert_eq!(told(job).await, [pair("one=", "alice"), pair("two=", "bob")]);
    assert_eq!(told(other).await, [pair("one=", "alice")]);
    // Who leaves leaves nothing behind; again, nothing happens.
    for _ in 0..2 {
        connections.close("one=").await.unwrap();
        assert_eq!((told(job).await, told(other).await), (vec![pair("two=", "bob")], vec![]));
    }
    assert_eq!(connections.find("one=").await.unwrap(), None);
    assert_eq!(connections.subscribe(&first, job).await.unwrap(), Subscribed::Gone);
    // A connection has its fill.
    for number in 1..MAX_SUBSCRIPTIONS as u128 {
        let job = Uuid::from_u128(100 + number);
        assert_eq!(connections.subscribe(&second, job).await.unwrap(), Subscribed::Done, "{number}");
    }
    assert_eq!(connections.subscribe(&second, Uuid::from_u128(7)).await.unwrap(), Subscribed::TooMany);
    assert_eq!(told(Uuid::from_u128(7)).await, []);
    // What it has, it may have again.
    assert_eq!(connections.subscribe(&second, job).await.unwrap(), Subscribed::Done);
    connections.close("two=").await.unwrap();
    assert_eq!(told(job).await, []);
}
