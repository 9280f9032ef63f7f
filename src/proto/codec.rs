//! How the messages of our services are encoded.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::ProstCodec;

/// As tonic encodes, with smaller buffers: each stream holds one for what comes and one for what goes
/// for as long as it is open, of 8 KiB where nothing is said.
#[derive(Debug)]
pub struct SmallBuffers<T, U>(PhantomData<(T, U)>);

/// Room for some deltas. What is larger makes the buffer grow.
const BUFFER_BYTES: usize = 512;
/// How much is encoded before it is written, as tonic has it.
const ENCODED_BYTES_MAX: usize = 32 * 1024;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, ENCODED_BYTES_MAX)
}

impl<T, U> Default for SmallBuffers<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBuffers<T, U>
where
    T: Message + 'static,
    U: Message + Default + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = <ProstCodec<T, U> as Codec>::Encoder;
    type Decoder = <ProstCodec<T, U> as Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(buffers())
    }
}
