"""Masks, prompts and image views; numpy and scipy only."""
