//! Layers: which one counts, and what is said of mistakes.

use std::fs;

use tercet_cluster::{EtcdCredentials, EtcdPassword, EtcdTls};
use tercet_gateway::Alias;

use super::*;
use crate::args::Command as Asks;

/// A configuration file that goes with its test.
struct Config(PathBuf);

impl Config {
    fn new(text: &str) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("tercet-settings-{}-{number}.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, text).unwrap();
        Self(path)
    }

    fn read(&self, line: &str) -> Result<Asked, Refusal> {
        let words = format!("tercet {line} --config {}", self.0.display());
        let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        read(&words, |_| None)
    }

    fn command(&self, line: &str) -> Asks {
        match self.read(line) {
            Ok(Asked::Run(cli, _)) => cli.command,
            other => panic!("{line}: {other:?}"),
        }
    }

    /// Returns the settings shown, by key: value and origin.
    fn shown(&self, line: &str) -> impl Fn(&str) -> (String, String) + use<> {
        let Ok(Asked::Show(text)) = self.read(&format!("{line} --print-config")) else {
            panic!("{line} shows")
        };
        move |key| {
            let own =
                |line: &str| line.trim_start_matches("# ").split([' ', '=']).next() == Some(key);
            let line = text.lines().skip(1).find(|line| own(line));
            let line = line.unwrap_or_else(|| panic!("no {key} in {text}"));
            let (value, origin) = line.rsplit_once("  # ").unwrap();
            let value = value.split_once(" = ").map_or("", |(_, value)| value.trim_end());
            (value.to_owned(), origin.to_owned())
        }
    }

