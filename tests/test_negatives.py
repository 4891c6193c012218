"""negatives.py: edits on token positions, the two fillers, the command."""

import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import coco_captions
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

import negatives
from negatives import KINDS, BadInput, Masked, NgramFiller, Word

RNG = random.Random(0)


@pytest.fixture(scope="session")
def nlp():
    return negatives.load_tagger()


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


def test_relation_swaps_whole_units_and_leaves_determiners():
    tagged = words("A/DET teddy/NOUN bear/NOUN on/ADP the/DET bed/NOUN ./PUNCT")
    assert negatives.relation(tagged, RNG) == "A bed on the teddy bear ."


def test_relation_works_by_position_not_by_substring():
    # the authors' str.replace makes "a woman and a wowoman" of this caption
    tagged = words("a/DET man/NOUN and/CCONJ a/DET woman/NOUN sit/VERB")
    assert negatives.relation(tagged, RNG) == "a woman and a man sit"


def test_relation_needs_two_different_units():
    assert negatives.relation(words("a/DET man/NOUN beside/ADP a/DET man/NOUN"), RNG) is None
    assert negatives.relation(words("a/DET man/NOUN sits/VERB"), RNG) is None


def test_sentence_case_stays_with_the_position():
    tagged = words("Dogs/NOUN chase/VERB Rex/PROPN ./PUNCT")
    assert negatives.relation(tagged, RNG) == "Rex chase dogs ."
    tagged = words("Teddy/NOUN bear/NOUN on/ADP grass/NOUN")
    assert negatives.relation(tagged, RNG) == "Grass on teddy bear"


def test_fill_replaces_one_word_and_keeps_case_and_spacing():
    tagged = words("Black/ADJ dog/NOUN by/ADP a/DET black/ADJ door/NOUN")
    lemma = lambda word, pos: word  # noqa: E731
    text = negatives.fill(Masked(tagged, 0), ["white"], {"black"}, lemma, RNG)
    assert text == "White dog by a black door"
    tagged = [Word("BLACK", "", "ADJ", "JJ", "black"), Word("-", "", "PUNCT", ":", "-")]
    assert negatives.fill(Masked(tagged, 0), ["white"], {"black"}, lemma, RNG) == "WHITE-"


def test_fill_rejects_what_the_pictures_captions_name():
    tagged = words("a/DET dog/NOUN")
    lemma = lambda word, pos: word.rstrip("s")  # noqa: E731
    bad = ["Dog", "dogs", "puppy", "x-ray", "3", "##s", ""]
    assert negatives.fill(Masked(tagged, 1), bad, {"dog", "puppy"}, lemma, RNG) is None
    assert negatives.fill(Masked(tagged, 1), [*bad, "cat"], {"dog", "puppy"}, lemma, RNG) == "a cat"


def test_mask_knows_the_part_of_speech():
    tagged = words("a/DET red/ADJ cat/NOUN chases/VERB 3d/NOUN balls/PUNCT")
    found = {kind: negatives.mask(tagged, kind, RNG).position for kind in KINDS[1:]}
    assert found == {"attribute": 1, "action": 3, "object": 2}
    assert negatives.mask(words("a/DET cat/NOUN"), "action", RNG) is None


# ---- Fillers -------------------------------------------------------------------------------------


