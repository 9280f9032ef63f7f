//! The generated messages and services of `proto/hotloop/v1`.
#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]

pub mod codec;

tonic::include_proto!("hotloop.v1");

/// The descriptors of all our protos, comments included, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::{DescriptorProto, FileDescriptorSet};

    #[test]
    fn the_one_shot_twin_has_the_very_fields_of_the_stream() {
        let files = FileDescriptorSet::decode(super::DESCRIPTORS).unwrap().file;
        let find = |name: &str| -> DescriptorProto {
            let mut messages = files.iter().flat_map(|file| &file.message_type);
            messages
                .find(|message| message.name() == name)
                .unwrap()
                .clone()
        };
        let (stream, twin) = (find("ConnectResponse"), find("CreateResponse"));
        assert!(stream.field.len() > 10);
        assert_eq!(stream.field, twin.field);
        assert_eq!(stream.oneof_decl, twin.oneof_decl);
    }
}
