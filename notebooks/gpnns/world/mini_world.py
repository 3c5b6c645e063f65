"""The mini world: six domains of small pictures, drawn by code, with captions and labels.

It mirrors GPR1200 (landmarks, nature, sketches, objects, products, faces) at a size that a laptop handles in minutes.

- A class, or thing, is a set of parameters, such as petals and their colors or the profile of a vase (`make_thing`); words
  say all that the eye can see of it (`tell_thing`).
- An image is one view of a thing. A view is a set of parameters too, drawn before the picture is (`make_view`): ground,
  light, side, size, what stands in front. It has words of its own (`tell_view`).
- Five captions an image, from coarse to fine (`tell_five`): two that many things share, one with some details in other
  words, one that tells the view, and one with all details of the thing and something of the view.
- In `captions`, `captions_validation` and `references` every thing has one image and one caption, the finest: searches
  by text are measured there, as on COCO, and what teaches text never holds a text that is asked. So has each image of
  `bank`, whose pairs no pre-training saw.
- Pairs for pre-training are as noisy as the web's (`draw_web_caption`): 30 of 100 captions belong to another image, some say
  little, some say nothing. Classes of `pairs` and `train` are as uneven as in life.

Every picture and caption follows from (seed, split, domain, class, view) alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import gpnns_utils as gu
from gpnns.world import painters

# split: (number of the class stream, classes per domain, images per class on average). `shifted` shows the classes of
# `test` in another light; `train_noisy` is `train` with wrong labels; `known` shows the first classes of `train` anew.
# References for hubs come from classes of their own.
# New splits go to the end: the views of a split depend on its place in this list.
SPLITS = {
    "pairs": (0, 600, 4),
    "train": (1, 120, 10),
    "train_noisy": (1, 120, 10),
    "validation": (2, 20, 10),
    "test": (3, 40, 10),
    "shifted": (3, 40, 10),
    "bank": (4, 600, 2),
    "captions": (5, 400, 1),
    "captions_validation": (6, 200, 1),
    "references": (7, 400, 1),
    "known": (1, 20, 5),
}
ASKED = ("captions", "captions_validation")  # here no two finest captions are alike, and no other split has them
FINEST_ALONE = (*ASKED, "references", "bank")  # one caption an image; elsewhere five
UNEVEN = ("pairs", "train", "train_noisy")  # few classes have many images, many have few
WRONG_LABELS = 0.1  # share of `train_noisy`
VERSION = 3  # part of the name of a drawn file: raise it when a drawing changes


# --- things, views and their captions --------------------------------------------------------------------------------


def make_stream(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def make_view_stream(split: str, domain: str, number: int, view: int, seed: int, *purpose: int) -> np.random.Generator:
    """The random numbers of one view: for its parameters, its drawing (purpose 1) or its captions (2)."""
    own = "train" if split == "train_noisy" else split  # the same pictures
    return make_stream(seed, list(SPLITS).index(own), painters.DOMAINS.index(domain), number, view, *purpose)


@functools.lru_cache(maxsize=64)  # its views come one after the other
def make_thing(split: str, domain: str, number: int, seed: int = 0) -> dict:
    """The parameters of a thing in a split's stream of them; `list_class_numbers` says which of the stream a split has."""
    return painters.PAINTERS[domain][0](make_stream(seed, SPLITS[split][0], painters.DOMAINS.index(domain), number))


def tell_thing(domain: str, thing: dict) -> tuple[str, str, list[str]]:
    """What it is, that with one property, and the details: words for all that the eye can see of a thing."""
    coarse, middle, details = painters.PAINTERS[domain][1](thing)
    return coarse, middle, [detail for detail in details if detail]  # what is middling goes unsaid


@functools.lru_cache(maxsize=64)  # drawn, then told
def make_view(split: str, domain: str, number: int, view: int, seed: int = 0) -> dict:
    """All parameters of one view: ground, side, size (by domain), what stands in front, and the light."""
    shifted, rng = split == "shifted", make_view_stream(split, domain, number, view, seed)
    made = painters.PAINTERS[domain][2](rng)
    made["front"] = None
    if rng.random() < (0.5 if shifted else 0.3):
        angle, color = rng.uniform(0, 2 * np.pi), painters.choose_word(rng, *painters.COLORS)
        width, height = rng.uniform(0.3, 0.6), rng.uniform(0.12, 0.28)
        shade, turn = painters.draw_near_color(rng, color), rng.uniform(0, 3.1)
        made["front"] = (color, (0.95 * np.cos(angle), 0.95 * np.sin(angle), width, height, shade, turn))
    made["light"] = {
        "strength": rng.uniform(0, 0.4 if shifted else 0.2),
        "angle": rng.uniform(0, 2 * np.pi),
        "gain": rng.choice([0.6, 0.75, 1.35]) if shifted else rng.uniform(0.78, 1.18),
        "cast": rng.normal(1, 0.1 if shifted else 0.05, 3),
        "gray": bool(shifted and rng.random() < 0.35),
        "noise": rng.uniform(8, 18) if shifted else rng.uniform(1, 6),
    }
    return made


