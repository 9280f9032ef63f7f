//! What a model computes on, and whether it fits.

use std::{fs, panic::catch_unwind};

use candle_core::{Device, Result, utils};

use super::LoadError;
use crate::backend::DeviceChoice;

impl DeviceChoice {
    /// The device, or why it cannot be had.
    pub(super) fn open(self) -> std::result::Result<Device, LoadError> {
        let failed = |device| move |source| LoadError::Device { device, source };
        match self {
            Self::Auto => Ok(accelerator().unwrap_or(Device::Cpu)),
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => first(Device::new_cuda).map_err(failed("cuda")),
            Self::Metal => first(Device::new_metal).map_err(failed("metal")),
        }
    }
}

/// The accelerator that the program was built for, if it can be had.
fn accelerator() -> Option<Device> {
    let open: fn(usize) -> Result<Device> = match () {
        () if utils::cuda_is_available() => Device::new_cuda,
        () if utils::metal_is_available() => Device::new_metal,
        () => return None,
    };
    match first(open) {
        Ok(device) => Some(device),
        Err(error) => {
            tracing::warn!(%error, "the accelerator cannot be used, the CPU is");
            None
        }
    }
}

/// A machine without a driver makes the libraries below panic. To a server that is an error
/// like others.
fn first(open: fn(usize) -> Result<Device>) -> Result<Device> {
    catch_unwind(|| open(0))
        .unwrap_or_else(|_| Err(candle_core::Error::Msg("its driver is missing".into())))
}

/// What the logs call it.
pub(super) fn name(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// The memory of this device that a program could take now, in bytes, where that can be told.
pub(super) fn available_bytes(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => available(&fs::read_to_string("/proc/meminfo").ok()?),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            let (free, _) = candle_core::cuda::cudarc::driver::result::mem_get_info().ok()?;
            Some(free as u64)
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => None,
        Device::Metal(_) => None,
    }
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let meminfo =
            "MemTotal:       24689760 kB\nMemFree:         17 kB\nMemAvailable:   22936000 kB\n";
        assert_eq!(available(meminfo), Some(22_936_000 * 1024));
        assert_eq!(available("MemTotal: 5 kB\n"), None);
    }

    #[test]
    fn what_the_program_was_not_built_for_is_refused() {
        for (choice, name, built) in [
            (DeviceChoice::Cuda, "cuda", utils::cuda_is_available()),
            (DeviceChoice::Metal, "metal", utils::metal_is_available()),
        ] {
            if !built {
                let error = choice.open().expect_err(name).to_string();
                assert_eq!(error, format!("the device {name} cannot be used"));
            }
        }
    }
}
