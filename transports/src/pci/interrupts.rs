//! How a function interrupts: by messages (MSI-X) with table, masks and pending bits, or by its pin with the interrupt
//! status register (4.1.4.5, 4.1.5.1.2, 4.1.5.3, 4.1.5.4).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::hypervisor::{Cause, Interrupt};

use super::host::Wires;
use super::registers::*;

/// The interrupts of one function.
///
/// The device raises causes; software maps them to vectors and vectors to messages. What comes while a vector is masked
/// waits in its pending bit.
pub(super) struct Interrupts {
    wires: Arc<dyn Wires>,
    state: Mutex<State>,
}

struct State {
    /// The control word of the MSI-X capability.
    control: u16,
    /// The command register: whether the pin may be used, and whether messages may be sent.
    command: u16,
    /// Whether the pin is asserted.
    asserted: bool,
    isr: u8,
    /// The table, as bytes: what is there is not looked at before it is needed.
    table: Vec<u8>,
    /// By vector: the message that the wires have, and whether one is held back.
    vectors: Vec<(Message, bool)>,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

/// An event, whose vector software chooses.
pub(super) type Event = Cause;

impl Interrupts {
    /// Those of a function with `queues` queues and `vectors` vectors, on `wires`.
    pub(super) fn new(wires: Arc<dyn Wires>, queues: u16, vectors: u16) -> Self {
        let mut table = Vec::new();
        // Masked, as after a reset of the function.
        (0..vectors).for_each(|_| table.extend([0, 0, 0, ENTRY_MASKED].map(u32::to_le_bytes).as_flattened()));
        let state = State {
            control: 0,
            command: 0,
            asserted: false,
            isr: 0,
            table,
            vectors: (0..vectors).map(|_| (Message::default(), false)).collect(),
            config_vector: NO_VECTOR,
            queue_vectors: (0..queues).map(|_| NO_VECTOR).collect(),
        };
        Self { wires, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vectors there are.
    pub(super) fn vectors(&self) -> u16 {
        self.lock().vectors.len() as u16
    }

    /// Whether software has enabled messages: then the pin is not used, and the legacy registers move.
    pub(super) fn messages(&self) -> bool {
        self.lock().control & MSIX_ENABLE != 0
    }

    /// What software wrote to configuration space: the MSI-X control word, and the command register.
    pub(super) fn configure(&self, control: u16, command: u16) {
        let mut state = self.lock();
        (state.control, state.command) = (control, command);
        for vector in 0..state.vectors.len() {
            self.deliver(&mut state, vector);
        }
        self.drive_pin(&mut state);
    }

    /// As the device is reset: no vectors, nothing to tell, not even what was held back. The table and its masks are not
    /// the device's.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.isr = 0;
        state.vectors.iter_mut().for_each(|(_, pending)| *pending = false);
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        self.drive_pin(&mut state);
    }

    /// Queue `index` alone was reset.
    pub(super) fn reset_queue(&self, index: u16) {
        if let Some(vector) = self.lock().queue_vectors.get_mut(usize::from(index)) {
            *vector = NO_VECTOR;
        }
    }

    /// The vector of `event`.
    pub(super) fn vector(&self, event: Event) -> u16 {
        let state = self.lock();
        match event {
            Cause::Config => state.config_vector,
            Cause::Queue(index) => state.queue_vectors.get(usize::from(index)).copied().unwrap_or(NO_VECTOR),
        }
    }

    /// Software maps `event` to `vector`; to one that does not exist it cannot, which shows when it reads.
    pub(super) fn set_vector(&self, event: Event, vector: u16) {
        let mut state = self.lock();
        let vector = if usize::from(vector) < state.vectors.len() { vector } else { NO_VECTOR };
        match event {
            Cause::Config => state.config_vector = vector,
            Cause::Queue(index) => {
                if let Some(mapped) = state.queue_vectors.get_mut(usize::from(index)) {
                    *mapped = vector;
                }
            }
        }
    }

    /// Whether there is something to tell by the pin, be it allowed or not.
    pub(super) fn wants_pin(&self) -> bool {
        self.lock().wants_pin()
    }

    /// Reads the interrupt status register, which clears it and lets go of the pin.
    pub(super) fn take_isr(&self) -> u8 {
        let mut state = self.lock();
        let isr = std::mem::take(&mut state.isr);
        self.drive_pin(&mut state);
        isr
    }

    /// Reads the table; 0 beyond its end.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let from = usize::try_from(offset).map_or(&[][..], |offset| state.table.get(offset..).unwrap_or_default());
        data.fill(0);
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// Writes the table, with any width; nothing beyond its end.
    pub(super) fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let Ok(offset) = usize::try_from(offset) else { return };
        let Some(to) = state.table.get_mut(offset..) else { return };
        let len = to.len().min(data.len());
        to[..len].copy_from_slice(&data[..len]);
        let entry = MSIX_ENTRY as usize;
        for vector in offset / entry..(offset + len).div_ceil(entry) {
            // What is reserved in the control word stays 0.
            let control = &mut state.table[vector * entry + 12..][..4];
            control.copy_from_slice(&[control[0] & ENTRY_MASKED as u8, 0, 0, 0]);
            self.deliver(&mut state, vector);
        }
    }

