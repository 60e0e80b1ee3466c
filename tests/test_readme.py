"""The READMEs: their links, paths, commands and flags must be those of the repository."""

import re
import shlex
from pathlib import Path

import pytest

import lincls
import train

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "scripts/README.md", "scripts/experiments/README.md"]
# Flags of docker, torchrun, sbatch and pip.
FOREIGN = {"--gpus", "--shm-size", "--ipc", "--network", "--device", "--nnodes", "--nproc-per-node", "--rdzv-backend",
           "--rdzv-endpoint", "--local-addr", "--max-restarts", "--nodes", "--index-url"}


def anchors(file):
    """The anchors that GitHub generates for a file's headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text):
    """The commands in a README's blocks of code, each as a list of words."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line.replace("$loss", "cl").replace("$seed", "1").rstrip("& "), comments=True)


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / name).read_text()):
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", READMES)
def test_paths_exist(name):
    for path in re.findall(r"(?<![\w/])(?:\.\./)?((?:scripts|sogclr|tests)/[\w./*-]*\w)", (ROOT / name).read_text()):
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("name", READMES)
def test_commands_and_flags_are_known(name):
    """The scripts' own parsers must take each command of train.py and lincls.py, and some script each flag."""
    text = (ROOT / name).read_text()
    for words in commands(text):
        for module in (train, lincls):
            if f"{module.__name__}.py" in words:
                module.PARSER.parse_args(words[words.index(f"{module.__name__}.py") + 1:])
    sources = [*(ROOT / "scripts").glob("*/*.py"), *(ROOT / "scripts").glob("*.sh")]
    known = set(train.PARSER._option_string_actions) | set(lincls.PARSER._option_string_actions) | FOREIGN
    known |= {flag for source in sources for flag in re.findall(r'"(--[\w-]+)"', source.read_text())}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


def test_map_names_every_file():
    """README.md must say where each module and each tool is."""
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("sogclr/*.py"):
        assert path.name in text or path.name == "__init__.py", path.name
    for path in [*ROOT.glob("scripts/tools/*.py"), *ROOT.glob("scripts/experiments/*.py")]:
        assert re.search(rf"\b{path.stem}\b", text), path.name
    recipes = (ROOT / "scripts" / "README.md").read_text()
    for path in ROOT.glob("scripts/*.sh"):
        assert path.name in recipes, path.name
