"""The lock, pyproject.toml and environment.yml say the same; the library installs."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from chapters import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [Requirement(x) for x in (ROOT / "requirements.lock").read_text().splitlines()]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def by_name(requirements):
    """Map each name to its requirement, of those that apply on this machine."""
    return {
        canonicalize_name(r.name): r
        for r in requirements
        if r.marker is None or r.marker.evaluate()
    }


def pinned(requirement):
    """Return the one version that a requirement allows."""
    (only,) = requirement.specifier
    assert only.operator == "==" and "*" not in only.version, str(requirement)
    return Version(only.version)


def direct():
    extras = PROJECT["optional-dependencies"]
    return by_name(
        Requirement(x) for x in sum(extras.values(), PROJECT["dependencies"])
    )


def conda():
    (pip,) = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    return by_name(map(Requirement, pip))


def test_lock_pins_one_version_of_each_package():
    names = [canonicalize_name(r.name) for r in LOCK if r.marker is None]
    assert names == sorted(set(names))
    assert all(pinned(r) for r in LOCK)


def test_lock_holds_every_direct_dependency():
    lock = by_name(LOCK)
    for name, requirement in direct().items():
        assert pinned(lock[name]) in requirement.specifier, str(requirement)


def test_environment_has_the_pins_of_the_lock():
    lock = by_name(LOCK)
    assert {n: pinned(r) for n, r in conda().items()} == {
        n: pinned(lock[n]) for n in conda()
    }


def test_environment_holds_what_the_book_needs():
    needed = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["book"]
    backend = {"tensorflow-cpu"}
    assert conda().keys() == by_name(map(Requirement, needed)).keys() | backend


def test_project_leaves_the_backend_to_the_user():
    assert not any("tensorflow" in name for name in direct())


def test_python_version_is_said_once():
    lowest = re.search(r"[\d.]+", PROJECT["requires-python"])[0]
    assert f"python={lowest}" in CONDA


def test_wheel_holds_library_and_weights(tmp_path):
    source = tmp_path / "source"
    for folder in ("lib", "data", "book/params"):
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.safetensors")
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    weights = source / "data" / "weights" / "example" / "decoder.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"numbers")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        + ["--quiet", "--wheel-dir", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "deblender/surveys.py" in names
    assert "deblender/pretrained/example/decoder.safetensors" in names
    assert "deblender/profiles/paper.yml" in names
