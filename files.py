"""What people have on disk: captions files, images and weights; and a mistake in one line.

This file imports nothing of the project. None of it is the method of CE-CLIP: come back to it when
a file of yours is not read as you expect. docs/data.md shows what captions files look like.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import html
import json
import logging
import os
import re
import sys
import time
import zipfile
from array import array
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PosixPath
from typing import TextIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
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


def say(line: str) -> None:
    """A line for the user, which does not break the progress bar. It goes to stderr."""
    tqdm.write(line, file=sys.stderr)


@functools.cache
def say_once(line: str) -> None:
    say(line)


def finite(features: Tensor) -> Tensor:
    """The same, as float32 on the CPU. Raises BadInput."""
    if not features.isfinite().all():
        raise BadInput("features that are not finite: the checkpoint is broken")
    return features.float().cpu()


def counted(counts: Counter) -> str:
    """ "; left out: .json files 9, of other splits 3" from {reason: count}, or ""."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
    return f"; left out: {reasons}" if reasons else ""


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main(). An error ends in one line and exit code 1; --debug shows where.

    Under torchrun only the first process prints, unless --debug is given. The error of any process
    reaches torchrun, which prints it at the end of its report.
    """
    debug = "--debug" in sys.argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot print
    if debug:
        sys.argv.remove("--debug")
    else:
        logging.disable(logging.ERROR)  # what open_clip, transformers and the hub say besides
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        with one_line_errors("an unexpected error (--debug shows where)"):
            main()
    except BadInput as e:
        if debug:
            raise
        line = one_line(str(e))
        if "shared memory" in line:
            line += " (--workers 0 needs none; docker run --shm-size gives more)"
        line = f"{Path(sys.argv[0]).name}: error: {line}"
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun reads it
            report = {"message": line, "timestamp": int(time.time())}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))
        sys.exit(line)


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


# ---- Reading: an error names the line or the field -----------------------------------------------


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file in UTF-8. Raises BadInput with the number of the first line that is not."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as e:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:  # "\udc80" is a byte 80
            bad = [n for n, line in enumerate(file, 1) if re.search("[\udc80-\udcff]", line)]
        where = f"{path}, line {bad[0]}"
        raise BadInput(f"{where}: it is not UTF-8 (iconv -f LATIN1, or -f UTF-16)") from e


class Entry(dict):
    """A JSON object of a file. If it lacks a field, the error shows file, field and object."""

    def __init__(self, fields: dict, path: Path):
        super().__init__(fields)
        self.path = path

    def __missing__(self, field: str):
        raise BadInput(f"{self.path}: no field {field} in {json.dumps(self)[:200]}")


def read_json_list(path: Path) -> list:
    """The items of a benchmark's file: a JSON list, the values of a JSON object, or JSON lines."""
    new_entry = functools.partial(Entry, path=path)
    with one_line_errors(f"{path} is not a JSON list or object"), open_text(path) as file:
        if path.suffix == ".jsonl":
            return list(read_json_lines(file, new_entry))
        content = json.load(file, object_hook=new_entry)
        return list(content.values() if isinstance(content, dict) else content)


def read_json_lines(file: TextIO, new_object: Callable[[dict], dict] = dict) -> Iterator[dict]:
    for number, line in enumerate(file, 1):
        if line.strip():
            with one_line_errors(f"{file.name}, line {number}, is not JSON"):
                content = json.loads(line, object_hook=new_object)
            yield content


# ---- Captions files ------------------------------------------------------------------------------

IMAGE_KEYS = ("image", "filepath", "file_name", "image_name", "url")
CAPTION_KEYS = ("caption", "title", "text", "comment")
IMAGE_ENDINGS = ".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .avif".split()
IMAGE_OR_ADDRESS = re.compile("|".join(map(re.escape, IMAGE_ENDINGS)) + "|://", re.IGNORECASE)


