//! A worker without a model, for tests of the cluster: `tercet_tests::synthetic`.

use anyhow::Result;
use tercet_tests::synthetic::{self, Options};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    synthetic::run(Options::parse(std::env::args().skip(1))?).await
}
