"""What benchmarks are made of: models on meshes and the figure of their rows; kernels of a profile."""

import json

import pytest

from benchmarks import kernels, meshes
from configs import debug
from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.model.counts import flops_per_token

PROGRAM = """
  %psum.7 = (f32[8]{0:T(8)}, f32[]) all-reduce(%a, %b), channel_id=1, metadata={op_name="jit(f)/experts/psum"}
  %all-gather-start.2 = ((f32[2]{0}), f32[4]{0}) all-gather-start(%c), channel_id=2
  ROOT ragged-all-to-all.3 = bf16[8,4]{1,0} ragged-all-to-all(%d, %e), metadata={op_name="jit(f)/x"}
  %input_transpose_permute_fusion = f32[8]{0} fusion(%all-gather.1), metadata={op_name="jit(f)/moe/ppermute"}
  %ragged_dot_permute.1 = f32[8]{0} custom-call(%all-reduce.3), metadata={op_name="jit(f)/ragged_dot"}
"""


def test_collectives_are_told_by_their_operation():
    """Not by names: a fusion that permutes sends nothing, and what psum was traced as is an all-reduce."""
    assert kernels.collectives(PROGRAM) == {"psum.7", "all-gather-start.2", "ragged-all-to-all.3"}
    assert kernels.origins(PROGRAM)["psum.7"] == "jit(f)/experts/psum"
    for name, kind in {
        "input_transpose_permute_fusion": "copy or transposition",
        "loop_gather_fusion": "gather or scatter",
        "input_reduce_fusion": "reduction",
        "loop_add_fusion all_gather": "elementwise",  # what a gradient of an all-gather was traced as
        "loop_add_fusion reduce_scatter": "elementwise",
        "ragged_dot_permute": "grouped matmul",
    }.items():
        assert kernels.kind_of(name) == kind, name


@pytest.mark.parametrize(
    ("events", "both"),
    [
        ([(True, 0, 10)], (10, 0)),
        ([(False, 0, 10)], (0, 0)),
        ([(True, 0, 10), (False, 5, 10), (True, 8, 4)], (12, 7)),  # two collectives at once count once
        ([(True, 0, 10), (False, 1, 2), (False, 2, 3), (False, 20, 5)], (10, 4)),
        ([(True, 0, 2), (True, 2, 2), (False, 2, 2)], (4, 2)),
    ],
)
def test_time_beside_other_kernels(events, both):
    assert kernels.beside(events) == both


def test_variants_and_their_lines():
    """Names tell all variants of a machine apart; lines go through machines of other sizes."""
    on = lambda devices: meshes.variants(devices, ["plain", "late"], ["1", "2"], [False, True])
    four = on(4)
    assert len({variant.name for variant in four}) == len(four) == 20 and all(4 % v.devices == 0 for v in four)
    assert [variant.name for variant in four[:10]] == [
        "1 device", "fsdp=4", "expert=4, ring", "expert=4, ring, 2 chunks", "expert=4, all_to_all",
        "expert=4, all_to_all, 2 chunks", "expert=4, padded all_to_all", "expert=4, padded all_to_all, 2 chunks",
        "fsdp=2 expert=2, ring", "fsdp=2 expert=2, all_to_all",
    ]  # fmt: skip
    lines = {variant.line for variant in four if variant.devices > 1}
    assert len(lines) == 18 and lines <= {
        v.line for v in meshes.variants(8, ["plain", "late"], ["1", "2"], [False, True])
    }
    assert "late, fsdp expert=2, ring" in lines and "expert, padded all_to_all, 2 chunks" in lines


def test_flops_of_the_kinds():
    """`pairs` and `late` have equal FLOPs, those of the config but for half of the routers; `latent` has more."""
    found = {}
    for kind in ("plain", "latent", *meshes.OF_TRAINING):
        c = debug.get_config()
        c.model.num_layers = 4
        meshes.change(c, kind)
        cfg = config.build(c)
        found[kind] = flops_per_token(cfg.model, cfg.data.seq_len)
    routers = 6 * 2 * c.model.d_model * c.model.moe.num_experts
    assert found["pairs"] == found["late"] == found["plain"] - routers
    assert found["plain"] < found["latent"]


def row(name, devices, tokens_per_second, kind="fast", **more):
    line = "fsdp" if devices > 1 else ""
    return {"what": "training step: E=8", "kind": "plain", "name": name, "line": line, "devices": devices,
            "tokens_per_second": tokens_per_second, "where": f"2 × {kind}, jax 1"} | more  # fmt: skip


def test_figure_of_rows(tmp_path):
    """Of rows of one variant the last one counts, and those of other devices have a panel of their own."""
    rows = [row("1 device", 1, 100.0), row("fsdp=2", 2, 80.0), row("fsdp=2", 2, 95.0), row("1 device", 1, 50.0, "slow")]
    rows += [row("fsdp=2", 2, 30.0, "slow")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    assert meshes.read(str(file)) == rows
    figure = meshes.draw(rows)
    shown = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes}
    assert shown == {
        "plain, fast, jax 1": [[[1, 100], [2, 200]], [[1, 100], [2, 190]]],
        "plain, slow, jax 1": [[[1, 50], [2, 100]], [[1, 50], [2, 60]]],
    }
    assert figure.get_suptitle() == "training step"
    assert meshes.draw(rows[:3]).get_suptitle() == "training step, fast, jax 1"
    for text, says in (("", "has no row to draw"), ("{}", "line 1 has no 'what'"), ("[", "line 1 is not an object")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=says):
            meshes.read(str(file))
    with pytest.raises(UserError, match=r"--rows=nowhere: no such file"):
        meshes.read("nowhere")
