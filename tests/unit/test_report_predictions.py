"""Pages of predictions: the colours of what is found, wrong and missed, and what is not a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segrt.errors import InputError
from segrt.metrics import overlaps
from segrt.report.curves import write_comparison, write_curves
from segrt.report.overlay import COLOURS, legend_of, write_overlay
from segrt.report.predictions import colour_errors, overlap_of, spread, write_errors, write_overview
from segrt.report.sheet import displayed

TRUTH = np.asarray([[0, 0, 1], [1, 2, 2]])
FOUND = np.asarray([[0, 1, 1], [0, 2, 1]])


def test_colours_of_right_wrong_and_missed() -> None:
    colours = colour_errors(TRUTH, FOUND)
    green, red, blue = ((*bytes.fromhex(text), 130) for text in ("3cb44b", "e6194b", "4363d8"))
    expected = [[(0, 0, 0, 0), red, green], [blue, green, red]]
    np.testing.assert_array_equal(colours, expected)


def test_overlap_of_one_structure_is_that_of_the_metrics() -> None:
    truth, found = TRUTH > 0, FOUND > 0
    assert overlap_of(truth, found) == overlaps(truth[None].astype(np.uint8), found[None].astype(np.uint8), {"a": (1,)})["a"]
    assert overlap_of(TRUTH, FOUND).tp == 2


def test_colours_stay_colours_and_other_channels_are_left_out() -> None:
    image = np.random.default_rng(0).integers(0, 65535, (3, 8, 9)).astype(np.uint16)
    assert displayed(image).shape == (8, 9, 3)
    grey = displayed(image[:2])
    assert (grey == grey[..., :1]).all()
    assert displayed(np.full((1, 4, 4), 7.0)).dtype == np.uint8


def test_of_many_some_are_shown() -> None:
    assert spread(3) == [0, 1, 2]
    assert len(spread(100)) == 16
    assert (spread(100)[0], spread(100)[-1]) == (0, 99)
    assert spread(0) == []


def test_pages(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (3, 1, 2, 3)).astype(np.uint8)
    write_errors(tmp_path / "a.png", [("case", image, TRUTH[None], FOUND[None]), ("empty", image, TRUTH[None] * 0, FOUND[None] * 0)])
    write_overview(tmp_path / "b.png", [("case", image[:1], FOUND[None])], {1: "tumour", 2: "oedema"})
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [r"a$\b{$c", "$$", "x$^$", "画像 🫀", "two\nlines", "_none", ""])
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """A formula to matplotlib, which refuses some of them, or letters its font lacks, of which it warns."""
    image = np.zeros((1, 1, 2, 3), np.uint8)
    write_overview(tmp_path / "a.png", [(name, image, FOUND[None])], {1: name, 2: "$"})
    write_overlay(tmp_path / "b.png", image[0], {name: FOUND[None]}, {1: name}, spacing=(1.0, 1.0, 1.0), title=name)
    (tmp_path / "training.csv").write_text("iteration,loss,dice,lr,batch_cost,reader_cost\n1,1,1,1,1,1\n")
    (tmp_path / "validation.csv").write_text(f'iteration,loss,dice,average,"{name}",IoU\n1,1,1,1,1,1\n')
    write_curves(tmp_path / "c.png", {name: tmp_path})
    write_comparison(tmp_path / "d.png", {(name, "sgd"): [tmp_path]})
    assert all((tmp_path / f"{picture}.png").is_file() for picture in "abcd")


def test_a_legend_ends_where_its_colours_begin_again() -> None:
    assert legend_of({255: "tumour"}) == {"255 tumour": COLOURS[0]}
    long = legend_of(dict.fromkeys(range(1, 20), "organ"))
    assert list(long)[-2:] == ["16 organ", "and 3 more"]
    assert len(set(long.values())) == len(long)


def test_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="predictions: none given"):
        write_overview(tmp_path / "a.png", [], {1: "a"})
    with pytest.raises(InputError, match=r"labels of 'case' have shape \(1, 2, 3\), its image \(1, 4, 4\)"):
        write_overview(tmp_path / "a.png", [("case", np.zeros((1, 1, 4, 4)), FOUND[None])], {1: "a"})
