//! The tree over the entries: RFC 6962 §2.1 hashing, kept as the complete tiles of C2SP tlog-tiles.
//!
//! A tile of level L holds 256 consecutive nodes of height 8·L: level 0 holds leaf hashes, level 1 roots of complete
//! level-0 tiles, and so on. Only complete tiles are kept; they never change. What is right of the last complete tile of
//! level 0 is rebuilt from the entries, what is right of the last complete tile of a higher level from the tiles below it.

use crate::model::Digest;

/// Bytes of one hash.
pub const HASH_BYTES: usize = 32;
/// Hashes of a complete tile (tlog-tiles, tile height 8).
pub const TILE_HASHES: u64 = 256;
/// Bytes of a complete tile.
pub const TILE_BYTES: usize = 256 * HASH_BYTES;
/// Levels of tree in one tile.
const TILE_HEIGHT: u8 = 8;

/// A tile that is complete, and therefore final.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tile {
    /// 0: leaf hashes; L: roots of complete tiles of level L - 1.
    pub level: u8,
    /// Position among the tiles of its level, from 0.
    pub index: u64,
    /// 256 hashes, [`TILE_BYTES`] bytes.
    pub hashes: Vec<u8>,
}

/// Why nothing can be computed from what is stored, or for what is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MerkleError {
    /// A stored tile has another size than a complete tile.
    #[error("tile {level}/{index} has {bytes} bytes instead of 8192")]
    TileSize {
        /// Of the tile.
        level: u8,
        /// Of the tile.
        index: u64,
        /// That it has.
        bytes: usize,
    },
    /// No such leaf or smaller tree in the tree.
    #[error("{asked} is beyond a tree of {size}")]
    Beyond {
        /// The index or size asked for.
        asked: u64,
        /// Of the tree.
        size: u64,
    },
}

/// The hash of an entry as a leaf: SHA-256(0x00 ‖ entry) (RFC 6962 §2.1).
#[must_use]
pub fn leaf_hash(entry: &[u8]) -> Digest {
    Digest::of_parts(&[&[0], entry])
}

/// The hash of an inner node: SHA-256(0x01 ‖ left ‖ right) (RFC 6962 §2.1).
fn node_hash(left: &[u8], right: &[u8]) -> Digest {
    Digest::of_parts(&[&[1], left, right])
}

/// The root of a tree without leaves: SHA-256 of nothing (RFC 6962 §2.1).
#[must_use]
pub fn empty_root() -> Digest {
    Digest::of(&[])
}

/// The growing right edge of the tree: 8 KiB per level of tiles and one hash per level of the tree.
#[derive(Clone)]
pub struct Tree {
    size: u64,
    /// Roots of the complete subtrees that the binary digits of `size` name, the largest first.
    peaks: Vec<Digest>,
    /// Of each level the hashes since its last complete tile, fewer than 256.
    partial: Vec<Vec<u8>>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// The empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self { size: 0, peaks: Vec::new(), partial: Vec::new() }
    }

    /// Rebuilds a tree of `size` from what is stored: `tile(level, index)` gives complete tiles, `leaf(index)` the leaf
    /// hashes after the last complete tile of level 0. Reads at most 255 tiles a level and 255 leaves.
    ///
    /// # Errors
    /// Those of `tile` and `leaf`, and [`MerkleError::TileSize`].
    pub fn load<E: From<MerkleError>>(
        size: u64,
        mut tile: impl FnMut(u8, u64) -> Result<Vec<u8>, E>,
        mut leaf: impl FnMut(u64) -> Result<Digest, E>,
    ) -> Result<Self, E> {
        let mut tree = Self::new();
        let levels = (u64::BITS - size.leading_zeros()).div_ceil(u32::from(TILE_HEIGHT));
        // From the largest subtrees to the leaves; fewer than 256 a level, so no tile is completed on the way.
        for level in (0..u8::try_from(levels).unwrap_or(u8::MAX)).rev() {
            let height = level * TILE_HEIGHT;
            let end = size >> height;
            for index in end - end % TILE_HASHES..end {
                let hash = match level.checked_sub(1) {
                    Some(below) => fold(&checked(below, index, tile(below, index)?)?),
                    None => leaf(index)?,
                };
                tree.append(height, hash, &mut Vec::new());
            }
        }
        Ok(tree)
    }

    /// Appends an entry by its [`leaf_hash`]. Tiles that this completes are added to `completed`; they are to be stored
    /// with the entry. On average one hash besides the leaf's own.
    pub fn push(&mut self, leaf: Digest, completed: &mut Vec<Tile>) {
        self.append(0, leaf, completed);
    }

    /// Appends a complete subtree of `height`; the size must be a multiple of its leaves.
    fn append(&mut self, height: u8, hash: Digest, completed: &mut Vec<Tile>) {
        let (mut height, mut hash) = (height, hash);
        let leaves = 1_u64 << height;
        loop {
            if height.is_multiple_of(TILE_HEIGHT) {
                self.record(height / TILE_HEIGHT, &hash, completed);
            }
            if self.size >> height & 1 == 0 {
                break;
            }
            let Some(left) = self.peaks.pop() else { break };
            hash = node_hash(&left.0, &hash.0);
            height += 1;
        }
        self.peaks.push(hash);
        self.size += leaves;
    }

    fn record(&mut self, level: u8, hash: &Digest, completed: &mut Vec<Tile>) {
        let at = usize::from(level);
        while self.partial.len() <= at {
            self.partial.push(Vec::with_capacity(TILE_BYTES));
        }
        let partial = &mut self.partial[at];
        partial.extend_from_slice(&hash.0);
        if partial.len() == TILE_BYTES {
            let hashes = std::mem::replace(partial, Vec::with_capacity(TILE_BYTES));
            let index = (self.size >> (level * TILE_HEIGHT)) / TILE_HASHES;
            completed.push(Tile { level, index, hashes });
        }
    }

    /// How many entries it has.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// MTH of all entries (RFC 6962 §2.1); at most 63 hashes.
    #[must_use]
    pub fn root(&self) -> Digest {
        let right_to_left = self.peaks.iter().rev().copied();
        right_to_left.reduce(|right, left| node_hash(&left.0, &right.0)).unwrap_or_else(empty_root)
    }
}

