#define _GNU_SOURCE
#include "prior.h"
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

/* A span is cut here, as in triton_kernels/rule.py, so that span * gain * recency stays finite. */
#define MAX_SPAN 1e30f
#define MAX_GAIN 16.0f
/* What decayed to less than this is left out when a state is computed again from the ids of the past. */
#define FORGOTTEN 1e-12
enum { TYPE_F32 = 0, TYPE_I32 = 26, MAX_RANGES = 4, MAX_REPLAY = 512 };
static const char TOPK[] = "ffn_moe_topk-", WEIGHTS[] = "ffn_moe_weights-";

typedef struct { const char *data; size_t stride; int experts; } range;

/* The last RP_HISTORY positions of a sequence at a layer: at slot pos % size the position and its k ids. */
typedef struct { int size, k; int32_t *pos; uint16_t *ids; } history;

typedef struct {
    int E;
    float *rec;                 /* [n_seq, E] */
    int32_t *last;              /* [n_seq, RP_MAXK], -1 behind the k of then */
    history *past;              /* [n_seq] */
    float *resident;            /* [RP_MAXE] */
    bool knows_residents;       /* they differ from one another, or the prior would do nothing */
    range ranges[MAX_RANGES];
    int n_ranges;
    uint64_t looked_at;
    const tensor *pending;      /* this graph's choice, whose consumers are to be seen yet */
    bool weights_seen, product_seen, proven;
} layer_state;

