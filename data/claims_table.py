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

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from gpnns_utils.measure_claims import (  # noqa: E402
    EPOCHS,
    KEPT,
    OPTIONS,
    OVERLAPS,
    RATES,
    SEEDS,
    SHARES,
    SIZES,
    START_PASSES,
    TEXT_STAYS,
    WITHIN,
    between,
    drop,
    found_by,
    frontier,
    frontier_of_2sft,
    images_of,
    ladder,
    ladder_options,
    neighbor_normalization,
    relatives,
    results_in,
    results_of,
    save_results,
    sets_of_ingredients,
    soups,
    text_models,
    text_options,
)

import gpnns_utils as gu  # noqa: E402

# --- statistics ------------------------------------------------------------------------------------------------------


def points(results: list[dict], task: str) -> np.ndarray:
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


def difference(method: np.ndarray, control: np.ndarray, classes: np.ndarray | None = None) -> Difference:
    """Query by query, seeds averaged first; both (seeds, n). classes: of the queries, which are then drawn class by class:
    images of a class succeed and fail together."""
    each = method - control
    score = gu.Score(each.mean(axis=0))
    return Difference(score.mean, *score.interval(classes), tuple(each.mean(axis=1)))


def test_classes() -> np.ndarray:
    return images_of("test").labels


def row(claim: str, source: str, paper: float | None, found: Difference, condition: str, at_least: float = 0.0) -> dict:
    """A line of the table, in points. A claim is shown when its whole interval lies above `at_least`."""
    line = {"claim": claim, "source": source, "paper": None if paper is None else round(float(paper), 1)}
    line |= {name: round(float(value), 2) for name, value in zip(("ours", "low", "high"), found, strict=False)}
    line |= {"seeds": len(SEEDS), "shown": "yes" if line["low"] > at_least else "no"}
    return line | {"condition": f"by seed {', '.join(f'{value:+.1f}' for value in found.seeds)}; {condition}"}


# --- claims ----------------------------------------------------------------------------------------------------------


def base_results() -> list[dict]:
    return results_of("base", [{"base": str(seed)} for seed in SEEDS])


def claims_of_losses() -> list[dict]:
    image = {name: points(results, "image") for name, results in {"base": base_results(), **ladder()}.items()}
    classes, domains = test_classes(), images_of("test").groups

    def gain(name: str, control: str = "base") -> Difference:
        return difference(image[name], image[control], classes)

    table = {line["loss"]: line["avg"] for line in gu.load_published("gpnns_table4") if line["model"] == "CLIP ViT-B"}
    tail, swept = "classes of 2 to 45 images", f"rates chosen among {', '.join(f'{rate:g}' for rate in RATES)}"
    lines = []
    for domain in dict.fromkeys(domains.tolist()):
        here = domains == domain
        found = difference(image["arcmargin"][:, here], image["base"][:, here], classes[here])
        lines.append(
            row(
                f"ArcMargin lifts image search for unseen classes: {domain}", "GP-NNS, Table 4", None, found,
                f"base {image['base'][:, here].mean():.1f} mAP",
            )
        )  # fmt: skip
    return [
        row(
            "ArcMargin lifts image search for unseen classes", "GP-NNS, Table 4", table["ArcMargin"] - table["-"],
            gain("arcmargin"), f"base {image['base'].mean():.1f} mAP; {swept}",
        ),
        *lines,
        row(
            "The margin itself helps, beyond unit vectors and scale", "GP-NNS, Table 4", None,
            gain("arcmargin", "margin 0"),
            f"unit vectors and scale gain {gain('margin 0', 'softmax')} over a plain softmax",
        ),
        row(
            "ArcMargin lifts more than ProxyAnchor", "GP-NNS, Table 4", table["ArcMargin"] - table["ProxyAnchor"],
            gain("arcmargin", "proxyanchor"), f"ProxyAnchor gains {gain('proxyanchor')} over the base",
        ),
        row(
            "ArcMargin lifts more than a plain softmax", "GP-NNS, Table 4", table["ArcMargin"] - table["SCE"],
            gain("arcmargin", "softmax"), f"softmax gains {gain('softmax')} over the base",
        ),
        row(
            "Margins by class size beat one margin on a long tail", "GUIE, 4th place", None,
            gain("adaptive, long tail", "arcmargin, long tail"),
            f"{tail}; margins {ladder_margins()} won on validation; one margin gains {gain('arcmargin, long tail')} over the base",
        ),
        row(
            "Sub-centers beat one center on wrong labels", "GUIE, 4th place", None,
            gain("sub-centers, wrong labels", "arcmargin, wrong labels"),
            f"a tenth of the labels is wrong, which costs ArcMargin {gain('arcmargin, wrong labels', 'arcmargin')}",
        ),
    ]  # fmt: skip