def read_captions(path: Path, splits: Iterable[str] = ()) -> list[dict]:
    """[{"id", "image", "caption"}, ...] of a captions file or folder; a region also has a "box":
    left, top, right, bottom. docs/data.md shows the formats.

    splits  a selection of Karpathy's train, restval, val, test; without it all captions are read
    An "id" that the file does not give is a number that counts from 0. White space is folded and
    HTML's "&amp;" becomes "&", as in CLIP's tokenizer. COCO's captions are sorted by image, all
    others keep their order. What is left out is counted, and said in one line. Raises BadInput.
    """
    captions, left_out = [], Counter()
    number, with_line_break = 0, 0
    with one_line_errors(f"{path} is not a captions file (docs/data.md says what is read)"):
        for entry in read_entries(path):
            if "left_out" in entry:
                left_out[entry["left_out"]] += 1
                continue
            split = entry.pop("split", None)
            text = entry["caption"] if isinstance(entry["caption"], str) else ""
            line_break = "\n" in text.strip()
            text = " ".join(html.unescape(text).split())
            text = text.encode("utf-8", "replace").decode()  # half a surrogate pair becomes "?"
            if splits and split not in splits:
                left_out["of other splits"] += 1
            elif not text or entry["image"] in (None, ""):
                left_out["without a caption or an image"] += 1
            else:
                entry.update(image=str(entry["image"]), caption=text)
                captions.append({"id": number, **entry})
                with_line_break += line_break
            number += 1
    if not captions:
        of_splits = f" of split {' or '.join(splits)}" if splits else ""
        line = f"{path} holds no captions{of_splits}: docs/data.md says what is read"
        raise BadInput(line + counted(left_out))
    images = len({caption["image"] for caption in captions})
    line = f"{path}: captions {len(captions):,}, images {images:,}"
    if with_line_break:  # perhaps a quotation mark that is not closed
        line += f", of several lines {with_line_break:,}"
    say_once(line + counted(left_out))
    return captions


def read_entries(path: Path) -> Iterator[dict]:
    """A dict for each caption, or {"left_out": why} for what is not read."""
    kind = path.suffix.lower()
    if path.is_dir():
        yield from read_folder(path)
        return
    with open_text(path) as file:
        if kind in (".csv", ".tsv", ".txt", ".token"):
            yield from read_json(read_table(file, kind))
        elif kind == ".jsonl":
            yield from read_json(read_json_lines(file))
        else:
            text = file.read()
            with one_line_errors(f"{path} is not JSON (the ending of JSON lines is .jsonl)"):
                content = json.loads(text)
            yield from read_json(content)


def read_folder(path: Path) -> Iterator[dict]:
    """The images that have a .txt of the same name beside them. Links to folders are followed, but
    no folder is read twice, so that a circle of links ends."""

    def stop(error: OSError):
        raise error

    images, folders_read = [], set()
    for folder, subfolders, names in os.walk(path, onerror=stop, followlinks=True):
        subfolders.sort()
        if os.path.realpath(folder) in folders_read:
            subfolders.clear()
            yield {"left_out": "folders that were read already"}
            continue
        folders_read.add(os.path.realpath(folder))
        parts = [os.path.splitext(name) for name in names]
        texts = {stem for stem, ending in parts if ending == ".txt"}
        pictured = {stem for stem, ending in parts if ending.lower() in IMAGE_ENDINGS}
        for name, (stem, ending) in zip(names, parts):
            if name.startswith("."):
                yield {"left_out": "hidden files"}
            elif ending == ".txt" and stem not in pictured:
                yield {"left_out": ".txt without an image"}
            elif ending.lower() in IMAGE_ENDINGS and stem not in texts:
                yield {"left_out": "images without a .txt"}
            elif ending.lower() in IMAGE_ENDINGS:
                images.append(Path(folder, name))
            elif ending != ".txt":
                yield {"left_out": f"{ending or 'other'} files"}
    for image in sorted(images):
        with open_text(image.with_suffix(".txt")) as file:
            yield {"image": str(image.relative_to(path)), "caption": file.read()}


