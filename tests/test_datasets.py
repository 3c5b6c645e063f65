"""Data sets by name: each layout as its authors hand it out, counted on load, fetched and unpacked with care."""

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import types
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import gpnns_utils as gu
from gpnns import paper_tables
from gpnns.images import datasets, downloads, image_set, layouts


def picture(path, size=(8, 6), color=(90, 120, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, {".png": "png"}.get(path.suffix.lower(), "jpeg"))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder of data sets; nothing else is searched, and no request leaves this machine."""
    monkeypatch.setenv("GPNNS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GPNNS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.setattr(downloads, "PAUSE", 0)
    urlopen = downloads.urllib.request.urlopen

    def here_only(request, **settings):
        url = getattr(request, "full_url", request)
        if not url.startswith("http://127.0.0.1"):
            raise downloads.urllib.error.URLError("there is no network in this test")
        return urlopen(request, **settings)

    monkeypatch.setattr(downloads.urllib.request, "urlopen", here_only)
    return tmp_path / "data"


# --- each data set in small, as its authors lay it out: builder(folder) -> the counts of its splits ---


def make_gpr1200(folder):
    for number in (0, 1, 2, 3, 10, 11):
        for i in range(2):
            picture(folder / "images" / f"{number}_n0{i}_odd name.jpg")
    (folder / "images" / "desktop.ini").write_text("[x]")
    return {"test": [12, 12]}  # twelve classes, two a domain, of which six have pictures here


def make_instre(folder):
    for part, label in (("S1", "01a_canada_book"), ("S2", "01b_toy"), ("M", "01c_book_toy")):
        for i in (1, 2):
            picture(folder / "instre" / f"INSTRE-{part}" / label / f"00{i}.jpg")
            write(folder / "instre" / f"INSTRE-{part}" / label / f"00{i}.txt", "1 2 3 4")
    return {"test": [6, 3]}


TRUTH = {
    "imlist": ["all_souls_000001", "all_souls_000002", "bodleian_000003"],
    "qimlist": ["all_souls_000013", "bodleian_000051"],
    "gnd": [
        {"bbx": [1.2, 0.0, 5.0, 4.0], "easy": [1], "hard": [0], "junk": [2]},
        {"bbx": [0.0, 1.0, 8.0, 6.0], "easy": [], "hard": [2], "junk": []},
    ],
}


def make_roxford(folder):
    for stem in TRUTH["imlist"] + TRUTH["qimlist"]:
        picture(folder / "jpg" / f"{stem}.jpg")
    truth = TRUTH | {"gnd": [{key: np.array(value) for key, value in one.items()} for one in TRUTH["gnd"]]}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return {"query": [2], "query_full": [2], "gallery": [3]}


def make_rparis(folder):
    for i, stem in enumerate(TRUTH["imlist"] + TRUTH["qimlist"]):
        picture(folder / f"paris_{1 + i % 2}" / "paris" / stem.rsplit("_", 1)[0] / f"{stem}.jpg")
    for i in range(20):  # the pictures that its lists leave out
        picture(folder / "paris_2" / "paris" / "louvre" / f"paris_louvre_{i:06d}.jpg")
    (folder / "gnd_rparis6k.pkl").write_bytes(pickle.dumps(TRUTH, protocol=2))
    return {"query": [2], "query_full": [2], "gallery": [3]}


def make_cub(folder):
    top = folder / "CUB_200_2011"
    classes = {
        1: "001.Black_footed_Albatross",
        100: "100.Brown_Pelican",
        101: "101.White_Pelican",
        200: "200.Yellowthroat",
    }
    images = [(c, f"{name}/{name[4:]}_{i:04d}_7.jpg") for c, name in classes.items() for i in range(2)]
    for _, path in images:
        picture(top / "images" / path)
    write(top / "classes.txt", "".join(f"{c} {name}\n" for c, name in classes.items()))
    write(top / "images.txt", "".join(f"{i} {path}\n" for i, (_, path) in enumerate(images, 1)))
    write(top / "image_class_labels.txt", "".join(f"{i} {c}\n" for i, (c, _) in enumerate(images, 1)))
    return {"train": [4, 2], "test": [4, 2]}


CARS = np.array([f"Maker Model {c:03d} 2012" for c in range(1, 197)], dtype=object)


def car_list(key, classes, prefix=""):
    annotations = np.empty(len(classes), dtype=[(key, object), ("class", object)])
    for i, c in enumerate(classes):
        annotations[i] = (f"{prefix}{i + 1:06d}.jpg", c)
    return annotations


def make_cars(folder):
    classes = [1, 98, 99, 196, 196]
    for i in range(len(classes)):
        picture(folder / "car_ims" / f"{i + 1:06d}.jpg")
    annotations = car_list("relative_im_path", classes, "car_ims/")
    savemat(folder / "cars_annos.mat", {"annotations": annotations, "class_names": CARS})
    return {"train": [2, 2], "test": [3, 2]}


def make_sop(folder):
    top = folder / "Stanford_Online_Products"
    image = 0
    for kind, classes in (("train", ((1, "bicycle"), (2, "chair"))), ("test", ((11319, "bicycle"), (11320, "sofa")))):
        lines = ["image_id class_id super_class_id path"]
        for number, thing in classes:
            for i in range(2):
                image += 1
                lines.append(f"{image} {number} 1 {thing}_final/11{number}_{i}.JPG")
                picture(top / f"{thing}_final" / f"11{number}_{i}.JPG")
        write(top / f"Ebay_{kind}.txt", "\n".join(lines) + "\n")
    return {"train": [4, 2], "test": [4, 2]}


def make_adience(folder):
    for person, photo in ((2, "1_o"), (2, "2_o"), (10, "3_o")):
        picture(folder / "aligned" / "7153718@N04" / f"landmark_aligned_face.{person}.{photo}.jpg")
    return {"test": [3, 2]}


def make_flowers(folder):
    for i in range(1, 7):
        picture(folder / "jpg" / f"image_{i:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]])})
    savemat(
        folder / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[3]]), "tstid": np.array([[4, 5, 6]])}
    )
    return {"train": [2, 2], "validation": [1, 1], "test": [3, 2]}


def make_aircraft(folder):
    top = folder / "fgvc-aircraft-2013b" / "data"
    write(top / "variants.txt", "707-320\nBAE 146-200\n")
    for part, images in (("train", "12"), ("val", "3"), ("test", "456")):
        lines = [f"000000{i} {'707-320' if int(i) % 2 else 'BAE 146-200'}" for i in images]
        write(top / f"images_variant_{part}.txt", "\n".join(lines))
        for i in images:
            picture(top / "images" / f"000000{i}.jpg")
    return {"train": [2, 2], "validation": [1, 1], "test": [3, 2]}


def make_imagenet(folder):
    for part in ("train", "val"):
        for wnid in ("n01440764", "n01443537", "n15075141"):
            picture(folder / part / wnid / f"{wnid}_1.JPEG")
    return {"train": [3, 3], "test": [3, 3]}


def make_imagenet_v2(folder):
    for number in (0, 1, 2, 10, 999):
        for i in "ab":
            picture(folder / "imagenetv2-matched-frequency-format-val" / str(number) / f"{i}.jpeg")
    return {"test": [10, 5]}


def make_variant(top, wnids):
    def make(folder):
        for wnid in wnids:
            picture(folder / top / wnid / "0.jpg")
        write(folder / top / "README.txt", "about")
        return {"test": [len(wnids), len(wnids)]}

    return make


def make_objectnet(folder):
    top = folder / "objectnet-1.0"
    for thing in ("air_freshener", "bench", "chair"):
        for i in range(2):
            picture(top / "images" / thing / f"{i}.png", size=(12, 10), color=(255, 0, 0))
            inside = Image.new("RGB", (8, 6), (0, 0, 255))
            with Image.open(top / "images" / thing / f"{i}.png") as image:
                framed = image.convert("RGB")
            framed.paste(inside, (2, 2))
            framed.save(top / "images" / thing / f"{i}.png")
    maps = top / "mappings"
    write(
        maps / "folder_to_objectnet_label.json", {"air_freshener": "Air freshener", "bench": "Bench", "chair": "Chair"}
    )
    write(
        maps / "objectnet_to_imagenet_1k.json",
        {"Bench": "park bench", "Chair": "barber chair; folding chair; rocking chair, rocker"},
    )
    return {"test": [4, 2], "all": [6, 3]}


def make_captions(list_name, place, parts):
    def make(folder):
        images = []
        for i, (filepath, part) in enumerate(parts):
            name = f"{i:012d}.jpg"
            sentences = [{"raw": f"caption {j} of\n {i}"} for j in range(6 if i == 0 else 5)]
            images.append({"filename": name, "split": part, "sentences": sentences})
            if filepath:
                images[-1]["filepath"] = filepath
            picture(folder / place / filepath / name)
        write(folder / list_name, {"images": images, "dataset": "x"})
        kinds = [{"val": "validation", "restval": "train"}.get(part, part) for _, part in parts]
        return {kind: [kinds.count(kind)] for kind in ("train", "validation", "test")}

    return make


make_coco = make_captions(
    "caption_datasets/dataset_coco.json",
    ".",
    [("val2014", "test"), ("val2014", "test"), ("val2014", "val"), ("val2014", "restval"), ("train2014", "train")],
)


def make_flickr30k(folder):
    parts = [("", "test"), ("", "test"), ("", "val"), ("", "train")]
    counts = make_captions("dataset_flickr30k.json", "flickr30k-images", parts)(folder)
    for i in range(datasets.TABLE["flickr30k"]["unlisted"]):
        (folder / "flickr30k-images" / f"unlisted_{i}.jpg").touch()
    return counts


def make_gldv2(folder):
    for part, images in (("train", "000 001 002"), ("index", "cd0 cd1 cd2"), ("test", "ef0 ef1 ef2")):
        for image in images.split():
            picture(folder / part / image[0] / image[1] / image[2] / f"{image}.jpg")
    write(folder / "train_clean.csv", "landmark_id,images\n7,000 001\n")
    write(folder / "train.csv", "id,url,landmark_id\n000,http://x,7\n001,http://x,7\n002,http://x,9\n")
    write(folder / "index_image_to_landmark.csv", "id,landmark_id\ncd0,5\ncd1,12\ncd2,5\n")
    solution = "id,images,Usage\nef0,cd2 cd0,Public\nef1,None,Ignored\nef2,cd1,Private\n"
    write(folder / "retrieval_solution_v2.1.csv", solution)
    return {"train": [2, 1], "train_full": [3, 2], "query": [2, 2], "gallery": [3, 2]}


def make_products10k(folder):
    for part, images in (("train", "123"), ("test", "12")):
        for i in images:
            picture(folder / part / f"{i}.jpg")
    write(folder / "train.csv", "name,class,group\n1.jpg,2,0\n2.jpg,10,0\n3.jpg,0,1\n")
    write(folder / "test_kaggletest.csv", "name,class,Usage\n1.jpg,10,Public\n2.jpg,2,Private\n")
    return {"train": [3, 3], "test": [2, 2]}


def make_inaturalist2021(folder):
    for part in ("train", "train_mini", "val"):
        for number, species in ((0, "Lumbricidae_Lumbricus_terrestris"), (1, "Sabellidae_Sabella_spallanzanii")):
            picture(folder / part / f"{number:05d}_Animalia_Annelida_Clitellata_Haplotaxida_{species}" / "a-b.jpg")
    return {"train": [2, 2], "train_mini": [2, 2], "test": [2, 2]}


BUILDERS = {
    name[5:]: make for name, make in globals().items() if name.startswith("make_") and name[5:] in datasets.TABLE
}
BUILDERS |= {
    "imagenet_a": make_variant("imagenet-a", ["n01498041", "n02007558"]),
    "imagenet_r": make_variant("imagenet-r", ["n01443537", "n02007558"]),
    "imagenet_sketch": make_variant("sketch", ["n01440764", "n15075141"]),
}


def build(name, data, monkeypatch):
    """Write a data set in small and expect its counts."""
    splits = BUILDERS[name](data / name)
    if name == "gpr1200":
        for number in (4, 5, 6, 7, 8, 9):
            picture(data / name / "images" / f"{number}_x.jpg")
        splits = {"test": [18, 12]}
    monkeypatch.setitem(datasets.TABLE[name], "splits", splits)
    return splits


# --- what holds for all of them ---


FILE_FIELDS = {"name", "gives", "url", "size", "md5", "splits", "count", "nested"}


def test_every_data_set_of_the_table_has_a_fixture_here_a_home_a_layout_and_a_metric():
    assert set(BUILDERS) == set(datasets.TABLE)
    for name, entry in datasets.TABLE.items():
        assert entry["home"].startswith("http") and entry["layout"] in layouts.READERS and entry["metric"], name
        assert entry["splits"], name
        if isinstance(entry["marker"], dict):
            assert set(entry["marker"]) == set(entry["splits"]), name
        assert set(entry.get("same_classes", [])) <= set(entry["splits"]), name
        for split in entry["splits"]:
            for file in datasets.list_files_for(entry, split):
                assert not downloads.is_archive(file["gives"]) and set(file) <= FILE_FIELDS, (name, file)


@pytest.mark.parametrize("name", BUILDERS)
def test_each_split_has_its_images_and_classes_and_all_open(name, data, monkeypatch):
    for split, (number, *classes) in build(name, data, monkeypatch).items():
        images = gu.load_images(name, split)
        assert len(images) == number and images.name == f"{name} {split}"
        assert {images[row].mode for row in range(number)} == {"RGB"}
        if classes:
            assert len(np.unique(images.labels)) == classes[0] and images.labels.dtype == np.int64
            assert images.labels.min() >= 0 and images.labels.max() < len(images.names)
        assert images.images == gu.load_images(name, split).images, "the order of rows does not change"


@pytest.mark.parametrize("name", BUILDERS)
def test_a_missing_image_is_said_with_the_number_expected_and_found(name, data, monkeypatch):
    split, (number, *_) = next(iter(build(name, data, monkeypatch).items()))
    Path(gu.load_images(name, split).images[0]).unlink()
    with pytest.raises(ValueError, match=f"{split}: expected {number} images and found {number - 1}"):
        gu.load_images(name, split)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_file_too_many_is_said_with_the_number_expected_and_found(name, data, monkeypatch):
    split, (number, *_) = next(iter(build(name, data, monkeypatch).items()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = Path(gu.load_images(name, split).images[0])
    picture(first.with_name(first.name.replace(".", "9.", 1) if name != "adience" else "a.face.3.x.jpg"))
    listed = datasets.TABLE[name].get("unlisted", 0)
    if datasets.TABLE[name]["layout"] in ("gpr1200", "instre", "adience", "imagenet", "objectnet", "inaturalist2021"):
        with pytest.raises(ValueError, match=f"expected {number} images and found {number + 1}"):
            gu.load_images(name, split)
    elif listed == "any":
        assert len(gu.load_images(name, split)) == number
    else:
        with pytest.warns(UserWarning, match=rf"expected {listed} images .* and found {listed + 1}"):
            assert len(gu.load_images(name, split)) == number


@pytest.mark.parametrize("name", ["cub", "imagenet", "roxford"])
def test_the_published_counts_are_expected_of_real_data(name, data):
    BUILDERS[name](data / name)
    split, (number, *_) = next(iter(datasets.TABLE[name]["splits"].items()))
    with pytest.raises(ValueError, match=f"expected {number:,} images and found"):
        gu.load_images(name, split)


def test_a_wrong_number_of_classes_is_said_too(data, monkeypatch):
    monkeypatch.setitem(datasets.TABLE["cub"], "splits", make_cub(data / "cub") | {"test": [4, 100]})
    with pytest.raises(ValueError, match="expected 100 classes and found 2 .*98 missing"):
        gu.load_images("cub")


def test_an_unknown_split_names_those_there_are(data):
    with pytest.raises(ValueError, match="has no split 'test'; roxford has query, query_full, gallery"):
        gu.load_images("roxford")


def test_a_misspelt_name_suggests_the_right_one(data):
    with pytest.raises(FileNotFoundError, match="did you mean .*objectnet"):
        gu.load_images("objctnet")


@pytest.mark.parametrize(
    ("name", "file", "broken"),
    [
        ("cub", "CUB_200_2011/image_class_labels.txt", "1 1\n"),
        ("sop", "Stanford_Online_Products/Ebay_test.txt", "image_id\n1 2\n"),
        ("flowers", "setid.mat", "not MATLAB"),
        ("cars", "cars_annos.mat", "<html>please log in</html>"),
        ("coco", "caption_datasets/dataset_coco.json", '{"images": ['),
        ("coco", "caption_datasets/dataset_coco.json", '{"pictures": []}'),
        ("gldv2", "train_clean.csv", "<html>\n"),
        ("products10k", "train.csv", "a,b\n1,2\n"),
        ("roxford", "gnd_roxford5k.pkl", "\x80"),
        ("objectnet", "objectnet-1.0/mappings/folder_to_objectnet_label.json", "{}"),
    ],
)
def test_a_damaged_list_is_an_error_that_names_the_data_set_or_the_file(name, file, broken, data, monkeypatch):
    splits = build(name, data, monkeypatch)
    write(data / name / file, broken)
    with pytest.raises(ValueError, match=rf"{Path(file).name}|{datasets.TABLE[name]['title'].split(' ')[0]}"):
        gu.load_images(name, next(iter(splits)))


# --- what is particular to one ---


def test_gpr1200_sorts_classes_as_numbers_and_knows_their_domains(data, monkeypatch):
    build("gpr1200", data, monkeypatch)
    write(data / "gpr1200" / "categoryNumber_to_text.json", {"0": "Eldorado National Forest"})
    images = gu.load_images("gpr1200")
    assert list(np.unique(images.labels)) == list(range(12)) and (np.diff(images.labels) >= 0).all()
    assert list(dict.fromkeys(images.groups)) == ["landmarks", "nature", "sketches", "objects", "products", "faces"]
    assert images.names[0] == "Eldorado National Forest" and images.names[11] == "class 11"
    picture(data / "gpr1200" / "images" / "notes.jpg")
    with pytest.raises(ValueError, match=r"notes.jpg does not begin with a class number"):
        gu.load_images("gpr1200")


def test_metric_learning_splits_share_no_class(data, monkeypatch):
    for name in ("cub", "cars", "sop"):
        build(name, data, monkeypatch)
        train, test = gu.load_images(name, "train"), gu.load_images(name, "test")
        assert not set(train.names) & set(test.names), name
        assert len(test.names) == len(np.unique(test.labels)), name
    assert gu.load_images("cub").names == ["White Pelican", "Yellowthroat"]


def test_a_name_may_bring_its_split(data, monkeypatch):
    build("coco", data, monkeypatch)
    assert gu.load_images("coco:validation", "train").name == "coco validation"


def test_several_data_sets_become_one_whose_classes_stay_apart(data, monkeypatch):
    for name in ("sop", "cub"):
        build(name, data, monkeypatch)
    both = gu.load_images("sop + cub:test", "train")
    one, other = gu.load_images("sop", "train"), gu.load_images("cub", "test")
    assert both.images == one.images + other.images
    assert both.labels.tolist() == [*one.labels, *(other.labels + len(one.names))]
    assert both.names == [f"sop train/{n}" for n in one.names] + [f"cub test/{n}" for n in other.names]
    assert both.groups.tolist() == ["sop train"] * len(one) + ["cub test"] * len(other)


def test_a_set_without_labels_cannot_be_part_of_several(data, monkeypatch):
    for name in ("sop", "coco"):
        build(name, data, monkeypatch)
    with pytest.raises(ValueError, match="sop train \\+ coco train: coco train has no labels"):
        gu.load_images("sop + coco", "train")


def test_cars_are_read_from_the_layout_with_two_folders_too(data, monkeypatch):
    top = data / "cars"
    for part, classes in (("train", [1, 99]), ("test", [98, 196, 196])):
        for i in range(len(classes)):
            picture(top / f"cars_{part}" / f"{i + 1:06d}.jpg")
    (top / "devkit").mkdir()
    savemat(top / "devkit" / "cars_meta.mat", {"class_names": CARS})
    savemat(top / "devkit" / "cars_train_annos.mat", {"annotations": car_list("fname", [1, 99])})
    savemat(top / "cars_test_annos_withlabels.mat", {"annotations": car_list("fname", [98, 196, 196])})
    monkeypatch.setitem(datasets.TABLE["cars"], "splits", {"train": [2, 2], "test": [3, 2]})
    test = gu.load_images("cars", "test")
    assert test.names == ["Maker Model 099 2012", "Maker Model 196 2012"]
    assert [Path(path).parent.name for path in test.images] == ["cars_train", "cars_test", "cars_test"]


@pytest.mark.parametrize(
    "labels", ["cars_test_annos_withlabels.mat", "car_devkit/devkit/cars_test_annos_withlabels (1).mat"]
)
def test_cars_are_read_as_kaggle_nests_them(labels, data, monkeypatch):
    top = data / "cars" / "stanford-cars-dataset"
    for part, count in (("train", 2), ("test", 3)):
        for i in range(count):
            picture(top / f"cars_{part}" / f"cars_{part}" / f"{i + 1:06d}.jpg")
    devkit = top / "car_devkit" / "devkit"
    devkit.mkdir(parents=True)
    savemat(devkit / "cars_meta.mat", {"class_names": CARS})
    savemat(devkit / "cars_train_annos.mat", {"annotations": car_list("fname", [1, 99])})
    savemat(
        top / "cars_annos.mat", {"annotations": car_list("relative_im_path", [5] * 5, "car_ims/"), "class_names": CARS}
    )
    monkeypatch.setitem(datasets.TABLE["cars"], "splits", {"train": [2, 2], "test": [3, 2]})
    with pytest.raises(ValueError, match="cars_test_annos_withlabels.mat is in neither .*many copies lack it"):
        gu.load_images("cars", "test")
    savemat(top / labels, {"annotations": car_list("fname", [98, 196, 196])})
    test = gu.load_images("cars", "test")
    assert test.names == ["Maker Model 099 2012", "Maker Model 196 2012"], "the list that names other files is not used"
    assert [Path(path).parent.name for path in test.images] == ["cars_train", "cars_test", "cars_test"]


def test_cars_are_read_as_pytorch_metric_learning_has_them(data, monkeypatch):
    top = data / "cars"
    names = [name.replace("Model 099", "C/V") for name in CARS]
    lists = {"train": [1, 99], "test": [98, 196, 99]}
    for part, classes in lists.items():
        lines = []
        for i, number in enumerate(classes, 1):
            folder = names[number - 1].replace("/", "-")
            picture(top / "car_data" / "car_data" / part / folder / f"{i:05d}.jpg")
            lines.append(f"{i:05d}.jpg,1,2,30,40,{number}\n")
        write(top / f"anno_{part}.csv", "".join(lines))
    write(top / "names.csv", "\n".join(names) + "\n")
    monkeypatch.setitem(datasets.TABLE["cars"], "splits", {"train": [2, 2], "test": [3, 2]})
    test, train = gu.load_images("cars", "test"), gu.load_images("cars", "train")
    assert test.names == ["Maker C/V 2012", "Maker Model 196 2012"] and train.names == [CARS[0], CARS[97]]
    assert [path.parent.name for path in test.images] == ["Maker C-V 2012", "Maker Model 196 2012", "Maker C-V 2012"]


def test_captions_are_read_from_the_lists_of_clip_benchmark_too(data, monkeypatch):
    build("coco", data, monkeypatch)
    whole = {split: gu.load_images("coco", split) for split in ("train", "validation", "test")}
    (data / "coco" / "caption_datasets" / "dataset_coco.json").unlink()
    for part, images in (("train", whole["train"]), ("val", whole["validation"]), ("test", whole["test"])):
        for path in images.images:
            path.rename(path.with_name(f"COCO_{path.parent.name}_{path.name}"))
        content = {"images": [], "annotations": []}
        for row, path in enumerate(images.images):
            content["images"].append({"id": 7 * row, "file_name": f"COCO_{path.parent.name}_{path.name}"})
            told = [*images.captions[row], "a sixth one"]
            content["annotations"] += [{"image_id": 7 * row, "caption": text} for text in told]
        write(data / "coco" / f"coco_{part}_karpathy.json", content)
    for split, images in whole.items():
        found = gu.load_images("coco", split)
        assert found.captions == images.captions and [p.parent.name for p in found.images] == [
            p.parent.name for p in images.images
        ]


def test_flickr_is_read_from_the_lists_of_clip_benchmark_too(data, monkeypatch):
    top = data / "flickr30k"
    for part in ("train", "val", "test"):
        lines = ["image,caption"]
        for i in range(2):
            picture(top / f"{part}{i}.jpg")
            lines += [
                f'{part}{i}.jpg,"Two men, one ""tall"" , walk ."',
                f"{part}{i}.jpg,A man, walking",
                f'{part}{i}.jpg,"Go" he says',
            ]
        write(top / f"flickr30k_{part}_karpathy.txt", "\n".join(lines) + "\n")
    monkeypatch.setitem(
        datasets.TABLE["flickr30k"], "splits", {split: [2] for split in ("train", "validation", "test")}
    )
    images = gu.load_images("flickr30k", "validation")
    assert [path.name for path in images.images] == ["val0.jpg", "val1.jpg"]
    assert images.captions[0] == ['Two men, one "tall" , walk .', "A man, walking", '"Go" he says']
    (top / "val1.jpg").unlink()
    with pytest.raises(ValueError, match="val1.jpg is missing"):
        gu.load_images("flickr30k", "validation")


def test_a_person_of_adience_is_the_third_part_from_the_end_of_the_file_name(data, monkeypatch):
    build("adience", data, monkeypatch)
    assert gu.load_images("adience").names == ["person 00002", "person 00010"]
    picture(data / "adience" / "aligned" / "photo.jpg")
    with pytest.raises(ValueError, match=r"photo.jpg names no person"):
        gu.load_images("adience")


def test_splits_that_share_classes_number_them_alike(data, monkeypatch):
    for name, splits in {
        "flowers": ("train", "test"),
        "aircraft": ("train", "test"),
        "products10k": ("train", "test"),
        "gldv2": ("query", "gallery"),
    }.items():
        build(name, data, monkeypatch)
        first, second = (gu.load_images(name, split) for split in splits)
        assert first.names == second.names, name
    images = gu.load_images("products10k", "train")
    assert [images.names[label] for label in images.labels] == ["product 00002", "product 00010", "product 00000"]
    assert gu.load_images("aircraft").names == ["707-320", "BAE 146-200"]


def test_imagenet_and_its_variants_have_the_thousand_classes_in_the_order_of_their_ids(data, monkeypatch):
    for name in ("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch"):
        build(name, data, monkeypatch)
    assert list(gu.load_images("imagenet").labels) == list(gu.load_images("imagenet", "train").labels) == [0, 1, 999]
    assert list(gu.load_images("imagenet_v2").labels) == [0, 0, 1, 1, 2, 2, 10, 10, 999, 999], "10 comes after 2"
    assert list(gu.load_images("imagenet_a").labels) == [6, 130] and list(gu.load_images("imagenet_r").labels) == [
        1,
        130,
    ]
    names = gu.load_images("imagenet_sketch").names
    assert len(names) == 1000 and names[0] == "tench" and names[999] == "toilet paper"
    picture(data / "imagenet_a" / "imagenet-a" / "n99999999" / "0.jpg")
    with pytest.raises(ValueError, match="n99999999 is not named like an ImageNet class"):
        gu.load_images("imagenet_a")


def test_flat_validation_images_get_their_labels_from_the_devkit(data, monkeypatch):
    top = data / "imagenet"
    for i in (1, 2):
        picture(top / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    devkit = top / "ILSVRC2012_devkit_t12" / "data"
    write(devkit / "ILSVRC2012_validation_ground_truth.txt", "2\n1\n")
    synsets = np.array([(1, "n15075141"), (2, "n01440764")], dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    savemat(devkit / "meta.mat", {"synsets": synsets})
    monkeypatch.setitem(datasets.TABLE["imagenet"], "splits", {"train": [], "test": [2, 2]})
    images = gu.load_images("imagenet")
    assert [path.name[-6] for path in images.images] == ["1", "2"] and list(images.labels) == [0, 999]


def test_a_read_only_folder_of_kaggle_is_found_and_never_written_to(data, tmp_path, monkeypatch):
    top = tmp_path / "kaggle" / "imagenet-object-localization-challenge"
    for i in (1, 2):
        picture(top / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    lines = "ImageId,PredictionString\nILSVRC2012_val_00000001,n15075141 1 2 3 4\nILSVRC2012_val_00000002,n01440764 1 2 3 4 \n"
    write(top / "LOC_val_solution.csv", lines)
    monkeypatch.setitem(datasets.TABLE["imagenet"], "splits", {"train": [], "test": [2, 2]})
    before = sorted(path for path in (tmp_path / "kaggle").rglob("*"))
    assert list(gu.load_images("imagenet").labels) == [0, 999]
    assert sorted(path for path in (tmp_path / "kaggle").rglob("*")) == before and not data.exists()


def test_objectnet_keeps_the_classes_of_imagenet_and_cuts_its_red_border(data, monkeypatch):
    build("objectnet", data, monkeypatch)
    images = gu.load_images("objectnet")
    assert images.names == ["Bench", "Chair"] and list(images.labels) == [0, 0, 1, 1]
    for image in (images[0], images.subset([3])[0]):
        assert image.size == (8, 6) and set(image.getdata()) == {(0, 0, 255)}


def test_captions_are_those_of_karpathys_split_and_at_most_five(data, monkeypatch):
    build("coco", data, monkeypatch)
    images = gu.load_images("coco")
    assert images.labels is None and [len(captions) for captions in images.captions] == [5, 5]
    assert images.captions[1][0] == "caption 0 of 1", "line breaks inside captions become spaces"
    assert {path.parent.name for path in gu.load_images("coco", "train").images} == {"train2014", "val2014"}


def test_the_test_split_of_coco_needs_no_training_images(data, monkeypatch):
    build("coco", data, monkeypatch)
    for path in (data / "coco" / "train2014").iterdir():
        path.unlink()
    (data / "coco" / "train2014").rmdir()
    assert len(gu.load_images("coco")) == 2
    with pytest.raises(ConnectionError, match=r"could not download http://images.cocodataset.org/zips/train2014.zip"):
        gu.load_images("coco", "train")


@pytest.mark.parametrize("kind", ["pkl", "mat"])
def test_revisited_ground_truth_reads_alike_from_pickle_and_matlab(kind, data, monkeypatch):
    build("roxford", data, monkeypatch)
    if kind == "mat":
        (data / "roxford" / "gnd_roxford5k.pkl").unlink()
        fields = ("easy", "hard", "junk", "bbx")
        gnd = np.empty(2, dtype=[(key, object) for key in fields])
        for i, one in enumerate(TRUTH["gnd"]):
            gnd[i] = tuple(np.array([one[key]]) + (key != "bbx") for key in fields)  # MATLAB counts from 1
        lists = {key: np.array(TRUTH[key], dtype=object) for key in ("imlist", "qimlist")}
        savemat(data / "roxford" / "gnd_roxford5k.mat", lists | {"gnd": gnd})
    truth = datasets.load_ground_truth("roxford")
    assert [{key: list(rows) for key, rows in one.items()} for one in truth] == [
        {"easy": [1], "hard": [0], "junk": [2]},
        {"easy": [], "hard": [2], "junk": []},
    ]
    gallery = gu.load_images("roxford", "gallery")
    assert [path.stem for path in gallery.images] == TRUTH["imlist"]
    eye = np.eye(4, dtype=np.float32)
    protocol = paper_tables.score_revisited
    assert protocol(eye[[1, 2]], eye[:3], truth, "easy").mean == protocol(eye[[1, 2]], eye[:3], truth, "hard").mean == 1


def test_queries_of_revisited_oxford_are_cut_to_their_box_unless_asked_for_in_full(data, monkeypatch):
    build("roxford", data, monkeypatch)
    queries = gu.load_images("roxford", "query")
    assert [queries[row].size for row in range(2)] == [(4, 4), (8, 5)]
    assert gu.load_images("roxford", "query_full")[0].size == (8, 6)


def test_a_crop_is_taken_before_the_picture_is_turned_upright_and_changes_the_cached_embedding(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    picture(tmp_path / "a.png", size=(8, 6))
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_set.open_image(tmp_path / "turned.jpg", (0, 0, 4, 2)).size == (2, 4)
    whole = gu.ImageSet("a", [tmp_path / "a.png"])
    part = gu.ImageSet("a", [tmp_path / "a.png"], crops=np.array([[0, 0, 4, 99]]))
    assert part[0].size == (4, 6), "a box that leaves the picture ends at its edge"
    assert whole.digest(0) != part.digest(0)


def test_a_pickle_that_would_run_code_is_refused(data, monkeypatch, tmp_path):
    build("roxford", data, monkeypatch)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (data / "roxford" / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"gnd_roxford5k.pkl is damaged .*mkdir, which no ground truth needs"):
        gu.load_images("roxford", "query")
    assert not (tmp_path / "owned").exists()


def test_ground_truth_of_landmarks_is_what_their_solution_lists(data, monkeypatch):
    for name in ("gldv2", "cub"):
        build(name, data, monkeypatch)
    truth = datasets.load_ground_truth("gldv2")
    assert [list(one["easy"]) for one in truth] == [[0, 2], [1]]
    assert all(len(one["hard"]) == len(one["junk"]) == 0 for one in truth)
    with pytest.raises(ValueError, match="CUB-200-2011 has no query and gallery splits"):
        datasets.load_ground_truth("cub")


def test_landmarks_train_from_the_lists_of_kaggle_too(data, monkeypatch):
    build("gldv2", data, monkeypatch)
    (data / "gldv2" / "train_clean.csv").unlink()
    write(data / "gldv2" / "train.csv", "id,landmark_id\n000,7\n001,7\n")
    assert gu.load_images("gldv2", "train").names == ["landmark 000007"]


def test_several_folders_of_data_are_searched_in_order(data, tmp_path, monkeypatch):
    splits = make_cub(tmp_path / "second" / "cub")
    monkeypatch.setitem(datasets.TABLE["cub"], "splits", splits)
    monkeypatch.setenv("GPNNS_DATA", f"{data}{os.pathsep}{tmp_path / 'second'}")
    assert tmp_path / "second" in gu.load_images("cub").images[0].parents
    make_cub(data / "cub")
    assert data in gu.load_images("cub").images[0].parents


def test_the_overview_lists_every_data_set_and_where_it_was_found(data, monkeypatch):
    build("cub", data, monkeypatch)
    rows = {row["name"]: row for row in datasets.list_datasets()}
    assert set(rows) == set(datasets.TABLE)
    assert rows["cub"]["found"] == str(data / "cub" / "CUB_200_2011") and rows["cub"]["get"] == "downloaded"
    assert rows["objectnet"]["found"] == "not found" and rows["objectnet"]["get"] == "by hand"


def test_the_readme_has_a_row_for_each_data_set_that_agrees_with_the_table(data):
    lines = (gu.DATA / "README.md").read_text(encoding="utf-8").splitlines()
    for row in datasets.list_datasets():
        entry = datasets.TABLE[row["name"]]
        (line,) = [line for line in lines if line.startswith(f"| `{row['name']}` |")]
        for part in (entry["home"], row["title"], row["images"], row["licence"], f"| {row['get']} |"):
            assert part in line, (row["name"], part)


# --- what must be got by hand ---


def test_what_needs_a_login_is_said_with_source_and_place(data):
    with pytest.raises(FileNotFoundError) as error:
        gu.load_images("products10k", "test")
    message = str(error.value)
    assert "https://products-10k.github.io" in message and str(data / "products10k") in message
    assert "test.zip, train.csv, test_kaggletest.csv" in message and "cannot be downloaded without you" in message
    with pytest.raises(FileNotFoundError, match="ObjectNet was not found .*unzip -P"):
        gu.load_images("objectnet")


def pack(archive, folder):
    """Everything in a folder as a .zip, .tar or .tar.gz."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for path in files:
                packed.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix in (".gz", ".tgz") else "w") as packed:
            for path in files:
                packed.add(path, path.relative_to(folder))


