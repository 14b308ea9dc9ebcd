"""Draws pictures that show no lesion, for fitting and judging the out-of-distribution score.

Nothing is written: the same seed always gives the same pictures. Whole families are held out of fitting, so the
judgement is about kinds of pictures that the score has never met, if still drawn ones.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = (400, 300)
PER_FAMILY = 100
SKINS = np.array([(246, 218, 200), (228, 184, 156), (200, 148, 116), (160, 108, 78), (112, 72, 52), (70, 46, 36)])
WORDS = "the photo of a page with some words and 0123456789 figures, printed for nobody to read at all".split()

Rng = np.random.Generator


def colour(rng: Rng) -> tuple[int, int, int]:
    return tuple(int(255 * part) for part in colorsys.hsv_to_rgb(*rng.uniform((0, 0, 0.1), 1)))


def blank(rng: Rng) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", SIZE, colour(rng))
    return image, ImageDraw.Draw(image)


def as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]][..., None].astype(np.float32)
    return x / SIZE[1], y / SIZE[1]


def smooth(rng: Rng, cell: int, channels: int = 3) -> np.ndarray:
    """Noise of about one deviation with patches of `cell` pixels."""
    shape = (SIZE[1] // cell + 3, SIZE[0] // cell + 3)
    layers = [Image.fromarray(rng.normal(size=shape).astype(np.float32)) for _ in range(channels)]
    return np.stack([np.asarray(layer.resize(SIZE, Image.Resampling.BICUBIC)) for layer in layers], 2)


def noise(rng: Rng) -> Image.Image:
    return as_image(np.array(colour(rng)) + rng.uniform(20, 90) * rng.normal(size=(SIZE[1], SIZE[0], 3)))


def clouds(rng: Rng) -> Image.Image:
    cells = rng.integers(4, 90, 2)
    return as_image(np.array(colour(rng)) + sum(rng.uniform(15, 50) * smooth(rng, int(cell)) for cell in cells))


def gradient(rng: Rng) -> Image.Image:
    x, y = grid()
    along = np.clip(np.cos(turn := rng.uniform(0, 6)) * (x - 0.6) + np.sin(turn) * (y - 0.5) + 0.5, 0, 1)
    return as_image(np.array(colour(rng)) * along + np.array(colour(rng)) * (1 - along) + rng.normal(0, 2, along.shape))


def text(rng: Rng) -> Image.Image:
    paper = int(rng.integers(170, 255))
    image = Image.new("RGB", SIZE, (paper, paper, int(paper * rng.uniform(0.9, 1))))
    pen, size = ImageDraw.Draw(image), int(rng.integers(11, 40))
    for top in range(int(rng.integers(2, 30)), SIZE[1], int(size * 1.4)):
        line = " ".join(rng.choice(WORDS, 14))
        pen.text((rng.integers(2, 40), top), line, (30, 30, int(rng.integers(20, 120))), ImageFont.load_default(size))
    return image.rotate(rng.normal(0, 8), Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0)))


def stripes(rng: Rng) -> Image.Image:
    x, y = grid()
    wave = np.sin(rng.uniform(12, 150) * (np.cos(turn := rng.uniform(0, 3)) * x + np.sin(turn) * y))
    if rng.random() < 0.5:
        wave = np.sign(wave)
    return as_image(np.array(colour(rng)) + (wave + 1) / 2 * (np.array(colour(rng)) - np.array(colour(rng))))


def checks(rng: Rng) -> Image.Image:
    x, y = grid()
    side = rng.uniform(0.02, 0.25)
    odd = (np.floor(x / side) + np.floor(y / side)) % 2
    return as_image(np.array(colour(rng)) * odd + np.array(colour(rng)) * (1 - odd))


def bars(rng: Rng) -> Image.Image:
    image, pen = Image.new("RGB", SIZE, (250, 250, 250)), None
    pen, count, fill = ImageDraw.Draw(image), int(rng.integers(4, 14)), colour(rng)
    for i in range(count):
        left, height = 40 + i * 340 // count, rng.integers(20, 240)
        pen.rectangle((left, 270 - height, left + 250 // count, 270), colour(rng) if rng.random() < 0.3 else fill)
    pen.line([(36, 20), (36, 270), (390, 270)], (0, 0, 0), 2)
    return image


def shapes(rng: Rng) -> Image.Image:
    image, pen = blank(rng)
    for _ in range(rng.integers(4, 25)):
        x, y, w, h = rng.uniform((0, 0, 10, 10), (400, 300, 160, 160))
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        if rng.random() < 0.5:
            pen.rectangle(box, colour(rng))
        else:
            pen.polygon([tuple(p) for p in rng.uniform((x - w, y - h), (x + w, y + h), (3, 2))], colour(rng))
    return image


def skin(rng: Rng) -> Image.Image:
    """Skin without anything on it, lit from one side."""
    x, y = grid()
    base = SKINS[rng.integers(len(SKINS))] + rng.normal(0, 8, 3)
    light = 1 + rng.uniform(-0.25, 0.25) * (x - 0.6) + rng.uniform(-0.25, 0.25) * (y - 0.5)
    pixels = base * light + rng.uniform(1, 4) * smooth(rng, 6, 1) + rng.uniform(1, 5) * smooth(rng, 60)
    return as_image(pixels + rng.normal(0, rng.uniform(0.5, 4), (SIZE[1], SIZE[0], 1)))


def landscape(rng: Rng) -> Image.Image:
    x, y = grid()
    pixels = np.array([150, 190, 235.0]) * rng.uniform(0.6, 1.1) - 60 * y + 8 * smooth(rng, 40, 1)
    for level in np.sort(rng.uniform(0.3, 0.9, 3)):
        ridge = level + 0.08 * smooth(rng, int(rng.integers(20, 80)), 1)[:1]
        ground = np.array([rng.uniform(30, 110), rng.uniform(70, 150), rng.uniform(20, 80)]) + 10 * smooth(rng, 4, 1)
        pixels = np.where(y > ridge, ground, pixels)
    return as_image(pixels)


def curves(rng: Rng) -> Image.Image:
    image = Image.new("RGB", SIZE, (255, 255, 255) if rng.random() < 0.7 else (24, 26, 34))
    pen = ImageDraw.Draw(image)
    for k in range(0, 400, 40):
        pen.line([(k, 0), (k, 300)], (128, 128, 128))
        pen.line([(0, k), (400, k)], (128, 128, 128))
    for _ in range(rng.integers(1, 6)):
        heights = 150 + np.cumsum(rng.normal(0, 14, 50))
        pen.line([(8 * i, float(h)) for i, h in enumerate(heights)], colour(rng), int(rng.integers(2, 5)))
    return image


def windows(rng: Rng) -> Image.Image:
    """A screen: panels, buttons and lines of text."""
    image, pen = blank(rng)
    for _ in range(rng.integers(2, 6)):
        x, y = rng.integers(0, 260), rng.integers(0, 200)
        pen.rounded_rectangle((x, y, x + rng.integers(90, 240), y + rng.integers(60, 200)), 8, (245, 245, 248), (90, 90, 90))
        for row in range(4):
            pen.text((x + 8, y + 8 + 16 * row), " ".join(rng.choice(WORDS, 3)), (40, 40, 60), ImageFont.load_default(12))
        pen.rounded_rectangle((x + 8, y + 76, x + 70, y + 94), 5, colour(rng))
    return image


def wood(rng: Rng) -> Image.Image:
    x, y = grid()
    rings = np.sin(rng.uniform(20, 60) * (y + 0.15 * smooth(rng, 120, 1)) + 3 * smooth(rng, 60, 1))
    base = np.array([150, 100, 60]) * rng.uniform(0.6, 1.4)
    return as_image(base * (1 + 0.2 * rings) + 6 * smooth(rng, 3, 1))


def plaid(rng: Rng) -> Image.Image:
    x, y = grid()
    pixels = np.array(colour(rng)) / 2 + 60
    for axis in (x, y):
        for _ in range(3):
            band = np.sin(rng.uniform(15, 60) * axis + rng.uniform(0, 6)) > rng.uniform(-0.2, 0.8)
            pixels = pixels + 0.35 * band * (np.array(colour(rng)) - pixels)
    weave = 8 * np.sin(400 * x) * np.sin(400 * y)
    return as_image(pixels + weave)


def face(rng: Rng) -> Image.Image:
    """A drawn face: skin's colours, eyes, a mouth and hair."""
    image, pen = blank(rng)
    tone = tuple(int(part) for part in SKINS[rng.integers(len(SKINS))])
    x, y, w, h = 200 + rng.integers(-40, 40), 150 + rng.integers(-20, 20), rng.integers(60, 110), rng.integers(90, 130)
    pen.ellipse((x - w * 1.1, y - h * 1.2, x + w * 1.1, y + h * 0.6), tuple(int(p) for p in rng.integers(10, 120, 3)))
    pen.ellipse((x - w, y - h, x + w, y + h), tone)
    for side in (-1, 1):
        pen.ellipse((x + side * w * 0.4 - 16, y - 34, x + side * w * 0.4 + 16, y - 14), (250, 250, 250))
        pen.ellipse((x + side * w * 0.4 - 7, y - 31, x + side * w * 0.4 + 7, y - 17), (40, 40, 40))
    pen.arc((x - w * 0.4, y + 10, x + w * 0.4, y + 66), 10, 170, (150, 40, 50), 6)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))


def bricks(rng: Rng) -> Image.Image:
    image = Image.new("RGB", SIZE, (190, 186, 178))
    pen, height = ImageDraw.Draw(image), int(rng.integers(16, 50))
    base = np.array([150, 70, 55]) * rng.uniform(0.7, 1.3)
    for row, top in enumerate(range(0, SIZE[1], height)):
        for left in range(-height * (row % 2 + 1), SIZE[0], int(2.4 * height)):
            fill = tuple(int(part) for part in np.clip(base + rng.normal(0, 12, 3), 0, 255))
            pen.rectangle((left + 2, top + 2, left + int(2.4 * height) - 2, top + height - 2), fill)
    return as_image(np.asarray(image) + 7 * smooth(rng, 3, 1))


FITTED = [noise, clouds, gradient, text, stripes, checks, bars, shapes, skin, landscape]
HELD_OUT = [curves, windows, wood, plaid, face, bricks]


def draw(families: list, seed: int, each: int = PER_FAMILY) -> list[Image.Image]:
    """`each` pictures of every family, one family after the other."""
    return [family(np.random.default_rng((seed, i, k))) for i, family in enumerate(families) for k in range(each)]
