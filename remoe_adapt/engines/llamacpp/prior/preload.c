/* LD_PRELOAD: the recency prior (prior.c) in an unmodified program that runs llama.cpp from shared libraries.

   REMOE_PRIOR_CONTROL names the control file (preload_control.h). Without it, or with one that is not ours, nothing is
   ever touched.

   What is known of the program comes from the calls that it makes to libllama: whose row is whose (llama_decode;
   llama_batch_ext_*, llama_process), and what becomes of sequences (llama_memory_*, llama_state_*). A token is computed
   at one gain: the command is looked at once a batch. */
#define _GNU_SOURCE
#include "prior.c"
#include "preload_rows.h"

#define SHOWN __attribute__((visibility("default")))

/* ---- The callback ---------------------------------------------------------------------------------------------- */

/* Whether the rows that are computed are those that were expected; `rows` of them. */
static bool as_expected(context *c, int rows) {
    tensor *both[2] = {c->pos_t, c->token_t};
    if (c->done + rows > c->n) return false;
    for (int b = 0; b < 2; b++) {
        tensor *t = both[b];
        if (!t || !t->data || t->type != 26 || t->ne[0] < rows || (t->buffer && c->is_host && !c->is_host(t->buffer))) continue;
        const int32_t *value = t->data, *want = b ? c->token : c->pos;
        for (int i = 0; i < rows; i++) { int32_t w = want[c->order[c->done + i]]; if (w != value[i] && w >= 0) return false; }
    }
    return true;
}

static void note_inputs(context *c, tensor *t) {
    tensor *s = t->src[1];
    if (!s || s->type != 26 || s->op != 0) return;
    if (!c->pos_t && strstr(s->name, "inp_pos") && !strstr(s->name, "bucket")) c->pos_t = s;
    else if (!c->token_t && strstr(s->name, "inp_tokens")) c->token_t = s;
}

static void graph_begins(context *c, tensor *t) {
    int rows = (int)(c->token_t ? c->token_t->ne[0] : t->ne[1]);
    /* Where the first layer with experts sees rows with outputs alone, the core cannot tell whose they are. */
    if (rows != (int)t->ne[1] || !as_expected(c, rows)) {
        /* Another way to cut batches than was thought: these rows go without prior, the next batch is cut otherwise. */
        c->is_lost = true;
        c->own.gain = 0;
        if (!c->is_single) c->split = (c->split + 1) % SPLITS;
    }
    c->done += rows;
    c->pos_t = c->token_t = NULL;
}

static bool chained(tensor *t, bool ask, void *user) {
    sched_record *r = user;
    context *c = current && r->c == current && !current->is_off ? current : NULL;
    if (ask) {
        bool ours = false;
        if (c) {
            if (!c->pos_t || !c->token_t) note_inputs(c, t);
            if (!strncmp(t->name, "ffn_moe_topk-", 13)) {
                int layer = atoi(t->name + 13);
                if (layer <= c->previous) graph_begins(c, t);
                c->previous = layer;
            }
            ours = rp_cb(t, true, c->p);
        }
        r->asked = r->theirs && r->theirs(t, true, r->user);
        return ours || r->asked;
    }
    bool go = c ? rp_cb(t, false, c->p) : true;
    if (r->asked) { r->asked = false; go = r->theirs(t, false, r->user) && go; }
    return go;
}

SHOWN void ggml_backend_sched_set_eval_callback(void *sched, eval_callback cb, void *user) {
    REAL(void, (void *, eval_callback, void *));
    if (!f) return;
    pthread_mutex_lock(&lock);
    sched_record *r = NULL;
    for (r = scheds; r && r->sched != sched; r = r->after);
    context *c = current && !current->is_off ? current : NULL;
    if (c && !r && (r = calloc(1, sizeof *r))) { r->sched = sched; r->after = scheds; scheds = r; }
    if (r) { r->c = c; r->theirs = cb; r->user = user; r->asked = false; }
    pthread_mutex_unlock(&lock);
    if (r && c) f(sched, chained, r); else f(sched, cb, user);
}

