//! Who has which KV page: free, referenced by sequences, or kept for a prefix that may come again.
//!
//! ```text
//!        allocate              publish: full, and named
//! free ------------> referenced ----------------------> referenced and cached
//!   ^                    |                                  | ^
//!   +---- release -------+                    last release  v |  hit
//!   +------------------------ evict ------------------- cached, idle
//! ```
//!
//! Cached pages form trees: the children of a page continue its positions. A sequence refers to the
//! cached pages of its prefix from the root on, so a page is idle only if its descendants are, and
//! every idle page can be had by evicting leaves: idle pages count as free.

use std::collections::{BTreeSet, HashMap};

use tercet_text::{PageName, prefix::PAGE_IDS};

use crate::plan::PageId;

/// The pages of all stages, by number.
#[derive(Debug)]
pub(super) struct Pages {
    slots: Vec<Slot>,
    /// Neither referenced nor cached.
    free: Vec<PageId>,
    names: HashMap<PageName, PageId>,
    /// Cached pages without references or cached children, the longest unused first.
    leaves: BTreeSet<(u64, PageId)>,
    /// Number of pages that are cached and have no references.
    idle: usize,
    /// Grows whenever pages are released.
    clock: u64,
}

#[derive(Debug, Default)]
struct Slot {
    /// Sequences whose tables hold the page.
    references: usize,
    cached: Option<Cached>,
}

/// What is known of a page that is full and never written again.
#[derive(Debug)]
struct Cached {
    name: PageName,
    parent: Option<PageId>,
    ids: Box<[u32; PAGE_IDS]>,
    /// Cached pages that continue this one.
    children: usize,
    /// When the last reference was given up.
    last_used: u64,
}

impl Pages {
    /// Returns `pages` free pages.
    pub(super) fn new(pages: usize) -> Self {
        let number = |page| PageId(u32::try_from(page).unwrap_or(u32::MAX));
        Self {
            slots: (0..pages).map(|_| Slot::default()).collect(),
            free: (0..pages).rev().map(number).collect(),
            names: HashMap::new(),
            leaves: BTreeSet::new(),
            idle: 0,
            clock: 0,
        }
    }

    /// Returns how many pages can be allocated.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Returns how many pages sequences refer to.
    pub(super) fn referenced(&self) -> usize {
        self.slots.len() - self.available()
    }

    /// Returns how many pages are kept and not referred to.
    pub(super) fn idle(&self) -> usize {
        self.idle
    }

    /// Refers to the cached pages that hold the beginning of `ids`, as far as they go, and returns
    /// them from position `from` pages on; `names` are those of the pages of `ids`.
    pub(super) fn hit(&mut self, names: &[PageName], ids: &[u32], from: usize) -> Vec<PageId> {
        let (pages, _) = ids.as_chunks::<PAGE_IDS>();
        let found: Vec<PageId> = names
            .iter()
            .zip(pages)
            .skip(from)
            .map_while(|(name, ids)| self.cached(name, ids))
            .collect();
        for &page in &found {
            self.refer(page);
        }
        found
    }

    /// Returns the cached page of that name. A name is a hash: what it stands for is compared.
    fn cached(&self, name: &PageName, ids: &[u32; PAGE_IDS]) -> Option<PageId> {
        let page = *self.names.get(name)?;
        let cached = self.slot(page).cached.as_ref();
        (*cached.expect("only cached pages have names").ids == *ids).then_some(page)
    }

    /// Takes a page, one that is free if there is any, else the leaf that was unused the longest.
    pub(super) fn allocate(&mut self) -> Option<PageId> {
        let page = self.free.pop().or_else(|| self.evict())?;
        self.slot_mut(page).references = 1;
        Some(page)
    }

    /// Gives up references of one sequence; pages that nobody has are free, or idle if cached.
    pub(super) fn release(&mut self, pages: &[PageId]) {
        self.clock += 1;
        let now = self.clock;
        for &page in pages {
            let slot = self.slot_mut(page);
            slot.references -= 1;
            if slot.references > 0 {
                continue;
            }
            match &mut slot.cached {
                None => self.free.push(page),
                Some(cached) => {
                    cached.last_used = now;
                    let leaf = cached.children == 0;
                    self.idle += 1;
                    if leaf {
                        self.leaves.insert((now, page));
                    }
                }
            }
        }
    }

