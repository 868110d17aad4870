"""Reads the tensors of a file that `torch.save` has written, without PyTorch and without executing its pickle.

A pickle is a program. This module interprets the few of its instructions that a dict of tensors needs, and calls
nothing: the functions that a file names become marks. Source: torch/serialization.py of PyTorch.
"""

import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # Begins files that PyTorch wrote before version 1.6.
_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = {f"{module} {name}": np.dtype(x) for module in ("torch", "torch.cuda") for name, x in _STORAGES.items()}
_DICT, _SIZE = "collections OrderedDict", "torch Size"
_TENSOR, _OLD_TENSOR = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"
_PARAMETER = "torch._utils _rebuild_parameter"
_KNOWN = {*_DTYPES, _DICT, _SIZE, _TENSOR, _OLD_TENSOR, _PARAMETER}

_BYTE_ORDER = "has the byte order of another kind of processor. Save it on this one"


class Refused(Exception):  # noqa: N818  Not an error yet: the caller names the file.
    """The file cannot be read; the message completes "got a file that ..."."""


class Global(NamedTuple):
    """The name of a function or class in a pickle, "module name"."""

    name: str


class Storage(NamedTuple):
    """A block of numbers outside the pickle."""

    key: str
    dtype: np.dtype[Any]
    size: int


class Tensor(NamedTuple):
    """A view of a storage: its first element, and the number of elements and the step along each axis."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(data: bytes) -> dict[str, np.ndarray]:
    """Returns the tensors, by name, in the content of a file of either of PyTorch's formats.

    The arrays are views of `data` that cannot be written. The file holds a dict of tensors, perhaps inside of another
    dict under "state_dict", "model_state_dict" or "model". The prefix "module." of each name, of `DataParallel`, is
    removed.

    Raises:
      Refused: the file is damaged, or holds anything except tensors, dicts, lists and scalars.
    """
    try:
        content, storages = _read_zip(data) if data[:4] == b"PK\3\4" else _read_legacy(data)
        tensors = {name: _array(tensor, storages) for name, tensor in _state_dict(content).items()}
    except Refused:
        raise
    except Exception as error:  # Damaged bytes raise a dozen types.
        raise Refused(f"is damaged ({type(error).__name__}: {error})") from error
    return tensors


def _state_dict(content: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise Refused("holds no dict of tensors. Save `model.state_dict()`")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Refused(f"holds {type(tensor).__name__} at {str(name)[:100]!r} in its dict of tensors")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def _array(tensor: Tensor, storages: Callable[[Storage], memoryview]) -> np.ndarray:
    """Returns the view, after checking that it stays inside its storage and has no more elements than that."""
    (_, dtype, size), offset, shape, strides = tensor
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise Refused(f"is damaged (a tensor of shape {shape}, strides {strides} and offset {offset})")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > size or (0 not in shape and last >= size):
        raise Refused(f"is damaged (a tensor of shape {shape} outside its {size} numbers)")
    memory, width = storages(tensor.storage), dtype.itemsize
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.ndarray(shape, dtype, memory, offset * width, tuple(step * width for step in strides))


# --- The two formats ------------------------------------------------------------------------------------------------


def _read_zip(data: bytes) -> tuple[Any, Callable[[Storage], memoryview]]:
    """Reads a zip archive of FOLDER/data.pkl and FOLDER/data/KEY for each storage, not compressed."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("is a zip archive, but not one of PyTorch")
    root = roots[0]

    def entry(name: str) -> memoryview:
        info = entries[root + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(f"is a zip archive with the compressed or encrypted entry {info.filename!r}")
        names = sum(struct.unpack_from("<HH", data, info.header_offset + 26))  # The name, and extra fields.
        start = info.header_offset + 30 + names
        content = memoryview(data)[start : start + info.file_size]
        if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
            raise Refused(f"is damaged (its entry {info.filename!r} does not match its checksum)")
        return content

    if root + "byteorder" in entries and entry("byteorder") != b"little":
        raise Refused(_BYTE_ORDER)

    def storage(wanted: Storage) -> memoryview:
        content = entry(f"data/{wanted.key}")
        if len(content) < wanted.size * wanted.dtype.itemsize:
            raise Refused(f"is damaged (the storage {wanted.key!r} has {len(content)} bytes)")
        return content

    return _load(BytesIO(entry("data.pkl")))[0], storage


def _read_legacy(data: bytes) -> tuple[Any, Callable[[Storage], memoryview]]:
    """Reads five pickles (magic number, version, machine, content, keys), then the size and numbers of each storage."""
    stream = BytesIO(data)
    try:
        known = _load(stream)[0] == _MAGIC
    except Exception:  # Any other file.
        known = False
    if not known:
        raise Refused("is neither of PyTorch nor of safetensors")
    (_, _), (machine, _), (content, storages), (keys, _) = (_load(stream) for _ in range(4))
    if not machine.get("little_endian", True):
        raise Refused(_BYTE_ORDER)
    start, places = stream.tell(), {}
    for key in keys:
        (size,) = struct.unpack_from("<q", data, start)
        end = start + 8 + size * storages[key].dtype.itemsize
        if size != storages[key].size or end > len(data):
            raise Refused(f"is damaged (the storage {key!r} has {size} numbers)")
        places[key] = memoryview(data)[start + 8 : end]
        start = end
    return content, lambda wanted: places[wanted.key]


# --- The pickle -----------------------------------------------------------------------------------------------------

_PUT, _GET = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SCALARS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
)


