"""quant.json: what was rounded, to how many bits, how well, and what it takes when packed."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax import model
from moe_jax.config import ModelConfig
from moe_jax.config.layers import Place
from moe_jax.quant.grid import packed_bits
from moe_jax.quant.round import Matrix, Method
from moe_jax.quant.taps import EXPERT_MATRICES, BlockTaps
from moe_jax.tree import flatten

NAME = "quant.json"


class Report:
    """Collects how the blocks of a model were rounded. `to_dict` gives the content of quant.json."""

    def __init__(self, cfg: ModelConfig, method: Method):
        self.cfg, self.method = cfg, method
        self._shapes = flatten(model.abstract(cfg).shapes)
        self._matrices: dict[str, dict[int, Matrix]] = {}  # by path in the parameters, then by place in its stack
        self._tokens: dict[str, dict[int, np.ndarray]] = {}  # calibration tokens of each expert
        self._names: dict[tuple[str, int], int] = {}  # number of the block
        self.total_tokens = 0.0
        self.unspent = 0  # bits of an expert, over all experts, that no choice of bits could spend

    def add(self, number: int, place: Place, taps: BlockTaps, made: dict[str, Matrix]) -> None:
        """Notes how the matrices of a block were rounded. made: by path in the block."""
        self._names[place.path, place.index] = number
        self.total_tokens = float(taps.tokens)
        if taps.counts is not None:
            self._tokens.setdefault(place.path, {})[place.index] = np.asarray(taps.counts)
        for path, matrix in made.items():
            self._matrices.setdefault(f"{place.path}/{path}", {})[place.index] = matrix

    def unused(self) -> list[dict[str, Any]]:
        """The experts that were rounded to nearest because they had too few rows for GPTQ: layer, expert, tokens."""
        if self.method.name == "rtn":
            return []
        found = []
        for path, layers in self._tokens.items():
            for index, tokens in layers.items():
                matrix = self._matrices[f"{path}/moe/{EXPERT_MATRICES[-1]}"][index]
                found += [
                    {"layer": self._names[path, index], "expert": int(e), "tokens": int(tokens[e])}
                    for e in np.flatnonzero(matrix.nearest)
                ]
        return sorted(found, key=lambda row: (row["layer"], row["expert"]))

    def lines(self) -> list[str]:
        """Lines for the user: bits and bytes, errors, and experts without rows."""
        sizes = self.sizes()
        experts, file = sizes["experts"], sizes["file"]
        out = [
            f"experts: {experts['bits']:.4g} bits a weight, {experts['packed_bits']:.4g} with scales; "
            f"{experts['packed_bytes']:,} bytes packed",
            f"all weights: {file['packed_bits']:.4g} bits a weight with scales, embeddings, routers and norms as they "
            f"are; {file['packed_bytes']:,} bytes packed, {file['stored_bytes']:,} before",
        ]
        if self.unspent:
            out.append(
                f"the allocation left {self.unspent} bits, over all experts, that none of its choices could spend"
            )
        rows = self.unused()
        for row in rows[:8]:
            seen = f"{row['tokens']:,} of {self.total_tokens:,.0f} calibration tokens" if row["tokens"] else "no token"
            out.append(f"layer {row['layer']}, expert {row['expert']}: {seen}, so it was rounded to nearest")
        if len(rows) > 8:
            out.append(f"and {len(rows) - 8} more such experts; {NAME} names them")
        return out

    def _bits_of(self, path: str) -> int:
        """Bits of all matrices at a path when packed, or as they are stored if they were not rounded."""
        x = self._shapes[path]
        layers = self._matrices.get(path, {})
        *_, rows, columns = x.shape if len(x.shape) > 1 else (1, *x.shape)
        own = jnp.dtype(x.dtype).itemsize * 8 * math.prod(x.shape[1:])
        packed = lambda bits: packed_bits(rows, columns, int(bits), self.method.group, self.method.symmetric)
        total = sum(packed(b) for matrix in layers.values() for b in matrix.bits.flatten())
        return total + own * (x.shape[0] - len(layers))

    def sizes(self) -> dict[str, dict[str, Any]]:
        """Bits and bytes: of routed experts alone, and of all weights."""
        of = lambda paths: (sum(map(self._bits_of, paths)), sum(self._shapes[p].size for p in paths))
        experts = [path for path in self._matrices if self._shapes[path].ndim == 4]
        packed, weights = of(experts)
        everything, all_weights = of(self._shapes)
        bits = sum(self._shapes[p].size / len(ms) * float(m.bits.mean()) for p in experts
                   for ms in (self._matrices[p],) for m in ms.values())  # fmt: skip
        stored = sum(x.size * jnp.dtype(x.dtype).itemsize for x in self._shapes.values())
        return {
            "experts": {
                "weights": weights, "bits": bits / weights, "packed_bits": packed / weights,
                "packed_bytes": -(-packed // 8),
            },
            "file": {
                "weights": all_weights, "packed_bits": everything / all_weights, "packed_bytes": -(-everything // 8),
                "stored_bytes": stored,
            },
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The content of quant.json, as JSON values."""
        rounded = lambda x: np.round(np.asarray(x, np.float64), 8).tolist()
        matrices = {}
        for path, layers in self._matrices.items():
            found = [layers[i] for i in sorted(layers)]
            each = {name: [getattr(matrix, name) for matrix in found] for name in Matrix._fields}
            matrices[path] = {
                "shape": list(self._shapes[path].shape),
                "layers": [self._names[self._place(path), i] for i in sorted(layers)],
                "bits": [b.tolist() for b in each["bits"]],
                "packed_bytes": -(-self._bits_of(path) // 8),
                "relative_error": [rounded(e) for e in each["error"]],
                "damping": [rounded(d) for d in each["damping"]],
                "dead_inputs": [d.tolist() for d in each["dead"]],
            }
        tokens = {
            self._names[path, i]: counts.astype(int).tolist()
            for path, layers in self._tokens.items() for i, counts in layers.items()
        }  # fmt: skip
        return {
            **self.sizes(),
            "unspent_bits": self.unspent,
            "calibration_tokens": int(self.total_tokens),
            "tokens_per_expert": {str(number): tokens[number] for number in sorted(tokens)},
            "rounded_to_nearest": self.unused(),
            "matrices": matrices,
        }

    def _place(self, path: str) -> str:
        """The path of the block that has the matrix at a path."""
        return max((p for p, _ in self._names if path.startswith(f"{p}/")), key=len)
