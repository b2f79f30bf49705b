"""Read an array of structs of a MATLAB file with SciPy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_memdml.data.paths import shown

MAX_BYTES = 1 << 28
MAX_SECONDS = 300
READER = Path(__file__).with_name("matlab_reader.py")


def read_structs(path: Path, variable: str) -> list[dict[str, str]]:
    """Return the elements of an array of structs, every field, a number or a text, as text.

    Args:
        path: The file, of MATLAB version 4 to 7.
        variable: Name of the array.

    Raises:
        ImportError: If SciPy is not installed.
        ValueError: If the file is damaged, has no such array, or is too large.
    """
    if find_spec("scipy") is None:
        raise ImportError(f"Expected SciPy to read {shown(path)} but it is not installed. `pip install scipy`.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{shown(path)}: expected at most {MAX_BYTES:,} bytes. Download the file again.")
    found = _in_a_process(path, variable)
    if found["count"] is None:
        names = ", ".join(found["variables"]) or "none"
        raise ValueError(
            f"{shown(path)} has no array of structs named {variable}. Found: {names}. Download the file again."
        )
    if "structs" not in found:
        raise ValueError(f"{shown(path)}: expected fewer than {found['count']:,} structs. Download the file again.")
    return found["structs"]


def _in_a_process(path: Path, variable: str) -> dict[str, Any]:
    """Return what `matlab_reader` prints; it runs apart because SciPy crashes on some damaged files."""
    command = [sys.executable, str(READER), os.fspath(path), variable]
    try:
        done = subprocess.run(command, capture_output=True, timeout=MAX_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{shown(path)} was not read in {MAX_SECONDS} s. Download the file again.") from error
    if done.returncode == 0:
        return json.loads(done.stdout)
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"SciPy crashed with signal {-done.returncode}"
    raise ValueError(
        f"{shown(path)} is damaged, or no MATLAB file of version 4 to 7 ({reason}). Download the file again."
    )
