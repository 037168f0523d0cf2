//! The command line.
//!
//! Exit codes: 0 if nothing failed or wedged, 1 if something did, 2 if the user has to change the command.

mod bench;
mod boot;
mod check;
mod daemon;
mod files;
mod image_lock;
mod lab;
mod ledger;
mod limits;
mod list;
mod output;
mod progress;
mod resize;
mod sandbox;
mod select;
mod serve;
mod socket;
mod terminal;
mod told;
mod xen_guest;
mod xen_refusals;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use polyvirt_hypervisors::xen;

use output::Output;

use crate::temporary;

/// Nothing failed or wedged.
const SUCCESS: u8 = 0;
/// Something failed or wedged.
const FAILURE: u8 = 1;
/// The user has to change the command.
const MISTAKE: u8 = 2;

/// One virtio core, every hypervisor: runs the conformance suite on every hypervisor that this host has.
#[derive(Parser)]
#[command(name = "polyvirt", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    check: CheckArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Run every cell of hypervisor, transport, device and ring format that this host can run (the default)
    Check(CheckCommand),
    /// Hypervisors, transports and devices: what there is, what can be used here, what each hypervisor costs
    List {
        /// How to tell it
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Measure side by side with others'; worth something in a release build only
    Bench {
        /// What to measure
        #[arg(value_enum, default_value_t)]
        what: bench::What,
        /// Only rows whose name contains this
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        rows: String,
        /// How to tell it
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Be a vhost-user device for any VMM: QEMU, User Mode Linux, …
    #[command(arg_required_else_help = false)]
    Serve(serve::ServeArgs),
    /// Boot an unmodified Linux on our devices
    Boot(boot::BootArgs),
    /// Real guests: unmodified Linux kernels whose own drivers use our devices
    #[command(subcommand, arg_required_else_help = false)]
    Lab(lab::LabCommand),
    /// Do what the one says who holds the other end of standard input: the guest's half of a cell on a real Xen
    #[command(name = xen::HANDS, hide = true)]
    XenHands,
    /// Drive the disk of a domain of the lab
    #[command(hide = true)]
    XenGuest(xen_guest::XenGuestArgs),
    /// Try what Xen is to refuse
    #[command(hide = true)]
    XenRefusals,
    /// The statements of VIRTIO 1.4 that cases judge
    Ledger {
        /// How to tell it
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
}

#[derive(Args)]
struct CheckCommand {
    /// Someone else's device in place of our own cells: vhost-user:PATH is a daemon's socket, of the type that --device
    /// says. What is on its disk is overwritten
    #[arg(value_name = "TARGET")]
    target: Option<String>,
    /// The deviations that are known of TARGET: the name of a list that comes with the program, or a file
    #[arg(long, value_name = "NAME|FILE", requires = "target")]
    expect: Option<String>,
    /// Start TARGET by this line of the shell, in which {socket} stands for its path: then the suite can kill it too, and
    /// judges what it does when it comes back
    #[arg(long, value_name = "COMMAND", requires = "target")]
    daemon: Option<String>,
    #[command(flatten)]
    args: CheckArgs,
}

#[derive(Args)]
struct CheckArgs {
    /// Only these hypervisors
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    hypervisor: Vec<String>,
    /// Only these transports
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    transport: Vec<String>,
    /// Only these devices
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    device: Vec<String>,
    /// Only these formats of rings
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    ring: Vec<String>,
    /// Only these cases; * stands for any text
    #[arg(long, value_name = "GLOB,…", value_delimiter = ',')]
    case: Vec<String>,
    /// Carry a copy of this disk image through every block cell; without it, a generated one
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Boot the guests of the lab too: their cells join the report
    #[arg(long)]
    lab: bool,
    #[command(flatten)]
    tell: TellArgs,
}

/// How a result is told.
#[derive(Args)]
struct TellArgs {
    /// Write the result as a page, report.html, to this directory
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// How to tell the result
    #[arg(long, value_enum, default_value_t)]
    format: CheckFormat,
    /// No progress, no matrix: only failures and the summary
    #[arg(long)]
    quiet: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum CheckFormat {
    #[default]
    Text,
    Json,
    Junit,
}

/// A device that is not ours.
#[derive(Clone, Copy)]
struct External<'a> {
    /// Where it is.
    target: &'a str,
    /// What is known of it.
    expect: Option<&'a str>,
    /// What starts it.
    command: Option<&'a str>,
}

impl CheckCommand {
    /// The target, and what is said about it.
    fn external(&self) -> Option<External<'_>> {
        let (expect, command) = (self.expect.as_deref(), self.daemon.as_deref());
        self.target.as_deref().map(|target| External { target, expect, command })
    }
}

/// Why a command ended without doing what it is for.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// The user has to change the command.
    #[error("{0}")]
    Mistake(String),
    /// Standard output cannot be written.
    #[error("standard output: {0}")]
    Output(#[from] std::io::Error),
}

/// Runs the program.
pub(crate) fn run() -> ExitCode {
    // Nobody gets a backtrace: the suite counts what panics in a case as a failure, anything else is told below.
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic)));
    let code = std::panic::catch_unwind(run_command).unwrap_or_else(|_| {
        complain("a mistake of the program itself: RUST_LOG=error tells where, please report it");
        FAILURE.into()
    });
    // A case that wedged has its own still.
    drop(temporary::remove_all());
    code
}

