"""Score CLIP checkpoints on compositional benchmarks: is the true caption ahead of the false one?

    python eval_bench.py                                          # the toy runs of ce_clip.py
    python eval_bench.py --ckpt runs/coco/epoch_5.pt openai --data-root data      # SugarCrepe (Table 3)
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --pairs negatives.jsonl --images DIR

A benchmark is a function that yields Item(group, image, box, positive, negative). Each distinct
picture and each distinct text is encoded once; an item is right if and only if cosine(image,
positive) > cosine(image, negative), so a tie is wrong; chance is 50 %.
"""

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import toy
from ce_clip import BadInput, Loaded, encode_text, load_model, read_json, read_negatives
from negatives import KINDS


class Item(NamedTuple):
    group: str  # subset or kind
    image: str  # path
    box: (
        tuple[int, int, int, int] | None
    )  # left, top, right, bottom in pixels; None = whole picture
    positive: str
    negative: str


# --------------------------------------------------------------------------------------------------
# Benchmarks: each yields its items, whether or not the picture is there

TOY_RUNS = {"pre-trained": "toy-pretrained", "CLIP-FT, Eq. 1": "toy-itc", "NegCLIP's loss, Eq. 2": "toy-itc-hn", "CE-CLIP, Eq. 8": "toy"}  # fmt: skip
HELD_OUT = ("swap colors", "swap phrases", "above/below", "add color", "add object")


def toy_items(root: Path) -> Iterator[Item]:
    """The toy world's test scenes: each kind of training negative, then the held-out kinds."""
    for image in read_json(root / "captions_test.json")["images"]:
        scene, rng = toy.Scene(*image["scene"]), random.Random(image["id"])
        for kind, true, false in toy.true_false_pairs(scene, rng):
            yield Item(kind, str(root / "images" / image["file_name"]), None, true, false)


def negatives_items(path: Path, images: Path) -> Iterator[Item]:
    """The four kinds of a file that negatives.py wrote."""
    for record in read_negatives(path, images):
        for kind in KINDS:
            if record[kind]:
                yield Item(kind, record["image"], None, record["caption"], record[kind])


SUGARCREPE = {
    "REPLACE": ("replace_obj", "replace_att", "replace_rel"),
    "SWAP": ("swap_obj", "swap_att"),
    "ADD": ("add_obj", "add_att"),
}
TABLE_3 = {  # the paper's rows, per subset in the order above
    "CLIP (paper)": (90.9, 80.0, 69.2, 61.4, 64.0, 77.2, 68.2),
    "NegCLIP (paper)": (92.7, 85.9, 76.5, 75.2, 75.4, 88.8, 82.8),
    "CE-CLIP (paper)": (93.1, 88.8, 79.0, 72.8, 77.0, 92.4, 93.4),
    "CE-CLIP+ (paper)": (93.8, 90.8, 83.2, 76.8, 79.3, 93.8, 94.9),
}


def sugarcrepe_items(root: Path) -> Iterator[Item]:
    """The 7 subsets of SugarCrepe (7,511 items) on COCO val2017."""
    for subset in (s for subsets in SUGARCREPE.values() for s in subsets):
        path = root / "sugarcrepe" / f"{subset}.json"
        for key, item in read_json(path).items():  # keys are not contiguous
            try:
                image = str(root / "coco" / "val2017" / item["filename"])
                yield Item(subset, image, None, item["caption"], item["negative_caption"])
            except (KeyError, TypeError) as e:
                raise BadInput(f"{path}, item {key}: not a SugarCrepe item ({e!r})") from e


# --------------------------------------------------------------------------------------------------
# Features: every distinct picture and text once


class Pictures(torch.utils.data.Dataset):
    def __init__(self, keys: list[tuple], transform):
        self.keys, self.transform = keys, transform

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i: int) -> Tensor:
        path, box = self.keys[i]
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
                return self.transform(image.crop(box) if box else image)
        except (OSError, ValueError) as e:
            raise BadInput(f"cannot read the picture {path}: {e}") from e


