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
from types import SimpleNamespace

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import ce_clip
import eval_bench


def stand_ins(items: list[eval_bench.Item], folder: Path) -> list[eval_bench.Item]:
    """The items on pictures that are all there, 16 different ones under the missing names."""
    jpegs = []
    for n in range(16):
        noise = Image.effect_noise((80, 60), 30 + 4 * n).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        noise.convert("RGB").save(buffer := io.BytesIO(), "jpeg", quality=85)
        jpegs.append(buffer.getvalue())
    names = {}
    for item in items:
        if item.image not in names and not Path(item.image).exists():
            (folder / Path(item.image).name).write_bytes(jpegs[len(names) % len(jpegs)])
            names[item.image] = str(folder / Path(item.image).name)
    return [item._replace(image=names.get(item.image, item.image)) for item in items]


@torch.no_grad()
def one_at_a_time(loaded: ce_clip.Loaded, items: list[eval_bench.Item]) -> list[bool]:
    model, right = loaded.model.eval(), []
    for item in items:
        image = model.encode_image(loaded.eval_transform(Image.open(item.image))[None], True)
        texts = [
            model.encode_text(loaded.tokenizer(t), True) for t in (item.positive, *item.negatives)
        ]
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
        files = eval_bench.Files(Path(args.data_root))
        items = stand_ins(list(eval_bench.sugarcrepe_items(files)), Path(folder))
        if not items:
            p.error(f"{args.data_root} has no sugarcrepe/*.json")
        some = items[:: max(1, len(items) // args.items)]
        one_at_a_time(loaded, some[:3])
        start = time.perf_counter()
        expected = one_at_a_time(loaded, some)
        slow = len(some) / (time.perf_counter() - start)
        run = SimpleNamespace(batch_size=64, workers=args.workers, precision="fp32")
        scorer = eval_bench.Scorer({"model": loaded}, run)
        start = time.perf_counter()
        features = scorer.encode(items)["model"]
        fast = len(items) / (time.perf_counter() - start)
        positive, negative = features.scores(some).T
    same = sum(a == b for a, b in zip(expected, (positive > negative).tolist()))
    found = {"one at a time, items/s": slow, "ours": fast, "ratio": fast / slow}
    print(json.dumps(found | {"items": len(items), "equal decisions": f"{same}/{len(some)}"}))


if __name__ == "__main__":
    main()
