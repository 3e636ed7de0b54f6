"""The demo's command lines; `make demo` runs them."""

from pathlib import Path

import pytest
import torch

from pipelines import demo, drawing
from pipelines.cli import resolve
from pipelines.config import DemoConfig


@pytest.mark.parametrize("flag", ["avx512_bf16", "none"])
@pytest.mark.parametrize("chosen", ["fp32", "bf16", None])
def test_every_stage_computes_in_the_precision_that_was_chosen_or_is_the_machine_s_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, flag: str, chosen: str | None
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, flag: True})
    wanted = chosen or {"avx512_bf16": "bf16", "none": "fp32"}[flag]

    lines = [line for _, line in demo.stage_commands(Path("demo"), DemoConfig(precision=chosen))]

    configs = {word: resolve(word, rest) for word, *rest in lines}
    assert configs["train"].parallel.precision == wanted
    assert configs["evaluate"].precision == configs["serve"].precision == wanted
    drawing.warn_of_slow_bf16(wanted)
    assert ("--precision fp32" in caplog.text) == ((wanted, flag) == ("bf16", "none"))
