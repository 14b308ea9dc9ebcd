"""Photos to predictions in Rust (main.rs) beside Python (twin.py): the same photos, the same network, the
same ONNX Runtime, one thread each, in turns within each round. Figures are medians of the rounds' medians,
of the processor's time, so that others who want it change little.

scripts/bench vision calls it. Prints tables and a line for each target; ends with 0 whatever they are.
"""

import base64
import csv
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from PIL import Image

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
SHARED = ROOT.parent / "shared"
SEED = 20
SCORES_WITHIN = 0.02


class Bench:
    def __init__(self, rust, work, quick):
        self.rust, self.work, self.quick = rust, work, quick
        self.targets = []

    def call(self, arguments, photos=()):
        given = "".join(f"{photo}\n" for photo in photos)
        done = subprocess.run([str(part) for part in arguments], input=given, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, arguments))}: {done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def stages(self, model, how, photos):
        """Lines of photos and the last one, of the process."""
        rust = how in ("reduced", "whole")
        program = [self.rust] if rust else [sys.executable, HERE / "twin.py"]
        *lines, process = self.call([*program, "stages", model, how], photos)
        return lines, process

    def target(self, what, found, wanted, reached):
        self.targets.append(f"{'reached    ' if reached else 'NOT reached'} {what}: {found}, wanted {wanted}")

    # -- what is measured

    def times(self, name, model, photos, rounds):
        sides = ["reduced", "whole", "draft", "quarter", "plain", "opencv"]
        names = {"reduced": "Rust", "whole": "Rust, every pixel", "draft": "Pillow, draft", "quarter": "Pillow, draft to 1/4",
                 "plain": "Pillow", "opencv": "OpenCV, 1/8"}
        taken = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                lines, process = self.stages(model, side, photos)
                row = [statistics.median(line[stage] for line in lines) for stage in ("decode", "tensor", "run")]
                to_tensor = statistics.median(line["decode"] + line["tensor"] for line in lines)
                taken[side].append([*row, to_tensor, process["peak_mb"], process["run"]])
        print(f"\n{name}, {len(photos)} photos of 12 megapixels, {rounds} rounds; milliseconds of the processor, medians")
        print(f"{'':<22}{'decode':>8}{'tensor':>8}{'run':>8}{'to tensor':>11}{'peak MB':>9}{'bare run':>10}")
        rows = {side: [statistics.median(column) for column in zip(*taken[side])] for side in sides}
        for side in sides:
            cells = rows[side]
            widths = (8, 8, 8, 11, 9, 10)
            print(f"{names[side]:<22}" + "".join(f"{cell:>{width}.2f}" for cell, width in zip(cells, widths)))
        rust, draft, plain = rows["reduced"], rows["draft"], rows["plain"]
        for what, value, most in (
            ("decode to tensor over Pillow's with draft to an eighth", rust[3] / draft[3], 0.95),
            ("decode to tensor over Pillow's with draft to the same quarter", rust[3] / rows["quarter"][3], 0.95),
            ("decode to tensor over plain Pillow's", rust[3] / plain[3], 0.25),
            ("peak memory over Python's with draft", rust[4] / draft[4], 0.6),
            ("run and reading over onnxruntime's bare run", rust[5] / rows["draft"][5], 1.05),
        ):
            self.target(f"{name}, {what}", f"{value:.2f}", f"<= {most}", value <= most)

    def cold(self, name, model, photo, times):
        sides = {"Rust": [self.rust, "cold", model, photo], "Python": [sys.executable, HERE / "twin.py", "cold", model, photo]}
        taken = {side: [] for side in sides}
        for _ in range(times):
            for side, command in sides.items():
                started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                self.call(command)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                taken[side].append([1e3 * (time.perf_counter() - started), 1e3 * processor])
        rust, python = ([statistics.median(column) for column in zip(*values)] for values in taken.values())
        print(f"\n{name}, process start to the end of its first prediction, golden pictures of Rust included:")
        for place, clock in enumerate(("on the clock", "of the processor")):
            print(f"{clock:<22}Rust {rust[place]:.0f} ms, Python {python[place]:.0f} ms")
            share = rust[place] / python[place]
            self.target(f"{name}, cold start over Python's, {clock}", f"{share:.2f}", "<= 0.35", share <= 0.35)

    def agreement(self, what, model, one, other, photos, others=None, within=None, share=None):
        first, second = self.stages(model, one, photos)[0], self.stages(model, other, others or photos)[0]
        off = [max(abs(a - b) for a, b in zip(x["probabilities"], y["probabilities"])) for x, y in zip(first, second)]
        best = lambda line: max(range(len(line["probabilities"])), key=line["probabilities"].__getitem__)
        same = sum(best(x) == best(y) for x, y in zip(first, second)) / len(first)
        close = sum(value <= SCORES_WITHIN for value in off) / len(off)
        off.sort()
        print(f"{what}: same top-1 {100 * same:.2f} % of {len(off)}, scores off by {off[len(off) // 2]:.4f} (median), "
              f"{off[int(0.99 * (len(off) - 1))]:.4f} (99 %), {off[-1]:.4f} (most), within {SCORES_WITHIN} on {100 * close:.2f} %")
        if share:
            self.target(f"{what}, same top-1", f"{100 * same:.2f} %", f">= {100 * share} %", same >= share)
        if within:
            self.target(f"{what}, scores", f"{off[-1]:.4f} at most", f"<= {within}", off[-1] <= within)

    def settings(self, name, model):
        print(f"\n{name}, session settings: creation and run in ms of the processor, run on the clock", flush=True)
        for line in self.call([sys.executable, HERE / "twin.py", "settings", model]):
            print(f"{line['setting']:<42}{line['create']:>8.1f}{line['run']:>8.2f}{line['clock']:>8.2f}")

    def int8(self, name, model):
        print(f"\n{name}, in int8 beside it", flush=True)
        command = [sys.executable, HERE / "int8.py", model, SHARED / "data/ham10000", *["--quick"][: self.quick]]
        subprocess.run([str(part) for part in command], check=True)


def reference(folder):
    """The classifier beside the repository as a bundle, by its README; golden pictures from its own table."""
    network = SHARED / "models/ham10000_mnv2_linear_fp32.onnx"
    shipped = json.loads((ROOT / "model/manifest.json").read_text())
    rows = list(csv.reader(network.with_suffix(".expected.csv").open()))[1:]

    def golden(row):
        png = io.BytesIO()
        Image.open(SHARED / f"data/ham10000/images/{row[0]}.jpg").save(png, "PNG")
        encoded = base64.b64encode(png.getvalue()).decode()
        return {"name": row[0], "png_base64": encoded, "probabilities": [float(value) for value in row[2:]]}

    manifest = {
        "format": 1, "name": "reference", "version": "1", "licence": "research only",
        "network": {"file": "reference.onnx", "sha256": hashlib.sha256(network.read_bytes()).hexdigest(),
                    "size_bytes": network.stat().st_size},
        "labels": shipped["labels"],
        "input": {"name": "input", "layout": "nchw", "type": "float32", "width": 224, "height": 224, "resize": "bilinear",
                  "scale": 1 / 127.5, "mean": [1.0] * 3, "std": [1.0] * 3},
        "outputs": {"scores": {"name": "probabilities", "kind": "probabilities"}},
        "temperature": 1.0, "abstention": {"min_probability": 0.0}, "quality": shipped["quality"],
        "golden": {"tolerance": 0.02, "pictures": [golden(row) for row in (rows[0], rows[28])]},
    }
    (folder / "reference.onnx").write_bytes(network.read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def other_forms(photos, folder):
    """What phones seldom make, each as large as a phone's: the same pixels in pairs of (form, plain)."""
    forms = {
        "progressive": ("jpg", "RGB", {"progressive": True}), "CMYK": ("jpg", "CMYK", {}), "greyscale": ("jpg", "L", {}),
        "16-bit PNG": ("png", "I;16", {}),
    }
    for name, (suffix, mode, options) in forms.items():
        target = folder / name
        target.mkdir()
        for photo in photos:
            picture = Image.open(photo)
            picture = picture.convert("L").convert("I").point(lambda value: value * 257).convert("I;16") if mode == "I;16" else picture.convert(mode)
            picture.save(target / f"{photo.stem}.{suffix}", **({"quality": 85, **options} if suffix == "jpg" else {}))
        yield name, sorted(target.iterdir())
    target = folder / "rotated"
    target.mkdir()
    for photo in photos:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(target / photo.name, quality=85, exif=exif)
    yield "rotated", sorted(target.iterdir())


def main(rust, quick):
    images = SHARED / "data/ham10000/images"
    if not images.is_dir():
        sys.exit("scripts/bench vision: there are no real photos in ../shared/data/ham10000")
    every = sorted(images.iterdir())
    chosen = random.Random(SEED).sample(every, len(every))
    large, timed, forms, rounds = (16, 8, 4, 1) if quick else (200, 40, 20, 3)
    small = chosen[:100] if quick else every
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        work = pathlib.Path(work)
        bench = Bench(rust, work, quick)
        phone = work / "phone"
        phone.mkdir()
        bench.call([rust, "enlarge", phone], chosen[:large])
        taken = sorted(phone.iterdir())
        (work / "reference").mkdir()
        models = {"shipped network": ROOT / "model", "reference network": reference(work / "reference")}
        for name, model in models.items():
            bench.times(name, model, taken[:timed], rounds)
            bench.cold(name, model, every[0], 3 if quick else 9)
            bench.settings(name, model)
            if name == "shipped network":
                bench.int8(name, model)
            print()
            of_them = small if name == "shipped network" else chosen[: min(len(small), 1000)]
            bench.agreement(f"{name}, 12 megapixels reduced and every pixel", model, "reduced", "whole", taken, share=0.995)
            bench.agreement(f"{name}, photos as they are reduced and every pixel", model, "reduced", "whole", of_them, share=0.995)
            bench.agreement(f"{name}, Rust and Pillow, each its own decoder", model, "reduced", "plain", of_them)
            pixels = work / f"pixels of {name}"
            pixels.mkdir()
            for photo in small[:200]:
                Image.open(photo).save(pixels / f"{photo.stem}.png", compress_level=1)
            same = sorted(pixels.iterdir())
            bench.agreement(f"{name}, Rust and Pillow, the same pixels", model, "reduced", "plain", same, within=SCORES_WITHIN, share=1.0)
            bench.agreement(f"{name}, 12 megapixels, Rust and Pillow at 1/4", model, "reduced", "quarter", taken)
        for form, photos in other_forms(taken[:forms], work):
            bench.agreement(f"shipped network, {form}, reduced and every pixel", models["shipped network"], "reduced", "whole", photos, share=0.995)
    print("\n" + "\n".join(bench.targets))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), "--quick" in sys.argv[2:])