class _Machine:
    """The state of pickle's machine. `refused` names what a file needs and this module does not know."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.refused: set[str] = set()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack of its pickle is empty")
        items, self.stack[-count:] = self.stack[-count:], []
        return items

    def step(self, name: str, arg: Any) -> None:  # noqa: PLR0912  One branch per kind of instruction.
        """Executes an instruction."""
        push = self.stack.append
        if name in _SCALARS:
            push(arg)
        elif name in _VALUES:
            push(_VALUES[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name in _TUPLES:
            push(tuple(self.pop(_TUPLES[name])))
        elif name in _PUT:
            self.memo[arg] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in _GET:
            push(self.memo[arg])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("TUPLE", "LIST"):
            items = self.pop_to_mark()
            push(tuple(items) if name == "TUPLE" else items)
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
            self.stack[-1].extend(items)
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
            if name == "DICT":
                push({})
            self.stack[-1].update(_pairs(list(zip(items[::2], items[1::2], strict=True))))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            push(self.find(arg if name == "GLOBAL" else " ".join(self.pop(2))))
        elif name == "REDUCE":
            push(self.call(*self.pop(2)))
        elif name == "BINPERSID":
            push(self.storage(self.pop(1)[0]))
        elif name == "BUILD":
            self.pop(1)  # The attributes of an OrderedDict, such as `_metadata`.
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(self.reason(f"the instruction {name}" + (f" {arg}" if arg is not None else "")))

    def find(self, name: str) -> Global:
        """Returns the mark of a function or class."""
        if name not in _KNOWN:
            self.refused.add(name.replace(" ", "."))
        return Global(name)

    def call(self, function: Any, args: Any) -> Any:
        """Returns what a call of a known function would return."""
        name = function.name if isinstance(function, Global) else ""
        if name == _DICT:
            return _pairs(*args) if args else {}
        if name == _SIZE:
            return tuple(*args)
        if name in (_TENSOR, _OLD_TENSOR) and isinstance(args[0], Storage):
            storage, offset, shape, strides = args[:4]
            return Tensor(storage, offset, tuple(shape), tuple(strides))
        if name == _PARAMETER:
            return args[0]
        if not self.refused:
            raise Refused(self.reason(f"a call of {name.replace(' ', '.') or type(function).__name__}"))
        return None

    def storage(self, identity: Any) -> Storage | None:
        """Returns the storage of a persistent id, ("storage", type, key, device, size) and perhaps None for a view."""
        kind, dtype, key, _, size, *view = identity
        if isinstance(dtype, Global) and dtype.name not in _DTYPES:
            return None
        if kind != "storage" or type(key) is not str or type(size) is not int or size < 0 or any(view):
            raise ValueError("a storage of an unknown form")
        storage = Storage(key, _DTYPES[dtype.name], size)
        self.storages.setdefault(key, storage)
        return storage

    def reason(self, *more: str) -> str:
        """Returns the message that lists what was refused."""
        names = [ascii(name)[1:-1][:100] for name in sorted({*self.refused, *more})]
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
        return f"holds more than tensors, and needs {shown}, which is not executed. Save `model.state_dict()`"


def _pairs(items: list[Any]) -> dict[str | int, Any]:
    for key, _ in items:
        if not isinstance(key, (str, int)):  # The hash of a deeply nested tuple would overflow the stack.
            raise TypeError(f"a key of type {type(key).__name__}")
    return dict(items)


def _load(stream: BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Returns the content of the pickle at the position of a stream, and the storages that it names."""
    machine = _Machine()
    try:
        for opcode, arg, _ in pickletools.genops(stream):
            machine.step(opcode.name, arg)
        (content,) = machine.pop(1)
    except Refused:
        raise
    except Exception:
        if not machine.refused:
            raise
        content = None
    if machine.refused:
        raise Refused(machine.reason())
    return content, machine.storages
