#!/usr/bin/env python3
"""One table, and a plot, of many runs: reads the results.json files that lincls.py left.

    python scripts/collect_results.py FOLDER [--png FILE]

Runs that differ in the seed alone are one row: mean and standard deviation over all seeds that are there. Beside loss
and batch size, each setting of the pretraining in which the runs differ has a column.
"""

import json
import math
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sogclr import InputError
from sogclr.flags import Parser
from train import METHOD_FLAGS

CLASSIC, MINUTES = "linear evaluation", "minutes"
LOSSES = {"cl": ("SimCLR", (200, 80, 40)), "dcl": ("SogCLR", (40, 90, 180))}        # name and colour


def read(folder):
    """All evaluations of pretrained encoders under a folder.

    Returns the names of the settings that tell its runs apart, and {their values: {column: {seed: value}}}; a column is
    a protocol, its value the Acc@1 in percent, or "minutes", those of the pretraining. A third item is the set of
    (commit, device, torch's version) of the evaluations.
    Raises InputError where there is none, or where two runs would be the same entry.
    """
    runs, made_by = [], set()
    for file in sorted(folder.rglob("results.json")):
        results = json.loads(file.read_text())
        encoder = results.get("encoder")        # the settings of its pretraining
        if not encoder:
            continue
        if "knn_acc1" in results:
            values = {f"kNN-{k}": acc1 for k, acc1 in results["knn_acc1"].items()}
        else:
            values = {results["protocol"]: results["classifiers"][results["chosen"]]["acc1"]}
        runs.append((file, encoder, values, results.get("pretraining_seconds")))
        made_by.add((results["commit"], results["device"], results["versions"]["torch"]))
    if not runs:
        raise InputError(f"{folder}: holds no results.json of a pretrained encoder, run lincls.py first")

    names = ["loss_type", "batch_size"]
    names += [name for name in METHOD_FLAGS if name not in (*names, "seed")
              and len({str(encoder.get(name)) for _, encoder, _, _ in runs}) > 1]
    table = {}
    for file, encoder, values, seconds in runs:
        row = table.setdefault(tuple(encoder.get(name) for name in names), {})
        for column, value in values.items():
            seeds = row.setdefault(column, {})
            if encoder["seed"] in seeds:
                raise InputError(f"{file}: another run there has its settings, protocol and seed")
            seeds[encoder["seed"]] = value
        if seconds is not None:
            row.setdefault(MINUTES, {})[encoder["seed"]] = seconds / 60
    return names, table, made_by


def _order(entry):
    """Of the table's rows: by loss, then by numbers; None, of files without that setting, stands apart."""
    return [(type(value).__name__, value) for value in entry[0]]


def mean_and_deviation(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(names, table):
    """A row for each setting, a column for each protocol, and the minutes that its pretraining took."""
    columns = sorted({column for row in table.values() for column in row}, key=lambda name: (name == MINUTES, name))
    heads = ["loss", "batch", *(f"`--{name.replace('_', '-')}`" for name in names[2:]), *columns, "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (loss, *settings), row in sorted(table.items(), key=_order):
        cells = [LOSSES[loss][0], *map(str, settings)]
        for values in (list(row.get(column, {}).values()) for column in columns):
            mean, deviation = mean_and_deviation(values) if values else (None, None)
            cells.append(f"{mean:.2f} ± {deviation:.2f}" if len(values) > 1 else f"{mean:.2f}" if values else "")
        seeds = sorted({seed for values in row.values() for seed in values})
        lines.append("| " + " | ".join([*cells, ", ".join(map(str, seeds))]) + " |")
    return "\n".join(lines)


def plot(table, protocol, file, width=640, height=400):
    """Acc@1 over the batch size, a line for each loss, its bars one standard deviation long to each side."""
    lines = {}      # {loss: {batch size: (mean, deviation)}}
    for (loss, batch), row in sorted(table.items(), key=_order):
        if protocol in row:
            lines.setdefault(loss, {})[batch] = mean_and_deviation(row[protocol].values())
    points = [point for line in lines.values() for point in line.values()]
    low = math.floor(min(mean - deviation for mean, deviation in points) - 0.5)
    high = math.ceil(max(mean + deviation for mean, deviation in points) + 0.5)
    batches = sorted({batch for line in lines.values() for batch in line})

    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    left, right, top, bottom = 70, width - 30, 40, height - 60

    def place(batch, acc1):
        octaves = math.log2(batches[-1] / batches[0]) or 1
        return (left + (right - left) * math.log2(batch / batches[0]) / octaves,
                bottom - (bottom - top) * (acc1 - low) / (high - low))

    for acc1 in range(low, high + 1, max((high - low) // 8, 1)):
        y = place(batches[0], acc1)[1]
        draw.line((left - 15, y, right + 15, y), "lightgrey")
        draw.text((left - 22, y), str(acc1), "black", font, "rm")
    for batch in batches:
        draw.text((place(batch, low)[0], bottom + 8), str(batch), "black", font, "mt")
    draw.text(((left + right) / 2, height - 12), "batch size", "black", font, "mb")
    draw.text((left - 15, 12), f"Acc@1, {protocol}", "black", font, "lt")
    for k, (loss, line) in enumerate(lines.items()):
        name, colour = LOSSES[loss]
        draw.text((right, 12 + 18 * k), name, colour, font, "rt")
        draw.line([place(batch, mean) for batch, (mean, _) in line.items()], colour, 2)
        for batch, (mean, deviation) in line.items():
            (x, y), (_, reach) = place(batch, mean), place(batch, mean + deviation)
            draw.line((x, reach, x, 2 * y - reach), colour, 2)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    picture.save(file)


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to look, at any depth")
    parser.add_argument("--png", metavar="FILE", help="also draw the classic protocol, or else the first column, there")
    args = parser.parse_args()
    try:
        names, table, made_by = read(args.folder)
        if args.png and len(names) > 2:
            raise InputError(f"--png: draws runs that differ in loss, batch size and seed, "
                             f"not in {', '.join(names[2:])}")
    except InputError as error:
        parser.error(str(error))
    print(markdown(names, table))
    for commit, device, version in sorted(made_by, key=str):
        print(f"\nEvaluated at commit {commit or 'unknown'}, on {device}, torch {version}.")
    if args.png:
        protocols = sorted({column for row in table.values() for column in row if column != MINUTES})
        plot(table, CLASSIC if CLASSIC in protocols else protocols[0], args.png)


if __name__ == "__main__":
    main()
