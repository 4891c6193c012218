"""negatives.py: captions in, edits on token positions, the two fillers, the command."""

import contextlib
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, coco_captions
from transformers import PreTrainedTokenizerFast, RobertaForMaskedLM

import negatives
from negatives import KINDS, BadInput, Masked, NgramFiller, Word

RNG = random.Random(0)


@pytest.fixture(scope="session")
def tagger():
    return negatives.Tagger()


def words(text: str) -> list[Word]:
    """Words from "A/DET black/ADJ dog/NOUN": POS given, lemma = lower case, one blank between."""
    out = []
    for part in text.split():
        word, pos = part.rsplit("/", 1)
        out.append(Word(word, " ", pos, pos, word.lower()))
    return [*out[:-1], out[-1]._replace(space="")]


# ---- Edits ---------------------------------------------------------------------------------------


def test_noun_units_are_runs_of_nouns():
    tagged = words("A/DET teddy/NOUN bear/NOUN on/ADP a/DET bed/NOUN")
    assert negatives.noun_units(tagged) == [(1, 3), (5, 6)]


def test_a_part_of_a_hyphenated_word_is_neither_moved_nor_masked():
    parts = [("A", " ", "DET"), ("tug", "", "NOUN"), ("-", "", "PUNCT"), ("of", "", "ADP")]
    parts += [("-", "", "PUNCT"), ("war", " ", "NOUN"), ("toy", "", "NOUN"), ("-", "", "PUNCT")]
    tagged = [Word(text, space, pos, pos, text) for text, space, pos in parts]
    assert negatives.noun_units(tagged) == []
    assert negatives.mask(tagged, "object", RNG) is None
    assert negatives.noun_units(tagged[:2]) == [(1, 2)]


def relation(text: str, captions=()) -> str | None:
    return negatives.relation(words(text), set(captions), RNG)[0]


def test_relation_swaps_whole_units_and_leaves_determiners():
    swapped = relation("A/DET teddy/NOUN bear/NOUN on/ADP the/DET bed/NOUN ./PUNCT")
    assert swapped == "A bed on the teddy bear ."


def test_relation_works_by_position_not_by_substring():
    # the authors' str.replace makes "a woman sees a wowoman" of this caption
    assert relation("a/DET man/NOUN sees/VERB a/DET girl/NOUN") == "a girl sees a man"
    assert relation("a/DET hen/NOUN eats/VERB then/NOUN") == "a then eats hen"


def test_relation_needs_two_different_units():
    few, same = "fewer than two nouns", "every swap says the same"
    for text, why in [
        ("a/DET man/NOUN sits/VERB", few),
        ("a/DET man/NOUN in/ADP front/NOUN", few),  # no object
        ("a/DET man/NOUN sees/VERB a/DET man/NOUN", same),
        ("a/DET man/NOUN sees/VERB a/DET person/NOUN", same),
    ]:
        assert negatives.relation(words(text), set(), RNG) == (None, why)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("a/DET man/NOUN and/CCONJ a/DET dog/NOUN", None),
        ("ham/NOUN ,/PUNCT eggs/NOUN or/CCONJ bread/NOUN", None),
        ("a/DET cat/NOUN next/ADV to/ADP his/PRON dog/NOUN", None),
        ("a/DET boy/NOUN plays/VERB with/ADP a/DET dog/NOUN", None),
        ("a/DET cat/NOUN on/ADP a/DET dog/NOUN", "a dog on a cat"),
        # a modifier stays in place, and makes the swap false
        ("a/DET red/ADJ cat/NOUN and/CCONJ a/DET dog/NOUN", "a red dog and a cat"),
        ("a/DET cat/NOUN by/ADP two/NUM dogs/NOUN", "a dogs by two cat"),
        ("a/DET cat/NOUN with/ADP a/DET smiling/VERB dog/NOUN", "a dog with a smiling cat"),
    ],
)
def test_a_swap_that_says_the_same_is_not_taken(text, swapped):
    lemmas = {"plays": "play"}
    tagged = [w._replace(lemma=lemmas.get(w.lemma, w.lemma)) for w in words(text)]
    found = {negatives.relation(tagged, set(), random.Random(i))[0] for i in range(20)}
    assert found == {swapped}


