"""The map of the modules is whole, and says of each what the module itself says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_module_stands_in_the_map_with_its_own_first_line():
    text = (ROOT / "docs" / "modules.md").read_text()
    written = dict(re.findall(r"^\| \[(\w+)\]\(\S+\) \| (.*) \|$", text, re.MULTILINE))
    first_lines = {}
    for path in (ROOT / "saeutils").glob("[a-z]*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        first = docstring.split("\n\n")[0].replace("\n", " ")
        first_lines[path.stem] = first.strip().rstrip(".")
    assert written == first_lines
