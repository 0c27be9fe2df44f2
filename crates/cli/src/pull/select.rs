//! Which files of a repository a model needs.

/// What files may be; above all not pickled weights, which run code when they are opened.
const ALLOWED: [&str; 4] = [".gguf", ".safetensors", ".json", ".jinja"];
/// Small files of a model's folder.
const BESIDE: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
/// The files of a LoRA adapter.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
const INDEX: &str = "model.safetensors.index.json";

/// Returns the indices of the files to have: those matching `pattern`, else a folder of safetensors
/// weights, else an adapter, else the only GGUF file.
///
/// The error says what is wrong with the repository, as the end of a sentence.
pub(super) fn select(names: &[&str], pattern: Option<&str>) -> Result<Vec<usize>, String> {
    let chosen: Vec<usize> = match pattern {
        Some(pattern) => matching(names, |name| matches(pattern, name)),
        None => usual(names)?,
    };
    if chosen.is_empty() {
        let pattern = pattern.unwrap_or_default();
        return Err(format!("has no file matching `{pattern}`{}", choices(names)));
    }
    for index in &chosen {
        let name = names[*index];
        let is_plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        if name.contains('\\') || !name.split('/').all(is_plain) {
            return Err(format!("has the file `{name}`, whose name leaves the folder"));
        }
        if !ALLOWED.iter().any(|end| name.ends_with(end)) {
            return Err(format!(
                "has the file `{name}`, expected one ending in {}",
                ALLOWED.join(", ")
            ));
        }
    }
    Ok(chosen)
}

fn usual(names: &[&str]) -> Result<Vec<usize>, String> {
    let has = |wanted: &str| names.contains(&wanted);
    let is_shard = |name: &str| {
        name == "model.safetensors"
            || name == INDEX
            || (name.starts_with("model-") && name.ends_with(".safetensors"))
    };
    if has("config.json") && (has("model.safetensors") || has(INDEX)) {
        // One or the other, as the loader looks for them.
        let is_weight = |name: &str| {
            if has("model.safetensors") { name == "model.safetensors" } else { is_shard(name) }
        };
        return Ok(matching(names, |name| BESIDE.contains(&name) || is_weight(name)));
    }
    if ADAPTER.iter().all(|name| has(name)) {
        return Ok(matching(names, |name| ADAPTER.contains(&name)));
    }
    let files = matching(names, |name| name.ends_with(".gguf"));
    match files.len() {
        1 => Ok(files),
        0 => Err("has neither safetensors weights with a config.json nor a GGUF file".to_owned()),
        count => Err(format!("has {count} GGUF files: choose with --file{}", choices(names))),
    }
}

fn matching(names: &[&str], is_wanted: impl Fn(&str) -> bool) -> Vec<usize> {
    names.iter().enumerate().filter(|(_, name)| is_wanted(name)).map(|(index, _)| index).collect()
}

/// Lists the GGUF files, as the end of a message.
fn choices(names: &[&str]) -> String {
    const SHOWN: usize = 12;
    let files: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(".gguf")).collect();
    match files.len() {
        0 => String::new(),
        1..=SHOWN => format!("; there are {}", files.join(", ")),
        count => format!("; there are {} and {} more", files[..SHOWN].join(", "), count - SHOWN),
    }
}

/// Whether a name fits a pattern in which `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        // The earliest place leaves the most for what follows.
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names<'a>(all: &[&'a str], pattern: Option<&str>) -> Result<Vec<&'a str>, String> {
        Ok(select(all, pattern)?.into_iter().map(|index| all[index]).collect())
    }

    #[test]
    fn a_folder_needs_configuration_tokenizer_and_safetensors() {
        let all = [
            "README.md",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "consolidated.safetensors",
            "tokenizer.json",
            "original/params.json",
        ];
        let found = names(&all, None).unwrap();
        assert_eq!(found, [all[1], all[2], all[3], all[4], all[7]]);
        let single = ["config.json", "model.safetensors", "model-old.safetensors"];
        assert_eq!(names(&single, None).unwrap(), &single[..2]);
        let adapter = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"];
        assert_eq!(names(&adapter, None).unwrap(), &adapter[..2]);
    }

    #[test]
    fn one_gguf_file_is_taken_and_several_are_chosen_among() {
        assert_eq!(names(&["a.gguf", "README.md"], None).unwrap(), ["a.gguf"]);
        let all = ["m-Q2_0.gguf", "m-TQ1_0.gguf", "m-TQ2_0.gguf"];
        let error = names(&all, None).unwrap_err();
        assert!(error.contains("3 GGUF files") && error.contains("m-TQ1_0.gguf"), "{error}");
        assert_eq!(names(&all, Some("*TQ1*")).unwrap(), ["m-TQ1_0.gguf"]);
        assert_eq!(names(&all, Some("m-Q2_0.gguf")).unwrap(), ["m-Q2_0.gguf"]);
        let error = names(&all, Some("*Q4*")).unwrap_err();
        assert!(error.contains("no file matching `*Q4*`; there are m-Q2_0.gguf"), "{error}");
        assert!(names(&["README.md"], None).is_err());
    }

    #[test]
    fn pickles_and_names_that_lead_away_are_refused() {
        for name in ["pytorch_model.bin", "../x.gguf", "/x.gguf", "a//x.gguf", "a\\x.gguf"] {
            assert!(names(&[name], Some("*")).is_err(), "{name}");
        }
        assert_eq!(names(&["sub/x.gguf"], Some("*")).unwrap(), ["sub/x.gguf"]);
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("a*b*c", "a-b-b-c", true),
            ("a*b", "ab", true),
            ("a*a", "a", false),
            ("*", "", true),
            ("ab", "abc", false),
            ("*b", "abc", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
