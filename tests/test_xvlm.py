"""xvlm.py: the model, X-VLM's checkpoints, and X-VLM through the trainer and the evaluator."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_train import train
from torch import tensor
from torch.testing import assert_close

import ce_clip
import eval_bench
import xvlm
from files import BadInput, ImagePart, open_image

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue dog cat ball chase ##s eats green . 1".split()
# the stages have 8, 4 and 2 x 2 windows of 4: shifted, one alone, and smaller than that
SWIN = dict(img_size=32, window_size=4, embed_dim=8, depths=[2, 2, 1], num_heads=[1, 2, 4])
BERT = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
BERT.update(intermediate_size=32, max_position_embeddings=16)
CONFIG = dict(architecture="xvlm", embed_dim=8, temperature=0.07, swin=SWIN, bert=BERT)
CONFIG.update(fusion_layer=1, context_length=12)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = tensor([[2, 5, 6, 8, 0, 0], [2, 5, 9, 11, 12, 10], [2, 14, 0, 0, 0, 0]])


@pytest.fixture(scope="session")
def config(world):
    """tiny_xvlm.json, whose tokenizer is a folder with a vocabulary."""
    (world / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    path = world / "tiny_xvlm.json"
    path.write_text(json.dumps({**CONFIG, "tokenizer": str(world)}))
    return path


def random_model() -> xvlm.XVLM:
    """No weight keeps a value, such as 0 for a bias, that would hide what it does."""
    torch.manual_seed(0)
    model = xvlm.XVLM(CONFIG).eval()
    for p in model.parameters():
        if p.ndim:
            p.data += 0.2 * torch.randn_like(p)
    return model


def test_what_changes_a_text_feature_and_a_match():
    """Padding does not; a later word does, as there is no causal mask. The first layer of the BERT
    changes both, the others change the match alone."""
    model = random_model()
    text, match = model.encode_text(TOKENS), model.match(IMAGES, TOKENS)
    assert_close(model.encode_text(TOKENS[2:]), text[2:])  # alone it needs no padding
    assert_close(model.match(IMAGES[2:], TOKENS[2:]), match[2:])
    other_word = TOKENS.clone()
    other_word[1, 5] = 13
    for change in (model.encode_text(other_word) - text, model.match(IMAGES, other_word) - match):
        assert [row.abs().max() > 1e-4 for row in change] == [False, True, False]
    with torch.autocast("cpu", torch.bfloat16):  # its rounding would make ties in the head
        assert (model.match(IMAGES, TOKENS) != model.match(IMAGES, TOKENS).bfloat16()).any()
    for n, layer in enumerate(model.text_encoder.encoder.layer):
        torch.nn.init.normal_(layer.attention.self.value.weight)
        new_text, new_match = model.encode_text(TOKENS), model.match(IMAGES, TOKENS)
        assert torch.equal(new_text, text) == (n > 0) and not torch.equal(new_match, match)
        text, match = new_text, new_match


def test_features_and_matching_loss_of_three_pairs(monkeypatch):
    """For each image another caption, drawn by sim; for each caption another image, by sim.T."""
    model = random_model()
    exists = tensor([[True, False, True], [True, True, True], [True, False, False]])
    tokens = TOKENS[[0, 1, 1, 2, 0, 2]]  # caption 0, a negative, caption 1, negatives, caption 2
    tokens[[1, 4, 5], 2] = 13
    drawn, sims = [tensor([2, 0, 1]), tensor([1, 2, 0])], []
    monkeypatch.setattr(xvlm, "draw_other", lambda sim: sims.append(sim) or drawn[len(sims) - 1])
    image, text, loss = model(IMAGES, tokens, exists)
    states = model.image_states(IMAGES)
    assert states.shape == (3, 1 + 2 * 2, 32)
    assert_close(image, F.normalize(model.vision_proj(states[:, 1:].mean(1)), dim=1))
    assert_close(text, F.normalize(model.encode_text(tokens), dim=1))
    sim = image @ text[[0, 2, 5]].T / 0.07
    assert_close(sims, [sim, sim.T])
    # three pairs, three captions with other images, three images with other captions
    texts = model.text_states(tokens[[0, 2, 5, 0, 2, 5, 5, 0, 2]])
    logits = model.itm_logits(states[[0, 1, 2, 1, 2, 0, 0, 1, 2]], *texts)
    assert_close(loss, F.cross_entropy(logits, tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])))
    assert_close(model.match(IMAGES, tokens[[0, 2, 5]]), logits[:3, 1])
    with pytest.raises(BadInput, match="at least two pairs"):
        model(IMAGES[:1], tokens[:2], exists[:1])


def test_the_draw_follows_the_similarity():
    """Never the own one, however close. Of e^0 and e^ln 3 the second one in 3 of 4 draws. Both are
    as likely if the own one takes all (this is the 1e-5), or if nothing is a number."""
    sim = tensor([[9.0, 0.0, math.log(3)], [0.0, 99.0, 0.0], [math.nan] * 3])
    torch.manual_seed(0)
    draws = torch.stack([xvlm.draw_other(sim) for _ in range(800)])
    for row, odds in enumerate([[0, 1 / 4, 3 / 4], [1 / 2, 0, 1 / 2], [1 / 2, 1 / 2, 0]]):
        counts = draws[:, row].bincount(minlength=3)
        assert (counts / 800).tolist() == pytest.approx(odds, abs=0.05) and counts[row] == 0


def test_checkpoints_of_x_vlm_load(config, tmp_path):
    """Fine-tuned ones, and pre-trained ones, here of window 3 in the first two stages. In a resized
    table, q stops at 1.5: the old distance 2 becomes 2.5, and the new 3 lies outside of it."""
    expected = dict(random_model().state_dict())
    fine_tuned = {**expected, "temp": (-expected["logit_scale"]).exp()}
    del fine_tuned["logit_scale"]
    for part in ("norm.weight", "norm.bias", "reduction.weight"):
        for n in (0, 1):  # X-VLM downsamples at the end of a stage
            value = fine_tuned.pop(f"vision_encoder.layers.{n + 1}.downsample.{part}")
            fine_tuned[f"vision_encoder.layers.{n}.downsample.{part}"] = value
    names = """text_encoder.embeddings.LayerNorm.weight itm_head.3.bias vision_proj.weight
    text_encoder.encoder.layer.1.crossattention.self.key.weight text_proj.bias
    vision_encoder.layers.0.blocks.1.attn.relative_position_bias_table"""
    assert fine_tuned.keys() > set(names.split())
    heads_and_tables = """text_encoder.bert.embeddings.position_ids bbox_head.0.weight
    text_encoder.cls.predictions.bias vision_encoder.layers.0.blocks.1.attn_mask
    vision_encoder.layers.0.blocks.0.attn.relative_position_index"""
    pre_trained = dict.fromkeys(heads_and_tables.split(), torch.zeros(3))
    for name, value in fine_tuned.items():
        if "bias_table" in name and ".2." not in name:
            value = tensor([-2.5, -1, 0, 1, 2.5]).repeat(value.shape[1], 5).T
            expected[name] = tensor([-2.5, -2, -1, 0, 1, 2, 2.5]).repeat(value.shape[1], 7).T
        pre_trained[name.replace("text_encoder.", "text_encoder.bert.")] = value
    path = str(tmp_path / "x.th")
    torch.save({"model": pre_trained, "config": {"image_res": 32}}, path)
    loaded = ce_clip.load_model(path, str(config))
    assert_close(dict(loaded.model.state_dict()), expected, rtol=1e-4, atol=1e-4)
    del fine_tuned["itm_head.3.bias"]
    torch.save({"model": fine_tuned}, path)
    with pytest.raises(BadInput, match=r"x.th .*json: 1 weights are missing \(itm_head.3.bias\)$"):
        ce_clip.load_model(path, str(config))


def test_a_resized_table_by_hand():
    """Window 4 to 5, distances 1, q, q^2 with 1 + q + q^2 = 4, the new table's border. A spline
    through cubic polynomials that meet in an inner distance, not the outermost two, is these."""
    q = (math.sqrt(13) - 1) / 2
    x = tensor([-4, -1 - q, -1, 0, 1, 1 + q, 4], dtype=torch.double)
    new_x = torch.arange(-4, 5, dtype=torch.double)
    old, new = (x[:, None] ** 3 * x + (x - 1).clamp(0) ** 3 for x in (x, new_x))
    table, expected = (torch.stack([v, 2 * v.T], 2).flatten(0, 1) for v in (old, new))  # two heads
    assert_close(xvlm.resize_table(table, 81), expected, rtol=1e-4, atol=1e-3)


def test_tokens_and_transforms(config):
    """Tokens do not end with [SEP], images are squeezed, not cropped, no colour is augmented."""
    _, train_transform, eval_transform, tokenizer = xvlm.build(json.loads(config.read_text()))
    tokenizer.context_length = 8
    tokens = tokenizer(["A red dog chases", "", "cat? a " * 5]).tolist()
    assert tokens == [[2, 5, 6, 8, 11, 12, 0, 0], [2] + [0] * 7, [2, 9, 1, 5, 9, 1, 5, 9]]
    image = Image.linear_gradient("L").resize((50, 100)).convert("RGB")  # from black to white
    seen = eval_transform(image)
    assert seen.shape == train_transform(image).shape == (3, 32, 32)
    red = seen[0, [0, -1], 0] * 0.26862954 + 0.48145466  # CLIP's deviation and mean
    assert red.tolist() == pytest.approx([0, 1], abs=0.03)
    crop, flip, *augment, _, _ = train_transform.transforms[:6]
    assert (crop.scale, flip.p, [a.p for a in augment]) == ((0.5, 1), 0.5, [0.5, 0.5])
    space = augment[0].transforms[0]._augmentation_space(31, (32, 32))
    assert len(space) == 10 and not {"Color", "Invert", "Solarize", "Posterize"} & set(space)
    for name, size, signed in [("Rotate", 21, True), ("Brightness", 0.36, False)]:
        assert (space[name][0][7].item(), space[name][1]) == (pytest.approx(size), signed)


def test_sizes_and_configs_that_are_refused(config, tmp_path, monkeypatch):
    """CONFIG has 214M parameters, with the heads of the pre-training 216M (Table 1)."""
    with torch.device("meta"):
        model = xvlm.XVLM(xvlm.CONFIG)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 214
    new = xvlm.XVLM(CONFIG).text_encoder.encoder.layer[1].crossattention.self
    stds = [linear.weight.std().item() for linear in (new.key, new.value)]
    assert stds == pytest.approx([0.02, 0.02], rel=0.2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[PAD]", *WORDS[2:]]))
    mistakes = [
        ({"fusion_layer": 3}, "fusion_layer must be a layer of the BERT, and not the first"),
        ({"fusion_layer": 0}, "fusion_layer must be a layer of the BERT, and not the first"),
        ({"context_length": 40}, "context_length is above max_position_embeddings"),
        ({"bert": {**BERT, "vocab_size": 5}}, "more words than vocab_size, or its"),
        ({"tokenizer": "."}, r"or its \[PAD\] is not 0"),
        ({"tokenizer": "nowhere"}, "the tokenizer 'nowhere' is neither a folder with a vocab.txt"),
        ({"swin": {"depth": 3}}, "the config is not one of an X-VLM, see xvlm.CONFIG: TypeError"),
    ]
    for change, message in mistakes:
        with pytest.raises(BadInput, match=message):
            xvlm.build({**json.loads(config.read_text()), **change})


def test_runs(world, config, tmp_path):
    """With dropout, stochastic depth and drawn pairs the run that goes on after step 4 is the same.
    The loss of ITM is near chance, because its head is random; also the mean of two processes."""
    more = ["--model", config, "--save-every", 2, "--micro-batch", 3, "--workers", 1]
    log = train(world, tmp_path / "one", *more)
    for line in log:
        parts = line["itc"] + 0.2 * line["imc"] + 0.4 * line["cmr"] + line["itm"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    saved = tmp_path / "one" / "epoch_2.pt"
    weights = ce_clip.load_model(str(saved)).model.state_dict()
    saved.unlink()
    assert train(world, tmp_path / "one", *more, "--resume") == log
    assert_close(ce_clip.load_model(str(saved)).model.state_dict(), weights, rtol=0, atol=0)
    of_two = train(world, tmp_path / "two", *more[:2], "--grad-checkpointing", processes=2)
    for line in (log[0], of_two[0]):
        assert line["itm"] == pytest.approx(math.log(2), abs=0.4)


def test_grad_checkpointing_runs_each_block_twice_and_reaches_all_weights():
    model, runs = random_model().train(), []
    model.set_grad_checkpointing()
    for module in model.modules():
        if type(module).__name__ in ("SwinTransformerBlock", "BertIntermediate"):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    image, text, loss = model(IMAGES, TOKENS, torch.ones(3, 1, dtype=torch.bool))
    ((image * text).sum() * model.logit_scale + loss).backward()
    assert len(runs) == 2 * (5 + 3)
    for name, p in model.named_parameters():  # softmax does not see the bias of a key
        assert name.endswith("key.bias") or p.grad.abs().max() > 0, name


def test_the_evaluator_matches_as_single_pairs_do(world, config):
    """In batches, of an image with two pairs of captions, a region, and an absent image."""
    loaded = ce_clip.build_model(str(config))._replace(model=random_model())
    items = [eval_bench.Item("", ImagePart(world / "0.png"), "a red dog", "dog eats a cat")]
    items += [items[0]._replace(negative="a ball")]
    items += [items[0]._replace(image=ImagePart(world / "99.png"))]
    items += [items[0]._replace(image=ImagePart(world / "1.png", (5, 5, 20, 30)))]
    scorer, log = eval_bench.Scorer(loaded, 2), eval_bench.Log(blind=True)
    matches, real = {}, loaded.model.match_all
    loaded.model.match_all = lambda *inputs: matches.update(new := real(*inputs)) or new
    eval_bench.accuracies(scorer, items, log, itm=True)
    assert len(matches) == 3 + 3  # each with the captions of the other image, too
    for (part, text), logit in matches.items():
        image = loaded.eval_transform(open_image(*part))[None]
        expected = loaded.model.match(image, loaded.tokenizer([text])).item()
        assert logit == pytest.approx(expected, abs=1e-5)
    cosine = (scorer.images[items[0].image] @ scorer.texts["a red dog"]).item()
    logit = matches[items[0].image, "a red dog"]
    assert log.decisions[0]["scores"][0] == pytest.approx(cosine + logit)  # as ARO's code
    torch.nn.init.constant_(loaded.model.itm_head[3].bias, math.nan)
    with pytest.raises(BadInput, match="features that are not finite"):
        eval_bench.accuracies(eval_bench.Scorer(loaded), items, log, itm=True)
