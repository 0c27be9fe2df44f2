//! The tags `{% generation %}` and `{% endgeneration %}`, which `transformers` adds to Jinja.
//!
//! They mark what the model has said, for training; rendering leaves their content as it is.

/// Returns the template with these tags as `with` blocks, which open a scope just the same. Lines
/// and trimming stay as they are.
pub(super) fn without(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        let lead = &tag[..tag.len() - name.len()];
        for (word, with) in [("generation", "with"), ("endgeneration", "endwith")] {
            let Some(end) = name.strip_prefix(word) else { continue };
            if end.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
                out.push_str(lead);
                out.push_str(with);
                rest = end;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tags_change() {
        assert_eq!(
            without("{% if a %}\n{%- generation -%}\n x{%endgeneration +%}{% endif %}"),
            "{% if a %}\n{%- with -%}\n x{%endwith +%}{% endif %}"
        );
        for same in
            ["", "{%", "{% generation", "{% generations %}", "{{ generation }}", "generation %}"]
        {
            assert_eq!(without(same), same);
        }
    }
}