def test_coordinated_units_still_change_places_with_others():
    tagged = words("boys/NOUN riding/VERB horses/NOUN and/CCONJ mules/NOUN")
    found = {negatives.relation(tagged, set(), random.Random(i))[0] for i in range(20)}
    assert found == {"horses riding boys and mules", "mules riding horses and boys"}


def test_a_coordinated_pair_stays_so_with_others_between():
    tagged = words("a/DET dog/NOUN ,/PUNCT a/DET red/ADJ cat/NOUN and/CCONJ a/DET bird/NOUN")
    found = {negatives.relation(tagged, set(), random.Random(i))[0] for i in range(20)}
    # not: a bird , a red cat and a dog
    assert found == {"a cat , a red dog and a bird", "a dog , a red bird and a cat"}


def test_a_swap_that_is_a_caption_of_the_picture_is_not_taken():
    text = "a/DET man/NOUN sees/VERB a/DET cat/NOUN"
    assert relation(text) == "a cat sees a man"
    assert relation(text, ["a cat sees a man"]) is None


def test_sentence_case_stays_with_the_position():
    assert relation("Dogs/NOUN chase/VERB Rex/PROPN ./PUNCT") == "Rex chase dogs ."
    assert relation("Teddy/NOUN bear/NOUN on/ADP grass/NOUN") == "Grass on teddy bear"


def test_articles_agree_with_the_new_word():
    assert relation("A/DET cat/NOUN on/ADP an/DET apple/NOUN") == "An apple on a cat"
    tagged = words("a/DET dog/NOUN")
    a, an = ("unicycle", "man", "utensil", "urinal", "ewe"), ("owl", "hour", "umbrella", "oven")
    assert [negatives.fill(Masked(tagged, 1), word) for word in a] == [f"a {word}" for word in a]
    assert [negatives.fill(Masked(tagged, 1), word) for word in an] == [f"an {word}" for word in an]
    # an article that did not agree before is left alone where the sound stays
    assert negatives.fill(Masked(words("a/DET orange/NOUN"), 1), "apple") == "a apple"


def test_fill_replaces_one_word_and_keeps_case_and_spacing():
    tagged = words("Black/ADJ dog/NOUN by/ADP a/DET black/ADJ door/NOUN")
    assert negatives.fill(Masked(tagged, 0), "white") == "White dog by a black door"
    tagged = [Word("BLACK", "", "ADJ", "JJ", "black"), Word("-", "", "PUNCT", ":", "-")]
    assert negatives.fill(Masked(tagged, 0), "white") == "WHITE-"


def test_mask_knows_the_part_of_speech():
    tagged = words("a/DET red/ADJ cat/NOUN chases/VERB 3d/NOUN side/NOUN many/ADJ is/VERB ./PUNCT")
    tagged = [w._replace(lemma="be") if w.text == "is" else w for w in tagged]
    found = {kind: negatives.mask(tagged, kind, RNG).position for kind in KINDS[1:]}
    assert found == {"attribute": 1, "action": 3, "object": 2}
    assert negatives.mask(words("a/DET cat/NOUN"), "action", RNG) is None


def test_the_tag_window_sees_what_the_tagger_sees(tagger):
    texts = [
        "Two dogs play in the tall wet grass while a man with a red hat looks on from a bench."
    ]
    texts += ["A play about flies ended late; the old man can fish near the duck pond, they said."]
    tagged = tagger.words(texts)
    masked = [Masked(ws, i) for ws in tagged for i, w in enumerate(ws) if w.pos in negatives.PENN]
    assert len(masked) > 15
    assert all(tagger.keep_pos(masked))
    assert tagger.keep_pos([masked[0].filled("quickly")]) == [False]


def test_lemmas_of_every_part_of_speech(tagger):
    assert {"stand", "stands"} <= tagger.lemmas("Stands")
    assert {"run", "running"} <= tagger.lemmas("running")
    assert {"big", "bigger"} <= tagger.lemmas("bigger")


