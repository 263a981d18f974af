"""`--compile_only`: what a program sends, read from its text; the step compiled for chips that are not here."""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe_jax import config
from moe_jax.aot import compile_only, hlo, machines
from moe_jax.errors import UserError
from moe_jax.parallel import sharding

REPO = Path(__file__).parents[1]
COMPILERS = {"v5p:2x2x2": "libtpu", "h100:8": "jax_plugins.xla_cuda13"}

PROGRAM = """\
HloModule jit_step, num_partitions=8

%cond (p: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %all-reduce.9 = f32[8,4]{1,0} all-reduce(%p), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = (bf16[2,8]{1,0}, bf16[8,8]{1,0:T(8,128)(2,1)}) all-gather-start(%x), replica_groups=[2,4]<=[2,4], dimensions={0}
  %agd = bf16[8,8]{1,0} all-gather-done(%ag)
  %rs = f32[2,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body
  %ar = (f32[3,5]{1,0}, f32[]) all-reduce(%b, %c), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add, \
metadata={op_name="jit(step)/psum"}
  %a2a = bf16[4,2]{1,0} all-to-all(%d), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %cp = u8[16]{0} collective-permute(%e), source_target_pairs={{0,0},{0,1},{1,0}}
  %s = (f32[1,8,128]{2,1,0}, u32[], token[]) send(%ar, %token), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
}
"""


def test_a_program_is_read():
    found = {c.kind: c for c in hlo.collectives(PROGRAM, {"data": 2, "fsdp": 2, "expert": 2})}
    assert len(found) == 6
    as_tuple = lambda kind: (
        found[kind].shapes,
        found[kind].size,
        found[kind].axes,
        found[kind].times,
        found[kind].sent,
    )
    inner = ("fsdp", "expert")
    assert as_tuple("all-gather") == ([(8, 8)], 128, inner, 6, 6 * 128 * 3 / 4)
    assert as_tuple("reduce-scatter") == ([(8, 4)], 32, inner, 6, 6 * 32 * 3)
    assert as_tuple("all-reduce") == ([(3, 5), ()], 64, ("data",), 1, 64)
    assert found["all-reduce"].name == "jit(step)/psum"
    assert as_tuple("all-to-all") == ([(4, 2)], 16, ("fsdp",), 1, 8)
    assert as_tuple("collective-permute") == ([(16,)], 16, ("expert",), 1, 16)
    assert as_tuple(hlo.NETWORK) == ([(1, 8, 128)], 4096, ("data",), 1, 4096)


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "v5e:32x32", "v5p:4x4x", "0xv5p:4x4x4", "v5p:0x2x2", "../v5p:2x2x1",
                                  "h100:0", "h100:16", "2xh100:8", "h100:2x2", "h200", "a100:9", "l40s:0"])  # fmt: skip
def test_a_topology_that_is_none(name):
    gpu = re.search("[abhl][0-9]+s?", name)
    near = f"{gpu[0]}:8" if gpu else "v"
    gpus = re.escape("<a100|l40s|h100|h200|b200>")
    with pytest.raises(UserError, match=rf"must be \[<slices>x\].*, or {gpus}:.*nearest valid: {near}"):
        machines.devices(name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v5p:2x2x1", 'the TPU compiler; pip install "libtpu'),
        ("h100:8", r'the compiler for GPUs; pip install "jax\[cuda'),
    ],
)
def test_without_the_compiler(monkeypatch, name, wanted):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^--compile_only={name}: needs {wanted}"):
        machines.devices(name)


def run_config(**values):
    c = config.default_config()
    c.update_from_flattened_dict(values)
    return config.build(c)


@pytest.mark.parametrize(
    ("values", "total", "expected"),
    [
        ({"train.micro_batches": 2, "data.batch_size": 64}, 30, "--config.model.remat=selective"),
        (
            {"train.micro_batches": 2, "data.batch_size": 64, "model.remat": "full"},
            30,
            "--config.train.micro_batches=8",
        ),
        ({"data.batch_size": 4, "model.remat": "selective"}, 30, "--config.model.remat=full"),
        ({"data.batch_size": 4, "model.remat": "full"}, 30, "--config.mesh.data=-1 --config.mesh.fsdp=2"),
    ],
)
def test_the_smallest_change(values, total, expected):
    memory = {"parameters": 1.0, "moments": 2.0, "rest": total - 3.0}
    report = compile_only.Report("v5e:2x2", {"data": 4, "fsdp": 1, "expert": 1}, False, memory, 16.0, 1.0, [], "")
    assert compile_only.suggestions(run_config(**values), report).startswith(expected)