def author_archive(archive, whole, file, flat):
    """One archive of a data set, packed from its imitation: with the folder that it `gives` at its top, or without."""
    wanted = file["gives"].split("/")[0]
    source = next((path for path in [whole / wanted, *sorted(whole.rglob(wanted))] if path.exists()), None)
    packing = archive.parent / "packing" / archive.name
    top = packing if flat or source is None else packing / wanted
    if source is None:  # caption_datasets.zip: the lists of three data sets, side by side
        source = top
        for path in whole.glob("*.json"):
            write(top / path.name, path.read_text(encoding="utf-8"))
    elif source.is_file():
        write(packing / wanted, source.read_text(encoding="utf-8"))
    elif file.get("nested"):
        for sub in source.iterdir():
            pack(packing / f"{sub.name}.tar", sub)
    else:
        shutil.copytree(source, top, dirs_exist_ok=True)
    pack(archive, packing)


@pytest.mark.parametrize("flat", [False, True], ids=["folder", "flat"])
@pytest.mark.parametrize("name", [name for name in BUILDERS if datasets.TABLE[name].get("files")])
def test_each_data_set_is_read_from_its_archives(name, flat, server, data, tmp_path, monkeypatch):
    """Those without a login come from the test's server, the others lie in the data set's folder as they were got."""
    splits = build(name, tmp_path / "built", monkeypatch)
    whole, place = tmp_path / "built" / name, data / name
    files = []
    for file in datasets.TABLE[name]["files"]:
        file = {key: value for key, value in file.items() if key != "md5" and key != "size"}
        file |= {"count": 1} if "count" in file else {}
        first = next(datasets.list_files_for({"files": [file], "splits": splits}, file.get("splits", list(splits))[0]))
        served = f"{len(files)}_{first['name']}"
        packed = tmp_path / "packed" / served
        if downloads.is_archive(first["name"]):
            author_archive(packed, whole, first, flat)
        elif (whole / first["name"]).is_dir():
            shutil.copytree(whole / first["name"], place / first["name"])
            continue
        else:
            packed = next(whole.rglob(first["name"]))
        if "url" in file:
            server.files[served] = packed.read_bytes()
            file["url"] = [server.url.replace("a.bin", served)]
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(packed, place / first["name"])
        files.append(file)
    monkeypatch.setitem(datasets.TABLE[name], "files", files)
    for split, (number, *_) in splits.items():
        assert len(gu.load_images(name, split)) == number
    asked = len(server.asked)
    assert len(gu.load_images(name, split)) == number and len(server.asked) == asked


