//! The nodes of xenstore, who may do what with them, and transactions.

use std::collections::BTreeMap;

/// Errors, as the strings that go over the wire.
pub(super) type Errno = &'static str;

/// The most bytes of an absolute path (XENSTORE_ABS_PATH_MAX).
const PATH_MAX: usize = 3072;
/// What a domain other than domain 0 may have: nodes, bytes of a node, transactions at a time.
const NODES: usize = 1000;
const VALUE_MAX: usize = 2048;
const TRANSACTIONS: usize = 10;

/// A node: by its absolute path, the root's being empty.
#[derive(Clone)]
struct Node {
    value: Vec<u8>,
    permissions: Permissions,
}

/// First the owner, who may do everything, with what all others may do; then domains with what they may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Permissions(Vec<(Right, u16)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    None,
    Read,
    Write,
    Both,
}

impl Right {
    const LETTERS: [(u8, Self); 4] = [(b'n', Self::None), (b'r', Self::Read), (b'w', Self::Write), (b'b', Self::Both)];

    fn allows(self, wanted: Self) -> bool {
        self == wanted || self == Self::Both
    }
}

impl Permissions {
    /// From `n1`, `r2`, …
    pub(super) fn parse<'a>(words: impl Iterator<Item = &'a [u8]>) -> Option<Self> {
        let parse = |word: &[u8]| {
            let (letter, id) = word.split_first()?;
            let (_, right) = Right::LETTERS.into_iter().find(|(known, _)| known == letter)?;
            Some((right, std::str::from_utf8(id).ok()?.parse().ok()?))
        };
        let list: Vec<_> = words.map(parse).collect::<Option<_>>()?;
        (!list.is_empty()).then_some(Self(list))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let letter =
            |right| Right::LETTERS.into_iter().find(|&(_, known)| known == right).map_or('n', |it| it.0.into());
        self.0.iter().flat_map(|&(right, id)| format!("{}{id}\0", letter(right)).into_bytes()).collect()
    }

    fn owner(&self) -> u16 {
        self.0[0].1
    }

    fn allow(&self, domain: u16, wanted: Right) -> bool {
        let listed = || self.0[1..].iter().find(|(_, id)| *id == domain).map_or(self.0[0].0, |(right, _)| *right);
        domain == 0 || domain == self.owner() || listed().allows(wanted)
    }

    /// Whether `domain` may read the node.
    pub(super) fn readable(&self, domain: u16) -> bool {
        self.allow(domain, Right::Read)
    }
}

/// A change that watches are to hear of.
#[derive(Clone)]
pub(super) struct Change {
    pub(super) path: String,
    pub(super) permissions: Permissions,
    /// Only for who watches this very node: those above it hear of the removal of the whole.
    pub(super) exact: bool,
}

/// All nodes.
#[derive(Clone)]
pub(super) struct Tree {
    nodes: BTreeMap<String, Node>,
    changes: Vec<Change>,
}

impl Tree {
    fn new() -> Self {
        let root = Node { value: Vec::new(), permissions: Permissions(vec![(Right::None, 0)]) };
        Self { nodes: BTreeMap::from([(String::new(), root)]), changes: Vec::new() }
    }

    fn get(&self, by: u16, path: &str) -> Result<&Node, Errno> {
        match self.nodes.get(path) {
            Some(node) if node.permissions.readable(by) => Ok(node),
            None if self.nearest(path).permissions.readable(by) => Err("ENOENT"),
            _ => Err("EACCES"),
        }
    }

    /// The node at `path`, or the one above it that exists.
    fn nearest(&self, path: &str) -> &Node {
        let mut path = path;
        loop {
            if let Some(node) = self.nodes.get(path) {
                return node;
            }
            path = path.rfind('/').map_or("", |at| &path[..at]);
        }
    }

    pub(super) fn read(&self, by: u16, path: &str) -> Result<Vec<u8>, Errno> {
        self.get(by, path).map(|node| node.value.clone())
    }

    /// The names of the nodes right below `path`.
    pub(super) fn directory(&self, by: u16, path: &str) -> Result<Vec<u8>, Errno> {
        self.get(by, path)?;
        let below = format!("{path}/");
        let all = self.nodes.range(below.clone()..).map_while(|(path, _)| path.strip_prefix(&below));
        Ok(all.filter(|name| !name.contains('/')).flat_map(|name| [name.as_bytes(), b"\0"].concat()).collect())
    }

