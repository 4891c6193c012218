"""xvlm.py: the model, X-VLM's checkpoints, and X-VLM through the trainer and the evaluator."""

import json
import math
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from test_train import refused, train
from torch import tensor
from torch.nn.parallel import DistributedDataParallel

import ce_clip
import eval_bench
import xvlm
from negatives import BadInput

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue dog cat ball chase ##s eats green . 1".split()
# the stages have 8, 4 and 2 x 2 windows of 4: shifted, one alone, and smaller than that
SWIN = dict(img_size=32, window_size=4, embed_dim=8, depths=[2, 2, 1], num_heads=[1, 2, 4])
BERT = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
BERT.update(intermediate_size=32, max_position_embeddings=16)
CONFIG = dict(architecture="xvlm", embed_dim=8, temperature=0.07, fusion_layer=1, context_length=12)
CONFIG.update(swin=SWIN, bert=BERT)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = tensor([[2, 5, 6, 8, 0, 0], [2, 5, 9, 11, 12, 10], [2, 14, 0, 0, 0, 0]])


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """tiny_xvlm.json, whose tokenizer is a folder with a vocabulary."""
    folder = tmp_path_factory.mktemp("xvlm")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    path = folder / "tiny_xvlm.json"
    path.write_text(json.dumps({**CONFIG, "tokenizer": str(folder)}))
    return path


def random_model(seed=0, config=CONFIG) -> xvlm.XVLM:
    """No weight is left at a value, as 0 of a bias, that would hide what it does."""
    torch.manual_seed(seed)
    model = xvlm.XVLM(config).eval()
    for p in model.parameters():
        if p.ndim:
            p.data += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


# ---- The model: values that hold by construction -------------------------------------------------


