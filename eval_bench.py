"""Score checkpoints on the paper's benchmarks (arXiv 2306.08832, Tables 1, 2, 3, 5, Fig. 7).

    python eval_bench.py --ckpt runs/coco/epoch_5.pt --base openai --out results
    python eval_bench.py --ckpt runs/coco/epoch_5.pt ViT-L-14/openai --bench vlc        # Fig. 7
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --pairs negatives.jsonl --images DIR
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --image photo.jpg --texts "a dog" "a cat"

A benchmark is a list of items: is the picture closer to the true caption than to the false one? Its
function reads the files below --data-root, scores the items whose picture is there, and averages as
the paper does. A checkpoint encodes each picture and each text once for all benchmarks (but for the
zero-shot sets, which CLIP_benchmark encodes, and an X-VLM's matching).
"""

import argparse
import csv
import functools
import itertools
import json
import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ce_clip import DEFAULT_MODEL, Loaded, encode_text, load_model, open_image
from negatives import BadInput, at_least, naming, read_captions, run


class Item(NamedTuple):
    group: str  # subset, relation, kind: what an average is taken over
    picture: tuple  # its path, and its box: left, top, right, bottom in pixels, or None
    positive: str
    negative: str


@dataclass
class Cell:
    """A number of a table, in %."""

    value: float | None = None  # None: there is none to show
    scored: int = 0
    total: int = 0  # more than scored: some pictures are missing
    ties: int = 0
    blind: float | None = None  # with --blind: the accuracy with another item's picture
    looking: float | None = None  # and in how many items the own one does more for the caption

    def __str__(self) -> str:
        if self.value is None:
            return "partial" if self.scored else ""
        return f"{self.value:.1f}"


def mean(cells: Iterable[Cell]) -> Cell:
    """The unweighted mean; one cell stays as it is. Of several there is none if anything is missing
    in one of them: it could not be compared with the paper's."""
    cells = list(cells)
    if len(cells) == 1:
        return cells[0]
    found = Cell(
        scored=sum(cell.scored for cell in cells),
        total=sum(cell.total for cell in cells),
        ties=sum(cell.ties for cell in cells),
    )
    if cells and found.scored == found.total:
        for name in ("value", "blind", "looking"):
            values = [getattr(cell, name) for cell in cells]
            if None not in values:
                setattr(found, name, statistics.mean(values))
    return found


# ---- Features and scores -------------------------------------------------------------------------


def load_pictures(batch: list[tuple], transform: Callable) -> tuple[Tensor, list[tuple]]:
    return torch.stack([transform(open_image(*picture)) for picture in batch]), batch


