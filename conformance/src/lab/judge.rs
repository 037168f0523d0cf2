//! What each thing that a guest told, and each thing that was found on its disk, is worth.

use std::time::Duration;

use super::disk::{After, Image};
use super::guests::{Device, Guest, Kind, Machine, VERSION_1};
use super::transcript::Transcript;

/// VIRTIO_CONFIG_S_ACKNOWLEDGE alone (2.1): the bus found the device after a reset, no driver has it.
const ACKNOWLEDGED: &str = "0x00000001";

/// Values of a byte that 4 KiB of entropy have at the least. (All 256 are there but once in 35 000 draws; that 20 are not
/// will not happen.)
const VALUES: u32 = 236;

/// Everything that is known about one device.
pub(super) struct Evidence<'a> {
    /// What was asked of its driver.
    pub(super) device: &'a Device,
    /// Of a disk: how many queues it has.
    pub(super) queues: u32,
    /// How many disks the guest has.
    pub(super) disks: usize,
    /// Of a disk: what was on it, and what is on it.
    pub(super) disk: Option<(&'a Image, &'a After)>,
    /// What the guest told.
    pub(super) told: &'a Transcript,
    /// Whether the device's process outlived the guest; where it ends with the guest, whether it did so in order.
    pub(super) server_runs: bool,
}

/// One judgement.
pub(super) struct Case {
    /// Its name.
    pub(super) name: &'static str,
    /// What holds if it passes, in a sentence.
    pub(super) about: &'static str,
    judge: Judge,
    /// The event of the device, or of the guest, that says it is done.
    event: Option<&'static str>,
}

type Verdict = Result<(), Wrong>;

