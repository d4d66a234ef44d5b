"""What comes from files and the command line is read as data, never run."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama

import liger_trainer.__main__ as command_line
from liger_trainer import TrainingArguments, apply_liger_kernel

PACKAGE = Path(__file__).resolve().parents[1] / "liger_trainer"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Functions that run what they are given, by the names that a call may have.
RUNS_CODE = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
}

# A layer's own source is rewritten and compiled again, once it is known to be the source of the code that runs.
COMPILES = {"patching/residual_forward.py": {"compile", "exec"}}


def calls(source: Path) -> set[str]:
    tree = ast.parse(source.read_text(encoding="utf-8"), str(source))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_runs_what_it_reads(source: Path) -> None:
    allowed = COMPILES.get(source.relative_to(PACKAGE).as_posix(), set())
    assert calls(source) & RUNS_CODE == allowed


def test_the_search_finds_them(tmp_path: Path) -> None:
    source = tmp_path / "bad.py"
    source.write_text("import torch\ntorch.load(eval('x'))\n")
    assert calls(source) == {"torch.load", "eval"}


def test_yaml_with_code_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "liger.yaml"
    path.write_text(f"rope: !!python/object/apply:os.mkdir ['{ran}']\n")
    with pytest.raises(ValueError, match="does not parse"):
        TrainingArguments(str(tmp_path), liger_config=str(path))
    assert not ran.exists()


def test_a_patched_model_is_saved_as_safetensors_of_a_stock_model(tmp_path: Path) -> None:
    model = tiny_llama()
    keys = set(model.state_dict())
    apply_liger_kernel(model)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert "liger" not in (tmp_path / "config.json").read_text()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) <= keys
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert b"liger_trainer" not in pickle.dumps(model)  # nor does a pickle need the package to be read


def remote_model(folder: Path) -> Path:
    """A model folder whose code leaves a file behind when it is imported."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "poetry", "auto_map": {"AutoConfig": "poetry.PoetryConfig", '
        '"AutoModelForCausalLM": "poetry.Poetry"}}'
    )
    (model / "poetry.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
        "from transformers import PretrainedConfig\n"
        "class PoetryConfig(PretrainedConfig):\n    model_type = 'poetry'\n"
    )
    return model


def test_plan_runs_no_code_of_a_model_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # transformers asks at a terminal
    with pytest.raises(SystemExit) as ended:
        command_line.main(["plan", str(remote_model(tmp_path))])
    assert ended.value.code == 2
    assert not (tmp_path / "ran").exists()


def test_nobody_trusts_remote_code_by_default() -> None:
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), source
