"""Every Python block of the README runs, from top to bottom, in one namespace; its shell blocks are what they claim."""

import re
from pathlib import Path

import pytest

import mtlwrap

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[tuple[int, str]]:
    """The code blocks of a language, with the line each begins at."""
    text = README.read_text(encoding="utf-8")
    return [
        (text[: match.start()].count("\n") + 2, match.group(1))
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    found = blocks("python")
    assert len(found) >= 8
    for line, code in found:
        # Padded, so that a traceback names the README's own line.
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)


def test_set_up_commands_come_first() -> None:
    commands = [code for _, code in blocks("sh")]
    assert commands[0].strip().endswith("-m example")
    assert commands[1].strip().endswith("-m pytest")
    assert README.read_text(encoding="utf-8").index("```sh") < README.read_text(encoding="utf-8").index("```python")


def test_every_balancer_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    exported = [name for name in mtlwrap.balancers.__all__ if isinstance(getattr(mtlwrap.balancers, name), type)]
    bases = {"Balancer", "GradientBalancer", "LossBalancer"}
    assert [name for name in exported if name not in bases and f"`{name}" not in text] == []
