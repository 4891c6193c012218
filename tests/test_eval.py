"""eval_bench.py: metrics by hand, benchmarks on small files in the real formats, the command."""

import json
import sys
import tarfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import tensor
from torch.nn.functional import normalize

import ce_clip
import eval_bench
import files
from eval_bench import Cell, Item, Log, Scorer, mean
from files import ImagePart


def columns(benchmark: str) -> dict[str, str]:
    """{group: the first column of columns.csv in which it counts}."""
    column_of = {}
    for line in eval_bench.csv_lines("columns.csv", benchmark):
        for group in line["groups"].split():
            column_of.setdefault(group, line["column"])
    return column_of


SUBSETS, VALSE, VLC = columns("sugarcrepe"), columns("valse"), columns("vlc")


def at(root: Path, **more) -> Namespace:
    """The arguments of the command, for a benchmark's function."""
    return Namespace(data_root=root, vlc_rows=1000, **more)


def save(path: Path, content) -> Path:
    """An image (content: a number), text, or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, int):
        pixels = np.random.default_rng(content).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def by_hand(texts: dict, images: dict) -> Scorer:
    """A scorer without a model that knows these features; of images by their paths."""
    scorer = Scorer(ce_clip.Loaded(torch.nn.Module(), *[None] * 5))
    scorer.texts = {text: tensor(row).float() for text, row in texts.items()}
    scorer.tokens = defaultdict(lambda: torch.rand(9))  # no two texts have the same
    scorer.images = {ImagePart(Path(path)): tensor(row).float() for path, row in images.items()}
    return scorer


# ---- Metrics -------------------------------------------------------------------------------------


def test_a_tie_is_wrong_and_a_missing_image_is_counted():
    scorer, log = by_hand({"cat": [1, 0], "pet": [1, 0], "dog": [0.5, 1]}, {"a": [1, 0]}), Log()
    a, b = ImagePart(Path("a")), ImagePart(Path("b"))  # b: no image
    items = [Item("x", a, "cat", "dog"), Item("x", b, "cat", "dog"), Item("y", a, "dog", "cat")]
    items += [Item("tie", a, "cat", "pet"), Item("tie", a, "cat", "dog"), Item("z", b, "cat", "")]
    groups = eval_bench.accuracies(scorer, items, log)
    expected = {"x": Cell(100, 1, 2), "y": Cell(0, 1, 1), "tie": Cell(50, 2, 2, 1)}
    assert groups == expected | {"z": Cell(None, 0, 1)}
    assert list(log.absent) == ["a", "b"]  # there are no files in this test
    assert groups["of a file that is absent"] == Cell(None, 0, 0)
    decisions = [(d["group"], d["scores"], d["right"], d["similarity"]) for d in log.decisions]
    right, wrong = ([1, 0.5], True, 0.5), ([0.5, 1], False, 0.5)
    assert decisions == [("x", *right), ("y", *wrong), ("tie", [1, 1], False, 1), ("tie", *right)]
    line = eval_bench.score_item(scorer, items[2], matches := {(a, "cat"): 0.25, (a, "dog"): 2.0})
    matches[a, "pet"] = 0
    assert (line["scores"], line["right"], line["gap"]) == ([2.5, 1.25], True, -0.5)
    scorer.model.match = True  # an X-VLM
    scorer.model.match_all = lambda scorer, texts_of: matches
    values = [eval_bench.accuracies(scorer, items, log, itm)["y"].value for itm in (False, True)]
    assert values == [0, 100]
    torch.manual_seed(0)  # the same text twice is a tie, in whatever order a product is summed
    texts = {str(n): row for n, row in enumerate(torch.rand(99, 512).tolist())}
    texts |= {f"{n} again": row for n, row in texts.items()}
    scorer = by_hand(texts, {"a": torch.rand(512).tolist()})
    items = [Item("x", a, str(n), f"{n} again") for n in range(99)]
    assert eval_bench.accuracies(scorer, items, log)["x"] == Cell(0, 99, 99, 99)
    # texts of the same tokens are wrong, however their scores were rounded, and counted apart
    scorer = by_hand({"long": [1, 0], "longer": [0.9, 0], "pet": [1, 0]}, {"a": [1, 0]})
    scorer.tokens["longer"] = scorer.tokens["long"]
    items = [Item("x", a, "long", "longer"), Item("x", a, "long", "pet")]
    assert eval_bench.accuracies(scorer, items, log)["x"] == Cell(0, 2, 2, 1, same_tokens=1)
    assert "| same tokens, b | 1 " in eval_bench.report(
        "aro", {"b": {"x": Cell(0, 2, same_tokens=1)}}, None, []
    )


def test_an_item_needs_two_texts():
    items = [Item("x", ImagePart(Path("a")), None, "dog")]
    with pytest.raises(files.BadInput, match="^x: not two texts: None, dog$"):
        eval_bench.accuracies(by_hand({}, {}), items, Log())


def test_blind_accuracy_and_looking_by_hand():
    """Leads of cat over dog: 0.8 for image a, -0.7 for b."""
    texts = {"cat": [1, 0], "pet": [1, 0], "dog": [0, 1]}
    scorer = by_hand(texts, {"a": [1, 0.2], "b": [0.3, 1]})
    a, b = ImagePart(Path("a")), ImagePart(Path("b"))
    part_of_a = ImagePart(Path("a"), (0, 0, 1, 1))
    items = [Item("right", a, "cat", "dog")] * 2 + [Item("wrong", b, "cat", "dog")]
    items += [Item("absent", ImagePart(Path("c")), "cat", "dog"), Item("tie", a, "cat", "pet")]
    items += [Item("both", b, "dog", "cat"), Item("both", b, "cat", "dog")]
    groups = eval_bench.accuracies(scorer, items, log := Log(blind=True))
    assert groups["right"] == Cell(100, 2, 2, 0, blind=0, looking=100)
    assert groups["wrong"] == Cell(0, 1, 1, 0, blind=100, looking=0)
    assert groups["tie"] == Cell(0, 1, 1, 1, blind=0, looking=50)
    assert groups["both"] == Cell(50, 2, 2, 0, blind=50, looking=50)
    assert groups["absent"] == Cell(None, 0, 1)
    notes = [(line["blind"], line["looking"]) for line in log.decisions]
    assert notes == [(False, 1), (False, 1), (True, 0), (False, 0.5), (False, 1), (True, 0)]
    table = eval_bench.report("pairs", {"it": groups}, None, []).splitlines()
    gains = next(line for line in table if "it, grounded gain" in line).split("|")[2:-1]
    assert [gain.strip() for gain in gains] == ["+100.0", "-100.0", "", "+0.0", "+0.0"]
    scorer.images[part_of_a] = scorer.images[a]
    items = [Item("x", a, "cat", "dog"), Item("x", part_of_a, "cat", "dog")]
    assert eval_bench.accuracies(scorer, items, log)["x"] == Cell(100, 2, 2)  # no other image


def test_other_images_are_a_derangement(monkeypatch):
    for counts in ([1, 1], [9] * 11, [5, 1, 1, 3], [10, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3]):
        paths = [str(path) for path, count in enumerate(counts) for _ in range(count)]
        items = [
            Item("", ImagePart(Path(p), (0, 0, 1, i)), str(i), "") for i, p in enumerate(paths)
        ]
        others = eval_bench.with_other_images(items)
        assert others == eval_bench.with_other_images(items)
        for item, other in zip(items, others, strict=True):
            assert item.image.path != other.image.path and item[2:] == other[2:]
        assert {item.image for item in items} == {other.image for other in others}
    said = []
    monkeypatch.setattr(files, "say_once", said.append)
    assert eval_bench.with_other_images(items[2:]) == eval_bench.with_other_images([]) == []
    assert said == ["no blind accuracy where one image has more than half of the items"]


def test_looking_is_beside_an_image_that_is_as_close_to_both_texts():
    """The sum of cat and dog is (1, 1): a has 1.2 of it, another part of a 1.2, b 0.7, c 1.1."""
    a, b, c = (ImagePart(Path(name)) for name in "abc")
    part = ImagePart(Path("a"), (0, 0, 1, 1))
    scorer = by_hand(
        {"cat": [1, 0], "dog": [0, 1]}, {"a": [1, 0.2], "b": [0.7, 0], "c": [0.5, 0.6]}
    )
    scorer.images[part] = torch.tensor([0.2, 1])
    items = [Item("x", image, "cat", "dog") for image in (a, b, c, part)]
    like = eval_bench.with_like_images(scorer, items)
    assert [item.image for item in like] == [c, c, a, c]
    assert [item[2:] for item in like] == [("cat", "dog")] * 4
    # leads: a .8, b .7, c -.1, the part -.8
    groups = eval_bench.accuracies(scorer, items, log := Log(blind=True))
    assert [line["looking"] for line in log.decisions] == [1, 1, 0, 0]
    assert groups["x"].looking == 50
    assert [line["other_scores"] for line in log.decisions] == [
        line["scores"]
        for line in eval_bench.score_items(scorer, eval_bench.with_other_images(items), Log())
    ]
    assert eval_bench.with_like_images(scorer, [items[0], items[3]]) == []


def test_a_like_image_counts_less_of_a_model_that_fades_its_negatives():
    """Here a negative is its caption at half the length, so every lead is half of the cosine with
    the caption. With any other image such a model would look in nearly all items. With a like one
    it is not at 50 %: these images are so close to their captions that few others come as close."""
    torch.manual_seed(0)
    shown = torch.randn(200, 16)
    texts = {f"caption {n}": row.tolist() for n, row in enumerate(shown)}
    texts |= {f"negative {n}": (row / 2).tolist() for n, row in enumerate(shown)}
    images = {str(n): row.tolist() for n, row in enumerate(shown + torch.randn(200, 16))}
    items = [
        Item("x", ImagePart(Path(str(n))), f"caption {n}", f"negative {n}") for n in range(200)
    ]
    groups = eval_bench.accuracies(by_hand(texts, images), items, log := Log(blind=True))
    any_other = 0
    for line in log.decisions:
        lead, other_lead = (pair[0] - pair[1] for pair in (line["scores"], line["other_scores"]))
        any_other += lead > other_lead
    assert any_other > 190 and 50 < groups["x"].looking < 80


def test_means():
    a, b, c, partial = Cell(50, 2, 2, 1), Cell(75, 4, 4), Cell(0, 4, 4, 2), Cell(80, 4, 5)
    assert mean([a, b, c]) == Cell(pytest.approx(125 / 3), 10, 10, 3)
    assert mean([partial]) == partial  # one file shows what there is of it, an average does not
    assert mean([a, partial]) == Cell(None, 6, 7, 1)
    assert (mean([a, Cell()]), mean([])) == (Cell(None, 2, 2, 1), Cell())
    assert mean([Cell(50, 2, 2, 0, 10, 70), Cell(0, 1, 1, 0, 30, 80)]) == Cell(25, 3, 3, 0, 20, 75)
    assert [str(cell) for cell in (a, mean([a, partial]), Cell())] == ["50.0", "partial", ""]


def test_sugarcrepe_pp_by_hand(tmp_path):
    """TOT: first needs a-b above a-n and b-n; ITT: the image closer to a and to b than to n."""
    texts = {"a": [1, 0, 0], "b": [0.9, 0.1, 0], "n": [0, 1, 0]}
    texts |= {"a2": [0, 0, 1], "n2": [0.5, 0, 0.5], "n3": [0.85, 2, 0]}
    folder = tmp_path / "coco" / "val2017"
    scorer = by_hand(texts, {folder / "1.jpg": [1, 0.5, 0], folder / "2.jpg": [0, 1, 0]})
    item = {"caption": "a", "caption2": "b", "negative_caption": "n", "filename": "1.jpg"}
    tie, itt_wrong = item | {"negative_caption": "b"}, item | {"filename": "2.jpg"}
    tot_wrong = item | {"filename": "3.jpg", "caption2": "a2", "negative_caption": "n2"}
    tot_wrong_for_b = item | {"filename": "3.jpg", "negative_caption": "n3"}
    for subset in ("replace_att", "replace_rel", "swap_att", "swap_obj"):
        save(tmp_path / "sugarcrepe_pp" / f"{subset}.json", [item, tie])
    entries = [item, itt_wrong, tie, tot_wrong, tot_wrong_for_b]
    save(tmp_path / "sugarcrepe_pp" / "replace_obj.json", entries)
    asked = set()
    scorer.encode = lambda images, texts: asked.update(texts)
    cells = eval_bench.sugarcrepe_pp(scorer, at(tmp_path), log := Log())
    assert {"a2", "n2"} < asked  # although the image is absent
    assert len(log.decisions) == 2 * (3 + 4 * 2) + (5 + 4 * 2)
    last = {"group": "TOT swap_att", "image": None, "positive": "a", "second": "b", "negative": "b"}
    last |= {"scores": pytest.approx([0.9, 0.9]), "right": False, "tie": True}
    assert log.decisions[-1] == last | {"same_tokens": False}
    assert cells["TOT replace_obj"] == Cell(40, 5, 5, 1)
    assert cells["ITT replace_obj"] == Cell(pytest.approx(100 / 3), 3, 5, same_tokens=1)
    assert cells["TOT replace"].value == pytest.approx((40 + 50 + 50) / 3)
    assert (cells["ITT swap"], cells["ITT replace"]) == (
        Cell(50, 4, 4, same_tokens=2),
        Cell(None, 7, 9, same_tokens=3),
    )
    for images, blind in (([0, 1, 0], 0), ([1, 0.5, 0], 100)):
        scorer.images[ImagePart(folder / "2.jpg")] = tensor(images).float()
        save(tmp_path / "sugarcrepe_pp" / "replace_obj.json", [item, item | {"filename": "2.jpg"}])
        blinded = eval_bench.sugarcrepe_pp(scorer, at(tmp_path), Log(blind=True))["ITT replace_obj"]
        assert (blinded.value, blinded.blind) == (50 + blind / 2, 50 + blind / 2)


def test_two_images_by_hand(tmp_path):
    images = {"p": [1, 0.2], "q": [0.1, 1], "strong": [3, 2], "weak": [0.9, 1], "even": [1, 1]}
    folder = tmp_path / "vismin" / "images"
    paths = {save(folder / f"{name}.png", ""): row for name, row in images.items()}
    scorer = by_hand({"c0": [1, 0], "c1": [0, 1]}, paths)
    # p, q: all right; strong, weak: text right, but c1 is closer to strong; even: a tie of texts
    pairs = [("p", "q"), ("strong", "weak.png"), ("p", "even"), ("even", "q"), ("p", "absent")]
    lines = [{"image_0": a, "image_1": b, "caption_0": "c0", "caption_1": "c1"} for a, b in pairs]
    lines[0]["group"] = lines[1]["group"] = "object"
    lines[4]["group"] = 0  # its images are absent
    save(tmp_path / "vismin" / "examples.jsonl", "\n".join(map(json.dumps, lines)))
    cells = eval_bench.two_images(scorer, at(tmp_path), log := Log(), "vismin")
    expected = {"Text": Cell(50, 4, 5, 2), "Image": Cell(25, 4, 5, 2), "Group": Cell(25, 4, 5, 2)}
    expected |= {"GroupMatch": Cell(100, 4, 5), "object GroupMatch": Cell(100, 2, 2)}
    expected |= {"object Text": Cell(100, 2, 2), "object Image": Cell(50, 2, 2)}
    expected["object Group"] = Cell(50, 2, 2)
    absent = {f"0 {column}": Cell(None, 0, 1) for column in list(expected)[:4]}
    assert cells == expected | absent
    assert list(cells)[:5] == ["Text", "Image", "Group", "GroupMatch", "object Text"]
    assert len(log.decisions) == 8
    assert list(log.absent) == [str(folder / "absent.png")]
    for name in images:  # a model of the text alone: c0 is likelier than c1
        scorer.images[ImagePart(folder / f"{name}.png")] = tensor([1, 0.3])
    cells = eval_bench.two_images(scorer, at(tmp_path), Log(), "vismin")
    assert {cell.value for cell in cells.values() if cell.scored} == {0}
    scorer.tokens["c0"] = scorer.tokens["c1"] = tensor([1])  # the captions are cut to the same
    scorer.images[ImagePart(folder / "p.png")] = tensor([1, 0.2])
    scorer.images[ImagePart(folder / "q.png")] = tensor([0.1, 1])
    save(tmp_path / "vismin" / "examples.jsonl", json.dumps(lines[0] | {"group": None}))
    cells = eval_bench.two_images(scorer, at(tmp_path), Log(), "vismin")
    assert cells == dict.fromkeys(list(expected)[:4], Cell(0, 1, 1, same_tokens=1))


def test_whatsup_by_hand(tmp_path):
    """Of four captions the first must win; with --blind also against another image's scores."""
    texts = {"on": [1, 0, 0], "under": [0, 1, 0], "left": [0, 0, 1], "right": [0.2, 0.2, 0.2]}
    paths = [tmp_path / "whatsup" / "data" / "a" / f"{n}.jpg" for n in range(4)]
    rows = [[1, 0, 0], [0, 1, 0], [1, 0, 1], [0.1, 0, 1]]
    scorer = by_hand(texts, {save(path, ""): row for path, row in zip(paths, rows)})
    entries = []
    for n, first in enumerate(["on", "under", "on", "on"]):  # right, right, a tie, wrong
        options = [first, *(text for text in texts if text != first)]
        entries.append({"image_path": f"data/a/{n}.jpg", "caption_options": options})
    entries.append(entries[0] | {"image_path": "data/a/9.jpg"})  # absent
    save(tmp_path / "whatsup" / "data" / "controlled_images_dataset.json", entries)
    save(tmp_path / "whatsup" / "data" / "controlled_clevr_dataset.json", entries[:2])
    cells = eval_bench.whatsup(scorer, at(tmp_path), log := Log(blind=True))
    assert (cells["A"].value, cells["A"].scored, cells["A"].total) == (50, 4, 5)
    assert (cells["A"].ties, cells["B"].value, cells["Avg"].value) == (1, 100, None)
    assert (cells["B"].blind, cells["B"].looking) == (0, 100)  # each beside the other's image
    assert len(log.decisions) == 3 * (4 + 2)
    clevr = tmp_path / "whatsup" / "data" / "controlled_clevr_dataset.json"
    save(clevr, [entries[0], entries[3]])  # image 0 is right for both, image 3 for none
    assert eval_bench.whatsup(scorer, at(tmp_path), Log(blind=True))["B"].blind == 50
    entries[0]["caption_options"] = options[:3]
    save(tmp_path / "whatsup" / "data" / "controlled_images_dataset.json", entries)
    with pytest.raises(files.BadInput, match="dataset.json: an entry has 3 captions, not 4$"):
        eval_bench.whatsup(scorer, at(tmp_path), Log())


