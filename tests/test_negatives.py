"""negatives.py and english.py: swaps, masks, fills, what must not be made, fillers, the command."""

import json
import random
import resource
import sys
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import coco_captions
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

import english
import files
import negatives
from negatives import KINDS, MASKED_KINDS

TAGGER = english.Tagger()
NO_SWAP = "no swap of two nouns passes the rules"
NO_WORD = "no word for the mask passes the rules"


def tag(text: str) -> list[english.Word]:
    return next(TAGGER.words([text]))


def text_with(ws: list[english.Word], position: int, new: str) -> str:
    return english.text_of([*ws[:position], ws[position]._replace(text=new), *ws[position + 1 :]])


def swaps(text: str, captions=(), strict=False) -> set[str]:
    return {swap.caption for swap in negatives.noun_swaps(tag(text), {*captions}, random, strict)}


def test_noun_swaps():
    cases = {
        "A teddy bear on the bed.": {"A bed on the teddy bear."},
        # the authors' str.replace makes "a pancakecake under a pancake" of this caption
        "a pan under a pancake": {"a pancake under a pan"},
        # a capital stays at the start of the sentence, and with a name
        "Dogs chase some owls": {"Owls chase some dogs"},
        "Rex chases the dog.": {"The dog chases Rex."},
        "a man sees a man": set(),  # a swap must not say the same
        "a man sees a person": set(),
        "ham, eggs or bread": set(),
        "a cat next to his dog": set(),
        "Boys ride horses and mules": {"Mules ride horses and boys", "Horses ride boys and mules"},
        # a modifier stays in place, and makes the swap false
        "a red cat and a dog": {"a red dog and a cat"},
        "a smiling cat with a dog": {"a smiling dog with a cat"},
        # if the units differ in number it moves along
        "a cat by two dogs": set(),
        "Some fish under a dog": {"A dog under some fish"},
        "One dog sees a cat": {"One cat sees a dog"},
        "A man holding bags": {"Bags holding a man"},
        "A couple of birds cross an old street.": {"An old street cross a couple of birds."},
        "Two black and white dogs chase a car.": {"A car chase two black and white dogs."},
        "A man carries his two bags.": {"His two bags carries a man."},
        "They give him two kites in a park.": {"They give him a park in two kites."},
        "Men, each wearing a hat, walk.": {"A hat, each wearing men, walk."},
        "A sign which shows dogs": {"Dogs which shows a sign"},
        "A car gets red and two dogs.": {"Two dogs gets red and a car."},
    }
    for text, expected in cases.items():
        assert swaps(text) == expected, text


def test_swaps_of_one_number_and_sort_come_first():
    cases = [
        # one number first: not "Two frisbee ... a dogs"
        ("Two dogs chase a frisbee past some cats.", "Two cats chase a frisbee past some dogs.", 2),
        # then one sort: not "A suitcase is carrying a man"
        ("A man carries a suitcase to a woman.", "A woman carries a suitcase to a man.", 2),
        # "water", which has no article, is of no number
        ("A boat on water near a bus.", "A bus on water near a boat.", 1),
    ]
    for text, best, others in cases:
        assert swaps(text) == swaps(text, strict=True) == {best}
        # if that one is a caption of the image, others are still there
        assert len(swaps(text, {best.lower()}) - {best}) == others
        assert not swaps(text, {best.lower()}, strict=True)
    assert swaps("A man holds two fish near a cat.") == {"A cat holds two fish near a man."}


def test_what_moves_as_one():
    cases = {
        "A man eats a plate of hot food.": ["man", "plate of hot food"],
        "Men in front of a house and a group of dogs": ["Men", "house", "dogs"],
        "A polar bear, a hot dog": [],  # half of a fixed phrase does not move
        "A cross-country skier and a tug-of-war toy": ["skier", "tug-of-war toy"],
    }
    for text, expected in cases.items():
        ws = tag(text)
        assert english.text_of(ws) == text
        assert [english.text_of(ws[i:j]).strip() for i, j in english.noun_units(ws)] == expected