SHOWN void ggml_backend_sched_free(void *sched) {
    REAL(void, (void *));
    if (f) f(sched);
    pthread_mutex_lock(&lock);
    for (sched_record **at = &scheds; *at; at = &(*at)->after)
        if ((*at)->sched == sched) { sched_record *r = *at; *at = r->after; free(r); break; }
    pthread_mutex_unlock(&lock);
}

SHOWN void llama_free(void *ctx) {
    REAL(void, (void *));
    if (f) f(ctx);
    pthread_mutex_lock(&lock);
    context_free(ctx);
    pthread_mutex_unlock(&lock);
}

/* ---- Batches ---------------------------------------------------------------------------------------------------- */

/* llama_batch, and what is not ours behind it: it goes by value, so a build with more fields would miss those that are not
   passed on. As the calling conventions have it, they lie behind the others on the caller's stack. */
typedef struct {
    int32_t n_tokens; int32_t *token; float *embd; int32_t *pos, *n_seq_id; int32_t **seq_id; int8_t *logits;
    char unknown[64];
} batch_t;

/* Whether a batch has its fields where batch_t has them, asked of the program's own llama.cpp: what it fills must be
   found there. Without the two functions nothing is known, and that is a no. */
static bool batch_fits(void *caller) {
    batch_t (*init)(int32_t, int32_t, int32_t) = (batch_t(*)(int32_t, int32_t, int32_t))real("llama_batch_init", caller);
    batch_t (*one)(int32_t *, int32_t) = (batch_t(*)(int32_t *, int32_t))real("llama_batch_get_one", caller);
    void (*end)(batch_t) = (void (*)(batch_t))real("llama_batch_free", caller);
    if (!init || !one || !end) return false;
    int32_t ids[3] = {7, 8, 9};
    batch_t b = one(ids, 3);
    if (b.n_tokens != 3 || b.token != ids || b.embd || b.pos || b.n_seq_id || b.seq_id || b.logits) return false;
    for (int embd = 0; embd < 5; embd += 4) {
        b = init(3, embd, 2);
        bool same = b.n_tokens == 0 && (b.token == NULL) == (embd != 0) && (b.embd == NULL) == (embd == 0) && b.pos &&
            b.n_seq_id && b.seq_id && b.logits && (void *)b.pos != (void *)b.n_seq_id;
        /* The list of lists ends with NULL, which no other field has at that place. */
        same = same && b.seq_id[0] && b.seq_id[1] && b.seq_id[2] && !b.seq_id[3];
        end(b);
        if (!same) return false;
    }
    return true;
}

/* The context of a call, ready for its batch of n rows; NULL: without the prior. Returns with the lock held.
   is_struct: the rows come in a batch_t, whose fields mean nothing before they were found to be where they are. */
static context *enter(void *ctx, int n, void *caller, bool is_struct) {
    static int fits = -1;
    pthread_mutex_lock(&lock);
    if (is_struct && fits != 1) {
        if (fits < 0 && !(fits = batch_fits(caller)) && control_open())
            stay_off("llama_batch lies otherwise in memory: this build of llama.cpp is not one that was met");
        if (!fits) return NULL;
    }
    if (n < 1 || !control_open()) return NULL;
    context *c = context_by(ctx, NULL);
    if (!c) c = context_make(ctx, caller);
    if (!c || c->in_batch || !make_room(c, n)) return NULL;
    c->n = n;
    return c;
}
/* The program's own call is made between these, without the lock. */
static context *go_in(context *c, context **before) {
    *before = current;
    if (c) { rows_begin(c); c->in_batch = true; }
    current = c;
    pthread_mutex_unlock(&lock);
    return c;
}
static void come_out(context *c, context *before, int status) {
    current = before;
    if (!c) return;
    pthread_mutex_lock(&lock);
    c->in_batch = false;
    rows_end(c, status);
    pthread_mutex_unlock(&lock);
}