def ladder_margins() -> str:
    """The lowest and highest margin that validation preferred on the long tail."""
    return "{} to {}".format(*OPTIONS[ladder_options()["adaptive, long tail"]["way"]])


def claims_of_text() -> list[dict]:
    found, classes = text_models([str(seed) for seed in SEEDS]), test_classes()
    published = [line for line in gu.load_published("mcip_table1") if line["model"].startswith("OpenAI")]
    columns = ("flickr30k_t2i_r5", "coco_t2i_r5")
    base, image_only, two, mcip, both = (np.mean([line[column] for column in columns]) for line in published)
    options, texts = text_options(), f"R@5 of {len(images_of('captions')):,} texts"

    def text(name: str, control: str) -> Difference:
        return difference(points(found[name], "text R@5"), points(found[control], "text R@5"))

    def image(name: str, control: str) -> Difference:
        return difference(points(found[name], "image"), points(found[control], "image"), classes)

    frontier_points, gentle = [p for p in curve_of_frontier() if p["x"] > 1], {}  # what keeps most text, with seed 0
    for kind in ("2SFT", "MCIP"):
        line = max((p for p in frontier_points if p["line"].startswith(kind)), key=lambda p: p["y"])
        kept = Difference(line["y"], line["low"], line["high"], ())
        gentle[kind] = (
            f"most text is kept with seed 0 by {line['line']}, {line['label']}: {kept}, images {line['x']:+.1f}"
        )
    chosen = f"share {options['mcip']['weight']}, rate {options['mcip']['rate']:g}"
    return [
        row(
            "Image-only tuning loses text search: points lost", "MCIP, Table 1", base - image_only, text("base", "image-only"),
            f"{texts}; images gain {image('image-only', 'base')}",
        ),
        row(
            "2SFT wins back text search that image-only tuning lost", "MCIP, Table 1", two - image_only,
            text("image-only+realigned", "image-only"), "the images stay where they are",
        ),
        row(
            "2SFT lifts text search above the base", "MCIP, Table 1", two - base, text("image-only+realigned", "base"),
            f"control: the base, realigned on the same pairs, gains {text('base+realigned', 'base')}; {gentle['2SFT']}",
        ),
        row(
            "2SFT lifts text search above the base realigned on the same pairs", "control", None,
            text("image-only+realigned", "base+realigned"), f"its images {image('image-only', 'base')}",
        ),
        row(
            f"MCIP alone keeps text search at or above the base, to {TEXT_STAYS:g} points", "MCIP, Table 1", mcip - base,
            text("mcip", "base"), f"above image-only {text('mcip', 'image-only')}; {chosen}; {gentle['MCIP']}",
            at_least=-TEXT_STAYS,
        ),
        row(
            f"MCIP stays within {WITHIN} mAP of image-only tuning in image search", "MCIP, Table 1", -0.1,
            image("mcip", "image-only"), "the setting with the best text on validation of those that stay there",
            at_least=-WITHIN,
        ),
        row(
            "MCIP and realigned beats 2SFT in text search", "MCIP, Table 1", both - two,
            text("mcip+realigned", "image-only+realigned"),
            f"images {image('mcip', 'image-only')}; above the base {text('mcip+realigned', 'base')}",
        ),
    ]  # fmt: skip


SOUP_IN_PAPER, SINGLE_IN_PAPER = 81.03, 80.39  # greedy soup and best single CLIP ViT-B/32 on ImageNet: 2203.05482


