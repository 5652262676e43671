//! Messages and both ends of the service, from the `.proto`.

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (source, out) = (proto.join("foreshard/v1/head.proto"), proto.join("../src/rpc"));
    let files = protox::compile([&source], [proto])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .btree_map(".")
        .out_dir(&out)
        .compile_fds(files)?;
    let made = out.join("foreshard.v1.rs");
    let code = fs::read_to_string(&made)?;
    let digest = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let (of, what) = (digest(&fs::read(&source)?), digest(code.as_bytes()));
    // By these a test sees that neither was changed alone.
    fs::write(&made, format!("// sha256 of the .proto: {of}\n// sha256 of what follows: {what}\n{code}"))?;
    Ok(())
}
