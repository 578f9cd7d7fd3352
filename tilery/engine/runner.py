"""Runs one scheduled step on the device: tokens in, hidden states and logits out, drafts on request.

The runner owns the model and its cache tensors and knows nothing of requests' rules; it lays the scheduled chunks out
as a `StepInput`, in the order the model wants, and gives results back in the order of the schedule.

Legend: S sampled rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilery.engine.config import CacheDType, Device, DType, EngineConfig
from tilery.engine.scheduler import ScheduledItem
from tilery.models import cache as model_cache
from tilery.models.deepseek import DeepseekModel
from tilery.models.loader import load_model, resolve_model
from tilery.models.recorded import RecordedDecode
from tilery.models.step import CPU, Chunk, build_step, order_chunks, upload
from tilery.ops import native, registry
from tilery.ops.cache import PAGE

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_CACHE_TOKENS = 65_536
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.8}
"""The cache takes at most this share of the memory that is free once the weights are loaded. A GPU's belongs to this
process; the rest is for activations."""


@dataclass(frozen=True)
class DraftInput:
    """Feeds the multi-token-prediction layer positions `start` .. of one request.

    `hidden` [n, H] belongs to these positions, `next_ids` (n of them) are the tokens that follow each.
    """

    hidden: Tensor
    next_ids: Sequence[int]
    start: int
    blocks: Sequence[int]


def resolve_device(device: Device) -> torch.device:
    """The device that a setting stands for on this machine. Raises `ValueError` for a GPU that torch cannot use."""
    if device is not Device.CPU and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if device is not Device.CUDA:
        return CPU
    if torch.version.cuda is None:
        raise ValueError(
            f"device cuda: this torch ({torch.__version__}) is built without CUDA; install a build with it, or take "
            "device cpu."
        )
    raise ValueError(
        f"device cuda: torch {torch.__version__} finds no NVIDIA GPU that it can use; see whether nvidia-smi shows one "
        "and CUDA_VISIBLE_DEVICES allows it, or take device cpu."
    )


def free_memory_bytes(device: torch.device = CPU) -> int:
    """Memory that `device` can still give: on a CPU to processes, a large number where that cannot be read; on a GPU to
    this one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left in torch's own pool is free as well
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 40


