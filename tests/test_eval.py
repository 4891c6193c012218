"""eval_bench.py: metrics by hand, loaders on small files in the real formats, the command."""

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from torch import tensor

import ce_clip
import eval_bench
import negatives
from ce_clip import KINDS, BadInput
from eval_bench import Accuracy, Cell, Features, Files, Item

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")


def run(monkeypatch, capsys, *args) -> str:
    """What eval_bench.py prints with these arguments; a mistake raises BadInput."""
    monkeypatch.setattr(sys, "argv", ["eval_bench.py", *map(str, args)])
    capsys.readouterr()
    eval_bench.main()
    return capsys.readouterr().out


def tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """{title: {row: {column: cell}}} of the first markdown table below each title."""
    found = {}
    for part in text.split("## ")[1:]:
        title, _, rest = part.partition("\n")
        rest = rest.strip().split("\n\n")[0]
        lines = [line[1:-1].split("|") for line in rest.splitlines()]
        cells = [[cell.strip() for cell in line] for line in lines]
        header = cells[0]
        found[title] = {row[0]: dict(zip(header[1:], row[1:])) for row in cells[2:] if row[0]}
    return found


# ---- Metrics -------------------------------------------------------------------------------------


def test_a_tie_is_wrong():
    nan = float("nan")  # no picture
    positive, negative = tensor([0.5, 0.25, 0.5, nan, nan]), tensor([0.25, 0.25, 0.75, nan, nan])
    accuracy = eval_bench.pair_accuracy(positive, negative)
    assert accuracy == Accuracy(right=1, scored=3, ties=1, missing=2)
    assert accuracy.percent == pytest.approx(100 / 3)


def features(texts: dict[str, list[float]], images: dict[str, list[float]]) -> Features:
    rows = [{(name, None): n for n, name in enumerate(images)}, {t: n for n, t in enumerate(texts)}]
    return Features(tensor(list(images.values())), tensor(list(texts.values())), *rows)


def test_score_groups_and_counts_missing_pictures():
    f = features({"cat": [1, 0, 0], "dog": [0, 1, 0], "cow": [0.5, 0, 1]}, {"a": [1.0, 0, 0]})
    items = [
        Item("x", "a", None, "cat", ("dog",)),
        Item("x", "b", None, "cat", ("dog",)),
        Item("y", "a", None, "dog", ("cat",)),
        Item("z", "b", None, "cat", ("dog",)),
        Item("five", "a", None, "cow", ("dog", "dog")),
        Item("five", "a", None, "cow", ("dog", "cat")),  # one of two is closer
        Item("five", "a", None, "cat", ("dog", "cat")),  # a shuffle that changed nothing
        Item("retrieval", "a", None, "cat", ()),
    ]
    cosines = f.scores(items)
    assert cosines[4].tolist() == [0.5, 0]
    assert cosines[1].isnan().all()  # no picture
    assert cosines[7].isnan().tolist() == [False, True]  # no negative
    assert eval_bench.score(items, cosines) == {
        "x": Accuracy(1, 1, 0, 1),
        "y": Accuracy(0, 1, 0, 0),
        "z": Accuracy(0, 0, 0, 1),
        "five": Accuracy(1, 3, 1, 0),
    }


def test_averages_of_trees():
    groups = {"a": Accuracy(1, 2, 0), "b": Accuracy(3, 4, 0), "c": Accuracy(0, 4, 0)}
    assert eval_bench.cell("b", groups) == Cell(75, 4, 4)
    assert eval_bench.cell(["a", ["b", "c"]], groups) == Cell((50 + 37.5) / 2, 10, 10)
    assert eval_bench.cell(("a", "b", "c"), groups) == Cell(40, 10, 10)
    groups["c"] = Accuracy(0, 4, 0, missing=1)
    assert eval_bench.cell("c", groups) == Cell(0, 4, 5)  # a split shows what there is
    for tree in (["a", ["b", "c"]], ("a", "c"), ["a", "absent"]):
        assert math.isnan(eval_bench.cell(tree, groups).value)  # an average does not
    assert math.isnan(eval_bench.cell([], groups).value)