def test_archives_put_there_by_hand_are_unpacked_once_and_kept(data, tmp_path, monkeypatch):
    whole, place = tmp_path / "whole", data / "products10k"
    monkeypatch.setitem(datasets.TABLE["products10k"], "splits", make_products10k(whole))
    pack(place / "train.zip", whole / "train")
    for name in ("train.csv", "test_kaggletest.csv"):
        shutil.copy(whole / name, place / name)
    assert len(gu.load_images("products10k", "train")) == 3 and (place / "train.zip").exists()
    monkeypatch.setattr(downloads, "unpack_archive", lambda *a: pytest.fail("it was unpacked already"))
    assert len(gu.load_images("products10k", "train")) == 3


def test_an_archive_with_a_wrong_checksum_is_not_unpacked(data, tmp_path):
    make_cars(tmp_path / "whole")
    pack(data / "cars" / "car_ims.tgz", tmp_path / "whole")
    (data / "cars" / "cars_annos.mat").write_bytes((tmp_path / "whole" / "cars_annos.mat").read_bytes())
    with pytest.raises(ValueError, match=r"car_ims.tgz has the checksum .*, expected d5c8f0aa"):
        gu.load_images("cars")
    assert not (data / "cars" / "car_ims").exists()


def test_the_training_set_of_imagenet_is_a_tar_of_tars(data, tmp_path, monkeypatch):
    make_imagenet(tmp_path / "whole")
    for sub in (tmp_path / "whole" / "train").iterdir():
        pack(tmp_path / "tars" / f"{sub.name}.tar", sub)
    pack(data / "imagenet" / "ILSVRC2012_img_train.tar", tmp_path / "tars")
    files = [datasets.TABLE["imagenet"]["files"][0] | {"md5": None}]
    monkeypatch.setitem(datasets.TABLE["imagenet"], "files", files)
    monkeypatch.setitem(datasets.TABLE["imagenet"], "splits", {"train": [3, 3], "test": []})
    images = gu.load_images("imagenet", "train")
    assert list(images.labels) == [0, 1, 999] and not list((data / "imagenet" / "train").glob("*.tar"))


