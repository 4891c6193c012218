"""negatives.py: captions in, edits on token positions, the two fillers, the command."""

import io
import json
import logging
import random
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, coco_captions
from transformers import PreTrainedTokenizerFast, RobertaForMaskedLM

import negatives
from negatives import FOUR, KINDS, BadInput, Word

RNG = random.Random(0)


@pytest.fixture(scope="session")
def tagger():
    return negatives.Tagger()


def words(text: str) -> list[Word]:
    """Words from "A/DET black/ADJ dog/NOUN": POS given, lemma = lower case, one blank between."""
    out = []
    for part in text.split():
        word, pos = part.rsplit("/", 1)
        lemma = {"plays": "play", "is": "be"}.get(word, word.lower())
        out.append(Word(word, " ", pos, pos, lemma))
    return [*out[:-1], out[-1]._replace(space="")]


# ---- Edits ---------------------------------------------------------------------------------------


def test_a_hyphenated_word_is_one(tagger):
    (found,) = tagger.words(["A tug-of-war toy, a close-up and a cross-country skier - a man"])
    texts = [word.text for word in found]
    assert texts[:4] == ["A", "tug-of-war", "toy", ","]
    assert {"close-up", "cross-country", "-"} < {*texts}
    assert (
        negatives.text_of(found) == "A tug-of-war toy, a close-up and a cross-country skier - a man"
    )


NONE = "no swap of two nouns that is surely false"


def swaps(ws, captions=(), **options):
    """The captions of relation(), which are the same with every seed but for their order."""
    found = [negatives.relation(ws, set(captions), random.Random(n), **options) for n in range(3)]
    captions = [{swap.caption for swap in of_seed} for of_seed in found]
    assert captions[0] == captions[1] == captions[2]
    return captions[0]


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("A/DET teddy/NOUN bear/NOUN on/ADP the/DET bed/NOUN ./PUNCT", "A bed on the teddy bear ."),
        # the authors' str.replace makes "a henn eats hen" of this caption
        ("a/DET hen/NOUN eats/VERB then/NOUN", "then eats a hen"),
        # sentence case stays with the position, the article agrees
        ("Dogs/NOUN chase/VERB Rex/PROPN ./PUNCT", "Rex chase dogs ."),
        ("Rex/PROPN chases/VERB dogs/NOUN", "Dogs chases Rex"),
        ("Teddy/NOUN bear/NOUN on/ADP grass/NOUN", "Grass on teddy bear"),
        ("A/DET cat/NOUN on/ADP an/DET apple/NOUN", "An apple on a cat"),
        ("a/DET man/NOUN sits/VERB", None),
        ("a/DET man/NOUN in/ADP front/NOUN", None),  # no object
        ("a/DET man/NOUN sees/VERB a/DET man/NOUN", None),
        ("a/DET man/NOUN and/CCONJ a/DET dog/NOUN", None),
        ("ham/NOUN ,/PUNCT eggs/NOUN or/CCONJ bread/NOUN", None),
        ("a/DET cat/NOUN next/ADV to/ADP his/PRON dog/NOUN", None),
        ("a/DET boy/NOUN plays/VERB with/ADP a/DET dog/NOUN", None),
        ("a/DET hen/NOUN is/VERB a/DET pan/NOUN", None),  # one of the picture's captions
        # a modifier stays in place, and makes the swap false
        ("a/DET red/ADJ cat/NOUN and/CCONJ a/DET dog/NOUN", "a red dog and a cat"),
        # of units that differ in number it moves along
        ("a/DET cat/NOUN by/ADP two/NUM dogs/NOUN", None),
        ("a/DET red/ADJ cat/NOUN sees/VERB two/NUM dogs/NOUN", "two dogs sees a red cat"),
        ("a/DET smiling/VERB cat/NOUN with/ADP a/DET dog/NOUN", "a smiling dog with a cat"),
    ],
)
def test_relation(text, swapped):
    assert swaps(words(text), {"a pan is a hen"}) == ({swapped} if swapped else set())


def test_coordinated_units_change_places_with_others_only():
    first = "boys/NOUN riding/VERB horses/NOUN and/CCONJ mules/NOUN"
    second = "a/DET dog/NOUN ,/PUNCT a/DET red/ADJ cat/NOUN and/CCONJ a/DET bird/NOUN"
    expected = {
        first: {"horses riding boys and mules", "mules riding horses and boys"},
        second: {"a cat , a red dog and a bird", "a dog , a red bird and a cat"},
    }
    for text, swapped in expected.items():
        assert swaps(words(text)) == swapped


@pytest.mark.parametrize(
    ("text", "position", "new", "filled"),
    [
        *[
            ("a/DET dog/NOUN", 1, w, f"a {w}")
            for w in "unicycle man utensil urinal ewe one".split()
        ],
        *[("a/DET dog/NOUN", 1, w, f"an {w}") for w in "owl hour umbrella oven".split()],
        # an article that did not agree before is left alone where the sound stays
        ("a/DET orange/NOUN", 1, "apple", "a apple"),
        (
            "Black/ADJ dog/NOUN by/ADP a/DET black/ADJ door/NOUN",
            0,
            "red",
            "Red dog by a black door",
        ),
        ("BLACK/ADJ dog/NOUN", 0, "white", "WHITE dog"),
        ("SEE/VERB A/DET DOG/NOUN", 2, "owl", "SEE AN OWL"),
        ("I/NOUN see/VERB", 0, "we", "We see"),
    ],
)
def test_fill(text, position, new, filled):
    assert negatives.fill(words(text), position, new) == filled


