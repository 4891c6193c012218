"""What several test files need. Commands run from the repository root."""

import json
import os
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
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download, in another process
huggingface_hub.constants.HF_HUB_OFFLINE = True  # or here
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads but wait for each other
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
}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with tiny.json, 24 pictures and their negatives; every third kind is missing."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    lines = []
    for i in range(24):
        Image.effect_noise((40, 36), 20 + 5 * i).convert("RGB").save(folder / f"{i}.png")
        kinds = {
            k: None if (i + n) % 3 == 0 else f"{NEGATIVE[k]} {i}" for n, k in enumerate(NEGATIVE)
        }
        record = {"id": i, "image": f"{i}.png", "caption": f"a red dog chases a ball {i}", **kinds}
        lines.append(json.dumps(record))
    (folder / "negatives.jsonl").write_text("\n".join(lines) + "\n")
    return folder


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