fn checked(level: u8, index: u64, hashes: Vec<u8>) -> Result<Vec<u8>, MerkleError> {
    if hashes.len() == TILE_BYTES { Ok(hashes) } else { Err(MerkleError::TileSize { level, index, bytes: hashes.len() }) }
}

/// The root over a power of two of hashes, at most a tile of them.
fn fold(hashes: &[u8]) -> Digest {
    let mut row: Vec<Digest> = hashes.chunks_exact(HASH_BYTES).filter_map(Digest::from_slice).collect();
    while row.len() > 1 {
        for at in 0..row.len() / 2 {
            row[at] = node_hash(&row[2 * at].0, &row[2 * at + 1].0);
        }
        row.truncate(row.len() / 2);
    }
    row.first().copied().unwrap_or_else(empty_root)
}

/// What is stored of a tree of `size` entries.
struct Stored<T, L> {
    size: u64,
    tile: T,
    leaf: L,
}

impl<E, T, L> Stored<T, L>
where
    E: From<MerkleError>,
    T: FnMut(u8, u64) -> Result<Vec<u8>, E>,
    L: FnMut(u64) -> Result<Digest, E>,
{
    /// The node over the `1 << height` entries from `index << height` on, all of them in the tree.
    fn node(&mut self, height: u8, index: u64) -> Result<Digest, E> {
        let level = height / TILE_HEIGHT;
        let within = height % TILE_HEIGHT;
        let first = index << within;
        let holder = first / TILE_HASHES;
        if self.size >> (height - within) >> TILE_HEIGHT > holder {
            let hashes = checked(level, holder, (self.tile)(level, holder)?)?;
            let from = usize::try_from(first % TILE_HASHES).unwrap_or(0) * HASH_BYTES;
            return Ok(fold(&hashes[from..from + (HASH_BYTES << within)]));
        }
        // Its tile is not complete: of a tile's whole height it is a complete tile's root, else its children's parent.
        match (level, within) {
            (0, 0) => (self.leaf)(index),
            (_, 0) => Ok(fold(&checked(level - 1, index, (self.tile)(level - 1, index)?)?)),
            _ => Ok(node_hash(&self.node(height - 1, 2 * index)?.0, &self.node(height - 1, 2 * index + 1)?.0)),
        }
    }

    /// MTH(D[start:end]), where `start` is a multiple of the smallest power of two that is not below `end - start`.
    fn range(&mut self, start: u64, end: u64) -> Result<Digest, E> {
        let leaves = end - start;
        if leaves.is_power_of_two() {
            let height = leaves.trailing_zeros();
            return self.node(u8::try_from(height).unwrap_or(u8::MAX), start >> height);
        }
        let middle = start + split(leaves);
        Ok(node_hash(&self.range(start, middle)?.0, &self.range(middle, end)?.0))
    }
}

