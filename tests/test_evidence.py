import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import ce_clip
import eval_bench

STUB = """#!/bin/bash
echo "$@" >> commands
while [ "$1" ]; do [ $1 = --out ] && mkdir -p $2 && touch $2/epoch_{1,5}.pt; shift; done
"""
LINES = """pairs,relation,4,accuracy in %,37.5,17.7,25.0 50.0
sugarcrepe,,4,accuracy in %,37.5,17.7,25.0 50.0
pairs,mean of 1 kinds,4,blind accuracy in %,50.0,0.0,50.0 50.0
pairs,relation,4,looking in %,100.0,0.0,100.0 100.0
untrained,,4,accuracy in %,37.5,17.7,25.0 50.0
pairs,relation,4,grounded gain in points,37.5,17.7,25.0 50.0
pairs,mean of 1 kinds,4,grounded gain in points,20.0,0.0,20.0 20.0
pairs,relation,4,looking beside any other image in %,68.8,8.8,62.5 75.0
pairs,right with its own image only,4,relation: items in %,37.5,17.7,25.0 50.0
pairs,wrong with both images,4,relation: items in %,62.5,17.7,75.0 50.0
captions,I2T R@1,9,recall in %,37.5,17.7,25.0 50.0
sugarcrepe_pp,ITT,2,TOT and ITT in %,25.0,35.4,0.0 50.0
pairs,gap,4,cosine x 100,3.8,1.8,2.5 5.0
log,action,,threshold in logits,1.5,0.0,1.5 1.5"""


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("evidence")


def test_commands_of_evidence_sh(tmp_path, monkeypatch, evidence):
    """With a python that only notes what it is asked, and makes folders with checkpoints."""
    shutil.copy(ROOT / "docs" / "evidence.sh", tmp_path)
    for name in ("python", "torchrun", "git"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "evidence.sh"], check=True, cwd=tmp_path, env=env)
    runs, scored = {}, {}
    for line in (tmp_path / "commands").read_text().splitlines():
        script, *words = line.replace("runs/photographs/", "").split()
        variant = words.pop(1) if script == "docs/cached_trunk.py" else ""
        if variant:
            assert words.pop(0) == "trunk.pt"
        monkeypatch.setattr(sys, "argv", [script, *words])
        if variant:
            args = ce_clip.parse_args()
            runs[args.out] = (variant, args.losses, args.gamma, *args.data, args.epochs)
            if args.out != "base":
                assert args.pretrained == "base/epoch_5.pt" and args.out.endswith(f"-{args.seed}")
        elif script == "eval_bench.py":
            args = eval_bench.parse_args()
            scored[str(args.out)] = {path.split("/")[0] for path in args.ckpt}
    assert len(runs) == 1 + 15 * 3 and len(set(runs.values())) == 1 + 15
    assert runs["eq8-centred-1"] == ("centred", "itc,hn,imc,cmr", 0.2, "train.jsonl", 1)
    assert {name[:-2] for name in runs if name.endswith("-1")} <= set(evidence.SETTINGS)
    assert scored.pop("terms/wise") == {
        f"{n}-{seed}" for n in ("eq8", "eq2-look") for seed in "123"
    }
    tried = {"eq2-1", "eq2-look-1", "eq2-look-0.1-1", "eq2-look-0.5-1"}
    assert scored.pop("gamma") == tried
    for seed in "123":
        assert scored[f"terms/{seed}"] == {name for name in runs if name.endswith(f"-{seed}")}


def test_tables(tmp_path, evidence, monkeypatch, capsys):
    of_runs = {"base": [1, 1, 1, 1], "eq2-1": [0, 0, 0, 1], "eq2-2": [0, 0, 1, 1]}
    of_runs |= {"eq8-1": [1, 1, 0, 1], "eq8-2": [1, 1, 1, 0]}
    for name, right in of_runs.items():
        row, results = f"{tmp_path}/{name}/epoch_1.pt", tmp_path / "terms" / name
        (tmp_path / name).mkdir()
        results.mkdir(parents=True)
        config = {"losses": "itc,hn,cmr", "seed": 2 if name.endswith("2") else 1}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        log = '{"threshold_action": 9}\n{"threshold_action": 1.5}\n'
        (tmp_path / name / "log.jsonl").write_text(log)
        recall = {"I2T R@1": {"value": 25.0 * sum(right), "scored": 9}, "I2T R@5": {"value": None}}
        mean = {"mean": {"value": 70.0, "blind": 50.0, "looking": 60.0, "scored": 4}}
        content = {"benchmarks": {"captions": {row: recall}, "pairs": {row: mean}}}
        (results / "results.json").write_text(json.dumps(content))
        with (results / "items.jsonl").open("w") as file:
            for image, item in zip("aabc", right):
                line = {"group": "relation", "row": row, "image": [image, None], "looking": 1.0}
                line |= {"right": item, "blind": 0, "gap": 0.1 * item, "similarity": 0.5}
                line |= {"scores": [item, 0], "other_scores": [0.5, 0.5]}
                for benchmark in ("pairs", "sugarcrepe", "sugarcrepe_pp"):
                    print(json.dumps(line | {"benchmark": benchmark}), file=file)
    table, texts = tmp_path / "a.csv", []
    for arguments in (f"{tmp_path}/terms --less eq2 --mean --csv {table}", str(table)):
        monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments.split()])
        evidence.main()
        texts.append(capsys.readouterr().out)
    # by image: a +2, +2 of 2 + 2; b 0, 0 of 1 + 1; c 0, -1 of 1 + 1
    assert (
        "accuracy in %, less that of Eq. 2\n\n| | relation | sugarcrepe | untrained |\n" in texts[0]
    )
    assert "\n| base | +62.5 [+0.0, +100.0] |" in texts[0] and "\n| Eq. 2 | +" not in texts[0]
    assert "\n| Eq. 8 | +37.5 [-50.0, +100.0] |" in texts[0] and texts[0].endswith(texts[1])
    assert "| 100.0 | 100.0 | 100.0 | 70.0 |\n| Eq. 2 | 2 | 37.5 ± 17.7 | 37.5 ± 17.7 |" in texts[1]
    assert all(f"terms,Eq. 2,2,{line}\n" in table.read_text() for line in LINES.splitlines())
