"""Fits on train alone what the manifest states beside the weights: the out-of-distribution
statistics (fit part), the temperature and both abstention thresholds (held part).

usage: calibrate.py WORK_DIR
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from network import Bundle, LesionNet
from prepare import CODES, load
from train import predict

# Shares of real held-out photos that may be refused.
REFUSED_AS_STRANGE = 0.02
REFUSED_AS_UNSURE = 0.10


def load_network(work: Path) -> LesionNet:
    network = LesionNet(len(CODES))
    network.load_state_dict(torch.load(work / "weights.pt"))
    return network.eval()


def feature_statistics(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Shift, whitening matrix and whitened class means; the covariance is the one within classes."""
    features = features.double()
    shift = features.mean(0)
    means = torch.stack([features[labels == c].mean(0) for c in range(len(CODES))])
    gaps = features - means[labels]
    covariance = gaps.T @ gaps / len(gaps)
    # A little of the average variance everywhere: no direction counts for being unused by chance.
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors / torch.sqrt(values + 0.01 * values.mean())
    return shift.float(), whiten.float(), ((means - shift) @ whiten).float()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature of least log loss (Guo et al. 2017), by search: there is one parameter."""
    candidates = torch.logspace(-0.5, 0.7, 400)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in candidates])
    return round(candidates[losses.argmin()].item(), 4)


def main(work: Path) -> None:
    network = load_network(work)
    photos, labels = load(work, "fit")
    statistics = feature_statistics(predict(network, photos)[1], torch.from_numpy(labels))
    bundle = Bundle(network, *statistics)

    photos, labels = load(work, "held")
    logits, ood = predict(bundle, photos)
    labels = torch.from_numpy(labels)
    temperature = fit_temperature(logits, labels)
    top = torch.softmax(logits / temperature, 1).max(1).values
    calibration = {
        "temperature": temperature,
        "min_probability": round(torch.quantile(top, REFUSED_AS_UNSURE).item(), 3),
        "max_ood": round(torch.quantile(ood, 1 - REFUSED_AS_STRANGE).item(), 3),
    }
    print(calibration, f"held-out ood: median {ood.median():.3f}, highest {ood.max():.3f}")
    torch.save({"statistics": statistics, "calibration": calibration}, work / "calibration.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