class Runner:
    """Raises `ConfigError`, `CheckpointError` or `ValueError` for a model or settings that do not fit."""

    def __init__(self, config: EngineConfig) -> None:
        dtype = TORCH_DTYPES[config.dtype.value]
        self.device = resolve_device(config.device)
        self.ops = registry.select(registry.Platform.detect(self.device.type), config.operators)
        self.threads = config.threads or len(os.sched_getaffinity(0))
        native.set_threads(self.ops, self.threads)
        self.folder = resolve_model(config.model)
        self.speculates = config.speculative_tokens > 0
        self.model = self._load(config, dtype)
        self.model_config = self.model.config
        self.cache_kind = self._cache_kind(config)
        self.cache_dtype = torch.uint8 if self.cache_kind is CacheDType.FP8 else dtype
        self.block_size = config.block_size
        self.num_blocks = self._plan_blocks(config)
        slots = -(-self.num_blocks * self.block_size // PAGE) * PAGE  # whole pages, whatever the block size
        self.caches = model_cache.allocate(
            self.model_config, slots, self.cache_dtype, self.model.cache_layers, self.device
        )
        self.recorded = None
        if native.records(self.ops):
            self.recorded = RecordedDecode(self.model, self.caches, self.block_size)

    def _load(self, config: EngineConfig, dtype: torch.dtype) -> DeepseekModel:
        try:
            return load_model(
                self.folder,
                self.ops,
                dtype,
                positions=config.max_model_len,
                mtp=self.speculates,
                progress=config.progress,
                device=self.device,
            )
        except torch.OutOfMemoryError:
            total = torch.cuda.mem_get_info(self.device)[1] / 2**30
            raise ValueError(
                f"device cuda: the weights of {config.model} do not fit into the GPU's {total:.0f} GiB, or what other "
                "processes leave of them; take a smaller model, or device cpu."
            ) from None

    def _cache_kind(self, config: EngineConfig) -> CacheDType:
        """What `CacheDType.AUTO` stands for with this model; the others stand for themselves."""
        if config.cache_dtype is not CacheDType.AUTO:
            return config.cache_dtype
        model = self.model_config
        packs = model.sparse and model.kv_lora_rank % 128 == 0 and model.index_head_dim == 128
        return CacheDType.FP8 if config.dtype is DType.BFLOAT16 and model.fp8 and packs else CacheDType.MODEL

    def _plan_blocks(self, config: EngineConfig) -> int:
        per_token = model_cache.bytes_per_token(self.model_config, self.cache_dtype, self.model.cache_layers)
        free = free_memory_bytes(self.device)
        longest = config.max_model_len or self.model_config.max_position_embeddings
        useful = DEFAULT_CACHE_TOKENS if self.device.type == "cpu" else config.max_running * longest
        tokens = config.cache_tokens or min(useful, int(free * MEMORY_SHARE[self.device.type]) // per_token)
        if tokens * per_token > free:
            raise ValueError(
                f"a cache of {tokens} tokens needs {tokens * per_token / 2**30:.1f} GiB ({per_token} bytes a token), "
                f"but {free / 2**30:.1f} GiB are free; lower cache_tokens or use the fp8 cache."
            )
        return max(1, -(-tokens // self.block_size) if config.cache_tokens else tokens // self.block_size)

    @torch.inference_mode()
    def forward(self, items: Sequence[ScheduledItem]) -> list[Tensor]:
        """Computes every item's tokens and writes their cache rows. Returns the hidden states after the final norm,
        one [length, H] per item in the schedule's order. On a GPU they may still be under way: nothing here waits."""
        chunks = [
            Chunk(i.request.token_ids(i.start, i.start + i.length), i.start, i.request.block_table) for i in items
        ]
        decoding = sum(len(chunk.token_ids) for chunk in chunks) if all(chunk.decodes for chunk in chunks) else None
        native.set_threads(self.ops, self.threads, decoding)
        if self.recorded is not None and decoding is not None:
            hidden = self.recorded.forward(chunks)
            if hidden is not None:
                return [hidden] if len(chunks) == 1 else list(hidden.split([len(c.token_ids) for c in chunks]))
        order = order_chunks(chunks)
        hidden = self.model.forward(build_step([chunks[i] for i in order], self.block_size, self.device), self.caches)
        parts = hidden.split([len(chunks[i].token_ids) for i in order])
        return [part for _, part in sorted(zip(order, parts), key=lambda pair: pair[0])]

    @torch.inference_mode()
    def logits(self, hidden: Sequence[Tensor]) -> Tensor:
        """Rows of hidden states, concatenated, to fp32 logits [S, V] on the runner's device, where they are sampled."""
        return self.model.logits(hidden[0] if len(hidden) == 1 else torch.cat(list(hidden)))

    @torch.inference_mode()
    def draft(self, inputs: Sequence[DraftInput]) -> tuple[list[int], list[Tensor]]:
        """Feeds the multi-token-prediction layer; per input, the most likely token after its last one, and the layer's
        hidden state [1, H] there (to draft one token further)."""
        chunks = [Chunk(i.next_ids, i.start, i.blocks) for i in inputs]
        order = order_chunks(chunks)
        step = build_step([chunks[i] for i in order], self.block_size, self.device)
        hidden = torch.cat([inputs[i].hidden for i in order])
        out = self.model.draft(hidden, step.token_ids, step, self.caches)
        lengths = [len(inputs[i].next_ids) for i in order]
        ends = torch.tensor(lengths, device="cpu").cumsum(0) - 1
        last = out.index_select(0, upload(ends, self.device))
        tokens = self.model.logits(last).argmax(1).tolist()
        back = sorted(range(len(order)), key=order.__getitem__)
        return [tokens[i] for i in back], [last[i : i + 1] for i in back]
