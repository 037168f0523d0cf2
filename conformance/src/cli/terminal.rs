//! Standard input and output as the far side of a console.

use std::io::{self, Read as _, Write as _};
use std::sync::{Arc, OnceLock};
use std::task::{Wake, Waker};
use std::thread::{self, Thread};

use polyvirt_devices::console::Handle;

/// Wakes both threads: either may be the one that waits.
#[derive(Default)]
struct Both([OnceLock<Thread>; 2]);

impl Wake for Both {
    fn wake(self: Arc<Self>) {
        self.0.iter().filter_map(OnceLock::get).for_each(Thread::unpark);
    }
}

/// Carries what standard input has to the guest, and what the guest writes to standard output, until the process ends.
/// `heard` says what of the input the guest is to get.
pub(super) fn connect(handle: Handle, mut heard: impl FnMut(&[u8]) -> Vec<u8> + Send + 'static) {
    let both = Arc::<Both>::default();
    handle.set_listener(Waker::from(Arc::clone(&both)));
    let (typist, reader) = (handle.clone(), handle);
    let input = thread::spawn(move || read_keys(|bytes| type_in(&typist, &heard(bytes))));
    let output = thread::spawn(move || print(&reader));
    for (slot, thread) in both.0.iter().zip([input.thread(), output.thread()]) {
        // Both are empty: they are set here and nowhere else.
        let _ = slot.set(thread.clone());
        // What came before could not wake it.
        thread.unpark();
    }
}

/// Gives what standard input has to `feed`, until it ends.
pub(super) fn read_keys(mut feed: impl FnMut(&[u8])) {
    let mut bytes = [0; 4096];
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => feed(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return tracing::warn!(%error, "standard input cannot be read: the guest gets no more"),
        }
    }
}

fn type_in(handle: &Handle, bytes: &[u8]) {
    let mut left = bytes;
    while !left.is_empty() {
        left = &left[handle.type_in(left)..];
        if !left.is_empty() {
            thread::park();
        }
    }
}

fn print(handle: &Handle) {
    loop {
        let bytes = handle.take_output();
        if bytes.is_empty() {
            thread::park();
            continue;
        }
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(&bytes).and_then(|()| stdout.flush()) {
            return tracing::warn!(%error, "standard output cannot be written: what the guest writes is kept");
        }
    }
}
