"""Images to make tokens of: emoji of packages of npm, drawn as pixels, and the digits of scikit-learn."""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from moe_jax.errors import UserError

# Package of npm: version, licence, SHA-256 of the file that `npm pack` fetches.
PACKAGES = {
    "noto": ("1.2.9", "Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "Apache-2.0", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "twemoji": ("1.2.5", "CC-BY-4.0", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "emojione": ("1.2.3", "CC-BY-4.0", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "fluent-emoji": ("1.2.7", "MIT", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "fluent-emoji-flat": ("1.2.6", "MIT", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
}
TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


class Images(NamedTuple):
    """Images with their names; of those with the same `groups` all are held out or none."""

    names: list[str]
    groups: list[str]
    pixels: UInt8[np.ndarray, "N S S 3"]

    def where(self, which: np.ndarray) -> "Images":
        """The images at which `which`, [N] bool, is True."""
        keep = np.flatnonzero(which)
        return Images([self.names[i] for i in keep], [self.groups[i] for i in keep], self.pixels[keep])


def fetched(folder: Path) -> dict[str, Path]:
    """The files of `PACKAGES` in a folder, fetched where missing. Raises UserError for another content, and where they
    cannot be fetched."""
    files = {}
    if not folder.is_dir():
        raise UserError(f"--packages={folder}: no such folder")
    for name, (version, _, digest) in PACKAGES.items():
        files[name] = path = folder / f"iconify-json-{name}-{version}.tgz"
        if not path.is_file():
            command = ["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"]
            try:
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError) as error:
                hint = f"{folder} lacks {path.name}; fetch it elsewhere and name its folder with --packages"
                raise UserError(f"{' '.join(command)}: {error}; {hint}") from None
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise UserError(f"{path}: is not @iconify-json/{name}@{version}, whose SHA-256 is {digest}")
    return files


def content(package: Path, name: str) -> dict[str, Any]:
    """The JSON file `name` of a package, {} if it has none."""
    with tarfile.open(package) as archive:
        found = [member for member in archive.getmembers() if member.name == f"package/{name}"]
        return json.load(archive.extractfile(found[0])) if found else {}


def characters(packages: Iterable[Path]) -> dict[str, str]:
    """The character that an icon of a name draws, as code points: {"thumbs-up": "1f44d"}, by all packages together."""
    known: dict[str, str] = {}
    for package in packages:
        for code, name in sorted(content(package, "chars.json").items(), reverse=True):
            if not code.startswith("e"):  # private use, for drawings of no character
                known.setdefault(name, code)
    return known


def group_of(code: str) -> str:
    """Returns what all drawings of a character and its variants share: its first code point, or the two of a flag."""
    first, *rest = code.split("-")
    return "-".join([first, *rest[:1]]) if first.startswith("1f1") else first


def svg_of(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The SVG of an entry of icons.json."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(name, defaults.get(name, 16)) for name in ("width", "height"))
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {head} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def drawn(svg: str, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """An SVG as pixels on white, in the middle of a square."""
    import resvg_py
    from PIL import Image

    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff"))
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    square = Image.new("RGB", (size, size), "white")
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(square)


def emoji(folder: Path, size: int) -> Images:
    """The icons that draw a known character without a skin tone, in the order of a hash of their names."""
    files = fetched(folder)
    known, found = characters(files.values()), []
    for prefix, file in files.items():
        icons = content(file, "icons.json")
        for name, icon in icons["icons"].items():
            code = known.get(name)
            if code and not icon.get("hidden") and not TONES & set(code.split("-")):
                found.append((f"{prefix}:{name}", group_of(code), svg_of(icon, icons)))
    found.sort(key=lambda one: hashlib.blake2b(one[0].encode()).digest())
    with ThreadPoolExecutor() as threads:
        pictures = list(tqdm(threads.map(lambda one: drawn(one[2], size), found), "images", len(found), unit="image"))
    return Images([name for name, *_ in found], [group for _, group, _ in found], np.stack(pictures))


def digits() -> Images:
    """The 1,797 digits of scikit-learn, each a group of its own."""
    from sklearn.datasets import load_digits

    grey = load_digits().images
    pixels = np.repeat((grey * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    names = [f"digit:{i}" for i in range(len(grey))]
    return Images(names, names, pixels)