def propose(*candidates):
    return lambda requests: [list(candidates)] * len(requests)


def make(tagger, texts, filler, **options):
    captions = [{"id": i, "image": "a.jpg", "caption": text} for i, text in enumerate(texts)]
    return negatives.make_negatives(captions, filler, tagger, **options)


@pytest.mark.parametrize(
    ("kind", "text", "bad", "good"),
    [
        # the masked word's own forms, no words, too vague ones, another part of speech
        ("object", "a dog", ["Dog", "dogs", "x-ray", "3", "##s", "", "thing", "slowly"], "cat"),
        ("object", "The man eats", ["person", "guy", "boy", "surfer"], "woman"),
        ("object", "The surfer eats", ["man", "woman", "person"], "driver"),
        ("object", "The dog eats", ["animal", "puppy"], "horse"),
        # what is not of the same sort may be true as well
        ("attribute", "a brown dog", ["large", "wet", "brown"], "white"),
        ("action", "a dog standing", ["looking", "barking", "stands"], "sleeping"),
    ],
)
def test_fills_that_may_be_true_are_rejected(tagger, kind, text, bad, good):
    (record,) = make(tagger, [text], propose(*bad))
    assert record[kind] is None
    assert record["missing"][kind] == "every candidate rejected"
    (record,) = make(tagger, [text], propose(*bad, good))
    assert good in record[kind].split()
    assert kind not in record["missing"]


def test_the_best_accepted_candidates_are_drawn_from(tagger):
    texts = ["a dog"] * 60
    records = []
    for i, text in enumerate(texts):
        captions = [{"id": i, "image": "a.jpg", "caption": text}]
        filler = propose("dogs", "cat", "horse", "tree")
        records += negatives.make_negatives(captions, filler, tagger, top_k=2)
    assert {r["object"] for r in records} == {"a cat", "a horse"}


# ---- Fillers -------------------------------------------------------------------------------------


def test_ngram_ranks_by_both_neighbours_first():
    seen = [
        "a/DT red/ADJ cat/NN",
        "a/DT red/ADJ cat/NN",
        "a/DT big/ADJ cat/NN",
        "a/DT old/ADJ dog/NN",
    ]
    seen += ["the/DT tiny/ADJ cat/NN"]
    seen[0] = "A/DT Red/ADJ cat/NN"
    filler = NgramFiller()
    filler.count([words(text) for text in seen[:2]])
    filler.count([words(text) for text in seen[2:]])
    # both: red 2*2/12, big 1*1/11; one neighbour: old 1*.5/11 and tiny .5*1/11, in word order
    ranked = ["red", "big", "old", "tiny"]
    assert filler([Masked(words("a/DT red/ADJ cat/NN"), 1)]) == [ranked]
    assert filler([Masked(words("a/DT red/NN cat/NN"), 1)]) == [[]]  # another tag: nothing known


def test_masked_lm_proposes_whole_words_and_does_not_depend_on_the_batch(tiny_roberta):
    captions = ["a/DT red/ADJ cat/NOUN", "a/DT dog/NOUN sees/VERB a/DT blue/ADJ cat/NOUN"]
    requests = [Masked(words(captions[0]), 1), Masked(words(captions[1]), 2)]
    filler = negatives.MaskedLMFiller(str(tiny_roberta))
    together = filler(requests)
    assert all(set(p) == {"a", "red", "blue", "cat", "dog", "sees"} for p in together)
    assert together == [filler([request])[0] for request in requests]
    # the ranking is the model's own at the masked position, of the model without our hook
    model = RobertaForMaskedLM.from_pretrained(tiny_roberta)
    inputs = filler.tokenizer("a <mask> cat", return_tensors="pt")
    logits = model(**inputs).logits[0]
    at = (inputs["input_ids"][0] == filler.tokenizer.mask_token_id).nonzero().item()
    best = [i for i in logits[at].argsort(descending=True).tolist() if i in filler.words]
    assert together[0] == [filler.words[i] for i in best]


