"""What the pages tell users to type runs, on tiny models."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, VOCAB, sequences, tiny_llama
from transformers import LlamaForCausalLM

import liger_trainer
from liger_trainer.patching.options import Options
from tests.docs.pages import PAGES, ROOT, blocks

# Pages whose examples need what this test has not, and the test that runs them instead.
ELSEWHERE = {
    "docs/adding-a-recogniser.md": "parts of an example without its kernel",
    "docs/trl.md": "tests/trl",
    "docs/distributed.md": "tests/distributed",
    "docs/performance.md": "no code of users",
    "docs/tensor-parallel.md": "tests/distributed_vocab",
    "docs/benchmarks.md": "no code of users",
    "docs/models.md": "no code of users",
}
OWN = [page for page in PAGES if page.relative_to(ROOT).as_posix() not in ELSEWHERE]
HUB_MODEL = '"meta-llama/Llama-3.2-1B"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        word: i + 4 for i, word in enumerate(["a", "b", "c", "d", "e"])
    }
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class World(dict[str, Any]):
    """The names that the pages take for granted, each made when a page first asks for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Any:
        make = getattr(self, f"_{name}", None)
        if make is None:
            raise KeyError(name)
        self[name] = make()
        return self[name]

    def _torch(self) -> Any:
        return torch

    def _model(self) -> Any:
        return LlamaForCausalLM.from_pretrained(self.folder)

    def _data(self) -> Any:
        return sequences()

    def _args(self) -> Any:
        import transformers

        return transformers.TrainingArguments("out", report_to="none", use_cpu=True)

    def _pairs(self) -> Any:
        from datasets import Dataset

        return Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": ["c d"] * 4, "rejected": ["e"] * 4})

    def _trainer(self) -> Any:
        args = liger_trainer.TrainingArguments("out", max_steps=1, report_to="none", use_cpu=True)
        return liger_trainer.LigerTrainer(self["model"], args, train_dataset=self["data"])

    def _hidden(self) -> torch.Tensor:
        return torch.randn(6, HIDDEN, requires_grad=True)

    def _lm_head(self) -> torch.nn.Linear:
        return torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def _labels(self) -> torch.Tensor:
        return torch.tensor([-100, 3, 5, -100, 7, 1])


def _fit_trl_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's configs want bf16 on a GPU by default."""
    import liger_trainer.trl

    on_cpu = functools.partial(liger_trainer.trl.LigerDPOConfig, use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setattr(liger_trainer.trl, "LigerDPOConfig", on_cpu)


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_runs(page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [block for block in blocks(page) if block.language == "python" and "npu_kernels" not in block.text]
    if any("define(" in block.text for block in found):
        # An op that is defined stays with the process, where other tests would find it.
        code = "\n".join(block.text for block in found)
        subprocess.run(
            [sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        return
    world = World(folder)
    if any("liger_trainer.trl" in block.text for block in found):
        _fit_trl_to_this_machine(monkeypatch)
    for block in found:
        code = block.text.replace(HUB_MODEL, repr(str(folder)))
        # Lines as on the page, so that a traceback names them.
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), world)


def test_there_are_three_ways_to_use_it() -> None:
    readme = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("## Three ways to use it")[2].partition("\n## ")[0]
    )
    used = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    for name in (
        "LigerTrainer(", "LigerCallback()", "LigerDPOTrainer(", "apply_liger_kernel(model)", "plan(model)",
        "AutoLigerKernelForCausalLM.from_pretrained", "apply_liger_kernel_to_llama()", "linear_cross_entropy(",
    ):  # fmt: skip
        assert name in used, name


def _parsed(command: str) -> list[str]:
    return command.partition("#")[0].split()


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    """Targets of make, scripts and modules that are called, and options of the command line."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks(page):
        if block.language != "bash":
            continue
        for line in block.text.splitlines():
            words = [word for word in _parsed(line) if not re.fullmatch(r"\w+=.*", word)]
            if not words:
                continue
            if words[0] == "make":
                asked = [word for word in words[1:] if re.fullmatch(r"[\w-]+", word)]
                assert set(asked[:1]) <= targets, line
            for word in words:
                if word.endswith((".py", ".yaml")) and word != "train.py":
                    assert (ROOT / word).exists(), line
            if words[:3] == ["python", "-m", "liger_trainer"]:
                assert words[3] in ("plan", "env"), line


@pytest.mark.parametrize("arguments", [["plan", "llama", "--batch", "4", "--length", "4096"], ["env", "--no-test"]])
def test_the_command_line_of_the_pages(arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "liger_trainer", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    if arguments[0] == "plan":  # the quick start shows what it prints
        shown = "\n".join(block.text for block in blocks(ROOT / "docs/quickstart.md"))
        for line in run.stdout.splitlines():
            assert " ".join(line.split()) in " ".join(shown.split()), line


def test_settings_name_every_option() -> None:
    table = (ROOT / "docs/settings.md").read_text(encoding="utf-8").partition("## When")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(Options.__dataclass_fields__)
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        for name in re.findall(r"`(\w+)`", cells[1]):
            default = Options.__dataclass_fields__[name].default
            assert cells[2] in {True: ("on",), False: ("off",), None: ("chosen", "none")}[default], name


def test_migration_names_what_exists() -> None:
    import liger_trainer.alignment_losses as losses
    import liger_trainer.modules as modules

    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        if "the same from `liger_trainer.modules`" in line:
            names = re.findall(r"`(?:liger_kernel\.transformers\.)?(Liger\w+|liger_\w+)`", line.split("|")[1])
            assert len(names) > 5 and all(hasattr(modules, name) for name in names), names
        for name in re.findall(r"`(?:liger_trainer\.)?(Liger\w+(?:Trainer|Config))", line):
            import liger_trainer.trl

            assert hasattr(liger_trainer.trl, name) or hasattr(liger_trainer, name), name
    for name in ("DPO", "CPO", "ORPO", "SimPO", "KTO", "GRPO", "JSD"):
        assert hasattr(losses, f"LigerFusedLinear{name}Loss")


def test_every_block_parses() -> None:
    for page in OWN:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text, str(page))
