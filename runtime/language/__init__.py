"""Embeddings to words: the language model, its prompt and its answers, on llama.cpp."""
