"""The table of the papers' claims, `claims.csv`, and the conditions as curves, `claims_curves.csv`: `make claims`.

Each claim is a difference to its control: query by query, after the mean over seeds, with a 95 % interval. The scores
come from `claims/` (measure_claims.py, which trains what is missing there): with what the course ships this takes a
minute, without it about four hours on two cores, in parts that each go on after a break.

statistics -> claims -> curves -> files
"""

from __future__ import annotations

import csv
import io
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, skew

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from gpnns_utils.measure_claims import (  # noqa: E402
    CAPTION_WEIGHTS,
    OVERLAPS,
    SEEDS,
    SIZES,
    VARIETY,
    drop,
    found_by,
    frontier,
    images_of,
    ladder,
    ladder_options,
    neighbor_normalization,
    results_of,
    soups,
    text_models,
    text_options,
)

import gpnns_utils as gu  # noqa: E402

# --- statistics ------------------------------------------------------------------------------------------------------


def points(results: list[dict], task: str) -> np.ndarray:
    """Per cent for each query, its mean over seeds, (n,). task: an array's name, for ranks of texts and captions with the
    measure behind it: "text R@5", "caption R@1", "text mAP"."""
    name, _, measure = task.rpartition(" ")
    if measure == "mAP":
        return np.mean([100 / result[name].astype(float) for result in results], axis=0)
    if measure.startswith("R@"):
        return np.mean([100.0 * (result[name] <= int(measure.removeprefix("R@"))) for result in results], axis=0)
    return np.mean([100 * result[task].astype(float) for result in results], axis=0)


def interval(values: np.ndarray, task: str, where: np.ndarray | slice = slice(None)) -> tuple[float, float, float]:
    """Mean and 95 % interval: classes are drawn for image queries, which succeed and fail together, else queries."""
    labels = images_of("test").labels
    clusters = {len(labels): labels, (len(labels) + 1) // 2: labels[1::2]}[len(values)] if "image" in task else None
    score = gu.Score(values[where])
    return score.mean, *score.interval(None if clusters is None else clusters[where])


def row(claim: str, source: str, paper: float | None, found: tuple, condition: str, shown: bool | None = None) -> dict:
    """A line of the table. found: (mean, low, high) in points; a claim is shown when its whole interval is above 0, unless
    `shown` says otherwise."""
    ours, low, high = (round(float(value), 2) for value in found)
    line = {"claim": claim, "source": source, "paper": None if paper is None else round(float(paper), 1)}
    line |= {"ours": ours, "low": low, "high": high, "seeds": len(SEEDS)}
    return line | {"shown": "yes" if (low > 0 if shown is None else shown) else "no", "condition": condition}


def said(found: tuple) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found)


# --- claims ----------------------------------------------------------------------------------------------------------


def claims_of_losses() -> list[dict]:
    steps, bases = ladder(), results_of("base", [{"base": str(seed)} for seed in SEEDS])
    image = {name: points(results, "image") for name, results in {"base": bases, **steps}.items()}

    def gain(name: str, control: str, where: np.ndarray | slice = slice(None)) -> tuple:
        return interval(image[name] - image[control], "image", where)

    domains = images_of("test").groups
    by_domain = {domain: gain("arcmargin", "base", domains == domain) for domain in dict.fromkeys(domains.tolist())}
    weakest = min(by_domain, key=lambda domain: by_domain[domain][0])
    table = {line["loss"]: line["avg"] for line in gu.load_published("gpnns_table4") if line["model"] == "CLIP ViT-B"}
    units, whole = said(gain("margin 0", "base")), said(gain("arcmargin", "base"))
    plain = f"base {image['base'].mean():.1f} mAP"
    clean = f"on `train`, whose classes have 5 to 45 images; there ArcMargin gains {whole}"
    lost = said(gain("arcmargin, wrong labels", "arcmargin"))
    return [
        row(
            "ArcMargin lifts image search for unseen classes, in every domain", "GP-NNS, Table 4", table["ArcMargin"] - table["-"],
            gain("arcmargin", "base"), f"{plain}; the least in {weakest}, {said(by_domain[weakest])}",
            shown=all(low > 0 for _, low, _ in by_domain.values()),
        ),
        row(
            "The margin itself lifts, beside unit vectors and scale", "GP-NNS, Table 4", None, gain("arcmargin", "margin 0"),
            f"unit vectors and scale alone gain {units}",
        ),
        row(
            "ArcMargin lifts more than ProxyAnchor", "GP-NNS, Table 4", table["ArcMargin"] - table["ProxyAnchor"],
            gain("arcmargin", "proxyanchor"), f"ProxyAnchor gains {said(gain('proxyanchor', 'base'))}",
        ),
        row(
            "ArcMargin lifts more than a plain softmax", "GP-NNS, Table 4", table["ArcMargin"] - table["SCE"],
            gain("arcmargin", "softmax"), f"softmax gains {said(gain('softmax', 'base'))}",
        ),
        row(
            "Margins by class size beat one margin on a long tail", "GUIE, 4th place", None,
            gain("adaptive, long tail", "arcmargin, long tail"), f"classes of 2 to 45 images; {clean}",
        ),
        row(
            "Sub-centers beat one center on wrong labels", "GUIE, 4th place", None,
            gain("sub-centers, wrong labels", "arcmargin, wrong labels"),
            f"a tenth of the labels is wrong, which costs ArcMargin {lost}",
        ),
    ]  # fmt: skip


