"""Processor, predictor, session and evaluation."""
