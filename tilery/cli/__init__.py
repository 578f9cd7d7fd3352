"""The command line: one file per command, `main.py` puts them together, `bench/` holds the load generator.

`tilery --help` must stay quick: at import these modules may use only the standard library, typer, and the settings
records of the engine. torch, starlette and the model come in when a command runs.
Imports downwards: server, proxy, engine, models, ops. Nothing imports from here.
"""
