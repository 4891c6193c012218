"""How fast is MaskedLMFiller beside transformers' fill-mask pipeline, same model, same masks?

    python tests/bench_negatives.py --captions captions_val2017.json

The model is a randomly initialised distilroberta-base (82 M parameters; a trained one takes as
long), its tokenizer is trained on the captions. The pipeline runs as the authors call it, one text
at a time, and batched; both give the 5 best words, we give the 100 best.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM, pipeline

sys.path.insert(0, str(Path(__file__).parent.parent))
import english
import files
import negatives


def save_model(folder: str, captions: list[str]) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(captions, vocab_size=50_265, special_tokens=special)
    bpe.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>"}
    names = {f"{key}_token": value for key, value in names.items()}
    mask = AddedToken("<mask>", lstrip=True)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", mask_token=mask, **names
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50_265, num_hidden_layers=6, max_position_embeddings=514, type_vocab_size=1
    )
    RobertaForMaskedLM(config).save_pretrained(folder)


def rate(name: str, function, items: list) -> float:
    function(items[:8])  # warm up
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(items)
    per_second = len(items) / (time.perf_counter() - start)
    print(f"{name:32} {per_second:10.1f} masks/s", flush=True)
    return per_second


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--captions", type=Path, required=True, help="any file negatives.py reads")
    p.add_argument("--masks", type=int, default=2048)
    args = p.parse_args()
    captions = [r["caption"] for r in files.read_captions(args.captions)[: args.masks]]
    rng = random.Random(0)
    requests = []  # (words, position)
    texts = []  # the same with <mask>
    for words in english.Tagger().words(captions):
        for kind in negatives.MASKED_KINDS:
            mask = negatives.choose_masked_word(words, kind, rng)
            if mask and len(requests) < args.masks:
                requests.append(mask)
                left, position = mask
                masked = left[position]._replace(text="<mask>")
                texts.append(english.text_of([*left[:position], masked, *left[position + 1 :]]))
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, captions)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        fill = pipeline("fill-mask", model=folder, device=device, top_k=5)
        ours = negatives.MaskedLMFiller(folder)
    print(f"{len(requests)} masks, {device}, {torch.get_num_threads()} threads")
    one = rate("pipeline, one text at a time", lambda ts: [fill(t) for t in ts], texts[::10])
    batched = rate("pipeline, batch_size=64", lambda ts: fill(ts, batch_size=64), texts[::2])
    us = rate("MaskedLMFiller", ours, requests)
    print(f"MaskedLMFiller is {us / one:.1f} x the first and {us / batched:.1f} x the second")


if __name__ == "__main__":
    main()
