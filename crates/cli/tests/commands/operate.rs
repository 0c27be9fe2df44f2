//! What operators ask of a gateway.

use std::io::Read as _;

use crate::{
    chat::Terminal,
    support::{Running, Scratch, fail, signal, succeed},
};

/// Starts a server and returns the addresses for clients and for operators.
fn serve() -> (Running, String, String) {
    let line = "serve --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0";
    let mut server = Running::start(line);
    let mut lines = server.lines();
    let mut address = |prefix| lines.next().unwrap().strip_prefix(prefix).unwrap().to_owned();
    let admin = address("admin listening on ");
    let clients = address("listening on ");
    // It is ready once it has answered.
    succeed(&format!("generate --prompt The --max-tokens 1 --connect {clients}"));
    (server, clients, admin)
}

#[test]
fn a_cluster_is_shown_to_people_and_programs() {
    let (_server, clients, admin) = serve();
    let table = succeed(&format!("status --connect {admin}"));
    let version = env!("CARGO_PKG_VERSION");
    assert!(table.starts_with(&format!("gateway {version}, up ")), "{table}");
    assert!(table.contains(" of 1024 streams, registry connected\n"), "{table}");
    let row = |first: &str| {
        let row = table.lines().find(|line| line.split(' ').next() == Some(first));
        row.unwrap_or_else(|| panic!("{table}")).split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(row("demo")[..5], ["demo", "1/1", "0", "0", "0"]);
    assert_eq!(row("local")[..3], ["local", "ready", "local"]);

    let json = succeed(&format!("status --json --admin {admin}"));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let worker = &json["workers"][0];
    assert_eq!((&worker["state"], &worker["health"]), (&"ready".into(), &"answering".into()));
    assert_eq!(worker["models"][0]["identity"], json["models"][0]["identity"]);
    assert!(worker["models"][0]["load"]["free_kv_tokens"].as_u64() > Some(0), "{json}");
    assert!(worker["report_age_seconds"].as_f64() < Some(60.0), "{json}");

    let once = succeed(&format!("top --connect {admin}"));
    assert!(once.starts_with("gateway ") && !once.contains('\x1b'), "{once}");

    let wrong = fail(&format!("status --connect {clients}"), 2);
    assert!(wrong.contains("serves clients, not operators"), "{wrong}");
    let nobody = fail("status --connect 127.0.0.1:1", 1);
    assert!(nobody.starts_with("no gateway serves operators at 127.0.0.1:1: give "), "{nobody}");
}

#[test]
fn a_live_view_leaves_the_terminal_as_it_was() {
    let (server, _, admin) = serve();
    let scratch = Scratch::new("top");
    // Ctrl-C is for all processes at the terminal: the shell must not die of it.
    for leave in ["q", "\x03", "-TERM"] {
        let line = format!(
            "trap : INT; stty -g; sh -c 'echo pid $$.; exec tercet top --connect {admin}'; echo code $?; stty -g"
        );
        let mut terminal = Terminal::run(&line, &scratch.file("state"));
        let before = terminal.expect("pid ");
        let pid = terminal.expect(".").parse().unwrap();
        terminal.expect("\x1b[?1049h");
        terminal.expect("registry connected");
        // Drawn again and again.
        terminal.expect("q ends");
        terminal.expect("q ends");
        if leave == "-TERM" {
            signal(pid, leave);
        } else {
            terminal.press(leave);
        }
        let said = terminal.expect("code 0\r\n");
        assert!(said.ends_with("\x1b[?25h\x1b[?1049l"), "{said:?}");
        assert_eq!(terminal.expect("\r\n").trim(), before.trim());
        assert_eq!(terminal.end(), Some(0));
    }
    // A gateway that goes away does not end it.
    let mut terminal =
        Terminal::run(&format!("exec tercet top --connect {admin}"), &scratch.file("state"));
    terminal.expect("q ends");
    drop(server);
    terminal.expect("does not answer, asking again");
    terminal.press("q");
    assert_eq!(terminal.end(), Some(0));
}

#[test]
fn a_drained_server_finishes_and_ends_well() {
    let (mut server, clients, admin) = serve();
    let unknown = fail(&format!("drain nobody --connect {admin}"), 2);
    assert!(unknown.contains("\"nobody\"") && unknown.contains("local"), "{unknown}");

    let text = "generate --prompt The --max-tokens 400 --ignore-eos --seed 7";
    let mut generate = Running::start(&format!("{text} --connect {clients}"));
    let mut begun = vec![0; 20];
    generate.0.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    let told = succeed(&format!("drain local --connect {admin}"));
    assert!(told.starts_with("local takes no new requests, "), "{told}");
    generate.0.stdout.take().unwrap().read_to_end(&mut begun).unwrap();
    assert_eq!(generate.0.wait().unwrap().code(), Some(0));
    assert_eq!(String::from_utf8(begun).unwrap(), succeed(text));
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}
