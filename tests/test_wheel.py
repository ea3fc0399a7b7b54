"""The wheel: nothing outside percard/ and its metadata, and it works from any directory, the repository root included.

Built from the files that git tracks, copied elsewhere, so that nothing left lying in a checkout gets in or helps.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str | Path], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files of this checkout, as they are now, in a folder of their own."""
    listed = run(["git", "ls-files", "-z"], ROOT) if shutil.which("git") and (ROOT / ".git").exists() else None
    if listed is None or listed.returncode:
        pytest.skip("not a git checkout: which files belong to the source is not known")
    missing = [m for m in ("scikit_build_core", "nanobind") if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; make test installs what builds the wheel")
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the test process that comes first; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return next((shared / "dist").glob("*.whl"), None) or built(clone, shared / "dist")


def built(clone: Path, out: Path) -> Path:
    """A wheel of the clone, in `out`."""
    # cmake and ninja of this environment, before those of the system.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, clone]
    done = run(pip, clone, PATH=path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an empty environment with this wheel; torch and the other dependencies are looked up here."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    flags = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    done = run([sys.executable, "-m", "pip", "-q", *flags], home)
    assert done.returncode == 0, done.stderr[-3000:]
    (site,) = (home / "lib").glob("python*/site-packages")
    # After the environment's own site-packages, so that a percard installed beside torch does not win.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_percard_and_its_metadata_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    strangers = [n for n in names if not n.startswith("percard/") and ".dist-info/" not in n.split("/", 1)[0] + "/"]
    assert strangers == []
    assert [n for n in names if n.endswith((".cpp", ".pyc", ".h", ".o", ".a"))] == []


def test_every_module_and_data_file_of_the_house_is_in_the_wheel(clone: Path, wheel: Path) -> None:
    floors = {"formats": "formats", "kernels": "kernels", "quant": "quant", "bench": "bench", "src/percard": "."}
    kinds = {".py", ".json", ".typed"}
    expected = set()
    for folder, place in floors.items():
        for path in (clone / folder).rglob("*"):
            if path.suffix in kinds and "results" not in path.relative_to(clone / folder).parts:
                expected.add((Path("percard") / place / path.relative_to(clone / folder)).as_posix())
    missing = expected - set(zipfile.ZipFile(wheel).namelist())
    assert missing == set()
    assert any(n.startswith("percard/_cpu") and n.endswith(".so") for n in zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("place", ["elsewhere", "repository root"])
def test_it_imports_and_examines_the_machine_from(place: str, python: Path, clone: Path, tmp_path: Path) -> None:
    cwd = clone if place == "repository root" else tmp_path
    told = run([python, "-c", "import percard, percard.kernels.op as o; print(percard.__file__, o.__file__)"], cwd)
    assert told.returncode == 0, told.stderr
    assert all(Path(name).is_relative_to(python.parents[1]) for name in told.stdout.split())
    done = run([python.parent / "percard", "doctor", "--json"], cwd)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["machine"]["cpp_isa"] is not None
    assert {row["op"] for row in facts["ops"]} >= {"matmul_w8a8", "matmul_w4a16", "matmul_w4a8", "quantize_rows"}
    assert not [r for r in facts["ops"] if r["device"] == "cpu" and r["body"] == "cpu" and r["state"] != "serves"]


def test_hugging_faces_package_named_kernels_is_not_shadowed_at_the_repository_root(python: Path, clone: Path) -> None:
    """Serving stacks import a package `kernels`; our folder of that name must not stand in for it as a real package."""
    code = (
        "import importlib.util as u; print([u.find_spec(n) and u.find_spec(n).origin for n in ('kernels', 'formats')])"
    )
    told = run([python, "-c", code], clone)
    assert told.stdout.strip() == "[None, None]"  # namespace portions at most: any installed package wins over them