struct rp {
    rp_control own, *c;
    int n_seq, n, begin, rows, previous_layer;
    int32_t *seq, *pos; int8_t *out; bool *restart;
    bool has_positions;
    int cap;
    int32_t *next;              /* [n_seq]: the position that is expected */
    layer_state layers[RP_LAYERS];
    uint64_t graphs;
    bool trusted, probed, is_off, truth_known;
    int unproven;               /* layers whose consumers are still looked for */
    int32_t *buf; size_t buf_cap, buf_n;
    int32_t *final; size_t final_cap;
    bool (*is_host)(void *);
    void (*get)(const tensor *, void *, size_t, size_t);
    void (*set)(tensor *, const void *, size_t, size_t);
    const char *(*op_name)(const tensor *);
    int (*look)(void *, int, int, float *); void *look_user;
    void (*on_chosen)(void *, int, int, int, const int32_t *); void *chosen_user;
    bool renorm;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void rp_defaults(rp_control *c) {
    memset(c, 0, sizeof *c);
    c->magic = RP_MAGIC; c->size = sizeof *c; c->version = RP_VERSION;
    c->decay = 0.7f; c->pages = 1; c->look_every = 1;
}

const char *rp_why(uint32_t status) {
    switch (status) {
    case RP_WAITING: return "no graph has been seen to its end yet";
    case RP_ON: return "on";
    case RP_NO_EXPERTS: return "the model chooses no experts";
    case RP_LAYOUT: return "this build of ggml lays tensors out in memory in a way that is not known here";
    case RP_NO_SCORES: return "the ids of the chosen experts are no ranking of float32 scores";
    case RP_TOO_MANY: return "more than 1024 experts, or more than 64 chosen of them";
    case RP_CONSUMER: return "weights or products take other ids than those of the ranking";
    case RP_NOT_SORTED: return "the engine's ids are not the best of the scores that can be read";
    case RP_SYMBOLS: return "functions of ggml that the prior needs are missing";
    }
    return "unknown";
}

rp *rp_new(int n_seq, rp_control *control) {
    if (n_seq < 1) return NULL;
    rp *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->next = calloc((size_t)n_seq, sizeof *p->next);
    if (!p->next) { free(p); return NULL; }
    p->n_seq = n_seq;
    p->c = control ? control : &p->own;
    p->previous_layer = RP_LAYERS;
    if (!control) rp_defaults(&p->own);
    return p;
}

static void forget_layer(rp *p, layer_state *s) {
    if (s->past) for (int b = 0; b < p->n_seq; b++) { free(s->past[b].pos); free(s->past[b].ids); }
    free(s->rec); free(s->last); free(s->past); free(s->resident);
    s->rec = s->resident = NULL; s->last = NULL; s->past = NULL; s->E = 0;
}

void rp_free(rp *p) {
    if (!p) return;
    for (int i = 0; i < RP_LAYERS; i++) forget_layer(p, &p->layers[i]);
    free(p->seq); free(p->pos); free(p->out); free(p->restart); free(p->next); free(p->final); free(p);
}

rp_control *rp_ctl(rp *p) { return p->c; }
void rp_backend(rp *p, void *op_desc, void *is_host, void *get, void *set) {
    p->op_name = op_desc; p->is_host = is_host; p->get = get; p->set = set;
}
void rp_trust(rp *p, bool on) { p->trusted = on; if (on) p->c->status = RP_ON; }
void rp_renorm(rp *p, bool on) { p->renorm = on; }
void rp_record(rp *p, int32_t *buf, size_t cap) { p->buf = buf; p->buf_cap = cap; p->buf_n = 0; }
size_t rp_recorded(rp *p) { return p->buf_n; }
void rp_on_look(rp *p, int (*look)(void *, int, int, float *), void *user) { p->look = look; p->look_user = user; }
void rp_on_chosen(rp *p, void (*chosen)(void *, int, int, int, const int32_t *), void *user) {
    p->on_chosen = chosen; p->chosen_user = user;
}

/* The reason that came first stays: what follows from it says less. */
static void off(rp *p, uint32_t why) {
    p->is_off = true;
    if (p->c->status == RP_WAITING || p->c->status == RP_ON) p->c->status = why;
}

/* ---- state of the sequences ---- */

static layer_state *state(rp *p, int layer, int E) {
    layer_state *s = &p->layers[layer];
    if (s->E == E) return s;
    forget_layer(p, s);
    size_t n = (size_t)p->n_seq;
    s->rec = calloc(n * (size_t)E, sizeof *s->rec);
    s->last = malloc(n * RP_MAXK * sizeof *s->last);
    s->past = calloc(n, sizeof *s->past);
    s->resident = calloc(RP_MAXE, sizeof *s->resident);
    if (!s->rec || !s->last || !s->past || !s->resident) { forget_layer(p, s); return NULL; }
    for (size_t i = 0; i < n * RP_MAXK; i++) s->last[i] = -1;
    s->E = E;
    s->looked_at = UINT64_MAX;
    return s;
}

static void begin_layer(layer_state *s, int b) {
    memset(s->rec + (size_t)b * s->E, 0, sizeof(float) * s->E);
    for (int j = 0; j < RP_MAXK; j++) s->last[b * RP_MAXK + j] = -1;
    history *h = &s->past[b];
    for (int i = 0; i < h->size; i++) h->pos[i] = -1;
}

static void begin_sequence(rp *p, int b, int pos) {
    for (int i = 0; i < RP_LAYERS; i++) if (p->layers[i].E) begin_layer(&p->layers[i], b);
    p->next[b] = pos;
}

void rp_reset(rp *p, int seq) {
    for (int b = 0; b < p->n_seq; b++) if (seq < 0 || seq == b) begin_sequence(p, b, 0);
}

void rp_restart(rp *p, int seq) {
    rp_reset(p, seq);
    /* Whatever position comes next, it is not followed a second time. */
    for (int b = 0; b < p->n_seq; b++) if (seq < 0 || seq == b) { p->next[b] = -1; p->c->restarts++; }
}

static void keep(history *h, int pos, int k, const int32_t *ids) {
    if (pos < 0) return;
    if (h->k < k || (pos >= h->size && h->size < RP_HISTORY)) {
        int size = h->size ? h->size : 64, width = h->k > k ? h->k : k;
        while (size <= pos && size < RP_HISTORY) size *= 2;
        int32_t *where = malloc(sizeof *where * size);
        uint16_t *what = malloc(sizeof *what * size * width);
        if (!where || !what) { free(where); free(what); return; }
        for (int i = 0; i < size; i++) where[i] = -1;
        for (int i = 0; i < h->size; i++) if (h->pos[i] >= 0) {
            int to = h->pos[i] % size;
            where[to] = h->pos[i];
            for (int j = 0; j < width; j++) what[to * width + j] = j < h->k ? h->ids[i * h->k + j] : UINT16_MAX;
        }
        free(h->pos); free(h->ids);
        h->pos = where; h->ids = what; h->size = size; h->k = width;
    }
    int at = pos % h->size;
    h->pos[at] = pos;
    for (int j = 0; j < h->k; j++) h->ids[at * h->k + j] = j < k ? (uint16_t)ids[j] : UINT16_MAX;
}

static float decay_of(const rp *p) {
    if (p->c->mode == RP_LAST) return 0.0f;
    float decay = p->c->decay;
    return decay >= 0.0f && decay < 1.0f ? decay : 0.7f;
}

static void move_on(layer_state *s, int b, int k, const int32_t *ids, float decay) {
    float *rec = s->rec + (size_t)b * s->E;
    for (int e = 0; e < s->E; e++) rec[e] *= decay;
    for (int i = 0; i < k; i++) rec[ids[i]] += 1.0f - decay;
    memcpy(s->last + b * RP_MAXK, ids, sizeof *ids * k);
    if (k < RP_MAXK) s->last[b * RP_MAXK + k] = -1;
}

bool rp_rewind(rp *p, int seq, int pos) {
    if (seq < 0 || seq >= p->n_seq || pos < 0) return false;
    int newest = p->next[seq];
    float decay = decay_of(p);
    int replay = decay > 0 ? (int)ceil(log(FORGOTTEN) / log(decay)) : 1;
    if (replay > MAX_REPLAY) replay = MAX_REPLAY;
    int first = pos > replay ? pos - replay : 0;
    /* The ring holds the last RP_HISTORY positions, and what a restart left out it never held. */
    if (newest < 0 || pos > newest || first < newest - RP_HISTORY) {
        begin_sequence(p, seq, pos);
        p->c->restarts++;
        return false;
    }
    for (int i = 0; i < RP_LAYERS; i++) {
        layer_state *s = &p->layers[i];
        if (!s->E) continue;
        history *h = &s->past[seq];
        memset(s->rec + (size_t)seq * s->E, 0, sizeof(float) * s->E);
        s->last[seq * RP_MAXK] = -1;
        for (int at = first; at < pos; at++) {
            if (!h->size || h->pos[at % h->size] != at) continue; /* a token that this layer did not see */
            int32_t ids[RP_MAXK];
            int k = 0;
            for (const uint16_t *row = h->ids + (size_t)(at % h->size) * h->k; k < h->k && row[k] < s->E; k++) ids[k] = row[k];
            move_on(s, seq, k, ids, decay);
        }
        for (int j = 0; j < h->size; j++) if (h->pos[j] >= pos) h->pos[j] = -1;
    }
    if (pos < newest) p->c->rewinds++;
    p->next[seq] = pos;
    return true;
}

void rp_copy(rp *p, int from, int to) {
    if (from < 0 || to < 0 || from >= p->n_seq || to >= p->n_seq || from == to) return;
    for (int i = 0; i < RP_LAYERS; i++) {
        layer_state *s = &p->layers[i];
        if (!s->E) continue;
        begin_layer(s, to);
        memcpy(s->rec + (size_t)to * s->E, s->rec + (size_t)from * s->E, sizeof(float) * s->E);
        memcpy(s->last + to * RP_MAXK, s->last + from * RP_MAXK, sizeof(int32_t) * RP_MAXK);
        history *h = &s->past[from];
        for (int j = 0; j < h->size; j++) if (h->pos[j] >= 0) {
            int32_t ids[RP_MAXK];
            int k = 0;
            for (; k < h->k && h->ids[(size_t)j * h->k + k] < s->E; k++) ids[k] = h->ids[(size_t)j * h->k + k];
            keep(&s->past[to], h->pos[j], k, ids);
        }
    }
    p->next[to] = p->next[from];
}

void rp_rows(rp *p, int n, const int32_t *seq, const int32_t *pos, const int8_t *out) {
    p->n = 0; p->begin = 0; p->rows = 0; p->previous_layer = RP_LAYERS;
    p->has_positions = pos != NULL;
    if (n < 0) return;
    if (n > p->cap) {
        free(p->seq); free(p->pos); free(p->out); free(p->restart);
        p->seq = malloc(sizeof *p->seq * n); p->pos = malloc(sizeof *p->pos * n);
        p->out = malloc((size_t)n); p->restart = malloc(sizeof *p->restart * n);
        p->cap = n;
        if (!p->seq || !p->pos || !p->out || !p->restart) {
            free(p->seq); free(p->pos); free(p->out); free(p->restart);
            p->seq = p->pos = NULL; p->out = NULL; p->restart = NULL; p->cap = 0;
            p->n = -1; /* no row is known: all run without the prior */
            return;
        }
    }
    bool met[p->n_seq];
    memset(met, 0, sizeof met);
    for (int i = 0; i < n; i++) {
        int b = seq ? seq[i] : 0;
        if (b < 0 || b >= p->n_seq) b = -1;
        p->seq[i] = b; p->out[i] = out ? out[i] : 1; p->pos[i] = pos ? pos[i] : -1; p->restart[i] = false;
        if (b < 0 || !pos || pos[i] < 0) continue;
        int at = pos[i];
        if (met[b]) {
            /* Several rows of one position are an image's: a step of 0 is none. */
            if (at != p->next[b] && at != p->next[b] - 1) { p->restart[i] = true; p->c->restarts += at != 0; }
        } else if (at == 0) begin_sequence(p, b, 0);
        else if (p->next[b] < 0) { /* begun anew and counted already */ }
        else if (at != p->next[b]) rp_rewind(p, b, at);
        met[b] = true;
        p->next[b] = at + 1;
    }
    p->n = n;
}

void rp_batch(rp *p, int n, const int32_t *seq, const int8_t *out) { rp_rows(p, n, seq, NULL, out); }

void rp_set_resident(rp *p, int layer, int n, const float *values) {
    if (layer < 0 || layer >= RP_LAYERS || n < 1 || n > RP_MAXE) return;
    layer_state *s = state(p, layer, n);
    if (!s) return;
    memcpy(s->resident, values, sizeof(float) * n);
    s->knows_residents = false;
    for (int e = 1; e < n; e++) s->knows_residents |= values[e] != values[0];
}

int rp_get(rp *p, int layer, int seq, float *out, int n) {
    if (layer < 0 || layer >= RP_LAYERS || seq < 0 || seq >= p->n_seq || !n || p->layers[layer].E != n) return -1;
    layer_state *s = &p->layers[layer];
    memcpy(out, p->c->mode == RP_RESIDENT ? s->resident : s->rec + (size_t)seq * n, sizeof(float) * n);
    return n;
}

/* ---- ranking ---- */

/* Whole numbers that order as floats do: NaN above everything, -0 as 0. */
static inline int32_t key_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t key = bits < 0 ? bits ^ INT32_MAX : bits;
    key = x == 0.0f ? 0 : key;
    return x != x ? INT32_MAX : key;
}

