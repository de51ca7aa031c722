"""Where results go: records, overlay pictures, the operator's terminal."""
