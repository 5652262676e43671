//! PJRT plug-ins: one code path for CPU, GPU and TPU, in three layers: [`sys`] declares, [`result`] calls, this
//! module owns.
#![allow(unsafe_code)]

mod plugin;
mod result;
mod sys;

use std::ffi::c_int;
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;

pub use plugin::{CPU_KERNELS, Plugin, PluginSpec};

use self::result::{Api, text};
use super::breadcrumb::Breadcrumb;
use super::{Arg, Device, DeviceError, ExecutableMemory};
use crate::graph::export::Alias;
use crate::graph::{ArrayShape, DType};
use crate::units::Bytes;

/// A client of a plug-in, on its first device.
pub struct Pjrt {
    client: Arc<ClientHandle>,
    device: *mut sys::DeviceHandle,
    platform: String,
    kind: String,
    options: Vec<u8>,
    breadcrumb: Option<Breadcrumb>,
}

struct ClientHandle {
    api: Arc<Api>,
    client: *mut sys::Client,
}

// SAFETY: PJRT clients, devices, executables and buffers may be used from any thread; the pointers are never written
// through, and each is destroyed once, by its owner.
unsafe impl Send for ClientHandle {}
// SAFETY: as above.
unsafe impl Sync for ClientHandle {}
// SAFETY: as above; the device belongs to the client.
unsafe impl Send for Pjrt {}
// SAFETY: as above.
unsafe impl Sync for Pjrt {}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        let mut args = sys::ClientDestroy { client: self.client, ..Default::default() };
        // SAFETY: every buffer and executable holds an `Arc` of this handle, so none is left.
        let _ = unsafe { self.api.call(&mut args) };
    }
}

impl Pjrt {
    /// Loads the plug-in and creates its client. Threads of the plug-in start here: pin the process first.
    ///
    /// `breadcrumb`: file that names the module being compiled, for the parent process to read when a plug-in aborts.
    pub fn new(plugin: &Plugin, breadcrumb: Option<PathBuf>) -> Result<Self, DeviceError> {
        let api = Arc::new(Api::load(plugin.path())?);
        let mut create = sys::ClientCreate::default();
        // SAFETY: no options, no key-value store.
        unsafe {
            api.call(&mut sys::PluginInitialize::default())?;
            api.call(&mut create)?;
        }
        let client = Arc::new(ClientHandle { api: api.clone(), client: create.client });
        let mut devices = sys::ClientAddressableDevices { client: create.client, ..Default::default() };
        let mut name = sys::ClientPlatformName { client: create.client, ..Default::default() };
        let mut version = sys::ClientPlatformVersion { client: create.client, ..Default::default() };
        // SAFETY: the client is alive; the strings and the device list live as long as it.
        let (device, platform) = unsafe {
            api.call(&mut devices)?;
            api.call(&mut name)?;
            api.call(&mut version)?;
            let device = (devices.num_addressable_devices > 0).then(|| *devices.addressable_devices);
            let name = text(name.platform_name, name.platform_name_size);
            let version = text(version.platform_version, version.platform_version_size);
            (device, format!("{name} {version} api {}.{}", api.version.0, api.version.1))
        };
        let device = device.ok_or_else(|| DeviceError::NoDevice { path: plugin.path().to_owned() })?;
        let mut description = sys::DeviceGetDescription { device, ..Default::default() };
        // SAFETY: the device and its description live as long as the client.
        let kind = unsafe {
            api.call(&mut description)?;
            let device_description = description.device_description;
            let mut kind = sys::DeviceDescriptionKind { device_description, ..Default::default() };
            api.call(&mut kind)?;
            text(kind.device_kind, kind.device_kind_size)
        };
        let options = compile_options();
        Ok(Self { client, device, platform, kind, options, breadcrumb: breadcrumb.map(Breadcrumb::new) })
    }

    fn api(&self) -> &Api {
        &self.client.api
    }
}

/// A value on the device.
pub struct Buffer {
    client: Arc<ClientHandle>,
    buffer: *mut sys::Buffer,
}

// SAFETY: see `ClientHandle`.
unsafe impl Send for Buffer {}
// SAFETY: see `ClientHandle`.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut args = sys::BufferDestroy { buffer: self.buffer, ..Default::default() };
        // SAFETY: we own the buffer; the plug-in defers the release of memory still in use.
        let _ = unsafe { self.client.api.call(&mut args) };
    }
}

/// A compiled module.
pub struct Executable {
    client: Arc<ClientHandle>,
    loaded: *mut sys::LoadedExecutable,
    executable: *mut sys::Executable,
    n_outputs: usize,
}

// SAFETY: see `ClientHandle`.
unsafe impl Send for Executable {}
// SAFETY: see `ClientHandle`.
unsafe impl Sync for Executable {}