def test_averages_are_defined_as_the_papers():
    """What the paper prints follows from its columns, but for a misprint. PROTOCOLS.md 0 and 3."""
    averages = {"Avg 11 files", "Avg 9 columns", "Attribute", "Object", "Relation", "Avg"}
    averages |= set(eval_bench.SUGARCREPE) | {"macro"}
    off = {}
    for key in ("valse", "vlc", "sugarcrepe"):
        columns = eval_bench.BENCHMARKS[key].columns({})
        for name, row in eval_bench.paper_rows(key).items():
            splits = {c: t for c, t in columns.items() if c not in averages and c != "micro"}
            leaf = {x: row[c].value for c, t in splits.items() for x in eval_bench.leaves(t)}
            for column in averages & set(columns):
                value = eval_bench.average(columns[column], leaf)
                if abs(value - row[column].value) > 0.11:
                    off[name, column] = round(value, 2), row[column].value
    assert off.pop(("CLIP (paper)", "REPLACE")) == (80.03, 80.2)
    # of the files 70.35, of the columns 69.96
    assert off.pop(("CE-XVLM (paper)", "Avg 11 files")) == (70.35, 70.8)
    assert off == {("CLIP (paper)", "macro"): (72.99, 73.1)}  # ADD's attribute is 68.8 elsewhere
    assert eval_bench.paper_rows("valse")["CE-CLIP+ (paper)"]["Avg 9 columns"].value == 76.7
    eleven = eval_bench.paper_rows("valse")["CE-CLIP+ (paper)"]["Avg 11 files"].value
    assert round(eleven, 2) == 75.05
    coco = eval_bench.paper_rows("coco")["CLIP-FT (paper)"]
    assert {name: c.value for name, c in coco.items()} == {"T2I R@5": 66.2, "I2T R@5": 78.3}


def test_the_relations_that_aro_drops():
    dropped = eval_bench.ARO_DROPPED
    assert len(dropped) == 157
    assert {"drinking", "drinking from", "on the side of", "sitting in front of"} < dropped
    assert not {"", "on", "the side of", "drinking -"} & dropped


def test_retrieval_by_hand():
    images = {"A": [1, 0, 0], "B": [0, 1, 0], "C": [0, 0, 1]}
    texts = {"a1": [9, 8, 0], "a2": [1, 2, 3], "b": [0, 5, 0], "c": [7, 0, 6]}
    f = features({k: [float(x) for x in v] for k, v in texts.items()}, images)
    f = f._replace(images=f.images.float())
    items = [Item("", name[0].upper(), None, name, ()) for name in texts]
    # by caption: a1 9 before 8; a2 1 behind 2 and 3; b 5; c 6 behind 7        T2I R@1 = 2/4
    # by picture: A 9 before 7; B 5 behind 8; C 6 before 3                      I2T R@1 = 2/3
    found = {k: cell.value for k, cell in eval_bench.retrieval_cells(items, f).items()}
    assert found == pytest.approx(
        {
            **{"I2T R@1": 200 / 3, "I2T R@5": 100, "I2T R@10": 100},
            **{"T2I R@1": 50, "T2I R@5": 100, "T2I R@10": 100},
        }
    )
    tie = f._replace(texts=f.texts.index_fill(0, tensor([2]), 1.0))  # b: 1, 1, 1
    assert eval_bench.retrieval_cells(items, tie)["T2I R@1"].value == 25
    gone = [*items, Item("", "D", None, "b", ())]
    assert math.isnan(eval_bench.retrieval_cells(gone, f)["I2T R@1"].value)
    assert eval_bench.retrieval_cells(gone, f)["I2T R@1"][1:3] == (4, 5)


def test_bootstrap_intervals():
    constant, binary = torch.full((400,), 0.5), (torch.arange(400) < 100).float()
    low, high = eval_bench.bootstrap(torch.stack([constant, binary], 1), resamples=20_000)
    assert low[0] == high[0] == 0.5
    half = 2.5758 * math.sqrt(0.25 * 0.75 / 400)  # the normal's 99 %
    assert low[1].item() == pytest.approx(0.25 - half, abs=0.1 * half)
    assert high[1].item() == pytest.approx(0.25 + half, abs=0.1 * half)


def test_similarities_of_fig_8():
    f = features({"t": [0.6, 0.8], "n": [0.8, 0.6]}, {"a": [1.0, 0.0]})
    items = [Item("", "a", None, "t", ("n",)), Item("", "b", None, "t", ("n",))]
    found = eval_bench.similarities(items, f)
    torch.testing.assert_close(found, tensor([[0.96, 0.6 - 0.8]]))


