//! Target: requests, from the bytes on the wire to what servers work with.

use std::fmt::Debug;

use prost::Message;
use tercet_proto::{GenerateSpec, InvalidRequest, ScoreSpec, TokenizeSpec, v1};
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
    match kind % 3 {
        0 => read::<v1::GenerateRequest, GenerateSpec>(wire),
        1 => read::<v1::ScoreRequest, ScoreSpec>(wire),
        _ => read::<v1::TokenizeRequest, TokenizeSpec>(wire),
    }
}

/// Decodes and validates a message, and goes the way back.
fn read<M, S>(wire: &[u8]) -> bool
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
