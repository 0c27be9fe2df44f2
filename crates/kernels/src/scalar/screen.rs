//! Products with a screen.

use crate::{
    ColumnsMut, DenseMatrix, Screen, ScreenPart, ScreenQuery,
    screen::{BLOCK, unpack},
};

pub(crate) fn estimate(screen: &Screen, query: &ScreenQuery, mut out: ColumnsMut<'_>) {
    for (index, row) in out.columns().enumerate() {
        for token in 0..query.tokens() {
            let factors = query.factors(token);
            let (mut high, mut low) = (0, 0);
            for (at, block) in screen.blocks(row).iter().enumerate() {
                let codes = unpack(block);
                high += dot(&codes, &factors.high[at]);
                low += dot(&codes, &factors.low[at]);
            }
            out.row_mut(token)[index] = query.estimate(token, screen.scale(row), high, low);
        }
    }
}

pub(crate) fn fill(w: &DenseMatrix, part: ScreenPart<'_>) {
    part.fill(w.cols(), |row, out| super::dense::row(w.kind(), w.row_bytes(row), out));
}

fn dot(codes: &[u8; BLOCK], factors: &[u8; BLOCK]) -> i32 {
    let products =
        codes.iter().zip(factors).map(|(code, x)| i32::from(*code) * i32::from(x.cast_signed()));
    products.sum()
}
