"""Time the course's heavy parts beside other libraries, in one run on one machine: `make bench` -> runs/bench.json.

Every method runs in a process of its own, in which the plain matrix product is timed too: the ratio of the two is
what carries over to other machines. Memory is the highest resident size during the method above that before it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time

import numpy as np
import psutil

import gpnns_utils as gu


def gpr1200_like(classes: int = 1200, per_class: int = 10, dim: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of GPR1200's size: class centres plus noise, mAP about 0.5."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), per_class)
    noise = rng.standard_normal((len(labels), dim), dtype=np.float32)
    return gu.unit_rows(rng.standard_normal((classes, dim), dtype=np.float32)[labels] + 2.5 * noise), labels


def matrix_product(x: np.ndarray) -> None:
    """All scores, in the same blocks as the course computes them, thrown away."""
    block = np.empty((256, len(x)), dtype=np.float32)
    for start in range(0, len(x), 256):
        np.matmul(x[start : start + 256], x.T, out=block[: len(x[start : start + 256])])


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
        "full": lambda: gu.ArcMargin(DIM, classes, 30, 0.3),
        "full, 3 centers": lambda: gu.ArcMargin(DIM, classes, 30, 0.3, centers=3),
        "sampled": lambda: gu.ArcMargin(DIM, classes, 30, 0.3, sampled=SAMPLED),
        "sampled, 3 centers": lambda: gu.ArcMargin(DIM, classes, 30, 0.3, centers=3, sampled=SAMPLED),
        "ArcFaceLoss": lambda: ArcFaceLoss(**theirs),
        "SubCenterArcFaceLoss": lambda: SubCenterArcFaceLoss(**theirs, sub_centers=3),
    }[name]()
    optimizer = (torch.optim.SparseAdam if name.startswith("sampled") else torch.optim.AdamW)(loss.parameters())
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


def measure_beside(name: str, peer: str, classes: int, repeats: int) -> dict:
    """The median ratio of two steps that take turns in one process."""
    ours, theirs, ratios = make_step(name, classes), make_step(peer, classes), []
    for number in range(repeats + 1):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        if number:  # the first steps allocate the moments
            ratios.append((middle - start) / (time.perf_counter() - middle))
    return {"ratio": round(statistics.median(ratios), 3)}


def arcmargin_step(repeats: int) -> dict:
    """A step at 10 k, 100 k and 1 M classes x 512, batch 128, against pytorch-metric-learning. Ratios: to the product of
    embeddings and all proxies, or, for "A / B", of A to B. `peak_mb` covers proxies, gradients, moments and the step;
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
        peers = {"full": "ArcFaceLoss", "sampled": "ArcFaceLoss", "full, 3 centers": "SubCenterArcFaceLoss"}
        for name, peer in peers.items() if classes < 10**6 else ():  # two with a million do not fit into 24 GB
            key = f"{classes:,} classes: {name} / {peer}"
            with context.Pool(1) as pool:
                results[key] = pool.apply(measure_beside, (name, peer, classes, repeats))
            print(f"{key:44} {results[key]}", flush=True)
    return results


ROWS = {"map_full_ranking": map_full_ranking, "arcmargin_step": arcmargin_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("rows", nargs="*", default=ROWS, help=f"which of {', '.join(ROWS)} (default: all)")
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