def test_mask_knows_the_part_of_speech():
    tagged = words("a/DET red/ADJ cat/NOUN chases/VERB 3d/NOUN side/NOUN many/ADJ is/VERB ./PUNCT")
    found = {kind: negatives.choose_mask(tagged, kind, RNG)[1] for kind in FOUR[1:]}
    assert found == {"attribute": 1, "action": 3, "object": 2}
    assert negatives.choose_mask(words("a/DET cat/NOUN"), "action", RNG) is None


def test_words_tagged_anew_keep_their_tag(tagger):
    texts = ["Two dogs play in the tall wet grass while a man with a red hat looks on."]
    texts += ["A play about flies ended late; the old man can fish near the duck pond, they said."]
    tagged = list(tagger.words(texts))
    assert [negatives.text_of(ws) for ws in tagged] == texts
    same = [(ws, i, word.text) for ws in tagged for i, word in enumerate(ws)]
    assert tagger.tags(same) == [ws[i].tag for ws, i, _ in same]
    assert tagger.tags([(tagged[0], 1, "quickly"), (tagged[0], 1, "dog")]) == ["RB", "NN"]


def tagged(tagger, text):
    return next(tagger.words([text]))


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("A man eats a plate of hot food.", ["man", "plate of hot food"]),
        ("The top of a tall building and a cup of tea", ["building", "cup of tea"]),
        ("Men in front of a house and a group of dogs", ["Men", "house", "dogs"]),
        ("A polar bear and a hot dog", ["bear"]),  # half of "hot dog" does not move
        ("A cross-country skier and a dog", ["skier", "dog"]),
    ],
)
def test_what_moves_as_one(tagger, text, units):
    if "polar" in text:
        units = []  # nor half of "polar bear"
    ws = tagged(tagger, text)
    assert [negatives.text_of(ws[a:b]).strip() for a, b in negatives.noun_units(ws)] == units


@pytest.mark.parametrize(
    ("text", "best", "others"),
    [
        # one number first: not "Two frisbee ... a dogs"
        ("Two dogs chase a frisbee past some cats.", "Two cats chase a frisbee past some dogs.", 2),
        ("A man holds two fish near a cat.", "A cat holds two fish near a man.", 1),
        # then one sort: not "A suitcase is carrying a man"
        ("A man carries a suitcase to a woman.", "A woman carries a suitcase to a man.", 2),
        ("A dog chases a truck toward a horse.", "A horse chases a truck toward a dog.", 2),
        # "water", which has no article, is of no number
        ("A boat on water near a bus.", "A bus on water near a boat.", 1),
    ],
)
def test_swaps_of_one_number_and_sort_come_first(tagger, text, best, others):
    ws = tagged(tagger, text)
    assert swaps(ws) == {best}
    # and if that one is a caption of the picture, others are still there, the likest first
    assert len(swaps(ws, {best.lower()}) - {best}) == others
    assert not swaps(ws, {best.lower()}, strict=True)


def test_strict_swaps_are_of_one_number_and_sort(tagger, tmp_path):
    texts = ["A man carries two suitcases.", "A dog chases a cat."]
    source = coco_captions(tmp_path / "c.json", {f"{i}.jpg": [t] for i, t in enumerate(texts)})
    for more, expected in ([], "Two man"), (["--strict-swaps"], None):
        out = tmp_path / f"{len(more)}.jsonl"
        run("--captions", source, "--out", out, "--filler", "ngram", *more)
        one, two = (json.loads(line) for line in out.read_text().splitlines())
        assert two["relation"] == "A cat chases a dog."
        assert (one["relation"] is None) == (expected is None)
    assert one["missing"]["relation"] == NONE


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("A couple of birds cross an old street.", "An old street cross a couple of birds."),
        (
            "Two black and white dogs chase him past a car.",
            "A car chase him past two black and white dogs.",
        ),
        ("A man carries his two bags.", "His two bags carries a man."),
        ("They give him two kites in a park.", "They give him a park in two kites."),
        ("Men, each wearing a hat, walk.", "A hat, each wearing men, walk."),
        ("A sign which shows dogs", "Dogs which shows a sign"),
        ("A car gets red and two dogs.", "Two dogs gets red and a car."),
    ],
)
def test_what_tells_the_number_moves_along_where_it_differs(tagger, text, swapped):
    assert swaps(tagged(tagger, text)) == {swapped}


def test_the_most_plausible_swap_is_made(tagger):
    """By the ratio of probabilities in the other's place and in the own. Here these are
    box and mat 8/2 * .5/1 = 2, box and hat .2/2 * 10/10 = .1, mat and hat .02/1 * 300/10 = .6,
    where "hat" counts as the last of what is proposed in place of "mat"."""
    places = {
        "a <> on a mat under a hat": {"mat": 8, "box": 2, "hat": 0.2},
        "a box on a <> under a hat": {"mat": 1, "box": 0.5, "tub": 0.02},
        "a box on a mat under a <>": {"mat": 300, "box": 10, "hat": 10},
    }

    def filler(requests):
        texts = []
        for ws, i in requests:
            texts.append(negatives.text_of([*ws[:i], ws[i]._replace(text="<>"), *ws[i + 1 :]]))
        return [places.get(text, {}) for text in texts]

    for seed in range(5):
        (record,) = make(tagger, ["a box on a mat under a hat"], filler, seed=seed)
        assert record["relation"] == "a mat on a box under a hat"
    places["a <> on a mat under a hat"]["hat"] = 6  # box and hat: 6/2 * 10/10
    (record,) = make(tagger, ["a box on a mat under a hat"], filler)
    assert record["relation"] == "a hat on a mat under a box"


def test_a_unit_is_judged_by_its_head(tagger):
    text = "a teddy bear eats a plate of food"
    (swap,) = negatives.relation(tagged(tagger, text), set(), RNG)
    assert swap.caption == "a plate of food eats a teddy bear"
    assert negatives.text_of(swap.words) == "a bear eats a plate "
    assert [swap.words[i].text for i in (swap.first, swap.second)] == ["bear", "plate"]


