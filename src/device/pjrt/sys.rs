//! The part of the PJRT C API in use, declared by hand.
//!
//! A plug-in refuses an args struct that is smaller than the one it was built with and accepts a larger one: every
//! struct ends in spare words that stay zero. An entry is found by its position in `PJRT_Api`, and only if the
//! plug-in's own `struct_size` reaches that far.
//!
//! # Source
//! `xla/pjrt/c/pjrt_c_api.h`, API 0.81; fields are only ever appended.

use std::ffi::{c_char, c_int, c_void};

/// Opaque objects of the plug-in.
pub enum Client {}
pub enum DeviceHandle {}
pub enum DeviceDescription {}
pub enum LoadedExecutable {}
pub enum Executable {}
pub enum SerializedExecutable {}
pub enum Buffer {}
pub enum Event {}
pub enum Error {}

/// Major and minor version of the API.
#[repr(C)]
pub struct ApiVersion {
    pub struct_size: usize,
    pub extension_start: *mut c_void,
    pub major: c_int,
    pub minor: c_int,
}

/// Start of `PJRT_Api`; the entries follow as function pointers.
#[repr(C)]
pub struct ApiHead {
    pub struct_size: usize,
    pub extension_start: *mut c_void,
    pub version: ApiVersion,
}

/// The arguments of one entry.
pub trait Args: Default {
    /// Position among the function pointers.
    const INDEX: usize;
    const NAME: &'static str;
}

/// Words behind the known fields: room for what newer plug-ins have appended.
const SPARE: usize = 8;