    /// Sets a node, and makes it and those above it; without a value, only makes it.
    pub(super) fn write(&mut self, by: u16, path: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        let nearest = self.nearest(path);
        if !nearest.permissions.allow(by, Right::Write) {
            return Err("EACCES");
        }
        if by != 0 && value.is_some_and(|value| value.len() > VALUE_MAX) {
            return Err("ENOSPC");
        }
        let mut permissions = nearest.permissions.clone();
        if by != 0 {
            permissions.0[0].1 = by;
        }
        let mut missing: Vec<_> = path.match_indices('/').map(|(at, _)| &path[..at]).chain([path]).collect();
        missing.retain(|path| !self.nodes.contains_key(*path));
        let owned = || self.nodes.values().filter(|node| node.permissions.owner() == by).count();
        if by != 0 && !missing.is_empty() && owned() + missing.len() > NODES {
            return Err("ENOSPC");
        }
        let created = !missing.is_empty();
        for path in missing {
            self.nodes.insert(path.into(), Node { value: Vec::new(), permissions: permissions.clone() });
        }
        let Some(node) = self.nodes.get_mut(path) else { return Err("EIO") };
        if let Some(value) = value {
            node.value = value.into();
        } else if !created {
            return Ok(());
        }
        let permissions = node.permissions.clone();
        self.changes.push(Change { path: path.into(), permissions, exact: false });
        Ok(())
    }

    pub(super) fn remove(&mut self, by: u16, path: &str) -> Result<(), Errno> {
        if path.is_empty() {
            return Err("EINVAL");
        }
        let Some(node) = self.nodes.get(path) else {
            let above = path.rfind('/').map_or("", |at| &path[..at]);
            return if self.nodes.contains_key(above) { Ok(()) } else { Err("ENOENT") };
        };
        if !node.permissions.allow(by, Right::Write) {
            return Err("EACCES");
        }
        let below = format!("{path}/");
        let all = self.nodes.range(below.clone()..).map_while(|(path, _)| path.starts_with(&below).then_some(path));
        let all: Vec<_> = [path.to_owned()].into_iter().chain(all.cloned()).collect();
        for (number, path) in all.into_iter().enumerate() {
            if let Some(node) = self.nodes.remove(&path) {
                self.changes.push(Change { path, permissions: node.permissions, exact: number > 0 });
            }
        }
        Ok(())
    }

    pub(super) fn permissions(&self, by: u16, path: &str) -> Result<&Permissions, Errno> {
        self.get(by, path).map(|node| &node.permissions)
    }

    pub(super) fn set_permissions(&mut self, by: u16, path: &str, permissions: Permissions) -> Result<(), Errno> {
        self.get(by, path)?;
        let Some(node) = self.nodes.get_mut(path) else { return Err("ENOENT") };
        // Only domain 0 may give a node away.
        if by != 0 && (node.permissions.owner() != by || permissions.owner() != by) {
            return Err("EPERM");
        }
        node.permissions = permissions.clone();
        self.changes.push(Change { path: path.into(), permissions, exact: false });
        Ok(())
    }
}

/// The nodes, and copies of them that transactions work on.
pub(super) struct Store {
    tree: Tree,
    /// Counts what changed.
    generation: u64,
    /// By domain and number: the copy, and the generation it was made of.
    transactions: BTreeMap<(u16, u32), (Tree, u64)>,
    last_transaction: u32,
}

impl Store {
    pub(super) fn new() -> Self {
        Self { tree: Tree::new(), generation: 0, transactions: BTreeMap::new(), last_transaction: 0 }
    }

    /// The nodes as `domain` sees them in `transaction`; 0 is none.
    pub(super) fn tree(&mut self, domain: u16, transaction: u32) -> Result<&mut Tree, Errno> {
        if transaction == 0 {
            return Ok(&mut self.tree);
        }
        self.transactions.get_mut(&(domain, transaction)).map(|(tree, _)| tree).ok_or("ENOENT")
    }

    /// What changed outside of transactions since the last call.
    pub(super) fn changes(&mut self) -> Vec<Change> {
        let changes = std::mem::take(&mut self.tree.changes);
        self.generation += u64::from(!changes.is_empty());
        changes
    }

    /// Starts a transaction: its number.
    pub(super) fn start(&mut self, domain: u16) -> Result<u32, Errno> {
        if domain != 0 && self.transactions.range((domain, 0)..=(domain, u32::MAX)).count() == TRANSACTIONS {
            return Err("ENOSPC");
        }
        self.last_transaction = self.last_transaction.wrapping_add(1).max(1);
        self.transactions.insert((domain, self.last_transaction), (self.tree.clone(), self.generation));
        Ok(self.last_transaction)
    }

    /// Ends a transaction. Fails with EAGAIN if it is to be kept, but other changes came first.
    pub(super) fn end(&mut self, domain: u16, transaction: u32, keep: bool) -> Result<(), Errno> {
        let (tree, generation) = self.transactions.remove(&(domain, transaction)).ok_or("ENOENT")?;
        if !keep {
            return Ok(());
        }
        if generation != self.generation {
            return Err("EAGAIN");
        }
        self.tree = tree;
        Ok(())
    }
}

/// The absolute path that `path` means to `domain`, as nodes are kept under; none if it is none.
pub(super) fn absolute(domain: u16, path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok()?;
    let path = match path {
        "/" => String::new(),
        _ if path.starts_with('/') => path.into(),
        _ => format!("{}/{path}", home(domain)),
    };
    let good = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_@".contains(&b));
    (path.len() <= PATH_MAX && path.split('/').skip(1).all(good)).then_some(path)
}

/// Where a domain's own nodes are.
pub(super) fn home(domain: u16) -> String {
    format!("/local/domain/{domain}")
}
