"""Fits what the manifest states beside the weights, on train photos alone that the scoring network or statistics
have not met: the temperature, how far the class priors are put back, both abstention thresholds, and before them
the out-of-distribution score.

usage: calibrate.py WORK_DIR
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import strangers
from augment import as_input, augment
from draw import draw_lesions
from network import EARLY, LesionNet, Strangeness, normalise, strangeness_features
from prepare import CODES, FOLDS, SEED, Photos, resize
from score import figures
from train import CALIBRATION_FOLDS

# Share of real photos that may be refused as strange.
REFUSED_AS_STRANGE = 0.015
# How far the logits are put back from the sampled to the true frequencies: 1 fully. What is left out leans towards
# the rare classes.
PRIOR = 0.25
# What melanoma's logit gets on top.
MELANOMA_LEAN = 0.6
# Share of melanomas that may be answered with a benign class, and what that may cost in photos answered.
MELANOMAS_MISSED, LEAST_COVERAGE = 0.12, 0.75
BENIGN = [CODES.index(code) for code in ("bkl", "df", "nv", "vasc")]
MELANOMA = CODES.index("mel")


def load_network(work: Path, job: str) -> LesionNet:
    """A trained network, its logits leaning as described above."""
    saved, network = torch.load(work / f"weights-{job}.pt"), LesionNet(len(CODES))
    network.load_state_dict(saved["network"])
    with torch.no_grad():
        network.head.bias -= PRIOR * torch.log(saved["excess"])
        network.head.bias[MELANOMA] += MELANOMA_LEAN
    return network.eval().to(memory_format=torch.channels_last)


def batches(photos: np.ndarray, count: int = 64):
    return (photos[i : i + count] for i in range(0, len(photos), count))


def early_features(network: LesionNet, photos: np.ndarray, change=as_input) -> torch.Tensor:
    """What the out-of-distribution score sees of photos, uint8 [N, H, W, 3], as they are or changed."""
    with torch.no_grad():
        parts = [strangeness_features(network.maps(normalise(change(batch)), count=EARLY)[-1]) for batch in batches(photos)]
    return torch.cat(parts).double()


def fit_strangeness(plain: torch.Tensor, changed: torch.Tensor, drawn: torch.Tensor, strange: torch.Tensor) -> Strangeness:
    """Photos as they are and changed, and drawn lesions, against drawn strangers. The drawn lesions are there lest it
    learn to tell drawn from photographed."""
    real = torch.cat([plain, changed])
    score = Strangeness(real.shape[1]).double()
    score.shift = real.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((real - score.shift).T))
    # A little of the average variance everywhere: no direction counts for being unused by chance.
    score.whiten = vectors / torch.sqrt(values + 0.01 * values.mean())
    terms = torch.cat([score.terms(part) for part in (real, drawn, strange)])
    target = torch.cat([torch.zeros(len(real) + len(drawn)), torch.ones(len(strange))]).double()
    shares = [(len(real), 1.0), (len(drawn), 0.5 * len(real) / len(drawn)), (len(strange), len(real) / len(strange))]
    weight = torch.cat([torch.full((count,), share) for count, share in shares]).double()
    fitted = torch.zeros(terms.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(terms @ fitted[:-1] + fitted[-1], target, weight)
        loss = loss + 0.01 * fitted[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    score.weight, score.bias = fitted.detach()[:-1], fitted.detach()[-1]
    return score


def strangeness(network: LesionNet, photos: Photos) -> tuple[Strangeness, float]:
    """The score fitted on all train photos, and the threshold from scores of folds that it was not fitted on."""
    def drawn_features(pictures: list) -> torch.Tensor:
        return early_features(network, np.stack([resize(picture) for picture in pictures]))

    pixels, fold = photos.pixels[photos.train], photos.fold[photos.train]
    plain, changed = early_features(network, pixels), early_features(network, pixels, augment)
    drawn = drawn_features(draw_lesions(SEED, 160))
    strange = drawn_features(strangers.draw(strangers.FITTED, SEED))
    scores, changed_scores = torch.zeros(2, len(plain), dtype=torch.double)
    for left_out in range(FOLDS):
        rows = torch.from_numpy(fold == left_out)
        score = fit_strangeness(plain[~rows], changed[~rows], drawn, strange)
        scores[rows], changed_scores[rows] = score(plain[rows]), score(changed[rows])
    limit = torch.quantile(scores, 1 - REFUSED_AS_STRANGE).item()
    print(f"refused of the changed views: {(changed_scores > limit).double().mean():.3f}")
    return fit_strangeness(plain, changed, drawn, strange).float(), round(limit, 3)


def unseen_logits(work: Path, photos: Photos) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the photos of each calibration fold, from the network that was trained without it."""
    logits, labels = [], []
    for left_out in CALIBRATION_FOLDS:
        network, rows = load_network(work, str(left_out)), np.flatnonzero(photos.fold == left_out)
        with torch.no_grad():
            for batch in batches(photos.pixels[rows]):
                logits.append(network(normalise(as_input(batch))))
        labels.append(torch.from_numpy(photos.labels[rows]))
    return torch.cat(logits), torch.cat(labels)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature of least log loss (Guo et al. 2017), by search: there is one parameter."""
    candidates = torch.logspace(-0.7, 0.7, 400)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in candidates])
    return round(candidates[losses.argmin()].item(), 4)


def fit_min_probability(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The lowest threshold at which no more than MELANOMAS_MISSED of the melanomas get a benign answer, or the highest
    that leaves LEAST_COVERAGE."""
    top, answer = probabilities.max(1)
    benign = torch.isin(answer, torch.tensor(BENIGN))[labels == MELANOMA]
    for threshold in np.arange(0.2, 1, 0.002):
        missed = (benign & (top[labels == MELANOMA] >= threshold)).float().mean().item()
        if missed <= MELANOMAS_MISSED or (top >= threshold + 0.002).float().mean() < LEAST_COVERAGE:
            break
    return round(float(threshold), 3)


def main(work: Path) -> None:
    torch.manual_seed(SEED)
    photos = Photos(work)
    score, max_ood = strangeness(load_network(work, "all"), photos)
    logits, labels = unseen_logits(work, photos)
    temperature = fit_temperature(logits, labels)
    probabilities = torch.softmax(logits / temperature, 1)
    calibration = {
        "temperature": temperature,
        "min_probability": fit_min_probability(probabilities, labels),
        "max_ood": max_ood,
    }
    print(calibration, f"on {len(labels)} photos not trained on, out of distribution left aside:", sep="\n")
    for name, value in figures(probabilities.numpy(), np.full(len(labels), -np.inf), labels.numpy(), calibration).items():
        print(f"{name} {value:.3f}")
    torch.save({"strangeness": score.state_dict(), "calibration": calibration}, work / "calibration.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
