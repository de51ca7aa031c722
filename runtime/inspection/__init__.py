"""Inspection: from a frame to a verdict within a latency budget."""
