"""What every room uses: errors, files, environment, printable text. Imports nothing of this package."""
