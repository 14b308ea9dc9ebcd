"""Writes the bundle: model.onnx and manifest.json, with golden vectors and evaluation computed from the files written.

usage: export.py WORK_DIR
"""

import base64
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image

from calibrate import load_network
from network import MEAN, STD, Bundle, Strangeness, Texture
from prepare import CODES, HEIGHT, MALIGNANT, WIDTH, Photos, resize
from score import Runner, abstained, figures, score_non_lesions
from simplify import simplify
from strangers import HELD_OUT

HERE = Path(__file__).parent
NAMES = {
    "akiec": "Actinic keratosis or intraepithelial carcinoma",
    "bcc": "Basal cell carcinoma",
    "bkl": "Benign keratosis",
    "df": "Dermatofibroma",
    "mel": "Melanoma",
    "nv": "Melanocytic naevus",
    "vasc": "Vascular lesion",
}


def export_network(work: Path, path: Path) -> dict:
    """Writes the graph and returns the calibration that belongs to it."""
    saved, network = torch.load(work / "calibration.pt"), load_network(work, "all")
    strangeness = Strangeness(saved["strangeness"]["shift"].numel())
    strangeness.load_state_dict(saved["strangeness"])
    texture = Texture(saved["texture"]["shift"].numel(), len(CODES))
    texture.load_state_dict(saved["texture"])
    raw = io.BytesIO()
    # The newer exporter writes stack traces with this machine's paths into the file.
    torch.onnx.export(
        Bundle(network, texture, strangeness).eval(), (torch.zeros(1, 3, HEIGHT, WIDTH),), raw, dynamo=False,
        opset_version=17, input_names=["input"], output_names=["logits", "ood", "map"],
    )
    model = simplify(onnx.load_from_string(raw.getvalue()))
    # Nothing of the machine that exported it, in either exporter's fields.
    for node in model.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    onnx.save(model, path)
    return saved["calibration"]


def golden(runner: Runner, folder: Path) -> list[dict]:
    vectors = []
    for path in sorted(folder.glob("*.png")):
        png = path.read_bytes()
        probabilities, ood = runner.run(resize(Image.open(io.BytesIO(png)))[None])
        vectors.append(
            {
                "name": path.stem,
                "png_base64": base64.b64encode(png).decode(),
                "probabilities": [round(float(p), 6) for p in probabilities[0]],
                "ood": round(float(ood[0]), 6),
            }
        )
        print(path.stem, vectors[-1]["probabilities"], vectors[-1]["ood"])
    return vectors


def evaluation(runner: Runner, work: Path, limits: dict) -> dict:
    """What the thresholds buy, on val photos and drawn strangers that nothing was fitted on."""
    photos = Photos(work)
    on_val = figures(*runner.run(photos.pixels[photos.val]), photos.labels[photos.val], limits)
    by_family = abstained(score_non_lesions(runner, HELD_OUT), limits)
    return {
        "data": f"{len(photos.val)} HAM10000 photos (val, no lesion of the training) and drawn non-lesions of kinds "
        "not fitted on",
        **{name: round(on_val[name], 4) for name in ("coverage", "risk", "melanomas_answered_benign")},
        "non_lesions_abstained": round(float(np.mean(list(by_family.values()))), 4),
    }


def main(work: Path) -> None:
    network, quality = HERE / "model.onnx", HERE / "quality.json"
    fitted = export_network(work, network)
    content = network.read_bytes()
    runner = Runner(network, fitted["temperature"], MEAN, STD)
    limits = {"min_probability": fitted["min_probability"], "max_ood": fitted["max_ood"]}
    manifest = {
        "format": 1,
        "name": "lesion-demo",
        "version": "0.5.0",
        "licence": "CC-BY-NC-4.0",
        "network": {
            "file": network.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
        },
        "labels": [{"code": c, "name": NAMES[c], "malignant": c in MALIGNANT} for c in CODES],
        "input": {
            "name": "input", "layout": "nchw", "type": "float32", "width": WIDTH, "height": HEIGHT,
            "resize": "bilinear", "scale": 1 / 255, "mean": MEAN, "std": STD,
        },
        "outputs": {"scores": {"name": "logits", "kind": "logits"}, "ood": {"name": "ood"}, "map": {"name": "map"}},
        "temperature": fitted["temperature"],
        "abstention": limits,
        "evaluation": evaluation(runner, work, limits),
        "quality": json.loads(quality.read_text()),
        "golden": {"tolerance": 0.02, "pictures": golden(runner, work / "golden")},
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest["evaluation"], indent=2), f"model.onnx {len(content) / 1e6:.2f} MB", sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
