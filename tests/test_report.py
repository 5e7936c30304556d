"""Notebooks are run apart from each other, and their pages stand alone."""

import base64
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat import v4

from saeutils.report import execute, pages
from saeutils.report.__main__ import failure, main, print_pdf, summary, write_index
from saeutils.report.execute import Failure, Run

BADGE = "[![Open In Colab](https://example.org/badge.svg)](https://example.org/nb)"
PARAMETERS = "n = 5  # points\nname = 'x'  # of the axis"

GOOD = [
    f"# Does it run?\n\n{BADGE}\n\n**Question:** is `n` shown in *every* place?",
    'import sys\n\nif "google.colab" in sys.modules:\n    %pip install -q nothing',
    PARAMETERS,
    "## The mean\n\nInline $x_i^2$, and\n\n$$\\frac{a}{b}$$\n\n![far](https://x.org/a.png)",
    "import os, sys\nopen('written.txt', 'w').write('here')\nprint(sys.executable)\n"
    "print('threads', os.environ['OMP_NUM_THREADS'])",
    "import plotly.graph_objects as go\n"
    "go.Figure(go.Scatter(y=list(range(n)), name='</script>'))",
    "from tqdm.auto import tqdm\nfor i in tqdm(range(3)):\n    pass",
]
FAILS = ["# It fails", PARAMETERS, "print('before')", "k = 40\n1 / 0", "print('after')"]
HANGS = ["# It hangs", "import time\ntime.sleep(600)"]
DIES = ["# It dies", "import os\nos.kill(os.getpid(), 9)"]


def write_notebook(path, sources):
    """Sources that begin with # are text, the others code."""
    cells = [
        v4.new_markdown_cell(s) if s.startswith("#") else v4.new_code_cell(s)
        for s in sources
    ]
    for cell in cells:
        if cell.source == PARAMETERS:
            cell.metadata["tags"] = ["parameters"]
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder (with spaces)")
    names = {"10_good": GOOD, "20_fails": FAILS, "30_hangs": HANGS, "40_dies": DIES}
    for name, sources in names.items():
        write_notebook(folder / f"{name}.ipynb", sources)
    write_notebook(folder / "50_waits.ipynb", ["# It waits", "1"])
    (folder / "presets.toml").write_text("[10_good.small]\nn = 3\n")
    return folder


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """The notebooks, run once; another Python lies in wait as kernel `python3`."""
    trap = tmp_path_factory.mktemp("trap") / "kernels" / "python3"
    trap.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "trap", "language": "python"}
    (trap / "kernel.json").write_text(json.dumps(spec))
    out = folder / "reports"
    where = ["--folder", str(folder), "--out", str(out)]
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(trap.parent.parent)
    try:
        codes = [
            main(["30", "--timeout", "2", *where]),
            main(["10", "20", "40", "--preset", "small", *where]),
        ]
    finally:
        del os.environ["JUPYTER_PATH"]
        if before is not None:
            os.environ["JUPYTER_PATH"] = before
    assert codes == [1, 1]  # some failed
    return out


def load(ran, name):
    return Run.load(ran / "runs" / name)


def test_the_good_one_ran_through_beside_failing_ones(ran):
    run = load(ran, "10_good")
    assert run.ok
    assert run.parameters == {"n": 3, "name": "x"}  # the preset's n
    assert run.cells == run.cells_run == 5
    assert run.title == "Does it run?"
    assert run.question == "Is n shown in every place?"
    assert run.cpu_seconds > 0 and run.peak_bytes > 0
    assert run.versions["Python"].startswith(f"{sys.version_info[0]}.")


def test_kernel_is_this_python_with_one_thread(ran):
    page = (ran / "10_good.html").read_text()
    assert sys.executable in page
    assert "threads 1" in page


def test_what_a_notebook_writes_lands_in_its_run_folder(ran, folder):
    assert (ran / "runs" / "10_good" / "written.txt").read_text() == "here"
    assert not list(folder.glob("*.txt"))


def test_failure_is_named_by_cell_source_and_traceback(ran):
    run = load(ran, "20_fails")
    assert run.failure.cell == 3 and run.cells == 4 and run.cells_run == 2
    text = failure(run)
    assert text.startswith("20_fails, cell 3 of 4: ZeroDivisionError: division by zero")
    assert "    | k = 40\n    | 1 / 0\n" in text
    assert "----> 2 1 / 0" in text
    assert "\x1b" not in text


