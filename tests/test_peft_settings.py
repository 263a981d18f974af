"""The settings in PEFT's adapter_config.json: what is read, and what is refused since it changes the function."""

import json
import math

import pytest

from moe_jax.errors import FormatError
from moe_jax.hf import peft
from moe_jax.hf.peft_import import KNOWN, open_adapter

SETTINGS = {  # of adapter_config.json, and part of the message
    "peft_type='IA3' is not supported; nearest valid: 'LORA'": {"peft_type": "IA3"},
    "use_dora=True is not supported; nearest valid: False": {"use_dora": True},
    "use_qalora=True is not": {"use_qalora": True},
    "layer_replication=": {"layer_replication": [[0, 2], [1, 3]]},
    "alora_invocation_tokens=": {"alora_invocation_tokens": [5, 6]},
    "velora_config=": {"velora_config": {"group_size": 2}},
    "kasa_config=": {"kasa_config": {"beta": 1e-4}},
    "use_bdlora=": {"use_bdlora": {"nblocks": 2}},
    "modules_to_save=": {"modules_to_save": ["lm_head"]},
    "bias='all' is not supported; nearest valid: 'none'": {"bias": "all"},
    "a_field_of_tomorrow=1 is not supported; nearest valid: None": {"a_field_of_tomorrow": 1},
    "init_lora_weights='pissa_niter_4' is not supported, since it changes the": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights='olora' is": {"init_lora_weights": "olora"},
    "init_lora_weights='loftq' is": {"init_lora_weights": "loftq"},
    "init_lora_weights='corda' is": {"init_lora_weights": "corda"},
    "init_lora_weights='lora_ga' is": {"init_lora_weights": "lora_ga"},
    "lora_alpha='16' must be a number > 0; nearest valid: 8": {"lora_alpha": "16"},
    "lora_alpha=None must": {"lora_alpha": None},
    "lora_alpha=0 must": {"lora_alpha": 0},
    "lora_alpha=inf must": {"lora_alpha": math.inf},
    "alpha_pattern['q_proj']=0 must": {"alpha_pattern": {"q_proj": 0}},
    "alpha_pattern=['q_proj'] must have an α for each": {"alpha_pattern": ["q_proj"]},
    "alpha_pattern has '(', which is not a regular expression": {"alpha_pattern": {"(": 3}},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_change_the_function_are_refused(message, tmp_path):
    (tmp_path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2} | SETTINGS[message]), encoding="utf-8")
    with pytest.raises(FormatError) as e:
        open_adapter(tmp_path)
    assert message in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_settings_that_change_nothing_are_read(tmp_path):
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.1, "megatron_core": "megatron.core"}
    settings |= {"use_dora": False, "kasa_config": None, "loftq_config": {}, "qalora_group_size": 16, "bias": "none"}
    (tmp_path / peft.TENSORS).write_bytes((2).to_bytes(8, "little") + b"{}")
    for start in (True, False, "gaussian", "eva", "orthogonal"):
        (tmp_path / peft.CONFIG).write_text(json.dumps(settings | {"init_lora_weights": start}), encoding="utf-8")
        assert open_adapter(tmp_path).scale("q_proj", 4) == 2.0


@pytest.mark.parametrize("start", [True, "gaussian", "pissa", "olora", "mica"])
def test_settings_as_peft_writes_them(start, tmp_path):
    """PEFT's default settings are read, and those that change the base model are refused."""
    theirs = pytest.importorskip("peft").LoraConfig(init_lora_weights=start, task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path)
    (tmp_path / peft.TENSORS).write_bytes((2).to_bytes(8, "little") + b"{}")
    if start in ("pissa", "olora"):
        with pytest.raises(FormatError, match=f"init_lora_weights='{start}'"):
            open_adapter(tmp_path)
    else:
        assert open_adapter(tmp_path).scale("q_proj", 8) == 1.0
    assert set(theirs.to_dict()) >= KNOWN
