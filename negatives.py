"""Hard-negative captions from a captions file (arXiv 2306.08832, Sec. 3.1, Fig. 2).

    python negatives.py --captions captions_train2014.json --out negatives.jsonl   # RoBERTa fills
    python negatives.py --captions captions.json --out negatives.jsonl --filler ngram  # no download

relation: two noun units change places. attribute, action, object, number: one adjective, verb, noun
or number is masked, and another word is filled in. The output has one JSON object a line: {"id",
"image", "caption", each of KINDS, "missing"}, and "box" if the input has it. A kind that cannot be
made is null (the paper: a placeholder string), and "missing" says why. All edits work on positions
of words, never on substrings. A run that was killed goes on when the command is given again.
"""

import argparse
import functools
import itertools
import json
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import english
import files

# The kinds that mask a word, with its part of speech as spaCy names it. "A kind of your own" in
# docs/data.md says how to add one, or a second kind of swap.
MASKED_KINDS = {"attribute": "ADJ", "action": "VERB", "object": "NOUN", "number": "NUM"}
KINDS = ["relation", *MASKED_KINDS]  # all that are made; Sec. 4.4 names numbers as a further kind
PAPER_KINDS = ["relation", "attribute", "action", "object"]  # T_hn in Sec. 3.2; training's default
CANDIDATES = 100  # words that a filler proposes for a mask; with fewer, text alone tells negatives
FALLBACK_WEIGHT = 1e-3  # of a number that the filler does not propose
MAX_PAIRS = 40  # pairs of nouns of a caption that are tried: all of them up to nine noun units
MASK_BATCH = 128  # masked captions in one forward pass
CHUNK = 1024  # captions that are tagged, filled and saved together, or a few more
Words = list[english.Word]  # a tagged caption


# ---- The rule (Sec. 3.1): swap two noun units, or mask one word and fill it ----------------------


@dataclass
class Place:  # a position in a caption, and what a filler proposes for it
    words: Words
    position: int
    proposed: dict[str, float] = field(default_factory=dict)  # word -> weight


@dataclass
class Swap:  # a negative in which two noun units have changed places
    caption: str
    number_differs: bool
    sort_differs: bool
    first: Place  # of the first unit's main noun before the swap, without the units' other words
    second: Place  # of the second unit's main noun, in the same words


def noun_swaps(
    words: Words, captions: set[str], rng: random.Random, strict: bool = False
) -> list[Swap]:
    """Swaps of two noun units (english.noun_units) that are as alike as possible, in random order.
    make_negatives takes the most plausible one. At most MAX_PAIRS pairs are tried.

    If some swaps keep the number, only those are returned; if some of these keep the sort, only
    those: nobody needs the image to see that "a suitcase carries a man" is false. With `strict`
    both must be kept. Articles and adjectives stay, unless the units differ in number: "a dogs"
    would be refuted by grammar. No swap says the same as the caption, or is one of the image's
    `captions` (lower case).
    paper: "two noun words" / authors' code: needs three, replaces substrings / we: by position
    """
    pairs = list(itertools.combinations(english.noun_units(words), 2))
    rng.shuffle(pairs)
    swaps = []
    for first, second in pairs[:MAX_PAIRS]:
        nouns = [words[english.head_noun(words, unit)] for unit in (first, second)]
        middle = [nouns[0], *words[first[1] : second[0]], nouns[1]]
        heads_alone = [*words[: first[0]], *middle, *words[second[1] :]]
        places = (Place(heads_alone, first[0]), Place(heads_alone, first[0] + len(middle) - 1))
        number_differs, sort_differs = english.number_and_sort_differ(words, first, second)
        if number_differs:
            first = english.with_modifiers(words, first)
            second = english.with_modifiers(words, second)
        caption = english.swapped(words, first, second)
        if caption.lower() not in captions and not english.says_the_same(words, first, second):
            swaps.append(Swap(caption, number_differs, sort_differs, *places))
    if strict:
        return [swap for swap in swaps if not swap.number_differs and not swap.sort_differs]
    # two wishes, the stronger one first; a wish that no swap meets is passed over
    swaps = [swap for swap in swaps if not swap.number_differs] or swaps
    return [swap for swap in swaps if not swap.sort_differs] or swaps


