"""Writes `golden_trace.npz` beside this file: synthetic, but structured as real traces are.

Each document has a topic that prefers some experts, scores drift from token to token, and slots are in falling order of
score. Three documents, 3 layers, 240 tokens, top-4 of 16 experts. Run it again only to change the golden numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from remoe_adapt.traces.trace import Trace

LAYERS, TOKENS, TOP_K, EXPERTS = 3, 240, 4, 16
STARTS = (0, 100, 170)


def make_trace() -> Trace:
    random = np.random.Generator(np.random.PCG64(20250602)).random
    # Only `random()` is drawn: sums of uniforms stand for normals, so no library routine for those can change it.
    experts_LTK = np.empty((LAYERS, TOKENS, TOP_K), dtype=np.int16)
    for layer in range(LAYERS):
        drift_E = np.zeros(EXPERTS)
        topic_E = np.zeros(EXPERTS)
        for token in range(TOKENS):
            if token in STARTS:
                topic_E = 1.6 * (random((EXPERTS, 4)).sum(axis=1) - 2)
            drift_E = 0.6 * drift_E + random((EXPERTS, 4)).sum(axis=1) - 2
            experts_LTK[layer, token] = np.argsort(-(topic_E + drift_E), kind="stable")[:TOP_K]
    meta = {"num_experts": EXPERTS, "model": "synthetic", "text": "three topics", "document_starts": list(STARTS)}
    return Trace(experts_LTK, meta)


if __name__ == "__main__":
    make_trace().save(Path(__file__).with_name("golden_trace.npz"))