def test_metrics_of_elevater_by_hand():
    scores = tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6], [0.3, 0.2, 0.5], [0.4, 0.1, 0.5]])
    target = tensor([0, 1, 1, 0])
    assert eval_bench.accuracy(scores, target) == 0.25
    # class 2 does not occur: without it 0 of (0, 0) are right twice, 1 of (1, 1) once
    assert eval_bench.mean_per_class(scores, target) == (1 + 0.5) / 2
    # of class 1: positives .3 and .2, negatives .2 and .1
    assert eval_bench.roc_auc(scores, (target == 1).long()) == (2 + 1.5) / 4
    assert eval_bench.roc_auc(scores, (target == 0).long()) == (0 + 0.5) / 4
    # precision 1 at recall 1/2, 2/3 at recall 1 (.2 is a tie): 6 levels of 1, 5 of 2/3
    hits = torch.stack([target < 0, target == 1, target < 0], 1)
    assert eval_bench.map_11_point(scores, hits) == pytest.approx((6 + 5 * 2 / 3) / 11)


# ---- Words ---------------------------------------------------------------------------------------


def test_pre_caption():
    assert eval_bench.pre_caption('A (big) dog:  "Rex"! ') == "a big dog rex"
    assert len(eval_bench.pre_caption("a " * 40).split()) == 30


def test_perturbations_of_aros_order_tasks():
    captions = ["A black cat sits on the old brown sofa near big windows", "Cats"]
    tagged = list(negatives.Tagger().words(captions))
    nouns, others, within, whole = eval_bench.perturbations(tagged[0])
    words = eval_bench.pre_caption(captions[0]).split()
    places = {w: i for i, w in enumerate(words)}
    for text in (nouns, others, within, whole):
        assert Counter(text.split()) == Counter(words)
        assert text.split() != words
    content = {"black", "cat", "old", "brown", "sofa", "big", "windows"}
    assert [w for w in nouns.split() if w not in content] == [w for w in words if w not in content]
    assert {nouns.split()[places[w]] for w in ("cat", "sofa", "windows")} == {
        *("cat", "sofa", "windows")
    }
    assert [others.split()[places[w]] for w in content] == list(content)
    for n in range(0, 12, 3):
        assert sorted(within.split()[n : n + 3]) == sorted(words[n : n + 3])
    threes = [whole.split()[n : n + 3] for n in range(0, 12, 3)]
    assert sorted(threes) == sorted(words[n : n + 3] for n in range(0, 12, 3))
    assert eval_bench.perturbations(tagged[0]) == (nouns, others, within, whole)  # seeded
    assert eval_bench.perturbations(tagged[1])[0] == "cats"  # unchanged: a tie


# ---- A small checkpoint and small benchmark folders in the real formats --------------------------

ADJECTIVES = ("red", "blue", "tall", "small", "wet", "old", "dark")
VALSE_PICTURES = {  # file: (picture's name, where it lies)
    "existence": ("v7w_1.jpg", "visual7w/images"),
    "plurals": ("000000000001.jpg", "coco/val2017"),
    "action-replacement": ("adjusting_1.jpg", "swig"),
    "coreference-standard": ("COCO_train2014_1.jpg", "coco/train2014"),
    "coreference-hard": ("VisualDialog_val2018_1.jpg", "visdial/VisualDialog_val2018"),
    "foil-it": ("COCO_val2014_1.jpg", "coco/val2014"),
}


def save_picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((50, 40), 20 + 17 * seed % 200).convert("RGB").save(path)


