//! The program as its users meet it: exit codes, streams, files.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Cells that every host can run, and that are quick.
const QUICK: [&str; 6] = ["--hypervisor", "loopback", "--transport", "mmio", "--device", "rng"];
/// Block cells that every host can run.
const BLOCK: [&str; 6] = ["--hypervisor", "loopback", "--transport", "mmio", "--device", "blk"];
/// The formats of their rings, in order.
const RINGS: [&str; 2] = ["split", "packed"];

fn polyvirt(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polyvirt"));
    command.args(args).env_remove("RUST_LOG").env_remove("NO_COLOR").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    polyvirt(args).output().unwrap()
}

fn check(args: &[&str], more: &[&str]) -> Output {
    run(&[&["check"], args, more].concat())
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(stdout(output)).unwrap_or_else(|error| panic!("{error}: {}", stdout(output)))
}

/// Exit code 2, nothing on stdout, one sentence on stderr that contains each of `parts`.
#[track_caller]
fn assert_mistake(output: &Output, parts: &[&str]) {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(stdout(output), "");
    let told = stderr(output);
    assert_eq!(told.lines().count(), 1, "{told}");
    for part in parts {
        assert!(told.contains(part), "{part:?} is not in {told:?}");
    }
}

#[track_caller]
fn assert_success(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stderr(output), "");
}

#[test]
fn unknown_names_are_mistakes_that_name_the_valid_ones() {
    assert_mistake(
        &run(&["check", "--hypervisor", "kvm,qvm"]),
        &["no hypervisor 'qvm'", "kvm, ", "lguest", "loopback"],
    );
    assert_mistake(&run(&["--transport", "pigeon"]), &["no transport 'pigeon'", "mmio", "lguest"]);
    assert_mistake(&run(&["--device", "disk"]), &["no device 'disk'", "blk", "console", "rng"]);
    assert_mistake(&run(&["--device", ""]), &["no device ''"]);
}

#[test]
fn names_that_never_meet_are_a_mistake() {
    assert_mistake(&run(&["--hypervisor", "lguest", "--transport", "mmio"]), &["lguest", "mmio"]);
}

#[test]
fn a_wrong_command_line_is_a_mistake() {
    assert_mistake(&run(&["--colour"]), &["--colour"]);
    assert_mistake(&run(&["chekc"]), &["chekc", "'check'"]);
    assert_mistake(&run(&["--hypervisr", "kvm"]), &["--hypervisr", "'--hypervisor'"]);
    assert_mistake(&run(&["--hypervisor", "kvn"]), &["'kvn'", "did you mean 'kvm'?"]);
    assert_mistake(&run(&["lab", "run", "xen-dom"]), &["'xen-dom'", "did you mean 'xen-dom"]);
    assert_mistake(&run(&["serve"]), &["serve", "blk", "console", "rng"]);
    assert_mistake(&run(&["lab"]), &["lab", "setup", "run"]);
    assert_mistake(&run(&["check", "--format", "yaml"]), &["yaml", "json", "junit"]);
    assert_mistake(&run(&["check", "--image"]), &["--image"]);
}

#[test]
fn a_device_is_served_to_someone_who_is_there() {
    assert_mistake(&run(&["serve", "rng"]), &["--socket"]);
    assert_mistake(&run(&["serve", "rng", "--socket", "x", "--xen-domain", "1"]), &["--xen-domain"]);
    assert_mistake(&run(&["serve", "rng", "--iommu", "--xen-domain", "1"]), &["--xen-domain"]);
    let serial = |text| run(&["serve", "blk", "--image", "x", "--socket", "x", "--serial", text]);
    assert_mistake(&serial("123456789012345678901"), &["--serial", "1 to 20 characters", "21"]);
    assert_mistake(&serial("tab\there"), &["--serial", "visible ASCII"]);
    if fs::read_to_string("/sys/hypervisor/type").is_ok_and(|kind| kind.trim() == "xen") {
        println!("skipped: a domain that cannot be served, since this is Xen");
        return;
    }
    assert_mistake(&run(&["serve", "rng", "--xen-domain", "1"]), &["domain 1"]);
}

