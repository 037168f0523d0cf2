//! Devices that lose something between the driver and what stands behind them.

use std::sync::Arc;

use super::{Memory, Place, Saboteur};
use crate::cells::{Kind, Sabotage};
use crate::suite::{FarSide, Objection};

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "loses a byte of output in ten",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/output", "console/output-in-pieces", "console/output-burst"],
        make: || {
            let output = |bytes: Vec<u8>| {
                bytes.into_iter().enumerate().filter(|(at, _)| at % 10 != 9).map(|(_, byte)| byte).collect()
            };
            with(Broken { output: Some(output), ..Broken::NOTHING })
        },
    },
    Saboteur {
        name: "prints backwards",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/output", "console/output-burst", "init/serves-a-request"],
        make: || with(Broken { output: Some(|bytes| bytes.into_iter().rev().collect()), ..Broken::NOTHING }),
    },
    Saboteur {
        name: "prints nothing",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/both-ways", "console/emergency-write", "init/serves-a-request"],
        make: || with(Broken { output: Some(|_| Vec::new()), ..Broken::NOTHING }),
    },
    Saboteur {
        name: "drops output when it is full",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/output-long", "console/output-unread"],
        make: || {
            let output = |mut bytes: Vec<u8>| {
                bytes.truncate(32 * 1024);
                bytes
            };
            with(Broken { output: Some(output), ..Broken::NOTHING })
        },
    },
    Saboteur {
        name: "hears backwards",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/input", "console/input-small-buffers", "console/both-ways", "console/input-before-buffers"],
        make: || with(Broken { input: Some(|bytes| bytes.into_iter().rev().collect()), ..Broken::NOTHING }),
    },
    Saboteur {
        name: "hears nothing",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/input-after-reset", "console/readable-in-receiveq"],
        make: || with(Broken { input: Some(|_| Vec::new()), ..Broken::NOTHING }),
    },
    Saboteur {
        name: "takes columns for rows",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/resize"],
        make: || with(Broken { turned: true, ..Broken::NOTHING }),
    },
    Saboteur {
        name: "does not pass flushes on",
        violates: &["N0812"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/flush", "blk/write-through", "blk/writeback-mode", "blk/writeback-without-flush"],
        make: || with(Broken { no_flush: true, ..Broken::NOTHING }),
    },
    Saboteur {
        name: "says that writes are done that never reach the disk",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/write-then-read", "blk/discard", "drivers/blk"],
        make: || with(Broken { blank: true, ..Broken::NOTHING }),
    },
    Saboteur {
        name: "hides failures of its backend",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/backend-fails"],
        make: || with(Broken { never_fails: true, ..Broken::NOTHING }),
    },
];

/// What becomes of bytes.
type Change = fn(Vec<u8>) -> Vec<u8>;

/// What to lose.
#[derive(Clone, Copy)]
struct Broken {
    output: Option<Change>,
    input: Option<Change>,
    turned: bool,
    no_flush: bool,
    blank: bool,
    never_fails: bool,
}

impl Broken {
    const NOTHING: Self =
        Self { output: None, input: None, turned: false, no_flush: false, blank: false, never_fails: false };
}

fn with(broken: Broken) -> Arc<dyn Sabotage<Memory>> {
    Arc::new(broken)
}

impl Sabotage<Memory> for Broken {
    fn far_side(&self, honest: Box<dyn FarSide>) -> Box<dyn FarSide> {
        Box::new(Lossy { honest, broken: *self })
    }
}

struct Lossy {
    honest: Box<dyn FarSide>,
    broken: Broken,
}

impl FarSide for Lossy {
    fn fail_next_io(&mut self) -> Result<(), Objection> {
        if self.broken.never_fails { Ok(()) } else { self.honest.fail_next_io() }
    }

    fn set_capacity(&mut self, sectors: u64) -> Result<(), Objection> {
        self.honest.set_capacity(sectors)
    }

    fn flushes(&mut self) -> Result<u64, Objection> {
        if self.broken.no_flush { Ok(0) } else { self.honest.flushes() }
    }

    fn hang_io(&mut self, hangs: bool) -> Result<(), Objection> {
        self.honest.hang_io(hangs)
    }

    fn held_io(&mut self) -> Result<usize, Objection> {
        self.honest.held_io()
    }

    fn read_disk(&mut self, offset: u64, data: &mut [u8]) -> Result<(), Objection> {
        self.honest.read_disk(offset, data)?;
        if self.broken.blank {
            data.fill(0);
        }
        Ok(())
    }

    fn input(&mut self, bytes: &[u8]) -> Result<(), Objection> {
        match self.broken.input {
            Some(change) => self.honest.input(&change(bytes.to_vec())),
            None => self.honest.input(bytes),
        }
    }

    fn output(&mut self) -> Result<Vec<u8>, Objection> {
        let printed = self.honest.output()?;
        Ok(self.broken.output.map_or(printed.clone(), |change| change(printed)))
    }

    fn resize(&mut self, columns: u16, rows: u16) -> Result<(), Objection> {
        if self.broken.turned { self.honest.resize(rows, columns) } else { self.honest.resize(columns, rows) }
    }
}
