"""Moments of a sampler, kept in a file while it samples: a killed run loses half a minute, and longer ones go on.

    values/<method>.npz      count, mean, M2, smallest, largest, and a digest of what the samples depend on

Sample k depends on the seed and k only, and is added to the moments of those before it: numbers and bytes are those of
an unbroken run, whenever the file was written. Fewer samples than are there start again: none can be taken out.
"""

import io
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from llmattrib import storage
from llmattrib.config import digest
from llmattrib.estimators.moments import Moments
from llmattrib.progress import Progress

_SECONDS = 30.0  # of sampling between two writes
_PARTS = ("mean", "m2", "low", "high")


@dataclass(frozen=True)
class KeptMoments:
    """The file of one method.

    Attributes:
        path: of the file.
        data: digests of the features and the validation set, and the seed.
    """

    path: str
    data: Mapping[str, Any]

    def start(self, identity: Mapping[str, Any], shape: tuple[int, ...], num_samples: int) -> "Accumulation":
        """Return the moments to go on from.

        Args:
            identity: what samples depend on besides `data`.
            shape: of a sample.
            num_samples: how many are wanted.
        """
        key = digest({**self.data, **identity})
        moments = self._read(key)
        if moments is None or moments.count > num_samples:
            moments = Moments.empty(shape)
        assert moments.mean.shape == shape
        return Accumulation(self.path, key, moments, num_samples)

    def _read(self, key: str) -> Moments | None:
        try:
            with np.load(io.BytesIO(storage.read_bytes(self.path))) as stored:
                if str(stored["key"]) != key:
                    return None
                return Moments(int(stored["count"]), *(stored[name] for name in _PARTS))
        except (FileNotFoundError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # not whole: as good as none
            return None


@dataclass(frozen=True)
class Accumulation:
    """Moments that have come so far.

    Attributes:
        path: of the file.
        key: digest of what samples depend on.
        moments: of the samples that are there.
        num_samples: how many are wanted.
    """

    path: str
    key: str
    moments: Moments
    num_samples: int

    @property
    def num_done(self) -> int:
        """Samples that are there: the number of the next one."""
        return self.moments.count

    @property
    def num_missing(self) -> int:
        """Samples still to be drawn."""
        return self.num_samples - self.num_done

    def finish(self, missing: Iterator[Float[np.ndarray, "..."]], progress: Progress) -> Moments:
        """Add the missing samples and return the moments of all, written as they come.

        Raises:
            DiskSpaceError, StoreError: the file cannot be written.
        """
        moments = self.moments
        while moments.count < self.num_samples:
            batch = _for_a_while(missing, moments.count, self.num_samples, progress)
            moments = Moments.of(batch, moments.mean.shape, moments)
            buffer = io.BytesIO()
            parts = dict(zip(_PARTS, moments.parts, strict=True))
            np.savez(buffer, key=np.array(self.key), count=np.array(moments.count), allow_pickle=False, **parts)
            storage.atomic_write(self.path, buffer.getvalue())
        return moments


def _for_a_while(
    pending: Iterator[Float[np.ndarray, "..."]], before: int, num_samples: int, progress: Progress
) -> Iterator[Float[np.ndarray, "..."]]:
    """Yield at least one sample, and more until it is time to write."""
    until = time.monotonic() + _SECONDS
    for done, sample in enumerate(pending, start=before + 1):
        yield sample
        progress(done, num_samples)
        if time.monotonic() >= until:
            return
