//! The cluster to be part of, and how its etcd is talked to.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;
use tercet_cluster::{ClusterName, EtcdCredentials, EtcdOptions, EtcdPassword, EtcdTls};

use crate::failure::misconfigured;

/// The cluster to be part of.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClusterArgs {
    /// The cluster's etcd; several members separated by commas
    #[arg(long, env = "TERCET_ETCD", value_name = "URL", value_delimiter = ',', required = true)]
    pub(crate) etcd: Vec<String>,
    /// PEM file of the authorities that vouch for etcd at https:// addresses [default: the public
    /// ones]
    #[arg(long, env = "TERCET_ETCD_CA", value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// PEM file of the certificate to show to etcd; read again when it is renewed [default: none]
    #[arg(long, env = "TERCET_ETCD_CERT", value_name = "FILE")]
    etcd_cert: Option<PathBuf>,
    /// PEM file of the key of --etcd-cert [default: none]
    #[arg(long, env = "TERCET_ETCD_KEY", value_name = "FILE")]
    etcd_key: Option<PathBuf>,
    /// Name that the certificates of etcd must bear [default: the host of each address]
    #[arg(long, env = "TERCET_ETCD_SERVER_NAME", value_name = "NAME")]
    etcd_server_name: Option<String>,
    /// User to log in to etcd as [default: none, or the name in --etcd-cert]
    #[arg(long, env = "TERCET_ETCD_USER", value_name = "NAME")]
    etcd_user: Option<String>,
    /// Password of --etcd-user. Not taken as a flag, which others could see: set the variable, the
    /// key in the configuration file, or --etcd-password-file [default: none]
    #[arg(long, env = "TERCET_ETCD_PASSWORD", value_name = "PASSWORD", hide_env_values = true)]
    etcd_password: Option<Secret>,
    /// File that holds the password of --etcd-user; read again when etcd refuses the password
    /// [default: none]
    #[arg(long, env = "TERCET_ETCD_PASSWORD_FILE", value_name = "FILE")]
    etcd_password_file: Option<PathBuf>,
    /// Name of the cluster: workers and gateways of one name find each other
    #[arg(long, env = "TERCET_CLUSTER", value_name = "NAME", default_value = "default")]
    pub(crate) cluster: ClusterName,
}

/// What must not be shown.
#[derive(Clone)]
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("hidden")
    }
}

impl From<String> for Secret {
    fn from(secret: String) -> Self {
        Self(secret)
    }
}

impl ClusterArgs {
    /// Returns how the registry is reached.
    pub(crate) fn options(&self) -> anyhow::Result<EtcdOptions> {
        let options = EtcdOptions::new(self.etcd.clone(), self.cluster.clone());
        Ok(EtcdOptions { tls: self.tls()?, credentials: self.credentials()?, ..options })
    }

    fn tls(&self) -> anyhow::Result<EtcdTls> {
        let identity = match (&self.etcd_cert, &self.etcd_key) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) => return Err(half("--etcd-cert", "--etcd-key")),
            (None, Some(_)) => return Err(half("--etcd-key", "--etcd-cert")),
        };
        let (authorities, server_name) = (self.etcd_ca.clone(), self.etcd_server_name.clone());
        Ok(EtcdTls { authorities, identity, server_name })
    }

    fn credentials(&self) -> anyhow::Result<Option<EtcdCredentials>> {
        let password = match (&self.etcd_password, &self.etcd_password_file) {
            (Some(_), Some(_)) => {
                return Err(misconfigured(anyhow!(
                    "the password for etcd is given twice: leave out TERCET_ETCD_PASSWORD or \
                     --etcd-password-file"
                )));
            }
            (Some(Secret(password)), None) => Some(EtcdPassword::Given(password.clone())),
            (None, Some(path)) => Some(EtcdPassword::File(path.clone())),
            (None, None) => None,
        };
        match (&self.etcd_user, password) {
            (Some(user), Some(password)) => {
                Ok(Some(EtcdCredentials { user: user.clone(), password }))
            }
            (None, None) => Ok(None),
            (Some(_), None) => {
                Err(half("--etcd-user", "TERCET_ETCD_PASSWORD or --etcd-password-file"))
            }
            (None, Some(_)) => Err(half("the password for etcd", "--etcd-user")),
        }
    }
}

/// Says that one setting is of no use without another.
fn half(given: &str, missing: &str) -> anyhow::Error {
    misconfigured(anyhow!("{given} needs {missing} with it"))
}
