"""Gating: its definition in plain torch (`reference`), the recency prior (`prior`), the choice of a backend (`dispatch`)."""
