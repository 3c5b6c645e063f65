"""The table of the papers' claims, `claims.csv`, and the conditions as curves, `claims_curves.csv`: `make claims`.

Each claim is a difference to its control: query by query, after the mean over seeds, with a 95 % interval. The scores
come from `claims/` (measure_claims.py, which trains what is missing there): with what the course ships this takes
half a minute, without it four to five hours on two cores, in parts that each go on after a break.

statistics -> claims -> curves -> files
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, skew

import gpnns_utils as gu
from gpnns import published_tables
from gpnns.claims import measure_claims

# --- statistics ------------------------------------------------------------------------------------------------------


def to_points(results: list[dict], task: str) -> np.ndarray:
    """Per cent for each query and seed, (seeds, n). task: an array's name, for ranks of texts and captions with the measure
    behind it: "text R@5", "caption R@1", "text mAP"."""
    name, _, measure = task.rpartition(" ")
    if measure == "mAP":
        return np.array([100 / result[name].astype(float) for result in results])  # one right answer: precision there
    if measure.startswith("R@"):
        return np.array([100.0 * (result[name] <= int(measure.removeprefix("R@"))) for result in results])
    return np.array([100 * result[task].astype(float) for result in results])


class Difference(NamedTuple):
    """A method minus its control, in points: the mean, its 95 % interval, and the mean of each seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def compare(method: np.ndarray, control: np.ndarray, classes: np.ndarray | None = None) -> Difference:
    """Query by query, seeds averaged first; both (seeds, n). classes: of the queries, which are then drawn class by class:
    images of a class succeed and fail together."""
    each = method - control
    score = gu.Score(each.mean(axis=0))
    return Difference(score.mean, *score.interval(classes), tuple(each.mean(axis=1)))


def load_test_classes() -> np.ndarray:
    return measure_claims.load_images_of("test").labels


def make_claim(
    claim: str, source: str, paper: float | None, found: Difference, condition: str, at_least: float = 0.0
) -> dict:
    """A line of the table, in points. A claim is shown when its whole interval lies above `at_least`."""
    line = {"claim": claim, "source": source, "paper": None if paper is None else round(float(paper), 1)}
    line |= {name: round(float(value), 2) for name, value in zip(("ours", "low", "high"), found, strict=False)}
    line |= {"seeds": len(measure_claims.SEEDS), "shown": "yes" if line["low"] > at_least else "no"}
    return line | {"condition": f"by seed {', '.join(f'{value:+.1f}' for value in found.seeds)}; {condition}"}


# --- claims ----------------------------------------------------------------------------------------------------------


def score_bases() -> list[dict]:
    return measure_claims.get_results("base", [{"base": str(seed)} for seed in measure_claims.SEEDS])


def claim_losses() -> list[dict]:
    image = {
        name: to_points(results, "image")
        for name, results in {"base": score_bases(), **measure_claims.score_ladder()}.items()
    }
    classes, domains = load_test_classes(), measure_claims.load_images_of("test").groups

    def gain(name: str, control: str = "base") -> Difference:
        return compare(image[name], image[control], classes)

    table = {
        line["loss"]: line["avg"]
        for line in published_tables.load_published("gpnns_table4")
        if line["model"] == "CLIP ViT-B"
    }
    tail, swept = (
        "classes of 2 to 45 images",
        f"rates chosen among {', '.join(f'{rate:g}' for rate in measure_claims.RATES)}",
    )
    lines = []
    for domain in dict.fromkeys(domains.tolist()):
        here = domains == domain
        found = compare(image["arcmargin"][:, here], image["base"][:, here], classes[here])
        lines.append(
            make_claim(
                f"ArcMargin lifts image search for unseen classes: {domain}", "GP-NNS, Table 4", None, found,
                f"base {image['base'][:, here].mean():.1f} mAP",
            )
        )  # fmt: skip
    return [
        make_claim(
            "ArcMargin lifts image search for unseen classes", "GP-NNS, Table 4", table["ArcMargin"] - table["-"],
            gain("arcmargin"), f"base {image['base'].mean():.1f} mAP; {swept}",
        ),
        *lines,
        make_claim(
            "The margin itself helps, beyond unit vectors and scale", "GP-NNS, Table 4", None,
            gain("arcmargin", "margin 0"),
            f"unit vectors and scale gain {gain('margin 0', 'softmax')} over a plain softmax",
        ),
        make_claim(
            "ArcMargin lifts more than ProxyAnchor", "GP-NNS, Table 4", table["ArcMargin"] - table["ProxyAnchor"],
            gain("arcmargin", "proxyanchor"), f"ProxyAnchor gains {gain('proxyanchor')} over the base",
        ),
        make_claim(
            "ArcMargin lifts more than a plain softmax", "GP-NNS, Table 4", table["ArcMargin"] - table["SCE"],
            gain("arcmargin", "softmax"), f"softmax gains {gain('softmax')} over the base",
        ),
        make_claim(
            "Margins by class size beat one margin on a long tail", "GUIE, 4th place", None,
            gain("adaptive, long tail", "arcmargin, long tail"),
            f"{tail}; margins {name_margins()} won on validation; one margin gains {gain('arcmargin, long tail')} over the base",
        ),
        make_claim(
            "Sub-centers beat one center on wrong labels", "GUIE, 4th place", None,
            gain("sub-centers, wrong labels", "arcmargin, wrong labels"),
            f"a tenth of the labels is wrong, which costs ArcMargin {gain('arcmargin, wrong labels', 'arcmargin')}",
        ),
    ]  # fmt: skip


