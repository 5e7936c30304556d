"""Concepts from pixels, on pictures drawn by hand and on real digits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from saeutils import concepts
from saeutils.baselines import Dictionary
from saeutils.datasets import mnist


def picture(text):
    """'#' is ink; a row a line."""
    lines = text.strip().splitlines()
    ink = [[255 * (c == "#") for c in line.strip()] for line in lines]
    return torch.tensor(ink, dtype=torch.uint8)[None]


EIGHT = """
.#####.
.#...#.
.#...#.
.#####.
.#...#.
.#...#.
.#####.
"""
SIX = """
.#.....
.#.....
.#.....
.#####.
.#...#.
.#...#.
.#####.
"""
ONE = """
...#...
...#...
...#...
...#...
...#...
...#...
...#...
"""
OPEN = """
.#####.
.#...#.
.#...#.
.#.....
.#...#.
.#...#.
.#####.
"""
CORNERS = """
..#....
.#.#...
#...#..
.#.#...
..#....
.......
.......
"""
GAP = """
.......
.####..
.#.##..
.####..
.......
.......
.......
"""
BORDER = """
#######
#.....#
#.....#
#.....#
#.....#
#.....#
#######
"""


@pytest.mark.parametrize(
    ("text", "n"),
    [(EIGHT, 2), (SIX, 1), (ONE, 0), (OPEN, 0), (CORNERS, 1), (BORDER, 1)],
    ids=["8", "6", "1", "open", "corners", "border"],
)
def test_loops_of_drawn_figures(text, n):
    assert concepts.loops(picture(text)).tolist() == [n]
    pieces = 1
    assert concepts.euler_number(picture(text)).tolist() == [pieces - n]


def test_a_pinhole_is_no_loop_unless_asked():
    assert concepts.loops(picture(GAP)).tolist() == [0]
    assert concepts.loops(picture(GAP), least=1).tolist() == [1]


def test_images_of_a_stack_do_not_touch_each_other():
    stack = torch.cat([picture(t) for t in (EIGHT, ONE, SIX, BORDER)])
    stack = torch.cat([stack, torch.full_like(stack[:1], 255), stack[:1] * 0])
    assert concepts.loops(stack).tolist() == [2, 0, 1, 1, 0, 0]


@given(st.integers(0, 2**20), st.floats(0.2, 0.8))
def test_euler_number_is_pieces_minus_loops(seed, density):
    g = torch.Generator().manual_seed(seed)
    images = (torch.rand(3, 9, 9, generator=g) < density).byte() * 255
    pieces = [ndimage.label(i.numpy() > 0, np.ones((3, 3)))[1] for i in images]
    want = torch.tensor(pieces) - concepts.loops(images, least=1)
    assert concepts.euler_number(images).tolist() == want.tolist()


def test_strokes_of_drawn_figures():
    assert concepts.longest_strokes(picture(ONE)).tolist() == [[1, 7, 1, 1]]
    assert concepts.longest_strokes(picture(EIGHT)).tolist() == [[5, 7, 2, 2]]
    diagonal = torch.eye(7).byte()[None] * 255
    assert concepts.longest_strokes(diagonal).tolist() == [[1, 1, 7, 1]]
    assert concepts.longest_strokes(diagonal.flip(2)).tolist() == [[1, 1, 1, 7]]
    assert concepts.longest_strokes(diagonal * 0).tolist() == [[0, 0, 0, 0]]


@given(st.integers(0, 2**20))
def test_strokes_equal_the_slow_obvious_ones(seed):
    g = torch.Generator().manual_seed(seed)
    images = (torch.rand(2, 6, 8, generator=g) < 0.6).byte() * 255

    def run(ink, y, x, down, right):
        n = 0
        while 0 <= y < 6 and 0 <= x < 8 and ink[y, x]:
            n, y, x = n + 1, y + down, x + right
        return n

    steps = concepts.DIRECTIONS.values()
    want = [
        [max(run(i, y, x, *s) for y in range(6) for x in range(8)) for s in steps]
        for i in images
    ]
    assert concepts.longest_strokes(images).tolist() == want


def test_top_share():
    assert concepts.top_share(picture(SIX)[:, :6]).item() == pytest.approx(3 / 12)
    grey = torch.zeros(1, 4, 4, dtype=torch.uint8)
    grey[0, 0, 0], grey[0, 3, 3] = 200, 50
    assert concepts.top_share(grey).item() == pytest.approx(0.8)
    assert concepts.top_share(grey * 0).isnan().all()


def test_real_digits_have_the_loops_one_expects():
    test = mnist("test")
    n = concepts.loops(test.images)
    for digit, expected, least in (
        *((0, 1, 0.85), (1, 0, 0.98), (5, 0, 0.9), (6, 1, 0.65), (7, 0, 0.98)),
        *((8, 2, 0.6), (9, 1, 0.75)),
    ):
        assert (n[test.labels == digit] == expected).double().mean() > least, digit


def test_sets_of_concepts():
    images = mnist("test").images[:500]
    for name in concepts.CONCEPT_SETS:
        names, member = concepts.concept_set(name, images)
        assert member.shape == (500, len(names))
        assert (member.double().mean(0) > 0.005).all()  # none is empty
    assert (concepts.concept_set("loops", images).member.sum(1) == 1).all()
    assert concepts.concept_set("top or bottom ink", images).member.sum(1).max() == 1
    with pytest.raises(ValueError, match="'curls' is none of loops, straight"):
        concepts.concept_set("curls", images)


def test_decoded_means_known_answer():
    sae = Dictionary(torch.eye(4), torch.tensor([0, 0, 0, 1.0]))
    rows = torch.tensor([[4.0, 2, 0, 1], [6, 0, 0, 1], [0, 0, 8, 1]])
    member = torch.tensor([[True, False], [True, True], [False, True]])
    got = concepts.decoded_means(sae, rows, member, 1)
    assert got.tolist() == [[5, 0, 0, 1], [0, 0, 4, 1]]
    two = concepts.decoded_means(sae, rows, member, 2)
    assert two.tolist() == [[5, 1, 0, 1], [3, 0, 4, 1]]


def test_random_latents_keep_the_values_and_are_alive():
    sae = Dictionary(torch.eye(6), torch.zeros(6))
    rows = torch.tensor([[3.0, 1, 2, 0, 4, 0], [3.0, 1, 2, 0, 4, 0]])
    member = torch.ones(2, 3, dtype=torch.bool)
    drawn = concepts.decoded_means(sae, rows, member, 2, seed=0)
    assert drawn.sort(1).values[:, -2:].tolist() == [[3, 4]] * 3
    assert not drawn[:, [3, 5]].any()  # silent latents
    assert len(drawn.unique(dim=0)) > 1
    assert torch.equal(drawn, concepts.decoded_means(sae, rows, member, 2, seed=0))


def test_what_decoded_means_refuses():
    sae, rows = Dictionary(torch.eye(4), torch.zeros(4)), torch.eye(4)[:3]
    member = torch.tensor([[True, False]] * 3)
    with pytest.raises(ValueError, match="group 1 has no rows"):
        concepts.decoded_means(sae, rows, member, 1)
    with pytest.raises(ValueError, match="3 rows, but members given for 2"):
        concepts.decoded_means(sae, rows, member[:2], 1)
    for top in (0, 4):
        with pytest.raises(ValueError, match=r"1\.\.3 \(live latents\), got"):
            concepts.decoded_means(sae, rows, member[:, :1], top)
