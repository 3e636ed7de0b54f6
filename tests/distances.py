"""How far apart two trained states are, tensor by tensor."""

import torch


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    if torch.equal(found, expected):
        return 0.0
    return ((found - expected).norm() / expected.norm()).item()


def moved_apart(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    initial: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Worst distance of each kind of tensor in checkpoints of two runs with the same start.

    Weights and averages are compared by how far the run has moved them, not by their size: a run
    that trains nothing is 1 away. Moments of the optimizer start at zero.

    Args:
        found: of one run, by their names in a checkpoint.
        expected: of the other.
        initial: weights with which both began, by their names in the model.
    """
    assert found.keys() == expected.keys()
    worst: dict[str, float] = {}
    for name, tensor in expected.items():
        parameter = next((p for p in initial if f".{p}" in f".{name}"), "")
        kind = next((k for k in ("exp_avg_sq", "exp_avg") if name.endswith(k)), "")
        if not parameter or not tensor.is_floating_point() or name.endswith(".step"):
            assert torch.equal(found[name], tensor), name
            continue
        begun = 0 if kind else initial[parameter]
        off = relative(found[name] - begun, tensor - begun)
        kind = kind or name.split(".", maxsplit=1)[0]
        worst[kind] = max(worst.get(kind, 0), off)
    return worst


def assert_trained_alike(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    initial: dict[str, torch.Tensor],
) -> None:
    """Two runs ended in the same state: every tensor to 1e-5 of its norm.

    As weights are mostly what they began as, they also must agree to 3e-5 of how far training
    moved them, which includes that fp32 rounds an average at each step.
    """
    far = {name: relative(found[name], t) for name, t in expected.items() if t.is_floating_point()}
    assert max(far.values()) < 1e-5, max(far.items(), key=lambda item: item[1])
    worst = moved_apart(found, expected, initial)
    assert max(worst.values()) < 3e-5, worst
