//! What this process may use of its machine.

use std::{fs, num::NonZeroUsize, path::Path};

/// A machine, as a process sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Machine {
    /// CPUs: those it may run on, within the quota of its control group.
    pub(crate) cpus: usize,
    /// Bytes of memory: what is available, within the limit of its control group.
    pub(crate) memory: u64,
    /// Bytes of the models' files.
    pub(crate) model: u64,
}

impl Machine {
    /// Looks at this machine; `models` is where the models are.
    pub(crate) fn here(models: &[impl AsRef<Path>]) -> Self {
        Self {
            cpus: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            memory: memory(Path::new("/")),
            model: models.iter().map(|model| file_bytes(model.as_ref())).sum(),
        }
    }
}

/// Returns the bytes of a file, or of the files of a folder.
fn file_bytes(path: &Path) -> u64 {
    let size = |path: &Path| fs::metadata(path).ok().filter(fs::Metadata::is_file);
    match fs::read_dir(path) {
        Ok(files) => files.flatten().filter_map(|file| size(&file.path())).map(|m| m.len()).sum(),
        Err(_) => size(path).map_or(0, |file| file.len()),
    }
}

/// Returns the memory that a process may use on the machine whose files are below `root`: the least
/// of what is available and of the limits of its control groups. What cannot be read limits nothing.
fn memory(root: &Path) -> u64 {
    let available = available(root).unwrap_or(u64::MAX);
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        // hierarchy:controllers:path, with no controllers for version 2.
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        match controllers {
            "" => limit(&root.join("sys/fs/cgroup"), path, "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                limit(&root.join("sys/fs/cgroup/memory"), path, "memory.limit_in_bytes")
            }
            _ => None,
        }
    });
    limits.fold(available, u64::min)
}

/// Returns the least limit of a control group and those it is in. A container sees its own group
/// at the top, whatever path it is told.
fn limit(mount: &Path, group: &str, file: &str) -> Option<u64> {
    let group = Path::new(group.trim_start_matches('/'));
    let limits = group.ancestors().filter_map(|group| {
        fs::read_to_string(mount.join(group).join(file)).ok()?.trim().parse().ok()
    });
    limits.min()
}

/// Returns `MemAvailable`.
fn available(root: &Path) -> Option<u64> {
    let told = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// The files of a made-up machine; they go with their test.
    struct Fake(PathBuf);

    impl Fake {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("tercet-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable:     800 kB\n");

    #[test]
    fn without_limits_the_available_memory_counts() {
        let machine = Fake::new("free", &[MEMINFO, ("proc/self/cgroup", "0::/a\n")]);
        assert_eq!(memory(&machine.0), 800 << 10);
        assert_eq!(memory(Path::new("/no/such")), u64::MAX);
    }

    #[test]
    fn the_least_limit_on_the_way_to_the_root_counts() {
        let machine = Fake::new(
            "v2",
            &[
                MEMINFO,
                ("proc/self/cgroup", "0::/pods/one/main\n"),
                ("sys/fs/cgroup/pods/one/main/memory.max", "max\n"),
                ("sys/fs/cgroup/pods/one/memory.max", "409600\n"),
                ("sys/fs/cgroup/pods/memory.max", "614400\n"),
            ],
        );
        assert_eq!(memory(&machine.0), 409_600);
    }

    #[test]
    fn a_container_of_version_1_is_limited_at_the_mount() {
        let machine = Fake::new(
            "v1",
            &[
                MEMINFO,
                ("proc/self/cgroup", "9:cpu:/docker/x\n8:hugetlb,memory:/docker/x\n0::/x\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "204800\n"),
            ],
        );
        assert_eq!(memory(&machine.0), 204_800);
    }

    #[test]
    fn a_limit_above_the_available_memory_limits_nothing() {
        let machine = Fake::new(
            "unlimited",
            &[
                MEMINFO,
                ("proc/self/cgroup", "4:memory:/\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ],
        );
        assert_eq!(memory(&machine.0), 800 << 10);
    }

    #[test]
    fn a_folder_is_as_large_as_its_files() {
        let folder = Fake::new("model", &[("a", "12345"), ("b", "123"), ("inner/c", "1")]);
        assert_eq!(file_bytes(&folder.0), 8);
        assert_eq!(file_bytes(&folder.0.join("a")), 5);
        assert_eq!(file_bytes(&folder.0.join("none")), 0);
    }
}
