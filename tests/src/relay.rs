//! A stretch of network between two TCP peers, as good or bad as a test wants.
//!
//! [`Relay`] passes connections on within the test; the program `relay` does so as a process, for
//! instance on a [`Host`](crate::Host), and takes [`Command`]s on standard input.

use std::{io, net::SocketAddr, str::FromStr, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{self, Instant},
};

/// Most bytes passed on at once.
const CHUNK: usize = 16 * 1024;
/// Most chunks under way in each direction of a connection.
const UNDER_WAY: usize = 256;
/// How long a lost packet holds up everything behind it: the shortest time after which TCP sends
/// it again.
const RETRANSMISSION: Duration = Duration::from_millis(200);

/// How good the network is. By default it is perfect.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Conditions {
    /// How long everything takes, each way.
    pub delay: Duration,
    /// Most bytes a second, each way and connection; 0 for any number.
    pub bytes_per_second: u64,
    /// Of a thousand chunks, how many come late, with everything behind them, as after a loss.
    pub lost_of_1000: u32,
    /// Nothing passes, and nobody is told.
    pub stalled: bool,
}

/// What the program `relay` is told: `reset`, or `conditions DELAY_MILLIS BYTES_PER_SECOND
/// LOST_OF_1000 STALLED` with `STALLED` true or false.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// Resets all connections.
    Reset,
    /// Changes how good the network is.
    Conditions(Conditions),
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reset => f.write_str("reset"),
            Self::Conditions(Conditions { delay, bytes_per_second, lost_of_1000, stalled }) => {
                let delay = delay.as_millis();
                write!(f, "conditions {delay} {bytes_per_second} {lost_of_1000} {stalled}")
            }
        }
    }
}

impl FromStr for Command {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> anyhow::Result<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["reset"] => Ok(Self::Reset),
            ["conditions", delay, rate, lost, stalled] => Ok(Self::Conditions(Conditions {
                delay: Duration::from_millis(delay.parse().with_context(|| line.to_owned())?),
                bytes_per_second: rate.parse().with_context(|| line.to_owned())?,
                lost_of_1000: lost.parse().with_context(|| line.to_owned())?,
                stalled: stalled.parse().with_context(|| line.to_owned())?,
            })),
            _ => bail!("no such command: {line:?}"),
        }
    }
}

/// A relay that listens. All connections end when it is dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    conditions: watch::Sender<Conditions>,
    resets: watch::Sender<u64>,
    _tasks: JoinSet<()>,
}

impl Relay {
    /// Begins to pass connections to `listen` on to `target`.
    ///
    /// # Errors
    ///
    /// Returns an error if the address cannot be bound.
    pub async fn start(listen: &str, target: String) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let conditions = watch::Sender::new(Conditions::default());
        let resets = watch::Sender::new(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, target, conditions.subscribe(), resets.subscribe()));
        Ok(Self { address, conditions, resets, _tasks: tasks })
    }

    /// Returns where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Does what a command says.
    pub fn obey(&self, command: Command) {
        match command {
            Command::Reset => self.resets.send_modify(|resets| *resets += 1),
            Command::Conditions(conditions) => {
                self.conditions.send_replace(conditions);
            }
        }
    }
}

async fn accept(
    listener: TcpListener,
    target: String,
    conditions: watch::Receiver<Conditions>,
    resets: watch::Receiver<u64>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // One that is gone already.
                let Ok((near, _)) = accepted else { continue };
                let (target, conditions) = (target.clone(), conditions.clone());
                let mut resets = resets.clone();
                resets.mark_unchanged();
                connections.spawn(connection(near, target, conditions, resets));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(
    mut near: TcpStream,
    target: String,
    conditions: watch::Receiver<Conditions>,
    mut resets: watch::Receiver<u64>,
) {
    // A target that is not there looks like a reset.
    let Ok(mut far) = TcpStream::connect(target).await else {
        _ = near.set_zero_linger();
        return;
    };
    _ = near.set_nodelay(true);
    _ = far.set_nodelay(true);
    let reset = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        let there = pass(near_read, far_write, conditions.clone());
        let back = pass(far_read, near_write, conditions);
        tokio::select! {
            // Both ways: one may be closed and the other not.
            (there, back) = async { tokio::join!(there, back) } => there.is_err() || back.is_err(),
            _ = resets.changed() => true,
        }
    };
    if reset {
        _ = near.set_zero_linger();
        _ = far.set_zero_linger();
    }
}

