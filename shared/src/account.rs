//! What a key may ask of the models, and what it has had: its buckets, its months, and what is
//! reserved for requests that are under way. Pure: who keeps it reads it as of one version, and writes where
//! that still stands.
//!
//! A request is let in while there is something left, and reserves the most that it can take. So no
//! limit is exceeded by more than one request, and a single large one is not refused for its bound.

use std::collections::BTreeMap;

use chrono::{Datelike, TimeDelta, TimeZone, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::api::admin::KeyLimits;
use crate::clock::Timestamp;

/// Beyond the longest that a request can be under way: what is not settled by then never will be.
const RESERVED_FOR: TimeDelta = TimeDelta::minutes(20);
/// Requests of one key under way at once; an account must stay small enough to be written whole.
const MAX_UNDER_WAY: usize = 1000;
const PICO_PER_USD: f64 = 1e12;
/// How much fades when a bucket empties: all of it but for 1 in 10²⁸.
const EMPTIED: f64 = 64.0;

/// The account of one key. `default` is that of a key that has asked nothing yet.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Grows with every write; 0 before the first.
    pub version: u64,
    requests: Bucket,
    tokens: Bucket,
    /// By their names, such as `2026-11`, in UTC.
    pub months: BTreeMap<String, Month>,
    reservations: BTreeMap<Uuid, Reservation>,
}

/// What was taken and has not come back yet; it comes back evenly, a limit's worth a minute, and of all that
/// was taken the same share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Bucket {
    taken: f64,
    at: Timestamp,
    /// Of what was taken at `faded` f, e^(f - now) has not come back yet.
    #[serde(default)]
    faded: f64,
}

/// One month's ledger.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Month {
    /// Settled requests, the estimated ones included.
    pub requests: u64,
    /// Those whose usage nobody has told: their clients left, or their servers broke off.
    pub estimated_requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// In picodollars (10⁻¹² USD).
    pub cost_pico: u64,
    /// Of the tokens and the cost above, what was estimated.
    pub estimated_tokens: u64,
    pub estimated_cost_pico: u64,
}

/// Tokens and what they cost, in picodollars.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub cost_pico: u64,
}

/// The most that a request can take.
pub type Ask = Taken;

/// What was asked, in fields of its own: serde reads a flattened struct several times as slowly, and in
/// DynamoDB an account is read with every write.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reservation {
    prompt_tokens: u64,
    completion_tokens: u64,
    cost_pico: u64,
    month: String,
    due_at: Timestamp,
    /// That of the tokens' bucket when they were taken.
    #[serde(default)]
    faded: f64,
}

impl Reservation {
    fn new(ask: Ask, month: String, due_at: Timestamp, faded: f64) -> Self {
        let Ask { prompt_tokens, completion_tokens, cost_pico } = ask;
        Self { prompt_tokens, completion_tokens, cost_pico, month, due_at, faded }
    }

    fn ask(&self) -> Ask {
        let &Self { prompt_tokens, completion_tokens, cost_pico, .. } = self;
        Ask { prompt_tokens, completion_tokens, cost_pico }
    }
}

/// What a request has taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// As the server has told.
    pub told: Taken,
    /// What nobody has told besides: it counts as no more than what was reserved.
    pub estimated: Taken,
}

/// Why a request is not let in, and after how many seconds it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    Requests(u32),
    Tokens(u32),
    UnderWay(u32),
    Budget(u32),
}

/// What is left of one limit, for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    pub limit: u32,
    pub remaining: u32,
    /// Until all of it is there again, in seconds.
    pub reset_seconds: u32,
}

/// What is left of both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lefts {
    pub requests: Option<Left>,
    pub tokens: Option<Left>,
}

impl Bucket {
    /// As it is at `now`. A clock that goes back gives nothing back.
    fn at(self, now: Timestamp, limit: u32) -> Self {
        let seconds = (now - self.at).num_milliseconds().max(0) as f64 / 1e3;
        let taken = (self.taken - seconds * f64::from(limit) / 60.0).max(0.0);
        let faded = if taken == self.taken { 0.0 } else { (self.taken / taken).ln().min(EMPTIED) };
        Self { taken, at: now.max(self.at), faded: self.faded + faded }
    }

    /// Has `used` in the place of `asked`, which was taken at `faded`. What of that has come back is gone: it
    /// pays for what was used, and for nothing else.
    fn settle(&mut self, asked: f64, faded: f64, used: f64) {
        let remaining = asked * (faded - self.faded).exp();
        let back = asked - remaining;
        self.taken = (self.taken - remaining + (used - back).max(0.0)).max(0.0);
    }

    /// Until no more than `target` is taken.
    fn seconds_to(self, target: f64, limit: u32) -> u32 {
        ((self.taken - target).max(0.0) * 60.0 / f64::from(limit.max(1))).ceil() as u32
    }

    fn left(self, limit: u32) -> Left {
        let remaining = (f64::from(limit) - self.taken).max(0.0) as u32;
        Left { limit, remaining, reset_seconds: self.seconds_to(0.0, limit) }
    }
}