@pytest.mark.parametrize(
    ("kind", "text", "masked"),
    [
        ("object", "A teddy bear and a dog", "A teddy bear and a _"),  # a word alone comes first
        ("object", "A clock tower", "A _"),  # else the compound as one word, not "clock _"
        ("object", "A bottle of beer near a dog", "A bottle of beer near a _"),
        ("attribute", "A wonderful small house", "A wonderful _ house"),  # what CONTRAST knows
        ("attribute", "A black and white hot dog", None),
        ("action", "A man is sitting and not eating", "A man is _ and not eating"),
        ("object", "There is no dog near the tree", None),  # it is false already
        ("object", "A dog without a hat", "A _ without a hat"),
    ],
)
def test_what_is_masked(tagger, kind, text, masked):
    for seed in range(20):
        found = negatives.choose_mask(tagged(tagger, text), kind, random.Random(seed))
        if masked is None:
            assert found is None
        else:
            ws, position = found
            ws[position] = ws[position]._replace(text="_")
            assert negatives.text_of(ws) == masked


def test_what_is_english(tagger):
    english = ["dog", "A man eats", "A café 🐶", ""]
    english += ["Barack Obama greets Angela Merkel in Paris", "Barack Obama"]
    foreign = [
        "ein kleiner Hund jagt den Ball",
        "un chien court dans le parc",
        "一只狗在草地上 追逐",
    ]
    for text in english + foreign:
        assert tagger.is_english(tagged(tagger, text)) == (text in english), text
    (record,) = make(tagger, foreign[:1], propose("cat"))
    assert record["missing"] == dict.fromkeys(KINDS, "not English")


def test_lemmas_of_every_part_of_speech(tagger):
    assert {"stand", "stands"} <= tagger.lemmas("Stands")
    assert {"run", "running"} <= tagger.lemmas("running")
    assert {"big", "bigger"} <= tagger.lemmas("bigger")


def propose(*candidates):
    """A filler of words with weight 1, 1/2, 1/3 ..."""
    weights = {word: 1 / n for n, word in enumerate(candidates, 1)}
    return lambda requests: [weights] * len(requests)


def make(tagger, texts, filler, **options):
    captions = [{"id": i, "image": "a.jpg", "caption": text} for i, text in enumerate(texts)]
    return negatives.make_negatives(captions, filler, tagger, **options)


@pytest.mark.parametrize(
    ("kind", "text", "bad", "good"),
    [
        # the masked word's own forms, no words, too vague ones, another part of speech
        (
            "object",
            "a dog",
            ["Dog", "dogs", "x-ray", "q", "3", "##s", "", "thing", "slowly"],
            "cat",
        ),
        ("object", "The man eats", ["person", "guy", "boy", "surfer"], "woman"),
        ("object", "The surfer eats", ["man", "woman", "person"], "driver"),
        ("object", "Two dogs eat", ["cat", "horse"], "cats"),  # another number
        ("object", "The dog eats", ["animal", "puppy"], "horse"),
        # what is not of the same sort may be true as well
        ("attribute", "a brown dog", ["large", "wet", "brown"], "white"),
        ("action", "a dog standing", ["looking", "barking", "stands"], "sleeping"),
    ],
)
def test_fills_that_may_be_true_are_rejected(tagger, kind, text, bad, good):
    (record,) = make(tagger, [text], propose(*bad))
    assert record[kind] is None
    assert record["missing"][kind] == "no word for the mask that is surely false"
    (record,) = make(tagger, [text], propose(*bad, good))
    assert good in record[kind].split()
    assert kind not in record["missing"]


def test_fills_are_drawn_with_the_fillers_probability(tagger):
    """Among those that pass; "houses" is of another number."""
    found = Counter()
    for i in range(660):
        captions = [{"id": i, "image": "a.jpg", "caption": "a hat"}]
        filler = propose("hats", "ball", "tree", "houses", "bus")
        found[negatives.make_negatives(captions, filler, tagger)[0]["object"]] += 1
    # 1/2, 1/3, 1/5; what "houses" was drawn for goes to the others in proportion
    assert set(found) == {"a ball", "a tree", "a bus"}
    expected = {"a ball": 15 / 31, "a tree": 10 / 31, "a bus": 6 / 31}
    assert all(abs(found[text] / 660 - share) < 0.06 for text, share in expected.items()), found


def test_words_that_the_captions_have_with_other_tags_alone_are_not_tried(tagger, monkeypatch):
    """It is most of them: tagging each would take as long as all else."""
    tried, tags = [], tagger.tags
    monkeypatch.setattr(tagger, "tags", lambda new: tried.extend(new) or tags(new))
    texts = ["A dog paints a ball", "Two cats walk on grass"]
    captions = [{"id": i, "image": f"{i}", "caption": text} for i, text in enumerate(texts)]
    weights = {"cats": 1, "sells": 1e-6}
    records = negatives.make_negatives(captions, lambda new: [weights] * len(new), tagger)
    assert records[0]["action"] == "A dog sells a ball"
    assert {word for words, i, word in tried if words[i].text == "paints"} == {"sells"}


def test_objects_of_the_same_sort_come_first(tagger):
    proposed = {"dog": 5, "lady": 4, "boy": 3, "Boy": 2, "table": 1, "man": 1}
    found = negatives.acceptable(proposed, "woman", "object", {"woman", "lady"}, tagger)
    assert found == {"dog": 5e-3, "boy": 5, "table": 1e-3, "man": 1}
    proposed = {"wet": 2, "blue": 1}
    assert negatives.acceptable(proposed, "red", "attribute", set(), tagger) == {"blue": 1}


