"""Answers to prompts: files of prompts and answers, servers that answer, and prompts that a target writes itself."""
