//! A file that names the module in the hands of a plug-in: plug-ins abort the process on some malformed modules, and
//! only what was written before can say which one it was.

use std::path::{Path, PathBuf};

#[derive(Debug)]
pub struct Breadcrumb {
    path: PathBuf,
}

/// Takes the breadcrumb away again.
pub struct Crumb<'a> {
    breadcrumb: &'a Breadcrumb,
}

impl Breadcrumb {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Names the module. A breadcrumb that cannot be written costs a good error message, nothing else.
    pub fn drop(&self, module: &str) -> Crumb<'_> {
        let _ = std::fs::write(&self.path, module);
        Crumb { breadcrumb: self }
    }
}

impl Drop for Crumb<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.breadcrumb.path);
    }
}

/// The module a process was compiling when it ended.
pub fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().filter(|name| !name.is_empty())
}
