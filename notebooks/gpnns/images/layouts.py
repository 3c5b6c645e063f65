"""How each data set's authors arrange it: one reader for each layout.

A layout that no reader understands yet is one more function in READERS, named by `layout` in data/datasets.toml.
read_*(folder, split, entry) -> (rows, names). A row: path, split, and what is known of label, group, captions, crop
(left, top, right, bottom; a right or bottom below 1 counts from the other edge). Either names is None and labels are
readable texts, or labels are numbers and names lists all classes.
"""

from __future__ import annotations

import csv
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpnns.images import own_images, text_files, walking


def check_listed(rows: list[dict], split: str, entry: dict) -> None:
    """Compare a data set's lists with its files. ValueError when listed images are missing, a warning for others.

    rows: of every split whose images lie together, so that an image of another split is not called unknown.
    """
    top = find_common_folder(rows)
    found = {str(path) for path in walking.list_images_below(top)}
    wanted = [str(row["path"]) for row in rows if row["split"] == split]
    if missing := [path for path in wanted if path not in found]:
        raise ValueError(
            f"{entry['title']}, {split}: expected {len(wanted):,} images and found {len(wanted) - len(missing):,} below {top}; "
            f"{missing[0]} is missing. Unpack its archive again"
        )
    unlisted, expected = found - {str(row["path"]) for row in rows}, entry.get("unlisted", 0)
    if expected != "any" and len(unlisted) != expected:
        example = f", for example {min(unlisted)}" if unlisted else ""
        warnings.warn(
            f"{entry['title']}: expected {expected:,} images below {top} that are in none of its lists, and found "
            f"{len(unlisted):,}{example}; they are left out",
            stacklevel=6,
        )


def find_common_folder(rows: list[dict]) -> Path:
    """The deepest folder that holds the images of all rows."""
    return Path(os.path.commonpath({os.path.dirname(row["path"]) for row in rows}))


TRUTH = ("easy", "hard", "junk")


# --- layouts ---------------------------------------------------------------------------------------------------------
# read_*(folder, split, entry) -> (rows, names). A row: path, split, and what is known of label, group, captions, crop
# (left, top, right, bottom; a right or bottom below 1 counts from the other edge). Either names is None and labels are
# readable texts, or labels are numbers and names lists all classes.


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


