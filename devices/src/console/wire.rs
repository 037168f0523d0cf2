//! What both sides agree on: queues and configuration.

use polyvirt_core::Features;

/// The virtio device type.
pub const DEVICE_TYPE: u32 = 3;
/// The queue of buffers for what comes from the far side.
pub const RECEIVE: u16 = 0;
/// The queue of what goes to the far side.
pub const TRANSMIT: u16 = 1;

/// The configuration has the size of the console (VIRTIO_CONSOLE_F_SIZE).
pub const SIZE: Features = Features::bit(0);
/// The configuration takes characters before the queues run (VIRTIO_CONSOLE_F_EMERG_WRITE).
pub const EMERG_WRITE: Features = Features::bit(2);

/// Bytes of the configuration: le16 columns, le16 rows, le32 number of ports, le32 emergency write.
pub const CONFIG_LEN: usize = 12;
/// Offset of the columns.
pub const COLUMNS: usize = 0;
/// Offset of the rows.
pub const ROWS: usize = 2;
/// Offset of the number of ports.
pub const MAX_PORTS: usize = 4;
/// Offset of the emergency write register.
pub const EMERGENCY: usize = 8;
