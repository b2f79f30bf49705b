"""What the package needs to be imported, what it brings into a process, and the versions it is tested with."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.children import run_python

import lightning_memdml
from lightning_memdml import callbacks, data, losses

PACKAGE = Path(lightning_memdml.__file__).parent
REPOSITORY = Path(__file__).parents[1]
LAZY = ("lightning_memdml", "lightning_memdml.callbacks", "lightning_memdml.retrieval")

# Prints the libraries that the names of a training script add to those that Lightning itself imports.
IMPORTED = """
import sys
import lightning
before = {name.partition(".")[0] for name in sys.modules}
import lightning_memdml
from lightning_memdml import ContrastiveLoss, EmbeddingMemory, MemoryCallback, against_memory
print(*sorted({name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names))
"""

# The drop-in of the README: a LightningModule that somebody already has, and a learner of this package.
TRAINED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner, SmallConvNet, against_memory

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.loss = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 8)), ContrastiveLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = F.normalize(self.net(x), dim=1)
        return self.loss(z, y) + against_memory(self, self.loss, z, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

images = TensorDataset(torch.randn(32, 1, 28, 28), torch.arange(32) % 4)
for module in (Module(), MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8)):
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=[MemoryCallback(size=16)])
    trainer.fit(module, DataLoader(images, batch_size=8))
    print("trained", trainer.global_step)
"""


def run(*arguments: str) -> str:
    return run_python(*arguments).stdout


def required(*names: str) -> dict[str, Distribution]:
    """The installed distributions that these need, themselves included; optional ones only where one asks for them."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            found[requirement.name] = distribution(requirement.name)
        except PackageNotFoundError:  # of another platform
            continue
        for line in found[requirement.name].requires or ():
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="links to folders need special rights on Windows")
def test_memory_and_losses_need_only_torch_lightning_and_numpy(tmp_path: Path) -> None:
    """A folder with links to these three and to what they require is all that the interpreter finds."""
    for found in required("torch", "lightning", "numpy").values():
        for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(found.locate_file(name))  # type: ignore[arg-type]
    (tmp_path / PACKAGE.name).symlink_to(PACKAGE)
    for missing in ("torchvision", "jsonargparse", "matplotlib", "pandas", "pyarrow", "PIL", "faiss", "scipy"):
        assert not (tmp_path / missing).exists()
    assert run("-I", "-S", "-c", TRAINED, str(tmp_path)).split() == ["trained", "4", "trained", "4"]


def test_a_training_script_imports_no_library_that_lightning_does_not_import() -> None:
    assert run("-c", IMPORTED).split() == ["lightning_memdml"]


@pytest.mark.parametrize("name", LAZY)
def test_every_name_of_a_stub_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    names = module.__all__
    assert names == sorted(set(names))
    assert set(names) <= set(dir(module))
    for exported in names:
        assert getattr(module, exported).__name__ == exported
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'MemoryCallbak'"):
        module.MemoryCallbak  # noqa: B018


def test_star_import_and_attributes_of_the_package() -> None:
    names: dict[str, object] = {}
    exec("from lightning_memdml import *", names)
    assert set(lightning_memdml.__all__) <= set(names)
    missing = {*losses.__all__, *callbacks.__all__, *data.__all__} - {"Record", *names}
    assert not missing, f"Expected {missing} in lightning_memdml/__init__.pyi as well."
    assert lightning_memdml.data.GlyphDataModule is names["GlyphDataModule"]


def declared() -> list[Requirement]:
    """What pyproject.toml names, extras included."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [needed for needed in map(Requirement, lines) if needed.name != "lightning-memdml"]


def pinned(file: str) -> dict[str, list[str]]:
    """The versions of each library in a file of `make lock`; several where they depend on the version of Python."""
    versions: dict[str, list[str]] = {}
    for line in (REPOSITORY / "requirements" / file).read_text().splitlines():
        if line and not line.startswith("#"):
            found = re.fullmatch(r"([\w.-]+)==([\w.!+]+)( ; [^#]*)?( *# via .*)?", line)
            assert found, f"Expected `name==version` in {file} but got {line!r}"
            versions.setdefault(canonicalize_name(found[1]), []).append(found[2])
    return versions


@pytest.mark.parametrize("file", ["locked.txt", "oldest.txt"])
def test_the_files_of_versions_fit_what_is_declared(file: str) -> None:
    """If this fails, run `make lock`."""
    versions = pinned(file)
    for needed in declared():
        name = canonicalize_name(needed.name)
        assert name in versions, f"{name} is missing in {file}"
        assert all(needed.specifier.contains(version) for version in versions[name]), f"{name} in {file}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    versions = pinned("oldest.txt")
    for needed in declared():
        (lower,) = (bound.version for bound in needed.specifier if bound.operator == ">=")
        pins = versions[canonicalize_name(needed.name)]
        exact = Requirement(f"x=={lower}").specifier
        assert any(map(exact.contains, pins)), f"{needed} is tested with {pins}"