def test_masked_lm_sees_every_batch(tiny_roberta, monkeypatch):
    filler = negatives.MaskedLMFiller(str(tiny_roberta))
    texts = ["a/D red/ADJ cat/N", "a/D red/ADJ cat/N sees/V", "a/D dog/N", "a/D dog/N sees/V a/D"]
    requests = [Masked(words(text), i) for text in texts for i in (0, 1)]
    whole = filler(requests)
    monkeypatch.setattr(negatives, "MASKS", 3)
    assert filler(requests) == whole
    assert filler([]) == []


def test_masked_lm_gives_up_where_the_mask_is_cut_off_or_not_alone(tiny_roberta):
    filler = negatives.MaskedLMFiller(str(tiny_roberta))
    long = words(" ".join(["a/DET"] * 60))
    filled = filler([Masked(long, 2), Masked(long, 59), Masked(words("<mask>/NOUN cat/NOUN"), 1)])
    assert filled[0]
    assert filled[1:] == [[], []]


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
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_roberta)
    tokenizer.save_pretrained(tmp_path)
    filler = negatives.MaskedLMFiller(str(tmp_path))
    (found,) = filler([Masked(words("a/D red/ADJ cat/N"), 1)])
    inputs = tokenizer("a <mask> cat", return_tensors="pt")
    logits = model(input_ids=inputs["input_ids"]).logits[0]
    at = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    best = [i for i in logits[at].argsort(descending=True).tolist() if i in filler.words]
    assert found == [filler.words[i] for i in best]


def test_an_unknown_masked_lm_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="negatives.py --filler ngram"):
        negatives.MaskedLMFiller(str(tmp_path / "nothing"))


# ---- Files and the command -----------------------------------------------------------------------

CAPTIONS = {
    "a.jpg": ["A black dog chases a red ball .", "A dog runs after the ball on wet grass ."],
    "b.jpg": ["Two small girls are eating pizza in a kitchen", "  girls \t eating\nlunch  "],
    "c.jpg": ["A red bus drives down a busy street .", "snow", "A white cat sleeps on a sofa ."],
}