def test_the_first_state_of_a_picture_is_the_mean_of_its_patches(model):
    states = model.image_states(IMAGES)
    assert states.shape == (3, 1 + (32 // 4 // 2 // 2) ** 2, 8 * 2 * 2)
    torch.testing.assert_close(states[:, 0], states[:, 1:].mean(1))
    assert states[:, 1:].std(-1).mean().item() == pytest.approx(1, rel=0.5)  # after the last norm
    feature = F.normalize(model.vision_proj(states[:, 0]), dim=1)
    for images in (IMAGES, states):
        torch.testing.assert_close(model.encode_image(images, normalize=True), feature)


def test_padding_is_no_word(model):
    expected, longer = model.encode_text(TOKENS, normalize=True), F.pad(TOKENS, (0, 6))
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.encode_text(longer, normalize=True), expected)
    alone = [model.encode_text(row[None], normalize=True) for row in TOKENS]
    torch.testing.assert_close(torch.cat(alone), expected)
    matched = [model.match(i[None], t[None]) for i, t in zip(IMAGES, TOKENS)]
    torch.testing.assert_close(torch.cat(matched), model.match(IMAGES, longer))


def test_a_caption_is_read_in_both_directions(model):
    """The feature is the first state: under a causal mask no later word would change it."""
    other = TOKENS.clone()
    other[1, 5] = 13
    change = (model.encode_text(other) - model.encode_text(TOKENS)).abs().amax(1)
    assert change[1] > 1e-3 and change[[0, 2]].max() == 0
    change = (model.match(IMAGES, other) - model.match(IMAGES, TOKENS)).abs()
    assert change[1] > 1e-4 and change[[0, 2]].max() == 0


def test_the_picture_comes_in_at_the_fusion_layer():
    model = random_model()
    layers = model.text_encoder.encoder.layer
    assert [hasattr(layer, "crossattention") for layer in layers] == [False, True, True]
    text, match = model.encode_text(TOKENS), model.match(IMAGES, TOKENS)
    assert not torch.allclose(match, model.match(IMAGES.flip(0), TOKENS), atol=1e-3)
    for last in (layers[2], layers[1]):
        torch.nn.init.normal_(last.attention.self.value.weight)
        assert torch.equal(model.encode_text(TOKENS), text)
        before, match = match, model.match(IMAGES, TOKENS)
        assert not torch.allclose(match, before)
    torch.nn.init.normal_(layers[0].attention.self.value.weight)
    assert not torch.allclose(model.encode_text(TOKENS), text)


def test_match_is_the_second_logit_of_each_caption_with_its_picture(model):
    states, (text, exists) = model.image_states(IMAGES), model.text_states(TOKENS)
    logits = model.itm_logits(states, text, exists)
    assert logits.shape == (3, 2)
    torch.testing.assert_close(model.match(IMAGES, TOKENS), logits[:, 1])
    which = tensor([1, 1, 0])
    expected = model.itm_logits(states[which], text, exists)[:, 1]
    torch.testing.assert_close(model.match(IMAGES, TOKENS, which), expected)
    torch.testing.assert_close(model.match(states, TOKENS, which), expected)
    with torch.autocast("cpu", torch.bfloat16):  # whose rounding would make ties in the head
        scores = model.match(IMAGES, TOKENS)
    assert not torch.equal(scores, scores.bfloat16().float())


def test_features_and_matching_loss_of_three_pairs(model, monkeypatch):
    """For each picture another caption, drawn by their similarities; for each caption another
    picture, by the same of the captions; a sum by hand."""
    exists = tensor([[True, False, True], [True, True, True], [True, False, False]])
    tokens = TOKENS[[0, 1, 1, 2, 0, 2]]  # caption 0, a negative, caption 1, negatives, caption 2
    tokens[[1, 4], 2] = 13
    tokens[5, 1] = 7
    drawn, sims = [tensor([2, 0, 1]), tensor([1, 2, 0])], []
    monkeypatch.setattr(xvlm, "draw_other", lambda sim: sims.append(sim) or drawn[len(sims) - 1])
    image, text, loss = model(IMAGES, tokens, exists)
    torch.testing.assert_close(image, model.encode_image(IMAGES, normalize=True))
    torch.testing.assert_close(text, model.encode_text(tokens, normalize=True))
    sim = image @ text[[0, 2, 5]].T / 0.07
    torch.testing.assert_close(sims, [sim, sim.T])
    true = [(0, 0), (1, 2), (2, 5)]  # picture, row of its caption
    false = [(1, 0), (2, 2), (0, 5)] + [(0, 5), (1, 0), (2, 2)]  # other pictures, other captions
    terms = []
    for picture, row in true + false:
        states = model.image_states(IMAGES[picture : picture + 1])
        no, yes = model.itm_logits(states, *model.text_states(tokens[row : row + 1]))[0].tolist()
        right = yes if (picture, row) in true else no
        terms.append(math.log(math.exp(no) + math.exp(yes)) - right)
    assert loss.shape == () and loss.item() == pytest.approx(sum(terms) / 9, rel=1e-5)
    with pytest.raises(BadInput, match="needs two pairs or more"):
        model(IMAGES[:1], tokens[:2], exists[:1])


def test_the_draw_follows_the_similarity():
    """Its own, however close, never; of e^0 and e^ln 3 the second in 3 of 4; alike if all is lost
    to its own (the 1e-5), or if nothing is a number."""
    nan = math.nan
    sim = tensor([[9.0, 0.0, math.log(3)], [0.0, 99.0, 0.0], [nan, nan, nan]])
    torch.manual_seed(0)
    draws = torch.stack([xvlm.draw_other(sim) for _ in range(800)])
    for row, shares in enumerate([[0, 1 / 4, 3 / 4], [1 / 2, 0, 1 / 2], [1 / 2, 1 / 2, 0]]):
        found = (draws[:, row].bincount(minlength=3) / 800).tolist()
        assert found == pytest.approx(shares, abs=0.05)
        assert found[row] == 0


def test_the_full_size_is_the_papers():
    """214M parameters, with the heads of the pre-training 216M (Table 1)."""
    with torch.device("meta"):
        model = xvlm.XVLM(xvlm.CONFIG)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 214
    assert model.vision_encoder.layers[3].blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    fresh = xvlm.XVLM(CONFIG).text_encoder.encoder.layer[1].crossattention.self.key.weight
    assert fresh.std().item() == pytest.approx(0.02, rel=0.2)


# ---- Checkpoints of X-VLM ------------------------------------------------------------------------


def published(model) -> dict:
    """The weights as X-VLM's fine-tuning leaves them, the inverse of xvlm.ours."""
    found = {"temp": (-model.logit_scale.detach()).exp()}
    for name, value in model.state_dict().items():
        if ".downsample." in name:  # at the end of the stage before
            stage = int(name.split(".")[2])
            name = name.replace(f".{stage}.downsample.", f".{stage - 1}.downsample.")
        if name != "logit_scale":
            found[name] = value
    return found


def pretrained(model) -> dict:
    """The weights as X-VLM's pre-training leaves them."""
    state = published(model)
    found = {k.replace("text_encoder.", "text_encoder.bert."): v for k, v in state.items()}
    found["text_encoder.cls.predictions.bias"] = torch.zeros(len(WORDS))
    found["text_encoder.bert.embeddings.position_ids"] = torch.arange(16)[None]
    found["bbox_head.0.weight"] = torch.zeros(4, 16)
    found["vision_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    found["vision_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    return found


def test_names_of_x_vlm(model):
    """Spelled out, with where its Swin Transformer downsamples: at the end of a stage."""
    found = published(model)
    assert {
        "vision_encoder.layers.0.blocks.1.attn.relative_position_bias_table",
        "vision_encoder.layers.1.downsample.norm.bias",
        "text_encoder.embeddings.LayerNorm.weight",
        "text_encoder.encoder.layer.1.crossattention.self.key.weight",
        *("vision_proj.weight", "text_proj.bias", "itm_head.0.weight", "itm_head.3.bias"),
    } <= set(found)
    assert found["temp"].item() == pytest.approx(0.07)
    assert found["vision_encoder.layers.0.downsample.reduction.weight"].shape == (16, 32)


@pytest.mark.parametrize("layout", [published, pretrained])
def test_checkpoints_of_x_vlm_load(model, config, tmp_path, layout):
    torch.save({"model": layout(model), "config": {"image_res": 32}}, tmp_path / "x.th")
    loaded = ce_clip.load_model(str(tmp_path / "x.th"), str(config)).model.eval()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    torch.testing.assert_close(loaded.match(IMAGES, TOKENS), model.match(IMAGES, TOKENS))


def test_tables_of_another_window_are_resized_on_loading(model):
    """Weights of window 3, but for the last stage, which is smaller than that."""
    state, other = published(model), random_model(seed=1)
    names = [name for name in state if "bias_table" in name and ".2." not in name]
    small = {name: torch.randn(25, state[name].shape[1]) for name in names}
    other.load_state_dict({**state, **small})
    assert len(names) == 4
    for name in names:
        torch.testing.assert_close(other.state_dict()[name], xvlm.resize_table(small[name], 49))


def test_a_resized_table_by_hand():
    """Window 4 to 5, distances 1, q, q^2 with 1 + q + q^2 = 4: the new table's border. A spline
    through cubic polynomials that meet in an inner distance, not the outermost two, is these."""
    q = (math.sqrt(13) - 1) / 2
    knots = tensor([-4, -1 - q, -1, 0, 1, 1 + q, 4], dtype=torch.double)
    at = torch.arange(-4, 5, dtype=torch.double)
    heads = lambda y, x: x**3 - y, lambda y, x: y**3 * x**2, lambda y, x: (x - 1).clamp(0) ** 3 + y
    old = torch.stack([f(knots[:, None], knots[None]).flatten() for f in heads], 1)
    new = torch.stack([f(at[:, None], at[None]).flatten() for f in heads], 1)
    torch.testing.assert_close(xvlm.resize_table(old, 81), new, rtol=1e-4, atol=1e-3)
    # window 3 to 4: q stops at 1.5, so that 3 lies outside 2.5 and takes the value there
    line = tensor([-2.5, -1, 0, 1, 2.5]).repeat(5).view(25, 1)
    expected = tensor([-2.5, -2, -1, 0, 1, 2, 2.5]).repeat(7).view(49, 1)
    torch.testing.assert_close(xvlm.resize_table(line, 49), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["itm_head.3.bias", "text_proj.weight"])
def test_weights_of_something_else_are_refused(model, config, tmp_path, name):
    state = published(model)
    if name == "text_proj.weight":
        state[name] = torch.zeros(3, 3)  # of another size
    else:
        del state[name]
    torch.save({"model": state}, tmp_path / "x.th")
    with pytest.raises(BadInput, match=f"x.th is not a checkpoint of .*{name}"):
        ce_clip.load_model(str(tmp_path / "x.th"), str(config))


# ---- Captions, pictures, configs -----------------------------------------------------------------


def test_tokens_begin_with_cls_and_do_not_end_with_sep(config):
    tokenize = xvlm.Tokenizer(str(config.parent), 8)
    assert tokenize(["A red dog chases", "", "cat? a " * 5]).tolist() == [
        [2, 5, 6, 8, 11, 12, 0, 0],
        [2, 0, 0, 0, 0, 0, 0, 0],
        [2, 9, 1, 5, 9, 1, 5, 9],
    ]
    with pytest.raises(BadInput, match="the tokenizer 'nowhere' is not a folder with a vocab.txt"):
        xvlm.Tokenizer("nowhere", 8)


def test_pictures_are_squeezed_not_cropped(config):
    """The corners are still there, whatever the shape was."""
    _, train_transform, eval_transform, _ = xvlm.build(json.loads(config.read_text()))
    picture = Image.new("RGB", (100, 50))
    picture.paste((255, 0, 0), (0, 0, 10, 10))
    picture.paste((255, 0, 0), (90, 40, 100, 50))
    seen = eval_transform(picture)
    assert seen.shape == train_transform(picture).shape == (3, 32, 32)
    red = (1 - 0.48145466) / 0.26862954  # CLIP's mean and deviation
    assert seen[0, [0, -1], [0, -1]].tolist() == pytest.approx([red] * 2, abs=0.05)
    crop, flip, *augment, _, _ = train_transform.transforms[:6]
    assert (crop.scale, flip.p, [a.p for a in augment]) == ((0.5, 1), 0.5, [0.5, 0.5])


def test_augmentation_is_x_vlms_at_level_7_of_10():
    space = xvlm.RandAugment(1)._augmentation_space(31, (32, 32))
    assert len(space) == 10
    assert not {"Color", "Invert", "Solarize", "Posterize"} & set(space)  # a colour stays true
    for name, size, signed in [("Rotate", 21, True), ("Brightness", 0.36, False)]:
        assert space[name][0].tolist() == pytest.approx([size] * 31)
        assert space[name][1] is signed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fusion_layer": 3}, "fusion_layer must be one of the BERT's, not the first"),
        ({"fusion_layer": 0}, "fusion_layer must be one of the BERT's, not the first"),
        ({"context_length": 40}, "context_length is above max_position_embeddings"),
        ({"bert": {**BERT, "vocab_size": 5}}, "more words than vocab_size, or its"),
        ({"tokenizer": "PAD is 1"}, r"or its \[PAD\] is not 0"),
        ({"swin": {"depth": 3}}, "the config is not one of an X-VLM, see xvlm.CONFIG: TypeError"),
    ],
)
def test_a_config_that_would_go_wrong_late_is_refused(config, tmp_path, change, message):
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[PAD]", *WORDS[2:]]) + "\n")
    change = {key: tmp_path if value == "PAD is 1" else value for key, value in change.items()}
    with pytest.raises(BadInput, match=message):
        xvlm.build({**json.loads(config.read_text()), **change})


