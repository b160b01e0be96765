//! No source of strangers takes everything: of what is bounded for all, one source has half at most.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Who has how much. Entries go when a source has nothing, so there are no more of them than of what is shared.
#[derive(Debug)]
pub(super) struct Shares {
    most: usize,
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// One piece; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    shares: Arc<Shares>,
    source: IpAddr,
}

impl Shares {
    /// Of `limit` pieces in all, one source gets half, but at least one.
    pub(super) fn half_of(limit: usize) -> Arc<Self> {
        Arc::new(Self { most: (limit / 2).max(1), taken: Mutex::default() })
    }

    /// A piece for `source`, if it has not had its share.
    pub(super) fn take(self: &Arc<Self>, source: IpAddr) -> Option<Share> {
        let source = network_of(source);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let has = taken.entry(source).or_default();
        if *has >= self.most {
            return None;
        }
        *has += 1;
        drop(taken);
        Some(Share { shares: Arc::clone(self), source })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.shares.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(has) = taken.get_mut(&self.source) {
            *has -= 1;
            if *has == 0 {
                taken.remove(&self.source);
            }
        }
    }
}

/// Whoever has one IPv6 address has the 2^64 of its network.
fn network_of(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V4(_) => source,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_gets_half_and_gives_back_what_it_drops() {
        let shares = Shares::half_of(5);
        let [one, same, other] = ["2001:db8::1", "2001:db8::2", "192.0.2.1"].map(|source| source.parse().unwrap());
        let held = [shares.take(one), shares.take(same)];
        assert!(held.iter().all(Option::is_some) && shares.take(one).is_none());
        assert!(shares.take(other).is_some());
        drop(held);
        assert!(shares.taken.lock().unwrap().is_empty());
        assert!(shares.take(same).is_some());
    }
}