def name_margins() -> str:
    """The lowest and highest margin that validation preferred on the long tail."""
    return "{} to {}".format(*measure_claims.OPTIONS[measure_claims.choose_ladder()["adaptive, long tail"]["way"]])


def claim_text() -> list[dict]:
    found, classes = measure_claims.score_text_models([str(seed) for seed in measure_claims.SEEDS]), load_test_classes()
    published = [line for line in published_tables.load_published("mcip_table1") if line["model"].startswith("OpenAI")]
    columns = ("flickr30k_t2i_r5", "coco_t2i_r5")
    base, image_only, two, mcip, both = (np.mean([line[column] for column in columns]) for line in published)
    options, texts = measure_claims.choose_text(), f"R@5 of {len(measure_claims.load_images_of('captions')):,} texts"

    def text(name: str, control: str) -> Difference:
        return compare(to_points(found[name], "text R@5"), to_points(found[control], "text R@5"))

    def image(name: str, control: str) -> Difference:
        return compare(to_points(found[name], "image"), to_points(found[control], "image"), classes)

    frontier_points, gentle = [p for p in make_frontier_curve() if p["x"] > 1], {}  # what keeps most text, with seed 0
    for kind in ("2SFT", "MCIP"):
        line = max((p for p in frontier_points if p["line"].startswith(kind)), key=lambda p: p["y"])
        kept = Difference(line["y"], line["low"], line["high"], ())
        gentle[kind] = (
            f"most text is kept with seed 0 by {line['line']}, {line['label']}: {kept}, images {line['x']:+.1f}"
        )
    chosen = f"share {options['mcip']['weight']}, rate {options['mcip']['rate']:g}"
    return [
        make_claim(
            "Image-only tuning loses text search: points lost", "MCIP, Table 1", base - image_only, text("base", "image-only"),
            f"{texts}; images gain {image('image-only', 'base')}",
        ),
        make_claim(
            "2SFT wins back text search that image-only tuning lost", "MCIP, Table 1", two - image_only,
            text("image-only+realigned", "image-only"), "the images stay where they are",
        ),
        make_claim(
            "2SFT lifts text search above the base", "MCIP, Table 1", two - base, text("image-only+realigned", "base"),
            f"control: the base, realigned on the same pairs, gains {text('base+realigned', 'base')}; {gentle['2SFT']}",
        ),
        make_claim(
            "2SFT lifts text search above the base realigned on the same pairs", "control", None,
            text("image-only+realigned", "base+realigned"), f"its images {image('image-only', 'base')}",
        ),
        make_claim(
            f"MCIP alone keeps text search at or above the base, to {measure_claims.TEXT_STAYS:g} points", "MCIP, Table 1", mcip - base,
            text("mcip", "base"), f"above image-only {text('mcip', 'image-only')}; {chosen}; {gentle['MCIP']}",
            at_least=-measure_claims.TEXT_STAYS,
        ),
        make_claim(
            f"MCIP stays within {measure_claims.WITHIN} mAP of image-only tuning in image search", "MCIP, Table 1", -0.1,
            image("mcip", "image-only"), "the setting with the best text on validation of those that stay there",
            at_least=-measure_claims.WITHIN,
        ),
        make_claim(
            "MCIP and realigned beats 2SFT in text search", "MCIP, Table 1", both - two,
            text("mcip+realigned", "image-only+realigned"),
            f"images {image('mcip', 'image-only')}; above the base {text('mcip+realigned', 'base')}",
        ),
    ]  # fmt: skip