def test_aro_is_black_beyond_the_border(tmp_path):
    folder = tmp_path / "aro"
    entry = {"image_path": "1.jpg", "bbox_x": -5, "bbox_y": 90, "bbox_w": 20, "bbox_h": 9}
    entry |= {"true_caption": "a", "false_caption": "b", "relation_name": "on"}
    inside = entry | {"bbox_x": 30, "bbox_y": 20, "bbox_w": 40, "bbox_h": 40}
    save(folder / "visual_genome_relation.json", [entry, inside])
    path = save(folder / "images" / "1.jpg", 3)  # of 50 x 40 pixels
    boxes = [(-5, 90, 15, 99), (30, 20, 70, 60)]
    scorer = by_hand({"a": [1], "b": [0]}, {})
    scorer.images = {ImagePart(path, box, True): tensor([1.0]) for box in boxes}
    assert eval_bench.aro(scorer, at(tmp_path), Log())["Relation"] == Cell(100, 2, 2)
    wholly, partly = (np.asarray(files.open_image(path, box, black=True)) for box in boxes)
    assert (wholly.shape, wholly.max()) == ((9, 20, 3), 0)
    assert partly[20:].max() == partly[:, 20:].max() == 0 < partly[:20, :20].min(2).max()
    assert files.is_there(path, boxes[0], True) and not files.is_there(path, boxes[0])
    assert files.is_there(path, boxes[1]) and not files.is_there(tmp_path / "x.jpg", boxes[1], True)


