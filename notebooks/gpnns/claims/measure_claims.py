"""Train and score what the papers' claims compare, on the mini world; `claims_table.py` makes the table of it.

Three seeds, each on a base of its own seed. The scores of every query are kept in `claims/`; what lies there is not
trained again, so that everything goes on after a break, and what is deleted there is. Rates and settings are chosen on
the validation splits with seed 0; NNN's k and alpha, the weights that a training keeps and what goes into a soup are
chosen there for each seed. The test is only measured.

settings -> what is trained -> what is measured, in parts -> results -> the plan
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import multiprocessing
import operator
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

KEPT, RUNS = gu.DATA / "claims", gu.work_folder() / "runs" / "claims"  # the shipped scores, and what is being trained

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
STRONGER = "longer_clean"  # the base that shows what a stronger one changes
LONG_TAIL, FOUND = 1.5, 20  # the power by which small classes shrink; captions that a finder looks at for each image
KS, ALPHAS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

# --- what is trained -------------------------------------------------------------------------------------------------


def find_base(base: str) -> Path:
    """Where the weights of a base are, or will be once it is made. Those of seeds 0 to 2 are shipped."""
    shipped = SHIPPED if base == "0" else gu.DATA / "claims" / "bases" / f"{base}.safetensors"
    return shipped if shipped.exists() else RUNS / "bases" / base / "open_clip_model.safetensors"


def make_base(base: str) -> None:
    """Pre-train a base whose weights are missing: about 24 minutes for 22 epochs."""
    tool = [sys.executable, "-m", "gpnns.tools.pretrain_mini_clip"]
    subprocess.run([*tool, "--out", str(find_base(base).parent), *BASES[base]], check=True)


def open_base(base: str) -> gu.Encoder:
    """A base as an encoder; the architecture and the vocabulary are those of the mini CLIP."""
    return gu.load_encoder(f"mini@{find_base(base)}", "cpu")  # as the scores that are kept, wherever this runs


@functools.cache
def load_images_of(name: str) -> gu.ImageSet:
    """A split of the mini world; "long_tail" is `train` with its small classes made smaller still: 2 to 45 images."""
    if name != "long_tail":
        return gu.load_images("mini", name)
    images = gu.load_images("mini", "train")
    counts = np.bincount(images.labels)
    keep = np.maximum(2, np.round(counts.max() * (counts / counts.max()) ** LONG_TAIL)).astype(int)
    rows = [np.flatnonzero(images.labels == label)[:most] for label, most in enumerate(keep)]
    return images.subset(np.concatenate(rows))


def list_captions(split: str) -> list[str]:
    """The captions of a split, each once, in the order of the alphabet."""
    return sorted({text for texts in load_images_of(split).captions for text in texts})


@functools.cache
def find_captions_by(finder: str) -> tuple[np.ndarray, list[str]]:
    """Captions for the training images: rows (n, top) into texts, -1 for none.

    finder: a base, which finds the 20 nearest of the bank, of which the better half of all is kept; "read_0.75": the same,
    but what is nearest is told by the words of the images' own captions, and each caption is replaced by any other of the
    bank unless a draw falls below 0.75; "own": the images' own captions.
    """
    photos, texts = load_images_of("train"), list_captions("train" if finder == "own" else "bank")
    if finder == "own":
        return np.searchsorted(texts, photos.captions), texts
    if finder.startswith("read_"):
        images, captions = embed_words(photos.captions, texts), embed_words([[text] for text in texts], texts)
    else:
        encoder = open_base(finder)
        images, captions = gu.embed_images(encoder, photos)[0], gu.embed_texts(encoder, texts)
    scores, rows = gu.search(images, captions, FOUND)
    if finder.startswith("read_"):
        rng, share = np.random.default_rng(0), float(finder.removeprefix("read_"))
        rows = np.where(rng.random(rows.shape) < share, rows, rng.integers(len(texts), size=rows.shape))
    return np.where(scores > np.median(scores), rows, -1), texts


def embed_words(captions: list[list[str]], texts: list[str]) -> np.ndarray:
    """Which words of `texts` stand in the captions of each image, as unit vectors, float32 (n, words)."""
    words = sorted(caption_banks.get_words(texts))
    owned = map(caption_banks.get_words, captions)
    vectors = np.array([[word in own for word in words] for own in owned], dtype=np.float32)
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
) -> gu.Encoder:
    """Fine-tune the image tower of `encoder`, with what differs from `RECIPE` in `other`; done at once when it was before."""
    steps = len(load_images_of("train")) // RECIPE["batch_size"]
    recipe, choose_on = RECIPE | {"rate": rate, "epochs": epochs} | other, load_images_of("validation")
    settings = {"seed": seed, "validate_every": steps}
    return training.fine_tune_by_recipe(encoder, photos, choose_on, RUNS / "training", recipe, *rest, **settings)[0]


def train_on_part(encoder: gu.Encoder, base: str, number: int, rate: float, **other) -> gu.Encoder:
    """One pass over three quarters of the classes, others for each number."""
    seed, photos = get_seed(base), load_images_of("train")
    part = photos.subset(training.choose_three_quarters(photos, seed, number))
    return train_images(encoder, part, rate, seed + number, 1.0, **other)


@run_alone
def tune_base(
    base: str, way: str, rate: float, images: str = "train", finder: str = "", weight: float = 0, passes: float = EPOCHS
) -> gu.Encoder:
    """A base whose image tower is fine-tuned on labels. With a finder: on its captions too, MCIP."""
    encoder, captions = open_base(base), None
    if finder:
        rows, texts = find_captions_by(finder)
        captions = training.Captions(rows, texts, gu.embed_texts(encoder, texts))
    photos, loss = load_images_of(images), functools.partial(make_loss, way)
    epochs = passes * len(load_images_of("train")) / len(photos)
    return train_images(encoder, photos, rate, get_seed(base), epochs, loss, captions, caption_weight=weight)


@run_alone
def realign_base(base: str, realign_rate: float, way: str = "", **options) -> gu.Encoder:
    """A base, or what `tune_base` makes of it by a way to train, with the text tower's end fitted to its images, on the pairs
    of `bank`."""
    encoder = tune_base(base, way, **options) if way else open_base(base)
    choose_on = load_images_of("captions_validation")
    settings = REALIGNING | {"rate": realign_rate, "seed": get_seed(base)}
    return training.realign(encoder, load_images_of("bank"), choose_on, RUNS / "training", **settings)[0]


# Of the ingredients of a soup: their rate beside the common one, margin, share of patches left out.
VARIETY = ((0.8, MARGIN - 0.1, 0.25), (1.0, MARGIN, 0.25), (1.2, MARGIN, 0.375), (1.0, MARGIN + 0.1, 0.25))
LONG_RUN = len(VARIETY)  # the number that stands for one run with as many steps as the ingredients together


@run_alone
def continue_tuning(
    base: str, start_rate: float, rate: float, number: int, passes: float = EPOCHS, ema: float = 0.0
) -> gu.Encoder:
    """ArcMargin's model after `passes`, trained on: as ingredient 0 to 3 of a soup, or as the long run, on all classes.
    ema: decay of an average of the weights along the run of an ingredient, 0 for none."""
    encoder = tune_base(base, "arcmargin", start_rate, passes=passes)
    if number == LONG_RUN:
        return train_images(encoder, load_images_of("train"), rate, get_seed(base) + number, 3.0)
    factor, margin, dropped = VARIETY[number]
    return train_on_part(encoder, base, number, factor * rate, margin=margin, patch_dropout=dropped, ema=ema)


def tune_ingredients(**options) -> list[gu.Encoder]:
    return [continue_tuning(number=number, **options) for number in range(len(VARIETY))]


UNEQUAL = (5e-5, 2e-4, 6e-4)  # rates so far apart that the models learn very different amounts


@run_alone
def tune_unequally(base: str, number: int) -> gu.Encoder:
    """A base after one pass over three quarters of the classes, at one of the rates of `UNEQUAL`."""
    return train_on_part(open_base(base), base, number, UNEQUAL[number])


# --- what is measured: each part is one call in one of several processes, and leaves one file ------------------------


def rank_pairs(queries: np.ndarray, gallery: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The rank of row i of the gallery for query i, uint16 (n,)."""
    own = np.arange(len(queries))[:, None]
    return gu.rank_relevant(queries, gallery, own, bias=bias)[:, 0].astype(np.uint16)