def test_choose_masked_word():
    cases = [
        ("object", "A dog sees a cat", {"A _ sees a cat", "A dog sees a _"}),
        ("object", "A teddy bear and a dog", {"A teddy bear and a _"}),  # a word alone comes first
        ("object", "A clock tower", {"A _"}),  # else the compound as one word, not "clock _"
        ("object", "A bottle of beer near a dog", {"A bottle of beer near a _"}),
        ("attribute", "A snow-covered house", set()),
        ("attribute", "A wonderful small house", {"A wonderful _ house"}),  # a word of CONTRAST
        ("attribute", "A black and white hot dog", set()),
        ("action", "A man is sitting and not eating", {"A man is _ and not eating"}),
        ("object", "There is no dog near the tree", set()),  # it is false already
        ("object", "A dog without a hat", {"A _ without a hat"}),
    ]
    for kind, text, expected in cases:
        chosen = [negatives.choose_masked_word(tag(text), kind, random) for _ in range(20)]
        assert {text_with(*masked, "_") for masked in chosen if masked} == expected


def test_what_is_not_masked():
    cases = [
        ("object", "A woman and her dog", {"A woman and her _"}),  # "her" tells it
        ("object", "A person eats food on a bench", {"A person eats food on a _"}),
        ("object", "Red clothes", set()),
        ("attribute", "Green grass and a green hat", {"Green grass and a _ hat"}),
        (
            "object",
            "An apple and clothes hang on a tree",
            {"An _ and clothes hang on a tree", "An apple and clothes hang on a _"},
        ),
        ("action", "A vase sits on a table", set()),  # it also stands there
        ("action", "People sit on a bench", {"People _ on a bench"}),
        ("action", "A parked car", set()),
        ("action", "A woman pets a cat", {"A woman _ a cat"}),
        ("number", "Two zebras graze with a fence in between", {"Two"}),
        ("action", "A man who sits sees a parked car", {"A man who _ sees a parked car"}),
        ("number", "Cars between two dogs eat two pieces of cake with three cats", {"three"}),
        ("number", "One dog eats at 4:21 in 1929 beside 12 cats", set()),
    ]
    for kind, text, expected in cases:
        chosen = [negatives.choose_masked_word(tag(text), kind, random) for _ in range(20)]
        if kind == "number":
            assert {masked[0][masked[1]].text for masked in chosen if masked} == expected
        else:
            assert {text_with(*masked, "_") for masked in chosen if masked} == expected


def test_sorts_and_synonyms():
    def compatible(a, b):
        return b in english.may_also_be(a)

    assert compatible("donut", "doughnut") and compatible("batter", "player")
    assert not compatible("tennis", "baseball") and not compatible("throw", "hold")
    assert not compatible("cook", "man")
    assert "ride" in TAGGER.lemmas("riding") and tag("He is riding")[2].lemma == "ride"
    assert (
        english.groups_of(TAGGER.lemmas("water"), "object")
        == english.groups_of(TAGGER.lemmas("snow"), "object")
        != english.groups_of(TAGGER.lemmas("lake"), "object")
    )
    for group in english.SYNONYMS:
        assert len(set(group)) == len(group) > 1
    assert {"man", "person"} <= english.may_also_be("surfer")
    assert "woman" not in english.may_also_be("person") and "woman" in english.may_also_be("crowd")
    for sort, words in english.SORTS.items():  # a lemma of a sort, in lower case, can be filled in
        assert all(word.isalpha() and word.islower() for word in words), sort
    known = [word for group in english.SYNONYMS for word in group if not word.isdigit()]
    assert all(word.isalpha() and word.islower() for word in known)
    assert english.GENERAL.isdisjoint({"man", "dog", "pizza"}) and "food" in english.GENERAL


def test_fill():
    cases = [
        *[("An owl", 1, word, f"A {word}") for word in "unicycle man utensil ewe one".split()],
        *[("a dog", 1, word, f"an {word}") for word in "owl hour umbrella onion unidle".split()],
        ("a orange", 1, "apple", "a apple"),  # it did not agree before: left alone
        ("Black cat by a black door", 0, "red", "Red cat by a black door"),
        ("BLACK dog", 0, "white", "WHITE dog"),
        ("SEE A DOG", 2, "owl", "SEE AN OWL"),
    ]
    for text, position, new, filled in cases:
        assert negatives.fill(tag(text), position, new) == filled


