"""Whole files at a path that is local or any fsspec URL: atomic writes, listings, free space.

A write is complete or absent: locally a temporary file, fsync and rename; on an object store one put. Local paths
never pass through fsspec. The module knows nothing about what the files hold.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
import numpy as np
from jaxtyping import UInt8

from llmattrib.errors import DiskSpaceError, StoreAccessError, first_line

PARTIAL = ".partial"
"""Suffix of temporary files; a killed process may leave some, and no reader looks at them."""
ABSENT = (FileNotFoundError, NotADirectoryError)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLIENTS = ("aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google")
"""Packages behind object stores, whose errors (no credentials, no connection) are not all `OSError`."""


def local_path(path: str) -> Path | None:
    """Return `path` as a local path, or None when it is a URL of another file system."""
    if path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    return None if "://" in path else Path(path)


def remote(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path inside it.

    Raises:
        StoreAccessError: fsspec does not know the protocol, or its package is not installed.
    """
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise StoreAccessError(
            f"{path} cannot be reached: {error}",
            expected="a local path or a URL that fsspec knows",
            fix="correct the path, or install the package that fsspec names (of s3://, the extra `s3` of llmattrib)",
        ) from error
    return filesystem, inner


@contextlib.contextmanager
def named_errors(path: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn an error of a file system about `path` into one that says what to do.

    Args:
        path: local path or fsspec URL.
        but: errors that are left as they are, such as `ABSENT`.

    Raises:
        DiskSpaceError: the disk or the quota is full.
        StoreAccessError: the path cannot be read or written, or its server not be reached.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise DiskSpaceError(
                f"{path} could not be written ({reason})",
                fix="free space or raise the quota, then run the stage again: finished shards are kept",
            ) from error
        fix = "check the path, its permissions and that its disk is mounted for writing"
        if local_path(path) is None:
            fix = "check the URL, that its bucket exists, the network and the credentials in the environment"
        raise StoreAccessError(
            f"{path} could not be read or written ({reason})",
            expected="a path this user may read and write",
            fix=f"{fix}; finished shards are kept",
        ) from error


def atomic_write(path: str, data: bytes) -> None:
    """Write `data` to `path` so that a reader or a crash never sees a part of it.

    Args:
        path: local or fsspec URL; missing parent folders are made.
        data: the whole content.

    Raises:
        DiskSpaceError: the disk or the quota is full.
        StoreAccessError: the path cannot be written.
    """
    with named_errors(path):
        target = _put(path, [data])
        if target is None:
            return
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            with _open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


def write_files(files: Mapping[str, Sequence[Any]]) -> None:
    """Write files of several buffers each, in place of those that are there, and force them to disk.

    A reader that has an old file open goes on with it. Locally a crash may leave some of them, or a part of one.

    Args:
        files: their buffers, by local path or fsspec URL; missing parent folders are made.

    Raises:
        DiskSpaceError: the disk or the quota is full.
        StoreAccessError: a path cannot be written.
    """
    for path, parts in files.items():
        with named_errors(path):  # around the file: what a full disk did not take fails again when it is closed
            target = _put(path, parts)
            if target is not None:
                with _create(target) as file:
                    file.writelines(parts)
                    file.flush()
                    os.fsync(file.fileno())
                _sync_folder(target.parent)


def create_empty(path: str) -> None:
    """Make an empty file, in one step; missing parent folders are made."""
    with named_errors(path):
        target = _put(path, [])
        if target is not None:
            _open(target, "ab").close()


def _put(path: str, parts: Sequence[Any]) -> Path | None:
    """Put a file on an object store; of a local path only return it, to be written by the caller."""
    target = local_path(path)
    if target is None:
        filesystem, inner = remote(path)
        filesystem.pipe_file(inner, b"".join(parts))
    return target


def _create(target: Path) -> BinaryIO:
    try:
        return _open(target, "xb")
    except FileExistsError:
        target.unlink(missing_ok=True)
        return _open(target, "xb")


def _open(target: Path, mode: Literal["ab", "wb", "xb"]) -> BinaryIO:
    """Open a file to be written; its folder is looked for only when that fails, as it nearly always exists."""
    try:
        return target.open(mode)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open(mode)


def sync_file(path: str) -> None:
    """Force a local file and its folder entry to disk; an object store has done so when its put returned."""
    target = local_path(path)
    if target is None:
        return
    with named_errors(path):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exists(path: str) -> bool:
    """Say whether a file or folder is at `path`."""
    target = local_path(path)
    if target is not None:
        return target.exists()
    with named_errors(path):
        filesystem, inner = remote(path)
        filesystem.invalidate_cache(inner)
        return bool(filesystem.exists(inner))


def read_bytes(path: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        StoreAccessError: it cannot be read.
    """
    with named_errors(path, but=ABSENT):
        target = local_path(path)
        if target is not None:
            return target.read_bytes()
        filesystem, inner = remote(path)
        return bytes(filesystem.cat_file(inner))


class LocalBytes:
    """Bytes [start, stop) of an open file, fewer where it ends before; a slice is read when it is asked for.

    What is read a piece at a time, checked and converted stays in the processor's cache.
    """

    def __init__(self, path: str, file: FileIO, start: int, stop: int | None) -> None:
        self._path, self._file, self._start = path, file, start
        size = os.fstat(file.fileno()).st_size
        self._size = max((size if stop is None else min(stop, size)) - start, 0)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> UInt8[np.ndarray, " b"]:
        """Read a slice of step 1; shorter where the file has been cut off meanwhile."""
        first, last, _ = where.indices(self._size)
        data = np.empty(max(last - first, 0), np.uint8)
        with named_errors(self._path):
            count, more = 0, 1
            while count < len(data) and more:
                more = os.preadv(self._file.fileno(), [data[count:].data], self._start + first + count)
                count += more
        return data[:count]


@contextlib.contextmanager
def open_bytes(path: str, start: int = 0, stop: int | None = None) -> Iterator["LocalBytes | UInt8[np.ndarray, ' b']"]:
    """Give bytes [start, stop) of a file, by default all, to be sliced; an object store sends them at once.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        StoreAccessError: it cannot be read.
    """
    target = local_path(path)
    if target is None:
        with named_errors(path, but=ABSENT):
            filesystem, inner = remote(path)
            data = np.frombuffer(filesystem.cat_file(inner, start=start, end=stop), np.uint8)
        yield data
        return
    with contextlib.ExitStack() as stack:
        with named_errors(path, but=ABSENT):
            source = LocalBytes(path, stack.enter_context(FileIO(target)), start, stop)
        yield source


def fetch(paths: Sequence[str]) -> list[UInt8[np.ndarray, " b"] | None]:
    """Read whole files at once where their file system does so quicker; None for each of local ones, where it does not.

    Raises:
        FileNotFoundError, NotADirectoryError: one is missing.
        StoreAccessError: one cannot be read.
    """
    if not paths or local_path(paths[0]) is not None:
        return [None] * len(paths)
    with named_errors(paths[0], but=ABSENT):
        filesystem = remote(paths[0])[0]
        inner = [remote(path)[1] for path in paths]
        contents = filesystem.cat(inner)
        return [np.frombuffer(contents[path], np.uint8) for path in inner]


def checksum(path: str) -> str:
    """Return blake2b of a whole file; a local one is not held in memory.

    Raises:
        FileNotFoundError: there is none.
    """
    local = local_path(path)
    if local is None:
        return hashlib.blake2b(read_bytes(path), digest_size=32).hexdigest()
    with local.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def list_names(folder: str) -> list[str]:
    """Return the names in a folder, sorted, without temporary files; empty when there is no such folder.

    Raises:
        StoreAccessError: it cannot be read.
    """
    target = local_path(folder)
    try:
        with named_errors(folder, but=(FileNotFoundError,)):
            if target is not None:
                names = [entry.name for entry in os.scandir(target)]
            else:
                filesystem, inner = remote(folder)
                filesystem.invalidate_cache(inner)
                names = [item.rstrip("/").rsplit("/", 1)[-1] for item in filesystem.ls(inner, detail=False)]
    except FileNotFoundError:
        return []
    return sorted(name for name in names if not name.endswith(PARTIAL))


def remove(path: str) -> None:
    """Remove a file or a folder with all it holds; do nothing when it is absent."""
    target = local_path(path)
    with named_errors(path), contextlib.suppress(FileNotFoundError):
        if target is None:
            filesystem, inner = remote(path)
            filesystem.rm(inner, recursive=True)
        elif target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()


def remove_partial(folder: str) -> None:
    """Remove the temporary files that killed writers left in one local folder (not below it)."""
    target = local_path(folder)
    if target is None or not target.is_dir():
        return
    with named_errors(folder):
        for entry in list(os.scandir(target)):
            if entry.name.endswith(PARTIAL):
                Path(entry.path).unlink(missing_ok=True)


def check_writable(path: str) -> None:
    """Check before long work that a file can be written where `path` lies; nothing is made or changed.

    Of an object store only that its protocol is known.

    Raises:
        StoreAccessError: it cannot.
    """
    with named_errors(path):
        target = local_path(path)
        if target is None:
            remote(path)
            return
        folder = _nearest(target.parent)
        reason = 0
        if target.exists() and not target.is_file():  # a device would be replaced by the file
            reason = errno.EISDIR if target.is_dir() else errno.EEXIST
        elif not folder.is_dir():
            reason = errno.ENOTDIR
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = errno.EACCES
        if reason:
            raise OSError(reason, os.strerror(reason))


def _nearest(target: Path) -> Path:
    """Return the path, or the nearest one above it that exists."""
    place = target.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


SMALLER_ROWS = "free space, set run_dir on a larger disk, or make rows smaller (features.sketch.dim, dtype)"


def require_space(path: str, num_bytes: int, fix: str = SMALLER_ROWS) -> None:
    """Check that `num_bytes` more would fit where `path` lies; object stores are taken as endless.

    Args:
        path: local path or fsspec URL; it need not exist.
        num_bytes: what is to be written.
        fix: what the user can do.

    Raises:
        DiskSpaceError: they would not.
    """
    target = local_path(path)
    if target is None:
        return
    free = shutil.disk_usage(_nearest(target)).free
    if num_bytes > free:
        raise DiskSpaceError(
            f"{path} needs {num_bytes / 1e9:,.2f} GB more and {free / 1e9:,.2f} GB are free",
            expected="enough space for all of it before work on it begins",
            fix=fix,
        )
