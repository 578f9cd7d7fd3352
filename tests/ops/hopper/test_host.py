"""What host functions share: the current device follows the operands, workspaces stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tilery.ops.hopper import _host, dense_mla


class Current:
    """Stands for torch's notion of the current device."""

    def __init__(self) -> None:
        self.index = 0

    def device(self, device: torch.device) -> Any:
        current = self

        class Within:
            def __enter__(self) -> None:
                self.before, current.index = current.index, device.index

            def __exit__(self, *_: object) -> None:
                current.index = self.before

        return Within()


class Operand:
    """A tensor of a device that this machine need not have."""

    is_cuda = True

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_launches_where_its_operands_are(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    current = Current()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.index)
    monkeypatch.setattr(torch.cuda, "device", current.device)

    @_host.on_its_device
    def launch(q: Any, scale: float, *, out: int) -> tuple[int, float, int]:
        return current.index, scale, out

    assert launch(Operand(index), 0.5, out=3) == (index, 0.5, 3)
    assert launch(scale=0.5, out=3, q=Operand(index)) == (index, 0.5, 3)
    assert current.index == 0


def test_a_workspace_is_kept_and_not_made_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    @_host.kept_for_ever
    def space(size: int) -> torch.Tensor:
        made.append(size)
        return torch.zeros(size)

    first = space(8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert space(8) is first
    with pytest.raises(RuntimeError, match="before a CUDA graph captures it"):
        space(9)
    assert made == [8]


def test_the_workspace_of_dense_decode_grows_by_doubling() -> None:
    device = torch.device("cpu")
    sizes = set()
    for rows in range(1, 65):
        parts, lse, splits = dense_mla._workspace(device, 4, rows, 128)
        assert (parts.shape, lse.shape, splits.shape) == ((4, rows, 512), (4, rows), (256,))
        assert parts.untyped_storage().data_ptr() == lse.untyped_storage().data_ptr()
        sizes.add(parts.untyped_storage().nbytes())
    assert sum(sizes) <= 2 * max(sizes)
