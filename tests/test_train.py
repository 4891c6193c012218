"""ce_clip.py beyond the losses: models, checkpoints, processes, data and whole runs."""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from PIL import Image
from safetensors.torch import save_file
from torch import tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPConfig, CLIPModel

import ce_clip
import negatives
from ce_clip import FOUR, LOSSES, BadInput, Encoder, gather

read = functools.partial(torch.load, weights_only=True)
TEXT = TINY["text_cfg"] | {"context_length": 24}
POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
OTHERS = {  # models and files besides tiny.json
    "resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}},
    "sigmoid": {  # SigLIP; for a name with that in it, open_clip would download a tokenizer
        "init_logit_bias": -10,
        "custom_text": True,
        "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "coca": {  # with parameters that no loss of ours moves
        "custom_text": True,
        "vision_cfg": TINY["vision_cfg"] | POOL,
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2, "mlp_ratio": 4},
    },
    "mobilenet": {  # its batch norms have an activation within, which open_clip's freezing loses
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_035",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 32,
        }
    },
    "not_causal": {"text_cfg": TINY["text_cfg"] | {"no_causal_mask": True}},
    "pool_last": {"text_cfg": TINY["text_cfg"] | {"pool_type": "last"}},
    "odd": {"text_cfg": {"heads": "x"}},
}


@pytest.fixture(scope="session")
def world(world):
    for name, config in OTHERS.items():
        (world / f"{name}.json").write_text(json.dumps(TINY | config))
    (world / "empty.jsonl").touch()
    return world


def tiny(world, out, *more):
    """Options of a run of 6 steps, of which 3 are an epoch."""
    options = ["--data", world / "negatives.jsonl", "--images", world, "--pretrained", "none"]
    options += ["--model", world / "tiny.json", "--batch-size", 8, "--epochs", 2, "--lr", 1e-3]
    options += ["--workers", 0, "--warmup", 2, "--log-every", 1, "--out", out]
    return [*map(str, options), *(str(option).format(world) for option in more)]


def run(args, processes=0):
    """(exit code, output) of ce_clip.py: in this process, or under torchrun."""
    if processes:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, "-m", *torchrun, "ce_clip.py", *args]
        done = subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", ["ce_clip.py", *args])
        try:
            with contextlib.redirect_stderr(output):
                negatives.run(ce_clip.main)
        except SystemExit as e:
            return 1, output.getvalue() + (e.code if isinstance(e.code, str) else "")
    return 0, output.getvalue()


def train(world, out, *more, processes=0):
    """The log of a run that ends well."""
    code, output = run(tiny(world, out, *more), processes)
    assert code == 0, output
    return read_log(out)


def refused(world, out, *more):
    """The last line of a run that does not."""
    code, output = run(tiny(world, out, *more))
    *before, last = output.splitlines()
    assert (code, last[:19]) == (1, "ce_clip.py: error: ")
    assert "Traceback" not in "".join(before)
    return last


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def model_of(world, name="tiny", seed=0):
    torch.manual_seed(seed)
    return ce_clip.build_model(str(world / f"{name}.json"))


# ---- Models and checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_checkpoint_is_the_same_model_here_and_in_open_clip(tmp_path, quick_gelu):
    """The field's commonest silent error is QuickGELU weights evaluated with GELU; SigLIP's
    pictures have another mean than CLIP's, which open_clip knows by the tag alone."""
    siglip = {"image_mean": (0.5,) * 3, "image_std": (0.4,) * 3}
    siglip |= {"image_interpolation": "bilinear", "image_resize_mode": "squash"}
    config, path = TINY | {"quick_gelu": quick_gelu}, tmp_path / "x.pt"
    loaded = ce_clip.build_model("tiny-2", None, config, siglip)
    ce_clip.save_checkpoint(path, loaded, threshold=tensor([1.0]), step=3)
    assert list(tmp_path.iterdir()) == [path]
    saved, images = read(path), torch.randn(2, 3, 32, 32)
    assert (saved["model"], saved["config"], saved["step"]) == ("tiny-2", config, 3)
    ours = ce_clip.load_model(str(path), "RN50")  # the file knows better
    theirs, *_ = open_clip.create_model_and_transforms(saved["model"], pretrained=str(path))
    for model in (ours.model, theirs):
        features = [x.eval().encode_image(images) for x in (model, loaded.model)]
        assert torch.equal(*features)
        activation = open_clip.transformer.QuickGELU if quick_gelu else torch.nn.GELU
        assert isinstance(model.transformer.resblocks[0].mlp.gelu, activation)
    assert "(0.5, 0.5, 0.5)" in str(loaded.eval_transform) == str(ours.eval_transform)
    assert str(loaded.train_transform) == str(ours.train_transform)


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("layout", ["bare", "state_dict", "model", "model_state_dict"])
def test_checkpoints_of_the_field_load(world, tmp_path, capsys, layout, prefix):
    """As open_clip and CE-CLIP (state_dict, module.), NegCLIP (with the learning rate as a number
    of numpy), and others leave them. They do not say their activation."""
    path, name = str(tmp_path / "x.pt"), str(world / "tiny.json")
    expected = model_of(world).model.state_dict()
    saved = {prefix + key: value for key, value in expected.items()}
    if layout != "bare":
        saved = {"config": {}, "optimizer": [{"lr": np.float64(1e-6)}], layout: saved}
    torch.save(saved, path)
    assert flat(ce_clip.load_model(path, name).model.state_dict()) == flat(expected)
    assert f"warning: {path} is read as a {name}; its activation is" in capsys.readouterr().out


