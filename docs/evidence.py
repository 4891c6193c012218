"""The tables of docs/evidence.md, from what docs/evidence.sh has left.

    python docs/evidence.py runs/photographs/results
    python docs/evidence.py runs/photographs/results-old eq8

Differences are those to Eq. 2, or to the runs of the setting that is named.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

SETTINGS = {  # folder of a run, without its seed
    "base": "base",
    "eq1": "Eq. 1",
    "eq2": "Eq. 2",
    "imc": "Eq. 2 + IMC",
    "cmr": "Eq. 2 + CMR",
    "eq8": "Eq. 8",
    "imc-released": "Eq. 8, IMC as released",
    "cmr-bound-2": "Eq. 2 + CMR, u = 2",
    "eq8-bound-2": "Eq. 8, u = 2",
    "eq8-old": "Eq. 8, old negatives",
    "eq8, WiSE 0.5": "Eq. 8, half-way from the base",
}
KINDS = ["relation", "attribute", "action", "object"]
GROUPS = [("pairs", kind) for kind in [*KINDS, "number"]]
GROUPS += [("sugarcrepe", ""), ("valse", "")]  # all of their items
COLUMNS = [("captions", f"{way} R@{k}") for way in ("I2T", "T2I") for k in (1, 5, 10)]
COLUMNS += [("sugarcrepe_pp", "TOT replace"), ("sugarcrepe_pp", "TOT swap")]
SAMPLES = 10_000  # of the bootstrap


def read(folder: Path) -> dict[str, dict[str, dict]]:
    """runs[folder of a run, without its seed][seed]: {"cells": {(benchmark, column): value},
    "items": {benchmark: lines of items.jsonl}, "log": the last line of the run's log}"""
    rows = defaultdict(lambda: {"cells": {}, "items": defaultdict(list)})
    for path in sorted(folder.glob("*/results.json")):
        for benchmark, found in json.loads(path.read_text())["benchmarks"].items():
            for row, columns in found.items():
                for column, cell in columns.items():
                    rows[row]["cells"][benchmark, column] = cell["value"]
        with path.with_name("items.jsonl").open() as file:
            for line in map(json.loads, file):
                rows[line["row"]]["items"][line["benchmark"]].append(line)
    runs = defaultdict(dict)
    for row, run in rows.items():  # runs/photographs/eq8-2/epoch_1.pt, WiSE 0.5
        path, *wise = row.split(", ")
        run["log"] = json.loads(Path(path).with_name("log.jsonl").read_text().splitlines()[-1])
        name = Path(path).parent.name
        name, seed = name.rsplit("-", 1) if "-" in name else (name, "")
        runs[", ".join([name, *wise])][seed] = run
    return runs


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    text = f"{np.mean(values):.1f}"
    return f"{text} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else text


def of_group(runs: dict[str, dict], benchmark: str, group: str) -> dict[str, list[dict]]:
    """{seed: lines of the group, or of all groups}"""
    lines = {}
    for seed, run in runs.items():
        lines[seed] = [x for x in run["items"][benchmark] if group in ("", x["group"])]
    return lines


def accuracies(runs: dict[str, dict]) -> dict[str, str]:
    """Accuracy / blind accuracy / looking, in %."""
    cells = {"seeds": str(len(runs))}
    for benchmark, group in GROUPS:
        lines = of_group(runs, benchmark, group)
        number = len(next(iter(lines.values())))
        if number:
            texts = []
            for what in ("right", "blind", "looking"):
                values = [100 * np.mean([x[what] for x in seed]) for seed in lines.values()]
                texts.append(spread(values))
            cells[f"{group or benchmark} ({number})"] = " / ".join(texts)
    return cells


def differences(runs: dict[str, dict], others: dict[str, dict], what: str) -> dict[str, str]:
    """Of `what`, in points, between runs of one seed: mean, and its 95 % interval by a bootstrap
    over pictures, of these runs: how seeds differ is not in it. Bold if 0 is not in it."""
    cells = {}
    for benchmark, group in GROUPS:
        lines, of_others = of_group(runs, benchmark, group), of_group(others, benchmark, group)
        of_picture = defaultdict(list)
        for seed in others:
            mine = lines.get(seed, lines.get(""))  # the base has no seed
            for line, other in zip(mine, of_others[seed], strict=True) if mine else []:
                of_picture[line["picture"][0]].append(100.0 * (line[what] - other[what]))
        if of_picture:
            sums = np.array([sum(values) for values in of_picture.values()])
            counts = np.array([len(values) for values in of_picture.values()])
            even = np.ones(len(sums)) / len(sums)
            drawn = np.random.default_rng(0).multinomial(len(sums), even, SAMPLES)
            low, high = np.quantile(drawn @ sums / (drawn @ counts), [0.025, 0.975])
            text = f"{sums.sum() / counts.sum():+.1f} [{low:+.1f}, {high:+.1f}]"
            cells[group or benchmark] = f"**{text}**" if low * high > 0 else text
    return cells


def others(runs: dict[str, dict]) -> dict[str, str]:
    """Retrieval and SugarCrepe++ in %, Fig. 8's means as cosines in %."""
    cells = {}
    for benchmark, column in COLUMNS:
        values = [run["cells"].get((benchmark, column)) for run in runs.values()]
        if None not in values:
            cells[column] = spread(values)
    itt = []
    for run in runs.values():
        lines = run["items"]["sugarcrepe_pp"]  # two of each item
        itt.append([a["right"] and b["right"] for a, b in zip(lines[::2], lines[1::2])])
    if itt[0]:
        cells[f"ITT, over {len(itt[0])} items"] = spread([100 * np.mean(right) for right in itt])
    for what in ("similarity", "gap"):
        of_seeds = [[x[what] for x in run["items"]["pairs"]] for run in runs.values()]
        cells[what] = spread([100 * np.mean(values) for values in of_seeds])
    return cells


def thresholds(runs: dict[str, dict]) -> dict[str, str]:
    """Eq. 5 and 7 at the last step, in logits."""
    logs = [run["log"] for run in runs.values()]
    return {kind: spread([log[f"threshold_{kind}"] for log in logs]) for kind in KINDS}


def table(title: str, rows: dict[str, dict[str, str]]) -> None:
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, texts in rows.items():
        print(f"| {name} | {' | '.join(texts.get(column, '') for column in columns)} |")


def main() -> None:
    runs = read(Path(sys.argv[1]))
    shown = {name: runs[folder] for folder, name in SETTINGS.items() if folder in runs}
    table("Accuracy / blind / looking", {name: accuracies(of) for name, of in shown.items()})
    reference = SETTINGS[sys.argv[2] if len(sys.argv) > 2 else "eq2"]
    rest = {name: of for name, of in shown.items() if name != reference}
    for what in ("right", "blind", "looking"):
        rows = {name: differences(of, shown[reference], what) for name, of in rest.items()}
        table(f"Less that of {reference}: {what}", rows)
    table("Retrieval, SugarCrepe++, Fig. 8", {name: others(of) for name, of in shown.items()})
    ranked = {name: of for name, of in shown.items() if "CMR" in name or name.startswith("Eq. 8")}
    ranked.pop("Eq. 8, half-way from the base", None)
    table("Thresholds", {name: thresholds(of) for name, of in ranked.items()})


if __name__ == "__main__":
    main()
