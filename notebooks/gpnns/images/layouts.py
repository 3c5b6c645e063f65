"""How each data set's authors arrange it: one reader for each layout.

A layout that no reader understands yet is one more function in READERS, named by `layout` in data/datasets.toml.
A reader adds to `rows` and returns `names`. A row: path, split, and what is known of label, group, captions, crop (left,
top, right, bottom; a right or bottom below 1 counts from the other edge). Either names is None and labels are readable
texts, or names lists all classes and labels are their numbers or names. Rows of other splits may be among them: splits
that share their classes number them together, and what another split lists is not called unknown.
"""

from __future__ import annotations

import csv
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpnns.images import own_images, text_files, walking


def check_listed(rows: list[dict], split: str, entry: dict) -> None:
    """Look whether the files below the folder of the split's images are those that lists name.

    ValueError when listed images are missing; a warning for files that are in no list, but for `unlisted` of the entry.
    """
    wanted = [row for row in rows if row["split"] == split]
    top = find_common_folder(wanted)
    found = {str(path) for path in walking.list_images_below(top)}
    if missing := [path for row in wanted if (path := str(row["path"])) not in found]:
        count = f"expected {len(wanted):,} images and found {len(wanted) - len(missing):,} below {top}"
        raise ValueError(f"{entry['title']}, {split}: {count}; {missing[0]} is missing. Unpack its archive again")
    unlisted, expected = found - {str(row["path"]) for row in rows}, entry.get("unlisted", 0)
    if expected != "any" and len(unlisted) != expected:
        example = f", for example {min(unlisted)}" if unlisted else ""
        count = f"expected {expected:,} images below {top} that are in none of its lists, and found {len(unlisted):,}"
        warnings.warn(f"{entry['title']}: {count}{example}; they are left out", stacklevel=6)


def read_layout(folder: Path, split: str, entry: dict) -> tuple[list[dict], list[str] | None]:
    """Rows and names of a data set, as its reader understands its folder; what lists name is there (`check_listed`).

    entry: what the table of datasets.py says. ValueError without images of the split, or when some are missing.
    """
    rows, entry, reader = [], dict(entry), READERS[entry["layout"]]
    names = reader(rows, folder, split, entry)
    if not any(row["split"] == split for row in rows):
        raise ValueError(f"{entry['title']}, {split}: no images below {folder}; look at the layout in data/README.md")
    if reader in LISTS:  # of the others, what is there is all there is
        check_listed(rows, split, entry)
    return rows, names


def find_common_folder(rows: list[dict]) -> Path:
    """The deepest folder that holds the images of all rows."""
    return Path(os.path.commonpath({os.path.dirname(row["path"]) for row in rows}))


TRUTH = ("easy", "hard", "junk")