def read_table(file: TextIO, kind: str) -> Iterator[dict]:
    """The rows of a .csv, .tsv, .txt or .token, by the names in its header."""
    header = file.readline()
    file.seek(0)
    delimiter = "\t" if kind == ".tsv" else max(",;|\t", key=header.count)  # the commonest one
    names, quoting = None, csv.QUOTE_MINIMAL  # None: the header has them
    if delimiter == "|":  # Flickr30k's results.csv
        quoting = csv.QUOTE_NONE
    elif re.match(r"[^\t]+#\d\t", header):  # Flickr8k.token.txt: a.jpg#0<TAB>caption
        delimiter, names, quoting = "\t", ["image", "caption"], csv.QUOTE_NONE
    elif kind == ".tsv" and "://" in header:  # CC12M (address, caption) and CC3M have no header
        names = ["url", "caption"] if "://" in header.split()[0] else ["caption", "url"]
        quoting = csv.QUOTE_NONE
    options = {"delimiter": delimiter, "skipinitialspace": True, "quoting": quoting, "strict": True}
    rows = csv.reader(file, **options)
    line = 1  # where the row starts
    try:
        for fields in rows:
            if not names:
                names = [name.strip() for name in fields]
            elif fields:
                if delimiter == "|":  # a row of Flickr30k's results.csv lacks a bar and its caption
                    fields += [""] * (len(names) - len(fields))
                if len(fields) != len(names):
                    raise ValueError(f"line {line}: too many or few fields")
                for field in fields:
                    if "\n" in field and IMAGE_OR_ADDRESS.search(field):
                        raise ValueError(f"line {line}: a stray quotation mark swallows more lines")
                    if delimiter == "\t" and delimiter in field:
                        raise ValueError(f"line {line}: a stray quotation mark swallows a tab")
                row = dict(zip(names, fields))
                if names == ["image", "caption"]:
                    row["image"] = row["image"].partition("#")[0]
                yield row
            line = rows.line_num + 1
    except csv.Error as e:
        raise ValueError(f"line {line}: a stray quotation mark? ({e})") from e


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
    for caption in captions if isinstance(captions, list) else [captions]:
        yield {**kept, "image": image, "caption": caption}


def value_of_first(entry: dict, keys: tuple[str, ...]) -> str | list[str]:
    """The value of the first key that is there and has one; "" if all values are empty: null, [],
    or the NaN of pandas, which is not equal to itself."""
    values = [entry[key] for key in keys if key in entry]
    if not values:
        raise ValueError(f"none of {', '.join(keys)} is among {', '.join(entry)}")
    filled = [value for value in values if value not in (None, "", []) and value == value]
    return filled[0] if filled else ""


# ---- A file of negatives.py, and its images ------------------------------------------------------

# We trust the images, so Pillow's limits against attacks are lifted: that of the number of pixels,
# and those of the size of texts and colour profiles in a .png.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30


class Records(Dataset):
    """The lines of a file of negatives.py as (image path, box or None, [caption, negatives ...]),
    with "" for a missing negative. A line is read when it is asked for.

    Opening it reads all lines once (8 s for 1 million). Captions that are empty and regions that
    lie outside their image are left out; a region that lies partly outside is clipped when its
    image is opened. Both are counted, and said in one line. Raises BadInput.
    """

    def __init__(self, path: Path, images: Path, kinds: list[str], look_for_images: bool = True):
        self.path, self.images, self.kinds = path, images, kinds
        self.file = None  # each loader process opens it for itself
        self.starts = array("q")  # where the lines start: 9 million take 72 MB
        names, sizes, digest, start = set(), {}, hashlib.sha256(), 0
        left_out, clipped = Counter(), 0
        with one_line_errors(f"{path} cannot be read"), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                with one_line_errors(f"{path}, line {number}, is not a record of negatives.py"):
                    name, box, texts = self.parse(line)
                    part = None
                    if box:
                        if name not in sizes:
                            sizes[name] = image_size(images / name)
                        part = part_inside(box, sizes[name])
                if part and part != tuple(box):
                    clipped += 1
                if box and not part:
                    left_out["regions outside their image"] += 1
                elif not texts[0]:
                    left_out["without a caption"] += 1
                else:
                    names.add(name)
                    self.starts.append(start)
                start += len(line)
                digest.update(line)
        self.digest = digest.hexdigest()  # of the whole file
        if look_for_images:
            check_images(images, names)
        of_clipped = f", regions clipped to their image {clipped:,}" if clipped else ""
        say(f"{path}: captions {len(self):,}, images {len(names):,}{of_clipped}{counted(left_out)}")

    def parse(self, line: bytes) -> tuple[str, list | None, list[str]]:
        record = json.loads(line)
        texts = [(record["caption"] or "").strip()]
        texts += [record[kind] or "" for kind in self.kinds]
        return str(record["image"]), record.get("box"), texts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> tuple[Path, list | None, list[str]]:
        with one_line_errors(f"{self.path} has changed since it was opened"):
            self.file = self.file or self.path.open("rb")
            self.file.seek(self.starts[i])
            name, box, texts = self.parse(self.file.readline())
        return self.images / name, box, texts