def choose_masked_word(words: Words, kind: str, rng: random.Random) -> tuple[Words, int] | None:
    """The caption, and the position of the word to mask in it; None if there is no such word.

    A compound noun is masked as one word ("a teddy bear" -> "a <mask>"), so the caption may come
    back shortened. Not masked are words that english.maskable refuses, and what stands behind a
    negation, because it may be false already.
    paper: a random word / we: random among the words of CONTRAST, if there are any, because we know
    what excludes them; of these, among words not beside "of"; of these, among the shortest nouns
    """
    spans = [(i, i + 1) for i in range(len(words))]
    if kind == "object":
        spans = english.noun_runs(words)
    candidates = []
    for start, end in spans:
        if any(word.text.lower() in english.NEGATIONS for word in words[:start]):
            break  # all later spans are behind it, too
        fits = words[end - 1].pos == MASKED_KINDS[kind] and english.maskable(words, start, end)
        if fits and all(word.text.isalpha() or word.pos == "NUM" for word in words[start:end]):
            candidates.append((start, end))
    if not candidates:
        return None
    # The lowest draw wins at the end: so an edit of the word lists moves few of the choices.
    draws = {span: rng.random() for span in candidates}
    # three wishes, the strongest first; a wish that no candidate meets is passed over
    known = set().union(*english.CONTRAST.get(kind, []))
    candidates = [span for span in candidates if words[span[1] - 1].lemma in known] or candidates
    texts = [word.text for word in words]  # few words fit beside "of", as in "a bottle of beer"
    apart = [span for span in candidates if "of" not in texts[max(0, span[0] - 1) : span[1] + 1]]
    candidates = apart or candidates
    shortest = min(end - start for start, end in candidates)
    candidates = [(start, end) for start, end in candidates if end - start == shortest]
    start, end = min(candidates, key=draws.get)
    return words[:start] + words[end - 1 :], start


def fill(words: Words, position: int, new: str) -> str:
    """The caption with another word at the position. A word in capitals is replaced by one in
    capitals, and a sentence still starts with one."""
    old = words[position].text
    if old.isupper() and len(old) > 1:
        new = new.upper()
    return english.text_of(english.replace(words, position, position + 1, new))


# ---- What must not be made: a caption that is still true -----------------------------------------


def acceptable(
    proposed: dict[str, float], old: str, kind: str, true_words: set[str], tagger: english.Tagger
) -> dict[str, float]:
    """The proposed words that probably make the caption false in the place of `old`: lower case ->
    weight. These are rules of thumb, not a proof: docs/measurements.md counts what is true.

    None of a word's lemmas is among `true_words`, and CONTRAST has it in the same groups as `old`:
    a colour gives way to a colour only, an animal to an animal, a word of no group to words of no
    group. A word has two letters or more, and no other signs.
    """
    if kind == "number":  # there are so few that all have a weight, if only a small one
        proposed = dict.fromkeys(english.NUMBERS, FALLBACK_WEIGHT) | proposed
    old_groups = english.groups_of(tagger.lemmas(old), kind)
    passed = Counter()
    for word, weight in proposed.items():
        word = word.lower()
        lemmas = tagger.lemmas(word)
        usable = word.isalpha() and len(word) > 1 and not lemmas & true_words
        if usable and english.groups_of(lemmas, kind) == old_groups:
            passed[word] += weight
    return passed


# ---- Fillers: for each (words, position) they propose {word: weight} -----------------------------


