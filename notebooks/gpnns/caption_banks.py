"""Captions, as notebook 04 uses them: banks of captions, the nearest of them for each image, and captioned images.

a bank becomes a list -> its nearest captions for each image -> those near enough -> images with captions of their own
"""

from __future__ import annotations

import functools
import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import gpnns_utils as gu
from gpnns.images import datasets, own_images, splitting, text_files

# --- a bank becomes a list -------------------------------------------------------------------------------------------


def load_captions(source: str | Path, splits: splitting.Splits) -> list[str]:
    """The different captions of a bank, without empty ones, in the order in which they come.

    source: "mini" (captions of the drawn world), a data set by name ("coco:validation"), a .txt file with one caption per
    line, a .csv or .tsv table with a column `caption` (several: separated by `|`), a .tar with .txt members as webdataset
    writes them, or a folder of such tars. splits: the images that they are for; the drawn world's captions are refused for
    others. What is read of tars and tables is kept as text files in the cache, one by one, so a stopped run goes on.

    Raises FileNotFoundError for what is nowhere, ValueError for what cannot be read or holds no captions.
    """
    check_same_world(source, splits, "bank")
    named = str(source) == "mini" or str(source).partition(":")[0] in datasets.TABLE
    if named and not Path(source).exists():
        images = gu.load_images(source, "bank" if str(source) == "mini" else "train")
        texts = (text.strip() for listed in images.captions or [] for text in listed)
    else:
        texts = read_captions(list_text_files(source, gu.cache_folder() / "captions"))
    captions = list(dict.fromkeys(filter(None, texts)))
    if not captions:
        places = "put one on each line, in .txt members of the tars, or in a column 'caption'"
        raise ValueError(f"{source} holds no captions: {places}")
    return captions


QUESTIONS = ("a yellow flower", "a brick building with three towers", "a face with glasses", "a striped blue vase")