class Scorer:
    """A checkpoint, and the unit features of what it has encoded (float32, on the CPU)."""

    def __init__(self, loaded: Loaded, batch_size: int = 64, workers: int = 0, blind: bool = False):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = loaded.model.to(self.device).eval()
        self.transform, self.tokenizer = loaded.eval_transform, loaded.tokenizer
        self.batch_size, self.workers, self.blind = batch_size, workers, blind
        self.images = {}  # picture -> (D,)
        self.texts = {}  # text -> (D,)
        self.matches = {}  # picture, text -> logit of an X-VLM that they match (ITM)
        self.decisions = []  # of items whose picture is there: lines of items.jsonl
        self.absent = []  # files that were asked for

    def lacks(self, path: Path) -> bool:
        if not path.exists():
            self.absent.append(str(path))
        return not path.exists()

    def entries(self, path: Path) -> list:
        """The items of a benchmark's file, a JSON list or object; none if it is absent."""
        if self.lacks(path):
            return []
        with naming(path, "a JSON list or object"):
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in text.strip().split("\n")]
            content = json.loads(text)
            return list(content.values() if isinstance(content, dict) else content)

    def encode(self, items: list[Item], itm: bool = False) -> None:
        """Pictures that are there, and texts; with `itm` an X-VLM also matches the two."""
        captions = defaultdict(dict)  # picture -> its captions
        for item in items:
            if item.picture[0].is_file():
                captions[item.picture].update({item.positive: None, item.negative: None})
        self.encode_pictures(captions, itm and hasattr(self.model, "match"))
        self.encode_texts([text for texts in captions.values() for text in texts])

    @torch.inference_mode()
    def encode_pictures(self, captions: dict[tuple, Iterable[str]], itm: bool = False) -> None:
        """{picture: its captions}; with `itm` what an X-VLM says of them, seen together."""
        new = [picture for picture in captions if itm or picture not in self.images]
        load = functools.partial(load_pictures, transform=self.transform)
        loader = DataLoader(new, self.batch_size, num_workers=self.workers, collate_fn=load)
        for images, batch in tqdm(loader, "pictures", unit="batch", leave=False):
            images = images.to(self.device)
            if itm:
                images = self.model.image_states(images)
                pairs = [(n, text) for n, picture in enumerate(batch) for text in captions[picture]]
                tokens = self.tokenizer([text for _, text in pairs])
                logits = self.model.match(images, tokens, torch.tensor([n for n, _ in pairs]))
                for (n, text), logit in zip(pairs, finite(logits).tolist()):
                    self.matches[batch[n], text] = logit
            features = self.model.encode_image(images, normalize=True).float().cpu()
            self.images.update(zip(batch, finite(features)))

    @torch.inference_mode()
    def encode_texts(self, texts: Iterable[str]) -> None:
        """In batches of nearly one length, which encode_text cuts to that."""
        new = sorted((text for text in dict.fromkeys(texts) if text not in self.texts), key=len)
        loader = DataLoader(new, 4 * self.batch_size, collate_fn=list)
        for batch in tqdm(loader, "texts", unit="batch", leave=False):
            features = encode_text(self.model, self.tokenizer(batch)).float().cpu()
            self.texts.update(zip(batch, finite(features)))

    def decide(self, item: Item, itm: bool = False) -> dict:
        """A line of items.jsonl. `scores`: similarity of the picture to positive and negative,
        cosines, to which with `itm` an X-VLM's ITM logits are added, as in ARO's code; `gap`:
        difference of the cosines, and `similarity`: cosine of the two captions (Fig. 8)."""
        image = self.images[item.picture]
        positive, negative = self.texts[item.positive], self.texts[item.negative]
        # one by one: equal captions must have equal scores to the bit, for a tie is wrong
        scores = [(text @ image).item() for text in (positive, negative)]
        fig_8 = {"gap": scores[0] - scores[1], "similarity": (positive @ negative).item()}
        if itm and self.matches:
            for n, text in enumerate((item.positive, item.negative)):
                scores[n] += self.matches[item.picture, text]
        return item._asdict() | {"scores": scores, "right": scores[0] > scores[1]} | fig_8


def finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise BadInput("features that are not finite: the checkpoint is broken")
    return values


def accuracies(scorer: Scorer, items: list[Item], itm: bool = False) -> defaultdict[str, Cell]:
    """{group: accuracy in %} of the items whose picture is there. A tie is wrong; chance is 50.
    Also notes each decision in scorer.decisions.

    With scorer.blind (ours, not the paper's) each item is also decided with another's picture.
    Blind accuracy: what a model still gets right there it knows from the text alone. Looking: share
    of the items where the caption leads by more with its own picture, ties count half; 50 % is a
    model that ignores the picture, for what the text says is in both leads.
    """
    scorer.encode(items, itm)
    there = [item for item in items if item.picture in scorer.images]
    others = exchanged(there) if scorer.blind else []
    scorer.encode(others, itm)
    lines = defaultdict(list)
    for item, other in itertools.zip_longest(there, others):
        line = scorer.decide(item, itm)
        if other:
            blind = scorer.decide(other, itm)
            own_lead, lead = (scores[0] - scores[1] for scores in (line["scores"], blind["scores"]))
            line["blind"] = blind["right"]
            line["looking"] = 0.5 if own_lead == lead else float(own_lead > lead)
        lines[item.group].append(line)
        scorer.decisions.append(line)
    groups = defaultdict(Cell)  # an empty one for a group whose file is absent
    for group, total in Counter(item.group for item in items).items():
        cell = Cell(total=total, scored=len(lines[group]))
        cell.ties = sum(line["scores"][0] == line["scores"][1] for line in lines[group])
        cell.value = share(line["right"] for line in lines[group])
        if others:
            cell.blind = share(line["blind"] for line in lines[group])
            cell.looking = share(line["looking"] for line in lines[group])
        groups[group] = cell
    return groups


def share(values: Iterable[float]) -> float | None:
    """The mean in %, if there is any."""
    values = list(values)
    return 100 * sum(values) / len(values) if values else None


