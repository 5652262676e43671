//! What this machine offers. Absent things are absent, never an error.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::affinity;
use super::pjrt::PluginSpec;
use crate::units::Bytes;

#[derive(Clone, Debug, Serialize)]
pub struct Inventory {
    pub cpu: Cpu,
    pub gpus: Found<Vec<Gpu>>,
    pub cuda: Found<String>,
    pub nccl: Found<String>,
    pub tpus: Found<Vec<String>>,
    pub plugin: Found<PluginFile>,
}

/// Something, or why it is not there.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Found<T> {
    Present(T),
    Absent(String),
}

#[derive(Clone, Debug, Serialize)]
pub struct Cpu {
    pub model: String,
    /// Cores this process may use.
    pub cores: Vec<usize>,
    /// What this process may use: the machine's memory or its control group's limit.
    pub memory: Bytes,
}

#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    pub name: String,
    pub uuid: String,
    pub memory: Bytes,
    pub driver: String,
    /// Active NVLink connections.
    pub nvlinks: u32,
}

#[derive(Clone, Debug, Serialize)]
pub struct PluginFile {
    pub path: String,
    pub sha256: String,
}

impl Inventory {
    pub fn probe(plugin: &PluginSpec) -> Self {
        Self { cpu: Cpu::probe(), gpus: gpus(), cuda: cuda(), nccl: nccl(), tpus: tpus(), plugin: plugin_file(plugin) }
    }
}

impl Cpu {
    pub fn probe() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model =
            info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, m)| m.to_owned()));
        Self {
            model: model.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: affinity::allowed(),
            memory: memory(),
        }
    }

    /// Model and instruction sets: code compiled for one such text may not run on another.
    pub fn features() -> String {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let first = info.split("\n\n").next().unwrap_or_default();
        // x86 and ARM have other words for the same.
        const TELLING: [&str; 10] = [
            "vendor_id",
            "cpu family",
            "model",
            "model name",
            "stepping",
            "flags",
            "CPU implementer",
            "CPU variant",
            "CPU part",
            "Features",
        ];
        let telling = |line: &&str| line.split_once(':').is_some_and(|(key, _)| TELLING.contains(&key.trim()));
        let lines: Vec<&str> = first.lines().filter(telling).collect();
        format!("{} {}", std::env::consts::ARCH, lines.join("\n"))
    }
}

/// Memory of the machine, or what the control group leaves of it.
pub fn memory() -> Bytes {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total =
        info.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let machine = total.unwrap_or(0) * 1024;
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|m| m.trim().parse::<u64>().ok());
    Bytes(group.map_or(machine, |limit| limit.min(machine)))
}

fn gpus() -> Found<Vec<Gpu>> {
    let read = || -> Result<Vec<Gpu>, nvml_wrapper::error::NvmlError> {
        let nvml = nvml_wrapper::Nvml::init()?;
        let driver = nvml.sys_driver_version()?;
        (0..nvml.device_count()?)
            .map(|i| {
                let device = nvml.device_by_index(i)?;
                const MAX_LINKS: u32 = 18;
                let active = |link: &u32| device.link_wrapper_for(*link).is_active().unwrap_or(false);
                Ok(Gpu {
                    name: device.name()?,
                    uuid: device.uuid()?,
                    memory: Bytes(device.memory_info()?.total),
                    driver: driver.clone(),
                    nvlinks: (0..MAX_LINKS).filter(active).count() as u32,
                })
            })
            .collect()
    };
    match read() {
        Ok(gpus) if gpus.is_empty() => Found::Absent("the NVIDIA driver sees none".to_owned()),
        Ok(gpus) => Found::Present(gpus),
        Err(e) => Found::Absent(format!("no NVIDIA driver ({e})")),
    }
}

/// cudarc loads libraries when they are first used and panics where they are missing: ask first.
fn cuda() -> Found<String> {
    if !super::cuda::driver_present() {
        return Found::Absent("no CUDA driver library".to_owned());
    }
    super::cuda::driver_version().map_or_else(Found::Absent, Found::Present)
}

fn nccl() -> Found<String> {
    if !super::cuda::nccl_present() {
        return Found::Absent("no NCCL library".to_owned());
    }
    super::cuda::nccl_version().map_or_else(Found::Absent, Found::Present)
}

fn tpus() -> Found<Vec<String>> {
    let under = |directory: &str, prefix: &str| -> Vec<String> {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let named = entries.filter(|e| e.file_name().to_string_lossy().starts_with(prefix));
        named.map(|e| e.path().display().to_string()).collect()
    };
    let mut found = under("/dev", "accel");
    found.sort();
    match found.is_empty() {
        true if Path::new("/dev/vfio").exists() => {
            Found::Absent("/dev/vfio is there, but no /dev/accel*: perhaps a TPU behind VFIO".to_owned())
        }
        true => Found::Absent("no /dev/accel*".to_owned()),
        false => Found::Present(found),
    }
}

fn plugin_file(spec: &PluginSpec) -> Found<PluginFile> {
    let read = || -> Result<PluginFile, String> {
        let plugin = spec.find().map_err(|e| e.to_string())?;
        let sha256 = plugin.sha256().map_err(|e| e.to_string())?;
        Ok(PluginFile { path: plugin.path().display().to_string(), sha256 })
    };
    read().map_or_else(Found::Absent, Found::Present)
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cpu { model, cores, memory } = &self.cpu;
        writeln!(f, "{:<10} {model}, {} cores, {memory}", "cpu", cores.len())?;
        match &self.gpus {
            Found::Present(gpus) => {
                for g in gpus {
                    writeln!(f, "{:<10} {}, {}, driver {}, {} NVLinks", "gpu", g.name, g.memory, g.driver, g.nvlinks)?;
                }
            }
            Found::Absent(why) => writeln!(f, "{:<10} absent: {why}", "gpu")?,
        }
        line(f, "cuda", &self.cuda, |v| v.clone())?;
        line(f, "nccl", &self.nccl, |v| v.clone())?;
        line(f, "tpu", &self.tpus, |v| v.join(", "))?;
        line(f, "plug-in", &self.plugin, |p| format!("{} (sha256 {})", p.path, p.sha256))
    }
}

fn line<T>(f: &mut fmt::Formatter<'_>, what: &str, found: &Found<T>, text: impl Fn(&T) -> String) -> fmt::Result {
    match found {
        Found::Present(value) => writeln!(f, "{what:<10} {}", text(value)),
        Found::Absent(why) => writeln!(f, "{what:<10} absent: {why}"),
    }
}