# ---- Training ------------------------------------------------------------------------------------


def test_run_resume_and_evaluate(world, config, tmp_path, monkeypatch, capsys):
    """Eq. 8 and ITM reach all of the model; with dropout, stochastic depth and drawn pairs the run
    that goes on after step 4 is the one that was not cut."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--model", config, "--save-every", 2]
    log = train(world, whole, *more)
    for line in log:
        parts = line["itc"] + 0.2 * line["imc"] + 0.4 * line["cmr"] + line["itm"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert log[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert log[0]["itm"] == pytest.approx(math.log(2), abs=0.6)  # near chance: the head is random
    assert log[0]["threshold_object"] == 0 != log[1]["threshold_object"]

    moved = ce_clip.load_model(str(whole / "epoch_2.pt")).model.state_dict()
    saved = torch.load(whole / "epoch_2.pt", weights_only=True)["state_dict"]
    torch.manual_seed(42)
    fresh = ce_clip.build_model(str(config)).model.state_dict()
    for name, value in moved.items():
        assert torch.equal(value, saved[name])
        # softmax does not see the bias of a key
        assert name.endswith("key.bias") or not torch.equal(value, fresh[name]), name

    shutil.copytree(whole, cut)
    (cut / "epoch_2.pt").unlink()
    assert torch.load(cut / "last.pt", weights_only=True)["step"] == 4
    assert train(world, cut, *more, "--resume") == log
    again = torch.load(cut / "epoch_2.pt", weights_only=True)["state_dict"]
    assert not [name for name, value in moved.items() if not torch.equal(value, again[name])]

    command = ["eval_bench.py", "--ckpt", whole / "epoch_2.pt", "--base", whole / "epoch_1.pt"]
    command += ["--wise", 0.5, "--pairs", world / "negatives.jsonl", "--images", world]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    eval_bench.main()
    assert "epoch_2.pt, WiSE 0.5 " in capsys.readouterr().out


def batch_of_four() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    tokens = torch.randint(5, len(WORDS), (4, 5, 8), generator=generator)
    tokens[..., 0], tokens[1, 2, 4:] = 2, 0
    return [images, tokens, torch.rand(4, 4, generator=generator) < 0.7]


def backward(image, text, scale, itm, valid) -> torch.Tensor:
    """A step's gradient as in ce_clip.train; returns the mean matching loss."""
    image, text, valid = ce_clip.gather(image), ce_clip.gather(text), ce_clip.gather(valid)
    sims = ce_clip.similarities(image, text, scale)
    loss, _ = ce_clip.ce_clip_loss(*sims, torch.ones(4), valid)
    itm = ce_clip.gather(itm).mean()
    (loss + itm).backward()
    return itm.detach()


