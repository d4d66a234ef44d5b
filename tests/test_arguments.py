from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from transformers import HfArgumentParser

from liger_trainer import LigerArguments, TrainingArguments

CONFIG = {"rope": False, "tile_bytes": 4096}


def test_defaults_leave_the_model_alone(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path))
    assert isinstance(args, transformers.TrainingArguments)
    assert (args.use_liger, args.liger_config, args.output_dir) == (False, None, str(tmp_path))
    assert args.eval_strategy is transformers.trainer_utils.IntervalStrategy.NO  # transformers' own set-up has run
    assert args.liger_options() is None
    assert TrainingArguments(use_liger=True).liger_options() == {}


@pytest.mark.parametrize("spelling", ["inline", "json", "yaml"])
def test_command_line(tmp_path: Path, spelling: str) -> None:
    given = json.dumps(CONFIG)
    if spelling != "inline":
        path = tmp_path / f"liger.{spelling}"
        path.write_text(given if spelling == "json" else "rope: false\ntile_bytes: 4096\n")
        given = str(path)
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_liger", "--liger_config", given], look_for_args_file=False
    )
    assert args.use_liger is True
    assert args.liger_config == CONFIG
    assert "--liger_config" in parser.format_help()


def test_files(tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "use_liger": True, "liger_config": CONFIG}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_liger: true\nliger_config:\n  rope: false\n  tile_bytes: 4096\n"
    )
    parser = HfArgumentParser(TrainingArguments)
    for (args,) in (
        parser.parse_dict(fields),
        parser.parse_json_file(tmp_path / "run.json"),
        parser.parse_yaml_file(tmp_path / "run.yaml"),
    ):
        assert (args.use_liger, args.liger_config) == (True, CONFIG)


def test_round_trips(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_liger=True, liger_config=CONFIG)
    rebuilt = {
        "to_dict": TrainingArguments(**args.to_dict()),
        "json": TrainingArguments(**json.loads(args.to_json_string())),
        "replace": dataclasses.replace(args, learning_rate=1.0),
        "pickle": pickle.loads(pickle.dumps(args)),
        "deepcopy": copy.deepcopy(args),
    }
    for name, each in rebuilt.items():
        assert (each.use_liger, each.liger_config) == (True, CONFIG), name
    assert dataclasses.replace(args, use_liger=False).liger_options() is None
    assert "liger_config" in args.to_sanitized_dict()


def test_the_given_mapping_is_copied() -> None:
    given = dict(CONFIG)
    args = TrainingArguments(use_liger=True, liger_config=given)
    given["rope"] = True
    assert args.liger_config == CONFIG


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ropes": True}, TypeError, r"liger_config.*'ropes'.*rope, rms_norm"),
        ('{"ropes": true}', TypeError, r"'ropes'.*rope, rms_norm"),
        ({"rope": "yes"}, TypeError, r"liger_config.*rope .*'yes'"),
        ({"rope": 1}, TypeError, r"rope .*1"),
        ({"tile_bytes": 1.5}, TypeError, r"tile_bytes .*1\.5"),
        ({"tile_bytes": True}, TypeError, r"tile_bytes .*True"),
        ({"tile_bytes": 0}, ValueError, r"tile_bytes .*0"),
        ({"cross_entropy": True, "fused_linear_cross_entropy": True}, ValueError, r"exclude each other"),
        (["rope"], TypeError, r"liger_config.*mapping.*\['rope'\].*list"),
        ("no/such/file.yaml", ValueError, r"liger_config='no/such/file.yaml'.*JSON object.*path"),
        ('{"rope": fals}', ValueError, r"liger_config.*does not parse"),
    ],
)
@pytest.mark.parametrize("use_liger", [True, False])
def test_a_bad_liger_config_is_named(given: object, error: type[Exception], message: str, use_liger: bool) -> None:
    with pytest.raises(error, match=message):
        TrainingArguments(use_liger=use_liger, liger_config=given)


def test_not_together_with_transformers_own_option() -> None:
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        TrainingArguments(use_liger=True, use_liger_kernel=True)
    assert TrainingArguments(use_liger=False, use_liger_kernel=True).use_liger_kernel


def test_the_fields_mix_into_trl_configs(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    @dataclass
    class Config(LigerArguments, trl.DPOConfig):
        pass

    args = Config(str(tmp_path), use_liger=True, liger_config='{"rope": false}', beta=0.3, use_cpu=True)
    assert args.liger_options() == {"rope": False}
    assert (args.beta, args.logging_steps) == (0.3, 10)  # TRL's own fields and defaults are untouched
    assert Config(**args.to_dict()).liger_options() == {"rope": False}
    with pytest.raises(TypeError, match="ropes"):
        Config(str(tmp_path), liger_config={"ropes": True}, use_cpu=True)


def test_plain_pytorch_users_do_not_import_transformers() -> None:
    code = "import sys, liger_trainer.kernels; sys.exit('transformers' in sys.modules or 'trl' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
