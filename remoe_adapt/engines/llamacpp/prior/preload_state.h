/* What becomes of sequences: the program's calls that remove, copy, move, save and load them are its own, and the prior's
   state follows. */
#pragma once
#include "preload_rows.h"

static void after_rm(context *c, int seq, int32_t p0, int32_t p1) {
    for (int s = 0; s < SEQS; s++) {
        if (seq >= 0 && s != seq) continue;
        sequence *q = &c->seqs[s];
        if (p1 >= 0 && q->next > p1) continue;  /* what comes last stays, and with it what was chosen last */
        if (p0 <= 0) forget(c, s);
        else { q->is_begun = true; while (q->n_segments && q->segments[q->n_segments - 1].from >= p0) q->n_segments--; }
    }
}
static void after_cp(context *c, int from, int to, int32_t p1) {
    if (from < 0 || to < 0 || from >= SEQS || to >= SEQS || from == to) return;
    rp_copy(c->p, from, to);
    c->seqs[to] = c->seqs[from];
    c->seqs[to].is_begun = true;
    if (p1 >= 0 && p1 < c->seqs[from].next) rp_rewind(c->p, to, core_position(&c->seqs[to], p1));
}
static void after_add(context *c, int seq, int32_t p0, int32_t p1, int32_t by) {
    for (int i = 0; i < SEQS; i++) {
        if (seq >= 0 && i != seq) continue;
        sequence *s = &c->seqs[i];
        int32_t from = p0 < 0 ? 0 : p0;
        if (s->next <= from || !by) continue;
        /* Only the tail as a whole keeps the order of what was seen. */
        if ((p1 >= 0 && p1 < s->next) || s->n_segments == SEGMENTS || from + by < 0) { restart(c, i); continue; }
        int32_t offset = core_position(s, from) - from, kept = 0;
        for (int j = 0; j < s->n_segments; j++) {
            segment g = s->segments[j];
            if (g.from > from) { if (by < 0 || kept) { restart(c, i); kept = -1; break; } g.from += by; g.offset -= by; }
            if (g.from < from + by || g.from > from) s->segments[kept++] = g;
        }
        if (kept < 0) continue;
        s->n_segments = kept;
        s->segments[s->n_segments++] = (segment){from + by, offset - by};
        s->next += by;
    }
}
static void after_keep(context *c, int seq) { for (int s = 0; s < SEQS; s++) if (s != seq) forget(c, s); }
static void after_clear(context *c) { for (int s = 0; s < SEQS; s++) forget(c, s); }
static void after_div(context *c, int seq) { for (int s = 0; s < SEQS; s++) if (seq < 0 || s == seq) restart(c, s); }

/* Draft and target model may share a memory: all contexts with it are told. Older builds name the context instead. */
#define FOR_MEMORY(mem, body) LOCKED(for (context *c = contexts; c; c = c->after) if (c->memory == (mem) || c->ctx == (mem)) { body; })
#define MEMORY_RM(name) SHOWN bool name(void *mem, int32_t seq, int32_t p0, int32_t p1) { \
    REAL(bool, (void *, int32_t, int32_t, int32_t)); \
    bool done = f && f(mem, seq, p0, p1); \
    if (done) FOR_MEMORY(mem, after_rm(c, seq, p0, p1)); \
    return done; }
#define MEMORY_CP(name) SHOWN void name(void *mem, int32_t from, int32_t to, int32_t p0, int32_t p1) { \
    REAL(void, (void *, int32_t, int32_t, int32_t, int32_t)); \
    if (f) f(mem, from, to, p0, p1); \
    FOR_MEMORY(mem, after_cp(c, from, to, p1)); }
#define MEMORY_KEEP(name) SHOWN void name(void *mem, int32_t seq) { \
    REAL(void, (void *, int32_t)); \
    if (f) f(mem, seq); \
    FOR_MEMORY(mem, after_keep(c, seq)); }
#define MEMORY_ADD(name) SHOWN void name(void *mem, int32_t seq, int32_t p0, int32_t p1, int32_t by) { \
    REAL(void, (void *, int32_t, int32_t, int32_t, int32_t)); \
    if (f) f(mem, seq, p0, p1, by); \
    FOR_MEMORY(mem, after_add(c, seq, p0, p1, by)); }
#define MEMORY_DIV(name) SHOWN void name(void *mem, int32_t seq, int32_t p0, int32_t p1, int by) { \
    REAL(void, (void *, int32_t, int32_t, int32_t, int)); \
    if (f) f(mem, seq, p0, p1, by); \
    FOR_MEMORY(mem, after_div(c, seq)); }
MEMORY_RM(llama_memory_seq_rm) MEMORY_RM(llama_kv_self_seq_rm)
MEMORY_CP(llama_memory_seq_cp) MEMORY_CP(llama_kv_self_seq_cp)
MEMORY_KEEP(llama_memory_seq_keep) MEMORY_KEEP(llama_kv_self_seq_keep)
MEMORY_ADD(llama_memory_seq_add) MEMORY_ADD(llama_kv_self_seq_add)
MEMORY_DIV(llama_memory_seq_div) MEMORY_DIV(llama_kv_self_seq_div)
SHOWN void llama_memory_clear(void *mem, bool data) {
    REAL(void, (void *, bool));
    if (f) f(mem, data);
    FOR_MEMORY(mem, after_clear(c));
}
SHOWN void llama_kv_self_clear(void *mem) {
    REAL(void, (void *));
    if (f) f(mem);
    FOR_MEMORY(mem, after_clear(c));
}