    /// Returns what is said of this file.
    fn mistake(&self, line: &str) -> String {
        match self.read(line) {
            Err(Refusal::Settings(error)) => {
                error.to_string().replace(self.0.to_str().unwrap(), "file")
            }
            other => panic!("{line}: {other:?}"),
        }
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

fn pair(value: &str, origin: &str) -> (String, String) {
    (value.to_owned(), origin.to_owned())
}

#[test]
fn a_file_fills_what_the_command_line_leaves_open() {
    let config = Config::new(
        "threads = 3\nlisten = \"127.0.0.1:9\"\nlog = \"debug\"\netcd = [\"a:1\", \"b:2\"]\n\
         [worker]\nthreads = 5\nlayers = \"0..2\"\n[generate]\nignore-eos = true\n\
         stop = [\"x\", \"y\"]\nprompt = \"hi\"\n",
    );
    let Asks::Worker(worker) = config.command("worker") else { panic!() };
    assert_eq!(worker.engine.options(None).threads, 5);
    assert_eq!(worker.cluster.etcd, ["a:1", "b:2"], "required, and in the file");
    assert_eq!(worker.layers.map(|layers| layers.0), Some(0..2));
    let Asks::Worker(worker) = config.command("worker --threads 7 --etcd c:3") else { panic!() };
    assert_eq!(worker.engine.options(None).threads, 7);
    assert_eq!(worker.cluster.etcd, ["c:3"]);
    let Asks::Serve(serve) = config.command("serve") else { panic!() };
    assert_eq!((serve.engine.options(None).threads, serve.listen.as_str()), (3, "127.0.0.1:9"));
    let Asks::Generate(generate) = config.command("generate") else { panic!() };
    assert!(generate.sampling.ignore_eos);
    assert_eq!(generate.sampling.stop, ["x", "y"]);
    assert_eq!(generate.prompt, "hi");
}

#[test]
fn a_list_is_for_those_that_take_one() {
    let config = Config::new("model = [\"a=/x\", \"b=/y\"]\nconnect = [\"h:1\", \"h:2\"]\n");
    let Asks::Serve(serve) = config.command("serve") else { panic!() };
    assert_eq!(serve.model.model.len(), 2);
    let Asks::Generate(generate) = config.command("generate --prompt x --model m") else {
        panic!()
    };
    assert_eq!(generate.backend.connect, ["h:1", "h:2"]);
    let said = config.mistake("bench");
    assert!(said.starts_with("file:1: model = [\"a=/x\", \"b=/y\"]: expected one value"), "{said}");
    let shown = config.read("model list --print-config");
    assert!(matches!(shown, Err(Refusal::Settings(_))), "one server is asked");
    let Ok(Asked::Show(text)) = Config::new("").read("model list --print-config") else { panic!() };
    assert!(text.starts_with("# tercet model list\n"), "{text}");
}

#[test]
fn every_setting_says_where_it_comes_from() {
    let config = Config::new("prefill-chunk = 48\n[serve]\nprofile = \"edge\"\nlog = \"warn\"\n");
    let file = |line| format!("file {}:{line}", config.0.display());
    let shown = config.shown("serve --threads 2");
    assert_eq!(shown("threads"), pair("2", "flag --threads"));
    assert_eq!(shown("prefill-chunk"), pair("48", &file(1)));
    assert_eq!(shown("profile"), pair("\"edge\"", &file(3)));
    assert_eq!(shown("log"), pair("\"warn\"", &file(4)));
    assert_eq!(shown("max-sequences"), pair("4", "profile edge"));
    assert_eq!(shown("context"), pair("4096", "profile edge"));
    assert_eq!(shown("listen"), pair("\"127.0.0.1:7171\"", "default"));
    assert_eq!(shown("model"), pair("", "default: the built-in demo model"));
    let shown = config.shown("serve --profile server --max-sequences 9");
    assert_eq!(shown("max-sequences"), pair("9", "flag --max-sequences"));
    assert_eq!(shown("context"), pair("32768", "profile server"));
    let shown = config.shown("worker");
    assert_eq!(shown("etcd").0, "", "shown, though it must be given to run");
    assert_eq!(shown("max-sequences"), pair("32", "default"));
}

#[test]
fn aliases_have_a_table() {
    let config = Config::new(
        "[aliases]\nchat = \"demo\"\nbest = { \"demo\" = 90, \"demo-v2\" = 10 }\n[serve]\nthreads = 2\n",
    );
    let Asks::Serve(serve) = config.command("serve") else { panic!() };
    let expected: Vec<Alias> =
        vec!["best=demo=90,demo-v2=10".parse().unwrap(), "chat=demo".parse().unwrap()];
    let mut aliases = serve.gateway.alias;
    aliases.sort_by(|one, other| one.name.cmp(&other.name));
    assert_eq!(aliases, expected);
    let Asks::Serve(serve) = config.command("serve --alias x=y") else { panic!() };
    assert_eq!(serve.gateway.alias, ["x=y".parse().unwrap()]);
    let Ok(Asked::Show(text)) = config.read("serve --print-config") else { panic!() };
    let again = Config::new(&text);
    let Asks::Serve(serve) = again.command("serve") else { panic!() };
    assert_eq!(serve.gateway.alias.len(), 2, "{text}");
    for (wrong, said) in [
        ("[aliases]\nchat = 3\n", "file:2: chat: expected a model"),
        ("[aliases]\nchat = \"a=b\"\n", "file:2: chat: expected a model"),
        ("[aliases]\nchat = { demo = -1 }\n", "file:1: alias = [\"chat=demo=-1\"]"),
    ] {
        let mistake = Config::new(wrong).mistake("serve");
        assert!(mistake.starts_with(said), "{mistake}");
    }
}

#[test]
fn what_is_shown_is_a_file_that_says_the_same() {
    let config = Config::new("");
    let line = "worker --profile edge --threads 2 --etcd a:1,b:2 --listen 127.0.0.1:0 --name 007";
    let Ok(Asked::Show(first)) = config.read(&format!("{line} --print-config")) else { panic!() };
    let again = Config::new(&first);
    let Ok(Asked::Show(second)) = again.read("worker --print-config") else { panic!() };
    let values = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.contains(" = "));
        lines.map(|line| line.split("  # ").next().unwrap().trim_end().to_owned()).collect()
    };
    assert_eq!(values(&first), values(&second));
    assert!(values(&first).len() > 10, "{first}");
}

#[test]
fn a_secret_is_neither_shown_nor_taken_as_a_flag() {
    let config = Config::new("etcd-user = \"tercet\"\netcd-password = \"open sesame\"\n");
    let Ok(Asked::Show(text)) = config.read("gateway --print-config") else { panic!() };
    assert!(text.contains("# etcd-password = (hidden)"), "{text}");
    assert!(!text.contains("sesame"), "{text}");
    let shown = config.shown("gateway");
    assert_eq!(shown("etcd-password").1, format!("file {}:2", config.0.display()));
    let Asks::Gateway(gateway) = config.command("gateway --etcd a:1") else { panic!() };
    assert!(!format!("{gateway:?}").contains("sesame"));
    let credentials = gateway.cluster.options().unwrap().credentials.unwrap();
    assert_eq!(credentials.password, EtcdPassword::Given("open sesame".to_owned()));

    let said = Config::new("").mistake("worker --etcd a:1 --etcd-password sesame");
    assert!(said.contains("TERCET_ETCD_PASSWORD") && !said.contains("sesame"), "{said}");
    let said = Config::new("etcd-password = [\"sesame\"]\n").mistake("worker --etcd a:1");
    assert!(said.starts_with("file:1: etcd-password = (hidden): "), "{said}");
}