def test_ngram_ranks_by_both_neighbours_first():
    seen = [
        "a/DT red/ADJ cat/NN",
        "a/DT red/ADJ cat/NN",
        "a/DT big/ADJ cat/NN",
        "a/DT old/ADJ dog/NN",
    ]
    seen += ["the/DT tiny/ADJ cat/NN"]
    filler = NgramFiller([words(text) for text in seen], top_k=3)
    # both: red 2*2/2 = 2, big 1*1/1 = 1; one neighbour: old 1*.5/1 and tiny .5*1/1, in word order
    assert filler([Masked(words("a/DT red/ADJ cat/NN"), 1)]) == [["red", "big", "old"]]
    assert filler([Masked(words("a/DT red/NN cat/NN"), 1)]) == [[]]  # another tag: nothing known


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory):
    """A RobertaForMaskedLM of a few thousand parameters with its own tokenizer, saved to disk."""
    folder = tmp_path_factory.mktemp("roberta")
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġa", "Ġred", "Ġblue", "Ġcat", "Ġdog"]
    vocabulary += ["Ġsees", "ing", "Ġ3", "Ġ", "s"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="Ġ")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def test_masked_lm_proposes_whole_words_and_does_not_depend_on_the_batch(tiny_roberta):
    captions = ["a/DT red/ADJ cat/NOUN", "a/DT dog/NOUN sees/VERB a/DT blue/ADJ cat/NOUN"]
    requests = [Masked(words(captions[0]), 1), Masked(words(captions[1]), 2)]
    filler = negatives.MaskedLMFiller(str(tiny_roberta), top_k=6)
    together = filler(requests)
    assert all(set(p) == {"a", "red", "blue", "cat", "dog", "sees"} for p in together)
    assert together == [filler([request])[0] for request in requests]
    # the ranking is the model's own at the masked position
    inputs = filler.tokenizer("a <mask> cat", return_tensors="pt")
    logits = filler.model(**inputs).logits[0]
    at = (inputs["input_ids"][0] == filler.tokenizer.mask_token_id).nonzero().item()
    best = [filler.words[i] for i in logits[at].argsort(descending=True) if filler.is_word[i]]
    assert together[0] == best


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
    command = [sys.executable, "negatives.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("filler", ["ngram", "mlm"])
def test_command_end_to_end(tmp_path, tiny_roberta, filler):
    source, out = coco_captions(tmp_path / "captions.json", CAPTIONS), tmp_path / "out.jsonl"
    options = ["--filler", filler, "--mlm", tiny_roberta, "--captions", source]
    done = run(*options, "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(r) for r in records] == [{"id", "image", "caption", *KINDS}] * 7
    assert records[3]["caption"] == "girls eating lunch"
    for r in records:
        negs = [r[kind] for kind in KINDS if r[kind]]
        assert all(n.lower() != r["caption"].lower() for n in negs)
        for kind in KINDS[1:]:  # exactly one word differs
            if r[kind]:
                pairs = list(zip(r["caption"].split(), r[kind].split(), strict=True))
                assert sum(a != b for a, b in pairs) == 1
    assert any(r["relation"] for r in records)
    snow = next(r for r in records if r["caption"] == "snow")
    assert snow["relation"] is None

    again = run(*options, "--out", out)
    assert again.returncode == 1
    assert (
        again.stderr
        == f"negatives.py: error: {out} exists: give another --out, or --overwrite to replace it\n"
    )
    before = out.read_bytes()
    assert run(*options, "--out", out, "--overwrite").returncode == 0
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.json", "out.jsonl"]


def test_choices_depend_on_the_caption_id_alone(nlp):
    captions = [
        {"id": i, "image": f"{i}.jpg", "caption": "A red bus and a white cat pass two old men ."}
        for i in range(40)
    ]
    tagged = list(negatives.tag(nlp, [c["caption"] for c in captions]))
    filler = lambda requests: [["green", "tall", "sleep", "tree", "house"]] * len(requests)  # noqa: E731
    lemma = lambda word, pos: word  # noqa: E731
    whole = list(negatives.make_negatives(captions, tagged, filler, lemma))
    part = list(negatives.make_negatives(captions[7:9], tagged[7:9], filler, lemma))
    assert part == whole[7:9]
    assert len({r["relation"] for r in whole}) > 1  # the seed does vary the choice


def test_siblings_are_evidence(nlp):
    captions = [
        {"id": 1, "image": "a.jpg", "caption": "A man throws a ball ."},
        {"id": 2, "image": "a.jpg", "caption": "A guy and a dog ."},
    ]
    tagged = list(negatives.tag(nlp, [c["caption"] for c in captions]))
    filler = lambda requests: [["guys", "dogs", "balls"]] * len(requests)  # noqa: E731
    lemma = negatives.lemmatizer(nlp)
    records = list(negatives.make_negatives(captions, tagged, filler, lemma))
    assert all(r["object"] is None for r in records)


def test_a_negative_that_is_a_sibling_caption_is_dropped(nlp):
    captions = [
        {"id": 1, "image": "a.jpg", "caption": "a man beside a woman"},
        {"id": 2, "image": "a.jpg", "caption": "A woman beside a man"},
    ]
    tagged = list(negatives.tag(nlp, [c["caption"] for c in captions]))
    nothing = lambda requests: [[] for _ in requests]  # noqa: E731
    records = negatives.make_negatives(captions, tagged, nothing, None)
    assert [r["relation"] for r in records] == [None, None]


def test_chunks_keep_pictures_whole():
    captions = [{"image": name} for name in "aaabbbccd"]
    sizes = [len(chunk) for chunk in negatives.chunks(captions, 2)]
    assert sizes == [3, 3, 2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*captions.json: No such file"),
        ("{", "is not a COCO captions file .*JSONDecodeError"),
        ('{"images": []}', "is not a COCO captions file"),
        ('{"images": [], "annotations": []}', "holds no captions"),
        ('[{"image": "a.jpg"}]', "is not a COCO captions file"),
    ],
)
def test_bad_captions_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "captions.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=message) as e:
        negatives.read_captions(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
