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
    p->next[b] = p->since[b] = pos;
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

static double decay_of(const rp *p) {
    if (p->c->mode == RP_LAST) return 0;
    double decay = p->c->decay;
    return decay >= 0 && decay < 1 ? decay : USUAL_DECAY;
}

static void move_on(layer_state *s, int b, int k, const int32_t *ids, double decay) {
    float *rec = s->rec + (size_t)b * s->E;
    const float kept = (float)decay, more = (float)(1 - decay);
    for (int e = 0; e < s->E; e++) rec[e] *= kept;
    for (int i = 0; i < k; i++) rec[ids[i]] += more;
    memcpy(s->last + b * RP_MAXK, ids, sizeof *ids * k);
    if (k < RP_MAXK) s->last[b * RP_MAXK + k] = -1;
}

bool rp_rewind(rp *p, int seq, int pos) {
    if (seq < 0 || seq >= p->n_seq || pos < 0) return false;
    int newest = p->next[seq];
    double decay = decay_of(p), forgotten = p->c->mode == RP_COST ? HELD_ABOVE : FORGOTTEN;
    int replay = decay > 0 ? (int)ceil(log(forgotten) / log(decay)) : 1;
    if (replay > MAX_REPLAY) replay = MAX_REPLAY;
    int first = pos > replay ? pos - replay : 0;
    if (first < p->since[seq]) first = p->since[seq];
    /* The ring holds the last RP_HISTORY positions, and nothing is known of those before a restart. */
    if (newest < 0 || pos > newest || pos < p->since[seq] || first < newest - RP_HISTORY) {
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
    p->since[to] = p->since[from];
}

void rp_rows(rp *p, int n, const int32_t *seq, const int32_t *pos, const int8_t *out) {
    miss_owed(p); /* of a graph that was broken off, or whose last layer weighs otherwise than it was seen to */
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
            if (at != p->next[b] && at != p->next[b] - 1) {
                p->restart[i] = true;
                p->since[b] = at;
                p->c->restarts += at != 0;
            }
        } else if (at == 0) begin_sequence(p, b, 0);
        else if (p->next[b] < 0) p->since[b] = at; /* begun anew and counted already */
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
