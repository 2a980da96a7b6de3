"""The OpenAI skin: models, chat completions, completions, embeddings; one file per family."""
