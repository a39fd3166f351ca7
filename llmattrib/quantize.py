"""Rows of float32 as float16 with a scale each.

The scale is a power of two, so it costs no digits: an entry is off by 2^-11 of itself or 2^-38 of the row's largest,
whichever is more, and what is read back and quantised again does not change.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

TOP_EXPONENT = 14
"""The largest entry of a row is stored in (2^13, 2^14], well inside float16, which ends at 65,504."""
ROWS_AT_ONCE = 64
"""Bounds the temporary memory."""


def quantize(
    rows: Float[np.ndarray, "m c p"], dtype: Literal["float16", "float32"]
) -> tuple[np.ndarray, Float[np.ndarray, " m"]]:
    """Return `rows / scale` in the stored dtype, and the scale of each row (1 for float32).

    The scale is the power of two that brings the largest entry of a row into (2^13, 2^14], or 1 for a row of zeros;
    it is clipped at 2^-126, so entries of rows below 1e-33 lose digits.
    """
    scale = np.ones(len(rows), np.float32)
    if dtype == "float32":
        return rows.astype("<f4", copy=False), scale
    stored = np.empty(rows.shape, "<f2")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        largest = np.maximum(part.max(axis=(1, 2)), -part.min(axis=(1, 2)))
        mantissa, exponent = np.frexp(largest)
        exponent = np.where(mantissa == 0.5, exponent - 1, exponent)  # largest in (2^(e-1), 2^e]
        exponent = np.where(largest > 0, np.maximum(exponent - TOP_EXPONENT, -126), 0)
        scale[start : start + ROWS_AT_ONCE] = np.ldexp(np.float32(1), exponent)
        stored[start : start + ROWS_AT_ONCE] = part * np.ldexp(np.float32(1), -exponent)[:, None, None]
    return stored, scale
