"""What all endpoints share: the engine, the tokenizer, the model's names, the running requests, the metrics."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

import tilery
from tilery.engine.client import EngineClient
from tilery.engine.messages import Outputs
from tilery.engine.tokenizer import Tokenizer
from tilery.observe.metrics import ServingMetrics
from tilery.server.chat import ChatFormatError, ChatPrompt, ChatTemplate
from tilery.server.config import ServerConfig
from tilery.server.errors import ApiError, invalid, unavailable
from tilery.server.protocol import Tool
from tilery.server.sampling import Limits

if TYPE_CHECKING:
    from tilery.server.generation import Generation


LONG_TEXT = 32_768  # characters; longer prompts are tokenised in a thread so that streams go on meanwhile


class Service:
    """One model behind one API. Everything here belongs to the server's event loop."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, chat: ChatTemplate, config: ServerConfig) -> None:
        info = client.info
        self.client = client
        self.tokenizer = tokenizer
        self.chat = chat
        self.config = config
        self.limits = Limits(config, info)
        self.model_names = config.model_names or (info.model,)
        self.started = int(time.time())
        settings = msgspec.json.encode([info, config.model_names])
        self.fingerprint = f"tilery-{tilery.__version__}-{hashlib.sha256(settings).hexdigest()[:8]}"
        self.running: dict[str, Generation] = {}
        """Unfinished answers by their id."""
        self.draining = False
        self.idle = asyncio.Event()
        """Set while nothing runs."""
        self.idle.set()
        self.metrics = ServingMetrics(
            model_name=self.model_names[0],
            max_model_len=info.max_model_len,
            engine=lambda: msgspec.structs.asdict(client.stats),
            cache={
                "block_size": str(info.block_size),
                "num_gpu_blocks": str(info.num_blocks),
                "cache_dtype": info.cache_dtype,
            },
            vllm_names=config.vllm_metrics,
        )
        client.observer = self._observe

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises a 404 that lists the valid names."""
        if name is None or name in self.model_names:
            return name or self.model_names[0]
        known = ", ".join(f"`{known}`" for known in self.model_names)
        raise ApiError(404, f"The model `{name}` does not exist; this server has {known}.", "model")

    def check_open(self) -> None:
        """Raises a 503 while no new generation can start."""
        retry_after = self.config.retry_after_seconds
        if self.client.dead is not None:
            raise unavailable(f"The engine is dead: {self.client.dead}", retry_after)
        if self.draining:
            raise unavailable("The server is shutting down.", retry_after)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[Tool] | None,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        settings: dict[str, Any] | None,
    ) -> ChatPrompt:
        """The prompt of a conversation; `settings` are the request's chat_template_kwargs. Raises a 400."""
        try:
            return self.chat.apply(
                messages,
                tools=msgspec.to_builtins(tools) if tools else None,
                add_generation_prompt=add_generation_prompt is not False,
                continue_final_message=bool(continue_final_message),
                template_kwargs=settings,
            )
        except ChatFormatError as error:
            raise invalid(str(error), error.field) from None

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if sum(map(len, texts)) > LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode_batch, texts, add_special_tokens)
        return [self.tokenizer.encode(text, add_special_tokens) for text in texts]

    def add(self, generation: Generation) -> None:
        self.running[generation.id] = generation
        self.idle.clear()

    def remove(self, generation: Generation) -> None:
        self.running.pop(generation.id, None)
        if not self.running:
            self.idle.set()

    def abort(self, ids: Iterable[str]) -> list[str]:
        """Ends running answers with finish_reason "abort"; returns the ids that were found."""
        found = [id for id in ids if id in self.running]
        requests = [request_id for id in found for request_id in self.running[id].request_ids]
        if requests and self.client.dead is None:
            self.client.abort(requests)
        return found

    def _observe(self, event: Outputs) -> None:
        metrics = self.metrics
        metrics.step_tokens.observe(event.stats.last_step_tokens)
        for output in event.outputs:
            timing = output.timing
            if timing is not None:
                metrics.observe_timing(timing.arrived, timing.scheduled, timing.first_token, timing.finished)
