"""xvlm.py: the model, X-VLM's checkpoints, and X-VLM through the trainer and the evaluator."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY, coco_captions
from PIL import Image
from test_eval import run as evaluate
from test_eval import save_json, save_picture
from test_train import run
from torch import tensor
from torch.nn.parallel import DistributedDataParallel

import ce_clip
import eval_bench
import xvlm
from ce_clip import BadInput

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "dog", "cat", "ball"]
WORDS += ["chase", "##s", "eats", "green", ".", "1", "2", "3"]
CONFIG = {
    "embed_dim": 8,
    "temperature": 0.07,
    "fusion_layer": 1,
    "context_length": 12,
    "swin": {
        # the stages have 8, 4 and 2 x 2 windows of 4: shifted, one alone, and smaller than that
        **{"img_size": 32, "window_size": 4, "embed_dim": 8},
        **{"depths": [2, 2, 1], "num_heads": [1, 2, 4]},
    },
    "bert": {
        **{"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16},
    },
}


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """tiny_xvlm.json, whose tokenizer is a folder with a vocabulary."""
    folder = tmp_path_factory.mktemp("xvlm")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    path = folder / "tiny_xvlm.json"
    path.write_text(json.dumps(CONFIG | {"tokenizer": str(folder)}))
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


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = tensor([[2, 5, 6, 8, 0, 0], [2, 5, 9, 11, 12, 10], [2, 14, 0, 0, 0, 0]])

# ---- The model: values that hold by construction -------------------------------------------------


def test_the_first_state_of_a_picture_is_the_mean_of_its_patches(model):
    states = model.image_states(IMAGES)
    assert states.shape == (3, 1 + (32 // 4 // 2 // 2) ** 2, 8 * 2 * 2)
    torch.testing.assert_close(states[:, 0], states[:, 1:].mean(1))
    torch.testing.assert_close(
        states[:, 1:].std(-1).mean(), tensor(1.0), rtol=0.5, atol=0
    )  # normed
    feature = F.normalize(states[:, 0] @ model.vision_proj.weight.T + model.vision_proj.bias, dim=1)
    for images in (IMAGES, states):
        torch.testing.assert_close(model.encode_image(images, normalize=True), feature)


def test_padding_is_no_word(model):
    expected = model.encode_text(TOKENS, normalize=True)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    longer = F.pad(TOKENS, (0, 6))
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
    text, image = model.encode_text(TOKENS), model.encode_image(IMAGES)
    match = model.match(IMAGES, TOKENS)
    assert not torch.allclose(match, model.match(IMAGES.flip(0), TOKENS), atol=1e-3)
    layers = model.text_encoder.encoder.layer
    assert [hasattr(layer, "crossattention") for layer in layers] == [False, True, True]
    for last in (layers[2], layers[1]):
        torch.nn.init.normal_(last.attention.self.value.weight)
        assert torch.equal(model.encode_text(TOKENS), text)
        assert not torch.allclose(model.match(IMAGES, TOKENS), match)
        match = model.match(IMAGES, TOKENS)
    torch.nn.init.normal_(layers[0].attention.self.value.weight)
    assert not torch.allclose(model.encode_text(TOKENS), text)
    assert torch.equal(model.encode_image(IMAGES), image)


def test_match_is_the_second_logit_of_each_caption_with_its_picture(model):
    states, (text, exists) = model.image_states(IMAGES), model.text_states(TOKENS)
    logits = model.itm_logits(states, text, exists)
    assert logits.shape == (3, 2)
    torch.testing.assert_close(model.match(IMAGES, TOKENS), logits[:, 1])
    which = tensor([1, 1, 0])
    expected = model.itm_logits(states[which], text, exists)[:, 1]
    torch.testing.assert_close(model.match(IMAGES, TOKENS, which), expected)
    torch.testing.assert_close(model.match(states, TOKENS, which), expected)


@pytest.mark.parametrize("generated", [False, True])
def test_matching_loss_of_two_pairs(model, generated):
    """With two pairs the other picture and the other caption are certain: a sum by hand."""
    exists = tensor([[True, False, True], [True, True, True]])
    tokens = torch.cat([TOKENS, TOKENS.flip(0)[:2] + (TOKENS.flip(0)[:2] > 4)])
    # rows: caption 0, negative 0b, caption 1, negatives 1a, 1b
    image, text, loss = model(IMAGES[:2], tokens, exists, generated)
    torch.testing.assert_close(image, model.encode_image(IMAGES[:2], normalize=True))
    torch.testing.assert_close(text, model.encode_text(tokens, normalize=True))
    #        picture, row of its caption, does it match
    pairs = [(0, 0, 1), (1, 2, 1), (1, 0, 0), (0, 2, 0), (0, 2, 0), (1, 0, 0)]
    pairs += [(0, 1, 0), (1, 3, 0), (1, 4, 0)] if generated else []
    terms = []
    for picture, row, match in pairs:
        states = model.image_states(IMAGES[picture : picture + 1])
        no, yes = model.itm_logits(states, *model.text_states(tokens[row : row + 1]))[0].tolist()
        terms.append(math.log(math.exp(no) + math.exp(yes)) - (yes if match else no))
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_hardest_of_the_batch_do_not_match(model, monkeypatch):
    """Pairs 0 and 1 are alike, 2 and 3 are alike: each is drawn for the other, never itself.

    Cosines 1 and 0 at a scale of 14.3: the softmax of the two others is e^-14.3 + 1e-5 each.
    """
    images, tokens, like = torch.cat([IMAGES, -IMAGES[:1]]), TOKENS[[0, 1, 2, 1]], [1, 0, 3, 2]
    tokens[3, 2] = 13
    states, text = model.image_states(images), model.text_states(tokens)[0]
    alike, seen = torch.eye(8)[[0, 0, 1, 1]], []
    monkeypatch.setattr(xvlm, "_feature", lambda *_, **__: alike)
    monkeypatch.setattr(model, "itm_logits", lambda *x: seen.append(x) or torch.zeros(len(x[0]), 2))
    *_, loss = model(images, tokens, torch.ones(4, 1, dtype=torch.bool))
    pictures, captions, exists = seen[0]
    torch.testing.assert_close(pictures, torch.cat([states, states[like], states]))
    torch.testing.assert_close(captions, torch.cat([text, text, text[like]]))
    assert exists.sum(1).tolist() == [4, 6, 2, 6, 4, 6, 2, 6, 6, 4, 6, 2]
    assert loss.item() == pytest.approx(math.log(2))


def test_the_draw_follows_the_similarity(model, monkeypatch):
    """Cosines of 0 with the first two and of 0.1 with the last: odds of 1 to e^1.43."""
    drawn, seen = [], []
    feature = {16: tensor([[0.0, 1], [0.0, 1], [0.1, 1]]), 32: tensor([[1.0, 0]] * 3)}
    monkeypatch.setattr(xvlm, "_feature", lambda p, *_, **__: feature[p.in_features])
    monkeypatch.setattr(
        model, "itm_logits", lambda i, t, e: seen.append(e) or torch.zeros(len(i), 2)
    )
    states, text = model.image_states(IMAGES), model.text_states(TOKENS)
    monkeypatch.setattr(model, "image_states", lambda _: states)
    monkeypatch.setattr(model, "text_states", lambda _: text)
    torch.manual_seed(0)
    for _ in range(300):
        model(IMAGES, TOKENS, torch.ones(3, 1, dtype=torch.bool))
        drawn.append(seen.pop()[6].sum().item())  # the other caption for the first picture
    share = drawn.count(2) / 300  # of the last caption, of two tokens
    assert set(drawn) == {2, 6}
    assert share == pytest.approx(1 / (1 + math.exp(-0.1 / 0.07)), abs=0.06)


def test_the_full_size_is_the_papers():
    """214M parameters, with the heads of the pre-training 216M (Table 1); and CONFIG's defaults."""
    with torch.device("meta"):
        model = xvlm.XVLM(xvlm.CONFIG)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 214
    bert = model.text_encoder.config
    assert (bert.vocab_size, bert.intermediate_size, bert.hidden_act) == (30522, 3072, "gelu")
    assert (bert.layer_norm_eps, bert.hidden_dropout_prob) == (1e-12, 0.1)
    assert model.vision_encoder.layers[3].blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    fresh = xvlm.XVLM(CONFIG).text_encoder.encoder.layer[1].crossattention.self.key.weight
    assert fresh.std().item() == pytest.approx(0.02, rel=0.2)


