/* ---- RP_COST: what a held expert gains (remoe_adapt/gating/cost.py) ---- */

static int held_experts(const rp *p, int E, int k) {
    double share = p->c->share;
    int held = (int)((share > 0 && share <= 1 ? share : USUAL_SHARE) * E);
    return held > k ? held : k;
}

/* The recency from which on experts are held: that of the last of `held` of them, equals of it as well. Recencies are
   not negative, so their bits order as they do; halving the range of the bits has no branch that is hard to foresee. */
static float least_held(const float *rec, int E, int held) {
    int32_t bits[RP_MAXE], from, to = 0;
    const float least = HELD_ABOVE;
    memcpy(bits, rec, sizeof *bits * E);
    memcpy(&from, &least, sizeof from);
    int n = 0;
    for (int e = 0; e < E; e++) { n += bits[e] >= from; to = bits[e] > to ? bits[e] : to; }
    if (n <= held) return least;
    /* At or above `from` there are `held` or more, above `to` none. */
    while (n != held && from < to) {
        int32_t half = from + (to - from) / 2 + 1;
        n = 0;
        for (int e = 0; e < E; e++) n += bits[e] >= half;
        if (n >= held) from = half; else to = half - 1;
    }
    float found;
    memcpy(&found, &from, sizeof found);
    return found;
}

/* Below it an exponential has too few digits left to order experts: what they rank by goes on as a hyperbola. */
#define PRICE_FLOOR (-20.0f)
#define PRICE_TAIL 4.2483543e-17f /* 10 exp(-40) */

/* Ids [k] of the best of what a layer ranks, held experts by more. row [E]: the scores, a softmax by its logarithm.
   theirs [k]: the best of them.

   A held expert of weight w ranks by sqrt(w^2 + g^2). Of those with w far below g the sum has the same digits, and what
   rounding leaves is not their order: so the difference to g is computed, in which all digits are of w. */
static void rank_by_cost(const rp *p, const layer_state *s, const float *row, const float *rec, int k, int held, float gain,
                         const int32_t *theirs, int32_t *ours) {
    const int E = s->E;
    const bool is_normalised = s->is_normalised || p->renorm;
    const float least = least_held(rec, E, held);
    float value[RP_MAXE];
    int32_t key[RP_MAXE];
    if (s->ranks == RP_RANKS_SOFTMAX || s->ranks == RP_RANKS_LOGITS) {
        /* log w - log g = row - base; the largest comes out of a sum of exponentials, so that none overflows. */
        float base = logf(gain);
        if (is_normalised || s->ranks == RP_RANKS_LOGITS) {
            float most = row[theirs[0]], sum = 0;
            for (int i = 1; i < k; i++) if (row[theirs[i]] > most) most = row[theirs[i]];
            for (int i = 0; i < k; i++) sum += expf(row[theirs[i]] - most);
            base += most + logf(sum);
        }
        const bool is_priced = isfinite(base);
        for (int e = 0; e < E; e++) {
            float x = is_priced ? row[e] - base : row[e];
            if (is_priced && rec[e] >= least && x < 10.0f && isfinite(x))
                x = x < PRICE_FLOOR ? PRICE_TAIL / -x : 0.5f * log1pf(expf(2.0f * x));
            value[e] = x;
        }
    } else {
        for (int e = 0; e < E; e++) value[e] = s->ranks == RP_RANKS_BARE_LOGITS ? 1.0f / (1.0f + expf(-row[e])) : row[e];
        float scale = gain;
        if (is_normalised) {
            float sum = 0;
            for (int i = 0; i < k; i++) sum += value[theirs[i]];
            scale *= fabsf(sum);
        }
        const float square = scale * scale;
        const bool is_priced = scale > 0 && isfinite(square);
        for (int e = 0; e < E; e++) {
            float c = value[e];
            if (!is_priced || rec[e] < least || !isfinite(c)) continue;
            value[e] = scale + (c > 0 ? c * (c / (sqrtf(square + c * c) + scale)) : c);
        }
    }
    for (int e = 0; e < E; e++) key[e] = key_of(value[e]);
    best(key, E, k, ours);
}

/* ---- what the weights are, read off the graph ---- */

static const tensor *unshaped(const rp *p, const tensor *t) {
    while (t && is_op(p, t, "RESHAPE")) t = t->src[0];
    return t;
}

/* By what takes part in a layer's choice: the tensor that is ranked, that which the weights are gathered from, and
   whether a softmax is taken over the chosen. */
static int ranks_of(const rp *p, const tensor *ranked, const tensor *scores, bool is_softmax_after) {
    if (!ranked || !scores) return RP_RANKS_UNKNOWN;
    if (is_op(p, scores, "SOFT_MAX")) {
        if (is_softmax_after) return RP_RANKS_UNKNOWN;
        return ranked == scores ? RP_RANKS_SOFTMAX : RP_RANKS_SCORES;
    }
    if (is_op(p, scores, "SIGMOID") || is_op(p, scores, "SQRT")) {
        if (is_softmax_after) return RP_RANKS_UNKNOWN;
        if (ranked != scores->src[0]) return RP_RANKS_SCORES;
        return is_op(p, scores, "SIGMOID") ? RP_RANKS_BARE_LOGITS : RP_RANKS_UNKNOWN;
    }
    return ranked == scores && is_softmax_after ? RP_RANKS_LOGITS : RP_RANKS_UNKNOWN;
}

/* One more node of the graph, which may be what becomes of the weights on their way to the products' results. */
static void follow_weights(const rp *p, layer_state *s, const tensor *t) {
    const tensor *at = s->weights_at;
    if (t->src[0] != at && t->src[1] != at) return;
    if (is_op(p, t, "RESHAPE") || is_op(p, t, "VIEW") || is_op(p, t, "CONT") || is_op(p, t, "SCALE")) s->weights_at = t;
    else if (is_op(p, t, "SUM_ROWS")) return;
    else if (is_op(p, t, "DIV") && t->src[0] == at) { s->is_normalised = true; s->weights_at = t; }
    else if (is_op(p, t, "SOFT_MAX")) { s->is_softmax_after = true; s->weights_at = t; }
    else {
        const tensor *sorted = s->pending->view_src ? s->pending->view_src : s->pending;
        if (is_op(p, t, "MUL")) s->ranks = ranks_of(p, sorted->src[0], unshaped(p, s->gathered->src[0]), s->is_softmax_after);
        s->weights_at = NULL;
    }
}
