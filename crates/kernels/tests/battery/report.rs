//! Which instruction sets the battery is evidence for.

use std::io::Write as _;

use tercet_kernels::{Isa, Kernels};

use crate::support::{Random, assert_bits, on_emulated_cpu, scalar, variants};

#[test]
fn every_instruction_set_runs_or_its_stand_in_does() {
    let mut random = Random(1);
    let [a, b] = [(); 2].map(|()| random.floats(100));
    let expected = [scalar().dot(&a, &b)];
    let mut stderr = std::io::stderr();
    for isa in Isa::ALL.into_iter().filter(|&isa| isa != Isa::Scalar) {
        let ran: Vec<String> = variants()
            .into_iter()
            .filter(|kernels| kernels.isa() == isa)
            .map(|kernels| {
                assert_bits(kernels, &[kernels.dot(&a, &b)], &expected, "a product");
                format!("{kernels:?}")
            })
            .collect();
        let here = Kernels::new(isa).map(|kernels| format!("{kernels:?}"));
        let stand_in = Kernels::emulated(isa).map(|kernels| format!("{kernels:?}")).unwrap();
        let mut expected: Vec<_> = here.clone().into_iter().collect();
        if !on_emulated_cpu() {
            expected.push(stand_in);
        }
        assert_eq!(ran, expected, "variants of {isa} in the battery");
        let told = match (here.is_some(), on_emulated_cpu()) {
            (true, false) => format!("RAN: {isa}, on this CPU and in emulated vectors"),
            (true, true) => format!("RAN: {isa}, on this CPU"),
            (false, false) => {
                format!("NOT ON THIS CPU: {isa}; its algorithms ran in emulated vectors")
            }
            (false, true) => format!("NOT RUN: {isa}"),
        };
        // Not `eprintln`: the harness would swallow it when the test passes.
        writeln!(stderr, "{told}").unwrap();
    }
    assert!(variants().iter().all(|kernels| kernels.isa() != Isa::Scalar));
}
