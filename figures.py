"""Draw the paper's figures from what training and evaluation left on disk.

    python figures.py --results results --out figures     # a folder of eval_bench.py --out
    python figures.py --csv docs/evidence.csv --out docs/evidence  # means over seeds
    python figures.py --negatives data/toy/negatives_train.jsonl --images data/toy/images --out docs
    python figures.py --negatives FILE.jsonl --images DIR --out page.html  # to read them by eye

Fig. 4, 5a, 5c and 6 are one plot with a panel for each task and a bar for each checkpoint. Fig.
5b and 5d show what each run has logged, Fig. 8, 9 and 10 the items. Fig. 2, captions with their
negatives, is FOLDER.png of the FOLDER that the .jsonl lies in: toy.png.
"""

import argparse
import base64
import csv
import difflib
import html
import io
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from files import ImagePart, is_there, one_line_errors, open_image, run_main, say
from negatives import KINDS

TASKS = {"aro": ["Relation", "Attribution"], "valse": ["Avg 11 files"], "vlc": ["Avg"]}
TASKS |= {"sugarcrepe": ["Avg"], "pairs": [*KINDS, "mean"]}
ACCURACY, BLIND, LOOKING = "accuracy in %", "blind accuracy in %", "looking in %"
COSINE = "cosine x 100"
GREEN, RED = "#0a7d28", "#b3261e"  # true and false captions
BLUE, DARK, ORANGE, TEAL = "#56b4e9", "#00446b", "#d55e00", "#009e73"  # all can tell them apart
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0}  # behind a number
STD = "± std of several seeds"
SAMPLES = 50_000  # of the bootstrap


