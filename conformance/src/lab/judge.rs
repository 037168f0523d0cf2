//! What each thing that a guest told, and each thing that was found on its disk, is worth.

use std::time::Duration;

use super::disk::{After, Image};
use super::guests::Disk;
use super::transcript::Transcript;

/// VIRTIO_CONFIG_S_ACKNOWLEDGE alone (2.1): the bus found the device after a reset, no driver has it.
const ACKNOWLEDGED: &str = "0x00000001";

/// Everything that is known about one disk.
pub(super) struct Evidence<'a> {
    /// What was asked of its driver.
    pub(super) disk: &'a Disk,
    /// What was on it.
    pub(super) image: &'a Image,
    /// What is on it.
    pub(super) after: &'a After,
    /// What the guest told.
    pub(super) told: &'a Transcript,
    /// Whether the device's process outlived the guest.
    pub(super) server_runs: bool,
}

/// One judgement.
pub(super) struct Case {
    /// Its name.
    pub(super) name: &'static str,
    /// What holds if it passes, in a sentence.
    pub(super) about: &'static str,
    judge: fn(&Evidence<'_>) -> Result<(), Wrong>,
    /// The event that says it is done.
    event: (Whose, &'static str),
}

/// Who tells an event.
enum Whose {
    Disk,
    Guest,
}

/// What should have been, and what was.
#[derive(Debug, PartialEq)]
pub(super) struct Wrong {
    /// What should have happened.
    pub(super) expected: String,
    /// What did.
    pub(super) observed: String,
}

/// The cases of a disk, in the order of what happens.
pub(super) static CASES: [Case; 8] = [
    Case {
        name: "lab/driver",
        about: "the kernel's own driver finds the disk at its size and accepts the features asked for",
        judge: driver,
        event: (Whose::Disk, "found"),
    },
    Case {
        name: "lab/read",
        about: "the whole disk, read by the guest, has the SHA-256 that the host computed",
        judge: read,
        event: (Whose::Disk, "read"),
    },
    Case {
        name: "lab/write",
        about: "the pattern that the guest wrote and flushed is in the image, on every sector of it",
        judge: write,
        event: (Whose::Disk, "write"),
    },
    Case {
        name: "lab/filesystem",
        about: "files on a file system are the same after it was mounted again, and the host finds them in the image",
        judge: file_system,
        event: (Whose::Disk, "filesystem"),
    },
    Case {
        name: "lab/rebind",
        about: "after the driver let go of the device and took it again, the whole disk has the SHA-256 of the image",
        judge: rebind,
        event: (Whose::Disk, "rebind"),
    },
    Case {
        name: "lab/untouched",
        about: "what the guest did not write is as it was",
        judge: untouched,
        event: (Whose::Disk, "rebind"),
    },
    Case {
        name: "lab/kernel-log",
        about: "the guest ends in order, and its kernel has nothing to complain of",
        judge: kernel_log,
        event: (Whose::Guest, "end"),
    },
    Case {
        name: "lab/server",
        about: "the device's process is there for the next guest",
        judge: server,
        event: (Whose::Guest, "end"),
    },
];

impl Case {
    /// Whether it holds.
    pub(super) fn judge(&self, evidence: &Evidence<'_>) -> Result<(), Wrong> {
        (self.judge)(evidence)
    }

    /// How long the guest took for it, if it came so far.
    pub(super) fn took(&self, evidence: &Evidence<'_>) -> Duration {
        let (whose, word) = &self.event;
        let subject = match whose {
            Whose::Disk => evidence.disk.name,
            Whose::Guest => "guest",
        };
        // What has no event of its own takes no time.
        let first = CASES.iter().find(|case| case.event.1 == *word).is_some_and(|case| case.name == self.name);
        let event = evidence.told.event(subject, word).filter(|_| first);
        event.map_or(Duration::ZERO, |event| event.at - evidence.told.before(event.at))
    }
}

impl Evidence<'_> {
    /// The words of the disk's event `word`, or what came instead.
    fn event(&self, word: &str, expected: &str) -> Result<Vec<&str>, Wrong> {
        if let Some(event) = self.told.event(self.disk.name, word) {
            return Ok(event.details.split(' ').collect());
        }
        let failed = self.told.all(self.disk.name, "failed").find_map(|why| why.strip_prefix(word));
        let observed = match failed {
            Some(why) => format!("in the guest:{why}"),
            None => format!("nothing came: {}", self.told.ending()),
        };
        Err(Wrong { expected: expected.to_owned(), observed })
    }
}

fn expect(holds: bool, expected: impl Into<String>, observed: impl Into<String>) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err(Wrong { expected: expected.into(), observed: observed.into() }) }
}

fn driver(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    let sectors = evidence.image.sectors();
    let words = evidence.event("found", &format!("a disk of {sectors} sectors"))?;
    let size = words.first().copied().unwrap_or_default();
    expect(size == sectors.to_string(), format!("a disk of {sectors} sectors"), format!("{size} sectors"))?;
    // One digit for each feature, bit 0 first.
    let features = words.get(1).copied().unwrap_or_default();
    for &bit in evidence.disk.features {
        let accepted = features.as_bytes().get(bit as usize) == Some(&b'1');
        expect(accepted, format!("feature bit {bit} accepted"), format!("the features {features}, bit 0 first"))?;
    }
    Ok(())
}

fn read(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    let expected = format!("SHA-256 {}", evidence.image.sha256);
    let words = evidence.event("read", &expected)?;
    let observed = format!("SHA-256 {}", words.join(" "));
    expect(observed == expected, expected, observed)
}

fn write(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    let words = evidence.event("write", "the pattern written and flushed")?;
    let flushes: u32 = words.first().and_then(|count| count.parse().ok()).unwrap_or(0);
    // A device without a cache of its own is sent none.
    let cached = words[1..] != ["write", "through"];
    expect(flushes > 0 || !cached, "at least one flush", format!("{flushes} flushes"))?;
    let missing = &evidence.after.missing;
    expect(missing.is_empty(), "the pattern in the image", format!("it is not there from the sectors {missing:?} on"))
}

fn file_system(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    let words = evidence.event("filesystem", "a file system made, mounted, filled and mounted again")?;
    let (before, after) = (words.first(), words.get(1));
    expect(
        before.is_some() && before == after,
        format!("files of SHA-256 {}", before.unwrap_or(&"")),
        format!("after the second mount {}", after.unwrap_or(&"nothing")),
    )?;
    expect(evidence.after.file, "a file with the pattern in the image", "none")
}

fn rebind(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    let expected = format!("SHA-256 {}", evidence.after.sha256);
    let words = evidence.event("rebind", &expected)?;
    let observed = format!("SHA-256 {}", words.join(" "));
    expect(observed == expected, expected, observed)?;
    let status = evidence.event("unbound", "a reset while no driver has the device")?.join(" ");
    expect(status == ACKNOWLEDGED, format!("status {ACKNOWLEDGED} while no driver has it"), format!("status {status}"))
}

fn untouched(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    match evidence.after.stray {
        None => Ok(()),
        Some(sector) => expect(false, "no other sector changed", format!("sector {sector} did")),
    }
}

fn kernel_log(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    let complaints = evidence.told.complaints();
    expect(complaints.is_empty(), "a kernel without complaints", complaints.join("; "))?;
    expect(evidence.told.ended(), "the end of the guest's script", evidence.told.ending())
}

fn server(evidence: &Evidence<'_>) -> Result<(), Wrong> {
    expect(evidence.server_runs, "a server that runs", "it has ended")
}