    /// Reads the pending bits; 0 beyond their end.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            let first = usize::try_from(at).map_or(usize::MAX, |at| at.saturating_mul(8));
            let bits = state.vectors.get(first..).unwrap_or_default().iter().take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, &(_, pending))| byte | u8::from(pending) << bit);
        }
    }

    /// Sends what is held back for `vector`, if nothing holds it back any more.
    fn deliver(&self, state: &mut State, vector: usize) {
        let (held, enabled) = (state.is_held(vector), state.control & MSIX_ENABLE != 0);
        let message = state.message(vector);
        let Some((routed, pending)) = state.vectors.get_mut(vector) else { return };
        if held || !enabled {
            return;
        }
        if *routed != message {
            *routed = message;
            self.wires.route(vector as u16, message);
        }
        if std::mem::take(pending) {
            self.wires.signal(vector as u16);
        }
    }

    fn drive_pin(&self, state: &mut State) {
        let wanted = state.wants_pin() && state.command & COMMAND_NO_PIN == 0;
        if wanted != state.asserted {
            state.asserted = wanted;
            self.wires.pin(wanted);
        }
    }
}

impl State {
    fn word(&self, vector: usize, at: usize) -> u32 {
        let bytes = self.table.get(vector * MSIX_ENTRY as usize + at..).and_then(|bytes| bytes.first_chunk());
        bytes.copied().map_or(0, u32::from_le_bytes)
    }

    fn message(&self, vector: usize) -> Message {
        let address = u64::from(self.word(vector, 4)) << 32 | u64::from(self.word(vector, 0));
        Message { address, data: self.word(vector, 8) }
    }

    fn wants_pin(&self) -> bool {
        self.isr != 0 && self.control & MSIX_ENABLE == 0
    }

    /// A message is a write to memory, so it waits for Bus Master Enable, too.
    fn is_held(&self, vector: usize) -> bool {
        self.command & COMMAND_MASTER == 0 || self.control & MSIX_MASK != 0 || self.word(vector, 12) & ENTRY_MASKED != 0
    }
}

