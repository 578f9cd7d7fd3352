"""The load generator behind `tilery bench serve`: asks any OpenAI-compatible server, reports like `vllm bench serve`.

dataset.py: what to ask and when; client.py: one request over a raw socket; metrics.py: the mathematics;
report.py: printed rows and JSON; endpoint.py: the server under test; serve.py: the command and its loop.
Imports nothing of the engine.
"""
