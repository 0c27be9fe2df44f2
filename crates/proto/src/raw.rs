//! Messages of a generation that pass through undecoded.
//!
//! A relay forwards nearly every message as it came and must know only where in the completion it
//! is. [`Delta::peek`] reads that, and takes only what it can vouch for: whatever else a message is,
//! the one way to read it is to decode it. [`ServerCodec`] and [`ClientCodec`] are the two sides of
//! such a relay.

use bytes::{Buf, BufMut, Bytes};
use prost::{DecodeError, Message as _};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic_prost::{ProstDecoder, ProstEncoder};

use crate::v1;

/// First size of the buffers of a stream. Messages of one token take some tens of bytes, and there
/// are thousands of streams.
const BUFFER: usize = 1024;
/// Most bytes of messages that are ready at once to be sent in one piece.
const YIELD: usize = 32 * 1024;

/// What a relay needs of a plain delta, one without log-probabilities.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Delta {
    /// Index of its first token.
    pub index: u32,
    /// Tokens it has.
    pub tokens: usize,
}

/// Why [`Delta::peek`] does not vouch for a message: it is another event, has log-probabilities or
/// is malformed.
struct Unsure;

/// The server's side of `Generate`, with answers that are encoded already.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServerCodec;

/// The client's side of `Generate`, with answers as they came.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientCodec;

/// Passes encoded messages through.
#[derive(Clone, Copy, Debug)]
pub struct Raw;

/// Wire types of the encoding.
mod wire {
    pub(super) const VARINT: u8 = 0;
    pub(super) const FIXED_64: u8 = 1;
    pub(super) const LENGTH: u8 = 2;
    pub(super) const FIXED_32: u8 = 5;
}

/// Returns a message that is looked at in full.
pub fn decode(message: &[u8]) -> Result<v1::GenerateResponse, DecodeError> {
    v1::GenerateResponse::decode(message)
}

/// Returns a message as it is sent.
pub fn encode(message: &v1::GenerateResponse) -> Bytes {
    message.encode_to_vec().into()
}

impl Delta {
    /// Reads an encoded `GenerateResponse` and appends the token ids to `ids`. Returns `None`, with
    /// `ids` as they were, for everything but a delta without log-probabilities that would decode.
    pub fn peek(message: &[u8], ids: &mut Vec<u32>) -> Option<Self> {
        let before = ids.len();
        let index = response(message, ids);
        match index {
            Ok(Some(index)) => Some(Self { index, tokens: ids.len() - before }),
            Ok(None) | Err(Unsure) => {
                ids.truncate(before);
                None
            }
        }
    }
}

/// Returns the index of the delta that a `GenerateResponse` holds, if it holds one.
fn response(mut bytes: &[u8], ids: &mut Vec<u32>) -> Result<Option<u32>, Unsure> {
    let mut index = None;
    while !bytes.is_empty() {
        match key(&mut bytes)? {
            // `delta`. A field that comes twice is merged.
            (2, wire::LENGTH) => delta(slice(&mut bytes)?, index.get_or_insert(0), ids)?,
            // The other events: the last one counts.
            (1..=4, _) => return Err(Unsure),
            (_, wire) => skip(&mut bytes, wire)?,
        }
    }
    Ok(index)
}

fn delta(mut bytes: &[u8], index: &mut u32, ids: &mut Vec<u32>) -> Result<(), Unsure> {
    while !bytes.is_empty() {
        match key(&mut bytes)? {
            // `index`
            (1, wire::VARINT) => *index = uint32(&mut bytes)?,
            // `token_ids`, one or packed
            (2, wire::VARINT) => ids.push(uint32(&mut bytes)?),
            (2, wire::LENGTH) => {
                let mut packed = slice(&mut bytes)?;
                while !packed.is_empty() {
                    ids.push(uint32(&mut packed)?);
                }
            }
            // `text`
            (3, wire::LENGTH) => {
                std::str::from_utf8(slice(&mut bytes)?).map_err(|_| Unsure)?;
            }
            // `logprobs`, and wrong types
            (1..=4, _) => return Err(Unsure),
            (_, wire) => skip(&mut bytes, wire)?,
        }
    }
    Ok(())
}

