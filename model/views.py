"""Runs the frozen blocks once over changed views of every train photo, and over the photos as they are.

usage: views.py WORK_DIR [FIRST_VIEW END_VIEW]

Writes view-0.npy (as they are) and view-1.npy ... (changed), float16 [N, h, w, channels] in the order of the train photos.
"""

import io
import math
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F

from network import FROZEN, LesionNet, normalise
from prepare import CODES, HEIGHT, SEED, WIDTH, Photos

VIEWS = 6
BATCH = 32
WORKERS = 2
ASPECT = WIDTH / HEIGHT


def between(count: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(count) * (high - low) + low


def as_input(photos: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to 0..1, [N, 3, H, W]."""
    return torch.from_numpy(photos.astype(np.float32) / 255).permute(0, 3, 1, 2)


def turn(photos: torch.Tensor) -> torch.Tensor:
    """Any rotation, mirror image, zoom and shift, in true proportions: a lesion has no upright."""
    n = len(photos)
    angle, zoom = between(n, 0, 2 * math.pi), torch.exp(between(n, -0.3, 0.2))
    mirror = torch.randint(0, 2, (n,)) * 2 - 1
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    move = between(n, -0.1, 0.1), between(n, -0.1, 0.1)
    grid = torch.stack(
        [
            torch.stack([cos * mirror, -sin / ASPECT, move[0]], 1),
            torch.stack([sin * ASPECT * mirror, cos, move[1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(grid, list(photos.shape), align_corners=False)
    return F.grid_sample(photos, grid, padding_mode="reflection", align_corners=False)


def recolour(photos: torch.Tensor) -> torch.Tensor:
    """Light, colour cast, saturation and contrast."""
    n = len(photos)
    photos = photos * between(n, 0.75, 1.25).view(n, 1, 1, 1) * (1 + 0.06 * torch.randn(n, 3, 1, 1))
    grey = photos.mean(1, keepdim=True)
    photos = grey + (photos - grey) * between(n, 0.75, 1.25).view(n, 1, 1, 1)
    middle = photos.mean((1, 2, 3), keepdim=True)
    return middle + (photos - middle) * between(n, 0.8, 1.25).view(n, 1, 1, 1)


def corners(photos: torch.Tensor) -> torch.Tensor:
    """Darkens some pictures towards the corners, as a lens does; a few get a dermatoscope's black frame."""
    n = len(photos)
    y, x = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij")
    distance = torch.hypot(x * ASPECT, y).expand(n, 1, HEIGHT, WIDTH)
    shade = between(n, 0, 0.5) * (torch.rand(n) < 0.3)
    photos = photos * (1 - shade.view(n, 1, 1, 1) * (distance / distance.max()) ** 2)
    radius = torch.where(torch.rand(n) < 0.12, between(n, 1.05, 1.5), 9.0).view(n, 1, 1, 1)
    return photos * torch.sigmoid((radius - distance) * 40)


def degrade(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a phone does to a picture: blur, a smaller scale, JPEG's blocks, noise."""
    picture = Image.fromarray(pixels)
    if rng.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8)))
    if rng.random() < 0.2:
        scale = rng.uniform(0.4, 0.9)
        small = picture.resize((int(WIDTH * scale), int(HEIGHT * scale)), Image.Resampling.BILINEAR)
        picture = small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if rng.random() < 0.3:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(30, 90)))
        picture = Image.open(file)
    pixels = np.asarray(picture)
    if rng.random() < 0.2:
        pixels = np.clip(pixels + rng.normal(0, rng.uniform(1, 6), pixels.shape), 0, 255).astype(np.uint8)
    return pixels


def augment(photos: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A changed view of each photo, uint8 in and out."""
    changed = corners(recolour(turn(as_input(photos)))).clamp(0, 1)
    changed = (changed * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return np.stack([degrade(pixels, rng) for pixels in changed])


class FrozenBlocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = LesionNet(len(CODES))
        self.network.load_backbone()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(normalise(pixels), 0, FROZEN).permute(0, 2, 3, 1)


def frozen_session() -> onnxruntime.InferenceSession:
    """The frozen blocks in ONNX Runtime, which takes a third of PyTorch's time for them."""
    file, options = io.BytesIO(), onnxruntime.SessionOptions()
    torch.onnx.export(
        FrozenBlocks().eval(), (torch.zeros(1, 3, HEIGHT, WIDTH),), file, dynamo=False, opset_version=17,
        input_names=["pixels"], output_names=["maps"], dynamic_axes={"pixels": {0: "batch"}, "maps": {0: "batch"}},
    )
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])


def write_view(work: Path, view: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED + view)
    rng, start = np.random.default_rng(SEED + view), time.monotonic()
    session, photos, out = frozen_session(), Photos(work), None
    for i in range(0, len(photos.train), BATCH):
        batch = photos.pixels[photos.train[i : i + BATCH]]
        if view > 0:
            batch = augment(batch, rng)
        maps = session.run(["maps"], {"pixels": as_input(batch).numpy()})[0].astype(np.float16)
        if out is None:
            shape = (len(photos.train), *maps.shape[1:])
            out = np.lib.format.open_memmap(work / f"view-{view}.part", "w+", np.float16, shape)
        out[i : i + len(maps)] = maps
    out.flush()
    (work / f"view-{view}.part").rename(work / f"view-{view}.npy")
    print(f"view {view}: {time.monotonic() - start:.0f} s", flush=True)


def main(work: Path, first: int, end: int) -> None:
    with get_context("spawn").Pool(WORKERS) as pool:
        pool.starmap(write_view, [(work, view) for view in range(first, end)], chunksize=1)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[2:]] or [0, VIEWS + 1]
    main(Path(sys.argv[1]), *numbers)
