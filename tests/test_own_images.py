"""Files of one's own, as people really have them: understood, or refused with file and remedy, and never without a word."""

import json
import os
import sys
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

import gpnns_utils as gu
from gpnns.images import datasets, image_set

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

COLORS = {"a": (200, 40, 40), "b": (30, 30, 200), "c": (20, 160, 60), "d": (220, 220, 40)}


def picture(path, color="a", **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), COLORS[color]).save(path, **settings)
    return path


@pytest.fixture
def top(tmp_path):
    """A folder with a.png to d.png."""
    for name in COLORS:
        picture(tmp_path / "top" / f"{name}.png", name)
    return tmp_path / "top"


def table(top, text, name="set.csv", encoding="utf-8"):
    (top / name).write_bytes(text.encode(encoding))
    return top / name


def stems(images):
    return [path.stem for path in images.images]


# --- tables ---


def test_lines_that_name_the_same_path_are_one_image_with_several_captions(top):
    lines = [f"{name}.png,caption {i} of {name}" for name in "abc" for i in range(3)]
    images = gu.load_images(table(top, "image,caption\n" + "\n".join(lines) + "\n"))
    assert stems(images) == ["a", "b", "c"] and images.captions[1] == [f"caption {i} of b" for i in range(3)]
    queries, relevant = image_set.text_queries(images)
    assert len(queries) == 9 and all(len(rows) == 1 for rows in relevant)


def test_an_image_with_two_labels_is_refused_with_both_lines(top):
    with pytest.raises(ValueError, match="line 4: ./a.png has the label 'dog', in line 2 it has 'cat'"):
        gu.load_images(table(top, "path,label\na.png,cat\nb.png,dog\n./a.png,dog\n"))


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("set.csv", "path,label,caption\na.png,Käse,a b\nb.png,dog,\n", "utf-8"),
        ("set.csv", "path, label, caption\na.png, Käse, a b\nb.png, dog,\n", "utf-8-sig"),
        ("set.csv", "path;label;caption\r\na.png;Käse;a b\r\nb.png;dog;\r\n", "utf-8-sig"),
        ("set.csv", "Path,Label,Caption\na.png,Käse,a b\nb.png,dog,\n", "utf-16"),
        ("set.csv", "FilePath\tclass\ttitle\na.png\tKäse\ta b\nb.png\tdog\t\n", "utf-16"),
        ("set.tsv", "file_name\tcategory\ttext\na.png\tKäse\ta b\nb.png\tdog\t\n", "utf-8"),
        ("set.csv", '"image","label","caption"\n"a.png","Käse","a b"\n\n"b.png","dog",""\n', "utf-8"),
        ("set.csv", "path,label,caption\na.png,Ka\u0308se,a b\nb.png,dog,\n", "utf-8"),
        ("set.csv", "path,label,caption\n./a.png,Käse,a b\n.\\b.png,dog,\n", "utf-8"),
    ],
)
def test_tables_of_many_programs_say_the_same(top, name, text, encoding):
    images = gu.load_images(table(top, text, name, encoding))
    assert stems(images) == ["a", "b"] and images.names == ["Käse", "dog"] and images.captions == [["a b"], []]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", "a.png,cat\nb.png,dog\n", r"set.csv has no column 'path'; its first line holds a.png, cat; it seems"),
        ("set.csv", "picture,label\na.png,cat\n", "its first line holds picture, label; name it 'path'"),
        ("set.csv", "", "its first line holds nothing"),
        ("set.csv", "path,label\n", "names no images"),
        ("set.csv", "path,label\na.png,a, b\n", "line 2 has 3 columns where the first line has 2"),
        ("set.csv", "path,label,caption\na.png,cat\n", "line 2 has 2 columns where the first line has 3"),
        ("set.csv", "path,label\na.png,cat\n,dog\n", "line 3 has no path"),
        ("set.csv", "path,label,label\na.png,cat,dog\n", "two columns are called 'label'"),
        ("set.csv", 'path,caption\na.png,"stop" sign\n', "line 2: .*quotation mark left open"),
        ("set.csv", 'path,caption\na.png,"stop sign\nb.png,dog\n', "line 2: .*quotation mark left open"),
        ("set.csv", 'path,caption\na.png,"stop\nb.png,a\nc.png,he says "\n', "line 2: a quotation mark takes in the lines"),
        ("set.csv", "path,label\na.png,cat\nb.png,Käse\n".encode("cp1252"), r"is not utf-8 .*save the file as UTF-8"),
        ("set.csv", "path,label\na.png,cat\n".encode("utf-16-le"), "line 1 holds zero bytes: save the file as UTF-8"),
        ("set.csv", "path,label\na.png,cat\n".encode("utf-32"), "line 1 holds zero bytes: save the file as UTF-8"),
        ("set.csv", "path,split\na.png,train\nb.png,val\n", r"\(with train, val\) but no image in split 'test'"),
        ("set.csv", "path\nx.png\ny.png\n", "none of its 2 images is there; paths count from its folder"),
        ("set.parquet", b"PAR1 or not", "set.parquet cannot be read as a parquet table"),
    ],
)  # fmt: skip
def test_a_table_that_could_mean_something_else_is_refused_with_line_and_remedy(top, name, content, message):
    (top / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        gu.load_images(top / name)


def test_a_text_of_a_tsv_may_begin_with_a_quotation_mark_and_may_be_quoted(top):
    text = 'path\tcaption\na.png\t"stop the car\nb.png\t"quoted, with ""marks"" in it"\nc.png\t"one" and "two"\n'
    images = gu.load_images(table(top, text, "set.tsv"))
    assert images.captions == [['"stop the car'], ['quoted, with "marks" in it'], ['"one" and "two"']]


def test_missing_images_are_left_out_and_named(top, capsys):
    images = gu.load_images(table(top, "path,label\na.png,cat\nx.png,dog\nb.png,dog\n"))
    assert stems(images) == ["a", "b"] and images.names == ["cat", "dog"] and len(images.left_out) == 1
    assert "set: 2 images, 2 classes, no splits; 1 file left out: " in capsys.readouterr().out
    assert "x.png (it is not there)" in images.left_out[0]


def test_values_of_a_parquet_table_keep_their_meaning(top):
    lines = {
        "path": ["a.png", "b.png", "c.png"],
        "label": [3.0, 12.0, 3.0],  # whole numbers, which pandas made floats of
        "caption": [["a cat", "a pet"], None, []],
        "group": [None, "x", None],
        "width": [1, 2, 3],
    }
    pq.write_table(pa.table(lines), top / "set.parquet")
    images = gu.load_images(top / "set.parquet")
    assert images.names == ["12", "3"] and images.labels.tolist() == [1, 0, 1]
    assert images.captions == [["a cat", "a pet"], [], []] and images.groups.tolist() == ["", "x", ""]
    pq.write_table(pa.table({"path": ["a.png"], "caption": [float("nan")], "label": [0]}), top / "set.parquet")
    images = gu.load_images(top / "set.parquet")
    assert images.captions is None and images.names == ["0"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"path": ["a.png"], "label": [["cat", "dog"]]}, "line 2: a list .* where one text or number belongs"),
        ({"image": [{"bytes": b"x", "path": "a.png"}]}, "line 2: a dict .* where one text or number belongs"),
        ({"path": ["a.png", "b.png"], "label": ["cat", None]}, "1 of 2 images have no label, for example .*b.png"),
    ],
)
def test_what_no_cell_can_mean_is_refused(top, lines, message):
    pq.write_table(pa.table(lines), top / "set.parquet")
    with pytest.raises(ValueError, match=message):
        gu.load_images(top / "set.parquet")


