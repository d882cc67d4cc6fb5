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
