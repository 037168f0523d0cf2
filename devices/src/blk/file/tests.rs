use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::task::Wake;

use super::super::medium::Clear;
use super::*;

/// A disk of two sectors whose calls wait to be let through, one by one.
struct Gated {
    /// What a call waits for: how it ends.
    gates: Mutex<Receiver<io::Result<()>>>,
    /// Which calls began, one after another.
    calls: Sender<&'static str>,
}

impl Gated {
    fn pass(&self, name: &'static str) -> io::Result<()> {
        // Either is gone once the test is over.
        let _ = self.calls.send(name);
        lock(&self.gates).recv().unwrap_or_else(|_| failed())
    }
}

impl Medium for Gated {
    fn size(&self) -> io::Result<u64> {
        Ok(1024)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        self.pass("write")
    }
    fn sync(&self) -> io::Result<()> {
        self.pass("sync")
    }
    fn clear(&self, _: Clear, _: u64, _: u64) -> io::Result<()> {
        self.pass("clear")
    }
}

type Far = (Sender<io::Result<()>>, Receiver<&'static str>);

fn gated() -> (FileBackend, Far) {
    let ((open, gates), (calls, called)) = (channel(), channel());
    let medium = Gated { gates: Mutex::new(gates), calls };
    (FileBackend::over(Box::new(medium), true, None).unwrap(), (open, called))
}

fn failed() -> io::Result<()> {
    Err(io::Error::other("the medium is gone"))
}

/// The next completion.
fn next(backend: &FileBackend) -> (u64, bool) {
    let Completion { id, result } = backend.completions.recv().unwrap();
    (id, result.is_ok())
}

fn read() -> Request {
    Request::Read { offset: 0, len: 512 }
}

fn write() -> Request {
    Request::Write { offset: 0, data: vec![1; 512] }
}

#[test]
fn after_a_flush_that_failed_no_flush_succeeds() {
    let (mut backend, (open, called)) = gated();
    open.send(failed()).unwrap();
    // For another that is not asked.
    open.send(Ok(())).unwrap();
    for id in 0..3 {
        backend.submit(id, Request::Flush);
        assert_eq!(next(&backend), (id, false));
    }
    assert_eq!(called.try_iter().collect::<Vec<_>>(), ["sync"], "what it says then is worth nothing");
    backend.submit(3, write());
    assert_eq!(next(&backend), (3, true), "what is written can be read");
}

#[test]
fn a_slow_flush_or_write_holds_up_no_read() {
    let (mut backend, (open, called)) = gated();
    for (id, slow) in [Request::Flush, Request::Discard { offset: 0, len: 512 }, write()].into_iter().enumerate() {
        backend.submit(100 + id as u64, slow);
        called.recv().unwrap();
        for id in 0..5 {
            backend.submit(id, read());
            assert_eq!(next(&backend), (id, true));
        }
        open.send(Ok(())).unwrap();
        assert_eq!(next(&backend), (100 + id as u64, true));
    }
}

#[test]
fn flushes_that_wait_take_one_together_and_none_that_had_begun() {
    let (mut backend, (open, called)) = gated();
    backend.submit(0, Request::Flush);
    called.recv().unwrap();
    for id in 1..5 {
        backend.submit(id, Request::Flush);
    }
    open.send(Ok(())).unwrap();
    assert_eq!(next(&backend), (0, true));
    called.recv().unwrap();
    assert!(backend.complete().is_none(), "they began after it");
    open.send(Ok(())).unwrap();
    let mut ids: Vec<_> = (1..5).map(|_| next(&backend).0).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3, 4]);
    assert!(called.try_recv().is_err());
}

#[test]
fn what_is_cancelled_before_it_begins_is_not_done_and_completes() {
    let (mut backend, (open, called)) = gated();
    for id in 0..3 {
        backend.submit(id, write());
    }
    called.recv().unwrap();
    (0..3).for_each(|id| backend.cancel(id));
    assert_eq!([next(&backend), next(&backend)], [(1, false), (2, false)]);
    open.send(Ok(())).unwrap();
    assert_eq!(next(&backend), (0, true), "it had begun");
    assert!(called.try_recv().is_err());
}

