"""toy.py: the world's truth and its files; the commands of toy.sh and ablate.sh."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

import ce_clip
import eval_bench
import toy
from files import BadInput, read_captions
from negatives import PAPER_KINDS, generate

KINDS = {*PAPER_KINDS, "swap phrases", "swap colors", "above/below", "add color", "add object"}
CHASE = toy.Scene("cat", "red", "chasing", "ball", "blue")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder data/toy of a small world, with its negatives."""
    data = tmp_path_factory.mktemp("small") / "data" / "toy"
    toy.make_world(data, train=192, test=40)
    generate(data / "captions_train.json", data / "negatives_train.jsonl", "ngram")
    return data


@pytest.mark.parametrize("split, size, tolerance", [("train", 192, 0.005), ("test", 40, 0)])
def test_captions_are_true_and_negatives_false(data, split, size, tolerance):
    """The generator may err a little: for "a boat barn" it took a colour for a noun."""
    scene, images = {}, json.loads((data / f"captions_{split}.json").read_text())["images"]
    for image in images:
        scene[image["file_name"]] = toy.Scene(*image["scene"])
        assert (data / "images" / image["file_name"]).exists()
    captions = read_captions(data / f"captions_{split}.json")
    assert all(toy.is_true(entry["caption"], scene[entry["image"]]) for entry in captions)
    count, wrong = Counter(), 0
    for record in map(json.loads, (data / f"negatives_{split}.jsonl").read_text().splitlines()):
        for kind in KINDS & record.keys():
            if record[kind]:
                count[kind] += 1
                expected = None if kind == "add object" else False  # it is beyond the grammar
                wrong += toy.is_true(record[kind], scene[record["image"]]) is not expected
    assert wrong <= tolerance * count.total()
    if split == "train":
        assert min(count[kind] for kind in PAPER_KINDS) > 150
    else:
        texts = [toy.describe(scene[image["file_name"]]) for image in images]
        assert [entry["caption"] for entry in captions] == texts
        assert count.keys() == KINDS
        assert count["action"] + count["above/below"] == count["relation"] == size
        train = json.loads((data / "captions_train.json").read_text())["images"]
        assert not {tuple(image["scene"]) for image in train} & set(scene.values())


def test_the_world_is_made_once_and_depends_on_the_seed(data, tmp_path, monkeypatch):
    for seed in (0, 1):
        toy.make_world(tmp_path, seed, train=192, test=40)
        for file in ("captions_train.json", "negatives_test.jsonl", "images/00007.png"):
            same = (tmp_path / file).read_bytes() == (data / file).read_bytes()
            assert same == (seed == 0)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(data)])
    with pytest.raises(BadInput, match="already holds a world"):
        toy.main()


def test_a_caption_names_what_is_in_the_image_and_each_word_is_one_token(data):
    """Images differ by all that a caption names. [END] has the highest number."""
    scenes = [CHASE, CHASE._replace(subject="fish"), CHASE._replace(object="tree")]
    scenes += [CHASE._replace(subject_color="pink"), CHASE._replace(object_color="white")]
    scenes += [CHASE._replace(relation=r) for r in toy.RELATIONS if r != "chasing"]
    images = [toy.draw_scene(scene, random.Random(3)) for scene in [*scenes, CHASE]]
    assert images[0].size == (64, 64)
    assert len({image.tobytes() for image in images}) == len(scenes)
    above = CHASE._replace(relation="above")
    assert toy.is_true("a blue ball is below a cat", above) is True
    for text in ("a ball is above a cat", "a cat is below a ball", "a red ball"):
        assert toy.is_true(text, above) is False
    tokenizer = ce_clip.build_model(str(data / "model.json")).tokenizer
    tokens = tokenizer([*toy.OBJECTS, *toy.COLORS, *toy.RELATIONS, "a", "is", "and"])
    assert set(tokens.argmax(1).tolist()) == {2}  # start, word, end
    assert len(set(tokens[:, 1].tolist()) - {toy.TOKENS["[UNK]"]}) == len(tokens)
    longest = tokenizer(["a red cat is riding a yellow fish and a black star"])
    assert longest.shape == (1, 16) and longest.argmax() == 12 + 1


def run_script(text: str, folder, python_folder, option) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{python_folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", text, "script", option], check=True, cwd=folder, env=env)


def test_toy_sh_on_a_small_world(data):
    """Every command after the world and the negatives, with one epoch each."""
    text = (ROOT / "toy.sh").read_text().replace("--batch-size 64", "--batch-size 32")
    text = re.sub(r"(ce_clip|eval_bench)\.py", rf"{ROOT}/\1.py", text)
    run_script(text, data.parent.parent, os.path.dirname(sys.executable), "--quick")
    results = data.parent.parent / "runs" / "toy-quick" / "results" / "results.json"
    tables = json.loads(results.read_text())["benchmarks"]
    assert len(tables["captions"]) == 4
    assert [row.keys() for row in tables["pairs"].values()] == 4 * [KINDS | {"mean"}]


def test_commands_of_ablate_sh(tmp_path, monkeypatch):
    """With a python that only notes what it is asked: all flags exist, and all checkpoints."""
    (tmp_path / "toy.sh").symlink_to(ROOT / "toy.sh")
    (tmp_path / "python").write_text('#!/bin/bash\necho "$@" >> commands\n')
    (tmp_path / "python").chmod(0o755)
    run_script((ROOT / "ablate.sh").read_text(), tmp_path, tmp_path, "7")
    made = set()
    for line in (tmp_path / "commands").read_text().splitlines():
        line = line.replace("docs/variants.py unweighted none", "ce_clip.py")
        monkeypatch.setattr(sys, "argv", line.split())
        if line.startswith("ce_clip.py"):
            args = ce_clip.parse_args()
            assert args.seed == 7 and args.pretrained in made | {"none"}
            made.add(f"{args.out}/epoch_{args.epochs}.pt")
        elif line.startswith("eval_bench.py"):
            assert made.issuperset(eval_bench.parse_args().ckpt)
    assert len(made) == 4 + 3 + 4 + 3 + 4 + 6 + 4 + 5