def check_images(folder: Path, names: set[str]) -> None:
    """Raises BadInput if an image is missing, before hours of work. The folders are listed, because
    to look for each file takes long on a network disk."""
    listed, absent = {}, []  # folder -> the names in it
    for name in sorted(names):
        parent, file_name = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            with one_line_errors(f"{parent} cannot be listed"):
                entries = os.scandir(parent)
                listed[parent] = {e.name for e in entries if not e.is_symlink() or e.is_file()}
        if file_name not in listed[parent]:
            absent.append(Path(parent, file_name))
    for image in absent:
        if not image.exists():  # some disks list "ä" in other bytes than they are asked for
            raise BadInput(f"{image}: no such image ({len(absent)} are missing)")


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height, without decoding the image."""
    with one_line_errors(f"{path} is not an image"), Image.open(path) as image:
        return image.size


# What a model sees: an image, or the part of it in a box (left, top, right, bottom), in pixels. The
# parameters of open_image are explained there.
ImagePart = namedtuple("ImagePart", "path box black", defaults=(None, False))


def image_part(record: dict, folder: Path) -> ImagePart:
    box = tuple(record["box"]) if record.get("box") else None
    return ImagePart(folder / str(record["image"]), box)


def read_negatives(path: Path, folder: Path) -> list[tuple[str, ImagePart, str, str]]:
    """(kind, image, caption, negative) of a file of negatives.py. Every key that holds a text is a
    kind. As in training, what has no caption is left out, and counted in one line."""
    negatives, left_out = [], Counter()
    with one_line_errors(f"{path} is not a file of negatives.py"), open_text(path) as file:
        for record in read_json_lines(file):
            caption = (record["caption"] or "").strip()
            if not caption:
                left_out["without a caption"] += 1
                continue
            for kind, text in record.items():
                if isinstance(text, str) and kind not in ("id", "image", "caption"):
                    negatives.append((kind, image_part(record, folder), caption, text))
    say_once(f"{path}: negatives {len(negatives):,}{counted(left_out)}")
    return negatives


def is_there(path: Path, box: tuple | None = None, black: bool = False) -> bool:
    """Whether it is a file, and a part of the box lies in the image; with `black` none need to."""
    return path.is_file() and (not box or black or part_inside(box, image_size(path)) is not None)


def part_inside(box: tuple, size: tuple[int, int]) -> tuple | None:
    """The part of a box (left, top, right, bottom) that lies in an image of this size, or None."""
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[2], size[0]), min(box[3], size[1])
    return (left, top, right, bottom) if left < right and top < bottom else None


def open_image(
    path: Path, box: tuple | None = None, black: bool = False, draft: int = 0
) -> Image.Image:
    """An image in RGB, cropped to the part of `box` (left, top, right, bottom) that lies in it.
    With `black` it is cropped to the whole box, and is black where that lies outside (as in ARO).

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
        part = box if black else part_inside(box, image.size)
        if not part:
            raise ValueError(f"its size is {image.size}, the box {box} lies outside")
        return image.crop(part)


# ---- Weights: files of ours, and third-party ones ------------------------------------------------

# In a folder the first of these is read: two names of open_clip, then four of transformers.
WEIGHT_FILES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
WEIGHT_FILES += ["model.safetensors", "model.safetensors.index.json"]
WEIGHT_FILES += ["pytorch_model.bin", "pytorch_model.bin.index.json"]


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
        if not there and (path / "adapter_config.json").exists():
            raise ValueError(
                "it holds an adapter: merge it into its model first (merge_and_unload)"
            )
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
    if path.name.endswith(".index.json"):  # several files, and which one holds a weight
        content = {}
        for name in set(json.loads(path.read_text())["weight_map"].values()):
            content.update(read_weights(path.with_name(name)))
        return content
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
    from open_clip.model import resize_pos_embed  # here, because it takes seconds

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
    if "logit_bias" in state and getattr(model, "logit_bias", 0) is None:  # trained as a SigLIP
        model.logit_bias = nn.Parameter(torch.zeros_like(state["logit_bias"]))
    position = "visual.positional_embedding"
    if position in state:
        state[position] = state[position].float()
        size = state[position].shape
        resize_pos_embed(state, model)
        if state[position].shape != size:
            say("warning: weights of another image size: their position table is resized")
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