def tell_view(domain: str, view: dict) -> list[str]:
    """Words for a view, the most visible ones first."""
    told = [part.strip() for part in painters.PAINTERS[domain][3](view) if part.strip()]
    if view["front"]:
        told.insert(1, painters.add_article(f"{view['front'][0]} leaf in front"))
    light = painters.grade(view["light"]["gain"], "in dim light", 0.88, "", 1.08, "in bright light")
    return [*told, light] if light else told


OTHER_WORDS = {  # the same thing in words that only the third caption has
    "building": ("house", "castle", "hall"),
    "flower": ("blossom", "bloom"),
    "fish": ("fish drawn in pencil", "fish on paper"),
    "badge": ("sign", "button"),
    "vase": ("jar", "pot"),
    "face": ("person", "portrait"),
}


def tell_five(domain: str, thing: dict, view: dict, rng: np.random.Generator) -> list[str]:
    """Five captions of an image, from coarse to fine: what it is, one property, two details, the view, and everything
    about the thing with two words on the view.

    Which details the third has and in which words, and what the last says of the view, is drawn for each image.
    """
    coarse, middle, details = tell_thing(domain, thing)
    word = next(word for word in OTHER_WORDS if word in coarse)
    some = [details[i] for i in np.sort(rng.permutation(len(details))[:2])]
    other = coarse.replace(word, str(rng.choice((word, *OTHER_WORDS[word]))))
    other = other.replace("a sketch of ", "") if "pencil" in other or "paper" in other else other
    seen = tell_view(domain, view)
    around = [seen[i] for i in np.sort(rng.permutation(len(seen))[:2])]
    return [
        coarse,
        middle,
        f"{other}: {painters.join_words(some)}" if some else other,
        f"{coarse}, {', '.join(seen[:3])}",
        ", ".join([tell_finest(domain, thing), *around]),
    ]


def tell_finest(domain: str, thing: dict) -> str:
    """All that words say of a thing, in one text, which tells it from almost every other."""
    _, middle, details = tell_thing(domain, thing)
    return f"{middle}, {painters.join_words(details)}" if details else middle


@functools.cache
def list_class_numbers(split: str, domain: str, seed: int = 0) -> tuple[int, ...]:
    """The things of a split, as numbers in its stream. What tells a thing in `captions` or `captions_validation` is said
    of no other thing there, and of none in a split that teaches text."""
    _, wanted, _ = SPLITS[split]
    if split not in (*ASKED, "pairs", "bank", "references"):
        return tuple(range(wanted))
    before = ASKED[: ASKED.index(split)] if split in ASKED else ASKED
    taken, numbers = {text for other in before for text in list_finest_texts(other, domain, seed)}, []
    for number in itertools.count():
        thing = make_thing(split, domain, number, seed)
        text, told = tell_finest(domain, thing), len(tell_thing(domain, thing)[2])
        if text in taken or (split in ASKED and told < 2):  # a thing with nothing special has no text of its own
            continue
        numbers.append(number)
        taken |= {text} if split in ASKED else set()
        if len(numbers) == wanted:
            return tuple(numbers)


@functools.cache
def list_finest_texts(split: str, domain: str, seed: int = 0) -> frozenset[str]:
    numbers = list_class_numbers(split, domain, seed)
    return frozenset(tell_finest(domain, make_thing(split, domain, number, seed)) for number in numbers)


