"""The toy world: pictures, captions and true/false caption pairs, with nothing to download.

    python toy.py --out data/toy       # toy.sh goes on from here: negatives, training, evaluation

A scene is two different objects in two different colours and one relation: 14*13 * 8*7 * 8 = 81,536
scenes. Its picture is 64 px. The files have the formats of real data, and nothing else knows of the
world; beside them lies the config of a tiny CLIP, which learns it in minutes on a CPU.
"""

import argparse
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from negatives import BadInput, run

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
INVERSE = {"above": "below", "below": "above"}  # no training negative touches prepositions
RELATIONS = (*VERBS, *INVERSE)

PIXELS = 64  # side of a picture
OVERSAMPLING = 3  # drawn larger, then reduced: smooth edges
CAPTIONS_PER_SCENE = 2
P_COLOR = 0.5  # an object's colour is named
P_SINGLE = 0.12  # the caption names one object only, so that missing negatives occur

# ---- Objects: shapes in units of the object's half-width, from its centre; y grows downwards -----


class Part(NamedTuple):
    points: list[tuple[float, float]]  # two: the corners of an oval's box
    hole: bool = False  # grey, whatever the object's colour


def oval(left, top, right, bottom, hole=False) -> Part:
    return Part([(left, top), (right, bottom)], hole)


def arc(n: int, first: float, step: float, radius: float = 1) -> list[tuple[float, float]]:
    """n points of a circle, from the angle first * pi on, in steps of step * pi."""
    angles = [math.pi * (first + step * i) for i in range(n)]
    return [(radius * math.cos(t), radius * math.sin(t)) for t in angles]


TIPS, DENTS = arc(5, -0.5, 0.4), arc(5, -0.3, 0.4, radius=0.42)  # of the star
OUTER, INNER = arc(17, 0.3, 1.4 / 16), arc(17, 1.7, -1.4 / 16, radius=0.82)  # of the moon

SHAPES = {
    "cat": [
        oval(-0.8, -0.6, 0.8, 1),
        Part([(-0.8, -1), (-0.1, -0.5), (-0.8, 0.2)]),
        Part([(0.8, -1), (0.1, -0.5), (0.8, 0.2)]),
        oval(-0.45, -0.1, -0.15, 0.2, hole=True),
        oval(0.15, -0.1, 0.45, 0.2, hole=True),
    ],
    "fish": [
        oval(-0.4, -0.6, 1, 0.6),
        Part([(-1, -0.6), (-0.1, 0), (-1, 0.6)]),
        oval(0.5, -0.25, 0.75, 0, hole=True),
    ],
    "bird": [
        oval(-0.6, -0.3, 0.5, 0.8),
        oval(0.1, -0.9, 0.8, -0.2),
        Part([(0.7, -0.7), (1, -0.5), (0.7, -0.4)]),
        Part([(-1, -0.6), (-0.3, 0), (-0.5, 0.4)]),
    ],
    "car": [
        Part([(-0.6, -0.1), (-0.4, -0.6), (0.4, -0.6), (0.6, -0.1)]),  # the cabin
        Part([(-1, 0.5), (-1, -0.1), (0.6, -0.1), (1, 0), (1, 0.5)]),
        oval(-0.75, 0.2, -0.2, 0.75),
        oval(0.2, 0.2, 0.75, 0.75),
        oval(-0.6, 0.35, -0.35, 0.6, hole=True),
        oval(0.35, 0.35, 0.6, 0.6, hole=True),
    ],
    "boat": [
        Part([(-1, 0.3), (1, 0.3), (0.6, 0.9), (-0.6, 0.9)]),
        Part([(-0.1, -1), (-0.1, 0.2), (-0.8, 0.2)]),
        Part([(0.1, -0.8), (0.7, 0.2), (0.1, 0.2)]),
    ],
    "ball": [oval(-1, -1, 1, 1)],
    "star": [Part([point for pair in zip(TIPS, DENTS) for point in pair])],
    "tree": [
        Part([(0, -1), (0.6, -0.2), (-0.6, -0.2)]),
        Part([(0, -0.5), (0.8, 0.5), (-0.8, 0.5)]),
        Part([(-0.15, 0.5), (0.15, 0.5), (0.15, 1), (-0.15, 1)]),
    ],
    "barn": [
        Part([(-1, -0.1), (0, -1), (1, -0.1)]),
        Part([(-0.75, -0.1), (0.75, -0.1), (0.75, 1), (-0.75, 1)]),
        Part([(-0.2, 0.4), (0.2, 0.4), (0.2, 1), (-0.2, 1)], hole=True),
    ],
    "cup": [
        oval(0.1, -0.5, 1, 0.5),
        oval(0.35, -0.25, 0.75, 0.25, hole=True),
        Part([(-0.9, -0.8), (0.6, -0.8), (0.4, 0.8), (-0.7, 0.8)]),
    ],
    "heart": [
        oval(-1, -0.9, 0.05, 0.1),
        oval(-0.05, -0.9, 1, 0.1),
        Part([(-0.95, -0.2), (0.95, -0.2), (0, 1)]),
    ],
    "moon": [Part(OUTER + [(0.5 + x, y) for x, y in INNER])],
    "hat": [
        Part([(-1, 0.3), (1, 0.3), (1, 0.65), (-1, 0.65)]),
        Part([(-0.55, -0.8), (0.55, -0.8), (0.65, 0.3), (-0.65, 0.3)]),
    ],
    "flower": [
        *(oval(x - 0.42, y - 0.42, x + 0.42, y + 0.42) for x, y in arc(5, 0, 0.4, radius=0.6)),
        oval(-0.3, -0.3, 0.3, 0.3, hole=True),
    ],
}
OBJECTS = tuple(SHAPES)


