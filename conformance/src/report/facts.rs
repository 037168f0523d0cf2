//! What a reader has to know about the host to judge a result.

use std::fs;

/// Facts about this host.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Label and value, in the order in which they are told.
    pub(crate) lines: Vec<(&'static str, String)>,
}

impl Facts {
    /// Looks around.
    pub(crate) fn of_this_host() -> Self {
        let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let kernel =
            format!("{} {}", file("/proc/sys/kernel/ostype").trim(), file("/proc/sys/kernel/osrelease").trim());
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let cpu = cpu_model(&file("/proc/cpuinfo")).unwrap_or(std::env::consts::ARCH).to_owned();
        let lines = vec![
            ("polyvirt", env!("CARGO_PKG_VERSION").to_owned()),
            ("Kernel", if kernel.trim().is_empty() { std::env::consts::OS.to_owned() } else { kernel }),
            ("Processor", format!("{cpu}, {cpus} available ({})", std::env::consts::ARCH)),
            ("/dev/kvm", device("/dev/kvm")),
            ("Run", utc(seconds_since_1970())),
        ];
        Self { lines }
    }
}

/// The model name in the text of /proc/cpuinfo.
fn cpu_model(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim()).filter(|name| !name.is_empty())
}

fn device(path: &str) -> String {
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => "present, may be opened".to_owned(),
        Err(error) => format!("cannot be opened: {error}"),
    }
}

fn seconds_since_1970() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A time of the Gregorian calendar, `YYYY-MM-DD HH:MM UTC`.
fn utc(seconds: u64) -> String {
    let (minutes, mut days) = (seconds / 60 % (24 * 60), seconds / 86_400);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02} {:02}:{:02} UTC", days + 1, minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days_and_year_ends() {
        assert_eq!(utc(0), "1970-01-01 00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(utc(1_767_225_599), "2025-12-31 23:59 UTC");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00 UTC");
    }

    #[test]
    fn the_processor_is_named_if_the_kernel_names_it() {
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: Fast 3000\n"), Some("Fast 3000"));
        assert_eq!(cpu_model("model name\t:\n"), None);
        assert_eq!(cpu_model(""), None);
    }
}