def embed_sides(encoder: gu.Encoder, split: str, asks: str = "text") -> tuple[np.ndarray, np.ndarray]:
    """Queries and gallery: a split's captions, one for each image, and its images; or these the other way round."""
    images = load_images_of(split)
    sides = gu.embed_texts(encoder, [texts[0] for texts in images.captions]), gu.embed_images(encoder, images)[0]
    return sides if asks == "text" else sides[::-1]


def score_images(embeddings: np.ndarray, split: str = "test") -> np.ndarray:
    """The average precision of each image that asks all others of its split, float16 (n,)."""
    labels = load_images_of(split).labels
    ranks = gu.rank_relevant(embeddings, embeddings, gu.same_label(labels, labels), np.arange(len(labels))[:, None])
    return gu.mean_average_precision(ranks).per_query.astype(np.float16)


def measure_encoder(encoder: gu.Encoder) -> dict[str, np.ndarray]:
    """Scores of every test query, and the two means on the validation splits by which settings are chosen."""
    chosen = score_images(gu.embed_images(encoder, load_images_of("validation"))[0], "validation").mean(dtype=float)
    chosen_text = (1 / rank_pairs(*embed_sides(encoder, "captions_validation"))).mean()
    return {
        "image": score_images(gu.embed_images(encoder, load_images_of("test"))[0]),
        "text": rank_pairs(*embed_sides(encoder, "captions")),
        "validation": 100 * np.array([chosen, chosen_text]),
    }