def test_tagger():
    ws = tag("A play about flies ended late; the old man can fish near the duck pond, they said.")
    assert TAGGER.tags([(ws, i, word.text) for i, word in enumerate(ws)]) == [w.tag for w in ws]
    assert TAGGER.tags([(ws, 1, "quickly"), (ws, 1, "dogs")]) == ["RB", "NNS"]
    for word, lemma in ("Stands", "stand"), ("running", "run"), ("bigger", "big"):
        assert {word.lower(), lemma} <= TAGGER.lemmas(word)
    english = ["Barack Obama", "A café 🐶", "", "Barack Obama greets Angela Merkel in Paris"]
    english += ["A man in the fog", "bent knee", "No parking", "A man walks in a street"]
    english += ["Zinédine Zidane kicks a ball", "“Dog” – “cat” 🐶🐶🐶"]
    english.append("Barack Hussein Obama")
    for text in english:
        assert TAGGER.is_english(tag(text)), text
    foreign = ["ein kleiner Hund jagt den Ball", "un chien dans le parc"]
    foreign.append("一只狗在草地上 追逐")
    foreign += ["собака", "Žlutá kočka spí", "küçük köpek koşuyor"]
    foreign.append("Ein Mann sitzt in der Küche auf einem Stuhl")
    foreign += ["un hombre con una camisa azul", "um homem na praia", "due cani su una spiaggia"]
    foreign += ["een vrouw zit op een stoel", "en hund i snön", "dwa psy na plaży"]
    foreign += ["parkta kırmızı bir araba"]
    for text in foreign:
        assert not TAGGER.is_english(tag(text)), text


def propose(*candidates):
    weights = {word: 1 / n for n, word in enumerate(candidates, 1)}
    return lambda requests: [weights] * len(requests)  # a filler


def make(texts, filler, image="a.jpg", **options):
    captions = [{"id": i, "image": image, "caption": text} for i, text in enumerate(texts)]
    return negatives.make_negatives(captions, filler, TAGGER, **options)


def test_fills_that_may_be_true_are_rejected():
    cases = [
        # the masked word's own forms, not words, too vague ones, another part of speech
        ("object", "a dog", "Dog dogs x-ray q 3 ##s thing slowly", "cat"),
        ("object", "The man eats", "person guy boy surfer", "woman"),
        ("object", "The surfer eats", "man woman person", "driver"),
        ("object", "Two dogs eat", "cat horse", "cats"),  # another number
        # what is not of the same group may be true as well
        ("attribute", "a brown dog", "large wet brown", "white"),
        ("action", "a dog standing", "looking barking stands", "sleeping"),
    ]
    for kind, text, bad, good in cases:
        (record,) = make([text], propose(*bad.split()))
        assert (record[kind], record["missing"][kind]) == (None, NO_WORD)
        (record,) = make([text], propose(*bad.split(), good))
        assert good in record[kind].split()


def test_acceptable_words():
    # objects are of the same sort
    proposed = {"dog": 5, "lady": 4, "boy": 3, "Boy": 2, "table": 1, "man": 1}
    passed = negatives.acceptable(proposed, "woman", "object", {"woman", "lady"}, TAGGER)
    assert passed == {"boy": 5, "man": 1}
    # what other captions of the image say is true
    texts = ["A horse throws a ball .", "A pony and a dog ."]
    records = make(texts, propose("ponies", "dogs", "balls", "puppy", "animal"))
    assert [r["object"] for r in records] == [None, None]
    assert "dog" in make(texts[:1], propose("dog"))[0]["object"]
    assert make(["a cat", "Hot Dogs Inc"], propose("dog"))[0]["object"] is None
    records = make(["a red dog sees a cat", "A red cat sees a dog"], propose())
    assert [r["missing"]["relation"] for r in records] == [NO_SWAP, NO_SWAP]
    # numbers are two to ten, and in no caption
    texts = ["Two dogs run past 3 men.", "One dog and a cat on track number 12", "Four cats"]
    made = defaultdict(set)
    for record in make(texts * 40, propose("many", "three", "big", "twenty")):
        made[record["caption"]].add(record["number"])
    assert made[texts[1]] == {None}
    assert made["Four cats"] == {f"{n} cats" for n in "Five Six Seven Eight Nine Ten".split()}


def test_fills_are_drawn_with_the_fillers_probability():
    filler = propose("hats", "scarf", "tie", "coats", "shirt")  # those that pass: 1/2, 1/3, 1/5
    records = make(["a hat"] * 660, filler)
    drawn = Counter(record["object"] for record in records)
    for text, expected in ("a scarf", 15 / 31), ("a tie", 10 / 31), ("a shirt", 6 / 31):
        assert abs(drawn.pop(text) / 660 - expected) < 0.06
    assert not drawn
    assert make(["a hat"] * 20, filler) == records[:20]  # drawn by id
    assert make(["a hat"] * 20, filler, seed=1) != records[:20]