def test_the_line_of_a_load_says_which_columns_were_taken_as_what(top, capsys):
    gu.load_images(table(top, "filepath,title,width,split\na.png,a cat,9,test\nb.png,a dog,9,val\n"))
    said = "set: 1 image, 1 caption, split test; beside it val 1; columns: filepath as path, title as caption; columns not used: width\n"
    assert capsys.readouterr().out == said


# --- captions ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "given",
    [
        {"red": ["ein Käse"], "blue": ["b1", "b2"]},
        {"red": "ein Käse", "blue": {"group": "x", "captions": ["b1", "b2"]}},
        {"red": "ein Ka\u0308se ", "blue": ["b1", None, "b2", ""]},
    ],
)
def test_captions_json_in_any_common_form_gives_the_same_captions(folder, given, encoding):
    (folder / "captions.json").write_bytes(json.dumps(given, ensure_ascii=False).encode(encoding))
    images = gu.load_images(folder)
    assert images.captions == [["b1", "b2"]] * 4 + [[]] * 4 + [["ein Käse"]] * 4


def test_captions_json_may_name_files(folder, top):
    (folder / "captions.json").write_text(json.dumps({"red/0.png": "the first", "red": "red"}))
    assert gu.load_images(folder).captions[8:10] == [["red", "the first"], ["red"]]
    (top / "captions.json").write_text(json.dumps({"a.png": ["a cat"], "c.png": "a dog"}))
    assert gu.load_images(top).captions == [["a cat"], [], ["a dog"], []]


