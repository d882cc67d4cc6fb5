/* What the parts of prior.c share: they are one translation unit, so that a compiler sees all of it at once. */
#pragma once
#define _GNU_SOURCE
#include "prior.h"
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <stdio.h>
#include <sys/stat.h>

/* A span is cut here, as in triton_kernels/rule.py, so that span * gain * recency stays finite. */
#define MAX_SPAN 1e30f
#define MAX_GAIN 16.0f
/* What decayed to less than this is left out when a state is computed again from the ids of the past. */
#define FORGOTTEN 1e-12
/* A recency below it is none to RP_COST: HELD_ABOVE of triton_kernels/rule.py. */
#define HELD_ABOVE 1e-25f
#define USUAL_SHARE 0.25
#define USUAL_DECAY 0.7
enum { TYPE_F32 = 0, TYPE_I32 = 26, MAX_RANGES = 4, MAX_REPLAY = 1200 };
static const char TOPK[] = "ffn_moe_topk-", WEIGHTS[] = "ffn_moe_weights-";

/* The experts of one tensor; of which of `rp.files` the bytes are: UNKNOWN, NO_FILE. */
typedef struct { const char *data; size_t stride; int experts, file; } range;
enum { UNKNOWN = -1, NO_FILE = -2, MAX_FILES = 64 };

/* A part of a file in memory: the byte at address a is that at a + shift of the file. */
typedef struct { uintptr_t from, to; int64_t shift; int fd; } mapped_file;

/* Which experts of a layer were read and are to stay: see ahead.c. */
typedef struct {
    bool *is_held;              /* [E] */
    bool *is_spilled;           /* [E]: touched without room for it, so given back at the next stop */
    float *uses;                /* [E]: LRFU's sum of decayed uses, as of `used_at` */
    uint64_t *used_at;
    int held;
    int limit;                  /* experts that the machine leaves room for; 0: not met yet */
    uint64_t limited_at;        /* when that was last found out, or tried anew */
} shelf;

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
    shelf shelf;
    uint64_t looked_at;
    const tensor *pending;      /* this graph's choice, whose consumers are to be seen yet */
    bool weights_seen, product_seen, proven;
    int ranks;                  /* RP_RANKS_... */
    bool is_normalised, is_softmax_after; /* weights are divided by their sum; are a softmax over the chosen */
    bool can_keep;              /* the prior reaches what they are divided by, see weights.c */
    const tensor *weights_at, *gathered; /* while that is looked for: what the weights have become; what they are of */
    const tensor *sum_at;       /* what their sum has become */
    bool is_sum_reachable;
} layer_state;

/* Where weights are divided by the sum of the chosen experts' scores. */
enum { NOWHERE, AT_SUM, AT_SOFTMAX, AT_GATHER };

/* A choice whose weights are yet to be corrected, later in the same graph. */
typedef struct {
    const tensor *top;          /* the choice; NULL: nothing is owed */
    int at, rows;
    float *part;                /* [rows]: what the weights of a row are to be multiplied by */
    size_t room;
} owed_weights;

struct rp {
    rp_control own, *c;
    int n_seq, n, begin, rows, previous_layer;
    int32_t *seq, *pos; int8_t *out; bool *restart;
    bool has_positions;
    int cap;
    int32_t *next, *since;      /* [n_seq]: the position that is expected; that at which the state began */
    layer_state layers[RP_LAYERS];
    uint64_t graphs;
    bool trusted, probed, is_off, truth_known;
    int unproven;               /* layers whose consumers are still looked for */
    int32_t *buf; size_t buf_cap, buf_n;
    int32_t *final; size_t final_cap;
    owed_weights owed;
    bool (*is_host)(void *);
    void (*get)(const tensor *, void *, size_t, size_t);
    void (*set)(tensor *, const void *, size_t, size_t);
    const char *(*op_name)(const tensor *);
    bool renorm;
    uint64_t expert_bytes, summed_at; /* of all layers; the graph of which that is */
    mapped_file files[MAX_FILES];
    int n_files, spilled_layer; /* the layer that has spilled experts, or -1 */
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}
