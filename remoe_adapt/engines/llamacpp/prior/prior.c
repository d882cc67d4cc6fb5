#include "state.h"

static void forget_layer(rp *, layer_state *);
static void off(rp *, uint32_t);
static bool is_op(const rp *, const tensor *, const char *name);
static bool can_renormalise(const tensor *);
static void miss_owed(rp *);

#include "ranking.c"
#include "sequences.c"
#include "cost.c"
#include "weights.c"
#include "residency.c"
#include "ahead.c"
#include "layout.c"

void rp_defaults(rp_control *c) {
    memset(c, 0, sizeof *c);
    c->magic = RP_MAGIC; c->size = sizeof *c; c->version = RP_VERSION;
    c->decay = USUAL_DECAY; c->pages = 1; c->look_every = 1; c->share = USUAL_SHARE;
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
    case RP_NO_WEIGHTS: return "the graph does not tell what the weights of the chosen experts are, by which the mode cost ranks";
    case RP_NO_SUM: return "the graph divides weights of chosen experts by a sum that the mode cost cannot reach";
    }
    return "unknown";
}

rp *rp_new(int n_seq, rp_control *control) {
    if (n_seq < 1) return NULL;
    rp *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->next = calloc((size_t)n_seq * 2, sizeof *p->next);
    if (!p->next) { free(p); return NULL; }
    p->since = p->next + n_seq;
    p->n_seq = n_seq;
    p->c = control ? control : &p->own;
    p->previous_layer = RP_LAYERS;
    p->spilled_layer = -1;
    if (!control) rp_defaults(&p->own);
    return p;
}

static void forget_layer(rp *p, layer_state *s) {
    if (s->past) for (int b = 0; b < p->n_seq; b++) { free(s->past[b].pos); free(s->past[b].ids); }
    free(s->rec); free(s->last); free(s->past); free(s->resident);
    forget_shelf(&s->shelf);
    s->rec = s->resident = NULL; s->last = NULL; s->past = NULL; s->E = 0;
}

void rp_free(rp *p) {
    if (!p) return;
    forget_ahead(p);
    for (int i = 0; i < RP_LAYERS; i++) forget_layer(p, &p->layers[i]);
    free(p->seq); free(p->pos); free(p->out); free(p->restart); free(p->next); free(p->final); free(p->owed.part);
    free(p);
}

rp_control *rp_ctl(rp *p) { return p->c; }
void rp_backend(rp *p, void *op_desc, void *is_host, void *get, void *set) {
    p->op_name = op_desc; p->is_host = is_host; p->get = get; p->set = set;
}
void rp_trust(rp *p, bool on) { p->trusted = on; if (on) p->c->status = RP_ON; }
void rp_weigh(rp *p, int layer, int experts, int ranks, bool is_normalised) {
    layer_state *s = layer >= 0 && layer < RP_LAYERS && experts > 0 && experts <= RP_MAXE ? state(p, layer, experts) : NULL;
    if (s) { s->ranks = ranks; s->is_normalised = is_normalised; s->can_keep = true; }
}
int rp_ranks(rp *p, int layer, bool *is_normalised) {
    if (layer < 0 || layer >= RP_LAYERS) return RP_RANKS_UNKNOWN;
    *is_normalised = p->layers[layer].is_normalised;
    return p->layers[layer].ranks;
}
void rp_renorm(rp *p, bool on) { p->renorm = on; }
void rp_record(rp *p, int32_t *buf, size_t cap) { p->buf = buf; p->buf_cap = cap; p->buf_n = 0; }
size_t rp_recorded(rp *p) { return p->buf_n; }

/* The reason that came first stays: what follows from it says less. */
static void off(rp *p, uint32_t why) {
    p->is_off = true;
    if (p->c->status == RP_WAITING || p->c->status == RP_ON) p->c->status = why;
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
    if (s->n_ranges < MAX_RANGES) s->ranges[s->n_ranges++] = (range){weights->data, weights->nb[2], (int)weights->ne[2], UNKNOWN};
}