def test_averages_are_defined_as_the_papers(place, monkeypatch):
    """What the paper prints follows from its columns, except for misprints."""

    matched = set()  # the benchmarks in which an X-VLM matches images and texts

    def averages(benchmark: str, cells: dict[str, Cell]) -> dict[str, Cell]:
        def accuracies(*_, itm=False):
            matched.update([benchmark] if itm else [])
            return cells

        monkeypatch.setattr(eval_bench, "accuracies", accuracies)
        return getattr(eval_bench, benchmark)(by_hand({}, {}), at(place / "data"), Log())

    off = {}
    for benchmark, column_of in {"valse": VALSE, "vlc": VLC, "sugarcrepe": SUBSETS}.items():
        for name, row in eval_bench.paper_rows(benchmark).items():
            cells = {file: Cell(row[column].value, 1, 1) for file, column in column_of.items()}
            averaged = averages(benchmark, cells)
            for column, cell in row.items():
                if abs(averaged[column].value - cell.value) > 0.11:
                    off[name, column] = round(averaged[column].value, 2), cell.value
    assert off.pop(("CLIP (paper)", "REPLACE")) == (80.03, 80.2)
    # of the files 70.35, of the columns 69.96
    assert off.pop(("CE-XVLM (paper)", "Avg 11 files")) == (70.35, 70.8)
    assert off == {("CLIP (paper)", "Avg"): (72.99, 73.1)}  # ADD's attribute is 68.8 elsewhere
    # center: vg 30, swig (60 + 0 + 0 + 0) / 4 = 15, hake 0; mid and margin: hake 90
    values = {"vg_obj": 20, "vg_subj": 40, "swig_agent": 60, "hake": 90}
    cells = {file: Cell(values.get(file.split("/")[-1], 0), 1, 1) for file in VLC}
    cells["Object/Location/center/hake"] = Cell(0, 1, 1)
    assert averages("vlc", cells)["Object location"].value == (15 + 45 + 45) / 3
    averages("aro", {})
    assert matched == {"aro", "valse"}


