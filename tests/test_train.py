"""ce_clip.py beyond the losses: models, text features, data, steps, processes and whole runs."""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, flat, model_of, read_log, refused, run, tiny, train
from torch import tensor

import ce_clip
import files
import negatives
from ce_clip import LOSSES, Encoder
from files import BadInput
from negatives import PAPER_KINDS

read = functools.partial(torch.load, weights_only=True)


# ---- Models, and their features of texts ---------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_checkpoint_is_the_same_model_here_and_in_open_clip(tmp_path, quick_gelu):
    """The field's commonest silent error is QuickGELU weights evaluated with GELU; SigLIP's
    images have another mean than CLIP's, which open_clip knows by the tag alone."""
    siglip = {"image_mean": (0.5,) * 3, "image_std": (0.4,) * 3}
    siglip |= {"image_interpolation": "bilinear", "image_resize_mode": "squash"}
    config, path = TINY | {"quick_gelu": quick_gelu}, tmp_path / "x.pt"
    loaded = ce_clip.build_model(f"tiny-{quick_gelu}", None, config, siglip)
    files.save_checkpoint(path, loaded, threshold=tensor([1.0]), step=3)
    assert list(tmp_path.iterdir()) == [path]
    saved, images = read(path), torch.randn(2, 3, 32, 32)
    assert (saved["model"], saved["config"], saved["step"]) == (f"tiny-{quick_gelu}", config, 3)
    ours = ce_clip.load_model(str(path), "RN50")  # the file knows better
    name = saved["model"]
    Path(tmp_path, f"{name}.json").write_text(json.dumps(saved["config"]))
    open_clip.add_model_config(tmp_path)
    theirs, *_ = open_clip.create_model_and_transforms(name, pretrained=str(path))
    for model in (ours.model, theirs):
        features = [x.eval().encode_image(images) for x in (model, loaded.model)]
        assert torch.equal(*features)
        activation = open_clip.transformer.QuickGELU if quick_gelu else torch.nn.GELU
        assert isinstance(model.transformer.resblocks[0].mlp.gelu, activation)
    assert "(0.5, 0.5, 0.5)" in str(loaded.eval_transform) == str(ours.eval_transform)
    assert ce_clip.build_model("RN50", config=config).config == config
    assert open_clip.get_model_config("RN50")["embed_dim"] == 1024  # the name means what it did
    assert str(loaded.train_transform) == str(ours.train_transform)


def test_openai_weights_always_get_quickgelu(monkeypatch, tmp_path):
    def asks(*source):
        with pytest.raises(BadInput, match="no network") as e:
            ce_clip.load_model(*source)
        return str(e.value).split("for ")[1]

    def create(name, pretrained, **_):
        raise RuntimeError(f"no network for {name} {pretrained}!")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()  # a folder does not hide a tag
    assert asks("openai") == asks("openai", "ViT-B-32") == "ViT-B-32-quickgelu openai!"
    assert asks("ViT-L-14/openai") == "ViT-L-14-quickgelu openai!"
    with pytest.raises(BadInput, match="^hf-hub: cannot be had from open_clip"):
        ce_clip.load_model("hf-hub:")
    other = "ViT-B-32 laion2b_e16!"
    assert asks("laion2b_e16", "ViT-B-32") == asks("ViT-B-32/laion2b_e16") == other
    for name in open_clip.list_pretrained_models_by_tag("openai"):
        assert open_clip.get_model_config(asks("openai", name).split()[0])["quick_gelu"]


@pytest.mark.parametrize("n, chunks", [(2, 1), (150, 2), (400, 4)])
def test_cut_captions_have_the_features_and_gradient_of_the_full_length(world, n, chunks):
    loaded, rng, words = model_of(world), random.Random(0), "a red dog !% sees = 3".split()
    texts = [" ".join(rng.choices(words, k=rng.choice([1, 3, 9, 30]))) for _ in range(n - 1)]
    tokens = loaded.tokenizer([*texts, "ball " * 99])[torch.randperm(n)]
    assert (tokens.argmax(1) == 76).sum() == 1  # "!%" begins with token 0: no padding
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


# ---- Data and steps ------------------------------------------------------------------------------


def pairs_of(world, loaded, seed=0):
    records = files.Records(world / "negatives.jsonl", world, PAPER_KINDS)
    return ce_clip.Pairs(records, loaded, seed)


