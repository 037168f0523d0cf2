//! The messages of xenstore (`io/xs_wire.h`), which client and daemon agree on.

/// The most bytes of a xenstore message after its header (XENSTORE_PAYLOAD_MAX, `io/xs_wire.h`).
pub const PAYLOAD_MAX: usize = 4096;
/// Bytes of a xenstore message's header: type, request, transaction and length, a u32 each.
pub const HEADER_LEN: usize = 16;

/// Type of a xenstore message (`enum xsd_sockmsg_type`, `io/xs_wire.h`).
#[allow(missing_docs)]
pub mod message {
    pub const DIRECTORY: u32 = 1;
    pub const READ: u32 = 2;
    pub const GET_PERMS: u32 = 3;
    pub const WATCH: u32 = 4;
    pub const UNWATCH: u32 = 5;
    pub const TRANSACTION_START: u32 = 6;
    pub const TRANSACTION_END: u32 = 7;
    pub const GET_DOMAIN_PATH: u32 = 10;
    pub const WRITE: u32 = 11;
    pub const MKDIR: u32 = 12;
    pub const RM: u32 = 13;
    pub const SET_PERMS: u32 = 14;
    pub const WATCH_EVENT: u32 = 15;
    pub const ERROR: u32 = 16;
}

/// The header of a message that belongs to no transaction or to `transaction`; the two sides share a machine, so the
/// numbers are in its byte order.
pub fn header(kind: u32, request: u32, transaction: u32, len: usize) -> [u8; HEADER_LEN] {
    let words = [kind, request, transaction, len as u32].map(u32::to_ne_bytes);
    words.concat().try_into().expect("four words")
}

/// The four numbers of a header.
pub fn parse_header(header: &[u8; HEADER_LEN]) -> [u32; 4] {
    let (words, _) = header.as_chunks::<4>();
    [0, 1, 2, 3].map(|index| u32::from_ne_bytes(words[index]))
}