def read_gpr1200(folder: Path, split: str, entry: dict):
    """GPR1200: `images/CLASS_name.jpg`; 200 classes for each of six domains, in this order."""
    domains = ("landmarks", "nature", "sketches", "objects", "products", "faces")
    per_domain = entry["splits"][split][1] // len(domains)
    texts = folder / "categoryNumber_to_text.json"
    texts = text_files.read_json(texts) if texts.exists() else {}
    rows = []
    for path in walking.list_images(folder / "images"):
        number = path.name.split("_")[0]
        if not number.isdigit() or int(number) >= per_domain * len(domains):
            raise ValueError(f"{entry['title']}: {path} does not begin with a class number, as in 12_name.jpg")
        rows.append({"path": path, "split": split, "label": int(number), "group": domains[int(number) // per_domain]})
    rows.sort(key=lambda row: (row["label"], row["path"].name))  # numbers, not texts: 2 comes before 10
    return rows, [str(texts.get(str(i), f"class {i}")) for i in range(per_domain * len(domains))]


def read_instre(folder: Path, split: str, entry: dict):
    """INSTRE: `INSTRE-S1/01a_canada_book/001.jpg`; every folder is a class, as GP-NNS measures it."""
    paths = [
        path for part in ("INSTRE-S1", "INSTRE-S2", "INSTRE-M") for path in walking.list_images_below(folder / part)
    ]
    return [{"path": p, "split": split, "label": p.parent.relative_to(folder).as_posix()} for p in paths], None


def read_revisited_pixels(folder: Path, split: str, entry: dict):
    """Revisited Oxford and Paris: the images of one list, in its order; queries are cut to their box."""
    truth = read_revisited(folder, entry)
    top = folder / "jpg" if (folder / "jpg").is_dir() else folder
    paths = {path.stem: path for path in walking.list_images_below(top)}
    rows = []
    for kind, stems in (("query", truth["qimlist"]), ("query_full", truth["qimlist"]), ("gallery", truth["imlist"])):
        for i, stem in enumerate(stems):
            row = {"path": paths.get(str(stem), top / f"{stem}.jpg"), "split": kind}
            if kind == "query":
                row["crop"] = np.rint(np.ravel(truth["gnd"][i]["bbx"])).astype(np.int64)
            rows.append(row)
    check_listed(rows, split, entry)
    return [row for row in rows if row["split"] == split], None


def read_revisited(folder: Path, entry: dict) -> dict:
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

    def find_class(self, module: str, name: str):
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


def read_cub(folder: Path, split: str, entry: dict):
    """CUB-200-2011: numbered lists of images, classes, and the class of each image."""
    names = dict(read_lines(folder / "classes.txt"))
    classes = dict(read_lines(folder / "image_class_labels.txt"))
    rows = []
    for number, path in read_lines(folder / "images.txt"):
        rows.append(
            {
                "path": folder / "images" / path,
                "split": "train" if int(classes[number]) <= entry["train_classes"] else "test",
                "label": names[classes[number]].split(".", 1)[-1].replace("_", " "),
            }
        )
    check_listed(rows, split, entry)
    return rows, None


def read_cars(folder: Path, split: str, entry: dict):
    """Cars196: `car_ims/` with one list; `cars_train/` and `cars_test/` (on Kaggle each in another of that name) with one
    list each; or `car_data/`, classes as folders, as pytorch-metric-learning has it."""
    if (folder / "car_ims").is_dir():
        content = read_mat(folder / "cars_annos.mat")
        images = [
            (folder / str(row["relative_im_path"]), row["class"]) for row in np.atleast_1d(content["annotations"])
        ]
        names = content["class_names"]
    elif (folder / "names.csv").exists():
        names = [name.strip() for name in text_files.read_text_lines(folder / "names.csv")]
        images = [image for part in ("train", "test") for image in list_cars_by_class(folder, part)]
    else:
        devkit = find_first(folder, "devkit", "car_devkit/devkit")
        tests = [path for place in (folder, devkit) for path in sorted(place.glob("cars_test_annos_withlabels*.mat"))]
        if not tests:
            raise ValueError(
                f"{entry['title']}: cars_test_annos_withlabels.mat is in neither {folder} nor {devkit}; many copies lack it, "
                "and cars_test_annos.mat has no classes. Get it, and put it into either"
            )
        images = []
        for part, path in (("cars_train", devkit / "cars_train_annos.mat"), ("cars_test", tests[0])):
            top = find_first(folder, f"{part}/{part}", part)
            images += [(top / str(row["fname"]), row["class"]) for row in np.atleast_1d(read_mat(path)["annotations"])]
        names = read_mat(devkit / "cars_meta.mat")["class_names"]
    rows = []
    for path, number in images:
        kind = "train" if int(number) <= entry["train_classes"] else "test"
        rows.append({"path": path, "split": kind, "label": str(names[int(number) - 1])})
    check_listed(rows, split, entry)
    return rows, None


def list_cars_by_class(folder: Path, part: str) -> list[tuple[Path, str]]:
    """(image, class number) of anno_train.csv or anno_test.csv, whose lines are: file, four edges of a box, class."""
    top = find_first(folder, f"car_data/car_data/{part}", f"car_data/{part}")
    paths = {path.name: path for path in walking.list_images_below(top)}
    lines = [
        line.strip().split(",") for line in text_files.read_text_lines(folder / f"anno_{part}.csv") if line.strip()
    ]
    return [(paths.get(cells[0], top / cells[0]), cells[5]) for cells in lines]


def read_sop(folder: Path, split: str, entry: dict):
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt with image, class, kind of product and path."""
    rows = []
    for kind in ("train", "test"):
        for _, number, _, path in read_lines(folder / f"Ebay_{kind}.txt")[1:]:
            label = f"{path.split('/')[0].removesuffix('_final').replace('_', ' ')} {int(number):05d}"
            rows.append({"path": folder / path, "split": kind, "label": label})
    check_listed(rows, split, entry)
    return rows, None


def read_adience(folder: Path, split: str, entry: dict):
    """Adience: `faces/USER/coarse_tilt_aligned_face.PERSON.PHOTO.jpg`, or `aligned/`."""
    rows = []
    for path in walking.list_images_below(find_first(folder, "aligned", "faces")):
        parts = path.name.split(".")
        if len(parts) < 4:
            raise ValueError(f"{entry['title']}: {path} names no person, as in landmark_aligned_face.12.photo.jpg")
        rows.append({"path": path, "split": split, "label": f"person {int(parts[-3]):05d}"})
    return rows, None


def read_flowers(folder: Path, split: str, entry: dict):
    """Flowers102: `jpg/image_00001.jpg`, the class of each image, and the image numbers of each split."""
    from torchvision.datasets import Flowers102  # its authors' files do not hold the names of the classes

    labels, parts = read_mat(folder / "imagelabels.mat")["labels"], read_mat(folder / "setid.mat")
    names = getattr(Flowers102, "classes", None) or [f"flower {i + 1}" for i in range(102)]
    rows = []
    for kind, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        for i in np.atleast_1d(parts[key]):
            path = folder / "jpg" / f"image_{i:05d}.jpg"
            rows.append({"path": path, "split": kind, "label": int(labels[i - 1]) - 1})
    check_listed(rows, split, entry)
    return rows, list(names)


def read_aircraft(folder: Path, split: str, entry: dict):
    """FGVC Aircraft: `data/images/1234567.jpg` and a list of image and variant for each split."""
    names = [line.strip() for line in (folder / "data" / "variants.txt").read_text().splitlines() if line.strip()]
    rows = []
    for kind, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        for image, *variant in read_lines(folder / "data" / f"images_variant_{part}.txt"):
            path = folder / "data" / "images" / f"{image}.jpg"
            rows.append({"path": path, "split": kind, "label": names.index(" ".join(variant))})
    check_listed(rows, split, entry)
    return rows, names


def load_imagenet_classes() -> tuple[dict[str, int], list[str]]:
    """WordNet id -> class number (0 to 999, in the order of the ids), and the name of each class for prompts."""
    import open_clip
    from timm.data import ImageNetInfo

    numbers = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return numbers, list(open_clip.IMAGENET_CLASSNAMES)


def read_imagenet(folder: Path, split: str, entry: dict):
    """ImageNet and its variants: a folder per class, named by WordNet id (or class number, in V2); val also without."""
    numbers, names = load_imagenet_classes()
    top = folder / entry["folders"][split]
    rows = []
    for sub in walking.list_subfolders(top):
        number = numbers.get(sub.name, int(sub.name) if sub.name.isdigit() else -1)  # "10" is class 10, not the third
        if not 0 <= number < len(names):
            raise ValueError(f"{entry['title']}: {sub} is not named like an ImageNet class (n01440764, or 0 to 999)")
        rows += [{"path": path, "split": split, "label": number} for path in walking.list_images(sub)]
    if not rows and (paths := walking.list_images(top)):
        of_image = read_validation_labels(folder, entry)
        if unknown := [path for path in paths if path.stem not in of_image]:
            raise ValueError(f"{entry['title']}: no label for {len(unknown):,} of {len(paths):,} images: {unknown[0]}")
        rows = [{"path": path, "split": split, "label": numbers[of_image[path.stem]]} for path in paths]
    rows.sort(key=lambda row: (row["label"], row["path"].name))
    return rows, names


def read_validation_labels(folder: Path, entry: dict) -> dict[str, str]:
    """Image -> WordNet id for validation images in one flat folder, from Kaggle's table or the authors' devkit."""
    table = find_first(folder, "LOC_val_solution.csv", "../../../LOC_val_solution.csv")
    if table.exists():
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in read_csv(table)}
    devkit = folder / "ILSVRC2012_devkit_t12" / "data"
    wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in read_mat(devkit / "meta.mat")["synsets"]}
    ids = [int(number) for (number,) in read_lines(devkit / "ILSVRC2012_validation_ground_truth.txt")]
    return {f"ILSVRC2012_val_{i:08d}": wnid[number] for i, number in enumerate(ids, 1)}


def read_objectnet(folder: Path, split: str, entry: dict):
    """ObjectNet: `images/air_freshener/1.png`; "test" keeps the classes that ImageNet has too. The border is cut off."""
    labels = text_files.read_json(folder / "mappings" / "folder_to_objectnet_label.json")
    both = text_files.read_json(folder / "mappings" / "objectnet_to_imagenet_1k.json")
    rows = []
    for sub in walking.list_subfolders(folder / "images"):
        if sub.name not in labels:
            raise ValueError(f"{entry['title']}: {sub} is not in mappings/folder_to_objectnet_label.json")
        if split == "all" or labels[sub.name] in both:
            same = {"split": split, "label": labels[sub.name], "crop": entry["crop"]}
            rows += [{"path": path} | same for path in walking.list_images(sub)]
    return rows, None


def read_karpathy(folder: Path, split: str, entry: dict):
    """COCO and Flickr30k: Karpathy's list of images, each with its split and captions, of which the first five count; or
    the lists of one split each that CLIP_benchmark makes of it."""
    own_list = folder / entry["list_of_split"].format({"validation": "val"}.get(split, split))
    whole = find_first(folder, entry["list"], f"caption_datasets/{entry['list']}")
    if not whole.exists() and own_list.exists():
        rows = read_clip_benchmark_list(own_list, split, find_first(folder, *entry["folders"], "."))
        check_listed(rows, split, entry | {"unlisted": "any"})
        return rows, None
    content = text_files.read_json(whole)
    top = find_first(folder, *entry["folders"])
    kinds = {part: kind for kind, parts in entry["parts"].items() for part in parts}
    rows = []
    for image in content["images"]:
        captions = [" ".join(sentence["raw"].split()) for sentence in image["sentences"][:5]]
        path = top / image.get("filepath", "") / image["filename"]
        rows.append({"path": path, "split": kinds[image["split"]], "captions": captions})
    parents = {os.path.dirname(row["path"]) for row in rows if row["split"] == split}
    check_listed([row for row in rows if os.path.dirname(row["path"]) in parents], split, entry)
    return rows, None


def read_clip_benchmark_list(path: Path, split: str, top: Path) -> list[dict]:
    """Images and captions of coco_test_karpathy.json (in COCO's own form) or of flickr30k_test_karpathy.txt (a line for
    each caption: image,caption)."""
    captions: dict[str, list[str]] = {}
    if path.suffix == ".json":
        content = text_files.read_json(path)
        place = {
            one["id"]: f"{'val' if 'val2014' in one['file_name'] else 'train'}2014/{one['file_name']}"
            for one in content["images"]
        }
        told = [(place[one["image_id"]], one["caption"]) for one in content["annotations"]]
    else:
        lines = [line.partition(",") for line in list(text_files.read_text_lines(path))[1:] if line.strip()]
        told = [(name.strip(), own_images.unquote(caption.strip())) for name, _, caption in lines]
    for name, caption in told:
        captions.setdefault(name, []).append(" ".join(caption.split()))
    return [{"path": top / name, "split": split, "captions": texts[:5]} for name, texts in captions.items()]


def read_in_shop(folder: Path, split: str, entry: dict):
    """In-Shop: `img/WOMEN/Dresses/id_00000002/02_1_front.jpg` and one list of image, item and split; or `img_highres/`,
    the same pictures in large, as OML has them."""
    lines = read_lines(find_first(folder, "list_eval_partition.txt", "Eval/list_eval_partition.txt"))
    top = find_first(folder, "img", "Img/img", "img_highres", "Img/img_highres")
    rows = [{"path": top / path.removeprefix("img/"), "split": kind, "label": item} for path, item, kind in lines[2:]]
    if len(rows) != int(lines[0][0]):
        raise ValueError(
            f"{entry['title']}: the list says {int(lines[0][0]):,} images and has {len(rows):,}; get it again"
        )
    check_listed(rows, split, entry)
    return rows, None


def read_gldv2(folder: Path, split: str, entry: dict):
    """Google Landmarks v2: `train/a/b/c/abc....jpg`, one .csv for each split. Queries without a landmark are left out."""
    top = folder / {"query": "test", "gallery": "index"}.get(split, "train")
    paths = {path.stem: path for path in walking.list_images_below(top)}

    def row(image: str, landmark: str) -> dict:
        path = paths.get(image, top / image[0] / image[1] / image[2] / f"{image}.jpg")
        return {"path": path, "split": split, "label": f"landmark {int(landmark):06d}"}

    rows, names = [], None
    if split in ("query", "gallery"):  # both number all landmarks of the index
        landmark = {line["id"]: line["landmark_id"] for line in read_csv(folder / "index_image_to_landmark.csv")}
        names = [f"landmark {number:06d}" for number in sorted({int(number) for number in landmark.values()})]
    if split == "gallery":
        rows = [row(image, number) for image, number in landmark.items()]
    elif split == "query":
        for line in read_csv(folder / "retrieval_solution_v2.1.csv"):
            if line["Usage"] != "Ignored" and line["images"] not in ("", "None"):
                relevant = line["images"].split()
                rows.append(row(line["id"], landmark[relevant[0]]) | {"relevant": relevant})
    elif split == "train" and (folder / "train_clean.csv").exists():
        for line in read_csv(folder / "train_clean.csv"):
            rows += [row(image, line["landmark_id"]) for image in line["images"].split()]
    else:  # on Kaggle train.csv is the clean list already
        rows = [row(line["id"], line["landmark_id"]) for line in read_csv(folder / "train.csv")]
    check_listed(rows, split, entry)
    if names is not None:
        number = {name: i for i, name in enumerate(names)}
        rows = [one | {"label": number[one["label"]]} for one in rows]
    return rows, names


def read_products10k(folder: Path, split: str, entry: dict):
    """Products-10K: `train/1.jpg` and `test/1.jpg`, with a .csv of image and class for each."""
    rows = []
    for kind, table in (("train", "train.csv"), ("test", "test_kaggletest.csv")):
        for line in read_csv(folder / table):
            label = f"product {int(line['class']):05d}"
            rows.append({"path": folder / kind / line["name"], "split": kind, "label": label})
    check_listed([row for row in rows if row["split"] == split], split, entry)
    return rows, None


def read_inaturalist2018(folder: Path, split: str, entry: dict):
    """iNaturalist 2018: `train_val2018/Aves/1234/abc.jpg`, with a .json of images and annotations for each split."""
    rows, names = [], {}
    for kind, part in (("train", "train2018.json"), ("test", "val2018.json")):
        content = text_files.read_json(folder / part)
        names |= {category["id"]: str(category["name"]) for category in content["categories"]}
        classes = {one["image_id"]: one["category_id"] for one in content["annotations"]}
        for image in content["images"]:
            rows.append({"path": folder / image["file_name"], "split": kind, "label": classes[image["id"]]})
    check_listed(rows, split, entry)
    return rows, [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]


def read_inaturalist2021(folder: Path, split: str, entry: dict):
    """iNaturalist 2021: a folder per species, `train/00000_Animalia_..._Genus_species/`; its number is the class."""
    rows, names = [], {}
    for sub in walking.list_subfolders(folder / entry["folders"][split]):
        number, *taxonomy = sub.name.split("_")
        if not number.isdigit():
            raise ValueError(f"{entry['title']}: {sub} does not begin with the number of a species")
        names[int(number)] = " ".join(taxonomy[-2:])
        rows += [{"path": path, "split": split, "label": int(number)} for path in walking.list_images(sub)]
    return rows, [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]


def read_uned(folder: Path, split: str, entry: dict):
    """UnED: `info_files/DOMAIN/SPLIT.json` lists path and class; a domain without an index searches its test images."""
    rows = []
    for domain in entry["domains"]:
        lists = folder / "info_files" / domain
        files = {"train": "train.json", "validation": "val.json", "query": "test.json", "gallery": "index.json"}
        kinds = ("query", "gallery") if split in ("query", "gallery") else (split,)  # two that number classes together
        for kind in kinds:
            for image in text_files.read_json(find_first(lists, files[kind], "test.json")):
                classes = image["class_id"] if isinstance(image["class_id"], list) else [image["class_id"]]
                labels = [f"{domain} {int(number):06d}" for number in classes]
                row = {"path": find_uned_path(folder / "images", image["path"]), "split": kind, "group": domain}
                rows.append(row | {"label": labels[0], "labels": labels})
    wanted = [row for row in rows if row["split"] == split]
    check_listed(wanted, split, entry)
    return rows, None


def find_uned_path(top: Path, path: str) -> Path:
    """An image of UnED. RP2K has Chinese names, which some unzip programs write as #U4e00: both are found."""
    if path.isascii() or (top / path).exists():
        return top / path
    return top / "".join(letter if letter.isascii() else f"#U{ord(letter):04x}" for letter in path)


READERS = {
    "gpr1200": read_gpr1200,
    "instre": read_instre,
    "revisited": read_revisited_pixels,
    "cub": read_cub,
    "cars": read_cars,
    "sop": read_sop,
    "adience": read_adience,
    "flowers": read_flowers,
    "aircraft": read_aircraft,
    "imagenet": read_imagenet,
    "objectnet": read_objectnet,
    "karpathy": read_karpathy,
    "in_shop": read_in_shop,
    "gldv2": read_gldv2,
    "products10k": read_products10k,
    "inaturalist2018": read_inaturalist2018,
    "inaturalist2021": read_inaturalist2021,
    "uned": read_uned,
}
