"""The command line ``agpt``: one module for each command."""
