"""What MkDocs does for us beside its own: links to files of the repository, notebooks as pages.

A page in docs/ links to `../benchmarks/results/x.md`, as someone who reads it in the repository needs it. In
the site, the files that prove a figure lie beside docs' own pages, and the links are cut to match. A notebook
of docs/ is a page like any other, with what its cells printed; nothing is run for it.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# What of the repository becomes a part of the site.
PATTERNS = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
)
_LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to, and make notebooks pages.

    Args:
        files: Those of docs/.
        config: MkDocs' settings.

    Returns:
        All of them.
    """
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = notebook_page(json.loads(Path(notebook.abs_src_path).read_text(encoding="utf-8")))
        files.remove(notebook)
        name = notebook.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, name, content=text))
    return files


def notebook_page(notebook: dict[str, Any]) -> str:
    """Write a notebook as Markdown: its text, its code, and what that printed.

    Args:
        notebook: The JSON of its file, format 4.

    Returns:
        The page.
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Cut the links of a page that lead out of docs/ or into it, and the marks of blocks.

    Args:
        markdown: Its text.
        page: It.
        config: MkDocs' settings.
        files: All files of the site.

    Returns:
        The text with links that hold within the site.
    """
    name = page.file.src_uri
    source = page.file.abs_src_path  # none for a page made of a notebook
    in_docs = source is None or Path(source).is_relative_to(config.docs_dir)
    place = posixpath.dirname(posixpath.join("docs", name) if in_docs else name)

    def cut(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(place, match[1]))
        target = {"README.md": "docs/index.md"}.get(target, target).removeprefix("docs/")
        target = re.sub(r"\.ipynb$", ".md", target)
        inside = posixpath.relpath(target, posixpath.dirname(name) or ".")
        return f"]({inside}{match[2] or ''})"

    # "notest" tells the tests not to run a block; a browser has no use for it.
    return re.sub(r"(?m)^(```+python) notest$", r"\1", _LINK.sub(cut, markdown))
