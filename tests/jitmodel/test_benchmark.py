"""The benchmark runs where there is no GPU; what it says of speed is not tested."""

import json
import math

import pytest

from jitmodel import benchmark


def test_each_variant_is_measured_beside_the_authors_and_written(tmp_path, capsys):
    pytest.importorskip("azula", reason="needs the dev extra azula")
    file = tmp_path / "result.json"
    line = ["--tiny", "--steps", "2", "--no-compile", "--peak-tflops", "1", "--json", str(file)]

    benchmark.main(line)

    rows = json.loads(file.read_text())["rows"]
    assert [(row["network"], row["checkpointing"]) for row in rows] == [
        ("ours", "none"), ("ours", "selective"), ("ours", "full"), ("authors", "none")
    ]  # fmt: skip
    for row in rows:
        assert row["images/s"] == pytest.approx(row["images"] / row["step, s"])
        assert 0 < row["MFU"] < 1
    assert capsys.readouterr().out.count("| tiny ") == 4


def test_a_device_of_unknown_speed_has_no_mfu(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark.cost, "peak_flops", lambda name: None)
    file = tmp_path / "result.json"

    benchmark.main(["--tiny", "--steps", "1", "--no-compile", "--json", str(file)])

    assert all(math.isnan(row["MFU"]) for row in json.loads(file.read_text())["rows"])


@pytest.mark.parametrize("option", ["--steps", "--batch"])
@pytest.mark.parametrize("number", ["0", "-3"])
def test_fewer_than_one_step_or_image_is_refused(option, number, capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark.main(["--tiny", "--no-compile", option, number])

    assert refused.value.code == 2
    assert f"error: {option} {number} is too few" in capsys.readouterr().err.splitlines()[-1]


def test_the_authors_network_of_a_named_size_is_theirs():
    authors = pytest.importorskip("azula.plugins.jit._src.model", reason="needs azula")
    config = benchmark.ModelConfig.named("JiT-B/16")

    ours = benchmark.authors_network(config).state_dict()

    theirs = authors.JiT_models["JiT-B/16"](input_size=256).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