impl Drop for Executable {
    fn drop(&mut self) {
        let api = &self.client.api;
        let mut executable = sys::ExecutableDestroy { executable: self.executable, ..Default::default() };
        let mut loaded = sys::LoadedExecutableDestroy { executable: self.loaded, ..Default::default() };
        // SAFETY: we own both.
        unsafe {
            if !self.executable.is_null() {
                let _ = api.call(&mut executable);
            }
            let _ = api.call(&mut loaded);
        }
    }
}

impl Device for Pjrt {
    type Buffer = Buffer;
    type Executable = Executable;

    fn platform(&self) -> &str {
        &self.platform
    }

    fn kind(&self) -> &str {
        &self.kind
    }

    fn options(&self) -> &[u8] {
        &self.options
    }

    fn compile(&self, name: &str, hlo: &[u8], _aliases: &[Alias]) -> Result<Executable, DeviceError> {
        let _crumb = self.breadcrumb.as_ref().map(|b| b.drop(name));
        let format = "hlo";
        let program = sys::Program {
            // The plug-in reads the code; the pointer is mutable for calls that return code.
            code: hlo.as_ptr().cast_mut().cast(),
            code_size: hlo.len(),
            format: format.as_ptr().cast(),
            format_size: format.len(),
            ..Default::default()
        };
        let mut args = sys::ClientCompile {
            client: self.client.client,
            program: &program,
            compile_options: self.options.as_ptr().cast(),
            compile_options_size: self.options.len(),
            ..Default::default()
        };
        // SAFETY: program and options outlive the call.
        unsafe { self.api().call(&mut args)? };
        self.loaded(args.executable)
    }

    fn serialize(&self, executable: &Executable) -> Result<Vec<u8>, DeviceError> {
        let mut args = sys::ExecutableSerialize { executable: executable.executable, ..Default::default() };
        // SAFETY: the executable is alive.
        unsafe { self.api().call(&mut args)? };
        let (data, size) = (args.serialized_bytes, args.serialized_bytes_size);
        let bytes = match data.is_null() {
            true => Vec::new(),
            // SAFETY: the plug-in says so many bytes are there, until the deleter is called.
            false => unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size) }.to_vec(),
        };
        if let Some(delete) = args.serialized_executable_deleter {
            // SAFETY: called once, on what came with it; the bytes have been copied.
            unsafe { delete(args.serialized_executable) };
        }
        Ok(bytes)
    }

    fn deserialize(&self, name: &str, bytes: &[u8]) -> Result<Executable, DeviceError> {
        let _crumb = self.breadcrumb.as_ref().map(|b| b.drop(&format!("{name}, from the cache")));
        let mut args = sys::ExecutableDeserializeAndLoad {
            client: self.client.client,
            serialized_executable: bytes.as_ptr().cast(),
            serialized_executable_size: bytes.len(),
            ..Default::default()
        };
        // SAFETY: the bytes outlive the call; without options the plug-in takes those in the bytes.
        unsafe { self.api().call(&mut args)? };
        self.loaded(args.loaded_executable)
    }

    fn memory(&self, executable: &Executable) -> Result<ExecutableMemory, DeviceError> {
        let mut args =
            sys::ExecutableGetCompiledMemoryStats { executable: executable.executable, ..Default::default() };
        // SAFETY: the executable is alive.
        unsafe { self.api().call(&mut args)? };
        let bytes = |n: i64| Bytes(n.max(0) as u64);
        Ok(ExecutableMemory {
            arguments: bytes(args.argument_size_in_bytes),
            outputs: bytes(args.output_size_in_bytes),
            aliased: bytes(args.alias_size_in_bytes),
            temporaries: bytes(args.temp_size_in_bytes),
            code: bytes(args.generated_code_size_in_bytes),
        })
    }

    fn upload(&self, shape: &ArrayShape, data: &[u8]) -> Result<Buffer, DeviceError> {
        if data.len() as u64 != shape.bytes().0 {
            return Err(DeviceError::Size { shape: shape.to_string(), found: data.len() as u64 });
        }
        let dims: Vec<i64> = shape.dims.iter().map(|&d| d as i64).collect();
        let mut args = sys::BufferFromHostBuffer {
            client: self.client.client,
            data: data.as_ptr().cast(),
            element_type: element_type(shape.dtype),
            dims: dims.as_ptr(),
            num_dims: dims.len(),
            host_buffer_semantics: sys::IMMUTABLE_ONLY_DURING_CALL,
            device: self.device,
            ..Default::default()
        };
        // SAFETY: `data` and `dims` outlive the call, after which the plug-in does not read them any more.
        unsafe { self.api().call(&mut args)? };
        let buffer = Buffer { client: self.client.clone(), buffer: args.buffer };
        self.await_event(args.done_with_host_buffer)?;
        Ok(buffer)
    }

    fn execute(&self, executable: &Executable, args: Vec<Arg<'_, Buffer>>) -> Result<Vec<Buffer>, DeviceError> {
        let pointers: Vec<*mut sys::Buffer> = args
            .iter()
            .map(|a| match a {
                Arg::Keep(b) => b.buffer,
                Arg::Donate(b) => b.buffer,
            })
            .collect();
        let kept: Vec<i64> = (0..args.len()).filter(|&i| matches!(args[i], Arg::Keep(_))).map(|i| i as i64).collect();
        let mut options = sys::ExecuteOptions {
            non_donatable_input_indices: kept.as_ptr(),
            num_non_donatable_input_indices: kept.len(),
            ..Default::default()
        };
        let mut outputs: Vec<*mut sys::Buffer> = vec![ptr::null_mut(); executable.n_outputs];
        let argument_list = pointers.as_ptr();
        let output_list = outputs.as_mut_ptr();
        let mut call = sys::LoadedExecutableExecute {
            executable: executable.loaded,
            options: &mut options,
            argument_lists: &argument_list,
            num_devices: 1,
            num_args: pointers.len(),
            output_lists: &output_list,
            ..Default::default()
        };
        // SAFETY: all lists outlive the call and have the lengths given; kept arguments are not donated, donated ones
        // are owned by `args` and destroyed after the call.
        unsafe { self.api().call(&mut call)? };
        drop(args);
        Ok(outputs.into_iter().map(|buffer| Buffer { client: self.client.clone(), buffer }).collect())
    }

    fn wait(&self, buffer: &Buffer) -> Result<(), DeviceError> {
        let mut args = sys::BufferReadyEvent { buffer: buffer.buffer, ..Default::default() };
        // SAFETY: the buffer is alive.
        unsafe { self.api().call(&mut args)? };
        self.await_event(args.event)
    }

    fn download(&self, buffer: &Buffer, out: &mut [u8]) -> Result<(), DeviceError> {
        let mut args = sys::BufferToHostBuffer { src: buffer.buffer, ..Default::default() };
        // SAFETY: without a destination the call only fills in the size.
        unsafe { self.api().call(&mut args)? };
        if args.dst_size != out.len() {
            let shape = format!("a buffer of {} bytes", args.dst_size);
            return Err(DeviceError::Size { shape, found: out.len() as u64 });
        }
        if out.is_empty() {
            return self.wait(buffer);
        }
        args.dst = out.as_mut_ptr().cast();
        // SAFETY: `out` has the size asked for and outlives the transfer, which is awaited.
        unsafe { self.api().call(&mut args)? };
        self.await_event(args.event)
    }
}

