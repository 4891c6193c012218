"""What people have on disk: captions files, images and weights; and a mistake in one line.

This file imports nothing of the project. None of it is the method of CE-CLIP: come back to it when
a file of yours is not read as you expect. docs/data.md shows what captions files look like.
"""

import argparse
import contextlib
import csv
import hashlib
import html
import json
import logging
import os
import re
import sys
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PosixPath
from typing import TextIO

import numpy as np
import torch
from open_clip.model import resize_pos_embed
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

# ---- A user's mistake in one line ----------------------------------------------------------------


class BadInput(Exception):
    """A user's mistake: one line that says what is wrong, where, and what to do."""


@contextlib.contextmanager
def one_line_errors(message: str):
    """Whatever goes wrong inside becomes BadInput: the message, a colon, and the reason.

    An error of the operating system that names its file becomes "file: reason".
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.filename and e.strerror:
            raise BadInput(f"{e.filename}: {e.strerror}") from e
        reason = str(e) if type(e) is ValueError else f"{type(e).__name__} {e}"
        raise BadInput(f"{message}: {one_line(reason)}") from e


def one_line(text: str) -> str:
    """The first 500 characters on one line. A loader process sends a whole traceback, of which the
    last line is the message."""
    if "Traceback" in text:
        text = text.splitlines()[-1].removeprefix("files.BadInput: ")
    return " ".join(text.split())[:500]


def at_least(low: float) -> Callable[[str], float]:
    """A type for argparse: a number that is not below `low`, and a whole one if `low` is whole."""
    kind = type(low)  # int or float

    def number(text: str) -> float:
        value = kind(text)
        if not value >= low:  # this way round, nan is refused too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return value

    number.__name__ = kind.__name__  # argparse prints it: "invalid int value: '1.5'"
    return number


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main(). An error ends in one line and exit code 1; --debug shows where."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    else:
        logging.disable(logging.WARNING)  # warnings of open_clip, transformers and the hub
    try:
        with one_line_errors("an unexpected error (--debug shows where)"):
            main()
    except BadInput as e:
        if debug:
            raise
        line = one_line(str(e))
        if "shared memory" in line:
            line += " (--workers 0 needs none; docker run --shm-size gives more)"
        sys.exit(f"{Path(sys.argv[0]).name}: error: {line}")


# ---- Writing: a file is whole or absent ----------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path that this gives; if nothing goes wrong, the file then gets its own name."""
    new = path.with_name(f"{path.name}.new")
    with one_line_errors(f"{path} cannot be written (is the disk full?)"):
        yield new
        os.replace(new, path)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_with_checksum(path: Path, text: str) -> None:
    """The first line of the file is the sha256 of the others."""
    with one_line_errors(f"{path} cannot be written"):
        path.write_text(f"{sha256(text)}\n{text}")


def read_with_checksum(path: Path) -> str | None:
    """The text; None if the file is absent, or is not what its checksum says."""
    if not path.exists():
        return None
    checksum, _, text = path.read_text(errors="replace").partition("\n")
    return text if checksum == sha256(text) else None


# ---- Captions files ------------------------------------------------------------------------------

IMAGE_KEYS = ("image", "filepath", "file_name", "image_name", "url")
CAPTION_KEYS = ("caption", "title", "text", "comment")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def read_captions(path: Path, splits: Iterable[str] = ()) -> list[dict]:
    """[{"id", "image", "caption"}, ...] of a captions file or folder; a region also has a "box":
    left, top, right, bottom. docs/data.md shows the formats.

    splits  a selection of Karpathy's train, restval, val, test; without it all captions are read
    An "id" that the file does not give is a number that counts from 0. White space is folded and
    HTML's "&amp;" becomes "&", as in CLIP's tokenizer. COCO's captions are sorted by image, all
    others keep their order. Raises BadInput.
    """
    captions = []
    with one_line_errors(f"{path} is not a captions file (docs/data.md says what is read)"):
        for number, entry in enumerate(read_entries(path)):
            split = entry.pop("split", None)
            if splits and split not in splits:
                continue
            text = " ".join(html.unescape(entry["caption"]).split())
            text = text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes "?"
            captions.append({"id": number, **entry, "caption": text})
    if not captions:
        of_splits = f" of split {' or '.join(splits)}" if splits else ""
        raise BadInput(f"{path} holds no captions{of_splits}: docs/data.md says what is read")
    return captions


def read_entries(path: Path) -> Iterator[dict]:
    kind = path.suffix.lower()
    if path.is_dir():
        yield from read_folder(path)
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            yield from read_json(read_table(file, kind))
        elif kind == ".jsonl":
            yield from read_json(json.loads(line) for line in file if line.strip())
        else:
            yield from read_json(json.load(file))


def read_folder(path: Path) -> Iterator[dict]:
    without_caption = 0
    for image in sorted(path.rglob("*")):
        if image.suffix.lower() not in IMAGE_ENDINGS or image.name.startswith("."):
            continue
        text = image.with_suffix(".txt")
        if text.exists():
            name = str(image.relative_to(path))
            yield {"image": name, "caption": text.read_text(encoding="utf-8-sig")}
        else:
            without_caption += 1
    if without_caption:
        tqdm.write(f"warning: {without_caption} images without a .txt in {path} are left out")


