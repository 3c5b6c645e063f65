"""What notebook 08 builds: the parts of a folder, copies in it, a search that is improved step by step, what is taken home.

images -> parts to learn from, to choose on and to measure on -> copies among them -> a search, step by step -> a folder

Nothing is asked of the images but that they are there. A step that needs labels or captions gives back the search that it
got where there are none, and says in a line what they would add.
"""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gpnns_utils as gu
from gpnns import soups, training
from gpnns.encoders import checkpoints, heads
from gpnns.evaluation import IMAGES, TEXTS, evaluate
from gpnns.images import datasets, image_set, splitting, text_files

UNITS = {IMAGES: "image to image, mAP", TEXTS: "text to image, R@5"}  # what is measured, and how

# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What `load_parts` gives. question: "open" (queries show things that nothing is trained on), "closed" (other images of
    the things that are trained on), or "" where no labels say what is right. validation, test: queries and the gallery that
    they search. told: "train", "validation" and "test", the images whose captions teach and ask; without captions nobody does.
    everything: what the finished search holds. source: where the images come from, absolute where it is a path.
    """

    question: str
    train: gu.ImageSet
    validation: tuple[gu.ImageSet, gu.ImageSet]
    test: tuple[gu.ImageSet, gu.ImageSet]
    told: dict[str, gu.ImageSet]
    everything: gu.ImageSet
    source: str


def load_parts(source: str | Path, seed: int = 0) -> Parts:
    """The parts of a folder, a table, a data set or "mini"; prints what they are.

    A source with splits of its own keeps them (`load_splits`). Of others a fifth is cut off to measure on and a tenth to
    choose on: whole classes where there are ten with two images or more, else images of the classes, else, without labels,
    just images. Exact copies count once, but for `everything`. Raises ValueError for fewer than 10 images.
    """
    splits = ("train", "validation", "test", "query")
    if str(source) == "mini" or any(splitting.has_split(source, split) for split in splits):
        return make_parts_of_splits(splitting.load_splits(source, seed=seed), str(source))
    images = gu.load_images(source, "train")
    whole = replace(images, left_out=list(images.left_out))
    _, first = np.unique(images.digests(), return_index=True)
    if len(first) < 10:
        raise ValueError(
            f"{images.name} holds {len(first)} different images; ten are the least that can be cut in parts"
        )
    images = images.subset(np.sort(first))
    counts = np.array([]) if images.labels is None else np.bincount(images.labels)
    if (counts > 1).sum() >= 10:
        train, test = splitting.split_classes(images, 0.2, seed)
        train, validation = splitting.split_classes(train, 0.1, seed)
        return make_parts("open", train, (validation, validation), (test, test), whole, source)
    if (counts > 2).sum() >= 2:
        train, test = splitting.split_images(images, 0.2, seed)
        train, validation = splitting.split_images(train, 0.1, seed)
        return make_parts("closed", train, (validation, train), (test, train), whole, source)
    order = np.random.default_rng(seed).permutation(len(images))
    pieces = np.split(order, [round(0.2 * len(order)), round(0.3 * len(order))])
    test, validation, train = (images.subset(np.sort(piece)) for piece in pieces)
    return make_parts("", train, (validation, validation), (test, test), whole, source)


def make_parts_of_splits(splits: splitting.Splits, source: str) -> Parts:
    """The parts that a source brings itself; in the drawn world captions of other things ask."""
    if source == "mini":
        bank = datasets.load_images("mini", "bank")
        told = {"train": bank, "validation": splits.text_validation, "test": splits.text_test}
        return Parts(splits.question, splits.train, splits.validation, splits.test, told, splits.test[1], source)
    sets = {id(one): one for one in (splits.train, *splits.validation, *splits.test)}
    return make_parts(
        splits.question, splits.train, splits.validation, splits.test, image_set.concat(list(sets.values())), source
    )


def make_parts(
    question: str, train: gu.ImageSet, validation: tuple, test: tuple, everything: gu.ImageSet, source: str | Path
) -> Parts:
    told = {"train": train, "validation": validation[0], "test": test[0]}
    kinds = 0 if test[0].labels is None else len(np.unique(test[0].labels))
    asked = {
        "open": f"{len(test[0]):,} images of {kinds} classes that nothing is trained on",
        "closed": f"{len(test[0]):,} other images of classes that are trained on",
        "": f"{len(test[0]):,} images, but no labels tell which of them show the same",
    }[question]
    print(f"to measure on: {asked}; to choose on: {len(validation[0]):,} images; to learn from: {len(train):,}")
    place = Path(source).expanduser()
    return Parts(
        question, train, validation, test, told, everything, str(place.absolute() if place.exists() else source)
    )


# --- copies ----------------------------------------------------------------------------------------------------------


def find_copies(parts: Parts) -> tuple[gu.ImageSet, np.ndarray, np.ndarray, np.ndarray]:
    """For every image its nearest other one as thumbnails of 16 x 16 colours (`pixels`), which know nothing of things and so
    take for alike what is nearly the same picture: (the images, the part of each, cosine (n,), row of the other (n,))."""
    sets = {"train": parts.train, "validation": parts.validation[0], "test": parts.test[0]}
    images = image_set.concat(list(sets.values()))
    part = np.repeat(list(sets), [len(one) for one in sets.values()])
    vectors, images = gu.embed_images(gu.load_encoder("pixels"), images)
    part = part[images.rows]  # files that cannot be read are gone
    scores, rows = gu.search(vectors, vectors, 1, own=np.arange(len(vectors)))
    return images, part, scores[:, 0], rows[:, 0]


def remove_copies(parts: Parts, threshold: float) -> Parts:
    """The parts without training images that have a near copy (`find_copies`) among the images to choose or to measure on.
    Says how many; a class that loses all of its images is gone from the training."""
    images, part, _, _ = find_copies(parts)
    vectors, _ = gu.embed_images(gu.load_encoder("pixels"), images)
    learned = np.flatnonzero(part == "train")
    nearest = gu.search(vectors[learned], vectors[part != "train"], 1)[0][:, 0]
    gone = images.rows[learned[nearest > threshold]]
    print(f"{len(gone):,} of {len(parts.train):,} training images have a near copy in another part and are taken out")
    if len(gone) == 0:
        return parts
    train = parts.train.subset(np.setdiff1d(np.arange(len(parts.train)), gone))
    swap = lambda one: train if one is parts.train else one  # noqa: E731
    return replace(
        parts,
        train=train,
        validation=tuple(map(swap, parts.validation)),
        test=tuple(map(swap, parts.test)),
        told={name: swap(one) for name, one in parts.told.items()},
    )


# --- a search, and what it scores ------------------------------------------------------------------------------------


@dataclass
class Search:
    """An encoder, and how much of the hub bias is taken from the scores of texts: alpha times the mean of the k highest scores
    of an image with captions of training images (0: nothing)."""

    encoder: gu.Encoder
    k: int = 16
    alpha: float = 0.0


def embed_references(encoder: gu.Encoder, parts: Parts, most: int = 2400) -> np.ndarray:
    """Embeddings of captions of training images, at most so many: what texts will be like, (n, d)."""
    texts, _ = image_set.text_queries(parts.told["train"])
    kept = np.sort(np.random.default_rng(0).permutation(len(texts))[:most])
    return gu.embed_texts(encoder, [texts[row] for row in kept])


def measure_search(search: Search, parts: Parts, part: str = "validation") -> dict[str, gu.Score]:
    """What a search scores on "validation" or "test", one value per query: mAP of image to image where labels say what is
    right, R@5 of text to image where there are captions. An encoder without a text tower finds nothing by text: 0."""
    encoder, told = search.encoder, parts.told[part]
    queries, gallery = getattr(parts, part) if parts.question else (None, None)
    texts, find_bias = image_set.text_queries(told)[0], None
    if search.alpha:
        references = embed_references(encoder, parts)
        find_bias = lambda images: gu.hub_bias(images, references, search.k, search.alpha)  # noqa: E731
    scores = evaluate(encoder, queries, gallery, told, recall_at=5, find_bias=find_bias)
    return scores | ({TEXTS: gu.Score(np.zeros(len(texts)))} if texts and not encoder.has_text else {})


def get_clusters(parts: Parts, part: str) -> dict[str, np.ndarray | None]:
    """What succeeds and fails together in an interval: the class of each image query; texts one by one."""
    return {IMAGES: getattr(parts, part)[0].labels, TEXTS: None}


# --- steps -----------------------------------------------------------------------------------------------------------


def explain_missing(search: Search, parts: Parts, *needs: str) -> str:
    """What a step needs and does not have, with what it would add; "" where nothing is missing."""
    reasons = {
        "labels": (
            parts.question,
            "no labels: with a folder or a column for each thing, images could be drawn together",
        ),
        "captions": (
            bool(
                image_set.text_queries(parts.told["train"])[0] and image_set.text_queries(parts.told["validation"])[0]
            ),
            "no captions: with a column `caption` or a captions.json, search by text could be improved and measured",
        ),
        "text tower": (search.encoder.has_text, f"{search.encoder.name} has no text tower"),
        "weights": (search.encoder.model is not None, f"{search.encoder.name} has no weights to train"),
    }
    return next((f"{why}; nothing is changed" for need in needs for there, why in [reasons[need]] if not there), "")


def map_search(search: Search, parts: Parts, learn: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Search:
    """The search with a linear map after its towers; learn(embeddings (n, d), labels (n,)) gives its matrix (d, d)."""
    if why := explain_missing(search, parts, "labels", "weights"):
        print(why)
        return search
    vectors, train = gu.embed_images(search.encoder, parts.train)
    return replace(search, encoder=add_map(search.encoder, learn(vectors, train.labels)))


def add_map(encoder: gu.Encoder, matrix: np.ndarray) -> gu.Encoder:
    """A copy whose embeddings are `matrix` (d, d) times the ones before. Of an open_clip model both projections take it in, so
    that it stays one of its architecture and images still lie where texts do; other models get it as a head, as `add_head`."""
    other, by = copy.deepcopy(encoder), torch.as_tensor(matrix, dtype=torch.float32, device=encoder.device)
    places = [find_projection(other.model, side) for side in ("image", "text")] if encoder.has_text else [[]]
    if all(places):
        with torch.no_grad():
            for value, transposed in [*places[0], *places[1]]:
                value.copy_(by @ value if transposed else value @ by.T)
        return other
    if encoder.has_text:
        print(f"{encoder.name} has no projections of known names: the map becomes a head, and texts cannot be asked")
    if encoder.origin.get("head"):
        raise ValueError(f"{encoder.name} already has a head; start from an encoder without one")
    other = heads.add_head(other, encoder.dim)
    checkpoints.fill_weights(other.model.embedding_head, {"linear.weight": by}, encoder.name)
    return other


def find_projection(model: torch.nn.Module, side: str) -> list[tuple[torch.Tensor, bool]]:
    """What ends a tower of an open_clip model: its matrix, and its offset where it has one, each with whether it is stored as
    (numbers, features), as linear layers do; nothing where open_clip gives it no name that is known here."""
    tower = model.visual if side == "image" else getattr(model, "text", model)
    names = (
        ("proj", "head.proj", "attnpool.c_proj", "trunk.head.fc") if side == "image" else ("text_projection", "proj")
    )
    for name in names:
        part = tower
        for piece in name.split("."):
            part = getattr(part, piece, None)
        if isinstance(part, torch.nn.Linear):
            return [(part.weight, True)] + ([(part.bias, False)] if part.bias is not None else [])
        if isinstance(part, torch.nn.Parameter):
            return [(part, False)]
    return []


def tune_search(search: Search, parts: Parts, folder: Path, **settings) -> Search:
    """The search with its image tower fine-tuned on the training images; settings: of `training.fine_tune_by_recipe`."""
    if why := explain_missing(search, parts, "labels", "weights"):
        print(why)
        return search
    choose_on = parts.validation[0] if parts.question == "open" else parts.validation
    vectors, train = gu.embed_images(search.encoder, parts.train)
    encoder, _ = training.fine_tune_by_recipe(
        copy.deepcopy(search.encoder), train, choose_on, folder, settings, embeddings=vectors
    )
    return replace(search, encoder=encoder)


def average_searches(one: Search, other: Search) -> Search:
    """The search whose weights are the mean of two (`soups.average`)."""
    if one.encoder.model is None or one is other or one.encoder is other.encoder:
        print("there are no two trainings to average; nothing is changed")
        return one
    encoder = copy.deepcopy(one.encoder)
    state = soups.average([one.encoder.model.state_dict(), other.encoder.model.state_dict()])
    checkpoints.fill_weights(encoder.model, state, "the average of two trainings")
    return replace(one, encoder=encoder)


def realign_search(search: Search, parts: Parts, folder: Path, **settings) -> Search:
    """The search with the end of its text tower fitted to its images (`training.realign`, whose settings these are)."""
    if why := explain_missing(search, parts, "captions", "text tower", "weights"):
        print(why)
        return search
    train = parts.told["train"]
    pairs = train.subset([bool(texts) for texts in train.captions])
    encoder, _ = training.realign(copy.deepcopy(search.encoder), pairs, parts.told["validation"], folder, **settings)
    return replace(search, encoder=encoder)


def correct_hubs(
    search: Search, parts: Parts, ks: Sequence[int] = (4, 16, 64), alphas: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
) -> Search:
    """The search with a hub bias for texts, whose k and alpha find most on the validation captions (notebook 06)."""
    if why := explain_missing(search, parts, "captions", "text tower"):
        print(why)
        return search
    most = len(embed_references(search.encoder, parts))
    choices = [replace(search, k=k, alpha=alpha) for k in sorted({min(k, most) for k in ks}) for alpha in alphas]
    return max(choices, key=lambda choice: measure_search(choice, parts)[TEXTS].mean)


# --- take home -------------------------------------------------------------------------------------------------------


def take_home(search: Search, parts: Parts, folder: Path, card: dict) -> Path:
    """Write a finished search into `folder`, in place of an earlier one only when all of it is there.

    index.faiss: all images, for inner products, with the bias in it; search.json: their names and captions, the encoder,
    and `card`; references.npy: what the bias was computed from, for images that are added later;
    README.md: the card to read. An open_clip model lies there as open_clip and the Hugging Face hub expect it
    (open_clip_config.json, open_clip_model.safetensors), any other as model.safetensors.
    """
    encoder = search.encoder
    vectors, images = gu.embed_images(encoder, parts.everything)
    bias = gu.hub_bias(vectors, embed_references(encoder, parts), search.k, search.alpha) if search.alpha else None
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index = gu.build_index(gu.with_bias(vectors, bias), "flat", metric="inner")
    gu.get_faiss().write_index(index, str(partial / "index.faiss"))
    if search.alpha:
        np.save(partial / "references.npy", embed_references(encoder, parts))
    about = card | {"encoder": save_model(encoder, partial), "alpha": search.alpha, "k": search.k}
    about["names"] = [images.describe(row) for row in range(len(images))]
    about["captions"] = images.captions
    (partial / "search.json").write_text(json.dumps(about, default=gu.to_json, indent=1), encoding="utf-8")
    (partial / "README.md").write_text(write_card(about, folder.name), encoding="utf-8")
    former = folder.with_name(folder.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    partial.rename(folder)
    shutil.rmtree(former, ignore_errors=True)
    return folder


def save_model(encoder: gu.Encoder, folder: Path) -> str:
    """Write an encoder into a folder; returns how `open_folder` loads it, with {} in place of the folder."""
    name = encoder.origin.get("encoder", encoder.name)
    if encoder.model is None:
        return name
    if not encoder.has_text or encoder.origin.get("squash"):  # what an open_clip folder has no words for
        checkpoints.save_checkpoint(encoder, folder / "model.safetensors")
        return f"{name}@{{}}/model.safetensors"
    from open_clip.push_to_hf_hub import save_config_for_hf
    from open_clip.transformer import QuickGELU

    config = find_model_config(name)
    if any(isinstance(module, QuickGELU) for module in encoder.model.modules()):
        config = config | {"quick_gelu": True}
    save_config_for_hf(encoder.model, folder / "open_clip_config.json", config)
    checkpoints.save_weights(encoder.model, folder / "open_clip_model.safetensors")
    if hasattr(encoder.tokenizer, "save_pretrained"):
        encoder.tokenizer.save_pretrained(str(folder))
    if name in ("mini", "random"):
        shutil.copy(gu.DATA / "mini_clip" / "vocabulary.txt.gz", folder)
    return "open_clip:local-dir:{}"


def find_model_config(name: str) -> dict:
    """open_clip's description of an architecture, from its own list or beside the weights that it was loaded from."""
    import open_clip

    kind, _, rest = name.partition(":")
    if kind in ("mini", "random"):
        return text_files.read_json(gu.DATA / "mini_clip" / "open_clip_config.json")["model_cfg"]
    if rest.startswith("local-dir:"):
        return text_files.read_json(Path(rest.removeprefix("local-dir:")) / "open_clip_config.json")["model_cfg"]
    if rest.startswith("hf-hub:"):
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(rest.removeprefix("hf-hub:").partition("@")[0], "open_clip_config.json")
        return text_files.read_json(Path(path))["model_cfg"]
    return open_clip.get_model_config(rest.partition("/")[0])


