//! Names of KV pages: equal names mean equal contents.
//!
//! ```text
//! root(model, salt) --64 ids--> name of page 0 --64 ids--> name of page 1 ...
//! ```
//!
//! The keys and values of a position depend on the model and on all ids up to it, so a page is named
//! by a chain of hashes over them. The gateway routes by the same names that the worker's cache has.

use std::fmt;

/// Ids that one page holds.
pub const PAGE_IDS: usize = 64;

/// Context of the hash of roots; hash and chain stay apart from every other use of BLAKE3.
const ROOT_CONTEXT: &str = "tercet 2026 kv page root v1";
/// Context of the hash of pages.
const PAGE_CONTEXT: &str = "tercet 2026 kv page chain v1";

/// Name of a full KV page, or of the root of a chain of pages.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageName([u8; 32]);

impl PageName {
    /// Returns the root of the pages of a model. Tenants with different salts share no page and
    /// learn nothing of each other's by the time that an answer takes.
    pub fn root(model: &[u8], salt: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        // The length keeps model and salt apart.
        hasher.update(&(model.len() as u64).to_le_bytes()).update(model).update(salt.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// Returns the name of the page that holds `ids` after this one.
    #[must_use]
    pub fn next(&self, ids: &[u32; PAGE_IDS]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(PAGE_CONTEXT);
        hasher.update(&self.0);
        let mut bytes = [0; PAGE_IDS * 4];
        for (bytes, id) in bytes.chunks_exact_mut(4).zip(ids) {
            bytes.copy_from_slice(&id.to_le_bytes());
        }
        hasher.update(&bytes);
        Self(*hasher.finalize().as_bytes())
    }

    /// Returns the names of the full pages of `ids`, which begin at this root.
    pub fn chain(self, ids: &[u32]) -> impl Iterator<Item = Self> {
        let (pages, _) = ids.as_chunks();
        pages.iter().scan(self, |name, page| {
            *name = name.next(page);
            Some(*name)
        })
    }

    /// Returns the bytes of the name.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageName(")?;
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_name_depends_on_model_salt_and_every_id_before() {
        let ids: Vec<u32> = (0..200).collect();
        let names = |model: &[u8], salt, ids: &[u32]| {
            PageName::root(model, salt).chain(ids).collect::<Vec<_>>()
        };
        let base = names(b"model", "salt", &ids);
        assert_eq!(base.len(), 3, "only full pages have names");
        assert_eq!(base, names(b"model", "salt", &ids[..192]));
        let mut changed = ids.clone();
        changed[64] += 1;
        let changed = names(b"model", "salt", &changed);
        assert_eq!(changed[0], base[0]);
        assert!(changed[1] != base[1] && changed[2] != base[2]);
        let all: HashSet<PageName> = [
            base,
            names(b"models", "alt", &ids),
            names(b"model", "", &ids),
            names(b"", "modelsalt", &ids),
            changed[1..].to_vec(),
        ]
        .into_iter()
        .flatten()
        .collect();
        assert_eq!(all.len(), 14);
    }

    /// Gateways and workers of different releases share these names.
    #[test]
    fn names_stay_what_they_are() {
        let name = PageName::root(&[7; 32], "tenant").next(&[9; PAGE_IDS]);
        assert_eq!(format!("{name:?}"), "PageName(8d33ec4e90831cf9)");
    }
}