def exchanged(items: list[Item]) -> list[Item]:
    """Each with the picture of another item, drawn from those whose picture has another name."""
    rng = random.Random(0)
    found = []
    if len({item.picture[0] for item in items}) > 1:
        for item in items:
            other = item
            while other.picture[0] == item.picture[0]:
                other = rng.choice(items)
            found.append(item._replace(picture=other.picture))
    return found


def ranks(sim: Tensor, own: Tensor) -> Tensor:
    """(N,) how many that are not its own are at least as close to a query as the closest of its
    own; 0 is best. sim (N, M) of queries by gallery, own (N, M) bool."""
    best = sim.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return ((sim >= best) & ~own).sum(1)


# ---- ARO (arXiv 2210.01936), Table 1 -------------------------------------------------------------

# 157 relations that ARO's notebook and the paper's authors leave out, the symmetric ones for one
ARO_DROPPED = set(Path(__file__).with_name("aro_dropped.txt").read_text().splitlines())


def aro(scorer: Scorer, root: Path) -> dict[str, Cell]:
    """Means over relations, but for ARO_DROPPED, and over pairs of attributes of 25 cases or more.
    Pictures are cropped to the box of the two objects."""
    cells = {}
    for task in ("relation", "attribution"):
        items = []
        for e in scorer.entries(root / f"aro/visual_genome_{task}.json"):
            group = e["relation_name"] if task == "relation" else "_".join(e["attributes"])
            left, top = e["bbox_x"], e["bbox_y"]
            box = (left, top, left + e["bbox_w"], top + e["bbox_h"])
            picture = (root / "aro/images" / e["image_path"], box)
            items.append(Item(group, picture, e["true_caption"], e["false_caption"]))
        groups = accuracies(scorer, items, itm=True)
        if task == "relation":
            counted = [cell for name, cell in groups.items() if name not in ARO_DROPPED]
        else:
            counted = [cell for cell in groups.values() if cell.total >= 25]
        cells[task.title()] = mean(counted)
    return cells


# ---- VALSE (arXiv 2112.07566), Table 1 -----------------------------------------------------------

VALSE = {  # column of Table 1: files
    "Existence": ["existence"],
    "Plurality": ["plurals"],
    "Counting": ["counting-hard", "counting-small-quant", "counting-adversarial"],
    "Sp.rel.": ["relations"],
    "Actions repl.": ["action-replacement"],
    "Actions swap": ["actant-swap"],
    "Coref. standard": ["coreference-standard"],
    "Coref. clean": ["coreference-hard"],
    "Foil-it!": ["foil-it"],
}
VALSE_FOLDERS = {  # by the start of a picture's name; the first that fits
    "v7w_": "visual7w/images",
    "COCO_train2014": "coco/train2014",
    "COCO_val2014": "coco/val2014",
    "VisualDialog": "visdial/VisualDialog_val2018",
    "0": "coco/val2017",
    "": "swig",  # all others
}


def valse(scorer: Scorer, root: Path) -> dict[str, Cell]:
    """Items whose caption at least 2 of 3 annotators found right. The paper's average is that over
    the 11 files (72.5 for CE-CLIP), in the row of CE-CLIP+ that over the 9 columns (76.7)."""
    items = []
    files = [file for files in VALSE.values() for file in files]
    for file in files:
        for e in scorer.entries(root / f"valse/{file}.json"):
            if e["mturk"]["caption"] >= 2:
                name = e["image_file"]
                start = next(start for start in VALSE_FOLDERS if name.startswith(start))
                picture = (root / VALSE_FOLDERS[start] / name, None)
                items.append(Item(file, picture, e["caption"], e["foil"]))
    groups = accuracies(scorer, items, itm=True)
    columns = {}
    for column, of_column in VALSE.items():
        columns[column] = mean(groups[file] for file in of_column)
    eleven = mean(groups[file] for file in files)
    return columns | {"Avg 11 files": eleven, "Avg 9 columns": mean(columns.values())}


# ---- VL-CheckList (arXiv 2207.00221), Table 2 ----------------------------------------------------

