"""Trains the network from scratch on the `fit` part.

usage: train.py WORK_DIR [EPOCHS]
"""

import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from network import LesionNet, normalise
from prepare import CODES, SEED, load

EPOCHS = 24
BATCH = 64
RATE = 3e-3
# 0 leaves the classes as frequent as they are, 1 balances them fully.
BALANCE = 0.5
# Share of that weight which stays in the answers. On the held-out part, half of it costs next to no accuracy,
# improves calibration, and fewer melanomas are called benign.
LEAN = 0.5
# The photos are 4:3 and squeezed to a square; a rotation must happen in true proportions.
ASPECT = 4 / 3


def between(count: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(count) * (high - low) + low


def augment(photos: torch.Tensor) -> torch.Tensor:
    """Any rotation, mirror image, zoom, shift and a change of light and colour. A lesion has no upright."""
    n = len(photos)
    angle, zoom = between(n, 0, 2 * math.pi), torch.exp(between(n, -0.25, 0.2))
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
    photos = F.grid_sample(photos, grid, padding_mode="reflection", align_corners=False)

    photos = photos * between(n, 0.85, 1.15).view(n, 1, 1, 1)
    photos = photos * (1 + 0.06 * torch.randn(n, 3, 1, 1))
    grey = photos.mean(1, keepdim=True)
    photos = grey + (photos - grey) * between(n, 0.75, 1.25).view(n, 1, 1, 1)
    middle = photos.mean((1, 2, 3), keepdim=True)
    photos = middle + (photos - middle) * between(n, 0.8, 1.25).view(n, 1, 1, 1)
    return photos.clamp(0, 1)


def as_input(photos) -> torch.Tensor:
    return torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255


def predict(network: torch.nn.Module, photos) -> tuple[torch.Tensor, torch.Tensor]:
    """Both outputs of the network over an array of photos."""
    network.eval()
    with torch.no_grad():
        parts = [network(normalise(as_input(photos[i : i + 256]))) for i in range(0, len(photos), 256)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def main(work: Path, epochs: int) -> None:
    torch.manual_seed(SEED)
    photos, labels = load(work, "fit")
    held, held_labels = (load(work, "held")[0], torch.from_numpy(load(work, "held")[1]))
    labels = torch.from_numpy(labels)
    counts = torch.bincount(labels, minlength=len(CODES)).float()
    weights = counts**-BALANCE
    weights = weights * counts.sum() / (weights * counts).sum()

    network = LesionNet(len(CODES)).to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    steps = len(photos) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        network.train()
        start, total = time.monotonic(), 0.0
        for chosen in torch.randperm(len(photos))[: steps * BATCH].view(steps, BATCH):
            batch = normalise(augment(as_input(photos[chosen.numpy()])))
            logits, _ = network(batch.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[chosen], weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        logits, _ = predict(network, held)
        accuracy = (logits.argmax(1) == held_labels).float().mean().item()
        print(
            f"epoch {epoch + 1:2}: loss {total / steps:.3f}, held-out loss "
            f"{F.cross_entropy(logits, held_labels, weights).item():.3f}, accuracy {accuracy:.3f}, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    # A weighted loss answers as if the rare classes were more frequent; the bias takes the rest of that back.
    with torch.no_grad():
        network.head.bias -= (1 - LEAN) * torch.log(weights)
    torch.save(network.state_dict(), work / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else EPOCHS)