impl Pjrt {
    /// Takes over an executable that the plug-in has loaded.
    fn loaded(&self, loaded: *mut sys::LoadedExecutable) -> Result<Executable, DeviceError> {
        let mut compiled =
            Executable { client: self.client.clone(), loaded, executable: ptr::null_mut(), n_outputs: 0 };
        let mut get = sys::LoadedExecutableGetExecutable { loaded_executable: compiled.loaded, ..Default::default() };
        // SAFETY: the loaded executable is alive.
        unsafe { self.api().call(&mut get)? };
        compiled.executable = get.executable;
        let mut count = sys::ExecutableNumOutputs { executable: compiled.executable, ..Default::default() };
        // SAFETY: the executable is alive.
        unsafe { self.api().call(&mut count)? };
        compiled.n_outputs = count.num_outputs;
        Ok(compiled)
    }

    /// Waits for an event and destroys it.
    fn await_event(&self, event: *mut sys::Event) -> Result<(), DeviceError> {
        if event.is_null() {
            return Ok(());
        }
        let mut wait = sys::EventAwait { event, ..Default::default() };
        let mut destroy = sys::EventDestroy { event, ..Default::default() };
        // SAFETY: we own the event and destroy it once, after the wait.
        unsafe {
            let waited = self.api().call(&mut wait);
            self.api().call(&mut destroy)?;
            waited
        }
    }
}

/// `CompileOptionsProto` for one replica and one partition on the default device.
fn compile_options() -> Vec<u8> {
    let mut build = crate::graph::proto::Writer::default();
    build.number(1, u64::MAX); // device_ordinal = -1: any
    build.number(4, 1); // num_replicas
    build.number(5, 1); // num_partitions
    let mut options = crate::graph::proto::Writer::default();
    options.bytes(3, &build.0);
    options.0
}

/// `PJRT_Buffer_Type`.
fn element_type(dtype: DType) -> c_int {
    match dtype {
        DType::Bool => 1,
        DType::Int8 => 2,
        DType::Int16 => 3,
        DType::Int32 => 4,
        DType::Int64 => 5,
        DType::Uint8 => 6,
        DType::Uint16 => 7,
        DType::Uint32 => 8,
        DType::Uint64 => 9,
        DType::Float16 => 10,
        DType::Float32 => 11,
        DType::Float64 => 12,
        DType::Bfloat16 => 13,
        DType::Complex64 => 14,
        DType::Complex128 => 15,
        DType::Float8E5m2 => 16,
        DType::Float8E4m3fn => 17,
    }
}
