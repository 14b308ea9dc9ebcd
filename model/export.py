"""Writes the bundle: model.onnx and manifest.json, with golden vectors computed from the files written.

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
import onnxruntime
import torch
from PIL import Image

from calibrate import load_network
from network import MEAN, STD, Bundle
from prepare import CODES, MALIGNANT, SIDE, resize

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
    saved = torch.load(work / "calibration.pt")
    bundle = Bundle(load_network(work), *saved["statistics"]).eval()
    raw = io.BytesIO()
    # The newer exporter writes stack traces with this machine's paths into the file.
    torch.onnx.export(
        bundle, (torch.zeros(1, 3, SIDE, SIDE),), raw, dynamo=False, opset_version=17,
        input_names=["input"], output_names=["logits", "ood"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}, "ood": {0: "batch"}},
    )
    model = onnx.load_from_string(raw.getvalue())
    # Nothing of the machine that exported it, in either exporter's fields.
    for node in model.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return saved["calibration"]


class Runner:
    """The bundle as its users run it: files in, calibrated probabilities and the ood score out."""

    def __init__(self, network: Path, temperature: float):
        self.session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
        self.temperature = temperature

    def run(self, photos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, SIDE, SIDE, 3] to probabilities [N, 7] and ood [N]."""
        pixels = (photos * np.float32(1 / 255) - np.float32(MEAN)) / np.float32(STD)
        logits, ood = self.session.run(["logits", "ood"], {"input": pixels.transpose(0, 3, 1, 2)})
        scaled = np.exp((logits - logits.max(1, keepdims=True)) / self.temperature)
        return scaled / scaled.sum(1, keepdims=True), ood


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


def main(work: Path) -> None:
    network, quality = HERE / "model.onnx", HERE / "quality.json"
    fitted = export_network(work, network)
    content = network.read_bytes()
    manifest = {
        "format": 1,
        "name": "lesion-demo",
        "version": "0.1.0",
        "licence": "CC-BY-NC-4.0",
        "network": {
            "file": network.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
        },
        "labels": [{"code": c, "name": NAMES[c], "malignant": c in MALIGNANT} for c in CODES],
        "input": {
            "name": "input", "layout": "nchw", "type": "float32", "width": SIDE, "height": SIDE,
            "resize": "bilinear", "scale": 1 / 255, "mean": MEAN, "std": STD,
        },
        "outputs": {"scores": {"name": "logits", "kind": "logits"}, "ood": {"name": "ood"}},
        "temperature": fitted["temperature"],
        "abstention": {"min_probability": fitted["min_probability"], "max_ood": fitted["max_ood"]},
        "quality": json.loads(quality.read_text()),
        "golden": {
            "tolerance": 0.02,
            "pictures": golden(Runner(network, fitted["temperature"]), work / "golden"),
        },
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(f"model.onnx {len(content) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
