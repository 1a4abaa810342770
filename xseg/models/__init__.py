"""The model: encoders, projectors, language model, mask decoder."""
