"""Fits what rests on the trunk alone, the texture classifier and the out-of-distribution score, and what the manifest
states beside the weights, on train photos that the scoring network or statistics have not met: the temperature and
both abstention thresholds.

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
from network import (
    TEXTURE_SHARE, TRUNK, LesionNet, Strangeness, Texture, blended, both_ways, normalise, strangeness_features,
    texture_means,
)
from prepare import CODES, FOLDS, SEED, Photos, resize
from score import figures
from train import CALIBRATION_FOLDS

# Share of real photos that may be refused as strange.
REFUSED_AS_STRANGE = 0.015
# How far the logits lean towards the rare classes, by the logarithm of the classes' shares (1 would make all alike,
# beside what the network leans for having met them more often than they occur), and what melanoma's gets on top.
RARE_LEAN, MELANOMA_LEAN = 0.22, 0.3
# Share of melanomas that may be answered with a benign class, and what that may cost in photos answered.
MELANOMAS_MISSED, LEAST_COVERAGE = 0.12, 0.75
# The texture classifier's: what a changed view of a photo counts for beside the photo as it is, the penalty on squared
# weights, and the part of the channels' average deviation that is added to each one's own.
CHANGED_SHARE, PENALTY, LEAST_DEVIATION = 0.1, 0.02, 0.03
BENIGN = [CODES.index(code) for code in ("bkl", "df", "nv", "vasc")]
MELANOMA = CODES.index("mel")


def load_network(work: Path, job: str) -> LesionNet:
    network = LesionNet(len(CODES))
    network.load_state_dict(torch.load(work / f"weights-{job}.pt"))
    return network.eval().to(memory_format=torch.channels_last)


def batches(photos: np.ndarray, count: int = 64):
    return (photos[i : i + count] for i in range(0, len(photos), count))


def trunk_features(trunk: LesionNet, photos: np.ndarray, change=as_input) -> tuple[torch.Tensor, torch.Tensor]:
    """What the texture classifier and the out-of-distribution score see of photos, uint8 [N, H, W, 3], as they are or
    changed."""
    texture, early = [], []
    with torch.no_grad():
        for batch in batches(photos):
            maps = trunk.maps(both_ways(normalise(change(batch))), TRUNK)
            texture.append(texture_means(maps))
            early.append(strangeness_features(maps.early.chunk(2)[0]))
    return torch.cat(texture), torch.cat(early).double()


def minimise(loss_of, values: torch.Tensor) -> torch.Tensor:
    """The values of least loss, by L-BFGS from those given."""
    values.requires_grad_()
    optimizer = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(values)
        loss.backward()
        return loss

    optimizer.step(closure)
    return values.detach()


def lean(labels: np.ndarray) -> torch.Tensor:
    """What the logits get on top."""
    towards = -RARE_LEAN * torch.log(torch.from_numpy(np.bincount(labels, minlength=len(CODES)) / len(labels)))
    towards[MELANOMA] += MELANOMA_LEAN
    return towards.float()


def fit_texture(plain: torch.Tensor, changed: torch.Tensor, labels: np.ndarray) -> Texture:
    """The texture classifier. The lean of all the logits goes by its bias."""
    texture = Texture(plain.shape[1], len(CODES))
    deviation = plain.std(0)
    texture.shift, texture.scale = plain.mean(0), 1 / (deviation + LEAST_DEVIATION * deviation.mean())
    terms, target = [texture.terms(part) for part in (plain, changed)], torch.from_numpy(labels)

    def loss(fitted: torch.Tensor) -> torch.Tensor:
        weight, bias = fitted[:, :-1], fitted[:, -1]
        on_plain, on_changed = (F.cross_entropy(part @ weight.T + bias, target) for part in terms)
        return (on_plain + CHANGED_SHARE * on_changed) / (1 + CHANGED_SHARE) + PENALTY * weight.square().sum()

    fitted = minimise(loss, torch.zeros(len(CODES), plain.shape[1] + 1))
    texture.weight, texture.bias = fitted[:, :-1].contiguous(), fitted[:, -1] + lean(labels) / TEXTURE_SHARE
    return texture


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

    def loss(fitted: torch.Tensor) -> torch.Tensor:
        told = F.binary_cross_entropy_with_logits(terms @ fitted[:-1] + fitted[-1], target, weight)
        return told + 0.01 * fitted[:-1].square().sum()

    fitted = minimise(loss, torch.zeros(terms.shape[1] + 1, dtype=torch.double))
    score.weight, score.bias = fitted[:-1], fitted[-1]
    return score


def strangeness(
    trunk: LesionNet, plain: torch.Tensor, changed: torch.Tensor, fold: np.ndarray
) -> tuple[Strangeness, float]:
    """The score fitted on all train photos, and the threshold from scores of folds that it was not fitted on."""
    def drawn_features(pictures: list) -> torch.Tensor:
        return trunk_features(trunk, np.stack([resize(picture) for picture in pictures]))[1]

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


def unseen_logits(
    work: Path, photos: Photos, plain: torch.Tensor, changed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the photos of each calibration fold, from the network that was trained and the texture
    classifier that is fitted without it."""
    logits, labels, fold, known = [], [], photos.fold[photos.train], photos.labels[photos.train]
    for left_out in CALIBRATION_FOLDS:
        network, rows, others = load_network(work, str(left_out)), fold == left_out, fold != left_out
        with torch.no_grad():
            parts = [network(normalise(as_input(batch))) for batch in batches(photos.pixels[photos.train[rows]])]
        texture = fit_texture(plain[others], changed[others], known[others])
        logits.append(blended(torch.cat(parts), texture(plain[rows])))
        labels.append(torch.from_numpy(known[rows]))
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
    for threshold in np.arange(0.2, 1, 0.01):
        missed = (benign & (top[labels == MELANOMA] >= threshold)).float().mean().item()
        if missed <= MELANOMAS_MISSED or (top >= threshold + 0.01).float().mean() < LEAST_COVERAGE:
            break
    return round(float(threshold), 2)


def main(work: Path) -> None:
    torch.manual_seed(SEED)
    photos, trunk = Photos(work), LesionNet(len(CODES))
    trunk.load_backbone()
    trunk.eval().to(memory_format=torch.channels_last)
    pixels, fold = photos.pixels[photos.train], photos.fold[photos.train]
    (plain, early), (changed, changed_early) = (trunk_features(trunk, pixels, change) for change in (as_input, augment))
    score, max_ood = strangeness(trunk, early, changed_early, fold)
    texture = fit_texture(plain, changed, photos.labels[photos.train])
    logits, labels = unseen_logits(work, photos, plain, changed)
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
    saved = {"texture": texture.state_dict(), "strangeness": score.state_dict(), "calibration": calibration}
    torch.save(saved, work / "calibration.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