class MaskedLMFiller:
    """Any masked language model of transformers, by hub name or local folder (paper: RoBERTa)."""

    def __init__(self, name: str, candidates: int = CANDIDATES):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.candidates = candidates
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        with files.one_line_errors(
            f"{name} cannot be used (negatives.py --filler FOLDER or ngram)"
        ):
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, info = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True)
            if info["missing_keys"]:  # such as those of its head: they would be random
                raise ValueError(f"weights are missing: {', '.join(sorted(info['missing_keys']))}")
            self.model = model.to(self.device, dtype).eval()
        longest = self.model.config.max_position_embeddings - 2  # RoBERTa counts from 2
        self.options = {"truncation": True, "max_length": longest, "padding": True}
        # Only tokens that start a word and have only letters are proposed. BPE and SentencePiece
        # mark a token that starts a word (with "Ġ" or "▁"), WordPiece marks one that does not.
        tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        starts_are_marked = any(token.startswith(("Ġ", "▁")) for token in tokens)
        self.words = {}  # number of a token -> word
        for number, token in enumerate(tokens):
            word = token.lstrip("Ġ▁")
            if re.fullmatch("[A-Za-z]+", word) and starts_are_marked == (word != token):
                self.words[number] = word
        self.word_ids = torch.tensor(list(self.words), device=self.device)

    @torch.inference_mode()
    def __call__(self, requests: list[tuple[Words, int]]) -> list[dict[str, float]]:
        texts = []
        for words, i in requests:
            masked = words[i]._replace(text=self.tokenizer.mask_token)
            texts.append(english.text_of([*words[:i], masked, *words[i + 1 :]]))
        proposals = {}  # text -> {word: probability}
        order = sorted(dict.fromkeys(texts), key=len)  # each text once; little padding in a batch
        for start in range(0, len(order), MASK_BATCH):
            batch = order[start : start + MASK_BATCH]
            inputs = self.tokenizer(batch, return_tensors="pt", **self.options).to(self.device)
            is_mask = inputs["input_ids"] == self.tokenizer.mask_token_id  # (texts, tokens)
            logits = logits_at(is_mask, self.model, inputs)[:, self.word_ids]  # (masks, words)
            best = logits.double().softmax(1).topk(min(self.candidates, len(self.words)))
            rows = is_mask.nonzero()[:, 0].tolist()  # to which text a mask belongs
            numbers = self.word_ids[best.indices].tolist()
            for row, of_row, weights in zip(rows, numbers, best.values.tolist()):
                proposals[batch[row]] = dict(zip([self.words[n] for n in of_row], weights))
        return [proposals.get(text, {}) for text in texts]  # {}: truncation took the mask away