/// The largest power of two below `leaves`, which is at least 2.
fn split(leaves: u64) -> u64 {
    1 << (leaves - 1).ilog2()
}

/// The audit path of entry `index` in the tree of the first `size` entries, leaf to root (RFC 6962 §2.1.1).
///
/// `tile` and `leaf` as for [`Tree::load`]: of the tree of `size` entries `tile` is asked only for complete tiles, `leaf`
/// only for what is in none.
///
/// # Errors
/// [`MerkleError::Beyond`] if there is no such entry, [`MerkleError::TileSize`], and those of `tile` and `leaf`.
pub fn inclusion_proof<E: From<MerkleError>>(
    index: u64,
    size: u64,
    tile: impl FnMut(u8, u64) -> Result<Vec<u8>, E>,
    leaf: impl FnMut(u64) -> Result<Digest, E>,
) -> Result<Vec<Digest>, E> {
    if index >= size {
        return Err(MerkleError::Beyond { asked: index, size }.into());
    }
    let mut stored = Stored { size, tile, leaf };
    let mut proof = Vec::new();
    let (mut start, mut end) = (0, size);
    while end - start > 1 {
        let middle = start + split(end - start);
        if index < middle {
            proof.push(stored.range(middle, end)?);
            end = middle;
        } else {
            proof.push(stored.range(start, middle)?);
            start = middle;
        }
    }
    proof.reverse();
    Ok(proof)
}

/// That the first `old` of `size` entries are the ones a checkpoint of size `old` was made over (RFC 6962 §2.1.2).
/// Empty for `old` = 0 and `old` = `size`.
///
/// # Errors
/// As [`inclusion_proof`].
pub fn consistency_proof<E: From<MerkleError>>(
    old: u64,
    size: u64,
    tile: impl FnMut(u8, u64) -> Result<Vec<u8>, E>,
    leaf: impl FnMut(u64) -> Result<Digest, E>,
) -> Result<Vec<Digest>, E> {
    if old > size {
        return Err(MerkleError::Beyond { asked: old, size }.into());
    }
    let mut proof = Vec::new();
    if old == 0 || old == size {
        return Ok(proof);
    }
    let mut stored = Stored { size, tile, leaf };
    let (mut start, mut end) = (0, size);
    // Down to the subtree that ends where the old tree ended.
    while end != old {
        let middle = start + split(end - start);
        if old <= middle {
            proof.push(stored.range(middle, end)?);
            end = middle;
        } else {
            proof.push(stored.range(start, middle)?);
            start = middle;
        }
    }
    // If that is the old tree itself, whoever verifies knows its root.
    if start > 0 {
        proof.push(stored.range(start, end)?);
    }
    proof.reverse();
    Ok(proof)
}

/// Whether `proof` shows that the entry with hash `leaf` is at `index` of the tree with `root` (RFC 9162 §2.1.3.2).
#[must_use]
pub fn verify_inclusion(index: u64, size: u64, leaf: &Digest, proof: &[Digest], root: &Digest) -> bool {
    if index >= size {
        return false;
    }
    let (mut at, mut last, mut hash) = (index, size - 1, *leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            hash = node_hash(&sibling.0, &hash.0);
            while at & 1 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash.0, &sibling.0);
        }
        at >>= 1;
        last >>= 1;
    }
    last == 0 && hash == *root
}