VG_AND_VAW = [["vg"], ["vaw"]]  # a source is the mean of its files
SWIG = ["swig_agent", "swig_destination", "swig_item", "swig_tool"]
OBJECT_SOURCES = [["vg_obj", "vg_subj"], SWIG, ["hake"]]
LOCATIONS = ["Object/Location/center", "Object/Location/mid", "Object/Location/margin"]
SIZES = ["Object/Size/large", "Object/Size/medium", "Object/Size/small"]
VLC = [  # cell of Table 2, its types, the sources of each
    ("Attribute action", ["Attribute/action"], VG_AND_VAW),
    ("Attribute color", ["Attribute/color"], VG_AND_VAW),
    ("Attribute material", ["Attribute/material"], VG_AND_VAW),
    ("Attribute size", ["Attribute/size"], VG_AND_VAW),
    ("Attribute state", ["Attribute/state"], VG_AND_VAW),
    ("Object location", LOCATIONS, OBJECT_SOURCES),
    ("Object size", SIZES, OBJECT_SOURCES),
    ("Relation action", ["Relation/action"], [["vg"], ["swig"], ["hake"]]),
    ("Relation spatial", ["Relation/spatial"], [["vg"]]),
]


def vlc_file(scorer: Scorer, root: Path, file: str, rows: int) -> Cell:
    """The first `rows` rows of a corpus file; 0: all. (Authors: those that have a picture.)"""
    path = root / f"vl_checklist/corpus/v1/{file}.yaml"
    if scorer.lacks(path):
        return Cell()
    config = yaml.safe_load(path.read_text())
    folder = root / config["IMG_ROOT"].strip("/")
    entries = scorer.entries(root / "vl_checklist" / config["ANNO_PATH"])
    items = []
    for image, texts in entries[: rows or None]:
        items.append(Item(file, (folder / image, None), texts["POS"][0], texts["NEG"][0]))
    return accuracies(scorer, items)[file]


def vlc(scorer: Scorer, root: Path, rows: int) -> dict[str, Cell]:
    """Means over files, sources and types; then over the cells of a group, and over all nine."""
    cells = {}
    for column, types, sources in VLC:
        means = []  # all types have as many sources: the mean of their means is that of all
        for type_, files in itertools.product(types, sources):
            means.append(mean(vlc_file(scorer, root, f"{type_}/{file}", rows) for file in files))
        cells[column] = mean(means)
    averages = {}
    for group in ("Attribute", "Object", "Relation"):
        averages[group] = mean(cell for column, cell in cells.items() if column.startswith(group))
    return cells | averages | {"Avg": mean(cells.values())}


# ---- SugarCrepe (arXiv 2306.14610), Table 3 ------------------------------------------------------

SUGARCREPE = {
    "REPLACE": ["replace_obj", "replace_att", "replace_rel"],
    "SWAP": ["swap_obj", "swap_att"],
    "ADD": ["add_obj", "add_att"],
}


def sugarcrepe(scorer: Scorer, root: Path) -> dict[str, Cell]:
    """7 subsets, 7,511 items; unweighted means as in Tables 3 and 5 (its authors': over items)."""
    items = []
    subsets = [subset for subsets in SUGARCREPE.values() for subset in subsets]
    for subset in subsets:
        for e in scorer.entries(root / f"sugarcrepe/{subset}.json"):
            picture = (root / "coco/val2017" / e["filename"], None)
            items.append(Item(subset, picture, e["caption"], e["negative_caption"]))
    groups = accuracies(scorer, items)
    cells = {subset: groups[subset] for subset in subsets}
    averages = {}
    for kind, of_kind in SUGARCREPE.items():
        averages[kind] = mean(cells[subset] for subset in of_kind)
    return cells | averages | {"Avg": mean(cells.values())}


# ---- After the paper: SugarCrepe++ (arXiv 2406.11171), Winoground (arXiv 2204.03162) -------------


