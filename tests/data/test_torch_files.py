"""PyTorch's files are read without executing them. A slow test of the photo networks reads files of PyTorch."""

import copyreg
import io
import os
import pickle
import pickletools
import struct
import zipfile

import numpy as np
import pytest

from cnnjax.data.torch_files import Refused, read_torch

F32 = "torch FloatStorage"
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)


class Raw(bytes):
    """Instructions of a pickle, to be inserted as they are."""


def op(name, argument=b""):
    return Raw(next(op.code for op in pickletools.opcodes if op.name == name).encode("latin-1") + argument)


def encode(value):
    """Returns the instructions that push a value."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, tuple):
        return Raw(op("MARK") + b"".join(map(encode, value)) + op("TUPLE"))
    if isinstance(value, dict):
        items = b"".join(encode(x) for item in value.items() for x in item)
        return Raw(op("EMPTY_DICT") + op("MARK") + items + op("SETITEMS"))
    return Raw(pickle.dumps(value, 2)[2:-1])


def named(name):
    return op("GLOBAL", name.replace(" ", "\n").encode() + b"\n")


def call(name, *arguments):
    return Raw(named(name) + encode(arguments) + op("REDUCE"))


def storage(key, size, kind=F32):
    return Raw(encode(("storage", named(kind), key, "cpu", size)) + op("BINPERSID"))


def tensor(key="0", size=6, shape=(2, 3), strides=(3, 1), offset=0, kind=F32):
    hooks = call("collections OrderedDict")
    return call("torch._utils _rebuild_tensor_v2", storage(key, size, kind), offset, shape, strides, False, hooks)


def program(content):
    return b"\x80\x02" + encode(content) + b"."


def zipped(content, *, data=None, compression=zipfile.ZIP_STORED, **entries):
    """Returns a file in the format that `torch.save` writes today."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("net/data.pkl", program(content))
        archive.writestr("net/byteorder", entries.get("byteorder", "little"))
        for key, numbers in ({"0": np.arange(6, dtype=np.float32)} if data is None else data).items():
            archive.writestr(f"net/data/{key}", numbers.tobytes())
    return stream.getvalue()


def legacy(content, data=None, size=None):
    """Returns a file in the format that PyTorch wrote before version 1.6."""
    data = {"0": np.arange(6, dtype=np.float32)} if data is None else data
    parts = [MAGIC, pickle.dumps(1001, 2), program({"little_endian": True}), program(content), pickle.dumps([*data], 2)]
    for numbers in data.values():
        parts += [struct.pack("<q", numbers.size if size is None else size), numbers.tobytes()]
    return b"".join(parts)


FORMATS = pytest.mark.parametrize("write", [zipped, legacy])


@FORMATS
def test_views_of_a_shared_storage(write):
    content = {
        "whole": tensor(),
        "transposed": tensor(shape=(3, 2), strides=(1, 3)),
        "row": tensor(shape=(3,), strides=(1,), offset=3),
        "scalar": tensor(shape=(), strides=(), offset=5),
        "empty": tensor(shape=(0, 4), strides=(4, 1)),
    }
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {
        "whole": whole,
        "transposed": whole.T,
        "row": whole[1],
        "scalar": whole[1, 2],
        "empty": np.zeros((0, 4)),
    }
    tensors = read_torch(write(content))
    assert [*tensors] == [*expected]
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].dtype == np.float32 and tensors[name].shape == array.shape
    with pytest.raises(ValueError, match="read-only"):
        tensors["whole"][0] = 1


@FORMATS
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Float", "f4"), ("Double", "f8"), ("Half", "f2"), ("Long", "i8"), ("Int", "i4"), ("Byte", "u1"), ("Bool", "?")],
)
def test_dtypes(write, kind, dtype):
    numbers = np.array([0, 1, 3], dtype)
    content = {"x": tensor(size=3, shape=(3,), strides=(1,), kind=f"torch {kind}Storage")}
    got = read_torch(write(content, data={"0": numbers}))["x"]
    np.testing.assert_array_equal(got, numbers)
    assert got.dtype == numbers.dtype


