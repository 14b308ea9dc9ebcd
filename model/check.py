"""Holds the shipped bundle to its own figures: scores val and drawn pictures through the files, and fails where
evaluation.json, the manifest or the card says otherwise, or where the map does not explain the answer. Better than on
record is otherwise, too: then the record is of another bundle, and evaluate.py is to be run.

usage: check.py [DATA_DIR] [--parity DIR], by check.sh

DATA_DIR is ../shared/data/ham10000 beside the repository, where that folder is. Without photos only what is drawn is
measured; of what is on record of photos it is only seen that the records agree. --parity writes every val photo as
Pillow decodes it and its probabilities, for the Rust side to give the same.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from draw import draw_lesions
from evaluate import (
    BEGIN, END, HERE, RECORDED, STEPS, TITLES, UNMEASURED, Val, drawn_sections, non_lesion_figures, photo_sections,
    score_val,
)
from prepare import CODES, HEIGHT, WIDTH
from score import STRANGER_SEED, Runner, figures, load_bundle, resized, say, score_non_lesions, val_rows
from strangers import FITTED, HELD_OUT

DATA = HERE.parents[1] / "shared" / "data" / "ham10000"
PROMISED = ("coverage", "risk", "melanomas_answered_benign", "non_lesions_abstained")
# Records have four decimals, and sums in another order change an AUC by less than this. One picture changes any share
# by 0.0002 or more, so none has slack. None is needed: in another order of sums logits move by 0.00001, and the val
# photo next to a threshold is 0.0002 away from it.
ROUNDING = 1e-4
# The top logit less the map's sum is a constant of the class but for the last stage, whose five rows are spread over
# nine: on a twentieth of val it strays by 0.026 at most.
MAP_STRAYS = 0.05
# A dark spot, its radius and its distance from both edges in pixels; a place of the map is 16.
SPOT, RADIUS, INSET = (60, 20, 20), 16, 24
# Bottom or top, right or left.
CORNERS = [(bottom, right) for bottom in (False, True) for right in (False, True)]
# Share of painted spots in whose corner the map changes most: 0.99 on val photos, 0.98 on drawn lesions, since filters
# see beyond the corner. In the opposite corner it changes by 0.7 of that at most; by as much where the look at the
# turned picture is not turned back.
SPOTS_FOUND, OPPOSITE = 0.9, 0.8


@dataclass
class Scores:
    """What the files say, before any threshold."""

    held_out: dict
    fitted: dict
    val: Val | None

    def told(self, limits: dict) -> dict[str, float]:
        val, drawn = self.val, non_lesion_figures(self.held_out, self.fitted, limits)
        return drawn | (figures(val.probabilities, val.ood, val.labels, limits) if val else {})


def differences(told: dict, recorded: dict, names: tuple, source: str) -> list[str]:
    """What `source` lacks, or says otherwise than was measured. What was not measured need only be there."""
    problems = []
    for name in names:
        if name not in recorded:
            problems.append(f"{source} holds no {name}")
        # What is no number is never equal.
        elif name in told and not abs(told[name] - recorded[name]) <= ROUNDING:
            problems.append(f"{name} is {told[name]:.4f}, in {source} {recorded[name]:.4f}")
    return problems


def card_differences(card: str, sections: list[str], whole: bool) -> list[str]:
    """Lines of `sections` that the card says otherwise. If they are not the whole, those that are nowhere in it."""
    said, lines = card.split(STEPS)[0].strip().split("\n"), "\n\n".join(sections).split("\n")
    patterns = [re.compile(re.escape(line).replace(re.escape(UNMEASURED), r"[\d.]+")) for line in lines]
    if not whole:
        said = [next(filter(pattern.fullmatch, said), None) for pattern in patterns]
    return [
        f"README.md has {one or 'no such line'!r}, measured {line or 'none'!r}"
        for one, line, pattern in zip_longest(said, lines, patterns)
        if one is None or pattern is None or not pattern.fullmatch(one)
    ]


def table_differences(card: str, recorded: dict) -> list[str]:
    """Where the card's first table is not evaluation.json, both rounded."""
    problems = []
    for name in set(TITLES) & set(recorded):
        row = re.search(rf"^\| {re.escape(TITLES[name])} \| ([\d.]+) \|", card, re.MULTILINE)
        if not row or abs(float(row[1]) - recorded[name]) > 0.0005 + ROUNDING:
            problems.append(f"README.md says {row and row[1]} of {name}, evaluation.json {recorded[name]}")
    return problems


def golden_differences(manifest: dict, runner: Runner) -> list[str]:
    problems, network = [], manifest["network"]
    if hashlib.sha256((HERE / network["file"]).read_bytes()).hexdigest() != network["sha256"]:
        problems.append(f"{network['file']} has another SHA-256 than the manifest says")
    for golden in manifest["golden"]["pictures"]:
        picture = Image.open(io.BytesIO(base64.b64decode(golden["png_base64"])))
        probabilities, ood = runner.run(resized([picture]))
        off = max(abs(probabilities[0] - golden["probabilities"]).max(), abs(ood[0] - golden["ood"]))
        if not off <= ROUNDING:
            problems.append(f"golden picture {golden['name']} is off by {off:.5f}")
    return problems


