"""One safetensors file: written beside its place and renamed into it, checked and mapped when read.

The header is the format's, with digests of all bytes in its metadata. The format's own library is
not used: what it writes is in memory twice (0.7) or has a name of the library's own meanwhile
(0.8), is nowhere flushed to the disk, and cannot be looked at on its way, where digests cost least.
https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fusedstep import _core

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

# The format's names of dtypes, and NumPy's, or ml_dtypes' and torch's.
CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
DTYPES = {code: name for name, code in CODES.items()}
_SIZES = {"BOOL": 1, "BF16": 2} | {
    code: int(re.findall(r"\d+", code)[0]) // 8 for code in DTYPES if code not in ("BOOL", "BF16")
}

_PIECE = 1 << 22  # bytes that have a digest of their own: small enough to be written from a cache
_SEPARATORS = (os.sep, *filter(None, [os.altsep]))
_PAGE = 4096  # which the data begins at a multiple of
_MOST = 100_000_000  # bytes of a header, of the format's library

# Bytes 8 and on of every file; then come 16 digits, the digest of all before the data with zeros in
# their place.
_MARK = b'{"__metadata__":{"fusedstep.digest":"'
_BLANK = b"0" * 16


class Tensor(NamedTuple):
    """An array in a file: its dtype and shape, and its bytes."""

    code: str  # of CODES
    shape: tuple[int, ...]
    # Of any layout when written, or a function that returns it; its bytes in a row when read.
    values: Any

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return _SIZES[self.code] * prod(self.shape)


class Contents(NamedTuple):
    """What a file holds."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def check_name(label: str, name: str) -> None:
    """ValueError for a name that could be taken for a way out of a folder, or cannot be printed."""
    parts = re.split(r"[/\\]", name)
    if ".." in parts or "" in (name, parts[0]) or re.match(r"[A-Za-z]:[/\\]", name):
        raise ValueError(f"{label} must not be a path's, got {name!r}")
    if not name.isprintable():
        raise ValueError(f"{label} must be printable, got {name!r}")
    if name == "__metadata__":
        raise ValueError(f"{label} must not be the format's own, got {name!r}")


# -- writing ---------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Writes a file so that at every moment the old one or the new one is there, whole.

    Raises:
        OSError: as the system says; the old file is as it was, unless the folder alone could not
            be flushed.
    """
    path = os.fsdecode(path)
    # Larger elements first, so that each lies at a multiple of its size.
    tensors = dict(sorted(contents.tensors.items(), key=lambda item: -_SIZES[item[1].code]))
    total = sum(tensor.nbytes for tensor in tensors.values())
    digests = [0] * -(-total // _PIECE)
    # Each piece is copied and digested while the one before is written, both from the copies: who
    # writes to an array meanwhile cannot change it between its digest and the disk.
    copies = [memoryview(bytearray(min(total, _PIECE))) for _ in range(2)]
    with _replacing(path) as file:
        file.write(_header(contents.metadata, tensors, digests))
        before = memoryview(b"")
        for i, piece in enumerate(_pieces(tensors.values())):
            copy = copies[i % 2][: len(piece)]
            digest = _core.Digesting(piece, copy)
            file.write(before)
            digests[i], before = digest.result(), copy
        file.write(before)
        file.seek(0)
        file.write(_header(contents.metadata, tensors, digests))


def _header(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], digests: list[int]
) -> bytes:
    """All before the data. Its length is the same whatever the digests are."""
    known = {"fusedstep.pieces": "".join(f"{one:016x}" for one in digests), **metadata}
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": tensor.code,
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = _json(known)[1:] + (b"," + _json(entries)[1:] if entries else b"}")
    text = _MARK + _BLANK + b'",' + text
    n = len(text) + -(8 + len(text)) % _PAGE
    if n > _MOST:
        raise ValueError(
            f"named must have names of at most {_MOST} bytes with all that the header says of"
            f" them, got {n}"
        )
    blank = struct.pack("<Q", n) + text.ljust(n)
    at = 8 + len(_MARK)
    return blank[:at] + b"%016x" % _core.digests(blank, len(blank))[0] + blank[at + 16 :]


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"named must have text that UTF-8 has: {error}") from None


def _pieces(tensors: Any) -> Iterator[Any]:
    """The bytes of all tensors, in a row, in pieces of which only the last may be shorter.

    A piece is a tensor's own memory where it lies in one tensor.
    """
    kept = bytearray()
    for tensor in tensors:
        for part in _parts(tensor.values):
            at = 0
            while at < len(part):
                if not kept and len(part) - at >= _PIECE:
                    yield part[at : at + _PIECE]
                    at += _PIECE
                    continue
                taken = part[at : at + _PIECE - len(kept)]
                kept += taken
                at += len(taken)
                if len(kept) == _PIECE:
                    yield kept
                    kept = bytearray()
    if kept:
        yield kept


def _parts(values: Any) -> Iterator[memoryview]:
    """The bytes of an array in C order, a part at a time where they do not lie in a row."""
    if callable(values):  # which brings them from a GPU
        values = values()
    if values.flags.c_contiguous:
        yield values.reshape(-1).view(np.uint8).data
        return
    plain = values.view(f"u{values.itemsize}")  # as bfloat16 is unknown to nditer
    parts = np.nditer(  # type: ignore[call-overload]  # NumPy's stubs do not know "contig"
        plain,
        ["external_loop", "buffered"],
        [["readonly", "contig"]],
        order="C",
        buffersize=_PIECE // values.itemsize,
    )
    for part in parts:
        yield np.asarray(part).view(np.uint8).data


class _File:
    """A file that is written from begin to end, all of each piece."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def write(self, data: Any) -> None:
        left = memoryview(data)
        while left:  # the system takes at most 2 GiB at once, and may take less
            left = left[os.write(self.descriptor, left) :]

    def seek(self, at: int) -> None:
        os.lseek(self.descriptor, at, os.SEEK_SET)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[_File]:
    """A new file, which takes the place of `path` once it is whole and on the disk."""
    target = os.path.realpath(path)  # a link stays one
    folder, name = os.path.split(target)
    try:
        before = os.stat(target)
    except FileNotFoundError:
        before = None
    if (before and not stat.S_ISREG(before.st_mode)) or path.endswith(_SEPARATORS):
        raise ValueError(f"path must be a file's, got {path!r}")
    head = f".{os.fsencode(name)[:64].decode(errors='ignore')}."
    _remove_left(folder, head)
    try:
        partial, descriptor = _created(folder, head)
    except OSError as error:
        error.filename = path
        raise
    try:
        try:
            if before:
                os.chmod(partial, stat.S_IMODE(before.st_mode))
            yield _File(descriptor)
            _flush(descriptor)
            if fcntl:  # renamed before it is closed, which unlocks it
                os.replace(partial, target)
        finally:
            os.close(descriptor)
        if not fcntl:
            os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise
    _flush_folder(folder)


