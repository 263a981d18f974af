"""What is off changes nothing: the train steps of five default configurations are the same equations as before.

Of each step the sorted multiset of its equations is kept, with those of all programs inside it: primitive, shapes,
dtypes, shardings and parameters, without names of functions. Traced at the published sizes, since nothing is computed.
After a change that is meant to be one:

    python -m tests.test_unused --write

rewrites tests/unused/; the commit says why, and `git diff` lists the equations. Only JAX of the version that wrote them
is compared: another one has other equations.
"""

import collections
import difflib
import enum
import importlib
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from moe_jax import config
from moe_jax.parallel import axes, sharding
from moe_jax.train import step
from moe_jax.train.state import abstract_batch, abstract_state

FOLDER = Path(__file__).with_name("unused")
VERSION = FOLDER / "jax_version.txt"
HOPPER = "olmoe_8l_bench"
ON_CPU = "quickstart"  # the others are traced as for an accelerator
TPU = {"model.attention": "splash", "model.moe.grouped_matmul": "ragged_dot"}  # what auto is there
CASES = {  # mesh, other values
    "quickstart": ((2, 2, 2), {}),
    "moonlight_16b_a3b": ((2, 2, 2), TPU | {"optim.newton_schulz_dtype": "bfloat16"}),
    "demons_3b": ((1, 2, 4), TPU | {"train.micro_batches": 2}),
    "olmoe_1b_7b": ((8, 1, 1), TPU),
    HOPPER: ((1, 1, 1), {"model.attention": "xla", "model.moe.grouped_matmul": "hopper"}),
}
SLOW = ("moonlight_16b_a3b", "olmoe_1b_7b", HOPPER)
# Names of functions, and functions: they are what a move of the code changes.
NAMES = {
    "name", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "debug_info", "name_and_src_info", "name_stack",
    "ctx_mesh", "in_layouts", "out_layouts", "in_shardings", "out_shardings", "donated_invars",
}  # fmt: skip
ALL = "(data,fsdp,expert)"  # in the files *
NUMBERS = (bool, int, float, np.integer, np.floating)


def inner(value: Any) -> list:
    """The programs in a parameter."""
    if isinstance(value, Jaxpr | ClosedJaxpr):
        return [value]
    return [p for one in value for p in inner(one)] if isinstance(value, tuple | list) else []


def word(value: Any) -> str:
    """A parameter in one word. Of a kind that is not known only the kind: it may hold addresses or names."""
    if isinstance(value, NUMBERS):
        return f"{value:g}" if isinstance(value, float | np.floating) else str(int(value))
    if isinstance(value, jax.sharding.NamedSharding):
        return word(value.spec)
    if isinstance(value, jax.sharding.PartitionSpec):
        return "P" + word(tuple(value))
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return jnp.dtype(value).name
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, str | None):
        return str(value)
    if hasattr(value, "_fields"):
        return f"{type(value).__name__}({','.join(f'{n}={word(getattr(value, n))}' for n in value._fields)})"
    if isinstance(value, frozenset | set):
        return "{" + ",".join(sorted(map(word, value))) + "}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(map(word, value)) + ")"
    return type(value).__name__


def shape(x: Any) -> str:
    short = x.aval.str_short(True)
    if isinstance(x, Literal) and np.ndim(x.val) == 0:
        return f"{np.asarray(x.val).item():g}:{short}"
    return short


def equations(program: Any, found: collections.Counter) -> collections.Counter:
    """Adds those of a program, and of all programs inside it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        more, words = [], []
        for name, value in sorted(equation.params.items()):
            if programs := inner(value):
                more += programs
            elif name not in NAMES and not (value is None or (isinstance(value, int | tuple) and not value)):
                words.append(f"{name}={word(value)}")
        ins, outs = (" ".join(map(shape, xs)) for xs in (equation.invars, equation.outvars))
        found[f"{equation.primitive.name} {ins} -> {outs} {' '.join(words)}".rstrip().replace(ALL, "*")] += 1
        for one in more:
            equations(one, found)
    return found


def traced(name: str) -> Any:
    """The train step of configs/<name>.py, of shapes alone."""
    sizes, changes = CASES[name]
    made = importlib.import_module(f"configs.{name}").get_config()
    made.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
    made.update_from_flattened_dict(changes)
    cfg = config.build(made)
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])
    kind = axes.current_kind if name == ON_CPU else lambda: "an accelerator"
    with mock.patch.object(axes, "current_kind", kind), jax.set_mesh(mesh):
        return step.make_train_step(cfg, mesh).__wrapped__.trace(abstract_state(cfg, mesh), abstract_batch(cfg, mesh))


def operations(name: str) -> collections.Counter:
    """Of the step lowered for a GPU: StableHLO's operations by name, and the kernels and libraries that it calls."""
    text = traced(name).lower(lowering_platforms=("cuda",)).as_text()
    return collections.Counter(re.findall(r"stablehlo\.custom_call @\w+|stablehlo\.\w+", text))


def lines(name: str) -> list[str]:
    found = equations(traced(name).jaxpr, collections.Counter())
    if name == HOPPER:
        found.update(operations(name))
    return [f"{n} {line}" for line, n in sorted(found.items())]


@pytest.mark.skipif(jax.__version__ != VERSION.read_text(encoding="utf-8").strip(), reason="another version of JAX")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES])
def test_the_default_step_is_the_same_equations(name):
    want = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    difference = [line for line in difflib.unified_diff(want, lines(name), n=0) if line[:2] not in ("--", "++", "@@")]
    assert not difference, f"{len(difference)} lines differ:\n" + "\n".join(line[:300] for line in difference[:40])


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    from tests import conftest  # noqa: F401  8 virtual devices

    FOLDER.mkdir(exist_ok=True)
    VERSION.write_text(jax.__version__ + "\n", encoding="utf-8")
    for name in CASES:
        (FOLDER / f"{name}.txt").write_text("\n".join(lines(name)) + "\n", encoding="utf-8")
