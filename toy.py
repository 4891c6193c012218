"""The embedded world: pictures, captions and true/false caption pairs, with nothing to download.

    python toy.py --out sheet.png       # pictures with a caption and its hard negatives (Fig. 2)

A scene is two different objects in two different colours and one relation: 14*13 * 8*7 * 8 = 81,536
scenes. Its picture is 64 px. The world comes with a tiny CLIP and its word-level tokenizer, so that
negatives, training and evaluation run on it in minutes on a CPU, by the code that real data takes.
"""

import argparse
import functools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

OBJECTS = (
    "cat",
    "fish",
    "bird",
    "car",
    "boat",
    "ball",
    "star",
    "tree",
    "barn",
    "cup",
    "heart",
    "moon",
    "hat",
    "flower",
)
COLORS = {
    "red": (220, 40, 35),
    "green": (35, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 45),
    "purple": (135, 45, 165),
    "pink": (255, 145, 190),
    "black": (25, 22, 26),
    "white": (245, 248, 250),
}
VERBS = ("pushing", "chasing", "kicking", "pulling", "watching", "riding")
RELATIONS = (*VERBS, "above", "below")  # two prepositions, which no training negative touches

PIXELS = 64  # side of a picture
OVERSAMPLING = 3  # drawn larger, then reduced: smooth edges
TRAIN_SCENES, TEST_SCENES = 8192, 1000
CAPTIONS_PER_SCENE = 2
P_COLOR = 0.5  # an object's colour is named
P_SINGLE = 0.12  # the caption names one object only, so that missing negatives occur


class Scene(NamedTuple):
    subject: str
    subject_color: str
    relation: str
    object: str
    object_color: str


# ---- Pictures ------------------------------------------------------------------------------------


# Parts of an object in its half-widths, from its centre: four numbers are an oval's left, top,
# right and bottom, more of them a polygon's points; a hole is grey.
_SHAPES = """
ball = -1 -1 1 1
tree = 0 -1 .6 -.2 -.6 -.2; 0 -.5 .8 .5 -.8 .5; -.15 .5 .15 .5 .15 1 -.15 1
cat = -.8 -.6 .8 1; -.8 -1 -.1 -.5 -.8 .2; .8 -1 .1 -.5 .8 .2;
    hole -.45 -.1 -.15 .2; hole .15 -.1 .45 .2
fish = -.4 -.6 1 .6; -1 -.6 -.1 0 -1 .6; hole .5 -.25 .75 0
bird = -.6 -.3 .5 .8; .1 -.9 .8 -.2; .7 -.7 1 -.5 .7 -.4; -1 -.6 -.3 0 -.5 .4
car = -1 .5 -1 -.1 -.6 -.1 -.4 -.6 .4 -.6 .6 -.1 1 0 1 .5; -.75 .2 -.2 .75; .2 .2 .75 .75;
    hole -.6 .35 -.35 .6; hole .35 .35 .6 .6
boat = -1 .3 1 .3 .6 .9 -.6 .9; -.1 -1 -.1 .2 -.8 .2; .1 -.8 .7 .2 .1 .2
barn = -1 -.1 0 -1 1 -.1; -.75 -.1 .75 -.1 .75 1 -.75 1; hole -.2 .4 .2 .4 .2 1 -.2 1
cup = .1 -.5 1 .5; hole .35 -.25 .75 .25; -.9 -.8 .6 -.8 .4 .8 -.7 .8
heart = -1 -.9 .05 .1; -.05 -.9 1 .1; -.95 -.2 .95 -.2 0 1
hat = -1 .3 1 .3 1 .65 -1 .65; -.55 -.8 .55 -.8 .65 .3 -.65 .3
"""


def _round(n: int, first: float, turn: float) -> list[tuple[float, float]]:
    """n points of the unit circle, from the angle first * pi on, in steps of turn * pi."""
    angles = [math.pi * (first + turn * i) for i in range(n)]
    return [(math.cos(t), math.sin(t)) for t in angles]


