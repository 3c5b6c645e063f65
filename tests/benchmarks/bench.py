"""Time the course's heavy parts beside other libraries, in one run on one machine: `make bench` -> runs/bench.json.

Every method runs in a process of its own, in which the plain matrix product is timed too: the ratio of the two is
what carries over to other machines. Memory is the highest resident size during the method above that before it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # nnn-retrieval draws a bar on each search
import numpy as np
import psutil
import scipy.stats

import gpnns_utils as gu
from gpnns import losses
from gpnns.images import downloads


def gpr1200_like(classes: int = 1200, per_class: int = 10, dim: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of GPR1200's size: class centres plus noise, mAP about 0.5."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), per_class)
    noise = rng.standard_normal((len(labels), dim), dtype=np.float32)
    return gu.unit_rows(rng.standard_normal((classes, dim), dtype=np.float32)[labels] + 2.5 * noise), labels


def matrix_product(x: np.ndarray, y: np.ndarray | None = None) -> None:
    """All scores of x with y (itself if None) in blocks of 256 rows, thrown away."""
    y = x if y is None else y
    block = np.empty((256, len(y)), dtype=np.float32)
    for start in range(0, len(x), 256):
        np.matmul(x[start : start + 256], y.T, out=block[: len(x[start : start + 256])])


def gpnns(x, labels):
    ranks = gu.rank_relevant(x, x, gu.same_label(labels, labels))
    return gu.mean_average_precision(ranks).mean


def full_argsort(x, labels):
    total = 0.0
    places = np.arange(1, len(x) + 1)
    for start in range(0, len(x), 1000):
        order = np.argsort(-(x[start : start + 1000] @ x.T), axis=1)
        hits = labels[order] == labels[start : start + 1000, None]
        total += ((hits.cumsum(1) / places * hits).sum(1) / hits.sum(1)).sum()
    return total / len(x)


def scikit_learn(x, labels):
    from sklearn.metrics import average_precision_score

    values = []
    for start in range(0, len(x), 1000):
        for query, row in enumerate(x[start : start + 1000] @ x.T, start):
            values.append(average_precision_score(labels == labels[query], row))
    return float(np.mean(values))


def pytorch_metric_learning(x, labels):
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=("mean_average_precision",), k=None, device=torch.device("cpu"))
    x, labels = torch.from_numpy(x), torch.from_numpy(labels)
    return calculator.get_accuracy(x, labels, x, labels, ref_includes_query=False)["mean_average_precision"]


def torchmetrics(x, labels):
    import torch
    from torchmetrics.functional.retrieval import retrieval_average_precision

    values = []
    for start in range(0, len(x), 1000):
        for query, row in enumerate(x[start : start + 1000] @ x.T, start):
            target = torch.from_numpy(labels == labels[query])
            values.append(
                retrieval_average_precision(torch.from_numpy(row) + 1, target).item()
            )  # + 1: it drops scores <= 0
    return float(np.mean(values))


METHODS = [gpnns, full_argsort, scikit_learn, torchmetrics, pytorch_metric_learning]


class PeakMemory:
    """The highest resident size of this process while the block runs, in MB above that at its start."""

    def __enter__(self):
        self.process, self.running = psutil.Process(), True
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.005)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.megabytes = (self.peak - self.start) / 1e6


def measure(method, repeats: int) -> dict:
    """Medians over `repeats` alternations of matrix product and method, in this process."""
    x, labels = gpr1200_like()
    method(x[:300], labels[:300])  # imports and first-call costs are not what is compared
    matrix_product(x)
    products, seconds = [], []
    with PeakMemory() as memory:
        for _ in range(repeats):
            start = time.perf_counter()
            matrix_product(x)
            products.append(time.perf_counter() - start)
            start = time.perf_counter()
            value = method(x, labels)
            seconds.append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(products, seconds, strict=True))
    return {
        "ratio": round(ratio, 3),
        "seconds": round(statistics.median(seconds), 2),
        "extra_mb": round(memory.megabytes),
        "mAP": round(value, 6),
    }


def map_full_ranking(repeats: int) -> dict:
    """Full-ranking mAP of 12,000 x 512, the query included, against the matrix product alone."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for method in METHODS:
        with context.Pool(1) as pool:
            results[method.__name__] = pool.apply(measure, (method, repeats if method is gpnns else 1))
        print(f"{method.__name__:24} {results[method.__name__]}", flush=True)
    return results.pop("gpnns") | {"peers": results}


