//! `polyvirt check vhost-user:PATH`.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use polyvirt_conformance::cases;
use polyvirt_conformance::cells::Kind;
use polyvirt_conformance::daemon::{Daemon, Expectations, Process};
use polyvirt_conformance::suite::Target;

use super::select::Selection;
use super::{CheckArgs, CliError, External, files};

/// What stands in the place of a hypervisor's name.
pub(super) const HYPERVISOR: &str = "daemon";

/// The cells of a daemon, and what is known of it.
pub(super) type Known = (Vec<Arc<dyn Target>>, Option<Expectations>);

/// The cells of the daemon that `external` names, and what is known of it.
pub(super) fn select(args: &CheckArgs, external: External<'_>) -> Result<Known, CliError> {
    let External { target, expect, command } = external;
    let mistake = |sentence: String| CliError::Mistake(sentence);
    let Some(("vhost-user", path)) = target.split_once(':') else {
        return Err(mistake(format!("'{target}' is no target: expected vhost-user:PATH")));
    };
    if !args.hypervisor.is_empty() || !args.transport.is_empty() {
        return Err(mistake("--hypervisor and --transport choose from our own cells, not a TARGET".into()));
    }
    let names = Kind::ALL.map(Kind::name);
    let devices = Selection::new("device", &args.device, &names)?;
    let kind = match Kind::ALL.into_iter().filter(|kind| devices.has(kind.name())).collect::<Vec<_>>()[..] {
        [kind] => kind,
        _ => {
            return Err(mistake(format!(
                "the protocol does not tell what the device is: --device {}",
                names.join("|")
            )));
        }
    };
    let socket = PathBuf::from(path);
    let process = command.map(|command| Arc::new(Process::new(command.into(), socket.clone())));
    let formats = Daemon::formats(socket.clone(), kind, process.clone()).map_err(mistake)?;
    let rings = Selection::new("ring format", &args.ring, &formats.iter().map(|ring| ring.name()).collect::<Vec<_>>())?;
    let expected = expect.map(|name| expectations(name, kind)).transpose()?;
    let targets = formats.into_iter().filter(|ring| rings.has(ring.name())).map(|ring| {
        let known = expected.iter().flat_map(|expected| expected.cases.keys());
        Arc::new(Daemon::new(socket.clone(), kind, ring).started_by(process.clone()).known_to_fail(known))
            as Arc<dyn Target>
    });
    Ok((targets.collect(), expected))
}

fn expectations(name: &str, kind: Kind) -> Result<Expectations, CliError> {
    let text = match Expectations::text(name) {
        Some(text) => text.to_owned(),
        None => files::open(name.as_ref()).and_then(io::read_to_string).map_err(|error| {
            let known = Expectations::names().join(", ");
            CliError::Mistake(format!("expectations '{name}': {error}; those that come with the program: {known}"))
        })?,
    };
    let expected = Expectations::parse(&text, &cases::of_daemons())
        .map_err(|error| CliError::Mistake(format!("expectations '{name}': {error}")))?;
    match expected.device == kind.name() {
        true => Ok(expected),
        false => Err(CliError::Mistake(format!("expectations '{name}' are of a device {}", expected.device))),
    }
}
