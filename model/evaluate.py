"""Looks at val, once, through the shipped files, and writes the figures into README.md.

usage: evaluate.py WORK_DIR
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from export import Runner
from prepare import CODES, MALIGNANT, load, resize

HERE = Path(__file__).parent
BENIGN = [i for i, code in enumerate(CODES) if code not in MALIGNANT]


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative (ties count half)."""
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n))


def calibration_error(top: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of the top class over bins of equal width."""
    bin_of = np.minimum((top * bins).astype(int), bins - 1)
    return sum(
        abs(top[bin_of == b].mean() - right[bin_of == b].mean()) * (bin_of == b).mean() for b in np.unique(bin_of)
    )


def table(head: tuple, rows: list) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ("---",) * len(head), *rows])


def figures(probabilities: np.ndarray, ood: np.ndarray, labels: np.ndarray, limits: dict) -> str:
    answer, top = probabilities.argmax(1), probabilities.max(1)
    right = answer == labels
    strange, unsure = ood > limits["max_ood"], top < limits["min_probability"]
    answered = ~(strange | unsure)
    recall = {code: right[labels == i].mean() for i, code in enumerate(CODES)}
    melanoma, malignant = [CODES.index("mel")], [CODES.index(code) for code in CODES if code in MALIGNANT]
    cancer = np.isin(labels, malignant)
    benign_answer = answered & np.isin(answer, BENIGN)
    rows = [
        ("accuracy", f"{right.mean():.3f}"),
        ("accuracy of always answering nv", f"{(labels == CODES.index('nv')).mean():.3f}"),
        ("balanced accuracy", f"{np.mean(list(recall.values())):.3f}"),
        ("melanoma AUC (against all others)", f"{auc(probabilities[:, melanoma].sum(1), labels == melanoma[0]):.3f}"),
        ("malignant AUC (akiec, bcc, mel against the rest)", f"{auc(probabilities[:, malignant].sum(1), cancer):.3f}"),
        ("expected calibration error (10 bins)", f"{calibration_error(top, right):.3f}"),
        ("abstained", f"{1 - answered.mean():.3f}"),
        ("abstained as out of distribution", f"{strange.mean():.3f}"),
        ("accuracy where it answered", f"{right[answered].mean():.3f}"),
        ("**melanomas answered with a benign class**", f"**{benign_answer[labels == melanoma[0]].mean():.3f}**"),
        ("malignant lesions answered with a benign class", f"{benign_answer[cancer].mean():.3f}"),
    ]
    by_class = [(c, (labels == i).sum(), f"{recall[c]:.3f}") for i, c in enumerate(CODES)]
    return (
        f"On the {len(labels)} val photos, through `model.onnx` and `manifest.json`. The first rows judge every "
        "photo; an abstained photo gets no answer in use.\n\n"
        + table(("figure", "value"), rows) + "\n\n" + table(("class", "photos", "recall"), by_class)
    )


def outcomes(runner: Runner, limits: dict) -> str:
    rows = []
    for path in sorted((HERE / "samples").glob("*.png")):
        probabilities, ood = runner.run(resize(Image.open(path))[None])
        top, best = probabilities[0].max(), CODES[probabilities[0].argmax()]
        verdict = "abstains" if top < limits["min_probability"] or ood[0] > limits["max_ood"] else best
        rows.append((path.name, f"{best} {top:.2f}", f"{ood[0]:.2f}", verdict))
    return "The drawn samples, before the quality gate:\n\n" + table(("sample", "top class", "ood", "outcome"), rows)


def main(work: Path) -> None:
    manifest = json.loads((HERE / "manifest.json").read_text())
    limits = manifest["abstention"]
    runner = Runner(HERE / manifest["network"]["file"], manifest["temperature"])
    photos, labels = load(work, "val")
    parts = [runner.run(photos[i : i + 64]) for i in range(0, len(photos), 64)]
    probabilities, ood = (np.concatenate(column) for column in zip(*parts))
    thresholds = ", ".join(f"{name} {value}" for name, value in limits.items())
    sections = [
        figures(probabilities, ood, labels, limits),
        f"Temperature {manifest['temperature']}, {thresholds}; the network is "
        f"{manifest['network']['size_bytes'] / 1e6:.2f} MB.",
        outcomes(runner, limits),
    ]
    times = work / "times.txt"
    if times.exists():
        lines = [line.split(" ", 1) for line in times.read_text().splitlines()]
        sections.append("Time of each step on two shared CPU cores:\n\n" + table(("step", "seconds"), lines))
    text = "\n\n".join(sections)
    print(text)
    readme = HERE / "README.md"
    marked = re.compile(r"(<!-- figures: begin -->\n).*(<!-- figures: end -->)", re.DOTALL)
    readme.write_text(marked.sub(lambda m: f"{m[1]}{text}\n{m[2]}", readme.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
