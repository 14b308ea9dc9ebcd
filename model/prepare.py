"""Reads the photos once into one array file, resized as the manifest prescribes, and deals the train lesions into folds.

usage: prepare.py DATA_DIR WORK_DIR
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# Output order of the network.
CODES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
MALIGNANT = {"akiec", "bcc", "mel"}
# The photos are 200x150: next to nothing is lost, and the proportions are kept.
WIDTH, HEIGHT = 192, 144
FOLDS = 3
VAL = -1
SEED = 20


def resize(picture: Image.Image) -> np.ndarray:
    """The whole picture, without cropping, as uint8 [HEIGHT, WIDTH, 3]. Pillow's BILINEAR is antialiased."""
    return np.asarray(picture.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


def read_rows(data: Path) -> list[dict]:
    with open(data / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_photo(data: Path, row: dict) -> Image.Image:
    return Image.open(data / "images" / f"{row['image_id']}.jpg").convert("RGB")


def fold_of(rows: list[dict]) -> np.ndarray:
    """VAL, or the fold of each train row. All photos of a lesion share a fold, and each class is spread evenly."""
    lesions = {}
    for row in rows:
        if row["split"] == "train":
            lesions.setdefault(row["dx"], {})[row["lesion_id"]] = None
    rng, fold = np.random.default_rng(SEED), {}
    for code in CODES:
        names = list(lesions[code])
        rng.shuffle(names)
        fold |= {name: i % FOLDS for i, name in enumerate(names)}
    return np.array([fold[row["lesion_id"]] if row["split"] == "train" else VAL for row in rows])


class Photos:
    """What this step has written: photos uint8 [N, HEIGHT, WIDTH, 3], labels, folds and lesions."""

    def __init__(self, work: Path):
        self.pixels = np.load(work / "photos.npy", mmap_mode="r")
        table = np.load(work / "labels.npz")
        self.labels, self.fold, self.lesion = table["labels"], table["fold"], table["lesion"]
        self.train, self.val = np.flatnonzero(self.fold != VAL), np.flatnonzero(self.fold == VAL)


def main(data: Path, work: Path) -> None:
    rows = read_rows(data)
    photos = np.lib.format.open_memmap(work / "photos.npy", "w+", np.uint8, (len(rows), HEIGHT, WIDTH, 3))
    for i, row in enumerate(rows):
        photos[i] = resize(read_photo(data, row))
    labels, fold = np.array([CODES.index(row["dx"]) for row in rows]), fold_of(rows)
    np.savez(work / "labels.npz", labels=labels, fold=fold, lesion=np.array([row["lesion_id"] for row in rows]))
    for part in (VAL, *range(FOLDS)):
        counts = np.bincount(labels[fold == part], minlength=len(CODES))
        name = "val" if part == VAL else f"fold {part}"
        print(f"{name:6} {counts.sum():5} photos:", ", ".join(f"{c} {n}" for c, n in zip(CODES, counts)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
