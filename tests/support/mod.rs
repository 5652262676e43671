//! What several tests need.

use std::path::PathBuf;
use std::sync::OnceLock;

use foreshard::device::pjrt::{Pjrt, PluginSpec};

/// Where the test set-up puts the CPU plug-in (`make plugin`), or `FORESHARD_PLUGIN`.
pub fn plugin() -> PluginSpec {
    let path = std::env::var_os("FORESHARD_PLUGIN").map(PathBuf::from);
    PluginSpec { path, sha256: None, search: vec![PathBuf::from(".foreshard/plugins")] }
}

/// The CPU plug-in: one client per test process.
pub fn cpu() -> &'static Pjrt {
    static CPU: OnceLock<Pjrt> = OnceLock::new();
    CPU.get_or_init(|| {
        let plugin = plugin().find().expect("the test set-up installs the plug-in");
        Pjrt::new(&plugin, None).expect("the plug-in starts")
    })
}
