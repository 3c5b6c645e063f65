"""What notebook 02 measures: new things and known ones, texts that ask, several encoders, and what others computed.

images -> those with a gallery of their own -> embeddings of each encoder -> vectors and neighbours of other programs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import gpnns_utils as gu
from gpnns.images import datasets, image_set, splitting, text_files

# --- images ----------------------------------------------------------------------------------------------------------


def load_labelled(source: str | Path) -> gu.ImageSet:
    """The images of a source, whose labels say what is right: its split "test", or its "gallery" where it has no other than
    that and "query". ValueError without labels."""
    images = gu.load_images(
        source, "gallery" if has_queries(source) and not splitting.has_split(source, "test") else "test"
    )
    if images.labels is None:
        raise ValueError(f"{source} {image_set.NO_LABELS}")
    return images


def load_known(source: str | Path, images: gu.ImageSet, seed: int = 0) -> gu.ImageSet:
    """A closed question: one set of images whose `groups` say which are "query" and which "gallery", of the same classes.

    Of "mini", new pictures of classes that were trained on ask the training images of these. Of other sources the splits
    "query" and "gallery" are taken, or a folder's own "train" as the gallery where it shows the classes of `images`, or
    else half of each class of `images` is asked by the other half. Prints which it was.
    Raises ValueError when a picture is on both sides.
    """
    queries, gallery, how = None, None, "other pictures of things in the gallery ask it"
    if images.drawn:
        queries, gallery = gu.load_images("mini", "known"), gu.load_images("mini", "train")
        known = {queries.names[label] for label in np.unique(queries.labels)}
        gallery = gallery.subset([gallery.names[label] in known for label in gallery.labels])
        how = "new pictures of things that notebook 03 trains on ask the training pictures"
    elif has_queries(source):
        queries, gallery = (gu.load_images(source, split) for split in ("query", "gallery"))
    else:
        train = None if str(source) in datasets.TABLE else splitting.load_split_beside(source, "train")
        if train and train.labels is not None and splitting.find_question(train, images, "") == "closed":
            queries, gallery = images, train
    if queries is None:
        how = "half of each class asks the other"
        both = replace(images, left_out=list(images.left_out), groups=split_halves(images.labels, seed))
    else:
        queries = splitting.check_apart(splitting.use_labels_of(gallery, queries), gallery)
        name = f"{queries.name} and {gallery.name.rpartition(' ')[2]}"
        both = image_set.concat([queries, gallery], name, groups=["query", "gallery"])
    asks = int((both.groups == "query").sum())
    print(f"{asks:,} queries, {len(both) - asks:,} images in the gallery: {how}")
    return both


def has_queries(source: str | Path) -> bool:
    """Whether a source tells queries and gallery apart itself; the drawn world does so by its splits."""
    return str(source) != "mini" and all(splitting.has_split(source, split) for split in ("query", "gallery"))


def split_halves(labels: np.ndarray, seed: int) -> np.ndarray:
    """ "gallery" for half of each class, and for the odd one, "query" for the others."""
    order, side = np.random.default_rng(seed).permutation(len(labels)), np.full(len(labels), "query", dtype="<U7")
    for label in np.unique(labels):
        members = order[labels[order] == label]
        side[members[: (len(members) + 1) // 2]] = "gallery"
    return side


def load_described(images: gu.ImageSet) -> gu.ImageSet:
    """Images whose captions ask: the drawn world's `captions`, of other things; of other sources the images themselves, where
    the name of its class asks for an image without a caption."""
    return gu.load_images("mini", "captions") if images.drawn else splitting.add_names_as_captions(images)


# --- encoders --------------------------------------------------------------------------------------------------------


def load_each(encoders: Sequence[str]) -> Iterator[gu.Encoder]:
    """The encoders one after the other, so that the largest decides how much memory is needed. ValueError for two of the same
    short name, such as two files called epoch_3.pt."""
    names = set()
    for spec in encoders:
        encoder = gu.load_encoder(spec)
        if encoder.name in names:
            raise ValueError(f"two of {list(encoders)} are called {encoder.name}: rename a file, or measure them apart")
        names.add(encoder.name)
        yield encoder


def embed_each(encoders: Sequence[str], images: gu.ImageSet) -> tuple[dict[str, np.ndarray], gu.ImageSet]:
    """Embeddings by each encoder, {short name: (n, d)}, and the images that they belong to: those that all of them could
    embed."""
    return keep_common({encoder.name: gu.embed_images(encoder, images) for encoder in load_each(encoders)}, images)


def keep_common(
    embedded: dict[str, tuple[np.ndarray, gu.ImageSet]], images: gu.ImageSet
) -> tuple[dict[str, np.ndarray], gu.ImageSet]:
    """What `gu.embed_images` gave for the same images by several encoders, without what one of them could not embed."""
    for _, own in embedded.values():
        if len(own) < len(images):
            images = own.subset(np.isin(own.rows, images.rows))
    return {name: vectors[np.isin(own.rows, images.rows)] for name, (vectors, own) in embedded.items()}, images


def select_text_encoders(encoders: Sequence[str]) -> list[str]:
    """Those of the encoders that have a text tower."""
    return [spec for spec in encoders if gu.load_encoder(spec).has_text]


def embed_texts_each(encoders: Sequence[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Embeddings of the texts by each encoder, {short name: (n, d)}. ValueError for one without a text tower."""
    return {encoder.name: gu.embed_texts(encoder, texts) for encoder in load_each(encoders)}