@torch.inference_mode()
def encode(loaded: Loaded, items: Iterable[Item], device, batch_size=64, workers=0):
    """Unit features in float32: {(image, box): (D,)}, {text: (D,)}."""
    items = list(items)
    pictures = list(dict.fromkeys((item.image, item.box) for item in items))
    texts = list(dict.fromkeys(t for item in items for t in (item.positive, item.negative)))
    texts.sort(key=len)  # batches of similar length, each cut after its last end-of-text
    model = loaded.model.to(device).eval()
    loader = DataLoader(
        Pictures(pictures, loaded.eval_transform), batch_size=batch_size, num_workers=workers
    )
    image_features, text_features = [], []
    with tqdm(total=len(pictures) + len(texts), desc=loaded.name, unit="item", leave=False) as bar:
        for batch in loader:
            image_features.append(
                model.encode_image(batch.to(device), normalize=True).float().cpu()
            )
            bar.update(len(batch))
        for start in range(0, len(texts), batch_size):
            tokens = loaded.tokenizer(texts[start : start + batch_size]).to(device)
            text_features.append(encode_text(model, tokens).float().cpu())
            bar.update(len(tokens))
    return (
        dict(zip(pictures, torch.cat(image_features))),
        dict(zip(texts, torch.cat(text_features))),
    )


# --------------------------------------------------------------------------------------------------
# Metrics: numbers in, numbers out


class Accuracy(NamedTuple):
    """Pair accuracy of one group. `right` counts cosines strictly ahead; a tie is wrong."""

    right: int
    scored: int
    ties: int
    missing: int = 0  # items without a picture

    @property
    def percent(self) -> float:
        return 100 * self.right / self.scored if self.scored else float("nan")


def pair_accuracy(positive: Tensor, negative: Tensor, missing: int = 0) -> Accuracy:
    """positive, negative (N,): cosines of the true and the false caption."""
    right, ties = (positive > negative).sum(), (positive == negative).sum()
    return Accuracy(int(right), len(positive), int(ties), missing)


def recall_at_1(sim: Tensor) -> float:
    """sim (N, N), the truth on the diagonal: percent of rows where it is strictly the largest."""
    best_other = sim.masked_fill(torch.eye(len(sim), dtype=torch.bool), -torch.inf).amax(1)
    return 100 * (sim.diagonal() > best_other).float().mean().item()


def cosines(items: list[Item], images: dict, texts: dict) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: cosine(image, positive), cosine(image, negative), cosine(positive, negative)."""
    image = torch.stack([images[i.image, i.box] for i in items])
    positive = torch.stack([texts[i.positive] for i in items])
    negative = torch.stack([texts[i.negative] for i in items])
    return (image * positive).sum(1), (image * negative).sum(1), (positive * negative).sum(1)


def by_group(items: list[Item]) -> dict[str, list[Item]]:
    groups = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


def score(items: list[Item], images: dict, texts: dict) -> dict[str, Accuracy]:
    """Accuracy of each group; items whose picture has no features count as missing."""
    out = {}
    for group, members in by_group(items).items():
        there = [i for i in members if (i.image, i.box) in images]
        pos, neg, _ = cosines(there, images, texts) if there else (torch.empty(0),) * 3
        out[group] = pair_accuracy(pos, neg, len(members) - len(there))
    return out


# --------------------------------------------------------------------------------------------------
# Reports: the features of one checkpoint in, a row of a table out


def toy_row(items: list[Item], images: dict, texts: dict) -> dict[str, str]:
    """Accuracies, R@1 of the full descriptions (chance 0.1 %), and the similarities of Fig. 8."""
    scores = score(items, images, texts)
    row = {group: f"{scores[group].percent:.1f}" for group in (*KINDS, *HELD_OUT)}
    groups = by_group(items)
    image = torch.stack([images[i.image, i.box] for i in groups["object"]])
    sim = image @ torch.stack([texts[i.positive] for i in groups["object"]]).T
    row |= {"I2T R@1": f"{recall_at_1(sim):.1f}", "T2I R@1": f"{recall_at_1(sim.T):.1f}"}
    trained = [i for kind in KINDS for i in groups[kind]]
    positive, negative, between = cosines(trained, images, texts)
    gap = (positive - negative).mean()
    return row | {"S(T,Tk)": f"{between.mean():.3f}", "S(I,T)-S(I,Tk)": f"{gap:.3f}"}


def sugarcrepe_averages(percent: dict[str, float]) -> dict[str, float]:
    """REPLACE, SWAP, ADD: unweighted means over their subsets (Table 3); macro over all 7 (Table 5)."""
    means = {
        name: sum(percent[s] for s in subsets) / len(subsets)
        for name, subsets in SUGARCREPE.items()
    }
    return means | {"macro": sum(percent.values()) / len(percent)}


def sugarcrepe_row(items: list[Item], images: dict, texts: dict) -> dict[str, str]:
    scores = score(items, images, texts)
    row = {s: a.percent for s, a in scores.items()}
    micro = (
        100 * sum(a.right for a in scores.values()) / max(1, sum(a.scored for a in scores.values()))
    )
    return {k: f"{v:.1f}" for k, v in (row | sugarcrepe_averages(row) | {"micro": micro}).items()}


def pairs_row(items: list[Item], images: dict, texts: dict) -> dict[str, str]:
    scores = score(items, images, texts)
    return {group: f"{a.percent:.1f} ({a.scored})" for group, a in scores.items()}


def print_table(title: str, rows: dict[str, dict[str, str]]) -> None:
    """A markdown table; columns are the union of the rows' keys."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [
        ["", *columns],
        *([name, *(row.get(c, "") for c in columns)] for name, row in rows.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}\n")
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def counts(scores: dict[str, Accuracy]) -> str:
    return "; ".join(
        f"{group}: {a.scored} scored, {a.missing} missing, {a.ties} ties"
        for group, a in scores.items()
    )