def test_parts_in_a_folder_that_cannot_be_written_are_linked_not_copied_or_fetched(data, tmp_path, monkeypatch):
    make_flowers(tmp_path / "shelf" / "flowers")
    (tmp_path / "shelf" / "flowers" / "setid.mat").rename(tmp_path / "setid.mat")
    before = sorted((tmp_path / "shelf").rglob("*"))
    monkeypatch.setenv("GPNNS_DATA", f"{tmp_path / 'shelf'}{os.pathsep}{data}")
    access = os.access
    monkeypatch.setattr(datasets.os, "access", lambda path, mode: "shelf" not in str(path) and access(path, mode))
    with pytest.raises(ConnectionError, match=r"could not download https://www.robots.ox.ac.uk/.*/setid.mat"):
        gu.load_images("flowers")
    (tmp_path / "setid.mat").rename(data / "flowers" / "setid.mat")
    monkeypatch.setitem(datasets.TABLE["flowers"], "splits", {"train": [2], "validation": [1], "test": [3]})
    assert len(gu.load_images("flowers")) == 3 and (data / "flowers" / "jpg").is_symlink()
    assert sorted((tmp_path / "shelf").rglob("*")) == before


# --- archives that mean harm, or are broken ---


def tar_with(path, name, link=None, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w") as packed:
        good = tarfile.TarInfo("good.jpg")
        good.size = 4
        packed.addfile(good, io.BytesIO(b"good"))
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname = kind, link or ""
        packed.addfile(bad, io.BytesIO())


OUTSIDE = r"evil.tar holds '.*escaped.jpg', a path outside its folder: it is not unpacked"
REFUSED_LINK = r"evil.tar (cannot be unpacked \('a'|holds 'a', a link or device)"  # the second: Python before 3.11.4


@pytest.mark.parametrize(
    ("name", "link", "kind"),
    [
        ("../escaped.jpg", None, tarfile.REGTYPE),
        ("/tmp/escaped.jpg", None, tarfile.REGTYPE),
        ("a/../../escaped.jpg", None, tarfile.REGTYPE),
        ("..\\escaped.jpg", None, tarfile.REGTYPE),
        ("C:escaped.jpg", None, tarfile.REGTYPE),
        ("a", "..", tarfile.SYMTYPE),
        ("a", "/etc/passwd", tarfile.SYMTYPE),
        ("a", "../outside", tarfile.LNKTYPE),
        ("a", None, tarfile.FIFOTYPE),
        ("a", None, tarfile.CHRTYPE),
    ],
)
def test_a_tar_that_leads_outside_its_folder_is_refused_and_nothing_is_left(name, link, kind, tmp_path):
    tar_with(tmp_path / "evil.tar", name, link, kind)
    with pytest.raises(ValueError, match=OUTSIDE if kind == tarfile.REGTYPE else REFUSED_LINK):
        downloads.unpack_archive(tmp_path / "evil.tar", tmp_path / "deep" / "target")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "evil.tar"]


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="before Python 3.11.4 every link is refused")
def test_a_link_that_stays_in_its_folder_is_unpacked(tmp_path):
    tar_with(tmp_path / "links.tar", "same.jpg", "good.jpg", tarfile.SYMTYPE)
    downloads.unpack_archive(tmp_path / "links.tar", tmp_path / "deep" / "target")
    assert (tmp_path / "deep" / "target" / "same.jpg").read_bytes() == b"good"


