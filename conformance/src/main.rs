//! The program.
fn main() {
    for row in polyvirt_conformance::bench::rings::run(Default::default(), |_| {}) {
        println!("{:60} {:8.2}M {:8.2}M {:.2}", row.name, row.ours / 1e6, row.peer / 1e6, row.ratio);
    }
}
