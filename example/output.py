"""Where results go."""

import argparse
import tempfile
from pathlib import Path


def folder(text: str) -> Path:
    """A folder that can be written to, made if need be: better known before the training than after it."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {error.strerror}") from error
    return path
