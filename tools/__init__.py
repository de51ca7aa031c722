"""The repository's own tools, run from its root with ``python3 -m tools.<name>``; never installed."""
