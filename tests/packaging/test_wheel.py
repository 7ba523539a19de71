"""What is in the wheel. That the installed wheel works is tested by `make test-wheel`."""

import importlib.util
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("build") is None:
        pytest.skip("hatchling or build is not installed (both are in the extra `dev`)")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata(wheel, file):
    (name,) = [n for n in wheel.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{file}", n)]
    return wheel.read(name).decode()


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "dash_shampoo").rglob("*.py")}
    assert len(modules) >= 15
    assert modules <= names
    assert {n.split("/")[0].split("-")[0] for n in names} == {"dash_shampoo"}
    assert "dash_shampoo/py.typed" in names


def test_wheel_requires_torch_alone(wheel):
    message = Parser().parsestr(metadata(wheel, "METADATA"))
    requires = message.get_all("Requires-Dist")
    required = [line for line in requires if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in required] == ["torch"]
    assert set(message.get_all("Provides-Extra")) == {"data", "dev", "triton"}
    assert message["License-Expression"] == "BSD-3-Clause"
    assert message["Description-Content-Type"] == "text/markdown"


def test_wheel_has_its_licence_and_no_command(wheel):
    assert not [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
