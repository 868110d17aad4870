"""Reads the communication between devices from the text of a compiled program (HLO); and an H100 to compile for.

It imports the standard library only.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# An H100 SXM for `jax.experimental.topologies.get_topology_desc(target_config=H100)`, which needs no device. Source:
# NVIDIA's "H100 Tensor Core GPU Architecture" (2022).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
# The name, the type of the result, the operation, and the rest. In a quotation mark an operation cannot begin.
_INSTRUCTION = re.compile(
    rf'(?m)^\s*(?:ROOT )?%?(\S+) = ([^"\n]*?) ((?:ragged-)?(?:{"|".join(KINDS)}))(-start|-done)?\((.*)$'
)
# Any instruction: the name, the type of the result, which may be a tuple of tuples, the operation, the operands.
_ANY = re.compile(r"(?m)^\s+(?:ROOT )?%?(\S+) = ([^\"\n]*?) ([a-z][\w-]*)\((.*)$")
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id")  # They move no data.
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")
_SMALL = {"pred": 1.0, "token": 0.0, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5}  # Bytes per element.


class Shape(NamedTuple):
    """An array, on one device.

    Attributes:
      dtype: as in HLO, such as f32, bf16 or pred.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size, without padding."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # f8e4m3fn has 8, c64 has 64.
        size = _SMALL.get(self.dtype, int(bits[1]) / 8 if bits else 0)
        return math.ceil(size * math.prod(self.shape))


class Collective(NamedTuple):
    """An operation in which devices communicate.

    Attributes:
      kind: one of `KINDS`, or "ragged-all-to-all".
      results: the arrays that it returns on each device. XLA combines several operations into one.
      group_size: the number of devices that communicate with each other; None if the text does not say so, as for
        "collective-permute", and for groups of all devices in their shortest form.
      op_name: the JAX operation, such as "jit(_step)/transpose(jvp(ResNet50))/dot_general"; "" if it is unknown.
    """

    kind: str
    results: tuple[Shape, ...]
    group_size: int | None
    op_name: str

    @property
    def num_bytes(self) -> int:
        """The size of the results on one device."""
        return sum(result.num_bytes for result in self.results)


def collectives(text: str) -> list[Collective]:
    """Returns the collective operations of a program, in the order of the text.

    An asynchronous operation (`all-reduce-start`, `all-reduce-done`) counts once. An operation in a loop is returned
    once, not once per iteration.

    Args:
      text: of `compiled.as_text()`. A program before compilation has no collectives yet.
    """
    started, found = {}, []
    for name, type_, kind, phase, rest in _INSTRUCTION.findall(text):
        if phase == "-start":  # Its type has the operands, too.
            started[name] = rest
            continue
        # The operand of a done is its start: `%name)`, or `(types) %name)`.
        operand = re.search(r"%?([^\s%()]+)\)(?:,|\s*$)", rest) if phase else None
        attributes = started.get(operand[1], "") if operand else rest
        op_name = re.search(r'op_name="([^"]*)"', attributes)
        found.append(Collective(kind, _shapes(type_), _group_size(attributes), op_name[1] if op_name else ""))
    return found


def schedule(text: str) -> list[tuple[Collective, int]]:
    """Returns the collective operations of the main computation in the order of execution.

    With each comes the number of bytes that kernels read and write while it runs, between its start and its done: 0 if
    it is synchronous. Every operand and result of a kernel counts once, as a whole.

    Args:
      text: of `compiled.as_text()`, for a GPU. It is scheduled: instructions are in the order of execution.
    """
    if "is_scheduled=true" not in text:
        raise ValueError("`text` must be a scheduled program, got one without is_scheduled=true.")
    moved, started, found = 0, {}, []
    for it in instructions(text[text.index("\nENTRY ") :]):
        if it.operation.removesuffix("-start").removesuffix("-done") in KINDS:
            if it.operation.endswith("-start"):
                started[it.name] = it.line, moved
                continue
            first, before = started[it.operands[0]] if it.operation.endswith("-done") else (it.line, moved)
            (collective,) = collectives(f"{first}\n{it.line}" if first != it.line else it.line)
            found.append((collective, moved - before))
        elif it.operation not in FREE:
            moved += it.written + sum(it.read)
    return found


class Instruction(NamedTuple):
    """An instruction of a program.

    Attributes:
      operation: as in HLO, such as fusion or custom-call.
      operands: names of other instructions.
      read: bytes of each operand, as a whole; 0 if the text does not have it.
      written: bytes of the result.
      line: of the text.
    """

    name: str
    operation: str
    operands: list[str]
    read: list[int]
    written: int
    line: str


def instructions(text: str) -> Iterator[Instruction]:
    """Yields the instructions of a computation."""
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        for name, type_, operation, rest in _ANY.findall(line):
            operands = re.findall(r"%([^\s,()]+)", rest.split("), ", maxsplit=1)[0])
            sizes[name] = sum(shape.num_bytes for shape in _shapes(type_))
            yield Instruction(name, operation, operands, [sizes.get(x, 0) for x in operands], sizes[name], line)


def _shapes(type_: str) -> tuple[Shape, ...]:
    """Returns the arrays of a type such as `(f32[8,3]{1,0}, /*index=1*/pred[])`."""
    return tuple(
        Shape(dtype, tuple(int(size.strip(" <=")) for size in sizes.split(",") if size.strip()))
        for dtype, sizes in _ARRAY.findall(type_)
    )


def _group_size(attributes: str) -> int | None:
    """Returns the size of the groups in each of the three forms that XLA prints."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):  # {{0,1},{2,3}}
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):  # [4,2]<=[8], [4,2]<=[2,4]T(1,0)
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        # mesh['data'=4,'model'=2] {'data'}; 'data':(2)2 is a part of an axis, of 2 devices.
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return None