def test_another_kind_is_one_entry(tagger, monkeypatch):
    monkeypatch.setitem(KINDS, "manner", "ADV")
    records = make(tagger, ["A dog runs quickly", "a dog eats"], propose("red", "slowly", "two"))
    assert [r["manner"] for r in records] == ["A dog runs slowly", None]
    assert records[1]["missing"]["manner"] == "no adverb to mask"
    filler = negatives.NgramFiller([words("runs/V fast/ADV"), words("runs/V far/ADV")])
    assert filler([(words("runs/V well/ADV"), 1)]) == [{"far": 1 / 11, "fast": 1 / 11}]


def test_numbers_are_two_to_ten_and_no_captions(tagger):
    texts = [
        "Two dogs run past 3 men.",
        "One dog and a cat on track number 12",
        "Four cats",
        "5 men",
    ]
    found = {text: set() for text in texts}
    for seed in range(40):
        for record in make(tagger, texts, propose("many", "three", "big"), seed=seed):
            found[record["caption"]].add(record["number"])
    assert found[texts[1]] == {None}
    numbers = set("six seven eight nine ten".split())  # of the captions: 2, 3, 4, 5
    assert found["Four cats"] == {f"{n.title()} cats" for n in numbers}
    changed = {text.split()[0] for text in found[texts[0]] - {None}}
    assert changed <= {"Two", *(n.title() for n in numbers)} and len(changed) > 3


# ---- Fillers -------------------------------------------------------------------------------------


def test_ngram_ranks_by_both_neighbours_first():
    seen = ["A/DT Red/ADJ cat/NN", "a/DT red/ADJ cat/NN", "a/DT big/ADJ cat/NN"]
    seen += ["a/DT old/ADJ dog/NN", "the/DT tiny/ADJ cat/NN", *["the/DT red/ADJ dog/NN"] * 6]
    filler = negatives.NgramFiller([words(text) for text in seen])
    # both: red 2*2/18, big 1*1/11 (without the 10: 4/8, 1/1)
    # one neighbour: old 1*.5/11 and tiny .5*1/11, in word order
    ranked = [("red", 4 / 18), ("big", 1 / 11), ("old", 0.5 / 11), ("tiny", 0.5 / 11)]
    (found,) = filler([(words("a/DT red/ADJ cat/NN"), 1)])
    assert [*found.items()] == ranked
    assert filler([(words("a/DT red/NN cat/NN"), 1)]) == [{}]  # another tag: nothing known
    two = negatives.NgramFiller([words(text) for text in seen], candidates=2)
    assert [*two([(words("a/DT red/ADJ cat/NN"), 1)])[0].items()] == ranked[:2]
    # big 3*1/13 is before red 2*2/18, which is seen more often but everywhere
    more = negatives.NgramFiller([words(text) for text in seen + ["a/DT big/ADJ dog/NN"] * 2])
    assert list(more([(words("a/DT red/ADJ cat/NN"), 1)])[0])[:2] == ["big", "red"]


def test_masked_lm_proposes_whole_words_and_does_not_depend_on_the_batch(tiny_roberta):
    captions = ["a/DT red/ADJ cat/NOUN", "a/DT dog/NOUN sees/VERB a/DT blue/ADJ cat/NOUN"]
    requests = [(words(captions[0]), 1), (words(captions[1]), 2)]
    filler = negatives.MaskedLMFiller(str(tiny_roberta))
    together = filler(requests)
    assert all(set(p) == {"a", "red", "blue", "cat", "dog", "sees"} for p in together)
    for request, of_batch in zip(requests, together):
        (alone,) = filler([request])
        assert list(alone) == list(of_batch)
        assert alone == pytest.approx(of_batch, rel=1e-4)
        assert sum(alone.values()) == pytest.approx(1)  # six words, and all are proposed
    # the ranking is that of the model without our hook
    model = RobertaForMaskedLM.from_pretrained(tiny_roberta)
    assert list(together[0]) == best_without_hook(model, filler)
    two = negatives.MaskedLMFiller(str(tiny_roberta), candidates=2)
    assert list(two(requests)[0]) == list(together[0])[:2]


def best_without_hook(model, filler) -> list[str]:
    """All the filler's words for "a <mask> cat", by the model's logits at the mask."""
    inputs = filler.tokenizer("a <mask> cat", return_tensors="pt")
    logits = model(input_ids=inputs["input_ids"]).logits[0]
    at = (inputs["input_ids"][0] == filler.tokenizer.mask_token_id).nonzero().item()
    order = logits[at].argsort(descending=True).tolist()
    return [filler.words[number] for number in order if number in filler.words]


def test_masked_lm_sees_every_batch(tiny_roberta, monkeypatch):
    filler = negatives.MaskedLMFiller(str(tiny_roberta))
    texts = ["a/D red/ADJ cat/N", "a/D red/ADJ cat/N sees/V", "a/D dog/N", "a/D dog/N sees/V a/D"]
    requests = [(words(text), i) for text in texts for i in (0, 1)]
    whole = filler(requests)
    monkeypatch.setattr(negatives, "MASKS", 3)
    assert [list(proposed) for proposed in filler(requests)] == [list(p) for p in whole]
    assert filler([]) == []