def claims_of_text() -> list[dict]:
    found = text_models([str(seed) for seed in SEEDS])
    published = [line for line in gu.load_published("mcip_table1") if line["model"].startswith("OpenAI")]
    columns = ("flickr30k_t2i_r5", "coco_t2i_r5")
    base, image_only, two, mcip, both = (np.mean([line[column] for column in columns]) for line in published)

    def gain(name: str, control: str, task: str = "text R@5") -> tuple:
        return interval(points(found[name], task) - points(found[control], task), task)

    pairs_alone = said(gain("base+realigned", "base"))
    costs, loses = gain("mcip", "image-only", "image"), gain("mcip", "base")
    options = text_options()
    rates = ", ".join(f"{name} {options[name]['rate']:g}" for name in options)
    heavy = results_of("tuned", [options["mcip"] | {"weight": max(CAPTION_WEIGHTS)}])
    kept = interval(points(heavy, "text R@5") - points(found["base"][:1], "text R@5"), "text")
    paid = interval(points(heavy, "image") - points(found["image-only"][:1], "image"), "image")
    at_most = f"with a share of {max(CAPTION_WEIGHTS)} text is {said(kept)} beside the base, images {said(paid)} beside image-only"
    return [
        row(
            "Image-only tuning loses text search", "MCIP, Table 1", image_only - base, gain("image-only", "base"),
            f"R@5 of {len(images_of('captions')):,} texts; images gain {said(gain('image-only', 'base', 'image'))}; rates chosen: {rates}",
            shown=gain("image-only", "base")[2] < 0,
        ),
        row(
            "2SFT wins back what image-only tuning lost in text search", "MCIP, Table 1", two - image_only,
            gain("image-only+realigned", "image-only"), "the images stay where they are",
        ),
        row(
            "2SFT lifts text search above the base", "MCIP, Table 1", two - base, gain("image-only+realigned", "base"),
            f"control: the base realigned on the same pairs gains {pairs_alone}",
        ),
        row(
            "MCIP alone keeps text search at or above the base", "MCIP, Table 1", mcip - base, loses,
            f"MCIP above image-only {said(gain('mcip', 'image-only'))}; {at_most}",
        ),
        row(
            "MCIP stays within 1.5 mAP of image-only tuning in image search", "MCIP, Table 1", -0.1, costs,
            f"share of the caption loss {options['mcip']['weight']}", shown=costs[1] > -1.5,
        ),
        row(
            "MCIP and realigned beats 2SFT in text search", "MCIP, Table 1", both - two,
            gain("mcip+realigned", "image-only+realigned"),
            f"images {said(gain('mcip+realigned', 'image-only+realigned', 'image'))}; above the base {said(gain('mcip+realigned', 'base'))}",
        ),
    ]  # fmt: skip


