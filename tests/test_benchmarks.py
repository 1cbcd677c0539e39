"""That the benchmark runs, leaves nobody out, and compares equals. Nothing here is timed."""

import csv
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mtlwrap import balancers
from tests.benchmarks import step_time
from tests.benchmarks.contenders import Contender, Runner, contenders
from tests.benchmarks.measuring import measure, peak_memory
from tests.benchmarks.problems import PROBLEMS, Problem, Rotation, assemble, build
from tests.common import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch.vmap, which torchjd uses

CONTENDERS = {contender.name: contender for contender in contenders()}


class Table(nn.Module):
    """A backbone whose parameter is z itself: gradients on its parameters are those on z."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.z + x


def gradients(name: str, problem: Problem) -> list[Tensor]:
    """What a step of this contender leaves in the parameters of the problem."""
    runner = CONTENDERS[name].prepare(problem)
    runner.clear()
    runner.step()
    modules = (problem.backbone, *problem.heads)
    found = [p.grad.clone() for module in modules for p in module.parameters()]
    runner.clear()
    return found


def test_everything_runs(tmp_path, capsys):
    path = tmp_path / "results.csv"
    outcomes = step_time.main(["--quick", "--device", str(DEVICE), "--csv", str(path)])
    assert [outcome.problem for outcome in outcomes] == list(PROBLEMS)
    results = [result for outcome in outcomes for of_tasks in outcome.results.values() for result in of_tasks]
    assert {result.contender for result in results} == set(CONTENDERS)
    for result in results:
        assert result.reason is None
        assert result.ratio > 0
        assert math.isfinite(result.ratio)
        assert result.peak > 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"│ {name} ") == 2 * len(PROBLEMS) for name in CONTENDERS)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == [result.contender for result in results]
    assert all(float(row["ratio"]) > 0 for row in rows)


def test_every_balancer_has_a_row():
    bases = {
        balancers.Balancer,
        balancers.LossBalancer,
        balancers.GradientBalancer,
        balancers.Compose,
        balancers.TorchJD,
    }
    exported = [getattr(balancers, name) for name in balancers.__all__]
    concrete = {value.__name__ for value in exported if isinstance(value, type)} - {base.__name__ for base in bases}
    assert concrete == {name for name, contender in CONTENDERS.items() if contender.ours and "-" not in name}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["EqualWeighting", "FixedWeights", "rotograd:VanillaMTL"])
def test_the_sums_are_the_plain_sum(problem, name):
    problem = build(problem, 3, DEVICE, quick=True)
    assert_close(gradients(name, problem), gradients("plain", problem))


@pytest.mark.parametrize("name", ["torchjd:IMTLG", "torchjd:IMTLG-lean"])
def test_the_libraries_agree_on_imtl_g(name):
    heads = [nn.Linear(50, 1 if task % 2 else 4) for task in range(4)]
    problem = assemble(Table(20, 50), heads, torch.randn(20, 50), DEVICE, Rotation(50, (), "z"))
    for theirs, ours in zip(gradients(name, problem), gradients("IMTLG", problem), strict=True):
        assert torch.linalg.vector_norm(theirs - ours) <= 1e-3 * torch.linalg.vector_norm(ours)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_contender_has_the_same_weights_and_data(problem):
    first, second = (build(problem, 3, DEVICE, quick=True) for _ in range(2))
    before = gradients("plain", first)
    for contender in CONTENDERS.values():
        runner = contender.prepare(first)
        runner.step()
        runner.clear()
    assert_close(gradients("plain", first), before)
    assert_close(gradients("plain", second), before)


@pytest.mark.parametrize(
    "unit", [512, pytest.param(511, marks=pytest.mark.skipif(DEVICE.type != "cpu", reason="exact only on the CPU"))]
)
def test_memory_is_exact(unit):
    held = []

    def step() -> None:
        first = torch.empty(1000 * unit, dtype=torch.uint8, device=DEVICE)
        second = torch.empty(500 * unit, dtype=torch.uint8, device=DEVICE)
        del first
        held.append(torch.empty(200 * unit, dtype=torch.uint8, device=DEVICE))
        del second

    runner = Runner(step, (), held.clear)
    assert [peak_memory(runner, DEVICE) for _ in range(2)] == [1500 * unit] * 2
    assert not held


def test_extra_memory_is_counted_in_gradients():
    problem = build("many", 2, DEVICE, quick=True)
    plain = CONTENDERS["plain"]

    def greedy(problem: Problem) -> Runner:
        runner = plain.prepare(problem)

        def step() -> None:
            ballast = torch.empty(3 * problem.gradient_bytes(), dtype=torch.uint8, device=DEVICE)
            runner.step()
            del ballast

        return Runner(step, runner.parameters)

    _, result = measure(problem, [plain, Contender("greedy", greedy, ours=True)], 1, 1, lambda: None)
    assert result.copies == pytest.approx(3, abs=0.1 if DEVICE.type == "cpu" else 4)
    if DEVICE.type == "cpu":
        assert not result.within_bar


def test_who_cannot_run_is_left_out_with_the_reason(capsys, monkeypatch):
    capped = [Contender("plain", CONTENDERS["plain"].make), Contender("capped", CONTENDERS["plain"].make, most_tasks=2)]
    monkeypatch.setattr(step_time, "contenders", lambda: capped)
    (outcome,) = step_time.main(["--quick", "--problems", "many", "--tasks", "2", "3", "--device", str(DEVICE)])
    assert [result.reason is None for result in outcome.results[2]] == [True, True]
    assert [result.reason is None for result in outcome.results[3]] == [True, False]
    assert "- capped: too slow, not run with more than 2 tasks (T = 3)" in capsys.readouterr().out


def test_another_baseline(capsys):
    arguments = ["--quick", "--problems", "many", "--contenders", "IMTLG", "--baseline", "UW", "--device", str(DEVICE)]
    (outcome,) = step_time.main(arguments)
    baseline, other = outcome.results[3]
    assert (baseline.contender, other.contender) == ("UW", "IMTLG")
    assert set(baseline.ratios) == {1.0}
    assert "time of a step over that of UW" in capsys.readouterr().out
