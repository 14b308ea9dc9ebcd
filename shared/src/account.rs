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
mod tests {
    use super::*;
    use crate::clock::from_millis;

    const ASK: Ask = Ask { prompt_tokens: 100, completion_tokens: 50, cost_pico: 500 };
    const USED: Used = Used {
        told: Taken { prompt_tokens: 20, completion_tokens: 10, cost_pico: 90 },
        estimated: Taken { prompt_tokens: 0, completion_tokens: 0, cost_pico: 0 },
    };

    /// 2026-11-30T23:59:00Z.
    fn start() -> Timestamp {
        Utc.with_ymd_and_hms(2026, 11, 30, 23, 59, 0).unwrap()
    }

    fn seconds(count: i64) -> TimeDelta {
        TimeDelta::seconds(count)
    }

    fn limits(requests: Option<u32>, tokens: Option<u32>, usd: Option<f64>) -> KeyLimits {
        KeyLimits { models: None, requests_per_minute: requests, tokens_per_minute: tokens, budget_usd_per_month: usd }
    }

    /// A new account that has let in one request.
    fn with_one(limits: &KeyLimits, now: Timestamp) -> Account {
        let mut account = Account::default();
        account.admit(Uuid::nil(), limits, ASK, now).unwrap();
        account
    }

    /// Lets in as many as it can.
    fn admit_all(account: &mut Account, limits: &KeyLimits, now: Timestamp) -> (Vec<Uuid>, Refused) {
        let mut ids = Vec::new();
        loop {
            let id = Uuid::from_u128(account.version.into());
            if let Err(refused) = account.admit(id, limits, ASK, now) {
                return (ids, refused);
            }
            ids.push(id);
        }
    }

    #[test]
    fn requests_come_back_evenly_and_a_clock_that_goes_back_gives_none() {
        let limits = limits(Some(20), None, None);
        let mut account = Account::default();
        let (ids, refused) = admit_all(&mut account, &limits, start());
        assert_eq!((ids.len(), refused), (20, Refused::Requests(3)));
        let left = account.lefts(&limits).requests.unwrap();
        assert_eq!(left, Left { limit: 20, remaining: 0, reset_seconds: 60 });
        for (after, more) in [(-100, 0), (2, 0), (3, 1), (3600, 20)] {
            assert_eq!(admit_all(&mut account.clone(), &limits, start() + seconds(after)).0.len(), more, "{after} s");
        }
    }

    #[test]
    fn tokens_are_exceeded_by_one_request_at_most_and_come_back_when_it_took_less() {
        let limits = limits(None, Some(400), None);
        let mut account = Account::default();
        let (ids, refused) = admit_all(&mut account, &limits, start());
        // 450 of 400: the third was let in with 100 left.
        assert_eq!((ids.len(), refused), (3, Refused::Tokens(8)));
        assert!(account.settle(ids[0], USED, &limits, start()));
        assert_eq!(account.lefts(&limits).tokens.unwrap().remaining, 400 - 30 - 300);
        assert_eq!(admit_all(&mut account, &limits, start()).0.len(), 1);
        // One that is larger than the limit is let in alone.
        let huge = Ask { prompt_tokens: 100_000, ..ASK };
        let mut account = Account::default();
        account.admit(Uuid::nil(), &limits, huge, start()).unwrap();
        assert_eq!(admit_all(&mut account, &limits, start()).0.len(), 0);
    }

    #[test]
    fn what_has_come_back_while_a_request_was_under_way_does_not_come_back_again_when_it_ends() {
        let limits = limits(None, Some(150), None);
        let mut account = Account::default();
        // Each takes all of it, is under way for longer than that takes to come back, and is told to have used a part.
        for minute in 0..10 {
            let now = start() + seconds(60 * minute);
            assert_eq!(account.admit(Uuid::from_u128(minute as u128), &limits, ASK, now), Ok(()), "{minute}");
        }
        let now = start() + seconds(9 * 60);
        for id in 0..9 {
            assert!(account.settle(Uuid::from_u128(id), USED, &limits, now));
            assert!(matches!(account.admit(Uuid::max(), &limits, ASK, now), Err(Refused::Tokens(_))), "{id}");
        }
        // What the last one took is there.
        assert!(account.settle(Uuid::from_u128(9), USED, &limits, now));
        assert_eq!(account.lefts(&limits).tokens.unwrap().remaining, 120);
        // More than was reserved counts whenever it is told.
        assert_eq!(account.admit(Uuid::max(), &limits, ASK, now), Ok(()));
        let later = now + TimeDelta::minutes(5);
        let more = Taken { prompt_tokens: 100, completion_tokens: 150, cost_pico: 0 };
        assert!(account.settle(Uuid::max(), more.into(), &limits, later));
        assert_eq!(account.lefts(&limits).tokens.unwrap().remaining, 50);
    }