def test_augmentation_depends_on_seed_epoch_and_item_alone(world, monkeypatch):
    loaded = model_of(world)._replace(train_transform=lambda image: torch.rand(3))
    opened, real = [], files.open_image
    keep = lambda *args, **more: opened.append((*args, more)) or real(*args, **more)  # noqa: E731
    monkeypatch.setattr(files, "open_image", keep)
    pairs = pairs_of(world, loaded)
    first, tokens, valid = pairs[0, 1]
    torch.rand(5)
    assert torch.equal(pairs[0, 1][0], first)
    others = [pairs[1, 1], pairs[0, 0], pairs_of(world, loaded, seed=1)[0, 1]]
    assert not any(torch.equal(other[0], first) for other in others)
    assert tokens.equal(loaded.tokenizer(pairs.records[1][2]))
    assert valid.tolist() == [True, True, False, True]
    region = (world / "1.png", (1, 2, 3, 4), ["a"])
    ce_clip.Pairs([region], loaded, seed=0)[0, 0]
    assert opened[-1] == (*region[:2], {"draft": 32})


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
    monkeypatch.setenv("WORLD_SIZE", "2")  # said before there is a process group
    message = "--batch-size 7 does not split over WORLD_SIZE = 2"
    assert message in refused(world, tmp_path / "x", "--batch-size", 7)


def test_data_are_a_union_of_files_and_names(world, tmp_path, monkeypatch):
    """CC3M is as img2dataset leaves it; its negatives are made first. A region keeps its box."""
    generate = functools.partial(negatives.generate, filler="ngram")
    monkeypatch.setattr(negatives, "generate", generate)
    image = tmp_path / "cc3m" / "images" / "00000" / "1.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    image.with_suffix(".txt").write_text("a red dog is on a ball")
    region = {"image": "1.png", "box": [5, 3, 6, 4], "caption": "a", "relation": None}
    (tmp_path / "regions.jsonl").write_text(json.dumps(region))
    data = ["cc3m", str(world / "negatives.jsonl"), str(tmp_path / "regions.jsonl")]
    args = SimpleNamespace(data=data, images=str(world), data_root=tmp_path)
    records = ce_clip.load_records(args, ["relation"])
    assert [len(part) for part in records.datasets] == [1, 24, 1]
    assert records[0] == (image, None, ["a red dog is on a ball", "a red ball is on a dog"])
    assert records[1][0] == world / "0.png"
    assert records[25] == (world / "1.png", [5, 3, 6, 4], ["a", ""])
    assert ce_clip.load_records(args, [])[1] == (world / "0.png", None, records[1][2][:1])


def example_batch(world, keys, seed=0):
    loaded = model_of(world, seed=seed)
    pairs = pairs_of(world, loaded._replace(train_transform=loaded.eval_transform))
    return loaded.model, [torch.stack(x) for x in zip(*(pairs[key] for key in keys))]


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_step_mixes_no_devices(world, monkeypatch, micro_batch):
    """The meta device has no values, but like a GPU it refuses tensors of the CPU. Tokens and valid
    come from the loader and stay on the CPU until they are gathered."""
    model, (images, tokens, valid) = example_batch(world, [(0, i) for i in range(8)])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has no meta
    encoder = Encoder(model.to("meta"), micro_batch=micro_batch)
    image, text, scale, _ = encoder(images.to("meta"), tokens, valid)
    snippet = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"torch": torch, "image": image, "text": text, "scale": scale}
    exec(snippet, names | {"valid": valid.to("meta")}, result := {})
    result["loss"].backward()
    assert result["threshold"].device.type == "meta" and result["threshold"].shape == (4,)
    assert all(p.grad is not None for p in model.parameters())


def test_a_negative_whose_change_is_cut_off_does_not_exist(world, tmp_path, capsys):
    """Those of odd lines begin to differ behind token 77."""
    lines = []
    for i, line in enumerate((world / "negatives.jsonl").read_text().splitlines()):
        record = json.loads(line)
        for name in ("caption", *PAPER_KINDS):
            if i % 2 and record[name]:
                record[name] = "a red dog " * 30 + record[name]
        lines.append(json.dumps(record) + "\n")
    (tmp_path / "long.jsonl").write_text("".join(lines))
    loaded = model_of(world)
    records = files.Records(tmp_path / "long.jsonl", world, PAPER_KINDS)
    pairs, whole = ce_clip.Pairs(records, loaded, 0), pairs_of(world, loaded)
    cut = 0
    for i in range(24):
        valid, expected = pairs[0, i][2], whole[0, i][2]
        assert valid.equal(expected & (i % 2 == 0))
        cut += (expected & ~valid).sum().item()
    files.say_once.cache_clear()
    _, output = run(tiny(world, tmp_path / "x", "--data", tmp_path / "long.jsonl"))
    assert output.count("negatives with the same tokens as their captions count as missing") == 1
    assert "cut off" not in run(tiny(world, tmp_path / "whole"))[1]
    log = read_log(tmp_path / "x")
    of_lines = [line["same_tokens"] for line in log]  # an epoch has three steps, each with a line
    assert (sum(of_lines[:3]), sum(of_lines)) == (cut, 2 * cut)