def test_bfloat16_of_a_gpu():
    numbers = np.array([0x3F80, 0xC040], np.uint16)  # 1 and -3: the upper halves of float32.
    content = {"x": tensor(size=2, shape=(2,), strides=(1,), kind="torch.cuda BFloat16Storage")}
    assert read_torch(zipped(content, data={"0": numbers}))["x"].astype(np.float32).tolist() == [1, -3]


@FORMATS
def test_names_in_the_forms_of_training_programs(write):
    """A dict in a dict, `DataParallel`, `nn.Parameter`, and the attributes of an OrderedDict."""
    parameter = call("torch._utils _rebuild_parameter", tensor(), True, call("collections OrderedDict"))
    state = Raw(encode({"module.w": parameter}) + encode({"_metadata": {}}) + op("BUILD"))
    for content in ({"state_dict": state, "epoch": 3, "loss": 0.5}, {"model": state}, state):
        assert [*read_torch(write(content))] == ["w"]
    assert {*read_torch(write({"module.w": tensor(), "v": tensor()}))} == {"module.w", "v"}
    with pytest.raises(Refused, match=r"holds no dict of tensors\. Save `model\.state_dict\(\)`"):
        read_torch(write(call("collections OrderedDict", []), data={}))
    with pytest.raises(Refused, match=r"holds int at 'epoch' in its dict of tensors"):
        read_torch(write({"epoch": 3, "w": tensor()}))


# --- Files that would execute something -------------------------------------------------------------------------------

EVIL = {
    "a call": (lambda run: Raw(named("os system") + encode((run,)) + op("REDUCE")), r"needs os\.system,"),
    "STACK_GLOBAL": (
        lambda run: Raw(encode("os") + encode("system") + op("STACK_GLOBAL") + encode((run,)) + op("REDUCE")),
        r"needs os\.system,",
    ),
    "INST": (lambda run: Raw(op("MARK") + encode(run) + op("INST", b"os\nsystem\n")), r"needs .* INST os system,"),
    "OBJ": (lambda run: Raw(op("MARK") + named("os system") + encode(run) + op("OBJ")), r"os\.system, .* OBJ,"),
    "NEWOBJ": (
        lambda run: Raw(named("subprocess Popen") + encode((run,)) + op("NEWOBJ")),
        r"needs subprocess\.Popen, the instruction NEWOBJ,",
    ),
    "EXT": (lambda run: Raw(op("EXT1", b"\xf0") + encode((run,)) + op("REDUCE")), r"the instruction EXT1 240,"),
    "getattr": (
        lambda run: call("builtins getattr", call("builtins __import__", "os"), run),
        r"needs builtins\.__import__, builtins\.getattr,",
    ),
    "BUILD": (
        lambda run: Raw(named("posix environ") + encode({"CNNJAX_EVIL": run}) + op("BUILD")),
        r"needs posix\.environ,",
    ),
    "a known function with code": (
        lambda run: Raw(named("torch._utils _rebuild_tensor_v2") + encode((run,) * 6) + op("REDUCE")),
        r"needs a call of torch\._utils\._rebuild_tensor_v2,",
    ),
    "a network": (
        lambda run: {"w": tensor(), "net": named("__main__ Net"), "args": named("argparse Namespace")},
        r"needs __main__\.Net, argparse\.Namespace, which is not executed\. Save `model\.state_dict\(\)`$",
    ),
    "a name for the terminal": (lambda run: named("os \x1b[2Jsystem"), r"needs os\.\\x1b\[2Jsystem,"),
}


