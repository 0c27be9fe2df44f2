//! Hosts of a test: network namespaces of this machine, on one bridge.
//!
//! ```text
//! the test itself --- bridge 10.213.N.1 --+-- veth -- eth0 10.213.N.2 (namespace of a host)
//!                                         +-- veth -- eth0 10.213.N.3
//! ```

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::Path,
    process::{self, Command},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};

use crate::run;

/// What the names of everything made here begin with; the id of the process follows.
const PREFIX: &str = "tercet";
/// First two numbers of all addresses.
const NET: [u8; 2] = [10, 213];

/// A bridge that hosts are plugged into. Gone, with all hosts, when dropped; what a test that was
/// killed left behind goes when the next one begins.
#[derive(Debug)]
pub struct Network {
    name: String,
    subnet: u8,
    hosts: AtomicU8,
}

/// A machine of its own, as far as the network goes: processes started by [`Host::command`] see
/// nothing but its addresses.
#[derive(Debug)]
pub struct Host {
    namespace: String,
    /// The end of its cable at the bridge.
    port: String,
    address: Ipv4Addr,
}

impl Network {
    /// Makes a network.
    ///
    /// # Errors
    ///
    /// Returns an error that says what is needed where the system does not allow it.
    pub fn new() -> Result<Self> {
        static SUBNETS: Mutex<()> = Mutex::new(());
        let _one_at_a_time = SUBNETS.lock().unwrap_or_else(PoisonError::into_inner);
        remove_leftovers()?;
        let taken = addresses()?;
        let free = (0..=u8::MAX).find(|subnet| !taken.contains(&bridge_address(*subnet)));
        let subnet = free.context("all networks 10.213.0.0/24 to 10.213.255.0/24 are in use")?;
        let network =
            Self { name: format!("{PREFIX}{}", process::id()), subnet, hosts: AtomicU8::new(2) };
        let bridge = network.bridge();
        ip(&["link", "add", &bridge, "type", "bridge"]).with_context(|| {
            "the tests of a cluster make network namespaces: run them as root (CAP_NET_ADMIN, \
             CAP_SYS_ADMIN), with iproute2 and iptables installed"
        })?;
        ip(&["address", "add", &format!("{}/24", network.address()), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        Ok(network)
    }

    /// Returns the address of the test itself.
    pub fn address(&self) -> Ipv4Addr {
        bridge_address(self.subnet)
    }

    /// Plugs in a new host.
    ///
    /// # Errors
    ///
    /// Returns an error if the system does not allow it.
    pub fn host(&self) -> Result<Host> {
        let number = self.hosts.fetch_add(1, Ordering::Relaxed);
        // Names of links have at most 15 bytes.
        let port = format!("t{}-{:x}-{number}", process::id(), self.subnet);
        let namespace = format!("{}-{}-{number}", self.name, self.subnet);
        let address = Ipv4Addr::new(NET[0], NET[1], self.subnet, number);
        ip(&["netns", "add", &namespace])?;
        // From here on, dropping it takes it away.
        let host = Host { namespace, port, address };
        let (space, port) = (host.namespace.as_str(), host.port.as_str());
        let peer = ["peer", "name", "eth0", "netns", space];
        ip(&[&["link", "add", port, "type", "veth"], &peer[..]].concat())?;
        ip(&["link", "set", port, "master", &self.bridge(), "up"])?;
        ip(&["-n", space, "address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        ip(&["-n", space, "link", "set", "lo", "up"])?;
        ip(&["-n", space, "link", "set", "eth0", "up"])?;
        Ok(host)
    }

    fn bridge(&self) -> String {
        format!("t{}-{:x}", process::id(), self.subnet)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Hosts that are still there lose their cable; they go by themselves.
        _ = ip(&["link", "delete", &self.bridge()]);
    }
}

impl Host {
    /// Returns its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Returns a command that runs `command` on this host, as the same process.
    pub fn command(&self, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.namespace]);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// Lets nothing in or out, without a word to anybody: a partition.
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses.
    pub fn cut(&self) -> Result<()> {
        self.filter(&["-I", "INPUT", "-i", "eth0", "-j", "DROP"])?;
        self.filter(&["-I", "OUTPUT", "-o", "eth0", "-j", "DROP"])
    }

    /// Ends a [`Host::cut`].
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses, or nothing was cut.
    pub fn heal(&self) -> Result<()> {
        self.filter(&["-D", "INPUT", "-i", "eth0", "-j", "DROP"])?;
        self.filter(&["-D", "OUTPUT", "-o", "eth0", "-j", "DROP"])
    }

    /// Pulls the cable out at the bridge.
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses.
    pub fn unplug(&self) -> Result<()> {
        ip(&["link", "set", &self.port, "down"])
    }

    /// Ends an [`Host::unplug`].
    ///
    /// # Errors
    ///
    /// Returns an error if the system refuses.
    pub fn plug(&self) -> Result<()> {
        ip(&["link", "set", &self.port, "up"])
    }

    fn filter(&self, rule: &[&str]) -> Result<()> {
        let mut iptables = Command::new("iptables");
        iptables.arg("--wait").args(rule);
        run(&mut self.command(&iptables))?;
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The cable may be gone with its bridge.
        _ = ip(&["link", "delete", &self.port]);
        _ = remove_namespace(&self.namespace);
    }
}

fn ip(args: &[&str]) -> Result<()> {
    run(Command::new("ip").args(args))?;
    Ok(())
}

fn bridge_address(subnet: u8) -> Ipv4Addr {
    Ipv4Addr::new(NET[0], NET[1], subnet, 1)
}

/// Returns the addresses of this machine.
fn addresses() -> Result<BTreeSet<Ipv4Addr>> {
    let listed = run(Command::new("ip").args(["-4", "-o", "address", "show"]))?;
    let words = listed.split_whitespace().filter_map(|word| word.split('/').next());
    Ok(words.filter_map(|word| word.parse().ok()).collect())
}

/// Takes away what processes that are gone have left.
fn remove_leftovers() -> Result<()> {
    let is_left = |owner: &str| {
        let is_id = owner.parse::<u32>().is_ok();
        is_id && !Path::new("/proc").join(owner).exists()
    };
    for namespace in run(Command::new("ip").args(["netns", "list"]))?.lines() {
        let name = namespace.split_whitespace().next().unwrap_or_default();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(is_left) {
            remove_namespace(name)?;
        }
    }
    for link in fs::read_dir("/sys/class/net")? {
        let name = link?.file_name().into_string().unwrap_or_default();
        let owner = name.strip_prefix('t').and_then(|rest| rest.split_once('-'));
        if owner.is_some_and(|(owner, _)| is_left(owner))
            && Path::new("/sys/class/net").join(&name).exists()
        {
            // A cable may go by itself meanwhile, with its namespace.
            _ = ip(&["link", "delete", &name]);
        }
    }
    Ok(())
}

/// Ends what runs in a namespace, and takes it away.
fn remove_namespace(name: &str) -> Result<()> {
    for id in run(Command::new("ip").args(["netns", "pids", name]))?.lines() {
        // It may have ended by itself.
        _ = run(Command::new("kill").args(["-9", id]));
    }
    match ip(&["netns", "delete", name]) {
        Err(error) if Path::new("/run/netns").join(name).exists() => {
            bail!("remove the network namespace {name}: {error:#}")
        }
        _ => Ok(()),
    }
}
