"""Reads the photos once into one array file, resized as the manifest prescribes.

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
SIDE = 112
HELD_SHARE = 0.12
SEED = 20


def resize(picture: Image.Image) -> np.ndarray:
    """The whole picture, without cropping, as uint8 [SIDE, SIDE, 3]. Pillow's BILINEAR is antialiased."""
    return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def part_of(rows: list[dict]) -> np.ndarray:
    """fit, held or val for each row. `held` is cut from train by lesion, so that calibration never meets a fitted one."""
    lesions = sorted({row["lesion_id"] for row in rows if row["split"] == "train"})
    np.random.default_rng(SEED).shuffle(lesions)
    held = set(lesions[: int(len(lesions) * HELD_SHARE)])
    return np.array(["val" if row["split"] == "val" else "held" if row["lesion_id"] in held else "fit" for row in rows])


def load(work: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Photos uint8 [N, SIDE, SIDE, 3] and labels int64 [N] of one part."""
    cache = np.load(work / "photos.npz")
    chosen = cache["part"] == part
    return cache["photos"][chosen], cache["labels"][chosen]


def main(data: Path, work: Path) -> None:
    with open(data / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    photos = np.stack([resize(Image.open(data / "images" / f"{row['image_id']}.jpg")) for row in rows])
    labels = np.array([CODES.index(row["dx"]) for row in rows])
    part = part_of(rows)
    np.savez(work / "photos.npz", photos=photos, labels=labels, part=part)
    for name in ("fit", "held", "val"):
        counts = np.bincount(labels[part == name], minlength=len(CODES))
        print(f"{name:5} {counts.sum():5} photos:", ", ".join(f"{c} {n}" for c, n in zip(CODES, counts)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
