"""Draw the paper's figures from what training and evaluation left on disk.

    python figures.py --results results --out figures     # a folder of eval_bench.py --out
    python figures.py --negatives data/toy/negatives_train.jsonl --images data/toy/images --out docs

Of the runs that were scored: their means, labelled with the settings in which they differ (Fig. 4,
5a, 5c, 6), thresholds (5b) and losses (5d) over the steps. Of the items: Fig. 8, 9 and 10. Fig. 2,
captions with their negatives, becomes OUT/FOLDER.png of the FOLDER the .jsonl lies in: toy.png.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch

from ce_clip import open_image
from negatives import KINDS, naming, run

COMPOSITIONAL = ("ARO-R", "ARO-A", "VALSE", "VL-CheckList", "SugarCrepe", "negatives")
GREEN, RED = "#0a7d28", "#b3261e"  # true and false captions


def bars(axes, content: dict[str, list[float]]) -> None:  # {name: [mean, low, high]}
    mean, low, high = zip(*content.values())
    errors = [[m - x for m, x in zip(mean, low)], [x - m for m, x in zip(mean, high)]]
    drawn = axes.barh(list(content), mean, xerr=errors, ecolor="red")
    axes.bar_label(drawn, fmt="%.4g", label_type="center", color="white")
    axes.invert_yaxis()  # the first on top


def curves(axes, content: dict[str, list[tuple]]) -> None:  # {label: [(x, y), ...]}
    for label, points in content.items():
        axes.plot(*zip(*points), label=label)
    axes.legend()


def picture(axes, content: tuple) -> None:  # path, box or None, lines of (text, colour)
    path, box, lines = content
    axes.imshow(open_image(path, box).resize((256, 256)))
    axes.axis("off")
    axes.set_anchor("W")
    for n, (text, color) in enumerate(lines):
        axes.text(275, 25 + 45 * n, text, color=color, in_layout=False)


def draw(path: Path, plot, panels: list[tuple], columns: int = 1, height: float = 4) -> None:
    """Draw (title, content) of each panel that has content with `plot`; `height` in inches."""
    with naming("matplotlib", "installed (pip install matplotlib)"):
        from matplotlib.figure import Figure
    panels = [(title, content) for title, content in panels if content]
    if not panels:
        print(f"{path} is not drawn: there is nothing to show")
        return
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8 * columns, height * rows), layout="constrained")
    for n, (title, content) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, n)
        axes.set_title(title)
        plot(axes, content)
    figure.savefig(path)
    print(path)


def draw_runs(tasks: dict[str, dict], out: Path) -> None:
    configs, logs, means = {}, {}, {}
    for row in dict.fromkeys(row for rows in tasks.values() for row in rows):
        folder = Path(row).parent
        if row.endswith(".pt") and (folder / "config.json").exists():  # a run of ce_clip.py
            configs[row] = json.loads((folder / "config.json").read_text())
            logs[row] = read_lines(folder / "log.jsonl")
    for row, config in configs.items():
        label = [row]
        for name, value in config.items():
            if name != "captions" and any(other[name] != value for other in configs.values()):
                label.append(f"{name} {value}")
        values = [tasks[name][row]["value"] for name in COMPOSITIONAL if name in tasks]
        values = [value for value in values if value is not None]
        if values:
            means["\n".join(label)] = [statistics.mean(values)] * 3
    draw(out / "fig4-5a-5c-6.png", bars, [("compositional tasks, mean %", means)])

    thresholds = [f"threshold_{kind}" for kind in KINDS]
    for name, keys in (("fig5b", thresholds), ("fig5d", ["itc", "imc", "cmr"])):
        panels = []
        for row, log in logs.items():
            there = [key for key in keys if log and key in log[0]]
            content = {key: [(line["step"], line[key]) for line in log] for key in there}
            panels.append((row, content))
        draw(out / f"{name}.png", curves, panels)


def interval(values: list[float], resamples: int = 50_000) -> list[float]:
    """[mean, low, high]: the 99 % bootstrap interval of the mean (Sec. 4.5)."""
    values = torch.tensor(values)
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(resamples):
        drawn = torch.randint(len(values), (len(values),), generator=generator)
        means.append(values[drawn].mean())
    bounds = torch.stack(means).quantile(torch.tensor([0.005, 0.995]))
    return [values.mean().item(), *bounds.tolist()]


def draw_fig_8(items: list[dict], path: Path) -> None:
    """How close a caption and its negative are, and how far apart for the picture."""
    similarity, gap = defaultdict(list), defaultdict(list)
    for item in items:
        if item["benchmark"] in ("aro", "pairs"):
            similarity[item["row"]].append(item["similarity"])
            gap[item["row"]].append(item["scores"][0] - item["scores"][1])
    panels = []
    for title, rows in (("S(T, T_hn)", similarity), ("S(I, T) - S(I, T_hn)", gap)):
        panels.append((title, {row: interval(values) for row, values in rows.items()}))
        for row, (mean, low, high) in panels[-1][1].items():
            print(f"{title} of {row}: {mean:.4f} [{low:.4f}, {high:.4f}]")
    draw(path, bars, panels)


def draw_items(items: list[dict], path: Path) -> None:
    """Fig. 9 and 10: twelve items that one row gets right, and another one wrong."""
    alike = defaultdict(list)
    for item in items:
        alike[item["image"], str(item["box"]), item["positive"], item["negative"]].append(item)
    panels = []
    for same in alike.values():
        if len({item["right"] for item in same}) > 1:
            lines = [(same[0]["positive"], GREEN), (same[0]["negative"], RED)]
            for item in same:
                lines.append((f"{item['row']}: {'right' if item['right'] else 'wrong'}", "gray"))
            panels.append(("", (item["image"], item["box"], lines)))
    draw(path, picture, panels[:: max(1, len(panels) // 12)][:12], columns=2, height=2)


def draw_negatives(records: list[dict], images: Path, path: Path) -> None:
    """Fig. 2: eight captions, from all over the file, that have a relation negative."""
    records = [record for record in records if record.get("relation")]
    panels = []
    for record in records[:: max(1, len(records) // 8)][:8]:
        lines = [(f"{kind}: {record[kind]}", RED) for kind in KINDS if record.get(kind)]
        lines.insert(0, (record["caption"], GREEN))
        panels.append(("", (images / record["image"], record.get("box"), lines)))
    draw(path, picture, panels, columns=2, height=2)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--results", type=Path, help="folder that eval_bench.py --out wrote")
    source.add_argument("--negatives", type=Path, help="a .jsonl of negatives.py")
    p.add_argument("--images", type=Path, default=".", help="picture folder of --negatives")
    p.add_argument("--out", type=Path, required=True, help="folder of the figures")
    args = p.parse_args()
    with naming(args.results or args.negatives, "what eval_bench.py or negatives.py writes"):
        args.out.mkdir(parents=True, exist_ok=True)
        if args.results:
            draw_runs(json.loads((args.results / "results.json").read_text())["tasks"], args.out)
            items = read_lines(args.results / "items.jsonl")
            draw_fig_8(items, args.out / "fig8.png")
            draw_items(items, args.out / "fig9-10.png")
        else:
            path = args.out / f"{args.negatives.resolve().parent.name}.png"
            draw_negatives(read_lines(args.negatives), args.images, path)


if __name__ == "__main__":
    run(main)
