"""Score CLIP checkpoints on the paper's benchmarks (arXiv 2306.08832, Tables 1, 2, 3 and 5).

    python eval_bench.py                                       # the toy runs of ce_clip.py
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --base openai --data-root data --out results
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --pairs negatives.jsonl --images DIR

A benchmark is a function that yields Item(group, image, box, positive, negatives). An item is right
if and only if cosine(image, positive) > cosine(image, negative) for each negative, so a tie is
wrong; ARO and VALSE add an X-VLM's ITM logits to its cosines. All checkpoints share one pass: each
distinct (picture, box) is decoded once, each distinct text is encoded once, cut after its end.
"""

import argparse
import copy
import functools
import hashlib
import inspect
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import open_clip
import torch
import torchvision
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import negatives
import toy
from ce_clip import KINDS, BadInput, Loaded, Negatives, encode_text, load_image, load_model
from negatives import last_line, read_json, reading, run, writing


class Item(NamedTuple):
    """Is the picture closer to `positive` than to all `negatives`? None of these: retrieval."""

    group: str  # subset, relation, kind: what an average is taken over
    image: str  # path
    box: tuple[float, float, float, float] | None  # left, top, right, bottom in pixels
    positive: str
    negatives: tuple[str, ...]

    @property
    def key(self) -> tuple:
        return self.image, self.box

    @property
    def texts(self) -> tuple[str, ...]:
        return self.positive, *self.negatives


class Files:
    """A data folder that remembers which of the files asked for are absent."""

    def __init__(self, root: Path):
        self.root, self.absent = root, []

    def find(self, name: str) -> Path | None:
        if (path := self.root / name).exists():
            return path
        self.absent.append(name)

    def items(self, pattern: str, groups: Iterable[str], build: Callable, rows=0) -> Iterator[Item]:
        """build(group, entry) of the entries (of the first `rows`) of each group's file, a JSON
        list or object, their images below the root; None leaves an entry out. Raises BadInput,
        which names file and entry."""
        for group in groups:
            if not (path := self.find(pattern.replace("{}", group))):
                continue
            content = read_json(path)
            with reading(path, "a JSON list or object of items"):
                entries = list(content.items() if isinstance(content, dict) else enumerate(content))
            for key, entry in entries[: rows or None]:
                with reading(f"{path}, item {key},", "an item of this benchmark"):
                    item = build(group, entry)
                    if item and not all(isinstance(text, str) for text in item.texts):
                        raise TypeError("a caption that is not text")
                if item:
                    yield item._replace(image=str(self.root / item.image))


# A column is a group, [..] the unweighted mean of its branches, or (..) the mean over all items.
Tree = str | list | tuple


def leaves(tree: Tree) -> list[str]:
    return [tree] if isinstance(tree, str) else [leaf for branch in tree for leaf in leaves(branch)]


# ---- Benchmarks: each yields its items, whether or not the picture is there ----------------------


def aro_items(files: Files, *_) -> Iterator[Item]:
    """ARO Relation and Attribution (arXiv 2210.01936), cropped to the box of the two objects."""

    def item(task, e):
        x, y, w, h = (e[f"bbox_{side}"] for side in "xywh")
        name = e["relation_name"] if task == "relation" else "_".join(e["attributes"])
        image, box = f"aro/images/{e['image_path']}", (x, y, x + w, y + h)
        return Item(f"{task}/{name}", image, box, e["true_caption"], (e["false_caption"],))

    return files.items("aro/visual_genome_{}.json", ("relation", "attribution"), item)


# 157 relations that ARO's notebook and the paper's authors leave out, the symmetric ones for one;
# "drinking -/from" are two, "drinking" and "drinking from".
_ARO_DROPPED = """
adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by,
chewing, cleaning, climbing, close to, coming from/out of, contain, crossing, dragging, draped over,
drinking -/from, driving -/down/on, eating from/in, enclosing, exiting, facing, filled with,
floating in/on, flying -/above/in/over/through, full of, going down/into/through, grazing in,
growing in/on, guiding, hanging from/in/off/over, higher than, holding onto, hugging, in between,
jumping off/on/over, kept in, larger than, leading, leaning over, leaving, licking, longer than,
looking in/into/out/over/through, lying next to/on top of, making, mixed with, mounted on, moving,
near, next to, of, on the back of/the edge of/the front of/the other side of/the side of, opening,
painted on, parked at/beside/by/in/in front of/near/next to, perched on, petting, piled on, playing
-/in/on/with, pouring, reaching for, reading, reflected on, riding on, running in/on/through, seen
through, sitting behind/beside/by/in front of/near/next to/under, skiing down/on, sleeping in/on,
smiling at, sniffing, splashing, sprinkled on, stacked on, standing against/around/behind/beside/in
front of/near/next to, staring at, stuck in, surrounding, swimming in, swinging, talking to, topped
with, touching, traveling down/on, tying, typing on, underneath, wading in, waiting for, walking
across/by/down/next to/through, with, working in/on, worn on, wrapped around/in
"""
_VERBS = re.findall(r"(\w+) ?([^,]*)", " ".join(_ARO_DROPPED.split()))
ARO_DROPPED = {f"{verb} {end}".rstrip(" -") for verb, ends in _VERBS for end in ends.split("/")}


def aro_columns(groups: dict) -> dict:
    """Means over relations, but for ARO_DROPPED, and over pairs of attributes with >= 25 cases."""
    relations = [g for g in groups if g.startswith("relation/")]
    kept = [g for g in relations if g.removeprefix("relation/") not in ARO_DROPPED]
    pairs = [g for g, a in groups.items() if g.startswith("attribution/") and a.all >= 25]
    return {"Relation": kept, "Attribution": pairs}


VALSE = {  # column of Table 1: files
    "Existence": "existence",
    "Plurality": "plurals",
    "Counting": ["counting-hard", "counting-small-quant", "counting-adversarial"],
    "Sp.rel.": "relations",
    "Actions repl.": "action-replacement",
    "Actions swap": "actant-swap",
    "Coref. standard": "coreference-standard",
    "Coref. clean": "coreference-hard",
    "Foil-it!": "foil-it",
}
VALSE_FOLDERS = {  # by the start of a picture's name; all others are SWiG's
    "v7w_": "visual7w/images",
    "COCO_train2014": "coco/train2014",
    "COCO_val2014": "coco/val2014",
    "VisualDialog": "visdial/VisualDialog_val2018",
    "0": "coco/val2017",
    "": "swig",
}


def valse_items(files: Files, *_) -> Iterator[Item]:
    """VALSE (arXiv 2112.07566): items whose caption at least 2 of 3 annotators found right."""

    def item(name, e):
        if e["mturk"]["caption"] >= 2:
            image = e["image_file"]
            folder = next(f for start, f in VALSE_FOLDERS.items() if image.startswith(start))
            return Item(name, f"{folder}/{image}", None, e["caption"], (e["foil"],))

    return files.items("valse/{}.json", leaves([*VALSE.values()]), item)


def valse_columns(_) -> dict:
    """The columns of Table 1, their mean, and the mean over files: the paper's "Avg." is the latter
    (72.5 for CE-CLIP), in the row of CE-CLIP+ the former (76.7)."""
    columns = [*VALSE.values()]
    return VALSE | {"Avg 11 files": leaves(columns), "Avg 9 columns": columns}


def below(folder: str, tree: Tree) -> Tree:
    return f"{folder}/{tree}" if isinstance(tree, str) else [below(folder, b) for b in tree]