def test_missing_negatives_are_not_encoded_and_their_features_are_zero(world, monkeypatch):
    model, (images, tokens, valid) = example_batch(world, [(0, i) for i in range(8)])
    encoded, real = [], ce_clip.encode_text
    monkeypatch.setattr(ce_clip, "encode_text", lambda m, t: encoded.append(len(t)) or real(m, t))
    image, text, scale, itm = Encoder(model)(images, tokens, valid)
    assert encoded == [8 + valid.sum()] != [40]
    Encoder(model, micro_batch=3)(images, tokens, valid)
    assert encoded[1:] == [len(part) + part.sum() for part in valid.split(3)]
    assert (scale.item(), itm.tolist()) == (pytest.approx(1 / 0.07), [0])
    torch.testing.assert_close(image, model.encode_image(images, normalize=True))
    every = model.encode_text(tokens.flatten(0, 1), normalize=True).view(8, 5, 16)
    torch.testing.assert_close(text[:, 0], every[:, 0])
    torch.testing.assert_close(text[:, 1:], every[:, 1:] * valid[..., None])


CASES = {  # a model, and options of a run
    "paper": ["tiny"],
    "released": ["tiny", "--losses", LOSSES[-1]],
    "itc": ["tiny", "--losses", "itc"],
    "micro-1": ["tiny", "--micro-batch", 1],
    "micro-3": ["tiny", "--micro-batch", 3],
    "micro-9": ["tiny", "--micro-batch", 9],
    "coca": ["coca", "--micro-batch", 3],
    "sigmoid": ["sigmoid"],
    "cut": ["cut"],  # some negatives have their caption's tokens
}


def gradients(world, out, name, *more):
    """Those of the last of 3 steps of a run that changes no weight."""
    loaded = model_of(world, name)
    options = tiny(world, out, "--lr", 0, "--epochs", 1, "--save-every", 1, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ce_clip, "build_model", lambda name: loaded)
        patch.setattr(sys, "argv", ["ce_clip.py", *options])
        ce_clip.train(ce_clip.parse_args(), torch.device("cpu"))
    return {n: p.grad for n, p in loaded.model.named_parameters() if p.grad is not None}