def test_tars_of_several_splits_are_told_by_their_names(tmp_path, cache, capsys):
    tmp_path = tmp_path / "shards"
    tmp_path.mkdir()
    for split, number in (("train", 2), ("val", 3)):
        for shard in range(2):
            with tarfile.open(tmp_path / f"{split}-{shard:04d}.tar", "w") as tar:
                for i in range(number):
                    tar.add(picture(tmp_path / "x.png"), f"{shard}_{i}.png")
    (tmp_path / "x.png").unlink()
    assert len(gu.load_images(tmp_path, "validation")) == 6 and len(gu.load_images(tmp_path, "train")) == 4
    with pytest.raises(ValueError, match="has tars of train, validation, but no test"):
        gu.load_images(tmp_path)
    picture(tmp_path / "one.png")
    assert (
        len(gu.load_images(tmp_path)) == 1 and "4 tar files beside the pictures passed over" in capsys.readouterr().out
    )


def test_keys_of_captions_json_that_match_nothing_are_named(folder, capsys):
    (folder / "captions.json").write_text(json.dumps({"red": "red", "bleu": "blue"}))
    gu.load_images(folder)
    assert "no image for 1 keys of captions.json: bleu" in capsys.readouterr().out
    (folder / "captions.json").write_text(json.dumps({"rouge": "red"}))
    with pytest.raises(ValueError, match="captions.json: none of its keys, such as 'rouge', is the name of a class"):
        gu.load_images(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "must hold .*not a list"),
        (b'{"red": {"text": "a"}}', "'red': a dict without 'captions' .text."),
        (b'{"red": true}', "'red': a bool"),
        (b"[" * 100_000, "captions.json is damaged"),
        (b'{"0.png": "which?"}', "'0.png' names 3 images; write the folder too, as in 'blue/0.png'"),
        (b'{"red": [["a", {"b": 1}]]}', "captions.json, 'red': a dict .* give a list of texts"),
        (b'{"red": "a"', "captions.json is damaged"),
        (b'{"red": "K\xe4se"}', "captions.json, after line 0, is not utf-8"),
    ],
)
def test_a_wrong_captions_json_is_named(folder, content, message):
    (folder / "captions.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gu.load_images(folder)


def test_an_image_set_takes_a_text_for_a_list_of_one_and_refuses_what_does_not_belong_together():
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    images = gu.ImageSet("two", pixels, captions=["a dog", ["a cat", "a pet"]])
    assert images.captions == [["a dog"], ["a cat", "a pet"]]
    assert image_set.text_queries(images)[0] == ["a cat", "a dog", "a pet"]
    wrong = {
        "captions needs one entry for each of 2 images": {"captions": ["a dog"]},
        "captions are lists of strings for each image, not 3": {"captions": [["a"], [3]]},
        "labels needs one entry": {"labels": np.array([1])},
        "labels are class numbers from 0, not <U3 such as": {"labels": ["cat", "dog"]},
        "labels are class numbers from 0, not float64": {"labels": np.array([0.0, 1.0])},
        "labels are class numbers from 0, not int64": {"labels": np.array([0, -1])},
        "label 1 has no name": {"labels": np.array([0, 1]), "names": ["cat"]},
        "groups needs one entry": {"groups": "ab"},
    }
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=f"two: {message}"):
            gu.ImageSet("two", pixels, **fields)
    with pytest.raises(ValueError, match=r"uint8 \(n, height, width, 3\), not float32"):
        gu.ImageSet("two", np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="must be a list of paths"):
        gu.ImageSet("two", "photos")


def test_the_text_of_a_class_is_the_longest_caption_that_all_its_images_share_or_its_name():
    told = [["a pet", "a red cat", "x"], ["a red cat", "a pet"], ["a dog"], ["one dog"], ["a bird"]]
    images = gu.ImageSet("pets", [f"{i}.png" for i in range(5)], [0, 0, 1, 1, 2], None, told, ["cat", "dog", "bird"])
    texts, own = image_set.class_texts(images)
    assert texts == ["a bird", "a red cat", "dog"] and own.tolist() == [1, 1, 2, 2, 0]
    blank = gu.ImageSet(
        "pets", images.images, images.labels, captions=[[" "], [" "], [""], [""], []], names=images.names
    )
    assert image_set.class_texts(blank)[0] == ["bird", "cat", "dog"], "a blank caption says nothing"
    without = gu.ImageSet("pets", images.images, images.labels, names=images.names)
    assert image_set.class_texts(without)[0] == ["bird", "cat", "dog"], "no captions at all: names"


