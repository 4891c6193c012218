"""Score checkpoints on the paper's benchmarks (arXiv 2306.08832, Tables 1, 2, 3, 5, Fig. 7).

    python eval_bench.py --ckpt runs/coco/epoch_5.pt --base openai --out results
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --image photo.jpg --texts "a dog" "a cat"

Most benchmarks are lists of items: is the image closer to the true caption than to the false one?
The function of a benchmark reads files below --data-root, scores the items whose image is there,
and averages as the paper does. A checkpoint encodes each image and text once for all benchmarks.
There are two exceptions: zero_shot encodes its own, and an X-VLM matches images and texts anew.
"""

import csv
import json
import random
import re
import statistics
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import files
from ce_clip import DEFAULT_MODEL, Loaded, encode_text, find_tag, load_model
from files import BadInput, ImagePart, at_least, one_line_errors

# An item: an ImagePart, its true and its false caption. A group (a subset, a relation, a kind) has
# one accuracy. An entry, of which a benchmark counts how many are right, is one item or several.
Item = namedtuple("Item", "group image positive negative")


@dataclass
class Cell:  # a number of a table, in %: of a group, or of a column, which averages groups
    value: float | None = None  # None: there is nothing to show
    scored: int = 0  # how many entries it comes from
    total: int = 0  # how many there are; the images of the others are missing
    ties: int = 0
    blind: float | None = None  # with --blind: see add_blind_and_looking
    looking: float | None = None
    same_tokens: int = 0  # how many have two texts with the same tokens, so that none can win

    def __str__(self) -> str:
        without_value = "partial" if self.scored else ""  # partial: an average that lacks items
        return without_value if self.value is None else f"{self.value:.1f}"


@dataclass
class Log:  # what the function of a benchmark notes down besides the cells that it returns
    blind: bool = False  # a setting: whether blind and looking are to be computed
    decisions: list[dict] = field(default_factory=list)  # the lines of items.jsonl
    absent: dict[str, None] = field(default_factory=dict)  # files that are not there: each key one

    def note_if_absent(self, path: Path) -> bool:
        if not path.exists():
            self.absent[str(path)] = None
        return not path.exists()


def mean(cells: Iterable[Cell]) -> Cell:
    """The unweighted mean of several cells. It has no value if one of the cells lacks items or a
    value, because it could not be compared with the paper's. A single cell is returned as it is."""
    cells = list(cells)
    if len(cells) == 1:
        return cells[0]
    average = Cell()
    for name in ("scored", "total", "ties", "same_tokens"):
        setattr(average, name, sum(getattr(cell, name) for cell in cells))
    for name in ("value", "blind", "looking"):
        values = [getattr(cell, name) for cell in cells]
        if values and None not in values and average.scored == average.total:
            setattr(average, name, statistics.mean(values))
    return average


def percent(values: list[float]) -> float | None:
    """The mean of values from 0 to 1, in %; None if there are no values."""
    return 100 * sum(values) / len(values) if values else None


def cell_of(decisions: list[dict], total: int) -> Cell:
    """The cell of decisions with the keys right, tie and same_tokens."""
    cell = Cell(percent([decision["right"] for decision in decisions]), len(decisions), total)
    cell.ties = sum(decision["tie"] for decision in decisions)
    cell.same_tokens = sum(decision["same_tokens"] for decision in decisions)
    return cell


# ---- Features and scores -------------------------------------------------------------------------
class Scorer:
    """A checkpoint, and the unit features of what it has encoded (float32, on the CPU)."""

    def __init__(self, loaded: Loaded, batch_size: int = 64, workers: int = 0):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = loaded.model.to(self.device).eval()
        self.transform, self.tokenizer = loaded.eval_transform, loaded.tokenizer
        self.batch_size, self.workers = batch_size, workers
        self.images, self.texts = {}, {}  # image or text -> its feature (D,)
        self.tokens = {}  # text -> its tokens (L,)

    @torch.inference_mode()
    def encode(self, images: Iterable[ImagePart], texts: Iterable[str]) -> None:
        """Encode what is new. A batch has texts of similar length, so that encode_text is fast."""
        new = [image for image in dict.fromkeys(images) if image not in self.images]
        for batch, pixels in self.batches(new):
            features = self.model.encode_image(pixels, normalize=True)
            self.images.update(zip(batch, files.finite(features)))
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        loader = DataLoader(sorted(new, key=len), 4 * self.batch_size, collate_fn=list)
        for batch in tqdm(loader, "texts", unit="batch", leave=False):
            tokens = self.tokenizer(batch)
            self.tokens.update(zip(batch, tokens))
            self.texts.update(zip(batch, files.finite(encode_text(self.model, tokens))))

    def batches(self, images: list[ImagePart]) -> Iterator[tuple[list[ImagePart], Tensor]]:
        load = partial(load_images, transform=self.transform)
        loader = DataLoader(images, self.batch_size, num_workers=self.workers, collate_fn=load)
        for batch, pixels in tqdm(loader, "images", unit="batch", leave=False):
            yield batch, pixels.to(self.device)


