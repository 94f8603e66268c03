"""From numbers to colours: one perceptual map a quantity, the same in every figure.

Lightness carries the value and runs evenly (in OKLab, Björn Ottosson 2020) from the page's side to its opposite, so the
maps read alike with every colour vision and in grey; hue only makes them prettier and tells error from rank. On a
light page small is light, on a dark page small is dark: what sticks out is large.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

THEMES = ("light", "dark")
# OKLCH (lightness, chroma, hue in degrees) of the smallest and the largest value.
_ENDS = {
    ("error", "light"): ((0.95, 0.035, 95.0), (0.40, 0.130, 18.0)),
    ("error", "dark"): ((0.27, 0.035, 10.0), (0.90, 0.110, 92.0)),
    ("rank", "light"): ((0.95, 0.025, 170.0), (0.36, 0.090, 268.0)),
    ("rank", "dark"): ((0.27, 0.035, 275.0), (0.90, 0.080, 165.0)),
}


@dataclass(frozen=True)
class Scale:
    """How values are spread over a colour map.

    Attributes:
        quantity: `error` or `rank`.
        low: value of the map's first colour; smaller ones get it too.
        high: value of the last colour; larger ones get it too.
        clipped_low: some values are smaller.
        clipped_high: some are larger.
    """

    quantity: str
    low: float
    high: float
    clipped_low: bool
    clipped_high: bool

    @classmethod
    def of(cls, quantity: str, values: NDArray[np.float64]) -> Scale:
        """A scale for these values (NaN ignored); of many, the outer per cent on either side is clipped.

        One bad matrix among ten thousand would otherwise paint all the others the same colour.
        """
        known = values[np.isfinite(values)]
        if known.size == 0:
            return cls(quantity, 0.0, 1.0, False, False)
        low, high = float(known.min()), float(known.max())
        if known.size >= 400:
            low, high = (float(q) for q in np.quantile(known, (0.01, 0.99)))
        if quantity == "rank":
            low = 0.0
        if high <= low:
            high = low + (1.0 if quantity == "rank" else 1e-4)
        return cls(quantity, low, high, bool(known.min() < low), bool(known.max() > high))

    def position(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Place on the map from 0 to 1; ranks by their square root, for few are large."""
        fraction = np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0)
        return np.sqrt(fraction) if self.quantity == "rank" else fraction

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of the legend's ends and middle."""
        places = (0.0, 0.5, 1.0)
        values = [self.low + (self.high - self.low) * (p * p if self.quantity == "rank" else p) for p in places]
        labels = [f"{value:.0f}" if self.quantity == "rank" else f"{value:.3f}" for value in values]
        labels[0] = ("≤ " if self.clipped_low else "") + labels[0]
        labels[-1] = ("≥ " if self.clipped_high else "") + labels[-1]
        return list(zip(places, labels, strict=True))


def ramp(quantity: str, theme: str, count: int = 256) -> NDArray[np.uint8]:
    """Colours from small to large, evenly spaced in lightness: uint8 `[count, 3]`."""
    first, last = (np.array(end) for end in _ENDS[quantity, theme])
    steps = np.linspace(0, 1, count)[:, None]
    lightness, chroma, hue = (first + steps * (last - first)).T
    chroma = chroma + 0.06 * np.sin(np.pi * steps[:, 0])  # the middle can be more colourful than the ends
    return _srgb(lightness, chroma * np.cos(np.deg2rad(hue)), chroma * np.sin(np.deg2rad(hue)))


def _srgb(lightness: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.uint8]:
    """OKLab to sRGB of 8 bits, clipped to what a screen can show; the constants are OKLab's definition."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        axis=-1,
    ).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded * 255).round().astype(np.uint8)


def paint(scale: Scale, values: NDArray[np.float64], theme: str) -> NDArray[np.uint8]:
    """An image of the values, one pixel each, transparent for NaN: uint8 `[rows, columns, 4]`."""
    known = np.isfinite(values)
    index = (scale.position(np.where(known, values, scale.low)) * 255).round().astype(np.intp)
    alpha = np.where(known, 255, 0).astype(np.uint8)
    return np.concatenate([ramp(scale.quantity, theme)[index], alpha[..., None]], axis=-1)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An RGBA image as a PNG file."""
    stream = io.BytesIO()
    imsave(stream, pixels, format="png")
    return stream.getvalue()
