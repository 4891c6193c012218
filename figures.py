"""Draw the paper's figures from what training and evaluation left on disk.

    python figures.py --results results --out figures     # a folder of eval_bench.py --out
    python figures.py --negatives data/toy/negatives_train.jsonl --images data/toy/images --out docs
    python figures.py --negatives FILE.jsonl --images DIR --out page.html  # to read them by eye

Fig. 4, 5a, 5c, 6: means over the compositional tasks, labelled with the settings in which the runs
differ; 5b, 5d: what each run has logged; 8, 9, 10: of the items. Fig. 2, captions with their
negatives, is FOLDER.png of the FOLDER that the .jsonl lies in: toy.png.
"""

import argparse
import base64
import difflib
import html
import io
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np

from ce_clip import open_image
from negatives import KINDS, naming, run

COMPOSITIONAL = ("aro Relation", "aro Attribution", "valse Avg 11 files", "vlc Avg")
COMPOSITIONAL += ("sugarcrepe Avg", "pairs mean")
GREEN, RED = "#0a7d28", "#b3261e"  # true and false captions
SAMPLES = 50_000  # of the bootstrap


def new_figure(width: float, height: float):  # inches
    with naming("matplotlib", "installed (pip install matplotlib)"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def bars(path: Path, content: dict[str, list[float]]) -> None:
    """The mean of each name's values, with its 99 % bootstrap interval (Sec. 4.5)."""
    figure = new_figure(8, 1 + len(content))
    axes, rng = figure.subplots(), np.random.default_rng(0)
    for name, values in content.items():
        mean, values = np.mean(values), np.array(values)
        means = [rng.choice(values, len(values)).mean() for _ in range(SAMPLES)]
        low, high = np.quantile(means, [0.005, 0.995])
        print(f"{path} {' '.join(name.split())}: {mean:.4f} [{low:.4f}, {high:.4f}]")
        drawn = axes.barh(name, mean, xerr=[[mean - low], [high - mean]], ecolor="red")
        axes.bar_label(drawn, fmt="%.4g", label_type="center", color="white")
    axes.invert_yaxis()  # the first on top
    figure.savefig(path)


def curves(path: Path, log: list[dict], columns: list[str]) -> None:
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for column in columns:
        axes.plot([line["step"] for line in log], [line[column] for line in log], label=column)
    axes.legend()
    figure.savefig(path)


def pictures(path: Path, panels: list[tuple]) -> None:
    """Ten of the panels, from all over the list: path, box or None, lines of (text, colour)."""
    figure = new_figure(16, 10)
    for n, (image, box, lines) in enumerate(panels[:: 1 + len(panels) // 10], 1):
        axes = figure.add_subplot(5, 2, n)
        axes.imshow(open_image(image, box).resize((256, 256)))
        axes.axis("off")
        axes.set_anchor("W")
        for row, (text, color) in enumerate(lines):
            axes.text(275, 25 + 45 * row, text, color=color, in_layout=False)
    figure.savefig(path)


def draw_runs(rows: dict[str, dict], out: Path) -> None:
    configs, means = {}, {}
    for row in rows:
        run_folder = Path(row).parent
        if row.endswith(".pt") and (run_folder / "config.json").exists():  # a run of ce_clip.py
            configs[row] = json.loads((run_folder / "config.json").read_text())
            log = read_lines(run_folder / "log.jsonl")
            thresholds = [column for column in log[0] if column.startswith("threshold_")]
            name = "-".join(run_folder.parts[-2:])
            if thresholds:  # not for Eq. 1
                curves(out / f"fig5b-{name}.png", log, thresholds)
            curves(out / f"fig5d-{name}.png", log, ["itc", "imc", "cmr"])
    for row, cells in rows.items():
        label = [row]  # and the settings in which the runs differ
        for name, value in configs.get(row, {}).items():
            if name != "captions" and any(other[name] != value for other in configs.values()):
                label.append(f"{name} {value}")
        values = [cells[task]["value"] for task in COMPOSITIONAL if task in cells]
        values = [value for value in values if value is not None]
        if values:
            means["\n".join(label)] = [np.mean(values)]
    bars(out / "fig4-5a-5c-6.png", means)


def draw_items(items: list[dict], out: Path) -> None:
    values, decided = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for item in items:
        path, box = item["picture"]
        key = (path, box and tuple(box), item["positive"], item["negative"])
        decided[key][item["row"]] = "right" if item["right"] else "wrong"
        for what in ("similarity", "gap"):
            values[f"fig8-{item['benchmark']}-{what}"][item["row"]].append(item[what])
    for name, content in values.items():
        if "aro" in name or "pairs" in name:
            bars(out / f"{name}.png", content)
    panels = []
    for (path, box, positive, negative), rows in decided.items():
        if len(set(rows.values())) > 1:
            lines = [(f"{row}: {what}", "gray") for row, what in rows.items()]
            panels.append((path, box, [(positive, GREEN), (negative, RED), *lines]))
    pictures(out / "fig9-10.png", panels)


def draw_negatives(records: list[dict], images: Path, path: Path) -> None:
    panels = []
    for record in records:
        if record["relation"]:
            lines = [(f"{kind}: {record[kind]}", RED) for kind in KINDS if record.get(kind)]
            lines.insert(0, (record["caption"], GREEN))
            panels.append((images / record["image"], record.get("box"), lines))
    pictures(path, panels)


def write_page(records: list[dict], images: Path, path: Path, sample: int, seed: int) -> None:
    """A page that shows by itself, for each kind, a sample of negatives: the picture, all its
    captions (the one that was changed in green), and the negative, its new words in bold."""
    siblings = defaultdict(list)
    for record in records:
        siblings[record["image"]].append(record["caption"])
    style = "img{float:left;height:8em;margin:0 1em 1em 0} section{clear:both} b{color:black}"
    parts = [f"<!doctype html><meta charset=utf-8><title>{path.stem}</title><style>{style}</style>"]
    for kind in KINDS:
        made = [record for record in records if record.get(kind)]
        parts.append(f"<h2>{kind}: {len(made)} of {len(records)} captions</h2>")
        for record in random.Random(seed).sample(made, min(sample, len(made))):
            image = open_image(images / record["image"], record.get("box"))
            image.thumbnail((320, 160))
            image.save(jpeg := io.BytesIO(), "JPEG")
            source = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
            parts.append(f"<section><img src='{source}'>")
            for caption in siblings[record["image"]]:
                color = GREEN if caption == record["caption"] else "gray"
                parts.append(f"<div style='color:{color}'>{html.escape(caption)}</div>")
            new = marked(record["caption"], record[kind])
            parts.append(f"<div style='color:{RED}'>{new}</div></section>")
    path.write_text("\n".join(parts), encoding="utf-8")


def marked(caption: str, negative: str) -> str:
    """The negative as HTML, the words that the caption does not have there in bold."""
    old, new = caption.split(), negative.split()
    shown = []
    for what, _, _, start, end in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        text = html.escape(" ".join(new[start:end]))
        shown.append(text if what == "equal" else f"<b>{text}</b>")
    return " ".join(shown)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--results", type=Path, help="folder that eval_bench.py --out wrote")
    p.add_argument("--negatives", type=Path, help="a .jsonl of negatives.py")
    p.add_argument("--images", type=Path, default=".", help="picture folder of --negatives")
    p.add_argument("--out", type=Path, required=True, help="folder, or a page.html of --negatives")
    p.add_argument("--sample", type=int, default=20, help="negatives of a kind on the page")
    p.add_argument("--seed", type=int, default=0, help="of the sample")
    args = p.parse_args()
    if args.out.suffix == ".html":
        records = read_lines(args.negatives)
        write_page(records, args.images, args.out, args.sample, args.seed)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.results:
        results = json.loads((args.results / "results.json").read_text())
        draw_runs(results["benchmarks"]["table_5"], args.out)
        draw_items(read_lines(args.results / "items.jsonl"), args.out)
    if args.negatives:
        path = args.out / f"{args.negatives.resolve().parent.name}.png"
        draw_negatives(read_lines(args.negatives), args.images, path)


if __name__ == "__main__":
    run(main)