# ---- Checkpoints of X-VLM ------------------------------------------------------------------------


def pretrained_layout(model) -> dict:
    """The model's weights as X-VLM's pre-training leaves them."""
    state = xvlm.published(model.state_dict())
    found = {k.replace("text_encoder.", "text_encoder.bert."): v for k, v in state.items()}
    found["text_encoder.cls.predictions.bias"] = torch.zeros(len(WORDS))
    found["text_encoder.bert.embeddings.position_ids"] = torch.arange(16)[None]
    found["bbox_head.0.weight"] = torch.zeros(4, 16)
    found["vision_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    found["vision_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    return found


def test_names_of_x_vlm(model):
    """Spelled out: what X-VLM calls things, and where its Swin Transformer downsamples."""
    state, found = model.state_dict(), xvlm.published(model.state_dict())
    assert {
        "vision_encoder.layers.0.blocks.1.attn.relative_position_bias_table",
        "vision_encoder.layers.0.downsample.reduction.weight",
        "vision_encoder.layers.1.downsample.norm.bias",
        "vision_encoder.norm.weight",
        "text_encoder.embeddings.LayerNorm.weight",
        "text_encoder.encoder.layer.0.attention.self.query.weight",
        "text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "text_encoder.encoder.layer.2.crossattention.output.LayerNorm.bias",
        *("vision_proj.weight", "text_proj.bias", "temp"),
        *("itm_head.0.weight", "itm_head.1.bias", "itm_head.3.weight"),
    } <= set(found)
    assert not any("layers.2.downsample" in name or "logit_scale" in name for name in found)
    assert len(found) == len(state)
    assert found["temp"].item() == pytest.approx(0.07)
    ours = state["vision_encoder.layers.1.downsample.reduction.weight"]
    assert torch.equal(found["vision_encoder.layers.0.downsample.reduction.weight"], ours)


@pytest.mark.parametrize("layout", [xvlm.published, pretrained_layout])
def test_checkpoints_of_x_vlm_load(model, config, tmp_path, layout):
    layout = layout if layout is pretrained_layout else lambda m: xvlm.published(m.state_dict())
    state = {f"module.{name}": value for name, value in layout(model).items()}
    torch.save({"model": layout(model), "config": {"image_res": 32}}, tmp_path / "x.th")
    torch.save({"state_dict": state}, tmp_path / "y.th")
    for path in ("x.th", "y.th"):
        loaded = ce_clip.load_model(str(tmp_path / path), str(config)).model.eval()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value)
    torch.testing.assert_close(loaded.match(IMAGES, TOKENS), model.match(IMAGES, TOKENS))


