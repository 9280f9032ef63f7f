//! Compiles `proto/` with protox, so that no system `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = [
        "hotloop/v1/items.proto",
        "hotloop/v1/responses.proto",
        "hotloop/v1/models.proto",
    ];
    // Comments stay in the descriptors, so that a reflecting client can read them.
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // The rpc `Connect` takes the name of the generated constructor: clients use `new(channel)`.
        .build_transport(false)
        .codec_path("crate::proto::codec::SmallBuffers")
        // Events are moved more than once, and most are small: the large ones stand beside them.
        .boxed(".hotloop.v1.ConnectResponse.event.done")
        .boxed(".hotloop.v1.ConnectResponse.event.error")
        .boxed(".hotloop.v1.ConnectResponse.event.output_item_added")
        .boxed(".hotloop.v1.ConnectResponse.event.output_item_done")
        .boxed(".hotloop.v1.ConnectResponse.event.safety_verdict")
        // The one-shot twin sends the very messages of the stream: the two are equal field by field.
        .extern_path(
            ".hotloop.v1.CreateResponse",
            "crate::proto::ConnectResponse",
        )
        .compile_fds(descriptors)?;
    // What classifiers speak, servers of it too, for those who write one in Rust.
    let classifiers = protox::compile(["hotloop/safety/v1/classifier.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(classifiers)?;
    // What engines speak. Servers of it too, which tests play the engines with.
    let engines = protox::compile(
        ["vllm_engine.proto", "sglang_scheduler.proto"],
        ["proto/third_party"],
    )?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(engines)?;
    Ok(())
}
