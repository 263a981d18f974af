"""Groups of parameters that cannot be, or do nothing, and groups that make another run."""

import pytest
from test_groups import EXPERTS, FROZEN, run_config

from moe_jax import config, model
from moe_jax.config import GroupConfig
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.optim import groups, optimizer
from moe_jax.run import config_file
from moe_jax.train.gradients import make_gradients
from moe_jax.tree import flatten, nest

WRONG = {
    r"x.match='/moe/w_ruoter\$': matches no parameter of 13; nearest valid: 'layers/moe/w_router'": dict(
        match="/moe/w_ruoter$"
    ),
    r"x.match='\(': is not a regular expression: .*; nearest valid: '\\\\\('": dict(match="("),
    r"x.match='': must be a regular expression over paths of parameters": dict(freeze=True),
    r"x.lr=0.5: has no effect with freeze=True; nearest valid: 1.0": dict(match="w_", lr=0.5, freeze=True),
    r"x.weight_decay=0.0: has no effect with freeze": dict(match="w_", weight_decay=0.0, freeze=True),
    r"x.freeze=True: leaves no parameter to train; nearest valid: False": dict(match="", freeze=True) | {"match": "."},
    r"x.lr=-1.0: must be ≥ 0": dict(match="w_", lr=-1.0),
    r"x.start=2: has no effect with freeze=True; nearest valid: 0": dict(match="w_", start=2, freeze=True),
    r"x.start=40: must be < train.steps=40; .*nearest valid: 39": dict(match="w_", start=40),
    r"x.mach='w_': is not a field; nearest valid name: match": dict(mach="w_"),
}


@pytest.mark.parametrize("says", WRONG)
def test_a_group_that_cannot_be_is_refused_before_anything_is_compiled(says):
    made = config.to_dict(run_config())
    made["optim"]["groups"] = {"x": WRONG[says]}
    with pytest.raises(ConfigError, match=rf"config\.optim\.groups\.{says}"):
        make_gradients(config.build(made), None)


def test_factors_of_frozen_parameters_alone_are_refused():
    made = run_config(FROZEN | {"decay": GroupConfig("^embed$", weight_decay=0.0)})
    with pytest.raises(
        ConfigError, match=r"decay.match='\^embed\$': matches frozen parameters only.*nearest valid: 'head'"
    ):
        groups.check(made)
    groups.check(run_config(FROZEN | {"decay": GroupConfig("^embed$")}))  # as all others


def test_clipping_would_move_what_has_not_started():
    with pytest.raises(ConfigError, match=r"optim\.groups\.late\.start=2: is not available with optim\.qk_clip > 0"):
        groups.check(run_config({"late": GroupConfig("/attention/", start=2)}, qk_clip=9.0))
    groups.check(run_config({"late": GroupConfig("/attention/w_v$", start=2)}, qk_clip=9.0))


def test_names_and_decays_are_checked():
    with pytest.raises(ConfigError, match=r"groups='a b': names must be words.*nearest valid: 'embedding'"):
        config.OptimConfig(groups={"a b": GroupConfig("w_")})
    with pytest.raises(ConfigError, match=r"ema=1.0: must be < 1.*nearest valid: 0.999"):
        config.OptimConfig(ema=1.0)


def test_another_group_is_another_run(tmp_path):
    config_file.save_config(tmp_path, run_config(EXPERTS))
    assert config_file.resume(tmp_path, run_config(EXPERTS)) == (run_config(EXPERTS), [])
    for other in ({}, {"experts": GroupConfig("/moe/w_up$", freeze=True)}, FROZEN):
        with pytest.raises(CheckpointError, match=r"another configuration \(config\.optim\.groups\."):
            config_file.resume(tmp_path, run_config(other))


def test_a_group_that_does_nothing_is_no_other_run(tmp_path):
    """A run begun without it goes on with it, and the reverse, until it does something."""
    idle, acting = ({"x": GroupConfig("w_", start=n)} for n in (0, 3))
    for number, (first, then) in enumerate((({}, idle), (idle, {}))):
        config_file.save_config(tmp_path / str(number), run_config(first))
        assert config_file.resume(tmp_path / str(number), run_config(then)) == (run_config(then), [])
        with pytest.raises(CheckpointError, match=r"config\.optim\.groups\.x\.start: (absent|0) in the run, 3 now"):
            config_file.resume(tmp_path / str(number), run_config(acting))


def test_a_rule_may_match_nothing_only_among_some_parameters():
    shapes = flatten(model.abstract(run_config().model).shapes)
    some = nest({path: x for path, x in shapes.items() if not path.endswith("norm")})
    assert set(flatten(optimizer.label_params(some, some=True))) == set(flatten(some))