@pytest.mark.parametrize(("total", "expected"), [(18, "--config.model.param_dtype=bfloat16"), (30, "more chips")])
def test_the_smallest_change_without_replicas(total, expected):
    memory = {"parameters": 2.0, "moments": 4.0, "rest": total - 6.0}
    report = compile_only.Report("v5e:2x2", {"data": 1, "fsdp": 4, "expert": 1}, False, memory, 16.0, 1.0, [], "")
    cfg = run_config(**{"data.batch_size": 4, "model.remat": "full"})
    assert compile_only.suggestions(cfg, report).startswith(expected)


def test_a_refusal_for_lack_of_memory_is_read():
    temporaries = "the total memory required for HLO temporaries (19.50G) exceeds available HBM (15.75G)."
    assert compile_only.memory_wanted(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {temporaries}", 2**30) == (
        20.5 * 2**30,
        15.75 * 2**30,
    )
    used = "Ran out of memory in memory space hbm. Used 16.25G of 15.75G hbm. Exceeded hbm capacity by 512.00M."
    assert compile_only.memory_wanted(used, 2**30) == (16.25 * 2**30, 15.75 * 2**30)
    assert compile_only.memory_wanted("UNIMPLEMENTED: a kernel", 0) is None


def test_memory_counts_nothing_twice():
    """Of a program of known size, on the CPU's compiler: two arguments of 4 MiB, one given away, one result beside."""
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    compiled = jax.jit(lambda a, b: (a + 1, a @ b), donate_argnums=0).lower(x, x).compile()
    needed = compile_only.memory_needed(compiled.memory_analysis())
    assert 12 * 2**20 <= needed < 13 * 2**20


def test_nothing_is_touched(tmp_path):
    """One line and exit status 2 for a mistake, no run directory asked for, none made."""
    argv = [sys.executable, REPO / "train.py", f"--config={REPO}/configs/debug.py", "--compile_only=v5p:9"]
    done = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, env=os.environ | {"HOME": str(tmp_path)}, encoding="utf-8"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nearest valid: v5p:4x4x4" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- with the compilers ----------------------------------------------------------------------------------------------

E, K, D, F, L, V = 24, 3, 256, 384, 3, 640
T = 2 * 256  # tokens of a chip in a micro-batch


def small(**values):
    """Widths that are no other's, so that a shape says what it is."""
    return run_config(**{
        "model.vocab_size": V, "model.d_model": D, "model.num_layers": L, "model.num_heads": 4, "model.num_kv_heads": 2,
        "model.head_dim": 128, "model.remat": "full", "model.moe.num_experts": E, "model.moe.top_k": K,
        "model.moe.d_expert": F, "optim.name": "muon", "data.batch_size": 32, "data.seq_len": 256,
        "data.tokenizer.kind": "huggingface", "data.tokenizer.path": "none", "mesh.data": 2, "mesh.fsdp": 2,
        "mesh.expert": 2, "train.micro_batches": 2, "loss.balance_batch": "8", **values})  # fmt: skip


def needs_compiler(machine: str):
    module = COMPILERS[machine]
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")


@functools.cache
def report_of(machine: str) -> compile_only.Report:
    needs_compiler(machine)
    # cuDNN, without which JAX does not trace its attention, is half a gigabyte.
    options = {"model.attention": "xla"} if machines.is_gpu(machine) else {}
    return compile_only.compile_report(small(**options), machine)


@pytest.fixture(params=COMPILERS)
def report(request):
    return report_of(request.param)


