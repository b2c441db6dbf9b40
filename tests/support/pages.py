"""README.md and docs/ as tests read them: their blocks, and what in these can be run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# In the order in which a reader comes to them, and in which their commands run.
IN_ORDER = (
    *("getting-started", "tasks", "config", "data-and-order", "checkpoints-and-faults", "sweeps"),
    *("clusters", "gpu", "lidar", "openpcdet", "run-folder", "performance", "decisions"),
)
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in IN_ORDER), *sorted((ROOT / "docs/design").glob("*.md"))]


class Block(NamedTuple):
    """What stands between two fences, and what the first one says that it is."""

    page: Path
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """The name in the first line of an example that its reader is to write to a file: `# mytask.py`."""
        named = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


class Command(NamedTuple):
    """A line that a reader types.

    env:    what the block has exported before it
    status: with which it ends; another than 0 is said behind it: `# exit status 1`
    """

    words: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    status: int = 0

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks() -> list[Block]:
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
    return [Block(page, *found) for page in PAGES for found in fenced.findall(page.read_text())]


def commands() -> list[Command]:
    """Of all pages, each once."""
    found: dict[Command, None] = {}
    for block in blocks():
        env: dict[str, str] = {}
        for line in block.text.replace("\\\n", " ").splitlines() if block.kind == "sh" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["export"]:
                env |= dict(word.split("=", 1) for word in words[1:])
            elif words:
                said = re.search(r"#.*exit status (\d+)", line)
                found[Command(tuple(words), tuple(env.items()), int(said[1]) if said else 0)] = None
    return list(found)


def write_examples(folder: Path) -> None:
    """What a reader has in a folder in the end: the configs, and the files that the pages tell to write."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for block in blocks():
        if block.file:
            (folder / block.file).write_text(block.text)


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
