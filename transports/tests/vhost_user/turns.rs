//! Whose turn it is: nothing is begun for a front end that has left.

use polyvirt_core::Features;
use polyvirt_transports::vhost_user::Ended;
use polyvirt_transports::vhost_user::messages::*;

use crate::front::{Front, Queue, Server, WATCHDOG};

fn begun(server: &Server) -> (Front, [Queue; 2]) {
    let mut front = server.connect();
    front.begin(Features::VERSION_1, ProtocolFeatures::empty());
    let queues = [front.queue(0), front.queue(1)];
    // Whatever there was to look at after the start has been looked at.
    front.ask::<u64>(Request::GetFeatures, &[]);
    (front, queues)
}

#[test]
fn a_front_end_that_leaves_during_a_turn_has_no_other() {
    let server = Server::start();
    let (front, mut queues) = begun(&server);
    let (turns, let_on) = server.device.gate();
    queues[0].send(&front.ram, 0, b"first");
    assert_eq!(turns.recv_timeout(WATCHDOG), Ok(0));
    // Both are due now.
    queues[0].send(&front.ram, 1, b"second");
    queues[1].send(&front.ram, 0, b"third");
    let_on.send(()).unwrap();
    assert_eq!(turns.recv_timeout(WATCHDOG), Ok(0));
    drop(front);
    let_on.send(()).unwrap();
    assert_eq!(server.ended(), Ok(Ended::Closed));
    assert!(!server.device.read().contains(&b"third".to_vec()));
    drop(let_on);
    server.check();
}

#[test]
fn kicks_by_message_of_a_front_end_that_has_left_begin_nothing() {
    let server = Server::start();
    let mut front = server.connect();
    let in_band = ProtocolFeatures::INBAND_NOTIFICATIONS;
    front.begin(Features::VERSION_1, in_band | ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK);
    let mut queue = Queue::new(&front, 0);
    front.set_up(&queue, 0);
    front.enable(0, 1);
    front.ask::<u64>(Request::GetFeatures, &[]);
    let (turns, let_on) = server.device.gate();
    let kick = VringState { index: 0, num: 0 }.to_bytes();
    queue.add(&front.ram, 0, b"first");
    front.send(Request::VringKick, &kick, &[]);
    assert_eq!(turns.recv_timeout(WATCHDOG), Ok(0));
    // The turn that is waiting sees this one as well; the one after it comes too late.
    queue.add(&front.ram, 1, b"second");
    front.send(Request::VringKick, &kick, &[]);
    drop(front);
    let_on.send(()).unwrap();
    assert_eq!(server.ended(), Ok(Ended::Closed));
    assert!(turns.try_recv().is_err(), "a turn for nobody");
    drop(let_on);
    server.check();
}

#[test]
fn what_a_front_end_that_has_left_will_not_hear_of_is_not_waited_for() {
    let server = Server::start();
    let (front, mut queues) = begun(&server);
    server.device.keep(true);
    for queue in &mut queues {
        queue.send(&front.ram, 0, b"kept");
    }
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
    server.device.keep(false);
    server.check();
}
