"""The toy world: images, captions, and pairs of a true and a false caption. Nothing is downloaded.

    python toy.py --out data/toy       # toy.sh goes on from here: negatives, training, evaluation

A scene is two different objects in two different colours and one relation: 14*13 * 8*7 * 8 = 81,536
scenes. Its image has 64 x 64 pixels. The files have the formats of real data, and no other script
knows of this world. Beside them lies the config of a tiny CLIP, which learns the world in minutes
on a CPU.
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

from files import BadInput, run_main

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
INVERSE = {"above": "below", "below": "above"}  # prepositions: no training negative changes them
RELATIONS = (*VERBS, *INVERSE)

PIXELS = 64  # width and height of an image
OVERSAMPLING = 3  # an image is drawn larger and then reduced, which makes edges smooth
CAPTIONS_PER_SCENE = 2
P_COLOR = 0.5  # the probability that the colour of an object is named
P_SINGLE = 0.12  # the probability that a caption names one object only, and so lacks negatives

# ---- Objects: the centre is (0, 0), the half-width is 1, and y grows downwards -------------------

Point = tuple[float, float]


class Part(NamedTuple):
    points: list[Point]  # the corners of a polygon, or two corners of the box around an oval
    hole: bool = False  # a hole is grey, whatever the colour of the object is
    is_oval: bool = False


def oval(left: float, top: float, right: float, bottom: float, hole: bool = False) -> Part:
    return Part([(left, top), (right, bottom)], hole, is_oval=True)


def arc(n: int, first: float, step: float, radius: float = 1) -> list[Point]:
    """n points of a circle. The angles begin at `first` and grow by `step`, in units of pi."""
    angles = [math.pi * (first + step * i) for i in range(n)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


STAR = []
for tip, dent in zip(arc(5, -0.5, 0.4), arc(5, -0.3, 0.4, radius=0.42)):
    STAR += [tip, dent]
MOON = arc(17, 0.3, 1.4 / 16)  # its outer edge, then its inner edge
MOON += [(0.5 + x, y) for x, y in arc(17, 1.7, -1.4 / 16, radius=0.82)]

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
    "star": [Part(STAR)],
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
    "moon": [Part(MOON)],
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


# ---- Images --------------------------------------------------------------------------------------


class Scene(NamedTuple):
    subject: str
    subject_color: str
    relation: str
    object: str
    object_color: str


class Places(NamedTuple):
    """Where the objects of an image are, in pixels."""

    size: float  # the half-width of an object, with a little space around it
    middle: Point  # between the two objects
    subject: Point  # the centre of the subject
    object: Point


# the distance from the centre of the subject to the centre of the object, in units of their size
SIDE_BY_SIDE = {"pushing": 1.9, "chasing": 2.5, "kicking": 2.5, "pulling": 2.8, "watching": 2.8}
STACKED = {"riding": 1.8, "above": 2.6, "below": 2.6}


def place_objects(relation: str, rng: random.Random) -> Places:
    """Draw the size and the places. The subject is left of the object, but it is on top of the
    object for "riding" and "above", and under it for "below"."""
    size = rng.uniform(11, 13)
    gap = size * (SIDE_BY_SIDE | STACKED)[relation]
    low, high = size + gap / 2, PIXELS - size - gap / 2  # between these, both objects fit
    if relation in STACKED:
        x, y = rng.uniform(20, 44), rng.uniform(low, high)
        down = -gap / 2 if relation == "below" else gap / 2
        subject = (x, y - down)
        object_ = (x + rng.uniform(-3, 3), y + down)
    else:
        x, y = rng.uniform(low, high), rng.uniform(24, 44)
        subject = (x - gap / 2, y)
        object_ = (x + gap / 2, y + rng.uniform(-2, 2))
    return Places(size, (x, y), subject, object_)


def draw_line(draw: ImageDraw.ImageDraw, color: tuple, *points: Point) -> None:
    draw.line([(OVERSAMPLING * x, OVERSAMPLING * y) for x, y in points], color, width=4)


def draw_sign(draw: ImageDraw.ImageDraw, relation: str, places: Places) -> None:
    """What shows the relation behind the two objects."""
    size = places.size
    x, y = places.middle
    if relation == "pushing":  # a floor
        draw_line(draw, (60, 50, 45), (0, y + size + 1), (PIXELS, y + size + 1))
    elif relation == "chasing":  # speed lines
        left, right = places.subject[0] - size, places.object[0] + size
        for above in (3, 6, 9):
            height = y - size - above
            draw_line(draw, (235, 235, 235), (left, height), (right, height))
    elif relation == "pulling":  # a rope
        draw_line(draw, (80, 60, 45), places.subject, places.object)
    elif relation == "watching":  # a cone of sight
        object_x, object_y = places.object
        for end in (object_y - size, object_y + size):
            draw_line(draw, (80, 190, 225), places.subject, (object_x, end))
    elif relation == "riding":  # legs around the object
        for side in (-1, 1):
            knee = (x + side * (size + 2), y - 2)
            foot = (x + side * (size + 1), y + size)
            draw_line(draw, (70, 55, 45), (x, y), knee, foot)


def draw_object(draw: ImageDraw.ImageDraw, name: str, centre: Point, radius: float, color: tuple):
    """One object; `centre` and `radius`, its half-width, are in pixels of the image."""
    x, y, radius = OVERSAMPLING * centre[0], OVERSAMPLING * centre[1], OVERSAMPLING * radius
    for part in SHAPES[name]:
        draw_part = draw.ellipse if part.is_oval else draw.polygon
        points = [(x + radius * a, y + radius * b) for a, b in part.points]
        draw_part(points, (128, 128, 128) if part.hole else color)


def jitter(color: tuple, by: int, rng: random.Random) -> tuple:
    return tuple(min(255, max(0, channel + rng.randint(-by, by))) for channel in color)


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """An image of a scene. Its positions, sizes, colours and background vary with `rng`."""
    background = jitter((165, 162, 168), 18, rng)
    image = Image.new("RGB", (PIXELS * OVERSAMPLING, PIXELS * OVERSAMPLING), background)
    draw = ImageDraw.Draw(image)
    places = place_objects(scene.relation, rng)
    radius = 0.95 * places.size
    object_color = jitter(COLORS[scene.object_color], 12, rng)
    subject_color = jitter(COLORS[scene.subject_color], 12, rng)
    draw_sign(draw, scene.relation, places)
    draw_object(draw, scene.object, places.object, radius, object_color)
    draw_object(draw, scene.subject, places.subject, radius, subject_color)
    if scene.relation == "kicking":  # a burst, in front of the objects
        x, y = places.middle
        for dx, dy in arc(4, 0, 0.25, radius=4):
            draw_line(draw, (255, 130, 20), (x - dx, y - dy), (x + dx, y + dy))
    return image.resize((PIXELS, PIXELS), Image.Resampling.BOX)


# ---- Captions, and the truth about them ----------------------------------------------------------


def describe(scene: Scene, subject_color: bool = True, object_color: bool = True) -> str:
    """ "a red cat is chasing a blue ball"; a colour whose flag is False is left out."""
    subject = f"{scene.subject_color} {scene.subject}" if subject_color else scene.subject
    object_ = f"{scene.object_color} {scene.object}" if object_color else scene.object
    return f"a {subject} is {scene.relation} a {object_}"


def caption(scene: Scene, rng: random.Random) -> str:
    """One caption. It names each colour with probability P_COLOR, and one object with P_SINGLE."""
    text = describe(scene, rng.random() < P_COLOR, rng.random() < P_COLOR)
    if rng.random() >= P_SINGLE:
        return text
    subject, object_ = text.split(f" is {scene.relation} ")
    return subject if rng.random() < 0.5 else object_


def is_true(text: str, scene: Scene) -> bool | None:
    """Whether a caption is true of a scene; None if it is not a caption of this world.

    A caption may leave out colours or an object. "a ball is below a cat" is also true where the cat
    is above the ball.
    """
    phrase = rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(OBJECTS)})"
    match = re.fullmatch(rf"{phrase}(?: is ({'|'.join(RELATIONS)}) {phrase})?", text)
    if not match:
        return None
    color_1, noun_1, relation, color_2, noun_2 = match.groups()
    if INVERSE.get(relation) == scene.relation:
        scene = exchanged(scene)._replace(relation=relation)  # the same scene in other words
    first_is_subject = noun_1 == scene.subject and color_1 in (None, scene.subject_color)
    first_is_object = noun_1 == scene.object and color_1 in (None, scene.object_color)
    second_is_object = noun_2 == scene.object and color_2 in (None, scene.object_color)
    if relation is None:
        return first_is_subject or first_is_object
    return first_is_subject and relation == scene.relation and second_is_object


def exchanged(scene: Scene) -> Scene:
    """The scene with the object in the place of the subject."""
    return Scene(
        scene.object, scene.object_color, scene.relation, scene.subject, scene.subject_color
    )


def true_false_pairs(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(kind, true caption, false caption): the kinds of training negatives, then held-out kinds.

    The captions of "relation" name no colours, so only the order of their words tells them apart.
    """
    subject, subject_color, relation, object_, object_color = scene
    color = rng.choice([c for c in COLORS if c not in (subject_color, object_color)])
    noun = rng.choice([n for n in OBJECTS if n not in (subject, object_)])
    if rng.choice(("subject", "object")) == "subject":
        other_color = scene._replace(subject_color=color)
        other_noun = scene._replace(subject=noun)
    else:
        other_color = scene._replace(object_color=color)
        other_noun = scene._replace(object=noun)
    swapped = exchanged(scene)
    full, plain = describe(scene), describe(scene, False, False)
    yield "relation", plain, describe(swapped, False, False)
    yield "attribute", full, describe(other_color)
    if relation in VERBS:
        verb = rng.choice([v for v in VERBS if v != relation])
        yield "action", full, describe(scene._replace(relation=verb))
    yield "object", full, describe(other_noun)
    yield "swap phrases", full, describe(swapped)
    swapped_colors = scene._replace(subject_color=object_color, object_color=subject_color)
    yield "swap colors", full, describe(swapped_colors)
    if relation in INVERSE:
        yield "above/below", full, describe(scene._replace(relation=INVERSE[relation]))
    yield "add color", plain, describe(scene._replace(subject_color=color), True, False)
    yield "add object", full, f"{full} and a {color} {noun}"


