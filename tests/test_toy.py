"""The toy problem: what it claims, and that the animation shows what was computed."""

import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from example import toy
from mtlwrap import IMTLG, EqualWeighting

STEPS = 12


@pytest.fixture(scope="module")
def paths():
    return toy.trajectories(STEPS)


def path_with(*left):
    return toy.Path2d(torch.zeros(2, 2, 2), torch.tensor([[1.0, 1.0], left]))


def test_landscapes_conflict_but_a_rotation_brings_their_minima_together():
    first, second = toy.landscapes().values()
    for landscape in (first, second):
        assert landscape(landscape.minimum).item() == 0
        assert landscape.minimum.norm().item() == pytest.approx(2)
        assert landscape(torch.randn(50, 2).double()).min() > 0
    z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(landscape(z), z)[0] for landscape in (first, second)]
    assert gradients[0] @ gradients[1] < 0
    assert gradients[1].norm().item() == pytest.approx(10 * gradients[0].norm().item())


def test_a_plain_sum_follows_gradient_descent():
    path = toy.follow(EqualWeighting(), toy.STARTS[0], 0.03, steps=2)
    z = torch.tensor(toy.STARTS[0], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([landscape(z) for landscape in toy.landscapes().values()])
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    torch.testing.assert_close(path.points[0], z.detach().expand(2, 2))
    torch.testing.assert_close(path.points[1], (z - 0.03 * gradient).detach().expand(2, 2))
    assert path.left[0].tolist() == [1, 1]


def test_only_rotations_show_the_heads_different_points(paths):
    for name, of_method in paths.items():
        for path in of_method:
            same = torch.allclose(path.points[:, 0], path.points[:, 1])
            assert same == (name != "RotoGrad")
            torch.testing.assert_close(path.points[:, 0].norm(dim=1), path.points[:, 1].norm(dim=1))


def test_rotograd_reaches_both_and_a_plain_sum_is_dragged_to_the_larger():
    (make, lr), start = toy.METHODS["RotoGrad"], toy.STARTS[0]
    assert toy.verdict([toy.follow(make(), start, lr, 250)]) == "reaches both"
    assert toy.verdict([toy.follow(EqualWeighting(), start, 0.03, 100)]) == "dragged to B"


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([(0.01, 0.0), (0.04, 0.0)], "reaches both"),
        ([(0.9, 0.0), (0.8, 0.01)], "dragged to B"),
        ([(0.0, 0.5), (0.0, 0.8)], "dragged to A"),
        ([(0.0, 0.5), (0.8, 0.0)], "one or the other"),
        ([(0.3, 0.5), (0.8, 0.2)], "in between"),
        ([(0.3, 0.5), (0.8, 0.0)], "now this, now that"),
    ],
)
def test_verdict(ends, words):
    assert toy.verdict([path_with(*end) for end in ends]) == words


def test_frames_show_the_paths(paths):
    picture = toy.Picture(paths)
    picture.frame(STEPS - 1)
    (lines, heads, numbers) = picture.panels["IMTL-G"][1]
    for path, line, head, number in zip(paths["IMTL-G"], lines, heads, numbers, strict=True):
        assert list(line.get_xdata()) == path.points[:STEPS, 1, 0].tolist()
        assert list(head.get_ydata()) == path.points[STEPS - 1 : STEPS, 1, 1].tolist()
        assert number.get_text().endswith(f"{100 * path.left[STEPS - 1, 1].item():.0f} %")
    assert all(text.get_text() == "" for text in picture.verdicts)
    picture.frame(STEPS)
    assert [text.get_text().removeprefix("✓ ") for text in picture.verdicts] == [*map(toy.verdict, paths.values())]


def test_command_writes_the_same_animation_again(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "trajectories", lambda: paths)
    for name in ("first", "second"):
        toy.main(["--output", str(tmp_path / name)])
    files = [tmp_path / name / "toy.gif" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "EqualWeighting: " in capsys.readouterr().out
    with Image.open(files[0]) as animation:
        assert animation.n_frames > 5
        assert animation.convert("RGB").getpixel((2, 2)) >= (250, 250, 250)  # opaque, whatever lies below it


def test_again_gives_the_same_points():
    first, again = (toy.follow(IMTLG(), toy.STARTS[1], 0.03, 5) for _ in range(2))
    assert torch.equal(first.points, again.points)


def test_no_pyplot_and_a_folder_that_can_be_written(tmp_path, capsys):
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        toy.main(["--output", str(tmp_path / "file" / "folder")])
    assert "cannot write to" in capsys.readouterr().err