def _created(folder: str, head: str) -> tuple[str, int]:
    """A new file of a name of its own, locked for as long as it is open."""
    while True:
        partial = os.path.join(folder, f"{head}{os.urandom(4).hex()}.partial")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(partial, flags, 0o666)
        try:
            if not fcntl or _locks(partial, descriptor):
                return partial, descriptor
        except BaseException:
            os.close(descriptor)
            os.unlink(partial)
            raise
        os.close(descriptor)


def _locks(partial: str, descriptor: int) -> bool:
    """Locks a new file, unless another save has just found it unlocked, and removes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, as some that are remote
        return True
    try:
        return os.path.samestat(os.stat(partial), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_left(folder: str, head: str) -> None:
    """Removes what saves that were killed have left: files that nobody holds a lock on."""
    try:
        names = os.listdir(folder or ".")
    except PermissionError:  # a folder that may be written to, and not be read
        return
    for name in names:
        if not (name.startswith(head) and re.fullmatch(r"[0-9a-f]{8}\.partial", name[len(head) :])):
            continue
        partial = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # in use, or another's, or gone
            if fcntl:
                descriptor = os.open(partial, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(partial)
                finally:
                    os.close(descriptor)
            else:
                os.unlink(partial)


def _flush(descriptor: int) -> None:
    """Waits until the file is on the disk; on macOS also until the disk has written it."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):  # a file system that has no such call
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def _flush_folder(folder: str) -> None:
    """Waits until the folder has the new name; where a folder can be opened, so not on Windows."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


# -- reading ---------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Contents:
    """Maps a file that `write` made, all of it checked.

    Raises:
        OSError: the file cannot be opened or mapped.
        MemoryError: the system does not grant its size.
        ValueError: it is no such file, or is not as it was written; the message has what is wrong.
    """
    path = os.fsdecode(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"path must be a file's, got {path!r}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8 + len(_MARK))
        n = struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
        if head[8:] != _MARK:
            _refuse_foreign(path, head, size)
        if not len(_MARK) + len(_BLANK) < n <= min(_MOST, size - 8):
            refuse(path, f"its header claims {n} bytes, where {size - 8} follow")
        blank = head + _BLANK
        digest = file.read(len(_BLANK))
        header = blank + file.read(8 + n - len(blank))
        if digest != b"%016x" % _core.digests(header, len(header))[0]:
            refuse(path, "its header is not as it was written")
        metadata, tensors, total = _entries(path, header[8:])
        if size != 8 + n + total:
            refuse(path, f"it has {size} bytes, where its header speaks of {8 + n + total}")
        data = _mapped(file.fileno(), size)[8 + n :]
    saved = metadata.pop("fusedstep.pieces", "")
    found = "".join(f"{one:016x}" for one in _core.digests(data, _PIECE))
    if len(saved) != len(found):
        refuse(path, f"it has {len(saved) // 16} digests of its data, not {len(found) // 16}")
    if saved != found:
        bad = [i for i in range(len(found) // 16) if saved[16 * i :][:16] != found[16 * i :][:16]]
        touched = [
            name
            for name, (begin, end, _) in tensors.items()
            if any(begin < (i + 1) * _PIECE and i * _PIECE < end for i in bad)
        ]
        refuse(path, f"the bytes of {touched[:8]} are not those that were written")
    return Contents(
        metadata,
        {name: one._replace(values=data[at:end]) for name, (at, end, one) in tensors.items()},
    )


def _mapped(descriptor: int, size: int) -> np.ndarray[Any, Any]:
    """A file's bytes, whose pages are copied when they are written to."""
    try:
        pages = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    except OSError:  # larger than what the system would grant to be written
        try:
            pages = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise MemoryError(f"path takes {size} bytes, more than the system grants") from None
    if hasattr(pages, "madvise") and hasattr(mmap, "MADV_WILLNEED"):
        pages.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(pages, np.uint8)


