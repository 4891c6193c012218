"""ce_clip.py beyond the losses: models, checkpoints, processes, data and whole runs."""

import contextlib
import functools
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from PIL import Image
from torch import tensor

import ce_clip
import negatives
import toy
from ce_clip import KINDS, BadInput, Encoder, Objective


def tiny_start(world, out, *more):
    command = [sys.executable, "ce_clip.py", *map(str, tiny_options(world, out)), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run(*args, processes=0):
    """ce_clip.py with these arguments: in this process, or under torchrun."""
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [sys.executable, *torchrun, "--standalone", "ce_clip.py", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)
    errors, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["ce_clip.py", *map(str, args)])
        try:
            negatives.run(ce_clip.main)
        except SystemExit as e:
            code = 1
            print(e, file=errors)
    return SimpleNamespace(returncode=code, stderr=errors.getvalue())


def tiny_options(world, out):
    options = ["--data", world / "negatives.jsonl", "--images", world, "--pretrained", "none"]
    options += ["--model", world / "tiny.json", "--batch-size", 8, "--epochs", 2, "--lr", 1e-3]
    return [*options, "--workers", 0, "--warmup", 2, "--out", out]


def tiny_run(world, out, *more, processes=0):
    done = run(*tiny_options(world, out), *more, processes=processes)
    return done, [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


# ---- Models and checkpoints ----------------------------------------------------------------------


def tiny_model(world, seed=0):
    torch.manual_seed(seed)
    return ce_clip.build_model(str(world / "tiny.json"))


def test_checkpoint_is_bit_equal_here_and_in_open_clip(world, tmp_path):
    loaded = tiny_model(world)
    path = tmp_path / "epoch_1.pt"
    ce_clip.save_checkpoint(path, loaded, threshold=tensor([1.0]), step=3)
    saved = torch.load(path, weights_only=True)
    assert (saved["model"], saved["config"]["quick_gelu"]) == ("tiny", True)
    images = torch.randn(2, 3, 32, 32)
    expected = loaded.model.eval().encode_image(images)
    ours = ce_clip.load_model(str(path)).model.eval()
    theirs = open_clip.create_model_and_transforms(saved["model"], pretrained=str(path))[0].eval()
    for model in (ours, theirs):
        assert torch.equal(model.encode_image(images), expected)
    assert list(tmp_path.iterdir()) == [path]


def test_the_activation_travels_with_the_checkpoint(tmp_path):
    """The field's commonest silent error: QuickGELU weights evaluated with GELU."""
    for quick_gelu, activation in ((True, open_clip.transformer.QuickGELU), (False, torch.nn.GELU)):
        config = TINY | {"quick_gelu": quick_gelu}
        loaded = ce_clip.build_model("tiny-activation", config=config)
        ce_clip.save_checkpoint(tmp_path / "x.pt", loaded)
        again = ce_clip.load_model(str(tmp_path / "x.pt")).model
        assert isinstance(again.transformer.resblocks[0].mlp.gelu, activation)


def test_mean_and_interpolation_travel_with_the_checkpoint(tmp_path):
    """SigLIP's pictures have another mean than CLIP's; open_clip knows it by the tag alone."""
    siglip = {"mean": (0.5,) * 3, "std": (0.4,) * 3, "interpolation": "bilinear"}
    loaded = ce_clip.build_model("tiny-mean", None, TINY, siglip | {"resize_mode": "squash"})
    ce_clip.save_checkpoint(tmp_path / "x.pt", loaded)
    again = ce_clip.load_model(str(tmp_path / "x.pt"))
    assert "(0.5, 0.5, 0.5)" in str(loaded.eval_transform)
    assert str(again.eval_transform) == str(loaded.eval_transform)
    assert str(again.train_transform) == str(loaded.train_transform)


@pytest.mark.parametrize("layout", ["bare", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_the_field_load(world, tmp_path, capsys, layout, prefix):
    """As open_clip and CE-CLIP (state_dict, module.), NegCLIP, and others (model) leave them."""
    expected = tiny_model(world).model.state_dict()
    state = {prefix + key: value for key, value in expected.items()}
    saved = state if layout == "bare" else {"epoch": 5, layout: state}
    torch.save(saved | {"config": {}} if layout == "model" else saved, tmp_path / "x.pt")
    found = ce_clip.load_model(str(tmp_path / "x.pt"), str(world / "tiny.json")).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert "activation" not in capsys.readouterr().err


def test_numbers_of_numpy_in_a_checkpoint_load(world, tmp_path):
    """The schedulers of NegCLIP and CE-CLIP left the learning rate as a numpy.float64."""
    expected = tiny_model(world).model.state_dict()
    saved = {"epoch": 5, "name": "x", "state_dict": {f"module.{k}": v for k, v in expected.items()}}
    torch.save(
        saved | {"optimizer": {"param_groups": [{"lr": np.float64(1e-6)}]}}, tmp_path / "x.pt"
    )
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "x.pt", weights_only=True)
    found = ce_clip.load_model(str(tmp_path / "x.pt"), str(world / "tiny.json")).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_weights_that_do_not_say_their_activation_get_a_warning(world, tmp_path, capsys):
    torch.save(tiny_model(world).model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(BadInput, match="cannot load .* into ViT-B-32: "):
        ce_clip.load_model(str(tmp_path / "x.pt"), "ViT-B-32")
    assert "--model ViT-B-32-quickgelu" in capsys.readouterr().err


def test_openai_weights_always_get_quickgelu(monkeypatch):
    asked = []

    def create(name, pretrained, **_):
        asked.append((name, pretrained))
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "RN50"):
        with pytest.raises(BadInput, match="no network"):
            ce_clip.build_model(name, "openai")
    names = ["ViT-B-32-quickgelu", "ViT-B-32-quickgelu", "RN50-quickgelu"]
    assert asked == [(name, "openai") for name in names]


def test_bad_checkpoints_are_one_line(world, tmp_path):
    bare, damaged = tmp_path / "bare.pt", tmp_path / "damaged.pt"
    torch.save(tiny_model(world).model.state_dict(), bare)
    damaged.write_bytes(bare.read_bytes()[:1000])
    with pytest.raises(BadInput, match="give --model"):
        ce_clip.load_model(str(bare))
    assert ce_clip.load_model(str(bare), str(world / "tiny.json")).name == "tiny"
    with pytest.raises(BadInput, match="not a readable checkpoint"):
        ce_clip.load_model(str(damaged))
    with pytest.raises(BadInput, match="cannot load"):
        ce_clip.load_model(str(bare), "toy")
    torch.save({"logit_scale": torch.ones(())}, bare)
    with pytest.raises(BadInput, match="cannot load .* into tiny: .*Missing key.*text_projection"):
        ce_clip.load_model(str(bare), str(world / "tiny.json"))
    with pytest.raises(BadInput, match="open_clip has no model 'nothing'"):
        ce_clip.build_model("nothing")


class Code:
    """What a pickle can do when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "code ran")


def test_a_pickle_with_code_in_it_is_refused(world, tmp_path):
    mark, options = tmp_path / "mark", [tmp_path / "x", "--epochs", 1, "--resume"]
    tiny_run(world, *options)
    newest, before = (
        max((tmp_path / "x").glob("step_*.pt")),
        (tmp_path / "x" / "log.jsonl").read_text(),
    )
    torch.save({"state_dict": {}, "code": Code(mark)}, newest)
    with pytest.raises(BadInput, match="not a readable checkpoint"):
        ce_clip.load_model(str(newest))
    done, log = tiny_run(world, *options)
    assert done.returncode == 1
    assert f"{newest} is damaged, passed over: " in done.stderr
    assert (tmp_path / "x" / "log.jsonl").read_text() == before
    assert not mark.exists()
    torch.load(newest, weights_only=False)
    assert mark.exists()  # it would have run


def test_cut_captions_have_the_same_features_and_gradient(world):
    """Cutting after the last end-of-text token is exact; token 0 is "!", not padding."""
    loaded = tiny_model(world)
    texts = ["a red dog", "a sign saying != here"]
    tokens = loaded.tokenizer(texts)
    assert (tokens[1] == 0).nonzero()[0] < tokens[1].argmax()
    grads = []
    for encode in (
        lambda: ce_clip.encode_text(loaded.model, tokens),
        lambda: loaded.model.encode_text(tokens, normalize=True),
    ):
        loaded.model.zero_grad()
        features = encode()
        (features * torch.arange(16)).sum().backward()
        named = loaded.model.named_parameters()
        grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        grads[-1]["features"] = features.detach()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-6 * scale, msg=name)


def test_other_text_towers_get_their_full_length():
    seen = []

    class Other(torch.nn.Module):
        def encode_text(self, tokens, normalize):
            seen.append((tokens.shape, normalize))

    ce_clip.encode_text(Other(), torch.zeros(2, 64, dtype=torch.long))
    assert seen == [((2, 64), True)]


# ---- Steps ---------------------------------------------------------------------------------------


def example_batch(world, n=8):
    loaded = tiny_model(world)
    records = ce_clip.Negatives(world / "negatives.jsonl", world)
    load = functools.partial(ce_clip.load_image, transform=loaded.eval_transform)
    pairs = ce_clip.Pairs(records, KINDS, load, loaded.tokenizer, seed=0)
    *batch, bad = [torch.stack(x) for x in zip(*(pairs[0, i] for i in range(n)))]
    assert (bad == -1).all()
    return loaded.model, batch


def test_missing_negatives_are_not_encoded_and_their_features_are_zero(world):
    model, (images, tokens, valid) = example_batch(world)
    image, text, scale = Encoder(model)(images, tokens, valid)
    assert (text[:, 1:].norm(dim=-1) > 0).equal(valid)
    assert scale.item() == pytest.approx(1 / 0.07)
    sim, sim_neg, text_neg = ce_clip.similarities(image, text, scale)
    for i, j, k in ((0, 1, 1), (3, 2, 2)):
        assert sim[i, j].item() == pytest.approx((scale * image[i] @ text[j, 0]).item(), rel=1e-4)
        assert sim_neg[i, j, k].item() == pytest.approx(
            (scale * image[i] @ text[j, k + 1]).item(), rel=1e-4
        )
        assert text_neg[i, j, k].item() == pytest.approx(
            (scale * text[i, 0] @ text[j, k + 1]).item(), rel=1e-4
        )


def gradients(world, losses: str, micro: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of all parameters on this process's share of one global batch of 8."""
    model, batch = example_batch(world)
    encoder = Encoder(model)
    if ce_clip.world_size() > 1:
        encoder = torch.nn.parallel.DistributedDataParallel(encoder)
    share = 8 // ce_clip.world_size()
    rows = slice(ce_clip.rank() * share, (ce_clip.rank() + 1) * share)
    batch, objective = [x[rows] for x in batch], Objective.parse(losses, 0.2, 0.4)
    loss, *_ = ce_clip.backward(encoder, batch, torch.ones(len(KINDS)), objective, micro)
    return {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}


CASES = [("itc,hn,imc,cmr", 0), ("itc,hn,imc_released,cmr", 0), ("itc,hn,imc,cmr", 3)]


def one_of_two(rank: int, world, out: str):
    dist.init_process_group("gloo", f"file://{out}.init", rank=rank, world_size=2)
    torch.save([gradients(Path(world), *case) for case in CASES], f"{out}.{rank}")
    dist.destroy_process_group()


def assert_same(found: dict, expected: dict) -> None:
    assert expected["visual.conv1.weight"].abs().max() > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_have_the_gradient_of_one(world, tmp_path):
    """Of every parameter. A gather without gradient halves all but logit_scale's."""
    out = str(tmp_path / "gradients")
    torch.multiprocessing.spawn(one_of_two, (str(world), out), nprocs=2)
    for rank in range(2):
        for found, (losses, _) in zip(torch.load(f"{out}.{rank}"), CASES, strict=True):
            assert_same(found, gradients(world, losses))


@pytest.mark.parametrize("micro", [1, 3, 8, 100])
def test_micro_batches_have_the_gradient_of_the_whole(world, micro):
    assert_same(gradients(world, "itc,hn,imc,cmr", micro), gradients(world, "itc,hn,imc,cmr"))


@pytest.mark.parametrize("chunk", [1, 30, 100])
def test_text_chunks_have_the_features_and_gradient_of_the_full_length(world, monkeypatch, chunk):
    model, (_, tokens, valid) = example_batch(world)
    tokens = tokens.flatten(0, 1)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    tokens[3, 1:] = 0
    tokens[3, 1:70] = 5
    tokens[3, 70] = tokens[0].max()  # a caption nearly as long as the context
    monkeypatch.setattr(ce_clip, "CHUNK", chunk)
    model = model.double()  # so that nothing but a wrong rule makes a difference
    weights = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for encode in (lambda: ce_clip.encode_text(model, tokens), lambda: model(None, tokens)[1]):
        model.zero_grad()
        features = encode()
        (features * weights).sum().backward()
        found.append([features, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 10
    for ours, full in zip(*found, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-9, atol=1e-9)


def test_losses_of_table_4_are_settings_of_eq_8():
    parse = lambda losses: Objective.parse(losses, 0.2, 0.4)  # noqa: E731
    assert parse("itc") == ((), 0.0, 0.0, ce_clip.imc_loss)
    assert parse("itc,hn") == (KINDS, 0.0, 0.0, ce_clip.imc_loss)
    assert parse("itc,hn,imc") == (KINDS, 0.2, 0.0, ce_clip.imc_loss)
    assert parse("itc,hn,cmr") == (KINDS, 0.0, 0.4, ce_clip.imc_loss)
    assert parse("itc,hn,imc,cmr") == (KINDS, 0.2, 0.4, ce_clip.imc_loss)
    released = (KINDS, 0.2, 0.4, ce_clip.imc_loss_released)
    assert parse("itc,hn,imc_released,cmr") == released


def test_lr_warms_up_linearly_then_follows_a_cosine_to_zero():
    factors = [ce_clip.lr_factor(step, 4, 12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert factors[8] == pytest.approx(0.5)
    assert factors[10] == pytest.approx((1 + math.cos(0.75 * math.pi)) / 2)
    assert factors[12] == pytest.approx(0)


def test_biases_norms_and_logit_scale_do_not_decay(world):
    model = tiny_model(world).model
    plain, decayed = ce_clip.parameter_groups(model, 0.1)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    name = {id(p): n for n, p in model.named_parameters()}
    decayed = {name[id(p)] for p in decayed["params"]}
    assert len(decayed) + len(plain["params"]) == len(name)
    assert {"token_embedding.weight", "visual.conv1.weight", "text_projection"} <= decayed
    assert not any("ln_" in n or "bias" in n or n == "logit_scale" for n in decayed)


def test_batches_cover_an_epoch_and_split_over_processes(monkeypatch):
    whole = list(ce_clip.batch_keys(11, 4, epochs=2, seed=1))
    assert [epoch for batch in whole for epoch, _ in batch] == [0] * 8 + [1] * 8
    assert len({i for _, i in sum(whole[:2], [])}) == 8
    assert whole[:2] != [[(0, i) for _, i in batch] for batch in whole[2:]]
    parts = []
    monkeypatch.setattr(ce_clip, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(ce_clip, "rank", lambda rank=rank: rank)
        parts.append(list(ce_clip.batch_keys(11, 4, epochs=2, seed=1)))
    assert [a + b for a, b in zip(*parts)] == whole


def test_a_region_is_cropped_to_its_box(tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.putpixel((5, 3), (255, 0, 0))
    picture.save(tmp_path / "a.png")
    record = {"id": 1, "image": "a.png", "caption": "a red dot", **dict.fromkeys(KINDS)}
    lines = [record | {"box": [5, 3, 6, 4]}, record]
    path = tmp_path / "n.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = lambda picture: torch.tensor(picture.size)  # noqa: E731
    load = functools.partial(ce_clip.load_image, transform=size)
    records = ce_clip.Negatives(path, tmp_path)
    pairs = ce_clip.Pairs(records, (), load, toy.tokenize, seed=0)
    assert [pairs[0, i][0].tolist() for i in (0, 1)] == [[1, 1], [8, 8]]
    dot = ce_clip.load_image(records[0]["image"], lambda p: p.getpixel((0, 0)), records[0]["box"])
    assert dot == (255, 0, 0)


def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(tmp_path):
    Image.new("RGB", (640, 480)).save(path := tmp_path / "a.jpg")

    def size(draft, **box):
        return ce_clip.load_image(path, lambda picture: picture.size, draft=draft, **box)

    assert (size(224), size(0), size(400)) == ((320, 240), (640, 480), (640, 480))
    assert size(224, box=(0, 0, 600, 400)) == (600, 400)


def test_augmentation_depends_on_seed_epoch_and_item_alone():
    noise = lambda path, box: torch.rand(3)  # noqa: E731
    record = {"image": "", "caption": "a", **dict.fromkeys(KINDS)}
    pairs = ce_clip.Pairs([record] * 2, (), noise, toy.tokenize, seed=0)
    first = pairs[0, 1][0]
    torch.rand(5)
    assert torch.equal(pairs[0, 1][0], first)
    others = [pairs[1, 1][0], pairs[0, 0][0]]
    others.append(ce_clip.Pairs([record] * 2, (), noise, toy.tokenize, seed=1)[0, 1][0])
    assert not any(torch.equal(other, first) for other in others)


def test_a_bad_picture_gives_way_to_the_next_and_is_reported():
    def load(path, box):
        if path == "bad":
            raise BadInput("cannot read")
        return torch.rand(1)

    records = [{"image": name, "caption": name, **dict.fromkeys(KINDS)} for name in ("a", "bad")]
    pairs = ce_clip.Pairs(records, (), load, lambda texts: texts, seed=0, skip_bad=True)
    assert [(pairs[0, i][1], pairs[0, i][3].item()) for i in (0, 1)] == [(["a"], -1), (["a"], 1)]
    with pytest.raises(BadInput):
        ce_clip.Pairs(records, (), load, lambda texts: texts, seed=0)[0, 1]


# ---- Whole runs ----------------------------------------------------------------------------------


def test_run_on_one_and_two_processes(world, tmp_path):
    done, log = tiny_run(world, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done, log_2 = tiny_run(world, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr

    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log] == [1, 1, 1, 2, 2, 2]
    assert set(log[0]) == {
        *("step", "epoch", "loss", "itc", "imc", "cmr", "logit_scale", "lr", "pairs_per_s"),
        "bad_images",
        *(f"threshold_{kind}" for kind in KINDS),
    }
    for line, line_2 in zip(log, log_2):  # the same losses, thresholds and schedule
        assert line | {"pairs_per_s": 0} == pytest.approx(line_2 | {"pairs_per_s": 0}, rel=1e-3)
    assert [line["threshold_object"] for line in log][0] == 0  # Th^0
    assert log[1]["threshold_object"] != 0
    assert log[2]["loss"] == pytest.approx(
        log[2]["itc"] + 0.2 * log[2]["imc"] + 0.4 * log[2]["cmr"], rel=1e-5
    )
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (config["processes"], config["alpha"], config["losses"]) == (2, 0.2, "itc,hn,imc,cmr")
    _, (images, tokens, _) = example_batch(world)
    features = []
    for name in ("one", "two"):
        path = str(tmp_path / name / "epoch_2.pt")
        assert torch.load(path, weights_only=True)["threshold"].shape == (4,)
        model = ce_clip.load_model(path).model.eval()
        features.append(torch.cat([model(images)[0], model(None, tokens.flatten(0, 1))[1]]))
    torch.testing.assert_close(*features, rtol=1e-3, atol=1e-3)

    # open_clip alone, in another process, loads it to the same features
    script = (
        "import sys, open_clip, torch; open_clip.add_model_config(sys.argv[1] + '/tiny.json');"
        "m = open_clip.create_model_and_transforms('tiny', pretrained=sys.argv[1] + '/epoch_2.pt');"
        "torch.save(m[0].eval()(torch.ones(1, 3, 32, 32))[0], sys.argv[1] + '/features')"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "two"], check=True)
    ours = ce_clip.load_model(str(tmp_path / "two" / "epoch_2.pt")).model.eval()
    assert torch.equal(torch.load(tmp_path / "two" / "features"), ours(torch.ones(1, 3, 32, 32))[0])

    # again: the run that is there is refused, and untouched
    before = (tmp_path / "one" / "epoch_2.pt").read_bytes()
    done, _ = tiny_run(world, tmp_path / "one")
    assert done.returncode == 1
    assert "holds a run" in done.stderr
    assert (tmp_path / "one" / "epoch_2.pt").read_bytes() == before


def same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimiser, thresholds, and every line of the log but for its speed."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".pt"):
            one, two = (torch.load(folder / name, weights_only=True) for folder in (a, b))
            one, two = ({k: v for k, v in x.items() if k != "run"} for x in (one, two))
            assert flat(one) == flat(two)
    logs = [[json.loads(x) for x in (f / "log.jsonl").read_text().splitlines()] for f in (a, b)]
    for one, two in zip(*logs, strict=True):
        assert one | {"pairs_per_s": 0} == two | {"pairs_per_s": 0}


def flat(x):
    if isinstance(x, dict):
        return {k: flat(v) for k, v in x.items()}
    return x.tolist() if isinstance(x, torch.Tensor) else x


LONG = ["--epochs", 8, "--save-every", 1, "--resume"]  # 24 steps


@pytest.fixture(scope="session")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done, log = tiny_run(world, out, *LONG)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log] == list(range(1, 25))
    return out


def test_stopped_at_random_moments_and_resumed_it_is_the_same_run(world, uninterrupted, tmp_path):
    out, rng, reached = tmp_path / "run", random.Random(0), 0
    log = out / "log.jsonl"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = tiny_start(world, out, *LONG, "--workers", 1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            lines = log.read_text().count("\n") if log.exists() else 0
            if lines > reached + 2:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        if number == signal.SIGTERM:  # to loader processes too, as a batch system does
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            assert len(children.split()) >= 1
            for child in children.split():
                os.kill(int(child), number)
        process.send_signal(number)
        _, errors = process.communicate()
        reached = log.read_text().count("\n")
        assert 0 < reached < 24
        if number != signal.SIGKILL:
            assert process.returncode == 1
            found = f"ce_clip.py: error: stopped after step {reached} of 24: --resume goes on"
            assert errors.splitlines()[-1] == found
    newest = max(out.glob("step_*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])  # damaged: the one before is taken
    done, _ = tiny_run(world, out, *LONG)
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged, passed over" in done.stderr
    same_run(uninterrupted, out)


def test_a_finished_run_is_resumed_by_doing_nothing(world, uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.glob("*.pt")}
    done, log = tiny_run(world, uninterrupted, *LONG)
    assert done.returncode == 0, done.stderr
    assert len(log) == 24
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.glob("*.pt")} == before


def test_checkpoints_without_a_state_are_not_lost(world, tmp_path):
    options = tmp_path / "x", "--epochs", 1
    tiny_run(world, *options)
    for state in (tmp_path / "x").glob("step_*.pt"):
        state.unlink()
    done, log = tiny_run(world, *options, "--resume")
    assert done.returncode == 1
    assert "holds checkpoints but no state to resume" in done.stderr
    assert (tmp_path / "x" / "epoch_1.pt").exists()
    assert len(log) == 3


def test_pretrained_weights_of_another_model_are_refused(world, tmp_path):
    ce_clip.save_checkpoint(tmp_path / "x.pt", ce_clip.build_model("tiny-other", config=TINY))
    done = run(*tiny_options(world, tmp_path / "x"), "--pretrained", tmp_path / "x.pt")
    assert done.returncode == 1
    message = f"{tmp_path / 'x.pt'} holds a tiny-other, not a {world / 'tiny.json'}: --model"
    assert message in done.stderr


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_checkpoints_of_others_are_not_lost(world, tmp_path, more):
    """open_clip's own runs leave epoch_N.pt too."""
    (tmp_path / "epoch_1.pt").write_bytes(b"somebody's")
    done = run(*tiny_options(world, tmp_path), *more)
    assert done.returncode == 1
    assert f"{tmp_path} holds" in done.stderr
    assert (tmp_path / "epoch_1.pt").read_bytes() == b"somebody's"


def test_a_run_of_other_settings_is_not_resumed(world, uninterrupted):
    before = (uninterrupted / "log.jsonl").read_bytes()
    done, _ = tiny_run(world, uninterrupted, *LONG, "--alpha", 0.3)
    assert done.returncode == 1
    assert "was begun with alpha 0.2, now 0.3: resume with the same settings" in done.stderr
    assert (uninterrupted / "log.jsonl").read_bytes() == before


def test_workers_micro_batches_and_processes_change_no_step(world, uninterrupted, tmp_path):
    expected = [json.loads(x) for x in (uninterrupted / "log.jsonl").read_text().splitlines()]
    for more in (["--workers", 2], ["--micro-batch", 3]):
        done, log = tiny_run(world, tmp_path / more[0], *LONG, *more)
        assert done.returncode == 0, done.stderr
        for line, other in zip(log, expected, strict=True):
            rel = 0 if more[0] == "--workers" else 1e-3
            line, other = line | {"pairs_per_s": 0}, other | {"pairs_per_s": 0}
            assert line == pytest.approx(other, rel=rel, abs=rel)


def test_two_runs_at_a_time_in_one_folder_are_refused(world, uninterrupted):
    before = {p: p.read_bytes() for p in uninterrupted.iterdir()}
    with negatives.open_locked(uninterrupted / "log.jsonl"):
        done, _ = tiny_run(world, uninterrupted, *LONG, "--overwrite")
    assert done.returncode == 1
    assert f"another process is writing {uninterrupted / 'log.jsonl'}" in done.stderr
    assert {p: p.read_bytes() for p in uninterrupted.iterdir()} == before


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path):
    done, log = tiny_run(world, tmp_path / "x", "--lr", 1e30, "--warmup", 0, "--epochs", 8)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "the loss is not finite: {" in line
    for name in ("step", "epoch", "itc", "imc", "cmr", "threshold_object", "logit_scale"):
        assert f'"{name}"' in line
    assert all(math.isfinite(line["loss"]) for line in log)


def test_bad_pictures_up_to_a_number(world, tmp_path):
    for path in world.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "11.png").write_bytes(b"not a picture")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:900])  # truncated
    (tmp_path / "3.png").unlink()
    options = [tmp_path, tmp_path / "x", "--max-bad-images"]
    done, log = tiny_run(*options, 3)
    assert done.returncode == 0, done.stderr
    assert [line["bad_images"] for line in log][-1] == 3
    for name in ("11.png", "5.png", "3.png"):
        line = f"{tmp_path / name} cannot be read: another picture takes its place"
        assert done.stderr.count(line) == 1
    done, _ = tiny_run(*options, 2, "--overwrite")
    assert done.returncode == 1
    assert "3 pictures cannot be read, more than --max-bad-images" in done.stderr.splitlines()[-1]


VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
FAMILIES = {
    "sigmoid": {  # SigLIP; open_clip would download a tokenizer for that name
        "embed_dim": 16,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": VIT,
        "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "coca": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": VIT
        | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2, "mlp_ratio": 4},
    },
    "roberta": {
        "embed_dim": 16,
        "vision_cfg": VIT,
        "text_cfg": {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_dual_encoders_of_open_clip(world, tmp_path, tiny_roberta, family):
    config = json.loads(json.dumps(FAMILIES[family]))
    if family == "roberta":
        names = ("hf_model_name", "hf_tokenizer_name")
        config["text_cfg"] |= dict.fromkeys(names, str(tiny_roberta)) | {"context_length": 24}
        config["text_cfg"]["hf_model_pretrained"] = False
    (path := tmp_path / f"tiny-{family}.json").write_text(json.dumps(config))
    options = ["--model", path, "--epochs", 1]
    done, log = tiny_run(world, tmp_path / "x", *options)
    assert done.returncode == 0, done.stderr
    assert len(log) == 3
    saved = ce_clip.load_model(str(tmp_path / "x" / "epoch_1.pt"))
    tokens = saved.tokenizer(["a red dog", "a ball"])
    features = ce_clip.encode_text(saved.model.eval(), tokens)
    torch.testing.assert_close(features, saved.model.encode_text(tokens, normalize=True))
    if family == "roberta":  # whose dropout is off
        done, two = tiny_run(world, tmp_path / "micro", *options, "--micro-batch", 3)
        for line, other in zip(log, two, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    if family == "coca":  # with parameters that no loss of ours moves
        done, two = tiny_run(world, tmp_path / "two", *options, processes=2)
        assert done.returncode == 0, done.stderr
        for line, other in zip(log, two, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_lock_image_and_grad_checkpointing(world, tmp_path):
    logs = {}
    for name in ("plain", "grad-checkpointing", "lock-image"):
        more = [f"--{name}"] if name != "plain" else []
        done, logs[name] = tiny_run(world, tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    losses = {name: [line["loss"] for line in log] for name, log in logs.items()}
    assert losses["grad-checkpointing"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["lock-image"] != pytest.approx(losses["plain"], rel=1e-4)
    states = [
        torch.load(tmp_path / "lock-image" / f"epoch_{n}.pt", weights_only=True)["state_dict"]
        for n in (1, 2)
    ]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed
    assert not any(name.startswith("visual.") for name in changed)


def test_fixed_threshold_and_several_losses(world, tmp_path):
    done, log = tiny_run(
        world, tmp_path / "x", "--threshold", 5, "--losses", "itc", "itc,hn,imc,cmr", "--epochs", 1
    )
    assert done.returncode == 0, done.stderr
    assert {line[f"threshold_{kind}"] for line in log for kind in KINDS} == {5}
    lines = Path(tmp_path, "x-itc", "log.jsonl").read_text().splitlines()
    plain = [json.loads(line) for line in lines]
    assert plain[0]["loss"] == plain[0]["itc"]
    assert plain[0]["imc"] == plain[0]["cmr"] == 0
    assert (tmp_path / "x-itc" / "epoch_1.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data", "coco", "--data-root", "nowhere"],
            "needs nowhere/coco/annotations/captions_train",
        ),
        (["--data", "{}/negatives.jsonl"], "--images"),
        (["--data", "{}/negatives.jsonl", "--images", "nowhere"], "24 pictures are missing"),
        (["--data", "coc0"], "--data coc0: neither a file nor one of toy, coco, cc3m, vg"),
        (["--data", "{}/none.jsonl", "--images", "{}"], "neither a file nor one of"),
        (
            ["--data", "{}/tiny.json", "--images", "{}"],
            "line 1, is not a record of negatives.py: KeyError 'relation'",
        ),
        (
            ["--data", "{}/negatives.jsonl", "--images", "{}"],
            "24 captions do not fill one batch of 256",
        ),
        (["--data", "{}/empty.jsonl", "--images", "{}"], "0 captions do not fill one batch"),
    ],
)
def test_mistakes_are_one_line(world, tmp_path, monkeypatch, options, message):
    (world / "empty.jsonl").touch()
    options = [option.format(world) for option in options]
    options += ["--out", str(tmp_path / "x"), "--pretrained", "none", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["ce_clip.py", *options])
    with pytest.raises(BadInput) as e:
        ce_clip.main()
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_named_data_are_a_union(world, tmp_path, monkeypatch):
    """CC3M as img2dataset leaves it and Visual Genome's regions; negatives are made first."""
    for name in ("cc3m", "vg"):
        source = ce_clip.DATA[name]._replace(filler="ngram")
        monkeypatch.setitem(ce_clip.DATA, name, source)
    args = SimpleNamespace(data=["cc3m", "vg"], images=[], data_root=tmp_path, max_bad_images=0)
    with pytest.raises(BadInput, match="--data cc3m needs .*cc3m/images: img2dataset"):
        ce_clip.collect_records(args)
    (tmp_path / "cc3m" / "images" / "00000").mkdir(parents=True)
    (tmp_path / "vg" / "images").mkdir(parents=True)
    picture = Image.new("RGB", (40, 40))
    picture.save(tmp_path / "cc3m" / "images" / "00000" / "1.jpg")
    picture.save(tmp_path / "vg" / "images" / "5.jpg")
    (tmp_path / "cc3m" / "images" / "00000" / "1.txt").write_text("a red dog is on a ball")
    region = {"region_id": 9, "image_id": 5, "phrase": "a cat on a mat"}
    region |= {"x": 1, "y": 2, "width": 3, "height": 4}
    regions = [{"id": 5, "regions": [region]}]
    (tmp_path / "vg" / "region_descriptions.json").write_text(json.dumps(regions))
    dog, cat = ce_clip.collect_records(args)
    assert (dog["relation"], dog["box"]) == ("a red ball is on a dog", None)
    assert (cat["relation"], cat["box"]) == ("a mat on a cat", (1, 2, 4, 6))
    assert (tmp_path / "vg" / "negatives.jsonl").exists()


def test_a_batch_that_does_not_split_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(ce_clip, "world_size", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["ce_clip.py", "--batch-size", "7"])
    with pytest.raises(SystemExit):
        ce_clip.main()
    assert "--batch-size 7 does not split over 2 processes" in capsys.readouterr().err


def test_a_broken_picture_is_named(world, tmp_path):
    for path in world.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "11.png").write_bytes(b"not a picture")
    process = tiny_start(tmp_path, tmp_path / "x", "--workers", 2)
    _, errors = process.communicate(timeout=25)  # the loader's processes end with it
    assert process.returncode == 1
    assert f"cannot read the picture {tmp_path / '11.png'}" in errors.splitlines()[-1]