def claims_of_soups() -> list[dict]:
    found, classes = soups(), test_classes()
    image = {name: points(found["soup"], name) for name in ("uniform", "greedy", "ensemble")}
    image |= {name: points(found[name], "image") for name in ("single", "long")}

    def gain(name: str, control: str) -> Difference:
        return difference(image[name], image[control], classes)

    takes = " and ".join(str(len(result["greedy takes"])) for result in found["soup"])
    done = soups(START_PASSES[-1], SEEDS[:1])
    after_all = difference(points(done["soup"], "greedy"), points(done["long"], "image"), classes)
    long_gain = difference(points(done["long"], "image"), points(done["start"], "image"), classes)
    return [
        row(
            "A greedy soup beats the best of its four models", "model soups (2203.05482)", SOUP_IN_PAPER - SINGLE_IN_PAPER,
            gain("greedy", "single"),
            f"it takes {takes} of them; all four: {gain('uniform', 'single')}; the ensemble, four times the cost of a query: {gain('ensemble', 'single')}",
        ),
        row(
            "A greedy soup beats one run of equal compute", "control", None, gain("greedy", "long"),
            f"as many steps from the same start, on all classes: {gain('long', 'single')} beside the best single model; from a start "
            f"that had {START_PASSES[-1]:.0f} passes instead of {EPOCHS:.0f}, seed 0, where the long run gains {long_gain}: {after_all}",
        ),
    ]  # fmt: skip


def claims_of_small() -> list[dict]:
    found = results_of("small", [{"base": str(seed)} for seed in SEEDS])
    ways = {way: points(found, way) for way in ("all", "first", "names", "images")}
    asking = test_classes()[1::2]  # every other image of a class asks for the others

    listed = ", ".join(
        f"{label} {ways[way].mean():.1f}"
        for way, label in {"all": "all 128 numbers", "first": "the first 64", "names": "PCA of texts", "images": "PCA of images"}.items()
    )  # fmt: skip
    return [
        row(
            f"PCA of texts to 64 numbers holds what PCA of images holds, to {WITHIN} points", "GUIE, zero-shot", None,
            difference(ways["names"], ways["images"], asking), f"mP@5 of the base: {listed}", at_least=-WITHIN,
        ),
        row(
            "PCA of texts to 64 numbers beats the first 64 of 128 numbers", "control", None,
            difference(ways["names"], ways["first"], asking),
            f"PCA of images {difference(ways['images'], ways['first'], asking)} beside the first 64",
        ),
    ]  # fmt: skip


