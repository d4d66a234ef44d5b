"""What the site needs beyond Markdown files: the README as its front, plots from benchmarks/, roles in docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?([\w.]+)</code>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out pages of the navigation that this checkout does not have."""

    def present(entry: Any) -> Any:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            return {title: [each for each in map(present, target) if each is not None]}
        return entry if target == "index.md" or (ROOT / "docs" / target).exists() else None

    config["nav"] = [present(entry) for entry in config["nav"]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The README becomes the front page, and plots that pages show are copied."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for plot in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that are right in the repository and lead elsewhere on the site."""
    folder = Path("docs") / Path(page.file.src_uri).parent if page.file.src_uri != "index.md" else Path()

    def rewritten(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        inside = (ROOT / folder / path).resolve().relative_to(ROOT)
        if inside.parts[0] == "docs" and inside.suffix in (".md", ".png", ".svg"):
            if inside.suffix == ".md" and not (ROOT / inside).exists():
                return text
            to = inside.relative_to("docs").as_posix()
        elif inside.match("benchmarks/results/*.png"):
            to = f"results/{inside.name}"
        elif inside == Path("README.md"):
            to = "index.md"
        else:
            return text  # a file of the repository, which the site does not have
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        return f"{image}[{text}]({up}{to}{'#' + anchor if anchor else ''})"

    markdown = LINK.sub(rewritten, markdown)
    if page.file.src_uri == "models.md":  # numbers of its footnotes, which are no references to headings
        markdown = re.sub(r"\[(\d+)\]", r"\\[\1\\]", markdown)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Sphinx's roles in docstrings become cross-references where the site documents what they name."""

    def reference(found: re.Match[str]) -> str:
        target = found[1]
        short = target.rpartition(".")[2]
        full = target if "." in target else f"liger_trainer.kernels.{target}"
        return f'<autoref identifier="{full}" optional><code>{short}</code></autoref>'

    return ROLE.sub(reference, html)
