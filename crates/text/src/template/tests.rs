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
        (r#"{"paid:in": 1}"#, "`paid:in` is no name of a variable"),
        (&"[".repeat(100_000), "recursion limit exceeded at line 1 column 128"),
    ] {
        let error = render(json).unwrap_err().to_string();
        assert_eq!(error, format!("the variables of the chat template are not usable: {expected}"));
    }
}

#[test]
fn variables_are_set_one_by_one() {
    let source = "{{ tools | tojson }} {{ deep }} {{ enable_thinking }} {{ messages | length }}";
    let template = ChatTemplate::new(source, "", "").unwrap();
    let mut variables = TemplateVariables::default();
    for (name, json) in [
        ("tools", r#"[{"z": 1, "a": 2.0}]"#),
        ("deep", "\"yes\""),
        ("deep", "\"no\""),
        ("enable_thinking", "false"),
    ] {
        variables.set(name, json).unwrap();
    }
    let rendered = template.render_with(&[message("user", "a")], true, &variables);
    assert_eq!(rendered.unwrap(), r#"[{"z": 1, "a": 2.0}] no False 1"#);
    for (name, json, expected) in [
        ("messages", "[]", "`messages` is set by the conversation: leave it out"),
        ("add_generation_prompt", "1", "`add_generation_prompt` is set by the conversation"),
        ("deep", "yes", "expected value at line 1 column 1"),
        ("deep", "1, 2", "trailing characters at line 1 column 2"),
        ("deep", "", "EOF while parsing a value"),
    ] {
        let error = variables.set(name, json).unwrap_err().to_string();
        assert!(error.contains(expected), "{name} {json}: {error}");
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

/// Values that are short to build and have no end, in every place that reads a value to its end.
#[test]
fn values_that_have_no_end_are_paid_for_before_they_are_read() {
    let shared = "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(100) %}\
                  {% set n.s = [n.s, n.s] %}{% set n.t = [n.t, n.t] %}{% endfor %}";
    let maps = shared
        .replace("[1]", "{'a': 1}")
        .replace("[n.s, n.s]", "{'a': n.s, 'b': n.s}")
        .replace("[n.t, n.t]", "{'a': n.t, 'b': n.t}");
    let straight = shared.replace("[n.s, n.s]", "[n.s] + [n.s]");
    let pairs = shared.replace("[n.s, n.s]", "n.s | zip(n.s) | list");
    let cycle = "{% set n = namespace() %}{% set n.s = [n] %}{% set n.t = [n] %}".to_owned();
    let long = "{% set n = namespace(s=['x' * 500000] * 9000, t='') %}".to_owned();
    for build in [shared.to_owned(), maps, straight, pairs, cycle.clone()] {
        for used in [
            "{{ n.s == n.t }}",
            "{{ 1 < 2 < n.s }}",
            "{{ n.s != (n.t if true else 'k') }}",
            "{{ n.s in [n.t] }}",
            "{{ {n.s: 1} | length }}",
            "{{ {'a': 1, 'b': 2}[n.s] }}",
            "{{ [n.s, n.t] | unique | list | length }}",
            "{{ [n.s, n.t] | sort | length }}",
            "{{ n.s is eq n.t }}",
            "{{ [n.s].count(n.t) }}",
            "{{ [n.s] | select('equalto', n.t) | list | length }}",
            "{% for x in [n.s, n.t] %}{{ loop.changed(x) }}{% endfor %}",
            "{{ n.s | tojson(sort_keys=true) | length }}",
            "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(n.s) }}",
        ] {
            assert_endless(&(build.clone() + used));
        }
    }
    for build in [shared.to_owned(), cycle, long] {
        for used in [
            "{{ n.s }}",
            "{% set x = n.s ~ 'a' %}",
            "{% set x = n.s | string %}",
            "{% set x = n.s | upper %}",
            "{% set x = n.s | tojson %}",
            "{% set x = ','.join(n.s) %}",
            "{% set x = [n.s] | join(',') %}",
            "{% set x = '{}'.format(n.s) %}",
            "{% set x = '%s' | format(n.s) %}",
            "{% filter trim %}{{ n.s }}{% endfilter %}",
            "{{ raise_exception(n.s) }}",
        ] {
            assert_endless(&(build.clone() + used));
        }
    }
    for source in
        ["{{ '{:>9999999999}'.format(1) }}", "{{ '{:.99999999999999999999999}'.format(1) }}"]
    {
        let error = render(source).unwrap_err().to_string();
        assert!(error.contains("expected at most 4096"), "{source}: {error}");
    }
    let error = render("{{ 1 in messages == messages }}").unwrap_err();
    assert!(matches!(error, TemplateError::Syntax { line: 1, .. }), "{error}");
}

fn assert_endless(source: &str) {
    let rendered = render(source).map(|text| text.len());
    assert!(matches!(rendered, Err(TemplateError::Endless { .. })), "{source}: {rendered:?}");
}

#[test]
fn payments_change_no_result() {
    for (source, expected) in [
        (
            "{{ 1 < 2 < 3 }}{{ 1 < 2 > 3 }}{{ 'a' == 'b' or 2 in [1, 2] and 3 not in [1] }}",
            "TrueFalseTrue",
        ),
        (
            "{{ 'a' == ('a' if messages else 'b') }}{{ ('a' if false else 'b') == 'a' }}",
            "TrueFalse",
        ),
        (
            "{% for i in [1, 2, 3] if i != 2 %}{% if i == 3 %}{% continue %}{% endif %}{{ i }}{% else %}-{% endfor %}",
            "1",
        ),
        (
            "{% for i in [] %}{% else %}none{% endfor %}{{ {'a': 1, 'b': {'c': 2}}.b['c'] }}",
            "none2",
        ),
        ("{{ {'b': 1, 'a': 2} }}{{ (1, 2) }}{{ (1,) }}", "{'b': 1, 'a': 2}(1, 2)(1,)"),
        (
            "{% macro f(x, y='d') %}{{ x ~ y ~ (caller() if caller else '') }}{% endmacro %}{{ f('a') }}{% call f(1, y=2) %}c{% endcall %}",
            "ad12c",
        ),
        (
            "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
            "123",
        ),
        (
            "{% set ns = namespace(a=[]) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}{% endfor %}{{ ns.a | join(', ') }}",
            "system, user",
        ),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}",
            "1",
        ),
        (
            "{{ [3, 1, 2] | sort | first }}{{ 'a-b' | replace('-', '+') | upper }}{{ '%s|%d' | format('x', 3) }}",
            "1A+Bx|3",
        ),
        (
            "{% for x in 'aab' | list %}{{ loop.changed(x) }}{% endfor %}{{ 'b' is in 'abc' }}{{ 1 is ne 2 }}",
            "TrueFalseTrueTrueTrue",
        ),
        (
            "{% set x %}a{% endset %}{{ x ~ 1 ~ none ~ true }}{% filter upper %}b{% endfilter %}",
            "a1NoneTrueB",
        ),
    ] {
        assert_eq!(render(source).unwrap(), expected, "{source}");
    }
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