def save_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """tiny.pt, other.pt (another size of pictures), and data/ with all benchmarks but Flickr30k."""
    folder = tmp_path_factory.mktemp("place")
    data = folder / "data"
    for n, name in enumerate(("tiny", "other")):
        torch.manual_seed(n)
        config = TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 32 + 16 * n}}
        loaded = ce_clip.build_model(f"{name}-eval", config=config)
        (folder / name).mkdir()
        ce_clip.save_checkpoint(folder / name / "epoch_1.pt", loaded)
    for subset in eval_bench.leaves(list(eval_bench.SUGARCREPE.values())):
        items = {  # keys are not contiguous in the real files either
            str(3 * i): {
                "filename": f"{i % 3}.jpg",
                "caption": f"a {ADJECTIVES[i]} dog",
                "negative_caption": f"a {ADJECTIVES[(i + len(subset)) % 7]} dog",
            }
            for i in range(7)
        }
        save_json(data / "sugarcrepe" / f"{subset}.json", items)
    for i in range(3):
        save_picture(data / "coco" / "val2017" / f"{i}.jpg", i)
    for name in eval_bench.leaves(list(eval_bench.VALSE.values())):
        picture, where = VALSE_PICTURES.get(name, VALSE_PICTURES["existence"])
        save_picture(data / where / picture, len(name))
        entry = {"image_file": picture, "caption": "two dogs", "foil": f"{name} dogs"}
        items = {n: entry | {"mturk": {"caption": n, "foil": 0, "other": 0}} for n in range(4)}
        save_json(data / "valse" / f"{name}.json", items)
    box = {"bbox_x": 5, "bbox_y": 3, "bbox_w": 30, "bbox_h": 20, "image_path": "7.jpg"}
    box |= {"true_caption": "the dog is on the mat", "false_caption": "the mat is on the dog"}
    relations = [box | {"relation_name": name} for name in ("on", "on", "under", "near")]
    save_json(data / "aro" / "visual_genome_relation.json", relations)
    pairs = [["red", "big"]] * 25 + [["big", "red"]] * 24
    attributions = [box | {"attributes": pair} for pair in pairs]
    save_json(data / "aro" / "visual_genome_attribution.json", attributions)
    save_picture(data / "aro" / "images" / "7.jpg")
    for group in eval_bench.leaves(eval_bench.vlc_columns(None)["Avg"]):
        config = data / "vl_checklist" / "corpus" / "v1" / f"{group}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        name = f"data/{group}.json"
        config.write_text(f'ANNO_PATH: "{name}"\nIMG_ROOT: "vg/"\nTYPE: "TUPLE_JSON"')
        texts = {"POS": ["brown dog", "x"], "NEG": [f"{group} dog", "y"]}
        rows = [["VG_100K/1.jpg", texts]] * 2 + [["VG_100K/1.jpg", texts | {"NEG": texts["POS"]}]]
        save_json(data / "vl_checklist" / name, rows)
    save_picture(data / "vg" / "VG_100K" / "1.jpg", 4)
    karpathy = [
        {
            "image": f"val2014/{i}.jpg",
            "caption": [f"A {a} dog sits on a mat.", f"{a} cats and dogs"],
        }
        for i, a in enumerate(ADJECTIVES)
    ]
    save_json(data / "coco" / "annotations" / "coco_karpathy_test.json", karpathy)
    for i in range(7):
        save_picture(data / "coco" / "val2014" / f"{i}.jpg", i)
        save_picture(
            data / "zeroshot" / "resisc45_clip" / "test" / f"class_{i % 2}" / f"{i}.png", i
        )
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def scorer(**paths):
    models = {name: ce_clip.load_model(str(path)) for name, path in paths.items()}
    return eval_bench.Scorer(models, SimpleNamespace(batch_size=3, workers=0, precision="fp32"))


def test_features_equal_one_pair_at_a_time_and_share_the_decoding(here, monkeypatch):
    """Deduplication, sorting, cutting and batches change no cosine."""
    items = list(eval_bench.sugarcrepe_items(Files(Path("data"))))
    items[0] = items[0]._replace(box=(5, 3, 30, 40), negatives=("a dog", "a much longer caption"))
    decoded = []
    load = ce_clip.load_image
    monkeypatch.setattr(eval_bench, "load_image", lambda *a: decoded.append(a) or load(*a))
    both = scorer(one="tiny/epoch_1.pt", two="other/epoch_1.pt")
    found = both.encode(items)
    assert len(decoded) == len(found["one"].images) == 4
    assert len(found["one"].texts) == 9
    for row, loaded in both.models.items():
        for item, row_of_two in zip(items, found[row].scores(items)):
            image = Image.open(item.image).convert("RGB")
            image = loaded.eval_transform(image.crop(item.box) if item.box else image)[None]
            tokens = loaded.tokenizer([item.positive, *item.negatives])
            with torch.no_grad():
                one, two, _ = loaded.model(image, tokens)
            positive, *negative = (one @ two.T)[0]
            expected = torch.stack([positive, max(negative)])
            torch.testing.assert_close(row_of_two, expected, rtol=0, atol=1e-6)


