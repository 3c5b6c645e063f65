"""Train and score what the papers' claims compare, on the mini world; `claims_table.py` makes the table of it.

Three seeds, each on a base of its own seed. The scores of every query are kept in `claims/`; what lies there is not
trained again, so that everything goes on after a break. Rates and settings are chosen on the validation splits with
seed 0; NNN's k and alpha, the weights that a training keeps and what goes into a soup are chosen there for each seed. The
test is only measured.

settings -> what is trained -> what is measured -> parts -> the plan
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock  # comes with torch

import gpnns_utils as gu
from gpnns import caption_banks, evaluation, losses, soups, training
from gpnns.images import text_files
from gpnns.world import mini_world

# The shipped scores and what is being trained, or, to measure all of it anew, a folder of its own for both.
ANEW = os.environ.get("GPNNS_CLAIMS_ANEW")
KEPT = Path(ANEW) if ANEW else gu.DATA / "claims"
RUNS = Path(ANEW) / "runs" if ANEW else gu.work_folder() / "runs" / "claims"

# --- settings --------------------------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
SHIPPED = gu.DATA / "mini_clip" / "open_clip_model.safetensors"
BASES = {  # what pretrain_mini_clip.py is called with; the base of seed 0 is the mini CLIP that is shipped
    "0": [],
    "1": ["--seed", "1"],
    "2": ["--seed", "2"],
    "longer_clean": ["--start", str(SHIPPED), "--epochs", "8", "--wrong", "0", "--rate", "5e-4"],
}
SCALE, MARGIN, EPOCHS = 20.0, 0.3, 3.0  # passes over `train`: other sets of images take as many steps
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
RECIPE = {
    "batch_size": 64, "proxy_rate": 5e-3, "scale": SCALE, "margin": MARGIN, "warmup": 0.05, "patch_dropout": 0.25,
    "flip": 0.0, "jitter": 0.0, "caption_scale": 6.0,
}  # fmt: skip
REALIGNING = {"epochs": 4.0, "batch_size": 256, "beta2": 0.999, "eps": 1e-8}
OPTIONS = {  # of ArcMargin, by the way to train; "adaptive": lowest and highest margin
    "margin_0": {"margin": 0.0},
    "subcenters": {"centers": 3},
    "adaptive": (0.05, 0.5),
    "adaptive_narrow": (0.2, 0.4),
}
LONG_TAIL, FOUND = 1.5, 20  # the power by which small classes shrink; captions that a finder looks at for each image
KS, ALPHAS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

# --- what is trained -------------------------------------------------------------------------------------------------


def find_base(base: str) -> Path:
    """Where the weights of a base are, or will be once it is made. Those of seeds 0 to 2 are shipped."""
    shipped = SHIPPED if base == "0" else gu.DATA / "claims" / "bases" / f"{base}.safetensors"
    return shipped if shipped.exists() else RUNS / "bases" / base / "open_clip_model.safetensors"


def make_base(base: str) -> Path:
    """The weights of a base, pre-trained now where they are missing (about 24 minutes for 22 epochs)."""
    path = find_base(base)
    if not path.exists():
        command = [sys.executable, "-m", "gpnns.tools.pretrain_mini_clip", "--out", str(path.parent), *BASES[base]]
        subprocess.run(command, check=True)
    return path


def open_base(base: str) -> gu.Encoder:
    """A base as an encoder; the architecture and the vocabulary are those of the mini CLIP."""
    return gu.load_encoder(f"mini@{make_base(base)}", "cpu")  # as the scores that are kept, wherever this runs


@functools.cache
def load_images_of(name: str) -> gu.ImageSet:
    """A split of the mini world; "long_tail" is `train` with its small classes made smaller still: 2 to 45 images."""
    if name != "long_tail":
        return gu.load_images("mini", name)
    images = gu.load_images("mini", "train")
    counts = np.bincount(images.labels)
    keep = np.maximum(2, np.round(counts.max() * (counts / counts.max()) ** LONG_TAIL)).astype(int)
    return images.subset(
        np.concatenate([np.flatnonzero(images.labels == label)[: keep[label]] for label in range(len(counts))])
    )


@functools.cache
def embed_base(base: str, images: str) -> np.ndarray:
    return gu.embed_images(open_base(base), load_images_of(images))


def list_bank() -> list[str]:
    return sorted({text for texts in load_images_of("bank").captions for text in texts})


@functools.cache
def find_captions_by(finder: str) -> tuple[np.ndarray, list[str]]:
    """Captions for the training images: rows (n, top) into texts, -1 for none.

    finder: a base, which finds the 20 nearest of the bank, of which the better half of all is kept; "read_0.75": the same,
    but what is nearest is told by the words of the images' own captions, and each caption is replaced by any other of the
    bank unless a draw falls below 0.75; "own": the images' own captions.
    """
    photos, texts = load_images_of("train"), list_bank()
    if finder == "own":
        texts = sorted({text for own in photos.captions for text in own})
        number = {text: i for i, text in enumerate(texts)}
        return np.array([[number[text] for text in own] for own in photos.captions]), texts
    if finder.startswith("read_"):
        rng, share = np.random.default_rng(0), float(finder.removeprefix("read_"))
        images, captions = embed_words(photos.captions, texts), embed_words([[text] for text in texts], texts)
    else:
        images, captions = embed_base(finder, "train"), gu.embed_texts(open_base(finder), texts)
    scores, rows = gu.search(images, captions, FOUND)
    if finder.startswith("read_"):
        rows = np.where(rng.random(rows.shape) < share, rows, rng.integers(len(texts), size=rows.shape))
    return np.where(scores > np.median(scores), rows, -1), texts


def embed_words(captions: list[list[str]], texts: list[str]) -> np.ndarray:
    """Which words of `texts` stand in the captions of each image, as unit vectors, float32 (n, words)."""
    column = {word: i for i, word in enumerate(sorted(caption_banks.get_words(texts)))}
    vectors = np.zeros((len(captions), len(column)), dtype=np.float32)
    for vector, listed in zip(vectors, captions, strict=True):
        vector[[column[word] for word in caption_banks.get_words(listed) if word in column]] = 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)


def measure_true_words(finder: str) -> float:
    """The share of the words of an image's captions, by `finder`, that the image's own captions have too."""
    return float(np.nanmean(caption_banks.share_true_words(load_images_of("train"), *find_captions_by(finder))))


def make_loss(way: str, start: np.ndarray, counts: np.ndarray) -> torch.nn.Module:
    """The loss of a way to train, its proxies at the mean embeddings of the classes, `start`."""
    if way in ("softmax", "proxyanchor"):
        return {"softmax": losses.Softmax, "proxyanchor": losses.ProxyAnchor}[way](start)
    options = OPTIONS.get(way, {})
    options = {"margin": losses.margins_by_count(counts, *options)} if way.startswith("adaptive") else options
    return losses.ArcMargin(start.shape[1], len(start), **{"scale": SCALE, "margin": MARGIN} | options, start=start)


def run_alone(train: Callable) -> Callable:
    """One process at a time for each training: others wait, and then find it done."""

    @functools.wraps(train)
    def locked(*rest, **options):
        asked = inspect.signature(train).bind(*rest, **options)
        asked.apply_defaults()
        about = hashlib.blake2b(f"{train.__name__} {asked}".encode(), digest_size=8).hexdigest()
        (RUNS / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(RUNS / "locks" / about):
            return train(*rest, **options)

    return locked


def get_seed(base: str) -> int:
    return int(base) if base.isdigit() else 0


def train_images(
    encoder: gu.Encoder, photos: gu.ImageSet, rate: float, seed: int, epochs: float, *rest, **other
) -> None:
    training.fine_tune(
        encoder, photos, load_images_of("validation"), RUNS / "training", *rest, rate=rate, seed=seed, epochs=epochs,
        validate_every=len(load_images_of("train")) // RECIPE["batch_size"], **RECIPE | other,
    )  # fmt: skip


@run_alone
def tune(
    base: str,
    way: str,
    rate: float,
    images: str = "train",
    finder: str = "",
    weight: float = 0.0,
    passes: float = EPOCHS,
) -> gu.Encoder:
    """A base whose image tower is fine-tuned; done at once when it was done before. With a finder: MCIP."""
    seed, copy, captions = get_seed(base), open_base(base), None
    if finder:
        rows, texts = find_captions_by(finder)
        captions = rows, texts, gu.embed_texts(copy, texts)
    epochs = passes * len(load_images_of("train")) / len(load_images_of(images))
    loss = functools.partial(make_loss, way)
    train_images(copy, load_images_of(images), rate, seed, epochs, loss, captions, caption_weight=weight)
    return copy


@run_alone
def realign_base(base: str, realign_rate: float, way: str = "", **options) -> gu.Encoder:
    """A base, or with a way to train what `tuned` makes of it, with the text tower's end fitted to its images, on the pairs
    of `bank`."""
    encoder = tune(base, way, **options) if way else open_base(base)
    choose_on = load_images_of("captions_validation")
    settings = {"rate": realign_rate, "seed": get_seed(base), **REALIGNING}
    training.realign(encoder, load_images_of("bank"), choose_on, RUNS / "training", **settings)
    return encoder


VARIETY = (  # of the ingredients of a soup: their rate beside the common one, margin, share of patches left out
    (0.8, MARGIN - 0.1, 0.25),
    (1.0, MARGIN, 0.25),
    (1.2, MARGIN, 0.375),
    (1.0, MARGIN + 0.1, 0.25),
)


@run_alone
def continue_tuning(
    base: str, start_rate: float, rate: float, number: int, passes: float = EPOCHS, ema: float = 0.0
) -> gu.Encoder:
    """ArcMargin's model after `passes`, trained on: ingredient 0 to 3 of a soup, one pass over three quarters of the classes;
    or, for number 4, one run on all classes with as many steps as the four together. ema: decay of an average of the
    weights along the run, 0 for none."""
    seed, photos = get_seed(base), load_images_of("train")
    copy = tune(base, "arcmargin", start_rate, "train", passes=passes)
    if number == len(VARIETY):
        train_images(copy, photos, rate, seed + number, 3.0)
        return copy
    factor, margin, dropped = VARIETY[number]
    part = photos.subset(training.choose_three_quarters(photos, seed, number))
    train_images(copy, part, factor * rate, seed + number, 1.0, margin=margin, patch_dropout=dropped, ema=ema)
    return copy


UNEQUAL = (5e-5, 2e-4, 6e-4)  # rates so far apart that the models learn very different amounts


@run_alone
def tune_unequal(base: str, number: int) -> gu.Encoder:
    """A base after one pass over three quarters of the classes, at one of the rates of `UNEQUAL`."""
    seed, copy, photos = get_seed(base), open_base(base), load_images_of("train")
    part = photos.subset(training.choose_three_quarters(photos, seed, number))
    train_images(copy, part, UNEQUAL[number], seed + number, 1.0)
    return copy


# --- what is measured ------------------------------------------------------------------------------------------------


def rank_pairs(queries: np.ndarray, gallery: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The rank of row i of the gallery for query i, uint16 (n,)."""
    own = np.arange(len(queries))[:, None]
    return gu.rank_relevant(queries, gallery, own, bias=bias)[:, 0].astype(np.uint16)


