"""Every error a user can meet, in one tree.

    LlmattribError
    ├── ConfigError                 a config file, key, value or override that cannot be used
    ├── DataError
    │   ├── EmptyDatasetError       no file, or no rows
    │   ├── MissingFieldError       a row without a needed field (file and line number)
    │   ├── OverlongExampleError    examples longer than the context
    │   └── LabelWordError          a label word that is not one token, or a completion that is no label word
    ├── ModelError
    │   ├── ModelNotFoundError      base model or adapter cannot be found or loaded
    │   ├── AdapterMismatchError    the adapter does not fit the base model, or not its own config
    │   ├── UnsupportedAdapterError not a plain LoRA adapter (DoRA, prompt tuning, ...)
    │   └── TokenizerMismatchError  tokenizer and model disagree
    ├── FeatureError
    │   ├── SketchError             a sketch that does not fit the model or the memory
    │   ├── CurvatureError          a curvature that does not fit the memory, or is not the one of the features
    │   ├── NonFiniteGradientError  NaN or inf in the gradient of a named example
    │   └── DeviceMemoryError       the accelerator, or the machine, ran out of memory
    ├── StoreError
    │   ├── StoreNotFoundError      a stage was asked for before the one it needs
    │   ├── FingerprintMismatchError the store was made with other settings
    │   ├── IncompleteStoreError    shards are missing
    │   ├── CorruptShardError       a shard fails its checksum
    │   ├── StoreLockedError        another process builds this store now
    │   ├── StoreAccessError        a path that cannot be read or written, or a server that cannot be reached
    │   └── DiskSpaceError          the store would not fit on the disk
    ├── MethodError                 a method that is unknown or cannot run on these features
    ├── StaleIndexError             an index or representers older than what they were made from
    ├── SlurmError                  Slurm is missing, refuses a job, or a job failed
    └── StoppedError                a signal asked the stage to stop, and it did after a whole shard

An error says what was found, what was expected and what to do. The command line prints it and exits with code 2, or
75 when it was stopped and the same command goes on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
"""What PyTorch says of a full CPU, and of a GPU on which a library or the driver finds no memory."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or the name of its error when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class LlmattribError(Exception):
    """Base of all errors raised on purpose.

    Args:
        found: what was found, one sentence, naming the file, key or example.
        expected: what was expected instead.
        fix: what the user can do about it.
    """

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found]
        if expected:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"to fix: {fix}")
        super().__init__("\n  ".join(parts))


class ConfigError(LlmattribError):
    """A config file, key, value or override cannot be used."""


class DataError(LlmattribError):
    """The data set cannot be used."""


class EmptyDatasetError(DataError):
    """There is no such file, or it has no rows."""


class MissingFieldError(DataError):
    """A row lacks a field the config names."""


class OverlongExampleError(DataError):
    """Examples are longer than the context and the policy is to stop."""


class LabelWordError(DataError):
    """A label word is not one token, or a completion is not a label word."""


class ModelError(LlmattribError):
    """The model cannot be used."""


class ModelNotFoundError(ModelError):
    """The base model or an adapter cannot be found or loaded."""


class AdapterMismatchError(ModelError):
    """The adapter was made for another base model, or does not fit it, or not its own config."""


class UnsupportedAdapterError(ModelError):
    """The adapter is not plain LoRA."""


class TokenizerMismatchError(ModelError):
    """The tokenizer does not belong to the model."""


class FeatureError(LlmattribError):
    """Features cannot be computed."""


class SketchError(FeatureError):
    """The sketch does not fit the model or the memory."""


class CurvatureError(FeatureError):
    """The curvature does not fit the memory, or the file is not the one that the features were whitened with."""


class NonFiniteGradientError(FeatureError):
    """An example has a NaN or infinite gradient."""


class DeviceMemoryError(FeatureError):
    """The accelerator, or the machine, ran out of memory."""


class StoreError(LlmattribError):
    """A store cannot be used."""


class StoreNotFoundError(StoreError):
    """The store does not exist yet."""


class FingerprintMismatchError(StoreError):
    """The store was made with other settings.

    Args:
        path: the store.
        differing: key -> (value in the store, value now).
        expected: what has to be as it was.
        fix: what the user can do about it.
    """

    def __init__(
        self,
        path: str,
        differing: Mapping[str, tuple[object, object]],
        *,
        expected: str = "the same model, adapter, data, output function, linearisation point, sketch and dtype",
        fix: str = "restore those settings, or name another run_dir, or delete the store to compute it again",
    ) -> None:
        self.differing = dict(differing)
        rows = "; ".join(f"{key}: stored {old!r}, now {new!r}" for key, (old, new) in self.differing.items())
        super().__init__(f"{path} was made with other settings ({rows})", expected=expected, fix=fix)


class IncompleteStoreError(StoreError):
    """Shards are missing."""


class CorruptShardError(StoreError):
    """A shard fails its checksum."""


class StoreLockedError(StoreError):
    """Another process is writing this store."""


class StoreAccessError(StoreError):
    """A path cannot be read or written, or its server not be reached; what it holds is unknown, not broken."""


class DiskSpaceError(StoreError):
    """The store would not fit on the disk."""


class MethodError(LlmattribError):
    """A method is unknown or cannot run on these features."""


class StaleIndexError(LlmattribError):
    """An index or representers are older than what they were made from."""


class SlurmError(LlmattribError):
    """Slurm is missing, refuses a job, or a job failed."""


class StoppedError(LlmattribError):
    """A signal asked the stage to stop; what is finished is kept, and the same command goes on."""


@contextmanager
def memory_errors(what: str, *, expected: str, fix: str) -> Iterator[None]:
    """Turn what a device cannot do, as a memory that is full has PyTorch say it, into an error that says what to do.

    Args:
        what: what does not fit, e.g. "a batch of 8 examples".
        expected: what there should be room for.
        fix: what the user can do about it.

    Raises:
        DeviceMemoryError: the memory is full.
        ConfigError: the GPU has no way of an operation that gives the same bytes each time.
    """
    try:
        yield
    except RuntimeError as error:  # known by its name: this module does not import torch
        operation, _, rest = str(error).partition(" does not have a deterministic implementation")
        if rest:
            raise ConfigError(
                f"{operation} has no way on this GPU that gives the same bytes each time",
                expected="a model without it, or model.deterministic=false",
                fix="set model.deterministic=false: two runs then differ by rounding",
            ) from error
        if type(error).__name__ != "OutOfMemoryError" and not any(words in str(error) for words in _FULL):
            raise
        raise DeviceMemoryError(
            f"{what} does not fit in the memory of the device", expected=expected, fix=fix
        ) from error
