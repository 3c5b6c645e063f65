"""Files of weights: what open_clip's own loader takes, load_encoder takes too; anything else is named for what it is."""

import json
import re
import warnings
import zipfile

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import save_file

import gpnns_utils as gu
from gpnns.encoders import checkpoints, heads

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SHAPES = {
    "small": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "small-larger": {"embed_dim": 16, "vision_cfg": VISION | {"image_size": 48}, "text_cfg": TEXT},
    "small-longer": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | {"context_length": 24}},
    "small-custom": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True},
    "small-sigmoid": {
        "embed_dim": 16,
        "vision_cfg": VISION,
        "text_cfg": TEXT,
        "custom_text": True,
        "init_logit_bias": -10,
    },
}


@pytest.fixture
def models(tmp_path):
    """Random models of five small open_clip architectures, by name, all from one seed."""
    (tmp_path / "configs").mkdir()
    for name, shape in SHAPES.items():
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(shape))
    open_clip.add_model_config(tmp_path / "configs")
    made = {}
    for name in SHAPES:
        torch.manual_seed(5)
        made[name] = open_clip.create_model(name).eval()
    return made


def taken_by_open_clip(model, path):
    """The same model as open_clip's own loader fills it: the oracle of this module."""
    open_clip.load_checkpoint(model, str(path), weights_only=True)
    return model.eval()


def same_embeddings(encoder, model):
    images, texts = torch.rand(3, 3, *[encoder.image_size] * 2), ["a red flower", "two blue cars"]
    with torch.no_grad():
        assert torch.equal(encoder.image_tower(images), model.encode_image(images))
        tokens = encoder.tokenizer(texts)
        assert torch.equal(encoder.text_tower(texts), model.encode_text(tokens))


@pytest.mark.parametrize(
    ("source", "into", "change"),
    [
        ("small", "small", lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)}),
        ("small", "small-custom", lambda state: state),
        ("small", "small-sigmoid", lambda state: state),
        ("small-sigmoid", "small-sigmoid", lambda state: {k: v for k, v in state.items() if k != "logit_bias"}),
        ("small-sigmoid", "small-sigmoid", lambda state: state | {"logit_bias": state["logit_bias"].reshape(1)}),
        ("small", "small", lambda state: {f"module.{key}": value for key, value in state.items()}),
    ],
    ids=["logit_scale [1]", "CLIP's names", "CLIP in SigLIP", "no logit_bias", "logit_bias [1]", "module."],
)
def test_what_open_clip_s_own_loader_takes_load_encoder_takes(models, tmp_path, source, into, change):
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": change(models[source].state_dict())}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = gu.load_encoder(f"open_clip:{into}/random@{path}", "cpu")
    same_embeddings(encoder, taken_by_open_clip(models[into], path))


@pytest.mark.parametrize(
    ("into", "said"),
    [
        ("small-larger", "visual.positional_embedding was trained for 17 positions and is resized to 37"),
        ("small-longer", "positional_embedding was trained for 16 positions and is resized to 24"),
    ],
)
def test_a_positional_embedding_of_another_size_is_resized_as_open_clip_does_and_said(models, tmp_path, into, said):
    save_file(models["small"].state_dict(), tmp_path / "weights.safetensors")
    with pytest.warns(UserWarning, match=said):
        encoder = gu.load_encoder(f"open_clip:{into}/random@{tmp_path}/weights.safetensors", "cpu")
    same_embeddings(encoder, taken_by_open_clip(models[into], tmp_path / "weights.safetensors"))


def test_a_positional_embedding_of_another_width_does_not_fit(models, tmp_path):
    state = models["small"].state_dict()
    state["visual.positional_embedding"] = torch.zeros(37, 8)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"visual.positional_embedding has shape \(37, 8\), not \(17, 32\)"):
        gu.load_encoder(f"open_clip:small/random@{tmp_path}/weights.safetensors", "cpu")


