//! The commands of operators.

use std::time::Duration;

use clap::Args;

use super::{DEFAULT_ADMIN_ADDRESS, values::duration};

/// The gateway that an operator asks.
#[derive(Args, Debug)]
pub(crate) struct AdminAddress {
    /// Admin address of a gateway, as its --admin-listen says
    #[arg(long, visible_alias = "connect", env = "TERCET_ADMIN", value_name = "HOST:PORT")]
    #[arg(default_value = DEFAULT_ADMIN_ADDRESS)]
    pub(crate) admin: String,
}

/// `tercet status`.
#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) address: AdminAddress,
    /// Prints JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `tercet top`.
#[derive(Args, Debug)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub(crate) address: AdminAddress,
}

/// `tercet drain`.
#[derive(Args, Debug)]
pub(crate) struct DrainArgs {
    /// Name of the worker, as `tercet status` shows it
    pub(crate) worker: String,
    #[command(flatten)]
    pub(crate) address: AdminAddress,
    /// Returns when the worker has left the cluster, or fails after this time [default: does not
    /// wait; without a time, 5m]
    #[arg(long, value_name = "TIME", value_parser = duration, num_args = 0..=1)]
    #[arg(default_missing_value = "5m", require_equals = true)]
    pub(crate) wait: Option<Duration>,
}

/// Where a gateway serves its operators.
#[derive(Args, Debug)]
pub(crate) struct AdminArgs {
    /// Address to serve operators at (`tercet status`, `top` and `drain`), or off. Nobody is asked
    /// who they are there: leave it to this machine [default: 127.0.0.1:7173, unless another process
    /// has it]
    #[arg(long, env = "TERCET_ADMIN_LISTEN", value_name = "HOST:PORT")]
    pub(crate) admin_listen: Option<String>,
}