#[test]
fn settings_of_etcd_come_in_pairs() {
    let config = Config::new("");
    let options = |line: &str| {
        let Asks::Gateway(gateway) = config.command(&format!("gateway --etcd a:1 {line}")) else {
            panic!("{line}")
        };
        gateway.cluster.options().map_err(|error| error.to_string())
    };
    for (line, missing) in [
        ("--etcd-cert c", "--etcd-cert needs --etcd-key"),
        ("--etcd-key k", "--etcd-key needs --etcd-cert"),
        ("--etcd-user u", "--etcd-user needs TERCET_ETCD_PASSWORD or --etcd-password-file"),
        ("--etcd-password-file f", "needs --etcd-user"),
    ] {
        let said = options(line).unwrap_err();
        assert!(said.contains(missing), "{line}: {said}");
    }
    let line = "--etcd-ca a --etcd-cert c --etcd-key k --etcd-server-name n --etcd-user u \
                --etcd-password-file f";
    let given = options(line).unwrap();
    let identity = Some(("c".into(), "k".into()));
    let server_name = Some("n".to_owned());
    assert_eq!(given.tls, EtcdTls { authorities: Some("a".into()), identity, server_name });
    let password = EtcdPassword::File("f".into());
    assert_eq!(given.credentials, Some(EtcdCredentials { user: "u".to_owned(), password }));
    let twice = Config::new("etcd-password = 'x'\n");
    let Asks::Gateway(gateway) =
        twice.command("gateway --etcd a:1 --etcd-user u --etcd-password-file f")
    else {
        panic!()
    };
    assert!(gateway.cluster.options().unwrap_err().to_string().contains("twice"));
}

#[test]
fn a_profile_gives_way_to_the_file() {
    let config = Config::new("profile = \"server\"\nmax-sequences = 3\ncontext = 100\n");
    let Asks::Serve(serve) = config.command("serve") else { panic!() };
    let options = serve.engine.options(None);
    assert_eq!((options.max_sequences, options.context), (3, Some(100)));
    assert_eq!(options.prefill_chunk, 256);
}

#[test]
fn a_profile_leaves_room_for_the_models() {
    let config = Config::new("");
    let mib = |line: &str| -> u64 {
        let (size, _) = config.shown(line)("kv-memory");
        size.trim_matches('"').strip_suffix("MiB").unwrap().parse().unwrap()
    };
    let beside = mib("serve --profile server");
    let file = Config::new("");
    fs::File::options().write(true).open(&file.0).unwrap().set_len(64 << 30).unwrap();
    let path = file.0.display();
    let larger = mib(&format!("serve --profile server --model big={path},kv=1GiB --model {path}"));
    assert!(larger < beside, "{larger} beside models larger than the memory, {beside} without");
}

#[test]
fn mistakes_are_told_with_their_line() {
    for (text, expected) in [
        ("thread = 2\n", "file:1: unknown key thread: did you mean threads?"),
        ("max_sequences = 2\n", "file:1: unknown key max_sequences: did you mean max-sequences?"),
        ("\nzzz = 2\n", "file:2: unknown key zzz: expected a long flag without dashes"),
        ("[serve]\nsystem = 'x'\n", "file:2: unknown key system in [serve]: "),
        ("[serv]\nthreads = 2\n", "file:2: unknown table [serv]: did you mean serve?"),
        ("threads = 0\n", "file:1: threads = 0: "),
        ("threads = \"many\"\n", "file:1: threads = \"many\": invalid digit"),
        (
            "[gateway]\nworker-wait = \"5\"\n",
            "file:2: worker-wait = 5: expected a whole number with a unit",
        ),
        ("profile = \"huge\"\n", "file:1: profile = \"huge\": expected edge or server"),
        ("threads = [1, 2]\n", "file:1: threads = [1, 2]: expected one value, not a list"),
        ("name = true\n", "file:1: name = true: expected a string or a number"),
        ("[chat]\nignore-eos = 1\n", "file:2: ignore-eos = 1: expected true or false"),
        (
            "max-tokens = 5\n",
            "file:1: max-tokens is for one command: set it under [generate] or [chat]",
        ),
        ("config = 'x'\n", "file:1: unknown key config: "),
        ("threads = 1\nthreads = 2\n", "file:2: duplicate key"),
    ] {
        let config = Config::new(text);
        let said = config.mistake("serve");
        assert!(said.starts_with(expected), "{text}: {said}");
    }
    let said =
        match read(&["tercet", "serve", "--config", "/no/such"].map(OsString::from), |_| None) {
            Err(Refusal::Settings(error)) => error.to_string(),
            other => panic!("{other:?}"),
        };
    assert!(said.contains("/no/such"), "{said}");
}

#[test]
fn usage_is_told_as_it_is_without_a_file() {
    let words = ["tercet", "worker"].map(OsString::from);
    let Err(Refusal::Usage(error)) = read(&words, |_| None) else { panic!() };
    assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
    assert!(error.to_string().contains("--etcd <URL>"), "{error}");
}
