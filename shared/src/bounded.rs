//! Values in memory up to a number of bytes, the oldest out first, each until a time of its own.

use std::borrow::Borrow;
use std::hash::Hash;

use axum::body::Bytes;
use lru::LruCache;

/// Taken for what a value costs beside its own bytes: key, places in tables, what malloc adds.
const OVERHEAD_BYTES: usize = 256;

/// `T` is a point in time, by whatever clock.
#[derive(Debug)]
pub struct Bounded<K: Hash + Eq, T> {
    /// Ordered as they came: reading must not keep a value longer, so nothing is promoted.
    values: LruCache<K, (Bytes, T)>,
    bytes: usize,
    max_bytes: usize,
}

impl<K: Hash + Eq, T: PartialOrd + Copy> Bounded<K, T> {
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        Self { values: LruCache::unbounded(), bytes: 0, max_bytes }
    }

    /// What is kept under `key` and has not ended `now`. The oldest that have are dropped.
    pub fn get<Q: Hash + Eq + ?Sized>(&mut self, key: &Q, now: T) -> Option<Bytes>
    where
        K: Borrow<Q>,
    {
        while self.values.peek_lru().is_some_and(|(_, (_, until))| *until <= now) {
            self.drop_oldest();
        }
        self.values.peek(key).filter(|(_, until)| *until > now).map(|(value, _)| value.clone())
    }

    /// Keeps `value` until then; the oldest make room. What is alone too large is not kept.
    pub fn put(&mut self, key: K, value: Bytes, until: T) {
        self.remove::<K>(&key);
        let size = size(&value);
        if size > self.max_bytes {
            return;
        }
        while self.bytes + size > self.max_bytes {
            self.drop_oldest();
        }
        self.bytes += size;
        self.values.put(key, (value, until));
    }

    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q)
    where
        K: Borrow<Q>,
    {
        let removed = self.values.pop(key);
        self.bytes -= removed.map_or(0, |(value, _)| size(&value));
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn drop_oldest(&mut self) {
        let oldest = self.values.pop_lru();
        self.bytes -= oldest.map_or(0, |(_, (value, _))| size(&value));
    }
}

fn size(value: &Bytes) -> usize {
    value.len() + OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_there_until_its_time_and_leaves_nothing_behind() {
        let mut kept = Bounded::new(10_000);
        kept.put("a", Bytes::from_static(b"first"), 10);
        kept.put("b", Bytes::from_static(b"second"), 20);
        kept.put("a", Bytes::from_static(b"again"), 15);
        assert_eq!(kept.get(&"a", 14).as_deref(), Some(&b"again"[..]));
        assert_eq!(kept.get(&"a", 15), None);
        assert_eq!(kept.get(&"b", 19).as_deref(), Some(&b"second"[..]));
        kept.remove(&"b");
        assert_eq!(kept.get(&"b", 19), None);
        assert!(kept.is_empty() && kept.bytes == 0, "what has ended is left");
    }

    #[test]
    fn the_oldest_make_room_however_often_they_are_read_and_a_huge_one_is_not_kept() {
        let (each, room) = (1000, 10);
        let mut kept = Bounded::new(room * (each + OVERHEAD_BYTES));
        let value = Bytes::from(vec![0; each]);
        for number in 0..=room {
            kept.put(number, value.clone(), 1);
            kept.get(&0, 0);
        }
        assert_eq!(kept.get(&0, 0), None);
        assert!((1..=room).all(|number| kept.get(&number, 0).is_some()));
        kept.put(room + 1, Bytes::from(vec![0; kept.max_bytes]), 1);
        assert!(kept.get(&(room + 1), 0).is_none() && kept.get(&1, 0).is_some());
    }
}
