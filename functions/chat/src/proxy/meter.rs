//! Lets requests in by the limits of their keys, and settles what they took.
//!
//! Triggered by every request of a key to a model, before it goes out and after its end. Reads and
//! writes the key's account: what has come together while the last write was under way is one write.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use shared::account::{Account, Ask, Left, Lefts, Refused, Used};
use shared::api::admin::KeyLimits;
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::error::{Code, Error};
use shared::ports::Callers;
use tokio::sync::oneshot;
use uuid::Uuid;

/// Rounds against other processes on one account; in each, one of them gets through.
const MAX_ROUNDS: u32 = 50;
/// The longest pause between two rounds.
const PAUSE: Duration = Duration::from_millis(20);
/// Before what a request took is entered again, where the store was not available.
const AGAIN_AFTER: [Duration; 3] = [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];
const WHAT: &str = "the account of this key";

/// The accounts, and the time that they go by.
pub struct Meter<C> {
    callers: C,
    clock: Clock,
    /// By the key.
    lines: Mutex<HashMap<String, Arc<Line>>>,
}

/// What wants to change one account.
#[derive(Default)]
struct Line {
    waiting: Mutex<Vec<Waiting>>,
    /// One write of this process at a time: two at once would only make one of them try again.
    turn: tokio::sync::Mutex<()>,
}

struct Waiting {
    change: Change,
    limits: KeyLimits,
    answer: oneshot::Sender<Result<Lefts, Closed>>,
}

enum Change {
    Admit(Uuid, Ask),
    Settle(Uuid, Used),
}

/// A request that was let in.
#[derive(Debug, Clone)]
pub struct Admitted {
    id: Uuid,
    key_id: String,
    limits: KeyLimits,
    /// For the client, right after it was let in.
    pub lefts: Lefts,
}

/// Why a request does not go out.
#[derive(Debug)]
pub enum Closed {
    Limit(Refused, Lefts),
    Store(Error),
}