static void best(const int32_t *key, int E, int k, int32_t *ids) {
    int32_t v[RP_MAXK];
    int n = 0;
    for (int e = 0; e < E; e++) {
        int32_t x = key[e];
        if (n == k && x <= v[k - 1]) continue;
        int j = n < k ? n++ : k - 1;
        while (j > 0 && x > v[j - 1]) { v[j] = v[j - 1]; ids[j] = ids[j - 1]; j--; }
        v[j] = x; ids[j] = e;
    }
}

void rp_rank(const float *choice, const float *rec, int E, int k, float gain, int32_t *ids) {
    int32_t key[RP_MAXE];
    float hi = -INFINITY, lo = INFINITY;
    for (int e = 0; e < E; e++) {
        float x = choice[e];
        if (!isfinite(x)) continue;
        if (x > hi) hi = x;
        if (x < lo) lo = x;
    }
    float span = hi - lo; /* -inf without any finite score */
    if (!(span > 0)) span = 0;
    if (span > MAX_SPAN) span = MAX_SPAN;
    float scale = span * gain;
    for (int e = 0; e < E; e++) key[e] = key_of(choice[e] + rec[e] * scale);
    best(key, E, k, ids);
}

static bool distinct(const int32_t *ids, int k, int E) {
    uint64_t seen[RP_MAXE / 64] = {0};
    for (int i = 0; i < k; i++) {
        if (ids[i] < 0 || ids[i] >= E || seen[ids[i] / 64] >> (ids[i] % 64) & 1) return false;
        seen[ids[i] / 64] |= 1ull << (ids[i] % 64);
    }
    return true;
}

