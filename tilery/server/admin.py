"""Everything that is not generation: models, tokens, health, load, metrics, and the administrative calls."""

from __future__ import annotations

import uuid

import msgspec

import tilery
from tilery.engine.client import EngineDeadError
from tilery.engine.messages import SamplingParams
from tilery.observe.metrics import CONTENT_TYPE
from tilery.server.errors import ApiError, invalid, unavailable
from tilery.server.exchange import Exchange
from tilery.server.generation import Generation
from tilery.server.protocol import AbortRequest, DetokenizeRequest, TokenizeRequest
from tilery.server.responses import Detokenized, ModelCard, ModelList, Tokenized
from tilery.server.service import Service

TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
ABORT = msgspec.json.Decoder(AbortRequest)


# ---- models and tokens -------------------------------------------------------------------------------------------


def _cards(service: Service) -> list[ModelCard]:
    return [
        ModelCard(
            id=name,
            created=service.started,
            root=service.client.info.model,
            max_model_len=service.client.info.max_model_len,
        )
        for name in service.model_names
    ]


async def models(service: Service, exchange: Exchange) -> None:
    await exchange.reply_json(ModelList(data=_cards(service)))


async def model(service: Service, exchange: Exchange) -> None:
    """GET /v1/models/NAME; a name may contain slashes."""
    name = service.check_model(exchange.path.removeprefix("/v1/models/"))
    await exchange.reply_json(next(card for card in _cards(service) if card.id == name))


async def tokenize(service: Service, exchange: Exchange) -> None:
    request = await exchange.decode(TOKENIZE, service.config.max_body_bytes)
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("Give either prompt or messages.", "prompt")
    if request.messages is not None:
        text = service.render_chat(
            request.messages, request.tools, request.add_generation_prompt, False, request.chat_template_kwargs
        ).text
        special = bool(request.add_special_tokens)
    else:
        text = request.prompt or ""
        special = request.add_special_tokens is None or request.add_special_tokens
    [tokens] = await service.encode([text], special)
    texts = [service.tokenizer.token_text(token) for token in tokens] if request.return_token_strs else None
    await exchange.reply_json(
        Tokenized(count=len(tokens), max_model_len=service.client.info.max_model_len, tokens=tokens, token_strs=texts)
    )


async def detokenize(service: Service, exchange: Exchange) -> None:
    request = await exchange.decode(DETOKENIZE, service.config.max_body_bytes)
    service.check_model(request.model)
    service.limits.check_token_ids(request.tokens, "tokens")
    await exchange.reply_json(Detokenized(service.tokenizer.decode(request.tokens, skip_special_tokens=False)))


# ---- health, load, metrics ---------------------------------------------------------------------------------------


async def health(service: Service, exchange: Exchange) -> None:
    """Cheap: no message to the engine. 503 when the engine is dead or the server is shutting down."""
    service.check_open()
    await exchange.reply_json({"status": "ok"})


async def health_generate(service: Service, exchange: Exchange) -> None:
    """One real token through scheduler, model and sampler."""
    token = service.client.info.eos_token_ids[0] if service.client.info.eos_token_ids else 0
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    exchange.cancel_on_disconnect()
    with Generation(service, f"health-{uuid.uuid4().hex}", [([token], params)], 0, None) as generation:
        async for _ in generation:
            pass
        await exchange.reply_json({"status": "ok", "tokens": generation.usage().completion_tokens})


async def load(service: Service, exchange: Exchange) -> None:
    """`server_load` as in vLLM: answers in the making; the rest is what a router wants to know."""
    stats = service.client.stats
    await exchange.reply_json(
        {
            "server_load": len(service.running),
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_cache_usage": stats.kv_blocks_used / max(1, stats.kv_blocks_total),
            "draining": service.draining,
        }
    )


async def metrics(service: Service, exchange: Exchange) -> None:
    await exchange.reply(service.metrics.render(), content_type=CONTENT_TYPE.encode())


async def version(service: Service, exchange: Exchange) -> None:
    await exchange.reply_json({"version": tilery.__version__})


# ---- administrative ----------------------------------------------------------------------------------------------


async def abort(service: Service, exchange: Exchange) -> None:
    """Body: {"request_id": ID or [IDs]}, the `id` of answers in the making."""
    request = await exchange.decode(ABORT, service.config.max_body_bytes)
    ids = [request.request_id] if isinstance(request.request_id, str) else request.request_id
    found = service.abort(ids)
    if not found:
        raise ApiError(404, f"No running request has the id {', '.join(ids) or '(none given)'}.", "request_id")
    await exchange.reply_json({"aborted": found})


async def reset_prefix_cache(service: Service, exchange: Exchange) -> None:
    try:
        reply = await service.client.call("reset_prefix_cache")
    except EngineDeadError as error:
        raise unavailable(f"The engine is dead: {error}", service.config.retry_after_seconds) from None
    if not reply.ok:
        raise unavailable(reply.value, service.config.retry_after_seconds)
    await exchange.reply_json({"reset": True})
