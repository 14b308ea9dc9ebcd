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
