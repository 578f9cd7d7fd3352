"""Opening a Hugging Face checkpoint: memory-mapped safetensors, FP8 blocks dequantised where the platform cannot
multiply by them, everything checked before use."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tilery.models.config import ConfigError, DeepseekConfig, read_config, read_json, resolve_model
from tilery.models.deepseek import DeepseekModel
from tilery.models.inventory import TensorSpec, inventory
from tilery.models.step import CPU
from tilery.ops.quant import E4M3, BlockWeight, Weight, dequantize_blocks
from tilery.ops.registry import Operators

__all__ = ["Checkpoint", "CheckpointError", "load_model", "resolve_model"]

IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.(k|v|input)_scale$|\.input_global_scale$|\.activation_scale$")
"""Tensors that released files carry and that no computation here needs."""


class CheckpointError(ValueError):
    """The files of a checkpoint do not fit its config; the message names every tensor concerned and what to do."""


class Checkpoint:
    """The tensors of a folder's safetensors files, by name, memory-mapped: nothing is read before it is asked for.

    Tensors come on `device`; FP8 blocks cross as they are, so a GPU gets a quarter of the bytes and dequantises itself.

    Raises `CheckpointError` if there are no safetensors files (pickle files are refused: loading them runs code), or
    a file is named by the index but missing or cut short.
    """

    def __init__(self, folder: Path, device: torch.device = CPU) -> None:
        self.folder, self.device = folder, device
        path = folder / "model.safetensors.index.json"
        index = read_json(path).get("weight_map", {})
        if not isinstance(index, dict):
            raise CheckpointError(f"{path} is not an index: its weight_map must be a JSON object.")
        files = sorted(set(index.values())) or sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
            if pickles:
                raise CheckpointError(
                    f"{folder} holds pickle files ({', '.join(pickles[:3])}), which run code when they are loaded "
                    "and are refused. Convert them to safetensors first."
                )
            raise CheckpointError(f"{folder} has no *.safetensors file.")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"the index of {folder} names files that are not there: {', '.join(missing)}.")
        self._file_of: dict[str, safe_open] = {}
        for name in files:
            try:
                file = safe_open(folder / name, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{folder / name} is not a whole safetensors file: {error}") from None
            for key in file.keys():  # noqa: SIM118 (not a dict)
                self._file_of[key] = file

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name).to(self.device)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`; FP8 blocks are multiplied by their `weight_scale_inv`."""
        value = self.tensor(name)
        if value.dtype == E4M3:
            value = dequantize_blocks(value, self.tensor(f"{name}_scale_inv"))
        return value.to(dtype)

    def blocks(self, name: str, dtype: torch.dtype) -> BlockWeight | None:
        """An FP8 matrix as it is stored; None if it is not, or if rounding its numbers to `dtype` would change them.

        e4m3 times a power of two is exact in every dtype; other scales are only kept for fp32.
        """
        value = self.tensor(name)
        if value.dtype != E4M3:
            return None
        scale = self.tensor(f"{name}_scale_inv").float()
        exact = dtype == torch.float32 or bool((torch.frexp(scale).mantissa == 0.5).all())
        return BlockWeight.of(value.clone(), scale) if exact else None

    def check(self, specs: Iterable[TensorSpec], main_layers: int) -> None:
        """Compares names and shapes with `specs`; raises one `CheckpointError` that names all that differ.

        Tolerated: missing copies of the embedding and head in MTP layers, BF16 files without scales, leftover
        tensors of layers past those that are used, and the buffers in `IGNORED`.
        """
        known: set[str] = set()
        missing, misshapen = [], []
        for spec in specs:
            scale = f"{spec.name}_scale_inv"
            known |= {spec.name, scale}
            if spec.name not in self:
                if not spec.optional:
                    missing.append(spec.name)
                continue
            if (shape := self.shape(spec.name)) != spec.shape:
                misshapen.append(f"{spec.name} is {list(shape)}, expected {list(spec.shape)}")
            if len(spec.shape) == 2 and self._file_of[spec.name].get_slice(spec.name).get_dtype() == "F8_E4M3":
                if scale not in self:
                    missing.append(scale)
                elif (shape := self.shape(scale)) != spec.scale_shape:
                    misshapen.append(f"{scale} is {list(shape)}, expected {list(spec.scale_shape)}")
        unknown = [
            n for n in self.names() if n not in known and not IGNORED.search(n) and not _extra_layer(n, main_layers)
        ]
        if not (missing or misshapen or unknown):
            return
        lines = [f"the tensors of {self.folder} do not fit its config.json:"]
        for title, names in (("missing", missing), ("wrong shape", misshapen), ("unknown", unknown)):
            lines += [f"  {title} ({len(names)}):"] * bool(names) + [f"    {name}" for name in names]
        lines.append("Check that config.json belongs to these files and that the download is complete.")
        raise CheckpointError("\n".join(lines))


def _extra_layer(name: str, main_layers: int) -> bool:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= main_layers


def has_mtp(checkpoint: Checkpoint, config: DeepseekConfig) -> bool:
    """Whether the files hold the multi-token-prediction layer that the config announces."""
    name = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    return config.num_nextn_predict_layers > 0 and name in checkpoint


def load_model(
    folder: Path,
    ops: Operators,
    dtype: torch.dtype,
    *,
    positions: int | None = None,
    mtp: bool = False,
    progress: bool = False,
    device: torch.device = CPU,
) -> DeepseekModel:
    """Builds the model of a checkpoint folder on `device`, which must be one that `ops` were selected for.

    Matrices are rounded to `dtype`. A GPU and a CPU with bf16 matrix instructions keep and multiply bf16; other CPUs
    compute in fp32, and where `ops` take narrow weights keep them in `dtype`, or as FP8 where that is the same numbers.
    Raises `ConfigError` or `CheckpointError`.
    """
    config = read_config(folder)
    checkpoint = Checkpoint(folder, device)
    if mtp and not has_mtp(checkpoint, config):
        raise ConfigError(
            f"{folder} has no multi-token-prediction layer: speculative decoding with it is not possible."
        )
    specs = list(inventory(config, mtp=mtp))
    checkpoint.check(specs, config.num_hidden_layers)
    native = dtype == torch.bfloat16 and ops.platform.bf16_matmul
    compute = torch.bfloat16 if native else torch.float32
    stored = dtype if native or ops.narrow_weights else torch.float32
    bar = _Progress(len(specs), progress)

    def weight(name: str, kind: torch.dtype | None = None) -> Weight:
        bar.advance()
        if kind is None and ops.narrow_weights and (blocks := checkpoint.blocks(name, dtype)) is not None:
            return blocks
        made = checkpoint.weight(name, dtype).to(stored) if kind is None else checkpoint.weight(name, kind)
        # On a CPU nothing may point into the file, whose pages would stay resident; a GPU has a copy as it is.
        return made.clone() if device.type == "cpu" else made

    model = DeepseekModel(config, ops, weight, positions or config.max_position_embeddings, compute, mtp)
    bar.close()
    return model


class _Progress:
    """A progress bar on standard error, only on a terminal and only when loading takes noticeable time."""

    def __init__(self, total: int, show: bool) -> None:
        self._bar = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("loading weights", total=total)
            self._bar.start()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