def run(*args):
    """negatives.py with these arguments, in this process: (exit code, what it said on stderr)."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["negatives.py", *map(str, args)])
        try:
            negatives.run(negatives.main)
        except SystemExit as e:
            return (e.code, errors.getvalue()) if isinstance(e.code, int) else (1, f"{e.code}\n")
    return 0, errors.getvalue()


@pytest.mark.parametrize("filler", ["ngram", "mlm"])
def test_command_end_to_end(tmp_path, tiny_roberta, filler):
    source, out = coco_captions(tmp_path / "captions.json", CAPTIONS), tmp_path / "out.jsonl"
    options = ["--filler", filler, "--mlm", tiny_roberta, "--captions", source]
    code, said = run(*options, "--out", out, "--report", tmp_path / "report.json")
    assert code == 0, said
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(r) for r in records] == [{"id", "image", "caption", *KINDS, "missing"}] * 7
    assert records[3]["caption"] == "girls eating lunch"
    for r in records:
        assert {kind for kind in KINDS if r[kind] is None} == set(r["missing"])
        negs = [r[kind] for kind in KINDS if r[kind]]
        assert all(n.lower() != r["caption"].lower() for n in negs)
        for kind in KINDS[1:]:  # one word differs, and an article that goes with it
            if r[kind]:
                pairs = zip(r["caption"].split(), r[kind].split(), strict=True)
                changed = [p for p in pairs if p[0] != p[1] and not {*p} <= {"a", "an", "A", "An"}]
                assert len(changed) == 1
    assert any(r["relation"] for r in records)
    snow = next(r for r in records if r["caption"] == "snow")
    assert snow["missing"]["relation"] == "fewer than two nouns"
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == negatives.report(out)
    assert found["captions"] == 7

    exists = f"{out} exists: give another --out, or --overwrite to replace it"
    assert run(*options, "--out", out) == (1, f"negatives.py: error: {exists}\n")
    before = out.read_bytes()
    assert run(*options, "--out", out, "--overwrite")[0] == 0
    assert out.read_bytes() == before
    names = ["captions.json", "out.jsonl", "report.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_report_counts(tmp_path):
    record = {"id": 1, "image": "a", "caption": "A red cat on an owl", **dict.fromkeys(KINDS)}
    why = {"attribute": "no adjective to mask", "action": "no verb to mask"}
    lines = [
        record | {"relation": "An owl on a red cat", "object": "A red dog on an owl"},
        record | {"object": "A red dog on an owl"},
        record | {"object": "A red cat on a dog"},
    ]
    for line in lines:
        line["missing"] = why if line["relation"] else why | {"relation": "fewer than two nouns"}
    (path := tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = negatives.report(path)
    assert found["captions"] == 3
    assert found["relation"]["made"] == 33.33
    assert found["relation"]["missing"] == {"fewer than two nouns": 66.67}
    assert found["attribute"]["missing"] == {"no adjective to mask": 100.0}
    assert found["object"]["replaced"] == {"cat -> dog": 66.67, "owl -> dog": 33.33}
    assert found["relation"]["examples"] == ["A red cat on an owl => An owl on a red cat"]


def test_choices_depend_on_the_caption_id_alone(tagger):
    text = "A red bus and a white cat pass two old men ."
    captions = [{"id": i, "image": f"{i}.jpg", "caption": text} for i in range(40)]
    filler = propose("green", "yellow", "sleep", "tree", "house", "elderly", "young")
    whole = negatives.make_negatives(captions, filler, tagger)
    assert negatives.make_negatives(captions[7:9], filler, tagger) == whole[7:9]
    assert len({r["relation"] for r in whole}) > 1  # the seed does vary the choice
    assert negatives.make_negatives(captions, filler, tagger, seed=1) != whole


def test_siblings_are_evidence(tagger):
    texts = ["A horse throws a ball .", "A pony and a dog ."]
    records = make(tagger, texts, propose("ponies", "dogs", "balls", "puppy", "animal"))
    assert all(r["object"] is None for r in records)
    records = make(tagger, texts[:1], propose("dogs"))
    assert "dogs" in records[0]["object"]


def test_a_negative_that_is_a_sibling_caption_is_dropped(tagger):
    records = make(tagger, ["a red dog sees a cat", "A red cat sees a dog"], propose())
    assert [r["relation"] for r in records] == [None, None]


ODD = {
    "numbers": "3 dogs and 2 cats chase 1 mouse",
    "ordinals": "The first runner passes the 2nd man in the third lane",
    "names": "Barack Obama greets Angela Merkel in Paris",
    "contractions": "The man's dog isn't chasing the girls' ball, it's eating",
    "quotes": "A \"big\" sign says 'stop' to a “yellow” car",
    "emoji": "A dog 🐶 chases a red ball ⚽️ in the park 👨‍👩‍👧",
    "not English": "一只狗在草地上 追逐 ein kleiner Hund jagt den Ball \u202e مرحبا",
    "long": " ".join(["a red dog chases a cat past a tree"] * 40),
    "empty": "",
    "white": " \t\n ",
    "one word": "dog",
    "one letter": "a",
    "tabs": "A\tdog\nchases\r\na \u2028 red \x85 ball",
    "mask": "A <mask> dog chases a [MASK] ball <s>",
    "json": '{"id": 1} \\ \\u0000 "',
    "surrogate": "A dog \ud83d chases a cat",
    "capitals": "A BLACK DOG CHASES A RED BALL",
    "null byte": "A dog \x00 sees a cat",
}


@pytest.mark.parametrize("filler", ["ngram", "mlm"])
def test_odd_captions(tmp_path, tiny_roberta, filler):
    source = coco_captions(tmp_path / "c.json", {f"{name}.jpg": [ODD[name]] for name in ODD})
    out = negatives.generate(source, tmp_path / "o.jsonl", filler, str(tiny_roberta))
    lines = out.read_bytes().decode("ascii").split("\n")
    assert lines.pop() == ""
    records = {Path(r["image"]).stem: r for r in map(json.loads, lines)}
    assert list(records) == list(ODD)
    for name, r in records.items():
        folded = " ".join(ODD[name].split()).replace("\ud83d", "?")
        assert r["caption"] == folded
        for kind in KINDS:
            assert (r[kind] is None) == (kind in r["missing"])
            if r[kind] is not None:
                assert r[kind] != r["caption"]
                assert r[kind] == " ".join(r[kind].split())
    for name in ("empty", "white", "one letter"):
        assert set(records[name]["missing"]) == set(KINDS)
    assert records["tabs"]["relation"] == "A ball chases a red dog"
    assert records["names"]["relation"] is not None
    assert sorted(records["capitals"]["relation"]) == sorted(ODD["capitals"])
    assert sorted(records["contractions"]["relation"]) == sorted(ODD["contractions"])


def test_chunks_keep_pictures_whole():
    captions = [{"image": name} for name in "aaabbbccd"]
    sizes = [len(chunk) for chunk in negatives.chunks(captions, 2)]
    assert sizes == [3, 3, 2, 1]


# ---- Other inputs --------------------------------------------------------------------------------


def read(tmp_path, name, content):
    (path := tmp_path / name).write_text(content, encoding="utf-8")
    return list(negatives.read_captions(path))


def test_tables(tmp_path):
    two = [
        {"id": 0, "image": "a.jpg", "caption": "A dog, 'wet'"},
        {"id": 1, "image": "b.jpg", "caption": "two lines"},
    ]
    csv = 'filepath,title\na.jpg,"A dog, \'wet\'"\nb.jpg,"two\nlines"\n'
    assert read(tmp_path, "open_clip.csv", csv) == two
    cc3m = "\ufeffcaption\turl\nA dog, 'wet'\ta.jpg\r\n\r\ntwo lines\tb.jpg\r\n"
    assert read(tmp_path, "cc3m.tsv", cc3m) == two
    negclip = "\ttitle\tfilepath\tneg_caption\n0\tA dog, 'wet'\ta.jpg\t['x']\n"
    assert read(tmp_path, "negclip.tsv", negclip) == two[:1]


def test_visual_genome_regions_have_boxes(tmp_path):
    region = {"region_id": 7, "image_id": 3, "phrase": "the  clock", "x": 10, "y": 20}
    images = [{"id": 3, "regions": [region | {"width": 30, "height": 0}]}, {"id": 4, "regions": []}]
    record = {"id": 7, "image": "3.jpg", "caption": "the clock", "box": [10, 20, 40, 21]}
    assert read(tmp_path, "region_descriptions.json", json.dumps(images)) == [record]
    out = negatives.generate(tmp_path / "region_descriptions.json", tmp_path / "o.jsonl", "ngram")
    assert json.loads(out.read_text())["box"] == [10, 20, 40, 21]


def test_karpathy_lists(tmp_path):
    entries = [
        {"image": "a.jpg", "caption": ["one", "two"]},
        {"image": "b.jpg", "caption": "three"},
    ]
    found = read(tmp_path, "k.json", " " + json.dumps(entries, indent=2))
    assert [(r["id"], r["image"], r["caption"]) for r in found] == [
        (0, "a.jpg", "one"),
        (1, "a.jpg", "two"),
        (2, "b.jpg", "three"),
    ]


def test_a_folder_as_img2dataset_leaves_it(tmp_path):
    for shard, name, text in (("00001", "7", "a dog"), ("00000", "3", "a  cat\n")):
        (tmp_path / shard).mkdir()
        (tmp_path / shard / f"{name}.jpg").write_bytes(b"")
        (tmp_path / shard / f"{name}.txt").write_text(text)
    assert list(negatives.read_captions(tmp_path)) == [
        {"id": 0, "image": "00000/3.jpg", "caption": "a cat"},
        {"id": 1, "image": "00001/7.jpg", "caption": "a dog"},
    ]
    (tmp_path / "00001" / "7.txt").unlink()
    with pytest.raises(BadInput, match=r"cannot read .*00001/7.txt: No such file"):
        list(negatives.read_captions(tmp_path))


def test_a_long_array_is_streamed(tmp_path):
    entries = [{"image": f"{i}.jpg", "caption": "ä" * (i % 97)} for i in range(40_000)]
    found = read(tmp_path, "k.json", json.dumps(entries))  # more than two reads of 1 MiB
    assert [(r["image"], r["caption"]) for r in found] == [tuple(e.values()) for e in entries]


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
    assert sum(1 for _ in negatives.read_captions(SHARED / name)) == count


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*captions: No such file"),
        ("", "line 1: expected JSON, or a header with caption or title"),
        ("{", "is not a COCO captions file .*JSONDecodeError"),
        ('{"images": []}', "is not a COCO captions file"),
        ('{"images": [], "annotations": []}', "holds no captions"),
        ("[]", "holds no captions"),
        ('[{"image": "a.jpg"}]', "entry 1, is not an object with image and caption"),
        ('[{"image": "a.jpg", "caption": "a"}, {"caption": "b"}]', "entry 2, .*KeyError 'image'"),
        ('[{"image": "a.jpg", "caption": [1]}]', "caption 0 is not text: 1"),
        ('[{"regions": [{"phrase": "a"}]}]', "entry 1, .*KeyError"),
        ('[{"image": "a.jpg", "caption": "a"}', "is not a captions file.*JSONDecodeError"),
        ("text,file\na,b\n", "line 1: expected JSON, or a header"),
        ("caption,image\na,b\nc\n", "line 3: expected 2 fields, found 1"),
        ("caption\turl\na\tb\n", None),
        ('caption\turl\n"a dog\tu1\na cat"\tu2\n', "line 3: expected a quote to be closed"),
        ("caption,url\n", "holds no captions"),
        (b"\xff\xfe\x00", "is not a captions file: UnicodeDecodeError"),
    ],
)
def test_bad_captions_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "captions"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if message is None:
        assert list(negatives.read_captions(path))
        return
    with pytest.raises(BadInput, match=message) as e:
        list(negatives.read_captions(path))
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


# ---- Shares, interruptions, a full disk ----------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A captions file of 12 chunks of 50 captions, and its negatives made in one go."""
    folder = tmp_path_factory.mktemp("many")
    things, colors = ["dog", "cat", "man", "boat", "tree", "bus"], ["red", "black", "tall", "old"]
    rng = random.Random(0)
    captions = {
        f"{i}.jpg": [
            f"A {rng.choice(colors)} {rng.choice(things)} chases {rng.choice(things)} {i} ."
            for _ in range(5)
        ]
        for i in range(120)
    }
    source = coco_captions(folder / "captions.json", captions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives.chunks, "__defaults__", (50,))
        whole = negatives.generate(source, folder / "whole.jsonl", "ngram").read_bytes()
    return source, whole


