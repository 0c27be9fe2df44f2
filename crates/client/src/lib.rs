//! A client whose streams outlive the servers that compute them.
//!
//! ```text
//! Client (addresses of gateways, one in use) --generate--> Generation --> events of one stream
//!                                                           |  lost: seed, token ids so far
//!                                                           +--the same request, resume--> next
//! ```
//!
//! A stream that breaks off is asked for again with the seed and the tokens so far, at the next
//! address or, after a pause, at the same. One request has one output, so the events that come are
//! those of a stream that nothing disturbed: none is lost, none comes twice.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use tercet_client::{Client, Options};
//! use tercet_proto::v1::{GenerateRequest, generate_request::Input, generate_response::Event};
//!
//! let client = Client::new(["10.0.0.4:7171", "10.0.0.5:7171"], Options::default())?;
//! let prompt = Input::Prompt("KING HENRY.\n".to_owned());
//! let request = GenerateRequest { input: Some(prompt), ..GenerateRequest::default() };
//! let mut generation = client.generate(request).await?;
//! let mut text = String::new();
//! while let Some(event) = generation.next().await? {
//!     if let Event::Delta(delta) = event {
//!         text.push_str(&delta.text);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod client;
mod generation;
mod options;
mod progress;
#[cfg(test)]
mod tests;

pub use self::{
    client::{AddressError, Client, ConnectError, endpoint},
    generation::{GenerateError, Generation},
    options::Options,
};