def one_of_two(rank: int, out: str) -> None:
    dist.init_process_group("gloo", f"file://{out}.init", rank=rank, world_size=2)
    model = random_model()
    encoder = DistributedDataParallel(ce_clip.Encoder(model), find_unused_parameters=True)
    images, tokens, valid = (x[2 * rank : 2 * rank + 2] for x in batch_of_four())
    itm = backward(*encoder(images, tokens, valid), valid)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"itm": itm, **gradients}, f"{out}.{rank}")
    dist.destroy_process_group()


def test_gradient_of_two_processes(tmp_path):
    """Eq. 8 on all four pairs, and the mean of the matching losses of the halves: of two pairs each
    the draws are certain."""
    out = str(tmp_path / "gradients")
    torch.multiprocessing.spawn(one_of_two, (out,), nprocs=2)
    model = random_model()
    encoder, batch = ce_clip.Encoder(model), batch_of_four()
    first, second = encoder(*(x[:2] for x in batch)), encoder(*(x[2:] for x in batch))
    image, text = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
    itm = backward(image, text, first[2], (first[3] + second[3]) / 2, batch[2])
    for rank in range(2):
        found = torch.load(f"{out}.{rank}")
        torch.testing.assert_close(found["itm"], itm)
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_run_on_two_processes(world, config, tmp_path):
    log = train(world, tmp_path, "--model", config, "--grad-checkpointing", processes=2)
    assert len(log) == 6 and log[-1]["loss"] < log[0]["loss"]