BATCH, DIM, SAMPLED = 128, 512, 4096


def make_step(name: str, classes: int):
    """One training step of a margin loss: forward, backward, update of the proxies."""
    import torch
    from pytorch_metric_learning.losses import ArcFaceLoss, SubCenterArcFaceLoss

    torch.manual_seed(0)
    theirs = {"num_classes": classes, "embedding_size": DIM, "margin": 17.2, "scale": 30}
    loss = {
        "full": lambda: losses.ArcMargin(DIM, classes, 30, 0.3),
        "full, 3 centers": lambda: losses.ArcMargin(DIM, classes, 30, 0.3, centers=3),
        "sampled": lambda: losses.ArcMargin(DIM, classes, 30, 0.3, sampled=SAMPLED),
        "sampled, 3 centers": lambda: losses.ArcMargin(DIM, classes, 30, 0.3, centers=3, sampled=SAMPLED),
        "ArcFaceLoss": lambda: ArcFaceLoss(**theirs),
        "SubCenterArcFaceLoss": lambda: SubCenterArcFaceLoss(**theirs, sub_centers=3),
    }[name]()
    optimizer = torch.optim.AdamW(loss.parameters())
    labels = torch.randint(classes, (BATCH,))

    def step() -> float:
        embeddings = torch.nn.functional.normalize(torch.randn(BATCH, DIM)).requires_grad_()
        value = loss(embeddings, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def measure_step(name: str, classes: int, repeats: int) -> dict:
    """Medians over alternations of a step and of the product of embeddings and proxies that any full softmax needs."""
    import torch

    left, right = torch.randn(BATCH, DIM), torch.randn(DIM, 10_000)
    with PeakMemory() as memory:
        step = make_step(name, classes)
        step()  # allocates the optimizer's moments
        base = psutil.Process().memory_info().rss
        steps, products = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(10):
                left @ right
            products.append((time.perf_counter() - start) / 10 * classes / 10_000)
            start = time.perf_counter()
            step()
            steps.append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(products, steps, strict=True))
    kept = (base - memory.start) / 1e6
    return {
        "ratio": round(ratio, 3),
        "seconds": round(statistics.median(steps), 4),
        "peak_mb": round(memory.megabytes),
        "kept_mb": round(kept),
    }


def arcmargin_step(repeats: int) -> dict:
    """A step at 10 k, 100 k and 1 M classes x 512, batch 128, beside pytorch-metric-learning. Ratios: to the product of
    embeddings and all proxies. `peak_mb` covers proxies, gradients, moments and the step;
    `kept_mb` what stays."""
    context = multiprocessing.get_context("spawn")
    results = {}
    for classes in (10_000, 100_000, 1_000_000):
        for name in ("full", "ArcFaceLoss", "sampled", "full, 3 centers", "SubCenterArcFaceLoss", "sampled, 3 centers"):
            key, smaller = f"{classes:,} classes: {name}", results.get(f"{classes // 10:,} classes: {name}", {})
            needed, available = 10 * smaller.get("peak_mb", 0), psutil.virtual_memory().available / 1e6
            if needed > 0.9 * available:
                results[key] = {"does_not_fit": f"about {needed:,} MB needed, {available:,.0f} MB available"}
            else:
                with context.Pool(1) as pool:
                    results[key] = pool.apply(measure_step, (name, classes, repeats if classes < 10**6 else 3))
            print(f"{key:44} {results[key]}", flush=True)
    return results


NEAREST, ALPHA, FOUND = 128, 0.75, 10
KS, ALPHAS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], np.linspace(0.25, 2, 8)