def read_lines(path: Path) -> list[list[str]]:
    """The lines of a text file, split at spaces."""
    return [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def read_csv(path: Path) -> Iterator[dict]:
    """The lines of a .csv file as dicts, one at a time: some have millions."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def read_mat(path: Path) -> dict:
    """A MATLAB file as plain dicts and arrays. scipy comes with scikit-learn; only these files need it."""
    from scipy.io import loadmat

    try:
        return loadmat(path, simplify_cells=True)
    except Exception as error:  # loadmat raises whatever the broken bytes lead to
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); get it again") from error


def find_first(folder: Path, *paths: str) -> Path:
    """The first of several relative paths that exists, else the first: the message for a missing file then names it."""
    return next((folder / path for path in paths if (folder / path).exists()), folder / paths[0])


def find_class_number(name: str) -> int | None:
    """The number that a name begins with, as in 12_name.jpg, or None."""
    number = name.split("_")[0]
    return int(number) if number.isdigit() else None


def list_by_folder(top: Path, split: str, entry: dict, find_label: Callable, like: str) -> list[dict]:
    """The images of a folder for each class. ValueError for a folder of whose name `find_label` makes None."""
    rows = []
    for sub in walking.list_subfolders(top):
        if (label := find_label(sub.name)) is None:
            raise ValueError(f"{entry['title']}: {sub} is not named like {like}")
        rows += [{"path": path, "split": split, "label": label} for path in walking.list_images(sub)]
    return rows


def read_gpr1200(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """GPR1200: `images/CLASS_name.jpg`; 200 classes for each of six domains, in this order."""
    domains = ("landmarks", "nature", "sketches", "objects", "products", "faces")
    classes, texts = entry["splits"][split][1], folder / "categoryNumber_to_text.json"
    texts = text_files.read_json(texts) if texts.exists() else {}
    for path in walking.list_images(folder / "images"):
        number = find_class_number(path.name)
        if number is None or number >= classes:
            raise ValueError(f"{entry['title']}: {path} does not begin with a class number, as in 12_name.jpg")
        rows.append({"path": path, "split": split, "label": number, "group": domains[number * len(domains) // classes]})
    rows.sort(key=lambda row: (row["label"], row["path"].name))  # numbers, not texts: 2 comes before 10
    return [str(texts.get(str(i), f"class {i}")) for i in range(classes)]


def read_instre(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """INSTRE: `INSTRE-S1/01a_canada_book/001.jpg`; every folder is a class, as GP-NNS measures it."""
    parts = [folder / part for part in ("INSTRE-S1", "INSTRE-S2", "INSTRE-M")]
    paths = [path for part in parts for path in walking.list_images_below(part)]
    rows += [{"path": p, "split": split, "label": p.parent.relative_to(folder).as_posix()} for p in paths]


def read_revisited(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """Revisited Oxford and Paris: the images of one list, in its order; queries are cut to their box."""
    truth = read_ground_truth(folder, entry)
    top = folder / "jpg" if (folder / "jpg").is_dir() else folder
    paths = {path.stem: path for path in walking.list_images_below(top)}
    for kind, stems in (("query", truth["qimlist"]), ("query_full", truth["qimlist"]), ("gallery", truth["imlist"])):
        for i, stem in enumerate(stems):
            row = {"path": paths.get(str(stem), top / f"{stem}.jpg"), "split": kind}
            if kind == "query":
                row["crop"] = np.rint(np.ravel(truth["gnd"][i]["bbx"])).astype(np.int64)
            rows.append(row)


def read_ground_truth(folder: Path, entry: dict) -> dict:
    """imlist, qimlist and gnd (per query: easy, hard, junk as rows from 0, and bbx) from the .pkl, else the .mat file."""
    path = folder / f"{entry['ground_truth']}.pkl"
    if path.exists():
        try:
            with open(path, "rb") as file:
                return PlainPickle(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError, IndexError) as error:
            raise ValueError(f"{path} is damaged ({error}); get it again") from error
    truth = read_mat(path.with_suffix(".mat"))
    truth = {key: np.atleast_1d(truth[key]) for key in ("imlist", "qimlist", "gnd")}
    for one in truth["gnd"]:
        for key in TRUTH:
            one[key] = np.atleast_1d(one[key]).astype(np.int64) - 1  # MATLAB counts from 1
    return truth


class PlainPickle(pickle.Unpickler):
    """Reads lists, dicts, texts, numbers and numpy arrays; a pickle that asks for more could run code, and is refused."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("numpy._core", "numpy.core")
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
            ("__builtin__", "bytes"): bytes,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no ground truth needs")
        return known[module, name]


def read_cub(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """CUB-200-2011: numbered lists of images, classes, and the class of each image."""
    names, classes = (dict(read_lines(folder / name)) for name in ("classes.txt", "image_class_labels.txt"))
    for number, path in read_lines(folder / "images.txt"):
        kind = "train" if int(classes[number]) <= entry["train_classes"] else "test"
        label = names[classes[number]].split(".", 1)[-1].replace("_", " ")
        rows.append({"path": folder / "images" / path, "split": kind, "label": label})


def read_cars(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """Cars196: `car_ims/` with one list; `cars_train/` and `cars_test/` (on Kaggle each in another of that name) with one
    list each; or `car_data/`, classes as folders, as pytorch-metric-learning has it."""
    if (folder / "car_ims").is_dir():
        content = read_mat(folder / "cars_annos.mat")
        cars, names = np.atleast_1d(content["annotations"]), content["class_names"]
        images = [(folder / str(car["relative_im_path"]), car["class"]) for car in cars]
    elif (folder / "names.csv").exists():
        names = [name.strip() for name in text_files.read_text_lines(folder / "names.csv")]
        images = [image for part in ("train", "test") for image in list_cars_by_class(folder, part)]
    else:
        devkit, wanted = find_first(folder, "devkit", "car_devkit/devkit"), "cars_test_annos_withlabels.mat"
        tests = [path for place in (folder, devkit) for path in sorted(place.glob(f"{wanted[:-4]}*.mat"))]
        if not tests:
            why = "many copies lack it, and cars_test_annos.mat has no classes. Get it, and put it into either"
            raise ValueError(f"{entry['title']}: {wanted} is in neither {folder} nor {devkit}; {why}")
        images, names = [], read_mat(devkit / "cars_meta.mat")["class_names"]
        for part, path in (("cars_train", devkit / "cars_train_annos.mat"), ("cars_test", tests[0])):
            top = find_first(folder, f"{part}/{part}", part)
            images += [(top / str(car["fname"]), car["class"]) for car in np.atleast_1d(read_mat(path)["annotations"])]
    for path, number in images:
        kind = "train" if int(number) <= entry["train_classes"] else "test"
        rows.append({"path": path, "split": kind, "label": str(names[int(number) - 1])})


def list_cars_by_class(folder: Path, part: str) -> list[tuple[Path, str]]:
    """(image, class number) of anno_train.csv or anno_test.csv, whose lines are: file, four edges of a box, class."""
    top = find_first(folder, f"car_data/car_data/{part}", f"car_data/{part}")
    paths = {path.name: path for path in walking.list_images_below(top)}
    lines = filter(None, map(str.strip, text_files.read_text_lines(folder / f"anno_{part}.csv")))
    return [(paths.get(file, top / file), number) for file, *_, number in (line.split(",") for line in lines)]


def read_sop(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt with image, class, kind of product and path."""
    for kind in ("train", "test"):
        for _, number, _, path in read_lines(folder / f"Ebay_{kind}.txt")[1:]:
            label = f"{path.split('/')[0].removesuffix('_final').replace('_', ' ')} {int(number):05d}"
            rows.append({"path": folder / path, "split": kind, "label": label})


def read_adience(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """Adience: `faces/USER/coarse_tilt_aligned_face.PERSON.PHOTO.jpg`, or `aligned/`."""
    for path in walking.list_images_below(find_first(folder, "aligned", "faces")):
        parts = path.name.split(".")
        if len(parts) < 4:
            raise ValueError(f"{entry['title']}: {path} names no person, as in landmark_aligned_face.12.photo.jpg")
        rows.append({"path": path, "split": split, "label": f"person {int(parts[-3]):05d}"})


def read_flowers(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """Flowers102: `jpg/image_00001.jpg`, the class of each image, and the image numbers of each split."""
    from torchvision.datasets import Flowers102  # its authors' files do not hold the names of the classes

    labels, parts = read_mat(folder / "imagelabels.mat")["labels"], read_mat(folder / "setid.mat")
    names = getattr(Flowers102, "classes", None) or [f"flower {i + 1}" for i in range(102)]
    for kind, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        for i in np.atleast_1d(parts[key]):
            path = folder / "jpg" / f"image_{i:05d}.jpg"
            rows.append({"path": path, "split": kind, "label": int(labels[i - 1]) - 1})
    return list(names)


def read_aircraft(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """FGVC Aircraft: `data/images/1234567.jpg` and a list of image and variant for each split."""
    top = folder / "data"
    names = [" ".join(words) for words in read_lines(top / "variants.txt")]
    for kind, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        for image, *variant in read_lines(top / f"images_variant_{part}.txt"):
            label = names.index(" ".join(variant))
            rows.append({"path": top / "images" / f"{image}.jpg", "split": kind, "label": label})
    return names


def load_imagenet_classes() -> tuple[dict[str, int], list[str]]:
    """WordNet id -> class number (0 to 999, in the order of the ids), and the name of each class for prompts."""
    import open_clip
    from timm.data import ImageNetInfo

    numbers = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return numbers, list(open_clip.IMAGENET_CLASSNAMES)


def read_imagenet(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """ImageNet and its variants: a folder per class, named by WordNet id (or class number, in V2); val also without."""
    numbers, names = load_imagenet_classes()
    top = folder / entry["folders"][split]
    known = numbers | {str(i): i for i in range(len(names))}  # "10" is class 10, not the third
    rows += list_by_folder(top, split, entry, known.get, "an ImageNet class (n01440764, or 0 to 999)")
    if not rows and (paths := walking.list_images(top)):
        of_image = read_validation_labels(folder, entry)
        if unknown := [path for path in paths if path.stem not in of_image]:
            raise ValueError(f"{entry['title']}: no label for {len(unknown):,} of {len(paths):,} images: {unknown[0]}")
        rows += [{"path": path, "split": split, "label": numbers[of_image[path.stem]]} for path in paths]
    rows.sort(key=lambda row: (row["label"], row["path"].name))
    return names


def read_validation_labels(folder: Path, entry: dict) -> dict[str, str]:
    """Image -> WordNet id for validation images in one flat folder, from Kaggle's table or the authors' devkit."""
    table = find_first(folder, "LOC_val_solution.csv", "../../../LOC_val_solution.csv")
    if table.exists():
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in read_csv(table)}
    devkit = folder / "ILSVRC2012_devkit_t12" / "data"
    wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in read_mat(devkit / "meta.mat")["synsets"]}
    ids = [int(number) for (number,) in read_lines(devkit / "ILSVRC2012_validation_ground_truth.txt")]
    return {f"ILSVRC2012_val_{i:08d}": wnid[number] for i, number in enumerate(ids, 1)}


def read_objectnet(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """ObjectNet: `images/air_freshener/1.png`; "test" keeps the classes that ImageNet has too. The border is cut off."""
    label_file = "mappings/folder_to_objectnet_label.json"
    labels = text_files.read_json(folder / label_file)
    both = text_files.read_json(folder / "mappings" / "objectnet_to_imagenet_1k.json")
    found = list_by_folder(folder / "images", split, entry, labels.get, f"one in {label_file}")
    rows += [row | {"crop": entry["crop"]} for row in found if split == "all" or row["label"] in both]


def read_karpathy(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """COCO and Flickr30k: Karpathy's list of images, each with its split and captions, of which the first five count; or
    the lists of one split each that CLIP_benchmark makes of it."""
    own_list = folder / entry["list_of_split"].format({"validation": "val"}.get(split, split))
    whole = find_first(folder, entry["list"], f"caption_datasets/{entry['list']}")
    top = find_first(folder, *entry["folders"], ".")
    if not whole.exists() and own_list.exists():
        rows += read_clip_benchmark_list(own_list, split, top)
        entry["unlisted"] = "any"  # what the lists of other splits name is not known
        return None
    kinds = {part: kind for kind, parts in entry["parts"].items() for part in parts}
    for image in text_files.read_json(whole)["images"]:
        captions = [" ".join(sentence["raw"].split()) for sentence in image["sentences"][:5]]
        path = top / image.get("filepath", "") / image["filename"]
        rows.append({"path": path, "split": kinds[image["split"]], "captions": captions})


def read_clip_benchmark_list(path: Path, split: str, top: Path) -> list[dict]:
    """Images and captions of coco_test_karpathy.json (in COCO's own form) or of flickr30k_test_karpathy.txt (a line for
    each caption: image,caption)."""
    captions: dict[str, list[str]] = {}
    if path.suffix == ".json":
        content = text_files.read_json(path)
        names = {one["id"]: one["file_name"] for one in content["images"]}
        names = {key: f"{'val' if 'val2014' in name else 'train'}2014/{name}" for key, name in names.items()}
        told = [(names[one["image_id"]], one["caption"]) for one in content["annotations"]]
    else:
        lines = [line.partition(",") for line in list(text_files.read_text_lines(path))[1:] if line.strip()]
        told = [(name.strip(), own_images.unquote(caption.strip())) for name, _, caption in lines]
    for name, caption in told:
        captions.setdefault(name, []).append(" ".join(caption.split()))
    return [{"path": top / name, "split": split, "captions": texts[:5]} for name, texts in captions.items()]


def read_gldv2(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """Google Landmarks v2: `train/a/b/c/abc....jpg`, one .csv for each split. Queries without a landmark are left out."""
    top = folder / {"query": "test", "gallery": "index"}.get(split, "train")
    names, relevant = None, {}
    if split in ("query", "gallery"):  # both number all landmarks of the index
        landmark = {line["id"]: line["landmark_id"] for line in read_csv(folder / "index_image_to_landmark.csv")}
        names = [f"landmark {number:06d}" for number in sorted({int(number) for number in landmark.values()})]
        listed = list(landmark.items())
    if split == "query":
        for line in read_csv(folder / "retrieval_solution_v2.1.csv"):
            if line["Usage"] != "Ignored" and line["images"] not in ("", "None"):
                relevant[line["id"]] = line["images"].split()
        listed = [(image, landmark[found[0]]) for image, found in relevant.items()]
    elif split == "train" and (folder / "train_clean.csv").exists():
        lines = read_csv(folder / "train_clean.csv")
        listed = [(image, line["landmark_id"]) for line in lines for image in line["images"].split()]
    elif names is None:  # on Kaggle train.csv is the clean list already
        listed = [(line["id"], line["landmark_id"]) for line in read_csv(folder / "train.csv")]
    paths = {path.stem: path for path in walking.list_images_below(top)}
    for image, number in listed:
        path = paths.get(image, top / image[0] / image[1] / image[2] / f"{image}.jpg")
        row = {"path": path, "split": split, "label": f"landmark {int(number):06d}"}
        rows.append(row | {"relevant": relevant.get(image, [])})
    return names


def read_products10k(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """Products-10K: `train/1.jpg` and `test/1.jpg`, with a .csv of image and class for each."""
    for kind, table in (("train", "train.csv"), ("test", "test_kaggletest.csv")):
        for line in read_csv(folder / table):
            label = f"product {int(line['class']):05d}"
            rows.append({"path": folder / kind / line["name"], "split": kind, "label": label})


def read_inaturalist2021(rows: list[dict], folder: Path, split: str, entry: dict) -> list[str] | None:
    """iNaturalist 2021: a folder per species, `train/00000_Animalia_..._Genus_species/`; its number is the class."""
    top, like = folder / entry["folders"][split], "a species (00000_Animalia_..._Genus_species)"
    rows += list_by_folder(top, split, entry, find_class_number, like)
    names = {row["label"]: " ".join(row["path"].parent.name.split("_")[-2:]) for row in rows}
    return [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]


FOLDERS = (read_gpr1200, read_instre, read_adience, read_imagenet, read_objectnet, read_inaturalist2021)
LISTS = (
    read_revisited, read_cub, read_cars, read_sop, read_flowers, read_aircraft, read_karpathy, read_gldv2, read_products10k,
)  # fmt: skip
READERS = {reader.__name__.removeprefix("read_"): reader for reader in (*FOLDERS, *LISTS)}