@pytest.mark.slow
def test_experts_stay_where_they_are(report):
    """Over `fsdp` a chip gathers its own experts, half of them here; over `expert` tokens travel and no weight does."""
    weights = [c for c in report.sent if any({D, F} <= set(s) for s in c.shapes) and "/optimizer/" not in c.name]
    assert "all-gather" in {c.kind for c in weights if c.axes == ("fsdp",)}
    mine = [s for c in report.sent if c.kind == "reduce-scatter" and c.axes == ("fsdp",) for s in c.shapes]
    assert {s for s in mine if F in s} == {(E // 4, D, F), (E // 4, F, D)}, mine  # gradients, of whole matrices
    for c in weights:
        assert "expert" not in c.axes and all({E // 2, E // 4} & {*s} and E not in s for s in c.shapes if F in s), c
    if machines.is_gpu(report.topology):  # `ring`
        tokens = [c for c in report.sent if "/moe/" in c.name and any(s in ((T, D), (2 * T, D)) for s in c.shapes)]
        assert {c.kind for c in tokens} == {"all-gather", "reduce-scatter"}
    else:
        # Rows out and home, going forward (in both passes and again for the backward one) and back, in each layer.
        tokens = [c for c in report.sent if c.kind == "ragged-all-to-all"]
        assert {c.times for c in tokens} == {2 * L}
    assert tokens and {c.axes for c in tokens} == {("expert",)}


@pytest.mark.slow
def test_statistics_are_a_few_numbers():
    """An all-reduce of assignments G·E a layer in the first pass, of them and the probabilities in the second. (XLA for
    GPUs takes them out of the loops and joins them with others.)"""
    report = report_of("v5p:2x2x2")
    found = [c for c in report.sent if any(E in s and D not in s for s in c.shapes)]
    assert {c.kind for c in found} == {"all-reduce"} and {c.axes for c in found} == {("data", "fsdp", "expert")}
    groups, micro = 4, 2
    numbers = sum(c.times * math.prod(s) for c in found for s in c.shapes if E in s)
    assert numbers == 3 * micro * L * groups * E


@pytest.mark.slow
def test_the_optimizer_sends_what_its_plan_says(report):
    cfg = small()
    plan = compile_only.plan_of(cfg, compile_only.mesh_of(cfg, machines.devices(report.topology)))
    assert plan.dtype == ("float16" if machines.is_gpu(report.topology) else "bfloat16")
    found = [c for c in report.sent if "/optimizer/shard_map/" in c.name]
    # Whether the gradient of a matrix is all zeros, and in float16 its size: a number for each of both. (On GPUs XLA
    # joins them with others.)
    numbers = [c for c in found if c.kind == "all-reduce"]
    assert sum(c.times * math.prod(s) for c in numbers for s in c.shapes) <= 2 * sum(row.matrices for row in plan.rows)
    assert {c.kind for c in found if c not in numbers} == {"all-to-all", "all-gather"}
    assert sum(c.sent for c in found) == pytest.approx(plan.bytes, rel=0.02)


@pytest.mark.slow
def test_it_fits_and_says_so(report):
    text = "\n".join(compile_only.lines(small(), report))
    assert report.fits and "fits: " in text and "estimate from the data sheet, not measured" in text
    state = report.memory["parameters"] + report.memory["moments"]
    assert 0 < state < sum(report.memory.values()) < report.capacity
    assert report.capacity == pytest.approx({"v5p:2x2x2": 95e9, "h100:8": 0.9 * 84_929_347_584}[report.topology])


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["h100:8"])
def test_gradients_are_sent_layer_by_layer(machine):
    """On GPUs a layer's expert gradients are computed, and on their way, before the next layer's attention is through.

    Left alone XLA's scheduler puts all of them behind the backward pass, with too little beside them.
    """
    needs_compiler(machine)
    cfg = small(**{"model.attention": "xla", "model.unroll": L, "model.remat": "selective", "optim.name": "adamw",
                   "train.micro_batches": 1, "loss.balance_batch": "global", "mesh.data": 1, "mesh.fsdp": 8,
                   "mesh.expert": 1})  # fmt: skip
    mesh = sharding.make_mesh((1, 8, 1), machines.devices(machine))
    text = compile_only.compile_step(cfg, mesh).as_text()
    program = text[text.index("\nENTRY ") :].splitlines()  # as scheduled
    of_experts = re.compile(rf"= .*\[\d+,\d+,({F}|{D})\].* reduce-scatter-start\(")  # small ones together, by layer
    sent = [i for i, line in enumerate(program) if of_experts.search(line)]
    attention = [i for i, line in enumerate(program) if re.search(r"transpose\(jvp.*attention.*dot_general", line)]
    assert len(sent) == L and sum(i < attention[-1] for i in sent) >= L - 1
