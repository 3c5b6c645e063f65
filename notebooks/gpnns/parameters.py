"""Parameters of a notebook, wherever they come from: its own cell, papermill's -p, -y and -f, or a profile.

papermill makes 2024 of the text 2024 and knows no lists on the command line, and YAML makes text of 1e-4. So each
parameter becomes what its default is: text, a whole number, a number, yes or no, a list of texts, or a mapping of these
(`recipe`), also of mappings, in which every key that is not given keeps its default.
"""

from __future__ import annotations

import contextlib
import math
import re

import yaml

import gpnns_utils as gu

CHOICES = {
    "train": ("one", "all"),
    "recipe.start": ("means", "xavier"),
    "recipe.views": ("crop", "autoaugment"),
    "recipe.protocol": ("own", "paper"),
    "recipe.shared_captions": ("right", "wrong"),
    "method": ("best", "uniform", "greedy", "wise_ft", "model_stock", "lines"),
    "table": ("mini", "flowers", "gpnns", "mcip"),
    "protocol": ("", "own", "paper"),
}
COUNTS = ("k", "batch_size", "accumulate", "reference_images", "chunk", "top", "steps")
PAIRS = ("margin",)  # a number, or two: for the most and for the least frequent classes
SHARES = ("flip", "patch_dropout", "ema", "beta2", "caption_weight")


def take_parameters(notebook: str, given: dict) -> dict:
    """The parameters of a notebook as it uses them, from its `given` globals: of the kind of their defaults, and with the
    values of notebooks/profiles/<profile>.yml for those that equal their default.

    A profile without a file sets nothing: it is only a name for the results. Raises ValueError for a value that cannot be
    taken, and when a profile sets what the notebook does not know; it says which parameter, and what it may be.
    """
    folder = gu.COURSE / "profiles"
    files = {path.stem: path for path in sorted(folder.glob("*.yml"))}
    defaults = read_profile(files["mini"], notebook)
    taken = {name: convert(default, given[name], name) for name, default in defaults.items()}
    mappings = {name: default for name, default in defaults.items() if isinstance(default, dict)}
    profile = convert("mini", given["profile"], "profile").strip()
    if not re.fullmatch(r"\w[\w. -]*", profile):
        raise ValueError(
            f"profile names the folder of results, runs/{profile}: letters, digits, - and _, not {profile!r}"
        )
    if profile not in files:
        print(f"profile {profile}: a name for results only; with parameters of their own: {', '.join(files)}")
        return (
            taken
            | {name: merge_mappings(mapping, taken[name]) for name, mapping in mappings.items()}
            | {"profile": profile}
        )
    values = read_profile(files[profile], notebook)
    if unknown := values.keys() - defaults.keys():
        raise ValueError(f"profiles/{profile}.yml sets {', '.join(sorted(unknown))}, which {notebook} does not know")
    values = {
        name: convert(defaults[name], value, f"{name} in profiles/{profile}.yml") for name, value in values.items()
    }
    chosen = {name: value for name, value in values.items() if taken[name] == defaults[name] != value}
    for name, mapping in mappings.items():
        chosen[name] = keep_changes(mapping, values.get(name, {}), taken[name])
    if said := {name: value for name, value in chosen.items() if value != {}}:
        print(f"profile {profile} sets " + ", ".join(f"{name} = {value!r}" for name, value in said.items()))
    chosen |= {
        name: merge_mappings(merge_mappings(mapping, chosen[name]), taken[name]) for name, mapping in mappings.items()
    }
    return taken | chosen | {"profile": profile}


def merge_mappings(mapping: dict, values: dict) -> dict:
    """A mapping with `values` in place of its own, key by key, also in the mappings that it holds."""
    return mapping | {
        key: merge_mappings(mapping[key], value) if isinstance(value, dict) else value for key, value in values.items()
    }


def keep_changes(mapping: dict, values: dict, given: dict) -> dict:
    """Those of a profile's `values` that differ from the defaults and that a reader has not `given`."""
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = keep_changes(mapping[key], value, given.get(key, {}))
        elif key in given or value == mapping[key]:
            continue
        if value != {}:
            kept[key] = value
    return kept


def read_profile(path, notebook: str) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["notebooks"].get(notebook, {})


def convert(default, value, name: str):
    """`value` as the kind that `default` is; ValueError with the parameter's name and what it may be."""
    if isinstance(default, dict):
        return convert_to_mapping(default, value, name)
    full = name.partition(" ")[0]  # without "in profiles/..."
    short = full.rpartition(".")[2]
    full = f"recipe.{short}" if full.startswith("recipe.") else full
    if short in PAIRS and isinstance(value, list) and len(value) == 2:
        return [convert(default, number, name) for number in value]
    wanted = {
        str: convert_to_text,
        list: convert_to_list,
        bool: convert_to_switch,
        int: convert_to_whole,
        float: convert_to_number,
    }[type(default)]
    try:
        value = wanted(value)
    except ValueError as error:
        raise ValueError(f"{name} must be {error}, not {value!r}. Its default is {default!r}") from None
    if default and value == []:
        raise ValueError(f"{name} names nothing; its default is {default!r}")
    choices = CHOICES.get(full, [value])
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(filter(None, choices))}, not {value!r}")
    if short in COUNTS and value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")
    if short in SHARES and not 0 <= value <= 1:
        raise ValueError(f"{name} is a share from 0 to 1, not {value}")
    if isinstance(default, int) and not 0 <= value < 2**32:
        raise ValueError(f"{name} must be from 0 to {2**32 - 1}, not {value}")
    return value


def convert_to_text(value) -> str:
    if isinstance(value, bool | int | float):
        print(f"{value!r} is taken as text; where papermill changed it (007 becomes 7), give it with -r instead of -p")
        return str(value)
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def convert_to_mapping(default: dict, value, name: str) -> dict:
    """The keys that are given, each as what its default is; `value` is a mapping, or one as YAML and JSON write it."""
    with contextlib.suppress(yaml.YAMLError):
        value = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping such as {{margin: 0.1}}, not {value!r}")
    if unknown := value.keys() - default.keys():
        raise ValueError(f"{name} knows no {', '.join(map(str, unknown))}; it has {', '.join(default)}")
    head, space, rest = name.partition(" ")
    return {key: convert(default[key], one, f"{head}.{key}{space}{rest}") for key, one in value.items()}


def convert_to_list(value) -> list[str]:
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


def convert_to_switch(value) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).strip().lower() not in words:
        raise ValueError("True or False")
    return words[str(value).strip().lower()]


def convert_to_whole(value) -> int:
    with contextlib.suppress(ValueError):
        if convert_to_number(value) == int(convert_to_number(value)):
            return int(convert_to_number(value))
    raise ValueError("a whole number")


def convert_to_number(value) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a number")
    return number
