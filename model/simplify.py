"""Makes of an exported graph the one that is shipped: the same sums in fewer nodes, and in half the file.

What is done here once, ONNX Runtime would otherwise do at the start of each process, or at each run. Read by export.py.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

# Smaller tensors stay as they are: they save nothing.
HALVED_FROM = 1000


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's basic optimisations: what is known before a run is worked out, in standard operators still."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(folded)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        model = onnx.load(folded)
    # It declares its own operators as well, and uses none.
    standard = [opset for opset in model.opset_import if not opset.domain]
    replace(model.opset_import, standard)
    return model


def replace(field, values: list) -> None:
    """Other values in a repeated field, which may be some of its own."""
    values = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(values)


def pad_within(graph: onnx.GraphProto) -> None:
    """Has each convolution pad with zeros what a node before it padded, copying the whole map: an eighth of a run's
    time. PyTorch's convolutions pad both sides alike, TensorFlow's "same" does not."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    folded = []
    for node in graph.node:
        pad = made_by.get(node.input[0])
        if node.op_type != "Conv" or pad is None or pad.op_type != "Pad":
            continue
        readers = [reader for reader in graph.node if pad.output[0] in reader.input]
        before_and_after = values[pad.input[1]].reshape(2, 4)
        constant = values[pad.input[2]] if len(pad.input) > 2 and pad.input[2] else 0
        mode = [attribute.s for attribute in pad.attribute if attribute.name == "mode"]
        if len(readers) > 1 or before_and_after[:, :2].any() or constant != 0 or mode not in ([], [b"constant"]):
            continue
        own = next(attribute for attribute in node.attribute if attribute.name == "pads")
        own.ints[:] = (np.array(own.ints) + before_and_after[:, 2:].ravel()).tolist()
        node.input[0] = pad.input[0]
        folded.append(pad)
    for pad in folded:
        graph.node.remove(pad)
    read = {name for node in graph.node for name in node.input}
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])


def halve(graph: onnx.GraphProto) -> None:
    """Stores the large weights as float16 behind a Cast, which ONNX Runtime folds while loading: half the file, and
    the sums stay in float32. The whitening matrix is left alone."""
    casts, kept = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < HALVED_FROM or "strangeness" in tensor.name:
            kept.append(tensor)
            continue
        kept.append(numpy_helper.from_array(values.astype(np.float16), tensor.name + ".half"))
        casts.append(helper.make_node("Cast", [tensor.name + ".half"], [tensor.name], to=TensorProto.FLOAT))
    replace(graph.initializer, kept)
    replace(graph.node, casts + list(graph.node))


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that is shipped. `model` takes one picture: of a batch of any size hardly a shape is known."""
    model = fold(model)
    pad_within(model.graph)
    halve(model.graph)
    onnx.checker.check_model(model, full_check=True)
    return model
