//! Hosts in network namespaces are what the tests of a cluster take them for.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tercet_tests::{Host, Network, PATIENCE, Process, helper, run};

/// Long enough for a packet, short enough to wait for none.
const MOMENT: Duration = Duration::from_millis(300);

#[test]
fn hosts_are_cut_off_and_come_back() -> Result<()> {
    let network = Network::new()?;
    let (near, far) = (network.host()?, network.host()?);
    let target = TcpListener::bind((network.address(), 0))?;
    // Each takes connections on one host and makes them to somewhere else.
    let relay = |host: &Host, target: String| -> Result<_> {
        let mut command = Command::new(helper("relay"));
        let mut command = host.command(command.args([format!("{}:0", host.address()), target]));
        let mut process = Process::start_listening("relay", &mut command)?;
        let address: SocketAddr = process
            .line("line `listening on`", |line| line.strip_prefix("listening on ")?.parse().ok())?;
        Ok((process, address))
    };
    let (_far_relay, far_address) = relay(&far, target.local_addr()?.to_string())?;
    let (_near_relay, near_address) = relay(&near, far_address.to_string())?;
    ensure!(near_address.ip() == near.address() && far_address.ip() == far.address());

    TcpStream::connect_timeout(&near_address, PATIENCE).context("from the test to a host")?;
    target.accept().context("from host to host to the test")?;
    for (cut, heal) in
        [(Host::cut as fn(&_) -> Result<()>, Host::heal as fn(&_) -> _), (Host::unplug, Host::plug)]
    {
        cut(&far)?;
        let lost = TcpStream::connect_timeout(&far_address, MOMENT).map_err(|error| error.kind());
        ensure!(
            matches!(
                lost,
                Err(ErrorKind::TimedOut | ErrorKind::WouldBlock | ErrorKind::HostUnreachable)
            ),
            "{lost:?}: a partition tells nobody"
        );
        TcpStream::connect_timeout(&near_address, PATIENCE)
            .context("the other host is not cut off")?;
        heal(&far)?;
        TcpStream::connect_timeout(&far_address, PATIENCE).context("after the partition")?;
    }
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    let network = Network::new()?;
    let host = network.host()?;
    let mut sleep = host.command(Command::new("sleep").arg("600"));
    let mut sleeper = Process::start("sleep", &mut sleep)?;
    let traces = || -> Result<bool> {
        let names = run(Command::new("ip").args(["netns", "list"]))?;
        let links = run(Command::new("ip").args(["-o", "link"]))?;
        let (own, id) = (format!("tercet{}-", std::process::id()), host_number(&host));
        Ok(names.lines().any(|line| line.starts_with(&own) && line.contains(&id))
            || links.contains(&format!("t{}-", std::process::id())) && links.contains(&id))
    };
    ensure!(traces()?, "namespaces and links have the names looked for");
    drop(host);
    // Killed with its host.
    ensure!(!sleeper.wait()?.success());
    Ok(())
}

fn host_number(host: &Host) -> String {
    format!("-{}", host.address().octets()[3])
}
