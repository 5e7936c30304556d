"""HTML pages of executed notebooks, and their index.

A page is one file that needs neither a server nor a network: it can be mailed.
Figures stay interactive. plotly.js (4.8 MB) is put into each page compressed
(2 MB), and the browser unpacks it; formulas become MathML, which browsers draw
themselves.
"""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from latex2mathml.converter import convert as mathml
from nbconvert.filters import Highlight2HTML, ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from pygments.formatters import HtmlFormatter

from saeutils.report.execute import Run

ASSETS = Path(__file__).parent / "assets"
FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
COLLECTIONS = {
    "0": "Start here",
    "1": "MNIST",
    "2": "Vision transformers",
    "3": "Language models and stories",
    "4": "Activations",
    "5": "Geometry, and one model against another",
    "6": "Synthetic ground truth",
}
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)


# --- a notebook -----------------------------------------------------------


def notebook_page(
    notebook: nbformat.NotebookNode,
    run: Run,
    folder: Path,
    made: tuple[Path, str] | None = None,
) -> str:
    """The page of an executed notebook; images it names lie in `folder`.

    Args:
        made: the folder it ran in, and that folder as seen from the page: links to
            files that the notebook wrote there are led to them.
    """
    shown = nbformat.from_dict(notebook)
    failed = None
    if run.failure and run.failure.cell:
        failed = code_cells(shown)[run.failure.cell - 1]
    shown.cells = [cell for cell in shown.cells if _wanted(cell)]
    CoalesceStreamsPreprocessor(enabled=True)(shown, {})  # progress bars: last line
    env = _environment()
    env.filters["markdown"] = lambda text: markdown(text, folder, made)
    body = env.get_template("cells.html.j2").render(cells=shown.cells, failed=failed)
    return env.get_template("notebook.html.j2").render(
        run=run,
        body=body,
        headings=re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', body),
        plotly=plotly_js() if "plotly-figure" in body else "",
        code_css=_code_css(),
        **_looks(),
    )


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells a reader counts: those with code, and not the one that papermill
    puts in, so that the count equals `In [i]`."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code"
        and cell.source.strip()
        and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def _wanted(cell: nbformat.NotebookNode) -> bool:
    """Not: empty cells, the installation on Colab, papermill's own banners."""
    tags = cell.metadata.get("tags", [])
    return bool(cell.source.strip()) and not (
        "google.colab" in cell.source or "papermill-error-cell-tag" in tags
    )


def figure_html(figure: dict[str, Any]) -> str:
    """A place for a figure, which `figures.js` draws when it comes into view."""
    style = f"height:{int(figure['layout'].get('height', 450))}px"
    data = json.dumps(figure, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<div class="figure"><div class="plotly-figure" style="{style}">'
        f'<script type="application/json">{data}</script></div></div>'
    )


def formula(tex: str, display: str = "inline") -> str:
    """MathML of a formula; what the converter cannot read stays as TeX."""
    try:
        return mathml(tex, display=display)
    except Exception as error:  # its own errors share no base class
        title = jinja2.filters.do_forceescape(f"{type(error).__name__}: {error}")
        return f'<code title="{title}">{jinja2.filters.do_forceescape(tex)}</code>'


class _Renderer(IPythonRenderer):
    """Markdown that loads nothing: formulas as MathML, images within the page."""

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def inline_math(self, body: str) -> str:
        return formula(body)

    def latex_environment(self, name: str, body: str) -> str:
        return formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        words = re.sub(r"<[^>]*>", "", text)
        return f'<h{level} id="{anchor(words)}">{text}</h{level}>\n'

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if re.match(r"(https?:)?//", url):  # a badge, say: its text is enough
            return self.escape_html(text)
        return super().image(text, url, title)

    made: tuple[Path, str] | None = None

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if url == "README.md":  # the list of notebooks
            url = "index.html"
        elif re.fullmatch(r"\w+\.ipynb", url):  # each has its page beside this one
            url = url.removesuffix("ipynb") + "html"
        if self.made and not re.match(r"\w+:|[/#]", url):
            where, seen_as = self.made
            if (where / url.partition("#")[0]).is_file():
                url = f"{seen_as}/{url}"
        return super().link(text, url, title)