def test_which_weights_of_several_are_read():
    model = torch.nn.Linear(1, 1, bias=False)
    of = {key: {"weight": tensor([[n]])} for n, key in enumerate(["state_dict_ema", "state_dict"])}
    for state in (of, {"state_dict_ema": of["state_dict"]}):
        ce_clip.load_weights(model, state)
        assert model.weight == 1


@pytest.mark.parametrize("beside", ["settings", "numbers", "path", "counts"])
def test_what_lies_beside_weights_does_no_harm(world, tmp_path, beside):
    counts = defaultdict(list)
    counts["loss"].append(0.5)
    numbers = [np.float32(1), np.int64(2), np.bool_(True)]
    settings = argparse.Namespace(lr=1e-5, out=Path("/a/b"), betas=(0.9, 0.98))
    things = {"settings": settings, "numbers": numbers, "path": Path("/a/b"), "counts": counts}
    expected = model_of(world).model.state_dict()
    torch.save({"state_dict": expected, beside: things[beside]}, path := tmp_path / "x.pt")
    saved = ce_clip.read_checkpoint(path)
    assert saved[beside] == things[beside]
    assert flat(saved["state_dict"]) == flat(expected)


def same_features(loaded, model):
    images, tokens = torch.randn(2, 3, 32, 32), loaded.tokenizer(["a dog", "a red cat eats"])
    with torch.no_grad():
        expected = model.eval().encode_image(images), model.encode_text(tokens)
        model = loaded.model.eval()
        torch.testing.assert_close(
            (model.encode_image(images), model.encode_text(tokens)), expected
        )


def test_safetensors_and_files_of_old_versions_of_torch(world, tmp_path):
    model = model_of(world).model
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    torch.save(model.state_dict(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        same_features(ce_clip.load_model(str(path), str(world / "tiny.json")), model)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_as_openai_publishes_them(world, tmp_path, monkeypatch):
    """With three integers among the weights, and half precision; no other is loaded."""
    model = model_of(world).model
    original = copy.deepcopy(model)
    mask = model._buffers.pop("attn_mask")  # OpenAI's is no weight
    model.attn_mask = mask
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(model).pop(name, None)
        model.register_buffer(name, tensor(77))
    examples = {"encode_image": torch.ones(1, 3, 32, 32), "encode_text": torch.ones(1, 77).int()}
    traced = torch.jit.trace_module(model.eval(), examples, check_trace=False)
    traced.half().save(tmp_path / "x.pt")
    with pytest.raises(BadInput, match="it is TorchScript, but not OpenAI's"):
        ce_clip.load_model(str(tmp_path / "x.pt"), str(world / "tiny.json"))
    known = ce_clip.openai_digests()
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in known
    digest = hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(ce_clip, "openai_digests", lambda: known | {digest})
    loaded = ce_clip.load_model(str(tmp_path / "x.pt"), str(world / "tiny.json"))
    assert loaded.model.visual.proj.dtype == torch.float32
    same_features(loaded, original.half().float())


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_clip_of_transformers(world, tmp_path, file):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 16, "intermediate_size": 64, "eos_token_id": 49407, **sizes}
    vision = {"hidden_size": 32, "intermediate_size": 128, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision | sizes, projection_dim=16)
    theirs = CLIPModel(config).eval()
    for name, weight in theirs.named_parameters():  # biases begin as 0
        torch.nn.init.normal_(weight, std=0.3 if "proj" in name else 1)
    if file.endswith(".bin"):
        older = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # is no weight
        torch.save(theirs.state_dict() | older, tmp_path / file)
    else:
        theirs.save_pretrained(tmp_path)
        (tmp_path / "pytorch_model.bin").write_text("an older copy is not read")
    two_layers = copy.deepcopy(TINY)
    two_layers["vision_cfg"]["layers"] = two_layers["text_cfg"]["layers"] = 2
    (tmp_path / "two.json").write_text(json.dumps(two_layers))
    loaded = ce_clip.load_model(str(tmp_path), str(tmp_path / "two.json"))
    images, tokens = torch.randn(2, 3, 32, 32), loaded.tokenizer(["a dog", "a red cat eats"])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images)
        model = loaded.model.eval()
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(image, expected.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, expected.text_embeds, atol=1e-5, rtol=1e-4)
    assert model.logit_scale == theirs.logit_scale


def test_weights_of_other_sizes(world, tmp_path, capsys):
    """Positions of pictures are resized, as by open_clip, and it is said; of texts they are not."""
    torch.save(model_of(world).model.state_dict(), path := tmp_path / "x.pt")
    larger = TINY["vision_cfg"] | {"image_size": 64}
    (tmp_path / "larger.json").write_text(json.dumps(TINY | {"vision_cfg": larger}))
    (tmp_path / "shorter.json").write_text(json.dumps(TINY | {"text_cfg": TEXT}))
    loaded = ce_clip.load_model(str(path), str(tmp_path / "larger.json"))
    assert "warning: weights of another picture size" in capsys.readouterr().out
    theirs, *_ = open_clip.create_model_and_transforms("larger", pretrained=str(path))
    torch.save(model_of(world).model.half().state_dict(), tmp_path / "half.pt")
    ce_clip.load_model(str(tmp_path / "half.pt"), str(tmp_path / "larger.json"))
    capsys.readouterr()
    assert flat(loaded.model.state_dict()) == flat(theirs.state_dict())
    with pytest.raises(BadInput, match="size mismatch for positional_embedding"):
        ce_clip.load_model(str(path), str(tmp_path / "shorter.json"))
    ce_clip.load_model(str(path), str(world / "tiny.json"))
    assert "picture size" not in capsys.readouterr().out


