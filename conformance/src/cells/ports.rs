//! The hypervisors: one line each.

use std::sync::Arc;

use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};

use super::Port;
use crate::suite::Evidence;

macro_rules! ports {
    ($($(#[$doc:meta])* $port:ident: $module:ident, $evidence:ident;)*) => {$(
        $(#[$doc])*
        pub struct $port;

        impl Port for $port {
            const NAME: &'static str = stringify!($module);
            const EVIDENCE: Evidence = Evidence::$evidence;
            type Host = <polyvirt_hypervisors::$module::$port as Hypervisor>::Host;
            type Guest = <polyvirt_hypervisors::$module::$port as Hypervisor>::Guest;

            fn available() -> Result<(), String> {
                polyvirt_hypervisors::$module::available().map(drop).map_err(|error| error.to_string())
            }

            fn start(ram: usize) -> Result<(Self::Host, Arc<Self::Guest>), HypervisorError> {
                polyvirt_hypervisors::$module::start(ram).map(|(host, guest)| (host, Arc::new(guest)))
            }
        }
    )*};
}

ports! {
    /// KVM.
    Kvm: kvm, Real;
    /// Xen.
    Xen: xen, Model;
    /// lguest.
    Lguest: lguest, Real;
    /// No hypervisor: both halves in one process.
    Loopback: loopback, Model;
}
