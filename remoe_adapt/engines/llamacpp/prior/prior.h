/* The recency prior as an eval callback of llama.cpp: between the ranking of a layer's experts and the products with
   them, the ids of the chosen ones are replaced by the k best of score + gain * span * recency, or of score + what a held
   expert gains (cost.c). Weights come from the untouched scores, which llama.cpp gathers by these ids afterwards; in
   the mode cost what it then divides them by is corrected (weights.c). The definition is
   remoe_adapt/gating/reference.py.

   No header of llama.cpp is needed. What is assumed of it is checked before anything is written: the layout of its
   tensors by rp_probe, the graph of each layer by the first pass through it. Ids are never written unless they are
   distinct and in range and the engine's own ids are the best of the scores that were read. One thread at a time. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* struct ggml_tensor as it has been since 2024. */
typedef struct tensor {
    int32_t type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op, op_params[16], flags;
    struct tensor *src[10];
    struct tensor *view_src;
    size_t view_offs;
    void *data;
    char name[64];
    void *extra;
    char padding[8];
} tensor;

enum { RP_EMA = 0, RP_LAST = 1, RP_RESIDENT = 2, RP_COST = 3 };
enum { RP_LAYERS = 512, RP_MAXK = 64, RP_MAXE = 1024, RP_HISTORY = 4096 };
/* REMP, and the version of rp_control behind it. */
enum { RP_MAGIC = 0x52454d50, RP_VERSION = 3 };

/* rp_control.status: RP_ON, or why the prior does not act; rp_why has the words. */
enum {
    RP_WAITING = 0,     /* no graph has been seen to its end yet */
    RP_ON = 1,
    RP_NO_EXPERTS = 2,  /* a whole graph without a choice of experts */
    RP_LAYOUT = 3,      /* rp_probe: tensors lie otherwise in memory */
    RP_NO_SCORES = 4,   /* the chosen ids are no view of a ranking of float32 scores */
    RP_TOO_MANY = 5,    /* more experts or more chosen ones than there is room for */
    RP_CONSUMER = 6,    /* weights or products take other ids than those of the ranking */
    RP_NOT_SORTED = 7,  /* the engine's ids are not the best of the scores that can be read */
    RP_SYMBOLS = 8,     /* functions of ggml are missing */
    RP_NO_WEIGHTS = 9,  /* RP_COST: it cannot be told what the weights of the chosen experts are */
    RP_NO_SUM = 10,     /* RP_COST: weights are divided by a sum that is out of reach */
};

/* What a layer ranks, and so what the weight of an expert is: read off the nodes between the scores and the products. */
enum {
    RP_RANKS_UNKNOWN = 0,
    RP_RANKS_SOFTMAX = 1,       /* a softmax over all experts, which are the weights */
    RP_RANKS_LOGITS = 2,        /* logits, whose softmax over the chosen are the weights */
    RP_RANKS_SCORES = 3,        /* scores, biased ones too, or a softmax with a bias */
    RP_RANKS_BARE_LOGITS = 4,   /* logits, whose sigmoid are the weights */
};

/* rp_control.ahead_state: whether missing experts are read at the stop. */
enum {
    RP_AHEAD_OFF = 0,
    RP_AHEAD_ON = 1,
    RP_AHEAD_NO_FILE = 2,       /* no layer's experts lie in a file that is mapped to be read alone */
};

/* Lies in a file that other processes map; all of it may change at any time. Gains outside [0, 16] count as 0. */
typedef struct {
    uint32_t magic, size;
    float gain;
    /* Reading ahead: the share of all experts' bytes that is to stay in memory; 0: budget_bytes counts. */
    float budget_share;
    uint32_t mode;              /* RP_EMA, RP_LAST, RP_RESIDENT, RP_COST */
    uint32_t pages;             /* of each expert in each tensor that mincore looks at; 0: all */
    double decay;               /* of RP_EMA and RP_COST, in [0, 1); double, as 1 - decay is another float else */
    double share;               /* RP_COST: of a layer's experts, those that are preferred, in (0, 1] */
    uint64_t tokens;            /* rows of the first layer with experts */
    uint64_t calls;             /* layers served */
    uint64_t changed_rows;      /* rows whose ids, or their order, were rewritten */
    uint64_t kept, chosen;      /* experts that the previous row of the sequence used too; all of them */
    uint64_t swapped;           /* ids that the prior put in the place of the engine's */
    uint64_t ns, mincore_ns;    /* wall time in the callback, and in mincore within it */
    uint64_t restarts;          /* sequences whose state began anew at another position than 0 */
    /* Beyond the prototype. */
    uint32_t version, status;
    uint64_t rewinds;           /* sequences whose state went back to an earlier position */
    uint64_t refused_rows;      /* rows left as they were because a check failed */
    uint64_t lost_rows;         /* rows of which no sequence is known: without prior, without trace */
    uint64_t unproven_rows;     /* rows that ran before the graph of their layer was proven */
    uint32_t look_every;        /* residency is read anew every so many graphs; 0 is 1 */
    uint32_t is_blind;          /* mincore does not tell the truth of this file: RP_RESIDENT does nothing */
    uint32_t n_layers;          /* layers with experts that were seen */
    uint32_t n_layer_gain;      /* layers below it have a factor of their own, the others 1 */
    float layer_gain[RP_LAYERS];
    uint32_t ahead_state;
    /* How many bytes of experts are to stay in memory, over all layers; 0: off. */
    uint64_t budget_bytes, held_bytes;
    uint64_t ahead_hits, ahead_misses; /* experts that were held when a layer chose them, or not: once per layer served */
    uint64_t ahead_stale;       /* of the misses: held by our account, but the kernel had taken them back */
    uint64_t ahead_spilled;     /* of the misses: more than there was room for, so left to page faults */
    uint64_t ahead_dropped, ahead_bytes, ahead_failed, ahead_ns;
} rp_control;