/* Whether the k distinct ids are those of the largest scores: if not, what is read are not the scores. */
static bool are_best(const float *choice, int E, const int32_t *ids, int k) {
    int32_t key[RP_MAXE], least = INT32_MAX;
    for (int e = 0; e < E; e++) key[e] = key_of(choice[e]);
    for (int i = 0; i < k; i++) { if (key[ids[i]] < least) least = key[ids[i]]; }
    int above = 0, of_ids = 0;
    for (int e = 0; e < E; e++) above += key[e] > least;
    for (int i = 0; i < k; i++) of_ids += key[ids[i]] > least;
    return above == of_ids;
}

/* ---- residency ---- */

/* Linux tells of a mapped file only to who owns it or may write it (since 5.2), to others that all is in memory. */
static bool tells_the_truth(const void *address) {
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) return false;
    char line[4096 + 256];
    bool told = false;
    while (fgets(line, sizeof line, maps)) {
        unsigned long from, to, inode;
        unsigned int major_number, minor_number;
        int name = 0;
        if (sscanf(line, "%lx-%lx %*s %*x %x:%x %lu %n", &from, &to, &major_number, &minor_number, &inode, &name) < 5) continue;
        if ((uintptr_t)address < from || (uintptr_t)address >= to) continue;
        if (!inode) { told = true; break; } /* memory of its own */
        line[strcspn(line, "\n")] = 0;
        struct stat facts;
        told = !stat(line + name, &facts) && facts.st_ino == inode &&
               (facts.st_uid == geteuid() || !eaccess(line + name, W_OK));
        break;
    }
    fclose(maps);
    return told;
}