def test_command_on_every_benchmark(here, monkeypatch, capsys):
    options = ["--ckpt", "tiny/epoch_1.pt", "other/epoch_1.pt", "--data-root", "data"]
    text = run(monkeypatch, capsys, *options, "--out", "out", "--items")
    found = tables(text)
    row = "tiny/epoch_1.pt"

    sugarcrepe = found["SugarCrepe (Table 3), %"]
    assert sugarcrepe["CE-CLIP (paper)"]["replace_obj"] == "93.1"
    assert sugarcrepe["scored/all"]["macro"] == "49/49"
    percent = [float(sugarcrepe[row][s]) for s in eval_bench.sugarcrepe_columns(None)["macro"]]
    assert float(sugarcrepe[row]["macro"]) == pytest.approx(sum(percent) / 7, abs=0.06)
    assert float(sugarcrepe[row]["micro"]) == pytest.approx(sum(percent) / 7, abs=0.06)

    valse = found["VALSE (Table 1), %"]
    assert valse["scored/all"]["Counting"] == "6/6"  # two of four captions a file, three files
    assert valse["scored/all"]["Avg 11 files"] == "22/22"

    aro = found["ARO (Table 1), %"]  # "near" is dropped, big_red has 24 cases
    assert aro["scored/all"] == {"Relation": "3/3", "Attribution": "25/25"}
    assert aro["CLIP (paper)"] == {"Relation": "59.3", "Attribution": "62.9"}
    assert "99 % bootstrap intervals" in text

    vlc = found["VL-CheckList (Table 2), %"]
    assert vlc["scored/all"]["Object/Location"] == "63/63"  # 3 types of 7 files of 3 rows
    assert vlc["scored/all"]["Avg"] == "168/168"
    assert "168 items, 56 of them repeated; in 56 a negative is the caption itself" in text
    groups = json.loads(Path("out/results.json").read_text())["groups"]["vlc"][row]
    assert {a["ties"] for a in groups.values()} == {1}

    order = found["ARO: word order, the caption among four perturbations, % - PARTIAL"]
    assert order["scored/all"] == {"COCO-Order": "14/14"}
    assert "Absent: flickr30k/flickr30k_test.json." in text
    coco = found["COCO retrieval, Karpathy's 5k test (Table 5: R@5), %"]
    assert coco["scored/all"]["I2T R@1"] == "14/14"
    assert "Flickr30k retrieval, 1k test is not scored: flickr30k/flickr30k_test.json is" in text

    zero_shot = found["Zero-shot classification, %"]
    assert zero_shot["metric"] == {"resisc45_clip": "accuracy", "ELEVATER": ""}
    assert zero_shot[row]["ELEVATER"] == "partial"
    assert "zero-shot mnist is not scored: data/zeroshot/mnist is not torchvision's MNIST" in text
    gain = found["Gain and forgetting (Table 5)"]
    assert gain["VL-CheckList"][row] == vlc[row]["Avg"]
    assert gain["COCO T2I R@5"]["CE-CLIP+ (paper)"] == "72.3"

    lines = [json.loads(line) for line in Path("out/items.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (49 + 22 + 53 + 168 + 14)
    one = [x for x in lines if x["model"] == row and x["group"] == "replace_obj"]
    assert f"{100 * sum(x['right'] for x in one) / 7:.1f}" == sugarcrepe[row]["replace_obj"]
    assert Path("out/results.md").read_text() in text
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert set(before) == {"results.md", "results.json", "items.jsonl"}
    assert b"NaN" not in before["results.json"]
    run(monkeypatch, capsys, *options, "--out", "out", "--items")
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    with pytest.raises(BadInput, match="Flickr30k retrieval, 1k test is not scored"):
        run(monkeypatch, capsys, *options, "--strict")


def test_a_box_of_aro_is_left_top_right_bottom(here):
    first = next(iter(eval_bench.aro_items(Files(Path("data")))))
    assert first == Item(
        "relation/on",
        "data/aro/images/7.jpg",
        (5, 3, 35, 23),
        "the dog is on the mat",
        ("the mat is on the dog",),
    )


def test_rows_of_vl_checklist(here):
    files, args = Files(Path("data")), SimpleNamespace(vlc_rows=1)
    assert len(list(eval_bench.vlc_items(files, args))) == 56
    args.vlc_rows = 0
    assert len(list(eval_bench.vlc_items(files, args))) == 168


def test_wise_ft_lies_between_its_ends(here, monkeypatch, capsys):
    torch.manual_seed(3)
    config = ce_clip.load_model("tiny/epoch_1.pt").config
    ce_clip.save_checkpoint(Path("tuned.pt"), ce_clip.build_model("tiny-eval", config=config))
    options = ["--ckpt", "tuned.pt", "--base", "tiny/epoch_1.pt", "--data-root", "data"]
    text = run(monkeypatch, capsys, *options, "--bench", "sugarcrepe", "--wise", 0, 0.5, 1)
    found = tables(text)["SugarCrepe (Table 3), %"]
    plain = tables(run(monkeypatch, capsys, *options, "--bench", "sugarcrepe"))
    rows = plain["SugarCrepe (Table 3), %"]
    assert found["tuned.pt, WiSE 0"] == found["tiny/epoch_1.pt"] == rows["tiny/epoch_1.pt"]
    assert found["tuned.pt, WiSE 1"] == rows["tuned.pt"] != rows["tiny/epoch_1.pt"]
    gain = plain["Gain and forgetting (Table 5), difference to tiny/epoch_1.pt"]["SugarCrepe"]
    one, two = float(rows["tuned.pt"]["macro"]), float(rows["tiny/epoch_1.pt"]["macro"])
    value, difference = gain["tuned.pt"].split()
    assert float(value) == one
    assert float(difference.strip("()")) == pytest.approx(one - two, abs=0.11)
    models = [ce_clip.load_model(path) for path in ("tiny/epoch_1.pt", "tuned.pt")]
    half = eval_bench.interpolate(*models, 0.5).model.state_dict()
    for name, weight in half.items():
        ends = [m.model.state_dict()[name] for m in models]
        torch.testing.assert_close(weight, (ends[0] + ends[1]) / 2)
    with pytest.raises(BadInput, match="--wise: the base is a tiny-eval, the checkpoint a other"):
        eval_bench.interpolate(models[0], ce_clip.load_model("other/epoch_1.pt"), 0.5)


def test_a_partial_benchmark_has_no_average(here, monkeypatch, capsys, tmp_path):
    for subset in eval_bench.sugarcrepe_columns(None)["macro"]:
        items = {0: {"filename": "0.jpg", "caption": "a dog", "negative_caption": "a cat"}}
        if subset == "swap_att":
            items[1] = items[0] | {"filename": "gone.jpg"}
        save_json(tmp_path / "sugarcrepe" / f"{subset}.json", items)
    save_picture(tmp_path / "coco" / "val2017" / "0.jpg")
    options = ["--ckpt", "tiny/epoch_1.pt", "--data-root", tmp_path, "--bench", "sugarcrepe"]
    text = run(monkeypatch, capsys, *options)
    found = tables(text)["SugarCrepe (Table 3), % - PARTIAL"]["tiny/epoch_1.pt"]
    assert (found["SWAP"], found["macro"], found["micro"]) == ("partial",) * 3
    assert found["REPLACE"] in ("0.0", "100.0")
    with pytest.raises(BadInput, match="partial, for pictures or files are absent: SugarCrepe"):
        run(monkeypatch, capsys, *options, "--strict")


def test_command_on_negatives_and_captions(here, monkeypatch, capsys):
    record = {"id": 1, "image": "0.jpg", "caption": "a red dog", **dict.fromkeys(KINDS)}
    lines = [record | {"object": "a red cat"}, record | {"image": "3.jpg", "object": "a red ball"}]
    Path("n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_json(Path("c.json"), [{"image": f"{i}.jpg", "caption": ADJECTIVES[i]} for i in range(3)])
    options = ["--ckpt", "tiny/epoch_1.pt", "--pairs", "n.jsonl", "--captions", "c.json"]
    found = tables(run(monkeypatch, capsys, *options, "--images", "data/coco/val2017"))
    rows = found["Negatives of n.jsonl, % - PARTIAL"]
    assert rows["scored/all"] == {"object": "1/2", "mean": "1/2"}
    assert rows["tiny/epoch_1.pt"]["object"] in ("0.0", "100.0")
    rows = found["Retrieval, c.json, %"]
    assert rows["scored/all"]["T2I R@1"] == "3/3"
    assert rows["tiny/epoch_1.pt"]["T2I R@5"] == "100.0"


def test_zero_shot_equals_open_clips_own_way(here):
    images = eval_bench.image_set(Path("data"), "resisc45_clip", False)
    assert images.classes == ["class 0", "class 1"]
    assert len(images.templates) == 80
    both = scorer(one="tiny/epoch_1.pt", two="other/epoch_1.pt")
    found = eval_bench.zero_shot(both, images, "x")
    for row, (model, *_, transform, tokenizer) in both.models.items():
        weights = open_clip.build_zero_shot_classifier(
            model, tokenizer, images.classes, images.templates
        )
        batch = torch.stack([transform(picture) for picture, _ in images.base])
        with torch.no_grad():
            guess = (model.encode_image(batch, normalize=True) @ weights).argmax(1)
        right = guess == tensor([target for _, target in images.base])
        assert found[row] == Cell(pytest.approx(100 * right.float().mean().item()), 7, 7)


def test_zero_shot_sets_that_are_absent_or_not_named(tmp_path):
    folder = tmp_path / "zeroshot" / "imagenet-1k"
    with pytest.raises(BadInput, match="test is absent"):
        eval_bench.image_set(tmp_path, "imagenet-1k", False)
    for i in range(2):
        save_picture(folder / "test" / f"n0{i}" / "a.png", i)
    with pytest.raises(BadInput, match="classes.txt must name 2 classes"):
        eval_bench.image_set(tmp_path, "imagenet-1k", False)
    (folder / "classes.txt").write_text("tench\ngoldfish\n")
    (folder / "templates.txt").write_text("a {}.\n")
    images = eval_bench.image_set(tmp_path, "imagenet-1k", False)
    assert (images.classes, images.templates) == (["tench", "goldfish"], ["a {}."])
    objects = [{"name": "cat", "difficult": "0"}, {"name": "dog", "difficult": "1"}]
    voc = [(Image.new("RGB", (4, 4)), {"annotation": {"object": objects}})]
    images = eval_bench.ImageSet(voc, eval_bench.VOC.split(), [], eval_bench.map_11_point)
    target = images.load(0)[1]
    assert (target.sum(), target[7], len(target)) == (1, True, 20)  # the cat
    images = images._replace(base=[(Image.new("RGB", (4, 4)), None)])
    with pytest.raises(BadInput, match="test picture 0 is not a picture with a label"):
        images.load(0)
    (folder / "templates.txt").write_text("")
    with pytest.raises(BadInput, match="templates.txt is empty"):
        eval_bench.image_set(tmp_path, "imagenet-1k", False)


def test_a_zero_shot_set_with_a_bad_picture_is_a_note(here, monkeypatch, capsys, tmp_path):
    for name in ("resisc45_clip", "eurosat_clip"):
        for i in range(2):
            save_picture(tmp_path / "zeroshot" / name / "test" / f"class_{i}" / "a.png", i)
    bad = tmp_path / "zeroshot" / "eurosat_clip" / "test" / "class_1" / "a.png"
    bad.write_bytes(b"no picture")
    options = ["--ckpt", "tiny/epoch_1.pt", "--data-root", tmp_path, "--workers", 1]
    text = run(monkeypatch, capsys, *options, "--bench", "zeroshot")
    assert f"zero-shot eurosat_clip is not scored: cannot read {bad}: " in text
    rows = tables(text)["Zero-shot classification, %"]
    assert rows["scored/all"] == {"resisc45_clip": "2/2", "ELEVATER": "1/20"}
    with pytest.raises(BadInput, match="zero-shot .* is not scored"):
        run(monkeypatch, capsys, *options, "--bench", "zeroshot", "--strict")


def test_every_zero_shot_set_has_its_class_and_metric():
    import torchvision

    assert len(eval_bench.ZERO_SHOT) == 21
    for kind, metric in eval_bench.ZERO_SHOT.values():
        assert kind == "-" or hasattr(torchvision.datasets, kind)
        assert callable(metric)


def test_examples_are_pictures_where_models_differ_first(here, monkeypatch, capsys):
    options = ["--ckpt", "tiny/epoch_1.pt", "other/epoch_1.pt", "--data-root", "data"]
    run(monkeypatch, capsys, *options, "--bench", "sugarcrepe", "--examples", "sheets")
    with Image.open("sheets/sugarcrepe.png") as sheet:
        assert sheet.height == 6 * 140
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(0x0A, 0x7D, 0x28), (0xB3, 0x26, 0x1E)} <= colors


def test_figures(here, monkeypatch, capsys):
    options = ["--ckpt", "tiny/epoch_1.pt", "--data-root", "data", "--bench", "aro", "coco"]
    options += ["--base", "tiny/epoch_1.pt", "--wise", 0, 1, "--figures", "figures"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(BadInput, match="--figures needs matplotlib: pip install matplotlib"):
            run(patch, capsys, *options)
    pytest.importorskip("matplotlib")
    terms = [f"threshold_{kind}" for kind in KINDS] + ["itc", "imc", "cmr"]
    lines = [{"step": n, **{term: random.random() for term in terms}} for n in range(1, 9)]
    Path("tiny/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(monkeypatch, capsys, *options)
    names = ["fig5-tiny-losses", "fig5-tiny-thresholds", "fig8-aro-gap", "fig8-aro-similarity"]
    assert sorted(p.stem for p in Path("figures").iterdir()) == [*names, "wise"]
    options[options.index("aro") : options.index("coco") + 1] = ["resisc45_clip"]
    run(monkeypatch, capsys, *options, "--strict")  # no task of Table 5 is whole
    for path in Path("figures").iterdir():
        with Image.open(path) as figure:
            assert len(figure.convert("RGB").getcolors(1 << 20)) > 10


# ---- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt", "none.pt", "--pairs", "n", "--images", "."], "cannot read n"),
        (
            ["--ckpt", "tiny/epoch_1.pt", "--data-root", "nowhere", "--bench", "sugarcrepe"],
            "SugarCrepe (Table 3) is not scored: sugarcrepe/replace_obj.json and 6 more are absent."
            " Get data/*.json of https://github.com/RAIVNLab/sugar-crepe (2 MB) in sugarcrepe/",
        ),
        ([], "no runs/toy"),
        (
            ["--ckpt", "data/coco/val2017/0.jpg", "--data-root", "data", "--bench", "sugarcrepe"],
            "not a readable checkpoint",
        ),
        (
            ["--ckpt", "no-such-tag", "--data-root", "data", "--bench", "sugarcrepe"],
            "cannot load 'no-such-tag'",
        ),
    ],
)
def test_mistakes_are_one_line(here, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["eval_bench.py", *options])
    with pytest.raises(BadInput) as e:
        eval_bench.main()
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_broken_weights_are_not_missing_pictures(here):
    broken = scorer(one="tiny/epoch_1.pt")
    torch.nn.init.constant_(broken.models["one"].model.text_projection, torch.nan)
    with pytest.raises(BadInput, match="one gives features that are not finite"):
        broken.encode(list(eval_bench.sugarcrepe_items(Files(Path("data")))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"7": {"caption": "a"}}', "item 7, is not an item of this benchmark: KeyError"),
        ('{"7": {"filename": "a", "caption": 3, "negative_caption": ""}}', "caption that is not"),
        ("[1]", "item 0, is not an item"),
        ("3", "is not a JSON list or object of items"),
        ('{"7": ', "is not valid JSON"),
    ],
)
def test_a_malformed_item_is_named(tmp_path, content, message):
    (tmp_path / "sugarcrepe").mkdir()
    (tmp_path / "sugarcrepe" / "replace_obj.json").write_text(content)
    with pytest.raises(BadInput, match="replace_obj.json.*" + message):
        list(eval_bench.sugarcrepe_items(Files(tmp_path)))


def test_a_bad_picture_or_box_is_named(tmp_path):
    save_picture(path := tmp_path / "a.png")
    copy = Image.Image.copy
    assert ce_clip.load_image(path, copy, (40, 30, 60, 50)).size == (20, 20)  # as ARO's own crop
    for box in ((50, 0, 60, 10), (0, 40, 10, 60), (7, 3, 7, 9), (9, 3, 7, 9)):
        with pytest.raises(BadInput, match=r"the picture .*a.png .* the box \(.*\) lies outside"):
            ce_clip.load_image(path, copy, box)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadInput, match="cannot read the picture .*a.png"):
        ce_clip.load_image(path, copy)


