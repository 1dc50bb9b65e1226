"""Prompts and on-policy answers that come with jeagle."""

from jeagle.data.starter.prompts import StarterPrompt, starter_prompts

__all__ = ["StarterPrompt", "starter_prompts"]
