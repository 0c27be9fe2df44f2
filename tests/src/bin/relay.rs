//! Passes TCP connections on, as well or badly as it is told: `relay LISTEN TARGET`. See
//! `tercet_tests::relay`.

use std::io::{self, Write as _};

use anyhow::{Result, bail};
use tercet_tests::relay::Relay;
use tokio::sync::mpsc;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [listen, target] = args.as_slice() else { bail!("usage: relay LISTEN TARGET") };
    let relay = Relay::start(listen, target.clone()).await?;
    writeln!(io::stdout(), "listening on {}", relay.address())?;
    let (lines, mut heard) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    // Its end is that of the test.
    while let Some(line) = heard.recv().await {
        relay.obey(line.parse()?);
    }
    Ok(())
}
