import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import ce_clip
import eval_bench
from negatives import FOUR as KINDS


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("evidence")


STUB = """#!/bin/bash
echo "$@" >> commands
if [[ "$@" = *ce_clip.py* ]]; then
    while [ $1 != --out ]; do shift; done
    mkdir -p $2
    touch $2/epoch_{1,5}.pt
fi
"""


def test_commands_of_evidence_sh(tmp_path, monkeypatch, evidence):
    """With a python that only notes what it is asked, and makes folders with checkpoints."""
    shutil.copy(ROOT / "docs" / "evidence.sh", tmp_path)
    for name in ("python", "torchrun", "git"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "evidence.sh"], check=True, cwd=tmp_path, env=env)
    runs, scored, made = {}, {}, []
    for line in (tmp_path / "commands").read_text().splitlines():
        line = line.removeprefix("--nproc_per_node 2 ")
        monkeypatch.setattr(sys, "argv", line.split())
        if sys.argv[0] == "ce_clip.py":
            args = ce_clip.parse_args()
            runs[args.out] = args
        elif "negatives" in sys.argv[0]:
            made.append(sys.argv[sys.argv.index("--out") + 1])
        elif sys.argv[0] == "eval_bench.py":
            args = eval_bench.parse_args()
            assert args.blind and str(args.pairs) in made
            scored[str(args.out)] = args.ckpt
    base = "runs/photographs/base"
    assert runs.pop(base).epochs == 5
    assert len(runs) == 9 * 3
    assert all(args.pretrained == f"{base}/epoch_5.pt" for args in runs.values())
    for seed in "123":
        of_seed = {f"{out}/epoch_1.pt" for out in runs if out.endswith(seed)}
        assert set(scored[f"runs/photographs/results/{seed}"]) == of_seed
        assert len(scored[f"runs/photographs/results-old/{seed}"]) == 3
    settings = set()
    for out, args in runs.items():
        assert args.seed == int(out[-1])
        settings.add((out[:-2], args.losses, args.upper_bound, *args.data))
    assert len(settings) == 9 and len({setting[1:] for setting in settings}) == 9
    assert runs["runs/photographs/eq8-old-1"].data == ["runs/photographs/old_train.jsonl"]
    of_eq8 = [f"runs/photographs/eq8-{seed}/epoch_1.pt" for seed in "123"]
    assert scored["runs/photographs/results/wise"] == of_eq8
    names = {Path(out).name[:-2] for out in runs} | {"base", "eq8, WiSE 0.5"}
    assert names == set(evidence.SETTINGS)


def write_results(folder, row, right):
    """Three pictures: of two items, of one, of one; their decisions."""
    folder.mkdir(parents=True)
    lines = []
    for picture, item in zip("aabc", right):
        line = {"benchmark": "pairs", "row": row, "group": "relation", "picture": [picture, None]}
        line.update(right=bool(item), blind=False, looking=1.0, gap=0.1 * item, similarity=0.5)
        lines.append(json.dumps(line))
    (folder / "items.jsonl").write_text("\n".join(lines))
    content = {"pairs": {row: {"relation": {"value": 25.0 * sum(right)}}}}
    (folder / "results.json").write_text(json.dumps({"benchmarks": content}))
    Path(row).parent.mkdir(parents=True)
    log = [{f"threshold_{kind}": threshold for kind in KINDS} for threshold in (9, 1.5)]
    Path(row).with_name("log.jsonl").write_text("\n".join(map(json.dumps, log)))


def test_tables(tmp_path, evidence, monkeypatch, capsys):
    runs = {"base": [1, 1, 1, 1], "eq2-1": [0, 0, 0, 1], "eq2-2": [0, 0, 1, 1]}
    runs |= {"eq8-1": [1, 1, 0, 1], "eq8-2": [1, 1, 1, 0]}
    for name, right in runs.items():
        write_results(tmp_path / "results" / name, f"{tmp_path}/{name}/epoch_1.pt", right)
    found = evidence.read(tmp_path / "results")
    assert {name: set(seeds) for name, seeds in found.items()} == {
        "base": {""},
        "eq2": {"1", "2"},
        "eq8": {"1", "2"},
    }
    cells = evidence.accuracies(found["base"])
    assert cells == {"seeds": "1", "relation (4)": "100.0 / 0.0 / 100.0"}
    cell = evidence.accuracies(found["eq2"])["relation (4)"]
    assert cell == "37.5 ± 17.7 / 0.0 ± 0.0 / 100.0 ± 0.0"
    # by picture: a +2, +2 of 2 + 2; b 0, 0 of 1 + 1; c 0, -1 of 1 + 1
    cell = evidence.differences(found["eq8"], found["eq2"], "right")["relation"]
    assert cell == "+37.5 [-50.0, +100.0]"
    cell = evidence.differences(found["base"], found["eq2"], "right")["relation"]
    assert cell == "+62.5 [+0.0, +100.0]"
    cell = evidence.differences(found["base"], found["eq2"], "looking")["relation"]
    assert cell == "+0.0 [+0.0, +0.0]"
    assert evidence.others(found["eq8"])["gap"] == "7.5 ± 0.0"
    assert evidence.thresholds(found["eq8"])["action"] == "1.5 ± 0.0"
    monkeypatch.setattr(sys, "argv", ["evidence.py", str(tmp_path / "results"), "eq8"])
    evidence.main()
    printed = capsys.readouterr().out
    right = printed.split("Less that of Eq. 8: right\n")[1].split("Less that")[0]
    rows = "| base | +25.0 [+0.0, +50.0] |\n| Eq. 2 | -37.5 [-100.0, +50.0] |"
    assert right.strip() == f"| | relation |\n|---|---|\n{rows}"


def test_an_itt_item_is_two_decisions(evidence):
    lines = [{"right": right} for right in (True, False, True, True, False, False, True, True)]
    items = {"sugarcrepe_pp": lines, "pairs": [{"similarity": 0.8, "gap": 0.1}]}
    cells = evidence.others({"1": {"cells": {("sugarcrepe_pp", "TOT swap"): 20.0}, "items": items}})
    expected = {"TOT swap": "20.0", "ITT, over 4 items": "50.0"}
    assert cells == expected | {"similarity": "80.0", "gap": "10.0"}


def test_bootstrap_is_over_pictures(evidence):
    """400 items of one picture are one: no interval; of 400 pictures the binomial one."""

    def runs(pictures, right):
        items = zip(pictures, right)
        lines = [{"group": "relation", "picture": [p, None], "right": bool(r)} for p, r in items]
        return {"1": {"items": {"pairs": lines, "sugarcrepe": [], "valse": []}}}

    right, none = [1, 1, 1, 0] * 100, [0] * 400
    alone = evidence.differences(runs("a" * 400, right), runs("a" * 400, none), "right")
    assert alone["relation"] == "**+75.0 [+75.0, +75.0]**"
    each = evidence.differences(runs(range(400), right), runs(range(400), none), "right")
    low, high = map(float, each["relation"].strip("*").split("[")[1].strip("]").split(","))
    spread = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((75 - spread, 75 + spread), abs=0.5)
