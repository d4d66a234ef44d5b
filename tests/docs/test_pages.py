"""Links lead somewhere, every public name is in the API reference, and figures are those that were measured."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links

PACKAGES = {
    "liger_trainer": "liger_trainer.md",
    "liger_trainer.kernels": "kernels.md",
    "liger_trainer.modules": "modules.md",
    "liger_trainer.alignment_losses": "alignment_losses.md",
    "liger_trainer.trl": "trl.md",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            assert link.startswith("https://"), link
            continue
        target, _, anchor = link.partition("#")
        path = page if not target else (page.parent / target).resolve()
        assert path.exists(), f"{link}: there is no {path}"
        assert not anchor or anchor in anchors(path), f"{link}: {path.name} has no such heading"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    page = (ROOT / "docs/api" / PACKAGES[package]).read_text(encoding="utf-8")
    described = set(re.findall(rf"^::: {re.escape(package)}\.(\w+)$", page, re.MULTILINE))
    described |= set(re.findall(r"^## `(\w+)`$", page, re.MULTILINE))
    assert described == set(importlib.import_module(package).__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name


def test_every_page_is_in_the_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in site, page


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_figures_of_the_readme_were_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in results("sft_step_h100")["rows"]:
        if row["provider"] in ("hf", "liger-kernel", "ours"):
            shown = f"| {row['tokens_per_second']:,.0f} | {row['peak_gb']:.1f} GB |"
            assert shown in readme, shown


def test_the_pictures_are_what_the_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(matplotlib, "rcParams", matplotlib.rcParams.copy())
    monkeypatch.syspath_prepend(ROOT / "docs/images")
    draw = importlib.import_module("draw")
    monkeypatch.setattr(draw, "HERE", tmp_path)
    for function in (draw.tiles, draw.products, draw.deferred):
        function()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/images").glob("*.svg")}
    shown = set(re.findall(r"images/([\w.]+)", (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")))
    assert shown == drawn
