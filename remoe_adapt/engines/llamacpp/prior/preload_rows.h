/* What is known of the program's contexts, and whose the rows of the batch under way are, in the order in which llama.cpp
   computes them. All of it is read and written under `lock`, but for what the callback of the one batch under way has. */
#pragma once
#include "preload_control.h"
#include <dlfcn.h>

/* ---- The program's own functions ------------------------------------------------------------------------------ */

static void *real(const char *name, void *caller) {
    void *f = dlsym(RTLD_NEXT, name);
    if (f) return f;
    Dl_info i;  /* a module that was opened for itself alone, as Python does: its own definition */
    if (!dladdr(caller, &i)) return NULL;
    void *h = dlopen(i.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!h) return NULL;
    f = dlsym(h, name);
    dlclose(h);  /* it stays open: the caller is in it */
    return f;
}
static void *find(const char *name, void *caller) { return real(name, caller); }
#define REAL(type, args) static type(*f) args; if (!f) f = (type(*) args)real(__func__, __builtin_return_address(0))

/* ---- Contexts ------------------------------------------------------------------------------------------------- */

typedef bool (*eval_callback)(tensor *, bool, void *);
/* From `from` on, positions of a sequence are `offset` more to the prior: a context shift moves them, not the state. */
typedef struct { int32_t from, offset; } segment;
typedef struct {
    int32_t next;      /* position that follows; -1: unknown */
    float gain;        /* of its last row */
    bool is_begun;     /* since its tail was removed no row came */
    int n_segments;
    segment segments[SEGMENTS];
} sequence;
typedef struct context {
    struct context *after;
    void *ctx, *memory;
    int number;
    rp *p;
    rp_control own, last;  /* what the core counts, and how far that is in the status */
    bool is_off;
    sequence seqs[SEQS];
    /* The batch under way, in the order in which it is computed. */
    int n, capacity, done, previous, split;
    uint32_t n_ubatch, n_seq_max;
    bool is_unified, is_single, is_lost, in_batch;
    int32_t *seq, *pos, *token, *core_pos, *order;
    int8_t *out;
    bool *used;
    tensor *pos_t, *token_t;
    bool (*is_host)(void *);
    /* hash of saved bytes -> sequence SEQS + i of the core */
    uint64_t saved[SAVED], saved_at[SAVED], clock;
    sequence saved_seq[SAVED];
} context;
/* A scheduler of ggml: whose, and the callback that the program itself wanted. */
typedef struct sched_record { struct sched_record *after; void *sched; context *c; eval_callback theirs; void *user; bool asked; } sched_record;
static context *contexts;
static sched_record *scheds;
static int n_contexts;
static __thread context *current;

static void restart(context *c, int s) {
    rp_restart(c->p, s);
    c->seqs[s].n_segments = 0;
    c->seqs[s].next = -1;
    log_event(RESTART, c->number, s, -1, 0, c->own.gain);
}
static void forget(context *c, int s) {
    rp_reset(c->p, s);
    c->seqs[s] = (sequence){.next = -1, .gain = -1, .is_begun = true};
}

static context *context_by(void *ctx, void *memory) {
    for (context *c = contexts; c; c = c->after) if ((ctx && c->ctx == ctx) || (memory && c->memory == memory)) return c;
    return NULL;
}

static context *context_make(void *ctx, void *caller) {
    context *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    rp_defaults(&c->own);
    c->p = rp_new(STATES, &c->own);
    if (!c->p) { free(c); return NULL; }
    c->ctx = ctx;
    c->number = n_contexts++;
    c->split = -1;
    void *(*memory)(void *) = (void *(*)(void *))real("llama_get_memory", caller);
    uint32_t (*n_ubatch)(void *) = (uint32_t(*)(void *))real("llama_n_ubatch", caller), (*n_seq)(void *) = (uint32_t(*)(void *))real("llama_n_seq_max", caller);
    uint32_t (*n_ctx)(void *) = (uint32_t(*)(void *))real("llama_n_ctx", caller), (*n_ctx_seq)(void *) = (uint32_t(*)(void *))real("llama_n_ctx_seq", caller);
    c->memory = memory ? memory(ctx) : NULL;
    c->n_ubatch = n_ubatch ? n_ubatch(ctx) : 512;
    c->n_seq_max = n_seq ? n_seq(ctx) : 1;
    /* Without one cache for all, each sequence has a share of the positions. */
    c->is_unified = c->n_seq_max <= 1 || !n_ctx || !n_ctx_seq || n_ctx(ctx) == n_ctx_seq(ctx);
    c->is_host = (bool (*)(void *))real("ggml_backend_buffer_is_host", caller);
    rp_backend(c->p, real("ggml_op_desc", caller), real("ggml_backend_buffer_is_host", caller), real("ggml_backend_tensor_get", caller), real("ggml_backend_tensor_set", caller));
    rp_renorm(c->p, getenv("REMOE_PRIOR_RENORM") != NULL);
    if (rp_probe(c->p, find, caller) != RP_ON) c->is_off = true;
    for (int s = 0; s < SEQS; s++) c->seqs[s] = (sequence){.next = -1, .gain = -1, .is_begun = true};
    c->after = contexts;
    contexts = c;
    now_status.contexts++;
    return c;
}