@functools.cache
def shapes() -> dict[str, list[tuple[bool, list[float]]]]:
    """{object: its parts, (whether it is a hole, numbers)}."""
    found = {}
    for line in _SHAPES.replace(";\n", ";").strip().splitlines():
        name, parts = line.split("=")
        found[name.strip()] = [
            ("hole" in part, [float(x) for x in part.split() if x != "hole"])
            for part in parts.split(";")
        ]
    tips = [x * (0.42 if i % 2 else 1) for i, p in enumerate(_round(10, -0.5, 0.2)) for x in p]
    found["star"] = [(False, tips)]
    outer = _round(17, 0.3, 1.4 / 16)  # of the moon; and back along an inner arc
    inner = [(0.5 + 0.82 * a, 0.82 * b) for a, b in reversed(outer)]
    found["moon"] = [(False, [x for point in outer + inner for x in point])]
    petals = [(0.6 * a, 0.6 * b) for a, b in _round(5, 0, 0.4)]
    found["flower"] = [(False, [a - 0.42, b - 0.42, a + 0.42, b + 0.42]) for a, b in petals]
    found["flower"].append((True, [-0.3, -0.3, 0.3, 0.3]))
    return found


def _shape(draw: ImageDraw.ImageDraw, name: str, x: float, y: float, r: float, color) -> None:
    """Draw one object with centre (x, y) and half-width r, in pixels of the oversampled picture."""
    for hole, numbers in shapes()[name]:
        points = [(x + r * a, y + r * b) for a, b in zip(numbers[::2], numbers[1::2])]
        part = draw.ellipse if len(points) == 2 else draw.polygon
        part(points, fill=(128, 128, 128) if hole else color)


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """The 64 px picture of a scene; position, size, colours and background jittered by `rng`.

    The subject stands left of the object; on top of it for riding and above, below it for below.
    """
    s = PIXELS * OVERSAMPLING / 64  # everything below is in 64ths of the picture

    def jitter(color, by):
        return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in color)

    background = jitter((165, 162, 168), 18)
    image = Image.new("RGB", (PIXELS * OVERSAMPLING,) * 2, background)
    draw = ImageDraw.Draw(image)
    size = rng.uniform(11, 13)
    if scene.relation in ("riding", "above", "below"):
        gap = size * (1.8 if scene.relation == "riding" else 2.6)
        x, y = rng.uniform(20, 44), rng.uniform(size + gap / 2, 64 - size - gap / 2)
        down = -1 if scene.relation == "below" else 1
        at = ((x, y - down * gap / 2), (x + rng.uniform(-3, 3), y + down * gap / 2))
    else:
        gap = size * {"pushing": 1.9, "chasing": 2.5, "kicking": 2.5}.get(scene.relation, 2.8)
        x, y = rng.uniform(size + gap / 2, 64 - size - gap / 2), rng.uniform(24, 44)
        at = ((x - gap / 2, y), (x + gap / 2, y + rng.uniform(-2, 2)))

    def line(color, *points, width=1.2):
        draw.line([(s * a, s * b) for a, b in points], fill=color, width=round(width * s))

    (sx, sy), (ox, oy) = at
    middle = (sx + ox) / 2
    if scene.relation == "pushing":  # a floor
        line((60, 50, 45), (0, y + size + 1), (64, y + size + 1))
    elif scene.relation == "chasing":  # speed lines
        for i in range(3):
            line(
                (235, 235, 235),
                (sx - size, sy - size - 3 - 3 * i),
                (ox + size, sy - size - 3 - 3 * i),
            )
    elif scene.relation == "pulling":  # a rope
        line((80, 60, 45), (sx, sy), (ox, oy))
    elif scene.relation == "watching":  # a cone of sight
        for end in (oy - size, oy + size):
            line((80, 190, 225), (sx, sy), (ox, end))
    elif scene.relation == "riding":  # legs around
        for side in (-1, 1):
            line(
                (70, 55, 45),
                (x, y),
                (x + side * (size + 2), y - 2),
                (x + side * (size + 1), y + size),
            )
    radius = size * 0.95
    _shape(draw, scene.object, s * ox, s * oy, s * radius, jitter(COLORS[scene.object_color], 12))
    _shape(draw, scene.subject, s * sx, s * sy, s * radius, jitter(COLORS[scene.subject_color], 12))
    if scene.relation == "kicking":  # a burst
        for i in range(4):
            dx, dy = 4 * math.cos(math.pi * i / 4), 4 * math.sin(math.pi * i / 4)
            line((255, 130, 20), (middle - dx, y - dy), (middle + dx, y + dy))
    return image.resize((PIXELS, PIXELS), Image.Resampling.BOX)


