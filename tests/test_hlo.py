"""The reader of collectives: a compiled program on simulated devices, and lines as XLA prints them for GPU and TPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "experiments" / "benchmarks"
# A layer, with data parallelism and then with sharded parameters, on eight devices.
PROGRAM = """
import json
from functools import partial
import hlo, jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

data = Mesh(jax.devices(), ("data",), axis_types=(AxisType.Auto,))
whole, shard = NamedSharding(data, P()), NamedSharding(data, P("data"))

def grads(params, x):
    return jax.grad(lambda params: (jnp.tanh(x @ params[0]) @ params[1]).sum())(params)

def by_hand(x):
    scattered = lax.psum_scatter(x, "data", tiled=True)
    return lax.ppermute(x, "data", [(0, 1)]), lax.all_gather(x, "data", tiled=True), scattered

def rows(f, *args, **options):
    text = jax.jit(f, **options).lower(*args).compile().as_text()
    return sorted((c.kind, [(*r.shape, r.dtype) for r in c.results], c.group_size) for c in hlo.collectives(text))

params, x = (jnp.ones((24, 40)), jnp.ones((40, 16))), jnp.ones((64, 24))
mapped = jax.shard_map(by_hand, mesh=data, in_specs=P("data"), out_specs=(P("data"), P(), P("data")), check_vma=False)
print(json.dumps({
    "data": rows(grads, params, x, in_shardings=(whole, shard), out_shardings=whole),
    "one": rows(grads, params, x),
    "by hand": rows(mapped, jnp.ones((64, 24), jnp.int8)),
}))
"""


@pytest.fixture(scope="module")
def hlo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield importlib.import_module("hlo")


def test_programs_of_jax():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=os.environ | flags
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["one"] == []
    kinds, results, group_sizes = zip(*found["data"], strict=True)
    assert {*kinds} == {"all-reduce"} and {*group_sizes} == {8}
    sizes = sorted(sorted(shape[:2]) for shapes in results for shape in shapes)  # XLA may transpose them.
    assert sizes == [[16, 40], [24, 40]]  # The gradients, once each.
    assert found["by hand"] == [
        ["all-gather", [[64, 24, "s8"]], 8],
        ["collective-permute", [[8, 24, "s8"]], None],
        ["reduce-scatter", [[1, 24, "s8"]], 8],
    ]


def test_sizes_and_the_jax_operation(hlo):
    (found,) = hlo.collectives(
        "  ROOT %all-reduce.2 = (f32[512,256]{1,0}, bf16[16]{0}, /*index=2*/pred[], f8e4m3fn[3]) all-reduce(%dot.3, "
        "%dot.4, %p, %q), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, "
        'use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/transpose(jvp())/dot_general"}\n'
    )
    assert found.results == (("f32", (512, 256)), ("bf16", (16,)), ("pred", ()), ("f8e4m3fn", (3,)))
    assert [result.num_bytes for result in found.results] == [524288, 32, 1, 3]
    assert (found.kind, found.num_bytes, found.group_size) == ("all-reduce", 524324, 8)
    assert found.op_name == "jit(f)/transpose(jvp())/dot_general"


def test_an_asynchronous_operation_counts_once_with_its_result(hlo):
    gathered, reduced, moved, scattered = hlo.collectives(
        """
  %all-gather-start = (f32[4]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}
  %ar = f32[9]{0:T(256)S(1)} all-reduce-start(f32[9]{0:T(256)} %x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %collective-permute-start.1 = (s32[5], s32[5], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  %fusion.7 = f32[32]{0} fusion(%p, %ar), kind=kLoop, calls=%computation
  %reduce-scatter-start = ((f32[16]), f32[2]) reduce-scatter-start(%z), replica_groups=[1,8]<=[8], to_apply=%add
  %all-gather-done = f32[32]{0} all-gather-done(%all-gather-start), metadata={op_name="not read"}
  %all-reduce-done = f32[9]{0:T(256)} all-reduce-done(f32[9]{0:T(256)S(1)} %ar)
  %collective-permute-done = s32[5] collective-permute-done((s32[5], s32[5], u32[], u32[]) %collective-permute-start.1)
  ROOT %reduce-scatter-done = f32[2] reduce-scatter-done(%reduce-scatter-start)
"""
    )
    assert gathered == ("all-gather", (("f32", (32,)),), 8, "")
    assert reduced == ("all-reduce", (("f32", (9,)),), 2, "")
    assert moved == ("collective-permute", (("s32", (5,)),), None, "")
    assert scattered == ("reduce-scatter", (("f32", (2,)),), 8, "")


def test_an_operation_that_a_wrapped_computation_contains_counts_once(hlo):
    text = """
%async_computation (p: f32[16]) -> f32[2] {
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%p), replica_groups={}, dimensions={0}, to_apply=%add
}
ENTRY %main (x: f32[16]) -> f32[2] {
  %start = ((f32[16]), f32[2], u32[]) async-start(%x), calls=%async_computation
  ROOT %done = f32[2]{0} async-done(%start), metadata={op_name="a = b all-reduce(c)"}
}
"""
    assert hlo.collectives(text) == [("reduce-scatter", (("f32", (2,)),), None, "")]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=4,'model'=2] {'data','model'}", 8),
        ("mesh['data'=8,'model'=2] {'data':(2)4}", 4),
        ("{}", None),
    ],
)
def test_the_size_of_groups(hlo, groups, size):
    (found,) = hlo.collectives(f"  %a = f32[] all-reduce(%b), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert found.group_size == size


def test_operands_with_the_name_of_a_collective_are_none(hlo):
    text = "  %gte = f32[8] get-tuple-element(%all-reduce), index=0\n  %f = f32[8] fusion(%all-gather.1, %all-reduce)"
    assert hlo.collectives(text) == []


SCHEDULED = """HloModule step, is_scheduled=true

%region (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8], q: bf16[4,2]) -> (f32[8], f32[16]) {
  %p = f32[8]{0} parameter(0), sharding={mesh[], replicated}
  %q = bf16[4,2]{1,0} parameter(1)
  %before = (f32[8]{0}, s8[64]{0}) custom-call(%p, %q), custom_call_target="kernel(%p)"
  %g = f32[8]{0} get-tuple-element(%before), index=0
  %ar-start = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%g), replica_groups=[1,8]<=[8], to_apply=%region
  %k.1 = f32[8]{0} fusion(%p, %g), kind=kLoop, calls=%fused
  %b = f32[2,4]{1,0} bitcast(%k.1)
  %ag-start = (f32[2,4]{1,0}, f32[4,4]{1,0}) all-gather-start(%b), replica_groups=[4,2]<=[8], dimensions={0}
  %k.2 = f32[16]{0} fusion(%b, /*index=1*/%q), kind=kLoop, calls=%fused.1
  %ar-done = f32[8]{0} all-reduce-done(%ar-start), metadata={op_name="grad (%k.2)"}
  %rs = f32[1]{0} reduce-scatter(%ar-done), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%region
  %ag-done = f32[4,4]{1,0} all-gather-done(%ag-start)
  ROOT %all = (f32[8]{0}, f32[16]{0}) tuple(%ar-done, %k.2)
}
"""


def test_the_bytes_that_kernels_move_while_devices_communicate(hlo):
    found = hlo.schedule(SCHEDULED)
    assert [(c.kind, c.num_bytes, c.group_size, alongside) for c, alongside in found] == [
        ("all-reduce", 32, 8, 3 * 32 + (64 + 32 + 16)),  # k.1, then k.2.
        ("reduce-scatter", 4, 8, 0),  # It is synchronous.
        ("all-gather", 64, 2, 64 + 32 + 16),
    ]
    with pytest.raises(ValueError, match="must be a scheduled program, got one without is_scheduled=true"):
        hlo.schedule(SCHEDULED.replace(", is_scheduled=true", ""))
