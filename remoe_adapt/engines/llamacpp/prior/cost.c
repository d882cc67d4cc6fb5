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
#define PRICE_FLOOR (-40.0f)
#define PRICE_TAIL 1.6993417e-16f /* 40 exp(-40) */
/* From it on log(1 + exp x) is x. */
#define PRICE_TOP 20.0f

static float largest(const float *row, int k, const int32_t *ids) {
    float most = row[ids[0]];
    for (int i = 1; i < k; i++) if (row[ids[i]] > most) most = row[ids[i]];
    return most;
}

/* The sum of exp(row - most) over the ids [k]. */
static double exponentials(const float *row, int k, const int32_t *ids, float most) {
    double sum = 0;
    for (int i = 0; i < k; i++) sum += exp((double)row[ids[i]] - (double)most);
    return sum;
}

/* Ids [k] of the best of what a layer ranks, held experts by more. row [E]: the scores, a softmax by its logarithm.
   theirs [k]: the best of them.

   A held expert of weight w ranks as one of weight w + g. Of those with w far below g the sum has the same digits, and
   what rounding leaves is not their order: so where logarithms are ranked it is log(1 + w/g), in which all digits are
   of w. Sums of the few are taken in double and rounded once, as in the definition. */
static void rank_by_cost(const rp *p, const layer_state *s, const float *row, const float *rec, int k, int held, float gain,
                         const int32_t *theirs, int32_t *ours) {
    const int E = s->E;
    const bool is_normalised = s->is_normalised || p->renorm;
    const float least = least_held(rec, E, held);
    float value[RP_MAXE];
    int32_t key[RP_MAXE];
    if (s->ranks == RP_RANKS_SOFTMAX || s->ranks == RP_RANKS_LOGITS) {
        /* log w - log g = row - base; the largest comes out of a sum of exponentials, so that none overflows. */
        double exact = log((double)gain);
        if (is_normalised || s->ranks == RP_RANKS_LOGITS) {
            float most = largest(row, k, theirs);
            exact += (double)most + log(exponentials(row, k, theirs, most));
        }
        const float base = (float)exact;
        const bool is_priced = isfinite(base);
        for (int e = 0; e < E; e++) {
            float x = is_priced ? row[e] - base : row[e];
            if (is_priced && rec[e] >= least && x < PRICE_TOP && isfinite(x))
                x = x < PRICE_FLOOR ? PRICE_TAIL / -x : (x > 0 ? x : 0.0f) + log1pf(expf(-fabsf(x)));
            value[e] = x;
        }
    } else {
        for (int e = 0; e < E; e++) value[e] = s->ranks == RP_RANKS_BARE_LOGITS ? 1.0f / (1.0f + expf(-row[e])) : row[e];
        float scale = gain;
        if (is_normalised) {
            double sum = 0;
            for (int i = 0; i < k; i++) sum += (double)value[theirs[i]];
            scale = (float)(fabs(sum) * (double)gain);
        }
        if (scale > 0 && isfinite(scale)) for (int e = 0; e < E; e++) value[e] += rec[e] >= least ? scale : 0.0f;
    }
    for (int e = 0; e < E; e++) key[e] = key_of(value[e]);
    best(key, E, k, ours);
}