SMALL = "import negatives; negatives.chunks.__defaults__ = (50,); negatives.run(negatives.main)"
SLOW = SMALL.replace(
    "; negatives.run",
    "; import time, os; sync = os.fsync; negatives.os.fsync = "
    "lambda fd: (time.sleep(0.1), sync(fd)); negatives.run",
)


def test_shares_in_order_are_the_whole(many, tmp_path, monkeypatch, tagger):
    source, whole = many
    monkeypatch.setattr(negatives, "Tagger", lambda: tagger)  # loaded once
    monkeypatch.setattr(negatives.chunks, "__defaults__", (50,))
    for n in (1, 5, 20):  # 20 shares of 12 chunks: some are empty
        shares = [
            negatives.generate(source, tmp_path / f"{n}.jsonl", "ngram", shard=(i, n))
            for i in range(1, n + 1)
        ]
        assert [path for path in sorted(tmp_path.glob(f"{n}.jsonl*"))] == shares
        assert b"".join(path.read_bytes() for path in shares) == whole


def test_torchrun_makes_the_same_file(many, tmp_path):
    source, whole = many
    (script := tmp_path / "small.py").write_text(SMALL)
    out = tmp_path / "out.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    options = ["--captions", source, "--out", out, "--filler", "ngram"]
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, *options], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole
    assert done.stdout.count("relation: made") == 1  # one process reports
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "small.py"]


