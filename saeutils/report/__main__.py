"""The command line: `python -m saeutils.report --help`."""

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path

from saeutils.report.execute import (
    Run,
    State,
    describe,
    find,
    how_many,
    plan,
    run_all,
)

HEARTBEAT = 30  # seconds between two lines of progress where there is no terminal


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        if options.thumbnails:
            return thumbnails(options)
        notebooks = find(options.folder, options.only)
        jobs = plan(
            notebooks, options.out, options.preset, options.timeout, options.threads
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parallel = min(options.jobs or how_many(), len(jobs))
    runs = follow(jobs, parallel)
    index = write_index(options.folder, options.out)
    printed = [print_pdf(job.page) for job in jobs] if options.pdf else []
    print(summary(runs))
    for run in runs:
        if not run.ok:
            print(failure(run), flush=True)
    for page in [*(job.page for job in jobs if len(jobs) == 1), *printed]:
        if page and page.exists():
            print(page.as_uri())
    print(f"Open {index.resolve().as_uri()}")
    return 0 if all(run.ok for run in runs) else 1


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m saeutils.report",
        description="Execute notebooks and write their reports.",
    )
    add = parser.add_argument
    add("only", nargs="*", help="10 (how a name begins) or mnist (a part of it)")
    add("--folder", type=Path, default=Path("notebooks"), help="where they are")
    add("--out", type=Path, default=Path("reports"), help="where pages are written")
    add("--preset", default="quick", help="quick, or one of presets.toml: smoke, full")
    add("--jobs", type=positive, help="how many at once (default: one a core)")
    add("--threads", type=positive, default=1, help="threads each (default: 1)")
    add("--timeout", type=positive, help="seconds a cell may take (default: no limit)")
    add("--pdf", action="store_true", help="print the pages to PDF too")
    add(
        "--thumbnails",
        action="store_true",
        help="only: write the pictures of the last runs to FOLDER/thumbnails/",
    )
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


# --- what is shown while it runs ------------------------------------------


def follow(jobs, parallel: int) -> list[Run]:
    """Runs the jobs. A terminal shows a line for each that is running, renewed
    all the time; elsewhere (CI) a line when one begins, ends, and now and then."""
    live = sys.stdout.isatty()
    count = f"{len(jobs)} notebook{'s' * (len(jobs) != 1)}"
    print(f"{count}, {parallel} at once, size: {jobs[0].preset}", flush=True)
    begin, shown = time.monotonic(), 0
    states: list[State] = []
    ended: list[State] = []
    due: dict[str, float] = {}  # when to speak of a notebook again
    # Closed at once when Ctrl-C strikes out here, not whenever garbage is collected.
    with contextlib.closing(run_all(jobs, parallel)) as progress:
        for states in progress:
            new = [state for state in states if state.run and state not in ended]
            ended += new
            lines = [outcome(state) for state in new]
            busy = [state for state in states if state.started and not state.run]
            if live:
                passed = clock(time.monotonic() - begin)
                now = [running(state) for state in busy]
                now.append(f"  {len(ended)} of {len(jobs)} done, {passed}")
                sys.stdout.write(f"\x1b[{shown}F\x1b[J" if shown else "")
                shown = len(now)
                lines += now
            else:
                spoken = [s for s in busy if s.elapsed >= due.get(s.job.name, 0)]
                due |= {s.job.name: s.elapsed + HEARTBEAT for s in spoken}
                lines += [running(state) for state in spoken]
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()
    return [state.run for state in states]


def running(state: State) -> str:
    where = f"cell {state.cell} of {state.cells}" if state.cell else "starting"
    return f"  {state.job.name:<36.36}  {clock(state.elapsed):>6}  {where}"


def outcome(state: State) -> str:
    run = state.run
    words = "ok" if run.ok else "FAILED"
    if run.failure and run.failure.cell:
        words += f" in cell {run.failure.cell} of {run.cells}"
    return f"  {run.name:<36.36}  {clock(run.seconds):>6}  {words}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"


# --- what is said at the end ----------------------------------------------


def summary(runs: list[Run]) -> str:
    wide = max([8, *(len(run.name) for run in runs)])
    lines = [
        f"\n{'notebook':<{wide}}  {'status':<6}  {'time':>7}  {'CPU':>7}  "
        f"{'memory':>8}  {'cells':>7}"
    ]
    for run in runs:
        lines.append(
            f"{run.name:<{wide}}  {'ok' if run.ok else 'FAILED':<6}  "
            f"{run.seconds:>5.1f} s  {run.cpu_seconds:>5.1f} s  "
            f"{run.peak_bytes / 2**20:>4.0f} MiB  {run.cells_run:>3}/{run.cells}"
        )
    failed = sum(not run.ok for run in runs)
    cpu = sum(run.cpu_seconds for run in runs)
    verdict = f"{failed} of {len(runs)} failed" if failed else "all ran through"
    return "\n".join([*lines, f"{verdict}; {cpu:.1f} s of CPU time", ""])


def failure(run: Run) -> str:
    """The cell that failed, the beginning of its code, and the traceback."""
    what = run.failure
    where = f", cell {what.cell} of {run.cells}" if what.cell else ""
    head = what.source.strip().splitlines()
    code = [f"    | {line}" for line in head[:6]] + ["    | ..."] * (len(head) > 6)
    trace = [f"    {line}" for line in what.traceback.strip().splitlines()[-30:]]
    return "\n".join([f"{run.name}{where}: {what.message}", *code, *trace, ""])


def write_index(folder: Path, out: Path) -> Path:
    """The index shows the last run of each notebook there is, and which wait."""
    from saeutils.report import pages

    runs, waiting = [], []
    for notebook in sorted(folder.glob("*.ipynb")):
        ran = out / "runs" / notebook.stem
        if (ran / "run.json").exists():
            runs.append(Run.load(ran))
        else:
            waiting.append((notebook.stem, *describe(notebook)))
    pages.write(out / "index.html", pages.index_page(runs, waiting))
    return out / "index.html"


def print_pdf(page: Path) -> Path | None:
    """The PDF of a page; says why where there is none, and lives without it."""
    from saeutils.report import pages

    if not page.exists():
        return None
    try:
        return pages.pdf(page)
    except (FileNotFoundError, RuntimeError) as error:
        print(f"no PDF of {page.name}: {error}", file=sys.stderr)
        return None


def thumbnails(options: argparse.Namespace) -> int:
    """PNGs of the last runs, for the README; by kaleido, which needs Chromium."""
    import base64

    import plotly.graph_objects as go

    target = options.folder / "thumbnails"
    target.mkdir(exist_ok=True)
    for notebook in find(options.folder, options.only):
        ran = options.out / "runs" / notebook.stem
        picture = Run.load(ran).thumbnail if (ran / "run.json").exists() else None
        path = target / f"{notebook.stem}.png"
        if picture is None:
            print(f"{notebook.stem}: no picture; run it first")
        elif "png" in picture:
            path.write_bytes(base64.b64decode(picture["png"]))
            print(path)
        else:
            figure = go.Figure(picture)
            # drawn at its own size, then made small: nothing is squeezed
            width = figure.layout.width or 700
            height = figure.layout.height or 450
            figure.write_image(path, width=width, height=height, scale=420 / width)
            print(path)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: tidy up
    try:
        code = main()
    except KeyboardInterrupt:
        print("\nStopped; no notebook goes on.", file=sys.stderr)
        code = 130
    sys.exit(code)