def test_a_checkpoint_of_ours_is_bit_equal(config, tmp_path):
    loaded = ce_clip.build_model(str(config))
    ce_clip.save_checkpoint(tmp_path / "epoch_1.pt", loaded)
    again = ce_clip.load_model(str(tmp_path / "epoch_1.pt"))
    assert (again.name, again.config) == (loaded.name, loaded.config)
    assert str(again.eval_transform) == str(loaded.eval_transform)
    expected = loaded.model.eval().match(IMAGES, TOKENS)
    assert torch.equal(again.model.eval().match(IMAGES, TOKENS), expected)


def test_tables_of_another_window_are_resized_on_loading(model, config, tmp_path):
    """Weights of window 3; the last stage is smaller than the window and stays as it is."""
    state = xvlm.published(model.state_dict())
    tables = {name for name in state if name.endswith("relative_position_bias_table")}
    small = {name: torch.randn(25, state[name].shape[1]) for name in tables if ".2." not in name}
    torch.save({"model": state | small}, tmp_path / "x.th")
    loaded = ce_clip.load_model(str(tmp_path / "x.th"), str(config)).model
    found = xvlm.published(loaded.state_dict())
    assert len(tables) == 5
    for name in tables:
        expected = xvlm.resize_table(small[name], 49) if name in small else state[name]
        torch.testing.assert_close(found[name], expected)


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
    assert xvlm.resize_table(old, 49) is old
    # window 3 to 4: q stops at 1.5, so that 3 lies outside 2.5 and takes the value there
    grown = xvlm.resize_table(torch.randn(25, 1), 49).view(7, 7)
    assert grown.isfinite().all()
    straight = tensor([-2.5, -1, 0, 1, 2.5]).repeat(5).view(25, 1)
    expected = tensor([-2.5, -2, -1, 0, 1, 2, 2.5]).repeat(7, 1)
    resized = xvlm.resize_table(straight, 49).view(7, 7)
    torch.testing.assert_close(resized, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("itm_head.3.bias"), "is not a checkpoint of .*itm_head.3.bias"),
        (
            lambda s: s.update({"text_proj.weight": torch.zeros(3, 3)}),
            "is not a checkpoint of .*text_proj.weight",
        ),
    ],
)
def test_weights_of_something_else_are_refused(model, config, tmp_path, change, message):
    state = xvlm.published(model.state_dict())
    change(state)
    torch.save({"model": state}, tmp_path / "x.th")
    with pytest.raises(BadInput, match=message):
        ce_clip.load_model(str(tmp_path / "x.th"), str(config))


