//! Nobody takes everything: of what is bounded for all, one source of strangers has half at most, one agent a few.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Who has how much. Entries go when somebody has nothing, so there are no more of them than of what is shared.
#[derive(Debug)]
pub(super) struct Shares<Who: Eq + Hash> {
    most: usize,
    taken: Mutex<HashMap<Who, usize>>,
}

/// One piece; given back when dropped.
#[derive(Debug)]
pub(super) struct Share<Who: Eq + Hash> {
    shares: Arc<Shares<Who>>,
    who: Who,
}

impl<Who: Eq + Hash + Clone> Shares<Who> {
    /// At most as many pieces for one, but at least one.
    pub(super) fn of(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), taken: Mutex::default() })
    }

    /// A piece for `who`, if it has not had its share.
    pub(super) fn take(self: &Arc<Self>, who: Who) -> Option<Share<Who>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let has = taken.entry(who.clone()).or_default();
        if *has >= self.most {
            return None;
        }
        *has += 1;
        drop(taken);
        Some(Share { shares: Arc::clone(self), who })
    }
}

impl<Who: Eq + Hash> Share<Who> {
    /// Who has it.
    pub(super) fn who(&self) -> &Who {
        &self.who
    }
}

impl<Who: Eq + Hash> Drop for Share<Who> {
    fn drop(&mut self) {
        let mut taken = self.shares.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(has) = taken.get_mut(&self.who) {
            *has -= 1;
            if *has == 0 {
                taken.remove(&self.who);
            }
        }
    }
}

/// A source as strangers are counted: whoever has one IPv6 address has the 2^64 of its network.
pub(super) fn network_of(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V4(_) => source,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_gets_its_share_and_gives_back_what_it_drops() {
        let shares = Shares::of(2);
        let [one, same, other] = ["2001:db8::1", "2001:db8::2", "192.0.2.1"].map(|source| network_of(source.parse().unwrap()));
        let held = [shares.take(one), shares.take(same)];
        assert!(held.iter().all(Option::is_some) && shares.take(one).is_none());
        assert!(shares.take(other).is_some());
        drop(held);
        assert!(shares.taken.lock().unwrap().is_empty());
        assert!(shares.take(same).is_some());
    }
}
