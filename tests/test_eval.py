"""eval_bench.py: metrics by hand, loaders on small files in the real formats, the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from torch import tensor

import ce_clip
import eval_bench
from ce_clip import KINDS, BadInput
from eval_bench import Accuracy, Features, Item

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")


def run(*args, cwd):
    command = [sys.executable, ROOT / "eval_bench.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def table(text: str) -> dict[str, dict[str, str]]:
    """{row: {column: cell}} of a markdown table."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    header = cells[0]
    return {row[0]: dict(zip(header[1:], row[1:])) for row in cells[2:]}


# ---- Metrics -------------------------------------------------------------------------------------


def test_a_tie_is_wrong():
    accuracy = eval_bench.pair_accuracy(tensor([0.5, 0.25, 0.5]), tensor([0.25, 0.25, 0.75]), 4)
    assert accuracy == Accuracy(right=1, scored=3, ties=1, missing=4)
    assert accuracy.percent == pytest.approx(100 / 3)


def test_recall_at_1_by_hand():
    sim = tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 1.0], [2.0, 1.0, 2.0]])
    assert eval_bench.recall_at_1(sim) == pytest.approx(100 / 3)  # row 1 is beaten, row 2 a tie
    assert eval_bench.recall_at_1(sim.T) == pytest.approx(100 / 3)  # column 1 alone


def test_score_groups_and_counts_missing_pictures():
    unit = torch.eye(3)
    features = Features({("a", None): unit[0]}, {"cat": unit[0], "dog": unit[1]})
    items = [
        Item("x", "a", None, "cat", "dog"),
        Item("x", "b", None, "cat", "dog"),
        Item("y", "a", None, "dog", "cat"),
        Item("z", "b", None, "cat", "dog"),
    ]
    assert eval_bench.score(items, features) == {
        "x": Accuracy(1, 1, 0, 1),
        "y": Accuracy(0, 1, 0, 0),
        "z": Accuracy(0, 0, 0, 1),
    }


def test_sugarcrepe_averages_are_the_papers():
    """Table 3's printed averages and Table 5's overall; CLIP's REPLACE is a misprint (80.2)."""
    subsets = [s for group in eval_bench.SUGARCREPE.values() for s in group]
    found = {}
    for name, values in eval_bench.TABLE_3.items():
        averages = eval_bench.sugarcrepe_averages(dict(zip(subsets, values)))
        found[name] = [round(averages[k], 1) for k in ("REPLACE", "SWAP", "ADD", "macro")]
    assert found["CLIP (paper)"] == [80.0, 62.7, 72.7, 73.0]
    assert found["NegCLIP (paper)"][:3] == [85.0, 75.3, 85.8]
    assert found["CE-CLIP (paper)"] == [87.0, 74.9, 92.9, 85.2]
    assert found["CE-CLIP+ (paper)"][0::3] == [89.3, 87.5]


# ---- A small checkpoint and small benchmark folders ----------------------------------------------

WORDS = ("red", "blue", "tall", "small", "wet", "old", "dark")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with tiny.pt, data/sugarcrepe and data/coco/val2017 (one picture of 4 missing)."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    ce_clip.save_checkpoint(folder / "tiny.pt", ce_clip.build_model("tiny-eval", config=TINY))
    (folder / "data" / "sugarcrepe").mkdir(parents=True)
    (folder / "data" / "coco" / "val2017").mkdir(parents=True)
    for i in range(3):
        picture = Image.effect_noise((50, 40), 40 * i + 20).convert("RGB")
        picture.save(folder / "data" / "coco" / "val2017" / f"{i}.jpg")
    subsets = [s for group in eval_bench.SUGARCREPE.values() for s in group]
    for n, subset in enumerate(subsets):
        items = {  # keys are not contiguous in the real files either
            str(3 * i): {
                "filename": f"{i % 4}.jpg",
                "caption": f"a {WORDS[i]} dog",
                "negative_caption": f"a {WORDS[(i + n) % 7]} dog",
            }
            for i in range(7)
        }
        (folder / "data" / "sugarcrepe" / f"{subset}.json").write_text(json.dumps(items))
    return folder


