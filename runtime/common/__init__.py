"""Shared by all other folders: errors, files, environment, printable text. Imports no other folder of the package."""