/* Saved states are known again by their bytes, whoever carries them about. A partial one (flag 1: recurrent or sliding
   memory) lies beside a cache that keeps its positions, which say where its sequence goes on; one on a device (flag 2)
   has no bytes to be known by. */
enum { PARTIAL = 1, ON_DEVICE = 2 };
static __thread bool is_inner;

static void after_save(context *c, int seq, const void *data, size_t bytes) {
    if (seq < 0 || seq >= SEQS || !bytes) return;
    uint64_t hash = check_of(data, bytes);
    int slot = 0;
    for (int i = 0; i < SAVED; i++) {
        if (c->saved[i] == hash) { slot = i; break; }
        if (c->saved_at[i] < c->saved_at[slot]) slot = i;
    }
    c->saved[slot] = hash; c->saved_at[slot] = ++c->clock; c->saved_seq[slot] = c->seqs[seq];
    rp_copy(c->p, seq, SEQS + slot);
}
static void after_load(context *c, int seq, const void *data, size_t bytes) {
    if (seq < 0 || seq >= SEQS) return;
    forget(c, seq);
    if (!data) return;
    uint64_t hash = check_of(data, bytes);
    for (int i = 0; i < SAVED; i++) if (c->saved_at[i] && c->saved[i] == hash) {
        rp_copy(c->p, SEQS + i, seq);
        c->seqs[seq] = c->saved_seq[i];
        c->seqs[seq].is_begun = true;
        c->saved_at[i] = ++c->clock;
        return;
    }
}
#define FOR_CONTEXT(ctx, body) LOCKED(context *c = context_by(ctx, NULL); if (c) { body; })

static void saved(void *ctx, const void *data, size_t bytes, int32_t seq, uint32_t flags) {
    if (bytes && !flags) FOR_CONTEXT(ctx, after_save(c, seq, data, bytes));
}
static void loaded(void *ctx, const void *data, size_t bytes, int32_t seq, uint32_t flags) {
    if (bytes && !(flags & PARTIAL)) FOR_CONTEXT(ctx, after_load(c, seq, flags & ON_DEVICE ? NULL : data, bytes));
}
SHOWN size_t llama_state_seq_get_data(void *ctx, uint8_t *out, size_t size, int32_t seq) {
    REAL(size_t, (void *, uint8_t *, size_t, int32_t));
    bool inner = is_inner;
    is_inner = true;
    size_t bytes = f ? f(ctx, out, size, seq) : 0;
    is_inner = inner;
    if (!inner) saved(ctx, out, bytes, seq, 0);
    return bytes;
}
SHOWN size_t llama_state_seq_get_data_ext(void *ctx, uint8_t *out, size_t size, int32_t seq, uint32_t flags) {
    REAL(size_t, (void *, uint8_t *, size_t, int32_t, uint32_t));
    size_t bytes = f ? f(ctx, out, size, seq, flags) : 0;
    if (!is_inner) saved(ctx, out, bytes, seq, flags);
    return bytes;
}
SHOWN size_t llama_state_seq_set_data(void *ctx, const uint8_t *in, size_t size, int32_t seq) {
    REAL(size_t, (void *, const uint8_t *, size_t, int32_t));
    bool inner = is_inner;
    is_inner = true;
    size_t bytes = f ? f(ctx, in, size, seq) : 0;
    is_inner = inner;
    if (!inner) loaded(ctx, in, bytes ? size : 0, seq, 0);
    return bytes;
}
SHOWN size_t llama_state_seq_set_data_ext(void *ctx, const uint8_t *in, size_t size, int32_t seq, uint32_t flags) {
    REAL(size_t, (void *, const uint8_t *, size_t, int32_t, uint32_t));
    size_t bytes = f ? f(ctx, in, size, seq, flags) : 0;
    if (!is_inner) loaded(ctx, in, bytes ? size : 0, seq, flags);
    return bytes;
}
/* A file may be of another run: what it holds begins anew, and is counted when it goes on. */
SHOWN size_t llama_state_seq_load_file(void *ctx, const char *path, int32_t seq, int32_t *tokens, size_t room, size_t *count) {
    REAL(size_t, (void *, const char *, int32_t, int32_t *, size_t, size_t *));
    size_t bytes = f ? f(ctx, path, seq, tokens, room, count) : 0;
    if (bytes && tokens) loaded(ctx, NULL, bytes, seq, ON_DEVICE);
    return bytes;
}
SHOWN size_t llama_state_set_data(void *ctx, const uint8_t *in, size_t size) {
    REAL(size_t, (void *, const uint8_t *, size_t));
    size_t bytes = f ? f(ctx, in, size) : 0;
    FOR_CONTEXT(ctx, after_clear(c));
    return bytes;
}
SHOWN bool llama_state_load_file(void *ctx, const char *path, int32_t *tokens, size_t room, size_t *count) {
    REAL(bool, (void *, const char *, int32_t *, size_t, size_t *));
    bool done = f && f(ctx, path, tokens, room, count);
    FOR_CONTEXT(ctx, after_clear(c));
    return done;
}
