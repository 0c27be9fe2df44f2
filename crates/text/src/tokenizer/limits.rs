//! Bounds on the work a `tokenizer.json` asks for, when it is loaded and for every text.
//!
//! The library runs what the file says: expressions that look back and forth are tried in all ways,
//! a replacement may be of any length and follow another, and what surrounds a text may be longer
//! than any text. Real files stay far below these bounds.

use fancy_regex::Expr;
use serde_json::Value;

use super::TokenizerError;

/// The most bytes of a file; the largest known ones have 35 MB.
pub(super) const MAX_BYTES: usize = 64 << 20;
/// The most steps that normalize, cut, and surround a text, all together.
const MAX_STEPS: usize = 64;
/// The longest expression; known ones have some hundred bytes.
const MAX_EXPRESSION: usize = 4096;
/// The most that the counts of an expression's repetitions sum up to: each is compiled as a copy.
const MAX_COUNTS: usize = 256;
/// The most repetitions without an end that follow each other, if an expression looks around.
const MAX_UNBOUNDED: usize = 3;
/// How many times longer a text may become before it is cut.
const MAX_GROWTH: usize = 64;
/// The most bytes of all added tokens: they are searched for at once, with many bytes for each.
const MAX_ADDED: usize = 1 << 20;
/// The most tokens put around a text.
const MAX_AROUND: usize = 1024;

/// The parts of the file that say what is done to a text.
pub(super) struct Pipeline<'a> {
    pub(super) added_tokens: &'a Value,
    pub(super) normalizer: &'a Value,
    pub(super) pre_tokenizer: &'a Value,
    pub(super) post_processor: &'a Value,
}

/// Refuses a file that asks for more.
pub(super) fn check(pipeline: &Pipeline<'_>) -> Result<(), TokenizerError> {
    let added = |token: &Value| token["content"].as_str().map_or(0, str::len);
    let bytes: usize = pipeline.added_tokens.as_array().into_iter().flatten().map(added).sum();
    if bytes > MAX_ADDED {
        return exceeds("added_tokens", format!("{bytes} bytes"), "at most 1 MiB of text");
    }
    let parts = [pipeline.normalizer, pipeline.pre_tokenizer, pipeline.post_processor];
    let mut steps = Vec::new();
    for part in parts {
        collect(part, &mut steps);
    }
    if steps.len() > MAX_STEPS {
        let setting = "normalizer, pre_tokenizer and post_processor";
        return exceeds(setting, format!("{} steps", steps.len()), "at most 64 steps");
    }
    for step in &steps {
        if let Some(expression) = step["pattern"]["Regex"].as_str() {
            check_expression(expression)?;
        }
    }
    let mut normalizers = Vec::new();
    collect(pipeline.normalizer, &mut normalizers);
    let growth = normalizers.iter().fold(1_usize, |growth, step| {
        let text = step["content"].as_str().or_else(|| step["prepend"].as_str());
        growth.saturating_mul(text.map_or(1, str::len).max(1))
    });
    if growth > MAX_GROWTH {
        let expected = "replacements that make a text at most 64 times longer, all together";
        return exceeds("normalizer", format!("one that makes it {growth} times longer"), expected);
    }
    let around: usize = steps.iter().map(|step| around(step)).fold(0, usize::saturating_add);
    if around > MAX_AROUND {
        return exceeds("post_processor", format!("{around} tokens"), "at most 1024 around a text");
    }
    Ok(())
}

/// Lists the steps of a part of the file, those of sequences in their place.
fn collect<'a>(part: &'a Value, steps: &mut Vec<&'a Value>) {
    if part.is_object() {
        steps.push(part);
    }
    for list in ["normalizers", "pretokenizers", "processors"] {
        part[list].as_array().into_iter().flatten().for_each(|step| collect(step, steps));
    }
}

/// Returns how many tokens a post-processor puts around a text.
fn around(step: &Value) -> usize {
    let pieces = step["single"].as_array().into_iter().flatten();
    let tokens = pieces.filter_map(|piece| {
        let token = &step["special_tokens"][piece["SpecialToken"]["id"].as_str()?];
        Some(token["ids"].as_array()?.len())
    });
    tokens.fold(0, usize::saturating_add)
}

fn check_expression(expression: &str) -> Result<(), TokenizerError> {
    let length = expression.len();
    if length > MAX_EXPRESSION {
        return exceeds("pattern.Regex", format!("{length} bytes long"), "at most 4096 bytes");
    }
    let tree = match Expr::parse_tree(expression) {
        Ok(tree) => tree.expr,
        Err(error) => {
            return exceeds("pattern.Regex", error.to_string(), "an expression that can be parsed");
        }
    };
    let work = Work::of(&tree);
    if work.counts > MAX_COUNTS {
        let found = format!("repetitions of {} in sum", work.counts);
        return exceeds("pattern.Regex", found, "at most 256");
    }
    // Without these, an expression is matched in time linear in the text.
    if work.looks_around && (work.nested || work.unbounded > MAX_UNBOUNDED) {
        let expected = "at most three repetitions without an end in a row, and none within another, \
                        where it looks around or refers back";
        return exceeds("pattern.Regex", format!("`{expression}`"), expected);
    }
    Ok(())
}

/// What an expression costs.
#[derive(Clone, Copy, Default)]
struct Work {
    /// Whether it needs to be tried in several ways.
    looks_around: bool,
    /// The repetitions without an end on one way through it.
    unbounded: usize,
    /// Whether such a repetition is within another.
    nested: bool,
    /// The sum of the ends of the others.
    counts: usize,
}

impl Work {
    fn of(expression: &Expr) -> Self {
        match expression {
            Expr::Concat(parts) => parts.iter().map(Self::of).fold(Self::default(), Self::then),
            Expr::Alt(ways) => ways.iter().map(Self::of).fold(Self::default(), Self::or),
            Expr::Group(inner) => Self::of(inner),
            Expr::LookAround(inner, _) | Expr::AtomicGroup(inner) => {
                Self { looks_around: true, ..Self::of(inner) }
            }
            Expr::Repeat { child, hi, .. } => {
                let mut work = Self::of(child);
                if *hi == usize::MAX {
                    work.nested |= work.unbounded > 0;
                    work.unbounded += 1;
                } else {
                    work.unbounded = work.unbounded.saturating_mul(*hi);
                    work.counts = work.counts.max(1).saturating_mul(*hi);
                }
                work
            }
            Expr::Conditional { condition, true_branch, false_branch } => {
                let branches = Self::of(true_branch).or(Self::of(false_branch));
                Self { looks_around: true, ..Self::of(condition).then(branches) }
            }
            // It is handed on as it is, with repetitions written out if there are any.
            Expr::Empty | Expr::Any { .. } | Expr::Literal { .. } | Expr::Delegate { .. } => {
                Self::default()
            }
            _ => Self { looks_around: true, ..Self::default() },
        }
    }

    fn then(self, next: Self) -> Self {
        Self { unbounded: self.unbounded.saturating_add(next.unbounded), ..self.or(next) }
    }

    fn or(self, other: Self) -> Self {
        Self {
            looks_around: self.looks_around || other.looks_around,
            unbounded: self.unbounded.max(other.unbounded),
            nested: self.nested || other.nested,
            counts: self.counts.saturating_add(other.counts),
        }
    }
}

fn exceeds(
    setting: &'static str,
    found: String,
    expected: &'static str,
) -> Result<(), TokenizerError> {
    Err(TokenizerError::UnsupportedSetting { setting, found, expected })
}
