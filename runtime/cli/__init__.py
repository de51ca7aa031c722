"""The command ``agpt``, one file a command."""
