"""SogCLR: self-supervised pretraining with the global contrastive loss (Yuan et al., ICML 2022, arXiv 2202.12387).

Start reading at `train.py`. Modules: `loss` and `isogclr` (the method), `builder` (the model), `optimizer` (LARS),
`datasets`, `files`, `shapes` and `loader` (data), `augment` (color, on the device), `features`, `classifiers`,
`logistic`, `knn` and `subset` (evaluation), `monitor` (what to watch), `distributed` and `parallel` (several
processes), `launch` (how they start and end), `run`, `checkpoint`, `safetensors`, `report`, `meters` and `flags` (the
run).
"""


class InputError(Exception):
    """Invalid user input. The message is one line that names the flag or file and how to fix it.

    The scripts print it without a traceback and exit with code 2; library users may catch it.
    """


class Stopped(Exception):
    """Raised after a signal has stopped the run and all of it is saved. The message says where it stopped."""


def printable(name):
    """A name, str or bytes, as one line that any terminal shows: what is not printable or not UTF-8 is escaped."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def one_line(error):
    """The beginning of a library's error message, as one line."""
    return " ".join(str(error).split())[:200]