def read_table(file: TextIO, kind: str) -> Iterator[dict]:
    """The rows of a .csv or .tsv, by the names in its header."""
    header = file.readline()
    file.seek(0)
    delimiter = "\t" if kind == ".tsv" else max(",;|\t", key=header.count)  # the commonest one
    names, quoting = None, csv.QUOTE_MINIMAL  # None: the header has them
    if kind == ".tsv" and "://" in header:  # CC12M (address, caption) and CC3M have no header
        names = ["url", "caption"] if "://" in header.split()[0] else ["caption", "url"]
        quoting = csv.QUOTE_NONE
    rows = csv.DictReader(file, names, delimiter=delimiter, skipinitialspace=True, quoting=quoting)
    rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
    for row in rows:
        # DictReader puts surplus fields under None, and None for fields that are missing
        wrong_count = None in row or None in row.values()
        # a tab or a bar inside a field: a stray quotation mark has swallowed a delimiter
        quoted = delimiter in "\t|" and any(delimiter in (field or "") for field in row.values())
        if wrong_count or quoted:
            raise ValueError(f"line {rows.line_num}: too many or few fields, or a stray quote")
        yield row


def read_json(content: dict | Iterable[dict]) -> Iterator[dict]:
    if isinstance(content, dict) and "annotations" in content:  # COCO
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for a in sorted(content["annotations"], key=lambda a: a["image_id"]):
            yield {"id": a["id"], "image": names[a["image_id"]], "caption": a["caption"]}
    elif isinstance(content, dict):  # Karpathy
        for image in content["images"]:
            name = str(Path(image.get("filepath", ""), image["filename"]))
            for sentence in image["sentences"]:
                yield {"image": name, "caption": sentence["raw"], "split": image["split"]}
    else:
        for entry in content:
            if "regions" in entry:
                yield from read_regions(entry["regions"])
            else:
                yield from read_entry(entry)


def read_regions(regions: list[dict]) -> Iterator[dict]:
    """The captions of one image of Visual Genome: each describes a region of it."""
    for r in regions:
        box = [r["x"], r["y"], r["x"] + max(1, r["width"]), r["y"] + max(1, r["height"])]
        image = f"{r['image_id']}.jpg"
        yield {"id": r["region_id"], "image": image, "caption": r["phrase"], "box": box}


def read_entry(entry: dict) -> Iterator[dict]:
    image = value_of_first(entry, IMAGE_KEYS)
    captions = value_of_first(entry, CAPTION_KEYS)
    kept = {key: entry[key] for key in ("box", "split") if key in entry}
    for caption in [captions] if isinstance(captions, str) else captions:
        yield {**kept, "image": image, "caption": caption}


def value_of_first(entry: dict, keys: tuple[str, ...]) -> str | list[str]:
    """The value of the first key that is there and has one; "" if all values are empty."""
    values = [entry[key] for key in keys if key in entry]
    if not values:
        raise ValueError(f"none of {', '.join(keys)} is among {', '.join(entry)}")
    filled = [value for value in values if value]
    return filled[0] if filled else ""


# ---- A file of negatives.py, and its images ------------------------------------------------------


def index_records(path: Path) -> tuple[array, str, set[str]]:
    """The places where the lines start, and the end of the file (9 million lines take 72 MB); the
    file's sha256; the names of its images."""
    starts, digest, names = array("q", [0]), hashlib.sha256(), set()
    with one_line_errors(f"{path} cannot be read"), path.open("rb") as file:
        for line in file:
            with one_line_errors(f"{path}, line {len(starts)}, is not a record of negatives.py"):
                names.add(json.loads(line)["image"])
            digest.update(line)
            starts.append(starts[-1] + len(line))
    return starts, digest.hexdigest(), names


def check_images(folder: Path, names: set[str]) -> None:
    """Raises BadInput if an image is missing, before hours of work. The folders are listed, because
    to look for each file takes long on a network disk."""
    listed, absent = {}, []  # folder -> the names in it
    for name in sorted(names):
        parent, file_name = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            with one_line_errors(f"{parent} cannot be listed"):
                listed[parent] = set(os.listdir(parent))
        if file_name not in listed[parent]:
            absent.append(Path(parent, file_name))
    for image in absent:
        if not image.exists():  # some disks list "ä" in other bytes than they are asked for
            raise BadInput(f"{image}: no such image ({len(absent)} are missing)")


def open_image(path: str | Path, box: tuple | None = None, draft: int = 0) -> Image.Image:
    """An image in RGB, cropped to the part of `box` (left, top, right, bottom) that lies in it.

    To save time, a JPEG with sides of at least twice `draft` pixels is decoded at half its size or
    less. Raises BadInput if the file is not an image, or if the box lies outside.
    """
    with one_line_errors(f"{path} is not an image"), Image.open(path) as image:
        if draft and not box:
            image.draft("RGB", (draft, draft))
        if image.mode == "F":
            raise ValueError("its values have no known range: save it with 8 bits a channel")
        if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
            values = np.asarray(image)
            values = values // 256 if values.max() > 255 else values
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
        if not box:
            return image
        left, top = max(box[0], 0), max(box[1], 0)
        right, bottom = min(box[2], image.width), min(box[3], image.height)
        if not (left < right and top < bottom):
            raise ValueError(f"its size is {image.size}, the box {box} lies outside")
        return image.crop((left, top, right, bottom))


