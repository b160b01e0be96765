use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec as Coding};
use tonic_prost::ProstCodec;

/// Most messages fit; a buffer grows where one does not. The library's own, 8 KiB for each request and each answer, are too large for
/// what an allocator has at hand.
const BUFFER_BYTES: usize = 512;
/// Of a stream that has more to send, as much is put together first.
const YIELD_BYTES: usize = 32 * 1024;

/// Protobuf in small buffers.
#[derive(Debug, Clone)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + 'static, U: Message + Default + 'static> Coding for Codec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = <ProstCodec<T, U> as Coding>::Encoder;
    type Decoder = <ProstCodec<T, U> as Coding>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }
}
