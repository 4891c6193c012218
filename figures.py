"""Draw the paper's figures from what training and evaluation left on disk.

    python figures.py --results results --out figures     # a folder of eval_bench.py --out
    python figures.py --negatives data/toy/negatives_train.jsonl --images data/toy/images --out docs

Fig. 4, 5, 6 need config.json and log.jsonl beside the checkpoints that the results name. Fig. 2,
captions with their negatives, becomes OUT/FOLDER.png of the FOLDER the .jsonl lies in: toy.png.
"""

import argparse
import json
import statistics
from collections import defaultdict
from math import nan
from pathlib import Path

from ce_clip import FREE, open_image
from negatives import KINDS, naming, run

COMPOSITIONAL = ("ARO-R", "ARO-A", "VALSE", "VL-CheckList", "SugarCrepe")
GREEN, RED = "#0a7d28", "#b3261e"  # true and false captions


def mean_of_tasks(tasks: dict[str, dict], row: str) -> float:
    """Of the compositional tasks, or else of "negatives"; nulls are left out."""
    names = [name for name in COMPOSITIONAL if name in tasks] or ["negatives"]
    values = [tasks[name][row]["value"] for name in names if name in tasks]
    return statistics.mean([value for value in values if value is not None] or [nan])


def differing_in(configs: dict[str, dict], *settings: str) -> dict[str, list]:
    """{row: its values of `settings`} of the most rows that differ in these and in nothing else."""
    groups = defaultdict(dict)
    for row, config in configs.items():
        others = {k: v for k, v in config.items() if k not in (*FREE, *settings)}
        groups[str(others)][row] = [config[name] for name in settings]
    groups = [rows for rows in groups.values() if len({str(v) for v in rows.values()}) > 1]
    return max(groups, key=len, default={})


def bars(axes, content: dict[str, list[float]]) -> None:  # {name: [mean, low, high]}
    mean, low, high = zip(*content.values())
    errors = [[m - x for m, x in zip(mean, low)], [x - m for m, x in zip(mean, high)]]
    drawn = axes.barh(list(content), mean, xerr=errors, ecolor="red")
    axes.bar_label(drawn, fmt="%.4g", label_type="center", color="white")
    axes.invert_yaxis()  # the first on top


def curves(axes, content: dict[str, list[tuple]]) -> None:  # {label: [(x, y), ...]}
    for label, points in content.items():
        axes.plot(*zip(*sorted(points)), ".-", label=label)
    axes.legend()


def picture(axes, content: tuple) -> None:  # path, box or None, lines of (text, colour)
    path, box, lines = content
    axes.imshow(open_image(path, box).resize((256, 256)))
    axes.axis("off")
    axes.set_anchor("W")
    for n, (text, color) in enumerate(lines):
        axes.text(275, 25 + 45 * n, text, color=color, in_layout=False)


def draw(path: Path, plot, panels: list[tuple], needs: str, columns=1, height=4.0) -> None:
    """Draw (title, content) of each panel that has content with `plot`; `height` in inches."""
    with naming("matplotlib", "installed (pip install matplotlib)"):
        from matplotlib.figure import Figure
    panels = [(title, content) for title, content in panels if content]
    if not panels:
        print(f"{path} is not drawn, it needs {needs}")
        return
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8 * columns, height * rows), layout="constrained")
    for n, (title, content) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, n)
        axes.set_title(title)
        plot(axes, content)
    figure.savefig(path)
    print(path)


def draw_results(results: dict, out: Path) -> None:
    configs, logs, means = {}, {}, {}
    for row in dict.fromkeys(row for rows in results["benchmarks"].values() for row in rows):
        folder, means[row] = Path(row).parent, mean_of_tasks(results["tasks"], row)
        if row.endswith(".pt") and (folder / "config.json").exists():  # a run of ce_clip.py
            configs[row] = json.loads((folder / "config.json").read_text())
            logs[folder] = read_lines(folder / "log.jsonl")

    title = "compositional tasks, mean %"
    for name, setting in (("fig4", "kinds"), ("fig5a", "threshold"), ("fig5c", "upper_bound")):
        content = {}
        for row, [value] in differing_in(configs, setting).items():
            label = f"{setting} {'adaptive' if value is None else value}\n{row}"
            content[label] = [means[row]] * 3
        draw(out / f"{name}.png", bars, [(title, content)], f"runs that differ in {setting} alone")
    content = defaultdict(list)
    for row, [alpha, beta] in differing_in(configs, "alpha", "beta").items():
        content[f"beta {beta}"].append((alpha, means[row]))
    needs = "runs that differ in alpha and beta alone"
    draw(out / "fig6.png", curves, [(f"{title}, over alpha", content)], needs)

    thresholds = [f"threshold_{kind}" for kind in KINDS]
    for name, columns in (("fig5b", thresholds), ("fig5d", ["itc", "imc", "cmr"])):
        panels = []
        for folder, log in logs.items():
            there = [key for key in columns if log and key in log[0]]
            panels.append(
                (folder, {key: [(line["step"], line[key]) for line in log] for key in there})
            )
        draw(out / f"{name}.png", curves, panels, f"log.jsonl with {columns[0]}")

    panels = []
    for benchmark, rows in results["fig_8"].items():
        for name, title in (("similarity", "S(T, T_hn)"), ("gap", "S(I, T) - S(I, T_hn)")):
            panels.append((f"{benchmark}: {title}", {row: rows[row][name] for row in rows}))
    draw(out / "fig8.png", bars, panels, "results of ARO or of --pairs")


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
    panels = panels[:: max(1, len(panels) // 12)][:12]
    draw(path, picture, panels, "rows that disagree on an item", columns=2, height=2)


def draw_negatives(records: list[dict], images: Path, path: Path) -> None:
    """Fig. 2: eight captions, from all over the file, that have a relation negative."""
    records = [record for record in records if record.get("relation")]
    panels = []
    for record in records[:: max(1, len(records) // 8)][:8]:
        lines = [(f"{kind}: {record[kind]}", RED) for kind in KINDS if record.get(kind)]
        lines.insert(0, (record["caption"], GREEN))
        panels.append(("", (images / record["image"], record.get("box"), lines)))
    draw(path, picture, panels, "relation negatives", columns=2, height=2)


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
            draw_results(json.loads((args.results / "results.json").read_text()), args.out)
            draw_items(read_lines(args.results / "items.jsonl"), args.out / "fig9-10.png")
        else:
            path = args.out / f"{args.negatives.resolve().parent.name}.png"
            draw_negatives(read_lines(args.negatives), args.images, path)


if __name__ == "__main__":
    run(main)
