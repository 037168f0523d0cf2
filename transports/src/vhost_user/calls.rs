//! What the back end tells the front end without being asked: calls (interrupts), and requests over its own socket.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::hypervisor::{Cause, Interrupt};

use super::connection::Connection;
use super::events::Bell;
use super::messages::{BackendRequest, Iotlb, Payload, VringState};

/// The calls of one device.
#[derive(Default)]
pub(super) struct Calls(Mutex<Lines>);

#[derive(Default)]
struct Lines {
    rings: Vec<Line>,
    /// The back end's own socket.
    backend: Option<Arc<Connection>>,
    /// Whether calls may be messages.
    in_band: bool,
    /// Whether a change of the configuration may be told.
    config: bool,
    /// Whether such a message waits for room.
    config_due: bool,
    /// Translations to be asked for.
    misses: VecDeque<Iotlb>,
    /// Whether it was said that there is nobody to ask.
    unheard: bool,
}

#[derive(Default)]
struct Line {
    call: Option<Bell>,
    error: Option<Bell>,
    /// Whether a call waits for room, as a message.
    due: bool,
    /// Whether a message waits for room that says that it is broken.
    error_due: bool,
}

impl Calls {
    /// Forgets everything; there are `rings` queues.
    pub(super) fn reset(&self, rings: usize) {
        let mut lines = self.lock();
        *lines = Lines::default();
        lines.rings.resize_with(rings, Line::default);
    }

    /// Queue `index` is called by `bell`, or by messages.
    pub(super) fn set_call(&self, index: usize, bell: Option<Bell>) {
        if let Some(line) = self.lock().rings.get_mut(index) {
            line.call = bell;
        }
    }

    /// Queue `index` is said to be broken by `bell`.
    pub(super) fn set_error(&self, index: usize, bell: Option<Bell>) {
        if let Some(line) = self.lock().rings.get_mut(index) {
            line.error = bell;
        }
    }

    /// Requests go to `connection` from now on.
    pub(super) fn set_backend(&self, connection: Connection) {
        self.lock().backend = Some(Arc::new(connection));
    }

    /// What requests may be about: calls, the configuration.
    pub(super) fn allow(&self, in_band: bool, config: bool) {
        let mut lines = self.lock();
        (lines.in_band, lines.config) = (in_band, config);
    }

    /// Queue `index` is broken.
    pub(super) fn broken(&self, index: usize) {
        let mut lines = self.lock();
        let in_band = lines.in_band;
        match lines.rings.get_mut(index) {
            Some(Line { error: Some(bell), .. }) => bell.ring(),
            Some(line) => line.error_due = in_band,
            None => {}
        }
        lines.flush();
    }

    /// Asks for translations.
    pub(super) fn ask(&self, misses: Vec<Iotlb>) {
        self.lock().misses.extend(misses);
    }

    /// What waits for room on the back end's socket goes out as far as there is some. The socket, if something is left.
    pub(super) fn flush(&self) -> Option<Arc<Connection>> {
        let mut lines = self.lock();
        lines.flush();
        let waiting =
            lines.config_due || !lines.misses.is_empty() || lines.rings.iter().any(|line| line.due || line.error_due);
        lines.backend.clone().filter(|_| waiting)
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    fn flush(&mut self) {
        let Some(backend) = &self.backend else {
            if !self.misses.is_empty() && !self.unheard {
                tracing::warn!("translations are missing, and there is no socket to ask for them");
                self.unheard = true;
            }
            self.misses.clear();
            return;
        };
        let send = |request: BackendRequest, payload: &[u8]| match backend.try_send(request as u32, 0, payload) {
            Ok(sent) => sent,
            Err(error) => {
                tracing::debug!(%error, request = request.name(), "the front end does not hear requests");
                // Nobody will: not worth keeping.
                true
            }
        };
        while let Some(miss) = self.misses.front()
            && send(BackendRequest::IotlbMsg, &miss.to_bytes())
        {
            self.misses.pop_front();
        }
        self.config_due = self.config_due && !send(BackendRequest::ConfigChange, &[]);
        for (index, line) in self.rings.iter_mut().enumerate() {
            let which = VringState { index: index as u32, num: 0 }.to_bytes();
            line.due = line.due && !send(BackendRequest::VringCall, &which);
            line.error_due = line.error_due && !send(BackendRequest::VringErr, &which);
        }
    }
}

impl Interrupt for Calls {
    fn raise(&self, cause: Cause) {
        let mut lines = self.lock();
        let in_band = lines.in_band;
        match cause {
            Cause::Queue(index) => match lines.rings.get_mut(usize::from(index)) {
                Some(Line { call: Some(bell), .. }) => bell.ring(),
                Some(line) => line.due = in_band,
                None => {}
            },
            Cause::Config => lines.config_due = lines.config,
        }
        lines.flush();
    }
}
