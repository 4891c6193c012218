"""figures.py: what it draws, and that it draws it."""

import json
import math
import sys

import pytest
from PIL import Image

import figures
from negatives import FOUR, run

pytest.importorskip("matplotlib")
SETTINGS = {"kinds": list(FOUR), "threshold": None, "alpha": 0.2, "beta": 0.4, "seed": 42}
RUNS = {"full": {}, "object": {"kinds": ["object"]}, "fixed": {"threshold": 5.0}}


def cell(value):
    return {"value": value, "scored": 10, "total": 10, "ties": 0}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """What three runs and their evaluation leave on disk."""
    monkeypatch.setattr(figures, "SAMPLES", 200)
    rows = {}
    for n, (name, settings) in enumerate(RUNS.items()):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = SETTINGS | settings | {"captions": [[n, f"digest {n}"]]}
        (folder / "config.json").write_text(json.dumps(config))
        thresholds = {f"threshold_{kind}": 0.5 * n for kind in FOUR if name != "object"}
        log = [{"step": s, "itc": 5 - s, "imc": 2, "cmr": s, **thresholds} for s in (1, 2, 3)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        cells = {"aro Relation": cell(30.0 + n), "vlc Avg": cell(None), "coco T2I R@5": cell(1.0)}
        rows[str(folder / "epoch_5.pt")] = cells | {"sugarcrepe Avg": cell(70.0 + n)}
    rows["openai"] = {"pairs mean": cell(40.0)}
    rows["nothing compositional"] = {"zeroshot imagenet1k": cell(60.0)}
    content = {"benchmarks": {"table_5": rows}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    Image.effect_noise((40, 30), 50).save(tmp_path / "1.png")
    lines = []
    for negative, right in (("a cat", True), ("a cow", False), ("an ox", True)):
        item = {"benchmark": "aro", "picture": [str(tmp_path / "1.png"), [5, 5, 20, 20]]}
        item |= {"positive": "a dog", "negative": negative, "similarity": 0.75}
        lines.append(item | {"row": "full", "right": right, "gap": 0.25})
        lines.append(item | {"row": "openai", "right": negative == "an ox", "gap": -0.25})
    lines.append(lines[0] | {"benchmark": "valse"})  # Fig. 8 is of ARO
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
    run(figures.main)


def test_every_figure_is_drawn(results, monkeypatch, tmp_path):
    out = tmp_path / "figures"
    command(monkeypatch, "--results", results, "--out", out)
    names = {"fig4-5a-5c-6", "fig8-aro-similarity", "fig8-aro-gap", "fig9-10"}
    names |= {f"fig5{part}-runs-{name}" for part in "bd" for name in RUNS}
    names.remove("fig5b-runs-object")  # it has no thresholds, as a run of Eq. 1
    assert {path.stem for path in out.iterdir()} == names
    for path in out.iterdir():
        dark, light = Image.open(path).convert("L").getextrema()
        assert (dark < 100, light) == (True, 255), path


@pytest.fixture
def shown(monkeypatch):
    """{figure: what it shows}, in place of drawing."""
    found = {}
    for plot in ("bars", "curves", "pictures"):
        keep = lambda path, *content: found.update({path.stem: content})  # noqa: E731
        monkeypatch.setattr(figures, plot, keep)
    return found


def test_what_the_figures_show(results, monkeypatch, shown):
    command(monkeypatch, "--results", results, "--out", results)
    [means] = shown["fig4-5a-5c-6"]
    assert list(means.values()) == [[50], [51], [52], [40]]
    labels = [label.split("\n") for label in means]
    assert labels[0] == [f"{results}/runs/full/epoch_5.pt", f"kinds {list(FOUR)}", "threshold None"]
    assert labels[1][1] == "kinds ['object']"
    assert labels[2][1:] == [f"kinds {list(FOUR)}", "threshold 5.0"]
    assert labels[3] == ["openai"]
    log, columns = shown["fig5b-runs-fixed"]
    assert columns == [f"threshold_{kind}" for kind in FOUR]
    assert [line[column] for line in log for column in columns] == [1] * 12
    log, columns = shown["fig5d-runs-full"]
    assert [[line[column] for line in log] for column in columns] == [[4, 3, 2], [2] * 3, [1, 2, 3]]
    assert shown["fig8-aro-similarity"] == ({"full": [0.75] * 3, "openai": [0.75] * 3},)
    assert shown["fig8-aro-gap"] == ({"full": [0.25] * 3, "openai": [-0.25] * 3},)
    [[(image, box, lines)]] = shown["fig9-10"]  # the one item on which rows disagree
    assert (image, box) == (str(results / "1.png"), (5, 5, 20, 20))
    assert lines[:2] == [("a dog", figures.GREEN), ("a cat", figures.RED)]
    assert lines[2:] == [("full: right", "gray"), ("openai: wrong", "gray")]


def test_the_interval_is_the_normals(monkeypatch, tmp_path, capsys):
    """A gap of 1 in 100 of 400 items."""
    monkeypatch.setattr(figures, "SAMPLES", 20_000)
    figures.bars(tmp_path / "a.png", {"full": [1.0] * 100 + [0.0] * 300})
    half = 2.5758 * math.sqrt(0.25 * 0.75 / 400)
    mean, low, high = (float(x.strip("[],")) for x in capsys.readouterr().out.split()[-3:])
    assert mean == 0.25
    assert [low, high] == pytest.approx([0.25 - half, 0.25 + half], abs=0.1 * half)


def test_mistakes_are_one_line(results, monkeypatch):
    def message():
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, "--results", results, "--out", results)
        assert "\n" not in stop.value.code
        return stop.value.code

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert "pip install matplotlib" in message()
    (results / "results.json").unlink()
    assert "results.json: No such file" in message()


def test_captions_with_their_negatives(world, monkeypatch, tmp_path, shown):
    arguments = ["--negatives", world / "negatives.jsonl", "--images", world, "--out", tmp_path]
    command(monkeypatch, *arguments)
    [panels] = shown[world.name]
    records = figures.read_lines(world / "negatives.jsonl")
    assert len(panels) == sum(record["relation"] is not None for record in records)
    path, box, lines = panels[0]
    first = records[1]  # the first with a relation negative; every third kind is missing
    assert (path, box) == (world / first["image"], None)
    assert lines[:2] == [
        (first["caption"], figures.GREEN),
        (f"relation: {first['relation']}", figures.RED),
    ]
    assert len(lines) == 1 + sum(first[kind] is not None for kind in FOUR) < 5


def test_ten_of_the_panels_are_drawn(world, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        figures, "open_image", lambda *a: drawn.append(a[0]) or Image.new("RGB", (9, 9))
    )
    for count in (1, 9, 10, 11, 57):
        drawn.clear()
        figures.pictures(tmp_path / "a.png", [(n, None, [("a", "gray")]) for n in range(count)])
        assert min(count, 5) <= len(drawn) <= 10 and drawn[0] == 0


def test_page_to_read_negatives_by_eye(world, monkeypatch, tmp_path):
    out = tmp_path / "page.html"
    arguments = ["--negatives", world / "negatives.jsonl", "--images", world, "--out", out]
    command(monkeypatch, *arguments, "--sample", 3)
    page = out.read_text()
    assert page.count("<img src='data:image/jpeg;base64,") == 3 * 4  # and of numbers there are none
    assert "<h2>number: 0 of 24 captions</h2>" in page
    assert "http" not in page and "a <b>blue</b> dog chases a ball" in page
    assert figures.marked("a <b> dog", "a <b> cat") == "a &lt;b&gt; <b>cat</b>"
    command(monkeypatch, *arguments, "--sample", 3, "--seed", 1)
    assert out.read_text() != page