typedef struct rp rp;

/* State for `n_seq` sequences; control NULL: its own. NULL when there is no memory. */
rp *rp_new(int n_seq, rp_control *control);
void rp_free(rp *);
rp_control *rp_ctl(rp *);
/* Fields with their usual values, gain 0. */
void rp_defaults(rp_control *);
const char *rp_why(uint32_t status);

/* ggml's ggml_op_desc, ggml_backend_buffer_is_host, ggml_backend_tensor_get, ggml_backend_tensor_set. Without op_desc
   the prior stays off; without the others all memory is the host's. */
void rp_backend(rp *, void *op_desc, void *is_host, void *tensor_get, void *tensor_set);
/* Whether tensors that ggml makes lie in memory as above: RP_ON, RP_LAYOUT or RP_SYMBOLS. `find` gives its functions.
   Until it was RP_ON the callback of `rp` (may be NULL) does nothing; after another answer it is off for good. */
uint32_t rp_probe(rp *, void *(*find)(const char *name, void *user), void *user);
/* A decode has ended, so the graph was seen to its end: RP_ON, or why the prior stays off. Without it that is known when
   the next graph begins. */
uint32_t rp_settle(rp *);
/* Graphs are taken as proven without a look; for tests and for micro-benchmarks. */
void rp_trust(rp *, bool);
/* What a layer of so many experts ranks, and whether weights are divided by their sum: for the same, where no graph says
   so. */
void rp_weigh(rp *, int layer, int experts, int ranks, bool is_normalised);
int rp_ranks(rp *, int layer, bool *is_normalised); /* of a layer that was seen; else RP_RANKS_UNKNOWN */

/* Rows of the batch that follows; seq, out may be NULL (all of sequence 0, all with output). */
void rp_batch(rp *, int n, const int32_t *seq, const int8_t *out);
/* The same with positions, by which the state follows: position 0 begins anew, an earlier position than the next one
   goes back to what was then, another begins anew and is counted. */
void rp_rows(rp *, int n, const int32_t *seq, const int32_t *pos, const int8_t *out);
void rp_reset(rp *, int seq);                       /* seq < 0: all */
void rp_restart(rp *, int seq);                     /* the same, counted: it could not be followed */
bool rp_rewind(rp *, int seq, int pos);             /* as before position `pos`; false: begun anew and counted */
void rp_copy(rp *, int from, int to);               /* a sequence goes on from another one's state */

bool rp_cb(tensor *t, bool ask, void *rp_);         /* the eval callback */
bool rp_cb_idle(tensor *t, bool ask, void *rp_);    /* asks for the same nodes, does nothing: its cost alone */

void rp_set_resident(rp *, int layer, int n, const float *);
int rp_mincore_layer(rp *, int layer, int pages);   /* refresh residency; number of system calls, -1 unknown layer */
uint64_t rp_expert_bytes(rp *);                     /* of all layers that were seen, in files */
int rp_experts(rp *, int layer);                    /* of a layer that was seen; else 0 */
int rp_get(rp *, int layer, int seq, float *out, int n);
void rp_renorm(rp *, bool);                         /* divide the chosen weights by their sum */
void rp_record(rp *, int32_t *buf, size_t cap);     /* ids as used: layer, row count, k, ids...; NULL stops */
size_t rp_recorded(rp *);
/* The ranking alone: ids [k] of the best of scores [E]; for tests. */
void rp_rank(const float *scores, const float *recency, int E, int k, float gain, int32_t *ids);
