"""Answers that a reader may well try and that are wrong: {notebook: {exercise: [code]}}. Each must get a hint."""

WRONG = {
    "01_search_images": {
        1: [
            "def opposite(vectors):\n    return 1 - vectors",
            "def opposite(vectors):\n    return vectors[::-1]",
            "def opposite(vectors):\n    return -vectors[0]",
        ],
        2: ["pair = (0, 0)", "pair = (0, 1)", "pair = 0", "pair = [np.array([0]), np.array([1])]"],
        3: [
            "def eight_bits(vectors):\n    return vectors.astype(np.int8)",
            "def eight_bits(vectors):\n    return np.sign(vectors).astype(np.int8)",
            "def eight_bits(vectors):\n    return np.round(vectors * 127)",
            "def eight_bits(vectors):\n    return (vectors * 1000).astype(np.int8)",
        ],
        4: ["places = 0", "places = len(photos)", "places = int((bits[hub] != bits).sum())"],
    },
    "02_benchmark_encoders": {
        1: [
            "def r_precision(ranks):\n    return (ranks <= ranks.shape[1]).mean(axis=1)",
            "def r_precision(ranks):\n    return 0.5",
            "def r_precision(ranks):\n    return (ranks <= 2).sum(axis=1) / 2",
        ],
        2: ["floor = 0", "floor = 0.1", "floor = 100 / 9"],
        3: [
            "def label_of_nearest(queries, gallery, labels):\n    return gu.search(queries, gallery, 1)[1][:, 0]",
            "def label_of_nearest(queries, gallery, labels):\n    return labels[gu.search(queries, gallery, 1)[1]]",
        ],
        4: ["widths = 0.05", "widths = scores[chosen].interval()", "widths = [5.5, 2.5]"],
    },
    "03_finetune_arcmargin": {
        1: ["degrees = 45", "degrees = 45 - np.rad2deg(recipe['margin'])", "degrees = 0.6353"],
        2: [
            "def gap(embeddings, labels):\n    same = labels[:, None] == labels\n"
            "    return (embeddings @ embeddings.T)[same].mean() - (embeddings @ embeddings.T)[~same].mean()",
            "def gap(embeddings, labels):\n    return 1",
        ],
        3: [
            "def batch_softmax(embeddings, labels, scale=20.0):\n"
            "    shares = F.log_softmax(scale * embeddings @ embeddings.T, dim=1)\n"
            "    return -shares[labels[:, None] == labels].mean()",
            "def batch_softmax(embeddings, labels, scale=20.0):\n    return (embeddings @ embeddings.T).mean(dim=1)",
        ],
        4: [
            "most_recovered = min(members, key=lambda name: gain.where(members[name]).mean)",
            "most_recovered = 'a typo'",
        ],
    },
    "04_realign_text_mcip": {
        1: [
            "five_percent = recipe['search']['threshold']",
            "five_percent = 0.05",
            "five_percent = np.quantile(scores, 0.05)",
        ],
        2: ["def loss_of_ignorance(n):\n    return 1 / n", "def loss_of_ignorance(n):\n    return torch.tensor(n)"],
        3: [
            "def own_cosine(texts, images, relevant):\n    return (texts @ images.T).mean()",
            "def own_cosine(texts, images, relevant):\n"
            "    return np.concatenate([images[r] @ t for t, r in zip(texts, relevant)]).mean()",
        ],
        4: ["worth_keeping = ['image-only']", "worth_keeping = list(places)", "worth_keeping = 'MCIP'"],
    },
    "05_average_soups": {
        1: [
            "def kept(moves):\n    return moves.mean(dim=0).norm() / moves.norm(dim=1).mean()",
            "def kept(moves):\n    return 0.5",
            "def kept(moves):\n    return F.cosine_similarity(moves[:, None], moves, dim=2).mean()",
            "def kept(moves):\n    return moves.mean(dim=0).square().sum() / moves.norm(dim=1).mean() ** 2",
        ],
        2: [
            "def take_out(soup, state, count):\n    return {key: soup[key] - state[key] / count for key in soup}",
            "def take_out(soup, state, count):\n    return soup",
        ],
        3: [
            "def twin(first, second):\n    return first, second",
            "def twin(first, second):\n    return first.flip(0), second",
        ],
        4: [
            "def renew(encoder, images):\n    encoder.model.train()",
            "def renew(encoder, images):\n    encoder.model.eval()",
        ],
    },
    "06_normalize_neighbors_nnn": {
        1: [
            "def taken_by(counts, share):\n    return counts[: round(share * len(counts))].sum() / counts.sum()",
            "def taken_by(counts, share):\n    return share",
        ],
        2: [
            "def level(vectors):\n    return np.hstack([vectors, np.zeros((len(vectors), 1))])",
            "def level(vectors):\n    return vectors",
            "def level(vectors):\n    return np.hstack([vectors, np.full((len(vectors), 1), np.nan)])",
        ],
        3: [
            "def merged(old, new):\n    return (old + new).mean(axis=1) / 2",
            "def merged(old, new):\n    return np.hstack([old, new]).mean(axis=1)",
            "def merged(old, new):\n    return old.max(axis=1)",
        ],
        4: [
            "together = 0.25",
            "together = 100 * gu.mean_average_precision(ranks[shown, 'text to image', '+nnn']).mean",
        ],
    },
    "07_reproduce_papers": {
        1: [
            "by_group = published_tables.load_published('gpnns_table4')[2]['avg'] - published_tables.load_published('gpnns_table4')[0]['avg']"
        ],
        2: [
            "column_of_mine = paper_tables.load_columns('mini')[1]",
            "column_of_mine = ('name', 'mini:test', '', 'image_to_image', 'R@1')",
            "column_of_mine = ('mini:shifted', '', 'image_to_image', 'R@1')",
        ],
        3: [
            "def mean_place(values):\n    return {name: np.mean(list(own.values())) for name, own in values.items()}",
            "def mean_place(values):\n    return {name: 1 for name in values}",
            "def mean_place(values):\n    return {}",
        ],
    },
    "08_build_your_search": {
        1: [
            "def passes(changes):\n    return bool(np.mean([change.mean() for change in changes]) > 0)",
            "def passes(changes):\n    return all(change.mean() > 0 for change in changes)",
            "def passes(changes):\n    return any(gu.Score(change).interval()[0] > 0 for change in changes)",
        ],
        2: [
            "def pairs_above(vectors, threshold):\n    return np.argwhere(vectors @ vectors.T > threshold)",
            "def pairs_above(vectors, threshold):\n    return []",
            "def pairs_above(vectors, threshold):\n    return [(1, 0), (3, 2)]",
        ],
        3: ["weighted = journal[0]['gain'][0]", "weighted = 0.0", "weighted = 100"],
    },
    "09_scale_out": {
        1: [
            "def cheapest(measured, rows, kind, recall):\n    return min(measured, key=lambda x: x['share_of_exact_time'])",
            "def cheapest(measured, rows, kind, recall):\n    good = [x for x in measured if x['rows'] == rows and x['recall'] >= recall]\n    return min(good, key=lambda x: x['share_of_exact_time'])",
            "def cheapest(measured, rows, kind, recall):\n    return max(measured, key=lambda x: x['recall'])",
        ],
        2: [
            "def bottleneck(gpus, cores, flop, per_second, decode):\n    return 'cores'",
            "def bottleneck(gpus, cores, flop, per_second, decode):\n    return 'GPUs' if gpus < cores else 'cores'",
            "def bottleneck(gpus, cores, flop, per_second, decode):\n    return 'cores' if gpus * per_second / flop < cores / decode else 'GPUs'",
        ],
        3: [
            "def recall(right, found):\n    return np.mean(np.array(right) == np.array(found))",
            "def recall(right, found):\n    return np.mean([bool(set(a) & set(b)) for a, b in zip(right, found)])",
            "def recall(right, found):\n    return sum(len(set(a) & set(b)) for a, b in zip(right, found))",
        ],
    },
}