static void context_free(void *ctx) {
    for (context **at = &contexts; *at; at = &(*at)->after) {
        context *c = *at;
        if (c->ctx != ctx) continue;
        *at = c->after;
        for (sched_record *r = scheds; r; r = r->after) if (r->c == c) r->c = NULL;
        rp_free(c->p);
        free(c->seq); free(c->pos); free(c->token); free(c->core_pos); free(c->order); free(c->out); free(c->used);
        free(c);
        return;
    }
}

/* ---- The rows of a batch --------------------------------------------------------------------------------------- */

static bool make_room(context *c, int n) {
    if (n <= c->capacity) return true;
    int more = n + n / 2;
    void *seq = realloc(c->seq, sizeof(int32_t) * more); if (seq) c->seq = seq;
    void *pos = realloc(c->pos, sizeof(int32_t) * more); if (pos) c->pos = pos;
    void *token = realloc(c->token, sizeof(int32_t) * more); if (token) c->token = token;
    void *core = realloc(c->core_pos, sizeof(int32_t) * more); if (core) c->core_pos = core;
    void *order = realloc(c->order, sizeof(int32_t) * more); if (order) c->order = order;
    void *out = realloc(c->out, more); if (out) c->out = out;
    void *used = realloc(c->used, more); if (used) c->used = used;
    if (!seq || !pos || !token || !core || !order || !out || !used) return false;
    c->capacity = more;
    return true;
}

/* How llama.cpp cuts a batch (llama-batch.cpp): in order; sequences side by side, equally many tokens of each, those
   with rising numbers only or any; one sequence after the other. */
enum { SIMPLE, EQUAL_RISING, EQUAL, BY_SEQUENCE, SPLITS };

static void split_rows(context *c, int kind) {
    int n = c->n, at = 0;
    if (kind == SIMPLE || n == 0) { for (int i = 0; i < n; i++) c->order[i] = i; return; }
    memset(c->used, 0, (size_t)n * sizeof *c->used);
    while (at < n) {
        int taken[SEQS], n_taken = 0, last = -1;
        bool in[SEQS] = {false};
        for (int i = 0; i < n && n_taken < SEQS; i++) {
            int s = c->seq[i];
            if (c->used[i] || in[s]) continue;
            if (kind == EQUAL_RISING && n_taken && s != last + 1) continue;
            if (kind == BY_SEQUENCE && n_taken) break;
            in[s] = true; taken[n_taken++] = s; last = s;
            if ((uint32_t)n_taken > c->n_ubatch) break;
        }
        /* As many of each as the shortest has, and as fit. */
        int each = n;
        for (int t = 0; t < n_taken; t++) {
            int left = 0;
            for (int i = 0; i < n; i++) left += !c->used[i] && c->seq[i] == taken[t];
            if (left < each) each = left;
        }
        int fit = (int)(c->n_ubatch / (uint32_t)n_taken);
        if (fit < 1) fit = 1;
        if (each > fit) each = fit;
        for (int t = 0; t < n_taken; t++)
            for (int i = 0, k = 0; i < n && k < each; i++)
                if (!c->used[i] && c->seq[i] == taken[t]) { c->used[i] = true; c->order[at++] = i; k++; }
    }
}

static int32_t core_position(const sequence *s, int32_t pos) {
    int32_t offset = 0;
    for (int i = 0; i < s->n_segments; i++) if (pos >= s->segments[i].from) offset = s->segments[i].offset;
    return pos + offset;
}