# --- what other programs computed ------------------------------------------------------------------------------------


def load_vectors(path: str, images: gu.ImageSet) -> dict[str, np.ndarray]:
    """Vectors that another program made of the images, {"file:NAME": unit rows}; nothing where no file is given.

    path: a .npy file, one row for each image, in their order; a .txt of their names beside it lets the order be checked.
    Raises ValueError for what does not fit, with NaN, infinite and zero rows by their number.
    """
    return {f"file:{Path(path).stem}": gu.unit_rows(load_rows(path, images), path)} if path else {}


def load_neighbours(path: str, images: gu.ImageSet) -> dict[str, np.ndarray]:
    """Rankings that another program made, {"file:NAME": int64 (n, k)}; nothing where no file is given.

    path: a .npy file, for each image the rows of its neighbours, nearest first, -1 where nothing was found. An image is
    its own nearest neighbour, which tells lists in a wrong order, unless they leave the query out. Raises ValueError for
    what cannot be right.
    """
    if not path:
        return {}
    lists, last = load_rows(path, images), len(images) - 1
    if lists.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {lists.dtype}; neighbours are row numbers, whole numbers from 0 to {last}")
    if lists.min() < -1 or lists.max() > last:
        wrong = int(np.argmax((lists < -1).any(axis=1) | (lists > last).any(axis=1)))
        raise ValueError(f"{path}: the list of image {wrong} names a row outside 0 to {last}; count from 0")
    ordered = np.sort(lists, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(f"{path}: the list of image {int(np.argmax(twice))} names an image twice; list each once")
    own = lists == np.arange(len(images))[:, None]
    if own.any() and own[:, 0].mean() < 0.5:
        raise ValueError(
            f"{path}: {own[:, 0].mean():.0%} of the images are their own first neighbour; all should be, or none. "
            "Lists go from near to far, and row i belongs to image i of load_images"
        )
    return {f"file:{Path(path).stem}": lists.astype(np.int64)}


def load_rows(path: str, images: gu.ImageSet) -> np.ndarray:
    """An array of a .npy file with one row for each image; ValueError says what does not fit."""
    try:
        table = np.load(Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as an array ({error}); give a file that numpy.save wrote, numbers only"
        ) from error
    if table.ndim != 2 or len(table) != len(images) or table.size == 0:
        missing = f", without the {len(images.left_out)} that cannot be read" if images.left_out else ""
        raise ValueError(
            f"{path} holds an array {table.shape}; it needs a row for each of {len(images)} images{missing}"
        )
    names = Path(path).expanduser().with_suffix(".txt")
    if names.exists():
        check_order(names, images)
    return table


def check_order(names: Path, images: gu.ImageSet) -> None:
    """Compare a list of file names, one for each row, with the images; ValueError names the first that differs."""
    listed = text_files.read_text(names).split("\n")
    for row in range(len(images)) if not isinstance(images.images, np.ndarray) else ():
        given = listed[row].strip() if row < len(listed) else ""
        if not given or not f"/{Path(images.images[row]).as_posix()}".endswith(f"/{given}"):
            raise ValueError(
                f"{names}, line {row + 1} says {given or 'nothing'!r}, but image {row} is {images.images[row]}; "
                "compute the rows in the order of load_images"
            )


def rank_in_lists(lists: np.ndarray, relevant: Sequence, leave_out_query: bool) -> np.ndarray:
    """The ranks of the relevant images in each query's list, as `gu.rank_relevant` gives them for a full ranking; one that
    is not listed was never found. lists: (n, k), row i of image i; with or without the image itself."""
    ranks = np.full((len(lists), max(map(len, relevant))), np.inf)
    for query, (listed, wanted) in enumerate(zip(lists, relevant, strict=True)):
        if leave_out_query:
            listed, wanted = listed[listed != query], wanted[wanted != query]
        elif query not in listed:
            listed = np.concatenate([[query], listed])
        place = np.full(len(lists) + 1, 1e9)  # far below any list; the extra place takes the -1
        place[listed] = np.arange(1, len(listed) + 1)
        ranks[query, : len(wanted)] = np.sort(place[wanted])
    return ranks
