/* ---- reading ahead ---- */

/* The ids are known at the stop, before the products touch the pages of their experts. What is not in memory is asked
   of the kernel here, all at once: the disk has every read in its queue, and the first products run while later experts
   are on their way. Left to page faults each read waits for the one before it, and reads what lies around as well.

   Which experts stay is ours to say then: of each layer as many as its share of the budget holds, LRFU as in
   eviction/policy.py, the others given back. So this is an expert cache of a memory-mapped file, without a copy.

   In the mode RP_COST those of most recency to the prior stay, which are the ones that it prefers. An expert that is used
   once need not be among them: it is read, and given back at the next stop. LRFU would keep it in the place of one that
   is preferred; of the shipped model's experts a cache of a quarter, at gain 0.1, then misses 16.3 % and not 13.5 %. */

/* The kernel reads no more for one advice than a disk takes at a time. */
enum { PIECE_BYTES = 128 << 10 };
/* In graphs: how often a held expert is looked at whether it is still there, and how long it takes until one more is
   tried after the kernel took some back. */
enum { LOOK_EVERY = 16, GROW_EVERY = 256 };
#define LRFU_DECAY 0.9f

static uintptr_t page_down(uintptr_t a) { return a & ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1); }
static uintptr_t page_up(uintptr_t a) { return page_down(a + (uintptr_t)sysconf(_SC_PAGESIZE) - 1); }

static void forget_shelf(shelf *h) {
    free(h->is_held); free(h->is_spilled); free(h->uses); free(h->used_at);
    memset(h, 0, sizeof *h);
}

static bool make_shelf(shelf *h, int E) {
    h->is_held = calloc((size_t)E, sizeof *h->is_held); h->is_spilled = calloc((size_t)E, sizeof *h->is_spilled);
    h->uses = calloc((size_t)E, sizeof *h->uses); h->used_at = calloc((size_t)E, sizeof *h->used_at);
    if (h->is_held && h->is_spilled && h->uses && h->used_at) return true;
    forget_shelf(h);
    return false;
}

/* The open file behind a tensor. Pages that may be written are nobody's copy of a file: dropping them loses what is in
   them. */
