//! Whole answers to deterministic requests, for the caller who asks the very same again.
//!
//! In memory, for as long as the process lives: a request is the same where each of its bytes is.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use axum::body::Bytes;
use chrono::TimeDelta;
use sha2::{Digest, Sha256};
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

/// The answers, oldest out first.
#[derive(Debug, Default)]
pub struct Cache(Mutex<Answers>);

#[derive(Debug, Default)]
struct Answers {
    by_key: HashMap<Key, Bytes>,
    /// In the order in which they came.
    order: VecDeque<(Key, Timestamp)>,
    bytes: usize,
}

impl Cache {
    pub(crate) fn get(&self, key: Key, now: Timestamp) -> Option<Bytes> {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while answers.order.front().is_some_and(|(_, kept_at)| now - *kept_at >= KEPT_FOR) {
            answers.drop_oldest();
        }
        answers.by_key.get(&key).cloned()
    }

    /// Keeps an answer; the first to a request stays.
    pub(crate) fn put(&self, key: Key, answer: &Bytes, now: Timestamp) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answer.len() > MAX_ANSWER_BYTES || answers.by_key.contains_key(&key) {
            return;
        }
        while answers.bytes + answer.len() > MAX_BYTES {
            answers.drop_oldest();
        }
        answers.bytes += answer.len();
        answers.order.push_back((key, now));
        answers.by_key.insert(key, answer.clone());
    }
}

impl Answers {
    fn drop_oldest(&mut self) {
        let oldest = self.order.pop_front().and_then(|(key, _)| self.by_key.remove(&key));
        self.bytes -= oldest.map_or(0, |answer| answer.len());
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
        assert_eq!(cache.0.lock().unwrap().bytes, 0);
    }

    #[test]
    fn the_oldest_answers_make_room_and_a_huge_one_is_not_kept() {
        let (cache, start) = (Cache::default(), from_millis(0));
        let key = |number: usize| Key::of("a", &number.to_le_bytes());
        let answer = Bytes::from(vec![0; MAX_ANSWER_BYTES]);
        let room = MAX_BYTES / MAX_ANSWER_BYTES;
        (0..=room).for_each(|number| cache.put(key(number), &answer, start));
        assert_eq!(cache.get(key(0), start), None);
        assert!((1..=room).all(|number| cache.get(key(number), start).is_some()));
        cache.put(key(room + 1), &Bytes::from(vec![0; MAX_ANSWER_BYTES + 1]), start);
        assert_eq!(cache.get(key(room + 1), start), None);
        assert_eq!(cache.0.lock().unwrap().bytes, MAX_BYTES);
    }
}