    /// Keeps a full page under its name, unless there is one of that name already; returns which
    /// page is known by the name from now on. `parent` is the cached page before it.
    pub(super) fn publish(
        &mut self,
        parent: Option<PageId>,
        name: PageName,
        ids: &[u32; PAGE_IDS],
        page: PageId,
    ) -> PageId {
        if let Some(&known) = self.names.get(&name) {
            return known;
        }
        self.names.insert(name, page);
        let ids = Box::new(*ids);
        let last_used = self.clock;
        self.slot_mut(page).cached = Some(Cached { name, parent, ids, children: 0, last_used });
        if let Some(parent) = parent {
            let slot = self.slot_mut(parent);
            let cached = slot.cached.as_mut().expect("the page before a cached one is cached");
            cached.children += 1;
            let last_used = cached.last_used;
            self.leaves.remove(&(last_used, parent));
        }
        page
    }

    fn refer(&mut self, page: PageId) {
        let slot = self.slot_mut(page);
        slot.references += 1;
        if slot.references == 1 {
            let last_used = slot.cached.as_ref().map(|cached| cached.last_used);
            let last_used = last_used.expect("a page without references that is hit is cached");
            self.idle -= 1;
            self.leaves.remove(&(last_used, page));
        }
    }

    fn evict(&mut self) -> Option<PageId> {
        let (_, page) = self.leaves.pop_first()?;
        let cached = self.slot_mut(page).cached.take().expect("leaves are cached");
        self.idle -= 1;
        self.names.remove(&cached.name);
        if let Some(parent) = cached.parent {
            let slot = self.slot_mut(parent);
            let above = slot.cached.as_mut().expect("the page before a cached one is cached");
            above.children -= 1;
            if above.children == 0 && slot.references == 0 {
                let last_used = above.last_used;
                self.leaves.insert((last_used, parent));
            }
        }
        Some(page)
    }

    fn slot(&self, page: PageId) -> &Slot {
        &self.slots[page.0 as usize]
    }

    fn slot_mut(&mut self, page: PageId) -> &mut Slot {
        &mut self.slots[page.0 as usize]
    }

    /// Panics unless every count is what the tables of all sequences say.
    #[cfg(test)]
    pub(super) fn assert_exact<'a>(&self, tables: impl Iterator<Item = &'a [PageId]>) {
        let mut references = vec![0; self.slots.len()];
        for page in tables.flatten() {
            references[page.0 as usize] += 1;
        }
        let mut children = vec![0; self.slots.len()];
        let mut roles = vec![0; self.slots.len()];
        for page in &self.free {
            roles[page.0 as usize] += 1;
        }
        for cached in self.slots.iter().filter_map(|slot| slot.cached.as_ref()) {
            if let Some(parent) = cached.parent {
                assert!(
                    self.slot(parent).cached.is_some(),
                    "the parent of a cached page is cached"
                );
                children[parent.0 as usize] += 1;
            }
        }
        let mut idle = 0;
        let mut named = 0;
        for (index, slot) in self.slots.iter().enumerate() {
            let page = PageId(u32::try_from(index).unwrap());
            assert_eq!(slot.references, references[index], "references of {page:?}");
            let mut leaf = None;
            if let Some(cached) = &slot.cached {
                named += 1;
                assert_eq!(self.names.get(&cached.name), Some(&page));
                assert_eq!(cached.children, children[index], "children of {page:?}");
                let parent = cached.parent.map(|parent| self.slot(parent).references);
                assert!(parent.is_none_or(|parent| parent >= slot.references), "{page:?}");
                if slot.references == 0 {
                    idle += 1;
                    leaf = (cached.children == 0).then_some((cached.last_used, page));
                }
            }
            let in_leaves = self.leaves.iter().find(|(_, leaf)| *leaf == page);
            assert_eq!(in_leaves.copied(), leaf, "{page:?} among the leaves");
            let held = slot.references > 0 || slot.cached.is_some();
            assert_eq!(roles[index], usize::from(!held), "{page:?} has one role");
        }
        assert_eq!((self.idle, self.names.len()), (idle, named));
    }
}