#[test]
fn a_backend_that_hangs_takes_no_more_than_a_device_may_give() {
    let (mut backend, (open, called)) = gated();
    backend.submit(0, write());
    called.recv().unwrap();
    let more = 10 * IN_FLIGHT as u64;
    (1..more).for_each(|id| backend.submit(id, write()));
    let refused: Vec<_> = backend.completions.try_iter().map(|done| (done.id, done.result.is_ok())).collect();
    assert_eq!(refused.len() as u64, more - 1 - IN_FLIGHT as u64);
    assert!(refused.iter().all(|(_, done)| !done));
    open.send(Ok(())).unwrap();
    (1..more).for_each(|id| backend.cancel(id));
    // One or two had begun by now, with the thread that has them to be let go.
    drop(open);
}

#[test]
fn where_nothing_can_be_cleared_zeroes_are_written() {
    let (mut backend, (open, called)) = gated();
    for deallocate in [true, false] {
        backend.submit(0, Request::Zero { offset: 0, len: 1024, deallocate });
        let expected: &[_] = if deallocate { &["clear", "clear", "write"] } else { &["clear", "write"] };
        for &call in expected {
            assert_eq!(called.recv().unwrap(), call);
            open.send(if call == "clear" { Err(ErrorKind::Unsupported.into()) } else { Ok(()) }).unwrap();
        }
        assert_eq!(next(&backend), (0, true));
    }
    backend.submit(1, Request::Discard { offset: 0, len: 512 });
    called.recv().unwrap();
    open.send(Err(ErrorKind::Unsupported.into())).unwrap();
    assert_eq!(next(&backend), (1, true), "nothing has to happen");
    backend.submit(2, Request::Zero { offset: 0, len: 512, deallocate: false });
    called.recv().unwrap();
    open.send(failed()).unwrap();
    assert_eq!(next(&backend), (2, false));
}

/// A file of `len` bytes that are not zero, once as the backend's and once as ours.
fn file(len: usize) -> (FileBackend, File) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![0x5a; len], 0).unwrap();
    file.sync_all().unwrap();
    (FileBackend::new(file.try_clone().unwrap()).unwrap(), file)
}

#[test]
fn what_is_discarded_or_unmapped_takes_no_room() {
    const LEN: usize = 4 << 20;
    let range = |deallocate| Request::Zero { offset: 0, len: LEN as u64 / 2, deallocate };
    for (request, zeroed) in
        [(Request::Discard { offset: 0, len: LEN as u64 / 2 }, true), (range(true), true), (range(false), false)]
    {
        let (mut backend, file) = file(LEN);
        if !backend.deallocates() {
            println!("skipped: the file system of temporary files punches no holes");
            return;
        }
        let before = file.metadata().unwrap().blocks();
        backend.submit(0, request);
        assert_eq!(next(&backend), (0, true));
        let after = file.metadata().unwrap();
        assert_eq!(after.len(), LEN as u64);
        assert_eq!(after.blocks() * 512 + LEN as u64 / 2 <= before * 512, zeroed, "{before} to {}", after.blocks());
        let mut bytes = vec![0; LEN];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..LEN / 2].iter().all(|&byte| byte == 0) && bytes[LEN / 2..].iter().all(|&byte| byte == 0x5a));
    }
}

struct Bell(mpsc::Sender<()>);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.send(()).unwrap();
    }
}

#[test]
fn whoever_hears_of_another_size_tells_the_device() {
    let (mut backend, file) = file(4096);
    let (bell, rung) = channel();
    backend.set_waker(Arc::new(Bell(bell)).into());
    let handle = backend.handle();
    assert_eq!((handle.refresh().unwrap(), backend.capacity()), (8, 8));
    assert!(rung.try_recv().is_err(), "nothing is new");
    file.set_len(8192 + 100).unwrap();
    assert_eq!(backend.capacity(), 8, "nobody said anything");
    assert_eq!((handle.refresh().unwrap(), backend.capacity()), (16, 16));
    rung.recv().unwrap();
    file.set_len(512).unwrap();
    backend.refresh();
    assert_eq!(backend.capacity(), 1);
}

#[test]
fn files_have_ids_of_their_own_that_stay() {
    let (backend, one) = file(512);
    let again = FileBackend::new(one).unwrap();
    let (other, _) = file(512);
    let ids = [backend.id().unwrap(), again.id().unwrap(), other.id().unwrap()];
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[0], ids[2]);
    assert!(ids.iter().all(|id| id.len() <= 20));
}
