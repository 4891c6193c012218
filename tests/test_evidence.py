import csv
import importlib
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, flat, tiny

import ce_clip
import eval_bench
import files

STUB = """#!/bin/bash
echo "$@" >> commands
while [ "$1" ]; do [ $1 = --out ] && mkdir -p $2 && touch $2/epoch_{1,5}.pt; shift; done
"""
LINES = """pairs,relation,4,accuracy in %,37.5,17.7,25.0 50.0
sugarcrepe,,4,accuracy in %,37.5,17.7,25.0 50.0
pairs,mean of 1 kinds,4,blind accuracy in %,50.0,0.0,50.0 50.0
pairs,relation,4,looking in %,100.0,0.0,100.0 100.0
by text,"relation, text misleads",2,"accuracy in %, by text",0.0,0.0,0.0 0.0
by text,"relation, text tells little",1,"accuracy in %, by text",50.0,70.7,0.0 100.0
by text,"relation, text tells",1,"accuracy in %, by text",100.0,0.0,100.0 100.0
untrained,,4,accuracy in %,37.5,17.7,25.0 50.0
pairs,relation,4,grounded gain in points,12.5,17.7,0.0 25.0
pairs,mean of 1 kinds,4,grounded gain in points,20.0,0.0,20.0 20.0
pairs,relation,4,looking beside any other image in %,68.8,8.8,62.5 75.0
pairs,right with its own image only,4,relation: items in %,12.5,17.7,0.0 25.0
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
        variant = words.pop(0) if script == "docs/variants.py" else ""
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
    assert len(runs) == 1 + 16 * 3 and len(set(runs.values())) == 1 + 16
    assert runs["eq8-centred-1"] == ("centred", "itc,hn,imc,cmr", 0.2, "train.jsonl", 1)
    assert {name[:-2] for name in runs if name.endswith("-1")} <= set(evidence.SETTINGS)
    assert scored.pop("terms/wise") == {
        f"{n}-{seed}" for n in ("eq8", "eq2-look") for seed in "123"
    }
    tried = {"eq2-1", "eq2-look-1", "eq2-look-0.1-1", "eq2-look-0.5-1"}
    assert scored.pop("gamma") == tried
    for seed in "123":
        assert scored[f"terms/{seed}"] == {name for name in runs if name.endswith(f"-{seed}")}


@pytest.fixture
def variants(monkeypatch):
    """This is docs/variants.py. The functions that it replaces in other modules are restored."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    module = importlib.import_module("variants")
    for owner, name in ((ce_clip, "load_model"), (files, "open_image"), (ce_clip, "looking_loss")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(ce_clip, "similarities", ce_clip.similarities)
    return module


def test_a_run_with_cached_features(variants, world, tmp_path, monkeypatch):
    config = json.loads((world / "tiny.json").read_text())
    config["vision_cfg"] = {"timm_model_name": "test_efficientnet", "timm_model_pretrained": False}
    config["vision_cfg"] |= {"timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    start = ce_clip.build_model("small", None, config)
    files.save_checkpoint(tmp_path / "start.pt", start)
    before = {name: weight.clone() for name, weight in start.model.state_dict().items()}
    for name in ("one", "two"):
        options = [*tiny(world, tmp_path / name), "--lock-image", "--losses", "itc,hn,look"]
        options[options.index("none")] = str(tmp_path / "start.pt")
        arguments = ["variants.py", "unweighted", str(tmp_path / "cache.pt"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        variants.main()
    cache = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert cache.keys() == {f"{i}.png" for i in range(24)}
    assert cache["0.png"].shape[0] == 8 and (cache["0.png"][0] != cache["0.png"][1]).any()
    states = [ce_clip.load_model(str(tmp_path / n / "epoch_2.pt")).model for n in ("one", "two")]
    assert flat(states[0].state_dict()) == flat(states[1].state_dict())  # a run with a cache again
    for name, weight in states[0].state_dict().items():
        assert torch.equal(weight, before[name]) == name.startswith("visual.trunk.")
    monkeypatch.setattr(sys, "argv", ["variants.py", "other", "none", *options])
    with pytest.raises(files.BadInput, match="^other is not a variant"):
        variants.main()


def test_variants_of_looking_loss_by_hand(variants):
    """The lead of the caption is .5 for its own image and .25 for the other one; d = (0, 1)."""
    image = torch.tensor([[0.25, 1.0], [1.0, 0.5]])
    text = torch.tensor([[[0.0, 1.0], [0.0, 0.5]], [[9.0, 9.0], [9.0, 9.0]]])
    valid = torch.tensor([[True], [False]])
    expected = {"unweighted": math.log1p(math.exp(-0.5)), "residual": 0.5 * math.log(2)}
    expected["own-length"] = 0.5 * math.log1p(math.exp(-0.25))
    for variant, loss in expected.items():
        found = variants.other_looking_loss(image, text, torch.tensor(1.0), valid, variant)
        assert found.item() == pytest.approx(loss / 2, rel=1e-5)


def test_items_apart_by_what_text_tells(tmp_path, monkeypatch, capsys):
    """Of the test's negatives one has a word that marks negatives, and one a captions' word."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(ROOT / "docs")
    text_only = importlib.import_module("text_only")
    kinds = ("relation", "attribute", "action", "object")
    for name, negatives in {"train": ["a sad cat"] * 9, "test": ["the sad cat", "a dog"]}.items():
        records = [{"caption": "a dog"} | dict.fromkeys(kinds, text) for text in negatives]
        records.append({"caption": "a dog"} | dict.fromkeys(kinds))
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    options = f"--train {tmp_path}/train --test {tmp_path}/test --out {tmp_path}/out.csv"
    monkeypatch.setattr(sys, "argv", ["text_only.py", *options.split()])
    text_only.main()
    assert "relation: text alone is right in 50.0 % of 2 items\n" in capsys.readouterr().out
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 and lines[0]["negative"] == "the sad cat"
    assert float(lines[0]["margin"]) > 1 and float(lines[1]["margin"]) == 0


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
                line |= {
                    "right": item,
                    "blind": int(image == "c"),
                    "gap": 0.1 * item,
                    "similarity": 0.5,
                }
                line |= {"scores": [item, 0], "other_scores": [0.5, 0.5]}
                line |= {"positive": "a dog", "negative": "a cat " + image}
                for benchmark in ("pairs", "sugarcrepe", "sugarcrepe_pp"):
                    print(json.dumps(line | {"benchmark": benchmark}), file=file)
    margins = (
        "kind,caption,negative,margin\nrelation,a dog,a cat a,-0.5\nrelation,a dog,a cat b,.4\n"
    )
    (tmp_path / "margins.csv").write_text(margins + "relation,a dog,a cat c,0.5\n")
    table, texts = tmp_path / "a.csv", []
    options = f"--text-only {tmp_path}/margins.csv --less eq2 --mean --csv {table}"
    for arguments in (f"{tmp_path}/terms {options}", str(table)):
        monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments.split()])
        evidence.main()
        texts.append(capsys.readouterr().out)
    # by image: a +2, +2 of 2 + 2; b 0, 0 of 1 + 1; c 0, -1 of 1 + 1
    assert (
        "accuracy in %, less that of Eq. 2\n\n| | relation | sugarcrepe | untrained |\n" in texts[0]
    )
    assert (
        "\n| | relation, text misleads | relation, text tells little | relation, text tells |"
        in texts[0]
    )
    assert "\n| base | +62.5 [+0.0, +100.0] |" in texts[0] and "\n| Eq. 2 | +" not in texts[0]
    assert "\n| Eq. 8 | +37.5 [-50.0, +100.0] |" in texts[0] and texts[0].endswith(texts[1])
    assert "| 100.0 | 100.0 | 100.0 | 70.0 |\n| Eq. 2 | 2 | 37.5 ± 17.7 |" in texts[1]
    assert all(f"terms,Eq. 2,2,{line}\n" in table.read_text() for line in LINES.splitlines())