# ---- Captions and pictures -----------------------------------------------------------------------


def test_tokens_begin_with_cls_and_do_not_end_with_sep(config):
    tokenize = xvlm.Tokenizer(str(config.parent), 8)
    assert tokenize(["A red dog chases", "", "cat? a " * 5]).tolist() == [
        [2, 5, 6, 8, 11, 12, 0, 0],
        [2, 0, 0, 0, 0, 0, 0, 0],
        [2, 9, 1, 5, 9, 1, 5, 9],
    ]
    with pytest.raises(BadInput, match="no tokenizer 'nowhere', neither a folder nor"):
        xvlm.Tokenizer("nowhere", 8)


def test_pictures_are_squeezed_not_cropped(config):
    """The four corners are still there, at 384 x 384 whatever the shape was."""
    loaded = ce_clip.build_model(str(config))
    picture = Image.new("RGB", (100, 50))
    for x in (0, 90):
        for y in (0, 40):
            picture.paste((255, 0, 0), (x, y, x + 10, y + 10))
    seen = loaded.eval_transform(picture)
    assert seen.shape == (3, 32, 32)
    red = (1 - 0.48145466) / 0.26862954  # CLIP's mean and deviation
    assert seen[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist() == pytest.approx([red] * 4, abs=0.05)
    crop, flip, *augment, _, _ = loaded.train_transform.transforms[:6]
    assert (crop.scale, flip.p, [a.p for a in augment]) == ((0.5, 1), 0.5, [0.5, 0.5])
    for _ in range(20):
        assert loaded.train_transform(picture).shape == (3, 32, 32)


def test_augmentation_is_x_vlms_ten_operations():
    """Sizes at level 7 of 10; a colour caption stays true: no operation changes hue."""
    space = xvlm.RandAugment(1)._augmentation_space(31, (32, 32))
    assert len(space) == 10
    assert {k: (size[0].item(), signed) for k, (size, signed) in space.items()} == {
        **{"Identity": (0, False), "AutoContrast": (0, False), "Equalize": (0, False)},
        **{"Brightness": (pytest.approx(0.36), False), "Sharpness": (pytest.approx(0.36), False)},
        **{"ShearX": (pytest.approx(0.21), True), "ShearY": (pytest.approx(0.21), True)},
        **{"TranslateX": (7, True), "TranslateY": (7, True), "Rotate": (21, True)},
    }


# ---- Training and scoring ------------------------------------------------------------------------


def xvlm_options(world, config, out, *more):
    options = ["--data", world / "negatives.jsonl", "--images", world, "--model", config]
    options += ["--pretrained", "none", "--batch-size", 8, "--epochs", 2, "--workers", 0]
    return [*options, "--lr", 1e-3, "--out", out, *more]


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_recipe_is_the_default_of_the_model(monkeypatch, config, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "16m_base_model_state_step_199999.th").touch()

    def parse(*options):
        monkeypatch.setattr(sys, "argv", ["ce_clip.py", "--data", "coco", *map(str, options)])
        return vars(ce_clip.parse_args())

    clip, found = parse(), parse("--model", "xvlm")
    assert {k: v for k, v in found.items() if clip[k] != v} == {
        "model": "xvlm",
        "pretrained": "16m_base_model_state_step_199999.th",
        **{"batch_size": 64, "lr": 3e-5, "lr_mult": 2, "weight_decay": 0.01, "adam_eps": 1e-8},
        **{"warmup": 0.1, "schedule": "linear", "itm": True},
    }
    assert parse("--model", config)["itm"] is True
    assert parse("--model", "xvlm", "--no-itm", "--lr", 1e-5)["itm"] is False


def test_lr_warms_up_for_a_share_then_follows_a_line_to_zero():
    factors = [ce_clip.lr_factor(step, 0.2, 10, "linear") for step in range(11)]
    assert factors == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 0.5, 3 / 8, 2 / 8, 1 / 8, 0])


