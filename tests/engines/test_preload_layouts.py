"""Builds of llama.cpp whose batches lie otherwise in memory: the library stays off, and passes their batches on whole.

The builds are made here: a libllama with the calls that the library takes, and a program that decodes one batch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from remoe_adapt.engines.llamacpp.prior.control import ENVIRONMENT, PriorControl
from remoe_adapt.engines.llamacpp.serve import preload_library

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# What is known; fields behind it, as before 2025; another order; a field in front.
LAYOUTS = {
    "known": "int n_tokens; int *token; float *embd; int *pos, *n_seq_id, **seq_id; signed char *logits;",
    "more": "int n_tokens; int *token; float *embd; int *pos, *n_seq_id, **seq_id; signed char *logits; "
    "int all_pos_0, all_pos_1, all_seq_id;",
    "reordered": "int n_tokens; int *token; float *embd; int **seq_id, *n_seq_id, *pos; signed char *logits;",
    "in front": "long kind; int n_tokens; int *token; float *embd; int *pos, *n_seq_id, **seq_id; signed char *logits;",
}
HEADER = """
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
typedef struct {{ {fields} }} llama_batch;
llama_batch llama_batch_init(int n, int embd, int n_seq);
llama_batch llama_batch_get_one(int *ids, int n);
void llama_batch_free(llama_batch b);
int llama_decode(void *ctx, llama_batch b);
"""
LIBRARY = """
llama_batch llama_batch_get_one(int *ids, int n) {
    llama_batch b; memset(&b, 0, sizeof b); b.n_tokens = n; b.token = ids; return b;
}
llama_batch llama_batch_init(int n, int embd, int n_seq) {
    llama_batch b; memset(&b, 0, sizeof b);
    if (embd) b.embd = calloc(n * embd, 4); else b.token = calloc(n, 4);
    b.pos = calloc(n, 4); b.n_seq_id = calloc(n, 4); b.logits = calloc(n, 1);
    b.seq_id = calloc(n + 1, sizeof *b.seq_id);
    for (int i = 0; i < n; i++) b.seq_id[i] = calloc(n_seq, 4);
    return b;
}
void llama_batch_free(llama_batch b) {
    for (int i = 0; b.seq_id && b.seq_id[i]; i++) free(b.seq_id[i]);
    free(b.token); free(b.embd); free(b.pos); free(b.n_seq_id); free(b.seq_id); free(b.logits);
}
int llama_decode(void *ctx, llama_batch b) {
    const unsigned char *byte = (const unsigned char *)&b;
    unsigned long sum = 0;
    for (size_t i = 0; i < sizeof b; i++) sum = 31 * sum + byte[i];
    return (int)(sum & 0xffffff) + (ctx != (void *)8);
}
"""
MAIN = """
int main(void) {
    llama_batch b = llama_batch_init(4, 0, 1);
    b.n_tokens = 4;
    for (int i = 0; i < 4; i++) { b.token[i] = i; b.pos[i] = i; b.n_seq_id[i] = 1; }
    unsigned char *byte = (unsigned char *)&b;
    /* Whatever lies behind the fields that we know is filled too. */
    size_t known = offsetof(llama_batch, logits) + sizeof b.logits;
    for (size_t i = known; i < sizeof b; i++) byte[i] = 100 + i;
    unsigned long sum = 0;
    for (size_t i = 0; i < sizeof b; i++) sum = 31 * sum + byte[i];
    int got = llama_decode((void *)8, b);
    printf("%s\\n", got == (int)(sum & 0xffffff) ? "whole" : "torn");
    llama_batch_free(b);
    return 0;
}
"""


def built(folder: Path, fields: str) -> Path:
    """The program, beside its libllama."""
    header = "#include <stddef.h>\n" + HEADER.format(fields=fields)
    (folder / "llama.c").write_text(header + LIBRARY)
    (folder / "main.c").write_text(header + MAIN)
    here = (f"-L{folder}", "-Wl,-rpath,$ORIGIN", "-lllama")
    cc = ("cc", "-O1", "-o")
    subprocess.run([*cc, str(folder / "libllama.so"), "-shared", "-fPIC", str(folder / "llama.c")], check=True)
    subprocess.run([*cc, str(folder / "server"), str(folder / "main.c"), *here], check=True)
    return folder / "server"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_goes_on_whole_and_is_read_where_its_fields_are_known_alone(layout: str, tmp_path: Path) -> None:
    program = built(tmp_path, LAYOUTS[layout])
    with PriorControl.create(tmp_path / "control") as control:
        environment = {"LD_PRELOAD": str(preload_library()), ENVIRONMENT: str(control.path)}
        done = subprocess.run([str(program)], env=os.environ | environment, capture_output=True, text=True, check=True)
        status = control.status()
    assert done.stdout == "whole\n" and status.state == "off"
    if layout in ("known", "more"):
        assert "llama_batch" not in status.reason  # off for want of ggml: this one was read
        assert status.counters["batches"] == 1
    else:
        assert "llama_batch lies otherwise in memory" in status.reason and status.reason in done.stderr
        assert status.counters["batches"] == 0
