"""What MkDocs does for us beside its own: pages may link to files of the repository.

A page in docs/ links to `../benchmarks/results/x.md`, as someone who reads it in the repository needs it. In
the site, the files that prove a figure lie beside docs' own pages, and the links are cut to match.
"""

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
    """Add the files of the repository that pages link to.

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
    return files


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
    in_docs = Path(page.file.abs_src_path).is_relative_to(config.docs_dir)
    place = posixpath.dirname(posixpath.join("docs", name) if in_docs else name)

    def cut(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(place, match[1]))
        target = {"README.md": "docs/index.md"}.get(target, target).removeprefix("docs/")
        inside = posixpath.relpath(target, posixpath.dirname(name) or ".")
        return f"]({inside}{match[2] or ''})"

    # "notest" tells the tests not to run a block; a browser has no use for it.
    return re.sub(r"(?m)^(```+python) notest$", r"\1", _LINK.sub(cut, markdown))
