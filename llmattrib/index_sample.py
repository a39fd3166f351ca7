"""Some representers drawn at random: those that an index is trained on, and those that are kept beside it.

    index/<method>.sample.npy   all representers up to 4,096, else as many: the denominator of a share is read off them

Which rows are drawn depends on the seed and on how many there are alone. Knows nothing of faiss.
"""

import io

import numpy as np
from jaxtyping import Float, Int

from llmattrib import storage
from llmattrib.errors import CorruptShardError
from llmattrib.rng import stream
from llmattrib.store import RowStore

SAMPLE_ROWS = 4096


def draw(seed: int, name: str, num_rows: int, most: int) -> Int[np.ndarray, " m"]:
    """Return at most `most` row numbers without repeats, sorted.

    Args:
        seed: of the run.
        name: what they are for.
        num_rows: rows to draw from.
        most: all of them where they are no more.
    """
    if num_rows <= most:
        return np.arange(num_rows)
    return np.sort(stream(seed, "index", name).choice(num_rows, most, replace=False))


def gather(store: RowStore, wanted: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
    """Return some rows of a store, in one pass over it; sorted numbers, rows [c, p] flattened."""
    parts = []
    for start, rows in store.blocks():
        first, last = np.searchsorted(wanted, (start, start + len(rows)))
        parts.append(rows[wanted[first:last] - start].reshape(last - first, -1))
    return np.concatenate(parts)


def write_sample(path: str, sample: Float[np.ndarray, "m d"]) -> None:
    """Write the sample that is kept.

    Raises:
        DiskSpaceError, StoreAccessError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, sample)
    storage.atomic_write(path, buffer.getvalue())


def read_sample(path: str, num_rows: int, dim: int) -> Float[np.ndarray, "m d"]:
    """Read the sample that is kept beside an index of so many rows.

    Raises:
        CorruptShardError: it is missing, cut or of another shape.
    """
    shape = min(num_rows, SAMPLE_ROWS), dim
    try:
        sample = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    except (FileNotFoundError, EOFError, ValueError):
        sample = np.empty(0, np.float32)
    if (sample.shape, sample.dtype) != (shape, np.float32):
        raise CorruptShardError(
            f"{path} is missing or not whole",
            expected=f"{shape[0]:,} representers of {dim:,} numbers",
            fix=f"delete {path.removesuffix('.sample.npy')}.json and run `llmattrib index` again",
        )
    return np.asarray(sample)