def one_of_two(world: Path, out: Path):
    """What each of the two processes does; at the end of this file it is called."""
    sys.argv = ["ce_clip.py", *tiny(world, out / "main")]
    ce_clip.main()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{out}/init", rank=rank, world_size=2)
    for name, options in CASES.items():
        torch.save(gradients(world, out / name, *options), out / f"{name}-{rank}.pt")
        dist.barrier()
    if rank == 0:  # the run goes on with the checkpoint before
        (out / "itc" / "epoch_1.pt").write_bytes(b"damaged")
    dist.barrier()
    gradients(world, out / "itc", *CASES["itc"], "--resume")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two(world, tmp_path_factory):
    """What two processes wrote, each with a launcher of its own, as on two machines."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7"]
    options += ["--rdzv_backend", "c10d", "--rdzv_endpoint", address, __file__, world, out]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    launchers = [subprocess.Popen(command, stderr=-1, text=True) for _ in range(2)]
    errors = [launcher.communicate()[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors
    return out


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_two_processes_and_micro_batches_are_those_of_one(world, two, tmp_path, name):
    """A gather without gradient halves the gradient of all but logit_scale."""
    expected = gradients(world, tmp_path / "whole", *CASES[name], "--micro-batch", 0)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    found = [read(two / f"{name}-{rank}.pt") for rank in range(2)]
    for gradient in [*found, gradients(world, tmp_path / "again", *CASES[name])]:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    for line, other in zip(read_log(two / name), read_log(tmp_path / "whole"), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
        assert (line["same_tokens"] > 0) == (name == "cut")


def test_the_run_of_two_processes_is_that_of_one(world, two, tmp_path):
    log = train(world, tmp_path)
    for line, other in zip(log, read_log(two / "main"), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert [line["step"] * line["epoch"] for line in log] == [1, 2, 3, 8, 10, 12]
    names = "step epoch loss itc imc cmr itm logit_scale lr same_tokens".split()
    assert {*log[0]} == {*names, *(f"threshold_{kind}" for kind in PAPER_KINDS)}
    x = math.sqrt(0.5)  # the cosine of a quarter of the way from step 2 to step 6
    lr = [0.5, 1, 1, (1 + x) / 2, 0.5, (1 - x) / 2]
    assert [1000 * line["lr"] for line in log] == pytest.approx(lr)
    settings = json.loads((two / "main" / "config.json").read_text())
    assert [settings[key] for key in ("kinds", "upper_bound")] == [PAPER_KINDS, 10]
    epoch = read(two / "main" / "epoch_2.pt")
    groups = epoch["optimizer"]["param_groups"]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(log[5]["lr"], x) for x in (0, 0.1)]
    assert (epoch["step"], epoch["threshold"].shape) == (6, (4,))
    weights = read(tmp_path / "epoch_2.pt")["state_dict"]
    torch.testing.assert_close(weights, epoch["state_dict"], rtol=1e-2, atol=1e-3)


# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "resnet"])
def test_biases_norms_and_logit_scale_do_not_decay(world, tmp_path, monkeypatch, name):
    loaded = model_of(world, name)
    model = loaded.model
    model.visual.conv1.weight.requires_grad_(False)
    model.position_bias = torch.nn.Parameter(torch.ones(2, 2))  # as that of a Swin Transformer
    monkeypatch.setattr(ce_clip, "build_model", lambda name: loaded)
    monkeypatch.setattr(sys, "argv", ["ce_clip.py", *tiny(world, tmp_path)])
    _, optimizer, _, _ = ce_clip.prepare_run(ce_clip.parse_args(), [], {}, torch.device("cpu"))
    plain, decayed = optimizer.param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    decayed = {names[id(p)] for p in decayed["params"]}
    assert {"token_embedding.weight", "text_projection"} < decayed
    assert not any(part in n for n in decayed for part in ("ln_", "bn", "bias", "logit_scale"))


def test_thresholds_are_those_of_the_step_before(world, tmp_path):
    """A kind that the batch, here of one pair, has not keeps its own."""
    names = [f"threshold_{kind}" for kind in PAPER_KINDS]
    log = train(world, tmp_path / "x", *"--batch-size 1 --epochs 1 --upper-bound 1e6".split())
    for line, following, [(_, i)] in zip(log, log[1:], ce_clip.batch_keys(24, 1, 1, 42)):
        kept = [line[name] == following[name] for name in names]
        assert kept == [(i + n) % 3 == 0 for n in range(4)]  # those are missing in the world
    assert {log[0][name] for name in names} == {0}  # a line has those that its step has used
    log = train(world, tmp_path / "bound", "--upper-bound", -3)
    assert {line[name] for line in log[1:] for name in names} == {-3}
    log = train(world, tmp_path / "fixed", "--threshold", 5)
    assert {line[name] for line in log for name in names} == {5}


def test_losses_of_table_4_are_settings_of_eq_8(world, tmp_path):
    lines = {}
    for losses in LOSSES:
        options = ["--batch-size", 24, "--epochs", 1, "--losses", losses, "--threshold", 1]
        [line] = train(world, tmp_path / losses, *options, "--no-augmentation")
        expected = line["itc"] + 0.4 * line["cmr"] * ("cmr" in losses)
        expected += 0.2 * line["imc"] * ("imc" in losses) + 0.2 * line.get("look", 0)
        assert ("look" in line) == ("look" in losses)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        lines[losses] = line
    assert lines["itc"]["itc"] < lines["itc,hn"]["itc"] == lines[LOSSES[0]]["itc"]
    assert lines["itc"]["imc"] == lines["itc"]["cmr"] == 0 < lines[LOSSES[0]]["cmr"]
    assert not any(name.startswith("threshold") for name in lines["itc"])
    [keys] = ce_clip.batch_keys(24, 24, 1, 42)
    model, batch = example_batch(world, keys, seed=42)
    image, text, scale, _ = Encoder(model)(*batch)
    itc = ce_clip.itc_loss(scale * image @ text[:, 0].T).item()
    assert lines["itc"]["itc"] == pytest.approx(itc, rel=1e-5)
    every = scale * torch.einsum("id,jkd->ijk", text[:, 0], text[:, 1:])
    released = ce_clip.imc_loss_released(every, batch[2]).item()
    assert lines["itc,hn,imc_released,cmr"]["imc"] == pytest.approx(released, rel=1e-5)
    looking = ce_clip.looking_loss(image, text, scale, batch[2]).item()
    for losses in ("itc,hn,look", LOSSES[-1]):
        assert lines[losses]["look"] == pytest.approx(looking, rel=1e-5)


def test_kinds_that_are_trained_on(world, tmp_path):
    """The paper's four, fewer, or also a fifth."""
    log = train(world, tmp_path / "x", "--kinds", "object", "relation")
    assert [k for k in log[0] if "threshold" in k] == ["threshold_relation", "threshold_object"]
    log = train(world, tmp_path / "y", "--kinds", *PAPER_KINDS, "number")
    assert log[1]["threshold_number"] not in (0, log[1]["threshold_object"])
    assert read(tmp_path / "y" / "epoch_2.pt")["threshold"].shape == (5,)


