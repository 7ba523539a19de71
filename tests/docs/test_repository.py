"""Files that no other test reads: configs, the changelog, and what must not be in any of them."""

import re
import subprocess

import pytest
import yaml

from tests.docs.markdown import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def tracked_files() -> list[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout: which files are tracked is unknown")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_there_are_configs():
    assert {path.parent.name for path in CONFIGS} >= {"optimizer", "model", "data", "experiment"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_parses(path):
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    assert content


def changelog_mistakes(text: str) -> list[str]:
    """Where a changelog departs from Keep a Changelog 1.1.0."""
    wrong = []
    if not text.startswith("# Changelog\n"):
        wrong.append("does not begin with '# Changelog'")
    if "keepachangelog.com" not in text:
        wrong.append("does not name its form")
    headings = re.findall(r"(?m)^## (.*)$", text)
    if not headings:
        wrong.append("has no version")
    versions = []
    for number, heading in enumerate(headings):
        release = re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d{2}-\d{2}", heading)
        if release:
            versions.append(tuple(int(part) for part in release.groups()))
        elif heading != "[Unreleased]" or number != 0:
            wrong.append(f"'## {heading}' is neither a release nor [Unreleased] at the top")
    if versions != sorted(versions, reverse=True):
        wrong.append("versions are not in descending order")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for kind, body in re.findall(r"(?ms)^### (.*?)$(.*?)(?=^##|\Z)", text):
        if kind not in kinds:
            wrong.append(f"'### {kind}' is not one of {', '.join(sorted(kinds))}")
        if not re.search(r"(?m)^- ", body):
            wrong.append(f"'### {kind}' lists nothing")
    return wrong


def test_changelog_keeps_its_form():
    assert changelog_mistakes((ROOT / "CHANGELOG.md").read_text()) == []


def test_changelog_mistakes_are_found():
    good = "# Changelog\nkeepachangelog.com\n## [Unreleased]\n### Added\n- x\n"
    assert changelog_mistakes(good) == []
    for bad in (
        good.replace("# Changelog\n", "# News\n"),
        good.replace("Unreleased", "unreleased"),
        good.replace("Added", "New"),
        good.replace("- x\n", ""),
        good + "## [0.1.0] - 2026-01-01\n## [0.2.0] - 2026-01-01\n",
        good + "## 0.1.0\n",
    ):
        assert len(changelog_mistakes(bad)) == 1, bad


# Absolute paths of somebody's machine; a path in an example is relative or begins with ~ or $HOME.
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:work|home|root|Users|scratch|mnt)/[\w.-]+")


def test_no_machine_paths_in_tracked_files():
    files = tracked_files()
    assert "pyproject.toml" in files
    assert len(files) >= 30
    found = []
    for name in files:
        text = (ROOT / name).read_bytes().decode(errors="replace")
        for line, content in enumerate(text.splitlines(), 1):
            found += [f"{name}:{line} {match[0]}" for match in MACHINE_PATH.finditer(content)]
    assert found == []


@pytest.mark.parametrize("folder", ["work", "home", "root", "Users"])
def test_machine_paths_are_found(folder):
    assert MACHINE_PATH.search(f"cd /{folder}/someone")
    assert MACHINE_PATH.search(f"path='/{folder}/x'")
    assert not MACHINE_PATH.search(f"a/{folder}/x, ~/{folder}/x, https://example.org/{folder}/x")
