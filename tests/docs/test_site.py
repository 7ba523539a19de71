"""The documentation's site: all pages are in it, all public names are in its reference, links hold."""

import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import yaml

import dash_shampoo
from tests.docs.markdown import ROOT, blocks

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages_of(entry: object) -> list[str]:
    """The pages below an entry of the table of contents, in order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages_of(part)]


def test_the_table_of_contents_has_every_page():
    listed = pages_of(CONFIG["nav"])
    sources = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    written = {path.relative_to(DOCS).with_suffix(".md").as_posix() for path in sources}
    assert len(written) >= 15
    assert len(listed) == len(set(listed))
    assert set(listed) == written | {"CONTRIBUTING.md", "CHANGELOG.md"}


def documented_names() -> list[str]:
    """What the reference has, such as "inverse_root.inverse_root"."""
    text = "".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
    return re.findall(r"(?m)^::: dash_shampoo\.(.+)$", text)


def test_the_reference_has_every_public_name():
    names = documented_names()
    assert len(names) == len(set(names)) > 80
    assert {name for name in names if "." not in name} == set(dash_shampoo.__all__) - {
        "__version__",
        "base",
    }


@pytest.mark.parametrize("name", [name for name in documented_names() if "." in name])
def test_functions_of_the_reference_are_public(name):
    module, function = name.split(".")
    assert function in getattr(dash_shampoo, module).__all__


@pytest.mark.parametrize(
    ("name", "link", "expected"),
    [
        ("solvers.md", "../benchmarks/results/x.md#a", "benchmarks/results/x.md#a"),
        ("solvers.md", "demo.md", "demo.md"),
        ("coming-from.md", "five_minutes.ipynb", "five_minutes.md"),
        ("reference/index.md", "../../benchmarks/results/x.png", "../benchmarks/results/x.png"),
        ("reference/index.md", "../solvers.md", "../solvers.md"),
        ("CONTRIBUTING.md", "docs/solvers.md", "solvers.md"),
        ("CONTRIBUTING.md", "README.md", "index.md"),
        ("benchmarks/results/a.md", "b.png", "b.png"),
        ("solvers.md", "https://example.org/x", "https://example.org/x"),
        ("solvers.md", "#damping", "#damping"),
    ],
)
def test_links_are_cut_for_the_site(name, link, expected):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs)")
    from tools.docs_hooks import on_page_markdown

    folder = DOCS if (DOCS / name).exists() else ROOT
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name, abs_src_path=str(folder / name)))
    config = SimpleNamespace(docs_dir=str(DOCS))
    text = f"[a]({link})\n\n```python notest\nx\n```\n"
    cut = f"[a]({expected})\n\n```python\nx\n```\n"
    assert on_page_markdown(text, page, config, files=None) == cut


def test_proofs_are_files_of_the_site():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs)")
    from mkdocs.structure.files import Files

    from tools.docs_hooks import on_files

    config = SimpleNamespace(site_dir="site", use_directory_urls=False)
    names = {file.src_uri for file in on_files(Files([]), config)}
    assert {"CHANGELOG.md", "CONTRIBUTING.md"} < names
    assert {path.name for path in (ROOT / "benchmarks/results").glob("*.md")} == {
        name.rsplit("/", 1)[1]
        for name in names
        if name.startswith("benchmarks/results/") and name.endswith(".md")
    }


def test_a_notebook_becomes_a_page_with_what_it_printed():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs)")
    from tools.docs_hooks import notebook_page

    page = notebook_page(json.loads((DOCS / "five_minutes.ipynb").read_text()))
    assert page.startswith("# From AdamW to DashShampoo in five minutes\n")
    assert [block.info for block in blocks(page)] == ["python", "python", "text"] + [
        "python",
        "text",
    ] * 2
    assert blocks(page)[2].text.startswith("step 50: ")


def test_search_needs_nothing_from_elsewhere():
    """The theme would fetch a script of this name, as soon as none is listed."""
    (name,) = [path for path in CONFIG["extra"]["polyfills"] if "iframe-worker" in path]
    assert (DOCS / name).is_file()


def test_a_worker_starts_in_pages_that_are_opened_from_a_folder(tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    shutil.copy(DOCS / "iframe-worker.js", tmp_path)
    (tmp_path / "part.js").write_text("self.factor = 2;")
    (tmp_path / "worker.js").write_text(
        "addEventListener('message', async (event) => {"
        " await importScripts('part.js'); postMessage({answer: factor * event.data}); });"
    )
    (tmp_path / "page.html").write_text(
        "<!doctype html><body><script src='iframe-worker.js'></script><script>"
        "const worker = new Worker('worker.js');"
        "worker.addEventListener('message', (e) => { document.title = 'got ' + e.data.answer; });"
        "worker.postMessage(21);</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *options, "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>got 42</title>" in done.stdout