def claims_of_soups() -> list[dict]:
    found = soups()
    singles = [[found[f"ingredient {i}"][seed] for i in range(len(VARIETY))] for seed in range(len(SEEDS))]
    best_single = [max(many, key=lambda result: result["validation"][0]) for many in singles]
    uniform, long = points(found["soup"], "uniform image"), points(found["long"], "image")
    single, ensemble = points(best_single, "image"), points(found["soup"], "ensemble image")
    bound, greedy = said(interval(ensemble - uniform, "image")), points(found["soup"], "greedy image")
    takes = " and ".join(str(len(result["greedy takes"])) for result in found["soup"])
    return [
        row(
            "A soup of four beats the best of them", "model soups (2203.05482)", 81.03 - 80.39, interval(uniform - single, "image"),
            f"the ensemble, four times the cost of a query, lies {bound} beside the soup; greedy takes {takes} and lies {said(interval(greedy - uniform, 'image'))}",
        ),
        row(
            "A soup of four beats one run of equal compute", "control", None, interval(uniform - long, "image"),
            f"as many steps from the same start on all classes; it lies {said(interval(long - single, 'image'))} beside the best single model",
        ),
    ]  # fmt: skip


def claims_of_small() -> list[dict]:
    found = results_of("small", [{"base": str(seed)} for seed in SEEDS])
    ways = {way: points(found, way) for way in ("all", "first", "names", "images")}
    lost, more = interval(ways["names"] - ways["images"], "image"), interval(ways["names"] - ways["first"], "image")
    listed = ", ".join(f"{way} {values.mean():.1f}" for way, values in ways.items())
    return [
        row(
            "PCA of texts to 64 numbers holds what PCA of images holds, to 1.5 points", "GUIE, zero-shot", None, lost,
            f"mP@5 of the base: {listed}; above the first 64 numbers {said(more)}", shown=lost[1] > -1.5,
        )
    ]  # fmt: skip