#[test]
fn an_image_that_is_none_is_a_mistake() {
    assert_mistake(&check(&BLOCK, &["--image", "/nowhere/disk.img"]), &["/nowhere/disk.img", "No such file"]);
    assert_mistake(&check(&BLOCK, &["--image", "/"]), &["not a regular file"]);
    let odd = tempfile::NamedTempFile::new().unwrap();
    fs::write(odd.path(), [0; 1000]).unwrap();
    let path = odd.path().to_str().unwrap();
    assert_mistake(&check(&BLOCK, &["--image", path]), &[path, "1000 bytes", "512"]);
}

#[test]
fn a_report_that_cannot_be_written_is_a_mistake_before_anything_is_run() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let inside = file.path().join("reports");
    assert_mistake(&check(&QUICK, &["--report", inside.to_str().unwrap()]), &[inside.to_str().unwrap()]);
}

#[test]
fn help_and_version_are_no_mistakes() {
    let help = run(&["--help"]);
    assert_success(&help);
    for command in ["check", "list", "ledger"] {
        assert!(stdout(&help).contains(command));
    }
    assert!(stdout(&run(&["--version"])).starts_with("polyvirt "));
}

#[test]
fn the_matrix_in_a_pipe_is_plain_text_with_nothing_on_stderr() {
    let output = check(&QUICK, &[]);
    assert_success(&output);
    let told = stdout(&output);
    assert!(!told.contains('\x1b'), "{told}");
    assert!(told.contains("loopback/mmio") && told.contains("model") && told.contains("passed"), "{told}");
    assert!(told.trim_end().ends_with('.'), "the last line is a sentence: {told}");
}

#[test]
fn quiet_tells_only_the_summary() {
    let output = check(&QUICK, &["--quiet"]);
    assert_success(&output);
    assert_eq!(stdout(&output).lines().count(), 1, "{}", stdout(&output));
}

#[test]
fn json_has_every_cell_and_adds_up() {
    let output = check(&QUICK, &["--format", "json"]);
    assert_success(&output);
    let report = json(&output);
    let cells = report["cells"].as_array().unwrap();
    assert!(!cells.is_empty());
    let mut passed = 0;
    let rings: Vec<_> = cells.iter().map(|cell| cell["ring"].as_str().unwrap()).collect();
    assert_eq!(rings, RINGS);
    for cell in cells {
        assert_eq!(cell["hypervisor"], "loopback");
        assert_eq!(cell["device"], "rng");
        assert_eq!(cell["evidence"], "model");
        assert!(cell["transport"].is_string());
        assert_eq!((&cell["failed"], &cell["wedged"]), (&0.into(), &0.into()));
        assert_eq!(cell["failures"], Value::Array(Vec::new()));
        for skipped in cell["skipped"].as_array().unwrap() {
            assert!(skipped["case"].is_string() && skipped["reason"].as_str().is_some_and(|reason| !reason.is_empty()));
        }
        passed += cell["passed"].as_u64().unwrap();
        assert!(cell["rejected"].as_u64().unwrap() > 0);
    }
    assert!(passed > 0);
    assert_eq!(report["summary"]["passed"], passed);
    assert_eq!(report["summary"]["cells"], cells.len());
}

#[test]
fn cells_are_selected_by_the_format_of_their_rings() {
    for ring in RINGS {
        let report = json(&check(&QUICK, &["--ring", ring, "--format", "json"]));
        let cells = report["cells"].as_array().unwrap();
        assert!(cells.len() == 1 && cells[0]["ring"] == ring, "{cells:?}");
    }
    assert_mistake(&check(&QUICK, &["--ring", "round"]), &["no ring format 'round'", "split, packed"]);
    assert_mistake(&run(&["--hypervisor", "lguest", "--ring", "packed"]), &["no cell has lguest with packed"]);
}

#[test]
fn junit_is_xml_with_a_test_case_for_each_case() {
    let output = check(&QUICK, &["--format", "junit"]);
    assert_success(&output);
    let xml = stdout(&output);
    assert!(xml.starts_with("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites "));
    assert!(xml.trim_end().ends_with("</testsuites>"));
    assert_eq!(xml.matches("<testcase ").count(), xml.matches("</testcase>").count());
    assert!(xml.matches("<testcase ").count() > 10);
}