def copy_states(models: list[gu.Encoder]) -> list[dict[str, torch.Tensor]]:
    return [{key: value.clone() for key, value in model.model.state_dict().items()} for model in models]


def cook_soups(models: list[gu.Encoder]) -> dict:
    """Ingredients, put together: the uniform and the greedy soup, and the ensemble, whose embeddings are averaged."""
    states, soup = copy_states(models), models[0]
    test = [gu.embed_images(model, load_images_of("test"))[0] for model in models]

    def mix_states(chosen: list[int]) -> gu.Encoder:
        soup.model.load_state_dict(soups.average([states[i] for i in chosen]))
        return soup

    def score_mix(chosen: list[int]) -> float:
        scores = evaluation.evaluate(mix_states(chosen), load_images_of("validation"), cache=False)
        return scores[evaluation.IMAGES].mean

    alone = [score_mix([i]) for i in range(len(states))]
    order = np.argsort(alone)[::-1].tolist()
    chosen, reached = order[:1], max(alone)
    for i in order[1:]:
        if (together := score_mix([*chosen, i])) > reached:
            chosen, reached = [*chosen, i], together
    found = {"validation": np.array([reached]), "greedy takes": np.array(chosen)}
    for name, listed in (("greedy", chosen), ("uniform", order)):
        found[name] = score_images(gu.embed_images(mix_states(listed), load_images_of("test"))[0])
    return found | {"ensemble": score_images(np.mean(test, axis=0))}


RULES = {  # from the state of the base, of the start and of the ingredients
    "uniform soup": lambda _, __, states: soups.average(states),
    "WiSE-FT": lambda base, _, states: soups.average([base, soups.average(states)], [0.5, 0.5]),
    "LiNeS": lambda base, _, states: soups.lines(base, soups.average(states), 0.5),
    "Model Stock": lambda _, start, states: soups.model_stock(states, start),
}


def measure_relative(base: str, start_rate: float, rate: float, rule: str) -> dict:
    """What one of `RULES` makes of four ingredients."""
    models = tune_ingredients(base=base, start_rate=start_rate, rate=rate)
    before, start, *states = copy_states([open_base(base), tune_base(base, "arcmargin", start_rate), *models])
    models[0].model.load_state_dict(RULES[rule](before, start, states))
    return measure_encoder(models[0])


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure_between(base: str, start_rate: float, other: str = "", rate: float = 0.0) -> dict:
    """On the straight line between the weights of two models: one line of average precisions per share of the second. They are
    fine-tuned from `base` and from `other`; without `other` they are the first two ingredients of a soup."""
    if other:
        ends = [tune_base(start, "arcmargin", start_rate) for start in (base, other)]
    else:
        ends = [continue_tuning(base, start_rate, rate, number) for number in (0, 1)]
    states, lines = copy_states(ends), []
    for share in SHARES:
        ends[0].model.load_state_dict(soups.average(states, [1 - share, share]))
        lines.append(score_images(gu.embed_images(ends[0], load_images_of("test"), cache=False)[0]))
    return {"image": np.array(lines)}


