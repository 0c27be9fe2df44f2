//! Templates as they occur in models, and templates that mean harm.

use super::*;

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

fn render(source: &str) -> Result<String, TemplateError> {
    let messages = [message("system", "Be <brief>."), message("user", "  \"Hi\" é  ")];
    let clock = Clock::Fixed(1_754_049_605);
    ChatTemplate::with_clock(source, "<s>", "</s>", clock)?.render(&messages, true)
}

#[test]
fn blocks_are_trimmed_as_in_transformers() {
    let source = "{{ bos_token }}\n  {% for m in messages %}\n  [{{ m.role }}]\n  {% endfor %}\n\
                  {% if add_generation_prompt %}\n>\n{% endif %}\n";
    assert_eq!(render(source).unwrap(), "<s>\n  [system]\n  [user]\n>\n");
}

#[test]
fn python_spellings_work() {
    for (source, expected) in [
        ("{{ messages[1]['content'].strip() }}", "\"Hi\" é"),
        ("{{ messages[-1].content | trim | length }}", "6"),
        ("{{ messages[0].get('content').upper().startswith('BE') }}", "True"),
        ("{{ messages[0].content.split(' ')[1] }}", "<brief>."),
        ("{{ messages[1:] | length }}{{ eos_token }}", "1</s>"),
        ("{{ messages[::-1][0].role }}", "user"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        (
            "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "system",
        ),
        (
            "{% for m in messages %}{{ loop.previtem.role if loop.previtem else '-' }}{% endfor %}",
            "-system",
        ),
        (
            "{{ messages[0].tool_calls is defined }}{{ tools is none }}{{ documents is none }}{{ missing }}",
            "FalseTrueTrue",
        ),
        ("{{ 'a' ~ (1 + 1) }}{{ 'b' in 'abc' }}{{ none }}", "a2TrueNone"),
        ("{{ strftime_now('%d %b %Y') }}", "01 Aug 2025"),
    ] {
        assert_eq!(render(source).unwrap(), expected, "{source}");
    }
}

#[test]
fn requests_bring_variables() {
    let template = ChatTemplate::new(
        "{{ thinking }} {{ tools | tojson }} {{ bos_token }} {{ messages | length }}",
        "<s>",
        "",
    )
    .unwrap();
    let render = |json: &str| {
        let variables = TemplateVariables::from_json(json)?;
        template.render_with(&[message("user", "a")], true, &variables)
    };
    let json =
        r#"{"thinking": false, "tools": [{"z": 1, "a": {"y": null, "b": 2.0}}], "bos_token": "B"}"#;
    assert_eq!(render(json).unwrap(), r#"False [{"z": 1, "a": {"y": null, "b": 2.0}}] B 1"#);
    assert_eq!(render("{}").unwrap(), " null <s> 1");
    for (json, expected) in [
        ("[]", "found a sequence, expected an object"),
        ("{", "EOF while parsing an object at line 1 column 1"),
        (r#"{"messages": []}"#, "`messages` is set by the conversation: leave it out"),
        (&"[".repeat(100_000), "recursion limit exceeded at line 1 column 128"),
    ] {
        let error = render(json).unwrap_err().to_string();
        assert_eq!(error, format!("the variables of the chat template are not usable: {expected}"));
    }
}

#[test]
fn tojson_writes_as_python_does() {
    // `json.dumps(value, ensure_ascii=False)` in Python.
    for (source, expected) in [
        ("{{ messages[0] | tojson }}", r#"{"role": "system", "content": "Be <brief>."}"#),
        (
            "{{ {'b': [1, 2.5, true, none], 'a': \"it's\"} | tojson }}",
            r#"{"b": [1, 2.5, true, null], "a": "it's"}"#,
        ),
        ("{{ [] | tojson }}{{ {} | tojson }}{{ 'é\\n' | tojson }}", "[]{}\"é\\n\""),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{{ [1, 2] | tojson(ensure_ascii=false) }}", "[1, 2]"),
    ] {
        assert_eq!(render(source).unwrap(), expected, "{source}");
    }
}

#[test]
fn raise_exception_blames_the_request() {
    let source = "{% if messages[0].role != 'user' %}\n{{ raise_exception('roles must alternate') }}{% endif %}";
    let error = render(source).unwrap_err();
    assert_eq!(error, TemplateError::Refused { reason: "roles must alternate".to_owned() });
    // The same from inside a macro, where the engine wraps it.
    let source = "{% macro no() %}{{ raise_exception('no') }}{% endmacro %}{{ no() }}";
    assert_eq!(render(source).unwrap_err(), TemplateError::Refused { reason: "no".to_owned() });
}

#[test]
fn errors_name_the_line() {
    let line = |source: &str| match render(source).unwrap_err() {
        TemplateError::Syntax { line, reason } => ("syntax", line, reason),
        TemplateError::Failed { line, reason } => ("failed", line, reason),
        other => panic!("{other}"),
    };
    let (kind, at, _) = line("a\nb\n{% for m in messages %}\n{% endif %}");
    assert_eq!((kind, at), ("syntax", 4));
    let (kind, at, reason) = line("a\nb {{ messages[0].content.nonsense() }}");
    assert_eq!((kind, at), ("failed", 2));
    assert!(reason.contains("nonsense"), "{reason}");
    let (kind, at, reason) = line("{{ 1 }}\n\n{{ 1 / 0 }}");
    assert_eq!((kind, at), ("failed", 3), "{reason}");
}

#[test]
fn hostile_templates_end() {
    let loops = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}\
                 {% endfor %}{% endfor %}{% endfor %}";
    let doubling = "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}";
    let shared = "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | tojson }}";
    let nested = "{% set n = namespace(s=[1]) %}{% for i in range(50000) %}{% set n.s = [n.s] %}{% endfor %}";
    for source in [loops, doubling, nested, "{{ 'x' * 90000000 }}", "{{ [0] * 1000000 }}", shared] {
        let error = render(source).unwrap_err();
        assert!(matches!(error, TemplateError::Endless { .. }), "{source}: {error}");
    }
    let deep = "{% set n = namespace(s=[1]) %}{% for i in range(200) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s | tojson }}";
    let error = render(deep).unwrap_err().to_string();
    assert!(error.contains("nested too deeply"), "{error}");
    // A long conversation pays for much nesting, which is dropped level by level.
    let long: Vec<ChatMessage> = (0..2_000).map(|_| message("user", "hi")).collect();
    let source = "{% set n = namespace(s=[1]) %}{% for i in range(90000) %}{% set n.s = [n.s] %}{% endfor %}";
    let template = ChatTemplate::new(source, "", "").unwrap();
    let thread = std::thread::Builder::new().stack_size(1 << 20);
    let rendered = thread.spawn(move || template.render(&long, true)).unwrap().join().unwrap();
    assert!(matches!(rendered, Ok(_) | Err(TemplateError::Endless { .. })), "{rendered:?}");
    let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(matches!(render(recursion), Err(TemplateError::Failed { line: 1, .. })));
}

#[test]
fn long_conversations_are_not_endless() {
    let source = "{% for m in messages %}{% if m.role == 'user' and loop.index0 is odd or m.role == 'x' %}\
                  {{ '<|' ~ m.role ~ '|>' }}{% endif %}{{ m.content | trim }}{% endfor %}";
    let template = ChatTemplate::new(source, "", "").unwrap();
    let many: Vec<ChatMessage> = (0..5_000).map(|_| message("user", "hi")).collect();
    assert_eq!(template.render(&many, true).unwrap().len(), 5_000 * 2 + 2_500 * 8);
    let long = [message("user", &"word ".repeat(1_000_000))];
    assert_eq!(template.render(&long, true).unwrap().len(), 4_999_999);
}
