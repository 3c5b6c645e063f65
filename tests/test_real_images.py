"""Real photos, drawings and a real pretrained network, where they are at hand: known scores must come out."""

import numpy as np
import pytest
from conftest import run_here, value
from real_tables import MOBILENET, REAL, write_table

import gpnns_utils as gu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.exists(), reason=f"no real images beside the project ({REAL.name}/ is absent)"),
]


@pytest.mark.parametrize(
    ("encoder", "name", "images", "first", "mean"),
    [
        (MOBILENET, "emoji", 1600, 0.354, 0.287),
        (MOBILENET, "omniglot", 2120, 0.643, 0.315),
        (MOBILENET, "clothing", 372, 0.728, 0.482),
        ("efficientnet_lite0", "clothing", 372, 0.772, 0.600),
    ],
)
def test_a_real_network_gets_the_scores_measured_elsewhere(tmp_path, encoder, name, images, first, mean):
    photos = gu.load_images(write_table(name, tmp_path))
    assert len(photos) == images
    embeddings = gu.embed_images(gu.load_encoder(encoder), photos)[0]
    own = np.arange(images)[:, None]
    ranks = gu.rank_relevant(embeddings, embeddings, gu.same_label(photos.labels, photos.labels), leave_out=own)
    assert gu.recall_at_k(ranks, 1).mean == pytest.approx(first, abs=0.008)
    assert gu.mean_average_precision(ranks).mean == pytest.approx(mean, abs=0.008)


def test_search_across_drawing_styles_is_easier_than_within_all(tmp_path):
    """With the three other vendors as gallery, the query's own style can no longer win: R@1 0.545, mAP 0.405."""
    photos = gu.load_images(write_table("emoji", tmp_path))
    embeddings = gu.embed_images(gu.load_encoder(MOBILENET), photos)[0]
    same_style = [np.flatnonzero(photos.groups == group) for group in photos.groups]
    ranks = gu.rank_relevant(embeddings, embeddings, gu.same_label(photos.labels, photos.labels), leave_out=same_style)
    assert gu.recall_at_k(ranks, 1).mean == pytest.approx(0.545, abs=0.008)
    assert gu.mean_average_precision(ranks).mean == pytest.approx(0.405, abs=0.008)


@pytest.mark.parametrize(("name", "known"), [("emoji", 28.7), ("omniglot", 31.5), ("clothing", 48.2)])
def test_both_notebooks_run_on_real_images(name, known, tmp_path, results):
    table = str(write_table(name, tmp_path))
    run_here("01", {"profile": results[0], "images": table, "encoder": MOBILENET})
    run_here("02", {"profile": results[0], "images": table, "encoders": f'["mini", "{MOBILENET}"]'})
    wanted = {
        "model": "timm:tf_mobilenetv2_035@mobilenetv2_035",
        "task": "image_to_image",
        "split": "test",
        "group": "all",
        "metric": "mAP",
    }
    assert value(results[1], "02_benchmark_encoders", **wanted)["value"] == pytest.approx(known, abs=0.8)