def vlc_columns(_) -> dict:
    """The nine cells of Table 2: means over files, sources, types; then the means of the groups'
    cells, and of all nine."""
    swig = [f"swig_{role}" for role in ("agent", "destination", "item", "tool")]
    sources = [["vg_obj", "vg_subj"], swig, "hake"]
    attributes = "action", "color", "material", "size", "state"
    files = {f"Attribute/{name}": ["vg", "vaw"] for name in attributes}
    files["Object/Location"] = [below(t, sources) for t in ("center", "mid", "margin")]
    files["Object/Size"] = [below(t, sources) for t in ("large", "medium", "small")]
    files |= {"Relation/action": ["vg", "swig", "hake"], "Relation/spatial": ["vg"]}
    cells = {name: below(name, tree) for name, tree in files.items()}
    groups = {name.split("/")[0]: [] for name in cells}
    for name, tree in cells.items():
        groups[name.split("/")[0]].append(tree)
    return cells | groups | {"Avg": [*cells.values()]}


def vlc_items(files: Files, args: argparse.Namespace, *_) -> Iterator[Item]:
    """VL-CheckList (arXiv 2207.00221); of each file the first --vlc-rows rows."""
    for group in leaves(vlc_columns(None)["Avg"]):
        if not (path := files.find(f"vl_checklist/corpus/v1/{group}.yaml")):
            continue
        with reading(path, "a corpus file of VL-CheckList"):
            config = yaml.safe_load(path.read_text())
            name, folder = f"vl_checklist/{config['ANNO_PATH']}", config["IMG_ROOT"].strip("/")

        def item(group, entry, folder=folder):
            image, texts = entry
            return Item(group, f"{folder}/{image}", None, texts["POS"][0], (texts["NEG"][0],))

        yield from files.items(name, [group], item, args.vlc_rows)


SUGARCREPE = {
    "REPLACE": ["replace_obj", "replace_att", "replace_rel"],
    "SWAP": ["swap_obj", "swap_att"],
    "ADD": ["add_obj", "add_att"],
}


def sugarcrepe_items(files: Files, *_) -> Iterator[Item]:
    """SugarCrepe (arXiv 2306.14610): 7 subsets, 7,511 items, on COCO val2017."""

    def item(subset, e):
        image = f"coco/val2017/{e['filename']}"
        return Item(subset, image, None, e["caption"], (e["negative_caption"],))

    return files.items("sugarcrepe/{}.json", leaves([*SUGARCREPE.values()]), item)


def sugarcrepe_columns(_) -> dict:
    """Subsets; unweighted means as in Tables 3 and 5; and over items, as its authors."""
    subsets = leaves([*SUGARCREPE.values()])
    return {s: s for s in subsets} | SUGARCREPE | {"macro": subsets, "micro": tuple(subsets)}


def pre_caption(text: str) -> str:
    """Lower case without .!"()*#:;~ and at most 30 words, as ARO and the paper's retrieval."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:30])


KARPATHY = {  # name, file of captions, folder that its pictures' names start in
    "coco": ("COCO", "coco/annotations/coco_karpathy_test.json", "coco"),
    "flickr30k": ("Flickr30k", "flickr30k/flickr30k_test.json", "flickr30k"),
}


def captions(files: Files, name: str, folder: str) -> Iterator[tuple[str, str]]:
    """(picture, caption) of a Karpathy-style or COCO-captions file."""
    path = files.find(name)
    for record in negatives.read_captions(path) if path else ():
        yield str(files.root / folder / record["image"]), record["caption"]


def retrieval_items(files: Files, args: argparse.Namespace, key: str) -> Iterator[Item]:
    source = KARPATHY[key][1:] if key in KARPATHY else (args.captions, args.images)
    for image, text in captions(files, *source):
        yield Item("captions", image, None, pre_caption(text), ())


def order_items(files: Files, *_) -> Iterator[Item]:
    """COCO-Order and Flickr30k-Order of ARO: a caption among four perturbations of itself."""
    for name, *source in KARPATHY.values():
        if rows := list(captions(files, *source)):
            tagged = negatives.Tagger().words(text for _, text in rows)
            for (image, text), words in zip(rows, tagged):
                yield Item(f"{name}-Order", image, None, pre_caption(text), perturbations(words))


def perturbations(words: list[negatives.Word]) -> tuple[str, ...]:
    """Nouns and adjectives shuffled among themselves; all the others; the words within each three;
    the threes. Seeded by the caption; a shuffle that changes nothing is the caption, a tie.

    paper: nltk's words in the last two / we: spaCy's in all four.
    """
    tokens = [w.text for w in words]
    rng = random.Random(" ".join(tokens))
    kinds = [w.tag[:2] if w.tag[:2] in ("NN", "JJ") else "" for w in words]

    def shuffled(*moving):
        out = tokens[:]
        for kind in moving:
            places = [i for i, k in enumerate(kinds) if k == kind]
            for place, source in zip(places, rng.sample(places, len(places))):
                out[place] = tokens[source]
        return out

    threes = [tokens[i : i + 3] for i in range(0, len(tokens), 3)]
    within = [token for three in threes for token in rng.sample(three, len(three))]
    whole = [token for three in rng.sample(threes, len(threes)) for token in three]
    text = pre_caption("".join(w.text + w.space for w in words))
    perturbed = shuffled("NN", "JJ"), shuffled(""), within, whole
    return tuple(text if p == tokens else pre_caption(" ".join(p)) for p in perturbed)


def negatives_items(_, args: argparse.Namespace, *__) -> list[Item]:
    """The four kinds of a file that negatives.py wrote."""
    records = list(Negatives(Path(args.pairs), Path(args.images)))
    found = ((kind, r) for kind in KINDS for r in records if r[kind])
    return [Item(kind, r["image"], r["box"], r["caption"], (r[kind],)) for kind, r in found]


def toy_items(*_) -> list[Item]:
    """The toy world's test scenes: each kind of training negative, then the held-out kinds."""
    root, items = Path("data", "toy"), []
    if not (root / "captions_test.json").exists():
        toy.make_world(root)
    for image in read_json(root / "captions_test.json")["images"]:
        path, rng = str(root / "images" / image["file_name"]), random.Random(image["id"])
        for kind, true, false in toy.true_false_pairs(toy.Scene(*image["scene"]), rng):
            items.append(Item(kind, path, None, true, (false,)))
    return sorted(items, key=lambda item: (*KINDS, *toy.HELD_OUT).index(item.group))


# ---- Features: every distinct picture and text once ----------------------------------------------


def picture(key: tuple) -> tuple[Image.Image, int]:
    path, box = key
    return load_image(path, Image.Image.copy, box), 0


def batch(load: Callable, transforms: list[Callable], samples: list) -> list:
    """[a batch for each transform], targets; load(sample) gives a picture and its target."""
    rows = [([t(image) for t in transforms], target) for image, target in map(load, samples)]
    return default_collate(rows)


