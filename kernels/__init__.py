"""Tensor functions: each op is one file with its plain definition, faster equals beside it."""
