//! A record as bytes: a version, a checksum, and the record as postcard writes it.

use sha2::{Digest as _, Sha256};

use super::Record;

/// The version that is written. Raise it with every change of what a record is made of, and keep
/// reading the ones before it where that is possible.
pub(super) const VERSION: u16 = 1;

const VERSION_BYTES: usize = size_of::<u16>();
const CHECKSUM_BYTES: usize = 8;

/// Why a record cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Another version of this program wrote it.
    #[error("it is of version {found}, and this program reads {VERSION}")]
    Version {
        /// The record's.
        found: u16,
    },
    /// It is not what was written.
    #[error("it is damaged")]
    Damaged,
}

pub(super) fn encode(record: &Record) -> Result<Vec<u8>, postcard::Error> {
    let header = vec![0; VERSION_BYTES + CHECKSUM_BYTES];
    let mut bytes = postcard::to_extend(record, header)?;
    let checksum = checksum(&bytes[VERSION_BYTES + CHECKSUM_BYTES..]);
    bytes[..VERSION_BYTES].copy_from_slice(&VERSION.to_le_bytes());
    bytes[VERSION_BYTES..VERSION_BYTES + CHECKSUM_BYTES].copy_from_slice(&checksum);
    Ok(bytes)
}

pub(super) fn decode(bytes: &[u8]) -> Result<Record, Unreadable> {
    let (version, rest) = bytes.split_first_chunk().ok_or(Unreadable::Damaged)?;
    let found = u16::from_le_bytes(*version);
    if found != VERSION {
        return Err(Unreadable::Version { found });
    }
    let (expected, body) = rest.split_first_chunk().ok_or(Unreadable::Damaged)?;
    if checksum(body) != *expected {
        return Err(Unreadable::Damaged);
    }
    postcard::from_bytes(body).map_err(|_| Unreadable::Damaged)
}

fn checksum(body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash: [u8; 32] = Sha256::digest(body).into();
    let mut short = [0; CHECKSUM_BYTES];
    short.copy_from_slice(&hash[..CHECKSUM_BYTES]);
    short
}

/// A date as its year, month and day.
pub(super) mod date {
    use jiff::civil::Date;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de::Error as _};

    pub(in crate::store) fn serialize<S: Serializer>(
        date: &Date,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        (date.year(), date.month(), date.day()).serialize(to)
    }

    pub(in crate::store) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Date, D::Error> {
        let (year, month, day) = <(i16, i8, i8)>::deserialize(from)?;
        Date::new(year, month, day).map_err(D::Error::custom)
    }
}
