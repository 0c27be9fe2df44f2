//! SentencePiece's BPE: the neighbours whose union has the best score are merged first.
//!
//! Differs from BPE by a list of merges in what is compared (scores of results, not ranks of pairs)
//! and in ties, which go to the leftmost pair. The order of merges is that of SentencePiece and of
//! llama.cpp.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap},
    path::{Path, PathBuf},
};

use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Token, TokenizerImpl,
    models::bpe::{BpeTrainer, BpeTrainerBuilder},
    normalizers::{Prepend, Replace, Sequence},
};

use super::TokenizerError;

/// The tokenizer around [`Model`]: finds added tokens and writes spaces as `SPACE`.
pub(super) type Tokenizer = TokenizerImpl<
    Model,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// How the vocabulary spells a space.
pub(super) const SPACE: &str = "\u{2581}";

/// Returns the bytes that a token of a SentencePiece vocabulary stands for.
pub(super) fn decode(token: &str) -> Vec<u8> {
    byte(token).map_or_else(|| token.replace(SPACE, " ").into_bytes(), |byte| vec![byte])
}

/// Returns the byte that a token such as `<0x0A>` stands for.
fn byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let digits = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// Puts a model into a tokenizer. `prefix` says whether every text starts with a space of its own.
pub(super) fn tokenizer(
    model: Model,
    prefix: bool,
    added: &[AddedToken],
) -> Result<Tokenizer, TokenizerError> {
    let spaces = Replace::new(" ", SPACE)
        .map_err(|error| TokenizerError::Encode { reason: error.to_string() })?;
    let mut steps: Vec<NormalizerWrapper> = vec![spaces.into()];
    if prefix {
        steps.insert(0, Prepend::new(SPACE.to_owned()).into());
    }
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_normalizer(Some(Sequence::new(steps)));
    tokenizer.add_tokens(added);
    Ok(tokenizer)
}

/// The vocabulary with its scores.
pub(super) struct Model {
    ids: HashMap<String, u32>,
    tokens: Vec<String>,
    /// By id.
    scores: Vec<f32>,
    /// The id of each byte.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// Bytes of the longest token.
    longest: usize,
}

impl Model {
    /// Builds the model of ids that are dense. No scores at all means equal ones.
    pub(super) fn new(
        ids: HashMap<String, u32>,
        scores: &[f32],
        unknown: Option<u32>,
    ) -> Result<Self, TokenizerError> {
        if !scores.is_empty() && scores.len() != ids.len() {
            return Err(TokenizerError::Scores { scores: scores.len(), tokens: ids.len() });
        }
        if let Some((id, score)) = (0u32..).zip(scores).find(|(_, score)| score.is_nan()) {
            return Err(TokenizerError::Score { id, score: *score });
        }
        let mut tokens = vec![String::new(); ids.len()];
        let mut bytes = vec![None; 256];
        for (token, id) in &ids {
            token.clone_into(&mut tokens[*id as usize]);
            if let Some(byte) = byte(token) {
                bytes[usize::from(byte)] = Some(*id);
            }
        }
        let scores = if scores.is_empty() { vec![0.0; ids.len()] } else { scores.to_vec() };
        let longest = tokens.iter().map(String::len).max().unwrap_or(0);
        Ok(Self { ids, tokens, scores, bytes, unknown, longest })
    }

    /// Returns the merge of two neighbours if their union is a token.
    fn merge(&self, text: &str, pieces: &[Piece], left: usize) -> Option<Merge> {
        let right = pieces[left].next?;
        let (start, end) = (pieces[left].start, pieces[right].end);
        if end - start > self.longest {
            return None;
        }
        let id = self.ids.get(&text[start..end])?;
        // Adding zero makes the two zeros equal.
        Some(Merge { score: self.scores[*id as usize] + 0.0, left, right, end })
    }

    /// Cuts a text into pieces and merges them until no two neighbours make a token.
    fn pieces(&self, text: &str) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = text
            .char_indices()
            .enumerate()
            .map(|(at, (start, c))| Piece {
                start,
                end: start + c.len_utf8(),
                previous: at.checked_sub(1),
                next: Some(at + 1),
            })
            .collect();
        let Some(last) = pieces.last_mut() else { return pieces };
        last.next = None;
        let mut merges: BinaryHeap<Merge> =
            (0..pieces.len()).filter_map(|left| self.merge(text, &pieces, left)).collect();
        while let Some(Merge { left, right, end, .. }) = merges.pop() {
            // One of the two may have gone into another merge since.
            if pieces[left].next != Some(right) || pieces[right].end != end {
                continue;
            }
            let next = pieces[right].next;
            pieces[left].end = end;
            pieces[left].next = next;
            // Marks the right one as gone.
            pieces[right].end = pieces[right].start;
            pieces[right].next = None;
            if let Some(next) = next {
                pieces[next].previous = Some(left);
            }
            merges
                .extend(pieces[left].previous.and_then(|before| self.merge(text, &pieces, before)));
            merges.extend(self.merge(text, &pieces, left));
        }
        pieces.retain(|piece| piece.start < piece.end);
        pieces
    }
}

impl tokenizers::Model for Model {
    type Trainer = BpeTrainer;

    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let mut out: Vec<Token> = Vec::new();
        let mut unknown_before = false;
        for Piece { start, end, .. } in self.pieces(text) {
            let piece = &text[start..end];
            if let Some(id) = self.ids.get(piece) {
                unknown_before = false;
                out.push(Token::new(*id, String::new(), (start, end)));
                continue;
            }
            // Only a single character can be missing; it is spelt by its bytes.
            let bytes: Option<Vec<u32>> =
                piece.bytes().map(|byte| self.bytes[usize::from(byte)]).collect();
            if let Some(bytes) = bytes {
                unknown_before = false;
                out.extend(bytes.into_iter().map(|id| Token::new(id, String::new(), (start, end))));
            } else if let Some(unknown) = self.unknown {
                // Unknown characters in a row are one unknown token.
                if !unknown_before {
                    out.push(Token::new(unknown, String::new(), (start, end)));
                }
                unknown_before = true;
            } else {
                return Err(format!("the vocabulary has no token for `{piece}`").into());
            }
        }
        Ok(out)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokens.get(id as usize).cloned()
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.ids.clone()
    }

    fn get_vocab_size(&self) -> usize {
        self.ids.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a vocabulary of scores has no file of its own".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainerBuilder::new().build()
    }
}

/// A part of the text, linked to its neighbours.
struct Piece {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// A merge that was possible when it was found.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Where the right one ended.
    end: usize,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Merge {}

#[cfg(test)]
mod tests;
