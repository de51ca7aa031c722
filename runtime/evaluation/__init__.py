"""Evaluation: accuracy on labelled image sets, and traces of every intermediate result."""
