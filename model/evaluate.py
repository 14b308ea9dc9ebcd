"""Looks at val and at drawn non-lesions through the shipped files, and writes the figures into README.md,
evaluation.json and plots/.

usage: evaluate.py DATA_DIR [WORK_DIR]

With WORK_DIR the times of run.sh's steps are told too. check.py measures the same without writing. Needs
requirements-check.txt only.
"""

import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from prepare import CODES
from score import (
    CANCERS, MELANOMA, Runner, abstained, answered, figures, load_bundle, read_val, resized, say, score_non_lesions,
)
from strangers import FITTED, HELD_OUT

HERE = Path(__file__).parent
TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "melanoma_auc": "melanoma AUC (against all others)",
    "malignant_auc": "malignant AUC (akiec, bcc, mel against the rest)",
    "calibration_error": "expected calibration error (10 bins)",
    "coverage": "coverage: share of photos answered",
    "refused_as_strange": "refused as out of distribution",
    "risk": "risk: share of wrong among the answered",
    "melanomas_answered_benign": "**melanomas answered with a benign class**",
    "malignant_answered_benign": "malignant lesions answered with a benign class",
}
# What evaluation.json holds, and of each family of drawn non-lesions its share.
RECORDED = (
    "accuracy", "balanced_accuracy", "melanoma_auc", "malignant_auc", "calibration_error", "melanomas_answered_benign",
    "non_lesions_abstained", "fitted_non_lesions_abstained",
    *(f"abstained_on_{family.__name__}" for family in (*HELD_OUT, *FITTED)),
)
RESAMPLES = 1000
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->"
# Above the one section that check.py cannot measure.
STEPS = "Time of each step on two shared CPU cores:"
# Stands for a number that check.py leaves out: it costs minutes, or is another on every machine.
UNMEASURED = "?"


@dataclass
class Val:
    """The val photos in their own size, and what the bundle says of them."""

    photos: list
    labels: np.ndarray
    lesions: np.ndarray
    probabilities: np.ndarray
    ood: np.ndarray


def score_val(runner: Runner, data: Path) -> Val:
    say("reading val")
    photos, labels, lesions = read_val(data)
    say(f"scoring {len(photos)} photos")
    return Val(photos, labels, lesions, *runner.run(resized(photos)))


def non_lesion_figures(held_out: dict, fitted: dict, limits: dict) -> dict[str, float]:
    """Shares without an answer, over families and by family, of scores as `score_non_lesions` gives them."""
    told = {}
    for name, scores in (("non_lesions_abstained", held_out), ("fitted_non_lesions_abstained", fitted)):
        shares = abstained(scores, limits)
        told |= {name: float(np.mean(list(shares.values())))}
        told |= {f"abstained_on_{family}": share for family, share in shares.items()}
    return told


def table(head: tuple, rows: list) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ("---",) * len(head), *rows])


def intervals(measure, lesions: np.ndarray) -> dict[str, str]:
    """95 % intervals of what `measure` gives for an array of rows: whole lesions are drawn again, with replacement."""
    rng, names = np.random.default_rng(1), np.unique(lesions)
    rows = [np.flatnonzero(lesions == name) for name in names]
    draws = [measure(np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])) for _ in range(RESAMPLES)]
    bounds = {name: np.nanpercentile([draw[name] for draw in draws], (2.5, 97.5)) for name in draws[0]}
    return {name: f"{low:.3f}–{high:.3f}" for name, (low, high) in bounds.items()}