int rp_mincore_layer(rp *p, int layer, int pages) {
    if (layer < 0 || layer >= RP_LAYERS) return -1;
    layer_state *s = &p->layers[layer];
    if (!s->n_ranges || !s->resident) return -1;
    if (!p->truth_known) {
        p->truth_known = true;
        p->c->is_blind = !tells_the_truth(s->ranges[0].data);
    }
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    static __thread unsigned char vec[1 << 16];
    int E = s->ranges[0].experts, calls = 0;
    float seen[RP_MAXE];
    int of[RP_MAXE];
    if (E > RP_MAXE) return -1;
    memset(seen, 0, sizeof *seen * E); memset(of, 0, sizeof *of * E);
    for (int r = 0; r < s->n_ranges && !p->c->is_blind; r++) {
        range g = s->ranges[r];
        for (int e = 0; e < E && e < g.experts; e++) {
            uintptr_t a = ((uintptr_t)g.data + e * g.stride + page - 1) & ~(page - 1);
            uintptr_t b = ((uintptr_t)g.data + (e + 1) * g.stride) & ~(page - 1);
            if (b <= a) { /* no page of its own: the one that its middle is in, or small experts would differ by place */
                a = ((uintptr_t)g.data + e * g.stride + g.stride / 2) & ~(page - 1);
                b = a + page;
            }
            size_t n = (b - a) / page;
            if (pages <= 0 || (size_t)pages >= n) {
                for (size_t done = 0; done < n; done += sizeof vec) {
                    size_t part = n - done < sizeof vec ? n - done : sizeof vec;
                    calls++;
                    if (mincore((void *)(a + done * page), part * page, vec)) break;
                    for (size_t i = 0; i < part; i++) seen[e] += vec[i] & 1;
                    of[e] += (int)part;
                }
            } else for (int q = 0; q < pages; q++) {
                size_t at = (size_t)(2 * q + 1) * n / (2 * (size_t)pages);
                calls++;
                if (mincore((void *)(a + at * page), page, vec)) continue;
                seen[e] += vec[0] & 1;
                of[e]++;
            }
        }
    }
    for (int e = 0; e < E; e++) s->resident[e] = of[e] ? seen[e] / (float)of[e] : 0.0f;
    s->knows_residents = false;
    for (int e = 1; e < E; e++) s->knows_residents |= s->resident[e] != s->resident[0];
    return calls;
}

int rp_weights(rp *p, int layer, int cap, const void **data, size_t *bytes_per_expert, int *experts) {
    if (layer < 0 || layer >= RP_LAYERS) return 0;
    layer_state *s = &p->layers[layer];
    for (int i = 0; i < s->n_ranges && i < cap; i++) {
        data[i] = s->ranges[i].data; bytes_per_expert[i] = s->ranges[i].stride; experts[i] = s->ranges[i].experts;
    }
    return s->n_ranges;
}

int rp_experts(rp *p, int layer) { return layer >= 0 && layer < RP_LAYERS ? p->layers[layer].E : 0; }

static void look(rp *p, int layer, layer_state *s) {
    uint32_t every = p->c->look_every ? p->c->look_every : 1;
    if (s->looked_at != UINT64_MAX && p->graphs - s->looked_at < every) return;
    s->looked_at = p->graphs;
    uint64_t began = now_ns();
    float values[RP_MAXE];
    if (p->look && !p->look(p->look_user, layer, s->E, values)) rp_set_resident(p, layer, s->E, values);
    else if (s->n_ranges && s->ranges[0].experts == s->E) {
        uint32_t pages = p->c->pages;
        rp_mincore_layer(p, layer, pages > 64 ? 64 : (int)pages);
    }
    p->c->mincore_ns += now_ns() - began;
}

/* ---- the graph ---- */

static bool is_op(const rp *p, const tensor *t, const char *name) {
    const char *found = p->op_name ? p->op_name(t) : NULL;
    return found && !strcmp(found, name);
}

/* The weights of a layer's experts, from the node that multiplies with them: no file is read for it. */
static void learn_range(layer_state *s, const tensor *weights) {
    if (!weights->data) return;
    for (int i = 0; i < s->n_ranges; i++) if (s->ranges[i].data == weights->data) return;
    if (s->n_ranges < MAX_RANGES) s->ranges[s->n_ranges++] = (range){weights->data, weights->nb[2], (int)weights->ne[2]};
}

/* A graph has begun: what is known of the one before it decides which layers the prior may touch. */
static void end_graph(rp *p) {
    p->graphs++;
    if (!p->unproven && p->c->status != RP_WAITING) return;
    uint32_t layers = 0, proven = 0;
    for (int i = 0; i < RP_LAYERS; i++) {
        layers += p->layers[i].pending != NULL;
        proven += p->layers[i].proven;
    }
    if (!layers) return;
    p->c->n_layers = layers;
    p->unproven = 0;
    if (proven < layers) off(p, RP_CONSUMER);
    else if (p->c->status == RP_WAITING) p->c->status = RP_ON;
}

