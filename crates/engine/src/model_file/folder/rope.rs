//! Rotary settings of `config.json`: `rope_scaling` of older files, `rope_parameters` of newer.

use super::json::Json;
use super::narrow;
use crate::model_file::config::RopeScaling;
use crate::model_file::error::ModelError;

/// Base of the rotary frequencies and their scaling.
///
/// A base that no field gives is `default_theta`, the one of the model's class in transformers.
pub(super) fn read(
    json: &Json,
    context: usize,
    default_theta: f64,
) -> Result<(f32, RopeScaling), ModelError> {
    let mut theta = json.number("rope_theta")?;
    let mut scaling = RopeScaling::None;
    for field in ["rope_scaling", "rope_parameters"] {
        let Some(settings) = json.object(field)? else { continue };
        theta = settings.number("rope_theta")?.or(theta);
        let rotated = settings.number("partial_rotary_factor")?;
        if rotated.is_some_and(|factor| factor.to_bits() != 1.0_f64.to_bits()) {
            let problem = format!("`{field}` rotates a part of each head only; expected all of it");
            return Err(ModelError::unsupported(json.label(), problem));
        }
        let found = read_scaling(&settings, field, context)?;
        if found != RopeScaling::None {
            scaling = found;
        }
    }
    Ok((narrow(theta.unwrap_or(default_theta)), scaling))
}

fn read_scaling(settings: &Json, field: &str, context: usize) -> Result<RopeScaling, ModelError> {
    let kind = match settings.text("rope_type")? {
        Some(kind) => Some(kind),
        None => settings.text("type")?,
    };
    let number = |name: &str| -> Result<f32, ModelError> {
        let value = settings.number(name)?;
        value.map(narrow).ok_or_else(|| settings.missing(&format!("{field}.{name}"), "a number"))
    };
    let original = settings.optional_size("original_max_position_embeddings")?;
    match kind {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: number("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: original.ok_or_else(|| {
                let name = format!("{field}.original_max_position_embeddings");
                settings.missing(&name, "a whole number")
            })?,
        }),
        Some("yarn") => yarn(settings, field, context, original),
        Some(kind) => {
            let problem = format!(
                "`{field}` asks for rotary scaling \"{kind}\", this version supports \"default\", \
                 \"linear\", \"llama3\" and \"yarn\""
            );
            Err(ModelError::unsupported(settings.label(), problem))
        }
    }
}

/// Defaults are those of transformers' `_compute_yarn_parameters`.
fn yarn(
    settings: &Json,
    field: &str,
    context: usize,
    original: Option<usize>,
) -> Result<RopeScaling, ModelError> {
    if settings.flag("truncate")? == Some(false) {
        let problem = format!("`{field}.truncate` is false, this version supports only true");
        return Err(ModelError::unsupported(settings.label(), problem));
    }
    let original_context = original.unwrap_or(context);
    let factor = match settings.number("factor")? {
        Some(factor) => factor,
        None if original_context > 0 => ratio(context, original_context),
        None => return Err(settings.missing(&format!("{field}.factor"), "a number")),
    };
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention_factor = match settings.number("attention_factor")? {
        Some(factor) => factor,
        None => match (settings.number("mscale")?, settings.number("mscale_all_dim")?) {
            (Some(one), Some(all)) if one != 0.0 && all != 0.0 => magnitude(one) / magnitude(all),
            _ => magnitude(1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor: narrow(factor),
        beta_fast: narrow(settings.number("beta_fast")?.unwrap_or(32.0)),
        beta_slow: narrow(settings.number("beta_slow")?.unwrap_or(1.0)),
        attention_factor: narrow(attention_factor),
        original_context,
    })
}

#[expect(clippy::cast_precision_loss, reason = "contexts are far below 2^53")]
fn ratio(context: usize, original: usize) -> f64 {
    context as f64 / original as f64
}