SHOWN int32_t llama_decode(void *ctx, batch_t batch) {
    REAL(int32_t, (void *, batch_t));
    if (!f) return -1;
    void *caller = __builtin_return_address(0);
    context *before, *c = enter(ctx, batch.n_tokens, caller, true);
    if (c) {
        int32_t (*last)(void *, int32_t) = (int32_t(*)(void *, int32_t))real("llama_memory_seq_pos_max", caller);
        int32_t next[SEQS];
        memset(next, 0xff, sizeof next);
        for (int i = 0; i < c->n; i++) {
            int s = batch.seq_id && batch.seq_id[i] ? batch.seq_id[i][0] : 0;
            c->seq[i] = s;
            c->token[i] = batch.token ? batch.token[i] : -1;
            /* Without flags the last row alone has an output. */
            c->out[i] = batch.logits ? batch.logits[i] != 0 : i == c->n - 1;
            if (batch.pos) c->pos[i] = batch.pos[i];
            else if (s < 0 || s >= SEQS) c->pos[i] = -1;
            else {
                if (next[s] < 0) next[s] = last && c->memory ? last(c->memory, s) + 1 : 0;
                c->pos[i] = next[s]++;
            }
            for (int j = 1; batch.seq_id && batch.n_seq_id && j < batch.n_seq_id[i]; j++) {
                int other = batch.seq_id[i][j];
                /* A token of several sequences is computed once, with the state of the first of them. */
                if (other >= 0 && other < SEQS && other != s && c->seqs[other].next >= 0) restart(c, other);
            }
        }
    }
    go_in(c, &before);
    int32_t status = f(ctx, batch);
    come_out(c, before, status);
    return status;
}

/* llama.cpp of late 2026 has a second, opaque kind of batch; what is in it is known from the calls that fill it. */
typedef struct shadow { struct shadow *after; void *batch; int n, room; int32_t *seq, *pos, *token, *other; int8_t *out; } shadow;
static shadow *shadows;

static shadow *shadow_of(void *batch) {
    shadow *s = shadows;
    for (; s && s->batch != batch; s = s->after);
    return s;
}
static void shadow_free(void *batch) {
    for (shadow **at = &shadows; *at; at = &(*at)->after) {
        shadow *s = *at;
        if (s->batch != batch) continue;
        *at = s->after;
        free(s->seq); free(s->pos); free(s->token); free(s->other); free(s->out); free(s);
        return;
    }
}
static void shadow_add(void *batch, int row, int32_t seq, int32_t token) {
    shadow *s = shadow_of(batch);
    if (!s) {
        if (!(s = calloc(1, sizeof *s))) return;
        s->batch = batch; s->after = shadows; shadows = s;
    }
    if (row < 0) return;
    if (row >= s->room) {
        int room = row + row / 2 + 64;
        int32_t *a = realloc(s->seq, 4 * (size_t)room); if (a) s->seq = a;
        int32_t *b = realloc(s->pos, 4 * (size_t)room); if (b) s->pos = b;
        int32_t *c = realloc(s->token, 4 * (size_t)room); if (c) s->token = c;
        int32_t *d = realloc(s->other, 4 * (size_t)room); if (d) s->other = d;
        int8_t *e = realloc(s->out, (size_t)room); if (e) s->out = e;
        if (!a || !b || !c || !d || !e) { shadow_free(batch); return; }
        s->room = room;
    }
    s->seq[row] = seq; s->token[row] = token; s->pos[row] = -1; s->other[row] = -1; s->out[row] = 0;
    s->n = row + 1;
}
#define LOCKED(body) do { pthread_mutex_lock(&lock); body; pthread_mutex_unlock(&lock); } while (0)

