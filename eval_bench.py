"""Score CLIP checkpoints on compositional benchmarks: is the true caption ahead of the false one?

    python eval_bench.py                                       # the toy runs of ce_clip.py
    python eval_bench.py --ckpt runs/coco/epoch_5.pt openai --data-root data    # SugarCrepe
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --pairs negatives.jsonl --images DIR

A benchmark is a function that yields Item(group, image, box, positive, negative). Each distinct
picture and each distinct text is encoded once; an item is right if and only if cosine(image,
positive) > cosine(image, negative), so a tie is wrong; chance is 50 %.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import toy
from ce_clip import (
    KINDS,
    BadInput,
    Loaded,
    Negatives,
    encode_text,
    load_image,
    load_model,
    read_json,
    reading,
    run,
)


class Item(NamedTuple):
    group: str  # subset or kind
    image: str  # path
    box: tuple[int, int, int, int] | None  # left, top, right, bottom in pixels; None = all of it
    positive: str
    negative: str


# ---- Benchmarks: each yields its items, whether or not the picture is there ----------------------

TOY_RUNS = {  # row of the table: run of ce_clip.py
    "pre-trained": "toy-pretrained",
    "CLIP-FT (Eq. 1)": "toy-itc",
    "NegCLIP's loss (Eq. 2)": "toy-itc-hn",
    "CE-CLIP (Eq. 8)": "toy",
}


def toy_items(root: Path) -> list[Item]:
    """The toy world's test scenes: each kind of training negative, then the held-out kinds."""
    items = []
    for image in read_json(root / "captions_test.json")["images"]:
        scene, rng = toy.Scene(*image["scene"]), random.Random(image["id"])
        for kind, true, false in toy.true_false_pairs(scene, rng):
            items.append(Item(kind, str(root / "images" / image["file_name"]), None, true, false))
    return sorted(items, key=lambda item: (*KINDS, *toy.HELD_OUT).index(item.group))


def negatives_items(path: Path, images: Path) -> Iterator[Item]:
    """The four kinds of a file that negatives.py wrote."""
    records = Negatives(path, images)
    for kind in KINDS:
        for record in records:
            if record[kind]:
                yield Item(kind, record["image"], record["box"], record["caption"], record[kind])


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
        with reading(path, "a file of SugarCrepe"):
            entries = read_json(path).items()  # keys are not contiguous
        for key, item in entries:
            with reading(f"{path}, item {key},", "an item of SugarCrepe"):
                image = str(root / "coco" / "val2017" / item["filename"])
                item = Item(subset, image, None, item["caption"], item["negative_caption"])
            yield item


# ---- Features: every distinct picture and text once ----------------------------------------------


class Pictures(Dataset):
    def __init__(self, keys: list[tuple], transform: Callable):
        self.keys, self.transform = keys, transform

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i: int) -> Tensor:
        path, box = self.keys[i]
        return load_image(path, self.transform, box)


