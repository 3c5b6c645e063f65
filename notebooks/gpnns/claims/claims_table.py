"""The table of the papers' claims, `claims.csv`, and the conditions as curves, `claims_curves.csv`: `make claims`.

Each claim is a difference to its control: query by query, after the mean over seeds, with a 95 % interval. The scores
come from `claims/` (measure_claims.py, which trains what is missing there): with what the course ships this takes
half a minute, without it four to five hours on two cores, in parts that each go on after a break.

statistics -> claims: what makes a line of each -> curves: of each point the curve, line, label, x, and y with its
interval -> files
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, skew

import gpnns_utils as gu
from gpnns import published_tables
from gpnns.claims import measure_claims as mc


def get_points(results: list[dict], task: str) -> np.ndarray:
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


def compare_results(
    method: list[dict], control: list[dict], task: str, control_task: str = "", domain: str = ""
) -> Difference:
    """Query by query, seeds averaged first. Texts are drawn one by one; images, in `domain` or all, class by class, as those
    of a class succeed and fail together."""
    each, images = get_points(method, task) - get_points(control, control_task or task), mc.load_images_of("test")
    classes = None if " " in task else images.labels[1::2] if task in CUTS else images.labels
    if domain:
        each, classes = each[:, images.groups == domain], classes[images.groups == domain]
    score = gu.Score(each.mean(axis=0))
    return Difference(score.mean, *score.interval(classes), tuple(each.mean(axis=1)))


def get_gain(method: str, control: str = "base", task: str = "image", **options) -> Difference:
    """What a model gains over another, both by name; options: of `compare_results`."""
    found = mc.score_models()
    return compare_results(found[method], found[control], task, **options)


def make_claim(
    claim: str, source: str, paper: float | None, found: Difference, condition: str, at_least: float = 0.0
) -> dict:
    """A line of the table, in points. A claim is shown when its whole interval lies above `at_least`."""
    line = {"claim": claim, "source": source, "paper": None if paper is None else round(float(paper), 1)}
    line |= {name: round(float(value), 2) for name, value in zip(("ours", "low", "high"), found, strict=False)}
    line |= {"seeds": len(mc.SEEDS), "shown": "yes" if line["low"] > at_least else "no"}
    return line | {"condition": f"by seed {', '.join(f'{value:+.1f}' for value in found.seeds)}; {condition}"}


def list_loss_claims() -> Iterator[tuple]:
    published, source = published_tables.load_published("gpnns_table4"), "GP-NNS, Table 4"
    paper = {line["loss"]: line["avg"] for line in published if line["model"] == "CLIP ViT-B"}
    base, domains = get_points(mc.score_models()["base"], "image"), mc.load_images_of("test").groups
    lifts, swept = "ArcMargin lifts image search for unseen classes", ", ".join(f"{rate:g}" for rate in mc.RATES)
    condition = f"base {base.mean():.1f} mAP; rates chosen among {swept}"
    yield lifts, source, paper["ArcMargin"] - paper["-"], get_gain("arcmargin"), condition
    for domain in dict.fromkeys(domains.tolist()):
        condition = f"base {base[:, domains == domain].mean():.1f} mAP"
        yield f"{lifts}: {domain}", source, None, get_gain("arcmargin", domain=domain), condition
    margin, unit = get_gain("arcmargin", "margin 0"), get_gain("margin 0", "softmax")
    condition = f"unit vectors and scale gain {unit} over a plain softmax"
    yield "The margin itself helps, beyond unit vectors and scale", source, None, margin, condition
    for way, name, column in (("proxyanchor", "ProxyAnchor", "ProxyAnchor"), ("softmax", "a plain softmax", "SCE")):
        condition = f"{name.removeprefix('a plain ')} gains {get_gain(way)} over the base"
        effect = paper["ArcMargin"] - paper[column]
        yield f"ArcMargin lifts more than {name}", source, effect, get_gain("arcmargin", way), condition
    adaptive, one = get_gain("adaptive, long tail", "arcmargin, long tail"), get_gain("arcmargin, long tail")
    lowest, highest = mc.OPTIONS[mc.list_models()["adaptive, long tail"][1][0]["way"]]
    condition = f"classes of 2 to 45 images; margins {lowest} to {highest} won on validation; one margin gains {one}"
    condition, source = f"{condition} over the base", "GUIE, 4th place"
    yield "Margins by class size beat one margin on a long tail", source, None, adaptive, condition
    centers = get_gain("sub-centers, wrong labels", "arcmargin, wrong labels")
    cost = get_gain("arcmargin, wrong labels", "arcmargin")
    condition = f"a tenth of the labels is wrong, which costs ArcMargin {cost}"
    yield "Sub-centers beat one center on wrong labels", source, None, centers, condition


def list_text_claims() -> Iterator[tuple]:
    source, columns = "MCIP, Table 1", ("flickr30k_t2i_r5", "coco_t2i_r5")
    published = [line for line in published_tables.load_published("mcip_table1") if line["model"].startswith("OpenAI")]
    base, plain, two, mcip, both = (np.mean([line[column] for column in columns]) for line in published)
    gentle = {}  # what keeps most text, with seed 0
    for kind in ("2SFT", "MCIP"):
        points = [point for _, *point in trace_frontier() if point[0].startswith(kind) and point[2] > 1]
        line, label, x, kept = max(points, key=lambda point: point[3].mean)
        gentle[kind] = f"most text is kept with seed 0 by {line}, {label}: {kept}, images {x:+.1f}"

    def gain(method: str, control: str = "base") -> Difference:
        return get_gain(method, control, "text R@5")

    options, images = mc.list_models()["mcip"][1][0], get_gain("image-only")
    two_sft, realigned = gain("image-only+realigned"), gain("base+realigned")
    condition = f"R@5 of {len(mc.load_images_of('captions')):,} texts; images gain {images}"
    lost = gain("base", "image-only")
    yield "Image-only tuning loses text search: points lost", source, base - plain, lost, condition
    back, condition = gain("image-only+realigned", "image-only"), "the images stay where they are"
    yield "2SFT wins back text search that image-only tuning lost", source, two - plain, back, condition
    condition = f"control: the base, realigned on the same pairs, gains {realigned}; {gentle['2SFT']}"
    yield "2SFT lifts text search above the base", source, two - base, two_sft, condition
    above, condition = gain("image-only+realigned", "base+realigned"), f"its images {images}"
    yield "2SFT lifts text search above the base realigned on the same pairs", "control", None, above, condition
    claim = f"MCIP alone keeps text search at or above the base, to {mc.TEXT_STAYS:g} points"
    condition = f"above image-only {gain('mcip', 'image-only')}; share {options['weight']}, rate {options['rate']:g}"
    yield claim, source, mcip - base, gain("mcip"), f"{condition}; {gentle['MCIP']}", -mc.TEXT_STAYS
    claim = f"MCIP stays within {mc.WITHIN} mAP of image-only tuning in image search"
    images = get_gain("mcip", "image-only")
    condition = "the setting with the best text on validation of those that stay there"
    yield claim, source, -0.1, images, condition, -mc.WITHIN
    beats = gain("mcip+realigned", "image-only+realigned")
    condition = f"images {images}; above the base {gain('mcip+realigned')}"
    yield "MCIP and realigned beats 2SFT in text search", source, both - two, beats, condition


SOUP_IN_PAPER, SINGLE_IN_PAPER = 81.03, 80.39  # greedy soup and best single CLIP ViT-B/32 on ImageNet: 2203.05482


def list_soup_claims() -> Iterator[tuple]:
    first, last = (f"after {passes:g}" for passes in (mc.EPOCHS, mc.START_PASSES[-1]))

    def gain(task: str, control: str, start: str = first) -> Difference:
        """Of a soup, or of the ensemble in its place."""
        return get_gain(f"soup {start}", f"{control} {start}", task, control_task="image")

    long, longer = get_gain(f"long run {first}", f"single {first}"), get_gain(f"long run {last}", f"start {last}")
    takes = " and ".join(str(len(result["greedy takes"])) for result in mc.score_models()[f"soup {first}"])
    condition = (
        f"it takes {takes} of them; all four: {gain('uniform', 'single')}; the ensemble, four times the cost of a "
    )
    condition += f"query: {gain('ensemble', 'single')}"
    claim, effect = "A greedy soup beats the best of its four models", SOUP_IN_PAPER - SINGLE_IN_PAPER
    yield claim, "model soups (2203.05482)", effect, gain("greedy", "single"), condition
    condition = f"as many steps from the same start, on all classes: {long} beside the best single model; from a start "
    condition += (
        f"that had {mc.START_PASSES[-1]:.0f} passes instead of {mc.EPOCHS:.0f}, seed 0, where the long run gains "
    )
    condition += f"{longer}: {gain('greedy', 'long run', last)}"
    yield "A greedy soup beats one run of equal compute", "control", None, gain("greedy", "long run"), condition


CUTS = {"all": "all 128 numbers", "first": "the first 64", "names": "PCA of texts", "images": "PCA of images"}


def list_cut_claims() -> Iterator[tuple]:
    def gain(way: str, control: str) -> Difference:
        return get_gain("small", "small", way, control_task=control)

    listed = {label: get_points(mc.score_models()["small"], way).mean() for way, label in CUTS.items()}
    condition = f"mP@5 of the base: {', '.join(f'{label} {mean:.1f}' for label, mean in listed.items())}"
    claim = f"PCA of texts to 64 numbers holds what PCA of images holds, to {mc.WITHIN} points"
    yield claim, "GUIE, zero-shot", None, gain("names", "images"), condition, -mc.WITHIN
    condition = f"PCA of images {gain('images', 'first')} beside the first 64"
    claim = "PCA of texts to 64 numbers beats the first 64 of 128 numbers"
    yield claim, "control", None, gain("names", "first"), condition


def list_neighbor_claims() -> Iterator[tuple]:
    found, published = mc.score_models(), published_tables.load_published("nnn_tables")
    for asks, direction in (("text", "text_to_image"), ("caption", "image_to_text")):
        effect = np.mean([line["nnn_r1"] - line["original_r1"] for line in published if line["direction"] == direction])
        first = get_gain("nnn", "nnn", f"{asks} nnn R@1", control_task=f"{asks} plain R@1")
        whole = get_gain("nnn", "nnn", f"{asks} nnn mAP", control_task=f"{asks} plain mAP")
        leaked = pick_ranks(found[f"overlap {asks}"], -1)
        more = compare_results(leaked, found["nnn"], "ranks R@1", f"{asks} nnn R@1")
        condition = f"R@1; mAP {whole}; the references share nothing with the queries; with the queries as references "
        condition += f"{more} more"
        yield f"NNN lifts {direction.replace('_', ' ')} search", "NNN, Tables 1 and 2", effect, first, condition
    counts = [[result[f"text {state} counts"] for result in found["nnn"]] for state in ("plain", "nnn")]

    def find_fall(*columns, axis: int = -1) -> np.ndarray:
        before, after = (np.mean([skew(c, axis=axis) for c in half], axis=0) for half in np.split(np.array(columns), 2))
        return before - after

    drawing = {"method": "percentile", "n_resamples": 1000, "batch": 50, "random_state": np.random.default_rng(0)}
    drawn = bootstrap((*counts[0], *counts[1]), find_fall, paired=True, **drawing).confidence_interval
    before, after = skew(counts, axis=-1)
    fall = Difference(np.mean(before - after), *drawn, tuple((before - after).tolist()))
    condition = "text to image, skewness of how often an image is among the first ten: "
    condition += f"{before.mean():.2f} before, {after.mean():.2f} after"
    yield "NNN makes hubs rarer: how far the skewness falls", "NNN, section 4", None, fall, condition


def pick_ranks(results: list[dict], *index: int) -> list[dict]:
    """Of ranks in several conditions, those of one."""
    return [{"ranks": result["ranks"][index]} for result in results]


def trace_losses() -> Iterator[tuple]:
    """What each loss gains in image search (y, mAP points above the base) at the rate that suits it (x), and what margins by
    class size and sub-centers win over plain ArcMargin on the same images; three seeds."""
    options = {name: mc.list_models()[name][1][0] for name in mc.LADDER}
    for name in mc.LADDER:
        yield "ladder", name, options[name]["way"], options[name]["rate"], get_gain(name)
    for images in ("", ", long tail", ", wrong labels"):
        for line in ("adaptive", "sub-centers"):
            found, rate = get_gain(line + images, "arcmargin" + images), options[line + images]["rate"]
            yield "refinements", line, images.strip(", ") or "clean", rate, found


def trace_finders() -> Iterator[tuple]:
    """What MCIP gains over image-only tuning at its own rate (y) by the share of true words in its captions (x); seed 0."""
    found, plain = mc.score_models(), f"image-only, rate {mc.list_models()['mcip'][1][0]['rate']:g}"
    points = []
    for finder in mc.FINDERS:
        kind, label = "found by an encoder", f"base {finder}"
        if finder == "own":
            kind, label = "the images' own captions", ""
        elif finder.startswith("read_"):
            kind, label = "found by reading, some replaced", f"{float(finder.removeprefix('read_')):.0%} kept"
        x = 100 * float(found[f"captions by {finder}"][0]["true words"])
        for task, name in (("text R@5", "text R@5"), ("image", "image mAP")):
            points.append(("finder", f"{name}, {kind}", label, x, get_gain(f"mcip by {finder}", plain, task)))
    yield from sorted(points, key=lambda point: (point[1], point[3]))


ROOM = {  # model: its name on the curve
    "image-only+realigned": "2SFT",
    "mcip": "MCIP",
    "mcip+realigned": "MCIP and realigned",
    "nnn": "NNN",
    "base+realigned": "base realigned",
    "image-only": "image-only",
}
PAIRS = (  # models, and what each is held against
    *((model, "base") for model in ("image-only", "base+realigned", "image-only+realigned", "mcip", "mcip+realigned")),
    ("mcip", "image-only"),
    ("mcip+realigned", "image-only+realigned"),
)


def trace_text_models() -> Iterator[tuple]:
    """What 2SFT, MCIP and NNN gain in text search (y, R@5) on bases that have learned little or much (x, their own R@5), and
    what a model gains over another (label) in image search, mAP, and in text search (x: 0 and 1) on three bases."""
    found, bases = mc.score_models(), [*map(str, mc.SEEDS), mc.STRONGER]
    base = found["base"] + found[f"base on {mc.STRONGER}"]
    own = [get_points([result], "text R@5").mean() for result in base]
    for model, line in ROOM.items():
        results = found[model] + found[f"{model} on {mc.STRONGER}"]
        task = "text nnn R@5" if model == "nnn" else "text R@5"
        for i in np.argsort(own):
            yield "room", line, bases[i], own[i], compare_results([results[i]], [base[i]], task, "text R@5")
    for model, other in PAIRS:
        for x, task in enumerate(("image", "text R@5")):
            yield "models", model, other, x, get_gain(model, other, task)


def trace_frontier() -> Iterator[tuple]:
    """How far training goes: what is gained with images (x, mAP) against text (y, R@5), by rate; seed 0."""
    base = mc.score_models()["base"][:1]
    for name, results in mc.score_models().items():
        if name.startswith(("image-only, ", "MCIP, ", "2SFT, ")):
            x = (get_points(results, "image") - get_points(base, "image")).mean()
            yield "frontier", *name.rsplit(", ", 1), x, compare_results(results, base, "text R@5")


def trace_soups() -> Iterator[tuple]:
    """What four ingredients, what is made of them, and one run of equal compute gain over their start (y, mAP points), by the
    passes that the start had (x): three seeds after the fewest, one after more."""
    models = {f"{task} of the four": ("soup", task) for task in ("uniform", "greedy", "ensemble")}
    models |= {"best of the four": ("single", "image"), "equal compute": ("long run", "image")}
    models |= {f"ingredient {i}": (f"ingredient {i}", "image") for i in range(mc.LONG_RUN)}
    for passes in mc.START_PASSES:
        start = f"start after {passes:g}"
        points = get_points(mc.score_models()[start], "image")
        for line, (name, task) in models.items():
            label = f"start {points.mean():.1f} mAP, seeds {len(points)}"
            gain = get_gain(f"{name} after {passes:g}", start, task, control_task="image")
            yield "soups", line, label, passes, gain


def trace_averages() -> Iterator[tuple]:
    """What averages of four ingredients, and one along a single run, gain over one of the four, the second, in image search,
    mAP, and in text search, R@5 (x: 0 and 1); what averaging adds to the mean of the ingredients (y, mAP points) by how far
    the best of them, as validation sees it, lies above that mean (x); and mAP (its interval holds all three seeds) along the
    straight line between two models, by the share of the second (x)."""
    for name in (*mc.RULES, "one run, averaged"):
        for x, task in enumerate(("image", "text R@5")):
            yield "relatives", name, task, x, get_gain(name, "one run", task)
    found = mc.score_models()
    for soup in (name for name in found if name.startswith("soup of ")):
        singles = found[soup.removeprefix("soup of ")]
        image, best = get_points(singles, "image"), np.argmax([single["validation"][0] for single in singles])
        x, label = image[best].mean() - image.mean(), f"greedy takes {len(found[soup][0]['greedy takes'])}"
        yield "ingredients", soup.split()[2], label, x, compare_results(found[soup], singles, "uniform", "image")
    for line in ("the same start", "different starts"):
        each = np.mean([get_points([result], "image")[0] for result in found[f"between {line}"]], axis=-1)
        for share, values in zip(mc.SHARES, each.T, strict=True):
            yield "between", line, "", share, (values.mean(), values.min(), values.max())


def trace_neighbors() -> Iterator[tuple]:
    """NNN's gain (y, R@1) by the share of its references that are the queries themselves, and by the size of the gallery,
    there beside hubness; three bases."""
    found = mc.score_models()
    for asks, line in (("text", "text to image"), ("caption", "image to text")):
        for i, share in enumerate(mc.OVERLAPS):
            ranks = pick_ranks(found[f"overlap {asks}"], i)
            yield "overlap", line, "", share, compare_results(ranks, found["nnn"], "ranks R@1", f"{asks} plain R@1")
    for i, size in enumerate(mc.SIZES):
        plain, after = (pick_ranks(found["gallery"], i, j) for j in (0, 1))
        yield "gallery", "R@1 points won by NNN", "", size, compare_results(after, plain, "ranks R@1")
        for j, line in enumerate(("hubness without NNN", "hubness with NNN")):
            each = [result["skewness"][i, j] for result in found["gallery"]]
            yield "gallery", line, "", size, (np.mean(each), min(each), max(each))


CLAIMS = (list_loss_claims, list_text_claims, list_soup_claims, list_cut_claims, list_neighbor_claims)
CURVES = (trace_losses, trace_finders, trace_text_models, trace_frontier, trace_soups, trace_averages, trace_neighbors)


def make_claims() -> list[dict]:
    return [make_claim(*line) for list_claims in CLAIMS for line in list_claims()]


def make_curves() -> list[dict]:
    return [
        {"curve": curve, "line": line, "label": label, "x": round(float(x), 4)}
        | {key: round(float(value), 3) for key, value in zip(("y", "low", "high"), found, strict=False)}
        for trace_curves in CURVES
        for curve, line, label, x, found in trace_curves()
    ]


def main() -> None:
    claims = make_claims()
    published_tables.write_numbers(gu.DATA / "claims.csv", claims)
    published_tables.write_numbers(gu.DATA / "claims_curves.csv", make_curves())
    for line in claims:
        print(f"{line['shown']:>3}  {line['ours']:+6.2f} [{line['low']:+.2f}, {line['high']:+.2f}]  {line['claim']}")


if __name__ == "__main__":
    main()