static void rows_begin(context *c) {
    c->done = 0; c->previous = RP_LAYERS; c->pos_t = c->token_t = NULL; c->is_lost = false; c->is_single = true;
    read_command();
    c->own.gain = in_force.gain; c->own.decay = in_force.decay; c->own.mode = in_force.mode; c->own.pages = in_force.pages;
    c->own.look_every = in_force.look_every; c->own.n_layer_gain = in_force.n_layer_gain;
    c->own.budget_bytes = in_force.budget_bytes; c->own.budget_share = in_force.budget_share;
    c->own.share = in_force.share;
    memcpy(c->own.layer_gain, in_force.layer_gain, sizeof c->own.layer_gain);
    for (int i = 0; i < c->n; i++) {
        /* llama.cpp refuses sequences beyond 256; should it not, theirs are rows of nobody. */
        if (c->seq[i] < 0 || c->seq[i] >= SEQS) { c->seq[i] = 0; c->is_lost = true; }
        c->is_single = c->is_single && c->seq[i] == c->seq[0];
    }
    if (c->is_lost) c->own.gain = 0;
    if (c->split < 0) c->split = c->is_unified ? SIMPLE : EQUAL_RISING;
    split_rows(c, c->is_single ? SIMPLE : c->split);
    int32_t *seq = c->seq, *pos = c->core_pos;
    /* Events are of the batch's own order, in which the positions of a sequence rise. */
    for (int i = 0; i < c->n; i++) {
        sequence *s = &c->seqs[seq[i]];
        /* After a shift to the front a position 0 could mean two tokens; a text that begins anew has its tail removed. */
        if (c->pos[i] == 0 && s->n_segments && s->is_begun) s->n_segments = 0;
        bool begins = s->is_begun || s->next != c->pos[i];
        if (begins || s->gain != c->own.gain) log_event(begins ? BEGIN : GAIN, c->number, seq[i], c->pos[i], c->n, c->own.gain);
        s->is_begun = false; s->gain = c->own.gain; s->next = c->pos[i] + 1;
    }
    static __thread int32_t *sorted; static __thread int room;
    if (room < 2 * c->n) { int32_t *more = realloc(sorted, sizeof(int32_t) * 2 * c->n); if (!more) { c->is_lost = true; return; } sorted = more; room = 2 * c->n; }
    static __thread int8_t *flags; static __thread int flag_room;
    if (flag_room < c->n) { int8_t *more = realloc(flags, (size_t)c->n); if (!more) { c->is_lost = true; return; } flags = more; flag_room = c->n; }
    for (int i = 0; i < c->n; i++) {
        int r = c->order[i];
        sorted[i] = seq[r]; sorted[c->n + i] = pos[i] = core_position(&c->seqs[seq[r]], c->pos[r]); flags[i] = c->out[r];
    }
    rp_rows(c->p, c->n, sorted, sorted + c->n, flags);
}

static void rows_end(context *c, int status) {
    bool seen[SEQS] = {false};
    if (c->is_lost || status != 0)
        for (int i = 0; i < c->n; i++) if (!seen[c->seq[i]]) { seen[c->seq[i]] = true; if (c->is_lost) restart(c, c->seq[i]); else c->seqs[c->seq[i]].next = -1; }
#define ADD(name) now_status.name += c->own.name - c->last.name; c->last.name = c->own.name
    ADD(tokens); ADD(calls); ADD(changed_rows); ADD(kept); ADD(chosen); ADD(swapped); ADD(ns); ADD(mincore_ns);
    ADD(restarts); ADD(rewinds); ADD(refused_rows); ADD(lost_rows); ADD(unproven_rows);
    ADD(ahead_hits); ADD(ahead_misses); ADD(ahead_stale); ADD(ahead_spilled); ADD(ahead_dropped); ADD(ahead_bytes);
    ADD(ahead_failed); ADD(ahead_ns);
#undef ADD
    now_status.batches++;
    now_status.serial = in_force.serial; now_status.gain = in_force.gain; now_status.mode = in_force.mode;
    /* What is held is known without the kernel. */
    now_status.is_blind = c->own.is_blind && c->own.ahead_state != RP_AHEAD_ON;
    now_status.ahead_state = c->own.ahead_state; now_status.held_bytes = c->own.held_bytes; now_status.n_layers = c->own.n_layers;
    uint32_t state = c->own.status;
    if (c->is_off || (state != RP_ON && state != RP_WAITING)) {
        c->is_off = true;
        /* A draft model without experts beside one that has some is no reason to call it off. */
        if (now_status.state != RP_ON) stay_off(rp_why(state));
    } else if (now_status.state != OFF || state == RP_ON) {
        now_status.state = state; now_status.reason[0] = 0;
    }
    write_status();
}