/// Whether `proof` shows that the tree with `root` begins with the entries of the one with `old_root` (RFC 9162 §2.1.4.2).
#[must_use]
pub fn verify_consistency(old: u64, size: u64, old_root: &Digest, root: &Digest, proof: &[Digest]) -> bool {
    if old > size {
        return false;
    }
    if old == 0 {
        return proof.is_empty() && *old_root == empty_root();
    }
    if old == size {
        return proof.is_empty() && old_root == root;
    }
    // A complete old tree is its own first step.
    let (first, rest) = if old.is_power_of_two() {
        (*old_root, proof)
    } else if let Some((first, rest)) = proof.split_first() {
        (*first, rest)
    } else {
        return false;
    };
    let shift = (old - 1).trailing_ones();
    let (mut at, mut last) = ((old - 1) >> shift, (size - 1) >> shift);
    let (mut old_hash, mut hash) = (first, first);
    for step in rest {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            old_hash = node_hash(&step.0, &old_hash.0);
            hash = node_hash(&step.0, &hash.0);
            while at & 1 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash.0, &step.0);
        }
        at >>= 1;
        last >>= 1;
    }
    last == 0 && old_hash == *old_root && hash == *root
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::OnceLock;

    use ct_merkle::mem_backed_tree::MemoryBackedTree;
    use proptest::prelude::*;

    use super::*;

    /// What a ledger keeps of its tree.
    #[derive(Default)]
    struct Book {
        leaves: Vec<Digest>,
        tiles: HashMap<(u8, u64), Vec<u8>>,
        /// After every entry; hashed to the root only where one is asked for.
        peaks: Vec<Vec<Digest>>,
    }

    impl Book {
        fn of(size: u64) -> Self {
            let (mut book, mut tree, mut completed) = (Self::default(), Tree::new(), Vec::new());
            book.peaks.push(tree.peaks.clone());
            for index in 0..size {
                let leaf = leaf_hash(&entry(index));
                book.leaves.push(leaf);
                tree.push(leaf, &mut completed);
                book.peaks.push(tree.peaks.clone());
            }
            assert_eq!(tree.size(), size);
            for tile in completed {
                assert!(book.tiles.insert((tile.level, tile.index), tile.hashes).is_none());
            }
            book
        }

        fn root(&self, size: u64) -> Digest {
            let peaks = self.peaks[usize::try_from(size).unwrap()].clone();
            Tree { size, peaks, partial: Vec::new() }.root()
        }

        fn tile(&self, size: u64) -> impl FnMut(u8, u64) -> Result<Vec<u8>, MerkleError> + '_ {
            move |level, index| {
                assert!((index + 1) << (8 * (u32::from(level) + 1)) <= size, "tile {level}/{index} of {size} is not complete");
                Ok(self.tiles[&(level, index)].clone())
            }
        }

        fn leaf(&self, size: u64) -> impl FnMut(u64) -> Result<Digest, MerkleError> + '_ {
            move |index| {
                assert!(index < size && index >= size - size % 256, "leaf {index} of {size} is in a complete tile");
                Ok(self.leaves[usize::try_from(index).unwrap()])
            }
        }

        fn inclusion(&self, index: u64, size: u64) -> Vec<Digest> {
            inclusion_proof(index, size, self.tile(size), self.leaf(size)).unwrap()
        }

        fn consistency(&self, old: u64, size: u64) -> Vec<Digest> {
            consistency_proof(old, size, self.tile(size), self.leaf(size)).unwrap()
        }
    }

    fn entry(index: u64) -> Vec<u8> {
        format!("entry {index}").into_bytes()
    }

    fn flat(proof: &[Digest]) -> Vec<u8> {
        proof.iter().flat_map(|digest| digest.0).collect()
    }

    const SIZES: [u64; 18] = [0, 1, 2, 3, 4, 7, 8, 255, 256, 257, 511, 512, 513, 1000, 65_535, 65_536, 65_537, 65_801];

    fn large() -> &'static Book {
        static LARGE: OnceLock<Book> = OnceLock::new();
        LARGE.get_or_init(|| Book::of(65_801))
    }

    #[test]
    fn roots_and_proofs_are_those_of_an_independent_implementation() {
        let book = large();
        let mut oracle = MemoryBackedTree::<sha2::Sha256, Vec<u8>>::new();
        for size in 0..=1000_u64 {
            let theirs = oracle.root();
            assert_eq!(book.root(size).0, theirs.as_bytes().as_slice(), "root of {size}");
            if SIZES.contains(&size) {
                for index in 0..size {
                    let expected = oracle.prove_inclusion(usize::try_from(index).unwrap());
                    assert_eq!(flat(&book.inclusion(index, size)), expected.as_bytes(), "{index} in {size}");
                }
                for old in 1..size {
                    let expected = oracle.prove_consistency(usize::try_from(size - old).unwrap());
                    assert_eq!(flat(&book.consistency(old, size)), expected.as_bytes(), "{old} to {size}");
                }
            }
            oracle.push(entry(size));
        }
    }

    /// RFC 6962 §2.1, word for word.
    fn mth(leaves: &[Digest]) -> Digest {
        match leaves {
            [] => empty_root(),
            [leaf] => *leaf,
            _ => {
                let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
                Digest::of_parts(&[&[1], &mth(left).0, &mth(right).0])
            }
        }
    }

    #[test]
    fn the_root_of_many_levels_of_tiles_is_the_one_the_rfc_defines() {
        let book = large();
        for size in SIZES {
            assert_eq!(book.root(size), mth(&book.leaves[..usize::try_from(size).unwrap()]), "root of {size}");
        }
        assert_eq!(book.tiles[&(1, 0)][..32], mth(&book.leaves[..256]).0);
        assert_eq!(book.tiles[&(1, 0)][8160..], mth(&book.leaves[65_280..65_536]).0);
    }

    #[test]
    fn a_loaded_tree_is_the_pushed_one_and_grows_like_it() {
        let book = large();
        for size in SIZES {
            let mut tree = Tree::load(size, book.tile(size), book.leaf(size)).unwrap();
            assert_eq!((tree.size(), tree.root()), (size, book.root(size)), "loaded at {size}");
            let mut completed = Vec::new();
            for index in size..(size + 300).min(65_801) {
                tree.push(book.leaves[usize::try_from(index).unwrap()], &mut completed);
                assert_eq!(tree.root(), book.root(index + 1), "{index} after {size}");
            }
            for tile in completed {
                assert_eq!(tile.hashes, book.tiles[&(tile.level, tile.index)], "tile {}/{}", tile.level, tile.index);
            }
        }
        assert_eq!(book.tiles.len(), 257 + 1);
    }

    #[test]
    fn a_truncated_tile_is_an_error_not_another_root() {
        let book = large();
        let short = |_, _| Ok(vec![0; TILE_BYTES - 1]);
        let refused = MerkleError::TileSize { level: 0, index: 0, bytes: TILE_BYTES - 1 };
        assert_eq!(Tree::load(256, short, book.leaf(256)).err(), Some(refused));
        assert_eq!(inclusion_proof(0, 256, short, book.leaf(256)).err(), Some(refused));
        assert_eq!(inclusion_proof(5, 5, book.tile(5), book.leaf(5)).err(), Some(MerkleError::Beyond { asked: 5, size: 5 }));
        assert_eq!(consistency_proof(6, 5, book.tile(5), book.leaf(5)).err(), Some(MerkleError::Beyond { asked: 6, size: 5 }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn proofs_verify_and_tampered_proofs_do_not(size in 1_u64..=65_801, part in 0.0..1.0_f64, bit in 0_usize..256, which in any::<prop::sample::Index>()) {
            let book = large();
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a random part")]
            let index = (size as f64 * part) as u64;
            let (root, leaf) = (book.root(size), book.leaves[usize::try_from(index).unwrap()]);
            let flip = |proof: &[Digest]| {
                let mut proof = proof.to_vec();
                let at = which.index(proof.len());
                proof[at].0[bit / 8] ^= 1 << (bit % 8);
                proof
            };

            let proof = book.inclusion(index, size);
            prop_assert!(verify_inclusion(index, size, &leaf, &proof, &root));
            prop_assert!(!verify_inclusion(index, size, &leaf_hash(b"other"), &proof, &root));
            prop_assert!(!verify_inclusion(size, size, &leaf, &proof, &root));
            prop_assert!(!verify_inclusion(index, size, &leaf, &[&proof[..], &[leaf]].concat(), &root));
            if let Some((_, shorter)) = proof.split_last() {
                prop_assert!(!verify_inclusion(index, size, &leaf, shorter, &root));
                prop_assert!(!verify_inclusion(index, size, &leaf, &flip(&proof), &root));
                prop_assert!(!verify_inclusion(index ^ 1, size, &leaf, &proof, &root));
            }

            let old_root = book.root(index);
            let proof = book.consistency(index, size);
            prop_assert!(verify_consistency(index, size, &old_root, &root, &proof));
            prop_assert!(!verify_consistency(index, size, &leaf, &root, &proof));
            prop_assert!(!verify_consistency(index, size, &old_root, &root, &[&proof[..], &[leaf]].concat()));
            prop_assert!(!verify_consistency(size + 1, size, &old_root, &root, &proof));
            if let Some((_, shorter)) = proof.split_last() {
                prop_assert!(!verify_consistency(index, size, &old_root, &leaf, &proof));
                prop_assert!(!verify_consistency(index, size, &old_root, &root, shorter));
                prop_assert!(!verify_consistency(index, size, &old_root, &root, &flip(&proof)));
            }
        }
    }

    #[test]
    fn every_pair_of_small_sizes_has_proofs_that_verify() {
        let book = Book::of(70);
        for size in 0..=70 {
            for index in 0..size {
                let leaf = book.leaves[usize::try_from(index).unwrap()];
                assert!(verify_inclusion(index, size, &leaf, &book.inclusion(index, size), &book.root(size)));
            }
            for old in 0..=size {
                assert!(verify_consistency(old, size, &book.root(old), &book.root(size), &book.consistency(old, size)));
            }
        }
        assert!(!verify_consistency(2, 3, &book.root(2), &book.root(3), &[]));
        assert!(!verify_consistency(3, 3, &book.root(2), &book.root(3), &[]));
    }
}