/// Passes bytes on in one direction until its end.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    conditions: watch::Receiver<Conditions>,
) -> io::Result<()> {
    let (sender, mut chunks) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let mut writing = conditions.clone();
    let read = async move {
        loop {
            let mut chunk = vec![0; CHUNK];
            let length = from.read(&mut chunk).await?;
            chunk.truncate(length);
            let due = Instant::now() + conditions.borrow().delay;
            if length == 0 || sender.send((due, chunk)).await.is_err() {
                return Ok(());
            }
        }
    };
    let write = async move {
        let mut losses = 0;
        while let Some((due, chunk)) = chunks.recv().await {
            time::sleep_until(due).await;
            // Its sender lives as long as the relay.
            let now = *writing.wait_for(|now| !now.stalled).await.map_err(io::Error::other)?;
            if is_lost(&mut losses, now.lost_of_1000) {
                time::sleep(RETRANSMISSION).await;
            }
            to.write_all(&chunk).await?;
            let bytes = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
            if let Some(micros) = (bytes * 1_000_000).checked_div(now.bytes_per_second) {
                time::sleep(Duration::from_micros(micros)).await;
            }
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(|_| ())
}

/// Spreads losses evenly, so that the same traffic meets the same ones.
fn is_lost(counted: &mut u64, lost_of_1000: u32) -> bool {
    let before = *counted;
    *counted += u64::from(lost_of_1000);
    before / 1000 != *counted / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a relay to an echo, and a connection to it.
    async fn echo() -> (Relay, TcpStream, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap().to_string();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (mut from, mut to) = stream.split();
            // Ends with a reset in one of the tests.
            _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let relay = Relay::start("127.0.0.1:0", target).await.unwrap();
        let stream = TcpStream::connect(relay.address()).await.unwrap();
        (relay, stream, tasks)
    }

    async fn there_and_back(stream: &mut TcpStream, bytes: usize) -> Duration {
        let begun = Instant::now();
        stream.write_all(&vec![7; bytes]).await.unwrap();
        stream.read_exact(&mut vec![0; bytes]).await.unwrap();
        begun.elapsed()
    }

    #[tokio::test]
    async fn a_relay_is_as_bad_as_it_is_told() {
        let (relay, mut stream, _tasks) = echo().await;
        let perfect = there_and_back(&mut stream, 100).await;
        assert!(perfect < Duration::from_millis(100), "{perfect:?}");

        let slow = Conditions { delay: Duration::from_millis(60), ..Conditions::default() };
        relay.obey(Command::Conditions(slow));
        assert!(there_and_back(&mut stream, 100).await >= Duration::from_millis(120));

        let narrow = Conditions { bytes_per_second: 100_000, ..Conditions::default() };
        relay.obey(Command::Conditions(narrow));
        // The last chunk has nothing behind it that it could hold up.
        assert!(there_and_back(&mut stream, 4 * CHUNK).await >= Duration::from_millis(450));

        let lossy = Conditions { lost_of_1000: 1000, ..Conditions::default() };
        relay.obey(Command::Conditions(lossy));
        assert!(there_and_back(&mut stream, 100).await >= 2 * RETRANSMISSION);

        relay.obey(Command::Conditions(Conditions { stalled: true, ..Conditions::default() }));
        let stalled =
            time::timeout(Duration::from_millis(300), there_and_back(&mut stream, 100)).await;
        assert!(stalled.is_err());
        relay.obey(Command::Conditions(Conditions::default()));
        stream.read_exact(&mut [0; 100]).await.unwrap();
    }

    #[tokio::test]
    async fn a_reset_is_one() {
        let (relay, mut stream, _tasks) = echo().await;
        there_and_back(&mut stream, 100).await;
        relay.obey(Command::Reset);
        let read = stream.read(&mut [0; 1]).await;
        assert_eq!(read.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
    }

    #[test]
    fn commands_are_read_as_they_are_written() {
        let conditions = Conditions {
            delay: Duration::from_millis(20),
            bytes_per_second: 5,
            lost_of_1000: 3,
            stalled: true,
        };
        for command in [Command::Reset, Command::Conditions(conditions)] {
            assert_eq!(command.to_string().parse::<Command>().unwrap(), command);
        }
        assert!("conditions 1 2".parse::<Command>().is_err());
    }
}
