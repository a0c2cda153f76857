"""README and documentation: every python block runs, every relative link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(text: str) -> list[tuple[int, str]]:
    """First line and code of each block marked as python."""
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text) if m[1] in ("python", "py")]


WITH_CODE = [path for path in PAGES if python_blocks(path.read_text(encoding="utf-8"))]


def test_the_readme_has_code():
    assert ROOT / "README.md" in WITH_CODE


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```py\n\ny = 2\n```\n"
    assert python_blocks(text) == [(2, "x = 1\n"), (8, "\ny = 2\n")]


@pytest.mark.parametrize("path", WITH_CODE, ids=name)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    """A page's blocks one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in python_blocks(path.read_text(encoding="utf-8")):
        exec(compile("\n" * line + code, str(path), "exec"), namespace)  # a traceback names the page's own line


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_relative_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text)
    broken = [
        link
        for link in links
        if not re.match(r"\w+:", link) and not link.startswith("#") and not (path.parent / link.split("#")[0]).exists()
    ]
    assert not broken