    #[test]
    fn whatever_order_requests_end_in_what_is_taken_is_what_they_used_less_what_has_come_back() {
        let limits = limits(None, Some(600), None);
        // Four at once, and half of what they took comes back: 75 of each.
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
            let mut account = Account::default();
            for id in 0..4 {
                account.admit(Uuid::from_u128(id), &limits, ASK, start()).unwrap();
            }
            let now = start() + seconds(30);
            let used = Taken { prompt_tokens: 100, completion_tokens: 15, cost_pico: 0 };
            for id in order {
                assert!(account.settle(Uuid::from_u128(id), used.into(), &limits, now));
            }
            assert!((account.tokens.taken - 4.0 * (115.0 - 75.0)).abs() < 1e-6, "{order:?}: {:?}", account.tokens);
        }
    }

    #[test]
    fn a_budget_counts_what_is_reserved_and_is_there_anew_with_the_next_month() {
        let limits = limits(None, None, Some(1200.0 / PICO_PER_USD));
        let mut account = Account::default();
        let (ids, refused) = admit_all(&mut account, &limits, start());
        assert_eq!((ids.len(), refused), (3, Refused::Budget(60)));
        assert!(ids.iter().all(|id| account.settle(*id, USED, &limits, start())));
        assert_eq!(account.months["2026-11"].cost_pico, 270);
        assert_eq!(admit_all(&mut account.clone(), &limits, start()).0.len(), 2);
        let december = start() + seconds(60);
        let (ids, _) = admit_all(&mut account, &limits, december);
        assert_eq!(ids.len(), 3);
        // What began in a month is that month's, whenever it ends.
        assert!(account.settle(ids[0], USED, &limits, december + TimeDelta::minutes(5)));
        assert_eq!(account.months.keys().collect::<Vec<_>>(), ["2026-11", "2026-12"]);
    }

    #[test]
    fn what_is_settled_is_settled_once() {
        let none = KeyLimits::default();
        let mut account = with_one(&none, start());
        assert!(account.settle(Uuid::nil(), USED, &none, start()));
        assert!(!account.settle(Uuid::nil(), USED, &none, start()));
        let month = account.months["2026-11"];
        assert_eq!((month.requests, month.prompt_tokens, month.completion_tokens), (1, 20, 10));
        assert_eq!((month.estimated_requests, month.estimated_tokens, account.under_way()), (0, 0, 0));
    }

    #[test]
    fn an_estimate_is_flagged_and_never_more_than_what_was_reserved() {
        let none = KeyLimits::default();
        let after = |used: Used| {
            let mut account = with_one(&none, start());
            assert!(account.settle(Uuid::nil(), used, &none, start()));
            account.months["2026-11"]
        };
        let wild = Taken { prompt_tokens: 7, completion_tokens: 9999, cost_pico: 9999 };
        let month = after(Used { told: Taken::default(), estimated: wild });
        assert_eq!((month.prompt_tokens, month.completion_tokens, month.cost_pico), (7, 50, 500));
        assert_eq!((month.estimated_requests, month.estimated_tokens, month.estimated_cost_pico), (1, 57, 500));
        // What the server says counts, more or less, whatever is estimated besides.
        assert_eq!(after(wild.into()).completion_tokens, 9999);
        let again = Taken { prompt_tokens: 5, completion_tokens: 0, cost_pico: 3 };
        let month = after(Used { told: wild, estimated: again });
        assert_eq!((month.prompt_tokens, month.completion_tokens, month.cost_pico), (12, 9999, 10_002));
        assert_eq!((month.estimated_requests, month.estimated_tokens, month.estimated_cost_pico), (1, 5, 3));
    }

    #[test]
    fn what_nobody_settles_falls_due_as_if_all_of_it_had_been_taken() {
        let limits = limits(None, None, Some(500.0 / PICO_PER_USD));
        let mut account = with_one(&limits, from_millis(0));
        let due = from_millis(0) + RESERVED_FOR;
        account.refill(&limits, due - TimeDelta::milliseconds(1));
        assert_eq!(account.under_way(), 1);
        account.refill(&limits, due);
        let month = account.months["1970-01"];
        assert_eq!((account.under_way(), month.estimated_requests, month.estimated_cost_pico), (0, 1, 500));
        assert!(matches!(account.admit(Uuid::max(), &limits, ASK, due), Err(Refused::Budget(_))));
        assert!(!account.settle(Uuid::nil(), USED, &limits, due));
    }

    /// An account with as many requests of `ask` under way as there may be.
    fn full(limits: &KeyLimits, ask: Ask) -> Account {
        let mut account = Account::default();
        for number in 0..MAX_UNDER_WAY {
            let id = Uuid::from_u128(number as u128);
            assert_eq!(account.admit(id, limits, ask, start()), Ok(()), "{number}");
        }
        account
    }

    #[test]
    fn only_so_many_are_under_way_at_once_and_one_that_ends_makes_room_for_one() {
        let limits = limits(Some(1_000_000), Some(1_000_000), None);
        let mut account = full(&limits, ASK);
        let before = account.clone();
        assert_eq!(account.admit(Uuid::max(), &limits, ASK, start()), Err(Refused::UnderWay(1)));
        assert_eq!(account, before, "what is refused takes nothing");
        assert!(account.settle(Uuid::nil(), USED, &limits, start()));
        assert_eq!(account.admit(Uuid::max(), &limits, ASK, start()), Ok(()));
        assert_eq!(account.admit(Uuid::nil(), &limits, ASK, start()), Err(Refused::UnderWay(1)));
        assert_eq!(account.under_way(), MAX_UNDER_WAY);
    }

    #[test]
    fn an_account_with_as_many_under_way_as_there_may_be_fits_into_an_item_of_dynamodb() {
        let huge = Ask { prompt_tokens: u64::MAX, completion_tokens: u64::MAX, cost_pico: u64::MAX };
        let size = serde_json::to_string(&full(&KeyLimits::default(), huge)).unwrap().len();
        // 400 KB, of which a quarter is left for the months and all else.
        assert!(size < 300 * 1024, "{size} bytes");
    }

    #[test]
    fn an_account_is_read_as_it_was_written() {
        let limits = limits(Some(7), Some(11), Some(0.5));
        let mut account = Account::default();
        let (ids, _) = admit_all(&mut account, &limits, start());
        assert!(account.settle(ids[0], USED, &limits, start() + seconds(1)));
        let text = serde_json::to_string(&account).unwrap();
        assert_eq!(serde_json::from_str::<Account>(&text).unwrap(), account);
    }
}
