"""Results survive a killed run, and only comparable ones are merged."""

from __future__ import annotations

import json

import pytest
import torch

from harness.record import Record, device_slug

CPU = torch.device("cpu")


def row(provider, rows, time):
    return {"provider": provider, "dtype": "bfloat16", "shape": {"rows": rows}, "event_ms": [time, time, time]}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("AMD Instinct MI300X", "mi300x"),
        ("CPU", "cpu"),
    ],
)
def test_device_slug(name, slug):
    assert device_slug(name) == slug


def test_round_trip_and_replacement(tmp_path):
    record, path = Record.open(tmp_path / "new", "op", CPU)
    assert path.name == "op_cpu.json"
    record.save(path)
    assert Record.load(path).rows == []
    for each in (row("ours", 1, 5.0), row("hf", 1, 9.0), row("ours", 2, 6.0), row("ours", 1, 4.0)):
        record.add(each)
    record.save(path)
    again, _ = Record.open(tmp_path / "new", "op", CPU)
    assert again == record
    assert [(each["provider"], each["shape"]["rows"], each["event_ms"][1]) for each in again.rows] == [
        ("ours", 1, 4.0),
        ("hf", 1, 9.0),
        ("ours", 2, 6.0),
    ]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"device": "another CPU"}, {"versions": {"torch": "1.0"}}])
def test_rows_of_another_device_or_other_versions_are_not_kept(tmp_path, capsys, change):
    record, path = Record.open(tmp_path, "op", CPU)
    record.add(row("ours", 1, 5.0))
    record.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert Record.open(tmp_path, "op", CPU)[0].rows == []
    assert "will be replaced" in capsys.readouterr().err