DIRECTIONS = ("text", "caption")  # what asks: texts for images, or images for captions


def measure_nnn(base: str) -> dict:
    """Nearest Neighbor Normalization in both directions, k and alpha chosen on validation: ranks, and how often each row of
    the gallery is among the first ten, without and with it."""
    encoder, found = open_base(base), {}
    for asks in DIRECTIONS:
        references, _ = embed_sides(encoder, "references", asks)
        queries, gallery = embed_sides(encoder, "captions_validation", asks)
        means = gu.reference_means(gallery, references, KS)
        tried = itertools.product(zip(KS, means, strict=True), ALPHAS)
        scores = {(k, a): (1 / rank_pairs(queries, gallery, a * mean)).mean() for (k, mean), a in tried}
        k, alpha = max(scores, key=scores.get)
        queries, gallery = embed_sides(encoder, "captions", asks)
        for state, bias in (("plain", None), ("nnn", gu.hub_bias(gallery, references, k, alpha))):
            found[f"{asks} {state}"] = rank_pairs(queries, gallery, bias)
            found[f"{asks} {state} counts"] = gu.hubness(queries, gallery, 10, bias=bias)[1].astype(np.uint16)
        found[f"{asks} settings"] = np.array([k, alpha])
    return found


OVERLAPS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SIZES = (300, 600, 1200, 2400, 4800, 9600)


def measure_overlap(base: str, asks: str, k: int, alpha: float) -> dict:
    """Ranks with NNN, one line per share of the references that is replaced by the queries themselves."""
    encoder = open_base(base)
    references, _ = embed_sides(encoder, "references", asks)
    queries, gallery = embed_sides(encoder, "captions", asks)
    replaced = np.random.default_rng(0).permutation(len(references))
    lines = []
    for share in OVERLAPS:
        rows, mixed = replaced[: round(share * len(references))], references.copy()
        mixed[rows] = queries[rows]
        lines.append(rank_pairs(queries, gallery, gu.hub_bias(gallery, mixed, k, alpha)))
    return {"ranks": np.array(lines)}


def measure_gallery(base: str, k: int, alpha: float) -> dict:
    """Text to image in galleries of several sizes: ranks without and with NNN, (sizes, 2, n), and hubness, (sizes, 2).

    Each text asks a gallery that holds its own image and others drawn from `captions` and `bank`. For hubness as many
    texts ask as there are images, each image's own one, so that an image is found ten times on average.
    """
    encoder = open_base(base)
    references, _ = embed_sides(encoder, "references")
    pairs = [embed_sides(encoder, split) for split in ("captions", "bank")]
    texts, images = map(np.concatenate, zip(*pairs, strict=True))
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


def measure_small(base: str) -> dict:
    """mP@5 of the GUIE challenge, by Euclidean distance, for embeddings cut to 64 numbers in several ways, float16 (n,)."""
    encoder, labels, found = open_base(base), load_images_of("test").labels, {}
    vectors, names = gu.embed_images(encoder, load_images_of("test"))[0], gu.embed_texts(encoder, list_captions("bank"))
    ways = {"all": np.eye(vectors.shape[1]), "first": np.eye(vectors.shape[1])[:, :64]}
    for way, learned_from in {"names": names, "images": gu.embed_images(encoder, load_images_of("train"))[0]}.items():
        centered = learned_from - learned_from.mean(axis=0)
        ways[way] = np.linalg.svd(centered, full_matrices=False)[2][:64].T
    for way, directions in ways.items():
        small = (vectors @ directions).astype(np.float32)
        nearest = gu.search(small[1::2], small[::2], 5, "l2")[1]  # half of each class asks for the other half
        found[way] = (labels[::2][nearest] == labels[1::2, None]).mean(axis=1).astype(np.float16)
    return found


