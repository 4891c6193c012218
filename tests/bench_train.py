"""One training step of ours beside a plain one (77 tokens, all five captions), same model and data.

    python tests/bench_train.py --negatives negatives.jsonl --images data/coco/train2014

The plain step is how the authors and most forks do it: every caption, a missing negative as a
placeholder, padded to 77 tokens, in one forward. Both run in processes of their own, for the peak
memory; on a GPU both in bf16. `--micro-batch` measures activation checkpointing as well, and
`--images` the loader alone: real images, decoded, augmented and tokenised by --workers processes.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
import ce_clip
import files
from ce_clip import Encoder
from negatives import PAPER_KINDS


class Plain(Encoder):
    """The forward of the plain step."""

    def encode(self, images, tokens, valid):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            image = self.model.encode_image(images, normalize=True).float()
            flat = tokens.flatten(0, 1).to(images.device)
            text = self.model.encode_text(flat, normalize=True).float()
        return image, text.view(*tokens.shape[:2], -1), images.new_zeros(1)


def measure(args) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open(args.negatives) as file:
        records = [json.loads(line) for line in islice(file, 50 * args.batch_size)]
    records = random.Random(0).sample(records, args.batch_size)
    torch.manual_seed(0)
    loaded = ce_clip.build_model(args.model)
    texts = [[r["caption"], *(r[kind] or "###" for kind in PAPER_KINDS)] for r in records]
    tokens = torch.stack([loaded.tokenizer(five) for five in texts])
    valid = torch.tensor([[r[kind] is not None for kind in PAPER_KINDS] for r in records])
    size = loaded.model.visual.image_size
    images = torch.randn(len(records), 3, *(size if isinstance(size, tuple) else (size, size)))
    images, on_device = images.to(device), valid.to(device)
    micro = args.micro_batch if args.way == "micro" else 0
    kind = Plain if args.way == "plain" else Encoder
    encoder = kind(loaded.model.to(device).train(), device.type == "cuda", micro)
    parameters = loaded.model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=5e-6, fused=args.way != "plain")
    threshold = torch.zeros(len(PAPER_KINDS), device=device)
    for step in range(args.steps + 1):
        if step == 1:  # the first one warms up
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
        image, text, scale, _ = encoder(images, tokens, valid)
        sims = ce_clip.similarities(image, text, scale)
        loss, _ = ce_clip.ce_clip_loss(*sims, threshold, on_device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss = loss.item()  # and waits for the device
    speed = args.steps * args.batch_size / (time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"pairs_per_s": speed, "peak_GiB": peak, "loss": loss}))


def measure_loader(args) -> None:
    """Batches of the trainer's own loader with nothing to consume them."""
    loaded = ce_clip.build_model(args.model)
    records = files.Records(Path(args.negatives), Path(args.images), PAPER_KINDS)
    batches = iter(
        DataLoader(
            ce_clip.Pairs(records, loaded, seed=0),
            batch_sampler=ce_clip.batch_keys(len(records), args.batch_size, epochs=1, seed=0),
            num_workers=args.workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
    for _ in range(4 * max(1, args.workers)):  # past what the workers fetch ahead
        next(batches)
    start, n = time.perf_counter(), 0
    for _ in islice(batches, 20 * max(1, args.workers)):
        n += args.batch_size
    print(json.dumps({"pairs_per_s": n / (time.perf_counter() - start), "workers": args.workers}))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--negatives", required=True, help=".jsonl of negatives.py")
    p.add_argument("--model", default="ViT-B-32-quickgelu")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--micro-batch", type=int, default=0)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--images", help="image folder: measure the loader too")
    p.add_argument("--workers", type=int, default=1, help="of the loader")
    p.add_argument("--way", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way:
        (measure_loader if args.way == "loader" else measure)(args)
        return
    found = {}
    ways = ["plain", "ours"] + ["micro"] * (args.micro_batch > 0) + ["loader"] * bool(args.images)
    for way in ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        ratio = found[way]["pairs_per_s"] / found["plain"]["pairs_per_s"]
        print(f"{way:6} {found[way]}  {ratio:.2f} x the pairs/s of plain", flush=True)


if __name__ == "__main__":
    main()