impl Interrupt for Interrupts {
    fn raise(&self, cause: Cause) {
        let mut state = self.lock();
        let bit = match cause {
            Cause::Queue(_) => ISR_QUEUE,
            Cause::Config => ISR_CONFIG,
        };
        if state.control & MSIX_ENABLE == 0 {
            // The bit first: who is interrupted finds it.
            state.isr |= bit;
            return self.drive_pin(&mut state);
        }
        // A configuration change shows there in either mode (4.1.4.5).
        state.isr |= bit & ISR_CONFIG;
        let vector = match cause {
            Cause::Config => state.config_vector,
            Cause::Queue(index) => state.queue_vectors.get(usize::from(index)).copied().unwrap_or(NO_VECTOR),
        };
        if let Some((_, pending)) = state.vectors.get_mut(usize::from(vector)) {
            *pending = true;
            self.deliver(&mut state, vector.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::Doorbell;
    use super::*;

    #[derive(Debug, PartialEq)]
    enum Wire {
        Route(u16, Message),
        Signal(u16),
        Pin(bool),
    }

    #[derive(Default)]
    struct Log(Mutex<Vec<Wire>>);

    impl Log {
        fn take(&self) -> Vec<Wire> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Wires for Log {
        fn route(&self, vector: u16, message: Message) {
            self.0.lock().unwrap().push(Wire::Route(vector, message));
        }
        fn signal(&self, vector: u16) {
            self.0.lock().unwrap().push(Wire::Signal(vector));
        }
        fn pin(&self, asserted: bool) {
            self.0.lock().unwrap().push(Wire::Pin(asserted));
        }
        fn ring_at(&self, _: &[Doorbell]) {}
    }

    fn interrupts() -> (Arc<Log>, Interrupts) {
        let log = Arc::new(Log::default());
        (log.clone(), Interrupts::new(log, 2, 3))
    }

    const MESSAGE: Message = Message { address: 0xfee0_1000, data: 0x4041 };

    fn set_entry(interrupts: &Interrupts, vector: u64, message: Message, control: u32) {
        let entry = MSIX_ENTRY * vector;
        interrupts.write_table(entry, &message.address.to_le_bytes());
        interrupts.write_table(entry + 8, &message.data.to_le_bytes());
        interrupts.write_table(entry + 12, &control.to_le_bytes());
    }

    fn pending(interrupts: &Interrupts) -> u64 {
        let mut bits = [0xaa; 8];
        interrupts.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn the_pin_is_asserted_until_the_status_is_read() {
        let (log, interrupts) = interrupts();
        interrupts.raise(Cause::Queue(0));
        interrupts.raise(Cause::Config);
        assert_eq!(log.take(), [Wire::Pin(true)]);
        assert!(interrupts.wants_pin());
        assert_eq!(interrupts.take_isr(), 3);
        assert_eq!(log.take(), [Wire::Pin(false)]);
        assert!(!interrupts.wants_pin());
        assert_eq!(interrupts.take_isr(), 0);
        assert_eq!(log.take(), []);
    }

    #[test]
    fn a_pin_that_may_not_be_used_waits() {
        let (log, interrupts) = interrupts();
        interrupts.configure(0, COMMAND_MASTER | COMMAND_NO_PIN);
        interrupts.raise(Cause::Queue(1));
        assert_eq!((log.take(), interrupts.wants_pin()), (vec![], true));
        interrupts.configure(0, COMMAND_MASTER);
        assert_eq!(log.take(), [Wire::Pin(true)]);
        interrupts.configure(MSIX_ENABLE, COMMAND_MASTER);
        assert_eq!(log.take(), [Wire::Pin(false)]);
        interrupts.configure(0, COMMAND_MASTER);
        assert_eq!(log.take(), [Wire::Pin(true)]);
        interrupts.reset();
        assert_eq!((log.take(), interrupts.take_isr()), (vec![Wire::Pin(false)], 0));
    }

    #[test]
    fn a_message_goes_where_its_entry_says_and_only_if_mapped() {
        let (log, interrupts) = interrupts();
        interrupts.configure(MSIX_ENABLE, COMMAND_MASTER);
        interrupts.raise(Cause::Queue(1));
        interrupts.raise(Cause::Config);
        assert_eq!(log.take(), [], "unmapped");
        assert!(!interrupts.wants_pin(), "messages are used");
        assert_eq!(interrupts.take_isr(), 2, "the bit of the configuration alone");
        set_entry(&interrupts, 2, MESSAGE, 0);
        log.take();
        interrupts.set_vector(Cause::Queue(1), 2);
        interrupts.raise(Cause::Queue(1));
        interrupts.raise(Cause::Queue(0));
        assert_eq!(log.take(), [Wire::Signal(2)]);
        assert_eq!(pending(&interrupts), 0);
    }

    #[test]
    fn a_masked_vector_waits_in_its_pending_bit_and_takes_the_message_of_its_unmasking() {
        for function_mask in [false, true] {
            let (log, interrupts) = interrupts();
            let mask = if function_mask { MSIX_MASK } else { 0 };
            interrupts.configure(MSIX_ENABLE | mask, COMMAND_MASTER);
            set_entry(&interrupts, 1, Message { data: 7, ..MESSAGE }, u32::from(!function_mask));
            interrupts.set_vector(Cause::Config, 1);
            interrupts.raise(Cause::Config);
            interrupts.raise(Cause::Config);
            assert_eq!((log.take(), pending(&interrupts)), (vec![], 2));
            set_entry(&interrupts, 1, MESSAGE, u32::from(!function_mask));
            assert_eq!(log.take(), []);
            match function_mask {
                true => interrupts.configure(MSIX_ENABLE, COMMAND_MASTER),
                false => interrupts.write_table(16 + 12, &[0]),
            }
            assert_eq!(log.take(), [Wire::Route(1, MESSAGE), Wire::Signal(1)]);
            assert_eq!(pending(&interrupts), 0);
        }
    }

    #[test]
    fn a_message_waits_for_bus_master_enable_and_the_pin_does_not() {
        let (log, interrupts) = interrupts();
        interrupts.configure(MSIX_ENABLE, 0);
        set_entry(&interrupts, 1, MESSAGE, 0);
        interrupts.set_vector(Cause::Queue(0), 1);
        interrupts.raise(Cause::Queue(0));
        assert_eq!((log.take(), pending(&interrupts)), (vec![], 2));
        interrupts.configure(MSIX_ENABLE, COMMAND_MASTER);
        assert_eq!(log.take(), [Wire::Route(1, MESSAGE), Wire::Signal(1)]);
        assert_eq!(pending(&interrupts), 0);
        interrupts.configure(0, 0);
        interrupts.raise(Cause::Config);
        assert_eq!(log.take(), [Wire::Pin(true)]);
    }

    #[test]
    fn what_was_held_back_is_forgotten_at_a_reset() {
        let (log, interrupts) = interrupts();
        interrupts.configure(MSIX_ENABLE, COMMAND_MASTER);
        interrupts.set_vector(Cause::Queue(0), 0);
        interrupts.raise(Cause::Queue(0));
        assert_eq!(pending(&interrupts), 1);
        interrupts.reset();
        assert_eq!(pending(&interrupts), 0);
        set_entry(&interrupts, 0, MESSAGE, 0);
        assert_eq!(log.take(), [Wire::Route(0, MESSAGE)]);
    }

    #[test]
    fn vectors_that_do_not_exist_cannot_be_mapped() {
        let (_log, interrupts) = interrupts();
        for (event, other) in [(Cause::Config, Cause::Queue(0)), (Cause::Queue(1), Cause::Config)] {
            assert_eq!(interrupts.vector(event), NO_VECTOR);
            for (vector, mapped) in [(0, 0), (2, 2), (3, NO_VECTOR), (0x7ff, NO_VECTOR), (NO_VECTOR, NO_VECTOR)] {
                interrupts.set_vector(event, vector);
                assert_eq!((interrupts.vector(event), interrupts.vector(other)), (mapped, NO_VECTOR));
            }
        }
        interrupts.set_vector(Cause::Queue(2), 0);
        assert_eq!(interrupts.vector(Cause::Queue(2)), NO_VECTOR, "there is no such queue");
        interrupts.set_vector(Cause::Queue(1), 1);
        interrupts.set_vector(Cause::Config, 1);
        interrupts.reset_queue(1);
        assert_eq!((interrupts.vector(Cause::Queue(1)), interrupts.vector(Cause::Config)), (NO_VECTOR, 1));
        interrupts.reset();
        assert_eq!(interrupts.vector(Cause::Config), NO_VECTOR);
    }

    #[test]
    fn the_table_can_be_accessed_with_any_width_and_offset() {
        let (_log, interrupts) = interrupts();
        let all: Vec<u8> = (1..=64).collect();
        for offset in (0..80).chain([u64::MAX - 3, u64::MAX]) {
            for len in 0..40 {
                interrupts.write_table(offset, &all[..len]);
                interrupts.read_table(offset, &mut vec![0; len]);
                interrupts.read_pending(offset, &mut vec![0; len]);
            }
        }
        interrupts.write_table(0, &[0xff; 64]);
        let mut table = [0xaa; 64];
        interrupts.read_table(0, &mut table);
        for entry in table[..48].chunks(16) {
            assert_eq!(entry[..12], [0xff; 12]);
            assert_eq!(entry[12..], [1, 0, 0, 0], "only the mask can be set");
        }
        assert_eq!(table[48..], [0; 16]);
    }
}