class Scorer:
    """The checkpoints, {row: Loaded}, and how they encode: unit features, float32, on the CPU."""

    def __init__(self, models: dict[str, Loaded], args: argparse.Namespace):
        self.models, self.batch_size, self.workers = models, args.batch_size, args.workers
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bf16 = args.precision == "bf16"
        self.precision = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        for loaded in models.values():
            loaded.model.to(self.device).eval()

    @torch.inference_mode()
    def images(self, samples: Sequence, load: Callable, desc: str, visit=None):
        """{row: features (n, D)} of n samples, and their targets (n, ...): see `batch`. What an
        X-VLM makes of a batch goes to visit(row, number of the first, image_states)."""
        transforms = {str(m.eval_transform): m.eval_transform for m in self.models.values()}
        collate = functools.partial(batch, load, [*transforms.values()])
        options = {"num_workers": self.workers, "collate_fn": collate}
        loader = DataLoader(samples, self.batch_size, **options)
        rows, targets = defaultdict(list), []
        bar = tqdm(loader, f"{desc}: pictures", unit="batch", leave=False)
        for n, (images, target) in enumerate(bar):
            images = {key: i.to(self.device) for key, i in zip(transforms, images)}
            targets.append(target)
            for row, (model, *_, transform, _) in self.models.items():
                with self.precision:
                    seen = images[str(transform)]
                    if visit and hasattr(model, "match"):
                        seen = model.image_states(seen)
                        visit(row, n * self.batch_size, seen)
                    features = model.encode_image(seen, normalize=True)
                rows[row].append(features.float().cpu())
        return {row: torch.cat(parts) for row, parts in rows.items()}, torch.cat(targets)

    @torch.inference_mode()
    def text(self, loaded: Loaded, tokens: Tensor, normalize: bool = True) -> Tensor:
        with self.precision:
            return encode_text(loaded.model, tokens).float().cpu()

    def texts(self, texts: list[str]) -> dict[str, Tensor]:
        """{row: features (len(texts), D)}; batches are of texts of nearly one length."""
        found, tokens = {}, {}
        for row, loaded in self.models.items():
            if (key := json.dumps(loaded.config)) not in tokens:
                tokens[key] = loaded.tokenizer(texts)
            order, parts = (tokens[key] != 0).sum(1).argsort(stable=True), []  # 0: no token
            for rows in tqdm(order.split(4 * self.batch_size), f"{row}: texts", leave=False):
                parts.append(self.text(loaded, tokens[key][rows]))
            found[row] = torch.cat(parts)[order.argsort()]
        return found

    def encode(self, items: list[Item], matched: Iterable[Item] = ()) -> dict[str, "Features"]:
        """{row: Features} of the items whose pictures are there: each picture and text once; an
        X-VLM also matches the pictures of `matched` with their texts."""
        keys = [key for key in dict.fromkeys(i.key for i in items) if os.path.exists(key[0])]
        image = {key: n for n, key in enumerate(keys)}
        texts = list(dict.fromkeys(text for i in items if i.key in image for text in i.texts))
        text = {t: n for n, t in enumerate(texts)}
        itm, pairs = defaultdict(dict), defaultdict(dict)  # in pairs {picture: {text: None}}
        for item in matched:
            if item.key in image:
                pairs[image[item.key]] |= dict.fromkeys(text[t] for t in item.texts)

        def match(row: str, first: int, states: Tensor) -> None:
            loaded, those = self.models[row], range(first, first + len(states))
            if found := [(i, t) for i in those for t in pairs[i]]:
                tokens = loaded.tokenizer([texts[t] for _, t in found])
                logits = loaded.model.match(states, tokens, torch.tensor(found)[:, 0] - first)
                itm[row] |= zip(found, logits.tolist())

        pictures, _ = self.images(keys, picture, "benchmarks", match)
        encoded = self.texts(texts)
        for row in self.models:  # nan would pass for an item without a picture
            found = pictures[row], encoded[row], torch.tensor([*itm[row].values()])
            if not all(values.isfinite().all() for values in found):
                raise BadInput(f"{row} gives features that are not finite: its weights are broken")
        return {r: Features(pictures[r], encoded[r], image, text, itm[r]) for r in self.models}


class Features(NamedTuple):
    """Unit features of one model; a picture that is not there has none."""

    images: Tensor  # (P, D)
    texts: Tensor  # (T, D)
    image: dict[tuple, int]  # Item.key -> row of images
    text: dict[str, int]  # text -> row of texts
    itm: dict[tuple[int, int], float] = {}  # of an X-VLM: rows of images and texts -> ITM logit

    def there(self, items: Iterable[Item]) -> list[Item]:
        return [item for item in items if item.key in self.image]

    def scores(self, items: list[Item], itm: bool = False) -> Tensor:
        """(N, 2): cosines of the picture with the positive, and with the closest negative, or nan.
        With `itm`, an X-VLM's ITM logits are added first, as in ARO's code."""
        rows = [
            (2 * n + (k > 0), self.image[item.key], self.text[text])
            for n, item in enumerate(items)
            if item.key in self.image
            for k, text in enumerate(item.texts)
        ]
        place, image, text = torch.tensor(rows).T
        found = torch.full((2 * len(items),), nan)
        cosine = dots(self.images, image, self.texts, text)
        if itm and self.itm:
            cosine += torch.tensor([self.itm[i, t] for _, i, t in rows])
        return found.scatter_reduce(0, place, cosine, "amax", include_self=False).view(-1, 2)


