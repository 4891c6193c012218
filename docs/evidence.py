"""The tables of docs/evidence.md and docs/ablations.md, from what evidence.sh and ablate.sh left.

    python docs/evidence.py runs/photographs/terms --csv evidence.csv
    python docs/evidence.py runs/photographs/terms --less eq8    # differences to the runs of Eq. 8
    python docs/evidence.py docs/ablations.csv                   # the tables of such a CSV

A folder holds what eval_bench.py --blind wrote, in a folder for each seed. A line of the CSV is one
number: its mean and standard deviation over seeds, and what each seed has.
"""

import argparse
import csv
import functools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

SETTINGS = {  # folder of a run, without its seed
    "base": "base",
    "eq1": "Eq. 1",
    "itc": "Eq. 1",
    "eq2": "Eq. 2",
    "itc-hn": "Eq. 2",
    "imc": "Eq. 2 + IMC",
    "cmr": "Eq. 2 + CMR",
    "eq8": "Eq. 8",
    "ce-clip": "Eq. 8",
    "imc-released": "Eq. 8, IMC as released",
    "eq8-centred": "Eq. 8, centred images",
    "eq2-look": "Eq. 2 + look",
    "look": "Eq. 2 + look",
    "eq2-look-0.1": "Eq. 2 + look, gamma 0.1",
    "eq2-look-0.5": "Eq. 2 + look, gamma 0.5",
    "eq2-look-unweighted": "Eq. 2 + look, unweighted",
    "look-unweighted": "Eq. 2 + look, unweighted",
    "eq2-look-own-length": "Eq. 2 + look, own length",
    "eq2-look-residual": "Eq. 2 + look, residual",
    "cmr-look": "Eq. 2 + CMR + look",
    "eq8-look": "Eq. 8 + look",
    "eq8-look-unweighted": "Eq. 8 + look, unweighted",
    "imc-released-look": "Eq. 8, IMC as released + look",
    "relation": "Eq. 8, relation only",
    "attribute": "Eq. 8, attribute only",
    "action": "Eq. 8, action only",
    "object": "Eq. 8, object only",
    "threshold-2": "Eq. 8, threshold 2",
    "threshold-5": "Eq. 8, threshold 5",
    "threshold-10": "Eq. 8, threshold 10",
    "bound-1": "Eq. 8, u = 1",
    "bound-2": "Eq. 8, u = 2",
    "bound-5": "Eq. 8, u = 5",
    "bound-20": "Eq. 8, u = 20",
    "alpha-0.1": "Eq. 8, alpha 0.1",
    "alpha-0.4": "Eq. 8, alpha 0.4",
    "alpha-0.8": "Eq. 8, alpha 0.8",
    "beta-0.2": "Eq. 8, beta 0.2",
    "beta-0.8": "Eq. 8, beta 0.8",
    "beta-1.6": "Eq. 8, beta 1.6",
    "hn-relation": "Eq. 2, relation only",
    "cmr-relation": "Eq. 2 + CMR, relation only",
    "cmr-bound-2": "Eq. 2 + CMR, u = 2",
    "cmr-threshold-5": "Eq. 2 + CMR, threshold 5",
    "eq8, WiSE 0.5": "Eq. 8, half-way from the base",
    "eq2-look, WiSE 0.5": "Eq. 2 + look, half-way from the base",
}
KINDS = ["relation", "attribute", "action", "object"]
GROUPS = [("pairs", kind) for kind in [*KINDS, "number"]]
GROUPS += [("sugarcrepe", ""), ("valse", "")]  # all of their items
UNTRAINED = [("pairs", "number"), ("sugarcrepe", ""), ("valse", "")]  # no run has seen such items
GROUPS += [("untrained", "")]  # these three together
TOLD = ["text misleads", "text tells little", "text tells"]  # by the margin of docs/text_only.py
BY_TEXT = [("by text", f"{kinds}, {told}") for kinds in ("relation", "others") for told in TOLD]
CELLS = [("captions", f"{way} R@{k}", "recall in %") for way in ("I2T", "T2I") for k in (1, 5, 10)]
CELLS += [("sugarcrepe_pp", f"TOT {way}", "TOT and ITT in %") for way in ("replace", "swap")]
DECISIONS = {"right": "accuracy in %", "blind": "blind accuracy in %"}
DECISIONS |= {"grounded": "grounded gain in points", "looking": "looking in %"}
DECISIONS |= {"any_other": "looking beside any other image in %"}
IMAGES = {  # whether an item is right with its own image, and with another one
    (True, True): "right with both images",
    (True, False): "right with its own image only",
    (False, True): "right with the other image only",
    (False, False): "wrong with both images",
}
KEPT = ["group", "image", *DECISIONS, "similarity", "gap"]  # of a line of items.jsonl
SAMPLES = 10_000  # of the bootstrap