def write_card(about: dict, title: str) -> str:
    """A model card: what it is, what it was made from, what it scores. Its first column says which search a line is about."""
    columns = list(dict.fromkeys(key for row in about["table"] for key in row)) or ["nothing was measured"]
    rows = "".join(f"| {' | '.join(str(row.get(key, '')) for key in columns)} |\n" for row in about["table"])
    hub = about["encoder"].startswith("open_clip:local-dir")
    bias = (
        f"A hub bias for texts, alpha {about['alpha']} and k {about['k']}, is in the index." if about["alpha"] else ""
    )
    return f"""---
library_name: {"open_clip" if hub else "gpnns"}
license: {about["licence"].lower()}
tags: [image-retrieval]
---
# {title}

A search in {len(about["names"]):,} images with the encoder {about["base"]}. Steps of tuning that were kept: {", ".join(about["kept"]) or "none"}.
It learned from {about["images"]}. Licence of the base weights: {about["licence"]}. {bias}

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{rows}
```python
import gpnns_utils as gu
from gpnns import building

home = building.open_folder("path/to/this/folder")
print(building.find(home, ["a text"], 5), building.find(home, gu.load_images("path/to/photos"), 5))
```
"""


def write_program(folder: Path, parts: Parts) -> str:
    """The lines that open a folder in a new process and ask it: with an image of the source, and with a text where its encoder
    reads texts."""
    lines = [
        "import gpnns_utils as gu",
        "from gpnns import building",
        f"home = building.open_folder({os.path.relpath(folder, gu.work_folder())!r})",
    ]
    texts = image_set.text_queries(parts.everything)[0] or parts.everything.names or ["a photo"]
    if open_folder(folder)["encoder"].has_text:
        lines.append(f"print(building.find(home, [{min(texts, key=len)!r}], 3))")
    lines.append(f"photo = gu.load_images({parts.source!r}).subset([0])")
    return "\n".join([*lines, "print(building.find(home, photo, 3))"])


