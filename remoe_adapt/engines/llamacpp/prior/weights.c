/* ---- rows in memory, of whatever device ---- */

static bool is_of_host(const rp *p, const tensor *t) {
    void *buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return !p->is_host || !buffer || p->is_host(buffer);
}

static void read_row(const rp *p, const tensor *t, int r, int n, void *values, bool host) {
    if (host) memcpy(values, (const char *)t->data + r * t->nb[1], sizeof(float) * n);
    else p->get(t, values, r * t->nb[1], sizeof(float) * n);
}

static void write_row(const rp *p, tensor *t, int r, int n, const void *values, bool host) {
    if (host) memcpy((char *)t->data + r * t->nb[1], values, sizeof(float) * n);
    else p->set(t, values, r * t->nb[1], sizeof(float) * n);
}

/* A row where it lies, or read into `room`. */
static const float *row_of(const rp *p, const tensor *t, int r, int n, float *room, bool host) {
    if (host) return (const float *)((const char *)t->data + r * t->nb[1]);
    read_row(p, t, r, n, room, host);
    return room;
}

/* Whether rows of float32 can be read and written. */
static bool is_reachable(const rp *p, const tensor *t, int rows) {
    return t->type == TYPE_F32 && t->data && t->nb[0] == 4 && t->ne[1] == rows && t->ne[2] == 1 && t->ne[3] == 1 &&
        (is_of_host(p, t) || (p->get && p->set));
}

/* ---- what the weights are, read off the graph ---- */

static const tensor *unshaped(const rp *p, const tensor *t) {
    while (t && is_op(p, t, "RESHAPE")) t = t->src[0];
    return t;
}