def test_a_word_that_the_captions_have_only_with_other_tags_is_not_tried(monkeypatch):
    monkeypatch.setattr(TAGGER, "tags", Mock(wraps=TAGGER.tags))
    captions = [{"id": 0, "image": "0", "caption": "A dog paints a ball"}]
    captions += [{"id": 1, "image": "1", "caption": "Two cats walk on grass"}]
    records = negatives.make_negatives(captions, propose("cats", "sells"), TAGGER)
    assert records[0]["action"] == "A dog sells a ball"
    tried = [filled for call in TAGGER.tags.call_args_list for filled in call.args[0]]
    assert {word for ws, i, word in tried if ws[i].text == "paints"} == {"sells"}


def test_the_most_plausible_swap_is_made():
    """Ratios of weights: box and mat 8/2 * .5/1 = 2, box and hat .2/2 * 10/10 = .1, mat and hat
    .02/1 * 300/10 = .6, where "hat" counts as the last of what is proposed in place of "mat"."""
    places = {
        "a _ on a mat under a hat": {"mat": 8, "box": 2, "hat": 0.2},
        "a box on a _ under a hat": {"mat": 1, "box": 0.5, "tub": 0.02},
        "a box on a mat under a _": {"mat": 300, "box": 10, "hat": 10},
    }

    def filler(requests):
        return [places.get(text_with(*request, "_"), {}) for request in requests]

    text = "a box on a mat under a hat"
    made = [{r["relation"] for r in make([text] * 9, f)} for f in (filler, propose())]
    assert made[0] == {"a mat on a box under a hat"}
    assert len(made[1]) > 1  # without preference it is drawn
    records = make([*[text] * 9, "a mat on a box under a hat"], filler)[:9]
    assert {r["relation"] for r in records} == {"a box on a hat under a mat"}
    places["a _ on a mat under a hat"]["hat"] = 6  # box and hat: 6/2 * 10/10
    assert make([text], filler)[0]["relation"] == "a hat on a mat under a box"
    # of each unit the filler is asked about the main noun
    (swap,) = negatives.noun_swaps(tag("a teddy bear eats a plate of food"), set(), random)
    assert text_with(swap.first.words, swap.first.position, "_") == "a _ eats a plate "
    assert text_with(swap.second.words, swap.second.position, "_") == "a bear eats a _ "


def test_a_long_caption_does_not_ask_for_every_pair_of_its_nouns():
    """It has 3,160 pairs of nouns. A caption of nine nouns has 36, and all are tried."""
    nouns = "key map coin card drum ring comb tape gum nail".split()
    text = " . ".join(f"a {' sees a '.join(nouns)}" for _ in range(8))
    asked = []
    make([text], lambda requests: asked.extend(requests) or [{} for _ in requests])
    assert len(asked) < 100
    assert len(swaps(f"a {' sees a '.join(nouns[:9])}")) == 36


def test_another_masked_kind_is_one_entry(monkeypatch):
    monkeypatch.setitem(MASKED_KINDS, "manner", "ADV")
    monkeypatch.setattr(negatives, "KINDS", ["relation", *MASKED_KINDS])
    records = make(["A dog runs quickly", "a dog eats"], propose("red", "slowly", "two"))
    assert [r["manner"] for r in records] == ["A dog runs slowly", None]
    assert records[1]["missing"]["manner"] == "no adverb to mask"


def words(text: str) -> list[english.Word]:
    pairs = [part.split("/") for part in text.split()]  # of a word and its fine tag
    return [english.Word(word, " ", pos, pos, word.lower()) for word, pos in pairs]


def test_ngram_ranks_by_both_neighbours_first():
    seen = ["A/DT Red/ADJ cat/NN", "a/DT red/ADJ cat/NN", *["the/DT red/ADJ dog/NN"] * 6]
    seen += ["a/DT big/ADJ cat/NN", *["a/DT big/ADJ dog/NN"] * 2, *["a/DT tall/ADJ dog/NN"] * 16]
    seen += ["a/DT old/ADJ dog/NN", "the/DT tiny/ADJ cat/NN"]
    # Seen with both: red 2*2/18 oftener than big 3*1/13, but it is seen everywhere. With one: tall
    # 16*.5/26, old 1*.5/11 and tiny .5*1/11, in word order.
    ranked = [("big", 3 / 13), ("red", 4 / 18), ("tall", 8 / 26), ("old", 0.5 / 11)]
    ranked.append(("tiny", 0.5 / 11))
    for candidates in (2, 5, 6):
        filler = negatives.NgramFiller([words(text) for text in seen], candidates)
        assert list(filler([(words("a/DT red/ADJ cat/NN"), 1)])[0].items()) == ranked[:candidates]
    assert filler([(words("a/DT red/NN cat/NN"), 1)]) == [{}]  # another tag: nothing known


