"""Gating: its definition in plain torch (`reference`), the recency prior (`prior`), the backend (`dispatch`)."""
