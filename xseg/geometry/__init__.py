"""Masks, prompts and image views; numpy only."""
