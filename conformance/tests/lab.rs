//! The lab as its users meet it.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn lab(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polyvirt"));
    command.arg("lab").args(args).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn a_guest_that_there_is_not_is_a_mistake_that_names_those_there_are() {
    for verb in ["setup", "run"] {
        let output = lab(&[verb, "uml", "vax"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(output.stdout.is_empty());
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(["no guest 'vax'", "uml", "s390x"].iter().all(|part| told.contains(part)), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}

#[test]
fn guests_that_were_not_fetched_are_skipped_with_what_fetches_them() {
    let empty = tempfile::tempdir().unwrap();
    let output = lab(&["run", "--format", "json"]).env("XDG_CACHE_HOME", empty.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(&output);
    let cells = report["cells"].as_array().unwrap();
    assert!(cells.len() > 7, "a cell for each device of each guest");
    for cell in cells {
        assert_eq!((&cell["passed"], &cell["failed"]), (&0.into(), &0.into()));
        assert_eq!(cell["evidence"], "emulated");
        let guest = cell["hypervisor"].as_str().unwrap();
        for skipped in cell["skipped"].as_array().unwrap() {
            let reason = skipped["reason"].as_str().unwrap();
            assert!(reason.contains(&format!("polyvirt lab setup {guest}")), "{reason}");
        }
    }
}

#[test]
fn a_guest_that_is_required_and_was_not_fetched_has_failed() {
    let empty = tempfile::tempdir().unwrap();
    // Of each kind one: with devices of its own, with the suite's, with domains.
    let run = ["run", "--require", "--format", "json", "uml", "x86-pc", "xen-dom0", "xen-domu", "kvm-nested-suite"];
    let output = lab(&run).env("XDG_CACHE_HOME", empty.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for cell in json(&output)["cells"].as_array().unwrap() {
        assert_eq!(cell["skipped"].as_array().map(Vec::len), Some(0), "{cell}");
        let observed = cell["failures"][0]["observed"].as_str().unwrap();
        assert!(observed.contains("polyvirt lab setup"), "{observed}");
    }
}

#[test]
fn without_a_place_for_a_cache_nothing_is_run() {
    let output = lab(&["run"]).env_remove("XDG_CACHE_HOME").env_remove("HOME").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// The quickest guest, if it was fetched before.
#[test]
fn a_guest_uses_our_disk() {
    let output = lab(&["run", "uml", "--format", "json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    let report = json(&output);
    let cell = report["cells"].as_array().unwrap().iter().find(|cell| cell["device"] == "blk").unwrap();
    if cell["passed"] == 0 {
        println!("skipped: {}", cell["skipped"][0]["reason"].as_str().unwrap());
        return;
    }
    assert!(cell["versions"][0].as_str().unwrap().starts_with("Linux "), "{cell}");
    assert!(cell["cases"].as_array().unwrap().iter().any(|case| case["case"] == "lab/filesystem"));
}
