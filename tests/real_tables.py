"""Tables of real images for verification, in the form that `load_images` reads.

REAL is a folder with emoji/, omniglot/, clothing/ and weights/. It is not part of the project: tests that need it skip
where it is absent.
"""

import csv
import json
from pathlib import Path

import timm

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
MOBILENET = f"timm:tf_mobilenetv2_035@{REAL}/weights/mobilenetv2_035.safetensors"


@timm.models.register_model
def tf_mobilenetv2_035(pretrained: bool = False, pretrained_cfg_overlay: dict | None = None, **settings):
    """MobileNetV2 with the padding, batch norm and pictures that TensorFlow trained it with, under a name for timm."""
    pictures = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
    overlay = pictures | (pretrained_cfg_overlay or {})
    settings |= {"pad_type": "same", "bn_eps": 1e-3, "pretrained_cfg_overlay": overlay}
    return timm.models.efficientnet.mobilenetv2_035(pretrained, **settings)


def emoji(real: Path):
    """Concepts as labels, drawing styles as groups, keywords as captions, the name last."""
    concepts = json.loads((real / "emoji" / "split.json").read_text())["test"]
    captions = json.loads((real / "emoji" / "captions.json").read_text())
    for concept in concepts:
        words = captions[concept]["captions"]
        for vendor in ("fluentui", "noto", "openmoji", "twemoji"):
            yield real / "emoji" / vendor / f"{concept}.png", concept, vendor, "|".join([*words[1:], words[0]])


def omniglot(real: Path):
    """Test characters as labels, alphabets as groups."""
    alphabets = json.loads((real / "omniglot" / "split.json").read_text())["test"]
    for folder in sorted((real / "omniglot").iterdir()):
        alphabet = folder.name.split("__")[0]
        if alphabet in alphabets:
            for path in sorted(folder.glob("*.png")):
                yield path, folder.name, alphabet, ""


def clothing(real: Path):
    """Photos of clothes, their kind as label."""
    for path in sorted((real / "clothing" / "test").glob("*/*.jpg")):
        yield path, path.parent.name, "", path.parent.name


TABLES = {"emoji": emoji, "omniglot": omniglot, "clothing": clothing}


def write_table(name: str, out: Path, real: Path = REAL) -> Path:
    """Write out/<name>.csv for one of TABLES."""
    out.mkdir(parents=True, exist_ok=True)
    real = real.resolve()
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "caption"])
        writer.writerows(TABLES[name](real))
    return out / f"{name}.csv"