macro_rules! structs {
    ($( $(#[$doc:meta])* $name:ident $(= $index:literal $entry:literal)? { $($field:ident: $type:ty),* $(,)? } )*) => {$(
        $(#[$doc])*
        #[repr(C)]
        pub struct $name {
            pub struct_size: usize,
            pub extension_start: *mut c_void,
            $(pub $field: $type,)*
            pub spare: [usize; SPARE],
        }
        impl Default for $name {
            fn default() -> Self {
                // SAFETY: the struct is plain data of integers and pointers; all zeros is a value of each.
                let mut zeroed: Self = unsafe { std::mem::zeroed() };
                zeroed.struct_size = size_of::<Self>();
                zeroed
            }
        }
        $(impl Args for $name {
            const INDEX: usize = $index;
            const NAME: &'static str = $entry;
        })?
    )*
    /// Name, entry (position, name) and fields of every struct.
    #[cfg(test)]
    const STRUCTS: &[(&str, &[(usize, &str)], &[&str])] =
        &[$((stringify!($name), &[$(($index, $entry))?], &[$(stringify!($field)),*]),)*];
    };
}

structs! {
    ErrorDestroy = 0 "PJRT_Error_Destroy" { error: *mut Error }
    ErrorMessage = 1 "PJRT_Error_Message" { error: *const Error, message: *const c_char, message_size: usize }
    PluginInitialize = 3 "PJRT_Plugin_Initialize" {}
    EventDestroy = 5 "PJRT_Event_Destroy" { event: *mut Event }
    EventAwait = 8 "PJRT_Event_Await" { event: *mut Event }
    ClientCreate = 10 "PJRT_Client_Create" {
        create_options: *const c_void,
        num_options: usize,
        kv_get_callback: *mut c_void,
        kv_get_user_arg: *mut c_void,
        kv_put_callback: *mut c_void,
        kv_put_user_arg: *mut c_void,
        client: *mut Client,
        kv_try_get_callback: *mut c_void,
        kv_try_get_user_arg: *mut c_void,
    }
    ClientDestroy = 11 "PJRT_Client_Destroy" { client: *mut Client }
    ClientPlatformName = 12 "PJRT_Client_PlatformName" {
        client: *mut Client,
        platform_name: *const c_char,
        platform_name_size: usize,
    }
    ClientPlatformVersion = 14 "PJRT_Client_PlatformVersion" {
        client: *mut Client,
        platform_version: *const c_char,
        platform_version_size: usize,
    }
    ClientAddressableDevices = 16 "PJRT_Client_AddressableDevices" {
        client: *mut Client,
        addressable_devices: *const *mut DeviceHandle,
        num_addressable_devices: usize,
    }
    ClientCompile = 20 "PJRT_Client_Compile" {
        client: *mut Client,
        program: *const Program,
        compile_options: *const c_char,
        compile_options_size: usize,
        executable: *mut LoadedExecutable,
    }
    BufferFromHostBuffer = 22 "PJRT_Client_BufferFromHostBuffer" {
        client: *mut Client,
        data: *const c_void,
        element_type: c_int,
        dims: *const i64,
        num_dims: usize,
        byte_strides: *const i64,
        num_byte_strides: usize,
        host_buffer_semantics: c_int,
        device: *mut DeviceHandle,
        memory: *mut c_void,
        device_layout: *mut c_void,
        done_with_host_buffer: *mut Event,
        buffer: *mut Buffer,
    }
    DeviceDescriptionKind = 26 "PJRT_DeviceDescription_Kind" {
        device_description: *mut DeviceDescription,
        device_kind: *const c_char,
        device_kind_size: usize,
    }
    DeviceGetDescription = 29 "PJRT_Device_GetDescription" {
        device: *mut DeviceHandle,
        device_description: *mut DeviceDescription,
    }
    ExecutableDestroy = 40 "PJRT_Executable_Destroy" { executable: *mut Executable }
    ExecutableNumOutputs = 44 "PJRT_Executable_NumOutputs" { executable: *mut Executable, num_outputs: usize }
    ExecutableSerialize = 49 "PJRT_Executable_Serialize" {
        executable: *const Executable,
        serialized_bytes: *const c_char,
        serialized_bytes_size: usize,
        serialized_executable: *mut SerializedExecutable,
        serialized_executable_deleter: Option<unsafe extern "C" fn(*mut SerializedExecutable)>,
    }
    LoadedExecutableDestroy = 50 "PJRT_LoadedExecutable_Destroy" { executable: *mut LoadedExecutable }
    LoadedExecutableGetExecutable = 51 "PJRT_LoadedExecutable_GetExecutable" {
        loaded_executable: *mut LoadedExecutable,
        executable: *mut Executable,
    }
    LoadedExecutableExecute = 55 "PJRT_LoadedExecutable_Execute" {
        executable: *mut LoadedExecutable,
        options: *mut ExecuteOptions,
        argument_lists: *const *const *mut Buffer,
        num_devices: usize,
        num_args: usize,
        output_lists: *const *mut *mut Buffer,
        device_complete_events: *mut *mut Event,
        execute_device: *mut DeviceHandle,
    }
    ExecutableDeserializeAndLoad = 56 "PJRT_Executable_DeserializeAndLoad" {
        client: *mut Client,
        serialized_executable: *const c_char,
        serialized_executable_size: usize,
        loaded_executable: *mut LoadedExecutable,
        overridden_serialized_compile_options: *const c_char,
        overridden_serialized_compile_options_size: usize,
    }
    BufferDestroy = 58 "PJRT_Buffer_Destroy" { buffer: *mut Buffer }
    BufferToHostBuffer = 70 "PJRT_Buffer_ToHostBuffer" {
        src: *mut Buffer,
        host_layout: *mut c_void,
        dst: *mut c_void,
        dst_size: usize,
        event: *mut Event,
    }
    BufferReadyEvent = 72 "PJRT_Buffer_ReadyEvent" { buffer: *mut Buffer, event: *mut Event }
    ExecutableGetCompiledMemoryStats = 96 "PJRT_Executable_GetCompiledMemoryStats" {
        executable: *mut Executable,
        generated_code_size_in_bytes: i64,
        argument_size_in_bytes: i64,
        output_size_in_bytes: i64,
        alias_size_in_bytes: i64,
        temp_size_in_bytes: i64,
        host_generated_code_size_in_bytes: i64,
        host_argument_size_in_bytes: i64,
        host_output_size_in_bytes: i64,
        host_alias_size_in_bytes: i64,
        host_temp_size_in_bytes: i64,
        peak_memory_in_bytes: i64,
    }
    Program { code: *mut c_char, code_size: usize, format: *const c_char, format_size: usize }
    ExecuteOptions {
        send_callbacks: *mut c_void,
        recv_callbacks: *mut c_void,
        num_send_ops: usize,
        num_recv_ops: usize,
        launch_id: c_int,
        non_donatable_input_indices: *const i64,
        num_non_donatable_input_indices: usize,
        context: *mut c_void,
        call_location: *const c_char,
        num_tasks: usize,
        task_ids: *mut c_int,
        incarnation_ids: *mut i64,
    }
}

/// `PJRT_HostBufferSemantics_kImmutableOnlyDuringCall`: the plug-in copies before it returns.
pub const IMMUTABLE_ONLY_DURING_CALL: c_int = 0;

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of the fields of a C struct, in order.
    fn fields(header: &str, name: &str) -> Vec<String> {
        let at = header.find(&format!("struct {name} {{")).unwrap_or_else(|| panic!("the header has no {name}"));
        let body = &header[at..][..header[at..].find("\n};").expect("a struct ends")];
        let (_, body) = body.split_once('{').expect("a struct begins");
        let field = |text: &str| {
            // A function pointer has its name in the middle.
            let text = text.split_once("(*").map_or(text, |(_, rest)| rest.split(')').next().unwrap_or(""));
            text.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").to_owned()
        };
        body.split(';').map(|f| field(f.trim())).filter(|f| !f.is_empty()).collect()
    }

    /// The CPU plug-in's wheel brings the header that it was built with.
    #[test]
    fn entries_stand_where_the_header_has_them() {
        let include = "plugins/xla_plugins/xla_cpu_pjrt/include/pjrt_c_api.h";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".foreshard").join(include);
        let Ok(header) = std::fs::read_to_string(&path) else {
            eprintln!("skipped: there is no {}; scripts/get-pjrt-cpu.sh gets it", path.display());
            return;
        };
        let header: String = header.lines().map(|l| l.split("//").next().unwrap_or("").to_owned() + "\n").collect();
        let entry = |l: &str| Some(l.trim().strip_prefix("_PJRT_API_STRUCT_FIELD(")?.strip_suffix(");")?.to_owned());
        let table: Vec<String> = header.lines().filter_map(entry).collect();
        assert!(table.len() > 100 && STRUCTS.len() > 20, "{} and {}", table.len(), STRUCTS.len());
        for (name, entry, ours) in STRUCTS {
            let mut of = format!("PJRT_{name}");
            for (index, entry) in *entry {
                assert_eq!(table.get(*index).map(String::as_str), Some(*entry), "entry {index}");
                of = format!("{entry}_Args");
            }
            let ours = ["struct_size", "extension_start"].iter().chain(ours.iter());
            for (ours, theirs) in ours.zip(&fields(&header, &of)) {
                // What is a word of Rust has another one before it.
                assert!(ours.ends_with(theirs.as_str()), "{of} has {theirs}, not {ours}");
            }
        }
    }
}
