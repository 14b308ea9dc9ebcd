"""Runs the shipped bundle as its users do and measures its answers. Needs no training library.

Read by export.py, evaluate.py and check.py.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

import strangers
from prepare import CODES, HEIGHT, MALIGNANT, WIDTH, read_photo, read_rows, resize

MELANOMA = CODES.index("mel")
CANCERS = [i for i, code in enumerate(CODES) if code in MALIGNANT]
# Never the seed of the strangers that were fitted.
STRANGER_SEED = 77


class Runner:
    """Pictures in, calibrated probabilities and the out-of-distribution score out, or the graph's own outputs."""

    def __init__(self, network: Path, temperature: float, mean: list, std: list):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        self.temperature, self.mean, self.std = temperature, np.float32(mean), np.float32(std)

    def outputs(self, photos: np.ndarray, names: list[str]) -> list[np.ndarray]:
        """uint8 [N, H, W, 3] to outputs of the graph."""
        parts = []
        for photo in photos:
            pixels = ((photo * np.float32(1 / 255) - self.mean) / self.std).transpose(2, 0, 1)[None]
            parts.append(self.session.run(names, {"input": pixels}))
        return [np.concatenate(column) for column in zip(*parts)]

    def run(self, photos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] to probabilities [N, 7] and ood [N]."""
        logits, ood = self.outputs(photos, ["logits", "ood"])
        scaled = np.exp((logits - logits.max(1, keepdims=True)) / self.temperature)
        return scaled / scaled.sum(1, keepdims=True), ood

    def milliseconds(self, photo: np.ndarray) -> float:
        """The fastest of some runs on one photo, on one thread."""
        times = []
        for _ in range(30):
            start = time.perf_counter()
            self.run(photo[None])
            times.append(time.perf_counter() - start)
        return 1000 * min(times)


def load_bundle(folder: Path) -> tuple[dict, Runner]:
    manifest = json.loads((folder / "manifest.json").read_text())
    fed = manifest["input"]
    return manifest, Runner(folder / manifest["network"]["file"], manifest["temperature"], fed["mean"], fed["std"])


def val_rows(data: Path) -> list[dict]:
    return [row for row in read_rows(data) if row["split"] == "val"]


def read_val(data: Path) -> tuple[list, np.ndarray, np.ndarray]:
    """Photos in their own size, labels and lesions."""
    rows = val_rows(data)
    photos = [read_photo(data, row) for row in rows]
    return photos, np.array([CODES.index(row["dx"]) for row in rows]), np.array([row["lesion_id"] for row in rows])


def resized(pictures: list) -> np.ndarray:
    return np.stack([resize(picture) for picture in pictures])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative (ties count half)."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = positive.sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of the top class over bins of equal width."""
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((top * bins).astype(int), bins - 1)
    return float(
        sum(abs(top[bin_of == b].mean() - right[bin_of == b].mean()) * (bin_of == b).mean() for b in np.unique(bin_of))
    )


def answered(probabilities: np.ndarray, ood: np.ndarray, limits: dict) -> np.ndarray:
    return (probabilities.max(1) >= limits["min_probability"]) & (ood <= limits["max_ood"])


def figures(probabilities: np.ndarray, ood: np.ndarray, labels: np.ndarray, limits: dict) -> dict[str, float]:
    """What is told of a set of photos. Those above `coverage` judge every photo, answered or not."""
    answer, given = probabilities.argmax(1), answered(probabilities, ood, limits)
    right, benign = answer == labels, given & ~np.isin(answer, CANCERS)
    cancer = np.isin(labels, CANCERS)
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean([right[labels == c].mean() for c in np.unique(labels)])),
        "melanoma_auc": auc(probabilities[:, MELANOMA], labels == MELANOMA),
        "malignant_auc": auc(probabilities[:, CANCERS].sum(1), cancer),
        "calibration_error": calibration_error(probabilities, labels),
        "coverage": float(given.mean()),
        "refused_as_strange": float((ood > limits["max_ood"]).mean()),
        "risk": float(1 - right[given].mean()),
        "melanomas_answered_benign": float(benign[labels == MELANOMA].mean()),
        "malignant_answered_benign": float(benign[cancer].mean()),
    }


def score_non_lesions(runner: Runner, families: list) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `Runner.run` gives for the pictures of each family, by the family's name."""
    pictures = resized(strangers.draw(families, STRANGER_SEED)).reshape(len(families), -1, HEIGHT, WIDTH, 3)
    return {family.__name__: runner.run(drawn) for family, drawn in zip(families, pictures)}


def abstained(scores: dict[str, tuple[np.ndarray, np.ndarray]], limits: dict) -> dict[str, float]:
    """Share of each family's pictures that gets no answer. All families are of one size."""
    return {name: float((~answered(*drawn, limits)).mean()) for name, drawn in scores.items()}