# ---- Pictures ------------------------------------------------------------------------------------


class Scene(NamedTuple):
    subject: str
    subject_color: str
    relation: str
    object: str
    object_color: str


def draw_object(draw: ImageDraw.ImageDraw, name: str, x: float, y: float, radius: float, color):
    """One object with centre (x, y) and half-width `radius`, in pixels of the picture."""
    x, y, radius = OVERSAMPLING * x, OVERSAMPLING * y, OVERSAMPLING * radius
    for part in SHAPES[name]:
        shape = draw.ellipse if len(part.points) == 2 else draw.polygon
        points = [(x + radius * a, y + radius * b) for a, b in part.points]
        shape(points, (128, 128, 128) if part.hole else color)


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """The 64 px picture of a scene; position, size, colours and background jittered by `rng`.

    The subject stands left of the object; on top of it for riding and above, below it for below.
    """

    def jitter(color, by):
        return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in color)

    def line(color, *points):
        draw.line([(OVERSAMPLING * a, OVERSAMPLING * b) for a, b in points], color, width=4)

    image = Image.new("RGB", (PIXELS * OVERSAMPLING,) * 2, jitter((165, 162, 168), 18))
    draw = ImageDraw.Draw(image)
    size = rng.uniform(11, 13)
    if scene.relation in ("riding", "above", "below"):
        gap = size * (1.8 if scene.relation == "riding" else 2.6)
        x, y = rng.uniform(20, 44), rng.uniform(size + gap / 2, 64 - size - gap / 2)
        down = -1 if scene.relation == "below" else 1
        sx, sy = x, y - down * gap / 2  # the subject's centre
        ox, oy = x + rng.uniform(-3, 3), y + down * gap / 2  # the object's
    else:
        gap = size * {"pushing": 1.9, "chasing": 2.5, "kicking": 2.5}.get(scene.relation, 2.8)
        x, y = rng.uniform(size + gap / 2, 64 - size - gap / 2), rng.uniform(24, 44)
        sx, sy = x - gap / 2, y
        ox, oy = x + gap / 2, y + rng.uniform(-2, 2)

    if scene.relation == "pushing":  # a floor
        line((60, 50, 45), (0, y + size + 1), (64, y + size + 1))
    elif scene.relation == "chasing":  # speed lines
        for above in (3, 6, 9):
            height = y - size - above
            line((235, 235, 235), (sx - size, height), (ox + size, height))
    elif scene.relation == "pulling":  # a rope
        line((80, 60, 45), (sx, sy), (ox, oy))
    elif scene.relation == "watching":  # a cone of sight
        for end in (oy - size, oy + size):
            line((80, 190, 225), (sx, sy), (ox, end))
    elif scene.relation == "riding":  # legs around
        for side in (-1, 1):
            knee, foot = (x + side * (size + 2), y - 2), (x + side * (size + 1), y + size)
            line((70, 55, 45), (x, y), knee, foot)
    radius = 0.95 * size
    draw_object(draw, scene.object, ox, oy, radius, jitter(COLORS[scene.object_color], 12))
    draw_object(draw, scene.subject, sx, sy, radius, jitter(COLORS[scene.subject_color], 12))
    if scene.relation == "kicking":  # a burst
        for dx, dy in arc(4, 0, 0.25, radius=4):
            line((255, 130, 20), (x - dx, y - dy), (x + dx, y + dy))
    return image.resize((PIXELS, PIXELS), Image.Resampling.BOX)


# ---- Captions, and the truth about them ----------------------------------------------------------


def describe(scene: Scene, subject_color: bool = True, object_color: bool = True) -> str:
    """ "a red cat is chasing a blue ball"; a colour is left out where its flag is False."""
    subject = f"{scene.subject_color} {scene.subject}" if subject_color else scene.subject
    object_ = f"{scene.object_color} {scene.object}" if object_color else scene.object
    return f"a {subject} is {scene.relation} a {object_}"


