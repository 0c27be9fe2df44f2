//! Target: requests, from the bytes on the wire to what servers work with.

use std::fmt::Debug;

use prost::Message;
use tercet_proto::{
    DetokenizeSpec, GenerateSpec, GetModelSpec, Input, InvalidRequest, ScoreSpec, TokenizeInput,
    TokenizeSpec, v1,
};
use tercet_text::TemplateVariables;
use tonic::Status;

use crate::message::{check, good};

/// Most bytes of the details of a status: clients and proxies take 8 KB of headers, and base64 makes
/// four of three.
const MOST_DETAILS: usize = 4096;

/// A request: the first byte says which, the others are its encoding.
///
/// # Panics
/// Over a defect.
pub fn request(data: &[u8]) -> bool {
    let Some((kind, wire)) = data.split_first() else { return false };
    match kind % 5 {
        0 => read::<v1::GenerateRequest, GenerateSpec>(wire, |spec| match &spec.input {
            Input::Chat(chat) => use_variables(chat),
            Input::Prompt(_) | Input::Tokens(_) => {}
        }),
        1 => read::<v1::ScoreRequest, ScoreSpec>(wire, |_| {}),
        2 => read::<v1::TokenizeRequest, TokenizeSpec>(wire, |spec| match &spec.input {
            TokenizeInput::Chat(chat) => use_variables(chat),
            TokenizeInput::Text(_) => {}
        }),
        3 => read::<v1::DetokenizeRequest, DetokenizeSpec>(wire, |_| {}),
        _ => read::<v1::GetModelRequest, GetModelSpec>(wire, |_| {}),
    }
}

/// Reads the variables that a chat brings for its template.
fn use_variables(chat: &v1::Chat) {
    let mut variables = TemplateVariables::default();
    for (name, json) in &chat.template_variables {
        good(variables.set(name, json));
    }
}

/// Decodes and validates a message, uses it, and goes the way back.
fn read<M, S>(wire: &[u8], used: impl FnOnce(&S)) -> bool
where
    M: Message + Default + From<S>,
    S: TryFrom<M> + Clone + Debug + PartialEq,
    S::Error: Refusal,
{
    let Some(message) = good(M::decode(wire)) else { return false };
    let spec = match S::try_from(message) {
        Ok(spec) => spec,
        Err(refusal) => {
            refusal.check();
            return false;
        }
    };
    used(&spec);
    let wire = M::from(spec.clone()).encode_to_vec();
    let message = M::decode(&*wire).expect("what was encoded can be decoded");
    match S::try_from(message) {
        Ok(again) => assert_eq!(again, spec, "a request sent on means what it meant"),
        Err(_) => panic!("a request sent on is refused: {spec:?}"),
    }
    true
}

/// Why a request is refused.
trait Refusal {
    /// Checks that it can be understood by who gets it.
    fn check(self);
}

impl Refusal for InvalidRequest {
    fn check(self) {
        check(&self);
        let status = Status::from(self.clone());
        let details = status.details().len();
        assert!(details <= MOST_DETAILS, "{details} bytes of details");
        assert_eq!(Self::of(&status), Some(self), "a client can read what is wrong");
    }
}

impl Refusal for std::convert::Infallible {
    fn check(self) {
        match self {}
    }
}
