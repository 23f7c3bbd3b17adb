"""Prompts made shorter: passages are scored for a question, and the best ones stay, whole and in order."""
