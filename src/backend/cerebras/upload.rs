//! The bytes of a request while they are sent.
//!
//! The parts of a body are many and small. They are put together as they are sent, a piece at a time:
//! each piece is a frame of HTTP. Large parts go as they are.

use std::{collections::VecDeque, convert::Infallible, io::Write as _};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures::{Stream, stream};

/// How many bytes are sent, or compressed, at a time.
const PIECE_BYTES: usize = 32 << 10;

/// The parts as they are, in pieces.
pub(super) fn plain(parts: Vec<Bytes>) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream::iter(Pieces(parts.into()).map(Ok))
}

/// The parts, compressed as they are sent. The thread is given back between two pieces.
pub(super) fn gzip(parts: Vec<Bytes>) -> impl Stream<Item = std::io::Result<Bytes>> + Send {
    let encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let begin = (Pieces(parts.into()), Some(encoder));
    stream::try_unfold(begin, |(mut pieces, encoder)| async move {
        let Some(mut encoder) = encoder else {
            return Ok(None);
        };
        while encoder.get_ref().len() < PIECE_BYTES {
            let Some(piece) = pieces.next() else {
                return Ok(Some((encoder.finish()?.into(), (pieces, None))));
            };
            encoder.write_all(&piece)?;
            tokio::task::yield_now().await;
        }
        let compressed = std::mem::take(encoder.get_mut());
        Ok(Some((compressed.into(), (pieces, Some(encoder)))))
    })
}

/// Parts put together to about [`PIECE_BYTES`].
struct Pieces(VecDeque<Bytes>);

impl Iterator for Pieces {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let first = self.0.pop_front()?;
        if first.len() >= PIECE_BYTES {
            return Some(split(first, &mut self.0));
        }
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        piece.extend_from_slice(&first);
        while let Some(part) = self.0.front()
            && piece.len() + part.len() <= PIECE_BYTES
        {
            piece.extend_from_slice(part);
            self.0.pop_front();
        }
        Some(piece.into())
    }
}

/// The first piece of a large part; the rest of it stays.
fn split(mut part: Bytes, rest: &mut VecDeque<Bytes>) -> Bytes {
    let piece = part.split_to(PIECE_BYTES);
    if !part.is_empty() {
        rest.push_front(part);
    }
    piece
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use futures::{StreamExt as _, TryStreamExt as _};

    use super::*;

    fn parts() -> Vec<Bytes> {
        let lengths = [1, 0, 5, 40_000, 2, 100_000, 32 << 10, 7];
        let lengths = lengths.iter().chain(std::iter::repeat_n(&9, 10_000));
        let part = |(number, length): (usize, &usize)| vec![number as u8; *length].into();
        lengths.enumerate().map(part).collect()
    }

    #[tokio::test]
    async fn pieces_are_the_parts_in_few_frames() {
        let pieces: Vec<Bytes> = plain(parts()).map(Result::unwrap).collect().await;
        assert_eq!(pieces.concat(), parts().concat());
        assert!(pieces.iter().all(|piece| piece.len() <= PIECE_BYTES));
        assert!(pieces.len() < 20, "{} pieces", pieces.len());
    }

    #[tokio::test]
    async fn compressed_parts_are_the_parts() {
        let pieces: Vec<Bytes> = gzip(parts()).try_collect().await.unwrap();
        let mut text = Vec::new();
        let compressed = pieces.concat();
        let mut decoder = flate2::read::GzDecoder::new(compressed.as_slice());
        decoder.read_to_end(&mut text).unwrap();
        assert_eq!(text, parts().concat());
    }
}