SOUP_IN_PAPER, SINGLE_IN_PAPER = 81.03, 80.39  # greedy soup and best single CLIP ViT-B/32 on ImageNet: 2203.05482


def claim_soups() -> list[dict]:
    found, classes = measure_claims.score_soups(), load_test_classes()
    image = {name: to_points(found["soup"], name) for name in ("uniform", "greedy", "ensemble")}
    image |= {name: to_points(found[name], "image") for name in ("single", "long")}

    def gain(name: str, control: str) -> Difference:
        return compare(image[name], image[control], classes)

    takes = " and ".join(str(len(result["greedy takes"])) for result in found["soup"])
    done = measure_claims.score_soups(measure_claims.START_PASSES[-1], measure_claims.SEEDS[:1])
    after_all = compare(to_points(done["soup"], "greedy"), to_points(done["long"], "image"), classes)
    long_gain = compare(to_points(done["long"], "image"), to_points(done["start"], "image"), classes)
    return [
        make_claim(
            "A greedy soup beats the best of its four models", "model soups (2203.05482)", SOUP_IN_PAPER - SINGLE_IN_PAPER,
            gain("greedy", "single"),
            f"it takes {takes} of them; all four: {gain('uniform', 'single')}; the ensemble, four times the cost of a query: {gain('ensemble', 'single')}",
        ),
        make_claim(
            "A greedy soup beats one run of equal compute", "control", None, gain("greedy", "long"),
            f"as many steps from the same start, on all classes: {gain('long', 'single')} beside the best single model; from a start "
            f"that had {measure_claims.START_PASSES[-1]:.0f} passes instead of {measure_claims.EPOCHS:.0f}, seed 0, where the long run gains {long_gain}: {after_all}",
        ),
    ]  # fmt: skip


def claim_small() -> list[dict]:
    found = measure_claims.get_results("small", [{"base": str(seed)} for seed in measure_claims.SEEDS])
    ways = {way: to_points(found, way) for way in ("all", "first", "names", "images")}
    asking = load_test_classes()[1::2]  # every other image of a class asks for the others

    listed = ", ".join(
        f"{label} {ways[way].mean():.1f}"
        for way, label in {"all": "all 128 numbers", "first": "the first 64", "names": "PCA of texts", "images": "PCA of images"}.items()
    )  # fmt: skip
    return [
        make_claim(
            f"PCA of texts to 64 numbers holds what PCA of images holds, to {measure_claims.WITHIN} points", "GUIE, zero-shot", None,
            compare(ways["names"], ways["images"], asking), f"mP@5 of the base: {listed}", at_least=-measure_claims.WITHIN,
        ),
        make_claim(
            "PCA of texts to 64 numbers beats the first 64 of 128 numbers", "control", None,
            compare(ways["names"], ways["first"], asking),
            f"PCA of images {compare(ways['images'], ways['first'], asking)} beside the first 64",
        ),
    ]  # fmt: skip


