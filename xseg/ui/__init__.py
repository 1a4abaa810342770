"""Command line, chat, drawing and reports."""
