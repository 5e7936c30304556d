"""One truth about versions: ranges in pyproject.toml, pins in the lock, and an
environment.yml that only points there. And the whole tree is as ruff wants it."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def ranges() -> list[Requirement]:
    """What pyproject.toml asks for, in the core and in every extra."""
    lines = [*PROJECT["dependencies"]]
    lines += [line for name, extra in EXTRAS.items() if name != "all" for line in extra]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_line_of_the_lock_is_one_exact_pin():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    for line in lines:
        assert re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line), line  # no +cpu, no URL
    assert len(pins()) == sum(not line.startswith("#") for line in lines)


@pytest.mark.parametrize("wanted", ranges(), ids=str)
def test_the_lock_satisfies_every_range(wanted):
    assert pins()[canonicalize_name(wanted.name)] in wanted.specifier


def test_the_lock_is_what_the_ranges_need_and_no_more():
    """Walks from pyproject's ranges through what is installed: each package met
    is pinned, and each pin is met."""
    met, walked, todo = {"pip"}, set(), ranges()  # pip installs the others
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in walked:
            continue
        walked.add(key)
        met.add(key[0])
        for line in importlib.metadata.requires(wanted.name) or []:
            need = Requirement(line)
            marked = [{"extra": extra} for extra in ("", *wanted.extras)]
            if need.marker is None or any(map(need.marker.evaluate, marked)):
                todo.append(need)
    # torch's CUDA build brings packages that it pins itself
    met = {name for name in met if not re.match("nvidia|cuda|triton", name)}
    pinned = set(pins())
    assert met - pinned == set(), "needed, but not in requirements.lock: make lock"
    assert pinned - met - platform_only() == set(), "pinned, but nothing needs it"


def platform_only() -> set[str]:
    """Pins that another platform needs: not installed here."""
    names = {canonicalize_name(d.name) for d in importlib.metadata.distributions()}
    return set(pins()) - names


def test_packages_that_break_the_others_stay_out():
    # torchvision beside a CPU torch breaks `import transformers`
    assert not {"torchvision", "torchaudio", "timm"} & set(pins())


def test_hosted_notebooks_keep_their_own_torch():
    """What a hosted notebook carries satisfies the core, so that installing there
    replaces none of it."""
    hosted = {"torch": "2.6.0", "numpy": "1.26.4", "pandas": "2.2.2"}
    core = {wanted.name: wanted for wanted in map(Requirement, PROJECT["dependencies"])}
    for name, version in hosted.items():
        assert version in core[name].specifier


def test_all_is_every_extra():
    (everything,) = map(Requirement, EXTRAS["all"])
    assert everything.name == PROJECT["name"]
    assert everything.extras == set(EXTRAS) - {"all"}


def test_environment_yml_is_python_pip_and_this_package():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, from_pip = conda["dependencies"]
    assert pip == "pip"
    assert from_pip == {"pip": ["-e .[all]"]}
    bounds = SpecifierSet(python.removeprefix("python "))
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert lowest in bounds and "3.10" not in bounds
    # the Makefile takes what environment.yml takes
    (low, high) = re.search(
        r"\((3, \d+)\) <= sys.version_info < \((3, \d+)\)",
        (ROOT / "Makefile").read_text(),
    ).groups()
    as_bounds = f">={low},<{high}".replace("3, ", "3.")
    assert SpecifierSet(as_bounds) == bounds


def test_version_is_the_same_everywhere():
    import saeutils

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert saeutils.__version__ == PROJECT["version"] == citation["version"]


def test_importing_the_package_is_cheap():
    code = "import sys, saeutils; print(sorted(set(sys.modules) & {'torch', 'numpy'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