def test_masked_lm_gives_up_where_the_mask_is_cut_off(tiny_roberta):
    filler = negatives.MaskedLMFiller(str(tiny_roberta))
    long = words(" ".join(["a/DET"] * 60))
    filled = filler([(long, 2), (long, 59), (words("a/DET cat/NOUN"), 1)])
    assert filled[0] and filled[2]
    assert filled[1] == {}


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "electra", "deberta-v2"])
def test_masked_lm_of_other_architectures(tmp_path, tiny_roberta, name):
    """Every head sees only the masked positions and gives the logits it would have given there."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 16, "embedding_size": 16, "dim": 16, "n_layers": 1, "n_heads": 2}
    config = AutoConfig.for_model(name, vocab_size=15, max_position_embeddings=40, **size)
    model = AutoModelForMaskedLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(tiny_roberta).save_pretrained(tmp_path)
    filler = negatives.MaskedLMFiller(str(tmp_path))
    (found,) = filler([(words("a/D red/ADJ cat/N"), 1)])
    assert list(found) == best_without_hook(model, filler)


def test_an_unknown_masked_lm_is_one_line(tmp_path):
    with pytest.raises(
        BadInput, match="nothing is not here .negatives.py --filler FOLDER or ngram"
    ):
        negatives.MaskedLMFiller(str(tmp_path / "nothing"))


# ---- Files and the command -----------------------------------------------------------------------

CAPTIONS = {
    "a.jpg": ["A black dog chases a red ball .", "A dog runs after the ball on wet grass ."],
    "b.jpg": ["Two small girls are eating pizza in a kitchen", "  girls \t eating\nlunch  "],
    "c.jpg": ["A red bus drives down a busy street .", "snow", "A white cat sleeps on a sofa ."],
}


def run(*args):
    """negatives.py with these arguments, in this process: (exit code, what it said)."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["negatives.py", *map(str, args)])
        patch.setattr(sys, "stdout", said)
        patch.setattr(sys, "stderr", said)
        try:
            negatives.run(negatives.main)
        except SystemExit as e:
            return (1, e.code) if isinstance(e.code, str) else (e.code, said.getvalue())
    return 0, said.getvalue()


@pytest.mark.parametrize("filler", ["ngram", None])
def test_command_end_to_end(tmp_path, tiny_roberta, filler):
    source, out = coco_captions(tmp_path / "captions.json", CAPTIONS), tmp_path / "out.jsonl"
    options = ["--filler", filler or tiny_roberta, "--captions", source, "--out", out]
    code, said = run(*options)
    assert code == 0, said
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(r) for r in records] == [{"id", "image", "caption", *KINDS, "missing"}] * 7
    assert records[3]["caption"] == "girls eating lunch"
    assert records[5]["missing"]["relation"] == NONE
    for r in records:
        assert {kind for kind in KINDS if r[kind] is None} == set(r["missing"])
        for kind in {*KINDS} - {"relation", *r["missing"]}:  # one word, and an article, differ
            pairs = zip(r["caption"].lower().split(), r[kind].lower().split(), strict=True)
            changed = [pair for pair in pairs if pair[0] != pair[1]]
            assert len([pair for pair in changed if not {*pair} <= {"a", "an"}]) == 1
    made = sum(r["relation"] is not None for r in records)
    assert made > 0
    assert f"{made:8} relation: made\n" in said
    exists = f"negatives.py: error: {out} exists: give another --out, or delete it"
    assert run(*options) == (1, exists)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.json", "out.jsonl"]


def test_choices_depend_on_the_caption_id_alone(tagger):
    text = "A red bus and a white truck pass an old train ."
    captions = [{"id": i, "image": f"{i}.jpg", "caption": text} for i in range(40)]
    filler = propose("green", "yellow", "sleep", "tree", "house", "elderly", "young")
    whole = negatives.make_negatives(captions, filler, tagger)
    assert negatives.make_negatives(captions[7:9], filler, tagger) == whole[7:9]
    assert len({r["relation"] for r in whole}) > 1  # the seed does vary the choice
    assert negatives.make_negatives(captions, filler, tagger, seed=1) != whole


def test_other_captions_of_the_picture_are_true(tagger):
    texts = ["A horse throws a ball .", "A pony and a dog ."]
    records = make(tagger, texts, propose("ponies", "dogs", "balls", "puppy", "animal"))
    assert all(r["object"] is None for r in records)
    records = make(tagger, texts[:1], propose("dog"))
    assert "dog" in records[0]["object"]
    records = make(tagger, ["a red dog sees a cat", "A red cat sees a dog"], propose())
    assert [r["relation"] for r in records] == [None, None]


ODD = {
    "names": "Barack Obama greets Angela Merkel in Paris",
    "contractions": "The man's dog isn't chasing the girls' ball, it's eating",
    "emoji": "A dog 🐶 chases a red ball ⚽️ in the park 👨‍👩‍👧",
    "not English": "一只狗在草地上 追逐 ein kleiner Hund jagt den Ball \u202e مرحبا",
    "long": " ".join(["a red dog chases a cat past a tree"] * 40),
    "empty": "",
    "white": " \t\n ",
    "one letter": "a",
    "tabs": "A\tdog\nchases\r\na \u2028 red \x85 ball",
    "mask": "A <mask> dog chases a [MASK] ball <s>",
    "surrogate": "A dog \ud83d chases a cat",
    "capitals": "A BLACK DOG CHASES A RED BALL",
}


@pytest.mark.parametrize("filler", ["ngram", None])
def test_odd_captions(tmp_path, tiny_roberta, filler):
    source = coco_captions(tmp_path / "c.json", {f"{name}.jpg": [ODD[name]] for name in ODD})
    out = negatives.generate(source, tmp_path / "o.jsonl", filler or str(tiny_roberta))
    lines = out.read_bytes().decode("ascii").split("\n")
    assert lines.pop() == ""
    records = {Path(r["image"]).stem: r for r in map(json.loads, lines)}
    assert list(records) == list(ODD)
    for name, r in records.items():
        folded = " ".join(ODD[name].split()).replace("\ud83d", "?")
        assert r["caption"] == folded
        for kind in {*KINDS} - {*r["missing"]}:
            assert r[kind] != r["caption"]
            assert r[kind] == " ".join(r[kind].split())
    for name in ("empty", "white", "one letter"):
        assert set(records[name]["missing"]) == set(KINDS)
    assert records["tabs"]["relation"] == "A ball chases a red dog"
    assert records["names"]["relation"] is not None
    assert sorted(records["capitals"]["relation"]) == sorted(ODD["capitals"])
    assert sorted(records["contractions"]["relation"]) == sorted(ODD["contractions"])


