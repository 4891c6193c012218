"""What several test files need. Commands run from the repository root."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download


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
