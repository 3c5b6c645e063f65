"""Pre-train the mini CLIP on the caption pairs of the mini world: `python data/pretrain_mini_clip.py`.

Plain CLIP: two towers made by open_clip from a JSON config, its own contrastive loss, AdamW, cosine schedule.
The result is an open_clip folder (`open_clip_config.json`, `open_clip_model.safetensors`) and the vocabulary of its
tokenizer, together a few MB. Takes about twenty minutes on two CPU cores and gives the same weights again on the same
machine and library versions.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import mini_world
import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch.nn.functional import interpolate

HERE = Path(__file__).parent
TEMPLATES = ("{}", "{}", "a photo of {}", "a drawing of {}", "a picture of {}")
CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 48, "patch_size": 6, "layers": 4, "width": 128, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 0, "width": 128, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}


def write_vocabulary(path: Path, captions: list[str]) -> None:
    """Write byte-pair merges, in the format of open_clip's SimpleTokenizer, that make each caption word one token."""
    merges: dict[str, None] = {}  # a dict keeps the order and drops repetitions
    for word in sorted({word for caption in captions for word in caption.replace("-", " ").replace(",", " ").split()}):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merges["".join(pieces[:i]) + " " + pieces[i]] = None
    text = "\n".join(["# byte-pair merges of the mini world's captions", *merges])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))  # no time stamp: the same words give the same file


def augment(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """uint8 (b, 3, 64, 64) -> float (b, 3, 48, 48): one random crop for the batch, contrast for each image."""
    side = int(rng.integers(50, 65))
    x, y = rng.integers(0, 65 - side, 2)
    images = images[:, :, y : y + side, x : x + side].float() / 127.5 - 1
    images = interpolate(images, size=(48, 48), mode="bicubic", antialias=True)
    return images * torch.from_numpy(rng.uniform(0.8, 1.2, (len(images), 1, 1, 1)).astype(np.float32))


def pretrain(out: Path, cache: Path, epochs: int, batch_size: int, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    world = mini_world.load_split("pairs", cache)
    images = torch.from_numpy(np.array(world["images"])).permute(0, 3, 1, 2)
    vocabulary = out / "vocabulary.txt.gz"
    write_vocabulary(vocabulary, [c for captions in world["captions"] for c in captions] + list(TEMPLATES[2:]))
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(vocabulary), context_length=32)
    CONFIG["model_cfg"]["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    model = open_clip.create_model(f"local-dir:{out}", load_weights=False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], betas=(0.9, 0.98)
    )
    steps_per_epoch = len(images) // batch_size
    total, loss_function, start = epochs * steps_per_epoch, ClipLoss(), time.time()
    for epoch in range(epochs):
        losses = []
        order = rng.permutation(len(images))
        for i in range(steps_per_epoch):
            step = epoch * steps_per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * step / total)))
            batch = order[i * batch_size : (i + 1) * batch_size]
            # Captions of all three levels, the finest one most often; a template in front of some.
            texts = [
                str(rng.choice(TEMPLATES)).format(world["captions"][j][rng.choice(3, p=[0.15, 0.25, 0.6])])
                for j in batch
            ]
            image, text, scale = model(augment(images[batch], rng), tokenizer(texts))
            loss = loss_function(image, text, scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            losses.append(loss.item())
        left = (time.time() - start) / (epoch + 1) * (epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}, {left:.0f} s left", flush=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    size = (out / "open_clip_model.safetensors").stat().st_size / 1e6
    print(f"saved {out / 'open_clip_model.safetensors'} ({size:.1f} MB)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "mini_clip", help="folder to write the model to")
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".cache", help="where the drawn images are kept")
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.cache, arguments.epochs, arguments.batch_size, arguments.rate, arguments.seed)
