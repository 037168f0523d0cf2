//! The program `polyvirt`: runs the conformance suite on every hypervisor that this host has, and tells the result.

mod cli;
mod image;
mod lab;
mod lines;
mod report;
mod shims;
mod temporary;

fn main() -> std::process::ExitCode {
    cli::run()
}