def read_margins(path: Path) -> dict[tuple, str]:
    """{(kind, caption, negative): which of TOLD it is}, from what docs/text_only.py wrote."""
    told = {}
    with path.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            margin = float(line["margin"])
            key = (line["kind"], line["caption"], line["negative"])
            told[key] = TOLD[0] if margin <= -0.5 else TOLD[1] if margin < 0.5 else TOLD[2]
    return told


def read(folder: Path, told: dict[tuple, str]) -> dict[str, dict[str, dict]]:
    """runs[name of a setting][seed]: {"cells": {(benchmark, column): a cell of results.json},
    "items": {benchmark: lines of items.jsonl}, "log": the last line of a run's log with L_cmr}"""
    rows = defaultdict(lambda: {"cells": {}, "items": defaultdict(list), "log": {}})
    for path in sorted(folder.glob("*/results.json")):
        for benchmark, tables in json.loads(path.read_text())["benchmarks"].items():
            for row, columns in tables.items():
                for column, cell in columns.items():
                    rows[row]["cells"][benchmark, column] = cell
        with path.with_name("items.jsonl").open() as file:
            for line in map(json.loads, file):
                if "other_scores" in line:
                    line["grounded"] = line["right"] - line["blind"]
                    lead, other_lead = (a - b for a, b in (line["scores"], line["other_scores"]))
                    line["any_other"] = 0.5 if lead == other_lead else float(lead > other_lead)
                items = rows[line["row"]]["items"]
                items[line["benchmark"]].append({key: line[key] for key in KEPT if key in line})
                which = told.get((line["group"], line["positive"], line["negative"]))
                if which and line["benchmark"] == "pairs":
                    kinds = "relation" if line["group"] == "relation" else "others"
                    items["by text"].append(items["pairs"][-1] | {"group": f"{kinds}, {which}"})
    runs = defaultdict(dict)
    for row, run in rows.items():  # runs/photographs/eq8-2/epoch_1.pt, WiSE 0.5
        path, comma, wise = row.partition(", ")
        run_folder = Path(path).parent
        config = json.loads((run_folder / "config.json").read_text())
        if "cmr" in config["losses"] and not wise:
            run["log"] = json.loads((run_folder / "log.jsonl").read_text().splitlines()[-1])
        name = run_folder.name.removesuffix(f"-{config['seed']}") + comma + wise
        runs[name]["base" if name == "base" else config["seed"]] = run
    return {SETTINGS.get(name, name): runs[name] for name in sorted(runs, key=order)}


def order(name: str) -> int:
    return list(SETTINGS).index(name) if name in SETTINGS else len(SETTINGS)


def of_group(run: dict, benchmark: str, group: str) -> list[dict]:
    """The decisions of a group, or of all groups."""
    if benchmark == "untrained":
        return [line for name, of in UNTRAINED for line in of_group(run, name, of)]
    return [line for line in run["items"][benchmark] if group in ("", line["group"])]


def measured(run: dict, with_mean: bool) -> dict[tuple, float]:
    """{(benchmark, group, items, measure): value} of one run."""
    values = {}
    for benchmark, group in [*GROUPS, *BY_TEXT]:
        lines = of_group(run, benchmark, group)
        if not lines:
            continue
        for what, measure in DECISIONS.items():
            measure += ", by text" if benchmark == "by text" else ""
            place = (benchmark, group, len(lines), measure)
            values[place] = 100 * np.mean([line[what] for line in lines])
        if benchmark == "pairs":
            own_and_other = [(line["right"], line["blind"]) for line in lines]
            for images, name in IMAGES.items():
                place = ("pairs", name, len(lines), f"{group}: items in %")
                values[place] = 100 * own_and_other.count(images) / len(lines)
    cells = run["cells"]
    if with_mean:
        cell = cells["pairs", "mean"]
        group = f"mean of {len({line['group'] for line in run['items']['pairs']})} kinds"
        of_cell = {"right": cell["value"], "blind": cell["blind"], "looking": cell["looking"]}
        of_cell["grounded"] = cell["value"] - cell["blind"]
        for what, value in of_cell.items():
            values["pairs", group, cell["scored"], DECISIONS[what]] = value
    for benchmark, column, measure in CELLS:
        cell = cells.get((benchmark, column))
        if cell and cell["value"] is not None:
            values[benchmark, column, cell["scored"], measure] = cell["value"]
    lines = [line for line in run["items"]["sugarcrepe_pp"] if line["image"]]  # two of each item
    if lines:
        both = [a["right"] and b["right"] for a, b in zip(lines[::2], lines[1::2])]
        values["sugarcrepe_pp", "ITT", len(both), "TOT and ITT in %"] = 100 * np.mean(both)
    lines = run["items"]["pairs"]
    for what in ("similarity", "gap"):  # Fig. 8
        place = ("pairs", what, len(lines), "cosine x 100")
        values[place] = 100 * np.mean([line[what] for line in lines])
    for kind in KINDS:  # Eq. 5 and 7 at the last step
        if f"threshold_{kind}" in run["log"]:
            values["log", kind, "", "threshold in logits"] = run["log"][f"threshold_{kind}"]
    return values


