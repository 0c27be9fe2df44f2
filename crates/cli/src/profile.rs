//! Profiles: settings that follow from the machine.

mod machine;

use std::fmt;

use clap::ValueEnum;

pub(crate) use self::machine::Machine;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a machine is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Profile {
    /// Few users on a machine with other work: with more than 2 CPUs one stays free; 4 sequences of
    /// at most 4096 tokens, chunks of 32, a quarter of the memory beside the model for keys and
    /// values (64MiB to 1GiB)
    Edge,
    /// Many users on a machine of its own: all CPUs; 8 sequences per CPU (16 to 256) of at most
    /// 32768 tokens, chunks of 256, three quarters of the memory beside the model for keys and
    /// values (256MiB at least)
    Server,
}

/// Settings that a profile decides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Tuning {
    pub(crate) threads: usize,
    pub(crate) max_sequences: usize,
    pub(crate) prefill_chunk: usize,
    pub(crate) kv_mib: u64,
    pub(crate) context: usize,
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Profile {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Server => "server",
        }
    }

    /// Returns the settings for a machine.
    pub(crate) fn tune(self, machine: &Machine) -> Tuning {
        let cpus = machine.cpus.max(1);
        // A model larger than the memory is not held whole: what its layers take is not known here.
        let beside = machine.memory.checked_sub(machine.model).unwrap_or(machine.memory / 2);
        match self {
            Self::Edge => Tuning {
                threads: if cpus > 2 { cpus - 1 } else { cpus },
                max_sequences: 4,
                prefill_chunk: 32,
                kv_mib: (beside / 4).clamp(64 * MIB, GIB) / MIB,
                context: 4096,
            },
            Self::Server => Tuning {
                threads: cpus,
                max_sequences: (8 * cpus).clamp(16, 256),
                prefill_chunk: 256,
                kv_mib: (beside / 4 * 3).max(256 * MIB) / MIB,
                context: 32_768,
            },
        }
    }
}

impl Tuning {
    /// Returns the values by the names of the settings, as they are written on the command line.
    pub(crate) fn values(&self) -> [(&'static str, String); 5] {
        [
            ("threads", self.threads.to_string()),
            ("max_sequences", self.max_sequences.to_string()),
            ("prefill_chunk", self.prefill_chunk.to_string()),
            ("kv_memory", format!("{}MiB", self.kv_mib)),
            ("context", self.context.to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuning(
        profile: Profile,
        cpus: usize,
        memory: u64,
        model: u64,
    ) -> (usize, usize, usize, u64, usize) {
        let Tuning { threads, max_sequences, prefill_chunk, kv_mib, context } =
            profile.tune(&Machine { cpus, memory, model });
        (threads, max_sequences, prefill_chunk, kv_mib, context)
    }

    #[test]
    fn an_edge_machine_keeps_room_for_others() {
        let edge = |cpus, memory, model| tuning(Profile::Edge, cpus, memory, model);
        assert_eq!(edge(1, 512 * MIB, 0), (1, 4, 32, 128, 4096));
        assert_eq!(edge(2, GIB, 512 * MIB), (2, 4, 32, 128, 4096));
        assert_eq!(edge(4, 4 * GIB, 2 * GIB), (3, 4, 32, 512, 4096));
        assert_eq!(edge(16, 64 * GIB, GIB), (15, 4, 32, 1024, 4096));
        assert_eq!(edge(4, 128 * MIB, 100 * MIB), (3, 4, 32, 64, 4096));
    }

    #[test]
    fn a_server_takes_the_machine() {
        let server = |cpus, memory, model| tuning(Profile::Server, cpus, memory, model);
        assert_eq!(server(1, 2 * GIB, GIB), (1, 16, 256, 768, 32_768));
        assert_eq!(server(8, 32 * GIB, 0), (8, 64, 256, 24 * 1024, 32_768));
        assert_eq!(server(64, 256 * GIB, 56 * GIB), (64, 256, 256, 150 * 1024, 32_768));
        assert_eq!(server(0, 128 * MIB, 0), (1, 16, 256, 256, 32_768));
    }

    #[test]
    fn a_model_larger_than_the_memory_is_held_in_part() {
        assert_eq!(tuning(Profile::Server, 8, 64 * GIB, 200 * GIB).3, 24 * 1024);
        assert_eq!(tuning(Profile::Edge, 8, 2 * GIB, 20 * GIB).3, 256);
    }
}