def caption(scene: Scene, rng: random.Random) -> str:
    """One caption: each colour named with probability 0.5; 12 % name a single object."""
    text = describe(scene, rng.random() < P_COLOR, rng.random() < P_COLOR)
    if rng.random() >= P_SINGLE:
        return text
    subject, object_ = text.split(f" is {scene.relation} ")
    return subject if rng.random() < 0.5 else object_


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
    if INVERSE.get(relation) == scene.relation:
        scene = Scene(
            scene.object, scene.object_color, relation, scene.subject, scene.subject_color
        )
    subject = noun_1 == scene.subject and color_1 in (None, scene.subject_color)
    if relation is None:
        return subject or (noun_1 == scene.object and color_1 in (None, scene.object_color))
    object_ = noun_2 == scene.object and color_2 in (None, scene.object_color)
    return subject and object_ and relation == scene.relation


def true_false_pairs(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(kind, true caption, false caption): the kinds of training negatives, then held-out kinds.

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
    swapped = scene._replace(subject_color=object_color, object_color=subject_color)
    yield "swap colors", full, describe(swapped)
    if relation in INVERSE:
        yield "above/below", full, describe(scene._replace(relation=INVERSE[relation]))
    yield "add color", plain, describe(scene._replace(subject_color=color), True, False)
    yield "add object", full, f"{full} and a {color} {noun}"


# One token a word, for CLIP's 49,408 would be most of a tiny model. The end has the highest number,
# because open_clip pools the text features there.
WORDS = sorted(["a", "an", "and", "is", *OBJECTS, *COLORS, *RELATIONS])
WORDS = ["[PAD]", "[UNK]", *WORDS, "[START]", "[END]"]
TOKENS = {word: number for number, word in enumerate(WORDS)}
TEXT = {"context_length": 16, "vocab_size": len(WORDS), "width": 64, "heads": 2, "layers": 2}
MODEL = {  # open_clip's config of the tiny CLIP
    "embed_dim": 64,
    "vision_cfg": {"image_size": PIXELS, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": TEXT,
    "init_logit_scale": math.log(50),
}


def save_model_config(folder: Path) -> None:
    """Write model.json and the tokenizer that it names, a folder of transformers."""
    words = Tokenizer(models.WordLevel(TOKENS, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[START]", TOKENS["[START]"]), ("[END]", TOKENS["[END]"])]
    words.post_processor = processors.TemplateProcessing("[START] $A [END]", special_tokens=ends)
    saved = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    saved.save_pretrained(folder / "tokenizer")
    text = TEXT | {"hf_tokenizer_name": str(folder / "tokenizer")}
    (folder / "model.json").write_text(json.dumps(MODEL | {"text_cfg": text}, indent=1))


# ---- The world on disk ---------------------------------------------------------------------------


def make_world(folder: Path, seed: int = 0, train: int = 8192, test: int = 1000) -> None:
    """Write into `folder`, which need not exist,

    images/               the pictures
    captions_train.json   COCO format, an image with its "scene"; with this file all is there
    captions_test.json    the same, with one full description a picture, for retrieval
    negatives_test.jsonl  the true and false pairs of test pictures, in the format of negatives.py
    model.json            MODEL, and the folder of its tokenizer

    Train and test share no scene (but "A above B" and "B below A" are two scenes that look the
    same: 24 of the 1,000 test scenes of seed 0 have such a twin in train).
    """
    rng = random.Random(seed)
    scenes = []
    for objects in itertools.permutations(OBJECTS, 2):
        for colors in itertools.permutations(COLORS, 2):
            for relation in RELATIONS:
                scenes.append(Scene(objects[0], colors[0], relation, objects[1], colors[1]))
    scenes = rng.sample(scenes, train + test)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries = []  # (COCO's image, captions)
    for i, scene in enumerate(tqdm(scenes, desc="toy world", unit="picture")):
        image = {"id": i, "file_name": f"{i:05d}.png", "scene": scene}
        draw_scene(scene, rng).save(folder / "images" / image["file_name"], compress_level=1)
        captions = [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
        entries.append((image, captions if i < train else [describe(scene)]))
    save_model_config(folder)
    lines = [json.dumps(r) + "\n" for image, _ in entries[train:] for r in pair_records(image)]
    (folder / "negatives_test.jsonl").write_text("".join(lines))
    write_coco(folder / "captions_test.json", entries[train:])
    write_coco(folder / "captions_train.json", entries[:train])


def write_coco(path: Path, entries: list[tuple[dict, list[str]]]) -> None:
    annotations = []
    for image, captions in entries:
        for text in captions:
            annotations.append({"id": len(annotations), "image_id": image["id"], "caption": text})
    images = [image for image, _ in entries]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def pair_records(image: dict) -> list[dict]:
    """A picture's true_false_pairs: a record for each true caption, with the kinds that it has."""
    records = {}  # true caption -> record
    for kind, true, false in true_false_pairs(image["scene"], random.Random(image["id"])):
        new = {"id": f"{image['id']}-{len(records)}", "image": image["file_name"], "caption": true}
        records.setdefault(true, new)[kind] = false
    return list(records.values())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder of the world, e.g. data/toy")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if (args.out / "captions_train.json").exists():
        raise BadInput(f"{args.out} holds a world: give another --out, or delete it")
    make_world(args.out, args.seed)


if __name__ == "__main__":
    run(main)