# --- folders ---


def test_folders_of_the_system_are_no_classes_and_are_named(folder, capsys):
    for name in (".ipynb_checkpoints", ".Trash-1000", "@eaDir", "__MACOSX", "red/@eaDir", "red/.thumbs"):
        picture(folder / name / "0.png")
    picture(folder / "red" / "._0.png")
    images = gu.load_images(folder)
    assert images.names == ["blue", "green", "red"] and len(images) == 12
    said = capsys.readouterr().out
    assert said.startswith(
        "photos: 12 images, 3 classes, no splits; passed over: .Trash-1000, .ipynb_checkpoints, @eaDir"
    )


def test_class_folders_and_files_may_be_symbolic_links_and_a_circle_ends(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "red").rename(tmp_path / "elsewhere" / "red")
    (folder / "red").symlink_to(tmp_path / "elsewhere" / "red")
    (folder / "blue" / "9.png").symlink_to(tmp_path / "elsewhere" / "red" / "0.png")
    (folder / "blue" / "round").symlink_to(folder)
    images = gu.load_images(folder)
    assert images.names == ["blue", "green", "red"] and len(images) == 13


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_that_may_not_be_opened_is_named(folder, capsys):
    (folder / "green").chmod(0)
    assert len(gu.load_images(folder)) == 8 and "green (Permission denied)" in capsys.readouterr().out
    (folder / "green").chmod(0o755)


def test_what_pillow_reads_is_read_and_other_pictures_are_named_and_counted(folder, capsys):
    picture(folder / "red" / "9.jfif", format="jpeg")
    picture(folder / "red" / "8.avif")
    picture(folder / "red" / "7.jp2", format="jpeg")  # by its name something else
    for name in ("1.heic", "2.HEIC", "3.cr2", "4.svg"):
        (folder / "blue" / name).write_bytes(b"not for Pillow")
    (folder / "blue" / "notes.txt").write_text("no picture")
    images = gu.load_images(folder)
    assert (
        len(images) == 15
        and len(images.left_out) == 4
        and {path.suffix for path in images.images} >= {".jfif", ".avif"}
    )
    said = capsys.readouterr().out
    assert "4 files left out" in said and "blue/1.heic (this Pillow cannot read .heic)" in said and "and 1 more" in said
    assert [images[row].size for row in range(12, 15)] == [(40, 30)] * 3
    assert len(gu.load_images(folder).subset(np.arange(3)).left_out) == 4


def test_a_folder_without_readable_pictures_says_what_is_in_it(tmp_path):
    (tmp_path / "one.heic").write_bytes(b"x")
    (tmp_path / "two.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no images below .*found only files with .heic, .mp4; readable here: .*.jpg"):
        gu.load_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images below .*it is empty"):
        gu.load_images(tmp_path / "empty")


def split_folder(top, *names):
    for i, name in enumerate(names):
        for j in range(i + 1):
            picture(top / name / "cat" / f"{j}.png")
    return top


@pytest.mark.parametrize(
    ("names", "asked", "number"),
    [
        (("train", "val", "test"), "test", 3),
        (("train", "val", "test"), "validation", 2),
        (("Train", "valid"), "validation", 2),
        (("training", "dev", "testing"), "train", 1),
        (("train", "test", "extra"), "test", 2),
        (("query", "gallery"), "gallery", 2),
        (("shifted", "other"), "shifted", 1),
        (("data/train", "data/test"), "test", 2),
        (("train_set", "test_set"), "train", 1),
        (("train2017", "val2017"), "validation", 2),
    ],
)
def test_a_split_is_found_under_each_of_its_common_names(tmp_path, names, asked, number, capsys):
    assert len(gu.load_images(split_folder(tmp_path / "set", *names), asked)) == number
    said = capsys.readouterr().out
    assert f"set: {number} image" in said and ("passed over: extra" in said) == ("extra" in names)
    picture(tmp_path / "set" / "loose.png")
    gu.load_images(tmp_path / "set", asked)
    assert "1 pictures beside the splits passed over" in capsys.readouterr().out or "/" in names[0]


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (("train", "val"), "test", "has train, val, but no test: images of several splits are not measured together"),
        (("train",), "test", "has train, but no test"),
        (("images/train", "images/val"), "test", "has train, val, but no test"),
        (("train", "test"), "validation", "has test, train, but no validation"),
        (("val", "validation", "test"), "validation", "has both val and validation"),
    ],
)
def test_splits_are_never_measured_together(tmp_path, names, asked, message):
    with pytest.raises(ValueError, match=message):
        gu.load_images(split_folder(tmp_path, *names), asked)