def nnn_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit rows: a gallery of 50,000, 20,000 references and 1,000 queries, of 512 dimensions."""
    rng = np.random.default_rng(0)
    return tuple(gu.unit_rows(rng.standard_normal((n, 512), dtype=np.float32)) for n in (50_000, 20_000, 1000))


def package_ranker(gallery, references, k=NEAREST, batch_size=256):
    """nnn-retrieval as its README calls it (batches of 256)."""
    from nnn import NNNRanker, NNNRetriever

    settings = {"alternate_ks": k, "alternate_weight": ALPHA, "batch_size": batch_size}
    return NNNRanker(NNNRetriever(512), gallery, references, **settings)


def package_rebuilt(gallery, references):
    """All k and alpha with nnn-retrieval: a rebuild for each k, while alpha is free."""
    return [
        alpha * mean
        for mean in (package_ranker(gallery, references, k, 1024).alignment_means[:, 0].numpy() for k in KS)
        for alpha in ALPHAS
    ]


def faiss_flat(vectors):
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def nnn_methods(row: str, gallery, references, queries) -> dict:
    """What is timed, by name. What comes before the colon of a lambda is ready before the clock starts."""
    if row == "nnn_build":
        return {
            "gpnns": lambda: gu.hub_bias(gallery, references, NEAREST, ALPHA),
            "nnn-retrieval": lambda: ALPHA * package_ranker(gallery, references).alignment_means[:, 0].numpy(),
            "nnn-retrieval, batches of 1024": lambda: (
                ALPHA * package_ranker(gallery, references, batch_size=1024).alignment_means[:, 0].numpy()
            ),
            "faiss flat": lambda: ALPHA * faiss_flat(references).search(gallery, NEAREST)[0].mean(axis=1),
        }
    if row == "nnn_sweep":
        return {
            "gpnns": lambda: [alpha * mean for mean in gu.reference_means(gallery, references, KS) for alpha in ALPHAS],
            "gpnns, a rebuild for each k": lambda: [
                alpha * mean for mean in (gu.hub_bias(gallery, references, k, 1) for k in KS) for alpha in ALPHAS
            ],
            "nnn-retrieval, a rebuild for each k": lambda: package_rebuilt(gallery, references),
        }
    few = references[:2000]  # which bias is subtracted does not matter to the clock
    bias, ranker = gu.hub_bias(gallery, few, NEAREST, ALPHA), package_ranker(gallery, few)
    index, longer = faiss_flat(gu.with_bias(gallery, bias)), gu.with_bias(queries)
    return {
        "gpnns": lambda: gu.search(queries, gallery, FOUND, bias=bias),
        "nnn-retrieval": lambda: ranker.search(queries, FOUND),
        "faiss flat, one dimension more": lambda: index.search(longer, FOUND),
        "one query: gpnns": lambda: gu.search(queries[:1], gallery, FOUND, bias=bias),
        "one query: nnn-retrieval": lambda: ranker.search(queries[:1], FOUND),
        "one query: faiss flat, one dimension more": lambda: index.search(longer[:1], FOUND),
    }


def measure_nnn(row: str, name: str, repeats: int) -> tuple[dict, object]:
    """Medians over alternations of the matrix product and a method, in this process; and what the method found."""
    gallery, references, queries = nnn_data()
    method = nnn_methods(row, gallery, references, queries)[name]
    rows, columns = (
        (queries[:1] if "one" in name[:3] else queries, gallery) if row == "nnn_search" else (gallery, references)
    )
    nnn_methods("nnn_build", gallery[:1000], references[:1000], queries)[
        "gpnns" if "gpnns" in name else "nnn-retrieval"
    ]()
    matrix_product(rows[:1000], columns)
    products, seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix_product(rows, columns)
        products.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = method()
        seconds.append(time.perf_counter() - start)
    with PeakMemory() as memory:  # once more: watching takes time of its own
        method()
    ratio = statistics.median(b / a for a, b in zip(products, seconds, strict=True))
    numbers = {
        "ratio": round(ratio, 3),
        "seconds": round(statistics.median(seconds), 4),
        "extra_mb": round(memory.megabytes),
    }
    return numbers, found


def nnn_row(row: str, repeats: int) -> dict:
    """One method after the other, each in a process of its own, and how far its numbers are from ours."""
    context = multiprocessing.get_context("spawn")
    results, ours = {}, {}
    for name in nnn_methods(row, *(np.ones((600, 512), dtype=np.float32),) * 3):
        with context.Pool(1) as pool:
            result, found = pool.apply(measure_nnn, (row, name, 1 if "rebuild" in name else repeats))
        kind = "one query" if name.startswith("one") else "all"
        first = np.asarray(found[0] if row == "nnn_search" else found)
        result["largest_difference"] = float(f"{np.abs(first - ours.setdefault(kind, first)).max():.1e}")
        results[name] = result
        print(f"{row}: {name:44} {result}", flush=True)
    return results.pop("gpnns") | {"peers": results}


def nnn_build(repeats: int) -> dict:
    """The bias of a gallery of 50,000 x 512 from 20,000 references, k = 128, against their matrix product."""
    return nnn_row("nnn_build", repeats)


def nnn_search(repeats: int) -> dict:
    """The 10 nearest of 50,000 for 1,000 queries and for one, bias subtracted, against the matrix product. Every bias
    and index is ready beforehand."""
    return nnn_row("nnn_search", repeats)


def nnn_sweep(repeats: int) -> dict:
    """The biases of 10 k and 8 alpha, of the same gallery and references, against one matrix product."""
    return nnn_row("nnn_sweep", repeats)


def write_photos(folder: Path, number: int) -> None:
    """JPEG files of 500 x 375 pixels: smooth noise, as large as those of a photograph."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=92)