/// What is judged, and how.
enum Judge {
    /// Every device.
    Any(fn(&Evidence<'_>) -> Verdict),
    /// Disks, with what was and what is on them.
    Disk(fn(&Evidence<'_>, &Image, &After) -> Verdict),
    /// Disks of a machine whose firmware has a driver.
    Firmware(fn(&Evidence<'_>, &Image) -> Verdict),
    /// Sources of entropy.
    Entropy(fn(&Evidence<'_>) -> Verdict),
}

/// What should have been, and what was.
#[derive(Debug, PartialEq)]
pub(super) struct Wrong {
    /// What should have happened.
    pub(super) expected: String,
    /// What did.
    pub(super) observed: String,
}

/// The cases, in the order of what happens.
static CASES: [Case; 12] = [
    Case {
        name: "lab/firmware",
        about: "the firmware's own driver set the disk up before the kernel's did",
        judge: Judge::Firmware(firmware),
        event: None,
    },
    Case {
        name: "lab/driver",
        about: "the kernel's own driver takes the device and accepts the features asked for",
        judge: Judge::Any(driver),
        event: Some("found"),
    },
    Case {
        name: "lab/shape",
        about: "the kernel sees the disk with its size and its queues",
        judge: Judge::Disk(shape),
        event: None,
    },
    Case {
        name: "lab/read",
        about: "the whole disk, read by the guest, has the SHA-256 that the host computed",
        judge: Judge::Disk(read),
        event: Some("read"),
    },
    Case {
        name: "lab/write",
        about: "the pattern that the guest wrote and flushed is in the image, on every sector of it",
        judge: Judge::Disk(write),
        event: Some("write"),
    },
    Case {
        name: "lab/filesystem",
        about: "files on a file system are the same after it was mounted again, and the host finds them in the image",
        judge: Judge::Disk(file_system),
        event: Some("filesystem"),
    },
    Case {
        name: "lab/entropy",
        about: "what is drawn from the source looks random",
        judge: Judge::Entropy(entropy),
        event: Some("entropy"),
    },
    Case {
        name: "lab/reset",
        about: "the device is reset when the driver lets go of it",
        judge: Judge::Any(reset),
        event: Some("unbound"),
    },
    Case {
        name: "lab/rebind",
        about: "after the driver took the device again, the whole disk has the SHA-256 of the image",
        judge: Judge::Disk(rebind),
        event: Some("rebind"),
    },
    Case {
        name: "lab/rebind-entropy",
        about: "after the driver took the device again, the source gives other bytes than before",
        judge: Judge::Entropy(rebind_entropy),
        event: Some("rebind"),
    },
    Case {
        name: "lab/untouched",
        about: "what the guest did not write is as it was",
        judge: Judge::Disk(untouched),
        event: None,
    },
    Case {
        name: "lab/end",
        about: "the guest ends in order without a complaint of its kernel, and the device's process outlives it",
        judge: Judge::Any(end),
        event: None,
    },
];

/// The cases of `device`.
pub(super) fn cases(guest: &Guest, device: &Device) -> Vec<&'static Case> {
    let firmware = matches!(&guest.machine, Machine::Qemu(machine) if machine.firmware.is_some());
    let applies = |case: &&Case| match case.judge {
        Judge::Any(_) => true,
        Judge::Disk(_) => device.kind == Kind::Blk,
        Judge::Firmware(_) => device.kind == Kind::Blk && firmware,
        Judge::Entropy(_) => device.kind == Kind::Rng,
    };
    CASES.iter().filter(applies).collect()
}

impl Case {
    /// Whether it holds.
    pub(super) fn judge(&self, evidence: &Evidence<'_>) -> Verdict {
        match (&self.judge, evidence.disk) {
            (Judge::Any(judge) | Judge::Entropy(judge), _) => judge(evidence),
            (Judge::Disk(judge), Some((image, after))) => judge(evidence, image, after),
            (Judge::Firmware(judge), Some((image, _))) => judge(evidence, image),
            (Judge::Disk(_) | Judge::Firmware(_), None) => expect(false, "a disk", "another device"),
        }
    }

    /// How long the guest took for it, if it came so far.
    pub(super) fn took(&self, evidence: &Evidence<'_>) -> Duration {
        let event = self.event.and_then(|word| evidence.told.event(&evidence.device.to_string(), word));
        event.map_or(Duration::ZERO, |event| event.at - evidence.told.before(event.at))
    }
}

impl Evidence<'_> {
    /// The words of the device's event `word`, or what came instead.
    fn event(&self, word: &str, expected: &str) -> Result<Vec<&str>, Wrong> {
        let subject = self.device.to_string();
        if let Some(event) = self.told.event(&subject, word) {
            return Ok(event.details.split(' ').collect());
        }
        let failed = self.told.all(&subject, "failed").find_map(|why| why.strip_prefix(word));
        let observed = match failed {
            Some(why) => format!("in the guest:{why}"),
            None => format!("nothing came: {}", self.told.ending()),
        };
        Err(Wrong { expected: expected.to_owned(), observed })
    }
}

fn expect(holds: bool, expected: impl Into<String>, observed: impl Into<String>) -> Verdict {
    if holds { Ok(()) } else { Err(Wrong { expected: expected.into(), observed: observed.into() }) }
}

fn firmware(evidence: &Evidence<'_>, image: &Image) -> Verdict {
    let size = format!("s={}", image.sectors());
    let found = evidence.told.noticed().iter().filter(|line| line.ends_with(&size)).count();
    expect(found == evidence.disks, format!("{} disks with {size}", evidence.disks), format!("{found} of them"))
}

fn driver(evidence: &Evidence<'_>) -> Verdict {
    // One digit for each feature, bit 0 first.
    let words = evidence.event("found", "a device that its driver has taken")?;
    let features = words.first().copied().unwrap_or_default();
    let accepted = |bit: u32| features.as_bytes().get(bit as usize) == Some(&b'1');
    let observed = || format!("the features {features}, bit 0 first");
    for &bit in evidence.device.features {
        expect(accepted(bit), format!("feature bit {bit} accepted"), observed())?;
    }
    let legacy = !evidence.device.features.contains(&VERSION_1);
    expect(!legacy || !accepted(VERSION_1), "the legacy interface, without VERSION_1", observed())
}

fn shape(evidence: &Evidence<'_>, image: &Image, _: &After) -> Verdict {
    let expected = format!("{} sectors and {} queues", image.sectors(), evidence.queues);
    let words = evidence.event("found", &expected)?;
    let [sectors, queues] = [1, 2].map(|word| words.get(word).copied().unwrap_or_default());
    let observed = format!("{sectors} sectors and {queues} queues");
    expect(observed == expected, expected, observed)
}

fn read(evidence: &Evidence<'_>, image: &Image, _: &After) -> Verdict {
    same_sum(evidence, "read", &image.sha256)
}

fn rebind(evidence: &Evidence<'_>, _: &Image, after: &After) -> Verdict {
    same_sum(evidence, "rebind", &after.sha256)
}

/// The event `word` tells the SHA-256 `sum`.
fn same_sum(evidence: &Evidence<'_>, word: &str, sum: &str) -> Verdict {
    let expected = format!("SHA-256 {sum}");
    let told = evidence.event(word, &expected)?.join(" ");
    expect(told == sum, expected, format!("SHA-256 {told}"))
}

fn write(evidence: &Evidence<'_>, _: &Image, after: &After) -> Verdict {
    let words = evidence.event("write", "the pattern written and flushed")?;
    let flushes: u32 = words.first().and_then(|count| count.parse().ok()).unwrap_or(0);
    // A device without a cache of its own is sent none.
    let cached = words[1..] != ["write", "through"];
    expect(flushes > 0 || !cached, "at least one flush", format!("{flushes} flushes"))?;
    let missing = &after.missing;
    expect(missing.is_empty(), "the pattern in the image", format!("it is not there from the sectors {missing:?} on"))
}

fn file_system(evidence: &Evidence<'_>, _: &Image, after: &After) -> Verdict {
    let words = evidence.event("filesystem", "a file system made, mounted, filled and mounted again")?;
    let (before, again) = (words.first(), words.get(1));
    expect(
        before.is_some() && before == again,
        format!("files of SHA-256 {}", before.unwrap_or(&"")),
        format!("after the second mount {}", again.unwrap_or(&"nothing")),
    )?;
    expect(after.file, "a file with the pattern in the image", "none")
}

fn entropy(evidence: &Evidence<'_>) -> Verdict {
    random(&evidence.event("entropy", "bytes from the source")?)
}

fn rebind_entropy(evidence: &Evidence<'_>) -> Verdict {
    let words = evidence.event("rebind", "bytes from the source")?;
    random(&words)?;
    let before = evidence.event("entropy", "bytes from the source")?;
    expect(words.first() != before.first(), "other bytes than before", "the same bytes")
}

/// Of what was drawn, a SHA-256 and the number of different bytes.
fn random(words: &[&str]) -> Verdict {
    let values: u32 = words.get(1).and_then(|values| values.parse().ok()).unwrap_or(0);
    expect(values >= VALUES, format!("{VALUES} different bytes or more among 4096"), format!("{values}"))
}

fn reset(evidence: &Evidence<'_>) -> Verdict {
    let status = evidence.event("unbound", "a device without a driver")?.join(" ");
    expect(status == ACKNOWLEDGED, format!("status {ACKNOWLEDGED}"), format!("status {status}"))
}

fn untouched(_: &Evidence<'_>, _: &Image, after: &After) -> Verdict {
    match after.stray {
        None => Ok(()),
        Some(sector) => expect(false, "no other sector changed", format!("sector {sector} did")),
    }
}

fn end(evidence: &Evidence<'_>) -> Verdict {
    let complaints = evidence.told.complaints();
    expect(complaints.is_empty(), "a kernel without complaints", complaints.join("; "))?;
    expect(evidence.told.ended(), "the end of the guest's script", evidence.told.ending())?;
    expect(evidence.server_runs, "a server that runs on", "it has ended")
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::super::guests::guests;
    use super::*;

    /// A good run of the packed disk of x86-pc, line by line.
    fn good() -> Vec<String> {
        let image = image();
        let sectors = image.sectors();
        vec![
            format!("drive 0x1: PCHS=0/0/0 s={sectors}"),
            format!("drive 0x2: PCHS=0/0/0 s={sectors}"),
            "LAB guest kernel 6.1".into(),
            format!("LAB blk-packed found {} {sectors} 2", "1".repeat(64)),
            format!("LAB blk-packed read {}", image.sha256),
            "LAB blk-packed write 3 write back".into(),
            "LAB blk-packed filesystem 00 00".into(),
            "LAB blk-packed unbound 0x00000001".into(),
            "LAB blk-packed rebind aa".into(),
            "LAB guest end".into(),
        ]
    }

    /// One image for all tests: it takes a while to make.
    fn image() -> &'static Image {
        static IMAGE: OnceLock<Image> = OnceLock::new();
        let create = || Image::create(tempfile::tempdir().unwrap().path(), "packed").unwrap();
        IMAGE.get_or_init(create)
    }

    fn unspoilt() -> After {
        After { sha256: "aa".into(), missing: vec![], file: true, stray: None }
    }

    /// The cases that fail if a guest told `lines`, left `after` behind, and the server then still ran or not.
    fn failing(lines: &[String], after: &After, server_runs: bool) -> Vec<&'static str> {
        let guest = guests().iter().find(|guest| guest.name == "x86-pc").unwrap();
        let device = &guest.devices[1];
        let image = image();
        let mut told = Transcript::new(Some("drive "));
        for (at, line) in (0..).zip(lines) {
            told.line(Duration::from_secs(at), line);
        }
        let evidence = Evidence { device, queues: 2, disks: 2, disk: Some((image, after)), told: &told, server_runs };
        let cases = cases(guest, device);
        assert_eq!(cases.len(), 10);
        cases.iter().filter(|case| case.judge(&evidence).is_err()).map(|case| case.name).collect()
    }

    #[test]
    fn a_good_guest_passes_every_case() {
        assert_eq!(failing(&good(), &unspoilt(), true), [""; 0]);
    }

    #[test]
    fn each_wrong_thing_that_is_told_fails_its_case() {
        for (line, wrong, case) in [
            (1, "drive 0x2: PCHS=0/0/0 s=1", "lab/firmware"),
            (3, "LAB blk-packed found 11 32773 2", "lab/driver"),
            (4, "LAB blk-packed read 00ff", "lab/read"),
            (5, "LAB blk-packed write 0 write back", "lab/write"),
            (5, "LAB blk-packed failed write dd failed", "lab/write"),
            (6, "LAB blk-packed filesystem 00 01", "lab/filesystem"),
            (7, "LAB blk-packed unbound 0x00000007", "lab/reset"),
            (8, "LAB blk-packed rebind 00", "lab/rebind"),
            (9, "Kernel panic", "lab/end"),
        ] {
            let mut lines = good();
            lines[line] = wrong.into();
            assert_eq!(failing(&lines, &unspoilt(), true), [case], "{wrong}");
        }
        let mut lines = good();
        lines.insert(5, "LAB guest complaint I/O error".into());
        assert_eq!(failing(&lines, &unspoilt(), true), ["lab/end"]);
    }

    #[test]
    fn each_wrong_thing_on_the_disk_fails_its_case() {
        let after = |spoil: fn(&mut After)| {
            let mut after = unspoilt();
            spoil(&mut after);
            failing(&good(), &after, true)
        };
        assert_eq!(after(|after| after.missing.push(3)), ["lab/write"]);
        assert_eq!(after(|after| after.file = false), ["lab/filesystem"]);
        assert_eq!(after(|after| after.stray = Some(7)), ["lab/untouched"]);
        assert_eq!(failing(&good(), &unspoilt(), false), ["lab/end"]);
    }

    #[test]
    fn a_guest_that_crashes_fails_everything_behind_it() {
        let failing = failing(&good()[..5], &unspoilt(), true);
        assert_eq!(failing, ["lab/write", "lab/filesystem", "lab/reset", "lab/rebind", "lab/end"]);
    }
}