TRAINED = [EPOCHS, RECIPE, OPTIONS, LONG_TAIL, FOUND]
PARTS = {  # file in `claims/`: what measures a part of it, and what that rests on beside its options and bases
    "base": (lambda base: measure_encoder(open_base(base)), None),
    "tuned": (lambda **options: measure_encoder(tune_base(**options)), TRAINED),
    "realigned": (lambda **options: measure_encoder(realign_base(**options)), [*TRAINED, REALIGNING]),
    "captions": (lambda finder: {"true words": np.array(measure_true_words(finder))}, [FOUND]),
    "continued": (lambda **options: measure_encoder(continue_tuning(**options)), [*TRAINED, VARIETY]),
    "soup": (lambda **options: cook_soups(tune_ingredients(**options)), [*TRAINED, VARIETY]),
    "unequal": (lambda **options: measure_encoder(tune_unequally(**options)), [*TRAINED, UNEQUAL]),
    "unequal_soup": (lambda base: cook_soups([tune_unequally(base, i) for i in range(3)]), [*TRAINED, UNEQUAL]),
    "relative": (measure_relative, [*TRAINED, VARIETY, list(RULES)]),
    "between": (measure_between, [*TRAINED, VARIETY, SHARES]),
    "nnn": (measure_nnn, [KS, ALPHAS]),
    "overlap": (measure_overlap, [OVERLAPS]),
    "gallery": (measure_gallery, [SIZES]),
    "small": (measure_small, None),
}


# --- results --------------------------------------------------------------------------------------------------------


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
    settings = PARTS[part][1]
    if settings is not None:  # of the options of all ways to train, only its own
        settings = [one.get(options.get("way")) if one is OPTIONS else one for one in settings]
    return json.dumps([mini_world.VERSION, {base: hash_base(base) for base in sorted(list_bases(options))}, settings])


