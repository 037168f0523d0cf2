//! The device status field (VIRTIO 1.4, 2.1).

bitflags::bitflags! {
    /// How far the driver has come, and whether the device still works.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Status: u8 {
        /// The guest has found the device.
        const ACKNOWLEDGE = 1;
        /// The guest knows how to drive it.
        const DRIVER = 2;
        /// The driver is set up and ready.
        const DRIVER_OK = 4;
        /// Feature negotiation is complete.
        const FEATURES_OK = 8;
        /// The device is suspended (VIRTIO 1.4).
        const SUSPEND = 16;
        /// The device met an error from which it cannot recover without a reset.
        const DEVICE_NEEDS_RESET = 64;
        /// The driver has given up on the device.
        const FAILED = 128;

        const _ = !0;
    }
}