@pytest.mark.parametrize("name", ["tiny", "resnet", "mobilenet"])
def test_a_locked_image_tower_does_not_change(world, tmp_path, name):
    """Nor do the statistics of its batch norms; a timm tower's projection, which may be a random
    one, is trained, as by open_clip. logit_scale is kept below log 100, as in CLIP."""
    before, images = model_of(world, name), torch.randn(4, 3, 32, 32)
    before.model.logit_scale.data.fill_(5)
    files.save_checkpoint(tmp_path / "start.pt", before)
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


def test_workers_and_grad_checkpointing_change_no_bit(world, uninterrupted, tmp_path, monkeypatch):
    asked, real = [], open_clip.CLIP.set_grad_checkpointing
    monkeypatch.setattr(open_clip.CLIP, "set_grad_checkpointing", lambda m: asked.append(real(m)))
    train(world, tmp_path / "x", *LONG, "--workers", 2, "--grad-checkpointing")
    same_run(uninterrupted, tmp_path / "x")
    assert len(asked) == 1


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
    options = ["--resume", "--save-every", 5, "--log-every", 4]
    log = train(world, tmp_path / "whole", *options)
    assert [line["step"] for line in log] == [3, 4, 5, 6]  # where it saves, it also logs
    real = os.replace
    for moment in range(6):  # before and after each of 3 files: 2 epochs, and step 5
        killed = iter([False] * moment + [True])

        def replace(a, b, killed=killed):
            if next(killed):
                raise KeyboardInterrupt
            real(a, b)
            if next(killed):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            run(tiny(world, tmp_path / f"{moment}", *options))
        train(world, tmp_path / f"{moment}", *options)
        same_run(tmp_path / "whole", tmp_path / f"{moment}")


def test_a_run_of_other_settings_or_captions_is_not_resumed(world, uninterrupted, tmp_path):
    copied = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    message = refused(world, copied, *LONG, "--alpha", 0.3)
    assert message.endswith("run was begun with alpha 0.2: resume with the same")
    moved = Path(shutil.copytree(world, tmp_path / "moved"))
    more = [*LONG, "--model", world / "tiny.json", "--micro-batch", 2, "--grad-checkpointing"]
    code, output = run(tiny(moved, copied, *more))  # those may differ; it does nothing
    assert code == 0 and f"{copied} is finished: it has made all of its 24 steps" in output
    lines = (world / "negatives.jsonl").read_text()
    (moved / "negatives.jsonl").write_text(lines.replace("eats", "sees", 1))
    assert "run was begun with captions ['24, sha256 " in refused(moved, copied, *more)
    same_run(uninterrupted, copied)
    for name in ("epoch_8.pt", "log.jsonl"):  # a lost log begins anew
        (copied / name).unlink()
    assert [line["step"] for line in train(world, copied, *LONG)] == [24]


