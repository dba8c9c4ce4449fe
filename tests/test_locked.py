"""constraints.txt locks every package that an installation brings, for every Python and system that is supported."""

import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"))
OWN = {"pip", "setuptools", "wheel"}  # a new environment's own, in whatever version its Python brings


def requirements(file: Path) -> list[Requirement]:
    """What a requirements file names, without the files that it includes."""
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


LOCK = requirements(ROOT / "constraints.txt")
NAMED = {file.name: requirements(file) for file in ROOT.glob("requirements*.txt")}
WITHOUT_DEPENDENCIES = {
    canonicalize_name(requirement.name)
    for name, named in NAMED.items()
    if name.endswith("-nodeps.txt")
    for requirement in named
}


def locked(environment: dict | None = None) -> dict[str, list[str]]:
    """Name -> the versions that the lock gives it in an environment, by default the running one."""
    found = {}
    for requirement in LOCK:
        (pin,) = requirement.specifier
        assert pin.operator == "==", f"{requirement}: not one version"
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


def installed() -> dict[str, metadata.Distribution]:
    """Name -> package, of this environment alone: nothing from PYTHONPATH or the working directory."""
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return {canonicalize_name(found.name): found for found in metadata.distributions(path=sorted(places))}


def test_every_installed_package_is_locked_in_its_version():
    lock = locked()
    wrong = {
        name: f"{package.version}, constraints.txt: {' '.join(lock.get(name, ['not in it']))}"
        for name, package in installed().items()
        if name not in OWN and [Version(package.version).public] != lock.get(name)
    }
    assert not wrong, f"{wrong}: run bash lib/lock.sh after a change of requirements, or make a new environment"


def test_what_every_installed_package_needs_is_locked_in_a_version_that_it_takes():
    lock = locked()
    checked = 0
    for name, package in installed().items():
        for need in map(Requirement, package.requires or []):
            if name in OWN | WITHOUT_DEPENDENCIES or (need.marker and not need.marker.evaluate({"extra": ""})):
                continue
            (version,) = lock[canonicalize_name(need.name)]
            assert need.specifier.contains(version, prereleases=True), f"{name} needs {need}, locked: {version}"
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_and_system_gets_one_version_of_what_is_named(python):
    for system, machine in SYSTEMS:
        environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system,
                       "platform_machine": machine}  # fmt: skip
        lock = locked(environment)
        assert all(len(versions) == 1 for versions in lock.values())
        for named in [*NAMED.values(), requirements(ROOT / "constraints.in")]:
            for requirement in named:
                if requirement.marker is None or requirement.marker.evaluate(environment):
                    (version,) = lock[canonicalize_name(requirement.name)]
                    assert requirement.specifier.contains(version)


def test_a_torch_for_cuda_is_locked_too_with_all_that_it_brings():
    python = {"python_version": "3.12", "python_full_version": "3.12.1"}
    lock = locked({"sys_platform": "linux", "platform_machine": "x86_64", **python})
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "cuda-bindings"} <= lock.keys()
    assert "+" not in lock["torch"][0]


def test_the_lock_names_no_index_and_no_path():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; [\w.'<>!=() ]+)?", line) for line in lines)


@pytest.fixture
def sandbox(tmp_path):
    """A copy of what ensure_environment reads, and an environment whose pip writes down what it is told."""
    (tmp_path / "lib").mkdir()
    shutil.copy(ROOT / "lib/environment.sh", tmp_path / "lib")
    for file in ROOT.glob("*.txt"):
        shutil.copy(file, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "$*" >>calls\n[ ! -e fails ] || exit 1\n')
    python.chmod(0o755)
    return tmp_path


def ensure(folder: Path, *files: str) -> tuple[int, list[str]]:
    """Call ensure_environment: its exit code, and what pip was told."""
    (folder / "calls").write_text("")
    script = f'set -euo pipefail; source lib/environment.sh; PYTHON={sys.executable} ensure_environment "$@"'
    done = subprocess.run(["bash", "-c", script, "-", *files], cwd=folder, capture_output=True, text=True)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_only_files_called_nodeps_are_installed_without_dependencies_and_all_by_the_lock(sandbox):
    code, calls = ensure(sandbox, *sorted(NAMED))
    assert code == 0 and len(calls) == len(NAMED)
    for file, call in zip(sorted(NAMED), calls, strict=True):
        assert call.endswith(f"-r {file}") and "-c constraints.txt" in call
        assert ("--no-deps" in call) == (file in ("requirements-demo-nodeps.txt", "requirements-lmms-nodeps.txt"))


def test_nothing_is_installed_again_until_the_lock_or_a_requirement_changes(sandbox):
    files = "requirements.txt", "requirements-test.txt"
    assert len(ensure(sandbox, *files)[1]) == 2
    assert ensure(sandbox, *files) == (0, [])
    for changed in ("constraints.txt", "requirements-test.txt", "requirements-eval.txt"):  # the last one is included
        with open(sandbox / changed, "a") as file:
            file.write("# changed\n")
        assert len(ensure(sandbox, *files)[1]) == 2
        assert ensure(sandbox, *files) == (0, [])


def test_an_installation_that_fails_is_tried_again(sandbox):
    (sandbox / "fails").touch()
    code, calls = ensure(sandbox, "requirements.txt", "requirements-test.txt")
    assert (code, len(calls)) == (2, 1)
    (sandbox / "fails").unlink()
    assert len(ensure(sandbox, "requirements.txt", "requirements-test.txt")[1]) == 2