uint32_t rp_settle(rp *p) {
    if (p->is_off || p->trusted) return p->c->status;
    end_graph(p);
    p->previous_layer = RP_LAYERS;
    if (p->c->status == RP_WAITING && p->probed) off(p, RP_NO_EXPERTS);
    return p->c->status;
}

/* The nodes that take the chosen ids come after the choice, and take these and no others. */
static void prove(rp *p, tensor *t) {
    for (int i = 0; i < RP_LAYERS; i++) {
        layer_state *s = &p->layers[i];
        if (!s->pending) continue;
        if (t->src[1] == s->pending && is_op(p, t, "GET_ROWS")) s->weights_seen = true;
        if (t->src[2] == s->pending && is_op(p, t, "MUL_MAT_ID")) {
            if (!t->src[0] || t->src[0]->ne[2] != s->E) { off(p, RP_CONSUMER); return; }
            s->product_seen = true;
            learn_range(s, t->src[0]);
        }
        s->proven = s->weights_seen && s->product_seen;
    }
}

static void new_batch_rows(rp *p, int layer, int rows) {
    if (layer <= p->previous_layer) {
        if (p->previous_layer < RP_LAYERS) p->begin += p->rows;
        end_graph(p);
        p->rows = rows;
        p->c->tokens += (uint64_t)rows;
    }
    p->previous_layer = layer;
}

static float gain_of(const rp *p, int layer) {
    float gain = p->c->gain;
    if ((uint32_t)layer < p->c->n_layer_gain) gain *= p->c->layer_gain[layer];
    return gain > 0.0f && gain <= MAX_GAIN ? gain : 0.0f;
}

