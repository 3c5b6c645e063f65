"""Parameters of a notebook, wherever they come from: its own cell, papermill's -p, -y and -f, or a profile.

papermill makes 2024 of the text 2024 and knows no lists on the command line, and YAML makes text of 1e-4. So each
parameter becomes what its default is: text, a whole number, a number, yes or no, a list of texts, or a mapping of these
(`recipe`), also of mappings, in which every key that is not given keeps its default.
"""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import yaml

import gpnns_utils as gu

CHOICES = {
    "recipe.start": ("means", "xavier"),
    "recipe.views": ("crop", "autoaugment"),
    "recipe.protocol": ("own", "paper"),
    "recipe.shared_captions": ("right", "wrong"),
    "method": ("best", "uniform", "greedy", "wise_ft", "model_stock", "lines"),
    "table": ("mini", "flowers", "gpnns", "mcip"),
    "protocol": ("", "own", "paper"),
}
COUNTS = ("k", "batch_size", "accumulate", "reference_images", "chunk", "top", "steps")
SHARES = ("flip", "patch_dropout", "ema", "beta2", "caption_weight")


def take_parameters(notebook: str, given: dict) -> dict:
    """The parameters of a notebook as it uses them, from its `given` globals: of the kind of their defaults, and with the
    values of notebooks/profiles/<profile>.yml for those that equal their default.

    A profile without a file sets nothing: it is only a name for the results. Raises ValueError for a value that cannot be
    taken, and when a profile sets what the notebook does not know; it says which parameter, and what it may be.
    """
    files = {path.stem: path for path in sorted((gu.COURSE / "profiles").glob("*.yml"))}
    nested = read_profile(files["mini"], notebook)
    defaults = flatten(nested, nested)
    typed = flatten({name: given[name] for name in nested}, nested)
    typed = {name: value for name, value in typed.items() if "." in name or value != defaults[name]}
    profile = convert("mini", given["profile"], "profile").strip()
    if not re.fullmatch(r"\w[\w. -]*", profile):
        raise ValueError(f"profile names the folder of results: letters, digits, - and _, not {profile!r}")
    if profile not in files:
        print(f"profile {profile}: a name for results only; with parameters of their own: {', '.join(files)}")
        return nest(defaults | typed) | {"profile": profile}
    values = read_profile(files[profile], notebook)
    if unknown := values.keys() - nested.keys():
        raise ValueError(f"profiles/{profile}.yml sets {', '.join(sorted(unknown))}, which {notebook} does not know")
    values = flatten(values, nested, where=f" in profiles/{profile}.yml")
    chosen = {name: value for name, value in values.items() if name not in typed and value != defaults[name]}
    if chosen:
        print(f"profile {profile} sets " + ", ".join(f"{name} = {value!r}" for name, value in chosen.items()))
    return nest(defaults | chosen | typed) | {"profile": profile}


def read_profile(path: Path, notebook: str) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["notebooks"].get(notebook, {})


def flatten(values: dict, defaults: dict, parent: str = "", where: str = "") -> dict:
    """The `values` of parameters as what their defaults are, those within mappings under names such as recipe.search.top.
    `where` is told in errors. A mapping may also come as the text that YAML and JSON make of it."""
    flat = {}
    for key, value in values.items():
        name, default = parent + key, defaults[key]
        if not isinstance(default, dict):
            flat[name] = convert(default, value, name, where)
            continue
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError(f"{name}{where} must be a mapping such as {{margin: 0.1}}, not {value!r}")
        if unknown := value.keys() - default.keys():
            raise ValueError(f"{name}{where} knows no {', '.join(map(str, unknown))}; it has {', '.join(default)}")
        flat |= flatten(value, default, f"{name}.", where)
    return flat


def nest(flat: dict) -> dict:
    """What `flatten` made, as mappings again."""
    nested = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    return nested


def convert(default: Any, value: Any, name: str, where: str = "") -> Any:
    """`value` as the kind that `default` is; ValueError with the parameter's name and what it may be."""
    head, _, short = name.rpartition(".")
    if short == "margin" and isinstance(value, list) and len(value) == 2:  # for the most and the least frequent classes
        return [convert(default, number, name, where) for number in value]
    name += where
    try:
        value = CONVERTERS[type(default)](value)
    except ValueError as error:
        raise ValueError(f"{name} must be {error}, not {value!r}. Its default is {default!r}") from None
    if default and value == []:
        raise ValueError(f"{name} names nothing; its default is {default!r}")
    choices = CHOICES.get(f"recipe.{short}" if head else short, [value])
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(filter(None, choices))}, not {value!r}")
    if short in COUNTS and value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")
    if short in SHARES and not 0 <= value <= 1:
        raise ValueError(f"{name} is a share from 0 to 1, not {value}")
    if isinstance(default, int) and not 0 <= value < 2**32:
        raise ValueError(f"{name} must be from 0 to {2**32 - 1}, not {value}")
    return value


def convert_to_text(value: Any) -> str:
    if isinstance(value, bool | int | float):
        print(f"{value!r} is taken as text; where papermill changed it (007 becomes 7), give it with -r instead of -p")
        return str(value)
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def convert_to_list(value: Any) -> list[str]:
    """A list, or text: names with commas between them, or a list in brackets as JSON, YAML and Python write it."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError('a list such as ["one", "two"]') from None
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        listed = [listed]
    return [text for one in listed if (text := convert_to_text(one).strip())]


def convert_to_switch(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ValueError("True or False")
    return word in ("true", "yes", "on", "1")


def convert_to_whole(value: Any) -> int:
    number = convert_to_number(value, "a whole number")
    if number != int(number):
        raise ValueError("a whole number")
    return int(number)


def convert_to_number(value: Any, kind: str = "a number") -> float:
    with contextlib.suppress(ValueError, TypeError):
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    raise ValueError(kind)


CONVERTERS = {
    str: convert_to_text, list: convert_to_list, bool: convert_to_switch, int: convert_to_whole, float: convert_to_number
}  # fmt: skip
