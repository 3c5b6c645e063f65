"""Pre-train the mini CLIP on the noisy pairs of the mini world: `python -m gpnns.tools.pretrain_mini_clip`.

Plain CLIP: two towers made by open_clip from a JSON config, its own contrastive loss, and the training loop of the
course, which goes on where it was stopped. The result is an open_clip folder (`open_clip_config.json`,
`open_clip_model.safetensors`) with the vocabulary of its tokenizer. Takes about 25 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import json
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_weight_decay
from torch.nn.functional import interpolate

import gpnns_utils as gu
from gpnns import training_loop
from gpnns.encoders import checkpoints
from gpnns.world import mini_world

TEMPLATES = ("{}", "{}", "a photo of {}", "a drawing of {}", "a picture of {}")
CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 48, "patch_size": 6, "layers": 4, "width": 128, "head_width": 32},
        "text_cfg": {"context_length": 64, "vocab_size": 0, "width": 128, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}


def write_vocabulary(path: Path, captions: list[str]) -> None:
    """Write byte-pair merges, in the format of open_clip's SimpleTokenizer, that make each word of the captions one token.

    The most frequent pair is merged first, until nothing is left to merge (Sennrich et al. 2016, section 3.2): read in
    this order, the merges give every word back whole.
    """
    words = {word for caption in captions for word in re.findall(r"[^\W\d_]+", caption.lower())}
    parts = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges = []
    while pairs := collections.Counter(pair for pieces in parts.values() for pair in pairwise(pieces)):
        first, second = max(sorted(pairs), key=pairs.get)
        merges.append(f"{first} {second}")
        for pieces in parts.values():
            for i in range(len(pieces) - 2, -1, -1):
                if pieces[i : i + 2] == [first, second]:
                    pieces[i : i + 2] = [first + second]
    with gzip.GzipFile(path, "w", mtime=0) as file:  # no time: the same bytes on every run
        file.write("\n".join(["#version: mini world", *merges]).encode())


class Pairs(torch.utils.data.Dataset):
    """An image and a caption, both anew each time: a crop and a contrast; a level, a template, now and then a mistake."""

    def __init__(self, world: dict, tokenizer: Callable, wrong: float):
        self.images = torch.from_numpy(np.array(world["images"])).permute(0, 3, 1, 2)
        self.captions, self.tokenizer, self.wrong = world["captions"], tokenizer, wrong

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> bytes:
        said = repr([self.captions, mini_world.LEVELS, mini_world.SAYS_NOTHING, TEMPLATES, self.wrong])
        return hashlib.blake2b(said.encode() + self.images.numpy().tobytes()).digest()

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(torch.randint(2**31, ()).item())
        text = mini_world.draw_web_caption(self.captions, row, rng, self.wrong)
        tokens = self.tokenizer([str(rng.choice(TEMPLATES)).format(text)])[0]
        side = int(rng.integers(50, 65))
        x, y = rng.integers(0, 65 - side, 2)
        image = self.images[row, :, y : y + side, x : x + side].float() / 127.5 - 1
        image = interpolate(image[None], size=(48, 48), mode="bicubic", antialias=True)[0]
        return image * float(rng.uniform(0.8, 1.2)), tokens


class Contrast(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.loss = model, ClipLoss()

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, np.log(100))
        return self.loss(*self.model(images, tokens))


def pretrain_base(
    out: Path, epochs: float, batch_size: int, rate: float, wrong: float, seed: int, start: Path | None = None
) -> None:
    """Pre-train the mini CLIP and write its folder to `out`; the settings are those of the command."""
    started, cache = time.time(), gu.cache_folder()
    report = gu.Progress(0, "drawing pairs").update
    world = mini_world.load_split("pairs", cache, report=report)
    print(f"{len(world['images']):,} pairs after {time.time() - started:.0f} s", flush=True)
    new = cache / f"new_{out.name}"  # what lies in `out` stays whole until all of it can be replaced
    new.mkdir(parents=True, exist_ok=True)
    texts = [text for captions in world["captions"] for text in captions]
    for domain, _, number, view in mini_world.list_rows("captions_validation"):
        texts += mini_world.tell_image("captions_validation", domain, number, view)
    nothing = [text.format("0123456789") for text in mini_world.SAYS_NOTHING]
    write_vocabulary(new / "vocabulary.txt.gz", [*texts, *nothing, *TEMPLATES[2:]])
    tokenizer = open_clip.SimpleTokenizer(
        bpe_path=str(new / "vocabulary.txt.gz"), context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"]
    )
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    (new / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    torch.manual_seed(seed)
    objective = Contrast(open_clip.create_model(f"local-dir:{new}", load_weights=False))
    if start:
        checkpoints.fill_weights(objective.model, load_file(start), str(start))
    objective.model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)  # while it trains: faster by a third
    groups = [{"lr": rate, "betas": (0.9, 0.98)} | group for group in param_groups_weight_decay(objective, 0.1)]
    steps = round(epochs * (len(world["images"]) // batch_size))
    training_loop.fit(
        objective, Pairs(world, tokenizer, wrong), cache / "pretraining", groups, epochs=epochs, batch_size=batch_size,
        warmup=min(100, steps // 10), save_every=100, seed=seed,
    )  # fmt: skip
    weights = {name: tensor.detach().contiguous() for name, tensor in objective.model.state_dict().items()}
    save_file(weights, new / "open_clip_model.safetensors")
    for file in sorted(new.iterdir(), key=lambda file: file.suffix == ".safetensors"):  # the weights last
        gu.write_atomically(out / file.name, lambda stream, file=file: stream.write(file.read_bytes()))
    size = (out / "open_clip_model.safetensors").stat().st_size / 1e6
    print(f"{out}: {size:.1f} MB after {(time.time() - started) / 60:.0f} min")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=gu.DATA / "mini_clip", help="folder to write the model to")
    parser.add_argument("--epochs", type=float, default=22)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--wrong", type=float, default=0.3, help="share of captions that belong to another image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to go on from, of a model that this program made")
    pretrain_base(**vars(parser.parse_args()))
