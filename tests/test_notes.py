"""Notes survive kills, other SAEs, other writers and broken files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from saeutils.baselines import Dictionary
from saeutils.notes import Notes


def sae(seed=0):
    g = torch.Generator().manual_seed(seed)
    return Dictionary(torch.randn(6, 3, generator=g), torch.zeros(3))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "notes.json"


def test_notes_are_kept_changed_and_taken_away(path):
    notes = Notes(path, sae(), about="here")
    assert len(notes) == 0 and not path.exists()  # looking writes nothing
    notes.write(4, "sad words")
    notes.write(2, "“quotes”, ⏎ and\nlines")
    again = Notes(path, sae())
    assert dict(again) == {2: "“quotes”, ⏎ and\nlines", 4: "sad words"}
    again.write(4, "grief")
    again.write(2, "")
    assert dict(notes) == {4: "grief"} and 2 not in notes


def test_a_machine_never_touches_what_a_user_wrote(path):
    notes = Notes(path, sae())
    notes.write(1, "mine")
    notes.suggest({1: "on “x”", 3: "concept y"})
    notes.suggest({1: "on “z”"})
    table = notes.table().set_index("latent")
    assert table.text.to_dict() == {1: "mine", 3: ""}
    assert table.label.to_dict() == {1: "on “z”", 3: "concept y"}
    assert dict(notes) == {1: "mine"}
    notes.write(1, "")
    assert notes.table().set_index("latent").label.to_dict()[1] == "on “z”"


def test_running_again_changes_nothing(path):
    notes = Notes(path, sae())
    notes.write(1, "mine")
    notes.suggest({2: "label"})
    before = path.read_bytes()
    time.sleep(1.1)  # the time stands in the file, to the second
    again = Notes(path, sae())
    again.suggest({2: "label"})
    again.write(1, "mine")
    assert path.read_bytes() == before


def test_notes_on_another_sae_stay_and_are_not_shown(path):
    Notes(path, sae(0), about="first").write(1, "of the first")
    other = Notes(path, sae(1), about="second")
    assert len(other) == 0 and len(other.table()) == 0
    other.write(1, "of the second")
    first = Notes(path, sae(0))
    assert dict(first) == {1: "of the first"}
    assert list(first.others.values()) == [("second", 1)]
    by_name = Notes(path, first.sae, d_sae=6)
    assert dict(by_name) == dict(first)


def test_a_saved_sae_keeps_its_notes(path, tmp_path):
    from saeutils import sae as sae_format
    from saeutils.training import TrainConfig, train

    config = TrainConfig("topk", d_sae=8, k=2, steps=3, batch_size=4)
    trained = train(torch.randn(40, 5), config, progress=False).sae
    Notes(path, trained).write(7, "kept")
    opened = sae_format.load(sae_format.save(trained, tmp_path / "sae"))
    assert dict(Notes(path, opened)) == {7: "kept"}


def test_an_edit_by_hand_is_seen_and_kept(path):
    notes = Notes(path, sae())
    notes.write(1, "typed here")
    content = json.loads(path.read_text())
    latents = content["saes"][notes.sae]["latents"]
    latents["1"]["text"], latents["1"]["colour"] = "by hand", "blue"
    path.write_text(json.dumps(content))
    notes.write(2, "more")
    assert dict(notes) == {1: "by hand", 2: "more"}
    latents = json.loads(path.read_text())["saes"][notes.sae]["latents"]
    assert latents["1"]["colour"] == "blue"


@pytest.mark.parametrize("keep", [0, 1, 40, -5])
def test_a_truncated_file_is_named_and_left_alone(path, keep):
    notes = Notes(path, sae())
    notes.write(1, "one")
    notes.write(2, "two")
    path.write_bytes(path.read_bytes()[:keep])
    left = path.read_bytes()
    for attempt in (
        lambda: Notes(path, sae()),
        lambda: notes.write(3, "three"),
        lambda: notes.suggest({3: "three"}),
        lambda: dict(notes),
    ):
        with pytest.raises(ValueError, match=r"cannot be read as notes.*\.bak"):
            attempt()
    assert path.read_bytes() == left
    path.write_bytes(path.with_name("notes.json.bak").read_bytes())
    assert dict(Notes(path, sae())) == {1: "one"}  # all but the last change


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": "x", "version": 1, "saes": {}}', '"text"']
)
def test_a_file_of_something_else_is_refused(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match="cannot be read as notes"):
        Notes(path, sae()).write(1, "x")
    assert path.read_text() == content


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failing_disk_loses_no_note(path, monkeypatch, broken):
    notes = Notes(path, sae())
    notes.write(1, "one")
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise OSError(28, "No space left on device")

        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match=r"notes of before are safe"):
            notes.write(2, "two")
    assert dict(notes) == {1: "one"}
    notes.write(2, "two")
    assert dict(notes) == {1: "one", 2: "two"}


WRITER = """
import sys
from saeutils.notes import Notes
for i in range(100_000):
    Notes(sys.argv[1], "f" * 64, d_sae=10**6).write(int(sys.argv[2]) + i, "x" * 500)
"""


def writer(path, first):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)])


def wait_for(path, n, process):
    deadline = time.monotonic() + 120
    while not path.exists() or len(Notes(path, "f" * 64, d_sae=10**6)) < n:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_kill_at_any_instant_loses_no_finished_note(path):
    seen = 0
    for round_ in range(3):
        process = writer(path, 1000 * round_)
        wait_for(path, seen + 3 + round_, process)
        before = dict(Notes(path, "f" * 64, d_sae=10**6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = dict(Notes(path, "f" * 64, d_sae=10**6))
        assert before.items() <= after.items()
        assert all(text == "x" * 500 for text in after.values())
        seen = len(after)
    Notes(path, "f" * 64, d_sae=10**6).write(5, "after the kill")  # the lock is free


def test_two_writers_lose_none_of_each_other(path):
    both = [writer(path, first) for first in (0, 100_000)]
    notes = Notes(path, "f" * 64, d_sae=10**6)
    deadline = time.monotonic() + 120
    found = []
    while time.monotonic() < deadline:
        found = sorted(notes) if path.exists() else []
        if sum(i < 100_000 for i in found) > 3 and sum(i >= 100_000 for i in found) > 3:
            break
        time.sleep(0.05)
    for process in both:
        process.kill()
        process.wait()
    for first in (0, 100_000):
        mine = [i - first for i in found if 0 <= i - first < 100_000]
        assert len(mine) > 3 and mine == list(range(len(mine)))


def test_a_latent_that_is_not_there_is_refused(path):
    with pytest.raises(ValueError, match="say how many latents"):
        Notes(path, "f" * 64)
    notes = Notes(path, sae())
    for latent in (-1, 6):
        with pytest.raises(ValueError, match=r"not in 0\.\.5"):
            notes.write(latent, "x")
    with pytest.raises(ValueError, match=r"not in 0\.\.5"):
        notes.suggest({1: "fine", 6: "x"})
    assert not path.exists()
