//! Tokens of an issuer: which are let in, and what happens while the issuer is away.

use chrono::TimeDelta;
use serde_json::{Value, json};
use shared::clock::Clock;

use crate::support::issuer::{Issuer, Mood, SigningKey, unsigned};
use crate::support::keyed::Keyed;

const AUDIENCE: &str = "app";

/// A host that takes this issuer's tokens, and one admin key.
async fn start(issuer: &Issuer) -> Keyed {
    let url = issuer.url();
    Keyed::start(&[("JWT_ISSUER", &url), ("JWT_AUDIENCE", AUDIENCE)]).await
}

/// Claims that are good for an hour.
fn good(issuer: &Issuer, clock: &Clock) -> Value {
    let now = clock.now().timestamp();
    json!({"iss": issuer.url(), "sub": "6f1c", "aud": AUDIENCE, "iat": now, "exp": now + 3600})
}

/// The good claims with some changed; null takes one away.
fn with(mut claims: Value, changes: Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value.clone(),
        }
    }
    claims
}

async fn status(host: &Keyed, token: &str) -> u16 {
    host.get("/results", token).await.status().as_u16()
}

#[tokio::test]
async fn a_good_token_is_the_user_it_names_and_no_admin() {
    let (rsa, curve, edwards) = (SigningKey::rsa("r"), SigningKey::p256("c"), SigningKey::ed25519("e"));
    let issuer = Issuer::start(&[&rsa, &curve, &edwards]).await;
    let host = start(&issuer).await;
    let claims = good(&issuer, &host.clock);
    let submitted = host.submit(&rsa.token(&claims)).await;
    assert_eq!(submitted.status().as_u16(), 202);
    let id = submitted.json::<Value>().await.unwrap()["request_id"].as_str().unwrap().to_owned();
    let path = format!("/result/{id}");
    for key in [&rsa, &curve, &edwards] {
        assert_eq!(host.get(&path, &key.token(&claims)).await.status().as_u16(), 200, "{}", key.algorithm());
        let other = key.token(&with(claims.clone(), json!({"sub": "another"})));
        assert_eq!(host.get(&path, &other).await.status().as_u16(), 404);
    }
    assert_eq!(host.get(&path, &host.admin).await.status().as_u16(), 404);
    assert_eq!(host.get("/admin/keys", &rsa.token(&claims)).await.status().as_u16(), 403);
    // Cognito's access tokens have no `aud`; several audiences are fine.
    let cognito = with(claims.clone(), json!({"aud": null, "client_id": AUDIENCE, "token_use": "access"}));
    assert_eq!(status(&host, &rsa.token(&cognito)).await, 200);
    assert_eq!(status(&host, &rsa.token(&with(claims, json!({"aud": ["other", AUDIENCE]})))).await, 200);
    assert_eq!(issuer.fetches(), 1);
}