impl<C: Callers> Meter<C> {
    pub fn new(callers: C, clock: Clock) -> Self {
        Self { callers, clock, lines: Mutex::default() }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Reserves the most that a request can take.
    ///
    /// # Errors
    /// [`Closed`] where the request must not go out.
    pub async fn admit(&self, key_id: &str, limits: &KeyLimits, ask: Ask) -> Result<Admitted, Closed> {
        let id = Uuid::new_v4();
        let lefts = self.change(key_id, limits, Change::Admit(id, ask)).await?;
        crash::here(Point::ChatReserved);
        Ok(Admitted { id, key_id: key_id.to_owned(), limits: limits.clone(), lefts })
    }

    /// Enters what a request has taken. Where that fails the reservation falls due by itself.
    pub async fn settle(&self, admitted: &Admitted, used: Used) {
        let mut pauses = AGAIN_AFTER.iter();
        loop {
            match self.change(&admitted.key_id, &admitted.limits, Change::Settle(admitted.id, used)).await {
                Ok(_) => return crash::here(Point::ChatSettled),
                Err(Closed::Store(error)) => {
                    // What is not there has fallen due, or was entered by a write that seemed to fail.
                    let pause = pauses.next().filter(|_| error.code() != Code::NotFound);
                    let Some(pause) = pause else {
                        let (code, chain) = (error.code().as_str(), error.chain());
                        let key = &admitted.key_id;
                        return tracing::error!(
                            error.code = code,
                            error.chain = chain,
                            key.id = key,
                            "usage not settled"
                        );
                    };
                    tokio::time::sleep(*pause).await;
                }
                Err(Closed::Limit(..)) => return,
            }
        }
    }

    /// Returns when the change is written, or will not be: by whoever has the turn.
    async fn change(&self, key_id: &str, limits: &KeyLimits, change: Change) -> Result<Lefts, Closed> {
        let line = {
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(lines.entry(key_id.to_owned()).or_default())
        };
        let (answer, mut answered) = oneshot::channel();
        line.waiting().push(Waiting { change, limits: limits.clone(), answer });
        let turn = tokio::select! {
            biased;
            written = &mut answered => return written.unwrap_or_else(|_| Err(not_written())),
            turn = line.turn.lock() => turn,
        };
        let batch = std::mem::take(&mut *line.waiting());
        self.write(key_id, batch).await;
        drop(turn);
        answered.await.unwrap_or_else(|_| Err(not_written()))
    }

    /// Writes a batch of changes, and again where another process came first.
    async fn write(&self, key_id: &str, batch: Vec<Waiting>) {
        for _ in 0..MAX_ROUNDS {
            match self.try_write(key_id, &batch).await {
                Ok(Some(results)) => {
                    for (waiting, result) in batch.into_iter().zip(results) {
                        // Who has gone is settled all the same.
                        let _ = waiting.answer.send(result);
                    }
                    return;
                }
                Ok(None) => tokio::time::sleep(PAUSE.mul_f64(rand::random_range(0.0..1.0))).await,
                Err(error) => return fail(batch, &error.chain()),
            }
        }
        fail(batch, "too many write to it");
    }

    /// `None` where the account was written by another process since it was read.
    async fn try_write(&self, key_id: &str, batch: &[Waiting]) -> Result<Option<Vec<Result<Lefts, Closed>>>, Error> {
        let mut account = self.callers.find_account(key_id).await?;
        let (version, now) = (account.version, self.clock.now());
        let results = batch.iter().map(|waiting| waiting.enter(&mut account, now)).collect();
        let is_written = account.version == version || self.callers.replace_account(key_id, version, &account).await?;
        Ok(is_written.then_some(results))
    }
}

impl Line {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn enter(&self, account: &mut Account, now: Timestamp) -> Result<Lefts, Closed> {
        let done = match self.change {
            Change::Admit(id, ask) => account.admit(id, &self.limits, ask, now),
            // What has fallen due was entered then.
            Change::Settle(id, used) if !account.settle(id, used, &self.limits, now) => {
                return Err(Closed::Store(Error::not_found()));
            }
            Change::Settle(..) => Ok(()),
        };
        let lefts = account.lefts(&self.limits);
        done.map(|()| lefts).map_err(|refused| Closed::Limit(refused, lefts))
    }
}

fn fail(batch: Vec<Waiting>, why: &str) {
    for waiting in batch {
        let _ = waiting.answer.send(Err(Closed::Store(Error::unavailable(WHAT, why))));
    }
}

/// Who had the turn was cut off in the middle of it.
fn not_written() -> Closed {
    Closed::Store(Error::unavailable(WHAT, "writing it was cut off"))
}

/// What a client is told of a limit that is used up.
pub(crate) fn told(refused: Refused) -> Error {
    let (message, seconds) = match refused {
        Refused::Requests(seconds) => ("This key has used up its requests.", seconds),
        Refused::Tokens(seconds) => ("This key has used up its tokens.", seconds),
        Refused::UnderWay(seconds) => ("Too many requests of this key are under way.", seconds),
        Refused::Budget(seconds) => {
            let message = "This key has spent its budget, or has reserved the rest, until the next month begins.";
            return Error::new(Code::InsufficientQuota, message).retry_after(seconds);
        }
    };
    Error::too_many_requests(format!("{message} Wait {seconds} s."), seconds)
}

/// `x-ratelimit-…`, as OpenAI's API reference has them.
pub(crate) fn write(lefts: Lefts, headers: &mut HeaderMap) {
    let mut write = |left: Option<Left>, names: [&'static str; 3]| {
        let Some(Left { limit, remaining, reset_seconds }) = left else { return };
        let values = [limit.to_string(), remaining.to_string(), format!("{reset_seconds}s")];
        for (name, value) in names.into_iter().zip(values) {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
    };
    write(
        lefts.requests,
        ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
    );
    write(lefts.tokens, ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]);
}
