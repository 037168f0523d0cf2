//! The hypervisors: one line each.

use std::sync::Arc;

use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use polyvirt_hypervisors::xen_hvm;
use polyvirt_hypervisors::{lguest, loopback, xen};

use super::Port;
use crate::suite::Evidence;

macro_rules! ports {
    ($($(#[$doc:meta])* $port:ident: $module:ident, $evidence:expr, $end:expr $(, $apart:literal)?;)*) => {$(
        $(#[$doc])*
        pub struct $port;

        impl Port for $port {
            const NAME: &'static str = stringify!($module);
            $(const ENDS_APART: bool = $apart;)?
            type Host = <polyvirt_hypervisors::$module::$port as Hypervisor>::Host;
            type Guest = <polyvirt_hypervisors::$module::$port as Hypervisor>::Guest;

            fn evidence() -> Evidence {
                $evidence
            }

            fn available() -> Result<String, String> {
                polyvirt_hypervisors::$module::available().map_err(|error| error.to_string())
            }

            fn start(ram: usize) -> Result<(Self::Host, Arc<Self::Guest>), HypervisorError> {
                polyvirt_hypervisors::$module::start(ram).map(|(host, guest)| (host, Arc::new(guest)))
            }

            fn memory_end(ram: usize) -> Option<u64> {
                let end: fn(u64) -> Option<u64> = $end;
                end(ram as u64)
            }
        }
    )*};
}

ports! {
    /// KVM.
    Kvm: kvm, Evidence::of_this_host(), Some, true;
    /// Xen: a real one where the program runs in its domain 0.
    Xen: xen, if xen::is_real() { Evidence::of_this_host() } else { Evidence::Model }, |_| None;
    /// lguest.
    Lguest: lguest, Evidence::of_this_host(), |ram| Some(ram + lguest::OWN_PAGES);
    /// No hypervisor: both halves in one process.
    Loopback: loopback, Evidence::Model, |ram| Some(loopback::RAM + ram);
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
ports! {
    /// Xen as a device model meets it, over the model; the lab has the real one.
    XenHvm: xen_hvm, Evidence::Model, |ram| Some(xen_hvm::model::RAM + ram);
}