def test_tables():
    results = {"vlc": {"b": {"Avg": Cell(60, 1, 1), "Object": Cell(5, 1, 1)}}}
    results["vlc"]["c"] = {"Avg": Cell(62.5, 1, 1, 1), "Object": Cell(5, 1, 1)}
    results["pairs"] = {"b": {"mean": Cell(None, 1, 2)}, "c": {"mean": Cell(5, 2, 2)}}
    results["aro"] = {"b": {"Relation": Cell()}, "c": {"Relation": Cell()}}
    rows = eval_bench.table_5(results)
    assert list(rows["c"]) == ["vlc Avg", "pairs mean"]  # Object is none of it, aro is not scored
    text = eval_bench.report("table_5", rows, "b", [])
    assert "| b                | 60.0    | partial    |" in text
    assert "| c - b            | +2.5    |            |" in text and "b - b" not in text
    assert "c - " not in eval_bench.report("table_5", rows, None, [])
    assert "PARTIAL" not in text and "Absent" not in text
    assert "| scored/all       | 1/1     | 2/2        |" in text
    assert "| ties, c          | 1       |            |" in text and "ties, b" not in text
    text = eval_bench.report("vlc", results["vlc"], None, ["x", "y"])
    assert "% - PARTIAL\n" in text and text.endswith("\n\nAbsent: x; y")
    assert "PARTIAL" in eval_bench.report("pairs", {"b": {"mean": Cell(None, 1, 2)}}, None, [])
    assert "not scored. It has no items" in eval_bench.report("pairs", {"b": {}}, None, [])