def read_transformers_config(folder: Path) -> tuple[dict, dict]:
    """The config of a CLIPModel that transformers saved in a folder, as open_clip writes it; and
    open_clip's image_mean, image_std ... Raises ValueError for what open_clip lacks."""
    from transformers import CLIPConfig, CLIPImageProcessor  # here, because it takes seconds

    theirs = CLIPConfig.from_pretrained(folder)
    towers = {"vision_cfg": theirs.vision_config, "text_cfg": theirs.text_config}
    activations = {tower.hidden_act for tower in towers.values()}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(f"its activations are {sorted(activations)}, not quick_gelu or gelu")
    config = {"embed_dim": theirs.projection_dim, "quick_gelu": activations == {"quick_gelu"}}
    for name, tower in towers.items():
        config[name] = {"width": tower.hidden_size, "layers": tower.num_hidden_layers}
        config[name]["mlp_ratio"] = tower.intermediate_size / tower.hidden_size
    vision, text = towers.values()
    config["vision_cfg"]["head_width"] = vision.hidden_size // vision.num_attention_heads
    config["vision_cfg"].update(image_size=vision.image_size, patch_size=vision.patch_size)
    config["text_cfg"]["heads"] = text.num_attention_heads
    config["text_cfg"]["context_length"] = text.max_position_embeddings
    config["text_cfg"]["vocab_size"] = text.vocab_size
    try:
        processor, _ = CLIPImageProcessor.get_image_processor_dict(folder)
    except OSError:
        say(f"warning: {folder} does not say its image transforms: those of OpenAI are assumed")
        return config, {}
    for step in ("do_normalize", "do_rescale", "do_resize"):
        if not processor.get(step, True):
            raise ValueError(f"it says {step}: false of its images, which open_clip always does")
    has_height = isinstance(processor.get("size"), dict) and "height" in processor["size"]
    return config, {
        "image_mean": processor["image_mean"],
        "image_std": processor["image_std"],
        "image_interpolation": {2: "bilinear", 3: "bicubic"}[processor.get("resample", 3)],
        "image_resize_mode": "squash" if has_height else "shortest",
    }


def save_checkpoint(path: Path, loaded, **state) -> None:
    """The file is whole or absent. It holds plain tensors and numbers, so weights_only=True loads
    it. If open_clip knows content["model"] with content["config"], it loads the file, too:
    create_model_and_transforms(content["model"], pretrained=path)."""
    from open_clip.model import get_model_preprocess_cfg  # here, because negatives.py needs none

    transform = get_model_preprocess_cfg(loaded.model)
    keys = [key for key in ("mean", "std", "interpolation", "resize_mode") if key in transform]
    content = {"model": loaded.name, "config": loaded.config}
    content["preprocess"] = {f"image_{key}": transform[key] for key in keys}
    content["state_dict"] = loaded.model.state_dict()
    with whole_file(path) as new:
        torch.save(content | state, new)


def newest_state(folder: Path, settings: dict, resume: bool) -> dict | None:
    """A run's checkpoint of the most steps, to resume from, or None. One that is damaged is passed
    over, and this is said. Raises BadInput if the run was begun with other settings, or if there
    are checkpoints that a new run would overwrite."""
    newest = None
    for path in folder.glob("*.pt") if resume else []:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if "settings" in state and (newest is None or state["step"] > newest["step"]):
                newest = state
        except Exception as e:
            say(f"{path} is damaged, passed over: {one_line(str(e))}")
    if newest:
        begun = newest["settings"]
        differ = [f"{key} {begun.get(key)}" for key in settings if begun.get(key) != settings[key]]
        if differ:
            raise BadInput(f"{folder} was begun with {', '.join(differ)}: resume with the same")
    elif any(folder.glob("*.pt")):
        if resume:
            raise BadInput(f"{folder} holds checkpoints, but none of ours: give another --out")
        raise BadInput(f"{folder} holds checkpoints: --resume a run of ours, or give another --out")
    return newest


def begin_run(folder: Path, settings: dict, log_size: int) -> None:
    """Make a run's folder, with its settings and its log, or open it again to resume the run. The
    log keeps its first `log_size` bytes: what follows was written after the saved state."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    log = folder / "log.jsonl"
    log.touch()
    if log.stat().st_size > log_size:
        os.truncate(log, log_size)
