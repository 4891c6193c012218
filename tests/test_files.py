"""files.py: captions files, images and weights as people have them; a mistake in one line."""

import argparse
import io
import json
import logging
import math
import os
import re
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, TINY, flat, model_of
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch import tensor
from transformers import CLIPConfig, CLIPModel

import ce_clip
import files
import negatives
from files import BadInput, read_captions

# ---- A mistake in one line; a file that is whole or absent ---------------------------------------

LOADER = "Caught BadInput in DataLoader worker process 0.\nOriginal Traceback\n  File\nfiles."
UNEXPECTED = "an unexpected error (--debug shows where):"
MEMORY = "RuntimeError out of shared memory (--workers 0 needs none; docker run --sh"
ENDS = [
    (BadInput("c.json holds no captions"), "c.json holds no captions"),
    (OSError(28, "No space left", "a/b"), "a/b: No space left"),
    (BadInput(LOADER + "BadInput: a.png is not an image"), "a.png is not an image"),
    (KeyError("1\n 2" + 600 * "x"), f"{UNEXPECTED} KeyError '1\\n 2{200 * 'x'}"),
    (RuntimeError("out of shared memory"), f"{UNEXPECTED} {MEMORY}"),
]


@pytest.mark.parametrize(("error", "line"), ENDS)
def test_an_error_ends_in_one_line_and_debug_shows_the_rest(monkeypatch, caplog, error, line):
    def main():
        logging.warning("No pretrained weights loaded")  # as libraries do
        raise error

    logging.disable(logging.NOTSET)
    monkeypatch.setattr(sys, "argv", ["folder/x.py"])
    with pytest.raises(SystemExit, match=f"^x.py: error: {re.escape(line)}[^\n]*$"):
        files.run_main(main)
    assert caplog.text == ""
    sys.argv.append("--debug")
    with pytest.raises(BadInput) as debugged:
        files.run_main(main)
    assert error in (debugged.value, debugged.value.__cause__)
    assert sys.argv == ["folder/x.py"]


def test_a_file_is_whole_or_absent_and_a_checksum_tells_what_is_damaged(tmp_path):
    path = tmp_path / "a.txt"
    line = re.escape(f"{path} cannot be written (is the disk full?): RuntimeError pos 64")
    with pytest.raises(BadInput, match=f"^{line}$"), files.whole_file(path) as new:
        new.write_text("half")
        raise RuntimeError("pos\n64")
    with pytest.raises(BadInput, match="^a mistake$"), files.whole_file(path):
        raise BadInput("a mistake")
    assert not path.exists()
    assert files.read_with_checksum(path) is None
    with files.whole_file(path) as new:
        files.write_with_checksum(new, "ä\n\nb\n")
    assert list(tmp_path.iterdir()) == [path]
    assert files.read_with_checksum(path) == "ä\n\nb\n"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\n", whole.replace(b"b", b"c"), b"\xff", b""):
        path.write_bytes(damaged)
        assert files.read_with_checksum(path) is None