def test_killed_at_random_points_it_goes_on_and_ends_the_same(many, tmp_path):
    source, whole = many
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = [sys.executable, "-c", SLOW, "--captions", source, "--out", out, "--filler", "ngram"]
    rng = random.Random(1)
    reached = []
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = part.stat().st_size if part.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (
            not part.exists() or part.stat().st_size <= before + 1000
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        reached.append(part.stat().st_size)
        with part.open("r+b") as file:  # and in the middle of a write
            file.truncate(reached[-1] - rng.randrange(200))
    assert reached == sorted(set(reached))  # each run went further than the one before
    subprocess.run(command, check=True, capture_output=True)
    assert out.read_bytes() == whole
    assert not part.exists()


def test_two_at_a_time_are_refused(many, tmp_path):
    source, _ = many
    out = tmp_path / "out.jsonl"
    with (
        negatives.open_locked(tmp_path / "out.jsonl.part"),
        pytest.raises(BadInput, match="another process is writing .*out.jsonl.part"),
    ):
        negatives.generate(source, out, "ngram")


def test_only_what_is_not_done_is_made(many, tmp_path, monkeypatch):
    source, whole = many
    monkeypatch.setattr(negatives.chunks, "__defaults__", (50,))
    out, made = tmp_path / "out.jsonl", []

    def counting(captions, *args, make=negatives.make_negatives):
        made.append(len(captions))
        if len(made) == 5:
            raise KeyboardInterrupt
        return make(captions, *args)

    monkeypatch.setattr(negatives, "make_negatives", counting)
    with pytest.raises(KeyboardInterrupt):
        negatives.generate(source, out, "ngram")
    made += [0]
    negatives.generate(source, out, "ngram")
    assert made == [50] * 5 + [0] + [50] * 8
    assert out.read_bytes() == whole


@pytest.fixture(scope="module")
def cut_short(many, tmp_path_factory):
    """What a run leaves behind that fills the disk: one line, and no short file."""
    out = tmp_path_factory.mktemp("full") / "out.jsonl"
    part = Path(f"{out}.part")
    stopped = subprocess.run(
        [sys.executable, "-c", SMALL, "--captions", many[0], "--out", out, "--filler", "ngram"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_file_size,
    )
    assert stopped.returncode == 1
    reason = f"-c: error: cannot write {part}: File too large (what is done is kept, "
    assert stopped.stderr.splitlines()[-1].startswith(reason)
    assert not out.exists()
    return part.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was begun with seed 0, now 1: --overwrite begins again"),
        ({"top_k": 3, "seed": 1}, "was begun with top_k 10, now 3; seed 0, now 1:"),
        ({"filler": "mlm", "mlm": "x"}, "was begun with filler ngram, now mlm; mlm None, now x:"),
        ({"captions": "other"}, "was begun with captions sha256 .*, now "),
    ],
)
def test_a_part_of_other_settings_is_refused(many, cut_short, tmp_path, change, message):
    source, whole = many
    settings = {"captions": source, "out": tmp_path / "out.jsonl", "filler": "ngram"}
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(cut_short)
    before = cut_short
    if "captions" in change:
        change = {"captions": coco_captions(tmp_path / "other.json", CAPTIONS)}
    with pytest.raises(BadInput, match=message):
        negatives.generate(**settings | change)
    assert part.read_bytes() == before
    if change == {"seed": 1}:
        out = negatives.generate(**settings | change, overwrite=True)
        assert out.read_bytes() != whole
        assert not part.exists()


def limit_file_size():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("shard", ["3", "0/2", "3/2", "a/b", "1/0"])
def test_bad_shards(tmp_path, shard):
    code, said = run("--captions", "x", "--out", tmp_path / "o", "--shard", shard)
    assert code == 2
    assert "--shard is I/N with I from 1 to N" in said