static void serve(rp *p, tensor *t, int layer) {
    uint64_t began = now_ns();
    tensor *sorted = t->view_src ? t->view_src : t, *choice = sorted->src[0];
    if (!choice || choice->type != TYPE_F32 || t->type != TYPE_I32 || choice->nb[0] != 4 || t->nb[0] != 4 ||
        choice->ne[1] != t->ne[1] || choice->ne[2] != 1 || t->ne[2] != 1 || !choice->data || !t->data ||
        (!p->trusted && !is_op(p, sorted, "ARGSORT") && !is_op(p, sorted, "TOP_K"))) {
        off(p, RP_NO_SCORES);
        return;
    }
    int64_t E64 = choice->ne[0], k64 = t->ne[0];
    new_batch_rows(p, layer, (int)t->ne[1]);
    if (E64 < 1 || E64 > RP_MAXE || k64 < 1 || (k64 > RP_MAXK && k64 != E64)) { off(p, RP_TOO_MANY); return; }
    int k = (int)k64, rows = (int)t->ne[1], E = (int)E64;
    layer_state *s = state(p, layer, E);
    if (!s) return;
    if (!s->proven) { s->pending = t; s->weights_seen = s->product_seen = false; p->unproven++; }
    /* A warm-up runs all experts: there is nothing to choose, and nothing to remember. */
    if (k == E || k > RP_MAXK) { p->c->calls++; return; }
    bool may = !p->is_off && (p->trusted || (p->c->status == RP_ON && s->proven));
    bool is_resident = p->c->mode == RP_RESIDENT, host = !p->is_host || !sorted->buffer || p->is_host(sorted->buffer);
    if (!host && (!p->get || !p->set)) { off(p, RP_SYMBOLS); return; }
    float gain = may ? gain_of(p, layer) : 0.0f, decay = decay_of(p), local[RP_MAXE];
    if (is_resident && gain != 0.0f) {
        look(p, layer, s);
        /* The same for all is no reason to rank otherwise, and would only round. */
        if (!s->knows_residents) gain = 0.0f;
    }
    /* A softmax is ranked by its logarithm: the logits but for a constant, which neither ranks nor spans tell apart. */
    bool softmax = is_op(p, choice, "SOFT_MAX");
    bool fewer = rows < p->rows; /* the last layer computes rows with outputs alone */
    int at = p->begin - 1;
    size_t want = (size_t)rows * (size_t)k;
    if (p->buf) {
        if (p->buf_n + 3 + want <= p->buf_cap) {
            p->buf[p->buf_n++] = layer; p->buf[p->buf_n++] = rows; p->buf[p->buf_n++] = k;
        } else p->buf_cap = p->buf_n; /* whole layers or none */
    }
    if (p->on_chosen && want > p->final_cap) {
        int32_t *more = realloc(p->final, sizeof *more * want);
        if (more) { p->final = more; p->final_cap = want; }
    }
    for (int r = 0; r < rows; r++) {
        int b = 0, pos = -1;
        at++;
        if (p->n > 0) {
            if (fewer) while (at < p->n && at < p->begin + p->rows && !p->out[at]) at++;
            b = at < p->n && at < p->begin + p->rows ? p->seq[at] : -1;
            if (b >= 0) { pos = p->pos[at]; if (p->restart[at]) begin_layer(s, b); }
        } else if (p->n < 0) b = -1;
        int32_t theirs[RP_MAXK], ours[RP_MAXK], *ids = theirs;
        const float *row = (const float *)((const char *)choice->data + r * choice->nb[1]);
        if (host) memcpy(theirs, (char *)t->data + r * t->nb[1], sizeof *theirs * k);
        else {
            p->get(t, theirs, r * t->nb[1], sizeof *theirs * k);
            p->get(choice, local, r * choice->nb[1], sizeof *local * E);
            row = local;
        }
        /* Before it was decided that it may act, one wrong row shows that something else lies there. */
        bool sound = distinct(theirs, k, E) && are_best(row, E, theirs, k);
        if (!sound) {
            p->c->refused_rows++;
            if (!may && !p->trusted) off(p, RP_NOT_SORTED);
        } else if (b < 0) p->c->lost_rows++;
        else if (!may) p->c->unproven_rows++;
        else if (gain != 0.0f) {
            if (softmax) {
                for (int e = 0; e < E; e++) local[e] = logf(row[e]);
                row = local;
            }
            rp_rank(row, is_resident ? s->resident : s->rec + (size_t)b * E, E, k, gain, ours);
            if (!distinct(ours, k, E)) p->c->refused_rows++;
            else if (memcmp(ours, theirs, sizeof *ours * k)) {
                if (host) memcpy((char *)t->data + r * t->nb[1], ours, sizeof *ours * k);
                else p->set(t, ours, r * t->nb[1], sizeof *ours * k);
                p->c->changed_rows++;
                for (int i = 0; i < k; i++) {
                    int j = 0;
                    while (j < k && theirs[j] != ours[i]) j++;
                    p->c->swapped += j == k;
                }
                ids = ours;
            }
        }
        if (sound && b >= 0) {
            const int32_t *last = s->last + b * RP_MAXK;
            if (last[0] >= 0) {
                p->c->chosen += (uint64_t)k;
                for (int i = 0; i < k; i++) for (int j = 0; j < RP_MAXK && last[j] >= 0; j++) p->c->kept += last[j] == ids[i];
            }
            move_on(s, b, k, ids, decay);
            if (p->has_positions) keep(&s->past[b], pos, k, ids);
        }
        if (p->buf && p->buf_n + k <= p->buf_cap) { memcpy(p->buf + p->buf_n, ids, sizeof *ids * k); p->buf_n += k; }
        if (want <= p->final_cap && p->on_chosen) memcpy(p->final + (size_t)r * k, ids, sizeof *ids * k);
    }
    if (p->on_chosen && want <= p->final_cap) p->on_chosen(p->chosen_user, layer, rows, k, p->final);
    p->c->calls++;
    p->c->ns += now_ns() - began;
}

/* For a file whose architecture llama.cpp does not renormalise though the model does. */
static void renormalise(rp *p, tensor *t) {
    if (p->is_host && t->buffer && !p->is_host(t->buffer)) return;
    if (t->type != TYPE_F32 || t->ne[0] != 1 || t->nb[1] != 4 || !t->data) return;
    for (int64_t r = 0; r < t->ne[2]; r++) {
        float *w = (float *)((char *)t->data + r * t->nb[2]), sum = 0;
        for (int64_t i = 0; i < t->ne[1]; i++) sum += w[i];
        if (sum > 0) for (int64_t i = 0; i < t->ne[1]; i++) w[i] /= sum;
    }
}

static int layer_of(const char *name) {
    if (strncmp(name, TOPK, sizeof TOPK - 1)) return -1;
    char *end;
    long layer = strtol(name + sizeof TOPK - 1, &end, 10);
    return end != name + sizeof TOPK - 1 && !*end && layer >= 0 && layer < RP_LAYERS ? (int)layer : -1;
}

bool rp_cb(tensor *t, bool ask, void *rp_) {
    rp *p = rp_;
    if (!p->trusted && !p->probed) return !ask;
    if (ask && p->unproven && !p->is_off) prove(p, t);
    if (t->name[0] != 'f' || strncmp(t->name, "ffn_moe_", 8)) return !ask;
    if (p->renorm && !strncmp(t->name, WEIGHTS, sizeof WEIGHTS - 1)) {
        if (!ask && is_op(p, t, "GET_ROWS")) renormalise(p, t);
        return true;
    }
    int layer = layer_of(t->name);
    if (layer < 0 || p->is_off) return !ask; /* an engine in which the prior is off computes as without it */
    if (!ask) serve(p, t, layer);
    return true;
}
bool rp_cb_idle(tensor *t, bool ask, void *rp_) { (void)rp_; return layer_of(t->name) >= 0 || !ask; }