SHOWN void *llama_batch_ext_init(void *ctx) {
    REAL(void *, (void *));
    void *b = f ? f(ctx) : NULL;
    LOCKED(shadow_free(b));
    return b;
}
SHOWN void llama_batch_ext_free(void *b) {
    REAL(void, (void *));
    if (f) f(b);
    LOCKED(shadow_free(b));
}
SHOWN void llama_batch_ext_clear(void *b) {
    REAL(void, (void *));
    if (f) f(b);
    LOCKED(shadow *s = shadow_of(b); if (s) s->n = 0);
}
SHOWN int32_t llama_batch_ext_add(void *b, int32_t seq) {
    REAL(int32_t, (void *, int32_t));
    int32_t row = f ? f(b, seq) : -1;
    LOCKED(shadow_add(b, row, seq, -1));
    return row;
}
SHOWN int32_t llama_batch_ext_add_token(void *b, int32_t seq, int32_t id) {
    REAL(int32_t, (void *, int32_t, int32_t));
    int32_t row = f ? f(b, seq, id) : -1;
    LOCKED(shadow_add(b, row, seq, id));
    return row;
}
typedef struct { const float *data; size_t n_rows, n_embd; } embd_t;
SHOWN int32_t llama_batch_ext_add_embd(void *b, int32_t seq, embd_t embd) {
    REAL(int32_t, (void *, int32_t, embd_t));
    int32_t row = f ? f(b, seq, embd) : -1;
    LOCKED(shadow_add(b, row, seq, -1));
    return row;
}
SHOWN bool llama_batch_ext_add_seq(void *b, int32_t i, int32_t seq) {
    REAL(bool, (void *, int32_t, int32_t));
    bool done = f && f(b, i, seq);
    LOCKED(shadow *s = shadow_of(b); if (done && s && i >= 0 && i < s->n && s->seq[i] != seq) s->other[i] = seq);
    return done;
}
SHOWN bool llama_batch_ext_set_pos(void *b, int32_t i, const int32_t *pos) {
    REAL(bool, (void *, int32_t, const int32_t *));
    bool done = f && f(b, i, pos);
    LOCKED(shadow *s = shadow_of(b); if (done && s && i >= 0 && i < s->n) s->pos[i] = pos[0]);
    return done;
}
static void set_output(void *b, int32_t i, bool value) {
    LOCKED(shadow *s = shadow_of(b); if (s && i >= 0 && i < s->n) s->out[i] = value);
}
SHOWN bool llama_batch_ext_set_output_logits(void *b, int32_t i, bool value) {
    REAL(bool, (void *, int32_t, bool));
    bool done = f && f(b, i, value);
    if (done) set_output(b, i, value);
    return done;
}
SHOWN bool llama_batch_ext_set_output_embd(void *b, int32_t i, bool value) {
    REAL(bool, (void *, int32_t, bool));
    bool done = f && f(b, i, value);
    if (done) set_output(b, i, value);
    return done;
}
SHOWN int32_t llama_process(void *ctx, int type, void *b) {
    REAL(int32_t, (void *, int, void *));
    if (!f) return -1;
    if (type != 1) {  /* an encoder has no sequences to remember */
        context *before = current;
        current = NULL;
        int32_t status = f(ctx, type, b);
        current = before;
        return status;
    }
    pthread_mutex_lock(&lock);
    shadow *s = shadow_of(b);
    int n = s ? s->n : 0;
    pthread_mutex_unlock(&lock);
    context *before, *c = enter(ctx, n, __builtin_return_address(0), false);
    if (c) {
        memcpy(c->seq, s->seq, 4 * (size_t)n); memcpy(c->pos, s->pos, 4 * (size_t)n);
        memcpy(c->token, s->token, 4 * (size_t)n); memcpy(c->out, s->out, (size_t)n);
        for (int i = 0; i < n; i++)
            if (s->other[i] >= 0 && s->other[i] < SEQS && c->seqs[s->other[i]].next >= 0) restart(c, s->other[i]);
    }
    go_in(c, &before);
    int32_t status = f(ctx, type, b);
    come_out(c, before, status);
    return status;
}

#include "preload_state.h"