def per_class(answer: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Recall of each class among some rows; none where a class is missing there."""
    answer, labels = answer[rows], labels[rows]
    return {
        code: (answer[labels == i] == i).mean() if (labels == i).any() else np.nan for i, code in enumerate(CODES)
    }


def plot(title: str, across: str, up: str, lines: list[tuple[str, list]], top: float) -> str:
    """A line chart as SVG; x runs from 0 to 1, y from 0 to `top`."""
    def at(x: float, y: float) -> str:
        return f"{50 + 300 * x:.1f},{260 - 220 * y / top:.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="380" height="310" font-family="sans-serif" font-size="11">',
        '<rect width="380" height="310" fill="white"/>',
        f'<text x="200" y="22" text-anchor="middle" font-size="13">{title}</text>',
        f'<text x="200" y="298" text-anchor="middle">{across}</text>',
        f'<text x="14" y="150" text-anchor="middle" transform="rotate(-90 14 150)">{up}</text>',
    ]
    for k in range(6):
        x, y = 50 + 60 * k, 260 - 44 * k
        parts += [
            f'<path d="M{x} 40V260M50 {y}H350" stroke="#ddd"/>',
            f'<text x="{x}" y="276" text-anchor="middle">{k / 5:.1f}</text>',
            f'<text x="44" y="{y + 4}" text-anchor="end">{top * k / 5:.2g}</text>',
        ]
    for i, (name, points) in enumerate(lines):
        stroke = ("#1f5fa8", "#999", "#b3402a")[i]
        parts.append(
            f'<polyline fill="none" stroke="{stroke}" stroke-width="2" points="{" ".join(at(*point) for point in points)}"/>'
        )
        parts.append(f'<text x="60" y="{56 + 14 * i}" fill="{stroke}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def write_plots(probabilities: np.ndarray, ood: np.ndarray, labels: np.ndarray, limits: dict) -> None:
    (HERE / "plots").mkdir(exist_ok=True)
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((top * 10).astype(int), 9)
    points = [(float(top[bins == b].mean()), float(right[bins == b].mean())) for b in np.unique(bins) if (bins == b).sum() > 4]
    chart = plot("Calibration on val", "probability of the top class", "share right",
                 [("the network", points), ("perfect", [(0, 0), (1, 1)])], 1)
    (HERE / "plots" / "calibration.svg").write_text(chart)

    calm = ood <= limits["max_ood"]
    risks, missed = [], []
    for threshold in np.quantile(top[calm], np.linspace(0, 0.9, 91)):
        given = calm & (top >= threshold)
        benign = given & ~np.isin(probabilities.argmax(1), CANCERS)
        risks.append((float(given.mean()), float(1 - right[given].mean())))
        missed.append((float(given.mean()), float(benign[labels == MELANOMA].mean())))
    now = answered(probabilities, ood, limits).mean()
    chart = plot("Risk and coverage on val", "share of photos answered", "share",
                 [("wrong among the answered", risks), ("coverage in use", [(now, 0), (now, 0.5)]),
                  ("melanomas answered benign", missed)], 0.5)
    (HERE / "plots" / "risk-coverage.svg").write_text(chart)


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file)


def cast(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture) * np.array([1.12, 1.0, 0.85])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def framed(picture: Image.Image) -> Image.Image:
    frame = Image.new("RGB", picture.size, (12, 12, 12))
    frame.paste(picture.resize((picture.width * 4 // 5, picture.height * 4 // 5)), (picture.width // 10, picture.height // 10))
    return frame


def square(picture: Image.Image) -> Image.Image:
    side, left = picture.height, (picture.width - picture.height) // 2
    return picture.crop((left, 0, left + side, side))


CONDITIONS = {
    "as they are": None,
    "JPEG of quality 40": jpeg,
    "blurred by 1.5 pixels": lambda picture: picture.filter(ImageFilter.GaussianBlur(1.5)),
    "30 % darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.7),
    "30 % brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "warm colour cast": cast,
    "at 0.8 of the size in a dark frame": framed,
    "turned by a right angle, so 3:4": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    "cut to a square": square,
}


def robustness(runner: Runner, val: Val, limits: dict, whole: bool) -> str:
    names, rows = ("accuracy", "balanced_accuracy", "melanoma_auc", "coverage", "refused_as_strange", "risk"), []
    for name, change in CONDITIONS.items():
        if change and not whole:
            rows.append((name, *[UNMEASURED] * (len(names) + 1)))
            continue
        scored = val.probabilities, val.ood
        if change:
            say(f"val {name}")
            scored = runner.run(resized([change(photo) for photo in val.photos]))
        told = figures(*scored, val.labels, limits)
        rows.append((name, *(f"{told[key]:.3f}" for key in (*names, "melanomas_answered_benign"))))
    heads = ("val photos", "accuracy", "balanced", "melanoma AUC", "coverage", "refused as strange", "risk")
    return table((*heads, "melanomas answered benign"), rows)


def confusion(answer: np.ndarray, given: np.ndarray, labels: np.ndarray) -> str:
    rows = [
        (f"**{code}**", *(int((given & (labels == i) & (answer == j)).sum()) for j in range(len(CODES))),
         int((~given & (labels == i)).sum()))
        for i, code in enumerate(CODES)
    ]
    return table(("is \\ answered", *CODES, "abstained"), rows)


def failures(probabilities: np.ndarray, given: np.ndarray, labels: np.ndarray) -> str:
    """Which malignant lesions get a benign answer, and how sure of it the network is."""
    answer, top, rows = probabilities.argmax(1), probabilities.max(1), []
    for i in CANCERS:
        for j in range(len(CODES)):
            wrong = given & (labels == i) & (answer == j)
            if j not in CANCERS and wrong.any():
                rows.append((CODES[i], CODES[j], wrong.sum(), f"{np.median(top[wrong]):.2f}", f"{top[wrong].max():.2f}"))
    return table(("is", "answered", "photos", "median probability", "highest"), rows)


def outcomes(runner: Runner, limits: dict) -> str:
    rows = []
    for path in sorted((HERE / "samples").glob("*.png")):
        probabilities, ood = runner.run(resized([Image.open(path)]))
        best = CODES[probabilities[0].argmax()]
        verdict = best if answered(probabilities, ood, limits)[0] else "abstains"
        rows.append((path.name, f"{best} {probabilities[0].max():.2f}", f"{ood[0]:.2f}", verdict))
    return table(("sample", "top class", "ood", "outcome"), rows)


def photo_sections(runner: Runner, limits: dict, val: Val, whole: bool = True) -> list[str]:
    """What the card tells of val; if not the whole, without scoring it again under a phone's conditions."""
    probabilities, ood, labels = val.probabilities, val.ood, val.labels
    say("drawing lesions again for the intervals")
    told, answer, given = (
        figures(probabilities, ood, labels, limits), probabilities.argmax(1), answered(probabilities, ood, limits),
    )
    spread = intervals(lambda rows: figures(probabilities[rows], ood[rows], labels[rows], limits), val.lesions)
    recalls, recall_spread = (
        per_class(answer, labels, np.arange(len(labels))),
        intervals(lambda rows: per_class(answer, labels, rows), val.lesions),
    )
    class_rows = []
    for i, code in enumerate(CODES):
        precision = (labels == i)[answer == i].mean() if (answer == i).any() else float("nan")
        class_rows.append((code, (labels == i).sum(), f"{recalls[code]:.3f}", recall_spread[code], f"{precision:.3f}"))
    return [
        f"On the {len(labels)} val photos, through `model.onnx` and `manifest.json`, with 95 % intervals from drawing "
        "lesions again. The rows above coverage judge every photo; an abstained photo gets no answer in use. "
        f"Always answering nv would be right in {(labels == CODES.index('nv')).mean():.3f}.",
        table(("figure", "value", "95 %"), [(TITLES[name], f"{told[name]:.3f}", spread[name]) for name in TITLES]),
        table(("class", "photos", "recall", "95 %", "precision"), class_rows),
        "![calibration](plots/calibration.svg) ![risk and coverage](plots/risk-coverage.svg)",
        "Answers against truth, after abstention:",
        confusion(answer, given, labels),
        "Malignant lesions that were answered benign:",
        failures(probabilities, given, labels),
        "Under a phone's conditions:",
        robustness(runner, val, limits, whole),
    ]


def drawn_sections(manifest: dict, runner: Runner, told: dict, milliseconds: str) -> list[str]:
    """What the card tells of drawn pictures, and of the bundle itself: it takes no photo."""
    limits = manifest["abstention"]

    def shares(families: list) -> str:
        return ", ".join(f"{family.__name__} {told[f'abstained_on_{family.__name__}']:.2f}" for family in families)

    return [
        "Drawn non-lesions of families that the score was not fitted on, share without an answer: "
        f"{told['non_lesions_abstained']:.3f} ({shares(HELD_OUT)}).",
        "Of families that it was fitted on, pictures drawn anew: "
        f"{told['fitted_non_lesions_abstained']:.3f} ({shares(FITTED)}).",
        f"Temperature {manifest['temperature']}, min_probability {limits['min_probability']}, max_ood {limits['max_ood']}; "
        f"the network is {manifest['network']['size_bytes'] / 1e6:.2f} MB and took {milliseconds} ms "
        "a picture on one thread of a shared machine.",
        "The drawn samples, before the quality gate:",
        outcomes(runner, limits),
    ]


def main(data: Path, work: str | None) -> None:
    manifest, runner = load_bundle(HERE)
    limits = manifest["abstention"]
    val = score_val(runner, data)
    say("scoring drawn non-lesions")
    drawn = non_lesion_figures(score_non_lesions(runner, HELD_OUT), score_non_lesions(runner, FITTED), limits)
    told = figures(val.probabilities, val.ood, val.labels, limits) | drawn
    (HERE / "evaluation.json").write_text(json.dumps({name: round(told[name], 4) for name in RECORDED}, indent=2) + "\n")
    write_plots(val.probabilities, val.ood, val.labels, limits)
    sections = photo_sections(runner, limits, val)
    sections += drawn_sections(manifest, runner, drawn, f"{runner.milliseconds(resized(val.photos[:1])[0]):.0f}")
    if work and (Path(work) / "times.txt").exists():
        lines = [line.split(" ", 1) for line in (Path(work) / "times.txt").read_text().splitlines()]
        sections += [STEPS, table(("step", "seconds"), lines)]
    text = "\n\n".join(sections)
    print(text)
    readme = HERE / "README.md"
    marked = re.compile(f"({BEGIN}).*({END})", re.DOTALL)
    readme.write_text(marked.sub(lambda m: f"{m[1]}{text}\n{m[2]}", readme.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
