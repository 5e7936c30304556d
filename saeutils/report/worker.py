"""Runs one notebook and writes its page. The job comes as JSON on stdin; stdout
carries one line a cell, `i n`; the result is `run.json` in the job's folder."""

import importlib.metadata
import json
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbconvert.filters import strip_ansi
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from saeutils.report import pages
from saeutils.report.execute import Failure, Job, Run, describe, parameters

SHOWN_VERSIONS = ("saeutils", "torch", "numpy", "sae-lens", "plotly", "scikit-learn")


class Engine(NBClientEngine):
    """papermill's own engine; says which code cell is running."""

    progress = None  # a text stream
    cell = 0

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        start = nb_man.cell_start
        number = {id(c): i for i, c in enumerate(pages.code_cells(nb_man.nb), 1)}

        def cell_start(cell, cell_index=None, **more):
            if id(cell) in number:
                cls.cell = number[id(cell)]
                print(cls.cell, len(number), file=cls.progress, flush=True)
            start(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


def execute(job: Job, output: Path, progress) -> Failure | None:
    """Runs the notebook, writing `output` as it goes; says how it failed."""
    Engine.progress = progress
    papermill_engines.register("saeutils", Engine)
    try:
        papermill.execute_notebook(
            job.notebook,
            output,
            job.parameters,
            engine_name="saeutils",
            kernel_name="python3",
            language="python",
            cwd=job.folder,
            progress_bar=False,
            execution_timeout=job.timeout,
        )
    except PapermillExecutionError as error:
        message = f"{error.ename}: {error.evalue}"
        text = strip_ansi("\n".join(error.traceback))
        return Failure(Engine.cell, error.source, message, text)
    except CellTimeoutError:
        message = f"the cell took longer than the {job.timeout} s allowed"
    except DeadKernelError:
        message = "the kernel died (often: the machine was out of memory)"
    else:
        return None
    cell = pages.code_cells(nbformat.read(output, 4))[Engine.cell - 1]
    return Failure(Engine.cell, cell.source, message, "")


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in SHOWN_VERSIONS:
        found[name] = importlib.metadata.version(name)
    return found


def used() -> tuple[float, int]:
    """CPU seconds, and bytes of the largest process, of this process and of the
    kernel it had (which counts once it has ended)."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    both = [resource.getrusage(who) for who in whose]
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in both)
    return seconds, max(usage.ru_maxrss for usage in both) * unit


def work(job: Job, progress) -> Run:
    begin = time.monotonic()
    title, question = describe(job.notebook)
    run = Run(
        job.name,
        title,
        question,
        job.preset,
        parameters(job.notebook) | job.parameters,
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=versions(),
    )
    output = job.folder / f"{job.name}.ipynb"
    failure = execute(job, output, progress)
    notebook = nbformat.read(output, 4)
    cpu, peak = used()
    total = len(pages.code_cells(notebook))
    run = replace(
        run,
        seconds=time.monotonic() - begin,
        cpu_seconds=cpu,
        peak_bytes=peak,
        cells=total,
        cells_run=failure.cell - 1 if failure else total,
        thumbnail=pages.thumbnail(notebook),
        failure=failure,
    )
    made = job.folder, os.path.relpath(job.folder, job.page.parent)
    page = pages.notebook_page(notebook, run, job.notebook.parent, made)
    pages.write(job.page, page)
    return run


def main() -> None:
    job = Job(**json.load(sys.stdin))
    paths = {key: Path(getattr(job, key)) for key in ("notebook", "folder", "page")}
    job = replace(job, **paths)
    # What the kernel's libraries print below Python goes to the log, not between
    # the lines of progress.
    progress = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as profile:  # no start-up files of the user's
        os.environ["IPYTHONDIR"] = profile
        run = work(job, progress)
    run.save(job.folder)


if __name__ == "__main__":
    main()