# ---- Other inputs --------------------------------------------------------------------------------


ONE = {"id": 0, "image": "a.jpg", "caption": "A dog, 'wet'"}  # below: &#39; is HTML for '
TWO = [ONE, {"id": 1, "image": "b.jpg", "caption": "two lines"}]
URLS = [
    {"id": 0, "image": "http://a/b.jpg", "caption": 'A "dog", wet, red'},
    {"id": 1, "image": "https://c", "caption": '"x'},
]
LIST = [{"image": "a.jpg", "caption": ["A dog, 'wet'"]}, {"image": "b.jpg", "caption": "two lines"}]
IMAGES = [
    {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A dog, 'wet'", "sentid": 9}]},
    {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "two lines", "tokens": []}]},
]
REGION = {"region_id": 7, "image_id": 3, "phrase": "the  clock", "x": 10, "y": 20}
REGIONS = [{"regions": [REGION | {"width": 30, "height": 0}]}, {"id": 4, "regions": []}]


@pytest.mark.parametrize(
    ("name", "content", "records"),
    [
        ("open_clip.csv", 'filepath,title\na.jpg,"A dog, \'wet\'"\nb.jpg,"two\nlines"\n', TWO),
        ("c.tsv", "\ufeffcaption\turl\nA dog, 'wet'\ta.jpg\r\n\r\ntwo lines\tb.jpg\r\n", TWO),
        ("tab.csv", 'image,caption\na.jpg,"A\tdog, &#39;wet\'"\n', [ONE]),
        ("negclip.tsv", "\ttitle\tfilepath\tneg\n0\tA dog, 'wet'\ta.jpg\t['x']\n", [ONE]),
        ("karpathy.json", " " + json.dumps(LIST, indent=2), TWO),
        ("dataset_flickr30k.json", json.dumps({"images": IMAGES, "dataset": "flickr30k"}), TWO),
        (
            "dataset_coco.json",
            json.dumps({"images": [IMAGES[0] | {"filepath": "val2014", "cocoid": 3}]}),
            [ONE | {"image": "val2014/a.jpg"}],
        ),
        (
            "ours.jsonl",
            json.dumps(ONE | {"id": 7, "box": [1, 2, 3, 4], "relation": "x", "missing": {}}) + "\n",
            [ONE | {"box": [1, 2, 3, 4]}],
        ),
        (
            "metadata.jsonl",  # of an image folder for datasets
            '\ufeff{"file_name": "a.jpg", "text": "A dog, \'wet\'"}\n \n'
            '{"file_name": "b.jpg", "text": "two lines"}',
            TWO,
        ),
        ("spaces.csv", "image , caption\na.jpg, \"A dog, 'wet'\"\n", [ONE]),
        ("semicolons.csv", "image;caption\na.jpg;A dog, 'wet'\n", [ONE]),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| A dog, 'wet'\n", [ONE]),
        ("empty.csv", "image,filepath,caption,title\n,a.jpg,,\"A dog, 'wet'\"\n", [ONE]),
        ("more.csv", "image,caption,see http://x\na.jpg,\"A dog, 'wet'\",y\n", [ONE]),
        ("tabs.csv", "filepath\ttitle\na.jpg\tA dog, 'wet'\n", [ONE]),
        ("cc3m.tsv", 'A "dog", wet, red\thttp://a/b.jpg\n"x\thttps://c\n', URLS),
        ("cc12m.tsv", 'http://a/b.jpg\tA "dog", wet, red\nhttps://c\t"x\n', URLS),
        (
            "region_descriptions.json",
            json.dumps(REGIONS),
            [{"id": 7, "image": "3.jpg", "caption": "the clock", "box": [10, 20, 40, 21]}],
        ),
    ],
)
def test_captions_files(tmp_path, name, content, records):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert negatives.read_captions(tmp_path / name) == records


def test_captions_of_a_picture_of_coco_stand_together(tmp_path):
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}]
    entries = [{"id": i, "image_id": 7 + i % 2, "caption": f"dog {i}"} for i in range(4)]
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"images": images, "annotations": entries}))
    found = [(r["image"], r["id"]) for r in negatives.read_captions(path)]
    assert found == [("a.jpg", 0), ("a.jpg", 2), ("b.jpg", 1), ("b.jpg", 3)]


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    options = ["--captions", str(tmp_path / "none.json"), "--out", str(tmp_path / "o")]
    for more, error in ([], SystemExit), (["--debug"], BadInput):
        monkeypatch.setattr(sys, "argv", ["negatives.py", *options, *more])
        with pytest.raises(error, match="none.json: No such file or directory"):
            negatives.run(negatives.main)


def test_loggers_of_libraries_are_quiet(monkeypatch, caplog):
    logging.disable(logging.NOTSET)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    negatives.run(lambda: logging.warning("No pretrained weights loaded"))
    assert caplog.text == ""


def test_what_to_do_when_shared_memory_is_exhausted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    error = RuntimeError("DataLoader worker is killed: it might be out of shared memory.")
    with pytest.raises(SystemExit, match="--workers 0 needs none; docker run --shm-size gives"):
        negatives.run(Mock(side_effect=error))