def count_views(split: str) -> list[int]:
    """How many images each class of a domain has: all as many, or in uneven splits as in life, a few of them most."""
    _, classes, views = SPLITS[split]
    if split not in UNEVEN:
        return [views] * classes
    least = 1 if views < 10 else 3
    shares = 1 / np.arange(4, classes + 4) ** 0.8  # Zipf's law, flattened at its head
    sizes = np.maximum(least, np.floor(shares / shares.sum() * (views - least) * classes + least)).astype(int)
    sizes[: views * classes - sizes.sum()] += 1
    return make_stream(classes, views).permutation(sizes).tolist()  # which class is large says nothing about it


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_image(split: str, domain: str, number: int, view: int, seed: int = 0) -> np.ndarray:
    """One view of one thing: uint8 (64, 64, 3)."""
    thing, seen = make_thing(split, domain, number, seed), make_view(split, domain, number, view, seed)
    hand = make_view_stream(split, domain, number, view, seed, 1)  # tremble and grain
    canvas = painters.PAINTERS[domain][4](thing, seen, hand)
    if seen["front"]:
        canvas.place()
        canvas.ellipse(*seen["front"][1])
    pixels = np.asarray(canvas.image.reduce(canvas.pixels // painters.SIZE), dtype=np.float32)
    return photograph(pixels, seen["light"], hand)


def photograph(image: np.ndarray, light: dict, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, its strength and color, and grain; worse light is darker or brighter, often without color."""
    x = np.linspace(-1, 1, painters.SIZE, dtype=np.float32)
    y = x[:, None]
    slope = 1 + light["strength"] * (np.cos(light["angle"]) * x + np.sin(light["angle"]) * y)
    image = image * slope[:, :, None] * (light["gain"] * light["cast"]).astype(np.float32)
    if light["gray"]:
        image = np.repeat(image @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=2)
    return np.clip(image + rng.standard_normal(image.shape, dtype=np.float32) * light["noise"], 0, 255).astype(np.uint8)


# --- splits, and their files -----------------------------------------------------------------------------------------


def list_rows(split: str, seed: int = 0) -> list[tuple[str, int, int, int]]:
    """(domain, class within the domain, number in the stream, view) of every image of a split, in order."""
    sizes = count_views(split)
    return [
        (domain, place, number, view)
        for domain in painters.DOMAINS
        for place, number in enumerate(list_class_numbers(split, domain, seed))
        for view in range(sizes[place])
    ]


def load_split(split: str, cache: str | Path, seed: int = 0, report: Callable[[int, int], None] | None = None) -> dict:
    """All images of a split, drawn on first use and then read from `cache`.

    Returns images (n, 64, 64, 3) uint8 (memory-mapped), labels (n,) int64, groups (n,) domain names, captions (n lists
    of five, or of the finest alone), names (label -> readable class name). `report(done, total)` is called while drawing.
    """
    if split not in SPLITS:
        raise ValueError(f"the mini world has no split {split!r}; choose one of {', '.join(SPLITS)}")
    rows, own = list_rows(split, seed), "train" if split == "train_noisy" else split
    path = Path(cache) / "mini_world" / f"{own}-seed{seed}-v{VERSION}.npy"
    shape = (len(rows), painters.SIZE, painters.SIZE, 3)
    images = None if read_drawn(path, shape) is not None else np.empty(shape, dtype=np.uint8)
    captions = []
    for i, (domain, _, number, view) in enumerate(rows):
        captions.append(tell_image(split, domain, number, view, seed))
        if images is not None:
            images[i] = draw_image(split, domain, number, view, seed)
            if report and i % 100 == 99:
                report(i + 1, len(images))
    if images is not None:
        gu.write_atomically(path, lambda file: np.save(file, images))
    _, classes, _ = SPLITS[split]
    labels = np.array([painters.DOMAINS.index(domain) * classes + place for domain, place, _, _ in rows])
    if split == "train_noisy":
        labels = add_wrong_labels(labels, classes, seed)
    return {
        "images": read_drawn(path, shape),
        "labels": labels,
        "groups": np.array([domain for domain, _, _, _ in rows]),
        "captions": [told[-1:] if split in FINEST_ALONE else told for told in captions],
        "names": [f"{domain} {place}" for domain in painters.DOMAINS for place in range(classes)],
    }


def read_drawn(path: Path, shape: tuple) -> np.ndarray | None:
    """The images in a file, memory-mapped, or None when it is not there or damaged: then they are drawn again."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, OSError, EOFError):
        images = np.load(path, mmap_mode="r")
        if (images.shape, images.dtype) == (shape, np.uint8):
            return images
    warnings.warn(f"{path} is damaged and is drawn again", stacklevel=2)
    return None


def tell_image(split: str, domain: str, number: int, view: int, seed: int = 0) -> list[str]:
    """The five captions of one image (`tell_five`)."""
    thing, seen = make_thing(split, domain, number, seed), make_view(split, domain, number, view, seed)
    return tell_five(domain, thing, seen, make_view_stream(split, domain, number, view, seed, 2))


def add_wrong_labels(labels: np.ndarray, classes: int, seed: int = 0) -> np.ndarray:
    """A tenth of the labels replaced by another class of the same domain, as tired annotators do."""
    rng, labels = make_stream(seed, 99), labels.copy()
    wrong = rng.choice(len(labels), round(WRONG_LABELS * len(labels)), replace=False)
    shift = rng.integers(1, classes, len(wrong))
    labels[wrong] = labels[wrong] // classes * classes + (labels[wrong] % classes + shift) % classes
    return labels


SAYS_NOTHING = ("photo {}", "image {}", "dsc {}", "untitled", "my favourite", "click to enlarge", "new arrivals")
LEVELS = (0.1, 0.1, 0.2, 0.15, 0.45)  # how often each of the five captions stands for an image


def draw_web_caption(
    captions: list[list[str]], row: int, rng: np.random.Generator, wrong: float = 0.3, empty: float = 0.05
) -> str:
    """A caption of an image as the web would have it: a share of them belong to another image, some say nothing."""
    if rng.random() < empty:
        return str(rng.choice(SAYS_NOTHING)).format(rng.integers(1000, 9999))
    row = int(rng.integers(len(captions))) if rng.random() < wrong else row
    return captions[row][rng.choice(len(LEVELS), p=LEVELS)]
