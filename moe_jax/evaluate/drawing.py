"""Colours, smoothing and files of all figures. The same figure gives the same file."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moe_jax.errors import UserError, nearest

GRID = "#e8e9ee"
# Metadata of a file by its format: without a date, so that the same figure is the same file.
FORMATS = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
HELP = "formats of the figures: some of png, svg, pdf"  # of the flag --figures of a program that draws
# Text of a PDF stays text, in fonts that journals accept; identifiers in an SVG do not change from run to run.
STYLE = {"pdf.fonttype": 42, "svg.hashsalt": "moe_jax"}


def plain(text: str) -> str:
    """A text with its dollar signs escaped, since matplotlib reads text between two of them as a formula."""
    return text.replace("$", r"\$")


def smooth(y: Float[np.ndarray, " R"], decay: float) -> Float[np.ndarray, " R"]:
    """Two-sided exponential mean of each value's neighbours, Σ decay^|i−j| y_j / Σ decay^|i−j|, which does not lag.

    NaN values are left out.
    """
    known = ~np.isnan(y)
    values = y[known]

    def sums(values):
        total, out = 0.0, []
        for value in values:
            total = decay * total + value
            out.append(total)
        return np.array(out)

    around = lambda values: sums(values) + sums(values[::-1])[::-1] - values
    out = np.full_like(y, np.nan)
    out[known] = around(values) / around(np.ones_like(values))
    return out


# --- files -----------------------------------------------------------------------------------------------------------


def check_formats(formats: Sequence[str], flag: str = "--figures") -> tuple[str, ...]:
    """The formats of a flag, each once. Raises UserError for one that is not in `FORMATS`, and for none."""
    for name in formats:
        if name not in FORMATS:
            rule = f"must be some of {', '.join(FORMATS)}"
            raise UserError(f"{flag}={','.join(formats)}: {rule}; {nearest(name, FORMATS)}")
    if not formats:
        raise UserError(f"{flag}=: names no format; nearest valid: png")
    return tuple(dict.fromkeys(formats))


def save(figure: Figure, path: Path | str, formats: Sequence[str] = ("png",)) -> None:
    """Writes a figure to `<path>.<format>`. The same figure gives the same bytes. path: has no extension."""
    with matplotlib.rc_context(STYLE):
        for name in formats:
            figure.savefig(f"{path}.{name}", format=name, dpi=160, metadata=FORMATS[name])
