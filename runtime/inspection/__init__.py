"""The frame's path: from a frame to a verdict, inside a latency budget."""