static int file_of(rp *p, const range *g) {
    uintptr_t first = (uintptr_t)g->data, end = first + g->stride * (size_t)g->experts;
    for (int i = 0; i < p->n_files; i++) if (first >= p->files[i].from && end <= p->files[i].to) return i;
    mapping m;
    struct stat facts;
    if (p->n_files == MAX_FILES || !find_mapping(g->data, &m) || !m.inode || end > m.to) return NO_FILE;
    if (m.may_write && m.is_private) return NO_FILE;
    int fd = open(m.path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (fd < 0) return NO_FILE;
    if (fstat(fd, &facts) || facts.st_ino != m.inode || !S_ISREG(facts.st_mode)) { close(fd); return NO_FILE; }
    p->files[p->n_files] = (mapped_file){m.from, m.to, (int64_t)m.offset - (int64_t)m.from, fd};
    return p->n_files++;
}

static void forget_ahead(rp *p) {
    for (int i = 0; i < RP_LAYERS; i++) {
        forget_shelf(&p->layers[i].shelf);
        for (int j = 0; j < p->layers[i].n_ranges; j++) p->layers[i].ranges[j].file = UNKNOWN;
    }
    for (int i = 0; i < p->n_files; i++) close(p->files[i].fd);
    p->n_files = 0;
    p->spilled_layer = -1;
    p->c->held_bytes = 0;
}

/* Bytes of all experts that may be held; 0: reading ahead is off. */
static uint64_t budget_of(rp *p) {
    float share = p->c->budget_share;
    if (!(share > 0.0f)) return p->c->budget_bytes;
    return share >= 1.0f ? UINT64_MAX : (uint64_t)((double)share * (double)rp_expert_bytes(p));
}

static size_t expert_bytes(const layer_state *s) {
    size_t found = 0;
    for (int i = 0; i < s->n_ranges; i++) found += s->ranges[i].stride;
    return found;
}

/* Whole pages of the expert alone: those at its ends are its neighbours' too. */
static void give_back(rp *p, layer_state *s, int e) {
    for (int i = 0; i < s->n_ranges; i++) {
        const range *g = &s->ranges[i];
        uintptr_t from = page_up((uintptr_t)g->data + g->stride * (size_t)e);
        uintptr_t to = page_down((uintptr_t)g->data + g->stride * (size_t)(e + 1));
        if (to <= from) continue;
        mapped_file *f = &p->files[g->file];
        /* Pages that are mapped stay in memory, so they are unmapped first. */
        if (madvise((void *)from, to - from, MADV_DONTNEED)) { p->c->ahead_failed++; continue; }
        posix_fadvise(f->fd, (off_t)((int64_t)from + f->shift), (off_t)(to - from), POSIX_FADV_DONTNEED);
    }
}

static void ask_for(rp *p, const range *g, int e) {
    uintptr_t at = page_down((uintptr_t)g->data + g->stride * (size_t)e);
    uintptr_t to = page_up((uintptr_t)g->data + g->stride * (size_t)(e + 1));
    for (; at < to; at += PIECE_BYTES)
        if (madvise((void *)at, to - at < PIECE_BYTES ? to - at : PIECE_BYTES, MADV_WILLNEED)) p->c->ahead_failed++;
}

/* Whether the kernel has taken back what we hold: a look at one page. */
static bool is_stale(const layer_state *s, int e) {
    const range *g = &s->ranges[0];
    unsigned char there = 1;
    mincore((void *)page_down((uintptr_t)g->data + g->stride * (size_t)e + g->stride / 2), 1, &there);
    return !(there & 1);
}

static float worth(const rp *p, const shelf *h, int e) {
    return h->uses[e] * powf(LRFU_DECAY, (float)(p->graphs - h->used_at[e]));
}

/* It is held no more by our account; whether its pages are gone is another matter. */
static void let_go(rp *p, layer_state *s, int e) {
    s->shelf.is_held[e] = false;
    s->shelf.held--;
    p->c->held_bytes -= expert_bytes(s);
}

/* Until as many as `room` are held, the least worth of those that are not needed now. */
static void shrink_to(rp *p, layer_state *s, const bool *needed, int room) {
    while (s->shelf.held > room) {
        int least = -1;
        float worth_least = 0;
        for (int e = 0; e < s->E; e++) {
            if (!s->shelf.is_held[e] || needed[e]) continue;
            float value = worth(p, &s->shelf, e);
            if (least < 0 || value < worth_least) { least = e; worth_least = value; }
        }
        if (least < 0) return;
        give_back(p, s, least);
        let_go(p, s, least);
        p->c->ahead_dropped++;
    }
}

/* By what experts stay in the mode RP_COST [E]: the recency of the sequences of this batch. Of those that these have not
   used, LRFU decides, below 0: they are left from other texts. */
static void recencies(const rp *p, const layer_state *s, float *value) {
    memset(value, 0, sizeof *value * s->E);
    bool met[p->n_seq];
    memset(met, 0, sizeof met);
    int from = p->n > 0 ? p->begin : 0, to = p->n > 0 ? p->begin + p->rows : 1;
    for (int i = from; i < to && i < (p->n > 0 ? p->n : 1); i++) {
        int b = p->n > 0 ? p->seq[i] : 0;
        if (b < 0 || met[b]) continue;
        met[b] = true;
        for (int e = 0; e < s->E; e++) value[e] += s->rec[(size_t)b * s->E + e];
    }
    for (int e = 0; e < s->E; e++) if (value[e] < HELD_ABOVE) value[e] = -1.0f / (1e-30f + worth(p, &s->shelf, e));
}

/* Of the held and the needed as many as `room` stay, those of most recency. What is needed now is given back at the next
   stop if it does not: `is_passing`. */
static void keep_by_recency(rp *p, int layer, layer_state *s, const bool *needed, int room, bool *is_passing) {
    float value[RP_MAXE];
    int count = 0;
    recencies(p, s, value);
    for (int e = 0; e < s->E; e++) count += s->shelf.is_held[e] || needed[e];
    for (; count > room; count--) {
        int least = -1;
        for (int e = 0; e < s->E; e++)
            if ((s->shelf.is_held[e] || (needed[e] && !is_passing[e])) && (least < 0 || value[e] < value[least])) least = e;
        if (least < 0) return;
        if (s->shelf.is_held[least]) { let_go(p, s, least); p->c->ahead_dropped++; }
        if (!needed[least]) give_back(p, s, least);
        else { is_passing[least] = s->shelf.is_spilled[least] = true; p->spilled_layer = layer; }
    }
}

static void give_back_spilled(rp *p) {
    if (p->spilled_layer < 0) return;
    layer_state *s = &p->layers[p->spilled_layer];
    for (int e = 0; e < s->E; e++) if (s->shelf.is_spilled[e]) {
        s->shelf.is_spilled[e] = false;
        if (!s->shelf.is_held[e]) give_back(p, s, e);
    }
    p->spilled_layer = -1;
}

/* A budget above what the machine leaves would make it read twice: the kernel takes back what comes next, in the order
   of its own lists. So one that was found too large is cut, and grows again slowly. */
static int room_of(rp *p, layer_state *s, uint64_t budget, int stale) {
    shelf *h = &s->shelf;
    uint64_t all = rp_expert_bytes(p);
    /* A share is a float, so that a whole number of experts may come out as a little less. */
    int room = budget >= all ? s->E : (int)((double)s->E * ((double)budget / (double)all) + 1e-4);
    if (stale) {
        int kept = h->held - h->held / 16 - 1;
        h->limit = kept > 1 ? kept : 1;
        h->limited_at = p->graphs;
    } else if (h->limit && p->graphs - h->limited_at >= GROW_EVERY) {
        h->limit = h->limit < room ? h->limit + 1 : 0;
        h->limited_at = p->graphs;
    }
    return h->limit && h->limit < room ? h->limit : room;
}

/* Whether all experts of a layer lie in mapped files. Those in a GPU's memory, or rearranged in memory of their own, are
   not ours; other layers may be. */
static bool is_mapped(rp *p, layer_state *s) {
    for (int i = 0; i < s->n_ranges; i++) {
        range *g = &s->ranges[i];
        if (g->file == UNKNOWN) g->file = file_of(p, g);
        if (g->file == NO_FILE) return false;
    }
    return true;
}

/* The ids [n] that the products of this layer are about to use, -1 in between. */
static void read_ahead(rp *p, int layer, layer_state *s, int n, const int32_t *ids) {
    uint64_t budget = budget_of(p);
    if (!budget) {
        if (p->c->ahead_state) { forget_ahead(p); p->c->ahead_state = RP_AHEAD_OFF; }
        return;
    }
    if (!s->n_ranges || s->ranges[0].experts != s->E) return;
    if (!is_mapped(p, s)) {
        if (p->c->ahead_state != RP_AHEAD_ON) p->c->ahead_state = RP_AHEAD_NO_FILE;
        return;
    }
    if (!s->shelf.is_held && !make_shelf(&s->shelf, s->E)) return;
    p->c->ahead_state = RP_AHEAD_ON;
    uint64_t began = now_ns();
    give_back_spilled(p);
    bool needed[RP_MAXE] = {0};
    bool is_turn = (p->graphs + (uint64_t)layer) % LOOK_EVERY == 0 ||
                   (s->shelf.limit && p->graphs - s->shelf.limited_at < LOOK_EVERY);
    bool look_again = is_turn && sees(p, s);
    int missing[RP_MAXE], n_missing = 0, stale = 0;
    for (int i = 0; i < n; i++) {
        int e = ids[i];
        if (e < 0 || needed[e]) continue;
        needed[e] = true;
        s->shelf.uses[e] = 1.0f + worth(p, &s->shelf, e);
        s->shelf.used_at[e] = p->graphs;
        if (s->shelf.is_held[e] && look_again && is_stale(s, e)) {
            let_go(p, s, e);
            stale++;
        }
        if (s->shelf.is_held[e]) p->c->ahead_hits++;
        else missing[n_missing++] = e;
    }
    p->c->ahead_misses += (uint64_t)n_missing;
    p->c->ahead_stale += (uint64_t)stale;
    int room = room_of(p, s, budget, stale);
    bool is_passing[RP_MAXE] = {0};
    int n_read = room;
    if (p->c->mode == RP_COST) {
        keep_by_recency(p, layer, s, needed, room, is_passing);
        /* Those that stay come first, if not all can be read at a time. */
        for (int i = 0, at = 0; i < n_missing; i++) if (!is_passing[missing[i]]) { int e = missing[i]; missing[i] = missing[at]; missing[at++] = e; }
    } else {
        shrink_to(p, s, needed, room > n_missing ? room - n_missing : 0);
        n_read -= s->shelf.held;
    }
    n_read = n_read < 0 ? 0 : n_read < n_missing ? n_read : n_missing;
    /* Tensor by tensor, as the products go. */
    for (int i = 0; i < s->n_ranges; i++) for (int j = 0; j < n_read; j++) ask_for(p, &s->ranges[i], missing[j]);
    for (int j = 0; j < n_missing; j++) {
        if (j < n_read && !is_passing[missing[j]]) {
            s->shelf.is_held[missing[j]] = true;
            s->shelf.held++;
            p->c->held_bytes += expert_bytes(s);
        } else { s->shelf.is_spilled[missing[j]] = true; p->spilled_layer = layer; }
    }
    p->c->ahead_spilled += (uint64_t)(n_missing - n_read);
    p->c->ahead_bytes += (uint64_t)n_read * expert_bytes(s);
    p->c->ahead_ns += now_ns() - began;
}

/* ---- which experts are in memory, for RP_RESIDENT ---- */

static void look(rp *p, int layer, layer_state *s) {
    if (p->c->ahead_state == RP_AHEAD_ON && s->shelf.is_held) {
        float values[RP_MAXE];
        for (int e = 0; e < s->E; e++) values[e] = s->shelf.is_held[e];
        rp_set_resident(p, layer, s->E, values);
        return;
    }
    uint32_t every = p->c->look_every ? p->c->look_every : 1;
    if (s->looked_at != UINT64_MAX && p->graphs - s->looked_at < every) return;
    s->looked_at = p->graphs;
    if (!s->n_ranges || s->ranges[0].experts != s->E) return;
    uint64_t began = now_ns();
    uint32_t pages = p->c->pages;
    rp_mincore_layer(p, layer, pages > 64 ? 64 : (int)pages);
    p->c->mincore_ns += now_ns() - began;
}