def markdown(text: str, folder: Path, made: tuple[Path, str] | None = None) -> str:
    renderer = _Renderer(escape=False, embed_images=True, path=str(folder))
    renderer.made = made
    return MarkdownWithMath(renderer=renderer).render(text)


def _code_css() -> str:
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


# --- figures on their own -------------------------------------------------


def anchor(name: str) -> str:
    """What a heading or figure of that name is linked by: latent 12 -> latent-12."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def write_figures(path: str | Path, title: str, figures: Mapping[str, Any]) -> Path:
    """A page of Plotly figures, printed one a sheet; each can be linked to.

    Args:
        path: of the new page, e.g. "runs/cards.html"; its folder is made.
        figures: by name; `path#anchor(name)` leads to it.

    Raises:
        ValueError: no figures, or two names with one anchor.
    """
    anchors = {name: anchor(name) for name in figures}
    if not figures or len({*anchors.values()}) < len(anchors):
        raise ValueError(f"figures need names that differ in letters: {list(figures)}")
    page = (
        _environment()
        .get_template("figures.html.j2")
        .render(
            title=title,
            figures={name: json.loads(f.to_json()) for name, f in figures.items()},
            anchors=anchors,
            plotly=plotly_js(),
            **_looks(),
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, page)
    return path


# --- the index ------------------------------------------------------------


def index_page(runs: list[Run], waiting: list[tuple[str, str, str]]) -> str:
    """All notebooks, by collection: those with a run, and those `waiting` for
    one (name, title, question)."""
    cards = [(run.name, run) for run in runs]
    cards += [(name, (title, question)) for name, title, question in waiting]
    groups: dict[str, list] = {}
    for name, card in sorted(cards, key=lambda c: c[0]):
        numbered = re.match(r"(\d)\d", name)
        title = COLLECTIONS.get(numbered[1] if numbered else "", "Your notebooks")
        groups.setdefault(title, []).append((name, card))
    drawn = any(run.thumbnail and "png" not in run.thumbnail for run in runs)
    return (
        _environment()
        .get_template("index.html.j2")
        .render(
            groups=groups,
            runs=runs,
            waiting=waiting,
            failed=[run for run in runs if not run.ok],
            plotly=plotly_js() if drawn else "",
            **_looks(),
        )
    )


def thumbnail(notebook: nbformat.NotebookNode) -> dict[str, Any] | None:
    """The picture of a notebook: from the cell tagged `thumbnail` if it has one,
    else the first figure."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    chosen = [c for c in code if "thumbnail" in c.metadata.get("tags", [])]
    for cell in chosen + code:
        for output in cell.outputs:
            data = output.get("data", {})
            if FIGURE in data:
                return {key: data[FIGURE][key] for key in ("data", "layout")}
            if "image/png" in data:
                return {"png": data["image/png"].replace("\n", "")}
    return None


# --- shared ---------------------------------------------------------------


@cache
def plotly_js() -> str:
    """plotly.js, gzip-compressed and base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "ansi": ansi2html,
        "code": Highlight2HTML(),
        "duration": duration,
        "figure": figure_html,
        "formula": formula,
        "memory": memory,
    }
    env.globals |= {"FIGURE": FIGURE, "WIDGET": WIDGET}
    return env


def _looks() -> dict[str, str]:
    """Style and script of the pages, to be put into them."""
    names = {"css": "page.css", "js": "figures.js"}
    return {key: (ASSETS / name).read_text("utf-8") for key, name in names.items()}


def duration(seconds: float | int) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def write(path: Path, text: str) -> None:
    """Whole or not at all, so that a page being read is never half a page."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


# --- PDF ------------------------------------------------------------------


def browser() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def pdf(page: Path) -> Path:
    """Prints a page; the PDF lies beside it.

    Raises RuntimeError with what the browser said where it fails, and
    FileNotFoundError where there is none.
    """
    program = browser()
    if program is None:
        raise FileNotFoundError(
            "no Chromium or Chrome found (Debian: apt install chromium)"
        )
    out = page.with_suffix(".pdf")
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program,
            "--headless",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-pdf-header-footer",
            "--virtual-time-budget=20000",
            f"--user-data-dir={profile}",
            f"--print-to-pdf={out}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            f"{page.resolve().as_uri()}#print",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{program} took longer than 180 s") from error
    if not out.exists():
        raise RuntimeError(f"{program} wrote no PDF: {done.stderr[-2000:]}")
    return out