/// Returns the number and wire type of a field.
fn key(bytes: &mut &[u8]) -> Result<(u32, u8), Unsure> {
    let key = u32::try_from(varint(bytes)?).map_err(|_| Unsure)?;
    let [wire, ..] = key.to_le_bytes();
    match key >> 3 {
        0 => Err(Unsure),
        field => Ok((field, wire & 7)),
    }
}

/// Steps over a field that nobody here knows.
fn skip(bytes: &mut &[u8], wire: u8) -> Result<(), Unsure> {
    match wire {
        wire::VARINT => varint(bytes).map(drop),
        wire::FIXED_64 => take(bytes, 8).map(drop),
        wire::LENGTH => slice(bytes).map(drop),
        wire::FIXED_32 => take(bytes, 4).map(drop),
        // Groups.
        _ => Err(Unsure),
    }
}

fn slice<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], Unsure> {
    let length = usize::try_from(varint(bytes)?).map_err(|_| Unsure)?;
    take(bytes, length)
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8], Unsure> {
    bytes.split_off(..length).ok_or(Unsure)
}

/// Returns the low half of a number, as decoding does.
fn uint32(bytes: &mut &[u8]) -> Result<u32, Unsure> {
    let [a, b, c, d, ..] = varint(bytes)?.to_le_bytes();
    Ok(u32::from_le_bytes([a, b, c, d]))
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Unsure> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first().ok_or(Unsure)?;
        let low = u64::from(byte & 0x7f);
        if shift == 63 && byte > 1 {
            return Err(Unsure);
        }
        number |= low << shift;
        if byte < 0x80 {
            return Ok(number);
        }
    }
    Err(Unsure)
}

impl Codec for ServerCodec {
    type Encode = Bytes;
    type Decode = v1::GenerateRequest;
    type Encoder = Raw;
    type Decoder = ProstDecoder<v1::GenerateRequest>;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(buffers())
    }
}

