//! The token by which a member of etcd knows who calls.
//!
//! A member knows the tokens it gave until they expire or it restarts; it then refuses the call and
//! asking for another token helps. Tokens are kept for each member: where they are replicated, their
//! use prolongs them at one member only.

use std::sync::Arc;

use tokio::sync::Mutex;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use tracing::debug;

use super::{
    access::EtcdCredentials,
    endpoints::reasons,
    stubs::{AuthenticateRequest, auth_client::AuthClient},
};

/// A member's channel, and the token that goes with every call.
pub(super) type Connection = InterceptedService<Channel, Token>;

/// What a member knows a caller by; nothing where it does not ask.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Token(Option<MetadataValue<Ascii>>);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("token", token.clone());
        }
        Ok(request)
    }
}

/// The token of one member.
pub(super) struct Session {
    credentials: Option<Arc<EtcdCredentials>>,
    /// `None` before the first was asked for. Locked while one is asked for: once is enough.
    token: Mutex<Option<Token>>,
}

impl Session {
    pub(super) fn new(credentials: Option<Arc<EtcdCredentials>>) -> Self {
        Self { credentials, token: Mutex::default() }
    }

    /// Returns the token in use, or another one if it is `refused`.
    pub(super) async fn other_than(
        &self,
        refused: Option<&Token>,
        channel: &Channel,
    ) -> Result<Token, Status> {
        let Some(credentials) = &self.credentials else { return Ok(Token::default()) };
        let mut token = self.token.lock().await;
        if let Some(token) = token.as_ref().filter(|token| Some(*token) != refused) {
            return Ok(token.clone());
        }
        let new = authenticate(channel.clone(), credentials).await?;
        Ok(token.insert(new).clone())
    }

    /// Returns whether another token may help against what a member said.
    pub(super) fn is_stale(&self, status: &Status) -> bool {
        let said = |text| status.message().contains(text);
        self.credentials.is_some()
            && match status.code() {
                Code::Unauthenticated => true,
                // Authentication was enabled, or users changed, after the token was given.
                Code::InvalidArgument => {
                    said("user name is empty") || said("revision of auth store is old")
                }
                _ => false,
            }
    }
}

/// Returns whether a member refuses the caller, as opposed to having trouble.
pub(super) fn is_refusal(status: &Status) -> bool {
    let said = |text| status.message().contains(text);
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => true,
        Code::InvalidArgument => said("authentication failed") || said("user name is empty"),
        _ => false,
    }
}

async fn authenticate(channel: Channel, credentials: &EtcdCredentials) -> Result<Token, Status> {
    let password = credentials.password.read();
    let password = password.map_err(|error| Status::unauthenticated(reasons(&error)))?;
    let request = AuthenticateRequest { name: credentials.user.clone(), password };
    match AuthClient::new(channel).authenticate(request).await {
        Ok(answer) => {
            let token = answer.into_inner().token;
            let mut token: MetadataValue<Ascii> = token
                .parse()
                .map_err(|_| Status::internal("etcd gave a token that cannot be sent back"))?;
            token.set_sensitive(true);
            debug!(user = credentials.user, "etcd gave a token");
            Ok(Token(Some(token)))
        }
        // Authentication is not enabled (yet).
        Err(status) if status.code() == Code::FailedPrecondition => Ok(Token::default()),
        Err(status) => Err(status),
    }
}
