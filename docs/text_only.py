"""How well text alone tells a caption from its generated negative, and for which items it does.

    python docs/text_only.py --train train.jsonl --test dev.jsonl --out text_only.csv

A logistic regression on the words and pairs of neighbouring words of a text, for each kind: of
--train's texts it learns which are captions and which are negatives. An item's margin is the logit
of its caption less that of its negative. The script prints for how many items of --test the margin
is above 0, and --out has a line for each item: kind, caption, negative, margin.
It needs scikit-learn, which clip-benchmark brings along.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import files
from negatives import PAPER_KINDS


def pairs(path: Path, kind: str) -> list[tuple[str, str]]:
    """The captions and negatives of a kind in a file of negatives.py."""
    with files.open_text(path) as file:
        records = list(files.read_json_lines(file))
    return [(record["caption"], record[kind]) for record in records if record.get(kind)]


def margins(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> list[float]:
    """The margin of each pair of `test`, by a model that was fitted to the pairs of `train`."""
    words = CountVectorizer(ngram_range=(1, 2), min_df=2, binary=True, token_pattern=r"\w+|[^\w\s]")
    model = make_pipeline(words, LogisticRegression(max_iter=1000))
    captions, negatives = zip(*train)
    model.fit(captions + negatives, [True] * len(captions) + [False] * len(negatives))
    captions, negatives = zip(*test)
    return (model.decision_function(captions) - model.decision_function(negatives)).tolist()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--train", type=Path, required=True, help="a file of negatives.py")
    p.add_argument("--test", type=Path, required=True, help="another one, of other images")
    p.add_argument("--out", type=Path, required=True, help="the .csv")
    args = p.parse_args()
    lines = []
    for kind in PAPER_KINDS:
        test = pairs(args.test, kind)
        of_kind = margins(pairs(args.train, kind), test)
        right = sum(margin > 0 for margin in of_kind) / len(of_kind)
        print(f"{kind}: text alone is right in {100 * right:.1f} % of {len(of_kind):,} items")
        for (caption, negative), margin in zip(test, of_kind):
            lines.append([kind, caption, negative, f"{margin:.3f}"])
    with files.whole_file(args.out) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "caption", "negative", "margin"])
        writer.writerows(lines)


if __name__ == "__main__":
    files.run_main(main)
