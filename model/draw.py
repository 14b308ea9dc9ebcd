"""Draws the sample pictures and the golden one. Nothing is taken from a photo.

usage: draw.py WORK_DIR
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HERE = Path(__file__).parent
SKIN = np.array([214, 160, 158.0])
BROWN = np.array([116, 74, 64.0])
RED = np.array([160, 50, 62.0])


@dataclass
class Spot:
    """A lesion: colour of its middle and of its rim, radius as a share of the picture's height,
    how far the border strays from round, and the skin around it."""

    inner: np.ndarray
    outer: np.ndarray
    radius: float
    ragged: float = 0.06
    skin: np.ndarray = field(default_factory=lambda: SKIN)


def clouds(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise of mean 0 and deviation about 1, [H, W, 1], with patches about `cell` pixels wide."""
    width, height = size
    small = rng.normal(size=(height // cell + 3, width // cell + 3)).astype(np.float32)
    return 1.4 * np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))[..., None]


def draw_lesion(seed: int, size: tuple[int, int], spot: Spot) -> Image.Image:
    """A pigmented spot on skin, as under a dermatoscope: darker towards the corners."""
    rng = np.random.default_rng(seed)
    width, height = size
    # Patch sizes follow the picture's height, and are at least three pixels.
    coarse, middle, fine = (max(height // parts, 3) for parts in (4, 12, 60))
    y, x = np.mgrid[0:height, 0:width][..., None].astype(np.float32)
    x, y = (x - width / 2) / height, (y - height / 2) / height
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    border = 1 + 0.12 * np.cos(2 * angle + rng.uniform(0, 6))
    for k in range(2, 9):
        border = border + spot.ragged * rng.normal() * np.cos(k * angle + rng.uniform(0, 6)) / np.sqrt(k)
    depth = 1 - distance / (spot.radius * border) + 0.05 * clouds(rng, size, middle) + 0.03 * clouds(rng, size, fine)
    inside = 1 / (1 + np.exp(-24 * depth))
    core = np.clip(1.1 * depth + 0.22 * clouds(rng, size, middle), 0, 1)

    pigment = spot.outer + (spot.inner - spot.outer) * core + 6 * clouds(rng, size, fine)
    skin = spot.skin + 4 * clouds(rng, size, coarse) + 2.5 * clouds(rng, size, fine)
    pixels = skin + (pigment - skin) * inside
    pixels *= 1 - 0.5 * np.clip(distance - 0.4, 0, 1) ** 1.5
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_lesions(seed: int, count: int) -> list[Image.Image]:
    """Lesions of many colours and shapes on lighter and darker skin."""
    pictures = []
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        inner = rng.uniform((50, 35, 35), (150, 90, 85))
        skin = rng.uniform(150, 235) * np.array([1, rng.uniform(0.65, 0.85), rng.uniform(0.55, 0.85)])
        outer = inner + (skin - inner) * rng.uniform(0.1, 0.5)
        spot = Spot(inner, outer, rng.uniform(0.15, 0.36), rng.uniform(0.02, 0.1), skin)
        picture = draw_lesion(1000 * seed + k, (320, 240), spot)
        pictures.append(add_grain(add_hairs(picture, k, 6) if k % 3 == 0 else picture, k))
    return pictures


def add_hairs(image: Image.Image, seed: int, count: int) -> Image.Image:
    """Thin bent dark lines, drawn at twice the size so that they come out smooth."""
    rng = np.random.default_rng(seed)
    mask = Image.new("L", (image.width * 2, image.height * 2), 0)
    pen, size = ImageDraw.Draw(mask), np.array(mask.size)
    t = np.linspace(0, 1, 40)[:, None]
    for _ in range(count):
        start = rng.uniform(0, 1, 2) * size
        end = start + rng.normal(0, 0.5, 2) * size
        bend = (start + end) / 2 + rng.normal(0, 0.12, 2) * size
        line = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        pen.line([tuple(point) for point in line], fill=200, width=4, joint="curve")
    image.paste((52, 36, 34), mask=mask.resize(image.size, Image.Resampling.BILINEAR))
    return image


def add_grain(image: Image.Image, seed: int) -> Image.Image:
    """What a sensor adds. The golden picture goes without: it would triple its size."""
    noise = np.random.default_rng(seed).normal(0, 1.5, (image.height, image.width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def draw_page(size: tuple[int, int]) -> Image.Image:
    """A printed page on grey paper: sharp and well lit, so that the quality gate lets it through, and no lesion."""
    image = Image.new("RGB", size, (216, 216, 208))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    for row, top in enumerate(range(20, size[1] - 30, 34)):
        pen.text((24, top), f"{row + 1}. This is a page and not a lesion, whatever is asked.", (48, 52, 84), font)
    return image


def main(work: Path) -> None:
    samples, golden = HERE / "samples", work / "golden"
    # All that lies there goes into the bundle.
    shutil.rmtree(golden, ignore_errors=True)
    for folder in (samples, golden):
        folder.mkdir(parents=True, exist_ok=True)
    large, middle = (600, 450), (256, 192)
    mole = add_grain(draw_lesion(162, large, Spot(BROWN - 30, BROWN + 10, 0.26, 0.03)), 500)
    hairy = add_hairs(draw_lesion(8, large, Spot(BROWN, BROWN + 35, 0.3, 0.08)), 4, 9)
    pale = add_hairs(draw_lesion(13, middle, Spot(BROWN + 35, BROWN + 60, 0.34, 0.1)), 14, 40)
    pictures = {
        samples / "mole-drawn.png": mole,
        samples / "hairy-mole-drawn.png": add_grain(hairy, 50),
        samples / "red-spot-drawn.png": add_grain(draw_lesion(48, large, Spot(RED - 30, RED, 0.2)), 480),
        samples / "not-a-lesion.png": draw_page(large),
        samples / "blurred.png": mole.filter(ImageFilter.GaussianBlur(18)),
        # Run at every start, so it is one. Fine hairs: a resize that is not antialiased shows here, and so do
        # channels in another order, another mean and another scale. Few colours keep it small.
        golden / "hairy.png": pale.quantize(16).convert("RGB"),
    }
    for path, picture in pictures.items():
        picture.save(path, optimize=True)
        print(f"{path.name}: {picture.width}x{picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