@FORMATS
@pytest.mark.parametrize("name", EVIL)
def test_nothing_is_executed(write, name, tmp_path, monkeypatch):
    """The same pickles do run in `pickle.loads`, if what they name exists."""
    make, message = EVIL[name]
    code = 0xF0
    if name == "EXT":
        copyreg.add_extension("os", "system", code)
    try:
        made = tmp_path / "made"
        data = write({"w": tensor(), "evil": make(f"touch {made}")})
        with pytest.raises(Refused, match=message):
            read_torch(data)
        assert not made.exists() and "CNNJAX_EVIL" not in os.environ
        if name in ("a call", "STACK_GLOBAL", "INST", "EXT"):
            pickle.loads(program(make(f"touch {made}")))  # The test can fail.
            assert made.exists()
    finally:
        if name == "EXT":
            copyreg.remove_extension("os", "system", code)


# --- Damaged files ----------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize(
    "x",
    [
        tensor(shape=(2, 4), strides=(3, 1)),
        tensor(shape=(2, 3), strides=(3, 1), offset=1),
        tensor(shape=(2, 3), strides=(-3, 1)),
        tensor(shape=(2**40, 2**40), strides=(0, 0)),
        tensor(shape=(2**70,), strides=(1,)),
        tensor(shape=(2, 3), strides=(1,)),
        tensor(shape=(1,) * 70, strides=(1,) * 70),
        tensor(size=2**50, shape=(2**50,), strides=(1,)),
        tensor(size=7, shape=(7,), strides=(1,)),
        tensor(key="../secret"),
    ],
)
def test_tensors_outside_of_their_storage(write, x):
    with pytest.raises(Refused, match="is damaged"):
        read_torch(write({"w": x}))


@FORMATS
def test_every_truncated_file_is_refused(write):
    data = write({"w": tensor()})
    for end in range(0, len(data), 7):
        with pytest.raises(Refused):
            read_torch(data[:end])


@FORMATS
def test_changed_bytes_raise_nothing_else(write):
    """Each byte of the file is changed; the file is then refused, or has other names or numbers."""
    data = write({"w": tensor()})
    for i in range(0, len(data)):
        changed = bytearray(data)
        changed[i] ^= 0x15
        try:
            read_torch(bytes(changed))
        except Refused:
            continue


def test_sizes_that_a_file_states_allocate_nothing():
    huge = struct.pack("<Q", 2**60)
    for instructions in (
        op("BINUNICODE8", huge),
        op("FRAME", huge),
        op("LONG4", struct.pack("<i", 2**31 - 1)),
        Raw(encode(1) + op("LONG_BINPUT", b"\xff\xff\xff\xff")),
        Raw(b"(" * 100_000),
    ):
        with pytest.raises(Refused):
            read_torch(zipped(instructions))
    with pytest.raises(Refused, match="is damaged"):
        read_torch(legacy({"w": tensor()}, size=2**60))


def test_zip_archives_of_another_kind():
    with pytest.raises(Refused, match=r"is a zip archive with the compressed or encrypted entry 'net/"):
        read_torch(zipped({"w": tensor()}, compression=zipfile.ZIP_DEFLATED))  # A zip bomb is compressed.
    with pytest.raises(Refused, match="has the byte order of another kind of processor"):
        read_torch(zipped({"w": tensor()}, byteorder="big"))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(Refused, match="is a zip archive, but not one of PyTorch"):
        read_torch(stream.getvalue())
    data = bytearray(zipped({"w": tensor()}))
    data[data.index(np.float32(5).tobytes())] ^= 1
    with pytest.raises(Refused, match="does not match its checksum"):
        read_torch(bytes(data))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n", b"PK\3\4", pickle.dumps({"w": 1}), b"(" * 10_000])
def test_other_files(data):
    with pytest.raises(Refused, match=r"is neither of PyTorch nor of safetensors|is damaged"):
        read_torch(data)


def test_a_deeply_nested_key_does_not_crash_the_process():
    nested = Raw(op("EMPTY_TUPLE") + op("TUPLE1") * 100_000)
    with pytest.raises(Refused, match="a key of type tuple"):
        read_torch(zipped({"w": Raw(op("EMPTY_DICT") + nested + encode(1) + op("SETITEM"))}))