def embed_from_files(device: str, models: dict[str, int], number: int, repeats: int) -> dict:
    """Images per second from JPEG files to embeddings, as a share of the bare forward pass over tensors that are
    already on the device, in the same batches and precision. Random weights; nothing is cached."""
    import torch

    results = {}
    for name, batch_size in models.items():
        encoder = gu.load_encoder(f"open_clip:{name}", device)
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), number)
            photos = gu.load_images(folder)
            rows = gu.split_rows(number, batch_size)
            first = torch.stack([encoder.preprocess(photos[i]) for i in rows[0]]).to(encoder.device)

            def bare(encoder=encoder, rows=rows, first=first):
                for batch in rows:
                    gu.run_tower(encoder, encoder.image_tower, first[: len(batch)])

            bare()
            shares, speeds = [], []
            for _ in range(repeats):
                start = time.perf_counter()
                bare()
                middle = time.perf_counter()
                gu.embed_images(encoder, photos, batch_size=batch_size, cache=False)
                spent = time.perf_counter() - middle
                shares.append((middle - start) / spent)
                speeds.append(number / spent)
        share, speed = statistics.median(shares), statistics.median(speeds)
        results[name] = {"share_of_bare_forward": round(share, 3), "images_per_second": round(speed, 1)}
        print(f"embed_{device}: {name:24} {results[name]}", flush=True)
    return results


def embed_cpu(repeats: int) -> dict:
    """ViT-B/16 at 224 pixels on the CPU."""
    return embed_from_files("cpu", {"ViT-B-16": 32}, 256, min(repeats, 3))


def embed_gpu(repeats: int) -> dict:
    """ViT-B/16 at 224 and ViT-L/14 at 336 pixels on the GPU."""
    if gu.best_device().type != "cuda":
        raise SystemExit("embed_gpu needs an NVIDIA GPU that this torch can use; name the other rows instead")
    return embed_from_files("cuda", {"ViT-B-16": 256, "ViT-L-14-336": 128}, 8192, repeats)


def text_query(repeats: int) -> dict:
    """One new text as a cached query, ViT-B/32 untrained on one thread of the CPU, beside the bare text tower."""
    import torch

    torch.set_num_threads(1)
    encoder = gu.load_encoder("open_clip:ViT-B-32/random", "cpu")
    gu.embed_texts(encoder, [f"a first query at {time.time()}"])  # its fingerprint is kept from here on
    ratios, bare = [], []
    for i in range(3 * repeats):
        text = f"query {i} at {time.time()}"
        start = time.perf_counter()
        with torch.inference_mode():
            encoder.text_tower([text])
        middle = time.perf_counter()
        gu.embed_texts(encoder, [text])
        bare.append(middle - start)
        ratios.append((time.perf_counter() - middle) / bare[-1])
    result = {"ratio": round(statistics.median(ratios), 3), "bare_ms": round(1000 * statistics.median(bare), 1)}
    print(f"text_query: {result}", flush=True)
    return result


