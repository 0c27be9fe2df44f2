//! What etcd is shown, and what it has to show, before it is talked to: certificates and passwords.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::ClusterError;

/// How connections to `https://` addresses are secured.
///
/// The files are read again when no member can be reached, so that renewed certificates take
/// effect without a restart.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct EtcdTls {
    /// PEM file of the authorities that vouch for the members; `None` trusts the public ones.
    pub authorities: Option<PathBuf>,
    /// PEM files of the certificate to show to members, and of its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name that the members' certificates must bear; `None` takes the host of each address.
    pub server_name: Option<String>,
}

/// Whom etcd is to take this process for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EtcdCredentials {
    /// Name of the user.
    pub user: String,
    /// The user's password.
    pub password: EtcdPassword,
}

/// A password.
#[derive(Clone, Eq, PartialEq)]
pub enum EtcdPassword {
    /// The password itself.
    Given(String),
    /// The file that holds it, read whenever etcd is to be convinced. A newline at its end is not
    /// part of it.
    File(PathBuf),
}

impl fmt::Debug for EtcdPassword {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given(_) => f.write_str("Given(hidden)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

impl EtcdPassword {
    /// Returns the password.
    pub(super) fn read(&self) -> Result<String, ClusterError> {
        match self {
            Self::Given(password) => Ok(password.clone()),
            Self::File(path) => {
                let text = read("the password for etcd", path, |path| fs::read_to_string(path))?;
                Ok(text.trim_end_matches(['\r', '\n']).to_owned())
            }
        }
    }
}

impl EtcdTls {
    /// Returns whether anything is set.
    pub(super) fn is_set(&self) -> bool {
        *self != Self::default()
    }

    /// Reads the files.
    pub(super) fn read(&self) -> Result<Pems, ClusterError> {
        let authorities = match &self.authorities {
            None => None,
            Some(path) => {
                let pem = read("the authorities of etcd", path, |path| fs::read(path))?;
                // Without this, a file that holds none would make every handshake fail.
                let holds_any = String::from_utf8_lossy(&pem).contains("-----BEGIN CERTIFICATE");
                if !holds_any {
                    let path = path.display();
                    return Err(ClusterError::Tls(format!("{path} holds no PEM certificate")));
                }
                Some(pem)
            }
        };
        let identity = match &self.identity {
            None => None,
            Some((certificate, key)) => Some((
                read("the certificate for etcd", certificate, |path| fs::read(path))?,
                read("the key of the certificate for etcd", key, |path| fs::read(path))?,
            )),
        };
        Ok(Pems { authorities, identity, server_name: self.server_name.clone() })
    }
}

/// What the files held.
#[derive(Clone, Eq, PartialEq)]
pub(super) struct Pems {
    authorities: Option<Vec<u8>>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
    server_name: Option<String>,
}

impl Pems {
    pub(super) fn config(&self) -> ClientTlsConfig {
        let config = match &self.authorities {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            None => ClientTlsConfig::new().with_webpki_roots(),
        };
        let config = match &self.identity {
            Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
            None => config,
        };
        match &self.server_name {
            Some(name) => config.domain_name(name),
            None => config,
        }
    }
}

fn read<T>(
    what: &'static str,
    path: &Path,
    read: impl FnOnce(&Path) -> std::io::Result<T>,
) -> Result<T, ClusterError> {
    read(path).map_err(|source| ClusterError::File { what, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        let credentials = EtcdCredentials {
            user: "tercet".to_owned(),
            password: EtcdPassword::Given("open sesame".to_owned()),
        };
        let shown = format!("{credentials:?}");
        assert!(shown.contains("tercet") && !shown.contains("sesame"), "{shown}");
    }

    #[test]
    fn a_password_may_end_in_a_newline_in_its_file() {
        let path = std::env::temp_dir().join(format!("tercet-password-{}", std::process::id()));
        fs::write(&path, " open sesame \r\n").unwrap();
        assert_eq!(EtcdPassword::File(path.clone()).read().unwrap(), " open sesame ");
        fs::remove_file(&path).unwrap();
        let error = EtcdPassword::File(path.clone()).read().unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
}