def embed_pairs(encoder: gu.Encoder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of a split's images and of their captions, one each."""
    images = load_images_of(split)
    return gu.embed_images(encoder, images), gu.embed_texts(encoder, [texts[0] for texts in images.captions])


def score_images(embeddings: np.ndarray, split: str = "test") -> np.ndarray:
    """The average precision of each image that asks all others of its split, float16 (n,)."""
    labels = load_images_of(split).labels
    ranks = gu.rank_relevant(embeddings, embeddings, gu.same_label(labels, labels), np.arange(len(labels))[:, None])
    return gu.mean_average_precision(ranks).per_query.astype(np.float16)


def measure_encoder(encoder: gu.Encoder) -> dict[str, np.ndarray]:
    """Scores of every test query, and the two means on the validation splits by which settings are chosen."""
    images, texts = embed_pairs(encoder, "captions")
    found = {"image": score_images(gu.embed_images(encoder, load_images_of("test")))}
    found["text"] = rank_pairs(texts, images)
    chosen = score_images(gu.embed_images(encoder, load_images_of("validation")), "validation")
    images, texts = embed_pairs(encoder, "captions_validation")
    found["validation"] = 100 * np.array([chosen.mean(dtype=float), (1 / rank_pairs(texts, images)).mean()])
    return found


# --- parts: each is one call in one of several processes, and leaves one file ----------------------------------------


def part_base(base: str) -> dict:
    return measure_encoder(open_base(base))


def part_tuned(base: str, way: str, rate: float, **options) -> dict:
    return measure_encoder(tune(base, way, rate, **options))


def part_realigned(base: str, realign_rate: float, **options) -> dict:
    return measure_encoder(realign_base(base, realign_rate, **options))


def part_captions(finder: str) -> dict:
    return {"true words": np.array(measure_true_words(finder))}


def part_continued(base: str, start_rate: float, rate: float, number: int, **options) -> dict:
    return measure_encoder(continue_tuning(base, start_rate, rate, number, **options))


def part_unequal(base: str, number: int) -> dict:
    return measure_encoder(tune_unequal(base, number))


def part_unequal_soup(base: str) -> dict:
    return cook([tune_unequal(base, number) for number in range(len(UNEQUAL))])


def part_soup(base: str, start_rate: float, rate: float, **options) -> dict:
    return cook([continue_tuning(base, start_rate, rate, number, **options) for number in range(len(VARIETY))])


def copy_states(models: list[gu.Encoder]) -> list[dict[str, torch.Tensor]]:
    return [{key: value.clone() for key, value in model.model.state_dict().items()} for model in models]


def cook(models: list[gu.Encoder]) -> dict:
    """Ingredients, put together: the uniform and the greedy soup, and the ensemble, whose embeddings are averaged."""
    states = copy_states(models)
    test, soup = [gu.embed_images(model, load_images_of("test")) for model in models], models[0]

    def mixed(chosen: list[int]) -> gu.Encoder:
        soup.model.load_state_dict(soups.average([states[i] for i in chosen]))
        return soup

    def score(chosen: list[int]) -> float:
        return evaluation.image_to_image(mixed(chosen), load_images_of("validation")).mean

    alone = [score([i]) for i in range(len(states))]
    order = np.argsort(alone)[::-1].tolist()
    chosen, reached = order[:1], max(alone)
    for i in order[1:]:
        if (together := score([*chosen, i])) > reached:
            chosen, reached = [*chosen, i], together
    found = {"validation": np.array([reached]), "greedy takes": np.array(chosen)}
    for name, listed in (("greedy", chosen), ("uniform", order)):
        found[name] = score_images(gu.embed_images(mixed(listed), load_images_of("test")))
    return found | {"ensemble": score_images(np.mean(test, axis=0))}


RULES = {  # from the state of the base, of the start and of the ingredients
    "uniform soup": lambda _, __, states: soups.average(states),
    "WiSE-FT": lambda base, _, states: soups.average([base, soups.average(states)], [0.5, 0.5]),
    "LiNeS": lambda base, _, states: soups.lines(base, soups.average(states), 0.5),
    "Model Stock": lambda _, start, states: soups.model_stock(states, start),
}


def part_relative(base: str, start_rate: float, rate: float, rule: str) -> dict:
    """What one of `RULES` makes of four ingredients."""
    models = [continue_tuning(base, start_rate, rate, number) for number in range(len(VARIETY))]
    before, start, *states = copy_states([open_base(base), tune(base, "arcmargin", start_rate, "train"), *models])
    models[0].model.load_state_dict(RULES[rule](before, start, states))
    return measure_encoder(models[0])


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def part_between(base: str, start_rate: float, other: str = "", rate: float = 0.0) -> dict:
    """On the straight line between the weights of two models: one line of average precisions per share of the second.

    other: the second is fine-tuned from this base, the first from `base`. Without it both have one start: they are the
    first two ingredients of a soup.
    """
    if other:
        first, second = (tune(start, "arcmargin", start_rate, "train") for start in (base, other))
    else:
        first, second = (continue_tuning(base, start_rate, rate, number) for number in (0, 1))
    (a, b), lines = copy_states([first, second]), []
    for share in SHARES:
        first.model.load_state_dict(soups.average([a, b], [1 - share, share]))
        lines.append(score_images(gu.embed_images(first, load_images_of("test"), cache=False)))
    return {"image": np.array(lines)}


DIRECTIONS = ("text", "caption")  # what asks: texts for images, or images for captions


def order_sides(encoder: gu.Encoder, split: str, asks: str) -> tuple[np.ndarray, np.ndarray]:
    images, texts = embed_pairs(encoder, split)
    return (texts, images) if asks == "text" else (images, texts)


def part_nnn(base: str) -> dict:
    """Nearest Neighbor Normalization in both directions, k and alpha chosen on validation: ranks, and how often each row of
    the gallery is among the first ten, without and with it."""
    encoder, found = open_base(base), {}
    for asks in DIRECTIONS:
        references, _ = order_sides(encoder, "references", asks)
        queries, gallery = order_sides(encoder, "captions_validation", asks)
        means = gu.reference_means(gallery, references, KS)
        scores = {
            (k, alpha): (1 / rank_pairs(queries, gallery, alpha * mean)).mean()
            for k, mean in zip(KS, means, strict=True)
            for alpha in ALPHAS
        }
        k, alpha = max(scores, key=scores.get)
        queries, gallery = order_sides(encoder, "captions", asks)
        for state, bias in (("plain", None), ("nnn", gu.hub_bias(gallery, references, k, alpha))):
            found[f"{asks} {state}"] = rank_pairs(queries, gallery, bias)
            found[f"{asks} {state} counts"] = gu.hubness(queries, gallery, 10, bias=bias)[1].astype(np.uint16)
        found[f"{asks} settings"] = np.array([k, alpha])
    return found


OVERLAPS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SIZES = (300, 600, 1200, 2400, 4800, 9600)


def part_overlap(base: str, asks: str, k: int, alpha: float) -> dict:
    """Ranks with NNN, one line per share of the references that is replaced by the queries themselves."""
    encoder = open_base(base)
    references, _ = order_sides(encoder, "references", asks)
    queries, gallery = order_sides(encoder, "captions", asks)
    replaced = np.random.default_rng(0).permutation(len(references))
    lines = []
    for share in OVERLAPS:
        rows, mixed = replaced[: round(share * len(references))], references.copy()
        mixed[rows] = queries[rows]
        lines.append(rank_pairs(queries, gallery, gu.hub_bias(gallery, mixed, k, alpha)))
    return {"ranks": np.array(lines)}


def part_gallery(base: str, k: int, alpha: float) -> dict:
    """Text to image in galleries of several sizes: ranks without and with NNN, (sizes, 2, n), and hubness, (sizes, 2).

    Each text asks a gallery that holds its own image and others drawn from `captions` and `bank`. For hubness as many
    texts ask as there are images, each image's own one, so that an image is found ten times on average.
    """
    encoder = open_base(base)
    references, _ = order_sides(encoder, "references", "text")
    (texts, images), (more_texts, more_images) = (order_sides(encoder, split, "text") for split in ("captions", "bank"))
    texts, images = np.concatenate([texts, more_texts]), np.concatenate([images, more_images])
    bias, asking, rng = gu.hub_bias(images, references, k, alpha), 2400, np.random.default_rng(0)
    ranks, skewness = np.zeros((len(SIZES), 2, asking), np.uint16), np.zeros((len(SIZES), 2))
    for i, size in enumerate(SIZES):
        for first in range(0, asking, SIZES[0]):
            own = np.arange(first, first + SIZES[0])
            others = rng.permutation(np.delete(np.arange(len(images)), own))[: size - len(own)]
            rows = np.concatenate([own, others])
            for j, minus in enumerate((None, bias[rows])):
                ranks[i, j, own] = rank_pairs(texts[own], images[rows], minus)
                skewness[i, j] += gu.hubness(texts[rows], images[rows], 10, bias=minus)[0] / (asking // SIZES[0])
    return {"ranks": ranks, "skewness": skewness}


def part_small(base: str) -> dict:
    """mP@5 of the GUIE challenge, by Euclidean distance, for embeddings cut to 64 numbers in several ways, float16 (n,)."""
    encoder, labels = open_base(base), load_images_of("test").labels
    vectors, names = gu.embed_images(encoder, load_images_of("test")), gu.embed_texts(encoder, list_bank())
    found, half = {}, np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        half[np.flatnonzero(labels == label)[::2]] = True
    ways = {"all": np.eye(vectors.shape[1]), "first": np.eye(vectors.shape[1])[:, :64]}
    for way, learned_from in {"names": names, "images": embed_base(base, "train")}.items():
        centered = learned_from - learned_from.mean(axis=0)
        ways[way] = np.linalg.svd(centered, full_matrices=False)[2][:64].T
    for way, directions in ways.items():
        small = (vectors @ directions).astype(np.float32)
        nearest = gu.search(small[~half], small[half], 5, "l2")[1]
        found[way] = (labels[half][nearest] == labels[~half][:, None]).mean(axis=1).astype(np.float16)
    return found


# --- the plan --------------------------------------------------------------------------------------------------------


def name_part(part: str, options: dict) -> str:
    return ",".join([part, *(f"{key}={value}" for key, value in options.items())])


def list_bases(options: dict) -> set[str]:
    return {options.get("base"), options.get("finder"), options.get("other")} & set(BASES)


@functools.cache
def hash_file(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def hash_base(base: str) -> str:
    """What tells the weights of a base from others. It is kept too, for scores whose base is not shipped."""
    file = KEPT / "bases.json"
    known = text_files.read_json(file) if file.exists() else {}
    path = find_base(base)
    if not path.exists():
        return known.get(base, "not made yet")
    digest = hash_file(path)
    if known.get(base) != digest:
        text = json.dumps(known | {base: digest}, indent=1, sort_keys=True) + "\n"
        gu.write_atomically(file, lambda stream: stream.write(text.encode()))
    return digest


def describe_settings(part: str, options: dict) -> str:
    """What a result rests on beside its options: when it changes, the result is measured anew."""
    training_settings = [EPOCHS, RECIPE, OPTIONS.get(options.get("way")), LONG_TAIL, FOUND]
    settings = {
        "tuned": training_settings,
        "realigned": [*training_settings, REALIGNING],
        "continued": [*training_settings, VARIETY],
        "soup": [*training_settings, VARIETY],
        "unequal": [*training_settings, UNEQUAL],
        "unequal_soup": [*training_settings, UNEQUAL],
        "relative": [*training_settings, VARIETY, list(RULES)],
        "between": [*training_settings, VARIETY, SHARES],
        "captions": [FOUND],
        "nnn": [KS, ALPHAS],
        "overlap": [OVERLAPS],
        "gallery": [SIZES],
    }
    bases = {base: hash_base(base) for base in sorted(list_bases(options))}
    return json.dumps([mini_world.VERSION, bases, settings.get(part)])


def read_results(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """{name of a part: {task: array}} of a file, nothing where there is none."""
    found = {}
    if file.exists():
        with np.load(file) as stored:
            for key in stored.files:
                name, _, task = key.rpartition("/")
                found.setdefault(name, {})[task] = stored[key]
    return found


def select_usable(found: dict, part: str, many: list[dict]) -> dict:
    """The results of `found` that were made with what holds now."""
    asked = {name_part(part, options): options for options in many}
    return {
        name: found[name]
        for name, options in asked.items()
        if name in found and str(found[name]["made with"]) == describe_settings(part, options)
    }


def save_results(file: Path, results: dict[str, dict[str, np.ndarray]]) -> None:
    arrays = {f"{name}/{task}": results[name][task] for name in sorted(results) for task in sorted(results[name])}
    gu.write_atomically(file, lambda stream: np.savez_compressed(stream, **arrays))


def collect_left(part: str, many: list[dict]) -> dict:
    """Results that are not yet in `claims/`, each in the file that its worker wrote."""
    found = {}
    for name in {name_part(part, options) for options in many}:
        found |= read_results(RUNS / "parts" / f"{name}.npz")
    return select_usable(found, part, many)


def run_part(part: str, options: dict) -> None:
    """One part in a worker: its scores into a file of its own."""
    name = name_part(part, options)
    result = globals()[f"part_{part}"](**options) | {"made with": np.array(describe_settings(part, options))}
    save_results(RUNS / "parts" / f"{name}.npz", {name: result})


def start_worker() -> None:
    """One thread for each process, which together are faster than all threads in one; progress lines go into a file. When
    the command is killed, its workers end too."""
    torch.set_num_threads(1)
    gu.get_faiss().omp_set_num_threads(1)
    sys.stdout = sys.stderr = open(RUNS / "progress.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def get_results(part: str, many: list[dict]) -> list[dict[str, np.ndarray]]:
    """The results of a part for many options: what is kept, what an earlier run left, and what is measured now."""
    kept = read_results(KEPT / f"{part}.npz")
    found = select_usable(kept, part, many)
    if len(found) < len({name_part(part, options) for options in many}):
        for base in set().union(*(list_bases(options) for options in many if name_part(part, options) not in found)):
            make_base(base)  # trained here, before several workers need it
        found = select_usable(kept, part, many)
        found |= collect_left(part, many)
        missing = {name_part(part, options): options for options in many if name_part(part, options) not in found}
        if missing:
            RUNS.mkdir(parents=True, exist_ok=True)
            progress = gu.Progress(len(missing), part, "parts")
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            spawn, count = multiprocessing.get_context("spawn"), min(cores, len(missing))
            with ProcessPoolExecutor(count, spawn, start_worker) as pool:
                for done, _ in enumerate(pool.map(run_part, itertools.repeat(part), missing.values()), 1):
                    progress.update(done)
            found |= collect_left(part, many)
        save_results(KEPT / f"{part}.npz", read_results(KEPT / f"{part}.npz") | found)
    return [found[name_part(part, options)] for options in many]


def choose_best(part: str, many: list[dict], score) -> dict:
    """The options whose result has the highest `score` on validation."""
    results = get_results(part, many)
    return max(zip(many, results, strict=True), key=lambda pair: score(pair[1]["validation"]))[0]


def score_by_images(validation: np.ndarray) -> float:
    """What `best` goes by where text does not count: image search."""
    return validation[0]


LADDER = {  # name: how it may be trained, and on which images
    "arcmargin": (["arcmargin"], "train"),
    "margin 0": (["margin_0"], "train"),
    "softmax": (["softmax"], "train"),
    "proxyanchor": (["proxyanchor"], "train"),
    "adaptive": (["adaptive", "adaptive_narrow"], "train"),
    "sub-centers": (["subcenters"], "train"),
    "arcmargin, long tail": (["arcmargin"], "long_tail"),
    "adaptive, long tail": (["adaptive", "adaptive_narrow"], "long_tail"),
    "sub-centers, long tail": (["subcenters"], "long_tail"),
    "arcmargin, wrong labels": (["arcmargin"], "train_noisy"),
    "adaptive, wrong labels": (["adaptive", "adaptive_narrow"], "train_noisy"),
    "sub-centers, wrong labels": (["subcenters"], "train_noisy"),
}


def choose_ladder() -> dict[str, dict]:
    """{loss: its options}, those that gave it the best image search on validation."""
    sweeps = {
        name: [{"base": "0", "way": way, "rate": rate, "images": images} for way in ways for rate in RATES]
        for name, (ways, images) in LADDER.items()
    }
    get_results("tuned", [options for many in sweeps.values() for options in many])
    return {name: choose_best("tuned", many, score_by_images) for name, many in sweeps.items()}


def score_ladder() -> dict[str, list[dict]]:
    """{loss: its results, one per seed}."""
    seeds = {name: repeat_at_seeds(options) for name, options in choose_ladder().items()}
    get_results("tuned", [options for many in seeds.values() for options in many])
    return {name: get_results("tuned", many) for name, many in seeds.items()}


def move_to_base(base: str, options: dict) -> dict:
    """The same on another base, which then finds its captions itself."""
    return options | {"base": base} | ({"finder": base} if "finder" in options else {})


def repeat_at_seeds(options: dict) -> list[dict]:
    return [move_to_base(str(seed), options) for seed in SEEDS]


WITHIN = 1.5  # points that count as "stays": of mAP for the images of MCIP, of mP@5 for PCA of texts
TEXT_STAYS = 0.5  # points of R@5 by which text search may fall and still counts as kept
CAPTION_WEIGHTS, TEXT_RATES, REALIGN_RATES = (0.25, 0.5, 0.75), (2e-4, 5e-4, 1e-3, 2e-3), (1e-3, 3e-3)


def list_frontier() -> dict[str, list[dict]]:
    """{what is trained: its options}, how far training goes: rates, and shares of the caption loss, on the base of seed 0."""
    plain = {"base": "0", "way": "arcmargin"}
    lines = {"image-only": [plain | {"rate": rate, "images": "train"} for rate in (1e-4, 2e-4, *RATES)]}
    for weight in CAPTION_WEIGHTS:
        lines[f"MCIP, caption share {weight}"] = [
            plain | {"rate": rate, "images": "train", "finder": "0", "weight": weight} for rate in TEXT_RATES
        ]
    return lines


def choose_text() -> dict[str, dict]:
    """The options of image-only tuning that are best for images on validation, and those of MCIP that are best for text
    there, among all that stay within 1.5 mAP of them."""
    lines = list_frontier()
    plain, mcip = lines.pop("image-only"), [options for line in lines.values() for options in line]
    most = max(result["validation"][0] for result in get_results("tuned", plain))

    def text_if_near(validation: np.ndarray) -> tuple[bool, float]:
        return validation[0] > most - WITHIN, validation[1]

    return {
        "image-only": choose_best("tuned", plain, score_by_images),
        "mcip": choose_best("tuned", mcip, text_if_near),
    }


def choose_realigning(options: dict) -> dict:
    """The options of a model with its text realigned, with the rate that is best for text on validation; {}: of the base."""
    sweep = [move_to_base("0", options) | {"realign_rate": rate} for rate in REALIGN_RATES]
    return choose_best("realigned", sweep, lambda validation: validation[1])


def score_text_models(bases: list[str]) -> dict[str, list[dict]]:
    """{model: its results, one per base}: base, tuned on images alone, MCIP, and each with its text realigned."""
    chosen, found = choose_text(), {}
    found["base"] = get_results("base", [{"base": base} for base in bases])
    for name, options in chosen.items():
        found[name] = get_results("tuned", [move_to_base(base, options) for base in bases])
    for name, options in {"base": {}, **chosen}.items():
        realigned = choose_realigning(options)
        found[f"{name}+realigned"] = get_results("realigned", [move_to_base(base, realigned) for base in bases])
    return found


def score_2sft() -> list[tuple[str, dict]]:
    """What is trained before the text is realigned, and the result, from the base itself to image-only tuning at ever larger
    rates, on the base of seed 0."""
    options = choose_text()["image-only"]
    many = [choose_realigning({})] + [choose_realigning(options) | {"rate": rate} for rate in TEXT_RATES]
    labels = ["the base", *(f"rate {rate:g}" for rate in TEXT_RATES)]
    return list(zip(labels, get_results("realigned", many), strict=True))


SOUP_RATES, START_PASSES = (2.5e-4, 5e-4, 1e-3), (EPOCHS, 9.0, 27.0)


def make_soup_start(passes: float = EPOCHS, base: str = "0") -> dict:
    """Where ingredients start from: ArcMargin's model of the ladder, or the same after more passes."""
    start = {"base": base, "start_rate": choose_ladder()["arcmargin"]["rate"]}
    return start if passes == EPOCHS else start | {"passes": passes}


def score_soups(passes: float = EPOCHS, seeds: tuple[int, ...] = SEEDS) -> dict[str, list]:
    """{what: its results, one per seed}: the start, the soups, the ingredients at the rate that suits single ones and the best
    of them, and one run as long as the four together."""
    start, numbers, long = make_soup_start(passes), range(len(VARIETY) + 1), len(VARIETY)
    get_results("continued", [start | {"rate": r, "number": i} for r in SOUP_RATES for i in numbers])
    chosen = {
        "soup": choose_best("soup", [start | {"rate": rate} for rate in SOUP_RATES], score_by_images),
        "single": choose_best("continued", [start | {"rate": r, "number": i} for r in SOUP_RATES for i in range(long)], score_by_images),
        "long": choose_best("continued", [start | {"rate": r, "number": long} for r in SOUP_RATES], score_by_images),
    }  # fmt: skip
    of_seeds = {name: [move_to_base(str(seed), options) for seed in seeds] for name, options in chosen.items()}
    singles = [[options | {"number": i} for options in of_seeds["single"]] for i in range(long)]
    get_results("continued", [options for many in singles for options in many])
    ingredients = [get_results("continued", many) for many in singles]
    plain = {key: value for key, value in start.items() if key == "passes"} | {
        "rate": start["start_rate"],
        "images": "train",
    }
    return {
        "start": get_results("tuned", [{"base": str(seed), "way": "arcmargin"} | plain for seed in seeds]),
        "soup": get_results("soup", of_seeds["soup"]),
        "ingredients": ingredients,
        "single": [max(many, key=lambda one: one["validation"][0]) for many in zip(*ingredients, strict=True)],
        "long": get_results("continued", of_seeds["long"]),
    }


EMAS = (0.8, 0.9, 0.97)


def score_relatives() -> dict[str, list[dict]]:
    """{rule: its results, one per seed}, of the ingredients that the soup has, and those of the second ingredient, trained
    without and with an average along its run, whose decay is chosen on validation."""
    soup = choose_best("soup", [make_soup_start() | {"rate": rate} for rate in SOUP_RATES], score_by_images)
    found = {rule: get_results("relative", repeat_at_seeds(soup | {"rule": rule})) for rule in RULES}
    alone = soup | {"number": 1}
    decay = choose_best("continued", [alone | {"ema": decay} for decay in EMAS], score_by_images)["ema"]
    found["one run"] = get_results("continued", repeat_at_seeds(alone))
    return found | {"one run, averaged": get_results("continued", repeat_at_seeds(alone | {"ema": decay}))}


def score_ingredients() -> dict[str, list[tuple[list[dict], dict]]]:
    """{kind: sets of ingredients as (each one's result, their soup's)}: near equals, at every rate with seed 0, and models
    that learned very different amounts, on the base of every seed."""
    start, found = make_soup_start(), {"equal": [], "unequal": []}
    for rate in SOUP_RATES:
        many = [start | {"rate": rate, "number": number} for number in range(len(VARIETY))]
        found["equal"].append((get_results("continued", many), get_results("soup", [start | {"rate": rate}])[0]))
    get_results("unequal", [{"base": str(seed), "number": i} for seed in SEEDS for i in range(len(UNEQUAL))])
    cooked_of = get_results("unequal_soup", [{"base": str(seed)} for seed in SEEDS])
    for seed, soup in zip(SEEDS, cooked_of, strict=True):
        singles = get_results("unequal", [{"base": str(seed), "number": i} for i in range(len(UNEQUAL))])
        found["unequal"].append((singles, soup))
    return found


def score_lines() -> dict[str, list[dict]]:
    """{start: results along the line between two models}: two ingredients of a soup, and two models from different bases."""
    rate = choose_best("soup", [make_soup_start() | {"rate": rate} for rate in SOUP_RATES], score_by_images)["rate"]
    strangers = zip(SEEDS, (*SEEDS[1:], SEEDS[0]), strict=True)
    return {
        "the same start": get_results("between", [make_soup_start(base=str(seed)) | {"rate": rate} for seed in SEEDS]),
        "different starts": get_results(
            "between", [make_soup_start(base=str(a)) | {"other": str(b)} for a, b in strangers]
        ),
    }


FINDERS = ("own", "read_1.0", "read_0.75", "read_0.5", "read_0.25", "read_0.0", "0", "longer_clean")


def score_finders() -> dict[str, tuple[float, dict]]:
    """{finder: (share of true words in its captions, MCIP's result with them)}, on the base of seed 0."""
    options = choose_text()["mcip"]
    tuned_with = get_results("tuned", [options | {"finder": finder} for finder in FINDERS])
    shares = get_results("captions", [{"finder": finder} for finder in FINDERS])
    return {finder: (float(s["true words"]), r) for finder, s, r in zip(FINDERS, shares, tuned_with, strict=True)}


def score_nnn() -> dict[str, list[dict]]:
    """{"nnn", "overlap text", "overlap caption", "gallery": results, one per base of SEEDS}."""
    found = {"nnn": get_results("nnn", [{"base": str(seed)} for seed in SEEDS])}
    for asks in DIRECTIONS:
        settings = [
            (int(result[f"{asks} settings"][0]), float(result[f"{asks} settings"][1])) for result in found["nnn"]
        ]
        many = [{"base": str(s), "asks": asks, "k": k, "alpha": a} for s, (k, a) in zip(SEEDS, settings, strict=True)]
        found[f"overlap {asks}"] = get_results("overlap", many)
        if asks == "text":
            found["gallery"] = get_results("gallery", [drop_keys(options, "asks") for options in many])
    return found


def drop_keys(options: dict, *keys: str) -> dict:
    return {name: value for name, value in options.items() if name not in keys}