@pytest.mark.parametrize("name", ["../escaped.jpg", "/escaped.jpg", "a/../../escaped.jpg", "C:/escaped.jpg", "link"])
def test_a_zip_that_leads_outside_its_folder_is_refused_and_nothing_is_left(name, tmp_path):
    member = zipfile.ZipInfo(name)
    if name == "link":
        member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as packed:
        packed.writestr("good.jpg", b"good")
        packed.writestr(member, b"/etc/passwd")
    with pytest.raises(ValueError, match=r"evil.zip holds .*(a path outside its folder|a link or device)"):
        downloads.unpack_archive(tmp_path / "evil.zip", tmp_path / "deep" / "target")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "evil.zip"]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_a_damaged_archive_is_an_error_and_leaves_nothing(suffix, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(rng.bytes(50_000))
    archive = tmp_path / f"x.{suffix}"
    pack(archive, tmp_path / "in")
    whole = archive.read_bytes()
    for broken in (whole[: len(whole) // 2], b"<!doctype html><p>please log in</p>", b""):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"x.{suffix} cannot be unpacked .*get it again"):
            downloads.unpack_archive(archive, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", archive.name]


def test_a_full_disk_while_downloading_says_so_and_keeps_what_came(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gu.Progress, "update", full)  # the first block was written
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*1,048,576 bytes are kept in"):
        downloads.download([server.url], tmp_path / "a.bin")


def test_a_zip_with_a_password_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a.jpg", b"secret")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[6] |= 1  # the bit that says "encrypted", in the file and in the list of files
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.zip cannot be unpacked .*password"):
        downloads.unpack_archive(tmp_path / "x.zip", tmp_path / "out")


def test_a_killed_unpacking_leaves_no_half_data_set(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"x")
    pack(tmp_path / "x.tar", tmp_path / "in")
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        downloads.unpack_archive(tmp_path / "x.tar", tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / ".out.unpacking").mkdir()  # as a process leaves it that could not clean up
    (tmp_path / ".out.unpacking" / "old.jpg").touch()
    downloads.unpack_archive(tmp_path / "x.tar", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
    assert not (tmp_path / ".out.unpacking").exists()


def test_a_full_disk_while_unpacking_says_so(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    pack(tmp_path / "x.zip", tmp_path / "in")
    monkeypatch.setattr(
        downloads.shutil, "copyfileobj", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match=r"could not write .*No space left.*nothing of x.zip was kept"):
        downloads.unpack_archive(tmp_path / "x.zip", tmp_path / "out")


# --- downloads, from a server in this process ---


CONTENT = np.random.default_rng(1).bytes(3_000_000)


class Files(BaseHTTPRequestHandler):
    """Serves `server.files`; may break the connection, ignore Range, or answer with an error."""

    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        server.asked.append((path, self.headers.get("Range")))
        if server.status or path not in server.files:
            return self.send_error(server.status or 404)
        content, start = server.files[path], 0
        asked, tag = self.headers.get("Range"), f'"{hashlib.md5(content).hexdigest()}"'
        if asked and server.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if server.tags:
            self.send_header("ETag", tag)
        self.end_headers()
        end = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(data):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.asked = {"a.bin": CONTENT}, []
    server.handle_error = lambda *_: None  # a client that stops reading is part of these tests
    server.cuts, server.ranges, server.tags, server.status = [], True, True, 0
    server.url = f"http://127.0.0.1:{server.server_port}/a.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


MD5 = hashlib.md5(CONTENT).hexdigest()


def test_a_download_is_checked_and_appears_complete(server, tmp_path):
    path = downloads.download([server.url], tmp_path / "a.bin", len(CONTENT), MD5)
    assert path.read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, tmp_path):
    server.cuts = [1_100_000, 1_100_000]
    assert downloads.download([server.url], tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=1100000-", "bytes=2200000-"]


def test_a_download_goes_on_after_a_restart_of_python(server, tmp_path, monkeypatch):
    server.cuts = [1_000_000]
    monkeypatch.setattr(downloads.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        downloads.download([server.url], tmp_path / "a.bin", None, MD5)
    assert not (tmp_path / "a.bin").exists() and (tmp_path / "a.bin.part").stat().st_size == 1_000_000
    assert downloads.download([server.url], tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT
    assert server.asked[-1][1] == "bytes=1000000-"


def test_a_server_that_ignores_range_starts_again_and_still_ends_right(server, tmp_path):
    server.cuts, server.ranges = [1_000_000], False
    assert downloads.download([server.url], tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT
    assert server.asked == [("a.bin", None), ("a.bin", "bytes=1000000-")]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"old" * 1000)
    (tmp_path / "a.bin.part.tag").write_text('"another file"')
    assert downloads.download([server.url], tmp_path / "a.bin").read_bytes() == CONTENT


def test_without_a_tag_nothing_is_glued_to_bytes_of_unknown_origin(server, tmp_path):
    server.tags = False
    (tmp_path / "a.bin.part").write_bytes(b"unknown")
    assert downloads.download([server.url], tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked == [("a.bin", None)]


def test_a_complete_part_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    (tmp_path / "a.bin.part.tag").write_text(f'"{MD5}"')
    assert downloads.download([server.url], tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "a.bin.part.tag").write_text(f'"{MD5}"')
    assert downloads.download([server.url], tmp_path / "b" / ".." / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT


def test_a_wrong_checksum_is_said_and_the_wrong_bytes_are_removed(server, tmp_path):
    with pytest.raises(ValueError, match=f"checksum {MD5}, expected {'0' * 32}"):
        downloads.download([server.url], tmp_path / "a.bin", None, "0" * 32)
    assert not list(tmp_path.glob("a.bin*"))


def test_a_wrong_size_is_said_before_anything_is_fetched(server, tmp_path):
    with pytest.raises(ValueError, match="has 3,000,000 bytes, expected 5: the file was changed"):
        downloads.download([server.url], tmp_path / "a.bin", 5)
    assert not (tmp_path / "a.bin").exists()


def test_the_next_url_is_tried_when_the_first_has_nothing(server, tmp_path):
    gone = server.url.replace("a.bin", "gone.bin")
    assert downloads.download([gone, server.url], tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["gone.bin", "a.bin"]


def test_a_file_that_is_gone_is_asked_for_once_and_a_server_in_trouble_several_times(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"could not download .*gone.bin .*get the file elsewhere and save it as"):
        downloads.download([server.url.replace("a.bin", "gone.bin")], tmp_path / "gone.bin")
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(ConnectionError, match="could not download"):
        downloads.download([server.url], tmp_path / "a.bin")
    assert len(server.asked) == 1 + downloads.TRIES


def test_without_network_one_sentence_says_what_to_do(data, monkeypatch):
    monkeypatch.setattr(downloads, "TRIES", 1)
    with pytest.raises(ConnectionError) as error:
        gu.load_images("gpr1200")
    message = str(error.value)
    assert "there is no network in this test" in message and str(data / "gpr1200" / "GPR1200.zip") in message


def test_a_disk_without_room_is_said_before_the_download(server, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=1_000_000, total=0, used=0)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"a.bin needs 3 MB and .* has 1 MB free; set GPNNS_DATA to a larger disk"):
        downloads.download([server.url], tmp_path / "a.bin")


def serve(name, archives, server, monkeypatch, splits):
    """Offer a data set's files on the test's server, as the table describes them."""
    files = []
    for file in datasets.TABLE[name]["files"]:
        content = archives[file["name"]]
        server.files[file["name"]] = content
        url = [server.url.replace("a.bin", file["name"])]
        files.append(file | {"url": url, "md5": hashlib.md5(content).hexdigest()})
    monkeypatch.setitem(datasets.TABLE[name], "files", files)
    monkeypatch.setitem(datasets.TABLE[name], "splits", splits)


def test_a_data_set_that_is_nowhere_is_downloaded_once_with_its_licence_said(
    server, data, tmp_path, monkeypatch, capsys
):
    splits = make_cub(tmp_path / "whole")
    pack(tmp_path / "CUB_200_2011.tgz", tmp_path / "whole")
    serve("cub", {"CUB_200_2011.tgz": (tmp_path / "CUB_200_2011.tgz").read_bytes()}, server, monkeypatch, splits)
    assert len(gu.load_images("cub")) == 4 and (data / "cub" / "CUB_200_2011" / "images.txt").exists()
    assert "downloading CUB_200_2011.tgz to" in (said := capsys.readouterr().err) and "non-commercial research" in said
    assert not (data / "cub" / "CUB_200_2011.tgz").exists(), "it would take the room twice"
    assert len(gu.load_images("cub", "train")) == 4 and len(server.asked) == 1


def test_several_files_of_a_data_set_and_a_break_between_them(server, data, tmp_path, monkeypatch):
    splits = make_flowers(tmp_path / "whole")
    pack(tmp_path / "102flowers.tgz", tmp_path / "whole")
    content = {name: (tmp_path / "whole" / name).read_bytes() for name in ("imagelabels.mat", "setid.mat")}
    content["102flowers.tgz"] = (tmp_path / "102flowers.tgz").read_bytes()
    serve("flowers", content, server, monkeypatch, splits)
    setid = server.files.pop("setid.mat")
    with pytest.raises(ConnectionError, match=r"setid.mat"):
        gu.load_images("flowers")
    server.files["setid.mat"] = setid
    server.asked.clear()
    assert len(gu.load_images("flowers")) == 3
    assert [path for path, _ in server.asked] == ["setid.mat"], "what was there is not fetched again"


def test_numbered_archives_are_all_needed_before_a_split_counts_as_there(server, data, tmp_path, monkeypatch):
    make_gldv2(tmp_path / "whole")
    pack(tmp_path / "images_000.tar", tmp_path / "whole" / "index")
    table = tmp_path / "whole" / "index_image_to_landmark.csv"
    server.files |= {"index.csv": table.read_bytes(), "images_000.tar": (tmp_path / "images_000.tar").read_bytes()}
    base = server.url.removesuffix("a.bin")
    numbered = {"name": "images_{:03d}.tar", "gives": "index/images_{:03d}", "count": 2, "splits": ["gallery"]}
    files = [{"name": table.name, "url": [base + "index.csv"]}, numbered | {"url": [base + "images_{:03d}.tar"]}]
    monkeypatch.setitem(datasets.TABLE["gldv2"], "files", files)
    monkeypatch.setitem(datasets.TABLE["gldv2"], "splits", {"gallery": [3, 2]})
    for _ in range(2):  # the first archive is there, the second is not: it goes on, and does not load the half
        with pytest.raises(ConnectionError, match=r"images_001.tar"):
            gu.load_images("gldv2", "gallery")
    (tmp_path / "empty").mkdir()
    pack(tmp_path / "images_001.tar", tmp_path / "empty")
    server.files["images_001.tar"] = (tmp_path / "images_001.tar").read_bytes()
    assert len(gu.load_images("gldv2", "gallery")) == 3


def test_an_archive_with_another_layout_than_expected_is_said(server, data, tmp_path, monkeypatch):
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd" / "readme.txt", "moved")
    pack(tmp_path / "CUB_200_2011.tgz", tmp_path / "odd")
    serve("cub", {"CUB_200_2011.tgz": (tmp_path / "CUB_200_2011.tgz").read_bytes()}, server, monkeypatch, {"test": []})
    with pytest.raises(ValueError, match=r"holds all files, but not images.txt and"):
        gu.load_images("cub")


# --- tables and webdataset tars ---


def test_webdataset_tars_are_unpacked_once_into_the_cache(cache, tmp_path, monkeypatch):
    top = tmp_path / "in"
    for i, label in ((0, 2), (1, 10), (2, 2)):
        picture(top / f"{i:04d}.jpg", color=(i * 50, 0, 0))
        write(top / f"{i:04d}.cls", str(label))
        write(top / f"{i:04d}.txt", f"caption of {i}\n")
    write(top / "0003.json", {"label": 3, "caption": "only text"})
    pack(tmp_path / "shards" / "train" / "00000.tar", top)
    images = gu.load_images(tmp_path / "shards", "train")
    assert images.names == ["02", "10"] and sorted(images.labels) == [0, 0, 1], "2 comes before 10"
    assert images.captions[0] == ["caption of 0"] and images[2].getpixel((0, 0))[0] > 60
    monkeypatch.setattr(downloads, "unpack_archive", lambda *a: pytest.fail("it was unpacked already"))
    assert gu.load_images(tmp_path / "shards" / "train" / "00000.tar").images == images.images


def test_webdataset_labels_and_captions_may_be_in_json(cache, tmp_path):
    picture(tmp_path / "in" / "a.b" / "0001.png")
    write(tmp_path / "in" / "a.b" / "0001.json", {"label": "cat", "caption": ["a cat", "a pet"]})
    picture(tmp_path / "in" / "0002.png")
    write(tmp_path / "in" / "0002.json", {"label": "dog"})
    pack(tmp_path / "x.tar", tmp_path / "in")
    images = gu.load_images(tmp_path / "x.tar")
    assert images.names == ["cat", "dog"] and sorted(map(len, images.captions)) == [0, 2]


def test_a_tar_without_images_or_with_harm_in_it_is_an_error(cache, tmp_path):
    write(tmp_path / "in" / "a.txt", "text")
    pack(tmp_path / "x.tar", tmp_path / "in")
    with pytest.raises(ValueError, match=r"no images in .*x.tar"):
        gu.load_images(tmp_path / "x.tar")
    tar_with(tmp_path / "evil.tar", "../evil.jpg")
    with pytest.raises(ValueError, match="a path outside its folder"):
        gu.load_images(tmp_path / "evil.tar")


def test_a_parquet_table_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "set.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        gu.load_images(tmp_path / "set.parquet")


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"label": [1, 2]}, "a list .* where one text or number belongs"), ([1], "holds a list, not a dict")],
)
def test_a_label_of_a_tar_that_is_no_label_is_refused(cache, tmp_path, facts, message):
    picture(tmp_path / "in" / "1.png")
    write(tmp_path / "in" / "1.json", facts)
    pack(tmp_path / "x.tar", tmp_path / "in")
    with pytest.raises(ValueError, match=rf"1.json.*{message}"):
        gu.load_images(tmp_path / "x.tar")


def test_values_in_the_json_of_a_tar_keep_their_meaning(cache, tmp_path, capsys):
    samples = [(2.0, ["a", None, 7]), (10, None), (0, "zero")]
    for i, (label, caption) in enumerate(samples):
        picture(tmp_path / "in" / f"{i}.png")
        write(tmp_path / "in" / f"{i}.json", {"label": label, "caption": caption})
    picture(tmp_path / "in" / "IMG.2020.01.jpg")  # not as webdataset names files
    picture(tmp_path / "in" / "__MACOSX" / "9.png")
    pack(tmp_path / "x.tar", tmp_path / "in")
    images = gu.load_images(tmp_path / "x.tar")
    assert images.names == ["00", "02", "10"] and images.captions == [["a", "7"], [], ["zero"]]
    assert len(images.left_out) == 1 and "IMG.2020.01.jpg of x.tar (its name has several points" in images.left_out[0]
    for i in range(3):
        write(tmp_path / "in" / f"{i}.json", {"label": None})
    pack(tmp_path / "y.tar", tmp_path / "in")
    assert gu.load_images(tmp_path / "y.tar").labels is None, "what is missing is no class called None"