#[tokio::test]
async fn a_token_that_is_wrong_in_any_claim_is_refused() {
    let key = SigningKey::rsa("r");
    let issuer = Issuer::start(&[&key]).await;
    let host = start(&issuer).await;
    let now = host.clock.now().timestamp();
    let wrong = [
        json!({"iss": "https://issuer.example"}),
        json!({"iss": format!("{}/", issuer.url())}),
        json!({"iss": null}),
        json!({"aud": "another"}),
        json!({"aud": ["another"]}),
        json!({"aud": []}),
        json!({"aud": null}),
        json!({"aud": "another", "client_id": AUDIENCE}),
        json!({"aud": null, "client_id": "another"}),
        json!({"exp": now - 61}),
        json!({"exp": null}),
        json!({"exp": (now + 3600).to_string()}),
        json!({"nbf": now + 62}),
        json!({"nbf": (now - 60).to_string()}),
        json!({"sub": null}),
        json!({"sub": ""}),
        json!({"sub": 7}),
        json!({"sub": "a b"}),
        json!({"sub": "x".repeat(256)}),
    ];
    for changes in wrong {
        let token = key.token(&with(good(&issuer, &host.clock), changes.clone()));
        let response = host.get("/results", &token).await;
        assert_eq!(response.status().as_u16(), 401, "{changes}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
    }
    for changes in [json!({"exp": now - 59}), json!({"nbf": now + 59}), json!({"exp": f64::from(i32::MAX) + 0.5})] {
        let token = key.token(&with(good(&issuer, &host.clock), changes.clone()));
        assert_eq!(status(&host, &token).await, 200, "{changes}: a minute of leeway");
    }
    let token = key.token(&good(&issuer, &host.clock));
    host.clock.advance(TimeDelta::seconds(3600 + 61));
    assert_eq!(status(&host, &token).await, 401, "the host's own clock decides");
}

#[tokio::test]
async fn a_token_with_a_wrong_signature_algorithm_or_form_is_refused() {
    let (rsa, curve) = (SigningKey::rsa("r"), SigningKey::p256("c"));
    let issuer = Issuer::start(&[&rsa, &curve]).await;
    let host = start(&issuer).await;
    let claims = good(&issuer, &host.clock);
    let header = |alg: &str, kid: &str| json!({"alg": alg, "kid": kid, "typ": "JWT"});
    let token = rsa.token(&claims);
    let (message, signature) = token.rsplit_once('.').unwrap();
    let other_claims = unsigned(&header("RS256", "r"), &with(claims.clone(), json!({"sub": "another"})));
    let tokens = [
        // Another key, under the name of one that the issuer has.
        SigningKey::p256("c").token(&claims),
        curve.token_with(&header("RS256", "r"), &claims),
        // `none`, in the ways in which it was tried elsewhere.
        format!("{}.", unsigned(&header("none", "r"), &claims)),
        format!("{}.", unsigned(&header("None", "r"), &claims)),
        format!("{}.{signature}", unsigned(&header("none", "r"), &claims)),
        // The public key as a shared secret.
        rsa.token_by_confusion(&claims),
        curve.token_by_confusion(&claims),
        // The set says that this key is for RS256.
        rsa.token_with(&header("PS256", "r"), &claims),
        rsa.token_with(&header("ES256", "r"), &claims),
        rsa.token_with(&header("ES256", "c"), &claims),
        rsa.token_with(&json!({"alg": "RS256"}), &claims),
        rsa.token_with(&json!({"alg": "RS256", "kid": "r", "crit": ["exp"]}), &claims),
        rsa.token_with(&json!({"alg": "RS256", "kid": "nobody", "jwk": rsa.jwk()}), &claims),
        rsa.token_with(&json!({"alg": "RS256", "kid": 1}), &claims),
        format!("{other_claims}.{signature}"),
        format!("{message}."),
        message.to_owned(),
        format!("{token}."),
        format!("{}.{signature}", message.replace('.', "")),
        "..".to_owned(),
        "a.b.c".to_owned(),
        "x".repeat(5000),
        rsa.token(&json!([])),
        rsa.token(&json!("sub")),
    ];
    for token in tokens {
        assert_eq!(status(&host, &token).await, 401, "{token}");
    }
    assert_eq!(status(&host, &token).await, 200);
}

#[tokio::test]
async fn a_new_key_is_picked_up_and_a_retired_one_is_gone() {
    let (old, new) = (SigningKey::p256("2025"), SigningKey::p256("2026"));
    let issuer = Issuer::start(&[&old]).await;
    let host = start(&issuer).await;
    let claims = good(&issuer, &host.clock);
    assert_eq!(status(&host, &old.token(&claims)).await, 200);
    issuer.set_keys([
        new.jwk(),
        json!({"kty": "OKP", "crv": "X448", "kid": "odd", "x": "AAAA"}),
        json!({"kty": "RSA"}),
    ]);
    // Within half a minute of the last fetch nobody is asked again.
    assert_eq!(status(&host, &new.token(&claims)).await, 401);
    host.clock.advance(TimeDelta::seconds(30));
    assert_eq!(status(&host, &new.token(&claims)).await, 200);
    assert_eq!(status(&host, &old.token(&claims)).await, 401);
    assert_eq!(issuer.fetches(), 2);
    host.clock.advance(TimeDelta::minutes(59));
    assert_eq!(status(&host, &new.token(&good(&issuer, &host.clock))).await, 200);
    assert_eq!(issuer.fetches(), 2, "an hour is kept");
    issuer.set_keys([old.jwk()]);
    host.clock.advance(TimeDelta::minutes(1));
    assert_eq!(status(&host, &new.token(&good(&issuer, &host.clock))).await, 401);
    assert_eq!(issuer.fetches(), 3);
}

#[tokio::test]
async fn unknown_key_ids_cause_one_fetch_in_half_a_minute_however_many_come() {
    let key = SigningKey::p256("c");
    let issuer = Issuer::start(&[&key]).await;
    let host = start(&issuer).await;
    let claims = good(&issuer, &host.clock);
    for round in 1..=3 {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..40 {
            let token = SigningKey::p256(&format!("{round}-{number}")).token(&claims);
            tasks.spawn(host.request(reqwest::Method::GET, "/results", &token).send());
        }
        for answer in tasks.join_all().await {
            assert_eq!(answer.unwrap().status().as_u16(), 401);
        }
        assert_eq!(issuer.fetches(), round);
        assert_eq!(status(&host, &key.token(&claims)).await, 200);
        host.clock.advance(TimeDelta::seconds(30));
    }
}

#[tokio::test]
async fn an_issuer_that_is_away_is_503_at_first_and_later_its_old_keys_do_for_a_day() {
    let key = SigningKey::p256("c");
    let issuer = Issuer::start(&[&key]).await;
    let host = start(&issuer).await;
    let day = json!({"exp": host.clock.now().timestamp() + 1_000_000});
    let token = key.token(&with(good(&issuer, &host.clock), day.clone()));
    for (tried, mood) in
        [Mood::Down, Mood::Redirecting, Mood::Huge, Mood::Impostor, Mood::Hanging].into_iter().enumerate()
    {
        issuer.set_mood(mood);
        let response = host.get("/results", &token).await;
        assert_eq!(response.status().as_u16(), 503, "{mood:?}");
        assert_eq!(response.headers()["retry-after"], "30", "{mood:?}");
        // Again at once: nobody is asked. Keys do not need the issuer.
        host.clock.advance(TimeDelta::seconds(20));
        assert_eq!(host.get("/results", &token).await.headers()["retry-after"], "10", "{mood:?}");
        assert_eq!(issuer.fetches(), tried + 1, "{mood:?}");
        assert_eq!(host.get("/results", &host.admin).await.status().as_u16(), 200);
        host.clock.advance(TimeDelta::seconds(10));
    }
    issuer.set_mood(Mood::Well);
    assert_eq!(status(&host, &token).await, 200);
    issuer.set_mood(Mood::Down);
    host.clock.advance(TimeDelta::hours(23));
    assert_eq!(status(&host, &token).await, 200, "stale keys are better than none");
    let unknown = SigningKey::p256("new").token(&with(good(&issuer, &host.clock), day));
    assert_eq!(status(&host, &unknown).await, 503, "it may be a new key: nobody can know");
    host.clock.advance(TimeDelta::hours(1));
    assert_eq!(status(&host, &token).await, 503, "after a day they are too old");
    issuer.set_mood(Mood::Well);
    host.clock.advance(TimeDelta::seconds(30));
    assert_eq!(status(&host, &token).await, 200);
}
