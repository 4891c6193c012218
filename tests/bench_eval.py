"""SugarCrepe by eval_bench.py beside one pair at a time at 77 tokens, as its own script scores.

    python tests/bench_eval.py --data-root data

Both use one model (with random weights) and the same images. Only --items items, spread over the
list, are timed one at a time. 640x480 JPEGs in a temporary folder stand in for missing images.
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
from eval_bench import Item, Log, Scorer


def read_items(root: Path) -> list[Item]:
    items = []
    for subset in eval_bench.groups_of("sugarcrepe"):
        for e in eval_bench.read_entries(root / f"sugarcrepe/{subset}.json", Log()):
            image = (root / "coco/val2017" / e["filename"], None)
            items.append(Item(subset, image, e["caption"], e["negative_caption"]))
    return items


def stand_ins(items: list[Item], folder: Path) -> list[Item]:
    """The items on images that are all there, 16 different ones under the missing names."""
    jpegs = []
    for n in range(16):
        noise = Image.effect_noise((80, 60), 30 + 4 * n)
        noise = noise.resize((640, 480), Image.Resampling.BICUBIC).convert("RGB")
        noise.save(buffer := io.BytesIO(), "jpeg", quality=85)
        jpegs.append(buffer.getvalue())
    names = {}
    for item in items:
        path, _ = item.image
        if path not in names and not path.exists():
            names[path] = folder / path.name
            names[path].write_bytes(jpegs[len(names) % len(jpegs)])
    return [i._replace(image=(names.get(i.image[0], i.image[0]), None)) for i in items]


@torch.no_grad()
def one_at_a_time(loaded: ce_clip.Loaded, items: list[Item]) -> list[bool]:
    model, right = loaded.model.eval(), []
    for item in items:
        image = Image.open(item.image[0]).convert("RGB")
        image = model.encode_image(loaded.eval_transform(image)[None], True)
        texts = [model.encode_text(loaded.tokenizer(t), True) for t in item[2:]]
        positive, negative = (image @ text.T for text in texts)
        right.append(bool(positive > negative))
    return right


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-root", type=Path, required=True, help="has sugarcrepe/*.json")
    p.add_argument("--model", default="ViT-B-32-quickgelu")
    p.add_argument("--items", type=int, default=150, help="timed one at a time")
    p.add_argument("--workers", type=int, default=0)
    args = p.parse_args()
    torch.manual_seed(0)
    loaded = ce_clip.build_model(args.model)
    with tempfile.TemporaryDirectory() as folder:
        items = stand_ins(read_items(args.data_root), Path(folder))
        if not items:
            p.error(f"{args.data_root} has no sugarcrepe/*.json")
        step = max(1, len(items) // args.items)
        one_at_a_time(loaded, items[:3])
        start = time.perf_counter()
        expected = one_at_a_time(loaded, items[::step])
        slow = len(expected) / (time.perf_counter() - start)
        scorer = Scorer(loaded, workers=args.workers)
        start = time.perf_counter()
        lines = eval_bench.score_items(scorer, items, Log())
        fast = len(items) / (time.perf_counter() - start)
    same = sum(right == line["right"] for right, line in zip(expected, lines[::step]))
    speeds = {"one at a time, items/s": slow, "ours": fast, "ratio": fast / slow}
    equal = f"{same}/{len(expected)}"
    print(json.dumps(speeds | {"items": len(items), "equal decisions": equal}))


if __name__ == "__main__":
    main()