def claim_neighbors() -> list[dict]:
    found, lines = measure_claims.score_nnn(), []
    published = published_tables.load_published("nnn_tables")
    for asks, direction in (("text", "text_to_image"), ("caption", "image_to_text")):
        effect = np.mean([line["nnn_r1"] - line["original_r1"] for line in published if line["direction"] == direction])
        first, whole = (
            compare(
                to_points(found["nnn"], f"{asks} nnn {measure}"), to_points(found["nnn"], f"{asks} plain {measure}")
            )
            for measure in ("R@1", "mAP")
        )
        leak = to_points([{"ranks": result["ranks"][-1]} for result in found[f"overlap {asks}"]], "ranks R@1")
        more = compare(leak, to_points(found["nnn"], f"{asks} nnn R@1"))
        lines.append(
            make_claim(
                f"NNN lifts {direction.replace('_', ' ')} search", "NNN, Tables 1 and 2", effect, first,
                f"R@1; mAP {whole}; the references share nothing with the queries; with the queries as references {more} more",
            )
        )  # fmt: skip
    counts = [[result[f"text {state} counts"] for result in found["nnn"]] for state in ("plain", "nnn")]

    def fall(*columns, axis: int = -1) -> np.ndarray:
        before, after = (np.mean([skew(c, axis=axis) for c in half], axis=0) for half in np.split(np.array(columns), 2))
        return before - after

    drawn = bootstrap(
        (*counts[0], *counts[1]), fall, paired=True, method="percentile", n_resamples=1000, batch=50,
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    before, after = ([float(skew(seed)) for seed in state] for state in counts)
    falls = tuple(np.subtract(before, after).tolist())
    lines.append(
        make_claim(
            "NNN makes hubs rarer: how far the skewness falls", "NNN, section 4", None, Difference(np.mean(falls), *drawn, falls),
            f"text to image, skewness of how often an image is among the first ten: {np.mean(before):.2f} before, {np.mean(after):.2f} after",
        )
    )  # fmt: skip
    return lines


# --- curves ----------------------------------------------------------------------------------------------------------


def make_point(curve: str, line: str, label: str, x: float, found: tuple) -> dict:
    """A point of a curve: y with its 95 % interval."""
    y, low, high = (round(float(value), 3) for value in found[:3])
    return {"curve": curve, "line": line, "label": label, "x": round(float(x), 4), "y": y, "low": low, "high": high}


def make_ladder_curve() -> list[dict]:
    """What each loss gains in image search (y, mAP points above the base) at the rate that suits it (x); three seeds."""
    base, options, lines = to_points(score_bases(), "image"), measure_claims.choose_ladder(), []
    for name, results in measure_claims.score_ladder().items():
        y = compare(to_points(results, "image"), base, load_test_classes())
        lines.append(make_point("ladder", name, options[name]["way"], options[name]["rate"], y))
    return lines


def make_refinements_curve() -> list[dict]:
    """What margins by class size and sub-centers win over plain ArcMargin on the same images (y, mAP points), each at the
    rate that suits it (x); three seeds."""
    options, lines = measure_claims.choose_ladder(), []
    image = {name: to_points(results, "image") for name, results in measure_claims.score_ladder().items()}
    for images in ("", ", long tail", ", wrong labels"):
        for line in ("adaptive", "sub-centers"):
            y = compare(image[line + images], image["arcmargin" + images], load_test_classes())
            lines.append(
                make_point("refinements", line, images.strip(", ") or "clean", options[line + images]["rate"], y)
            )
    return lines


PAIRS = (  # models, and what each is held against
    *((model, "base") for model in ("image-only", "base+realigned", "image-only+realigned", "mcip", "mcip+realigned")),
    ("mcip", "image-only"),
    ("mcip+realigned", "image-only+realigned"),
)


def make_models_curve() -> list[dict]:
    """What a model gains over another (label) in image search, mAP, and in text search, R@5 (x: 0 and 1); three seeds."""
    found, lines = measure_claims.score_text_models([str(seed) for seed in measure_claims.SEEDS]), []
    for model, other in PAIRS:
        for x, (task, classes) in enumerate((("image", load_test_classes()), ("text R@5", None))):
            y = compare(to_points(found[model], task), to_points(found[other], task), classes)
            lines.append(make_point("models", model, other, x, y))
    return lines


def make_frontier_curve() -> list[dict]:
    """How far training goes: what is gained with images (x, mAP) against text (y, R@5), by rate; seed 0."""
    base, models = measure_claims.get_results("base", [{"base": "0"}]), []
    for line, many in measure_claims.list_frontier().items():
        models += [
            (line, f"rate {options['rate']:g}", result)
            for options, result in zip(many, measure_claims.get_results("tuned", many), strict=True)
        ]
    models += [("2SFT", label, result) for label, result in measure_claims.score_2sft()]
    lines = []
    for line, label, result in models:
        x = (to_points([result], "image") - to_points(base, "image")).mean()
        y = compare(to_points([result], "text R@5"), to_points(base, "text R@5"))
        lines.append(make_point("frontier", line, label, x, y))
    return lines


def make_finders_curve() -> list[dict]:
    """What MCIP gains over image-only tuning at its own rate (y) by the share of true words in its captions (x); seed 0."""
    plain = measure_claims.get_results(
        "tuned", [measure_claims.drop_keys(measure_claims.choose_text()["mcip"], "finder", "weight")]
    )
    lines = []
    for finder, (share, result) in measure_claims.score_finders().items():
        kind, label = "found by an encoder", f"base {finder}"
        if finder == "own":
            kind, label = "the images' own captions", ""
        elif finder.startswith("read_"):
            kind, label = "found by reading, some replaced", f"{float(finder.removeprefix('read_')):.0%} kept"
        for task, name in (("text R@5", "text R@5"), ("image", "image mAP")):
            classes = load_test_classes() if task == "image" else None
            y = compare(to_points([result], task), to_points(plain, task), classes)
            lines.append(make_point("finder", f"{name}, {kind}", label, 100 * share, y))
    return sorted(lines, key=lambda point: (point["line"], point["x"]))


ROOMS = (*map(str, measure_claims.SEEDS), "longer_clean")  # bases that have learned less and more


def make_room_curve() -> list[dict]:
    """What 2SFT, MCIP and NNN gain in text search (y, R@5) on bases that have learned little or much (x, their own R@5)."""
    found, lines = measure_claims.score_text_models(list(ROOMS)), []
    found["NNN"] = [
        {"text": result["text nnn"]} for result in measure_claims.get_results("nnn", [{"base": base} for base in ROOMS])
    ]
    models = {
        "image-only": "image-only",
        "base+realigned": "base realigned",
        "image-only+realigned": "2SFT",
        "mcip": "MCIP",
        "mcip+realigned": "MCIP and realigned",
        "NNN": "NNN",
    }
    for model, line in models.items():
        for number, base in enumerate(ROOMS):
            before = to_points([found["base"][number]], "text R@5")
            y = compare(to_points([found[model][number]], "text R@5"), before)
            lines.append(make_point("room", line, base, before.mean(), y))
    return sorted(lines, key=lambda point: (point["line"], point["x"]))


def make_soups_curve() -> list[dict]:
    """What four ingredients, what is made of them, and one run of equal compute gain over their start (y, mAP points), by the
    passes that the start had (x): three seeds after the fewest, one after more."""
    classes, lines = load_test_classes(), []
    for passes in measure_claims.START_PASSES:
        found = measure_claims.score_soups(
            passes, measure_claims.SEEDS if passes == measure_claims.START_PASSES[0] else measure_claims.SEEDS[:1]
        )
        start = to_points(found["start"], "image")
        image = {f"{name} of the four": to_points(found["soup"], name) for name in ("uniform", "greedy", "ensemble")}
        image |= {
            "best of the four": to_points(found["single"], "image"),
            "equal compute": to_points(found["long"], "image"),
        }
        image |= {f"ingredient {i}": to_points(many, "image") for i, many in enumerate(found["ingredients"])}
        for name, values in image.items():
            label = f"start {start.mean():.1f} mAP, seeds {len(values)}"
            lines.append(make_point("soups", name, label, passes, compare(values, start, classes)))
    return lines


def make_relatives_curve() -> list[dict]:
    """What averages of four ingredients, and one along a single run, gain over one of the four, the second, in image search,
    mAP, and in text search, R@5 (x: 0 and 1); three seeds."""
    found, lines = measure_claims.score_relatives(), []
    control = found.pop("one run")
    for name, results in found.items():
        for x, (task, classes) in enumerate((("image", load_test_classes()), ("text R@5", None))):
            lines.append(
                make_point(
                    "relatives", name, task, x, compare(to_points(results, task), to_points(control, task), classes)
                )
            )
    return lines


def make_ingredients_curve() -> list[dict]:
    """What averaging adds to the mean of the ingredients (y, mAP points) by how far the best of them, as validation sees it,
    lies above that mean (x)."""
    lines = []
    for kind, sets in measure_claims.score_ingredients().items():
        for singles, soup in sets:
            image = to_points(singles, "image")
            alone = image[int(np.argmax([single["validation"][0] for single in singles]))].mean() - image.mean()
            y = compare(to_points([soup], "uniform"), image.mean(axis=0, keepdims=True), load_test_classes())
            lines.append(make_point("ingredients", kind, f"greedy takes {len(soup['greedy takes'])}", alone, y))
    return lines


def make_lines_curve() -> list[dict]:
    """mAP (y; its interval holds all three seeds) along the straight line between two models, by the share of the second (x)."""
    lines = []
    for line, results in measure_claims.score_lines().items():
        each = 100 * np.array([result["image"].astype(float).mean(axis=1) for result in results])
        for share, values in zip(measure_claims.SHARES, each.T, strict=True):
            lines.append(make_point("between", line, "", share, (values.mean(), values.min(), values.max())))
    return lines


def make_neighbors_curves() -> list[dict]:
    """NNN's gain (y, R@1) by the share of its references that are the queries themselves, and by the size of the gallery,
    there beside hubness; three bases."""
    found, lines = measure_claims.score_nnn(), []
    for asks, line in (("text", "text to image"), ("caption", "image to text")):
        plain = to_points(found["nnn"], f"{asks} plain R@1")
        for i, share in enumerate(measure_claims.OVERLAPS):
            after = to_points([{"ranks": result["ranks"][i]} for result in found[f"overlap {asks}"]], "ranks R@1")
            lines.append(make_point("overlap", line, "", share, compare(after, plain)))
    for i, size in enumerate(measure_claims.SIZES):
        plain, after = (
            to_points([{"ranks": result["ranks"][i, j]} for result in found["gallery"]], "ranks R@1") for j in (0, 1)
        )
        lines.append(make_point("gallery", "R@1 points won by NNN", "", size, compare(after, plain)))
        for j, line in enumerate(("hubness without NNN", "hubness with NNN")):
            each = [result["skewness"][i, j] for result in found["gallery"]]
            lines.append(make_point("gallery", line, "", size, (np.mean(each), min(each), max(each))))
    return lines


# --- files -----------------------------------------------------------------------------------------------------------


def write_table(file: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    gu.write_atomically(file, lambda stream: stream.write(text.getvalue().encode()))


CURVES = {
    "ladder": make_ladder_curve,
    "refinements": make_refinements_curve,
    "finder": make_finders_curve,
    "room": make_room_curve,
    "models": make_models_curve,
    "frontier": make_frontier_curve,
    "soups": make_soups_curve,
    "relatives": make_relatives_curve,
    "ingredients": make_ingredients_curve,
    "between": make_lines_curve,
    "neighbors": make_neighbors_curves,  # overlap and gallery
}


def load_curve(name: str, again: bool = False) -> list[dict]:
    """The points of a shipped curve. again: every training that it rests on is done anew first, in runs/claims_anew, where an
    interrupted one goes on; when all is there it takes the place of what was shipped, in `claims/` and both tables."""
    if again:
        folder = gu.work_folder() / "runs" / "claims_anew"
        command = [sys.executable, "-m", "gpnns.claims.claims_table", name]
        subprocess.run(command, env=os.environ | {"GPNNS_CLAIMS_ANEW": str(folder)}, check=True)
        for file in folder.glob("*.npz"):
            measure_claims.save_results(
                measure_claims.KEPT / file.name,
                measure_claims.read_results(measure_claims.KEPT / file.name) | measure_claims.read_results(file),
            )
        main()
    return [row for row in published_tables.read_numbers(gu.DATA / "claims_curves.csv") if row["curve"] == name]


def main() -> None:
    started = time.time()
    claims = [*claim_losses(), *claim_text(), *claim_soups(), *claim_small(), *claim_neighbors()]
    write_table(gu.DATA / "claims.csv", claims)
    write_table(gu.DATA / "claims_curves.csv", [point for curve in CURVES.values() for point in curve()])
    for line in claims:
        print(f"{line['shown']:>3}  {line['ours']:+6.2f} [{line['low']:+.2f}, {line['high']:+.2f}]  {line['claim']}")
    print(f"{(time.time() - started) / 60:.0f} min")


if __name__ == "__main__":
    if sys.argv[1:]:
        CURVES[sys.argv[1]]()  # trains and scores what this curve lacks, writes no table
    else:
        main()
