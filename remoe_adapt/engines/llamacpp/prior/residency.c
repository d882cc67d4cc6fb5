/* ---- residency ---- */

typedef struct { uintptr_t from, to; uint64_t offset, inode; bool may_write, is_private; char path[PATH_MAX]; } mapping;

/* What lies at this address, by the kernel's list; false: nothing, or there is no such list. */
static bool find_mapping(const void *address, mapping *found) {
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) return false;
    char line[PATH_MAX + 256];
    bool is_there = false;
    while (!is_there && fgets(line, sizeof line, maps)) {
        unsigned long from, to, offset, inode;
        char rights[8];
        int name = 0;
        if (sscanf(line, "%lx-%lx %7s %lx %*s %lu %n", &from, &to, rights, &offset, &inode, &name) < 5) continue;
        if ((uintptr_t)address < from || (uintptr_t)address >= to) continue;
        line[strcspn(line, "\n")] = 0;
        is_there = true;
        *found = (mapping){from, to, offset, inode, rights[1] == 'w', rights[3] == 'p', ""};
        snprintf(found->path, sizeof found->path, "%s", line + name);
    }
    fclose(maps);
    return is_there;
}

/* Linux tells of a mapped file only to who owns it or may write it (since 5.2), to others that all is in memory. */
static bool tells_the_truth(const void *address) {
    mapping m;
    struct stat facts;
    if (!find_mapping(address, &m)) return false;
    if (!m.inode) return true; /* memory of its own */
    return !stat(m.path, &facts) && facts.st_ino == m.inode &&
           (facts.st_uid == geteuid() || !faccessat(AT_FDCWD, m.path, W_OK, AT_EACCESS));
}

/* Whether mincore is worth a question; the first one decides. */
static bool sees(rp *p, const layer_state *s) {
    if (!p->truth_known) {
        p->truth_known = true;
        p->c->is_blind = !tells_the_truth(s->ranges[0].data);
    }
    return !p->c->is_blind;
}

int rp_mincore_layer(rp *p, int layer, int pages) {
    if (layer < 0 || layer >= RP_LAYERS) return -1;
    layer_state *s = &p->layers[layer];
    if (!s->n_ranges || !s->resident) return -1;
    const bool can_see = sees(p, s);
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    static __thread unsigned char vec[1 << 16];
    int E = s->ranges[0].experts, calls = 0;
    float seen[RP_MAXE];
    int of[RP_MAXE];
    if (E > RP_MAXE) return -1;
    memset(seen, 0, sizeof *seen * E); memset(of, 0, sizeof *of * E);
    for (int r = 0; r < s->n_ranges && can_see; r++) {
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

uint64_t rp_expert_bytes(rp *p) {
    if (p->summed_at == p->graphs + 1) return p->expert_bytes;
    p->expert_bytes = 0;
    for (int i = 0; i < RP_LAYERS; i++)
        for (int j = 0; p->layers[i].E && j < p->layers[i].n_ranges; j++)
            if (p->layers[i].ranges[j].file != NO_FILE)
                p->expert_bytes += (uint64_t)p->layers[i].ranges[j].stride * (uint64_t)p->layers[i].ranges[j].experts;
    p->summed_at = p->graphs + 1;
    return p->expert_bytes;
}

int rp_experts(rp *p, int layer) { return layer >= 0 && layer < RP_LAYERS ? p->layers[layer].E : 0; }