def shown(value: Any) -> str:
    """What a value is, in an error's text, which may not be as long as a file."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(path: str, why: str) -> NoReturn:
    raise ValueError(f"path must be of a whole file of fusedstep.save, got {path!r}: {why}")


def _refuse_foreign(path: str, head: bytes, size: int) -> NoReturn:
    kinds = {
        b"PK\x03\x04": "it is a zip file, as torch.save and numpy.savez write",
        b"\x93NUMPY": "it is a file of numpy.save",
        b"\x80": "it is a pickle",
        b"\x89HDF": "it is an HDF5 file",
    }
    why = f"it begins with {head[:16]!r}"
    for begin, kind in kinds.items():
        if head.startswith(begin):
            why = kind
    if head[8:9] == b"{":
        why = "it is a safetensors file of another program, or its first bytes were changed"
    if size < 8 + len(_MARK):
        why = f"it has {size} bytes"
    refuse(path, why)


def parsed(path: str, text: str | bytes) -> Any:
    """JSON from a file, in which no name occurs twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            for name, _ in pairs:
                if found.pop(name, path) is path:  # which was there before it
                    refuse(path, f"its header has the name {shown(name)} twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 4300:  # Python's own limit, where it has one: longer ones take long
            refuse(path, f"its header has a number of {len(digits)} digits")
        return int(digits)

    def constant(word: str) -> NoReturn:
        refuse(path, f"its header has {word}, which is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_int=integer, parse_constant=constant)
    except RecursionError:
        refuse(path, "its header is nested too deeply")
    except UnicodeDecodeError as error:
        refuse(path, f"its header is no text: {error}")
    except json.JSONDecodeError as error:
        refuse(path, f"its header is no JSON: {error}")


def _entries(
    path: str, text: bytes
) -> tuple[dict[str, str], dict[str, tuple[int, int, Tensor]], int]:
    """The metadata and the tensors, each with its place, of a header; and all their bytes."""

    entries = parsed(path, text)
    metadata = entries.pop("__metadata__")
    for name, value in metadata.items():
        if not isinstance(value, str):
            refuse(path, f"its metadata[{shown(name)}] is {shown(value)}, no text")
    tensors: dict[str, tuple[int, int, Tensor]] = {}
    total = 0
    for name, entry in entries.items():
        try:
            check_name("a name", name)
        except ValueError as error:
            refuse(path, str(error))
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            refuse(path, f"its entry {shown(name)} has not dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            refuse(path, f"its entry {shown(name)} has the dtype {shown(code)}")
        if not _are_sizes(shape) or _SIZES[code] * prod(map(max, shape, [1] * len(shape))) >> 62:
            refuse(path, f"its entry {shown(name)} has the shape {shown(shape)}")
        tensor = Tensor(code, tuple(shape), np.empty(0, np.uint8))
        begin, total = total, total + tensor.nbytes
        if offsets != [begin, total] or any(type(one) is not int for one in offsets):
            place = [begin, total]
            refuse(path, f"its entry {shown(name)} lies at {place}, not at {shown(offsets)}")
        tensors[name] = (begin, total, tensor)
    return metadata, tensors, total


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of integers >= 0, as many as an array can have dimensions."""
    few = isinstance(value, list) and len(value) <= 64
    return few and all(type(one) is int and one >= 0 for one in value)
