"""Changes a batch of photos at random: how a lesion may be held, lit, framed and photographed. Cheap enough to be done
anew for every batch.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from prepare import HEIGHT, WIDTH

ASPECT = WIDTH / HEIGHT
# Share of the views that are squares, and that are upright. All are squeezed to the input's 4:3, as in use.
SQUARE, UPRIGHT = 0.15, 0.15


def between(count: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(count) * (high - low) + low


def as_input(photos: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to 0..1, [N, 3, H, W], in channels-last order."""
    return torch.from_numpy(np.array(photos)).permute(0, 3, 1, 2).float() / 255


def turn(photos: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Any rotation, mirror image, zoom, shift and proportions of the picture, cut from the photo in true proportions:
    a lesion has no upright. Some views lie smaller in a dark frame. [N, 3, height, width]."""
    n = len(photos)
    kind = torch.rand(n)
    aspect = torch.where(kind < SQUARE, 1.0, torch.where(kind < SQUARE + UPRIGHT, 1 / ASPECT, ASPECT))
    aspect = aspect * torch.exp(0.06 * torch.randn(n))
    # Half of the view's sides, in halves of the photo's height; views of every shape have the same area.
    area, zoom = torch.sqrt(aspect * ASPECT), torch.exp(between(n, -0.35, 0.15))
    across, down = area * zoom, area / aspect * zoom
    angle, mirror = between(n, 0, 2 * math.pi), torch.randint(0, 2, (n,)) * 2 - 1
    # Few views are exactly upright or level, but most pictures in use are.
    angle = torch.where(torch.rand(n) < 0.4, (angle / (math.pi / 2)).round() * (math.pi / 2), angle)
    cos, sin = (part.view(n, 1, 1) for part in (torch.cos(angle), torch.sin(angle)))

    inset = torch.where(torch.rand(n) < 0.1, between(n, 0.65, 0.95), 1.0).view(n, 1, 1)
    u = (torch.linspace(-1, 1, width) * (1 - 1 / width)).view(1, 1, width) / inset
    v = (torch.linspace(-1, 1, height) * (1 - 1 / height)).view(1, height, 1) / inset
    x, y = u * (across * mirror).view(n, 1, 1), v * down.view(n, 1, 1)
    left, up = between(n, -0.12, 0.12).view(n, 1, 1), between(n, -0.12, 0.12).view(n, 1, 1)
    grid = torch.stack([(cos * x - sin * y) / ASPECT + left, sin * x + cos * y + up], 3)
    views = F.grid_sample(photos, grid, padding_mode="reflection", align_corners=False)
    outside = (torch.maximum(u.abs(), v.abs()) > 1).unsqueeze(1)
    return torch.where(outside, between(n, 0, 0.1).view(n, 1, 1, 1), views)


def recolour(photos: torch.Tensor) -> torch.Tensor:
    """Light, colour cast, saturation and contrast."""
    n = len(photos)
    photos = photos * between(n, 0.7, 1.3).view(n, 1, 1, 1) * (1 + 0.05 * torch.randn(n, 3, 1, 1))
    grey = photos.mean(1, keepdim=True)
    photos = grey + (photos - grey) * between(n, 0.75, 1.25).view(n, 1, 1, 1)
    middle = photos.mean((1, 2, 3), keepdim=True)
    return middle + (photos - middle) * between(n, 0.8, 1.25).view(n, 1, 1, 1)


def corners(photos: torch.Tensor) -> torch.Tensor:
    """Darkens towards the corners, as a lens does, or puts a dermatoscope's round black frame around."""
    n, _, height, width = photos.shape
    y, x = torch.linspace(-1, 1, height).view(1, 1, height, 1), torch.linspace(-1, 1, width).view(1, 1, 1, width)
    distance = torch.hypot(x * ASPECT, y)
    framed = torch.rand(n) < 0.3
    shade = (between(n, 0, 0.5) * ~framed).view(n, 1, 1, 1)
    radius = torch.where(framed, between(n, 0.95, 1.5), 9.0).view(n, 1, 1, 1)
    return photos * (1 - shade * (distance / distance.max()) ** 2) * torch.sigmoid((radius - distance) * 40)


def blur(photos: torch.Tensor) -> torch.Tensor:
    deviation = float(between(1, 0.4, 1.8))
    kernel = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
    padded = F.pad(photos, (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def coarsen(photos: torch.Tensor) -> torch.Tensor:
    """A photo of fewer pixels."""
    size, scale = photos.shape[2:], float(between(1, 0.4, 0.9))
    small = F.interpolate(photos, scale_factor=scale, mode="bilinear", antialias=True)
    return F.interpolate(small, size=size, mode="bilinear")


def compress(photos: torch.Tensor) -> torch.Tensor:
    """JPEG's blocks."""
    pictures = []
    for pixels in (photos.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(torch.randint(30, 90, ())))
        pictures.append(np.asarray(Image.open(file)))
    return as_input(np.stack(pictures))


def grain(photos: torch.Tensor) -> torch.Tensor:
    return photos + between(len(photos), 0, 0.025).view(-1, 1, 1, 1) * torch.randn(photos.shape)


def augment(photos: np.ndarray, height: int = HEIGHT, width: int = WIDTH, rough: float = 1.0) -> torch.Tensor:
    """A changed view of each photo: uint8 [N, H, W, 3] to 0..1, [N, 3, height, width]. Of a share `rough` light,
    colour and sharpness may be changed too."""
    views = turn(as_input(photos), height, width)
    roughened = torch.rand(len(views)) < rough
    for change, share in ((recolour, 0.9), (corners, 0.35), (blur, 0.2), (coarsen, 0.15), (compress, 0.2), (grain, 0.2)):
        chosen = roughened & (torch.rand(len(views)) < share)
        if chosen.any():
            views[chosen] = change(views[chosen])
    return views.clamp(0, 1)