def sugarcrepe_pp(scorer: Scorer, root: Path) -> dict[str, Cell]:
    """SugarCrepe with a second true caption; means over replace and over swap. Ties are wrong.
    ITT: the picture is closer to both captions than to the negative; chance 33.3. TOT, without a
    picture: the captions are closer to each other than both are to the negative."""
    cells = {}
    for subset in SUGARCREPE["REPLACE"] + SUGARCREPE["SWAP"]:
        items, itt, tot = [], [], []
        for e in scorer.entries(root / f"sugarcrepe_pp/{subset}.json"):
            picture = (root / "coco/val2017" / e["filename"], None)
            for caption in (e["caption"], e["caption2"]):
                items.append(Item(subset, picture, caption, e["negative_caption"]))
        scorer.encode(items)
        scorer.encode_texts(text for item in items for text in (item.positive, item.negative))
        for pair in zip(items[::2], items[1::2]):
            texts = [pair[0].positive, pair[1].positive, pair[0].negative]
            first, second, negative = (scorer.texts[text] for text in texts)
            tot.append(bool(first @ second > max(first @ negative, second @ negative)))
            if pair[0].picture in scorer.images:
                lines = [scorer.decide(item) for item in pair]
                itt.append(lines[0]["right"] and lines[1]["right"])
                scorer.decisions += lines
        for task, right in (("ITT", itt), ("TOT", tot)):
            cells[f"{task} {subset}"] = Cell(share(right), len(right), len(tot))
    means = {}
    for name in ("ITT replace", "ITT swap", "TOT replace", "TOT swap"):
        means[name] = mean(cell for column, cell in cells.items() if column.startswith(name))
    return cells | means