def claims_of_neighbors() -> list[dict]:
    found, lines = neighbor_normalization(), []
    published = gu.load_published("nnn_tables")
    for asks, direction in (("text", "text_to_image"), ("caption", "image_to_text")):
        effect = np.mean([line["nnn_r1"] - line["original_r1"] for line in published if line["direction"] == direction])
        first, whole = (
            difference(points(found["nnn"], f"{asks} nnn {measure}"), points(found["nnn"], f"{asks} plain {measure}"))
            for measure in ("R@1", "mAP")
        )
        leak = points([{"ranks": result["ranks"][-1]} for result in found[f"overlap {asks}"]], "ranks R@1")
        more = difference(leak, points(found["nnn"], f"{asks} nnn R@1"))
        lines.append(
            row(
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
        row(
            "NNN makes hubs rarer: how far the skewness falls", "NNN, section 4", None, Difference(np.mean(falls), *drawn, falls),
            f"text to image, skewness of how often an image is among the first ten: {np.mean(before):.2f} before, {np.mean(after):.2f} after",
        )
    )  # fmt: skip
    return lines


# --- curves ----------------------------------------------------------------------------------------------------------


def point(curve: str, line: str, label: str, x: float, found: tuple) -> dict:
    """A point of a curve: y with its 95 % interval."""
    y, low, high = (round(float(value), 3) for value in found[:3])
    return {"curve": curve, "line": line, "label": label, "x": round(float(x), 4), "y": y, "low": low, "high": high}


def curve_of_ladder() -> list[dict]:
    """What each loss gains in image search (y, mAP points above the base) at the rate that suits it (x); three seeds."""
    base, options, lines = points(base_results(), "image"), ladder_options(), []
    for name, results in ladder().items():
        y = difference(points(results, "image"), base, test_classes())
        lines.append(point("ladder", name, options[name]["way"], options[name]["rate"], y))
    return lines


def curve_of_refinements() -> list[dict]:
    """What margins by class size and sub-centers win over plain ArcMargin on the same images (y, mAP points), each at the
    rate that suits it (x); three seeds."""
    options, lines = ladder_options(), []
    image = {name: points(results, "image") for name, results in ladder().items()}
    for images in ("", ", long tail", ", wrong labels"):
        for line in ("adaptive", "sub-centers"):
            y = difference(image[line + images], image["arcmargin" + images], test_classes())
            lines.append(point("refinements", line, images.strip(", ") or "clean", options[line + images]["rate"], y))
    return lines


PAIRS = (  # models, and what each is held against
    *((model, "base") for model in ("image-only", "base+realigned", "image-only+realigned", "mcip", "mcip+realigned")),
    ("mcip", "image-only"),
    ("mcip+realigned", "image-only+realigned"),
)


def curve_of_models() -> list[dict]:
    """What a model gains over another (label) in image search, mAP, and in text search, R@5 (x: 0 and 1); three seeds."""
    found, lines = text_models([str(seed) for seed in SEEDS]), []
    for model, other in PAIRS:
        for x, (task, classes) in enumerate((("image", test_classes()), ("text R@5", None))):
            y = difference(points(found[model], task), points(found[other], task), classes)
            lines.append(point("models", model, other, x, y))
    return lines


def curve_of_frontier() -> list[dict]:
    """How far training goes: what is gained with images (x, mAP) against text (y, R@5), by rate; seed 0."""
    base, models = results_of("base", [{"base": "0"}]), []
    for line, many in frontier().items():
        models += [
            (line, f"rate {options['rate']:g}", result)
            for options, result in zip(many, results_of("tuned", many), strict=True)
        ]
    models += [("2SFT", label, result) for label, result in frontier_of_2sft()]
    lines = []
    for line, label, result in models:
        x = (points([result], "image") - points(base, "image")).mean()
        y = difference(points([result], "text R@5"), points(base, "text R@5"))
        lines.append(point("frontier", line, label, x, y))
    return lines


def curve_of_finders() -> list[dict]:
    """What MCIP gains over image-only tuning at its own rate (y) by the share of true words in its captions (x); seed 0."""
    plain = results_of("tuned", [drop(text_options()["mcip"], "finder", "weight")])
    lines = []
    for finder, (share, result) in found_by().items():
        kind, label = "found by an encoder", f"base {finder}"
        if finder == "own":
            kind, label = "the images' own captions", ""
        elif finder.startswith("read_"):
            kind, label = "found by reading, some replaced", f"{float(finder.removeprefix('read_')):.0%} kept"
        for task, name in (("text R@5", "text R@5"), ("image", "image mAP")):
            classes = test_classes() if task == "image" else None
            y = difference(points([result], task), points(plain, task), classes)
            lines.append(point("finder", f"{name}, {kind}", label, 100 * share, y))
    return sorted(lines, key=lambda point: (point["line"], point["x"]))


ROOMS = (*map(str, SEEDS), "longer_clean")  # bases that have learned less and more


def curve_of_room() -> list[dict]:
    """What 2SFT, MCIP and NNN gain in text search (y, R@5) on bases that have learned little or much (x, their own R@5)."""
    found, lines = text_models(list(ROOMS)), []
    found["NNN"] = [{"text": result["text nnn"]} for result in results_of("nnn", [{"base": base} for base in ROOMS])]
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
            before = points([found["base"][number]], "text R@5")
            y = difference(points([found[model][number]], "text R@5"), before)
            lines.append(point("room", line, base, before.mean(), y))
    return sorted(lines, key=lambda point: (point["line"], point["x"]))


def curve_of_soups() -> list[dict]:
    """What four ingredients, what is made of them, and one run of equal compute gain over their start (y, mAP points), by the
    passes that the start had (x): three seeds after the fewest, one after more."""
    classes, lines = test_classes(), []
    for passes in START_PASSES:
        found = soups(passes, SEEDS if passes == START_PASSES[0] else SEEDS[:1])
        start = points(found["start"], "image")
        image = {f"{name} of the four": points(found["soup"], name) for name in ("uniform", "greedy", "ensemble")}
        image |= {"best of the four": points(found["single"], "image"), "equal compute": points(found["long"], "image")}
        image |= {f"ingredient {i}": points(many, "image") for i, many in enumerate(found["ingredients"])}
        for name, values in image.items():
            label = f"start {start.mean():.1f} mAP, seeds {len(values)}"
            lines.append(point("soups", name, label, passes, difference(values, start, classes)))
    return lines


def curve_of_relatives() -> list[dict]:
    """What averages of four ingredients, and one along a single run, gain over one of the four, the second, in image search,
    mAP, and in text search, R@5 (x: 0 and 1); three seeds."""
    found, lines = relatives(), []
    control = found.pop("one run")
    for name, results in found.items():
        for x, (task, classes) in enumerate((("image", test_classes()), ("text R@5", None))):
            lines.append(
                point("relatives", name, task, x, difference(points(results, task), points(control, task), classes))
            )
    return lines


def curve_of_ingredients() -> list[dict]:
    """What averaging adds to the mean of the ingredients (y, mAP points) by how far the best of them, as validation sees it,
    lies above that mean (x)."""
    lines = []
    for kind, sets in sets_of_ingredients().items():
        for singles, soup in sets:
            image = points(singles, "image")
            alone = image[int(np.argmax([single["validation"][0] for single in singles]))].mean() - image.mean()
            y = difference(points([soup], "uniform"), image.mean(axis=0, keepdims=True), test_classes())
            lines.append(point("ingredients", kind, f"greedy takes {len(soup['greedy takes'])}", alone, y))
    return lines


def curve_of_lines_between() -> list[dict]:
    """mAP (y; its interval holds all three seeds) along the straight line between two models, by the share of the second (x)."""
    lines = []
    for line, results in between().items():
        each = 100 * np.array([result["image"].astype(float).mean(axis=1) for result in results])
        for share, values in zip(SHARES, each.T, strict=True):
            lines.append(point("between", line, "", share, (values.mean(), values.min(), values.max())))
    return lines


def curves_of_neighbors() -> list[dict]:
    """NNN's gain (y, R@1) by the share of its references that are the queries themselves, and by the size of the gallery,
    there beside hubness; three bases."""
    found, lines = neighbor_normalization(), []
    for asks, line in (("text", "text to image"), ("caption", "image to text")):
        plain = points(found["nnn"], f"{asks} plain R@1")
        for i, share in enumerate(OVERLAPS):
            after = points([{"ranks": result["ranks"][i]} for result in found[f"overlap {asks}"]], "ranks R@1")
            lines.append(point("overlap", line, "", share, difference(after, plain)))
    for i, size in enumerate(SIZES):
        plain, after = (
            points([{"ranks": result["ranks"][i, j]} for result in found["gallery"]], "ranks R@1") for j in (0, 1)
        )
        lines.append(point("gallery", "R@1 points won by NNN", "", size, difference(after, plain)))
        for j, line in enumerate(("hubness without NNN", "hubness with NNN")):
            each = [result["skewness"][i, j] for result in found["gallery"]]
            lines.append(point("gallery", line, "", size, (np.mean(each), min(each), max(each))))
    return lines


# --- files -----------------------------------------------------------------------------------------------------------


def write_table(file: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    gu.write_atomically(file, lambda stream: stream.write(text.getvalue().encode()))


CURVES = {
    "ladder": curve_of_ladder,
    "refinements": curve_of_refinements,
    "finder": curve_of_finders,
    "room": curve_of_room,
    "models": curve_of_models,
    "frontier": curve_of_frontier,
    "soups": curve_of_soups,
    "relatives": curve_of_relatives,
    "ingredients": curve_of_ingredients,
    "between": curve_of_lines_between,
    "neighbors": curves_of_neighbors,  # overlap and gallery
}


def load_curve(name: str, again: bool = False) -> list[dict]:
    """The points of a shipped curve. again: every training that it rests on is done anew first, in runs/claims_anew, where an
    interrupted one goes on; when all is there it takes the place of what was shipped, in `claims/` and both tables."""
    if again:
        folder = gu.work_folder() / "runs" / "claims_anew"
        command = [sys.executable, str(Path(__file__).resolve()), name]
        subprocess.run(command, env=os.environ | {"GPNNS_CLAIMS_ANEW": str(folder)}, check=True)
        for file in folder.glob("*.npz"):
            save_results(KEPT / file.name, results_in(KEPT / file.name) | results_in(file))
        main()
    return [row for row in gu.datasets.numbers_of(DATA / "claims_curves.csv") if row["curve"] == name]


def main() -> None:
    started = time.time()
    claims = [*claims_of_losses(), *claims_of_text(), *claims_of_soups(), *claims_of_small(), *claims_of_neighbors()]
    write_table(DATA / "claims.csv", claims)
    write_table(DATA / "claims_curves.csv", [point for curve in CURVES.values() for point in curve()])
    for line in claims:
        print(f"{line['shown']:>3}  {line['ours']:+6.2f} [{line['low']:+.2f}, {line['high']:+.2f}]  {line['claim']}")
    print(f"{(time.time() - started) / 60:.0f} min")


if __name__ == "__main__":
    if sys.argv[1:]:
        CURVES[sys.argv[1]]()  # trains and scores what this curve lacks, writes no table
    else:
        main()
