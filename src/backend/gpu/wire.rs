//! How a prompt goes onto the wire: a request whose token ids are never encoded twice.
//!
//! In all dialects a prompt is a packed field in a message in the request. Protobuf does not care in which order
//! fields come, so the rest of the request is encoded first, and behind it the ids as the ledger keeps them.

use std::marker::PhantomData;

use bytes::Bytes;
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use tonic::{
    Status,
    codec::{Codec, EncodeBuf, Encoder},
};
use tonic_prost::ProstCodec;

/// A request without its ids, and the ids.
pub(super) struct Outgoing {
    /// The request, encoded, without the field that holds the ids.
    pub(super) request: Vec<u8>,
    /// The ids, packed, in parts.
    pub(super) ids: Vec<Bytes>,
    /// The field of the request that holds the message of the ids.
    pub(super) message_field: u32,
    /// The field in that message.
    pub(super) ids_field: u32,
}

impl Outgoing {
    fn write(&self, to: &mut impl bytes::BufMut) {
        let packed: usize = self.ids.iter().map(Bytes::len).sum();
        let message = key_len(self.ids_field) + encoded_len_varint(packed as u64) + packed;
        to.put_slice(&self.request);
        encode_key(self.message_field, WireType::LengthDelimited, to);
        encode_varint(message as u64, to);
        encode_key(self.ids_field, WireType::LengthDelimited, to);
        encode_varint(packed as u64, to);
        for part in &self.ids {
            to.put_slice(part);
        }
    }
}

/// Sends [`Outgoing`], and reads messages as prost does.
pub(super) struct KeptIds<D>(PhantomData<D>);

impl<D> Default for KeptIds<D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<D: Message + Default + 'static> Codec for KeptIds<D> {
    type Encode = Outgoing;
    type Decode = D;
    type Encoder = Self;
    type Decoder = <ProstCodec<D, D> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        Self::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<D, D>::default().decoder()
    }
}

impl<D> Encoder for KeptIds<D> {
    type Item = Outgoing;
    type Error = Status;

    fn encode(&mut self, item: Outgoing, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let ids: usize = item.ids.iter().map(Bytes::len).sum();
        // Room for all at once: growing step by step would copy the ids several times.
        to.reserve(item.request.len() + ids + 32);
        item.write(to);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use vllm_proto::{GenerateRequest, TokenIds, generate_request::Prompt};

    use super::*;
    use crate::ledger::{Draft, IdForm, Rope};

    #[test]
    fn a_request_with_kept_ids_is_the_request_that_prost_encodes() {
        let ids: Vec<u32> = (0..1000).map(|n| n * 997 % 150_000).collect();
        let mut rope = Rope::default();
        for part in ids.chunks(77) {
            rope = rope.with_sampled(Draft {
                ids: part.to_vec(),
                ..Draft::default()
            });
        }
        let mut request = GenerateRequest {
            request_id: "r".into(),
            temperature: Some(0.5),
            ..GenerateRequest::default()
        };
        let mut bytes = Vec::new();
        Outgoing {
            request: request.encode_to_vec(),
            ids: rope.encoded(IdForm::Varint),
            message_field: 4,
            ids_field: 1,
        }
        .write(&mut bytes);
        request.prompt = Some(Prompt::TokenIds(TokenIds { ids }));
        assert_eq!(GenerateRequest::decode(&*bytes).unwrap(), request);
        // The ledger gives the very bytes again.
        let (first, again) = (rope.encoded(IdForm::Varint), rope.encoded(IdForm::Varint));
        assert!(
            first
                .iter()
                .zip(&again)
                .all(|(a, b)| a.as_ptr() == b.as_ptr())
        );
    }
}