def load_images(batch: list[ImagePart], transform) -> tuple[list[ImagePart], Tensor]:
    return batch, torch.stack([transform(files.open_image(*image)) for image in batch])


def score_item(scorer: Scorer, item: Item, matches: dict) -> dict:
    """A line of items.jsonl. A score is the cosine of text and image. If the logit that they match
    is known (an X-VLM's), it is added, as in ARO's code. `gap`, the difference of the two cosines,
    and `similarity`, the cosine of the two texts, are for Fig. 8."""
    image = scorer.images[item.image]
    positive, negative = scorer.texts[item.positive], scorer.texts[item.negative]
    # One by one: equal captions must have equal scores to the bit, because a tie is wrong.
    scores = [(positive @ image).item(), (negative @ image).item()]
    gap, similarity = scores[0] - scores[1], (positive @ negative).item()
    if matches:
        scores[0] += matches[item.image, item.positive]
        scores[1] += matches[item.image, item.negative]
    same = torch.equal(scorer.tokens[item.positive], scorer.tokens[item.negative])
    line = {"scores": scores, "right": scores[0] > scores[1] and not same}
    line.update(tie=scores[0] == scores[1] and not same, same_tokens=same)
    return item._asdict() | line | {"gap": gap, "similarity": similarity}


def score_items(scorer: Scorer, items: list[Item], log: Log, itm: bool = False) -> list[dict]:
    """A line of items.jsonl for each item whose image is there. They are added to log.decisions,
    and absent images to log.absent. With `itm`, image-text matching, an X-VLM's logit that
    an image and a text match is part of their score."""
    texts_of = defaultdict(dict)  # image -> its texts as keys: each once, and in order
    for item in items:
        if not isinstance(item.positive, str) or not isinstance(item.negative, str):
            raise BadInput(f"{item.group}: not two texts: {item.positive}, {item.negative}")
        if item.image in texts_of or files.is_there(*item.image):
            texts_of[item.image].update({item.positive: None, item.negative: None})
        else:
            log.absent[str(item.image.path)] = None
    matches = {}
    if itm and hasattr(scorer.model, "match"):  # an X-VLM
        matches = scorer.model.match_all(scorer, texts_of)
    scorer.encode(texts_of, (text for texts in texts_of.values() for text in texts))
    lines = [score_item(scorer, item, matches) for item in items if item.image in scorer.images]
    log.decisions += lines
    return lines


