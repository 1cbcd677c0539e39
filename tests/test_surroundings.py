"""Code that a compiler must not look into, and what importing the package brings along."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mtlwrap import surroundings


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_private_names(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where torch has only its public names."""
    monkeypatch.delattr(torch, "_disable_dynamo")
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback")
    spec = importlib.util.find_spec("mtlwrap.surroundings")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()  # torch itself needs them
    return module


Operation = Callable[[Tensor], Tensor]
Decorator = Callable[[Operation], Operation]


def compiled_operations(opaque: Decorator) -> set[str]:
    """What is compiled of code that calls a decorated function: directly, or from a function that is skipped itself."""
    seen = set()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.update(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    @opaque
    def inner(x: Tensor) -> Tensor:
        return torch.erf(x)

    @torch._dynamo.disable(recursive=False)
    def skipped(x: Tensor) -> Tensor:
        return inner(x)

    @torch.compile(backend=backend)
    def direct(x: Tensor) -> Tensor:
        return torch.sin(inner(torch.cos(x)))

    @torch.compile(backend=backend)
    def indirect(x: Tensor) -> Tensor:
        return torch.tan(skipped(torch.exp(x)))

    x = torch.tensor(0.5)
    assert torch.equal(inner(x), x.erf())
    assert torch.equal(direct(x), x.cos().erf().sin())
    assert torch.equal(indirect(x), x.exp().erf().tan())
    return seen


def test_a_compiler_does_not_look_inside() -> None:
    assert compiled_operations(surroundings.opaque) == {"sin", "cos", "tan", "exp"}


def test_nor_where_torch_has_only_its_public_names(without_private_names: ModuleType) -> None:
    assert without_private_names._hidden is torch.compiler.disable
    assert without_private_names._looking_on() is not None
    assert compiled_operations(without_private_names.opaque) == {"sin", "cos", "tan", "exp"}


def test_it_would_look_inside_otherwise() -> None:
    assert compiled_operations(lambda function: function) == {"sin", "cos", "tan", "exp", "erf"}


def test_importing_it_imports_no_compiler() -> None:
    code = "import sys, mtlwrap; assert 'torch._dynamo' not in sys.modules, 'the compiler was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("mtlwrap.plotting", "matplotlib", "plot"), ("mtlwrap.ignite", "ignite", "ignite")],
)
def test_what_to_install_is_said_where_it_is_missing(module, package, extra):
    code = f"import sys; sys.modules[{package!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"ImportError: {module} needs " in done.stderr
    assert f"pip install 'mtlwrap[{extra}]'" in done.stderr
