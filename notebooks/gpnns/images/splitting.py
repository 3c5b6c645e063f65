"""Training, validation and test sets: those that a source brings, or classes and images cut off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import gpnns_utils as gu
from gpnns.images import datasets, downloads, image_set, own_images


def require_labels(images: gu.ImageSet) -> gu.ImageSet:
    """The same images; ValueError for a set without labels."""
    if images.labels is None:
        raise ValueError(f"{images.name} {image_set.NO_LABELS}")
    return images


def split_classes(images: gu.ImageSet, share: float, seed: int = 0) -> tuple[gu.ImageSet, gu.ImageSet]:
    """Cut off `share` of the classes, at least two: (the rest, those). Select models on them, not on a benchmark.

    Only classes with two images or more are cut off, because a single image has nothing to find. Raises ValueError
    without labels, or when there are too few classes for both sides.
    """
    require_labels(images)
    classes, counts = np.unique(images.labels, return_counts=True)
    measurable = classes[counts > 1]
    number = max(2, min(round(share * len(classes)), len(measurable)))
    if len(classes) - number < 2 or len(measurable) < 2:
        need = f"at least {number + 2} are needed, {number} of them, with two images or more, to measure on"
        raise ValueError(f"{images.name} has {len(classes)} classes; {need}: add classes")
    held = np.isin(images.labels, np.random.default_rng(seed).choice(measurable, number, replace=False))
    return images.subset(~held), images.subset(held)


@dataclass
class Splits:
    """What `load_splits` gives: images to learn from, and twice queries and the gallery that they search.

    question "open": things that were never trained on, where all images of a part search each other (queries is gallery,
    and a query leaves itself out). question "closed": other pictures of the things that are trained on, which search the
    training images; labels of all sets then mean the same classes.

    text_validation, text_test: the images whose captions ask. In the drawn world those of its caption test, of other
    images the queries of validation and test themselves; the name of its class asks for an image without a caption.
    """

    question: str
    train: gu.ImageSet
    validation: tuple[gu.ImageSet, gu.ImageSet]
    test: tuple[gu.ImageSet, gu.ImageSet]
    text_validation: gu.ImageSet
    text_test: gu.ImageSet

    def open_sets(self) -> tuple[gu.ImageSet, gu.ImageSet, gu.ImageSet]:
        """Train, validation and test of an open question. ValueError for a closed one."""
        if self.question == "closed":
            asks = "shows the classes that are trained on, so it asks for things known (closed)"
            remedy = "here they must be others (open): give images of other classes, or none, and some are cut off"
            raise ValueError(f"{self.test[0].name} {asks}; {remedy}")
        return self.train, self.validation[0], self.test[0]


def load_splits(train_images: str | Path, test_images: str | Path = "", seed: int = 0) -> Splits:
    """Labelled images to learn from, to choose on and to measure on; prints which question they answer.

    "mini" brings its own three parts. Of others, those to measure on are `test_images`, or the split "test" of
    `train_images` where it has one, or else a fifth of the classes, cut off. When they show none of the classes that are
    trained on the question is open, when they show only those it is closed: can new pictures of known things be found?
    To choose on serves a split "validation" that asks the same, or else a tenth of the classes (open) or of the images
    (closed) is cut off. Where `train_images` has splits "query" and "gallery" those are the test.

    Raises ValueError without labels, for too few classes, for a test that mixes both questions, and when a picture of a
    closed test is trained on.
    """
    if str(train_images) == "mini":  # whose classes have the same names in every part, and are others
        if test_images:
            raise ValueError("test_images belong to train_images of your own; the drawn world brings its test")
        parts = ("train", "validation", "test", "captions_validation", "captions")
        train, validation, test, *asked = (datasets.load_images("mini", part) for part in parts)
        asked = map(add_names_as_captions, asked)
        return tell_question(Splits("open", train, (validation, validation), (test, test), *asked))
    train, searched = require_labels(datasets.load_images(train_images, "train")), None
    test = datasets.load_images(test_images, "test") if test_images else load_split_beside(train_images, "test")
    validation = load_split_beside(train_images, "validation")
    if test is None:
        queries, gallery = (load_split_beside(train_images, part) for part in ("query", "gallery"))
        test, searched = (queries, gallery) if queries and gallery else (None, None)
    if test is None:
        train, test = split_classes(train, 0.2, seed)
    question = find_question(train, require_labels(test))
    if validation and (validation.labels is None or find_question(train, validation, "") != question):
        print(f"{validation.name} does not ask the same ({question}) as {test.name}, and is left aside")
        validation = None
    if validation and question == "open" and find_question(test, validation, "") != "open":
        print(f"{validation.name} shows classes of {test.name}, which must not choose, and is left aside")
        validation = None
    if searched:
        test = check_apart(use_labels_of(searched, test), searched)
    if question == "open":
        if not searched and (np.unique(test.labels, return_counts=True)[1] > 1).sum() < 2:
            raise ValueError(f"{test.name} needs at least two classes with two images each, to measure on")
        for held in filter(None, (test, searched, validation)):
            if twice := find_shared_images(train, held):
                shown = f"{len(twice)} of {len(held)} images of {held.name} are in {train.name} too"
                print(f"{shown}, under other labels; they are taken out of it")
                train = train.subset(np.setdiff1d(np.arange(len(train)), [row for row, _ in twice]))
        if validation is None:
            train, validation = split_classes(train, 0.1, seed)
        gallery = searched or test
    else:
        test = test if searched else check_apart(use_labels_of(train, test), train)
        if validation is None:
            train, validation = split_images(train, 0.1, seed)
        else:
            validation = check_apart(check_apart(use_labels_of(train, validation), train), test)
        gallery = searched or train
    chosen_on, asked = (validation, validation if question == "open" else train), (validation, test)
    return tell_question(Splits(question, train, chosen_on, (test, gallery), *map(add_names_as_captions, asked)))


def tell_question(splits: Splits) -> Splits:
    """The same splits; prints their question, and what searches what."""
    queries, gallery = splits.test
    they = f"they search {len(gallery):,} images of their own"
    if splits.question == "open":
        they = "their images search each other" if gallery is queries else they
        how = f"{len(np.unique(queries.labels))} classes that are not trained on; {they}"
    else:
        they = f"they search the {len(gallery):,} training images" if gallery is splits.train else they
        how = f"{len(queries):,} other images of classes that are trained on; {they}"
    print(f"the question is {splits.question}: {how}")
    return splits


def add_names_as_captions(images: gu.ImageSet) -> gu.ImageSet:
    """The same images, the name of its class as the caption of each that has none."""
    told = [[text for text in texts if text.strip()] for texts in images.captions or [[]] * len(images)]
    names = [[]] * len(images) if images.labels is None else [[images.names[label]] for label in images.labels]
    captions = [texts or name for texts, name in zip(told, names, strict=True)]
    return replace(images, captions=captions, left_out=list(images.left_out))


def load_split_beside(source: str | Path, split: str) -> gu.ImageSet | None:
    """Another split of the same source, or None where it has none."""
    if not has_split(source, split):
        return None
    images = datasets.load_images(source, split)
    return images if images.name.endswith(f" {split}") else replace(images, name=f"{images.name} {split}")


def has_split(source: str | Path, split: str) -> bool:
    """Whether a data set, a folder or a table has a split of that name; not asked of several sets, or of a split itself."""
    names = [part.strip().partition(":")[0] for part in str(source).split(" + ")]
    if set(names) <= set(datasets.TABLE) and not Path(source).exists():
        return str(source) in datasets.TABLE and split in datasets.TABLE[str(source)]["splits"]
    return own_images.has_own_split(Path(source).expanduser(), split)


def find_question(train: gu.ImageSet, other: gu.ImageSet, mixed: str | None = None) -> str:
    """ "open" when two sets share no class, "closed" when the second shows only classes of the first, else `mixed`, or a
    ValueError."""
    shown = {other.names[label] for label in np.unique(other.labels)}
    known = {train.names[label] for label in np.unique(train.labels)}
    shared = sorted(shown & known)
    if not shared or shared == sorted(shown):
        return "closed" if shared else "open"
    if mixed is None:
        both = f"are trained on, for example {shared[0]}, and others are not, for example {min(shown - known)}"
        ask = "ask for known things (closed) or for new ones (open), not for both at once"
        raise ValueError(f"{len(shared)} of the {len(shown)} classes of {other.name} {both}: {ask}")
    return mixed


def use_labels_of(train: gu.ImageSet, other: gu.ImageSet) -> gu.ImageSet:
    """The other set with the class numbers of the first. ValueError when that has not all of its classes."""
    numbers = {name: number for number, name in enumerate(train.names)}
    if missing := sorted({other.names[label] for label in other.labels} - set(numbers)):
        raise ValueError(f"{train.name} has no image of {missing[0]}, which {other.name} asks for")
    return replace(other, labels=np.array([numbers[other.names[label]] for label in other.labels]), names=train.names)


def check_apart(other: gu.ImageSet, train: gu.ImageSet) -> gu.ImageSet:
    """The other set; ValueError when a picture of it is in the first: it would find itself."""
    if twice := find_shared_images(train, other):
        example = f"for example {other.describe(twice[0][1])} as {train.describe(twice[0][0])}"
        count = f"{len(twice)} of {len(other)} images of {other.name} are also in {train.name}"
        raise ValueError(f"{count}, {example}: each would find itself; take them out of one")
    return other


def find_shared_images(one: gu.ImageSet, other: gu.ImageSet) -> list[tuple[int, int]]:
    """(row, row) of the images that two sets share. Only files of the same size are read."""

    def sizes(images: gu.ImageSet) -> np.ndarray:
        pixels = isinstance(images.images, np.ndarray)
        return np.array([0 if pixels else downloads.get_file_size(Path(path)) for path in images.images])

    ours, theirs = sizes(one), sizes(other)
    rows, others = np.flatnonzero(np.isin(ours, theirs)), np.flatnonzero(np.isin(theirs, ours))
    known = dict(zip(other.subset(others).digests(), others, strict=True))
    return [(row, known[d]) for row, d in zip(rows, one.subset(rows).digests(), strict=True) if d in known]


def split_images(images: gu.ImageSet, share: float, seed: int = 0) -> tuple[gu.ImageSet, gu.ImageSet]:
    """Cut off `share` of the images, of classes that keep at least one: (the rest, those). ValueError when there are none."""
    left, cut = np.bincount(images.labels), []
    for row in np.random.default_rng(seed).permutation(len(images)):
        if left[images.labels[row]] > 1 and len(cut) < max(2, round(share * len(images))):
            left[images.labels[row]] -= 1
            cut.append(row)
    if len(cut) < 2:
        one = "has one image for nearly every class, so that none can be set apart to choose on"
        raise ValueError(f"{images.name} {one}; add images, or a folder 'validation' with others beside 'train'")
    held = np.isin(np.arange(len(images)), cut)
    return images.subset(~held), images.subset(held)