def test_grad_checkpointing_has_the_same_gradient():
    """And each block of both towers runs twice."""
    bert = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {**CONFIG, "bert": bert, "swin": {**SWIN, "drop_path_rate": 0.0}}
    plain, frugal = random_model(config=config).train(), random_model(config=config).train()
    frugal.set_grad_checkpointing()
    batch, runs = batch_of_four(), []
    for module in frugal.modules():
        if type(module).__name__ in ("SwinTransformerBlock", "BertIntermediate"):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    for model in (plain, frugal):
        torch.manual_seed(0)
        backward(*ce_clip.Encoder(model)(*batch), batch[2])
    assert len(runs) == 2 * (5 + 3)
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_locked_image_tower_and_micro_batches(world, config, tmp_path):
    """The text half learns, from the matching loss too, whose negatives are the micro-batch's."""
    more = ["--model", config, "--lock-image", "--micro-batch", 3]
    log = train(world, tmp_path / "x", *more)
    assert log[0]["itm"] == pytest.approx(math.log(2), abs=0.6)
    torch.manual_seed(42)
    fresh = ce_clip.build_model(str(config)).model.state_dict()
    moved = ce_clip.load_model(str(tmp_path / "x" / "epoch_2.pt")).model.state_dict()
    for name, value in moved.items():
        if name.startswith("vision_encoder"):
            assert torch.equal(value, fresh[name]), name
    assert not torch.equal(moved["itm_head.0.weight"], fresh["itm_head.0.weight"])