#[test]
fn a_given_image_comes_through_and_is_not_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk & <co>.img");
    let content: Vec<u8> = (0..300 * 512_u32).map(|at| (at * 7 + at / 512) as u8).collect();
    fs::write(&path, &content).unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    let before = fs::metadata(&path).unwrap().modified().unwrap();

    let output = check(&BLOCK, &["--image", path.to_str().unwrap(), "--format", "json"]);
    assert_success(&output);
    let report = json(&output);
    let sha256: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(report["image"]["sha256"], sha256);
    assert_eq!(report["image"]["bytes"], content.len());
    for cell in report["cells"].as_array().unwrap() {
        let image = &cell["image"];
        assert_eq!(image["ok"], true, "{image}");
        assert!(image["bytes"].as_u64().unwrap() > content.len() as u64);
    }

    assert!(fs::read(&path).unwrap() == content);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [path], "nothing is left beside the image");
}

#[test]
fn without_an_image_a_generated_one_is_carried() {
    let output = check(&BLOCK, &["--format", "json"]);
    assert_success(&output);
    let report = json(&output);
    assert!(report["image"]["file"].is_null());
    assert!(report["cells"].as_array().unwrap().iter().all(|cell| cell["image"]["ok"] == true));
    assert_eq!(report["summary"]["images"], RINGS.len());
}