/* ---- the layout ---- */

typedef struct { size_t mem_size; void *mem_buffer; bool no_alloc; } init_params;

uint32_t rp_probe(rp *p, void *(*find)(const char *, void *), void *user) {
    void *(*init)(init_params) = find("ggml_init", user);
    void (*end)(void *) = find("ggml_free", user);
    tensor *(*new_2d)(void *, int, int64_t, int64_t) = find("ggml_new_tensor_2d", user);
    tensor *(*new_3d)(void *, int, int64_t, int64_t, int64_t) = find("ggml_new_tensor_3d", user);
    tensor *(*argsort)(void *, tensor *, int) = find("ggml_argsort", user);
    tensor *(*view_2d)(void *, tensor *, int64_t, int64_t, size_t, size_t) = find("ggml_view_2d", user);
    tensor *(*get_rows)(void *, tensor *, tensor *) = find("ggml_get_rows", user);
    tensor *(*mul_mat_id)(void *, tensor *, tensor *, tensor *) = find("ggml_mul_mat_id", user);
    tensor *(*set_name)(tensor *, const char *) = find("ggml_set_name", user);
    const char *(*get_name)(const tensor *) = find("ggml_get_name", user);
    void *(*get_data)(const tensor *) = find("ggml_get_data", user);
    size_t (*nbytes)(const tensor *) = find("ggml_nbytes", user);
    const char *(*type_name)(int) = find("ggml_type_name", user);
    const char *(*op_desc)(const tensor *) = find("ggml_op_desc", user);
    uint32_t found = RP_SYMBOLS;
    if (init && end && new_2d && new_3d && argsort && view_2d && get_rows && mul_mat_id && set_name && get_name &&
        get_data && nbytes && type_name && op_desc) {
        found = RP_LAYOUT;
        /* Sizes with no common value, so that a field cannot pass for another. */
        enum { E = 24, T = 5, K = 3, IN = 32, OUT = 7 };
        void *ctx = init((init_params){1 << 20, NULL, false});
        tensor *scores = ctx ? new_2d(ctx, TYPE_F32, E, T) : NULL, *order = scores ? argsort(ctx, scores, 1) : NULL;
        tensor *top = order ? view_2d(ctx, order, K, T, E * 4, 8) : NULL;
        tensor *x = top ? new_3d(ctx, TYPE_F32, IN, 1, T) : NULL, *w = x ? new_3d(ctx, TYPE_F32, IN, OUT, E) : NULL;
        tensor *flat = w ? new_3d(ctx, TYPE_F32, 1, E, T) : NULL;
        if (flat) {
            set_name(top, "ffn_moe_topk-3");
            tensor *y = mul_mat_id(ctx, w, x, top), *rows = get_rows(ctx, flat, top);
            /* The address of the name first: all other offsets that are read lie before it. */
            bool same = (const char *)get_name(top) == top->name && !strcmp(top->name, "ffn_moe_topk-3") &&
                get_data(top) == top->data && get_data(order) == order->data && get_data(scores) == scores->data &&
                scores->data && (char *)top->data == (char *)order->data + 8 && top->view_offs == 8 &&
                top->view_src == order && !order->view_src && order->src[0] == scores && !scores->src[0] &&
                top->ne[0] == K && top->ne[1] == T && top->ne[2] == 1 && top->ne[3] == 1 && top->nb[0] == 4 &&
                top->nb[1] == E * 4 && scores->ne[0] == E && scores->nb[1] == E * 4 && w->ne[2] == E &&
                w->nb[2] == IN * OUT * 4 && nbytes(scores) == E * T * 4 && nbytes(w) == IN * OUT * E * 4 &&
                scores->type == TYPE_F32 && top->type == TYPE_I32 && !strcmp(type_name(TYPE_F32), "f32") &&
                !strcmp(type_name(TYPE_I32), "i32") && y->src[0] == w && y->src[1] == x && y->src[2] == top &&
                rows->src[0] == flat && rows->src[1] == top && !strcmp(op_desc(y), "MUL_MAT_ID") &&
                !strcmp(op_desc(rows), "GET_ROWS") && !strcmp(op_desc(order), "ARGSORT") && !scores->buffer;
            if (same) found = RP_ON;
        }
        if (ctx) end(ctx);
    }
    if (p && found == RP_ON) p->probed = true;
    else if (p) off(p, found);
    return found;
}