def test_projections_and_heads_learn_at_twice_the_rate(model):
    name = {id(p): n for n, p in model.named_parameters()}
    groups = ce_clip.parameter_groups(model, 0.01, 2.0)
    found = {(g["weight_decay"], g["lr_mult"]): {name[id(p)] for p in g["params"]} for g in groups}
    assert {key: len(names) for key, names in found.items()}.keys() == {
        *((0.0, 1.0), (0.01, 1.0), (0.0, 2.0), (0.01, 2.0))
    }
    assert sum(map(len, found.values())) == len(name)
    assert found[0.01, 2.0] == {f"{n}.weight" for n in ("vision_proj", "text_proj")} | {
        *("itm_head.0.weight", "itm_head.3.weight")
    }
    assert "logit_scale" in found[0.0, 2.0]
    assert not any("norm" in n.lower() or "bias" in n for n in found[0.01, 1.0])
    assert "vision_encoder.layers.0.blocks.0.attn.relative_position_bias_table" in found[0.0, 1.0]


def test_run_with_itm(world, config, tmp_path):
    done = run(*xvlm_options(world, config, tmp_path / "one", "--itm-negatives"))
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path / "one")
    for line in log:
        parts = line["itc"] + 0.2 * line["imc"] + 0.4 * line["cmr"] + line["itm"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert [line["lr"] for line in log] == pytest.approx([1e-3 * n / 6 for n in range(6, 0, -1)])
    assert log[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert log[0]["threshold_object"] == 0 != log[1]["threshold_object"]
    saved = torch.load(tmp_path / "one" / "step_00000006.pt", weights_only=True)
    rates = {g["lr_mult"]: g["lr"] for g in saved["optimizer"]["param_groups"]}
    assert rates == {1.0: pytest.approx(1e-3 / 6), 2.0: pytest.approx(2e-3 / 6)}
    moved = ce_clip.load_model(str(tmp_path / "one" / "epoch_2.pt")).model.state_dict()
    torch.manual_seed(42)
    fresh = ce_clip.build_model(str(config)).model.state_dict()
    still = {k for k, v in moved.items() if torch.equal(v, fresh[k])}
    assert still == set(), "every parameter learns: Eq. 8 and ITM reach all of the model"


def test_stopped_and_resumed_it_is_the_same_run(world, config, tmp_path):
    """With dropout, stochastic depth and drawn pairs."""
    options = "--save-every", 2
    for out in ("whole", "cut"):
        done = run(*xvlm_options(world, config, tmp_path / out, *options))
        assert done.returncode == 0, done.stderr
    for name in ("step_00000006.pt", "epoch_1.pt", "epoch_2.pt"):
        (tmp_path / "cut" / name).unlink()
    done = run(*xvlm_options(world, config, tmp_path / "cut", *options, "--resume"))
    assert done.returncode == 0, done.stderr
    whole, cut = (torch.load(tmp_path / out / "epoch_2.pt") for out in ("whole", "cut"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(cut["state_dict"][name], value), name
    logs = [[line | {"pairs_per_s": 0} for line in log_of(tmp_path / o)] for o in ("whole", "cut")]
    assert logs[0] == logs[1]


def batch_of_four() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    tokens = torch.randint(5, len(WORDS), (4, 5, 8), generator=generator)
    tokens[..., 0], tokens[1, 2, 4:] = 2, 0
    return [images, tokens, torch.rand(4, 4, generator=generator) < 0.7]


def step(encoder, features, valid) -> dict[str, torch.Tensor]:
    objective = ce_clip.Objective.parse(ce_clip.FULL, 0.2, 0.4)
    loss, terms, *_ = ce_clip.batch_loss(features, valid, torch.ones(4), objective)
    loss.backward()
    return {"itm": terms["itm"].detach()}


def one_of_two(rank: int, out: str) -> None:
    dist.init_process_group("gloo", f"file://{out}.init", rank=rank, world_size=2)
    model, rows = random_model(), slice(2 * rank, 2 * rank + 2)
    encoder = ce_clip.Encoder(model, itm=True, itm_negatives=True)
    encoder = DistributedDataParallel(encoder, find_unused_parameters=True)
    batch = [x[rows] for x in batch_of_four()]
    terms = step(encoder, encoder(*batch), batch[2])
    torch.save(terms | {name: p.grad for name, p in model.named_parameters()}, f"{out}.{rank}")
    dist.destroy_process_group()


def test_gradient_of_two_processes(tmp_path):
    """Eq. 8 on all four pairs, and the mean of the matching losses of the halves, which is logged:
    of two pairs each the draws are certain."""
    out = str(tmp_path / "gradients")
    torch.multiprocessing.spawn(one_of_two, (out,), nprocs=2)
    model = random_model()
    encoder, batch = ce_clip.Encoder(model, itm=True, itm_negatives=True), batch_of_four()
    halves = [encoder(*(x[rows] for x in batch)) for rows in (slice(2), slice(2, 4))]
    image, text = (torch.cat([half[n] for half in halves]) for n in (0, 1))
    itm = (halves[0][3] + halves[1][3]) / 2
    step(encoder, [image, text, halves[0][2], itm], batch[2])
    for rank in range(2):
        found = torch.load(f"{out}.{rank}")
        torch.testing.assert_close(found["itm"], itm.detach())
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_run_on_two_processes(world, config, tmp_path):
    done = run(*xvlm_options(world, config, tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path / "two")
    assert log[-1]["loss"] < log[0]["loss"]
    assert json.loads((tmp_path / "two" / "config.json").read_text())["itm"] is True


def test_the_flag_takes_the_generated_negatives_in():
    model, batch, losses = random_model(), [x[:2] for x in batch_of_four()], []
    exists = F.pad(batch[2], (1, 0), value=True)
    assert batch[2].any()
    for generated in (False, True):
        encoder = ce_clip.Encoder(model, itm=True, itm_negatives=generated)
        *_, loss = encoder(*batch)
        *_, expected = model(batch[0], batch[1][exists], exists, generated)
        torch.testing.assert_close(loss, expected)
        losses.append(loss.item())
    assert losses[0] != pytest.approx(losses[1])


def test_without_itm_the_fusion_layers_rest(world, config, tmp_path):
    done = run(*xvlm_options(world, config, tmp_path / "x", "--no-itm"))
    assert done.returncode == 0, done.stderr
    assert "itm" not in log_of(tmp_path / "x")[0]
    states = [torch.load(tmp_path / "x" / f"epoch_{n}.pt")["state_dict"] for n in (1, 2)]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert not any("crossattention" in name or "itm_head" in name for name in changed)
    assert "text_encoder.encoder.layer.0.output.dense.weight" in changed


def test_grad_checkpointing_has_the_same_gradient():
    """And each block of both towers runs twice."""
    exact = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = CONFIG | {"bert": CONFIG["bert"] | exact}
    config |= {"swin": CONFIG["swin"] | {"drop_path_rate": 0.0}}
    found = []
    for checkpointing in (False, True):
        model, batch, runs = random_model(config=config).train(), batch_of_four(), []
        if checkpointing:
            model.set_grad_checkpointing()
        for module in model.modules():
            if type(module).__name__ in ("SwinTransformerBlock", "BertIntermediate"):
                module.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        encoder = ce_clip.Encoder(model, itm=True, itm_negatives=True)
        torch.manual_seed(0)
        step(encoder, encoder(*batch), batch[2])
        assert len(runs) == (5 + 3) * (1 + checkpointing)
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_locked_image_tower_neither_learns_nor_drops(world, config, tmp_path):
    model = random_model().train()
    model.lock_image_tower(freeze_bn_stats=True)
    assert torch.equal(model.encode_image(IMAGES), model.encode_image(IMAGES))
    done = run(*xvlm_options(world, config, tmp_path / "x", "--lock-image"))
    assert done.returncode == 0, done.stderr
    states = [torch.load(tmp_path / "x" / f"epoch_{n}.pt")["state_dict"] for n in (1, 2)]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert not any(name.startswith("vision") for name in changed)
    assert {"itm_head.0.weight", "text_proj.weight", "logit_scale"} < changed


def test_scores_in_bf16_keep_the_head_exact(model):
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.match(IMAGES, TOKENS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--micro-batch", 2], "--micro-batch needs two equal passes"),
        (["--batch-size", 1], "--itm needs two pairs or more a process"),
        (["--no-itm", "--itm-negatives"], "--itm-negatives needs --itm"),
        (["--pretrained", "absent.th"], "absent.th is no file: X-VLM's weights are at https://git"),
        (["--lr", 1e9], "the loss is not finite"),
        (["--model", "tiny.json", "--itm"], "--itm, --itm-negatives and --lr-mult are X-VLM's"),
        (["--model", "tiny.json", "--lr-mult", 2], "--itm, --itm-negatives and --lr-mult are"),
        (["--model", "five.json"], "five.json is not a model config"),
        (["--model", "odd.json"], "the config is not one of an X-VLM, see xvlm.CONFIG: KeyError"),
    ],
)
def test_mistakes_are_one_line(world, config, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    for name, content in (("tiny", TINY), ("five", 5), ("odd", {"fusion_layer": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    done = run(*xvlm_options(world, config, tmp_path / "x", *more))
    assert done.returncode and message in done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fusion_layer": 3}, "fusion_layer must be one of the BERT's, not the first"),
        ({"fusion_layer": 0}, "fusion_layer must be one of the BERT's, not the first"),
        ({"context_length": 40}, "context_length is above max_position_embeddings"),
        ({"bert": CONFIG["bert"] | {"vocab_size": 5}}, "more words than vocab_size, or its"),
    ],
)
def test_a_config_that_would_go_wrong_late_is_refused(config, change, message):
    given = CONFIG | {"tokenizer": str(config.parent)} | change
    with pytest.raises(BadInput, match=message):
        ce_clip.build_model("small", config=given)


def test_a_padding_that_is_not_0_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[PAD]", *WORDS[2:]]) + "\n")
    with pytest.raises(BadInput, match=r"or its \[PAD\] is not 0"):
        ce_clip.build_model("odd", config=CONFIG | {"tokenizer": str(tmp_path)})


def test_a_run_begun_before_there_was_an_x_vlm_is_resumed(world, tmp_path):
    options = ["--data", world / "negatives.jsonl", "--images", world, "--pretrained", "none"]
    options += ["--model", world / "tiny.json", "--batch-size", 8, "--workers", 0, "--epochs", 1]
    options += ["--out", tmp_path / "x"]
    assert run(*options).returncode == 0
    path = tmp_path / "x" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ce_clip.RECIPE}))
    done = run(*options, "--resume")
    assert done.returncode == 0, done.stderr
    path.write_text(json.dumps(config | {"schedule": "linear"}))
    assert "begun with schedule linear, now cosine" in run(*options, "--resume").stderr


def test_scores_are_cosines_and_itm_logits_of_single_pairs(config, tmp_path):
    """Batches, a picture with several captions, one that is absent: each pair is its own."""
    torch.manual_seed(0)
    models = {"x": ce_clip.build_model(str(config))}
    models["x"] = models["x"]._replace(model=random_model())
    models["clip"] = ce_clip.build_model("tiny-beside", config=TINY)
    for n in range(3):
        save_picture(tmp_path / f"{n}.png", n)
    texts = ["a red dog", "a blue dog", "dog eats a cat", "cat eats a dog", "a ball", "ball . a"]
    items = [
        eval_bench.Item("", str(tmp_path / f"{n}.png"), box, texts[i], (texts[j], texts[k]))
        for n, i, j, k in ((0, 0, 1, 4), (3, 0, 1, 2), (1, 2, 3, 1), (2, 5, 0, 2), (0, 4, 5, 3))
        for box in ((None, (5, 5, 20, 30)) if n == 1 else (None,))
    ]
    arguments = SimpleNamespace(batch_size=2, workers=0, precision="fp32")
    features = eval_bench.Scorer(models, arguments).encode(items, items)
    x = models["x"]
    for itm in (False, True):
        found = features["x"].scores(items, itm)
        clip = [features["clip"].scores(items, which) for which in (itm, False)]
        torch.testing.assert_close(*clip, rtol=0, atol=0, equal_nan=True)
        for item, (positive, negative) in zip(items, found.tolist()):
            if "3.png" in item.image:
                assert math.isnan(positive)
                continue
            image = ce_clip.load_image(item.image, x.eval_transform, item.box)[None]
            scores = []
            for text in item.texts:
                tokens = x.tokenizer([text])
                one, two = x.model.encode_image(image, True), x.model.encode_text(tokens, True)
                scores.append((one @ two.T).item())
                scores[-1] += x.model.match(image, tokens).item() if itm else 0
            assert [positive, negative] == pytest.approx([scores[0], max(scores[1:])], abs=1e-5)


def test_aro_and_valse_are_scored_with_itm_the_others_by_cosine(
    config, tmp_path, monkeypatch, capsys
):
    """The same picture and captions in one file of VALSE and one of SugarCrepe."""
    torch.manual_seed(0)
    loaded = ce_clip.build_model(str(config))._replace(model=random_model())
    ce_clip.save_checkpoint(tmp_path / "epoch_1.pt", loaded)
    save_picture(tmp_path / "coco" / "val2017" / "000000000001.jpg")
    texts = {"caption": "a red dog", "foil": "a blue dog", "negative_caption": "a blue dog"}
    texts |= {"image_file": "000000000001.jpg", "filename": "000000000001.jpg"}
    entry = {"0": texts | {"mturk": {"caption": 3}}}
    save_json(tmp_path / "valse" / "plurals.json", entry)
    save_json(tmp_path / "sugarcrepe" / "add_att.json", entry)
    command = ["--ckpt", tmp_path / "epoch_1.pt", "--data-root", tmp_path, "--items"]
    scores, titles = {}, {}
    for score in ([], ["--score", "itc"], ["--score", "itc+itm"]):
        text = evaluate(monkeypatch, capsys, *command, "--out", tmp_path / "out", *score)
        lines = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
        found = {x["benchmark"]: x["scores"] for x in map(json.loads, lines)}
        scores[score[-1] if score else None] = found
        titles[score[-1] if score else None] = text.count("X-VLM by ITM logit + cosine")
    cosines, both = scores["itc"]["valse"], scores["itc+itm"]["valse"]
    assert cosines != both
    assert scores["itc"]["sugarcrepe"] == cosines and scores["itc+itm"]["sugarcrepe"] == both
    assert scores[None] == {"valse": both, "sugarcrepe": cosines}
    assert titles == {None: 1, "itc": 0, "itc+itm": 2}
    assert {key for key, b in eval_bench.BENCHMARKS.items() if b.itm} == {"aro", "valse"}


def test_wise_ft_and_retrieval_take_an_x_vlm(world, config, tmp_path, monkeypatch, capsys):
    """Retrieval is by cosine whatever --score says."""
    for seed in (0, 1):
        loaded = ce_clip.build_model(str(config))._replace(model=random_model(seed))
        ce_clip.save_checkpoint(tmp_path / f"{seed}.pt", loaded)
    captions = coco_captions(tmp_path / "captions.json", {f"{i}.png": ["a dog"] for i in range(3)})
    command = ["--ckpt", tmp_path / "1.pt", "--base", tmp_path / "0.pt", "--wise", 0.5]
    command += ["--pairs", world / "negatives.jsonl", "--captions", captions, "--images", world]
    text = evaluate(monkeypatch, capsys, *command, "--score", "itc+itm")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert "WiSE 0.5" in text
    assert ["by ITM logit + cosine" in t for t in titles if "Fig" not in t] == [True, False, False]


def test_scores_of_a_clip_are_not_said_to_be_by_itm(world, tmp_path, monkeypatch, capsys):
    ce_clip.save_checkpoint(tmp_path / "x.pt", ce_clip.build_model(str(world / "tiny.json")))
    save_picture(tmp_path / "coco" / "val2017" / "000000000001.jpg")
    entry = {"image_file": "000000000001.jpg", "caption": "a dog", "foil": "a cat"}
    save_json(tmp_path / "valse" / "plurals.json", {"0": entry | {"mturk": {"caption": 3}}})
    command = ["--ckpt", tmp_path / "x.pt", "--data-root", tmp_path]
    text = evaluate(monkeypatch, capsys, *command)
    assert "## VALSE (Table 1), %" in text and "ITM" not in text
    with pytest.raises(BadInput, match="--score is about X-VLM, and no model is one"):
        evaluate(monkeypatch, capsys, *command, "--score", "itc")


def test_broken_itm_weights_are_not_missing_pictures(world, config, tmp_path, monkeypatch, capsys):
    loaded = ce_clip.build_model(str(config))
    torch.nn.init.constant_(loaded.model.itm_head[3].bias, float("nan"))
    ce_clip.save_checkpoint(tmp_path / "x.pt", loaded)
    command = ["--ckpt", tmp_path / "x.pt", "--pairs", world / "negatives.jsonl", "--images", world]
    with pytest.raises(BadInput, match="features that are not finite: its weights are broken"):
        evaluate(monkeypatch, capsys, *command, "--score", "itc+itm")
