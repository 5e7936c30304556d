"""Plan the runs of notebooks, and run several at once.

Each notebook has a worker process of its own (`worker`), and that has a kernel:
a notebook that crashes, hangs or eats the memory takes nothing else with it.
"""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

BYTES_PER_NOTEBOOK = 2 * 2**30  # what one notebook at the quick size may need


@dataclass(frozen=True)
class Job:
    """One notebook to run. `folder` is its working folder, emptied beforehand."""

    name: str
    notebook: Path
    folder: Path
    page: Path
    preset: str = "quick"
    parameters: dict[str, Any] = field(default_factory=dict)
    timeout: int | None = None  # seconds a cell may take
    threads: int = 1


@dataclass(frozen=True)
class Failure:
    """Where a notebook stopped. `cell` counts code cells from 1, as `In [1]` does."""

    cell: int | None
    source: str
    message: str  # "ValueError: k is 40, d_sae 32 ..."
    traceback: str  # plain text


@dataclass(frozen=True)
class Run:
    """What is known of a notebook's last run; kept as `run.json` in its folder."""

    name: str
    title: str
    question: str
    preset: str
    parameters: dict[str, Any]  # all of them, as run
    started: str  # ISO time
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # worker, kernel and its children
    peak_bytes: int = 0  # of the largest process
    cells_run: int = 0
    cells: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    thumbnail: dict[str, Any] | None = None  # a Plotly figure, or {"png": base64}
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None

    def save(self, folder: Path) -> None:
        new = folder / "run.json.new"
        new.write_text(json.dumps(asdict(self)), encoding="utf-8")
        new.replace(folder / "run.json")

    @classmethod
    def load(cls, folder: Path) -> "Run":
        known = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if known["failure"]:
            known["failure"] = Failure(**known["failure"])
        return cls(**known)


# --- planning -------------------------------------------------------------


def find(folder: Path, only: list[str]) -> list[Path]:
    """The notebooks of a folder that match: `10` is the beginning of a name,
    `mnist` any part of it; none asked for means all.

    Raises ValueError where something asked for matches nothing.
    """
    every = sorted(folder.glob("*.ipynb"))
    if not every:
        raise ValueError(f"no notebooks in {folder}/")
    if not only:
        return every
    chosen = set()
    for wanted in only:
        wanted = wanted.removesuffix(".ipynb")
        fits = str.startswith if wanted.isdigit() else str.__contains__
        found = {path for path in every if fits(path.stem, wanted)}
        if not found:
            names = ", ".join(path.stem for path in every)
            raise ValueError(f"no notebook matches {wanted!r}; there are: {names}")
        chosen |= found
    return sorted(chosen)


