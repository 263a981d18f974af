"""The host's memory while a model is imported: the weights once, and little besides, however many tensors there are.

On CPU the devices' memory is the host's, so the weights themselves are resident once and are taken off the peak. What
remains is the tensor at hand in its few forms (as read, its rows, its cast), compiled programs and Orbax: about 75
MB, by machine and allocator. So it is compared with that of two layers, whose tensors have the same shapes.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.hf import safetensors as files

REPO = Path(__file__).parents[1]
LAYERS, D, F, V = (2, 18), 1024, 4096, 8000
ALLOWED = 80  # MB for sixteen more layers, whose weights are 537

PROGRAM = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from moe_jax.hf import import_model

status = lambda: open("/proc/self/status", encoding="utf-8")
memory = lambda key: next(int(line.split()[1]) / 1e3 for line in status() if line.startswith(key))
jax.block_until_ready(jax.numpy.zeros(3) + 1)
before = memory("VmRSS")
import_model(sys.argv[1], sys.argv[2])
print("peak", memory("VmHWM") - before)
"""


def import_one(path, layers):
    """MB of the weights and at the peak."""
    bf16 = np.dtype(jnp.bfloat16)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(layers):
        layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "mlp.down_proj": (D, F)}
        layer |= {f"self_attn.{x}_proj": (D, D) for x in "qkvo"} | {f"mlp.{x}_proj": (F, D) for x in ("gate", "up")}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    specs = [files.Spec(name, bf16, shape) for name, shape in shapes.items()]
    (path / "in").mkdir(parents=True)
    numbers = (np.full(s.shape, i, bf16) for i, s in enumerate(specs))
    files.write_model(path / "in", specs, numbers, max_file=200_000_000)
    hf = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=V, hidden_size=D, intermediate_size=F,
              num_hidden_layers=layers, num_attention_heads=16, max_position_embeddings=64, rms_norm_eps=1e-6,
              tie_word_embeddings=True)  # fmt: skip
    (path / "in" / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    program = [sys.executable, "-c", PROGRAM, str(path / "in"), str(path / "run")]
    done = subprocess.run(program, cwd=REPO, capture_output=True, timeout=300, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return sum(s.size for s in specs) / 1e6, float(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' account of a process")
def test_peak_memory_of_an_import(tmp_path):
    (small, at_small), (large, at_large) = (import_one(tmp_path / str(n), n) for n in LAYERS)
    print(f"{at_small - small:.0f} MB beside {small:.0f} MB of weights, {at_large - large:.0f} beside {large:.0f}")
    assert at_small > small and large - small > 6 * ALLOWED  # weights are resident; a second copy would be seen
    assert at_large - large < at_small - small + ALLOWED