def test_mistakes_are_one_line(world, config, tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps({"architecture": "xvlm", "fusion_layer": 1}))
    message = "the config is not one of an X-VLM, see xvlm.CONFIG"
    assert message in refused(world, tmp_path / "x", "--model", tmp_path / "odd.json")


# ---- Evaluation ----------------------------------------------------------------------------------


def test_scores_are_those_of_single_pairs(world, config):
    """Batches, pictures with several captions, a region, one that is absent: each is its own."""
    loaded = ce_clip.build_model(str(config))._replace(model=random_model())
    model, dog, cat, ball = loaded.model, "a red dog", "dog eats a cat", "a ball"
    items = []
    for n, *texts, box in [(0, dog, cat, None), (99, dog, cat, None), (0, cat, ball, None)]:
        items.append(eval_bench.Item("", (world / f"{n}.png", box), *texts))
    items.append(eval_bench.Item("", (world / "1.png", (5, 5, 20, 30)), dog, ball))
    scorer = eval_bench.Scorer(loaded, 2, 0)
    scorer.encode(items)  # the logits may come later
    scorer.encode(items, itm=True)
    for itm in (False, True):
        found = {n: tensor(scorer.decide(items[n], itm)["scores"]) for n in (0, 2, 3)}
        for n in (0, 2, 3):
            path, box = items[n].picture
            image = loaded.eval_transform(Image.open(path).crop(box or (0, 0, 40, 36)))[None]
            tokens = loaded.tokenizer([items[n].positive, items[n].negative])
            features = model.encode_text(tokens, normalize=True)
            expected = (model.encode_image(image, normalize=True) @ features.T)[0]
            if itm:
                expected = expected + model.match(image.expand(2, -1, -1, -1), tokens)
            torch.testing.assert_close(found[n], expected)
    scorer.blind = True  # others' pictures are matched, too
    cell = eval_bench.accuracies(scorer, items, itm=True)[""]
    others = eval_bench.exchanged([items[n] for n in (0, 2, 3)])
    assert len({other.picture for other in others}) == 2
    assert cell.blind == 100 * sum(scorer.decide(o, True)["right"] for o in others) / 3
    torch.nn.init.constant_(model.itm_head[3].bias, math.nan)  # must not pass for no picture
    with pytest.raises(BadInput, match="features that are not finite"):
        eval_bench.Scorer(loaded, 2, 0).encode(items, itm=True)


def test_aro_and_valse_are_scored_with_itm_sugarcrepe_by_cosine(world, config, tmp_path):
    """The same picture and captions in a file of each."""
    loaded = ce_clip.build_model(str(config))._replace(model=random_model())
    scorer = eval_bench.Scorer(loaded)
    entry = dict.fromkeys(["image_path", "image_file", "filename"], str(world / "0.png"))
    entry.update(dict.fromkeys(["caption", "true_caption"], "a red dog"), mturk={"caption": 3})
    entry.update(dict.fromkeys(["foil", "false_caption", "negative_caption"], "a blue dog"))
    entry.update(relation_name="on", bbox_x=0, bbox_y=0, bbox_w=40, bbox_h=36)
    files = ["aro/visual_genome_relation", "valse/plurals", "sugarcrepe/add_att"]
    benchmarks = [eval_bench.aro, eval_bench.valse, eval_bench.sugarcrepe]
    for file, score, itm in zip(files, benchmarks, [True, True, False]):
        (tmp_path / file).parent.mkdir()
        (tmp_path / f"{file}.json").write_text(json.dumps({"0": entry}))
        scorer.decisions.clear()
        score(scorer, tmp_path)
        [found] = scorer.decisions
        picture = found["picture"]
        item = eval_bench.Item("", picture, found["positive"], found["negative"])
        scorer.encode([item], itm=True)
        with_itm, cosines = (scorer.decide(item, which)["scores"] for which in (True, False))
        assert with_itm != cosines
        assert found["scores"] == pytest.approx(with_itm if itm else cosines, abs=1e-6)