def test_failing_notebook_leaves_the_page_up_to_its_failure(ran):
    page = (ran / "20_fails.html").read_text()
    assert "stopped in cell 3" in page and 'id="failed"' in page
    assert re.search(r'<pre class="stream stdout">before', page)
    assert not re.search(r'<pre class="stream stdout">after', page)


def test_a_hanging_cell_is_ended(ran):
    run = load(ran, "30_hangs")
    assert run.failure.cell == 1
    assert "longer than the 2 s allowed" in run.failure.message
    assert run.seconds < 60


def test_a_dead_kernel_is_a_failure_with_its_cell(ran):
    run = load(ran, "40_dies")
    assert run.failure.cell == 1 and "kernel died" in run.failure.message
    assert "os.kill" in run.failure.source
    page = (ran / "40_dies.html").read_text()
    assert page.count('id="failed"') == 1 and "kernel died" in page


@pytest.mark.parametrize("name", ["10_good", "20_fails", "index"])
def test_pages_load_nothing(ran, name):
    page = (ran / f"{name}.html").read_text()
    loads = re.findall(r"<(?!a\b)\w+[^>]*\s(?:src|href)=[\"'](?!data:)[^\"']*", page)
    assert loads == []
    assert not re.search(r"@import|url\((?!data:)", page)
    assert "<script src" not in page


def test_page_holds_figure_formula_and_no_installation(ran):
    page = (ran / "10_good.html").read_text()
    figure = re.search(r'plotly-figure.*?json">(.*?)</script>', page)[1]
    drawn = json.loads(figure.replace("<\\/", "</"))
    assert drawn["data"][0]["name"] == "</script>"  # did not end the script early
    assert len(drawn["data"][0]["y"]) == 3
    assert "<mfrac>" in page and "<msubsup>" in page
    assert "google.colab" not in page
    assert "0%|" not in page  # a progress bar, dead at its beginning
    assert "<dt>n</dt><dd>3</dd>" in page


def test_packed_plotly_is_plotly():
    from plotly.offline import get_plotlyjs

    assert gzip.decompress(base64.b64decode(pages.plotly_js())).decode() == (
        get_plotlyjs()
    )


def test_index_shows_all_and_says_which_failed_or_wait(ran):
    page = (ran / "index.html").read_text()
    assert "1 of 4 ran through" in page and "1 not run yet" in page
    for name in ("10_good", "20_fails", "30_hangs", "40_dies"):
        assert f'href="{name}.html"' in page
    assert 'href="50_waits.html"' not in page and "It waits" in page
    assert page.count(">failed</span>") == 3
    assert "plotly-figure" in page  # the thumbnail of the good one


def test_summary_counts_what_failed(ran):
    runs = [load(ran, name) for name in ("10_good", "20_fails")]
    text = summary(runs)
    assert "1 of 2 failed" in text
    assert re.search(r"10_good +ok .* 5/5", text)
    assert re.search(r"20_fails +FAILED .* 2/4", text)
    assert "all ran through" in summary(runs[:1])


def test_run_survives_saving(tmp_path):
    run = Run(
        "a", "A", "?", "quick", {"n": 1}, "2025", failure=Failure(1, "x", "y", "z")
    )
    run.save(tmp_path)
    assert Run.load(tmp_path) == run


def test_interrupt_ends_the_kernels(tmp_path):
    """SIGINT: exit code 130, and the kernel is gone."""
    source = (
        "import os, time\nopen('pid', 'w').write(f'{os.getpid()}\\n')\ntime.sleep(600)"
    )
    write_notebook(tmp_path / "10_slow.ipynb", ["# Slow", source])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "saeutils.report", "--folder", tmp_path]
    # A shell that runs the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*command, "--out", out], stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    pid = out / "runs" / "10_slow" / "pid"
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text().endswith("\n")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    kernel = psutil.Process(int(pid.read_text()))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().strip() == "Stopped; no notebook goes on."
    gone, _ = psutil.wait_procs([kernel], timeout=10)
    assert gone


# --- planning: nothing here starts a kernel -------------------------------


def stems(paths):
    return [path.stem for path in paths]


def test_numbers_match_beginnings_and_words_match_parts(folder):
    assert len(execute.find(folder, [])) == 5
    assert stems(execute.find(folder, ["1"])) == ["10_good"]
    assert stems(execute.find(folder, ["fails", "10"])) == ["10_good", "20_fails"]
    assert stems(execute.find(folder, ["40_dies.ipynb"])) == ["40_dies"]


