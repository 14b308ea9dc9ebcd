"""Fits everything behind the frozen blocks: once on all train photos, and for each calibration fold without it.

usage: train.py WORK_DIR [JOB ...]      a job is `all` or the number of the fold that is left out

Writes weights-JOB.pt. The class weights of the sampling go into it, since they shift the logits.
"""

import math
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from network import FROZEN, Convolution, LesionNet
from prepare import CODES, SEED, Photos
from views import VIEWS, WORKERS

BATCH = 32
# Steps over all train photos; a fold takes its share of them. The rate rises over WARM_UP steps, stays, and falls
# to nothing over the last share of FALL.
STEPS, WARM_UP, FALL = 800, 50, 0.4
RATE, HEAD_RATE = 8e-4, 3e-3
# A class is drawn by its count to this power: 1 as frequent as it is, 0 all alike.
BALANCE = 0.5
SMOOTHING = 0.05
# Each fold costs two thirds of the training again; one holds 2,309 photos, which is enough for three numbers.
CALIBRATION_FOLDS = [0]
DROPOUT = 0.25


def trained_parameters(network: LesionNet) -> list[torch.nn.Parameter]:
    """Those behind the frozen blocks. Depthwise filters stay too: nine tenths of the work for a hundredth of the weights."""
    for parameter in network.blocks.parameters():
        parameter.requires_grad_(False)
    for block in network.blocks[FROZEN:]:
        for layer in block.modules():
            if isinstance(layer, Convolution):
                layer[0].weight.requires_grad_(layer[0].groups == 1)
                layer[1].requires_grad_(True)
                layer[1].momentum = 0.03
    return [parameter for parameter in network.blocks.parameters() if parameter.requires_grad]


def sampling(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chance of each photo, and for each class how much more often it is drawn than it occurs."""
    counts = np.bincount(labels, minlength=len(CODES))
    drawn = counts**BALANCE / (counts**BALANCE).sum()
    return (drawn / counts)[labels], drawn / (counts / counts.sum())


def rate(step: int, steps: int) -> float:
    return min(step / WARM_UP, 1.0, max(steps - step, 0) / (FALL * steps))


def fit(work: Path, job: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng, start = np.random.default_rng(SEED), time.monotonic()
    photos = Photos(work)
    labels, fold = photos.labels[photos.train], photos.fold[photos.train]
    chosen = np.flatnonzero(fold != int(job)) if job != "all" else np.arange(len(labels))
    views = [np.load(work / f"view-{view}.npy", mmap_mode="r") for view in range(VIEWS + 1)]
    chance, excess = sampling(labels[chosen])

    network = LesionNet(len(CODES))
    network.load_backbone()
    network = network.to(memory_format=torch.channels_last)
    groups = [{"params": trained_parameters(network)}, {"params": network.head.parameters(), "lr": HEAD_RATE, "weight_decay": 0.0}]
    for i, block in enumerate(network.blocks[FROZEN:-1]):
        block.drop = 0.1 * (i + 1) / 10
    optimizer = torch.optim.AdamW(groups, RATE, weight_decay=0.05)
    steps = round(STEPS * len(chosen) / len(labels))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    network.train()
    total = 0.0
    for step in range(1, steps + 1):
        picked = rng.choice(chosen, BATCH, replace=False, p=chance)
        maps = np.stack([views[view][photo] for view, photo in zip(rng.integers(0, VIEWS + 1, BATCH), picked)])
        x = torch.from_numpy(maps).float().permute(0, 3, 1, 2)
        pooled = network(x, FROZEN).mean((2, 3))
        logits = network.head(F.dropout(pooled, DROPOUT))
        loss = F.cross_entropy(logits, torch.from_numpy(labels[picked]), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0 or step == steps:
            print(f"{job}: step {step} of {steps}, loss {total / 50:.3f}, {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
            if not math.isfinite(loss.item()):
                raise ValueError("the loss is no number")
    torch.save({"network": network.state_dict(), "excess": torch.from_numpy(excess).float()}, work / f"weights-{job}.pt")


def main(work: Path, jobs: list[str]) -> None:
    with get_context("spawn").Pool(WORKERS) as pool:
        pool.starmap(fit, [(work, job) for job in jobs], chunksize=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["all", *map(str, CALIBRATION_FOLDS)])
