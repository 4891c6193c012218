"""What several test files need. Commands run from the repository root."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import ce_clip  # noqa: E402
import files  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download, in another process
huggingface_hub.constants.HF_HUB_OFFLINE = True  # or here
os.environ["OMP_NUM_THREADS"] = "1"  # in tiny models more threads only wait for each other
torch.set_num_threads(1)


TINY = {  # a ViT: no batch norm, so that nothing but the losses couples the pairs of a batch
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def coco_captions(path: Path, captions: dict[str, list[str]]) -> Path:
    """Write {file name: captions} as a COCO captions file."""
    images = [{"id": i, "file_name": name} for i, name in enumerate(captions)]
    texts = [(i, text) for i, name in enumerate(captions) for text in captions[name]]
    annotations = [
        {"id": 10 + n, "image_id": i, "caption": text} for n, (i, text) in enumerate(texts)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


NEGATIVE = {
    "relation": "a ball chases a red dog",
    "attribute": "a blue dog chases a ball",
    "action": "a red dog eats a ball",
    "object": "a red cat chases a ball",
    "number": "two red dogs chase a ball",
}


TEXT = TINY["text_cfg"] | {"context_length": 24}
POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
TIMM = {"timm_model_name": "mobilenetv2_035", "timm_pool": "avg", "timm_proj": "linear"}
MODELS = {  # what they have other than TINY
    "tiny": {},
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
    # its batch norms have an activation within, which open_clip's freezing loses
    "mobilenet": {"vision_cfg": TIMM | {"image_size": 32}},
    "not_causal": {"text_cfg": TINY["text_cfg"] | {"no_causal_mask": True}},
    "pool_last": {"text_cfg": TINY["text_cfg"] | {"pool_type": "last"}},
    "larger": {"vision_cfg": TINY["vision_cfg"] | {"image_size": 64}},
    "shorter": {"text_cfg": TEXT},
    "cut": {"text_cfg": TEXT | {"context_length": 5}},  # it reads "a red dog" of a caption
    "odd": {"text_cfg": {"heads": "x"}},
}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with configs of models, 24 images and their negatives, of which every third is
    missing; and what a user may name by mistake."""
    folder = tmp_path_factory.mktemp("world")
    for name, change in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(TINY | change))
    lines = []
    for i in range(24):
        Image.effect_noise((40, 36), 20 + 5 * i).convert("RGB").save(folder / f"{i}.png")
        record = {"id": i, "image": f"{i}.png", "caption": f"a red dog chases a ball {i}"}
        for n, kind in enumerate(NEGATIVE):
            record[kind] = None if (i + n) % 3 == 0 else f"{NEGATIVE[kind]} {i}"
        lines.append(json.dumps(record) + "\n")
    (folder / "negatives.jsonl").write_text("".join(lines))
    (folder / "empty.jsonl").touch()
    (folder / "bare.jsonl").write_text('{"image": "1.png"}')
    for name, content in {"open_clip": {"epoch": 1, "state_dict": {}}, "other": [1]}.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "epoch_1.pt")
    return folder


def model_of(world, name="tiny", seed=0):
    """The model of a .json in the world, with random weights."""
    torch.manual_seed(seed)
    return ce_clip.build_model(str(world / f"{name}.json"))


def flat(x):
    """Tensors as bytes, so that == compares them bit for bit."""
    if isinstance(x, dict):
        return {key: flat(value) for key, value in x.items()}
    return x.numpy().tobytes() if isinstance(x, torch.Tensor) else x


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ce_clip.py", *args])
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", output)
        try:
            files.run_main(ce_clip.main)
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


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory):
    """A RobertaForMaskedLM of a few thousand parameters with its own tokenizer, saved to disk."""
    folder = tmp_path_factory.mktemp("roberta")
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġa", "Ġred", "Ġblue", "Ġcat"]
    vocabulary += ["Ġdog", "Ġsees", "ing", "Ġ3", "Ġ", "s"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="Ġ")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder
