#!/usr/bin/env python3
"""Collect many runs in one table, or a plot, from the results.json files that lincls.py wrote.

    python scripts/experiments/collect_results.py FOLDER [--png FILE | --curves FILE]

Runs that differ only in the seed form one row: mean and standard deviation over all available seeds. In addition to
method and batch size, each pretraining setting in which the runs differ has a column. Accuracies are those of the last
epoch; if classifiers with several learning rates were trained, the best one represents the run.

DCL (decoupled contrastive learning; not `--loss_type dcl`) is SogCLR with gamma 1. If two of the methods were trained
with the same settings, a second table shows their differences, each of two runs with the same seed, which share initial
weights, order and views.

--curves reads what train.py wrote to TensorBoard instead.
"""

import json
import math
import signal
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError
from sogclr.flags import Parser, output_file
from train import GAMMA_FLAGS, ISOGCLR_FLAGS, PARSER, RESUME_FLAGS

MINUTES = "minutes"
COLORS = {"SimCLR": (200, 80, 40), "DCL": (160, 60, 160), "SogCLR": (40, 90, 180), "iSogCLR": (30, 140, 90)}
SETTINGS = "method", *RESUME_FLAGS
# Methods to compare, with the settings that only the first has.
PAIRS = (("DCL", "SimCLR", ()), ("SogCLR", "SimCLR", GAMMA_FLAGS), ("SogCLR", "DCL", GAMMA_FLAGS),
         ("iSogCLR", "SogCLR", ISOGCLR_FLAGS), ("iSogCLR", "DCL", (*GAMMA_FLAGS, *ISOGCLR_FLAGS)))


def all_results(folder):
    """Yield (file, content) of each results.json under a folder. Raises InputError if one is not a JSON object."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for file in sorted(folder.rglob("results.json")):
        try:
            yield file, dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file}: cannot be read as a result, remove it or run it again") from error


def read(folder):
    """Read all evaluations of pretrained encoders under a folder.

    Returns the names of the settings in which its runs differ, and {their values: {column: {seed: value}}}; a column is
    a protocol, its value the Acc@1 in percent, or "minutes", those of the pretraining. A third item is the set of
    (commit, device, torch version) of the evaluations.
    Raises InputError if there is none, if one cannot be read, or if two would be the same entry.
    """
    runs, made_by = [], set()
    for file, results in all_results(folder):
        try:
            encoder = results.get("encoder")        # the settings of its pretraining
            if not encoder:
                continue
            if "knn_acc1" in results:
                values = {f"kNN-{k}": acc1 for k, acc1 in results["knn_acc1"].items()}
            elif "logistic" in results:
                values = {results["protocol"]: results["logistic"]["acc1"]}
            elif "shots" in results:
                values = {f"logistic regression, {shots} images per class": few["acc1"]
                          for shots, few in results["shots"].items()}
            else:
                classifiers = results["classifiers"]
                values = {results["protocol"] + f", best of {len(classifiers)} rates" * (len(classifiers) > 1):
                          max(score["acc1"] for score in classifiers if score["acc1"] is not None)}
            runs.append((file, {name: setting(encoder, name) for name in SETTINGS}, values,
                         results.get("pretraining_seconds")))
            commit = results["commit"] or "unknown"
            made_by.add((commit + " (changed)" * (not results["clean"]), results["device"],
                         results["versions"]["torch"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: cannot be read as a result, remove it or run it again") from error
    if not runs:
        raise InputError(f"{folder}: contains no results.json of a pretrained encoder, run lincls.py first")

    names = differing([encoder for _, encoder, _, _ in runs])
    table, entered = {}, {}
    for file, encoder, values, seconds in runs:
        settings, seed = tuple(encoder[name] for name in names), encoder["seed"]
        row = table.setdefault(settings, {})
        for column, value in values.items():
            other = entered.setdefault((settings, column, seed), file)
            if other != file:
                raise InputError(f"{file}: has the same pretraining settings, protocol and seed as {other}, "
                                 "move one of them elsewhere")
            row.setdefault(column, {})[seed] = value
        if seconds is not None:
            row.setdefault(MINUTES, {})[seed] = seconds / 60
    return names, table, made_by


def setting(encoder, name):
    """A pretraining setting, None if it had no effect; also "method", the name of the method."""
    method = {"cl": "SimCLR", "dcl": "DCL" if encoder.get("gamma") == 1 else "SogCLR", "isogclr": "iSogCLR"}[
        encoder["loss_type"]]
    if name == "method":
        return method
    if name == "loss_batch_size":
        return encoder.get(name) or encoder["batch_size"]
    idle = (name in GAMMA_FLAGS and method in ("SimCLR", "DCL")) or (
        name == "gamma_decay_epochs" and encoder.get("gamma_schedule") != "cosine") or (
        name in ISOGCLR_FLAGS and method != "iSogCLR")
    return None if idle else encoder.get(name)


def differing(encoders):
    """The names of the settings that distinguish runs, apart from the seed: method, batch size (that of the loss, if a
    loss saw only a part of the batch at a time), and those that differ.

    encoders: {name: value} of each run, with all SETTINGS.
    """
    batch = "batch_size" if all(run["loss_batch_size"] == run["batch_size"] for run in encoders) else "loss_batch_size"
    others = [name for name in SETTINGS if name not in ("method", "loss_type", "seed", "loss_batch_size", batch)
              and len({run[name] for run in encoders} - {None}) > 1]
    return ["method", batch, *others]


def differences(names, table):
    """The differences of PAIRS, seed by seed, if all settings but the first method's own are equal: a table as from
    `read`.
    """
    def common(settings, own):
        return tuple(value for name, value in zip(names, settings, strict=True) if name not in ("method", *own))

    result = {}
    for method, other, own in PAIRS:
        others = {common(settings, own): row for settings, row in table.items() if settings[0] == other}
        for settings, row in table.items():
            base = others.get(common(settings, own), {}) if settings[0] == method else {}
            pairs = {column: {seed: value - base[column][seed] for seed, value in seeds.items() if seed in base[column]}
                     for column, seeds in row.items() if column in base and column != MINUTES}
            pairs = {column: seeds for column, seeds in pairs.items() if seeds}
            if pairs:
                result[(f"{method} - {other}", *settings[1:])] = pairs
    return result


def in_order(table):
    """The table's entries: methods in the order of COLORS and PAIRS, other settings by their values. None, which does
    not compare with numbers, comes first.
    """
    methods = [*COLORS, *(f"{method} - {other}" for method, other, _ in PAIRS)]
    return sorted(table.items(), key=lambda entry: [
        methods.index(entry[0][0]), *((value is not None, value) for value in entry[0][1:])])


def mean_and_deviation(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(names, table):
    """A Markdown table: a row per settings, a column per protocol, and the minutes that pretraining took."""
    columns = sorted({column for row in table.values() for column in row}, key=lambda name: (name == MINUTES, name))
    flags = {action.dest: action.option_strings[-1] for action in PARSER._actions}
    heads = ["method", *(f"`{flags[name]}`" for name in names[1:]), *columns, "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (method, *settings), row in in_order(table):
        cells = [method, *("" if value is None else str(value) for value in settings)]
        for values in (list(row.get(column, {}).values()) for column in columns):
            mean, deviation = mean_and_deviation(values) if values else (None, None)
            cells.append(f"{mean:.2f} ± {deviation:.2f}" if len(values) > 1 else f"{mean:.2f}" if values else "")
        seeds = sorted({seed for values in row.values() for seed in values})
        lines.append("| " + " | ".join([*cells, ", ".join(map(str, seeds))]) + " |")
    return "\n".join(lines)


def report(names, table, made_by):
    """What `read` returns as text: the table, that of the differences if there are any, and what made them."""
    pairs = differences(names, table)
    return "\n\n".join([markdown(names, table), *([markdown(names, pairs)] if pairs else []), *(
        f"Evaluated at commit {commit}, on {device}, torch {version}." for commit, device, version in sorted(made_by))])


def knn_curves(folder):
    """{method: {epoch: [kNN-20 of each seed]}} of the finished runs of train.py with --knn-freq under a folder.

    From their TensorBoard logs. Raises InputError if there is none, if a file cannot be read, or if runs differ in more
    than method and seed.
    """
    # Only train.py's results.json have that key.
    runs = [(file.parent, {name: setting(results["settings"], name) for name in SETTINGS})
            for file, results in all_results(folder) if "kNN-20" in results]
    if not runs:
        raise InputError(f"{folder}: contains no finished run of train.py with --knn-freq")
    names = differing([settings for _, settings in runs])[1:]
    if len({tuple(settings[name] for name in names) for _, settings in runs}) > 1:
        raise InputError(f"--curves: plots runs that differ in method and seed, not in {', '.join(names)}")
    curves, entered = {}, {}
    for run, settings in runs:
        method, seed = settings["method"], settings["seed"]
        if entered.setdefault((method, seed), run) != run:
            raise InputError(f"{run}: has the same method and seed as {entered[method, seed]}, move one elsewhere")
        events = EventAccumulator(str(run), {"scalars": 0}).Reload().Scalars("features/kNN-20")
        for event in events:
            epoch = round(event.step / events[-1].step * settings["epochs"])
            curves.setdefault(method, {}).setdefault(epoch, []).append(event.value)
    return curves


def plot(lines, protocol, across, scale, file, width=640, height=400):
    """Plot Acc@1 over batch size or epochs, with error bars of one standard deviation to each side.

    lines: {method: {x: [Acc@1 of each seed]}}; protocol, across: what y and x are; scale: x -> its place on the axis.
    """
    lines = {method: {x: mean_and_deviation(line[x]) for x in sorted(line)} for method, line in lines.items()}
    points = [point for line in lines.values() for point in line.values()]
    low = math.floor(min(mean - deviation for mean, deviation in points) - 0.5)
    high = math.ceil(max(mean + deviation for mean, deviation in points) + 0.5)
    ticks = sorted({x for line in lines.values() for x in line})

    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    left, right, top, bottom = 70, width - 30, 40, height - 60

    def place(x, acc1):
        length = scale(ticks[-1]) - scale(ticks[0]) or 1
        return (left + (right - left) * (scale(x) - scale(ticks[0])) / length,
                bottom - (bottom - top) * (acc1 - low) / (high - low))

    for acc1 in range(low, high + 1, max((high - low) // 8, 1)):
        y = place(ticks[0], acc1)[1]
        draw.line((left - 15, y, right + 15, y), "lightgray")
        draw.text((left - 22, y), str(acc1), "black", font, "rm")
    for x in ticks[::math.ceil(len(ticks) / 20)]:
        draw.text((place(x, low)[0], bottom + 8), str(x), "black", font, "mt")
    draw.text(((left + right) / 2, height - 12), across, "black", font, "mb")
    draw.text((left - 15, 12), f"Acc@1, {protocol}", "black", font, "lt")
    at = right      # of the methods' names, from right to left
    for method in sorted(lines, key=[*COLORS].index, reverse=True):
        color, line = COLORS[method], lines[method]
        draw.text((at, 12), method, color, font, "rt")
        at -= font.getlength(method) + 18
        draw.line([place(x, mean) for x, (mean, _) in line.items()], color, 2)
        for x, (mean, deviation) in line.items():
            (x, y), (_, reach) = place(x, mean), place(x, mean + deviation)
            draw.line((x, reach, x, 2 * y - reach), color, 2)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), color)
    picture.save(file, "PNG")


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to search, at any depth")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--png", type=output_file, metavar="FILE",
                          help="also plot logistic regression, or else the classic linear protocol, or else another, "
                               "over the batch size, to this file")
    pictures.add_argument("--curves", type=output_file, metavar="FILE",
                          help="instead plot kNN-20 over the epochs, of runs of train.py with --knn-freq, to this file")
    args = parser.parse_args()
    try:
        if args.curves:
            plot(knn_curves(args.folder), "kNN-20", "epoch", float, args.curves)
            return
        names, table, made_by = read(args.folder)
    except InputError as error:
        parser.error(str(error))
    print(report(names, table, made_by))
    if args.png and len(names) > 2:
        parser.error(f"--png: plots runs that differ in method, batch size and seed, not in {', '.join(names[2:])}")
    if args.png:
        protocol = min({column for row in table.values() for column in row if column != MINUTES}, key=lambda name: (
            name != "logistic regression", "linear" not in name, "cached" in name, name))
        lines = {}
        for (method, batch), row in table.items():
            if protocol in row:
                lines.setdefault(method, {})[batch] = list(row[protocol].values())
        plot(lines, protocol, "batch size" + " of the loss" * (names[1] != "batch_size"), math.log2, args.png)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # for `| head`
    main()
