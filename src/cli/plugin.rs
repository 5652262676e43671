//! Flags that choose the PJRT plug-in.

use std::path::PathBuf;

use crate::device::pjrt::PluginSpec;

#[derive(Clone, Debug, clap::Args)]
pub struct PluginArgs {
    /// PJRT plug-in to execute with. Searched for in .foreshard/plugins, beside the binary and in
    /// ~/.cache/foreshard/plugins when absent.
    #[arg(long, value_name = "FILE", env = "FORESHARD_PLUGIN", hide_env_values = true)]
    pub plugin: Option<PathBuf>,
    /// sha256 the plug-in must have before it is loaded.
    #[arg(long, value_name = "HEX", env = "FORESHARD_PLUGIN_SHA256", hide_env_values = true)]
    pub plugin_sha256: Option<String>,
}

impl PluginArgs {
    pub fn spec(&self) -> PluginSpec {
        let mut search = vec![PathBuf::from(".foreshard/plugins")];
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("plugins")));
        search.extend(beside);
        search.extend(user_cache().map(|c| c.join("plugins")));
        PluginSpec { path: self.plugin.clone(), sha256: self.plugin_sha256.clone(), search }
    }
}

/// Where this user's things are kept that can be made again.
pub fn user_cache() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    Some(cache?.join("foreshard"))
}