def plain_bootstrap(score: gu.Score, clusters: np.ndarray) -> np.ndarray:
    """The interval of `Score.interval` as a loop of ours, without scipy."""
    members = np.unique(clusters, return_inverse=True)[1]
    totals, counts, rng = np.bincount(members, score.per_query), np.bincount(members), np.random.default_rng(0)
    drawn = (rng.integers(0, len(counts), len(counts)) for _ in range(1000))
    return np.percentile([totals[rows].sum() / counts[rows].sum() for rows in drawn], [2.5, 97.5])


def plain_search(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """The k nearest by numpy alone: a product for each tile of the gallery, and a partition of what it and those before found."""
    best = np.empty((len(queries), 0), np.float32)
    for first in range(0, len(gallery), 2048):
        best = np.hstack([best, queries @ gallery[first : first + 2048].T])
        best = np.partition(best, -min(k, best.shape[1]), axis=1)[:, -k:]
    return -np.sort(-best, axis=1)


def plain_untar(archive: Path, folder: Path) -> None:
    """A tar's files copied one by one, without tarfile's own extraction."""
    with tarfile.open(archive) as packed:
        for member in packed:
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with packed.extractfile(member) as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file, 2**20)


def libraries(repeats: int) -> dict:
    """What a library does for the course, as CPU time beside the few lines of ours that it stands for: below 1 it is
    faster."""
    rng = np.random.default_rng(0)
    score, clusters = gu.Score(rng.random(12_000)), np.repeat(np.arange(1200), 10)
    counts = rng.poisson(10, 50_000)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, 200)
        with tarfile.open(folder / "photos.tar", "w") as packed:
            for path in sorted(folder.glob("*.jpg")):
                packed.add(path, path.name)
        gallery, _, queries = nnn_data()
        pairs = {
            "search, k=10: faiss.knn": (
                lambda: gu.search(queries, gallery),
                lambda: plain_search(queries, gallery, 10),
            ),
            "search, k=128: faiss.knn": (
                lambda: gu.search(queries, gallery, 128),
                lambda: plain_search(queries, gallery, 128),
            ),
            "interval: scipy.stats.bootstrap": (
                lambda: score.interval(clusters),
                lambda: plain_bootstrap(score, clusters),
            ),
            "skewness: scipy.stats.skew": (
                lambda: scipy.stats.skew(counts),
                lambda: ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3,
            ),
            "unpacking: tarfile's filter": (
                lambda: downloads.extract_members(folder / "photos.tar", folder / "a"),
                lambda: plain_untar(folder / "photos.tar", folder / "b"),
            ),
        }
        for what, (theirs, ours) in pairs.items():
            theirs(), ours()
            ratios = []
            for _ in range(repeats):
                start = time.process_time()
                theirs()
                middle = time.process_time()
                ours()
                ratios.append((middle - start) / (time.process_time() - middle))
            results[what] = {"ratio": round(statistics.median(ratios), 3)}
            print(f"{what:44} {results[what]}", flush=True)
    return results


ROWS = {
    "map_full_ranking": map_full_ranking,
    "arcmargin_step": arcmargin_step,
    "nnn_build": nnn_build,
    "nnn_search": nnn_search,
    "nnn_sweep": nnn_sweep,
    "libraries": libraries,
    "embed_cpu": embed_cpu,
    "text_query": text_query,
    "embed_gpu": embed_gpu,
}
DEFAULT = [row for row in ROWS if row != "embed_gpu"]  # that one only where there is a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "rows", nargs="*", default=DEFAULT, help=f"which of {', '.join(ROWS)} (default: all but the last)"
    )
    arguments = parser.parse_args()
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    path = gu.work_folder() / "runs" / "bench.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for row in arguments.rows:
        result[row] = ROWS[row](arguments.repeats) | {"machine": machine}
    gu.write_atomically(path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