def claims_of_neighbors() -> list[dict]:
    found, lines = neighbor_normalization(), []
    published = gu.load_published("nnn_tables")
    for asks, direction in (("text", "text_to_image"), ("caption", "image_to_text")):
        effect = np.mean([line["nnn_r1"] - line["original_r1"] for line in published if line["direction"] == direction])
        gains = {
            measure: interval(points(found["nnn"], f"{asks} nnn {measure}") - points(found["nnn"], f"{asks} plain {measure}"), asks)
            for measure in ("R@1", "mAP")
        }  # fmt: skip
        leak = [{"ranks": result["ranks"][-1]} for result in found[f"overlap {asks}"]]
        above = interval(points(leak, "ranks R@1") - points(found["nnn"], f"{asks} nnn R@1"), asks)
        lines.append(
            row(
                f"NNN lifts {direction.replace('_', ' ')} search", "NNN, Tables 1 and 2", effect, gains["R@1"],
                f"R@1; mAP {said(gains['mAP'])}; references share no text with the queries, with the queries themselves it would be {said(above)} more",
            )
        )  # fmt: skip
    counts = [[result[f"text {state} counts"] for result in found["nnn"]] for state in ("plain", "nnn")]
    before, after = (np.mean([skew(seed) for seed in state]) for state in counts)

    def fall(*columns, axis: int = -1) -> np.ndarray:
        half = len(columns) // 2
        return np.mean([skew(column, axis=axis) for column in columns[:half]], axis=0) - np.mean(
            [skew(column, axis=axis) for column in columns[half:]], axis=0
        )

    drawn = bootstrap(
        (*counts[0], *counts[1]), fall, paired=True, method="percentile", n_resamples=1000, batch=50,
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    lines.append(
        row(
            "NNN makes hubs rarer", "NNN, section 4", None, (before - after, *drawn),
            f"text to image, skewness of how often an image is among the first ten: {before:.2f} before, {after:.2f} after",
        )
    )  # fmt: skip
    return lines


# --- curves ----------------------------------------------------------------------------------------------------------


def point(curve: str, line: str, label: str, x: float, found: tuple) -> dict:
    """A point of a curve: y with its 95 % interval."""
    y, low, high = (round(float(value), 3) for value in found)
    return {"curve": curve, "line": line, "label": label, "x": round(float(x), 4), "y": y, "low": low, "high": high}


def curve_of_ladder() -> list[dict]:
    """What each loss gains in image search (y, mAP points above the base) at the rate that suits it (x); three seeds."""
    base = points(results_of("base", [{"base": str(seed)} for seed in SEEDS]), "image")
    options, lines = ladder_options(), []
    for name, results in ladder().items():
        y = interval(points(results, "image") - base, "image")
        lines.append(point("ladder", name, options[name]["way"], options[name]["rate"], y))
    return lines


def curve_of_frontier() -> list[dict]:
    """How far training goes: what is gained with images (x, mAP) against text (y, R@5), by rate; seed 0."""
    (base,), lines = results_of("base", [{"base": "0"}]), []
    for line, many in frontier().items():
        for options, result in zip(many, results_of("tuned", many), strict=True):
            x = (points([result], "image") - points([base], "image")).mean()
            y = interval(points([result], "text R@5") - points([base], "text R@5"), "text")
            lines.append(point("frontier", line, f"rate {options['rate']:g}", x, y))
    return lines


def curve_of_finders() -> list[dict]:
    """What MCIP gains over image-only tuning at its own rate (y) by the share of true words in its captions (x); seed 0."""
    options = text_options()["mcip"]
    (plain,) = results_of("tuned", [drop(options, "finder", "weight")])
    lines = []
    for finder, (share, result) in found_by().items():
        kind = "true captions, some replaced" if finder.startswith("true_") else "captions found by an encoder"
        label = finder.removeprefix("true_") if finder.startswith("true_") else f"base {finder}"
        for task, name in (("text R@5", "text R@5"), ("image", "image mAP")):
            y = interval(points([result], task) - points([plain], task), task)
            lines.append(point("finder", f"{name}, {kind}", label, 100 * share, y))
    return lines


ROOMS = (
    "epochs_5.5",
    "epochs_11",
    "0",
    "clean_33",
)  # bases, from the one that has learned least to the one that has most


def curve_of_room() -> list[dict]:
    """What 2SFT, MCIP and NNN gain in text search (y, R@5) on bases that have learned little or much (x, their own R@5)."""
    found, lines = text_models(list(ROOMS)), []
    found["NNN"] = [{"text": result["text nnn"]} for result in results_of("nnn", [{"base": base} for base in ROOMS])]
    names = {
        "image-only": "image-only",
        "image-only+realigned": "2SFT",
        "mcip": "MCIP",
        "mcip+realigned": "MCIP and realigned",
    }
    for model, line in (names | {"base+realigned": "base realigned", "NNN": "NNN"}).items():
        for number, base in enumerate(ROOMS):
            before = points([found["base"][number]], "text R@5")
            y = interval(points([found[model][number]], "text R@5") - before, "text")
            lines.append(point("room", line, base, before.mean(), y))
    return lines


def curves_of_neighbors() -> list[dict]:
    """NNN's gain (y, R@1) by the share of its references that are the queries themselves, and by the size of the gallery,
    there beside hubness; three bases."""
    found, lines = neighbor_normalization(), []
    for asks, line in (("text", "text to image"), ("caption", "image to text")):
        plain = points(found["nnn"], f"{asks} plain R@1")
        for i, share in enumerate(OVERLAPS):
            ranks = [{"ranks": result["ranks"][i]} for result in found[f"overlap {asks}"]]
            lines.append(point("overlap", line, "", share, interval(points(ranks, "ranks R@1") - plain, asks)))
    for i, size in enumerate(SIZES):
        plain, after = ([{"ranks": result["ranks"][i, j]} for result in found["gallery"]] for j in (0, 1))
        y = interval(points(after, "ranks R@1") - points(plain, "ranks R@1"), "text")
        lines.append(point("gallery", "R@1 points won by NNN", "", size, y))
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


def main() -> None:
    started = time.time()
    claims = [*claims_of_losses(), *claims_of_text(), *claims_of_soups(), *claims_of_small(), *claims_of_neighbors()]
    write_table(DATA / "claims.csv", claims)
    curves = [*curve_of_ladder(), *curve_of_finders(), *curve_of_room(), *curve_of_frontier(), *curves_of_neighbors()]
    write_table(DATA / "claims_curves.csv", curves)
    for line in claims:
        print(f"{line['shown']:>3}  {line['ours']:+6.2f} [{line['low']:+.2f}, {line['high']:+.2f}]  {line['claim']}")
    print(f"{(time.time() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
