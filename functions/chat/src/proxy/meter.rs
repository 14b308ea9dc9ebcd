//! Lets requests in by the limits of their keys, and settles what they took.
//!
//! Triggered by every request of a key to a model, before it goes out and after its end. Reads and
//! writes the key's account.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use shared::account::{Account, Ask, Left, Lefts, Refused, Used};
use shared::api::admin::KeyLimits;
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::error::{Code, Error};
use shared::ports::Callers;
use tokio::sync::Mutex;
use uuid::Uuid;

/// Rounds against other processes on one account; in each, one of them gets through.
const MAX_ROUNDS: u32 = 50;
/// The longest pause between two rounds.
const PAUSE: Duration = Duration::from_millis(20);

/// The accounts, and the time that they go by.
pub struct Meter<C> {
    callers: C,
    clock: Clock,
    /// One write of this process at a time: two at once would only make one of them try again.
    turn: Mutex<()>,
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
        Self { callers, clock, turn: Mutex::default() }
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
        let rule = |account: &Account, now: Timestamp| match account.admit(id, limits, ask, now) {
            Ok(after) => Ok(after),
            Err(refused) => Err(Closed::Limit(refused, account.lefts(limits, now))),
        };
        let (after, now) = self.change(key_id, rule).await?;
        crash::here(Point::ChatReserved);
        let lefts = after.lefts(limits, now);
        Ok(Admitted { id, key_id: key_id.to_owned(), limits: limits.clone(), lefts })
    }

    /// Enters what a request has taken. Where that fails the reservation falls due by itself.
    pub async fn settle(&self, admitted: &Admitted, used: Used) {
        // What has fallen due was entered then.
        let rule = |account: &Account, now: Timestamp| {
            account.settle(admitted.id, used, &admitted.limits, now).ok_or(Closed::Store(Error::not_found()))
        };
        match self.change(&admitted.key_id, rule).await {
            Ok(_) => crash::here(Point::ChatSettled),
            Err(Closed::Store(error)) => {
                let (code, chain) = (error.code().as_str(), error.chain());
                tracing::error!(error.code = code, error.chain = chain, key.id = admitted.key_id, "usage not settled");
            }
            Err(Closed::Limit(..)) => {}
        }
    }

    /// Writes what `rule` makes of the account, and again where another process came first.
    async fn change(
        &self,
        key_id: &str,
        rule: impl Fn(&Account, Timestamp) -> Result<Account, Closed>,
    ) -> Result<(Account, Timestamp), Closed> {
        let _turn = self.turn.lock().await;
        for _ in 0..MAX_ROUNDS {
            let account = self.callers.find_account(key_id).await.map_err(Closed::Store)?;
            let now = self.clock.now();
            let after = rule(&account, now)?;
            if self.callers.replace_account(key_id, account.version, &after).await.map_err(Closed::Store)? {
                return Ok((after, now));
            }
            tokio::time::sleep(PAUSE.mul_f64(rand::random_range(0.0..1.0))).await;
        }
        Err(Closed::Store(Error::unavailable("the account of this key", "too many write to it")))
    }
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