def dots(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """(N,): a[i] . b[j] for row numbers i, j (N,); in chunks, for there may be millions."""
    return torch.cat([(a[m] * b[n]).sum(1) for m, n in zip(i.split(2**14), j.split(2**14))])


# ---- Metrics: numbers in, numbers out ------------------------------------------------------------


class Accuracy(NamedTuple):
    """Pair accuracy of one group. A tie is wrong; chance is 50 %, with 4 negatives 20 %."""

    right: int = 0
    scored: int = 0
    ties: int = 0
    missing: int = 0  # items without a picture

    @property
    def all(self) -> int:
        return self.scored + self.missing

    @property
    def percent(self) -> float:
        return 100 * self.right / self.scored if self.scored else nan


def pair_accuracy(positive: Tensor, negative: Tensor) -> Accuracy:
    """positive, negative (N,): similarities of the true and the closest false caption, or nan."""
    counted = positive > negative, ~positive.isnan(), positive == negative, positive.isnan()
    return Accuracy(*(int(which.sum()) for which in counted))


class Cell(NamedTuple):
    """A number of a table. nan: an average to which something is missing, so that it compares
    with no paper."""

    value: float
    scored: int = 0
    all: int = 0
    ties: int = 0

    def __str__(self) -> str:
        return ("partial" if self.scored else "") if isnan(self.value) else f"{self.value:.1f}"


def average(tree: Tree, percent: dict[str, float]) -> float:
    """The unweighted means of a tree; nan where a group is not in `percent`."""
    if isinstance(tree, str):
        return percent.get(tree, nan)
    values = [average(branch, percent) for branch in tree]
    return sum(values) / len(values) if values else nan


def cell(tree: Tree, groups: dict[str, Accuracy]) -> Cell:
    """A group shows what there is of it; an average is nan unless it is whole."""
    parts = [groups.get(leaf, Accuracy()) for leaf in leaves(tree)]
    pooled = Accuracy(*map(sum, zip(*parts)))
    value = pooled.percent
    if isinstance(tree, list):
        value = average(tree, {group: a.percent for group, a in groups.items()})
    if not isinstance(tree, str) and not all(p.scored and not p.missing for p in parts):
        value = nan
    return Cell(value, pooled.scored, pooled.all, pooled.ties)


def score(items: list[Item], scores: Tensor) -> dict[str, Accuracy]:
    """The accuracy of each group, in the items' order; scores (N, 2) as Features gives them."""
    members = defaultdict(list)
    for n, item in enumerate(items):
        if item.negatives:
            members[item.group].append(n)
    return {group: pair_accuracy(*scores[rows].T) for group, rows in members.items()}


def ranks(queries: Tensor, gallery: Tensor, own: Tensor, gallery_own: Tensor) -> Tensor:
    """(N,) how many of others are at least as close to a query as the closest of its own, from 0.

    queries (N, D), gallery (M, D), and to whom each belongs, (N,) and (M,); in chunks of queries.
    """
    found = []
    for rows in torch.arange(len(queries)).split(256):
        sim, same = queries[rows] @ gallery.T, own[rows, None] == gallery_own  # (256, M)
        best = sim.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        found.append(((sim >= best) & ~same).sum(1))
    return torch.cat(found)


def retrieval_cells(items: list[Item], features: Features) -> dict[str, Cell]:
    """Recall in % at 1, 5 and 10: of captions by a picture (I2T: any of its own counts), and of
    the picture by each caption (T2I). A tie is behind all that tie."""
    there = features.there(items)
    pictures = torch.tensor([features.image[item.key] for item in there])
    texts = features.texts[[features.text[item.positive] for item in there]]
    pictures, owner = pictures.unique(return_inverse=True)
    images, number = features.images[pictures], torch.arange(len(pictures))
    ways = {"I2T": ranks(images, texts, number, owner), "T2I": ranks(texts, images, owner, number)}
    whole, counts = len(there) == len(items), (len(there), len(items))
    return {
        f"{way} R@{k}": Cell(100 * (rank < k).float().mean().item() if whole else nan, *counts)
        for way, rank in ways.items()
        for k in (1, 5, 10)
    }


def similarities(items: list[Item], features: Features) -> Tensor:
    """(N, 2) of the items with one negative, whose picture is there: the similarity of the two
    captions, and by how much the picture is closer to the true one (Fig. 8), as cosines."""
    there = features.there(item for item in items if len(item.negatives) == 1)
    texts = torch.tensor([[features.text[text] for text in item.texts] for item in there])
    cosines = features.scores(there)
    similar = dots(features.texts, texts[:, 0], features.texts, texts[:, 1])
    return torch.stack([similar, cosines[:, 0] - cosines[:, 1]], 1)


def bootstrap(values: Tensor, resamples=50_000, confidence=0.99, seed=0) -> Tensor:
    """(2, C): bounds of the mean of each column of values (N, C), by the percentiles of the means
    of `resamples` draws of N rows with replacement (Sec. 4.5)."""
    n, generator, means = len(values), torch.Generator().manual_seed(seed), []
    columns = values.T.contiguous()
    for start in tqdm(range(0, resamples, step := max(1, 2**22 // n)), "bootstrap", leave=False):
        draws = torch.randint(n, (min(step, resamples - start), n), generator=generator)
        means.append(torch.stack([column[draws].mean(1) for column in columns], 1))
    tail = (1 - confidence) / 2
    return torch.cat(means).quantile(torch.tensor([tail, 1 - tail]), 0)


# ---- Zero-shot classification --------------------------------------------------------------------

# Metrics: scores (N, C) are a softmax over the classes, target (N,) class numbers; 0 to 1.


def accuracy(scores: Tensor, target: Tensor) -> float:
    return (scores.argmax(1) == target).double().mean().item()


def mean_per_class(scores: Tensor, target: Tensor) -> float:
    """Mean recall of the classes that occur in target; the others cannot be chosen."""
    present, target = target.unique(return_inverse=True)
    right = (scores[:, present].argmax(1) == target).double()
    return torch.stack([right[target == c].mean() for c in range(len(present))]).mean().item()


def map_11_point(scores: Tensor, target: Tensor) -> float:
    """Mean over classes of the mean of the best precision at a recall of at least 0, .1, ... 1.

    target (N, C) bool. Each score is a threshold, and precision is 1 at recall 0, as in
    scikit-learn, hence in ELEVATER.
    """
    found = []
    for p, true in zip(scores.T, target.T):
        if true.any():
            above = p >= p[:, None]  # (thresholds, N)
            hits = (above & true).sum(1)
            precision, recall = hits.double() / above.sum(1), hits / true.sum()
            best = [precision[recall >= level / 10 - 1e-6].max().item() for level in range(1, 11)]
            found.append(sum([1, *best]) / 11)
    return sum(found) / len(found)


def roc_auc(scores: Tensor, target: Tensor) -> float:
    """Share of (positive, negative) pairs in the right order, a tie is half; of two classes."""
    lead = scores[target == 1, 1][:, None] - scores[target == 0, 1]
    return (1 + lead.sign().double().mean().item()) / 2


# ELEVATER's 20 test sets, and ImageNet: torchvision's class (-: a folder of pictures), metric
_ZERO_SHOT = """
imagenet-1k - accuracy; caltech-101 - mean_per_class; cifar-10 CIFAR10 accuracy;
cifar-100 CIFAR100 accuracy; country211 Country211 accuracy; dtd DTD accuracy;
eurosat_clip - accuracy; fer-2013 FER2013 accuracy; fgvc-aircraft FGVCAircraft mean_per_class;
food-101 Food101 accuracy; gtsrb GTSRB accuracy; hateful-memes - roc_auc;
kitti-distance - accuracy; mnist MNIST accuracy; oxford-flower-102 Flowers102 mean_per_class;
oxford-iiit-pets OxfordIIITPet mean_per_class; patch-camelyon - accuracy;
rendered-sst2 RenderedSST2 accuracy; resisc45_clip - accuracy; stanford-cars StanfordCars accuracy;
voc-2007-classification VOCDetection map_11_point
"""
METRICS = {f.__name__: f for f in (accuracy, mean_per_class, map_11_point, roc_auc)}
ZERO_SHOT = {name: (kind, METRICS[f]) for name, kind, f in map(str.split, _ZERO_SHOT.split(";"))}
# of these options those that a class of torchvision's takes
TEST_SPLIT = {"split": "test", "train": False, "year": "2007", "image_set": "test"}
VOC = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
person pottedplant sheep sofa train tvmonitor"""


class ImageSet(NamedTuple):
    base: Dataset  # of (picture, class number), or (picture, torchvision's VOC annotation)
    classes: list[str]
    templates: list[str]  # "a photo of a {}."
    metric: Callable[[Tensor, Tensor], float]

    def load(self, n: int) -> tuple[Image.Image, int | Tensor]:
        """Picture n, and its class, or which of VOC's it shows, difficult ones left out."""
        samples = getattr(self.base, "samples", None)
        with reading(samples[n][0] if samples else f"test picture {n}", "a picture with a label"):
            picture, target = self.base[n]
            if isinstance(target, dict):
                objects = target["annotation"]["object"]
                names = {o["name"] for o in objects if o["difficult"] == "0"}
                target = torch.tensor([name in names for name in VOC.split()])
            if target is None:
                raise ValueError("the label is missing")
            return picture.convert("RGB"), target


def image_set(root: Path, name: str, download: bool) -> ImageSet:
    """The test set of zeroshot/NAME: pictures in test/CLASS/, else torchvision's own files, which
    it can download. Raises BadInput, also where the set is absent.

    Class names are the lines of classes.txt, templates those of templates.txt, else the data set's
    own names (ImageNet's: open_clip's, in the order of its folders) and open_clip's 80 templates.
    """
    folder, (kind, metric) = root / "zeroshot" / name, ZERO_SHOT[name]
    if (folder / "test").is_dir() and metric is not map_11_point:
        with reading(folder / "test", "a folder with a folder of pictures for each class"):
            base = torchvision.datasets.ImageFolder(folder / "test")
    elif kind == "-":
        raise BadInput(f"{folder / 'test'} is absent: a folder of pictures for each class")
    else:
        base = getattr(torchvision.datasets, kind)
        options, known = TEST_SPLIT | {"download": download}, inspect.signature(base).parameters
        with reading(folder, f"torchvision's {kind} (--download may get it)"):
            base = base(folder, **{k: v for k, v in options.items() if k in known})

    def lines(file: str, default: list[str]) -> list[str]:
        path = folder / file
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else default

    names = VOC.split() if metric is map_11_point else getattr(base, "classes", ())
    own = [str(c).replace("_", " ") for c in names]
    classes = lines("classes.txt", open_clip.IMAGENET_CLASSNAMES if name == "imagenet-1k" else own)
    if not classes or own and len(own) != len(classes):
        raise BadInput(f"{folder}/classes.txt must name {len(own) or 'all'} classes, one a line")
    prompts = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if not (templates := lines("templates.txt", prompts)):
        raise BadInput(f"{folder}/templates.txt is empty")
    return ImageSet(base, classes, templates, metric)


def zero_shot(scorer: Scorer, images: ImageSet, name: str) -> dict[str, Cell]:
    """{row: score in %} of the softmax of 100 * cosine with a class's mean text [ELEVATER]."""
    features, targets = scorer.images(range(len(images.base)), images.load, name)
    found = {}
    for row, loaded in scorer.models.items():
        text = SimpleNamespace(encode_text=functools.partial(scorer.text, loaded))
        prompts = loaded.tokenizer, images.classes, images.templates
        weights = open_clip.build_zero_shot_classifier(text, *prompts).float()  # (D, C)
        scores = (100 * features[row] @ weights).softmax(1)  # (N, C)
        found[row] = Cell(100 * images.metric(scores, targets), len(targets), len(targets))
    return found


def score_zero_shot(scorer: Scorer, sets: dict[str, ImageSet], notes: list[str]) -> dict:
    """{row: {set: Cell}}, with the mean over ELEVATER's 20 if all are there; a set that cannot be
    read gets a line in `notes`."""
    rows = {row: {} for row in scorer.models}
    for name, images in sets.items():
        try:
            for row, value in zero_shot(scorer, images, name).items():
                rows[row][name] = value
        except BadInput as e:
            notes.append(f"zero-shot {name} is not scored: {last_line(e)}")
    elevater = [name for name in ZERO_SHOT if name != "imagenet-1k"]
    for cells in rows.values():
        value = average(elevater, {name: c.value for name, c in cells.items()})
        cells["ELEVATER"] = Cell(value, len({*elevater} & {*cells}), len(elevater))
    return rows


# ---- The benchmarks, and the paper's rows --------------------------------------------------------


class Benchmark(NamedTuple):
    title: str  # with fields of the arguments
    items: Callable[[Files, argparse.Namespace, str], Iterable[Item]]  # str: its name in BENCHMARKS
    columns: Callable[[dict], dict[str, Tree]] = lambda groups: {group: group for group in groups}
    more: Callable[[list[Item], Features], dict[str, Cell]] = lambda *_: {}  # further columns
    analysis: bool = False  # with the intervals of Fig. 8
    itm: bool = False  # an X-VLM is scored by ITM logit + cosine, not by cosine


def pairs_columns(groups: dict) -> dict:
    return {group: group for group in groups} | {"mean": list(groups)}


def toy_cells(items: list[Item], features: Features) -> dict[str, Cell]:
    """Retrieval among the full descriptions of all scenes, and the means of Fig. 8."""
    recall = retrieval_cells([i for i in items if i.group == "object"], features)
    means = similarities([i for i in items if i.group in KINDS], features).mean(0).tolist()
    cells = {name: c for name, c in recall.items() if name.endswith("@1")}
    for name, mean in zip(("S(T,Tk) %", "S(I,T)-S(I,Tk) %"), means):
        cells[name] = Cell(100 * mean, len(items), len(items))
    return cells


BENCHMARKS = {
    "aro": Benchmark("ARO (Table 1)", aro_items, aro_columns, analysis=True, itm=True),
    "order": Benchmark("ARO: word order, the caption among four perturbations", order_items),
    "valse": Benchmark("VALSE (Table 1)", valse_items, valse_columns, itm=True),
    "vlc": Benchmark("VL-CheckList (Table 2)", vlc_items, vlc_columns),
    "sugarcrepe": Benchmark("SugarCrepe (Table 3)", sugarcrepe_items, sugarcrepe_columns),
    "coco": Benchmark(
        "COCO retrieval, Karpathy's 5k test (Table 5: R@5)", retrieval_items, more=retrieval_cells
    ),
    "flickr30k": Benchmark("Flickr30k retrieval, 1k test", retrieval_items, more=retrieval_cells),
    "pairs": Benchmark("Negatives of {pairs}", negatives_items, pairs_columns, analysis=True),
    "captions": Benchmark("Retrieval, {captions}", retrieval_items, more=retrieval_cells),
    "toy": Benchmark("Toy world, unseen scenes", toy_items, more=toy_cells),
}
SALESFORCE = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
GET = {  # what to download, how large, where to put it: of the benchmarks in --data-root
    "aro": "visual_genome_{relation,attribution}.json and images/ (1 GB) of "
    "https://github.com/mertyg/vision-language-models-are-bows in aro/",
    "valse": "data/*.json of https://github.com/Heidelberg-NLP/VALSE in valse/; pictures: README",
    "vlc": "corpus/ and data/ of https://github.com/om-ai-lab/VL-CheckList in vl_checklist/; "
    "pictures: README",
    "sugarcrepe": "data/*.json of https://github.com/RAIVNLab/sugar-crepe (2 MB) in sugarcrepe/, "
    "http://images.cocodataset.org/zips/val2017.zip (0.8 GB) in coco/",
    "coco": f"{SALESFORCE}/coco_karpathy_test.json in coco/annotations/, "
    "http://images.cocodataset.org/zips/val2014.zip (6.3 GB) in coco/",
    "flickr30k": f"{SALESFORCE}/flickr30k_test.json and flickr30k-images/ (4 GB) in flickr30k/",
}
GET["order"] = f"{GET['coco']}; {GET['flickr30k']}"
PAPER = {  # rows of Tables 1 to 3 and 5, in the order of a benchmark's columns
    "aro": """XVLM-coco 73.4 86.8, CE-XVLM 73.9 89.3,
    CLIP 59.3 62.9, NegCLIP 80.2 70.5, CE-CLIP 83.0 76.4, CE-CLIP+ 83.6 77.1""",
    # the average over 11 files is printed, but in CE-CLIP+'s row, where it is that over 9 columns
    "valse": """XVLM-coco 83.0 75.6 67.5 70.2 73.8 68.6 46.4 49.6 94.8 69.5,
    CE-XVLM 83.5 72.8 72.1 68.7 71.8 69.1 51.0 46.8 93.8 70.8,
    CLIP 68.7 57.1 61.0 65.4 77.8 71.8 54.1 51.0 89.8 65.3,
    NegCLIP 76.8 71.7 65.0 72.9 81.6 84.7 58.6 53.8 91.9 71.6,
    CE-CLIP 78.6 77.7 64.4 74.4 81.2 88.6 54.7 54.8 93.7 72.5,
    CE-CLIP+ 84.5 79.2 67.8 76.4 83.4 89.4 56.7 57.8 94.7 - 76.7""",
    "vlc": """XVLM-coco 80.4 81.1 83.1 60.3 70.8 86.3 85.3 79.0 61.8 75.1 85.8 70.4 76.5,
    CE-XVLM 80.5 76.0 80.6 67.2 69.8 87.3 86.6 80.8 78.6 74.8 86.9 79.7 78.6,
    CLIP 70.5 69.4 69.5 60.7 67.0 80.2 79.7 72.2 53.8 67.4 80.0 63.0 69.2,
    NegCLIP 72.1 75.7 78.1 61.3 67.3 84.4 83.8 80.7 57.1 70.9 84.1 68.9 73.4,
    CE-CLIP 75.6 72.7 79.7 65.3 69.8 84.8 84.5 78.5 65.0 72.6 84.6 71.8 75.1,
    CE-CLIP+ 78.5 83.5 85.2 65.8 70.8 86.7 85.9 81.0 68.4 76.7 86.3 74.7 78.4""",
    "sugarcrepe": """CLIP 90.9 80.0 69.2 61.4 64.0 77.2 68.2 80.2 62.7 72.7 73.1,
    NegCLIP 92.7 85.9 76.5 75.2 75.4 88.8 82.8 85.0 75.3 85.8,
    CE-CLIP 93.1 88.8 79.0 72.8 77.0 92.4 93.4 87.0 74.9 92.9 85.2,
    CE-CLIP+ 93.8 90.8 83.2 76.8 79.3 93.8 94.9 89.3 78.0 94.4 87.5""",
}
PAPER_5 = tuple(f"{name} (paper)" for name in ("CLIP", "CLIP-FT", "CE-CLIP", "CE-CLIP+"))
TABLE_5 = {  # task: benchmark, column, and where the paper has them the values of PAPER_5
    "ARO-R": ("aro", "Relation", 59.3, 61.7, 83.0, 83.6),
    "ARO-A": ("aro", "Attribution", 62.9, 66.1, 76.4, 77.1),
    "VALSE (76.7: 9 columns)": ("valse", "Avg 11 files", 65.3, 71.8, 72.5, 76.7),
    "VL-CheckList": ("vlc", "Avg", 69.2, 68.6, 75.1, 78.4),
    "SugarCrepe": ("sugarcrepe", "macro", 73.1, 77.2, 85.2, 87.5),
    "COCO T2I R@5": ("coco", "T2I R@5", 56.0, 66.2, 69.4, 72.3),
    "COCO I2T R@5": ("coco", "I2T R@5", 75.0, 78.3, 74.3, 76.1),
    "ImageNet": ("zeroshot", "imagenet-1k"),
    "ELEVATER": ("zeroshot", "ELEVATER", 56.4, 57.2, 53.2, 54.8),
    "negatives": ("pairs", "mean"),
    "captions T2I R@5": ("captions", "T2I R@5"),
    "captions I2T R@5": ("captions", "I2T R@5"),
}
COMPOSITIONAL = {"aro", "valse", "vlc", "sugarcrepe", "pairs"}  # the other tasks: standard


def paper_rows(key: str) -> dict[str, dict[str, Cell]]:
    """The paper's columns as printed, and the averages that follow where it prints none."""
    columns, rows = BENCHMARKS[key].columns({}), defaultdict(dict)
    for row in PAPER[key].split(",") if key in PAPER else ():
        name, *values = row.split()
        printed = {c: float(v) for c, v in zip(columns, values) if v != "-"}
        splits_last = reversed(printed.items())
        leaf = {leaf: v for column, v in splits_last for leaf in leaves(columns[column])}
        means = {c: average(t, leaf) for c, t in columns.items() if not isinstance(t, tuple)}
        rows[f"{name} (paper)"] = {c: Cell(v) for c, v in (means | printed).items()}
    for benchmark, column, *values in TABLE_5.values():
        for name, value in zip(PAPER_5, values) if benchmark == key and key not in PAPER else ():
            rows[name][column] = Cell(value)
    return rows


# ---- Reports -------------------------------------------------------------------------------------


def markdown(rows: dict[str, dict[str, str | Cell]]) -> str:
    """A table with the columns of all rows, in the order of the longest."""
    longest_first = sorted(rows.values(), key=len, reverse=True)
    columns = list(dict.fromkeys(column for row in longest_first for column in row))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(str(row.get(column, "")) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def counts(cells: dict[str, Cell]) -> dict[str, str]:
    return {column: f"{c.scored}/{c.all}" for column, c in cells.items()}


class Scored(NamedTuple):
    """One benchmark with all that was found."""

    title: str
    items: list[Item]
    absent: list[str]  # files
    scores: dict[str, Tensor]  # row -> (N, 2), see Features.scores
    groups: dict[str, dict[str, Accuracy]]  # row -> group
    cells: dict[str, dict[str, Cell]]  # row -> column
    fig_8: dict[str, Tensor]  # row -> (3, 2): mean, lower and upper bound of `similarities`

    @property
    def partial(self) -> bool:
        cells = [c for row in self.cells.values() for c in row.values()]
        return bool(self.absent) or any(c.scored < c.all for c in cells)


def score_benchmark(b: Benchmark, items, absent, features: dict[str, Features]) -> Scored:
    """All numbers of one benchmark, for each model."""
    scores, cells, groups, fig_8 = {}, {}, {}, {}
    for row, f in features.items():
        scores[row] = f.scores(items, b.itm)
        groups[row] = score(items, scores[row])
        trees = b.columns(groups[row]).items()
        cells[row] = {name: cell(tree, groups[row]) for name, tree in trees} | b.more(items, f)
        if b.analysis:
            values = similarities(items, f)
            fig_8[row] = torch.cat([values.mean(0, keepdim=True), bootstrap(values)])
    of_itm = b.itm and any(f.itm for f in features.values())
    title = f"{b.title}, X-VLM by ITM logit + cosine" if of_itm else b.title
    return Scored(title, items, absent, scores, groups, cells, fig_8)


def report(key: str, s: Scored) -> str:
    """The paper's rows and one for each checkpoint, and how many items stand behind each number."""
    mark = " - PARTIAL" if s.partial else ""
    text = [f"## {s.title}, %{mark}"]
    numbers = counts([*s.cells.values()][-1])
    text += [markdown(paper_rows(key) | s.cells | {"scored/all": numbers})]
    if s.absent:
        text.append(f"Absent: {', '.join(s.absent)}.")
    unique, same = len(set(s.items)), sum(i.positive in i.negatives for i in s.items)
    text.append(
        f"{len(s.items)} items, {len(s.items) - unique} of them repeated; in {same} a negative is "
        f"the caption itself. Ties, counted as wrong: "
        + ", ".join(f"{row} {sum(a.ties for a in g.values())}" for row, g in s.groups.items())
    )
    if s.fig_8:
        text.append("Representations (Fig. 8), cosines in % with 99 % bootstrap intervals:")
        names, rows = ("similarity of caption and negative", "gap between them for the picture"), {}
        for row, values in s.fig_8.items():
            means = ["{:.2f} [{:.2f}, {:.2f}]".format(*v) for v in (100 * values.T).tolist()]
            rows[row] = dict(zip(names, means))
        text.append(markdown(rows))
    return "\n\n".join(text)


def report_zero_shot(sets: dict[str, ImageSet], rows: dict[str, dict[str, Cell]]) -> str:
    last = [*rows.values()][-1]
    metrics = {name: sets[name].metric.__name__ for name in last if name in sets}
    table = markdown({"metric": metrics} | rows | {"scored/all": counts(last)})
    return f"## Zero-shot classification, %\n\n{table}"


def table_5(results: dict[str, dict[str, dict[str, Cell]]]) -> dict[str, dict[str, Cell]]:
    """{task: {row: its cell}} of {benchmark: {row: {column: cell}}}."""
    return {
        task: {row: cells[column] for row, cells in results[key].items() if column in cells}
        for task, (key, column, *_) in TABLE_5.items()
        if key in results
    }


def headline(tasks: dict[str, dict[str, Cell]], base: str | None) -> str:
    """Table 5: what composition gained beside what retrieval and classification lost."""
    rows = {}
    for task, cells in tasks.items():
        rows[task] = dict(zip(PAPER_5, map(Cell, TABLE_5[task][2:]))) | cells
        for row, cell in cells.items() if base in cells else ():
            gain = cell.value - cells[base].value
            if row != base and not isnan(gain):
                rows[task][row] = f"{cell} ({gain:+.1f})"
    title = "## Gain and forgetting (Table 5)" + (f", difference to {base}" if base else "")
    return f"{title}\n\n{markdown(rows)}" if rows else ""


def decisions(scored: dict[str, Scored]) -> Iterator[dict]:
    """One record for each scored item and model."""
    for key, s in scored.items():
        for row, scores in s.scores.items():
            for item, (positive, negative) in zip(s.items, scores.tolist()):
                if not isnan(negative):
                    found = {"right": positive > negative, "scores": [positive, negative]}
                    yield {"benchmark": key, "model": row, **item._asdict(), **found}


def plain(x):
    """As JSON has it: named tuples are objects, nan is null."""
    x = x._asdict() if hasattr(x, "_asdict") else x
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return None if isinstance(x, float) and isnan(x) else x


def write_results(args, paths, text: str, results: dict, scored: dict[str, Scored]) -> None:
    """results.md, results.json, with --items items.jsonl; the same run writes the same bytes."""
    packages = ("torch", "open_clip_torch", "spacy", "transformers")
    files = [path for path in (args.base, *paths.values()) if path and Path(path).is_file()]
    places = "out", "examples", "figures"
    content = {
        "settings": {k: v for k, v in vars(args).items() if k not in places},
        "versions": {name: version(name) for name in packages},
        "sha256": {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files},
        "cells": results,
        "groups": {key: s.groups for key, s in scored.items()},
        "fig_8": {k: {row: v.tolist() for row, v in s.fig_8.items()} for k, s in scored.items()},
        "absent": {key: s.absent for key, s in scored.items()},
    }
    save_text(args.out / "results.json", json.dumps(plain(content), indent=1) + "\n")
    save_text(args.out / "results.md", text)
    if args.items:
        lines = (json.dumps(d) + "\n" for d in decisions(scored))
        save_text(args.out / "items.jsonl", "".join(lines))


def save_text(path: Path, text: str) -> None:
    with writing(path):
        (part := Path(f"{path}.part")).write_text(text, encoding="utf-8")
        os.replace(part, path)


def write_examples(path: Path, s: Scored) -> None:
    """A sheet in the manner of Fig. 9 and 10: twelve items, where the models differ first."""
    scores = torch.stack([*s.scores.values()])  # (models, N, 2)
    order = (~scores[0, :, 1].isnan()).nonzero().flatten().tolist()
    if not order:
        return
    order = random.Random(0).sample(order, len(order))
    votes = (scores[..., 0] > scores[..., 1]).T  # (N, models)
    right, entries = votes.sum(1).tolist(), []
    for i in sorted(order, key=lambda i: (right[i] in (0, len(scores)), right[i] > 0))[:12]:
        item = s.items[i]
        lines = [(item.positive, toy.GREEN), *((text, toy.RED) for text in item.negatives)]
        chose = ("the true one" if vote else "a false one" for vote in votes[i])
        lines += [(f"{row}: {which}", "gray") for row, which in zip(s.scores, chose)]
        entries.append((load_image(item.image, Image.Image.copy, item.box), lines))
    toy.sheet(entries).save(path)


def plot(path: Path, curves=(), bars=None, **texts) -> None:
    """Curves (label, x, y), or bars (names, heights, errors)."""
    from matplotlib.figure import Figure  # an optional package: main looks for it

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, x, y in curves:
        axes.plot(x, y, label=label, marker="o" if len(x) < 20 else None)
        axes.legend()
    if bars:
        axes.bar(*bars[:2], yerr=bars[2], ecolor="red")
        axes.tick_params(axis="x", labelrotation=20)
    axes.set(**texts)
    figure.savefig(path, dpi=120)


def write_figures(args, paths, scored: dict[str, Scored], tasks: dict) -> None:
    """Fig. 5b and 5d (thresholds and losses of each run), Fig. 8, and what WiSE-FT trades."""
    of_fig_5 = {"thresholds": [f"threshold_{k}" for k in KINDS], "losses": ["itc", "imc", "cmr"]}
    for log in dict.fromkeys(Path(path).parent / "log.jsonl" for path in paths.values()):
        if not log.exists():
            continue
        with reading(log, "a log of ce_clip.py"):
            steps = [json.loads(line) for line in log.read_text().splitlines()]
            columns = {key: [step[key] for step in steps] for key in steps[0]}
            at = columns["step"]
        for name, keys in of_fig_5.items():
            curves = [(key, at, columns[key]) for key in keys if key in columns]
            run_name = str(log.parent).strip("/").replace("/", "-")
            path = args.figures / f"fig5-{run_name}-{name}.png"
            plot(path, curves, title=name, xlabel="step")
    titles = {"similarity": "S(T, T_hn)", "gap": "S(I, T) - S(I, T_hn)"}
    for key, s in scored.items():
        for column, (name, title) in enumerate(titles.items() if s.fig_8 else ()):
            mean, low, high = torch.stack(list(s.fig_8.values()))[:, :, column].T
            error = torch.stack([mean - low, high - mean]).clamp(min=0).tolist()
            bars = list(s.fig_8), mean.tolist(), error
            plot(args.figures / f"fig8-{key}-{name}.png", bars=bars, title=title)
    curves = []
    for ckpt in paths if args.wise else ():
        rows = [f"{ckpt}, WiSE {alpha:g}" for alpha in args.wise]
        means = ([mean_of_tasks(tasks, row, c) for row in rows] for c in (False, True))
        curves.append((ckpt, *means))
    if curves:
        labels = {"xlabel": "standard tasks, mean %", "ylabel": "compositional tasks, mean %"}
        plot(args.figures / "wise.png", curves, title=f"WiSE-FT, alpha {args.wise}", **labels)


def mean_of_tasks(tasks: dict[str, dict[str, Cell]], row: str, compositional: bool) -> float:
    """Of one model's tasks of that sort, of those that are whole; nan if there are none."""
    asked = (task for task in tasks if (TABLE_5[task][0] in COMPOSITIONAL) == compositional)
    of_sort = [tasks[task] for task in asked]
    return torch.tensor([cells[row].value for cells in of_sort if row in cells]).nanmean().item()


# ---- Command line --------------------------------------------------------------------------------

TOY_RUNS = {  # row of the table: run of ce_clip.py
    "pre-trained": "toy-pretrained",
    "CLIP-FT (Eq. 1)": "toy-itc",
    "NegCLIP's loss (Eq. 2)": "toy-itc-hn",
    "CE-CLIP (Eq. 8)": "toy",
}


def toy_checkpoints() -> dict[str, str]:
    """{row: last checkpoint} of the runs that `python ce_clip.py` made."""
    found = {row: [*Path("runs", run).glob("epoch_*.pt")] for row, run in TOY_RUNS.items()}
    if not any(found.values()):
        raise BadInput("no runs/toy: run python ce_clip.py first, or give --ckpt")
    last = {row: max(paths, key=lambda p: int(p.stem[6:])) for row, paths in found.items() if paths}
    return {row: str(path) for row, path in last.items()}


def interpolate(base: Loaded, tuned: Loaded, alpha: float) -> Loaded:
    """WiSE-FT (arXiv 2109.01903): weights (1 - alpha) * base + alpha * tuned."""
    one, two = base.model.state_dict(), tuned.model.state_dict()
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in two.items()}:
        raise BadInput(f"--wise: the base is a {base.name}, the checkpoint a {tuned.name}")
    model = copy.deepcopy(tuned.model)
    for name, weight in model.state_dict().items():
        if weight.is_floating_point():
            weight.copy_(torch.lerp(one[name], weight, alpha))
    return tuned._replace(model=model)


def load_models(args: argparse.Namespace, paths: dict[str, str]) -> dict[str, Loaded]:
    """{row: model}: the base, the checkpoints of {row: path}, with --wise what lies between."""
    base = {args.base: load_model(args.base, args.model)} if args.base else {}
    models = dict(base)
    for row, path in paths.items():
        tuned = base[path] if path in base else load_model(path, args.model)
        for alpha in args.wise or ():
            models[f"{row}, WiSE {alpha:g}"] = interpolate(base[args.base], tuned, alpha)
        if not args.wise:
            models[row] = tuned
    return models


def plan(args: argparse.Namespace) -> tuple[dict[str, tuple], dict[str, ImageSet], list[str]]:
    """{key: (benchmark, items, absent files)} and {name: zero-shot set} of what is asked for and
    can be scored, and a line for each that cannot."""
    asked = [key for key in dict.fromkeys(args.bench) if key in BENCHMARKS]
    asked += [key for key in ("pairs", "captions") if vars(args)[key]]
    if not (args.bench or asked):
        asked = ["toy"]
    planned, sets, notes = {}, {}, []
    for key in asked:
        b = BENCHMARKS[key]
        files = Files(Path(args.data_root if key in GET else ""))
        items = list(b.items(files, args, key))
        itm = b.itm if args.score is None else args.score == "itc+itm"
        itm &= any(item.negatives for item in items)  # retrieval is by cosine
        b = b._replace(title=b.title.format_map(vars(args)), itm=itm)
        pictures = dict.fromkeys(item.image for item in items)
        if any(map(os.path.exists, pictures)):
            planned[key] = b, items, files.absent
            continue
        absent = files.absent or [*pictures] or ["its files"]
        more = f" and {len(absent) - 1} more are" if len(absent) > 1 else " is"
        get = f". Get {GET[key]}" if key in GET else ""
        notes.append(f"{b.title} is not scored: {absent[0]}{more} absent{get}")
    absent = []
    for name in [name for name in ZERO_SHOT if {"zeroshot", name} & {*args.bench}]:
        try:
            sets[name] = image_set(Path(args.data_root), name, args.download)
        except BadInput as e:
            absent.append(f"zero-shot {name} is not scored: {e}")
    if len(absent) == len(ZERO_SHOT):
        absent = [f"zero-shot: none of the sets is in {args.data_root}/zeroshot: see README"]
    return planned, sets, notes + absent


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = p.add_argument_group("models").add_argument
    add("--ckpt", nargs="+", help="checkpoints of ce_clip.py or others, or open_clip tags (openai)")
    add("--model", help="what tags and bare weights are: open_clip's, xvlm [ViT-B-32-quickgelu]")
    add("--base", help="checkpoint or tag before fine-tuning: differences to it are shown")
    add("--wise", nargs="+", type=float, metavar="ALPHA", help="WiSE-FT: (1 - a) base + a ckpt")
    add = p.add_argument_group("benchmarks").add_argument
    names = [key for key in BENCHMARKS if key in GET] + ["zeroshot"]
    choices, all_of = [*names, *ZERO_SHOT], f"{', '.join(names)}, or one zero-shot set [all]"
    add("--data-root", help="folder of the benchmarks: see README")
    add("--bench", nargs="+", choices=choices, metavar="NAME", help=all_of)
    add("--pairs", help="score the kinds of a .jsonl of negatives.py")
    add("--captions", help="retrieval on a COCO or Karpathy captions file")
    add("--images", help="picture folder of --pairs or --captions")
    add("--vlc-rows", type=int, default=1000, help="first rows of each VLC file, 0: all [paper]")
    add("--score", choices=("itc", "itc+itm"), help="of an X-VLM [itc+itm: ARO, VALSE; else itc]")
    add("--download", action="store_true", help="let torchvision fetch zero-shot test sets")
    add("--strict", action="store_true", help="fail if a benchmark is absent or partial")
    add = p.add_argument_group("running").add_argument
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--batch-size", type=int, default=64, help="pictures; four times as many texts")
    add("--workers", type=int, default=0, help="loader processes")
    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, help="folder for results.json and results.md")
    add("--items", action="store_true", help="items.jsonl in --out: each single decision")
    add("--examples", type=Path, help="folder for sheets of what was chosen (Fig. 9, 10)")
    add("--figures", type=Path, help="folder for Fig. 5 and 8 and WiSE-FT, by matplotlib")
    args = p.parse_args()
    if bool(args.pairs or args.captions) != bool(args.images):
        p.error("--pairs or --captions go together with --images")
    if (args.pairs or args.captions or args.data_root or args.base) and not args.ckpt:
        p.error("--data-root, --pairs, --captions and --base need --ckpt")
    if args.wise and not args.base:
        p.error("--wise needs --base: between what and the checkpoint?")
    if args.bench and not args.data_root:
        p.error("--bench needs --data-root")
    if args.items and not args.out:
        p.error("--items needs --out")
    args.bench = args.bench or (names if args.data_root else [])
    return args


def main() -> None:
    args = parse_args()
    for folder in filter(None, (args.out, args.examples, args.figures)):
        with writing(folder / "x"):
            pass
    if args.figures and not find_spec("matplotlib"):
        raise BadInput("--figures needs matplotlib: pip install matplotlib")
    paths = {path: path for path in args.ckpt} if args.ckpt else toy_checkpoints()
    planned, sets, notes = plan(args)
    if not planned and not sets:
        raise BadInput("; ".join(notes))
    if args.strict and notes:
        raise BadInput(notes[0])
    scorer = Scorer(load_models(args, paths), args)
    if args.score and not any(hasattr(loaded.model, "match") for loaded in scorer.models.values()):
        raise BadInput("--score is about X-VLM, and no model is one")
    items = [item for _, items, _ in planned.values() for item in items]
    matched = [item for b, items, _ in planned.values() if b.itm for item in items]
    features = scorer.encode(items, matched) if items else {}
    scored = {key: score_benchmark(*parts, features) for key, parts in planned.items()}
    text = [report(key, s) for key, s in scored.items()]
    results = {key: s.cells for key, s in scored.items()}
    if sets:
        results["zeroshot"] = score_zero_shot(scorer, sets, notes)
        text.append(report_zero_shot(sets, results["zeroshot"]))
    tasks = table_5(results)
    text += [headline(tasks, args.base), "\n".join(notes)]
    text = "\n\n".join(filter(None, text)) + "\n"
    print(text)
    if args.out:
        write_results(args, paths, text, results, scored)
    for key, s in scored.items():
        if args.examples:
            write_examples(args.examples / f"{key}.png", s)
    if args.figures:
        write_figures(args, paths, scored, tasks)
    partial = [
        f"partial, for pictures or files are absent: {s.title}"
        for s in scored.values()
        if s.partial
    ]
    if args.strict and (failed := partial + notes):
        raise BadInput(failed[0])


if __name__ == "__main__":
    run(main)
