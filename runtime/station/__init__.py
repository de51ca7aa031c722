"""The inspection line: takes frames from a camera, inspects them and delivers the results."""