def test_regions_outside_their_image_are_left_out(world, tmp_path):
    """As some of Visual Genome's published ones are: y -904, height 25."""
    boxes = [[0, 0, 40, 36], [30, 30, 50, 50], [5, -904, 9, -879], [40, 0, 50, 9]]
    lines = (world / "negatives.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"box": boxes[i % 4]} for i, line in enumerate(lines)]
    records[0]["caption"] = " "
    (tmp_path / "vg.jsonl").write_text("\n".join(map(json.dumps, records)))
    code, output = run(tiny(world, tmp_path / "x", "--data", tmp_path / "vg.jsonl", "--epochs", 1))
    counts = "vg.jsonl: captions 11, images 11, regions clipped to their image 6; "
    counts += "left out: regions outside their image 12, without a caption 1\n"
    assert (code, counts in output) == (0, True), output
    kept = files.Records(tmp_path / "vg.jsonl", world, [])
    assert [kept[i][0].name for i in range(3)] == ["1.png", "4.png", "5.png"]
    assert kept[0][1] == [30, 30, 50, 50]
    (tmp_path / "vg.jsonl").write_text("")
    with pytest.raises(BadInput, match="vg.jsonl has changed since it was opened"):
        kept.file = None
        kept[3]


def test_torchrun_ends_with_the_line_of_the_process_that_failed(world, tmp_path):
    code, output = run(tiny(world, tmp_path / "x", "--data", world / "none.jsonl"), processes=2)
    line = f"ce_clip.py: error: {world}/none.jsonl: No such file or directory"
    assert (code, output.count(f"\n{line}\n") + output.startswith(line)) == (1, 1)  # one prints it
    last = [text for text in output.splitlines() if text.startswith("  traceback : ")][-1]
    assert last == f"  traceback : {line}"


def test_world_size_without_torchrun(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setattr(sys, "argv", ["ce_clip.py"])
    assert ce_clip.parse_args().batch_size == 256
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a scheduler sets it
    message = "no other processes found (start with torchrun, or unset WORLD_SIZE): "
    assert message in refused(world, tmp_path / "x")


def test_a_broken_or_missing_image_ends_the_run(world, tmp_path):
    folder = Path(shutil.copytree(world, tmp_path / "world"))
    path, out = folder / "11.png", tmp_path / "x"
    path.write_bytes(path.read_bytes()[:900])
    command = [sys.executable, "ce_clip.py", *tiny(folder, out, "--workers", 2)]
    done = subprocess.run(command, stderr=-1, text=True, timeout=60)  # its loaders end with it
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last[:19]) == (1, "ce_clip.py: error: ")
    assert last[19:].startswith(f"{path} is not an image: ")
    path.unlink()
    assert refused(folder, out) == f"ce_clip.py: error: {path}: no such image (1 are missing)"


MISTAKES = {
    "--data coco --data-root x": "--data coco needs x/coco/train2014: docs/data.md ",
    "--images nowhere": "nowhere: No such file or directory",
    "--data coc0": "error: coc0: No such file or directory",
    "--data {}/1.png": "1.png, line 1, is not a record of negatives.py: UnicodeDecodeError",
    "--data {}/tiny.json": "tiny.json, line 1, is not a record of negatives.py: KeyError 'caption'",
    "--data {}/bare.jsonl --batch-size 1": "bare.jsonl, line 1, is not a record of negatives.py: K",
    "--data {}/empty.jsonl": "0 captions do not fill one batch of 8",
    "--batch-size 256": "24 captions do not fill one batch of 256",
    "--batch-size 0": "argument --batch-size: 0 is not a number from 1 on",
    "--epochs 1.5": "argument --epochs: invalid int value: '1.5'",
    "--lr nan": "argument --lr: nan is not a number from 0.0 on",
    "--warmup -5": "argument --warmup: -5 is not",
    "--alpha -1": "argument --alpha: -1 is not",
    "--threshold nan": "argument --threshold: nan is not",
    "--losses hn": "invalid choice: 'hn'",
    "--kinds verb": "invalid choice: 'verb'",
    "--model nothing": "nothing cannot be had from open_clip (offline: name a file",
    "--model none.json": "none.json: No such file or directory",
    "--model {}/odd.json": " cannot be had from open_clip (offline: name a file): ",
    "--pretrained x.pt": "x.pt is not a file, and not a TAG or MODEL/TAG of open_clip's weights",
    "--pretrained {}/other": ": it has none of open_clip_model.safetensors, open_clip_pytorch",
    "--out {}/empty.jsonl": "empty.jsonl: File exists",
    "--out {}/open_clip": "open_clip holds checkpoints: --resume a run of ours, or give another",
    "--out {}/open_clip --resume": "open_clip holds checkpoints, but none of ours: give ano",
    "--out {}/other --resume": "other holds checkpoints, but none of ours: give another --out",
    "--micro-batch -1": "--micro-batch",
    "--workers -1": "--workers",
    "--lr 1e30 --warmup 0": 'the loss is not finite: {"step": ',
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_one_line(world, tmp_path, options):
    assert MISTAKES[options] in refused(world, tmp_path / "x", *options.split())


if __name__ == "__main__":
    one_of_two(*map(Path, sys.argv[1:]))