# --------------------------------------------------------------------------------------------------
# Command line


def toy_checkpoints() -> dict[str, str]:
    """{row name: last checkpoint} of the runs that `python ce_clip.py` made."""
    found = {}
    for name, folder in TOY_RUNS.items():
        epochs = Path("runs", folder).glob("epoch_*.pt")
        if last := max(epochs, key=lambda p: int(p.stem.split("_")[1]), default=None):
            found[name] = str(last)
    if not found:
        raise BadInput("no runs/toy*: run python ce_clip.py first, or give --ckpt")
    return found


class Benchmark(NamedTuple):
    title: str
    items: list[Item]
    row: object  # (items, image features, text features) -> {column: cell}
    reference: dict[str, dict[str, str]] = {}  # rows of the paper


def plan(args: argparse.Namespace) -> list[Benchmark]:
    benchmarks = []
    if args.data_root:
        subsets = [s for group in SUGARCREPE.values() for s in group]
        paper = {}
        for name, values in TABLE_3.items():
            row = dict(zip(subsets, values))
            paper[name] = {k: f"{v:.1f}" for k, v in (row | sugarcrepe_averages(row)).items()}
        items = list(sugarcrepe_items(Path(args.data_root)))
        title = "SugarCrepe, pair accuracy in % (Table 3)"
        benchmarks.append(Benchmark(title, items, sugarcrepe_row, paper))
    if args.pairs:
        items = list(negatives_items(Path(args.pairs), Path(args.images)))
        title = f"{args.pairs}, pair accuracy in % (pairs scored)"
        benchmarks.append(Benchmark(title, items, pairs_row))
    if not benchmarks:
        root = Path("data/toy")
        if not (root / "captions_test.json").exists():
            toy.make_world(root)
        title = (
            "Toy world, 1,000 unseen scenes: pair accuracy in %, R@1 in %, mean cosines (Fig. 8)"
        )
        benchmarks.append(Benchmark(title, list(toy_items(root)), toy_row))
    return benchmarks


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--ckpt", nargs="+", help="checkpoints of ce_clip.py, or open_clip tags (openai)"
    )
    p.add_argument("--model", help="open_clip model of tags and bare weights [ViT-B-32-quickgelu]")
    p.add_argument(
        "--data-root", help="score SugarCrepe: sugarcrepe/*.json, coco/val2017/ below it"
    )
    p.add_argument("--pairs", help="score a .jsonl of negatives.py")
    p.add_argument("--images", help="picture folder of --pairs")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--workers", type=int, default=0, help="loader processes")
    args = p.parse_args()
    if bool(args.pairs) != bool(args.images):
        p.error("--pairs and --images go together")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoints = {c: c for c in args.ckpt} if args.ckpt else toy_checkpoints()
    benchmarks = plan(args)
    every = [item for b in benchmarks for item in b.items]
    there = {image: Path(image).exists() for image in {item.image for item in every}}
    present = [item for item in every if there[item.image]]
    if not present:
        raise BadInput(
            f"none of the pictures is there; the first one missing is {next(iter(there))}"
        )
    rows, notes = (
        {b.title: dict(b.reference) for b in benchmarks},
        {b.title: [] for b in benchmarks},
    )
    for name, path in checkpoints.items():
        loaded = load_model(path, args.model)
        images, texts = encode(loaded, present, device, args.batch_size, args.workers)
        for b in benchmarks:
            rows[b.title][name] = b.row(b.items, images, texts)
            notes[b.title].append(f"{name}: {counts(score(b.items, images, texts))}")
    for b in benchmarks:
        scored = sum(there[item.image] for item in b.items)
        partial = f" - PARTIAL: {scored} of {len(b.items)} items, compare with no other table"
        print_table(b.title + (partial if scored < len(b.items) else ""), rows[b.title])
        print("\n".join(["", *notes[b.title]]))


if __name__ == "__main__":
    try:
        main()
    except BadInput as e:
        sys.exit(f"eval_bench.py: error: {e}")