#[test]
fn the_page_is_written_into_a_new_directory() {
    let folder = tempfile::tempdir().unwrap();
    let reports = folder.path().join("a/b");
    let output = check(&QUICK, &["--report", reports.to_str().unwrap()]);
    assert_success(&output);
    let page = fs::read_to_string(reports.join("report.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
    assert!(page.contains("id=\"loopback-mmio-rng-packed\""));
    assert!(stdout(&output).contains("report.html"));
}

#[test]
fn list_tells_hypervisors_transports_devices_and_what_a_shim_costs() {
    let output = run(&["list", "--format", "json"]);
    assert_success(&output);
    let listed = json(&output);
    let hypervisors = listed["hypervisors"].as_array().unwrap();
    for name in ["kvm", "lguest", "loopback"] {
        let hypervisor = hypervisors.iter().find(|hypervisor| hypervisor["name"] == name).unwrap();
        assert!((1..=300).contains(&hypervisor["shim_lines"].as_u64().unwrap()), "{hypervisor}");
        let available = hypervisor["available"].as_bool().unwrap();
        assert_eq!(available, hypervisor["reason"].is_null(), "{hypervisor}");
        assert!(hypervisor["evidence"].is_string());
    }
    for name in ["mmio", "lguest"] {
        assert!(listed["transports"].as_array().unwrap().contains(&name.into()));
    }
    for name in ["blk", "rng", "console"] {
        assert!(listed["devices"].as_array().unwrap().contains(&name.into()));
    }
    let text = run(&["list"]);
    assert_success(&text);
    assert!(["kvm", "lguest", "mmio", "console"].iter().all(|name| stdout(&text).contains(name)));
}

#[test]
fn a_hypervisor_that_is_not_here_is_skipped_with_its_reason() {
    let listed = json(&run(&["list", "--format", "json"]));
    for hypervisor in listed["hypervisors"].as_array().unwrap() {
        let name = hypervisor["name"].as_str().unwrap();
        if hypervisor["available"] == true {
            println!("{name} is available here");
            continue;
        }
        let output = run(&["--hypervisor", name, "--format", "json"]);
        assert_success(&output);
        for cell in json(&output)["cells"].as_array().unwrap() {
            assert_eq!(cell["passed"], 0);
            let skipped = cell["skipped"].as_array().unwrap();
            assert!(!skipped.is_empty());
            assert!(skipped.iter().all(|skipped| skipped["reason"] == hypervisor["reason"]));
        }
    }
}

#[test]
fn the_ledger_names_statements_with_the_cases_that_judge_them() {
    let output = run(&["ledger", "--format", "json"]);
    assert_success(&output);
    let ledger = json(&output);
    let statements = ledger["statements"].as_array().unwrap();
    assert!(statements.len() > 20);
    for statement in statements {
        assert!(statement["id"].as_str().is_some_and(|id| id.starts_with('N')));
        assert!(statement["cases"].as_array().is_some_and(|cases| !cases.is_empty()));
    }
    assert!(ledger["judged"].as_u64().unwrap() <= ledger["catalogue"].as_u64().unwrap());
    assert_success(&run(&["ledger"]));
}

#[test]
fn a_reader_that_leaves_early_breaks_nothing() {
    for args in
        [&["list"] as &[_], &["ledger", "--format", "json"], &["check", "--hypervisor", "loopback", "--device", "rng"]]
    {
        let mut child = polyvirt(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        assert_eq!(stderr(&output), "", "{args:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_told_in_one_sentence() {
    if !Path::new("/dev/full").exists() {
        println!("skipped: there is no /dev/full");
        return;
    }
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = polyvirt(&["list"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_mistake(&output, &["standard output"]);
}

#[test]
fn the_columns_of_the_list_stand_under_their_heads() {
    let output = run(&["list"]);
    let told: Vec<_> = stdout(&output).lines().take_while(|line| !line.is_empty()).collect();
    let below = told[0].find("below it").unwrap();
    let rows: Vec<_> = told[1..].iter().filter(|line| !line.starts_with(' ')).collect();
    assert!(rows.len() > 3);
    for line in rows {
        for head in ["evidence", "transports", "rings", "below it"] {
            let at = told[0].find(head).unwrap();
            assert_eq!(&line[at - 2..at], "  ", "{head}: {line}");
            assert_ne!(&line[at..=at], " ", "{head}: {line}");
        }
        // Numbers stand at the right.
        assert!(line.as_bytes()[below - 3].is_ascii_digit(), "{line}");
    }
}

#[test]
fn too_few_open_files_are_told_before_anything_is_run() {
    let limited = polyvirt_sh("ulimit -n 20", &["check", "--quiet"], &QUICK);
    assert_mistake(&limited, &["20 files", "ulimit -n"]);
    // It may allow itself more.
    assert_success(&polyvirt_sh("ulimit -S -n 20", &["check", "--quiet"], &QUICK));
}

/// The program after `before` was done in a shell.
fn polyvirt_sh(before: &str, args: &[&str], more: &[&str]) -> Output {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("{before}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_polyvirt")]);
    command.args(args).args(more).env_remove("RUST_LOG").stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_signal_leaves_nothing_behind() {
    let (temporary, reports) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let files = |folder: &Path| fs::read_dir(folder).unwrap().count();
    // What this process is to ignore (a shell tells that its background), its children ignore too.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    let ignored = u64::from_str_radix(ignored, 16).unwrap();
    let heeded = |signal: &Signal| ignored >> (*signal as u32 - 1) & 1 == 0;
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().filter(heeded) {
        // Enough of it not to be over before the signal comes.
        let mut command = polyvirt(&["check", "--hypervisor", "loopback,xen", "--report"]);
        command.arg(reports.path()).env("TMPDIR", temporary.path());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The generated image, then the page: both stay until the end.
        while files(temporary.path()) == 0 || files(reports.path()) == 0 {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::yield_now();
        }
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
        assert_eq!((files(temporary.path()), files(reports.path())), (0, 0), "{signal}");
    }
}

#[test]
fn a_signal_that_is_ignored_ends_nothing() {
    let temporary = tempfile::tempdir().unwrap();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "trap '' INT; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_polyvirt")]);
    command.args(["check", "--quiet"]).args(BLOCK).env_remove("RUST_LOG").env("TMPDIR", temporary.path());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while fs::read_dir(temporary.path()).unwrap().count() == 0 {
        std::thread::yield_now();
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_success(&child.wait_with_output().unwrap());
}

#[test]
fn events_name_the_case_that_they_come_from() {
    let output = polyvirt(&[&["check"], &QUICK as &[_]].concat()).env("RUST_LOG", "debug").output().unwrap();
    let told = stderr(&output);
    assert!(told.contains("case{name=\"init/needs-reset-is-told\" cell=loopback/mmio"), "{told}");
    for line in told.lines() {
        assert!(line.contains("case{name="), "{line}");
    }
}

#[test]
fn rust_log_brings_events_to_stderr() {
    let output = polyvirt(&[&["check"], &QUICK as &[_]].concat()).env("RUST_LOG", "trace").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(!output.stderr.is_empty());
    assert!(stdout(&output).contains("loopback/mmio"));
}