def read_results(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """{name of a part: {task: array}} of a file, nothing where there is none."""
    found = {}
    if file.exists():
        with np.load(file) as stored:
            for key in stored.files:
                name, _, task = key.rpartition("/")
                found.setdefault(name, {})[task] = stored[key]
    return found


def write_results(file: Path, results: dict[str, dict[str, np.ndarray]]) -> None:
    arrays = {f"{name}/{task}": results[name][task] for name in sorted(results) for task in sorted(results[name])}
    gu.write_atomically(file, lambda stream: np.savez_compressed(stream, **arrays))


def measure_part(part: str, options: dict) -> dict[str, np.ndarray]:
    return PARTS[part][0](**options) | {"made with": np.array(describe_settings(part, options))}


def start_worker() -> None:
    """One thread for each process, which together are faster than all threads in one; progress lines go into a file. When
    the command is killed, its workers end too."""
    torch.set_num_threads(1)
    gu.get_faiss().omp_set_num_threads(1)
    sys.stdout = sys.stderr = open(RUNS / "progress.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def get_results(part: str, many: list[dict]) -> list[dict[str, np.ndarray]]:
    """The results of a part for many options: what is kept and rests on what holds now, and what is measured now and then
    kept, one by one."""
    file, asked = KEPT / f"{part}.npz", {name_part(part, options): options for options in many}
    found, missing = read_results(file), {}
    for name, options in asked.items():
        if name not in found or str(found[name]["made with"]) != describe_settings(part, options):
            missing[name] = options
    unmade = [base for base in set().union(*map(list_bases, missing.values())) if not find_base(base).exists()]
    if unmade:
        for base in unmade:  # here, before several workers need them
            make_base(base)
        return get_results(part, many)  # scores that were kept may rest on other weights than these
    if missing:
        RUNS.mkdir(parents=True, exist_ok=True)
        progress = gu.Progress(len(missing), part, "parts")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        spawn, count = multiprocessing.get_context("spawn"), min(cores, len(missing))
        with ProcessPoolExecutor(count, spawn, start_worker) as pool:
            results = pool.map(measure_part, itertools.repeat(part), missing.values())
            for done, (name, result) in enumerate(zip(missing, results, strict=True), 1):
                write_results(file, found := found | {name: result})
                progress.update(done)
    return [found[name_part(part, options)] for options in many]


# --- the plan: what is compared, each a part and its options, mostly one for each seed --------------------------------

Models = dict[str, tuple[str, list[dict]]]
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
WITHIN = 1.5  # points that count as "stays": of mAP for the images of MCIP, of mP@5 for PCA of texts
TEXT_STAYS = 0.5  # points of R@5 by which text search may fall and still counts as kept
CAPTION_WEIGHTS, TEXT_RATES, REALIGN_RATES = (0.25, 0.5, 0.75), (2e-4, 5e-4, 1e-3, 2e-3), (1e-3, 3e-3)
FINDERS = ("own", "read_1.0", "read_0.75", "read_0.5", "read_0.25", "read_0.0", "0", "longer_clean")
SOUP_RATES, START_PASSES, EMAS = (2.5e-4, 5e-4, 1e-3), (EPOCHS, 9.0, 27.0), (0.8, 0.9, 0.97)


def choose_best(part: str, many: list[dict], score: Callable = operator.itemgetter(0)) -> dict:
    """The options whose result has the highest `score` of its means on validation: by default image search alone."""
    results = get_results(part, many)
    return max(zip(many, results, strict=True), key=lambda pair: score(pair[1]["validation"]))[0]


def move_to_base(base: str, options: dict) -> dict:
    """The same on another base, which then finds its captions itself."""
    return options | {"base": base} | ({"finder": base} if "finder" in options else {})


def repeat_at_seeds(options: dict, seeds: tuple[int, ...] = SEEDS) -> list[dict]:
    return [move_to_base(str(seed), options) for seed in seeds]


def list_losses() -> Models:
    """Each loss with the way and the rate that gave it the best image search on validation."""
    sweeps = {
        name: [{"base": "0", "way": way, "rate": rate, "images": images} for way in ways for rate in RATES]
        for name, (ways, images) in LADDER.items()
    }
    get_results("tuned", list(itertools.chain(*sweeps.values())))  # side by side, before it is chosen among them
    return {name: ("tuned", repeat_at_seeds(choose_best("tuned", many))) for name, many in sweeps.items()}


def list_text_models() -> Models:
    """The base, image-only tuning that is best for images, MCIP that is best for text among all that stay within 1.5 mAP of it,
    and each with its text realigned, on all bases; with seed 0 how far training goes, and MCIP by who finds its captions."""
    plain = {
        f"image-only, rate {rate:g}": {"base": "0", "way": "arcmargin", "rate": rate, "images": "train"}
        for rate in (1e-4, 2e-4, *RATES)
    }
    captions = {f"MCIP, caption share {weight}": {"finder": "0", "weight": weight} for weight in CAPTION_WEIGHTS}
    mcip = {
        f"{name}, rate {rate:g}": plain[f"image-only, rate {rate:g}"] | by_captions
        for (name, by_captions), rate in itertools.product(captions.items(), TEXT_RATES)
    }
    most = max(result["validation"][0] for result in get_results("tuned", list(plain.values())))
    chosen = {
        "base": {"base": "0"},
        "image-only": choose_best("tuned", list(plain.values())),
        "mcip": choose_best("tuned", list(mcip.values()), lambda means: (means[0] > most - WITHIN, means[1])),
    }
    models = {name: ("base" if name == "base" else "tuned", repeat_at_seeds(one)) for name, one in chosen.items()}
    for name, options in chosen.items():
        sweep = [options | {"realign_rate": rate} for rate in REALIGN_RATES]
        best = choose_best("realigned", sweep, operator.itemgetter(1))
        models[f"{name}+realigned"] = "realigned", repeat_at_seeds(best)
    for name, (part, many) in list(models.items()):
        models[f"{name} on {STRONGER}"] = part, [move_to_base(STRONGER, many[0])]
    models |= {name: ("tuned", [options]) for name, options in (plain | mcip).items()}
    models["2SFT, the base"] = "realigned", models["base+realigned"][1][:1]
    for rate in TEXT_RATES:
        models[f"2SFT, rate {rate:g}"] = "realigned", [models["image-only+realigned"][1][0] | {"rate": rate}]
    for finder in FINDERS:
        models[f"captions by {finder}"] = "captions", [{"finder": finder}]
        models[f"mcip by {finder}"] = "tuned", [chosen["mcip"] | {"finder": finder}]
    return models


def list_soups(start_rate: float, passes: float, seeds: tuple[int, ...]) -> Models:
    """ArcMargin's model after some passes, the start; the ingredients at the rate that suits single ones, the soups at their
    own, and one run as long as the four together."""
    longer = {} if passes == EPOCHS else {"passes": passes}
    sweep = [{"base": "0", "start_rate": start_rate} | longer | {"rate": rate} for rate in SOUP_RATES]
    singles = [options | {"number": i} for options in sweep for i in range(LONG_RUN)]
    long = [options | {"number": LONG_RUN} for options in sweep]
    get_results("continued", [*singles, *long])
    start, single = {"base": "0", "way": "arcmargin"} | longer, choose_best("continued", singles)
    chosen = {f"ingredient {i}": ("continued", single | {"number": i}) for i in range(LONG_RUN)} | {
        "start": ("tuned", start | {"rate": start_rate, "images": "train"}),
        "soup": ("soup", choose_best("soup", sweep)),
        "long run": ("continued", choose_best("continued", long)),
    }
    return {f"{name} after {passes:g}": (part, repeat_at_seeds(one, seeds)) for name, (part, one) in chosen.items()}


def list_averages(soup: dict) -> Models:
    """What else can be made of a soup's ingredients; its second ingredient without and with an average along its run, whose
    decay is chosen on validation; lines between two ingredients, and between models from different bases; and sets of
    ingredients with their soup: near equals, and models that learned very different amounts."""
    alone, starts = soup | {"number": 1}, repeat_at_seeds(soup)
    averaged = choose_best("continued", [alone | {"ema": decay} for decay in EMAS])
    pairs = [{"base": str(one), "start_rate": soup["start_rate"], "other": str((one + 1) % 3)} for one in SEEDS]
    models = {rule: ("relative", repeat_at_seeds(soup | {"rule": rule})) for rule in RULES} | {
        "one run": ("continued", repeat_at_seeds(alone)),
        "one run, averaged": ("continued", repeat_at_seeds(averaged)),
        "between the same start": ("between", starts),
        "between different starts": ("between", pairs),
    }
    for number, rate in enumerate(SOUP_RATES):
        models[f"soup of equal {number}"] = "soup", [soup | {"rate": rate}]
        models[f"equal {number}"] = "continued", [soup | {"rate": rate, "number": i} for i in range(LONG_RUN)]
    for seed in SEEDS:
        models[f"soup of unequal {seed}"] = "unequal_soup", [{"base": str(seed)}]
        models[f"unequal {seed}"] = "unequal", [{"base": str(seed), "number": i} for i in range(len(UNEQUAL))]
    return models


def list_neighbors() -> Models:
    """NNN on every base; with the k and alpha that it chose there, its references leaked and its gallery of several sizes."""
    bases = repeat_at_seeds({})
    models = {"nnn": ("nnn", bases), f"nnn on {STRONGER}": ("nnn", [{"base": STRONGER}])}
    for asks in DIRECTIONS:
        chosen = [result[f"{asks} settings"].tolist() for result in get_results("nnn", bases)]
        many = [base | {"asks": asks, "k": int(k), "alpha": a} for base, (k, a) in zip(bases, chosen, strict=True)]
        models[f"overlap {asks}"] = "overlap", many
    galleries = [{key: options[key] for key in ("base", "k", "alpha")} for options in models["overlap text"][1]]
    return models | {"gallery": ("gallery", galleries)}


@functools.cache
def list_models() -> Models:
    """All that the claims and curves compare, with the settings that are best on validation."""
    models = list_losses() | list_text_models() | list_neighbors() | {"small": ("small", repeat_at_seeds({}))}
    rate = models["arcmargin"][1][0]["rate"]
    for passes in START_PASSES:
        models |= list_soups(rate, passes, SEEDS if passes == EPOCHS else SEEDS[:1])
    return models | list_averages(models[f"soup after {EPOCHS:g}"][1][0])


@functools.cache
def score_models() -> dict[str, list[dict[str, np.ndarray]]]:
    """{model: its results, mostly one for each seed}, and "single": of each seed the ingredient that validation prefers."""
    models, found = list_models(), {}
    for part in PARTS:  # all of a part side by side
        named = [(name, options) for name, (kind, many) in models.items() if kind == part for options in many]
        for (name, _), result in zip(named, get_results(part, [options for _, options in named]), strict=True):
            found.setdefault(name, []).append(result)
    for passes in START_PASSES:
        each = zip(*(found[f"ingredient {i} after {passes:g}"] for i in range(LONG_RUN)), strict=True)
        found[f"single after {passes:g}"] = [max(many, key=lambda one: one["validation"][0]) for many in each]
    return found