def new_figure(width: float, height: float):  # in inches of 100 pixels
    with one_line_errors("matplotlib is not installed (pip install matplotlib)"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> None:
    """With 256 colours: a file of a third of the size."""
    figure.savefig(png := io.BytesIO())
    Image.open(png).convert("RGB").quantize().save(path, optimize=True)


def bars(path: Path, label: str, panels: dict, blind: dict, error=STD) -> None:
    """Panels side by side: {title: {name: (value, low, high)}}, where low and high are the ends of
    an error bar. A darker bar inside shows the value of `blind`, if the title is in it."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    rows = math.ceil(len(panels) / 5)
    columns = math.ceil(len(panels) / rows)
    figure = new_figure(8, 0.8 + rows * (0.6 + 0.23 * len(names)))
    drawn = [bar for panel in [*panels.values(), *blind.values()] for bar in panel.values()]
    start = 40 if "%" in label and np.min(drawn) >= 40 else 0
    for n, (title, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, n + 1)
        y = [names.index(name) for name in panel]
        value, low, high = np.array(list(panel.values())).T
        of_panel = axes.barh(y, value, xerr=(value - low, high - value), color=BLUE, label=label)
        axes.bar_label(of_panel, fmt="%.1f", padding=2, fontsize=8, bbox=WHITE)
        if title in blind:
            value = [blind[title][name][0] for name in panel]
            axes.barh(y, value, height=0.35, color=DARK, label="blind: with another item's image")
        end = max(high)
        if "%" in label:
            axes.axvline(50, color=ORANGE, linestyle="--", label="chance: 50 %")
            axes.set_xticks(range(start, 101, 20))
            end = np.max(drawn)  # the panels have one scale
        axes.set_xlim(start, end + 0.5 * (end - start))  # room for the numbers
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        axes.set_yticks(range(len(names)), names if n % columns == 0 else [])
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    figure.supxlabel(f"{label}; the axis starts at {start}; error bars: {error}", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(figure, path)


def curves(path: Path, title: str, label: str, log: list[dict], columns: list[str]) -> None:
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for column, color in zip(columns, [DARK, ORANGE, TEAL, BLUE, "black"]):
        values = [line[column] for line in log]
        axes.plot([line["step"] for line in log], values, color=color, label=column)
    axes.set(title=title, xlabel="training step", ylabel=label)
    axes.legend()
    save(figure, path)


def image_sheet(path: Path, panels: list[tuple]) -> None:
    """Ten of the panels, from all over the list: an ImagePart, lines of (text, colour)."""
    figure = new_figure(16, 10)
    for n, (image, lines) in enumerate(panels[:: 1 + len(panels) // 10], 1):
        axes = figure.add_subplot(5, 2, n)
        axes.imshow(open_image(*image).resize((256, 256)))
        axes.axis("off")
        axes.set_anchor("W")
        for row, (text, color) in enumerate(lines):
            axes.text(275, 25 + 45 * row, text, color=color, in_layout=False)
    save(figure, path)


def draw_accuracies(lines: list[dict], out: Path) -> None:
    """A plot for each figure and measure. The lines are those of docs/evidence.csv."""
    panels = defaultdict(lambda: defaultdict(dict))  # [figure, measure][title][setting]
    for line in lines:
        title = f"{line['benchmark']} {line['group']}".removeprefix("pairs ").strip()
        title = f"{title}\n({line['items']} items)"
        mean, std = float(line["mean"]), float(line["std"] or 0)
        place = panels[line["figure"], line["measure"]][title]
        place[line["setting"]] = (mean, mean - std, mean + std)
    for figure, measure in list(panels):
        if measure in (ACCURACY, LOOKING, COSINE):
            path = out / f"{figure}-{measure.split()[0]}.png"
            blind = panels[figure, BLIND] if measure == ACCURACY else {}
            bars(path, measure, panels[figure, measure], blind)


def short(row: str) -> str:
    """ "runs/coco/epoch_5.pt" -> "coco/epoch_5" """
    return "/".join(Path(row).parts[-3:]).removeprefix("runs/").replace(".pt", "")


def draw_runs(benchmarks: dict[str, dict], out: Path) -> None:
    """Fig. 4, 5a, 5c, 6, with a bar for each checkpoint; and Fig. 5b, 5d of each run."""
    lines = []
    for benchmark, groups in TASKS.items():
        for row, cells in benchmarks.get(benchmark, {}).items():
            for group in groups:
                cell = cells.get(group) or {}
                line = {"figure": "fig4-5a-5c-6", "setting": short(row), "std": ""}
                line |= {"benchmark": benchmark, "group": group, "items": cell.get("scored")}
                for measure, name in ((ACCURACY, "value"), (BLIND, "blind"), (LOOKING, "looking")):
                    if cell.get(name) is not None:
                        lines.append(line | {"measure": measure, "mean": cell[name]})
    if not lines:
        print("no Fig. 4 to 6: no average of a benchmark has a value")
    draw_accuracies(lines, out)
    for folder in {Path(row).parent for rows in benchmarks.values() for row in rows}:
        if (folder / "log.jsonl").exists():  # a run of ce_clip.py
            log = read_lines(folder / "log.jsonl")
            run = "-".join(folder.parts[-2:])
            thresholds = [column for column in log[0] if column.startswith("threshold_")]
            if thresholds:  # a run of Eq. 1 has none
                curves(out / f"fig5b-{run}.png", run, "threshold in logits", log, thresholds)
            losses = ["itc", "imc", "cmr"]
            curves(out / f"fig5d-{run}.png", run, "loss, without its weight", log, losses)


def draw_items(items: list[dict], out: Path) -> None:
    """Fig. 8, and Fig. 9 and 10: items on which the checkpoints disagree."""
    values = defaultdict(list)
    decided = defaultdict(lambda: {"right": [], "wrong": []})
    for item in items:
        if not item["image"]:  # SugarCrepe++'s text-only task
            continue
        image = ImagePart(*item["image"])
        image = image._replace(box=image.box and tuple(image.box))
        name, answer = short(item["row"]), "right" if item["right"] else "wrong"
        pair = (item["benchmark"], image, item["positive"], item["negative"])
        decided[pair][answer].append(name)
        if item["benchmark"] in ("aro", "pairs"):
            for what in ("similarity", "gap"):
                values[item["benchmark"], what, name].append(100 * item[what])
    figures = defaultdict(lambda: defaultdict(dict))
    for (benchmark, what, name), numbers in values.items():
        mean, low, high = interval(np.array(numbers))
        print(f"{benchmark} {what} x 100, {name}: {mean:.2f} [{low:.2f}, {high:.2f}]")
        figures[benchmark][what][name] = (mean, low, high)
    for benchmark, panels in figures.items():
        bars(out / f"fig8-{benchmark}.png", COSINE, panels, {}, "99 % bootstrap interval")
    sheet = []
    for (_, image, positive, negative), rows in decided.items():
        if rows["right"] and rows["wrong"]:
            lines = [(f"{answer}: {', '.join(of)}", "gray") for answer, of in rows.items()]
            sheet.append((image, [(positive, GREEN), (negative, RED), *lines]))
    if sheet:
        image_sheet(out / "fig9-10.png", sheet)
    else:
        print("no Fig. 9 and 10: there is no item on which the checkpoints disagree")


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean, and the ends of its 99 % bootstrap interval (Sec. 4.5)."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(SAMPLES)]
    low, high = np.quantile(means, [0.005, 0.995])
    return values.mean(), low, high


def draw_negatives(records: list[dict], images: Path, path: Path) -> None:
    sheet = []
    for record in records:
        if record["relation"]:
            lines = [(f"{kind}: {record[kind]}", RED) for kind in KINDS if record.get(kind)]
            lines.insert(0, (record["caption"], GREEN))
            sheet.append((ImagePart(images / record["image"], record.get("box")), lines))
    image_sheet(path, sheet)


def write_page(records: list[dict], images: Path, path: Path, sample: int, seed: int) -> None:
    """A page that shows, for each kind, a sample of negatives: the image, all of its captions with
    the one that was changed in green, and the negative with its new words in bold."""
    siblings = defaultdict(list)
    for record in records:
        siblings[record["image"]].append(record["caption"])
    style = "img{float:left;height:8em;margin:0 1em 1em 0} section{clear:both} b{color:black}"
    parts = [f"<!doctype html><meta charset=utf-8><title>{path.stem}</title><style>{style}</style>"]
    for kind in KINDS:
        made = [record for record in records if record.get(kind)]
        parts.append(f"<h2>{kind}: {len(made)} of {len(records)} captions</h2>")
        for record in random.Random(seed).sample(made, min(sample, len(made))):
            part = ImagePart(images / record["image"], record.get("box"))
            if not is_there(*part):
                say(f"left out: {part.path} is absent, or does not have the region {part.box}")
                continue
            image = open_image(*part)
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
    """The negative as HTML; the words that the caption does not have there are bold."""
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
    p.add_argument("--csv", type=Path, help="a table of docs/evidence.py")
    p.add_argument("--negatives", type=Path, help="a .jsonl of negatives.py")
    p.add_argument("--images", type=Path, default=".", help="image folder of --negatives")
    p.add_argument("--out", type=Path, required=True, help="folder, or a page.html of --negatives")
    p.add_argument("--sample", type=int, default=20, help="negatives of a kind on the page")
    p.add_argument("--seed", type=int, default=0, help="of the sample")
    args = p.parse_args()
    if not (args.results or args.csv or args.negatives):
        p.error("it needs one of --results, --csv and --negatives")
    if args.out.suffix == ".html" and not args.negatives:
        p.error("a page.html shows --negatives")
    if args.out.suffix == ".html":
        records = read_lines(args.negatives)
        write_page(records, args.images, args.out, args.sample, args.seed)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.csv:
        with args.csv.open() as file:
            draw_accuracies(list(csv.DictReader(file)), args.out)
    if args.results:
        benchmarks = json.loads((args.results / "results.json").read_text())["benchmarks"]
        draw_runs(benchmarks, args.out)
        draw_items(read_lines(args.results / "items.jsonl"), args.out)
    if args.negatives:
        path = args.out / f"{args.negatives.resolve().parent.name}.png"
        draw_negatives(read_lines(args.negatives), args.images, path)


if __name__ == "__main__":
    run_main(main)
