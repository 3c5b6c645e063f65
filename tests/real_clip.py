"""A small CLIP on a real backbone, for verification: `python tests/real_clip.py REAL OUT`.

Image tower: MobileNetV2 0.35 with its real weights, kept as they are, and a linear head. Head and a small text tower
learn from emoji and their keywords (training concepts only) by InfoNCE, and the whole is written as an open_clip folder,
OUT/clip, with OUT/bank.txt, the training concepts' keywords. Notebook 04 then starts from `open_clip:local-dir:OUT/clip`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from real_tables import write_table
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpnns_utils as gu

CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_035",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 96,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
}


def main(real: Path, out: Path, epochs: int = 25, batch_size: int = 256) -> None:
    """Write the open_clip folder and the bank of captions."""
    folder = out / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1))
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    trunk = load_file(real / "weights" / "mobilenetv2_035.safetensors")
    own = model.visual.trunk.state_dict()
    model.visual.trunk.load_state_dict({key: value for key, value in trunk.items() if key in own})
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images = gu.load_images(write_table("emoji_train", out, real))
    encoder = gu.Encoder("trunk", preprocess, model.visual.trunk.eval())
    # Unit rows will do: the head has no bias, and its output is made a unit vector.
    pooled = torch.from_numpy(gu.embed_images(encoder, images))
    texts = sorted({text for captions in images.captions for text in captions})
    tokens, number = tokenizer(texts), {text: i for i, text in enumerate(texts)}
    (out / "bank.txt").write_text("\n".join(texts), encoding="utf-8")
    learning = [*model.visual.head.parameters(), *model.text.parameters(), model.logit_scale]
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(learning, 1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        rows = rng.permutation(len(images))[:batch_size]
        chosen = torch.tensor([number[rng.choice(images.captions[row])] for row in rows])
        features = F.normalize(model.visual.head(pooled[rows]))
        logits = model.logit_scale.exp().clamp(max=100) * features @ F.normalize(model.encode_text(tokens[chosen])).T
        right = (chosen[:, None] == chosen).float()
        right = right / right.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