def flat(x):
    if isinstance(x, dict):
        return {key: flat(value) for key, value in x.items()}
    return x.numpy().tobytes() if isinstance(x, torch.Tensor) else x


def test_openai_weights_always_get_quickgelu(monkeypatch):
    def create(name, pretrained, **_):
        raise RuntimeError(f"no network for {name} {pretrained}!")

    def asks(*source):
        with pytest.raises(BadInput, match="no network") as e:
            ce_clip.load_model(*source)
        return str(e.value).split("for ")[1]

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    assert asks("openai") == asks("openai", "ViT-B-32") == "ViT-B-32-quickgelu openai!"
    assert asks("ViT-L-14/openai") == "ViT-L-14-quickgelu openai!"
    assert asks("laion2b_e16", "ViT-B-32") == "ViT-B-32 laion2b_e16!"
    for name in open_clip.list_pretrained_models_by_tag("openai"):
        assert open_clip.get_model_config(asks("openai", name).split()[0])["quick_gelu"]


def test_a_folder_does_not_hide_a_tag(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    monkeypatch.setattr(ce_clip, "build_model", lambda *args: args)
    assert ce_clip.load_model("openai") == (ce_clip.DEFAULT_MODEL, "openai")


def save_code(path, mark):
    """What a pickle can do when it is loaded."""
    code = type("Code", (), {"__reduce__": lambda self: (Path.write_text, (mark, "it ran"))})()
    torch.save({"state_dict": {}, "code": code}, path)


def test_bad_checkpoints_are_one_line(world, tmp_path):
    path, mark = tmp_path / "x.pt", tmp_path / "mark"

    def assert_refused(message):
        with pytest.raises(BadInput, match=f"^{path} is {message}"):
            ce_clip.load_model(str(path), str(world / "tiny.json"))

    assert_refused("no file, and no TAG or MODEL/TAG of open_clip's weights")
    with pytest.raises(BadInput, match=f"^{tmp_path} has none of open_clip_model.safetensors, "):
        ce_clip.load_model(str(tmp_path))
    save_code(path, mark)
    assert_refused("not a checkpoint of .*tiny.json: it holds .*, which might run code")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have run
    torch.save({"logit_scale": torch.ones(()), **dict.fromkeys("abcd", 1)}, path)
    assert_refused(
        r"not a .*: 37 weights are missing \(positional_embedding, text_projection, "
        r"visual.class_embedding\), 4 weights are unknown \(a, b, c\)$"
    )
    path.write_bytes(path.read_bytes()[:500])
    assert_refused("not a checkpoint of .*tiny.json: torch cannot read it: damaged, or no checkpo")
    torch.save([1], path)
    assert_refused("not a checkpoint of .*tiny.json: it holds a list, not a state dict")
    for content, message in {
        "": "it is empty",
        "\n<!DOCTYPE html><html>Sign in</html>": "it is a web page",
        "version https://git-lfs.github.com/spec/v1\noid": "it is a pointer of Git LFS",
    }.items():
        path.write_text(content)
        assert_refused(f"not a checkpoint of .*tiny.json: {message}")


@pytest.mark.parametrize("n, chunks", [(2, 1), (150, 2), (400, 4)])
def test_cut_captions_have_the_features_and_gradient_of_the_full_length(world, n, chunks):
    loaded, rng, words = model_of(world), random.Random(0), "a red dog ! sees = 3".split()
    texts = [" ".join(rng.choices(words, k=rng.choice([1, 3, 9, 30]))) for _ in range(n - 1)]
    tokens = loaded.tokenizer([*texts, "ball " * 99])[torch.randperm(n)]
    assert (tokens.argmax(1) == 76).sum() == 1  # "!" is token 0, which is not padding
    model = loaded.model.double()  # so that nothing but a wrong rule makes a difference
    shapes, found = [], []
    model.token_embedding.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    for encode in (ce_clip.encode_text, functools.partial(open_clip.CLIP.encode_text, normalize=1)):
        model.zero_grad()
        features = encode(model, tokens)
        (features * torch.arange(n * 16).view(n, 16).sin()).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"features": features.detach()} | grads)
    assert len(found[0]) > 10
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert (shapes.pop(), len(shapes), shapes[-1][1]) == ((n, 77), chunks, 77)
    assert chunks == 1 or shapes[0][1] < 20


@pytest.mark.parametrize("name", ["not_causal", "pool_last", "sigmoid", "coca"])
def test_other_text_towers_get_their_full_length(world, name):
    loaded = model_of(world, name)
    tokens = loaded.tokenizer(["a red dog", "a ball"])
    expected = loaded.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ce_clip.encode_text(loaded.model, tokens), expected)


# ---- Data ----------------------------------------------------------------------------------------


