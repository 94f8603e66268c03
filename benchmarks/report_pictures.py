"""Take the pictures of `docs/report.md`: reports of compressed folders as a browser shows them.

    python benchmarks/report_pictures.py FOLDER... --out docs/images

Needs chromium. A folder's name up to `-s2` names its picture.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import browser
from milo.checkpoint.compressed import CompressedCheckpoint
from milo.report.data import gather
from milo.report.page import render
from milo.report.plots import write_figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with browser.Browser(browser.find()) as chromium, tempfile.TemporaryDirectory() as scratch:
        for folder in arguments.folders:
            name, data = folder.name.removesuffix("-s2"), gather(CompressedCheckpoint(folder))
            page = Path(scratch) / f"{name}.html"
            page.write_text(render(data), encoding="utf-8")
            for suffix, width, dark in (("", 1180, False), ("_phone", 390, True)):
                picture = arguments.out / f"report_{name}{suffix}.png"
                chromium.open(page, width, dark)
                chromium.screenshot(picture)
                _shrink(picture, picture)
            _shrink(arguments.out / f"report_{name}.png", arguments.out / f"report_{name}_top.png", 860)
            figures = write_figures(data, Path(scratch) / name)
            for figure in figures:
                if figure.stem.startswith("expert_"):
                    figure.replace(arguments.out / f"{name}_{figure.name}")


def _shrink(picture: Path, target: Path, height: int | None = None) -> None:
    """256 colours are enough for a page of few, and a third of the bytes; `height` keeps the top only."""
    with Image.open(picture) as image:
        page = image.convert("RGB").crop((0, 0, image.width, height or image.height))
        page.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