@pytest.mark.parametrize("names", [("control", "test"), ("bus", "car", "train")])
@pytest.mark.parametrize("asked", ["test", "train"])
def test_a_class_may_be_called_like_a_split(tmp_path, names, asked):
    for name in names:
        picture(tmp_path / name / "0.png")
    assert gu.load_images(tmp_path, asked).names == list(names)


def test_splits_inside_of_classes_are_refused(tmp_path):
    for label in ("cat", "dog"):
        for split in ("train", "test"):
            picture(tmp_path / label / split / "0.png")
    with pytest.raises(ValueError, match="the splits lie inside the classes .*arrange the folders as split/class/file"):
        gu.load_images(tmp_path)


def test_splits_of_a_table_have_the_same_names(top):
    path = table(top, "path,split\na.png,Train\nb.png,val\nc.png,testing\nd.png,test\n")
    assert [stems(gu.load_images(path, split)) for split in ("train", "validation", "test")] == [
        ["a"],
        ["b"],
        ["c", "d"],
    ]


def test_a_folder_that_is_called_like_a_data_set_is_read_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPNNS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GPNNS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "fetch_dataset", lambda *given: pytest.fail("it downloads"))
    picture(tmp_path / "flowers" / "rose" / "0.png")
    picture(tmp_path / "flowers" / "tulip" / "0.png")
    for source in ("flowers", "./flowers", tmp_path / "flowers"):
        assert gu.load_images(source).names == ["rose", "tulip"]
    for path in ("jpg/image_00001.jpg", "imagelabels.mat", "setid.mat"):
        (tmp_path / "data" / "flowers" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "flowers" / path).touch()
    with pytest.raises(
        ValueError, match="'flowers' is a folder here, and a data set that was found at .*write './flowers'"
    ):
        gu.load_images("flowers")
    assert gu.load_images("./flowers").names == ["rose", "tulip"]


# --- names ---


def test_names_that_unicode_writes_in_two_ways_are_the_same_name(tmp_path):
    one, other = unicodedata.normalize("NFC", "Müsli"), unicodedata.normalize("NFD", "Müsli")
    picture(tmp_path / "set" / "photo" / one / "a.png")
    picture(tmp_path / "set" / "sketch" / other / "b.png")
    (tmp_path / "set" / "captions.json").write_text(json.dumps({other: "a breakfast"}))
    images = gu.load_images(tmp_path / "set")
    assert images.names == [one] and images.captions == [["a breakfast"]] * 2
    (tmp_path / "set.csv").write_text(f"path,label\nset/photo/{other}/a.png,x\nset/sketch/{one}/b.png,y\n")
    images = gu.load_images(tmp_path / "set.csv")
    assert len(images) == 2 and not images.left_out and images[1].size == (40, 30)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_utf8_are_read_and_can_be_printed(tmp_path, cache, capsys):
    for label in (b"caf\xe9", b"th\xe9"):
        folder = os.fsencode(tmp_path / "set") + b"/" + label
        os.makedirs(folder)
        picture(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", folder + b"/\xff.png")
    images = gu.load_images(tmp_path / "set")
    assert images.names == ["caf\\xe9", "th\\xe9"]
    assert gu.embed_images(gu.load_encoder("pixels", "cpu"), images)[0].shape == (2, 768)
    open(os.fsencode(images.images[0]), "wb").close()
    with pytest.warns(UserWarning, match=r"1 of 2 images cannot be read .*caf\\xe9"):
        gu.embed_images(gu.load_encoder("pixels", "cpu"), images)
    print(*images.left_out)
    assert capsys.readouterr().out.encode("utf-8")


# --- every load says what it took ---


def test_every_load_ends_with_one_line_that_says_what_was_taken_as_what(tmp_path, capsys):
    for group in ("photo", "sketch"):
        for label in ("cat", "dog", "eel"):
            picture(tmp_path / "zoo.v2" / "test" / group / label / "0.png")
    (tmp_path / "zoo.v2" / "test" / "photo" / "cat" / "1.heic").touch()
    (tmp_path / "zoo.v2" / "captions.json").write_text(json.dumps({"cat": ["a cat", "a pet"]}))
    gu.load_images(tmp_path / "zoo.v2")
    said = capsys.readouterr().out
    assert said.startswith("zoo.v2: 6 images, 3 classes, 2 groups, 4 captions, split test; 1 file left out: ")
    assert said.count("\n") == 1
    gu.load_images("mini", "validation")
    assert capsys.readouterr().out == "mini validation: 1,200 images, 120 classes, 6 groups, 6,000 captions\n"