def test_regions_are_cropped_and_large_jpegs_decoded_at_a_fraction_of_their_size(tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.putpixel((5, 3), (255, 0, 0))
    picture.save(tmp_path / "a.png")
    record = {"image": "a.png", "box": [5, 3, 6, 4], "caption": "a", "object": "b", "action": None}
    (tmp_path / "n.jsonl").write_text(json.dumps(record))
    path, box, texts = ce_clip.Records(tmp_path / "n.jsonl", tmp_path, ["object", "action"])[0]
    assert texts == ["a", "b", ""]
    region = ce_clip.open_image(path, box, draft=1)
    assert (region.size, region.getpixel((0, 0))) == ((1, 1), (255, 0, 0))
    for box in [
        (8, 0, 9, 1),
        (0, -3, 4, 0),
        (math.nan, 0, 9, 9),
        (0, 0, 9, math.nan),
        (3, 3, 3, 4),
    ]:
        outside = re.escape(f"its size is (8, 8), the box {box} lies outside")
        with pytest.raises(BadInput, match=f"a.png is not a picture: {outside}$"):
            ce_clip.open_image(path, box)
    for box, size in {
        (-3, 2, 5, 99): (5, 6),
        (1.2, 0.9, 3.6, 4.4): (3, 3),
        (0, 5, math.inf, 9): (8, 3),
    }.items():
        assert ce_clip.open_image(path, box).size == size  # nothing black beyond the border

    Image.new("L", (640, 480)).save(path := tmp_path / "a.jpg")
    sizes = [ce_clip.open_image(path, None, draft).size for draft in (0, 224, 400)]
    assert sizes == [(640, 480), (320, 240), (640, 480)]
    assert ce_clip.open_image(path, (400, 0, 600, 400), 224).size == (200, 400)
    assert ce_clip.open_image(path).mode == "RGB"


def test_pictures_of_16_bits_are_scaled_to_8(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    deep = grey.astype(np.uint16) * 257
    for array, name in ((deep, "a.png"), (deep, "a.tif"), (deep.astype(np.int32), "b.tif")):
        Image.fromarray(array).save(tmp_path / name)
        found = np.asarray(ce_clip.open_image(tmp_path / name))
        assert (found == grey[:, :, None]).all()
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "b.tif")  # 8 bits after all
    assert (np.asarray(ce_clip.open_image(tmp_path / "b.tif")) == grey[:, :, None]).all()
    Image.fromarray(np.array([[-9, 2560, 99_999]], np.int32)).save(tmp_path / "b.tif")
    assert ce_clip.open_image(tmp_path / "b.tif").convert("L").tobytes() == bytes([0, 10, 255])
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "c.tif")
    with pytest.raises(BadInput, match="c.tif is not a picture: its values have no known range"):
        ce_clip.open_image(tmp_path / "c.tif")


def test_pictures_are_looked_for_before_training(tmp_path):
    def records(*names):
        lines = [{"caption": '"image": "no.png"', "image": name} for name in names]
        (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return ce_clip.Records(tmp_path / "n.jsonl", tmp_path / "images", [])

    names = ["a b.png", 'q"\\ä.png', "x/y/1.jpg", "x/y/2.jpg"]
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = records(*names, names[0])
    assert [found[i][0] for i in (4, 1, 2)] == [tmp_path / "images" / names[i] for i in (0, 1, 2)]
    with pytest.raises(BadInput, match=r"x/y/3.jpg: no such picture \(2 are missing there\)"):
        records(*names, "x/y/3.jpg", "x/y/4.jpg")
    with pytest.raises(BadInput, match="images/z: No such file or directory"):
        records(*names, "z/1.jpg")
    with pytest.raises(BadInput, match='"ö.jpg: no such picture'):
        records(*names, '"ö.jpg')
    with pytest.MonkeyPatch.context() as patch:  # a disk that spells names in its own way
        patch.setattr(os, "listdir", lambda _: [])
        records(*names)
    with pytest.raises(BadInput, match="^/no.jpg: no such picture"):
        records(*names, "/no.jpg")
    (tmp_path / "n.jsonl").write_text('{"caption": "a", "image": "a\\b.jpg"}'.replace("b", "d"))
    with pytest.raises(BadInput, match="n.jsonl is not as expected: JSONDecodeError Invalid"):
        ce_clip.Records(tmp_path / "n.jsonl", tmp_path, [])


def test_negatives_that_cannot_be_written_can_lie_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "vg" / "images").mkdir(parents=True)
    error = PermissionError(13, "Permission denied", "vg/x.part")
    monkeypatch.setattr(negatives, "generate", Mock(side_effect=error))
    args = SimpleNamespace(data=["vg"], data_root=tmp_path)
    with pytest.raises(
        BadInput, match="Permission denied: 'vg/x.part' .* --data FILE --images .*vg/i"
    ):
        ce_clip.load_records(args, [])


def test_augmentation_depends_on_seed_epoch_and_item_alone(world, monkeypatch):
    loaded = model_of(world)._replace(train_transform=lambda picture: torch.rand(3))
    records = ce_clip.Records(world / "negatives.jsonl", world, list(FOUR))
    drafts, real = set(), ce_clip.open_image
    monkeypatch.setattr(ce_clip, "open_image", lambda *args: drafts.add(args[2]) or real(*args))
    pairs = ce_clip.Pairs(records, loaded, seed=0)
    first, tokens, valid = pairs[0, 1]
    torch.rand(5)
    assert torch.equal(pairs[0, 1][0], first)
    others = [pairs[1, 1], pairs[0, 0], ce_clip.Pairs(records, loaded, seed=1)[0, 1]]
    assert not any(torch.equal(other[0], first) for other in others)
    assert tokens.equal(loaded.tokenizer(records[1][2]))
    assert valid.tolist() == [True, True, False, True]
    assert drafts == {32}


