"""Recipes: what a product is called, how it is looked at, what decides."""