def read_presets(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """presets.toml: {notebook: {preset: {parameter: value}}}."""
    path = folder / "presets.toml"
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def parameters(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook, read from the cell tagged `parameters`."""
    found = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "parameters" not in cell["metadata"].get("tags", []):
            continue
        for line in ast.parse("".join(cell["source"])).body:
            if isinstance(line, ast.Assign | ast.AnnAssign) and line.value:
                plain = isinstance(line, ast.Assign)
                target = line.targets[0] if plain else line.target
                try:
                    value = ast.literal_eval(line.value)
                except ValueError:  # not a literal: shown as it is written
                    value = ast.unparse(line.value)
                found[ast.unparse(target)] = value
    return found


def plan(
    notebooks: list[Path],
    out: Path,
    preset: str = "quick",
    timeout: int | None = None,
    threads: int = 1,
) -> list[Job]:
    """One job a notebook, with the overrides of the preset (`quick` has none).

    Raises ValueError where a preset names a parameter that the notebook has not,
    before anything runs: papermill itself would only warn, and run at the size
    that was not asked for.
    """
    jobs = []
    for notebook in notebooks:
        sizes = read_presets(notebook.parent).get(notebook.stem, {})
        changed = {} if preset == "quick" else sizes.get(preset, {})
        known = parameters(notebook)
        unknown = sorted(set(changed) - set(known))
        if unknown:
            raise ValueError(
                f"{notebook.parent / 'presets.toml'}: [{notebook.stem}.{preset}] sets "
                f"{', '.join(unknown)}, but the notebook's parameters are: "
                f"{', '.join(known) or 'none (no cell is tagged `parameters`)'}"
            )
        folder = out / "runs" / notebook.stem
        page = out / f"{notebook.stem}.html"
        jobs.append(
            Job(
                notebook.stem,
                notebook.resolve(),
                folder.resolve(),
                page.resolve(),
                preset,
                changed,
                timeout,
                threads,
            )
        )
    return jobs


def describe(notebook: Path) -> tuple[str, str]:
    """Title and question of a notebook: its first heading, and the first
    paragraph below it that is more than a badge."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    opening = next((c["source"] for c in cells if c["cell_type"] == "markdown"), "")
    blocks = re.split(r"\n\s*\n", "".join(opening).strip())
    title, question = notebook.stem, ""
    for block in blocks:
        heading, _, rest = block.partition("\n")
        if heading.startswith("# "):
            title, block = heading[2:].strip(), rest
        block = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?", "", block)  # badges
        block = re.sub(r"^\W*question\W*", "", block.strip(), flags=re.IGNORECASE)
        block = re.sub(r"[*`]|(?<!\w)_|_(?!\w)", "", block)
        if block.strip():
            question = " ".join(block.split())
            question = question[0].upper() + question[1:]
            break
    return title, question


def how_many() -> int:
    """Notebooks at once: as many as there are cores, and memory for them."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // BYTES_PER_NOTEBOOK))


# --- running --------------------------------------------------------------


@dataclass(eq=False)
class State:
    """What a job is doing, as its worker tells it."""

    job: Job
    started: float | None = None
    cell: int = 0
    cells: int = 0
    worker: subprocess.Popen | None = None
    run: Run | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started if self.started else 0.0


def run_all(jobs: list[Job], parallel: int) -> Iterator[list[State]]:
    """Run the jobs, `parallel` at once; yields the states of all, some times a
    second, until every state has its `run`. A failing notebook is a Run with a
    failure, and the others go on. Closing the iterator, or an exception in it
    (Ctrl-C), ends every worker and its kernel.
    """
    states = [State(job) for job in jobs]
    pool = ThreadPoolExecutor(parallel)
    pending = {pool.submit(_run, state) for state in states}
    try:
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            yield states
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for state in states:
            if state.worker and state.worker.poll() is None:
                _end(state.worker)
        pool.shutdown()


def _run(state: State) -> None:
    """One job in a worker process, whose output is one line a cell: `i n`."""
    job = state.job
    state.started = time.monotonic()
    try:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        job.page.unlink(missing_ok=True)
        with open(job.folder / "worker.log", "w", encoding="utf-8") as log:
            state.worker = subprocess.Popen(
                [sys.executable, "-m", "saeutils.report.worker"],
                env=_environment(job),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for us; we end the workers
            )
            state.worker.stdin.write(json.dumps(asdict(job), default=str))
            state.worker.stdin.close()
            for line in state.worker.stdout:
                state.cell, state.cells = map(int, line.split())
            code = state.worker.wait()
        if (job.folder / "run.json").exists():
            state.run = Run.load(job.folder)
            return
        failure = Failure(
            state.cell or None,
            "",
            f"the process running the notebook ended with {_exit(code)}",
            (job.folder / "worker.log").read_text(encoding="utf-8")[-4000:],
        )
    except OSError as error:
        failure = Failure(None, "", f"{type(error).__name__}: {error}", "")
    title, question = describe(job.notebook)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    state.run = Run(
        job.name, title, question, job.preset, job.parameters, now, state.elapsed,
        cells_run=max(0, state.cell - 1), cells=state.cells, failure=failure,
    )  # fmt: skip
    with contextlib.suppress(OSError):  # the folder may be what failed
        state.run.save(job.folder)


def _environment(job: Job) -> dict[str, str]:
    env = dict(os.environ)
    for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        env[f"{library}_NUM_THREADS"] = str(job.threads)
    # Figures are kept as figures; `pages` draws them.
    env["PLOTLY_RENDERER"] = "plotly_mimetype"
    # "python3" must be this Python, whatever kernels the user has registered.
    env.pop("JUPYTER_PATH", None)
    env["JUPYTER_PREFER_ENV_PATH"] = "1"
    env["JUPYTER_PLATFORM_DIRS"] = "1"
    env["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else a warning in the pages
    return env


def _exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "signal SIGKILL (often: the machine was out of memory)"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(worker: subprocess.Popen) -> None:
    """Ends a worker and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(worker.pid)
        for process in [*family.children(recursive=True), family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    worker.wait()
