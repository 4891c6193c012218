"""What several test files need. Commands run from the repository root."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download


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