# Each word is one token, because CLIP's 49,408 tokens would be most of a tiny model. [END] has the
# highest number, because that is where open_clip takes the features of a text.
WORDS = sorted(["a", "an", "and", "is", *OBJECTS, *COLORS, *RELATIONS])
WORDS = ["[PAD]", "[UNK]", *WORDS, "[START]", "[END]"]
TOKENS = {word: number for number, word in enumerate(WORDS)}
TEXT = {"context_length": 16, "vocab_size": len(WORDS), "width": 64, "heads": 2, "layers": 2}
MODEL = {  # the config of the tiny CLIP, for open_clip
    "embed_dim": 64,
    "vision_cfg": {"image_size": PIXELS, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": TEXT,
    "init_logit_scale": math.log(50),
}


def save_model_config(folder: Path) -> None:
    """Write model.json, and the tokenizer that it names, which is a folder for transformers."""
    words = Tokenizer(models.WordLevel(TOKENS, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[START]", TOKENS["[START]"]), ("[END]", TOKENS["[END]"])]
    words.post_processor = processors.TemplateProcessing("[START] $A [END]", special_tokens=ends)
    saved = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    saved.save_pretrained(folder / "tokenizer")
    text = TEXT | {"hf_tokenizer_name": str((folder / "tokenizer").resolve())}
    (folder / "model.json").write_text(json.dumps(MODEL | {"text_cfg": text}, indent=1))


# ---- The world on disk ---------------------------------------------------------------------------


def make_world(folder: Path, seed: int = 0, train: int = 8192, test: int = 1000) -> None:
    """Write into `folder`, which need not exist:

    images/               the images
    captions_train.json   in COCO's format, with a "scene" for each image; it is written last
    captions_test.json    the same, with one full description of each image, for retrieval
    negatives_test.jsonl  the true and false captions of test images, in negatives.py's format
    model.json            the config of the tiny CLIP; its tokenizer is the folder tokenizer/

    Train and test share no scene. But "A above B" and "B below A" are two scenes that look the
    same: 24 of the 1,000 test scenes of seed 0 have such a twin in train.
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
    for i, scene in enumerate(tqdm(scenes, desc="toy world", unit="image")):
        image = {"id": i, "file_name": f"{i:05d}.png", "scene": scene}
        draw_scene(scene, rng).save(folder / "images" / image["file_name"], compress_level=1)
        captions = [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
        entries.append((image, captions if i < train else [describe(scene)]))
    save_model_config(folder)
    with (folder / "negatives_test.jsonl").open("w") as file:
        for image, _ in entries[train:]:
            for record in pair_records(image):
                file.write(json.dumps(record) + "\n")
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
    """The true_false_pairs of an image. Each true caption has one record, with all its kinds."""
    records = {}  # true caption -> record
    for kind, true, false in true_false_pairs(image["scene"], random.Random(image["id"])):
        if true not in records:
            number = f"{image['id']}-{len(records)}"
            records[true] = {"id": number, "image": image["file_name"], "caption": true}
        records[true][kind] = false
    return list(records.values())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder of the world, e.g. data/toy")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if (args.out / "captions_train.json").exists():
        raise BadInput(f"{args.out} already holds a world: give another --out, or delete it")
    make_world(args.out, args.seed)


if __name__ == "__main__":
    run_main(main)