def test_batches_cover_an_epoch_and_split_over_processes(world, tmp_path, monkeypatch):
    whole = list(ce_clip.batch_keys(11, 4, epochs=2, seed=1))
    assert [epoch for batch in whole for epoch, _ in batch] == [0] * 8 + [1] * 8
    assert len({i for _, i in sum(whole[:2], [])}) == 8
    assert whole[:2] != [[(0, i) for _, i in batch] for batch in whole[2:]]
    assert whole != list(ce_clip.batch_keys(11, 4, epochs=2, seed=2))
    parts = []
    monkeypatch.setattr(ce_clip, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(ce_clip, "rank", lambda rank=rank: rank)
        parts.append(list(ce_clip.batch_keys(11, 4, epochs=2, seed=1)))
    assert [a + b for a, b in zip(*parts)] == whole
    message = "--batch-size 7 does not split over 2 processes"
    assert message in refused(world, tmp_path / "x", "--batch-size", 7)


def test_data_are_a_union_of_files_and_names(world, tmp_path, monkeypatch):
    """CC3M is as img2dataset leaves it; its negatives are made first."""
    generate = functools.partial(negatives.generate, filler="ngram")
    monkeypatch.setattr(negatives, "generate", generate)
    file = str(world / "negatives.jsonl")
    args = SimpleNamespace(data=["cc3m", file], images=str(world), data_root=tmp_path)
    with pytest.raises(BadInput, match="--data cc3m needs .*cc3m/images: docs/data.md says where"):
        ce_clip.load_records(args, ["relation"])
    picture = tmp_path / "cc3m" / "images" / "00000" / "1.jpg"
    picture.parent.mkdir(parents=True)
    picture.touch()
    picture.with_suffix(".txt").write_text("a red dog is on a ball")
    records = ce_clip.load_records(args, ["relation"])
    assert [len(part) for part in records.datasets] == [1, 24]
    assert records[0] == (picture, None, ["a red dog is on a ball", "a red ball is on a dog"])
    assert records[1][0] == world / "0.png"
    assert ce_clip.load_records(args, [])[1] == (world / "0.png", None, records[1][2][:1])


# ---- Steps ---------------------------------------------------------------------------------------


def example_batch(world, seed=0):
    loaded = model_of(world, seed=seed)
    records = ce_clip.Records(world / "negatives.jsonl", world, list(FOUR))
    pairs = ce_clip.Pairs(records, loaded._replace(train_transform=loaded.eval_transform), 0)
    return loaded.model, [torch.stack(x) for x in zip(*(pairs[0, i] for i in range(8)))]


def test_missing_negatives_are_not_encoded_and_their_features_are_zero(world, monkeypatch):
    model, (images, tokens, valid) = example_batch(world)
    encoded, real = [], ce_clip.encode_text
    monkeypatch.setattr(ce_clip, "encode_text", lambda m, t: encoded.append(len(t)) or real(m, t))
    image, text, scale, itm = Encoder(model)(images, tokens, valid)
    assert encoded == [8 + valid.sum()] != [40]
    assert (scale.item(), itm.tolist()) == (pytest.approx(1 / 0.07), [0])
    torch.testing.assert_close(image, model.encode_image(images, normalize=True))
    every = model.encode_text(tokens.flatten(0, 1), normalize=True).view(8, 5, 16)
    torch.testing.assert_close(text[:, 0], every[:, 0])
    torch.testing.assert_close(text[:, 1:], every[:, 1:] * valid[..., None])


def gradients(world, released=False, micro=0) -> dict[str, torch.Tensor]:
    """Of all parameters, on this process's share of a global batch of 8, by a step as in train."""
    model, batch = example_batch(world)
    encoder = Encoder(model, micro_batch=micro)
    if ce_clip.world_size() > 1:
        encoder = DistributedDataParallel(encoder)
    share = 8 // ce_clip.world_size()
    images, tokens, valid = (x.split(share)[ce_clip.rank()] for x in batch)
    image, text, scale, itm = encoder(images, tokens, valid)
    image, text, valid = gather(image), gather(text), gather(valid)
    sims = ce_clip.similarities(image, text, scale)
    loss, _ = ce_clip.ce_clip_loss(*sims, torch.ones(len(FOUR)), valid)
    if released:
        every = scale * torch.einsum("id,jkd->ijk", text[:, 0], text[:, 1:])
        loss = loss + 0.2 * ce_clip.imc_loss_released(every, valid)
    (loss + gather(itm).mean()).backward()
    return {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("micro", [1, 3, 8, 100])
def test_micro_batches_have_the_gradient_of_the_whole(world, micro):
    found, expected = gradients(world, micro=micro), gradients(world)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found["visual.conv1.weight"].abs().max() > 1e-3


CASES = [{}, {"released": True}, {"micro": 3}]
RUNS = {
    "itc": ["--losses", "itc"],
    "coca": ["--model", "{}/coca.json", "--micro-batch", 3],
    "sigmoid": ["--model", "{}/sigmoid.json"],
}


def one_of_two(rank: int, world: Path, out: Path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/init", rank=rank, world_size=2)
    torch.save([gradients(world, **case) for case in CASES], out / f"{rank}.pt")
    for name, options in [*RUNS.items(), ("itc", [*RUNS["itc"], "--resume"])]:
        if rank == 0 and "--resume" in options:  # it goes on with the checkpoint before
            (out / "itc" / "epoch_2.pt").write_bytes(b"damaged")
        dist.barrier()
        sys.argv = ["ce_clip.py", *tiny(world, out / name, *options)]
        ce_clip.train(ce_clip.parse_args(), torch.device("cpu"))
        dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one(world, tmp_path):
    """A gather without gradient halves the gradient of all but logit_scale."""
    torch.multiprocessing.spawn(one_of_two, (world, tmp_path), nprocs=2)
    for rank in range(2):
        for found, case in zip(read(tmp_path / f"{rank}.pt"), CASES, strict=True):
            expected = gradients(world, **case | {"micro": 0})
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, options in RUNS.items():
        log = train(world, tmp_path / f"{name}-1", *options)
        for line, other in zip(log, read_log(tmp_path / name), strict=True):
            assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
        assert log[0]["loss"] != log[-1]["loss"]
        ce_clip.load_model(str(tmp_path / name / "epoch_2.pt"))


def test_lr_warms_up_linearly_then_follows_a_cosine_to_zero():
    factors = [ce_clip.lr_factor(step, 4, 12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    expected = [(1 + math.cos(x * math.pi)) / 2 for x in (0.5, 0.75, 1)]
    assert factors[8::2] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["tiny", "resnet"])
def test_biases_norms_and_logit_scale_do_not_decay(world, tmp_path, monkeypatch, name):
    model = model_of(world, name).model
    model.visual.conv1.weight.requires_grad_(False)
    model.position_bias = torch.nn.Parameter(torch.ones(2, 2))  # as that of a Swin Transformer
    loaded = model_of(world, name)._replace(model=model)
    monkeypatch.setattr(ce_clip, "build_model", lambda name: loaded)
    monkeypatch.setattr(sys, "argv", ["ce_clip.py", *tiny(world, tmp_path)])
    _, optimizer, _, _ = ce_clip.begin(ce_clip.parse_args(), [], {}, torch.device("cpu"))
    plain, decayed = optimizer.param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    decayed = {names[id(p)] for p in decayed["params"]}
    assert {"token_embedding.weight", "text_projection"} < decayed
    assert not any(part in n for n in decayed for part in ("ln_", "bn", "bias", "logit_scale"))


# ---- Whole runs ----------------------------------------------------------------------------------


def test_run_on_one_and_two_processes(world, tmp_path):
    log = train(world, tmp_path / "one")
    log_2 = train(world, tmp_path / "two", processes=2)
    for line, line_2 in zip(log, log_2, strict=True):  # the same losses, thresholds and schedule
        assert line == pytest.approx(line_2, rel=1e-3)
    assert [line["step"] * line["epoch"] for line in log] == [1, 2, 3, 8, 10, 12]
    names = "step epoch loss itc imc cmr itm logit_scale lr".split()
    assert {*log[0]} == {*names, *(f"threshold_{kind}" for kind in FOUR)}
    assert [line["lr"] for line in log] == [1e-3 * ce_clip.lr_factor(i, 2, 6) for i in range(6)]
    settings = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (settings["kinds"], settings["losses"]) == (list(FOUR), LOSSES[0])
    epoch = read(tmp_path / "two" / "epoch_2.pt")
    groups = epoch["optimizer"]["param_groups"]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(log[5]["lr"], x) for x in (0, 0.1)]
    assert (epoch["step"], epoch["threshold"].shape) == (6, (4,))
    one = read(tmp_path / "one" / "epoch_2.pt")["state_dict"]
    torch.testing.assert_close(one, epoch["state_dict"], rtol=1e-2, atol=1e-3)

    # again: the run that is there is refused, and untouched
    before = {path: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert "one holds checkpoints: --resume a run of ours" in refused(world, tmp_path / "one")
    assert {path: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before


def test_two_machines_are_one(world, tmp_path):
    """Two launchers that meet at an address, as on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7"]
    options += ["--rdzv_backend", "c10d", "--rdzv_endpoint", address, "ce_clip.py"]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    launchers = []
    for _ in range(2):
        launchers.append(subprocess.Popen([*command, *tiny(world, tmp_path / "two")], stderr=-1))
    errors = [launcher.communicate()[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    losses = [[line["loss"] for line in read_log(tmp_path / "two")]]
    losses.append([line["loss"] for line in train(world, tmp_path / "one")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_thresholds_are_those_of_the_step_before(world, tmp_path):
    """A kind that the batch, here of one pair, has not keeps its own."""
    names = [f"threshold_{kind}" for kind in FOUR]
    log = train(world, tmp_path / "x", *"--batch-size 1 --epochs 1 --upper-bound 1e6".split())
    for line, following, [(_, i)] in zip(log, log[1:], ce_clip.batch_keys(24, 1, 1, 42)):
        kept = [line[name] == following[name] for name in names]
        assert kept == [(i + n) % 3 == 0 for n in range(4)]  # those are missing in the world
    assert {log[0][name] for name in names} == {0}
    log = train(world, tmp_path / "bound", "--upper-bound", -3)
    assert {line[name] for line in log[1:] for name in names} == {-3}
    log = train(world, tmp_path / "fixed", "--threshold", 5)
    assert {line[name] for line in log for name in names} == {5}


def test_losses_of_table_4_are_settings_of_eq_8(world, tmp_path):
    found = {}
    for losses in ce_clip.LOSSES:
        options = ["--batch-size", 24, "--epochs", 1, "--losses", losses, "--threshold", 1]
        [line] = train(world, tmp_path / losses, *options)
        expected = line["itc"] + 0.4 * line["cmr"] * ("cmr" in losses)
        expected += 0.2 * line["imc"] * ("imc" in losses)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        found[losses] = line
    assert found["itc"]["itc"] < found["itc,hn"]["itc"] == found[LOSSES[0]]["itc"]
    assert found["itc"]["imc"] == found["itc"]["cmr"] == 0 < found[LOSSES[0]]["cmr"]
    assert not any(name.startswith("threshold") for name in found["itc"])
    [keys] = ce_clip.batch_keys(24, 24, 1, 42)
    loaded = model_of(world, seed=42)
    pairs = ce_clip.Pairs(ce_clip.Records(world / "negatives.jsonl", world, FOUR), loaded, 42)
    images, tokens, valid = (torch.stack(x) for x in zip(*(pairs[key] for key in keys)))
    _, text, scale, _ = Encoder(loaded.model)(images, tokens, valid)
    every = scale * torch.einsum("id,jkd->ijk", text[:, 0], text[:, 1:])
    released = ce_clip.imc_loss_released(every, valid).item()
    assert found["itc,hn,imc_released,cmr"]["imc"] == pytest.approx(released, rel=1e-5)


def test_kinds_that_are_trained_on(world, tmp_path):
    """The paper's four, fewer, or also a fifth; the settings of a run include them."""
    log = train(world, tmp_path / "x", "--kinds", "object", "relation")
    assert [k for k in log[0] if "threshold" in k] == ["threshold_relation", "threshold_object"]
    message = refused(world, tmp_path / "x", "--resume")
    assert "x was begun with kinds ['relation', 'object']: resume with the same" in message
    more = ["--kinds", *FOUR, "number"]
    message = "is not a record of negatives.py: KeyError 'number'"
    assert message in refused(world, tmp_path / "y", *more)
    five = Path(shutil.copytree(world, tmp_path / "five"))
    lines = (world / "negatives.jsonl").read_text().replace("}", ', "number": "two dogs"}')
    (five / "negatives.jsonl").write_text(lines)
    log = train(five, tmp_path / "z", *more)
    assert log[1]["threshold_number"] not in (0, log[1]["threshold_object"])
    assert read(tmp_path / "z" / "epoch_2.pt")["threshold"].shape == (5,)


@pytest.mark.parametrize("name", ["tiny", "resnet", "mobilenet"])
def test_a_locked_image_tower_does_not_change(world, tmp_path, name):
    """Nor do the statistics of its batch norms; a timm tower's projection, which may be a random
    one, is trained, as by open_clip. logit_scale is kept below log 100, as in CLIP."""
    before, images = model_of(world, name), torch.randn(4, 3, 32, 32)
    before.model.logit_scale.data.fill_(5)
    ce_clip.save_checkpoint(tmp_path / "start.pt", before)
    train(world, tmp_path / "x", "--lock-image", "--pretrained", tmp_path / "start.pt")
    after = ce_clip.load_model(str(tmp_path / "x" / "epoch_2.pt"))
    towers = [loaded.model.eval().visual for loaded in (before, after)]
    assert torch.equal(*(getattr(tower, "trunk", tower)(images) for tower in towers))
    old, new = before.model.state_dict(), after.model.state_dict()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert {"logit_scale", "token_embedding.weight", "text_projection"} < changed
    trained = {"visual.head.proj.weight"} if name == "mobilenet" else set()
    assert {key for key in changed if key.startswith("visual.")} == trained
    assert 4.5 < new["logit_scale"] <= math.log(100)


LONG = ["--epochs", 8, "--save-every", 1, "--resume"]  # 24 steps


@pytest.fixture(scope="session")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert [line["step"] for line in train(world, out, *LONG)] == [*range(1, 25)]
    return out


@pytest.mark.parametrize("more", ["--workers 2", "--micro-batch 3", "--grad-checkpointing"])
def test_workers_and_less_memory_change_no_step(world, uninterrupted, tmp_path, monkeypatch, more):
    asked, real = [], open_clip.CLIP.set_grad_checkpointing
    monkeypatch.setattr(open_clip.CLIP, "set_grad_checkpointing", lambda m: asked.append(real(m)))
    log = train(world, tmp_path / "x", *LONG, *more.split())
    rel = 0 if "workers" in more else 1e-3
    for line, other in zip(log, read_log(uninterrupted), strict=True):
        assert line == pytest.approx(other, rel=rel, abs=rel)
    assert len(asked) == ("grad" in more)


# ---- Runs that end early -------------------------------------------------------------------------


def same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimiser, thresholds, and every line of the log."""
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))
    for path in a.glob("*.pt"):
        one, two = (read(folder / path.name) | {"settings": 0} for folder in (a, b))
        assert flat(one) == flat(two), path.name
    assert read_log(a) == read_log(b)


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(world, uninterrupted, tmp_path):
    (log := tmp_path / "run" / "log.jsonl").parent.mkdir()
    log.touch()
    rng, reached = random.Random(0), 0
    command = [sys.executable, "ce_clip.py", *tiny(world, tmp_path / "run", *LONG)]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and log.read_text().count("\n") <= reached + 2:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.wait()
        reached = log.read_text().count("\n")
        assert 0 < reached < 24
    train(world, tmp_path / "run", *LONG)
    same_run(uninterrupted, tmp_path / "run")


def test_killed_around_every_file_that_is_put_in_place(world, tmp_path, monkeypatch):
    options = ["--resume", "--save-every", 5]
    train(world, tmp_path / "whole", *options)
    real = os.replace
    for moment in range(6):  # before and after each of 3 files: 2 epochs, and step 5
        moments = [False] * moment + [True, False]

        def replace(a, b, moments=moments):
            for step in (lambda: None, lambda: real(a, b)):
                step()
                if moments.pop(0):
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            run(tiny(world, tmp_path / f"{moment}", *options))
        train(world, tmp_path / f"{moment}", *options)
        same_run(tmp_path / "whole", tmp_path / f"{moment}")


@pytest.mark.parametrize("damage", ["cut", "empty", "code"])
def test_a_damaged_state_is_passed_over(world, uninterrupted, tmp_path, damage):
    copied = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    last = copied / "epoch_8.pt"
    if damage == "code":
        save_code(last, copied / "mark")
    else:
        last.write_bytes(last.read_bytes()[: 1000 * (damage == "cut")])
    code, output = run(tiny(world, copied, *LONG))
    assert code == 0, output
    assert f"{last} is damaged, passed over: " in output
    same_run(uninterrupted, copied)


def test_a_run_of_other_settings_or_captions_is_not_resumed(world, uninterrupted, tmp_path):
    copied = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    message = refused(world, copied, *LONG, "--alpha", 0.3)
    assert message.endswith("run was begun with alpha 0.2: resume with the same")
    moved = Path(shutil.copytree(world, tmp_path / "moved"))
    more = [*LONG, "--model", world / "tiny.json"]
    train(moved, copied, *more)  # does nothing: it is done
    lines = (world / "negatives.jsonl").read_text()
    (moved / "negatives.jsonl").write_text(lines.replace("eats", "sees", 1))
    assert "run was begun with captions [[24, " in refused(moved, copied, *more)
    for path in uninterrupted.glob("*[!n]"):  # config.json says where the captions are now
        assert (copied / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_checkpoints_of_others_are_not_lost(world, tmp_path, more):
    """open_clip's own runs leave epoch_N.pt too."""
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {}}, path)
    for content in (path.read_bytes(), b"somebody's"):
        path.write_bytes(content)
        assert f"{tmp_path} holds" in refused(world, tmp_path, *more)
        assert path.read_bytes() == content


def test_a_lost_log_begins_anew(world, uninterrupted, tmp_path):
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    for name in ("epoch_8.pt", "log.jsonl"):
        (folder / name).unlink()
    assert [line["step"] for line in train(world, folder, *LONG)] == [24]


def test_a_broken_or_missing_picture_ends_the_run(world, tmp_path):
    folder = Path(shutil.copytree(world, tmp_path / "world"))
    path, out = folder / "11.png", tmp_path / "x"
    for content in (b"not a picture", path.read_bytes()[:900]):
        path.write_bytes(content)
        assert f"error: {path} is not a picture: " in refused(folder, out)
    path.unlink()
    missing = f"ce_clip.py: error: {path}: no such picture (1 are missing there)"
    command = [sys.executable, "ce_clip.py", *tiny(folder, out, "--workers", 2)]
    done = subprocess.run(command, stderr=-1, text=True, timeout=30)  # its loaders end with it
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, missing)


MISTAKES = {
    "--data coco --data-root x": "--data coco needs x/coco/train2014: docs/data.md ",
    "--images nowhere": "nowhere: No such file or directory",
    "--data coc0": "error: coc0: No such file or directory",
    "--data {}/tiny.json --batch-size 1": "tiny.json, line 1, is not a record of negatives.py: Key",
    "--data {}/empty.jsonl": "0 captions do not fill one batch of 8",
    "--batch-size 256": "24 captions do not fill one batch of 256",
    "--batch-size 0": "argument --batch-size: 0 is not a number from 1 on",
    "--epochs 1.5": "argument --epochs: invalid int value: '1.5'",
    "--lr nan": "argument --lr: nan is not a number from 0.0 on",
    "--warmup -5": "argument --warmup: -5 is not",
    "--alpha -1": "argument --alpha: -1 is not",
    "--threshold nan": "argument --threshold: nan is not",
    "--out {}/empty.jsonl/x": "empty.jsonl/x: Not a directory",
    "--losses hn": "invalid choice: 'hn'",
    "--kinds verb": "invalid choice: 'verb'",
    "--model nothing": "nothing is not a model that open_clip can build (offline: name a file",
    "--model none.json": "none.json: No such file or directory",
    "--model {}/odd.json": " is not a model that open_clip can build (offline: name a file): ",
    "--pretrained x.pt": "x.pt is no file, and no TAG or MODEL/TAG of open_clip's weights",
    "--out {}/empty.jsonl": "empty.jsonl: File exists",
    "--micro-batch -1": "--micro-batch",
    "--workers -1": "--workers",
    "--lr 1e30 --warmup 0": 'the loss is not finite: {"step": ',
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_one_line(world, tmp_path, options):
    assert MISTAKES[options] in refused(world, tmp_path / "x", *options.split())
