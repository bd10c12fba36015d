"""Harmonic networks as timm models, and their weights. Importing the modules registers the models."""
