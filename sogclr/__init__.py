"""SogCLR: self-supervised pretraining with the global contrastive loss (Yuan et al., ICML 2022, arXiv 2202.12387).

Start reading at `train.py`. Rooms: `builder` (the model), `loss` (the method), `optimizer` (LARS), `loader` and
`shapes` (data), `augment` (colour, on the device), `features`, `classifiers`, `knn` and `subset` (evaluation),
`distributed`, `checkpoint`, `meters`, `report` and `flags` (the run).
"""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line that names the flag or the file and the cure.

    The scripts print it without a traceback and exit with code 2; library users may catch it.
    """


class Stopped(Exception):
    """A signal has asked the run to stop, and all of it is saved. The message says where it stopped."""
