//! Requests to a hub: tries, redirects, and a token that stays with the host it is for.

use std::{env, fmt, fs, path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use ureq::{Agent, Body, http::Response};

/// Tries of a request, or of going on with a file without a byte of progress.
pub(super) const TRIES: u32 = 5;
/// Longest pause a hub may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A connection that is silent for so long is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// Redirects followed for one file; hubs use one or two.
const REDIRECTS: usize = 8;

/// A secret.
pub(super) struct Token(String);

impl Token {
    /// Finds the token where the hub's own programs keep it.
    pub(super) fn find() -> Option<Self> {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.trim().is_empty());
        let folder = |name: &str| env::var_os(name).filter(|path| !path.is_empty());
        let kept = || {
            let path = match (folder("HF_TOKEN_PATH"), folder("HF_HOME"), folder("HOME")) {
                (Some(path), ..) => PathBuf::from(path),
                (None, Some(home), _) => PathBuf::from(home).join("token"),
                (None, None, home) => PathBuf::from(home?).join(".cache/huggingface/token"),
            };
            fs::read_to_string(path).ok()
        };
        variable("HF_TOKEN").or_else(kept).and_then(|text| Self::new(&text))
    }

    /// Takes a token, unless it is empty.
    pub(super) fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What a hub answers in the end.
#[derive(Debug)]
pub(super) enum Answer {
    /// A body, whole or a part of it.
    Found(Response<Body>),
    /// A status that will not change by asking again.
    Refused(u16),
}

/// A hub.
#[derive(Debug)]
pub(super) struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
    pause: Duration,
}

impl Hub {
    /// Makes the client of a hub at `endpoint`; `pause` is the first between two tries.
    pub(super) fn new(endpoint: &str, token: Option<Token>, pause: Duration) -> Result<Self> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if origin(&endpoint).is_none() {
            bail!("the hub `{endpoint}` is no http:// or https:// address");
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here: the token must not go along to another host.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("tercet/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        Ok(Self { agent: config.into(), endpoint, token, pause })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Returns the address of something on the hub.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.endpoint)
    }

    /// Asks for `url`, from byte `from` on if given, again and again while that may help.
    pub(super) fn get(&self, url: &str, from: Option<u64>) -> Result<Answer> {
        let mut tries = 1;
        loop {
            let (problem, asked) = match self.follow(url, from) {
                Ok(response) => match response.status().as_u16() {
                    200 | 206 => return Ok(Answer::Found(response)),
                    status @ (408 | 425 | 429 | 500..=599) => {
                        let header = response.headers().get("retry-after");
                        let seconds = header.and_then(|value| value.to_str().ok()?.parse().ok());
                        (anyhow!("it answers {status}"), seconds.map(Duration::from_secs))
                    }
                    status => return Ok(Answer::Refused(status)),
                },
                Err(error) => (error, None),
            };
            if tries == TRIES {
                return Err(problem.context(format!("gave up on {url} after {TRIES} tries")));
            }
            self.wait(tries, asked);
            tries += 1;
        }
    }

    /// Waits after a failed try: as long as the hub asks, else twice as long each time.
    pub(super) fn wait(&self, tries: u32, asked: Option<Duration>) {
        let usual = self.pause * 2_u32.pow(tries.min(TRIES) - 1);
        thread::sleep(asked.unwrap_or(usual).min(LONGEST_PAUSE));
    }

    fn follow(&self, url: &str, from: Option<u64>) -> Result<Response<Body>> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS {
            let mut request = self.agent.get(&url).header("accept-encoding", "identity");
            if let Some(from) = from {
                request = request.header("range", format!("bytes={from}-"));
            }
            let is_ours = origin(&url).is_some() && origin(&url) == origin(&self.endpoint);
            if let Some(Token(token)) = self.token.as_ref().filter(|_| is_ours) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().with_context(|| format!("ask {}", host(&url)))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get("location").and_then(|to| to.to_str().ok());
            let location = location.ok_or_else(|| {
                anyhow!("{} redirects to nowhere ({})", host(&url), response.status())
            })?;
            url = match origin(location) {
                Some(_) if url.starts_with("https:") && !location.starts_with("https:") => {
                    bail!("{} redirects from https to an unprotected address", host(&url))
                }
                Some(_) => location.to_owned(),
                None if location.starts_with('/') && !location.starts_with("//") => {
                    format!("{}{location}", origin(&url).unwrap_or_default())
                }
                None => bail!("{} redirects to `{location}`, no address", host(&url)),
            };
        }
        bail!("{} redirects more than {REDIRECTS} times", host(&url))
    }
}

/// Returns scheme, host and port of an address.
fn origin(url: &str) -> Option<&str> {
    let start = ["https://", "http://"].iter().find(|start| url.starts_with(**start))?.len();
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    let authority = &url[start..end];
    // Names and passwords before an @ could make one host look like another.
    (!authority.is_empty() && !authority.contains('@')).then_some(&url[..end])
}

/// Returns what of an address may be shown: signatures come after the host.
fn host(url: &str) -> &str {
    origin(url).unwrap_or("the hub")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_told_apart() {
        assert_eq!(origin("https://a.b:1/c?d"), Some("https://a.b:1"));
        assert_eq!(origin("http://a"), Some("http://a"));
        for url in ["ftp://a", "https://", "https://a@b/c", "a/b", ""] {
            assert_eq!(origin(url), None, "{url}");
        }
    }

    #[test]
    fn a_token_is_never_shown() {
        let hub = Hub::new("https://a", Token::new(" secret\n"), Duration::ZERO).unwrap();
        assert!(hub.has_token() && !format!("{hub:?}").contains("secret"));
        assert!(Token::new(" \n").is_none());
        assert!(Hub::new("a", None, Duration::ZERO).is_err());
    }
}
