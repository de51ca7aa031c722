"""The line: frames from a camera through the inspector to the outputs."""