def choose_questions(encoder: gu.Encoder, images: gu.ImageSet, embeddings: np.ndarray) -> tuple[list, np.ndarray]:
    """Four texts to ask a set of images, and their embeddings (4, d): captions of its own, or the names of its classes. For an
    encoder without a text tower four of the images ask, said in a line."""
    if not encoder.has_text:
        print(f"{encoder.name} has no text tower, so images ask here too; mini and open_clip: encoders take words")
        rows = np.linspace(0, len(images) - 1, 4).astype(int)
        return [images[row] for row in rows], embeddings[rows]
    told = [texts[0] for texts in images.captions or [] if texts]
    told = told or images.names or ["a person", "a building", "an animal", "a plant"]
    texts = list(dict.fromkeys(QUESTIONS if images.drawn else told))
    texts = texts[:: max(1, len(texts) // 4)][:4]
    return texts, gu.embed_texts(encoder, texts)


def load_names(images: gu.ImageSet, most: int = 2000) -> list[str]:
    """Short texts that name things like those in the images, about `most` at most, written without a look at any of them:
    the names of the classes, for the drawn world captions of its bank."""
    if images.drawn:
        texts = sorted({text for listed in gu.load_images("mini", "bank").captions for text in listed})
    else:
        texts = sorted({images.names[label] for label in np.unique(images.labels)})
    return texts[:: max(1, len(texts) // most)]


def embed_names(encoder: gu.Encoder, names: Sequence[str], instead: np.ndarray) -> np.ndarray:
    """The embeddings of names, (n, d); `instead`, said in a line, for an encoder without a text tower."""
    if not encoder.has_text:
        print(f"{encoder.name} has no text tower: its directions are those of images here too")
        return instead
    return gu.embed_texts(encoder, names)


def check_same_world(source: str | Path, splits: splitting.Splits, name: str) -> None:
    """ValueError when captions of the drawn world are to say something about images of another."""
    if str(source) == "mini" and not splits.train.drawn:
        why = f"the drawn world's captions, {name} = 'mini', say nothing about other images"
        raise ValueError(f"{splits.train.name} needs a bank and pair_images of its own: {why}")


def list_text_files(source: str | Path, folder: Path) -> list[Path]:
    """A caption bank as text files with one caption per line; those made from tars and tables are kept in `folder`."""
    source = Path(source).expanduser()
    paths = sorted(source.glob("*.tar")) if source.is_dir() else [source]
    if not paths or not paths[0].exists():
        known = "a .txt, .csv, .tsv or .tar file, a folder of .tar files, or a data set's name"
        raise FileNotFoundError(f"no captions at {source.absolute()}: give {known}")
    files, progress = [], gu.Progress(len(paths), "reading captions", "files")
    for path in paths:
        files.append(make_text_file(path, folder))
        progress.update(len(files))
    return files


def make_text_file(path: Path, folder: Path) -> Path:
    """A text file with the captions of a file, there as a whole or not at all. Its name holds size and time of the original,
    so that a changed table is read again."""
    ending = path.suffix.lower()
    if ending == ".txt":
        return path
    readers = {".tar": read_captions_in_tar, ".csv": read_captions_in_table, ".tsv": read_captions_in_table}
    if ending not in readers:
        raise ValueError(f"{path} is no caption bank: it must end in .txt, {', '.join(readers)}")
    about = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    target = folder / f"{path.stem}-{hashlib.sha256(about.encode()).hexdigest()[:12]}.txt"
    if not target.exists():
        lines = (f"{' '.join(text.split())}\n".encode() for text in readers[ending](path))
        gu.write_atomically(target, lambda file: file.writelines(lines))
    return target


def read_captions_in_tar(path: Path) -> Iterator[str]:
    """The .txt members of a tar, read as a stream."""
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".txt"):
                    yield text_files.decode_text(tar.extractfile(member).read(), f"{member.name} in {path}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole tar file ({error}); fetch it again, or take it out") from error


def read_captions_in_table(path: Path) -> Iterator[str]:
    _, _, rows = own_images.open_table(path, "caption")
    for _, row in rows:
        yield from text_files.to_texts(row["caption"], between="|")


def read_captions(files: Sequence[Path]) -> Iterator[str]:
    """The captions of text files one after the other, without empty lines."""
    for path in files:
        yield from filter(None, map(str.strip, text_files.read_text_lines(path)))


# --- its nearest captions for each image -----------------------------------------------------------------------------

PORTION = 2**19  # captions whose embeddings are in memory at a time: 1.6 GB of 768 numbers


def find_captions(
    encoder: gu.Encoder, images: np.ndarray, captions: Sequence[str], top: int = 20, portion: int = PORTION
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` nearest captions of each image, the nearest first: scores float32 and rows of `captions` int64, (n, top).

    images: unit rows (n, d) of the same `encoder`. The bank is searched in portions, so that only a portion's embeddings are
    in memory; `embed_texts` keeps each of them, so a stopped search goes on. What is only padding to the tokenizer is not
    found. Where there are fewer captions than `top`, scores are -inf and rows -1. Prints what is cut or has no words.
    """
    if not encoder.has_text:
        raise ValueError(f"{encoder.name} has no text tower to find captions with; choose mini or open_clip:...")
    best, found = np.full((len(images), top), -np.inf, np.float32), np.full((len(images), top), -1)
    wordless = cut = 0
    for first in range(0, len(captions), portion):
        texts = list(captions[first : first + portion])
        worded = np.flatnonzero(has_words(encoder.tokenizer, texts))
        wordless, cut = wordless + len(texts) - len(worded), cut + int(is_cut(encoder.tokenizer, texts).sum())
        if len(worded):
            vectors = gu.embed_texts(encoder, [texts[i] for i in worded])
            scores, rows = gu.search(images, vectors, min(top, len(worded)))
            best, found = np.hstack([best, scores]), np.hstack([found, first + worded[rows]])
            nearest = np.argsort(-best, axis=1, kind="stable")[:, :top]
            best, found = np.take_along_axis(best, nearest, 1), np.take_along_axis(found, nearest, 1)
    told = f"{wordless:,} have no words for it, {cut:,} lose their end"
    print(f"{len(captions):,} captions searched with {encoder.name}; {told}")
    return best, found


def has_words(tokenizer: Callable, texts: list[str]) -> np.ndarray:
    """Which texts are more than padding to this tokenizer, bool (n,). Tokenizers differ in how they pad, so each is asked
    what it makes of the empty text."""
    return (tokenizer(texts) != tokenizer([""])).any(dim=1).numpy()


def is_cut(tokenizer: Callable, texts: list[str]) -> np.ndarray:
    """Which texts are longer than the tokenizer's context and lose their end, bool (n,): with one more place their first
    tokens come out differently."""
    tokens = tokenizer(texts)
    context = tokens.shape[1]
    return (tokens != tokenizer(texts, context_length=context + 1)[:, :context]).any(dim=1).numpy()


# --- those near enough -----------------------------------------------------------------------------------------------


def keep_near(
    scores: np.ndarray, rows: np.ndarray, captions: Sequence[str], threshold: float
) -> tuple[np.ndarray, list[str]]:
    """What `find_captions` found, above a threshold: rows (n, top) into the list of captions that remain, -1 for none."""
    near = scores > threshold
    if not near.any():
        nearest = f"the nearest is at {scores.max():.2f}"
        raise ValueError(f"no caption lies above {threshold}; {nearest}: lower the threshold")
    used = np.unique(rows[near])
    return np.where(near, np.searchsorted(used, rows), -1), [captions[row] for row in used]


def get_words(texts: Sequence[str]) -> set[str]:
    """The words of some texts, but for those that every caption has."""
    words = " ".join(texts).replace(",", " ").replace(":", " ").split()
    return set(words) - {"a", "an", "the", "and", "with", "of", "in", "on"}


def share_true_words(images: gu.ImageSet, rows: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """The share of a found caption's words that the image's own captions have too, (n, top); NaN where there is no caption
    or nothing is known of the image. rows: (n, top) into `captions`, -1 for none."""
    shares, words_of = np.full(rows.shape, np.nan), functools.cache(lambda row: get_words([captions[row]]))
    for image, own in enumerate(map(get_words, images.captions or [])):
        for place in np.flatnonzero(rows[image] >= 0) if own else ():
            told = words_of(int(rows[image, place]))
            shares[image, place] = len(told & own) / max(len(told), 1)
    return shares


# --- images with captions of their own -------------------------------------------------------------------------------


def load_pairs(source: str | Path, splits: splitting.Splits, seed: int = 0) -> tuple[gu.ImageSet, gu.ImageSet]:
    """Images with captions to realign a text tower on, none of them of validation or test, and those to choose the weights
    with: the validation images where they have captions of their own, else a tenth of the pairs.

    source: as for `load_images`. ValueError when no image outside validation and test has captions.
    """
    check_same_world(source, splits, "pair_images")
    images = gu.load_images(source, "bank" if str(source) == "mini" else "train")
    pairs = exclude_images(images, (*splits.validation, *splits.test, splits.text_validation, splits.text_test))
    if any(text.strip() for texts in splits.validation[0].captions or [] for text in texts):
        return pairs, splits.text_validation
    mixed, tenth = np.random.default_rng(seed).permutation(len(pairs)), max(2, len(pairs) // 10)
    return pairs.subset(np.sort(mixed[tenth:])), pairs.subset(np.sort(mixed[:tenth]))


def exclude_images(images: gu.ImageSet, held_out: Sequence[gu.ImageSet]) -> gu.ImageSet:
    """The images that have captions, without empty ones, and that none of the sets `held_out` shows."""
    shown = {digest for other in {id(one): one for one in held_out}.values() for digest in other.digests()}
    captions = [[text for text in texts if text.strip()] for texts in images.captions or [[]] * len(images)]
    rows = [row for row, digest in enumerate(images.digests()) if captions[row] and digest not in shown]
    if not rows:
        advice = "add a captions.json to the folder, or a column 'caption'"
        raise ValueError(f"{images.name} has no captions for images outside test and validation: {advice}")
    images.captions = captions
    return images.subset(rows)