def test_features_equal_one_pair_at_a_time(place):
    """Deduplication, sorting, cutting and batches change no cosine."""
    items = list(eval_bench.sugarcrepe_items(place / "data"))
    items = [item for item in items if Path(item.image).exists()]
    items[0] = items[0]._replace(box=(5, 3, 30, 40))
    loaded = ce_clip.load_model(str(place / "tiny.pt"))
    features = eval_bench.encode(loaded, items, torch.device("cpu"), batch_size=3)
    assert len(features.texts) == 7
    assert len(features.images) == 4
    found = torch.stack(features.cosines(items)[:2], 1)
    model = loaded.model.eval()
    for item, row in zip(items, found):
        image = Image.open(item.image).convert("RGB")
        image = loaded.eval_transform(image.crop(item.box) if item.box else image)[None]
        tokens = loaded.tokenizer([item.positive, item.negative])
        with torch.no_grad():
            one, two, _ = model(image, tokens)
        torch.testing.assert_close(row, (one @ two.T)[0], rtol=0, atol=1e-6)


def test_command_on_sugarcrepe(place):
    done = run("--ckpt", place / "tiny.pt", "--data-root", "data", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (
        "SugarCrepe (Table 3): pair accuracy in % - PARTIAL: 7 of 49 items have no picture"
        in done.stdout
    )
    rows = table(done.stdout)
    ours, paper = rows[str(place / "tiny.pt")], rows["CE-CLIP (paper)"]
    assert (paper["replace_obj"], paper["ADD"], paper["micro"]) == ("93.1", "92.9", "")
    assert rows["scored/all"]["swap_att"] == "6/7"
    # in the first subset positive = negative: ties, which are wrong
    assert ours["replace_obj"] == "0.0"
    assert done.stdout.strip().endswith(f"Ties, counted as wrong: {place / 'tiny.pt'} 6")
    percent = {s: float(ours[s]) for group in eval_bench.SUGARCREPE.values() for s in group}
    assert float(ours["macro"]) == pytest.approx(sum(percent.values()) / 7, abs=0.06)
    assert float(ours["micro"]) == pytest.approx(sum(percent.values()) / 7, abs=0.06)
    assert float(ours["SWAP"]) == pytest.approx(
        (percent["swap_obj"] + percent["swap_att"]) / 2, abs=0.06
    )


def test_command_on_negatives(place):
    record = {"id": 1, "image": "0.jpg", "caption": "a red dog", **dict.fromkeys(KINDS)}
    lines = [record | {"object": "a red cat"}, record | {"image": "3.jpg", "object": "a red ball"}]
    (place / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--pairs", "n.jsonl", "--images", "data/coco/val2017"]
    done = run("--ckpt", "tiny.pt", "tiny.pt", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "PARTIAL: 1 of 2 items" in done.stdout
    rows = table(done.stdout)
    assert rows["scored/all"] == {"object": "1/2"}
    assert rows["tiny.pt"]["object"] in ("0.0", "100.0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt", "none.pt", "--pairs", "n", "--images", "."], "cannot read n"),
        (
            ["--ckpt", "tiny.pt", "--data-root", "nowhere"],
            "cannot read nowhere/sugarcrepe/replace_obj",
        ),
        ([], "no runs/toy"),
        (["--ckpt", "data/coco/val2017/0.jpg", "--data-root", "data"], "not a readable checkpoint"),
        (["--ckpt", "no-such-tag", "--data-root", "data"], "cannot load 'no-such-tag'"),
    ],
)
def test_mistakes_are_one_line(place, monkeypatch, options, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["eval_bench.py", *options])
    with pytest.raises(BadInput) as e:
        eval_bench.main()
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_mistake_on_the_command_line_exits_with_its_line(place):
    done = run("--ckpt", "tiny.pt", "--data-root", "nowhere", cwd=place)
    assert done.returncode == 1
    message = "cannot read nowhere/sugarcrepe/replace_obj.json: No such file or directory"
    assert done.stderr.splitlines()[-1] == f"eval_bench.py: error: {message}"
    assert "Traceback" not in done.stderr


def test_a_malformed_item_is_named(place, tmp_path):
    (tmp_path / "sugarcrepe").mkdir()
    (tmp_path / "sugarcrepe" / "replace_obj.json").write_text('{"7": {"caption": "a"}}')
    with pytest.raises(
        BadInput, match="replace_obj.json, item 7, is not an item of SugarCrepe: KeyError"
    ):
        list(eval_bench.sugarcrepe_items(tmp_path))


# ---- The real files, where they are at hand ------------------------------------------------------


@needs_shared
def test_sugarcrepe_counts():
    groups = eval_bench.by_group(list(eval_bench.sugarcrepe_items(SHARED)))
    assert {name: len(items) for name, items in groups.items()} == {
        "replace_obj": 1652,
        "replace_att": 788,
        "replace_rel": 1406,
        "swap_obj": 245,
        "swap_att": 666,
        "add_obj": 2062,
        "add_att": 692,
    }
