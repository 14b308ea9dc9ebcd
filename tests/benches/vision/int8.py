"""A bundle's network as it is beside the same in int8: accuracy, calibration, size and speed, on HAM10000's val rows.

usage: int8.py MODEL DATA_DIR [--quick]

Static quantisation (QDQ): convolutions with a scale a channel, what lies between them by the range that 200 train
photos show. Whatever comes after the last convolution stays as it is.
"""

import csv
import json
import logging
import os
import pathlib
import random
import sys
import tempfile

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image

from twin import bare, probabilities, run, session, tensor

CALIBRATED_ON = 200
QUICK = 400
BINS = 10
SEED = 20
QUANTISED = ["Conv", "Add", "Clip", "Relu"]


class Photos(CalibrationDataReader):
    def __init__(self, manifest, data, rows):
        self.left, self.manifest, self.data = iter(rows), manifest, data

    def get_next(self):
        row = next(self.left, None)
        return row and {self.manifest["input"]["name"]: photo(self.data, row, self.manifest)}


def photo(data, row, manifest):
    return tensor(Image.open(data / f"images/{row['image_id']}.jpg").convert("RGB"), manifest)


def whole_weights(network):
    """A network with float32 where its file keeps halves and casts them: only constants are quantised as weights."""
    kept = {weight.name: weight for weight in network.graph.initializer}
    for node in [node for node in network.graph.node if node.op_type == "Cast" and node.input[0] in kept]:
        values = onnx.numpy_helper.to_array(kept[node.input[0]]).astype(numpy.float32)
        network.graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        network.graph.node.remove(node)
    used = {name for node in network.graph.node for name in node.input}
    for weight in [weight for weight in network.graph.initializer if weight.name not in used]:
        network.graph.initializer.remove(weight)
    return network


def quantised(folder, manifest, data, rows, target):
    prepared = target.with_suffix(".prepared.onnx")
    onnx.save(whole_weights(onnx.load(folder / manifest["network"]["file"])), prepared)
    quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(target), Photos(manifest, data, rows), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=QUANTISED,
    )


def calibration_error(found, labels):
    """Expected calibration error, ten bins of the same width."""
    best, right = found.max(1), found.argmax(1) == labels
    places = numpy.minimum((best * BINS).astype(int), BINS - 1)
    return sum(abs((best - right)[places == place].sum()) for place in range(BINS)) / len(labels)


def main(folder, data, quick):
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(3)
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = list(csv.DictReader((data / "labels.csv").open()))
    train = random.Random(SEED).sample([row for row in rows if row["split"] == "train"], CALIBRATED_ON)
    val = [row for row in rows if row["split"] == "val"]
    val = random.Random(SEED).sample(val, QUICK) if quick else val
    codes = [label["code"] for label in manifest["labels"]]
    labels = numpy.array([codes.index(row["dx"]) for row in val])
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        work = pathlib.Path(work)
        quantised(folder, manifest, data, train, work / "int8.onnx")
        files = {"fp32": folder / manifest["network"]["file"], "int8": work / "int8.onnx"}
        networks = {
            name: session(file.parent, {**manifest, "network": {"file": file.name}}) for name, file in files.items()
        }
        found = {name: [] for name in files}
        for row in val:
            values = photo(data, row, manifest)
            for name, network in networks.items():
                found[name].append(probabilities(run(network, manifest, values), manifest))
        # In turns, since the machine may be shared.
        runs = numpy.median([[bare(network, manifest, values) for network in networks.values()] for _ in range(3)], axis=0)
        found = {name: numpy.array(rows) for name, rows in found.items()}
        print(f"{'':<6}{'MB':>6}{'run, ms':>9}{'accuracy':>10}{'balanced':>10}{'ECE':>7}   of {len(val)} val photos")
        for (name, file), took in zip(files.items(), runs):
            right = found[name].argmax(1) == labels
            balanced = numpy.mean([right[labels == code].mean() for code in numpy.unique(labels)])
            print(f"{name:<6}{file.stat().st_size / 1e6:>6.1f}{took:>9.2f}{right.mean():>10.4f}{balanced:>10.4f}"
                  f"{calibration_error(found[name], labels):>7.3f}")
        same = (found["fp32"].argmax(1) == found["int8"].argmax(1)).mean()
        off = numpy.abs(found["fp32"] - found["int8"]).max(1)
        print(f"same top-1 {100 * same:.2f} %, scores off by {numpy.median(off):.4f} (median), {off.max():.4f} (most)")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), "--quick" in sys.argv[3:])