def painted(pictures: np.ndarray, bottom: bool, right: bool) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    inside = np.hypot(y - (HEIGHT - INSET if bottom else INSET), x - (WIDTH - INSET if right else INSET)) <= RADIUS
    return np.where(inside[..., None], np.uint8(SPOT), pictures)


def looks(runner: Runner, pictures: np.ndarray) -> tuple[list, list[list]]:
    """[logits, map] of pictures, and of the same with a spot in each corner."""
    views = [pictures, *(painted(pictures, *corner) for corner in CORNERS)]
    plain, *spotted = (runner.outputs(view, ["logits", "map"]) for view in views)
    return plain, spotted


def explained(plain: list, spotted: list[list]) -> dict[str, float]:
    """How far the maps of `looks` explain the logits."""
    logits, maps = (np.concatenate(column) for column in zip(plain, *spotted))
    top, rest = logits.argmax(1), logits.max(1) - maps.sum((1, 2))
    strays = [abs(rest[top == c] - np.median(rest[top == c])).max() for c in np.unique(top)]
    found, (height, width) = [], (side // 2 for side in maps.shape[1:])
    for (bottom, right), (logits, maps) in zip(CORNERS, spotted):
        # Where another class comes first, the map is of that one.
        changed = abs(maps - plain[1])[logits.argmax(1) == plain[0].argmax(1)]
        # The spot at the top left.
        changed = changed[:, :: -1 if bottom else 1, :: -1 if right else 1]
        here, opposite = (part.max((1, 2)) for part in (changed[:, :height, :width], changed[:, -height:, -width:]))
        found.append((here == changed.max((1, 2))) & (opposite < OPPOSITE * here))
    return {"strays": float(max(strays)), "spots_found": float(np.concatenate(found).mean())}


def map_problems(strays: float, spots_found: float) -> list[str]:
    problems = []
    if not strays <= MAP_STRAYS:
        problems.append(f"the sum of the map strays from the top logit by {strays:.3f}")
    if not spots_found >= SPOTS_FOUND:
        problems.append(f"the map shows {spots_found:.3f} of the painted spots in their corner")
    return problems


def write_parity(folder: Path, data: Path, val: Val) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{row['image_id']}.png" for row in val_rows(data)]
    for name, photo in zip(names, val.photos):
        photo.save(folder / name, compress_level=1)
    photos = dict(zip(names, val.probabilities.astype(float).tolist()))
    (folder / "expected.json").write_text(json.dumps({"labels": CODES, "photos": photos}))


def stop_at(problems: list[str]) -> None:
    if problems:
        sys.exit("\n".join(["the bundle is not what is on record of it:", *problems]))


def main(data: Path | None, parity: Path | None) -> None:
    manifest, runner = load_bundle(HERE)
    limits, promised = manifest["abstention"], manifest.get("evaluation", {})
    recorded = json.loads((HERE / "evaluation.json").read_text())
    card = (HERE / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    # What takes no scoring first.
    stop_at([
        *differences(recorded, recorded, RECORDED, "evaluation.json"),
        *differences(recorded, promised, PROMISED, "manifest.json"),
        *table_differences(card, recorded),
        *golden_differences(manifest, runner),
    ])

    say("scoring drawn non-lesions")
    held_out, fitted = (score_non_lesions(runner, families) for families in (HELD_OUT, FITTED))
    scores = Scores(held_out, fitted, score_val(runner, data) if data else None)
    told, sections = scores.told(limits), []
    for name in dict.fromkeys((*RECORDED, *PROMISED)):
        print(f"{name} {told[name]:.4f}" if name in told else f"{name} not measured, there are no photos")
    if scores.val:
        sections = photo_sections(runner, limits, scores.val, whole=False)
    sections += drawn_sections(manifest, runner, told, UNMEASURED)
    pictures = resized(scores.val.photos[::20] if scores.val else draw_lesions(STRANGER_SEED, 50))
    shown = explained(*looks(runner, pictures))
    print(*(f"map {name} {value:.4f}" for name, value in shown.items()), sep="\n")
    if parity and data:
        write_parity(parity, data, scores.val)
    stop_at([
        *differences(told, recorded, RECORDED, "evaluation.json"),
        *differences(told, promised, PROMISED, "manifest.json"),
        *card_differences(card, sections, whole=bool(scores.val)),
        *map_problems(**shown),
    ])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="check.sh [DATA_DIR] [--parity DIR]")
    parser.add_argument("data", nargs="?", type=Path, default=DATA if DATA.is_dir() else None)
    parser.add_argument("--parity", type=Path)
    given = parser.parse_args()
    if not given.data:
        print(f"{DATA} is missing: what takes photos is left out", file=sys.stderr)
    main(given.data, given.parity)