# ---- The real files, where they are at hand ------------------------------------------------------


def counts(items) -> dict[str, int]:
    return dict(Counter(item.group for item in items))


@needs_shared
def test_counts_of_the_real_files():
    """PROTOCOLS.md 3.2 to 3.5."""
    files, args = Files(SHARED), SimpleNamespace(vlc_rows=1000)
    assert counts(eval_bench.sugarcrepe_items(files)) == {
        **{"replace_obj": 1652, "replace_att": 788, "replace_rel": 1406},
        **{"swap_obj": 245, "swap_att": 666, "add_obj": 2062, "add_att": 692},
    }
    assert counts(eval_bench.valse_items(files, args)) == {
        **{"existence": 505, "plurals": 851, "counting-hard": 868, "counting-small-quant": 900},
        **{"counting-adversarial": 691, "relations": 535, "action-replacement": 648},
        **{"actant-swap": 949, "coreference-standard": 708, "coreference-hard": 104},
        **{"foil-it": 943},  # 7,702 of 8,782
    }
    assert not files.absent
    found = counts(eval_bench.vlc_items(files, args))
    assert len(found) == 18
    assert found["Attribute/color/vg"] == found["Attribute/action/vaw"] == 1000
    assert found["Attribute/state/vg"] == 941
    assert len(files.absent) == 38
    args.vlc_rows = 0
    found = counts(eval_bench.vlc_items(files, args))
    assert (found["Attribute/color/vg"], found["Relation/action/vg"]) == (11569, 12733)
    coco = list(eval_bench.retrieval_items(files, args, "coco"))
    assert (len(coco), len({item.image for item in coco})) == (25010, 5000)
    first = SHARED / "aro" / "visual_genome_relation_first43.json"
    assert len(json.loads(first.read_text())) == 43