class Features(NamedTuple):
    """Unit features in float32 on the CPU; an item whose picture is missing has none."""

    images: dict[tuple, Tensor]  # (path, box) -> (D,)
    texts: dict[str, Tensor]  # text -> (D,)

    def cosines(self, items: list[Item]) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) each: cosine(image, positive), cosine(image, negative), cosine(both texts)."""
        width = next(iter(self.texts.values())).shape
        image, positive, negative = (
            torch.stack(rows) if rows else torch.empty(0, *width)
            for rows in (
                [self.images[i.image, i.box] for i in items],
                [self.texts[i.positive] for i in items],
                [self.texts[i.negative] for i in items],
            )
        )
        return (image * positive).sum(1), (image * negative).sum(1), (positive * negative).sum(1)


@torch.inference_mode()
def encode(loaded: Loaded, items: list[Item], device, batch_size=64, workers=0) -> Features:
    pictures = list(dict.fromkeys((item.image, item.box) for item in items))
    texts = list(dict.fromkeys(t for item in items for t in (item.positive, item.negative)))
    texts.sort(key=len)  # batches of similar length, each cut after its last end-of-text
    model = loaded.model.to(device).eval()
    dataset = Pictures(pictures, loaded.eval_transform)
    image_rows, text_rows = [], []
    with tqdm(total=len(pictures) + len(texts), desc=loaded.name, unit="item", leave=False) as bar:
        for batch in DataLoader(dataset, batch_size, num_workers=workers):
            image_rows += model.encode_image(batch.to(device), normalize=True).float().cpu()
            bar.update(len(batch))
        for start in range(0, len(texts), batch_size):
            tokens = loaded.tokenizer(texts[start : start + batch_size])
            text_rows += encode_text(model, tokens).float().cpu()
            bar.update(len(tokens))
    return Features(dict(zip(pictures, image_rows)), dict(zip(texts, text_rows)))


# ---- Metrics: numbers in, numbers out ------------------------------------------------------------


class Accuracy(NamedTuple):
    """Pair accuracy of one group. A tie is wrong; chance is 50 %."""

    right: int
    scored: int
    ties: int
    missing: int = 0  # items without a picture

    @property
    def percent(self) -> float:
        return 100 * self.right / self.scored if self.scored else float("nan")


def pair_accuracy(positive: Tensor, negative: Tensor, missing: int = 0) -> Accuracy:
    """positive, negative (N,): similarities of the true and the false caption; right if >."""
    right, ties = (positive > negative).sum(), (positive == negative).sum()
    return Accuracy(int(right), len(positive), int(ties), missing)


def recall_at_1(sim: Tensor) -> float:
    """sim (N, N), the truth on the diagonal -> percent of rows where it is strictly the largest."""
    best_other = sim.masked_fill(torch.eye(len(sim), dtype=torch.bool), -torch.inf).amax(1)
    return 100 * (sim.diagonal() > best_other).float().mean().item()


def by_group(items: list[Item]) -> dict[str, list[Item]]:
    groups = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


def score(items: list[Item], features: Features) -> dict[str, Accuracy]:
    """The accuracy of each group, in the items' order."""
    out = {}
    for group, members in by_group(items).items():
        there = [i for i in members if (i.image, i.box) in features.images]
        positive, negative, _ = features.cosines(there)
        out[group] = pair_accuracy(positive, negative, len(members) - len(there))
    return out


# ---- Reports: what a benchmark shows beside the accuracy of its groups, {column: number} ---------


def toy_extra(scores: dict[str, Accuracy], items: list[Item], features: Features) -> dict:
    """R@1 among the full descriptions of all scenes, and the mean similarities of Fig. 8."""
    groups = by_group(items)
    image = torch.stack([features.images[i.image, i.box] for i in groups["object"]])
    sim = image @ torch.stack([features.texts[i.positive] for i in groups["object"]]).T
    positive, negative, texts = features.cosines([i for kind in KINDS for i in groups[kind]])
    gap = (positive - negative).mean().item()
    recalls = {"I2T R@1": recall_at_1(sim), "T2I R@1": recall_at_1(sim.T)}
    return recalls | {"S(T,Tk) %": 100 * texts.mean().item(), "S(I,T)-S(I,Tk) %": 100 * gap}


def sugarcrepe_extra(scores: dict[str, Accuracy], *_) -> dict:
    """Unweighted means over subsets, as in Table 3 and 5, and over items (SugarCrepe's authors)."""
    right, scored = sum(a.right for a in scores.values()), sum(a.scored for a in scores.values())
    averages = sugarcrepe_averages({subset: a.percent for subset, a in scores.items()})
    return averages | {"micro": 100 * right / max(1, scored)}


def sugarcrepe_averages(percent: dict[str, float]) -> dict[str, float]:
    groups = {name: [percent[s] for s in subsets] for name, subsets in SUGARCREPE.items()}
    groups["macro"] = list(percent.values())
    return {name: sum(values) / len(values) for name, values in groups.items()}