def logits_at(where: torch.Tensor, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """A masked LM's logits (positions, vocabulary) at the positions where `where` is True.

    A base model makes a vector of each position, then a head makes logits of each vector. The head
    takes as long as six layers of RoBERTa, so it should not see all positions. It has another name
    in each architecture, so we cannot call it ourselves. But PyTorch calls our function (a forward
    hook) after the base model, and what this returns goes to the head.
    """

    def keep_wanted(base_model, arguments, output):
        output["last_hidden_state"] = output["last_hidden_state"][where][:, None]
        return output

    with model.base_model.register_forward_hook(keep_wanted):  # until the end of this block
        return model(**inputs).logits[:, 0]


class NgramFiller:
    """A masked n-gram model counted on the captions themselves; nothing to download.

    The weight of a word w is c(left, t, w) * c(t, right, w) / (10 + c(t, w)). Here c counts, t is
    the fine tag of the position (spaCy's tag_), and 0.5 stands for a factor of 0. The 10 holds back
    words that were seen once or twice, above all misspelt ones. Words that were seen with both
    neighbours come first, so that `candidates` cuts off others.
    """

    def __init__(self, captions: Iterable[Words], candidates: int = CANDIDATES):
        self.candidates = candidates
        self.after = defaultdict(Counter)  # (left neighbour, tag) -> word -> count
        self.before = defaultdict(Counter)  # (tag, right neighbour) -> word -> count
        self.seen = defaultdict(Counter)  # tag -> word -> count
        self.best = functools.lru_cache(maxsize=1 << 16)(self._best)
        for words in captions:
            for i, word in enumerate(words):
                if word.pos in MASKED_KINDS.values() and word.text.isalpha():
                    left, tag, right = neighbours(words, i)
                    for counts in (self.after[left, tag], self.before[tag, right], self.seen[tag]):
                        counts[sys.intern(word.text.lower())] += 1

    def __call__(self, requests: list[tuple[Words, int]]) -> list[dict[str, float]]:
        return [self.best(*neighbours(words, position)) for words, position in requests]

    def _best(self, left: str, tag: str, right: str) -> dict[str, float]:
        after, before = self.after.get((left, tag), {}), self.before.get((tag, right), {})
        weights = {}
        for w in sorted(after.keys() | before.keys()):
            weights[w] = after.get(w, 0.5) * before.get(w, 0.5) / (10 + self.seen[tag][w])
        # ties stay in alphabetical order
        ranked = sorted(
            weights, key=lambda w: (w in after and w in before, weights[w]), reverse=True
        )
        return {w: weights[w] for w in ranked[: self.candidates]}


def neighbours(words: Words, i: int) -> tuple[str, str, str]:
    """The word before, the tag of position i, the word after; "" beyond the caption."""
    left = words[i - 1].text.lower() if i > 0 else ""
    right = words[i + 1].text.lower() if i + 1 < len(words) else ""
    return sys.intern(left), words[i].tag, sys.intern(right)


# ---- The negatives of a list of captions ---------------------------------------------------------


def make_negatives(
    captions: list[dict], filler: Callable, tagger: english.Tagger, seed: int = 0, strict=False
) -> list[dict]:
    """A record for each caption, with its kinds of negative and why some are missing.

    Captions of one image that are neighbours in the file must come in one call. The draws are
    seeded by `seed` and the caption's id; but which words pass depends on the other captions, too:
    those of the image say what is true, and all of them say which fine tags a word has.
    """
    tagged = list(tagger.words(caption["caption"] for caption in captions))
    siblings, true_words, fine_tags = what_captions_say(captions, tagged, tagger)
    records, swaps, blanks = [], [], []
    for caption, words in zip(captions, tagged):
        record = {**caption, **dict.fromkeys(KINDS)}
        records.append(record)
        if not tagger.is_english(words):
            record["missing"] = dict.fromkeys(KINDS, "not English")
            continue
        # why each kind is missing, if it is still missing at the end
        record["missing"] = {"relation": "no swap of two nouns passes the rules"}
        rng = random.Random(f"{seed}/{caption['id']}")
        swaps.append((record, noun_swaps(words, siblings[caption["image"]], rng, strict)))
        for kind, pos in MASKED_KINDS.items():
            record["missing"][kind] = f"no {tagger.explain(pos)} to mask"
            masked = choose_masked_word(words, kind, rng)
            if masked:
                record["missing"][kind] = "no word for the mask passes the rules"
                blanks.append((record, kind, Place(*masked), rng))
    # all is asked in one call, because the filler computes equal requests only once
    places = []
    for _, choices in swaps:
        if len(choices) > 1:
            places += [place for swap in choices for place in (swap.first, swap.second)]
    places += [place for _, _, place, _ in blanks]
    for place, proposed in zip(places, filler([(place.words, place.position) for place in places])):
        place.proposed = proposed
    for record, choices in swaps:
        if choices:
            record["relation"] = max(choices, key=plausibility).caption
    for record, kind, place, _ in blanks:
        old = place.words[place.position]
        passed = acceptable(place.proposed, old.text, kind, true_words[record["image"]], tagger)
        # Words that stand in these captions with other tags only are dropped here: "a skateboard
        # dog" may pass in fill_in, too. Words that do not stand in them stay.
        place.proposed = {w: passed[w] for w in passed if old.tag in fine_tags.get(w, [old.tag])}
    fill_in(blanks, tagger)
    for record in records:
        record["missing"] = {k: record["missing"][k] for k in KINDS if record[k] is None}
    return records


def what_captions_say(captions: list[dict], tagged: list[Words], tagger: english.Tagger) -> tuple:
    """image -> its captions in lower case; image -> the lemmas that count as true of it: those of
    its captions, what may be true with them, and vague words; word -> the fine tags that it has."""
    siblings, fine_tags = defaultdict(set), defaultdict(set)
    true_words = defaultdict(lambda: set(english.WEAK))
    for caption, words in zip(captions, tagged):
        siblings[caption["image"]].add(caption["caption"].lower())
        for word in words:
            fine_tags[word.text.lower()].add(word.tag)
            for lemma in (word.lemma, *tagger.lemmas(word.text)):
                true_words[caption["image"]].update([lemma], english.may_also_be(lemma))
    return siblings, true_words, fine_tags


def plausibility(swap: Swap) -> float:
    """How well two nouns fit into each other's place: in both places, the weight of the other noun
    divided by that of the own one. A noun that is not proposed has the least proposed weight."""
    nouns = [place.words[place.position].text.lower() for place in (swap.first, swap.second)]
    product = 1.0
    for place, own, other in zip((swap.first, swap.second), nouns, reversed(nouns)):
        least = min(place.proposed.values(), default=1)
        product *= place.proposed.get(other, least) / place.proposed.get(own, least)
    return product


def fill_in(blanks: list[tuple], tagger: english.Tagger) -> None:
    """Fill each blank (record, kind, place, rng) with a word that is proposed for the place, drawn
    with the filler's probability: too frequent or too rare words would give a negative away.

    If the new word has another fine tag in its caption ("walks" -> "walk"), another one is drawn.
    All blanks draw at the same time, because it is faster to tag many captions together.
    """
    while blanks:
        blanks = [blank for blank in blanks if blank[2].proposed]
        tried, failed = [], []
        for _, _, place, rng in blanks:
            word = rng.choices(list(place.proposed), list(place.proposed.values()))[0]
            del place.proposed[word]
            tried.append((place.words, place.position, word))
        for blank, attempt, tag in zip(blanks, tried, tagger.tags(tried)):
            record, kind, place, _ = blank
            if tag == place.words[place.position].tag:
                record[kind] = fill(*attempt)
            else:
                failed.append(blank)
        blanks = failed


# ---- A captions file in, a file of negatives out -------------------------------------------------


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
    """Write the negatives of a captions file; returns the file, `out` or OUT.I-of-N for a shard.

    The parameters are the flags of the command line. Finished chunks lie in OUT.part until OUT is
    written. Neither shards nor interruptions change a byte, because a chunk depends only on its
    captions, and n-grams are counted on all captions that are read, not on a shard. (A masked LM
    rounds differently on another device.)
    """
    match = re.fullmatch(r"([1-9]\d*)/(\d+)", shard)
    if not match or int(match[1]) > int(match[2]):
        raise files.BadInput(f"--shard {shard}: it is I/N with I from 1 to N")
    number, total = int(match[1]), int(match[2])
    if total > 1:
        out = Path(f"{out}.{number:05d}-of-{total:05d}")
    if out.exists():
        raise files.BadInput(f"{out} exists: give another --out, or delete it")
    records = files.read_captions(captions, split)
    chunks = split_into_chunks(records)
    chunks = chunks[len(chunks) * (number - 1) // total : len(chunks) * number // total]
    source = [path.read_text("utf-8") for path in (Path(__file__), *english.FILES)]
    settings = [records, source, filler, seed, strict_swaps, candidates]  # they decide the output
    digest = files.sha256(json.dumps(settings))[:16]
    folder = Path(f"{out}.part")
    folder.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(digest) for path in folder.iterdir()):
        raise files.BadInput(f"{folder} was begun with other captions, settings or code: delete it")
    tagger = english.Tagger()
    if filler == "ngram":
        counted = tqdm((record["caption"] for record in records), "counting", len(records))
        propose = NgramFiller(tagger.words(counted), candidates)
    else:
        propose = MaskedLMFiller(filler, candidates)
    paths = [folder / f"{digest}-{n:06d}.jsonl" for n in range(len(chunks))]
    for path, chunk in zip(paths, tqdm(chunks, out.name, unit="chunk")):
        if files.read_with_checksum(path) is None:
            made = make_negatives(chunk, propose, tagger, seed, strict_swaps)
            files.write_with_checksum(path, "".join(json.dumps(r) + "\n" for r in made))
    with files.whole_file(out) as unfinished, unfinished.open("w") as file:
        for path in paths:
            file.write(files.read_with_checksum(path))
    shutil.rmtree(folder)
    return out


def split_into_chunks(records: list[dict]) -> list[list[dict]]:
    """CHUNK captions each, or a few more, because neighbours that show one image stay together; the
    last one has the rest."""
    chunks = [[]]
    for record in records:
        if len(chunks[-1]) >= CHUNK and record["image"] != chunks[-1][-1]["image"]:
            chunks.append([])
        chunks[-1].append(record)
    return chunks


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--captions", type=Path, required=True, help="JSON, CSV, a folder ...: see docs/data.md")
    add("--split", nargs="+", default=[], help="train restval ... of a Karpathy file")
    add("--out", type=Path, required=True, help="the .jsonl to write")
    add("--filler", default="roberta-base", help="ngram, or a masked LM by hub name or folder")
    add("--seed", type=int, default=0)
    add("--candidates", type=files.at_least(1), default=CANDIDATES, help="proposed words [100]")
    add("--strict-swaps", action="store_true", help="swap only nouns of one number and sort")
    add("--shard", default="1/1", help="I/N: make only the I-th of N parts, OUT.I-of-N")
    out = generate(**vars(p.parse_args()))  # each flag has the name of a parameter
    counts = Counter()
    with out.open() as file:
        for record in map(json.loads, file):
            counts.update(f"{kind}: {record['missing'].get(kind, 'made')}" for kind in KINDS)
    for what, count in sorted(counts.items()):
        print(f"{count:8} {what}")
    print(out)


if __name__ == "__main__":
    files.run_main(main)
