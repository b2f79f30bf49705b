"""Run the README with an installed wheel: its Python code as it stands, its commands shortened to a few steps.

`make wheel-test` runs this in an environment that holds the wheel and what it requires, and nothing for development.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHORT = "--trainer.max_steps 5 --trainer.val_check_interval 5 --trainer.enable_progress_bar false"
CHECKPOINT = "runs/latest/checkpoints/last.ckpt"
COMMANDS = [
    "--version",
    "configs",
    f"demo {SHORT} --model.backbone.width 4",
    f"fit --config glyphs_memory {SHORT}",
    f"test --ckpt_path {CHECKPOINT}",
    f"predict --ckpt_path {CHECKPOINT}",
    f"index --ckpt_path {CHECKPOINT} --output runs/index",
    f"weight-curves --ckpt_path {CHECKPOINT}",
]


def check_contents() -> None:
    """The wheel holds the licence, the type information, the stubs and the configurations, and no tests."""
    files = {str(file).replace(os.sep, "/") for file in distribution("lightning-memdml").files or ()}
    for wanted in (
        "lightning_memdml/py.typed",
        "lightning_memdml/__init__.pyi",
        "configs/glyphs_memory.yaml",
        "LICENSE",
    ):
        assert any(file.endswith(wanted) for file in files), f"{wanted} is not in the wheel"
    assert not any(file.startswith(("tests/", "docs/", "experiments/")) for file in files)


def check_environment() -> None:
    """Nothing but what the package requires is installed, so that a missing requirement shows."""
    for name in ("pytest", "faiss-cpu", "wandb", "timm", "onnx"):
        try:
            version(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"Expected an environment for the wheel alone but {name} is installed.")


def run(folder: Path, *command: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    check_contents()
    check_environment()
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "memdml fit --config glyphs_memory" in readme
    memdml = str(Path(sys.executable).with_name("memdml"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["LIGHTNING_MEMDML_CACHE"] = str(folder / "cache")
        for block in re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE):
            (folder / "readme.py").write_text(block, encoding="utf-8")
            run(folder, sys.executable, "readme.py")
        for command in COMMANDS:
            run(folder, memdml, *command.split())
    print("The wheel runs the README.")


if __name__ == "__main__":
    main()