/* A graph has begun: what is known of the one before it decides which layers the prior may touch. */
static void end_graph(rp *p) {
    p->graphs++;
    if (!p->unproven && p->c->status != RP_WAITING) return;
    uint32_t layers = 0, proven = 0, weighed = 0, kept = 0;
    for (int i = 0; i < RP_LAYERS; i++) {
        layer_state *s = &p->layers[i];
        s->weights_at = s->gathered = s->sum_at = NULL;
        layers += s->pending != NULL;
        proven += s->proven;
        weighed += s->pending && s->ranks;
        kept += s->pending && (s->can_keep || !divided_at(p, s));
    }
    if (!layers) return;
    p->c->n_layers = layers;
    p->unproven = 0;
    if (proven < layers) off(p, RP_CONSUMER);
    else if (p->c->mode == RP_COST && weighed < layers) off(p, RP_NO_WEIGHTS);
    else if (p->c->mode == RP_COST && kept < layers) off(p, RP_NO_SUM);
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
        if (s->weights_at) follow_weights(p, s, t);
        if (t->src[1] == s->pending && is_op(p, t, "GET_ROWS")) {
            s->weights_seen = true;
            /* Factors of the experts may be gathered by the same ids. */
            if (!strncmp(t->name, WEIGHTS, sizeof WEIGHTS - 1)) s->weights_at = s->gathered = t;
        }
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
    miss_owed(p);
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
    if (!s->proven && !p->trusted) {
        s->pending = t; s->weights_seen = s->product_seen = s->is_normalised = s->is_softmax_after = false;
        s->weights_at = s->sum_at = NULL; s->ranks = RP_RANKS_UNKNOWN; s->can_keep = false;
        p->unproven++;
    }
    /* A warm-up runs all experts: there is nothing to choose, and nothing to remember. */
    if (k == E || k > RP_MAXK) { p->c->calls++; return; }
    bool may = !p->is_off && (p->trusted || (p->c->status == RP_ON && s->proven));
    bool is_resident = p->c->mode == RP_RESIDENT, is_cost = p->c->mode == RP_COST, host = is_of_host(p, t);
    if (!host && (!p->get || !p->set)) { off(p, RP_SYMBOLS); return; }
    float gain = may ? gain_of(p, layer) : 0.0f, local[RP_MAXE], logs[RP_MAXE];
    const double decay = decay_of(p);
    if (is_resident && gain != 0.0f) {
        look(p, layer, s);
        /* The same for all is no reason to rank otherwise, and would only round. */
        if (!s->knows_residents) gain = 0.0f;
    }
    const tensor *scores = choice; /* that weights are gathered from */
    if (is_cost && gain != 0.0f && !may_owe(p, s, choice, rows, &scores)) gain = 0.0f;
    const bool divides = is_cost && gain != 0.0f && divided_at(p, s);
    bool owes = false;
    const int held = is_cost ? held_experts(p, E, k) : 0;
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
    if (want > p->final_cap) {
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
        read_row(p, t, r, k, theirs, host);
        const float *row = row_of(p, choice, r, E, local, host), *raw = row;
        /* Before it was decided that it may act, one wrong row shows that something else lies there. */
        bool sound = distinct(theirs, k, E) && are_best(row, E, theirs, k);
        if (!sound) {
            p->c->refused_rows++;
            if (!may && !p->trusted) off(p, RP_NOT_SORTED);
        } else if (b < 0) p->c->lost_rows++;
        else if (!may) p->c->unproven_rows++;
        else if (gain != 0.0f) {
            if (softmax) {
                for (int e = 0; e < E; e++) logs[e] = logf(raw[e]);
                row = logs;
            }
            if (is_cost) rank_by_cost(p, s, row, s->rec + (size_t)b * E, k, held, gain, theirs, ours);
            else rp_rank(row, is_resident ? s->resident : s->rec + (size_t)b * E, E, k, gain, ours);
            if (!distinct(ours, k, E)) p->c->refused_rows++;
            else if (memcmp(ours, theirs, sizeof *ours * k)) {
                write_row(p, t, r, k, ours, host);
                if (divides) {
                    if (scores != choice) raw = row_of(p, scores, r, E, local, is_of_host(p, scores));
                    p->owed.part[r] = kept_part(s->ranks, raw, k, ours, theirs);
                    owes |= p->owed.part[r] != 1.0f;
                }
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
        if (want <= p->final_cap)
            for (int i = 0; i < k; i++) p->final[(size_t)r * k + i] = sound ? ids[i] : -1;
    }
    if (owes) { p->owed.top = t; p->owed.at = divided_at(p, s); p->owed.rows = rows; }
    p->c->calls++;
    p->c->ns += now_ns() - began;
    if (want <= p->final_cap) read_ahead(p, layer, s, (int)want, p->final);
}

static bool can_renormalise(const tensor *t) {
    return t->type == TYPE_F32 && t->ne[0] == 1 && t->nb[1] == 4 && t->data;
}

/* For a file whose architecture llama.cpp does not renormalise though the model does. */
static void renormalise(rp *p, tensor *t) {
    if (!is_of_host(p, t) || !can_renormalise(t)) return;
    const bool owed = p->owed.top && p->owed.at == AT_GATHER && p->owed.top == t->src[1] && p->owed.rows == t->ne[2];
    if (owed) p->owed.top = NULL;
    for (int64_t r = 0; r < t->ne[2]; r++) {
        float *w = (float *)((char *)t->data + r * t->nb[2]), sum = 0;
        for (int64_t i = 0; i < t->ne[1]; i++) sum += w[i];
        const float part = owed ? p->owed.part[r] : 1.0f;
        if (sum > 0) for (int64_t i = 0; i < t->ne[1]; i++) w[i] = w[i] / sum * part;
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
    if (p->owed.top && is_owed(p, t)) {
        if (!ask) keep_weights(p, t);
        return true;
    }
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