def guie_checkpoint(model, path, dimensions=12):
    """As train_vit_l_336.ipynb of GUIE's 4th place saves one: model.state_dict() without a suffix in its name."""
    torch.manual_seed(9)
    state = {f"vit_backbone.{key}": value.clone() for key, value in model.state_dict().items()}
    state["head.emb.weight"] = torch.randn(dimensions, 16)
    torch.save(state | {"head.arc.weight": torch.randn(30, dimensions)}, path)
    return state


def test_checkpoints_of_guie_s_4th_place_load_with_head_and_preprocessing(models, tmp_path):
    state = guie_checkpoint(models["small"], tmp_path / "ViT-L-14-336")
    encoder = gu.load_encoder(f"open_clip:small/random@{tmp_path}/ViT-L-14-336", "cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    squeezed = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1).float()[None]
    squeezed = torch.nn.functional.interpolate(squeezed, (32, 32), mode="bilinear", antialias=False).round() / 255
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        expected = models["small"].encode_image((squeezed - mean) / std) @ state["head.emb.weight"].T
        found = encoder.image_tower(encoder.preprocess(picture)[None])
    assert found.shape == (1, 12) and torch.allclose(found, expected, atol=1e-5)
    path = checkpoints.save_checkpoint(encoder, tmp_path / "again")
    again = gu.load_encoder(f"open_clip:small/random@{path}", "cpu")
    with torch.no_grad():
        assert torch.equal(again.image_tower(again.preprocess(picture)[None]), found)


def test_guie_s_checkpoints_are_averaged_backbone_and_head(models, tmp_path):
    """Their own script averaged the heads only, because all its backbones were one module."""
    first = guie_checkpoint(models["small"], tmp_path / "a")
    with torch.no_grad():
        models["small"].visual.proj.mul_(3)
    guie_checkpoint(models["small"], tmp_path / "b")
    states = [checkpoints.load_checkpoint(tmp_path / file) for file in "ab"]
    soup = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    save_file(soup, tmp_path / "soup.safetensors")
    encoder = gu.load_encoder(f"open_clip:small/random@{tmp_path}/soup.safetensors", "cpu")
    assert torch.allclose(encoder.model.visual.proj, 2 * first["vit_backbone.visual.proj"])
    assert torch.allclose(encoder.model.embedding_head.linear.weight, first["head.emb.weight"])


def test_a_checkpoint_with_a_head_loads_in_plain_open_clip_as_the_readme_says(models, tmp_path):
    encoder = heads.add_head(gu.load_encoder("open_clip:small/random", "cpu"), 8)
    path = checkpoints.save_checkpoint(encoder, tmp_path / "tuned")
    (said,) = re.findall(
        r"^```python\n(state = .*?)^```", (gu.HERE / "notebooks" / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    code = said.replace("runs/photos/03_arcmargin.safetensors", str(path))
    names = {"safetensors": safetensors, "model": models["small"], "images": torch.rand(2, 3, 32, 32)}
    with torch.no_grad():
        exec(code, names)
        assert torch.equal(names["embeddings"], encoder.image_tower(names["images"]))
    with pytest.raises(RuntimeError, match="embedding_head.linear.weight"):
        open_clip.load_checkpoint(models["small"], str(path))


class AnyObject:
    pass


def torchscript(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pt", b"something")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605143316\n"
FILES = {
    "empty": ("a.pt", lambda path: path.write_bytes(b""), "is empty .0 bytes.*fetch it again"),
    "empty safetensors": ("a.safetensors", lambda path: path.write_bytes(b""), "is empty .0 bytes.*fetch it again"),
    "Git LFS": ("a.safetensors", lambda path: path.write_bytes(POINTER), "is a Git LFS pointer.*git lfs pull"),
    "a web page": ("a.pt", lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>"), "is a web page.*download"),
    "JSON": ("a.json", lambda path: path.write_text('{"a": 1}'), "damaged, cut off, or of another kind"),
    "an index": (
        "model.safetensors.index.json",
        lambda path: path.write_text('{"weight_map": {}}'),
        "damaged, cut off, or of another kind",
    ),
    "TorchScript": ("ViT-B-32.pt", torchscript, "is a TorchScript archive.*open_clip:ViT-B-32/openai.*state_dict"),
    "Keras": ("a.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "damaged, cut off, or of another kind"),
    "a zip": ("a.pt", zipped, "damaged, cut off, or of another kind"),
    "a folder": ("a", lambda path: path.mkdir(), "is a folder; name the file in it"),
    "objects": (
        "a.ckpt",
        lambda path: torch.save({"state_dict": {"a": torch.zeros(2)}, "args": AnyObject()}, path),
        "it also holds test_checkpoints.AnyObject, and such objects can run code",
    ),
    "text": ("a.pt", lambda path: path.write_text("hello"), "damaged, cut off, or of another kind"),
    "a list": ("a.pt", lambda path: torch.save([torch.zeros(2)], path), "holds no state dict"),
    "nothing": ("a.pt", lambda path: torch.save({}, path), "holds no state dict"),
    "optimizer": (
        "a.pt",
        lambda path: torch.save({"optimizer": {"state": {}, "param_groups": []}}, path),
        "holds no state dict.*it holds optimizer",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_named_for_what_it_is(tmp_path, kind):
    name, write, message = FILES[kind]
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=f"(?s){name}.*{message}"):
        gu.load_encoder(f"mini@{path}", "cpu")


@pytest.mark.parametrize("kept", [1, 7, 8, 60, 5000, -1])
@pytest.mark.parametrize("form", ["a.safetensors", "a.pt"])
def test_a_checkpoint_cut_anywhere_names_the_file_and_what_to_do(models, tmp_path, form, kept):
    path, state = tmp_path / form, models["small"].state_dict()
    (save_file if form.endswith("safetensors") else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{form} is not a readable checkpoint.*Fetch or write it again"):
        gu.load_encoder(f"open_clip:small/random@{path}", "cpu")


def test_deepspeed_s_and_other_names_of_the_weights_are_known(models, tmp_path):
    state = models["small"].state_dict()
    for name in ("module", "model_state_dict", "model", "net", "state_dict"):
        torch.save({name: state, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "a.pt")
        assert torch.equal(checkpoints.load_checkpoint(tmp_path / "a.pt")["visual.proj"], state["visual.proj"])


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("open_clip:ViT-L/14@336px", "open_clip:ViT-L-14-336/openai"),
        ("open_clip:ViT-B/32", "open_clip:ViT-B-32/openai"),
        ("open_clip:RN50x64", "open_clip:RN50x64/openai"),
        ("ViT-B-32/openai", "did you mean open_clip:ViT-B-32/openai"),
        ("resnet50", "did you mean timm:resnet50"),
        ("timm:hf-hub:timm/resnet50.a1_in1", "resnet50.a1_in1k"),
        ("laion/CLIP-ViT-B-32", "open_clip:hf-hub:laion/CLIP-ViT-B-32"),
        ("open_clip:laion/CLIP-ViT-B-32", "open_clip:hf-hub:laion/CLIP-ViT-B-32"),
    ],
)
def test_names_of_other_libraries_are_answered_with_the_name_here(spec, remedy):
    with pytest.raises(ValueError) as error:
        gu.load_encoder(spec, "cpu")
    assert remedy in str(error.value)


def test_timm_s_own_models_go_by_their_name_on_the_hub_too(monkeypatch):
    import timm

    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: asked.append(name) or 1 / 0)
    for spec in ("timm:hf-hub:timm/resnet50.a1_in1k", "timm:timm/resnet50.a1_in1k", "timm:hf-hub:someone/theirs"):
        with pytest.raises(ZeroDivisionError):
            gu.load_encoder(spec, "cpu")
    assert asked == ["resnet50.a1_in1k", "resnet50.a1_in1k", "hf-hub:someone/theirs"]
