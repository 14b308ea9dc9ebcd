"""The Python side of scripts/bench vision: the same photos, network and stages as main.rs, on one thread.

  twin.py stages MODEL (draft|quarter|plain|opencv)    paths of photos on standard input; a JSON line for each
  twin.py cold MODEL PHOTO                     one photo, as a process that is started for it
  twin.py settings MODEL                       session settings side by side
"""

import io
import json
import os
import pathlib
import sys
import time

import numpy
import onnxruntime

RUNS = 60
GATE_SIDE = 256


def session(folder, manifest, threads=1, level=None, **options):
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    made.graph_optimization_level = level or onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for name, value in options.items():
        setattr(made, name, value)
    path = folder / manifest["network"]["file"]
    return onnxruntime.InferenceSession(str(path), made, providers=["CPUExecutionProvider"])


def load(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, session(folder, manifest)


def decoded(photo, manifest, how):
    """A file's bytes as Pillow's picture or, of OpenCV, an array of R, G, B."""
    if how == "opencv":
        import cv2

        # It tells no size before it has decoded; photos of HAM10000 are smaller than any phone's.
        flags = cv2.IMREAD_REDUCED_COLOR_8 if len(photo) > 100_000 else cv2.IMREAD_COLOR
        return cv2.cvtColor(cv2.imdecode(numpy.frombuffer(photo, numpy.uint8), flags), cv2.COLOR_BGR2RGB)
    from PIL import Image, ImageOps

    picture = Image.open(io.BytesIO(photo))
    to = manifest["input"]
    if how == "draft":
        # As its users call it: for 12 megapixels an eighth.
        picture.draft("RGB", (to["width"], to["height"]))
    if how == "quarter":
        # As main.rs: the smallest scale of which gate and network are still a reduction by two.
        needed = max(2 * GATE_SIDE, 2 * max(to["width"], to["height"]) * max(picture.size) // min(picture.size))
        picture.draft("RGB", [needed * side // max(picture.size) for side in picture.size])
    # Both copy where nothing is to be done, unless they are kept from it.
    ImageOps.exif_transpose(picture, in_place=True)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def tensor(picture, manifest):
    to = manifest["input"]
    size = (to["width"], to["height"])
    if isinstance(picture, numpy.ndarray):
        import cv2

        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    else:
        from PIL import Image

        small = numpy.asarray(picture.resize(size, Image.Resampling[to["resize"].upper()]))
    mean, std = (numpy.array(to.get(name, default), numpy.float32) for name, default in (("mean", [0] * 3), ("std", [1] * 3)))
    values = (small.astype(numpy.float32) * numpy.float32(to.get("scale", 1.0)) - mean) / std
    if to["layout"] == "nchw":
        values = values.transpose(2, 0, 1)
    return numpy.ascontiguousarray(values[None])


def probabilities(scores, manifest):
    values = scores.astype(numpy.float64)[0]
    if manifest["outputs"]["scores"]["kind"] == "probabilities":
        values = numpy.log(numpy.maximum(values, 1e-12))
    values = values / manifest["temperature"]
    values = numpy.exp(values - values.max())
    return (values / values.sum()).tolist()


def run(network, manifest, values):
    return network.run([manifest["outputs"]["scores"]["name"]], {manifest["input"]["name"]: values})[0]


def stages(folder, how):
    manifest, network = load(folder)
    if how == "opencv":
        import cv2

        cv2.setNumThreads(1)
    values = None
    for line in sys.stdin:
        path = pathlib.Path(line.strip())
        # As main.rs: reading the file is not what is measured.
        photo = path.read_bytes()
        times = [time.thread_time()]
        picture = decoded(photo, manifest, how)
        if how != "opencv":
            picture.load()
        times.append(time.thread_time())
        values = tensor(picture, manifest)
        times.append(time.thread_time())
        answer = probabilities(run(network, manifest, values), manifest)
        times.append(time.thread_time())
        took = [1e3 * (later - earlier) for earlier, later in zip(times, times[1:])]
        print(json.dumps({"name": path.name, **dict(zip(("decode", "tensor", "run"), took)), "probabilities": answer}))
    print(json.dumps({"peak_mb": peak_mb(), "run": bare(network, manifest, values)}))


def peak_mb():
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 1024


def bare(network, manifest, values, clock=time.thread_time):
    """Milliseconds of a session's run with nothing around it: the median of some, every output computed."""
    took, feed = [], {manifest["input"]["name"]: values}
    for _ in range(RUNS):
        started = clock()
        network.run(None, feed)
        took.append(1e3 * (clock() - started))
    return float(numpy.median(took))


def settings(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    to = manifest["input"]
    shape = (1, 3, to["height"], to["width"]) if to["layout"] == "nchw" else (1, to["height"], to["width"], 3)
    values = numpy.zeros(shape, numpy.float32)
    levels = onnxruntime.GraphOptimizationLevel
    sides = [
        ("as it is: one thread, every optimisation", {}),
        ("two threads", {"threads": 2}),
        ("basic optimisations", {"level": levels.ORT_ENABLE_BASIC}),
        ("extended optimisations", {"level": levels.ORT_ENABLE_EXTENDED}),
        ("no arena", {"enable_cpu_mem_arena": False}),
        ("no memory pattern", {"enable_mem_pattern": False}),
    ]
    # The first one waits for the library as well.
    session(folder, manifest)
    made = []
    for name, options in sides:
        started = time.process_time()
        network = session(folder, manifest, **options)
        made.append((name, network, 1e3 * (time.process_time() - started)))
    # In turns, since the machine may be shared. What two threads save is on the clock alone.
    clocks = (time.process_time, time.perf_counter)
    rounds = [[[bare(network, manifest, values, clock) for clock in clocks] for _, network, _ in made] for _ in range(3)]
    for (name, _, creation), (processor, clock) in zip(made, numpy.median(rounds, axis=0).tolist()):
        print(json.dumps({"setting": name, "create": creation, "run": processor, "clock": clock}))


if __name__ == "__main__":
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    command, folder, *others = sys.argv[1:]
    folder = pathlib.Path(folder)
    if command == "stages":
        stages(folder, others[0])
    elif command == "cold":
        manifest, network = load(folder)
        picture = decoded(pathlib.Path(others[0]).read_bytes(), manifest, "draft")
        print(json.dumps(probabilities(run(network, manifest, tensor(picture, manifest)), manifest)))
    else:
        settings(folder)