def test_retrieval_by_hand(tmp_path):
    texts = {"a1": [9, 8, 0], "a2": [1, 2, 3], "b": [0, 5, 0], "c": [7, 0, 6]}
    images = {"A": [1, 0, 0], "B": [0, 1, 0], "C": [0, 0, 1], "D": [1, 1, 1]}
    scorer = by_hand(texts, {tmp_path / name: row for name, row in images.items()})
    for name in "ABC":
        save(tmp_path / name, "")

    def retrieval(*pairs: tuple[str, str]) -> list[Cell]:
        entries = [{"image": image, "caption": caption} for image, caption in pairs]
        path = save(tmp_path / "c.json", entries)
        args = at(tmp_path, captions=path, images=tmp_path, split=[])
        return list(eval_bench.retrieval(scorer, args, log).values())

    log = Log()

    pairs = [("A", "(A1)!"), ("A", "(A2)!"), ("B", "(B)!"), ("C", "(C)!")]
    # by caption: a1 9 before 8; a2 1 behind 2 and 3; b 5; c 6 behind 7        T2I R@1 = 2/4
    # by image:   A 9 before 7; B 5 behind 8; C 6 before 3                      I2T R@1 = 2/3
    values = [cell.value for cell in retrieval(*pairs)]
    assert values == pytest.approx([200 / 3, 100, 100, 50, 100, 100])
    scorer.texts["b"] = torch.ones(3)  # a tie of three
    assert retrieval(*pairs)[3].value == 25
    folder = tmp_path / "coco"  # --split is for --captions
    save(folder / "annotations" / "coco_karpathy_test.json", [{"image": "E", "caption": "b"}])
    save(folder / "E", "")
    scorer.images[ImagePart(folder / "E")] = torch.ones(3)
    of_coco = at(tmp_path, captions=None, images=None, split=["test"])
    assert eval_bench.retrieval(scorer, of_coco, log, of_coco=True)["I2T R@1"] == Cell(100, 1, 1)
    assert retrieval(*pairs, ("D", "b")) == []  # D is absent
    assert list(log.absent) == [str(tmp_path / "D")]
    scorer.texts |= dict.fromkeys(("a big dog rex", "b" + 29 * " b"), torch.ones(3))
    for caption in ('A (big) dog:  "Rex"! ', "B " * 40):  # as in ARO
        assert retrieval(("A", caption))[0] == Cell(100, 1, 1)


def test_map_11_point_by_hand():
    pytest.importorskip("sklearn")  # clip-benchmark brings it
    scores = tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6], [0.3, 0.2, 0.5], [0.4, 0.1, 0.5]])
    target = tensor([0, 1, 1, 0])
    # class 1: precision 1 at recall 1/2, 2/3 at recall 1 (.2 is a tie): 6 levels of 1, 5 of 2/3
    # class 0: 1/3 at recall 1/2, 1/2 at recall 1: level 0 is 1, 10 of 1/2; class 2: no image
    hits = torch.stack([target == 1, target == 1, target < 0], 1)
    expected = ((6 + 5 * 2 / 3) / 11 + (1 + 10 / 2) / 11) / 2
    assert eval_bench.map_11_point(scores, hits) == pytest.approx(expected)


# ---- Small checkpoints and small benchmark folders in the real formats ---------------------------