# ---- Captions, and the truth about them ----------------------------------------------------------


def noun_phrase(color: str | None, noun: str) -> str:
    return f"a {color} {noun}" if color else f"a {noun}"


def describe(scene: Scene, subject_color: bool = True, object_color: bool = True) -> str:
    """ "a red cat is chasing a blue ball"; a colour is left out where its flag is False."""
    subject = noun_phrase(scene.subject_color if subject_color else None, scene.subject)
    object_ = noun_phrase(scene.object_color if object_color else None, scene.object)
    return f"{subject} is {scene.relation} {object_}"


def caption(scene: Scene, rng: random.Random) -> str:
    """One caption: each colour named with probability 0.5; 12 % name a single object."""
    named = rng.random() < P_COLOR, rng.random() < P_COLOR
    if rng.random() >= P_SINGLE:
        return describe(scene, *named)
    if rng.random() < 0.5:
        return noun_phrase(scene.subject_color if named[0] else None, scene.subject)
    return noun_phrase(scene.object_color if named[1] else None, scene.object)


def is_true(text: str, scene: Scene) -> bool | None:
    """Whether a caption is true of a scene; None for a text that the grammar cannot read.

    A caption may leave colours or an object out. "above" and "below" are each other's inverse:
    "a ball is below a cat" is true where the cat is above the ball.
    """
    phrase = rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(OBJECTS)})"
    match = re.fullmatch(rf"{phrase}(?: is ({'|'.join(RELATIONS)}) {phrase})?", text)
    if not match:
        return None
    color_1, noun_1, relation, color_2, noun_2 = match.groups()
    subject, object_ = (scene.subject, scene.subject_color), (scene.object, scene.object_color)

    def fits(color, noun, thing):
        return noun == thing[0] and color in (None, thing[1])

    if relation is None:
        return fits(color_1, noun_1, subject) or fits(color_1, noun_1, object_)
    inverse = {"above": "below", "below": "above"}.get(relation)
    if inverse == scene.relation:
        subject, object_, relation = object_, subject, inverse
    return (
        relation == scene.relation
        and fits(color_1, noun_1, subject)
        and fits(color_2, noun_2, object_)
    )


HELD_OUT = ("swap phrases", "swap colors", "above/below", "add color", "add object")


