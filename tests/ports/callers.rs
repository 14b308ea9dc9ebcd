//! The contract of [`Callers`]: the keys, and what each has had of the models.

use std::sync::Arc;

use chat::{Closed, Meter};
use chrono::TimeDelta;
use futures_util::future::join_all;
use shared::account::{Account, Ask, Refused, Taken, Used};
use shared::api::admin::{KeyLimits, NewKey, Scope};
use shared::auth::keys::ApiKey;
use shared::clock::Clock;
use shared::ports::Callers;
use uuid::Uuid;

use super::start;

pub async fn callers_suite(callers: impl Callers) {
    let now = start();
    let new = |caller: &str| NewKey {
        expires_at: Some(now + TimeDelta::days(1)),
        models: Some(vec!["fast".into()]),
        budget_usd_per_month: Some(0.1),
        ..NewKey::plain(caller.into(), "a name".into(), vec![Scope::Jobs])
    };
    let (first, _) = ApiKey::make(new("alice"), now).unwrap();
    let (second, _) = ApiKey::make(new("bob"), now + TimeDelta::seconds(1)).unwrap();

    let second_id = second.info.id.clone();

    // A key is written once and read back as it was.
    assert!(callers.create_key(&first).await.unwrap());
    assert!(callers.create_key(&second).await.unwrap());
    let mut rival = second.clone();
    rival.info.id.clone_from(&first.info.id);
    assert!(!callers.create_key(&rival).await.unwrap());
    assert_eq!(callers.find_key(&first.info.id).await.unwrap(), Some(first.clone()));
    assert_eq!(callers.find_key("000000000000").await.unwrap(), None);
    assert_eq!(callers.keys().await.unwrap(), [first.clone(), second.clone()]);

    // Revoked is revoked, and the first moment stays.
    for minutes in 1..=2 {
        assert!(callers.revoke_key(&first.info.id, now + TimeDelta::minutes(minutes)).await.unwrap());
    }
    assert!(!callers.revoke_key("000000000000", now).await.unwrap());
    let revoked = callers.find_key(&first.info.id).await.unwrap().unwrap();
    assert_eq!(revoked.info.revoked_at, Some(now + TimeDelta::minutes(1)));
    assert_eq!(callers.find_key(&second.info.id).await.unwrap(), Some(second));

    // An account is written where the version that was read still stands.
    let (account, key) = (Account::default(), &second_id);
    assert_eq!(callers.find_account(key).await.unwrap(), account);
    let limits = KeyLimits::default();
    let ask = Ask { prompt_tokens: 1, completion_tokens: 2, cost_pico: u64::MAX / 4 };
    let mut first_write = account.clone();
    first_write.admit(Uuid::nil(), &limits, ask, now).unwrap();
    assert!(callers.replace_account(key, 0, &first_write).await.unwrap());
    assert!(!callers.replace_account(key, 0, &first_write).await.unwrap(), "written twice");
    assert_eq!(callers.find_account(key).await.unwrap(), first_write);
    let mut second_write = first_write.clone();
    second_write.admit(Uuid::max(), &limits, ask, now).unwrap();
    assert!(callers.replace_account(key, first_write.version, &second_write).await.unwrap());
    assert!(!callers.replace_account(key, first_write.version, &second_write).await.unwrap());
    assert_eq!(callers.find_account(key).await.unwrap(), second_write);
    assert_eq!(callers.find_account("000000000000").await.unwrap(), account, "another key's");

    // Requests are counted by caller and window.
    for count in 1..=3 {
        assert_eq!(callers.count_request("alice", 7).await.unwrap(), count);
    }
    assert_eq!(callers.count_request("bob", 7).await.unwrap(), 1);
    assert_eq!(callers.count_request("alice", 8).await.unwrap(), 1);
}

/// Twenty who ask for one key at once are let in as often as it may be and not once more, be they
/// processes or requests of one process.
pub async fn accounts_suite(callers: impl Callers + Clone) {
    let clock = Clock::manual(start());
    let limits = KeyLimits { requests_per_minute: Some(30), ..KeyLimits::default() };
    let ask = Ask { prompt_tokens: 100, completion_tokens: 50, cost_pico: 7 };
    let used = Used::from(Taken { prompt_tokens: 10, completion_tokens: 5, cost_pico: 3 });
    // What processes share is the store alone.
    let meter = || Arc::new(Meter::new(callers.clone(), clock.clone()));
    let (shared, apart) = (vec![meter(); 20], (0..20).map(|_| meter()).collect::<Vec<_>>());
    for (key, meters) in [("0123456789ab", apart), ("ba9876543210", shared)] {
        let ask_thrice = async |meter: Arc<Meter<_>>| {
            let mut let_in = 0;
            for _ in 0..3 {
                match meter.admit(key, &limits, ask).await {
                    Ok(admitted) => {
                        meter.settle(&admitted, used).await;
                        let_in += 1;
                    }
                    Err(Closed::Limit(Refused::Requests(2), _)) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            let_in
        };
        let let_in: u64 = join_all(meters.into_iter().map(ask_thrice)).await.into_iter().sum();
        let account = callers.find_account(key).await.unwrap();
        let month = account.months["2023-11"];
        assert_eq!((let_in, month.requests, month.prompt_tokens, account.under_way()), (30, 30, 300, 0), "{key}");
    }
    full_account_suite(callers, clock).await;
}

/// As many requests as may be under way at once fit into the store, and the next is refused.
async fn full_account_suite(callers: impl Callers + Clone, clock: Clock) {
    let (key, limits, now) = ("00112233aabb", KeyLimits::default(), clock.now());
    let ask = Ask { prompt_tokens: 1_000_000, completion_tokens: 1_000_000, cost_pico: u64::MAX };
    let mut full = Account::default();
    let refused = (0..10_000).find_map(|number| full.admit(Uuid::from_u128(number), &limits, ask, now).err());
    assert_eq!(refused, Some(Refused::UnderWay(1)));
    assert!(full.under_way() >= 1000);
    assert!(callers.replace_account(key, 0, &full).await.unwrap());
    assert_eq!(callers.find_account(key).await.unwrap(), full);
    let meter = Meter::new(callers.clone(), clock);
    let closed = meter.admit(key, &limits, ask).await;
    assert!(matches!(closed, Err(Closed::Limit(Refused::UnderWay(1), _))), "{closed:?}");
    // One of them ends.
    let used = Used::from(Taken { prompt_tokens: 1, completion_tokens: 1, cost_pico: 1 });
    let mut after = full.clone();
    assert!(after.settle(Uuid::nil(), used, &limits, now));
    assert!(callers.replace_account(key, full.version, &after).await.unwrap());
    assert_eq!(callers.find_account(key).await.unwrap(), after);
    meter.admit(key, &limits, ask).await.unwrap();
}