def test_a_list_of_captions_and_a_box_go_into_the_output(tmp_path):
    (path := tmp_path / "c.json").write_text(json.dumps([{**LIST[0], "caption": ["one", "two"]}]))
    assert [r["caption"] for r in negatives.read_captions(path)] == ["one", "two"]
    path.write_text(json.dumps(REGIONS))
    out = negatives.generate(path, tmp_path / "o.jsonl", "ngram")
    assert json.loads(out.read_text())["box"] == [10, 20, 40, 21]


def test_splits_of_karpathy(tmp_path):
    (path := tmp_path / "dataset_coco.json").write_text(json.dumps({"images": IMAGES}))
    assert negatives.read_captions(path, ["test", "val"]) == TWO[1:]
    assert negatives.read_captions(path, ["test", "train"]) == TWO
    listed = [entry | {"split": split} for entry, split in zip(LIST, ("train", "test"))]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    assert negatives.read_captions(tmp_path / "list.json", ["test"]) == TWO[1:]
    table = "image,caption,split\na.jpg,a dog,train\nb.jpg,two lines,test\n"
    (tmp_path / "table.csv").write_text(table)
    assert negatives.read_captions(tmp_path / "table.csv", ["test"]) == TWO[1:]
    for other, content in ((path, {"images": IMAGES}), (tmp_path / "c.json", LIST)):
        other.write_text(json.dumps(content))
        with pytest.raises(BadInput, match="holds no captions of split restval or val: docs/data"):
            negatives.read_captions(other, ["restval", "val"])
    code, said = run(
        "--captions", path, "--split", "train", "--out", tmp_path / "o", "--filler", "ngram"
    )
    assert code == 0, said
    assert [json.loads(line)["image"] for line in (tmp_path / "o").open()] == ["a.jpg"]


