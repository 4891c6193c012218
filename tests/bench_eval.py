"""SugarCrepe by eval_bench.py beside one pair at a time at 77 tokens, as its own script scores.

    python tests/bench_eval.py --data-root data

Same model (random weights), same pictures; of the slow way only --items items are timed, spread
over the list. Pictures that are not there are stood in for by 640x480 JPEGs in a temporary folder.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import ce_clip
import eval_bench
from eval_bench import Item, Scorer


class Reader(Scorer):
    """Keeps the items that a benchmark hands to a scorer."""

    def encode(self, items: list[Item], itm: bool) -> None:
        self.items = items


def stand_ins(items: list[Item], folder: Path) -> list[Item]:
    """The items on pictures that are all there, 16 different ones under the missing names."""
    jpegs = []
    for n in range(16):
        noise = Image.effect_noise((80, 60), 30 + 4 * n)
        noise = noise.resize((640, 480), Image.Resampling.BICUBIC).convert("RGB")
        noise.save(buffer := io.BytesIO(), "jpeg", quality=85)
        jpegs.append(buffer.getvalue())
    names = {}
    for item in items:
        path, _ = item.picture
        if path not in names and not path.exists():
            names[path] = folder / path.name
            names[path].write_bytes(jpegs[len(names) % len(jpegs)])
    return [i._replace(picture=(names.get(i.picture[0], i.picture[0]), None)) for i in items]


@torch.no_grad()
def one_at_a_time(loaded: ce_clip.Loaded, items: list[Item]) -> list[bool]:
    model, right = loaded.model.eval(), []
    for item in items:
        picture = Image.open(item.picture[0]).convert("RGB")
        image = model.encode_image(loaded.eval_transform(picture)[None], True)
        texts = [model.encode_text(loaded.tokenizer(t), True) for t in item[2:]]
        positive, negative = (image @ text.T for text in texts)
        right.append(bool(positive > negative))
    return right


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-root", required=True, help="has sugarcrepe/*.json")
    p.add_argument("--model", default="ViT-B-32-quickgelu")
    p.add_argument("--items", type=int, default=150, help="timed one at a time")
    p.add_argument("--workers", type=int, default=0)
    args = p.parse_args()
    torch.manual_seed(0)
    loaded = ce_clip.build_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(loaded)
        eval_bench.sugarcrepe(reader, Path(args.data_root))
        if not reader.items:
            p.error(f"{args.data_root} has no sugarcrepe/*.json")
        items = stand_ins(reader.items, Path(folder))
        some = items[:: max(1, len(items) // args.items)]
        one_at_a_time(loaded, some[:3])
        start = time.perf_counter()
        expected = one_at_a_time(loaded, some)
        slow = len(some) / (time.perf_counter() - start)
        scorer = Scorer(loaded, workers=args.workers)
        start = time.perf_counter()
        scorer.encode(items)
        fast = len(items) / (time.perf_counter() - start)
        found = [scorer.decide(item)["right"] for item in some]
    same = sum(a == b for a, b in zip(expected, found))
    found = {"one at a time, items/s": slow, "ours": fast, "ratio": fast / slow}
    print(json.dumps(found | {"items": len(items), "equal decisions": f"{same}/{len(some)}"}))


if __name__ == "__main__":
    main()