def csv_lines(figure: str, runs: dict[str, dict], with_mean: bool) -> list[dict]:
    lines = []
    for setting, of_seeds in runs.items():
        values = defaultdict(list)
        for run in of_seeds.values():
            for place, value in measured(run, with_mean).items():
                values[place].append(value)
        for (benchmark, group, items, measure), numbers in values.items():
            line = {"figure": figure, "setting": setting, "seeds": len(numbers)}
            line |= {"benchmark": benchmark, "group": group, "items": items, "measure": measure}
            line |= {"mean": f"{np.mean(numbers):.1f}", "std": ""}
            if len(numbers) > 1:
                line["std"] = f"{np.std(numbers, ddof=1):.1f}"
            lines.append(line | {"values": " ".join(f"{number:.1f}" for number in numbers)})
    return lines


def print_tables(lines: list[dict]) -> None:
    """A table for each measure: a row for each setting, a column for each group of items."""
    tables = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        column = line["group"] or line["benchmark"]
        if line["items"]:
            column = f"{column} ({line['items']})"
        text = line["mean"] + (f" ± {line['std']}" if line["std"] else "")
        tables[line["measure"]][line["setting"]] |= {"seeds": line["seeds"], column: text}
    for measure, rows in tables.items():
        print_table(measure, rows)


def print_table(title: str, rows: dict[str, dict[str, str]]) -> None:
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(str(cells.get(column, '')) for column in columns)} |")


@functools.cache
def bootstrap_samples(n: int) -> np.ndarray:
    """How often each of n images is in each sample: (SAMPLES, n)."""
    return np.random.default_rng(0).multinomial(n, np.ones(n) / n, SAMPLES).astype(np.float32)


def difference(runs: dict, others: dict, what: str, groups: list[tuple]) -> dict[str, str]:
    """The mean difference of `what`, in points, between runs of one seed, and its 95 % interval by
    a bootstrap over images. The interval does not contain how seeds differ. Bold: 0 is outside."""
    cells = {}
    for benchmark, group in groups:
        of_image = defaultdict(list)
        for seed in others:
            run = runs.get(seed, runs.get("base"))  # the base is compared with each seed
            if run:
                pairs = zip(
                    of_group(run, benchmark, group), of_group(others[seed], benchmark, group)
                )
                for line, other in pairs:
                    of_image[line["image"][0]].append(100.0 * (line[what] - other[what]))
        if of_image:
            sums = np.array([sum(values) for values in of_image.values()])
            counts = np.array([len(values) for values in of_image.values()])
            drawn = bootstrap_samples(len(sums))
            low, high = np.quantile(drawn @ sums / (drawn @ counts), [0.025, 0.975])
            text = f"{sums.sum() / counts.sum():+.1f} [{low:+.1f}, {high:+.1f}]"
            cells[group or benchmark] = f"**{text}**" if low * high > 0 else text
    return cells


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("paths", type=Path, nargs="+", help="folders of results, or CSVs of this script")
    p.add_argument("--csv", type=Path, help="write the numbers of the folders here")
    p.add_argument("--less", help="print differences to this setting: eq2, eq8 ...")
    p.add_argument("--mean", action="store_true", help="also the mean over all kinds of --pairs")
    p.add_argument("--text-only", type=Path, help="items apart by what docs/text_only.py wrote")
    args = p.parse_args()
    told = read_margins(args.text_only) if args.text_only else {}
    lines = []
    for path in args.paths:
        if path.suffix == ".csv":
            with path.open() as file:
                lines += csv.DictReader(file)
        else:
            runs = read(path, told)
            lines += csv_lines(path.name, runs, args.mean)
            for what, measure in DECISIONS.items():
                if args.less:
                    less = SETTINGS[args.less]
                    rest = {name: of for name, of in runs.items() if name != less}
                    for groups in (GROUPS, BY_TEXT) if told else (GROUPS,):
                        rows = {}
                        for name, of in rest.items():
                            rows[name] = difference(of, runs[less], what, groups)
                        print_table(f"{path.name}: {measure}, less that of {less}", rows)
    print_tables(lines)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
