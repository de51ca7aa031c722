"""Bundles: the one signed folder that export makes and the runtime opens."""