# ---- Weights: files of ours, and third-party ones ------------------------------------------------

# In a folder the first of these is read: two names of open_clip, then two of transformers.
WEIGHT_FILES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
WEIGHT_FILES += ["model.safetensors", "pytorch_model.bin"]


def as_dict(*default) -> dict:
    """Stands for a defaultdict, which torch does not fill."""
    return {}


# What may lie beside weights: settings, paths, counts, and numpy's numbers. None of it runs code.
SAFE_TYPES = [argparse.Namespace, PosixPath, (PosixPath, "pathlib.PosixPath")]  # and old names
SAFE_TYPES += [(as_dict, "collections.defaultdict"), list, dict, int, float, np.dtype]
SAFE_TYPES += [type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")]
NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # the function that makes a number of numpy
SAFE_TYPES += [NUMPY_SCALAR, (NUMPY_SCALAR, "numpy.core.multiarray.scalar")]  # numpy 1's name


def read_weights(path: Path) -> dict:
    """The content of a .safetensors file, of a file of torch of any age, or of one in a folder.

    A third-party file must not be able to run code, so only tensors and SAFE_TYPES are read.
    Raises ValueError.
    """
    if path.is_dir():
        there = [path / name for name in WEIGHT_FILES if (path / name).exists()]
        if not there:
            raise ValueError(f"it has none of {', '.join(WEIGHT_FILES)}: name a file")
        path = there[0]
    with path.open("rb") as file:
        start = file.read(99).lstrip()
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS: git lfs pull gets the file")
    if start.startswith(b"<"):
        raise ValueError("it is a web page: download the file itself")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            mmap = zipfile.is_zipfile(path)  # old versions of torch wrote no zip
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:
        reason = "torch cannot read it: damaged, or not a checkpoint"
        if "TorchScript" in str(e):
            reason = "it is a TorchScript archive: save torch.jit.load(FILE, 'cpu').state_dict()"
        elif unsafe := re.search(r"GLOBAL (\S+)", str(e)):
            reason = f"it holds {unsafe[1]}, which might run code: save model.state_dict() alone"
        raise ValueError(reason) from e
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a state dict")
    return content


def load_weights(model: nn.Module, content: dict) -> None:
    """Load the state dict that a file holds, bare or under one of four names. Prefixes that
    DistributedDataParallel and torch.compile leave are cut off. The names are open_clip's or
    transformers'. Raises an error if a weight is missing or unknown or has another size."""
    for key in ("state_dict", "model", "model_state_dict", "state_dict_ema"):
        if isinstance(content.get(key), dict):
            content = content[key]
    state = {}
    for name, value in content.items():
        name = re.sub(r"^((module|_orig_mod|model)\.)+", "", name)
        if name not in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's integers
            state[name] = value
    if "vision_model.post_layernorm.weight" in state:
        state = from_transformers(state)
    position = "visual.positional_embedding"
    if position in state:
        state[position] = state[position].float()
        size = state[position].shape
        resize_pos_embed(state, model)
        if state[position].shape != size:
            tqdm.write("warning: weights of another image size: their position table is resized")
    missing, unknown = model.load_state_dict(state, strict=False)
    faults = []
    if missing:
        faults.append(f"{len(missing)} weights are missing ({', '.join(missing[:3])})")
    if unknown:
        faults.append(f"{len(unknown)} weights are unknown ({', '.join(unknown[:3])})")
    if faults:
        raise ValueError(", ".join(faults))


OPEN_CLIP_NAMES = {  # a part of a name in transformers' CLIPModel: the same in open_clip
    "text_model.": "",
    "vision_model.": "visual.",
    "embeddings.": "",
    "encoder.layers": "transformer.resblocks",
    "position_embedding.weight": "positional_embedding",
    "patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' CLIPModel in open_clip's names. open_clip has the matrices q,
    k and v as one, and its projections are transposed."""
    renamed = {}
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name or "position_ids" in name:
            continue
        if "q_proj" in name:
            value = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        if "projection" in name:
            value = value.T
        for theirs, ours in OPEN_CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def newest_state(folder: Path, settings: dict) -> dict | None:
    """A run's checkpoint of the most steps. One that is damaged is passed over, and this is said.
    Raises BadInput if the run was begun with other settings."""
    newest = None
    for path in folder.glob("*.pt"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if "settings" in state and (newest is None or state["step"] > newest["step"]):
                newest = state
        except Exception as e:
            tqdm.write(f"{path} is damaged, passed over: {one_line(str(e))}")
    if newest:
        begun = newest["settings"]
        differ = [f"{key} {begun.get(key)}" for key in settings if begun.get(key) != settings[key]]
        if differ:
            raise BadInput(f"{folder} was begun with {', '.join(differ)}: resume with the same")
    return newest