def test_a_folder_as_img2dataset_leaves_it(tmp_path, capsys):
    names = {"1/7.JPG": "a dog", "0/3.jpeg": "a  cat\n", "0/2.png": "a bus", "0/4.webp": "a tree"}
    for name, text in (names | {"0/._3.jpg": "\0", "0/5.gif": "a film"}).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        path.with_suffix(".txt").write_text(text)
    (tmp_path / "0" / "6.jpg").touch()
    found = [(r["id"], r["image"], r["caption"]) for r in negatives.read_captions(tmp_path)]
    expected = [("0/2.png", "a bus"), ("0/3.jpeg", "a cat"), ("0/4.webp", "a tree")]
    expected.append(("1/7.JPG", "a dog"))
    assert found == [(n, *pair) for n, pair in enumerate(expected)]
    said = capsys.readouterr().out
    assert f"warning: 1 pictures without a .txt in {tmp_path} are left out" in said
    (tmp_path / "2").mkdir()
    with pytest.raises(BadInput, match="2 holds no captions: docs/data.md says"):
        negatives.read_captions(tmp_path / "2")


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("coco/annotations/captions_val2017.json", 25_014),
        ("coco/annotations/coco_karpathy_test.json", 25_010),
        ("negclip/valid_neg_clip.tsv", 4_839),
    ],
)
def test_real_files(name, count):
    assert len(negatives.read_captions(SHARED / name)) == count


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", None, "c.json: No such file"),
        ("c.json", "", "is not a captions file .*: JSONDecodeError"),
        ("c.json", '{"images": []}', "holds no captions"),
        ("c.json", '{"images": [{"id": 3}]}', "is not a captions file .*: KeyError 'filename'"),
        (
            "c.jsonl",
            '{"image": "a", "caption": "a"}\n{',
            "is not a captions file .*: JSONDecodeError",
        ),
        ("c.json", '{"images": [], "annotations": []}', "holds no captions"),
        (
            "c.json",
            '[{"image": "a", "caption": "a"}, {"caption": "b"}]',
            "is not a captions file .*: none of image, .* is among caption$",
        ),
        ("c.json", '[{"image": "a.jpg", "caption": [1]}]', "is not a captions file .*: TypeError"),
        ("c.json", '[{"regions": [{"phrase": "a"}]}]', "is not a captions file .*: KeyError 'x'"),
        ("c.json", b"\xff\xfe\x00", "is not a captions file .*: UnicodeDecodeError"),
        (
            "c.csv",
            "caption,file\na,b\n",
            "is not a captions file .*: none of image, filepath, file_name, image_name, url is "
            "among caption, file$",
        ),
        ("c.csv", "image,caption\na,b\nc\n", "line 3: too many or few fields"),
        ("c.csv", "caption,image\na,b,c\n", "line 2: too many or few fields"),
        ("c.csv", "caption,url\n", "holds no captions"),
        ("c.csv", 'image|comment\na|"b\nc|d"\n', "line 3: .* or a quote"),
        ("c.tsv", 'caption\turl\n"a dog\tu1\na cat"\tu2\n', "line 3: .* or a quote"),
    ],
)
def test_bad_captions_files_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message) as e:
        negatives.read_captions(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


# ---- Shares, interruptions, a full disk ----------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A captions file of 12 chunks of 50 captions, and its negatives made in one go."""
    folder = tmp_path_factory.mktemp("many")
    rng = random.Random(0)
    captions = defaultdict(list)
    for i in range(600):
        first, second, third = rng.sample("dog cat man boat tree bus".split(), 3)
        color = rng.choice(["red", "black", "tall", "old"])
        captions[f"{i // 5}.jpg"].append(f"A {color} {first} chases a {second} and a {third} {i} .")
    source = coco_captions(folder / "captions.json", captions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "CHUNK", 50)
        whole = negatives.generate(source, folder / "whole.jsonl", "ngram").read_bytes()
    return source, whole


@pytest.fixture
def small(monkeypatch, tagger):
    """In this process, too, a chunk is 50 captions; the tagger is loaded once."""
    monkeypatch.setattr(negatives, "CHUNK", 50)
    monkeypatch.setattr(negatives, "Tagger", lambda: tagger)


SMALL = """
import resource, sys, time, negatives
def slowly(*args, make=negatives.make_negatives):
    time.sleep(0.1)
    return make(*args)
negatives.CHUNK, negatives.make_negatives = 50, slowly
largest = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
negatives.run(negatives.main)
"""


def start(source: Path, out: Path, largest: int = 10**9) -> subprocess.Popen:
    """negatives.py in another process, in chunks of 50; its files grow to `largest` bytes."""
    options = ["--captions", source, "--out", out, "--filler", "ngram", str(largest)]
    return subprocess.Popen(
        [sys.executable, "-c", SMALL, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


@pytest.mark.parametrize("n", [1, 5, 13])  # 13 shares of 12 chunks: one is empty
def test_shares_in_order_are_the_whole(many, small, tmp_path, n):
    source, whole = many
    options = ["--captions", source, "--out", tmp_path / "o.jsonl", "--filler", "ngram"]
    for i in range(1, n + 1):
        assert run(*options, "--shard", f"{i}/{n}")[0] == 0
    shares = sorted(tmp_path.iterdir())
    assert [path.name for path in shares[1:]] == [
        f"o.jsonl.{i:05d}-of-{n:05d}" for i in range(2, n + 1)
    ]
    assert b"".join(path.read_bytes() for path in shares) == whole


def test_killed_at_random_points_it_goes_on_and_ends_the_same(many, small, tmp_path):
    source, whole = many
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    rng = random.Random(1)
    reached = [0]
    for _ in range(3):
        process = start(source, out)
        while process.poll() is None and len([*part.glob("*.jsonl")]) <= reached[-1]:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.communicate()
        assert not out.exists()
        reached.append(len([*part.glob("*.jsonl")]))
    assert reached == sorted({*reached, 0})  # each run went further than the one before
    assert reached[-1] < 12
    negatives.generate(source, out, "ngram")
    assert out.read_bytes() == whole
    assert not part.exists()


@pytest.fixture(scope="module")
def finished(many, tmp_path_factory):
    """The chunks of a run for whose OUT the disk was too full: one line, and no short file."""
    out = tmp_path_factory.mktemp("full") / "out.jsonl"
    process = start(many[0], out, largest=60_000)
    said = process.communicate()[1].decode()
    assert process.returncode == 1
    assert (
        said.splitlines()[-1] == f"-c: error: {next(out.parent.rglob('*-whole'))}: File too large"
    )
    assert "Traceback" not in said
    assert not out.exists()
    return Path(f"{out}.part")


DAMAGE = {
    "changed": lambda lines: [*lines[:-1], lines[-1].replace(" chases ", " chased ")],
    "lost": lambda lines: lines[:-1],
    "doubled": lambda lines: [*lines, lines[-1]],
    "torn": lambda lines: [*lines[:-1], lines[-1][:-9]],
    "not text": lambda lines: ["\udcff\n"],
}


def test_only_a_damaged_or_absent_chunk_is_made_again(many, small, finished, tmp_path, monkeypatch):
    source, whole = many
    part = shutil.copytree(finished, tmp_path / "out.jsonl.part")
    paths = sorted(part.glob("*.jsonl"))
    assert len(paths) == 12
    for path, damage in zip(paths, DAMAGE.values()):
        lines = damage(path.read_text().splitlines(keepends=True))
        path.write_text("".join(lines), errors="surrogateescape")
    paths[9].unlink()
    made = []

    def counting(captions, *args, make=negatives.make_negatives):
        made.append((captions[0]["id"] - 10) // 50)
        return make(captions, *args)

    monkeypatch.setattr(negatives, "make_negatives", counting)
    out = negatives.generate(source, tmp_path / "out.jsonl", "ngram")
    assert made == [*range(len(DAMAGE)), 9]
    assert out.read_bytes() == whole


def test_chunks_of_other_settings_are_refused(many, finished, tmp_path, monkeypatch):
    part = shutil.copytree(finished, tmp_path / "out.jsonl.part")
    before = sorted(part.iterdir())
    other = coco_captions(tmp_path / "other.json", CAPTIONS)
    changes = [{"seed": 1}, {"filler": "x"}, {"captions": other}, {"candidates": 2}, {}]
    for change in changes:
        if not change:
            monkeypatch.setitem(KINDS, "manner", "ADV")
        settings = {"captions": many[0], "out": tmp_path / "out.jsonl", "filler": "ngram"}
        with pytest.raises(BadInput, match="begun with other settings or captions: delete it"):
            negatives.generate(**settings | change)
        assert sorted(part.iterdir()) == before


@pytest.mark.parametrize("filler", ["ngram", None])
def test_the_number_of_candidates_is_taken(many, tiny_roberta, tmp_path, filler):
    made = []
    for candidates in (1, 50):
        out = tmp_path / f"{candidates}.jsonl"
        options = ["--filler", filler or tiny_roberta, "--candidates", candidates]
        code, said = run("--captions", many[0], "--out", out, *options)
        assert code == 0, said
        records = [json.loads(line) for line in out.read_text().splitlines()]
        made.append(sum(record["object"] is not None for record in records))
    assert made[0] < made[1]
    code, said = run("--captions", many[0], "--out", tmp_path / "o", "--candidates", 0)
    assert (code, said.splitlines()[-1]) == (
        2,
        "negatives.py: error: argument --candidates: 0 is not a number from 1 on",
    )


def test_bad_shards(tmp_path):
    for shard in ("3", "0/2", "3/2", "a/b"):
        code, said = run("--captions", "x", "--out", tmp_path / "o", "--shard", shard)
        assert code == 1
        assert f"--shard {shard}: it is I/N with I from 1 to N" in said