def test_requirements_bring_every_package_that_is_imported():
    """A package is listed, or a listed one requires it, directly or through another one."""
    text = (ROOT / "requirements.txt").read_text()
    brought = set()
    new = {re.split("[ ><]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    while new - brought:
        brought |= new
        needed = [line for name in new for line in metadata.requires(name) or []]
        new = {re.split("[^A-Za-z0-9_.-]", line)[0] for line in needed if "extra ==" not in line}
        new = {name.replace("_", "-").lower() for name in new} & {*installed()}
    brought = {name.replace("_", "-").lower() for name in brought}
    optional = {"matplotlib", "clip-benchmark", "scikit-learn"}
    packages = metadata.packages_distributions()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for module in re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE):
            names = {name.replace("_", "-").lower() for name in packages.get(module, [])}
            assert not names or names & (brought | optional), f"{path}: {module}"


def installed() -> list[str]:
    return [d.name.replace("_", "-").lower() for d in metadata.distributions()]


def test_a_stream_prints_what_it_can(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    files.run_main(lambda: print("caf\u00e9 \u2192"))
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9 \\u2192\n"


def test_of_several_processes_the_first_one_speaks(monkeypatch, tmp_path, capsys):
    def main():
        files.say("read")
        print("done")
        raise BadInput("a mistake")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank, spoken in [("1", ("done\n", "read\n")), ("0", ("done\n", "read\n")), ("1", ("", ""))]:
        monkeypatch.setenv("RANK", rank)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(sys, "stdout", sys.stdout)  # run_main changes both
            patch.setattr(sys, "stderr", sys.stderr)
            files.run_main(main)
        assert tuple(capsys.readouterr()) == spoken
        report = json.loads((tmp_path / "error.json").read_text())
        assert report["message"] == "x.py: error: a mistake"
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # only now it is torchrun's rank


def test_benchmark_files(tmp_path):
    for name, text in {
        "a.jsonl": '{"a": "\u2028"}\n\n{"a": 2}\n',
        "a.json": '{"x": {"a": 1}}',
    }.items():
        (tmp_path / name).write_text(text)
    assert [e["a"] for e in files.read_json_list(tmp_path / "a.jsonl")] == ["\u2028", 2]
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n\n{"a": 2')
    with pytest.raises(BadInput, match="^[^ ]*b.jsonl, line 3, is not JSON: JSONDecodeError "):
        files.read_json_list(tmp_path / "b.jsonl")
    [entry] = files.read_json_list(tmp_path / "a.json")
    with pytest.raises(BadInput, match='a.json: no field b in {"a": 1}$'):
        entry["b"]


# ---- Captions files ------------------------------------------------------------------------------

ONE = {"id": 0, "image": "a.jpg", "caption": "A dog, 'wet'"}  # below: &#39; is HTML for '
TWO = [ONE, {"id": 1, "image": "b.jpg", "caption": "two lines"}]
URLS = [
    {"id": 0, "image": "http://a/b.jpg", "caption": 'A "dog", wet, red'},
    {"id": 1, "image": "https://c", "caption": '"x'},
]
QUOTED = [ONE | {"caption": '"b'}, {"id": 1, "image": "c.jpg", "caption": 'd"'}]
NUMBERED = [{"id": 0, "image": "0", "caption": "x"}]
LIST = [{"image": "a.jpg", "caption": "A dog, 'wet'"}, {"image": "b.jpg", "caption": "two lines"}]
SEVERAL = [LIST[0] | {"caption": ["A dog, 'wet'", "half a pair: \ud83d"]}]
COCO = {"images": [{"id": 8, "file_name": "b.jpg"}, {"id": 7, "file_name": "a.jpg"}]}
COCO["annotations"] = [
    {"id": n, "image_id": i, "caption": "two lines"} for n, i in ((5, 8), (6, 7), (4, 8))
]
KARPATHY = [
    {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog, 'wet'", "sentid": 9}]},
    {"filepath": "c", "filename": "b.jpg", "split": "test", "sentences": [{"raw": "two lines"}]},
]
REGION = {"image_id": 3, "phrase": "the  clock", "x": 10, "y": 20, "width": 30, "height": 0}
REGIONS = [REGION | {"region_id": 7}, REGION | {"region_id": 8, "width": 0, "height": 5}]
OURS = ONE | {"id": 7, "box": [1, 2, 3, 4], "relation": "x", "missing": {}}
ONE_LINE = json.dumps(ONE)
WRONG = "is not a captions file .docs/data.md says what is read.: "
FILES = {  # name: content, and the captions or an error
    "open_clip.csv": ('filepath,title\na.jpg,"A dog, \'wet\'"\nb.jpg,"two\nlines"\n', TWO),
    "c.tsv": ("\ufeffcaption\turl\nA dog, 'wet'\ta.jpg\r\n\r\ntwo lines\tb.jpg\r\n", TWO),
    "tab.csv": ('image,caption\na.jpg,"A\tdog, &#39;wet\'"\n', [ONE]),
    "negclip.tsv": ("\ttitle\tfilepath\tneg\n0\tA dog, 'wet'\ta.jpg\t['x']\n", [ONE]),
    "spaces.csv": ("image , caption\na.jpg, \"A dog, 'wet'\"\n", [ONE]),
    "semicolons.CSV": ("image;caption\na.jpg;A dog, 'wet'\n", [ONE]),
    "results.csv": ("image_name| comment_number| comment\na.jpg| 0| A dog, 'wet'\n", [ONE]),
    "one_bar_less.csv": ("image|comment_number|comment\na.jpg|0|A dog, 'wet'\nb.jpg|4 x\n", [ONE]),
    "bars.csv": ('image|comment\na.jpg|"b\nc.jpg|d"\n', QUOTED),
    "captions.txt": ("image,caption\na.jpg,\"A dog, 'wet'\"\nb.jpg,two lines\n", TWO),
    "a.token.txt": ("a.jpg#0\tA dog, 'wet'\nb.jpg#1\ttwo lines\n", TWO),
    "quote.token": ('a.jpg#1\t"b\nc.jpg#0\td"\n', QUOTED),
    "results_20130124.token": ("a.jpg#0\tA dog, 'wet'\n", [ONE]),
    "null.jsonl": (json.dumps(ONE) + '\n{"image": "b.jpg", "caption": null}', [ONE]),
    "nan.json": ('[{"id": 5, "image": 0, "caption": "x"}, {"image": 1, "caption": NaN}]', NUMBERED),
    "no_text.jsonl": (
        ONE_LINE + '\n{"image": NaN, "caption": "x"}\n{"image": "y", "caption": []}',
        [ONE],
    ),
    "lines.json": (
        '{"image": "a"}\n{"image": "b"}\n',
        "not JSON .the ending of JSON lines is .jsonl",
    ),
    "nulls.json": (json.dumps([ONE | {"caption": ["A dog, 'wet'", None, " "]}]), [ONE]),
    "no_image.csv": ("image,caption\na.jpg,\"A dog, 'wet'\"\n,b\n", [ONE]),
    "empty.csv": ("image,filepath,caption,title\n,a.jpg,,\"A dog, 'wet'\"\n", [ONE]),
    "more.csv": ("image,caption,see http://x\na.jpg,\"A dog, 'wet'\",y\n", [ONE]),
    "tabs.csv": ("filepath\ttitle\na.jpg\tA dog, 'wet'\n", [ONE]),
    "cc3m.tsv": ('A "dog", wet, red\thttp://a/b.jpg\n"x\thttps://c\n', URLS),
    "cc12m.tsv": ('http://a/b.jpg\tA "dog", wet, red\nhttps://c\t"x\n', URLS),
    "karpathy.json": (" " + json.dumps(LIST, indent=2), TWO),
    "several.json": (json.dumps(SEVERAL), [ONE, ONE | {"id": 1, "caption": "half a pair: ?"}]),
    "dataset_coco.json": (json.dumps({"images": KARPATHY}), [ONE, TWO[1] | {"image": "c/b.jpg"}]),
    "coco.json": (  # the captions of an image come together, in their order
        json.dumps(COCO),
        [TWO[1] | {"id": 6, "image": "a.jpg"}, TWO[1] | {"id": 5}, TWO[1] | {"id": 4}],
    ),
    "ours.jsonl": (json.dumps(OURS) + "\n", [ONE | {"box": [1, 2, 3, 4]}]),
    "image_folder.jsonl": ('\ufeff{"file_name": "a.jpg", "text": "A dog, \'wet\'"}\n \n', [ONE]),
    "a.json": ('{"images": []}', "holds no captions: docs/data.md says what is read"),
    "b.json": ('{"images": [{"id": 3}]}', f"{WRONG}KeyError 'filename'"),
    "c.jsonl": ('{"image": "a", "caption": "a"}\n{', "line 2, is not JSON: JSONDecodeError"),
    "d.json": ('[{"caption": "b"}]', f"{WRONG}none of image, .*, url is among caption$"),
    "e.csv": ("image\na\n", f"{WRONG}none of caption, .* is among image$"),
    "f.json": ('[{"image": "a.jpg", "caption": [1]}]', "holds no captions.* an image 1$"),
    "g.csv": ("image,caption\na,b\nc,caf\udce9\n", "line 3: it is not UTF-8 .iconv"),
    "h.csv": ("image,caption\na,b\nc\n", "line 3: too many or few fields"),
    "i.csv": ("caption,image\na,b,c\n", "line 2: too many or few fields"),
    "i.txt": ("image,caption\na,b\nc,d,e\n", "line 3: too many or few fields"),
    # a quotation mark that is not closed, or is closed by one of a later row
    "j.csv": ('image,caption\na,b\nc.jpg,"d\ne,f\n', "line 3: a stray quotation mark"),
    "j.txt": ('image,caption\na.jpg,"b\nc.jpg,d"\n', "line 2: a stray quotation mark"),
    "k.tsv": (
        'caption\turl\n"a dog\tu1\na cat"\tu2\n',
        "line 2: a stray quotation mark swallows a tab",
    ),
    "m.csv": ('image,caption\na.jpg,"b\nb"\n\nc.jpg,"d\ne.JPG,f"\n', "line 5: a stray quotation"),
    "l.csv": ('caption,url\n"x",y\n"a,http://u\nb",http://v\n', "line 3: a stray quotation"),
}


LEFT_OUT = dict.fromkeys(("one_bar_less.csv", "null.jsonl", "no_image.csv", "nan.json"), 1)
LEFT_OUT |= {"nulls.json": 2, "no_text.jsonl": 2}


@pytest.mark.parametrize("name", FILES)
def test_captions_files(tmp_path, capsys, name):
    (content, expected), path = FILES[name], tmp_path / name
    path.write_text(content, "utf-8", "surrogateescape", newline="")
    if isinstance(expected, list):
        assert read_captions(path) == expected
        images = len({entry["image"] for entry in expected})
        left_out = f"; left out: without a caption or an image {LEFT_OUT.get(name)}"
        left_out = left_out if name in LEFT_OUT else ""
        lines = ", of several lines 1" if name == "open_clip.csv" else ""
        line = f"{path}: captions {len(expected)}, images {images}{lines}{left_out}\n"
        assert capsys.readouterr().err == line
        return
    with pytest.raises(BadInput, match=f"^{path}[ ,][^\n]*{expected}[^\n]*$"):
        read_captions(path)


def test_splits_and_boxes(tmp_path):
    path, listed = tmp_path / "dataset_coco.json", tmp_path / "list.json"
    path.write_text(json.dumps({"images": KARPATHY}))
    assert [c["caption"] for c in read_captions(path, ["test", "val"])] == ["two lines"]
    assert len(read_captions(path, ["test", "train"])) == 2
    none = "holds no captions of split restval or val: .* is read; left out: of other splits 2"
    with pytest.raises(BadInput, match=none):
        read_captions(path, ["restval", "val"])
    listed.write_text(json.dumps([LIST[0], LIST[1] | {"split": "test"}]))
    assert read_captions(listed, ["test"]) == TWO[1:]
    out = negatives.generate(path, tmp_path / "train.jsonl", "ngram", split=["train"])
    assert json.loads(out.read_text())["image"] == "a.jpg"
    path.write_text(json.dumps([{"id": 3, "regions": REGIONS}, {"id": 4, "regions": []}]))
    regions = read_captions(path)
    assert regions[0] | {"box": 0} == {"id": 7, "image": "3.jpg", "caption": "the clock", "box": 0}
    assert [region["box"] for region in regions] == [[10, 20, 40, 21], [10, 20, 11, 25]]
    out = negatives.generate(path, tmp_path / "regions.jsonl", "ngram")
    assert json.loads(out.read_text().splitlines()[1])["box"] == [10, 20, 11, 25]


def test_a_folder_as_img2dataset_leaves_it(tmp_path, capsys):
    """Links to folders are followed; a circle of links ends."""
    names = {"0/2.png": "a bus", "0/3.jpeg": "a  cat\n", "0/4.webp": "a tree", "0/5.GIF": "a film"}
    names |= {"1/7.JPG": "a dog", "1/a.b.avif": "a hat", "linked/9.tif": "a horse"}
    for folder in ("data/0", "data/1", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    data = tmp_path / "data"
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    for name, text in reversed((names | {"0/._3.jpg": "\0"}).items()):
        (data / name).touch()
        (data / name).with_suffix(".txt").write_text(text)
    (data / "1" / "8.txt").touch()
    for name in ("0/6.jpg", "0/3.json", "1/7.json", "readme"):
        (data / name).touch()
    captions = [(c["id"], c["image"], c["caption"]) for c in read_captions(data)]
    assert captions == [(n, k, " ".join(names[k].split())) for n, k in enumerate(names)]
    left_out = ".json files 2, .txt without an image 1, folders that were read already 1, "
    left_out += "hidden files 2, images without a .txt 1, other files 1"
    assert capsys.readouterr().err == f"{data}: captions 7, images 7; left out: {left_out}\n"
    (tmp_path / "2").mkdir()
    with pytest.raises(BadInput, match="2 holds no captions: docs/data.md says"):
        read_captions(tmp_path / "2")
    denied = Mock(side_effect=PermissionError(13, "Permission denied", "2"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput, match="^2: Permission"):
        patch.setattr(os, "scandir", denied)
        read_captions(data)


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_real_files():
    coco = SHARED / "coco" / "annotations"
    assert len(read_captions(coco / "captions_val2017.json")) == 25_014
    assert len(read_captions(coco / "coco_karpathy_test.json")) == 25_010
    assert len(read_captions(SHARED / "negclip" / "valid_neg_clip.tsv")) == 4_839


# ---- A file of negatives.py, and its images ------------------------------------------------------


def test_images_are_looked_for_before_training(tmp_path):
    names = {"a b.png", 'q"\\ä.png', "x/y/1.jpg", "x/y/2.jpg"}
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in names:
        (tmp_path / name).touch()
    files.check_images(tmp_path, names)
    for absent, message in [
        ({"x/3.jpg", "x/y/3.jpg", "ö.jpg"}, "x/3.jpg: no such image (3 are missing)"),
        ({"z/1.jpg"}, "z: No such file or directory"),
        ({'"ö.jpg'}, '"ö.jpg: no such image (1 are missing)'),
    ]:
        with pytest.raises(BadInput, match=f"^{re.escape(f'{tmp_path}/{message}')}$"):
            files.check_images(tmp_path, names | absent)
    (tmp_path / "x" / "link.jpg").symlink_to("nowhere")
    with pytest.raises(BadInput, match="x/link.jpg: no such image .1 are missing"):
        files.check_images(tmp_path, {"x/link.jpg"})
    with pytest.MonkeyPatch.context() as patch:  # a disk that spells names in its own way
        patch.setattr(os, "scandir", lambda _: [])
        files.check_images(tmp_path, names)


def test_regions_are_cropped_and_large_jpegs_decoded_at_a_fraction_of_their_size(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.putpixel((5, 3), (255, 0, 0))
    image.save(path := tmp_path / "a.png")
    region = files.open_image(path, [5, 3, 6, 4], draft=1)
    assert (region.size, region.getpixel((0, 0))) == ((1, 1), (255, 0, 0))
    nan, inf = math.nan, math.inf
    for box in [(8, 0, 9, 1), (0, -3, 4, 0), (nan, 0, 9, 9), (0, 0, 9, nan), (3, 3, 3, 4)]:
        outside = re.escape(f"its size is (8, 8), the box {box} lies outside")
        with pytest.raises(BadInput, match=f"^{path} is not an image: {outside}$"):
            files.open_image(path, box)
    sizes = {(-3, 2, 5, 99): (5, 6), (1.2, 0.9, 3.6, 4.4): (3, 3), (0, 5, inf, 9): (8, 3)}
    for box, size in sizes.items():
        assert files.open_image(path, box).size == size  # nothing black beyond the border
    assert files.part_inside((-1, -1, 99, 99), (40, 30)) == (0, 0, 40, 30)

    Image.new("L", (640, 480)).save(path := tmp_path / "a.jpg")
    sizes = [files.open_image(path, draft=draft).size for draft in (0, 224, 400)]
    assert sizes == [(640, 480), (320, 240), (640, 480)]
    assert files.open_image(path, (400, 0, 600, 400), draft=224).size == (200, 400)
    assert files.open_image(path).mode == "RGB"


def test_images_of_16_bits_are_scaled_to_8(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    deep = grey.astype(np.uint16) * 257
    for values, name, expected in [
        (deep, "a.png", grey),
        (deep, "a.tif", grey),
        (deep.astype(np.int32), "b.tif", grey),
        (grey.astype(np.int32), "c.tif", grey),  # 8 bits after all
        (np.array([[-9, 2560, 99_999]], np.int32), "d.tif", np.array([[0, 10, 255]])),
    ]:
        Image.fromarray(values).save(tmp_path / name)
        assert (np.asarray(files.open_image(tmp_path / name)) == expected[:, :, None]).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(BadInput, match="f.tif is not an image: its values have no known range"):
        files.open_image(tmp_path / "f.tif")


def test_pillows_limits_do_not_end_a_run(tmp_path):
    Image.new("1", (20_000, 10_000)).save(path := tmp_path / "large.png")
    assert files.image_size(path) == (20_000, 10_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a" * (2 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=text)
    assert files.open_image(path).size == (8, 8)


# ---- Weights -------------------------------------------------------------------------------------

BESIDE = {  # what people save beside the weights
    "config": {},
    "counts": defaultdict(list, loss=[0.5]),
    "optimizer": [np.float64(1e-6), np.float32(1), np.int64(2), np.bool_(True)],
    "args": argparse.Namespace(lr=1e-5, out=Path("/a/b"), betas=(0.9, 0.98)),
    "state_dict_ema": {},
}


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("layout", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
def test_checkpoints_of_the_field_load(world, tmp_path, capsys, layout, prefix):
    """As open_clip and CE-CLIP (state_dict, module.), NegCLIP (with the learning rate as a number
    of numpy), and others leave them. They do not say their activation."""
    path, name = tmp_path / "x.pt", str(world / "tiny.json")
    expected = model_of(world).model.state_dict()
    weights = {prefix + key: value for key, value in expected.items()}
    for saved in (weights, BESIDE | {layout: weights}):
        torch.save(saved, path)
        assert flat(ce_clip.load_model(str(path), name).model.state_dict()) == flat(expected)
        assert (
            f"warning: {path} is read as a {name}: its activation, image mean"
            in capsys.readouterr().err
        )
    read = files.read_weights(path) | {layout: {}}
    assert (BESIDE | {layout: {}}).items() <= read.items()


def test_safetensors_old_files_of_torch_and_what_openai_publishes(world, tmp_path):
    """OpenAI's state dicts have three integers among the weights, and half precision."""
    model = model_of(world).model.half().float()
    expected = flat(model.state_dict())
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    integers = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), tensor(77))
    torch.save(model.half().state_dict() | integers, tmp_path / "c.pt")
    for path in tmp_path.iterdir():
        loaded = ce_clip.load_model(str(path), str(world / "tiny.json"))
        assert flat(loaded.model.state_dict()) == expected


def features(loaded, image: Image.Image) -> torch.Tensor:
    """Of the image, through the transforms, and of a text."""
    with torch.no_grad():
        pixels, tokens = loaded.eval_transform(image)[None], loaded.tokenizer(["a red cat"])
        return torch.cat(loaded.model.eval()(pixels, tokens)[:2])


def test_a_folder_of_open_clip_brings_its_config(tmp_path, world):
    """Its activation, mean, deviation and resizing are not those of --model."""
    folder, image = tmp_path / "mine", Image.effect_noise((40, 30), 50).convert("RGB")
    pixels = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bilinear"}
    pixels["resize_mode"] = "squash"
    config = TINY | {"quick_gelu": False}
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="mine cannot be had from open_clip .*weights"):
        ce_clip.load_model(str(folder))
    source = ce_clip.build_model("x", None, config, {f"image_{k}": pixels[k] for k in pixels})
    torch.nn.init.normal_(source.model.visual.proj)
    save_file(source.model.state_dict(), folder / "open_clip_model.safetensors")
    loaded = ce_clip.load_model(str(folder), str(world / "tiny.json"))
    files.save_checkpoint(tmp_path / "ours.pt", loaded)
    for model in (loaded, ce_clip.load_model(str(tmp_path / "ours.pt"))):
        assert (model.name, model.config) == ("mine", config)
        assert torch.equal(features(model, image), features(source, image))


def test_names_of_the_hub(monkeypatch):
    built = []
    monkeypatch.setattr(ce_clip, "build_model", lambda *names: built.append(names))
    ce_clip.load_model("hf-hub:laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K")
    assert built == [("hf-hub:laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",)]


def save_transformers(folder: Path, activation: str) -> CLIPModel:
    vision = {"hidden_size": 32, "intermediate_size": 96, "image_size": 32, "patch_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_act": activation}
    text = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 24}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    text |= {"eos_token_id": 49407, "vocab_size": 49409}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    theirs = CLIPModel(config).eval()
    for name, weight in theirs.named_parameters():  # biases begin as 0
        torch.nn.init.normal_(weight, std=0.3 if "proj" in name else 1)
    theirs.save_pretrained(folder, max_shard_size="40KB")
    return theirs


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_clip_of_transformers(world, tmp_path, capsys, activation):
    """Its weights lie in several files; its sizes and its activation are in config.json."""
    theirs = save_transformers(tmp_path, activation)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "pytorch_model.bin").write_text("not read")
    loaded = ce_clip.load_model(str(tmp_path))
    warning = f"warning: {tmp_path} does not say its image transforms: those of OpenAI are assumed"
    assert f"{warning}\n" in capsys.readouterr().err
    images, tokens = torch.randn(2, 3, 32, 32), loaded.tokenizer(["a dog", "a red cat eats"])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images)
        image, text, scale = loaded.model.eval()(images, tokens)
    torch.testing.assert_close(image, expected.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, expected.text_embeds, atol=1e-5, rtol=1e-4)
    assert scale == theirs.logit_scale.exp()
    older = {"text_model.embeddings.position_ids": torch.arange(24)[None]}  # not a weight
    save_file(theirs.state_dict() | older, tmp_path / "model.safetensors")
    again = ce_clip.load_model(str(tmp_path))
    assert flat(again.model.state_dict()) == flat(loaded.model.state_dict())
    assert (again.config["quick_gelu"], again.name) == (activation == "quick_gelu", tmp_path.name)
    files.save_checkpoint(tmp_path / "ours.pt", again)
    assert ce_clip.load_model(str(tmp_path / "ours.pt")).config == again.config
    photo = Image.effect_noise((40, 30), 50).convert("RGB")
    sizes = [(32, 32), ({"shortest_edge": 32}, 32), ({"height": 32, "width": 32}, (32, 32))]
    for size, mode in sizes:  # the first is that of old files
        (tmp_path / "processor_config.json").unlink(missing_ok=True)
        name = "preprocessor_config.json"
        processor = {"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "resample": 2, "size": size}
        (tmp_path / name).write_text(json.dumps(processor))
        again = ce_clip.load_model(str(tmp_path))
        assert f"Resize(size={mode}, interpolation=bilinear" in str(again.eval_transform)
        assert "mean=[0.5, 0.5, 0.5], std=[0.4, 0.4, 0.4]" in str(again.eval_transform)
        (tmp_path / name).unlink()
        name = "processor_config.json"  # of transformers 5
        (tmp_path / name).write_text(json.dumps({"image_processor": processor}))
        assert str(ce_clip.load_model(str(tmp_path)).eval_transform) == str(again.eval_transform)
    assert capsys.readouterr().err.count("warning") == 1
    assert features(again, photo).isfinite().all()
    small = json.loads((tmp_path / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        del small[tower]["hidden_act"]  # transformers' default is quick_gelu
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert ce_clip.load_model(str(tmp_path)).config["quick_gelu"]
    mixed = {"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "quick_gelu"}}
    for config in (mixed, {"text_config": {"hidden_act": "relu"}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            BadInput, match=r"its activations are \['.*'\], not quick_gelu or gelu$"
        ):
            ce_clip.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")  # a ViT-B/32 of other sizes than the weights'
    with pytest.raises(BadInput, match="size mismatch for positional_embedding"):
        ce_clip.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(small))
    processor["do_normalize"] = False
    (tmp_path / name).write_text(json.dumps({"image_processor": processor}))
    with pytest.raises(BadInput, match="it says do_normalize: false of its images"):
        ce_clip.load_model(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / "adapter_config.json").write_text("{}")  # that was merged
    assert ce_clip.load_model(str(tmp_path))


def test_an_adapter_is_to_be_merged_first(world, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(BadInput, match="it holds an adapter: merge it into its model first"):
        ce_clip.load_model(str(tmp_path))


def test_a_clip_with_a_logit_bias(world, tmp_path):
    config = TINY | {"init_logit_bias": -10}
    theirs = open_clip.CLIP(**config)
    torch.save(theirs.state_dict(), tmp_path / "bias.pt")
    loaded = ce_clip.load_model(str(tmp_path / "bias.pt"), str(world / "tiny.json"))
    assert flat(loaded.model.state_dict()) == flat(theirs.state_dict())
    files.save_checkpoint(tmp_path / "ours.pt", loaded)
    again = ce_clip.load_model(str(tmp_path / "ours.pt"))
    assert again.model.logit_bias == -10
    tokens = again.tokenizer(["a dog", "a red cat eats"])
    expected = theirs.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ce_clip.encode_text(again.model, tokens), expected)


def test_weights_of_other_sizes(world, tmp_path, capsys):
    """Positions of images are resized, as by open_clip, and it is said; of texts they are not."""
    torch.save(model_of(world).model.half().state_dict(), path := tmp_path / "x.pt")
    loaded = ce_clip.load_model(str(path), str(world / "larger.json"))
    assert "warning: weights of another image size" in capsys.readouterr().err
    with pytest.raises(BadInput, match="size mismatch for positional_embedding"):
        ce_clip.load_model(str(path), str(world / "shorter.json"))
    torch.save(model_of(world).model.half().float().state_dict(), path)  # open_clip takes no half
    open_clip.add_model_config(world / "larger.json")
    theirs, *_ = open_clip.create_model_and_transforms("larger", pretrained=str(path))
    assert flat(loaded.model.state_dict()) == flat(theirs.state_dict())
    ce_clip.load_model(str(path), str(world / "tiny.json"))
    assert "another image size" not in capsys.readouterr().err


def save_code(path, mark):
    """What a pickle can do when it is loaded."""
    code = type("Code", (), {"__reduce__": lambda self: (Path.write_text, (mark, "it ran"))})()
    torch.save({"settings": {}, "step": 99, "code": code}, path)


BAD_WEIGHTS = {
    "it is empty": b"",
    "it is a web page: download the file itself": b"\n<!DOCTYPE html><html>Sign in</html>",
    "it is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid",
    "torch cannot read it: damaged, or not a checkpoint": b"PK\3\4",
    "it holds a list, not a state dict": [1],
    "37 weights are missing (positional_embedding, text_projection, visual.class_embedding), "
    "4 weights are unknown (a, b, c)": {"logit_scale": torch.ones(()), **dict.fromkeys("abcd", 1)},
}


@pytest.mark.filterwarnings("ignore")
def test_bad_checkpoints_are_one_line(world, tmp_path):
    path, mark = tmp_path / "x.pt", tmp_path / "mark"

    def reason():
        with pytest.raises(BadInput, match=f"^{path} is not a checkpoint of .*tiny.json: ") as e:
            ce_clip.load_model(str(path), str(world / "tiny.json"))
        return str(e.value).split("tiny.json: ")[1]

    for message, content in BAD_WEIGHTS.items():
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        assert reason().startswith(message)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    assert "it is a TorchScript archive: save torch.jit.load(FILE" in reason()
    save_code(path, mark)
    assert "which might run code: save model.state_dict() alone" in reason()
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have run


def test_the_newest_whole_state_of_a_run(tmp_path, capsys):
    for name, step in {"epoch_1": 3, "last": 5, "epoch_2": 4}.items():
        torch.save({"step": step, "settings": {"lr": 1}}, tmp_path / f"{name}.pt")
    torch.save({"step": 9}, tmp_path / "of_another_program.pt")
    save_code(tmp_path / "code.pt", tmp_path / "mark")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:300])
    (tmp_path / "empty.pt").touch()
    assert files.newest_state(tmp_path, {"lr": 1}, True)["step"] == 5
    torch.save({"step": 6, "settings": {"lr": 1}}, tmp_path / "epoch_1.pt")
    assert files.newest_state(tmp_path, {"lr": 1}, True)["step"] == 6
    assert not (tmp_path / "mark").exists()
    lines = capsys.readouterr().err.splitlines()
    damaged = {line.split(" is damaged, passed over: ")[0] for line in lines}
    assert damaged == {f"{tmp_path / name}.pt" for name in ("code", "cut", "empty")}
    with pytest.raises(
        BadInput, match="holds checkpoints: --resume a run of ours, or give another"
    ):
        files.newest_state(tmp_path, {"lr": 1}, False)
    assert files.newest_state(tmp_path / "new", {}, True) is None