def true_false_pairs(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(kind, true caption, false caption): the kinds of training negatives, then HELD_OUT ones.

    Relation names no colours: nothing but the order of the words tells its two captions apart.
    """
    subject, subject_color, relation, object_, object_color = scene
    color = rng.choice([c for c in COLORS if c not in (subject_color, object_color)])
    noun = rng.choice([n for n in OBJECTS if n not in (subject, object_)])
    side = rng.choice(("subject", "object"))
    swapped = Scene(object_, object_color, relation, subject, subject_color)
    full, plain = describe(scene), describe(scene, False, False)
    yield "relation", plain, describe(swapped, False, False)
    yield "attribute", full, describe(scene._replace(**{f"{side}_color": color}))
    if relation in VERBS:
        verb = rng.choice([v for v in VERBS if v != relation])
        yield "action", full, describe(scene._replace(relation=verb))
    yield "object", full, describe(scene._replace(**{side: noun}))
    yield "swap phrases", full, describe(swapped)
    yield (
        "swap colors",
        full,
        describe(Scene(subject, object_color, relation, object_, subject_color)),
    )
    if relation not in VERBS:
        opposite = {"above": "below", "below": "above"}[relation]
        yield "above/below", full, describe(scene._replace(relation=opposite))
    yield "add color", plain, describe(scene._replace(subject_color=color), True, False)
    yield "add object", full, f"{full} and {noun_phrase(color, noun)}"


# ---- The world on disk: pictures and captions in COCO's layout -----------------------------------


def make_world(
    folder: Path, seed: int = 0, train: int = TRAIN_SCENES, test: int = TEST_SCENES
) -> None:
    """Write images/ and captions_{train,test}.json in COCO-captions format under `folder`.

    Each entry of "images" also carries its "scene". Train and test share none (but "A above B" and
    "B below A" are two scenes that look the same: 24 of the 1,000 test scenes of seed 0 have such a
    twin in train). captions_train.json comes last: with it, the world is complete.
    """
    rng = random.Random(seed)
    scenes = [
        Scene(s, sc, r, o, oc)
        for s in OBJECTS
        for o in OBJECTS
        for sc in COLORS
        for oc in COLORS
        for r in RELATIONS
        if s != o and sc != oc
    ]
    scenes = rng.sample(scenes, train + test)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, scene in enumerate(tqdm(scenes, desc="toy world", unit="picture")):
        draw_scene(scene, rng).save(folder / "images" / f"{i:05d}.png", compress_level=1)
        images.append({"id": i, "file_name": f"{i:05d}.png", "scene": list(scene)})
        for _ in range(CAPTIONS_PER_SCENE):
            text = caption(scene, rng)
            annotations.append({"id": len(annotations), "image_id": i, "caption": text})
    for split, ids in (("test", range(train, train + test)), ("train", range(train))):
        content = {
            "images": images[ids.start : ids.stop],
            "annotations": [a for a in annotations if a["image_id"] in ids],
        }
        (folder / f"captions_{split}.json").write_text(json.dumps(content))


# ---- The tiny CLIP (0.45 M parameters) and its tokenizer -----------------------------------------

CONTEXT = 16
WORDS = sorted({*OBJECTS, *COLORS, *RELATIONS, "a", "an", "and", "is"})
PAD, UNKNOWN, START = 0, 1, len(WORDS) + 2
END = START + 1  # the highest id, because open_clip pools the text features at the argmax

MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": PIXELS, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": END + 1,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
    "init_logit_scale": math.log(50),
}


WORD_ID = {word: i + 2 for i, word in enumerate(WORDS)}


def tokenize(texts: str | list[str]) -> Tensor:
    """(N, 16) int64: start, one id a word, end, zeros; words after the 14th are left out."""
    rows = []
    for text in [texts] if isinstance(texts, str) else texts:
        words = text.split()[: CONTEXT - 2]
        ids = [START, *(WORD_ID.get(word, UNKNOWN) for word in words), END]
        rows.append(ids + [PAD] * (CONTEXT - len(ids)))
    return torch.tensor(rows)


# ---- A sheet to look at --------------------------------------------------------------------------


GREEN, RED = "#0a7d28", "#b3261e"  # of true and of false captions


def sheet(
    entries: list[tuple[Image.Image, list[tuple[str, str]]]], columns: int = 2
) -> Image.Image:
    """Pictures, each beside its lines of (text, colour)."""
    font = ImageFont.load_default(size=15)
    width = 150 + max(int(font.getlength(text)) for _, lines in entries for text, _ in lines)
    height = max(140, 16 + 25 * max(len(lines) for _, lines in entries))
    page = Image.new("RGB", (columns * width, -(-len(entries) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, lines) in enumerate(entries):
        x, y = i % columns * width + 6, i // columns * height + 6
        page.paste(picture.convert("RGB").resize((128, 128)), (x, y))
        for line, (text, color) in enumerate(lines):
            draw.text((x + 138, y + 4 + 25 * line), text, color, font)
    return page


def main() -> None:
    p = argparse.ArgumentParser(description="Draw toy pictures with a caption and its negatives.")
    p.add_argument("--data", type=Path, default="data/toy", help="where ce_clip.py made the world")
    p.add_argument("--out", type=Path, required=True, help="picture to write")
    args = p.parse_args()
    try:
        lines = (args.data / "negatives_train.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        p.error(f"{args.data} has no negatives_train.jsonl: run python ce_clip.py first")
    kinds = ("relation", "attribute", "action", "object")
    records = (json.loads(line) for line in lines[:: 5 * CAPTIONS_PER_SCENE])
    records = [record for record in records if record["relation"]][:8]
    entries = []
    for r in records:
        lines = [(f"{k}: {r[k] or 'none'}", RED if r[k] else "gray") for k in kinds]
        with Image.open(args.data / "images" / r["image"]) as picture:
            entries.append((picture.convert("RGB"), [(r["caption"], GREEN), *lines]))
    sheet(entries).save(args.out)


if __name__ == "__main__":
    main()
