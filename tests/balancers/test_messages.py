"""What is said where a balancer was expected and something near it came, or where an option is of the wrong kind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation

from mtlwrap import (
    DWA,
    FAMO,
    GLS,
    IMTL,
    IMTLG,
    IMTLL,
    RLW,
    UW,
    Balancer,
    Compose,
    ExcessMTL,
    FixedWeights,
    GradientBalancer,
    GradNorm,
    LossBalancer,
    MultiTaskModel,
    RotateOnly,
    RotoGrad,
    RotoGradNorm,
    TaskGradients,
    fork,
)


class HalfMade(LossBalancer):
    def __init__(self) -> None:
        self.step = 0

    def scalarize(self, losses: Tensor, tasks: Any = None) -> Tensor:
        return losses.sum()


class Weighing(LossBalancer):
    """A loss balancer that weighs the gradients too."""

    def scalarize(self, losses: Tensor, tasks: Any = None) -> Tensor:
        return losses.sum()

    def weigh(self, gradients: TaskGradients) -> Tensor:
        return 5.0 * gradients.active


def in_a_model(balancer: Any) -> None:
    MultiTaskModel(nn.Linear(2, 2), [nn.Linear(2, 1), nn.Linear(2, 1)], balancer)


def in_a_fork(balancer: Any) -> None:
    fork(torch.ones(2, 2, requires_grad=True), balancer, 2)


@pytest.mark.parametrize("use", [in_a_model, in_a_fork])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (IMTL, r"got the class IMTL; make one: IMTL\(\)\."),
        (DWA, r"got the class DWA; make one: DWA\(\.\.\.\)\."),
        (GradientBalancer, r"got the class GradientBalancer\."),
        (nn.Linear, r"got the class Linear\."),
        (aggregation.Mean(), r"got Mean of torchjd; wrap it: TorchJD\(\.\.\.\)\."),
        (aggregation.Mean, r"got the class Mean of torchjd; wrap an object: TorchJD\(Mean\(\.\.\.\)\)\."),
        (3, r"got int\."),
        (HalfMade(), r"balancer: HalfMade\.__init__ has to call super\(\)\.__init__\(\) first\."),
    ],
)
def test_what_is_no_balancer(use: Callable[[Any], None], given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        use(given)


def test_parts_of_compose() -> None:
    with pytest.raises(TypeError, match=r"loss: expected a LossBalancer or None, got the class UW; make one: UW\(\)"):
        Compose(loss=UW)  # type: ignore[arg-type]
    # Its weights would be dropped.
    with pytest.raises(TypeError, match=r"loss: Weighing\(\) weighs the gradients itself, so it stands alone"):
        Compose(loss=Weighing())
    with pytest.raises(TypeError, match=r"loss: Weighing\(\) weighs the gradients itself, so it stands alone"):
        Compose(loss=Weighing(), gradient=IMTLG())
    in_a_model(Weighing())


@pytest.mark.parametrize(
    "use",
    [
        lambda: DWA(2)(torch.ones(2)),
        lambda: FAMO()(torch.ones(2)),
        lambda: UW()(torch.ones(2)),
        lambda: IMTLL()(torch.ones(2)),
        lambda: GradNorm().scalarize(torch.ones(2)),
        lambda: GradNorm().weights(),
        lambda: RotateOnly(2).transform([torch.ones(1, 2)], [0]),
    ],
)
def test_an_unknown_number_of_tasks(use: Callable[[], object]) -> None:
    expected = r"^\w+ does not know the number of tasks: hand it to a MultiTaskModel, or call bind\(num_tasks\)\.$"
    with pytest.raises(ValueError, match=expected):
        use()


@pytest.mark.parametrize("make", [GradNorm, lambda: RotoGrad(4), lambda: RotateOnly(4), ExcessMTL])
def test_another_number_of_tasks_than_before(make: Callable[[], GradientBalancer]) -> None:
    balancer = make()
    balancer(torch.eye(3, 4))
    with pytest.raises(ValueError, match="as before"):
        balancer(torch.eye(2, 4))
    balancer.eval()
    with pytest.raises(ValueError, match="as before"):
        balancer(torch.eye(2, 4))
    balancer.reset()
    assert balancer(torch.eye(2, 4)).shape == (4,)


BY_TASK: dict[str, float] = {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedWeights(BY_TASK), "weights: expected numbers in the heads' order, got a dict"),
        (lambda: UW(init=BY_TASK), "init: expected numbers in the heads' order, got a dict"),
        (lambda: IMTL(init=BY_TASK), "init: expected numbers in the heads' order, got a dict"),
        (lambda: FAMO(min_losses=BY_TASK), "min_losses: expected numbers in the heads' order, got a dict"),
        (lambda: GradNorm(initial_losses=BY_TASK), "initial_losses: expected numbers in the heads' order, got a dict"),
        (lambda: UW(likelihood=BY_TASK), "likelihood: expected names in the heads' order, got a dict"),
        (lambda: UW(likelihood=None), "likelihood: expected a sequence of names, one per task, got None"),
        (lambda: GradNorm(initial_losses=5.0), r"initial_losses: expected a sequence of numbers, one per task, got 5"),
        (lambda: GradNorm(initial_losses=[True, 1]), r"initial_losses: expected a sequence of numbers.* got \[True, 1"),
        (lambda: GradNorm(initial_losses="12"), r"initial_losses: expected a sequence of numbers, one per task"),
        (lambda: UW(init=[True, 1.0]), r"init: expected a number, one per task, or 'first_losses', got \[True, 1"),
        (lambda: FixedWeights(5.0), r"weights: expected a sequence of numbers, one per task, got 5"),
        (lambda: FixedWeights([1.0, True]), r"weights\[1\]: expected a number, got True"),
        (lambda: FAMO(min_losses=[0.0, "1"]), r"min_losses: expected a number, or one per task, got \[0"),
        (lambda: FAMO(gamma=True), "gamma: expected a number, got True"),
        (lambda: GLS(floor=True), "floor: expected a number, got True"),
        (lambda: RLW(std=True), "std: expected a number, got True"),
        (lambda: RLW(seed=True), "seed: expected an int, got True"),
        (lambda: DWA(True), "steps_per_epoch: expected an int, got True"),
        (lambda: RotateOnly(True), "rotation_shape: expected an int or a sequence of ints, got True"),
        (lambda: IMTLL(bound=True), "bound: expected a number, got True"),
        (lambda: IMTLG(nonneg="no"), "nonneg: expected a bool, got 'no'"),
        (lambda: IMTLG(strict=1), "strict: expected a bool, got 1"),
        (lambda: RotateOnly(2, normalize_losses="no"), "normalize_losses: expected a bool, got 'no'"),
        (lambda: RotoGradNorm(2, alpha=True), "alpha: expected a number, got True"),
        (lambda: IMTLL().bind(True), "num_tasks: expected an int, got True"),
        (lambda: GradNorm().bind("2"), "num_tasks: expected an int, got '2'"),
    ],
)
def test_options_of_another_kind(make: Callable[[], Balancer], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_options_from_tensors_and_iterators() -> None:
    assert FixedWeights(iter([1, 2.0])).weights == FixedWeights(torch.tensor([1.0, 2.0])).weights == (1.0, 2.0)
    assert GradNorm(initial_losses=torch.tensor([1.0, 2.0])).initial_losses == [1.0, 2.0]
    assert FAMO(min_losses=torch.tensor(0.5), num_tasks=2).min_losses == 0.5
    assert UW(init=torch.tensor([0.5, 1.0])).log_variance.tolist() == [0.5, 1.0]
    assert UW(2, init=torch.tensor(0.5)).log_variance.tolist() == [0.5, 0.5]
