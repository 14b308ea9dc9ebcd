"""Fine-tunes the network: once on all train photos, and for each calibration fold without it.

usage: train.py WORK_DIR [JOB ...]      a job is `all` or the number of the fold that is left out

Writes weights-JOB.pt. state-JOB.pt is written on the way; a run that was cut off goes on from there.
"""

import copy
import math
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from augment import augment
from network import SHORT, TRUNK, LesionNet, normalise
from prepare import CODES, HEIGHT, SEED, WIDTH, Photos

WORKERS = 2
BATCH = 32
# Steps over all train photos; a fold takes its share. The rate rises over WARM_UP steps and falls along a cosine to
# nothing.
STEPS, WARM_UP = 1900, 100
SMALL, FULL = (HEIGHT * 3 // 4, WIDTH * 3 // 4), (HEIGHT, WIDTH)
# Up to which share of the steps the pictures have which size.
PHASES = [(0.4, SMALL), (1.0, FULL)]
# Share of the views whose light, colour or sharpness is changed too: how a lesion is coloured says most about it.
ROUGH = 0.5
# The stem would learn at EARLY_SHARE of the rate; the blocks behind the trunk learn at more, the last one at all of it.
RATE, EARLY_SHARE, HEAD_RATE = 8e-4, 0.25, 3e-3
WEIGHT_DECAY, HEAD_DECAY = 0.05, 0.3
# A class is drawn by its count to this power: 1 as frequent as it is, 0 all alike.
BALANCE = 0.5
SMOOTHING, DROPOUT, DROPPED_BLOCKS = 0.05, 0.4, 0.1
# Of the running mean of the weights, which is what is kept.
MEAN_DECAY = 0.998
# Each fold costs two thirds of the training again; one holds 2,309 photos, which is enough for a few numbers.
CALIBRATION_FOLDS = [0]


def parameter_groups(network: LesionNet) -> list[dict]:
    groups = [{"params": network.head.parameters(), "lr": HEAD_RATE, "weight_decay": HEAD_DECAY}]
    last = len(network.blocks) - 1
    for i, block in enumerate(network.blocks[TRUNK:], TRUNK):
        rate = RATE * EARLY_SHARE ** (1 - i / last)
        for filters in (True, False):
            chosen = [parameter for parameter in block.parameters() if (parameter.ndim > 1) == filters]
            groups.append({"params": chosen, "lr": rate, "weight_decay": WEIGHT_DECAY if filters else 0.0})
    return groups


def sampling(labels: np.ndarray) -> torch.Tensor:
    """Chance of each photo."""
    counts = np.bincount(labels, minlength=len(CODES))
    drawn = counts**BALANCE / (counts**BALANCE).sum()
    return torch.from_numpy((drawn / counts)[labels])


def rate(step: int, steps: int) -> float:
    return min(step / WARM_UP, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


def follow(mean: LesionNet, network: LesionNet, step: int) -> None:
    """Moves the mean of the weights and of the running statistics towards the network's."""
    share = 1 - min(MEAN_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        for kept, now in zip(mean.state_dict().values(), network.state_dict().values()):
            if kept.is_floating_point():
                kept.lerp_(now, share)


def logits_of(network: LesionNet, views: torch.Tensor) -> torch.Tensor:
    views = normalise(views).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=SHORT):
        stages = network.maps(views).stages
    return network.head(F.dropout(network.means(stages), DROPOUT))


def fit(work: Path, job: str) -> None:
    torch.set_num_threads(1)
    photos, start = Photos(work), time.monotonic()
    labels, fold = photos.labels[photos.train], photos.fold[photos.train]
    chosen = np.flatnonzero(fold != int(job)) if job != "all" else np.arange(len(labels))
    chance = sampling(labels[chosen])
    steps = round(STEPS * len(chosen) / len(labels))

    network = LesionNet(len(CODES))
    network.load_backbone()
    network = network.to(memory_format=torch.channels_last)
    for i, block in enumerate(network.blocks):
        block.drop = DROPPED_BLOCKS * i / len(network.blocks)
    for layer in network.modules():
        if isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            layer.momentum = 0.03
    mean = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(parameter_groups(network), RATE)
    rates = [group["lr"] for group in optimizer.param_groups]
    torch.manual_seed(SEED)
    first, state = 1, work / f"state-{job}.pt"
    if state.exists():
        saved = torch.load(state)
        network.load_state_dict(saved["network"])
        mean.load_state_dict(saved["mean"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        first = saved["step"] + 1

    network.train()
    total = 0.0
    for step in range(first, steps + 1):
        size = next(size for end, size in PHASES if step <= end * steps)
        for group, full in zip(optimizer.param_groups, rates):
            group["lr"] = full * rate(step, steps)
        picked = chosen[torch.multinomial(chance, BATCH).numpy()]
        views = augment(photos.pixels[photos.train[picked]], *size, ROUGH)
        logits = logits_of(network, views)
        loss = F.cross_entropy(logits, torch.from_numpy(labels[picked]), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        follow(mean, network, step)
        total += loss.item()
        if step % 50 == 0 or step == steps:
            print(f"{job}: step {step} of {steps}, loss {total / 50:.3f}, {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
            if not math.isfinite(loss.item()):
                raise ValueError("the loss is no number")
        if step % 100 == 0:
            now = {"network": network.state_dict(), "mean": mean.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(now | {"random": torch.get_rng_state(), "step": step}, state.with_suffix(".part"))
            state.with_suffix(".part").rename(state)
    torch.save(mean.state_dict(), work / f"weights-{job}.pt")
    state.unlink(missing_ok=True)


def main(work: Path, jobs: list[str]) -> None:
    with get_context("spawn").Pool(WORKERS) as pool:
        pool.starmap(fit, [(work, job) for job in jobs], chunksize=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["all", *map(str, CALIBRATION_FOLDS)])