def winoground(scorer: Scorer, root: Path) -> dict[str, Cell]:
    """400 pairs of pictures and captions. Text: each picture is closer to its own caption; image:
    each caption to its own picture; group: both. Chance 25, 25, 16.7; a tie is wrong."""
    items = []
    for e in scorer.entries(root / "winoground/examples.jsonl"):
        for own, other in ((0, 1), (1, 0)):
            picture = (root / f"winoground/images/{e[f'image_{own}']}.png", None)
            items.append(Item("", picture, e[f"caption_{own}"], e[f"caption_{other}"]))
    scorer.encode(items)
    text, image = [], []
    for pair in zip(items[::2], items[1::2]):
        if all(item.picture in scorer.images for item in pair):
            lines = [scorer.decide(item) for item in pair]
            (own_0, other_0), (own_1, other_1) = (line["scores"] for line in lines)
            text.append(own_0 > other_0 and own_1 > other_1)
            image.append(own_0 > other_1 and own_1 > other_0)
            scorer.decisions += lines
    group = [both_texts and both_images for both_texts, both_images in zip(text, image)]
    rights = {"Text": text, "Image": image, "Group": group}
    return {name: Cell(share(right), len(right), len(items) // 2) for name, right in rights.items()}


# ---- Retrieval, Table 5; files of negatives.py ---------------------------------------------------


def pre_caption(text: str) -> str:
    """Lower case without .!"()*#:;~ and at most 30 words, as ARO and the paper's retrieval."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:30])


def retrieval(scorer: Scorer, captions: Path, images: Path, splits=()) -> dict[str, Cell]:
    """Recall in % at 1, 5, 10 (Table 5 prints R@5): of captions by a picture (I2T: any of its own
    counts), and of the picture by each caption (T2I). What ties is ranked behind. There is no
    value unless every picture is there: a smaller gallery is easier."""
    if scorer.lacks(captions):
        return {}
    records = read_captions(captions, splits)
    pictures = [(images / record["image"], None) for record in records]
    scored = sum(path.exists() for path, _ in pictures)
    if scored < len(records):
        return dict.fromkeys(("I2T R@5", "T2I R@5"), Cell(None, scored, len(records)))
    number = {picture: n for n, picture in enumerate(dict.fromkeys(pictures))}
    texts = [pre_caption(record["caption"]) for record in records]
    scorer.encode_pictures(dict.fromkeys(number, ()))  # no captions: without matching
    scorer.encode_texts(texts)
    image = torch.stack([scorer.images[picture] for picture in number])
    text = torch.stack([scorer.texts[text] for text in texts])
    sim = image @ text.T  # (pictures, captions)
    owner = torch.tensor([number[picture] for picture in pictures])
    own = torch.arange(len(number))[:, None] == owner
    cells = {}
    for way, rank in (("I2T", ranks(sim, own)), ("T2I", ranks(sim.T, own.T))):
        for k in (1, 5, 10):
            value = 100 * (rank < k).float().mean().item()
            cells[f"{way} R@{k}"] = Cell(value, scored, len(records))
    return cells


def pairs(scorer: Scorer, path: Path, images: Path) -> dict[str, Cell]:
    """Each kind of a file that negatives.py wrote, and their mean."""
    items = []
    with naming(path, "a file of negatives.py"), path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            picture = (images / record["image"], record.get("box") and tuple(record["box"]))
            for kind, text in record.items():
                if isinstance(text, str) and kind not in ("id", "image", "caption"):
                    items.append(Item(kind, picture, record["caption"], text))
    groups = accuracies(scorer, items)
    return groups | {"mean": mean(groups.values())}


# ---- Zero-shot classification, Table 5: ELEVATER by CLIP_benchmark -------------------------------

# ELEVATER's sets, as CLIP_benchmark calls them, by ELEVATER's metric; it lacks hateful-memes
ACCURACY = ["cifar10", "cifar100", "country211", "dtd", "eurosat", "fer2013", "food101", "gtsrb"]
ACCURACY += ["mnist", "pcam", "renderedsst2", "resisc45", "cars", "kitti_closest_vehicle_distance"]
MEAN_PER_CLASS = ["caltech101", "fgvc_aircraft", "flowers", "pets"]
MAP_11_POINT = ["voc2007_multilabel"]
ELEVATER = ACCURACY + MEAN_PER_CLASS + MAP_11_POINT


def map_11_point(scores: Tensor, target: Tensor) -> float:
    """Mean over classes of the mean of the best precision at a recall of at least 0, .1, ... 1.

    scores (N, C), target (N, C) bool; precision is 1 at recall 0, as in ELEVATER; 0 to 1.
    """
    from sklearn.metrics import precision_recall_curve

    found = []
    for of_class, true in zip(scores.T, target.T):
        if true.any():
            precision, recall, _ = precision_recall_curve(true, of_class)
            best = [precision[recall >= level / 10 - 1e-6].max() for level in range(11)]
            found.append(statistics.mean(best))
    return statistics.mean(found)


def zero_shot_set(scorer: Scorer, folder: Path) -> Cell:
    """Score of 100 * cosine with a class's mean text. The folder is a webdataset of CLIP_benchmark,
    which brings pictures, class names and templates."""
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_classification as zeroshot
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    images = build_wds_dataset(folder.name, scorer.transform, "test", str(folder))
    model, device = scorer.model, scorer.device
    names, templates = images.classes, images.templates
    weights = zeroshot.zero_shot_classifier(
        model, scorer.tokenizer, names, templates, device, amp=False
    )
    loader = DataLoader(images, scorer.batch_size)
    logits, target = zeroshot.run_classification(
        model, weights, loader, device, amp=False
    )  # (N, C)
    chosen = finite(logits).argmax(1)
    if folder.name in MEAN_PER_CLASS:
        value = balanced_accuracy_score(target, chosen)
    elif folder.name in MAP_11_POINT:
        value = map_11_point(logits.softmax(1), target.bool())
    else:
        value = accuracy_score(target, chosen)
    return Cell(100 * value, len(target), len(target))


def zero_shot(scorer: Scorer, root: Path) -> dict[str, Cell]:
    """ELEVATER's sets that are there, their mean if all 19 are, and ImageNet."""
    cells = {}
    for name in [*ELEVATER, "imagenet1k"]:
        folder = root / "zeroshot" / name
        if not scorer.lacks(folder):
            if not (folder / "classnames.txt").exists():
                raise BadInput(f"{folder} is no webdataset of CLIP_benchmark: docs/benchmarks.md")
            with naming(folder, "read by CLIP_benchmark (pip install clip-benchmark)"):
                cells[name] = zero_shot_set(scorer, folder)
    return cells | {"ELEVATER 19": mean(cells.get(name, Cell()) for name in ELEVATER)}


# ---- Tables --------------------------------------------------------------------------------------

BENCHMARKS = {  # title of the table, and what Table 5 has of it
    "aro": ("ARO (Table 1)", ["Relation", "Attribution"]),
    "valse": ("VALSE (Table 1)", ["Avg 11 files", "Avg 9 columns"]),
    "vlc": ("VL-CheckList (Table 2)", ["Avg"]),
    "sugarcrepe": ("SugarCrepe (Table 3)", ["Avg"]),
    "sugarcrepe_pp": ("SugarCrepe++ (arXiv 2406.11171)", []),
    "winoground": ("Winoground (arXiv 2204.03162)", []),
    "coco": ("COCO retrieval, Karpathy's 5k test", ["T2I R@5", "I2T R@5"]),
    "zeroshot": ("Zero-shot classification", ["ELEVATER 19", "imagenet1k"]),
    "pairs": ("Generated negatives", ["mean"]),
    "captions": ("Retrieval", ["T2I R@5", "I2T R@5"]),
    "table_5": ("Gain and forgetting (Table 5; the paper: ELEVATER over 20 sets)", []),
}


def paper_rows(benchmark: str) -> dict[str, dict[str, Cell]]:
    """What the paper prints: {row: {column: cell}}."""
    rows = defaultdict(dict)
    with Path(__file__).with_name("paper.csv").open(newline="") as file:
        for entry in csv.DictReader(file):
            if entry["benchmark"] == benchmark:
                rows[f"{entry['row']} (paper)"][entry["column"]] = Cell(float(entry["value"]))
    return rows


def markdown(rows: dict[str, dict], columns: list[str]) -> str:
    """A table of the rows that have any of the columns."""
    lines = [["", *columns]]
    for name, row in rows.items():
        if not row.keys().isdisjoint(columns):
            lines.append([name, *(str(row.get(column, "")) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def report(name: str, rows: dict[str, dict[str, Cell]], base: str | None, absent: list[str]) -> str:
    """One benchmark: the paper's rows, ours, what they differ from the base by, and how many items
    stand behind each number."""
    title, _ = BENCHMARKS[name]
    last = list(rows.values())[-1]
    if not any(cell.scored for cell in last.values()):
        first = absent[0] if absent else "every picture"
        return f"{title} is not scored: {first} is absent, see docs/benchmarks.md"
    shown, gains, ties = paper_rows(name), defaultdict(dict), {}
    for row, cells in rows.items():
        shown[row] = cells
        for control in ("blind", "looking"):
            values = {column: getattr(cell, control) for column, cell in cells.items()}
            shown[f"{row}, {control}"] = {c: f"{v:.1f}" for c, v in values.items() if v is not None}
        for column, cell in cells.items():
            if base and row != base and None not in (cell.value, rows[base][column].value):
                gains[f"{row} - {base}"][column] = f"{cell.value - rows[base][column].value:+.1f}"
        ties[f"ties, {row}"] = {column: cell.ties for column, cell in cells.items() if cell.ties}
    counts = {"scored/all": {column: f"{c.scored}/{c.total}" for column, c in last.items()}}
    partial = absent or any(cell.scored < cell.total for cell in last.values())
    text = f"## {title}, %{' - PARTIAL' if partial else ''}\n\n"
    text += markdown(shown | gains | counts | ties, list(last))
    if absent:
        text += f"\n\nAbsent: {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else "")
    return text


# ---- Command line --------------------------------------------------------------------------------


def interpolate(base: Loaded, tuned: Loaded, alpha: float) -> Loaded:
    """WiSE-FT (arXiv 2109.01903), into the base: weights (1 - alpha) * base + alpha * tuned."""
    if base.config != tuned.config:
        raise BadInput(f"--wise: the base is a {base.name}, the checkpoint a {tuned.name}")
    weights = tuned.model.state_dict()
    for name, weight in base.model.state_dict().items():
        if weight.is_floating_point():
            weight.lerp_(weights[name], alpha)
    return base


def checkpoints(args: argparse.Namespace) -> Iterator[tuple[str, Loaded]]:
    """(row, model): the base, the checkpoints; with --wise what lies between."""
    if args.base:
        yield args.base, load_model(args.base, args.model)
    for source in args.ckpt:
        if source == args.base:
            continue
        tuned = load_model(source, args.model)
        if not args.wise:
            yield source, tuned
        for alpha in args.wise:
            base = load_model(args.base, args.model)
            yield f"{source}, WiSE {alpha:g}", interpolate(base, tuned, alpha)


def run_benchmark(name: str, scorer: Scorer, args: argparse.Namespace) -> dict[str, Cell]:
    root = args.data_root
    if name == "aro":
        return aro(scorer, root)
    if name == "valse":
        return valse(scorer, root)
    if name == "vlc":
        return vlc(scorer, root, args.vlc_rows)
    if name == "sugarcrepe":
        return sugarcrepe(scorer, root)
    if name == "sugarcrepe_pp":
        return sugarcrepe_pp(scorer, root)
    if name == "winoground":
        return winoground(scorer, root)
    if name == "zeroshot":
        return zero_shot(scorer, root)
    if name == "pairs":
        return pairs(scorer, args.pairs, args.images)
    if name == "captions":
        return retrieval(scorer, args.captions, args.images, args.split)
    path = root / "coco/annotations/coco_karpathy_test.json"  # coco
    return retrieval(scorer, path, root / "coco")


def describe(args: argparse.Namespace) -> None:
    """--image: the texts in the order of their similarity to it, for each checkpoint."""
    for row, loaded in checkpoints(args):
        scorer = Scorer(loaded)
        picture = (args.image, None)
        scorer.encode_pictures({picture: args.texts})
        scorer.encode_texts(args.texts)
        found = [((scorer.images[picture] @ scorer.texts[t]).item(), t) for t in args.texts]
        print(row)
        for similarity, text in sorted(found, reverse=True):
            print(f"  {similarity:.4f}  {text}")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--ckpt", nargs="+", required=True, help="files, MODEL/TAG of open_clip, or tags (openai)")
    add("--model", default=DEFAULT_MODEL, help="what tags and files of others are [Sec. 4.1]")
    add("--base", help="checkpoint or tag before fine-tuning: differences to it are shown")
    add("--wise", nargs="+", type=at_least(0.0), default=[], help="WiSE-FT: (1 - a) base + a ckpt")
    names = list(BENCHMARKS)[:8]  # those below --data-root
    add("--bench", nargs="+", choices=names, default=[], help="[all of them]")
    add("--data-root", type=Path, default="data", help="folder of the benchmarks")
    add("--vlc-rows", type=at_least(0), default=1000, help="rows of a VLC file, 0: all [authors]")
    add("--pairs", type=Path, help="score the kinds of a .jsonl of negatives.py")
    add("--captions", type=Path, help="retrieval on a captions file")
    add("--split", nargs="+", default=[], help="test ... of --captions, a file of Karpathy's")
    add("--images", type=Path, default=".", help="picture folder of --pairs and --captions")
    add("--image", type=Path, help="one picture, to which --texts are compared")
    add("--texts", nargs="+", default=[])
    add("--blind", action="store_true", help="also with the pictures of others: see accuracies")
    add("--batch-size", type=at_least(1), default=64, help="pictures; four times as many texts")
    add("--workers", type=at_least(0), default=0, help="loader processes")
    add("--out", type=Path, help="folder for results.json, results.md and items.jsonl")
    args = p.parse_args()
    if bool(args.image) != bool(args.texts):
        p.error("--image goes together with --texts")
    if args.split and not args.captions:
        p.error("--split goes together with --captions")
    if args.wise and not args.base:
        p.error("--wise needs --base: between what and the checkpoint?")
    args.bench += [name for name in ("pairs", "captions") if getattr(args, name)]
    args.bench = args.bench or names
    return args


def main() -> None:
    args = parse_args()
    if args.image:
        return describe(args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    results = {name: {} for name in args.bench}
    absent, lines = {}, []
    for row, loaded in checkpoints(args):
        scorer = Scorer(loaded, args.batch_size, args.workers, args.blind)
        for name in args.bench:
            scorer.decisions, scorer.absent = [], []
            results[name][row] = run_benchmark(name, scorer, args)
            absent[name] = scorer.absent
            for line in scorer.decisions:
                line = {"benchmark": name, "row": row} | line
                lines.append(json.dumps(line, default=str) + "\n")
    table_5 = defaultdict(dict)
    for name, rows in results.items():
        _, columns = BENCHMARKS[name]
        for row, cells in rows.items():
            for column in columns:
                if column in cells and cells[column].scored:
                    table_5[row][f"{name} {column}"] = cells[column]
    if table_5:
        results["table_5"], absent["table_5"] = table_5, []
    texts = [report(name, rows, args.base, absent[name]) for name, rows in results.items()]
    text = "\n\n".join(texts)
    print(text)
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items()}
        content = json.dumps({"settings": settings, "benchmarks": results}, indent=1, default=vars)
        (args.out / "results.json").write_text(content + "\n")
        (args.out / "results.md").write_text(text + "\n")
        (args.out / "items.jsonl").write_text("".join(lines))
    if not table_5:
        raise BadInput("nothing was scored")


if __name__ == "__main__":
    run(main)