def accuracies(
    scorer: Scorer, items: list[Item], log: Log, itm: bool = False, per_entry: int = 1
) -> dict[str, Cell]:
    """{group: its accuracy, and an empty cell for groups without items}. What counts are the
    entries whose image is there. An entry is `per_entry` items that follow one another and show one
    image. It is right if all its items are right. A tie is wrong. If an entry is one item, chance
    is 50."""
    lines = score_items(scorer, items, log, itm)
    decisions = defaultdict(list)  # group -> one decision an entry
    for start in range(0, len(lines), per_entry):
        entry = lines[start : start + per_entry]
        decision = {"right": all(line["right"] for line in entry)}
        decision["tie"] = any(line["tie"] for line in entry)
        decision["same_tokens"] = any(line["same_tokens"] for line in entry)
        decisions[entry[0]["group"]].append(decision)
    cells = defaultdict(Cell)  # a group whose file is absent has an empty cell
    for group, total in Counter(item.group for item in items).items():
        cells[group] = cell_of(decisions[group], total // per_entry)
    if log.blind:
        add_blind_and_looking(scorer, items, lines, cells, itm, per_entry)
    return cells


def add_blind_and_looking(
    scorer: Scorer, items: list[Item], lines: list[dict], cells: dict, itm: bool, per_entry: int
) -> None:
    """Add to the cells and lines two controls that are not the paper's. Blind is the accuracy with
    another entry's image: what a model gets right with a wrong image, it knows from the texts.
    Looking is the percentage of items whose lead, the score of the positive less that of the
    negative, is larger with their own image than with a like one (with_like_images). A tie counts
    half, so ignoring the image gives 50."""
    scored = [item for item in items if item.image in scorer.images]
    blind_log = Log()
    blind = accuracies(scorer, with_other_images(scored, per_entry), blind_log, itm, per_entry)
    for line, other in zip(lines, blind_log.decisions):
        line["blind"], line["other_scores"] = other["right"], other["scores"]
    looking = defaultdict(list)
    for line, like in zip(lines, score_items(scorer, with_like_images(scorer, scored), Log(), itm)):
        own_lead = line["scores"][0] - line["scores"][1]
        like_lead = like["scores"][0] - like["scores"][1]
        line["looking"] = 0.5 if own_lead == like_lead else float(own_lead > like_lead)
        looking[line["group"]].append(line["looking"])
    for group, cell in cells.items():
        cell.blind = blind[group].value
        cell.looking = percent(looking[group])


def with_other_images(items: list[Item], per_entry: int = 1) -> list[Item]:
    """The items with their images exchanged: each entry gets the image of another entry, which has
    another path, and each entry's image is used once (a derangement). An empty list if more than
    half of the entries show one path."""
    own = [item.image for item in items[::per_entry]]
    counts = Counter(image.path for image in own)
    if 2 * max(counts.values(), default=0) > len(own):
        files.say_once("no blind accuracy where one image has more than half of the items")
        return []
    images, rng = own.copy(), random.Random(0)
    rng.shuffle(images)
    for i in range(len(own)):
        while images[i].path == own[i].path:  # exchange it with one so that both fit
            j = rng.randrange(len(own))
            if own[i].path not in (images[j].path, own[j].path):
                images[i], images[j] = images[j], images[i]
    return [item._replace(image=images[n // per_entry]) for n, item in enumerate(items)]


def with_like_images(scorer: Scorer, items: list[Item]) -> list[Item]:
    """The items, each with a like image in place of its own. Among the images with another path,
    this is the one whose similarity to the sum of both texts is closest to the own image's. An
    empty list if all have one path. A random image would not do: if the features of what a model
    takes for a negative depend less on the sentence, the caption's lead is small with any image
    that shows nothing of the sentence, and the model would seem to look."""
    images = list(dict.fromkeys(item.image for item in items))
    paths = [image.path for image in images]
    if len(set(paths)) < 2:
        return []
    number = {path: n for n, path in enumerate(dict.fromkeys(paths))}
    path_of = torch.tensor([number[path] for path in paths])
    features = torch.stack([scorer.images[image] for image in images])
    like = []
    for item in items:
        both = scorer.texts[item.positive] + scorer.texts[item.negative]
        distance = (features @ both - scorer.images[item.image] @ both).abs()
        distance[path_of == number[item.image.path]] = torch.inf
        like.append(item._replace(image=images[distance.argmin()]))
    return like


def read_entries(path: Path, log: Log) -> list:
    """The entries of a benchmark's file: of a JSON list, the values of a JSON object, or JSON
    lines. There are none if the file is absent, and this is noted."""
    if log.note_if_absent(path):
        return []
    return files.read_json_list(path)


def csv_lines(name: str, benchmark: str) -> list[dict]:
    """The lines about a benchmark of paper.csv or columns.csv."""
    with Path(__file__).with_name(name).open(newline="") as file:
        return [line for line in csv.DictReader(file) if line["benchmark"] == benchmark]


def groups_of(benchmark: str) -> list[str]:
    """All groups that columns.csv names for a benchmark, each once."""
    lines = csv_lines("columns.csv", benchmark)
    return list(dict.fromkeys(group for line in lines for group in line["groups"].split()))


def averages(benchmark: str, cells: dict[str, Cell]) -> dict[str, Cell]:
    """{column: cell}, as columns.csv says, from the cells of the groups: a line of that file is the
    mean of its groups, and a column is the mean of its lines."""
    means = defaultdict(list)
    for line in csv_lines("columns.csv", benchmark):
        means[line["column"]].append(mean(cells[group] for group in line["groups"].split()))
    return {column: mean(of_lines) for column, of_lines in means.items()}


# ---- Benchmarks: their items, and how their accuracies are averaged ------------------------------
ARO_DROPPED = set(Path(__file__).with_name("aro_dropped.txt").read_text().splitlines())


def aro(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """ARO (arXiv 2210.01936) for Table 1. Means over pairs of attributes with 25 items or more, and
    over relations except for 157, such as symmetric ones, that ARO's notebook and the paper's
    authors leave out. An image is cropped to the box around its two objects. Where the box reaches
    beyond the image, the crop is black."""
    cells, root = {}, args.data_root
    for task in ("relation", "attribution"):
        items = []
        for e in read_entries(root / f"aro/visual_genome_{task}.json", log):
            group = e["relation_name"] if task == "relation" else "_".join(e["attributes"])
            x, y, width, height = (e[f"bbox_{side}"] for side in "xywh")
            box = (x, y, x + width, y + height)
            image = ImagePart(root / "aro/images" / e["image_path"], box, black=True)
            items.append(Item(group, image, e["true_caption"], e["false_caption"]))
        groups = accuracies(scorer, items, log, itm=True)
        if task == "relation":
            counted = [cell for name, cell in groups.items() if name not in ARO_DROPPED]
        else:
            counted = [cell for cell in groups.values() if cell.total >= 25]
        cells[task.title()] = mean(counted)
    return cells


VALSE_FOLDERS = {  # by the start of an image's name; the first that fits
    "v7w_": "visual7w/images",
    "COCO_train2014": "coco/train2014",
    "COCO_val2014": "coco/val2014",
    "VisualDialog": "visdial/VisualDialog_val2018",
    "0": "coco/val2017",
    "": "swig",  # all others
}


def valse(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """VALSE (arXiv 2112.07566) for Table 1. Items whose caption at least 2 of 3 annotators found
    right. The paper averages over 11 files (72.5 for CE-CLIP), and for CE-CLIP+ over 9 columns
    (76.7)."""
    items = []
    for name in groups_of("valse"):
        for e in read_entries(args.data_root / f"valse/{name}.json", log):
            if e["mturk"]["caption"] >= 2:
                start = next(start for start in VALSE_FOLDERS if e["image_file"].startswith(start))
                image = ImagePart(args.data_root / VALSE_FOLDERS[start] / e["image_file"])
                items.append(Item(name, image, e["caption"], e["foil"]))
    return averages("valse", accuracies(scorer, items, log, itm=True))


def vlc(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """VL-CheckList (arXiv 2207.00221) for Table 2. Of each file the first --vlc-rows rows (the
    authors: the first ones that have an image). A line of columns.csv has the files of one type
    from one source, such as large objects from SWiG. The last averages are means of columns."""
    groups, root = defaultdict(Cell), args.data_root
    for name in groups_of("vlc"):
        path = root / f"vl_checklist/corpus/v1/{name}.yaml"
        if not log.note_if_absent(path):
            config, items = yaml.safe_load(path.read_text()), []
            folder = root / config["IMG_ROOT"].strip("/")
            for image, texts in read_entries(root / "vl_checklist" / config["ANNO_PATH"], log):
                pair = (texts["POS"][0], texts["NEG"][0])
                items.append(Item(name, ImagePart(folder / image), *pair))
            groups |= accuracies(scorer, items[: args.vlc_rows or None], log)
    cells, kinds = averages("vlc", groups), {}
    for kind in ("Attribute", "Object", "Relation"):
        kinds[kind] = mean(cell for column, cell in cells.items() if column.startswith(kind))
    return cells | kinds | {"Avg": mean(cells.values())}


def sugarcrepe(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """SugarCrepe (arXiv 2306.14610) for Table 3. 7,511 items; means over subsets (its authors: over
    items)."""
    items = []
    for subset in groups_of("sugarcrepe"):
        for e in read_entries(args.data_root / f"sugarcrepe/{subset}.json", log):
            image = ImagePart(args.data_root / "coco/val2017" / e["filename"])
            items.append(Item(subset, image, e["caption"], e["negative_caption"]))
    return averages("sugarcrepe", accuracies(scorer, items, log))


def sugarcrepe_pp(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """SugarCrepe++ (arXiv 2406.11171), not in the paper: SugarCrepe with a second true caption. A
    tie is wrong. ITT, the image-text task: the image is closer to both captions than to the
    negative; chance is 33.3. TOT, the text-only task: the captions are closer to each other than to
    the negative."""
    cells = {}
    for subset in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att"):
        items = []  # two of an entry, one for each true caption
        for e in read_entries(args.data_root / f"sugarcrepe_pp/{subset}.json", log):
            image = ImagePart(args.data_root / "coco/val2017" / e["filename"])
            for caption in (e["caption"], e["caption2"]):
                items.append(Item(subset, image, caption, e["negative_caption"]))
        cells[f"ITT {subset}"] = accuracies(scorer, items, log, per_entry=2)[subset]
        # The text-only task also needs the texts whose image is absent.
        scorer.encode((), (text for item in items for text in (item.positive, item.negative)))
        lines = []
        for one, two in zip(items[::2], items[1::2]):
            a, b, n = (scorer.texts[text] for text in (one.positive, two.positive, one.negative))
            scores = [(a @ b).item(), max((a @ n).item(), (b @ n).item())]
            line = {"group": f"TOT {subset}", "image": None, "positive": one.positive}
            line.update(second=two.positive, negative=one.negative, scores=scores)
            line.update(right=scores[0] > scores[1], tie=scores[0] == scores[1], same_tokens=False)
            lines.append(line)
        log.decisions += lines
        cells[f"TOT {subset}"] = cell_of(lines, len(lines))
    means = {}
    for name in ("ITT replace", "ITT swap", "TOT replace", "TOT swap"):
        means[name] = mean(cell for column, cell in cells.items() if column.startswith(name))
    return cells | means


def columns_of(group: str) -> dict[str, str]:
    """{title: column}: the columns over all entries, and the same ones over the entry's group."""
    columns = ("Text", "Image", "Group", "GroupMatch")
    return {f"{name} {column}".strip(): column for name in ("", group) for column in columns}


def two_images(scorer: Scorer, args: Namespace, log: Log, benchmark: str) -> dict[str, Cell]:
    """Winoground (arXiv 2204.03162) and sets of its kind, not in the paper: two images, each with a
    caption. Text: each image is closer to its own caption. Image: each caption is closer to its own
    image. Group: both. GroupMatch (arXiv 2510.07632): the sum of the two own scores is higher than
    that of the other two. Chance: 25, 25, 16.7, 50. A tie is wrong. An entry may have a group."""
    items, totals, decisions = [], Counter(), defaultdict(list)
    folder = args.data_root / benchmark
    for e in read_entries(folder / "examples.jsonl", log):
        group = "" if e.get("group") is None else str(e["group"])
        totals.update(columns_of(group).keys())
        paths = [folder / "images" / e[f"image_{n}"] for n in (0, 1)]
        images = [ImagePart(path if path.suffix else path.with_suffix(".png")) for path in paths]
        absent = [image for image in images if not files.is_there(*image)]
        log.absent.update((str(image.path), None) for image in absent)
        if not absent:
            items.append(Item(group, images[0], e["caption_0"], e["caption_1"]))
            items.append(Item(group, images[1], e["caption_1"], e["caption_0"]))
    lines = score_items(scorer, items, log)
    for line_0, line_1 in zip(lines[::2], lines[1::2]):
        (own_0, other_0), (own_1, other_1) = line_0["scores"], line_1["scores"]
        text = min(own_0 - other_0, own_1 - other_1)
        image = min(own_0 - other_1, own_1 - other_0)
        match = own_0 + own_1 - (other_0 + other_1)
        leads = {"Text": text, "Image": image, "Group": min(text, image), "GroupMatch": match}
        same = line_0["same_tokens"]
        for name, column in columns_of(line_0["group"]).items():
            decision = {"right": leads[column] > 0 and not same, "same_tokens": same}
            decision["tie"] = leads[column] == 0 and not same
            decisions[name].append(decision)
    return {name: cell_of(decisions[name], total) for name, total in totals.items()}


WHATSUP = {"A": "controlled_images_dataset.json", "B": "controlled_clevr_dataset.json"}


def whatsup(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """What'sUp (arXiv 2310.19785), not in the paper: of four captions with different prepositions,
    the first is right. Chance is 25; a tie is wrong."""
    cells = {}
    for name, file in WHATSUP.items():
        items = []
        for e in read_entries(args.data_root / "whatsup/data" / file, log):
            image = ImagePart(args.data_root / "whatsup" / e["image_path"])
            right, *wrong = e["caption_options"]
            if len(wrong) != 3:
                raise BadInput(f"{file}: an entry has {1 + len(wrong)} captions, not 4")
            items += [Item(name, image, right, text) for text in wrong]
        cells[name] = accuracies(scorer, items, log, per_entry=3)[name]
    return cells | {"Avg": mean(cells.values())}


def generated_negatives(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """Each kind of a file that negatives.py wrote, and their mean."""
    items = [Item(*fields) for fields in files.read_negatives(args.pairs, args.images)]
    groups = accuracies(scorer, items, log)
    return groups | {"mean": mean(groups.values())}


def pre_caption(text: str) -> str:
    """Lower case, without these signs, at most 30 words; as in ARO's code."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:30])


def retrieval(scorer: Scorer, args: Namespace, log: Log, of_coco: bool = False) -> dict[str, Cell]:
    """Recall in % at 1, 5, 10 (Table 5 prints R@5). I2T: of captions by an image, where any of its
    own counts; T2I: of the image by a caption. What ties with the right one is ranked before it.
    Nothing is scored unless every image is there, because among fewer images it is easier."""
    captions, folder, splits = args.captions, args.images, args.split
    if of_coco:
        folder, splits = args.data_root / "coco", []
        captions = folder / "annotations/coco_karpathy_test.json"
    if of_coco and log.note_if_absent(captions):
        return {}
    records = files.read_captions(captions, splits)
    images = [files.image_part(record, folder) for record in records]
    number = {image: n for n, image in enumerate(dict.fromkeys(images))}  # each image once
    absent = [image for image in number if not files.is_there(*image)]
    if absent:
        log.absent.update((str(image.path), None) for image in absent)
        return {}
    texts = [pre_caption(record["caption"]) for record in records]
    scorer.encode(images, texts)
    features = torch.stack([scorer.images[image] for image in number])
    sim = features @ torch.stack([scorer.texts[text] for text in texts]).T  # (images, captions)
    own = torch.arange(len(number))[:, None] == torch.tensor([number[image] for image in images])
    cells = {}
    for way, similarity, is_own in (("I2T", sim, own), ("T2I", sim.T, own.T)):
        best = similarity.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        rank = (~is_own & (similarity >= best)).sum(1)  # 0 is best
        for k in (1, 5, 10):
            value = 100 * (rank < k).float().mean().item()
            cells[f"{way} R@{k}"] = Cell(value, len(rank), len(rank))
    return cells


# Table 5: these sets of ELEVATER have the mean accuracy of the classes as their metric.
MEAN_PER_CLASS = ["caltech101", "fgvc_aircraft", "flowers", "pets"]


def zero_shot(scorer: Scorer, args: Namespace, log: Log) -> dict[str, Cell]:
    """ELEVATER's sets that are there, as CLIP_benchmark calls them; their mean if all 19 are; and
    ImageNet. ELEVATER's twentieth, hateful-memes, is not in CLIP_benchmark."""
    cells = {}
    for name in [*groups_of("zeroshot"), "imagenet1k"]:
        folder = args.data_root / "zeroshot" / name
        if not log.note_if_absent(folder):
            with one_line_errors(f"{folder} is not read by CLIP_benchmark (docs/benchmarks.md)"):
                cells[name] = zero_shot_set(scorer, folder)
    return cells | averages("zeroshot", defaultdict(Cell, cells))


def zero_shot_set(scorer: Scorer, folder: Path) -> Cell:
    """A class's logit is 100 * cosine with its mean text; CLIP_benchmark reads images and texts."""
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_classification as zeroshot
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    data = build_wds_dataset(folder.name, scorer.transform, "test", str(folder))
    model, texts, device = scorer.model, (data.classes, data.templates), scorer.device
    weights = zeroshot.zero_shot_classifier(model, scorer.tokenizer, *texts, device, amp=False)
    loader = DataLoader(data, scorer.batch_size)
    logits, target = zeroshot.run_classification(model, weights, loader, device, amp=False)
    chosen = files.finite(logits).argmax(1)  # of (N, C)
    if folder.name == "voc2007_multilabel":
        value = map_11_point(logits.softmax(1), target.bool())
    else:
        metric = balanced_accuracy_score if folder.name in MEAN_PER_CLASS else accuracy_score
        value = metric(target, chosen)
    return Cell(100 * value, len(target), len(target))


def map_11_point(scores: Tensor, target: Tensor) -> float:
    """The 11-point mean average precision, from 0 to 1: for each recall 0, 0.1, ... 1 the best
    precision at that recall or a higher one (at 0 it is 1, as in ELEVATER); the mean over these
    eleven, and then over the classes. scores (N, C), target (N, C) bool."""
    from sklearn.metrics import precision_recall_curve

    means = []
    for class_scores, class_target in zip(scores.T, target.T):
        if class_target.any():
            precision, recall, _ = precision_recall_curve(class_target, class_scores)
            best = [precision[recall >= level / 10 - 1e-6].max() for level in range(11)]
            means.append(statistics.mean(best))
    return statistics.mean(means)


# ---- Tables --------------------------------------------------------------------------------------
BENCHMARKS = {  # those below --data-root: the title of their table, and their function
    "aro": ("ARO (Table 1)", aro),
    "valse": ("VALSE (Table 1)", valse),
    "vlc": ("VL-CheckList (Table 2)", vlc),
    "sugarcrepe": ("SugarCrepe (Table 3)", sugarcrepe),
    "sugarcrepe_pp": ("SugarCrepe++ (arXiv 2406.11171)", sugarcrepe_pp),
    "winoground": ("Winoground (arXiv 2204.03162)", partial(two_images, benchmark="winoground")),
    "vismin": ("VisMin (arXiv 2407.16772)", partial(two_images, benchmark="vismin")),
    "bivlc": ("BiVLC (arXiv 2406.09952)", partial(two_images, benchmark="bivlc")),
    "colorswap": ("ColorSwap (arXiv 2402.04492)", partial(two_images, benchmark="colorswap")),
    "mmvp_vlm": ("MMVP-VLM (arXiv 2401.06209)", partial(two_images, benchmark="mmvp_vlm")),
    "whatsup": ("What'sUp (arXiv 2310.19785)", whatsup),
    "coco": ("COCO retrieval, Karpathy's 5k test", partial(retrieval, of_coco=True)),
    "zeroshot": ("Zero-shot classification", zero_shot),
}
OWN_DATA = {  # --pairs and --captions
    "pairs": ("Generated negatives", generated_negatives),
    "captions": ("Retrieval", retrieval),
}
TABLES = BENCHMARKS | OWN_DATA
TABLE_5 = ["aro Relation", "aro Attribution", "valse Avg 11 files", "valse Avg 9 columns"]
TABLE_5 += ["vlc Avg", "sugarcrepe Avg", "coco T2I R@5", "coco I2T R@5", "zeroshot ELEVATER 19"]
TABLE_5 += ["zeroshot imagenet1k", "pairs mean", "captions T2I R@5", "captions I2T R@5"]


def table_5(results: dict[str, dict]) -> dict[str, dict[str, Cell]]:
    """{row: {column: cell}}: what composition gained, and what all else lost."""
    rows = defaultdict(dict)
    for title in TABLE_5:
        name, column = title.split(" ", 1)
        for row, cells in results.get(name, {}).items():
            if column in cells and cells[column].scored:
                rows[row][title] = cells[column]
    return rows


def paper_rows(benchmark: str) -> dict[str, dict[str, Cell]]:
    """What the paper prints: {row: {column: cell}}."""
    rows = defaultdict(dict)
    for line in csv_lines("paper.csv", benchmark):
        rows[f"{line['row']} (paper)"][line["column"]] = Cell(float(line["value"]))
    return rows


def report(name: str, rows: dict[str, dict[str, Cell]], base: str | None, absent: list[str]) -> str:
    """A benchmark's table: the paper's rows, ours, and their differences from the base."""
    table_5_title = "Gain and forgetting (Table 5; the paper: ELEVATER over 20 sets)"
    title, _ = TABLES.get(name, (table_5_title, None))
    lacking = "; ".join(absent[:2])
    lacking += f" and {len(absent) - 2} more" if absent[2:] else ""
    if not any(cell.scored for cells in rows.values() for cell in cells.values()):
        why = f"Absent: {lacking}" if absent else "It has no items"
        return f"{title} is not scored. {why}; see docs/benchmarks.md"
    table, counts = paper_rows(name), defaultdict(dict)
    for row, cells in rows.items():  # all rows have the same columns
        for column, cell in cells.items():
            table[row][column] = cell
            table[f"{row}, blind"][column] = Cell(cell.blind)
            gain = "" if cell.blind is None else f"{cell.value - cell.blind:+.1f}"
            table[f"{row}, grounded gain"][column] = gain
            table[f"{row}, looking"][column] = Cell(cell.looking)
            before = rows[base][column].value if base and row != base else None
            if before is not None and cell.value is not None:
                table[f"{row} - {base}"][column] = f"{cell.value - before:+.1f}"
            counts["scored/all"][column] = f"{cell.scored}/{cell.total}"
            counts[f"ties, {row}"][column] = cell.ties or ""
            counts[f"same tokens, {row}"][column] = cell.same_tokens or ""
    is_partial = absent or any(cell.scored < cell.total for cell in cells.values())
    text = f"## {title}, %{' - PARTIAL' if is_partial else ''}\n\n"
    text += markdown(table | counts, cells)
    return f"{text}\n\nAbsent: {lacking}" if absent else text


def markdown(rows: dict[str, dict], columns: Iterable[str]) -> str:
    """A table of the rows that have something to show."""
    lines = [["", *columns]]
    for name, row in rows.items():
        line = [str(row.get(column, "")) for column in columns]
        if any(line):
            lines.append([name, *line])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


# ---- Command line --------------------------------------------------------------------------------
def checkpoints(args: Namespace) -> Iterator[tuple[str, Loaded]]:
    """(name of the row, Loaded) of the base and each checkpoint. With --wise a in its place WiSE-FT
    (arXiv 2109.01903): the weights (1 - a) * base + a * checkpoint."""
    if args.base:
        yield args.base, load_model(args.base, args.model)
    for source in [name for name in args.ckpt if name != args.base]:
        tuned = load_model(source, args.model)
        if not args.wise:
            yield source, tuned
        for a in args.wise:
            base = load_model(args.base, args.model)
            if base.config != tuned.config:
                raise BadInput(f"--wise: {args.base} and {source} have different model configs")
            weights = tuned.model.state_dict()
            for name, weight in base.model.state_dict().items():
                if weight.is_floating_point():
                    weight.lerp_(weights[name], a)  # in place: the base model's own tensor
            yield f"{source}, WiSE {a:g}", base


def describe(args: Namespace) -> None:
    """--image: the texts in the order of their similarity to it, for each checkpoint."""
    for row, loaded in checkpoints(args):
        scorer, image = Scorer(loaded), ImagePart(args.image)
        scorer.encode([image], args.texts)
        cosines = [(scorer.images[image] @ scorer.texts[text]).item() for text in args.texts]
        print(row)
        for cosine, text in sorted(zip(cosines, args.texts), reverse=True):
            print(f"  {cosine:.4f}  {text}")


def parse_args() -> Namespace:
    p = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    add = p.add_argument
    add("--ckpt", nargs="+", required=True, help="files, folders, hf-hub:..., MODEL/TAG, or tags")
    add("--model", default=DEFAULT_MODEL, help="model of tags and third-party files [Sec. 4.1]")
    add("--base", help="checkpoint or tag before fine-tuning: differences from it are shown")
    add("--wise", nargs="+", type=at_least(0.0), default=[], help="WiSE-FT: (1-a)*base + a*ckpt")
    add("--bench", nargs="+", choices=BENCHMARKS, default=[], help="[all; none with --pairs ...]")
    add("--data-root", type=Path, default="data", help="folder of the benchmarks")
    add("--vlc-rows", type=at_least(0), default=1000, help="first rows of a VLC file; 0: all")
    add("--pairs", type=Path, help="score the kinds of a .jsonl of negatives.py")
    add("--captions", type=Path, help="score retrieval on a captions file")
    add("--split", nargs="+", default=[], help="splits of --captions, if Karpathy's: test ...")
    add("--images", type=Path, default=".", help="image folder of --pairs and --captions")
    add("--image", type=Path, help="only compare this image to --texts")
    add("--texts", nargs="+", default=[], help="what --image is compared to")
    add("--blind", action="store_true", help="score with the images of other items, too")
    add("--batch-size", type=at_least(1), default=64, help="images; 4 times as many texts")
    add("--workers", type=at_least(0), default=0, help="loader processes")
    add("--out", type=Path, help="folder for results.json, results.md and items.jsonl")
    args = p.parse_args()
    if bool(args.image) != bool(args.texts):
        p.error("--image goes together with --texts")
    if args.split and not args.captions:
        p.error("--split goes together with --captions")
    if args.wise and not args.base:
        p.error("--wise needs --base: between what and the checkpoint?")
    args.bench = args.bench + [name for name in OWN_DATA if getattr(args, name)]
    args.bench = args.bench or list(BENCHMARKS)
    return args


def main() -> None:
    args = parse_args()
    if args.image:
        return describe(args)
    for source in [*args.ckpt, args.base or args.ckpt[0]]:
        find_tag(source, args.model)  # a misspelt name ends here, not after hours of work
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    results = {name: {} for name in args.bench}  # benchmark -> row -> column -> cell
    absent, lines, scored = defaultdict(list), [], 0
    for row, loaded in checkpoints(args):
        scorer = Scorer(loaded, args.batch_size, args.workers)
        for name in args.bench:
            log = Log(args.blind)
            with one_line_errors(f"{name} has a file of another form (docs/benchmarks.md)"):
                _, score = TABLES[name]
                results[name][row] = score(scorer, args, log)
            scored += sum(cell.scored for cell in results[name][row].values())
            absent[name] = list(log.absent)  # the same for every checkpoint
            for decision in log.decisions:
                lines.append(json.dumps({"benchmark": name, "row": row} | decision, default=str))
    if rows := table_5(results):
        results["table_5"] = rows
    reports = [report(name, rows, args.base, absent[name]) for name, rows in results.items()]
    text = "\n\n".join(reports)
    print(text)
    if not scored:
        raise BadInput("nothing was scored")
    if args.out:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        content = json.dumps({"settings": settings, "benchmarks": results}, indent=1, default=vars)
        outputs = {"results.json": content, "results.md": text, "items.jsonl": "\n".join(lines)}
        for name, output in outputs.items():
            with files.whole_file(args.out / name) as new:
                new.write_text(output + "\n" if output else "")


if __name__ == "__main__":
    files.run_main(main)