fn run_command() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return parse_failed(&error),
    };
    log_to_stderr(matches!(cli.command, Some(Command::Serve(_))));
    let mut output = Output::standard();
    let done = match cli.command {
        None => check::run(&cli.check, None, &mut output),
        Some(Command::Check(command)) => check::run(&command.args, command.external(), &mut output),
        Some(Command::List { format }) => list::run(format, &mut output),
        Some(Command::Boot(args)) => boot::run(&args, &mut output),
        Some(Command::Serve(args)) => serve::run(&args, &mut output),
        Some(Command::Bench { what, rows, format }) => bench::run(what, &rows, format, &mut output),
        Some(Command::Lab(command)) => lab::run(&command, &mut output),
        Some(Command::XenHands) => xen::hands().map(|()| SUCCESS).map_err(|error| CliError::Mistake(error.to_string())),
        Some(Command::XenRefusals) => xen_refusals::run(&mut output),
        Some(Command::XenGuest(args)) => xen_guest::run(&args, &mut output),
        Some(Command::Ledger { format }) => ledger::run(format, &mut output),
    };
    let code = done.and_then(|code| output.finish().map(|()| code).map_err(CliError::Output));
    match code {
        Ok(code) => code.into(),
        Err(error) => {
            complain(&error.to_string());
            MISTAKE.into()
        }
    }
}

/// Events go to stderr if RUST_LOG asks for them. By default those of a server do that are warnings; others do not: a
/// conformance run provokes warnings by design.
fn log_to_stderr(serves: bool) {
    if serves && std::env::var_os("RUST_LOG").is_none_or(|asked| asked.is_empty()) {
        return told::tell_warnings();
    }
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::OFF.into())
        .from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// Help and the version are what was asked for; anything else is a mistake, told in one sentence.
fn parse_failed(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe is the reader's choice.
            _ = error.print();
            SUCCESS.into()
        }
        _ => {
            let told = error.to_string();
            let paragraph: Vec<&str> = told.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
            let sentence = paragraph.join(" ");
            let tips: String = told
                .lines()
                .filter_map(|line| line.trim().strip_prefix("tip: "))
                .map(|tip| format!("; {tip}"))
                .collect();
            complain(&format!("{}{tips} (polyvirt --help tells more)", sentence.trim_start_matches("error: ")));
            MISTAKE.into()
        }
    }
}

/// One sentence on stderr. If nobody can read it, nothing else is to be done.
fn complain(sentence: &str) {
    use std::io::Write as _;
    _ = writeln!(std::io::stderr(), "polyvirt: {sentence}");
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// The command lines of this program in a page: in code spans, and in lines that are code.
    fn commands(text: &str) -> Vec<Vec<String>> {
        let blocks = text.lines().filter_map(|line| line.strip_prefix("    "));
        let spans = text.split('`').skip(1).step_by(2);
        let ours = |line: &str| {
            let (_, words) = line
                .split_once("polyvirt ")
                .filter(|(before, _)| matches!(*before, "" | "RUST_LOG=debug "))
                .or_else(|| line.split_once("cargo run --release -- ").filter(|(before, _)| before.is_empty()))?;
            let words = words.split('#').next()?.replace("$(xl domid guest)", "1");
            // What stands between quotes is one word.
            let mut quoted = false;
            let words = words.split(|letter: char| {
                quoted ^= letter == '\'';
                letter.is_whitespace() && !quoted
            });
            let words = words.filter(|word| !word.is_empty() && *word != "&");
            Some(words.map(|word| word.trim_matches('\'').to_owned()).collect())
        };
        blocks.chain(spans).filter_map(ours).collect()
    }

    #[test]
    fn commands_that_the_pages_name_are_understood() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let pages = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
        let pages = pages.chain(["README.md", "CONTRIBUTING.md"].map(|page| root.join(page)));
        let mut seen = 0;
        for page in pages.filter(|page| page.extension().is_some_and(|end| end == "md")) {
            for words in commands(&fs::read_to_string(&page).unwrap()) {
                seen += 1;
                let parsed = Cli::try_parse_from(std::iter::once("polyvirt").chain(words.iter().map(String::as_str)));
                // Where only the command is named, what it needs is not.
                let named = |kind| {
                    matches!(
                        kind,
                        ErrorKind::MissingRequiredArgument
                            | ErrorKind::MissingSubcommand
                            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
                    )
                };
                if let Err(error) = parsed.map(drop)
                    && !named(error.kind())
                {
                    panic!("{}: polyvirt {}: {error}", page.display(), words.join(" "));
                }
            }
        }
        assert!(seen > 25, "only {seen} commands: are they still found?");
    }
}
