"""Rows of float32 as int8 or float16 with a scale each.

What is read back and quantised again does not change.

    int8      the scale is the largest entry over 127, rounded up to 17 bits: an entry is off by half a scale, which is
              the row's largest over 254; codes times scales are exact in float32
    float16   the scale is a power of two, so it costs no digits: an entry is off by 2^-11 of itself or 2^-38 of the
              row's largest, whichever is more
"""

import sys
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

StoredType = Literal["int8", "float16", "float32"]
TOP_CODE = 127
NO_CODE = -128
"""What an int8 array holds where nothing was written; no row has it."""
TOP_EXPONENT = 14
"""The largest float16 of a row is in (2^13, 2^14], well inside what ends at 65,504."""
ROWS_AT_ONCE = 64
"""Bounds the temporary memory."""
_SMALLEST = np.float32(2.0**-126)
_LARGEST = np.float32(66052 * 2.0**105)
"""The largest float32 of 17 bits whose 127-fold is no infinity."""


def quantize(rows: Float[np.ndarray, "m c p"], dtype: StoredType) -> tuple[np.ndarray, Float[np.ndarray, " m"]]:
    """Return `rows / scale` in the stored dtype, and the scale of each row: NaN where the row is not finite.

    The scale of float32, and of a row of zeros, is 1. Scales end at 2^-126, so rows below 1e-33 lose digits.
    """
    scale = np.ones(len(rows), np.float32)
    wanted = np.dtype(dtype).newbyteorder("<")
    stored = rows.astype(wanted, copy=False) if dtype == "float32" else np.empty(rows.shape, wanted)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part, place = rows[start : start + ROWS_AT_ONCE], slice(start, start + ROWS_AT_ONCE)
        largest = np.maximum(part.max(axis=(1, 2)), -part.min(axis=(1, 2)))
        finite = np.isfinite(largest)
        if not finite.all():
            scale[place] = np.where(finite, scale[place], np.nan)
        elif dtype == "float16":
            exponent = _exponents(largest)
            scale[place] = np.ldexp(np.float32(1), exponent)
            _copy(part * np.ldexp(np.float32(1), -exponent)[:, None, None], stored[place])
        elif dtype == "int8":
            scale[place] = _scales(largest)
            np.rint(part / scale[place, None, None], out=stored[place], casting="unsafe")
    return stored, scale


def dequantize(stored: np.ndarray, scale: Float[np.ndarray, "m 1 1"] | None, out: Float[np.ndarray, "m c p"]) -> None:
    """Write `stored * scale`, or what was stored where there is no scale, into `out`."""
    _copy(stored, out)
    if scale is None:
        return
    torch = _torch(out, scale)
    if torch is None:
        out *= scale
    else:
        torch.from_numpy(out).mul_(torch.from_numpy(scale))


def _torch(*arrays: np.ndarray) -> Any:
    """Return torch where this process has loaded it and it can work on the arrays.

    Between float16 and float32 numpy takes ten to twenty times as long as torch on many CPUs. Both round to nearest,
    ties to even, so the bytes are the same. Loading torch for it would cost more than it saves.
    """
    fits = all(array.dtype.isnative and array.flags.writeable for array in arrays)
    return sys.modules.get("torch") if fits else None


def _copy(values: np.ndarray, out: np.ndarray) -> None:
    """Copy, with a change of dtype by torch."""
    torch = _torch(values, out) if values.dtype != out.dtype else None
    if torch is None:
        out[...] = values
    else:
        torch.from_numpy(out).copy_(torch.from_numpy(values))


def _exponents(largest: Float[np.ndarray, " m"]) -> np.ndarray:
    mantissa, exponent = np.frexp(largest)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)  # largest in (2^(e-1), 2^e]
    return np.where(largest > 0, np.maximum(exponent - TOP_EXPONENT, -126), 0)


def _scales(largest: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    bits = (largest / np.float32(TOP_CODE)).view(np.uint32)
    rounded = (bits + np.uint32(127) & np.uint32(0xFFFFFF80)).view(np.float32)
    return np.where(largest > 0, rounded.clip(_SMALLEST, _LARGEST), np.float32(1))