/* An operation that leaves the weights of a row in proportion. */
static bool keeps_proportion(const rp *p, const tensor *t) {
    return is_op(p, t, "RESHAPE") || is_op(p, t, "VIEW") || is_op(p, t, "CONT") || is_op(p, t, "SCALE");
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

static int divided_at(const rp *p, const layer_state *s) {
    if (s->is_normalised) return AT_SUM;
    return s->ranks == RP_RANKS_LOGITS ? AT_SOFTMAX : p->renorm ? AT_GATHER : NOWHERE;
}

/* The scores that what is ranked was made of, by a bias or a choice of groups. They are computed before it, and their
   memory is not given to other tensors before weights are gathered from them. */
static const tensor *scores_of(const rp *p, const tensor *ranked) {
    for (int steps = 0; ranked && steps < 16; steps++, ranked = ranked->src[0])
        if (is_op(p, ranked, "SIGMOID") || is_op(p, ranked, "SOFT_MAX") || is_op(p, ranked, "SQRT")) return ranked;
    return NULL;
}

/* One more node of the graph, which may be what becomes of the weights on their way to the products' results. */
static void follow_weights(const rp *p, layer_state *s, const tensor *t) {
    const tensor *at = s->weights_at;
    if (s->sum_at && t->src[0] == s->sum_at && (keeps_proportion(p, t) || is_op(p, t, "CLAMP") || is_op(p, t, "ADD"))) {
        s->sum_at = t;
        return;
    }
    if (t->src[0] != at && t->src[1] != at) return;
    if (keeps_proportion(p, t)) s->weights_at = t;
    else if (is_op(p, t, "SUM_ROWS")) {
        s->sum_at = t;
        s->is_sum_reachable = is_reachable(p, t, (int)s->pending->ne[1]);
    } else if (is_op(p, t, "DIV") && t->src[0] == at) {
        /* Of two divisions the second undoes what is done to the sum of the first. */
        s->can_keep = !s->is_normalised && s->sum_at && t->src[1] == s->sum_at && s->is_sum_reachable;
        s->is_normalised = true;
        s->weights_at = t;
    } else if (is_op(p, t, "SOFT_MAX")) {
        s->can_keep = is_reachable(p, t, (int)s->pending->ne[1]);
        s->is_softmax_after = true;
        s->weights_at = t;
    } else {
        if (is_op(p, t, "MUL")) {
            const tensor *ranked = (s->pending->view_src ? s->pending->view_src : s->pending)->src[0];
            const tensor *scores = unshaped(p, s->gathered->src[0]);
            s->ranks = ranks_of(p, ranked, scores, s->is_softmax_after);
            if (divided_at(p, s) == AT_GATHER) s->can_keep = is_of_host(p, s->gathered) && can_renormalise(s->gathered);
            if (s->ranks == RP_RANKS_SCORES && scores_of(p, ranked) != scores) s->can_keep = false;
        }
        s->weights_at = NULL;
    }
}

/* ---- RP_COST: experts that stay weigh what they weighed (`kept_part` of remoe_adapt/gating/cost.py) ----

   llama.cpp divides the weights of the chosen experts by the sum of their scores. After ids were rewritten that would be
   the sum of ours, and all experts that stay would weigh more or less than before. So, later in the same graph, that sum
   is put back to what the engine's own choice had: in the result of SUM_ROWS, before it is clamped and divided by; in a
   softmax over the chosen, which has no such node, in its result; or while we divide ourselves (rp_renorm). */

/* Whether ids of a layer may be rewritten: what weights are is known, and they will be what they were. scores: of which
   they are, where the layer ranks others. */
static bool may_owe(rp *p, const layer_state *s, const tensor *choice, int rows, const tensor **scores) {
    if (s->ranks == RP_RANKS_UNKNOWN) { off(p, RP_NO_WEIGHTS); return false; }
    if (!divided_at(p, s)) return true;
    if (s->ranks == RP_RANKS_SCORES) *scores = scores_of(p, choice);
    if (!s->can_keep || !*scores || !is_reachable(p, *scores, rows) || (*scores)->ne[0] != s->E) {
        off(p, RP_NO_SUM);
        return false;
    }
    if ((size_t)rows > p->owed.room) {
        float *more = realloc(p->owed.part, sizeof *more * (size_t)rows);
        if (!more) return false;
        p->owed.part = more;
        p->owed.room = (size_t)rows;
    }
    for (int r = 0; r < rows; r++) p->owed.part[r] = 1.0f;
    return true;
}

/* The sum of our experts' scores over that of theirs; 1 where it is no number. scores [E]: logits where weights are a
   softmax over the chosen ones, or a sigmoid of them. */
static float kept_part(int ranks, const float *scores, int k, const int32_t *ours, const int32_t *theirs) {
    double of_ours = 0, of_theirs = 0;
    if (ranks == RP_RANKS_LOGITS) {
        float most = largest(scores, k, theirs);
        of_ours = exponentials(scores, k, ours, most);
        of_theirs = exponentials(scores, k, theirs, most);
    } else if (ranks == RP_RANKS_BARE_LOGITS) {
        for (int i = 0; i < k; i++) of_ours += 1 / (1 + exp(-(double)scores[ours[i]]));
        for (int i = 0; i < k; i++) of_theirs += 1 / (1 + exp(-(double)scores[theirs[i]]));
    } else {
        for (int i = 0; i < k; i++) of_ours += (double)scores[ours[i]];
        for (int i = 0; i < k; i++) of_theirs += (double)scores[theirs[i]];
    }
    const float part = (float)(of_ours / of_theirs);
    return isfinite(part) ? part : 1.0f;
}

/* Whether a node is that in which the weights of the choice are to be corrected. It is told by what it is made of, so
   that no node of another layer or graph passes for it. */
static bool is_owed(const rp *p, const tensor *t) {
    if (p->owed.at == AT_GATHER || !is_op(p, t, p->owed.at == AT_SUM ? "SUM_ROWS" : "SOFT_MAX")) return false;
    const tensor *from = t->src[0];
    while (from && (keeps_proportion(p, from) || (p->owed.at == AT_SUM && is_op(p, from, "SOFT_MAX")))) from = from->src[0];
    /* Factors of the experts may be gathered by the same ids. */
    return from && from->src[1] == p->owed.top && is_op(p, from, "GET_ROWS") && !strncmp(from->name, WEIGHTS, sizeof WEIGHTS - 1);
}

static void keep_weights(rp *p, tensor *t) {
    uint64_t began = now_ns();
    const int n = (int)t->ne[0], at = p->owed.at;
    p->owed.top = NULL;
    if (!is_reachable(p, t, p->owed.rows) || n < 1 || n > (at == AT_SUM ? 1 : RP_MAXK)) { off(p, RP_NO_SUM); return; }
    const bool host = is_of_host(p, t);
    for (int r = 0; r < p->owed.rows; r++) {
        const float part = p->owed.part[r];
        float values[RP_MAXK];
        /* Where our experts' scores are all 0, so are their weights, whatever they are divided by. */
        if (part == 1.0f || (at == AT_SUM && !(part > 0))) continue;
        read_row(p, t, r, n, values, host);
        for (int i = 0; i < n; i++) values[i] = at == AT_SUM ? values[i] / part : values[i] * part;
        write_row(p, t, r, n, values, host);
    }
    p->c->ns += now_ns() - began;
}

/* The weights of the choice before were not met: its graph is another than the one that was seen. */
static void miss_owed(rp *p) {
    if (!p->owed.top) return;
    p->owed.top = NULL;
    if (!p->trusted) off(p, RP_NO_SUM);
}