def print_table(title: str, rows: dict[str, dict]) -> None:
    """A markdown table; its columns are those of the last row, numbers have one decimal."""
    columns = list(list(rows.values())[-1])
    lines = [["", *columns]]
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        lines.append([name, *(f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    table = "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
    print(f"\n{title}\n\n{table}")


# ---- Command line --------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    title: str
    items: list[Item]
    extra: Callable = lambda *_: {}  # (scores, items, features) -> further columns
    reference: dict[str, dict] = {}  # rows of the paper


def plan(args: argparse.Namespace) -> list[Benchmark]:
    benchmarks = []
    if args.data_root:
        subsets = [subset for group in SUGARCREPE.values() for subset in group]
        paper = {name: dict(zip(subsets, values)) for name, values in TABLE_3.items()}
        paper = {name: row | sugarcrepe_averages(row) for name, row in paper.items()}
        items = list(sugarcrepe_items(Path(args.data_root)))
        benchmarks.append(Benchmark("SugarCrepe (Table 3)", items, sugarcrepe_extra, paper))
    if args.pairs:
        items = list(negatives_items(Path(args.pairs), Path(args.images)))
        benchmarks.append(Benchmark(f"Negatives of {args.pairs}", items))
    if not benchmarks:
        root = Path("data", "toy")
        if not (root / "captions_test.json").exists():
            toy.make_world(root)
        benchmarks.append(Benchmark("Toy world, unseen scenes", toy_items(root), toy_extra))
    return benchmarks


def toy_checkpoints() -> dict[str, str]:
    """{row: last checkpoint} of the runs that `python ce_clip.py` made."""
    found = {}
    for row, folder in TOY_RUNS.items():
        epochs = Path("runs", folder).glob("epoch_*.pt")
        if last := max(epochs, key=lambda path: int(path.stem.split("_")[1]), default=None):
            found[row] = str(last)
    if not found:
        raise BadInput("no runs/toy: run python ce_clip.py first, or give --ckpt")
    return found


def report(b: Benchmark, features: dict[str, Features]) -> None:
    """One table: the paper's rows, a row for each checkpoint, and how many items were scored."""
    rows, ties = dict(b.reference), []
    for name, f in features.items():
        scores = score(b.items, f)
        rows[name] = {group: a.percent for group, a in scores.items()}
        rows[name] |= b.extra(scores, [i for i in b.items if (i.image, i.box) in f.images], f)
        ties.append(f"{name} {sum(a.ties for a in scores.values())}")
    missing = sum(a.missing for a in scores.values())
    counts = {group: f"{a.scored}/{a.scored + a.missing}" for group, a in scores.items()}
    rows["scored/all"] = dict.fromkeys(rows[name], "") | counts
    partial = f" - PARTIAL: {missing} of {len(b.items)} items have no picture" if missing else ""
    print_table(f"{b.title}: pair accuracy in %{partial}", rows)
    print(f"\nTies, counted as wrong: {', '.join(ties)}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument(
        "--ckpt", nargs="+", help="checkpoints of ce_clip.py, or open_clip tags (openai)"
    )
    p.add_argument("--model", help="open_clip model of tags and bare weights [ViT-B-32-quickgelu]")
    p.add_argument("--data-root", help="score SugarCrepe: sugarcrepe/*.json and coco/val2017/ here")
    p.add_argument("--pairs", help="score a .jsonl of negatives.py")
    p.add_argument("--images", help="picture folder of --pairs")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--workers", type=int, default=0, help="loader processes")
    args = p.parse_args()
    if bool(args.pairs) != bool(args.images):
        p.error("--pairs and --images go together")
    if (args.pairs or args.data_root) and not args.ckpt:
        p.error("--data-root and --pairs need --ckpt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoints = {path: path for path in args.ckpt} if args.ckpt else toy_checkpoints()
    benchmarks = plan(args)
    items = [item for b in benchmarks for item in b.items]
    there = {image: Path(image).exists() for image in dict.fromkeys(item.image for item in items)}
    present = [item for item in items if there[item.image]]
    if not present:
        raise BadInput(f"none of the {len(there)} pictures is there: {next(iter(there))} ...")
    features = {}
    for name, path in checkpoints.items():
        loaded = load_model(path, args.model)
        features[name] = encode(loaded, present, device, args.batch_size, args.workers)
    for benchmark in benchmarks:
        report(benchmark, features)


if __name__ == "__main__":
    run(main)