def test_nothing_matching_lists_what_there_is(folder, capsys):
    assert main(["99", "--folder", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "'99'" in said and "10_good, 20_fails" in said


def test_unknown_parameter_is_refused_before_any_work(tmp_path, capsys):
    write_notebook(tmp_path / "10_a.ipynb", GOOD)
    (tmp_path / "presets.toml").write_text("[10_a.smoke]\nn = 1\nsteps = 2\n")
    out = tmp_path / "out"
    code = main(["--preset", "smoke", "--folder", str(tmp_path), "--out", str(out)])
    said = capsys.readouterr().err
    assert code == 2 and not out.exists()
    assert "[10_a.smoke] sets steps" in said and "n, name" in said


def test_presets_that_cannot_be_read_say_where(tmp_path):
    write_notebook(tmp_path / "10_a.ipynb", GOOD)
    (tmp_path / "presets.toml").write_text("[10_a.smoke\n")
    with pytest.raises(ValueError, match=r"presets.toml is not valid TOML.*line 1"):
        execute.plan(execute.find(tmp_path, []), tmp_path / "out")


def test_notebook_without_presets_runs_as_it_is(folder):
    (job,) = execute.plan(execute.find(folder, ["50"]), folder / "out", "small")
    assert job.parameters == {}


def test_parameters_are_read_as_python_reads_them(tmp_path):
    cell = v4.new_code_cell(
        "k: int = 32  # per row\nrates = (1e-3, 2e-3)  # lr\nsize = 2 * 3",
        metadata={"tags": ["parameters"]},
    )
    path = tmp_path / "a.ipynb"
    nbformat.write(v4.new_notebook(cells=[cell]), path)
    assert execute.parameters(path) == {
        "k": 32,
        "rates": (1e-3, 2e-3),
        "size": "2 * 3",
    }


def test_memory_limits_how_many_run_at_once(monkeypatch):
    class Memory:
        available = int(1.5 * execute.BYTES_PER_NOTEBOOK)

    monkeypatch.setattr(execute.psutil, "virtual_memory", Memory)
    assert execute.how_many() == 1


# --- pages ----------------------------------------------------------------


def test_thumbnail_is_the_tagged_figure_else_the_first():
    def cell(y, *tags):
        figure = {"data": [{"y": [y]}], "layout": {}}
        out = v4.new_output("display_data", {pages.FIGURE: figure})
        return v4.new_code_cell("x", outputs=[out], metadata={"tags": list(tags)})

    def drawn(*cells):
        return pages.thumbnail(v4.new_notebook(cells=cells))["data"][0]["y"]

    assert drawn(cell(1), cell(2)) == [1]
    assert drawn(cell(1), cell(2, "thumbnail")) == [2]
    assert pages.thumbnail(v4.new_notebook()) is None


def test_formula_that_cannot_be_read_stays_readable():
    assert "<math" in pages.formula("x^2")
    shown = pages.formula(r"x^a^b<c")
    assert shown.startswith("<code") and "x^a^b&lt;c" in shown


def test_links_between_notebooks_lead_from_page_to_page(tmp_path):
    text = "[next](11_meta.ipynb) [all](README.md) [docs](https://x.org/a.ipynb)"
    page = pages.markdown(text, tmp_path)
    links = re.findall(r'href="([^"]*)"', page)
    assert links == ["11_meta.html", "index.html", "https://x.org/a.ipynb"]


def test_index_of_nothing_is_a_page(tmp_path):
    (tmp_path / "out").mkdir()
    index = write_index(tmp_path, tmp_path / "out")
    assert "0 of 0 ran through" in index.read_text()


def test_no_browser_is_said_and_the_page_stays(ran, monkeypatch, capsys):
    monkeypatch.setattr(pages, "BROWSERS", ("no-such-browser",))
    assert print_pdf(ran / "10_good.html") is None
    assert "no Chromium or Chrome found" in capsys.readouterr().err
    assert (ran / "10_good.html").exists()


@pytest.mark.skipif(pages.browser() is None, reason="no Chromium here")
def test_pdf_holds_the_figure(ran, tmp_path):
    page = tmp_path / "a page.html"
    page.write_text((ran / "10_good.html").read_text())
    made = pages.pdf(page)
    assert made.read_bytes().startswith(b"%PDF")
    assert made.stat().st_size > 20_000
