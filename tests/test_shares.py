"""Shares of Muon's matrices: which device gets which, how even that is, and that exchanges lie before and after."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config, model, optim
from moe_jax.optim import muon, newton_schulz, shares
from tests.test_muon_mesh import abstract, make_mesh, rule, share_all_out


def test_devices_get_about_as_much_work():
    """configs/demons_43b.py on 64 and 256 chips: 1.24 and 1.99 of an even share, if groups are spread one by one. Of
    256 chips one with a matrix of 4096 × 8192 has no other, and that is 1.23 of an even share."""
    made = importlib.import_module("configs.demons_43b").get_config()
    made.optim.update(name="muon", newton_schulz_dtype="bfloat16")
    cfg = config.build(made)
    graph = model.abstract(cfg.model)
    for fsdp, before, now in ((8, 1.24, 1.02), (32, 1.99, 1.24)):
        plan = optim.muon_plan(cfg.optim, graph, {"data": 1, "fsdp": fsdp, "expert": 8})
        cost = [row.matrices * newton_schulz.flops(*row.shape, plan.steps) for row in plan.rows]
        alone = sum(-(-row.matrices // plan.devices) * c / row.matrices for row, c in zip(plan.rows, cost, strict=True))
        even = sum(cost) / plan.devices
        assert alone / even > before - 0.02 and plan.flops / even < now
        assert plan.ratio < 1.05 and f"{plan.flops / 1e9:,.0f} on the device that has the most" in str(plan)


def test_shares_of_matrices():
    """Two sets of four devices: each matrix is in one slot of its set, and a device iterates on those that it has."""
    sizes = {"a": 2, "b": 4}
    work = [shares.Work(100, 1, 3, ("a", "b"), False), shares.Work(7, 0, 101, ("b",), False),
            shares.Work(5, 1, 4, ("b",), True)]  # fmt: skip
    big, small, fixed = shares.even_out(work, sizes)
    assert fixed is None and big.batches.sum() == 3 and big.batches.max() == 1
    load = 5 + 100 * big.batches.reshape(2, 4) + 7 * small.batch * small.batches
    assert load.max() <= (2 * 100 + 7 * 101) / 4 + 5 + 7 * small.batch  # two of the three in one set
    assert shares.most([(work[0], big), (work[1], small)], sizes) == load.max() - 5
    np.testing.assert_array_equal(shares._sets(work[0]._replace(axes=("b", "a")), sizes), [[0, 4, 1, 5, 2, 6, 3, 7]])
    for one, count in ((big, 3), (small, 101)):
        for held, slot, batches in zip(one.held, one.slot, one.batches, strict=True):
            np.testing.assert_array_equal(held[slot], np.arange(count))
            filled = (held < count).reshape(len(batches), -1)
            assert filled.sum() == count and (filled.sum(1) <= one.batch * batches).all()
            assert (np.argmin(filled, axis=1) >= filled.sum(1)).sum() == (~filled).any(1).sum()  # zeros come last


def test_no_exchange_lies_between_the_groups(monkeypatch):
    """All matrices are made whole, then all are iterated on, then all results are handed out."""
    share_all_out(monkeypatch.setattr)
    mesh = make_mesh((2, 2, 2))
    tree, tx = abstract(mesh), muon.scale_by_muon(dtype=jnp.float16, matrices=rule)
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(tx.update)(tree, muon.MuonState(tree))
    maps = [[e.primitive.name for e in equation.params["jaxpr"].eqns]
            for equation in program.eqns if equation.primitive.name == "shard_map"]  # fmt: skip
    (names,) = [names for names in maps if "optimization_barrier" in names]
    first, last = (i for i, name in enumerate(names) if name == "optimization_barrier")
    before, between, after = names[:first], names[first:last], names[last:]
    assert before.count("all_to_all") == after.count("all_to_all") >= 2 and between.count("while") >= 2
    assert not {"all_to_all", "all_gather", "while"} & ({*between} - {"while"} | ({*before, *after} & {"while"}))
