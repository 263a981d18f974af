"""Configuration: frozen dataclasses, strict in both directions.

A config file returns an `ml_collections.ConfigDict` (start from `default_config()`), the command line overrides it, and
`build` turns it into frozen dataclasses. A bad value raises `ConfigError` before anything is compiled: the field, the
value, the rule and the nearest valid choice.
"""

from moe_jax.config.balance import check_trained
from moe_jax.config.classes import complete, is_machine, is_new_default, may_change, same_value
from moe_jax.config.convert import build, build_model, default_config, parameter_group, router_loss, source, to_dict
from moe_jax.config.data import DataConfig, SourceConfig, TokenizerConfig
from moe_jax.config.distill import DistillConfig
from moe_jax.config.explore import ExploreConfig, RampConfig
from moe_jax.config.fields import nearest_divisor
from moe_jax.config.lora import LoRAConfig
from moe_jax.config.machine import (
    check_back_ends,
    check_devices,
    check_grouped_matmul,
    check_steps,
    check_vocabulary,
    cudnn_refusals,
    evaluation_mesh,
    for_evaluation,
)
from moe_jax.config.memory import MemoryConfig
from moe_jax.config.mixture import MixtureConfig, shares
from moe_jax.config.model import MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig
from moe_jax.config.plain import plain, plain_routing
from moe_jax.config.schema import (
    GroupConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    RouterLossConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "DistillConfig",
    "ExploreConfig",
    "GroupConfig",
    "LoRAConfig",
    "LossConfig",
    "MLAConfig",
    "MemoryConfig",
    "MeshConfig",
    "MixtureConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "RampConfig",
    "RopeScalingConfig",
    "RouterLossConfig",
    "RunConfig",
    "SampleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "build",
    "build_model",
    "check_back_ends",
    "check_devices",
    "check_grouped_matmul",
    "check_steps",
    "check_trained",
    "check_vocabulary",
    "complete",
    "cudnn_refusals",
    "default_config",
    "evaluation_mesh",
    "for_evaluation",
    "is_machine",
    "is_new_default",
    "may_change",
    "nearest_divisor",
    "parameter_group",
    "plain",
    "plain_routing",
    "router_loss",
    "same_value",
    "shares",
    "source",
    "to_dict",
]
