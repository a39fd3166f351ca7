"""Named random streams: the same numbers on every device, world size and order of use.

A stream is keyed by a hash of the seed and a path of names, so drawing from one never shifts another.
Numbers are drawn on the CPU by NumPy's Philox generator and moved afterwards.
"""

import hashlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the generator of the stream `names` under `seed`.

    Args:
        seed: the run's seed.
        names: what the numbers are for, from general to particular, e.g. `("sketch", module, "B")`.

    Returns:
        A NumPy generator that is a pure function of the arguments.

    Example:
        >>> int(stream(0, "a").integers(1000)) == int(stream(0, "a").integers(1000))
        True
    """
    path = "\x1f".join([str(int(seed)), *map(str, names)])
    key = hashlib.blake2b(path.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