impl Codec for ClientCodec {
    type Encode = v1::GenerateRequest;
    type Decode = Bytes;
    type Encoder = ProstEncoder<v1::GenerateRequest>;
    type Decoder = Raw;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(buffers())
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER, YIELD)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::encoding::{WireType, encode_key, encode_varint};

    use super::*;
    use crate::v1::generate_response::Event;

    /// One field as it may be on the wire: its number and its value.
    #[derive(Clone, Debug)]
    enum Field {
        Varint(u32, u64),
        Fixed64(u32, u64),
        Length(u32, Vec<u8>),
        Fixed32(u32, u32),
    }

    impl Field {
        fn encode(&self, into: &mut Vec<u8>) {
            match self {
                Self::Varint(field, value) => {
                    encode_key(*field, WireType::Varint, into);
                    encode_varint(*value, into);
                }
                Self::Fixed64(field, value) => {
                    encode_key(*field, WireType::SixtyFourBit, into);
                    into.extend(value.to_le_bytes());
                }
                Self::Length(field, value) => {
                    encode_key(*field, WireType::LengthDelimited, into);
                    encode_varint(u64::try_from(value.len()).unwrap(), into);
                    into.extend(value);
                }
                Self::Fixed32(field, value) => {
                    encode_key(*field, WireType::ThirtyTwoBit, into);
                    into.extend(value.to_le_bytes());
                }
            }
        }
    }

    fn bytes(fields: &[Field]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in fields {
            field.encode(&mut bytes);
        }
        bytes
    }

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![0..300_u64, any::<u32>().prop_map(u64::from), any::<u64>()]
    }

    /// Fields that no message here has.
    fn unknown() -> impl Strategy<Value = Field> {
        let field = 5..5000_u32;
        prop_oneof![
            (field.clone(), number()).prop_map(|(field, value)| Field::Varint(field, value)),
            (field.clone(), any::<u64>()).prop_map(|(field, value)| Field::Fixed64(field, value)),
            (field.clone(), prop::collection::vec(any::<u8>(), 0..9))
                .prop_map(|(field, value)| Field::Length(field, value)),
            (field, any::<u32>()).prop_map(|(field, value)| Field::Fixed32(field, value)),
        ]
    }

    fn packed(numbers: &[u64]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in numbers {
            encode_varint(*number, &mut bytes);
        }
        bytes
    }

    /// Fields of a delta in any order, any number of times.
    fn deltas() -> impl Strategy<Value = Vec<u8>> {
        let field = prop_oneof![
            3 => number().prop_map(|index| Field::Varint(1, index)),
            3 => number().prop_map(|id| Field::Varint(2, id)),
            3 => prop::collection::vec(number(), 0..5).prop_map(|ids| Field::Length(2, packed(&ids))),
            3 => ".{0,6}".prop_map(|text| Field::Length(3, text.into_bytes())),
            1 => prop::collection::vec(any::<u8>(), 0..4).prop_map(|text| Field::Length(3, text)),
            2 => unknown(),
        ];
        prop::collection::vec(field, 0..7).prop_map(|fields| bytes(&fields))
    }

    fn responses() -> impl Strategy<Value = Vec<u8>> {
        let field = prop_oneof![
            8 => deltas().prop_map(|delta| Field::Length(2, delta)),
            2 => unknown(),
            1 => (1..5_u32, deltas()).prop_map(|(field, value)| Field::Length(field, value)),
        ];
        prop::collection::vec(field, 0..4).prop_map(|fields| bytes(&fields))
    }

    /// Holds what is read to what decoding reads; returns whether anything is.
    fn check(bytes: &[u8]) -> bool {
        let mut ids = vec![77];
        let Some(peeked) = Delta::peek(bytes, &mut ids) else {
            assert_eq!(ids, [77], "ids are left alone");
            return false;
        };
        let decoded = v1::GenerateResponse::decode(bytes).expect("what is vouched for decodes");
        let Some(Event::Delta(delta)) = decoded.event else { panic!("not a delta: {decoded:?}") };
        assert_eq!(peeked.index, delta.index);
        assert_eq!(peeked.tokens, delta.token_ids.len());
        assert_eq!(ids[1..], delta.token_ids);
        assert!(delta.logprobs.is_empty());
        true
    }

    #[test]
    fn what_workers_send_is_read() {
        for (index, token_ids, text) in
            [(0, vec![0], ""), (300, vec![1, 70_000], " w1"), (7, vec![], "é")]
        {
            let delta =
                v1::Delta { index, token_ids, text: text.to_owned(), ..v1::Delta::default() };
            let response = v1::GenerateResponse { event: Some(Event::Delta(delta)) };
            assert!(check(&response.encode_to_vec()), "{response:?}");
        }
    }

    #[test]
    fn everything_else_is_left_to_decoding() {
        let with_logprobs =
            v1::Delta { logprobs: vec![v1::TokenLogprob::default()], ..v1::Delta::default() };
        for event in [
            Event::Started(v1::Started::default()),
            Event::Finished(v1::Finished::default()),
            Event::Prompt(v1::Prompt::default()),
            Event::Delta(with_logprobs),
        ] {
            let response = v1::GenerateResponse { event: Some(event) };
            assert!(!check(&response.encode_to_vec()), "{response:?}");
        }
        assert!(!check(&[]), "no event");
        // A text that is none, and a delta that `finished` replaces.
        assert!(!check(&bytes(&[Field::Length(2, bytes(&[Field::Length(3, vec![0xff])]))])));
        assert!(!check(&bytes(&[Field::Length(2, Vec::new()), Field::Length(3, Vec::new())])));
    }

    proptest! {
        #[test]
        fn reading_agrees_with_decoding(bytes in responses(), cut in any::<prop::sample::Index>()) {
            check(&bytes);
            check(&bytes[..cut.index(bytes.len() + 1)]);
        }

        #[test]
        fn any_bytes_are_read_as_decoded(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            check(&bytes);
        }

        /// Without this, a reader that vouches for nothing would pass.
        #[test]
        fn deltas_that_decode_are_read(delta in deltas()) {
            let bytes = bytes(&[Field::Length(2, delta)]);
            prop_assert_eq!(check(&bytes), v1::GenerateResponse::decode(&*bytes).is_ok());
        }
    }
}
