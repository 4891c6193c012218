import json
import sys

import numpy as np
import pytest
from conftest import NEGATIVE
from PIL import Image

import figures
from files import run_main

pytest.importorskip("matplotlib")


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """A call of figures.py: {file: the axes that are drawn in it}."""
    drawn, save = {}, figures.save

    def keep(figure, path):
        drawn[path.name] = figure.axes
        save(figure, path)

    def call(*arguments, out=tmp_path):
        argv = ["figures.py", *map(str, arguments), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        run_main(figures.main)
        assert all(Image.open(tmp_path / name).size[0] >= 800 for name in drawn)
        return drawn

    monkeypatch.setattr(figures, "save", keep)
    return call


def texts(items):
    return [item.get_text() for item in items]


def test_bars_of_a_csv(draw, tmp_path):
    lines = ["figure,setting,benchmark,group,items,measure,mean,std"]
    for setting, mean, std, blind in (("Eq. 1", 55, 1.5, 45), ("Eq. 8", 75, "", 65)):
        lines.append(f"terms,{setting},pairs,relation,90,accuracy in %,{mean},{std}")
        lines.append(f"terms,{setting},pairs,relation,90,blind accuracy in %,{blind},")
    lines.append("terms,Eq. 8,valse,,7,accuracy in %,60,")
    lines.append("terms,Eq. 8,captions,I2T R@1,90,recall in %,20,")
    lines.append("old,Eq. 8,pairs,relation,90,looking in %,41,2")
    (tmp_path / "a.csv").write_text("\n".join(lines))
    drawn = draw("--csv", tmp_path / "a.csv")
    assert set(drawn) == {"terms-accuracy.png", "old-looking.png"}
    relation, valse = drawn["terms-accuracy.png"]
    assert (relation.get_title(), valse.get_title()) == ("relation\n(90 items)", "valse\n(7 items)")
    assert [bar.get_width() for bar in relation.patches] == [55, 75, 45, 65]  # the blind ones last
    assert relation.patches[3].get_height() < relation.patches[1].get_height()
    assert texts(relation.texts) == ["55.0", "75.0"]
    assert texts(relation.get_yticklabels()) == ["Eq. 1", "Eq. 8"]
    assert relation.collections[0].get_segments()[0].tolist() == [[53.5, 0], [56.5, 0]]
    assert valse.patches[0].get_y() > 0 and relation.get_ylim() == (1.5, -0.5)
    assert relation.get_xlim() == valse.get_xlim() and relation.get_xlim()[0] == 40
    assert "axis starts at 40" in relation.figure.get_supxlabel()
    assert [50, 50] in [list(line.get_xdata()) for line in relation.lines]
    assert drawn["old-looking.png"][0].get_xlim()[0] == 0  # the error bar begins at 39


def test_figures_of_results(draw, tmp_path, capsys, monkeypatch):
    rows, items = {}, []
    for name, value, thresholds in (("plain", 55, {}), ("full", 75, {"threshold_relation": 0.5})):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        log = [{"step": s, "itc": 5 - s, "imc": 2, "cmr": s, **thresholds} for s in (1, 2)]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
        cell = {"value": value, "blind": 51.0, "looking": 70.0, "scored": 4}
        rows[f"{folder}/epoch_5.pt"] = {"relation": cell, "not in KINDS": cell}
        for negative in ("a cat", "a cow"):
            item = {"row": f"{folder}/epoch_5.pt", "positive": "a dog", "negative": negative}
            item |= {"image": [f"{tmp_path}/1.png", [5, 5, 20, 20]], "similarity": 0.75}
            item |= {"gap": value / 64, "right": name == "full" or negative == "a cat"}
            items.append(item | {"benchmark": "pairs"})
        items.append(items[-1] | {"benchmark": "valse"})  # the same pair in another benchmark
    Image.effect_noise((40, 30), 50).save(tmp_path / "1.png")
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": {"pairs": rows}}))
    monkeypatch.setattr(figures, "SAMPLES", 200)
    drawn = draw("--results", tmp_path)
    assert {"fig4-5a-5c-6-looking.png", "fig5d-runs-plain.png"} <= set(drawn)
    assert not {"fig8-valse.png", "fig5b-runs-plain.png"} & set(drawn)
    [axes] = drawn["fig4-5a-5c-6-accuracy.png"]
    assert [bar.get_width() for bar in axes.patches] == [55, 75, 51, 51]
    assert texts(axes.get_yticklabels()) == ["plain/epoch_5", "full/epoch_5"]
    assert "gap x 100, full/epoch_5: 117.19 [117.19, 117.19]" in capsys.readouterr().out
    assert drawn["fig8-pairs.png"][1].patches[1].get_width() == 117.1875
    losses, thresholds = drawn["fig5d-runs-full.png"][0], drawn["fig5b-runs-full.png"][0]
    assert [list(line.get_ydata()) for line in losses.lines] == [[4, 3], [2, 2], [1, 2]]
    assert [list(line.get_ydata()) for line in thresholds.lines] == [[0.5, 0.5]]
    assert losses.get_xlabel() == "training step" and "in logits" in thresholds.get_ylabel()
    expected = ["a dog", "a cow", "right: full/epoch_5", "wrong: plain/epoch_5"]
    for axes in drawn["fig9-10.png"]:  # the items on which the rows disagree
        assert texts(axes.texts) == expected
    del drawn["fig9-10.png"]
    (tmp_path / "items.jsonl").write_text(json.dumps(items[0]))
    assert "fig9-10.png" not in draw("--results", tmp_path)
    assert "there is no item on which the checkpoints disagree" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        draw("--images", tmp_path)
    assert "it needs one of --results, --csv and --negatives" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        draw("--results", tmp_path)


def test_the_interval_is_the_normals():
    found = figures.interval(np.array([1.0] * 100 + [0.0] * 300))
    half = 2.5758 * (0.25 * 0.75 / 400) ** 0.5
    assert found == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=0.1 * half)


def test_sheet_and_page_of_negatives(world, draw, tmp_path, capsys):
    arguments = ["--negatives", world / "negatives.jsonl", "--images", world]
    axes = draw(*arguments)[f"{world.name}.png"]
    assert 5 <= len(axes) <= 10
    shown = [f"{kind}: {NEGATIVE[kind]} 1" for kind in NEGATIVE if kind != "action"]
    assert texts(axes[0].texts) == ["a red dog chases a ball 1", *shown]  # it has no action
    pages = []
    for seed in (0, 1):
        draw(*arguments, "--sample", 3, "--seed", seed, out=tmp_path / "page.html")
        pages.append((tmp_path / "page.html").read_text())
    assert pages[0] != pages[1] and "http" not in pages[0]
    assert pages[0].count("<img src='data:image/jpeg;base64,") == 3 * 5
    assert "<h2>number: 16 of 24 captions</h2>" in pages[0]
    assert "a <b>blue</b> dog chases a ball" in pages[0]
    lost = {"image": "0.png", "box": [900, 0, 901, 1], "caption": "a dog", "relation": "a cat"}
    (tmp_path / "lost.jsonl").write_text(json.dumps(lost))
    draw("--negatives", tmp_path / "lost.jsonl", "--images", world, out=tmp_path / "lost.html")
    assert "<img" not in (tmp_path / "lost.html").read_text()
    left_out = f"{world / '0.png'} is absent, or does not have the region [900, 0, 901, 1]"
    assert f"left out: {left_out}\n" in capsys.readouterr().err
    assert figures.marked("a <b> dog", "a <b> cat") == "a &lt;b&gt; <b>cat</b>"