@pytest.mark.parametrize("name", "roberta bert distilbert albert electra deberta-v2".split())
def test_masked_lm_gives_the_models_own_probabilities(tmp_path, tiny_roberta, monkeypatch, name):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "n_layers": 1}
    size |= {"intermediate_size": 16, "embedding_size": 16, "dim": 16, "n_heads": 2}
    config = AutoConfig.for_model(name, vocab_size=15, max_position_embeddings=34, **size)
    model = AutoModelForMaskedLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_roberta)
    tokenizer.save_pretrained(tmp_path)
    whole = "a red blue cat dog sees".split()
    numbers = tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in whole])
    monkeypatch.setattr(negatives, "MASK_BATCH", 2)
    requests = [(tag("a red cat"), 1), (tag("a dog sees a blue cat"), 4), (tag("a dog"), 1)]
    proposals = negatives.MaskedLMFiller(str(tmp_path))(requests)
    for request, proposed in zip(requests, proposals):
        ids = tokenizer(text_with(*request, "<mask>"), return_tensors="pt")["input_ids"]
        logits = model(input_ids=ids).logits[ids == tokenizer.mask_token_id]
        expected = dict(zip(whole, logits[0, numbers].softmax(0).tolist()))
        assert proposed == pytest.approx(expected, rel=1e-4)
        assert list(proposed) == sorted(whole, key=expected.get, reverse=True)
    model.base_model.save_pretrained(tmp_path)  # without its head, which would be random
    with pytest.raises(files.BadInput, match="cannot be used .*: weights are missing: "):
        negatives.MaskedLMFiller(str(tmp_path))
    model.save_pretrained(tmp_path)
    filler = negatives.MaskedLMFiller(str(tmp_path), candidates=2)
    best, cut_off = filler([requests[0], (tag("a " * 60), 59)])
    assert (list(best), cut_off) == (list(proposals[0])[:2], {})


CAPTIONS = {
    "a": ["A black dog chases a red ball .", "A DOG RUNS AFTER A BALL ON WET GRASS"],
    "b": ["Two small girls are eating pizza in a kitchen", "  girls \t eating\nlunch  "],
    "odd": ["The man's dog isn't chasing girls, it's eating", "A <mask> dog's [MASK] 🐶"],
    "long": [" ".join(["a red dog chases a cat past a tree"] * 40)],
    "foreign": ["一只狗在草地上 追逐 ein kleiner Hund jagt den Ball \u202e مرحبا"],
    "nothing": ["", " \t\n ", "a"],
}


def command(*options) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["negatives.py", *map(str, options)])
        negatives.main()
    path = Path(options[options.index("--out") + 1])
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


@pytest.mark.parametrize("filler", ["ngram", "masked LM"])
def test_command_end_to_end(tmp_path, tiny_roberta, capsys, monkeypatch, filler):
    source, out = coco_captions(tmp_path / "captions.json", CAPTIONS), tmp_path / "out.jsonl"
    filler = tiny_roberta if filler == "masked LM" else filler
    monkeypatch.setattr(negatives, "MaskedLMFiller", Mock(wraps=negatives.MaskedLMFiller))
    options = ["--captions", source, "--out", out, "--filler", filler, "--candidates", 5]
    records = command(*options)
    if filler == tiny_roberta:
        negatives.MaskedLMFiller.assert_called_once_with(str(filler), 5)
    for r in records:
        assert list(r) == ["id", "image", "caption", *KINDS, "missing"]
        assert list(r["missing"]) == [kind for kind in KINDS if r[kind] is None]
        for kind in {*MASKED_KINDS} - {*r["missing"]}:
            pairs = zip(r["caption"].split(), r[kind].split(), strict=True)
            assert 1 <= sum(a != b for a, b in pairs) <= 2  # one word, and perhaps its article
        if r["image"] == "foreign":
            assert r["missing"] == dict.fromkeys(KINDS, "not English")
    made = sum(r["relation"] is not None for r in records)
    assert f"{made:8} relation: made\n" in capsys.readouterr().out
    with pytest.raises(files.BadInput, match="out.jsonl exists: give another --out, or delete it"):
        command(*options)