ADJECTIVES = ("red", "blue", "tall", "small", "wet", "old", "dark")
ONE, TWO = "tiny/epoch_1.pt", "other/epoch_1.pt"  # two sizes of images


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Two checkpoints, and data/ with all benchmarks except for the zero-shot sets."""
    folder = tmp_path_factory.mktemp("place")
    data = folder / "data"
    for n, name in enumerate(("tiny", "other")):
        torch.manual_seed(n)
        config = TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 32 + 16 * n}}
        (folder / name).mkdir()
        loaded = ce_clip.build_model(f"{name}-eval", config=config)
        files.save_checkpoint(folder / name / "epoch_1.pt", loaded)
    karpathy, items = [], {}
    for i, a in enumerate(ADJECTIVES):
        texts = [f"A {a} dog sits on a mat.", f"{a} cats and dogs"]
        karpathy.append({"image": f"val2014/{i}.jpg", "caption": texts})
        save(data / "coco" / "val2014" / f"{i}.jpg", i)
        save(data / "coco" / "val2017" / f"{i % 3}.jpg", i)
        entry = {"filename": f"{i % 3}.jpg", "caption": f"a {a} dog", "negative_caption": "a pig"}
        items[str(3 * i)] = entry  # keys are not contiguous in the real files either
    save(data / "coco" / "annotations" / "coco_karpathy_test.json", karpathy)
    for subset in SUBSETS:
        save(data / "sugarcrepe" / f"{subset}.json", items)
    images = ["swig/a_1.jpg", "coco/val2017/01.jpg", "visual7w/images/v7w_1.jpg"]
    images += ["coco/train2014/COCO_train2014_1.jpg", "coco/val2014/COCO_val2014_1.jpg"]
    images += ["visdial/VisualDialog_val2018/VisualDialog_1.jpg"]
    for n, name in enumerate(VALSE):
        image = save(data / images[n % 6], n)
        entry = {"caption": "two dogs", "foil": f"{name} dogs", "image_file": image.name}
        items = {n: entry | {"mturk": {"caption": n, "foil": 0, "other": 0}} for n in range(4)}
        save(data / "valse" / f"{name}.json", items)
    box = {"bbox_x": 5, "bbox_y": 3, "bbox_w": 30, "bbox_h": 20, "image_path": "7.jpg"}
    box |= {"true_caption": "the dog is on the mat", "false_caption": "the mat is on the dog"}
    relations = [box | {"relation_name": name} for name in ("on", "on", "under", "near")]
    pairs = [["red", "big"]] * 25 + [["big", "red"]] * 24
    save(data / "aro" / "visual_genome_relation.json", relations)
    save(data / "aro" / "visual_genome_attribution.json", [box | {"attributes": p} for p in pairs])
    save(data / "aro" / "images" / "7.jpg", 0)
    for file in VLC:
        config = f'ANNO_PATH: "data/{file}.json"\nIMG_ROOT: "vg/"\nTYPE: "TUPLE_JSON"'
        save(data / "vl_checklist" / "corpus" / "v1" / f"{file}.yaml", config)
        texts = {"POS": ["brown dog", "x"], "NEG": [f"{file} dog", "y"]}
        rows = [["VG_100K/1.jpg", texts]] * 2 + [["VG_100K/1.jpg", texts | {"NEG": texts["POS"]}]]
        save(data / "vl_checklist" / "data" / f"{file}.json", rows)
    save(data / "vg" / "VG_100K" / "1.jpg", 4)
    return folder


@pytest.fixture
def score(place, monkeypatch, capsys):
    """A function that runs the command in `place`: its output, results.json, items.jsonl."""
    monkeypatch.chdir(place)

    def command(options: str) -> tuple[str, dict, list[dict]]:
        monkeypatch.setattr(sys, "argv", ["eval_bench.py", *options.split(), "--out", "out"])
        capsys.readouterr()
        files.run_main(eval_bench.main)
        cells = lambda entry: Cell(**entry) if "ties" in entry else entry  # noqa: E731
        saved = json.loads(Path("out/results.json").read_text(), object_hook=cells)
        lines = Path("out/items.jsonl").read_text().splitlines()
        return capsys.readouterr().out, saved["benchmarks"], [json.loads(line) for line in lines]

    return command


@torch.no_grad()
def cosines(loaded: ce_clip.Loaded, image: list, texts: list[str]) -> list[float]:
    """Those of an image (path, box) and texts, without the scorer."""
    path, box, *_ = image
    pixels = Image.open(path).convert("RGB")
    pixels = loaded.eval_transform(pixels.crop(box) if box else pixels)
    image, text, _ = loaded.model(pixels[None], loaded.tokenizer(texts))
    return (image @ text.T)[0].tolist()


def test_command_on_every_benchmark(score, monkeypatch):
    options = f"--ckpt {ONE} {TWO} --data-root data"
    decoded, rows = [], []
    load, encode = files.open_image, eval_bench.encode_text
    with monkeypatch.context() as patch:
        patch.setattr(files, "open_image", lambda *a: decoded.append(a[0]) or load(*a))
        patch.setattr(eval_bench, "encode_text", lambda m, t: rows.extend(t) or encode(m, t))
        text, saved, lines = score(options)
    assert sorted(decoded) == sorted(2 * list(Path("data").rglob("*.jpg")))  # each image once
    texts = {line[side] for line in lines for side in ("positive", "negative")}
    assert len(rows) == 2 * (len(texts) + 14)  # and each text, of which 14 are COCO's
    counts = {("aro", "Relation"): 3}  # "near" is dropped
    counts["aro", "Attribution"] = 25  # big_red has 24 items
    counts["valse", "Counting"] = 6  # two of four captions a file
    counts["vlc", "Object location"] = 63  # 3 types of 7 files of 3 rows
    counts |= {
        ("vlc", "Avg"): 168,
        ("sugarcrepe", "Avg"): 49,
        ("coco", "I2T R@1"): 7,
        ("coco", "T2I R@1"): 14,
    }
    for (name, column), count in counts.items():
        cell = saved[name][ONE][column]
        assert (cell.scored, cell.total) == (count, count)
    assert saved["table_5"][TWO]["vlc Avg"] == saved["vlc"][TWO]["Avg"]
    (table,) = [part for part in text.split("## ") if part.startswith("SugarCrepe (Table 3), %\n")]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {ONE}")]
    assert row.split()[3::2] == [str(cell) for cell in saved["sugarcrepe"][ONE].values()]
    assert " | 93.1        | 88.8        | 79.0 " in table
    assert f"| same tokens, {TWO} " in text and saved["vlc"][TWO]["Avg"].same_tokens == 56
    assert saved["vlc"][TWO]["Avg"].ties == 0
    assert "Zero-shot classification is not scored. Absent: data/zeroshot/cifar10" in text

    assert len(lines) == 2 * (49 + 22 + 53 + 168)
    models = {path: ce_clip.load_model(path) for path in (ONE, TWO)}
    for line in lines[::9]:  # deduplication, sorting, cutting and batches change no cosine
        texts = [line["positive"], line["negative"]]
        expected = cosines(models[line["row"]], line["image"], texts)
        assert line["scores"] == pytest.approx(expected, abs=1e-6)
    image = ["data/aro/images/7.jpg", [5, 3, 35, 23], True]
    assert list(lines[0].values())[:4] == ["aro", ONE, "on", image]
    assert (
        list(lines[0])[3:]
        == "image positive negative scores right tie same_tokens gap similarity".split()
    )
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert set(before) == {"results.md", "results.json", "items.jsonl"}
    assert before["results.md"].decode() == text
    score(options)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    for rows, count in ((1, 56), (0, 168)):
        _, saved, _ = score(f"{options} --bench vlc --vlc-rows {rows}")
        assert saved["vlc"][ONE]["Avg"].total == count


def test_all_checkpoints_are_looked_for_before_one_is_scored(score, monkeypatch):
    monkeypatch.setattr(eval_bench, "load_model", None)  # it is not called
    for more in ("none.pt", f"--base none.pt --wise 1 --ckpt {TWO}"):
        with pytest.raises(SystemExit, match="none.pt is not a file, and not a TAG"):
            score(f"--ckpt {ONE} {more}")


def test_wise_ft_lies_between_base_and_checkpoint(place, monkeypatch):
    monkeypatch.chdir(place)
    torch.manual_seed(3)
    config = ce_clip.load_model(ONE).config
    files.save_checkpoint(Path("tuned.pt"), ce_clip.build_model("tiny-eval", config=config))
    scorer = Scorer(loaded := ce_clip.load_model(ONE))
    scorer.encode((), ADJECTIVES)
    for text in ADJECTIVES:
        assert scorer.tokens[text].equal(loaded.tokenizer([text])[0])
    args = Namespace(base=ONE, ckpt=["tuned.pt", ONE], model="", wise=[])
    assert [row for row, _ in eval_bench.checkpoints(args)] == [ONE, "tuned.pt"]
    args.wise = [0, 0.25]
    (_, base), (first, _), (second, between) = eval_bench.checkpoints(args)
    assert (first, second) == ("tuned.pt, WiSE 0", "tuned.pt, WiSE 0.25")
    one, two = (loaded.model.state_dict() for loaded in (base, ce_clip.load_model("tuned.pt")))
    for name, weight in between.model.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * one[name] + 0.25 * two[name])


def test_command_on_data_of_your_own(score, monkeypatch):
    record = {"id": 1, "image": "0.jpg", "caption": "a red dog", "missing": ["x"], "relation": None}
    records = [record | {"object": "a red cat"}, record | {"image": "9.jpg", "object": "a red cow"}]
    records.append(record | {"image": "1.jpg", "of my own": "a cow", "box": [5, 3, 30, 40]})
    records.append(records[2] | {"image": "2.jpg"})
    records.append(records[2] | {"box": [900, 3, 930, 40]})  # outside: absent
    records += [record | {"caption": caption, "object": "a cow"} for caption in (None, " ")]
    save(Path("n.jsonl"), "\n".join(map(json.dumps, records)))
    sentences = [{"raw": "a dog"}, {"raw": "a cat"}]
    images = [{"filename": f"{i}.jpg", "split": "test", "sentences": sentences} for i in range(2)]
    images.append({"filename": "none.jpg", "split": "train", "sentences": sentences})
    save(Path("k.json"), {"images": images})
    said = []
    monkeypatch.setattr(files, "say_once", said.append)
    options = f"--ckpt {ONE} --pairs n.jsonl --captions k.json --split test --blind"
    text, saved, lines = score(f"{options} --images data/coco/val2017")
    assert "n.jsonl: negatives 5; left out: without a caption 2" in said
    cells = saved["pairs"][ONE]
    counts = {kind: (cell.scored, cell.total) for kind, cell in cells.items()}
    assert counts == {"object": (1, 2), "of my own": (2, 3), "mean": (3, 5)}
    assert cells["mean"].value is None
    assert saved["captions"][ONE]["T2I R@5"] == Cell(100, 4, 4)
    assert [line["image"][1] for line in lines] == [None, [5, 3, 30, 40], [5, 3, 30, 40]]
    for control in ("blind", "looking"):
        line, *_ = [line for line in text.splitlines() if f"{ONE}, {control}" in line]
        assert line.split("|")[3].strip() == f"{getattr(cells['of my own'], control):.1f}"


def test_texts_in_the_order_of_their_similarity_to_an_image(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    image = "data/coco/val2017/0.jpg"
    options = f"--ckpt {ONE} {TWO} --image {image} --texts {' '.join(ADJECTIVES)}"
    monkeypatch.setattr(sys, "argv", ["eval_bench.py", *options.split()])
    eval_bench.main()
    expected = []
    for path in (ONE, TWO):
        pairs = zip(cosines(ce_clip.load_model(path), [image, None], ADJECTIVES), ADJECTIVES)
        expected += [path, *(f"  {cosine:.4f}  {a}" for cosine, a in sorted(pairs, reverse=True))]
    assert capsys.readouterr().out.splitlines() == expected


def save_shard(folder: Path, labels: list) -> Path:
    """A webdataset as CLIP_benchmark exports it; labels are numbers, or rows of 0 and 1."""
    save(folder / "classnames.txt", "river\nforest floor\nbeach\n")
    save(folder / "zeroshot_classification_templates.txt", "a {c}.\na photo of a big {c}.")
    save(folder / "test" / "nshards.txt", "1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for n, label in enumerate(labels):
            save(folder / f"{n}.png", n)
            if isinstance(label, list):
                save(folder / "dataset_type.txt", "multilabel")
                np.save(folder / f"{n}.npy", label)
            else:
                save(folder / f"{n}.cls", str(label))
            for path in folder.glob(f"{n}.*"):
                tar.add(path, path.name)
    return folder


def test_zero_shot_by_hand(place, tmp_path):
    pytest.importorskip("clip_benchmark")
    labels, rows = [n % 2 for n in range(7)], [[int(n % 3 == 0), n % 3 % 2, 0] for n in range(7)]
    folder = save_shard(tmp_path / "zeroshot" / "resisc45", labels)
    save_shard(tmp_path / "zeroshot" / "voc2007_multilabel", rows)
    scorer = Scorer(loaded := ce_clip.load_model(str(place / ONE)), batch_size=3)
    cells = eval_bench.zero_shot(scorer, at(tmp_path), log := Log())
    assert (str(cells["ELEVATER 19"]), len(cells), len(log.absent)) == ("partial", 3, 18)
    templates = ("a {}.", "a photo of a big {}.")
    texts = [text.format(c) for c in ("river", "forest floor", "beach") for text in templates]
    images = [loaded.eval_transform(Image.open(folder / f"{n}.png")) for n in range(7)]
    with torch.no_grad():
        image, text, _ = loaded.model(torch.stack(images), loaded.tokenizer(texts))
        scores = 100 * image @ normalize(text.view(3, 2, -1).mean(1), dim=-1).T
    right = 100 * (scores.argmax(1) == tensor(labels)).double()
    accuracy, per_class = right.mean().item(), (right[::2].mean() + right[1::2].mean()).item() / 2
    voc = 100 * eval_bench.map_11_point(scores.softmax(1), tensor(rows).bool())
    assert len({round(value, 3) for value in (accuracy, per_class, voc)}) == 3
    expected = dict.fromkeys([*columns("zeroshot"), "imagenet1k"], accuracy)
    expected |= dict.fromkeys(("caltech101", "fgvc_aircraft", "flowers", "pets"), per_class)
    expected["voc2007_multilabel"] = voc
    for name in set(expected) - set(cells):
        (tmp_path / "zeroshot" / name).symlink_to(folder)
    cells = eval_bench.zero_shot(scorer, at(tmp_path), log := Log())
    expected["ELEVATER 19"] = (14 * accuracy + 4 * per_class + voc) / 19
    values = {name: cell.value for name, cell in cells.items()}
    assert values == pytest.approx(expected, abs=0.01)
    assert (list(log.absent), cells["ELEVATER 19"].total) == ([], 19 * 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"{ONE} none.pt --bench sugarcrepe", "none.pt is not a file, and not a TAG"),
        (f"{ONE} --captions none.json", "none.json: No such file"),
        ("text.pt --bench sugarcrepe", "features that are not finite: the checkpoint is broken"),
        ("image.pt --bench sugarcrepe", "features that are not finite: the checkpoint is broken"),
        (f"{ONE} --pairs none --images .", "none: No such file"),
        (f"{ONE} --pairs bad.jsonl", "bad.jsonl is not a file of negatives.py: KeyError"),
        (f"{ONE} --pairs image.jsonl --workers 1", "bad.png is not an image: "),
        (f"{ONE} --data-root no", "nothing was scored"),
        (f"{ONE} --data-root bad --bench sugarcrepe", "add_obj.json is not a JSON list or object"),
        (
            f"{ONE} --data-root bad --bench sugarcrepe_pp",
            'sugarcrepe_pp/replace_obj.json: no field caption in {"filename": "a", "text"',
        ),
        (f"{ONE} --data-root bad --bench valse", "valse/existence.json: no field caption in {"),
        (f"{ONE} --data-root bad --bench winoground", "examples.jsonl, line 2: it is not UTF-8"),
        (f"{ONE} --data-root bad --bench vlc", "vlc has a file of another form (docs/benchmarks.m"),
        (f"{ONE} --data-root bad --bench zeroshot", "eurosat/test/nshards.txt: No such file"),
        (f"{TWO} --base {ONE} --wise 1", f"--wise: {ONE} and {TWO} have different model"),
        (f"{ONE} --image a.jpg", "--image goes together with --texts"),
        (f"{ONE} --wise 0.5", "--wise needs --base"),
        (f"{ONE} --split test", "--split goes together with --captions"),
        (f"{ONE} --batch-size 0", "argument --batch-size: 0 is not"),
    ],
)
def test_mistakes_are_one_line(score, capsys, options, message):
    if "--bench zeroshot" in options:
        pytest.importorskip("clip_benchmark")
    save(Path("bad.png"), "no image")
    save(Path("image.jsonl"), '{"image": "bad.png", "caption": "a cat", "object": "a dog"}')
    save(Path("bad.jsonl"), '{"image": "a", "caption": "a"}\n{"object": "a"}')
    save(Path("bad/sugarcrepe/add_obj.json"), "3")
    good = {"filename": "a", "caption": "b", "caption2": "c", "negative_caption": "d"}
    entries = [good, {"filename": "a", "text": "b"}]
    save(Path("bad/sugarcrepe_pp/replace_obj.json"), entries)
    save(Path("bad/valse/existence.json"), {"a": {"mturk": {"foil": 1}}})
    save(Path("bad/winoground/examples.jsonl"), "").write_bytes(b'{"image_0": 1}\n\xff')
    save(Path("bad/vl_checklist/corpus/v1/Attribute/action/vg.yaml"), "3")
    Path("bad/zeroshot/eurosat").mkdir(parents=True, exist_ok=True)
    for name in ("text", "image"):
        loaded = ce_clip.load_model(ONE)
        weight = loaded.model.text_projection if name == "text" else loaded.model.visual.proj
        torch.nn.init.constant_(weight, torch.nan)
        files.save_checkpoint(Path(f"{name}.pt"), loaded)
    with pytest.raises(SystemExit) as e:
        score(f"--ckpt {options}")
    output = capsys.readouterr()
    line = e.value.code if isinstance(e.value.code, str) else output.err.splitlines()[-1]
    assert line.startswith("eval_bench.py: error: ") and message in line and "\n" not in line
    if message == "nothing was scored":
        assert output.out.count("is not scored. Absent: no/") == 13
