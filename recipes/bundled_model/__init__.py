"""Recipe of the bundled model `tilery-books-26m`: tokenizer, data, training, FP8 export, evaluation, model card.

Plain PyTorch; nothing here is imported by the engine. Run the modules from the repository root, for example
`python -m recipes.bundled_model.tokenizer --help`. The order of the commands is in README.md.
"""
