"""That check.py fails where it should, on figures made up here: it takes a second. check.sh runs it first."""

import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

from check import CORNERS, Scores, card_differences, differences, explained, map_problems
from evaluate import HERE, RECORDED, Val
from prepare import CODES
from strangers import FITTED, HELD_OUT

LIMITS = {"min_probability": 0.6, "max_ood": 0.0}
NAEVUS, MELANOMA = CODES.index("nv"), CODES.index("mel")


def rows(count: int, top: float) -> np.ndarray:
    """Probabilities of pictures that are all taken for a naevus."""
    probabilities = np.full((count, len(CODES)), (1 - top) / (len(CODES) - 1))
    probabilities[:, NAEVUS] = top
    return probabilities


def scores() -> Scores:
    """Naevi that are answered, melanomas that are not since their answer is unsure, and strangers that are refused."""
    labels = np.repeat(range(len(CODES)), 100)
    probabilities = np.where((labels == MELANOMA)[:, None], rows(len(labels), 0.5), rows(len(labels), 0.9))
    drawn = (rows(100, 0.9), np.ones(100))
    held_out, fitted = ({family.__name__: drawn for family in families} for families in (HELD_OUT, FITTED))
    return Scores(held_out, fitted, Val([], labels, labels, probabilities, np.full(len(labels), -1.0)))


def maps(height: int = 9, width: int = 12) -> tuple[list, list[list]]:
    """Of a network that adds up what it sees at each place; a spot is one place in a corner."""
    plain = np.random.default_rng(1).uniform(0, 0.1, (20, height, width))

    def output(seen: np.ndarray) -> list[np.ndarray]:
        return [np.eye(len(CODES))[NAEVUS] * (0.3 + seen.sum((1, 2)))[:, None], seen]

    spotted = []
    for bottom, right in CORNERS:
        seen = plain.copy()
        seen[:, -2 if bottom else 1, -2 if right else 1] += 1
        spotted.append(output(seen))
    return output(plain), spotted


class Check(unittest.TestCase):
    def test_a_bundle_that_is_as_recorded_passes(self):
        told = scores().told(LIMITS)
        self.assertEqual(differences(told, told, RECORDED, "record"), [])
        self.assertEqual(map_problems(**explained(*maps())), [])

    def test_a_threshold_let_go_is_found_in_the_figures_that_it_is_for(self):
        recorded = scores().told(LIMITS)
        for limit, found in (
            ({"min_probability": 0.4}, "melanomas_answered_benign is 1.0000, in record 0.0000"),
            ({"max_ood": 2.0}, "non_lesions_abstained is 0.0000, in record 1.0000"),
        ):
            self.assertIn(found, differences(scores().told(LIMITS | limit), recorded, RECORDED, "record"))

    def test_one_picture_is_enough(self):
        recorded = scores().told(LIMITS)
        one = scores()
        one.val.probabilities[np.flatnonzero(one.val.labels == MELANOMA)[0]] = rows(1, 0.9)
        one.fitted["skin"] = (rows(100, 0.9), np.where(np.arange(100) == 0, -1.0, 1.0))
        found = differences(one.told(LIMITS), recorded, RECORDED, "record")
        for figure in ("melanomas_answered_benign is 0.0100", "abstained_on_skin is 0.9900"):
            self.assertTrue(any(figure in problem for problem in found), found)

    def test_a_figure_that_is_missing_or_no_number_is_found(self):
        told = scores().told(LIMITS)
        for name in RECORDED:
            for recorded in ({other: told[other] for other in RECORDED if other != name}, told | {name: float("nan")}):
                self.assertEqual(len(differences(told, recorded, RECORDED, "record")), 1, name)

    def test_an_edited_card_is_found_and_what_was_not_measured_may_be_any_number(self):
        sections = ["accuracy 0.797", "it took ? ms"]
        self.assertEqual(card_differences("accuracy 0.797\n\nit took 13 ms\n", sections, True), [])
        for card in ("accuracy 0.798\n\nit took 13 ms\n", "accuracy 0.797\n", "accuracy 0.797\n\nit took 13 ms\n\nmore"):
            self.assertTrue(card_differences(card, sections, True), card)
        self.assertEqual(card_differences("more\nit took 13 ms\n", sections[1:], False), [])
        self.assertTrue(card_differences("it took long\n", sections[1:], False))

    def test_a_map_that_is_turned_or_of_another_size_is_found(self):
        plain, spotted = maps()
        for turn in (
            lambda values: values[:, ::-1],
            lambda values: values[:, :, ::-1],
            lambda values: (values + values[:, ::-1, ::-1]) / 2,
        ):
            turned = [[logits, turn(values)] for logits, values in spotted]
            self.assertIn("spots", " ".join(map_problems(**explained([plain[0], turn(plain[1])], turned))))
        larger = [[logits, 1.2 * values] for logits, values in spotted]
        self.assertIn("strays", " ".join(map_problems(**explained([plain[0], 1.2 * plain[1]], larger))))

    def test_the_program_ends_with_1(self):
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(HERE, Path(folder) / "model", ignore=shutil.ignore_patterns("samples"))
            recorded = json.loads((copy / "evaluation.json").read_text())
            del recorded["non_lesions_abstained"]
            (copy / "evaluation.json").write_text(json.dumps(recorded))
            done = subprocess.run([sys.executable, "-B", copy / "check.py"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn("evaluation.json holds no non_lesions_abstained", done.stderr)


if __name__ == "__main__":
    unittest.main()
