"""The engine: requests, scheduler, KV cache, step runner, sampling, speculative decoding.

`EngineCore` (core.py) is the synchronous heart: add, abort, step. `LLM` (llm.py) drives it in this process;
`process.py` drives it behind two ZeroMQ sockets and `client.py` is the other end, used by the server. May be
imported from here: anything public in its modules. The modules messages, tokenizer, output and client import no
torch. Imports downwards only: models, ops, observe.
"""