impl Account {
    /// Lets a request in under `id`. One that is not let in leaves the account as it would be at `now` anyway.
    ///
    /// # Errors
    /// [`Refused`] where a limit is used up.
    pub fn admit(&mut self, id: Uuid, limits: &KeyLimits, ask: Ask, now: Timestamp) -> Result<(), Refused> {
        self.refill(limits, now);
        let month = month_of(now);
        if let Some(limit) = limits.requests_per_minute
            && self.requests.taken + 1.0 > f64::from(limit) + 1e-6
        {
            return Err(Refused::Requests(self.requests.seconds_to(f64::from(limit) - 1.0, limit).max(1)));
        }
        if let Some(limit) = limits.tokens_per_minute
            && self.tokens.taken >= f64::from(limit)
        {
            return Err(Refused::Tokens(self.tokens.seconds_to(f64::from(limit) - 1.0, limit).max(1)));
        }
        if let Some(budget) = limits.budget_usd_per_month
            && self.committed_pico(&month) >= (budget * PICO_PER_USD).round() as u64
        {
            return Err(Refused::Budget(seconds_to_next_month(now)));
        }
        if self.reservations.len() >= MAX_UNDER_WAY {
            return Err(Refused::UnderWay(1));
        }
        self.requests.taken += 1.0;
        self.tokens.taken += ask.tokens() as f64;
        self.reservations.insert(id, Reservation::new(ask, month, now + RESERVED_FOR, self.tokens.faded));
        self.version += 1;
        Ok(())
    }

    /// Enters what `id` has really taken in the place of what was reserved for it; `false` where that
    /// was settled before, or has fallen due.
    pub fn settle(&mut self, id: Uuid, used: Used, limits: &KeyLimits, now: Timestamp) -> bool {
        self.refill(limits, now);
        let Some(reservation) = self.reservations.remove(&id) else { return false };
        self.enter(&reservation, used);
        self.version += 1;
        true
    }

    /// What is left at the moment up to which the account was refilled.
    #[must_use]
    pub fn lefts(&self, limits: &KeyLimits) -> Lefts {
        Lefts {
            requests: limits.requests_per_minute.map(|limit| self.requests.left(limit)),
            tokens: limits.tokens_per_minute.map(|limit| self.tokens.left(limit)),
        }
    }

    /// Requests under way, or whose function died.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.reservations.len()
    }

    /// Brings it to `now`: buckets refilled, and what has fallen due entered as if all of it had been taken.
    pub fn refill(&mut self, limits: &KeyLimits, now: Timestamp) {
        self.requests = self.requests.at(now, limits.requests_per_minute.unwrap_or(u32::MAX));
        self.tokens = self.tokens.at(now, limits.tokens_per_minute.unwrap_or(u32::MAX));
        let due: Vec<_> = self.reservations.extract_if(.., |_, reservation| reservation.due_at <= now).collect();
        for (_, reservation) in due {
            self.enter(&reservation, Used { told: Taken::default(), estimated: reservation.ask() });
        }
    }

    fn enter(&mut self, reservation: &Reservation, used: Used) {
        let ask = reservation.ask();
        let estimated = used.estimated.within(ask);
        let used = used.told.and(estimated);
        self.tokens.settle(ask.tokens() as f64, reservation.faded, used.tokens() as f64);
        let month = self.months.entry(reservation.month.clone()).or_default();
        let add = |sum: &mut u64, part: u64| *sum = sum.saturating_add(part);
        add(&mut month.requests, 1);
        add(&mut month.prompt_tokens, used.prompt_tokens);
        add(&mut month.completion_tokens, used.completion_tokens);
        add(&mut month.cost_pico, used.cost_pico);
        if estimated != Taken::default() {
            add(&mut month.estimated_requests, 1);
            add(&mut month.estimated_tokens, estimated.tokens());
            add(&mut month.estimated_cost_pico, estimated.cost_pico);
        }
    }

    /// Spent in a month, or reserved in it.
    fn committed_pico(&self, month: &str) -> u64 {
        let spent = self.months.get(month).map_or(0, |month| month.cost_pico);
        let reserved = self.reservations.values().filter(|reservation| reservation.month == month);
        reserved.fold(spent, |sum, reservation| sum.saturating_add(reservation.cost_pico))
    }
}

/// For a store that keeps them apart.
#[cfg(feature = "embedded")]
impl Account {
    /// Those under way.
    pub(crate) fn reservations(&self) -> &BTreeMap<Uuid, Reservation> {
        &self.reservations
    }

    pub(crate) fn with_reservations(mut self, more: impl IntoIterator<Item = (Uuid, Reservation)>) -> Self {
        self.reservations.extend(more);
        self
    }

    pub(crate) fn without_reservations(&self) -> Self {
        let &Self { version, requests, tokens, ref months, .. } = self;
        Self { version, requests, tokens, months: months.clone(), reservations: BTreeMap::new() }
    }
}

impl Taken {
    fn tokens(self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            completion_tokens: self.completion_tokens.saturating_add(other.completion_tokens),
            cost_pico: self.cost_pico.saturating_add(other.cost_pico),
        }
    }

    fn within(self, ask: Ask) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.min(ask.prompt_tokens),
            completion_tokens: self.completion_tokens.min(ask.completion_tokens),
            cost_pico: self.cost_pico.min(ask.cost_pico),
        }
    }
}

impl From<Taken> for Used {
    /// All of it told.
    fn from(told: Taken) -> Self {
        Self { told, estimated: Taken::default() }
    }
}

fn month_of(now: Timestamp) -> String {
    now.format("%Y-%m").to_string()
}

fn seconds_to_next_month(now: Timestamp) -> u32 {
    let (year, month) = if now.month() == 12 { (now.year() + 1, 1) } else { (now.year(), now.month() + 1) };
    let next = Utc.with_ymd_and_hms(year, month, 1, 0, 0, 0).single().unwrap_or(now);
    u32::try_from((next - now).num_seconds()).unwrap_or(0).max(1)
}

#[cfg(test)]
mod tests;
