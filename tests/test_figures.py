"""figures.py: what it draws, and that it draws it."""

import json
import math
import sys

import pytest
from PIL import Image

import figures
from negatives import KINDS, run

pytest.importorskip("matplotlib")
FULL = {"losses": "itc,hn,imc,cmr", "kinds": list(KINDS), "threshold": None, "upper_bound": 10.0}
FULL |= {"alpha": 0.2, "beta": 0.4, "seed": 42}


def cell(value):
    return {"value": value, "scored": 10, "total": 10, "ties": 0}


RUNS = {
    "full": {},
    "object": {"kinds": ["object"]},
    "fixed": {"threshold": 5.0},
    "bound": {"upper_bound": 2.0},
    "alpha": {"alpha": 0.4},
    "beta": {"beta": 0.8},
    "both": {"alpha": 0.4, "beta": 0.8},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """What seven runs and their evaluation leave on disk."""
    monkeypatch.setattr(figures.interval, "__defaults__", (200,))  # not 50,000
    rows = []
    for n, (name, settings) in enumerate(RUNS.items()):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(FULL | settings))
        thresholds = {f"threshold_{kind}": 0.5 * n for kind in KINDS}
        log = [{"step": s, "itc": 5 - s, "imc": 2, "cmr": s, **thresholds} for s in (1, 2, 3)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        rows.append(str(folder / "epoch_5.pt"))
    rows += [f"{rows[0]}, WiSE 0.5", "openai"]  # no rows of runs
    low = {row: cell(30.0 + n) for n, row in enumerate(rows)}  # the mean of the two
    high = {row: cell(70.0 + n) for n, row in enumerate(rows)}
    tasks = {"ARO-R": low, "VALSE": high, "SugarCrepe": dict.fromkeys(rows, cell(None))}
    content = {"tasks": tasks | {"ELEVATER": dict.fromkeys(rows, cell(1.0))}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    Image.effect_noise((40, 30), 50).save(tmp_path / "1.png")
    lines = []
    for negative, right in (("a cat", True), ("a cow", False), ("an ox", True)):
        item = {"image": str(tmp_path / "1.png"), "box": [5, 5, 20, 20], "group": "Relation"}
        item |= {"positive": "a dog", "negative": negative, "benchmark": "aro"}
        item |= {"scores": [0.5, 0.25], "similarity": 0.75}
        lines.append(item | {"row": "full", "right": right})
        lines.append(item | {"row": "openai", "right": negative == "an ox"})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
    run(figures.main)


def test_every_figure_is_drawn(results, monkeypatch, tmp_path):
    out = tmp_path / "figures"
    command(monkeypatch, "--results", results, "--out", out)
    names = ["fig4-5a-5c-6", "fig5b", "fig5d", "fig8", "fig9-10"]
    assert sorted(path.stem for path in out.iterdir()) == names
    for path in out.iterdir():
        dark, light = Image.open(path).convert("L").getextrema()
        assert (dark < 100, light) == (True, 255), path


@pytest.fixture
def shown(monkeypatch):
    """{figure: [(title, content) of each panel]}, in place of drawing."""
    found = {}
    keep = lambda path, plot, panels, *_, **__: found.update({path.stem: panels})  # noqa: E731
    monkeypatch.setattr(figures, "draw", keep)
    return found


def test_what_the_figures_show(results, monkeypatch, shown):
    command(monkeypatch, "--results", results, "--out", results)
    runs = results / "runs"
    [(_, content)] = shown["fig4-5a-5c-6"]
    assert list(content.values()) == [[50 + n] * 3 for n in range(len(RUNS))]  # no other rows
    kinds, differ = f"kinds {list(KINDS)}", "\nthreshold 5.0\nupper_bound 10.0\nalpha 0.2\nbeta 0.4"
    assert [*content][2] == f"{runs}/fixed/epoch_5.pt\n{kinds}{differ}"
    content = dict(shown["fig5d"])[f"{runs}/full/epoch_5.pt"]
    assert content["itc"] == [(1, 4), (2, 3), (3, 2)] and content["cmr"] == [(1, 1), (2, 2), (3, 3)]
    content = dict(shown["fig5b"])[f"{runs}/fixed/epoch_5.pt"]
    assert content["threshold_action"] == [(1, 1), (2, 1), (3, 1)]
    same = {"full": [0.75] * 3, "openai": [0.75] * 3}
    gap = {"full": [0.25] * 3, "openai": [0.25] * 3}
    assert shown["fig8"] == [("S(T, T_hn)", same), ("S(I, T) - S(I, T_hn)", gap)]
    [(_, (image, box, lines))] = shown["fig9-10"]  # the one item on which rows disagree
    assert (image, box) == (str(results / "1.png"), [5, 5, 20, 20])
    assert lines[:2] == [("a dog", figures.GREEN), ("a cat", figures.RED)]
    assert lines[2:] == [("full: right", "gray"), ("openai: wrong", "gray")]


def test_interval_is_the_normals():
    """A gap of 1 in 100 of 400 items."""
    half = 2.5758 * math.sqrt(0.25 * 0.75 / 400)
    found = figures.interval([1.0] * 100 + [0.0] * 300, 20_000)
    assert found == pytest.approx([0.25, 0.25 - half, 0.25 + half], abs=0.1 * half)


def test_bars_have_the_interval_as_error():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    figures.bars(axes, {"a": [0.5, 0.25, 1.0], "b": [2.0, 1.0, 4.0]})
    assert [bar.get_width() for bar in axes.patches] == [0.5, 2]
    segments = axes.collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[0.25, 1], [1, 4]]


def test_what_is_missing_is_said(results, monkeypatch, capsys):
    rows = {"openai": cell(40.0)}
    content = {"tasks": {"ARO-R": rows}}
    (results / "results.json").write_text(json.dumps(content))
    (results / "items.jsonl").write_text("")
    command(monkeypatch, "--results", results, "--out", results / "none")
    printed = capsys.readouterr().out
    assert printed.count("is not drawn: there is nothing to show") == 5
    assert not any((results / "none").iterdir())


def test_mistakes_are_one_line(results, monkeypatch):
    def message():
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, "--results", results, "--out", results)
        assert "\n" not in stop.value.code
        return stop.value.code

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        assert "pip install matplotlib" in message()
    (results / "results.json").write_text("{}")
    assert f"{results} is not what eval_bench.py" in message()
    (results / "results.json").unlink()
    assert "results.json: No such file" in message()


def test_captions_with_their_negatives(world, monkeypatch, tmp_path, shown):
    arguments = ["--negatives", world / "negatives.jsonl", "--images", world, "--out", tmp_path]
    command(monkeypatch, *arguments)
    panels = shown[world.name]
    records = figures.read_lines(world / "negatives.jsonl")
    assert len(panels) == 8 < sum(record["relation"] is not None for record in records)
    _, (path, box, lines) = panels[0]
    first = records[1]  # the first with a relation negative; every third kind is missing
    assert (path, box) == (world / first["image"], None)
    assert lines[:2] == [
        (first["caption"], figures.GREEN),
        (f"relation: {first['relation']}", figures.RED),
    ]
    assert len(lines) == 1 + sum(first[kind] is not None for kind in KINDS) < 5