def open_folder(folder: str | Path) -> dict:
    """A search that `take_home` wrote: {"encoder", "index", "names", "captions", and what the card holds}."""
    folder = Path(folder).expanduser()
    if not (folder / "search.json").exists():
        raise FileNotFoundError(f"{folder} holds no search.json: give the folder that notebook 08 took home")
    about = text_files.read_json(folder / "search.json")
    index, encoder = gu.get_faiss().read_index(str(folder / "index.faiss")), about["encoder"].replace("{}", str(folder))
    if index.ntotal > len(about["names"]):  # `add` was stopped between its two files: what has no name yet is not there
        index.remove_ids(np.arange(len(about["names"]), index.ntotal))
    return about | {"encoder": gu.load_encoder(encoder), "index": index}


def find(home: dict, queries: Sequence[str] | gu.ImageSet, k: int = 10) -> list[list[str]]:
    """The names of the k nearest images of each query, texts or images, in a search of `open_folder`."""
    return [[home["names"][row] for row in rows] for rows in find_rows(home, queries, k)[1]]


def find_rows(home: dict, queries: Sequence[str] | gu.ImageSet, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """As `find`: (scores, rows of the index). The bias is for texts, so the last number of an image is 0 instead of -1."""
    by_image = isinstance(queries, gu.ImageSet)
    vectors = gu.embed_images(home["encoder"], queries)[0] if by_image else gu.embed_texts(home["encoder"], queries)
    return home["index"].search(np.pad(vectors, ((0, 0), (0, 1)), constant_values=0 if by_image else -1), k)


def add(folder: str | Path, images: gu.ImageSet) -> int:
    """Put further images into a search that `take_home` wrote, and return how many; those whose names are in it already stay
    as they are. Stopped at any point, the folder holds what it held before, or all of it, and the call can be repeated."""
    folder, home = Path(folder).expanduser(), open_folder(folder)
    known = set(home["names"])
    new = images.subset([images.describe(row) not in known for row in range(len(images))])
    if len(new) == 0:
        return 0
    vectors, new = gu.embed_images(home["encoder"], new)
    alpha = home["alpha"]
    bias = gu.hub_bias(vectors, np.load(folder / "references.npy"), home["k"], alpha) if alpha else None
    home["index"].add(gu.with_bias(vectors, bias))
    about = text_files.read_json(folder / "search.json")
    if about["captions"] is not None:
        about["captions"] += new.captions or [[]] * len(new)
    about["names"] += [new.describe(row) for row in range(len(new))]
    gu.get_faiss().write_index(home["index"], str(folder / "index.partial"))
    (folder / "index.partial").replace(folder / "index.faiss")
    text = json.dumps(about, default=gu.to_json, indent=1).encode()
    gu.write_atomically(folder / "search.json", lambda file: file.write(text))
    return len(new)


# --- a page to send --------------------------------------------------------------------------------------------------


def write_page(path: Path, title: str, queries: Sequence, gallery: gu.ImageSet, answers: dict[str, tuple]) -> Path:
    """A static page that holds its thumbnails itself: for each query one line of neighbours for each of `answers`.

    queries: images, or texts. answers: {name: (rows (q, k), right (q, k) with NaN for unknown)}.
    """
    blocks = []
    for number, query in enumerate(queries):
        asked = (
            f"<p>{html.escape(query)}</p>"
            if isinstance(query, str)
            else f"<img src='{to_data_url(query)}' alt='query'>"
        )
        lines = "".join(
            f"<tr><th>{html.escape(name)}</th><td>"
            + "".join(make_thumbnail(gallery, row, good) for row, good in zip(rows[number], right[number], strict=True))
            + "</td></tr>"
            for name, (rows, right) in answers.items()
        )
        blocks.append(f"<section><div class='query'>{asked}</div><table>{lines}</table></section>")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5rem; }} section {{ display: flex; gap: 1rem; border-top: 1px solid #ccc; padding: .6rem 0; }}
.query {{ width: 120px; }} .query img {{ width: 96px; outline: 3px solid #888; }} th {{ text-align: right; font-weight: normal; padding-right: .5rem; }}
td img {{ width: 68px; height: 68px; object-fit: cover; margin: 3px; border: 3px solid transparent; }}
td img.right {{ border-color: {gu.RIGHT}; }} td img.wrong {{ border-color: {gu.WRONG}; border-style: dashed; }}
</style></head><body><h1>{html.escape(title)}</h1>{"".join(blocks)}</body></html>
"""
    gu.write_atomically(path, lambda file: file.write(page.encode()))
    return path


def make_thumbnail(gallery: gu.ImageSet, row: int, good: float) -> str:
    mark = "" if np.isnan(good) else "right" if good else "wrong"
    name = html.escape(gallery.describe(row), quote=True)
    return f"<img class='{mark}' src='{to_data_url(gallery[row])}' title='{name}' alt='{mark} {name}'>"


def to_data_url(image: Image.Image) -> str:
    """An image as a small JPEG inside of an address."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((136, 136))
    small.save(buffer, format="jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