def test_options_are_taken(tmp_path):
    splits = dict.fromkeys(("A man carries two suitcases.", "A woman carries a hat."), "val")
    splits["Dogs"] = "test"
    entries = []
    for text, split in splits.items():
        entries.append({"image": text, "caption": text, "split": split, "box": [0, 0, 9, 9]})
    (source := tmp_path / "captions.json").write_text(json.dumps(entries))
    options = ["--captions", source, "--filler", "ngram", "--split", "val", "--out"]
    records = command(*options, tmp_path / "1", "--seed", 4)
    assert [r["box"] for r in records] == [[0, 0, 9, 9]] * 2
    assert records[0]["relation"] == "Two suitcases carries a man."
    assert records[0]["object"] == "A woman carries two suitcases."
    assert records[1]["object"] is None  # with seed 0 not the hat is masked, but the woman
    records = command(*options, tmp_path / "2", "--strict-swaps", "--candidates", 1)
    assert records[0]["missing"]["relation"] == NO_SWAP
    assert records[0]["missing"]["object"] == NO_WORD
    assert records[1]["object"] == "A man carries a hat."
    for shard in ("3", "0/2", "3/2", "a/b"):
        with pytest.raises(files.BadInput, match=f"--shard {shard}: it is I/N with I from 1 to N"):
            command(*options, tmp_path / "3", "--shard", shard)
    with pytest.raises(files.BadInput, match="x cannot be used .negatives.py --filler FOLDER or"):
        command(*options, tmp_path / "4", "--filler", tmp_path / "x")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    rng, nouns, captions = random.Random(0), "dog cat man boat tree bus".split(), {}
    for i in range(120):
        captions[f"{i}"] = [f"A red {' sees a '.join(rng.sample(nouns, 3))} ." for _ in range(5)]
    source = coco_captions(folder / "captions.json", captions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "CHUNK", 48)  # and the other captions of an image: 12 x 50
        patch.setattr(english, "Tagger", lambda: TAGGER)
        yield source, negatives.generate(source, folder / "whole.jsonl", "ngram").read_text()


@pytest.mark.parametrize("n", [5, 13])  # of 13 shards of 12 chunks one is empty
def test_shards_in_order_are_the_whole(many, tmp_path, n):
    for i in range(1, n + 1):
        negatives.generate(many[0], tmp_path / "o.jsonl", "ngram", shard=f"{i}/{n}")
    shards = [tmp_path / f"o.jsonl.{i:05d}-of-{n:05d}" for i in range(1, n + 1)]
    assert sorted(tmp_path.iterdir()) == shards
    assert "".join(shard.read_text() for shard in shards) == many[1]


def test_an_interrupted_run_goes_on_where_it_was(many, tmp_path, monkeypatch):
    """The disk is too full for OUT. Then two chunks are damaged, and one is lost."""
    settings = {"captions": many[0], "out": tmp_path / "out.jsonl", "filler": "ngram"}
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, no_limit[1]))
    with pytest.raises(files.BadInput, match="out.jsonl cannot be written .*File too large"):
        negatives.generate(**settings)
    resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    changes = [{"seed": 1}, {"filler": "x"}, {"candidates": 2}, {"strict_swaps": True}]
    changes.append({"captions": coco_captions(tmp_path / "other.json", CAPTIONS)})
    for change in changes:
        with pytest.raises(
            files.BadInput, match="begun with other captions, settings or code: delete"
        ):
            negatives.generate(**settings | change)
    with pytest.raises(files.BadInput, match="begun with"), pytest.MonkeyPatch.context() as patch:
        edited = tmp_path / "edited.py"  # the code decides the output, too
        edited.write_text(Path(negatives.__file__).read_text() + "MAX_PAIRS = 3\n")
        patch.setattr(negatives, "__file__", str(edited))
        negatives.generate(**settings)
    edited.unlink()
    assert not settings["out"].exists()
    paths = sorted((tmp_path / "out.jsonl.part").iterdir())
    paths[2].write_text(paths[2].read_text().replace(" sees ", " saw ", 1))
    paths[4].write_bytes(b"\xff")
    paths[9].unlink()
    monkeypatch.setattr(negatives, "make_negatives", Mock(wraps=negatives.make_negatives))
    assert negatives.generate(**settings).read_text() == many[1]
    made_again = [call.args[0] for call in negatives.make_negatives.call_args_list]
    assert [chunk[0]["id"] for chunk in made_again] == [10 + 50 * n for n in (2, 4, 9)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "out.jsonl"]
