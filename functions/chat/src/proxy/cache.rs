//! Whole answers to deterministic requests, for the caller who asks the very same again.
//!
//! In memory, for as long as the process lives: a request is the same where each of its bytes is.

use std::sync::{Mutex, PoisonError};

use axum::body::Bytes;
use chrono::TimeDelta;
use sha2::{Digest, Sha256};
use shared::bounded::Bounded;
use shared::clock::Timestamp;

/// All answers together.
const MAX_BYTES: usize = 32 * 1024 * 1024;
/// A longer answer is not kept.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// How long an answer is the answer.
const KEPT_FOR: TimeDelta = TimeDelta::hours(1);

/// What names a caller's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key([u8; 32]);

impl Key {
    pub(crate) fn of(caller: &str, body: &[u8]) -> Self {
        let mut hash = Sha256::new();
        // The length keeps a caller from ending within a body.
        hash.update((caller.len() as u64).to_le_bytes());
        hash.update(caller);
        hash.update(body);
        Self(hash.finalize().into())
    }
}

/// The answers.
#[derive(Debug)]
pub struct Cache(Mutex<Bounded<Key, Timestamp>>);

impl Default for Cache {
    fn default() -> Self {
        Self(Mutex::new(Bounded::new(MAX_BYTES)))
    }
}

impl Cache {
    pub(crate) fn get(&self, key: Key, now: Timestamp) -> Option<Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key, now)
    }

    /// Keeps an answer; the first to a request stays.
    pub(crate) fn put(&self, key: Key, answer: &Bytes, now: Timestamp) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answer.len() <= MAX_ANSWER_BYTES && answers.get(&key, now).is_none() {
            answers.put(key, answer.clone(), now + KEPT_FOR);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::clock::from_millis;

    #[test]
    fn an_answer_is_its_callers_for_an_hour() {
        let (cache, start) = (Cache::default(), from_millis(0));
        let (key, answer) = (Key::of("a", b"bc"), Bytes::from_static(b"x"));
        cache.put(key, &answer, start);
        cache.put(key, &Bytes::from_static(b"another"), start);
        assert_eq!(cache.get(key, start + KEPT_FOR - TimeDelta::seconds(1)), Some(answer));
        for other in [Key::of("ab", b"c"), Key::of("b", b"bc"), Key::of("a", b"bd")] {
            assert_eq!(cache.get(other, start), None);
        }
        assert_eq!(cache.get(key, start + KEPT_FOR), None);
    }

    #[test]
    fn a_huge_answer_is_not_kept() {
        let (cache, start) = (Cache::default(), from_millis(0));
        let (kept, huge) = (Key::of("a", b"kept"), Key::of("a", b"huge"));
        cache.put(kept, &Bytes::from(vec![0; MAX_ANSWER_BYTES]), start);
        cache.put(huge, &Bytes::from(vec![0; MAX_ANSWER_BYTES + 1]), start);
        assert!(cache.get(kept, start).is_some() && cache.get(huge, start).is_none());
    }
}
