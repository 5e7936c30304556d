"""Every notebook runs at its smoke size, and keeps to what notebooks/README.md asks."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from saeutils.report import execute
from saeutils.report.__main__ import failure

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
CITED = yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"]
SLUG = CITED.removeprefix("https://github.com/")

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_the_collection_has_its_beginning():
    assert {"00_start_here", "10_mnist_mlp_sae"} <= {path.stem for path in PATHS}


# --- they run -------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """Those asked for, several at once, as `make notebooks PRESET=smoke` runs them."""
    out = tmp_path_factory.mktemp("smoke reports")
    asked = {
        item.callspec.params["path"]
        for item in request.session.items
        if "runs" in item.fixturenames
    }
    jobs = execute.plan(sorted(asked), out, "smoke", timeout=300)
    *_, states = execute.run_all(jobs, min(execute.how_many(), len(jobs)))
    return {state.run.name: state.run for state in states}


@every_notebook
def test_runs_at_its_smoke_size(path, runs):
    run = runs[path.stem]
    assert run.ok, failure(run)
    assert run.thumbnail, "no figure: the index would show none"


@every_notebook
def test_has_both_other_sizes(path):
    sizes = execute.read_presets(FOLDER)[path.stem]
    assert set(sizes) == {"smoke", "full"}
    for size in sizes:
        execute.plan([path], FOLDER / "never", size)  # raises at an unknown name


def test_presets_are_of_notebooks_that_exist():
    assert set(execute.read_presets(FOLDER)) == {path.stem for path in PATHS}


# --- how they are made ----------------------------------------------------


def read(path):
    return nbformat.read(path, 4)


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tagged_parameters(path):
    return [c for c in code(path) if "parameters" in c.metadata.get("tags", [])]


@every_notebook
def test_outputs_are_stripped(path):
    dirty = [c.id for c in code(path) if c.outputs or c.execution_count is not None]
    assert not dirty, "run: make format"


@every_notebook
def test_is_a_valid_notebook_for_any_python3_kernel(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


@every_notebook
def test_opens_with_title_badge_question_and_time(path):
    opening = read(path).cells[0].source
    assert opening.startswith("# ")
    link = f"https://colab.research.google.com/github/{SLUG}/blob/main/notebooks"
    assert f"]({link}/{path.name})" in opening
    assert "**Question:** " in opening
    assert re.search(r"\d+ (s|seconds|minutes?)\b", opening), "how long does it take?"
    title, question = execute.describe(path)
    assert title != path.stem and len(question) > 20


@every_notebook
def test_second_cell_installs_on_colab_only(path):
    guide = (FOLDER / "README.md").read_text()
    pattern = re.search(r"```python\n(import sys\n.*?)\n```", guide, re.DOTALL)[1]
    assert f"{CITED}\n" in pattern
    written = re.sub(r'"(\./[\w-]+)\[[\w,]+\]"', r"\1", read(path).cells[1].source)
    assert written == pattern  # but for extras, as in "./name[geometry]"


@every_notebook
def test_parameters_are_literals_and_each_is_explained(path):
    (cell,) = tagged_parameters(path)
    lines = cell.source.splitlines()
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign)
        ast.literal_eval(statement.value)
        assert re.search(r"  # \w", lines[statement.end_lineno - 1]), ast.unparse(
            statement
        )
    assert read(path).cells[2].id == cell.id


@every_notebook
def test_is_short(path):
    cells = [cell.source for cell in code(path)]
    lines = [line for cell in cells for line in cell.splitlines() if line.strip()]
    assert len(read(path).cells) <= 25
    assert len(lines) <= 150
    assert max(cell.count("\n") + 1 for cell in cells) <= 25
    assert max(map(len, lines)) <= 88
    assert sum(bool(re.match(r"\s*(async )?def ", line)) for line in lines) <= 3


@every_notebook
def test_shows_nothing_by_hand_and_knows_no_machine(path):
    source = "\n".join(cell.source for cell in code(path))
    assert ".show(" not in source  # the figure is the last expression
    assert "renderers" not in source  # the environment chooses
    assert not re.search(r"\bif (smoke|quick|full|fast)\b", source)
    assert not re.search(r"[\"'](/|~|[A-Z]:\\)\w", source), "an absolute path"


@every_notebook
def test_checks_itself_and_ends_with_what_was_seen(path):
    asserts = [c for c in code(path) if re.search(r"^assert ", c.source, re.MULTILINE)]
    assert asserts
    last = next(c for c in reversed(read(path).cells) if c.cell_type == "markdown")
    assert re.search(r"\d\d_\w+|README", last.source), "which one to open next?"


@every_notebook
def test_stands_in_the_readme(path):
    readme = (ROOT / "README.md").read_text()
    assert f"(notebooks/{path.name})" in readme


def test_one_address_everywhere():
    """Badges, Colab cells and texts name the repository that CITATION.cff names."""
    texts = [*ROOT.glob("*.md"), *FOLDER.glob("*.md"), *PATHS]
    host = r"(?:github\.com|google\.com/github)/([\w.-]+/[\w-]+)"
    named = {slug for path in texts for slug in re.findall(host, path.read_text())}
    assert named == {SLUG}


def test_the_code_in_the_readme_runs(tmp_path, monkeypatch):
    """As it stands there, but for fewer steps and images."""
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    block = block.replace("steps=3000", "steps=3")
    block = block.replace(
        'datasets.mnist("train")', 'datasets.mnist("test").take(slice(0, 500))'
    )
    assert "steps=3)" in block and "take(" in block
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert len(names["stores"]["fc1"]) == 500
    assert len(names["result"].history) > 0
